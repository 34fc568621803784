//! The node-local fast path: which pairs the kernel permits by itself, and what became of their connections.
//!
//! A table is written completely and then put in the place of the last one, in one step: no program ever sees half of it.
//! That step waits until every program that runs has ended (an RCU grace period; `maybe_wait_bpf_programs` of the kernel), so
//! whatever an older table permitted is listed by [`Direct::connections`] afterwards (T-14).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap as HashMapOf},
    fmt, io,
    net::{IpAddr, Ipv4Addr, TcpListener},
    os::fd::{AsRawFd, RawFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, MapError, RingBuf, SockMap};
use ebpf_abi::{
    Address, DirectEvent, DirectValue, Generation, PairKey, PairValue, PairVerdict, Tuple, WorkloadNumber,
    limits,
    names::{self, STATE_EPOCH},
};
use nix::sched::{CloneFlags, unshare};

use super::{
    error::{During as _, KernelError},
    maps::{gone, is_full, opening, pinned, reading, state, within, writing},
    origins::locked,
};

/// Which pairs of this node's workloads the kernel permits or denies by itself. What is not listed takes the way through the
/// daemon; an empty table makes nothing direct.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectTable {
    /// Sources with equal rights share a class. A source that is not listed has no rights here.
    pub classes: Vec<(WorkloadNumber, u32)>,
    /// Made by [`PairKey::pair`].
    pub pairs: Vec<(PairKey, PairVerdict)>,
}

impl DirectTable {
    fn entries(&self, generation: Generation) -> impl Iterator<Item = (PairKey, PairValue)> {
        let classes = self.classes.iter().map(|(source, class)| (PairKey::class_of(*source), *class));
        let pairs = self.pairs.iter().map(|(pair, verdict)| (*pair, *verdict as u32));
        classes.chain(pairs).map(move |(key, value)| (key, PairValue { value, generation }))
    }
}

/// The table in force, whose addresses are on this node, and the sign that the daemon is there to change both.
pub(super) struct Pairs {
    table: ArrayOfMaps<MapData, HashMap<MapData, PairKey, PairValue>>,
    local_addresses: HashMap<MapData, Address, WorkloadNumber>,
    daemon: SockMap<MapData>,
    /// In its slot as long as this lives; from the first table of this daemon on.
    presence: Option<TcpListener>,
    /// Whether a table of this daemon is in force.
    is_set: bool,
    limit: u32,
}

impl Pairs {
    pub(super) fn open(folder: &Path, limit: u32) -> Result<Self, KernelError> {
        Ok(Self {
            table: ArrayOfMaps::try_from(Map::ArrayOfMaps(pinned(folder, names::MAP_PAIRS)?))
                .during(|| opening(names::MAP_PAIRS))?,
            local_addresses: HashMap::try_from(Map::HashMap(pinned(folder, names::MAP_LOCAL_ADDRESSES)?))
                .during(|| opening(names::MAP_LOCAL_ADDRESSES))?,
            daemon: SockMap::try_from(Map::SockMap(pinned(folder, names::MAP_DAEMON)?))
                .during(|| opening(names::MAP_DAEMON))?,
            presence: None,
            is_set: false,
            limit,
        })
    }

    /// Puts a table in force. Where that fails nothing is direct.
    pub(super) fn set(&mut self, table: &DirectTable, generation: Generation) -> Result<(), KernelError> {
        let put = self.put(table, generation);
        if put.is_err() && self.put(&DirectTable::default(), generation).is_err() {
            self.be_gone()?;
        }
        self.is_set = put.is_ok();
        put
    }

    /// Puts this daemon in the place of its predecessor, if a table of its own is in force: one that a dead predecessor left
    /// permits nothing until it is replaced (T-15).
    pub(super) fn be_there(&mut self) -> Result<(), KernelError> {
        if !self.is_set || self.presence.is_some() {
            return Ok(());
        }
        let listener = presence().map_err(KernelError::file("/proc/self/ns/net", "making a listener"))?;
        self.daemon.set(0, &listener.as_raw_fd(), 0).during(|| writing(names::MAP_DAEMON))?;
        self.presence = Some(listener);
        Ok(())
    }

    /// Without the daemon's listener no program permits or denies by the table.
    fn be_gone(&mut self) -> Result<(), KernelError> {
        self.presence = None;
        gone(self.daemon.clear_index(&0), names::MAP_DAEMON)
    }

