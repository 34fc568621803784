//! Is a log as it was written, by whom it says, and whole?
//!
//! Lines go in, in the order of the segments; a [`Report`] comes out. After a finding the next line is judged by the line that
//! stands there, so that each place where somebody was at work is told once, not every line after it.

use std::{
    collections::BTreeMap,
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use super::{
    Digest, FORMAT,
    chain::{Statement, stamped, statement},
    entry::{Header, Line, Read},
};

/// Findings that are listed; the rest is counted. Nobody reads more.
pub const FINDINGS_LISTED_MAX: usize = 100;

/// A checkpoint may be late by this factor before its absence is a finding: a machine that is busy signs late, and what a
/// checkpoint needs beside it (its certificates, a new segment) are lines too.
const LATE_FACTOR: u32 = 2;

/// Lines that stand beside decisions at a restart or a rotation, and one second for the clock.
const LATE_LINES: u64 = 16;
const LATE_TIME: Duration = Duration::from_secs(1);

/// Judges signatures of checkpoints. Certificates are none of this crate's business.
pub trait Witness {
    /// The name of the node that made the signature.
    ///
    /// # Errors
    /// Why nobody of this mesh did, in words.
    fn check(&self, testimony: &Testimony<'_>) -> Result<String, String>;
}

/// What a checkpoint shows.
#[derive(Clone, Copy, Debug)]
pub struct Testimony<'a> {
    /// SHA-256 of the first certificate.
    pub signer: &'a Digest,
    /// DER in base64, leaf first, without the root.
    pub certificates: &'a [String],
    /// When it was signed, by the node's clock.
    pub at: SystemTime,
    pub statement: &'a [u8],
    /// DER in base64.
    pub signature: &'a str,
}

/// Number, and digest if it is known, of a line that was seen elsewhere: in a metric or in a line of the daemon's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anchor {
    pub seq: u64,
    pub digest: Option<Digest>,
}

/// A text that is no anchor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a number, or a number, a colon and 64 digits of 0-9 and a-f")]
pub struct InvalidAnchor;

impl FromStr for Anchor {
    type Err = InvalidAnchor;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (seq, digest) = match text.split_once(':') {
            Some((seq, digest)) => (seq, Some(digest.parse().map_err(|_| InvalidAnchor)?)),
            None => (text, None),
        };
        Ok(Self { seq: seq.parse().map_err(|_| InvalidAnchor)?, digest })
    }
}

/// What is asked of a log.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Whose it is, as in the node's certificates; `None`: whose it says it is.
    pub node: Option<String>,
    pub anchor: Option<Anchor>,
    /// One file of a log is judged, not the whole folder: nothing is said of what stands before or after it.
    pub alone: bool,
}

