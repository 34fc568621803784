//! The runtime folder of one daemon: whose it is, and how it passes from a daemon to its successor (T-24).
//!
//! Two locks. The *owner's* is held by the daemon that writes to the kernel, listens on the ports for metrics and
//! readiness and on the admin socket; the *candidate's* by one that starts beside it, until it steers every workload:
//!
//! ```text
//! predecessor   owner ------------------- released, ports closed ... waits for the candidate's lock, then drains, exit 0
//! successor          candidate, first snapshot, kernel's epoch ---- owner, ports -- workloads steered: candidate released
//! ```
//! The kernel frees the locks of a daemon that dies, so nobody waits for the dead.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use crate::{
    config::Root,
    sys::process::{LockError, RuntimeLock},
};

/// Folder of the candidate's lock, in the runtime folder.
const CANDIDATE: &str = "successor";

/// Mode of the folders: keys and documents lie in them.
const FOLDER_MODE: u32 = 0o700;

/// How long a successor waits for the owner's lock after it has taken the epoch. The predecessor looks at the epoch
/// several times a second; one that takes longer hangs, and the successor gives up.
const OWNER_TIME: Duration = Duration::from_secs(15);

/// How long a predecessor goes on accepting for a successor that does not get all workloads steered.
const STEERED_TIME: Duration = Duration::from_secs(30);

/// Between two tries for a lock. The kernel has no notice for a free lock that could be given up.
const TRY: Duration = Duration::from_millis(20);

/// Why the runtime folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    #[error("{}: {source}: make it a folder that this user may write", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("a successor is starting already: {0}")]
    Crowded(LockError),
    #[error(transparent)]
    Lock(LockError),
    #[error("the predecessor does not give way within {} s: end its process", OWNER_TIME.as_secs())]
    Stuck,
}

/// A daemon's hold on its runtime folder.
#[derive(Debug)]
pub struct Place {
    folder: PathBuf,
    admin_socket: PathBuf,
    owner: Option<RuntimeLock>,
    candidate: Option<RuntimeLock>,
}

impl Place {
    /// Makes the folders and takes the owner's lock, or, where another daemon has it, the candidate's.
    ///
    /// # Errors
    /// A folder cannot be made, or two daemons are here already.
    pub fn enter(root: &Root) -> Result<Self, PlaceError> {
        let folder = root.runtime();
        make_folder(&root.state())?;
        make_folder(&folder)?;
        make_folder(&folder.join(CANDIDATE))?;
        let (owner, candidate) = match RuntimeLock::take(&folder) {
            Ok(lock) => (Some(lock), None),
            Err(LockError::Held { .. }) => {
                let candidate = RuntimeLock::take(&folder.join(CANDIDATE)).map_err(PlaceError::Crowded)?;
                (None, Some(candidate))
            }
            Err(error @ LockError::Kernel { .. }) => return Err(PlaceError::Lock(error)),
        };
        Ok(Self { folder, admin_socket: root.admin_socket(), owner, candidate })
    }

    /// Takes the owner's lock for work that needs a stopped daemon.
    ///
    /// # Errors
    /// A daemon runs.
    pub fn alone(root: &Root) -> Result<Self, PlaceError> {
        let folder = root.runtime();
        make_folder(&folder)?;
        let owner = RuntimeLock::take(&folder).map_err(PlaceError::Lock)?;
        Ok(Self { folder, admin_socket: root.admin_socket(), owner: Some(owner), candidate: None })
    }

    /// Another daemon is, or was a moment ago, the owner.
    pub fn is_successor(&self) -> bool {
        self.candidate.is_some()
    }

    /// The socket that belongs to the owner.
    pub fn admin_socket(&self) -> &Path {
        &self.admin_socket
    }

    /// Waits until this daemon is the owner. To be called after it has taken the kernel's epoch, by which the
    /// predecessor learns that it is to give way.
    ///
    /// # Errors
    /// [`PlaceError::Stuck`] if it does not.
    pub async fn become_owner(&mut self) -> Result<(), PlaceError> {
        if self.owner.is_none() {
            self.owner = Some(wait(&self.folder, OWNER_TIME).await?.ok_or(PlaceError::Stuck)?);
        }
        Ok(())
    }

