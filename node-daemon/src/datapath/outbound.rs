//! Out of a workload: accept -> identify -> route -> tunnel, or a relay to what is outside the mesh: plain, or in TLS where a rule
//! of the client's side asks for it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use node_core::{
    attest::Attested,
    snapshot::{Leaving, Originated, Route, Snapshot},
    tunnel::{TUNNEL_PORT, route::PoolKey},
};
use spiffe_id::SpiffeId;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};

use super::{
    Shared,
    accept::{Accepted, Site},
    authorise::enter,
    carry::carry,
    deliver::unreached,
    identify,
    live::{Judged, Registration, StraightWay, TakenWay, barred},
    originate,
    record::{Ending, Record, known_end, protocol_of, workload_end},
    relay::{self, Local},
    tunnel::{self, OpenFailed, Reach},
};
use crate::{
    net::DialError,
    telemetry::{Direction, Path, Reason},
};

/// Time for one attempt to connect to a peer's daemon, in seconds: SYN, one retransmit, and its answer.
pub(super) const PEER_DIAL_SECONDS: u64 = 3;

/// Time to connect to something outside the mesh, in seconds: five SYNs. The application believes itself connected
/// meanwhile.
pub(super) const OUTSIDE_DIAL_SECONDS: u64 = 30;

/// Serves one captured connection.
pub(super) async fn serve(shared: &Arc<Shared>, site: &Site, accepted: Accepted, own_port: u16) {
    let (client, target) = (accepted.client, accepted.target);
    let mut record = shared.record(Direction::Outbound, Path::Tunnel, client, target);
    let ending = tokio::select! {
        biased;
        () = site.gone().cancelled() => shared.gone(),
        ending = go_out(shared, site, accepted, own_port, &mut record) => ending.unwrap_or_else(|refused| refused),
    };
    record.end(ending);
}

async fn go_out(
    shared: &Arc<Shared>,
    site: &Site,
    accepted: Accepted,
    own_port: u16,
    record: &mut Record,
) -> Result<Ending, Ending> {
    let Accepted { stream, client, target, place: _place } = accepted;
    let seed = rand::random();
    let (snapshot, source, leaving) = resolve(shared, site, client, target, own_port, seed).await?;
    record.judged_by(snapshot.number());
    record.learn(|ends| ends.source = workload_end(source.workload(), client));
    let Leaving { route, originated, decided, service } = leaving;
    let is_by_rule = decided.is_some();
    record.leaves_by(decided, service);
    match route {
        Route::Tunnel { destination, endpoint, allowed, service } => {
            record.learn(|ends| {
                ends.destination = workload_end(&destination, endpoint);
                ends.service = service;
                ends.protocol = protocol_of(&destination, endpoint.port());
            });
            if let Some(there) = relay::site_of(shared, &snapshot, &destination) {
                let local = Local { source, target, seed, destination, endpoint, allowed };
                return Box::pin(relay::serve(shared, &there, stream, local, record)).await;
            }
            let way = Way { snapshot, source, target, endpoint, seed };
            // Boxed apart: what opening needs is given back before the connection begins to wait for bytes.
            let (opened, registration) = Box::pin(open_tunnel(shared, site, way, allowed, record)).await?;
            Ok(carry(stream, opened, record, &registration).await)
        }
        Route::Passthrough { target: endpoint } => {
            let straight = Straight { snapshot, source, target, seed, endpoint, originated, is_by_rule };
            Box::pin(past_the_tunnel(shared, site, stream, straight, record)).await
        }
        Route::Refused(refusal) => Err(refusal.into()),
        Route::Unknown => {
            let seconds = shared.holds.unknown_address.as_secs();
            Err(Ending::denied(
                Reason::HoldUnknownAddress,
                format!("nobody knows the address after {seconds} s"),
            ))
        }
    }
}

