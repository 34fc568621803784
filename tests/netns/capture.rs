//! What a workload connects and what connects to it goes through the daemon, and nobody at either end can tell.

use std::time::Duration;

use world::expect::is;
use world::pod::{FAMILIES, Family, Plan, Pod};
use world::protocol::{Command, Connect, Connected, FastOpen, Listen, Many, Mode, Payload};

use crate::cases::{Cases, say};
use crate::photo::{BULK, CLOSED, ECHO, FAREWELL, GREET, HTTP, NEEDLE, Photo};

const MIB: u64 = 1024 * 1024;

/// Long enough for an honest exchange, short enough to wait for in vain.
const VAIN_MILLISECONDS: u64 = 1_500;

/// Marks that an application may set: one with a meaning for other meshes, and the bit of this one.
const FOREIGN_MARK: u32 = 0x539;
const OUR_MARK: u32 = 0x0008_0000;

/// `TCP_ESTABLISHED` and `TCP_LISTEN` of `include/net/tcp_states.h`.
const ESTABLISHED: u8 = 1;
const LISTENING: u8 = 10;

/// A way for an application to connect.
struct Way {
    name: &'static str,
    only: Option<Family>,
    change: fn(&mut Connect),
}

/// By which addresses and which kind of socket an application speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Socket {
    V4,
    V6,
    /// `AF_INET6` to an IPv4 address.
    Mapped,
}

const SOCKETS: [Socket; 3] = [Socket::V4, Socket::V6, Socket::Mapped];

impl Socket {
    fn family(self) -> Family {
        match self {
            Self::V4 | Self::Mapped => Family::V4,
            Self::V6 => Family::V6,
        }
    }

    fn connect(self, to: std::net::SocketAddr) -> Connect {
        Connect { mapped: self == Self::Mapped, ..Connect::to(to) }
    }
}

const WAYS: [Way; 12] = [
    Way { name: "a blocking connect", only: None, change: |_| {} },
    Way { name: "a non-blocking connect", only: None, change: |connect| connect.nonblocking = true },
    Way {
        name: "a connect of a v4-mapped address",
        only: Some(Family::V4),
        change: |connect| connect.mapped = true,
    },
    Way {
        name: "a non-blocking connect of a v4-mapped address",
        only: Some(Family::V4),
        change: |connect| (connect.mapped, connect.nonblocking) = (true, true),
    },
    Way {
        name: "a socket bound to the device",
        only: None,
        change: |connect| connect.device = Some("eth0".to_owned()),
    },
    Way {
        name: "TCP Fast Open by sendto",
        only: None,
        change: |connect| connect.fast_open = FastOpen::SendTo,
    },
    Way {
        name: "TCP Fast Open by option",
        only: None,
        change: |connect| connect.fast_open = FastOpen::Connect,
    },
    Way {
        name: "TCP Fast Open to a v4-mapped address",
        only: Some(Family::V4),
        change: |connect| (connect.mapped, connect.fast_open) = (true, FastOpen::SendTo),
    },
    Way { name: "MPTCP", only: None, change: |connect| connect.mptcp = true },
    Way {
        name: "MPTCP with TCP Fast Open",
        only: None,
        change: |connect| (connect.mptcp, connect.fast_open) = (true, FastOpen::SendTo),
    },
    Way { name: "a socket that bears our own mark", only: None, change: |connect| connect.mark = OUR_MARK },
    // T-2: marks are for anybody to set, so none exempts.
    Way {
        name: "a socket that the application marked",
        only: None,
        change: |connect| connect.mark = FOREIGN_MARK,
    },
];

