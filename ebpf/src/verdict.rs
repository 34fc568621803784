//! What happens to a connect, to an arriving connection, and to a packet.
//!
//! Each question is asked only when the answer counts, so a hook pays for one look-up at a time. None of these functions
//! can fail: what is unknown has an answer, too.

use ebpf_abi::{
    Address, DirectArrival, LOOPBACK_IFINDEX, OriginKind, PairVerdict, SocketSlot, TUNNEL_PORT,
    WorkloadNumber,
};

pub mod direct;

pub mod shortcut;

/// What the connect hook knows of a socket that is about to connect.
pub trait Connecting {
    /// Whose socket it is, if it belongs to an enrolled workload whose connects are captured.
    fn workload(&self) -> Option<WorkloadNumber>;
    /// Whether the daemon recorded the socket as one of its own.
    fn is_exempt(&self) -> bool;
    /// Whether it is a TCP or MPTCP stream.
    fn is_stream(&self) -> bool;
    /// The address that it dials.
    fn target(&self) -> Address;
    /// Whether the workload itself has this address.
    fn is_own(&self, workload: WorkloadNumber, address: &Address) -> bool;
    /// Which pod of this node alone has this address. Nobody, where the socket is one of a host workload: those take the way
    /// through the daemon always.
    fn local_owner(&self, address: &Address) -> Option<WorkloadNumber>;
    /// Whether a daemon stands behind the pair table (T-15).
    fn is_daemon_there(&self) -> bool;
    /// What the pair table says of this connect.
    fn judge(&self, source: WorkloadNumber, destination: WorkloadNumber) -> PairVerdict;
}

/// What happens to a connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    /// Not ours: nothing is read or written.
    Pass,
    /// The daemon's own: nothing is written (T-2).
    PassExempt,
    /// Goes to the workload itself: what an earlier connect left on the socket is removed.
    PassLocal,
    /// Is marked and recorded, or refused where that fails.
    Capture(WorkloadNumber),
    /// Goes to a workload of this node without the daemon: what an earlier connect left on the socket is removed.
    Direct(WorkloadNumber),
    /// Is refused.
    Deny { source: WorkloadNumber, destination: WorkloadNumber },
}

#[inline(always)]
pub fn connect(socket: &impl Connecting) -> Connect {
    let Some(workload) = socket.workload() else {
        return Connect::Pass;
    };
    if socket.is_exempt() {
        return Connect::PassExempt;
    }
    if !socket.is_stream() {
        return Connect::Pass;
    }
    let target = socket.target();
    if is_loopback(&target) || is_unspecified(&target) || socket.is_own(workload, &target) {
        return Connect::PassLocal;
    }
    let Some(destination) = socket.local_owner(&target) else {
        return Connect::Capture(workload);
    };
    if !socket.is_daemon_there() {
        // Nobody keeps the table true: the connect waits for the successor.
        return Connect::Capture(workload);
    }
    match socket.judge(workload, destination) {
        PairVerdict::Permit => Connect::Direct(workload),
        PairVerdict::Deny => Connect::Deny { source: workload, destination },
        PairVerdict::Ask => Connect::Capture(workload),
    }
}

/// What is known of a connect of a host workload before its SYN.
pub trait Opening {
    fn is_captured(&self) -> bool;
    /// The address that it dials.
    fn target(&self) -> Address;
    /// Whether the host has this address.
    fn is_own(&self, address: &Address) -> bool;
    /// Which host workload serves the port that it dials, if one does; `WorkloadNumber::NONE` where several declare it.
    fn port_owner(&self) -> Option<WorkloadNumber>;
}

