//! The tokens of a case: made with a throw-away key that is the key set of every issuer.

use serde_json::{Map, Value, json};

use super::fields::{Fields, InvalidCases};
use crate::policy::tokens::{Algorithm, Key, KeySet, KeySource, Signatures, TokenFault, encode_base64url};

/// Makes and checks signatures. Implemented where cryptography is.
pub trait Mint {
    /// A JSON Web Key Set: for each [`Algorithm`] one public key with its `kid` and `alg`.
    fn key_set(&self) -> Value;

    /// A signature of `input` by the key for `algorithm`.
    fn sign(&self, algorithm: Algorithm, input: &[u8]) -> Vec<u8>;

    /// Whether `signature` is one of `signed` by this public key.
    fn verify(&self, key: &Key, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> bool;
}

/// How far `past` and `future` are from the time of the run, in seconds.
const DISTANCE_SECONDS: u64 = 3600;

/// A token and where it goes.
pub(super) struct Carried {
    pub(super) text: String,
    pub(super) place: Place,
}

pub(super) enum Place {
    Header { name: String, scheme: Option<String> },
    Query(String),
    Cookie(String),
}

/// Reads `jwt`, and mints what it describes.
pub(super) fn carried(request: &Fields, mint: &dyn Mint, now: u64) -> Result<Vec<Carried>, InvalidCases> {
    let tokens = match request.at("jwt") {
        Some(Value::Object(_)) => vec![request.map("jwt")?],
        _ => request.list("jwt")?,
    };
    tokens.iter().map(|fields| token(fields, mint, now)).collect()
}

fn token(fields: &Fields, mint: &dyn Mint, now: u64) -> Result<Carried, InvalidCases> {
    fields.only(&[
        "iss",
        "sub",
        "aud",
        "azp",
        "nbf",
        "iat",
        "exp",
        "claims",
        "signature",
        "alg",
        "kid",
        "raw",
        "location",
    ])?;
    let text = match fields.text("raw")? {
        Some(raw) => raw,
        None => minted(fields, mint, now)?,
    };
    Ok(Carried { text, place: place(fields)? })
}

fn minted(fields: &Fields, mint: &dyn Mint, now: u64) -> Result<String, InvalidCases> {
    let mut claims = Map::new();
    for name in ["iss", "sub", "azp"] {
        if let Some(text) = fields.text(name)? {
            claims.insert(name.to_owned(), text.into());
        }
    }
    if let Some(audience) = fields.at("aud") {
        claims.insert("aud".to_owned(), audience.clone());
    }
    for (name, default) in [("exp", Some("future")), ("nbf", None), ("iat", None)] {
        let written = if fields.has(name) { fields.at(name).cloned() } else { default.map(Value::from) };
        if let Some(time) = written {
            claims.insert(name.to_owned(), point_in_time(fields, name, time, now)?);
        }
    }
    for (name, value) in fields.map("claims")?.entries() {
        claims.insert(name.clone(), value.clone());
    }
    let name = fields.text("alg")?.unwrap_or_else(|| "RS256".to_owned());
    let mut header = json!({"alg": name, "typ": "JWT"});
    let algorithm = Algorithm::named(&name);
    let kid = match fields.text("kid")? {
        Some(kid) => Some(kid),
        None if fields.has("kid") => None,
        None => kid_of(&mint.key_set(), algorithm.unwrap_or(Algorithm::Rs256)),
    };
    if let Some(kid) = kid {
        header["kid"] = kid.into();
    }
    let part = |value: String| encode_base64url(value.as_bytes());
    let input = format!("{}.{}", part(header.to_string()), part(Value::Object(claims).to_string()));
    let mut signature = match algorithm {
        Some(algorithm) => mint.sign(algorithm, input.as_bytes()),
        None if name.eq_ignore_ascii_case("none") => Vec::new(),
        // A shared secret that is no secret: the public keys.
        None => mint.sign(Algorithm::Rs256, mint.key_set().to_string().as_bytes()),
    };
    let is_bad = fields.one_of("signature", &[("good", false), ("bad", true)])?;
    if let (true, Some(byte)) = (is_bad, signature.last_mut()) {
        *byte ^= 1;
    }
    Ok(format!("{input}.{}", encode_base64url(&signature)))
}

fn kid_of(key_set: &Value, algorithm: Algorithm) -> Option<String> {
    let keys = key_set["keys"].as_array()?;
    let key = keys.iter().find(|key| key["alg"].as_str() == Some(algorithm.name()))?;
    key["kid"].as_str().map(str::to_owned)
}

fn point_in_time(fields: &Fields, name: &str, written: Value, now: u64) -> Result<Value, InvalidCases> {
    match written.as_str() {
        Some("future") => Ok(Value::from(now.saturating_add(DISTANCE_SECONDS))),
        Some("past") => Ok(Value::from(now.saturating_sub(DISTANCE_SECONDS))),
        Some("now") => Ok(Value::from(now)),
        Some(_) => Err(fields.invalid(name, "future, past, null or a number")),
        None => Ok(written),
    }
}

/// `header:<name>[: <scheme>]`, `query:<name>`
fn place(fields: &Fields) -> Result<Place, InvalidCases> {
    let written = fields.text("location")?.unwrap_or_else(|| "header:Authorization: Bearer".to_owned());
    let (kind, rest) = written.split_once(':').unwrap_or((&written, ""));
    let (name, scheme) = match rest.split_once(':') {
        Some((name, scheme)) => (name.trim(), Some(scheme.trim()).filter(|scheme| !scheme.is_empty())),
        None => (rest.trim(), None),
    };
    let name = name.to_owned();
    match kind {
        _ if name.is_empty() => Err(fields.invalid("location", "a name after the colon")),
        "header" => Ok(Place::Header { name, scheme: scheme.map(str::to_owned) }),
        "query" => Ok(Place::Query(name)),
        "cookie" => Ok(Place::Cookie(name)),
        _ => Err(fields.invalid("location", "header:<name>[: <scheme>], query:<name> or cookie:<name>")),
    }
}

/// The key set as every issuer gives it, with what the case breaks about it.
pub(super) struct CaseKeys<'m> {
    mint: &'m dyn Mint,
    set: Option<KeySet>,
    can_fetch: bool,
    can_discover: bool,
}

