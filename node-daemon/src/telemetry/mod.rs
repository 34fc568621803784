//! One event, told once: every room emits an [`Event`], the [`Sink`] makes of it one log line and its counters, so the
//! two cannot disagree.
//!
//! In: events. Out: lines on stdout ([`log`]), the registry that `/metrics` shows ([`metrics`]), and decisions for whoever
//! keeps them ([`decision`]). A leaf: every room
//! may know it, it knows none of them.

pub mod decision;
pub mod event;
pub mod log;
pub mod metrics;

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

pub use self::{
    decision::{Asked, Decision, NotRecorded, Recorder},
    event::{
        ConnectionRecord, Direction, Endpoint, Ends, Event, HandshakeRefusal, Path, Reason, RequestRecord,
        RouteReason, Shadow, Tls, Verdict,
    },
    metrics::{Metrics, RequestCounts},
};

/// Where events go. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Sink {
    metrics: Arc<Metrics>,
    /// The limit of label sets was told.
    told: Arc<AtomicBool>,
    connections: Arc<AtomicU64>,
    /// Where decisions are kept, if they are.
    recorder: Arc<OnceLock<Arc<dyn Recorder>>>,
}

impl Sink {
    /// A sink with counters of its own, all at zero; lines go to the subscriber that is in force.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of another connection, unique within the process.
    pub fn next_connection(&self) -> u64 {
        self.connections.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// From here on decisions of all clones of this sink are kept there. Only the first one counts.
    pub fn keep_decisions(&self, recorder: Arc<dyn Recorder>) {
        // A second one would be a fault of the wiring, and the first goes on.
        let _ = self.recorder.set(recorder);
    }

    /// Keeps a decision before it takes effect. `decision` is only asked for where decisions are kept.
    ///
    /// # Errors
    /// It must not take effect.
    pub fn decide(&self, decision: impl FnOnce() -> Decision) -> Result<(), NotRecorded> {
        self.recorder.get().map_or(Ok(()), |recorder| recorder.record(decision()))
    }

    /// Whether nothing may happen that finds no place where decisions are kept.
    pub fn must_record(&self) -> bool {
        self.recorder.get().is_some_and(|recorder| recorder.is_required())
    }

    /// A snapshot is about to come into force. `digest` is only asked for where decisions are kept.
    pub fn judging_by(&self, number: u64, digest: impl FnOnce() -> String) {
        if let Some(recorder) = self.recorder.get() {
            recorder.snapshot(number, &digest());
        }
    }

    /// Writes the event's line, counts it, and keeps the decision that it tells of.
    pub fn emit(&self, event: &Event) {
        if let Some(recorder) = self.recorder.get()
            && let Some(decision) = Decision::of(event)
        {
            // A no that finds no place stays a no; that there was one more is counted there.
            let _ = recorder.record(decision);
        }
        log::write(event);
        if let Some(limit) = self.metrics.count(event) {
            let reached = Event::LimitReached { limit, workload: None };
            // A limit that is met once is met by every event that follows: told once, counted each time.
            if !self.told.swap(true, Ordering::Relaxed) {
                log::write(&reached);
            }
            self.metrics.count(&reached);
        }
    }

    /// The counters, for whoever shows them.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }
}

#[cfg(test)]
mod tests;
