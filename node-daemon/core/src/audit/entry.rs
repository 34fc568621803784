//! What a line says, beside its place in the chain: one enum for writing, one for reading.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::Digest;

/// What is written.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[allow(
    clippy::large_enum_variant,
    reason = "there is one at a time, and most are decisions: a box would be one more allocation each"
)]
pub enum Entry<'a> {
    /// The first line of a file.
    Segment(Segment<'a>),
    /// A daemon begins to write.
    Start {
        version: &'a str,
    },
    /// The log did not end with a stop, or not with a whole line: what stood before is the last that is known.
    Recovered(Recovered),
    /// What was written before is gone or another: this many of the newest records should have been there, up to this one.
    Gap {
        expected: u64,
        found: u64,
    },
    /// Documents came into force.
    Snapshot {
        number: u64,
        digest: &'a str,
    },
    Decision(Decision<'a>),
    /// So many decisions found no place in the queue and are not here.
    Lost {
        records: u64,
    },
    /// The oldest segment was removed because there were as many as are kept; its last line was this.
    Retired {
        segment: u64,
        last: u64,
        digest: Digest,
    },
    /// Certificates of the key that signs from here on, leaf first, without the root: DER in base64.
    Signer {
        signer: Digest,
        certificates: Vec<String>,
    },
    /// `signature` (base64, DER of ECDSA P-256 with SHA-256) is over [`statement`](super::chain::statement).
    Checkpoint {
        signer: Digest,
        signature: &'a str,
    },
    /// The daemon ended in order: nothing of it is missing.
    Stop,
}

/// Whose log this is, and which part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Segment<'a> {
    pub format: u32,
    /// Random name of the chain, in hexadecimal digits.
    pub chain: &'a str,
    /// The node's name as its certificates have it.
    pub node: &'a str,
    /// Counts from 1.
    pub segment: u64,
    /// A checkpoint is due after so many records,
    pub checkpoint_records: u64,
    /// and after so many seconds with records.
    pub checkpoint_seconds: u64,
}

/// How a log was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Recovered {
    /// Bytes of a last line that was not written to its end. They were removed.
    pub torn_bytes: u64,
    /// What they were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub torn_digest: Option<Digest>,
    /// Whole lines at the end that are no records. They were left.
    pub unreadable_lines: u64,
}

/// One answer of the policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision<'a> {
    /// Number of the connection within the run.
    pub connection: u64,
    pub direction: &'a str,
    pub path: &'a str,
    pub source: End<'a>,
    pub destination: End<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<&'a str>,
    pub protocol: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Request<'a>>,
    pub verdict: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'a str>,
    /// What the answer would be if everything were enforced that is only tried (policy B-11).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shadow: Option<Shadow<'a>>,
    /// The AUDIT policy that asks for this record (policy F-3).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<&'a str>,
    /// Number and digest of the documents by which it was judged.
    pub snapshot: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<&'a str>,
}

/// One end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct End<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<&'a str>,
}

/// What was asked for. The query of a path is never kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Request<'a> {
    pub method: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<&'a str>,
    /// Method or path was longer than is kept.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub is_cut: bool,
}

/// A would-be verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shadow<'a> {
    pub verdict: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<&'a str>,
}

/// What is read of a line: its place, and what verification needs. Keys that it does not know are covered by the digest as
/// all others.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) seq: u64,
    pub(super) prev: Digest,
    pub(super) time: String,
    pub(super) run: String,
    pub(super) read: Read,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    Segment(Header),
    Start,
    Recovered { torn_bytes: u64, unreadable_lines: u64 },
    Gap { expected: u64, found: u64 },
    Decision,
    Lost { records: u64 },
    Retired { segment: u64, last: u64, digest: Digest },
    Signer { signer: Digest, certificates: Vec<String> },
    Checkpoint { signer: Digest, signature: String },
    Stop,
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) format: u32,
    pub(super) chain: String,
    pub(super) node: String,
    pub(super) segment: u64,
    pub(super) checkpoint_records: u64,
    pub(super) checkpoint_seconds: u64,
}

/// Every key that is read, of any kind of line.
#[derive(Deserialize)]
struct Raw {
    seq: u64,
    prev: String,
    time: String,
    run: String,
    kind: String,
    format: Option<u32>,
    chain: Option<String>,
    node: Option<String>,
    segment: Option<u64>,
    checkpoint_records: Option<u64>,
    checkpoint_seconds: Option<u64>,
    torn_bytes: Option<u64>,
    unreadable_lines: Option<u64>,
    expected: Option<u64>,
    found: Option<u64>,
    records: Option<u64>,
    last: Option<u64>,
    digest: Option<String>,
    signer: Option<String>,
    certificates: Option<Vec<String>>,
    signature: Option<String>,
}

impl Line {
    /// Reads a line's bytes, without the line feed.
    ///
    /// # Errors
    /// Why it is no record, in words.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > super::LINE_BYTES_MAX {
            return Err(format!("{} bytes, a record has at most {}", bytes.len(), super::LINE_BYTES_MAX));
        }
        let raw: Raw = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        Ok(Self {
            seq: raw.seq,
            prev: digest("prev", &raw.prev)?,
            time: raw.time.clone(),
            run: raw.run.clone(),
            read: raw.meaning()?,
        })
    }
}

impl Raw {
    fn meaning(self) -> Result<Read, String> {
        Ok(match self.kind.as_str() {
            "segment" => Read::Segment(Header {
                format: needed("format", self.format)?,
                chain: needed("chain", self.chain)?,
                node: needed("node", self.node)?,
                segment: needed("segment", self.segment)?,
                checkpoint_records: needed("checkpoint_records", self.checkpoint_records)?,
                checkpoint_seconds: needed("checkpoint_seconds", self.checkpoint_seconds)?,
            }),
            "start" => Read::Start,
            "recovered" => Read::Recovered {
                torn_bytes: needed("torn_bytes", self.torn_bytes)?,
                unreadable_lines: needed("unreadable_lines", self.unreadable_lines)?,
            },
            "gap" => Read::Gap {
                expected: needed("expected", self.expected)?,
                found: needed("found", self.found)?,
            },
            "decision" => Read::Decision,
            "lost" => Read::Lost { records: needed("records", self.records)? },
            "retired" => Read::Retired {
                segment: needed("segment", self.segment)?,
                last: needed("last", self.last)?,
                digest: digest("digest", &needed("digest", self.digest)?)?,
            },
            "signer" => Read::Signer {
                signer: digest("signer", &needed("signer", self.signer)?)?,
                certificates: needed("certificates", self.certificates)?,
            },
            "checkpoint" => Read::Checkpoint {
                signer: digest("signer", &needed("signer", self.signer)?)?,
                signature: needed("signature", self.signature)?,
            },
            "stop" => Read::Stop,
            _ => Read::Other,
        })
    }
}

fn needed<T>(key: &str, value: Option<T>) -> Result<T, String> {
    value.ok_or_else(|| format!("{key} is missing"))
}

fn digest(key: &str, text: &str) -> Result<Digest, String> {
    text.parse().map_err(|invalid| format!("{key}: {invalid}"))
}
