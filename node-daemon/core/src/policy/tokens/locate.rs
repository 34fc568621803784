//! Where a request carries tokens (policy A-11, F-2).

use super::{
    super::{
        paths::query_pairs,
        seen::{Headers, is_reserved},
    },
    BEARER, IssuerRule, Location, Prefix,
};

/// One token that stands where a rule looks.
#[derive(Clone, PartialEq, Eq)]
pub struct Candidate {
    pub(super) rule: usize,
    pub(super) location: Location,
    pub(super) text: Box<str>,
}

impl Candidate {
    /// Whether this is what `whole` holds: the same text, or in the same header what is left of it where another rule knows
    /// the word before the token.
    pub(super) fn is_read_from(&self, whole: &Self) -> bool {
        match (&self.location, &whole.location) {
            (Location::Header { name, .. }, Location::Header { name: other, .. }) if name == other => {
                whole.text.ends_with(&*self.text)
            }
            _ => self.text == whole.text,
        }
    }
}

/// Tokens are not shown.
impl std::fmt::Debug for Candidate {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Candidate")
            .field("rule", &self.rule)
            .field("location", &self.location)
            .finish()
    }
}

pub(super) fn locate(
    index: usize,
    rule: &IssuerRule,
    path: Option<&str>,
    headers: &dyn Headers,
) -> Vec<Candidate> {
    let mut found = Vec::new();
    for location in &rule.locations {
        let mut add = |text: &str| {
            found.push(Candidate { rule: index, location: location.clone(), text: text.into() });
        };
        match location {
            Location::Header { name, .. } if is_reserved(name) => {}
            Location::Header { name, prefix } => headers.each(name, &mut |value| {
                let value = String::from_utf8_lossy(value);
                if let Some(token) = prefix.strip(&value) {
                    add(token);
                }
            }),
            Location::Parameter(name) => {
                let pairs = query_pairs(path.unwrap_or_default());
                pairs.filter(|(key, _)| **key == **name).for_each(|(_, value)| add(value));
            }
            Location::Cookie(name) => headers.each("cookie", &mut |value| {
                let value = String::from_utf8_lossy(value);
                let pairs = value.split(';').filter_map(|pair| pair.trim().split_once('='));
                pairs.filter(|(key, _)| **key == **name).for_each(|(_, value)| add(value));
            }),
        }
    }
    found
}

impl Prefix {
    fn strip<'v>(&self, value: &'v str) -> Option<&'v str> {
        match self {
            Self::Required(prefix) => value.strip_prefix(&**prefix),
            Self::OptionalBearer => Some(value.strip_prefix(BEARER).unwrap_or(value)),
        }
    }
}
