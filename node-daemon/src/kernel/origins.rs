//! What the data path asks of the kernel for one connection: handles that are cheap to clone and safe to share.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    os::fd::BorrowedFd,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::maps::{HashMap, Map, MapData, MapError, SkStorage};
use ebpf_abi::{
    Delivery, ExemptRecord, Origin, OwnAddressKey, Tuple, WorkloadNumber,
    limits::{self, ORIGIN_AFTER_CLOSE_NANOS},
    names,
};
use nix::time::{ClockId, clock_gettime};

use super::{
    error::{During as _, KernelError},
    maps::{gone, opening, pinned, reading, within, writing},
};

/// Exempts the daemon's own sockets from capture (T-2).
#[derive(Clone)]
pub struct Exempt(Arc<Mutex<SkStorage<MapData, ExemptRecord>>>);

impl Exempt {
    pub(super) fn open(folder: &Path) -> Result<Self, KernelError> {
        let map = SkStorage::try_from(Map::SkStorage(pinned(folder, names::MAP_EXEMPT)?))
            .during(|| opening(names::MAP_EXEMPT))?;
        Ok(Self(Arc::new(Mutex::new(map))))
    }

    /// Records a socket as the daemon's own. To be called before `connect`, on plain TCP sockets: on an MPTCP descriptor
    /// the record would stand on the parent and miss the subflow. Takes some microseconds and dies with the socket.
    pub fn mark(&self, socket: BorrowedFd<'_>) -> Result<(), KernelError> {
        locked(&self.0).insert(&socket, &ExemptRecord { exempt: 1 }, 0).during(|| writing(names::MAP_EXEMPT))
    }
}

impl fmt::Debug for Exempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Exempt")
    }
}

/// Who opened a connection that arrives at a listener of the host's namespace (T-27).
#[derive(Clone)]
pub struct Origins(Arc<Mutex<HashMap<MapData, Tuple, Origin>>>);

impl Origins {
    pub(super) fn open(folder: &Path) -> Result<Self, KernelError> {
        let map = HashMap::try_from(Map::HashMap(pinned(folder, names::MAP_ORIGINS)?))
            .during(|| opening(names::MAP_ORIGINS))?;
        Ok(Self(Arc::new(Mutex::new(map))))
    }

    /// The host workload whose socket connected from `client` to `target`, or `None`: some other process of this host, or
    /// another machine. To be called once for each accepted connection, right after the accept.
    pub fn take(
        &self,
        client: SocketAddr,
        target: SocketAddr,
    ) -> Result<Option<WorkloadNumber>, KernelError> {
        let tuple = Tuple::new(client, target);
        let mut origins = locked(&self.0);
        let origin = match origins.get(&tuple, 0) {
            Ok(origin) => origin,
            Err(MapError::KeyNotFound) => return Ok(None),
            Err(error) => return Err(error).during(|| reading(names::MAP_ORIGINS)),
        };
        gone(origins.remove(&tuple), names::MAP_ORIGINS)?;
        Ok(is_current(&origin, now_nanos()?).then_some(origin.workload))
    }

    /// Removes what nobody may claim any more.
    pub(super) fn sweep(&self) -> Result<(), KernelError> {
        let now = now_nanos()?;
        let mut origins = locked(&self.0);
        let stale: Vec<Tuple> = origins
            .iter()
            .filter_map(|entry| match entry {
                Ok((tuple, origin)) => (!is_current(&origin, now)).then_some(Ok(tuple)),
                Err(error) => Some(Err(error)),
            })
            .collect::<Result<_, _>>()
            .during(|| reading(names::MAP_ORIGINS))?;
        for tuple in stale {
            gone(origins.remove(&tuple), names::MAP_ORIGINS)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Origins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Origins")
    }
}

/// Whether no other socket can own the tuple of this entry.
fn is_current(origin: &Origin, now_nanos: u64) -> bool {
    origin.closed_nanos == 0 || now_nanos.saturating_sub(origin.closed_nanos) < ORIGIN_AFTER_CLOSE_NANOS
}

/// Announces the daemon's own deliveries inside the host's namespace, so that they are not steered back to it.
#[derive(Clone)]
pub struct Deliveries {
    announced: Arc<Mutex<HashMap<MapData, Tuple, Delivery>>>,
    own_addresses: Arc<HashMap<MapData, OwnAddressKey, u8>>,
}

impl Deliveries {
    pub(super) fn open(folder: &Path) -> Result<Self, KernelError> {
        let announced = HashMap::try_from(Map::HashMap(pinned(folder, names::MAP_DELIVERIES)?))
            .during(|| opening(names::MAP_DELIVERIES))?;
        let own_addresses = HashMap::try_from(Map::HashMap(pinned(folder, names::MAP_OWN_ADDRESSES)?))
            .during(|| opening(names::MAP_OWN_ADDRESSES))?;
        Ok(Self { announced: Arc::new(Mutex::new(announced)), own_addresses: Arc::new(own_addresses) })
    }

