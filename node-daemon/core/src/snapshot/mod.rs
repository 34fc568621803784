//! What is in force, compiled: immutable, numbered, shared by all connections that were judged by it.
//!
//! Built by the [store](crate::store); answers who owns an address, where a connection goes and whom to expect there
//! (secure naming, policy D), and who may come in ([`crate::policy`]). Every answer is a lookup in a tree, and shares
//! what it returns. Not here: documents, what changed since the last one.

mod directory;
mod leave;
mod naming;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use spiffe_id::SpiffeId;

use self::directory::{Directory, Owner};
pub use self::leave::{Decided, Leaving, Names, Originated, Proof};
use crate::{
    decode::{DeclaredWorkload, Enrolment, Source},
    policy::{
        self, Admission, Compiled, ConnectionFacts, Denial, DenialReason, Explanation, Inventory,
        ObjectStatus, Permit, PolicyObjects, RequestDenial, RequestFacts, RequestPermit, Verdict,
        tokens::TokenRules,
    },
    store::Problem,
    workload::{External, Mesh, ObjectName, SameNode, Service, TransportMode, Workload},
};

/// See the module.
#[derive(Debug)]
pub struct Snapshot {
    number: u64,
    node: Arc<str>,
    mesh: Mesh,
    workloads: BTreeMap<ObjectName, Arc<Workload>>,
    services: BTreeMap<ObjectName, Service>,
    directory: Directory,
    /// Services of this node's host by port; `None` where several declare it.
    at_loopback: BTreeMap<u16, Option<Arc<Workload>>>,
    /// Enrolled workloads whose connections inside the node the daemon carries.
    proxied: BTreeSet<ObjectName>,
    barred: BTreeSet<SpiffeId>,
    compiled: Compiled,
    problems: Vec<Problem>,
    unreadable: Option<String>,
}

/// Where a connection goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    Tunnel {
        destination: Arc<Workload>,
        /// The destination's own address and the port on which it listens.
        endpoint: SocketAddr,
        /// Who may answer there (policy D); never empty.
        allowed: Arc<BTreeSet<SpiffeId>>,
        /// The service that was asked for, if one was.
        service: Option<ObjectName>,
    },
    /// Outside the mesh, or a workload that is not enrolled.
    Passthrough {
        target: SocketAddr,
    },
    /// Inside the pod ranges, and nobody knows it: hold, then deny (DESIGN 3.4.9).
    Unknown,
    Refused(RouteRefusal),
}

/// Why a connection goes nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouteRefusal {
    #[error("service {service} has no endpoint for this port and address family")]
    NoEndpoints { service: ObjectName },
    #[error("service {service} has no TCP port {port}")]
    NoSuchServicePort { service: ObjectName, port: u16 },
    #[error("nobody may answer for {0}: its identity annotations name no usable identity")]
    SecureNamingEmpty(ObjectName),
    #[error("the target is the caller itself, or loopback")]
    OwnAddress,
    /// policy C, T-20
    #[error("{rule} denies it: {problem}")]
    ClientRule { rule: Arc<str>, problem: String },
}

impl RouteRefusal {
    /// The metric's label and the access log's `reason`.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::NoEndpoints { .. } => "no_endpoints",
            Self::NoSuchServicePort { .. } => "no_such_service_port",
            Self::SecureNamingEmpty(_) => "secure_naming_empty",
            Self::OwnAddress => "own_address",
            Self::ClientRule { .. } => "client_rule",
        }
    }
}

impl Snapshot {
    /// Grows with every snapshot of one store.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The node whose snapshot this is.
    pub fn node(&self) -> &str {
        &self.node
    }

    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    pub fn workload(&self, name: &ObjectName) -> Option<&Arc<Workload>> {
        self.workloads.get(name)
    }

