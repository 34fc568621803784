//! The shortcut of direct connections: from the host side of one pod's veth straight into the other pod.

use crate::flow::Tuple;

/// Key of the map `SHORTCUTS`: one direction of a connection, as its packets show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ShortcutKey {
    /// Index of the interface by which the packets come from their pod. Who forges packets does it on another one (T-16).
    pub interface: u32,
    pub tuple: Tuple,
}

/// Value of the map `SHORTCUTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ShortcutValue {
    /// Cookie of the client's socket.
    pub socket_cookie: u64,
    /// When the client's socket was closed, nanoseconds of the monotonic clock; 0 while it is open.
    pub closed_nanos: u64,
    /// Index of the host side of the other pod's veth.
    pub interface: u32,
    pub reserved: u32,
}

// A padding byte in a key would be a lookup that misses.
const _: () = assert!(size_of::<ShortcutKey>() == 4 + 36);
const _: () = assert!(size_of::<ShortcutValue>() == 8 + 8 + 4 + 4);
