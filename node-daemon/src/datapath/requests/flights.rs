//! Requests under way on one connection, each judged anew by every snapshot until its last byte (T-18).

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::task::AtomicWaker;
use http::{HeaderMap, Method, uri::PathAndQuery};
use node_core::{
    policy::{ConnectionFacts, Headers, RequestDenial, RequestFacts, RequestPermit, tokens::Tokens},
    snapshot::Snapshot,
};

use crate::jwks;

/// What a request asks, in a form that can be judged again.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) method: Method,
    pub(super) path: Option<PathAndQuery>,
    pub(super) host: Option<String>,
    /// Without those that end at this hop.
    pub(super) headers: HeaderMap,
    /// Seconds since 1970. Tokens that were valid then stay so for this request.
    pub(super) arrived: u64,
}

/// The headers of a request, as policy reads them.
pub(super) struct Lines<'a>(pub(super) &'a HeaderMap);

impl Headers for Lines<'_> {
    fn each(&self, name: &str, visit: &mut dyn FnMut(&[u8])) {
        self.0.get_all(name).iter().for_each(|value| visit(value.as_bytes()));
    }
}

impl Asked {
    pub(super) fn path(&self) -> Option<&str> {
        self.path.as_ref().map(PathAndQuery::as_str)
    }

    /// The policy's answer, with tokens that were judged by the same snapshot.
    pub(super) fn judge(
        &self,
        connection: &ConnectionFacts,
        snapshot: &Snapshot,
        tokens: &Tokens,
    ) -> Result<RequestPermit, Box<RequestDenial>> {
        let headers = Lines(&self.headers);
        let facts = RequestFacts {
            method: self.method.as_str(),
            path: self.path(),
            host: self.host.as_deref(),
            headers: &headers,
            tokens,
        };
        snapshot.judge_request(connection, &facts).map_err(Box::new)
    }

    /// Judges again with the keys that are at hand.
    fn rejudge(
        &self,
        connection: &ConnectionFacts,
        snapshot: &Snapshot,
        keys: &jwks::Store,
    ) -> Result<RequestPermit, Box<RequestDenial>> {
        let tokens =
            snapshot.token_rules(&connection.destination, connection.destination_port).map(|rules| {
                let candidates = rules.locate(self.path(), &Lines(&self.headers));
                rules.verify(candidates, self.arrived, &keys.signatures())
            });
        self.judge(connection, snapshot, &tokens.unwrap_or_default())
    }
}

/// One request that was permitted.
#[derive(Debug)]
pub(super) struct Flight {
    asked: Asked,
    snapshot: AtomicU64,
    cut: OnceLock<Box<RequestDenial>>,
    /// Those who wait for it: the request's body, the answer's head, the answer's body.
    wakers: [AtomicWaker; 3],
}

/// Who waits for a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiter {
    Request,
    Head,
    Response,
}

impl Flight {
    /// Ready once the request lost its right.
    pub(super) fn poll_cut(&self, context: &mut Context<'_>, waiter: Waiter) -> Poll<&RequestDenial> {
        let waker = &self.wakers[match waiter {
            Waiter::Request => 0,
            Waiter::Head => 1,
            Waiter::Response => 2,
        }];
        waker.register(context.waker());
        self.cut().map_or(Poll::Pending, Poll::Ready)
    }

    /// Why it was cut, if it was.
    pub(super) fn cut(&self) -> Option<&RequestDenial> {
        self.cut.get().map(|denial| &**denial)
    }

    pub(super) fn asked(&self) -> &Asked {
        &self.asked
    }

    pub(super) fn snapshot(&self) -> u64 {
        self.snapshot.load(Ordering::Acquire)
    }

    fn end(&self, denial: Box<RequestDenial>) {
        self.cut.get_or_init(|| denial);
        self.wakers.iter().for_each(AtomicWaker::wake);
    }
}

/// The requests of one connection.
pub(in crate::datapath) struct Flights {
    /// Who sends them, and to whom.
    connection: ConnectionFacts,
    keys: Arc<jwks::Store>,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    next: u64,
    flights: BTreeMap<u64, Arc<Flight>>,
}

impl Flights {
    pub(in crate::datapath) fn new(connection: ConnectionFacts, keys: Arc<jwks::Store>) -> Self {
        Self { connection, keys, open: Mutex::default() }
    }

    pub(in crate::datapath) fn connection(&self) -> &ConnectionFacts {
        &self.connection
    }

    /// Enters a request that `snapshot` permitted. It may not carry a byte before [`Flights::confirm`].
    pub(super) fn register(self: &Arc<Self>, asked: Asked, snapshot: &Snapshot) -> Airborne {
        let flight = Arc::new(Flight {
            asked,
            snapshot: AtomicU64::new(snapshot.number()),
            cut: OnceLock::new(),
            wakers: Default::default(),
        });
        let mut open = self.lock();
        let id = open.next;
        open.next += 1;
        open.flights.insert(id, Arc::clone(&flight));
        drop(open);
        Airborne { flights: Arc::clone(self), id, flight }
    }

    /// Judges one by `snapshot`, if that is newer than what it was judged by.
    pub(super) fn confirm(&self, flight: &Flight, snapshot: &Snapshot) {
        self.judge(flight, &self.connection, snapshot);
    }

    /// Judges all by a new snapshot; `connection` as that one knows its destination.
    pub(in crate::datapath) fn rejudge(&self, connection: &ConnectionFacts, snapshot: &Snapshot) {
        let flights: Vec<_> = self.lock().flights.values().cloned().collect();
        for flight in flights {
            self.judge(&flight, connection, snapshot);
        }
    }

    fn judge(&self, flight: &Flight, connection: &ConnectionFacts, snapshot: &Snapshot) {
        if flight.snapshot() >= snapshot.number() {
            return;
        }
        match flight.asked.rejudge(connection, snapshot, &self.keys) {
            Ok(_) => {
                flight.snapshot.fetch_max(snapshot.number(), Ordering::AcqRel);
            }
            Err(denial) => flight.end(denial),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Membership of one request; leaves when dropped.
#[must_use]
pub(super) struct Airborne {
    flights: Arc<Flights>,
    id: u64,
    flight: Arc<Flight>,
}

impl Airborne {
    pub(super) fn flight(&self) -> &Arc<Flight> {
        &self.flight
    }
}

impl Drop for Airborne {
    fn drop(&mut self) {
        self.flights.lock().flights.remove(&self.id);
    }
}
