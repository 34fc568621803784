//! Into a workload: accept -> identify -> authorise -> deliver.
//!
//! Two ways lead here: the tunnel port, where other nodes bring streams, and the workload's own ports, where clients
//! speak mesh TLS or plaintext, as the destination's policy allows.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::StatusCode;
use node_core::{
    policy::{ConnectionFacts, Presented},
    snapshot::Snapshot,
    tunnel::header::{check_target, parse_authority},
    workload::{TransportMode, Workload},
};
use tokio::{net::TcpStream, time::Instant};

use super::{
    Shared,
    accept::{Accepted, Place, Site},
    authorise::{Admitted, admit},
    carry::{Prefixed, Side, carry},
    deliver::deliver,
    identify::{self, Spoken},
    live::{Registration, TakenWay},
    record::{Ending, Record, known_end, protocol_of, proven_end, workload_end},
    requests::{self, Flights},
    tunnel::{self, Asked, HandshakeFailed, Secured},
};
use crate::{
    certs::{Credentials, verify::Peer},
    telemetry::{Direction, Path, Reason, Tls},
};

/// Serves one connection at the workload's own port.
pub(super) async fn serve(shared: &Arc<Shared>, site: &Arc<Site>, accepted: Accepted, own_port: u16) {
    let (client, target) = (accepted.client, accepted.target);
    let mut record = shared.record(Direction::Inbound, Path::Relay, client, target);
    let ending = tokio::select! {
        biased;
        () = site.gone().cancelled() => shared.gone(),
        ending = come_in(shared, site, accepted, own_port, &mut record) => ending.unwrap_or_else(|refused| refused),
    };
    record.end(ending);
}

async fn come_in(
    shared: &Arc<Shared>,
    site: &Arc<Site>,
    accepted: Accepted,
    own_port: u16,
    record: &mut Record,
) -> Result<Ending, Ending> {
    let Accepted { mut stream, client, target, place: _place } = accepted;
    let snapshot = shared.snapshot();
    record.judged_by(snapshot.number());
    let local = identify::local_client(site, &snapshot, client, target)?;
    let destination = destination(site, &snapshot, client, target, own_port)?;
    learn_destination(record, &destination, target);
    record.learn(|ends| ends.source = known_end(&snapshot, client));
    let facts = |presented| facts(&destination, target, client, presented);
    if let Some(local) = local {
        record.learn(|ends| ends.source = workload_end(&local, client));
        let presented = Presented::Attested(local.identity.clone());
        return through(shared, site, stream, facts(presented), None, record).await;
    }
    let mode = snapshot.transport_mode(&destination, target.port());
    if mode == TransportMode::Disabled {
        return through(shared, site, stream, facts(Presented::Plaintext), None, record).await;
    }
    let turn = site.hello(&shared.events).await?;
    match identify::listen(&mut stream, mode).await? {
        Spoken::Plain(prefix) => {
            drop(turn);
            let client = Prefixed::new(prefix, stream);
            through(shared, site, client, facts(Presented::Plaintext), None, record).await
        }
        Spoken::MeshTls(hello) => {
            let credentials = credentials(shared, &destination).await?;
            // An alert must reach the client, so a failed handshake closes in order.
            stream.settle();
            let secured = tunnel::accept_hello(*hello, stream, credentials.mesh_server()).await;
            drop(turn);
            let Secured { stream, peer, tls, server_name } = secured.map_err(|failed| refused(&failed))?;
            let tls = Tls { server_name: server_name.clone(), ..tls };
            learn_peer(record, &snapshot, client, &peer, tls);
            let presented = Presented::MeshTls { peer: peer.identity, server_name };
            through(shared, site, stream, facts(presented), None, record).await
        }
    }
}

