//! Brings about what snapshots declare: the single task that enrols, changes and lets go.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use ebpf_abi::WorkloadNumber;
use node_core::{
    kernel_plan::KernelWorkload,
    snapshot::Snapshot,
    workload::{ObjectName, Placement, TransportMode, Workload},
};
use tokio::{
    sync::{mpsc, oneshot, watch as watch_channel},
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    EnrolConfig, Refusal, Standing, View,
    ground::{HostGround, Numbers, PodGround},
    host::{self, Cgroup},
    keeper::{Keeper, Told},
    place_of,
    plan::{Step, key, plan},
    routes::{self, RouteError, Want},
    state::{Entry as StateEntry, State},
    sysctl::{self, Former},
    unmeshed,
};
use crate::{
    datapath::{Arrival, Change},
    kernel::{EnrolTarget, Kernel, WorkloadKind},
    net::{Exemption, Listeners, open_listeners},
    sys::{Namespace, Watch},
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

/// The name under which the data path knows the host's listeners, which all host workloads share. No document can have it: names
/// of objects have no `@`.
fn host_site() -> ObjectName {
    ObjectName::new("", "@host")
}

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
}

impl Reconciler {
    pub(super) fn new(
        config: EnrolConfig,
        kernel: Kernel,
        state: State,
        host: Arc<Namespace>,
        events: Sink,
        changes: mpsc::Sender<Change>,
        view: watch_channel::Sender<View>,
    ) -> Self {
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
        self.snapshot = Some(snapshot);
        if !self.still_owner() {
            return;
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
            }
        }
        self.end_standing_under_strict();
        if is_complete && !self.is_settled {
            self.is_settled = true;
            self.release_undeclared(&declared).await;
            if let Err(error) = self.kernel.retire_older_schemas() {
                self.failed("retiring older schema versions", &error);
            }
        }
        self.show();
    }

    /// Enrols a workload, or says why not.
    async fn enter(&mut self, workload: Arc<Workload>) {
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

    /// Makes settings, rules and routes of a namespace, or adds a tenant to one that has them.
    async fn open_place(
        &mut self,
        workload: &Workload,
        namespace: &Arc<Namespace>,
        own: &BTreeSet<IpAddr>,
    ) -> Result<(), Refusal> {
        let cookie = namespace.cookie();
        if let Some(place) = self.places.get_mut(&cookie) {
            place.tenants.insert(workload.name.clone());
            let want = self.want(cookie, Some(workload));
            if let Some(place) = self.places.get(&cookie) {
                // First, or the keeper would take this for somebody else's doing.
                place.keeper.want(want.clone());
            }
            routes::ensure(namespace, &want).await?;
            return Ok(());
        }
        let setting = |source| Refusal::Call { call: "setting sysctls", source };
        let settings = sysctl::read(namespace).map_err(setting)?;
        self.state.remember(StateEntry {
            cookie,
            path: namespace.path().map(ToOwned::to_owned),
            settings,
        })?;
        sysctl::apply(namespace).map_err(setting)?;
        let watch = Watch::open(namespace)
            .map_err(|source| Refusal::Call { call: "watching the namespace", source })?;
        let want = self.want(cookie, Some(workload));
        let (_, addresses) = routes::ensure(namespace, &want).await?;
        let keeper = Keeper::start(Arc::clone(namespace), watch, want, own.clone(), self.told.clone());
        let place = Place {
            namespace: Arc::clone(namespace),
            keeper,
            addresses,
            tenants: BTreeSet::from([workload.name.clone()]),
        };
        self.places.insert(cookie, place);
        Ok(())
    }

    /// Sources of captured connections in a namespace: the addresses of its tenants.
    fn want(&self, cookie: u64, joining: Option<&Workload>) -> Want {
        let tenants = self.entries.values().filter(|entry| entry.cookie == cookie);
        let mut sources: Vec<IpAddr> = joining.map(|new| new.addresses.clone()).unwrap_or_default();
        let is_joining = |entry: &&Entry| joining.is_some_and(|new| new.name == entry.workload.name);
        sources.extend(
            tenants
                .filter(|entry| !is_joining(entry))
                .flat_map(|entry| entry.workload.addresses.iter().copied()),
        );
        Want { mark: self.config.mark, sources }
    }

    /// Takes a tenant out of a namespace; with the last one go rules, routes, settings and the namespace's handles.
    async fn close_place(&mut self, cookie: u64, tenant: &ObjectName) {
        let Some(place) = self.places.get_mut(&cookie) else {
            // It was refused before anything but the record was made.
            self.forget(cookie).await;
            return;
        };
        place.tenants.remove(tenant);
        if !place.tenants.is_empty() {
            let want = self.want(cookie, None);
            if let Some(place) = self.places.get(&cookie) {
                place.keeper.want(want);
            }
            return;
        }
        if let Some(place) = self.places.remove(&cookie) {
            place.keeper.stop().await;
        }
        self.forget(cookie).await;
    }

    /// Gives a namespace back what was changed there, and strikes it from the record.
    async fn forget(&mut self, cookie: u64) {
        match self.state.forget(cookie) {
            Ok(None) => {}
            Ok(Some(entry)) => {
                if let Some(namespace) = namespace_of(&entry)
                    && let Err(error) = give_back(&namespace, &entry.settings).await
                {
                    self.failed("giving back routes and settings", &error);
                }
            }
            Err(error) => self.failed("recording enrolments", &error),
        }
    }

    async fn undo(&mut self, name: &ObjectName, cookie: u64, number: WorkloadNumber) {
        if let Err(error) = self.kernel.uncapture(number) {
            self.failed("ending capture", &error);
        }
        self.close_place(cookie, name).await;
        if let Err(error) = self.kernel.release(number) {
            self.failed("releasing a workload", &error);
        }
    }

    /// Other addresses or ports of an enrolled workload.
    async fn change(&mut self, workload: Arc<Workload>) {
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
    async fn close_for_now(&mut self, workload: Arc<Workload>, refusal: &Refusal) {
        let name = workload.name.clone();
        let Some(entry) = self.entries.remove(&name) else { return };
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

    async fn leave(&mut self, name: &ObjectName, cause: &'static str) {
        if let Some(entry) = self.entries.remove(name) {
            self.let_go(entry, cause).await;
        }
    }

    /// Ends an enrolment, in the reverse order.
    async fn let_go(&mut self, entry: Entry, cause: &'static str) {
        let name = entry.workload.name.clone();
        self.numbers.remove(&name);
        self.publish(Change::Left { name: name.clone() }).await;
        self.undo(&name, entry.cookie, entry.number).await;
        if entry.cgroup.is_some() && !self.places.contains_key(&self.host.cookie()) {
            self.host_listeners = None;
            self.publish(Change::Left { name: host_site() }).await;
        }
        self.events.emit(&Event::WorkloadLeft { workload: name, cause });
    }

    /// Ends what a predecessor enrolled and nobody declares any more, and gives back namespaces that nobody needs.
    async fn release_undeclared(&mut self, declared: &BTreeMap<ObjectName, Arc<Workload>>) {
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

    /// What keepers report.
    fn hear(&mut self, told: Told) {
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

    fn numbers_in(&self, cookie: u64) -> Vec<WorkloadNumber> {
        let closed = self.waiting.values().filter_map(|waiting| waiting.closed.as_ref());
        let all = self.entries.values().chain(closed);
        all.filter(|entry| entry.cookie == cookie).map(|entry| entry.number).collect()
    }

    fn tenant(&self, cookie: u64) -> Option<ObjectName> {
        self.places.get(&cookie)?.tenants.first().cloned()
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
        }
        self.show();
    }

    /// A namespace whose path went, or leads to another one: let go, so that the kernel can free it.
    async fn notice_gone_namespaces(&mut self) {
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
    async fn notice_gone_cgroups(&mut self) {
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

    async fn retry(&mut self) {
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
    fn count_standing(&mut self) {
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
    fn end_standing_under_strict(&mut self) {
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

/// How long a workload waits after a refusal; `before` is how long it waited for this one.
fn pause_after(before: Option<Duration>) -> Duration {
    before.map_or(RETRY_FIRST, |before| (before * 2).min(RETRY_MAX))
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
fn held_addresses(namespace: &Namespace, workload: &Workload) -> Result<BTreeSet<IpAddr>, Refusal> {
    let mut addresses =
        namespace.addresses().map_err(|source| Refusal::Call { call: "listing addresses", source })?;
    if let Some(missing) = workload.addresses.iter().find(|address| !addresses.contains(address)) {
        return Err(Refusal::AddressMissing { place: place_of(namespace), address: *missing });
    }
    addresses.retain(|address| !address.is_loopback());
    Ok(addresses)
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

fn copy_of(listeners: &Listeners) -> std::io::Result<Listeners> {
    Ok(Listeners {
        outbound: listeners.outbound.try_clone()?,
        inbound: listeners.inbound.try_clone()?,
        tunnel: listeners.tunnel.try_clone()?,
    })
}

/// The namespace of a record, if it is still the same.
pub(super) fn namespace_of(entry: &StateEntry) -> Option<Namespace> {
    let namespace = match &entry.path {
        Some(path) => Namespace::open(path),
        None => Namespace::own(),
    };
    namespace.ok().filter(|namespace| namespace.cookie() == entry.cookie)
}

/// Removes rules and routes, and restores settings.
pub(super) async fn give_back(namespace: &Namespace, settings: &[Former]) -> Result<(), RouteError> {
    routes::remove(namespace).await?;
    sysctl::restore(namespace, settings)
        .map_err(|source| RouteError::Kernel { call: "restoring sysctls", source })
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
