//! The folder of segments: where the log goes on, one file after another, as many as are kept.
//!
//! Two daemons may write at once for a while, a predecessor and its successor (T-24): each batch is written under the
//! folder's lock, and goes on from what stands there. Files are 0600 in a folder of 0700. Whatever fails leaves the log as
//! it was before the batch, and the batch to be tried again.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nix::{
    fcntl::{Flock, FlockArg},
    unistd::Uid,
};
use node_core::audit::{
    Digest, FORMAT, LINE_BYTES_MAX,
    chain::{Chain, Place},
    entry::{Entry, Recovered, Segment},
    tail::{self, Last, Opening, Tail},
};
use spiffe_id::NodeId;

use super::AuditFault;
use crate::{
    certs::{Seal, SealFault},
    config::AuditConfig,
};

/// Mode of the files: who talks to whom is nobody else's business.
const FILE_MODE: u32 = 0o600;

/// Mode of the folder.
const FOLDER_MODE: u32 = 0o700;

/// So much of a segment's end is read to find its last record: several lines of the greatest length.
const TAIL_BYTES: u64 = 4 * LINE_BYTES_MAX as u64;

/// Room that a segment keeps for its end: a checkpoint with its certificates, and a record that was begun.
const END_BYTES: u64 = 2 * LINE_BYTES_MAX as u64;

/// Certificates of a signer, in bytes of base64; a chain of ten takes 12 KiB. A longer one signs nothing.
const CERTIFICATES_BYTES_MAX: usize = 32 * 1024;

/// Number of the segment in a file's name; `None`: it is no segment.
pub(super) fn segment_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("audit-")?.strip_suffix(".jsonl")?;
    let number = digits.parse().ok()?;
    (name_of(number) == name).then_some(number)
}

fn name_of(segment: u64) -> String {
    format!("audit-{segment:08}.jsonl")
}

/// Segments of a folder, in their order.
pub(super) fn segments(folder: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if let Some(number) = entry.file_name().to_str().and_then(segment_of) {
            found.push((number, entry.path()));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// How the log was found when it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    torn: Option<(u64, Digest)>,
    unreadable_lines: u64,
    /// There is something, and it does not end with a stop.
    is_running: bool,
}

impl Found {
    pub(super) fn torn_bytes(&self) -> u64 {
        self.torn.map_or(0, |(bytes, _)| bytes)
    }

    pub(super) fn is_clean(&self) -> bool {
        *self == Self::default()
    }

    /// Nothing is wrong with it, and a predecessor may still write.
    pub(super) fn is_whole(&self) -> bool {
        Self { is_running: false, ..*self } == Self::default()
    }

    pub(super) fn entry(&self) -> Entry<'static> {
        Entry::Recovered(Recovered {
            torn_bytes: self.torn_bytes(),
            torn_digest: self.torn.map(|(_, digest)| digest),
            unreadable_lines: self.unreadable_lines,
        })
    }
}

/// A file that lines are appended to. A border: tests put one there that fails.
pub(super) trait Append: Send {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Removes what is beyond this length.
    fn cut(&mut self, length: u64) -> io::Result<()>;
    fn sync(&mut self) -> io::Result<()>;
}

impl Append for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

/// What is written to a file.
type Opener = fn(File) -> Box<dyn Append>;

/// See the module.
pub(super) struct Journal {
    folder: PathBuf,
    lock: File,
    node: String,
    run: String,
    segment_bytes: u64,
    keep_segments: usize,
    checkpoint_records: u64,
    checkpoint_seconds: u64,
    opener: Opener,
    file: Option<Current>,
    /// Number of the newest segment that was seen.
    newest: u64,
    /// As the file has it.
    written: State,
    /// With what is in the buffer.
    state: State,
    buffer: Vec<u8>,
    /// Records of what was found or repaired, until they stand in the file.
    owed: Vec<Entry<'static>>,
}

/// The segment that is written.
struct Current {
    file: Box<dyn Append>,
    path: PathBuf,
    inode: u64,
    segment: u64,
}