#[test]
fn capture() {
    let photo = Photo::start(&[]);
    for pod in [&photo.frontend, &photo.datastore] {
        // Client and server of Fast Open, without cookies, for all listeners: data rides in the first SYN.
        pod.namespace().set_sysctl("net/ipv4/tcp_fastopen", "1543").expect("the sysctl exists");
    }
    let mut cases = Cases::of("capture");

    for way in &WAYS {
        for family in families(way) {
            cases.case(&format!("{} is captured ({family:?})", way.name), || captured(&photo, way, family));
        }
    }
    cases.case("clearing the mark opens no way out (T-1)", || cleared_marks(&photo));
    for socket in SOCKETS {
        cases.case(&format!("a service's address leads to its workload ({socket:?})"), || {
            service(&photo, socket)
        });
        cases.case(&format!("own addresses and loopback are untouched ({socket:?})"), || own(&photo, socket));
        cases.case(&format!("a loopback-only port is unreachable from outside ({socket:?})"), || {
            loopback_only(&photo, socket);
        });
        cases.case(&format!("the proxy's own listeners serve nobody in the pod, T-6 ({socket:?})"), || {
            own_listeners(&photo, socket);
        });
        cases.case(&format!("a server may speak first ({socket:?})"), || speaks_first(&photo, socket));
        cases
            .case(&format!("either side may end its half first ({socket:?})"), || half_close(&photo, socket));
        cases.case(&format!("a reset of the client reaches the server ({socket:?})"), || {
            reset(&photo, socket)
        });
        cases.case(&format!("a closed port ends in a reset ({socket:?})"), || closed_port(&photo, socket));
        cases.case(&format!("outside the mesh the bytes go unchanged ({socket:?})"), || {
            outside(&photo, socket)
        });
        cases.case(&format!("a stranger's plaintext is served under PERMISSIVE ({socket:?})"), || {
            permissive(&photo, socket);
        });
        cases.case(&format!("300 destinations are reached with 200 local ports ({socket:?})"), || {
            few_ports(&photo, socket);
        });
        cases.case(&format!("2,000 connections stand at once ({socket:?})"), || concurrent(&photo, socket));
        cases.case(&format!("1 GiB goes both ways unharmed ({socket:?})"), || bulk(&photo, socket));
    }
    cases.case("an MPTCP server is reached as any other", || mptcp_server(&photo));
    cases.case("two workloads of one node reach each other", || same_node(&photo));
    cases.case("a nested namespace is a stranger (T-7)", || nested(&photo));
    cases.end();
}

fn families(way: &Way) -> Vec<Family> {
    way.only.map_or_else(|| FAMILIES.to_vec(), |family| vec![family])
}

/// Served through the tunnel, with true addresses at every point where an application may look, and nothing in the
/// clear between the nodes.
// policy H-2, H-5: the certificate is that of the pod, which secure naming and the other node's log tell, and the address too.
fn captured(photo: &Photo, way: &Way, family: Family) {
    let Photo { frontend, datastore, .. } = photo;
    let to = datastore.at(family, ECHO);
    let capture = photo.world.capture(&photo.a, NEEDLE);
    let (source, destination) = (photo.a.watch(), photo.b.watch());
    let before = datastore.accepted(photo.listeners.echo).len();

    let mut connect = Connect::to(to);
    connect.first = NEEDLE.to_owned();
    (way.change)(&mut connect);
    let connection = frontend.connect(connect);
    assert_eq!(canonical(connection.peer), to, "getpeername");
    assert_eq!(connection.local.ip().to_canonical(), frontend.ip(family), "getsockname");
    assert_eq!(frontend.receive(&connection, NEEDLE.len()).as_deref(), Ok(NEEDLE));
    assert_eq!(frontend.exchange(&connection, NEEDLE).as_deref(), Ok(NEEDLE));

    let accepted = datastore.wait_accepted(photo.listeners.echo, before, 1, false);
    let peer = canonical(accepted[0].peer);
    assert_eq!(peer.ip(), frontend.ip(family), "accept shows the client's own address");
    assert_eq!(canonical(accepted[0].local), to, "the application is reached at its own address");
    assert_listed(photo, &connection, peer, to);

    frontend.close(&connection);
    let local = canonical(connection.local).to_string();
    source.served("outbound", &[("path", "tunnel"), ("source.address", &local)]);
    let line = destination.served("inbound", &[("path", "tunnel"), ("source.workload", "photo-frontend")]);
    assert!(is(&line, "source.identity", &frontend.identity()), "{line}");
    assert!(is(&line, "destination.workload", "datastore"), "{line}");
    assert!(is(&line, "tls.version", "TLSv1.3"), "{line}");
    capture.stop().assert_no_plaintext();
}

