//! The fields of a case, read by name: what nobody asked for is refused.

use std::fmt;

use serde_json::{Map, Value};

/// A file of cases that cannot be used. Displays as one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidCases {
    /// Path of the field, such as `cases[3].request.protocol`.
    pub field: String,
    pub value: String,
    pub expected: String,
}

impl InvalidCases {
    pub(super) fn new(field: &str, value: &Value, expected: impl Into<String>) -> Self {
        Self { field: field.to_owned(), value: crate::decode::shown(value), expected: expected.into() }
    }

    /// Whether the text of a policy set is at fault.
    pub(super) fn is_of_a_set(&self) -> bool {
        self.field.starts_with("policySets.")
    }

    /// The line of `text`, from 1, where the field stands; that of its case where the field itself is not found.
    pub fn line(&self, text: &str) -> Option<usize> {
        let lines = || text.lines().enumerate().map(|(index, line)| (index + 1, line));
        let Some(rest) = self.field.strip_prefix("cases[") else {
            let key = self.field.split(['.', '[']).next().unwrap_or_default();
            let at_top = |line: &str| line.strip_prefix(key).is_some_and(|rest| rest.starts_with(':'));
            let (top, _) = lines().find(|(_, line)| at_top(line))?;
            let inner = self.field.strip_prefix("policySets.").map(|name| format!("{name}:"));
            let within = inner
                .and_then(|name| lines().skip(top).find(|(_, line)| line.trim_start().starts_with(&name)));
            return Some(within.map_or(top, |(number, _)| number));
        };
        let (index, path) = rest.split_once(']')?;
        let index: usize = index.parse().ok()?;
        let start = lines().find(|(_, line)| line.starts_with("cases:")).map(|(number, _)| number)?;
        let mut items = lines()
            .skip(start)
            .filter(|(_, line)| line.starts_with("- ") || line.trim_start().starts_with("- name:"));
        let (first, _) = items.nth(index)?;
        let end = items.next().map_or(usize::MAX, |(number, _)| number);
        let last = path.rsplit(['.', '[']).find(|part| !part.is_empty() && !part.ends_with(']'));
        let key = last.map(|part| format!("{part}:"));
        let within = lines().filter(|(number, _)| (first..end).contains(number));
        let found = key.and_then(|key| within.into_iter().find(|(_, line)| line.contains(&key)));
        Some(found.map_or(first, |(number, _)| number))
    }
}

impl fmt::Display for InvalidCases {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let field = if self.field.is_empty() { "the file" } else { &self.field };
        write!(formatter, "{field}: {} is not usable, expected {}", self.value, self.expected)
    }
}

impl std::error::Error for InvalidCases {}

/// One mapping. Null counts as absent, except where [`Self::has`] asks.
#[derive(Clone, Debug)]
pub(super) struct Fields {
    pub(super) path: String,
    map: Map<String, Value>,
}

