use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{Method, Request, StatusCode};
use node_core::{
    policy::{ConnectionFacts, Presented},
    tunnel::TUNNEL_PORT,
    workload::ObjectName,
};
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;

use super::{
    Handle,
    accept::{Limits, Site},
    carry::Side as _,
    ground::Ground,
    live::{Judged, Live},
    outbound,
    testing::{
        Answer, BACKEND, FRONTEND, LIMITS, Node, OWN_PORT, SERVICE, STRANGER, World, allow, at, mesh, pair,
        service, usual, workload,
    },
    tunnel::STREAMS_PER_TUNNEL_MAX,
};
use crate::{
    certs::testing::{Ca, identity},
    telemetry::{Direction, Path, Reason},
};

/// Long enough for anything that shall happen on this machine, short enough for a test that fails.
const SOON: Duration = Duration::from_secs(20);

/// What the other end made of a connection: `Ok` is an orderly end.
async fn rest(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut read = Vec::new();
    match timeout(SOON, stream.read_to_end(&mut read)).await {
        Ok(Ok(_)) => Ok(read),
        Ok(Err(error)) => Err(error),
        Err(_) => panic!("the connection neither ended nor carried more than {} bytes", read.len()),
    }
}

async fn is_reset(stream: &mut TcpStream) {
    let error = rest(stream).await.expect_err("a reset, never an orderly end");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

async fn exchange(client: &mut TcpStream, server: &mut TcpStream) {
    let mut read = [0; 4];
    client.write_all(b"ping").await.expect("open");
    timeout(SOON, server.read_exact(&mut read)).await.expect("in time").expect("open");
    server.write_all(b"pong").await.expect("open");
    timeout(SOON, client.read_exact(&mut read)).await.expect("in time").expect("open");
    assert_eq!(&read, b"pong");
}

// ---- the tunnel from end to end ------------------------------------------------------------------------------------

#[tokio::test]
async fn bytes_half_closes_and_the_true_client_address_go_through_the_tunnel() {
    let mut world = World::new(usual());
    let mut client = world.a.connect(FRONTEND, at(SERVICE, 80)).await;
    client.write_all(b"question").await.expect("open");
    client.shutdown().await.expect("open");
    let (mut server, seen) = world.backend.recv().await.expect("the backend is reached");
    assert_eq!(seen.to_string(), FRONTEND); // T-9
    assert_eq!(rest(&mut server).await.expect("an orderly end"), b"question");
    server.write_all(b"answer").await.expect("this direction is open");
    drop(server);
    assert_eq!(rest(&mut client).await.expect("an orderly end"), b"answer");
    for (node, reporter) in [(&world.a, "source"), (&world.b, "destination")] {
        let pieces =
            ["istio_tcp_connections_closed_total", reporter, "mutual_tls", "sa/frontend", "sa/backend"];
        node.until_counted(&pieces).await;
    }
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard() {
    let mut world = World::new(usual());
    let (mut client, mut server) = world.connected().await;
    server.write_all(b"220 ready\r\n").await.expect("open");
    let mut greeting = [0; 11];
    timeout(SOON, client.read_exact(&mut greeting)).await.expect("in time").expect("open");
    exchange(&mut client, &mut server).await;
}

#[tokio::test]
async fn many_bytes_arrive_whole_in_both_directions_at_once() {
    const BYTES: usize = 24 * 1024 * 1024;
    let mut world = World::new(usual());
    let (client, server) = world.connected().await;
    let byte = |i: usize| u8::try_from(i % 251).expect("below 251");
    let both = |stream: TcpStream| async move {
        let (mut read, mut write) = stream.into_split();
        let sender = tokio::spawn(async move {
            let all: Vec<u8> = (0..BYTES).map(byte).collect();
            write.write_all(&all).await.expect("open");
            write.shutdown().await.expect("open");
        });
        let mut received = Vec::with_capacity(BYTES);
        read.read_to_end(&mut received).await.expect("an orderly end");
        sender.await.expect("no panic");
        assert_eq!(received.len(), BYTES);
        assert!(received.iter().enumerate().all(|(i, found)| *found == byte(i)));
    };
    tokio::join!(both(client), both(server));
}

#[tokio::test]
async fn a_reset_on_either_side_is_a_reset_on_the_other() {
    let mut world = World::new(usual());
    let (client, mut server) = world.connected().await;
    crate::net::reset(client);
    is_reset(&mut server).await;
    let (mut client, server) = world.connected().await;
    crate::net::reset(server);
    is_reset(&mut client).await;
}

#[tokio::test]
async fn a_pair_that_is_not_allowed_is_reset_without_reaching_the_workload() {
    let mut documents = usual();
    documents.push(allow("somebody-else"));
    let mut world = World::new(documents);
    let mut client = world.a.connect(FRONTEND, at(SERVICE, 80)).await;
    client.write_all(b"let me in").await.expect("the application believes itself connected");
    is_reset(&mut client).await;
    world.b.until_counted(&["culvert_denials_total", "inbound", "no_rule_allows"]).await;
    world.a.until_counted(&["culvert_denials_total", "outbound", "peer_denied"]).await;
    assert!(world.backend.try_recv().is_err(), "nothing was dialled");
    assert_eq!(world.b.ground.dials(at(BACKEND, 8080)), 0);
}

#[tokio::test]
async fn a_workload_that_does_not_listen_there_is_a_reset() {
    let world = World::new(usual());
    let mut client = world.a.connect(FRONTEND, at(BACKEND, 9_999)).await;
    is_reset(&mut client).await;
}

#[tokio::test]
async fn the_stream_after_the_last_place_of_a_tunnel_gets_another_tunnel() {
    let mut world = World::new(usual());
    let tunnel = at(BACKEND, TUNNEL_PORT);
    let mut open = Vec::new();
    for _ in 0..STREAMS_PER_TUNNEL_MAX {
        open.push(world.connected().await);
    }
    assert_eq!(world.a.ground.dials(tunnel), 1);
    let (mut client, mut server) = world.connected().await;
    exchange(&mut client, &mut server).await;
    assert_eq!(world.a.ground.dials(tunnel), 2);
    let (client, server) = open.last_mut().expect("many");
    exchange(client, server).await;
}

#[tokio::test]
async fn a_crowd_dials_one_tunnel() {
    let mut world = World::new(usual());
    let mut clients = Vec::new();
    for _ in 0..50 {
        clients.push(world.a.connect(FRONTEND, at(SERVICE, 80)).await);
    }
    for _ in 0..50 {
        world.backend.recv().await.expect("the backend is reached");
    }
    assert_eq!(world.a.ground.dials(at(BACKEND, TUNNEL_PORT)), 1);
}

#[tokio::test]
async fn two_workloads_of_one_account_never_share_a_tunnel() {
    // T-9
    let mut documents = usual();
    let mut twin = workload("frontend-2", "node-a", "10.8.1.5");
    twin["spec"]["serviceAccount"] = "frontend".into();
    documents.push(twin);
    let mut world = World::new(documents);
    let _first = world.connected().await;
    let ground = Arc::clone(&world.a.ground) as Arc<dyn Ground>;
    let twin = Site::new(ObjectName::new("photo", "frontend-2"), false, ground, &world.a.shared);
    let (_client, captured) = pair().await;
    let place = twin.place(&world.a.shared).await.expect("free");
    let accepted = super::accept::Accepted {
        stream: captured,
        client: at("10.8.1.5", 33_000),
        target: at(SERVICE, 80),
        place,
    };
    let node = Arc::clone(&world.a);
    tokio::spawn(async move { outbound::serve(&node.shared, &twin, accepted, OWN_PORT).await });
    let (_server, seen) = world.backend.recv().await.expect("the backend is reached");
    assert_eq!(seen.to_string(), "10.8.1.5");
    assert_eq!(world.a.ground.dials(at(BACKEND, TUNNEL_PORT)), 2);
}

#[tokio::test]
async fn a_renewed_certificate_is_presented_on_a_new_tunnel_while_the_old_one_goes_on() {
    let mut world = World::new(usual());
    let (mut client, mut server) = world.connected().await;
    world.ca.issue(&world.a.shared.credentials, "frontend");
    let (mut newer_client, mut newer_server) = world.connected().await;
    assert_eq!(world.a.ground.dials(at(BACKEND, TUNNEL_PORT)), 2);
    exchange(&mut newer_client, &mut newer_server).await;
    exchange(&mut client, &mut server).await;
}

#[tokio::test]
async fn a_tunnel_that_is_being_closed_takes_no_new_stream_and_ends_with_its_last() {
    let mut world = World::new(usual());
    let (mut client, mut server) = world.connected().await;
    let successor = Node::new("node-b", "backend", world.ca.store(&["backend"]), usual());
    let mut reached = successor.ground.serve(at(BACKEND, 8080));
    world.a.ground.set(at(BACKEND, TUNNEL_PORT), Answer::Daemon(successor));
    world.b.shared.closing.cancel();
    let mut newer = Vec::new();
    for _ in 0..20 {
        let mut client = world.a.connect(FRONTEND, at(SERVICE, 80)).await;
        let (mut server, _) = tokio::select! {
            server = reached.recv() => server.expect("the successor is reached"),
            // One that was under way before the GOAWAY came.
            server = world.backend.recv() => server.expect("the old one is reached"),
        };
        exchange(&mut client, &mut server).await;
        newer.push((client, server));
    }
    assert_eq!(world.a.ground.dials(at(BACKEND, TUNNEL_PORT)), 2);
    exchange(&mut client, &mut server).await;
}

#[tokio::test]
async fn a_slow_reader_holds_a_bounded_number_of_bytes_and_nobody_else_up() {
    // T-11. Both windows of HTTP/2, the send buffers, and the kernel's own buffers of four sockets.
    const BYTES_MAX: usize = 64 * 1024 * 1024;
    let mut world = World::new(usual());
    let (mut client, _slow) = world.connected().await;
    let junk = vec![0; 256 * 1024];
    let mut taken = 0;
    while let Ok(written) = timeout(Duration::from_millis(500), client.write(&junk)).await {
        taken += written.expect("open");
        assert!(taken < BYTES_MAX, "{taken} bytes without a reader");
    }
    assert!(taken > 1024 * 1024);
    let (mut other_client, mut other_server) = world.connected().await;
    exchange(&mut other_client, &mut other_server).await;
    assert_eq!(world.a.ground.dials(at(BACKEND, TUNNEL_PORT)), 1, "it shared the tunnel");
}

// ---- who is at the other end ---------------------------------------------------------------------------------------

#[tokio::test]
async fn a_server_that_may_not_run_the_service_gets_nothing() {
    // The node of the backend believes that another account runs there.
    let ca = Ca::new("mesh");
    let mut theirs = usual();
    theirs[2]["spec"]["serviceAccount"] = "impostor".into();
    let a = Node::new("node-a", "frontend", ca.store(&["frontend"]), usual());
    let b = Node::new("node-b", "backend", ca.store(&["impostor"]), theirs);
    a.ground.set(at(BACKEND, TUNNEL_PORT), Answer::Daemon(Arc::clone(&b)));
    let mut client = a.connect(FRONTEND, at(SERVICE, 80)).await;
    is_reset(&mut client).await;
    a.until_counted(&["culvert_denials_total", "outbound", "secure_naming"]).await;
    assert_eq!(a.ground.dials(at(BACKEND, TUNNEL_PORT)), 1, "it is not tried again");
}

#[tokio::test]
async fn authorities_that_differ_refuse_each_other_at_once() {
    let (ours, theirs) = (Ca::new("ours"), Ca::new("theirs"));
    let a = Node::new("node-a", "frontend", ours.store(&["frontend"]), usual());
    let b = Node::new("node-b", "backend", theirs.store(&["backend"]), usual());
    a.ground.set(at(BACKEND, TUNNEL_PORT), Answer::Daemon(Arc::clone(&b)));
    let mut client = a.connect(FRONTEND, at(SERVICE, 80)).await;
    is_reset(&mut client).await;
    a.until_counted(&["culvert_denials_total", "outbound", "other_ca"]).await;
}

#[tokio::test]
async fn a_client_of_another_authority_is_refused_by_the_server_and_does_not_try_again() {
    // The client trusts the server's authority; the server does not trust the client's.
    let (ours, theirs) = (Ca::new("ours"), Ca::new("theirs"));
    let store = theirs.store(&["frontend"]);
    store.trust().store(ours.trust().load_full());
    let a = Node::new("node-a", "frontend", store, usual());
    let b = Node::new("node-b", "backend", ours.store(&["backend"]), usual());
    a.ground.set(at(BACKEND, TUNNEL_PORT), Answer::Daemon(Arc::clone(&b)));
    let mut client = a.connect(FRONTEND, at(SERVICE, 80)).await;
    is_reset(&mut client).await;
    b.until_counted(&["culvert_denials_total", "inbound", "other_ca"]).await;
    assert_eq!(a.ground.dials(at(BACKEND, TUNNEL_PORT)), 1, "a refusal is final");
}

#[tokio::test]
async fn a_client_that_is_not_the_workload_itself_is_not_vouched_for() {
    let world = World::new(usual());
    let mut client = world.a.connect("10.8.1.77", at(SERVICE, 80)).await;
    is_reset(&mut client).await;
    world.a.until_counted(&["culvert_denials_total", "outbound", "not_attested"]).await;
}

// ---- the tunnel's head ---------------------------------------------------------------------------------------------

/// A peer with a good certificate that writes its own heads.
async fn attacker(world: &World) -> h2::client::SendRequest<Bytes> {
    let credentials = world.a.shared.credentials.credentials(&identity("frontend")).expect("issued");
    let config = credentials.client(Arc::new([identity("backend")].into()));
    let (near, far) = pair().await;
    world.b.tunnel_from(at(FRONTEND, 34_000), far).await;
    let name = ServerName::try_from(BACKEND).expect("an address");
    let stream = TlsConnector::from(config).connect(name, near).await.expect("a good certificate");
    let (requests, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    requests.ready().await.expect("open")
}

async fn asked(world: &World, method: Method, authority: &str) -> StatusCode {
    let uri = if method == Method::CONNECT { authority.to_owned() } else { format!("http://{authority}/") };
    let request = Request::builder().method(method).uri(uri).body(()).expect("a head");
    let (answer, _stream) = attacker(world).await.send_request(request, false).expect("open");
    timeout(SOON, answer).await.expect("in time").expect("an answer").status()
}

#[tokio::test]
async fn only_an_address_of_the_workload_itself_can_be_asked_for() {
    // T-8
    let world = World::new(usual());
    for (authority, expected) in [
        ("127.0.0.1:8080", StatusCode::BAD_REQUEST),
        ("169.254.169.254:80", StatusCode::BAD_REQUEST),
        ("10.8.1.4:8080", StatusCode::BAD_REQUEST),
        ("10.9.0.10:80", StatusCode::BAD_REQUEST),
        ("backend.photo.svc:8080", StatusCode::BAD_REQUEST),
        ("localhost:8080", StatusCode::BAD_REQUEST),
        ("[::ffff:10.8.2.4]:8080", StatusCode::BAD_REQUEST),
        ("[fd00::4]:8080", StatusCode::BAD_REQUEST),
        ("10.8.2.4:15008", StatusCode::BAD_REQUEST),
        ("10.8.2.4:15020", StatusCode::BAD_REQUEST),
        ("10.8.2.4:15021", StatusCode::BAD_REQUEST),
        ("10.8.2.4:0", StatusCode::BAD_REQUEST),
        ("10.8.2.4:08080", StatusCode::BAD_REQUEST),
        ("10.8.2.4", StatusCode::BAD_REQUEST),
        ("10.8.2.4:9999", StatusCode::SERVICE_UNAVAILABLE),
        ("10.8.2.4:8080", StatusCode::OK),
    ] {
        assert_eq!(asked(&world, Method::CONNECT, authority).await, expected, "{authority}");
    }
    assert_eq!(asked(&world, Method::GET, "10.8.2.4:8080").await, StatusCode::BAD_REQUEST);
    world.b.until_counted(&["culvert_denials_total", "inbound", "bad_authority"]).await;
}

#[tokio::test]
async fn policy_is_asked_before_anything_is_dialled() {
    let mut documents = usual();
    documents.push(allow("somebody-else"));
    let world = World::new(documents);
    assert_eq!(asked(&world, Method::CONNECT, "10.8.2.4:8080").await, StatusCode::FORBIDDEN);
    assert_eq!(asked(&world, Method::CONNECT, "10.8.2.4:9999").await, StatusCode::FORBIDDEN);
    assert_eq!(world.b.ground.dials(at(BACKEND, 8080)), 0);
}

// ---- what is held, and for how long --------------------------------------------------------------------------------

/// How long the daemon held a connection before it reset it, by the paused clock.
async fn held(client: &mut TcpStream) -> Duration {
    let before = Instant::now();
    let error = client.read(&mut [0; 1]).await.expect_err("a reset, never an orderly end");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    before.elapsed()
}

fn about(found: Duration, seconds: u64) {
    let wanted = Duration::from_secs(seconds);
    let range = wanted.saturating_sub(Duration::from_secs(1))..=wanted + Duration::from_secs(1);
    assert!(range.contains(&found), "held {found:?}, expected about {wanted:?}");
}

#[tokio::test(start_paused = true)]
async fn a_connection_waits_for_its_sources_certificate_for_ten_seconds() {
    let ca = Ca::new("mesh");
    let a = Node::new("node-a", "frontend", ca.store(&[]), usual());
    let mut client = a.connect(FRONTEND, at(SERVICE, 80)).await;
    about(held(&mut client).await, 10);
    a.until_counted(&["hold_certificate"]).await;
}

#[tokio::test]
async fn a_certificate_that_comes_in_time_lets_the_connection_go_on() {
    let ca = Ca::new("mesh");
    let a = Node::new("node-a", "frontend", ca.store(&[]), usual());
    let b = Node::new("node-b", "backend", ca.store(&[]), usual());
    a.ground.set(at(BACKEND, TUNNEL_PORT), Answer::Daemon(Arc::clone(&b)));
    let mut backend = b.ground.serve(at(BACKEND, 8080));
    let mut client = a.connect(FRONTEND, at(SERVICE, 80)).await;
    tokio::task::yield_now().await;
    ca.issue(&a.shared.credentials, "frontend");
    tokio::task::yield_now().await;
    ca.issue(&b.shared.credentials, "backend");
    let (mut server, _) = timeout(SOON, backend.recv()).await.expect("in time").expect("reached");
    exchange(&mut client, &mut server).await;
}

#[tokio::test(start_paused = true)]
async fn an_address_of_the_mesh_that_nobody_knows_is_held_for_five_seconds_then_denied() {
    let world = World::new(usual());
    let mut client = world.a.connect(FRONTEND, at(STRANGER, 80)).await;
    about(held(&mut client).await, 5);
    world.a.until_counted(&["culvert_denials_total", "hold_unknown_address"]).await;
    assert_eq!(world.a.ground.dials(at(STRANGER, 80)), 0, "nothing went out in plaintext");
}

#[tokio::test]
async fn an_address_that_becomes_known_in_time_is_reached() {
    let mut world = World::new(vec![mesh("STRICT"), workload("frontend", "node-a", FRONTEND)]);
    world.b.publish(usual());
    let mut client = world.a.connect(FRONTEND, at(BACKEND, 8080)).await;
    tokio::task::yield_now().await;
    world.a.publish(usual());
    let (mut server, _) = timeout(SOON, world.backend.recv()).await.expect("in time").expect("reached");
    exchange(&mut client, &mut server).await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_whose_daemon_is_away_is_tried_for_ten_seconds() {
    // T-4
    let ca = Ca::new("mesh");
    let a = Node::new("node-a", "frontend", ca.store(&["frontend"]), usual());
    let tunnel = at(BACKEND, TUNNEL_PORT);
    let mut client = a.connect(FRONTEND, at(SERVICE, 80)).await;
    about(held(&mut client).await, 10);
    assert!(a.ground.dials(tunnel) > 8, "{} attempts", a.ground.dials(tunnel));
    a.ground.set(tunnel, Answer::Nothing);
    let mut client = a.connect(FRONTEND, at(SERVICE, 80)).await;
    about(held(&mut client).await, 10);
    a.until_counted(&["dead_peer"]).await;
}

#[tokio::test]
async fn a_peer_whose_daemon_returns_in_time_is_reached() {
    // T-4
    let mut world = World::new(usual());
    let tunnel = at(BACKEND, TUNNEL_PORT);
    let (closed, _) = tokio::sync::mpsc::channel(1);
    world.a.ground.set(tunnel, Answer::Server(closed));
    let mut client = world.a.connect(FRONTEND, at(SERVICE, 80)).await;
    while world.a.ground.dials(tunnel) < 2 {
        tokio::task::yield_now().await;
    }
    world.a.ground.set(tunnel, Answer::Daemon(Arc::clone(&world.b)));
    let (mut server, _) = timeout(SOON, world.backend.recv()).await.expect("in time").expect("reached");
    exchange(&mut client, &mut server).await;
}

// ---- what must not go out ------------------------------------------------------------------------------------------

#[tokio::test]
async fn the_daemons_own_listener_and_loopback_are_no_targets() {
    // T-6
    let world = World::new(usual());
    for target in [at("127.0.0.1", 80), at("::1", 80), at("0.0.0.0", 80), at(FRONTEND, OWN_PORT)] {
        let mut client = world.a.connect(FRONTEND, target).await;
        is_reset(&mut client).await;
        assert_eq!(world.a.ground.dials(target), 0);
    }
    world.a.until_counted(&["culvert_denials_total", "outbound", "loop"]).await;
    for target in [at("127.0.0.1", 8080), at(STRANGER, 8080), at(BACKEND, OWN_PORT)] {
        let mut client = world.b.approach(FRONTEND, target).await;
        is_reset(&mut client).await;
        assert_eq!(world.b.ground.dials(target), 0);
    }
    world.b.until_counted(&["culvert_denials_total", "inbound", "loop"]).await;
}

#[tokio::test]
async fn a_service_without_endpoints_is_a_reset_with_its_reason() {
    let world = World::new(vec![mesh("STRICT"), workload("frontend", "node-a", FRONTEND), service()]);
    let mut client = world.a.connect(FRONTEND, at(SERVICE, 80)).await;
    is_reset(&mut client).await;
    world.a.until_counted(&["culvert_denials_total", "no_endpoints"]).await;
    let mut client = world.a.connect(FRONTEND, at(SERVICE, 81)).await;
    is_reset(&mut client).await;
    world.a.until_counted(&["culvert_denials_total", "no_such_service_port"]).await;
}

#[tokio::test]
async fn what_is_outside_the_mesh_is_relayed_unchanged_from_the_workloads_address() {
    let world = World::new(usual());
    let outside = at("192.0.2.7", 443);
    let mut servers = world.a.ground.serve(outside);
    let mut client = world.a.connect(FRONTEND, outside).await;
    client.write_all(b"as it is").await.expect("open");
    client.shutdown().await.expect("open");
    let (mut server, seen) = servers.recv().await.expect("dialled");
    assert_eq!(seen.to_string(), FRONTEND);
    assert_eq!(rest(&mut server).await.expect("an orderly end"), b"as it is");
    crate::net::reset(server);
    is_reset(&mut client).await;
    let mut client = world.a.connect(FRONTEND, at("192.0.2.8", 443)).await;
    is_reset(&mut client).await;
}

// ---- the workload's own port ---------------------------------------------------------------------------------------

#[tokio::test]
async fn under_strict_a_plaintext_client_is_reset_at_its_first_byte() {
    let world = World::new(usual());
    let before = std::time::Instant::now();
    let mut client = world.b.approach("10.8.1.4", at(BACKEND, 8080)).await;
    client.write_all(b"GET / HTTP/1.1\r\n").await.expect("open");
    is_reset(&mut client).await;
    assert!(before.elapsed() < Duration::from_secs(5));
    world.b.until_counted(&["culvert_denials_total", "inbound", "plaintext_refused"]).await;
    assert_eq!(world.b.ground.dials(at(BACKEND, 8080)), 0);
}

#[tokio::test(start_paused = true)]
async fn under_strict_a_silent_client_is_closed_after_the_handshake_time() {
    let world = World::new(usual());
    let mut client = world.b.approach("10.8.1.4", at(BACKEND, 8080)).await;
    about(held(&mut client).await, 10);
    world.b.until_counted(&["handshake_timed_out"]).await;
}

fn permissive() -> Vec<Value> {
    let mut documents = usual();
    documents[0] = mesh("PERMISSIVE");
    documents
}

#[tokio::test]
async fn under_permissive_plaintext_is_delivered_with_its_first_bytes_and_its_client() {
    let mut world = World::new(permissive());
    let mut client = world.b.approach("10.8.7.7", at(BACKEND, 8080)).await;
    client.write_all(b"hello").await.expect("open");
    let (mut server, seen) = world.backend.recv().await.expect("delivered");
    assert_eq!(seen.to_string(), "10.8.7.7");
    let mut read = [0; 5];
    server.read_exact(&mut read).await.expect("open");
    assert_eq!(&read, b"hello");
    exchange(&mut client, &mut server).await;
}

#[tokio::test(start_paused = true)]
async fn under_permissive_a_server_may_speak_first_after_a_tenth_of_a_second() {
    let mut world = World::new(permissive());
    let before = Instant::now();
    let mut client = world.b.approach("10.8.7.7", at(BACKEND, 8080)).await;
    let (mut server, _) = world.backend.recv().await.expect("delivered");
    let waited = before.elapsed();
    assert!((Duration::from_millis(100)..Duration::from_millis(200)).contains(&waited), "{waited:?}");
    server.write_all(b"220 ready").await.expect("open");
    let mut greeting = [0; 9];
    client.read_exact(&mut greeting).await.expect("open");
}

#[tokio::test]
async fn under_permissive_an_identity_rule_denies_plaintext() {
    let mut documents = permissive();
    documents.push(allow("frontend"));
    let world = World::new(documents);
    let mut client = world.b.approach("10.8.1.4", at(BACKEND, 8080)).await;
    client.write_all(b"hello").await.expect("open");
    is_reset(&mut client).await;
    world.b.until_counted(&["culvert_denials_total", "no_rule_allows"]).await;
}

/// A TLS client on the workload's own port, with this account's certificate and these ALPN names.
async fn mesh_tls(
    world: &World,
    account: &str,
    alpn: &[&[u8]],
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let store = world.ca.store(&[account]);
    let credentials = store.credentials(&identity(account)).expect("issued");
    let mut config = rustls::ClientConfig::clone(&credentials.client(Arc::new([identity("backend")].into())));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let near = world.b.approach(FRONTEND, at(BACKEND, 8080)).await;
    let name = ServerName::try_from(BACKEND).expect("an address");
    TlsConnector::from(Arc::new(config)).connect(name, near).await
}

#[tokio::test]
async fn mesh_tls_on_the_workloads_port_is_terminated_and_judged_like_a_tunnel() {
    for mode in ["STRICT", "PERMISSIVE"] {
        let mut documents = usual();
        documents[0] = mesh(mode);
        documents.push(allow("frontend"));
        let mut world = World::new(documents);
        let mut client = mesh_tls(&world, "frontend", &[b"istio", b"h2"]).await.expect("a good certificate");
        assert_eq!(client.get_ref().1.alpn_protocol(), None, "the private name is never selected");
        client.write_all(b"clear").await.expect("open");
        client.shutdown().await.expect("open");
        let (mut server, _) = world.backend.recv().await.expect("delivered");
        assert_eq!(rest(&mut server).await.expect("an orderly end"), b"clear", "{mode}");
        drop(server);
        let mut left = Vec::new();
        client.read_to_end(&mut left).await.expect("an orderly end");

        let mut refused = mesh_tls(&world, "stranger", &[b"istio"]).await.expect("a good certificate");
        let ended = refused.read_to_end(&mut left).await;
        assert!(ended.is_err(), "{mode}: {ended:?}");
        world.b.until_counted(&["culvert_denials_total", "no_rule_allows"]).await;
    }
}

#[tokio::test]
async fn tls_that_is_not_the_meshs_is_the_applications_own_under_permissive_and_refused_under_strict() {
    let mut world = World::new(permissive());
    let near = world.b.approach("10.8.7.7", at(BACKEND, 8080)).await;
    let credentials = world.ca.store(&["backend"]).credentials(&identity("backend")).expect("issued");
    let config = credentials.client(Arc::new([identity("backend")].into()));
    let name = ServerName::try_from(BACKEND).expect("an address");
    // The application terminates TLS itself, with ALPN h2.
    let application = async {
        let (server, _) = world.backend.recv().await.expect("delivered");
        tokio_rustls::TlsAcceptor::from(credentials.tunnel_server()).accept(server).await
    };
    let (client, server) =
        tokio::join!(TlsConnector::from(Arc::clone(&config)).connect(name.clone(), near), application);
    assert!(client.is_ok() && server.is_ok(), "{client:?} {server:?}");

    let strict = World::new(usual());
    let near = strict.b.approach("10.8.7.7", at(BACKEND, 8080)).await;
    let refused = TlsConnector::from(config).connect(name, near).await.expect_err("no mesh TLS");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionReset);
}

// ---- a changing mesh -----------------------------------------------------------------------------------------------

/// T-18, every interleaving of an authorisation with a publish that takes the permit away. The authorisation has three
/// steps (judge, register, confirm), the publish two (send, re-judge, which may stall); in whatever order they come,
/// the connection is ended.
#[tokio::test]
async fn no_publish_slips_between_judging_registering_and_confirming() {
    for send_before in 0..=3 {
        for rejudge_before in send_before..=3 {
            let world = World::new(usual());
            let node = &world.b;
            let after = node.compile(changed());
            let (sender, snapshots) = watch::channel(node.shared.snapshot());
            let live = Arc::new(Live::default());
            let destination = Arc::clone(node.shared.snapshot().workload(node.site.name()).expect("known"));
            let facts = ConnectionFacts {
                presented: Presented::Tunnel(identity("frontend")),
                source_address: at(FRONTEND, 1).ip(),
                destination_address: at(BACKEND, 1).ip(),
                destination_port: 8080,
                destination,
            };
            let publish = async |step| {
                if step == send_before {
                    sender.send_replace(Arc::clone(&after));
                }
                if step == rejudge_before {
                    live.rejudge(&after).await;
                }
            };
            publish(0).await;
            let judged_by = Arc::clone(&snapshots.borrow());
            let Ok(_permit) = judged_by.authorise(&facts) else {
                assert_eq!(send_before, 0, "only the new snapshot denies");
                continue;
            };
            publish(1).await;
            let record =
                node.shared.record(Direction::Inbound, Path::Tunnel, at(FRONTEND, 1), at(BACKEND, 8080));
            let registration =
                live.register(Judged::Inbound(facts), &judged_by, record.ends(), record.progress());
            publish(2).await;
            let confirmed = registration.confirm(&snapshots);
            publish(3).await;
            let ended = confirmed.is_err() || registration.cut().now_or_never().is_some();
            assert!(ended, "sent before step {send_before}, re-judged before step {rejudge_before}");
        }
    }
}

/// The backend's policy: everybody, or only an account that is not the caller's.
fn changed() -> Vec<Value> {
    let mut documents = usual();
    documents.push(allow("somebody-else"));
    documents
}

#[tokio::test]
async fn a_connection_that_lost_its_permit_is_reset_within_a_second() {
    // T-18
    let mut world = World::new(usual());
    let (mut client, mut server) = world.connected().await;
    exchange(&mut client, &mut server).await;
    let before = std::time::Instant::now();
    world.b.publish(changed());
    is_reset(&mut client).await;
    is_reset(&mut server).await;
    assert!(before.elapsed() < Duration::from_secs(1), "{:?}", before.elapsed());
    world.b.until_counted(&["culvert_denials_total", "inbound", "no_rule_allows"]).await;
}

#[tokio::test]
async fn a_connection_that_keeps_its_permit_outlives_a_change() {
    let mut world = World::new(usual());
    let (mut client, mut server) = world.connected().await;
    let mut documents = usual();
    documents.push(allow("frontend"));
    world.b.publish(documents.clone());
    world.a.publish(documents);
    exchange(&mut client, &mut server).await;
    let view = world.b.shared.live.views().pop().expect("open");
    assert_eq!(view.snapshot, world.b.shared.snapshot().number());
}

#[tokio::test]
async fn a_connection_whose_way_leads_elsewhere_is_reset() {
    // T-18, on the way out: the service has other endpoints, and the one it reached left the mesh.
    let mut world = World::new(usual());
    let (mut client, mut server) = world.connected().await;
    exchange(&mut client, &mut server).await;
    let mut documents = usual();
    documents.retain(|document| document["metadata"]["name"] != "backend" || document["kind"] != "Workload");
    world.a.publish(documents);
    is_reset(&mut client).await;
}

#[tokio::test]
async fn a_workload_that_leaves_takes_its_connections_with_it() {
    let mut world = World::new(usual());
    let (mut client, _server) = world.connected().await;
    world.b.site.leave();
    is_reset(&mut client).await;
}

#[tokio::test]
async fn draining_lets_open_connections_end_and_resets_the_rest() {
    let mut world = World::new(usual());
    let (mut first_client, mut first_server) = world.connected().await;
    let (mut second_client, mut second_server) = world.connected().await;
    let handle = Handle { shared: Arc::clone(&world.b.shared), _tasks: JoinSet::new() };
    let drained = tokio::spawn(handle.drain(Duration::from_secs(2)));
    world.b.site.closing().cancelled().await;
    exchange(&mut first_client, &mut first_server).await;
    first_client.shutdown().await.expect("open");
    drop(first_server);
    assert_eq!(rest(&mut first_client).await.expect("an orderly end"), b"");
    exchange(&mut second_client, &mut second_server).await;
    is_reset(&mut second_client).await;
    is_reset(&mut second_server).await;
    drained.await.expect("no panic");
    assert_eq!(world.b.shared.live.count(), 0);
    // What was cut is told as drained, not as if its workload had left.
    assert_eq!(world.b.shared.gone().reason, Some(Reason::Drained));
    assert_eq!(world.a.shared.gone().reason, Some(Reason::WorkloadLeft));
}

// ---- limits --------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn the_descriptor_limit_bounds_the_nodes_connections() {
    assert_eq!(Limits::of_descriptors(1_048_576).connections_per_node, 60_000);
    assert_eq!(Limits::of_descriptors(10_000).connections_per_node, 4_000);
    assert_eq!(Limits::of_descriptors(0).connections_per_node, 0);
}

#[tokio::test]
async fn a_stream_beyond_the_workloads_connections_is_refused_and_counted_and_others_go_on() {
    // T-11: one place is the tunnel's own.
    let limits = Limits { connections_per_workload: 4, ..LIMITS };
    let ca = Ca::new("mesh");
    let a = Node::new("node-a", "frontend", ca.store(&["frontend"]), usual());
    let b = Node::with("node-b", "backend", ca.store(&["backend"]), usual(), limits);
    a.ground.set(at(BACKEND, TUNNEL_PORT), Answer::Daemon(Arc::clone(&b)));
    let mut backend = b.ground.serve(at(BACKEND, 8080));
    let mut open = Vec::new();
    for _ in 0..3 {
        let client = a.connect(FRONTEND, at(SERVICE, 80)).await;
        open.push((client, backend.recv().await.expect("reached").0));
    }
    let mut refused = a.connect(FRONTEND, at(SERVICE, 80)).await;
    is_reset(&mut refused).await;
    b.until_counted(&["culvert_limits_total", "connections_per_workload_max"]).await;
    let (client, server) = open.first_mut().expect("three");
    exchange(client, server).await;
    open.pop();
    loop {
        let mut client = a.connect(FRONTEND, at(SERVICE, 80)).await;
        if let Ok(Some((mut server, _))) = timeout(Duration::from_millis(200), backend.recv()).await {
            exchange(&mut client, &mut server).await;
            break;
        }
    }
}

#[tokio::test]
async fn a_full_node_keeps_a_reserve_for_each_workload() {
    // T-11
    let limits = Limits { connections_per_node: 2, connections_reserved: 3, ..LIMITS };
    let ca = Ca::new("mesh");
    let node = Node::with("node-a", "frontend", ca.store(&[]), usual(), limits);
    let ground = Arc::clone(&node.ground) as Arc<dyn Ground>;
    let quiet = Site::new(ObjectName::new("photo", "quiet"), false, ground, &node.shared);
    let mut held = Vec::new();
    for _ in 0..3 {
        held.extend(node.site.place_now(&node.shared));
    }
    assert_eq!(held.len(), 3);
    assert!(node.site.place_now(&node.shared).is_err(), "the node is full");
    assert!(node.counted(&["culvert_limits_total", "connections_per_node_max"]));
    for _ in 0..3 {
        held.extend(quiet.place_now(&node.shared));
    }
    assert_eq!(held.len(), 6, "the other's flood is not its matter");
    drop(held);
    assert!(node.site.place_now(&node.shared).is_ok());
}

#[tokio::test(start_paused = true)]
async fn half_open_handshakes_wait_for_their_turn_and_other_workloads_do_not() {
    // T-11
    let limits = Limits { handshakes_per_workload: 2, ..LIMITS };
    let ca = Ca::new("mesh");
    let b = Node::with("node-b", "backend", ca.store(&["backend"]), usual(), limits);
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(b.approach(FRONTEND, at(BACKEND, 8080)).await);
    }
    b.until_counted(&["culvert_limits_total", "handshakes_per_workload_max"]).await;
    let ground = Arc::clone(&b.ground) as Arc<dyn Ground>;
    let other = Site::new(ObjectName::new("photo", "other"), false, ground, &b.shared);
    assert!(other.hello(&b.events).await.is_ok());
    assert!(b.site.handshake(&b.events).await.is_ok(), "the tunnel port has turns of its own");
    for client in &mut silent {
        held(client).await;
    }
    assert_eq!(b.shared.live.count(), 0);
}

#[tokio::test]
async fn a_dropped_connection_is_a_reset_and_a_settled_one_an_orderly_end() {
    let (mut near, far) = pair().await;
    far.arm();
    drop(far);
    is_reset(&mut near).await;
    let (mut near, far) = pair().await;
    far.arm();
    far.settle();
    drop(far);
    assert_eq!(rest(&mut near).await.expect("an orderly end"), b"");
}
