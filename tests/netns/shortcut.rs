//! Direct connections past the host's network stack: data, ends and resets go from veth to veth, and a host that drops what its
//! connection tracking holds for invalid has nothing to drop.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{Command as Program, Stdio};
use std::time::Instant;

use serde_json::Value;
use world::expect::{LINE_TIME_MAX, field, is};
use world::node::Node;
use world::pod::{FAMILIES, Family};
use world::protocol::{Connect, Mode, Payload};

use crate::cases::{Cases, say};
use crate::photo::{ECHO, Photo};

/// What a careful host has: whatever connection tracking holds for invalid is dropped, and counted. Direct connections may be
/// forwarded, as a network policy would say.
const RULES: &str = "table inet host {
  counter invalid { }
  counter forwarded { }
  chain forward {
    type filter hook forward priority 0; policy accept;
    ct state invalid counter name invalid drop
    meta l4proto tcp counter name forwarded
  }
}
";

const MIB: u64 = 1024 * 1024;

/// Segments that a connection may send by the host: SYN and SYN-ACK, and what is repeated of them.
const BY_THE_HOST_MAX: u64 = 8;

#[test]
fn shortcut() {
    let photo = Photo::prepare(&[]);
    nft(&photo.a, &["--file", "-"], RULES);
    photo.world.start_ca();
    photo.world.start_daemons_of(&[&photo.a, &photo.b]);
    let mut cases = Cases::of("shortcut");
    for family in FAMILIES {
        cases.case(&format!("what follows the handshake skips the host's stack ({family:?})"), || {
            skips(&photo, family);
        });
        cases.case(&format!("1 GiB goes both ways unharmed ({family:?})"), || bulk(&photo, family));
        cases.case(&format!("a reset skips it, too ({family:?})"), || reset(&photo, family));
        cases.case(&format!("the same ports at once again, thirty times (T-16, {family:?})"), || {
            same_ports(&photo, family);
        });
    }
    cases.case("after a crash what stood goes on, and what ended meanwhile is cleared away (T-16)", || {
        crash(&photo)
    });
    cases.case("where another's filters are there is none, and it is said", || filtered(&photo));
    cases.case("nothing was held for invalid by the host", || {
        assert_eq!(counted(&photo.a, "invalid"), 0);
    });
    cases.end();
}

fn skips(photo: &Photo, family: Family) {
    let Photo { frontend, backend, a, .. } = photo;
    assert_eq!(field(&a.status(), "direct.shortcuts"), &Value::from(2));
    let before = counted(a, "forwarded");
    let watch = a.watch();
    let connection = frontend.connect(Connect::to(backend.at(family, ECHO)));
    for _ in 0..50 {
        assert_eq!(frontend.exchange(&connection, "a line").as_deref(), Ok("a line"));
    }
    frontend.close(&connection);
    watch.served("outbound", &[("path", "direct")]);
    let forwarded = counted(a, "forwarded") - before;
    assert!((2..=BY_THE_HOST_MAX).contains(&forwarded), "{forwarded} segments went by the host's stack");
    let deadline = Instant::now() + LINE_TIME_MAX;
    while watch.grew("culvert_kernel_verdicts_total", &[("verdict", "shortcut")]) < 100.0 {
        assert!(Instant::now() < deadline, "the segments of the shortcut are counted");
    }
}

fn bulk(photo: &Photo, family: Family) {
    let Photo { frontend, backend, a, .. } = photo;
    let listener = backend.serve(0, Mode::Bulk);
    let before = counted(a, "forwarded");
    let connection = frontend.connect(Connect::to(backend.at(family, listener.port)));
    let took = frontend
        .bulk(&connection, Payload::seeded(1024 * MIB, 1), Payload::seeded(1024 * MIB, 2))
        .expect("every byte arrives");
    say(&format!("    1 GiB each way in {:.1} s", took.as_secs_f64()));
    frontend.close(&connection);
    backend.close_listener(listener);
    let forwarded = counted(a, "forwarded") - before;
    assert!(forwarded <= BY_THE_HOST_MAX, "{forwarded} segments went by the host's stack");
}

fn reset(photo: &Photo, family: Family) {
    let Photo { frontend, backend, a, .. } = photo;
    let listener = backend.serve(0, Mode::Echo);
    let before = counted(a, "forwarded");
    let connection = frontend.connect(Connect::to(backend.at(family, listener.port)));
    assert_eq!(frontend.exchange(&connection, "x").as_deref(), Ok("x"));
    frontend.reset(&connection);
    let served = backend.wait_accepted(listener, 0, 1, true);
    assert_eq!(served[0].end.as_deref(), Some("ECONNRESET"), "{served:?}");
    backend.close_listener(listener);
    let forwarded = counted(a, "forwarded") - before;
    assert!(forwarded <= BY_THE_HOST_MAX, "{forwarded} segments went by the host's stack");
}

