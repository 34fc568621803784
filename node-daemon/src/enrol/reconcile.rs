//! Brings about what snapshots declare: the single task that enrols, changes and lets go.
//!
//! [`enter`], [`leave`] and [`places`] do it, [`watch`] notices what changes by itself.

mod enter;
mod leave;
mod places;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use ebpf_abi::WorkloadNumber;
use node_core::{
    snapshot::Snapshot,
    workload::{ObjectName, Workload},
};
use tokio::{
    sync::{mpsc, oneshot, watch as watch_channel},
    time::{Instant, MissedTickBehavior, interval},
};

pub(super) use self::places::{give_back, namespace_of};
use super::{
    DirectView, EnrolConfig, Standing, View,
    direct::Ledger,
    ground::Numbers,
    host::Cgroup,
    keeper::{Keeper, Told},
    pairs::{Pairs, Pod, Pods},
    plan::{Step, plan},
    shortcut::Shortcut,
    state::State,
    unmeshed,
};
use crate::{
    datapath::Change,
    kernel::Kernel,
    net::{Exemption, Listeners},
    sys::Namespace,
    telemetry::{Event, Sink},
};

/// How often namespaces and cgroups are looked for. Reckoning: one `stat` each, 1 us; 500 workloads cost 0.5 % of a CPU. So long a
/// namespace outlives its path, and so long a unit that was started anew runs before its connects are captured again.
const POLL: Duration = Duration::from_millis(100);

/// Polls between two readings of the kernel's counters.
const COUNTERS_EVERY: u32 = 10;

/// Polls between two counts of connections from before the enrolment.
const UNMESHED_EVERY: u32 = 50;

/// Pause before a refused workload is tried again; doubled each time up to [`RETRY_MAX`].
const RETRY_FIRST: Duration = Duration::from_millis(200);

/// Longest pause between two tries. Reckoning: a try costs less than 1 ms, and this is how long a pod may wait after its address
/// was set.
const RETRY_MAX: Duration = Duration::from_secs(2);

/// Reports of keepers that wait. At the limit the keepers wait, each of which keeps its own namespace only.
const TOLD_MAX: usize = 256;

/// A workload that is enrolled.
struct Entry {
    workload: Arc<Workload>,
    number: WorkloadNumber,
    cookie: u64,
    place: PathBuf,
    /// Of a host workload. The id is that to which the programs are attached.
    cgroup: Option<Cgroup>,
    since: SystemTime,
    standing: Vec<unmeshed::Standing>,
}

/// A workload that could not be enrolled, or not any more.
struct Waiting {
    workload: Arc<Workload>,
    reason: &'static str,
    problem: String,
    pause: Duration,
    next: Instant,
    /// It lost what proves its identity while it was enrolled: still captured, served by nobody, that is closed.
    closed: Option<Entry>,
}

/// A network namespace in which something is enrolled.
struct Place {
    namespace: Arc<Namespace>,
    keeper: Keeper,
    addresses: BTreeSet<IpAddr>,
    tenants: BTreeSet<ObjectName>,
}

pub(super) struct Reconciler {
    config: EnrolConfig,
    kernel: Kernel,
    state: State,
    host: Arc<Namespace>,
    events: Sink,
    changes: mpsc::Sender<Change>,
    view: watch_channel::Sender<View>,
    exempt: Exemption,
    numbers: Arc<Numbers>,
    host_listeners: Option<Listeners>,
    entries: BTreeMap<ObjectName, Entry>,
    waiting: BTreeMap<ObjectName, Waiting>,
    places: BTreeMap<u64, Place>,
    told: mpsc::Sender<Told>,
    reports: Option<mpsc::Receiver<Told>>,
    snapshot: Option<Arc<Snapshot>>,
    is_owner: bool,
    /// What a predecessor left was looked through.
    is_settled: bool,
    counters: Vec<(&'static str, u64)>,
    pairs: Pairs,
    shortcut: Shortcut,
    /// Namespaces whose interfaces may be others by now.
    stale_shortcuts: BTreeSet<u64>,
    ledger: Arc<Ledger>,
    /// Pods came or went since the pair table was put in force.
    are_pairs_stale: bool,
}

/// Where results go.
pub(super) struct Outlets {
    pub(super) changes: mpsc::Sender<Change>,
    pub(super) view: watch_channel::Sender<View>,
    pub(super) ledger: Arc<Ledger>,
}

impl Reconciler {
    pub(super) fn new(
        config: EnrolConfig,
        kernel: Kernel,
        state: State,
        host: Arc<Namespace>,
        events: Sink,
        outlets: Outlets,
    ) -> Self {
        let Outlets { changes, view, ledger } = outlets;
        let pairs = Pairs::new(kernel.direct(), Arc::clone(&ledger), events.clone());
        let shortcut = Shortcut::new(config.shortcut, events.clone());
        let marks = kernel.exempt();
        let exempt: Exemption = Arc::new(move |socket| marks.mark(socket).map_err(std::io::Error::other));
        let (told, reports) = mpsc::channel(TOLD_MAX);
        Self {
            config,
            kernel,
            state,
            host,
            events,
            changes,
            view,
            exempt,
            numbers: Arc::default(),
            host_listeners: None,
            entries: BTreeMap::new(),
            waiting: BTreeMap::new(),
            places: BTreeMap::new(),
            told,
            reports: Some(reports),
            snapshot: None,
            is_owner: true,
            is_settled: false,
            counters: Vec::new(),
            pairs,
            shortcut,
            stale_shortcuts: BTreeSet::new(),
            ledger,
            are_pairs_stale: true,
        }
    }

