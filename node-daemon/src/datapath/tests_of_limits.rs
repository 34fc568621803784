//! What happens at each limit of the data path: the last that fits, and the first that does not.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt as _, future::poll_fn};
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use node_core::{
    tunnel::{TUNNEL_PORT, route::PoolKey},
    workload::{ObjectName, TransportMode},
};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, duplex},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    Handle,
    accept::{ACCEPT_RETRY_MILLISECONDS, Limits, Role, accept_forever},
    deliver::DELIVER_SECONDS,
    identify::{HELLO_BYTES_MAX, Spoken, listen},
    live::{Judged, REJUDGED_AT_ONCE, StraightWay},
    outbound::{OUTSIDE_DIAL_SECONDS, PEER_DIAL_SECONDS},
    testing::{Answer, BACKEND, FRONTEND, LIMITS, Node, SERVICE, World, at, mesh, pair, usual},
    tunnel::{
        self, ANSWER_SECONDS, FRAME_BYTES_MAX, HANDSHAKE_SECONDS, HEAD_BYTES_MAX, IDLE_SECONDS_MAX,
        KEEPALIVE_IDLE_SECONDS, KEEPALIVE_PROBE_SECONDS, KEEPALIVE_PROBES, OpenFailed, Pool,
        RETRY_MILLISECONDS_MAX, RETRY_MILLISECONDS_MIN, Reach, SEND_BUFFER_BYTES, STREAMS_PER_TUNNEL_MAX,
        SWEEP_SECONDS, WINDOW_STREAM_BYTES, WINDOW_TUNNEL_BYTES,
    },
};
use crate::{
    certs::testing::{Ca, identity},
    net::DialError,
    telemetry::{Direction, Path},
};

/// Long enough for anything that shall happen on this machine, short enough for a test that fails.
const SOON: Duration = Duration::from_secs(20);

/// How long the daemon held a connection before it closed it, by the paused clock.
async fn held(client: &mut TcpStream) -> u64 {
    let before = Instant::now();
    let ended = client.read(&mut [0; 1]).await;
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    before.elapsed().as_secs()
}

// ---- connections ---------------------------------------------------------------------------------------------------

