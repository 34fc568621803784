//! RbacConfig, ServiceRole and ServiceRoleBinding as AuthorizationPolicy (policy B-1 to B-11, F-4).
//!
//! The switch becomes policies that allow nothing, or everything where it does not run; each role becomes one policy for
//! each selection of workloads to which its rules apply.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::{Value, json};

use super::{
    super::{
        book::{Book, Chosen, Notes},
        compile::{Inventory, SERVICE_SUFFIX, compile},
        matching::{Pattern, Text},
        objects::Body,
        origins::Trigger,
        rbac_v1alpha1::{AccessRule, DestinationAttribute, Mode, ServiceRole, ServiceRoleBinding, Switch},
    },
    Conversion, Document, Ground, Labels, authn, both,
    express::{Principals, Written, written},
    object, prove, selector,
};
use crate::workload::{ObjectName, Protocol, Service, Workload};

/// Marks a policy that is only tried (policy F-3).
const DRY_RUN: &str = "istio.io/dry-run";

pub(super) fn convert(ground: &mut Ground<'_>, conversion: &mut Conversion) {
    let Some((label, switch)) = switch(ground) else {
        leave_out_roles(ground, conversion, "RBAC runs nowhere, so that it decides nothing");
        return;
    };
    if switch.mode == Mode::Off {
        conversion.leave_out(&label, "spec.mode", "RBAC is off");
        leave_out_roles(ground, conversion, "RBAC is off, so that it decides nothing");
        return;
    }
    let before = conversion.refusals.len();
    let mut rbac = Rbac { ground, conversion, label, switch, senders: BTreeMap::new() };
    rbac.convert_switch();
    if rbac.conversion.refusals.len() == before {
        rbac.convert_roles();
    }
}

/// The object that decides where RBAC runs.
fn switch(ground: &Ground<'_>) -> Option<(String, Switch)> {
    let book = Book::new(&ground.old, ground.mesh, &mut Notes::default());
    match book.switch {
        Chosen::Switch(label, switch) => Some((label.to_string(), switch.clone())),
        // Unusable ones were refused before.
        Chosen::Unusable(_) | Chosen::Missing { .. } => None,
    }
}

fn leave_out_roles(ground: &Ground<'_>, conversion: &mut Conversion, why: &str) {
    for (_, label, body) in ground.good() {
        if matches!(body, Body::ServiceRole(_) | Body::ServiceRoleBinding(_)) {
            conversion.leave_out(label, "spec", why);
        }
    }
}

struct Rbac<'r, 'a> {
    ground: &'r mut Ground<'a>,
    conversion: &'r mut Conversion,
    /// Of the switch.
    label: String,
    switch: Switch,
    /// What is known of senders, by namespace and selection.
    senders: BTreeMap<(Arc<str>, Selection), Arc<Senders>>,
}

/// Workloads, and which of their ports; `None`: all.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Selection {
    labels: Labels,
    ports: Option<BTreeSet<u16>>,
    /// What tells the policy's name from its siblings'.
    suffix: String,
}

