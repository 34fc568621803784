//! Names of programs, maps and globals in the object, which are also their names under the pin path.

/// Program on `cgroup/connect4`: captures IPv4 connects.
pub const PROGRAM_CONNECT4: &str = "connect4";
/// Program on `cgroup/connect6`: captures IPv6 and v4-mapped connects.
pub const PROGRAM_CONNECT6: &str = "connect6";
/// Program on `sock_ops`: clears sockets that listen, publishes the origin of host connects.
pub const PROGRAM_SOCKET_EVENTS: &str = "socket_events";
/// Program on `cgroup_skb/egress`: no captured segment leaves by a real interface.
pub const PROGRAM_GUARD_EGRESS: &str = "guard_egress";
/// Program on `cgroup_skb/ingress`: a captured connect waits for a daemon instead of being refused.
pub const PROGRAM_GUARD_INGRESS: &str = "guard_ingress";
/// Program on `sk_lookup`: hands connections to the daemon's listeners.
pub const PROGRAM_STEER: &str = "steer";
/// Program on `tcx/ingress` of the host side of a pod's veth: hands segments of direct connections to the other pod.
pub const PROGRAM_SHORTCUT: &str = "shortcut";

/// Programs that are attached to a cgroup, in the order of attachment: guards before capture.
pub const CGROUP_PROGRAMS: [&str; 5] =
    [PROGRAM_GUARD_EGRESS, PROGRAM_GUARD_INGRESS, PROGRAM_SOCKET_EVENTS, PROGRAM_CONNECT4, PROGRAM_CONNECT6];

/// Socket storage: sockets of the daemon, which no hook touches.
pub const MAP_EXEMPT: &str = "EXEMPT";
/// Socket storage: sockets whose connection was captured.
pub const MAP_CAPTURED: &str = "CAPTURED";
/// Network namespace cookie -> workload.
pub const MAP_WORKLOADS: &str = "WORKLOADS";
/// {workload, address}: the workload's own addresses, for the connect hooks.
pub const MAP_OWN_ADDRESSES: &str = "OWN_ADDRESSES";
/// Connections of host workloads -> who opened them.
pub const MAP_ORIGINS: &str = "ORIGINS";
/// Connections by which the daemon delivers inside the host's namespace.
pub const MAP_DELIVERIES: &str = "DELIVERIES";
/// Address -> the one pod of this node that has it, for the connect hooks.
pub const MAP_LOCAL_ADDRESSES: &str = "LOCAL_ADDRESSES";
/// The pair table: one slot, which holds the map of the generation in force. It is replaced as a whole.
pub const MAP_PAIRS: &str = "PAIRS";
/// Connections that the kernel let go directly.
pub const MAP_DIRECT: &str = "DIRECT";
/// Ring buffer of what happened to such connections.
pub const MAP_DIRECT_EVENTS: &str = "DIRECT_EVENTS";
/// One slot with a listener of the daemon; it empties itself when the daemon ends (T-15).
pub const MAP_DAEMON: &str = "DAEMON";
/// {interface, tuple} of a direct connection's packets -> the interface of the other pod.
pub const MAP_SHORTCUTS: &str = "SHORTCUTS";
/// Workload -> index of the host side of its veth, where its packets may take a shortcut.
pub const MAP_HOST_INTERFACES: &str = "HOST_INTERFACES";
/// Counters per CPU; the slots are the numbers of `DropReason` and `Verdict`.
pub const MAP_COUNTERS: &str = "COUNTERS";
/// Facts of the node that outlive a daemon; slots are the `STATE_*` constants. Only user space uses it.
pub const MAP_STATE: &str = "STATE";

/// Maps of the node, pinned once and shared by all instances of all programs.
pub const SHARED_MAPS: [&str; 15] = [
    MAP_EXEMPT,
    MAP_CAPTURED,
    MAP_WORKLOADS,
    MAP_OWN_ADDRESSES,
    MAP_ORIGINS,
    MAP_DELIVERIES,
    MAP_LOCAL_ADDRESSES,
    MAP_PAIRS,
    MAP_DIRECT,
    MAP_DIRECT_EVENTS,
    MAP_DAEMON,
    MAP_SHORTCUTS,
    MAP_HOST_INTERFACES,
    MAP_COUNTERS,
    MAP_STATE,
];

/// Listeners of one namespace, by `SocketSlot`.
pub const MAP_SOCKETS: &str = "SOCKETS";
/// Own addresses of one namespace, for `steer`.
pub const MAP_STEER_ADDRESSES: &str = "STEER_ADDRESSES";
/// Ports of one namespace that are treated specially, for `steer`; those of the host also for `socket_events` of its
/// workloads.
pub const MAP_STEER_PORTS: &str = "STEER_PORTS";
/// Whose instance this is; read back by a successor. Only user space uses it.
pub const MAP_STEER_META: &str = "STEER_META";

/// Maps of one instance of `steer`, that is of one network namespace.
pub const STEER_MAPS: [&str; 4] = [MAP_SOCKETS, MAP_STEER_ADDRESSES, MAP_STEER_PORTS, MAP_STEER_META];

/// Global `u32`: our bit, or bits, in a socket's mark.
pub const GLOBAL_MARK: &str = "MARK";
/// Global `u32`: number of the enrolment whose namespace this instance of `steer` serves; 0 in the host's (T-13).
pub const GLOBAL_WORKLOAD: &str = "WORKLOAD";
/// Global `u32`: number of the host workload whose cgroup this instance is attached to; 0 in the instance of the node.
pub const GLOBAL_HOST_WORKLOAD: &str = "HOST_WORKLOAD";
/// Global `u64`: cookie of the host's network namespace; only meaningful beside `HOST_WORKLOAD`.
pub const GLOBAL_HOST_NETNS_COOKIE: &str = "HOST_NETNS_COOKIE";
/// Global `u32`: 1 in the `steer` instance of the host's namespace, else 0.
pub const GLOBAL_HOST: &str = "HOST";

/// Slot of `STATE`: epoch of the daemon that may write (T-24).
pub const STATE_EPOCH: u32 = 0;
/// Slot of `STATE`: the workload number that was given last.
pub const STATE_LAST_NUMBER: u32 = 1;
/// Slot of `STATE`: the generation of the pair table that was given last.
pub const STATE_GENERATION: u32 = 3;
/// Slot of `STATE`: id of the cgroup to which the programs of the node are attached.
pub const STATE_CGROUP: u32 = 2;