/// Asks the policy; delivers and relays, or serves request by request. `way`: of a connection from inside the node.
pub(super) async fn through<C: Side + Send + 'static>(
    shared: &Arc<Shared>,
    site: &Arc<Site>,
    client: C,
    facts: ConnectionFacts,
    way: Option<TakenWay>,
    record: &mut Record,
) -> Result<Ending, Ending> {
    // Boxed apart, as requests are: what one connection in many needs is no part of those that wait for bytes.
    match Box::pin(admit_and_deliver(shared, site, facts, way, record)).await? {
        Reached::Stream(server, registration) => {
            record.opened();
            Ok(carry(client, server, record, &registration).await)
        }
        Reached::Requests(flights, registration) => {
            record.opened();
            Ok(Box::pin(requests::serve(shared, site, client, flights, &registration, record)).await)
        }
    }
}

/// What a client that was admitted is served by.
enum Reached {
    /// The workload itself.
    Stream(TcpStream, Registration),
    /// The workload, request by request.
    Requests(Arc<Flights>, Registration),
}

async fn admit_and_deliver(
    shared: &Shared,
    site: &Site,
    facts: ConnectionFacts,
    way: Option<TakenWay>,
    record: &mut Record,
) -> Result<Reached, Ending> {
    let target = SocketAddr::new(facts.destination_address, facts.destination_port);
    let (client, workload) = (facts.source_address, facts.destination.name.clone());
    let (permit, registration) = match admit(shared, facts, way, record)? {
        Admitted::Stream(permit, registration) => (permit, registration),
        Admitted::Requests(flights, registration) => return Ok(Reached::Requests(flights, registration)),
    };
    let server = tokio::select! {
        biased;
        cut = registration.cut() => return Err(cut.into()),
        server = deliver(&permit, site, &workload, client, target) => server?,
    };
    record.decided()?;
    Ok(Reached::Stream(server, registration))
}

/// The workload that was dialled: the site's own, or on a host the one that declares the port (T-6). The daemon's own listener
/// is nobody's: a delivery there would come back.
fn destination(
    site: &Site,
    snapshot: &Snapshot,
    client: SocketAddr,
    target: SocketAddr,
    own_port: u16,
) -> Result<Arc<Workload>, Ending> {
    let found = if site.is_host() {
        service_of_host(site, snapshot, client.ip(), target)
    } else {
        snapshot.workload(site.name()).filter(|own| own.addresses.contains(&target.ip()))
    };
    let found = found.filter(|_| target.port() != own_port);
    found.cloned().ok_or_else(|| {
        Ending::denied(
            Reason::Loop,
            "the target is no port of the workload: loopback, or the daemon's own listener",
        )
    })
}

/// Loopback is reached by processes of this host only, whatever the host lets in from outside (T-27).
fn service_of_host<'a>(
    site: &Site,
    snapshot: &'a Snapshot,
    client: IpAddr,
    target: SocketAddr,
) -> Option<&'a Arc<Workload>> {
    if target.ip().is_loopback() {
        let is_local = client.is_loopback() || site.is_own(snapshot, client);
        return snapshot.workload_at_loopback(target.port()).filter(|_| is_local);
    }
    snapshot.workload_at(target.ip(), target.port()).filter(|found| found.node == snapshot.node())
}

fn facts(
    destination: &Arc<Workload>,
    target: SocketAddr,
    client: SocketAddr,
    presented: Presented,
) -> ConnectionFacts {
    ConnectionFacts {
        presented,
        source_address: client.ip(),
        destination_address: target.ip(),
        destination_port: target.port(),
        destination: Arc::clone(destination),
    }
}

fn learn_destination(record: &mut Record, destination: &Workload, target: SocketAddr) {
    record.learn(|ends| {
        ends.destination = workload_end(destination, target);
        ends.protocol = protocol_of(destination, target.port());
    });
}

fn learn_peer(record: &mut Record, snapshot: &Snapshot, client: SocketAddr, peer: &Peer, tls: Tls) {
    record.learn(|ends| ends.source = proven_end(snapshot, client, &peer.identity));
    record.secured_by(tls);
}

async fn credentials(shared: &Shared, workload: &Workload) -> Result<Arc<Credentials>, Ending> {
    let held = Instant::now() + shared.holds.certificate;
    shared
        .credentials
        .wait(&workload.identity, held)
        .await
        .map_err(|late| Ending::failed(Reason::HoldCertificate, late))
}

fn refused(failed: &HandshakeFailed) -> Ending {
    if failed.is_refusal() {
        Ending::denied(failed.reason(), failed)
    } else {
        Ending::failed(failed.reason(), failed)
    }
}

