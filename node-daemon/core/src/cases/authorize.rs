//! `authorize`: what the rules say of attributes, after authentication (policy B, F-3).

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{
    check::{Check, Found},
    fields::{Fields, InvalidCases},
    world::World,
};
use crate::{
    policy::{
        DenialReason, Headers, Metadata, RequestDenial, header, reason,
        trial::{Given, GivenRequest, Refusal},
    },
    workload::Protocol,
};

/// Owned lines of a case's headers.
pub(super) struct HeaderLines(pub(super) Vec<(String, String)>);

impl Headers for HeaderLines {
    fn each(&self, name: &str, visit: &mut dyn FnMut(&[u8])) {
        let lines = self.0.iter().filter(|(written, _)| written.eq_ignore_ascii_case(name));
        lines.for_each(|(_, value)| visit(value.as_bytes()));
    }
}

impl HeaderLines {
    /// `request.headers`: a text, or a list of texts for several lines. gRPC is told by its content type.
    pub(super) fn read(request: &Fields, protocol: Protocol) -> Result<Self, InvalidCases> {
        let map = request.map("request.headers")?;
        let mut lines = Vec::new();
        for (name, value) in map.entries() {
            let values =
                if value.is_array() { map.texts(name)? } else { map.text(name)?.into_iter().collect() };
            lines.extend(values.into_iter().map(|value| (name.clone(), value)));
        }
        let mut lines = Self(lines);
        if protocol == Protocol::Grpc && header(&lines, "content-type").is_none() {
            lines.0.push(("content-type".to_owned(), "application/grpc".to_owned()));
        }
        Ok(lines)
    }
}

pub(super) fn authorize(check: &Check<'_>) -> Result<Found, InvalidCases> {
    let world = World::new(check)?;
    let request = &check.case.request;
    let text = |key: &str| request.text(key);
    let (principal, namespace) = (text("source.principal")?, text("source.namespace")?);
    let (server_name, metadata) = (text("connection.sni")?, metadata(&request.map("metadata")?)?);
    let (method, path, host) = (text("request.method")?, text("request.path")?, text("request.host")?);
    let headers = HeaderLines::read(request, world.protocol)?;
    let (auth_principal, presenter) = (text("request.auth.principal")?, text("request.auth.presenter")?);
    let audiences = request.texts("request.auth.audiences")?;
    let claims = claims(&request.map("request.auth.claims")?)?;
    let asked = GivenRequest {
        method: method.as_deref(),
        path: path.as_deref(),
        host: host.as_deref(),
        headers: &headers,
        principal: auth_principal.as_deref(),
        audience: audiences.first().map(String::as_str),
        presenter: presenter.as_deref(),
        claims: &claims,
    };
    let given = Given {
        principal: principal.as_deref(),
        namespace: namespace.as_deref(),
        source_address: world.source_address,
        destination_address: world.destination_address,
        destination_port: world.port,
        server_name: server_name.as_deref(),
        metadata: request.has("metadata").then_some(&metadata),
        request: (world.protocol != Protocol::Tcp).then_some(asked),
    };
    let judged = world.compiled.judge_given(&world.workload, &given);
    let mut found = Found::default();
    let refusal = match &judged.answer {
        Ok(upstream_path) => {
            allowed(&mut found, world.protocol, upstream_path.as_deref());
            None
        }
        Err(Refusal::Connection(reason)) => {
            closed(&mut found, "DENY");
            Some(reason.label())
        }
        Err(Refusal::Request(denial)) => {
            refused(&mut found, "DENY", denial);
            Some(denial.reason.label())
        }
    };
    let reason = match refusal {
        Some(label) if label == DenialReason::BadPath.label() => label.to_owned(),
        refusal => reason(refusal, &judged.considered),
    };
    found.decided(&judged.verdict, Some(reason));
    Ok(found)
}

/// A request or a connection that reaches the workload.
pub(super) fn allowed(found: &mut Found, protocol: Protocol, upstream_path: Option<&str>) {
    found.set("verdict", "ALLOW");
    if protocol != Protocol::Tcp {
        found.set("http_status", 200);
        found.set("upstream_path", upstream_path);
    }
}

/// A connection that ends without a byte.
pub(super) fn closed(found: &mut Found, verdict: &str) {
    found.set("verdict", verdict);
    found.set("tcp", "closed-without-data");
}

/// A request that is answered in the workload's place.
pub(super) fn refused(found: &mut Found, verdict: &str, denial: &RequestDenial) {
    let answer = denial.answer();
    found.set("verdict", verdict);
    found.set("http_status", answer.status);
    match answer.grpc {
        Some((status, message)) => {
            found.set("grpc_status", status);
            found.set("grpc_message", message);
        }
        None => found.set("body", answer.body),
    }
}

/// Filter, key, value.
fn metadata(fields: &Fields) -> Result<Metadata, InvalidCases> {
    let mut metadata = Metadata::new();
    for (filter, _) in fields.entries() {
        let values: BTreeMap<String, Value> =
            fields.map(filter)?.entries().map(|(key, value)| (key.clone(), value.clone())).collect();
        metadata.insert(filter.clone(), values);
    }
    Ok(metadata)
}

/// Lists of texts; a text alone is a list of one, whatever its name. Null where there are none.
fn claims(fields: &Fields) -> Result<Value, InvalidCases> {
    let mut claims = Map::new();
    for (name, value) in fields.entries() {
        match value {
            Value::Null => {}
            Value::Object(_) => {
                claims.insert(name.clone(), value.clone());
            }
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                claims.insert(name.clone(), Value::from(fields.texts(name)?));
            }
        }
    }
    Ok(if claims.is_empty() { Value::Null } else { Value::Object(claims) })
}
