//! The stage: two nodes, the three tiers, a worker of the backend's account on the store's node, two pods that no mesh knows, and
//! how one asks another.
//!
//! The visitor is on the store's node: what it says in the clear, by its own choice, does not cross the wire.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use world::World;
use world::node::Node;
use world::pod::{Plan, Pod};
use world::process::Process;
use world::wire::Capture;

use crate::report::Outcome;
use crate::{Expected, Scene};

/// The mesh and its policy, as an operator's folder has them.
const MESH: &str = include_str!("../../deploy/host/example/mesh.d/mesh.yaml");
const POLICY: &str = include_str!("../../deploy/host/example/mesh.d/policy.yaml");

/// The services' addresses; the pods' are the world's choice.
const SERVICES: &str = "\
apiVersion: v1
kind: Service
metadata: {name: photo-backend, namespace: photo}
spec: {clusterIP: 10.96.0.20, selector: {app: photo-backend}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: datastore, namespace: datastore}
spec: {clusterIP: 10.96.0.30, selector: {app: datastore}, ports: [{name: http, port: 80, targetPort: 8080}]}
";

const PORT: u16 = 8080;

/// A record follows its connection's end within milliseconds.
const RECORD_TIME_MAX: Duration = Duration::from_secs(10);

/// From start to listening.
const SERVICE_TIME_MAX: Duration = Duration::from_secs(20);

pub(crate) struct Stage {
    marker: String,
    nodes: [Arc<Node>; 2],
    pods: BTreeMap<&'static str, Arc<Pod>>,
    // Before the world: services end before their namespaces go.
    services: Vec<Process>,
    world: World,
}

impl Stage {
    pub(crate) fn set() -> Self {
        println!("two nodes, a wire between them, and a certificate authority …");
        let world = World::new();
        let nodes = [world.node("node-a"), world.node("node-b")];
        let [a, b] = &nodes;
        let pods = BTreeMap::from([
            ("photo-frontend", world.pod(a, Plan::new("photo", "photo-frontend").port("http", PORT))),
            ("photo-backend", world.pod(b, Plan::new("photo", "photo-backend").port("http", PORT))),
            ("datastore", world.pod(a, Plan::new("datastore", "datastore").port("http", PORT))),
            (
                "photo-worker",
                world.pod(a, Plan::new("photo", "photo-worker").account("photo-backend").port("http", PORT)),
            ),
            ("visitor", world.pod(a, Plan::new("elsewhere", "visitor").outside())),
            ("neighbour", world.pod(b, Plan::new("elsewhere", "neighbour").outside())),
        ]);
        let documents = world.documents();
        for (file, text) in [("mesh.yaml", MESH), ("services.yaml", SERVICES), ("policy.yaml", POLICY)] {
            documents.put(file, text);
        }
        let marker = format!("photo-{}", std::process::id());
        let mut stage = Self { marker, nodes, pods, services: Vec::new(), world };
        println!("the photo example's services: ordinary HTTP servers …");
        stage.start_services();
        println!("culvert-ca, a join token for each node, culvert-node on both …");
        stage.world.start_ca();
        stage.world.start_daemons();
        println!("both nodes are ready\n");
        stage
    }

    fn start_services(&mut self) {
        let upstream = [("photo-backend", "http://10.96.0.30/")];
        for (name, pod) in &self.pods {
            let mut command = pod.namespace().command(pod.cgroup(), Path::new("python3"));
            command.arg(script("service.py")).args([*name, &PORT.to_string(), &self.marker]);
            command.args(upstream.iter().filter(|(tier, _)| tier == name).map(|(_, url)| url));
            let service = Process::start(name, &mut command).expect("python3 can be started");
            service.log().wait_from(0, "that it listens", SERVICE_TIME_MAX, |line| line == "listening");
            self.services.push(service);
        }
    }

    /// Between node-b and the wire: all that passes between the nodes.
    pub(crate) fn capture(&self) -> Capture {
        self.world.capture(&self.nodes[1], &self.marker)
    }

    /// Plays one scene and reads its record from the access log of the node that judged it.
    pub(crate) fn play<'scene>(&self, scene: &'scene Scene) -> Outcome<'scene> {
        let destination = &self.pods[scene.to];
        let log = destination_node(&self.nodes, destination).log();
        let before = log.position();
        let address = match (scene.from, scene.to) {
            // By the pod's own address: the kernel alone can join them.
            ("visitor" | "photo-worker", _) => format!("{}:{PORT}", destination.v4()),
            (_, "datastore") => "10.96.0.30".to_owned(),
            _ => "10.96.0.20".to_owned(),
        };
        let (answered, said) = self.ask(scene.from, &format!("http://{address}{}", scene.path));
        let source = self.pods[scene.from].v4().to_string();
        let record = log.try_wait_from(before, RECORD_TIME_MAX, |line| {
            line["target"] == "access"
                && line["destination"]["workload"] == scene.to
                && line["source"]["address"].as_str().is_some_and(|from| from.starts_with(&source))
        });
        let as_expected = match scene.expected {
            // The service says whom it saw: the caller's true address.
            Expected::Answer => answered && said.contains(&self.marker) && said.contains(&source),
            Expected::Refusal(reason) => {
                !answered
                    && !said.contains(&self.marker)
                    && record.as_ref().is_some_and(|line| line["reason"] == reason)
            }
        };
        Outcome { scene, said, record: record.unwrap_or(Value::Null), as_expected }
    }

    /// Two pods that the mesh does not know, on two nodes: the same request in the clear.
    pub(crate) fn ask_without_mesh(&self) {
        let (answered, said) =
            self.ask("neighbour", &format!("http://{}:{PORT}/", self.pods["visitor"].v4()));
        assert!(answered, "pods outside the mesh reach each other: {said}");
    }

    fn ask(&self, from: &str, url: &str) -> (bool, String) {
        let pod = &self.pods[from];
        let done = pod
            .namespace()
            .command(pod.cgroup(), Path::new("python3"))
            .arg(script("ask.py"))
            .arg(url)
            .output()
            .expect("python3 can be started");
        (done.status.success(), String::from_utf8_lossy(&done.stdout).trim().to_owned())
    }

    pub(crate) fn say_what_to_try(&self) {
        let root = self.nodes[0].root();
        let culvert = world::binary("culvert");
        let frontend = &self.pods["photo-frontend"];
        println!(
            "\nIt is left running. Try, in another terminal:
  {culvert} --root {root} status
  nsenter --net={netns} sh -c 'echo $$ > {cgroup}/cgroup.procs; exec python3 {ask} http://10.96.0.20/deeper'
  edit {root}/etc/culvert/mesh.d/policy.yaml, and see the next request judged by it
Ctrl-C ends it and takes everything away.",
            culvert = culvert.display(),
            root = root.display(),
            netns = frontend.netns_path().display(),
            cgroup = frontend.cgroup().path().display(),
            ask = script("ask.py").display(),
        );
    }
}

fn destination_node<'nodes>(nodes: &'nodes [Arc<Node>; 2], destination: &Pod) -> &'nodes Node {
    nodes.iter().find(|node| node.name() == destination.node().name()).expect("a pod runs on one of them")
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo").join(name)
}