/// One thing that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub file: String,
    /// Counts from 1; 0: the file as a whole.
    pub line: u64,
    pub problem: Problem,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("no record: {0}")]
    NotARecord(String),
    #[error("not written to its end ({bytes} bytes), and it is not the last of the log")]
    TornInside { bytes: u64 },
    #[error(
        "the record before it is not the one that it was written after: one of the two was changed, or another put in its place"
    )]
    Changed,
    #[error("record {found} stands where record {expected} belongs: {} records were taken out", found - expected)]
    Missing { expected: u64, found: u64 },
    #[error("record {found} stands where record {expected} belongs: put in, put twice, or moved")]
    Moved { expected: u64, found: u64 },
    #[error("the first line of a segment says whose it is, this one does not")]
    NoHeader,
    #[error("a segment begins in the middle of a file")]
    HeaderInside,
    #[error("format {0} is not known to this version")]
    Format(u32),
    #[error(
        "a segment of another chain ({found}, this log is {expected}): of another log, or of another time"
    )]
    OtherChain { expected: String, found: String },
    #[error("a segment of {found}, this is the log of {expected}")]
    OtherNode { expected: String, found: String },
    #[error("says that it is segment {found}, its name says {expected}")]
    OtherSegment { expected: u64, found: u64 },
    #[error("the segments before it, up to {up_to}, are not here")]
    SegmentMissing { up_to: u64 },
    #[error("the segments before it are not here, and no record says that they were removed in order")]
    NotRetired,
    #[error("the checkpoint's signer {0} has no certificates in this segment")]
    UnknownSigner(Digest),
    #[error("the checkpoint's time {0:?} is none")]
    BadTime(String),
    #[error("the checkpoint's signature does not hold: {0}")]
    Signature(String),
    #[error("the checkpoint was signed by {found}, this is the log of {expected}")]
    SignedByOther { expected: String, found: String },
    #[error("nothing is signed: the log has no checkpoint that holds")]
    NothingSigned,
    #[error(
        "{records} records in {seconds} s follow the last checkpoint, and one was due after {due_records} records or {due_seconds} s: \
         the node had no certificate, or somebody else put them there"
    )]
    Unsigned { records: u64, seconds: u64, due_records: u64, due_seconds: u64 },
    #[error("it ends with record {last}, and {expected} was seen: {} records were cut off", expected - last)]
    CutOff { last: u64, expected: u64 },
    #[error("record {0} has another digest than the one that was seen: this is another log")]
    AnchorDiffers(u64),
    #[error("record {0}, whose digest was seen, is not here any more: compare with a newer one")]
    AnchorRetired(u64),
    #[error("no record at all")]
    Empty,
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(formatter, "{}: {}", self.file, self.problem),
            line => write!(formatter, "{}:{line}: {}", self.file, self.problem),
        }
    }
}

/// Something that is as it was written, and that a reader wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    pub file: String,
    /// Counts from 1.
    pub line: u64,
    pub what: What,
}

/// See [`Note`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum What {
    #[error(
        "after a run that did not end in order: what it had not written is lost, {torn_bytes} bytes of a torn line were removed"
    )]
    Recovered { torn_bytes: u64, unreadable_lines: u64 },
    #[error(
        "the daemon found record {found} where it had written {expected}: somebody changed its files while it ran"
    )]
    Gap { expected: u64, found: u64 },
    #[error("{0} decisions found no place in the queue and are not here")]
    Lost(u64),
    #[error("the oldest segment, {0}, was removed in order: as many are kept")]
    Retired(u64),
    #[error("the last line is not whole ({0} bytes): it is being written, or a crash cut it")]
    Torn(u64),
    #[error(
        "the checkpoint was signed {seconds} s after the first record that it covers, and one was due after {due_seconds} s: \
         the node had no certificate, or the records were written anew"
    )]
    LateSignature { seconds: u64, due_seconds: u64 },
    #[error("run {0} has no stop: it goes on, or it was killed and what it had not written is lost")]
    NoStop(String),
}

impl fmt::Display for Note {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}: {}", self.file, self.line, self.what)
    }
}

/// How a log was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub findings: Vec<Finding>,
    /// Findings beyond [`FINDINGS_LISTED_MAX`].
    pub more: u64,
    pub notes: Vec<Note>,
    /// Whose log it says it is.
    pub node: Option<String>,
    pub segments: u64,
    pub records: u64,
    pub decisions: u64,
    pub lost: u64,
    /// First and last number; 0 where there is no record.
    pub first: u64,
    pub last: u64,
    pub last_digest: Option<Digest>,
    /// Checkpoints whose signature holds.
    pub checkpoints: u64,
    /// Number and digest of the newest of them.
    pub last_checkpoint: Option<(u64, Digest)>,
    /// Records after it: chained, and not signed yet.
    pub unsigned: u64,
}

impl Report {
    pub fn holds(&self) -> bool {
        self.findings.is_empty()
    }
}

