//! The tunnel's own words: what its head may ask for, and which tunnels may be shared.
//!
//! [`header`] reads `:authority`; [`route`] is the key of the pool. Sockets and HTTP/2 are the daemon's.

pub mod header;
pub mod route;

pub use ebpf_abi::TUNNEL_PORT;

/// Where the certificate authority listens.
pub const CA_PORT: u16 = 15_012;

/// Where the daemon shows metrics.
pub const METRICS_PORT: u16 = 15_020;

/// Where the daemon says whether it is ready.
pub const READY_PORT: u16 = 15_021;

/// Ports that no tunnel may ask for (T-8).
pub const RESERVED_PORTS: [u16; 4] = [TUNNEL_PORT, CA_PORT, METRICS_PORT, READY_PORT];
