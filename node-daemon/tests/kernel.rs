//! The kernel programs in real network namespaces: needs root, and fails with that sentence where it is not.
//!
//! Each test has a pod and a peer joined by a veth, and a node of its own whose programs are attached to the cgroup of this
//! process. Applications and the daemon are threads; what only routes and the data path can show is tested in `tests/`.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

#[path = "kernel/direct.rs"]
mod direct;

use ebpf_abi::{WorkloadNumber, limits};
use nix::sys::socket::{setsockopt, sockopt::TcpFastOpenConnect};
use node_daemon::{
    kernel::{EnrolTarget, Kernel, KernelConfig, KernelError, MapSizes, WorkloadKind, cleanup},
    sys::{Namespace, cgroup},
};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

const MARK: u32 = 0x0080_0000;
const TABLE: &str = "1337";
const POD4: &str = "10.77.0.1";
const POD6: &str = "fd77::1";
const PEER4: &str = "10.77.0.2";
const PEER6: &str = "fd77::2";
const PEER_MAPPED: &str = "::ffff:10.77.0.2";
/// Nothing in these tests takes longer, but a machine under load may.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn connects_of_a_pod_reach_the_outbound_listener_with_their_true_addresses() {
    let (world, mut kernel) = World::with_kernel();
    let (daemon, _) = world.enrol(&mut kernel);
    for (target, source) in [(PEER4, POD4), (PEER6, POD6), (PEER_MAPPED, POD4)] {
        let client = world.pod.connect(target, 8080);
        let (_served, peer, local) = daemon.outbound.accept_one();
        assert_eq!(local, to(canonical(target), 8080), "{target}");
        assert_eq!(peer, client.local(), "{target}");
        assert_eq!(peer.ip().to_canonical(), canonical(source), "{target}");
    }
    assert_eq!(count(&kernel, "captured"), 3);
    assert_eq!(count(&kernel, "steered_outbound"), 3);
}

#[test]
fn connections_from_outside_reach_inbound_and_tunnel_and_exempt_ports_their_application() {
    let (world, mut kernel) = World::with_kernel();
    let application = world.pod.listen("::", 9100);
    let shadowed = world.pod.listen("::", 8080);
    let (daemon, _) = world.enrol(&mut kernel);
    for target in [POD4, POD6] {
        let _client = world.peer.connect(target, 8080);
        let (_, _, local) = daemon.inbound.accept_one();
        assert_eq!(local, to(canonical(target), 8080));
        let _client = world.peer.connect(target, 15008);
        let (_, _, local) = daemon.tunnel.accept_one();
        assert_eq!(local, to(canonical(target), 15008));
        let _client = world.peer.connect(target, 9100);
        application.accept_one();
    }
    shadowed.nothing_waits();
}

#[test]
fn loopback_and_own_addresses_are_untouched() {
    let (world, mut kernel) = World::with_kernel();
    let application = world.pod.listen("::", 8080);
    let (daemon, _) = world.enrol(&mut kernel);
    for target in ["127.0.0.1", "::1", "::ffff:127.0.0.1", POD4, POD6, "::ffff:10.77.0.1", "0.0.0.0"] {
        let client = world.pod.connect(target, 8080);
        let (_, peer, _) = application.accept_one();
        assert_eq!(peer, client.local(), "{target}");
    }
    daemon.outbound.nothing_waits();
    daemon.inbound.nothing_waits();
    assert_eq!(count(&kernel, "captured"), 0);
}

// T-1: the mark is gone, the record holds.
#[test]
fn a_captured_connection_never_leaves_by_a_real_interface() {
    let (world, mut kernel) = World::with_kernel();
    let (daemon, _) = world.enrol(&mut kernel);
    let wire = world.peer.listen("::", 8080);
    for target in [PEER4, PEER6, PEER_MAPPED] {
        let mut client = world.pod.connect(target, 8080);
        daemon.outbound.accept_one();
        client.0.set_mark(0).expect("root may clear a mark");
        let before = count(&kernel, "captured_egress");
        client.0.write_all(b"plaintext").expect("the socket is connected");
        wait_until("a segment was dropped", || count(&kernel, "captured_egress") > before);
    }
    for target in [PEER4, PEER6] {
        // Fast Open: the SYN waits for the first write, and the mark is cleared before it.
        let client = world.pod.socket(target);
        setsockopt(&client, TcpFastOpenConnect, &true).expect("this kernel has TCP Fast Open");
        client.connect(&SockAddr::from(to(address(target), 8080))).expect("deferred");
        client.set_mark(0).expect("root may clear a mark");
        client.set_nonblocking(true).expect("a socket option");
        let before = count(&kernel, "captured_egress");
        let _: io::Result<usize> = (&client).write(b"plaintext");
        wait_until("the SYN was dropped", || count(&kernel, "captured_egress") > before);
    }
    wire.nothing_waits();
}

#[test]
fn a_socket_bound_to_a_device_is_captured() {
    let (world, mut kernel) = World::with_kernel();
    let (daemon, _) = world.enrol(&mut kernel);
    for target in [PEER4, PEER6] {
        let client = world.pod.socket(target);
        client.bind_device(Some(b"eth0")).expect("the device is there");
        client.connect_timeout(&SockAddr::from(to(address(target), 8080)), PATIENCE).expect("captured");
        let (_, _, local) = daemon.outbound.accept_one();
        assert_eq!(local, to(canonical(target), 8080));
    }
}

#[test]
fn a_multipath_socket_is_captured() {
    let (world, mut kernel) = World::with_kernel();
    let (daemon, _) = world.enrol(&mut kernel);
    for target in [PEER4, PEER6] {
        let domain = Domain::for_address(to(address(target), 0));
        let made = world.pod.run(|| Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP)));
        let client = made.expect("this kernel has MPTCP");
        client.connect_timeout(&SockAddr::from(to(address(target), 8080)), PATIENCE).expect("captured");
        daemon.outbound.accept_one();
    }
}

// T-2
#[test]
fn an_exempt_socket_goes_its_own_way_and_a_marked_one_does_not() {
    let (world, mut kernel) = World::with_kernel();
    let (daemon, _) = world.enrol(&mut kernel);
    let server = world.peer.listen("::", 15008);
    for target in [PEER4, PEER6] {
        let own = world.pod.socket(target);
        kernel.exempt().mark(own.as_fd()).expect("a socket can be recorded");
        own.connect_timeout(&SockAddr::from(to(address(target), 15008)), PATIENCE).expect("the peer listens");
        server.accept_one();
        daemon.outbound.nothing_waits();
        // An application that sets the mark itself, or dials the tunnel's port, gains nothing.
        let marked = world.pod.socket(target);
        marked.set_mark(MARK).expect("root may set a mark");
        marked.connect_timeout(&SockAddr::from(to(address(target), 15008)), PATIENCE).expect("captured");
        daemon.outbound.accept_one();
    }
    server.nothing_waits();
    assert_eq!(count(&kernel, "passed_exempt"), 2);
}

