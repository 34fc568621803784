//! Into the mesh: namespace, addresses, listeners, steering, settings, rules and routes, connections from before, capture.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use ebpf_abi::WorkloadNumber;
use node_core::{
    kernel_plan::KernelWorkload,
    workload::{ObjectName, Placement, TransportMode, Workload},
};
use tokio::time::Instant;

use super::{Entry, RETRY_FIRST, RETRY_MAX, Reconciler, Waiting};
use crate::{
    datapath::{Arrival, Change},
    enrol::{
        Refusal,
        ground::{HostGround, PodGround},
        host, place_of,
        plan::key,
        unmeshed,
    },
    kernel::{EnrolTarget, WorkloadKind},
    net::{Listeners, open_listeners},
    sys::Namespace,
    telemetry::Event,
};

/// The name under which the data path knows the host's listeners, which all host workloads share. No document can have it: names
/// of objects have no `@`.
pub(super) fn host_site() -> ObjectName {
    ObjectName::new("", "@host")
}

impl Reconciler {
    /// Enrols a workload, or says why not.
    pub(super) async fn enter(&mut self, workload: Arc<Workload>) {
        let name = workload.name.clone();
        let before = self.waiting.remove(&name);
        let closed = before.as_ref().is_some_and(|waiting| waiting.closed.is_some());
        let outcome = match &workload.placement {
            Placement::NetworkNamespace(path) => self.enter_pod(&workload, path).await,
            Placement::Cgroup(_) | Placement::SystemdUnit(_) => self.enter_host(&workload).await,
        };
        match outcome {
            Ok(entry) => {
                let former = before.and_then(|waiting| waiting.closed);
                if let Some(former) = former.filter(|former| former.cookie != entry.cookie) {
                    // It is enrolled elsewhere now; of the place before nothing stays. The kernel's half let go of it itself.
                    self.close_place(former.cookie, &name).await;
                }
                self.events.emit(&Event::WorkloadEnrolled {
                    workload: name.clone(),
                    identity: workload.identity.clone(),
                });
                self.ledger.learn(entry.number, &workload);
                self.are_pairs_stale = true;
                self.entries.insert(name, entry);
            }
            Err(refusal) => {
                let (reason, problem) = (refusal.label(), refusal.to_string());
                let known = before.as_ref().is_some_and(|before| before.problem == problem);
                if !known {
                    self.events.emit(&Event::WorkloadRefused {
                        workload: name.clone(),
                        reason,
                        problem: problem.clone(),
                    });
                }
                let same = before.as_ref().filter(|before| closed || before.workload == workload);
                let pause = pause_after(same.map(|before| before.pause));
                let closed = before.and_then(|waiting| waiting.closed);
                let next = Instant::now() + pause;
                self.waiting.insert(name, Waiting { workload, reason, problem, pause, next, closed });
            }
        }
    }

    async fn enter_pod(&mut self, workload: &Arc<Workload>, path: &Path) -> Result<Entry, Refusal> {
        let namespace = Namespace::open(path)?;
        let cookie = namespace.cookie();
        if cookie == self.host.cookie() {
            return Err(Refusal::HostNamespace { path: path.to_owned() });
        }
        if let Some(holder) = self
            .places
            .get(&cookie)
            .and_then(|place| place.tenants.iter().find(|tenant| **tenant != workload.name))
        {
            return Err(Refusal::NamespaceTaken { path: path.to_owned(), holder: holder.clone() });
        }
        let addresses = held_addresses(&namespace, workload)?;
        let listeners = open_listeners(&namespace, &self.exempt)
            .map_err(|source| Refusal::Call { call: "opening listeners", source })?;
        let exempt = KernelWorkload::of(workload).ports;
        let target = EnrolTarget {
            key: key(&workload.name),
            netns: namespace.as_fd(),
            cookie,
            addresses: addresses.iter().copied().collect(),
            exempt_ports: exempt.iter().copied().collect(),
            kind: WorkloadKind::Pod,
        };
        let continues = self.continues(&target);
        let number = self.kernel.steer(&target, listeners.by_slot())?;
        let scope = Scope { ports: None, exempt, cgroups: None };
        let namespace = Arc::new(namespace);
        let standing = self.close_in(workload, &namespace, number, continues, &addresses, &scope).await?;
        let pod = (&workload.name, number);
        let grounds = (&*namespace, &*self.host);
        self.shortcut.give(&mut self.kernel, pod, grounds, &workload.addresses).await;
        let ground = Arc::new(PodGround {
            namespace: Arc::clone(&namespace),
            exempt: Arc::clone(&self.exempt),
            mark: self.config.mark,
        });
        let arrival = Arrival { name: workload.name.clone(), is_host: false, listeners, ground };
        self.publish(Change::Enrolled(arrival)).await;
        Ok(Entry {
            workload: Arc::clone(workload),
            number,
            cookie,
            place: path.to_owned(),
            cgroup: None,
            since: SystemTime::now(),
            standing,
        })
    }

