//! One connection, from the kernel's hand-over to the last byte.
//!
//! ```text
//! outbound   workload --> [accept] --> [identify] attest --> route --> [tunnel] ==mTLS==> (other node)
//!                                                              |--> a workload of this node: [relay] --> [authorise] --> [deliver]
//!                                                              |--> outside the mesh: a plain relay, or [originate] TLS
//! inbound    (other node) ==mTLS==> [accept] [tunnel] --> [identify] peer --> [authorise] --> [deliver] --> workload
//!            client on the workload's port --> [accept] --> [identify] mesh TLS or plaintext --> [authorise] --> [deliver]
//! ```
//!
//! Where the policy asks what only a request can answer, [`requests`] stands between authorise and deliver, and judges each
//! request.
//!
//! [`outbound`] and [`inbound`] are the two stories, one screen each; [`live`] re-judges what is open, [`record`] tells
//! of it, [`carry`] moves the bytes. In come enrolled workloads with their listeners, snapshots, and credentials to look
//! up. Knows nothing of Kubernetes, of the CA, of maps, or of how a snapshot is made; the kernel is behind [`Ground`].

mod accept;
mod authorise;
mod carry;
mod deliver;
mod ground;
mod identify;
mod inbound;
mod live;
mod originate;
mod outbound;
mod record;
mod relay;
mod requests;
mod tunnel;

#[cfg(test)]
mod host_tests;
#[cfg(test)]
mod relay_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_of_limits;
#[cfg(test)]
mod tests_of_rules;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use node_core::{snapshot::Snapshot, workload::ObjectName};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::{
    accept::{
        CONNECTIONS_PER_NODE_MAX, CONNECTIONS_PER_WORKLOAD_MAX, CONNECTIONS_RESERVED,
        HANDSHAKES_PER_WORKLOAD_MAX, Limits,
    },
    ground::Ground,
    identify::FIRST_BYTE_MILLISECONDS,
    live::ConnectionView,
    record::{protocol_of, workload_end},
    tunnel::{HANDSHAKE_SECONDS, STREAMS_PER_TUNNEL_MAX},
};
use self::{
    accept::{Site, Sites},
    live::{Cut, Live},
    record::{Ending, Record},
    tunnel::Pool,
};
use crate::{
    certs, jwks,
    net::Listeners,
    telemetry::{Direction, Path, Sink},
};

/// After the drain what is still open is reset; so long the resets may take, in seconds.
const ENDING_SECONDS: u64 = 1;

/// How long connections wait for what is not there yet (DESIGN 4.1).
#[derive(Clone, Copy, Debug)]
pub struct Holds {
    pub certificate: Duration,
    pub unknown_address: Duration,
    pub dead_peer: Duration,
}

impl Default for Holds {
    fn default() -> Self {
        Self {
            certificate: Duration::from_secs(10),
            unknown_address: Duration::from_secs(5),
            dead_peer: Duration::from_secs(10),
        }
    }
}

/// A workload that came under capture, or left it.
pub enum Change {
    Enrolled(Arrival),
    Left { name: ObjectName },
}

/// Where a workload's connections come in. A host's workloads share one, under a name of its own.
pub struct Arrival {
    pub name: ObjectName,
    pub is_host: bool,
    pub listeners: Listeners,
    pub ground: Arc<dyn Ground>,
}

/// What the data path is made of.
pub struct Inputs {
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    pub credentials: Arc<certs::Store>,
    /// Files of certificates that rules name.
    pub files: Arc<certs::ClientFiles>,
    /// Keys of the issuers of tokens.
    pub keys: Arc<jwks::Store>,
    pub workloads: mpsc::Receiver<Change>,
    pub events: Sink,
    pub limits: Limits,
    pub holds: Holds,
}

/// What all connections share.
struct Shared {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    credentials: Arc<certs::Store>,
    files: Arc<certs::ClientFiles>,
    keys: Arc<jwks::Store>,
    events: Sink,
    limits: Limits,
    holds: Holds,
    sites: Sites,
    live: Arc<Live>,
    pool: Pool,
    connections: Arc<Semaphore>,
    tasks: TaskTracker,
    /// No more accepting.
    closing: CancellationToken,
    /// Everything ends.
    ending: CancellationToken,
}

