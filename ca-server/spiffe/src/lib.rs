//! The grammar of names: whatever can be named in a certificate of the mesh is decided here and nowhere else.
//!
//! In come URIs from certificates, requests and configuration; out come typed names that nobody checks again.
//! Three forms exist, told apart by their path alone, so that none can pose as another (T-10):
//!
//! | Form | Type |
//! |---|---|
//! | `spiffe://<trust domain>/ns/<namespace>/sa/<service account>` | [`SpiffeId`] |
//! | `spiffe://<trust domain>/culvert/node/<name>` | [`NodeId`] |
//! | `spiffe://<trust domain>/culvert/ca` | [`CaId`] |
//!
//! Follows the SPIFFE-ID standard, section 2, which is stricter than RFC 3986: no percent-encoding, no user,
//! port, query or fragment, no empty or relative segment, no trailing slash. Not here: certificates, trust.
#![forbid(unsafe_code)]

mod id;
mod trust_domain;

pub use id::{CaId, NodeId, PeerName, SpiffeId};
pub use trust_domain::TrustDomain;

use std::fmt;
use std::sync::Arc;

/// Longest accepted URI, in bytes (SPIFFE-ID standard, section 2.3).
pub const URI_BYTES_MAX: usize = 2048;

/// Longest accepted trust domain, in bytes: a DNS name fits (SPIFFE-ID standard, section 2.1).
pub const TRUST_DOMAIN_BYTES_MAX: usize = 255;

/// Longest accepted namespace, service account or node name, in bytes: the longest name that Kubernetes allows.
/// Three names of full length stay below [`URI_BYTES_MAX`].
pub const SEGMENT_BYTES_MAX: usize = 253;

/// A piece of a name, for errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Piece {
    /// The part between `spiffe://` and the first slash.
    TrustDomain,
    /// The segment after `/ns/`.
    Namespace,
    /// The segment after `/sa/`.
    ServiceAccount,
    /// The segment after `/culvert/node/`.
    NodeName,
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TrustDomain => "trust domain",
            Self::Namespace => "namespace",
            Self::ServiceAccount => "service account",
            Self::NodeName => "node name",
        })
    }
}

/// Why a string is not a name of the mesh.
///
/// Does not repeat the string: it may be long and hostile. Callers name the field that it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InvalidSpiffeId {
    /// The whole URI is longer than [`URI_BYTES_MAX`].
    TooLong {
        /// Length found, in bytes.
        bytes: usize,
    },
    /// It does not begin with `spiffe://` in lower case.
    Scheme,
    /// The path is none of the known forms.
    Path {
        /// The form that was expected.
        expected: &'static str,
    },
    /// A piece is empty.
    Empty(Piece),
    /// A piece is `.` or `..`.
    Relative(Piece),
    /// A piece is longer than its limit.
    PieceTooLong {
        /// Which one.
        piece: Piece,
        /// Length found, in bytes.
        bytes: usize,
        /// Length allowed, in bytes.
        bytes_max: usize,
    },
    /// A piece holds a character that is not allowed in it.
    Character {
        /// Which one.
        piece: Piece,
        /// The first such character.
        character: char,
    },
}

impl fmt::Display for InvalidSpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong { bytes } => {
                write!(f, "the name has {bytes} bytes, at most {URI_BYTES_MAX} are allowed")
            }
            Self::Scheme => f.write_str("the name does not begin with \"spiffe://\""),
            Self::Path { expected } => write!(f, "the name does not have the form {expected}"),
            Self::Empty(piece) => write!(f, "the {piece} is empty"),
            Self::Relative(piece) => write!(f, "the {piece} is \".\" or \"..\""),
            Self::PieceTooLong { piece, bytes, bytes_max } => {
                write!(f, "the {piece} has {bytes} bytes, at most {bytes_max} are allowed")
            }
            Self::Character { piece, character } => {
                let allowed = match piece {
                    Piece::TrustDomain => "a-z, 0-9, '.', '-' and '_'",
                    Piece::Namespace | Piece::ServiceAccount | Piece::NodeName => {
                        "a-z, A-Z, 0-9, '.', '-' and '_'"
                    }
                };
                write!(f, "the {piece} holds {character:?}, allowed are {allowed}")
            }
        }
    }
}

impl std::error::Error for InvalidSpiffeId {}

/// One path segment: a namespace, a service account or a node's name.
fn segment(text: &str, piece: Piece) -> Result<Arc<str>, InvalidSpiffeId> {
    checked(
        text,
        piece,
        SEGMENT_BYTES_MAX,
        |c| matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '-' | '_'),
    )
}

fn checked(
    text: &str,
    piece: Piece,
    bytes_max: usize,
    is_allowed: fn(char) -> bool,
) -> Result<Arc<str>, InvalidSpiffeId> {
    if text.is_empty() {
        return Err(InvalidSpiffeId::Empty(piece));
    }
    if text.len() > bytes_max {
        return Err(InvalidSpiffeId::PieceTooLong { piece, bytes: text.len(), bytes_max });
    }
    if let Some(character) = text.chars().find(|c| !is_allowed(*c)) {
        return Err(InvalidSpiffeId::Character { piece, character });
    }
    if matches!(text, "." | "..") {
        return Err(InvalidSpiffeId::Relative(piece));
    }
    Ok(Arc::from(text))
}