/// See the module.
pub struct Verifier<'w> {
    witness: Option<&'w dyn Witness>,
    expected: Expected,
    report: Report,
    file: String,
    line: u64,
    /// Number in the name of the present file; `None`: it has no such name.
    segment: Option<u64>,
    header: Option<Header>,
    /// The segment before, by its name.
    before: Option<u64>,
    /// Number and digest of the line before; `None`: it is not known what that was.
    place: Option<(u64, Digest)>,
    /// How the oldest segment begins: its file, number, and the line before it.
    opening: Option<(String, u64, u64, Digest)>,
    /// Segments that were removed in order: number, last line.
    retired: BTreeMap<u64, (u64, Digest)>,
    signers: BTreeMap<Digest, Vec<String>>,
    torn: Option<(String, u64, u64)>,
    /// First and newest time after the last checkpoint.
    unsigned_times: Option<(SystemTime, SystemTime)>,
    /// Runs that began and have not ended: where.
    runs: BTreeMap<String, (String, u64)>,
    anchor_met: bool,
}

impl<'w> Verifier<'w> {
    /// Without a witness signatures are not judged, and only the chain is.
    pub fn new(expected: Expected, witness: Option<&'w dyn Witness>) -> Self {
        Self {
            witness,
            expected,
            report: Report::default(),
            file: String::new(),
            line: 0,
            segment: None,
            header: None,
            before: None,
            place: None,
            opening: None,
            retired: BTreeMap::new(),
            signers: BTreeMap::new(),
            torn: None,
            unsigned_times: None,
            runs: BTreeMap::new(),
            anchor_met: false,
        }
    }

    /// The next file follows. `segment` is the number in its name, if it has one.
    pub fn begin(&mut self, file: &str, segment: Option<u64>) {
        if let Some((file, line, bytes)) = self.torn.take() {
            self.find_at(file, line, Problem::TornInside { bytes });
        }
        self.before = self.segment.or(self.before);
        self.segment = segment;
        self.line = 0;
        file.clone_into(&mut self.file);
        self.signers.clear();
        self.report.segments += 1;
        if let (Some(segment), Some(before)) = (segment, self.before)
            && segment > before + 1
        {
            self.find_at(self.file.clone(), 0, Problem::SegmentMissing { up_to: segment - 1 });
        }
    }

    /// The next whole line of the file, without its line feed.
    pub fn line(&mut self, bytes: &[u8]) {
        self.line += 1;
        let digest = Digest::of(bytes);
        match Line::read(bytes) {
            Ok(line) => self.record(&line, digest),
            Err(problem) => {
                self.find(Problem::NotARecord(problem));
                // It takes a place in the chain; which one, the next line tells.
                self.place = self.place.map(|(seq, _)| (seq.saturating_add(1), digest));
            }
        }
    }

    /// The file ends with this many bytes that are no whole line.
    pub fn torn(&mut self, bytes: u64) {
        self.torn = Some((self.file.clone(), self.line + 1, bytes));
    }

    /// The last file is over.
    pub fn finish(mut self) -> Report {
        if let Some((file, line, bytes)) = self.torn.take() {
            self.report.notes.push(Note { file, line, what: What::Torn(bytes) });
        }
        let end = (self.file.clone(), self.line);
        if self.report.records == 0 {
            self.find_at(end.0, 0, Problem::Empty);
            return self.report;
        }
        self.judge_opening();
        self.judge_anchor(&end);
        self.judge_signatures(&end);
        for (run, (file, line)) in std::mem::take(&mut self.runs) {
            self.report.notes.push(Note { file, line, what: What::NoStop(run) });
        }
        self.report
    }

    fn record(&mut self, line: &Line, digest: Digest) {
        self.judge_place(line);
        if self.line == 1 {
            if let Read::Segment(header) = &line.read {
                self.open(header, line);
            } else {
                self.find(Problem::NoHeader);
            }
        } else if matches!(line.read, Read::Segment(_)) {
            self.find(Problem::HeaderInside);
        }
        let report = &mut self.report;
        if report.records == 0 {
            report.first = line.seq;
        }
        report.records += 1;
        report.unsigned += 1;
        report.last = line.seq;
        report.last_digest = Some(digest);
        if let Some(time) = stamped(&line.time) {
            let first = self.unsigned_times.map_or(time, |(first, _)| first);
            self.unsigned_times = Some((first, time));
        }
        self.meet_anchor(line.seq, digest);
        self.take(line, digest);
        self.place = Some((line.seq, digest));
    }