// T-3
#[test]
fn a_connect_waits_for_the_successor_of_a_dead_daemon() {
    let (world, mut kernel) = World::with_kernel();
    let (daemon, number) = world.enrol(&mut kernel);
    {
        let _no_fork_now = FORK.lock().unwrap_or_else(PoisonError::into_inner);
        drop((daemon, kernel));
    }
    thread::scope(|scope| {
        let clients: Vec<_> = [PEER4, PEER6, PEER_MAPPED]
            .into_iter()
            .map(|target| scope.spawn(|| connect_when_answered(&world, target)))
            .collect();
        let probe = Kernel::start(&world.config()).expect("a successor starts");
        wait_until("the connects met no listener", || count(&probe, "no_outbound_listener") >= 3);
        wait_until("the resets were held back", || count(&probe, "reset_while_waiting") >= 2);
        drop(probe);
        let mut successor = Kernel::start(&world.config()).expect("a successor starts");
        let remembered = successor.remembered();
        assert_eq!(remembered.len(), 1);
        assert_eq!((remembered[0].number, remembered[0].key.as_str()), (number, KEY));
        let daemon = Listeners::open(&world.pod);
        assert_eq!(successor.steer(&world.target(), daemon.fds()).expect("steered"), number);
        successor.capture(number).expect("captured");
        for client in clients {
            client.join().expect("no panic").expect("the connect waited");
            daemon.outbound.accept_one();
        }
    });
}

// T-24
#[test]
fn a_successor_swaps_and_its_predecessor_stops_writing() {
    let (world, mut first) = World::with_kernel();
    let (old, number) = world.enrol(&mut first);
    let pins = world.pins();
    let mut second = Kernel::start(&world.config()).expect("a successor starts");
    assert!(!first.is_owner().expect("a map"));
    assert!(second.is_owner().expect("a map"));
    assert!(matches!(first.release(number), Err(KernelError::NotOwner { .. })));
    assert!(matches!(first.steer(&world.target(), old.fds()), Err(KernelError::NotOwner { .. })));
    let new = Listeners::open(&world.pod);
    assert_eq!(second.steer(&world.target(), new.fds()).expect("steered"), number);
    second.capture(number).expect("captured");
    assert_eq!(world.pins(), pins, "swapped, not stacked");
    let before = count(&second, "captured");
    let _client = world.pod.connect(PEER4, 8080);
    new.outbound.accept_one();
    old.outbound.nothing_waits();
    assert_eq!(count(&second, "captured"), before + 1, "one program judged it, once");
}

#[test]
fn a_captured_socket_that_listens_afterwards_serves() {
    let (world, mut kernel) = World::with_kernel();
    let (daemon, _) = world.enrol(&mut kernel);
    for (target, own) in [(PEER4, POD4), (PEER6, POD6)] {
        let socket = world.pod.connect(target, 8080).0;
        daemon.outbound.accept_one();
        disconnect(&socket);
        socket.bind(&SockAddr::from(to(address(own), 9100))).expect("a free port");
        socket.listen(8).expect("a bound socket listens");
        let _client = world.peer.connect(own, 9100);
        Listener(socket.into()).accept_one();
    }
}

#[test]
fn a_captured_socket_that_dials_loopback_afterwards_reaches_it() {
    let (world, mut kernel) = World::with_kernel();
    let (daemon, _) = world.enrol(&mut kernel);
    let application = world.pod.listen("::", 9200);
    for (target, again) in [(PEER4, POD4), (PEER6, POD6), (PEER4, "127.0.0.1"), (PEER6, "::1")] {
        let socket = world.pod.connect(target, 8080).0;
        daemon.outbound.accept_one();
        disconnect(&socket);
        socket
            .connect_timeout(&SockAddr::from(to(address(again), 9200)), PATIENCE)
            .expect("nothing is left of the mark");
        application.accept_one();
        assert_eq!(socket.mark().expect("a socket option") & MARK, 0);
    }
}

#[test]
fn a_released_workload_is_left_alone_and_leaves_nothing() {
    let (world, mut kernel) = World::with_kernel();
    let before = world.pins();
    let (daemon, number) = world.enrol(&mut kernel);
    kernel.uncapture(number).expect("the owner writes");
    world.pod.without_capture_routes();
    kernel.release(number).expect("the owner writes");
    assert_eq!(world.pins(), before);
    let server = world.peer.listen("::", 8080);
    let _client = world.pod.connect(PEER4, 8080);
    server.accept_one();
    daemon.outbound.nothing_waits();
    assert!(matches!(kernel.release(number), Err(KernelError::Unknown(_))));
    let (_, next) = world.enrol(&mut kernel);
    assert_ne!(next, number, "a number is never given twice");
}

#[test]
fn a_listener_of_another_namespace_is_refused() {
    let (world, mut kernel) = World::with_kernel();
    let foreign = Listeners::open(&world.peer);
    let refused = kernel.steer(&world.target(), foreign.fds());
    assert!(matches!(refused, Err(KernelError::ForeignListener { .. })), "{refused:?}");
    assert!(kernel.remembered().is_empty());
}

#[test]
fn two_workloads_do_not_share_a_namespace() {
    let (world, mut kernel) = World::with_kernel();
    let (daemon, _) = world.enrol(&mut kernel);
    let target = EnrolTarget { key: "photo_other".to_owned(), ..world.target() };
    let refused = kernel.steer(&target, daemon.fds());
    assert!(matches!(refused, Err(KernelError::NamespaceTaken { .. })), "{refused:?}");
}

#[test]
fn cleanup_leaves_nothing() {
    let (world, mut kernel) = World::with_kernel();
    let _daemon = world.enrol(&mut kernel);
    let report = cleanup(&world.config()).expect("everything can be removed");
    assert_eq!((report.links, report.maps), (6, 19));
    assert!(world.pins().is_empty());
    assert_eq!(cleanup(&world.config()).expect("nothing to remove").links, 0);
}

