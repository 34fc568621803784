//! The single writer: typed access to every map, and what happens when one is full.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
    path::Path,
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, SockMap},
};
use ebpf_abi::{
    Address, OwnAddressKey, Port, PortRule, SocketSlot, SteerMeta, WorkloadNumber, WorkloadValue, limits,
    names, workload::WORKLOAD_CAPTURE,
};
use nix::errno::Errno;

use super::{
    MapSizes,
    error::{During as _, KernelError},
};

/// Maps of the node that this room writes or reads.
pub(super) struct Shared {
    workloads: HashMap<MapData, u64, WorkloadValue>,
    own_addresses: HashMap<MapData, OwnAddressKey, u8>,
    counters: PerCpuArray<MapData, u64>,
    state: Array<MapData, u64>,
    sizes: MapSizes,
}

impl Shared {
    pub(super) fn open(folder: &Path, sizes: MapSizes) -> Result<Self, KernelError> {
        Ok(Self {
            sizes,
            workloads: HashMap::try_from(Map::HashMap(pinned(folder, names::MAP_WORKLOADS)?))
                .during(|| opening(names::MAP_WORKLOADS))?,
            own_addresses: HashMap::try_from(Map::HashMap(pinned(folder, names::MAP_OWN_ADDRESSES)?))
                .during(|| opening(names::MAP_OWN_ADDRESSES))?,
            counters: PerCpuArray::try_from(Map::PerCpuArray(pinned(folder, names::MAP_COUNTERS)?))
                .during(|| opening(names::MAP_COUNTERS))?,
            state: state(folder)?,
        })
    }

    /// A fact of the node: one of the `STATE_*` slots.
    pub(super) fn state(&self, slot: u32) -> Result<u64, KernelError> {
        self.state.get(&slot, 0).during(|| reading(names::MAP_STATE))
    }

    pub(super) fn set_state(&mut self, slot: u32, value: u64) -> Result<(), KernelError> {
        self.state.set(slot, &value, 0).during(|| writing(names::MAP_STATE))
    }

    /// The sum over all CPUs.
    pub(super) fn count(&self, slot: u32) -> Result<u64, KernelError> {
        let values = self.counters.get(&slot, 0).during(|| reading(names::MAP_COUNTERS))?;
        Ok(values.iter().fold(0, |sum, value| sum.wrapping_add(*value)))
    }

    /// Whose connects are captured in a network namespace.
    pub(super) fn workload(&self, netns_cookie: u64) -> Result<Option<WorkloadNumber>, KernelError> {
        match self.workloads.get(&netns_cookie, 0) {
            Ok(value) => Ok(Some(value.number)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).during(|| reading(names::MAP_WORKLOADS)),
        }
    }

    pub(super) fn capture(&mut self, netns_cookie: u64, number: WorkloadNumber) -> Result<(), KernelError> {
        let value = WorkloadValue { number, flags: WORKLOAD_CAPTURE };
        within(self.workloads.insert(&netns_cookie, &value, 0), names::MAP_WORKLOADS, self.sizes.workloads)
    }

    pub(super) fn uncapture(&mut self, netns_cookie: u64) -> Result<(), KernelError> {
        gone(self.workloads.remove(&netns_cookie), names::MAP_WORKLOADS)
    }

    /// The own addresses of a workload.
    pub(super) fn own_addresses(&self, workload: WorkloadNumber) -> Result<BTreeSet<IpAddr>, KernelError> {
        let keys: Vec<OwnAddressKey> = self
            .own_addresses
            .keys()
            .collect::<Result<_, _>>()
            .during(|| reading(names::MAP_OWN_ADDRESSES))?;
        Ok(keys.into_iter().filter(|key| key.workload == workload).map(|key| key.address.into()).collect())
    }