impl<'m> CaseKeys<'m> {
    pub(super) fn read(request: &Fields, mint: &'m dyn Mint) -> Result<Self, InvalidCases> {
        let fetch = request.one_of(
            "jwks.fetch",
            &[("ok", Fetch::Ok), ("fails", Fetch::Fails), ("garbage", Fetch::Garbage)],
        )?;
        let can_discover = request.one_of("oidc.discovery", &[("ok", true), ("fails", false)])?;
        let mut set = mint.key_set();
        for (name, member) in [("jwks.no_kid", "kid"), ("jwks.no_alg", "alg")] {
            if request.flag(name)?.unwrap_or(false) {
                let keys = set["keys"].as_array_mut().into_iter().flatten();
                keys.filter_map(Value::as_object_mut).for_each(|key| {
                    key.remove(member);
                });
            }
        }
        let text = if fetch == Fetch::Garbage { "<html>".to_owned() } else { set.to_string() };
        Ok(Self { mint, set: KeySet::parse(&text).ok(), can_fetch: fetch != Fetch::Fails, can_discover })
    }

    /// The keys of a set that stands in the policy are not fetched (policy A-13).
    fn set(&self, source: &KeySource) -> Option<KeySet> {
        match source {
            KeySource::Inline(text) => {
                KeySet::parse(text).ok()?;
                KeySet::parse(&self.mint.key_set().to_string()).ok()
            }
            KeySource::Address(_) if self.can_fetch => self.set.clone(),
            KeySource::Discovery(_) if self.can_fetch && self.can_discover => self.set.clone(),
            KeySource::Address(_) | KeySource::Discovery(_) => None,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fetch {
    Ok,
    Fails,
    Garbage,
}

impl Signatures for CaseKeys<'_> {
    fn verify(
        &self,
        keys: &KeySource,
        algorithm: Algorithm,
        kid: Option<&str>,
        signed: &[u8],
        signature: &[u8],
    ) -> Result<(), TokenFault> {
        let set = self.set(keys).ok_or(TokenFault::KeysUnavailable)?;
        let mut candidates = set.candidates(algorithm, kid).peekable();
        if candidates.peek().is_none() {
            return Err(TokenFault::NoKey);
        }
        let is_good = candidates.any(|key| self.mint.verify(key, algorithm, signed, signature));
        if is_good { Ok(()) } else { Err(TokenFault::Signature) }
    }
}
