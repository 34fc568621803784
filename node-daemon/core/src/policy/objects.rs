//! What the store keeps of policy: for each object the last good version, and why a newer one was refused.
//!
//! A refused object is not forgotten: with a last good version that one stays in force, without one it denies what it
//! targets (policy A-3, T-19), as far as its targets can be read.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::Value;

use super::{
    authn_v1alpha1::{self, DEFAULT_NAME, Policy, Target},
    destination_rule::{ClientRules, DestinationRule, destination_rule},
    rbac_v1alpha1::{self, ServiceRole, ServiceRoleBinding, Switch},
    reader::{Fault, Fields, Warning, Warnings},
    request_authentication::{RequestAuthentication, request_authentication},
    security_v1::{self, Action, AuthorizationPolicy, PeerAuthentication, Selector},
};
use crate::{
    decode::{InvalidObject, Object, Source},
    workload::ObjectName,
};

/// All policy objects of both ages.
#[derive(Clone, Debug, Default)]
pub struct PolicyObjects {
    entries: BTreeMap<(String, ObjectName), Entry>,
}

impl PolicyObjects {
    /// No objects: the mesh's default mode, and nothing forbidden.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether such an object is policy. Unknown kinds and versions of the policy groups are: a restriction in a
    /// language that nobody here reads must not be passed over in silence, so [`Self::insert`] refuses them.
    pub fn handles(api_version: &str, kind: &str) -> bool {
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        matches!(group, "authentication.istio.io" | "rbac.istio.io" | "security.istio.io")
            || (group == "networking.istio.io" && kind == "DestinationRule")
    }

    /// Puts an object in force, in the place of its earlier version if there is one.
    ///
    /// # Errors
    /// Names the field that makes the object unusable. The refusal is remembered: see the module.
    pub fn insert(&mut self, object: &Object) -> Result<(), InvalidObject> {
        let entry = self.entries.entry((object.kind.clone(), object.name.clone())).or_default();
        let mut warnings = Warnings::default();
        match read(object, &mut warnings) {
            Ok(body) => {
                *entry = Entry { good: Some(Good::new(object, body, warnings)), refused: None };
                Ok(())
            }
            Err(fault) => {
                let invalid = fault.of(object);
                entry.refused = Some(Refused::new(object, invalid.clone()));
                Err(invalid)
            }
        }
    }

    /// Takes an object out of force, whichever state it is in.
    pub fn remove(&mut self, kind: &str, name: &ObjectName) {
        self.entries.remove(&(kind.to_owned(), name.clone()));
    }

