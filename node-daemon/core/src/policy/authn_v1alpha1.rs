//! Front end of `authentication.istio.io/v1alpha1`: `Policy` and `MeshPolicy` (policy ).

use serde_json::Value;

use super::{
    authentication::OriginMethod,
    origins::origin_methods,
    reader::{Fault, Fields, Item, Warnings, is_label},
};
use crate::{decode::Object, workload::TransportMode};

/// The one name under which a policy without targets counts (policy ).
pub(super) const DEFAULT_NAME: &str = "default";

/// What a usable `Policy` or `MeshPolicy` asks of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    /// Empty: the whole scope.
    pub(super) targets: Vec<Target>,
    /// No peers at all is [`TransportMode::Disabled`] (policy A-5).
    pub(super) mode: TransportMode,
    /// A peer that fails is nobody (policy A-8).
    pub(super) peer_is_optional: bool,
    pub(super) tokens: Tokens,
    pub(super) origins: Vec<OriginMethod>,
    /// `USE_ORIGIN`
    pub(super) binds_origin: bool,
}

/// One service of the policy's own namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) service: String,
    /// Empty: all its ports.
    pub(super) ports: Vec<PortSelector>,
}

/// A port of the **service**, never of the workload (policy A-1, H-1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PortSelector {
    Number(u16),
    Name(String),
}

/// What the policy asks of the requests' tokens (policy A-9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tokens {
    NotAsked,
    /// `originIsOptional`: no request fails for want of a token.
    Optional,
    /// A request without a valid token fails.
    Required,
    /// `principalBinding: USE_ORIGIN` without origins: every request fails (policy ).
    Impossible,
}

/// Reads a namespaced `Policy`.
pub(super) fn policy(object: &Object, warnings: &mut Warnings) -> Result<Policy, Fault> {
    let policy = read(object, warnings)?;
    let name = Value::from(&*object.name.name);
    match (policy.targets.is_empty(), &*object.name.name == DEFAULT_NAME) {
        (true, false) => Err(Fault::new(
            "metadata.name",
            &name,
            "the name default for a policy without targets",
            "name it default, or list its targets",
        )),
        (false, true) => Err(Fault::new(
            "spec.targets",
            &object.spec["targets"],
            "no targets in the policy named default",
            "give the policy another name, or remove its targets",
        )),
        (true, true) | (false, false) => Ok(policy),
    }
}

/// Reads the cluster-scoped `MeshPolicy`.
pub(super) fn mesh_policy(object: &Object, warnings: &mut Warnings) -> Result<Policy, Fault> {
    let policy = read(object, warnings)?;
    if &*object.name.name != DEFAULT_NAME {
        let name = Value::from(&*object.name.name);
        return Err(Fault::new(
            "metadata.name",
            &name,
            "the name default",
            "rename the MeshPolicy to default",
        ));
    }
    if !policy.targets.is_empty() {
        let targets = &object.spec["targets"];
        return Err(Fault::new(
            "spec.targets",
            targets,
            "no targets in a MeshPolicy",
            "write a Policy for single services",
        ));
    }
    Ok(policy)
}

/// The targets alone, for a policy whose other fields cannot be used.
pub(super) fn targets(fields: &mut Fields<'_>, warnings: &mut Warnings) -> Result<Vec<Target>, Fault> {
    fields.list("targets")?.iter().map(|item| target(item, warnings)).collect()
}

fn read(object: &Object, warnings: &mut Warnings) -> Result<Policy, Fault> {
    if object.spec.is_null() {
        // An empty mapping says that nothing is required (policy ); a missing one says nothing at all.
        return Err(Fault::new(
            "spec",
            &object.spec,
            "a mapping",
            "write spec: {} if nothing shall be required",
        ));
    }
    let mut fields = Fields::spec(object)?;
    let targets = targets(&mut fields, warnings)?;
    let peers = fields.list("peers")?;
    let mode = transport_mode(&peers, warnings)?;
    let peer_is_optional = fields.flag("peerIsOptional")?;
    if peer_is_optional && mode == TransportMode::Strict {
        // policy: the listener's TLS mode is decided by mtls alone.
        warnings.say(
            "spec.peerIsOptional",
            "true does not admit plaintext under mtls STRICT: write mode PERMISSIVE for that",
        );
    }
    let origins = origin_methods(&fields.list("origins")?, warnings)?;
    let origin_is_optional = fields.flag("originIsOptional")?;
    let uses_origin = fields.one_of("principalBinding", &[("USE_PEER", false), ("USE_ORIGIN", true)])?;
    fields.finish()?;
    let tokens = match (origins.is_empty(), origin_is_optional) {
        (true, false) if uses_origin && !peers.is_empty() => Tokens::Impossible,
        (true, _) => Tokens::NotAsked,
        (false, true) => Tokens::Optional,
        (false, false) => Tokens::Required,
    };
    Ok(Policy { targets, mode, peer_is_optional, tokens, origins, binds_origin: uses_origin })
}

