//! The `Workload` document: a pod, or a service on a host.

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf, sync::Arc};

use serde_json::Value;
use spiffe_id::{SpiffeId, TrustDomain};

use super::{
    Enrolment, InvalidObject, Object, enrolment,
    field::{Field, Fields, refuse_unknown_head},
    port::{port_name, protocol},
    same_node::{same_node, same_node_label},
};
use crate::{
    tunnel::TUNNEL_PORT,
    workload::{Placement, SameNode, Workload, WorkloadPort},
};

/// The service account of a workload that names none (policy D-1).
const DEFAULT_SERVICE_ACCOUNT: &str = "default";

/// Longest name of a node, in bytes: it stands in a certificate of the node.
pub(super) const NODE_BYTES_MAX: usize = 253;

/// A workload, of which some things may still depend on its namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeclaredWorkload {
    /// As it is when it is enrolled.
    pub(crate) workload: Arc<Workload>,
    pub(crate) enrolment: Enrolment,
    /// `None`: the namespace or the mesh decides.
    pub(crate) same_node: Option<SameNode>,
}

/// Reads a Workload.
pub(crate) fn workload(
    object: &Object,
    trust_domain: &TrustDomain,
) -> Result<DeclaredWorkload, InvalidObject> {
    refuse_unknown_head(object)?;
    let spec = Field::spec(object).map()?.only(&[
        "serviceAccount",
        "node",
        "addresses",
        "networkNamespace",
        "cgroup",
        "systemdUnit",
        "ports",
        "exemptInboundPorts",
        "sameNode",
    ])?;
    let service_account = match spec.at("serviceAccount") {
        Some(field) => field.text()?.to_owned(),
        None => DEFAULT_SERVICE_ACCOUNT.to_owned(),
    };
    let same_node = match spec.at("sameNode") {
        Some(field) => Some(same_node(&field)?),
        None => same_node_label(object)?,
    };
    let workload = Workload {
        name: object.name.clone(),
        labels: object.labels.clone(),
        annotations: object.annotations.clone(),
        identity: identity(object, trust_domain, &service_account)?,
        service_account,
        node: node(&spec)?,
        addresses: addresses(&spec)?,
        placement: placement(object, &spec)?,
        ports: ports(&spec)?,
        exempt_inbound_ports: exempt_inbound_ports(&spec)?,
        enrolled: true,
    };
    Ok(DeclaredWorkload { workload: Arc::new(workload), enrolment: enrolment(object)?, same_node })
}

fn identity(
    object: &Object,
    trust_domain: &TrustDomain,
    service_account: &str,
) -> Result<SpiffeId, InvalidObject> {
    SpiffeId::new(trust_domain.clone(), &object.name.namespace, service_account).map_err(|error| {
        object.invalid(
            "spec.serviceAccount",
            &Value::from(service_account),
            "the name of a service account",
            &format!("{error}; correct it"),
        )
    })
}

fn node(spec: &Fields<'_>) -> Result<String, InvalidObject> {
    let field = spec.required("node", "add the name of the node on which it runs")?;
    let text = field.text()?;
    let fits = text.len() <= NODE_BYTES_MAX
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
        && !matches!(text, "." | "..");
    if !fits {
        return Err(field.refuse(
            "the name of a node: letters, digits, '-', '.' and '_'",
            "write the name that stands in that node's configuration",
        ));
    }
    Ok(text.to_owned())
}

fn addresses(spec: &Fields<'_>) -> Result<Vec<IpAddr>, InvalidObject> {
    let list = spec.required("addresses", "add the workload's addresses")?;
    let mut seen = BTreeSet::new();
    let mut addresses = Vec::new();
    for field in list.clone().items()? {
        let address = field.address()?;
        if !seen.insert(address) {
            return Err(field.refuse("each address once", "remove the second entry"));
        }
        addresses.push(address);
    }
    if addresses.is_empty() {
        return Err(list.refuse("at least one address", "add the workload's addresses"));
    }
    Ok(addresses)
}

fn placement(object: &Object, spec: &Fields<'_>) -> Result<Placement, InvalidObject> {
    let given: Vec<(&str, Field<'_>)> = ["networkNamespace", "cgroup", "systemdUnit"]
        .into_iter()
        .filter_map(|key| spec.at(key).map(|field| (key, field)))
        .collect();
    let [(key, field)] = given.as_slice() else {
        let found = given.iter().map(|(key, _)| *key).collect::<Vec<_>>().join(" and ");
        let found = if found.is_empty() { Value::Null } else { Value::from(found) };
        return Err(object.invalid(
            "spec",
            &found,
            "exactly one of networkNamespace, cgroup and systemdUnit",
            "say in one way where the workload is found on its node",
        ));
    };
    let text = field.text()?;
    match *key {
        "networkNamespace" if !text.starts_with('/') => Err(field.refuse(
            "the absolute path of a network namespace",
            "write a path such as /run/netns/photo-backend-0",
        )),
        "networkNamespace" => Ok(Placement::NetworkNamespace(PathBuf::from(text))),
        "cgroup" if text.split('/').any(|part| part == "..") => {
            Err(field.refuse("a path without ..", "write the folder's own path"))
        }
        "cgroup" => Ok(Placement::Cgroup(PathBuf::from(text))),
        _ if text.contains('/') || !text.contains('.') => {
            Err(field.refuse("the name of a systemd unit", "write a name such as photo.service"))
        }
        _ => Ok(Placement::SystemdUnit(text.to_owned())),
    }
}

fn ports(spec: &Fields<'_>) -> Result<Vec<WorkloadPort>, InvalidObject> {
    let mut ports: Vec<WorkloadPort> = Vec::new();
    for field in spec.items("ports")? {
        let entry = field.clone().map()?.only(&["name", "port", "protocol", "appProtocol"])?;
        if let Some(transport) = entry.at("protocol")
            && transport.text()? != "TCP"
        {
            return Err(transport.refuse("TCP", "leave ports of other protocols out"));
        }
        let name = entry.at("name").map(|field| port_name(&field)).transpose()?;
        let port = entry.required("port", "add the port on which the workload listens")?.port()?;
        let app_protocol =
            entry.at("appProtocol").map(|field| field.text().map(str::to_owned)).transpose()?;
        if ports.iter().any(|other| other.port == port) {
            return Err(field.refuse("each port once", "remove the second entry"));
        }
        if name.is_some() && ports.iter().any(|other| other.name == name) {
            return Err(field.refuse("each port name once", "rename one of the two ports"));
        }
        let protocol = protocol(app_protocol.as_deref(), name.as_deref());
        ports.push(WorkloadPort { name, port, protocol });
    }
    Ok(ports)
}

fn exempt_inbound_ports(spec: &Fields<'_>) -> Result<Vec<u16>, InvalidObject> {
    let mut exempt = BTreeSet::new();
    for field in spec.items("exemptInboundPorts")? {
        let port = field.port()?;
        if port == TUNNEL_PORT {
            return Err(
                field.refuse("a port of the application", "the tunnel's port cannot be exempt: remove it")
            );
        }
        exempt.insert(port);
    }
    Ok(exempt.into_iter().collect())
}
