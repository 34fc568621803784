//! The kernel's half, seen from the daemon: load, attach, fill maps, hand over, remove.
//!
//! What comes in: where workloads are ([`EnrolTarget`]), their listeners, their addresses. What goes out: numbers of
//! enrolments, who opened a connection ([`Origins`]), counters. The single writer of every map; aya's types stay inside.
//! Nothing here knows of identities, certificates or policy, and nothing here makes routes, rules or sysctls.
//!
//! The order of calls, and who else does what in between:
//! ```text
//! Kernel::start(&KernelConfig) -> Result<Kernel, KernelError>          // once the first full snapshot is there: takes the epoch
//! kernel.remembered() -> Vec<Remembered>                               // what a predecessor pinned and nobody steered yet
//! kernel.steer(&EnrolTarget, [BorrowedFd; 3]) -> Result<WorkloadNumber, _>  // sockets in the order of SocketSlot::ALL
//!     (caller: sysctls, routes, rules)
//! kernel.capture(WorkloadNumber) -> Result<(), _>
//! kernel.addresses(WorkloadNumber, &[IpAddr])                          // own addresses changed (also link-local ones)
//! kernel.exempt_ports(WorkloadNumber, &[u16])                          // pods
//! kernel.inbound_ports(WorkloadNumber, &[u16])                         // host workloads
//! kernel.uncapture(WorkloadNumber)                                     // (caller: remove rules, routes) then
//! kernel.release(WorkloadNumber)                                       // also for remembered numbers; implies uncapture
//! kernel.declared(BTreeMap<IpAddr, WorkloadNumber>)                      // before set_pairs: which addresses documents give to which pod
//! kernel.set_pairs(&DirectTable) -> Result<Generation, _>              // which pairs the kernel lets by; the first one puts this
//!     // daemon in its predecessor's place, an empty one makes nothing direct; then, at once:
//! kernel.direct() -> Direct        Direct::connections() -> Result<Vec<(Tuple, DirectValue)>, _>  // to be judged again (T-14)
//!     Direct::events() -> Result<DirectEvents, _>   DirectEvents::take() -> Result<Vec<DirectEvent>, _>   Direct::forget(&Tuple)
//! kernel.shortcut(WorkloadNumber, interface)                           // pods: packets of direct connections skip the host's stack
//! kernel.no_shortcut(WorkloadNumber)                                   // release() does it, too
//! kernel.shortcuts() -> Shortcuts  Shortcuts::of(&DirectEvent) -> Option<Closed>   Shortcuts::remove(&Closed)   // 60 s after the end
//! kernel.exempt() -> Exempt        Exempt::mark(&self, BorrowedFd)     // before connect(), on each of the daemon's sockets
//! kernel.origins() -> Origins      Origins::take(client, target) -> Option<WorkloadNumber>   // host listeners: who dialled?
//!     // a host workload that dials itself, at loopback or another address of the host, is left alone and never asked for
//! kernel.deliveries() -> Deliveries
//!     Deliveries::is_own(number, client) -> Result<bool, _>              // then a plain socket delivers: no lo, no mark
//!     Deliveries::announce(number, source, target) -> Result<Announced, _>  // host deliveries: after bind(), before connect();
//!                                                                      // keep the answer until the connection stands
//! kernel.counters() -> Result<Vec<(&'static str, u64)>, _>             // labels of DropReason and Verdict
//! kernel.is_owner() -> Result<bool, _>                                 // false: a successor writes, only drain
//! kernel.retire_older_schemas() -> Result<Report, _>                   // after all workloads are steered
//! cleanup(&KernelConfig) -> Result<Report, KernelError>                // removes every link, map and pin of this node
//! ```
//! All of it blocks for micro- to milliseconds (system calls) and belongs on one task.

mod error;

mod pins;

mod load;

mod attach;

mod maps;

mod enrolment;

mod origins;

mod direct;

mod shortcut;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    os::fd::BorrowedFd,
    path::PathBuf,
};

use ebpf_abi::{
    DropReason, Generation, Verdict, WorkloadNumber, limits,
    names::{self, STATE_CGROUP, STATE_EPOCH, STATE_GENERATION},
};

