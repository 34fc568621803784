//! Where connections come in: three listeners per workload, limits per workload and per node, the original target.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr, TcpListener as StdListener},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::FutureExt as _;
use node_core::{
    snapshot::Snapshot,
    workload::{ObjectName, Workload},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    Shared, carry::Side as _, ground::Ground, inbound, outbound, record::Ending, tunnel,
    tunnel::HANDSHAKE_SECONDS,
};
use crate::telemetry::{Event, Reason, Sink};

/// Connections of one workload (DESIGN 4.1); streams of tunnels count. At the limit accept pauses for that workload,
/// and streams are answered 503.
pub const CONNECTIONS_PER_WORKLOAD_MAX: usize = 20_000;

/// Connections of the node (DESIGN 4.1). At the limit accept pauses for all workloads that have more than
/// [`CONNECTIONS_RESERVED`].
pub const CONNECTIONS_PER_NODE_MAX: usize = 60_000;

/// Each workload may have so many, however full the node is: one that floods starves no other (T-11).
pub const CONNECTIONS_RESERVED: usize = 64;

/// Handshakes of one workload under way at its tunnel port, and as many at its own ports. Reckoning: 8 KiB and 0.3 ms of
/// CPU each; 512 within their 10 s are 51 a second from attackers who never finish, and a thousand times that from those
/// who do. At the limit the next wait for their turn as long as a handshake may take, then they are closed.
pub const HANDSHAKES_PER_WORKLOAD_MAX: usize = 512;

/// Part of the process's descriptors that connections may use, in percent, two for each.
const DESCRIPTORS_PERCENT: u64 = 80;

/// Pause after a failed accept, in milliseconds: descriptors that ran out come back as connections end.
pub(super) const ACCEPT_RETRY_MILLISECONDS: u64 = 100;

/// Named limits, smaller in tests.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections_per_workload: usize,
    pub connections_per_node: usize,
    pub connections_reserved: usize,
    pub handshakes_per_workload: usize,
}

impl Limits {
    /// For a process that may open so many descriptors.
    pub fn of_descriptors(descriptors: u64) -> Self {
        let fit = descriptors / 100 * DESCRIPTORS_PERCENT / 2;
        Self {
            connections_per_workload: CONNECTIONS_PER_WORKLOAD_MAX,
            connections_per_node: CONNECTIONS_PER_NODE_MAX.min(usize::try_from(fit).unwrap_or(usize::MAX)),
            connections_reserved: CONNECTIONS_RESERVED,
            handshakes_per_workload: HANDSHAKES_PER_WORKLOAD_MAX,
        }
    }
}

/// Which of a workload's listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Outbound,
    Inbound,
    Tunnel,
}

impl Role {
    const fn label(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Tunnel => "tunnel",
        }
    }
}

/// One place where connections come in: a pod's namespace, or the host's for all of its workloads.
pub(super) struct Site {
    name: ObjectName,
    is_host: bool,
    ground: Arc<dyn Ground>,
    connections: Arc<Semaphore>,
    /// At the workload's own ports, and at the tunnel port: neither starves the other.
    hellos: Arc<Semaphore>,
    tunnels: Arc<Semaphore>,
    limits: Limits,
    /// No more accepting; what is open goes on.
    closing: CancellationToken,
    /// Everything of this site ends.
    gone: CancellationToken,
}

/// Where connections come in at present.
#[derive(Default)]
pub(super) struct Sites(Mutex<BTreeMap<ObjectName, Arc<Site>>>);

impl Sites {
    /// Gives the one that had this name before.
    pub(super) fn insert(&self, name: ObjectName, site: Arc<Site>) -> Option<Arc<Site>> {
        self.lock().insert(name, site)
    }

    pub(super) fn remove(&self, name: &ObjectName) -> Option<Arc<Site>> {
        self.lock().remove(name)
    }

