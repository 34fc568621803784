//! `clientTls` and `secureNaming`: the client's side (policy C, D).

use std::{collections::BTreeMap, path::PathBuf};

use serde_json::Value;
use spiffe_id::SpiffeId;

use super::{
    check::{Check, Found},
    fields::{Fields, InvalidCases},
    world::texts_of,
};
use crate::{
    decode::{self, Source},
    policy::{ClientFacts, ServerMode, TlsMode, TlsSettings, may_answer, rule_of, tls_of},
    snapshot,
    workload::{Mesh, ObjectName, Placement, Service, TransportMode, Workload},
};

/// How a client's proxy begins its answer for a server that it could not reach (policy C).
pub(super) const UPSTREAM_FAILED: &str = "upstream connect error or disconnect/reset before headers";

/// Label of an endpoint that has a proxy.
const TLS_MODE_LABEL: &str = "security.istio.io/tlsMode";

pub(super) fn server_mode_of(mode: TransportMode) -> ServerMode {
    match mode {
        TransportMode::Strict => ServerMode::Strict,
        TransportMode::Permissive => ServerMode::Permissive,
        TransportMode::Disabled => ServerMode::None,
    }
}

/// What a case says of the client beside its rules.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ClientKind {
    ByRule,
    Naked,
    Disable,
    IstioMutual,
    Auto,
}

pub(super) fn client_tls(check: &Check<'_>) -> Result<Found, InvalidCases> {
    let request = &check.case.request;
    let mut found = Found::default();
    let kind = request.one_of(
        "client",
        &[
            ("rule", ClientKind::ByRule),
            ("naked", ClientKind::Naked),
            ("DISABLE", ClientKind::Disable),
            ("ISTIO_MUTUAL", ClientKind::IstioMutual),
            ("auto", ClientKind::Auto),
        ],
    )?;
    let written = match settings(check)? {
        Ok(written) => written,
        Err(reason) => {
            // A rule that cannot be used denies its destination (T-20).
            found.set("success", false);
            found.reason = Some(reason);
            return Ok(found);
        }
    };
    let rule = match kind {
        ClientKind::ByRule => written,
        ClientKind::Naked | ClientKind::Disable => Some(bare(TlsMode::Disable)),
        ClientKind::IstioMutual => Some(
            written
                .filter(|own| own.mode == TlsMode::IstioMutual)
                .unwrap_or_else(|| bare(TlsMode::IstioMutual)),
        ),
        ClientKind::Auto => None,
    };
    let server = request.one_of(
        "server_mode",
        &[
            ("UNKNOWN", ServerMode::Unknown),
            ("STRICT", ServerMode::Strict),
            ("PERMISSIVE", ServerMode::Permissive),
            ("NONE", ServerMode::None),
            ("naked", ServerMode::Naked),
        ],
    )?;
    let labels = texts_of(&request.map("endpoint_labels")?)?;
    let endpoint_enrolled = request.at("endpoint_labels").is_none()
        || labels.get(TLS_MODE_LABEL).map(String::as_str) == Some("istio");
    let identities = request.texts("service_identities")?;
    let default_sni = request.text("default_sni")?;
    let tls = crate::policy::client_tls(&ClientFacts {
        rule: rule.as_ref(),
        auto_mtls: kind == ClientKind::Auto || request.flag("auto_mtls")?.unwrap_or(false),
        mesh_external: request.flag("mesh_external")?.unwrap_or(false),
        server,
        endpoint_enrolled,
        identities: &identities,
        default_sni: default_sni.as_deref(),
    });
    found.set("mode", tls.mode.name());
    found.set("subjectAltNames", tls.subject_alt_names.clone());
    found.set("sni", tls.sni.clone());
    // An identity set that the case does not give is not empty.
    let mut tls = tls;
    if request.at("service_identities").is_none() && tls.subject_alt_names.as_ref().is_some_and(Vec::is_empty)
    {
        tls.subject_alt_names = None;
    }
    found.set("success", tls.reaches(if endpoint_enrolled { server } else { without_proxy(server) }));
    found.reason = Some(match &rule {
        Some(rule) => format!("the rule says {}", rule.mode.name()),
        None => "no rule".to_owned(),
    });
    Ok(found)
}

/// An endpoint without a proxy enforces nothing.
fn without_proxy(_: ServerMode) -> ServerMode {
    ServerMode::Naked
}

fn bare(mode: TlsMode) -> TlsSettings {
    TlsSettings {
        mode,
        client_certificate: None,
        private_key: None,
        ca_certificates: None,
        subject_alt_names: Vec::new(),
        sni: None,
    }
}

type Usable<T> = Result<T, String>;

