//! Who owns which address, and where connections to a service go.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use spiffe_id::SpiffeId;

use super::{
    Route, RouteRefusal,
    naming::{self, Unusable},
};
use crate::{
    decode::Source,
    seed,
    store::Problem,
    workload::{External, Mesh, ObjectName, Service, ServicePort, TargetPort, Workload},
};

type Allowed = Arc<BTreeSet<SpiffeId>>;

/// See the module.
#[derive(Debug)]
pub(super) struct Directory {
    owners: BTreeMap<IpAddr, Owner>,
    /// Whom to expect of a workload; absent where its annotation names nobody (policy D-6).
    expected: BTreeMap<ObjectName, Allowed>,
    /// Of a workload's port: the service without an address of its own that applications reach there, and its port.
    headless: BTreeMap<(ObjectName, u16), (ObjectName, u16)>,
    /// Hosts outside the mesh, as each namespace knows them.
    externals: BTreeMap<(Arc<str>, IpAddr), Arc<External>>,
}

/// The owner of an address.
#[derive(Debug)]
pub(super) enum Owner {
    Pod(Arc<Workload>),
    /// By port.
    Host(BTreeMap<u16, Arc<Workload>>),
    Service(Arc<ServiceRoutes>),
}

/// A service, from its own port to endpoints.
#[derive(Debug)]
pub(super) struct ServiceRoutes {
    name: ObjectName,
    ports: BTreeMap<u16, Endpoints>,
    allowed: Allowed,
}

/// Endpoints of one port, by family.
#[derive(Debug, Default)]
struct Endpoints {
    v4: Vec<Endpoint>,
    v6: Vec<Endpoint>,
}

#[derive(Debug)]
struct Endpoint {
    workload: Arc<Workload>,
    address: SocketAddr,
}

impl Directory {
    pub(super) fn build(
        workloads: &BTreeMap<ObjectName, Arc<Workload>>,
        services: &BTreeMap<ObjectName, (Service, Source)>,
        externals: &[(&External, &Source)],
        mesh: &Mesh,
        sources: &BTreeMap<ObjectName, &Source>,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let mut owners = BTreeMap::new();
        let mut expected = BTreeMap::new();
        let mut headless = BTreeMap::new();
        let mut sets: BTreeMap<SpiffeId, Allowed> = BTreeMap::new();
        for workload in workloads.values() {
            own(&mut owners, workload);
            match naming::of_workload(workload) {
                Ok(id) => {
                    let set = sets.entry(id.clone()).or_insert_with(|| naming::allowed([id], mesh));
                    expected.insert(workload.name.clone(), Arc::clone(set));
                }
                Err(unusable) => {
                    let source = sources.get(&workload.name).copied();
                    problems
                        .extend(source.map(|source| problem(source, "Workload", &workload.name, unusable)));
                }
            }
        }
        let by_label = ByLabel::build(workloads);
        for (service, source) in services.values() {
            let members = by_label.select(service);
            let (named, unusable) = naming::of_annotations(service, mesh);
            problems.extend(
                unusable.into_iter().map(|unusable| problem(source, "Service", &service.name, unusable)),
            );
            if service.addresses.is_empty() {
                add_headless(&mut headless, service, &members);
                continue;
            }
            let routes = Arc::new(ServiceRoutes::build(service, &members, named, mesh));
            for address in &service.addresses {
                owners.insert(*address, Owner::Service(Arc::clone(&routes)));
            }
        }
        let externals = externals_of(externals, &owners, mesh, problems);
        Self { owners, expected, headless, externals }
    }

    pub(super) fn owner(&self, address: IpAddr) -> Option<&Owner> {
        self.owners.get(&address.to_canonical())
    }

    /// The service, and its port, for which a workload's port is dialled by the workload's own address.
    pub(super) fn headless(&self, workload: &ObjectName, port: u16) -> Option<(&ObjectName, u16)> {
        let (service, port) = self.headless.get(&(workload.clone(), port))?;
        Some((service, *port))
    }

    /// What a client's namespace, or else the root namespace, says of an address outside the mesh.
    pub(super) fn external(&self, client: &Workload, mesh: &Mesh, address: IpAddr) -> Option<&External> {
        if self.externals.is_empty() {
            return None;
        }
        let root: Arc<str> = mesh.root_namespace.as_str().into();
        let known = |namespace: Arc<str>| self.externals.get(&(namespace, address.to_canonical()));
        known(Arc::clone(&client.name.namespace)).or_else(|| known(root)).map(|external| &**external)
    }

    /// Who may answer where a service or a workload was asked for (policy D-2); `None`: nobody is known.
    pub(super) fn may_answer(&self, target: SocketAddr, endpoint: SocketAddr) -> Option<Allowed> {
        let of_workload = |address: SocketAddr| match self.owner(address.ip())? {
            Owner::Pod(workload) => self.expected(&workload.name),
            Owner::Host(ports) => self.expected(&ports.get(&address.port())?.name),
            Owner::Service(service) => Some(&service.allowed),
        };
        let set = of_workload(target).or_else(|| of_workload(endpoint))?;
        Some(Arc::clone(set)).filter(|set| !set.is_empty())
    }

