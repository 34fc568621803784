//! Open connections, and what became of their right to be open.
//!
//! Whoever opens one registers it with the number of the snapshot that it was judged by, then
//! [confirms](Registration::confirm) it against the current one, and only then lets the first byte through. A publish in between
//! is seen by one of the two sides: by the confirmation if it came before, by [`Live::rejudge`] if after (T-18).

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use node_core::{
    policy::{Admission, ConnectionFacts, Denial, DenialReason, Verdict as Deciding},
    snapshot::{Decided, Leaving, Originated, Route, RouteRefusal, Snapshot},
    workload::{ObjectName, Workload},
};
use spiffe_id::SpiffeId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::requests::Flights;
use crate::{net::Progress, telemetry::Ends};

/// Connections judged between two pauses, so that a change of policy does not hold up a thread of the runtime: some
/// 5 us each.
pub(super) const REJUDGED_AT_ONCE: usize = 256;

/// What a connection was allowed by, in a form that can be asked again.
#[derive(Clone)]
pub(super) enum Judged {
    /// The policy of the destination, which runs here.
    Inbound(ConnectionFacts),
    /// The same policy, which judges each request.
    Requests(Arc<Flights>),
    /// Route, secure naming and enrolment of the source, which runs here.
    Tunnel(TakenWay),
    /// Both: it stays inside the node.
    Local(TakenWay, Box<Judged>),
    /// Still outside the mesh, or past the tunnel, and spoken so?
    Straight(StraightWay),
}

/// The way past the tunnel that a connection took.
#[derive(Clone)]
pub(super) struct StraightWay {
    pub(super) source: Arc<Workload>,
    /// Where the application dialled.
    pub(super) target: SocketAddr,
    pub(super) seed: u64,
    /// Where the server is.
    pub(super) endpoint: SocketAddr,
    /// What is spoken there on the workload's behalf.
    pub(super) originated: Option<Arc<Originated>>,
    /// Whether a rule said so.
    pub(super) is_by_rule: bool,
}

/// The way through the mesh that a connection took, in a form that can be asked again.
#[derive(Clone)]
pub(super) struct TakenWay {
    pub(super) source: Arc<Workload>,
    /// Where the application dialled.
    pub(super) target: SocketAddr,
    pub(super) seed: u64,
    /// Where the destination is reached.
    pub(super) endpoint: SocketAddr,
    /// Who answers there.
    pub(super) peer: SpiffeId,
}

/// Why an open connection is ended from this side.
#[derive(Clone, Debug)]
pub(super) enum Cut {
    Denied(Box<Denial>),
    /// The way it took leads elsewhere, or nowhere.
    Rerouted(Option<RouteRefusal>),
    /// By the DestinationRules it is spoken otherwise by now; the one that says so, if one does.
    Respoken(Option<Box<Decided>>),
    /// It is judged by requests where it was not, or the other way round.
    Rejudged,
    /// The source or the destination is no longer enrolled here.
    WorkloadLeft,
    /// The daemon has drained for its full time.
    Drained,
}

/// What the policy said of an inbound connection, or that nothing had to be said.
type Judgement = Result<Option<Deciding>, Cut>;

impl Judged {
    fn judge(&self, snapshot: &Snapshot) -> Judgement {
        match self {
            Self::Inbound(facts) => judge_inbound(facts, snapshot),
            Self::Requests(flights) => judge_requests(flights, snapshot),
            Self::Tunnel(way) => way.judge(snapshot).map(|()| None),
            Self::Local(way, destination) => {
                way.judge(snapshot)?;
                destination.judge(snapshot)
            }
            Self::Straight(way) => way.judge(snapshot).map(|()| None),
        }
    }

    /// Whether this workload of the node is at one of its ends.
    fn is_of(&self, name: &ObjectName) -> bool {
        match self {
            Self::Inbound(facts) => facts.destination.name == *name,
            Self::Requests(flights) => flights.connection().destination.name == *name,
            Self::Tunnel(TakenWay { source, .. }) | Self::Straight(StraightWay { source, .. }) => {
                source.name == *name
            }
            Self::Local(way, destination) => way.source.name == *name || destination.is_of(name),
        }
    }
}

impl TakenWay {
    /// Does it still lead there, and may that peer still answer?
    fn judge(&self, snapshot: &Snapshot) -> Result<(), Cut> {
        still_here(&self.source, snapshot)?;
        if snapshot.is_barred(&self.peer) {
            return Err(denied(barred()));
        }
        let leaving = leaving_now(snapshot, &self.source, (self.target, self.endpoint), self.seed);
        match leaving.route {
            Route::Tunnel { allowed, .. } if allowed.contains(&self.peer) => {
                // The endpoint may be another by now; this one must still be the mesh's.
                let there = snapshot.workload_at(self.endpoint.ip(), self.endpoint.port());
                if there.is_some_and(|there| there.enrolled) { Ok(()) } else { Err(Cut::Rerouted(None)) }
            }
            Route::Refused(refusal) => Err(Cut::Rerouted(Some(refusal))),
            Route::Tunnel { .. } | Route::Passthrough { .. } => Err(respoken(leaving.decided, false)),
            Route::Unknown => Err(Cut::Rerouted(None)),
        }
    }
}

