//! What became of direct connections, told like all others: events of the kernel in, lines of the access log, counters and the
//! list for status out.
//!
//! The kernel tells numbers and addresses. Who that is, and by which rule, is asked here: of the same snapshot and the same
//! evaluator as everywhere. Nothing is decided here.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ebpf_abi::{DirectEvent, DirectEventKind, DirectValue, Tuple, WorkloadNumber, limits};
use node_core::{
    policy::{Admission, ConnectionFacts, Denial, Presented, Verdict as Deciding},
    snapshot::Snapshot,
    workload::Workload,
};
use tokio::time::{MissedTickBehavior, interval};

use super::shortcut::Trail;
use crate::{
    datapath::{ConnectionView, protocol_of, workload_end},
    kernel::{Direct, DirectEvents, KernelError},
    telemetry::{
        ConnectionRecord, Decision, Direction, Endpoint, Ends, Event, Path, Reason, Shadow, Sink, Verdict,
    },
};

/// Workloads that left and are still known by their number: events of theirs may be on their way for a tenth of a second. At the
/// limit the one that left first is forgotten, and such an event names nobody.
const DEPARTED_MAX: usize = 1_024;

/// Lines about refused connects of one workload for each time that events are read, ten times a second. Reckoning: a connect that is
/// refused costs the workload 5 us, so it could fill the log by itself. At the limit the rest of them is counted by the kernel
/// only (`direct_denied`), and the limit is told.
const REFUSED_LINES_MAX: usize = 50;

/// Name of that limit.
const REFUSED_LINES_LIMIT: &str = "refused_lines_max";

/// How long the kernel must list a connection of which nobody told, or not list one that is known, before that counts: events are
/// read ten times a second, so the one that tells may be on its way.
const UNTOLD_AFTER: Duration = Duration::from_secs(2);

/// How long it is kept why a connection was ended: its last event comes within a tenth of a second.
const CAUSE_KEPT: Duration = Duration::from_secs(10);

/// Why a direct connection is ended from this side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    Denied(Box<Denial>),
    /// Allowed, but through the daemon from here on.
    Proxied,
    WorkloadLeft,
}

/// Direct connections of this node, as far as the kernel told of them.
#[derive(Debug)]
pub struct Ledger {
    events: Sink,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    workloads: BTreeMap<WorkloadNumber, Arc<Workload>>,
    departed: VecDeque<WorkloadNumber>,
    snapshot: Option<Arc<Snapshot>>,
    /// The one before: what the kernel tells may have been decided by its table.
    former: Option<Arc<Snapshot>>,
    /// By the cookie of the client's socket, as all that follow.
    open: BTreeMap<u64, Open>,
    /// What the kernel lists and nobody told of, and since when.
    untold: BTreeMap<u64, Instant>,
    /// What was ended from this side, why, and when.
    causes: BTreeMap<u64, (Cause, Instant)>,
    /// A list of the kernel was looked through.
    is_compared: bool,
}

#[derive(Debug)]
struct Open {
    source: WorkloadNumber,
    destination: WorkloadNumber,
    tuple: Tuple,
    ends: Arc<Ends>,
    deciding: Deciding,
    snapshot: u64,
    /// Its beginning was told and counted.
    is_opened: bool,
    /// Since when the kernel does not list it.
    missing: Option<Instant>,
}

/// One direct connection, in the words of the documents.
struct Meeting {
    source: Option<Arc<Workload>>,
    destination: Option<Arc<Workload>>,
    from: Option<SocketAddr>,
    to: SocketAddr,
}

impl Ledger {
    pub(super) fn new(events: Sink) -> Self {
        Self { events, known: Mutex::default() }
    }

    /// This number is that workload's from here on.
    pub(super) fn learn(&self, number: WorkloadNumber, workload: &Arc<Workload>) {
        self.lock().workloads.insert(number, Arc::clone(workload));
    }

    /// The workload left; what is on its way is still told in its name.
    pub(super) fn depart(&self, number: WorkloadNumber) {
        let mut known = self.lock();
        known.departed.push_back(number);
        if known.departed.len() > DEPARTED_MAX
            && let Some(oldest) = known.departed.pop_front()
        {
            known.workloads.remove(&oldest);
        }
    }

    /// Tables of this snapshot are in force from here on.
    pub(super) fn judge_by(&self, snapshot: &Arc<Snapshot>) {
        let mut known = self.lock();
        if known.snapshot.as_ref().is_none_or(|current| current.number() != snapshot.number()) {
            known.former = known.snapshot.replace(Arc::clone(snapshot));
        }
    }