/// Where a connect of `workload` goes, if anybody needs to know (T-27).
///
/// A workload that talks to itself is no other process: whoever else dials the same address is identified and judged.
#[inline(always)]
pub fn opened(connect: &impl Opening, workload: WorkloadNumber) -> Option<OriginKind> {
    if connect.is_captured() {
        return Some(OriginKind::Captured);
    }
    let target = connect.target();
    if !is_loopback(&target) && !connect.is_own(&target) {
        return None;
    }
    // Where nobody serves the port the connection is not steered: an entry would never be taken.
    let owner = connect.port_owner()?;
    Some(if owner == workload { OriginKind::Own } else { OriginKind::Local })
}

/// What the look-up of a listener knows of a connection that arrives.
pub trait Arriving {
    fn is_tcp(&self) -> bool;
    /// The device from which it came. Local traffic shows `lo` only where its route says so: "not `lo`" is no proof of an
    /// outside origin, "`lo`" is proof of a local one.
    fn interface(&self) -> u32;
    fn source(&self) -> Address;
    fn target(&self) -> Address;
    fn target_port(&self) -> u16;
    /// Whether this namespace has the address.
    fn is_own(&self, address: &Address) -> bool;
    /// In a pod: how a connection that the kernel published for it is received; `None` where none was published.
    fn direct(&self) -> Option<DirectArrival>;
    /// In a pod: whether connections to the port are left alone.
    fn is_exempt_port(&self, port: u16) -> bool;
    /// In the host's namespace: whether a host workload serves the port.
    fn is_inbound_port(&self, port: u16) -> bool;
    /// In the host's namespace: whether a captured connect of a host workload published exactly this connection.
    fn is_captured(&self) -> bool;
    /// In the host's namespace: whether a host workload published exactly this connection as one to itself.
    fn is_to_itself(&self) -> bool;
    /// In the host's namespace: whether the daemon announced exactly this connection as its delivery.
    fn is_delivery(&self) -> bool;
}

/// What happens to an arriving connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steer {
    /// The ordinary look-up goes on.
    Pass,
    /// To the application: exactly this connection was permitted by the kernel.
    PassDirect,
    /// To the daemon's inbound listener: exactly this connection was permitted, and is not any more, or not here.
    ToStale,
    /// To the daemon's listener; dropped where there is none.
    To(SocketSlot),
}

/// In the network namespace of a pod everything that is not local belongs to the daemon.
#[inline(always)]
pub fn steer_in_pod(arrival: &impl Arriving) -> Steer {
    if !arrival.is_tcp() {
        return Steer::Pass;
    }
    let target = arrival.target();
    if !is_loopback(&target) && !arrival.is_own(&target) {
        // Only the route of captured sockets delivers such an address here.
        return Steer::To(SocketSlot::Outbound);
    }
    if arrival.interface() == LOOPBACK_IFINDEX {
        return Steer::Pass;
    }
    let source = arrival.source();
    if is_loopback(&source) || arrival.is_own(&source) {
        return Steer::Pass;
    }
    let port = arrival.target_port();
    if port == TUNNEL_PORT {
        return Steer::To(SocketSlot::Tunnel);
    }
    let direct = arrival.direct();
    if direct == Some(DirectArrival::Passed) {
        return Steer::PassDirect;
    }
    if arrival.is_exempt_port(port) {
        return Steer::Pass;
    }
    if direct.is_some() { Steer::ToStale } else { Steer::To(SocketSlot::Inbound) }
}

