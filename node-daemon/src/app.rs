//! The composition root: the only file that knows every room. It starts them in the order in which things flow, wires them,
//! and ends them.
//!
//! ```text
//! config -> place -> control -> certs -> kernel -> enrol -> datapath
//!                                    \------> admin, readiness, metrics (views of all)
//! ```

use std::{
    collections::BTreeSet,
    fs::{self, Permissions},
    io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use ipnet::IpNet;
use node_core::{snapshot::Snapshot, workload::ObjectName};
use spiffe_id::NodeId;
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::{JoinSet, spawn_blocking},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{self, EnrolmentView, NodeCertificateView, Stage, Views, serve::Listener},
    audit,
    certs::{self, AuthorityConfig, ClientFiles, Seals, Wanted},
    config::Config,
    control::{self, ControlConfig},
    datapath::{self, Holds, Limits},
    enrol::{self, EnrolConfig, Enrolment, Standing},
    jwks::{self, KeysConfig},
    kernel::{Kernel, KernelConfig, MapSizes},
    place::Place,
    sys::{cgroup, process},
    telemetry::{Event, Sink, log::Lines},
};

/// Our bit in the mark of captured sockets. The low bits are Istio's, kube-proxy's and Cilium's, 0xffff0000 may be Calico's;
/// marks of pods do not leave their namespace, and on hosts this bit is only set on sockets of declared workloads.
const MARK: u32 = 0x0008_0000;

/// File of the last good documents, in the state folder.
const LAST_GOOD: &str = "last-good";

/// Folder of the node's key and certificate and of the roots, in the state folder.
const IDENTITY: &str = "identity";

/// Mode of the admin socket: root sees who talks to whom, nobody else.
const ADMIN_SOCKET_MODE: u32 = 0o600;

/// How long a successor waits for its workloads' certificates before it takes over all the same: as long as connections
/// are held for one.
const CERTIFICATES_TIME: Duration = Duration::from_secs(10);

/// How long a predecessor goes on accepting after its successor has taken every listener's place: handshakes that began
/// here end here. A SYN-ACK that was lost is sent again after 1 s.
const LINGER: Duration = Duration::from_millis(1_500);

/// How often lines that were left out are looked for.
const LOST_LINES_LOOK: Duration = Duration::from_secs(1);

/// Name of the limit of lines that wait for stdout.
const LINES_LIMIT: &str = "log_lines";

/// Why a daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// SIGTERM or SIGINT.
    Asked(&'static str),
    /// A successor owns the kernel's half (T-24).
    Superseded,
}

/// Runs the daemon until it is asked to end, or a successor has taken over. `lines` are those on which the log is written.
///
/// # Errors
/// What could not be started. Nothing that was under capture is open then (T-23).
pub async fn run(config: Config, lines: Lines) -> Result<()> {
    let events = Sink::new();
    let mut signals = Signals::listen()?;
    events.emit(&Event::DaemonStarting {
        node: config.node.clone(),
        version: env!("CARGO_PKG_VERSION"),
        configuration: config.shown().to_string(),
    });
    let lost = tokio::spawn(tell_lost_lines(lines, events.clone()));
    let started = tokio::select! {
        started = Daemon::start(&config, &events) => Some(started?),
        _ = signals.received() => None,
    };
    let cause = match started {
        Some(mut daemon) => {
            let audit = daemon.audit.take();
            let cause = daemon.serve(&config, &events, &mut signals).await;
            // Last, so that what the end decided is in it.
            if let Some(audit) = audit {
                audit.stop().await;
            }
            cause?
        }
        None => "asked to end while starting",
    };
    lost.abort();
    events.emit(&Event::DaemonStopped { cause });
    Ok(())
}

/// Removes everything of this node from the kernel and from the workloads' namespaces, and gives a report for people.
///
/// # Errors
/// A daemon runs, or something could not be removed.
pub async fn cleanup(config: &Config) -> Result<String> {
    let _place = Place::alone(&config.root).context("cleaning up needs a stopped daemon")?;
    let (kernel, enrol) = (kernel_config(config)?, enrol_config(config)?);
    let report = enrol::cleanup(&enrol, &kernel).await?;
    remove_socket(&config.root.admin_socket())?;
    let enrol::CleanupReport { namespaces, gone, kernel } = report;
    Ok(format!(
        "removed {} links and {} maps from the kernel; {namespaces} network namespaces have their rules, routes and settings \
         back, {gone} were gone already",
        kernel.links, kernel.maps
    ))
}

