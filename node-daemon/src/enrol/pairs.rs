//! The pair table in the kernel: what a snapshot permits between the pods of this node, in the kernel's numbers; and the end of
//! direct connections that lost their permit.
//!
//! [`PairTable`] (names) -> [`translate`] (numbers) -> `set_pairs` (in force, and nothing older is) -> list -> end (T-14, T-18).

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use ebpf_abi::{Address, DirectValue, PairKey, PairVerdict, Tuple, WorkloadNumber};
use node_core::{
    pairs::{NoTable, PairTable},
    snapshot::Snapshot,
    workload::ObjectName,
};

use super::{DirectView, direct::Ledger};
use crate::{
    kernel::{Direct, DirectTable, Kernel},
    sys::{Namespace, diag, diag::Diag},
    telemetry::{Event, Sink},
};

/// A pod that is enrolled.
#[derive(Clone, Debug)]
pub(super) struct Pod {
    pub(super) number: WorkloadNumber,
    /// As its document has them.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) namespace: Arc<Namespace>,
}

/// All of them.
pub(super) type Pods = BTreeMap<ObjectName, Pod>;

/// What is in force.
#[derive(PartialEq, Eq)]
struct Present {
    table: DirectTable,
    addresses: BTreeMap<IpAddr, WorkloadNumber>,
}

/// See the module.
pub(super) struct Pairs {
    events: Sink,
    direct: Direct,
    ledger: Arc<Ledger>,
    /// Why connections could not be ended, if so: then none may be direct.
    barrier: Option<String>,
    wanted: Result<PairTable, NoTable>,
    /// Number of the snapshot that wants it.
    snapshot: u64,
    /// In force; `None`: nobody knows.
    present: Option<Present>,
    view: DirectView,
}

impl Pairs {
    /// Probes whether direct connections could be ended again: without that none is made.
    pub(super) fn new(direct: Direct, ledger: Arc<Ledger>, events: Sink) -> Self {
        let barrier = if events.must_record() {
            Some("nothing may pass without a record (audit.onFull), and the kernel keeps none".to_owned())
        } else {
            diag::probe_destroy().err().map(|error| format!("connections cannot be ended: {error}"))
        };
        Self {
            events,
            direct,
            ledger,
            barrier,
            wanted: Ok(PairTable::default()),
            snapshot: 0,
            present: None,
            view: DirectView::default(),
        }
    }

    /// What this snapshot wants from here on; [`Self::put`] puts it in force.
    pub(super) fn follow(&mut self, snapshot: &Arc<Snapshot>) {
        self.wanted = match &self.barrier {
            Some(_) => Ok(PairTable::default()),
            None => PairTable::desired(snapshot),
        };
        if let Err(none) = self.wanted {
            self.events.emit(&Event::LimitReached { limit: none.limit(), workload: None });
        }
        self.snapshot = snapshot.number();
        self.ledger.judge_by(snapshot);
    }

    /// Puts in force what is wanted, for the pods that are enrolled, and ends what lost its permit. Without a change it does
    /// nothing.
    pub(super) fn put(&mut self, kernel: &mut Kernel, pods: &Pods) {
        let number = |pod: &ObjectName| pods.get(pod).map(|pod| pod.number);
        let table = self.wanted.as_ref().map(|wanted| translate(wanted, number)).unwrap_or_default();
        let addresses = owners(pods.values().map(|pod| (pod.number, pod.addresses.as_slice())));
        let no_table = || self.wanted.as_ref().err().map(NoTable::to_string);
        let mut problem = self.barrier.clone().or_else(no_table);
        let wanted = Present { table, addresses };
        if self.present.as_ref() == Some(&wanted) {
            self.ledger.go_on();
            return self.tell(problem);
        }
        match kernel.declared(wanted.addresses.clone()).and_then(|()| kernel.set_pairs(&wanted.table)) {
            Ok(generation) => {
                self.view.generation = generation.0;
                self.view.pairs = wanted.table.pairs.len();
                self.present = Some(wanted);
            }
            Err(error) => {
                // An empty one is in force, and the next change tries again.
                self.view.pairs = 0;
                self.present = None;
                problem = Some(error.to_string());
            }
        }
        self.end_unpermitted(pods);
        self.ledger.go_on();
        self.tell(problem);
    }

