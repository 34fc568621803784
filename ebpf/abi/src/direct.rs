//! The node-local fast path: which pairs of workloads the kernel permits by itself, which connections it let by, and what it
//! tells of them.

use crate::{
    flow::{Port, Tuple},
    workload::WorkloadNumber,
};

/// Number of one complete pair table. Raised with each; a successor goes on where its predecessor stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Generation(pub u32);

/// What the kernel does with connects of a pair. What a table does not list is [`PairVerdict::Ask`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum PairVerdict {
    /// The connection goes to the destination directly.
    Permit = 1,
    /// The connect is refused.
    Deny = 2,
    /// The daemon decides: the connect is captured.
    Ask = 3,
}

impl PairVerdict {
    /// Reads back a number; one that is none asks the daemon.
    pub const fn of(number: u32) -> Self {
        match number {
            1 => Self::Permit,
            2 => Self::Deny,
            _ => Self::Ask,
        }
    }
}

/// Key of one generation in the map `PAIRS`: a pair, or the class of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct PairKey {
    /// Class of the source, or its number where the entry says which class it has.
    class: u32,
    destination: WorkloadNumber,
    port: Port,
    kind: u16,
}

impl PairKey {
    /// Sources of a class towards one port of a destination; with port [`Self::OTHER_PORTS`] towards all that have no entry of
    /// their own.
    pub const fn pair(class: u32, destination: WorkloadNumber, port: Port) -> Self {
        Self { class, destination, port, kind: KIND_PAIR }
    }

    /// The entry that says which class a source has. Written from the classes of a table, never listed among its pairs.
    pub const fn class_of(source: WorkloadNumber) -> Self {
        Self { class: source.0, destination: WorkloadNumber::NONE, port: 0, kind: KIND_CLASS }
    }

    /// The port that stands for every port without an entry of its own.
    pub const OTHER_PORTS: Port = 0;

    /// Whether this is a pair.
    pub const fn is_pair(&self) -> bool {
        self.kind == KIND_PAIR
    }
}

const KIND_PAIR: u16 = 0;
const KIND_CLASS: u16 = 1;

/// Value of one generation in the map `PAIRS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PairValue {
    /// A [`PairVerdict`], or the class of a source.
    pub value: u32,
    /// The generation to which the entry belongs.
    pub generation: Generation,
}

/// How the destination's own program received the first segment of a direct connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DirectArrival {
    /// It did not see it yet.
    Unseen = 0,
    /// It let it by.
    Passed = 1,
    /// It handed it to the daemon: the pair had lost its permit.
    Steered = 2,
}

/// Value of the map `DIRECT`, key [`Tuple`]: a connection that the kernel permitted. It lives from before the SYN until the
/// client's socket is closed. Each field has one writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct DirectValue {
    pub source: WorkloadNumber,
    pub destination: WorkloadNumber,
    /// The table that permitted it.
    pub generation: Generation,
    /// A [`DirectArrival`]; written by the destination's `steer`.
    pub arrival: u32,
    /// 1 as soon as the destination's socket stands: no SYN with this tuple is let by any more. Written by `socket_events` for
    /// the destination.
    pub accepted: u32,
    pub reserved: u32,
    /// Cookie of the client's socket.
    pub socket_cookie: u64,
    /// When it was published, nanoseconds of the monotonic clock.
    pub opened_nanos: u64,
    /// When the client's handshake was done; 0 before that.
    pub established_nanos: u64,
    /// Bytes that the client had received when its FIN was acknowledged; a FIN counts as one.
    pub received_at_half: u64,
}

impl DirectValue {
    /// Whether it carries or will carry bytes past the daemon.
    pub const fn is_established(&self) -> bool {
        self.established_nanos != 0
    }
}

/// What an entry of the ring buffer `DIRECT_EVENTS` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DirectEventKind {
    /// The client's handshake is done.
    Opened = 1,
    /// The client's socket is closed; it was opened before.
    Closed = 2,
    /// A connect was refused by the table. Only the target of its tuple is known.
    Refused = 3,
}

/// Entry of the ring buffer `DIRECT_EVENTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct DirectEvent {
    /// A [`DirectEventKind`].
    pub kind: u32,
    pub source: WorkloadNumber,
    pub destination: WorkloadNumber,
    /// The table that permitted or denied it.
    pub generation: Generation,
    /// As the client sees it; of a refused one the source is `::` with port 0.
    pub tuple: Tuple,
    /// Of a closed one: 1 where it was reset or given up, 0 where it ended in order.
    pub aborted: u32,
    /// Cookie of the client's socket.
    pub socket_cookie: u64,
    /// When it happened, nanoseconds of the monotonic clock.
    pub at_nanos: u64,
    /// Of a closed one: from the end of the handshake on.
    pub duration_nanos: u64,
    /// Of a closed one: payload that the client sent and the destination acknowledged.
    pub sent_bytes: u64,
    /// Of a closed one: payload that the client received.
    pub received_bytes: u64,
}

impl DirectEvent {
    /// What happened; `None` for a number that this version does not know.
    pub const fn kind(&self) -> Option<DirectEventKind> {
        match self.kind {
            1 => Some(DirectEventKind::Opened),
            2 => Some(DirectEventKind::Closed),
            3 => Some(DirectEventKind::Refused),
            _ => None,
        }
    }
}

// A padding byte in a key would be a lookup that misses, and one in an event an unset byte.
const _: () = assert!(size_of::<PairKey>() == 4 + 4 + 2 + 2);
const _: () = assert!(size_of::<PairValue>() == 4 + 4);
const _: () = assert!(size_of::<DirectValue>() == 6 * 4 + 4 * 8);
const _: () = assert!(size_of::<DirectEvent>() == 4 * 4 + 36 + 4 + 5 * 8);