pub use direct::{Direct, DirectEvents, DirectTable};
pub use error::{KernelError, Report};
pub use origins::{Announced, Deliveries, Exempt, Origins, now_nanos};
pub use shortcut::{Closed, Shortcuts};

use crate::sys::cgroup::cgroup_id;
use direct::Pairs;
use enrolment::{Workload, check_listeners};
use load::Purpose;
use maps::{Shared, Steering, check_addresses};
use pins::Pins;
use shortcut::ShortcutProgram;

/// The oldest kernel that has everything: bpf_set_retval came last.
pub const KERNEL_FLOOR: &str = "5.18";

/// What the kernel's half needs to know of this node.
#[derive(Clone, Debug)]
pub struct KernelConfig {
    /// This node's name; part of the pin path.
    pub node: String,
    /// Where the bpf file system is, or is to be mounted.
    pub bpffs: PathBuf,
    /// The cgroup2 folder under which all enrolled pods run.
    pub cgroup: PathBuf,
    /// Our bits in the mark of captured sockets; not 0.
    pub mark: u32,
    pub sizes: MapSizes,
}

/// Sizes of the node's maps: the limits, smaller in tests. Those that a predecessor pinned have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSizes {
    pub workloads: u32,
    pub own_addresses: u32,
    pub origins: u32,
    pub local_addresses: u32,
    pub direct: u32,
    /// Entries of one generation of the pair table.
    pub pairs: u32,
    /// A power of two, and at least a page.
    pub direct_events_bytes: u32,
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            workloads: limits::WORKLOADS_MAX,
            own_addresses: limits::OWN_ADDRESSES_MAX,
            origins: limits::ORIGINS_MAX,
            local_addresses: limits::OWN_ADDRESSES_MAX,
            direct: limits::DIRECT_MAX,
            pairs: limits::PAIRS_MAX,
            direct_events_bytes: limits::DIRECT_EVENTS_BYTES,
        }
    }
}

/// A workload that is to be put under capture.
#[derive(Debug)]
pub struct EnrolTarget<'a> {
    /// `<namespace>_<name>`, at most [`ebpf_abi::limits::KEY_LEN_MAX`] bytes; the same for the same workload after a restart.
    pub key: String,
    /// Its network namespace; borrowed only, so that a dead workload's namespace can go.
    pub netns: BorrowedFd<'a>,
    /// Cookie of that namespace.
    pub cookie: u64,
    /// All addresses of the namespace that are not loopback, link-local ones included.
    pub addresses: Vec<IpAddr>,
    /// Ports of a pod at which connections are left alone.
    pub exempt_ports: Vec<u16>,
    pub kind: WorkloadKind,
}

/// How a workload is told from others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkloadKind {
    /// By its network namespace.
    Pod,
    /// By its cgroup, within the network namespace of the host, that is of the daemon.
    Host {
        /// Folder of the cgroup.
        cgroup: PathBuf,
        /// Ports that it serves.
        ports: Vec<u16>,
    },
}

/// A workload that a predecessor enrolled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remembered {
    pub key: String,
    pub number: WorkloadNumber,
    /// Cookie of its network namespace.
    pub cookie: u64,
}

/// The programs and maps of this node. One value in one task: the single writer.
pub struct Kernel {
    config: KernelConfig,
    pins: Pins,
    shared: Shared,
    exempt: Exempt,
    origins: Origins,
    deliveries: Deliveries,
    pairs: Pairs,
    /// Of pods, as documents have them; `None`: nobody said.
    declared: Option<BTreeMap<IpAddr, WorkloadNumber>>,
    direct: Direct,
    shortcuts: Shortcuts,
    shortcut_program: ShortcutProgram,
    epoch: u64,
    workloads: BTreeMap<WorkloadNumber, Workload>,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("epoch", &self.epoch)
            .field("workloads", &self.workloads)
            .finish_non_exhaustive()
    }
}