/// Where the log is.
#[derive(Clone, Debug)]
struct State {
    chain: Chain,
    /// Its random name.
    name: String,
    /// Bytes of the segment.
    length: u64,
    /// Whose certificates stand in the segment.
    signer: Option<Digest>,
    /// Records since the last checkpoint of this run.
    unsigned: u64,
}

/// Why a batch was not written. It is tried again.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub(super) struct WriteFault {
    path: PathBuf,
    source: io::Error,
}

/// Why a checkpoint was not made. Lines are chained meanwhile, and signed by the next one.
#[derive(Debug, thiserror::Error)]
pub(super) enum SignFault {
    #[error(
        "the node's certificates have {0} bytes in base64, at most {CERTIFICATES_BYTES_MAX} fit into a line"
    )]
    TooLong(usize),
    #[error(transparent)]
    Key(#[from] SealFault),
}

impl Journal {
    /// Makes the folder if need be, finds the end of the log, and removes a line that is not whole; what was found is to be
    /// written as a record.
    ///
    /// # Errors
    /// The folder cannot be used, or holds another node's log.
    pub(super) fn open(
        config: &AuditConfig,
        node: &NodeId,
        run: String,
    ) -> Result<(Self, Found), AuditFault> {
        let folder = |source| AuditFault::Folder { path: config.folder.clone(), source };
        let lock = own_folder(&config.folder).map_err(folder)?;
        let state = State { chain: Chain::BEGIN, name: new_name(), length: 0, signer: None, unsigned: 0 };
        let mut journal = Self {
            folder: config.folder.clone(),
            lock,
            node: node.to_string(),
            run,
            segment_bytes: config.segment_bytes,
            keep_segments: config.keep_segments,
            checkpoint_records: config.checkpoint_records,
            checkpoint_seconds: config.checkpoint.as_secs(),
            opener: |file| Box::new(file),
            file: None,
            newest: 0,
            written: state.clone(),
            state,
            buffer: Vec::new(),
            owed: Vec::new(),
        };
        let lock = journal.locked().map_err(folder)?;
        let (found, of) = journal.adopt().map_err(folder)?;
        drop(lock);
        if let Some(found) = of {
            return Err(AuditFault::OtherNode { path: config.folder.clone(), found, own: journal.node });
        }
        Ok((journal, found))
    }

    /// Number of the newest record; 0: there is none.
    pub(super) fn sequence(&self) -> u64 {
        self.written.chain.last_sequence()
    }

    pub(super) fn segment(&self) -> u64 {
        self.file.as_ref().map_or(0, |current| current.segment)
    }

    /// Records since the last checkpoint, those in the buffer included.
    pub(super) fn unsigned(&self) -> u64 {
        self.state.unsigned
    }

    /// The last record, as written.
    pub(super) fn last(&self) -> (u64, Digest) {
        (self.written.chain.last_sequence(), self.written.chain.last_digest())
    }

    #[cfg(test)]
    pub(super) fn open_with(&mut self, opener: Opener) {
        self.opener = opener;
        self.file = None;
    }

    // ---- one batch -------------------------------------------------------------------------------------------------

    /// Locks the folder, and goes on from what stands there. Everything until [`Journal::flush`] is one batch.
    pub(super) fn begin(&mut self) -> Result<Flock<File>, WriteFault> {
        let lock = self.locked().map_err(|source| self.fault(source))?;
        self.buffer.clear();
        self.state = self.written.clone();
        self.catch_up().map_err(|source| self.fault(source))?;
        let now = SystemTime::now();
        for entry in self.owed.clone() {
            self.put(now, &entry);
        }
        Ok(lock)
    }

    /// Puts one record into the buffer.
    pub(super) fn put(&mut self, at: SystemTime, entry: &Entry<'_>) {
        let (from, before) = (self.buffer.len(), self.state.chain);
        self.state.chain.append(&self.run, at, entry, &mut self.buffer);
        if self.buffer.len() - from > LINE_BYTES_MAX {
            // Nobody could read it: it is counted, not kept.
            self.buffer.truncate(from);
            self.state.chain = before;
            self.state.chain.append(&self.run, at, &Entry::Lost { records: 1 }, &mut self.buffer);
        }
        self.state.unsigned += 1;
    }

