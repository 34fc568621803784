//! The join token as it is printed, copied and read: one line that lets one node join once.
//!
//! `culvert-join.v1.<secret>.<pin>.<node>`; secret and pin are 32 bytes each in base64url without padding. The pin lets
//! the node authenticate the authority before it shows the secret (first contact is authenticated both ways).

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};
use spiffe_id::{InvalidSpiffeId, NodeId, TrustDomain};
use zeroize::Zeroizing;

const PREFIX: &str = "culvert-join.v1.";

/// Length of a token's secret in bytes: 256 bits.
pub const SECRET_BYTES: usize = 32;

/// Longest printed token, in bytes: two values of 43 characters, the longest node name, and punctuation.
pub const TOKEN_BYTES_MAX: usize = 512;

/// A one-time token, bound to a node's name.
pub struct JoinToken {
    secret: TokenSecret,
    pin: RootPin,
    node: String,
}

impl JoinToken {
    /// Puts a token together. `node` is the name of a [`NodeId`].
    pub fn new(secret: TokenSecret, pin: RootPin, node: &NodeId) -> Self {
        Self { secret, pin, node: node.name().to_owned() }
    }

    /// What the authority recognises the token by. Sent only over a connection whose root matches [`Self::pin`].
    pub fn secret(&self) -> &TokenSecret {
        &self.secret
    }

    /// The public key of the root that the authority must present.
    pub fn pin(&self) -> &RootPin {
        &self.pin
    }

    /// The name of the node that may join with it.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The printed form, with its secret.
    pub fn expose(&self) -> Zeroizing<String> {
        let secret = Zeroizing::new(URL_SAFE_NO_PAD.encode(self.secret.expose()));
        Zeroizing::new(format!("{PREFIX}{}.{}.{}", *secret, self.pin, self.node))
    }
}

/// Why a line is not a join token. Never repeats the line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidJoinToken {
    /// It does not begin as one.
    #[error("a join token begins with \"culvert-join.v1.\"; make one with `culvert-ca token create`")]
    Prefix,
    /// A part is missing, or the whole is longer than [`TOKEN_BYTES_MAX`].
    #[error(
        "a join token has the form culvert-join.v1.<secret>.<pin>.<node>; this one is cut off or was changed"
    )]
    Shape,
    /// The secret is not 32 bytes of base64url.
    #[error("the secret of the join token is not 32 bytes in base64url; it is cut off or was changed")]
    Secret,
    /// The pin is not 32 bytes of base64url.
    #[error("the pin of the join token is not 32 bytes in base64url; it is cut off or was changed")]
    Pin,
    /// The node is not a name.
    #[error("the node of the join token is not a name: {0}")]
    Node(InvalidSpiffeId),
}

impl FromStr for JoinToken {
    type Err = InvalidJoinToken;

    /// Surrounding white space is ignored: tokens come from files that end in a newline.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if text.len() > TOKEN_BYTES_MAX {
            return Err(InvalidJoinToken::Shape);
        }
        let rest = text.strip_prefix(PREFIX).ok_or(InvalidJoinToken::Prefix)?;
        let mut parts = rest.splitn(3, '.');
        let (Some(secret), Some(pin), Some(node)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(InvalidJoinToken::Shape);
        };
        // The trust domain is the node's to configure; only the name's own grammar is at issue here.
        let any_domain: TrustDomain = "any".parse().map_err(InvalidJoinToken::Node)?;
        NodeId::new(any_domain, node).map_err(InvalidJoinToken::Node)?;
        Ok(Self {
            secret: TokenSecret::new(decode(secret).ok_or(InvalidJoinToken::Secret)?),
            pin: RootPin(decode(pin).ok_or(InvalidJoinToken::Pin)?),
            node: node.to_owned(),
        })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("pin", &self.pin).field("node", &self.node).finish_non_exhaustive()
    }
}

/// The secret of a token. Wiped from memory at the end; never shown.
pub struct TokenSecret(Zeroizing<[u8; SECRET_BYTES]>);

impl TokenSecret {
    /// A secret from a random source.
    pub fn new(bytes: [u8; SECRET_BYTES]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Reads a secret from the wire; `None` if it has another length.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self::new)
    }

    /// The secret itself.
    pub fn expose(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }

    /// SHA-256 of the secret: all that the authority keeps.
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(*self.0).into()
    }
}

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenSecret(<secret>)")
    }
}

