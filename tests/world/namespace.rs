//! A network namespace, and what runs inside it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};

use crate::cgroup::Cgroup;

/// Where `ip netns` keeps them, and where the documents of this project expect them.
pub(crate) const FOLDER: &str = "/run/netns";

/// A named network namespace; gone when this value is.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    path: PathBuf,
}

impl Namespace {
    /// Makes a namespace with its loopback up.
    ///
    /// # Errors
    /// If `ip` is missing, refuses, or the name is taken.
    pub fn create(name: &str) -> Result<Self> {
        let made = Command::new("ip")
            .args(["netns", "add", name])
            .output()
            .context("running ip (package iproute2)")?;
        ensure!(made.status.success(), "ip netns add {name}: {}", String::from_utf8_lossy(&made.stderr));
        let namespace = Self { name: name.to_owned(), path: Path::new(FOLDER).join(name) };
        // No address of a world is doubtful, and waiting for the kernel to find that out takes seconds.
        for sysctl in ["net/ipv6/conf/default/accept_dad", "net/ipv6/conf/default/dad_transmits"] {
            namespace.set_sysctl(sysctl, "0")?;
        }
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file under `/run/netns`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs lines of `ip` commands inside. All of them, or one that begins with an option such as `-6`.
    ///
    /// # Errors
    /// With what `ip` said about the first line that failed.
    pub fn ip(&self, lines: &str) -> Result<String> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path.display())).arg("ip");
        let alone = lines.starts_with('-');
        if alone {
            command.args(lines.split(' '));
        } else {
            command.args(["-batch", "-"]);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("running nsenter (package util-linux)")?;
        let mut stdin = child.stdin.take().expect("it is piped");
        if !alone {
            stdin.write_all(lines.as_bytes())?;
        }
        drop(stdin);
        let done = child.wait_with_output()?;
        ensure!(
            done.status.success(),
            "in {}: ip: {}\n{lines}",
            self.name,
            String::from_utf8_lossy(&done.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    }

    /// Sets a per-namespace sysctl, such as `net/ipv4/ip_forward`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.run(|| std::fs::write(&path, value)).with_context(|| format!("{} = {value}", path.display()))
    }

    /// Reads a per-namespace sysctl.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        let path = Path::new("/proc/sys").join(key);
        let text = self.run(|| std::fs::read_to_string(&path)).with_context(|| path.display().to_string())?;
        Ok(text.trim().to_owned())
    }

    /// Runs a body on a thread of its own inside the namespace; sockets that it opens stay there.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter();
                body()
            });
            match inside.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Moves the calling thread inside, for good.
    pub fn enter(&self) {
        let file = File::open(&self.path).expect("the namespace exists as long as this value");
        setns(file, CloneFlags::CLONE_NEWNET).expect("the tests run as root");
    }

    /// A command that runs inside, in a cgroup from its first instruction on.
    pub fn command(&self, cgroup: &Cgroup, program: &Path) -> Command {
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(r#"echo $$ > "$1" && shift && exec nsenter "$@""#)
            .arg("sh")
            .arg(cgroup.path().join("cgroup.procs"))
            .arg(format!("--net={}", self.path.display()))
            .arg("--")
            .arg(program);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Removes a namespace by name; nothing to do if it is gone.
pub(crate) fn remove(name: &str) {
    let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
}
