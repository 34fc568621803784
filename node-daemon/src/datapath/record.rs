//! One connection's line in the access log, from accept to end.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use node_core::{
    policy::{Denial, Verdict as Deciding},
    snapshot::{Decided, RouteRefusal, Snapshot},
    workload::{ObjectName, Protocol, Workload},
};
use spiffe_id::SpiffeId;

use super::live::{Cut, Registration};
use crate::{
    net::Progress,
    telemetry::{
        ConnectionRecord, Decision, Direction, Endpoint, Ends, Event, Path, Reason, RouteReason, Shadow,
        Sink, Tls, Verdict,
    },
};

/// How a connection went.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) verdict: Verdict,
    pub(super) reason: Option<Reason>,
    pub(super) detail: Option<String>,
    pub(super) deciding: Option<Box<Deciding>>,
}

impl Ending {
    /// Both ends closed in order.
    pub(super) fn finished() -> Self {
        Self { verdict: Verdict::Allowed, reason: None, detail: None, deciding: None }
    }

    /// It was admitted, and ended otherwise than in order.
    pub(super) fn broken(reason: Reason, detail: impl ToString) -> Self {
        Self {
            verdict: Verdict::Allowed,
            reason: Some(reason),
            detail: Some(detail.to_string()),
            deciding: None,
        }
    }

    /// Somebody said no.
    pub(super) fn denied(reason: Reason, detail: impl ToString) -> Self {
        Self {
            verdict: Verdict::Denied,
            reason: Some(reason),
            detail: Some(detail.to_string()),
            deciding: None,
        }
    }

    pub(super) const fn is_denial(&self) -> bool {
        matches!(self.verdict, Verdict::Denied)
    }

    /// Nobody said no, but it did not come about.
    pub(super) fn failed(reason: Reason, detail: impl ToString) -> Self {
        Self {
            verdict: Verdict::Failed,
            reason: Some(reason),
            detail: Some(detail.to_string()),
            deciding: None,
        }
    }
}

impl From<Denial> for Ending {
    fn from(denial: Denial) -> Self {
        Self {
            verdict: Verdict::Denied,
            reason: Some(Reason::Policy(denial.reason)),
            detail: None,
            deciding: Some(Box::new(denial.verdict)),
        }
    }
}

impl From<RouteRefusal> for Ending {
    fn from(refusal: RouteRefusal) -> Self {
        let reason = match refusal {
            RouteRefusal::NoEndpoints { .. } => RouteReason::NoEndpoints,
            RouteRefusal::NoSuchServicePort { .. } => RouteReason::NoSuchServicePort,
            RouteRefusal::SecureNamingEmpty(_) => RouteReason::SecureNamingEmpty,
            RouteRefusal::OwnAddress => RouteReason::OwnAddress,
            RouteRefusal::ClientRule { .. } => RouteReason::ClientRule,
        };
        let deciding = match &refusal {
            RouteRefusal::ClientRule { rule, .. } => {
                Some(Box::new(Deciding { policy: Some(Arc::clone(rule)), ..Deciding::default() }))
            }
            RouteRefusal::NoEndpoints { .. }
            | RouteRefusal::NoSuchServicePort { .. }
            | RouteRefusal::SecureNamingEmpty(_)
            | RouteRefusal::OwnAddress => None,
        };
        Self { deciding, ..Self::denied(Reason::Route(reason), refusal) }
    }
}

impl From<Cut> for Ending {
    fn from(cut: Cut) -> Self {
        match cut {
            Cut::Denied(denial) => (*denial).into(),
            Cut::Rerouted(Some(refusal)) => refusal.into(),
            Cut::Rerouted(None) => Self::denied(
                Reason::Route(RouteReason::NoEndpoints),
                "the way that it took leads there no longer",
            ),
            Cut::Respoken(decided) => Self {
                deciding: decided.map(|decided| Box::new(said_by(*decided))),
                ..Self::denied(
                    Reason::Route(RouteReason::ClientRule),
                    "by the rules of its own side it is spoken otherwise by now",
                )
            },
            Cut::Rejudged => Self::broken(
                Reason::Rejudged,
                "its port is judged by requests, and was not, or the other way round",
            ),
            Cut::WorkloadLeft => Self::broken(Reason::WorkloadLeft, "its workload left the mesh, or changed"),
            Cut::Drained => Self::broken(Reason::Drained, "the daemon drained for its full time"),
        }
    }
}

/// The record under way. [`Record::end`] tells it; exactly once.
pub(super) struct Record {
    started: Instant,
    events: Sink,
    ends: Arc<Ends>,
    opened: bool,
    deciding: Option<Deciding>,
    tls: Option<Tls>,
    progress: Arc<Progress>,
    snapshot: u64,
}

impl Record {
    pub(super) fn new(
        events: &Sink,
        connection: u64,
        direction: Direction,
        path: Path,
        client: SocketAddr,
        target: SocketAddr,
    ) -> Self {
        let at = |address| Endpoint { address: Some(address), ..Endpoint::default() };
        let ends = Ends {
            connection,
            direction,
            path,
            source: at(client),
            destination: at(target),
            service: None,
            protocol: "tcp",
            mutual_tls: false,
        };
        Self {
            started: Instant::now(),
            events: events.clone(),
            ends: Arc::new(ends),
            opened: false,
            deciding: None,
            tls: None,
            progress: Arc::default(),
            snapshot: 0,
        }
    }