    async fn enter_host(&mut self, workload: &Arc<Workload>) -> Result<Entry, Refusal> {
        let cgroup = host::cgroup_of(&workload.placement, &self.config.cgroup_mount)?;
        let others = self.entries.values().filter(|entry| entry.workload.name != workload.name);
        for (other, folder) in others.filter_map(|entry| Some((entry, &entry.cgroup.as_ref()?.folder))) {
            if host::overlap(folder, &cgroup.folder) {
                return Err(Refusal::CgroupOverlaps {
                    path: cgroup.folder,
                    other: other.workload.name.clone(),
                    other_path: folder.clone(),
                });
            }
        }
        let namespace = Arc::clone(&self.host);
        let addresses = held_addresses(&namespace, workload)?;
        let opening = |source| Refusal::Call { call: "opening listeners", source };
        let fresh = match &self.host_listeners {
            Some(_) => None,
            None => Some(open_listeners(&namespace, &self.exempt).map_err(opening)?),
        };
        let Some(listeners) = fresh.as_ref().or(self.host_listeners.as_ref()) else {
            return Err(opening(std::io::ErrorKind::NotFound.into()));
        };
        let ports = KernelWorkload::of(workload).ports;
        let target = EnrolTarget {
            key: key(&workload.name),
            netns: namespace.as_fd(),
            cookie: namespace.cookie(),
            addresses: addresses.iter().copied().collect(),
            exempt_ports: Vec::new(),
            kind: WorkloadKind::Host {
                cgroup: cgroup.folder.clone(),
                ports: ports.iter().copied().collect(),
            },
        };
        let continues = self.continues(&target);
        let number = self.kernel.steer(&target, listeners.by_slot())?;
        let arrival = match fresh {
            None => None,
            Some(listeners) => {
                let copy = copy_of(&listeners).map_err(opening);
                self.host_listeners = Some(listeners);
                Some(copy?)
            }
        };
        self.numbers.insert(workload.name.clone(), number);
        let scope =
            Scope { ports: Some(ports), exempt: BTreeSet::new(), cgroups: Some(cgroup.folder.clone()) };
        let standing = self.close_in(workload, &namespace, number, continues, &addresses, &scope).await;
        if let Some(listeners) = arrival {
            // Also after a refusal: others of the host come later, and the listeners are there now.
            self.publish(Change::Enrolled(self.host_arrival(listeners))).await;
        }
        let standing = standing.inspect_err(|_| self.numbers.remove(&workload.name))?;
        Ok(Entry {
            workload: Arc::clone(workload),
            number,
            cookie: namespace.cookie(),
            place: cgroup.folder.clone(),
            cgroup: Some(cgroup),
            since: SystemTime::now(),
            standing,
        })
    }

    fn host_arrival(&self, listeners: Listeners) -> Arrival {
        let pod = PodGround {
            namespace: Arc::clone(&self.host),
            exempt: Arc::clone(&self.exempt),
            mark: self.config.mark,
        };
        let ground = HostGround {
            pod,
            numbers: Arc::clone(&self.numbers),
            origins: self.kernel.origins(),
            deliveries: self.kernel.deliveries(),
        };
        Arrival { name: host_site(), is_host: true, listeners, ground: Arc::new(ground) }
    }

    /// Whether a predecessor, or this daemon before, has this very enrolment under way: then its connections are not from before.
    fn continues(&self, target: &EnrolTarget<'_>) -> bool {
        let remembered = self.kernel.remembered();
        let by_predecessor = remembered.iter().any(|r| r.key == target.key && r.cookie == target.cookie);
        let by_us = self
            .places
            .get(&target.cookie)
            .is_some_and(|place| place.tenants.iter().any(|tenant| key(tenant) == target.key));
        by_predecessor || by_us
    }

    /// From steered to captured: settings, rules and routes, connections from before, the connect hook. After a failure a new
    /// enrolment is undone; one that continues stays as it is, closed.
    async fn close_in(
        &mut self,
        workload: &Arc<Workload>,
        namespace: &Arc<Namespace>,
        number: WorkloadNumber,
        continues: bool,
        own: &BTreeSet<IpAddr>,
        scope: &Scope,
    ) -> Result<Vec<unmeshed::Standing>, Refusal> {
        let outcome = self.try_close_in(workload, namespace, number, continues, own, scope).await;
        if outcome.is_err() && !continues {
            self.undo(&workload.name, namespace.cookie(), number).await;
        }
        outcome
    }

