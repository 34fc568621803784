//! The daemon's own process: nobody reads its memory, it has descriptors enough, and only one writes at a time.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::resource::{Resource, getrlimit, setrlimit},
};

/// Name of the lock file in the runtime folder.
const LOCK_FILE: &str = "culvert-node.lock";

/// Forbids core dumps and reading this process's memory by others of the same user: private keys live in it.
pub fn seal() -> io::Result<()> {
    nix::sys::prctl::set_dumpable(false)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    Ok(())
}

/// Raises the soft limit of open descriptors to the hard one and returns it.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// Why the runtime folder is not ours alone.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon holds it.
    #[error(
        "{path}: another culvert-node holds this lock; stop it first, or give each daemon a --root of its own"
    )]
    Held { path: PathBuf },
    /// The file could not be opened or locked.
    #[error("{path}: cannot lock: {source}")]
    Kernel { path: PathBuf, source: io::Error },
}

/// An exclusive lock on a runtime folder (T-24); freed when dropped, and by the kernel when the process ends.
#[derive(Debug)]
pub struct RuntimeLock {
    _lock: Flock<File>,
}

impl RuntimeLock {
    /// Takes the lock without waiting.
    pub fn take(folder: &Path) -> Result<Self, LockError> {
        let path = folder.join(LOCK_FILE);
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|source| LockError::Kernel { path: path.clone(), source })?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { _lock: lock }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(LockError::Held { path }),
            Err((_, errno)) => Err(LockError::Kernel { path, source: errno.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder under the system's temporary one, removed when dropped.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("culvert-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).expect("the temporary folder is writable");
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_second_daemon_does_not_get_the_lock() {
        // T-24
        let folder = Folder::new("lock-held");
        let first = RuntimeLock::take(&folder.0).expect("nobody holds it");
        let refused = RuntimeLock::take(&folder.0).expect_err("it is held");
        assert!(matches!(refused, LockError::Held { .. }), "{refused}");
        drop(first);
        RuntimeLock::take(&folder.0).expect("it is free again");
    }

    #[test]
    fn a_missing_folder_is_a_fault_and_no_lock() {
        let refused = RuntimeLock::take(Path::new("/nonexistent")).expect_err("there is no folder");
        assert!(matches!(refused, LockError::Kernel { .. }), "{refused}");
    }

    #[test]
    fn the_soft_descriptor_limit_becomes_the_hard_one() {
        let raised = raise_descriptor_limit().expect("raising to the hard limit needs no privilege");
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("always readable");
        assert_eq!((soft, raised), (hard, hard));
    }
}