impl<'a> Rbac<'_, 'a> {
    fn convert_switch(&mut self) {
        let (switch, root) = (self.switch.clone(), self.ground.mesh.root_namespace.clone());
        let from = BTreeSet::from([self.label.clone()]);
        match switch.mode {
            Mode::Off => {}
            Mode::On => self.put_default_deny(&root, &from),
            Mode::OnWithExclusion => {
                self.put_default_deny(&root, &from);
                for namespace in &switch.listed.namespaces {
                    if self.is_own(namespace, "exclusion.namespaces") {
                        let rules = json!([{}]);
                        self.put(namespace, "rbac-excluded", &Labels::new(), Some(rules), false, &from, []);
                    }
                }
                for (service, ports) in self.listed("exclusion.services") {
                    let rules = json!([{"to": [{"operation": {"ports": texts(&ports)}}]}]);
                    let name = format!("rbac-excluded-{}", service.name.name);
                    self.put(
                        &service.name.namespace,
                        &name,
                        &service.selector,
                        Some(rules),
                        false,
                        &from,
                        [],
                    );
                }
            }
            Mode::OnWithInclusion => {
                for namespace in &switch.listed.namespaces {
                    if self.is_own(namespace, "inclusion.namespaces") {
                        self.put_default_deny(namespace, &from);
                    }
                }
                self.include_services(&from);
            }
        }
    }

    /// Ports of listed services are closed, the others of their workloads stay open.
    fn include_services(&mut self, from: &BTreeSet<String>) {
        // By namespace and labels: the ports, and the name of the first service.
        type Closed = BTreeMap<(Arc<str>, Labels), (BTreeSet<u16>, Arc<str>)>;
        let mut closed = Closed::new();
        for (service, ports) in self.listed("inclusion.services") {
            if self.switch.listed.namespaces.contains(&*service.name.namespace) {
                continue;
            }
            let key = (service.name.namespace.clone(), service.selector.clone());
            let entry = closed.entry(key).or_insert_with(|| (BTreeSet::new(), service.name.name.clone()));
            entry.0.extend(ports);
        }
        for workload in self.ground.workloads.values() {
            let selecting = closed.keys().filter(|(namespace, labels)| {
                *namespace == workload.name.namespace && super::selects(labels, workload)
            });
            if selecting.count() > 1 {
                let why = format!(
                    "several of these services select workload {}, each by labels of its own: what one closes the other opens",
                    workload.name
                );
                self.conversion.refuse(&self.label, "spec.inclusion.services", why);
            }
        }
        for ((namespace, labels), (ports, name)) in closed {
            let rules = json!([{"to": [{"operation": {"notPorts": texts(&ports)}}]}]);
            self.put(&namespace, &format!("rbac-included-{name}"), &labels, Some(rules), false, from, []);
        }
    }

    /// The services that a list names, and where they are served.
    fn listed(&mut self, field: &str) -> Vec<(&'a Service, BTreeSet<u16>)> {
        let mut found = Vec::new();
        for complete in self.switch.listed.services.clone() {
            let service =
                self.ground.services.values().find(|service| complete_name(&service.name) == complete);
            let Some(service) = service else {
                let why = format!(
                    "{complete:?} is no Service of these documents: without it nobody knows its workloads"
                );
                self.conversion.refuse(&self.label, &format!("spec.{field}"), why);
                continue;
            };
            if !self.is_own(&service.name.namespace, field) {
                continue;
            }
            match self.ground.served(service) {
                Ok(served) => found.push((service, served.into_keys().collect())),
                Err(why) => {
                    self.conversion.refuse(
                        &self.label,
                        &format!("spec.{field}"),
                        format!("{complete:?}: {why}"),
                    );
                }
            }
        }
        found
    }

    /// A policy of the root namespace would speak for the whole mesh.
    fn is_own(&mut self, namespace: &str, field: &str) -> bool {
        let is_root = namespace == self.ground.mesh.root_namespace;
        if is_root {
            let why = format!(
                "{namespace} is the root namespace: in the current API its policies speak for the whole mesh"
            );
            self.conversion.refuse(&self.label, &format!("spec.{field}"), why);
        }
        !is_root
    }

    fn put_default_deny(&mut self, namespace: &str, from: &BTreeSet<String>) {
        self.put(namespace, "rbac-default-deny", &Labels::new(), None, false, from, []);
    }

    #[expect(clippy::too_many_arguments, reason = "they are the parts of one object, and named nowhere else")]
    fn put(
        &mut self,
        namespace: &str,
        name: &str,
        labels: &Labels,
        rules: Option<Value>,
        is_tried: bool,
        from: &BTreeSet<String>,
        checks: impl IntoIterator<Item = String>,
    ) {
        let mut value = self.ground.head("AuthorizationPolicy", namespace, name);
        if !labels.is_empty() {
            value["spec"]["selector"] = selector(labels);
        }
        if let Some(rules) = rules {
            value["spec"]["rules"] = rules;
        }
        if is_tried || self.switch.is_permissive {
            value["metadata"]["annotations"] = json!({ DRY_RUN: "true" }); // policy B-11
        }
        let (from, checks) = (from.clone(), checks.into_iter().collect());
        self.conversion.documents.push(Document { value, from, checks });
    }

    fn convert_roles(&mut self) {
        let mut roles: Vec<(ObjectName, String, ServiceRole)> = Vec::new();
        let mut bindings: Vec<(ObjectName, String, ServiceRoleBinding)> = Vec::new();
        for (name, label, body) in self.ground.good() {
            match body {
                Body::ServiceRole(role) => roles.push((name.clone(), label.to_string(), role.clone())),
                Body::ServiceRoleBinding(binding) => {
                    bindings.push((name.clone(), label.to_string(), binding.clone()));
                }
                Body::Policy(_)
                | Body::MeshPolicy(_)
                | Body::RbacConfig(_)
                | Body::ClusterRbacConfig(_)
                | Body::PeerAuthentication(_)
                | Body::AuthorizationPolicy(_)
                | Body::RequestAuthentication(_)
                | Body::DestinationRule(_) => {}
            }
        }
        let is_of = |binding: &(ObjectName, String, ServiceRoleBinding), role: &ObjectName| {
            binding.0.namespace == role.namespace && *binding.2.role == *role.name
        };
        for binding in bindings.iter().filter(|binding| !roles.iter().any(|(role, ..)| is_of(binding, role)))
        {
            self.conversion.leave_out(
                &binding.1,
                "spec.roleRef.name",
                "it names no role of its namespace, and grants nothing",
            );
        }
        for (name, label, role) in roles {
            let bound: Vec<_> = bindings.iter().filter(|binding| is_of(binding, &name)).collect();
            if bound.is_empty() {
                self.conversion.leave_out(
                    &label,
                    "metadata.name",
                    "no binding names it, and it grants nothing",
                );
                continue;
            }
            if *name.namespace == *self.ground.mesh.root_namespace {
                let why = "the root namespace's policies speak for the whole mesh in the current API, and this role for its own \
                           namespace only";
                self.conversion.refuse(&label, "metadata.namespace", why);
                continue;
            }
            self.convert_role(&name, &label, &role, &bound);
        }
    }

    fn convert_role(
        &mut self,
        name: &ObjectName,
        label: &str,
        role: &ServiceRole,
        bound: &[&(ObjectName, String, ServiceRoleBinding)],
    ) {
        let mut policies: BTreeMap<(Selection, bool), Parts> = BTreeMap::new();
        for (index, rule) in role.rules.iter().enumerate() {
            let field = format!("spec.rules[{index}]");
            let selections = match self.selections(&name.namespace, rule) {
                Ok((selections, checks)) => {
                    selections.into_iter().map(move |s| (s, checks.clone())).collect::<Vec<_>>()
                }
                Err(why) => {
                    self.conversion.refuse(label, &field, why);
                    continue;
                }
            };
            for (selection, checks) in selections {
                let key = (name.namespace.clone(), selection.clone());
                let senders = match self.senders.get(&key) {
                    Some(known) => Arc::clone(known),
                    None => {
                        let found = Arc::new(self.senders(&name.namespace, &selection));
                        self.senders.insert(key, Arc::clone(&found));
                        found
                    }
                };
                let operation = match written(&rule.conditions, senders.principals) {
                    Ok(Some(operation)) => operation,
                    Ok(None) => {
                        self.conversion.leave_out(label, &field, "no connection and no request ever met it");
                        continue;
                    }
                    Err(part) => {
                        self.conversion.refuse_part(label, &field, part);
                        continue;
                    }
                };
                let Some(operation) = within(operation, selection.ports.as_ref()) else { continue };
                for (_, binding_label, binding) in bound {
                    let subjects = self.subjects(binding_label, binding, senders.principals);
                    let key = (Selection { ports: None, ..selection.clone() }, binding.is_permissive);
                    let entry = policies.entry(key).or_default();
                    entry.rules.extend(rules(&operation, &subjects, &senders.shows));
                    entry.from.extend([label.to_owned(), binding_label.clone()]);
                    entry.checks.extend(checks.iter().chain(&operation.checks).cloned());
                    entry.checks.extend(subjects.into_iter().flat_map(|subject| subject.checks));
                }
            }
        }
        for ((selection, is_tried), Parts { rules, from, checks }) in policies {
            // A policy without rules would close what is open without it.
            if rules.is_empty() {
                continue;
            }
            let wanted =
                format!("{}{}{}", name.name, selection.suffix, if is_tried { "-dry-run" } else { "" });
            self.put(
                &name.namespace,
                &wanted,
                &selection.labels,
                Some(Value::Array(rules)),
                is_tried,
                &from,
                checks,
            );
        }
    }

    fn subjects(
        &mut self,
        label: &str,
        binding: &ServiceRoleBinding,
        principals: Principals,
    ) -> Vec<Written> {
        let mut all = Vec::new();
        for (index, subject) in binding.subjects.iter().enumerate() {
            let field = format!("spec.subjects[{index}]");
            match written(&subject.conditions, principals) {
                Ok(Some(written)) => all.push(written),
                Ok(None) => self.conversion.leave_out(label, &field, "it never was anybody"),
                Err(part) => self.conversion.refuse_part(label, &field, part),
            }
        }
        all
    }

    /// Where a rule grants, and RBAC runs.
    fn selections(
        &self,
        namespace: &str,
        rule: &AccessRule,
    ) -> Result<(Vec<Selection>, Vec<String>), String> {
        let (by_labels, mut checks) = self.labels(namespace, rule)?;
        let is_everywhere = rule.is_for_service(None);
        for written in rule.services.iter().filter(|written| !written.contains('*')) {
            let is_here =
                self.ground.services_of(namespace).any(|service| complete_name(&service.name) == *written);
            if !is_here && written.ends_with(&format!(".{namespace}.{SERVICE_SUFFIX}")) {
                return Err(format!(
                    "services: {written:?} is no Service of these documents: without it nobody knows its workloads"
                ));
            }
        }
        let places: Vec<Selection> = if is_everywhere && self.switch.runs(None, namespace) {
            vec![Selection { labels: Labels::new(), ports: None, suffix: String::new() }]
        } else {
            let mut places = Vec::new();
            for service in self.ground.services_of(namespace) {
                let complete = complete_name(&service.name);
                let is_meant = rule.is_for_service(Some((&service.name.name, &complete)));
                if !is_meant || !self.switch.runs(Some(&complete), namespace) {
                    continue;
                }
                let served =
                    self.ground.served(service).map_err(|why| format!("services: {complete:?}: {why}"))?;
                if served.is_empty() {
                    continue;
                }
                places.push(Selection {
                    labels: service.selector.clone(),
                    ports: Some(served.into_keys().collect()),
                    suffix: format!("-{}", service.name.name),
                });
            }
            if rule.services.iter().any(|written| written.contains('*')) || is_everywhere {
                checks.push("services that come later are not among those that are written here".to_owned());
            }
            places
        };
        let selections = places.iter().flat_map(|place| {
            by_labels.iter().filter_map(|labels| {
                Some(Selection { labels: both(&place.labels, labels)?, ..place.clone() })
            })
        });
        Ok((selections.collect(), checks))
    }

    /// What `destination.labels` asks: each way to meet it.
    fn labels(&self, namespace: &str, rule: &AccessRule) -> Result<(Vec<Labels>, Vec<String>), String> {
        let (mut ways, mut checks) = (vec![Labels::new()], Vec::new());
        for constraint in &rule.destination {
            match &constraint.attribute {
                DestinationAttribute::Label(key) => {
                    let values = self.label_values(namespace, key, &constraint.values);
                    if constraint.values.iter().any(|value| value.contains('*')) {
                        checks.push(format!(
                            "values of label {key} that come later are not among those that are written here"
                        ));
                    }
                    let each = |labels: &Labels, value: &String| {
                        both(labels, &Labels::from([(key.clone(), value.clone())]))
                    };
                    ways = ways
                        .iter()
                        .flat_map(|labels| values.iter().filter_map(move |value| each(labels, value)))
                        .collect();
                }
                DestinationAttribute::User if constraint.values.iter().any(|value| value == "*") => {}
                DestinationAttribute::User => {
                    return Err(
                        "destination.user: the current API selects workloads by labels only".to_owned()
                    );
                }
                // Both are asked of services and of the namespace, which are known.
                DestinationAttribute::Name => {}
                DestinationAttribute::Namespace if constraint.is_met_by(namespace) => {}
                DestinationAttribute::Namespace => ways.clear(),
            }
        }
        Ok((ways, checks))
    }

    fn label_values(&self, namespace: &str, key: &str, written: &[String]) -> BTreeSet<String> {
        let mut values: BTreeSet<String> =
            written.iter().filter(|value| !value.contains('*')).cloned().collect();
        let here = self.ground.workloads.values().filter(|workload| &*workload.name.namespace == namespace);
        let known = here.filter_map(|workload| workload.labels.get(key));
        values.extend(
            known.filter(|value| super::super::rbac_v1alpha1::any_matches(written, Some(value))).cloned(),
        );
        values
    }

    /// What is asked of senders on the HTTP ports of a selection.
    fn senders(&self, namespace: &str, selection: &Selection) -> Senders {
        let ground = &*self.ground;
        let here: BTreeMap<_, _> = ground
            .workloads
            .iter()
            .filter(|(name, workload)| {
                &*name.namespace == namespace && super::selects(&selection.labels, workload)
            })
            .map(|(name, workload)| {
                let here = Workload { node: prove::NODE.to_owned(), ..(**workload).clone() };
                (name.clone(), Arc::new(here))
            })
            .collect();
        let compiled = compile(
            &ground.asking,
            &Inventory { mesh: ground.mesh, workloads: &here, services: ground.services, node: prove::NODE },
        );
        let (mut binds_origin, mut triggers) = (BTreeSet::new(), Vec::new());
        for workload in here.values() {
            for (port, rules) in compiled.ports(workload).into_iter().flatten() {
                let is_meant = selection.ports.as_ref().is_none_or(|ports| ports.contains(&port));
                if is_meant && rules.protocol != Protocol::Tcp {
                    let origins = &rules.authentication.origins;
                    binds_origin.insert(origins.iter().any(|step| step.binds_origin));
                    triggers.extend(
                        origins.iter().flat_map(|step| &step.methods).map(|method| method.triggers.clone()),
                    );
                }
            }
        }
        triggers.dedup();
        let principals = match binds_origin.into_iter().collect::<Vec<_>>()[..] {
            [] | [false] => Principals::Peer,
            [true] => Principals::Token,
            _ => Principals::Both,
        };
        Senders { principals, shows: shows(&triggers) }
    }
}

