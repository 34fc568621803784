//! A folder of YAML files: what is in it, and what changed since.
//!
//! Files end in `.yaml` or `.yml` and do not begin with a dot; the rest is left alone. Symbolic links are followed, so
//! that folders work whose files point through one link that is exchanged as a whole (`..data`). A file is read as a
//! whole or not at all: write beside it and rename, and nobody sees half of it.
//! Not here: what the documents mean.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::{
    sync::mpsc::{self, Receiver},
    task,
    time::{Instant, timeout_at},
};

/// Largest file, in bytes: some 2,000 documents. At the limit the file is unreadable; its last good contents stay.
pub const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Name of the limit [`FILE_BYTES_MAX`].
pub const FILE_BYTES_LIMIT: &str = "document_file_bytes";

/// Most files in the folder. At the limit the whole folder is unreadable; what was read before stays.
pub const FILES_MAX: usize = 1_024;

/// Name of the limit [`FILES_MAX`].
pub const FILES_LIMIT: &str = "document_files";

/// Documents of one file: as many of 256 bytes as [`FILE_BYTES_MAX`] holds. Beyond it the file is not parsed.
pub(super) const DOCUMENTS_MAX: usize = 4_096;

/// Scalars, lists and maps of one file: sixty for each of so many documents. Beyond it the file is not parsed.
pub(super) const NODES_MAX: usize = 250_000;

/// How deep lists and maps of one file nest; ten levels are what objects have. Beyond it the file is not parsed.
pub(super) const DEPTH_MAX: usize = 64;

/// Nodes that aliases of one file may stand for, beyond what is written: an alias in every document of a large file. Beyond
/// it the file is not parsed.
pub(super) const ALIASED_NODES_MAX: usize = 100_000;

/// Quiet time after a change before the folder is read: a rename is two notices, a copy of a folder some hundred.
pub(super) const SETTLE: Duration = Duration::from_millis(50);

/// Longest time that changes in a row put off reading.
pub(super) const SETTLE_MAX: Duration = Duration::from_millis(500);

/// The folder is read this often even without notice: links to files elsewhere change silently, and a notice may be
/// lost when too many come at once.
const POLL: Duration = Duration::from_secs(5);

/// Notices that wait; more say the same.
pub(super) const NOTICES_MAX: usize = 1;

/// What happened to one file, or to the folder as a whole.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// New or different, and parsed.
    Read {
        file: Arc<str>,
        text: Arc<str>,
        documents: Vec<Value>,
    },
    Removed {
        file: Arc<str>,
    },
    /// There, new or different, and not to be read or parsed. `limit` names the limit, if it was one.
    Unreadable {
        file: Arc<str>,
        reason: String,
        limit: Option<&'static str>,
    },
    /// The folder cannot be listed; nothing is known of its files.
    FolderUnreadable {
        reason: String,
        limit: Option<&'static str>,
    },
    /// It can again, and holds these files; each of them is told anew.
    FolderReadable {
        files: BTreeSet<Arc<str>>,
    },
}

/// Parses the documents of one file; empty ones are left out, nulls inside are kept (policy A-2).
///
/// # Errors
/// What is no YAML, with line and column.
pub fn parse(text: &str) -> Result<Vec<Value>, String> {
    let options = serde_saphyr::options! {
        // As in YAML 1.2: `mode: ON` is a word, not true (policy B-1).
        strict_booleans: true,
        budget: serde_saphyr::budget! {
            max_documents: DOCUMENTS_MAX,
            max_nodes: NODES_MAX,
            max_depth: DEPTH_MAX,
            // The limit of what aliases stand for says more than their number.
            enforce_alias_anchor_ratio: false,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: ALIASED_NODES_MAX },
    };
    serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| error.without_snippet().to_string())
}

/// The folder, and what was seen in it.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    seen: BTreeMap<Arc<str>, Seen>,
    /// Why it could not be listed the last time.
    problem: Option<String>,
}

/// The last contents of a file, or why there are none.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Contents([u8; 32]),
    Unreadable(String),
}