/// In the host's namespace only what belongs to a host workload is the daemon's.
///
/// Addresses prove nothing here: the host has many, of many owners, and local processes share them, loopback included (T-27).
/// An arriving connection is known by its port; a captured connect, one of a workload to itself, and the daemon's own delivery
/// are known by their exact tuples.
#[inline(always)]
pub fn steer_in_host(arrival: &impl Arriving) -> Steer {
    if !arrival.is_tcp() {
        return Steer::Pass;
    }
    let port = arrival.target_port();
    // No connect to loopback is captured, and no tunnel ends there: at loopback the tunnel's port is like any other.
    if !is_loopback(&arrival.target()) {
        if arrival.is_captured() {
            return Steer::To(SocketSlot::Outbound);
        }
        if port == TUNNEL_PORT {
            return Steer::To(SocketSlot::Tunnel);
        }
    }
    if !arrival.is_inbound_port(port) {
        return Steer::Pass;
    }
    // For a client elsewhere the daemon's socket is bound to `lo`: the same tuple from a real interface is the client's own
    // and no delivery. A local client's address leads back by its own interface, and there the daemon's socket itself keeps
    // every other local process from the tuple.
    let is_local = arrival.interface() == LOOPBACK_IFINDEX || arrival.is_own(&arrival.source());
    if is_local && (arrival.is_delivery() || arrival.is_to_itself()) {
        return Steer::Pass;
    }
    Steer::To(SocketSlot::Inbound)
}

/// Whether a packet of a socket may leave by this interface (T-1, T-5).
#[inline(always)]
pub fn may_leave(interface: u32, is_captured: impl FnOnce() -> bool) -> bool {
    interface == LOOPBACK_IFINDEX || !is_captured()
}

/// Whether a reset may reach a socket: a captured connect waits for the daemon instead of being refused (T-3).
#[inline(always)]
pub fn may_reset(is_captured: bool, is_connecting: bool) -> bool {
    !(is_captured && is_connecting)
}

/// How a connection of a host workload ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The client closed it in order; the daemon may still have it in its queue.
    InOrder,
    /// Refused, reset or given up.
    Aborted,
}

/// Judges the last state before CLOSE, in the kernel's numbers.
#[inline(always)]
pub fn ended(last_state: u32) -> Ended {
    match last_state {
        TCP_FIN_WAIT1 | TCP_FIN_WAIT2 | TCP_LAST_ACK | TCP_CLOSING => Ended::InOrder,
        _ => Ended::Aborted,
    }
}

/// 127.0.0.0/8, also v4-mapped, and ::1.
#[inline(always)]
pub fn is_loopback(address: &Address) -> bool {
    let [high, low] = halves(address);
    (high == 0 && low == 1) || (high == 0 && low >> 24 == V4_LOOPBACK_NET)
}

/// 0.0.0.0, also v4-mapped, and ::. To connect there is to connect to loopback.
#[inline(always)]
pub fn is_unspecified(address: &Address) -> bool {
    let [high, low] = halves(address);
    high == 0 && (low == 0 || low == V4_MAPPED << 32)
}

/// Whether the address is IPv4 in the clothes of IPv6.
#[inline(always)]
pub fn is_v4_mapped(address: &Address) -> bool {
    let [high, low] = halves(address);
    high == 0 && low >> 32 == V4_MAPPED
}

/// Two words instead of sixteen bytes: the verifier follows every branch of a loop over bytes.
#[inline(always)]
fn halves(address: &Address) -> [u64; 2] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address.0;
    [u64::from_be_bytes([a, b, c, d, e, f, g, h]), u64::from_be_bytes([i, j, k, l, m, n, o, p])]
}

/// Bytes 8 to 11 of a v4-mapped address.
const V4_MAPPED: u64 = 0x0000_ffff;
/// Bytes 8 to 12 of a v4-mapped loopback address.
const V4_LOOPBACK_NET: u64 = (V4_MAPPED << 8) | 127;

// Numbers of include/net/tcp_states.h, which are part of the kernel's interface.
const TCP_FIN_WAIT1: u32 = 4;
const TCP_FIN_WAIT2: u32 = 5;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;

#[cfg(test)]
mod tests {
    extern crate std;

    use core::net::IpAddr;

    use super::*;

    const POD: WorkloadNumber = WorkloadNumber(7);
    const OWN: [&str; 3] = ["10.8.1.4", "fd00:8:1::4", "fe80::4"];
    const ETH0: u32 = 2;

    fn address(text: &str) -> Address {
        match text.parse::<IpAddr>().expect("a test's address") {
            IpAddr::V4(v4) => Address::v4(v4.octets()),
            IpAddr::V6(v6) => Address(v6.octets()),
        }
    }