    /// A connection that is about to be ended from this side.
    pub(super) fn doom(&self, cookie: u64, cause: Cause) {
        let now = Instant::now();
        let mut known = self.lock();
        known.causes.retain(|_, (_, since)| now.duration_since(*since) < CAUSE_KEPT);
        known.causes.entry(cookie).or_insert((cause, now));
    }

    /// What is open was judged again by the current snapshot, and may go on.
    pub(super) fn go_on(&self) {
        let mut known = self.lock();
        let open = std::mem::take(&mut known.open);
        let judged = open.into_iter().map(|(cookie, open)| {
            let Some(snapshot) = known.snapshot.as_ref().filter(|_| !known.causes.contains_key(&cookie))
            else {
                return (cookie, open);
            };
            match known.meeting(open.source, open.destination, &open.tuple).judged_by(snapshot) {
                Some(Ok(deciding)) => (cookie, Open { deciding, snapshot: snapshot.number(), ..open }),
                Some(Err(_)) | None => (cookie, open),
            }
        });
        known.open = judged.collect();
    }

    /// Why a connection may not go on directly, in the words of the policy.
    pub(super) fn cause(&self, tuple: &Tuple, value: &DirectValue) -> Cause {
        let known = self.lock();
        let meeting = known.meeting(value.source, value.destination, tuple);
        match known.snapshot.as_ref().and_then(|snapshot| meeting.judged_by(snapshot)) {
            Some(Err(denial)) => Cause::Denied(Box::new(denial)),
            Some(Ok(_)) => Cause::Proxied,
            None => Cause::WorkloadLeft,
        }
    }

    /// Compares with what the kernel lists. What it lists and nobody told of is entered, a predecessor's at once; what it does
    /// not list any more is over, and its end was not told.
    pub(super) fn compare(&self, listed: &[(Tuple, DirectValue)], now: Instant) {
        let mut lost = Vec::new();
        let mut guard = self.lock();
        let known = &mut *guard;
        let cookies: BTreeMap<u64, &(Tuple, DirectValue)> = listed
            .iter()
            .filter(|(_, value)| value.is_established())
            .map(|entry| (entry.1.socket_cookie, entry))
            .collect();
        known.untold.retain(|cookie, _| cookies.contains_key(cookie));
        for (cookie, (tuple, value)) in &cookies {
            if known.open.contains_key(cookie) {
                continue;
            }
            let since = *known.untold.entry(*cookie).or_insert(now);
            if !known.is_compared || now.duration_since(since) >= UNTOLD_AFTER {
                known.untold.remove(cookie);
                let open = known.enter(&self.events, value.source, value.destination, tuple);
                known.open.insert(*cookie, open);
            }
        }
        known.is_compared = true;
        known.open.retain(|cookie, open| {
            if cookies.contains_key(cookie) {
                open.missing = None;
                return true;
            }
            let since = *open.missing.get_or_insert(now);
            let is_lost = now.duration_since(since) >= UNTOLD_AFTER;
            if is_lost {
                lost.push(open.ended(None, None));
            }
            !is_lost
        });
        drop(guard);
        for record in lost {
            self.events.emit(&Event::ConnectionEnded(Box::new(record)));
        }
    }

    /// What is open, for status. Bytes are known at the end only.
    pub fn views(&self) -> Vec<ConnectionView> {
        let view = |open: &Open| ConnectionView {
            ends: Arc::clone(&open.ends),
            bytes_in: 0,
            bytes_out: 0,
            snapshot: open.snapshot,
        };
        self.lock().open.values().map(view).collect()
    }

    /// Tells of what was read at one time.
    fn tell_all(&self, events: &[DirectEvent], refused: &mut BTreeMap<WorkloadNumber, usize>) {
        for event in events {
            if event.kind() != Some(DirectEventKind::Refused) {
                self.tell(event);
                continue;
            }
            let count = refused.entry(event.source).or_default();
            *count += 1;
            if *count <= REFUSED_LINES_MAX {
                self.tell(event);
            } else if *count == REFUSED_LINES_MAX + 1 {
                let workload = self.lock().workloads.get(&event.source).map(|source| source.name.clone());
                self.events.emit(&Event::LimitReached { limit: REFUSED_LINES_LIMIT, workload });
            }
        }
    }