/// The kernel's tables and `ss` show the true addresses on both sides.
fn assert_listed(
    photo: &Photo,
    connection: &Connected,
    peer: std::net::SocketAddr,
    to: std::net::SocketAddr,
) {
    let at_server = photo.datastore.sockets().into_iter().any(|socket| {
        socket.state == ESTABLISHED && canonical(socket.local) == to && canonical(socket.remote) == peer
    });
    assert!(at_server, "no socket {to} <- {peer} in the server's namespace");
    let local = canonical(connection.local);
    let at_client = photo.frontend.sockets().into_iter().any(|socket| {
        socket.state == ESTABLISHED && canonical(socket.local) == local && canonical(socket.remote) == to
    });
    assert!(at_client, "no socket {local} -> {to} in the client's namespace");
    for (pod, ends) in [(&photo.datastore, (to, peer)), (&photo.frontend, (local, to))] {
        let shown = ss(pod);
        assert!(shown.contains(&ends), "ss at {} does not show {ends:?}: {shown:?}", pod.name());
    }
}

/// Local and remote address of each established connection, as the tool says them.
fn ss(pod: &Pod) -> Vec<(std::net::SocketAddr, std::net::SocketAddr)> {
    let mut command = pod.namespace().command(pod.cgroup(), std::path::Path::new("ss"));
    let said = command.args(["-H", "-t", "-n", "state", "established"]).output().expect("ss (iproute2) runs");
    assert!(said.status.success(), "ss: {}", String::from_utf8_lossy(&said.stderr));
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let ends = |line: &str| {
        let mut words = line.split_whitespace().skip(2).map(|word| address_of(word).map(canonical));
        Some((words.next()??, words.next()??))
    };
    text.lines().filter_map(ends).collect()
}

/// `10.8.1.2%eth0:80` of a socket that is bound to a device is `10.8.1.2:80`.
fn address_of(word: &str) -> Option<std::net::SocketAddr> {
    let (ip, port) = word.rsplit_once(':')?;
    let ip = ip.split('%').next()?.trim_matches(['[', ']']);
    Some(std::net::SocketAddr::new(ip.parse().ok()?, port.parse().ok()?))
}

/// T-1: the record of the kernel counts, not the mark of the moment. What becomes of the connection is the
/// application's own loss.
fn cleared_marks(photo: &Photo) {
    let capture = photo.world.capture(&photo.a, NEEDLE);
    let watch = photo.a.watch();
    let mut pending = Vec::new();
    for way in &WAYS {
        for family in families(way) {
            let mut connect = Connect::to(photo.datastore.at(family, ECHO));
            connect.first = NEEDLE.to_owned();
            connect.timeout_ms = VAIN_MILLISECONDS;
            (way.change)(&mut connect);
            connect.clear_mark = true;
            pending.push(photo.frontend.begin(Command::Ask { connect, text: NEEDLE.to_owned() }));
        }
    }
    for ask in pending {
        ask.outcome().expect("an ask has an answer, whatever became of the connection");
    }
    capture.stop().assert_no_plaintext();
    let dropped = watch.grew("culvert_kernel_drops_total", &[("reason", "captured_egress")]);
    assert!(dropped >= 1.0, "the guard dropped nothing: was there anything to drop?");
}

fn service(photo: &Photo, socket: Socket) {
    let family = socket.family();
    let watch = photo.a.watch();
    let to = photo.service(family, 80);
    let connection = photo.frontend.connect(socket.connect(to));
    assert_eq!(canonical(connection.peer), to, "the application sees the address that it asked for");
    photo.frontend.close(&connection);
    let asked = photo.frontend.http_by(socket.connect(to));
    assert!(asked.text.contains("datastore peer="), "{asked:?}");
    assert!(asked.text.contains(&photo.frontend.ip(family).to_string()), "{asked:?}");
    let line = watch.served("outbound", &[("path", "tunnel"), ("destination.workload", "datastore")]);
    assert!(is(&line, "service", "datastore/datastore"), "{line}");
}

