//! Tokens: where a request carries them, whether they are valid, what they say (policy, F-2).
//!
//! [`TokenRules::locate`] finds candidates, [`TokenRules::verify`] judges them with a clock and the keys that the caller
//! brings, and [`Tokens`] goes with the request to the policy. Signatures are checked by [`Signatures`], and keys come
//! from there too: no cryptography and no fetching here.

mod encoding;
mod keys;
mod locate;
mod verify;

use std::{borrow::Cow, sync::Arc};

use serde_json::Value;

pub(crate) use self::verify::claims_of;
pub use self::{
    encoding::{decode as decode_base64url, encode as encode_base64url},
    keys::{InvalidKeySet, KEYS_MAX, Key, KeyMaterial, KeySet},
    locate::Candidate,
    verify::{Algorithm, TOKEN_BYTES_MAX, TokenFault, VerifiedToken, check_claims},
};
use super::seen::Headers;

/// Checks signatures with the keys of an issuer.
pub trait Signatures {
    /// Whether `signature` is one of `signed` by a key of `keys` that fits the token's `algorithm` and `kid`
    /// ([`KeySet::candidates`]).
    ///
    /// # Errors
    /// [`TokenFault::KeysUnavailable`], [`TokenFault::NoKey`] or [`TokenFault::Signature`].
    fn verify(
        &self,
        keys: &KeySource,
        algorithm: Algorithm,
        kid: Option<&str>,
        signed: &[u8],
        signature: &[u8],
    ) -> Result<(), TokenFault>;
}

/// Where the keys of an issuer are (policy A-13).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KeySource {
    /// The key set itself.
    Inline(Arc<str>),
    /// `jwksUri`
    Address(Arc<str>),
    /// The issuer, whose `/.well-known/openid-configuration` names the address.
    Discovery(Arc<str>),
}

/// One issuer as a policy writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuerRule {
    pub issuer: Box<str>,
    /// Empty: any (policy 0-10).
    pub audiences: Vec<Box<str>>,
    pub keys: KeySource,
    pub(super) locations: Vec<Location>,
    /// The claims are those of the token that this one was exchanged for (policy A-11).
    pub(super) is_exchanged: bool,
    /// Claims whose text is a list, beside the usual ones (policy F-2).
    pub(super) spaced: Vec<String>,
    /// Whether the workload gets the token (policy F-2).
    pub(super) forwards: bool,
    /// Header that tells the workload the whole payload (policy F-2).
    pub(super) payload_header: Option<Box<str>>,
    /// Headers that tell the workload one claim each (policy F-2).
    pub(super) claim_headers: Vec<(Box<str>, Box<str>)>,
}

/// Where a request may carry a token. Names of headers are in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Location {
    Header { name: Box<str>, prefix: Prefix },
    Parameter(Box<str>),
    Cookie(Box<str>),
}

/// What stands before the token in a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Prefix {
    Required(Box<str>),
    /// `Bearer `, or nothing (policy G-19).
    OptionalBearer,
}

/// The only scheme of the header `Authorization`: case and the one blank count (policy A-11).
pub(super) const BEARER: &str = "Bearer ";

/// The query parameter of RFC 6750.
const ACCESS_TOKEN: &str = "access_token";

/// Header of exchanged tokens, and what stands before them (policy A-11).
pub(super) const EXCHANGED_HEADER: &str = "ingress-authorization";
const EXCHANGED_PREFIX: &str = "istio ";

impl Location {
    /// Where a token is looked for if an issuer names no place.
    pub(super) fn usual() -> Vec<Self> {
        let bearer = Prefix::Required(BEARER.into());
        vec![
            Self::Header { name: "authorization".into(), prefix: bearer },
            Self::Parameter(ACCESS_TOKEN.into()),
        ]
    }

    /// A header named by `jwtHeaders`.
    pub(super) fn of_2018(name: &str, is_exchanged: bool) -> Self {
        let prefix =
            if is_exchanged { Prefix::Required(EXCHANGED_PREFIX.into()) } else { Prefix::OptionalBearer };
        Self::Header { name: name.to_ascii_lowercase().into(), prefix }
    }
}

/// All issuers whose tokens count on one port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenRules {
    rules: Vec<Arc<IssuerRule>>,
    /// Whether a token without `exp` is as good as expired (policy G-6).
    needs_expiry: bool,
}

impl TokenRules {
    pub(super) fn new(rules: Vec<Arc<IssuerRule>>, needs_expiry: bool) -> Self {
        Self { rules, needs_expiry }
    }

    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    pub(super) fn rules(&self) -> impl Iterator<Item = &Arc<IssuerRule>> {
        self.rules.iter()
    }

    /// Whose keys are needed.
    pub fn key_sources(&self) -> impl Iterator<Item = &KeySource> {
        self.rules.iter().map(|rule| &rule.keys)
    }

    /// Each token of the request for each rule that looks where it stands. `path` as sent.
    pub fn locate(&self, path: Option<&str>, headers: &dyn Headers) -> Vec<Candidate> {
        let each = self.rules.iter().enumerate();
        each.flat_map(|(index, rule)| locate::locate(index, rule, path, headers)).collect()
    }

    /// Judges the candidates at `now`, in seconds since 1970.
    pub fn verify(&self, candidates: Vec<Candidate>, now: u64, signatures: &dyn Signatures) -> Tokens {
        let judge = |(position, candidate): (usize, Candidate)| {
            let rule = Arc::clone(self.rules.get(candidate.rule)?);
            let outcome = if position < TOKENS_MAX {
                verify::verify(&rule, &candidate.text, now, self.needs_expiry, signatures)
            } else {
                Err(TokenFault::TooMany)
            };
            Some(Judged { rule, candidate, outcome })
        };
        Tokens { judged: candidates.into_iter().enumerate().filter_map(judge).collect() }
    }
}

