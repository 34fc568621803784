//! A process of the mesh: its output as a stream of JSON objects that can be waited for.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Lines shown when something was waited for in vain.
const LINES_SHOWN: usize = 40;

/// A running process and all that it has said.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: Log,
}

impl Process {
    /// Starts it; standard output and standard error both go to the log.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(name: &str, command: &mut Command) -> Result<Self> {
        Self::spawn(name, command.stdin(Stdio::null()).stdout(Stdio::piped()))
    }

    /// Starts it with a standard input to write to; standard output and standard error both go to the log.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_hearing(name: &str, command: &mut Command) -> Result<(Self, ChildStdin)> {
        let mut process = Self::spawn(name, command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let stdin = process.child.stdin.take().context("it is piped")?;
        Ok((process, stdin))
    }

    /// Starts it with its standard output appended to a file; the log has its standard error alone.
    ///
    /// # Errors
    /// If the file cannot be opened, or the process not be started.
    pub fn start_into(name: &str, command: &mut Command, file: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(file)
            .with_context(|| format!("opening {}", file.display()))?;
        Self::spawn(name, command.stdin(Stdio::null()).stdout(file))
    }

    fn spawn(name: &str, command: &mut Command) -> Result<Self> {
        let mut child = command.stderr(Stdio::piped()).spawn().with_context(|| format!("starting {name}"))?;
        let log = Log { name: name.to_owned(), shared: Arc::default() };
        if let Some(stdout) = child.stdout.take() {
            log.follow(stdout);
        }
        log.follow(child.stderr.take().expect("it is piped"));
        Ok(Self { child, log })
    }

    /// What it says.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("process ids are positive and small");
        // A process that just ended is what the signal is for anyway.
        let _ = kill(Pid::from_raw(pid), signal);
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it runs longer than the limit.
    #[track_caller]
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        // Both pipes close with the process, so the log knows of its end without asking again and again.
        if !self.log.wait_closed(limit) {
            panic!("{} runs longer than {limit:?}\n{}", self.log.name, self.log.tail());
        }
        self.child.wait().expect("it is our child")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- the last lines of {}\n{}", self.log.name, self.log.tail());
        }
    }
}

/// All that a process has said so far.
#[derive(Debug, Clone)]
pub struct Log {
    name: String,
    shared: Arc<(Mutex<Lines>, Condvar)>,
}

#[derive(Debug, Default)]
struct Lines {
    all: Vec<Value>,
    open: usize,
}

impl Log {
    /// How much has been said: [`Log::wait_from`] looks only behind it.
    pub fn position(&self) -> usize {
        self.lines().all.len()
    }

    /// What was said from a position on.
    pub fn since(&self, position: usize) -> Vec<Value> {
        self.lines().all[position..].to_vec()
    }

    /// Waits for a line behind a position. Lines that are no JSON objects are JSON strings.
    ///
    /// # Panics
    /// If none comes within the limit, with the last lines.
    #[track_caller]
    pub fn wait_from(
        &self,
        position: usize,
        what: &str,
        limit: Duration,
        is: impl Fn(&Value) -> bool,
    ) -> Value {
        self.try_wait_from(position, limit, is)
            .unwrap_or_else(|| panic!("{} does not say: {what}\n{}", self.name, self.tail()))
    }

    /// Waits for a line behind a position; `None` if none comes.
    pub fn try_wait_from(
        &self,
        position: usize,
        limit: Duration,
        is: impl Fn(&Value) -> bool,
    ) -> Option<Value> {
        let deadline = Instant::now() + limit;
        let mut seen = position;
        let mut lines = self.lines();
        loop {
            if let Some(found) = lines.all[seen..].iter().find(|line| is(line)) {
                return Some(found.clone());
            }
            seen = lines.all.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || lines.open == 0 {
                return None;
            }
            lines = self.shared.1.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The last lines, for a person.
    pub fn tail(&self) -> String {
        let lines = self.lines();
        // A connection that went well explains nothing.
        let telling = lines.all.iter().filter(|line| line["verdict"] != "allowed").collect::<Vec<_>>();
        telling[telling.len().saturating_sub(LINES_SHOWN)..]
            .iter()
            .map(|line| line.as_str().map_or_else(|| line.to_string(), str::to_owned))
            .collect::<Vec<_>>()
            .join("\n")
    }

    fn wait_closed(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut lines = self.lines();
        while lines.open > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            lines = self.shared.1.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn follow(&self, stream: impl Read + Send + 'static) {
        self.lines().open += 1;
        let log = self.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                let value =
                    serde_json::from_str(&line).ok().filter(Value::is_object).unwrap_or(Value::String(line));
                log.lines().all.push(value);
                log.shared.1.notify_all();
            }
            log.lines().open -= 1;
            log.shared.1.notify_all();
        });
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, Lines> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
