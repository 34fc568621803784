//! The node-local fast path between two pods: what the pair table permits goes by the kernel alone, and nothing else does.

use std::{
    collections::HashSet,
    fs,
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    os::fd::AsFd as _,
    process::{Command, Stdio},
    sync::{
        PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use ebpf_abi::{
    DirectEvent, DirectEventKind, DirectValue, PairKey, PairVerdict, Tuple, WorkloadNumber, limits,
};
use nix::sys::socket::{setsockopt, sockopt::TcpFastOpenConnect};
use node_daemon::{
    kernel::{DirectEvents, DirectTable, EnrolTarget, Kernel, KernelError, MapSizes, WorkloadKind},
    sys::socket::set_transparent_v6,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::{
    Cgroup, Client, FORK, Listener, Listeners, MARK, PATIENCE, PEER_MAPPED, PEER4, PEER6, POD4, POD6, Place,
    World, address, canonical, connect_when_answered, count, disconnect, ip, spawn, to, unacknowledged,
    wait_until,
};

const PORT: u16 = 8080;
const CLASS: u32 = 5;

/// Two pods of one node, a source and a destination, each with its listeners of the daemon, and an application at the
/// destination. Fields end in this order.
struct Pair {
    application: Listener,
    kernel: Kernel,
    source: WorkloadNumber,
    destination: WorkloadNumber,
    at_source: Listeners,
    at_destination: Listeners,
    world: World,
}

impl Pair {
    fn enrol() -> Self {
        Self::with_sizes(MapSizes::default())
    }

    fn with_sizes(sizes: MapSizes) -> Self {
        Self::of(World::without_kernel(sizes))
    }

    fn of(world: World) -> Self {
        let mut kernel = Kernel::start(&world.config()).expect("the programs load and attach");
        let (at_source, source) = world.enrol(&mut kernel);
        let (at_destination, destination) = enrol_peer(&world, &mut kernel, "photo_destination");
        world.peer.with_capture_routes_of([PEER4, PEER6]);
        // What arrives can be held back: see `hold_back`.
        for family in ["-4", "-6"] {
            ip(&format!("{family} -n {} rule add pref 10 lookup local", world.peer.name));
            ip(&format!("{family} -n {} rule delete pref 0", world.peer.name));
        }
        world.know_each_other();
        for place in [&world.pod, &world.peer] {
            // 0x607: data in the first segment, of every listener, without a cookie: the most that a client can send.
            place.run(|| fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1543").expect("a sysctl"));
        }
        let application = world.peer.listen("::", PORT);
        Self { application, kernel, source, destination, at_source, at_destination, world }
    }

    fn table(&self, pairs: &[(u16, PairVerdict)]) -> DirectTable {
        table(self.source, self.destination, pairs)
    }

    fn permit(&mut self, port: u16) {
        let table = self.table(&[(port, PairVerdict::Permit)]);
        self.kernel.set_pairs(&table).expect("the table fits");
    }

    #[track_caller]
    fn check_direct(&self, target: &str) -> (Client, TcpStream) {
        let client = self.world.pod.connect(target, PORT);
        let (served, peer, local) = self.application.accept_one();
        assert_eq!((peer, local), (client.local(), to(canonical(target), PORT)), "{target}");
        self.nothing_waits();
        (client, served)
    }

    #[track_caller]
    fn check_captured(&self, target: &str, port: u16) {
        let _client = self.world.pod.connect(target, port);
        let (_, _, local) = self.at_source.outbound.accept_one();
        assert_eq!(local, to(canonical(target), port));
        self.application.nothing_waits();
        self.at_destination.inbound.nothing_waits();
    }

    #[track_caller]
    fn check_refused(&self, target: &str, port: u16) {
        let target = to(address(target), port);
        let socket = self.world.pod.socket(&target.ip().to_string());
        let refused = socket.connect(&target.into()).expect_err("the table denies it");
        assert_eq!(refused.raw_os_error(), Some(nix::libc::ECONNREFUSED), "{target}");
    }

    #[track_caller]
    fn nothing_waits(&self) {
        for listener in [
            &self.application,
            &self.at_source.outbound,
            &self.at_source.inbound,
            &self.at_destination.outbound,
            &self.at_destination.inbound,
            &self.at_destination.tunnel,
        ] {
            listener.nothing_waits();
        }
    }

    fn connections(&self) -> Vec<(Tuple, DirectValue)> {
        self.kernel.direct().connections().expect("a map")
    }

    /// What arrives at the destination is lost, as on a full queue.
    fn hold_back(&self) {
        for family in ["-4", "-6"] {
            ip(&format!("{family} -n {} rule add pref 1 iif eth0 blackhole", self.world.peer.name));
        }
    }

    fn let_in(&self) {
        for family in ["-4", "-6"] {
            ip(&format!("{family} -n {} rule delete pref 1", self.world.peer.name));
        }
    }

    /// A connect whose SYN is lost, once it was sent.
    fn begin(&self, target: &str) -> Socket {
        let before = count(&self.kernel, "direct");
        let socket = self.world.pod.socket(target);
        socket.set_nonblocking(true).expect("a socket option");
        let begun = socket.connect(&to(address(target), PORT).into());
        assert_eq!(begun.expect_err("not answered yet").raw_os_error(), Some(nix::libc::EINPROGRESS));
        assert_eq!(count(&self.kernel, "direct"), before + 1, "published before the connect returns");
        socket
    }
}

fn table(source: WorkloadNumber, destination: WorkloadNumber, pairs: &[(u16, PairVerdict)]) -> DirectTable {
    let pair = |(port, verdict): &(u16, PairVerdict)| (PairKey::pair(CLASS, destination, *port), *verdict);
    DirectTable { classes: vec![(source, CLASS)], pairs: pairs.iter().map(pair).collect() }
}

/// Puts the peer under capture as a workload of some name.
fn enrol_peer(world: &World, kernel: &mut Kernel, key: &str) -> (Listeners, WorkloadNumber) {
    let listeners = Listeners::open(&world.peer);
    let number = kernel.steer(&peer_target(world, key), listeners.fds()).expect("steered");
    kernel.capture(number).expect("captured");
    (listeners, number)
}

fn peer_target<'a>(world: &'a World, key: &str) -> EnrolTarget<'a> {
    EnrolTarget {
        key: key.to_owned(),
        netns: world.peer.namespace.as_fd(),
        cookie: world.peer.namespace.cookie(),
        addresses: [PEER4, PEER6].map(address).to_vec(),
        exempt_ports: vec![9100],
        kind: WorkloadKind::Pod,
    }
}

/// What happened, in order, once `wanted` of them are there.
fn events(reader: &mut DirectEvents, wanted: usize) -> Vec<DirectEvent> {
    let mut found = Vec::new();
    wait_until("the events are there", || {
        found.extend(reader.take().expect("this daemon is the owner"));
        found.len() >= wanted
    });
    found
}

#[test]
fn a_permitted_pair_meets_without_the_daemon_and_with_true_addresses() {
    let mut pair = Pair::enrol();
    pair.permit(PORT);
    for target in [PEER4, PEER6, PEER_MAPPED] {
        let (client, mut served) = pair.check_direct(target);
        (&client.0).write_all(b"ask").expect("connected");
        let mut heard = [0; 3];
        served.read_exact(&mut heard).expect("it arrives");
        assert_eq!(&heard, b"ask");
        assert_eq!(client.0.mark().expect("a socket option"), 0);
        let [(tuple, value)] = pair.connections()[..] else { panic!("one connection") };
        assert_eq!(tuple, Tuple::new(client.local(), to(canonical(target), PORT)));
        assert_eq!((value.source, value.destination), (pair.source, pair.destination));
        assert!(value.is_established() && value.accepted == 1);
        drop((client, served));
        wait_until("its end was noticed", || pair.connections().is_empty());
    }
    assert_eq!((count(&pair.kernel, "direct"), count(&pair.kernel, "passed_direct")), (3, 3));
    assert_eq!(count(&pair.kernel, "captured"), 0);
}

#[test]
fn a_connect_that_waits_for_nothing_and_one_that_blocks_are_both_direct() {
    let mut pair = Pair::enrol();
    pair.permit(PairKey::OTHER_PORTS);
    for target in [PEER4, PEER6] {
        let blocking = pair.world.pod.socket(target);
        blocking.connect(&to(address(target), PORT).into()).expect("answered");
        pair.application.accept_one();
        let hasty = pair.world.pod.socket(target);
        hasty.set_nonblocking(true).expect("a socket option");
        let begun = hasty.connect(&to(address(target), PORT).into());
        assert!(begun.is_ok() || begun.is_err_and(|e| e.raw_os_error() == Some(nix::libc::EINPROGRESS)));
        pair.application.accept_one();
    }
    pair.nothing_waits();
}

#[test]
fn a_denied_pair_is_refused_at_connect_and_told() {
    let mut pair = Pair::enrol();
    let mut reader = pair.kernel.direct().events().expect("a map");
    let generation =
        pair.kernel.set_pairs(&pair.table(&[(PORT, PairVerdict::Deny)])).expect("the table fits");
    for target in [PEER4, PEER6, PEER_MAPPED] {
        pair.check_refused(target, PORT);
        let [told] = events(&mut reader, 1)[..] else { panic!("one event") };
        assert_eq!(told.kind(), Some(DirectEventKind::Refused));
        assert_eq!(
            (told.source, told.destination, told.generation),
            (pair.source, pair.destination, generation)
        );
        let nowhere = SocketAddr::from(([0_u16; 8], 0));
        let expected =
            Tuple { source: told.tuple.source, ..Tuple::new(nowhere, to(canonical(target), PORT)) };
        assert_eq!(told.tuple, expected);
        assert_eq!(told.tuple.source.0, [0; 16]);
    }
    pair.nothing_waits();
    assert_eq!(count(&pair.kernel, "direct_denied"), 3);
    assert!(pair.connections().is_empty());
}

#[test]
fn what_the_table_does_not_decide_is_the_daemons() {
    let mut pair = Pair::enrol();
    let (source, destination) = (pair.source, pair.destination);
    let stranger = WorkloadNumber(999);
    let permitted = [(PORT, PairVerdict::Permit)];
    for (why, table) in [
        ("no table", None),
        ("an empty table", Some(DirectTable::default())),
        ("the table says so", Some(table(source, destination, &[(PORT, PairVerdict::Ask)]))),
        ("another source", Some(table(stranger, destination, &permitted))),
        ("another destination", Some(table(source, stranger, &permitted))),
        ("another port", Some(table(source, destination, &[(81, PairVerdict::Permit)]))),
        (
            "a port of its own",
            Some(table(
                source,
                destination,
                &[(PairKey::OTHER_PORTS, PairVerdict::Permit), (PORT, PairVerdict::Ask)],
            )),
        ),
        (
            "a class of nobody",
            Some(DirectTable { classes: vec![], ..table(source, destination, &permitted) }),
        ),
        (
            "another class",
            Some(DirectTable { classes: vec![(source, 6)], ..table(source, destination, &permitted) }),
        ),
    ] {
        if let Some(table) = table {
            pair.kernel.set_pairs(&table).expect("the table fits");
        }
        println!("{why}");
        for target in [PEER4, PEER6, PEER_MAPPED] {
            pair.check_captured(target, PORT);
        }
    }
    assert_eq!(count(&pair.kernel, "direct"), 0);
}

#[test]
fn a_port_of_its_own_wins_over_the_others_and_the_tunnels_port_is_never_direct() {
    let mut pair = Pair::enrol();
    let pairs = [
        (PORT, PairVerdict::Deny),
        (PairKey::OTHER_PORTS, PairVerdict::Permit),
        (15008, PairVerdict::Permit),
    ];
    pair.kernel.set_pairs(&pair.table(&pairs)).expect("the table fits");
    let other = pair.world.peer.listen("::", 81);
    for target in [PEER4, PEER6] {
        pair.check_refused(target, PORT);
        let _client = pair.world.pod.connect(target, 81);
        other.accept_one();
        pair.check_captured(target, 15008);
    }
}

#[test]
fn rights_have_a_direction() {
    let mut pair = Pair::enrol();
    pair.permit(PairKey::OTHER_PORTS);
    let application = pair.world.pod.listen("::", PORT);
    for target in [POD4, POD6] {
        let _client = pair.world.peer.connect(target, PORT);
        pair.at_destination.outbound.accept_one();
    }
    application.nothing_waits();
}

// T-9: nobody is taken for another by his address.
#[test]
fn who_connects_from_an_address_of_others_is_captured() {
    let mut pair = Pair::enrol();
    pair.permit(PORT);
    for (target, foreign) in [(PEER4, "10.77.0.99"), (PEER6, "fd77::99")] {
        let socket = pair.world.pod.socket(target);
        if address(target).is_ipv4() {
            socket.set_ip_transparent_v4(true).expect("root");
        } else {
            set_transparent_v6(socket.as_fd()).expect("root");
        }
        socket.bind(&to(address(foreign), 0).into()).expect("transparent");
        socket.set_nonblocking(true).expect("a socket option");
        let _: io::Result<()> = socket.connect(&to(address(target), PORT).into());
        wait_until("it was captured before its SYN", || count(&pair.kernel, "direct_captured") > 0);
        pair.application.nothing_waits();
        pair.at_destination.inbound.nothing_waits();
    }
    assert_eq!(count(&pair.kernel, "direct"), 0);
}

/// A namespace that has the addresses of the source and to which the destination answers.
fn forger(pair: &Pair) -> Place {
    let forger = Place::make(&format!("{}f", pair.world.name));
    let (name, peer) = (&forger.name, &pair.world.peer.name);
    ip(&format!("link add eth0 netns {name} type veth peer name eth1 netns {peer}"));
    for device in ["all", "eth0", "eth1"] {
        pair.world.peer.run(|| {
            fs::write(format!("/proc/sys/net/ipv4/conf/{device}/rp_filter"), "0").expect("a sysctl");
        });
    }
    for (address, prefix, target) in [(POD4, 32, PEER4), (POD6, 128, PEER6)] {
        ip(&format!(
            "-n {name} address add {address}/{prefix} dev eth0{}",
            if prefix == 128 { " nodad" } else { "" }
        ));
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {peer} link set eth1 up"));
        ip(&format!("-n {name} route replace {target}/{prefix} dev eth0 src {address}"));
        ip(&format!("-n {peer} route replace {address}/{prefix} dev eth1"));
    }
    let (forgers, peers) = (hardware(name, "eth0"), hardware(peer, "eth1"));
    for (own, target) in [(POD4, PEER4), (POD6, PEER6)] {
        ip(&format!("-n {name} neighbour replace {target} lladdr {peers} dev eth0"));
        ip(&format!("-n {peer} neighbour replace {own} lladdr {forgers} dev eth1"));
    }
    forger
}

/// The hardware address of a device.
pub(crate) fn hardware(place: &str, device: &str) -> String {
    let mut command = Command::new("ip");
    command.args(["-n", place, "-o", "link", "show", device]).stdout(Stdio::piped());
    let output = spawn(&mut command).wait_with_output().expect("iproute2 is installed");
    let line = String::from_utf8(output.stdout).expect("text");
    let mut words = line.split_whitespace().skip_while(|word| *word != "link/ether");
    words.nth(1).expect("a hardware address").to_owned()
}

#[test]
fn a_pod_that_forges_the_sources_address_never_passes_as_it() {
    let mut pair = Pair::enrol();
    pair.permit(PORT);
    let mut clients = Vec::new();
    for target in [PEER4, PEER6] {
        clients.push(pair.check_direct(target));
    }
    let forger = forger(&pair);
    for target in [PEER4, PEER6] {
        let forged = forger.connect(target, PORT);
        let (_, peer, _) = pair.at_destination.inbound.accept_one();
        assert_eq!(peer, forged.local(), "it is a client without a proof");
        pair.application.nothing_waits();
    }
    // Nor with the very tuple of a connection that stands, once the destination has forgotten that connection: its reset is
    // lost to the forger.
    for (client, served) in clients {
        let (tuple, target) = (client.local(), served.local_addr().expect("connected"));
        let server = Socket::from(served);
        server.set_linger(Some(Duration::ZERO)).expect("a socket option");
        drop(server);
        let forged = forger.socket(&target.ip().to_canonical().to_string());
        forged.bind(&tuple.into()).expect("the address is there");
        let before = count(&pair.kernel, "direct_stale");
        forged
            .connect_timeout(&to(target.ip().to_canonical(), PORT).into(), PATIENCE)
            .expect("the daemon answers");
        let (_, peer, _) = pair.at_destination.inbound.accept_one();
        assert_eq!(peer, tuple);
        assert_eq!(count(&pair.kernel, "direct_stale"), before + 1);
        pair.application.nothing_waits();
        drop(client);
    }
}

#[test]
fn a_process_in_the_pods_namespace_but_outside_its_cgroup_never_passes() {
    let (pods, outside) = (Cgroup::make("pods"), Cgroup::make("outside"));
    let mut world = World::without_kernel(MapSizes::default());
    world.cgroup = Some(pods.path.clone());
    let mut pair = Pair::of(world);
    pair.permit(PORT);
    for target in [PEER4, PEER6] {
        let _client = pods.dial(&pair.world.pod, target, PORT, None);
        pair.application.accept_one();
        let _stranger = outside.dial(&pair.world.pod, target, PORT, None);
        pair.at_destination.inbound.accept_one();
        pair.application.nothing_waits();
    }
    // The application is outside, too, so nobody told that it has the connection: it stands all the same.
    assert!(pair.connections().iter().all(|(_, value)| value.is_established() && value.accepted == 0));
    assert_eq!(count(&pair.kernel, "passed_direct"), 2);
    drop(pair);
}

// T-13
#[test]
fn a_repeated_syn_never_reaches_the_next_owner_of_a_reused_address() {
    for target in [PEER4, PEER6] {
        let mut pair = Pair::enrol();
        pair.permit(PORT);
        pair.hold_back();
        let client = pair.begin(target);
        pair.kernel.release(pair.destination).expect("the owner writes");
        let (next, number) = enrol_peer(&pair.world, &mut pair.kernel, "photo_next");
        assert_ne!(number, pair.destination);
        // Even if the next owner is permitted: this SYN was sent to the one before.
        let permitted = table(pair.source, number, &[(PORT, PairVerdict::Permit)]);
        pair.kernel.set_pairs(&permitted).expect("the table fits");
        pair.let_in();
        // The daemon of the next owner answers, and the client does not even complete the handshake.
        check_is_cut(&pair, &client);
        next.inbound.nothing_waits();
        pair.application.nothing_waits();
    }
}

// T-13, T-17
#[test]
fn a_repeated_syn_that_reaches_somebody_without_enrolment_carries_nothing() {
    for target in [PEER4, PEER6] {
        let mut pair = Pair::enrol();
        pair.permit(PORT);
        pair.hold_back();
        let client = pair.begin(target);
        pair.kernel.release(pair.destination).expect("the owner writes");
        pair.world.peer.without_capture_routes();
        pair.let_in();
        check_is_cut(&pair, &client);
        pair.application.nothing_waits();
    }
}

/// The client found out whom it met, and is reset by its own namespace: nothing of it leaves.
fn check_is_cut(pair: &Pair, client: &Socket) {
    wait_until("the client found out", || count(&pair.kernel, "direct_misled") == 1);
    client.set_nonblocking(false).expect("a socket option");
    client.set_read_timeout(Some(PATIENCE)).expect("a socket option");
    let mut client = client;
    let heard = client.read(&mut [0]).expect_err("a reset");
    assert_eq!(heard.kind(), io::ErrorKind::ConnectionReset);
    assert!(pair.connections().is_empty());
}

// T-14: with Fast Open the hook that publishes runs as long after the one that permitted as the application likes.
#[test]
fn a_permit_that_is_lost_between_the_verdict_and_the_publication_permits_nothing() {
    let mut pair = Pair::enrol();
    for (target, after) in [
        (PEER4, Some(PairVerdict::Deny)),
        (PEER6, Some(PairVerdict::Deny)),
        (PEER4, Some(PairVerdict::Ask)),
        (PEER6, None),
    ] {
        pair.permit(PORT);
        let before = count(&pair.kernel, "direct_captured");
        let client = pair.world.pod.socket(target);
        setsockopt(&client, TcpFastOpenConnect, &true).expect("this kernel has TCP Fast Open");
        client.connect(&to(address(target), PORT).into()).expect("deferred");
        let lost = after.map_or_else(DirectTable::default, |verdict| pair.table(&[(PORT, verdict)]));
        pair.kernel.set_pairs(&lost).expect("the table fits");
        (&client).write_all(b"late").expect("captured");
        let (mut served, peer, local) = pair.at_source.outbound.accept_one();
        assert_eq!(local, to(canonical(target), PORT));
        assert_eq!(peer, Client(client).local());
        let mut heard = Vec::new();
        served.read_to_end(&mut heard).expect("it arrives");
        assert_eq!(heard, b"late");
        assert_eq!(count(&pair.kernel, "direct_captured"), before + 1);
        assert!(pair.connections().is_empty());
        pair.application.nothing_waits();
        pair.at_destination.inbound.nothing_waits();
    }
}

// T-14
#[test]
fn a_permit_that_is_lost_between_the_publication_and_the_arrival_permits_nothing() {
    for target in [PEER4, PEER6] {
        let mut pair = Pair::enrol();
        pair.permit(PORT);
        pair.hold_back();
        let client = pair.begin(target);
        pair.kernel.set_pairs(&pair.table(&[(PORT, PairVerdict::Deny)])).expect("the table fits");
        let [(tuple, value)] = pair.connections()[..] else { panic!("it is listed after the change") };
        assert!(!value.is_established());
        assert_eq!(tuple.target_port, PORT);
        pair.let_in();
        // The SYN is repeated, and the daemon judges it as a client without a proof.
        pair.at_destination.inbound.accept_one();
        pair.application.nothing_waits();
        wait_until("the client forgot it", || pair.connections().is_empty());
        assert_eq!(count(&pair.kernel, "direct_stale"), 1);
        drop(client);
    }
}

// T-14
#[test]
fn while_tables_change_a_stale_generation_never_permits() {
    let mut pair = Pair::enrol();
    let permitted = pair.table(&[(PORT, PairVerdict::Permit)]);
    let denied = pair.table(&[(PORT, PairVerdict::Deny)]);
    for round in 0..20 {
        pair.kernel.set_pairs(&permitted).expect("the table fits");
        let Pair { world, kernel, application, .. } = &mut pair;
        let is_over = AtomicBool::new(false);
        let (listed, accepted, clients) = thread::scope(|scope| {
            let accepting = scope.spawn(|| accept_until(application, &is_over));
            let dialling = [PEER4, PEER6].map(|target| scope.spawn(|| dial_until_refused(world, target)));
            let direct = kernel.direct();
            wait_until("both connect", || direct.connections().expect("a map").len() >= 2);
            kernel.set_pairs(&denied).expect("the table fits");
            let listed: HashSet<Tuple> =
                direct.connections().expect("a map").into_iter().map(|(tuple, _)| tuple).collect();
            let clients = dialling.map(|dialling| dialling.join().expect("no panic"));
            is_over.store(true, Ordering::Relaxed);
            (listed, accepting.join().expect("no panic"), clients)
        });
        // Whoever ends what is listed and not permitted has ended all: nothing that the application was handed is missing.
        assert!(accepted.len() >= 2);
        for (_, tuple) in &accepted {
            assert!(listed.contains(tuple), "round {round}: {tuple:?} escaped");
        }
        drop((accepted, clients));
        wait_until("all ends were noticed", || pair.connections().is_empty());
        while pair.at_destination.inbound.something_waits() {}
    }
}

/// Connects until the table denies it; all stay open.
fn dial_until_refused(world: &World, target: &str) -> Vec<Socket> {
    let mut open = Vec::new();
    loop {
        let socket = world.pod.socket(target);
        match socket.connect_timeout(&to(address(target), PORT).into(), PATIENCE) {
            Ok(()) => open.push(socket),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return open,
            Err(error) => panic!("{target}: {error}"),
        }
    }
}

/// What the application is handed until it is over and nothing waits; as the client sees it.
fn accept_until(application: &Listener, is_over: &AtomicBool) -> Vec<(TcpStream, Tuple)> {
    application.0.set_nonblocking(true).expect("a socket option");
    let mut accepted = Vec::new();
    loop {
        let was_over = is_over.load(Ordering::Relaxed);
        match application.0.accept() {
            Ok((stream, peer)) => {
                let target = stream.local_addr().expect("connected");
                let canonical = |at: SocketAddr| to(at.ip().to_canonical(), at.port());
                accepted.push((stream, Tuple::new(canonical(peer), canonical(target))));
            }
            Err(_) if was_over => break,
            Err(_) => thread::yield_now(),
        }
    }
    application.0.set_nonblocking(false).expect("a socket option");
    accepted
}

// T-15
#[test]
fn without_the_daemon_new_connects_wait_and_direct_connections_live_on() {
    let mut pair = Pair::enrol();
    pair.permit(PORT);
    let mut standing: Vec<_> = [PEER4, PEER6].map(|target| pair.check_direct(target)).into();
    let Pair { application, kernel, source, destination, at_source, at_destination, world } = pair;
    {
        let _no_fork_now = FORK.lock().unwrap_or_else(PoisonError::into_inner);
        drop((kernel, at_source, at_destination));
    }
    let check_standing = |standing: &mut Vec<(Client, TcpStream)>| {
        for (client, served) in standing {
            (&client.0).write_all(b"still here").expect("connected");
            let mut heard = [0; 10];
            served.read_exact(&mut heard).expect("it arrives");
        }
    };
    check_standing(&mut standing);
    thread::scope(|scope| {
        let waiting = [PEER4, PEER6].map(|target| scope.spawn(|| connect_when_answered(&world, target)));
        let probe = Kernel::start(&world.config()).expect("a successor starts");
        wait_until("the connects met no listener", || count(&probe, "no_outbound_listener") >= 2);
        drop(probe);
        application.nothing_waits();
        // A successor that has no table yet: its predecessor's permits nothing.
        let mut kernel = Kernel::start(&world.config()).expect("a successor starts");
        let at_source = Listeners::open(&world.pod);
        assert_eq!(kernel.steer(&world.target(), at_source.fds()).expect("steered"), source);
        for waiting in waiting {
            waiting.join().expect("no panic").expect("the connect waited");
            at_source.outbound.accept_one();
        }
        check_standing(&mut standing);
        let _client = world.pod.connect(PEER4, PORT);
        at_source.outbound.accept_one();
        application.nothing_waits();
        let permitted = table(source, destination, &[(PORT, PairVerdict::Permit)]);
        kernel.set_pairs(&permitted).expect("the table fits");
        for target in [PEER4, PEER6] {
            let _client = world.pod.connect(target, PORT);
            application.accept_one();
        }
        check_standing(&mut standing);
    });
}

// T-15, T-24
#[test]
fn a_hand_over_keeps_the_table_until_the_successor_has_its_own() {
    let mut pair = Pair::enrol();
    pair.permit(PORT);
    let (client, mut served) = pair.check_direct(PEER4);
    let mut reader = pair.kernel.direct().events().expect("a map");
    assert_eq!(events(&mut reader, 1).len(), 1);
    let mut successor = Kernel::start(&pair.world.config()).expect("a successor starts");
    pair.check_direct(PEER6);
    assert!(matches!(pair.kernel.set_pairs(&DirectTable::default()), Err(KernelError::NotOwner { .. })));
    assert!(matches!(reader.take(), Err(KernelError::NotOwner { .. })));
    let generation = successor.set_pairs(&pair.table(&[(PORT, PairVerdict::Permit)])).expect("it fits");
    // The predecessor ends, and with it its sign.
    let Pair { application, kernel, source, destination, at_source, at_destination, world } = pair;
    drop(kernel);
    let pair = Pair { application, kernel: successor, source, destination, at_source, at_destination, world };
    pair.check_direct(PEER4);
    (&client.0).write_all(b"x").expect("connected");
    served.read_exact(&mut [0]).expect("it arrives");
    let mut reader = pair.kernel.direct().events().expect("a map");
    let told = events(&mut reader, 1);
    assert!(told.iter().any(|told| told.generation == generation), "numbers go on: {told:?}");
}

// T-17
#[test]
fn an_address_that_goes_leads_to_nobody_before_another_has_it() {
    let mut pair = Pair::enrol();
    pair.permit(PORT);
    pair.check_direct(PEER4);
    pair.kernel.addresses(pair.destination, &[address(PEER6)]).expect("the owner writes");
    let _client = pair.world.pod.connect(PEER4, PORT);
    pair.at_source.outbound.accept_one();
    pair.check_direct(PEER6);
    pair.kernel.addresses(pair.destination, &[PEER4, PEER6].map(address)).expect("the owner writes");
    pair.check_direct(PEER4);

    // Given to another at once: it has its own number, and the old right is not its.
    pair.kernel.release(pair.destination).expect("the owner writes");
    for target in [PEER4, PEER6] {
        let _client = pair.world.pod.connect(target, PORT);
        pair.at_source.outbound.accept_one();
    }
    let (_next, number) = enrol_peer(&pair.world, &mut pair.kernel, "photo_next");
    for target in [PEER4, PEER6] {
        pair.check_captured(target, PORT);
    }
    let permitted = table(pair.source, number, &[(PORT, PairVerdict::Permit)]);
    pair.kernel.set_pairs(&permitted).expect("the table fits");
    for target in [PEER4, PEER6] {
        let _client = pair.world.pod.connect(target, PORT);
        pair.application.accept_one();
    }
}

#[test]
fn an_address_that_two_namespaces_have_is_not_direct() {
    let mut pair = Pair::enrol();
    pair.permit(PORT);
    let third = Place::make(&format!("{}t", pair.world.name));
    let listeners = Listeners::open(&third);
    let target = EnrolTarget {
        netns: third.namespace.as_fd(),
        cookie: third.namespace.cookie(),
        addresses: vec![address(PEER4)],
        ..peer_target(&pair.world, "photo_third")
    };
    let number = pair.kernel.steer(&target, listeners.fds()).expect("steered");
    pair.check_captured(PEER4, PORT);
    pair.check_direct(PEER6);
    pair.kernel.release(number).expect("the owner writes");
    pair.check_direct(PEER4);
}

#[test]
fn a_tuple_is_over_with_its_connection() {
    let mut pair = Pair::enrol();
    pair.permit(PORT);
    for target in [PEER4, PEER6] {
        let (client, served) = pair.check_direct(target);
        let tuple = client.local();
        client.0.set_linger(Some(Duration::ZERO)).expect("a socket option");
        drop(client);
        wait_until("its end was noticed", || pair.connections().is_empty());
        drop(served);
        // The same tuple from outside: nothing is left of the right.
        let forger = forger(&pair);
        let again = forger.socket(target);
        again.bind(&tuple.into()).expect("the address is there");
        again.connect_timeout(&to(address(target), PORT).into(), PATIENCE).expect("the daemon answers");
        let (_, peer, _) = pair.at_destination.inbound.accept_one();
        assert_eq!(peer, tuple);
        pair.application.nothing_waits();
        // The namespace may go later than its handle, the device and its routes go now.
        ip(&format!("-n {} link delete eth1", pair.world.peer.name));
        drop((again, forger));
        // The workload itself may use it again, as another connection with a right of its own.
        let again = pair.world.pod.socket(target);
        again.bind(&tuple.into()).expect("the port is free");
        again.connect_timeout(&to(address(target), PORT).into(), PATIENCE).expect("permitted");
        let (_, peer, _) = pair.application.accept_one();
        assert_eq!(peer, tuple);
    }
}

#[test]
fn a_handshake_with_syn_cookies_is_direct() {
    let mut pair = Pair::enrol();
    pair.world.peer.run(|| {
        fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").expect("a sysctl of this namespace");
    });
    pair.permit(PORT);
    for target in [PEER4, PEER6, PEER_MAPPED] {
        let (_client, _served) = pair.check_direct(target);
        wait_until("the destination's socket stands", || {
            pair.connections().iter().all(|(_, value)| value.accepted == 1)
        });
    }
}

#[test]
fn a_repeated_syn_of_a_permitted_connection_is_direct() {
    let mut pair = Pair::enrol();
    pair.permit(PORT);
    for target in [PEER4, PEER6] {
        pair.hold_back();
        let client = pair.begin(target);
        pair.let_in();
        let (_, peer, _) = pair.application.accept_one();
        assert_eq!(peer, Client(client).local());
        pair.nothing_waits();
    }
}

#[test]
fn data_in_the_first_segment_reaches_a_permitted_application_only() {
    let mut pair = Pair::enrol();
    for target in [PEER4, PEER6] {
        pair.permit(PORT);
        let client = pair.world.pod.socket(target);
        setsockopt(&client, TcpFastOpenConnect, &true).expect("this kernel has TCP Fast Open");
        client.connect(&to(address(target), PORT).into()).expect("deferred");
        (&client).write_all(b"early").expect("permitted");
        let (mut served, _, _) = pair.application.accept_one();
        let mut heard = [0; 5];
        served.read_exact(&mut heard).expect("it arrives");
        assert_eq!(&heard, b"early");

        // Its SYN, with data, is lost; what is repeated meets another table.
        pair.hold_back();
        let client = pair.world.pod.socket(target);
        setsockopt(&client, TcpFastOpenConnect, &true).expect("this kernel has TCP Fast Open");
        client.connect(&to(address(target), PORT).into()).expect("deferred");
        client.set_nonblocking(true).expect("a socket option");
        let _: io::Result<usize> = (&client).write(b"early");
        pair.kernel.set_pairs(&DirectTable::default()).expect("the table fits");
        pair.let_in();
        pair.at_destination.inbound.accept_one();
        pair.application.nothing_waits();

        pair.kernel.set_pairs(&pair.table(&[(PORT, PairVerdict::Deny)])).expect("the table fits");
        let client = pair.world.pod.socket(target);
        setsockopt(&client, TcpFastOpenConnect, &true).expect("this kernel has TCP Fast Open");
        let refused = client.connect(&to(address(target), PORT).into()).expect_err("denied");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
}

#[test]
fn a_multipath_socket_is_judged_like_others() {
    let mut pair = Pair::enrol();
    let multipath = |target: &str| {
        let domain = Domain::for_address(to(address(target), 0));
        let made = pair.world.pod.run(|| Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP)));
        made.expect("this kernel has MPTCP")
    };
    let clients =
        [PEER4, PEER6].map(|target| (target, multipath(target), multipath(target), multipath(target)));
    for (target, permitted, denied, asked) in clients {
        let to_target = to(address(target), PORT).into();
        pair.permit(PORT);
        permitted.connect_timeout(&to_target, PATIENCE).expect("permitted");
        let (mut served, _, _) = pair.application.accept_one();
        (&permitted).write_all(b"x").expect("connected");
        served.read_exact(&mut [0]).expect("it arrives");
        let [(_, value)] = pair.connections()[..] else { panic!("one connection") };
        assert!(value.is_established());
        drop((permitted, served));
        wait_until("its end was noticed", || pair.connections().is_empty());
        pair.kernel.set_pairs(&pair.table(&[(PORT, PairVerdict::Deny)])).expect("the table fits");
        denied.connect_timeout(&to_target, PATIENCE).expect_err("denied");
        pair.kernel.set_pairs(&DirectTable::default()).expect("the table fits");
        asked.connect_timeout(&to_target, PATIENCE).expect("captured");
        pair.at_source.outbound.accept_one();
        pair.nothing_waits();
    }
}

// T-1
#[test]
fn a_socket_that_is_used_again_is_judged_again() {
    let mut pair = Pair::enrol();
    let local = pair.world.pod.listen("::", 9200);
    for (target, own) in [(PEER4, POD4), (PEER6, POD6)] {
        let to_target: SockAddr = to(address(target), PORT).into();
        pair.permit(PORT);
        let socket = pair.world.pod.connect(target, PORT).0;
        pair.application.accept_one();
        disconnect(&socket);
        wait_until("its end was noticed", || pair.connections().is_empty());
        socket.connect_timeout(&to(address(own), 9200).into(), PATIENCE).expect("local");
        local.accept_one();
        disconnect(&socket);
        pair.kernel.set_pairs(&DirectTable::default()).expect("the table fits");
        socket.connect_timeout(&to_target, PATIENCE).expect("captured");
        pair.at_source.outbound.accept_one();
        assert_ne!(socket.mark().expect("a socket option") & MARK, 0);
        disconnect(&socket);
        pair.permit(PORT);
        socket.connect_timeout(&to_target, PATIENCE).expect("permitted");
        let (mut served, _, _) = pair.application.accept_one();
        assert_eq!(socket.mark().expect("a socket option") & MARK, 0);
        (&socket).write_all(b"x").expect("the guard has nothing against it");
        served.read_exact(&mut [0]).expect("it arrives");
    }
    assert_eq!(count(&pair.kernel, "captured_egress"), 0);
}

#[test]
fn an_application_that_refuses_leaves_no_entry_and_is_not_told() {
    let mut pair = Pair::enrol();
    pair.permit(PairKey::OTHER_PORTS);
    let mut reader = pair.kernel.direct().events().expect("a map");
    for target in [PEER4, PEER6] {
        pair.check_refused(target, 81);
        assert!(pair.connections().is_empty());
    }
    assert_eq!(reader.take().expect("the owner"), []);
    assert_eq!(count(&pair.kernel, "direct"), 2);
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    ClientCloses,
    ServerCloses,
    ClientHalfCloses,
    ClientResets,
    ServerResets,
}

#[test]
fn the_bytes_of_a_connection_are_told_however_it_ends() {
    let mut pair = Pair::enrol();
    pair.permit(PORT);
    let mut reader = pair.kernel.direct().events().expect("a map");
    for target in [PEER4, PEER6, PEER_MAPPED] {
        for end in [
            End::ClientCloses,
            End::ServerCloses,
            End::ClientHalfCloses,
            End::ClientResets,
            End::ServerResets,
        ] {
            for (asked, answered) in [(0, 0), (1, 0), (0, 1), (7, 100_000), (300_000, 3)] {
                let (client, served) = pair.check_direct(target);
                let tuple = Tuple::new(client.local(), to(canonical(target), PORT));
                let client = client.0;
                exchange(&client, &served, asked, answered);
                finish(end, client, served);
                let [opened, closed] = events(&mut reader, 2)[..] else { panic!("two events") };
                let what = format!("{target} {end:?} {asked} {answered}: {closed:?}");
                assert_eq!(opened.kind(), Some(DirectEventKind::Opened), "{what}");
                assert_eq!(closed.kind(), Some(DirectEventKind::Closed), "{what}");
                assert_eq!((opened.tuple, closed.tuple), (tuple, tuple), "{what}");
                assert_eq!((closed.source, closed.destination), (pair.source, pair.destination), "{what}");
                assert_eq!((closed.sent_bytes, closed.received_bytes), (asked, answered), "{what}");
                assert_eq!(opened.socket_cookie, closed.socket_cookie, "{what}");
                assert!(closed.duration_nanos > 0 && closed.at_nanos > opened.at_nanos, "{what}");
                let is_reset = matches!(end, End::ClientResets | End::ServerResets);
                assert_eq!(closed.aborted, u32::from(is_reset), "{what}");
            }
        }
    }
    assert_eq!(count(&pair.kernel, "direct_event_lost"), 0);
}

/// Both sides have read what the other wrote, and every byte is acknowledged.
fn exchange(client: &Socket, served: &TcpStream, asked: u64, answered: u64) {
    fn pump(mut from: impl io::Write, to: impl io::Read + Send, many: u64) {
        thread::scope(|scope| {
            let read = scope.spawn(|| io::copy(&mut to.take(many), &mut io::sink()).expect("it arrives"));
            let sent = io::copy(&mut io::repeat(7).take(many), &mut from).expect("connected");
            assert_eq!((sent, read.join().expect("no panic")), (many, many));
        });
    }
    pump(client, served, asked);
    pump(served, client, answered);
    let unsent = |socket: std::os::fd::BorrowedFd<'_>| unacknowledged(socket) == 0;
    wait_until("all is acknowledged", || unsent(client.as_fd()) && unsent(served.as_fd()));
}

fn finish(end: End, client: Socket, served: TcpStream) {
    match end {
        End::ClientCloses => {
            drop(client);
            assert_eq!((&served).read(&mut [0]).expect("an orderly end"), 0);
        }
        End::ServerCloses => {
            drop(served);
            assert_eq!((&client).read(&mut [0]).expect("an orderly end"), 0);
        }
        End::ClientHalfCloses => {
            client.shutdown(Shutdown::Write).expect("connected");
            assert_eq!((&served).read(&mut [0]).expect("an orderly end"), 0);
            drop(served);
            assert_eq!((&client).read(&mut [0]).expect("an orderly end"), 0);
        }
        End::ClientResets => client.set_linger(Some(Duration::ZERO)).expect("a socket option"),
        End::ServerResets => {
            Socket::from(served).set_linger(Some(Duration::ZERO)).expect("a socket option");
            (&client).read(&mut [0]).expect_err("a reset");
        }
    }
}

#[test]
fn a_connection_that_does_not_fit_takes_the_way_through_the_daemon() {
    let mut pair = Pair::with_sizes(MapSizes { direct: 1, ..MapSizes::default() });
    pair.permit(PORT);
    for (first, second) in [(PEER4, PEER6), (PEER6, PEER4)] {
        let (client, served) = pair.check_direct(first);
        let before = count(&pair.kernel, "direct_unpublished");
        pair.check_captured(second, PORT);
        assert_eq!(count(&pair.kernel, "direct_unpublished"), before + 1);
        drop((client, served));
        wait_until("there is room again", || pair.connections().is_empty());
        let served = pair.check_direct(second);
        drop(served);
        wait_until("there is room again", || pair.connections().is_empty());
    }
}

#[test]
fn a_table_that_does_not_fit_is_refused_and_nothing_is_direct() {
    let mut pair = Pair::with_sizes(MapSizes { pairs: 3, ..MapSizes::default() });
    let fits = pair.table(&[(PORT, PairVerdict::Permit), (81, PairVerdict::Deny)]);
    let first = pair.kernel.set_pairs(&fits).expect("the last one fits");
    pair.check_direct(PEER4);
    let mut larger = fits.clone();
    larger.classes.push((WorkloadNumber(77), 1));
    let refused = pair.kernel.set_pairs(&larger);
    assert!(matches!(refused, Err(KernelError::Limit { map: "PAIRS", limit: 3, .. })), "{refused:?}");
    for port in [PORT, 81] {
        pair.check_captured(PEER4, port);
    }
    let second = pair.kernel.set_pairs(&fits).expect("it fits");
    assert!(second > first);
    pair.check_direct(PEER4);
}

#[test]
fn an_address_that_does_not_fit_is_not_direct() {
    let mut pair = Pair::with_sizes(MapSizes { local_addresses: 2, ..MapSizes::default() });
    pair.permit(PORT);
    // Two of four have room, and a pair needs two.
    let reached: Vec<bool> = [PEER4, PEER6]
        .into_iter()
        .map(|target| {
            let _client = pair.world.pod.connect(target, PORT);
            let direct = pair.application.something_waits();
            if !direct {
                pair.at_source.outbound.accept_one();
            }
            direct
        })
        .collect();
    assert!(reached.contains(&false), "{reached:?}");
    assert!(count(&pair.kernel, "captured") + count(&pair.kernel, "direct_captured") > 0);
}

#[test]
fn events_that_do_not_fit_are_counted_and_refusals_fill_half() {
    let mut pair = Pair::with_sizes(MapSizes { direct_events_bytes: 4096, ..MapSizes::default() });
    let mut reader = pair.kernel.direct().events().expect("a map");
    pair.kernel.set_pairs(&pair.table(&[(PORT, PairVerdict::Deny)])).expect("the table fits");
    let entry = size_of::<DirectEvent>() + 8;
    for _ in 0..4096 / entry {
        pair.check_refused(PEER4, PORT);
    }
    let lost = count(&pair.kernel, "direct_event_lost");
    assert!(lost > 0);
    pair.permit(PORT);
    let mut opened = 0;
    while count(&pair.kernel, "direct_event_lost") == lost {
        pair.check_direct(PEER4);
        opened += 1;
    }
    assert!(opened > 4, "connections are told where refusals are not: {opened}");
    // What is lost is lost, and nothing else: the connection stands, and there is room again.
    let told = events(&mut reader, 1);
    assert_eq!(
        told.iter().filter(|told| told.kind() == Some(DirectEventKind::Refused)).count(),
        2048 / entry + 1
    );
    pair.check_direct(PEER4);
    assert!(events(&mut reader, 1).iter().any(|told| told.kind() == Some(DirectEventKind::Opened)));
}

#[test]
fn events_are_taken_in_portions() {
    let mut pair = Pair::enrol();
    let mut reader = pair.kernel.direct().events().expect("a map");
    pair.kernel.set_pairs(&pair.table(&[(PORT, PairVerdict::Deny)])).expect("the table fits");
    for _ in 0..limits::DIRECT_EVENTS_AT_ONCE + 3 {
        pair.check_refused(PEER4, PORT);
    }
    assert_eq!(reader.take().expect("the owner").len(), limits::DIRECT_EVENTS_AT_ONCE);
    assert_eq!(reader.take().expect("the owner").len(), 3);
    assert_eq!(reader.take().expect("the owner"), []);
    assert_eq!(count(&pair.kernel, "direct_event_lost"), 0);
}

#[test]
fn a_host_workload_is_never_direct() {
    let unit = Cgroup::make("unit");
    let mut pair = Pair::enrol();
    pair.kernel.release(pair.source).expect("the owner writes");
    let target = EnrolTarget {
        key: "books_ledger".to_owned(),
        kind: WorkloadKind::Host { cgroup: unit.path.clone(), ports: vec![9200] },
        ..pair.world.target()
    };
    let number = pair.kernel.steer(&target, pair.at_source.fds()).expect("steered");
    pair.kernel.capture(number).expect("captured");
    let permitted = DirectTable {
        classes: vec![(number, CLASS), (pair.destination, CLASS)],
        pairs: vec![
            (PairKey::pair(CLASS, pair.destination, PORT), PairVerdict::Permit),
            (PairKey::pair(CLASS, number, 9200), PairVerdict::Permit),
        ],
    };
    pair.kernel.set_pairs(&permitted).expect("the table fits");
    for (target, own) in [(PEER4, POD4), (PEER6, POD6)] {
        let _client = unit.dial(&pair.world.pod, target, PORT, None);
        pair.at_source.outbound.accept_one();
        let _client = pair.world.peer.connect(own, 9200);
        pair.at_destination.outbound.accept_one();
    }
    pair.application.nothing_waits();
    assert_eq!(count(&pair.kernel, "direct"), 0);
    // The cgroup can only go when nothing is attached to it.
    pair.kernel.release(number).expect("the owner writes");
}

#[test]
fn another_schema_version_keeps_the_table_out_of_force_until_it_is_retired() {
    let mut pair = Pair::enrol();
    let counters = pair.world.pins().into_iter().find(|pin| pin.ends_with("COUNTERS")).expect("a shared map");
    let other = counters.ancestors().nth(2).expect("the schema's folder").with_file_name("v0");
    fs::create_dir(&other).expect("root may make a folder");
    pair.permit(PORT);
    pair.check_captured(PEER4, PORT);
    pair.kernel.retire_older_schemas().expect("the owner writes");
    pair.check_direct(PEER4);
}
