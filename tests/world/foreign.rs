//! Programs that others wrote, in a pod: nginx, curl, and Python programs that speak gRPC and WebSocket.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::expect::is;
use crate::pod::Pod;
use crate::process::{Log, Process};

/// From start to listening: a Python program with gRPC takes a second on a machine with other work.
const START_TIME_MAX: Duration = Duration::from_secs(30);

/// Every command of the Python programs ends within its own limits; this is for one that died.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(90);

/// What nginx says, at level notice, once its ports are open.
const NGINX_LISTENS: &str = "event method";

/// A Python program of `tests/peers` that does as it is told.
#[derive(Debug)]
pub struct Dialogue {
    process: Process,
    stdin: Mutex<ChildStdin>,
    numbers: AtomicU64,
}

/// An answer under way.
#[derive(Debug)]
pub struct Asked<'a> {
    dialogue: &'a Dialogue,
    number: u64,
    position: usize,
    what: String,
}

/// An nginx in the foreground, with one process. Its access log goes to standard output, where JSON is understood.
#[derive(Debug)]
pub struct Nginx {
    process: Process,
}

impl Pod {
    /// A command that runs where the pod's application does.
    ///
    /// # Panics
    /// If there is no such program on this machine.
    #[track_caller]
    pub fn command(&self, program: &str) -> Command {
        let path = installed(program).unwrap_or_else(|| {
            panic!("{program} is not on this machine: `cargo xtask test` installs it, or names its package")
        });
        self.namespace().command(self.cgroup(), &path)
    }

    /// Runs a program to its end, which it must come to by itself.
    ///
    /// # Panics
    /// If it cannot be started.
    #[track_caller]
    pub fn run(&self, program: &str, arguments: &[&str]) -> Output {
        self.command(program).args(arguments).output().expect("a shell can be started")
    }

    /// Starts a Python program of `tests/peers`, and waits until it is ready.
    ///
    /// # Panics
    /// If it is not.
    #[track_caller]
    pub fn python(&self, script: &str, arguments: &[&str]) -> Dialogue {
        self.try_python(script, arguments).unwrap_or_else(|error| panic!("{script}: {error:#}"))
    }

    fn try_python(&self, script: &str, arguments: &[&str]) -> Result<Dialogue> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers");
        let mut command = self.command("python3");
        // No proxy of the machine's own stands between a peer and the mesh.
        for proxy in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env_remove(proxy);
        }
        command
            .env("PYTHONPATH", python_packages()?)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .arg(folder.join(script))
            .args(arguments);
        let (process, stdin) = Process::start_hearing(&format!("{script} of {}", self.name()), &mut command)?;
        process.log().wait_from(0, "that it is ready", START_TIME_MAX, |line| is(line, "event", "ready"));
        Ok(Dialogue { process, stdin: Mutex::new(stdin), numbers: AtomicU64::new(1) })
    }

    /// Starts an nginx with the sections `events` and `http` as given, and waits until it listens.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn nginx(&self, folder: &Path, http: &str) -> Nginx {
        let prefix = folder.join(format!("nginx-{}", self.name()));
        std::fs::create_dir_all(&prefix).expect("the world's folders are writable");
        // Whoever serves uploads and temporary files must be allowed to.
        let config = format!(
            "daemon off;
master_process off;
user root;
pid {prefix}/nginx.pid;
error_log stderr notice;
events {{ worker_connections 4096; }}
http {{
access_log off;
client_body_temp_path {prefix}/body;
proxy_temp_path {prefix}/proxy;
fastcgi_temp_path {prefix}/fastcgi;
uwsgi_temp_path {prefix}/uwsgi;
scgi_temp_path {prefix}/scgi;
{http}
}}
",
            prefix = prefix.display()
        );
        let file = prefix.join("nginx.conf");
        std::fs::write(&file, config).expect("the world's folders are writable");
        let mut command = self.command("nginx");
        command.arg("-p").arg(&prefix).arg("-c").arg(&file).args(["-e", "stderr"]);
        let name = format!("nginx of {}", self.name());
        let process = Process::start(&name, &mut command).expect("a shell can be started");
        process.log().wait_from(0, "that it listens", START_TIME_MAX, |line| {
            line.as_str().is_some_and(|line| line.contains(NGINX_LISTENS))
        });
        Nginx { process }
    }
}

impl Nginx {
    /// Its access log as JSON, and what else it says.
    pub fn log(&self) -> &Log {
        self.process.log()
    }
}

impl Dialogue {
    /// What it says besides its answers.
    pub fn log(&self) -> &Log {
        self.process.log()
    }

    /// Begins a command.
    ///
    /// # Panics
    /// If the program is gone.
    #[track_caller]
    pub fn begin(&self, what: &str, mut arguments: Value) -> Asked<'_> {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        arguments["id"] = json!(number);
        arguments["do"] = json!(what);
        let position = self.log().position();
        let mut line = arguments.to_string();
        line.push('\n');
        let written = self.stdin.lock().expect("no holder panics").write_all(line.as_bytes());
        written.unwrap_or_else(|error| panic!("the program is gone: {error}\n{}", self.log().tail()));
        Asked { dialogue: self, number, position, what: line }
    }

    /// Does a command, which must not fail.
    ///
    /// # Panics
    /// If it fails.
    #[track_caller]
    pub fn ask(&self, what: &str, arguments: Value) -> Value {
        self.begin(what, arguments).answer()
    }

    /// Does a command that may fail.
    ///
    /// # Errors
    /// With what failed.
    #[track_caller]
    pub fn try_ask(&self, what: &str, arguments: Value) -> Result<Value, String> {
        self.begin(what, arguments).outcome()
    }
}

impl Asked<'_> {
    /// Waits for the answer.
    ///
    /// # Panics
    /// If the command fails.
    #[track_caller]
    pub fn answer(self) -> Value {
        let what = self.what.clone();
        self.outcome().unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// Waits for the answer.
    ///
    /// # Errors
    /// With what failed.
    #[track_caller]
    pub fn outcome(self) -> Result<Value, String> {
        let number = self.number;
        let line = self.dialogue.log().wait_from(self.position, &self.what, ANSWER_TIME_MAX, |line| {
            line["id"].as_u64() == Some(number)
        });
        match line["error"].as_str() {
            Some(error) => Err(error.to_owned()),
            None => Ok(line["answer"].clone()),
        }
    }
}

/// Where a program is, administrators' folders included.
fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

/// Where `cargo xtask test` puts the Python packages of `tests/peers/requirements.txt`.
fn python_packages() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    let folder = base.join("culvert/tools/python-peers");
    anyhow::ensure!(
        folder.is_dir(),
        "{} is not there: `cargo xtask test` installs gRPC and WebSocket for Python into it",
        folder.display()
    );
    Ok(folder)
}