    /// Says that every workload's connections come to this daemon.
    pub fn settled(&mut self) {
        self.candidate = None;
    }

    /// Gives way to a successor, and waits until it has settled, or is no more. Connections that still come here are to be
    /// accepted until then.
    ///
    /// # Errors
    /// The lock's file cannot be used any more.
    pub async fn give_way(&mut self) -> Result<(), PlaceError> {
        self.owner = None;
        wait(&self.folder.join(CANDIDATE), STEERED_TIME).await.map(drop)
    }
}

/// The lock, if it becomes free in time.
async fn wait(folder: &Path, time: Duration) -> Result<Option<RuntimeLock>, PlaceError> {
    let end = Instant::now() + time;
    loop {
        match RuntimeLock::take(folder) {
            Ok(lock) => return Ok(Some(lock)),
            Err(LockError::Held { .. }) if Instant::now() < end => sleep(TRY).await,
            Err(LockError::Held { .. }) => return Ok(None),
            Err(error @ LockError::Kernel { .. }) => return Err(PlaceError::Lock(error)),
        }
    }
}

fn make_folder(path: &Path) -> Result<(), PlaceError> {
    let fault = |source| PlaceError::Folder { path: path.to_owned(), source };
    DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(path).map_err(fault)?;
    fs::set_permissions(path, Permissions::from_mode(FOLDER_MODE)).map_err(fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A daemon's root, removed with it.
    struct Base(PathBuf);

    impl Base {
        fn new(name: &str) -> (Self, Root) {
            let path = std::env::temp_dir().join(format!("culvert-place-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            let root = Root::new(&path);
            (Self(path), root)
        }
    }

    impl Drop for Base {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_first_daemon_owns_the_second_is_its_successor_a_third_is_refused() {
        // T-24
        let (_base, root) = Base::new("three");
        let first = Place::enter(&root).unwrap();
        assert!(!first.is_successor());
        let second = Place::enter(&root).unwrap();
        assert!(second.is_successor());
        assert!(matches!(Place::enter(&root), Err(PlaceError::Crowded(_))));
        assert!(matches!(Place::alone(&root), Err(PlaceError::Lock(_))), "no clean-up beside a daemon");
        drop((first, second));
        assert!(!Place::enter(&root).unwrap().is_successor());
    }

    #[test]
    fn the_folders_are_nobody_else_s() {
        let (_base, root) = Base::new("modes");
        fs::create_dir_all(root.runtime()).unwrap();
        fs::set_permissions(root.runtime(), Permissions::from_mode(0o755)).unwrap();
        let _place = Place::enter(&root).unwrap();
        for folder in [root.runtime(), root.state(), root.runtime().join(CANDIDATE)] {
            assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700, "{folder:?}");
        }
    }

    #[tokio::test]
    async fn a_predecessor_waits_until_its_successor_has_settled_or_is_dead() {
        // T-24
        for dies in [false, true] {
            let (_base, root) = Base::new(if dies { "dead" } else { "settled" });
            let mut first = Place::enter(&root).unwrap();
            let mut second = Place::enter(&root).unwrap();
            let gave_way = tokio::spawn(async move {
                first.give_way().await.unwrap();
                first
            });
            second.become_owner().await.unwrap();
            assert!(!gave_way.is_finished(), "the successor has not settled");
            if dies {
                drop(second);
            } else {
                second.settled();
            }
            gave_way.await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_predecessor_that_hangs_is_not_waited_for_without_end() {
        let (_base, root) = Base::new("hangs");
        let _first = Place::enter(&root).unwrap();
        let mut second = Place::enter(&root).unwrap();
        let before = Instant::now();
        assert!(matches!(second.become_owner().await, Err(PlaceError::Stuck)));
        assert_eq!(before.elapsed().as_secs(), OWNER_TIME.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_successor_that_never_settles_is_not_waited_for_without_end() {
        let (_base, root) = Base::new("unsettled");
        let mut first = Place::enter(&root).unwrap();
        let _second = Place::enter(&root).unwrap();
        let before = Instant::now();
        first.give_way().await.unwrap();
        assert_eq!(before.elapsed().as_secs(), STEERED_TIME.as_secs());
    }
}
