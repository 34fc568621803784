//! What the policy answered, for whoever keeps such answers: the audit log.

use std::{fmt, sync::Arc};

use node_core::policy::Verdict as Deciding;

use super::event::{ConnectionRecord, Ends, Event, Reason, RequestRecord, Shadow, Verdict};

/// One answer.
#[derive(Clone, Debug)]
pub struct Decision {
    pub ends: Arc<Ends>,
    /// `None`: of the connection as a whole.
    pub request: Option<Asked>,
    pub verdict: Verdict,
    pub policy: Option<Arc<str>>,
    pub rule: Option<Arc<str>>,
    pub reason: Option<Reason>,
    /// What the answer would be if everything were enforced that is only tried; `None`: nothing is.
    pub shadow: Option<Shadow>,
    /// The AUDIT policy that records it (policy F-3).
    pub audit: Option<Arc<str>>,
    /// Number of the snapshot by which it was judged.
    pub snapshot: u64,
}

/// What a request asked for.
#[derive(Clone, Debug)]
pub struct Asked {
    pub protocol: &'static str,
    pub method: http::Method,
    pub path: Option<http::uri::PathAndQuery>,
}

/// Keeps decisions. It never waits.
pub trait Recorder: fmt::Debug + Send + Sync {
    /// Takes one.
    ///
    /// # Errors
    /// It found no place, and the operator wants nothing to happen that is not recorded: the answer is to be no.
    fn record(&self, decision: Decision) -> Result<(), NotRecorded>;

    /// Whether nothing may happen that is not recorded.
    fn is_required(&self) -> bool;

    /// A snapshot of this number and digest comes into force: told before anything is judged by it.
    fn snapshot(&self, number: u64, digest: &str);
}

/// A decision found no place, and must not stand without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the audit log takes no records, and what is not recorded is denied (audit.onFull)")]
pub struct NotRecorded;

impl Decision {
    /// A yes, by what decided.
    pub fn allowed(ends: Arc<Ends>, request: Option<Asked>, deciding: Deciding, snapshot: u64) -> Self {
        Self {
            ends,
            request,
            verdict: Verdict::Allowed,
            policy: deciding.policy,
            rule: deciding.rule,
            reason: None,
            shadow: deciding.shadow.map(Shadow::from),
            audit: deciding.audit,
            snapshot,
        }
    }

    /// What an event says of decisions that were not recorded when they were made: an allowed connection or request was, before
    /// its first byte.
    pub(super) fn of(event: &Event) -> Option<Self> {
        if let Event::ConnectionEnded(record) = event {
            return Self::of_connection(record);
        }
        if let Event::RequestEnded(record) = event { Self::of_request(record) } else { None }
    }

    fn of_connection(record: &ConnectionRecord) -> Option<Self> {
        let was_recorded = record.opened && record.verdict == Verdict::Allowed;
        (!was_recorded).then(|| Self {
            ends: Arc::clone(&record.ends),
            request: None,
            verdict: record.verdict,
            policy: record.policy.clone(),
            rule: record.rule.clone(),
            reason: record.reason,
            shadow: record.shadow.clone(),
            audit: record.audit.clone(),
            snapshot: record.snapshot,
        })
    }

    fn of_request(record: &RequestRecord) -> Option<Self> {
        (record.verdict == Verdict::Denied).then(|| Self {
            ends: Arc::clone(&record.ends),
            request: Some(Asked {
                protocol: record.protocol,
                method: record.method.clone(),
                path: record.path.clone(),
            }),
            verdict: record.verdict,
            policy: record.policy.clone(),
            rule: record.rule.clone(),
            reason: record.reason,
            shadow: record.shadow.clone(),
            audit: record.audit.clone(),
            snapshot: record.snapshot,
        })
    }
}
