//! Between two workloads of this node, where the kernel alone may not decide: one relay, without TLS.
//!
//! outbound's [`Route::Tunnel`](node_core::snapshot::Route::Tunnel) to a workload of this node --> secure naming --> the
//! destination's policy (on layer 4, or request by request) --> [`deliver`](super::deliver) in the destination's namespace.
//!
//! The kernel vouches for both ends: the source's namespace or cgroup named it, and the destination is reached through the
//! namespace in which it is enrolled. So no certificate is asked for on this way, and none is waited for. One connection has
//! one line in the access log, with `direction` outbound, and counts for both reporters.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use node_core::{
    attest::Attested,
    policy::{ConnectionFacts, Presented},
    snapshot::Snapshot,
    workload::Workload,
};
use spiffe_id::SpiffeId;
use tokio::net::TcpStream;

use super::{
    Shared,
    accept::Site,
    inbound,
    live::TakenWay,
    record::{Ending, Record},
};
use crate::telemetry::{HandshakeRefusal, Path, Reason};

/// A connection between two workloads of this node.
pub(super) struct Local {
    pub(super) source: Attested,
    /// Where the application dialled.
    pub(super) target: SocketAddr,
    pub(super) seed: u64,
    pub(super) destination: Arc<Workload>,
    /// Where the destination is reached.
    pub(super) endpoint: SocketAddr,
    /// Who may answer there (policy D).
    pub(super) allowed: Arc<BTreeSet<SpiffeId>>,
}

/// Where connections come in to `destination`, if it is enrolled on this node: then they need no tunnel.
pub(super) fn site_of(shared: &Shared, snapshot: &Snapshot, destination: &Workload) -> Option<Arc<Site>> {
    let is_here = destination.node == snapshot.node() && destination.enrolled;
    is_here.then(|| shared.sites.of(destination)).flatten()
}

/// Serves it to its end.
pub(super) async fn serve(
    shared: &Arc<Shared>,
    there: &Arc<Site>,
    stream: TcpStream,
    local: Local,
    record: &mut Record,
) -> Result<Ending, Ending> {
    record.learn(|ends| ends.path = Path::Relay);
    let identity = &local.destination.identity;
    if !local.allowed.contains(identity) {
        let problem = format!("{identity} may not answer there");
        return Err(Ending::denied(Reason::Handshake(HandshakeRefusal::SecureNaming), problem)); // D-5
    }
    let _share = there.share_now(shared)?;
    let facts = ConnectionFacts {
        presented: Presented::Attested(local.source.identity().clone()),
        source_address: client(&local),
        destination_address: local.endpoint.ip(),
        destination_port: local.endpoint.port(),
        destination: Arc::clone(&local.destination),
    };
    let way = TakenWay {
        source: Arc::clone(local.source.workload()),
        target: local.target,
        seed: local.seed,
        endpoint: local.endpoint,
        peer: identity.clone(),
    };
    tokio::select! {
        biased;
        () = there.gone().cancelled() => Err(shared.gone()),
        ending = inbound::through(shared, there, stream, facts, Some(way), record) => ending,
    }
}

/// The client's own address, or where the endpoint is of the other family, the source's first one of that.
fn client(local: &Local) -> IpAddr {
    let client = local.source.client();
    let fits = |address: &&IpAddr| address.is_ipv4() == local.endpoint.is_ipv4();
    let others = &local.source.workload().addresses;
    Some(&client).into_iter().chain(others).find(fits).copied().unwrap_or(client)
}