    /// Whether the segment has no more room than for its end.
    pub(super) fn is_full(&self) -> bool {
        self.state.length + self.buffer.len() as u64 + END_BYTES > self.segment_bytes
    }

    /// Signs the chain up to here.
    pub(super) fn checkpoint(&mut self, seal: &Seal, at: SystemTime) -> Result<(), SignFault> {
        let signer = Digest::of(seal.certificates().next().unwrap_or_default());
        if self.state.signer != Some(signer) {
            let certificates: Vec<String> = seal.certificates().map(|der| STANDARD.encode(der)).collect();
            let bytes: usize = certificates.iter().map(String::len).sum();
            if bytes > CERTIFICATES_BYTES_MAX {
                return Err(SignFault::TooLong(bytes));
            }
            self.put(at, &Entry::Signer { signer, certificates });
            self.state.signer = Some(signer);
        }
        let place = Place { chain: &self.state.name, node: &self.node, run: &self.run };
        let statement = self.state.chain.statement(&place, at, &signer);
        let signature = STANDARD.encode(seal.sign(&statement)?);
        self.put(at, &Entry::Checkpoint { signer, signature: &signature });
        self.state.unsigned = 0;
        Ok(())
    }

    /// Writes the buffer. What was written before stays as it was if this fails.
    pub(super) fn flush(&mut self) -> Result<(), WriteFault> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let length = self.written.length;
        let Some(current) = &mut self.file else {
            return Err(self.fault(io::Error::other("no segment is open")));
        };
        if let Err(source) = current.file.append(&self.buffer) {
            // Half of it may stand there. What cannot be cut now is repaired by the next who comes.
            let cut = current.file.cut(length);
            let path = current.path.clone();
            self.forget_unless(cut.is_ok());
            return Err(WriteFault { path, source });
        }
        self.state.length += self.buffer.len() as u64;
        self.buffer.clear();
        self.owed.clear();
        self.written = self.state.clone();
        Ok(())
    }

    /// Puts what was written on the disk.
    pub(super) fn sync(&mut self) -> Result<(), WriteFault> {
        let Some(current) = &mut self.file else { return Ok(()) };
        let path = current.path.clone();
        current.file.sync().map_err(|source| WriteFault { path, source })
    }

    /// After the end of a segment was flushed: begins the next one, and removes those that are too many.
    pub(super) fn rotate(&mut self, at: SystemTime) -> Result<(), WriteFault> {
        self.sync()?;
        let next = self.next_segment().map_err(|source| self.fault(source))?;
        self.create(next, at).map_err(|source| self.fault(source))?;
        self.retire(at)
    }

    fn forget_unless(&mut self, is_known: bool) {
        if !is_known {
            self.file = None;
        }
        self.buffer.clear();
        self.state = self.written.clone();
    }

    // ---- files -----------------------------------------------------------------------------------------------------

    fn locked(&self) -> io::Result<Flock<File>> {
        Flock::lock(self.lock.try_clone()?, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
    }

    fn fault(&self, source: io::Error) -> WriteFault {
        WriteFault { path: self.folder.clone(), source }
    }

    /// Goes on where another daemon wrote since. Whoever else was at the files is found out by the chain: it goes on from
    /// what this daemon wrote.
    fn catch_up(&mut self) -> io::Result<()> {
        let Some(current) = &self.file else { return self.resume() };
        let is_next = self.folder.join(name_of(current.segment + 1)).try_exists()?;
        let is_same = match fs::symlink_metadata(&current.path) {
            Ok(metadata) => metadata.ino() == current.inode && metadata.len() == self.written.length,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        if is_same && !is_next { Ok(()) } else { self.resume() }
    }

    /// Finds the end of the log anew, and says what is not as it was left.
    fn resume(&mut self) -> io::Result<()> {
        let own = self.written.clone();
        let (found, _) = self.adopt()?;
        if !found.is_whole() {
            self.owe(found.entry());
        }
        let now = SystemTime::now();
        let left = own.chain.last_sequence();
        let here = self.file.as_ref().map_or(0, |_| self.written.chain.last_sequence());
        let is_another = here == left && self.written.chain != own.chain;
        if here < left || is_another {
            // No daemon writes less, or anew: the chain goes on from what was written, which shows what is missing.
            self.written = State { signer: None, ..own };
            self.state = self.written.clone();
            // In a segment of its own, of which nothing was written in the place that is in doubt.
            self.file = None;
            self.owe(Entry::Gap { expected: left, found: here });
            self.create(self.next_segment()?, now)?;
        } else if self.file.is_none() {
            self.create(self.next_segment()?, now)?;
        } else {
            self.written.unsigned = own.unsigned;
            self.state = self.written.clone();
        }
        Ok(())
    }

    /// What is found again because it could not be written yet is one record.
    fn owe(&mut self, entry: Entry<'static>) {
        if !self.owed.contains(&entry) {
            self.owed.push(entry);
        }
    }

    /// A number that no segment has, here or in this daemon's memory.
    fn next_segment(&self) -> io::Result<u64> {
        let here = segments(&self.folder)?.last().map_or(0, |(number, _)| *number);
        Ok(here.max(self.newest) + 1)
    }

    /// Takes the end of the newest segment for the end of the log. Gives how it was found, and whose it is if it is another's.
    fn adopt(&mut self) -> io::Result<(Found, Option<String>)> {
        let mut found = Found::default();
        self.file = None;
        for (number, path) in segments(&self.folder)?.into_iter().rev() {
            let mut file = open(&path)?;
            match read_end(&mut file)? {
                End::Empty { torn } => {
                    // The first line was not written to its end.
                    found.torn = torn.or(found.torn);
                    fs::remove_file(&path)?;
                }
                End::Foreign { lines } => {
                    // Nobody knows how to go on in it: a new chain begins behind it, which shows.
                    found.unreadable_lines += lines;
                    found.is_running = true;
                    return Ok((found, None));
                }
                End::Readable { opening, .. } if opening.node != self.node => {
                    found.unreadable_lines += 1;
                    found.is_running = true;
                    return Ok((found, Some(opening.node)));
                }
                End::Readable { opening, last, torn, length } => {
                    if let Some((bytes, _)) = torn {
                        file.set_len(length - bytes)?;
                        file.sync_all()?;
                        found.torn = torn;
                    }
                    found.unreadable_lines += last.unreadable_lines;
                    found.is_running |= !last.is_stopped;
                    let length = length - torn.map_or(0, |(bytes, _)| bytes);
                    let inode = file.metadata()?.ino();
                    self.written =
                        State { chain: last.chain, name: opening.chain, length, signer: None, unsigned: 0 };
                    self.state = self.written.clone();
                    self.file = Some(Current { file: (self.opener)(file), path, inode, segment: number });
                    self.newest = self.newest.max(number);
                    return Ok((found, None));
                }
            }
        }
        // There is no log, or its beginning was torn.
        found.is_running = found.torn.is_some();
        Ok((found, None))
    }

    /// Begins a segment. Its first line is written at once.
    fn create(&mut self, segment: u64, at: SystemTime) -> io::Result<()> {
        let path = self.folder.join(name_of(segment));
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(FILE_MODE)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&path)?;
        let inode = file.metadata()?.ino();
        let mut header = Vec::new();
        let mut state = State { length: 0, signer: None, ..self.state.clone() };
        let entry = Entry::Segment(Segment {
            format: FORMAT,
            chain: &state.name,
            node: &self.node,
            segment,
            checkpoint_records: self.checkpoint_records,
            checkpoint_seconds: self.checkpoint_seconds,
        });
        state.chain.append(&self.run, at, &entry, &mut header);
        state.length = header.len() as u64;
        state.unsigned += 1;
        let mut file = (self.opener)(file);
        let begun = file.append(&header).and_then(|()| file.sync()).and_then(|()| self.lock.sync_all());
        if let Err(error) = begun {
            // An empty segment is none.
            return fs::remove_file(&path).and(Err(error));
        }
        self.file = Some(Current { file, path, inode, segment });
        self.newest = self.newest.max(segment);
        self.written = state.clone();
        self.state = state;
        Ok(())
    }

    /// Removes the oldest segments beyond those that are kept, each after a record that says so.
    fn retire(&mut self, at: SystemTime) -> Result<(), WriteFault> {
        let all = segments(&self.folder).map_err(|source| self.fault(source))?;
        let many = all.len().saturating_sub(self.keep_segments);
        for pair in all.windows(2).take(many) {
            let [(segment, path), (_, next)] = pair else { continue };
            let opening = open(next).and_then(|mut file| first_line(&mut file));
            // Where nobody knows what it ended with, the record says nothing that could be believed.
            let (last, digest) = match opening {
                Ok(Some(line)) => tail::header(&line).map(|opening| (opening.before, opening.digest)),
                Ok(None) | Err(_) => None,
            }
            .unwrap_or((0, Digest::NONE));
            self.put(at, &Entry::Retired { segment: *segment, last, digest });
            self.flush()?;
            self.sync()?;
            let path = path.clone();
            fs::remove_file(&path).map_err(|source| WriteFault { path, source })?;
        }
        Ok(())
    }
}

