//! The last good documents on disk, for a start at which a file cannot be read (T-19).
//!
//! One file of mode 0600: a line with the checksum of the rest, then JSON. Written beside and renamed, so that it is
//! whole or the one before. A checksum finds damage, not forgery: against that stand mode and owner, which are checked.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::unistd::Uid;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::file::{FILE_BYTES_MAX, FILES_MAX};

/// First words of the file; the number is raised when what follows changes its form.
const HEAD: &str = "culvert last-good 1 sha256:";

/// Mode of the file: policy texts are nobody else's business.
const MODE: u32 = 0o600;

/// Largest file, in bytes: two texts of each document file, quotes escaped. What would be larger is not kept, which is
/// said; what was kept before stays.
const BYTES_MAX: u64 = FILE_BYTES_MAX * FILES_MAX as u64 * 3;

/// What was in force, by file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    /// From which folder. Those of another one say nothing about this one.
    pub folder: String,
    pub files: BTreeMap<String, Texts>,
}

/// The texts of one file from which its objects in force came.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Texts {
    /// The newest text without any problem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub good: Option<String>,
    /// The newest text that could be parsed, where that one had problems.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parsed: Option<String>,
}

/// Why the last good documents cannot be used or kept.
#[derive(Debug, thiserror::Error)]
pub enum LastGoodError {
    #[error("{}: {source}", path.display())]
    System { path: PathBuf, source: io::Error },
    #[error("{}: {problem}: it is not used; remove it, it is written anew", path.display())]
    Damaged { path: PathBuf, problem: &'static str },
}

/// Where they are kept.
#[derive(Debug)]
pub struct LastGood {
    path: PathBuf,
    /// First line of what this process wrote last.
    written: String,
    bytes_max: u64,
    /// The file belongs to a successor.
    retired: Arc<AtomicBool>,
}

impl LastGood {
    pub fn new(path: &Path) -> Self {
        Self::within(path, BYTES_MAX)
    }

    pub(super) fn within(path: &Path, bytes_max: u64) -> Self {
        Self { path: path.to_owned(), written: String::new(), bytes_max, retired: Arc::default() }
    }

    /// Set, nothing is written any more.
    pub fn retired(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.retired)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was in force when a daemon wrote it last; `None` if none ever did.
    ///
    /// # Errors
    /// It cannot be read, is open to others, or is not what a daemon wrote.
    pub fn read(&self) -> Result<Option<Remembered>, LastGoodError> {
        let file = match File::options().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.system(error)),
        };
        let metadata = file.metadata().map_err(|error| self.system(error))?;
        if metadata.uid() != Uid::effective().as_raw() || metadata.mode() & 0o777 != MODE {
            return Err(self.damaged("its owner is another, or its mode is not 0600"));
        }
        let mut text = String::new();
        file.take(self.bytes_max + 1).read_to_string(&mut text).map_err(|error| self.system(error))?;
        if text.len() as u64 > self.bytes_max {
            return Err(self.damaged("it is longer than a daemon writes it"));
        }
        let Some((head, body)) = text.split_once('\n') else {
            return Err(self.damaged("its first line is missing"));
        };
        if head != self::head(body) {
            return Err(self.damaged("its checksum is wrong"));
        }
        serde_json::from_str(body).map(Some).map_err(|_| self.damaged("its form is another version's"))
    }

    /// Replaces what is kept, if that is something else.
    ///
    /// # Errors
    /// The disk refused; what was kept before is kept on, and the next call tries again.
    pub fn keep(&mut self, remembered: &Remembered) -> Result<(), LastGoodError> {
        let body = serde_json::to_string(remembered).map_err(|error| self.system(error.into()))?;
        let head = head(&body);
        if self.written == head || self.retired.load(Ordering::Acquire) {
            return Ok(());
        }
        let text = format!("{head}\n{body}");
        if text.len() as u64 > self.bytes_max {
            let problem =
                format!("{} bytes, at most {} are kept: shorten the documents", text.len(), self.bytes_max);
            return Err(self.system(io::Error::new(io::ErrorKind::FileTooLarge, problem)));
        }
        self.replace(&text).map_err(|error| self.system(error))?;
        self.written = head;
        Ok(())
    }

    fn replace(&self, text: &str) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or_else(|| Path::new("/"));
        let beside = self.path.with_extension("new");
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let mut file = File::options().write(true).create_new(true).mode(MODE).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, &self.path)?;
        File::open(folder)?.sync_all()
    }

    fn system(&self, source: io::Error) -> LastGoodError {
        LastGoodError::System { path: self.path.clone(), source }
    }

    fn damaged(&self, problem: &'static str) -> LastGoodError {
        LastGoodError::Damaged { path: self.path.clone(), problem }
    }
}

fn head(body: &str) -> String {
    use std::fmt::Write as _;

    let mut head = HEAD.to_owned();
    for byte in Sha256::digest(body.as_bytes()) {
        // Writing to a string does not fail.
        let _ = write!(head, "{byte:02x}");
    }
    head
}