    #[derive(Clone, Copy)]
    struct Dial {
        workload: Option<WorkloadNumber>,
        exempt: bool,
        stream: bool,
        target: &'static str,
        daemon: bool,
        table: PairVerdict,
    }

    impl Connecting for Dial {
        fn workload(&self) -> Option<WorkloadNumber> {
            self.workload
        }
        fn is_exempt(&self) -> bool {
            self.exempt
        }
        fn is_stream(&self) -> bool {
            self.stream
        }
        fn target(&self) -> Address {
            address(self.target)
        }
        fn is_own(&self, workload: WorkloadNumber, asked: &Address) -> bool {
            workload == POD && OWN.iter().any(|own| address(own) == *asked)
        }
        fn local_owner(&self, asked: &Address) -> Option<WorkloadNumber> {
            NEAR_ADDRESSES.iter().any(|one| address(one) == *asked).then_some(NEAR)
        }
        fn is_daemon_there(&self) -> bool {
            self.daemon
        }
        fn judge(&self, source: WorkloadNumber, destination: WorkloadNumber) -> PairVerdict {
            assert_eq!((source, destination), (POD, NEAR));
            self.table
        }
    }

    const DIAL: Dial = Dial {
        workload: Some(POD),
        exempt: false,
        stream: true,
        target: "10.8.1.9",
        daemon: true,
        table: PairVerdict::Permit,
    };
    const NEAR: WorkloadNumber = WorkloadNumber(9);
    const NEAR_ADDRESSES: [&str; 2] = ["10.8.1.44", "fd00:8:1::44"];

    #[track_caller]
    fn dial(dial: Dial, expected: Connect) {
        assert_eq!(connect(&dial), expected, "{}", dial.target);
    }

    #[test]
    fn a_connect_of_an_enrolled_workload_is_captured() {
        for target in [
            "10.8.1.9",
            "1.1.1.1",
            "fd00:8:1::9",
            "::ffff:10.8.1.9",
            "fe80::9",
            "169.254.169.254",
            "128.0.0.1",
            "126.255.255.255",
            "::2",
            "::127.0.0.1",
            "7f00::1",
        ] {
            dial(Dial { target, ..DIAL }, Connect::Capture(POD));
        }
    }

    #[test]
    fn loopback_and_own_addresses_are_left_alone() {
        for target in [
            "127.0.0.1",
            "127.255.255.254",
            "::1",
            "::ffff:127.0.0.1",
            "0.0.0.0",
            "::",
            "::ffff:0.0.0.0",
            "10.8.1.4",
            "::ffff:10.8.1.4",
            "fd00:8:1::4",
            "fe80::4",
        ] {
            dial(Dial { target, ..DIAL }, Connect::PassLocal);
        }
    }

    #[test]
    fn the_own_address_of_another_workload_is_captured() {
        dial(
            Dial { workload: Some(WorkloadNumber(8)), target: "10.8.1.4", ..DIAL },
            Connect::Capture(WorkloadNumber(8)),
        );
    }

    #[test]
    fn a_connect_to_a_workload_of_this_node_is_what_the_table_says() {
        for target in ["10.8.1.44", "::ffff:10.8.1.44", "fd00:8:1::44"] {
            let dialled = Dial { target, ..DIAL };
            dial(dialled, Connect::Direct(POD));
            let denied = Connect::Deny { source: POD, destination: NEAR };
            dial(Dial { table: PairVerdict::Deny, ..dialled }, denied);
            dial(Dial { table: PairVerdict::Ask, ..dialled }, Connect::Capture(POD));
        }
    }

    // T-15
    #[test]
    fn without_a_daemon_no_table_permits_or_denies() {
        for table in [PairVerdict::Permit, PairVerdict::Deny, PairVerdict::Ask] {
            dial(Dial { target: "10.8.1.44", daemon: false, table, ..DIAL }, Connect::Capture(POD));
        }
    }

