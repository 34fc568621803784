//! The `Mesh` document.

use ipnet::IpNet;
use spiffe_id::{SpiffeId, TrustDomain};

use super::{
    InvalidObject, Object,
    field::{Field, refuse_unknown_head},
    is_label,
    same_node::same_node,
};
use crate::workload::{Mesh, SameNode, TransportMode};

/// The only name of a Mesh document.
const MESH_NAME: &str = "default";

/// Where mesh-wide policies of the modern API stand, unless the Mesh says otherwise.
const ROOT_NAMESPACE: &str = "istio-system";

impl Mesh {
    /// What holds where there is no Mesh document.
    pub fn defaults(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            trust_domain_aliases: Vec::new(),
            root_namespace: ROOT_NAMESPACE.to_owned(),
            default_mode: TransportMode::Permissive,
            same_node: SameNode::Direct,
            needs_token_expiry: false,
            barred_identities: Vec::new(),
            pod_ranges: Vec::new(),
        }
    }
}

/// Reads a Mesh. A trust domain other than `configured` is refused: certificates name the configured one.
pub(crate) fn mesh(object: &Object, configured: &TrustDomain) -> Result<Mesh, InvalidObject> {
    refuse_unknown_head(object)?;
    if &*object.name.name != MESH_NAME {
        return Err(object.invalid(
            "metadata.name",
            &(&*object.name.name).into(),
            "the name default",
            "there is one Mesh: rename this one or remove it",
        ));
    }
    let spec = Field::spec(object).map()?.only(&[
        "trustDomain",
        "trustDomainAliases",
        "rootNamespace",
        "defaultMode",
        "sameNode",
        "requireTokenExpiry",
        "barredIdentities",
        "podRanges",
    ])?;
    let mut mesh = Mesh::defaults(configured.clone());
    if let Some(field) = spec.at("trustDomain")
        && trust_domain(&field)? != *configured
    {
        return Err(field.refuse(
            &format!("{configured}, the trust domain of this node's configuration"),
            "name the former trust domain under trustDomainAliases, and change ca.trustDomain on every node",
        ));
    }
    mesh.trust_domain_aliases =
        spec.items("trustDomainAliases")?.iter().map(trust_domain).collect::<Result<_, _>>()?;
    if let Some(field) = spec.at("rootNamespace") {
        let text = field.text()?;
        if !is_label(text) {
            return Err(field.refuse("the name of a namespace", "write a name such as istio-system"));
        }
        text.clone_into(&mut mesh.root_namespace);
    }
    if let Some(field) = spec.at("defaultMode") {
        mesh.default_mode = match field.text()? {
            "STRICT" => TransportMode::Strict,
            "PERMISSIVE" => TransportMode::Permissive,
            "DISABLE" => TransportMode::Disabled,
            _ => return Err(field.refuse("STRICT, PERMISSIVE or DISABLE", "write one of the three")),
        };
    }
    if let Some(field) = spec.at("requireTokenExpiry") {
        mesh.needs_token_expiry = field.flag()?;
    }
    if let Some(field) = spec.at("sameNode") {
        mesh.same_node = same_node(&field)?;
    }
    mesh.barred_identities =
        spec.items("barredIdentities")?.iter().map(identity).collect::<Result<_, _>>()?;
    mesh.pod_ranges = spec.items("podRanges")?.iter().map(range).collect::<Result<_, _>>()?;
    Ok(mesh)
}

fn identity(field: &Field<'_>) -> Result<SpiffeId, InvalidObject> {
    field.text()?.parse().map_err(|error| {
        field.refuse(
            "the identity of a workload, such as spiffe://cluster.local/ns/photo/sa/photo-backend",
            &format!("{error}; correct it"),
        )
    })
}

fn trust_domain(field: &Field<'_>) -> Result<TrustDomain, InvalidObject> {
    field.text()?.parse().map_err(|error| {
        field.refuse("a trust domain, such as cluster.local", &format!("{error}; correct it"))
    })
}

fn range(field: &Field<'_>) -> Result<IpNet, InvalidObject> {
    let range: IpNet = field
        .text()?
        .parse()
        .map_err(|_| field.refuse("a range of addresses", "write address and length, such as 10.8.0.0/16"))?;
    if range.addr() != range.network() {
        return Err(field.refuse(
            &format!("the first address of a range, such as {}", range.trunc()),
            "write that, or correct the length",
        ));
    }
    Ok(range)
}
