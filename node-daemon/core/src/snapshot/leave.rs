//! How a connection leaves: where the route leads, and how clients are told to speak there (policy C, D).
//!
//! Between enrolled workloads the tunnel is spoken unless a DestinationRule of the client's side says otherwise; what says
//! otherwise goes straight to the endpoint. A rule that cannot be used denies its host.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use spiffe_id::SpiffeId;

use super::{Route, RouteRefusal, Snapshot, directory::Owner};
use crate::{
    policy::{Asked, ClientFacts, ClientMode, ClientSetting, NamedFiles, Part, Said, ServerMode, client_tls},
    workload::{ObjectName, Protocol, Workload},
};

/// On an endpoint that is not enrolled: `istio` says that a proxy of another kind serves it (policy C).
const TLS_MODE_LABEL: &str = "security.istio.io/tlsMode";

/// How a connection leaves the workload that opened it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaving {
    pub route: Route,
    /// What is spoken to the target of a [`Route::Passthrough`] on the workload's behalf; `None`: what it says itself.
    pub originated: Option<Arc<Originated>>,
    /// The rule that said so; `None`: no rule says anything.
    pub decided: Option<Decided>,
    /// The service that was asked for, if one was.
    pub service: Option<ObjectName>,
}

/// Which rule decided, in the words of the access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decided {
    /// `DestinationRule/namespace/name`
    pub policy: Arc<str>,
    /// Where in it, and the mode.
    pub rule: Arc<str>,
}

/// TLS that is spoken on a workload's behalf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Originated {
    /// The name that is sent; `None`: none is.
    pub sni: Option<String>,
    pub proof: Proof,
    /// Whether HTTP/2 is what the application speaks.
    pub is_http2: bool,
}

/// What the server has to prove, and what with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// Mesh TLS: the mesh's roots, one of these identities, and the workload's own certificate is shown.
    Mesh(Arc<BTreeSet<SpiffeId>>),
    /// The roots of the file, or the system's, and a name; a certificate is shown if files of one are named.
    Files { files: Option<NamedFiles>, names: Names },
}

/// Names of a server outside the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Names {
    /// As browsers compare it, wildcards included.
    Host(String),
    /// One of these, to the letter (policy D-5).
    OneOf(Vec<String>),
}

/// What a connection asks for.
struct Question {
    asked: Asked,
    service: Option<ObjectName>,
    protocol: Protocol,
    is_external: bool,
    /// Of a host outside the mesh (policy D-4).
    names: Vec<String>,
}

impl Snapshot {
    /// How a connection of `source` to `target` leaves. Endpoints of a service are spread by `seed`.
    pub fn leave(&self, source: &Workload, target: SocketAddr, seed: u64) -> Leaving {
        self.leave_by(source, target, self.route(source, target, seed))
    }

    /// The same for a route that was found already.
    pub fn leave_by(&self, source: &Workload, target: SocketAddr, route: Route) -> Leaving {
        let target = SocketAddr::new(target.ip().to_canonical(), target.port());
        let as_routed = |route| Leaving { route, originated: None, decided: None, service: None };
        let endpoint = match &route {
            Route::Tunnel { endpoint, .. } => *endpoint,
            Route::Passthrough { target } => *target,
            Route::Unknown | Route::Refused(_) => return as_routed(route),
        };
        let Some(question) = self.question(source, target) else { return as_routed(route) };
        let labels = self.labels_at(source, target, endpoint);
        let said =
            match self.compiled.client_setting(&question.asked, labels, &source.name.namespace, &self.mesh) {
                ClientSetting::Unsaid => None,
                ClientSetting::Tls(said) => Some(said),
                ClientSetting::Refused { rule, problem } => {
                    let refusal = RouteRefusal::ClientRule { rule: Arc::clone(rule), problem };
                    return Leaving { service: question.service, ..as_routed(Route::Refused(refusal)) };
                }
            };
        let is_enrolled = matches!(route, Route::Tunnel { .. });
        let has_proxy = is_enrolled || labels.get(TLS_MODE_LABEL).is_some_and(|mode| mode == "istio");
        let mode = client_tls(&ClientFacts {
            rule: said.as_ref().map(|said| &**said.settings),
            // Where both ends have a proxy the mesh's TLS is spoken (DESIGN 3.4.7).
            auto_mtls: true,
            mesh_external: question.is_external,
            server: if has_proxy { ServerMode::Permissive } else { ServerMode::Naked },
            endpoint_enrolled: has_proxy,
            identities: &[],
            default_sni: None,
        })
        .mode;
        let way = match mode {
            ClientMode::Plaintext => Ok((Route::Passthrough { target: endpoint }, None)),
            ClientMode::IstioMutual => self.mesh_tls(&question, said.as_ref(), route, endpoint, target),
            ClientMode::Simple | ClientMode::Mutual => {
                let originated = said.as_ref().map(|said| by_files(&question, said));
                Ok((Route::Passthrough { target: endpoint }, originated))
            }
        };
        let (route, originated) = way.unwrap_or_else(|refusal| (Route::Refused(refusal), None));
        Leaving {
            route,
            originated: originated.map(Arc::new),
            decided: said.map(|said| Decided {
                policy: Arc::clone(said.rule),
                rule: format!("{}: {}", said.part, said.settings.mode.name()).into(),
            }),
            service: question.service,
        }
    }

    /// The files that DestinationRules name, and by which part of which rule (T-20).
    pub fn named_files(&self) -> impl Iterator<Item = (&ObjectName, Part, NamedFiles)> {
        self.compiled.named_files()
    }

