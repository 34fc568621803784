//! What a mesh consists of, as the documents say it: workloads, services, namespaces, the mesh itself.
//!
//! These are values of the domain: [`crate::decode`] has checked their grammar, nobody checks again.

use std::{collections::BTreeMap, fmt, net::IpAddr, path::PathBuf, sync::Arc};

use ipnet::IpNet;
use spiffe_id::{SpiffeId, TrustDomain};

/// Namespace and name of an object; `namespace` is empty for cluster-scoped ones.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl ObjectName {
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(formatter, "{}", self.name)
        } else {
            write!(formatter, "{}/{}", self.namespace, self.name)
        }
    }
}

/// A pod, or a service on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    pub name: ObjectName,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub service_account: String,
    /// Composed from the mesh's trust domain, the namespace and the service account.
    pub identity: SpiffeId,
    pub node: String,
    /// At least one. For a pod its own addresses, for a host workload the host's.
    pub addresses: Vec<IpAddr>,
    pub placement: Placement,
    pub ports: Vec<WorkloadPort>,
    /// Inbound TCP ports that bypass the daemon (DESIGN 3.4.9).
    pub exempt_inbound_ports: Vec<u16>,
    /// False where a label says `culvert.io/mesh: disabled` (or `istio.io/dataplane-mode: none`):
    /// known, but not captured, and reached in plaintext.
    pub enrolled: bool,
}

impl Workload {
    pub fn is_host(&self) -> bool {
        !matches!(self.placement, Placement::NetworkNamespace(_))
    }

    /// Whether it may be asked for at `address` by those who share it: at one of its own, and a service of a host at
    /// loopback, too, by processes of that host (T-27).
    pub fn is_reached_at(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.addresses.contains(&address) || (self.is_host() && address.is_loopback())
    }
}

/// Where the workload is found on its own node; meaningless elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Path of a network namespace, such as `/run/netns/pb0`.
    NetworkNamespace(PathBuf),
    /// Folder beneath the cgroup2 mount, or an absolute path of one.
    Cgroup(PathBuf),
    /// Name of a systemd unit, such as `photo.service`.
    SystemdUnit(String),
}

/// A port on which the workload listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadPort {
    pub name: Option<String>,
    pub port: u16,
    pub protocol: Protocol,
}

/// What is spoken on a port (policy H-8): `appProtocol` first, then the name's prefix; else opaque.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Http,
    Grpc,
}

/// A Kubernetes-shaped Service with a selector; its endpoints are derived from the workloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: ObjectName,
    pub annotations: BTreeMap<String, String>,
    /// Cluster addresses that applications dial; may be empty (headless).
    pub addresses: Vec<IpAddr>,
    /// Empty selects nothing.
    pub selector: BTreeMap<String, String>,
    pub ports: Vec<ServicePort>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    pub name: Option<String>,
    pub port: u16,
    pub target: TargetPort,
    pub protocol: Protocol,
}

/// A host that no workload of the mesh is, known by its addresses: a `ServiceEntry`. Only clients of its own namespace are
/// led by it, and by those of the root namespace all: a tenant must not redirect another's connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct External {
    pub name: ObjectName,
    /// In lower case, without wildcards.
    pub host: Arc<str>,
    /// Those that applications dial; empty: the endpoints' own.
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ExternalPort>,
    /// Where connections go; empty: to the address that was dialled.
    pub endpoints: Vec<ExternalEndpoint>,
    /// Names of which the server proves one (policy D-4); empty: the host's.
    pub subject_alt_names: Vec<String>,
    /// Of the mesh, served by proxies of others.
    pub is_internal: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalPort {
    pub number: u16,
    pub name: Option<String>,
    /// At the endpoints.
    pub target: u16,
    pub protocol: Protocol,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalEndpoint {
    pub address: IpAddr,
    /// By the name of a port, where they are others than the entry's.
    pub ports: BTreeMap<String, u16>,
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    Number(u16),
    /// The workload's port of this name.
    Name(String),
}

/// The `Mesh` document, or its defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    pub trust_domain: TrustDomain,
    pub trust_domain_aliases: Vec<TrustDomain>,
    pub root_namespace: String,
    pub default_mode: TransportMode,
    /// Where neither workload nor namespace says anything.
    pub same_node: SameNode,
    /// Whether a token without `exp` counts as expired (policy G-6).
    pub needs_token_expiry: bool,
    /// Nobody may speak as one of these, whatever the policy says (`barredIdentities`).
    pub barred_identities: Vec<SpiffeId>,
    /// Addresses inside these that nobody knows are held, then denied (DESIGN 3.4.9).
    pub pod_ranges: Vec<IpNet>,
}

/// How connections between two workloads of one node go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SameNode {
    /// By the kernel alone, where the policy can be decided on layer 4: in the clear, inside the node.
    Direct,
    /// By the daemon, always.
    Proxied,
}

impl SameNode {
    /// The word in documents and status.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Proxied => "proxied",
        }
    }
}

/// What a receiver accepts. Nothing at all in force is [`Mesh::default_mode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportMode {
    /// The tunnel or mesh TLS only.
    Strict,
    /// Plaintext too.
    Permissive,
    /// Plaintext too, and the peer's identity is hidden from rules (policy A-5, B-9).
    Disabled,
}
