//! What is asked, in the plainest types.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::Value;

/// One document, and whether its author broke it: such a one is refused, and no earlier version stands.
#[derive(Clone, Debug)]
pub struct Document {
    pub value: Value,
    pub is_broken: bool,
}

impl Document {
    pub fn kind(&self) -> &str {
        self.value["kind"].as_str().unwrap_or_default()
    }

    pub fn name(&self) -> &str {
        self.value["metadata"]["name"].as_str().unwrap_or_default()
    }

    /// Empty for kinds of the whole mesh.
    pub fn namespace(&self) -> &str {
        self.value["metadata"]["namespace"].as_str().unwrap_or_default()
    }

    pub fn created(&self) -> Option<&str> {
        self.value["metadata"]["creationTimestamp"].as_str()
    }

    pub fn spec(&self) -> &Value {
        &self.value["spec"]
    }
}

/// The oldest, then by namespace and name.
pub fn by_age<'d>(documents: impl Iterator<Item = &'d Document>) -> Vec<&'d Document> {
    let mut sorted: Vec<&Document> = documents.collect();
    sorted.sort_by_key(|document| (document.created(), document.namespace(), document.name()));
    sorted
}

/// The texts of a list, of one text, or none.
pub fn texts(value: &Value) -> Vec<String> {
    match value {
        Value::String(text) => vec![text.clone()],
        Value::Array(list) => list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => Vec::new(),
    }
}

/// The entries of a list, or none.
pub fn entries(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    Disabled,
    Permissive,
    Strict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Http,
}

#[derive(Clone, Debug)]
pub struct World {
    pub trust_domain: String,
    pub aliases: Vec<String>,
    pub root_namespace: String,
    pub default_mode: Mode,
    pub documents: Vec<Document>,
    pub workload: Workload,
    pub services: Vec<Service>,
    /// Seconds since 1970.
    pub now: u64,
}

/// The only one: all others are known by what they present.
#[derive(Clone, Debug)]
pub struct Workload {
    pub namespace: String,
    pub name: String,
    pub account: String,
    pub labels: BTreeMap<String, String>,
    pub address: IpAddr,
    pub ports: Vec<(u16, Protocol)>,
}

#[derive(Clone, Debug)]
pub struct Service {
    pub namespace: String,
    pub name: String,
    pub selector: BTreeMap<String, String>,
    pub ports: Vec<ServicePort>,
}

#[derive(Clone, Debug)]
pub struct ServicePort {
    pub name: String,
    pub port: u16,
    pub target: u16,
    pub protocol: Protocol,
}

impl World {
    pub fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Document> {
        self.documents.iter().filter(move |document| document.kind() == kind)
    }

    /// The service that owns a port of the workload, and its port: of several the first by name (policy A-4).
    pub fn owner(&self, port: u16) -> Option<(&Service, &ServicePort)> {
        let mut behind: Vec<(&Service, &ServicePort)> = Vec::new();
        for service in &self.services {
            let is_behind = service.namespace == self.workload.namespace
                && !service.selector.is_empty()
                && service.selector.iter().all(|(key, value)| self.workload.labels.get(key) == Some(value));
            let leads = service.ports.iter().find(|written| written.target == port);
            if let (true, Some(leads)) = (is_behind, leads) {
                behind.push((service, leads));
            }
        }
        behind.sort_by_key(|(service, _)| service.name.clone());
        behind.into_iter().next()
    }

    /// policy H-8
    pub fn protocol(&self, port: u16) -> Protocol {
        let by_service = self.owner(port).map(|(_, port)| port.protocol);
        let by_workload =
            self.workload.ports.iter().find(|(number, _)| *number == port).map(|(_, protocol)| *protocol);
        if by_service == Some(Protocol::Http) || by_workload == Some(Protocol::Http) {
            Protocol::Http
        } else {
            Protocol::Tcp
        }
    }

    /// The mesh's own trust domain and its aliases.
    pub fn domains(&self) -> Vec<String> {
        let mut domains = vec![self.trust_domain.clone()];
        domains.extend(self.aliases.iter().cloned());
        domains
    }

    /// Whether labels of a document's selector are the workload's, and its namespace speaks for it.
    pub fn selects(&self, document: &Document) -> bool {
        let is_in_scope =
            document.namespace() == self.workload.namespace || document.namespace() == self.root_namespace;
        let labels = document.spec()["selector"]["matchLabels"].as_object();
        let fits = labels
            .into_iter()
            .flatten()
            .all(|(key, value)| self.workload.labels.get(key).map(String::as_str) == value.as_str());
        is_in_scope && fits
    }
}

/// A proven identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub domain: String,
    pub namespace: String,
    pub account: String,
}

impl Peer {
    /// policy H-7
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.domain, self.namespace, self.account)
    }
}

#[derive(Clone, Debug)]
pub struct Connection {
    pub peer: Option<Peer>,
    pub server_name: Option<String>,
    pub source: IpAddr,
    /// Of the workload.
    pub port: u16,
}

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: Option<String>,
    pub host: Option<String>,
    /// Each name once.
    pub headers: Vec<(String, String)>,
    pub tokens: Vec<Token>,
}

/// One token and where it stands.
#[derive(Clone, Debug)]
pub struct Token {
    pub place: Place,
    pub algorithm: String,
    pub is_signed_well: bool,
    pub claims: Value,
}

/// What stands before the token in a header is part of the place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Header { name: String, before: String },
    Parameter(String),
}

/// What rules look at.
#[derive(Clone, Debug)]
pub struct Seen {
    pub peer: Option<Peer>,
    pub server_name: Option<String>,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub port: u16,
    pub request: Option<SeenRequest>,
}

#[derive(Clone, Debug)]
pub struct SeenRequest {
    pub method: String,
    pub path: Option<String>,
    pub host: Option<String>,
    pub headers: Vec<(String, String)>,
    pub principal: Option<String>,
    pub claims: Option<Value>,
    /// Names of claims whose text is a list, beside the usual ones.
    pub spaced: Vec<String>,
}

impl SeenRequest {
    /// A header as rules see it: reserved names never (policy A-11), `host` without case (policy G-18).
    pub fn header(&self, name: &str) -> Option<String> {
        let name = name.to_ascii_lowercase();
        match name.as_str() {
            ":method" => Some(self.method.clone()),
            ":path" => self.path.clone(),
            ":authority" | "host" => self.host.as_ref().map(|host| host.to_ascii_lowercase()),
            "sec-istio-auth-userinfo" | "sec-istio-authn-payload" => None,
            name if name.starts_with("istio-sec-") => None,
            name => self
                .headers
                .iter()
                .find(|(own, _)| own.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.clone()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Without data.
    Closed,
    /// With this status; over gRPC the code that stands for it (policy A-12, B-12).
    Refused(u16),
    /// To the workload, with this path.
    Delivered(Option<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub outcome: Outcome,
    /// Whether it were allowed if everything were enforced; `None`: rules were not asked.
    pub would_be: Option<bool>,
    /// `request.auth.principal`
    pub principal: Option<String>,
    /// `source.principal`
    pub peer: Option<Peer>,
}

impl Verdict {
    pub(crate) fn of(outcome: Outcome) -> Self {
        Self { outcome, would_be: None, principal: None, peer: None }
    }
}
