//! What was changed in which namespace, kept in a file so that a successor, or the clean-up, can undo it (T-23).
//!
//! One entry a namespace, written before anything is changed there.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::sysctl::Former;

/// Bytes of the file. Reckoning: 4,096 namespaces with 400 bytes each, and as much again for long paths. A longer one is not
/// ours; a namespace that would make it longer is refused before anything is changed there.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

const VERSION: u32 = 1;

/// One namespace in which something of ours stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Entry {
    /// Its cookie; only meaningful in the same boot.
    pub(super) cookie: u64,
    /// Where it was found; absent for the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) path: Option<PathBuf>,
    /// Values of settings before they were changed.
    pub(super) settings: Vec<Former>,
}

/// The file and its contents.
#[derive(Debug)]
pub(super) struct State {
    file: PathBuf,
    boot: String,
    entries: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Document {
    version: u32,
    boot: String,
    namespaces: Vec<Entry>,
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{path}: {call} failed: {source}")]
    Kernel { path: PathBuf, call: &'static str, source: io::Error },
    /// It is damaged, or not of this program. What it said about former settings is lost.
    #[error(
        "{path}: not a record of enrolments ({reason}); move it away, then namespaces keep their present settings"
    )]
    Foreign { path: PathBuf, reason: String },
    /// As much is remembered as can be.
    #[error(
        "{path}: with this namespace the record has {bytes} bytes, at most {FILE_BYTES_MAX} are read again; enrol fewer workloads, or give their namespaces shorter paths"
    )]
    Full { path: PathBuf, bytes: usize },
}

impl State {
    /// Reads the file; a missing one, or one of an earlier boot, is empty.
    pub(super) fn load(file: &Path) -> Result<Self, StateError> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_err(|source| fault(file, "reading the boot id", source))?;
        Self::load_in_boot(file, boot.trim())
    }

    fn load_in_boot(file: &Path, boot: &str) -> Result<Self, StateError> {
        let empty = Self { file: file.to_owned(), boot: boot.to_owned(), entries: Vec::new() };
        let foreign = |reason: String| StateError::Foreign { path: file.to_owned(), reason };
        let length = match fs::metadata(file) {
            Ok(described) => described.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(empty),
            Err(error) => return Err(fault(file, "reading", error)),
        };
        if length > FILE_BYTES_MAX {
            return Err(foreign(format!("{length} bytes, at most {FILE_BYTES_MAX} are expected")));
        }
        let text = fs::read_to_string(file).map_err(|error| fault(file, "reading", error))?;
        let document: Document = serde_json::from_str(&text).map_err(|error| foreign(error.to_string()))?;
        if document.version != VERSION {
            return Err(foreign(format!("version {}, expected {VERSION}", document.version)));
        }
        if document.boot != boot {
            // The namespaces of another boot are gone, and their cookies may name others.
            return Ok(empty);
        }
        Ok(Self { entries: document.namespaces, ..empty })
    }

    /// All namespaces in which something stands.
    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Remembers a namespace. Former settings that are known already stay: they are the older truth.
    pub(super) fn remember(&mut self, entry: Entry) -> Result<(), StateError> {
        let before = self.entries.clone();
        match self.entries.iter_mut().find(|known| known.cookie == entry.cookie) {
            Some(known) if known.path == entry.path => return Ok(()),
            Some(known) => known.path = entry.path,
            None => self.entries.push(entry),
        }
        // What is not on disk is not remembered.
        self.write().inspect_err(|_| self.entries = before)
    }

    /// Forgets a namespace, and returns what was known of it.
    pub(super) fn forget(&mut self, cookie: u64) -> Result<Option<Entry>, StateError> {
        let Some(at) = self.entries.iter().position(|entry| entry.cookie == cookie) else {
            return Ok(None);
        };
        let entry = self.entries.remove(at);
        self.write()?;
        Ok(Some(entry))
    }

    /// Removes the file.
    pub(super) fn remove_file(self) -> Result<(), StateError> {
        match fs::remove_file(&self.file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(fault(&self.file, "removing", error))
            }
            _ => Ok(()),
        }
    }

    fn write(&self) -> Result<(), StateError> {
        let document =
            Document { version: VERSION, boot: self.boot.clone(), namespaces: self.entries.clone() };
        let text = serde_json::to_vec_pretty(&document)
            .map_err(|error| fault(&self.file, "encoding", error.into()))?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(StateError::Full { path: self.file.clone(), bytes: text.len() });
        }
        let fresh = self.file.with_extension("json.new");
        let write = || {
            let mut file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&fresh, &self.file)
        };
        write().map_err(|error| fault(&self.file, "writing", error))
    }
}