/// Candidates of one request that are judged; each costs a signature. More than any client sends in earnest.
pub const TOKENS_MAX: usize = 16;

/// What became of the tokens of one request.
#[derive(Debug, Default)]
pub struct Tokens {
    judged: Vec<Judged>,
}

#[derive(Debug)]
pub(super) struct Judged {
    rule: Arc<IssuerRule>,
    candidate: Candidate,
    outcome: Result<VerifiedToken, TokenFault>,
}

impl Tokens {
    /// No token at all.
    pub fn none() -> Self {
        Self::default()
    }

    /// The first fault, for the log.
    pub fn fault(&self) -> Option<TokenFault> {
        self.judged.iter().find_map(|judged| judged.outcome.as_ref().err().copied())
    }

    /// Whether one is valid for any rule.
    pub(super) fn has_valid(&self) -> bool {
        self.judged.iter().any(|judged| judged.outcome.is_ok())
    }

    /// A valid token for this rule.
    pub(super) fn of(&self, rule: &Arc<IssuerRule>) -> Option<&VerifiedToken> {
        let own = self.judged.iter().filter(|judged| Arc::ptr_eq(&judged.rule, rule));
        own.filter_map(|judged| judged.outcome.as_ref().ok()).next()
    }

    /// Why no token is valid for this rule, if there is one.
    pub(super) fn fault_of(&self, rule: &Arc<IssuerRule>) -> Option<TokenFault> {
        let own = self.judged.iter().filter(|judged| Arc::ptr_eq(&judged.rule, rule));
        own.filter_map(|judged| judged.outcome.as_ref().err().copied()).next()
    }

    /// The first valid token, if every token that stands where one of the rules looks is valid for one of them.
    pub(super) fn all_valid(
        &self,
        rules: &[Arc<IssuerRule>],
    ) -> Result<Option<(&Arc<IssuerRule>, &VerifiedToken)>, TokenFault> {
        let own =
            || self.judged.iter().filter(|judged| rules.iter().any(|rule| Arc::ptr_eq(rule, &judged.rule)));
        for judged in own() {
            let of_text = || own().filter(|other| other.candidate.is_read_from(&judged.candidate));
            if of_text().any(|other| other.outcome.is_ok()) {
                continue;
            }
            let faults = || of_text().filter_map(|other| other.outcome.as_ref().err().copied());
            let telling = faults().find(|fault| *fault != TokenFault::Issuer).or_else(|| faults().next());
            if let Some(fault) = telling {
                return Err(fault);
            }
        }
        Ok(own().find_map(|judged| Some((&judged.rule, judged.outcome.as_ref().ok()?))))
    }

    /// What carried valid tokens which their rules do not forward.
    pub(super) fn kept_back(&self) -> KeptBack<'_> {
        let mut kept = KeptBack::default();
        for judged in self.judged.iter().filter(|judged| judged.outcome.is_ok() && !judged.rule.forwards) {
            match &judged.candidate.location {
                Location::Header { name, .. } => kept.headers.push(name),
                Location::Parameter(name) => kept.parameters.push(name),
                Location::Cookie(name) => kept.cookies.push(name),
            }
        }
        kept
    }
}

/// Names under which a request carried tokens that the workload must not get.
#[derive(Debug, Default)]
pub(super) struct KeptBack<'t> {
    pub(super) headers: Vec<&'t str>,
    pub(super) parameters: Vec<&'t str>,
    pub(super) cookies: Vec<&'t str>,
}

/// A `cookie` header without the cookies for which `is_removed` says so, as tokens are found in it; `None`: nothing is left.
pub fn without_cookies(value: &[u8], is_removed: impl Fn(&str) -> bool) -> Option<Vec<u8>> {
    let name = |pair: &[u8]| {
        let pair = String::from_utf8_lossy(pair);
        pair.trim().split_once('=').is_some_and(|(name, _)| is_removed(name))
    };
    let kept: Vec<&[u8]> =
        value.split(|byte| *byte == b';').filter(|pair| !name(pair)).map(<[u8]>::trim_ascii).collect();
    let kept: Vec<&[u8]> = kept.into_iter().filter(|pair| !pair.is_empty()).collect();
    (!kept.is_empty()).then(|| kept.join(&b"; "[..]))
}

impl IssuerRule {
    /// What the workload is told of a valid token, and all names under which it may be told so.
    pub(super) fn outputs(&self, token: Option<&VerifiedToken>) -> Vec<(Box<str>, Option<String>)> {
        let payload = self.payload_header.iter().map(|name| {
            (name.clone(), token.map(|token| encode_base64url(token.claims.to_string().as_bytes())))
        });
        let claims = self.claim_headers.iter().map(|(name, claim)| {
            let value = token.and_then(|token| told(&token.claims, claim));
            (name.clone(), value.map(Cow::into_owned))
        });
        payload.chain(claims).collect()
    }
}

/// A claim as a header's value: text, number or boolean; never what would break the header.
fn told<'c>(claims: &'c Value, name: &str) -> Option<Cow<'c, str>> {
    let value = match claims.get(name)? {
        Value::String(text) => Cow::Borrowed(text.as_str()),
        other @ (Value::Number(_) | Value::Bool(_)) => Cow::Owned(other.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => return None,
    };
    value.bytes().all(|byte| (b' '..=b'~').contains(&byte)).then_some(value)
}