impl Kernel {
    /// Loads and attaches what the node needs, and takes over from a predecessor: its links are swapped in place, its maps
    /// are kept. From here on this daemon is the owner (T-24), so call it when the first full snapshot is there.
    ///
    /// # Errors
    /// Names the feature where this kernel does not take a program; nothing is attached then.
    pub fn start(config: &KernelConfig) -> Result<Self, KernelError> {
        load::check_object()?;
        if config.mark == 0 {
            return Err(KernelError::Name {
                field: "mark",
                value: "0".to_owned(),
                expected: "at least one bit, such as 0x80000",
            });
        }
        let pins = Pins::prepare(config)?;
        let mut instance = load::instance(Purpose::Node, config, &pins.maps())?;
        let mut shared = Shared::open(&pins.maps(), config.sizes)?;
        // Loaded for the answer only: every namespace gets an instance of its own.
        load::load(&mut instance, names::PROGRAM_STEER)?;
        let cgroup =
            cgroup_id(&config.cgroup).map_err(KernelError::file(&config.cgroup, "using the cgroup"))?;
        let same = shared.state(STATE_CGROUP)? == cgroup;
        attach::to_cgroup(&mut instance, &config.cgroup, &pins.links(), same)?;
        shared.set_state(STATE_CGROUP, cgroup)?;
        let epoch = shared.state(STATE_EPOCH)? + 1;
        shared.set_state(STATE_EPOCH, epoch)?;
        let mut kernel = Self {
            config: config.clone(),
            exempt: Exempt::open(&pins.maps())?,
            origins: Origins::open(&pins.maps())?,
            deliveries: Deliveries::open(&pins.maps())?,
            pairs: Pairs::open(&pins.maps(), config.sizes.pairs)?,
            declared: None,
            direct: Direct::open(&pins.maps(), epoch)?,
            shortcuts: Shortcuts::open(&pins.maps())?,
            shortcut_program: None,
            pins,
            shared,
            epoch,
            workloads: BTreeMap::new(),
        };
        kernel.origins.sweep()?;
        kernel.deliveries.sweep()?;
        kernel.remember()?;
        kernel.write_local_addresses(None)?;
        Ok(kernel)
    }

    /// Workloads that a predecessor enrolled and this daemon did not steer yet: what is not declared any more is to be
    /// released.
    pub fn remembered(&self) -> Vec<Remembered> {
        self.workloads
            .iter()
            .filter(|(_, workload)| workload.kind.is_none())
            .map(|(number, workload)| Remembered {
                key: workload.key.clone(),
                number: *number,
                cookie: workload.cookie,
            })
            .collect()
    }