    /// The one of this workload: its own, or the host's.
    pub(super) fn of(&self, workload: &Workload) -> Option<Arc<Site>> {
        let sites = self.lock();
        if workload.is_host() {
            return sites.values().find(|site| site.is_host).cloned();
        }
        sites.get(&workload.name).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ObjectName, Arc<Site>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that was accepted, armed: dropped as it is, it is reset.
pub(super) struct Accepted {
    pub(super) stream: TcpStream,
    pub(super) client: SocketAddr,
    /// Whom the client dialled.
    pub(super) target: SocketAddr,
    pub(super) place: Place,
}

/// A connection's share of the limits.
pub(super) struct Place {
    _own: OwnedSemaphorePermit,
    _node: Option<OwnedSemaphorePermit>,
}

impl Site {
    pub(super) fn new(name: ObjectName, is_host: bool, ground: Arc<dyn Ground>, shared: &Shared) -> Self {
        let limits = shared.limits;
        Self {
            name,
            is_host,
            ground,
            connections: Arc::new(Semaphore::new(limits.connections_per_workload)),
            hellos: Arc::new(Semaphore::new(limits.handshakes_per_workload)),
            tunnels: Arc::new(Semaphore::new(limits.handshakes_per_workload)),
            limits,
            closing: shared.closing.child_token(),
            gone: shared.ending.child_token(),
        }
    }

    pub(super) fn name(&self) -> &ObjectName {
        &self.name
    }

    pub(super) fn is_host(&self) -> bool {
        self.is_host
    }

    pub(super) fn ground(&self) -> &dyn Ground {
        self.ground.as_ref()
    }

    pub(super) fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    pub(super) fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// The workload left: no more accepting, and everything that is open ends.
    pub(super) fn leave(&self) {
        self.closing.cancel();
        self.gone.cancel();
    }

    /// A turn to say hello at one of the workload's own ports. Waits at the limit.
    pub(super) async fn hello(&self, events: &Sink) -> Result<OwnedSemaphorePermit, Ending> {
        self.turn(&self.hellos, events).await
    }

    /// A turn for a handshake at the tunnel port. Waits at the limit.
    pub(super) async fn handshake(&self, events: &Sink) -> Result<OwnedSemaphorePermit, Ending> {
        self.turn(&self.tunnels, events).await
    }

    async fn turn(&self, turns: &Arc<Semaphore>, events: &Sink) -> Result<OwnedSemaphorePermit, Ending> {
        const LIMIT: &str = "handshakes_per_workload_max";
        if let Ok(turn) = Arc::clone(turns).try_acquire_owned() {
            return Ok(turn);
        }
        self.tell(events, LIMIT);
        match timeout(Duration::from_secs(HANDSHAKE_SECONDS), Arc::clone(turns).acquire_owned()).await {
            Ok(Ok(turn)) => Ok(turn),
            Ok(Err(_)) | Err(_) => Err(Ending::failed(Reason::Limit, LIMIT)),
        }
    }

    /// A place for a connection. Waits at the limit, and so pauses its listener.
    pub(super) async fn place(&self, shared: &Shared) -> Option<Place> {
        let own = if let Ok(own) = Arc::clone(&self.connections).try_acquire_owned() {
            own
        } else {
            self.tell(&shared.events, "connections_per_workload_max");
            Arc::clone(&self.connections).acquire_owned().await.ok()?
        };
        let node = if let Ok(node) = Arc::clone(&shared.connections).try_acquire_owned() {
            Some(node)
        } else if self.is_below_reserve() {
            None
        } else {
            self.tell(&shared.events, "connections_per_node_max");
            Some(Arc::clone(&shared.connections).acquire_owned().await.ok()?)
        };
        Some(Place { _own: own, _node: node })
    }

    /// A place for a tunnel's stream, or none: the peer is told, and the tunnel does not stall.
    pub(super) fn place_now(&self, shared: &Shared) -> Result<Place, Ending> {
        let full = |limit: &'static str| {
            self.tell(&shared.events, limit);
            Ending::failed(Reason::Limit, limit)
        };
        let own = Arc::clone(&self.connections)
            .try_acquire_owned()
            .map_err(|_| full("connections_per_workload_max"))?;
        let node = match Arc::clone(&shared.connections).try_acquire_owned() {
            Ok(node) => Some(node),
            Err(_) if self.is_below_reserve() => None,
            Err(_) => return Err(full("connections_per_node_max")),
        };
        Ok(Place { _own: own, _node: node })
    }

    /// A share of the workload's limit for a connection that has its place of the node already, or none: its client is told.
    pub(super) fn share_now(&self, shared: &Shared) -> Result<Place, Ending> {
        const LIMIT: &str = "connections_per_workload_max";
        let own = Arc::clone(&self.connections).try_acquire_owned().map_err(|_| {
            self.tell(&shared.events, LIMIT);
            Ending::failed(Reason::Limit, LIMIT)
        })?;
        Ok(Place { _own: own, _node: None })
    }

    fn is_below_reserve(&self) -> bool {
        let taken = self.limits.connections_per_workload - self.connections.available_permits();
        taken <= self.limits.connections_reserved
    }

    fn tell(&self, events: &Sink, limit: &'static str) {
        events.emit(&Event::LimitReached { limit, workload: Some(self.name.clone()) });
    }

    /// True if `address` is one of the addresses of the workloads that live here.
    pub(super) fn is_own(&self, snapshot: &Snapshot, address: IpAddr) -> bool {
        if self.is_host {
            return snapshot.local().any(|local| local.is_host() && local.addresses.contains(&address));
        }
        snapshot.workload(&self.name).is_some_and(|workload| workload.addresses.contains(&address))
    }
}

/// Accepts on one listener until the site closes; then takes what waits in its queue, and closes it.
pub(super) async fn accept_forever(shared: Arc<Shared>, site: Arc<Site>, listener: StdListener, role: Role) {
    let failed = |problem: &std::io::Error| Event::AcceptFailed {
        workload: site.name.clone(),
        listener: role.label(),
        problem: problem.to_string(),
    };
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return shared.events.emit(&failed(&error)),
    };
    let own_port = listener.local_addr().map(|address| address.port()).unwrap_or_default();
    loop {
        let accepted = tokio::select! {
            biased;
            () = site.closing.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, client)) => admit(&shared, &site, stream, client, role, own_port).await,
            Err(error) => {
                shared.events.emit(&failed(&error));
                tokio::time::sleep(Duration::from_millis(ACCEPT_RETRY_MILLISECONDS)).await;
            }
        }
    }
    while let Some(Ok((stream, client))) = listener.accept().now_or_never() {
        if site.gone.is_cancelled() {
            return;
        }
        admit(&shared, &site, stream, client, role, own_port).await;
    }
}

/// Waits for a place, then serves in a task of its own.
async fn admit(
    shared: &Arc<Shared>,
    site: &Arc<Site>,
    stream: TcpStream,
    client: SocketAddr,
    role: Role,
    own_port: u16,
) {
    stream.arm();
    let Ok(target) = stream.local_addr().map(canonical) else { return };
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    // A client may vanish without a word, on this node too: one that took our mark off its socket is never heard again.
    tunnel::keep_alive(&stream);
    let place = tokio::select! {
        () = site.gone.cancelled() => return,
        place = site.place(shared) => place,
    };
    let Some(place) = place else { return };
    let accepted = Accepted { stream, client: canonical(client), target, place };
    let (shared, site) = (Arc::clone(shared), Arc::clone(site));
    shared.tasks.clone().spawn(async move {
        // A task is as large as the largest of what it may await, for as long as it lives: the larger ones are apart.
        match role {
            Role::Outbound => outbound::serve(&shared, &site, accepted, own_port).await,
            Role::Inbound => Box::pin(inbound::serve(&shared, &site, accepted, own_port)).await,
            Role::Tunnel => Box::pin(inbound::serve_tunnel(&shared, &site, accepted)).await,
        }
    });
}

/// IPv4 is IPv4, whatever the family of the listener.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