fn fault(path: &Path, call: &'static str, source: io::Error) -> StateError {
    StateError::Kernel { path: path.to_owned(), call, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("culvert-state-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).expect("the temporary folder is writable");
            Self(path)
        }

        fn file(&self) -> PathBuf {
            self.0.join("enrolled.json")
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn entry(cookie: u64, former: &str) -> Entry {
        Entry {
            cookie,
            path: Some(PathBuf::from("/run/netns/a")),
            settings: vec![Former {
                setting: "net/ipv4/fwmark_reflect".to_owned(),
                value: former.to_owned(),
            }],
        }
    }

    #[test]
    fn what_was_remembered_is_known_to_a_successor_and_readable_by_nobody_else() {
        let folder = Folder::new("successor");
        let mut state = State::load_in_boot(&folder.file(), "boot-1").expect("nothing there yet");
        state.remember(entry(7, "0")).expect("writable");
        let successor = State::load_in_boot(&folder.file(), "boot-1").expect("readable");
        assert_eq!(successor.entries(), [entry(7, "0")]);
        let mode = fs::metadata(folder.file()).expect("written").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn the_values_of_before_are_never_overwritten_by_our_own() {
        let folder = Folder::new("older-truth");
        let mut state = State::load_in_boot(&folder.file(), "boot-1").expect("nothing there yet");
        state.remember(entry(7, "0")).expect("writable");
        state.remember(entry(7, "1")).expect("writable");
        assert_eq!(state.forget(7).expect("writable"), Some(entry(7, "0")));
        assert_eq!(state.forget(7).expect("writable"), None);
    }

    #[test]
    fn a_record_of_another_boot_says_nothing() {
        let folder = Folder::new("boot");
        let mut state = State::load_in_boot(&folder.file(), "boot-1").expect("nothing there yet");
        state.remember(entry(7, "0")).expect("writable");
        let later = State::load_in_boot(&folder.file(), "boot-2").expect("readable");
        assert_eq!(later.entries(), []);
    }

    #[test]
    fn a_damaged_or_foreign_file_is_refused_by_name() {
        let folder = Folder::new("damaged");
        for text in
            ["", "{", "[]", r#"{"version":2,"boot":"b","namespaces":[]}"#, r#"{"version":1,"boot":"b"}"#]
        {
            fs::write(folder.file(), text).expect("writable");
            let refused = State::load_in_boot(&folder.file(), "b").expect_err(text);
            assert!(matches!(refused, StateError::Foreign { .. }), "{text}: {refused}");
        }
    }

    #[test]
    fn a_record_is_read_up_to_the_limit() {
        let folder = Folder::new("limit");
        let mut text = br#"{"version":1,"boot":"b","namespaces":[]}"#.to_vec();
        for (bytes, is_read) in [(FILE_BYTES_MAX, true), (FILE_BYTES_MAX + 1, false)] {
            text.resize(usize::try_from(bytes).expect("small"), b' ');
            fs::write(folder.file(), &text).expect("writable");
            match State::load_in_boot(&folder.file(), "b") {
                Ok(_) => assert!(is_read, "{bytes} bytes"),
                Err(refused) => {
                    assert!(!is_read && matches!(refused, StateError::Foreign { .. }), "{refused}")
                }
            }
        }
    }

    #[test]
    fn a_record_that_could_not_be_read_again_is_not_written() {
        let folder = Folder::new("full");
        let mut state = State::load_in_boot(&folder.file(), "boot-1").expect("nothing there yet");
        let of_length = |cookie, bytes| Entry { path: Some("n".repeat(bytes).into()), ..entry(cookie, "0") };
        state.remember(of_length(1, 1)).expect("small");
        let spare = fs::metadata(folder.file()).expect("written").len();
        let longest = usize::try_from(FILE_BYTES_MAX - spare).expect("small");
        // A second entry takes as much as the first, without the document around it.
        let refused = state.remember(of_length(2, longest)).expect_err("above the limit");
        assert!(matches!(refused, StateError::Full { .. }), "{refused}");
        assert_eq!(state.entries(), [of_length(1, 1)], "and nothing of it is remembered");

        state.forget(1).expect("writable");
        state.remember(of_length(2, longest + 1)).expect("at the limit");
        assert_eq!(fs::metadata(folder.file()).expect("written").len(), FILE_BYTES_MAX);
        let successor = State::load_in_boot(&folder.file(), "boot-1").expect("readable");
        assert_eq!(successor.entries(), state.entries());
        let refused = state.remember(of_length(2, longest + 2)).expect_err("above the limit");
        assert!(matches!(refused, StateError::Full { .. }), "{refused}");
    }
}