// T-27
#[test]
fn a_host_workload_is_captured_and_steered_and_local_clients_are_told_apart() {
    let (world, mut kernel) = World::with_kernel();
    let unit = Cgroup::make("unit");
    let other = Cgroup::make("other");
    let application = world.pod.listen("::", 8080);
    let unrelated = world.pod.listen("::", 22);
    let daemon = Listeners::open(&world.pod);
    let target = EnrolTarget {
        kind: WorkloadKind::Host { cgroup: unit.path.clone(), ports: vec![8080] },
        ..world.target()
    };
    let number = kernel.steer(&target, daemon.fds()).expect("steered");
    world.pod.with_capture_routes();
    kernel.capture(number).expect("captured");
    let origins = kernel.origins();

    for dialled in [PEER4, PEER6, PEER_MAPPED] {
        let _client = unit.dial(&world.pod, dialled, 443, None);
        let (_, peer, local) = daemon.outbound.accept_one();
        assert_eq!(local, to(canonical(dialled), 443));
        assert_eq!(origins.take(peer, local).expect("a map"), Some(number), "{dialled}");
        assert_eq!(origins.take(peer, local).expect("a map"), None, "taken once");
    }
    for dialled in [POD4, POD6] {
        let _client = unit.dial(&world.pod, dialled, 8080, None);
        application.accept_one();
        daemon.inbound.nothing_waits();
        for device in [None, Some("eth0")] {
            let _client = other.dial(&world.pod, dialled, 8080, device);
            let (_, peer, local) = daemon.inbound.accept_one();
            assert_eq!(origins.take(peer, local).expect("a map"), None, "{device:?}: some other process");
        }
        let _client = world.peer.connect(dialled, 8080);
        let (_, peer, local) = daemon.inbound.accept_one();
        assert_eq!(origins.take(peer, local).expect("a map"), None, "another machine");
        let _client = world.peer.connect(dialled, 15008);
        daemon.tunnel.accept_one();
        let _client = world.peer.connect(dialled, 22);
        unrelated.accept_one();
        let _client = other.dial(&world.pod, dialled, 22, None);
        unrelated.accept_one();
    }
    application.nothing_waits();

    // The daemon's delivery, with the client's address, from lo; announced it arrives, and not otherwise.
    for (client, target) in [(PEER4, POD4), (PEER6, POD6), (POD4, POD4), (POD6, POD6)] {
        let announced = deliver(&world, &kernel, number, client, target, true);
        let (_, peer, _) = application.accept_one();
        assert_eq!(peer.ip().to_canonical(), canonical(client));
        drop(announced);
        let _unannounced = deliver(&world, &kernel, number, client, target, false);
        daemon.inbound.accept_one();
        application.nothing_waits();
    }

    kernel.release(number).expect("the owner writes");
    // The kernel detaches a link a moment after its last pin went.
    wait_until("nothing is steered", || {
        let _client = world.peer.connect(POD4, 8080);
        application.something_waits()
    });
}

/// Loopback addresses, and from which address they are dialled.
const LOOPBACK: [(&str, &str); 3] = [("127.0.0.1", "127.0.0.1"), ("127.0.0.53", "127.0.0.1"), ("::1", "::1")];

/// Two services of a host and a daemon. The first one listens at loopback only, with port 8080.
struct Host {
    unit: Cgroup,
    neighbour: Cgroup,
    number: WorkloadNumber,
    neighbours_number: WorkloadNumber,
    daemon: Listeners,
    applications: Vec<Listener>,
}

impl Host {
    fn enrol(world: &World, kernel: &mut Kernel) -> Self {
        let (unit, neighbour) = (Cgroup::make("unit"), Cgroup::make("neighbour"));
        let applications = LOOPBACK.iter().map(|(at, _)| world.pod.listen(at, 8080)).collect();
        let daemon = Listeners::open(&world.pod);
        world.pod.with_capture_routes();
        let mut enrol = |key: &str, cgroup: &Cgroup, port| {
            let kind = WorkloadKind::Host { cgroup: cgroup.path.clone(), ports: vec![port] };
            let target = EnrolTarget { key: key.to_owned(), kind, ..world.target() };
            let number = kernel.steer(&target, daemon.fds()).expect("steered");
            kernel.capture(number).expect("captured");
            number
        };
        let number = enrol("books_ledger", &unit, 8080);
        let neighbours_number = enrol("books_clerk", &neighbour, 9200);
        Self { unit, neighbour, number, neighbours_number, daemon, applications }
    }
}

// T-27
#[test]
fn loopback_of_a_host_is_steered_and_local_clients_are_told_apart() {
    let (world, mut kernel) = World::with_kernel();
    let stranger = Cgroup::make("stranger");
    let host = Host::enrol(&world, &mut kernel);
    let Host { unit, neighbour, number, neighbours_number, daemon, applications } = &host;
    let (unrelated, tunnel) = (world.pod.listen("::", 22), world.pod.listen("::", 15008));
    let origins = kernel.origins();
    for ((dialled, source), application) in LOOPBACK.into_iter().zip(applications) {
        for (cgroup, whose) in [(&stranger, None), (neighbour, Some(*neighbours_number))] {
            let _client = cgroup.dial(&world.pod, dialled, 8080, None);
            let (_, peer, local) = daemon.inbound.accept_one();
            assert_eq!((peer.ip(), local), (address(source), to(address(dialled), 8080)));
            assert_eq!(origins.take(peer, local).expect("a map"), whose, "{dialled}");
        }
        application.nothing_waits();
        // What talks to itself is itself, and nothing is kept of it.
        let _client = unit.dial(&world.pod, dialled, 8080, None);
        let (_, peer, local) = application.accept_one();
        assert_eq!(origins.take(peer, local).expect("a map"), None);
        // Other ports are nobody's, and no tunnel ends at loopback.
        for cgroup in [&stranger, neighbour, unit] {
            for (port, listener) in [(22, &unrelated), (15008, &tunnel)] {
                let _client = cgroup.dial(&world.pod, dialled, port, None);
                let (_, peer, local) = listener.accept_one();
                assert_eq!(origins.take(peer, local).expect("a map"), None);
            }
        }
    }
    daemon.inbound.nothing_waits();
    daemon.tunnel.nothing_waits();
    daemon.outbound.nothing_waits();

    // A second one declares the port, at another address: nobody knows whose it is at loopback.
    kernel.inbound_ports(*neighbours_number, &[8080, 9200]).expect("the owner writes");
    for (cgroup, whose) in [(unit, *number), (neighbour, *neighbours_number)] {
        let _client = cgroup.dial(&world.pod, "127.0.0.1", 8080, None);
        let (_, peer, local) = daemon.inbound.accept_one();
        assert_eq!(origins.take(peer, local).expect("a map"), Some(whose));
    }
    kernel.inbound_ports(*neighbours_number, &[9200]).expect("the owner writes");
    let _client = unit.dial(&world.pod, "127.0.0.1", 8080, None);
    applications[0].accept_one();
    kernel.inbound_ports(*number, &[]).expect("the owner writes");
    let _client = stranger.dial(&world.pod, "127.0.0.1", 8080, None);
    applications[0].accept_one();
    assert_eq!(count(&kernel, "origin_failed"), 0);
}

