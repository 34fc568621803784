//! Worlds to test in: nodes and pods are network namespaces joined by a bridge, with a control group each. The
//! kernel, the programs in it, the daemons and the CA are real.
//!
//! ```text
//!            wire (bridge br0, CA 10.9.0.1, capture)
//!           /                                       \
//!   node-a 10.9.0.11                          node-b 10.9.0.12
//!    | veth per pod                            |
//!   pod 10.8.1.2 fd00:8:1::2                  pod 10.8.2.2 fd00:8:2::2
//! ```
//!
//! Everything that a [`World`] makes carries its prefix (process id and counter) and is gone when it is dropped, also
//! by a panic; what a killed run left behind is removed by the next one. Root is needed, and its absence is a failure.
//! Nothing here decides what is right: that is the scenarios' business.

pub mod app;
pub mod attacker;
pub mod ca;
pub mod cgroup;
pub mod documents;
pub mod expect;
pub mod foreign;
mod http;
pub mod issuer;
pub mod metrics;
pub mod namespace;
pub mod node;
pub mod pod;
pub mod process;
pub mod protocol;
pub mod wire;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};

use anyhow::Result;

use crate::app::App;
use crate::ca::Ca;
use crate::cgroup::Cgroup;
use crate::documents::Documents;
use crate::namespace::Namespace;
use crate::node::Node;
use crate::pod::{Place, Plan, Pod};
use crate::wire::Capture;

/// The trust domain of every world.
pub const TRUST_DOMAIN: &str = "cluster.local";

/// Begins every name that a world gives away.
const MARK: &str = "cvtest";

/// The CA's address on the wire.
const CA_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);

static WORLDS: AtomicU32 = AtomicU32::new(0);
static SWEEP: Once = Once::new();

/// Nodes, pods, a wire, and perhaps a CA.
#[derive(Debug)]
pub struct World {
    prefix: String,
    folder: PathBuf,
    wire: Namespace,
    group: Option<Cgroup>,
    ca: Ca,
    nodes: Mutex<Vec<Arc<Node>>>,
    pods: Mutex<Vec<Arc<Pod>>>,
    pods_made: AtomicU8,
}

