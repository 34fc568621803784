//! MeshPolicy and Policy as PeerAuthentication and RequestAuthentication, and what asks for tokens as AuthorizationPolicy
//! (policy A, F-4).
//!
//! Transport goes by levels as it did: mesh, namespace, ports of a service. What is asked of tokens is written for the ports
//! of each service by itself, because in the current API the levels add up and in 2018 one replaced the other.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::{Value, json};

use super::{
    super::{
        authn_v1alpha1::{Policy, PortSelector, Tokens},
        book::{Book, Notes},
        origins::{StringMatch, Trigger},
        tokens::{IssuerRule, KeySource, Location, Prefix},
        transport::strictness_of,
    },
    Conversion, Document, Ground, Labels, Served,
    express::is_template,
    selector,
};
use crate::workload::{ObjectName, Protocol, Service, ServicePort, TransportMode};

pub(super) fn convert(ground: &mut Ground<'_>, conversion: &mut Conversion) {
    let policies = policies(ground);
    for policy in &policies {
        check(ground, policy, conversion);
    }
    if !conversion.refusals.is_empty() {
        return;
    }
    put_scopes(ground, &policies, conversion);
    put_services(ground, &policies, conversion);
}

/// A policy of 2018, the oldest first.
#[derive(Clone)]
struct Applied {
    name: ObjectName,
    label: String,
    policy: Policy,
}

impl Applied {
    fn is_mesh_wide(&self) -> bool {
        self.name.namespace.is_empty()
    }

    fn asks_tokens(&self) -> bool {
        !self.policy.origins.is_empty()
    }
}

fn policies(ground: &Ground<'_>) -> Vec<Applied> {
    let book = Book::new(&ground.old, ground.mesh, &mut Notes::default());
    let all = book.policies.iter().chain(&book.mesh_policies);
    all.filter_map(|candidate| {
        let policy: &Policy = candidate.body.as_ref().ok()?;
        Some(Applied {
            name: candidate.name.clone(),
            label: candidate.label.to_string(),
            policy: policy.clone(),
        })
    })
    .collect()
}

/// What has no counterpart.
fn check(ground: &Ground<'_>, applied: &Applied, conversion: &mut Conversion) {
    let Applied { name, label, policy } = applied;
    if *name.namespace == *ground.mesh.root_namespace && policy.targets.is_empty() {
        let why = "the root namespace's PeerAuthentication speaks for the whole mesh, and this policy for its own namespace only";
        conversion.refuse(label, "metadata.namespace", why);
    }
    if policy.peer_is_optional && policy.mode != TransportMode::Disabled {
        let why = "true lets a peer of a foreign trust domain in as nobody: the current API has no such mode";
        conversion.refuse(label, "spec.peerIsOptional", why);
    }
    if policy.tokens == Tokens::Impossible {
        let why = "USE_ORIGIN without origins lets no request through: remove the policy and write an AuthorizationPolicy \
                   that denies, if that is meant";
        conversion.refuse(label, "spec.principalBinding", why);
    }
    for (index, origin) in policy.origins.iter().enumerate() {
        let field = format!("spec.origins[{index}].jwt");
        if origin.rule.is_exchanged {
            let why = "tokens that were exchanged, with their claims in original_claims, are unknown to the current API";
            conversion.refuse(label, &format!("{field}.jwtHeaders"), why);
        }
        if origin.triggers != policy.origins[0].triggers {
            let why = "rules that differ from issuer to issuer: the current API asks for a token by path, not by issuer";
            conversion.refuse(label, &format!("{field}.triggerRules"), why);
        }
        for (number, trigger) in origin.triggers.iter().enumerate() {
            if let Err(why) = paths(trigger) {
                conversion.refuse(label, &format!("{field}.triggerRules[{number}]"), why);
            }
        }
    }
    for (index, target) in policy.targets.iter().enumerate() {
        let service = ground.services.get(&ObjectName::new(&name.namespace, &target.service));
        let Some(service) = service else {
            let why = format!(
                "{:?} is no Service of these documents: without it nobody knows its workloads and their ports",
                target.service
            );
            conversion.refuse(label, &format!("spec.targets[{index}].name"), why);
            continue;
        };
        if let Err(why) = ground.served(service) {
            conversion.refuse(label, &format!("spec.targets[{index}].name"), why);
        }
        for (number, selector) in target.ports.iter().enumerate() {
            if !service.ports.iter().any(|port| is_port(selector, port)) {
                let field = format!("spec.targets[{index}].ports[{number}]");
                conversion.leave_out(label, &field, "the service has no such port, and it had no effect");
            }
        }
    }
}

