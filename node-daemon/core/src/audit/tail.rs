//! The end of a segment as a daemon finds it: where its last whole line ends, and what that was.

use super::{
    Digest,
    chain::Chain,
    entry::{Line, Read},
};

/// See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tail {
    /// The newest line that is a record, and those after it that are none; `None`: no record was seen.
    pub last: Option<Last>,
    /// Bytes after the last line feed, and what they were.
    pub torn: Option<(u64, Digest)>,
}

/// The end of what is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Last {
    pub chain: Chain,
    /// Whole lines after the last record that are no records. Each counts as a line of the chain.
    pub unreadable_lines: u64,
    /// The log ends with a stop, or with the checkpoint of one.
    pub is_stopped: bool,
}

impl Tail {
    /// Reads the last bytes of a segment, which begin at the begin of a line.
    pub fn of(bytes: &[u8]) -> Self {
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let torn = &bytes[whole..];
        let mut tail =
            Self { last: None, torn: (!torn.is_empty()).then(|| (torn.len() as u64, Digest::of(torn))) };
        for line in bytes[..whole].split_inclusive(|byte| *byte == b'\n') {
            tail.take(&line[..line.len() - 1]);
        }
        tail
    }

    fn take(&mut self, bytes: &[u8]) {
        let was_stopped = self.last.is_some_and(|last| last.is_stopped);
        match (Line::read(bytes), &mut self.last) {
            (Ok(line), last) => {
                let is_stopped = match line.read {
                    Read::Stop => true,
                    Read::Checkpoint { .. } | Read::Signer { .. } => was_stopped,
                    Read::Segment(_)
                    | Read::Start
                    | Read::Recovered { .. }
                    | Read::Gap { .. }
                    | Read::Decision
                    | Read::Lost { .. }
                    | Read::Retired { .. }
                    | Read::Other => false,
                };
                let chain = Chain::after(line.seq, Digest::of(bytes));
                *last = Some(Last { chain, unreadable_lines: 0, is_stopped });
            }
            (Err(_), Some(last)) => {
                let chain = Chain::after(last.chain.last_sequence().saturating_add(1), Digest::of(bytes));
                let unreadable_lines = last.unreadable_lines + 1;
                *last = Last { chain, unreadable_lines, is_stopped: false };
            }
            (Err(_), None) => {}
        }
    }
}

/// Name of the chain in the first line of a segment, and that line's place; `None` if it is no such line.
pub fn header(bytes: &[u8]) -> Option<Opening> {
    let line = Line::read(bytes).ok()?;
    let Read::Segment(header) = line.read else { return None };
    Some(Opening {
        chain: header.chain,
        node: header.node,
        segment: header.segment,
        before: line.seq.checked_sub(1)?,
        digest: line.prev,
    })
}

/// How a segment begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    pub chain: String,
    pub node: String,
    pub segment: u64,
    /// Number and digest of the line before it, the last of the segment before.
    pub before: u64,
    pub digest: Digest,
}
