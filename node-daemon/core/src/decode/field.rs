//! One value inside a document, together with its path: what every refusal needs.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::{Map, Value};

use super::{InvalidObject, Object};

/// Keys that Kubernetes itself puts in `metadata`, beside the ones that are read.
const METADATA_KEYS: [&str; 9] = [
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "uid",
];

/// Refuses keys beside the known ones, in `metadata` and at the top: a typing error there may lose a label.
pub(super) fn refuse_unknown_head(object: &Object) -> Result<(), InvalidObject> {
    let unknown = |key: &str, path: String, value: &Value| {
        object.invalid(
            &path,
            value,
            "a known key",
            &format!("{key} is not known here: correct its spelling or remove it"),
        )
    };
    for (key, value) in &object.metadata_extra {
        if !METADATA_KEYS.contains(&key.as_str()) {
            return Err(unknown(key, format!("metadata.{key}"), value));
        }
    }
    match object.extra.iter().next() {
        Some((key, value)) => Err(unknown(key, key.clone(), value)),
        None => Ok(()),
    }
}

/// A value and where it stands.
#[derive(Clone)]
pub(super) struct Field<'a> {
    object: &'a Object,
    path: String,
    value: &'a Value,
}

impl<'a> Field<'a> {
    pub(super) fn spec(object: &'a Object) -> Self {
        Self { object, path: "spec".to_owned(), value: &object.spec }
    }

    pub(super) fn refuse(&self, expected: &str, remedy: &str) -> InvalidObject {
        self.object.invalid(&self.path, self.value, expected, remedy)
    }

    /// The fields of a map. Null counts as absent.
    pub(super) fn map(self) -> Result<Fields<'a>, InvalidObject> {
        match self.value.as_object() {
            Some(map) => Ok(Fields { object: self.object, path: self.path, map }),
            None => Err(self.refuse("a map", "write key: value pairs")),
        }
    }

    pub(super) fn items(self) -> Result<Vec<Self>, InvalidObject> {
        let Value::Array(items) = self.value else {
            return Err(self.refuse("a list", "write [a, b], or one - per line"));
        };
        Ok(items
            .iter()
            .enumerate()
            .map(|(index, value)| Self {
                object: self.object,
                path: format!("{}[{index}]", self.path),
                value,
            })
            .collect())
    }

    /// A string that is not empty.
    pub(super) fn text(&self) -> Result<&'a str, InvalidObject> {
        match self.value.as_str().filter(|text| !text.is_empty()) {
            Some(text) => Ok(text),
            None => Err(self.refuse("a string that is not empty", "write the value in quotes")),
        }
    }

    pub(super) fn texts(self) -> Result<BTreeMap<String, String>, InvalidObject> {
        let Fields { object, path, map } = self.map()?;
        map.iter()
            .map(|(key, value)| match value.as_str() {
                Some(text) => Ok((key.clone(), text.to_owned())),
                None => {
                    let field = format!("{path}.{key}");
                    Err(object.invalid(&field, value, "a string", "put the value in quotes"))
                }
            })
            .collect()
    }

    /// The values of a map, by their keys.
    pub(super) fn entries(self) -> Result<Vec<(String, Self)>, InvalidObject> {
        let Fields { object, path, map } = self.map()?;
        let entry = |(key, value): (&String, &'a Value)| {
            (key.clone(), Self { object, path: format!("{path}.{key}"), value })
        };
        Ok(map.iter().map(entry).collect())
    }

    pub(super) fn flag(&self) -> Result<bool, InvalidObject> {
        let flag = self.value.as_bool();
        flag.ok_or_else(|| self.refuse("true or false", "write true or false without quotes"))
    }

    /// A TCP port: 1 to 65535.
    pub(super) fn port(&self) -> Result<u16, InvalidObject> {
        self.value
            .as_u64()
            .and_then(|number| u16::try_from(number).ok())
            .filter(|port| *port != 0)
            .ok_or_else(|| self.refuse("a port number from 1 to 65535", "write the number without quotes"))
    }

    /// An address that one workload or service can own.
    pub(super) fn address(&self) -> Result<IpAddr, InvalidObject> {
        let text = self.text()?;
        let address: IpAddr = text.parse().map_err(|_| {
            self.refuse("an IPv4 or IPv6 address", "write an address such as 10.8.1.4 or \"fd00::4\"")
        })?;
        if address.to_canonical() != address {
            return Err(self.refuse("an IPv4 address in its own form", "remove the prefix ::ffff:"));
        }
        let is_link_local = match address {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        if is_link_local || address.is_loopback() || address.is_unspecified() || address.is_multicast() {
            return Err(self.refuse(
                "an address that is unique in the mesh (no loopback, link-local, multicast or all-zero one)",
                "write the address by which other nodes reach it",
            ));
        }
        Ok(address)
    }

    /// What Kubernetes writes where a service has no address of its own.
    pub(super) fn is_headless(&self) -> bool {
        matches!(self.value.as_str(), Some("None" | ""))
    }

    pub(super) fn is_number(&self) -> bool {
        self.value.is_number()
    }
}

/// The fields of one map.
pub(super) struct Fields<'a> {
    object: &'a Object,
    path: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// Refuses keys beside `known`.
    pub(super) fn only(self, known: &[&str]) -> Result<Self, InvalidObject> {
        match self.map.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            None => Ok(self),
            Some((key, value)) => Err(self.object.invalid(
                &format!("{}.{key}", self.path),
                value,
                &format!("one of the keys {}", known.join(", ")),
                "correct its spelling or remove it",
            )),
        }
    }

    /// The field, unless it is absent or null.
    pub(super) fn at(&self, key: &str) -> Option<Field<'a>> {
        let value = self.map.get(key).filter(|value| !value.is_null())?;
        Some(Field { object: self.object, path: format!("{}.{key}", self.path), value })
    }

    pub(super) fn required(&self, key: &str, remedy: &str) -> Result<Field<'a>, InvalidObject> {
        self.at(key).ok_or_else(|| {
            self.object.invalid(&format!("{}.{key}", self.path), &Value::Null, "a value", remedy)
        })
    }

    /// The items of a list; absent is empty.
    pub(super) fn items(&self, key: &str) -> Result<Vec<Field<'a>>, InvalidObject> {
        self.at(key).map_or_else(|| Ok(Vec::new()), Field::items)
    }
}
