//! The shortcut of direct connections: past the host's network stack, where both pods hang on veths of this host and nobody
//! else has a say there.

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    sync::{Arc, Mutex},
};

use aya::{
    Ebpf,
    maps::{HashMap, Map, MapData, MapError},
};
use ebpf_abi::{
    DirectEvent, DirectValue, ShortcutKey, ShortcutValue, Tuple, WorkloadNumber,
    names::{self, PROGRAM_SHORTCUT},
};

use super::{
    Kernel, KernelError, attach,
    error::During as _,
    load::{self, Purpose},
    maps::{gone, opening, pinned, reading, writing},
    origins::locked,
    pins,
};

/// A connection that is over and whose packets may still come late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed {
    /// As its client saw it; as its server did where the kernel did not tell of its end.
    pub tuple: Tuple,
    /// When, in nanoseconds of the monotonic clock.
    pub at_nanos: u64,
    socket_cookie: u64,
    keys: [ShortcutKey; 2],
}

/// The entries of connections with a shortcut.
#[derive(Clone)]
pub struct Shortcuts {
    maps: Arc<Mutex<Maps>>,
}

struct Maps {
    entries: HashMap<MapData, ShortcutKey, ShortcutValue>,
    interfaces: HashMap<MapData, WorkloadNumber, u32>,
    direct: HashMap<MapData, Tuple, DirectValue>,
}

impl fmt::Debug for Shortcuts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shortcuts")
    }
}

impl Shortcuts {
    pub(super) fn open(folder: &Path) -> Result<Self, KernelError> {
        let maps = Maps {
            entries: HashMap::try_from(Map::HashMap(pinned(folder, names::MAP_SHORTCUTS)?))
                .during(|| opening(names::MAP_SHORTCUTS))?,
            interfaces: HashMap::try_from(Map::HashMap(pinned(folder, names::MAP_HOST_INTERFACES)?))
                .during(|| opening(names::MAP_HOST_INTERFACES))?,
            direct: HashMap::try_from(Map::HashMap(pinned(folder, names::MAP_DIRECT)?))
                .during(|| opening(names::MAP_DIRECT))?,
        };
        Ok(Self { maps: Arc::new(Mutex::new(maps)) })
    }

    /// Connections that closed before this daemon listened.
    pub fn closed(&self) -> Result<Vec<Closed>, KernelError> {
        let maps = locked(&self.maps);
        // Both directions of a connection have the cookie of its client.
        let mut halves: BTreeMap<u64, (ShortcutKey, u64)> = BTreeMap::new();
        let mut found = Vec::new();
        for entry in maps.entries.iter() {
            let (key, value) = entry.during(|| reading(names::MAP_SHORTCUTS))?;
            if value.closed_nanos == 0 {
                continue;
            }
            match halves.remove(&value.socket_cookie) {
                Some((first, at_nanos)) => found.push(Closed {
                    tuple: first.tuple,
                    at_nanos,
                    socket_cookie: value.socket_cookie,
                    keys: [first, key],
                }),
                None => {
                    halves.insert(value.socket_cookie, (key, value.closed_nanos));
                }
            }
        }
        Ok(found)
    }

    /// The connection that an event says is over; `None` where it had no shortcut, or one of the two pods has left since.
    pub fn of(&self, event: &DirectEvent) -> Result<Option<Closed>, KernelError> {
        let maps = locked(&self.maps);
        let there = maps.interface(event.source)?;
        let back = maps.interface(event.destination)?;
        Ok(there.zip(back).map(|(there, back)| Closed {
            tuple: event.tuple,
            at_nanos: event.at_nanos,
            socket_cookie: event.socket_cookie,
            keys: [
                ShortcutKey { interface: there, tuple: event.tuple },
                ShortcutKey { interface: back, tuple: event.tuple.reversed() },
            ],
        }))
    }

    /// Removes the shortcut of a connection that is over. One that has the same tuple since keeps its own.
    pub fn remove(&self, closed: &Closed) -> Result<(), KernelError> {
        let mut maps = locked(&self.maps);
        let [there, back] = closed.keys;
        for (key, other) in [(there, back), (back, there)] {
            let found = maps.get(&key)?;
            if !found
                .is_some_and(|value| value.socket_cookie == closed.socket_cookie && value.closed_nanos != 0)
            {
                continue;
            }
            gone(maps.entries.remove(&key), names::MAP_SHORTCUTS)?;
            // A connection with the same tuple may have come to stand in between, and would have lost its own entry.
            let Some(standing) = maps.standing(&closed.tuple)? else { continue };
            let value = ShortcutValue {
                socket_cookie: standing.socket_cookie,
                closed_nanos: 0,
                interface: other.interface,
                reserved: 0,
            };
            maps.entries.insert(&key, &value, 0).during(|| writing(names::MAP_SHORTCUTS))?;
        }
        Ok(())
    }

