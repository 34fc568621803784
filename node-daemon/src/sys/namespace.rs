//! Network namespaces: a handle that is known to be one, and ways to run something inside.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    net::IpAddr,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
};

use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns},
    sys::statfs::{NSFS_MAGIC, fstatfs},
};

use super::socket::namespace_cookie;

/// Stack of a thread that runs one function in a namespace. Netlink messages of a namespace with thousands of addresses are
/// held on the heap, so the call depth of a tokio task is the measure.
const VISITOR_STACK_BYTES: usize = 512 * 1024;

/// Why a path is not a network namespace that can be entered.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// Nothing is there yet, or no longer.
    #[error("{path}: there is nothing at this path; a network namespace was expected")]
    Missing { path: PathBuf },
    /// There is something, but no network namespace.
    #[error(
        "{path}: this is not a network namespace; name one such as /run/netns/<name> or /proc/<pid>/ns/net"
    )]
    Foreign { path: PathBuf },
    /// The kernel refused a call.
    #[error("{path}: {call} failed: {source}")]
    Kernel { path: PathBuf, call: &'static str, source: io::Error },
}

/// A network namespace, kept alive for as long as this value lives: drop it when its workload is gone.
#[derive(Debug)]
pub struct Namespace {
    handle: OwnedFd,
    cookie: u64,
    device: u64,
    inode: u64,
    path: Option<PathBuf>,
}

impl Namespace {
    /// Opens the namespace at `path` and proves that it is one. Needs CAP_SYS_ADMIN.
    pub fn open(path: &Path) -> Result<Self, NamespaceError> {
        let fault = |call| move |source| NamespaceError::Kernel { path: path.to_owned(), call, source };
        // A FIFO or a device at this path must neither block nor be touched: O_NONBLOCK, and a look before use.
        let opened = fs::OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
        let file = opened.map_err(|source| {
            if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) {
                NamespaceError::Missing { path: path.to_owned() }
            } else {
                fault("open")(source)
            }
        })?;
        let kind = fstatfs(&file).map_err(|errno| fault("fstatfs")(errno.into()))?.filesystem_type();
        if kind != NSFS_MAGIC {
            return Err(NamespaceError::Foreign { path: path.to_owned() });
        }
        let described = file.metadata().map_err(fault("fstat"))?;
        let handle = OwnedFd::from(file);
        // Entering with CLONE_NEWNET refuses namespaces of another kind (EINVAL).
        let cookie = in_namespace(handle.as_fd(), cookie_here)
            .map_err(|source| match source.raw_os_error() {
                Some(nix::libc::EINVAL) => NamespaceError::Foreign { path: path.to_owned() },
                _ => fault("setns")(source),
            })?
            .map_err(fault("getsockopt SO_NETNS_COOKIE"))?;
        Ok(Self {
            handle,
            cookie,
            device: described.dev(),
            inode: described.ino(),
            path: Some(path.to_owned()),
        })
    }

    /// The namespace in which the daemon itself runs: the host's.
    pub fn own() -> Result<Self, NamespaceError> {
        let path = Path::new(OWN_NAMESPACE);
        let mut own = Self::open(path)?;
        own.path = None;
        Ok(own)
    }

    /// Number of this namespace, never used again until the machine restarts.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Where it was found; `None` for the daemon's own.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// True while the path still leads to this very namespace. One that was deleted, or made anew under the same name, does not.
    pub fn is_in_place(&self) -> bool {
        let Some(path) = &self.path else { return true };
        fs::metadata(path)
            .is_ok_and(|described| described.dev() == self.device && described.ino() == self.inode)
    }

    /// All addresses of all interfaces inside, loopback included, those that are not yet usable (tentative) too.
    pub fn addresses(&self) -> io::Result<BTreeSet<IpAddr>> {
        in_namespace(self.handle.as_fd(), addresses_here)?
    }

    /// Runs `what` in this namespace on the calling thread and comes back. For short calls that create a socket: it costs
    /// two `setns` and no thread. `what` must not wait.
    pub fn visit<T>(&self, what: impl FnOnce() -> T) -> io::Result<T> {
        let home = home()?;
        let _stay = Stay { home };
        setns(&self.handle, CloneFlags::CLONE_NEWNET)?;
        Ok(what())
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

/// Runs `what` inside `namespace` on a thread of its own and waits for it. For anything that waits, and for the first steps in
/// a namespace. Needs CAP_SYS_ADMIN.
pub fn in_namespace<T: Send>(namespace: BorrowedFd<'_>, what: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let visitor = thread::Builder::new()
            .name("namespace".to_owned())
            .stack_size(VISITOR_STACK_BYTES)
            .spawn_scoped(scope, || {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                Ok(what())
            })?;
        visitor.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// Handle of the daemon's own namespace, opened by whichever thread comes first; all of them live there.
fn home() -> io::Result<&'static OwnedFd> {
    static HOME: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(home) = HOME.get() {
        return Ok(home);
    }
    let opened = OwnedFd::from(File::open(OWN_NAMESPACE)?);
    Ok(HOME.get_or_init(|| opened))
}

/// Brings the thread home, also when the visitor panics.
struct Stay {
    home: &'static OwnedFd,
}

impl Drop for Stay {
    fn drop(&mut self) {
        if let Err(errno) = setns(self.home, CloneFlags::CLONE_NEWNET) {
            // A thread that stays in a workload's namespace would open the sockets of others there, under a foreign identity.
            eprintln!(
                "culvert-node: cannot leave a workload's network namespace ({errno}); the process ends"
            );
            std::process::abort();
        }
    }
}

fn cookie_here() -> io::Result<u64> {
    let probe = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)?;
    namespace_cookie(probe.as_fd())
}

fn addresses_here() -> io::Result<BTreeSet<IpAddr>> {
    let mut addresses = BTreeSet::new();
    for interface in nix::ifaddrs::getifaddrs()? {
        let Some(address) = interface.address else { continue };
        if let Some(v4) = address.as_sockaddr_in() {
            addresses.insert(IpAddr::V4(v4.ip()));
        } else if let Some(v6) = address.as_sockaddr_in6() {
            addresses.insert(IpAddr::V6(v6.ip()));
        }
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_file_is_no_namespace() {
        let refused = Namespace::open(Path::new("/proc/self/status")).expect_err("not a namespace");
        assert!(matches!(refused, NamespaceError::Foreign { .. }), "{refused}");
    }

    #[test]
    fn a_path_with_nothing_is_missing() {
        let refused = Namespace::open(Path::new("/run/netns/culvert-nowhere")).expect_err("nothing there");
        assert!(matches!(refused, NamespaceError::Missing { .. }), "{refused}");
    }

    #[test]
    fn a_path_beneath_a_file_is_missing() {
        let refused = Namespace::open(Path::new("/etc/passwd/net")).expect_err("nothing there");
        assert!(matches!(refused, NamespaceError::Missing { .. }), "{refused}");
    }

    #[test]
    fn the_null_device_is_no_namespace() {
        let refused = Namespace::open(Path::new("/dev/null")).expect_err("not a namespace");
        assert!(matches!(refused, NamespaceError::Foreign { .. }), "{refused}");
    }
}
