//! A line's place: its number, the digest of the line before, when and by which run it was written; and what a checkpoint
//! signs.

use std::{
    io::Write as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{Digest, entry::Entry};

/// Where the next line goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    next: u64,
    last: Digest,
}

impl Chain {
    /// Before the first line. Numbers count from 1.
    pub const BEGIN: Self = Self { next: 1, last: Digest::NONE };

    /// After line number `seq`, whose digest is `digest`.
    pub const fn after(seq: u64, digest: Digest) -> Self {
        Self { next: seq.saturating_add(1), last: digest }
    }

    /// Number of the newest line; 0: there is none.
    pub const fn last_sequence(&self) -> u64 {
        self.next - 1
    }

    /// Digest of the newest line.
    pub const fn last_digest(&self) -> Digest {
        self.last
    }

    /// What a checkpoint that is the next line would sign.
    pub fn statement(&self, place: &Place<'_>, time: SystemTime, signer: &Digest) -> Vec<u8> {
        let time = stamp(time);
        let Place { chain, node, run } = *place;
        statement(&Statement { chain, node, run, seq: self.next, prev: &self.last, time: &time, signer })
    }

    /// Appends one line to `out`, line feed included. `entry` is written by `run`.
    pub fn append(&mut self, run: &str, time: SystemTime, entry: &Entry<'_>, out: &mut Vec<u8>) {
        let from = out.len();
        let time = stamp(time);
        // The digest, the time and the run need no escapes.
        let (seq, prev) = (self.next, self.last);
        let head = prev
            .with_hex(|prev| write!(out, r#"{{"seq":{seq},"prev":"{prev}","time":"{time}","run":"{run}""#));
        let body = out.len();
        let whole = serde_json::to_writer(&mut *out, entry);
        (head.is_ok() && whole.is_ok()).then_some(()).expect("texts and numbers are written to memory");
        // The entry is an object with at least its kind: its brace becomes the comma between the two halves.
        out[body] = b',';
        self.last = Digest::of(&out[from..]);
        self.next += 1;
        out.push(b'\n');
    }
}

/// Which chain, whose, and by which run.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub chain: &'a str,
    pub node: &'a str,
    pub run: &'a str,
}

/// What a checkpoint says, in fields.
pub(super) struct Statement<'a> {
    pub(super) chain: &'a str,
    pub(super) node: &'a str,
    pub(super) run: &'a str,
    pub(super) seq: u64,
    pub(super) prev: &'a Digest,
    pub(super) time: &'a str,
    pub(super) signer: &'a Digest,
}

/// The bytes that are signed: a name of their kind, so that no signature for something else is one of these, and a line for
/// each field.
pub(super) fn statement(of: &Statement<'_>) -> Vec<u8> {
    let Statement { chain, node, run, seq, prev, time, signer } = of;
    format!(
        "culvert audit checkpoint 1\nchain {chain}\nnode {node}\nrun {run}\nseq {seq}\nprev {prev}\ntime {time}\nsigner {signer}\n"
    )
    .into_bytes()
}

/// RFC 3339, UTC, milliseconds. A clock outside of the years 1970 to 9999 is shown as 1970.
pub(super) fn stamp(time: SystemTime) -> String {
    let milliseconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    let nanoseconds = i128::try_from(milliseconds).unwrap_or(0).saturating_mul(1_000_000);
    let time = OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let (date, clock) = (time.date(), time.time());
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        date.year(),
        u8::from(date.month()),
        date.day(),
        clock.hour(),
        clock.minute(),
        clock.second(),
        clock.millisecond()
    )
}

/// The time of a [`stamp`]; `None` if it is none.
pub(super) fn stamped(text: &str) -> Option<SystemTime> {
    let time = OffsetDateTime::parse(text, &Rfc3339).ok()?;
    let nanoseconds = u64::try_from(time.unix_timestamp_nanos()).ok()?;
    Some(UNIX_EPOCH + Duration::from_nanos(nanoseconds))
}
