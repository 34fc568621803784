//! A node: a network namespace on the wire, its folders, and the daemons that run in it.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::cgroup::Cgroup;
use crate::documents::Documents;
use crate::metrics::Metrics;
use crate::namespace::Namespace;
use crate::process::{Log, Process};
use crate::{TRUST_DOMAIN, binary, http};

/// From start to ready, certificates included; ten times what it takes.
const READY_TIME_MAX: Duration = Duration::from_secs(30);

/// Between two looks at the readiness page. Nothing else in the tests is polled in time.
const READY_TURN: Duration = Duration::from_millis(20);

/// Drain of a daemon in the tests, unless a scenario says otherwise.
const DRAIN_SECONDS: u32 = 3;

/// What the kernel itself puts into a fresh bpf file system.
const KERNELS_OWN: [&str; 2] = ["progs.debug", "maps.debug"];

/// What a scenario may change about a daemon.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `drainSeconds`
    pub drain_seconds: u32,
    /// `holdSeconds.certificate`, `.unknownAddress`, `.deadPeer`
    pub hold_seconds: [u32; 3],
    /// Where the CA is sought.
    pub ca: SocketAddr,
    /// The file that takes the daemon's lines instead of [`Node::log`]: for runs that make hundreds of thousands.
    pub lines: Option<PathBuf>,
    /// More lines of node.yaml.
    pub more: String,
}

/// One node.
#[derive(Debug)]
pub struct Node {
    name: String,
    number: u8,
    namespace: Namespace,
    cgroup: Cgroup,
    daemon_cgroup: Cgroup,
    root: PathBuf,
    bpffs: PathBuf,
    settings: Mutex<Settings>,
    daemons: Mutex<Vec<Process>>,
    documents: Documents,
}

