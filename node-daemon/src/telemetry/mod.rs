//! One event, told once: every room emits an [`Event`], the [`Sink`] makes of it one log line and its counters, so the
//! two cannot disagree.
//!
//! In: events. Out: lines on stdout ([`log`]) and the registry that `/metrics` shows ([`metrics`]). A leaf: every room
//! may know it, it knows none of them.

pub mod event;
pub mod log;
pub mod metrics;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

pub use self::{
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
}

impl Sink {
    /// A sink with counters of its own, all at zero; lines go to the subscriber that is in force.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes the event's line and counts it.
    pub fn emit(&self, event: &Event) {
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
