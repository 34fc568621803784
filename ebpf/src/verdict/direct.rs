//! The node-local fast path: whether the kernel lets a connection by without the daemon.
//!
//! Asked three times for each connection, always of the table in force at that moment: [`judge`] when it connects, [`publish`]
//! before its SYN, [`arrive`] where the SYN arrives. A table that changes in between is noticed by the next question (T-14).

use ebpf_abi::{
    DirectArrival, DirectValue, PairVerdict, Port, TUNNEL_PORT, WorkloadNumber,
    limits::DIRECT_HANDSHAKE_NANOS,
};

/// One generation of the pair table.
pub trait PairTable {
    /// The class of a source; `None` where it has no rights.
    fn class(&self, source: WorkloadNumber) -> Option<u32>;
    /// What the table says of sources of a class towards one port, or towards [`ebpf_abi::PairKey::OTHER_PORTS`].
    fn pair(&self, class: u32, destination: WorkloadNumber, port: Port) -> Option<PairVerdict>;
}

/// What the table says of a connect. What it does not say is the daemon's to decide.
#[inline(always)]
pub fn judge(
    table: &impl PairTable,
    source: WorkloadNumber,
    destination: WorkloadNumber,
    port: Port,
) -> PairVerdict {
    // No application is served at the tunnel's port, and port 0 stands for others.
    if port == TUNNEL_PORT || port == OTHER_PORTS {
        return PairVerdict::Ask;
    }
    let Some(class) = table.class(source) else {
        return PairVerdict::Ask;
    };
    if let Some(verdict) = table.pair(class, destination, port) {
        return verdict;
    }
    table.pair(class, destination, OTHER_PORTS).unwrap_or(PairVerdict::Ask)
}

/// What is known of a socket of a pod right before its SYN.
pub trait Departing {
    /// Whether its connect was captured.
    fn is_captured(&self) -> bool;
    /// Whether the daemon recorded it as its own.
    fn is_exempt(&self) -> bool;
    /// Whose socket it is, if it belongs to a pod whose connects are captured.
    fn workload(&self) -> Option<WorkloadNumber>;
    /// Whether it goes to loopback or to an own address of the workload.
    fn is_local(&self, workload: WorkloadNumber) -> bool;
    /// Who alone has the address from which it connects.
    fn source_owner(&self) -> Option<WorkloadNumber>;
    /// Who alone has the address that it dials.
    fn target_owner(&self) -> Option<WorkloadNumber>;
    /// What the table in force says of it.
    fn judge(&self, source: WorkloadNumber, destination: WorkloadNumber) -> PairVerdict;
}

/// What happens to a connection right before its SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// Not ours, or decided by the connect hook.
    Leave,
    /// Is published for the destination.
    Publish { source: WorkloadNumber, destination: WorkloadNumber },
    /// The connect hook let it go and nothing permits it any more: captured here and now (T-14, T-17).
    Capture(WorkloadNumber),
}

/// A socket of a pod that is neither captured nor local was let go by the table, and by nothing else: so no record on the
/// socket is needed to know it, and whatever the table does not permit in this moment is captured. With Fast Open this may be
/// long after the connect.
#[inline(always)]
pub fn depart(socket: &impl Departing) -> Departure {
    if socket.is_captured() {
        return Departure::Leave;
    }
    let Some(source) = socket.workload() else {
        return Departure::Leave;
    };
    if socket.is_exempt() || socket.is_local(source) {
        return Departure::Leave;
    }
    // Who may bind to addresses of others must not be taken for them by the application.
    if socket.source_owner() != Some(source) {
        return Departure::Capture(source);
    }
    let Some(destination) = socket.target_owner() else {
        return Departure::Capture(source);
    };
    match socket.judge(source, destination) {
        PairVerdict::Permit => Departure::Publish { source, destination },
        // The daemon refuses what the table denies by now: it is too late for the connect to fail.
        PairVerdict::Deny | PairVerdict::Ask => Departure::Capture(source),
    }
}

/// Whether a published connection may go to the application of `instance`, the enrolment whose program this is.
#[inline(always)]
pub fn arrive(
    entry: &DirectValue,
    instance: WorkloadNumber,
    now_nanos: u64,
    verdict: impl FnOnce() -> PairVerdict,
) -> DirectArrival {
    if instance == WorkloadNumber::NONE || entry.destination != instance {
        // Meant for another enrolment, which had the address before (T-13): nobody's here.
        return DirectArrival::Unseen;
    }
    if is_over(entry, now_nanos) || verdict() != PairVerdict::Permit {
        return DirectArrival::Steered;
    }
    DirectArrival::Passed
}

/// Whether no listener is to be looked up any more for this connection: a further SYN is another one.
///
/// The client is done first. With a SYN cookie its last segment looks up the listener once more, so the destination's socket
/// has the last word.
#[inline(always)]
fn is_over(entry: &DirectValue, now_nanos: u64) -> bool {
    let is_late = entry.established_nanos != 0
        && now_nanos.saturating_sub(entry.established_nanos) >= DIRECT_HANDSHAKE_NANOS;
    entry.accepted != 0 || is_late
}

/// What the client's socket found when its handshake was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stood {
    /// The application of the destination.
    Direct,
    /// The daemon: not direct, and the daemon's to tell.
    Steered,
    /// Somebody whose program did not see it: another owner of the address (T-13).
    Misled,
}

#[inline(always)]
pub fn stood(entry: &DirectValue) -> Stood {
    if entry.arrival == DirectArrival::Passed as u32 {
        Stood::Direct
    } else if entry.arrival == DirectArrival::Steered as u32 {
        Stood::Steered
    } else {
        Stood::Misled
    }
}

/// What the kernel counts of a TCP connection: sequence numbers, in which SYN and FIN take one each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// The state before CLOSE, in the kernel's numbers.
    pub last_state: u32,
    pub bytes_acked: u64,
    pub bytes_received: u64,
    /// The first byte that is not acknowledged, and the one after the last that was sent.
    pub first_unacked: u32,
    pub next: u32,
    /// What had been received when our FIN was acknowledged.
    pub received_at_half: u64,
}

/// Payload in both directions, as {sent, received}.
#[inline(always)]
pub fn payload(counted: &Counted) -> [u64; 2] {
    let is_all_acked = counted.first_unacked == counted.next;
    let our_fin = is_all_acked && matches!(counted.last_state, TCP_FIN_WAIT2 | TCP_CLOSING | TCP_LAST_ACK);
    let their_fin = match counted.last_state {
        TCP_CLOSE_WAIT | TCP_CLOSING | TCP_LAST_ACK => true,
        // The kernel leaves this state early where the application closed its socket and the other side did not.
        TCP_FIN_WAIT2 => counted.bytes_received > counted.received_at_half,
        _ => false,
    };
    [
        counted.bytes_acked.saturating_sub(SYN).saturating_sub(u64::from(our_fin)),
        counted.bytes_received.saturating_sub(u64::from(their_fin)),
    ]
}

const OTHER_PORTS: Port = ebpf_abi::PairKey::OTHER_PORTS;
/// Our SYN is acknowledged like a byte.
const SYN: u64 = 1;

// Numbers of include/net/tcp_states.h, which are part of the kernel's interface.
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE_WAIT: u32 = 8;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;
