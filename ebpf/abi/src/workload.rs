//! Who: workloads, their addresses, and the records that the hooks leave on sockets.

use core::fmt;

use crate::{flow::Address, limits::KEY_LEN_MAX};

/// Number of one enrolment. Unique on a node for as long as its pins live: a workload that is enrolled again gets a
/// new one, and none is 0 (T-13).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct WorkloadNumber(pub u32);

impl WorkloadNumber {
    /// The number that is never given.
    pub const NONE: Self = Self(0);
}

impl fmt::Display for WorkloadNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Value of the map `WORKLOADS`; the key is the cookie of the network namespace (`u64`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct WorkloadValue {
    pub number: WorkloadNumber,
    /// `WORKLOAD_*` bits.
    pub flags: u32,
}

/// Connects of this workload are captured. Without it the namespace is known but left alone.
pub const WORKLOAD_CAPTURE: u32 = 1;

/// Key of the map `OWN_ADDRESSES`; the value is a `u8` without meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct OwnAddressKey {
    pub workload: WorkloadNumber,
    pub address: Address,
}

/// Record on a socket whose connect was captured (T-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CapturedRecord {
    pub workload: WorkloadNumber,
}

/// Record on a socket of the daemon (T-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ExemptRecord {
    pub exempt: u32,
}

/// Whose instance of `steer` this is: the one entry of the map `STEER_META`, read back by a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SteerMeta {
    /// Cookie of the network namespace.
    pub netns_cookie: u64,
    /// Hash of the object from which the program was loaded: a successor with another object swaps the program too.
    pub object: u64,
    /// Id of the cgroup to which a host workload's programs are attached; 0 for a pod.
    pub cgroup: u64,
    pub number: WorkloadNumber,
    /// Length of `key` in bytes.
    pub key_len: u32,
    /// The workload's key, UTF-8.
    pub key: [u8; KEY_LEN_MAX],
}

// A padding byte in a key would be a lookup that misses.
const _: () = assert!(size_of::<OwnAddressKey>() == 4 + 16);
const _: () = assert!(size_of::<WorkloadValue>() == 8);
const _: () = assert!(size_of::<CapturedRecord>() == 4);
const _: () = assert!(size_of::<ExemptRecord>() == 4);
const _: () = assert!(size_of::<SteerMeta>() == 8 + 8 + 8 + 4 + 4 + KEY_LEN_MAX);
