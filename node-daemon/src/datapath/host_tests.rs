//! Services of a host among each other, and those who share its addresses with them (T-27).

use std::{net::IpAddr, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};

use super::testing::{Node, OWN_PORT, STRANGER, at, mesh};
use crate::certs::testing::Ca;

const SOON: Duration = Duration::from_secs(20);

/// Two addresses of the host.
const HOST: &str = "10.8.7.1";
const HOST_TOO: &str = "10.8.7.2";
const LEDGER: u16 = 7000;
/// Declared by two services, each at an address of its own.
const SHARED: u16 = 7100;

/// From where a local process may dial what.
const WAYS: [(&str, &str); 5] = [
    ("127.0.0.1", "127.0.0.1"),
    ("127.0.0.1", "127.0.0.53"),
    ("::1", "::1"),
    (HOST, "127.0.0.1"),
    ("127.0.0.1", HOST),
];

fn service(name: &str, address: &str, ports: &[u16]) -> Value {
    let ports: Vec<Value> = ports.iter().map(|port| json!({"port": port})).collect();
    json!({
        "apiVersion": "culvert.io/v1alpha1", "kind": "Workload",
        "metadata": {"name": name, "namespace": "photo", "labels": {"app": name}},
        "spec": {"serviceAccount": name, "node": "node-a", "addresses": [address],
                 "cgroup": format!("culvert/{name}"), "ports": ports},
    })
}

/// Only the clerk may reach the ledger.
fn clerk_only() -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "ledger", "namespace": "photo"},
        "spec": {"selector": {"matchLabels": {"app": "ledger"}}, "action": "ALLOW",
                 "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/photo/sa/clerk"]}}]}]},
    })
}

fn documents(mode: &str, more: &[Value]) -> Vec<Value> {
    let mut documents = vec![
        mesh(mode),
        service("ledger", HOST, &[LEDGER, SHARED, OWN_PORT]),
        service("clerk", HOST, &[]),
        service("guest", HOST_TOO, &[SHARED]),
    ];
    documents.extend_from_slice(more);
    documents
}

struct World {
    _ca: Ca,
    host: Arc<Node>,
}

impl World {
    fn new(documents: Vec<Value>) -> Self {
        let ca = Ca::new("mesh");
        let host = Node::host("node-a", ca.store(&["ledger", "clerk", "guest"]), documents);
        Self { _ca: ca, host }
    }

    /// The client dials `target` from its own side of it; what the ledger sees, and the client's end.
    async fn reached(&self, client: &str, target: &str) -> (TcpStream, TcpStream) {
        let target = at(target, LEDGER);
        let mut served: mpsc::Receiver<(TcpStream, IpAddr)> = self.host.ground.serve(target);
        let mut near = self.host.approach(client, target).await;
        near.write_all(b"ping").await.expect("open");
        let (mut far, seen) =
            timeout(SOON, served.recv()).await.expect("in time").expect("the service is reached");
        assert_eq!(seen.to_string(), client, "the true client");
        let mut read = [0; 4];
        timeout(SOON, far.read_exact(&mut read)).await.expect("in time").expect("open");
        assert_eq!(&read, b"ping");
        (near, far)
    }

    /// Nothing is delivered, and `reason` is counted.
    async fn refused(&self, client: &str, target: &str, port: u16, reason: &str) {
        let target = at(target, port);
        let _served = self.host.ground.serve(target);
        let before = self.host.ground.dials(target);
        let mut near = self.host.approach(client, target).await;
        // Whoever is refused without being heard may have reset the connection already.
        let _ = near.write_all(b"ping").await;
        let read = timeout(SOON, near.read(&mut [0; 1])).await.expect("in time");
        assert!(read.is_err(), "{client} to {target}: a reset, never an orderly end");
        assert_eq!(self.host.ground.dials(target), before, "{client} to {target}");
        self.host.until_counted(&["culvert_denials_total", "inbound", reason]).await;
    }
}

#[tokio::test]
async fn under_strict_a_process_of_nobody_is_refused_at_loopback() {
    let world = World::new(documents("STRICT", &[]));
    for (client, target) in WAYS {
        world.refused(client, target, LEDGER, "plaintext_refused").await;
    }
}

#[tokio::test]
async fn a_service_of_the_host_is_itself_at_loopback() {
    let world = World::new(documents("STRICT", &[clerk_only()]));
    for (client, target) in WAYS {
        world.host.ground.opens("clerk");
        let (near, far) = world.reached(client, target).await;
        drop((near, far));
    }
    world.host.until_counted(&["istio_tcp_connections_opened_total", "sa/clerk", "sa/ledger"]).await;
    // The policy of the one that declares the port judges the other.
    world.host.ground.opens("guest");
    world.refused("127.0.0.1", "127.0.0.1", LEDGER, "no_rule_allows").await;
}

#[tokio::test]
async fn under_permissive_a_process_of_nobody_is_judged_without_an_identity() {
    let world = World::new(documents("PERMISSIVE", &[]));
    for (client, target) in [("127.0.0.1", "127.0.0.1"), ("::1", "::1")] {
        let (near, far) = world.reached(client, target).await;
        drop((near, far));
    }
    let world = World::new(documents("PERMISSIVE", &[clerk_only()]));
    world.refused("127.0.0.1", "127.0.0.1", LEDGER, "no_rule_allows").await;
}

#[tokio::test]
async fn loopback_is_never_reached_from_elsewhere() {
    for mode in ["STRICT", "PERMISSIVE"] {
        let world = World::new(documents(mode, &[]));
        world.refused(STRANGER, "127.0.0.1", LEDGER, "loop").await;
        world.refused("fd00::9", "::1", LEDGER, "loop").await;
        // Not even with a name that the kernel would never give it.
        world.host.ground.opens("clerk");
        world.refused(STRANGER, "127.0.0.1", LEDGER, "loop").await;
    }
}

#[tokio::test]
async fn a_port_that_belongs_to_nobody_or_to_two_or_to_the_daemon_is_not_delivered_to() {
    let world = World::new(documents("PERMISSIVE", &[]));
    for (target, port) in [
        ("127.0.0.1", 22),
        ("127.0.0.1", SHARED),
        // T-6: a delivery to the daemon's own listener would come back without end.
        ("127.0.0.1", OWN_PORT),
        (HOST, OWN_PORT),
    ] {
        world.refused("127.0.0.1", target, port, "loop").await;
    }
}

#[tokio::test]
async fn an_open_connection_at_loopback_is_judged_again() {
    let world = World::new(documents("STRICT", &[]));
    world.host.ground.opens("clerk");
    let (mut near, mut far) = world.reached("127.0.0.1", "127.0.0.1").await;
    world.host.publish(documents("STRICT", &[clerk_only()]));
    let current = world.host.shared.snapshot().number();
    while world.host.shared.live.views().iter().any(|view| view.snapshot < current) {
        tokio::task::yield_now().await;
    }
    far.write_all(b"pong").await.expect("open");
    let mut read = [0; 4];
    timeout(SOON, near.read_exact(&mut read)).await.expect("in time").expect("it keeps its right");
    let mut other = clerk_only();
    other["spec"]["rules"][0]["from"][0]["source"]["principals"][0] =
        "cluster.local/ns/photo/sa/guest".into();
    world.host.publish(documents("STRICT", &[other]));
    timeout(SOON, near.read(&mut read)).await.expect("in time").expect_err("it lost its right");
}