    /// Makes `addresses` the own addresses of a workload: new ones first, so that none is missing in between. At the limit
    /// nothing is changed.
    pub(super) fn set_own_addresses(
        &mut self,
        workload: WorkloadNumber,
        addresses: &BTreeSet<IpAddr>,
    ) -> Result<(), KernelError> {
        let mut added = Vec::new();
        for address in addresses {
            let key = OwnAddressKey { workload, address: Address::from(*address) };
            if self.own_addresses.get(&key, 0).is_ok() {
                continue;
            }
            let inserted = self.own_addresses.insert(&key, &0, 0);
            if let Err(error) = within(inserted, names::MAP_OWN_ADDRESSES, self.sizes.own_addresses) {
                for key in added {
                    gone(self.own_addresses.remove(&key), names::MAP_OWN_ADDRESSES)?;
                }
                return Err(error);
            }
            added.push(key);
        }
        for stale in self.own_addresses(workload)?.difference(addresses) {
            let key = OwnAddressKey { workload, address: Address::from(*stale) };
            gone(self.own_addresses.remove(&key), names::MAP_OWN_ADDRESSES)?;
        }
        Ok(())
    }
}

/// Maps of one instance of `steer`.
pub(super) struct Steering {
    sockets: SockMap<MapData>,
    addresses: HashMap<MapData, Address, u8>,
    ports: HashMap<MapData, Port, PortRule>,
}

impl Steering {
    pub(super) fn open(folder: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            sockets: SockMap::try_from(Map::SockMap(pinned(folder, names::MAP_SOCKETS)?))
                .during(|| opening(names::MAP_SOCKETS))?,
            addresses: HashMap::try_from(Map::HashMap(pinned(folder, names::MAP_STEER_ADDRESSES)?))
                .during(|| opening(names::MAP_STEER_ADDRESSES))?,
            ports: HashMap::try_from(Map::HashMap(pinned(folder, names::MAP_STEER_PORTS)?))
                .during(|| opening(names::MAP_STEER_PORTS))?,
        })
    }

    /// Puts the listeners into their slots; whoever was there before gets no further connection.
    pub(super) fn set_sockets(&mut self, sockets: [BorrowedFd<'_>; 3]) -> Result<(), KernelError> {
        for (slot, socket) in SocketSlot::ALL.into_iter().zip(sockets) {
            self.sockets
                .set(slot.index(), &socket.as_raw_fd(), 0)
                .during(|| format!("putting the {slot:?} listener into {}", names::MAP_SOCKETS))?;
        }
        Ok(())
    }

    /// Makes `addresses` the own addresses of the namespace: new ones first.
    pub(super) fn set_addresses(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<(), KernelError> {
        let wanted: BTreeSet<[u8; 16]> = addresses.iter().map(|address| Address::from(*address).0).collect();
        replace(
            &mut self.addresses,
            &wanted.into_iter().map(|octets| (Address(octets), 0)).collect::<Vec<_>>(),
            names::MAP_STEER_ADDRESSES,
            limits::STEER_ADDRESSES_MAX,
        )
    }

    /// Makes `ports` the ports of a pod at which connections are left alone: new ones first.
    pub(super) fn set_exempt_ports(&mut self, ports: &BTreeSet<u16>) -> Result<(), KernelError> {
        self.set_ports(&ports.iter().map(|port| (*port, PortRule::EXEMPT)).collect::<Vec<_>>())
    }

    /// Makes `ports`, each with its owner, the ports that the host's workloads serve: new ones first.
    pub(super) fn set_inbound_ports(
        &mut self,
        ports: &BTreeMap<u16, WorkloadNumber>,
    ) -> Result<(), KernelError> {
        self.set_ports(
            &ports.iter().map(|(port, owner)| (*port, PortRule::inbound(*owner))).collect::<Vec<_>>(),
        )
    }

    /// Adds ports to those that are there. One that has another owner there has none until all of them are known: its
    /// clients are judged.
    pub(super) fn add_inbound_ports(
        &mut self,
        ports: &BTreeMap<u16, WorkloadNumber>,
    ) -> Result<(), KernelError> {
        for (port, owner) in ports {
            let owner = match self.ports.get(port, 0) {
                Ok(present) if present.owner != *owner => WorkloadNumber::NONE,
                Ok(_) | Err(MapError::KeyNotFound) => *owner,
                Err(error) => return Err(error).during(|| reading(names::MAP_STEER_PORTS)),
            };
            within(
                self.ports.insert(port, &PortRule::inbound(owner), 0),
                names::MAP_STEER_PORTS,
                limits::STEER_PORTS_MAX,
            )?;
        }
        Ok(())
    }

    fn set_ports(&mut self, ports: &[(Port, PortRule)]) -> Result<(), KernelError> {
        replace(&mut self.ports, ports, names::MAP_STEER_PORTS, limits::STEER_PORTS_MAX)
    }
}

/// Facts of the node.
pub(super) fn state(folder: &Path) -> Result<Array<MapData, u64>, KernelError> {
    Array::try_from(Map::Array(pinned(folder, names::MAP_STATE)?)).during(|| opening(names::MAP_STATE))
}

/// Whose instance is pinned in a folder.
pub(super) fn meta(folder: &Path) -> Result<SteerMeta, KernelError> {
    meta_map(folder)?.get(&0, 0).during(|| reading(names::MAP_STEER_META))
}

pub(super) fn set_meta(folder: &Path, meta: &SteerMeta) -> Result<(), KernelError> {
    meta_map(folder)?.set(0, meta, 0).during(|| writing(names::MAP_STEER_META))
}

fn meta_map(folder: &Path) -> Result<Array<MapData, SteerMeta>, KernelError> {
    Array::try_from(Map::Array(pinned(folder, names::MAP_STEER_META)?))
        .during(|| opening(names::MAP_STEER_META))
}

/// Pins a map of an instance.
pub(super) fn pin(instance: &mut Ebpf, name: &'static str, folder: &Path) -> Result<(), KernelError> {
    let map = instance.take_map(name).ok_or(KernelError::NoObject)?;
    let path = folder.join(name);
    map.pin(&path).during(|| format!("pinning a map at {}", path.display()))
}

/// Opens a map by its pin.
pub(super) fn pinned(folder: &Path, name: &str) -> Result<MapData, KernelError> {
    let path = folder.join(name);
    MapData::from_pin(&path).during(|| format!("opening the pinned map {}", path.display()))
}

/// Makes the entries of a map exactly these: new ones first, then the others go.
fn replace<K: Pod + PartialEq, V: Pod>(
    map: &mut HashMap<MapData, K, V>,
    entries: &[(K, V)],
    name: &'static str,
    limit: u32,
) -> Result<(), KernelError> {
    check_count(entries.len(), name, limit)?;
    for (key, value) in entries {
        within(map.insert(key, value, 0), name, limit)?;
    }
    let present: Vec<K> = map.keys().collect::<Result<_, _>>().during(|| reading(name))?;
    for key in present.into_iter().filter(|key| !entries.iter().any(|(wanted, _)| wanted == key)) {
        gone(map.remove(&key), name)?;
    }
    Ok(())
}

/// An insertion that may meet the map's limit.
pub(super) fn within(
    inserted: Result<(), MapError>,
    map: &'static str,
    limit: u32,
) -> Result<(), KernelError> {
    match inserted {
        Err(MapError::SyscallError(error)) if is_full(&error.io_error) => Err(full(map, limit)),
        other => other.during(|| writing(map)),
    }
}

/// Whether an insertion met the map's limit.
pub(super) fn is_full(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::E2BIG as i32)
}

