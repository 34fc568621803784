//! `/status` and `/dump` on the admin socket: everything without secrets.
//!
//! Private keys have no view, tokens and keys stay in files that the configuration only names; so nothing has to be left
//! out here.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use node_core::{
    snapshot::Snapshot,
    store::Problem,
    workload::{ObjectName, Placement, Service as KnownService, TransportMode, Workload as Declared},
};

use super::{
    EnrolmentView, Stage, Views, ready,
    serve::{Answer, Page},
    status::{
        CONNECTIONS_SHOWN_MAX, Certificate, Connection, DocumentProblem, Documents, Dump, End, KeySet,
        KnownWorkload, Mesh, NodeCertificate, Policy, Port, Service, Status, Workload,
    },
};
use crate::{
    certs::{CertificateView, RuleFault},
    datapath::ConnectionView,
    jwks::KeySetView,
    telemetry::{Direction, Endpoint, log::rfc3339},
};

/// Name of the limit of connections to the admin socket.
pub const LIMIT: &str = "admin_connections";

/// No workload declares it.
const UNDECLARED_PORT: u16 = 0;

/// The page.
pub fn page(views: Views) -> Page {
    Arc::new(move |path| match path {
        "/status" => Some(json(&status(&views))),
        "/dump" => Some(json(&dump(&views))),
        _ => None,
    })
}

fn json(what: &impl serde::Serialize) -> Answer {
    match serde_json::to_string(what) {
        Ok(body) => Answer::json(body),
        Err(error) => Answer::text(500, format!("it cannot be written: {error}\n")),
    }
}

/// The state of the node, now.
pub fn status(views: &Views) -> Status {
    let snapshot = Arc::clone(&views.snapshots.borrow());
    let connections = (views.connections)();
    let missing = ready::missing(views);
    Status {
        node: views.node.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        stage: stage(*views.stage.borrow()).to_owned(),
        ready: missing.is_empty(),
        missing,
        snapshot: snapshot.number(),
        trust_domain: snapshot.mesh().trust_domain.to_string(),
        node_certificate: (views.node_certificate)().map(|certificate| NodeCertificate {
            name: certificate.name,
            not_after: rfc3339(certificate.not_after),
        }),
        workloads: workloads(&snapshot, &(views.enrolments)(), &connections),
        certificates: (views.certificates)().into_iter().map(certificate).collect(),
        policies: policies(&snapshot, &(views.client_files)(&snapshot)),
        documents: documents(views, &snapshot),
        connections_total: connections.len(),
        connections: connections.iter().take(CONNECTIONS_SHOWN_MAX).map(connection).collect(),
        direct: (views.direct)(),
        key_sets: (views.key_sets)().into_iter().map(key_set).collect(),
        kernel: (views.kernel)().into_iter().map(|(label, count)| (label.to_owned(), count)).collect(),
    }
}

/// The status, and the whole mesh as this node knows it.
pub fn dump(views: &Views) -> Dump {
    let snapshot = Arc::clone(&views.snapshots.borrow());
    Dump {
        status: status(views),
        configuration: views.configuration.clone(),
        mesh: mesh(&snapshot),
        all_workloads: snapshot.workloads().map(|workload| known_workload(workload)).collect(),
        services: snapshot.services().map(service).collect(),
    }
}

fn key_set(view: KeySetView) -> KeySet {
    let KeySetView { source, keys, problem } = view;
    KeySet { source, keys, problem }
}

fn stage(stage: Stage) -> &'static str {
    match stage {
        Stage::Running => "running",
        Stage::Draining => "draining",
    }
}

fn workloads(
    snapshot: &Snapshot,
    enrolments: &[EnrolmentView],
    connections: &[ConnectionView],
) -> Vec<Workload> {
    let enrolments: BTreeMap<&ObjectName, &Option<String>> =
        enrolments.iter().map(|view| (&view.workload, &view.problem)).collect();
    let mut open: BTreeMap<ObjectName, usize> = BTreeMap::new();
    for view in connections {
        let (source, destination) = (&view.ends.source, &view.ends.destination);
        let local = match view.ends.direction {
            _ if view.ends.is_within_node() => vec![source, destination],
            Direction::Inbound => vec![destination],
            Direction::Outbound => vec![source],
        };
        for name in local.into_iter().filter_map(|end| end.workload.as_ref()) {
            *open.entry(name.clone()).or_default() += 1;
        }
    }
    let one = |workload: &Arc<Declared>| Workload {
        name: workload.name.to_string(),
        identity: workload.identity.to_string(),
        addresses: workload.addresses.iter().map(IpAddr::to_string).collect(),
        enrolled: matches!(enrolments.get(&workload.name), Some(None)),
        reason: enrolments.get(&workload.name).and_then(|problem| (*problem).clone()),
        transport_mode: mode(snapshot.transport_mode(workload, UNDECLARED_PORT)).to_owned(),
        ports: workload.ports.iter().map(|port| self::port(snapshot, workload, port.port)).collect(),
        exempt_inbound_ports: workload.exempt_inbound_ports.clone(),
        same_node: snapshot.same_node(&workload.name).label().to_owned(),
        connections: open.get(&workload.name).copied().unwrap_or(0),
    };
    snapshot.local().map(one).collect()
}

