//! Is a token valid, and what does it say (policy ).

use std::borrow::Cow;

use serde_json::Value;

use super::{IssuerRule, Signatures, encoding::decode};

/// Longest token that is looked at, in bytes: what fits in the headers that servers accept.
pub const TOKEN_BYTES_MAX: usize = 16 * 1024;

/// Claims whose text is a list, its items separated by blanks (policy A-14, G-21).
const LIST_CLAIMS: [&str; 2] = ["scope", "groups"];

/// Why a token is not valid. The client learns it from a `RequestAuthentication` only; the log always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum TokenFault {
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    Form,
    #[error("Jwt header is an invalid Base64url encoded or JSON")]
    Header,
    #[error("Jwt payload is an invalid Base64url encoded or JSON")]
    Payload,
    #[error("Jwt header [alg] is not supported")]
    Algorithm,
    #[error("Jwt issuer is not configured")]
    Issuer,
    #[error("Audiences in Jwt are not allowed")]
    Audience,
    #[error("Jwt is expired")]
    Expired,
    #[error("Jwt not yet valid")]
    NotYetValid,
    #[error("Jwt has no original claims")]
    NoOriginalClaims,
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    NoKey,
    #[error("Jwks remote fetch is failed")]
    KeysUnavailable,
    #[error("Jwt verification fails")]
    Signature,
    #[error("Jwt is one of too many")]
    TooMany,
}

impl TokenFault {
    /// The access log's word.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Form => "form",
            Self::Header => "header",
            Self::Payload => "payload",
            Self::Algorithm => "algorithm",
            Self::Issuer => "issuer",
            Self::Audience => "audience",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::NoOriginalClaims => "no_original_claims",
            Self::NoKey => "no_key",
            Self::KeysUnavailable => "keys_unavailable",
            Self::Signature => "signature",
            Self::TooMany => "too_many",
        }
    }
}

/// The signatures that count (policy A-12): never `none`, never a shared secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Es256,
    Es384,
}

impl Algorithm {
    pub const ALL: [Self; 5] = [Self::Rs256, Self::Rs384, Self::Rs512, Self::Es256, Self::Es384];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Rs256 => "RS256",
            Self::Rs384 => "RS384",
            Self::Rs512 => "RS512",
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
        }
    }

    /// `None` for every other name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }
}

/// What a valid token says.
#[derive(Clone, PartialEq, Eq)]
pub struct VerifiedToken {
    /// `iss/sub`; both are needed (policy A-14).
    pub principal: Option<String>,
    pub(in crate::policy) issuer_bytes: usize,
    /// The first entry of `aud`.
    pub audience: Option<String>,
    /// `azp`
    pub presenter: Option<String>,
    pub claims: Value,
}

/// Claims are not shown.
impl std::fmt::Debug for VerifiedToken {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("VerifiedToken").field("principal", &self.principal).finish_non_exhaustive()
    }
}

impl VerifiedToken {
    fn new(claims: Value) -> Self {
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        let audience = match claims.get("aud") {
            Some(Value::Array(list)) => list.first().and_then(Value::as_str),
            other => other.and_then(Value::as_str),
        };
        let principal = text("iss").zip(text("sub")).map(|(issuer, subject)| format!("{issuer}/{subject}"));
        Self {
            principal,
            issuer_bytes: text("iss").map_or(0, str::len),
            audience: audience.map(str::to_owned),
            presenter: text("azp").map(str::to_owned),
            claims,
        }
    }

    /// `iss` and `sub`.
    pub(in crate::policy) fn issuer_and_subject(&self) -> Option<(&str, &str)> {
        let (issuer, rest) = self.principal.as_deref()?.split_at_checked(self.issuer_bytes)?;
        Some((issuer, rest.strip_prefix('/')?))
    }
}

/// Claims first, because they cost less than the signature; nothing leaves before both are good.
pub(super) fn verify(
    rule: &IssuerRule,
    text: &str,
    now: u64,
    needs_expiry: bool,
    signatures: &dyn Signatures,
) -> Result<VerifiedToken, TokenFault> {
    if text.len() > TOKEN_BYTES_MAX {
        return Err(TokenFault::Form);
    }
    let [header, payload, signature] = text.split('.').collect::<Vec<_>>()[..] else {
        return Err(TokenFault::Form);
    };
    let header = object(header).ok_or(TokenFault::Header)?;
    let claims = object(payload).ok_or(TokenFault::Payload)?;
    let (algorithm, kid) = algorithm(&header)?;
    if needs_expiry && claims.get("exp").is_none_or(Value::is_null) {
        return Err(TokenFault::Expired); // policy G-6
    }
    let token = check_claims(rule, claims, now)?;
    let signature = decode(signature).filter(|bytes| !bytes.is_empty()).ok_or(TokenFault::Signature)?;
    let signed_bytes = text.rfind('.').unwrap_or_default();
    signatures.verify(&rule.keys, algorithm, kid.as_deref(), &text.as_bytes()[..signed_bytes], &signature)?;
    Ok(token)
}

