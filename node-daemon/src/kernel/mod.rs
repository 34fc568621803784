//! The kernel's half, seen from the daemon: load, attach, fill maps, hand over, remove.
//!
//! What comes in: where workloads are ([`EnrolTarget`]), their listeners, their addresses. What goes out: numbers of
//! enrolments, who opened a connection ([`Origins`]), counters. The single writer of every map; aya's types stay inside.
//! Nothing here knows of identities, certificates or policy, and nothing here makes routes, rules or sysctls.
//!
//! The contract (written down before the code, kept up to date):
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
//! kernel.exempt() -> Exempt        Exempt::mark(&self, BorrowedFd)     // before connect(), on each of the daemon's sockets
//! kernel.origins() -> Origins      Origins::take(client, target) -> Option<WorkloadNumber>   // host listeners: who dialled?
//! kernel.deliveries() -> Deliveries
//!     Deliveries::announce(number, source, target) -> Result<Announced, _>  // host deliveries: after bind(), before connect();
//!                                                                      // keep the guard for the life of the connection
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

mod origins;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use ebpf_abi::{
    DropReason, PortAction, SocketSlot, SteerMeta, Verdict, WorkloadNumber,
    limits::KEY_LEN_MAX,
    names::{self, STATE_CGROUP, STATE_EPOCH, STATE_LAST_NUMBER},
};

pub use error::{KernelError, Report};
pub use origins::{Announced, Deliveries, Exempt, Origins};

use crate::sys::{cgroup::cgroup_id, namespace_cookie};
use load::Purpose;
use maps::{Shared, Steering};
use pins::Pins;

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
}

/// A workload that is to be put under capture.
#[derive(Debug)]
pub struct EnrolTarget<'a> {
    /// "<namespace>_<name>", at most [`KEY_LEN_MAX`] bytes; the same for the same workload after a restart.
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