fn is_port(selector: &PortSelector, port: &ServicePort) -> bool {
    match selector {
        PortSelector::Number(number) => *number == port.port,
        PortSelector::Name(name) => port.name.as_ref() == Some(name),
    }
}

/// Mesh and namespaces.
fn put_scopes(ground: &mut Ground<'_>, policies: &[Applied], conversion: &mut Conversion) {
    for applied in policies.iter().filter(|applied| applied.policy.targets.is_empty()) {
        let namespace = if applied.is_mesh_wide() {
            ground.mesh.root_namespace.clone()
        } else {
            applied.name.namespace.to_string()
        };
        let mut value = ground.head("PeerAuthentication", &namespace, "default");
        value["spec"]["mtls"] = json!({"mode": mode(applied.policy.mode)});
        conversion.documents.push(Document {
            value,
            from: BTreeSet::from([applied.label.clone()]),
            checks: BTreeSet::new(),
        });
    }
}

const fn mode(mode: TransportMode) -> &'static str {
    match mode {
        TransportMode::Strict => "STRICT",
        TransportMode::Permissive => "PERMISSIVE",
        TransportMode::Disabled => "DISABLE",
    }
}

/// What services have of their own: modes by port, and tokens.
fn put_services(ground: &mut Ground<'_>, policies: &[Applied], conversion: &mut Conversion) {
    let mut modes: BTreeMap<(Arc<str>, Labels), Modes> = BTreeMap::new();
    let services: Vec<Service> = ground.services.values().cloned().collect();
    for service in &services {
        let chosen: Vec<&Applied> =
            service.ports.iter().filter_map(|port| effective(policies, service, port)).collect();
        let is_targeted = chosen.iter().any(|applied| !applied.policy.targets.is_empty());
        let asks_tokens = chosen.iter().any(|applied| applied.asks_tokens());
        if !is_targeted && !asks_tokens {
            continue;
        }
        let served = match ground.served(service) {
            Ok(served) => served,
            Err(why) => {
                let label = chosen.first().map_or("", |applied| &applied.label).to_owned();
                conversion.refuse(&label, "spec.origins", format!("service {}: {why}", service.name));
                continue;
            }
        };
        let served: BTreeMap<u16, (Protocol, Vec<ServicePort>)> = served
            .into_iter()
            .map(|(port, Served { protocol, ports })| {
                (port, (protocol, ports.into_iter().cloned().collect()))
            })
            .collect();
        for (port, (_, ports)) in &served {
            let targeted = ports.iter().filter_map(|port| effective(policies, service, port));
            let targeted: Vec<&Applied> = targeted.collect();
            if !targeted.iter().any(|applied| !applied.policy.targets.is_empty()) {
                continue;
            }
            let strictest =
                targeted.iter().map(|applied| applied.policy.mode).max_by_key(|mode| strictness_of(*mode));
            let key = (service.name.namespace.clone(), service.selector.clone());
            let entry = modes.entry(key).or_insert_with(|| Modes::new(&service.name.name));
            entry.ports.extend(strictest.map(|mode| (*port, mode)));
            entry.from.extend(targeted.iter().map(|applied| applied.label.clone()));
        }
        put_tokens(ground, policies, service, &served, conversion);
    }
    refuse_overlaps(ground, &modes, conversion);
    for ((namespace, labels), Modes { ports, from, name }) in modes {
        let mut value = ground.head("PeerAuthentication", &namespace, &name);
        let ports: BTreeMap<String, Value> = ports
            .into_iter()
            .map(|(port, chosen)| (port.to_string(), json!({"mode": mode(chosen)})))
            .collect();
        value["spec"] = json!({"selector": selector(&labels), "portLevelMtls": ports});
        conversion.documents.push(Document { value, from, checks: BTreeSet::new() });
    }
    refuse_ports_of_no_service(ground, policies, conversion);
}

struct Modes {
    name: String,
    ports: BTreeMap<u16, TransportMode>,
    from: BTreeSet<String>,
}

impl Modes {
    fn new(service: &str) -> Self {
        Self { name: service.to_owned(), ports: BTreeMap::new(), from: BTreeSet::new() }
    }
}