    /// Follows snapshots until told to stop, or until nobody publishes any more. Nothing is undone then (T-23).
    pub(super) async fn run(
        mut self,
        mut snapshots: watch_channel::Receiver<Arc<Snapshot>>,
        mut stop: oneshot::Receiver<()>,
    ) {
        let Some(mut reports) = self.reports.take() else { return };
        let mut polls = interval(POLL);
        polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut count: u32 = 0;
        snapshots.mark_changed();
        loop {
            tokio::select! {
                biased;
                _ = &mut stop => break,
                changed = snapshots.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let snapshot = Arc::clone(&snapshots.borrow_and_update());
                    self.follow(snapshot).await;
                }
                Some(told) = reports.recv() => self.hear(told),
                _ = polls.tick() => {
                    count = count.wrapping_add(1);
                    self.poll(count).await;
                }
            }
        }
        for (_, place) in std::mem::take(&mut self.places) {
            place.keeper.stop().await;
        }
    }

    /// Takes the steps from what is enrolled to what a snapshot declares.
    async fn follow(&mut self, snapshot: Arc<Snapshot>) {
        // Documents that cannot be read may declare what a predecessor enrolled: it stays, closed (T-19).
        let is_complete = snapshot.unreadable().is_none();
        let declared: BTreeMap<ObjectName, Arc<Workload>> =
            snapshot.local().map(|workload| (workload.name.clone(), Arc::clone(workload))).collect();
        self.snapshot = Some(Arc::clone(&snapshot));
        if !self.still_owner() {
            return;
        }
        self.pairs.follow(&snapshot);
        if self.is_settled {
            // What was revoked does not wait for what has to be enrolled. A predecessor's connections wait for their workloads.
            self.put_pairs();
        }
        let forgotten: Vec<ObjectName> =
            self.waiting.keys().filter(|name| !declared.contains_key(*name)).cloned().collect();
        for name in forgotten {
            if let Some(Waiting { closed: Some(entry), .. }) = self.waiting.remove(&name) {
                self.let_go(entry, "removed").await;
            }
        }
        let enrolled =
            self.entries.iter().map(|(name, entry)| (name.clone(), Arc::clone(&entry.workload))).collect();
        for step in plan(&enrolled, &declared) {
            match step {
                Step::Leave { name, cause } => self.leave(&name, cause).await,
                Step::Change(workload) => self.change(workload).await,
                Step::Enter(workload) => self.enter(workload).await,
            }
        }
        for (name, entry) in &mut self.entries {
            if let Some(workload) = declared.get(name) {
                entry.workload = Arc::clone(workload);
                self.ledger.learn(entry.number, workload);
            }
        }
        self.end_standing_under_strict();
        self.put_pairs();
        if is_complete && !self.is_settled {
            self.is_settled = true;
            self.release_undeclared(&declared).await;
            if let Err(error) = self.kernel.retire_older_schemas() {
                self.failed("retiring older schema versions", &error);
            }
        }
        self.show();
    }

    async fn poll(&mut self, count: u32) {
        if !self.still_owner() {
            return;
        }
        self.notice_gone_namespaces().await;
        self.notice_gone_cgroups().await;
        self.retry().await;
        if count.is_multiple_of(COUNTERS_EVERY) {
            match self.kernel.counters() {
                Ok(counters) => self.counters = counters,
                Err(error) => self.failed("reading counters", &error),
            }
        }
        if count.is_multiple_of(UNMESHED_EVERY) {
            self.count_standing();
            self.pairs.compare();
        }
        if self.are_pairs_stale {
            self.put_pairs();
        }
        self.renew_shortcuts().await;
        self.show();
    }

