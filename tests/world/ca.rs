//! The certificate authority, which runs in the wire's namespace.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::cgroup::Cgroup;
use crate::documents::Documents;
use crate::namespace::Namespace;
use crate::process::{Log, Process};
use crate::{TRUST_DOMAIN, binary};

/// From start to the first accepted connection.
const START_TIME_MAX: Duration = Duration::from_secs(15);

/// Between two attempts to connect while it starts.
const START_TURN: Duration = Duration::from_millis(20);

/// One CA.
#[derive(Debug)]
pub struct Ca {
    root: PathBuf,
    address: SocketAddr,
    cgroup: Cgroup,
    process: Mutex<Option<Process>>,
    documents: Documents,
    workload_lifetime_seconds: Mutex<u32>,
}

impl Ca {
    pub(crate) fn create(world: &Path, group: &Cgroup, address: Ipv4Addr) -> Result<Self> {
        let root = world.join("ca");
        for folder in ["etc/culvert/registry.d", "var/lib/culvert-ca", "run/culvert"] {
            std::fs::create_dir_all(root.join(folder))?;
        }
        std::fs::set_permissions(
            root.join("var/lib/culvert-ca"),
            std::os::unix::fs::PermissionsExt::from_mode(0o700),
        )?;
        let documents = Documents::of(vec![root.join("etc/culvert/registry.d")]);
        Ok(Self {
            root,
            address: SocketAddr::from((address, 15012)),
            cgroup: group.below("ca")?,
            process: Mutex::default(),
            documents,
            workload_lifetime_seconds: Mutex::new(3600),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The folder of its keys.
    pub fn state(&self) -> PathBuf {
        self.root.join("var/lib/culvert-ca")
    }

    /// The registry alone.
    pub fn documents(&self) -> &Documents {
        &self.documents
    }

    /// Changes what the next start uses.
    pub fn set_workload_lifetime(&self, seconds: u32) {
        *self.workload_lifetime_seconds.lock().unwrap_or_else(PoisonError::into_inner) = seconds;
    }

    /// Starts it, and waits until it accepts, nodes and administrators.
    ///
    /// # Panics
    /// If it ends or does not accept in time.
    #[track_caller]
    pub fn start(&self, wire: &Namespace) {
        let config = self.write_config().expect("the world's folders are writable");
        let mut command = wire.command(&self.cgroup, &binary("culvert-ca"));
        command.arg("serve").arg("--config").arg(config).arg("--root").arg(&self.root);
        // Its lines are for people; colours would stand between the words that are sought.
        command.env("NO_COLOR", "1");
        let mut process = Process::start("culvert-ca", &mut command).expect("a shell can be started");
        let deadline = Instant::now() + START_TIME_MAX;
        let socket = self.root.join("run/culvert/ca.sock");
        while wire.run(|| TcpStream::connect(self.address)).is_err() || !socket.exists() {
            assert!(process.runs(), "culvert-ca ended\n{}", process.log().tail());
            assert!(Instant::now() < deadline, "culvert-ca does not listen\n{}", process.log().tail());
            std::thread::park_timeout(START_TURN);
        }
        *self.process() = Some(process);
    }

    /// Stops it with SIGTERM, and waits for its end.
    #[track_caller]
    pub fn stop(&self) {
        if let Some(mut process) = self.process().take() {
            process.signal(Signal::SIGTERM);
            process.wait(Duration::from_secs(10));
        }
    }

    /// What it says.
    ///
    /// # Panics
    /// If it was not started.
    #[track_caller]
    pub fn log(&self) -> Log {
        self.process().as_ref().expect("the CA was started").log().clone()
    }

    /// A join token for a node.
    ///
    /// # Errors
    /// With what the command said.
    pub fn token(&self, node: &str, lifetime: &str) -> Result<String> {
        let done = Command::new(binary("culvert-ca"))
            .args(["token", "create", "--node", node, "--ttl", lifetime, "--socket"])
            .arg(self.root.join("run/culvert/ca.sock"))
            .output()?;
        if !done.status.success() {
            bail!("culvert-ca token create: {}", String::from_utf8_lossy(&done.stderr));
        }
        let token = String::from_utf8(done.stdout)?.trim().to_owned();
        ensure!(
            !token.is_empty() && !token.contains('\n'),
            "culvert-ca token create prints one line, not {token:?}"
        );
        Ok(token)
    }

    /// How often it refused something: requests, by reason, and handshakes.
    ///
    /// # Panics
    /// If its status cannot be asked.
    #[track_caller]
    pub fn refusals(&self) -> BTreeMap<String, u64> {
        let done = Command::new(binary("culvert-ca"))
            .args(["status", "--socket"])
            .arg(self.root.join("run/culvert/ca.sock"))
            .output()
            .expect("culvert-ca can be started");
        assert!(done.status.success(), "culvert-ca status: {}", String::from_utf8_lossy(&done.stderr));
        let status: Value = serde_json::from_slice(&done.stdout).expect("culvert-ca status is JSON");
        let counters = status["counters"].as_object().expect("counters are in the status");
        counters
            .iter()
            .filter(|(name, _)| name.starts_with("refused") || name.starts_with("handshakes_failed"))
            .map(|(name, count)| (name.clone(), count.as_u64().unwrap_or_default()))
            .collect()
    }

    fn write_config(&self) -> Result<PathBuf> {
        let path = self.root.join("etc/culvert/ca.yaml");
        let root = self.root.display();
        let lifetime = *self.workload_lifetime_seconds.lock().unwrap_or_else(PoisonError::into_inner);
        let text = format!(
            "trustDomain: {TRUST_DOMAIN}
listen: \"{address}\"
state: {root}/var/lib/culvert-ca
adminSocket: {root}/run/culvert/ca.sock
registry: {root}/etc/culvert/registry.d
workloadLifetimeSeconds: {lifetime}
nodeLifetimeSeconds: 86400
",
            address = self.address
        );
        std::fs::write(&path, text)?;
        Ok(path)
    }

    fn process(&self) -> std::sync::MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tear_down(&self) {
        self.process().take();
    }
}
