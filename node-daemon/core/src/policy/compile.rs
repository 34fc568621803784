//! Objects and inventory in, one table per local workload out.
//!
//! For each port that a service, the workload or a policy names, and once for all others: transport, then who may use it.
//! What cannot match there is left out, so a connection's cost does not grow with the number of policies in the mesh.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    book::{Authorization, Book, Candidate, Chosen, Notes},
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
const SERVICE_SUFFIX: &str = "svc.cluster.local";

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
}

/// One local workload.
#[derive(Clone, Debug)]
pub(super) struct DestinationRules {
    /// The ports that something names.
    named: BTreeMap<u16, PortRules>,
    /// All others.
    other: PortRules,
}

impl DestinationRules {
    pub(super) fn port(&self, port: u16) -> &PortRules {
        self.named.get(&port).unwrap_or(&self.other)
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
    Compiled { trusted: book.trusted, destinations, statuses }
}

fn destination(
    workload: &Workload,
    book: &Book<'_>,
    inventory: &Inventory<'_>,
    notes: &mut Notes,
) -> DestinationRules {
    let owners = owners(workload, inventory.services);
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
            let place =
                Place { workload, port: Some(port), protocol: protocol(workload, port, owner), owner };
            (port, port_rules(&place, book, notes))
        })
        .collect();
    let place = Place { workload, port: None, protocol: Protocol::Tcp, owner: None };
    DestinationRules { named, other: port_rules(&place, book, notes) }
}

/// Which service owns each port of the workload: of several the first by name (policy A-4).
fn owners<'a>(workload: &Workload, services: &'a BTreeMap<ObjectName, Service>) -> BTreeMap<u16, Owner<'a>> {
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
fn protocol(workload: &Workload, port: u16, owner: Option<&Owner<'_>>) -> Protocol {
    let by_service = owner.into_iter().flat_map(|owner| owner.ports.iter().map(|port| port.protocol));
    let by_workload =
        workload.ports.iter().filter(|declared| declared.port == port).map(|port| port.protocol);
    by_service.chain(by_workload).find(|protocol| *protocol != Protocol::Tcp).unwrap_or(Protocol::Tcp)
}

fn port_rules(place: &Place<'_>, book: &Book<'_>, notes: &mut Notes) -> PortRules {
    PortRules {
        service: place.owner.map(|owner| owner.service.name.clone()),
        transport: transport(place, book, notes),
        authorisation: authorisation(place, book, notes),
    }
}

/// The current API if a valid, enforced policy selects the workload, else the 2018 one (policy F-4).
fn authorisation(place: &Place<'_>, book: &Book<'_>, notes: &mut Notes) -> Authorisation {
    let own = &*place.workload.name.namespace;
    if let Some((_, label)) = book.unknown.iter().find(|(namespace, _)| book.is_in_scope(namespace, own)) {
        return Authorisation::Unusable((*label).clone());
    }
    policies(place, book, notes).unwrap_or_else(|| roles(place, book))
}

/// `None`: no policy of the current API decides here.
fn policies(place: &Place<'_>, book: &Book<'_>, notes: &mut Notes) -> Option<Authorisation> {
    let selected =
        || book.authorizations.iter().filter(|candidate| is_selected(candidate, place.workload, book));
    let is_replaceable = |label: &str| book.unreadable_grants.contains(label);
    let mut unreadable =
        selected().filter(|candidate| candidate.body.is_err()).map(|candidate| candidate.label);
    if let Some(label) = unreadable.clone().find(|label| !is_replaceable(label)) {
        return Some(Authorisation::Unusable(label.clone()));
    }
    let with = |action: Action| {
        let enforced = selected().filter_map(|candidate| candidate.body.as_ref().ok());
        let enforced =
            enforced.filter(move |body| body.written.is_enforced() && body.written.action == action);
        enforced.map(|body| body.rules.clone())
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
    if !matches!(book.switch, Chosen::Missing { .. }) {
        for rules in denials.iter().chain(&grants) {
            notes.effect(
                &rules.policy,
                "the v1alpha1 RBAC objects are set aside for the workloads that it selects",
            );
        }
    }
    Some(Authorisation::Policies { denials, grants: Some(grants).filter(|grants| !grants.is_empty()) })
}

fn is_selected(candidate: &Candidate<'_, Authorization<'_>>, workload: &Workload, book: &Book<'_>) -> bool {
    book.is_in_scope(&candidate.name.namespace, &workload.name.namespace)
        && match &candidate.body {
            Ok(body) => selects(&body.written.selector, workload),
            Err(Reach::Selected(selector)) => selects(selector, workload),
            Err(Reach::Scope | Reach::Unreadable) => true,
            Err(Reach::Targets(_) | Reach::Nobody) => false,
        }
}

/// The 2018 API (policy B-1, B-2, B-4).
fn roles(place: &Place<'_>, book: &Book<'_>) -> Authorisation {
    let namespace = &*place.workload.name.namespace;
    let (label, switch) = match &book.switch {
        Chosen::Switch(label, switch) => (*label, *switch),
        Chosen::Unusable(label) => return Authorisation::Unusable((*label).clone()),
        Chosen::Missing { misnamed } => {
            let closes = misnamed.iter().find(|(scope, _)| book.is_in_scope(scope, namespace));
            return closes
                .map_or(Authorisation::Open, |(_, label)| Authorisation::Unusable((*label).clone()));
        }
    };
    let short = place.owner.map(|owner| &*owner.service.name.name);
    let complete = short.map(|short| format!("{short}.{namespace}.{SERVICE_SUFFIX}"));
    if !switch.runs(complete.as_deref(), namespace) {
        return Authorisation::Open;
    }
    let destination = Destination {
        service: short.zip(complete.as_deref()),
        namespace,
        service_account: &place.workload.service_account,
        labels: &place.workload.labels,
    };
    let mut grants = Vec::new();
    for role in book.roles.get(namespace).into_iter().flatten() {
        for rule in role.rules.iter().filter(|rule| rule.written.is_for(&destination)) {
            grants.push(Grant {
                role: role.label.clone(),
                conditions: rule.conditions.clone(),
                holders: rule.holders.clone(),
            });
        }
    }
    Authorisation::Roles { switch: label.clone(), is_permissive: switch.is_permissive, grants }
}
