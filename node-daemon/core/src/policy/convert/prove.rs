//! Two sets of policy, asked the same of everything that either can tell apart, by the evaluator that enforces.
//!
//! Compared is what is enforced: what a dry run would say is not, and a request has one token at most. Claims are not
//! empty, because issuers do not sign such ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr},
    ops::ControlFlow,
    path::PathBuf,
    sync::Arc,
};

use spiffe_id::SpiffeId;

use super::super::{
    atoms::{Attribute, Decision, NoKeys, Point, RequestPoint, Space, TokenPoint, Unfinished},
    compile::{Compiled, Inventory, compile},
    objects::{Body, PolicyObjects},
    rules::{Authorisation, Condition, PortRules, Values},
};
use crate::workload::{ObjectName, Placement, Protocol, Workload};

/// The node on which everything of a proof runs.
pub(super) const NODE: &str = "proof";

/// Points at which both sets are asked, of all destinations together: some ten seconds. Beyond it nothing is proven.
pub const POINTS_MAX: usize = 1_000_000;

/// Counter-examples that are told; one is enough to know, a few show the pattern.
const EXAMPLES_MAX: usize = 3;

/// What a proof came to.
#[derive(Clone, Debug)]
pub struct Proof {
    pub proven: Proven,
    /// At so many points both were asked.
    pub points: usize,
    /// So many ports of workloads, kinds of workloads counted once.
    pub places: usize,
    /// A request with a token that was not valid before either, or that stands behind `Bearer ` in a header of its own, is
    /// refused, and was let in: the current API never lets it in (policy F-2, G-19).
    pub bad_token: Option<CounterExample>,
    /// Both refuse, and a client is told something else.
    pub answer: Option<CounterExample>,
}

#[derive(Clone, Debug)]
pub enum Proven {
    /// All points have the same verdict.
    Equivalent,
    Differs(Vec<CounterExample>),
    /// A limit, or something that is only tried.
    Unknown(String),
}

/// A connection or request about which the two disagree.
#[derive(Clone, Debug)]
pub struct CounterExample {
    pub destination: ObjectName,
    pub port: u16,
    /// Attributes that either set looks at, and their values.
    pub attributes: Vec<(String, String)>,
    pub before: Decision,
    pub after: Decision,
}

impl CounterExample {
    /// Whether the same rules of the same port disagree.
    fn is_like(&self, other: &Self) -> bool {
        let deciding =
            |decision: &Decision| (decision.policy.clone(), decision.rule.clone(), decision.reason);
        (&self.destination, self.port) == (&other.destination, other.port)
            && deciding(&self.before) == deciding(&other.before)
            && deciding(&self.after) == deciding(&other.after)
    }
}

impl fmt::Display for CounterExample {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "to {} port {}", self.destination, self.port)?;
        for (name, value) in &self.attributes {
            write!(formatter, ", {name} {value}")?;
        }
        write!(formatter, ": before {}, after {}", Told(&self.before), Told(&self.after))
    }
}

struct Told<'d>(&'d Decision);

impl fmt::Display for Told<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Decision { reason, policy, rule, .. } = self.0;
        match reason {
            None => formatter.write_str("allowed")?,
            Some(reason) => write!(formatter, "denied ({})", reason.label())?,
        }
        match (policy, rule) {
            (Some(policy), Some(rule)) => write!(formatter, " by {policy} {rule}"),
            (Some(policy), None) => write!(formatter, " by {policy}"),
            (None, _) => Ok(()),
        }
    }
}

pub(super) fn prove(old: &PolicyObjects, new: &PolicyObjects, inventory: &Inventory<'_>) -> Proof {
    let workloads = destinations(old, new, inventory);
    let inventory = Inventory { workloads: &workloads, node: NODE, ..*inventory };
    let (before, after) = (compile(old, &inventory), compile(new, &inventory));
    let mut proof = Proof { proven: Proven::Equivalent, points: 0, places: 0, bad_token: None, answer: None };
    let mut prover = Prover {
        before: &before,
        after: &after,
        examples: Vec::new(),
        holes: BTreeSet::new(),
        proof: &mut proof,
    };
    let mut unfinished = None;
    for workload in workloads.values() {
        for port in prover.ports(workload) {
            if let Err(reason) = prover.place(workload, port) {
                unfinished = Some(format!("{} port {port}: {reason}", workload.name));
                break;
            }
        }
    }
    let Prover { examples, holes, .. } = prover;
    proof.proven = match (examples.is_empty(), unfinished, holes.into_iter().next()) {
        (false, _, _) => Proven::Differs(examples),
        (true, Some(limit), _) => Proven::Unknown(limit),
        (true, None, Some(hole)) => Proven::Unknown(hole),
        (true, None, None) => Proven::Equivalent,
    };
    proof
}

struct Prover<'p> {
    before: &'p Compiled,
    after: &'p Compiled,
    examples: Vec<CounterExample>,
    holes: BTreeSet<String>,
    proof: &'p mut Proof,
}

