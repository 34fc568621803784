//! May it come in? The facts go to the policy, the connection into the list of the open ones, and only what is still
//! allowed by the current snapshot goes on (T-18).

use std::sync::Arc;

use node_core::policy::{ConnectionFacts, Permit};

use super::{
    Shared,
    live::{Judged, Registration},
    record::{Ending, Record},
};

/// Admits an inbound connection, or says who refused it and why.
pub(super) fn admit(
    shared: &Shared,
    facts: ConnectionFacts,
    record: &mut Record,
) -> Result<(Permit, Registration), Ending> {
    let snapshot = shared.snapshot();
    record.judged_by(snapshot.number());
    let permit = snapshot.authorise(&facts)?;
    record.allowed_by(permit.verdict());
    let registration =
        shared.live.register(Judged::Inbound(facts), &snapshot, record.ends(), record.progress());
    registration.confirm(&shared.snapshots).inspect_err(|_| record.rejudged(&registration))?;
    record.rejudged(&registration);
    Ok((permit, registration))
}

/// Admits an outbound connection whose way is known: it must still be the way (T-18).
pub(super) fn let_out(
    shared: &Shared,
    judged: Judged,
    snapshot: &Arc<node_core::snapshot::Snapshot>,
    record: &mut Record,
) -> Result<Registration, Ending> {
    let registration = shared.live.register(judged, snapshot, record.ends(), record.progress());
    registration.confirm(&shared.snapshots).inspect_err(|_| record.rejudged(&registration))?;
    record.rejudged(&registration);
    Ok(registration)
}