fn own(photo: &Photo, socket: Socket) {
    let family = socket.family();
    let Photo { frontend, .. } = photo;
    let listener = frontend.serve(0, Mode::Echo);
    let loopback = match family {
        Family::V4 => "127.0.0.1".parse().expect("an address"),
        Family::V6 => "::1".parse().expect("an address"),
    };
    for ip in [frontend.ip(family), loopback] {
        let connection = frontend.connect(socket.connect(world::at(ip, listener.port)));
        assert_eq!(frontend.exchange(&connection, "to myself").as_deref(), Ok("to myself"));
        let peer = frontend.accepted(listener).last().expect("it was accepted").peer;
        assert_eq!(
            canonical(peer),
            canonical(connection.local),
            "the very same connection, no proxy between"
        );
        frontend.close(&connection);
    }
    frontend.close_listener(listener);
}

fn loopback_only(photo: &Photo, socket: Socket) {
    let family = socket.family();
    let watch = photo.b.watch();
    for client in [&photo.frontend, &photo.stranger] {
        let asked = client.ask(socket.connect(photo.datastore.at(family, 9100)), "");
        assert_eq!(asked.text, "", "a loopback-only port answered {}", client.name());
        assert!(asked.refused.is_some() || asked.end == "ECONNRESET", "{asked:?}");
    }
    watch.refused("inbound", "nothing_listening", &[("source.workload", "photo-frontend")]);
}

fn own_listeners(photo: &Photo, socket: Socket) {
    let family = socket.family();
    let Photo { frontend, .. } = photo;
    let ports: Vec<u16> = frontend
        .sockets()
        .into_iter()
        .filter(|socket| socket.state == LISTENING)
        .map(|socket| socket.local.port())
        .collect();
    assert!(!ports.is_empty(), "the proxy listens in the pod's namespace");
    let loopback = match family {
        Family::V4 => "127.0.0.1".parse().expect("an address"),
        Family::V6 => "::1".parse().expect("an address"),
    };
    let watch = photo.a.watch();
    for ip in [frontend.ip(family), loopback] {
        for port in &ports {
            let mut connect = socket.connect(world::at(ip, *port));
            connect.timeout_ms = 5_000;
            let asked = frontend.ask(connect, "GET / HTTP/1.1\r\n\r\n");
            // The tunnel's listener may say why it closes, as TLS does: an alert record.
            let silent = asked.text.is_empty() || asked.text.starts_with('\u{15}');
            assert!(silent, "a listener of the proxy answered at {ip}:{port}: {:?}", asked.text);
            assert_ne!(asked.end, "EAGAIN", "closed, not left open: {ip}:{port}");
        }
    }
    let counted = watch.grew("culvert_denials_total", &[("reason", "loop")]);
    assert!(counted >= 1.0, "a loop is counted");
}

fn speaks_first(photo: &Photo, socket: Socket) {
    let family = socket.family();
    // Through the tunnel, and in the clear under PERMISSIVE, where the server waits for a first byte in vain.
    for client in [&photo.frontend, &photo.stranger] {
        let connection = client.connect(socket.connect(photo.datastore.at(family, GREET)));
        assert_eq!(client.receive(&connection, 6).as_deref(), Ok("hello\n"), "{}", client.name());
        assert_eq!(client.exchange(&connection, "thanks").as_deref(), Ok("thanks"));
        client.close(&connection);
    }
}

fn half_close(photo: &Photo, socket: Socket) {
    let family = socket.family();
    let Photo { frontend, datastore, listeners, .. } = photo;
    // The server ends its half, and goes on hearing.
    let before = datastore.accepted(listeners.farewell).len();
    let connection = frontend.connect(socket.connect(datastore.at(family, FAREWELL)));
    let ended = frontend.drain(&connection, Duration::from_secs(5));
    assert_eq!((ended.bytes, ended.end.as_str()), (6, "eof"));
    frontend.send(&connection, "and now I").expect("this half is open");
    frontend.shutdown_write(&connection);
    let accepted = datastore.wait_accepted(listeners.farewell, before, 1, true);
    let last = &accepted[0];
    assert_eq!((last.received, last.end.as_deref()), (9, Some("eof")));
    frontend.close(&connection);
    // The client ends its half, and goes on hearing: what bulk does with every transfer.
    let connection = frontend.connect(socket.connect(datastore.at(family, BULK)));
    let took = frontend.bulk(&connection, Payload::seeded(10, 1), Payload::seeded(8 * MIB, 2));
    took.expect("what comes after the client's end arrives");
}

