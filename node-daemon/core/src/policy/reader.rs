//! Reading the fields of an object: both spellings of a name, null told from absent, nothing unknown let through.
//!
//! Every front end of this room reads through [`Fields`], so a key that nobody asked for is refused in one place:
//! a misspelled restriction must not become no restriction.

use std::{borrow::Cow, collections::BTreeMap};

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::matching::{network, star_is_misplaced};
use crate::decode::{InvalidObject, Object};

/// One field that makes its object unusable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) field: String,
    pub(super) value: Value,
    pub(super) expected: String,
    pub(super) remedy: String,
}

impl Fault {
    pub(super) fn new(field: &str, value: &Value, expected: &str, remedy: &str) -> Self {
        Self {
            field: field.to_owned(),
            value: value.clone(),
            expected: expected.to_owned(),
            remedy: remedy.to_owned(),
        }
    }

    pub(super) fn of(self, object: &Object) -> InvalidObject {
        object.invalid(&self.field, &self.value, &self.expected, &self.remedy)
    }
}

/// Something in a usable object that does not do what its author may expect.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Warning {
    pub(super) field: String,
    /// One sentence: the value, what was expected, what it does.
    pub(super) sentence: String,
}

/// Gathers the warnings of one object while it is read.
#[derive(Debug, Default)]
pub(super) struct Warnings(pub(super) Vec<Warning>);

impl Warnings {
    pub(super) fn say(&mut self, field: &str, sentence: impl Into<String>) {
        self.0.push(Warning { field: field.to_owned(), sentence: sentence.into() });
    }
}

/// A value and the path by which messages name it.
#[derive(Clone, Debug)]
pub(super) struct Item<'a> {
    pub(super) path: String,
    pub(super) value: &'a Value,
}

/// Names that most mappings have at most: room for them is made at once. More are taken too.
const FIELDS_EXPECTED: usize = 16;

/// The fields of one mapping.
pub(super) struct Fields<'a> {
    path: String,
    map: &'a Map<String, Value>,
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    pub(super) fn open(item: &Item<'a>) -> Result<Self, Fault> {
        let map = item.value.as_object().ok_or_else(|| item.fault("a mapping", "write key: value pairs"))?;
        Ok(Self { path: item.path.clone(), map, known: Vec::with_capacity(FIELDS_EXPECTED) })
    }

    /// The fields beneath `spec`. A missing or null spec counts as empty.
    pub(super) fn spec(object: &'a Object) -> Result<Self, Fault> {
        static EMPTY: std::sync::LazyLock<Value> = std::sync::LazyLock::new(|| Value::Object(Map::new()));
        let value = if object.spec.is_null() { &*EMPTY } else { &object.spec };
        Self::open(&Item { path: "spec".to_owned(), value })
    }

    pub(super) fn path_of(&self, name: &str) -> String {
        [&*self.path, ".", name].concat()
    }

    /// A refusal of the mapping as a whole.
    pub(super) fn fault(&self, expected: &str, remedy: &str) -> Fault {
        Fault::new(&self.path, &Value::Object(self.map.clone()), expected, remedy)
    }

    /// The value of `name`, written in lowerCamelCase or snake_case (policy A-1); null is told from absent (policy A-2).
    pub(super) fn even_null(&mut self, name: &'static str) -> Result<Option<Item<'a>>, Fault> {
        if !self.known.contains(&name) {
            self.known.push(name);
        }
        let snake = snake_case(name);
        let written = |key: &str| self.map.get(key);
        if snake != name && written(name).is_some() && written(&snake).is_some() {
            let value = written(&snake).unwrap_or(&Value::Null);
            return Err(Fault::new(
                &self.path_of(&snake),
                value,
                &format!("one spelling of {name}"),
                "remove one of the two spellings",
            ));
        }
        let found = [name, &*snake].into_iter().find_map(|key| Some((key, written(key)?)));
        Ok(found.map(|(key, value)| Item { path: self.path_of(key), value }))
    }

    /// The value of `name`; null counts as absent, as in the protobuf JSON mapping.
    pub(super) fn take(&mut self, name: &'static str) -> Result<Option<Item<'a>>, Fault> {
        Ok(self.even_null(name)?.filter(|item| !item.value.is_null()))
    }

    pub(super) fn text(&mut self, name: &'static str) -> Result<Option<&'a str>, Fault> {
        self.take(name)?.map(|item| item.text()).transpose()
    }

    pub(super) fn flag(&mut self, name: &'static str) -> Result<bool, Fault> {
        match self.take(name)? {
            None => Ok(false),
            Some(Item { value: Value::Bool(flag), .. }) => Ok(*flag),
            Some(item) => {
                Err(Fault::new(&item.path, item.value, "true or false", "write true or false without quotes"))
            }
        }
    }

    /// A list; absent is empty.
    pub(super) fn list(&mut self, name: &'static str) -> Result<Vec<Item<'a>>, Fault> {
        self.take(name)?.map_or_else(|| Ok(Vec::new()), |item| item.items())
    }

    /// A list of strings, none of them empty; absent is empty.
    pub(super) fn texts(&mut self, name: &'static str) -> Result<Vec<Item<'a>>, Fault> {
        let items = self.list(name)?;
        for item in &items {
            item.filled_text()?;
        }
        Ok(items)
    }

    /// A mapping of strings to strings.
    pub(super) fn labels(&mut self, name: &'static str) -> Result<Option<BTreeMap<String, String>>, Fault> {
        let Some(item) = self.take(name)? else { return Ok(None) };
        let Value::Object(map) = item.value else {
            return Err(Fault::new(
                &item.path,
                item.value,
                "a mapping of strings",
                "write key: \"value\" pairs",
            ));
        };
        let mut labels = BTreeMap::new();
        for (key, value) in map {
            let entry = Item { path: [&*item.path, ".", key].concat(), value };
            labels.insert(key.clone(), entry.text()?.to_owned());
        }
        Ok(Some(labels))
    }

    /// One of the names of an enumeration, the first of which stands for absent.
    pub(super) fn one_of<T: Copy>(&mut self, name: &'static str, choices: &[(&str, T)]) -> Result<T, Fault> {
        let Some(item) = self.take(name)? else { return Ok(choices[0].1) };
        let chosen = choices.iter().find(|(written, _)| item.value.as_str() == Some(written));
        chosen.map(|(_, choice)| *choice).ok_or_else(|| {
            let names = choices.iter().map(|(written, _)| *written).collect::<Vec<_>>().join(", ");
            let remedy = "write one of these names in upper case, with plain quotes or none";
            Fault::new(&item.path, item.value, &format!("one of {names}"), remedy)
        })
    }

    /// Refuses what nobody asked for.
    pub(super) fn finish(self) -> Result<(), Fault> {
        let is_known =
            |key: &str| self.known.contains(&key) || self.known.iter().any(|n| key == snake_case(n));
        match self.map.iter().find(|(key, _)| !is_known(key)) {
            None => Ok(()),
            Some((key, value)) => Err(Fault::new(
                &self.path_of(key),
                value,
                &format!("only the fields {}", self.known.join(", ")),
                "correct the spelling of the field or remove it",
            )),
        }
    }
}

impl<'a> Item<'a> {
    pub(super) fn fault(&self, expected: &str, remedy: &str) -> Fault {
        Fault::new(&self.path, self.value, expected, remedy)
    }

    pub(super) fn text(&self) -> Result<&'a str, Fault> {
        self.value.as_str().ok_or_else(|| self.fault("a string", "put the value in quotes"))
    }

    pub(super) fn filled_text(&self) -> Result<&'a str, Fault> {
        match self.text()? {
            "" => Err(self.fault("a string that is not empty", "write a value or remove the entry")),
            text => Ok(text),
        }
    }

    pub(super) fn items(&self) -> Result<Vec<Item<'a>>, Fault> {
        let expected = || self.fault("a list", "write [a, b], or one entry a line, each with a dash");
        let values = self.value.as_array().ok_or_else(expected)?.iter().enumerate();
        let path = |index: usize| [&*self.path, "[", &index.to_string(), "]"].concat();
        Ok(values.map(|(index, value)| Item { path: path(index), value }).collect())
    }

    /// A port as the protobuf JSON mapping of an int32 allows it: a number, or the number in quotes.
    pub(super) fn port_number(&self) -> Option<u16> {
        let number = self.value.as_u64().and_then(|number| u16::try_from(number).ok());
        number.or_else(|| self.value.as_str().and_then(port))
    }
}

/// Reads the decimal number of a port, 0 to 65535, without a sign.
pub(super) fn port(text: &str) -> Option<u16> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// What was written in a list, and whether part of it could not be used (policy G-5, G-23).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Usable<T> {
    pub(super) values: Vec<T>,
    pub(super) has_unusable: bool,
}