    /// All workloads of the mesh, enrolled or not.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values()
    }

    /// Who is reached there. A host's address belongs to the host workload that declares the port.
    pub fn workload_at(&self, address: IpAddr, port: u16) -> Option<&Arc<Workload>> {
        match self.directory.owner(address)? {
            Owner::Pod(workload) => Some(workload),
            Owner::Host(ports) => ports.get(&port),
            Owner::Service(_) => None,
        }
    }

    /// Which service of this node's host answers at its loopback addresses: the one that declares the port. Where two do, at
    /// different addresses of the host, nobody can tell which of them listens there, and none is the answer.
    pub fn workload_at_loopback(&self, port: u16) -> Option<&Arc<Workload>> {
        self.at_loopback.get(&port)?.as_ref()
    }

    /// Enrolled workloads of this node.
    pub fn local(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values().filter(|workload| workload.enrolled && *workload.node == *self.node)
    }

    /// Where a connection of `source` to `target` goes. Endpoints of a service are spread by `seed`.
    pub fn route(&self, source: &Workload, target: SocketAddr, seed: u64) -> Route {
        let target = SocketAddr::new(target.ip().to_canonical(), target.port());
        let address = target.ip();
        if address.is_loopback() || address.is_unspecified() {
            return Route::Refused(RouteRefusal::OwnAddress); // T-6
        }
        match self.directory.owner(address) {
            Some(Owner::Service(service)) => service.route(source, target, seed),
            Some(Owner::Pod(workload)) => self.route_to_workload(source, workload, target),
            Some(Owner::Host(ports)) => match ports.get(&target.port()) {
                Some(workload) => self.route_to_workload(source, workload, target),
                // The rest of a host, such as its SSH server, is no workload.
                None => Route::Passthrough { target },
            },
            None if self.mesh.pod_ranges.iter().any(|range| range.contains(&address)) => Route::Unknown,
            None => match self.directory.external(source, &self.mesh, address) {
                Some(external) => self.route_to_external(source, external, target, seed),
                None => Route::Passthrough { target },
            },
        }
    }

    /// What the destination accepts on this port of its own.
    pub fn transport_mode(&self, destination: &Workload, port: u16) -> TransportMode {
        self.compiled.transport_mode(destination, port)
    }

    /// May this connection come in?
    ///
    /// # Errors
    /// The policy's [`Denial`]; while a file is unreadable and nothing is known of what it says, always
    /// [`DenialReason::PolicyUnusable`] (T-19). With a barred identity at either end [`DenialReason::IdentityBarred`].
    pub fn authorise(&self, facts: &ConnectionFacts) -> Result<Permit, Denial> {
        self.hears(facts)?;
        self.compiled.authorise(facts)
    }

    /// May this connection come in, and is it judged as a whole or request by request?
    ///
    /// # Errors
    /// As [`Snapshot::authorise`].
    pub fn admit(&self, facts: &ConnectionFacts) -> Result<Admission, Denial> {
        self.hears(facts)?;
        self.compiled.admit(facts)
    }

    /// The ports of a pod at which any answer may be another than at all those that are not among them.
    pub(crate) fn ports_told_apart(&self, destination: &Workload) -> BTreeSet<u16> {
        let mut ports = self.compiled.ports_told_apart(&destination.name);
        // Whoever dials a pod of a headless service may have rules for that service.
        let headless = self.services.values().filter(|service| {
            service.addresses.is_empty() && service.name.namespace == destination.name.namespace
        });
        ports.extend(headless.flat_map(|service| service.ports.iter().map(|port| port.port)));
        ports
    }

    /// Whether the client's address can change the policy's answer, beside its identity.
    pub(crate) fn looks_at_source_addresses(&self, destination: &Workload) -> bool {
        self.compiled.looks_at_source_addresses(&destination.name)
    }

    /// Whose tokens count on this port, if anybody's.
    pub fn token_rules(&self, destination: &Workload, port: u16) -> Option<&TokenRules> {
        self.compiled.token_rules(destination, port)
    }

    /// May one request of a connection that was [admitted](Snapshot::admit) by this snapshot reach the workload?
    ///
    /// # Errors
    /// What the client is told, and who decided; as with [`Snapshot::authorise`] before any rule.
    pub fn judge_request(
        &self,
        connection: &ConnectionFacts,
        request: &RequestFacts<'_>,
    ) -> Result<RequestPermit, RequestDenial> {
        self.hears(connection).map_err(|denial| RequestDenial::unheard(denial, request))?;
        self.compiled.judge_request(connection, request)
    }

    /// Why [`Snapshot::admit`] and, with a request, [`Snapshot::judge_request`] answer as they do.
    pub fn explain(&self, connection: &ConnectionFacts, request: Option<&RequestFacts<'_>>) -> Explanation {
        let explained = self.compiled.explain(connection, request);
        match self.hears(connection) {
            Ok(()) => explained,
            // T-19: the rules that were considered stay, as they would answer otherwise.
            Err(denial) => Explanation::unheard(&denial, self.unreadable(), explained.considered),
        }
    }

    /// What is in force, compiled: for questions that no traffic asks, such as [`Compiled::smallest_changes`] and
    /// [`Compiled::tell`]. As with [`Snapshot::explain`] the rules alone are asked.
    pub fn compiled(&self) -> &Compiled {
        &self.compiled
    }

    /// What became of each policy object.
    pub fn statuses(&self) -> &[ObjectStatus] {
        self.compiled.statuses()
    }

    /// How connections between this workload and others of its node go; both ends must say direct.
    pub fn same_node(&self, workload: &ObjectName) -> SameNode {
        if self.proxied.contains(workload) { SameNode::Proxied } else { SameNode::Direct }
    }

    /// Whether nobody may speak as this identity, under any name of the mesh.
    pub fn is_barred(&self, identity: &SpiffeId) -> bool {
        self.barred.contains(identity)
    }

    /// Identities as which nobody may speak.
    pub fn barred(&self) -> impl Iterator<Item = &SpiffeId> {
        self.barred.iter()
    }

    /// What is wrong with the documents.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// Why everything is denied, if so (T-19): the node is not ready then.
    pub fn unreadable(&self) -> Option<&str> {
        self.unreadable.as_deref()
    }

    /// What is asked before any rule: are the documents readable (T-19), and is neither end barred?
    fn hears(&self, facts: &ConnectionFacts) -> Result<(), Denial> {
        let proven = facts.presented.identity();
        let is_barred = proven.is_some_and(|identity| self.is_barred(identity))
            || self.is_barred(&facts.destination.identity);
        let reason = if self.unreadable.is_some() {
            DenialReason::PolicyUnusable
        } else if is_barred {
            DenialReason::IdentityBarred
        } else {
            return Ok(());
        };
        Err(Denial { reason, verdict: Verdict::default() })
    }

    /// Outside the mesh, or to a workload that the entry names by its address: that one stays what it is.
    fn route_to_external(
        &self,
        source: &Workload,
        external: &External,
        target: SocketAddr,
        seed: u64,
    ) -> Route {
        let Some(endpoint) = directory::external_endpoint(external, source, target, seed) else {
            return Route::Refused(RouteRefusal::NoEndpoints { service: external.name.clone() });
        };
        match self.workload_at(endpoint.ip(), endpoint.port()) {
            Some(workload) => self.route_to_workload(source, workload, endpoint),
            None => Route::Passthrough { target: endpoint },
        }
    }

    /// A workload dialled by its own address is expected to be itself (DESIGN 3.3.3).
    fn route_to_workload(&self, source: &Workload, destination: &Arc<Workload>, target: SocketAddr) -> Route {
        if destination.name == source.name {
            return Route::Refused(RouteRefusal::OwnAddress);
        }
        if !destination.enrolled {
            return Route::Passthrough { target };
        }
        match self.directory.expected(&destination.name) {
            Some(allowed) => Route::Tunnel {
                destination: Arc::clone(destination),
                endpoint: target,
                allowed: Arc::clone(allowed),
                service: None,
            },
            None => Route::Refused(RouteRefusal::SecureNamingEmpty(destination.name.clone())),
        }
    }
}