    fn put(&mut self, table: &DirectTable, generation: Generation) -> Result<(), KernelError> {
        let entries = table.classes.len() + table.pairs.len();
        let Some(entries) = u32::try_from(entries).ok().filter(|entries| *entries <= self.limit) else {
            return Err(full(self.limit));
        };
        // The kernel makes no map without room.
        let mut map = HashMap::create(entries.max(1), BPF_F_NO_PREALLOC)
            .during(|| format!("making a pair table of {entries} entries"))?;
        for (key, value) in table.entries(generation) {
            within(map.insert(&key, &value, 0), names::MAP_PAIRS, self.limit)?;
        }
        self.table.set(0, &map, 0).during(|| writing(names::MAP_PAIRS))
    }

    /// Makes `owners` the addresses that connects may reach directly. What goes, goes first: a program that runs meanwhile
    /// captures (T-17).
    pub(super) fn set_local_addresses(
        &mut self,
        owners: &BTreeMap<IpAddr, WorkloadNumber>,
    ) -> Result<(), KernelError> {
        let present: Vec<(Address, WorkloadNumber)> = self
            .local_addresses
            .iter()
            .collect::<Result<_, _>>()
            .during(|| reading(names::MAP_LOCAL_ADDRESSES))?;
        for (address, owner) in present {
            if owners.get(&IpAddr::from(address)) != Some(&owner) {
                gone(self.local_addresses.remove(&address), names::MAP_LOCAL_ADDRESSES)?;
            }
        }
        for (address, owner) in owners {
            match self.local_addresses.insert(&Address::from(*address), owner, 0) {
                // An address that does not fit is not on this node: the way through the daemon.
                Err(MapError::SyscallError(error)) if is_full(&error.io_error) => {}
                other => other.during(|| writing(names::MAP_LOCAL_ADDRESSES))?,
            }
        }
        Ok(())
    }
}

/// The addresses that can lead to one workload only, each with its owner. An address that two network namespaces have is
/// nobody's, and so is one that means something else in each of them.
pub(super) fn owners<'a>(
    workloads: impl Iterator<Item = (WorkloadNumber, u64, bool, &'a BTreeSet<IpAddr>)>,
) -> BTreeMap<IpAddr, WorkloadNumber> {
    let mut claims: BTreeMap<IpAddr, Option<(WorkloadNumber, u64)>> = BTreeMap::new();
    for (number, namespace, is_pod, addresses) in workloads {
        for address in addresses.iter().filter(|address| is_of_one_node(address)) {
            let claim = claims.entry(*address).or_insert(Some((number, namespace)));
            if !is_pod || claim.is_some_and(|(_, other)| other != namespace) {
                *claim = None;
            }
        }
    }
    claims.into_iter().filter_map(|(address, claim)| Some((address, claim?.0))).collect()
}

/// Whether an address means the same in every network namespace.
fn is_of_one_node(address: &IpAddr) -> bool {
    !address.is_loopback()
        && !address.is_unspecified()
        && !address.is_multicast()
        && match address {
            IpAddr::V4(v4) => !v4.is_link_local() && !v4.is_broadcast(),
            IpAddr::V6(v6) => !v6.is_unicast_link_local(),
        }
}

/// A listener that nobody can reach: in a network namespace of its own, which goes with it.
fn presence() -> io::Result<TcpListener> {
    let made = thread::Builder::new().name("presence".to_owned()).spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))
    })?;
    made.join().map_err(|_| io::Error::other("the thread that makes the listener panicked"))?
}

fn full(limit: u32) -> KernelError {
    KernelError::Limit {
        map: names::MAP_PAIRS,
        limit,
        consequence: "an empty table is in force, and all connections take the way through the daemon",
    }
}

/// What became of connections that the kernel let go directly.
#[derive(Clone)]
pub struct Direct {
    connections: Arc<Mutex<HashMap<MapData, Tuple, DirectValue>>>,
    maps: PathBuf,
    epoch: u64,
}

impl Direct {
    pub(super) fn open(folder: &Path, epoch: u64) -> Result<Self, KernelError> {
        let map = HashMap::try_from(Map::HashMap(pinned(folder, names::MAP_DIRECT)?))
            .during(|| opening(names::MAP_DIRECT))?;
        Ok(Self { connections: Arc::new(Mutex::new(map)), maps: folder.to_owned(), epoch })
    }

    /// All direct connections, those whose handshake is not done included. To be asked for after [`super::Kernel::set_pairs`]
    /// and compared with the same table: what it does not permit any more is to be destroyed at both ends (T-14, T-18).
    /// What opens or closes meanwhile may be missing or listed twice; opened ones were judged by the table in force.
    pub fn connections(&self) -> Result<Vec<(Tuple, DirectValue)>, KernelError> {
        let connections = locked(&self.connections);
        let mut found: HashMapOf<Tuple, DirectValue> = HashMapOf::new();
        for entry in connections.iter() {
            let (tuple, value) = entry.during(|| reading(names::MAP_DIRECT))?;
            found.insert(tuple, value);
        }
        Ok(found.into_iter().collect())
    }