    #[test]
    fn the_table_is_asked_for_streams_of_others_only() {
        let dialled = Dial { target: "10.8.1.44", ..DIAL };
        dial(Dial { workload: None, ..dialled }, Connect::Pass);
        dial(Dial { stream: false, ..dialled }, Connect::Pass);
        dial(Dial { exempt: true, ..dialled }, Connect::PassExempt);
        dial(Dial { target: "10.8.1.45", ..DIAL }, Connect::Capture(POD));
    }

    // T-7
    #[test]
    fn a_socket_of_an_unknown_namespace_is_not_touched() {
        dial(Dial { workload: None, ..DIAL }, Connect::Pass);
        dial(Dial { workload: None, target: "127.0.0.1", ..DIAL }, Connect::Pass);
    }

    // T-2
    #[test]
    fn the_daemons_own_socket_is_not_touched() {
        dial(Dial { exempt: true, ..DIAL }, Connect::PassExempt);
        dial(Dial { exempt: true, target: "10.8.1.4", ..DIAL }, Connect::PassExempt);
    }

    #[test]
    fn datagrams_are_not_captured() {
        dial(Dial { stream: false, ..DIAL }, Connect::Pass);
    }

    #[derive(Clone, Copy)]
    struct Syn {
        tcp: bool,
        interface: u32,
        source: &'static str,
        target: &'static str,
        port: u16,
        direct: Option<DirectArrival>,
        captured: bool,
        to_itself: bool,
        delivery: bool,
    }

    impl Arriving for Syn {
        fn is_tcp(&self) -> bool {
            self.tcp
        }
        fn interface(&self) -> u32 {
            self.interface
        }
        fn source(&self) -> Address {
            address(self.source)
        }
        fn target(&self) -> Address {
            address(self.target)
        }
        fn target_port(&self) -> u16 {
            self.port
        }
        fn is_own(&self, asked: &Address) -> bool {
            OWN.iter().any(|own| address(own) == *asked)
        }
        fn direct(&self) -> Option<DirectArrival> {
            self.direct
        }
        fn is_exempt_port(&self, port: u16) -> bool {
            port == 9100
        }
        fn is_inbound_port(&self, port: u16) -> bool {
            port == 8080
        }
        fn is_captured(&self) -> bool {
            self.captured
        }
        fn is_to_itself(&self) -> bool {
            self.to_itself
        }
        fn is_delivery(&self) -> bool {
            self.delivery
        }
    }

    const SYN: Syn = Syn {
        tcp: true,
        interface: ETH0,
        source: "10.8.1.9",
        target: "10.8.1.4",
        port: 8080,
        direct: None,
        captured: false,
        to_itself: false,
        delivery: false,
    };

    /// A local process dials loopback.
    const LOCAL: Syn = Syn { source: "127.0.0.1", target: "127.0.0.1", interface: LOOPBACK_IFINDEX, ..SYN };

    const PASS: Steer = Steer::Pass;
    const OUTBOUND: Steer = Steer::To(SocketSlot::Outbound);
    const INBOUND: Steer = Steer::To(SocketSlot::Inbound);
    const TUNNEL: Steer = Steer::To(SocketSlot::Tunnel);

    #[track_caller]
    fn pod(syn: Syn, expected: Steer) {
        assert_eq!(steer_in_pod(&syn), expected);
    }

    #[track_caller]
    fn host(syn: Syn, expected: Steer) {
        assert_eq!(steer_in_host(&syn), expected);
    }

