//! The worlds: on each node a host stack between the pods as a network plugin leaves it, with connection tracking and
//! a few rules.
//!
//! Daemons have worlds of their own, so that none of their programs is in the way of plain connections or of Envoy's.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use serde_json::Value;
use world::{
    World,
    cgroup::Cgroup,
    namespace::Namespace,
    node::Node,
    pod::{Plan, Pod},
};

use crate::{
    envoy::{self, Sidecar},
    load::{Answer, Order, port},
    plan::{self, Topology, Way},
};

/// Congestion control of all sockets of all worlds, unless asked for otherwise. Every kernel allows it in namespaces; the
/// system's own choice would be another one on each machine.
pub const CONGESTION_CONTROL: &str = "reno";

/// What a network plugin's host has in the way of every packet: connection tracking, a rule for what is known, one for
/// what is not, and addresses to translate.
const RULES: &str = "\
table inet plugin {
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state invalid drop
    ct state established,related accept
    ip saddr 10.8.0.0/16 accept
    ip daddr 10.8.0.0/16 accept
    ip6 saddr fd00:8::/32 accept
    ip6 daddr fd00:8::/32 accept
  }
  chain services {
    type nat hook prerouting priority dstnat; policy accept;
    ip daddr 10.96.0.10 tcp dport 80 dnat ip to 10.8.1.250:8080
    ip daddr 10.96.0.11 tcp dport 80 dnat ip to 10.8.1.251:8080
  }
  chain leaving {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr 10.8.0.0/16 ip daddr != 10.0.0.0/8 masquerade
  }
}
";

/// Mutual TLS is required, and each server names its one client.
const POLICY: &str = "\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
";

/// Lines of node.yaml that leave the host's stack in the way of direct connections, and that take it out.
const SHORTCUT_OFF: &str = "shortcut: off\n";
const SHORTCUT_ON: &str = "shortcut: auto\n";

/// From the end of a connection to its line in the access log.
const LINE_TIME_MAX: Duration = Duration::from_secs(5);

/// From start to ready, certificates included.
const READY_TIME_MAX: Duration = Duration::from_secs(30);

/// Between two looks at something that is awaited.
const TURN: Duration = Duration::from_millis(20);

/// What the worlds are made with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Of every socket.
    pub congestion_control: String,
    /// Where Envoy is; `None` leaves its ways out.
    pub envoy: Option<PathBuf>,
    /// Which processors a node has.
    pub processors: Processors,
    /// Threads of each proxy.
    pub workers: usize,
}

/// Where the processes of a node may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processors {
    /// Each node has one processor, for its pods and its proxies: what is compared is work, and the scheduler's choice of who
    /// shares a processor with whom, which triples a round trip or not, is no part of it.
    OnePerNode,
    /// All have all, as the scheduler likes.
    Shared,
}

impl Processors {
    /// Runs something whose processes shall be a node's.
    fn of<T>(self, node: &Node, spawn: impl FnOnce() -> T) -> Result<T> {
        if self == Self::Shared {
            return Ok(spawn());
        }
        let me = Pid::from_raw(0);
        let before = sched_getaffinity(me)?;
        let mine: Vec<usize> =
            (0..CpuSet::count()).filter(|cpu| before.is_set(*cpu).unwrap_or(false)).collect();
        let mut only = CpuSet::new();
        only.set(mine[usize::from(node.number() - 1) % mine.len()])?;
        sched_setaffinity(me, &only)?;
        let spawned = spawn();
        sched_setaffinity(me, &before)?;
        Ok(spawned)
    }
}

/// A client and a server, and what is between them.
#[derive(Debug)]
pub struct Lane {
    /// Which way this is.
    pub way: Way,
    client: Generator,
    server: Generator,
    pods: [Arc<Pod>; 2],
    proxies: Proxies,
    processors: Processors,
}

#[derive(Debug)]
enum Proxies {
    None,
    Daemons(Vec<Daemon>),
    Sidecars(Box<[Sidecar; 2]>),
}

/// A node's daemon, and the file of its lines.
#[derive(Debug, Clone)]
struct Daemon {
    node: Arc<Node>,
    lines: PathBuf,
}

/// All lanes that could be made, and why the others could not.
#[derive(Debug)]
pub struct Stage {
    /// In the order of [`plan::WAYS`].
    pub lanes: Vec<Lane>,
    /// The ways that are not there, each with the reason.
    pub absent: Vec<(Way, String)>,
    // After the lanes: what runs in a world ends before it.
    _worlds: Vec<World>,
}