#[derive(Debug)]
struct Workload {
    key: String,
    cookie: u64,
    folder: PathBuf,
    addresses: BTreeSet<IpAddr>,
    /// Exempt ports of a pod, inbound ports of a host workload.
    ports: BTreeSet<u16>,
    /// Id of the cgroup to which its programs are attached; 0 for a pod.
    cgroup: u64,
    /// `None` until this daemon steers it: then a predecessor enrolled it and nobody declared it yet.
    kind: Option<WorkloadKind>,
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
        let mut instance = load::instance(Purpose::Node, config.mark, &pins.maps())?;
        let mut shared = Shared::open(&pins.maps())?;
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
            pins,
            shared,
            epoch,
            workloads: BTreeMap::new(),
        };
        kernel.origins.sweep()?;
        kernel.deliveries.sweep()?;
        kernel.remember()?;
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
    /// [`SocketSlot::ALL`], listen, and belong to that namespace. Where a predecessor did so already the slots are swapped:
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
        let workload = self.workloads.get_mut(&number).ok_or(KernelError::Unknown(number))?;
        let is_pod = workload.cgroup == 0;
        if is_pod {
            Steering::open(&workload.folder)?.set_addresses(&addresses)?;
        }
        workload.addresses = addresses.clone();
        self.shared.set_own_addresses(number, &addresses)?;
        if is_pod { Ok(()) } else { self.write_host() }
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
        workload.ports = ports.iter().copied().collect();
        Steering::open(&workload.folder)?.set_ports(&workload.ports, PortAction::Exempt)
    }

    /// Changes the ports that a host workload serves.
    pub fn inbound_ports(&mut self, number: WorkloadNumber, ports: &[u16]) -> Result<(), KernelError> {
        self.check_owner()?;
        let workload = self.workloads.get_mut(&number).ok_or(KernelError::Unknown(number))?;
        if workload.cgroup == 0 {
            return Err(KernelError::Order {
                key: workload.key.clone(),
                problem: "a pod has exempt ports; every other port is inbound",
            });
        }
        workload.ports = ports.iter().copied().collect();
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
    pub fn release(&mut self, number: WorkloadNumber) -> Result<(), KernelError> {
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
    pub fn retire_older_schemas(&self) -> Result<Report, KernelError> {
        self.check_owner()?;
        let mut report = Report::default();
        for folder in pins::list(self.pins.node())?.iter().filter(|folder| *folder != self.pins.schema()) {
            pins::remove(folder, &mut report)?;
        }
        Ok(report)
    }

    fn steer_pod(
        &mut self,
        number: WorkloadNumber,
        target: &EnrolTarget<'_>,
        sockets: [BorrowedFd<'_>; 3],
    ) -> Result<(), KernelError> {
        let folder = self.folder(number, target)?;
        let addresses: BTreeSet<IpAddr> = target.addresses.iter().copied().collect();
        let ports: BTreeSet<u16> = target.exempt_ports.iter().copied().collect();
        let swap = self.workloads.contains_key(&number) && is_same_program(&folder);
        let mut instance = if swap {
            None
        } else {
            pins::make(&folder)?;
            Some(load::instance(Purpose::SteerPod { folder: &folder }, self.config.mark, &self.pins.maps())?)
        };
        let mut steering = Steering::open(&folder)?;
        steering.set_addresses(&addresses)?;
        steering.set_ports(&ports, PortAction::Exempt)?;
        steering.set_sockets(sockets)?;
        if let Some(instance) = &mut instance {
            attach::to_namespace(instance, target.netns, &folder)?;
        }
        maps::set_meta(&folder, &meta_of(number, target, 0))?;
        let workload = Workload {
            key: target.key.clone(),
            cookie: target.cookie,
            folder,
            addresses,
            ports,
            cgroup: 0,
            kind: Some(WorkloadKind::Pod),
        };
        self.shared.set_own_addresses(number, &workload.addresses)?;
        self.workloads.insert(number, workload);
        Ok(())
    }

    /// All host workloads share the instance of the host's namespace and its listeners.
    fn steer_host(
        &mut self,
        number: WorkloadNumber,
        target: &EnrolTarget<'_>,
        ports: &[u16],
        sockets: [BorrowedFd<'_>; 3],
    ) -> Result<(), KernelError> {
        let host = self.pins.host();
        if let Ok(present) = maps::meta(&host)
            && present.netns_cookie != target.cookie
        {
            if self.workloads.values().any(|other| other.cgroup != 0 && other.kind.is_some()) {
                return Err(KernelError::NotInHost {
                    key: target.key.clone(),
                    expected: present.netns_cookie,
                    found: target.cookie,
                });
            }
            // The daemon runs in another namespace than its predecessor.
            pins::remove(&host, &mut Report::default())?;
        }
        let folder = self.folder(number, target)?;
        let attached = self.workloads.get(&number).map_or(0, |workload| workload.cgroup);
        let wanted: BTreeSet<u16> = ports.iter().copied().collect();
        let mut instance = if is_same_program(&host) {
            None
        } else {
            pins::make(&host)?;
            Some(load::instance(Purpose::SteerHost { folder: &host }, self.config.mark, &self.pins.maps())?)
        };
        let mut steering = Steering::open(&host)?;
        steering.add_ports(&wanted, PortAction::Inbound)?;
        steering.set_sockets(sockets)?;
        if let Some(instance) = &mut instance {
            attach::to_namespace(instance, target.netns, &host)?;
        }
        maps::set_meta(&host, &meta_of(WorkloadNumber::NONE, target, 0))?;
        pins::make(&folder)?;
        self.make_meta(number, &folder)?;
        // An id that no cgroup has says "a host workload, attached to nothing yet".
        let cgroup = if attached == 0 { CGROUP_NONE } else { attached };
        maps::set_meta(&folder, &meta_of(number, target, cgroup))?;
        let workload = Workload {
            key: target.key.clone(),
            cookie: target.cookie,
            folder,
            addresses: target.addresses.iter().copied().collect(),
            ports: wanted,
            cgroup,
            kind: Some(target.kind.clone()),
        };
        self.shared.set_own_addresses(number, &workload.addresses)?;
        self.workloads.insert(number, workload);
        self.write_host()
    }

    /// Pins the one map of its own that a host workload has.
    fn make_meta(&self, number: WorkloadNumber, folder: &Path) -> Result<(), KernelError> {
        if maps::meta(folder).is_ok() {
            return Ok(());
        }
        let purpose = Purpose::HostWorkload { number, netns_cookie: 0 };
        let mut instance = load::instance(purpose, self.config.mark, &self.pins.maps())?;
        maps::pin(&mut instance, names::MAP_STEER_META, folder)
    }

    fn attach_to_host_workload(&mut self, number: WorkloadNumber, cgroup: &Path) -> Result<(), KernelError> {
        let workload = self.workloads.get_mut(&number).ok_or(KernelError::Unknown(number))?;
        let id = cgroup_id(cgroup).map_err(KernelError::file(cgroup, "using the cgroup"))?;
        let purpose = Purpose::HostWorkload { number, netns_cookie: workload.cookie };
        let mut instance = load::instance(purpose, self.config.mark, &self.pins.maps())?;
        attach::to_cgroup(&mut instance, cgroup, &workload.folder, workload.cgroup == id)?;
        let mut meta = maps::meta(&workload.folder)?;
        meta.cgroup = id;
        maps::set_meta(&workload.folder, &meta)?;
        workload.cgroup = id;
        Ok(())
    }

    /// Addresses of the host and ports of all host workloads. While some of a predecessor are not steered yet, theirs are kept: closed.
    fn write_host(&self) -> Result<(), KernelError> {
        let hosts = || self.workloads.values().filter(|workload| workload.cgroup != 0);
        let ports: BTreeSet<u16> = hosts().flat_map(|workload| workload.ports.iter().copied()).collect();
        if !self.pins.host().join(names::MAP_STEER_PORTS).exists() {
            // A predecessor crashed between a host workload and the instance of the host.
            return Ok(());
        }
        let mut steering = Steering::open(&self.pins.host())?;
        let addresses: BTreeSet<IpAddr> =
            hosts().flat_map(|workload| workload.addresses.iter().copied()).collect();
        steering.set_addresses(&addresses)?;
        if hosts().any(|workload| workload.kind.is_none()) {
            return steering.add_ports(&ports, PortAction::Inbound);
        }
        steering.set_ports(&ports, PortAction::Inbound)
    }

    /// The enrolment that a target continues, if there is one. Another enrolment of the same workload, or a forgotten one of
    /// the same namespace, ends here.
    fn find(&mut self, target: &EnrolTarget<'_>) -> Result<Option<WorkloadNumber>, KernelError> {
        let is_pod = target.kind == WorkloadKind::Pod;
        let mut continued = None;
        let mut ended = Vec::new();
        for (number, workload) in &self.workloads {
            let same_kind = is_pod == (workload.cgroup == 0);
            if workload.key == target.key && workload.cookie == target.cookie && same_kind {
                continued = Some(*number);
            } else if workload.key == target.key {
                ended.push(*number);
            } else if is_pod && workload.cgroup == 0 && workload.cookie == target.cookie {
                if workload.kind.is_some() {
                    return Err(KernelError::NamespaceTaken {
                        key: target.key.clone(),
                        cookie: target.cookie,
                        holder: workload.key.clone(),
                    });
                }
                ended.push(*number);
            }
        }
        for number in ended {
            self.release(number)?;
        }
        Ok(continued)
    }

    /// Where an enrolment is pinned; a new one finds nothing there.
    fn folder(&self, number: WorkloadNumber, target: &EnrolTarget<'_>) -> Result<PathBuf, KernelError> {
        if let Some(workload) = self.workloads.get(&number) {
            return Ok(workload.folder.clone());
        }
        let folder = self.pins.workload(&target.key)?;
        pins::remove(&folder, &mut Report::default())?;
        Ok(folder)
    }

    fn next_number(&mut self) -> Result<WorkloadNumber, KernelError> {
        let last = self.shared.state(STATE_LAST_NUMBER)?;
        let next = u32::try_from(last + 1).unwrap_or(1);
        self.shared.set_state(STATE_LAST_NUMBER, u64::from(next))?;
        Ok(WorkloadNumber(next))
    }

    /// Reads back what is pinned. What is not complete goes: a predecessor crashed while it made or removed it.
    fn remember(&mut self) -> Result<(), KernelError> {
        for folder in pins::list(&self.pins.workloads())? {
            let Some((key, meta)) = maps::meta(&folder).ok().and_then(|meta| Some((key_of(&meta)?, meta)))
            else {
                pins::remove(&folder, &mut Report::default())?;
                continue;
            };
            let workload = Workload {
                key,
                cookie: meta.netns_cookie,
                folder,
                addresses: BTreeSet::new(),
                ports: BTreeSet::new(),
                cgroup: meta.cgroup,
                kind: None,
            };
            self.workloads.insert(meta.number, workload);
        }
        Ok(())
    }

    fn check_owner(&self) -> Result<(), KernelError> {
        let current = self.shared.state(STATE_EPOCH)?;
        if current != self.epoch {
            return Err(KernelError::NotOwner { ours: self.epoch, current });
        }
        Ok(())
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

/// The kernel takes a listener of any namespace, and then shakes hands in the wrong one: clients would time out.
fn check_listeners(target: &EnrolTarget<'_>, sockets: [BorrowedFd<'_>; 3]) -> Result<(), KernelError> {
    for (slot, socket) in SocketSlot::ALL.into_iter().zip(sockets) {
        let found = namespace_cookie(socket).map_err(KernelError::file(
            format!("{slot:?} listener of {}", target.key),
            "reading its namespace",
        ))?;
        if found != target.cookie {
            let key = target.key.clone();
            return Err(KernelError::ForeignListener { key, slot, expected: target.cookie, found });
        }
    }
    Ok(())
}

/// Whether a folder holds a complete instance whose program is the one of this build.
fn is_same_program(folder: &Path) -> bool {
    folder.join(names::PROGRAM_STEER).exists()
        && maps::meta(folder).is_ok_and(|meta| meta.object == load::object_hash())
}

fn meta_of(number: WorkloadNumber, target: &EnrolTarget<'_>, cgroup: u64) -> SteerMeta {
    let mut key = [0; KEY_LEN_MAX];
    let mut key_len = 0;
    for (place, byte) in key.iter_mut().zip(target.key.bytes()) {
        *place = byte;
        key_len += 1;
    }
    SteerMeta { netns_cookie: target.cookie, object: load::object_hash(), cgroup, number, key_len, key }
}

/// The key in an entry that was written completely.
fn key_of(meta: &SteerMeta) -> Option<String> {
    let key = meta.key.get(..usize::try_from(meta.key_len).ok()?)?;
    let key = String::from_utf8(key.to_vec()).ok()?;
    (!key.is_empty() && meta.number != WorkloadNumber::NONE).then_some(key)
}

/// No cgroup has this id.
const CGROUP_NONE: u64 = u64::MAX;
