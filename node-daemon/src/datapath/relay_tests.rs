//! Two workloads of one node, joined by the daemon without a tunnel.

use std::{io, sync::Arc, time::Duration};

use node_core::{tunnel::TUNNEL_PORT, workload::ObjectName};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};

use super::{
    accept::{Limits, Site},
    ground::Ground,
    testing::{FRONTEND, LIMITS, Node, SERVICE, Wires, allow, at, mesh, service, workload},
};
use crate::certs::testing::Ca;

const BACKEND: &str = "10.8.1.5";

/// Long enough for anything that shall happen on this machine, short enough for a test that fails.
const SOON: Duration = Duration::from_secs(20);

fn documents(more: &[Value]) -> Vec<Value> {
    let mut documents = vec![
        mesh("STRICT"),
        workload("frontend", "node-a", FRONTEND),
        workload("backend", "node-a", BACKEND),
        service(),
    ];
    documents.extend_from_slice(more);
    documents
}

/// One node with both workloads, neither of which has a certificate.
struct Here {
    node: Arc<Node>,
    site: Arc<Site>,
    ground: Arc<Wires>,
    backend: mpsc::Receiver<(TcpStream, std::net::IpAddr)>,
}

impl Here {
    fn new(documents: Vec<Value>) -> Self {
        Self::with(documents, LIMITS)
    }

    fn with(documents: Vec<Value>, limits: Limits) -> Self {
        let node = Node::with("node-a", "frontend", Ca::new("ca").store(&[]), documents, limits);
        let ground = Arc::new(Wires::default());
        let backend = ground.serve(at(BACKEND, 8080));
        let name = ObjectName::new("photo", "backend");
        let place = Arc::clone(&ground) as Arc<dyn Ground>;
        let site = Arc::new(Site::new(name.clone(), false, place, &node.shared));
        node.shared.sites.insert(name, Arc::clone(&site));
        Self { node, site, ground, backend }
    }

    async fn connected(&mut self) -> (TcpStream, TcpStream) {
        let client = self.node.connect(FRONTEND, at(SERVICE, 80)).await;
        let (server, seen) = timeout(SOON, self.backend.recv()).await.expect("in time").expect("reached");
        assert_eq!(seen.to_string(), FRONTEND);
        (client, server)
    }

    async fn refused(&mut self, reason: &str) {
        let mut client = self.node.connect(FRONTEND, at(SERVICE, 80)).await;
        is_reset(&mut client).await;
        self.node.until_counted(&["culvert_denials_total", "outbound", reason]).await;
        assert!(self.backend.try_recv().is_err(), "nothing reached the workload");
        assert_eq!(self.ground.dials(at(BACKEND, 8080)), 0);
    }
}

async fn is_reset(stream: &mut TcpStream) {
    let read = timeout(SOON, stream.read(&mut [0; 16])).await.expect("it ends");
    assert_eq!(read.expect_err("never an orderly end").kind(), io::ErrorKind::ConnectionReset);
}

async fn exchange(client: &mut TcpStream, server: &mut TcpStream) {
    let mut read = [0; 4];
    client.write_all(b"ping").await.expect("open");
    timeout(SOON, server.read_exact(&mut read)).await.expect("in time").expect("open");
    server.write_all(b"pong").await.expect("open");
    timeout(SOON, client.read_exact(&mut read)).await.expect("in time").expect("open");
    assert_eq!(&read, b"pong");
}

#[tokio::test]
async fn one_relay_joins_them_without_a_certificate_and_counts_for_both() {
    let mut here = Here::new(documents(&[allow("frontend")]));
    let (mut client, mut server) = here.connected().await;
    exchange(&mut client, &mut server).await;
    drop(client);
    drop(server);
    for reporter in ["source", "destination"] {
        let reporter = format!("reporter=\"{reporter}\"");
        let pieces = [
            "istio_tcp_connections_closed_total",
            &reporter,
            "sa/frontend",
            "sa/backend",
            "path=\"relay\"",
            "connection_security_policy=\"none\"",
        ];
        here.node.until_counted(&pieces).await;
    }
    assert_eq!(here.node.ground.dials(at(BACKEND, TUNNEL_PORT)), 0, "no tunnel");
    assert_eq!(here.ground.dials(at(BACKEND, 8080)), 1);
}

#[tokio::test]
async fn the_destinations_policy_says_no_before_anything_is_dialled() {
    Here::new(documents(&[allow("somebody-else")])).refused("no_rule_allows").await;
}

#[tokio::test]
async fn a_destination_that_may_not_answer_for_the_service_is_not_reached() {
    let mut service = service();
    service["spec"]["selector"] = json!({"app": "backend"});
    let mut renamed = workload("backend", "node-a", BACKEND);
    renamed["metadata"]["annotations"] =
        json!({"alpha.istio.io/identity": "cluster.local/ns/photo/sa/somebody-else"});
    let documents = vec![mesh("STRICT"), workload("frontend", "node-a", FRONTEND), renamed, service];
    Here::new(documents).refused("secure_naming").await;
}