/// All rooms, running.
struct Daemon {
    place: Place,
    audit: Option<audit::Handle>,
    control: control::Handle,
    certs: Arc<certs::Handle>,
    enrolment: Enrolment,
    datapath: Datapath,
    stage: watch::Sender<Stage>,
    pages: Pages,
}

impl Daemon {
    async fn start(config: &Config, events: &Sink) -> Result<Self> {
        process::seal().context("forbid core dumps")?;
        let descriptors = process::raise_descriptor_limit().context("raise the limit of descriptors")?;
        let (kernel_config, enrol_config) = (kernel_config(config)?, enrol_config(config)?);
        let mut place = Place::enter(&config.root)?;
        // Before anything is judged. The node can sign once it has joined.
        let signing = Arc::new(OnceLock::new());
        let audit = audit(config, &signing, place.is_successor(), events)?;
        let control = control::start(control_config(config), events.clone()).await;
        let wanted = wanted(control.snapshots.clone());
        let certs = Arc::new(certs::start(authority_config(config)?, wanted, events.clone()));
        let _ = signing.set(certs.seals());
        if place.is_successor() {
            // The predecessor serves on while the first certificates are fetched. Late ones are waited for as ever.
            let snapshot = control.snapshots.borrow().clone();
            first_certificates(certs.store(), &snapshot).await;
        }
        let kernel = spawn_blocking(move || Kernel::start(&kernel_config)).await??;
        place.become_owner().await?;
        let (enrolment, workloads) =
            Enrolment::start(enrol_config, kernel, control.snapshots.clone(), events.clone())?;
        let files = ClientFiles::new(config.client_files.clone(), events.clone());
        tokio::spawn(Arc::clone(&files).follow(control.snapshots.clone()));
        let keys = jwks::Store::start(keys_config(config), events.clone())?;
        let datapath = datapath::start(datapath::Inputs {
            snapshots: control.snapshots.clone(),
            credentials: Arc::clone(certs.store()),
            files: Arc::clone(&files),
            keys: Arc::clone(&keys),
            workloads,
            events: events.clone(),
            limits: Limits::of_descriptors(descriptors),
            holds: holds(config),
        });
        let datapath = Arc::new(Mutex::new(Some(datapath)));
        let stage = watch::Sender::new(Stage::Running);
        let views = views(
            config,
            &Rooms {
                control: &control,
                certs: &certs,
                enrolment: &enrolment,
                datapath: &datapath,
                files,
                keys,
            },
            &stage,
            events,
        );
        let pages = Pages::open(config, views).await?;
        Ok(Self { place, audit, control, certs, enrolment, datapath, stage, pages })
    }

    /// Serves until the end, and ends in order. Gives the cause.
    async fn serve(mut self, config: &Config, events: &Sink, signals: &mut Signals) -> Result<&'static str> {
        let mut views = self.enrolment.views();
        let end = loop {
            tokio::select! {
                name = signals.received() => break End::Asked(name),
                changed = views.changed() => {
                    changed.context("enrolment ended by itself")?;
                    let view = views.borrow_and_update();
                    if !view.is_owner {
                        break End::Superseded;
                    }
                    if view.is_settled() {
                        self.place.settled();
                    }
                }
            }
        };
        self.stage.send_replace(Stage::Draining);
        let seconds = config.drain.as_secs();
        events.emit(&Event::DaemonDraining { cause: end.cause(), seconds });
        // A second signal ends the drain.
        tokio::select! {
            ended = self.end(end, config.drain) => ended?,
            _ = signals.received() => {}
        }
        Ok(end.cause())
    }

    /// What is pinned stays pinned: closed, not open (T-23).
    async fn end(self, end: End, drain: Duration) -> Result<()> {
        let Self { mut place, audit: _, control, certs, enrolment, datapath, stage: _stage, pages } = self;
        enrolment.stop().await;
        match end {
            End::Asked(_) => {
                drain_datapath(&datapath, drain).await;
                pages.close().await;
                remove_socket(place.admin_socket())?;
            }
            End::Superseded => {
                // From here on the files of the state folder, the ports and the socket are the successor's.
                control.retire();
                drop(certs);
                pages.close().await;
                place.give_way().await?;
                sleep(LINGER).await;
                drain_datapath(&datapath, drain).await;
            }
        }
        control.stop().await;
        Ok(())
    }
}