    /// How clients speak to services (policy C).
    pub(crate) fn client_rules(&self) -> ClientRules {
        let mut rules = ClientRules::default();
        for ((_, name), entry) in &self.entries {
            match entry {
                Entry { good: Some(Good { label, body: Body::DestinationRule(rule), .. }), .. } => {
                    rules.add(name, label, Ok(rule));
                }
                Entry { good: None, refused: Some(Refused { label, kind, .. }) } => {
                    if let RefusedKind::DestinationRule { host: Some(host) } = kind {
                        rules.add(name, label, Err(host));
                    }
                }
                Entry { .. } => {}
            }
        }
        rules
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&str, &ObjectName, &Entry)> {
        self.entries.iter().map(|((kind, name), entry)| (kind.as_str(), name, entry))
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Entry {
    /// What is in force.
    pub(super) good: Option<Good>,
    /// The newest version, if it could not be used.
    pub(super) refused: Option<Refused>,
}

/// A version that could be read.
#[derive(Clone, Debug)]
pub(super) struct Good {
    /// `Kind/namespace/name`
    pub(super) label: Arc<str>,
    pub(super) created: Option<String>,
    pub(super) source: Source,
    pub(super) body: Body,
    pub(super) warnings: Vec<Warning>,
}

impl Good {
    fn new(object: &Object, body: Body, warnings: Warnings) -> Self {
        let mut seen = BTreeSet::new();
        let warnings = warnings.0.into_iter().filter(|warning| seen.insert(warning.clone())).collect();
        Self {
            label: label(object),
            created: object.created.clone(),
            source: object.source.clone(),
            body,
            warnings,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) enum Body {
    Policy(Policy),
    MeshPolicy(Policy),
    RbacConfig(Switch),
    ClusterRbacConfig(Switch),
    ServiceRole(ServiceRole),
    ServiceRoleBinding(ServiceRoleBinding),
    PeerAuthentication(PeerAuthentication),
    AuthorizationPolicy(AuthorizationPolicy),
    RequestAuthentication(RequestAuthentication),
    DestinationRule(DestinationRule),
}

/// A version that could not be read.
#[derive(Clone, Debug)]
pub(super) struct Refused {
    pub(super) label: Arc<str>,
    pub(super) created: Option<String>,
    pub(super) invalid: InvalidObject,
    pub(super) kind: RefusedKind,
}

/// Which decision the refused object would have taken part in, and for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RefusedKind {
    /// `Policy`
    Policy(Reach),
    /// `MeshPolicy`, or a `Policy` that is not named as it must be.
    MeshPolicy,
    /// `RbacConfig`, `ClusterRbacConfig`
    Switch {
        is_cluster: bool,
    },
    PeerAuthentication(Reach),
    /// `only_grants`: an ALLOW, whose loss can be made good by another ALLOW.
    AuthorizationPolicy {
        reach: Reach,
        only_grants: bool,
    },
    /// A role or a binding: it could only have granted.
    Grant,
    RequestAuthentication(Reach),
    /// What it would have said of connections that leave.
    DestinationRule {
        host: Option<String>,
    },
    /// A kind or version of a policy group that nobody here reads.
    Unknown,
}

/// What an object targets, within its namespace (or the mesh, in the root namespace).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// All of the scope, where nothing closer applies.
    Scope,
    Targets(Vec<Target>),
    Selected(Selector),
    /// It cannot be told: anything in the scope.
    Unreadable,
    /// Nobody: a dry run, an AUDIT, or resources that this mesh does not have.
    Nobody,
}

impl Refused {
    fn new(object: &Object, invalid: InvalidObject) -> Self {
        let kind = match (known_kind(object), object.kind.as_str()) {
            (_, "ServiceRole" | "ServiceRoleBinding") => RefusedKind::Grant,
            (_, "DestinationRule") => {
                RefusedKind::DestinationRule { host: object.spec["host"].as_str().map(str::to_owned) }
            }
            (false, _) => RefusedKind::Unknown,
            (true, "Policy") => RefusedKind::Policy(targets_reach(object)),
            (true, "MeshPolicy") => RefusedKind::MeshPolicy,
            (true, "RbacConfig") => RefusedKind::Switch { is_cluster: false },
            (true, "ClusterRbacConfig") => RefusedKind::Switch { is_cluster: true },
            (true, "RequestAuthentication") => RefusedKind::RequestAuthentication(selector_reach(object)),
            (true, "PeerAuthentication") => RefusedKind::PeerAuthentication(selector_reach(object)),
            (true, _) => {
                let (reach, only_grants) = authorization_reach(object);
                RefusedKind::AuthorizationPolicy { reach, only_grants }
            }
        };
        Self { label: label(object), created: object.created.clone(), invalid, kind }
    }
}

fn label(object: &Object) -> Arc<str> {
    format!("{}/{}", object.kind, object.name).into()
}

fn known_kind(object: &Object) -> bool {
    let versions: &[&str] = match object.kind.as_str() {
        "Policy" | "MeshPolicy" => &["authentication.istio.io/v1alpha1"],
        "RbacConfig" | "ClusterRbacConfig" | "ServiceRole" | "ServiceRoleBinding" => {
            &["rbac.istio.io/v1alpha1"]
        }
        "PeerAuthentication" | "AuthorizationPolicy" | "RequestAuthentication" => {
            &["security.istio.io/v1", "security.istio.io/v1beta1"]
        }
        "DestinationRule" => {
            &["networking.istio.io/v1", "networking.istio.io/v1beta1", "networking.istio.io/v1alpha3"]
        }
        _ => &[],
    };
    versions.contains(&object.api_version.as_str())
}

fn read(object: &Object, warnings: &mut Warnings) -> Result<Body, Fault> {
    if !known_kind(object) {
        return Err(Fault::new(
            "apiVersion",
            &Value::from(format!("{} {}", object.api_version, object.kind)),
            "a kind and version of policy that this mesh reads",
            "write it as security.istio.io/v1, rbac.istio.io/v1alpha1 or authentication.istio.io/v1alpha1 define it",
        ));
    }
    if let Some((key, value)) = object.extra.iter().next() {
        // A misspelled spec would be an empty one.
        return Err(Fault::new(
            key,
            value,
            "only apiVersion, kind, metadata, spec and status",
            "correct the spelling of the field or remove it",
        ));
    }
    match object.kind.as_str() {
        "Policy" => authn_v1alpha1::policy(object, warnings).map(Body::Policy),
        "MeshPolicy" => authn_v1alpha1::mesh_policy(object, warnings).map(Body::MeshPolicy),
        "RbacConfig" => rbac_v1alpha1::switch(object, warnings).map(Body::RbacConfig),
        "ClusterRbacConfig" => rbac_v1alpha1::switch(object, warnings).map(Body::ClusterRbacConfig),
        "ServiceRole" => rbac_v1alpha1::role(object, warnings).map(Body::ServiceRole),
        "ServiceRoleBinding" => rbac_v1alpha1::binding(object, warnings).map(Body::ServiceRoleBinding),
        "PeerAuthentication" => {
            security_v1::peer_authentication(object, warnings).map(Body::PeerAuthentication)
        }
        "AuthorizationPolicy" => {
            security_v1::authorization_policy(object, warnings).map(Body::AuthorizationPolicy)
        }
        "RequestAuthentication" => request_authentication(object, warnings).map(Body::RequestAuthentication),
        _ => destination_rule(object, warnings).map(Body::DestinationRule),
    }
}

/// The targets of a `Policy` that was refused for something else.
fn targets_reach(object: &Object) -> Reach {
    let targets = Fields::spec(object)
        .and_then(|mut fields| authn_v1alpha1::targets(&mut fields, &mut Warnings::default()));
    match targets {
        Ok(targets) if targets.is_empty() && !has_unknown_key(object) => Reach::Scope,
        Ok(targets) if !targets.is_empty() && &*object.name.name != DEFAULT_NAME => Reach::Targets(targets),
        Ok(_) | Err(_) => Reach::Unreadable,
    }
}

fn selector_reach(object: &Object) -> Reach {
    let selector = Fields::spec(object)
        .and_then(|mut fields| security_v1::selector(&mut fields, &mut Warnings::default()));
    match selector {
        Ok(selector) if selector.is_empty() && !has_unknown_key(object) => Reach::Scope,
        Ok(selector) if !selector.is_empty() => Reach::Selected(selector),
        Ok(_) | Err(_) => Reach::Unreadable,
    }
}

/// Whether a key is not among those of its kind: it may be the misspelled one that says what is targeted, or that the
/// object denies.
fn has_unknown_key(object: &Object) -> bool {
    const KEYS: [&str; 18] = [
        "action",
        "jwtRules",
        "jwt_rules",
        "mtls",
        "originIsOptional",
        "origin_is_optional",
        "origins",
        "peerIsOptional",
        "peer_is_optional",
        "peers",
        "portLevelMtls",
        "port_level_mtls",
        "principalBinding",
        "principal_binding",
        "provider",
        "rules",
        "selector",
        "targets",
    ];
    let is_unknown = |key: &String| !KEYS.contains(&key.as_str());
    !object.extra.is_empty() || object.spec.as_object().is_some_and(|map| map.keys().any(is_unknown))
}

/// What a refused `AuthorizationPolicy` targets, and whether it could only have granted.
fn authorization_reach(object: &Object) -> (Reach, bool) {
    let action = Fields::spec(object).and_then(|mut fields| security_v1::action(&mut fields));
    if security_v1::is_dry_run(object, &mut Warnings::default()) || action == Ok(Action::Audit) {
        return (Reach::Nobody, false);
    }
    if targets_only_gateways(object) {
        return (Reach::Nobody, false);
    }
    let is_said = object.spec.get("action").is_some();
    let only_grants = action == Ok(Action::Allow) && (is_said || !has_unknown_key(object));
    (selector_reach(object), only_grants)
}

fn targets_only_gateways(object: &Object) -> bool {
    let spec = &object.spec;
    let listed = spec["targetRefs"].as_array().cloned().unwrap_or_default();
    let single = Some(spec["targetRef"].clone()).filter(|reference| !reference.is_null());
    let references: Vec<Value> = listed.into_iter().chain(single).collect();
    let is_gateway =
        |reference: &Value| matches!(reference["kind"].as_str(), Some("Gateway" | "GatewayClass"));
    !references.is_empty() && references.iter().all(is_gateway)
}