/// Who may answer for a service with these endpoints (policy D).
pub(crate) fn identities_of<'w>(
    endpoints: impl Iterator<Item = &'w Workload>,
    service: &Service,
    mesh: &Mesh,
) -> Arc<BTreeSet<SpiffeId>> {
    let (named, _) = naming::of_annotations(service, mesh);
    naming::answering(endpoints, named, mesh)
}

/// What the labels of a namespace say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NamespaceWord {
    pub(crate) enrolment: Enrolment,
    pub(crate) same_node: Option<SameNode>,
}

/// What the store gives.
pub(crate) struct Contents<'a> {
    pub(crate) number: u64,
    pub(crate) node: Arc<str>,
    pub(crate) mesh: Mesh,
    pub(crate) namespaces: BTreeMap<Arc<str>, NamespaceWord>,
    pub(crate) workloads: Vec<(&'a DeclaredWorkload, &'a Source)>,
    pub(crate) services: BTreeMap<ObjectName, (Service, Source)>,
    pub(crate) externals: Vec<(&'a External, &'a Source)>,
    pub(crate) policies: &'a PolicyObjects,
    pub(crate) problems: Vec<Problem>,
    pub(crate) unreadable: Option<String>,
    /// Beside those of the mesh.
    pub(crate) barred: &'a BTreeSet<SpiffeId>,
    /// Unchanged workloads are shared with it.
    pub(crate) previous: Option<Arc<Snapshot>>,
}

