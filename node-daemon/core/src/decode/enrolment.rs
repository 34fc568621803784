//! Which workloads are in the mesh: the labels, on the workload itself or on its namespace.

use serde_json::Value;

use super::{InvalidObject, Object};

/// Our own label, `enabled` or `disabled`.
pub(crate) const LABEL_MESH: &str = "culvert.io/mesh";

/// Istio's label: `culvert` is an alias of `enabled`, `none` of `disabled`; other values speak to other meshes.
pub(crate) const LABEL_DATAPLANE_MODE: &str = "istio.io/dataplane-mode";

/// What the labels of one object say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Enrolment {
    Enabled,
    Disabled,
    /// Nothing: a wider scope decides.
    Unsaid,
}

impl Enrolment {
    /// The workload's word goes before its namespace's; a `Workload` document of which nobody says anything is in.
    pub(crate) fn resolve(workload: Self, namespace: Self) -> bool {
        match (workload, namespace) {
            (Self::Enabled, _) | (Self::Unsaid, Self::Enabled | Self::Unsaid) => true,
            (Self::Disabled, _) | (Self::Unsaid, Self::Disabled) => false,
        }
    }
}

/// Reads the labels of a workload or a namespace.
pub(crate) fn enrolment(object: &Object) -> Result<Enrolment, InvalidObject> {
    match object.labels.get(LABEL_MESH).map(String::as_str) {
        Some("enabled") => return Ok(Enrolment::Enabled),
        Some("disabled") => return Ok(Enrolment::Disabled),
        Some(other) => {
            return Err(object.invalid(
                &format!("metadata.labels.{LABEL_MESH}"),
                &Value::from(other),
                "enabled or disabled",
                "write one of the two, or remove the label",
            ));
        }
        None => {}
    }
    Ok(match object.labels.get(LABEL_DATAPLANE_MODE).map(String::as_str) {
        Some("culvert") => Enrolment::Enabled,
        Some("none") => Enrolment::Disabled,
        Some(_) | None => Enrolment::Unsaid,
    })
}