    pub(super) fn expected(&self, workload: &ObjectName) -> Option<&Allowed> {
        self.expected.get(workload)
    }
}

impl ServiceRoutes {
    fn build(service: &Service, members: &[&Arc<Workload>], named: Vec<SpiffeId>, mesh: &Mesh) -> Self {
        let mut ports = BTreeMap::new();
        let mut behind: BTreeSet<&ObjectName> = BTreeSet::new();
        for port in &service.ports {
            let mut endpoints = Endpoints::default();
            for workload in members {
                let Some(number) = target_port(workload, port) else { continue };
                behind.insert(&workload.name);
                endpoints.add(workload, number);
            }
            ports.insert(port.port, endpoints);
        }
        // D-2: the identities behind all ports of the service.
        let endpoints = members.iter().filter(|workload| behind.contains(&workload.name));
        let allowed = naming::answering(endpoints.map(|workload| &***workload), named, mesh);
        Self { name: service.name.clone(), ports, allowed }
    }

    pub(super) fn name(&self) -> &ObjectName {
        &self.name
    }

    pub(super) fn route(&self, source: &Workload, target: SocketAddr, seed: u64) -> Route {
        let service = || self.name.clone();
        let Some(endpoints) = self.ports.get(&target.port()) else {
            return Route::Refused(RouteRefusal::NoSuchServicePort {
                service: service(),
                port: target.port(),
            });
        };
        let Some(endpoint) = endpoints.choose(source, target.ip(), seed) else {
            return Route::Refused(RouteRefusal::NoEndpoints { service: service() });
        };
        if !endpoint.workload.enrolled {
            return Route::Passthrough { target: endpoint.address };
        }
        if self.allowed.is_empty() {
            return Route::Refused(RouteRefusal::SecureNamingEmpty(service())); // D-6
        }
        Route::Tunnel {
            destination: Arc::clone(&endpoint.workload),
            endpoint: endpoint.address,
            allowed: Arc::clone(&self.allowed),
            service: Some(service()),
        }
    }
}

impl Endpoints {
    /// The workload's first address of each family.
    fn add(&mut self, workload: &Arc<Workload>, port: u16) {
        let first = |is_family: fn(&&IpAddr) -> bool| workload.addresses.iter().find(is_family).copied();
        let endpoint =
            |address| Endpoint { workload: Arc::clone(workload), address: SocketAddr::new(address, port) };
        self.v4.extend(first(|address| address.is_ipv4()).map(endpoint));
        self.v6.extend(first(|address| address.is_ipv6()).map(endpoint));
    }

    /// Of the family that was dialled; else of the other one, if the source has an address of it too.
    fn choose(&self, source: &Workload, dialled: IpAddr, seed: u64) -> Option<&Endpoint> {
        let (own, other) = if dialled.is_ipv4() { (&self.v4, &self.v6) } else { (&self.v6, &self.v4) };
        let is_other = |address: &IpAddr| address.is_ipv4() != dialled.is_ipv4();
        let candidates = if own.is_empty() && source.addresses.iter().any(is_other) { other } else { own };
        if candidates.is_empty() {
            return None;
        }
        candidates.get(seed::index(seed, candidates.len()))
    }
}

/// Of several such services for one port, the first by name: they come in that order (policy A-4).
fn add_headless(
    headless: &mut BTreeMap<(ObjectName, u16), (ObjectName, u16)>,
    service: &Service,
    members: &[&Arc<Workload>],
) {
    for port in &service.ports {
        for workload in members {
            if let Some(number) = target_port(workload, port) {
                let at = (workload.name.clone(), number);
                headless.entry(at).or_insert_with(|| (service.name.clone(), port.port));
            }
        }
    }
}

/// By namespace and address. What the mesh owns is not outside it, and of two entries of a namespace the first by name counts.
fn externals_of(
    entries: &[(&External, &Source)],
    owners: &BTreeMap<IpAddr, Owner>,
    mesh: &Mesh,
    problems: &mut Vec<Problem>,
) -> BTreeMap<(Arc<str>, IpAddr), Arc<External>> {
    let mut known: BTreeMap<(Arc<str>, IpAddr), Arc<External>> = BTreeMap::new();
    for (entry, source) in entries {
        let external = Arc::new((*entry).clone());
        let of_endpoints = entry.endpoints.iter().map(|endpoint| endpoint.address);
        let own = entry.addresses.iter().copied();
        let addresses: Vec<IpAddr> =
            if entry.addresses.is_empty() { of_endpoints.collect() } else { own.collect() };
        for address in addresses {
            let at = (Arc::clone(&entry.name.namespace), address);
            let is_mesh =
                owners.contains_key(&address) || mesh.pod_ranges.iter().any(|range| range.contains(&address));
            let taken =
                known.get(&at).map(|other| format!("{address} is told of by ServiceEntry {}", other.name));
            let of_mesh = is_mesh.then(|| format!("{address} is an address of the mesh"));
            match taken.or(of_mesh) {
                None => {
                    known.insert(at, Arc::clone(&external));
                }
                Some(reason) => problems.push(Problem {
                    file: Arc::clone(&source.file),
                    index: Some(source.index),
                    object: format!("ServiceEntry {}", entry.name),
                    field: "spec.addresses".to_owned(),
                    reason: format!("{reason}, and is left out here: give each address one meaning"),
                }),
            }
        }
    }
    known
}