/// The end of one segment.
enum End {
    /// It has no whole line.
    Empty {
        torn: Option<(u64, Digest)>,
    },
    /// Its lines are no log that could be gone on with.
    Foreign {
        lines: u64,
    },
    Readable {
        opening: Opening,
        last: Last,
        torn: Option<(u64, Digest)>,
        length: u64,
    },
}

fn read_end(file: &mut File) -> io::Result<End> {
    let length = file.metadata()?.len();
    let Some(first) = first_line(file)? else {
        let mut begin = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.take(TAIL_BYTES).read_to_end(&mut begin)?;
        return Ok(match Tail::of(&begin).torn {
            // Longer than any line: no daemon wrote it.
            Some(_) if length > LINE_BYTES_MAX as u64 => End::Foreign { lines: 1 },
            torn => End::Empty { torn },
        });
    };
    let from = length.saturating_sub(TAIL_BYTES);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let begin = match from {
        0 => 0,
        _ => bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |at| at + 1),
    };
    let Tail { last, torn } = Tail::of(&bytes[begin..]);
    Ok(match (tail::header(&first), last) {
        (Some(opening), Some(last)) => End::Readable { opening, last, torn, length },
        (None, _) | (_, None) => End::Foreign { lines: 1 },
    })
}

/// The first line, without its line feed; `None` if there is no whole one.
fn first_line(file: &mut File) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; LINE_BYTES_MAX + 1];
    file.seek(SeekFrom::Start(0))?;
    let mut read = 0;
    while read < bytes.len() {
        match file.read(&mut bytes[read..])? {
            0 => break,
            more => read += more,
        }
    }
    let end = bytes[..read].iter().position(|byte| *byte == b'\n');
    Ok(end.map(|end| {
        bytes.truncate(end);
        bytes
    }))
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).append(true).custom_flags(nix::libc::O_NOFOLLOW).open(path)
}

/// The folder, made if it is not there, ours alone.
fn own_folder(path: &Path) -> io::Result<File> {
    DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(path)?;
    let folder = File::open(path)?;
    let metadata = folder.metadata()?;
    if metadata.uid() != Uid::effective().as_raw() {
        return Err(io::Error::other(format!("it belongs to user {}", metadata.uid())));
    }
    if metadata.mode() & 0o777 != FOLDER_MODE {
        fs::set_permissions(path, Permissions::from_mode(FOLDER_MODE))?;
    }
    Ok(folder)
}

fn new_name() -> String {
    format!("{:032x}", rand::random::<u128>())
}
