//! Worlds of tests: two nodes of one mesh in one process. Sockets are loopback ones; who dials whom is written down, so
//! no privilege is needed.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::BoxFuture;
use node_core::{
    snapshot::Snapshot,
    store::{Store, Update},
    tunnel::TUNNEL_PORT,
    workload::ObjectName,
};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
};

use super::{
    Ground, Holds, Inputs, Limits, Shared,
    accept::{Accepted, Site},
    carry::Side as _,
    inbound, outbound,
};
use crate::{
    certs::{self, testing::Ca},
    jwks::{self, KeysConfig},
    net::DialError,
    telemetry::Sink,
};

/// Address of the client's pod on node a, of the server's pod on node b, of the service before it, and of nobody.
pub(super) const FRONTEND: &str = "10.8.1.4";
pub(super) const BACKEND: &str = "10.8.2.4";
pub(super) const SERVICE: &str = "10.9.0.10";
pub(super) const STRANGER: &str = "10.8.2.99";

pub(super) const LIMITS: Limits = Limits {
    connections_per_workload: 1_000,
    connections_per_node: 2_000,
    connections_reserved: 4,
    handshakes_per_workload: 8,
};

pub(super) fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().expect("an address"), port)
}

pub(super) fn workload(name: &str, node: &str, address: &str) -> Value {
    json!({
        "apiVersion": "culvert.io/v1alpha1", "kind": "Workload",
        "metadata": {"name": name, "namespace": "photo", "labels": {"app": name}},
        "spec": {"serviceAccount": name, "node": node, "addresses": [address],
                 "networkNamespace": format!("/run/netns/{name}"),
                 "ports": [{"name": "tcp", "port": 8080}]},
    })
}

pub(super) fn mesh(mode: &str) -> Value {
    json!({
        "apiVersion": "culvert.io/v1alpha1", "kind": "Mesh", "metadata": {"name": "default"},
        "spec": {"trustDomain": "cluster.local", "defaultMode": mode, "podRanges": ["10.8.0.0/16"]},
    })
}

pub(super) fn service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "backend", "namespace": "photo"},
        "spec": {"clusterIP": SERVICE, "selector": {"app": "backend"},
                 "ports": [{"name": "tcp", "port": 80, "targetPort": 8080}]},
    })
}

/// Only this account may reach the backend.
pub(super) fn allow(account: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "backend", "namespace": "photo"},
        "spec": {"selector": {"matchLabels": {"app": "backend"}}, "action": "ALLOW",
                 "rules": [{"from": [{"source": {"principals": [format!("cluster.local/ns/photo/sa/{account}")]}}]}]},
    })
}

/// The usual documents: both pods, the service, STRICT.
pub(super) fn usual() -> Vec<Value> {
    vec![
        mesh("STRICT"),
        workload("frontend", "node-a", FRONTEND),
        workload("backend", "node-b", BACKEND),
        service(),
    ]
}

/// One node with its one workload, and what its kernel would do.
pub(super) struct Node {
    pub(super) shared: Arc<Shared>,
    pub(super) site: Arc<Site>,
    pub(super) ground: Arc<Wires>,
    pub(super) events: Sink,
    store: Mutex<Store>,
    snapshots: watch::Sender<Arc<Snapshot>>,
}

/// The listeners' ports in this world: what is dialled there was not captured.
pub(super) const OWN_PORT: u16 = 40_000;

impl Node {
    pub(super) fn new(
        name: &str,
        workload: &str,
        credentials: Arc<certs::Store>,
        documents: Vec<Value>,
    ) -> Arc<Self> {
        Self::with(name, workload, credentials, documents, LIMITS)
    }

    pub(super) fn with(
        name: &str,
        workload: &str,
        credentials: Arc<certs::Store>,
        documents: Vec<Value>,
        limits: Limits,
    ) -> Arc<Self> {
        Self::at_site(name, (workload, false), credentials, documents, limits, BTreeMap::new())
    }

    /// With folders of files that rules of a namespace may name.
    pub(super) fn with_files(
        name: &str,
        workload: &str,
        credentials: Arc<certs::Store>,
        documents: Vec<Value>,
        folders: BTreeMap<String, PathBuf>,
    ) -> Arc<Self> {
        Self::at_site(name, (workload, false), credentials, documents, LIMITS, folders)
    }

    /// The site of a host with all of its services.
    pub(super) fn host(name: &str, credentials: Arc<certs::Store>, documents: Vec<Value>) -> Arc<Self> {
        Self::at_site(name, ("host", true), credentials, documents, LIMITS, BTreeMap::new())
    }

