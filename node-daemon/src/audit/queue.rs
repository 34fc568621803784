//! Where decisions wait for the writer. Nobody who decides waits here.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::SystemTime,
};

use crate::{
    config::OnFull,
    telemetry::{Decision, NotRecorded, Recorder, Verdict},
};

/// Decisions that wait: 2 s of a node that decides 4,000 times a second, some 300 bytes each. At the limit they are dropped
/// and counted, or denied ([`OnFull`]).
pub(super) const DECISIONS_WAITING_MAX: usize = 8_192;

/// Snapshots that wait: more than are published while the writer is at one batch. At the limit the oldest goes; decisions
/// by it then name their number alone.
pub(super) const SNAPSHOTS_WAITING_MAX: usize = 64;

/// What waits.
pub(super) enum Item {
    Decided {
        at: SystemTime,
        decision: Box<Decision>,
    },
    /// Look whether it is time to stop.
    Wake,
}

/// Number and digest of a snapshot, and when it came into force.
#[derive(Clone, Debug)]
pub(super) struct Published {
    pub(super) at: SystemTime,
    pub(super) number: u64,
    pub(super) digest: Arc<str>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Queue {
    waiting: SyncSender<Item>,
    snapshots: Mutex<Vec<Published>>,
    on_full: OnFull,
    lost: AtomicU64,
    /// The log cannot be written at present.
    failing: AtomicBool,
    stopping: AtomicBool,
}

impl Queue {
    pub(super) fn new(on_full: OnFull) -> (Self, Receiver<Item>) {
        Self::within(on_full, DECISIONS_WAITING_MAX)
    }

    pub(super) fn within(on_full: OnFull, decisions_max: usize) -> (Self, Receiver<Item>) {
        let (waiting, items) = sync_channel(decisions_max);
        let queue = Self {
            waiting,
            snapshots: Mutex::default(),
            on_full,
            lost: AtomicU64::new(0),
            failing: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        };
        (queue, items)
    }

    /// Decisions that were dropped since this was asked last.
    pub(super) fn take_lost(&self) -> u64 {
        self.lost.swap(0, Ordering::Relaxed)
    }

    pub(super) fn take_snapshots(&self) -> Vec<Published> {
        std::mem::take(&mut *self.snapshots.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn set_failing(&self, failing: bool) {
        self.failing.store(failing, Ordering::Relaxed);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        // A writer whose queue is full is awake.
        let _ = self.waiting.try_send(Item::Wake);
    }

    /// Whether a yes that finds no place becomes a no.
    fn denies(&self, decision: &Decision) -> bool {
        self.is_required() && decision.verdict == Verdict::Allowed
    }

    fn refuse(&self, is_denied: bool) -> Result<(), NotRecorded> {
        if is_denied {
            return Err(NotRecorded);
        }
        self.lost.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Recorder for Queue {
    fn record(&self, decision: Decision) -> Result<(), NotRecorded> {
        let denies = self.denies(&decision);
        if self.is_stopping() || denies && self.failing.load(Ordering::Relaxed) {
            return self.refuse(denies);
        }
        match self.waiting.try_send(Item::Decided { at: SystemTime::now(), decision: Box::new(decision) }) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => self.refuse(denies),
        }
    }

    fn is_required(&self) -> bool {
        matches!(self.on_full, OnFull::Deny)
    }

    fn snapshot(&self, number: u64, digest: &str) {
        let mut snapshots = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        if snapshots.len() == SNAPSHOTS_WAITING_MAX {
            snapshots.remove(0);
        }
        snapshots.push(Published { at: SystemTime::now(), number, digest: digest.into() });
    }
}