    /// The pair table for the pods that are enrolled at present.
    fn put_pairs(&mut self) {
        self.are_pairs_stale = false;
        let pods = self.pods();
        self.pairs.put(&mut self.kernel, &pods);
    }

    /// An interface that was made anew has another number, and packets for the old one would be lost.
    async fn renew_shortcuts(&mut self) {
        let stale = std::mem::take(&mut self.stale_shortcuts);
        for entry in self.entries.values().filter(|entry| stale.contains(&entry.cookie)) {
            let Some(place) = self.places.get(&entry.cookie).filter(|_| entry.cgroup.is_none()) else {
                continue;
            };
            let pod = (&entry.workload.name, entry.number);
            let grounds = (&*place.namespace, &*self.host);
            self.shortcut.give(&mut self.kernel, pod, grounds, &entry.workload.addresses).await;
        }
    }

    fn pods(&self) -> Pods {
        let pods = self.entries.iter().filter(|(_, entry)| entry.cgroup.is_none());
        pods.filter_map(|(name, entry)| Some((name.clone(), self.pod(entry)?))).collect()
    }

    fn pod(&self, entry: &Entry) -> Option<Pod> {
        let place = self.places.get(&entry.cookie)?;
        Some(Pod {
            number: entry.number,
            addresses: entry.workload.addresses.clone(),
            namespace: Arc::clone(&place.namespace),
        })
    }

    /// False once a successor took over: then nothing is written any more, and the host's listeners are left to the data path's
    /// drain (T-24).
    fn still_owner(&mut self) -> bool {
        if !self.is_owner {
            return false;
        }
        match self.kernel.is_owner() {
            Ok(true) => true,
            Ok(false) => {
                self.is_owner = false;
                self.host_listeners = None;
                // Its rules and routes are the successor's to keep, and to remove.
                self.places.clear();
                self.show();
                false
            }
            Err(error) => {
                self.failed("reading the epoch", &error);
                false
            }
        }
    }

    async fn publish(&self, change: Change) {
        hand_over(&self.changes, change).await;
    }

    fn failed(&self, call: &'static str, error: &dyn std::error::Error) {
        self.events.emit(&Event::KernelFailed { call, problem: error.to_string() });
    }

    fn show(&self) {
        let enrolled = self.entries.iter().map(|(name, entry)| {
            let standing = Standing::Enrolled {
                since: entry.since,
                number: entry.number.0,
                place: entry.place.clone(),
                exempt_inbound_ports: entry.workload.exempt_inbound_ports.clone(),
                unmeshed: entry.standing.len(),
            };
            (name.clone(), standing)
        });
        let refused = self.waiting.iter().map(|(name, waiting)| {
            (name.clone(), Standing::Refused { reason: waiting.reason, problem: waiting.problem.clone() })
        });
        let view = View {
            snapshot: self.snapshot.as_ref().map(|snapshot| snapshot.number()),
            is_owner: self.is_owner,
            workloads: enrolled.chain(refused).collect(),
            counters: self.counters.clone(),
            direct: DirectView { shortcuts: self.shortcut.count(), ..self.pairs.view().clone() },
        };
        self.view.send_if_modified(|shown| {
            let changed = *shown != view;
            *shown = view;
            changed
        });
    }
}

/// Tells the data path, and waits where it is behind.
async fn hand_over(changes: &mpsc::Sender<Change>, change: Change) {
    // Without a data path, which ends first when the daemon stops, nobody needs to know.
    let _ = changes.send(change).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn enrolment_waits_for_a_data_path_that_is_behind_and_for_none_that_is_gone() {
        let (changes, mut taken) = mpsc::channel(1);
        let left = |name: &str| Change::Left { name: ObjectName::new("photo", name) };
        let is_named = |change: &Option<Change>, name: &str| matches!(change, Some(Change::Left { name: left }) if *left == ObjectName::new("photo", name));
        hand_over(&changes, left("first")).await;
        let mut waiting = Box::pin(hand_over(&changes, left("second")));
        assert!(tokio::time::timeout(RETRY_MAX, &mut waiting).await.is_err(), "there is no room");
        assert!(is_named(&taken.recv().await, "first"));
        waiting.await;
        assert!(is_named(&taken.recv().await, "second"));
        drop(taken);
        hand_over(&changes, left("third")).await;
    }
}