impl Stage {
    /// Makes the worlds of these ways, starts their proxies, and looks whether their connections take the way they should.
    ///
    /// # Errors
    /// If a world cannot be made.
    pub fn set(ways: &[Way], settings: &Settings) -> Result<Self> {
        let mut stage = Self { lanes: Vec::new(), absent: Vec::new(), _worlds: Vec::new() };
        let is_daemons = |way: &&Way| !matches!(way.path, plan::Path::Plain | plan::Path::Envoy);
        let (meshed, others): (Vec<&Way>, Vec<&Way>) = ways.iter().partition(is_daemons);
        let (shortcut, meshed): (Vec<&Way>, Vec<&Way>) =
            meshed.into_iter().partition(|way| way.path == plan::Path::Redirect);
        if !others.is_empty() {
            stage.without_daemons(&others, settings)?;
        }
        if !meshed.is_empty() {
            stage.with_daemons(&meshed, settings, SHORTCUT_OFF)?;
        }
        if !shortcut.is_empty() {
            stage.with_daemons(&shortcut, settings, SHORTCUT_ON)?;
        }
        stage.lanes.sort_by_key(|lane| lane.way);
        stage.absent.sort();
        Ok(stage)
    }

    fn leave_out(&mut self, ways: &[&Way], reason: &str) {
        self.absent.extend(ways.iter().map(|way| (**way, reason.to_owned())));
    }

    fn without_daemons(&mut self, ways: &[&Way], settings: &Settings) -> Result<()> {
        let world = World::new();
        let nodes = nodes(&world, settings)?;
        for way in ways {
            let pods = pods(&world, &nodes, **way, settings, "")?;
            let [client, server] = &pods;
            let proxies = match (way.path, &settings.envoy) {
                (plan::Path::Envoy, Some(program)) => {
                    let folder = world.folder().join(format!("envoy-{}", way.topology.label()));
                    let mut sidecars = envoy::pair(program, &folder, client, server, settings.workers)?;
                    start(&mut sidecars, &pods, settings.processors)?;
                    Proxies::Sidecars(Box::new(sidecars))
                }
                (plan::Path::Envoy, None) => {
                    self.leave_out(&[way], "no Envoy was given");
                    continue;
                }
                _ => Proxies::None,
            };
            self.lanes.push(Lane::new(**way, pods, proxies, settings.processors)?);
        }
        self._worlds.push(world);
        Ok(())
    }

    fn with_daemons(&mut self, ways: &[&Way], settings: &Settings, more: &str) -> Result<()> {
        let world = World::new();
        let nodes = nodes(&world, settings)?;
        let documents = world.documents();
        documents.try_put("policy.yaml", POLICY)?;
        let mut made = Vec::new();
        for way in ways {
            let same_node = if way.path == plan::Path::Relay { "proxied" } else { "direct" };
            let pods = pods(&world, &nodes, **way, settings, &format!("  sameNode: {same_node}\n"))?;
            let file = format!("policy-{}.yaml", pods[1].name());
            documents.try_put(&file, &allow(&pods[0], &pods[1]))?;
            made.push((**way, pods));
        }
        let daemons: Vec<Daemon> = nodes
            .iter()
            .map(|node| Daemon {
                node: Arc::clone(node),
                lines: world.folder().join(format!("{}.log", node.name())),
            })
            .collect();
        world.start_ca();
        let mut started = Ok(());
        for daemon in &daemons {
            daemon.node.set(|set| {
                set.lines = Some(daemon.lines.clone());
                set.more = format!("{more}workers: {}\n", settings.workers);
            });
            world.give_token(&daemon.node);
            settings.processors.of(&daemon.node, || daemon.node.launch())?;
        }
        for daemon in &daemons {
            started = started.and_then(|()| daemon.wait_ready());
        }
        for (way, pods) in made {
            let used = match way.topology {
                Topology::SameNode => daemons[..1].to_vec(),
                Topology::Between => daemons.clone(),
            };
            if let Err(error) = &started {
                self.leave_out(&[&way], &format!("{error:#}"));
                continue;
            }
            let mut lane = Lane::new(way, pods, Proxies::Daemons(used), settings.processors)?;
            match lane.takes_its_way() {
                Ok(()) => self.lanes.push(lane),
                Err(error) => self.leave_out(&[&way], &format!("{error:#}")),
            }
        }
        self._worlds.push(world);
        Ok(())
    }
}