impl StraightWay {
    /// Does it still lead there, and is the same still spoken?
    fn judge(&self, snapshot: &Snapshot) -> Result<(), Cut> {
        still_here(&self.source, snapshot)?;
        let leaving = leaving_now(snapshot, &self.source, (self.target, self.endpoint), self.seed);
        let is_the_same = match (&self.originated, &leaving.originated) {
            (Some(own), Some(newer)) => own.may_go_on(newer),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        match leaving.route {
            Route::Passthrough { .. } if is_the_same => Ok(()),
            Route::Refused(refusal) => Err(Cut::Rerouted(Some(refusal))),
            Route::Tunnel { .. } | Route::Passthrough { .. } => {
                Err(respoken(leaving.decided, self.is_by_rule))
            }
            Route::Unknown => Err(Cut::Rerouted(None)),
        }
    }
}

/// How a connection to an endpoint would leave by now. The seed may choose another endpoint of the same kind; it is this one that
/// is asked about.
fn leaving_now(
    snapshot: &Snapshot,
    source: &Workload,
    (target, endpoint): (SocketAddr, SocketAddr),
    seed: u64,
) -> Leaving {
    let mut route = snapshot.route(source, target, seed);
    match &mut route {
        Route::Tunnel { endpoint: chosen, .. } | Route::Passthrough { target: chosen } => *chosen = endpoint,
        Route::Unknown | Route::Refused(_) => {}
    }
    snapshot.leave_by(source, target, route)
}

/// Where no rule decides and none did, it is the way itself that leads elsewhere.
fn respoken(decided: Option<Decided>, was_by_rule: bool) -> Cut {
    if decided.is_none() && !was_by_rule {
        return Cut::Rerouted(None);
    }
    Cut::Respoken(decided.map(Box::new))
}

/// The answer to and from an identity as which nobody may speak.
pub(super) fn barred() -> Denial {
    Denial { reason: DenialReason::IdentityBarred, verdict: Deciding::default() }
}

fn judge_inbound(facts: &ConnectionFacts, snapshot: &Snapshot) -> Judgement {
    match snapshot.admit(&current(facts, snapshot)?).map_err(denied)? {
        Admission::Stream(permit) => Ok(Some(permit.verdict().clone())),
        Admission::Requests => Err(Cut::Rejudged),
    }
}

fn denied(denial: Denial) -> Cut {
    Cut::Denied(Box::new(denial))
}

/// Each request has its own answer. A port that is no longer judged by requests lets those go on that still may.
fn judge_requests(flights: &Flights, snapshot: &Snapshot) -> Judgement {
    let facts = current(flights.connection(), snapshot)?;
    let admission = snapshot.admit(&facts).map_err(denied)?;
    flights.rejudge(&facts, snapshot);
    match admission {
        Admission::Requests => Ok(None),
        Admission::Stream(_) => Err(Cut::Rejudged),
    }
}

/// The workload as the new snapshot knows it decides: labels and ports may have changed.
fn current(facts: &ConnectionFacts, snapshot: &Snapshot) -> Result<ConnectionFacts, Cut> {
    let destination = snapshot
        .workload(&facts.destination.name)
        .filter(|destination| destination.is_reached_at(facts.destination_address))
        .ok_or(Cut::WorkloadLeft)?;
    Ok(ConnectionFacts { destination: Arc::clone(destination), ..facts.clone() })
}

fn still_here(source: &Workload, snapshot: &Snapshot) -> Result<(), Cut> {
    let here = snapshot.workload(&source.name).is_some_and(|now| {
        now.enrolled
            && now.identity == source.identity
            && now.node == source.node
            && now.addresses == source.addresses
    });
    if !here {
        return Err(Cut::WorkloadLeft);
    }
    if snapshot.is_barred(&source.identity) { Err(denied(barred())) } else { Ok(()) }
}

/// One open connection.
struct Entry {
    judged: Judged,
    snapshot: AtomicU64,
    deciding: Mutex<Option<Deciding>>,
    cut: CancellationToken,
    cause: Mutex<Option<Cut>>,
    progress: Arc<Progress>,
    ends: Arc<Ends>,
}

impl Entry {
    fn end(&self, cut: Cut) {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(cut);
        self.cut.cancel();
    }