    /// Removes the entry of a connection whose socket is gone without a word; no SYN with its tuple is let by any more. One
    /// that lives goes on, and its end is not told.
    pub fn forget(&self, tuple: &Tuple) -> Result<(), KernelError> {
        gone(locked(&self.connections).remove(tuple), names::MAP_DIRECT)
    }

    /// What happens to direct connections from here on, and what a predecessor did not read. One reader of a node at a time.
    pub fn events(&self) -> Result<DirectEvents, KernelError> {
        let ring = RingBuf::try_from(Map::RingBuf(pinned(&self.maps, names::MAP_DIRECT_EVENTS)?))
            .during(|| opening(names::MAP_DIRECT_EVENTS))?;
        Ok(DirectEvents { ring, state: state(&self.maps)?, epoch: self.epoch })
    }
}

impl fmt::Debug for Direct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Direct")
    }
}

/// Events of direct connections, in the order in which they happened.
///
/// The descriptor becomes readable when a quarter of the ring is filled ([`limits::DIRECT_EVENTS_BYTES`]): to wake the daemon
/// for each connection would cost more than the connection. So it is to be read at that, and every
/// [`limits::DIRECT_EVENTS_READ_EVERY_MILLIS`] besides.
pub struct DirectEvents {
    ring: RingBuf<MapData>,
    state: Array<MapData, u64>,
    epoch: u64,
}

impl DirectEvents {
    /// Takes what is there, at most [`limits::DIRECT_EVENTS_AT_ONCE`]; nothing is no error.
    ///
    /// # Errors
    /// [`KernelError::NotOwner`] as soon as a successor reads.
    pub fn take(&mut self) -> Result<Vec<DirectEvent>, KernelError> {
        let current = self.state.get(&STATE_EPOCH, 0).during(|| reading(names::MAP_STATE))?;
        if current != self.epoch {
            return Err(KernelError::NotOwner { ours: self.epoch, current });
        }
        let mut taken = Vec::new();
        while taken.len() < limits::DIRECT_EVENTS_AT_ONCE {
            let Some(entry) = self.ring.next() else { break };
            taken.extend(DirectEvent::from_bytes(&entry));
        }
        Ok(taken)
    }
}

impl AsRawFd for DirectEvents {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl fmt::Debug for DirectEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DirectEvents")
    }
}

/// Entries take memory as they come, as in the definition of the kernel programs: the kernel takes no other kind for the slot.
const BPF_F_NO_PREALLOC: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(workloads: &[(u32, u64, bool, &[&str])], expected: &[(&str, u32)]) {
        let parsed: Vec<(WorkloadNumber, u64, bool, BTreeSet<IpAddr>)> = workloads
            .iter()
            .map(|(number, namespace, is_pod, addresses)| {
                let addresses = addresses.iter().map(|text| text.parse().expect("an address")).collect();
                (WorkloadNumber(*number), *namespace, *is_pod, addresses)
            })
            .collect();
        let found = owners(
            parsed
                .iter()
                .map(|(number, namespace, is_pod, addresses)| (*number, *namespace, *is_pod, addresses)),
        );
        let expected: BTreeMap<IpAddr, WorkloadNumber> = expected
            .iter()
            .map(|(text, number)| (text.parse().expect("an address"), WorkloadNumber(*number)))
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn an_address_that_one_pod_has_leads_to_it() {
        check(
            &[(1, 10, true, &["10.8.1.4", "fd00::4"]), (2, 20, true, &["10.8.1.5"])],
            &[("10.8.1.4", 1), ("fd00::4", 1), ("10.8.1.5", 2)],
        );
    }

    #[test]
    fn an_address_that_two_namespaces_have_is_nobodys() {
        check(
            &[(1, 10, true, &["10.8.1.4"]), (2, 20, true, &["10.8.1.4"]), (3, 30, true, &["10.8.1.4"])],
            &[],
        );
    }

    #[test]
    fn an_address_of_the_host_is_nobodys_in_either_order() {
        check(&[(1, 10, true, &["10.8.1.4"]), (2, 20, false, &["10.8.1.4"])], &[]);
        check(&[(1, 20, false, &["10.8.1.4"]), (2, 10, true, &["10.8.1.4"])], &[]);
    }

    #[test]
    fn addresses_that_mean_something_else_in_each_namespace_are_nobodys() {
        let addresses = [
            "127.0.0.1",
            "::1",
            "0.0.0.0",
            "::",
            "169.254.1.1",
            "fe80::4",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
        ];
        check(&[(1, 10, true, &addresses)], &[]);
    }
}