impl Node {
    /// Makes the namespace (not yet on the wire), the folders and a bpf file system of its own.
    pub(crate) fn create(
        prefix: &str,
        name: &str,
        number: u8,
        world: &Path,
        group: &Cgroup,
        ca: SocketAddr,
    ) -> Result<Self> {
        let root = world.join(name);
        for folder in ["etc/culvert/mesh.d", "var/lib/culvert", "run/culvert", "bpf"] {
            std::fs::create_dir_all(root.join(folder))?;
        }
        let bpffs = root.join("bpf");
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("mounting a bpf file system")?;
        let namespace = Namespace::create(&format!("{prefix}-{name}"))?;
        for sysctl in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            namespace.set_sysctl(sysctl, "1")?;
        }
        let cgroup = group.below(name)?;
        let daemon_cgroup = cgroup.below("daemon")?;
        let documents = Documents::of(vec![root.join("etc/culvert/mesh.d")]);
        let settings = Settings {
            drain_seconds: DRAIN_SECONDS,
            hold_seconds: [10, 5, 10],
            ca,
            lines: None,
            more: String::new(),
        };
        Ok(Self {
            name: name.to_owned(),
            number,
            namespace,
            cgroup,
            daemon_cgroup,
            root,
            bpffs,
            settings: Mutex::new(settings),
            daemons: Mutex::default(),
            documents,
        })
    }

    /// As in documents and certificates.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Counted from one.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The node's own network namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The folder of all the node's control groups.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The control group of the node's daemons.
    pub fn daemon_cgroup(&self) -> &Cgroup {
        &self.daemon_cgroup
    }

    /// The node's address on the wire.
    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 9, 0, 10 + self.number)
    }

    /// The node's address on the wire.
    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, u16::from(10 + self.number))
    }

    /// The prefix of all the daemon's paths.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The bpf file system that only this node's daemons use.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// The documents of this node alone.
    pub fn documents(&self) -> &Documents {
        &self.documents
    }

    /// Changes what the next daemon is started with.
    pub fn set(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut locked(&self.settings));
    }

    /// Gives the node a join token.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn put_token(&self, token: &str) -> Result<()> {
        let path = self.token_path();
        std::fs::write(&path, format!("{token}\n"))?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(())
    }

    fn token_path(&self) -> PathBuf {
        self.root.join("etc/culvert/join-token")
    }

    /// Starts a daemon, and waits until it is ready.
    #[track_caller]
    pub fn start(&self) {
        self.launch();
        self.wait_ready();
    }

    /// Starts a daemon. With one that runs already it is the successor, and the one that the other methods speak of.
    #[track_caller]
    pub fn launch(&self) {
        let config = self.write_config().expect("the world's folders are writable");
        let mut command = self.namespace.command(&self.daemon_cgroup, &binary("culvert-node"));
        command.arg("run").arg("--config").arg(config).arg("--root").arg(&self.root);
        let name = format!("culvert-node {}", self.name);
        let lines = locked(&self.settings).lines.clone();
        let daemon = match lines {
            Some(file) => Process::start_into(&name, &mut command, &file),
            None => Process::start(&name, &mut command),
        };
        let daemon = daemon.expect("a shell can be started");
        locked(&self.daemons).push(daemon);
    }

    /// Waits until the readiness page says 200.
    ///
    /// # Panics
    /// If the daemon ends, or is not ready in time.
    #[track_caller]
    pub fn wait_ready(&self) {
        let deadline = Instant::now() + READY_TIME_MAX;
        loop {
            if self.readiness() == Some(200) {
                return;
            }
            assert!(
                self.runs(),
                "the daemon of {} ended before it was ready\n{}",
                self.name,
                self.log().tail()
            );
            assert!(
                Instant::now() < deadline,
                "the daemon of {} is not ready in time\n{}",
                self.name,
                self.log().tail()
            );
            std::thread::park_timeout(READY_TURN);
        }
    }

    /// The readiness page's status; `None` while nobody listens.
    pub fn readiness(&self) -> Option<u16> {
        self.get(15021, "/healthz/ready").ok().map(|(status, _)| status)
    }

    /// What the readiness page says.
    pub fn readiness_text(&self) -> String {
        self.get(15021, "/healthz/ready").map(|(_, body)| body).unwrap_or_default()
    }

    fn get(&self, port: u16, path: &str) -> std::io::Result<(u16, String)> {
        self.namespace.run(|| http::get(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), path))
    }

    /// What the daemon says.
    ///
    /// # Panics
    /// If none was started.
    #[track_caller]
    pub fn log(&self) -> Log {
        locked(&self.daemons).last().expect("a daemon was started").log().clone()
    }

    /// Whether the daemon runs.
    pub fn runs(&self) -> bool {
        locked(&self.daemons).last_mut().is_some_and(Process::runs)
    }

    /// Resident memory of the daemon; 0 while none runs.
    pub fn resident_bytes(&self) -> u64 {
        let Some(pid) = locked(&self.daemons).last().map(Process::pid) else { return 0 };
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
        kib.unwrap_or_default() * 1024
    }

    /// SIGKILL.
    pub fn kill(&self) {
        if let Some(daemon) = locked(&self.daemons).last_mut() {
            daemon.kill();
        }
    }

    /// SIGTERM, and waits until the daemon has drained and ended.
    #[track_caller]
    pub fn terminate(&self) {
        let mut daemons = locked(&self.daemons);
        let Some(daemon) = daemons.last_mut() else { return };
        daemon.signal(Signal::SIGTERM);
        let drain = u64::from(locked(&self.settings).drain_seconds);
        daemon.wait(Duration::from_secs(drain + 10));
    }

    /// SIGTERM only.
    pub fn signal(&self, signal: Signal) {
        if let Some(daemon) = locked(&self.daemons).last() {
            daemon.signal(signal);
        }
    }

    /// Waits until the daemon before the last has ended, and forgets it.
    ///
    /// # Panics
    /// If it runs on.
    #[track_caller]
    pub fn wait_predecessor(&self, limit: Duration) {
        let mut daemons = locked(&self.daemons);
        assert!(daemons.len() > 1, "no successor was started");
        let index = daemons.len() - 2;
        daemons[index].wait(limit);
        daemons.remove(index);
    }

    /// Takes every trace of the mesh away with `culvert-node cleanup`.
    ///
    /// # Errors
    /// With what it said if it failed.
    pub fn cleanup(&self) -> Result<()> {
        let config = self.write_config()?;
        let mut command = self.namespace.command(&self.daemon_cgroup, &binary("culvert-node"));
        command.arg("cleanup").arg("--config").arg(config).arg("--root").arg(&self.root);
        let done = command.output()?;
        let said = [done.stdout, done.stderr].concat();
        ensure!(
            done.status.success(),
            "culvert-node cleanup on {}: {}",
            self.name,
            String::from_utf8_lossy(&said)
        );
        Ok(())
    }

    /// Files that are left in the node's bpf file system.
    pub fn pins(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.bpffs.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                if KERNELS_OWN.iter().any(|own| entry.file_name() == *own) {
                    continue;
                }
                found.push(entry.path());
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(entry.path());
                }
            }
        }
        found
    }

    /// Counters of the daemon.
    ///
    /// # Panics
    /// If the page does not answer.
    #[track_caller]
    pub fn metrics(&self) -> Metrics {
        let (status, text) = self.get(15020, "/metrics").expect("the metrics page answers");
        assert_eq!(status, 200, "{text}");
        Metrics::parse(&text)
    }

    /// What `culvert status --json` says.
    ///
    /// # Panics
    /// If it fails.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.try_status().expect("culvert status answers")
    }

    /// What `culvert status --json` says.
    ///
    /// # Errors
    /// If it fails.
    pub fn try_status(&self) -> Result<Value> {
        let done = Command::new(binary("culvert"))
            .arg("--root")
            .arg(&self.root)
            .args(["status", "--json"])
            .output()?;
        if !done.status.success() {
            bail!("culvert status: {}", String::from_utf8_lossy(&done.stderr));
        }
        Ok(serde_json::from_slice(&done.stdout)?)
    }

    /// What `culvert dump` says.
    ///
    /// # Panics
    /// If it fails.
    #[track_caller]
    pub fn dump(&self) -> String {
        let done = Command::new(binary("culvert"))
            .arg("--root")
            .arg(&self.root)
            .arg("dump")
            .output()
            .expect("culvert can be started");
        assert!(done.status.success(), "culvert dump: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    /// The configuration file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_config(&self) -> Result<PathBuf> {
        let settings = locked(&self.settings).clone();
        let [certificate, unknown_address, dead_peer] = settings.hold_seconds;
        let path = self.root.join("etc/culvert/node.yaml");
        let text = format!(
            "node: {name}
workloads: {root}/etc/culvert/mesh.d
cgroup: {cgroup}
bpffs: {bpffs}
ca:
  address: \"{ca}\"
  trustDomain: {TRUST_DOMAIN}
  joinToken: {token}
metricsListen: \"127.0.0.1:15020\"
readyListen: \"127.0.0.1:15021\"
holdSeconds: {{certificate: {certificate}, unknownAddress: {unknown_address}, deadPeer: {dead_peer}}}
drainSeconds: {drain}
log: {{format: json, level: info}}
{more}",
            name = self.name,
            root = self.root.display(),
            cgroup = self.cgroup.path().display(),
            bpffs = self.bpffs.display(),
            ca = settings.ca,
            token = self.token_path().display(),
            drain = settings.drain_seconds,
            more = settings.more,
        );
        std::fs::write(&path, text)?;
        Ok(path)
    }

    /// Ends the daemons; says what the cleanup left behind.
    pub(crate) fn tear_down(&self) -> Result<()> {
        let started = {
            let mut daemons = locked(&self.daemons);
            let started = !daemons.is_empty();
            daemons.clear();
            started
        };
        let cleaned = if started { self.cleanup() } else { Ok(()) };
        let pins = self.pins();
        umount2(&self.bpffs, MntFlags::MNT_DETACH).context("unmounting the bpf file system")?;
        cleaned?;
        ensure!(pins.is_empty(), "culvert-node cleanup leaves {pins:?}");
        Ok(())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