    async fn try_close_in(
        &mut self,
        workload: &Arc<Workload>,
        namespace: &Arc<Namespace>,
        number: WorkloadNumber,
        continues: bool,
        own: &BTreeSet<IpAddr>,
        scope: &Scope,
    ) -> Result<Vec<unmeshed::Standing>, Refusal> {
        self.open_place(workload, namespace, own).await?;
        if continues {
            self.kernel.capture(number)?;
            return Ok(Vec::new());
        }
        let before = self.standing(namespace, own, scope)?;
        self.kernel.capture(number)?;
        let (destroyed, left) = self.end_inbound(workload, namespace, before)?;
        // A handshake that was under way when the listeners came may have been finished meanwhile by the application.
        let (late, _) = match scope.cgroups {
            None => self.end_inbound(workload, namespace, self.standing(namespace, own, scope)?)?,
            Some(_) => (0, Vec::new()),
        };
        let destroyed = destroyed + late;
        if destroyed > 0 || !left.is_empty() {
            self.events.emit(&Event::UnmeshedConnections {
                workload: workload.name.clone(),
                destroyed,
                remaining: left.len(),
            });
        }
        Ok(left)
    }

    fn standing(
        &self,
        namespace: &Namespace,
        own: &BTreeSet<IpAddr>,
        scope: &Scope,
    ) -> Result<Vec<unmeshed::Standing>, Refusal> {
        let cgroups = scope.cgroups.as_deref().map(host::ids_beneath);
        let scope = unmeshed::Scope {
            own,
            ports: scope.ports.as_ref(),
            exempt: &scope.exempt,
            cgroups: cgroups.as_ref(),
        };
        unmeshed::list(namespace, &scope)
            .map_err(|source| Refusal::Call { call: "listing standing connections", source })
    }

    fn end_inbound(
        &self,
        workload: &Workload,
        namespace: &Namespace,
        standing: Vec<unmeshed::Standing>,
    ) -> Result<(usize, Vec<unmeshed::Standing>), Refusal> {
        let strict = |port| {
            self.snapshot
                .as_ref()
                .is_some_and(|snapshot| snapshot.transport_mode(workload, port) == TransportMode::Strict)
        };
        unmeshed::destroy(namespace, standing, strict)
            .map_err(|source| Refusal::Call { call: "ending standing connections (T-25)", source })
    }
}

/// Which connections of a namespace are a workload's.
struct Scope {
    ports: Option<BTreeSet<u16>>,
    exempt: BTreeSet<u16>,
    /// The folder of a host workload's cgroup.
    cgroups: Option<PathBuf>,
}

/// The namespace's own addresses, loopback left out, if the workload's are among them. A namespace without them is not that
/// workload's, whoever says so.
pub(super) fn held_addresses(
    namespace: &Namespace,
    workload: &Workload,
) -> Result<BTreeSet<IpAddr>, Refusal> {
    let mut addresses =
        namespace.addresses().map_err(|source| Refusal::Call { call: "listing addresses", source })?;
    if let Some(missing) = workload.addresses.iter().find(|address| !addresses.contains(address)) {
        return Err(Refusal::AddressMissing { place: place_of(namespace), address: *missing });
    }
    addresses.retain(|address| !address.is_loopback());
    Ok(addresses)
}

/// How long a workload waits after a refusal; `before` is how long it waited for this one.
pub(super) fn pause_after(before: Option<Duration>) -> Duration {
    before.map_or(RETRY_FIRST, |before| (before * 2).min(RETRY_MAX))
}

fn copy_of(listeners: &Listeners) -> std::io::Result<Listeners> {
    Ok(Listeners {
        outbound: listeners.outbound.try_clone()?,
        inbound: listeners.inbound.try_clone()?,
        tunnel: listeners.tunnel.try_clone()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_between_two_tries_doubles_up_to_its_limit() {
        let mut pauses = vec![pause_after(None)];
        while pauses.last() != Some(&RETRY_MAX) {
            pauses.push(pause_after(pauses.last().copied()));
        }
        let milliseconds: Vec<u128> = pauses.iter().map(Duration::as_millis).collect();
        assert_eq!(milliseconds, [200, 400, 800, 1_600, 2_000]);
        assert_eq!(pause_after(Some(RETRY_MAX)), RETRY_MAX);
    }
}