fn reset(photo: &Photo, socket: Socket) {
    let family = socket.family();
    let Photo { frontend, datastore, listeners, .. } = photo;
    let before = datastore.accepted(listeners.echo).len();
    let connection = frontend.connect(socket.connect(datastore.at(family, ECHO)));
    assert_eq!(frontend.exchange(&connection, "x").as_deref(), Ok("x"));
    frontend.reset(&connection);
    let accepted = datastore.wait_accepted(listeners.echo, before, 1, true);
    assert_eq!(accepted[0].end.as_deref(), Some("ECONNRESET"));
}

fn closed_port(photo: &Photo, socket: Socket) {
    let family = socket.family();
    let (source, destination) = (photo.a.watch(), photo.b.watch());
    let asked = photo.frontend.ask(socket.connect(photo.datastore.at(family, CLOSED)), "is anybody there?");
    assert_eq!(asked.text, "");
    assert!(asked.refused.is_some() || asked.end == "ECONNRESET", "an error, not an orderly end: {asked:?}");
    destination.refused("inbound", "nothing_listening", &[("source.workload", "photo-frontend")]);
    source.refused("outbound", "nothing_listening", &[("source.workload", "photo-frontend")]);
}

fn outside(photo: &Photo, socket: Socket) {
    let family = socket.family();
    let Photo { frontend, outside, .. } = photo;
    let watch = photo.a.watch();
    let to = outside.at(family, ECHO);
    let capture = photo.world.capture(&photo.a, NEEDLE);
    let connection = frontend.connect(socket.connect(to));
    assert_eq!(frontend.exchange(&connection, NEEDLE).as_deref(), Ok(NEEDLE));
    frontend.close(&connection);
    let line = watch.served("outbound", &[("path", "passthrough"), ("destination.address", &to.to_string())]);
    assert!(is(&line, "source.workload", "photo-frontend"), "{line}");
    let seen = capture.stop();
    let from_workload = seen.flows.keys().any(|(from, at)| from.ip() == frontend.ip(family) && *at == to);
    assert!(from_workload, "relayed from the workload's own address: {:?}", seen.flows);
    assert!(seen.needles > 0, "unchanged, so in the clear");
}

fn permissive(photo: &Photo, socket: Socket) {
    let family = socket.family();
    let Photo { stranger, datastore, .. } = photo;
    let watch = photo.b.watch();
    let asked = stranger.http_by(socket.connect(datastore.at(family, HTTP)));
    assert!(
        asked.text.contains(&format!("{}", stranger.ip(family))),
        "with the true client address: {asked:?}"
    );
    let accepted = datastore.accepted(photo.listeners.http);
    let last = accepted.last().expect("it was accepted");
    assert_eq!(last.peer.ip().to_canonical(), stranger.ip(family));
    let line = watch.served("inbound", &[("path", "relay"), ("destination.workload", "datastore")]);
    assert!(
        line.get("source").is_none_or(|source| source.get("identity").is_none_or(|id| id.is_null())),
        "{line}"
    );
}

/// Captured connections to different destinations share local ports, as without the mesh.
fn few_ports(photo: &Photo, socket: Socket) {
    let family = socket.family();
    const DESTINATIONS: u16 = 300;
    let Photo { frontend, datastore, .. } = photo;
    let namespace = frontend.namespace();
    let range = namespace.sysctl("net/ipv4/ip_local_port_range").expect("the sysctl exists");
    namespace.set_sysctl("net/ipv4/ip_local_port_range", "40000 40199").expect("the sysctl exists");
    let mut wanted = Listen::at(world::at(std::net::Ipv6Addr::UNSPECIFIED, 20_000), Mode::Echo);
    wanted.count = DESTINATIONS;
    let listener = datastore.listen(wanted);
    let load = frontend.many(Many {
        to: (0..DESTINATIONS).map(|index| datastore.at(family, 20_000 + index)).collect(),
        mapped: socket == Socket::Mapped,
        count: usize::from(DESTINATIONS),
        parallel: usize::from(DESTINATIONS),
        together: true,
        bytes: 100,
        timeout_ms: 20_000,
    });
    datastore.close_listener(listener);
    namespace.set_sysctl("net/ipv4/ip_local_port_range", &range).expect("the sysctl exists");
    assert_eq!((load.succeeded, load.failed), (u64::from(DESTINATIONS), Default::default()));
}