// ---- the tunnel port -----------------------------------------------------------------------------------------------

/// One verified tunnel, as its streams see it.
struct Tunnelled {
    /// Whose certificate was shown to the client.
    presented: Arc<Workload>,
    peer: Peer,
    tls: Tls,
    client: SocketAddr,
    target: SocketAddr,
}

/// Serves one tunnel. Its handshake is a record of its own only if it fails; its streams are.
pub(super) async fn serve_tunnel(shared: &Arc<Shared>, site: &Arc<Site>, accepted: Accepted) {
    let Accepted { stream, client, target, place } = accepted;
    // Streams speak for themselves: an alert or a GOAWAY must reach the other end.
    stream.settle();
    let mut record = shared.record(Direction::Inbound, Path::Tunnel, client, target);
    let opened = tokio::select! {
        biased;
        () = site.gone().cancelled() => return,
        opened = open_tunnel(shared, site, stream, client, target, &mut record) => opened,
    };
    match opened {
        Ok((tunnel, tunnelled)) => serve_streams(shared, site, tunnel, Arc::new(tunnelled), place).await,
        Err(ending) => record.end(ending),
    }
}

async fn open_tunnel(
    shared: &Shared,
    site: &Site,
    stream: TcpStream,
    client: SocketAddr,
    target: SocketAddr,
    record: &mut Record,
) -> Result<(tunnel::Arrived, Tunnelled), Ending> {
    let snapshot = shared.snapshot();
    record.judged_by(snapshot.number());
    record.learn(|ends| ends.source = known_end(&snapshot, client));
    let found = if site.is_host() {
        snapshot.local().find(|local| local.is_host() && local.addresses.contains(&target.ip()))
    } else {
        snapshot.workload(site.name()).filter(|own| own.addresses.contains(&target.ip()))
    };
    let presented = found
        .cloned()
        .ok_or_else(|| Ending::denied(Reason::Loop, "the tunnel arrived at no address of the workload"))?;
    let credentials = credentials(shared, &presented).await?;
    let turn = site.handshake(&shared.events).await?;
    let secured =
        tunnel::accept(stream, credentials.tunnel_server()).await.map_err(|failed| refused(&failed))?;
    let Secured { stream, peer, tls, .. } = secured;
    let tunnel = tunnel::serve(stream).await.map_err(|failed| refused(&failed))?;
    drop(turn);
    Ok((tunnel, Tunnelled { presented, peer, tls, client, target }))
}

/// Takes streams until the client closes, its certificate ends, or this side drains.
async fn serve_streams(
    shared: &Arc<Shared>,
    site: &Arc<Site>,
    mut tunnel: tunnel::Arrived,
    tunnelled: Arc<Tunnelled>,
    _place: Place,
) {
    let expiry = tokio::time::sleep(tunnelled.peer.lasts_for());
    tokio::pin!(expiry);
    let mut finishing = false;
    loop {
        tokio::select! {
            biased;
            () = site.gone().cancelled() => return,
            () = site.closing().cancelled(), if !finishing => {
                finishing = true;
                tunnel.finish();
            }
            () = &mut expiry, if !finishing => {
                finishing = true;
                tunnel.finish();
            }
            asked = tunnel.next() => match asked {
                Some(Ok(asked)) => {
                    let (shared, site) = (Arc::clone(shared), Arc::clone(site));
                    let tunnelled = Arc::clone(&tunnelled);
                    // What was asked is dealt with long before the stream ends; the task holds no more than its place.
                    let asked = Box::new(asked);
                    shared.tasks.clone().spawn(async move {
                        serve_stream(&shared, &site, &tunnelled, asked).await;
                    });
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, client = %tunnelled.client, "tunnel ended");
                    return;
                }
                None => return,
            }
        }
    }
}

async fn serve_stream(shared: &Arc<Shared>, site: &Arc<Site>, tunnelled: &Tunnelled, asked: Box<Asked>) {
    let mut record = shared.record(Direction::Inbound, Path::Tunnel, tunnelled.client, tunnelled.target);
    let ending = tokio::select! {
        biased;
        () = site.gone().cancelled() => shared.gone(),
        ending = stream_in(shared, site, tunnelled, asked, &mut record) => ending,
    };
    record.end(ending);
}

