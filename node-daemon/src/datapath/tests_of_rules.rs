//! What DestinationRules make of connections that leave (policy C, D, T-18, T-20): whom is spoken to, how, and who is refused.

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc, time::Duration};

use node_core::tunnel::TUNNEL_PORT;
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use super::testing::{BACKEND, FRONTEND, Node, SERVICE, World, at, mesh, service, usual, workload};
use crate::certs::{
    testing::{Ca, Outside, Span},
    verify::provider,
};

const SOON: Duration = Duration::from_secs(20);

/// Outside the mesh, as an entry tells of it.
const OUTSIDE: &str = "192.0.2.7";
const HOST: &str = "api.example.com";

fn entry() -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": "api", "namespace": "photo"},
        "spec": {"hosts": [HOST], "addresses": [OUTSIDE], "ports": [{"number": 443, "name": "tls"}]},
    })
}

fn rule(host: &str, tls: &Value) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1alpha3", "kind": "DestinationRule",
        "metadata": {"name": "rule", "namespace": "photo"},
        "spec": {"host": host, "trafficPolicy": {"tls": tls}},
    })
}

/// A frontend whose namespace was given a folder of files, and what stands outside.
struct Edge {
    node: Arc<Node>,
    folder: PathBuf,
    authority: Outside,
}

