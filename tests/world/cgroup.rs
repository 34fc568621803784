//! Folders of the unified control group hierarchy.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Where the unified hierarchy is mounted.
///
/// # Errors
/// If it is not.
pub fn mount() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|words| words.get(2) == Some(&"cgroup2"))
        .map(|words| PathBuf::from(words[1]))
        .context("no cgroup2 in /proc/mounts: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// A control group; gone when this value is. Its processes must have ended before.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes a folder at the top.
    ///
    /// # Errors
    /// If it exists or may not be made.
    pub fn top(name: &str) -> Result<Self> {
        Self::at(mount()?.join(name))
    }

    /// Makes a folder below.
    ///
    /// # Errors
    /// If it exists or may not be made.
    pub fn below(&self, name: &str) -> Result<Self> {
        Self::at(self.path.join(name))
    }

    fn at(path: PathBuf) -> Result<Self> {
        std::fs::create_dir(&path).with_context(|| format!("making the cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Ends what runs in a folder and below, and removes them.
pub(crate) fn remove(path: &Path) {
    let _ = std::fs::write(path.join("cgroup.kill"), "1");
    if let Ok(entries) = std::fs::read_dir(path) {
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            remove(&entry.path());
        }
    }
    // A killed process leaves its group a moment after the signal; the group's own file tells when.
    while std::fs::read_to_string(path.join("cgroup.events")).is_ok_and(|text| text.contains("populated 1")) {
        std::thread::yield_now();
    }
    if let Err(error) = std::fs::remove_dir(path)
        && error.kind() != ErrorKind::NotFound
    {
        eprintln!("the cgroup {} stays behind: {error}", path.display());
    }
}
