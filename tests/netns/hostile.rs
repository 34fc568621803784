//! Workloads and peers that want to harm others, by greed or by junk.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use world::attacker::credentials::{Authority, Leaf};
use world::attacker::tunnel::{Attempt, Outcome};
use world::pod::{Family, Plan};
use world::protocol::{Command, Connect, Many, Mode, Payload};

use crate::cases::{Cases, say};
use crate::photo::{BULK, ECHO, HOLD, HTTP, NEEDLE, Photo, SINK};
use crate::policies::STRICT;

const TUNNEL: u16 = 15008;

/// More handshakes than a workload may have under way.
const HALF_OPEN: usize = 600;

/// More connections than a node serves whose daemon may open 20,000 descriptors: 80 % of them, two for each.
const FLOOD: usize = 9_000;

/// With others starving it, an honest exchange still ends within this; alone it takes milliseconds.
const HONEST_TIME_MAX: Duration = Duration::from_secs(3);

#[test]
fn hostile() {
    let photo = Photo::start(&[("strict.yaml", STRICT)]);
    let neighbour = photo.world.pod(&photo.b, Plan::new("datastore", "neighbour").port("http", HTTP));
    neighbour.serve_http(HTTP, "neighbour");
    neighbour.serve(ECHO, Mode::Echo);
    photo.b.log().wait_from(0, "the neighbour is enrolled", world::expect::LINE_TIME_MAX, |line| {
        world::expect::is(line, "message", "workload enrolled") && line.to_string().contains("neighbour")
    });
    let honest = || {
        let started = Instant::now();
        let asked = photo.backend.http(neighbour.at(Family::V4, HTTP));
        assert!(asked.text.contains("neighbour peer="), "an honest client is served: {asked:?}");
        assert!(started.elapsed() < HONEST_TIME_MAX, "and not starved: {asked:?}");
    };
    let mut cases = Cases::of("hostile");

    cases.case("an honest client is served", honest);
    cases.case("half-open handshakes starve nobody, and end (T-11)", || half_open(&photo, &honest));
    cases.case("a slow reader starves nobody and costs no memory without bound (T-11)", || {
        slow_reader(&photo, &honest)
    });
    cases.case("many connections of one workload starve nobody (T-11)", || many(&photo, &honest));
    cases.case("one who takes all the node's connections starves nobody (T-11)", || flood(&photo, &honest));
    cases.case("one who opens and resets starves nobody (T-11)", || resets(&photo, &honest));
    cases.case("junk on the tunnel port is closed", || junk(&photo, &honest));
    cases.case("an application may dial the tunnel port and gains nothing (T-2)", || dials_tunnel(&photo));
    cases.case("a spoofed source gains no identity", || spoofed_source(&photo));
    cases.case("a foreign address that a pod gives itself gains no identity", || stolen_address(&photo));
    cases.case("an unknown address of the mesh's ranges is held, then denied", || unknown_address(&photo));
    cases.end();
}

/// Connections to the tunnel that say nothing, from inside a namespace.
fn mute(photo: &Photo, count: usize) -> Vec<TcpStream> {
    let to = photo.datastore.at(Family::V4, TUNNEL);
    photo.stranger.namespace().run(|| (0..count).filter_map(|_| TcpStream::connect(to).ok()).collect())
}

fn half_open(photo: &Photo, honest: &dyn Fn()) {
    let watch = photo.b.watch();
    let held = mute(photo, HALF_OPEN);
    assert_eq!(held.len(), HALF_OPEN, "they may come");
    honest();
    watch.event(
        "limit reached",
        &[("limit", "handshakes_per_workload_max"), ("workload", "datastore/datastore")],
    );
    assert!(watch.grew("culvert_limits_total", &[("limit", "handshakes_per_workload_max")]) >= 1.0);
    watch.refused("inbound", "handshake_timed_out", &[]);
    let closed = held.iter().filter(|stream| ends(stream, Duration::from_secs(30))).count();
    assert_eq!(closed, held.len(), "none is kept");
}

