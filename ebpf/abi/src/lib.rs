//! What the kernel programs and the daemon agree on: names, sizes, numbers and memory layouts.
//!
//! [`names`] -> [`limits`] -> [`reason`] (what is counted) -> [`workload`] (who) -> [`flow`] (which connection) -> [`direct`]
//! (which pairs the kernel permits by itself) -> [`shortcut`] (which packets pass the host's stack by).
//!
//! Nothing is decided here, and nothing here knows of identities, certificates or policy.
#![no_std]

pub mod names;

pub mod limits;

pub mod reason;

pub mod workload;

pub mod flow;

pub mod direct;

pub mod shortcut;

#[cfg(feature = "user")]
mod user;

pub use direct::{
    DirectArrival, DirectEvent, DirectEventKind, DirectValue, Generation, PairKey, PairValue, PairVerdict,
};
pub use flow::{Address, Delivery, Origin, OriginKind, Port, PortAction, PortRule, SocketSlot, Tuple};
pub use reason::{DropReason, Verdict};
pub use shortcut::{ShortcutKey, ShortcutValue};
pub use workload::{CapturedRecord, ExemptRecord, OwnAddressKey, SteerMeta, WorkloadNumber, WorkloadValue};

/// Version of every layout and meaning in this package; part of the pin path, so two versions never share a map.
/// Raise it when a map's layout, a slot's meaning or the contract of a program changes.
pub const SCHEMA_VERSION: u32 = 3;

/// Port of the tunnel between nodes. The kernel programs steer it to [`SocketSlot::Tunnel`].
pub const TUNNEL_PORT: u16 = 15008;

/// Index of `lo` in every network namespace (`LOOPBACK_IFINDEX` of the kernel).
pub const LOOPBACK_IFINDEX: u32 = 1;
