//! What the kernel must know of this node's workloads, and the steps from what it knows to that.
//!
//! Pure difference; the shell applies it in order. Removals come first, so that a workload that lost an address has
//! lost it before another gains it (T-17), and a port that lost its exemption is closed before anything opens.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::{
    snapshot::Snapshot,
    workload::{ObjectName, Workload},
};

/// What the kernel knows, or should know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelTable {
    pub workloads: BTreeMap<ObjectName, KernelWorkload>,
}

/// One workload in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelWorkload {
    pub kind: KernelKind,
    /// Own addresses: connections to them are never captured on their way out.
    pub addresses: BTreeSet<IpAddr>,
    /// Pods: inbound ports that are left alone. Hosts: inbound ports that are handed to the daemon.
    pub ports: BTreeSet<u16>,
}

/// How the kernel tells that a socket is this workload's. Changing it is a new enrolment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelKind {
    /// By its network namespace.
    Pod,
    /// By its cgroup.
    Host,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapOp {
    /// With everything that belongs to it.
    RemoveWorkload {
        name: ObjectName,
    },
    RemovePort {
        name: ObjectName,
        port: u16,
    },
    RemoveAddress {
        name: ObjectName,
        address: IpAddr,
    },
    /// Without addresses and ports, which follow.
    AddWorkload {
        name: ObjectName,
        kind: KernelKind,
    },
    AddAddress {
        name: ObjectName,
        address: IpAddr,
    },
    AddPort {
        name: ObjectName,
        port: u16,
    },
}

impl MapOp {
    fn is_removal(&self) -> bool {
        match self {
            Self::RemoveWorkload { .. } | Self::RemovePort { .. } | Self::RemoveAddress { .. } => true,
            Self::AddWorkload { .. } | Self::AddAddress { .. } | Self::AddPort { .. } => false,
        }
    }
}

impl KernelTable {
    /// What the kernel of the snapshot's node should know: its enrolled workloads.
    pub fn desired(snapshot: &Snapshot) -> Self {
        let entry = |workload: &Workload| (workload.name.clone(), KernelWorkload::of(workload));
        Self { workloads: snapshot.local().map(|workload| entry(workload)).collect() }
    }

    /// Takes one step. A step for a workload that is not there changes nothing.
    pub fn apply(&mut self, op: &MapOp) {
        match op {
            MapOp::RemoveWorkload { name } => {
                self.workloads.remove(name);
            }
            MapOp::AddWorkload { name, kind } => {
                let empty =
                    KernelWorkload { kind: *kind, addresses: BTreeSet::new(), ports: BTreeSet::new() };
                self.workloads.insert(name.clone(), empty);
            }
            MapOp::RemovePort { name, port } => {
                self.change(name, |workload| workload.ports.remove(port));
            }
            MapOp::AddPort { name, port } => {
                self.change(name, |workload| workload.ports.insert(*port));
            }
            MapOp::RemoveAddress { name, address } => {
                self.change(name, |workload| workload.addresses.remove(address));
            }
            MapOp::AddAddress { name, address } => {
                self.change(name, |workload| workload.addresses.insert(*address));
            }
        }
    }

    fn change(&mut self, name: &ObjectName, what: impl FnOnce(&mut KernelWorkload) -> bool) {
        if let Some(workload) = self.workloads.get_mut(name) {
            what(workload);
        }
    }
}

impl KernelWorkload {
    pub fn of(workload: &Workload) -> Self {
        let (kind, ports) = if workload.is_host() {
            let declared = workload.ports.iter().map(|port| port.port);
            let exempt = |port: &u16| workload.exempt_inbound_ports.contains(port);
            (KernelKind::Host, declared.filter(|port| !exempt(port)).collect())
        } else {
            (KernelKind::Pod, workload.exempt_inbound_ports.iter().copied().collect())
        };
        Self { kind, addresses: workload.addresses.iter().copied().collect(), ports }
    }
}

/// Lists what turns `current` into `desired`, removals first.
pub fn plan(current: &KernelTable, desired: &KernelTable) -> Vec<MapOp> {
    let mut ops = Vec::new();
    for (name, old) in &current.workloads {
        match desired.workloads.get(name) {
            Some(new) if new.kind == old.kind => change(name, old, new, &mut ops),
            Some(_) | None => ops.push(MapOp::RemoveWorkload { name: name.clone() }),
        }
    }
    for (name, new) in &desired.workloads {
        if current.workloads.get(name).is_none_or(|old| old.kind != new.kind) {
            add(name, new, &mut ops);
        }
    }
    let (mut removals, additions): (Vec<_>, Vec<_>) = ops.into_iter().partition(MapOp::is_removal);
    removals.extend(additions);
    removals
}

fn change(name: &ObjectName, old: &KernelWorkload, new: &KernelWorkload, ops: &mut Vec<MapOp>) {
    let name = || name.clone();
    ops.extend(old.ports.difference(&new.ports).map(|port| MapOp::RemovePort { name: name(), port: *port }));
    ops.extend(
        old.addresses
            .difference(&new.addresses)
            .map(|address| MapOp::RemoveAddress { name: name(), address: *address }),
    );
    ops.extend(
        new.addresses
            .difference(&old.addresses)
            .map(|address| MapOp::AddAddress { name: name(), address: *address }),
    );
    ops.extend(new.ports.difference(&old.ports).map(|port| MapOp::AddPort { name: name(), port: *port }));
}

fn add(name: &ObjectName, new: &KernelWorkload, ops: &mut Vec<MapOp>) {
    ops.push(MapOp::AddWorkload { name: name.clone(), kind: new.kind });
    ops.extend(
        new.addresses.iter().map(|address| MapOp::AddAddress { name: name.clone(), address: *address }),
    );
    ops.extend(new.ports.iter().map(|port| MapOp::AddPort { name: name.clone(), port: *port }));
}