// T-6, T-27
#[test]
fn a_delivery_to_loopback_arrives_and_never_comes_back() {
    let (world, mut kernel) = World::with_kernel();
    let host = Host::enrol(&world, &mut kernel);
    let origins = kernel.origins();
    for ((target, client), application) in LOOPBACK.into_iter().zip(&host.applications) {
        let delivered = deliver(&world, &kernel, host.number, client, target, true);
        let (_, peer, local) = application.accept_one();
        assert_eq!((peer.ip(), local.ip()), (address(client), address(target)));
        host.daemon.inbound.nothing_waits();
        drop(delivered);
        // What is not announced is a client like any other, and of nobody.
        let _unannounced = deliver(&world, &kernel, host.number, client, target, false);
        let (_, peer, local) = host.daemon.inbound.accept_one();
        assert_eq!(origins.take(peer, local).expect("a map"), None);
        application.nothing_waits();
    }
}

// T-27
#[test]
fn a_service_that_listens_at_loopback_only_is_not_reached_from_outside() {
    let (world, mut kernel) = World::with_kernel();
    let host = Host::enrol(&world, &mut kernel);
    for (client, target) in [(PEER4, POD4), (PEER6, POD6)] {
        let _client = world.peer.connect(target, 8080);
        let (_, _, local) = host.daemon.inbound.accept_one();
        assert_eq!(local, to(address(target), 8080), "the daemon is asked for the address that was dialled");
        // Where it delivers to, nothing listens.
        let delivery = world.pod.socket(target);
        kernel.exempt().mark(delivery.as_fd()).expect("a socket can be recorded");
        delivery.bind(&SockAddr::from(to(address(target), 0))).expect("an own address");
        let source = delivery.local_addr().expect("bound").as_socket().expect("an address");
        let to_target = to(address(target), 8080);
        let _announced = kernel.deliveries().announce(host.number, source, to_target).expect("there is room");
        let refused = delivery.connect_timeout(&to_target.into(), PATIENCE).expect_err(client);
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
    // A host may let packets for loopback in from outside, as kube-proxy asks for. They are the daemon's to refuse.
    for place in [&world.pod, &world.peer] {
        place.run(|| {
            fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1")
                .expect("a sysctl of this namespace");
            for device in ["all", "eth0"] {
                let file = format!("/proc/sys/net/ipv4/conf/{device}/rp_filter");
                fs::write(file, "0").expect("a sysctl of this namespace");
            }
        });
    }
    ip(&format!("-n {} address delete 127.0.0.1/8 dev lo", world.peer.name));
    ip(&format!("-n {} route add 127.0.0.1/32 via {POD4}", world.peer.name));
    let _client = world.peer.connect("127.0.0.1", 8080);
    let (_, peer, local) = host.daemon.inbound.accept_one();
    assert_eq!((peer.ip(), local.ip()), (address(PEER4), address("127.0.0.1")));
    for application in &host.applications {
        application.nothing_waits();
    }
}

// T-23, T-27
#[test]
fn without_a_daemon_loopback_is_closed_to_others_and_open_to_the_service_itself() {
    let (world, mut kernel) = World::with_kernel();
    let Host { unit, neighbour: _neighbour, daemon, applications, .. } = Host::enrol(&world, &mut kernel);
    {
        let _no_fork_now = FORK.lock().unwrap_or_else(PoisonError::into_inner);
        drop(daemon);
    }
    for ((dialled, _), application) in LOOPBACK.into_iter().zip(&applications) {
        let client = world.pod.socket(dialled);
        let refused = client.connect_timeout(&SockAddr::from(to(address(dialled), 8080)), PATIENCE);
        assert_eq!(refused.expect_err("closed").kind(), io::ErrorKind::ConnectionRefused);
        let _client = unit.dial(&world.pod, dialled, 8080, None);
        application.accept_one();
    }
    assert_eq!(count(&kernel, "no_inbound_listener"), 3);
}

#[test]
fn a_host_workload_survives_a_successor() {
    let (world, mut kernel) = World::with_kernel();
    let unit = Cgroup::make("unit");
    let daemon = Listeners::open(&world.pod);
    let target = || EnrolTarget {
        kind: WorkloadKind::Host { cgroup: unit.path.clone(), ports: vec![8080] },
        ..world.target()
    };
    let number = kernel.steer(&target(), daemon.fds()).expect("steered");
    world.pod.with_capture_routes();
    kernel.capture(number).expect("captured");
    let pins = world.pins();
    drop((kernel, daemon));
    let mut kernel = Kernel::start(&world.config()).expect("a successor starts");
    assert_eq!(kernel.remembered().iter().map(|known| known.number).collect::<Vec<_>>(), [number]);
    let daemon = Listeners::open(&world.pod);
    assert_eq!(kernel.steer(&target(), daemon.fds()).expect("steered"), number);
    kernel.capture(number).expect("captured");
    assert_eq!(world.pins(), pins, "swapped, not stacked");
    let _client = unit.dial(&world.pod, PEER4, 443, None);
    let (_, peer, local) = daemon.outbound.accept_one();
    assert_eq!(kernel.origins().take(peer, local).expect("a map"), Some(number));
    assert_eq!(count(&kernel, "captured"), 1);
}

// T-7
#[test]
fn a_namespace_that_nobody_enrolled_is_untouched() {
    let (world, mut kernel) = World::with_kernel();
    let (daemon, _) = world.enrol(&mut kernel);
    let server = world.pod.listen("::", 9100);
    for target in [POD4, POD6] {
        let client = world.peer.connect(target, 9100);
        server.accept_one();
        assert_eq!(client.0.mark().expect("a socket option"), 0);
    }
    daemon.outbound.nothing_waits();
    assert_eq!(count(&kernel, "captured"), 0);
}

#[test]
fn changed_addresses_and_exempt_ports_hold_at_once() {
    let (world, mut kernel) = World::with_kernel();
    let (daemon, number) = world.enrol(&mut kernel);
    let application = world.pod.listen("::", 9300);
    ip(&format!("-n {} address add 10.77.0.9/24 dev eth0", world.pod.name));
    kernel.addresses(number, &[POD4, POD6, "10.77.0.9"].map(address)).expect("the owner writes");
    let _client = world.pod.connect("10.77.0.9", 9300);
    application.accept_one();
    let _client = world.peer.connect("10.77.0.9", 9300);
    daemon.inbound.accept_one();
    kernel.exempt_ports(number, &[9300]).expect("the owner writes");
    let _client = world.peer.connect("10.77.0.9", 9300);
    application.accept_one();
    let _client = world.peer.connect("10.77.0.9", 9100);
    daemon.inbound.accept_one();
    assert!(matches!(kernel.inbound_ports(number, &[9300]), Err(KernelError::Order { .. })));
}

#[test]
fn the_same_workload_in_a_new_namespace_is_a_new_enrolment() {
    let (world, mut kernel) = World::with_kernel();
    let (_daemon, number) = world.enrol(&mut kernel);
    let listeners = Listeners::open(&world.peer);
    let moved = EnrolTarget {
        netns: world.peer.namespace.as_fd(),
        cookie: world.peer.namespace.cookie(),
        ..world.target()
    };
    let next = kernel.steer(&moved, listeners.fds()).expect("steered");
    assert_ne!(next, number, "T-13");
    assert!(matches!(kernel.capture(number), Err(KernelError::Unknown(_))));
    assert_eq!(world.pins().iter().filter(|pin| pin.ends_with("steer")).count(), 1);
}

#[test]
fn what_does_not_fit_is_refused_with_the_limit() {
    let (world, mut kernel) = World::with_kernel();
    let (_daemon, number) = world.enrol(&mut kernel);
    let addresses = |many: u32| (0..many).map(|n| IpAddr::V4(Ipv4Addr::from_bits(n))).collect::<Vec<_>>();
    kernel.addresses(number, &addresses(limits::STEER_ADDRESSES_MAX)).expect("the last one fits");
    kernel.addresses(number, &[]).expect("fewer fit");
    let refused = kernel.addresses(number, &addresses(limits::STEER_ADDRESSES_MAX + 1));
    assert!(
        matches!(refused, Err(KernelError::Limit { limit: limits::STEER_ADDRESSES_MAX, .. })),
        "{refused:?}"
    );

    let ports = |many: u32| (1..=many).map(|port| u16::try_from(port).expect("a port")).collect::<Vec<_>>();
    kernel.exempt_ports(number, &ports(limits::STEER_PORTS_MAX)).expect("the last one fits");
    kernel.exempt_ports(number, &[]).expect("fewer fit");
    let refused = kernel.exempt_ports(number, &ports(limits::STEER_PORTS_MAX + 1));
    assert!(matches!(refused, Err(KernelError::Limit { limit: limits::STEER_PORTS_MAX, .. })), "{refused:?}");

    let deliveries = kernel.deliveries();
    let source = |n: u32| to(IpAddr::V4(Ipv4Addr::from_bits(n)), 1);
    let announce = |n: u32| deliveries.announce(number, source(n), to(address(POD4), 8080));
    let mut announced: Vec<_> =
        (0..limits::DELIVERIES_MAX).map(|n| announce(n).expect("the last one fits")).collect();
    let refused = announce(limits::DELIVERIES_MAX);
    assert!(matches!(refused, Err(KernelError::Limit { limit: limits::DELIVERIES_MAX, .. })), "{refused:?}");
    announced.pop();
    announced.push(announce(limits::DELIVERIES_MAX).expect("there is room again"));
}

/// The other end of the veth as a workload of its own.
fn neighbour(world: &World) -> EnrolTarget<'_> {
    EnrolTarget {
        key: "photo_neighbour".to_owned(),
        netns: world.peer.namespace.as_fd(),
        cookie: world.peer.namespace.cookie(),
        addresses: vec![address(PEER4)],
        ..world.target()
    }
}

