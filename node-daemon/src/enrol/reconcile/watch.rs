//! What changes by itself: addresses, namespaces and cgroups that go or come, connections from before that end.

use std::{fs, net::IpAddr, path::Path, sync::Arc};

use ebpf_abi::WorkloadNumber;
use node_core::workload::{ObjectName, Placement, TransportMode, Workload};
use tokio::time::Instant;

use super::{Reconciler, Waiting};
use crate::{
    enrol::{
        host::{self, Cgroup},
        keeper::Told,
        place_of, unmeshed,
    },
    telemetry::Event,
};

impl Reconciler {
    /// What keepers report.
    pub(super) fn hear(&mut self, told: Told) {
        match told {
            Told::Addresses { cookie, addresses } => {
                if !self.still_owner() {
                    return;
                }
                let list: Vec<IpAddr> = addresses.iter().copied().collect();
                let numbers = self.numbers_in(cookie);
                if let Some(place) = self.places.get_mut(&cookie) {
                    place.addresses = addresses;
                }
                self.stale_shortcuts.insert(cookie);
                for number in numbers {
                    if let Err(error) = self.kernel.addresses(number, &list) {
                        self.failed("changing own addresses", &error);
                    }
                }
            }
            Told::Repaired { cookie, what } => {
                if let Some(workload) = self.tenant(cookie) {
                    self.events.emit(&Event::WorkloadRepaired { workload, what });
                }
            }
            Told::Failed { cookie, problem } => {
                let place = self.places.get(&cookie).map(|place| place_of(&place.namespace));
                let problem = format!("{}: {problem}", place.unwrap_or_default());
                self.events.emit(&Event::KernelFailed { call: "keeping routes and settings", problem });
            }
        }
    }

    pub(super) fn numbers_in(&self, cookie: u64) -> Vec<WorkloadNumber> {
        let closed = self.waiting.values().filter_map(|waiting| waiting.closed.as_ref());
        let all = self.entries.values().chain(closed);
        all.filter(|entry| entry.cookie == cookie).map(|entry| entry.number).collect()
    }

    pub(super) fn tenant(&self, cookie: u64) -> Option<ObjectName> {
        self.places.get(&cookie)?.tenants.first().cloned()
    }

    /// A namespace whose path went, or leads to another one: let go, so that the kernel can free it.
    pub(super) async fn notice_gone_namespaces(&mut self) {
        let is_gone =
            |cookie: &u64| self.places.get(cookie).is_some_and(|place| !place.namespace.is_in_place());
        let gone: Vec<ObjectName> = self
            .entries
            .iter()
            .filter(|(_, entry)| is_gone(&entry.cookie))
            .map(|(name, _)| name.clone())
            .collect();
        let closed: Vec<ObjectName> = self
            .waiting
            .iter()
            .filter(|(_, waiting)| waiting.closed.as_ref().is_some_and(|entry| is_gone(&entry.cookie)))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            let Some(entry) = self.entries.remove(&name) else { continue };
            let workload = Arc::clone(&entry.workload);
            self.let_go(entry, "namespace_gone").await;
            self.enter(workload).await;
        }
        for name in closed {
            let entry = self.waiting.get_mut(&name).and_then(|waiting| waiting.closed.take());
            if let Some(entry) = entry {
                self.let_go(entry, "namespace_gone").await;
            }
        }
    }

    /// systemd makes a unit's cgroup anew at each start: the programs are attached again. While it is away nothing of the
    /// workload runs, and what arrives for it is still steered.
    pub(super) async fn notice_gone_cgroups(&mut self) {
        let hosts: Vec<(ObjectName, Cgroup)> = self
            .entries
            .iter()
            .filter_map(|(name, entry)| Some((name.clone(), entry.cgroup.clone()?)))
            .collect();
        for (name, known) in hosts {
            let Some(entry) = self.entries.get_mut(&name) else { continue };
            let Ok(found) = host::cgroup_of(&entry.workload.placement, &self.config.cgroup_mount) else {
                continue;
            };
            if found == known {
                continue;
            }
            let workload = Arc::clone(&entry.workload);
            if found.folder != known.folder {
                self.leave(&name, "moved").await;
                self.enter(workload).await;
                continue;
            }
            let number = entry.number;
            match self.kernel.capture(number) {
                Ok(()) => entry.cgroup = Some(found),
                Err(error) => self.failed("attaching to a new cgroup", &error),
            }
        }
    }

    pub(super) async fn retry(&mut self) {
        let now = Instant::now();
        let due: Vec<Arc<Workload>> = self
            .waiting
            .values()
            .filter(|waiting| now >= waiting.next || has_appeared(waiting, &self.config.cgroup_mount))
            .map(|waiting| Arc::clone(&waiting.workload))
            .collect();
        for workload in due {
            self.enter(workload).await;
        }
    }

    /// Counts anew which connections from before still stand.
    pub(super) fn count_standing(&mut self) {
        for entry in self.entries.values_mut().filter(|entry| !entry.standing.is_empty()) {
            let Some(place) = self.places.get(&entry.cookie) else { continue };
            let before = entry.standing.len();
            match unmeshed::remaining(&place.namespace, std::mem::take(&mut entry.standing)) {
                Ok(left) => entry.standing = left,
                Err(error) => tracing::warn!(%error, "connections from before could not be counted"),
            }
            if entry.standing.len() != before {
                self.events.emit(&Event::UnmeshedConnections {
                    workload: entry.workload.name.clone(),
                    destroyed: 0,
                    remaining: entry.standing.len(),
                });
            }
        }
    }

    /// A policy that became STRICT ends the inbound connections from before, too (T-25).
    pub(super) fn end_standing_under_strict(&mut self) {
        let Some(snapshot) = self.snapshot.clone() else { return };
        for entry in self.entries.values_mut().filter(|entry| !entry.standing.is_empty()) {
            let Some(place) = self.places.get(&entry.cookie) else { continue };
            let workload = Arc::clone(&entry.workload);
            let strict = |port| snapshot.transport_mode(&workload, port) == TransportMode::Strict;
            match unmeshed::destroy(&place.namespace, std::mem::take(&mut entry.standing), strict) {
                Ok((destroyed, left)) => {
                    entry.standing = left;
                    if destroyed > 0 {
                        self.events.emit(&Event::UnmeshedConnections {
                            workload: entry.workload.name.clone(),
                            destroyed,
                            remaining: entry.standing.len(),
                        });
                    }
                }
                Err(error) => tracing::error!(%error, "connections from before could not be ended"),
            }
        }
    }
}

/// A workload that waits for its namespace or cgroup, which is there now.
fn has_appeared(waiting: &Waiting, cgroup_mount: &Path) -> bool {
    match &waiting.workload.placement {
        Placement::NetworkNamespace(path) => {
            waiting.reason == "namespace_missing" && fs::symlink_metadata(path).is_ok()
        }
        Placement::Cgroup(path) => {
            waiting.reason == "cgroup_missing" && fs::symlink_metadata(cgroup_mount.join(path)).is_ok()
        }
        Placement::SystemdUnit(_) => false,
    }
}
