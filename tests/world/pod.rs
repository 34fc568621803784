//! A workload: a pod with a namespace of its own, or a service on a host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use crate::TRUST_DOMAIN;
use crate::app::App;
use crate::cgroup::Cgroup;
use crate::namespace::Namespace;
use crate::node::Node;

/// What a workload shall be.
#[derive(Debug, Clone)]
pub struct Plan {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) service_account: String,
    pub(crate) ports: Vec<(String, u16)>,
    pub(crate) enrolled: bool,
    pub(crate) extra: String,
    pub(crate) inside: Option<Arc<Pod>>,
}

impl Plan {
    /// An enrolled workload whose service account and label `app` carry its name.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            service_account: name.to_owned(),
            ports: Vec::new(),
            enrolled: true,
            extra: String::new(),
            inside: None,
        }
    }

    /// Runs as another service account.
    pub fn account(mut self, account: &str) -> Self {
        account.clone_into(&mut self.service_account);
        self
    }

    /// Has a named port.
    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push((name.to_owned(), port));
        self
    }

    /// Nobody tells the mesh of it.
    pub fn outside(mut self) -> Self {
        self.enrolled = false;
        self
    }

    /// Runs in the control group of another, as a container in a pod's container does.
    pub fn inside(mut self, outer: &Arc<Pod>) -> Self {
        self.inside = Some(outer.clone());
        self
    }

    /// More lines of the document's `spec`, each indented by two blanks.
    pub fn with(mut self, lines: &str) -> Self {
        self.extra.push_str(lines);
        self
    }
}

/// Where a workload runs.
#[derive(Debug)]
pub(crate) enum Place {
    /// In a namespace of its own.
    Pod(Namespace),
    /// In the node's namespace.
    Host,
}

/// A running workload. Its application's commands are its own.
#[derive(Debug)]
pub struct Pod {
    pub(crate) plan: Plan,
    pub(crate) node: Arc<Node>,
    pub(crate) place: Place,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
    // Before the group: a group is removed when its processes have ended.
    pub(crate) app: App,
    pub(crate) cgroup: Cgroup,
}

impl Pod {
    /// As in its document.
    pub fn name(&self) -> &str {
        &self.plan.name
    }

    /// The node it runs on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The network namespace of its sockets.
    pub fn namespace(&self) -> &Namespace {
        match &self.place {
            Place::Pod(namespace) => namespace,
            Place::Host => self.node.namespace(),
        }
    }

    /// Its control group.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Its address.
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    /// Its address.
    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// Its address of a family.
    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// A port at its address of a family.
    pub fn at(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(family), port)
    }

    /// Its SPIFFE id.
    pub fn identity(&self) -> String {
        format!("spiffe://{TRUST_DOMAIN}/ns/{}/sa/{}", self.plan.namespace, self.plan.service_account)
    }

    /// The name of the file with its document.
    pub fn document_file(&self) -> String {
        format!("workload-{}-{}.yaml", self.plan.namespace, self.plan.name)
    }

    /// Its document.
    pub fn document(&self) -> String {
        let place = match &self.place {
            Place::Pod(namespace) => format!("networkNamespace: {}", namespace.path().display()),
            Place::Host => format!("cgroup: {}", self.cgroup.path().display()),
        };
        self.document_of(self.node.name(), &place)
    }

    /// A document for it that claims another node or place.
    pub fn document_of(&self, node: &str, place: &str) -> String {
        let Plan { name, namespace, service_account, ports, extra, .. } = &self.plan;
        let ports: String =
            ports.iter().map(|(name, port)| format!("  - {{name: {name}, port: {port}}}\n")).collect();
        let ports = if ports.is_empty() { String::new() } else { format!("  ports:\n{ports}") };
        format!(
            "apiVersion: culvert.io/v1alpha1
kind: Workload
metadata:
  name: {name}
  namespace: {namespace}
  labels: {{app: {name}}}
spec:
  serviceAccount: {service_account}
  node: {node}
  addresses: [\"{v4}\", \"{v6}\"]
  {place}
{ports}{extra}",
            v4 = self.v4,
            v6 = self.v6,
        )
    }

    /// The file of its namespace.
    pub fn netns_path(&self) -> PathBuf {
        self.namespace().path().to_owned()
    }
}

impl Deref for Pod {
    type Target = App;

    fn deref(&self) -> &App {
        &self.app
    }
}

/// The two families of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Both, for a loop.
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
