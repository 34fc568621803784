//! Documents in, values of the domain out.
//!
//! Takes one JSON value per document (whether it was YAML in a folder or came from an API server) and gives an
//! [`Object`]; the kinds of this room (Namespace, ServiceAccount, Service, ServiceEntry, Workload, Mesh) become typed values, those of
//! policy are handed on as they are. Every refusal names field, value, what was expected and what to do.
//! Not here: which documents contradict each other ([`crate::store`]).

mod enrolment;
mod field;
mod mesh;
mod port;
mod same_node;
mod service;
mod service_entry;
mod workload;

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde_json::{Map, Value};

pub(crate) use self::{
    enrolment::{Enrolment, enrolment},
    mesh::mesh,
    same_node::same_node_label,
    service::service,
    service_entry::service_entry,
    workload::{DeclaredWorkload, workload},
};
use crate::{policy::PolicyObjects, workload::ObjectName};

/// Version of the two kinds of our own.
pub const CULVERT_VERSION: &str = "culvert.io/v1alpha1";

/// Longest value that is repeated in a message, in characters: one line of a terminal.
const SHOWN_CHARACTERS_MAX: usize = 80;

/// Longest name of an object, in bytes: what Kubernetes allows (RFC 1123 subdomain).
const NAME_BYTES_MAX: usize = 253;

/// Longest name of a namespace, in bytes: what Kubernetes allows (RFC 1123 label).
const NAMESPACE_BYTES_MAX: usize = 63;

/// Where a document was read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    pub file: Arc<str>,
    /// Which document of the file, from 0.
    pub index: usize,
}

impl Source {
    pub fn new(file: &str, index: usize) -> Self {
        Self { file: file.into(), index }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} document {}", self.file, self.index)
    }
}

/// One document with a readable head; what its `spec` says is not judged yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    pub api_version: String,
    pub kind: String,
    /// Namespace `default` where a namespaced kind names none; empty for cluster-scoped kinds.
    pub name: ObjectName,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// `metadata.creationTimestamp`, RFC 3339.
    pub created: Option<String>,
    /// As written, nulls inside included (policy A-2). Absent and null are both `Null`.
    pub spec: Value,
    /// The rest of `metadata`, for the kinds that refuse unknown keys.
    pub metadata_extra: BTreeMap<String, Value>,
    /// Top-level keys beside `apiVersion`, `kind`, `metadata`, `spec` and `status`.
    pub extra: BTreeMap<String, Value>,
    pub source: Source,
}

impl Object {
    /// The refusal of this object for one field.
    pub fn invalid(&self, field: &str, value: &Value, expected: &str, remedy: &str) -> InvalidObject {
        InvalidObject {
            source: self.source.clone(),
            kind_name: self.kind.clone(),
            name: Some(self.name.clone()),
            field: field.to_owned(),
            value: shown(value),
            expected: expected.to_owned(),
            remedy: remedy.to_owned(),
        }
    }

    /// `Kind namespace/name`, for messages.
    pub fn title(&self) -> String {
        format!("{} {}", self.kind, self.name)
    }
}

/// A document, or a part of it, that cannot be used. Displays as one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidObject {
    pub source: Source,
    /// The `kind` as written; empty where the document names none.
    pub kind_name: String,
    /// `None` where the document does not say which object it is.
    pub name: Option<ObjectName>,
    /// Path of the field, such as `spec.ports[0].port`.
    pub field: String,
    pub value: String,
    pub expected: String,
    pub remedy: String,
}

impl InvalidObject {
    /// `Kind namespace/name`, as far as it is known.
    pub fn object(&self) -> String {
        match (&self.name, self.kind_name.as_str()) {
            (Some(name), kind) => format!("{kind} {name}"),
            (None, "") => "unknown object".to_owned(),
            (None, kind) => format!("{kind} without a usable name"),
        }
    }

    /// What is wrong, without saying with which object.
    pub fn reason(&self) -> String {
        format!("found {}, expected {}: {}", self.value, self.expected, self.remedy)
    }
}

impl fmt::Display for InvalidObject {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}: {}: {}", self.source, self.object(), self.field, self.reason())
    }
}

impl std::error::Error for InvalidObject {}