impl Drop for Edge {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Edge {
    fn new(name: &str, tls: &Value) -> Self {
        let folder = std::env::temp_dir().join(format!("culvert-rules-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let authority = Outside::new("outside");
        fs::write(folder.join("ca.pem"), &authority.root_pem).expect("written");
        let (chain, key) = authority.leaf(&["client.example"], &Span::good());
        fs::write(folder.join("client.pem"), chain).expect("written");
        fs::write(folder.join("key.pem"), key).expect("written");
        let documents = documents(tls);
        let folders = BTreeMap::from([("photo".to_owned(), folder.clone())]);
        let ca = Ca::new("mesh");
        let node = Node::with_files("node-a", "frontend", ca.store(&["frontend"]), documents, folders);
        Self { node, folder, authority }
    }

    /// A server of this authority, or of another one.
    fn server(&self, by: Option<&Outside>, names: &[&str], span: &Span, asks: bool) -> Arc<ServerConfig> {
        let (chain, key) = by.unwrap_or(&self.authority).leaf(names, span);
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<_, _>>().expect("PEM");
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("TLS 1.3");
        let builder = if asks {
            let mut roots = RootCertStore::empty();
            let root = CertificateDer::from_pem_slice(self.authority.root_pem.as_bytes()).expect("PEM");
            roots.add(root).expect("a root");
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
            builder.with_client_cert_verifier(verifier.build().expect("a root"))
        } else {
            builder.with_no_client_auth()
        };
        Arc::new(builder.with_single_cert(chain, key).expect("they fit"))
    }

    async fn connect(&self) -> TcpStream {
        self.node.connect(FRONTEND, at(OUTSIDE, 443)).await
    }
}

fn documents(tls: &Value) -> Vec<Value> {
    let mut documents = usual();
    documents.extend([entry(), rule(HOST, tls)]);
    documents
}

fn simple(more: &Value) -> Value {
    let mut tls = json!({"mode": "SIMPLE", "caCertificates": "ca.pem"});
    let map = tls.as_object_mut().expect("a map");
    map.extend(more.as_object().expect("a map").clone());
    tls
}

async fn is_reset(mut client: TcpStream) {
    let mut rest = Vec::new();
    let ended = timeout(SOON, client.read_to_end(&mut rest)).await.expect("in time");
    assert_eq!(ended.expect_err("never an orderly end").kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(rest, b"", "no byte from anywhere");
}

/// The server greets, reads a question, answers, and closes in order. What it saw of the client's name.
async fn serve(config: Arc<ServerConfig>, stream: TcpStream) -> (Option<String>, usize) {
    let mut stream = TlsAcceptor::from(config).accept(stream).await.expect("a handshake");
    let session = stream.get_ref().1;
    let seen = session.server_name().map(str::to_owned);
    let shown = session.peer_certificates().map_or(0, <[_]>::len);
    let mut question = [0; 4];
    stream.read_exact(&mut question).await.expect("a question");
    assert_eq!(&question, b"ping");
    stream.write_all(b"pong").await.expect("open");
    stream.shutdown().await.expect("open");
    (seen, shown)
}

async fn talk(mut client: TcpStream) {
    client.write_all(b"ping").await.expect("open");
    let mut answer = Vec::new();
    timeout(SOON, client.read_to_end(&mut answer)).await.expect("in time").expect("an orderly end");
    assert_eq!(answer, b"pong");
}

#[tokio::test]
async fn simple_and_mutual_speak_tls_with_the_files_and_names_of_the_rule() {
    let mutual = json!({"mode": "MUTUAL", "caCertificates": "ca.pem", "clientCertificate": "client.pem", "privateKey": "key.pem"});
    let table = [
        (simple(&json!({})), vec![HOST], false, HOST, 0),
        (simple(&json!({})), vec!["*.example.com"], false, HOST, 0),
        (simple(&json!({"sni": "other.example"})), vec!["other.example"], false, "other.example", 0),
        (simple(&json!({"subjectAltNames": ["a", "spiffe://x/y"]})), vec!["spiffe://x/y"], false, HOST, 0),
        (mutual.clone(), vec![HOST], true, HOST, 1),
        (mutual, vec![HOST], false, HOST, 0),
    ];
    for (number, (tls, names, asks, sni, shown)) in table.into_iter().enumerate() {
        let edge = Edge::new(&format!("good-{number}"), &tls);
        let mut reached = edge.node.ground.serve(at(OUTSIDE, 443));
        let client = edge.connect().await;
        let (server, seen) = reached.recv().await.expect("the server is reached");
        assert_eq!(seen.to_string(), FRONTEND);
        let config = edge.server(None, &names, &Span::good(), asks);
        let (seen, ()) = tokio::join!(serve(config, server), talk(client));
        assert_eq!(seen, (Some(sni.to_owned()), shown), "{tls}");
        edge.node.until_counted(&["istio_tcp_connections_closed_total", "source"]).await;
    }
}

/// Who stands at the other end.
enum Server {
    Tls { other_authority: bool, names: &'static [&'static str], span: fn() -> Span, asks: bool },
    Plaintext,
    Silent,
}

#[tokio::test]
async fn servers_that_do_not_prove_what_is_asked_get_no_byte() {
    // policy C, D-5
    let tls = |other_authority, names, span, asks| Server::Tls { other_authority, names, span, asks };
    let good = Span::good as fn() -> Span;
    let table: [(Value, Server, &str); 10] = [
        (json!({}), tls(true, &[HOST], good, false), "other_ca"),
        (json!({}), tls(false, &["other.example"], good, false), "secure_naming"),
        (json!({}), tls(false, &["*.com"], good, false), "secure_naming"),
        (json!({}), tls(false, &[HOST], Span::ended, false), "certificate_expired"),
        (json!({"subjectAltNames": ["api.example.co"]}), tls(false, &[HOST], good, false), "secure_naming"),
        (
            json!({"subjectAltNames": ["a.example.com"]}),
            tls(false, &["*.example.com"], good, false),
            "secure_naming",
        ),
        (json!({"sni": "other.example"}), tls(false, &[HOST], good, false), "secure_naming"),
        (json!({}), tls(false, &[HOST], good, true), "-"),
        (json!({}), Server::Plaintext, "-"),
        (json!({}), Server::Silent, "-"),
    ];
    for (number, (more, server, reason)) in table.into_iter().enumerate() {
        let edge = Edge::new(&format!("bad-{number}"), &simple(&more));
        let mut reached = edge.node.ground.serve(at(OUTSIDE, 443));
        let mut client = edge.connect().await;
        client.write_all(b"secret").await.expect("the application believes itself connected");
        let (mut stream, _) = reached.recv().await.expect("the server is reached");
        match server {
            Server::Tls { other_authority, names, span, asks } => {
                let other = Outside::new("other");
                let by = other_authority.then_some(&other);
                let config = edge.server(by, names, &span(), asks);
                let refused = TlsAcceptor::from(config).accept(stream).await;
                assert!(refused.is_err(), "{more}");
            }
            Server::Plaintext => {
                stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.expect("open");
                let mut seen = Vec::new();
                let _ = timeout(SOON, stream.read_to_end(&mut seen)).await.expect("in time");
                assert!(!seen.windows(6).any(|bytes| bytes == b"secret"), "nothing of the application's");
            }
            Server::Silent => drop(stream),
        }
        is_reset(client).await;
        if reason != "-" {
            edge.node.until_counted(&["culvert_denials_total", "outbound", reason]).await;
        }
    }
}

#[tokio::test]
async fn a_rule_whose_files_cannot_be_used_denies_and_dials_nobody() {
    // T-20
    let mutual = |certificate: &str, key: &str| json!({"mode": "MUTUAL", "caCertificates": "ca.pem", "clientCertificate": certificate, "privateKey": key});
    let table = [
        json!({"mode": "SIMPLE", "caCertificates": "missing.pem"}),
        json!({"mode": "SIMPLE", "caCertificates": "../ca.pem"}),
        json!({"mode": "SIMPLE", "caCertificates": "/etc/ssl/certs/ca-certificates.crt"}),
        json!({"mode": "SIMPLE", "caCertificates": "key.pem"}),
        json!({"mode": "SIMPLE", "caCertificates": "ca.pem", "sni": "no name"}),
        mutual("client.pem", "missing.pem"),
        mutual("missing.pem", "key.pem"),
        mutual("ca.pem", "key.pem"),
        mutual("../client.pem", "key.pem"),
        json!({"mode": "OFF"}),
    ];
    for (number, tls) in table.into_iter().enumerate() {
        let edge = Edge::new(&format!("files-{number}"), &simple(&json!({})));
        let mut broken = documents(&simple(&json!({})));
        broken.pop();
        edge.node.publish(broken.clone());
        broken.push(rule(HOST, &tls));
        edge.node.publish_even_bad(broken);
        let _reached = edge.node.ground.serve(at(OUTSIDE, 443));
        is_reset(edge.connect().await).await;
        edge.node.until_counted(&["culvert_denials_total", "outbound", "client_rule"]).await;
        assert_eq!(edge.node.ground.dials(at(OUTSIDE, 443)), 0, "{tls}");
    }
}

#[tokio::test]
async fn another_namespaces_rule_for_the_host_reads_its_own_folder_only() {
    // T-20: the rule of the root namespace counts here, and that one was given no folder.
    let edge = Edge::new("root", &simple(&json!({})));
    let mut of_root = rule(HOST, &simple(&json!({})));
    of_root["metadata"]["namespace"] = "istio-system".into();
    let mut documents = usual();
    documents.extend([entry(), of_root]);
    edge.node.publish(documents);
    is_reset(edge.connect().await).await;
    edge.node.until_counted(&["culvert_denials_total", "outbound", "client_rule"]).await;
}

#[tokio::test]
async fn what_a_rule_says_by_now_ends_what_is_spoken_otherwise() {
    // T-18
    let edge = Edge::new("live", &simple(&json!({})));
    let mut reached = edge.node.ground.serve(at(OUTSIDE, 443));
    let changes = [
        simple(&json!({"sni": "other.example"})),
        simple(&json!({"subjectAltNames": [HOST]})),
        json!({"mode": "SIMPLE"}),
        json!({"mode": "DISABLE"}),
    ];
    for change in changes {
        edge.node.publish(documents(&simple(&json!({}))));
        let client = edge.connect().await;
        let (server, _) = reached.recv().await.expect("the server is reached");
        let config = edge.server(None, &[HOST], &Span::good(), false);
        let _server = TlsAcceptor::from(config).accept(server).await.expect("a handshake");
        edge.node.publish(documents(&change));
        is_reset(client).await;
    }
    edge.node.until_counted(&["culvert_denials_total", "outbound", "client_rule"]).await;
}

fn backend_rule(tls: &Value) -> Vec<Value> {
    let mut documents = usual();
    documents.push(rule("backend", tls));
    documents
}

#[tokio::test]
async fn disable_goes_past_the_tunnel_and_a_change_ends_what_stands() {
    // policy C, T-18
    let disable = json!({"mode": "DISABLE"});
    let mut world = World::new(usual());
    let mut plain = world.a.ground.serve(at(BACKEND, 8080));
    let (tunnelled, _server) = world.connected().await;
    world.a.publish(backend_rule(&disable));
    is_reset(tunnelled).await;
    let mut client = world.a.connect(FRONTEND, at(SERVICE, 80)).await;
    let (mut server, seen) = plain.recv().await.expect("its own port is dialled");
    assert_eq!(seen.to_string(), FRONTEND);
    client.write_all(b"ping").await.expect("open");
    let mut read = [0; 4];
    server.read_exact(&mut read).await.expect("as it was written");
    assert_eq!(&read, b"ping");
    world.a.publish(usual());
    is_reset(client).await;
    assert_eq!(world.a.ground.dials(at(BACKEND, TUNNEL_PORT)), 1, "only the first one");
}

#[tokio::test]
async fn names_of_the_rule_take_the_place_of_those_of_the_service() {
    // policy C, D-5
    let named = |account: &str| {
        let name = format!("spiffe://cluster.local/ns/photo/sa/{account}");
        json!({"mode": "ISTIO_MUTUAL", "subjectAltNames": [name]})
    };
    let mut world = World::new(backend_rule(&named("backend")));
    let (_client, _server) = world.connected().await;
    world.a.publish(backend_rule(&named("somebody-else")));
    is_reset(world.a.connect(FRONTEND, at(SERVICE, 80)).await).await;
    world.a.until_counted(&["culvert_denials_total", "outbound", "secure_naming"]).await;
}

/// A pod that another kind of proxy serves, and its service.
fn sidecar() -> Vec<Value> {
    let mut pod = workload("backend", "node-b", BACKEND);
    pod["metadata"]["labels"] =
        json!({"app": "backend", "culvert.io/mesh": "disabled", "security.istio.io/tlsMode": "istio"});
    vec![mesh("STRICT"), workload("frontend", "node-a", FRONTEND), pod, service()]
}

#[tokio::test]
async fn a_sidecar_is_spoken_to_in_mesh_tls_on_its_own_port() {
    // policy C: ALPN istio and the name of the cluster; D-5: its identity.
    let ca = Ca::new("mesh");
    for (account, is_good) in [("backend", true), ("impostor", false)] {
        let node = Node::new("node-a", "frontend", ca.store(&["frontend"]), sidecar());
        let mut reached = node.ground.serve(at(BACKEND, 8080));
        let client = node.connect(FRONTEND, at(SERVICE, 80)).await;
        let (server, _) = reached.recv().await.expect("its own port is dialled");
        let store = ca.store(&[account]);
        let id = crate::certs::testing::identity(account);
        let config = store.credentials(&id).expect("issued").mesh_server();
        let hello = tokio_rustls::LazyConfigAcceptor::new(rustls::server::Acceptor::default(), server);
        let hello = hello.await.expect("a ClientHello");
        let said = hello.client_hello();
        assert_eq!(said.server_name(), Some("outbound_.80_._.backend.photo.svc.cluster.local"));
        assert_eq!(said.alpn().into_iter().flatten().collect::<Vec<_>>(), [b"istio"]);
        let done = hello.into_stream(config).await;
        assert_eq!(done.is_ok(), is_good, "{account}");
        if is_good {
            node.until_counted(&["istio_tcp_connections_opened_total", "mutual_tls", "sa/backend"]).await;
        } else {
            is_reset(client).await;
            node.until_counted(&["culvert_denials_total", "outbound", "secure_naming"]).await;
        }
    }
}

#[tokio::test]
async fn under_disable_no_other_way_is_tried() {
    let world = World::new(backend_rule(&json!({"mode": "DISABLE"})));
    // Nobody listens on the workload's own port in this world.
    is_reset(world.a.connect(FRONTEND, at(SERVICE, 80)).await).await;
    assert_eq!(world.a.ground.dials(at(BACKEND, TUNNEL_PORT)), 0);
}
