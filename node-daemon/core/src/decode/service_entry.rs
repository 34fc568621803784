//! Istio's ServiceEntry, as far as it tells of hosts by address: connections are known by nothing else.

use std::{collections::BTreeMap, net::IpAddr};

use super::{
    InvalidObject, Object,
    field::{Field, Fields, refuse_unknown_head},
    port::{port_name, protocol},
};
use crate::workload::{External, ExternalEndpoint, ExternalPort};

/// Longest host, in bytes (RFC 1035, 2.3.4).
const HOST_BYTES_MAX: usize = 253;

/// Reads a ServiceEntry. What cannot be followed by address alone is refused, so that nobody relies on it.
pub(crate) fn service_entry(object: &Object) -> Result<External, InvalidObject> {
    refuse_unknown_head(object)?;
    let spec = Field::spec(object).map()?.only(&[
        "hosts",
        "addresses",
        "ports",
        "location",
        "resolution",
        "endpoints",
        "subjectAltNames",
    ])?;
    let is_static = is_static(&spec)?;
    let addresses =
        spec.items("addresses")?.iter().map(Field::address).collect::<Result<Vec<IpAddr>, _>>()?;
    let ports = ports(&spec)?;
    let endpoints = spec.items("endpoints")?.into_iter().map(endpoint).collect::<Result<Vec<_>, _>>()?;
    match (is_static, spec.at("endpoints")) {
        (true, None) => {
            let remedy = "list the addresses of its servers, or write resolution: NONE";
            return Err(spec.required("endpoints", remedy).err().unwrap_or_else(|| {
                Field::spec(object).refuse("endpoints, because the resolution is STATIC", remedy)
            }));
        }
        (false, Some(field)) => {
            return Err(
                field.refuse("no endpoints, because the resolution is NONE", "write resolution: STATIC")
            );
        }
        (true, Some(_)) | (false, None) => {}
    }
    if addresses.is_empty() && endpoints.is_empty() {
        let remedy = "list the addresses that applications dial: names are not resolved here";
        return Err(Field::spec(object).refuse("addresses, or endpoints with resolution: STATIC", remedy));
    }
    let names = spec.items("subjectAltNames")?;
    Ok(External {
        name: object.name.clone(),
        host: host(&spec)?.into(),
        addresses,
        ports,
        endpoints,
        subject_alt_names: names
            .iter()
            .map(|name| name.text().map(str::to_owned))
            .collect::<Result<_, _>>()?,
        is_internal: is_internal(&spec)?,
    })
}

fn host(spec: &Fields<'_>) -> Result<String, InvalidObject> {
    let list = spec.required("hosts", "name the host that the addresses belong to")?;
    let hosts = list.clone().items()?;
    let [field] = &hosts[..] else {
        let remedy =
            "write a ServiceEntry for each: an address does not tell which of several hosts was meant";
        return Err(list.refuse("exactly one host", remedy));
    };
    let text = field.text()?;
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if text.len() > HOST_BYTES_MAX || !text.bytes().all(is_name) {
        return Err(
            field.refuse("a complete host name without wildcards", "write a name such as api.example.com")
        );
    }
    Ok(text.to_ascii_lowercase())
}

fn is_static(spec: &Fields<'_>) -> Result<bool, InvalidObject> {
    let Some(field) = spec.at("resolution") else { return Ok(false) };
    match field.text()? {
        "NONE" => Ok(false),
        "STATIC" => Ok(true),
        _ => {
            let remedy = "write STATIC with endpoints, or NONE: names are not resolved here";
            Err(field.refuse("NONE or STATIC", remedy))
        }
    }
}

fn is_internal(spec: &Fields<'_>) -> Result<bool, InvalidObject> {
    let Some(field) = spec.at("location") else { return Ok(false) };
    match field.text()? {
        "MESH_EXTERNAL" => Ok(false),
        "MESH_INTERNAL" => Ok(true),
        _ => Err(field.refuse("MESH_EXTERNAL or MESH_INTERNAL", "write one of the two")),
    }
}

fn ports(spec: &Fields<'_>) -> Result<Vec<ExternalPort>, InvalidObject> {
    let mut ports: Vec<ExternalPort> = Vec::new();
    for field in spec.required("ports", "list the ports that applications dial")?.items()? {
        let entry = field.clone().map()?.only(&["number", "name", "protocol", "targetPort"])?;
        let number = entry.required("number", "add the port that applications dial")?.port()?;
        let name = entry.at("name").map(|field| port_name(&field)).transpose()?;
        let word = entry.at("protocol").map(|field| field.text().map(str::to_owned)).transpose()?;
        let target = entry.at("targetPort").map(|field| field.port()).transpose()?.unwrap_or(number);
        let protocol = protocol(word.as_deref(), name.as_deref());
        if ports.iter().any(|other| other.number == number) {
            return Err(field.refuse("each port once", "remove the second entry"));
        }
        ports.push(ExternalPort { number, name, target, protocol });
    }
    Ok(ports)
}

fn endpoint(field: Field<'_>) -> Result<ExternalEndpoint, InvalidObject> {
    let entry = field.map()?.only(&["address", "ports", "labels"])?;
    let address = entry.required("address", "add the server's address")?.address()?;
    let mut ports = BTreeMap::new();
    if let Some(field) = entry.at("ports") {
        for (name, port) in field.entries()? {
            ports.insert(name, port.port()?);
        }
    }
    let labels = entry.at("labels").map_or_else(|| Ok(BTreeMap::new()), Field::texts)?;
    Ok(ExternalEndpoint { address, ports, labels })
}
