//! Objects and inventory in, one table per local workload out.
//!
//! For each port that a service, the workload or a policy names, and once for all others: transport, then who may use it.
//! What cannot match there is left out, so a connection's cost does not grow with the number of policies in the mesh.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    book::{Authorization, Book, Candidate, Chosen, Notes, Role, RoleRule},
    destination_rule::ClientRules,
    matching::TrustDomains,
    objects::{PolicyObjects, Reach},
    rbac_v1alpha1::Destination,
    rules::{Authorisation, Grant, NamedRules, PortRules},
    security_v1::Action,
    status::{self, ObjectStatus},
    transport::{Owner, Place, selects, transport},
};
use crate::workload::{Mesh, ObjectName, Protocol, Service, TargetPort, Workload};

/// What the complete name of a service ends with (policy B-5), whatever the trust domain.
pub(super) const SERVICE_SUFFIX: &str = "svc.cluster.local";

/// What the policies speak about.
#[derive(Clone, Copy, Debug)]
pub struct Inventory<'a> {
    pub mesh: &'a Mesh,
    pub workloads: &'a BTreeMap<ObjectName, Arc<Workload>>,
    pub services: &'a BTreeMap<ObjectName, Service>,
    /// Only the enrolled workloads of this node are compiled for.
    pub node: &'a str,
}

/// The decisions of one node, immutable.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub(super) trusted: TrustDomains,
    pub(super) destinations: BTreeMap<ObjectName, DestinationRules>,
    pub(super) statuses: Vec<ObjectStatus>,
    pub(super) client_rules: ClientRules,
}

/// One local workload.
#[derive(Clone, Debug)]
pub(super) struct DestinationRules {
    /// The ports that something names.
    pub(super) named: BTreeMap<u16, PortRules>,
    /// All others.
    pub(super) other: PortRules,
}

impl DestinationRules {
    pub(super) fn port(&self, port: u16) -> &PortRules {
        self.named.get(&port).unwrap_or(&self.other)
    }

    /// The ports that something names.
    pub(super) fn named(&self) -> impl Iterator<Item = (u16, &PortRules)> {
        self.named.iter().map(|(port, rules)| (*port, rules))
    }
}

/// Compiles for the enrolled workloads of `inventory.node`.
pub fn compile(objects: &PolicyObjects, inventory: &Inventory<'_>) -> Compiled {
    let mut notes = Notes::default();
    let book = Book::new(objects, inventory.mesh, &mut notes);
    let mut destinations = BTreeMap::new();
    for workload in inventory.workloads.values().filter(|w| w.enrolled && w.node == inventory.node) {
        destinations.insert(workload.name.clone(), destination(workload, &book, inventory, &mut notes));
    }
    let statuses = status::statuses(objects, &book, inventory, &notes);
    Compiled { trusted: book.trusted, destinations, statuses, client_rules: objects.client_rules() }
}

fn destination(
    workload: &Workload,
    book: &Book<'_>,
    inventory: &Inventory<'_>,
    notes: &mut Notes,
) -> DestinationRules {
    let owners = owners(workload, inventory.services);
    let mut authorizations = book.authorizations(&workload.name.namespace);
    authorizations.retain(|candidate| is_selected(candidate, workload));
    let authorizations = authorizations.as_slice();
    let declared = workload.ports.iter().map(|port| port.port);
    let by_peer_authentication = book
        .peer_authentications
        .iter()
        .filter_map(|candidate| candidate.body.ok())
        .flat_map(|body| body.ports.keys().copied());
    let ports: BTreeSet<u16> = owners.keys().copied().chain(declared).chain(by_peer_authentication).collect();
    let named = ports
        .into_iter()
        .map(|port| {
            let owner = owners.get(&port);
            let protocol = protocol(workload, port, owner);
            let place = Place { workload, port: Some(port), protocol, owner, authorizations };
            (port, port_rules(&place, book, notes))
        })
        .collect();
    let place = Place { workload, port: None, protocol: Protocol::Tcp, owner: None, authorizations };
    DestinationRules { named, other: port_rules(&place, book, notes) }
}

/// Which service owns each port of the workload: of several the first by name (policy A-4).
pub(super) fn owners<'a>(
    workload: &Workload,
    services: &'a BTreeMap<ObjectName, Service>,
) -> BTreeMap<u16, Owner<'a>> {
    let mut owners: BTreeMap<u16, Owner<'a>> = BTreeMap::new();
    let is_behind = |service: &&Service| {
        service.name.namespace == workload.name.namespace
            && !service.selector.is_empty()
            && selects(&service.selector, workload)
    };
    for service in services.values().filter(is_behind) {
        for port in &service.ports {
            let Some(target) = target(&port.target, workload) else { continue };
            let owner = owners.entry(target).or_insert_with(|| Owner { service, ports: Vec::new() });
            if owner.service.name == service.name {
                owner.ports.push(port);
            }
        }
    }
    owners
}