/// Where it goes. An address of the mesh that nobody knows yet is held (DESIGN 3.4.9).
async fn resolve(
    shared: &Shared,
    site: &Site,
    client: SocketAddr,
    target: SocketAddr,
    own_port: u16,
    seed: u64,
) -> Result<(Arc<Snapshot>, Attested, Leaving), Ending> {
    let deadline = Instant::now() + shared.holds.unknown_address;
    let opener = identify::opener(site, client, target)?;
    let mut snapshots = shared.snapshots.clone();
    loop {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        refuse_loop(site, &snapshot, target, own_port)?;
        let source = identify::source(&snapshot, &opener, client)?;
        let leaving = snapshot.leave(source.workload(), target, seed);
        let is_unknown = leaving.route == Route::Unknown;
        let wait = is_unknown && matches!(timeout_at(deadline, snapshots.changed()).await, Ok(Ok(())));
        if !wait {
            return Ok((snapshot, source, leaving));
        }
    }
}

/// T-6: the listener is reachable on loopback from inside, and by its own port; what comes there was not captured.
fn refuse_loop(site: &Site, snapshot: &Snapshot, target: SocketAddr, own_port: u16) -> Result<(), Ending> {
    let address = target.ip();
    let is_itself = target.port() == own_port && site.is_own(snapshot, address);
    if address.is_loopback() || address.is_unspecified() || is_itself {
        return Err(Ending::denied(Reason::Loop, "the target is loopback or the daemon's own listener"));
    }
    Ok(())
}

/// A way through the mesh.
struct Way {
    snapshot: Arc<Snapshot>,
    source: Attested,
    target: SocketAddr,
    endpoint: SocketAddr,
    seed: u64,
}

async fn open_tunnel(
    shared: &Shared,
    site: &Site,
    way: Way,
    allowed: Arc<std::collections::BTreeSet<SpiffeId>>,
    record: &mut Record,
) -> Result<(tunnel::Stream, Registration), Ending> {
    let identity = way.source.identity();
    let held = Instant::now() + shared.holds.certificate;
    let credentials = shared
        .credentials
        .wait(identity, held)
        .await
        .map_err(|late| Ending::failed(Reason::HoldCertificate, late))?;
    let key = PoolKey {
        source: way.source.workload().name.clone(),
        source_address: way.source.client(),
        identity: identity.clone(),
        allowed,
        endpoint: SocketAddr::new(way.endpoint.ip(), TUNNEL_PORT),
    };
    let deadline = Instant::now() + shared.holds.dead_peer;
    let reach = FromWorkload { site, key: &key };
    let opened = shared
        .pool
        .open(&key, way.endpoint, &credentials, &reach, deadline)
        .await
        .map_err(|failed| not_opened(&failed))?;
    record.secured_by(opened.tls);
    record.learn(|ends| ends.destination.identity = Some(opened.peer.identity.clone()));
    if way.snapshot.is_barred(&opened.peer.identity) {
        return Err(barred().into());
    }
    let judged = Judged::Tunnel(TakenWay {
        source: Arc::clone(way.source.workload()),
        target: way.target,
        seed: way.seed,
        endpoint: way.endpoint,
        peer: opened.peer.identity,
    });
    let registration = enter(shared, judged, &way.snapshot, record)?;
    record.decided()?;
    record.opened();
    Ok((opened.stream, registration))
}

/// A tunnel is dialled inside the source's namespace, from its own address (T-9).
struct FromWorkload<'a> {
    site: &'a Site,
    key: &'a PoolKey,
}

impl Reach for FromWorkload<'_> {
    async fn reach(&self) -> Result<TcpStream, DialError> {
        let within = Duration::from_secs(PEER_DIAL_SECONDS);
        self.site.ground().dial(Some(self.key.source_address), self.key.endpoint, within).await
    }
}