    fn set_interface(&self, number: WorkloadNumber, interface: u32) -> Result<(), KernelError> {
        let mut maps = locked(&self.maps);
        maps.interfaces.insert(&number, &interface, 0).during(|| writing(names::MAP_HOST_INTERFACES))
    }

    fn interface(&self, number: WorkloadNumber) -> Result<Option<u32>, KernelError> {
        locked(&self.maps).interface(number)
    }

    /// From here on no connection of the workload gets a shortcut.
    fn forget_interface(&self, number: WorkloadNumber) -> Result<(), KernelError> {
        gone(locked(&self.maps).interfaces.remove(&number), names::MAP_HOST_INTERFACES)
    }

    /// Removes every shortcut from or to an interface: its number may be another pod's one day (T-17).
    fn forget_all_of(&self, interface: u32) -> Result<(), KernelError> {
        let mut maps = locked(&self.maps);
        let mut doomed = Vec::new();
        for entry in maps.entries.iter() {
            let (key, value) = entry.during(|| reading(names::MAP_SHORTCUTS))?;
            if key.interface == interface || value.interface == interface {
                doomed.push(key);
            }
        }
        for key in doomed {
            gone(maps.entries.remove(&key), names::MAP_SHORTCUTS)?;
        }
        Ok(())
    }
}

impl Maps {
    fn get(&self, key: &ShortcutKey) -> Result<Option<ShortcutValue>, KernelError> {
        found(self.entries.get(key, 0), names::MAP_SHORTCUTS)
    }

    fn interface(&self, number: WorkloadNumber) -> Result<Option<u32>, KernelError> {
        found(self.interfaces.get(&number, 0), names::MAP_HOST_INTERFACES)
    }

    /// The connection that has a tuple now, seen from either end, and may have a shortcut.
    fn standing(&self, tuple: &Tuple) -> Result<Option<DirectValue>, KernelError> {
        for tuple in [*tuple, tuple.reversed()] {
            let value = found(self.direct.get(&tuple, 0), names::MAP_DIRECT)?;
            if let Some(value) = value.filter(DirectValue::is_established) {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }
}

fn found<T>(value: Result<T, MapError>, map: &'static str) -> Result<Option<T>, KernelError> {
    match value {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error).during(|| reading(map)),
    }
}

impl Kernel {
    /// Lets direct connections of a pod take the shortcut from and to the host side of its veth, an interface of the daemon's
    /// own namespace. Connections that stand already go on as they do.
    ///
    /// # Errors
    /// [`KernelError::Occupied`] where somebody else's program judges packets there, [`KernelError::Feature`] without tcx
    /// (Linux 6.6). The pod has no shortcut then, and works without.
    pub fn shortcut(&mut self, number: WorkloadNumber, interface: u32) -> Result<(), KernelError> {
        self.check_owner()?;
        let workload = self.workloads.get(&number).ok_or(KernelError::Unknown(number))?;
        if workload.cgroup != 0 {
            return Err(KernelError::Order {
                key: workload.key.clone(),
                problem: "only pods have a veth of their own",
            });
        }
        let folder = workload.folder.clone();
        if self.shortcuts.interface(number)?.is_some_and(|present| present != interface) {
            self.no_shortcut(number)?;
        }
        let program = match &mut self.shortcut_program {
            Some(program) => program,
            absent => {
                let mut program = load::instance(Purpose::Node, &self.config, &self.pins.maps())?;
                load::load(&mut program, PROGRAM_SHORTCUT)?;
                absent.insert(program)
            }
        };
        attach::to_interface(program, interface, &folder)?;
        self.shortcuts.set_interface(number, interface)
    }

    /// Takes the shortcut from a pod; its connections go on by the host's stack. Without one it does nothing.
    ///
    /// A connection whose handshake the host's connection tracking saw, and nothing since, may be held for invalid there: such
    /// connections are to be ended.
    pub fn no_shortcut(&mut self, number: WorkloadNumber) -> Result<(), KernelError> {
        self.check_owner()?;
        let Some(interface) = self.shortcuts.interface(number)? else { return Ok(()) };
        self.shortcuts.forget_interface(number)?;
        if let Some(workload) = self.workloads.get(&number) {
            pins::remove_pin(&workload.folder.join(PROGRAM_SHORTCUT))?;
        }
        self.shortcuts.forget_all_of(interface)
    }

    /// Says which shortcuts there are.
    pub fn shortcuts(&self) -> Shortcuts {
        self.shortcuts.clone()
    }
}

/// The program, loaded when the first pod gets a shortcut.
pub(super) type ShortcutProgram = Option<Ebpf>;