/// The workload's port that a service port leads to (policy H-1).
fn target(target: &TargetPort, workload: &Workload) -> Option<u16> {
    match target {
        TargetPort::Number(port) => Some(*port),
        TargetPort::Name(name) => {
            let named = workload.ports.iter().find(|port| port.name.as_ref() == Some(name));
            named.map(|port| port.port)
        }
    }
}

/// HTTP if the service or the workload says so (policy H-8).
pub(super) fn protocol(workload: &Workload, port: u16, owner: Option<&Owner<'_>>) -> Protocol {
    let by_service = owner.into_iter().flat_map(|owner| owner.ports.iter().map(|port| port.protocol));
    let by_workload =
        workload.ports.iter().filter(|declared| declared.port == port).map(|port| port.protocol);
    by_service.chain(by_workload).find(|protocol| *protocol != Protocol::Tcp).unwrap_or(Protocol::Tcp)
}

fn port_rules(place: &Place<'_>, book: &Book<'_>, notes: &mut Notes) -> PortRules {
    let (transport, authentication) = transport(place, book, notes);
    let (authorisation, is_tried) = authorisation(place, book, Tried::Ignored, notes);
    let shadow = is_tried.then(|| self::authorisation(place, book, Tried::Enforced, notes).0);
    let audits = audits(place);
    let asks_requests = authentication.asks()
        || authorisation.asks_requests()
        || shadow.as_ref().is_some_and(Authorisation::asks_requests)
        || audits.iter().any(NamedRules::asks_requests);
    PortRules {
        service: place.owner.map(|owner| owner.service.name.clone()),
        protocol: place.protocol,
        transport,
        authentication,
        authorisation,
        shadow,
        audits,
        needs_requests: asks_requests && place.protocol != Protocol::Tcp,
    }
}

/// How objects count that are only tried: dry runs, and what is in mode PERMISSIVE (policy B-11, F-3).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tried {
    Ignored,
    Enforced,
}

/// The current API if a valid, enforced policy selects the workload, else the 2018 one (policy F-4). And whether
/// anything here is only tried.
fn authorisation(
    place: &Place<'_>,
    book: &Book<'_>,
    tried: Tried,
    notes: &mut Notes,
) -> (Authorisation, bool) {
    let own = &*place.workload.name.namespace;
    if let Some((_, label)) = book.unknown.iter().find(|(namespace, _)| book.is_in_scope(namespace, own)) {
        return (Authorisation::Unusable((*label).clone()), false);
    }
    let has_dry_run = selected(place).any(|(_, body)| body.written.is_dry_run && body.written.decides());
    match policies(place, book, tried, notes) {
        Some(decided) => (decided, has_dry_run),
        None => {
            let (decided, is_tried) = roles(place, book, tried, notes);
            (decided, is_tried || has_dry_run)
        }
    }
}

/// Those of the workload's that could be read.
fn selected<'b>(place: &Place<'b>) -> impl Iterator<Item = (&'b Arc<str>, &'b Authorization<'b>)> {
    place.authorizations.iter().filter_map(|candidate| Some((candidate.label, candidate.body.as_ref().ok()?)))
}

/// policy F-3
fn audits(place: &Place<'_>) -> Vec<NamedRules> {
    let audits =
        selected(place).filter(|(_, body)| body.written.action == Action::Audit && !body.written.is_dry_run);
    audits.map(|(_, body)| body.rules.clone()).collect()
}

/// `None`: no policy of the current API decides here.
fn policies(place: &Place<'_>, book: &Book<'_>, tried: Tried, notes: &mut Notes) -> Option<Authorisation> {
    let is_replaceable = |label: &str| book.unreadable_grants.contains(label);
    let unreadable = place.authorizations.iter().filter(|candidate| candidate.body.is_err());
    let mut unreadable = unreadable.map(|candidate| candidate.label);
    if let Some(label) = unreadable.clone().find(|label| !is_replaceable(label)) {
        return Some(Authorisation::Unusable(label.clone()));
    }
    let with = |action: Action| {
        let counts = move |body: &Authorization<'_>| tried == Tried::Enforced || body.written.is_enforced();
        let enforced = selected(place).filter(move |(_, body)| counts(body));
        enforced.filter(move |(_, body)| body.written.action == action).map(|(_, body)| body.rules.clone())
    };
    let denials: Vec<NamedRules> = with(Action::Custom).chain(with(Action::Deny)).collect();
    let grants: Vec<NamedRules> = with(Action::Allow).collect();
    if grants.is_empty()
        && let Some(label) = unreadable.next()
    {
        return Some(Authorisation::Unusable(label.clone()));
    }
    if denials.is_empty() && grants.is_empty() {
        return None;
    }
    if tried == Tried::Ignored {
        note_policies(place, book, &denials, &grants, notes);
    }
    Some(Authorisation::Policies { denials, grants: Some(grants).filter(|grants| !grants.is_empty()) })
}