/// Reads the head of a document: which object it is.
///
/// Kinds that nobody here understands pass as well: the store says so and ignores them.
///
/// # Errors
/// Names the field of the head that is missing or has another shape.
pub fn object(value: Value, source: Source) -> Result<Object, InvalidObject> {
    let mut head = Head { source, kind: String::new(), name: None };
    let Value::Object(mut top) = value else {
        return Err(head.refuse(
            "document",
            &value,
            "a map with apiVersion, kind and metadata",
            "write one object per document",
        ));
    };
    head.kind = head.text(&mut top, "kind", "the kind of object, such as Workload")?;
    if head.kind == "List" {
        return Err(head.refuse(
            "kind",
            &Value::from("List"),
            "one object per document",
            "write its items as documents of their own, separated by ---",
        ));
    }
    let api_version = head.text(&mut top, "apiVersion", "group and version, such as culvert.io/v1alpha1")?;
    let metadata = top.remove("metadata");
    if !is_understood(&api_version, &head.kind) {
        return Ok(foreign(api_version, head, metadata.unwrap_or(Value::Null)));
    }
    let mut metadata = match metadata {
        Some(Value::Object(map)) => map,
        other => {
            let found = other.unwrap_or(Value::Null);
            return Err(head.refuse("metadata", &found, "a map with a name", "add metadata: {name: ...}"));
        }
    };
    let name = head.name(&mut metadata)?;
    head.name = Some(name.clone());
    let labels = head.texts(&mut metadata, "labels")?;
    let annotations = head.texts(&mut metadata, "annotations")?;
    let created = head.created(&mut metadata)?;
    let spec = top.remove("spec").unwrap_or(Value::Null);
    top.remove("status");
    let Head { source, kind, .. } = head;
    Ok(Object {
        api_version,
        kind,
        name,
        labels,
        annotations,
        created,
        spec,
        metadata_extra: metadata.into_iter().collect(),
        extra: top.into_iter().collect(),
        source,
    })
}

/// An object that is no business of the mesh: only its name is wanted, for the message that it is ignored.
fn foreign(api_version: String, head: Head, metadata: Value) -> Object {
    let text = |key: &str| metadata.get(key).and_then(Value::as_str).unwrap_or_default();
    Object {
        api_version,
        kind: head.kind,
        name: ObjectName::new(text("namespace"), text("name")),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        created: None,
        spec: Value::Null,
        metadata_extra: BTreeMap::new(),
        extra: BTreeMap::new(),
        source: head.source,
    }
}

/// What is known of a document while its head is read.
struct Head {
    source: Source,
    kind: String,
    name: Option<ObjectName>,
}

impl Head {
    fn refuse(&self, field: &str, value: &Value, expected: &str, remedy: &str) -> InvalidObject {
        InvalidObject {
            source: self.source.clone(),
            kind_name: self.kind.clone(),
            name: self.name.clone(),
            field: field.to_owned(),
            value: shown(value),
            expected: expected.to_owned(),
            remedy: remedy.to_owned(),
        }
    }

    fn text(&self, map: &mut Map<String, Value>, key: &str, expected: &str) -> Result<String, InvalidObject> {
        match map.remove(key) {
            Some(Value::String(text)) if !text.is_empty() => Ok(text),
            other => {
                let remedy = format!("add {key} to the document");
                Err(self.refuse(key, &other.unwrap_or(Value::Null), expected, &remedy))
            }
        }
    }

    fn name(&self, metadata: &mut Map<String, Value>) -> Result<ObjectName, InvalidObject> {
        let name = match metadata.remove("name") {
            Some(Value::String(name)) if is_subdomain(&name) => name,
            other => {
                return Err(self.refuse(
                    "metadata.name",
                    &other.unwrap_or(Value::Null),
                    "1 to 253 of a-z, 0-9, '-' and '.', beginning and ending with a letter or digit",
                    "give the object such a name",
                ));
            }
        };
        let namespace = match metadata.remove("namespace") {
            None | Some(Value::Null) => None,
            Some(Value::String(namespace)) if is_label(&namespace) => Some(namespace),
            Some(other) => {
                return Err(self.refuse(
                    "metadata.namespace",
                    &other,
                    "1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
                    "name the object's namespace",
                ));
            }
        };
        match (Scope::of(&self.kind), namespace) {
            (Scope::Namespaced, namespace) => {
                Ok(ObjectName::new(namespace.as_deref().unwrap_or("default"), &name))
            }
            (Scope::Mesh, None) | (Scope::MeshAsKubectl, _) => Ok(ObjectName::new("", &name)),
            (Scope::Mesh, Some(namespace)) => Err(self.refuse(
                "metadata.namespace",
                &Value::from(namespace),
                "no namespace, because this kind belongs to the whole mesh",
                "remove metadata.namespace",
            )),
        }
    }