#[test]
fn a_workload_that_does_not_fit_is_refused_and_the_others_stay_captured() {
    let (world, mut kernel) = World::with_sizes(MapSizes { workloads: 1, ..MapSizes::default() });
    let (daemon, number) = world.enrol(&mut kernel);
    let listeners = Listeners::open(&world.peer);
    let next = kernel.steer(&neighbour(&world), listeners.fds()).expect("steered");
    let refused = kernel.capture(next);
    assert!(matches!(refused, Err(KernelError::Limit { map: "WORKLOADS", limit: 1, .. })), "{refused:?}");
    let _client = world.pod.connect(PEER4, 8080);
    daemon.outbound.accept_one();
    kernel.uncapture(number).expect("the owner writes");
    kernel.capture(next).expect("there is room again");
}

#[test]
fn own_addresses_that_do_not_fit_are_refused_and_change_nothing() {
    let (world, mut kernel) = World::with_sizes(MapSizes { own_addresses: 2, ..MapSizes::default() });
    let application = world.pod.listen("::", 8080);
    let (daemon, number) = world.enrol(&mut kernel);
    let full = |refused: Result<(), KernelError>| {
        let as_expected = matches!(refused, Err(KernelError::Limit { map: "OWN_ADDRESSES", limit: 2, .. }));
        assert!(as_expected, "{refused:?}");
    };
    let listeners = Listeners::open(&world.peer);
    full(kernel.steer(&neighbour(&world), listeners.fds()).map(drop));
    full(kernel.addresses(number, &["10.77.0.8", "10.77.0.9", POD4].map(address)));
    // Its own are its own as before.
    for own in [POD4, POD6] {
        let _client = world.pod.connect(own, 8080);
        application.accept_one();
        let _client = world.peer.connect(own, 8080);
        daemon.inbound.accept_one();
    }
    kernel.addresses(number, &[address(POD4)]).expect("the owner writes");
    kernel.steer(&neighbour(&world), listeners.fds()).expect("there is room again");
}