fn concurrent(photo: &Photo, socket: Socket) {
    let family = socket.family();
    let load = photo.frontend.many(Many {
        to: vec![photo.datastore.at(family, ECHO)],
        mapped: socket == Socket::Mapped,
        count: 2_000,
        parallel: 2_000,
        together: true,
        bytes: 1_000,
        timeout_ms: 30_000,
    });
    say(&format!("    slowest of 2,000: {} ms", load.slowest_ms));
    assert_eq!((load.succeeded, load.failed), (2_000, Default::default()));
}

fn bulk(photo: &Photo, socket: Socket) {
    let family = socket.family();
    let connection = photo.frontend.connect(socket.connect(photo.datastore.at(family, BULK)));
    let took = photo
        .frontend
        .bulk(&connection, Payload::seeded(1024 * MIB, 1), Payload::seeded(1024 * MIB, 2))
        .expect("every byte arrives");
    say(&format!("    1 GiB each way in {:.1} s", took.as_secs_f64()));
    photo.frontend.close(&connection);
}

fn mptcp_server(photo: &Photo) {
    let Photo { frontend, datastore, stranger, .. } = photo;
    let mut wanted = Listen::at(world::at(std::net::Ipv6Addr::UNSPECIFIED, 0), Mode::Echo);
    wanted.mptcp = true;
    let listener = datastore.listen(wanted);
    for family in FAMILIES {
        for client in [frontend, stranger] {
            for mptcp in [false, true] {
                let mut connect = Connect::to(datastore.at(family, listener.port));
                connect.mptcp = mptcp;
                let connection = client.connect(connect);
                assert_eq!(client.exchange(&connection, "many paths").as_deref(), Ok("many paths"));
                let peer = datastore.accepted(listener).last().expect("it was accepted").peer;
                assert_eq!(peer.ip().to_canonical(), client.ip(family));
                client.close(&connection);
            }
        }
    }
}

// policy H-3: on one node the source is known as it is between nodes.
fn same_node(photo: &Photo) {
    let Photo { frontend, backend, .. } = photo;
    let watch = photo.a.watch();
    for family in FAMILIES {
        let asked = frontend.http(backend.at(family, 8080));
        assert!(
            asked.text.contains(&format!("photo-backend peer={}", socket_ip(frontend.ip(family)))),
            "{asked:?}"
        );
    }
    // One line for the two of them: see the scenarios of the direct path.
    let fields = [("path", "direct"), ("destination.workload", "photo-backend")];
    let line = watch.served("outbound", &fields);
    assert!(is(&line, "source.workload", "photo-frontend"), "{line}");
}

/// How the start of a socket address with this IP reads; the server is dual-stack.
fn socket_ip(ip: std::net::IpAddr) -> String {
    match ip {
        std::net::IpAddr::V4(ip) => format!("[::ffff:{ip}]:"),
        std::net::IpAddr::V6(ip) => format!("[{ip}]:"),
    }
}

/// T-7: a namespace inside the pod's control group is in no map. It is not captured and holds no identity: towards
/// enrolled workloads it is what every stranger is. Refusal under STRICT is proven with the policies.
fn nested(photo: &Photo) {
    let nested = photo.world.pod(&photo.a, Plan::new("photo", "nested").outside().inside(&photo.frontend));
    let watch = photo.b.watch();
    let asked = nested.http(photo.datastore.at(Family::V4, HTTP));
    assert!(asked.text.contains("datastore peer="), "under PERMISSIVE a stranger is served: {asked:?}");
    let line = watch.served("inbound", &[("path", "relay"), ("destination.workload", "datastore")]);
    assert!(!line.to_string().contains(&photo.frontend.identity()), "it gained the pod's identity: {line}");
}

fn canonical(address: std::net::SocketAddr) -> std::net::SocketAddr {
    std::net::SocketAddr::new(address.ip().to_canonical(), address.port())
}
