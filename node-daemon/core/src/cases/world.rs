//! The destination that a case names, as an inventory of one workload and one service, compiled with the case's policies.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    sync::Arc,
};

use serde_json::Value;
use spiffe_id::SpiffeId;

use super::{
    check::{Check, Found},
    fields::{Fields, InvalidCases},
};
use crate::{
    policy::{Compiled, Inventory, compile},
    workload::{
        ObjectName, Placement, Protocol, Service, ServicePort, TargetPort, TransportMode, Workload,
        WorkloadPort,
    },
};

/// The node on which everything of a case runs.
const NODE: &str = "case";

/// The port of a case that names none: no policy can mean it.
const NO_PORT: u16 = 0;

/// Where nobody says what is there.
const ANY_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

pub(super) struct World {
    pub(super) compiled: Compiled,
    pub(super) workload: Arc<Workload>,
    /// The complete name of the service.
    pub(super) host: Option<String>,
    /// Of the workload.
    pub(super) port: u16,
    pub(super) service_port: u16,
    pub(super) protocol: Protocol,
    pub(super) source_address: IpAddr,
    pub(super) destination_address: IpAddr,
}

impl World {
    pub(super) fn new(check: &Check<'_>) -> Result<Self, InvalidCases> {
        let request = &check.case.request;
        let protocol = protocol(request)?;
        let (port, service_port) =
            (request.port("destination.port")?, request.port("destination.service_port")?);
        let target = port.or(service_port).unwrap_or(NO_PORT);
        let port_name = request.text("destination.service_port_name")?;
        let number = match (service_port, &port_name) {
            (Some(number), _) => number,
            (None, Some(_)) => NO_PORT,
            (None, None) => target,
        };
        let host = request.text("destination.service")?;
        let workload = workload(check, host.as_deref(), target, protocol)?;
        let service = host.as_deref().map(|host| Service {
            name: ObjectName { namespace: workload.name.namespace.clone(), name: short(host).into() },
            annotations: BTreeMap::new(),
            addresses: Vec::new(),
            selector: workload
                .labels
                .get("app")
                .map(|app| ("app".to_owned(), app.clone()))
                .into_iter()
                .collect(),
            ports: vec![ServicePort {
                name: port_name,
                port: number,
                target: TargetPort::Number(target),
                protocol,
            }],
        });
        let workload = Arc::new(workload);
        let workloads = BTreeMap::from([(workload.name.clone(), Arc::clone(&workload))]);
        let services: BTreeMap<_, _> =
            service.into_iter().map(|service| (service.name.clone(), service)).collect();
        let inventory =
            Inventory { mesh: &check.file.mesh, workloads: &workloads, services: &services, node: NODE };
        let expected = "an IP address";
        Ok(Self {
            compiled: compile(&check.policies.objects, &inventory),
            source_address: request.parsed("source.ip", expected)?.unwrap_or(ANY_ADDRESS),
            destination_address: request.parsed("destination.ip", expected)?.unwrap_or(ANY_ADDRESS),
            workload,
            host,
            port: target,
            service_port: number,
            protocol,
        })
    }
}

/// What is spoken at the destination's port.
pub(super) fn protocol(request: &Fields) -> Result<Protocol, InvalidCases> {
    request.one_of(
        "protocol",
        &[
            ("http", Protocol::Http),
            ("http2", Protocol::Http),
            ("grpc", Protocol::Grpc),
            ("tcp", Protocol::Tcp),
        ],
    )
}

/// The first part of a service's name.
fn short(host: &str) -> &str {
    host.split('.').next().unwrap_or(host)
}

/// Defaults of the format: the service account is called like the workload, the label `app` too.
fn workload(
    check: &Check<'_>,
    host: Option<&str>,
    port: u16,
    protocol: Protocol,
) -> Result<Workload, InvalidCases> {
    let request = &check.case.request;
    let name = host.map_or("workload", short);
    let namespace = match request.text("destination.namespace")? {
        Some(namespace) => namespace,
        None => host.and_then(|host| host.split('.').nth(1)).unwrap_or("default").to_owned(),
    };
    let account = request.text("destination.user")?.unwrap_or_else(|| name.to_owned());
    let identity =
        SpiffeId::new(check.file.mesh.trust_domain.clone(), &namespace, &account).map_err(|error| {
            let named =
                if request.has("destination.user") { "destination.user" } else { "destination.service" };
            request.invalid(
                named,
                format!("a service in a namespace and an account that an identity can name ({error})"),
            )
        })?;
    let mut labels = BTreeMap::from([("app".to_owned(), name.to_owned())]);
    labels.extend(texts_of(&request.map("destination.labels")?)?);
    Ok(Workload {
        name: ObjectName::new(&namespace, name),
        labels,
        annotations: BTreeMap::new(),
        service_account: account,
        identity,
        node: NODE.to_owned(),
        addresses: vec![request.parsed("destination.ip", "an IP address")?.unwrap_or(ANY_ADDRESS)],
        placement: Placement::NetworkNamespace(PathBuf::new()),
        ports: vec![WorkloadPort { name: None, port, protocol }],
        exempt_inbound_ports: Vec::new(),
        enrolled: true,
    })
}

/// A mapping of texts.
pub(super) fn texts_of(fields: &Fields) -> Result<BTreeMap<String, String>, InvalidCases> {
    let mut texts = BTreeMap::new();
    for (key, _) in fields.entries() {
        if let Some(text) = fields.text(key)? {
            texts.insert(key.clone(), text);
        }
    }
    Ok(texts)
}

/// Which policy decides about authentication (policy A-4).
pub(super) fn select(check: &Check<'_>) -> Result<Found, InvalidCases> {
    let world = World::new(check)?;
    let (policy, mode) =
        world.compiled.selected(&world.workload, world.port).unwrap_or((None, TransportMode::Strict));
    let mut found = Found { policy: policy.map(|label| label.to_string()), ..Found::default() };
    let parts: Vec<&str> = policy.map(|label| label.split('/').collect()).unwrap_or_default();
    let (name, namespace) = match parts[..] {
        [_, name] => (Value::from(name), Value::from("")),
        [_, namespace, name] => (Value::from(name), Value::from(namespace)),
        _ => (Value::Null, Value::Null),
    };
    if namespace == *check.file.mesh.root_namespace {
        found.also = Some(("policy_namespace", "")); // the mesh-wide one, which lives in the root namespace (policy F-1)
    }
    found.set("policy", name);
    found.set("policy_namespace", namespace);
    found.set(
        "mtls",
        match mode {
            TransportMode::Strict => "STRICT",
            TransportMode::Permissive => "PERMISSIVE",
            TransportMode::Disabled => "NONE",
        },
    );
    Ok(found)
}
