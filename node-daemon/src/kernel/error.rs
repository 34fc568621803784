//! What can go wrong, split by blame: this build, this kernel, the caller, the machine.

use std::{error::Error, fmt, io, path::PathBuf};

use ebpf_abi::{SocketSlot, WorkloadNumber};

/// Why the kernel's half could not be set up or changed. After an error nothing is more open than before.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The daemon was built without the kernel programs.
    #[error(
        "this build of the daemon has no kernel programs: run `cargo xtask build-ebpf`, then build the daemon again"
    )]
    NoObject,
    /// This kernel, or what we may do in it, lacks something.
    #[error(
        "this kernel ({release}) does not take the program `{program}`, which needs {feature}; Linux {floor} or later with \
         CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_INET is needed, and CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON \
         (or root): {reason}",
        floor = super::KERNEL_FLOOR
    )]
    Feature { program: &'static str, feature: &'static str, release: String, reason: String },
    /// The object, a map or a link could not be used.
    #[error("{action} failed: {source}")]
    Call { action: String, source: Box<dyn Error + Send + Sync> },
    /// A file or folder could not be used.
    #[error("{path}: {action} failed: {source}", path = path.display())]
    File { path: PathBuf, action: &'static str, source: io::Error },
    /// A name cannot stand in a path.
    #[error("{field} `{value}` cannot be used: {expected}")]
    Name { field: &'static str, value: String, expected: &'static str },
    /// A map is full.
    #[error("the map {map} is full at {limit} entries: {consequence}")]
    Limit { map: &'static str, limit: u32, consequence: &'static str },
    /// A listener would not work: the kernel accepts it and then shakes hands in the wrong namespace.
    #[error(
        "the {slot:?} listener of workload `{key}` is a socket of network namespace {found}, expected one of {expected}"
    )]
    ForeignListener { key: String, slot: SocketSlot, expected: u64, found: u64 },
    /// Two workloads claim one network namespace.
    #[error(
        "network namespace {cookie} of workload `{key}` already belongs to workload `{holder}`: release that one first"
    )]
    NamespaceTaken { key: String, cookie: u64, holder: String },
    /// All host workloads of a daemon live in one network namespace, the host's.
    #[error("host workload `{key}` is in network namespace {found}, expected the host's, {expected}")]
    NotInHost { key: String, expected: u64, found: u64 },
    /// Somebody else's programs judge packets of this interface.
    #[error(
        "interface {interface} has {others} tcx programs of another owner, which would not see what a shortcut takes"
    )]
    Occupied { interface: u32, others: usize },
    /// There is no such enrolment.
    #[error("no workload with number {0} is enrolled")]
    Unknown(WorkloadNumber),
    /// A call that makes no sense for this kind of workload, or before [`super::Kernel::steer`].
    #[error("workload `{key}`: {problem}")]
    Order { key: String, problem: &'static str },
    /// Another daemon took over; this one may only drain.
    #[error("epoch {ours} of this daemon is over, a successor has {current}: this one only drains")]
    NotOwner { ours: u64, current: u64 },
}

impl KernelError {
    pub(super) fn call(action: impl Into<String>) -> impl FnOnce(Box<dyn Error + Send + Sync>) -> Self {
        let action = action.into();
        move |source| Self::Call { action, source }
    }

    pub(super) fn file(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, action, source }
    }
}

/// Says what was attempted when a call of aya or the kernel fails.
pub(super) trait During<T> {
    fn during(self, action: impl FnOnce() -> String) -> Result<T, KernelError>;
}

impl<T, E: Error + Send + Sync + 'static> During<T> for Result<T, E> {
    fn during(self, action: impl FnOnce() -> String) -> Result<T, KernelError> {
        self.map_err(|source| KernelError::call(action())(Box::new(Chain::of(&source))))
    }
}

/// The messages of an error and its causes in one line: aya's own messages often leave the system's reason to the cause.
#[derive(Debug)]
struct Chain(String);

impl Chain {
    fn of(error: &(dyn Error + 'static)) -> Self {
        let causes = std::iter::successors(Some(error), |error| (*error).source());
        let mut messages: Vec<String> = Vec::new();
        for message in causes.map(ToString::to_string) {
            if messages.last() != Some(&message) {
                messages.push(message);
            }
        }
        Self(messages.join(": "))
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Chain {}

/// The messages of an error and its causes in one line.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    Chain::of(error).0
}

/// What a clean-up removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Links, each of which attached a program somewhere.
    pub links: usize,
    /// Maps.
    pub maps: usize,
}
