//! How connections inside one node go: `sameNode` of Mesh and Workload, and the label of namespaces and pods.

use serde_json::Value;

use super::{InvalidObject, Object, field::Field};
use crate::workload::SameNode;

/// The label on a namespace or a workload, for what has no `spec.sameNode`.
pub(crate) const LABEL_SAME_NODE: &str = "culvert.io/same-node";

/// Reads a field `sameNode`.
pub(super) fn same_node(field: &Field<'_>) -> Result<SameNode, InvalidObject> {
    parse(field.text()?).ok_or_else(|| field.refuse("direct or proxied", "write one of the two"))
}

/// What the label of a workload or a namespace says; `None`: nothing.
pub(crate) fn same_node_label(object: &Object) -> Result<Option<SameNode>, InvalidObject> {
    let Some(text) = object.labels.get(LABEL_SAME_NODE) else { return Ok(None) };
    parse(text).map(Some).ok_or_else(|| {
        object.invalid(
            &format!("metadata.labels.{LABEL_SAME_NODE}"),
            &Value::from(text.as_str()),
            "direct or proxied",
            "write one of the two, or remove the label",
        )
    })
}

fn parse(text: &str) -> Option<SameNode> {
    match text {
        "direct" => Some(SameNode::Direct),
        "proxied" => Some(SameNode::Proxied),
        _ => None,
    }
}
