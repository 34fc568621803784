//! The folders of documents that steer daemons and the CA.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};

/// One folder of YAML documents, or several that always hold the same.
#[derive(Debug)]
pub struct Documents {
    folders: Vec<PathBuf>,
}

static WRITES: AtomicU64 = AtomicU64::new(0);

impl Documents {
    /// The documents in these folders, which must exist.
    pub fn of(folders: Vec<PathBuf>) -> Self {
        Self { folders }
    }

    /// Writes or replaces a file, whole or not at all.
    ///
    /// # Errors
    /// If a folder may not be written.
    pub fn try_put(&self, file: &str, yaml: &str) -> Result<()> {
        for folder in &self.folders {
            put(folder, file, yaml).with_context(|| format!("{}/{file}", folder.display()))?;
        }
        Ok(())
    }

    /// Writes or replaces a file, whole or not at all.
    ///
    /// # Panics
    /// If a folder may not be written.
    #[track_caller]
    pub fn put(&self, file: &str, yaml: &str) {
        self.try_put(file, yaml).expect("the world's folders are writable");
    }

    /// Removes a file.
    ///
    /// # Panics
    /// If it is not there.
    #[track_caller]
    pub fn remove(&self, file: &str) {
        for folder in &self.folders {
            std::fs::remove_file(folder.join(file))
                .unwrap_or_else(|error| panic!("{}/{file}: {error}", folder.display()));
        }
    }
}

/// The new file is made beside the folder, so that no watcher sees half a file or a file of a passing name.
fn put(folder: &Path, file: &str, yaml: &str) -> Result<()> {
    let number = WRITES.fetch_add(1, Ordering::Relaxed);
    let fresh = folder.with_extension(format!("new{number}"));
    std::fs::write(&fresh, yaml)?;
    std::fs::rename(&fresh, folder.join(file))?;
    Ok(())
}