/// The one policy of a service's port (policy A-4).
fn effective<'p>(policies: &'p [Applied], service: &Service, port: &ServicePort) -> Option<&'p Applied> {
    let here = || policies.iter().filter(|applied| applied.name.namespace == service.name.namespace);
    here()
        .find(|applied| applied.policy.targets.iter().any(|target| target.includes(&service.name.name, port)))
        .or_else(|| here().find(|applied| applied.policy.targets.is_empty()))
        .or_else(|| policies.iter().find(|applied| applied.is_mesh_wide()))
}

/// Of several PeerAuthentications that select a workload the oldest alone counts (policy F-1).
fn refuse_overlaps(
    ground: &Ground<'_>,
    modes: &BTreeMap<(Arc<str>, Labels), Modes>,
    conversion: &mut Conversion,
) {
    for workload in ground.workloads.values() {
        let selecting = modes.iter().filter(|((namespace, labels), _)| {
            *namespace == workload.name.namespace && super::selects(labels, workload)
        });
        let selecting: Vec<&Modes> = selecting.map(|(_, modes)| modes).collect();
        if let [_, second, ..] = selecting[..] {
            let why = format!(
                "policies of several services select workload {}, each by labels of its own, and of several PeerAuthentications \
                 one counts",
                workload.name
            );
            let label = second.from.first().cloned().unwrap_or_default();
            conversion.refuse(&label, "spec.targets", why);
        }
    }
}

/// HTTP ports that only a workload declares can be selected by no service.
fn refuse_ports_of_no_service(ground: &Ground<'_>, policies: &[Applied], conversion: &mut Conversion) {
    for workload in ground.workloads.values() {
        let owners = super::owners(workload, ground.services);
        let is_free = |port: u16, protocol| protocol != Protocol::Tcp && !owners.contains_key(&port);
        let Some(port) = workload.ports.iter().find(|port| is_free(port.port, port.protocol)) else {
            continue;
        };
        let here = policies.iter().find(|applied| {
            applied.name.namespace == workload.name.namespace && applied.policy.targets.is_empty()
        });
        let applied = here.or_else(|| policies.iter().find(|applied| applied.is_mesh_wide()));
        if let Some(applied) = applied.filter(|applied| applied.asks_tokens()) {
            let why = format!(
                "port {} of workload {} belongs to no service: give it one",
                port.port, workload.name
            );
            conversion.refuse(&applied.label, "spec.origins", why);
        }
    }
}

fn put_tokens(
    ground: &mut Ground<'_>,
    policies: &[Applied],
    service: &Service,
    served: &BTreeMap<u16, (Protocol, Vec<ServicePort>)>,
    conversion: &mut Conversion,
) {
    let mut asking: Vec<(&Applied, BTreeSet<u16>)> = Vec::new();
    for (target, (_, ports)) in served.iter().filter(|(_, (protocol, _))| *protocol != Protocol::Tcp) {
        for port in ports {
            let Some(applied) = effective(policies, service, port).filter(|applied| applied.asks_tokens())
            else {
                continue;
            };
            match asking.iter_mut().find(|(known, _)| known.label == applied.label) {
                Some((_, targets)) => {
                    targets.insert(*target);
                }
                None => asking.push((applied, BTreeSet::from([*target]))),
            }
        }
    }
    for (applied, ports) in asking {
        let wanted = format!("{}-{}", applied.name.name, service.name.name);
        let mut value = ground.head("RequestAuthentication", &service.name.namespace, &wanted);
        let rules: Vec<Value> = applied.policy.origins.iter().map(|origin| jwt_rule(&origin.rule)).collect();
        value["spec"] = json!({"selector": selector(&service.selector), "jwtRules": rules});
        let mut checks = BTreeSet::from([
            "a request with a token that is not valid is refused on every path, also where no token is asked for".to_owned(),
        ]);
        let headers = applied.policy.origins.iter().flat_map(|origin| &origin.rule.locations);
        if headers.clone().any(|l| matches!(l, Location::Header { prefix: Prefix::OptionalBearer, .. })) {
            checks.insert(
                "the header holds the token alone: one behind \"Bearer \" was accepted too".to_owned(),
            );
        }
        let from = BTreeSet::from([applied.label.clone()]);
        conversion.documents.push(Document { value, from: from.clone(), checks });
        if applied.policy.tokens != Tokens::Required {
            continue;
        }
        let mut value =
            ground.head("AuthorizationPolicy", &service.name.namespace, &format!("{wanted}-token"));
        value["spec"] = json!({
            "selector": selector(&service.selector),
            "action": "DENY",
            "rules": denials(&applied.policy, &ports),
        });
        let checks = BTreeSet::from(["who has no token is answered 403, and was answered 401".to_owned()]);
        conversion.documents.push(Document { value, from, checks });
    }
}