#[tokio::test]
async fn at_either_limit_of_connections_a_listener_pauses_and_goes_on_when_one_ends() {
    for (limits, counter) in [
        (Limits { connections_per_workload: 2, ..LIMITS }, "connections_per_workload_max"),
        (Limits { connections_per_node: 2, connections_reserved: 0, ..LIMITS }, "connections_per_node_max"),
    ] {
        let ca = Ca::new("mesh");
        let node = Node::with("node-b", "backend", ca.store(&["backend"]), usual(), limits);
        let mut held = Vec::new();
        for _ in 0..2 {
            held.push(node.site.place(&node.shared).await.expect("never closed"));
        }
        assert!(!node.counted(&["culvert_limits_total"]), "two fit");

        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
        listener.set_nonblocking(true).expect("set");
        let address = listener.local_addr().expect("bound");
        let (shared, site) = (Arc::clone(&node.shared), Arc::clone(&node.site));
        tokio::spawn(accept_forever(shared, site, listener, Role::Inbound));
        let mut client = TcpStream::connect(address).await.expect("the kernel takes it");
        node.until_counted(&["culvert_limits_total", counter]).await;
        assert_eq!(client.read(&mut [0; 1]).now_or_never().map(|read| read.is_ok()), None, "it waits");
        held.pop();
        // Now it is served: it came to no address of the workload.
        let served = timeout(SOON, client.read(&mut [0; 1])).await.expect("in time");
        assert_eq!(served.expect_err("a reset").kind(), io::ErrorKind::ConnectionReset);
        node.until_counted(&["culvert_denials_total", "inbound", "loop"]).await;
        node.site.leave();
    }
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_whose_client_never_shakes_hands_is_closed() {
    let world = World::new(usual());
    let (mut silent, far) = pair().await;
    world.b.tunnel_from(at(FRONTEND, 34_000), far).await;
    assert_eq!(held(&mut silent).await, HANDSHAKE_SECONDS);
    world.b.until_counted(&["culvert_denials_total", "inbound", "handshake_timed_out"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_shakes_hands_and_then_speaks_no_http_is_closed() {
    let (mut near, far) = duplex(1024);
    let before = Instant::now();
    let failed = tunnel::serve(far).await.map(drop).expect_err("nobody speaks");
    assert!(matches!(failed, tunnel::HandshakeFailed::TimedOut), "{failed}");
    assert_eq!(before.elapsed().as_secs(), HANDSHAKE_SECONDS);
    let _ = near.write_all(b"late").await;
}

#[tokio::test(start_paused = true)]
async fn servers_that_do_not_answer_are_waited_for_only_so_long() {
    let mut documents = usual();
    documents[0] = mesh("PERMISSIVE");
    let world = World::new(documents);
    world.b.ground.set(at(BACKEND, 8080), Answer::Nothing);
    let mut client = world.b.approach("10.8.7.7", at(BACKEND, 8080)).await;
    client.write_all(b"hello").await.expect("open");
    assert_eq!(held(&mut client).await, DELIVER_SECONDS);
    world.b.until_counted(&["culvert_denials_total", "inbound", "nothing_listening"]).await;

    let outside = at("192.0.2.7", 443);
    world.a.ground.set(outside, Answer::Nothing);
    let mut client = world.a.connect(FRONTEND, outside).await;
    assert_eq!(held(&mut client).await, OUTSIDE_DIAL_SECONDS);
    world.a.until_counted(&["culvert_denials_total", "outbound", "nothing_listening"]).await;

    let peer = at(BACKEND, TUNNEL_PORT);
    world.a.ground.set(peer, Answer::Nothing);
    let mut client = world.a.connect(FRONTEND, at(SERVICE, 80)).await;
    let seconds = held(&mut client).await;
    let attempts = seconds.div_ceil(PEER_DIAL_SECONDS);
    assert_eq!(world.a.ground.dials(peer) as u64, attempts, "{seconds} s of attempts one after the other");
    world.a.until_counted(&["culvert_denials_total", "outbound", "dead_peer"]).await;
}

#[tokio::test(start_paused = true)]
async fn what_does_not_end_when_it_is_reset_is_left_to_the_end_of_the_process() {
    let world = World::new(usual());
    world.b.shared.tasks.spawn(std::future::pending::<()>());
    let handle = Handle { shared: Arc::clone(&world.b.shared), _tasks: JoinSet::new() };
    let before = Instant::now();
    handle.drain(Duration::from_secs(5)).await;
    assert_eq!(before.elapsed().as_secs(), 5 + super::ENDING_SECONDS);
}

#[tokio::test]
async fn a_change_of_policy_lets_others_have_their_turn() {
    let world = World::new(usual());
    let node = &world.a;
    let snapshot = node.shared.snapshot();
    let source = Arc::clone(snapshot.workload(node.site.name()).expect("known"));
    let registrations: Vec<_> = (0..2 * REJUDGED_AT_ONCE + 1)
        .map(|_| {
            let target = at("192.0.2.7", 443);
            let record = node.shared.record(Direction::Outbound, Path::Passthrough, at(FRONTEND, 1), target);
            let judged = Judged::Straight(StraightWay {
                source: Arc::clone(&source),
                target,
                seed: 0,
                endpoint: target,
                originated: None,
                is_by_rule: false,
            });
            node.shared.live.register(judged, &snapshot, record.ends(), record.progress())
        })
        .collect();
    let newer = node.compile({
        let mut documents = usual();
        documents.push(super::testing::allow("frontend"));
        documents
    });
    let mut rejudging = Box::pin(node.shared.live.rejudge(&newer));
    for judged in [REJUDGED_AT_ONCE, 2 * REJUDGED_AT_ONCE, 2 * REJUDGED_AT_ONCE + 1] {
        assert!(rejudging.as_mut().now_or_never().is_none(), "a pause");
        let done = registrations.iter().filter(|one| one.snapshot() == newer.number()).count();
        assert_eq!(done, judged);
        tokio::task::yield_now().await;
    }
    rejudging.await;
}

#[test]
fn a_vanished_peer_is_probed() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (near, _far) = pair().await;
        tunnel::keep_alive(&near);
        let socket = socket2::SockRef::from(&near);
        assert!(socket.keepalive().expect("readable"));
        assert_eq!(socket.tcp_keepalive_time().expect("readable").as_secs(), KEEPALIVE_IDLE_SECONDS);
        assert_eq!(socket.tcp_keepalive_interval().expect("readable").as_secs(), KEEPALIVE_PROBE_SECONDS);
        assert_eq!(socket.tcp_keepalive_retries().expect("readable"), KEEPALIVE_PROBES);
    });
}

#[tokio::test(start_paused = true)]
async fn after_an_accept_that_failed_the_next_is_tried_later() {
    let world = World::new(usual());
    // A socket that does not listen fails each accept.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.set_nonblocking(true).expect("set");
    let (shared, site) = (Arc::clone(&world.b.shared), Arc::clone(&world.b.site));
    let accepting = tokio::spawn(accept_forever(shared, site, socket.into(), Role::Tunnel));
    tokio::time::sleep(Duration::from_millis(10 * ACCEPT_RETRY_MILLISECONDS)).await;
    let text = world.b.events.metrics().text().expect("text");
    let failures = text.lines().find_map(|line| line.strip_prefix("culvert_accept_failures_total "));
    let failures: u64 = failures.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("{text}"));
    assert!((9..=11).contains(&failures), "{failures} in the time of ten");
    accepting.abort();
}

