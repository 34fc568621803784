//! Which pairs of workloads of this node the kernel may connect by itself, and which it refuses by itself.
//!
//! Pods only: what a host's services share (addresses, namespace) no table of pairs can tell apart. A pair is permitted or
//! denied where the destination's policy says so on layer 4 for every address of both; where only a request can answer, where
//! either end wants the proxy, and where anything is not known, the daemon is asked. There is one evaluator: the table holds what
//! [`Snapshot::leave`] and [`Snapshot::admit`] answer to the facts that the daemon's own relay would present.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ebpf_abi::{PairVerdict, limits::PAIRS_MAX};

use crate::{
    policy::{Admission, ConnectionFacts, DenialReason, Presented},
    snapshot::{Route, Snapshot},
    tunnel::TUNNEL_PORT,
    workload::{ObjectName, SameNode, Workload},
};

/// Questions to the policy for one table. Reckoning: 1.5 us each (200 pods with rights of their own and two ports each: 120,000
/// in 0.17 s), and a change of policy must be in force within 1 s. 400 pods of as many accounts with two ports each are 480,000.
/// At the limit there is no table: everything takes the way through the daemon.
pub const QUESTIONS_MAX: usize = 500_000;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PairTable {
    /// Sources with equal rights share a class. One that is not listed always asks.
    pub sources: BTreeMap<ObjectName, u32>,
    /// By class, destination and port; `None` stands for every port without an entry of its own. What is not listed asks.
    pub pairs: BTreeMap<(u32, ObjectName, Option<u16>), PairVerdict>,
}

/// Why there is no table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoTable {
    #[error("the pairs of this node need more than {QUESTIONS_MAX} questions to the policy")]
    TooManyQuestions,
    #[error("the rights of this node's workloads need more than {PAIRS_MAX} entries")]
    TooManyPairs,
}

impl NoTable {
    /// Name of the limit, for metrics and events.
    pub const fn limit(self) -> &'static str {
        match self {
            Self::TooManyQuestions => "questions_max",
            Self::TooManyPairs => "pairs_max",
        }
    }
}

impl PairTable {
    /// What the kernel of the snapshot's node should hold. While documents are unreadable (T-19), nothing.
    ///
    /// # Errors
    /// The limit that it would pass.
    pub fn desired(snapshot: &Snapshot) -> Result<Self, NoTable> {
        Self::within(snapshot, QUESTIONS_MAX, usize::try_from(PAIRS_MAX).unwrap_or(usize::MAX))
    }

    fn within(snapshot: &Snapshot, questions_max: usize, pairs_max: usize) -> Result<Self, NoTable> {
        if snapshot.unreadable().is_some() {
            return Ok(Self::default());
        }
        let destinations: Vec<Destination<'_>> =
            ends(snapshot).map(|pod| Destination::new(pod, snapshot)).collect();
        let by_address = destinations.iter().any(|destination| destination.by_source_address);
        let groups = groups(snapshot, by_address);
        let asked: usize = destinations.iter().map(|destination| destination.questions).sum();
        if asked.saturating_mul(groups.len()) > questions_max {
            return Err(NoTable::TooManyQuestions);
        }
        let mut classes: BTreeMap<Row, u32> = BTreeMap::new();
        let mut table = Self::default();
        for members in groups.into_values() {
            let row = row(snapshot, &members, &destinations);
            if row.is_empty() {
                continue;
            }
            let next = u32::try_from(classes.len()).unwrap_or(u32::MAX);
            let class = *classes.entry(row).or_insert(next);
            table.sources.extend(members.into_iter().map(|member| (member.name.clone(), class)));
        }
        let entries = table.sources.len() + classes.keys().map(Vec::len).sum::<usize>();
        if entries > pairs_max {
            return Err(NoTable::TooManyPairs);
        }
        for (row, class) in classes {
            let pairs = row.into_iter().map(|(destination, port, verdict)| {
                ((class, destinations[destination].pod.name.clone(), port), verdict_of(verdict))
            });
            table.pairs.extend(pairs);
        }
        Ok(table)
    }

    /// What the kernel answers by this table: an own entry of the port first, then the one of all others.
    pub fn verdict(&self, source: &ObjectName, destination: &ObjectName, port: u16) -> PairVerdict {
        let Some(class) = self.sources.get(source) else { return PairVerdict::Ask };
        let of = |port: Option<u16>| self.pairs.get(&(*class, destination.clone(), port));
        of(Some(port)).or_else(|| of(None)).copied().unwrap_or(PairVerdict::Ask)
    }
}

/// All entries of one class: index of the destination, port, and the number of the verdict.
type Row = Vec<(usize, Option<u16>, u32)>;

fn verdict_of(number: u32) -> PairVerdict {
    PairVerdict::of(number)
}

/// Pods of this node that both want to be reached, and to reach, by the kernel alone.
fn ends(snapshot: &Snapshot) -> impl Iterator<Item = &Arc<Workload>> {
    snapshot
        .local()
        .filter(|workload| !workload.is_host() && snapshot.same_node(&workload.name) == SameNode::Direct)
}

/// Sources of which the policy cannot tell one from the other, so that one of them is asked for.
fn groups(snapshot: &Snapshot, by_address: bool) -> BTreeMap<(String, Vec<IpAddr>), Vec<&Arc<Workload>>> {
    let mut groups: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for pod in ends(snapshot) {
        let addresses = if by_address { pod.addresses.clone() } else { families(&pod.addresses) };
        groups.entry((pod.identity.to_string(), addresses)).or_default().push(pod);
    }
    groups
}

