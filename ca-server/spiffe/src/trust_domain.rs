use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::{InvalidSpiffeId, Piece, TRUST_DOMAIN_BYTES_MAX, checked};

/// The part of a name that says under whose roots it is valid, for example `cluster.local`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The bare name, without a scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `spiffe://<trust domain>`: the name that certificates of the authority itself carry.
    pub fn uri(&self) -> String {
        format!("spiffe://{}", self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidSpiffeId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_allowed = |c| matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_');
        checked(text, Piece::TrustDomain, TRUST_DOMAIN_BYTES_MAX, is_allowed).map(Self)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for TrustDomain {
    fn as_ref(&self) -> &str {
        &self.0
    }
}