    fn at_site(
        name: &str,
        (workload, is_host): (&str, bool),
        credentials: Arc<certs::Store>,
        documents: Vec<Value>,
        limits: Limits,
        folders: BTreeMap<String, PathBuf>,
    ) -> Arc<Self> {
        let keys = KeysConfig {
            allow: vec!["127.0.0.0/8".parse().expect("a range")],
            http: true,
            ..KeysConfig::default()
        };
        let mut store = Store::new(name, "cluster.local".parse().expect("a trust domain"));
        let problems = store.apply(Update::replace("mesh.yaml", documents));
        assert_eq!(problems, [], "the documents of the test are good");
        let (snapshots, receiver) = watch::channel(store.snapshot());
        let events = Sink::new();
        let shared = Arc::new(Shared::new(&Inputs {
            snapshots: receiver,
            credentials,
            files: certs::ClientFiles::new(folders, events.clone()),
            keys: jwks::Store::start(keys, events.clone()).expect("no file of roots is given"),
            workloads: mpsc::channel(1).1,
            events: events.clone(),
            limits,
            holds: Holds::default(),
        }));
        tokio::spawn(Arc::clone(&shared.live).follow(shared.snapshots.clone()));
        let ground = Arc::new(Wires::default());
        let place = Arc::clone(&ground) as Arc<dyn Ground>;
        let site = Arc::new(Site::new(ObjectName::new("photo", workload), is_host, place, &shared));
        Arc::new(Self { shared, site, ground, events, store: Mutex::new(store), snapshots })
    }

    /// Other documents, without telling anybody yet.
    pub(super) fn compile(&self, documents: Vec<Value>) -> Arc<Snapshot> {
        let mut store = self.store.lock().expect("no panic");
        let problems = store.apply(Update::replace("mesh.yaml", documents));
        assert_eq!(problems, [], "the documents of the test are good");
        store.snapshot()
    }

    pub(super) fn publish(&self, documents: Vec<Value>) {
        let snapshot = self.compile(documents);
        self.snapshots.send_replace(snapshot);
    }

    /// Documents of which some cannot be used.
    pub(super) fn publish_even_bad(&self, documents: Vec<Value>) {
        let mut store = self.store.lock().expect("no panic");
        store.apply(Update::replace("mesh.yaml", documents));
        self.snapshots.send_replace(store.snapshot());
    }

    /// The workload connects to `target`; its own end of the connection.
    pub(super) async fn connect(self: &Arc<Self>, client: &str, target: SocketAddr) -> TcpStream {
        let (own, captured) = pair().await;
        let accepted = self.accepted(captured, at(client, 33_000), target).await;
        let node = Arc::clone(self);
        node.shared.tasks.clone().spawn(async move {
            outbound::serve(&node.shared, &node.site, accepted, OWN_PORT).await;
        });
        own
    }

    /// Somebody connects to a port of the workload itself.
    pub(super) async fn approach(self: &Arc<Self>, client: &str, target: SocketAddr) -> TcpStream {
        let (own, captured) = pair().await;
        let accepted = self.accepted(captured, at(client, 33_000), target).await;
        let node = Arc::clone(self);
        node.shared.tasks.clone().spawn(async move {
            inbound::serve(&node.shared, &node.site, accepted, OWN_PORT).await;
        });
        own
    }

    /// Somebody connects to the tunnel port.
    pub(super) async fn tunnel_from(self: &Arc<Self>, client: SocketAddr, stream: TcpStream) {
        let accepted = self.accepted(stream, client, at(BACKEND, TUNNEL_PORT)).await;
        let node = Arc::clone(self);
        node.shared.tasks.clone().spawn(async move {
            inbound::serve_tunnel(&node.shared, &node.site, accepted).await;
        });
    }

    async fn accepted(&self, stream: TcpStream, client: SocketAddr, target: SocketAddr) -> Accepted {
        stream.arm();
        let place = self.site.place(&self.shared).await.expect("the limits of this world are never closed");
        Accepted { stream, client, target, place }
    }

    /// True once the counters have a line with all of these pieces.
    pub(super) fn counted(&self, pieces: &[&str]) -> bool {
        let text = self.events.metrics().text().expect("text");
        text.lines().any(|line| pieces.iter().all(|piece| line.contains(piece)))
    }

    /// Waits until the counters have such a line.
    pub(super) async fn until_counted(&self, pieces: &[&str]) {
        let seen = async {
            while !self.counted(pieces) {
                tokio::task::yield_now().await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(30), seen).await.is_err() {
            panic!("never counted {pieces:?}:\n{}", self.events.metrics().text().expect("text"));
        }
    }
}

/// What answers at an address.
#[derive(Clone)]
pub(super) enum Answer {
    /// The tunnel port of another node.
    Daemon(Arc<Node>),
    /// An ordinary server.
    Server(mpsc::Sender<(TcpStream, IpAddr)>),
    /// Nobody, silently.
    Nothing,
}

/// Where dials of a node lead. What is not written down is refused.
#[derive(Default)]
pub(super) struct Wires {
    answers: Mutex<BTreeMap<SocketAddr, Answer>>,
    dialled: Mutex<Vec<SocketAddr>>,
    /// On a host: whose the next connection is.
    opener: Mutex<Option<ObjectName>>,
}

impl Wires {
    pub(super) fn set(&self, address: SocketAddr, answer: Answer) {
        self.answers.lock().expect("no panic").insert(address, answer);
    }