fn object(part: &str) -> Option<Value> {
    let value: Value = serde_json::from_slice(&decode(part)?).ok()?;
    value.is_object().then_some(value)
}

/// Extensions that must be understood (RFC 7515, section 4.1.11) are not.
fn algorithm(header: &Value) -> Result<(Algorithm, Option<String>), TokenFault> {
    let name = header.get("alg").and_then(Value::as_str).ok_or(TokenFault::Algorithm)?;
    let algorithm = Algorithm::named(name).ok_or(TokenFault::Algorithm)?;
    if header.get("crit").is_some() {
        return Err(TokenFault::Header);
    }
    match header.get("kid") {
        None | Some(Value::Null) => Ok((algorithm, None)),
        Some(Value::String(kid)) => Ok((algorithm, Some(kid.clone()))),
        Some(_) => Err(TokenFault::Header),
    }
}

/// Checks what a token says of itself at `now`, in seconds since 1970. Does not check its signature.
///
/// # Errors
/// The first check that fails.
pub fn check_claims(rule: &IssuerRule, mut claims: Value, now: u64) -> Result<VerifiedToken, TokenFault> {
    if claims.get("iss").and_then(Value::as_str) != Some(&*rule.issuer) {
        return Err(TokenFault::Issuer);
    }
    if !rule.audiences.is_empty() && !audience_fits(rule, claims.get("aud")) {
        return Err(TokenFault::Audience);
    }
    // policy A-12, G-6: no leeway, and a token may do without either.
    if time(&claims, "exp")?.is_some_and(|expires| expires <= seconds(now)) {
        return Err(TokenFault::Expired);
    }
    if time(&claims, "nbf")?.is_some_and(|begins| seconds(now) < begins) {
        return Err(TokenFault::NotYetValid);
    }
    if !rule.is_exchanged {
        return Ok(VerifiedToken::new(claims));
    }
    let original = claims.get_mut("original_claims").map(Value::take).filter(Value::is_object);
    original.map(VerifiedToken::new).ok_or(TokenFault::NoOriginalClaims) // policy A-11
}

#[expect(clippy::cast_precision_loss, reason = "seconds since 1970 are far below 2^53")]
fn seconds(now: u64) -> f64 {
    now as f64
}

/// A time that is there but no number makes the token unreadable.
fn time(claims: &Value, name: &str) -> Result<Option<f64>, TokenFault> {
    match claims.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(number)) => number.as_f64().map(Some).ok_or(TokenFault::Payload),
        Some(_) => Err(TokenFault::Payload),
    }
}

/// One of the token's audiences is listed; one text is one audience, blanks and all (policy G-22).
fn audience_fits(rule: &IssuerRule, audience: Option<&Value>) -> bool {
    let is_listed = |text: &str| rule.audiences.iter().any(|wanted| bare(wanted) == bare(text));
    match audience {
        Some(Value::String(text)) => is_listed(text),
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).any(is_listed),
        Some(_) | None => false,
    }
}

/// Without a scheme and one last slash (policy A-12).
fn bare(audience: &str) -> &str {
    let rest = audience.strip_prefix("https://").or_else(|| audience.strip_prefix("http://"));
    let rest = rest.unwrap_or(audience);
    rest.strip_suffix('/').unwrap_or(rest)
}

/// The texts of a claim, or of one inside it: a text or a list of texts. Nothing else is told (policy A-14).
pub(crate) fn claims_of<'c>(claims: &'c Value, path: &[Box<str>], spaced: &[String]) -> Vec<Cow<'c, str>> {
    let value = path.iter().try_fold(claims, |value, name| value.get(&**name));
    let is_list = |name: &str| LIST_CLAIMS.contains(&name) || spaced.iter().any(|other| *other == *name);
    match (value, path) {
        (Some(Value::String(text)), [name]) if is_list(name) => {
            text.split(' ').filter(|word| !word.is_empty()).map(Cow::Borrowed).collect()
        }
        (Some(Value::String(text)), _) => vec![Cow::Borrowed(text.as_str())],
        (Some(Value::Array(list)), _) if list.iter().all(Value::is_string) => {
            list.iter().filter_map(Value::as_str).map(Cow::Borrowed).collect()
        }
        (Some(_) | None, _) => Vec::new(),
    }
}