impl Snapshot {
    pub(crate) fn build(contents: Contents<'_>) -> Self {
        let Contents { number, node, mesh, namespaces, workloads, services, policies, .. } = contents;
        let (mut problems, unreadable) = (contents.problems, contents.unreadable);
        let mut sources = BTreeMap::new();
        let mut by_name = BTreeMap::new();
        let mut proxied = BTreeSet::new();
        for (declared, source) in workloads {
            let word = namespaces.get(&declared.workload.name.namespace);
            let workload = enrol(declared, word, contents.previous.as_deref());
            let same_node = declared.same_node.or_else(|| word.and_then(|word| word.same_node));
            if same_node.unwrap_or(mesh.same_node) == SameNode::Proxied {
                proxied.insert(workload.name.clone());
            }
            sources.insert(workload.name.clone(), source);
            by_name.insert(workload.name.clone(), workload);
        }
        let directory =
            Directory::build(&by_name, &services, &contents.externals, &mesh, &sources, &mut problems);
        let services = services.into_iter().map(|(name, (service, _))| (name, service)).collect();
        let inventory = Inventory { mesh: &mesh, workloads: &by_name, services: &services, node: &node };
        let compiled = policy::compile(policies, &inventory);
        problems.sort();
        let at_loopback = at_loopback(&by_name, &node);
        let barred = contents.barred.iter().chain(&mesh.barred_identities).cloned();
        let barred = Arc::unwrap_or_clone(naming::allowed(barred, &mesh));
        Self {
            number,
            node,
            workloads: by_name,
            services,
            directory,
            at_loopback,
            proxied,
            barred,
            compiled,
            problems,
            unreadable,
            mesh,
        }
    }
}

fn at_loopback(
    workloads: &BTreeMap<ObjectName, Arc<Workload>>,
    node: &str,
) -> BTreeMap<u16, Option<Arc<Workload>>> {
    let mut ports = BTreeMap::new();
    let here = |workload: &&Arc<Workload>| workload.is_host() && workload.enrolled && workload.node == node;
    for workload in workloads.values().filter(here) {
        for declared in &workload.ports {
            let mine = || Some(Arc::clone(workload));
            ports.entry(declared.port).and_modify(|owner| *owner = None).or_insert_with(mine);
        }
    }
    ports
}

fn enrol(
    declared: &DeclaredWorkload,
    namespace: Option<&NamespaceWord>,
    previous: Option<&Snapshot>,
) -> Arc<Workload> {
    let name = &declared.workload.name;
    let namespace = namespace.map_or(Enrolment::Unsaid, |word| word.enrolment);
    if Enrolment::resolve(declared.enrolment, namespace) {
        return Arc::clone(&declared.workload);
    }
    let workload = Workload { enrolled: false, ..Workload::clone(&declared.workload) };
    let before = previous.and_then(|previous| previous.workload(name)).filter(|before| ***before == workload);
    before.cloned().unwrap_or_else(|| Arc::new(workload))
}

#[cfg(test)]
mod tests;