    /// What was asked for, if rules can name it.
    fn question(&self, source: &Workload, target: SocketAddr) -> Option<Question> {
        let (address, port) = (target.ip(), target.port());
        let (service, port) = match self.directory.owner(address) {
            Some(Owner::Service(service)) => (service.name(), port),
            Some(Owner::Pod(workload)) => self.directory.headless(&workload.name, port)?,
            Some(Owner::Host(ports)) => self.directory.headless(&ports.get(&port)?.name, port)?,
            None => {
                let external = self.directory.external(source, &self.mesh, address)?;
                let port = external.ports.iter().find(|known| known.number == port)?;
                return Some(Question {
                    asked: Asked {
                        host: Arc::clone(&external.host),
                        namespace: Arc::clone(&external.name.namespace),
                        port: port.number,
                    },
                    service: Some(external.name.clone()),
                    protocol: port.protocol,
                    is_external: !external.is_internal,
                    names: external.subject_alt_names.clone(),
                });
            }
        };
        let known = self.services.get(service)?.ports.iter().find(|known| known.port == port)?;
        Some(Question {
            asked: Asked { host: Asked::host_of(service), namespace: Arc::clone(&service.namespace), port },
            service: Some(service.clone()),
            protocol: known.protocol,
            is_external: false,
            names: Vec::new(),
        })
    }

    /// By which subsets select an endpoint.
    fn labels_at(
        &self,
        source: &Workload,
        target: SocketAddr,
        endpoint: SocketAddr,
    ) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        if let Some(workload) = self.workload_at(endpoint.ip(), endpoint.port()) {
            return &workload.labels;
        }
        let external = self.directory.external(source, &self.mesh, target.ip());
        let mut endpoints = external.into_iter().flat_map(|external| &external.endpoints);
        endpoints.find(|known| known.address == endpoint.ip()).map_or(&NONE, |known| &known.labels)
    }

    /// The tunnel to what is enrolled, and mesh TLS on its own port to what another kind of proxy serves.
    fn mesh_tls(
        &self,
        question: &Question,
        said: Option<&Said<'_>>,
        route: Route,
        endpoint: SocketAddr,
        target: SocketAddr,
    ) -> Result<(Route, Option<Originated>), RouteRefusal> {
        let named = said.and_then(|said| identities(&said.settings.subject_alt_names));
        let nobody = |said: &Said<'_>| RouteRefusal::ClientRule {
            rule: Arc::clone(said.rule),
            problem: format!("{}.subjectAltNames names no identity of a workload", said.part),
        };
        if let (Some(named), Some(said)) = (&named, said)
            && named.is_empty()
        {
            return Err(nobody(said));
        }
        if let Route::Tunnel { destination, endpoint, allowed, service } = route {
            let allowed = named.unwrap_or(allowed);
            return Ok((Route::Tunnel { destination, endpoint, allowed, service }, None));
        }
        let by_endpoints = || self.directory.may_answer(target, endpoint);
        let by_entry = || identities(&question.names).filter(|named| !named.is_empty());
        let Some(allowed) = named.or_else(by_endpoints).or_else(by_entry) else {
            let name = question.service.clone().unwrap_or_else(|| ObjectName::new("", &question.asked.host));
            return Err(RouteRefusal::SecureNamingEmpty(name)); // policy D-6
        };
        let Asked { host, port, .. } = &question.asked;
        let subset = said.and_then(|said| said.part.subset.as_deref()).unwrap_or_default();
        let default_sni = || format!("outbound_.{port}_.{subset}_.{host}"); // policy C
        let sni = said.and_then(|said| said.settings.sni.clone()).unwrap_or_else(default_sni);
        let is_http2 = question.protocol == Protocol::Grpc;
        let originated = Originated { sni: Some(sni), proof: Proof::Mesh(allowed), is_http2 };
        Ok((Route::Passthrough { target: endpoint }, Some(originated)))
    }
}

/// SIMPLE and MUTUAL: without names of its own, the host's is what the server has to prove (policy C, D-4).
fn by_files(question: &Question, said: &Said<'_>) -> Originated {
    let settings = said.settings;
    let name = settings.sni.clone().unwrap_or_else(|| question.asked.host.to_string());
    let listed = [&settings.subject_alt_names, &question.names].into_iter().find(|names| !names.is_empty());
    Originated {
        proof: Proof::Files {
            files: NamedFiles::of(said.namespace, settings),
            names: listed.map_or_else(|| Names::Host(name.clone()), |names| Names::OneOf(names.clone())),
        },
        sni: Some(name),
        is_http2: question.protocol == Protocol::Grpc,
    }
}

/// `None`: no names are listed. Those that no workload can have are left out.
fn identities(names: &[String]) -> Option<Arc<BTreeSet<SpiffeId>>> {
    if names.is_empty() {
        return None;
    }
    Some(Arc::new(names.iter().filter_map(|name| name.parse().ok()).collect()))
}

impl Originated {
    /// Whether a connection that was opened so may go on where `newer` is what is said now. Of identities, more may have
    /// come.
    pub fn may_go_on(&self, newer: &Self) -> bool {
        match (&self.proof, &newer.proof) {
            (Proof::Mesh(own), Proof::Mesh(newer)) if !own.is_subset(newer) => false,
            (Proof::Mesh(_), Proof::Mesh(_)) => self.sni == newer.sni && self.is_http2 == newer.is_http2,
            (Proof::Mesh(_) | Proof::Files { .. }, _) => self == newer,
        }
    }
}

#[cfg(test)]
#[path = "leave_tests.rs"]
mod tests;