// ---- the first message of a client ---------------------------------------------------------------------------------

/// The ClientHello of a client of the mesh with as many further ALPN names of 250 bytes.
fn hello(names: usize) -> Vec<u8> {
    let credentials =
        Ca::new("mesh").store(&["frontend"]).credentials(&identity("frontend")).expect("issued");
    let mut config = ClientConfig::clone(&credentials.client(Arc::new([identity("backend")].into())));
    config.alpn_protocols = (0..names).map(|_| vec![b'n'; 250]).chain([b"istio".to_vec()]).collect();
    let name = ServerName::try_from(BACKEND).expect("an address");
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut hello = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut hello).expect("memory");
    }
    hello
}

#[tokio::test(start_paused = true)]
async fn a_first_message_is_looked_at_up_to_its_limit() {
    for (names, is_mesh) in [(0, true), (60, true), (100, false)] {
        let hello = hello(names);
        assert_eq!(hello.len() <= HELLO_BYTES_MAX, is_mesh, "{} bytes", hello.len());
        let (mut near, mut far) = duplex(2 * HELLO_BYTES_MAX);
        near.write_all(&hello).await.expect("room");
        match listen(&mut far, TransportMode::Strict).await {
            Ok(Spoken::MeshTls(_)) => assert!(is_mesh, "{names} names"),
            Ok(Spoken::Plain(read)) => {
                assert!(!is_mesh, "{names} names");
                assert!((HELLO_BYTES_MAX..2 * HELLO_BYTES_MAX).contains(&read.len()), "{} bytes", read.len());
                assert_eq!(read, hello[..read.len()], "nothing of it is lost");
            }
            Err(_) => panic!("{names} names: it came in time"),
        }
    }
}

// ---- a tunnel's server, as others meet it --------------------------------------------------------------------------

/// An HTTP/2 client of a tunnel's server, on a wire of so many bytes. The server takes streams and holds them.
async fn client_of(streams: usize, wire_bytes: usize) -> SendRequest<Bytes> {
    let (near, far) = duplex(wire_bytes);
    tokio::spawn(async move {
        let mut tunnel = tunnel::serve(far).await.expect("HTTP/2");
        let mut taken = Vec::new();
        while let Some(Ok(asked)) = tunnel.next().await {
            taken.push(asked.accept());
        }
    });
    let mut builder = h2::client::Builder::new();
    builder.max_send_buffer_size(1 << 30).initial_max_send_streams(streams);
    let (requests, connection) = builder.handshake(near).await.expect("HTTP/2");
    tokio::spawn(connection);
    requests.ready().await.expect("open")
}

fn connect_request(padding: usize) -> Request<()> {
    let head = Request::builder().method(Method::CONNECT).uri("10.8.2.4:8080");
    head.header("x-trace", "t".repeat(padding)).body(()).expect("a head")
}

