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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{at, join, named, pod, snapshot, unit};

    fn table(documents: &[String]) -> KernelTable {
        KernelTable::desired(&snapshot(&join(documents)))
    }

    #[track_caller]
    fn check(current: &[String], desired: &[String], expected: &[&str]) {
        let word = |op: &MapOp| match op {
            MapOp::RemoveWorkload { name } => format!("- {}", name.name),
            MapOp::RemovePort { name, port } => format!("- {}:{port}", name.name),
            MapOp::RemoveAddress { name, address } => format!("- {} {address}", name.name),
            MapOp::AddWorkload { name, kind } => format!("+ {} {kind:?}", name.name),
            MapOp::AddAddress { name, address } => format!("+ {} {address}", name.name),
            MapOp::AddPort { name, port } => format!("+ {}:{port}", name.name),
        };
        let ops = plan(&table(current), &table(desired));
        assert_eq!(ops.iter().map(word).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn the_kernel_knows_enrolled_workloads_of_this_node_only() {
        let table = table(&[
            pod("web", "10.8.1.4", "exemptInboundPorts: [9090]\nports: [{port: 80}]"),
            pod("far", "10.8.2.4", "").replace("node-a", "node-b"),
            pod("off", "10.8.1.6", "").replace("app: off", "culvert.io/mesh: disabled"),
            unit("db", 81).replace("[{port: 81}]", "[{port: 81}, {port: 82}]\n  exemptInboundPorts: [82]"),
        ]);
        let entry = |kind, address: &str, ports: &[u16]| KernelWorkload {
            kind,
            addresses: [at(address).ip()].into(),
            ports: ports.iter().copied().collect(),
        };
        let expected = [
            (named("db"), entry(KernelKind::Host, "10.9.0.2:0", &[81])),
            (named("web"), entry(KernelKind::Pod, "10.8.1.4:0", &[9090])),
        ];
        assert_eq!(table.workloads, expected.into());
    }

    #[test]
    fn nothing_new_is_nothing_to_do() {
        let same = [pod("web", "10.8.1.4", ""), unit("db", 81)];
        check(&same, &same, &[]);
    }

    #[test]
    fn an_address_is_lost_before_it_is_gained() {
        // T-17
        let swapped = |first: &str, second: &str| [pod("a", first, ""), pod("b", second, "")];
        check(
            &swapped("10.8.1.4", "10.8.1.5"),
            &swapped("10.8.1.5", "10.8.1.4"),
            &["- a 10.8.1.4", "- b 10.8.1.5", "+ a 10.8.1.5", "+ b 10.8.1.4"],
        );
        check(&[pod("b", "10.8.1.4", "")], &[pod("a", "10.8.1.4", "")], &["- b", "+ a Pod", "+ a 10.8.1.4"]);
    }

    #[test]
    fn an_exemption_is_closed_before_another_opens() {
        let exempt = |port: u16| [pod("a", "10.8.1.4", &format!("exemptInboundPorts: [{port}]"))];
        check(&exempt(1), &exempt(2), &["- a:1", "+ a:2"]);
    }

    #[test]
    fn a_workload_that_moves_between_pod_and_host_is_enrolled_anew() {
        check(&[unit("a", 81)], &[pod("a", "10.8.1.4", "")], &["- a", "+ a Pod", "+ a 10.8.1.4"]);
    }

    fn any_table() -> impl Strategy<Value = KernelTable> {
        let address = (0..6_u8).prop_map(|last| IpAddr::from([10, 8, 0, last]));
        let kind = prop::sample::select(vec![KernelKind::Pod, KernelKind::Host]);
        let sets = (prop::collection::btree_set(address, 0..4), prop::collection::btree_set(0..5_u16, 0..4));
        let workload =
            (kind, sets).prop_map(|(kind, (addresses, ports))| KernelWorkload { kind, addresses, ports });
        let name = prop::sample::select(vec!["a", "b", "c", "d"]).prop_map(named);
        prop::collection::btree_map(name, workload, 0..5).prop_map(|workloads| KernelTable { workloads })
    }

    proptest! {
        #[test]
        fn the_plan_leads_from_current_to_desired_with_removals_first(current in any_table(), desired in any_table()) {
            let ops = plan(&current, &desired);
            let first_addition = ops.iter().position(|op| !op.is_removal()).unwrap_or(ops.len());
            prop_assert!(ops[first_addition..].iter().all(|op| !op.is_removal()));
            let mut table = current;
            for op in &ops {
                table.apply(op);
            }
            prop_assert_eq!(&table, &desired);
            prop_assert_eq!(plan(&table, &desired), []);
        }
    }
}
