//! The decision log: what a line says ([`entry`]), how lines hold together ([`chain`]), how a daemon finds its place again
//! after a restart ([`tail`]), and whether a log is as it was written ([`verify`]).
//!
//! Lines of JSON, one record each. Every line carries the SHA-256 of the bytes of the line before it, so that none can be
//! changed, taken out, put in or moved without the next one showing it. Checkpoints carry a signature by the node's
//! certificate key over their place in the chain, so that the whole cannot be written anew by somebody else. What is at the
//! end may still be cut off: against that stands the number of a checkpoint that was seen elsewhere ([`verify::Anchor`]).
//!
//! In go bytes, times and signatures, out come bytes and findings. Not here: files, keys, certificates, when a checkpoint is
//! due.

pub mod chain;
pub mod entry;
pub mod tail;
pub mod verify;

#[cfg(test)]
mod tests;

use std::{fmt, str::FromStr};

use serde::{Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// Version of the format, in the first line of every segment.
pub const FORMAT: u32 = 1;

/// Longest line, in bytes. The longest that is written has 32 KiB: the certificates of a signer. A longer one is no
/// record.
pub const LINE_BYTES_MAX: usize = 64 * 1024;

/// SHA-256 of a line's bytes, without its line feed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Stands before the first line of a chain.
    pub const NONE: Self = Self([0; 32]);

    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    fn hex(&self) -> [u8; 64] {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = [0; 64];
        for (pair, byte) in text.as_chunks_mut::<2>().0.iter_mut().zip(self.0) {
            *pair = [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]];
        }
        text
    }

    /// As 64 hexadecimal digits.
    fn with_hex<R>(&self, read: impl FnOnce(&str) -> R) -> R {
        let text = self.hex();
        read(std::str::from_utf8(&text).expect("hexadecimal digits are ASCII"))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_hex(|text| formatter.write_str(text))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// A text that is not 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected 64 digits of 0-9 and a-f")]
pub struct InvalidDigest;

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(InvalidDigest),
        };
        let bytes = text.as_bytes();
        if bytes.len() != 64 {
            return Err(InvalidDigest);
        }
        let mut digest = [0; 32];
        for (byte, pair) in digest.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Ok(Self(digest))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.with_hex(|text| serializer.serialize_str(text))
    }
}