fn ends(mut stream: &TcpStream, limit: Duration) -> bool {
    use std::io::Read;
    stream.set_read_timeout(Some(limit)).expect("a time limit can be set");
    match stream.read(&mut [0; 64]) {
        Ok(0) => true,
        Ok(_) => ends(stream, limit),
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

/// Sends all it can to a server that never reads: back-pressure must reach it after a few buffers.
fn slow_reader(photo: &Photo, honest: &dyn Fn()) {
    const BOUND_BYTES: u64 = 64 * 1024 * 1024;
    let mut connect = Connect::to(photo.datastore.at(Family::V4, HOLD));
    connect.timeout_ms = 2_000;
    let before = memory_bytes(photo);
    let connections: Vec<_> = (0..4).map(|_| photo.frontend.connect(connect.clone())).collect();
    let stuck: Vec<_> = connections
        .iter()
        .map(|connection| {
            photo.frontend.begin(Command::Send {
                socket: connection.socket,
                text: "x".repeat(usize::try_from(BOUND_BYTES).expect("it fits")),
            })
        })
        .collect();
    for sending in stuck {
        let failure = sending.outcome().expect_err("it cannot all be sent");
        assert_eq!(failure.errno, "EAGAIN", "back-pressure, not an error");
    }
    honest();
    let grown = memory_bytes(photo).saturating_sub(before);
    say(&format!("    the daemons grew by {} KiB", grown / 1024));
    assert!(grown < 2 * BOUND_BYTES, "{grown} bytes for four slow readers");
    for connection in &connections {
        photo.frontend.reset(connection);
    }
}

/// Resident memory of both daemons.
fn memory_bytes(photo: &Photo) -> u64 {
    [&photo.a, &photo.b].iter().map(|node| node.resident_bytes()).sum()
}

fn many(photo: &Photo, honest: &dyn Fn()) {
    let pending = photo.frontend.begin(Command::Many(Many {
        to: vec![photo.datastore.at(Family::V4, ECHO)],
        mapped: false,
        count: 4_000,
        parallel: 1_000,
        together: true,
        bytes: 10_000,
        timeout_ms: 60_000,
    }));
    for _ in 0..10 {
        honest();
    }
    let answer = format!("{:?}", pending.outcome());
    say(&format!("    {answer}"));
}

/// Each of them sends a byte, and waits for an answer that does not come until its time limit ends it.
fn flood(photo: &Photo, honest: &dyn Fn()) {
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).expect("limits can be read").1;
    let watch = photo.a.watch();
    let pending = photo.frontend.begin(Command::Many(Many {
        to: vec![photo.datastore.at(Family::V4, SINK)],
        mapped: false,
        count: FLOOD,
        parallel: FLOOD,
        together: true,
        bytes: 1,
        timeout_ms: 8_000,
    }));
    // Where the machine allows more descriptors the node takes them all, and honest ones are served beside.
    if descriptors <= 20_000 {
        watch.event("limit reached", &[("workload", "photo/photo-frontend")]);
        assert!(watch.grew("culvert_limits_total", &[]) >= 1.0);
    }
    for _ in 0..10 {
        honest();
    }
    let answer = pending.outcome();
    assert!(answer.is_ok(), "{answer:?}");
    honest();
    let asked = photo.frontend.http(photo.datastore.at(Family::V4, HTTP));
    assert!(asked.text.contains("datastore peer="), "and it is served again itself: {asked:?}");
}

fn resets(photo: &Photo, honest: &dyn Fn()) {
    let to = photo.datastore.at(Family::V4, ECHO);
    for _ in 0..20 {
        let opened: Vec<_> = (0..50).map(|_| photo.frontend.connect(Connect::to(to))).collect();
        for connection in &opened {
            photo.frontend.reset(connection);
        }
    }
    honest();
    let connection = photo.frontend.connect(Connect::to(photo.datastore.at(Family::V4, BULK)));
    let took = photo.frontend.bulk(&connection, Payload::seeded(1 << 20, 1), Payload::seeded(1 << 20, 2));
    took.expect("its own connections go on as well");
}

fn junk(photo: &Photo, honest: &dyn Fn()) {
    let watch = photo.b.watch();
    for bytes in
        [&b"\x16\x03\x01\xff\xff"[..], &[0; 4096], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0xff; 70_000]]
    {
        for mut stream in mute(photo, 5) {
            let _ = stream.write_all(bytes);
            assert!(ends(&stream, Duration::from_secs(15)), "junk is closed");
        }
    }
    watch.refused("inbound", "tls", &[]);
    honest();
    // A certificate that is right and a protocol that is not: the handshake is all it gets.
    let mesh = Authority::of_mesh(&photo.world.ca().state()).expect("the CA keeps its keys in its state");
    let credentials = mesh.issue(&Leaf::of(&[&photo.frontend.identity()]));
    let to = photo.datastore.at(Family::V4, TUNNEL);
    let mut attempt = Attempt::new(to, Some(&credentials), &photo.datastore.at(Family::V4, ECHO).to_string());
    attempt.alpn = b"http/1.1";
    let outcome = attempt.run(photo.stranger.namespace());
    assert!(matches!(outcome, Outcome::Closed(_)), "{outcome:?}");
}