impl Folder {
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), seen: BTreeMap::new(), problem: None }
    }

    /// What changed since the last call, removals first: an object that moved to another file is never there twice.
    pub fn scan(&mut self) -> Vec<Change> {
        let files = match list(&self.path) {
            Ok(files) => files,
            Err(unreadable) => return self.unlisted(unreadable),
        };
        let is_back = self.problem.take().is_some();
        let mut changes = Vec::new();
        if is_back {
            changes.push(Change::FolderReadable { files: files.iter().cloned().collect() });
        }
        let mut read = Vec::new();
        let mut now = BTreeMap::new();
        for file in files {
            match contents(Path::new(&*file), FILE_BYTES_MAX) {
                Ok(None) => {}
                Ok(Some(text)) => {
                    let seen = Seen::Contents(Sha256::digest(text.as_bytes()).into());
                    if is_back || self.seen.get(&file) != Some(&seen) {
                        read.push(parsed(&file, text));
                    }
                    now.insert(file, seen);
                }
                Err(unreadable) => {
                    let seen = Seen::Unreadable(unreadable.reason.clone());
                    if is_back || self.seen.get(&file) != Some(&seen) {
                        read.push(unreadable.of(&file));
                    }
                    now.insert(file, seen);
                }
            }
        }
        let gone = self.seen.keys().filter(|file| !now.contains_key(*file));
        changes.extend(gone.map(|file| Change::Removed { file: Arc::clone(file) }));
        changes.extend(read);
        self.seen = now;
        changes
    }

    /// What was read before stays as it is.
    fn unlisted(&mut self, unreadable: Unreadable) -> Vec<Change> {
        if self.problem.as_ref() == Some(&unreadable.reason) {
            return Vec::new();
        }
        self.problem = Some(unreadable.reason.clone());
        vec![Change::FolderUnreadable { reason: unreadable.reason, limit: unreadable.limit }]
    }
}

fn parsed(file: &Arc<str>, text: String) -> Change {
    match parse(&text) {
        Ok(documents) => Change::Read { file: Arc::clone(file), text: text.into(), documents },
        Err(reason) => Unreadable { reason, limit: None }.of(file),
    }
}

/// A folder and the notices of its changes.
#[derive(Debug)]
pub struct Watched {
    /// Away only while it is scanned; [`Watched::changed`] is not to be dropped then.
    folder: Option<Folder>,
    path: PathBuf,
    notices: Option<Notices>,
}

/// The kernel's notices for one folder.
#[derive(Debug)]
struct Notices {
    /// Which folder: device and inode. A folder made anew under the same name is another one.
    of: (u64, u64),
    received: Receiver<()>,
    _watcher: RecommendedWatcher,
}

impl Watched {
    /// Begins to watch; what changes from here on is told after the first [`Watched::scan`].
    pub fn new(path: &Path) -> Self {
        let mut watched = Self { path: path.to_owned(), folder: Some(Folder::new(path)), notices: None };
        watched.watch();
        watched
    }

    /// Waits for a notice or for the time of the poll, and tells what changed; empty if nothing did.
    pub async fn changed(&mut self) -> Vec<Change> {
        self.notice().await;
        self.watch();
        self.scan().await
    }

    /// Reads the folder, where waiting for a disk stops nobody, and tells what changed since the last time.
    pub async fn scan(&mut self) -> Vec<Change> {
        let Some(mut folder) = self.folder.take() else { return Vec::new() };
        let scanned = task::spawn_blocking(move || {
            let changes = folder.scan();
            (folder, changes)
        });
        let (folder, changes) =
            scanned.await.expect("scanning does not panic, and the runtime lives while it is awaited");
        self.folder = Some(folder);
        changes
    }

    async fn notice(&mut self) {
        let poll = Instant::now() + POLL;
        let Some(notices) = &mut self.notices else {
            tokio::time::sleep_until(poll).await;
            return;
        };
        if !matches!(timeout_at(poll, notices.received.recv()).await, Ok(Some(()))) {
            return;
        }
        quiet(&mut notices.received).await;
    }