    /// Hands connections that arrive in the workload's namespace to `sockets`, which are in the order of
    /// [`ebpf_abi::SocketSlot::ALL`], listen, and belong to that namespace. Where a predecessor did so already the slots are swapped:
    /// no connection is lost (T-24).
    ///
    /// Routes, rules and sysctls come after this, then [`Self::capture`].
    pub fn steer(
        &mut self,
        target: &EnrolTarget<'_>,
        sockets: [BorrowedFd<'_>; 3],
    ) -> Result<WorkloadNumber, KernelError> {
        self.check_owner()?;
        check_listeners(target, sockets)?;
        let number = match self.find(target)? {
            Some(number) => number,
            None => self.next_number()?,
        };
        match &target.kind {
            WorkloadKind::Pod => self.steer_pod(number, target, sockets)?,
            WorkloadKind::Host { ports, .. } => self.steer_host(number, target, ports, sockets)?,
        }
        Ok(number)
    }

    /// Captures the workload's connects from here on; its listeners, routes and rules are in place.
    pub fn capture(&mut self, number: WorkloadNumber) -> Result<(), KernelError> {
        self.check_owner()?;
        let workload = self.workloads.get(&number).ok_or(KernelError::Unknown(number))?;
        let Some(kind) = workload.kind.clone() else {
            return Err(KernelError::Order {
                key: workload.key.clone(),
                problem: "it is to be steered first",
            });
        };
        self.shared.set_own_addresses(number, &workload.addresses)?;
        match kind {
            WorkloadKind::Pod => self.shared.capture(workload.cookie, number),
            WorkloadKind::Host { cgroup, .. } => self.attach_to_host_workload(number, &cgroup),
        }
    }

    /// Changes the addresses of the workload's namespace.
    pub fn addresses(&mut self, number: WorkloadNumber, addresses: &[IpAddr]) -> Result<(), KernelError> {
        self.check_owner()?;
        let addresses: BTreeSet<IpAddr> = addresses.iter().copied().collect();
        let workload = self.workloads.get(&number).ok_or(KernelError::Unknown(number))?;
        let is_pod = workload.cgroup == 0;
        if is_pod {
            check_addresses(addresses.len())?;
        } else {
            self.check_host_room(number, &addresses, &workload.ports)?;
        }
        // What the workload loses is nobody's before anything else knows (T-17), what it gains is its own after all do.
        let before =
            self.change_addresses(number, |present| present.intersection(&addresses).copied().collect())?;
        self.write_local_addresses(None)?;
        if let Err(error) = self.shared.set_own_addresses(number, &addresses) {
            self.change_addresses(number, |_| before)?;
            self.write_local_addresses(None)?;
            return Err(error);
        }
        self.change_addresses(number, |_| addresses)?;
        let workload = self.workloads.get(&number).ok_or(KernelError::Unknown(number))?;
        if is_pod {
            Steering::open(&workload.folder)?.set_addresses(&workload.addresses)?;
        } else {
            self.write_host()?;
        }
        self.write_local_addresses(None)
    }

    /// Changes the ports at which connections to a pod are left alone.
    pub fn exempt_ports(&mut self, number: WorkloadNumber, ports: &[u16]) -> Result<(), KernelError> {
        self.check_owner()?;
        let workload = self.workloads.get_mut(&number).ok_or(KernelError::Unknown(number))?;
        if workload.cgroup != 0 {
            return Err(KernelError::Order {
                key: workload.key.clone(),
                problem: "a host workload has inbound ports; every other port is left alone",
            });
        }
        let ports = ports.iter().copied().collect();
        Steering::open(&workload.folder)?.set_exempt_ports(&ports)?;
        workload.ports = ports;
        Ok(())
    }

    /// Changes the ports that a host workload serves.
    pub fn inbound_ports(&mut self, number: WorkloadNumber, ports: &[u16]) -> Result<(), KernelError> {
        self.check_owner()?;
        let ports: BTreeSet<u16> = ports.iter().copied().collect();
        let workload = self.workloads.get(&number).ok_or(KernelError::Unknown(number))?;
        if workload.cgroup == 0 {
            return Err(KernelError::Order {
                key: workload.key.clone(),
                problem: "a pod has exempt ports; every other port is inbound",
            });
        }
        self.check_host_room(number, &workload.addresses, &ports)?;
        let workload = self.workloads.get_mut(&number).ok_or(KernelError::Unknown(number))?;
        workload.ports = ports;
        self.write_host()
    }

    /// Stops capturing the workload's connects; those that arrive are still steered. Routes and rules go after this, then
    /// [`Self::release`].
    pub fn uncapture(&mut self, number: WorkloadNumber) -> Result<(), KernelError> {
        self.check_owner()?;
        let workload = self.workloads.get(&number).ok_or(KernelError::Unknown(number))?;
        if workload.cgroup == 0 {
            if self.shared.workload(workload.cookie)? == Some(number) {
                self.shared.uncapture(workload.cookie)?;
            }
            return Ok(());
        }
        for name in names::CGROUP_PROGRAMS.into_iter().rev() {
            pins::remove_pin(&workload.folder.join(name))?;
        }
        Ok(())
    }

    /// Ends an enrolment: nothing of it stays in the kernel. Also for remembered ones.
    ///
    /// First of all its addresses lead to nobody any more: they may be another's right after this (T-17). Direct connections that
    /// are on their way to it keep their entries, which name this enrolment and no other: whoever else answers is found out
    /// (T-13).
    pub fn release(&mut self, number: WorkloadNumber) -> Result<(), KernelError> {
        self.check_owner()?;
        self.write_local_addresses(Some(number))?;
        self.no_shortcut(number)?;
        self.uncapture(number)?;
        self.shared.set_own_addresses(number, &BTreeSet::new())?;
        let Some(workload) = self.workloads.remove(&number) else {
            return Ok(());
        };
        pins::remove(&workload.folder, &mut Report::default())?;
        if workload.cgroup == 0 {
            return Ok(());
        }
        if self.workloads.values().any(|other| other.cgroup != 0) {
            return self.write_host();
        }
        pins::remove(&self.pins.host(), &mut Report::default())
    }

    /// From here on only these addresses lead to a pod directly, each to its own, as far as its namespace holds it. A pod may give
    /// itself another one's address: without this connects to that one would leave by themselves, towards wherever it is.
    pub fn declared(&mut self, declared: BTreeMap<IpAddr, WorkloadNumber>) -> Result<(), KernelError> {
        self.check_owner()?;
        if self.declared.as_ref() == Some(&declared) {
            return Ok(());
        }
        self.declared = Some(declared);
        self.write_local_addresses(None)
    }

    /// Puts a pair table in force, completely and at once. When this returns no program uses an older one any more: what that one
    /// permitted is listed by [`Direct::connections`].
    ///
    /// The first call puts this daemon in its predecessor's place. Until then the predecessor's table is in force as long as
    /// that one lives, and none when it does not (T-15); and none as long as another schema version is pinned, whose programs
    /// capture everything.
    ///
    /// # Errors
    /// [`KernelError::Limit`] beyond [`limits::PAIRS_MAX`]. After any error an empty table is in force: nothing is direct.
    pub fn set_pairs(&mut self, table: &DirectTable) -> Result<Generation, KernelError> {
        self.check_owner()?;
        let last = self.shared.state(STATE_GENERATION)?;
        let generation = u32::try_from(last + 1).unwrap_or(1);
        self.shared.set_state(STATE_GENERATION, u64::from(generation))?;
        self.pairs.set(table, Generation(generation))?;
        if self.other_schemas()?.is_empty() {
            self.pairs.be_there()?;
        }
        Ok(Generation(generation))
    }

    /// Says what became of direct connections.
    pub fn direct(&self) -> Direct {
        self.direct.clone()
    }

    /// Exempts the daemon's own sockets from capture.
    pub fn exempt(&self) -> Exempt {
        self.exempt.clone()
    }

    /// Says who opened a connection that arrives at a listener of the host's namespace.
    pub fn origins(&self) -> Origins {
        self.origins.clone()
    }

    /// Announces deliveries inside the host's namespace.
    pub fn deliveries(&self) -> Deliveries {
        self.deliveries.clone()
    }

    /// What the programs counted since the pins were made: labels of [`DropReason`] and [`Verdict`].
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, KernelError> {
        let reasons = DropReason::ALL.into_iter().map(|reason| (reason.label(), reason.slot()));
        let verdicts = Verdict::ALL.into_iter().map(|verdict| (verdict.label(), verdict.slot()));
        reasons.chain(verdicts).map(|(label, slot)| Ok((label, self.shared.count(slot)?))).collect()
    }

    /// Whether no successor took over (T-24).
    pub fn is_owner(&self) -> Result<bool, KernelError> {
        Ok(self.shared.state(STATE_EPOCH)? == self.epoch)
    }

    /// Removes what daemons of other schema versions pinned for this node. To be called when all workloads are under this
    /// one, so that nothing is open in between (T-24).
    pub fn retire_older_schemas(&mut self) -> Result<Report, KernelError> {
        self.check_owner()?;
        let mut report = Report::default();
        for folder in self.other_schemas()? {
            pins::remove(&folder, &mut report)?;
        }
        self.pairs.be_there()?;
        Ok(report)
    }

    fn other_schemas(&self) -> Result<Vec<PathBuf>, KernelError> {
        let mut folders = pins::list(self.pins.node())?;
        folders.retain(|folder| folder != self.pins.schema());
        Ok(folders)
    }
}

/// Removes every link, map and pin of this node, of all schema versions. What was captured is not captured any more.
pub fn cleanup(config: &KernelConfig) -> Result<Report, KernelError> {
    let pins = Pins::of(config)?;
    let mut report = Report::default();
    for folder in pins::list(pins.node())? {
        pins::remove(&folder, &mut report)?;
    }
    pins::remove(pins.node(), &mut report)?;
    if let Some(nodes) = pins.node().parent() {
        pins::remove_if_empty(nodes);
    }
    Ok(report)
}
