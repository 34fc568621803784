//! What the kernel counts. The number is the slot in the map `COUNTERS`, the label is the value in metrics.

/// Why the kernel side refused or dropped something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum DropReason {
    /// A connect was refused because its socket could not be marked.
    MarkFailed = 0,
    /// A connect was refused because its socket could not be recorded as captured.
    RecordFailed = 1,
    /// A segment of a captured connection was about to leave by a real interface (T-1, T-5).
    CapturedEgress = 2,
    /// A reset for a captured connect that waits for a daemon was held back (T-3).
    ResetWhileWaiting = 3,
    /// No outbound listener: the daemon is away.
    NoOutboundListener = 4,
    /// No inbound listener: the daemon is away.
    NoInboundListener = 5,
    /// No tunnel listener: the daemon is away.
    NoTunnelListener = 6,
    /// The kernel did not take the listener that the slot names.
    SteerFailed = 7,
    /// The origin of a host workload's connect could not be published: a captured one finds no route, a local one is nobody's.
    OriginFailed = 8,
    /// A socket that listens kept its record or mark, because clearing failed.
    ClearFailed = 9,
    /// A connect was refused because the pair table denies it.
    DirectDenied = 10,
    /// A permitted connection could not be published, because the map is full: it was captured.
    DirectUnpublished = 11,
    /// A permitted connection met another program than that of its destination, or none: it was cut before its first byte (T-13).
    DirectMisled = 12,
    /// A published connection arrived without a permit in the table of that moment, or a second time: handed to the daemon.
    DirectStale = 13,
    /// An event of a direct connection was lost, because the daemon did not read fast enough.
    DirectEventLost = 14,
    /// A direct connection got no shortcut, because the map is full: it takes the way through the host's stack.
    ShortcutFull = 15,
}

impl DropReason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; 16] = [
        Self::MarkFailed,
        Self::RecordFailed,
        Self::CapturedEgress,
        Self::ResetWhileWaiting,
        Self::NoOutboundListener,
        Self::NoInboundListener,
        Self::NoTunnelListener,
        Self::SteerFailed,
        Self::OriginFailed,
        Self::ClearFailed,
        Self::DirectDenied,
        Self::DirectUnpublished,
        Self::DirectMisled,
        Self::DirectStale,
        Self::DirectEventLost,
        Self::ShortcutFull,
    ];

    /// The slot in the map `COUNTERS`.
    pub const fn slot(self) -> u32 {
        self as u32
    }

    /// The label in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::MarkFailed => "mark_failed",
            Self::RecordFailed => "record_failed",
            Self::CapturedEgress => "captured_egress",
            Self::ResetWhileWaiting => "reset_while_waiting",
            Self::NoOutboundListener => "no_outbound_listener",
            Self::NoInboundListener => "no_inbound_listener",
            Self::NoTunnelListener => "no_tunnel_listener",
            Self::SteerFailed => "steer_failed",
            Self::OriginFailed => "origin_failed",
            Self::ClearFailed => "clear_failed",
            Self::DirectDenied => "direct_denied",
            Self::DirectUnpublished => "direct_unpublished",
            Self::DirectMisled => "direct_misled",
            Self::DirectStale => "direct_stale",
            Self::DirectEventLost => "direct_event_lost",
            Self::ShortcutFull => "shortcut_full",
        }
    }
}

/// What the kernel side did with a connection that it let go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Verdict {
    /// A connect was marked and recorded.
    Captured = VERDICT_BASE,
    /// A connect of an enrolled workload was left alone: loopback or an own address.
    PassedConnect = VERDICT_BASE + 1,
    /// A connect of the daemon itself.
    PassedExempt = VERDICT_BASE + 2,
    /// An arriving connection was left alone: local, or an exempt port.
    PassedArrival = VERDICT_BASE + 3,
    /// Handed to the outbound listener.
    SteeredOutbound = VERDICT_BASE + 4,
    /// Handed to the inbound listener.
    SteeredInbound = VERDICT_BASE + 5,
    /// Handed to the tunnel listener.
    SteeredTunnel = VERDICT_BASE + 6,
    /// A connect was permitted by the pair table and published.
    Direct = VERDICT_BASE + 7,
    /// A connect that the pair table had permitted was captured before its SYN: it lost its permit in between (T-14).
    DirectCaptured = VERDICT_BASE + 8,
    /// A published connection arrived and went to its application.
    PassedDirect = VERDICT_BASE + 9,
    /// A segment of a direct connection went past the host's stack. Counted by segment, as large as the sender makes it.
    Shortcut = VERDICT_BASE + 10,
}

impl Verdict {
    /// All verdicts, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::Captured,
        Self::PassedConnect,
        Self::PassedExempt,
        Self::PassedArrival,
        Self::SteeredOutbound,
        Self::SteeredInbound,
        Self::SteeredTunnel,
        Self::Direct,
        Self::DirectCaptured,
        Self::PassedDirect,
        Self::Shortcut,
    ];

    /// The slot in the map `COUNTERS`.
    pub const fn slot(self) -> u32 {
        self as u32
    }

    /// The label in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::PassedConnect => "passed_connect",
            Self::PassedExempt => "passed_exempt",
            Self::PassedArrival => "passed_arrival",
            Self::SteeredOutbound => "steered_outbound",
            Self::SteeredInbound => "steered_inbound",
            Self::SteeredTunnel => "steered_tunnel",
            Self::Direct => "direct",
            Self::DirectCaptured => "direct_captured",
            Self::PassedDirect => "passed_direct",
            Self::Shortcut => "shortcut",
        }
    }
}

/// First slot of the verdicts.
pub const VERDICT_BASE: u32 = 32;

const _: () = {
    let mut slot = 0;
    while slot < DropReason::ALL.len() {
        assert!(DropReason::ALL[slot].slot() as usize == slot);
        slot += 1;
    }
    let mut slot = 0;
    while slot < Verdict::ALL.len() {
        assert!(Verdict::ALL[slot].slot() as usize == VERDICT_BASE as usize + slot);
        slot += 1;
    }
    assert!(DropReason::ALL.len() <= VERDICT_BASE as usize);
    assert!(VERDICT_BASE as usize + Verdict::ALL.len() <= crate::limits::COUNTERS_MAX as usize);
};
