//! To the workload itself, from its client's true address.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use node_core::{
    policy::{Permit, RequestPermit},
    workload::ObjectName,
};
use tokio::net::TcpStream;

use super::{accept::Site, record::Ending};
use crate::{net::DialError, telemetry::Reason};

/// Time for the workload to accept, in seconds: it is on this machine; only a full backlog makes it wait.
pub(super) const DELIVER_SECONDS: u64 = 5;

/// Proof that something may be sent to the workload: nothing is without one.
pub(super) trait Proof {}

/// The connection as a whole.
impl Proof for Permit {}

/// A connection's first request, or one whose predecessors' connection is gone.
impl Proof for RequestPermit {}

/// Connects to the workload.
pub(super) async fn deliver(
    _proof: &impl Proof,
    site: &Site,
    workload: &ObjectName,
    client: IpAddr,
    target: SocketAddr,
) -> Result<TcpStream, Ending> {
    let within = Duration::from_secs(DELIVER_SECONDS);
    site.ground().deliver(workload, client, target, within).await.map_err(|error| unreached(&error))
}

/// Whose matter it is that a server was not reached.
pub(super) fn unreached(error: &DialError) -> Ending {
    match error {
        DialError::Refused { .. } | DialError::TimedOut { .. } | DialError::Unreachable { .. } => {
            Ending::failed(Reason::NothingListening, error)
        }
        DialError::Kernel { .. } => Ending::failed(Reason::System, error),
    }
}