    /// Tells of one event.
    fn tell(&self, event: &DirectEvent) {
        let mut known = self.lock();
        let told = match event.kind() {
            Some(DirectEventKind::Opened) => known.opened(&self.events, event),
            Some(DirectEventKind::Closed) => {
                let cookie = event.socket_cookie;
                let open = known.open.remove(&cookie);
                known.untold.remove(&cookie);
                let cause = known.causes.remove(&cookie).map(|(cause, _)| cause);
                // Its beginning was not told.
                let open = open.unwrap_or_else(|| {
                    known.enter(&self.events, event.source, event.destination, &event.tuple)
                });
                Some(Event::ConnectionEnded(Box::new(open.ended(Some(event), cause))))
            }
            Some(DirectEventKind::Refused) => Some(known.refused(&self.events, event)),
            None => None,
        };
        drop(known);
        if let Some(told) = told {
            self.events.emit(&told);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn opened(&mut self, events: &Sink, event: &DirectEvent) -> Option<Event> {
        let cookie = event.socket_cookie;
        self.untold.remove(&cookie);
        if !self.open.contains_key(&cookie) {
            let open = self.enter(events, event.source, event.destination, &event.tuple);
            self.open.insert(cookie, open);
        }
        let open = self.open.get_mut(&cookie).filter(|open| !open.is_opened)?;
        open.is_opened = true;
        Some(Event::ConnectionOpened(Arc::clone(&open.ends)))
    }

    fn enter(
        &self,
        events: &Sink,
        source: WorkloadNumber,
        destination: WorkloadNumber,
        tuple: &Tuple,
    ) -> Open {
        let meeting = self.meeting(source, destination, tuple);
        let (deciding, snapshot) = self.permitted(&meeting);
        let ends = Arc::new(meeting.ends(events, &deciding));
        // Where nothing may pass without a record nothing is direct; see `Pairs::new`.
        let _ = events.decide(|| Decision::allowed(Arc::clone(&ends), None, deciding.clone(), snapshot));
        Open { source, destination, tuple: *tuple, ends, deciding, snapshot, is_opened: false, missing: None }
    }

    /// Rule and snapshot that permit it: the current one, or if it came right before that, the one before.
    fn permitted(&self, meeting: &Meeting) -> (Deciding, u64) {
        let mut words = self.snapshots().filter_map(|snapshot| {
            let deciding = meeting.judged_by(snapshot)?.ok()?;
            Some((deciding, snapshot.number()))
        });
        words.next().unwrap_or_else(|| (Deciding::default(), self.number()))
    }

    fn refused(&self, events: &Sink, event: &DirectEvent) -> Event {
        let meeting = self.meeting(event.source, event.destination, &event.tuple);
        let mut denials = self.snapshots().filter_map(|snapshot| {
            let denial = meeting.judged_by(snapshot)?.err()?;
            Some((denial, snapshot.number()))
        });
        let (reason, deciding, snapshot) = match denials.next() {
            Some((denial, snapshot)) => (Reason::Policy(denial.reason), denial.verdict, snapshot),
            // A table of before that.
            None => (Reason::Rejudged, Deciding::default(), self.number()),
        };
        let ends = Arc::new(meeting.ends(events, &deciding));
        Event::ConnectionEnded(Box::new(record(ends, deciding, snapshot, Verdict::Denied, Some(reason))))
    }

    fn snapshots(&self) -> impl Iterator<Item = &Arc<Snapshot>> {
        self.snapshot.iter().chain(&self.former)
    }

    fn number(&self) -> u64 {
        self.snapshot.as_ref().map_or(0, |snapshot| snapshot.number())
    }

    fn meeting(&self, source: WorkloadNumber, destination: WorkloadNumber, tuple: &Tuple) -> Meeting {
        let at = |address: ebpf_abi::Address, port: u16| SocketAddr::new(address.into(), port);
        let source = self.workloads.get(&source).cloned();
        let from = at(tuple.source, tuple.source_port);
        Meeting {
            source,
            destination: self.workloads.get(&destination).cloned(),
            from: Some(from).filter(|from| from.port() != 0),
            to: at(tuple.target, tuple.target_port),
        }
    }
}

impl Meeting {
    /// `None`: one of the two is not known, or not in the mesh any more.
    fn judged_by(&self, snapshot: &Snapshot) -> Option<Result<Deciding, Denial>> {
        let (source, destination) = (self.source.as_ref()?, self.destination.as_ref()?);
        let now = snapshot.workload(&destination.name).filter(|now| now.enrolled)?;
        let facts = ConnectionFacts {
            presented: Presented::Attested(source.identity.clone()),
            source_address: self.client_address()?.ip(),
            destination_address: self.to.ip(),
            destination_port: self.to.port(),
            destination: Arc::clone(now),
        };
        Some(match snapshot.admit(&facts) {
            Ok(Admission::Stream(permit)) => Ok(permit.verdict().clone()),
            Ok(Admission::Requests) => Ok(Deciding::default()),
            Err(denial) => Err(denial),
        })
    }

    /// Of a connect that was refused the kernel does not know the source's address yet: it has none before it is let go.
    fn client_address(&self) -> Option<SocketAddr> {
        let own = || {
            let mut addresses = self.source.as_ref()?.addresses.iter();
            addresses.find(|own| own.is_ipv4() == self.to.is_ipv4()).map(|own| SocketAddr::new(*own, 0))
        };
        self.from.or_else(own)
    }

    fn ends(&self, events: &Sink, deciding: &Deciding) -> Ends {
        let from = self.client_address();
        let source = match (&self.source, from) {
            (Some(source), Some(from)) => workload_end(source, from),
            (_, address) => Endpoint { address, ..Endpoint::default() },
        };
        let stranger = || Endpoint { address: Some(self.to), ..Endpoint::default() };
        Ends {
            connection: events.next_connection(),
            direction: Direction::Outbound,
            path: Path::Direct,
            source,
            destination: self
                .destination
                .as_ref()
                .map_or_else(stranger, |destination| workload_end(destination, self.to)),
            service: deciding.service.clone(),
            protocol: self
                .destination
                .as_ref()
                .map_or("tcp", |destination| protocol_of(destination, self.to.port())),
            mutual_tls: false,
        }
    }
}

impl Open {
    /// Its line; without an event the kernel told nothing of its end.
    fn ended(&self, event: Option<&DirectEvent>, cause: Option<Cause>) -> ConnectionRecord {
        let (verdict, reason) = match &cause {
            Some(Cause::Denied(denial)) => (Verdict::Denied, Some(Reason::Policy(denial.reason))),
            Some(Cause::Proxied) => (Verdict::Allowed, Some(Reason::Rejudged)),
            Some(Cause::WorkloadLeft) => (Verdict::Allowed, Some(Reason::WorkloadLeft)),
            None => {
                let is_orderly = event.is_some_and(|event| event.aborted == 0);
                (Verdict::Allowed, (!is_orderly).then_some(Reason::Aborted))
            }
        };
        let deciding = match &cause {
            Some(Cause::Denied(denial)) => denial.verdict.clone(),
            Some(Cause::Proxied | Cause::WorkloadLeft) | None => self.deciding.clone(),
        };
        let detail = match (&cause, event) {
            (_, None) => Some("the kernel did not tell how it ended"),
            (Some(Cause::Proxied), Some(_)) => Some("it takes the way through the daemon by now"),
            (Some(Cause::Denied(_) | Cause::WorkloadLeft) | None, Some(_)) => None,
        };
        ConnectionRecord {
            opened: true,
            detail: detail.map(str::to_owned),
            bytes_in: event.map_or(0, |event| event.sent_bytes),
            bytes_out: event.map_or(0, |event| event.received_bytes),
            duration: Duration::from_nanos(event.map_or(0, |event| event.duration_nanos)),
            ..record(Arc::clone(&self.ends), deciding, self.snapshot, verdict, reason)
        }
    }
}

/// The line of a connection of which nothing passed.
fn record(
    ends: Arc<Ends>,
    deciding: Deciding,
    snapshot: u64,
    verdict: Verdict,
    reason: Option<Reason>,
) -> ConnectionRecord {
    ConnectionRecord {
        ends,
        opened: false,
        verdict,
        policy: deciding.policy,
        rule: deciding.rule,
        reason,
        detail: None,
        shadow: deciding.shadow.map(Shadow::from),
        audit: deciding.audit,
        tls: None,
        bytes_in: 0,
        bytes_out: 0,
        duration: Duration::ZERO,
        snapshot,
    }
}

/// Reads the kernel's events and tells them, until a successor does.
pub(super) async fn follow(ledger: Arc<Ledger>, direct: Direct, mut trail: Trail) {
    let failed = |error: &dyn std::error::Error| {
        ledger.events.emit(&Event::KernelFailed {
            call: "reading events of direct connections",
            problem: error.to_string(),
        });
    };
    let mut reader = match direct.events() {
        Ok(reader) => reader,
        Err(error) => return failed(&error),
    };
    // The ring holds what happens in several of these times, so nobody waits for its call.
    let mut ticks = interval(Duration::from_millis(limits::DIRECT_EVENTS_READ_EVERY_MILLIS));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match take_all(&ledger, &mut reader, &mut trail) {
            Ok(()) => trail.expire(),
            Err(KernelError::NotOwner { .. }) => return,
            Err(error) => failed(&error),
        }
    }
}

fn take_all(ledger: &Ledger, reader: &mut DirectEvents, trail: &mut Trail) -> Result<(), KernelError> {
    let mut refused = BTreeMap::new();
    loop {
        let taken = reader.take()?;
        ledger.tell_all(&taken, &mut refused);
        trail.take(&taken);
        if taken.len() < limits::DIRECT_EVENTS_AT_ONCE {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests;