    /// Whether an address is one of the namespace of this workload: a client that has it is a process of this host.
    pub fn is_own(&self, workload: WorkloadNumber, address: IpAddr) -> Result<bool, KernelError> {
        match self.own_addresses.get(&OwnAddressKey { workload, address: address.into() }, 0) {
            Ok(_) => Ok(true),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(error).during(|| reading(names::MAP_OWN_ADDRESSES)),
        }
    }

    /// Announces the connection that a socket is about to make from `source` (an exact port: announce after `bind`, before
    /// `connect`). The socket is bound to `lo`, marked and transparent, as in a pod, except where `source` is an address of
    /// the host itself: the answers to a local client come by its own interface, so that socket is a plain one. The answer
    /// is to be kept until the connection stands: after that no listener is looked up for it.
    pub fn announce(
        &self,
        workload: WorkloadNumber,
        source: SocketAddr,
        target: SocketAddr,
    ) -> Result<Announced, KernelError> {
        let tuple = Tuple::new(source, target);
        let inserted = locked(&self.announced).insert(&tuple, &Delivery { workload }, 0);
        within(inserted, names::MAP_DELIVERIES, limits::DELIVERIES_MAX)?;
        Ok(Announced { deliveries: self.clone(), tuple })
    }

    /// Removes what a predecessor announced: a tuple that it no longer holds could be bound by somebody else. Its
    /// established connections need no entry.
    pub(super) fn sweep(&self) -> Result<(), KernelError> {
        let mut deliveries = locked(&self.announced);
        let announced: Vec<Tuple> =
            deliveries.keys().collect::<Result<_, _>>().during(|| reading(names::MAP_DELIVERIES))?;
        for tuple in announced {
            gone(deliveries.remove(&tuple), names::MAP_DELIVERIES)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Deliveries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Deliveries")
    }
}

/// A delivery that is announced for as long as this lives.
#[derive(Debug)]
#[must_use = "the delivery is announced only as long as this lives"]
pub struct Announced {
    deliveries: Deliveries,
    tuple: Tuple,
}

impl Drop for Announced {
    fn drop(&mut self) {
        // Nothing is lost if this fails: the entry names a tuple that only a socket of the daemon can hold.
        let _: Result<(), MapError> = locked(&self.deliveries.announced).remove(&self.tuple);
    }
}

/// A map is a descriptor: nothing in it is half-written when a thread panics.
pub(super) fn locked<T>(map: &Mutex<T>) -> MutexGuard<'_, T> {
    map.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The clock that the kernel programs read.
pub fn now_nanos() -> Result<u64, KernelError> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).during(|| "reading the monotonic clock".to_owned())?;
    let now = std::time::Duration::from(now);
    Ok(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use ebpf_abi::OriginKind;

    use super::*;

    #[test]
    fn an_origin_is_believed_until_its_port_may_belong_to_another() {
        let origin = |closed_nanos| Origin {
            workload: WorkloadNumber(1),
            kind: OriginKind::Captured as u32,
            socket_cookie: 1,
            closed_nanos,
        };
        let now = 5_000_000_000;
        assert!(is_current(&origin(0), now));
        assert!(is_current(&origin(now), now));
        assert!(is_current(&origin(now - ORIGIN_AFTER_CLOSE_NANOS + 1), now));
        assert!(!is_current(&origin(now - ORIGIN_AFTER_CLOSE_NANOS), now));
        assert!(!is_current(&origin(1), now));
    }
}