/// Reads each text, reporting those that cannot be read instead of refusing the object.
pub(super) fn usable<T>(
    items: &[Item<'_>],
    expected: &str,
    warnings: &mut Warnings,
    read: impl Fn(&str) -> Option<T>,
) -> Usable<T> {
    let mut usable = Usable { values: Vec::new(), has_unusable: false };
    for item in items {
        match item.value.as_str().and_then(&read) {
            Some(value) => usable.values.push(value),
            None => {
                usable.has_unusable = true;
                let sentence =
                    format!("{} is not usable, expected {expected}", crate::decode::shown(item.value));
                warnings.say(&item.path, sentence);
            }
        }
    }
    usable
}

pub(super) fn networks(items: &[Item<'_>], warnings: &mut Warnings) -> Usable<IpNet> {
    usable(items, "an IP address or CIDR", warnings, network)
}

pub(super) fn ports(items: &[Item<'_>], warnings: &mut Warnings) -> Usable<u16> {
    usable(items, "a port number from 0 to 65535", warnings, port)
}

/// Warns of a star that is no wildcard where it stands (policy B-5).
pub(super) fn warn_of_stars(items: &[Item<'_>], warnings: &mut Warnings) {
    for item in items {
        let text = item.value.as_str().unwrap_or_default();
        if star_is_misplaced(text) {
            let sentence = "a star is a wildcard only at one end, others are ordinary characters";
            warnings.say(&item.path, format!("{text:?}: {sentence}"));
        }
    }
}

/// Reads patterns, all of which can be used.
pub(super) fn patterns<T>(
    items: &[Item<'_>],
    warnings: &mut Warnings,
    read: impl Fn(&str) -> T,
) -> Usable<T> {
    warn_of_stars(items, warnings);
    Usable {
        values: items.iter().filter_map(|item| item.value.as_str()).map(read).collect(),
        has_unusable: false,
    }
}

/// Whether the text is a label of RFC 1123: what names a service or a port.
pub(super) fn is_label(text: &str) -> bool {
    crate::decode::is_label(text)
}

/// `peerIsOptional` as `peer_is_optional`. Most names are one word, which is the same in both spellings.
fn snake_case(name: &str) -> Cow<'_, str> {
    if !name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Cow::Borrowed(name);
    }
    let mut snake = String::with_capacity(name.len() + 4);
    for character in name.chars() {
        if character.is_ascii_uppercase() {
            snake.push('_');
        }
        snake.push(character.to_ascii_lowercase());
    }
    Cow::Owned(snake)
}