fn jwt_rule(rule: &IssuerRule) -> Value {
    let mut value = json!({"issuer": rule.issuer, "forwardOriginalToken": true});
    if !rule.audiences.is_empty() {
        value["audiences"] = json!(rule.audiences);
    }
    match &rule.keys {
        KeySource::Inline(keys) => value["jwks"] = json!(&**keys),
        KeySource::Address(address) => value["jwksUri"] = json!(&**address),
        KeySource::Discovery(_) => {}
    }
    if rule.locations == Location::usual() {
        return value;
    }
    let headers = rule.locations.iter().filter_map(|location| match location {
        Location::Header { name, prefix: Prefix::OptionalBearer } => Some(json!({ "name": name })),
        Location::Header { name, prefix: Prefix::Required(prefix) } => {
            Some(json!({"name": name, "prefix": prefix}))
        }
        Location::Parameter(_) | Location::Cookie(_) => None,
    });
    let headers: Vec<Value> = headers.collect();
    let parameters = rule.locations.iter().filter_map(|location| match location {
        Location::Parameter(name) => Some(json!(name)),
        Location::Header { .. } | Location::Cookie(_) => None,
    });
    let parameters: Vec<Value> = parameters.collect();
    for (name, list) in [("fromHeaders", headers), ("fromParams", parameters)] {
        if !list.is_empty() {
            value[name] = Value::Array(list);
        }
    }
    value
}

/// No token of these issuers, on a path that asks for one, in a request that is no CORS preflight: a rule for each part that
/// a preflight has (policy ).
fn denials(policy: &Policy, ports: &BTreeSet<u16>) -> Vec<Value> {
    let issuers: Vec<&str> = policy.origins.iter().map(|origin| &*origin.rule.issuer).collect();
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    let triggers = policy.origins.first().map_or(&[][..], |origin| &origin.triggers);
    let mut operations = Vec::new();
    for trigger in triggers {
        let (included, excluded) = paths(trigger).unwrap_or_default();
        let mut operation = json!({ "ports": ports });
        for (name, list) in [("paths", included), ("notPaths", excluded)] {
            if !list.is_empty() {
                operation[name] = json!(list);
            }
        }
        operations.push(operation);
    }
    if operations.is_empty() {
        operations.push(json!({ "ports": ports }));
    }
    let no_token = json!({"key": "request.auth.claims[iss]", "notValues": issuers});
    let mut rules = Vec::new();
    for operation in operations {
        let mut no_preflight = operation.clone();
        no_preflight["notMethods"] = json!(["OPTIONS"]);
        rules.push(json!({"to": [{"operation": no_preflight}], "when": [no_token]}));
        for header in PREFLIGHT_HEADERS {
            let absent = is_absent(header);
            rules.push(json!({"to": [{"operation": operation}], "when": [no_token, absent]}));
        }
    }
    rules
}

/// The headers that make a request with OPTIONS a CORS preflight, if none of them is empty (policy ).
pub(super) const PREFLIGHT_HEADERS: [&str; 2] = ["origin", "access-control-request-method"];

/// The header is not there, or empty.
pub(super) fn is_absent(header: &str) -> Value {
    json!({"key": format!("request.headers[{header}]"), "notValues": ["*"]})
}

/// Included and excluded paths in the words of the current API.
pub(super) fn paths(trigger: &Trigger) -> Result<(Vec<String>, Vec<String>), String> {
    let list = |matches: &[StringMatch]| matches.iter().map(path).collect::<Result<Vec<_>, _>>();
    Ok((list(&trigger.included)?, list(&trigger.excluded)?))
}

fn path(written: &StringMatch) -> Result<String, String> {
    let text = match written {
        StringMatch::Exact(text) if !text.starts_with('*') && !text.ends_with('*') => text.clone(),
        StringMatch::Prefix(text) if !text.starts_with('*') => format!("{text}*"),
        StringMatch::Suffix(text) => format!("*{text}"),
        StringMatch::Exact(text) | StringMatch::Prefix(text) => {
            return Err(format!("{text:?}: in the current API its star is a wildcard"));
        }
        StringMatch::Regex(text, _) => {
            return Err(format!("regex {text:?}: the current API has no regular expressions"));
        }
    };
    if is_template(&text) {
        return Err(format!("{text:?}: in the current API these braces are operators"));
    }
    Ok(text)
}