#[tokio::test]
async fn a_stream_beyond_the_limit_of_a_tunnel_is_refused_and_the_others_stand() {
    // This client opens its streams before it has heard how many the server takes.
    let (near, far) = duplex(1024 * 1024);
    let mut builder = h2::client::Builder::new();
    builder.initial_max_send_streams(STREAMS_PER_TUNNEL_MAX + 5);
    let (mut requests, connection) = builder.handshake::<_, Bytes>(near).await.expect("HTTP/2");
    tokio::spawn(connection);
    let mut asked = Vec::new();
    for _ in 0..=STREAMS_PER_TUNNEL_MAX {
        requests = requests.ready().await.expect("open");
        asked.push(requests.send_request(connect_request(0), false).expect("open"));
        tokio::task::yield_now().await;
    }
    tokio::spawn(async move {
        let mut tunnel = tunnel::serve(far).await.expect("HTTP/2");
        let mut taken = Vec::new();
        while let Some(Ok(asked)) = tunnel.next().await {
            taken.push(asked.accept().expect("open"));
        }
    });
    let (beyond, _stream) = asked.pop().expect("many");
    let mut open = Vec::new();
    for (answer, stream) in asked {
        let answer = timeout(SOON, answer).await.expect("in time").expect("within the limit");
        assert_eq!(answer.status(), StatusCode::OK);
        open.push((answer, stream));
    }
    let refused = timeout(SOON, beyond).await.expect("in time").expect_err("one more");
    assert_eq!(refused.reason(), Some(h2::Reason::REFUSED_STREAM));
    assert_eq!(requests.current_max_send_streams(), STREAMS_PER_TUNNEL_MAX, "and it is told");
}

#[tokio::test]
async fn a_peer_may_send_as_much_as_the_windows_say_before_anybody_reads() {
    let mut requests = client_of(20, 64 * 1024).await;
    let (stream_bytes, tunnel_bytes) = (WINDOW_STREAM_BYTES as usize, WINDOW_TUNNEL_BYTES as usize);
    let mut streams = Vec::new();
    for number in 1..=tunnel_bytes / stream_bytes {
        requests = requests.ready().await.expect("open");
        let (_answer, mut stream) = requests.send_request(connect_request(0), false).expect("open");
        stream.reserve_capacity(2 * stream_bytes);
        while stream.capacity() < stream_bytes {
            let granted = timeout(SOON, poll_fn(|context| stream.poll_capacity(context))).await;
            granted.unwrap_or_else(|_| panic!("stream {number} has {}", stream.capacity()));
        }
        assert_eq!(stream.capacity(), stream_bytes, "stream {number}");
        streams.push(stream);
    }
    let (_answer, mut stream) =
        requests.ready().await.expect("open").send_request(connect_request(0), false).expect("open");
    stream.reserve_capacity(1);
    for _ in 0..100 {
        assert!(
            poll_fn(|context| stream.poll_capacity(context)).now_or_never().is_none(),
            "the tunnel is full"
        );
        tokio::task::yield_now().await;
    }
    streams.pop().expect("many").send_reset(h2::Reason::CANCEL);
    timeout(SOON, poll_fn(|context| stream.poll_capacity(context)))
        .await
        .expect("what was unused comes back");
}

#[tokio::test]
async fn what_waits_to_be_sent_to_a_peer_that_does_not_read_is_bounded() {
    // The peer opens all windows and then reads nothing: 4 KiB are on the wire, the rest waits here.
    let (near, far) = duplex(4 * 1024);
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(1 << 30).initial_connection_window_size(1 << 30);
    let (asked, taken) = tokio::join!(
        async {
            let (requests, mut connection) = builder.handshake::<_, Bytes>(near).await.expect("HTTP/2");
            let mut requests = requests.ready().await.expect("open");
            let asked = requests.send_request(connect_request(0), false).expect("open");
            let (mut answer, stream) = asked;
            tokio::select! {
                _ = &mut connection => unreachable!("both ends are open"),
                answer = &mut answer => (answer.expect("taken"), stream, connection, requests),
            }
        },
        async {
            let mut tunnel = tunnel::serve(far).await.expect("HTTP/2");
            let asked = tunnel.next().await.expect("open").expect("a stream");
            let stream = asked.accept().expect("open");
            tokio::spawn(async move { while tunnel.next().await.is_some() {} });
            stream
        },
    );
    let mut stream = taken;
    let (junk, mut waiting) = (vec![7; 64 * 1024], 0);
    while let Ok(written) = timeout(Duration::from_millis(100), stream.write(&junk)).await {
        waiting += written.expect("open");
        assert!(waiting <= SEND_BUFFER_BYTES + 64 * 1024, "{waiting} bytes without a reader");
    }
    assert!(waiting >= SEND_BUFFER_BYTES, "{waiting}");
    drop(asked);
}