fn port(snapshot: &Snapshot, workload: &Declared, port: u16) -> Port {
    Port { port, transport_mode: mode(snapshot.transport_mode(workload, port)).to_owned() }
}

fn mode(mode: TransportMode) -> &'static str {
    match mode {
        TransportMode::Strict => "STRICT",
        TransportMode::Permissive => "PERMISSIVE",
        TransportMode::Disabled => "DISABLE",
    }
}

fn certificate(view: CertificateView) -> Certificate {
    Certificate {
        identity: view.identity.to_string(),
        serial: view.serial,
        not_after: view.not_after.map(rfc3339),
        renews_at: view.renews_at.map(rfc3339),
        generation: view.generation,
        renewals: view.renewals,
        failures: view.failures,
        last_error: view.last_problem,
    }
}

/// A rule whose files cannot be used is refused like one that cannot be read (T-20).
fn policies(snapshot: &Snapshot, faults: &BTreeMap<ObjectName, RuleFault>) -> Vec<Policy> {
    let one = |status: &node_core::policy::ObjectStatus| {
        let fault = faults.get(&status.name).filter(|_| status.kind == "DestinationRule");
        let effect = match fault {
            Some(fault) if fault.keeps_older => {
                format!("the files before stay in use: {}", status.effect)
            }
            Some(_) => "where this setting applies, connections are denied".to_owned(),
            None => status.effect.clone(),
        };
        Policy {
            kind: status.kind.clone(),
            name: status.name.to_string(),
            accepted: status.accepted && fault.is_none(),
            problem: fault.map(|fault| fault.fault.to_string()).or_else(|| status.problem.clone()),
            field: fault.map(|fault| fault.field.clone()).or_else(|| status.field.clone()),
            effect,
            file: status.source.file.to_string(),
            document: status.source.index,
        }
    };
    snapshot.statuses().iter().map(one).collect()
}

fn documents(views: &Views, snapshot: &Snapshot) -> Documents {
    let view = views.documents.borrow().clone();
    let problem = |problem: &Problem| DocumentProblem {
        file: problem.file.to_string(),
        document: problem.index,
        object: problem.object.clone(),
        field: problem.field.clone(),
        reason: problem.reason.clone(),
    };
    Documents {
        folder: view.folder.display().to_string(),
        files: view.files,
        problems: snapshot.problems().iter().map(problem).collect(),
        unreadable: snapshot.unreadable().map(str::to_owned),
        folder_problem: view.folder_problem,
        from_last_good: view.from_last_good.iter().map(|file| file.to_string()).collect(),
        last_good_problem: view.last_good_problem,
    }
}

fn connection(view: &ConnectionView) -> Connection {
    let ends = &view.ends;
    Connection {
        connection: ends.connection,
        direction: ends.direction.label().to_owned(),
        path: ends.path.label().to_owned(),
        source: end(&ends.source),
        destination: end(&ends.destination),
        service: ends.service.as_ref().map(ObjectName::to_string),
        mutual_tls: ends.mutual_tls,
        bytes_in: view.bytes_in,
        bytes_out: view.bytes_out,
        snapshot: view.snapshot,
    }
}

fn end(endpoint: &Endpoint) -> End {
    End {
        address: endpoint.address.map(|address| address.to_string()),
        workload: endpoint.workload.as_ref().map(ObjectName::to_string),
        identity: endpoint.identity.as_ref().map(|identity| identity.to_string()),
        node: endpoint.node.as_deref().map(str::to_owned),
    }
}

fn mesh(snapshot: &Snapshot) -> Mesh {
    let mesh = snapshot.mesh();
    Mesh {
        trust_domain: mesh.trust_domain.to_string(),
        trust_domain_aliases: mesh.trust_domain_aliases.iter().map(|alias| alias.to_string()).collect(),
        root_namespace: mesh.root_namespace.clone(),
        default_mode: mode(mesh.default_mode).to_owned(),
        same_node: mesh.same_node.label().to_owned(),
        barred_identities: snapshot.barred().map(|identity| identity.to_string()).collect(),
        pod_ranges: mesh.pod_ranges.iter().map(|range| range.to_string()).collect(),
    }
}

fn known_workload(workload: &Declared) -> KnownWorkload {
    let placement = match &workload.placement {
        Placement::NetworkNamespace(path) => format!("network namespace {}", path.display()),
        Placement::Cgroup(path) => format!("cgroup {}", path.display()),
        Placement::SystemdUnit(unit) => format!("systemd unit {unit}"),
    };
    KnownWorkload {
        name: workload.name.to_string(),
        identity: workload.identity.to_string(),
        node: workload.node.clone(),
        addresses: workload.addresses.iter().map(IpAddr::to_string).collect(),
        ports: workload.ports.iter().map(|port| port.port).collect(),
        enrolled: workload.enrolled,
        placement,
    }
}

fn service(service: &KnownService) -> Service {
    Service {
        name: service.name.to_string(),
        addresses: service.addresses.iter().map(IpAddr::to_string).collect(),
        ports: service.ports.iter().map(|port| port.port).collect(),
        selector: service.selector.clone(),
    }
}