impl End {
    fn cause(self) -> &'static str {
        match self {
            Self::Asked(signal) => signal,
            Self::Superseded => "a successor took over",
        }
    }
}

/// The datapath, until it is drained.
type Datapath = Arc<Mutex<Option<datapath::Handle>>>;

async fn drain_datapath(datapath: &Datapath, time: Duration) {
    let running = datapath.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(running) = running {
        running.drain(time).await;
    }
}

/// The pages for metrics, readiness and operators.
struct Pages {
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Pages {
    async fn open(config: &Config, views: Views) -> Result<Self> {
        let stop = CancellationToken::new();
        let metrics = bind(config.metrics_listen, "metricsListen").await?;
        let ready = bind(config.ready_listen, "readyListen").await?;
        let socket = bind_socket(&config.root.admin_socket())?;
        let events = views.events.clone();
        let metrics_page = admin::metrics::page(events.clone(), Arc::clone(&views.kernel));
        let pages = [
            (Listener::Tcp(metrics), metrics_page, admin::metrics::LIMIT),
            (Listener::Tcp(ready), admin::ready::page(views.clone()), admin::ready::LIMIT),
            (Listener::Unix(socket), admin::dump::page(views.clone()), admin::dump::LIMIT),
        ];
        let mut tasks = JoinSet::new();
        for (listener, page, limit) in pages {
            tasks.spawn(admin::serve::serve(listener, page, limit, events.clone(), stop.clone()));
        }
        tasks.spawn(admin::ready::follow(views, stop.clone()));
        Ok(Self { stop, tasks })
    }

    /// Frees the ports.
    async fn close(self) {
        self.stop.cancel();
        self.tasks.join_all().await;
    }
}

async fn bind(address: SocketAddr, field: &str) -> Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("{field}: cannot listen at {address}: free that port, or give another"))
}

/// The folder is ours alone, so a socket that lies there is a dead daemon's.
fn bind_socket(path: &Path) -> Result<UnixListener> {
    remove_socket(path)?;
    let socket = UnixListener::bind(path).with_context(|| format!("{}: cannot listen", path.display()))?;
    fs::set_permissions(path, Permissions::from_mode(ADMIN_SOCKET_MODE))?;
    Ok(socket)
}

fn remove_socket(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{}: cannot be removed", path.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Whose state is looked at.
struct Rooms<'a> {
    control: &'a control::Handle,
    certs: &'a Arc<certs::Handle>,
    enrolment: &'a Enrolment,
    datapath: &'a Datapath,
    files: Arc<ClientFiles>,
    keys: Arc<jwks::Store>,
}

fn views(config: &Config, rooms: &Rooms<'_>, stage: &watch::Sender<Stage>, events: &Sink) -> Views {
    let Rooms { control, certs, enrolment, datapath, files, keys } = rooms;
    let (enrolled, counted, table) = (enrolment.views(), enrolment.views(), enrolment.views());
    // The views do not keep the room running.
    let (certificates, node_certificate) = (Arc::downgrade(certs), Arc::downgrade(certs));
    let (datapath, ledger) = (Arc::clone(datapath), enrolment.ledger());
    let (files, keys) = (Arc::clone(files), Arc::clone(keys));
    Views {
        node: config.node.clone(),
        configuration: config.shown(),
        snapshots: control.snapshots.clone(),
        documents: control.documents.clone(),
        stage: stage.subscribe(),
        enrolments: Arc::new(move || enrolments(&enrolled.borrow())),
        certificates: Arc::new(move || certificates.upgrade().map(|certs| certs.views()).unwrap_or_default()),
        node_certificate: Arc::new(move || {
            let (name, not_after) = node_certificate.upgrade()?.node_certificate()?;
            Some(NodeCertificateView { name: name.to_string(), not_after })
        }),
        connections: Arc::new(move || {
            let running = datapath.lock().unwrap_or_else(PoisonError::into_inner);
            let carried = running.as_ref().map(datapath::Handle::connections).unwrap_or_default();
            carried.into_iter().chain(ledger.views()).collect()
        }),
        client_files: Arc::new(move |snapshot| files.faults(snapshot)),
        direct: Arc::new(move || direct(&table.borrow().direct)),
        key_sets: Arc::new(move || keys.views()),
        kernel: Arc::new(move || counted.borrow().counters.clone()),
        events: events.clone(),
    }
}