fn note_policies(
    place: &Place<'_>,
    book: &Book<'_>,
    denials: &[NamedRules],
    grants: &[NamedRules],
    notes: &mut Notes,
) {
    if !matches!(book.switch, Chosen::Missing { .. }) {
        for rules in denials.iter().chain(grants) {
            notes.effect(
                &rules.policy,
                "the v1alpha1 RBAC objects are set aside for the workloads that it selects",
            );
        }
    }
    let (Protocol::Tcp, Some(port)) = (place.protocol, place.port) else { return };
    let words = format!("port {port} of {}, which carries TCP", place.workload.name);
    for (label, body) in selected(place).filter(|(_, body)| body.written.is_enforced()) {
        let consequence = match body.written.action {
            Action::Allow => "this rule never matches on",
            Action::Deny | Action::Custom => "this rule is judged without them and denies more on",
            Action::Audit => continue,
        };
        for (index, rule) in
            body.written.rules.iter().enumerate().filter(|(_, r)| !r.request_fields.is_empty())
        {
            let fields = rule.request_fields.join(", ");
            let sentence = format!("{fields}: only a request can answer, so {consequence} {words}");
            notes.problem(label, &format!("spec.rules[{index}]"), sentence);
        }
    }
}

/// Whether an object of the workload's scope selects it.
fn is_selected(candidate: &Candidate<'_, Authorization<'_>>, workload: &Workload) -> bool {
    match &candidate.body {
        Ok(body) => selects(&body.written.selector, workload),
        Err(Reach::Selected(selector)) => selects(selector, workload),
        Err(Reach::Scope | Reach::Unreadable) => true,
        Err(Reach::Targets(_) | Reach::Nobody) => false,
    }
}

/// The 2018 API (policy B-1, B-2, B-4). And whether anything of it is only tried.
fn roles(place: &Place<'_>, book: &Book<'_>, tried: Tried, notes: &mut Notes) -> (Authorisation, bool) {
    let namespace = &*place.workload.name.namespace;
    let (label, switch) = match &book.switch {
        Chosen::Switch(label, switch) => (*label, *switch),
        Chosen::Unusable(label) => return (Authorisation::Unusable((*label).clone()), false),
        Chosen::Missing { misnamed } => {
            let closes = misnamed.iter().find(|(scope, _)| book.is_in_scope(scope, namespace));
            let decided =
                closes.map_or(Authorisation::Open, |(_, label)| Authorisation::Unusable((*label).clone()));
            return (decided, false);
        }
    };
    let short = place.owner.map(|owner| &*owner.service.name.name);
    let complete = short.map(|short| format!("{short}.{namespace}.{SERVICE_SUFFIX}"));
    if !switch.runs(complete.as_deref(), namespace) {
        return (Authorisation::Open, false);
    }
    let destination = Destination {
        service: short.zip(complete.as_deref()),
        namespace,
        service_account: &place.workload.service_account,
        labels: &place.workload.labels,
    };
    let (mut grants, mut has_tried) = (Vec::new(), switch.is_permissive);
    for role in book.roles.get(namespace).into_iter().flatten() {
        if role.rules.iter().any(|rule| rule.written.is_for(&destination)) {
            note_asking_subjects(place, role, notes);
        }
        for rule in role.rules.iter().filter(|rule| rule.written.is_for(&destination)) {
            has_tried |= rule.holders_tried.is_some();
            if place.protocol == Protocol::Tcp && !rule.written.request_fields.is_empty() {
                note_left_out(place, role.label, rule, notes);
                continue; // policy B-10
            }
            let with_tried = rule.holders_tried.as_ref().filter(|_| tried == Tried::Enforced);
            grants.push(Grant {
                role: role.label.clone(),
                index: rule.index,
                conditions: rule.conditions.clone(),
                holders: with_tried.unwrap_or(&rule.holders).clone(),
            });
        }
    }
    let is_permissive = switch.is_permissive && tried == Tried::Ignored;
    (Authorisation::Roles { switch: label.clone(), is_permissive, grants }, has_tried)
}

/// policy B-10, G-9
fn note_asking_subjects(place: &Place<'_>, role: &Role<'_>, notes: &mut Notes) {
    let (Protocol::Tcp, Some(port)) = (place.protocol, place.port) else { return };
    for (label, index, fields) in &role.asking {
        let sentence = format!(
            "{fields}: only a request can answer, so this subject matches nobody on port {port} of {}, which carries TCP",
            place.workload.name
        );
        notes.problem(label, &format!("spec.subjects[{index}]"), sentence);
    }
}

/// policy B-10, H-8
fn note_left_out(place: &Place<'_>, label: &Arc<str>, rule: &RoleRule<'_>, notes: &mut Notes) {
    let Some(port) = place.port else { return };
    let (fields, name) = (rule.written.request_fields.join(", "), &place.workload.name);
    let sentence = format!(
        "{fields}: only a request can answer, so this rule grants nothing on port {port} of {name}, which carries TCP"
    );
    notes.problem(label, &format!("spec.rules[{}]", rule.index), sentence);
}
