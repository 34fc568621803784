//! Tables: objects, one connection, the verdict. One object a line: `Kind namespace/name: {spec}`.

mod authn;
mod bad;
mod current;
mod rbac;
mod refused;
mod requests;
mod status;
mod verbatim;
mod whole;

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, sync::Arc};

use serde_json::{Value, json};
use spiffe_id::{SpiffeId, TrustDomain};

use super::*;
use crate::{
    decode::{self, Object, Source},
    testing,
    workload::{Mesh, Placement, Protocol, Service, ServicePort, TargetPort, TransportMode, WorkloadPort},
};

/// The decision on one connection. `expected` is `allow` or `deny <reason>`, then as much of policy and rule as matters.
#[track_caller]
fn check(objects: &str, connection: &str, expected: &str) {
    World::default().check(objects, connection, expected);
}

/// Several connections under the same objects.
#[track_caller]
fn check_each(objects: &str, cases: &[(&str, &str)]) {
    for (connection, expected) in cases {
        check(objects, connection, expected);
    }
}

/// The place in which the tables are played: `photo/frontend`, `photo/backend`, `datastore/db` and `shop/cart` run here.
struct World {
    mesh: Mesh,
    workloads: BTreeMap<ObjectName, Arc<Workload>>,
    services: BTreeMap<ObjectName, Service>,
}

impl Default for World {
    fn default() -> Self {
        let backend =
            [("http", 8080, Protocol::Http), ("admin", 9000, Protocol::Tcp), ("bare", 9999, Protocol::Tcp)];
        let workloads = [
            workload("photo/frontend", "10.8.1.2", &[("http", 8080, Protocol::Http)]),
            workload("photo/backend", "10.8.1.3", &backend),
            workload("datastore/db", "10.8.1.4", &[("sql", 5432, Protocol::Tcp)]),
            workload("shop/cart", "10.8.1.5", &[]),
            Workload { node: "node-b".into(), ..workload("photo/remote", "10.8.2.2", &[]) },
            Workload { enrolled: false, ..workload("photo/off", "10.8.1.9", &[]) },
        ];
        let services = [
            service("photo/frontend", "frontend", &[("http", 80, "8080", Protocol::Http)]),
            service(
                "photo/backend",
                "backend",
                &[("http", 80, "8080", Protocol::Http), ("tcp-admin", 9001, "admin", Protocol::Tcp)],
            ),
            service("datastore/db", "db", &[("tcp-sql", 3306, "5432", Protocol::Tcp)]),
        ];
        Self {
            mesh: Mesh {
                same_node: crate::workload::SameNode::Direct,
                needs_token_expiry: false,
                barred_identities: Vec::new(),
                trust_domain: domain("cluster.local"),
                trust_domain_aliases: vec![domain("old.local")],
                root_namespace: "istio-system".into(),
                default_mode: TransportMode::Permissive,
                pod_ranges: Vec::new(),
            },
            workloads: workloads.into_iter().map(|w| (w.name.clone(), Arc::new(w))).collect(),
            services: services.into_iter().map(|s| (s.name.clone(), s)).collect(),
        }
    }
}

impl World {
    fn compile(&self, objects: &PolicyObjects) -> Compiled {
        let Self { mesh, workloads, services } = self;
        compile(objects, &Inventory { mesh, workloads, services, node: "node-a" })
    }

    #[track_caller]
    fn check(&self, objects: &str, connection: &str, expected: &str) {
        let (objects, _) = load(objects);
        let verdict = verdict(&self.compile(&objects), &self.facts(connection));
        let fits = verdict == expected || verdict.starts_with(&format!("{expected} "));
        assert!(fits, "{connection}\n  expected {expected}\n  found    {verdict}");
    }

    /// `photo/frontend tunnel > photo/backend:8080 from 10.8.1.2`; `plain > …`; how is `tunnel`, `attested`,
    /// `mesh-tls` or `mesh-tls:<server name>`; a foreign trust domain stands before the account, as `td:photo/web`.
    fn facts(&self, connection: &str) -> ConnectionFacts {
        let (source, target) = connection.split_once(" > ").expect("an arrow");
        let presented = match source.split_once(' ') {
            None => Presented::Plaintext,
            Some((account, how)) => presented(identity(account), how),
        };
        let mut words = target.split(' ');
        let (name, port) = words.next().and_then(|to| to.rsplit_once(':')).expect("a destination");
        let destination = self.workloads.get(&object_name(name)).expect("a known workload");
        let source_address = match words.next() {
            Some("from") => words.next().expect("an address").parse().expect("an address"),
            _ => IpAddr::from([10, 8, 9, 9]),
        };
        ConnectionFacts {
            presented,
            source_address,
            destination_address: destination.addresses[0],
            destination_port: port.parse().expect("a port"),
            destination: Arc::clone(destination),
        }
    }
}

fn presented(id: SpiffeId, how: &str) -> Presented {
    match how.split_once(':').unwrap_or((how, "")) {
        ("tunnel", _) => Presented::Tunnel(id),
        ("attested", _) => Presented::Attested(id),
        ("mesh-tls", name) => {
            let server_name = Some(name.to_owned()).filter(|name| !name.is_empty());
            Presented::MeshTls { peer: id, server_name }
        }
        (other, _) => panic!("nobody comes as {other}"),
    }
}