    #[test]
    fn a_permitted_connection_goes_to_its_application_and_every_other_to_the_daemon() {
        pod(Syn { direct: Some(DirectArrival::Passed), ..SYN }, Steer::PassDirect);
        pod(Syn { direct: Some(DirectArrival::Passed), port: 9100, ..SYN }, Steer::PassDirect);
        for stale in [DirectArrival::Steered, DirectArrival::Unseen] {
            pod(Syn { direct: Some(stale), ..SYN }, Steer::ToStale);
            // Who needs no permit loses none.
            pod(Syn { direct: Some(stale), port: 9100, ..SYN }, Steer::Pass);
        }
        let tunnel = Syn { direct: Some(DirectArrival::Passed), port: TUNNEL_PORT, ..SYN };
        pod(tunnel, Steer::To(SocketSlot::Tunnel));
        let elsewhere = Syn { direct: Some(DirectArrival::Passed), target: "10.8.1.44", ..SYN };
        pod(elsewhere, Steer::To(SocketSlot::Outbound));
        pod(Syn { direct: Some(DirectArrival::Passed), tcp: false, ..SYN }, Steer::Pass);
    }

    #[test]
    fn what_arrives_from_outside_goes_to_the_inbound_listener() {
        pod(SYN, INBOUND);
        pod(Syn { source: "fd00:8:1::9", target: "fd00:8:1::4", ..SYN }, INBOUND);
        pod(Syn { source: "fe80::9", target: "fe80::4", ..SYN }, INBOUND);
        pod(Syn { port: 22, ..SYN }, INBOUND);
    }

    #[test]
    fn what_is_meant_for_somebody_else_goes_to_the_outbound_listener() {
        pod(Syn { target: "10.8.1.77", source: "10.8.1.4", interface: LOOPBACK_IFINDEX, ..SYN }, OUTBOUND);
        // Captured by the second route of a socket that is bound to eth0.
        pod(Syn { target: "10.8.1.77", source: "10.8.1.4", ..SYN }, OUTBOUND);
        // The tunnel port and exempt ports are special only at an own address.
        pod(Syn { target: "10.8.1.77", source: "10.8.1.4", port: TUNNEL_PORT, ..SYN }, OUTBOUND);
        pod(Syn { target: "10.8.1.77", source: "10.8.1.4", port: 9100, ..SYN }, OUTBOUND);
    }

    #[test]
    fn local_connections_of_a_pod_are_left_alone() {
        // A connection to the own address shows eth0 as its interface.
        pod(Syn { source: "10.8.1.4", ..SYN }, PASS);
        pod(Syn { source: "127.0.0.1", target: "127.0.0.1", interface: LOOPBACK_IFINDEX, ..SYN }, PASS);
        pod(Syn { source: "::1", target: "::1", interface: LOOPBACK_IFINDEX, ..SYN }, PASS);
        // The daemon's delivery: the client's address, but from lo.
        pod(Syn { interface: LOOPBACK_IFINDEX, ..SYN }, PASS);
        pod(Syn { interface: LOOPBACK_IFINDEX, port: TUNNEL_PORT, ..SYN }, PASS);
    }

    #[test]
    fn the_tunnel_port_goes_to_the_tunnel_listener() {
        pod(Syn { port: TUNNEL_PORT, ..SYN }, TUNNEL);
        pod(Syn { port: TUNNEL_PORT, source: "fd00:8:1::9", target: "fd00:8:1::4", ..SYN }, TUNNEL);
    }

    #[test]
    fn an_exempt_port_is_left_alone() {
        pod(Syn { port: 9100, ..SYN }, PASS);
        pod(Syn { port: 9101, ..SYN }, INBOUND);
    }

    #[test]
    fn what_is_not_tcp_is_left_alone() {
        pod(Syn { tcp: false, ..SYN }, PASS);
        host(Syn { tcp: false, captured: true, ..SYN }, PASS);
    }

    #[test]
    fn a_captured_connect_of_a_host_workload_is_known_by_its_tuple() {
        host(Syn { target: "10.8.1.77", source: "10.8.1.4", captured: true, ..SYN }, OUTBOUND);
        host(Syn { target: "10.8.1.77", source: "10.8.1.4", captured: true, port: 22, ..SYN }, OUTBOUND);
        // Somebody else's local route: not ours.
        host(
            Syn { target: "10.8.1.77", source: "10.8.1.4", port: 22, interface: LOOPBACK_IFINDEX, ..SYN },
            PASS,
        );
    }