fn nodes(world: &World, settings: &Settings) -> Result<[Arc<Node>; 2]> {
    let nodes = [world.node("node-a"), world.node("node-b")];
    for node in &nodes {
        set_congestion_control(node.namespace(), settings)?;
        let mut nft = Command::new("nsenter")
            .arg(format!("--net={}", node.namespace().path().display()))
            .args(["nft", "--file", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .context("nsenter (package util-linux) and nft (package nftables)")?;
        nft.stdin.take().context("a pipe")?.write_all(RULES.as_bytes())?;
        let status = nft.wait()?;
        ensure!(status.success(), "nft refused the rules of {}: {status}", node.name());
    }
    Ok(nodes)
}

fn pods(
    world: &World,
    nodes: &[Arc<Node>; 2],
    way: Way,
    settings: &Settings,
    more: &str,
) -> Result<[Arc<Pod>; 2]> {
    let there = match way.topology {
        Topology::SameNode => &nodes[0],
        Topology::Between => &nodes[1],
    };
    let name = |role: &str| format!("{}-{}-{role}", way.path.label(), way.topology.label());
    let plan = |role: &str| {
        let plan = Plan::new("bench", &name(role)).with(more);
        if more.is_empty() { plan.outside() } else { plan }
    };
    let pods = [world.pod(&nodes[0], plan("client")), world.pod(there, plan("server"))];
    for pod in &pods {
        set_congestion_control(pod.namespace(), settings)?;
        // Connections that closed a moment ago must not use up the ports of a load that makes thousands a second.
        pod.namespace().set_sysctl("net/ipv4/tcp_tw_reuse", "1")?;
    }
    Ok(pods)
}

/// The kernel may name another than the one asked for; then nothing would be comparable.
fn set_congestion_control(namespace: &Namespace, settings: &Settings) -> Result<()> {
    let key = "net/ipv4/tcp_congestion_control";
    let wanted = &settings.congestion_control;
    namespace.set_sysctl(key, wanted).with_context(|| format!("the congestion control {wanted}"))?;
    let is = namespace.sysctl(key)?;
    ensure!(is == *wanted, "the congestion control of {} is {is} and not {wanted}", namespace.name());
    Ok(())
}

fn allow(client: &Pod, server: &Pod) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {server}, namespace: bench}}
spec:
  selector: {{matchLabels: {{app: {server}}}}}
  action: ALLOW
  rules: [{{from: [{{source: {{principals: [\"{principal}\"]}}}}]}}]
",
        server = server.name(),
        principal = client.identity().trim_start_matches("spiffe://"),
    )
}

impl Daemon {
    fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + READY_TIME_MAX;
        while self.node.readiness() != Some(200) {
            let tail = || self.node.log().tail();
            ensure!(self.node.runs(), "the daemon of {} ended: {}", self.node.name(), tail());
            ensure!(
                Instant::now() < deadline,
                "the daemon of {} is not ready: {}",
                self.node.name(),
                self.node.readiness_text()
            );
            std::thread::park_timeout(TURN);
        }
        Ok(())
    }

    /// Lines of the access log behind a position in the file, of connections to a port.
    fn access_lines(&self, position: u64, port: u16) -> Result<Vec<Value>> {
        use std::io::{Seek, SeekFrom};
        let mut file = fs::File::open(&self.lines)?;
        file.seek(SeekFrom::Start(position))?;
        let end = format!(":{port}");
        let is_wanted = |line: &Value| {
            line["target"] == "access"
                && line["destination"]["address"].as_str().is_some_and(|address| address.ends_with(&end))
        };
        let lines = BufReader::new(file).lines().map_while(Result::ok);
        Ok(lines.filter_map(|line| serde_json::from_str(&line).ok()).filter(is_wanted).collect())
    }
}

impl Lane {
    fn new(way: Way, pods: [Arc<Pod>; 2], proxies: Proxies, processors: Processors) -> Result<Self> {
        let client = Generator::start("load", &pods[0], processors)?;
        let mut server = Generator::start("serve", &pods[1], processors)?;
        server.wait_listening()?;
        Ok(Self { way, client, server, pods, proxies, processors })
    }

    /// Where the client finds a service.
    pub fn target(&self, port: u16) -> SocketAddr {
        match self.proxies {
            Proxies::Sidecars(_) => SocketAddr::from((Ipv4Addr::LOCALHOST, port + envoy::PORT_OFFSET)),
            Proxies::None | Proxies::Daemons(_) => SocketAddr::from((self.pods[1].v4(), port)),
        }
    }

    /// Has the client do something.
    ///
    /// # Errors
    /// With what the client says.
    pub fn order(&mut self, order: &Order) -> Result<Answer> {
        self.client.order(order).with_context(|| self.way.to_string())
    }

    /// Files that tell the CPU time of all proxies of this way.
    pub fn cpu_files(&self) -> Vec<PathBuf> {
        self.groups().into_iter().map(|group| group.path().join("cpu.stat")).collect()
    }

    /// Whether there are proxies, whose memory can be told.
    pub fn has_proxies(&self) -> bool {
        !matches!(self.proxies, Proxies::None)
    }

    /// Resident memory of all proxies of this way, in bytes.
    ///
    /// # Errors
    /// If none runs.
    pub fn resident_bytes(&self) -> Result<u64> {
        let mut sum = 0;
        for group in self.groups() {
            for pid in fs::read_to_string(group.path().join("cgroup.procs"))?.lines() {
                sum += resident(pid)?;
            }
        }
        ensure!(sum > 0, "no proxy of {} runs", self.way);
        Ok(sum)
    }

    fn groups(&self) -> Vec<&Cgroup> {
        match &self.proxies {
            Proxies::None => Vec::new(),
            Proxies::Daemons(daemons) => daemons.iter().map(|daemon| daemon.node.daemon_cgroup()).collect(),
            Proxies::Sidecars(sidecars) => sidecars.iter().map(Sidecar::cgroup).collect(),
        }
    }

    /// Starts the load anew: connections that it held are closed at both ends.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn restart_load(&mut self) -> Result<()> {
        // The old ones end before their ports are taken again.
        for (generator, role, pod) in
            [(&mut self.client, "load", &self.pods[0]), (&mut self.server, "serve", &self.pods[1])]
        {
            generator.end();
            *generator = Generator::start(role, pod, self.processors)?;
        }
        self.server.wait_listening()
    }

    /// Starts the load and the proxies of this way anew: what they kept from before is gone.
    ///
    /// # Errors
    /// If one does not come up.
    pub fn restart(&mut self) -> Result<()> {
        self.restart_load()?;
        match &mut self.proxies {
            Proxies::None => {}
            Proxies::Daemons(daemons) => {
                for daemon in daemons.iter() {
                    daemon.node.terminate();
                    self.processors.of(&daemon.node, || daemon.node.launch())?;
                }
                for daemon in daemons {
                    daemon.wait_ready()?;
                }
            }
            Proxies::Sidecars(sidecars) => start(sidecars, &self.pods, self.processors)?,
        }
        Ok(())
    }

    /// Makes one connection, and reads in the daemon's access log which way it took.
    fn takes_its_way(&mut self) -> Result<()> {
        let Proxies::Daemons(daemons) = &self.proxies else { return Ok(()) };
        let Some(daemon) = daemons.first().cloned() else { return Ok(()) };
        let wanted = match self.way.path {
            plan::Path::Direct | plan::Path::Redirect => "direct",
            plan::Path::Relay => "relay",
            plan::Path::Between | plan::Path::Plain | plan::Path::Envoy => "tunnel",
        };
        let position = fs::metadata(&daemon.lines).map_or(0, |file| file.len());
        let target = self.target(port::CONNECT);
        self.order(&Order::Hold { target, connections: 1 })?;
        self.order(&Order::Release)?;
        let deadline = Instant::now() + LINE_TIME_MAX;
        let lines = loop {
            let lines = daemon.access_lines(position, port::CONNECT)?;
            if !lines.is_empty() || Instant::now() > deadline {
                break lines;
            }
            std::thread::park_timeout(TURN);
        };
        let taken: Vec<&str> = lines.iter().filter_map(|line| line["path"].as_str()).collect();
        ensure!(!taken.is_empty(), "the daemon tells of no connection");
        let astray = taken.iter().find(|path| **path != wanted);
        if let Some(path) = astray {
            bail!("the daemon's log says that its connections take the path `{path}`");
        }
        Ok(())
    }
}

/// Starts a pair of sidecars, the server's first.
fn start(sidecars: &mut [Sidecar; 2], pods: &[Arc<Pod>; 2], processors: Processors) -> Result<()> {
    for (sidecar, pod) in sidecars.iter_mut().zip(pods).rev() {
        processors.of(pod.node(), || sidecar.start(pod))??;
    }
    Ok(())
}

fn resident(pid: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0 kB");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("VmRSS: {line}"))?;
    Ok(kib * 1024)
}

/// A process of the load in a pod.
#[derive(Debug)]
struct Generator {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Generator {
    fn start(role: &str, pod: &Pod, processors: Processors) -> Result<Self> {
        let mut command = pod.namespace().command(pod.cgroup(), &world::binary("mesh-bench"));
        command.arg(role).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child =
            processors.of(pod.node(), || command.spawn())?.with_context(|| format!("mesh-bench {role}"))?;
        let orders = child.stdin.take().context("a pipe")?;
        let answers = BufReader::new(child.stdout.take().context("a pipe")?);
        Ok(Self { child, orders, answers })
    }

    fn wait_listening(&mut self) -> Result<()> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(line.trim() == "listening", "the server of the load does not listen");
        Ok(())
    }

    /// Every order ends within its own limits.
    fn order(&mut self, order: &Order) -> Result<Answer> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        self.orders.write_all(&line)?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        match serde_json::from_str(&answer).context("the client of the load ended")? {
            Answer::Failed(problem) => bail!("{problem}"),
            answer @ (Answer::Counted(_) | Answer::Done) => Ok(answer),
        }
    }
}

impl Generator {
    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        self.end();
    }
}

/// Whether a folder of results can be written, before minutes are spent on them.
///
/// # Errors
/// If not.
pub fn prepare_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("{} could not be made", folder.display()))
}