    fn judge_place(&mut self, line: &Line) {
        let Some((before, digest)) = self.place else { return };
        let expected = before.saturating_add(1);
        if line.seq > expected {
            self.find(Problem::Missing { expected, found: line.seq });
        } else if line.seq < expected {
            self.find(Problem::Moved { expected, found: line.seq });
        } else if line.prev != digest {
            self.find(Problem::Changed);
        }
    }

    /// The first line of a segment.
    fn open(&mut self, header: &Header, line: &Line) {
        if header.format != FORMAT {
            self.find(Problem::Format(header.format));
        }
        if let Some(expected) = self.segment.filter(|expected| *expected != header.segment) {
            self.find(Problem::OtherSegment { expected, found: header.segment });
        }
        let chain = self.header.as_ref().map(|known| known.chain.clone());
        if let Some(expected) = chain.filter(|chain| *chain != header.chain) {
            self.find(Problem::OtherChain { expected, found: header.chain.clone() });
        }
        let node = self.expected.node.as_ref().or(self.report.node.as_ref()).cloned();
        if let Some(expected) = node.filter(|node| *node != header.node) {
            self.find(Problem::OtherNode { expected, found: header.node.clone() });
        }
        if self.header.is_none() {
            self.report.node = Some(header.node.clone());
            let before = line.seq.saturating_sub(1);
            self.opening = Some((self.file.clone(), header.segment, before, line.prev));
        }
        self.header = Some(header.clone());
    }

    fn take(&mut self, line: &Line, digest: Digest) {
        match &line.read {
            Read::Decision => self.report.decisions += 1,
            Read::Start => {
                // Nobody signed while no daemon ran.
                self.unsigned_times = None;
                self.runs.insert(line.run.clone(), (self.file.clone(), self.line));
            }
            Read::Stop => {
                self.runs.remove(&line.run);
            }
            Read::Recovered { torn_bytes, unreadable_lines } => {
                self.note(What::Recovered { torn_bytes: *torn_bytes, unreadable_lines: *unreadable_lines });
            }
            Read::Gap { expected, found } => {
                self.note(What::Gap { expected: *expected, found: *found });
            }
            Read::Lost { records } => {
                self.report.lost = self.report.lost.saturating_add(*records);
                self.note(What::Lost(*records));
            }
            Read::Retired { segment, last, digest } => {
                self.retired.insert(*segment, (*last, *digest));
                self.note(What::Retired(*segment));
            }
            Read::Signer { signer, certificates } => {
                self.signers.insert(*signer, certificates.clone());
            }
            Read::Checkpoint { signer, signature } => self.checkpoint(line, digest, signer, signature),
            Read::Segment(_) | Read::Other => {}
        }
    }

    fn checkpoint(&mut self, line: &Line, digest: Digest, signer: &Digest, signature: &str) {
        let Some(witness) = self.witness else { return };
        match self.judge_signature(witness, line, signer, signature) {
            Ok(()) => {
                self.note_late(line);
                self.report.checkpoints += 1;
                self.report.last_checkpoint = Some((line.seq, digest));
                self.report.unsigned = 0;
                self.unsigned_times = None;
            }
            Err(problem) => self.find(problem),
        }
    }

    /// A key is only as old as its certificate: who rewrites what another key signed cannot sign it in time.
    fn note_late(&mut self, line: &Line) {
        let (Some((first, _)), Some(at), Some(header)) =
            (self.unsigned_times, stamped(&line.time), &self.header)
        else {
            return;
        };
        let (time, due_seconds) = (at.duration_since(first).unwrap_or_default(), header.checkpoint_seconds);
        if time > late(due_seconds) {
            self.note(What::LateSignature { seconds: time.as_secs(), due_seconds });
        }
    }