impl Fields {
    pub(super) fn new(path: &str, value: &Value) -> Result<Self, InvalidCases> {
        match value {
            Value::Object(map) => Ok(Self { path: path.to_owned(), map: map.clone() }),
            Value::Null => Ok(Self { path: path.to_owned(), map: Map::new() }),
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                Err(InvalidCases::new(path, value, "a mapping"))
            }
        }
    }

    /// Joins `request: {auth: {principal: x}}` to `request.auth.principal: x`, for the names that may be written so.
    pub(super) fn flattened(self, groups: &[&str]) -> Self {
        let mut map = Map::new();
        flatten("", self.map, groups, &mut map);
        Self { path: self.path, map }
    }

    pub(super) fn only(&self, known: &[&str]) -> Result<(), InvalidCases> {
        match self.map.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some((key, value)) => Err(InvalidCases::new(
                &self.path_of(key),
                value,
                format!("only the keys {}", known.join(", ")),
            )),
        }
    }

    pub(super) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.map.iter()
    }

    pub(super) fn at(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn invalid(&self, key: &str, expected: impl Into<String>) -> InvalidCases {
        InvalidCases::new(&self.path_of(key), self.at(key).unwrap_or(&Value::Null), expected)
    }

    /// A text; numbers and booleans are read as they were written.
    pub(super) fn text(&self, key: &str) -> Result<Option<String>, InvalidCases> {
        match self.at(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(Some(value.to_string())),
            Some(_) => Err(self.invalid(key, "a text")),
        }
    }

    pub(super) fn required_text(&self, key: &str) -> Result<String, InvalidCases> {
        self.text(key)?
            .filter(|text| !text.is_empty())
            .ok_or_else(|| self.invalid(key, "a text that is not empty"))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, InvalidCases> {
        match self.at(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.invalid(key, "true or false")),
        }
    }

    pub(super) fn port(&self, key: &str) -> Result<Option<u16>, InvalidCases> {
        let Some(value) = self.at(key) else { return Ok(None) };
        let number = value.as_u64().or_else(|| value.as_str().and_then(|text| text.parse().ok()));
        let port = number.and_then(|number| u16::try_from(number).ok());
        port.map(Some).ok_or_else(|| self.invalid(key, "a port number from 0 to 65535"))
    }

    /// Anything that has a grammar of its own.
    pub(super) fn parsed<T: std::str::FromStr>(
        &self,
        key: &str,
        expected: &str,
    ) -> Result<Option<T>, InvalidCases> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        text.parse().map(Some).map_err(|_| self.invalid(key, expected))
    }

    /// A list of texts; one text is a list of one.
    pub(super) fn texts(&self, key: &str) -> Result<Vec<String>, InvalidCases> {
        match self.at(key) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text.clone()]),
            Some(Value::Array(list)) => {
                let text = |value: &Value| value.as_str().map(str::to_owned);
                list.iter()
                    .map(|value| text(value).ok_or_else(|| self.invalid(key, "a list of texts")))
                    .collect()
            }
            Some(_) => Err(self.invalid(key, "a list of texts")),
        }
    }

    pub(super) fn list(&self, key: &str) -> Result<Vec<Fields>, InvalidCases> {
        self.items(key)?.into_iter().map(|(path, value)| Fields::new(&path, value)).collect()
    }

    /// The entries of a list, each with its path, whatever their shape.
    pub(super) fn items(&self, key: &str) -> Result<Vec<(String, &Value)>, InvalidCases> {
        match self.at(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => {
                let path = self.path_of(key);
                Ok(list
                    .iter()
                    .enumerate()
                    .map(|(index, value)| (format!("{path}[{index}]"), value))
                    .collect())
            }
            Some(_) => Err(self.invalid(key, "a list of mappings")),
        }
    }

    pub(super) fn map(&self, key: &str) -> Result<Fields, InvalidCases> {
        Fields::new(&self.path_of(key), self.map.get(key).unwrap_or(&Value::Null))
    }

    /// One of the names; the first stands for absent.
    pub(super) fn one_of<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<T, InvalidCases> {
        let Some(text) = self.text(key)? else { return Ok(choices[0].1) };
        let chosen = choices.iter().find(|(name, _)| *name == text);
        chosen.map(|(_, choice)| *choice).ok_or_else(|| {
            let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
            self.invalid(key, format!("one of {}", names.join(", ")))
        })
    }

    /// Joins `request.auth.claims[groups]: x` to the mapping `request.auth.claims: {groups: x}`, as policies write it.
    pub(super) fn unbracketed(mut self, names: &[&str]) -> Self {
        let bracketed: Vec<String> = self.map.keys().filter(|key| key.ends_with(']')).cloned().collect();
        for key in bracketed {
            let Some((outer, inner)) = key.strip_suffix(']').and_then(|key| key.split_once('[')) else {
                continue;
            };
            if !names.contains(&outer) || inner.is_empty() {
                continue;
            }
            let value = self.map.remove(&key).unwrap_or_default();
            let written = self.map.entry(outer).or_insert_with(|| Value::Object(Map::new()));
            if written.is_null() {
                *written = Value::Object(Map::new());
            }
            match written {
                Value::Object(map) => {
                    map.insert(inner.to_owned(), value);
                }
                // Two ways to write it that contradict each other: the bracketed key is refused by name.
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                    self.map.insert(key, value);
                }
            }
        }
        self
    }
}

fn flatten(prefix: &str, map: Map<String, Value>, groups: &[&str], into: &mut Map<String, Value>) {
    for (key, value) in map {
        let complete = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        let is_group = groups.contains(&complete.as_str());
        if let (true, Value::Object(inner)) = (is_group, &value) {
            flatten(&complete, inner.clone(), groups, into);
        } else {
            into.insert(complete, value);
        }
    }
}