fn direct(view: &enrol::DirectView) -> admin::status::Direct {
    let enrol::DirectView { is_on, problem, snapshot, generation, pairs, shortcuts } = view.clone();
    admin::status::Direct { on: is_on, problem, snapshot, generation, pairs, shortcuts }
}

fn enrolments(view: &enrol::View) -> Vec<EnrolmentView> {
    let one = |(workload, standing): (&ObjectName, &Standing)| EnrolmentView {
        workload: workload.clone(),
        problem: match standing {
            Standing::Enrolled { .. } => None,
            Standing::Refused { problem, .. } => Some(problem.clone()),
        },
    };
    view.workloads.iter().map(one).collect()
}

/// What certificates are needed for: every enrolled workload of this node.
fn wanted(mut snapshots: watch::Receiver<Arc<Snapshot>>) -> watch::Receiver<Wanted> {
    let of = |snapshot: &Snapshot| Wanted {
        identities: snapshot.local().map(|workload| workload.identity.clone()).collect(),
        aliases: snapshot.mesh().trust_domain_aliases.clone(),
    };
    let wanted = watch::Sender::new(of(&snapshots.borrow_and_update()));
    let receiver = wanted.subscribe();
    tokio::spawn(async move {
        while snapshots.changed().await.is_ok() {
            let now = of(&snapshots.borrow_and_update());
            wanted.send_if_modified(|before| {
                let is_new = *before != now;
                *before = now;
                is_new
            });
        }
    });
    receiver
}

/// Waits until every enrolled workload of this node has a certificate, or for [`CERTIFICATES_TIME`].
async fn first_certificates(store: &certs::Store, snapshot: &Snapshot) {
    let mut changes = store.changes();
    let identities: BTreeSet<_> = snapshot.local().map(|workload| &workload.identity).collect();
    let all_there = async {
        while identities.iter().any(|identity| store.credentials(identity).is_none()) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    };
    // Late ones are waited for as ever, by the connections that need them.
    let _ = timeout(CERTIFICATES_TIME, all_there).await;
}

/// The audit log, where one is kept. `signing` is filled when the node's certificates are on their way.
fn audit(
    config: &Config,
    signing: &Arc<OnceLock<Seals>>,
    is_successor: bool,
    events: &Sink,
) -> Result<Option<audit::Handle>> {
    let Some(own) = &config.audit else { return Ok(None) };
    let node = NodeId::new(config.ca.trust_domain.clone(), &config.node).context("node")?;
    let signing = Arc::clone(signing);
    let seals = Seals::new(move || signing.get()?.at(SystemTime::now()));
    Ok(Some(audit::start(own, &node, seals, is_successor, events)?))
}

fn control_config(config: &Config) -> ControlConfig {
    ControlConfig {
        node: config.node.clone(),
        trust_domain: config.ca.trust_domain.clone(),
        folder: config.workloads.clone(),
        last_good: config.root.state().join(LAST_GOOD),
    }
}

fn authority_config(config: &Config) -> Result<AuthorityConfig> {
    let ca = &config.ca;
    Ok(AuthorityConfig {
        address: ca.address,
        trust_domain: ca.trust_domain.clone(),
        node: NodeId::new(ca.trust_domain.clone(), &config.node).context("node")?,
        join_token: ca.join_token.clone(),
        state: config.root.state().join(IDENTITY),
    })
}