    /// Judges by `snapshot` unless a newer one has judged already.
    fn judge(&self, snapshot: &Snapshot) {
        if self.snapshot.load(Ordering::Acquire) >= snapshot.number() {
            return;
        }
        match self.judged.judge(snapshot) {
            Ok(deciding) => {
                self.snapshot.fetch_max(snapshot.number(), Ordering::AcqRel);
                if deciding.is_some() {
                    *self.deciding.lock().unwrap_or_else(PoisonError::into_inner) = deciding;
                }
            }
            Err(cut) => self.end(cut),
        }
    }
}

/// All open connections of this node.
#[derive(Default)]
pub(super) struct Live {
    entries: Mutex<BTreeMap<u64, Arc<Entry>>>,
}

/// One open connection, for status.
#[derive(Clone, Debug)]
pub struct ConnectionView {
    pub ends: Arc<Ends>,
    /// From the client to the server so far.
    pub bytes_in: u64,
    /// From the server to the client so far.
    pub bytes_out: u64,
    /// By which snapshot it was judged last.
    pub snapshot: u64,
}

impl Live {
    /// Enters a connection that `snapshot` allowed. It may not carry a byte before [`Registration::confirm`].
    pub(super) fn register(
        self: &Arc<Self>,
        judged: Judged,
        snapshot: &Snapshot,
        ends: Arc<Ends>,
        progress: Arc<Progress>,
    ) -> Registration {
        let id = ends.connection;
        let entry = Arc::new(Entry {
            judged,
            snapshot: AtomicU64::new(snapshot.number()),
            deciding: Mutex::new(None),
            cut: CancellationToken::new(),
            cause: Mutex::new(None),
            progress,
            ends,
        });
        self.lock().insert(id, Arc::clone(&entry));
        Registration { live: Arc::clone(self), id, entry }
    }

    /// Judges all connections by a new snapshot and ends those that lost their right.
    pub(super) async fn rejudge(&self, snapshot: &Snapshot) {
        let entries: Vec<Arc<Entry>> = self.lock().values().cloned().collect();
        for some in entries.chunks(REJUDGED_AT_ONCE) {
            for entry in some {
                entry.judge(snapshot);
            }
            tokio::task::yield_now().await;
        }
    }

    /// Re-judges on every publish, until there will be none.
    pub(super) async fn follow(self: Arc<Self>, mut snapshots: watch::Receiver<Arc<Snapshot>>) {
        loop {
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            self.rejudge(&snapshot).await;
            if snapshots.changed().await.is_err() {
                return;
            }
        }
    }

    /// Ends all connections of one workload.
    pub(super) fn cut_workload(&self, name: &ObjectName) {
        for entry in self.lock().values().filter(|entry| entry.judged.is_of(name)) {
            entry.end(Cut::WorkloadLeft);
        }
    }

    /// Ends what is still open.
    pub(super) fn cut_all(&self) {
        for entry in self.lock().values() {
            entry.end(Cut::Drained);
        }
    }

    pub(super) fn count(&self) -> usize {
        self.lock().len()
    }

    pub(super) fn views(&self) -> Vec<ConnectionView> {
        let view = |entry: &Arc<Entry>| ConnectionView {
            ends: Arc::clone(&entry.ends),
            bytes_in: entry.progress.forward(),
            bytes_out: entry.progress.back(),
            snapshot: entry.snapshot.load(Ordering::Acquire),
        };
        self.lock().values().map(view).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Membership of one connection; leaves when dropped.
#[must_use]
pub(super) struct Registration {
    live: Arc<Live>,
    id: u64,
    entry: Arc<Entry>,
}

impl Registration {
    /// Judges again if the current snapshot is newer than the one that allowed it. To be called after registering and
    /// before the first byte.
    ///
    /// # Errors
    /// Why it may not go on.
    pub(super) fn confirm(&self, snapshots: &watch::Receiver<Arc<Snapshot>>) -> Result<(), Cut> {
        let current = Arc::clone(&snapshots.borrow());
        self.entry.judge(&current);
        if self.entry.cut.is_cancelled() { Err(self.cause()) } else { Ok(()) }
    }

    /// Ends when the connection lost its right; says why.
    pub(super) async fn cut(&self) -> Cut {
        self.entry.cut.cancelled().await;
        self.cause()
    }

    /// The snapshot that judged last.
    pub(super) fn snapshot(&self) -> u64 {
        self.entry.snapshot.load(Ordering::Acquire)
    }

    /// What that snapshot's policy said, if it was another one than the first.
    pub(super) fn deciding(&self) -> Option<Deciding> {
        self.entry.deciding.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn cause(&self) -> Cut {
        let cause = self.entry.cause.lock().unwrap_or_else(PoisonError::into_inner);
        cause.clone().unwrap_or(Cut::Drained)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.live.lock().remove(&self.id);
    }
}