fn not_opened(failed: &OpenFailed) -> Ending {
    match failed {
        OpenFailed::Answered(http::StatusCode::FORBIDDEN) => Ending::denied(Reason::PeerDenied, failed),
        OpenFailed::Answered(http::StatusCode::BAD_REQUEST) => {
            Ending::failed(Reason::PeerBadAuthority, failed)
        }
        OpenFailed::Answered(http::StatusCode::SERVICE_UNAVAILABLE) => {
            Ending::failed(Reason::NothingListening, failed)
        }
        OpenFailed::Answered(_) | OpenFailed::Protocol(_) => Ending::failed(Reason::Protocol, failed),
        OpenFailed::Handshake(handshake) if handshake.is_refusal() => {
            Ending::denied(handshake.reason(), failed)
        }
        OpenFailed::Handshake(handshake) => Ending::failed(handshake.reason(), failed),
        OpenFailed::Dead(_) => Ending::failed(Reason::DeadPeer, failed),
    }
}

/// A way past the tunnel.
struct Straight {
    snapshot: Arc<Snapshot>,
    source: Attested,
    target: SocketAddr,
    seed: u64,
    endpoint: SocketAddr,
    originated: Option<Arc<Originated>>,
    is_by_rule: bool,
}

/// To outside the mesh nothing is added and nothing is proven (DESIGN 3.4.9), unless a rule of the client's side says otherwise;
/// and to workloads of the mesh so goes what such a rule takes out of the tunnel (policy C).
async fn past_the_tunnel(
    shared: &Shared,
    site: &Site,
    stream: TcpStream,
    straight: Straight,
    record: &mut Record,
) -> Result<Ending, Ending> {
    let Straight { snapshot, source, target, seed, endpoint, originated, is_by_rule } = straight;
    record.learn(|ends| {
        ends.path = Path::Passthrough;
        ends.destination = known_end(&snapshot, endpoint);
    });
    let prepared = match &originated {
        Some(originated) => Some(originate::prepare(shared, &source, originated).await?),
        None => None,
    };
    let workload = Arc::clone(source.workload());
    let judged =
        Judged::Straight(StraightWay { source: workload, target, seed, endpoint, originated, is_by_rule });
    let registration = enter(shared, judged, &snapshot, record)?;
    let within = Duration::from_secs(OUTSIDE_DIAL_SECONDS);
    let own = own_address(&source, endpoint);
    let server = tokio::select! {
        biased;
        cut = registration.cut() => return Err(cut.into()),
        dialled = site.ground().dial(Some(own), endpoint, within) => dialled.map_err(|error| unreached(&error))?,
    };
    tunnel::keep_alive(&server);
    let Some(prepared) = prepared else {
        record.decided()?;
        record.opened();
        let ending = carry(stream, server, record, &registration).await;
        return Ok(if is_by_rule { plaintext_by_rule(ending, record) } else { ending });
    };
    let spoken = tokio::select! {
        biased;
        cut = registration.cut() => return Err(cut.into()),
        spoken = originate::speak(prepared, server) => spoken?,
    };
    record.encrypted_by(spoken.tls, spoken.is_mutual);
    if let Some(peer) = spoken.peer {
        if snapshot.is_barred(&peer) {
            return Err(barred().into());
        }
        record.learn(|ends| ends.destination.identity = Some(peer));
    }
    record.decided()?;
    record.opened();
    Ok(carry(stream, spoken.stream, record, &registration).await)
}

/// The client's own address, or where the endpoint is of the other family, its workload's first one of that.
fn own_address(source: &Attested, endpoint: SocketAddr) -> IpAddr {
    let client = source.client();
    let fits = |address: &&IpAddr| address.is_ipv4() == endpoint.is_ipv4();
    let others = &source.workload().addresses;
    Some(&client).into_iter().chain(others).find(fits).copied().unwrap_or(client)
}

/// A server that resets plaintext before it says a word may be one that refuses plaintext.
fn plaintext_by_rule(ending: Ending, record: &Record) -> Ending {
    if ending.reason != Some(Reason::ServerReset) || record.progress().back() > 0 {
        return ending;
    }
    let said = "it went out in plaintext, as the rule says: a receiver under STRICT refuses that";
    let detail = ending.detail.map_or_else(|| said.to_owned(), |detail| format!("{detail}; {said}"));
    Ending { detail: Some(detail), ..ending }
}