/// Where a connection to an address of a host outside the mesh goes. A port of which the entry says nothing is left alone.
pub(super) fn external_endpoint(
    external: &External,
    source: &Workload,
    target: SocketAddr,
    seed: u64,
) -> Option<SocketAddr> {
    let Some(port) = external.ports.iter().find(|port| port.number == target.port()) else {
        return Some(target);
    };
    if external.endpoints.is_empty() {
        return Some(SocketAddr::new(target.ip(), port.target));
    }
    let of_family = |is_v4: bool| {
        let endpoints = external.endpoints.iter().filter(move |endpoint| endpoint.address.is_ipv4() == is_v4);
        endpoints.collect::<Vec<_>>()
    };
    let dialled = target.ip().is_ipv4();
    let mut candidates = of_family(dialled);
    if candidates.is_empty() && source.addresses.iter().any(|address| address.is_ipv4() != dialled) {
        candidates = of_family(!dialled);
    }
    if candidates.is_empty() {
        return None;
    }
    let endpoint = candidates.get(seed::index(seed, candidates.len()))?;
    let named = port.name.as_ref().and_then(|name| endpoint.ports.get(name));
    Some(SocketAddr::new(endpoint.address, named.copied().unwrap_or(port.target)))
}

/// The port on which this workload serves a port of the service, if it does.
fn target_port(workload: &Workload, port: &ServicePort) -> Option<u16> {
    let mut declared = workload.ports.iter();
    match &port.target {
        TargetPort::Name(name) => {
            declared.find(|port| port.name.as_deref() == Some(name)).map(|port| port.port)
        }
        // A host's address is shared: an undeclared port is another one's.
        TargetPort::Number(number) if workload.is_host() => {
            declared.find(|port| port.port == *number).map(|port| port.port)
        }
        TargetPort::Number(number) => Some(*number),
    }
}

fn own(owners: &mut BTreeMap<IpAddr, Owner>, workload: &Arc<Workload>) {
    for address in &workload.addresses {
        if !workload.is_host() {
            owners.insert(*address, Owner::Pod(Arc::clone(workload)));
            continue;
        }
        let owner = owners.entry(*address).or_insert_with(|| Owner::Host(BTreeMap::new()));
        if let Owner::Host(ports) = owner {
            ports.extend(workload.ports.iter().map(|port| (port.port, Arc::clone(workload))));
        }
    }
}

fn problem(source: &Source, kind: &str, name: &ObjectName, unusable: Unusable) -> Problem {
    Problem {
        file: Arc::clone(&source.file),
        index: Some(source.index),
        object: format!("{kind} {name}"),
        field: format!("metadata.annotations.{}", unusable.annotation),
        reason: unusable.reason,
    }
}

/// Workloads by namespace and one label: a service looks only at those that carry its rarest label.
struct ByLabel<'a>(BTreeMap<(&'a str, &'a str, &'a str), Vec<&'a Arc<Workload>>>);

impl<'a> ByLabel<'a> {
    fn build(workloads: &'a BTreeMap<ObjectName, Arc<Workload>>) -> Self {
        let mut index: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for workload in workloads.values() {
            for (key, value) in &workload.labels {
                let at = (&*workload.name.namespace, key.as_str(), value.as_str());
                index.entry(at).or_default().push(workload);
            }
        }
        Self(index)
    }

    /// Workloads of the service's namespace that carry all its labels; none where it asks for none.
    fn select(&self, service: &Service) -> Vec<&'a Arc<Workload>> {
        let namespace = &service.name.namespace;
        let carriers = service.selector.iter().map(|(key, value)| self.with(namespace, key, value));
        let rarest = carriers.min_by_key(|workloads| workloads.len());
        let has_all = |workload: &&&Arc<Workload>| {
            service.selector.iter().all(|(key, value)| workload.labels.get(key) == Some(value))
        };
        rarest.unwrap_or_default().iter().filter(has_all).copied().collect()
    }

    fn with<'s>(&'s self, namespace: &'s str, key: &'s str, value: &'s str) -> &'s [&'a Arc<Workload>] {
        self.0.get(&(namespace, key, value)).map_or(&[], Vec::as_slice)
    }
}