#[tokio::test]
async fn a_barred_identity_reaches_nobody_and_is_reached_by_nobody() {
    let mut barred = mesh("PERMISSIVE");
    for account in ["frontend", "backend"] {
        barred["spec"]["barredIdentities"] = json!([format!("spiffe://cluster.local/ns/photo/sa/{account}")]);
        let mut all = documents(&[]);
        all[0] = barred.clone();
        Here::new(all).refused("identity_barred").await;
    }
}

#[tokio::test]
async fn where_a_request_decides_each_one_is_judged() {
    let mut http = workload("backend", "node-a", BACKEND);
    http["spec"]["ports"] = json!([{"name": "http", "port": 8080}]);
    let only_get = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "backend", "namespace": "photo"},
        "spec": {"action": "ALLOW", "rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]},
    });
    let documents = vec![mesh("STRICT"), workload("frontend", "node-a", FRONTEND), http, service(), only_get];
    let mut here = Here::new(documents);
    let mut client = here.node.connect(FRONTEND, at(SERVICE, 80)).await;
    client.write_all(b"POST / HTTP/1.1\r\nHost: backend\r\nContent-Length: 0\r\n\r\n").await.expect("open");
    let mut answer = vec![0; 12];
    timeout(SOON, client.read_exact(&mut answer)).await.expect("in time").expect("answered");
    assert_eq!(answer, b"HTTP/1.1 403");
    for reporter in ["source", "destination"] {
        let reporter = format!("reporter=\"{reporter}\"");
        here.node.until_counted(&["istio_requests_total", "403", &reporter, "path=\"relay\""]).await;
    }
    assert!(here.backend.try_recv().is_err());
}

#[tokio::test]
async fn a_snapshot_that_takes_the_right_away_ends_it() {
    // T-18
    let mut here = Here::new(documents(&[]));
    let (mut client, mut server) = here.connected().await;
    here.node.publish(documents(&[allow("somebody-else")]));
    is_reset(&mut client).await;
    is_reset(&mut server).await;
    here.node.until_counted(&["culvert_denials_total", "outbound", "no_rule_allows"]).await;
}

#[tokio::test]
async fn a_snapshot_that_bars_either_end_ends_it() {
    for account in ["frontend", "backend"] {
        let mut here = Here::new(documents(&[]));
        let (mut client, mut server) = here.connected().await;
        let mut barred = documents(&[]);
        barred[0]["spec"]["barredIdentities"] =
            json!([format!("spiffe://cluster.local/ns/photo/sa/{account}")]);
        here.node.publish(barred);
        is_reset(&mut client).await;
        is_reset(&mut server).await;
        here.node.until_counted(&["culvert_denials_total", "identity_barred"]).await;
    }
}

#[tokio::test]
async fn either_end_that_leaves_ends_it() {
    for name in ["frontend", "backend"] {
        let mut here = Here::new(documents(&[]));
        let (mut client, mut server) = here.connected().await;
        here.node.shared.live.cut_workload(&ObjectName::new("photo", name));
        is_reset(&mut client).await;
        is_reset(&mut server).await;
    }
    let mut here = Here::new(documents(&[]));
    let (mut client, mut server) = here.connected().await;
    here.site.leave();
    is_reset(&mut client).await;
    is_reset(&mut server).await;
}

#[tokio::test]
async fn a_full_destination_takes_no_more_and_the_source_keeps_its_places() {
    // T-11
    let mut here = Here::new(documents(&[]));
    let mut shares = Vec::new();
    while let Ok(share) = here.site.share_now(&here.node.shared) {
        shares.push(share);
    }
    assert_eq!(shares.len(), LIMITS.connections_per_workload);
    here.refused_by_limit().await;
    shares.pop();
    let (mut client, mut server) = here.connected().await;
    exchange(&mut client, &mut server).await;
}

impl Here {
    async fn refused_by_limit(&mut self) {
        let mut client = self.node.connect(FRONTEND, at(SERVICE, 80)).await;
        is_reset(&mut client).await;
        self.node.until_counted(&["culvert_limits_total", "connections_per_workload_max"]).await;
    }
}

#[tokio::test]
async fn a_destination_that_is_not_enrolled_here_yet_is_tried_through_its_tunnel() {
    let node = Node::new("node-a", "frontend", Ca::new("ca").store(&["frontend"]), documents(&[]));
    let mut client = node.connect(FRONTEND, at(SERVICE, 80)).await;
    let tunnelled = async {
        while node.ground.dials(at(BACKEND, TUNNEL_PORT)) == 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, tunnelled).await.expect("the tunnel's port is dialled");
    client.shutdown().await.expect("open");
}