/// A reset leaves no TIME_WAIT, so the ports are free at once, while the shortcut and perhaps the tracking of the last
/// connection are still there.
fn same_ports(photo: &Photo, family: Family) {
    let Photo { frontend, backend, .. } = photo;
    let from = SocketAddr::new(frontend.ip(family), 40_000);
    for round in 0..30 {
        let mut connect = Connect::to(backend.at(family, ECHO));
        connect.bind = Some(from);
        let connection = frontend.connect(connect);
        let text = format!("round {round}");
        assert_eq!(frontend.exchange(&connection, &text).as_deref(), Ok(text.as_str()));
        frontend.reset(&connection);
    }
}

fn crash(photo: &Photo) {
    let Photo { frontend, backend, a, .. } = photo;
    let open = || {
        let connection = frontend.connect(Connect::to(backend.at(Family::V4, ECHO)));
        assert_eq!(frontend.exchange(&connection, "x").as_deref(), Ok("x"));
        connection
    };
    let (stays, ends) = (open(), open());
    let tuple = format!("sport={} dport={ECHO}", ends.local.port());
    a.kill();
    let before = counted(a, "forwarded");
    assert_eq!(frontend.exchange(&stays, "still").as_deref(), Ok("still"));
    frontend.close(&ends);
    assert!(counted(a, "forwarded") - before <= BY_THE_HOST_MAX, "without the daemon, too");
    assert!(tracked(a).contains(&tuple), "the host saw the handshake of {tuple} and no end");
    a.start();
    assert!(!tracked(a).contains(&tuple), "{tuple} is still tracked");
    assert_eq!(frontend.exchange(&stays, "on").as_deref(), Ok("on"));
    frontend.close(&stays);
}

fn filtered(photo: &Photo) {
    let Photo { frontend, backend, a, .. } = photo;
    let (file, document) = (backend.document_file(), backend.document());
    let leaves = a.watch();
    photo.world.documents().remove(&file);
    leaves.event("workload left", &[("workload", "photo/photo-backend")]);
    let device = host_side(a, backend.v4().to_string().as_str());
    program(a, "tc", &["qdisc", "add", "dev", &device, "clsact"], "");
    let watch = a.watch();
    photo.world.documents().put(&file, &document);
    let line = watch.event("shortcut off", &[("workload", "photo/photo-backend")]);
    assert!(field(&line, "problem").as_str().is_some_and(|problem| problem.contains("`clsact`")), "{line}");
    watch.event("workload enrolled", &[("workload", "photo/photo-backend")]);
    let deadline = Instant::now() + LINE_TIME_MAX;
    loop {
        let watch = a.watch();
        let connection = frontend.connect(Connect::to(backend.at(Family::V4, ECHO)));
        assert_eq!(frontend.exchange(&connection, "x").as_deref(), Ok("x"));
        frontend.close(&connection);
        let line = watch.served("outbound", &[("destination.workload", "photo-backend")]);
        if is(&line, "path", "direct") {
            break;
        }
        assert!(Instant::now() < deadline, "it is direct all the same: {line}");
    }
}

/// The interface by which a node reaches an address.
fn host_side(node: &Node, address: &str) -> String {
    let routes = node.namespace().ip("-4 route show").expect("the node has routes");
    let route = routes.lines().find(|route| route.split(' ').next() == Some(address)).expect("a route");
    route.split(' ').skip_while(|word| *word != "dev").nth(1).expect("a device").to_owned()
}

fn tracked(node: &Node) -> String {
    node.namespace()
        .run(|| std::fs::read_to_string("/proc/thread-self/net/nf_conntrack"))
        .expect("it is tracked")
}

/// Packets of a named counter of [`RULES`].
fn counted(node: &Node, name: &str) -> u64 {
    let shown = nft(node, &["list", "counter", "inet", "host", name], "");
    let packets = shown.split_whitespace().skip_while(|word| *word != "packets").nth(1);
    packets.and_then(|packets| packets.parse().ok()).unwrap_or_else(|| panic!("no count in {shown}"))
}

fn nft(node: &Node, arguments: &[&str], input: &str) -> String {
    program(node, "nft", arguments, input)
}

fn program(node: &Node, name: &str, arguments: &[&str], input: &str) -> String {
    node.namespace().run(|| {
        let mut child = Program::new(name)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}: run the tests with `cargo xtask test`"));
        child.stdin.take().expect("it is piped").write_all(input.as_bytes()).expect("it reads");
        let done = child.wait_with_output().expect("it ends");
        assert!(done.status.success(), "{name} {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8_lossy(&done.stdout).into_owned()
    })
}