/// Whether so many own addresses fit into one namespace.
pub(super) fn check_addresses(count: usize) -> Result<(), KernelError> {
    check_count(count, names::MAP_STEER_ADDRESSES, limits::STEER_ADDRESSES_MAX)
}

/// Whether so many ports of one namespace fit.
pub(super) fn check_ports(count: usize) -> Result<(), KernelError> {
    check_count(count, names::MAP_STEER_PORTS, limits::STEER_PORTS_MAX)
}

fn check_count(count: usize, map: &'static str, limit: u32) -> Result<(), KernelError> {
    if u32::try_from(count).is_ok_and(|count| count <= limit) { Ok(()) } else { Err(full(map, limit)) }
}

fn full(map: &'static str, limit: u32) -> KernelError {
    KernelError::Limit { map, limit, consequence: "what did not fit stays closed" }
}

/// A removal of what may be gone already.
pub(super) fn gone(removed: Result<(), MapError>, map: &str) -> Result<(), KernelError> {
    match removed {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(Errno::ENOENT as i32) => {
            Ok(())
        }
        other => other.during(|| writing(map)),
    }
}

pub(super) fn opening(map: &str) -> String {
    format!("opening the map {map}")
}

pub(super) fn reading(map: &str) -> String {
    format!("reading the map {map}")
}

pub(super) fn writing(map: &str) -> String {
    format!("writing the map {map}")
}