/// One policy while it is put together.
#[derive(Default)]
struct Parts {
    rules: Vec<Value>,
    from: BTreeSet<String>,
    checks: BTreeSet<String>,
}

/// What is known of who sends requests to a selection.
struct Senders {
    principals: Principals,
    /// Where a token's attributes are shown to rules: each an operation, and more conditions. None at all: nowhere.
    shows: Vec<Shown>,
}

/// Fields of an operation, and conditions, that must be met beside a rule's own.
type Shown = (Vec<(&'static str, Vec<String>)>, Vec<Value>);

/// In 2018 a token says nothing where none is asked for: on the paths of no trigger, and in a CORS preflight (policy,
///
fn shows(triggers: &[Vec<Trigger>]) -> Vec<Shown> {
    let [only] = triggers else {
        // Without origins there are no tokens. Where ports differ the proof shows what that does.
        return Vec::new();
    };
    let mut paths: Vec<Vec<(&'static str, Vec<String>)>> = Vec::new();
    for trigger in only {
        // What cannot be written was refused with its policy.
        let (included, excluded) = authn::paths(trigger).unwrap_or_default();
        let lists = [("paths", included), ("notPaths", excluded)];
        paths.push(lists.into_iter().filter(|(_, list)| !list.is_empty()).collect());
    }
    if paths.is_empty() {
        paths.push(Vec::new());
    }
    let mut shows = Vec::new();
    for fields in paths {
        let no_options = ("notMethods", vec![OPTIONS.to_owned()]);
        shows.push((fields.iter().cloned().chain([no_options]).collect(), Vec::new()));
        for header in authn::PREFLIGHT_HEADERS {
            shows.push((fields.clone(), vec![authn::is_absent(header)]));
        }
    }
    shows
}

/// The method of a CORS preflight.
const OPTIONS: &str = "OPTIONS";

/// Whether conditions want something of a token to be there.
fn wants_token(written: &Written) -> bool {
    let is_wanted = |when: &Value| {
        when["key"].as_str().is_some_and(|key| key.starts_with("request.auth.")) && !when["values"].is_null()
    };
    written.when.iter().any(is_wanted) || written.source.iter().any(|(name, _)| *name == "requestPrincipals")
}

/// A rule's operation where tokens say something: one for each way, or as it is where nothing has to be added.
fn shown(operation: &Written, shows: &[Shown]) -> Vec<Written> {
    let may_be_options = operation.operation.iter().all(|(name, list)| {
        let is_among = || list.iter().any(|text| Pattern::new(text).matches(Some(Text::plain(OPTIONS))));
        match *name {
            "methods" => is_among(),
            "notMethods" => !is_among(),
            _ => true,
        }
    });
    let mut ways = Vec::new();
    for (fields, when) in shows {
        // One way for each list of paths suffices where no preflight can be meant.
        let is_plain = when.is_empty();
        if !may_be_options && !is_plain {
            continue;
        }
        let mut way = operation.clone();
        for (name, list) in fields.iter().filter(|(name, _)| may_be_options || *name != "notMethods") {
            match way.operation.iter_mut().find(|(taken, _)| taken == name) {
                Some((_, written)) if name.starts_with("not") => written.extend(list.iter().cloned()),
                // Two lists of which each must be met: the proof shows what is missing.
                Some(_) => {}
                None => way.operation.push((name, list.clone())),
            }
        }
        way.when.extend(when.iter().cloned());
        ways.push(way);
    }
    if ways.is_empty() { vec![operation.clone()] } else { ways }
}

fn complete_name(name: &ObjectName) -> String {
    format!("{}.{}.{SERVICE_SUFFIX}", name.name, name.namespace)
}

fn texts(ports: &BTreeSet<u16>) -> Vec<String> {
    ports.iter().map(u16::to_string).collect()
}

/// The operation on these ports only; `None`: on none of them.
fn within(mut operation: Written, ports: Option<&BTreeSet<u16>>) -> Option<Written> {
    let Some(ports) = ports else { return Some(operation) };
    let own = texts(ports);
    match operation.operation.iter_mut().find(|(name, _)| *name == "ports") {
        Some((_, written)) => {
            written.retain(|port| own.contains(port));
            if written.is_empty() {
                return None;
            }
        }
        None => operation.operation.push(("ports", own)),
    }
    Some(operation)
}

/// The rules that grant an operation to subjects: one for those that `from` can list, one for each other (policy F-3: on
/// TCP a rule that asks a request anywhere never matches).
fn rules(operation: &Written, subjects: &[Written], shows: &[Shown]) -> Vec<Value> {
    let is_listed = |subject: &&Written| {
        subject.when.is_empty() && !subject.source.is_empty() && !subject.asks_requests()
    };
    let mut rules = Vec::new();
    let listed: Vec<Value> =
        subjects.iter().filter(is_listed).map(|subject| json!({"source": object(&subject.source)})).collect();
    if !listed.is_empty() {
        rules.push(rule(operation, listed, &[], false));
    }
    for subject in subjects.iter().filter(|subject| !is_listed(subject)) {
        let source = &subject.source;
        let from = if source.is_empty() { Vec::new() } else { vec![json!({"source": object(source)})] };
        let ways = if wants_token(subject) { shown(operation, shows) } else { vec![operation.clone()] };
        let each = ways.iter().map(|way| rule(way, from.clone(), &subject.when, subject.only_requests));
        rules.extend(each);
    }
    rules
}

fn rule(operation: &Written, from: Vec<Value>, more: &[Value], only_requests: bool) -> Value {
    let mut rule = json!({});
    if !from.is_empty() {
        rule["from"] = Value::Array(from);
    }
    let mut fields = operation.operation.clone();
    if only_requests && !fields.iter().any(|(name, _)| !matches!(*name, "ports" | "notPorts")) {
        // Every request has a method, and no connection.
        fields.push(("methods", vec!["*".to_owned()]));
    }
    if !fields.is_empty() {
        rule["to"] = json!([{"operation": object(&fields)}]);
    }
    let when: Vec<Value> = operation.when.iter().chain(more).cloned().collect();
    if !when.is_empty() {
        rule["when"] = Value::Array(when);
    }
    rule
}
