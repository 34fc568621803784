//! Where tokens are, which are valid, and what they say (policy, F-2).

use serde_json::Value;

use crate::facts::{Place, Request, Token, entries, texts};

/// A `jwt` of a Policy, or a rule of a RequestAuthentication.
pub struct Issuer<'d> {
    pub written: &'d Value,
    pub is_of_2018: bool,
}

/// The names of claims whose text is a list.
const LISTS: [&str; 2] = ["scope", "groups"];

impl Issuer<'_> {
    /// The tokens of the request at the places of this issuer.
    pub fn finds<'r>(&self, request: &'r Request) -> Vec<&'r Token> {
        request.tokens.iter().filter(|token| self.looks_at(&token.place)).collect()
    }

    fn looks_at(&self, place: &Place) -> bool {
        let (headers, parameters) = if self.is_of_2018 {
            let headers = texts(&self.written["jwtHeaders"]).into_iter().map(|name| (name, None));
            (headers.collect::<Vec<_>>(), texts(&self.written["jwtParams"]))
        } else {
            let headers = entries(&self.written["fromHeaders"]).iter().map(|header| {
                let text = |key: &str| header[key].as_str().unwrap_or_default().to_owned();
                (text("name"), Some(text("prefix")))
            });
            (headers.collect(), texts(&self.written["fromParams"]))
        };
        let is_default = headers.is_empty() && parameters.is_empty();
        match place {
            Place::Header { name, before } if is_default => {
                name.eq_ignore_ascii_case("authorization") && before == "Bearer "
            }
            Place::Parameter(name) if is_default => name == "access_token",
            Place::Parameter(name) => parameters.contains(name),
            Place::Header { name, before } => headers.iter().any(|(own, prefix)| {
                let is_there = prefix.as_ref().is_none_or(|prefix| before.starts_with(prefix));
                own.eq_ignore_ascii_case(name) && is_there
            }),
        }
    }

    /// Whether nothing else stands before the token than what the issuer expects there.
    fn is_bare(&self, place: &Place) -> bool {
        let Place::Header { name, before } = place else { return true };
        if self.is_of_2018 {
            return before.is_empty() || before == "Bearer "; // policy G-19
        }
        let headers = entries(&self.written["fromHeaders"]);
        let expects = |header: &Value| {
            header["name"].as_str().is_some_and(|own| own.eq_ignore_ascii_case(name))
                && header["prefix"].as_str().unwrap_or_default() == before
        };
        (headers.is_empty() && before == "Bearer ") || headers.iter().any(expects)
    }

    /// policy A-12
    pub fn accepts(&self, token: &Token, now: u64) -> bool {
        let claims = &token.claims;
        let is_known = ["RS256", "RS384", "RS512", "ES256", "ES384"].contains(&token.algorithm.as_str());
        let wanted = texts(&self.written["audiences"]);
        let audience = wanted.is_empty()
            || texts(&claims["aud"]).iter().any(|own| wanted.iter().any(|wanted| bare(wanted) == bare(own)));
        let is_alive = claims["exp"].as_u64().is_none_or(|expires| now < expires);
        let is_begun = claims["nbf"].as_u64().is_none_or(|begins| begins <= now);
        let issuer = claims["iss"].as_str();
        is_known
            && self.is_bare(&token.place)
            && token.is_signed_well
            && issuer.is_some()
            && issuer == self.written["issuer"].as_str()
            && audience
            && is_alive
            && is_begun
    }
}

fn bare(audience: &str) -> &str {
    let rest =
        audience.strip_prefix("http://").or_else(|| audience.strip_prefix("https://")).unwrap_or(audience);
    rest.strip_suffix('/').unwrap_or(rest)
}

/// `iss/sub`: both are needed (policy A-14).
pub fn principal(claims: &Value) -> Option<String> {
    Some(format!("{}/{}", claims["iss"].as_str()?, claims["sub"].as_str()?))
}

/// The first entry of `aud`.
pub fn audience(claims: &Value) -> Option<String> {
    match &claims["aud"] {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => list.first().and_then(Value::as_str).map(str::to_owned),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => None,
    }
}

/// What a claim says: a text, the words of a list in one text, or the texts of a list. Nothing else is exposed.
pub fn claim(claims: &Value, path: &[&str], spaced: &[String]) -> Vec<String> {
    let mut value = claims;
    for name in path {
        value = &value[*name];
    }
    let is_list = path.len() == 1 && (LISTS.contains(&path[0]) || spaced.iter().any(|name| name == path[0]));
    match value {
        Value::String(text) if is_list => {
            text.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect()
        }
        Value::String(text) => vec![text.clone()],
        Value::Array(list) if list.iter().all(Value::is_string) => texts(value),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => Vec::new(),
    }
}