/// SHA-256 of a root's SubjectPublicKeyInfo (DER). It survives a re-issue of the root with the same key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RootPin([u8; 32]);

impl RootPin {
    /// The pin of a key, from its whole SubjectPublicKeyInfo in DER.
    pub fn of_spki(spki_der: &[u8]) -> Self {
        Self(Sha256::digest(spki_der).into())
    }
}

impl fmt::Display for RootPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for RootPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RootPin({self})")
    }
}

fn decode(text: &str) -> Option<[u8; 32]> {
    let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(text).ok()?);
    bytes.as_slice().try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        let domain: TrustDomain = "cluster.local".parse().expect("a trust domain");
        let node = NodeId::new(domain, "node-a.example").expect("a node's name");
        JoinToken::new(TokenSecret::new([7; 32]), RootPin::of_spki(b"key"), &node)
    }

    #[test]
    fn a_token_reads_back_as_it_was_printed() {
        let printed = token().expose();
        let read: JoinToken = format!("{}\n", *printed).parse().expect("a token");
        assert_eq!(read.secret().expose(), &[7; 32]);
        assert_eq!((read.pin(), read.node()), (&RootPin::of_spki(b"key"), "node-a.example"));
        assert_eq!(printed.lines().count(), 1);
    }

    #[test]
    fn a_token_that_was_cut_or_changed_is_refused_by_part() {
        let printed = token().expose().to_string();
        let secret = URL_SAFE_NO_PAD.encode([7; 32]);
        let pin = RootPin::of_spki(b"key").to_string();
        for (text, expected) in [
            (String::new(), InvalidJoinToken::Prefix),
            (printed.replacen("v1", "v2", 1), InvalidJoinToken::Prefix),
            (format!("{PREFIX}{secret}"), InvalidJoinToken::Shape),
            (format!("{PREFIX}{secret}.{pin}"), InvalidJoinToken::Shape),
            (printed.replacen(&secret, &secret[..40], 1), InvalidJoinToken::Secret),
            (printed.replacen(&secret, &format!("{secret}AAAA"), 1), InvalidJoinToken::Secret),
            (printed.replacen(&secret, &secret.replacen('B', "+", 1), 1), InvalidJoinToken::Secret),
            (printed.replacen(&pin, "", 1), InvalidJoinToken::Pin),
            (
                printed.replacen("node-a.example", "", 1),
                InvalidJoinToken::Node(InvalidSpiffeId::Empty(spiffe_id::Piece::NodeName)),
            ),
            (
                printed.replacen("node-a.example", "a/b", 1),
                InvalidJoinToken::Node(InvalidSpiffeId::Character {
                    piece: spiffe_id::Piece::NodeName,
                    character: '/',
                }),
            ),
        ] {
            assert_eq!(text.parse::<JoinToken>().expect_err("not a token"), expected, "{text}");
        }
    }

    #[test]
    fn the_longest_name_fits_and_a_line_above_the_limit_is_not_looked_at() {
        let domain: TrustDomain = "cluster.local".parse().expect("a trust domain");
        let longest = NodeId::new(domain, &"n".repeat(spiffe_id::SEGMENT_BYTES_MAX)).expect("a node's name");
        let printed = JoinToken::new(TokenSecret::new([7; 32]), RootPin::of_spki(b"key"), &longest).expose();
        assert!(printed.len() <= TOKEN_BYTES_MAX);
        printed.parse::<JoinToken>().expect("the longest token");

        let padded =
            |bytes: usize| format!("{:n<bytes$}", *printed).parse::<JoinToken>().expect_err("too long");
        // At the limit the name itself is judged, above it nothing is.
        assert!(matches!(
            padded(TOKEN_BYTES_MAX),
            InvalidJoinToken::Node(InvalidSpiffeId::PieceTooLong { .. })
        ));
        assert_eq!(padded(TOKEN_BYTES_MAX + 1), InvalidJoinToken::Shape);
    }

    #[test]
    fn neither_token_nor_secret_shows_itself() {
        let shown = format!("{:?} {:?}", token(), TokenSecret::new([7; 32]));
        assert!(!shown.contains(&URL_SAFE_NO_PAD.encode([7; 32])) && !shown.contains("7, 7"), "{shown}");
    }
}
