//! Kubernetes' Service, as far as it says where TCP connections go. Keys that do not matter here are not looked at.

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    InvalidObject, Object,
    field::{Field, Fields},
    port::{port_name, protocol},
};
use crate::workload::{Service, ServicePort, TargetPort};

/// Reads a Service. UDP and SCTP ports are left out: they are no business of the mesh.
pub(crate) fn service(object: &Object) -> Result<Service, InvalidObject> {
    let spec = Field::spec(object).map()?;
    let mut ports: Vec<ServicePort> = Vec::new();
    for field in spec.items("ports")? {
        let Some(port) = service_port(&field)? else { continue };
        if ports.iter().any(|other| other.port == port.port) {
            return Err(field.refuse("each TCP port once", "remove the second entry"));
        }
        if port.name.is_some() && ports.iter().any(|other| other.name == port.name) {
            return Err(field.refuse("each port name once", "rename one of the two ports"));
        }
        ports.push(port);
    }
    Ok(Service {
        name: object.name.clone(),
        annotations: object.annotations.clone(),
        addresses: addresses(&spec)?,
        selector: spec.at("selector").map_or_else(|| Ok(Default::default()), Field::texts)?,
        ports,
    })
}

/// `clusterIPs` beside `clusterIP`, each once; `None` and the empty string mean a headless service.
fn addresses(spec: &Fields<'_>) -> Result<Vec<IpAddr>, InvalidObject> {
    let mut fields: Vec<Field<'_>> = spec.at("clusterIP").into_iter().collect();
    fields.extend(spec.items("clusterIPs")?);
    let mut seen = BTreeSet::new();
    let mut addresses = Vec::new();
    for field in fields {
        if field.is_headless() {
            continue;
        }
        let address = field.address()?;
        if seen.insert(address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

fn service_port(field: &Field<'_>) -> Result<Option<ServicePort>, InvalidObject> {
    let entry = field.clone().map()?;
    match entry.at("protocol").map(|field| field.text().map(|text| (text, field.clone()))).transpose()? {
        None | Some(("TCP", _)) => {}
        Some(("UDP" | "SCTP", _)) => return Ok(None),
        Some((_, field)) => return Err(field.refuse("TCP, UDP or SCTP", "write one of the three")),
    }
    let name = entry.at("name").map(|field| port_name(&field)).transpose()?;
    let port = entry.required("port", "add the port that applications dial")?.port()?;
    let app_protocol = entry.at("appProtocol").map(|field| field.text().map(str::to_owned)).transpose()?;
    let target = match entry.at("targetPort") {
        None => TargetPort::Number(port),
        Some(field) if field.is_number() => TargetPort::Number(field.port()?),
        Some(field) => TargetPort::Name(port_name(&field)?),
    };
    let protocol = protocol(app_protocol.as_deref(), name.as_deref());
    Ok(Some(ServicePort { name, port, target, protocol }))
}
