//! Which connection: addresses, ports, tuples, and the daemon's listeners.

use crate::workload::WorkloadNumber;

/// An address of either family, in network byte order; IPv4 as `::ffff:a.b.c.d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Address(pub [u8; 16]);

impl Address {
    /// From the four bytes of an IPv4 address.
    pub const fn v4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Self([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d])
    }
}

/// A port as a map key, in host byte order.
pub type Port = u16;

/// What `steer` does with a port of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PortAction {
    /// In a pod: connections to this port are left alone.
    Exempt = 1,
    /// In the host's namespace: connections to this port are handed to the inbound listener.
    Inbound = 2,
}

/// Value of the map `STEER_PORTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PortRule {
    /// A [`PortAction`].
    pub action: u32,
    /// The host workload that alone declares the port; [`WorkloadNumber::NONE`] where several do, and in a pod.
    pub owner: WorkloadNumber,
}

impl PortRule {
    /// A port of a pod that is left alone.
    pub const EXEMPT: Self = Self { action: PortAction::Exempt as u32, owner: WorkloadNumber::NONE };

    /// A port that `owner` serves on the host.
    pub const fn inbound(owner: WorkloadNumber) -> Self {
        Self { action: PortAction::Inbound as u32, owner }
    }
}

/// The daemon's listeners of one namespace: the slot in the map `SOCKETS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum SocketSlot {
    /// Captured connections on their way out. The listener is IP_TRANSPARENT.
    Outbound = 0,
    /// Connections that arrive at a port of the workload.
    Inbound = 1,
    /// Tunnels from other nodes.
    Tunnel = 2,
}

impl SocketSlot {
    /// All slots, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Outbound, Self::Inbound, Self::Tunnel];

    /// The index in the map `SOCKETS`.
    pub const fn index(self) -> u32 {
        self as u32
    }
}

/// The four parts of a connection as its client sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Tuple {
    pub source: Address,
    pub target: Address,
    /// Host byte order.
    pub source_port: u16,
    /// Host byte order.
    pub target_port: u16,
}

impl Tuple {
    /// The same connection as the other end sees it.
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self {
            source: self.target,
            target: self.source,
            source_port: self.target_port,
            target_port: self.source_port,
        }
    }
}

/// Where a connection of a host workload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OriginKind {
    /// To a service of the same host; the inbound side asks who opened it (T-27).
    Local = 0,
    /// It was captured; the outbound side asks who opened it.
    Captured = 1,
    /// To the workload itself: left alone. The entry lives until the connection stands; nobody takes it.
    Own = 2,
}

/// Value of the map `ORIGINS`, key [`Tuple`]: who opened this connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Origin {
    pub workload: WorkloadNumber,
    /// An [`OriginKind`].
    pub kind: u32,
    /// Cookie of the client's socket.
    pub socket_cookie: u64,
    /// When the client's socket was closed in order, nanoseconds of the monotonic clock; 0 while it is open.
    pub closed_nanos: u64,
}

/// Value of the map `DELIVERIES`, key [`Tuple`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Delivery {
    pub workload: WorkloadNumber,
}

// A padding byte in a key would be a lookup that misses.
const _: () = assert!(size_of::<Address>() == 16 && align_of::<Address>() == 1);
const _: () = assert!(size_of::<Tuple>() == 16 + 16 + 2 + 2);
const _: () = assert!(size_of::<PortRule>() == 4 + 4);
const _: () = assert!(size_of::<Origin>() == 4 + 4 + 8 + 8);
const _: () = assert!(size_of::<Delivery>() == 4);