/// `dr_tls`, or `dr` with `port` and `subset`.
fn settings(check: &Check<'_>) -> Result<Usable<Option<TlsSettings>>, InvalidCases> {
    let request = &check.case.request;
    if let Some(tls) = request.at("dr_tls") {
        let read = tls_of(tls).map_err(|(field, expected)| format!("{field}: {expected}"));
        return Ok(read.map(Some));
    }
    let Some(rule) = request.at("dr") else { return Ok(Ok(None)) };
    let (port, subset) = (request.port("port")?, request.text("subset")?);
    let document = rule_document(rule);
    let object = decode::object(document, Source::new(&check.case.path, 0));
    let object = object.map_err(|invalid| request.invalid("dr", invalid.reason()))?;
    let read = rule_of(&object).map_err(|(field, expected)| format!("{field}: {expected}"));
    Ok(read.map(|rule| rule.tls(port, subset.as_deref()).cloned()))
}

/// A whole object, its `spec`, or its `trafficPolicy`.
fn rule_document(rule: &Value) -> Value {
    if rule.get("kind").is_some() {
        return rule.clone();
    }
    let has = |key: &str| rule.get(key).is_some();
    let mut spec = if has("spec") {
        rule["spec"].clone()
    } else if has("tls") || has("portLevelSettings") {
        serde_json::json!({ "trafficPolicy": rule })
    } else {
        rule.clone()
    };
    if spec.get("host").is_none()
        && let Some(map) = spec.as_object_mut()
    {
        map.insert("host".to_owned(), "case".into());
    }
    serde_json::json!({
        "apiVersion": "networking.istio.io/v1alpha3",
        "kind": "DestinationRule",
        "metadata": {"name": "case", "namespace": "default"},
        "spec": spec,
    })
}

/// Who may answer for a service, or whether somebody may (policy D).
pub(super) fn secure_naming(check: &Check<'_>) -> Result<Found, InvalidCases> {
    let request = &check.case.request;
    let mut found = Found::default();
    let computed =
        if request.has("pods") || request.has("service") { Some(identities(check)?) } else { None };
    if let Some(set) = &computed {
        found.set("identities_unordered", set.clone());
    }
    if request.has("server_san") || request.has("allowed") {
        let allowed = match (request.has("allowed"), computed) {
            (false, Some(set)) => set,
            _ => request.texts("allowed")?,
        };
        let proven = request.texts("server_san")?;
        if may_answer(&allowed, proven.iter().map(String::as_str)) {
            found.set("verdict", "ALLOW");
        } else {
            found.set("verdict", "CONNECTION_FAILED");
            found.set("http_status_to_caller", 503);
            let named = if proven.is_empty() { "nobody".to_owned() } else { proven.join(", ") };
            found.reason = Some(format!("server_san is {named}, wanted one of {}", allowed.join(", ")));
        }
    }
    Ok(found)
}

/// The set of the snapshot, for pods and a service that the case describes.
fn identities(check: &Check<'_>) -> Result<Vec<String>, InvalidCases> {
    let request = &check.case.request;
    let mut mesh = check.file.mesh.clone();
    if let Some(domain) = request.parsed("trust_domain", "a trust domain")? {
        mesh.trust_domain = domain;
    }
    let service = request.map("service")?;
    service.only(&["name", "ns", "namespace", "endpoints", "annotations"])?;
    let namespace =
        service.text("ns")?.or(service.text("namespace")?).unwrap_or_else(|| "default".to_owned());
    let endpoints = service.texts("endpoints")?;
    let mut pods = Vec::new();
    for fields in request.list("pods")? {
        fields.only(&["ip", "ns", "namespace", "sa", "name", "labels", "annotations"])?;
        let address = fields.text("ip")?;
        if address.is_some_and(|address| endpoints.contains(&address)) {
            pods.push(pod(&fields, &namespace, &mesh)?);
        }
    }
    let service = Service {
        name: ObjectName::new(&namespace, &service.text("name")?.unwrap_or_else(|| "service".to_owned())),
        annotations: texts_of(&service.map("annotations")?)?,
        addresses: Vec::new(),
        selector: BTreeMap::new(),
        ports: Vec::new(),
    };
    let set = snapshot::identities_of(pods.iter(), &service, &mesh);
    Ok(set.iter().map(SpiffeId::to_string).collect())
}

/// A pod without an account has that of the name `default` (policy D-1).
fn pod(fields: &Fields, service_namespace: &str, mesh: &Mesh) -> Result<Workload, InvalidCases> {
    let namespace =
        fields.text("ns")?.or(fields.text("namespace")?).unwrap_or_else(|| service_namespace.to_owned());
    let account =
        fields.text("sa")?.filter(|account| !account.is_empty()).unwrap_or_else(|| "default".to_owned());
    let identity = SpiffeId::new(mesh.trust_domain.clone(), &namespace, &account)
        .map_err(|_| fields.invalid("sa", "a service account and a namespace that an identity can name"))?;
    let address =
        fields.parsed("ip", "an IP address")?.ok_or_else(|| fields.invalid("ip", "an IP address"))?;
    Ok(Workload {
        name: ObjectName::new(&namespace, &account),
        labels: BTreeMap::new(),
        annotations: texts_of(&fields.map("annotations")?)?,
        service_account: account,
        identity,
        node: String::new(),
        addresses: vec![address],
        placement: Placement::NetworkNamespace(PathBuf::new()),
        ports: Vec::new(),
        exempt_inbound_ports: Vec::new(),
        enrolled: true,
    })
}