    #[test]
    fn a_port_of_a_host_workload_is_steered_at_every_address() {
        host(SYN, INBOUND);
        host(Syn { target: "10.8.1.200", ..SYN }, INBOUND);
        host(Syn { source: "fe80::9", target: "fe80::200", ..SYN }, INBOUND);
    }

    // T-27
    #[test]
    fn loopback_is_no_way_around_the_policy_of_a_host_workload() {
        host(LOCAL, INBOUND);
        host(Syn { target: "127.0.0.53", ..LOCAL }, INBOUND);
        host(Syn { source: "::1", target: "::1", ..LOCAL }, INBOUND);
        host(Syn { source: "10.8.1.4", ..LOCAL }, INBOUND);
        // Where the host lets packets for loopback in from outside (`route_localnet`), the daemon refuses them.
        host(Syn { target: "127.0.0.1", ..SYN }, INBOUND);
        // An entry of another connect is none of this one: a connect to loopback is never captured.
        host(Syn { captured: true, ..LOCAL }, INBOUND);
    }

    // T-27
    #[test]
    fn a_host_workload_that_talks_to_itself_is_left_alone() {
        host(Syn { to_itself: true, ..LOCAL }, PASS);
        host(Syn { to_itself: true, source: "::1", target: "::1", ..LOCAL }, PASS);
        host(Syn { to_itself: true, source: "10.8.1.4", ..SYN }, PASS);
        host(Syn { to_itself: true, ..SYN }, INBOUND);
    }

    // T-27
    #[test]
    fn a_local_client_of_a_host_workload_is_steered_however_it_dials() {
        host(Syn { source: "10.8.1.4", ..SYN }, INBOUND);
        host(Syn { source: "10.8.1.4", interface: LOOPBACK_IFINDEX, ..SYN }, INBOUND);
        host(Syn { source: "127.0.0.1", interface: LOOPBACK_IFINDEX, ..SYN }, INBOUND);
    }

    #[test]
    fn the_daemons_delivery_on_a_host_is_left_alone_only_as_announced_and_if_it_is_local() {
        host(Syn { delivery: true, interface: LOOPBACK_IFINDEX, ..SYN }, PASS);
        host(Syn { delivery: true, source: "10.8.1.4", ..SYN }, PASS);
        host(Syn { delivery: true, source: "fd00:8:1::4", target: "fd00:8:1::4", ..SYN }, PASS);
        host(Syn { delivery: true, ..LOCAL }, PASS);
        host(Syn { delivery: true, source: "::1", target: "::1", ..LOCAL }, PASS);
        host(Syn { delivery: true, ..SYN }, INBOUND);
        host(Syn { delivery: true, target: "127.0.0.1", ..SYN }, INBOUND);
        host(Syn { interface: LOOPBACK_IFINDEX, ..SYN }, INBOUND);
    }

    #[test]
    fn other_services_of_a_host_are_left_alone() {
        host(Syn { port: 22, ..SYN }, PASS);
        host(Syn { port: 9100, ..SYN }, PASS);
        host(Syn { port: 22, ..LOCAL }, PASS);
        host(Syn { port: 9100, source: "::1", target: "::1", ..LOCAL }, PASS);
        host(Syn { port: TUNNEL_PORT, ..SYN }, TUNNEL);
        // No tunnel ends at loopback.
        host(Syn { port: TUNNEL_PORT, ..LOCAL }, PASS);
        host(Syn { port: TUNNEL_PORT, source: "::1", target: "::1", ..LOCAL }, PASS);
    }

    #[derive(Clone, Copy)]
    struct Open {
        captured: bool,
        target: &'static str,
        owner: Option<WorkloadNumber>,
    }