async fn stream_in(
    shared: &Arc<Shared>,
    site: &Arc<Site>,
    tunnelled: &Tunnelled,
    asked: Box<Asked>,
    record: &mut Record,
) -> Ending {
    let (stream, reached, _place) = match Box::pin(open(shared, site, tunnelled, asked, record)).await {
        Ok(opened) => opened,
        Err(ending) => return ending,
    };
    match reached {
        Reached::Stream(server, registration) => carry(stream, server, record, &registration).await,
        Reached::Requests(flights, registration) => {
            Box::pin(requests::serve(shared, site, stream, flights, &registration, record)).await
        }
    }
}

/// Reaches the workload and answers the client.
async fn open(
    shared: &Shared,
    site: &Site,
    tunnelled: &Tunnelled,
    asked: Box<Asked>,
    record: &mut Record,
) -> Result<(tunnel::Stream, Reached, Place), Ending> {
    let (reached, place) = match stream_to_workload(shared, site, tunnelled, &asked, record).await {
        Ok(reached) => reached,
        Err(ending) => {
            asked.refuse(status(&ending));
            return Err(ending);
        }
    };
    record.opened();
    match asked.accept() {
        Ok(stream) => Ok((stream, reached, place)),
        Err(error) => {
            if let Reached::Stream(server, _) = reached {
                server.arm();
            }
            Err(Ending::broken(Reason::TunnelLost, error))
        }
    }
}

async fn stream_to_workload(
    shared: &Shared,
    site: &Site,
    tunnelled: &Tunnelled,
    asked: &Asked,
    record: &mut Record,
) -> Result<(Reached, Place), Ending> {
    let snapshot = shared.snapshot();
    record.judged_by(snapshot.number());
    learn_peer(record, &snapshot, tunnelled.client, &tunnelled.peer, tunnelled.tls.clone());
    let (destination, target) = target_of(site, &snapshot, tunnelled, asked)?;
    learn_destination(record, &destination, target);
    let place = site.place_now(shared)?;
    let presented = Presented::Tunnel(tunnelled.peer.identity.clone());
    // The tunnel's own address is the source's (T-9); nothing that the client writes about itself is read.
    let facts = facts(&destination, target, tunnelled.client, presented);
    let reached = admit_and_deliver(shared, site, facts, None, record).await?;
    Ok((reached, place))
}

/// Which workload and port are meant (T-8).
fn target_of(
    site: &Site,
    snapshot: &Snapshot,
    tunnelled: &Tunnelled,
    asked: &Asked,
) -> Result<(Arc<Workload>, SocketAddr), Ending> {
    let bad = |problem: &dyn std::fmt::Display| Ending::denied(Reason::BadAuthority, problem);
    let authority = asked.authority().ok_or_else(|| bad(&"the request is no CONNECT with an authority"))?;
    let target = parse_authority(authority).map_err(|problem| bad(&problem))?;
    if target.is_ipv4() != tunnelled.client.is_ipv4() {
        return Err(bad(&"the authority is of another address family than the tunnel"));
    }
    let destination = if site.is_host() {
        let found = snapshot.workload_at(target.ip(), target.port()).filter(|found| found.is_host());
        // The client accepted one identity's certificate; another's workload is not behind it.
        found.filter(|found| found.node == snapshot.node() && found.identity == tunnelled.presented.identity)
    } else {
        snapshot.workload(site.name())
    };
    let destination = destination.ok_or_else(|| bad(&"the authority names no workload that was reached"))?;
    check_target(destination, target).map_err(|problem| bad(&problem))?;
    Ok((Arc::clone(destination), target))
}

/// T-8: 400 is the client's mistake, 403 the policy, 503 nothing behind.
fn status(ending: &Ending) -> StatusCode {
    match ending.reason {
        Some(Reason::BadAuthority) => StatusCode::BAD_REQUEST,
        _ if ending.is_denial() => StatusCode::FORBIDDEN,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}
