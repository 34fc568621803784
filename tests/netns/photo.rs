//! The mesh in which most scenarios play: three tiers of a photo service on two nodes, and people from outside.
//!
//! ```text
//!   node-a  photo-frontend, photo-backend (enrolled), stranger (a pod nobody enrolled)
//!   node-b  datastore (enrolled)
//!   node-c  a machine without a daemon, with the server "outside"
//! ```

use std::net::SocketAddr;
use std::sync::Arc;

use world::app::Listener;
use world::node::Node;
use world::pod::{Family, Plan, Pod};
use world::protocol::{Listen, Mode};
use world::{World, at};

/// Ports of the datastore, one for each way to serve.
pub(crate) const ECHO: u16 = 9000;
pub(crate) const BULK: u16 = 9001;
pub(crate) const GREET: u16 = 9002;
pub(crate) const FAREWELL: u16 = 9003;
pub(crate) const HTTP: u16 = 9004;
pub(crate) const HOLD: u16 = 9005;
pub(crate) const SINK: u16 = 9006;

/// Nobody listens here.
pub(crate) const CLOSED: u16 = 9099;

/// Addresses of the service `datastore`.
const SERVICE_V4: &str = "10.96.0.10";
const SERVICE_V6: &str = "fd00:96::10";

/// In every plaintext that shall not be seen on the wire.
pub(crate) const NEEDLE: &str = "a needle that nobody on the wire may see ";

/// Mesh, namespaces and services.
pub(crate) const GROUND: &str = "apiVersion: culvert.io/v1alpha1
kind: Mesh
metadata: {name: default}
spec: {trustDomain: cluster.local, podRanges: [\"10.8.0.0/16\", \"fd00:8::/32\"]}
---
apiVersion: v1
kind: Namespace
metadata: {name: photo}
---
apiVersion: v1
kind: Namespace
metadata: {name: datastore}
---
apiVersion: v1
kind: Service
metadata: {name: datastore, namespace: datastore}
spec:
  selector: {app: datastore}
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, \"fd00:96::10\"]
  ports:
  - {name: tcp-echo, port: 9000}
  - {name: http-page, port: 80, targetPort: 9004}
---
apiVersion: v1
kind: Service
metadata: {name: photo-backend, namespace: photo}
spec:
  selector: {app: photo-backend}
  clusterIP: 10.96.0.20
  clusterIPs: [10.96.0.20, \"fd00:96::20\"]
  ports: [{name: http, port: 8080}]
";

/// The mesh, started.
#[derive(Debug)]
pub(crate) struct Photo {
    pub(crate) a: Arc<Node>,
    pub(crate) b: Arc<Node>,
    pub(crate) frontend: Arc<Pod>,
    pub(crate) backend: Arc<Pod>,
    pub(crate) datastore: Arc<Pod>,
    pub(crate) stranger: Arc<Pod>,
    pub(crate) outside: Arc<Pod>,
    pub(crate) listeners: Listeners,
    // Last: everything else is in it.
    pub(crate) world: World,
}

/// What the datastore listens on.
#[derive(Debug)]
pub(crate) struct Listeners {
    pub(crate) echo: Listener,
    pub(crate) farewell: Listener,
    pub(crate) http: Listener,
}

impl Photo {
    /// With these documents beside the ground: file name and text.
    #[track_caller]
    pub(crate) fn start(documents: &[(&str, &str)]) -> Self {
        let photo = Self::prepare(documents);
        photo.world.start_ca();
        photo.world.start_daemons_of(&[&photo.a, &photo.b]);
        photo
    }

    /// The same with neither CA nor daemons running.
    #[track_caller]
    pub(crate) fn prepare(documents: &[(&str, &str)]) -> Self {
        let world = World::new();
        let (a, b, c) = (world.node("node-a"), world.node("node-b"), world.node("node-c"));
        let frontend = world.pod(&a, Plan::new("photo", "photo-frontend").port("http", 8080));
        let backend = world.pod(&a, Plan::new("photo", "photo-backend").port("http", 8080));
        let mut plan = Plan::new("datastore", "datastore").port("tcp-echo", ECHO).port("http-page", HTTP);
        for (name, port) in [("tcp-bulk", BULK), ("tcp-greet", GREET), ("tcp-bye", FAREWELL)] {
            plan = plan.port(name, port);
        }
        let datastore = world.pod(&b, plan);
        let stranger = world.pod(&a, Plan::new("photo", "stranger").outside());
        let outside = world.host(&c, Plan::new("nowhere", "outside").outside());
        world.documents().put("ground.yaml", GROUND);
        for (file, text) in documents {
            world.documents().put(file, text);
        }
        backend.serve_http(8080, "photo-backend");
        backend.serve(ECHO, Mode::Echo);
        outside.serve(ECHO, Mode::Echo);
        let listeners = Listeners {
            echo: datastore.serve(ECHO, Mode::Echo),
            farewell: datastore.serve(FAREWELL, Mode::Farewell),
            http: datastore.serve_http(HTTP, "datastore"),
        };
        for (port, mode) in [(BULK, Mode::Bulk), (GREET, Mode::Greet), (HOLD, Mode::Hold), (SINK, Mode::Sink)]
        {
            datastore.serve(port, mode);
        }
        for loopback in ["127.0.0.1:9100", "[::1]:9100"] {
            datastore.listen(Listen::at(loopback.parse().expect("an address"), Mode::Greet));
        }
        Self { a, b, frontend, backend, datastore, stranger, outside, listeners, world }
    }

    /// The datastore's service.
    pub(crate) fn service(&self, family: Family, port: u16) -> SocketAddr {
        let address: std::net::IpAddr = match family {
            Family::V4 => SERVICE_V4.parse().expect("an address"),
            Family::V6 => SERVICE_V6.parse().expect("an address"),
        };
        at(address, port)
    }

    /// Writes a document on all nodes, and waits until both daemons have a snapshot with it.
    #[track_caller]
    pub(crate) fn apply(&self, file: &str, text: &str) {
        change([&self.a, &self.b], || self.world.documents().put(file, text));
    }

    /// Removes a document from all nodes, and waits until both daemons have a snapshot without it.
    #[track_caller]
    pub(crate) fn withdraw(&self, file: &str) {
        change([&self.a, &self.b], || self.world.documents().remove(file));
    }

    /// Starts what a case that failed has left dead.
    #[track_caller]
    pub(crate) fn revive(&self) {
        for node in [&self.a, &self.b] {
            if !node.runs() {
                node.start();
            }
        }
    }

    /// Removes a document from all nodes without waiting for anything.
    #[track_caller]
    pub(crate) fn withdraw_quietly(&self, file: &str) {
        self.world.documents().remove(file);
    }
}

/// Changes documents, and waits until the daemons of these nodes have a snapshot with them.
#[track_caller]
pub(crate) fn change(nodes: [&Node; 2], how: impl FnOnce()) {
    let watches = nodes.map(Node::watch);
    how();
    for watch in watches {
        watch.event("snapshot published", &[]);
    }
}