    impl Opening for Open {
        fn is_captured(&self) -> bool {
            self.captured
        }
        fn target(&self) -> Address {
            address(self.target)
        }
        fn is_own(&self, asked: &Address) -> bool {
            OWN.iter().any(|own| address(own) == *asked)
        }
        fn port_owner(&self) -> Option<WorkloadNumber> {
            self.owner
        }
    }

    const UNIT: WorkloadNumber = WorkloadNumber(3);
    const NEIGHBOUR: WorkloadNumber = WorkloadNumber(4);
    const OPEN: Open = Open { captured: false, target: "127.0.0.1", owner: Some(NEIGHBOUR) };

    #[track_caller]
    fn open(open: Open, expected: Option<OriginKind>) {
        assert_eq!(opened(&open, UNIT), expected, "{}", open.target);
    }

    const LOCAL_ADDRESSES: [&str; 6] =
        ["127.0.0.1", "127.0.0.53", "::1", "::ffff:127.0.0.1", "10.8.1.4", "fe80::4"];

    // T-27
    #[test]
    fn a_connect_to_a_service_of_the_same_host_says_whose_it_is() {
        for target in LOCAL_ADDRESSES {
            open(Open { target, ..OPEN }, Some(OriginKind::Local));
            // Two workloads declare the port: nobody can tell whether it is the caller's own.
            open(Open { target, owner: Some(WorkloadNumber::NONE), ..OPEN }, Some(OriginKind::Local));
        }
    }

    // T-27
    #[test]
    fn only_the_owner_of_a_port_talks_to_itself_there() {
        for target in LOCAL_ADDRESSES {
            open(Open { target, owner: Some(UNIT), ..OPEN }, Some(OriginKind::Own));
        }
        open(Open { target: "10.8.1.9", owner: Some(UNIT), ..OPEN }, None);
    }

    #[test]
    fn a_connect_that_nobody_asks_about_is_not_published() {
        for target in LOCAL_ADDRESSES {
            open(Open { target, owner: None, ..OPEN }, None);
        }
        open(Open { target: "10.8.1.9", ..OPEN }, None);
    }

    #[test]
    fn a_captured_connect_says_whose_it_is_wherever_it_goes() {
        for owner in [None, Some(UNIT), Some(NEIGHBOUR)] {
            let captured = Some(OriginKind::Captured);
            open(Open { captured: true, target: "10.8.1.9", owner }, captured);
        }
    }

    // T-1
    #[test]
    fn a_captured_segment_leaves_by_lo_only() {
        assert!(may_leave(LOOPBACK_IFINDEX, || panic!("nobody asks on lo")));
        assert!(may_leave(ETH0, || false));
        assert!(!may_leave(ETH0, || true));
    }

    // T-3
    #[test]
    fn a_reset_is_held_back_from_a_captured_connect_that_waits() {
        assert!(!may_reset(true, true));
        assert!(may_reset(true, false));
        assert!(may_reset(false, true));
        assert!(may_reset(false, false));
    }

    #[test]
    fn only_a_close_in_order_leaves_a_connection_to_be_accepted() {
        for (state, expected) in [
            (1, Ended::Aborted),
            (2, Ended::Aborted),
            (4, Ended::InOrder),
            (5, Ended::InOrder),
            (8, Ended::Aborted),
            (9, Ended::InOrder),
            (11, Ended::InOrder),
        ] {
            assert_eq!(ended(state), expected, "state {state}");
        }
    }

    #[test]
    fn v4_mapped_is_told_from_v6() {
        assert!(is_v4_mapped(&address("::ffff:10.0.0.1")));
        assert!(is_v4_mapped(&address("10.0.0.1")));
        assert!(!is_v4_mapped(&address("::10.0.0.1")));
        assert!(!is_v4_mapped(&address("fd00::ffff:a00:1")));
    }
}
