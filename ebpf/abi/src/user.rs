//! Lets the daemon read and write these layouts through aya.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::{
    direct::{DirectEvent, DirectValue, PairKey, PairValue},
    flow::{Address, Delivery, Origin, PortRule, Tuple},
    shortcut::{ShortcutKey, ShortcutValue},
    workload::{CapturedRecord, ExemptRecord, OwnAddressKey, SteerMeta, WorkloadNumber, WorkloadValue},
};

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self::v4(v4.octets()),
            IpAddr::V6(v6) => Self(v6.octets()),
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        Ipv6Addr::from(address.0).to_canonical()
    }
}

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        Self::v4(address.octets())
    }
}

impl Tuple {
    /// The connection from `source` to `target`.
    pub fn new(source: SocketAddr, target: SocketAddr) -> Self {
        Self {
            source: source.ip().into(),
            target: target.ip().into(),
            source_port: source.port(),
            target_port: target.port(),
        }
    }
}

impl DirectEvent {
    /// Reads an entry of the ring buffer; `None` where it has another size.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        // SAFETY: the size is checked, the read needs no alignment, and every bit pattern is a value of the type.
        (bytes.len() == size_of::<Self>()).then(|| unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

macro_rules! plain {
    ($($layout:ty),+ $(,)?) => {
        $(
            // SAFETY: the type is `repr(C)` or `repr(transparent)`, has no padding (sizes are asserted beside the
            // definitions), no pointers, and every bit pattern is a value of it.
            unsafe impl aya::Pod for $layout {}
        )+
    };
}

plain!(
    Address,
    CapturedRecord,
    Delivery,
    DirectEvent,
    DirectValue,
    ExemptRecord,
    Origin,
    OwnAddressKey,
    PairKey,
    PairValue,
    PortRule,
    ShortcutKey,
    ShortcutValue,
    SteerMeta,
    Tuple,
    WorkloadNumber,
    WorkloadValue,
);