#[test]
fn ports_and_addresses_of_a_host_that_do_not_fit_hinder_no_other_workload() {
    let (world, mut kernel) = World::with_kernel();
    let host = Host::enrol(&world, &mut kernel);
    let ports = |many: u32| (1..=many).map(|port| u16::try_from(port).expect("a port")).collect::<Vec<_>>();
    let addresses = |many: u32| (1..=many).map(|n| IpAddr::V4(Ipv4Addr::from_bits(n))).collect::<Vec<_>>();
    let greedy = Cgroup::make("greedy");
    let target = |ports, addresses| EnrolTarget {
        key: "photo_greedy".to_owned(),
        kind: WorkloadKind::Host { cgroup: greedy.path.clone(), ports },
        addresses,
        ..world.target()
    };
    // Two others have a port each, and two addresses in common.
    for refused in [
        kernel.steer(&target(ports(limits::STEER_PORTS_MAX - 1), vec![]), host.daemon.fds()).map(drop),
        kernel
            .steer(&target(vec![1], addresses(limits::STEER_ADDRESSES_MAX - 1)), host.daemon.fds())
            .map(drop),
        kernel.inbound_ports(host.number, &ports(limits::STEER_PORTS_MAX)),
        kernel.addresses(host.number, &addresses(limits::STEER_ADDRESSES_MAX - 1)),
    ] {
        assert!(matches!(refused, Err(KernelError::Limit { .. })), "{refused:?}");
    }
    kernel.inbound_ports(host.number, &[8080]).expect("the others are changed as before");
    let most = (ports(limits::STEER_PORTS_MAX - 2), addresses(limits::STEER_ADDRESSES_MAX - 2));
    let number = kernel.steer(&target(most.0, most.1), host.daemon.fds()).expect("the last one fits");
    kernel.release(number).expect("the owner writes");
}

#[test]
fn a_captured_connect_whose_origin_does_not_fit_times_out_and_never_leaves() {
    let (world, mut kernel) = World::with_sizes(MapSizes { origins: 1, ..MapSizes::default() });
    let wire = world.peer.listen("::", 443);
    let host = Host::enrol(&world, &mut kernel);
    let (unit, outbound) = (&host.unit, &host.daemon.outbound);
    let _first = unit.dial(&world.pod, PEER4, 443, None);
    let (_, client, target) = outbound.accept_one();
    // The daemon has not asked yet who opened it, so there is no room for another.
    let second = unit.begin_to_dial(&world.pod, PEER6, 443, None);
    wait_until("the origin did not fit", || count(&kernel, "origin_failed") > 0);
    wait_until("its SYN was held back", || count(&kernel, "captured_egress") > 0);
    outbound.nothing_waits();
    wire.nothing_waits();
    drop(second);
    assert_eq!(kernel.origins().take(client, target).expect("a map"), Some(host.number));
    let _third = unit.dial(&world.pod, PEER6, 443, None);
    outbound.accept_one();
}

#[test]
fn names_and_marks_that_cannot_be_used_are_refused() {
    let (world, mut kernel) = World::with_kernel();
    let daemon = Listeners::open(&world.pod);
    for key in [String::new(), "k".repeat(limits::KEY_LEN_MAX + 1)] {
        let refused = kernel.steer(&EnrolTarget { key, ..world.target() }, daemon.fds());
        assert!(matches!(refused, Err(KernelError::Name { field: "workload key", .. })), "{refused:?}");
    }
    let longest = EnrolTarget { key: "k".repeat(limits::KEY_LEN_MAX), ..world.target() };
    kernel.steer(&longest, daemon.fds()).expect("the longest key fits");
    let refused = Kernel::start(&KernelConfig { mark: 0, ..world.config() });
    assert!(matches!(refused, Err(KernelError::Name { field: "mark", .. })), "{refused:?}");
    let refused = Kernel::start(&KernelConfig { node: String::new(), ..world.config() });
    assert!(matches!(refused, Err(KernelError::Name { field: "node", .. })), "{refused:?}");
    let refused = Kernel::start(&KernelConfig { cgroup: PathBuf::from("/proc"), ..world.config() });
    assert!(matches!(refused, Err(KernelError::File { .. })), "{refused:?}");
}

// T-24
#[test]
fn what_another_schema_version_pinned_is_retired_and_nothing_else() {
    let (world, mut kernel) = World::with_kernel();
    let _daemon = world.enrol(&mut kernel);
    let pins = world.pins();
    let counters = pins.iter().find(|pin| pin.ends_with("COUNTERS")).expect("a shared map");
    let schema = counters.ancestors().nth(2).expect("the schema's folder");
    let other = schema.with_file_name("v0");
    fs::create_dir(&other).expect("root may make a folder");
    fs::hard_link(counters, other.join("COUNTERS")).expect("the same file system");
    assert_eq!(kernel.retire_older_schemas().expect("the owner writes").maps, 1);
    assert_eq!(world.pins(), pins);
}

/// Not a test of its own: the process that [`Cgroup::dial`] starts in another cgroup. Without its variables it has nothing to do.
#[test]
fn dialler() {
    let Ok(target) = std::env::var("KERNEL_TEST_DIAL") else { return };
    let target: SocketAddr = target.parse().expect("an address");
    let socket =
        Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP)).expect("a socket");
    if let Ok(device) = std::env::var("KERNEL_TEST_DEVICE") {
        socket.bind_device(Some(device.as_bytes())).expect("the device is there");
    }
    socket.connect_timeout(&target.into(), PATIENCE).expect("the connect is answered");
    println!("connected");
    // Until the parent is done with it.
    let _: io::Result<usize> = io::stdin().read(&mut [0]);
}

fn deliver(
    world: &World,
    kernel: &Kernel,
    number: WorkloadNumber,
    client: &str,
    target: &str,
    announce: bool,
) -> (Socket, Option<node_daemon::kernel::Announced>) {
    let socket = world.pod.socket(target);
    kernel.exempt().mark(socket.as_fd()).expect("a socket can be recorded");
    if [PEER4, PEER6].contains(&client) {
        if address(target).is_ipv4() {
            socket.set_ip_transparent_v4(true).expect("root");
        } else {
            node_daemon::sys::socket::set_transparent_v6(socket.as_fd()).expect("root");
        }
        socket.set_mark(MARK).expect("root");
        socket.bind_device(Some(b"lo")).expect("root");
    }
    socket.bind(&SockAddr::from(to(address(client), 0))).expect("transparent");
    let source = socket.local_addr().expect("bound").as_socket().expect("an address");
    let target = to(address(target), 8080);
    let announced =
        announce.then(|| kernel.deliveries().announce(number, source, target).expect("there is room"));
    socket.connect_timeout(&target.into(), PATIENCE).expect("delivered");
    (socket, announced)
}