fn target(item: &Item<'_>, warnings: &mut Warnings) -> Result<Target, Fault> {
    let mut fields = Fields::open(item)?;
    let Some(name) = fields.take("name")? else {
        return Err(fields.fault("a target with a name", "name the service"));
    };
    let service = name.text()?;
    if !is_label(service) {
        // policy
        return Err(name.fault(
            "the short name of a service in the policy's own namespace",
            "write the first part of the service's name, without dots",
        ));
    }
    let ports = fields.list("ports")?.iter().map(port_selector).collect::<Result<_, _>>()?;
    if fields.labels("labels")?.is_some() {
        warnings.say(
            &fields.path_of("labels"),
            "labels of a target were never implemented: the whole service is targeted",
        );
    }
    fields.finish()?;
    Ok(Target { service: service.to_owned(), ports })
}

fn port_selector(item: &Item<'_>) -> Result<PortSelector, Fault> {
    let mut fields = Fields::open(item)?;
    let (number, name) = (fields.take("number")?, fields.take("name")?);
    let selector = match (number, name) {
        (Some(number), None) => match number.port_number() {
            None | Some(0) => {
                Err(number.fault("a port number from 1 to 65535", "write the port of the service"))
            }
            Some(port) => Ok(PortSelector::Number(port)),
        },
        (None, Some(name)) if is_label(name.text()?) => Ok(PortSelector::Name(name.text()?.to_owned())),
        (None, Some(name)) => {
            Err(name.fault("the name of a service's port in lower case", "write the name as in the Service"))
        }
        (None, None) | (Some(_), Some(_)) => {
            Err(fields.fault("exactly one of number and name", "write number: 80, or name: http"))
        }
    }?;
    fields.finish()?;
    Ok(selector)
}

/// The first `mtls` decides (policy A-2).
fn transport_mode(peers: &[Item<'_>], warnings: &mut Warnings) -> Result<TransportMode, Fault> {
    let mut decided = None;
    for peer in peers {
        let mode = peer_method(peer, warnings)?;
        if decided.is_some() {
            warnings.say(&peer.path, "a second mtls has no effect: the first decides");
        }
        decided.get_or_insert(mode);
    }
    Ok(decided.unwrap_or(TransportMode::Disabled))
}

fn peer_method(item: &Item<'_>, warnings: &mut Warnings) -> Result<TransportMode, Fault> {
    let remedy = "write - mtls: {} for mutual TLS";
    if item.value.is_null() {
        return Err(item.fault("a peer method", remedy));
    }
    let mut fields = Fields::open(item)?;
    let (mtls, alias) = (fields.even_null("mtls")?, fields.even_null("mTLS")?);
    if let Some(jwt) = fields.even_null("jwt")? {
        // policy G-24
        return Err(jwt.fault("no jwt among peers", "move it to origins: a peer is known by its certificate"));
    }
    if let Some(alias) = &alias {
        // policy 0-3
        warnings.say(&alias.path, "mTLS is read as mtls: write it in lower case");
    }
    let chosen = match (mtls, alias) {
        (Some(mtls), None) | (None, Some(mtls)) => mtls,
        (None, None) => {
            fields.finish()?;
            return Err(item.fault("a peer method", remedy));
        }
        (Some(_), Some(_)) => return Err(item.fault("one of mtls and mTLS", "remove mTLS")),
    };
    fields.finish()?;
    mutual_tls(&chosen, warnings)
}

/// Present with null is present (policy A-2).
fn mutual_tls(item: &Item<'_>, warnings: &mut Warnings) -> Result<TransportMode, Fault> {
    if item.value.is_null() {
        return Ok(TransportMode::Strict);
    }
    let mut fields = Fields::open(item)?;
    let mode = fields
        .one_of("mode", &[("STRICT", TransportMode::Strict), ("PERMISSIVE", TransportMode::Permissive)])?;
    if fields.flag("allowTls")? {
        warnings.say(
            &fields.path_of("allowTls"),
            "true is not honoured: a client over TLS always needs a certificate",
        );
    }
    fields.finish()?;
    Ok(mode)
}