impl Prover<'_> {
    /// Every port that something names, and one that nothing does.
    fn ports(&self, workload: &Workload) -> Vec<u16> {
        let sides = [self.before, self.after];
        let named = || sides.iter().flat_map(|side| side.ports(workload)).flatten();
        let mut ports: BTreeSet<u16> = named().map(|(port, _)| port).filter(|port| *port > 0).collect();
        let others = sides.iter().filter_map(|side| side.port_rules(workload, 0));
        let rules = named().map(|(_, rules)| rules).chain(others);
        ports.extend(rules.flat_map(asked_ports).filter(|port| *port > 0));
        ports.extend((1..=u16::MAX).rev().find(|port| !ports.contains(port)));
        ports.into_iter().collect()
    }

    fn place(&mut self, workload: &Arc<Workload>, port: u16) -> Result<(), String> {
        let (before, after) = (self.before, self.after);
        let (Some(old), Some(new)) = (before.port_rules(workload, port), after.port_rules(workload, port))
        else {
            return Ok(());
        };
        self.proof.places += 1;
        let space = Space::new(before, vec![old, new], &|_| true);
        self.holes.extend(space.holes().map(str::to_owned));
        let asks_addresses = [old, new].into_iter().any(asks_destination_addresses);
        for address in workload.addresses.iter().take(if asks_addresses { usize::MAX } else { 1 }) {
            let base = base(workload, port, *address, old.protocol);
            let mut limit = false;
            let walked = space.walk(&base, &|_| true, &mut |point| {
                if self.proof.points >= POINTS_MAX {
                    limit = true;
                    return ControlFlow::Break(());
                }
                self.proof.points += 1;
                self.compare(&space, point);
                if self.examples.len() < EXAMPLES_MAX {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            });
            match walked {
                Ok(()) => {}
                Err(Unfinished::Enough) if limit => {
                    return Err(format!("there are more than {POINTS_MAX} points to ask"));
                }
                Err(Unfinished::Enough) => return Err("it differs".to_owned()),
                Err(unfinished) => return Err(unfinished.to_string()),
            }
        }
        Ok(())
    }

    fn compare(&mut self, space: &Space<'_>, point: &Point) {
        let before = self.before.decide(point, 0, &NoKeys);
        let after = self.after.decide(point, 0, &NoKeys);
        let example = |before, after| CounterExample {
            destination: point.destination.name.clone(),
            port: point.port,
            attributes: told(space, point),
            before,
            after,
        };
        match (before.allowed, after.allowed) {
            (true, true) => {}
            (false, false) => {
                if before.is_unauthenticated() != after.is_unauthenticated() && self.proof.answer.is_none() {
                    self.proof.answer = Some(example(before, after));
                }
            }
            (true, false) if after.has_bad_token && self.is_bad_token(point) => {
                if self.proof.bad_token.is_none() {
                    self.proof.bad_token = Some(example(before, after));
                }
            }
            (true, false) | (false, true) => {
                let example = example(before, after);
                if !self.examples.iter().any(|known| known.is_like(&example)) {
                    self.examples.push(example);
                }
            }
        }
    }
}

impl Prover<'_> {
    /// Whether the token of a request is one that nobody has to let in.
    fn is_bad_token(&self, point: &Point) -> bool {
        !self.before.accepts_token(point) || point.has_scheme_in_header_of_its_own()
    }
}

fn told(space: &Space<'_>, point: &Point) -> Vec<(String, String)> {
    let has_token =
        point.request.as_ref().is_some_and(|request| matches!(request.token, TokenPoint::Good { .. }));
    let is_told = |attribute: &&Attribute| {
        has_token || **attribute <= Attribute::Token || **attribute >= Attribute::Method
    };
    let values = space
        .attributes()
        .filter(is_told)
        .filter_map(|attribute| Some((attribute.name(), point.atom(attribute)?.shown())));
    values.collect()
}

fn base(workload: &Arc<Workload>, port: u16, destination_address: IpAddr, protocol: Protocol) -> Point {
    let request = RequestPoint {
        method: "GET".to_owned(),
        path: Some("/".to_owned()),
        host: Some("host".to_owned()),
        headers: Vec::new(),
        token: TokenPoint::Absent,
    };
    Point {
        destination: Arc::clone(workload),
        port,
        destination_address,
        source_address: IpAddr::V4(Ipv4Addr::new(203, 0, 113, 77)),
        peer: None,
        is_attested: false,
        server_name: None,
        request: (protocol != Protocol::Tcp).then_some(request),
    }
}

fn conditions(rules: &PortRules) -> Vec<&Condition> {
    match &rules.authorisation {
        Authorisation::Open | Authorisation::Unusable(_) => Vec::new(),
        Authorisation::Roles { grants, .. } => grants
            .iter()
            .flat_map(|grant| {
                let subjects = grant.holders.iter().flat_map(|holder| holder.subjects.iter().flatten());
                grant.conditions.iter().chain(subjects)
            })
            .collect(),
        Authorisation::Policies { denials, grants } => denials
            .iter()
            .chain(grants.iter().flatten())
            .flat_map(|named| named.rules.iter())
            .flat_map(|rule| rule.from.iter().chain(&rule.to).flatten().chain(&rule.when))
            .collect(),
    }
}

