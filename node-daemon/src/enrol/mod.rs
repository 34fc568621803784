//! One way in for workloads: whoever declares them, here they come under capture and leave it again.
//!
//! In: snapshots (who should be enrolled), the kernel's half. Out: [`datapath::Change`]s with listeners, [`View`]s for status
//! and readiness, events. The order is DESIGN 3.1.7:
//! ```text
//! enrol    namespace, addresses -> listeners -> kernel: steer -> settings, routes, rules -> standing connections -> kernel: capture
//!          -> data path
//! leave    data path -> kernel: uncapture -> rules, routes, settings -> kernel: release -> the namespace's last handle
//! ```
//! [`plan`] says who leaves, changes, enters; [`reconcile`] does it, on a thread of its own; [`host`] finds cgroups,
//! [`routes`] and [`sysctl`] are the namespace's configuration, which [`keeper`] keeps; [`unmeshed`] is about
//! connections from before; [`state`] is what a successor or the clean-up must undo; [`ground`] is the data path's way back
//! into the namespace; [`pairs`] tells the kernel which pods may meet without the daemon, [`direct`] tells of those that do;
//! [`shortcut`] takes their packets past the host's stack where [`veth`] finds that it may.
//!
//! Stopping removes nothing (T-23): only un-enrolment and [`cleanup`] do.

pub mod routes;

mod direct;

mod ground;

mod host;

mod keeper;

mod netlink;

mod pairs;

mod plan;

mod reconcile;

mod shortcut;

mod state;

mod sysctl;

mod unmeshed;

mod veth;

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::SystemTime,
};

use node_core::{snapshot::Snapshot, workload::ObjectName};
use tokio::sync::{mpsc, oneshot, watch as watch_channel};

pub use direct::Ledger;
pub use host::HostError;
pub use routes::RouteError;
pub use state::StateError;

use crate::{
    datapath,
    kernel::{self, Kernel, KernelConfig, KernelError},
    sys::{Namespace, NamespaceError},
    telemetry::Sink,
};
use reconcile::{Outlets, Reconciler};
use shortcut::Trail;
use state::State;

/// Name of the record of what was changed, in the state folder.
pub const STATE_FILE: &str = "enrolled.json";

/// Changes that wait for the data path. At the limit enrolment waits for it.
const CHANGES_MAX: usize = 64;

/// What enrolment needs to know of this node.
#[derive(Clone, Debug)]
pub struct EnrolConfig {
    /// The cgroup2 mount, in which units and folders of host workloads are looked for.
    pub cgroup_mount: PathBuf,
    /// Record of what was changed; see [`STATE_FILE`].
    pub state: PathBuf,
    /// Our bits of the mark, as the kernel's half has them.
    pub mark: u32,
    /// Whether direct connections may skip the host's network stack.
    pub shortcut: bool,
}

/// Why enrolment cannot run at all.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error(transparent)]
    State(#[from] StateError),
    /// The daemon cannot enter network namespaces: CAP_SYS_ADMIN is missing.
    #[error("the daemon's own network namespace cannot be used (CAP_SYS_ADMIN is needed): {0}")]
    OwnNamespace(#[from] NamespaceError),
    #[error("enrolment cannot have a thread of its own: {0}")]
    Thread(io::Error),
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// Why a workload is not enrolled. It is tried again until it is, or is declared no more.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(
        "{path}: this is the host's network namespace; a service on the host is declared by `cgroup` or `systemdUnit`"
    )]
    HostNamespace { path: PathBuf },
    #[error("{path}: workload {holder} already lives in this network namespace; each has one of its own")]
    NamespaceTaken { path: PathBuf, holder: ObjectName },
    #[error(
        "{place} does not hold the address {address} of the workload; correct `addresses`, or name the right place"
    )]
    AddressMissing { place: String, address: IpAddr },
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(
        "{path}: this cgroup overlaps with {other_path} of workload {other}; sockets would belong to both"
    )]
    CgroupOverlaps { path: PathBuf, other: ObjectName, other_path: PathBuf },
    #[error(transparent)]
    Routes(#[from] RouteError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("{call} failed: {source}")]
    Call { call: &'static str, source: io::Error },
}

impl Refusal {
    /// A bounded word for metrics and events.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Namespace(NamespaceError::Missing { .. }) => "namespace_missing",
            Self::Namespace(NamespaceError::Foreign { .. }) => "not_a_namespace",
            Self::HostNamespace { .. } => "host_namespace",
            Self::NamespaceTaken { .. } => "namespace_taken",
            Self::AddressMissing { .. } => "address_missing",
            Self::Host(HostError::UnitMissing { .. } | HostError::Missing { .. }) => "cgroup_missing",
            Self::Host(HostError::UnitName { .. } | HostError::Outside { .. }) => "not_a_cgroup",
            Self::Host(HostError::HoldsDaemon { .. }) => "cgroup_holds_daemon",
            Self::CgroupOverlaps { .. } => "cgroup_overlaps",
            Self::Routes(_) => "routes",
            Self::State(_) => "state",
            Self::Kernel(_)
            | Self::Call { .. }
            | Self::Namespace(NamespaceError::Kernel { .. })
            | Self::Host(HostError::Kernel { .. }) => "kernel",
        }
    }
}