    /// For status.
    pub(super) fn view(&self) -> &DirectView {
        &self.view
    }

    /// What nobody told of, such as a predecessor's connections and lost events.
    pub(super) fn compare(&self) {
        match self.direct.connections() {
            Ok(listed) => self.ledger.compare(&listed, Instant::now()),
            Err(error) => self.failed("listing direct connections", &error),
        }
    }

    /// Ends everything direct of a pod that leaves. Its namespace need not be enrolled any more.
    pub(super) fn end_all_of(&self, pod: &Pod, others: &Pods) {
        self.end(others, Some(pod), |_, value| value.source == pod.number || value.destination == pod.number);
    }

    fn end_unpermitted(&self, pods: &Pods) {
        let names: BTreeMap<WorkloadNumber, &ObjectName> =
            pods.iter().map(|(name, pod)| (pod.number, name)).collect();
        let table = self.wanted.as_ref().ok().filter(|_| self.present.is_some());
        let is_permitted = |tuple: &Tuple, value: &DirectValue| {
            let (source, destination) = (names.get(&value.source), names.get(&value.destination));
            let (Some(table), Some(source), Some(destination)) = (table, source, destination) else {
                return false;
            };
            // By addresses that are still theirs, as documents have them.
            let holds = |name: &ObjectName, address: Address| {
                pods.get(name).is_some_and(|pod| pod.addresses.contains(&address.into()))
            };
            table.verdict(source, destination, tuple.target_port) == PairVerdict::Permit
                && holds(source, tuple.source)
                && holds(destination, tuple.target)
        };
        self.end(pods, None, |tuple, value| !is_permitted(tuple, value));
    }

    fn end(&self, pods: &Pods, leaving: Option<&Pod>, is_over: impl Fn(&Tuple, &DirectValue) -> bool) {
        let listed = match self.direct.connections() {
            Ok(listed) => listed,
            Err(error) => return self.failed("listing direct connections", &error),
        };
        self.ledger.compare(&listed, Instant::now());
        let mut places = Places::new(pods.values().chain(leaving));
        for (tuple, value) in listed.iter().filter(|(tuple, value)| is_over(tuple, value)) {
            self.ledger.doom(value.socket_cookie, self.ledger.cause(tuple, value));
            let ended = places.end(tuple, value).and_then(|was_there| {
                // Neither end is there: the kernel did not see it close.
                if was_there { Ok(()) } else { self.direct.forget(tuple).map_err(std::io::Error::other) }
            });
            if let Err(error) = ended {
                self.failed("ending a direct connection", &error);
            }
        }
    }

    fn tell(&mut self, problem: Option<String>) {
        let is_first = self.view.problem.is_none() && !self.view.is_on;
        if is_first || self.view.problem != problem {
            self.events.emit(&Event::DirectPath { on: problem.is_none(), problem: problem.clone() });
        }
        self.view.snapshot = self.snapshot;
        self.view.is_on = problem.is_none();
        self.view.problem = problem;
    }

    fn failed(&self, call: &'static str, error: &dyn std::error::Error) {
        self.events.emit(&Event::KernelFailed { call, problem: error.to_string() });
    }
}

/// Namespaces in which sockets are looked for, each asked by one socket.
struct Places<'a> {
    namespaces: BTreeMap<WorkloadNumber, &'a Namespace>,
    asked: BTreeMap<WorkloadNumber, Diag>,
}

impl<'a> Places<'a> {
    fn new(pods: impl Iterator<Item = &'a Pod>) -> Self {
        let namespaces = pods.map(|pod| (pod.number, &*pod.namespace)).collect();
        Self { namespaces, asked: BTreeMap::new() }
    }

    /// Ends both ends of a connection. True if one of them was there.
    fn end(&mut self, tuple: &Tuple, value: &DirectValue) -> std::io::Result<bool> {
        let source = socket_address(tuple.source, tuple.source_port);
        let target = socket_address(tuple.target, tuple.target_port);
        let client = self.end_one(value.source, source, target, Some(value.socket_cookie))?;
        let server = self.end_one(value.destination, target, source, None)?;
        Ok(client || server)
    }

