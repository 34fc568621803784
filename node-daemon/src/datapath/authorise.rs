//! May it come in? The facts go to the policy, the connection into the list of the open ones, and only what is still
//! allowed by the current snapshot goes on (T-18).

use std::sync::Arc;

use node_core::{
    policy::{Admission, ConnectionFacts, Permit},
    snapshot::Snapshot,
};

use super::{
    Shared,
    live::{Judged, Registration, TakenWay},
    record::{Ending, Record},
    requests::Flights,
};

/// How an inbound connection was admitted.
pub(super) enum Admitted {
    Stream(Permit, Registration),
    Requests(Arc<Flights>, Registration),
}

/// Admits an inbound connection, or says who refused it and why. One that comes from inside the node has a way of its own.
pub(super) fn admit(
    shared: &Shared,
    facts: ConnectionFacts,
    way: Option<TakenWay>,
    record: &mut Record,
) -> Result<Admitted, Ending> {
    let snapshot = shared.snapshot();
    record.judged_by(snapshot.number());
    let judged = |by| match way {
        Some(way) => Judged::Local(way, Box::new(by)),
        None => by,
    };
    match snapshot.admit(&facts)? {
        Admission::Stream(permit) => {
            record.allowed_by(permit.verdict());
            let registration = enter(shared, judged(Judged::Inbound(facts)), &snapshot, record)?;
            Ok(Admitted::Stream(permit, registration))
        }
        Admission::Requests => {
            let flights = Arc::new(Flights::new(facts, Arc::clone(&shared.keys)));
            let judged = judged(Judged::Requests(Arc::clone(&flights)));
            let registration = enter(shared, judged, &snapshot, record)?;
            Ok(Admitted::Requests(flights, registration))
        }
    }
}

/// Enters a connection into the list of the open ones: it must still be what it was judged as (T-18).
pub(super) fn enter(
    shared: &Shared,
    judged: Judged,
    snapshot: &Snapshot,
    record: &mut Record,
) -> Result<Registration, Ending> {
    let registration = shared.live.register(judged, snapshot, record.ends(), record.progress());
    registration.confirm(&shared.snapshots).inspect_err(|_| record.rejudged(&registration))?;
    record.rejudged(&registration);
    Ok(registration)
}
