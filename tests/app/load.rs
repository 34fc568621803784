//! Many connections at once, and the same again and again.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::Socket;
use world::protocol::{Connect, Failure, Load, Many, Storm};

use crate::{dial, failed, locked, milliseconds, spawn, talk};

/// Opens all of them, exchanges, closes.
pub(crate) fn many(wanted: &Many) -> Result<Load, Failure> {
    let load = Arc::new(Mutex::new(Load::default()));
    let parallel = wanted.parallel.clamp(1, wanted.count.max(1));
    let barrier = Arc::new(Barrier::new(parallel));
    let text: String = "0123456789abcdef".chars().cycle().take(wanted.bytes).collect();
    let text: Arc<str> = text.into();
    let mut threads = Vec::new();
    for lane in 0..parallel {
        let (wanted, load, barrier, text) = (wanted.clone(), load.clone(), barrier.clone(), text.clone());
        threads.push(
            spawn(move || run_lane(&wanted, lane, parallel, &barrier, &text, &load))
                .map_err(failed("thread"))?,
        );
    }
    for thread in threads {
        let _ = thread.join();
    }
    Ok(locked(&load).clone())
}

/// Every `parallel`-th connection from `lane` on. All lanes pass the barrier equally often, whatever fails.
fn run_lane(wanted: &Many, lane: usize, parallel: usize, barrier: &Barrier, text: &str, load: &Mutex<Load>) {
    for round in 0..wanted.count.div_ceil(parallel) {
        let index = round * parallel + lane;
        let started = Instant::now();
        let opened = (index < wanted.count)
            .then(|| dial::dial(&connect(&wanted.to, index, wanted.mapped, wanted.timeout_ms)));
        if wanted.together {
            barrier.wait();
        }
        if let Some(opened) = opened {
            let ended = opened.and_then(|socket| exchange(&socket, text));
            count(&mut locked(load), ended, started);
        }
    }
}

/// A storm that runs.
pub(crate) struct Running {
    stop: AtomicBool,
    attempts: AtomicU64,
    load: Mutex<Load>,
    changed: Condvar,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Starts the loops.
pub(crate) fn start(wanted: Storm) -> io::Result<Arc<Running>> {
    let running = Arc::new(Running {
        stop: AtomicBool::new(false),
        attempts: AtomicU64::new(0),
        load: Mutex::new(Load::default()),
        changed: Condvar::new(),
        threads: Mutex::new(Vec::new()),
    });
    for _ in 0..wanted.parallel.max(1) {
        let (running_here, wanted) = (running.clone(), wanted.clone());
        let thread = spawn(move || running_here.run(&wanted))?;
        locked(&running.threads).push(thread);
    }
    Ok(running)
}

impl Running {
    fn run(&self, wanted: &Storm) {
        let text: String = wanted.text.chars().cycle().take(wanted.bytes).collect();
        while !self.stop.load(Ordering::Relaxed) {
            let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
            if attempt >= wanted.attempts_max {
                break;
            }
            let started = Instant::now();
            let index = usize::try_from(attempt).unwrap_or(0);
            let ended = dial::dial(&connect(&wanted.to, index, false, wanted.timeout_ms))
                .and_then(|socket| exchange(&socket, &text));
            count(&mut locked(&self.load), ended, started);
            self.changed.notify_all();
        }
    }

    /// Waits for `more` successes.
    pub(crate) fn progress(&self, more: u64, limit: Duration) -> Result<Load, Failure> {
        let deadline = Instant::now() + limit;
        let mut load = locked(&self.load);
        let wanted = load.succeeded + more;
        while load.succeeded < wanted {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure { step: "storm".to_owned(), errno: format!("{load:?}") });
            }
            load = self.changed.wait_timeout(load, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(load.clone())
    }

    /// Lets the running attempts end.
    pub(crate) fn stop(&self) -> Load {
        self.stop.store(true, Ordering::Relaxed);
        for thread in locked(&self.threads).drain(..) {
            let _ = thread.join();
        }
        locked(&self.load).clone()
    }
}

fn connect(to: &[std::net::SocketAddr], index: usize, mapped: bool, timeout_ms: u64) -> Connect {
    let mut connect = Connect::to(to[index % to.len()]);
    connect.timeout_ms = timeout_ms;
    connect.mapped = mapped;
    connect
}

fn exchange(socket: &Socket, text: &str) -> Result<(), Failure> {
    if talk::exchange(socket, text)? == text {
        return Ok(());
    }
    Err(Failure { step: "receive".to_owned(), errno: "mismatch".to_owned() })
}

fn count(load: &mut Load, ended: Result<(), Failure>, started: Instant) {
    load.attempts += 1;
    match ended {
        Ok(()) => {
            load.succeeded += 1;
            load.slowest_ms = load.slowest_ms.max(milliseconds(started.elapsed()));
        }
        Err(failure) => *load.failed.entry(failure.to_string()).or_default() += 1,
    }
}