    /// A server at `address`: each connection with the client that it sees.
    pub(super) fn serve(&self, address: SocketAddr) -> mpsc::Receiver<(TcpStream, IpAddr)> {
        let (sender, receiver) = mpsc::channel(64);
        self.set(address, Answer::Server(sender));
        receiver
    }

    /// On a host: the next connection is of a process of this workload.
    pub(super) fn opens(&self, workload: &str) {
        *self.opener.lock().expect("no panic") = Some(ObjectName::new("photo", workload));
    }

    /// Nobody answers there any more.
    pub(super) fn forget(&self, address: SocketAddr) {
        self.answers.lock().expect("no panic").remove(&address);
    }

    /// How often `address` was dialled.
    pub(super) fn dials(&self, address: SocketAddr) -> usize {
        self.dialled.lock().expect("no panic").iter().filter(|dialled| **dialled == address).count()
    }

    async fn reach(
        &self,
        from: IpAddr,
        target: SocketAddr,
        within: Duration,
    ) -> Result<TcpStream, DialError> {
        self.dialled.lock().expect("no panic").push(target);
        let answer = self.answers.lock().expect("no panic").get(&target).cloned();
        match answer {
            None => Err(DialError::Refused { target }),
            Some(Answer::Nothing) => {
                tokio::time::sleep(within).await;
                Err(DialError::TimedOut { target, within })
            }
            Some(Answer::Server(server)) => {
                let (near, far) = pair().await;
                server.send((far, from)).await.map_err(|_| DialError::Refused { target })?;
                Ok(near)
            }
            Some(Answer::Daemon(node)) => {
                let (near, far) = pair().await;
                node.tunnel_from(SocketAddr::new(from, 34_000), far).await;
                Ok(near)
            }
        }
    }
}

impl Ground for Wires {
    fn dial(
        &self,
        bind: Option<IpAddr>,
        target: SocketAddr,
        within: Duration,
    ) -> BoxFuture<'_, Result<TcpStream, DialError>> {
        Box::pin(async move { self.reach(bind.expect("always from an own address"), target, within).await })
    }

    fn deliver(
        &self,
        _workload: &ObjectName,
        client: IpAddr,
        target: SocketAddr,
        within: Duration,
    ) -> BoxFuture<'_, Result<TcpStream, DialError>> {
        Box::pin(self.reach(client, target, within))
    }

    fn origin(&self, _client: SocketAddr, _target: SocketAddr) -> io::Result<Option<ObjectName>> {
        Ok(None)
    }

    fn local_client(&self, _client: SocketAddr, _target: SocketAddr) -> io::Result<Option<ObjectName>> {
        Ok(self.opener.lock().expect("no panic").take())
    }
}

/// Both ends of a TCP connection.
pub(super) async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let address = listener.local_addr().expect("bound");
    let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (dialled.expect("it listens"), accepted.expect("it was dialled").0)
}

/// Node a with the frontend, node b with the backend, joined.
pub(super) struct World {
    pub(super) ca: Ca,
    pub(super) a: Arc<Node>,
    pub(super) b: Arc<Node>,
    /// Connections that reach the backend itself.
    pub(super) backend: mpsc::Receiver<(TcpStream, IpAddr)>,
}

impl World {
    pub(super) fn new(documents: Vec<Value>) -> Self {
        Self::of(documents, LIMITS)
    }

    pub(super) fn of(documents: Vec<Value>, limits: Limits) -> Self {
        let ca = Ca::new("mesh");
        let a = Node::with("node-a", "frontend", ca.store(&["frontend"]), documents.clone(), limits);
        let b = Node::with("node-b", "backend", ca.store(&["backend"]), documents, limits);
        a.ground.set(at(BACKEND, TUNNEL_PORT), Answer::Daemon(Arc::clone(&b)));
        let backend = b.ground.serve(at(BACKEND, 8080));
        Self { ca, a, b, backend }
    }

    /// The frontend connects to the service; both outer ends.
    pub(super) async fn connected(&mut self) -> (TcpStream, TcpStream) {
        let client = self.a.connect(FRONTEND, at(SERVICE, 80)).await;
        let (server, _) = self.backend.recv().await.expect("the backend is reached");
        (client, server)
    }
}
