//! Front end of `security.istio.io/v1` (and `v1beta1`): `PeerAuthentication` and `AuthorizationPolicy` (policy F-1, F-3).

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    matching::{Account, Pattern, TokenPrincipal},
    paths::PathPattern,
    rbac_v1alpha1::{inside, metadata_condition, warn_of_scheme},
    reader::{Fault, Fields, Item, Warnings, networks, patterns, ports, usable, warn_of_stars},
    rules::{Condition, Rule, Values},
    seen::Asked,
};
use crate::{decode::Object, workload::TransportMode};

/// Labels that a workload must carry; empty selects all.
pub(super) type Selector = BTreeMap<String, String>;

/// Annotation that takes a policy out of force (policy F-3).
const DRY_RUN_ANNOTATION: &str = "istio.io/dry-run";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PeerAuthentication {
    /// Empty: the whole namespace, or the mesh in the root namespace (policy F-1).
    pub(super) selector: Selector,
    /// `None` (UNSET) inherits from the next level.
    pub(super) mode: Option<TransportMode>,
    /// By the **workload's** port.
    pub(super) ports: BTreeMap<u16, Option<TransportMode>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AuthorizationPolicy {
    pub(super) selector: Selector,
    pub(super) action: Action,
    pub(super) is_dry_run: bool,
    pub(super) rules: Vec<PolicyRule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Allow,
    Deny,
    Audit,
    Custom,
}

impl AuthorizationPolicy {
    /// Whether it decides anything: AUDIT only records, a dry run not even that (policy F-3, F-4).
    pub(super) fn is_enforced(&self) -> bool {
        !self.is_dry_run && self.decides()
    }

    /// Whether it would decide anything if it were enforced.
    pub(super) fn decides(&self) -> bool {
        self.action != Action::Audit
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PolicyRule {
    pub(super) rule: Rule,
    /// Fields that only a request can answer: an ALLOW rule never matches on layer 4, another one is judged
    /// without them (policy F-3).
    pub(super) request_fields: Vec<String>,
}

/// Reads a `PeerAuthentication` (policy F-1).
pub(super) fn peer_authentication(
    object: &Object,
    warnings: &mut Warnings,
) -> Result<PeerAuthentication, Fault> {
    let mut fields = Fields::spec(object)?;
    let selector = selector(&mut fields, warnings)?;
    let mode = fields.take("mtls")?.map(|item| mutual_tls(&item)).transpose()?.flatten();
    let port_level = fields.take("portLevelMtls")?;
    let ports = port_level.as_ref().map_or_else(|| Ok(BTreeMap::new()), port_modes)?;
    if let (Some(item), true) = (&port_level, selector.is_empty() && !ports.is_empty()) {
        return Err(
            item.fault("a selector beside portLevelMtls", "select the workloads whose ports are meant")
        );
    }
    fields.finish()?;
    Ok(PeerAuthentication { selector, mode, ports })
}

/// `selector.matchLabels`; a selector that is there but empty selects all, as an absent one does.
pub(super) fn selector(fields: &mut Fields<'_>, warnings: &mut Warnings) -> Result<Selector, Fault> {
    let Some(item) = fields.take("selector")? else { return Ok(Selector::new()) };
    let mut inner = Fields::open(&item)?;
    let labels = inner.labels("matchLabels")?.unwrap_or_default();
    inner.finish()?;
    for (key, value) in &labels {
        if key.is_empty() || key.contains('*') || value.contains('*') {
            let expected = "labels without a star";
            return Err(item.fault(expected, "write the label as the workload carries it"));
        }
    }
    if labels.is_empty() {
        warnings.say(&item.path, "an empty selector selects every workload of the scope");
    }
    Ok(labels)
}

fn mutual_tls(item: &Item<'_>) -> Result<Option<TransportMode>, Fault> {
    let mut fields = Fields::open(item)?;
    let mode = fields.one_of(
        "mode",
        &[
            ("UNSET", None),
            ("DISABLE", Some(TransportMode::Disabled)),
            ("PERMISSIVE", Some(TransportMode::Permissive)),
            ("STRICT", Some(TransportMode::Strict)),
        ],
    )?;
    fields.finish()?;
    Ok(mode)
}

fn port_modes(item: &Item<'_>) -> Result<BTreeMap<u16, Option<TransportMode>>, Fault> {
    let Value::Object(entries) = item.value else {
        return Err(item.fault("a mapping of ports", "write 8080: {mode: STRICT}"));
    };
    let mut modes = BTreeMap::new();
    for (key, value) in entries {
        let entry = Item { path: format!("{}[{key}]", item.path), value };
        let Some(port) = super::reader::port(key).filter(|port| *port > 0) else {
            let key = Value::from(key.as_str());
            return Err(Fault::new(
                &entry.path,
                &key,
                "a port number from 1 to 65535",
                "write the workload's port",
            ));
        };
        modes.insert(port, mutual_tls(&entry)?);
    }
    Ok(modes)
}

/// Reads an `AuthorizationPolicy` (policy F-3).
pub(super) fn authorization_policy(
    object: &Object,
    warnings: &mut Warnings,
) -> Result<AuthorizationPolicy, Fault> {
    let mut fields = Fields::spec(object)?;
    refuse_target_references(&mut fields)?;
    let selector = selector(&mut fields, warnings)?;
    let action = action(&mut fields)?;
    let provider = fields.take("provider")?;
    match (action, provider) {
        (Action::Custom, None) => {
            return Err(Fault::new(
                "spec.provider",
                &Value::Null,
                "a provider for CUSTOM",
                "write provider: {name: …}",
            ));
        }
        (Action::Custom, Some(provider)) => {
            let mut inner = Fields::open(&provider)?;
            inner.text("name")?;
            inner.finish()?;
        }
        (Action::Allow | Action::Deny | Action::Audit, Some(provider)) => {
            return Err(
                provider.fault("no provider, except for CUSTOM", "remove it, or write action: CUSTOM")
            );
        }
        (Action::Allow | Action::Deny | Action::Audit, None) => {}
    }
    let items = fields.list("rules")?;
    fields.finish()?;
    if items.is_empty() && matches!(action, Action::Deny | Action::Custom) {
        warnings.say("spec.rules", "no rules: it denies nobody");
    }
    let mut rules = Vec::new();
    for (index, item) in items.iter().enumerate() {
        rules.push(rule(index, item, object, warnings)?);
    }
    Ok(AuthorizationPolicy { selector, action, is_dry_run: is_dry_run(object, warnings), rules })
}

pub(super) fn action(fields: &mut Fields<'_>) -> Result<Action, Fault> {
    fields.one_of(
        "action",
        &[
            ("ALLOW", Action::Allow),
            ("DENY", Action::Deny),
            ("AUDIT", Action::Audit),
            ("CUSTOM", Action::Custom),
        ],
    )
}

pub(super) fn is_dry_run(object: &Object, warnings: &mut Warnings) -> bool {
    match object.annotations.get(DRY_RUN_ANNOTATION).map(String::as_str) {
        Some("true") => true,
        None | Some("false") => false,
        Some(other) => {
            let field = format!("metadata.annotations[{DRY_RUN_ANNOTATION}]");
            warnings
                .say(&field, format!("{other:?} is neither \"true\" nor \"false\": the policy is enforced"));
            false
        }
    }
}

pub(super) fn refuse_target_references(fields: &mut Fields<'_>) -> Result<(), Fault> {
    for name in ["targetRef", "targetRefs"] {
        if let Some(item) = fields.take(name)?
            && item.value.as_array().is_none_or(|list| !list.is_empty())
        {
            return Err(item.fault(
                "a selector",
                "select workloads by their labels: this mesh has no waypoints or gateways",
            ));
        }
    }
    Ok(())
}

fn rule(
    index: usize,
    item: &Item<'_>,
    object: &Object,
    warnings: &mut Warnings,
) -> Result<PolicyRule, Fault> {
    let mut fields = Fields::open(item)?;
    let mut request_fields = Vec::new();
    let mut reading = Reading { object, warnings, request_fields: &mut request_fields };
    let from = reading.alternatives(&mut fields, "from", "source", Reading::source)?;
    let to = reading.alternatives(&mut fields, "to", "operation", Reading::operation)?;
    let mut when = Vec::new();
    for item in fields.list("when")? {
        reading.condition(&item, &mut when)?;
    }
    fields.finish()?;
    let label = format!("rules[{index}]").into();
    let asks_requests = !request_fields.is_empty();
    Ok(PolicyRule { rule: Rule { label, from, to, when, asks_requests }, request_fields })
}

/// One rule while it is read.
struct Reading<'r> {
    object: &'r Object,
    warnings: &'r mut Warnings,
    request_fields: &'r mut Vec<String>,
}

type ReadConditions<'r> = fn(&mut Reading<'r>, &mut Fields<'_>) -> Result<(Vec<Condition>, bool), Fault>;

impl<'r> Reading<'r> {
    /// `from: [{source: …}]` or `to: [{operation: …}]`. Absent is no demand; empty would be one that nobody meant.
    fn alternatives(
        &mut self,
        fields: &mut Fields<'_>,
        list: &'static str,
        inner: &'static str,
        read: ReadConditions<'r>,
    ) -> Result<Vec<Vec<Condition>>, Fault> {
        let Some(list) = fields.take(list)? else { return Ok(Vec::new()) };
        let items = list.items()?;
        if items.is_empty() {
            return Err(list.fault("at least one entry", "remove the field to demand nothing"));
        }
        let mut alternatives = Vec::new();
        for item in items {
            let mut entry = Fields::open(&item)?;
            let Some(part) = entry.take(inner)? else {
                entry.finish()?;
                return Err(item.fault(&format!("an entry with {inner}"), &format!("write - {inner}: {{…}}")));
            };
            entry.finish()?;
            let mut part_fields = Fields::open(&part)?;
            let (conditions, has_demands) = read(self, &mut part_fields)?;
            part_fields.finish()?;
            if !has_demands {
                return Err(
                    part.fault("at least one field with a value", "remove the entry to demand nothing")
                );
            }
            alternatives.push(conditions);
        }
        Ok(alternatives)
    }

    fn source(&mut self, fields: &mut Fields<'_>) -> Result<(Vec<Condition>, bool), Fault> {
        let mut found = Found::default();
        let own = self.object.name.namespace.clone();
        let lists: [(&'static str, &'static str, Attribute); 6] = [
            ("principals", "notPrincipals", Attribute::Principal),
            ("namespaces", "notNamespaces", Attribute::Namespace),
            ("ipBlocks", "notIpBlocks", Attribute::SourceAddress),
            // Nobody stands in between whose word for another address counts.
            ("remoteIpBlocks", "notRemoteIpBlocks", Attribute::SourceAddress),
            ("serviceAccounts", "notServiceAccounts", Attribute::ServiceAccount),
            ("trustDomains", "notTrustDomains", Attribute::TrustDomain),
        ];
        for (name, not_name, attribute) in lists {
            found.add(fields, name, |items| attribute.compare(items, false, &own, self.warnings))?;
            found.add(fields, not_name, |items| attribute.compare(items, true, &own, self.warnings))?;
        }
        for name in ["requestPrincipals", "notRequestPrincipals"] {
            found.ask_request(fields, name, Demand::Principals, self.request_fields, self.warnings)?;
        }
        Ok((found.conditions, found.has_demands))
    }

    fn operation(&mut self, fields: &mut Fields<'_>) -> Result<(Vec<Condition>, bool), Fault> {
        let mut found = Found::default();
        let port = Attribute::DestinationPort;
        found.add(fields, "ports", |items| port.compare(items, false, "", self.warnings))?;
        found.add(fields, "notPorts", |items| port.compare(items, true, "", self.warnings))?;
        let demands: [(&'static str, &'static str, Demand); 3] = [
            ("hosts", "notHosts", Demand::Hosts),
            ("methods", "notMethods", Demand::Methods),
            ("paths", "notPaths", Demand::Paths),
        ];
        for (name, not_name, demand) in demands {
            found.ask_request(fields, name, demand.clone(), self.request_fields, self.warnings)?;
            found.ask_request(fields, not_name, demand, self.request_fields, self.warnings)?;
        }
        Ok((found.conditions, found.has_demands))
    }

    fn condition(&mut self, item: &Item<'_>, when: &mut Vec<Condition>) -> Result<(), Fault> {
        let mut fields = Fields::open(item)?;
        let Some(key_item) = fields.take("key")? else {
            return Err(fields.fault("a condition with a key", "name the attribute, such as source.ip"));
        };
        let key = key_item.filled_text()?;
        let (values, not_values) = (fields.texts("values")?, fields.texts("notValues")?);
        fields.finish()?;
        if values.is_empty() && not_values.is_empty() {
            return Err(item.fault("values or notValues", "write a value or remove the condition"));
        }
        let attribute = match key {
            "source.ip" | "remote.ip" => Attribute::SourceAddress,
            "source.namespace" => Attribute::Namespace,
            "source.principal" => Attribute::Principal,
            "source.serviceAccount" => Attribute::ServiceAccount,
            "source.trustDomain" => Attribute::TrustDomain,
            "destination.ip" => Attribute::DestinationAddress,
            "destination.port" => Attribute::DestinationPort,
            "connection.sni" => Attribute::ServerName,
            key if demand(key).is_some() => {
                self.request_fields.push(key.to_owned());
                let demand = demand(key).unwrap_or(Demand::Principals);
                for (items, is_negated) in [(values, false), (not_values, true)] {
                    if !items.is_empty() {
                        when.push(demand.clone().compare(&items, is_negated, self.warnings));
                    }
                }
                return Ok(());
            }
            key if let Some(condition) = metadata_condition(key, &values, self.warnings)
                && not_values.is_empty() =>
            {
                when.push(condition);
                return Ok(());
            }
            _ => {
                // policy G-3, G-23
                self.warnings
                    .say(&key_item.path, format!("{key:?} is no attribute that a connection can answer"));
                when.push(Condition::undecidable());
                return Ok(());
            }
        };
        let own = self.object.name.namespace.clone();
        for (items, is_negated) in [(values, false), (not_values, true)] {
            if !items.is_empty() {
                when.push(attribute.compare(&items, is_negated, &own, self.warnings));
            }
        }
        Ok(())
    }
}

/// What only a request can answer (policy F-3).
#[derive(Clone)]
enum Demand {
    Hosts,
    Methods,
    Paths,
    Principals,
    Other(Asked),
}

/// The keys of `when` that only a request can answer.
fn demand(key: &str) -> Option<Demand> {
    match key {
        "request.auth.principal" => Some(Demand::Principals),
        "request.auth.audiences" => Some(Demand::Other(Asked::Audience)),
        "request.auth.presenter" => Some(Demand::Other(Asked::Presenter)),
        key => {
            let header = inside(key, "request.headers");
            let claims = inside(key, "request.auth.claims");
            header.map(|name| Demand::Other(Asked::Header(name.to_ascii_lowercase().into()))).or_else(|| {
                let path = claims?.split("][").map(Into::into).collect();
                Some(Demand::Other(Asked::Claim(path)))
            })
        }
    }
}

impl Demand {
    fn compare(self, items: &[Item<'_>], is_negated: bool, warnings: &mut Warnings) -> Condition {
        match self {
            Self::Paths => {
                let expected = "a path whose operators {*} and {**} are whole segments, {**} the last";
                let written: Vec<Item<'_>> = items
                    .iter()
                    .filter(|item| !item.value.as_str().unwrap_or_default().contains('{'))
                    .cloned()
                    .collect();
                warn_of_stars(&written, warnings);
                Condition::either(
                    is_negated,
                    usable(items, expected, warnings, PathPattern::new),
                    Values::Paths,
                )
            }
            Self::Principals => {
                let read = patterns(items, warnings, TokenPrincipal::new);
                Condition::either(is_negated, read, Values::TokenPrincipals)
            }
            Self::Hosts => Self::Other(Asked::Host).compare(items, is_negated, warnings),
            Self::Methods => Self::Other(Asked::Method).compare(items, is_negated, warnings),
            Self::Other(asked) => {
                let read = patterns(items, warnings, |text| Pattern::new(&asked.written(text)));
                Condition::either(is_negated, read, |patterns| Values::Request(asked, patterns))
            }
        }
    }
}

/// The conditions of one source or operation.
#[derive(Default)]
struct Found {
    conditions: Vec<Condition>,
    has_demands: bool,
}

impl Found {
    fn add(
        &mut self,
        fields: &mut Fields<'_>,
        name: &'static str,
        compare: impl FnOnce(&[Item<'_>]) -> Condition,
    ) -> Result<(), Fault> {
        let items = fields.texts(name)?;
        if !items.is_empty() {
            self.has_demands = true;
            self.conditions.push(compare(&items));
        }
        Ok(())
    }

    fn ask_request(
        &mut self,
        fields: &mut Fields<'_>,
        name: &'static str,
        demand: Demand,
        request_fields: &mut Vec<String>,
        warnings: &mut Warnings,
    ) -> Result<(), Fault> {
        let items = fields.texts(name)?;
        if !items.is_empty() {
            self.has_demands = true;
            request_fields.push(name.to_owned());
            self.conditions.push(demand.compare(&items, name.starts_with("not"), warnings));
        }
        Ok(())
    }
}

/// An attribute of the current API that layer 4 can answer.
#[derive(Clone, Copy)]
enum Attribute {
    Principal,
    Namespace,
    ServiceAccount,
    TrustDomain,
    SourceAddress,
    DestinationAddress,
    DestinationPort,
    ServerName,
}

impl Attribute {
    fn compare(
        self,
        items: &[Item<'_>],
        is_negated: bool,
        own_namespace: &str,
        warnings: &mut Warnings,
    ) -> Condition {
        let texts = |warnings: &mut Warnings| patterns(items, warnings, Pattern::new);
        match self {
            Self::Principal => {
                for item in items {
                    warn_of_scheme(item, warnings);
                }
                Condition::either(is_negated, texts(warnings), Values::Principals)
            }
            Self::Namespace => Condition::either(is_negated, texts(warnings), Values::Namespaces),
            Self::ServiceAccount => {
                let read = patterns(items, warnings, |text| Account::new(text, own_namespace));
                Condition::either(is_negated, read, Values::ServiceAccounts)
            }
            Self::TrustDomain => Condition::either(is_negated, texts(warnings), Values::TrustDomains),
            Self::SourceAddress => {
                Condition::either(is_negated, networks(items, warnings), Values::SourceAddresses)
            }
            Self::DestinationAddress => {
                Condition::either(is_negated, networks(items, warnings), Values::DestinationAddresses)
            }
            Self::DestinationPort => {
                Condition::either(is_negated, ports(items, warnings), Values::DestinationPorts)
            }
            Self::ServerName => Condition::either(is_negated, texts(warnings), Values::ServerNames),
        }
    }
}