    fn end_one(
        &mut self,
        number: WorkloadNumber,
        local: SocketAddr,
        remote: SocketAddr,
        cookie: Option<u64>,
    ) -> std::io::Result<bool> {
        let Some(namespace) = self.namespaces.get(&number) else { return Ok(false) };
        let diag = match self.asked.entry(number) {
            std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => place.insert(Diag::open(namespace)?),
        };
        let Some(socket) = diag.find(local, remote)? else { return Ok(false) };
        // Another one that has the same addresses by now was judged by itself.
        if cookie.is_some_and(|cookie| u64::from_ne_bytes(socket.cookie()) != cookie) {
            return Ok(false);
        }
        diag.destroy(&socket)
    }
}

fn socket_address(address: Address, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

/// Whose the addresses are. One that two pods declare is nobody's.
fn owners<'a>(
    pods: impl Iterator<Item = (WorkloadNumber, &'a [IpAddr])>,
) -> BTreeMap<IpAddr, WorkloadNumber> {
    let mut owners: BTreeMap<IpAddr, Option<WorkloadNumber>> = BTreeMap::new();
    for (number, addresses) in pods {
        for address in addresses {
            owners.entry(*address).and_modify(|owner| *owner = None).or_insert(Some(number));
        }
    }
    owners.into_iter().filter_map(|(address, owner)| Some((address, owner?))).collect()
}

/// The table in the kernel's numbers. Pairs with a pod that is not enrolled are left out: they ask.
fn translate(table: &PairTable, number: impl Fn(&ObjectName) -> Option<WorkloadNumber>) -> DirectTable {
    let classes = table.sources.iter().filter_map(|(source, class)| Some((number(source)?, *class)));
    let pairs = table.pairs.iter().filter_map(|((class, destination, port), verdict)| {
        let key = PairKey::pair(*class, number(destination)?, port.unwrap_or(PairKey::OTHER_PORTS));
        Some((key, *verdict))
    });
    DirectTable { classes: classes.collect(), pairs: pairs.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ObjectName {
        ObjectName::new("photo", name)
    }

    #[test]
    fn only_pods_that_are_enrolled_are_in_the_kernels_table() {
        let table = PairTable {
            sources: [(name("a"), 0), (name("gone"), 0), (name("b"), 1)].into(),
            pairs: [
                ((0, name("b"), None), PairVerdict::Permit),
                ((0, name("b"), Some(80)), PairVerdict::Ask),
                ((0, name("gone"), None), PairVerdict::Permit),
                ((1, name("a"), Some(81)), PairVerdict::Deny),
            ]
            .into(),
        };
        let number = |pod: &ObjectName| match &*pod.name {
            "a" => Some(WorkloadNumber(7)),
            "b" => Some(WorkloadNumber(9)),
            _ => None,
        };
        let translated = translate(&table, number);
        assert_eq!(translated.classes, [(WorkloadNumber(7), 0), (WorkloadNumber(9), 1)]);
        let pair = |class, number, port| PairKey::pair(class, WorkloadNumber(number), port);
        let expected = [
            (pair(0, 9, PairKey::OTHER_PORTS), PairVerdict::Permit),
            (pair(0, 9, 80), PairVerdict::Ask),
            (pair(1, 7, 81), PairVerdict::Deny),
        ];
        assert_eq!(translated.pairs, expected);
        assert_eq!(translate(&PairTable::default(), number), DirectTable::default());
    }

    #[test]
    fn an_address_that_two_pods_declare_is_nobodys() {
        let at = |text: &str| text.parse::<IpAddr>().expect("an address");
        let (a, b) = ([at("10.8.1.4"), at("fd00::4")], [at("10.8.1.5"), at("fd00::4")]);
        let found = owners([(WorkloadNumber(1), &a[..]), (WorkloadNumber(2), &b[..])].into_iter());
        assert_eq!(found, [(a[0], WorkloadNumber(1)), (b[0], WorkloadNumber(2))].into());
    }
}
