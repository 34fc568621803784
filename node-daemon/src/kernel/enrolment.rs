//! One workload's instance: found again, made, filled, attached, and read back after a restart.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use ebpf_abi::{
    SocketSlot, SteerMeta, WorkloadNumber,
    limits::KEY_LEN_MAX,
    names::{self, STATE_EPOCH, STATE_LAST_NUMBER},
};

use super::{
    EnrolTarget, Kernel, KernelError, Report, WorkloadKind, attach, direct,
    load::{self, Purpose},
    maps::{self, Steering},
    pins,
};
use crate::sys::{cgroup::cgroup_id, namespace_cookie};

/// An enrolment.
#[derive(Debug)]
pub(super) struct Workload {
    pub(super) key: String,
    pub(super) cookie: u64,
    pub(super) folder: PathBuf,
    pub(super) addresses: BTreeSet<IpAddr>,
    /// Exempt ports of a pod, inbound ports of a host workload.
    pub(super) ports: BTreeSet<u16>,
    /// Id of the cgroup to which its programs are attached; 0 for a pod.
    pub(super) cgroup: u64,
    /// `None` until this daemon steers it: then a predecessor enrolled it and nobody declared it yet.
    pub(super) kind: Option<WorkloadKind>,
}

impl Kernel {
    pub(super) fn steer_pod(
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
            let purpose = Purpose::SteerPod { number, folder: &folder };
            Some(load::instance(purpose, &self.config, &self.pins.maps())?)
        };
        let mut steering = Steering::open(&folder)?;
        steering.set_addresses(&addresses)?;
        steering.set_exempt_ports(&ports)?;
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
        self.write_local_addresses(None)
    }

    /// All host workloads share the instance of the host's namespace and its listeners.
    pub(super) fn steer_host(
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
        self.check_host_room(number, &target.addresses.iter().copied().collect(), &wanted)?;
        let mut instance = if is_same_program(&host) {
            None
        } else {
            pins::make(&host)?;
            Some(load::instance(Purpose::SteerHost { folder: &host }, &self.config, &self.pins.maps())?)
        };
        let mut steering = Steering::open(&host)?;
        steering.add_inbound_ports(&wanted.iter().map(|port| (*port, number)).collect())?;
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
        self.write_host()?;
        self.write_local_addresses(None)
    }

    /// Says which addresses lead to which pod, for connects of the others; those of `leaving` lead to nobody.
    pub(super) fn write_local_addresses(
        &mut self,
        leaving: Option<WorkloadNumber>,
    ) -> Result<(), KernelError> {
        let staying = self.workloads.iter().filter(|(number, _)| Some(**number) != leaving);
        let mut owners =
            direct::owners(staying.map(|(number, workload)| {
                (*number, workload.cookie, workload.cgroup == 0, &workload.addresses)
            }));
        if let Some(declared) = &self.declared {
            owners.retain(|address, owner| declared.get(address) == Some(owner));
        }
        self.pairs.set_local_addresses(&owners)
    }

    /// Changes the addresses that a workload is known to have, and returns what it had.
    pub(super) fn change_addresses(
        &mut self,
        number: WorkloadNumber,
        change: impl FnOnce(&BTreeSet<IpAddr>) -> BTreeSet<IpAddr>,
    ) -> Result<BTreeSet<IpAddr>, KernelError> {
        let workload = self.workloads.get_mut(&number).ok_or(KernelError::Unknown(number))?;
        let changed = change(&workload.addresses);
        Ok(std::mem::replace(&mut workload.addresses, changed))
    }

    /// Whether the addresses and ports of all host workloads fit, with these of one of them. Asked before anything is changed:
    /// one that wants too many hinders no other.
    pub(super) fn check_host_room(
        &self,
        number: WorkloadNumber,
        addresses: &BTreeSet<IpAddr>,
        ports: &BTreeSet<u16>,
    ) -> Result<(), KernelError> {
        let others =
            || self.workloads.iter().filter(|(other, workload)| **other != number && workload.cgroup != 0);
        let addresses: BTreeSet<_> =
            addresses.iter().chain(others().flat_map(|(_, other)| &other.addresses)).collect();
        let ports: BTreeSet<_> = ports.iter().chain(others().flat_map(|(_, other)| &other.ports)).collect();
        maps::check_addresses(addresses.len())?;
        maps::check_ports(ports.len())
    }

    /// Pins the one map of its own that a host workload has.
    pub(super) fn make_meta(&self, number: WorkloadNumber, folder: &Path) -> Result<(), KernelError> {
        if maps::meta(folder).is_ok() {
            return Ok(());
        }
        let host = self.pins.host();
        let purpose = Purpose::HostWorkload { number, netns_cookie: 0, host: &host };
        let mut instance = load::instance(purpose, &self.config, &self.pins.maps())?;
        maps::pin(&mut instance, names::MAP_STEER_META, folder)
    }

    pub(super) fn attach_to_host_workload(
        &mut self,
        number: WorkloadNumber,
        cgroup: &Path,
    ) -> Result<(), KernelError> {
        let workload = self.workloads.get_mut(&number).ok_or(KernelError::Unknown(number))?;
        let id = cgroup_id(cgroup).map_err(KernelError::file(cgroup, "using the cgroup"))?;
        let host = self.pins.host();
        let purpose = Purpose::HostWorkload { number, netns_cookie: workload.cookie, host: &host };
        let mut instance = load::instance(purpose, &self.config, &self.pins.maps())?;
        attach::to_cgroup(&mut instance, cgroup, &workload.folder, workload.cgroup == id)?;
        let mut meta = maps::meta(&workload.folder)?;
        meta.cgroup = id;
        maps::set_meta(&workload.folder, &meta)?;
        workload.cgroup = id;
        Ok(())
    }

    /// Addresses of the host and ports of all host workloads. While some of a predecessor are not steered yet, theirs are kept: closed.
    pub(super) fn write_host(&self) -> Result<(), KernelError> {
        let hosts = || self.workloads.values().filter(|workload| workload.cgroup != 0);
        let ports = owners(self.workloads.iter().filter(|(_, workload)| workload.cgroup != 0));
        if !self.pins.host().join(names::MAP_STEER_PORTS).exists() {
            // A predecessor crashed between a host workload and the instance of the host.
            return Ok(());
        }
        let mut steering = Steering::open(&self.pins.host())?;
        let addresses: BTreeSet<IpAddr> =
            hosts().flat_map(|workload| workload.addresses.iter().copied()).collect();
        steering.set_addresses(&addresses)?;
        if hosts().any(|workload| workload.kind.is_none()) {
            return steering.add_inbound_ports(&ports);
        }
        steering.set_inbound_ports(&ports)
    }

    /// The enrolment that a target continues, if there is one. Another enrolment of the same workload, or a forgotten one of
    /// the same namespace, ends here.
    pub(super) fn find(&mut self, target: &EnrolTarget<'_>) -> Result<Option<WorkloadNumber>, KernelError> {
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
    pub(super) fn folder(
        &self,
        number: WorkloadNumber,
        target: &EnrolTarget<'_>,
    ) -> Result<PathBuf, KernelError> {
        if let Some(workload) = self.workloads.get(&number) {
            return Ok(workload.folder.clone());
        }
        let folder = self.pins.workload(&target.key)?;
        pins::remove(&folder, &mut Report::default())?;
        Ok(folder)
    }

    pub(super) fn next_number(&mut self) -> Result<WorkloadNumber, KernelError> {
        let last = self.shared.state(STATE_LAST_NUMBER)?;
        let next = u32::try_from(last + 1).unwrap_or(1);
        self.shared.set_state(STATE_LAST_NUMBER, u64::from(next))?;
        Ok(WorkloadNumber(next))
    }

    /// Reads back what is pinned. What is not complete goes: a predecessor crashed while it made or removed it.
    pub(super) fn remember(&mut self) -> Result<(), KernelError> {
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
                addresses: self.shared.own_addresses(meta.number)?,
                ports: BTreeSet::new(),
                cgroup: meta.cgroup,
                kind: None,
            };
            self.workloads.insert(meta.number, workload);
        }
        Ok(())
    }

    pub(super) fn check_owner(&self) -> Result<(), KernelError> {
        let current = self.shared.state(STATE_EPOCH)?;
        if current != self.epoch {
            return Err(KernelError::NotOwner { ours: self.epoch, current });
        }
        Ok(())
    }
}

/// Ports of host workloads, each with the one that declares it. Where two do, at different addresses of the host, nobody can
/// tell which of them listens at loopback: the port is nobody's own.
fn owners<'a>(
    hosts: impl Iterator<Item = (&'a WorkloadNumber, &'a Workload)>,
) -> BTreeMap<u16, WorkloadNumber> {
    let mut owners = BTreeMap::new();
    for (number, workload) in hosts {
        for port in &workload.ports {
            owners.entry(*port).and_modify(|owner| *owner = WorkloadNumber::NONE).or_insert(*number);
        }
    }
    owners
}

/// The kernel takes a listener of any namespace, and then shakes hands in the wrong one: clients would time out.
pub(super) fn check_listeners(
    target: &EnrolTarget<'_>,
    sockets: [BorrowedFd<'_>; 3],
) -> Result<(), KernelError> {
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