    fn texts(
        &self,
        metadata: &mut Map<String, Value>,
        key: &str,
    ) -> Result<BTreeMap<String, String>, InvalidObject> {
        let map = match metadata.remove(key) {
            None | Some(Value::Null) => return Ok(BTreeMap::new()),
            Some(Value::Object(map)) => map,
            Some(other) => {
                let field = format!("metadata.{key}");
                return Err(self.refuse(&field, &other, "a map of strings", "write key: \"value\" pairs"));
            }
        };
        map.into_iter()
            .map(|(name, value)| {
                let Value::String(text) = value else {
                    let field = format!("metadata.{key}.{name}");
                    return Err(self.refuse(&field, &value, "a string", "put the value in quotes"));
                };
                Ok((name, text))
            })
            .collect()
    }

    fn created(&self, metadata: &mut Map<String, Value>) -> Result<Option<String>, InvalidObject> {
        match metadata.remove("creationTimestamp") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.refuse(
                "metadata.creationTimestamp",
                &other,
                "a time as in RFC 3339, such as \"2018-11-24T10:00:00Z\"",
                "put the time in quotes, or remove it",
            )),
        }
    }
}

/// The kinds that this room decodes itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Namespace,
    ServiceAccount,
    Service,
    ServiceEntry,
    Workload,
    Mesh,
}

impl Kind {
    pub(crate) fn of(api_version: &str, kind: &str) -> Option<Self> {
        match (api_version, kind) {
            ("v1", "Namespace") => Some(Self::Namespace),
            ("v1", "ServiceAccount") => Some(Self::ServiceAccount),
            ("v1", "Service") => Some(Self::Service),
            (
                "networking.istio.io/v1" | "networking.istio.io/v1beta1" | "networking.istio.io/v1alpha3",
                "ServiceEntry",
            ) => Some(Self::ServiceEntry),
            (CULVERT_VERSION, "Workload") => Some(Self::Workload),
            (CULVERT_VERSION, "Mesh") => Some(Self::Mesh),
            _ => None,
        }
    }
}

fn is_understood(api_version: &str, kind: &str) -> bool {
    Kind::of(api_version, kind).is_some() || PolicyObjects::handles(api_version, kind)
}

/// Where the objects of a kind live.
enum Scope {
    Namespaced,
    Mesh,
    /// A namespace is allowed and means nothing, as kubectl has it: files of 2018 sometimes name one.
    MeshAsKubectl,
}

impl Scope {
    fn of(kind: &str) -> Self {
        match kind {
            "Namespace" | "Mesh" => Self::Mesh,
            "MeshPolicy" | "ClusterRbacConfig" => Self::MeshAsKubectl,
            _ => Self::Namespaced,
        }
    }
}

/// RFC 1123 subdomain.
fn is_subdomain(text: &str) -> bool {
    text.len() <= NAME_BYTES_MAX
        && text.split('.').all(|label| is_label_text(label) && !label.is_empty())
        && !text.is_empty()
}

/// RFC 1123 label.
pub(crate) fn is_label(text: &str) -> bool {
    !text.is_empty() && text.len() <= NAMESPACE_BYTES_MAX && is_label_text(text)
}

fn is_label_text(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// A value as messages repeat it: short, on one line.
pub(crate) fn shown(value: &Value) -> String {
    if value.is_null() {
        return "nothing".to_owned();
    }
    let text = value.to_string();
    if text.chars().count() <= SHOWN_CHARACTERS_MAX {
        return text;
    }
    text.chars().take(SHOWN_CHARACTERS_MAX).chain("...".chars()).collect()
}

#[cfg(test)]
mod tests;