fn connect_when_answered(world: &World, target: &str) -> io::Result<Socket> {
    let socket = world.pod.socket(target);
    socket.connect_timeout(&SockAddr::from(to(address(target), 8080)), PATIENCE)?;
    Ok(socket)
}

const KEY: &str = "photo_photo-backend-0.v1";
static WORLDS: AtomicU32 = AtomicU32::new(0);

struct World {
    name: String,
    sizes: MapSizes,
    /// Of all pods; this process's own where there is none.
    cgroup: Option<PathBuf>,
    pod: Place,
    peer: Place,
}

impl World {
    fn with_kernel() -> (Self, Kernel) {
        Self::with_sizes(MapSizes::default())
    }

    fn with_sizes(sizes: MapSizes) -> (Self, Kernel) {
        let world = Self::without_kernel(sizes);
        let kernel = Kernel::start(&world.config()).expect("the programs load and attach");
        (world, kernel)
    }

    fn without_kernel(sizes: MapSizes) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "the tests in node-daemon/tests/kernel.rs need root");
        let name = format!("kt{}-{}", process::id(), WORLDS.fetch_add(1, Ordering::Relaxed));
        let world = Self {
            pod: Place::make(&format!("{name}p")),
            peer: Place::make(&format!("{name}q")),
            sizes,
            cgroup: None,
            name,
        };
        let (pod, peer) = (&world.pod.name, &world.peer.name);
        ip(&format!("link add eth0 netns {pod} type veth peer name eth0 netns {peer}"));
        for (place, addresses) in [(pod, [POD4, POD6]), (peer, [PEER4, PEER6])] {
            ip(&format!("-n {place} address add {}/24 dev eth0", addresses[0]));
            ip(&format!("-n {place} address add {}/64 dev eth0 nodad", addresses[1]));
            ip(&format!("-n {place} link set eth0 up"));
        }
        world
    }

    /// A file system of its own, which goes with this world.
    fn bpffs(&self) -> PathBuf {
        std::env::temp_dir().join(&self.name)
    }

    fn config(&self) -> KernelConfig {
        let mount = cgroup::mount_point().expect("a cgroup2 tree");
        KernelConfig {
            node: format!("{}.test", self.name),
            bpffs: self.bpffs(),
            cgroup: self
                .cgroup
                .clone()
                .unwrap_or_else(|| cgroup::own_folder(&mount).expect("this process has a cgroup")),
            mark: MARK,
            sizes: self.sizes,
        }
    }

    fn target(&self) -> EnrolTarget<'_> {
        EnrolTarget {
            key: KEY.to_owned(),
            netns: self.pod.namespace.as_fd(),
            cookie: self.pod.namespace.cookie(),
            addresses: [POD4, POD6].map(address).to_vec(),
            exempt_ports: vec![9100],
            kind: WorkloadKind::Pod,
        }
    }

    fn enrol(&self, kernel: &mut Kernel) -> (Listeners, WorkloadNumber) {
        let listeners = Listeners::open(&self.pod);
        let number = kernel.steer(&self.target(), listeners.fds()).expect("steered");
        self.pod.with_capture_routes();
        kernel.capture(number).expect("captured");
        (listeners, number)
    }

    /// Each end knows the hardware address of the other for good, so that only what is held back is lost.
    fn know_each_other(&self) {
        let (pod, peer) = (&self.pod.name, &self.peer.name);
        for (place, other, addresses) in [(pod, peer, [PEER4, PEER6]), (peer, pod, [POD4, POD6])] {
            for address in addresses {
                let hardware = direct::hardware(other, "eth0");
                ip(&format!("-n {place} neighbour replace {address} lladdr {hardware} dev eth0"));
            }
        }
    }

    /// Everything that is pinned for this node.
    fn pins(&self) -> Vec<PathBuf> {
        fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() { walk(&path, found) } else { found.push(path) }
            }
        }
        let mut found = Vec::new();
        // Beside it the kernel itself keeps files that show maps and programs.
        walk(&self.bpffs().join("culvert"), &mut found);
        found.sort();
        found
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Err(error) = cleanup(&self.config()) {
            eprintln!("{}: {error}", self.name);
        }
        // The kernel mounted it at the start; a test that failed before has none.
        let _: nix::Result<()> = nix::mount::umount2(&self.bpffs(), nix::mount::MntFlags::MNT_DETACH);
        let _: io::Result<()> = fs::remove_dir(self.bpffs());
    }
}

struct Place {
    name: String,
    namespace: Namespace,
}

impl Place {
    fn make(name: &str) -> Self {
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        let namespace = Namespace::open(Path::new(&format!("/run/netns/{name}"))).expect("just made");
        Self { name: name.to_owned(), namespace }
    }

    fn run<T>(&self, what: impl FnOnce() -> T) -> T {
        self.namespace.visit(what).expect("root may enter")
    }

    /// What enrolment adds between [`Kernel::steer`] and [`Kernel::capture`].
    fn with_capture_routes(&self) {
        self.with_capture_routes_of([POD4, POD6]);
    }

    fn with_capture_routes_of(&self, own: [&str; 2]) {
        for (family, source) in [("-4", own[0]), ("-6", own[1])] {
            let place = &self.name;
            ip(&format!("{family} -n {place} rule add pref 100 fwmark {MARK}/{MARK} lookup {TABLE}"));
            ip(&format!("{family} -n {place} route add local default dev lo src {source} table {TABLE}"));
            ip(&format!(
                "{family} -n {place} route add local default dev eth0 src {source} metric 2000 table {TABLE}"
            ));
        }
        self.run(|| {
            for file in ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"] {
                fs::write(format!("/proc/sys/net/{file}"), "1").expect("a sysctl of this namespace");
            }
        });
    }

    fn without_capture_routes(&self) {
        for family in ["-4", "-6"] {
            ip(&format!("{family} -n {} rule delete pref 100", self.name));
            ip(&format!("{family} -n {} route flush table {TABLE}", self.name));
        }
    }

    fn socket(&self, target: &str) -> Socket {
        let domain = Domain::for_address(to(address(target), 0));
        self.run(|| Socket::new(domain, Type::STREAM, Some(Protocol::TCP))).expect("a socket")
    }

    fn connect(&self, target: &str, port: u16) -> Client {
        let socket = self.socket(target);
        let target = to(address(target), port);
        socket.connect_timeout(&target.into(), PATIENCE).unwrap_or_else(|error| panic!("{target}: {error}"));
        Client(socket)
    }

    fn listen(&self, at: &str, port: u16) -> Listener {
        let socket = self.socket(at);
        socket.set_reuse_address(true).expect("a socket option");
        socket.bind(&SockAddr::from(to(address(at), port))).expect("a free port");
        socket.listen(64).expect("a bound socket listens");
        Listener(socket.into())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _: io::Result<process::ExitStatus> =
            spawn(Command::new("ip").args(["netns", "delete", &self.name])).wait();
    }
}