    fn judge_signature(
        &self,
        witness: &dyn Witness,
        line: &Line,
        signer: &Digest,
        signature: &str,
    ) -> Result<(), Problem> {
        let Some(header) = &self.header else { return Err(Problem::NoHeader) };
        let certificates = self.signers.get(signer).ok_or(Problem::UnknownSigner(*signer))?;
        let at = stamped(&line.time).ok_or_else(|| Problem::BadTime(line.time.clone()))?;
        let statement = statement(&Statement {
            chain: &header.chain,
            node: &header.node,
            run: &line.run,
            seq: line.seq,
            prev: &line.prev,
            time: &line.time,
            signer,
        });
        let testimony = Testimony { signer, certificates, at, statement: &statement, signature };
        let found = witness.check(&testimony).map_err(Problem::Signature)?;
        if found != header.node {
            return Err(Problem::SignedByOther { expected: header.node.clone(), found });
        }
        Ok(())
    }

    fn meet_anchor(&mut self, seq: u64, digest: Digest) {
        if let Some(Anchor { seq: seen, digest: Some(expected) }) = self.expected.anchor
            && seen == seq
        {
            self.anchor_met = true;
            if expected != digest {
                self.find(Problem::AnchorDiffers(seq));
            }
        }
    }

    /// Whether what is not here before the oldest segment went in order.
    fn judge_opening(&mut self) {
        let Some((file, segment, before, digest)) = self.opening.take() else { return };
        if self.expected.alone {
            return;
        }
        let in_order = if segment == 1 {
            (before, digest) == (0, Digest::NONE)
        } else {
            self.retired.get(&(segment - 1)) == Some(&(before, digest))
        };
        if !in_order {
            self.find_at(file, 1, Problem::NotRetired);
        }
    }

    fn judge_anchor(&mut self, end: &(String, u64)) {
        let Some(anchor) = self.expected.anchor else { return };
        if anchor.seq > self.report.last {
            let problem = Problem::CutOff { last: self.report.last, expected: anchor.seq };
            self.find_at(end.0.clone(), end.1, problem);
        } else if anchor.digest.is_some() && !self.anchor_met {
            self.find_at(end.0.clone(), 0, Problem::AnchorRetired(anchor.seq));
        }
    }

    fn judge_signatures(&mut self, end: &(String, u64)) {
        if self.witness.is_none() {
            return;
        }
        if self.report.checkpoints == 0 {
            self.find_at(end.0.clone(), 0, Problem::NothingSigned);
            return;
        }
        let Some(header) = &self.header else { return };
        let (due_records, due_seconds) = (header.checkpoint_records, header.checkpoint_seconds);
        let records = self.report.unsigned;
        let time = self.unsigned_times.and_then(|(first, last)| last.duration_since(first).ok());
        let time = time.unwrap_or_default();
        let records_max = due_records.saturating_mul(LATE_FACTOR.into()).saturating_add(LATE_LINES);
        if records > records_max || time > late(due_seconds) {
            let problem = Problem::Unsigned { records, seconds: time.as_secs(), due_records, due_seconds };
            self.find_at(end.0.clone(), end.1, problem);
        }
    }

    fn note(&mut self, what: What) {
        self.report.notes.push(Note { file: self.file.clone(), line: self.line, what });
    }

    fn find(&mut self, problem: Problem) {
        self.find_at(self.file.clone(), self.line, problem);
    }

    fn find_at(&mut self, file: String, line: u64, problem: Problem) {
        if self.report.findings.len() < FINDINGS_LISTED_MAX {
            self.report.findings.push(Finding { file, line, problem });
        } else {
            self.report.more += 1;
        }
    }
}

fn late(due_seconds: u64) -> Duration {
    Duration::from_secs(due_seconds).saturating_mul(LATE_FACTOR).saturating_add(LATE_TIME)
}
