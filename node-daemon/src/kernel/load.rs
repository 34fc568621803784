//! The object in this build -> an instance of its programs in the kernel.
//!
//! One object holds everything; an instance is loaded for a purpose, with the maps of the node reused by their pins and the
//! rest made anew. Maps that an instance has no use for vanish with [`Ebpf`].

use std::{fs, path::Path};

use aya::{
    Ebpf, EbpfLoader,
    programs::{CgroupSkb, CgroupSockAddr, ProgramError, SchedClassifier, SkLookup, SockOps},
};
use ebpf_abi::{WorkloadNumber, names};
use sha2::{Digest as _, Sha256};

use super::{
    KERNEL_FLOOR, KernelConfig,
    error::{During as _, KernelError, chain},
};

/// The kernel programs, or nothing where they were not built.
static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/mesh-ebpf.o"));

/// What an instance is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose<'a> {
    /// The programs on the cgroup of the node's pods.
    Node,
    /// The programs on the cgroup of one host workload, for its sockets in the host's namespace, whose `steer` is pinned in
    /// the folder.
    HostWorkload { number: WorkloadNumber, netns_cookie: u64, host: &'a Path },
    /// `steer` in a pod's namespace; its own maps are pinned in the folder.
    SteerPod { number: WorkloadNumber, folder: &'a Path },
    /// `steer` in the host's namespace; its own maps are pinned in the folder.
    SteerHost { folder: &'a Path },
}

/// Refuses a build without programs.
pub(super) fn check_object() -> Result<(), KernelError> {
    if OBJECT.is_empty() { Err(KernelError::NoObject) } else { Ok(()) }
}

/// Identifies the programs of this build.
pub(super) fn object_hash() -> u64 {
    let digest = Sha256::digest(OBJECT);
    digest.iter().take(size_of::<u64>()).fold(0, |hash, byte| hash << u8::BITS | u64::from(*byte))
}

/// Loads the maps of an instance, and readies its programs.
pub(super) fn instance(
    purpose: Purpose<'_>,
    config: &KernelConfig,
    shared_maps: &Path,
) -> Result<Ebpf, KernelError> {
    let (number, netns_cookie) = match purpose {
        Purpose::HostWorkload { number, netns_cookie, .. } => (number.0, netns_cookie),
        Purpose::Node | Purpose::SteerPod { .. } | Purpose::SteerHost { .. } => (WorkloadNumber::NONE.0, 0),
    };
    let steered = match purpose {
        Purpose::SteerPod { number, .. } => number.0,
        Purpose::Node | Purpose::HostWorkload { .. } | Purpose::SteerHost { .. } => WorkloadNumber::NONE.0,
    };
    let host = u32::from(matches!(purpose, Purpose::SteerHost { .. }));
    let mut loader = EbpfLoader::new();
    loader
        .override_global(names::GLOBAL_MARK, &config.mark, true)
        .override_global(names::GLOBAL_WORKLOAD, &steered, true)
        .override_global(names::GLOBAL_HOST_WORKLOAD, &number, true)
        .override_global(names::GLOBAL_HOST_NETNS_COOKIE, &netns_cookie, true)
        .override_global(names::GLOBAL_HOST, &host, true)
        .map_max_entries(names::MAP_WORKLOADS, config.sizes.workloads)
        .map_max_entries(names::MAP_OWN_ADDRESSES, config.sizes.own_addresses)
        .map_max_entries(names::MAP_ORIGINS, config.sizes.origins)
        .map_max_entries(names::MAP_LOCAL_ADDRESSES, config.sizes.local_addresses)
        .map_max_entries(names::MAP_DIRECT, config.sizes.direct)
        .map_max_entries(names::MAP_DIRECT_EVENTS, config.sizes.direct_events_bytes);
    for map in names::SHARED_MAPS {
        loader.map_pin_path(map, shared_maps.join(map));
    }
    match purpose {
        Purpose::Node => {}
        Purpose::HostWorkload { host, .. } => {
            loader.map_pin_path(names::MAP_STEER_PORTS, host.join(names::MAP_STEER_PORTS));
        }
        Purpose::SteerPod { folder, .. } | Purpose::SteerHost { folder } => {
            for map in names::STEER_MAPS {
                loader.map_pin_path(map, folder.join(map));
            }
        }
    }
    loader.load(OBJECT).during(|| {
        format!(
            "making or reusing the maps of the kernel programs on Linux {} ({KERNEL_FLOOR} needed)",
            release()
        )
    })
}

/// Loads one program of an instance into the kernel; the error names what this kernel lacks.
pub(super) fn load(instance: &mut Ebpf, name: &'static str) -> Result<(), KernelError> {
    let program = instance.program_mut(name).ok_or(KernelError::NoObject)?;
    let loaded = if name == names::PROGRAM_STEER {
        <&mut SkLookup>::try_from(program).and_then(SkLookup::load)
    } else if name == names::PROGRAM_SHORTCUT {
        <&mut SchedClassifier>::try_from(program).and_then(SchedClassifier::load)
    } else if name == names::PROGRAM_SOCKET_EVENTS {
        <&mut SockOps>::try_from(program).and_then(SockOps::load)
    } else if name == names::PROGRAM_GUARD_EGRESS || name == names::PROGRAM_GUARD_INGRESS {
        <&mut CgroupSkb>::try_from(program).and_then(CgroupSkb::load)
    } else {
        <&mut CgroupSockAddr>::try_from(program).and_then(CgroupSockAddr::load)
    };
    loaded.map_err(|error| KernelError::Feature {
        program: name,
        feature: feature(name),
        release: release(),
        reason: reason(&error),
    })
}

/// The newest thing that a program needs of the kernel.
fn feature(program: &str) -> &'static str {
    match program {
        names::PROGRAM_CONNECT4 | names::PROGRAM_CONNECT6 => {
            "cgroup connect hooks with bpf_set_retval (Linux 5.18), socket storage and bpf_setsockopt"
        }
        names::PROGRAM_SOCKET_EVENTS => "sock_ops with socket storage and bpf_get_netns_cookie (Linux 5.15)",
        names::PROGRAM_SHORTCUT => "tc with bpf_redirect_peer (Linux 5.10)",
        names::PROGRAM_GUARD_EGRESS | names::PROGRAM_GUARD_INGRESS => {
            "cgroup_skb with socket storage (Linux 5.2)"
        }
        _ => "sk_lookup with ingress_ifindex (Linux 5.17)",
    }
}

/// The system's reason, and the last words of the verifier where it spoke.
fn reason(error: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = error else {
        return chain(error);
    };
    let last = last_words(&verifier_log.to_string());
    if last.is_empty() { io_error.to_string() } else { format!("{io_error}; verifier: {last}") }
}

/// The conclusion of a verifier's log.
fn last_words(log: &str) -> String {
    let mut last: Vec<_> = log.lines().rev().filter(|line| !line.trim().is_empty()).take(LOG_LINES).collect();
    last.reverse();
    last.join(" | ")
}

/// Version of the running kernel.
fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "of unknown version".to_owned(), |release| release.trim().to_owned())
}

/// Lines of the verifier's log that go into an error: its conclusion stands in the last ones.
const LOG_LINES: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_verifiers_log_the_last_lines_are_told() {
        let log = |lines: usize| (1..=lines).map(|line| format!("{line}\n\n")).collect::<String>();
        for (lines, expected) in
            [(0, ""), (1, "1"), (6, "1 | 2 | 3 | 4 | 5 | 6"), (7, "2 | 3 | 4 | 5 | 6 | 7")]
        {
            assert_eq!(last_words(&log(lines)), expected);
        }
    }
}