fn verdict(compiled: &Compiled, facts: &ConnectionFacts) -> String {
    let (answer, verdict) = match compiled.authorise(facts) {
        Ok(permit) => ("allow".to_owned(), permit.verdict().clone()),
        Err(denial) => (format!("deny {}", denial.reason.label()), denial.verdict),
    };
    let parts = [Some(answer.as_str()), verdict.policy.as_deref(), verdict.rule.as_deref()];
    parts.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// Reads all objects; gives the fields of those that were refused.
fn load(text: &str) -> (PolicyObjects, Vec<String>) {
    let mut objects = PolicyObjects::new();
    let refused = read_objects(text).into_iter().filter_map(|object| objects.insert(&object).err());
    let refused = refused.map(|invalid| invalid.field).collect();
    (objects, refused)
}

/// YAML documents as they stand in files, or the short form: one line for each object.
pub(in crate::policy) fn read_objects(text: &str) -> Vec<Object> {
    let documents = if text.trim_start().starts_with("apiVersion") {
        testing::documents(text)
    } else {
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(document).collect()
    };
    let read =
        |(index, value)| decode::object(value, Source::new("policy.yaml", index)).expect("a readable head");
    documents.into_iter().enumerate().map(read).collect()
}

/// `Kind namespace/name@created!dry-run: spec`
fn document(line: &str) -> Value {
    let (head, spec) = line.split_once(": ").expect("a colon after the head");
    let (kind, name) = head.split_once(' ').expect("kind and name");
    let (name, dry_run) = name.strip_suffix("!dry-run").map_or((name, false), |name| (name, true));
    let (name, created) = name.split_once('@').map_or((name, None), |(name, created)| (name, Some(created)));
    let mut metadata = match name.split_once('/') {
        Some((namespace, name)) => json!({"name": name, "namespace": namespace}),
        None => json!({ "name": name }),
    };
    if let Some(created) = created {
        metadata["creationTimestamp"] = json!(created);
    }
    if dry_run {
        metadata["annotations"] = json!({"istio.io/dry-run": "true"});
    }
    let (kind, version) = kind.split_once('@').unwrap_or_else(|| (kind, api_version(kind)));
    let spec: Value = serde_saphyr::from_str(spec).expect("the test's spec is YAML");
    json!({"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec})
}

fn api_version(kind: &str) -> &'static str {
    match kind {
        "Policy" | "MeshPolicy" => "authentication.istio.io/v1alpha1",
        "RbacConfig" | "ClusterRbacConfig" | "ServiceRole" | "ServiceRoleBinding" => "rbac.istio.io/v1alpha1",
        "DestinationRule" => "networking.istio.io/v1alpha3",
        _ => "security.istio.io/v1",
    }
}

fn domain(text: &str) -> TrustDomain {
    text.parse().expect("a trust domain")
}

fn object_name(text: &str) -> ObjectName {
    let (namespace, name) = text.split_once('/').expect("namespace/name");
    ObjectName::new(namespace, name)
}

fn identity(text: &str) -> SpiffeId {
    let (trust_domain, account) = text.split_once(':').unwrap_or(("cluster.local", text));
    let (namespace, name) = account.split_once('/').expect("namespace/account");
    SpiffeId::new(domain(trust_domain), namespace, name).expect("an identity")
}

/// Runs as the service account of its name, with `app: <name>` and `tier: test`.
fn workload(name: &str, address: &str, ports: &[(&str, u16, Protocol)]) -> Workload {
    let id = identity(name);
    let port = |(name, port, protocol): &(&str, u16, Protocol)| WorkloadPort {
        name: Some((*name).to_owned()),
        port: *port,
        protocol: *protocol,
    };
    Workload {
        name: object_name(name),
        labels: labels(&[("app", id.service_account()), ("tier", "test")]),
        annotations: BTreeMap::new(),
        service_account: id.service_account().to_owned(),
        identity: id,
        node: "node-a".to_owned(),
        addresses: vec![address.parse().expect("an address")],
        placement: Placement::NetworkNamespace(PathBuf::from("/run/netns/x")),
        ports: ports.iter().map(port).collect(),
        exempt_inbound_ports: Vec::new(),
        enrolled: true,
    }
}

fn service(name: &str, app: &str, ports: &[(&str, u16, &str, Protocol)]) -> Service {
    let target = |text: &str| match text.parse() {
        Ok(port) => TargetPort::Number(port),
        Err(_) => TargetPort::Name(text.to_owned()),
    };
    let port = |(name, port, to, protocol): &(&str, u16, &str, Protocol)| ServicePort {
        name: Some((*name).to_owned()),
        port: *port,
        target: target(to),
        protocol: *protocol,
    };
    Service {
        name: object_name(name),
        annotations: BTreeMap::new(),
        addresses: Vec::new(),
        selector: labels(&[("app", app)]),
        ports: ports.iter().map(port).collect(),
    }
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// The status of the only object, or of the one of this kind and name.
#[track_caller]
fn status_of(objects: &str, title: &str) -> ObjectStatus {
    let (objects, _) = load(objects);
    let compiled = World::default().compile(&objects);
    let found = compiled.statuses().iter().find(|status| format!("{} {}", status.kind, status.name) == title);
    found.expect("the object has a status").clone()
}