fn asked_ports(rules: &PortRules) -> Vec<u16> {
    let each = conditions(rules).into_iter().map(|condition| {
        if let Values::DestinationPorts(ports) = condition.values() { ports.as_slice() } else { &[] }
    });
    each.flatten().copied().collect()
}

fn asks_destination_addresses(rules: &PortRules) -> bool {
    conditions(rules).iter().any(|condition| matches!(condition.values(), Values::DestinationAddresses(_)))
}

/// Every kind of destination: the workloads, one for each service that has none, one for each namespace that something
/// names, and one elsewhere. Workloads that nothing tells apart stand for each other.
fn destinations(
    old: &PolicyObjects,
    new: &PolicyObjects,
    inventory: &Inventory<'_>,
) -> BTreeMap<ObjectName, Arc<Workload>> {
    let mut all: BTreeMap<ObjectName, Arc<Workload>> = BTreeMap::new();
    let mut kinds = BTreeSet::new();
    let objects = || old.entries().chain(new.entries());
    let asks_addresses = asks_any_address(old, new);
    for workload in inventory.workloads.values().filter(|workload| workload.enrolled) {
        let ports: Vec<_> =
            workload.ports.iter().map(|port| (port.name.clone(), port.port, port.protocol)).collect();
        let namespace = workload.name.namespace.clone();
        let kind = (
            namespace,
            workload.labels.clone(),
            workload.service_account.clone(),
            ports,
            workload.addresses.len(),
        );
        if kinds.insert((kind, asks_addresses.then(|| workload.addresses.clone()))) {
            let here = Workload { node: NODE.to_owned(), ..Workload::clone(workload) };
            all.insert(workload.name.clone(), Arc::new(here));
        }
    }
    for service in inventory.services.values().filter(|service| !service.selector.is_empty()) {
        let is_served = all.values().any(|workload| {
            workload.name.namespace == service.name.namespace
                && super::super::transport::selects(&service.selector, workload)
        });
        if !is_served {
            let name = format!("of-service-{}", service.name.name);
            insert(&mut all, inventory, &service.name.namespace, &name, service.selector.clone());
        }
    }
    let namespaces: BTreeSet<Arc<str>> = objects()
        .map(|(_, name, _)| name.namespace.clone())
        .chain(inventory.services.keys().map(|name| name.namespace.clone()))
        .chain(listed(old))
        .filter(|namespace| !namespace.is_empty())
        .collect();
    for namespace in &namespaces {
        insert(&mut all, inventory, namespace, "of-no-service", BTreeMap::new());
    }
    let elsewhere =
        (0..).map(|number| format!("elsewhere-{number}")).find(|name| !namespaces.contains(name.as_str()));
    insert(&mut all, inventory, &elsewhere.unwrap_or_default(), "of-no-service", BTreeMap::new());
    all
}

/// Namespaces that a switch lists.
fn listed(objects: &PolicyObjects) -> impl Iterator<Item = Arc<str>> {
    let switches = objects.entries().filter_map(|(_, _, entry)| {
        let body = &entry.good.as_ref()?.body;
        if let Body::RbacConfig(switch) | Body::ClusterRbacConfig(switch) = body {
            Some(switch)
        } else {
            None
        }
    });
    switches.flat_map(|switch| switch.listed.namespaces.iter().map(|name| Arc::from(name.as_str())))
}

/// Whether any object says something of the destination's address.
fn asks_any_address(old: &PolicyObjects, new: &PolicyObjects) -> bool {
    let asks = |conditions: &[Condition]| {
        conditions.iter().any(|condition| matches!(condition.values(), Values::DestinationAddresses(_)))
    };
    let mut bodies = old.entries().chain(new.entries()).filter_map(|(_, _, entry)| entry.good.as_ref());
    bodies.any(|good| {
        if let Body::ServiceRole(role) = &good.body {
            return role.rules.iter().any(|rule| asks(&rule.conditions));
        }
        let Body::AuthorizationPolicy(policy) = &good.body else { return false };
        policy.rules.iter().any(|rule| asks(&rule.rule.when))
    })
}

fn insert(
    all: &mut BTreeMap<ObjectName, Arc<Workload>>,
    inventory: &Inventory<'_>,
    namespace: &str,
    name: &str,
    labels: BTreeMap<String, String>,
) {
    let name = ObjectName::new(namespace, name);
    let Ok(identity) = SpiffeId::new(inventory.mesh.trust_domain.clone(), namespace, "default") else {
        return;
    };
    let workload = Workload {
        name: name.clone(),
        labels,
        annotations: BTreeMap::new(),
        service_account: "default".to_owned(),
        identity,
        node: NODE.to_owned(),
        addresses: vec![IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))],
        placement: Placement::NetworkNamespace(PathBuf::new()),
        ports: Vec::new(),
        exempt_inbound_ports: Vec::new(),
        enrolled: true,
    };
    all.entry(name).or_insert_with(|| Arc::new(workload));
}