    /// Begins to watch, or watches the folder that has taken the place of the watched one. Where that fails, the poll
    /// does, and this is tried again with it.
    fn watch(&mut self) {
        let now = fs::metadata(&self.path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        if now.is_some() && self.notices.as_ref().map(|notices| notices.of) == now {
            return;
        }
        self.notices = now.and_then(|of| match Notices::begin(&self.path, of) {
            Ok(notices) => Some(notices),
            Err(error) => {
                tracing::debug!(%error, "folder is polled, not watched");
                None
            }
        });
    }
}

/// Waits until no further notice comes, or for the longest time that is waited for it.
pub(super) async fn quiet(notices: &mut Receiver<()>) {
    let latest = Instant::now() + SETTLE_MAX;
    loop {
        let quiet = (Instant::now() + SETTLE).min(latest);
        // Past the latest time a notice that is there already would still be taken before the time.
        if quiet <= Instant::now() || !matches!(timeout_at(quiet, notices.recv()).await, Ok(Some(()))) {
            return;
        }
    }
}

impl Notices {
    fn begin(path: &Path, of: (u64, u64)) -> notify::Result<Self> {
        let (notice, received) = mpsc::channel(NOTICES_MAX);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the folder makes notices too, which would never end.
            if !matches!(&event, Ok(event) if event.kind.is_access()) {
                // Full: one waits already and says the same.
                let _ = notice.try_send(());
            }
        })?;
        watcher.watch(path, RecursiveMode::NonRecursive)?;
        Ok(Self { of, received, _watcher: watcher })
    }
}

/// Why a file or folder is not to be read.
#[derive(Debug)]
struct Unreadable {
    reason: String,
    limit: Option<&'static str>,
}

impl Unreadable {
    fn of(self, file: &Arc<str>) -> Change {
        Change::Unreadable { file: Arc::clone(file), reason: self.reason, limit: self.limit }
    }
}

impl From<io::Error> for Unreadable {
    fn from(error: io::Error) -> Self {
        Self { reason: error.to_string(), limit: None }
    }
}

/// Paths of the files that count, sorted.
fn list(folder: &Path) -> Result<Vec<Arc<str>>, Unreadable> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.starts_with('.') || !(name.ends_with(".yaml") || name.ends_with(".yml")) {
            continue;
        }
        if files.len() == FILES_MAX {
            let reason = format!("it holds more than {FILES_MAX} files: put several documents into one file");
            return Err(Unreadable { reason, limit: Some(FILES_LIMIT) });
        }
        files.push(folder.join(name).to_string_lossy().into());
    }
    files.sort();
    Ok(files)
}

/// The text of a file that somebody named, whatever its ending.
///
/// # Errors
/// Why it cannot be read, or is longer than `bytes_max`.
pub fn read(path: &Path, bytes_max: u64) -> Result<String, String> {
    if path.is_dir() {
        return Err("it is a folder: name a file".to_owned());
    }
    match contents(path, bytes_max) {
        Ok(Some(text)) => Ok(text),
        Ok(None) => Err("there is no such file".to_owned()),
        Err(unreadable) => Err(unreadable.reason),
    }
}

/// The text of a file; `None` if it is gone since it was listed.
fn contents(path: &Path, bytes_max: u64) -> Result<Option<String>, Unreadable> {
    let mut options = File::options();
    // A named pipe without a writer would keep us waiting.
    options.read(true).custom_flags(nix::libc::O_NONBLOCK);
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(Unreadable {
            reason: "it is no regular file: remove it from the folder".to_owned(),
            limit: None,
        });
    }
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        let reason = format!("it has more than {bytes_max} bytes: divide it into several files");
        return Err(Unreadable { reason, limit: Some(FILE_BYTES_LIMIT) });
    }
    String::from_utf8(bytes).map(Some).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Unreadable { reason: format!("it is no UTF-8 at byte {at}: save it as UTF-8"), limit: None }
    })
}
