//! One request from its arrival to the last byte of its answer, and the line that tells of it.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use http::{Method, StatusCode, uri::PathAndQuery};
use node_core::policy::{Denial, RequestDenial, RequestPermit, Verdict as Deciding};

use super::flights::{Airborne, Waiter};
use crate::telemetry::{
    Asked, Decision, Ends, Event, NotRecorded, Reason, RequestCounts, RequestRecord, Shadow, Sink, Verdict,
};

/// What all requests of a connection tell alike.
pub(super) struct Telling {
    pub(super) events: Sink,
    pub(super) ends: Arc<Ends>,
    pub(super) counts: Arc<RequestCounts>,
}

/// See the module. Tells when it is dropped, exactly once.
pub(super) struct Exchange {
    telling: Arc<Telling>,
    started: Instant,
    airborne: Option<Airborne>,
    protocol: &'static str,
    method: Method,
    path: Option<PathAndQuery>,
    host: Option<String>,
    status: StatusCode,
    outcome: Outcome,
    deciding: Deciding,
    snapshot: u64,
}

/// How it went.
struct Outcome {
    verdict: Verdict,
    reason: Option<Reason>,
    detail: Option<&'static str>,
}

impl Exchange {
    /// Until it is known better, the client went away before its answer.
    pub(super) fn new(
        telling: Arc<Telling>,
        protocol: &'static str,
        method: Method,
        path: Option<PathAndQuery>,
    ) -> Self {
        Self {
            telling,
            started: Instant::now(),
            airborne: None,
            protocol,
            method,
            path,
            host: None,
            status: STATUS_NONE,
            outcome: Outcome { verdict: Verdict::Failed, reason: Some(Reason::ClientReset), detail: None },
            deciding: Deciding::default(),
            snapshot: 0,
        }
    }

    /// Whom the client means.
    pub(super) fn asks_for(&mut self, host: Option<&str>) {
        self.host = host.map(str::to_owned);
    }

    pub(super) fn judged_by(&mut self, snapshot: u64) {
        self.snapshot = snapshot;
    }

    /// The path as it was judged.
    pub(super) fn permitted(&mut self, permit: &RequestPermit, path: Option<PathAndQuery>) {
        self.outcome = Outcome { verdict: Verdict::Allowed, reason: Some(Reason::ClientReset), detail: None };
        self.deciding = permit.verdict().clone();
        self.path = path.or_else(|| self.path.take());
    }

    /// It was allowed, which is kept before it goes to the workload.
    pub(super) fn decided(&self) -> Result<(), NotRecorded> {
        self.telling.events.decide(|| {
            let (protocol, method, path) = (self.protocol, self.method.clone(), self.path.clone());
            let asked = Asked { protocol, method, path };
            Decision::allowed(
                Arc::clone(&self.telling.ends),
                Some(asked),
                self.deciding.clone(),
                self.snapshot,
            )
        })
    }

    /// It is under way: a later snapshot may end it.
    pub(super) fn takes_off(&mut self, airborne: Airborne) {
        self.airborne = Some(airborne);
    }

    pub(super) fn denied(&mut self, denial: &RequestDenial, status: u16) {
        self.deciding = denial.verdict.clone();
        self.answered(
            StatusCode::from_u16(status).unwrap_or(StatusCode::FORBIDDEN),
            Verdict::Denied,
            Some(Reason::Policy(denial.reason)),
            denial.token_fault.map(|fault| fault.label()),
        );
    }

    /// Its connection may not be here any more.
    pub(super) fn turned_away(&mut self, denial: Denial, status: StatusCode) {
        self.deciding = denial.verdict;
        self.answered(status, Verdict::Denied, Some(Reason::Policy(denial.reason)), None);
    }

    /// With a text of ours, or with an answer of the workload's that has no body.
    pub(super) fn answered(
        &mut self,
        status: StatusCode,
        verdict: Verdict,
        reason: Option<Reason>,
        detail: Option<&'static str>,
    ) {
        self.status = status;
        self.outcome = Outcome { verdict, reason, detail };
    }

    /// The workload began to answer.
    pub(super) fn begins(&mut self, status: StatusCode) {
        self.status = status;
    }

    /// The answer arrived whole.
    pub(super) fn finished(&mut self) {
        self.outcome.reason = None;
    }

    /// The workload broke off.
    pub(super) fn broken(&mut self, error: &hyper::Error) {
        tracing::debug!(%error, "answer broke off");
        self.outcome.reason = Some(Reason::ServerReset);
    }

    /// Ready once it lost its permission; what is told of it then says so.
    pub(super) fn poll_cut(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(airborne) = &self.airborne else { return Poll::Pending };
        let Poll::Ready(denial) = airborne.flight().poll_cut(context, Waiter::Response) else {
            return Poll::Pending;
        };
        self.deciding = denial.verdict.clone();
        self.outcome =
            Outcome { verdict: Verdict::Denied, reason: Some(Reason::Policy(denial.reason)), detail: None };
        Poll::Ready(())
    }

    pub(super) fn airborne(&self) -> Option<&Airborne> {
        self.airborne.as_ref()
    }
}

/// Stands for a request that got no answer, as in nginx.
const STATUS_NONE: StatusCode = match StatusCode::from_u16(499) {
    Ok(status) => status,
    Err(_) => StatusCode::BAD_REQUEST,
};

impl Drop for Exchange {
    fn drop(&mut self) {
        let deciding = std::mem::take(&mut self.deciding);
        let later = self.airborne.as_ref().map(|airborne| airborne.flight().snapshot());
        self.telling.events.emit(&Event::RequestEnded(Box::new(RequestRecord {
            ends: Arc::clone(&self.telling.ends),
            counts: Arc::clone(&self.telling.counts),
            protocol: self.protocol,
            method: std::mem::take(&mut self.method),
            path: self.path.take(),
            host: self.host.take(),
            status: self.status.as_u16(),
            verdict: self.outcome.verdict,
            policy: deciding.policy,
            rule: deciding.rule,
            reason: self.outcome.reason,
            detail: self.outcome.detail,
            shadow: deciding.shadow.map(Shadow::from),
            audit: deciding.audit,
            duration: self.started.elapsed(),
            snapshot: later.unwrap_or(self.snapshot),
        })));
    }
}