    /// What more became known of the ends.
    pub(super) fn learn(&mut self, learn: impl FnOnce(&mut Ends)) {
        learn(Arc::make_mut(&mut self.ends));
    }

    pub(super) fn judged_by(&mut self, snapshot: u64) {
        self.snapshot = snapshot;
    }

    pub(super) fn allowed_by(&mut self, deciding: &Deciding) {
        self.deciding = Some(deciding.clone());
        // Of a connection inside the node it is known already which one was asked for.
        self.learn(|ends| ends.service = ends.service.take().or_else(|| deciding.service.clone()));
    }

    /// What a rule of the client's side said of it, if one did.
    pub(super) fn leaves_by(&mut self, decided: Option<Decided>, service: Option<ObjectName>) {
        self.deciding = decided.map(said_by);
        self.learn(|ends| ends.service = service);
    }

    pub(super) fn secured_by(&mut self, tls: Tls) {
        self.encrypted_by(tls, true);
    }

    /// `is_mutual`: both ends were authenticated.
    pub(super) fn encrypted_by(&mut self, tls: Tls, is_mutual: bool) {
        self.tls = Some(tls);
        self.learn(|ends| ends.mutual_tls = is_mutual);
    }

    pub(super) fn ends(&self) -> Arc<Ends> {
        Arc::clone(&self.ends)
    }

    pub(super) fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// It was allowed, which is kept before its first byte flows.
    pub(super) fn decided(&self) -> Result<(), Ending> {
        let decision = || {
            let deciding = self.deciding.clone().unwrap_or_default();
            Decision::allowed(Arc::clone(&self.ends), None, deciding, self.snapshot)
        };
        self.events.decide(decision).map_err(|not| Ending::denied(Reason::AuditUnavailable, not))
    }

    /// The first byte may flow.
    pub(super) fn opened(&mut self) {
        self.opened = true;
        self.events.emit(&Event::ConnectionOpened(Arc::clone(&self.ends)));
    }

    /// What later snapshots said of it.
    pub(super) fn rejudged(&mut self, registration: &Registration) {
        self.snapshot = registration.snapshot();
        if let Some(deciding) = registration.deciding() {
            self.deciding = Some(deciding);
        }
    }

    pub(super) fn end(self, ending: Ending) {
        let deciding = ending.deciding.map(|deciding| *deciding).or(self.deciding).unwrap_or_default();
        self.events.emit(&Event::ConnectionEnded(Box::new(ConnectionRecord {
            ends: self.ends,
            opened: self.opened,
            verdict: ending.verdict,
            policy: deciding.policy,
            rule: deciding.rule,
            reason: ending.reason,
            detail: ending.detail,
            shadow: deciding.shadow.map(Shadow::from),
            audit: deciding.audit,
            tls: self.tls,
            bytes_in: self.progress.forward(),
            bytes_out: self.progress.back(),
            duration: self.started.elapsed(),
            snapshot: self.snapshot,
        })));
    }
}

fn said_by(decided: Decided) -> Deciding {
    let Decided { policy, rule } = decided;
    Deciding { policy: Some(policy), rule: Some(rule), ..Deciding::default() }
}

/// What the documents say of a workload, as one end of a connection.
pub fn workload_end(workload: &Workload, address: SocketAddr) -> Endpoint {
    Endpoint {
        address: Some(address),
        workload: Some(workload.name.clone()),
        identity: Some(workload.identity.clone()),
        node: Some(workload.node.as_str().into()),
    }
}

/// What the documents say of whoever has this address; an identity is not guessed from it.
pub(super) fn known_end(snapshot: &Snapshot, address: SocketAddr) -> Endpoint {
    let known = snapshot.workload_at(address.ip(), address.port());
    Endpoint {
        address: Some(address),
        workload: known.map(|known| known.name.clone()),
        identity: None,
        node: known.map(|known| known.node.as_str().into()),
    }
}

/// A peer that has proven who it is; the workload of its address is named only if it may be that one.
pub(super) fn proven_end(snapshot: &Snapshot, address: SocketAddr, identity: &SpiffeId) -> Endpoint {
    let known = snapshot.workload_at(address.ip(), address.port());
    let same = |known: &&Arc<Workload>| {
        (known.identity.namespace(), known.identity.service_account())
            == (identity.namespace(), identity.service_account())
    };
    let known = known.filter(same);
    Endpoint {
        address: Some(address),
        workload: known.map(|known| known.name.clone()),
        identity: Some(identity.clone()),
        node: known.map(|known| known.node.as_str().into()),
    }
}

/// The word for what a port declares.
pub fn protocol_of(workload: &Workload, port: u16) -> &'static str {
    let declared = workload.ports.iter().find(|declared| declared.port == port);
    match declared.map(|declared| declared.protocol) {
        Some(Protocol::Http) => "http",
        Some(Protocol::Grpc) => "grpc",
        Some(Protocol::Tcp) | None => "tcp",
    }
}
