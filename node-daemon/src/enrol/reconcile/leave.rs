//! Other addresses or ports of what is enrolled, and out of the mesh, in the reverse order.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ebpf_abi::WorkloadNumber;
use node_core::{
    kernel_plan::KernelWorkload,
    workload::{ObjectName, Workload},
};
use tokio::time::Instant;

use super::{
    Entry, RETRY_FIRST, Reconciler, Waiting,
    enter::{held_addresses, host_site},
};
use crate::{
    datapath::Change,
    enrol::{Refusal, plan::key},
    telemetry::Event,
};

impl Reconciler {
    pub(super) async fn undo(&mut self, name: &ObjectName, cookie: u64, number: WorkloadNumber) {
        if let Err(error) = self.kernel.uncapture(number) {
            self.failed("ending capture", &error);
        }
        self.close_place(cookie, name).await;
        if let Err(error) = self.kernel.release(number) {
            self.failed("releasing a workload", &error);
        }
    }

    /// Other addresses or ports of an enrolled workload.
    pub(super) async fn change(&mut self, workload: Arc<Workload>) {
        let name = workload.name.clone();
        let Some(entry) = self.entries.get(&name) else { return };
        let (number, cookie) = (entry.number, entry.cookie);
        let Some(place) = self.places.get(&cookie) else { return };
        if let Err(refusal) = held_addresses(&place.namespace, &workload) {
            return self.close_for_now(workload, &refusal).await;
        }
        let table = KernelWorkload::of(&workload);
        let ports: Vec<u16> = table.ports.into_iter().collect();
        let written = if workload.is_host() {
            self.kernel.inbound_ports(number, &ports)
        } else {
            self.kernel.exempt_ports(number, &ports)
        };
        if let Err(error) = written {
            self.failed("changing ports", &error);
        }
        let want = self.want(cookie, Some(&workload));
        if let Some(place) = self.places.get(&cookie) {
            place.keeper.want(want);
        }
    }

    /// The workload is not proven to be where it is declared any more: nobody speaks in its name, and it stays captured.
    pub(super) async fn close_for_now(&mut self, workload: Arc<Workload>, refusal: &Refusal) {
        let name = workload.name.clone();
        let Some(entry) = self.entries.remove(&name) else { return };
        self.are_pairs_stale = true;
        self.numbers.remove(&name);
        self.publish(Change::Left { name: name.clone() }).await;
        let (reason, problem) = (refusal.label(), refusal.to_string());
        self.events.emit(&Event::WorkloadRefused {
            workload: name.clone(),
            reason,
            problem: problem.clone(),
        });
        let next = Instant::now() + RETRY_FIRST;
        self.waiting.insert(
            name,
            Waiting { workload, reason, problem, pause: RETRY_FIRST, next, closed: Some(entry) },
        );
    }

    pub(super) async fn leave(&mut self, name: &ObjectName, cause: &'static str) {
        if let Some(entry) = self.entries.remove(name) {
            self.let_go(entry, cause).await;
        }
    }

    /// Ends an enrolment, in the reverse order.
    pub(super) async fn let_go(&mut self, entry: Entry, cause: &'static str) {
        let name = entry.workload.name.clone();
        self.numbers.remove(&name);
        self.publish(Change::Left { name: name.clone() }).await;
        let pod = self.pod(&entry).filter(|_| entry.cgroup.is_none());
        self.undo(&name, entry.cookie, entry.number).await;
        if let Some(pod) = pod {
            // From here on no new one comes.
            self.pairs.end_all_of(&pod, &self.pods());
        }
        self.ledger.depart(entry.number);
        self.shortcut.leave(&name);
        self.are_pairs_stale = true;
        if entry.cgroup.is_some() && !self.places.contains_key(&self.host.cookie()) {
            self.host_listeners = None;
            self.publish(Change::Left { name: host_site() }).await;
        }
        self.events.emit(&Event::WorkloadLeft { workload: name, cause });
    }

    /// Ends what a predecessor enrolled and nobody declares any more, and gives back namespaces that nobody needs.
    pub(super) async fn release_undeclared(&mut self, declared: &BTreeMap<ObjectName, Arc<Workload>>) {
        let keys: BTreeSet<String> = declared.keys().map(key).collect();
        let undeclared: Vec<_> =
            self.kernel.remembered().into_iter().filter(|old| !keys.contains(&old.key)).collect();
        for old in &undeclared {
            if let Err(error) = self.kernel.uncapture(old.number) {
                self.failed("ending capture", &error);
            }
        }
        let kept: BTreeSet<u64> = self
            .kernel
            .remembered()
            .into_iter()
            .filter(|old| keys.contains(&old.key))
            .map(|old| old.cookie)
            .chain(self.places.keys().copied())
            .collect();
        let stale: Vec<u64> = self
            .state
            .entries()
            .iter()
            .map(|entry| entry.cookie)
            .filter(|cookie| !kept.contains(cookie))
            .collect();
        for cookie in stale {
            self.forget(cookie).await;
        }
        for old in undeclared {
            if let Err(error) = self.kernel.release(old.number) {
                self.failed("releasing a workload", &error);
            }
            tracing::info!(workload = old.key, "a predecessor's enrolment was released: it is not declared");
        }
    }
}