#[tokio::test]
async fn a_head_is_taken_up_to_its_limit() {
    let mut requests = client_of(20, 64 * 1024).await;
    let room = HEAD_BYTES_MAX as usize - 1024;
    for (padding, expected) in [
        (0, StatusCode::OK),
        (room, StatusCode::OK),
        (room + 1024, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
    ] {
        requests = requests.ready().await.expect("open");
        let (answer, _stream) = requests.send_request(connect_request(padding), false).expect("open");
        let answer = timeout(SOON, answer).await.expect("in time").expect("an answer");
        assert_eq!(answer.status(), expected, "{padding} bytes");
    }
}

#[tokio::test]
async fn a_frame_is_taken_up_to_its_limit_and_a_longer_one_ends_the_tunnel() {
    for (bytes, is_taken) in [(FRAME_BYTES_MAX, true), (FRAME_BYTES_MAX + 1, false)] {
        let (near, far) = duplex(64 * 1024);
        let (mut read, mut write) = tokio::io::split(near);
        let serving = tokio::spawn(async move {
            let mut tunnel = tunnel::serve(far).await.expect("HTTP/2");
            tunnel.next().await.map(|asked| asked.map(drop))
        });
        let writing = tokio::spawn(async move {
            // The preface, empty SETTINGS, a frame of a kind that nobody knows (RFC 9113, 5.5), and a PING.
            let mut wire = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
            wire.extend_from_slice(&bytes.to_be_bytes()[1..]);
            wire.extend_from_slice(&[0xfa, 0, 0, 0, 0, 0]);
            wire.resize(wire.len() + bytes as usize, 0);
            wire.extend_from_slice(b"\0\0\x08\x06\0\0\0\0\0pingpong");
            let _ = write.write_all(&wire).await;
            write
        });
        let kind = timeout(SOON, answered_with(&mut read)).await.expect("in time");
        assert_eq!(kind, if is_taken { PING } else { GOAWAY }, "{bytes} bytes");
        drop((serving, writing));
    }
}

const PING: u8 = 6;
const GOAWAY: u8 = 7;

/// The first frame that is a PING or a GOAWAY.
async fn answered_with(read: &mut (impl AsyncRead + Unpin)) -> u8 {
    loop {
        let mut head = [0; 9];
        read.read_exact(&mut head).await.expect("a frame");
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        read.read_exact(&mut vec![0; length]).await.expect("its body");
        if matches!(head[3], PING | GOAWAY) {
            return head[3];
        }
    }
}

// ---- the end that dials --------------------------------------------------------------------------------------------

/// The tunnel port of a backend that answers each CONNECT, or none; or nobody there.
struct Peer {
    server: Option<Arc<rustls::ServerConfig>>,
    answers: bool,
    dialled: Mutex<Vec<Instant>>,
}

impl Peer {
    fn nobody() -> Self {
        Self { server: None, answers: false, dialled: Mutex::default() }
    }

    fn new(ca: &Ca, answers: bool) -> Self {
        let credentials = ca.store(&["backend"]).credentials(&identity("backend")).expect("issued");
        Self { server: Some(credentials.tunnel_server()), answers, dialled: Mutex::default() }
    }

    fn dials(&self) -> Vec<Instant> {
        self.dialled.lock().expect("no panic").clone()
    }
}

impl Reach for Peer {
    async fn reach(&self) -> Result<TcpStream, DialError> {
        self.dialled.lock().expect("no panic").push(Instant::now());
        let target = at(BACKEND, TUNNEL_PORT);
        let Some(server) = self.server.clone() else { return Err(DialError::Refused { target }) };
        let (near, far) = pair().await;
        // Or a segment would wait for an acknowledgement, which a paused clock does not wait for.
        near.set_nodelay(true).expect("set");
        far.set_nodelay(true).expect("set");
        let answers = self.answers;
        tokio::spawn(async move {
            let stream = TlsAcceptor::from(server).accept(far).await.expect("mutual TLS");
            let mut tunnel = tunnel::serve(stream).await.expect("HTTP/2");
            let (mut taken, mut held) = (Vec::new(), Vec::new());
            while let Some(Ok(asked)) = tunnel.next().await {
                if answers {
                    taken.push(asked.accept());
                } else {
                    held.push(asked);
                }
            }
        });
        Ok(near)
    }
}

fn key() -> PoolKey {
    PoolKey {
        source: ObjectName::new("photo", "frontend"),
        source_address: at(FRONTEND, 0).ip(),
        identity: identity("frontend"),
        allowed: Arc::new([identity("backend")].into()),
        endpoint: at(BACKEND, TUNNEL_PORT),
    }
}

/// Asks a pool for a stream as the frontend, with two minutes for it.
async fn open(pool: &Pool, ca: &Ca, peer: &Peer) -> Result<tunnel::Opened, OpenFailed> {
    let credentials = ca.store(&["frontend"]).credentials(&identity("frontend")).expect("issued");
    let deadline = Instant::now() + Duration::from_secs(120);
    pool.open(&key(), at(BACKEND, 8080), &credentials, peer, deadline).await
}

#[tokio::test(start_paused = true)]
async fn the_pause_between_two_attempts_grows_to_a_second_and_no_further() {
    let peer = Peer::nobody();
    let dead = open(&Pool::new(), &Ca::new("mesh"), &peer).await.map(drop).expect_err("nobody is there");
    assert!(matches!(dead, OpenFailed::Dead(_)), "{dead}");
    let pause = |two: &[Instant]| u64::try_from((two[1] - two[0]).as_millis()).expect("short");
    let pauses: Vec<u64> = peer.dials().windows(2).map(pause).collect();
    // Jitter takes up to half of a pause away; the timer's millisecond comes on top.
    let around = |milliseconds: u64| milliseconds / 2..=milliseconds + 1;
    assert!(around(RETRY_MILLISECONDS_MIN).contains(&pauses[0]), "{pauses:?}");
    let late = &pauses[5..];
    assert!(late.iter().all(|pause| around(RETRY_MILLISECONDS_MAX).contains(pause)), "{pauses:?}");
    assert!((110..=240).contains(&late.len()), "{pauses:?}");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_the_tunnel_and_answers_no_connect_is_given_up() {
    let ca = Ca::new("mesh");
    let (pool, peer) = (Pool::new(), Peer::new(&ca, false));
    let before = Instant::now();
    let dead = open(&pool, &ca, &peer).await.map(drop).expect_err("no answer");
    assert!(matches!(&dead, OpenFailed::Dead(problem) if problem.contains("no answer to CONNECT")), "{dead}");
    assert_eq!(before.elapsed().as_secs(), ANSWER_SECONDS);
    assert_eq!(peer.dials().len(), 1, "what was asked once is not asked again");
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_is_kept_for_a_minute_after_its_last_stream() {
    let ca = Ca::new("mesh");
    let credentials = ca.store(&["frontend"]).credentials(&identity("frontend")).expect("issued");
    let (pool, peer) = (Pool::new(), Peer::new(&ca, true));
    let opened = async || {
        let deadline = Instant::now() + Duration::from_secs(10);
        pool.open(&key(), at(BACKEND, 8080), &credentials, &peer, deadline)
            .await
            .map(drop)
            .expect("answered");
    };
    let using = async {
        opened().await;
        for (idle_seconds, dials) in [
            (IDLE_SECONDS_MAX - SWEEP_SECONDS, 1),
            (IDLE_SECONDS_MAX, 1),
            (IDLE_SECONDS_MAX + 2 * SWEEP_SECONDS, 2),
        ] {
            tokio::time::sleep(Duration::from_secs(idle_seconds)).await;
            opened().await;
            assert_eq!(peer.dials().len(), dials, "after {idle_seconds} s without a stream");
        }
        // A stream that lasts does not make its tunnel old.
        let deadline = Instant::now() + Duration::from_secs(10);
        let long =
            pool.open(&key(), at(BACKEND, 8080), &credentials, &peer, deadline).await.expect("answered");
        tokio::time::sleep(Duration::from_secs(10 * IDLE_SECONDS_MAX)).await;
        drop(long);
        tokio::time::sleep(Duration::from_secs(2 * SWEEP_SECONDS)).await;
        opened().await;
        assert_eq!(peer.dials().len(), 2, "its last stream ended a moment ago");
    };
    tokio::select! {
        () = pool.sweep_forever(|_| Some(credentials.generation())) => unreachable!("it never ends"),
        () = using => {}
    }
}
