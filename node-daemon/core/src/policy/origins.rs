//! The `jwt` of a `Policy`, read: issuers, places, keys, trigger rules (policy ).

use std::{collections::BTreeSet, sync::Arc};

use regex::Regex;
use serde_json::Value;

use super::{
    authentication::OriginMethod,
    matching::Pattern,
    reader::{Fault, Fields, Item, Warnings},
    tokens::{EXCHANGED_HEADER, IssuerRule, KeySet, KeySource, Location},
};

/// Compiled size of one regular expression, in bytes: patterns of paths need a hundredth.
const REGEX_BYTES_MAX: usize = 256 * 1024;

/// One trigger rule (policy A-10).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trigger {
    pub(super) excluded: Vec<StringMatch>,
    pub(super) included: Vec<StringMatch>,
}

impl Trigger {
    /// Several rules are alternatives; none at all, or no path, always fires.
    pub(super) fn any_fires(triggers: &[Self], path: Option<&str>) -> bool {
        let Some(path) = path else { return true };
        triggers.is_empty() || triggers.iter().any(|trigger| trigger.fires(path))
    }

    /// Gives each path as a pattern; false where there are others than patterns.
    pub(super) fn add_to(&self, add: &mut dyn FnMut(&Pattern)) -> bool {
        let mut is_whole = true;
        for written in self.excluded.iter().chain(&self.included) {
            match written {
                StringMatch::Exact(text) => add(&Pattern::Exact(text.as_str().into())),
                StringMatch::Prefix(text) => add(&Pattern::Prefix(text.as_str().into())),
                StringMatch::Suffix(text) => add(&Pattern::Suffix(text.as_str().into())),
                StringMatch::Regex(..) => is_whole = false,
            }
        }
        is_whole
    }

    fn fires(&self, path: &str) -> bool {
        let is_excluded = self.excluded.iter().any(|each| each.matches(path) == Some(true));
        // A pattern that nobody can read is taken for one that asks for the token.
        let is_included = self.included.iter().any(|each| each.matches(path) != Some(false));
        !is_excluded && (self.included.is_empty() || is_included)
    }
}

#[derive(Clone, Debug)]
pub(super) enum StringMatch {
    Exact(String),
    Prefix(String),
    Suffix(String),
    /// Of the whole path; `None` where the expression cannot be used.
    Regex(String, Option<Regex>),
}

impl PartialEq for StringMatch {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for StringMatch {}

impl StringMatch {
    fn parts(&self) -> (u8, &str) {
        match self {
            Self::Exact(text) => (0, text),
            Self::Prefix(text) => (1, text),
            Self::Suffix(text) => (2, text),
            Self::Regex(text, _) => (3, text),
        }
    }

    /// `None`: nobody can tell.
    fn matches(&self, path: &str) -> Option<bool> {
        match self {
            Self::Exact(text) => Some(path == text),
            Self::Prefix(text) => Some(path.starts_with(text)),
            Self::Suffix(text) => Some(path.ends_with(text)),
            Self::Regex(_, regex) => regex.as_ref().map(|regex| regex.is_match(path)),
        }
    }
}

/// Reads `origins` (policy ).
pub(super) fn origin_methods(
    origins: &[Item<'_>],
    warnings: &mut Warnings,
) -> Result<Vec<OriginMethod>, Fault> {
    let mut issuers = BTreeSet::new();
    let mut methods = Vec::new();
    for origin in origins {
        let remedy = "write - jwt: {issuer: …}";
        if origin.value.is_null() {
            return Err(origin.fault("an origin with a jwt", remedy));
        }
        let mut fields = Fields::open(origin)?;
        let Some(jwt) = fields.take("jwt")? else {
            fields.finish()?;
            return Err(origin.fault("an origin with a jwt", remedy)); // policy
        };
        fields.finish()?;
        let method = json_web_token(&jwt, warnings)?;
        if !issuers.insert(method.rule.issuer.clone()) {
            // policy
            let (field, issuer) = (format!("{}.issuer", jwt.path), Value::from(&*method.rule.issuer));
            return Err(Fault::new(&field, &issuer, "each issuer once", "merge the two entries"));
        }
        methods.push(method);
    }
    Ok(methods)
}

/// Reads one `jwt` (policy ).
fn json_web_token(item: &Item<'_>, warnings: &mut Warnings) -> Result<OriginMethod, Fault> {
    let mut fields = Fields::open(item)?;
    let issuer = issuer(&mut fields, "a jwt with an issuer")?;
    let audiences = boxed(&fields.texts("audiences")?);
    let headers = boxed(&fields.texts("jwtHeaders")?);
    let parameters = boxed(&fields.texts("jwtParams")?);
    let keys = key_source(&mut fields, issuer, warnings)?;
    let mut triggers = Vec::new();
    for rule in fields.list("triggerRules")? {
        let mut rule_fields = Fields::open(&rule)?;
        let mut paths = |list| -> Result<Vec<StringMatch>, Fault> {
            rule_fields.list(list)?.iter().map(|path| string_match(path, warnings)).collect()
        };
        triggers.push(Trigger { excluded: paths("excludedPaths")?, included: paths("includedPaths")? });
        rule_fields.finish()?;
    }
    fields.finish()?;
    if issuer.trim() != issuer {
        warnings.say(&format!("{}.issuer", item.path), "the issuer begins or ends with a blank");
    }
    let is_exchanged = matches!(&headers[..], [only] if only.eq_ignore_ascii_case(EXCHANGED_HEADER));
    let locations = if headers.is_empty() && parameters.is_empty() {
        Location::usual() // policy A-11
    } else {
        let headers = headers.iter().map(|name| Location::of_2018(name, is_exchanged));
        headers.chain(parameters.into_iter().map(Location::Parameter)).collect()
    };
    let rule = IssuerRule {
        issuer: issuer.into(),
        audiences,
        keys,
        locations,
        is_exchanged,
        spaced: Vec::new(),
        forwards: true,
        payload_header: None,
        claim_headers: Vec::new(),
    };
    Ok(OriginMethod { rule: Arc::new(rule), triggers })
}

pub(super) fn issuer<'a>(fields: &mut Fields<'a>, expected: &str) -> Result<&'a str, Fault> {
    let Some(issuer) = fields.take("issuer")? else {
        return Err(fields.fault(expected, "name the issuer as in the token's iss"));
    };
    issuer.filled_text()
}