impl Shared {
    fn new(inputs: &Inputs) -> Self {
        Self {
            snapshots: inputs.snapshots.clone(),
            credentials: Arc::clone(&inputs.credentials),
            files: Arc::clone(&inputs.files),
            keys: Arc::clone(&inputs.keys),
            events: inputs.events.clone(),
            limits: inputs.limits,
            holds: inputs.holds,
            sites: Sites::default(),
            live: Arc::default(),
            pool: Pool::new(),
            connections: Arc::new(Semaphore::new(inputs.limits.connections_per_node)),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            ending: CancellationToken::new(),
        }
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshots.borrow())
    }

    /// How a connection ends whose site is gone: with its workload, or with the daemon.
    fn gone(&self) -> Ending {
        if self.ending.is_cancelled() { Cut::Drained.into() } else { Cut::WorkloadLeft.into() }
    }

    fn record(&self, direction: Direction, path: Path, client: SocketAddr, target: SocketAddr) -> Record {
        Record::new(&self.events, self.events.next_connection(), direction, path, client, target)
    }
}

/// The data path, running. Dropped, it ends at once.
pub struct Handle {
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

/// Starts serving what comes under capture.
pub fn start(inputs: Inputs) -> Handle {
    let shared = Arc::new(Shared::new(&inputs));
    let Inputs { snapshots, workloads, .. } = inputs;
    let mut tasks = JoinSet::new();
    tasks.spawn(Arc::clone(&shared.live).follow(snapshots));
    tasks.spawn(sweep(Arc::clone(&shared)));
    tasks.spawn(follow_workloads(Arc::clone(&shared), workloads));
    Handle { shared, _tasks: tasks }
}

async fn sweep(shared: Arc<Shared>) {
    let generation = |key: &node_core::tunnel::route::PoolKey| {
        shared.credentials.credentials(&key.identity).map(|credentials| credentials.generation())
    };
    shared.pool.sweep_forever(generation).await;
}

async fn follow_workloads(shared: Arc<Shared>, mut workloads: mpsc::Receiver<Change>) {
    while let Some(change) = workloads.recv().await {
        match change {
            Change::Enrolled(arrival) => {
                let name = arrival.name.clone();
                let site = arrive(&shared, arrival);
                // A workload that is enrolled anew under its old name has other listeners: the old ones are done.
                if let Some(old) = shared.sites.insert(name, site) {
                    old.leave();
                }
            }
            Change::Left { name } => {
                if let Some(site) = shared.sites.remove(&name) {
                    site.leave();
                }
                shared.live.cut_workload(&name);
                shared.pool.forget(&name);
            }
        }
    }
}

fn arrive(shared: &Arc<Shared>, arrival: Arrival) -> Arc<Site> {
    let Arrival { name, is_host, listeners, ground } = arrival;
    let site = Arc::new(Site::new(name, is_host, ground, shared));
    let Listeners { outbound, inbound, tunnel } = listeners;
    let listeners = [
        (outbound, accept::Role::Outbound),
        (inbound, accept::Role::Inbound),
        (tunnel, accept::Role::Tunnel),
    ];
    for (listener, role) in listeners {
        shared.tasks.spawn(accept::accept_forever(Arc::clone(shared), Arc::clone(&site), listener, role));
    }
    site
}

impl Handle {
    /// What is open, for status.
    pub fn connections(&self) -> Vec<ConnectionView> {
        self.shared.live.views()
    }

    /// Closes the listeners after what waits in them, lets open connections end for at most `time`, and resets the rest.
    pub async fn drain(self, time: Duration) {
        let shared = self.shared;
        shared.closing.cancel();
        shared.pool.finish();
        shared.tasks.close();
        if timeout(time, shared.tasks.wait()).await.is_ok() {
            return;
        }
        shared.live.cut_all();
        shared.ending.cancel();
        if timeout(Duration::from_secs(ENDING_SECONDS), shared.tasks.wait()).await.is_err() {
            tracing::warn!(open = shared.live.count(), "connections were left to the end of the process");
        }
    }
}