impl World {
    /// A wire with nothing on it.
    ///
    /// # Panics
    /// Without root, or if the kernel or a tool refuses something.
    #[track_caller]
    pub fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test makes network namespaces and loads programs into the kernel: run it as root"
        );
        SWEEP.call_once(sweep);
        Self::create().expect("a world can be made")
    }

    fn create() -> Result<Self> {
        let prefix = format!("{MARK}{}-{}", std::process::id(), WORLDS.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(&prefix);
        std::fs::create_dir(&folder)?;
        let group = Cgroup::top(&prefix)?;
        let wire = Namespace::create(&format!("{prefix}-wire"))?;
        wire.ip("link add br0 type bridge forward_delay 0
addr add 10.9.0.1/24 dev br0
addr add fd00:9::1/64 dev br0 nodad
link set br0 up")?;
        let ca = Ca::create(&folder, &group, CA_ADDRESS)?;
        Ok(Self {
            prefix,
            folder,
            wire,
            group: Some(group),
            ca,
            nodes: Mutex::default(),
            pods: Mutex::default(),
            pods_made: AtomicU8::new(0),
        })
    }

    /// The namespace of the bridge and of the CA.
    pub fn wire(&self) -> &Namespace {
        &self.wire
    }

    /// The CA; to be started by the scenario.
    pub fn ca(&self) -> &Ca {
        &self.ca
    }

    /// Starts the CA.
    #[track_caller]
    pub fn start_ca(&self) {
        self.ca.start(&self.wire);
    }

    /// Puts another node on the wire.
    ///
    /// # Panics
    /// If the kernel or a tool refuses something.
    #[track_caller]
    pub fn node(&self, name: &str) -> Arc<Node> {
        self.try_node(name).unwrap_or_else(|error| panic!("{name}: {error:#}"))
    }

    fn try_node(&self, name: &str) -> Result<Arc<Node>> {
        let mut nodes = locked(&self.nodes);
        let number = u8::try_from(nodes.len() + 1)?;
        let node = Node::create(&self.prefix, name, number, &self.folder, self.group(), self.ca.address())?;
        self.wire.ip(&format!(
            "link add w{number} type veth peer name eth0 netns {}
link set w{number} master br0 up",
            node.namespace().name()
        ))?;
        node.namespace().ip(&format!(
            "addr add {}/24 dev eth0
addr add {}/64 dev eth0 nodad
link set eth0 up
route add default via 10.9.0.1
route add default via fd00:9::1",
            node.v4(),
            node.v6()
        ))?;
        for other in nodes.iter() {
            join(&node, other)?;
            join(other, &node)?;
        }
        let node = Arc::new(node);
        nodes.push(node.clone());
        Ok(node)
    }

    /// Starts a pod on a node, and tells the mesh of it if the plan says so.
    ///
    /// # Panics
    /// If the kernel or a tool refuses something.
    #[track_caller]
    pub fn pod(&self, node: &Arc<Node>, plan: Plan) -> Arc<Pod> {
        let name = plan.name.clone();
        self.try_pod(node, plan).unwrap_or_else(|error| panic!("{name}: {error:#}"))
    }

    fn try_pod(&self, node: &Arc<Node>, plan: Plan) -> Result<Arc<Pod>> {
        // From 2 on: 1 is the gateway.
        let index = self.pods_made.fetch_add(1, Ordering::Relaxed) + 2;
        let (v4, v6) = pod_addresses(node.number(), index);
        let namespace = Namespace::create(&format!("{}-{}", self.prefix, plan.name))?;
        connect_pod(node, &namespace, index, v4, v6)?;
        let parent = plan.inside.as_ref().map_or_else(|| node.cgroup(), |outer| outer.cgroup());
        let cgroup = parent.below(&format!("pod-{}", plan.name))?;
        let app = App::start(&plan.name, &namespace, &cgroup)?;
        self.tell(Pod { plan, node: node.clone(), place: Place::Pod(namespace), v4, v6, app, cgroup })
    }

    /// Starts a service in the node's own namespace, in a control group of its own.
    ///
    /// # Panics
    /// If the kernel or a tool refuses something.
    #[track_caller]
    pub fn host(&self, node: &Arc<Node>, plan: Plan) -> Arc<Pod> {
        let name = plan.name.clone();
        self.try_host(node, plan).unwrap_or_else(|error| panic!("{name}: {error:#}"))
    }

    fn try_host(&self, node: &Arc<Node>, plan: Plan) -> Result<Arc<Pod>> {
        let cgroup = node.cgroup().below(&format!("host-{}", plan.name))?;
        let app = App::start(&plan.name, node.namespace(), &cgroup)?;
        let (v4, v6) = (node.v4(), node.v6());
        self.tell(Pod { plan, node: node.clone(), place: Place::Host, v4, v6, app, cgroup })
    }

    fn tell(&self, pod: Pod) -> Result<Arc<Pod>> {
        let pod = Arc::new(pod);
        if pod.plan.enrolled {
            self.documents().try_put(&pod.document_file(), &pod.document())?;
        }
        locked(&self.pods).push(pod.clone());
        Ok(pod)
    }

    /// Stops a pod and takes its namespace away, as a runtime does; its document stays.
    ///
    /// # Panics
    /// If somebody else still holds the pod.
    #[track_caller]
    pub fn remove_pod(&self, pod: Arc<Pod>) {
        locked(&self.pods).retain(|one| !Arc::ptr_eq(one, &pod));
        drop(Arc::into_inner(pod).expect("the scenario gives its only handle away"));
    }

    /// The documents of all nodes and of the CA.
    pub fn documents(&self) -> Documents {
        let mut folders: Vec<PathBuf> =
            locked(&self.nodes).iter().map(|node| node.root().join("etc/culvert/mesh.d")).collect();
        folders.push(self.folder.join("ca/etc/culvert/registry.d"));
        Documents::of(folders)
    }

    /// Gives every node a token and starts its daemon.
    ///
    /// # Panics
    /// If one does not become ready.
    #[track_caller]
    pub fn start_daemons(&self) {
        let nodes = locked(&self.nodes).clone();
        self.start_daemons_of(&nodes.iter().map(Arc::as_ref).collect::<Vec<_>>());
    }

    /// Gives each of these nodes a token and starts its daemon.
    ///
    /// # Panics
    /// If one does not become ready.
    #[track_caller]
    pub fn start_daemons_of(&self, nodes: &[&Node]) {
        for node in nodes {
            self.give_token(node);
            node.launch();
        }
        for node in nodes {
            node.wait_ready();
        }
    }

    /// Gives a node a join token of the CA.
    ///
    /// # Panics
    /// If the CA mints none.
    #[track_caller]
    pub fn give_token(&self, node: &Node) {
        let token = self.ca.token(node.name(), "1h").expect("the CA mints tokens");
        node.put_token(&token).expect("the world's folders are writable");
    }

    /// Captures what passes between a node and the wire.
    ///
    /// # Panics
    /// If a packet socket cannot be opened.
    #[track_caller]
    pub fn capture(&self, node: &Node, needle: &str) -> Capture {
        wire::start(&self.wire, &format!("w{}", node.number()), needle).expect("root may capture")
    }

    fn group(&self) -> &Cgroup {
        self.group.as_ref().expect("it is there until the world ends")
    }

    /// A folder of this world's own.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for World {
    /// Ends what runs, lets the daemons clean up, checks that they did, and removes the rest.
    fn drop(&mut self) {
        let mut left = Vec::new();
        for node in locked(&self.nodes).iter() {
            if let Err(error) = node.tear_down() {
                left.push(format!("{}: {error:#}", node.name()));
            }
        }
        self.ca.tear_down();
        let mut pods = std::mem::take(&mut *locked(&self.pods));
        while let Some(pod) = pods.pop() {
            drop(pod);
        }
        locked(&self.nodes).clear();
        drop(self.group.take());
        let _ = std::fs::remove_dir_all(&self.folder);
        if left.is_empty() {
            return;
        }
        let left = left.join("\n");
        if std::thread::panicking() {
            eprintln!("the world leaves something behind:\n{left}");
        } else {
            panic!("the world leaves something behind:\n{left}");
        }
    }
}

/// Routes from one node to the pods of another.
fn join(from: &Node, to: &Node) -> Result<()> {
    let number = to.number();
    from.namespace().ip(&format!(
        "route add 10.8.{number}.0/24 via {}
route add fd00:8:{number}::/64 via {}",
        to.v4(),
        to.v6()
    ))?;
    Ok(())
}

fn pod_addresses(node: u8, index: u8) -> (Ipv4Addr, Ipv6Addr) {
    let v6 = Ipv6Addr::new(0xfd00, 8, u16::from(node), 0, 0, 0, 0, u16::from(index));
    (Ipv4Addr::new(10, 8, node, index), v6)
}

/// A point-to-point link as many network plugins make it: the pod sees a gateway, the node a route per pod.
fn connect_pod(node: &Node, pod: &Namespace, index: u8, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<()> {
    let number = node.number();
    node.namespace().ip(&format!(
        "link add p{index} type veth peer name eth0 netns {}
addr add 10.8.{number}.1/32 dev p{index}
addr add fd00:8:{number}::1/128 dev p{index} nodad
link set p{index} up
route add {v4}/32 dev p{index}
route add {v6}/128 dev p{index}",
        pod.name()
    ))?;
    pod.ip(&format!(
        "addr add {v4}/32 dev eth0
addr add {v6}/128 dev eth0 nodad
link set eth0 up
route add 10.8.{number}.1/32 dev eth0
route add default via 10.8.{number}.1
route add fd00:8:{number}::1/128 dev eth0
route add default via fd00:8:{number}::1"
    ))?;
    Ok(())
}

/// A program of the workspace, found beside the test that runs.
///
/// # Panics
/// If it was not built.
pub fn binary(name: &str) -> PathBuf {
    let me = std::env::current_exe().expect("a running program has a path");
    let folder = me.parent().expect("a program is in a folder");
    let folder =
        if folder.ends_with("deps") { folder.parent().expect("deps is in a folder") } else { folder };
    let path = folder.join(name);
    assert!(path.exists(), "{} was not built: run the tests with `cargo xtask test`", path.display());
    path
}

/// Removes what runs left behind whose process is gone.
fn sweep() {
    for name in entries(Path::new(namespace::FOLDER)) {
        namespace::remove(&name);
    }
    if let Ok(mount) = cgroup::mount() {
        for name in entries(&mount) {
            cgroup::remove(&mount.join(name));
        }
    }
    let temporary = std::env::temp_dir();
    for name in entries(&temporary) {
        remove_folder(&temporary.join(name));
    }
}

/// Names of ours in a folder whose owner does not run.
fn entries(folder: &Path) -> Vec<String> {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| owner(name).is_some_and(|pid| !Path::new("/proc").join(pid).exists()))
        .collect()
}

/// The process id in a name of ours.
fn owner(name: &str) -> Option<&str> {
    let pid = name.strip_prefix(MARK)?.split('-').next()?;
    (!pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit())).then_some(pid)
}

/// A world's folder, with the bpf file systems that are mounted in it.
fn remove_folder(folder: &Path) {
    for node in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let _ = nix::mount::umount2(&node.path().join("bpf"), nix::mount::MntFlags::MNT_DETACH);
    }
    let _ = std::fs::remove_dir_all(folder);
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An address and a port, whichever the family.
pub fn at(ip: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_ours_have_an_owner() {
        assert_eq!(owner("cvtest123-0-wire"), Some("123"));
        assert_eq!(owner("cvtest"), None);
        assert_eq!(owner("cvtestx-0"), None);
        assert_eq!(owner("default"), None);
    }
}