/// The all-zero address of each family that is among them: which of them does not matter.
fn families(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let of = |is_family: fn(&IpAddr) -> bool, zero: IpAddr| addresses.iter().any(is_family).then_some(zero);
    let v4 = of(IpAddr::is_ipv4, std::net::Ipv4Addr::UNSPECIFIED.into());
    let v6 = of(IpAddr::is_ipv6, std::net::Ipv6Addr::UNSPECIFIED.into());
    v4.into_iter().chain(v6).collect()
}

/// A pod, and which of its ports to ask about.
struct Destination<'a> {
    pod: &'a Arc<Workload>,
    /// The last one stands for all that are not named.
    ports: Vec<u16>,
    by_source_address: bool,
    questions: usize,
}

impl<'a> Destination<'a> {
    fn new(pod: &'a Arc<Workload>, snapshot: &Snapshot) -> Self {
        let mut ports = snapshot.ports_told_apart(pod);
        ports.remove(&TUNNEL_PORT);
        let is_other = |port: &u16| *port != TUNNEL_PORT && !ports.contains(port);
        // Without any other port there is none to be wrong about.
        let other = (1..=u16::MAX).rev().find(is_other).unwrap_or(TUNNEL_PORT);
        let ports: Vec<u16> = ports.into_iter().chain([other]).collect();
        let questions = ports.len() * pod.addresses.len();
        Self { pod, ports, by_source_address: snapshot.looks_at_source_addresses(pod), questions }
    }
}

/// What the members of a group get; which of them asks does not matter, but none is asked about itself.
fn row(snapshot: &Snapshot, members: &[&Arc<Workload>], destinations: &[Destination<'_>]) -> Row {
    let mut row = Row::new();
    for (index, destination) in destinations.iter().enumerate() {
        let others = members.iter().find(|member| member.name != destination.pod.name);
        let Some(source) = others.or_else(|| members.first()) else { continue };
        let mut verdicts: Vec<PairVerdict> =
            destination.ports.iter().map(|port| answer(snapshot, source, destination, *port)).collect();
        // The tunnel's port has a listener of its own, which the kernel alone must not pass by.
        let other = verdicts.pop().unwrap_or(PairVerdict::Ask);
        let named = destination.ports.iter().copied().zip(verdicts).chain([(TUNNEL_PORT, PairVerdict::Ask)]);
        row.extend(
            named
                .filter(|(_, verdict)| *verdict != other)
                .map(|(port, verdict)| (index, Some(port), verdict as u32)),
        );
        if other != PairVerdict::Ask {
            row.push((index, None, other as u32));
        }
    }
    row
}

/// The one answer for every address of the source and every address of the destination, or the daemon is asked.
fn answer(snapshot: &Snapshot, source: &Workload, destination: &Destination<'_>, port: u16) -> PairVerdict {
    let mut facts = ConnectionFacts {
        presented: Presented::Attested(source.identity.clone()),
        source_address: IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        destination_address: IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        destination_port: port,
        destination: Arc::clone(destination.pod),
    };
    let mut all: Option<PairVerdict> = None;
    for to in &destination.pod.addresses {
        let mut of_family: Vec<&IpAddr> =
            source.addresses.iter().filter(|from| from.is_ipv4() == to.is_ipv4()).collect();
        if !destination.by_source_address {
            of_family.truncate(1);
        }
        if !is_led_to(snapshot, source, destination.pod, SocketAddr::new(*to, port)) {
            return PairVerdict::Ask;
        }
        for from in of_family {
            (facts.source_address, facts.destination_address) = (*from, *to);
            let one = admitted(snapshot, &facts);
            if all.is_some_and(|before| before != one) {
                return PairVerdict::Ask;
            }
            all = Some(one);
        }
    }
    all.unwrap_or(PairVerdict::Ask)
}

/// Whether a connection to this address goes there unchanged, to a workload that may answer. A workload's connections to itself
/// are never captured, so what the table says of those does not matter.
fn is_led_to(snapshot: &Snapshot, source: &Workload, pod: &Workload, target: SocketAddr) -> bool {
    if source.name == pod.name {
        return true;
    }
    match snapshot.leave(source, target, 0).route {
        Route::Tunnel { destination, endpoint, allowed, .. } => {
            destination.name == pod.name && endpoint == target && allowed.contains(&pod.identity)
        }
        Route::Passthrough { .. } | Route::Unknown | Route::Refused(_) => false,
    }
}

fn admitted(snapshot: &Snapshot, facts: &ConnectionFacts) -> PairVerdict {
    match snapshot.admit(facts) {
        Ok(Admission::Stream(_)) => PairVerdict::Permit,
        Ok(Admission::Requests) => PairVerdict::Ask,
        Err(denial) => match denial.reason {
            DenialReason::NotEnrolled => PairVerdict::Ask,
            DenialReason::PlaintextRefused
            | DenialReason::TrustDomain
            | DenialReason::DeniedByRule
            | DenialReason::NoRuleAllows
            | DenialReason::PolicyUnusable
            | DenialReason::PeerUnauthenticated
            | DenialReason::TokenRefused
            | DenialReason::BadPath
            | DenialReason::IdentityBarred => PairVerdict::Deny,
        },
    }
}

#[cfg(test)]
mod tests;