pub(super) fn boxed(items: &[Item<'_>]) -> Vec<Box<str>> {
    items.iter().filter_map(|item| item.value.as_str()).map(Into::into).collect()
}

/// `jwks`, else `jwksUri`, else discovery (policy A-13); the first two together are refused (policy ).
pub(super) fn key_source(
    fields: &mut Fields<'_>,
    issuer: &str,
    warnings: &mut Warnings,
) -> Result<KeySource, Fault> {
    let (uri, inline) = (fields.take("jwksUri")?, fields.take("jwks")?);
    if let (Some(_), Some(inline)) = (&uri, &inline) {
        return Err(inline.fault("either jwks or jwksUri", "remove one of the two"));
    }
    if let Some(uri) = uri {
        let text = uri.text()?;
        if KeySetAddress::parse(text).is_none() {
            return Err(uri.fault(
                "an address with http:// or https://, a host, and a number for the port if any",
                "write the complete address of the key set",
            ));
        }
        return Ok(KeySource::Address(text.into()));
    }
    let Some(inline) = inline else { return Ok(KeySource::Discovery(issuer.into())) };
    let text = inline.filled_text()?;
    if let Err(fault) = KeySet::parse(text) {
        warnings.say(&inline.path, format!("it cannot be used, so no token of {issuer:?} is valid: {fault}"));
    }
    Ok(KeySource::Inline(text.into()))
}

/// Host and port of a `jwksUri` (policy ).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySetAddress {
    pub host: String,
    pub port: u16,
    pub is_tls: bool,
}

impl KeySetAddress {
    /// `None`: no address of a key set.
    pub fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let (is_tls, default_port) = match scheme {
            "https" => (true, 443),
            "http" => (false, 80),
            _ => return None,
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, Some(port)),
            Some(_) | None => (authority, None),
        };
        let port = match port {
            None => default_port,
            Some(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok()?,
            Some(_) => return None,
        };
        let is_host =
            !host.is_empty() && !host.contains(['@', ' ']) && (host.starts_with('[') || !host.contains(':'));
        (is_host && port > 0).then(|| Self { host: host.to_owned(), port, is_tls })
    }
}

fn string_match(item: &Item<'_>, warnings: &mut Warnings) -> Result<StringMatch, Fault> {
    let mut fields = Fields::open(item)?;
    let mut found = Vec::new();
    for kind in ["exact", "prefix", "suffix", "regex"] {
        if let Some(text) = fields.take(kind)? {
            let written = text.filled_text()?.to_owned();
            found.push(match kind {
                "exact" => StringMatch::Exact(written),
                "prefix" => StringMatch::Prefix(written),
                "suffix" => StringMatch::Suffix(written),
                _ => {
                    let regex = whole(&written);
                    if regex.is_none() {
                        warnings.say(
                            &text.path,
                            format!("{written:?} cannot be used here: the token is asked for on every path"),
                        );
                    }
                    StringMatch::Regex(written, regex)
                }
            });
        }
    }
    if found.len() > 1 {
        return Err(
            fields.fault("exactly one of exact, prefix, suffix and regex", "write one entry for each")
        );
    }
    fields.finish()?;
    found.pop().ok_or_else(|| item.fault("one of exact, prefix, suffix and regex", "write exact: /path"))
}

/// The expression of a whole text (policy A-1).
fn whole(written: &str) -> Option<Regex> {
    let mut builder = regex::RegexBuilder::new(&format!("^(?:{written})$"));
    builder.size_limit(REGEX_BYTES_MAX).build().ok()
}
