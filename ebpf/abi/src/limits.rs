//! Sizes of maps, each with its reckoning and what happens at the limit.

/// Workloads with a network namespace of their own. A node runs 110 to 500 pods; nested and dying ones double it.
/// At the limit the enrolment fails and is undone: the workload is refused, which is told, and tried again. The others stay
/// as they are.
pub const WORKLOADS_MAX: u32 = 4_096;

/// Own addresses over all workloads: 16 for each of [`WORKLOADS_MAX`]. At the limit the enrolment, or the
/// change of addresses, fails and changes nothing.
pub const OWN_ADDRESSES_MAX: u32 = 65_536;

/// Own addresses of one namespace. A pod has a handful; a host with bridges and service addresses may have a hundred or two.
/// At the limit the enrolment, or the change of addresses, fails and changes nothing.
pub const STEER_ADDRESSES_MAX: u32 = 256;

/// Ports of one namespace with a rule of their own. At the limit the enrolment, or the change of ports, fails and changes
/// nothing.
pub const STEER_PORTS_MAX: u32 = 512;

/// The maps of the two above hold twice the limit: new entries are written before old ones go.
pub const STEER_SLOTS_FACTOR: u32 = 2;

/// Connections of host workloads that the daemon has not accepted yet. Entries live from the SYN to the accept, so this is
/// the number of half-open connects. At the limit a further captured connect gets no route and times out, and a local one is
/// nobody's: closed.
pub const ORIGINS_MAX: u32 = 65_536;

/// Connections that the daemon delivers inside the host's namespace at one time, as many as a node serves (60,000).
/// At the limit the delivery fails and the client is reset.
pub const DELIVERIES_MAX: u32 = 65_536;

/// Connections that the kernel let go from workload to workload, open at one time: as many as a node serves (60,000).
/// At the limit a further connection is captured: it takes the way through the daemon.
pub const DIRECT_MAX: u32 = 65_536;

/// Entries of one generation of the pair table: classes and pairs. 500 pods with 200 different rights towards 500 pods with two
/// ports each are 200,000 if every one of them is permitted or denied by the kernel.
/// At the limit the table is refused, which is told, and an empty one is in force: everything takes the way through the daemon.
pub const PAIRS_MAX: u32 = 262_144;

/// Bytes of the ring buffer of events; a power of two. An event has 104 with its header: 10,000 events, or a quarter of a
/// second at 20,000 connections a second. At the limit an event is lost, which is counted; the connection is not touched.
/// Refusals may fill half of it: who connects in vain in a loop does not hide the connections of others.
pub const DIRECT_EVENTS_BYTES: u32 = 1 << 20;

/// How often the events are to be read even if the ring says nothing, in milliseconds: it calls only when a quarter of it is
/// filled.
pub const DIRECT_EVENTS_READ_EVERY_MILLIS: u64 = 100;

/// Events that are taken at one time: what the ring holds when it calls, and some more. The rest is taken next time.
pub const DIRECT_EVENTS_AT_ONCE: usize = 4_096;

/// How long after the client's end of the handshake the destination may still look up its listener, which it does for the
/// last segment where it sent a SYN cookie, in nanoseconds: 60 s, the time after which a client's repetitions of a lost
/// segment are rarer than that. At the limit the segment is handed to the daemon, which has no connection of that kind: reset.
/// Ends at once where the destination's socket stands.
pub const DIRECT_HANDSHAKE_NANOS: u64 = 60_000_000_000;

/// Directions of direct connections with a shortcut: two for each of [`DIRECT_MAX`] that are open, and two for each of
/// [`SHORTCUTS_CLOSED_MAX`] that closed lately. At the limit a connection gets none: it takes the way through the host's stack.
pub const SHORTCUTS_MAX: u32 = 262_144;

/// Connections that closed within the last [`SHORTCUT_AFTER_CLOSE_NANOS`] and whose shortcuts are kept for what comes late. At the
/// limit the ones that closed first lose theirs: a segment that is repeated after that takes the way through the host's stack.
pub const SHORTCUTS_CLOSED_MAX: usize = 65_536;

/// How long after its end a connection keeps its shortcut, in nanoseconds: the time that its port pair is in TIME_WAIT (60 s), in
/// which a FIN may come again (T-16).
pub const SHORTCUT_AFTER_CLOSE_NANOS: u64 = 60_000_000_000;

/// Slots of the counters: reasons from 0, verdicts from [`crate::reason::VERDICT_BASE`].
pub const COUNTERS_MAX: u32 = 64;

/// Slots of the node's state.
pub const STATE_MAX: u32 = 8;

/// Listeners of one namespace: one for each `SocketSlot`.
pub const SOCKETS_MAX: u32 = 3;

/// Bytes of a workload's key, `<namespace>_<name>`: 63 for a namespace, 253 for a name, and the separator.
pub const KEY_LEN_MAX: usize = 320;

/// How long after its end a connection of a host workload is still attributed, in nanoseconds. The kernel keeps the port
/// pair in TIME_WAIT for at least 1 s before it may be used again, so no other socket can own it within this time.
pub const ORIGIN_AFTER_CLOSE_NANOS: u64 = 1_000_000_000;

// Arrays have no limit to be reached: what needs a slot has one.
const _: () = {
    assert!(crate::names::STATE_EPOCH < STATE_MAX);
    assert!(crate::names::STATE_LAST_NUMBER < STATE_MAX);
    assert!(crate::names::STATE_CGROUP < STATE_MAX);
    assert!(crate::names::STATE_GENERATION < STATE_MAX);
    assert!(DIRECT_EVENTS_BYTES.is_power_of_two());
    assert!(SHORTCUTS_MAX as usize >= 2 * (DIRECT_MAX as usize + SHORTCUTS_CLOSED_MAX));
    assert!(crate::SocketSlot::ALL.len() == SOCKETS_MAX as usize);
};