struct Client(Socket);

impl Client {
    fn local(&self) -> SocketAddr {
        let local = self.0.local_addr().expect("connected").as_socket().expect("an address");
        to(local.ip().to_canonical(), local.port())
    }
}

struct Listener(TcpListener);

impl Listener {
    /// The connection that waits, who opened it, and the address that it was opened to.
    fn accept_one(&self) -> (TcpStream, SocketAddr, SocketAddr) {
        let socket = Socket::from(self.0.try_clone().expect("a descriptor"));
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        let (stream, peer) = self.0.accept().expect("a connection waits");
        let local = stream.local_addr().expect("connected");
        (stream, to(peer.ip().to_canonical(), peer.port()), to(local.ip().to_canonical(), local.port()))
    }

    #[track_caller]
    fn nothing_waits(&self) {
        assert!(!self.something_waits());
    }

    /// Takes the connection that waits, if one does.
    #[track_caller]
    fn something_waits(&self) -> bool {
        self.0.set_nonblocking(true).expect("a socket option");
        let accepted = self.0.accept();
        self.0.set_nonblocking(false).expect("a socket option");
        match accepted {
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => panic!("accept: {error}"),
        }
    }
}

struct Listeners {
    outbound: Listener,
    inbound: Listener,
    tunnel: Listener,
}

impl Listeners {
    fn open(place: &Place) -> Self {
        let open = || {
            let socket = place.socket("::");
            socket.set_only_v6(false).expect("a socket option");
            node_daemon::sys::socket::set_transparent_v6(socket.as_fd()).expect("root");
            socket.bind(&SockAddr::from(to(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0))).expect("any port");
            socket.listen(64).expect("a bound socket listens");
            Listener(socket.into())
        };
        Self { outbound: open(), inbound: open(), tunnel: open() }
    }

    fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.outbound.0.as_fd(), self.inbound.0.as_fd(), self.tunnel.0.as_fd()]
    }
}

/// A cgroup of its own, and processes in it.
struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    fn make(name: &str) -> Self {
        let mount = cgroup::mount_point().expect("a cgroup2 tree");
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let path = mount.join(format!("kt{}-{number}-{name}", process::id()));
        fs::create_dir(&path).expect("root may make a cgroup");
        Self { path }
    }

    /// A process in this cgroup and in a namespace that has connected and stays connected.
    fn dial(&self, place: &Place, target: &str, port: u16, device: Option<&str>) -> Dialled {
        let mut dialled = self.begin_to_dial(place, target, port, device);
        let mut told = Vec::new();
        while !told.windows(9).any(|window| window == b"connected") {
            let mut byte = [0];
            let read = dialled.stdout.read(&mut byte).expect("a pipe");
            assert_ne!(read, 0, "{target}:{port}: {}", String::from_utf8_lossy(&told));
            told.extend(byte);
        }
        dialled
    }

    /// A process that tries to.
    fn begin_to_dial(&self, place: &Place, target: &str, port: u16, device: Option<&str>) -> Dialled {
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg("echo $$ > \"$1/cgroup.procs\" && exec nsenter --net=\"$2\" \"$3\" --exact dialler --nocapture")
            .arg("sh")
            .arg(&self.path)
            .arg(format!("/run/netns/{}", place.name))
            .arg(std::env::current_exe().expect("this program"))
            .env("KERNEL_TEST_DIAL", to(address(target), port).to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(device) = device {
            command.env("KERNEL_TEST_DEVICE", device);
        }
        let mut child = spawn(&mut command);
        let stdout = child.stdout.take().expect("piped");
        Dialled { child, stdout }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            eprintln!("{}: {error}", self.path.display());
        }
    }
}

struct Dialled {
    child: Child,
    stdout: process::ChildStdout,
}

impl Drop for Dialled {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // One that still dials would do so for a while.
        let _: io::Result<()> = self.child.kill();
        let _: io::Result<process::ExitStatus> = self.child.wait();
    }
}

fn ip(arguments: &str) {
    let mut command = Command::new("ip");
    command.args(arguments.split(' ')).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = spawn(&mut command).wait_with_output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Between fork and exec a child holds all descriptors of this process, so a listener that another test closes at that moment
/// lives on. Who depends on the moment of a close holds this lock.
static FORK: Mutex<()> = Mutex::new(());

fn spawn(command: &mut Command) -> Child {
    let _no_close_now = FORK.lock().unwrap_or_else(PoisonError::into_inner);
    command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("a test's address")
}

fn canonical(text: &str) -> IpAddr {
    address(text).to_canonical()
}

fn to(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

fn count(kernel: &Kernel, label: &str) -> u64 {
    let counters = kernel.counters().expect("a map");
    counters.iter().find(|(name, _)| *name == label).expect("a label").1
}

/// Kernel counters have no event to wait for; they are looked at until they say so.
#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !is_so() {
        assert!(std::time::Instant::now() < deadline, "waited for: {what}");
        thread::yield_now();
    }
}

/// Bytes that a socket was given and the other side has not acknowledged (`SIOCOUTQ`).
fn unacknowledged(socket: BorrowedFd<'_>) -> i32 {
    nix::ioctl_read_bad!(unacknowledged_bytes, nix::libc::TIOCOUTQ, i32);
    let mut bytes = 0;
    // SAFETY: the descriptor is borrowed, and the kernel writes one integer.
    unsafe { unacknowledged_bytes(std::os::fd::AsRawFd::as_raw_fd(&socket), &raw mut bytes) }
        .expect("a TCP socket");
    bytes
}

/// `connect(AF_UNSPEC)`: the socket may be used again.
fn disconnect(socket: &Socket) {
    let nobody = SockAddrStorage::zeroed();
    // SAFETY: a zeroed storage is an address of family AF_UNSPEC (0), and 16 bytes of it are initialised.
    let nobody = unsafe { SockAddr::new(nobody, 16) };
    socket.connect(&nobody).expect("a connected socket can be disconnected");
}