fn kernel_config(config: &Config) -> Result<KernelConfig> {
    let cgroup = match &config.cgroup {
        Some(folder) => folder.clone(),
        None => cgroup::mount_point().context("cgroup")?,
    };
    Ok(KernelConfig {
        node: config.node.clone(),
        bpffs: config.bpffs.clone(),
        cgroup,
        mark: MARK,
        sizes: MapSizes::default(),
    })
}

fn enrol_config(config: &Config) -> Result<EnrolConfig> {
    Ok(EnrolConfig {
        cgroup_mount: cgroup::mount_point().context("cgroup")?,
        state: config.root.state().join(enrol::STATE_FILE),
        mark: MARK,
        shortcut: config.shortcut,
    })
}

/// The CA and the API server, where there is one, are no servers of key sets (T-21).
fn keys_config(config: &Config) -> KeysConfig {
    let api_server = std::env::var("KUBERNETES_SERVICE_HOST").ok().and_then(|host| host.parse().ok());
    let refuse = [Some(config.ca.address.ip()), api_server].into_iter().flatten().map(IpNet::from).collect();
    let keys = &config.jwks;
    KeysConfig { allow: keys.allow.clone(), http: keys.http, roots: keys.roots.clone(), refuse }
}

fn holds(config: &Config) -> Holds {
    let hold = &config.hold;
    Holds { certificate: hold.certificate, unknown_address: hold.unknown_address, dead_peer: hold.dead_peer }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn received(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Lines that found no place are at least counted.
async fn tell_lost_lines(lines: Lines, events: Sink) {
    loop {
        sleep(LOST_LINES_LOOK).await;
        if lines.lost() > 0 {
            events.emit(&Event::LimitReached { limit: LINES_LIMIT, workload: None });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use node_core::store::{Store, Update};
    use tokio::time::Instant;

    use super::*;
    use crate::{
        certs::testing::{Ca, identity},
        control::file,
        telemetry::log::LINES_WAITING_MAX,
    };

    const WORKLOAD: &str = "\
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: web-0, namespace: photo, labels: {culvert.io/mesh: enabled}}
spec: {serviceAccount: web, node: node-a, addresses: [10.8.1.4], networkNamespace: /run/netns/web}
";

    #[tokio::test(start_paused = true)]
    async fn a_successor_waits_for_certificates_only_so_long() {
        let mut documents = Store::new("node-a", "cluster.local".parse().unwrap());
        documents.apply(Update::replace("/etc/culvert/mesh.d/a.yaml", file::parse(WORKLOAD).unwrap()));
        let snapshot = documents.snapshot();
        assert_eq!(snapshot.local().map(|web| web.identity.clone()).collect::<Vec<_>>(), [identity("web")]);
        let ours = Ca::new("ours");
        let before = Instant::now();
        first_certificates(&ours.store(&["web"]), &snapshot).await;
        assert_eq!(before.elapsed(), Duration::ZERO, "it is there");
        first_certificates(&ours.store(&["frontend"]), &snapshot).await;
        assert_eq!(before.elapsed(), CERTIFICATES_TIME, "another's is no help");
    }

    #[tokio::test]
    async fn lines_that_were_left_out_are_told_once_a_second() {
        let (reader, writer) = io::pipe().unwrap();
        let (mut lines, _end) = Lines::start(writer).unwrap();
        // Goes before the end, which waits for what is being written.
        let _reader = reader;
        let events = Sink::new();
        tokio::time::pause();
        let telling = tokio::spawn(tell_lost_lines(lines.clone(), events.clone()));
        // Nobody reads: the pipe takes 64 KiB, the thread what it has in its hands, then the queue fills.
        let mut fill = || {
            for _ in 0..2 * LINES_WAITING_MAX + 1_000 {
                lines.write_all(&[b'x'; 1024]).unwrap();
            }
        };
        let told = || {
            let text = events.metrics().text().unwrap();
            let line = text.lines().find(|line| line.contains(r#"culvert_limits_total{limit="log_lines"}"#));
            line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        };
        for seconds in 1..=3 {
            fill();
            sleep(LOST_LINES_LOOK + Duration::from_millis(1)).await;
            assert_eq!(told(), Some(seconds));
        }
        telling.abort();
    }
}