/// How it stands with one declared workload of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Under capture.
    Enrolled {
        since: SystemTime,
        /// Number in the kernel's maps.
        number: u32,
        /// Path of its namespace, or folder of its cgroup.
        place: PathBuf,
        /// Ports that bypass the daemon.
        exempt_inbound_ports: Vec<u16>,
        /// Connections from before that still stand (T-25).
        unmeshed: usize,
    },
    /// Not under capture, or closed if it was before.
    Refused { reason: &'static str, problem: String },
}

/// What is enrolled, for status, readiness and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Number of the last snapshot that was brought about; `None` before the first.
    pub snapshot: Option<u64>,
    /// False once a successor has taken over: this daemon only drains (T-24).
    pub is_owner: bool,
    pub workloads: BTreeMap<ObjectName, Standing>,
    /// Labels and values of the kernel's counters.
    pub counters: Vec<(&'static str, u64)>,
    pub direct: DirectView,
}

/// How it stands with connections by the kernel alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectView {
    /// A table is in force. It may still permit nothing.
    pub is_on: bool,
    /// Why it is off.
    pub problem: Option<String>,
    /// Number of the snapshot whose table is in force, and what it does not permit is ended.
    pub snapshot: u64,
    /// Number of the table in force.
    pub generation: u32,
    /// Entries of it.
    pub pairs: usize,
    /// Pods whose direct connections skip the host's network stack.
    pub shortcuts: usize,
}

impl View {
    /// True once every local workload of a snapshot is enrolled, or was refused.
    pub fn is_settled(&self) -> bool {
        self.snapshot.is_some()
    }
}

/// Enrolment, running on a thread of its own.
pub struct Enrolment {
    views: watch_channel::Receiver<View>,
    ledger: Arc<Ledger>,
    reader: tokio::task::JoinHandle<()>,
    stop: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Enrolment {
    /// Starts it: enrols what the present snapshot says, and follows. The receiver belongs to the data path. To be called in a
    /// tokio runtime, in which events of direct connections are told.
    pub fn start(
        config: EnrolConfig,
        kernel: Kernel,
        snapshots: watch_channel::Receiver<Arc<Snapshot>>,
        events: Sink,
    ) -> Result<(Self, mpsc::Receiver<datapath::Change>), EnrolError> {
        let state = State::load(&config.state)?;
        let host = Arc::new(Namespace::own()?);
        let (changes, changes_receiver) = mpsc::channel(CHANGES_MAX);
        let (view, views) = watch_channel::channel(View { is_owner: true, ..View::default() });
        let (stop, stopped) = oneshot::channel();
        let ledger = Arc::new(Ledger::new(events.clone()));
        let reader = tokio::spawn(direct::follow(
            Arc::clone(&ledger),
            kernel.direct(),
            Trail::begin(kernel.shortcuts(), events.clone()),
        ));
        let outlets = Outlets { changes, view, ledger: Arc::clone(&ledger) };
        // A runtime of its own: loading programs and listing sockets takes milliseconds, in which no connection should wait.
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(EnrolError::Thread)?;
        let thread = thread::Builder::new()
            .name("enrol".to_owned())
            .spawn(move || {
                let reconciler = Reconciler::new(config, kernel, state, host, events, outlets);
                runtime.block_on(reconciler.run(snapshots, stopped));
            })
            .map_err(EnrolError::Thread)?;
        Ok((Self { views, ledger, reader, stop, thread }, changes_receiver))
    }

    /// What is enrolled, now and later.
    pub fn views(&self) -> watch_channel::Receiver<View> {
        self.views.clone()
    }

    /// Direct connections of this node.
    pub fn ledger(&self) -> Arc<Ledger> {
        Arc::clone(&self.ledger)
    }

    /// Stops following. Everything in the kernel and in the namespaces stays: closed, not open (T-23).
    pub async fn stop(self) {
        // What it did not read yet is told by a successor.
        self.reader.abort();
        // It may have ended already, for want of snapshots.
        let _ = self.stop.send(());
        let joined = tokio::task::spawn_blocking(move || self.thread.join()).await;
        if !matches!(joined, Ok(Ok(()))) {
            tracing::error!("the thread of enrolment panicked");
        }
    }
}

/// What a clean-up removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CleanupReport {
    /// Namespaces that were given back their rules, routes and settings.
    pub namespaces: usize,
    /// Namespaces of the record that are gone.
    pub gone: usize,
    pub kernel: kernel::Report,
}

/// Removes everything of this node: rules, routes and settings of all remembered namespaces, then links, maps and pins. No daemon
/// of this node may run; hold its lock. To be called in a tokio runtime.
pub async fn cleanup(config: &EnrolConfig, kernel: &KernelConfig) -> Result<CleanupReport, EnrolError> {
    let mut report = CleanupReport::default();
    let state = State::load(&config.state)?;
    for entry in state.entries() {
        let Some(namespace) = reconcile::namespace_of(entry) else {
            report.gone += 1;
            continue;
        };
        if let Err(error) = reconcile::give_back(&namespace, &entry.settings).await {
            tracing::warn!(namespace = %place_of(&namespace), %error, "clean-up is incomplete here");
        }
        report.namespaces += 1;
    }
    report.kernel = kernel::cleanup(kernel)?;
    state.remove_file()?;
    Ok(report)
}

/// How a namespace is called in messages.
fn place_of(namespace: &Namespace) -> String {
    namespace.path().map_or_else(|| "the host".to_owned(), |path| Path::display(path).to_string())
}