/// T-2: nothing is exempt by its port.
fn dials_tunnel(photo: &Photo) {
    let capture = photo.world.capture(&photo.a, NEEDLE);
    for family in world::pod::FAMILIES {
        let mut connect = Connect::to(photo.datastore.at(family, TUNNEL));
        connect.timeout_ms = 12_000;
        let asked = photo.frontend.ask(connect, NEEDLE);
        assert!(!asked.text.contains(NEEDLE), "{asked:?}");
    }
    let seen = capture.stop();
    assert_eq!((seen.needles, seen.missed), (0, 0), "its bytes do not cross the wire in the clear");
}

/// A stranger that puts the backend's address on its own interface and connects from it: answers do not come back
/// to it, and had they, plaintext has no identity.
fn spoofed_source(photo: &Photo) {
    let backend = photo.backend.v4();
    photo
        .stranger
        .namespace()
        .ip(&format!("addr add {backend}/32 dev eth0"))
        .expect("a pod with NET_ADMIN may");
    let mut connect = Connect::to(photo.datastore.at(Family::V4, HTTP));
    connect.bind = Some(world::at(backend, 0));
    connect.timeout_ms = 1_500;
    let asked = photo.stranger.ask(connect, "GET / HTTP/1.1\r\n\r\n");
    photo.stranger.namespace().ip(&format!("addr del {backend}/32 dev eth0")).expect("what was added goes");
    assert_eq!(asked.text, "", "{asked:?}");
}

/// An enrolled pod that takes an address of a neighbour on its node stays who it is.
fn stolen_address(photo: &Photo) {
    let backend = photo.backend.v4();
    let watch = photo.a.watch();
    photo
        .frontend
        .namespace()
        .ip(&format!("addr add {backend}/32 dev eth0"))
        .expect("a pod with NET_ADMIN may");
    let mut connect = Connect::to(photo.datastore.at(Family::V4, HTTP));
    connect.bind = Some(world::at(backend, 0));
    connect.timeout_ms = 5_000;
    let asked = photo.frontend.ask(connect, "GET / HTTP/1.1\r\n\r\n");
    photo.frontend.namespace().ip(&format!("addr del {backend}/32 dev eth0")).expect("what was added goes");
    let as_backend = watch.lines(&[("source.identity", &photo.backend.identity())]);
    assert!(as_backend.is_empty(), "it gained another's identity ({asked:?}): {as_backend:?}");
    let asked = photo.frontend.http(photo.datastore.at(Family::V4, HTTP));
    assert!(asked.text.contains("datastore peer="), "and is served as itself again: {asked:?}");
}

fn unknown_address(photo: &Photo) {
    let watch = photo.a.watch();
    let mut connect = Connect::to("10.8.77.77:80".parse().expect("an address"));
    connect.timeout_ms = 20_000;
    let asked = photo.frontend.ask(connect, NEEDLE);
    assert_eq!((asked.text.as_str(), asked.end.as_str()), ("", "ECONNRESET"), "{asked:?}");
    assert!((4_000..12_000).contains(&asked.elapsed_ms), "held for 5 s: {asked:?}");
    watch.refused("outbound", "hold_unknown_address", &[("source.workload", "photo-frontend")]);
}
