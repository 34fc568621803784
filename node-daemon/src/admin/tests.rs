//! The pages over real sockets: what they say, whom they turn away, and what they never show.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use node_core::{
    store::{Store, Update},
    workload::ObjectName,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use super::{
    EnrolmentView, NodeCertificateView, Stage, Views,
    client::{self, AskError},
    dump, metrics, ready,
    serve::{Answer, CONNECTIONS_MAX, Listener, Page, serve},
    status::{CONNECTIONS_IN_TABLE_MAX, CONNECTIONS_SHOWN_MAX, Status},
};
use crate::{
    certs::CertificateView,
    config::{Config, Sources},
    control::{DocumentsView, file},
    datapath::ConnectionView,
    telemetry::{Direction, Endpoint, Ends, Sink},
};

const SECRET: &str = "culvert-join-token-that-nobody-may-see";

const DOCUMENTS: &str = "\
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: web-0, namespace: photo, labels: {culvert.io/mesh: enabled}}
spec:
  serviceAccount: web
  node: node-a
  addresses: [10.8.1.4]
  networkNamespace: /run/netns/web
  ports: [{name: http, port: 80}]
  exemptInboundPorts: []
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: broken, namespace: photo}
spec: {rules: 7}
";

/// A node that has one workload, one certificate and one connection.
struct Node {
    folder: PathBuf,
    views: Views,
    stage: watch::Sender<Stage>,
}

impl Node {
    fn new() -> Self {
        Self::with(None, Some("1F"))
    }

    /// `problem` of the enrolment, `serial` of the certificate.
    fn with(problem: Option<&'static str>, serial: Option<&'static str>) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("culvert-admin-{}-{number}", std::process::id()));
        fs::create_dir_all(folder.join("etc/culvert")).unwrap();
        let mut store = Store::new("node-a", "cluster.local".parse().unwrap());
        store.apply(Update::replace("/etc/culvert/mesh.d/a.yaml", file::parse(DOCUMENTS).unwrap()));
        let stage = watch::Sender::new(Stage::Running);
        let web = || ObjectName::new("photo", "web-0");
        let views = Views {
            node: "node-a".to_owned(),
            configuration: configuration(&folder),
            snapshots: watch::Sender::new(store.snapshot()).subscribe(),
            documents: watch::Sender::new(DocumentsView { files: 1, ..DocumentsView::default() }).subscribe(),
            stage: stage.subscribe(),
            enrolments: Arc::new(move || {
                vec![EnrolmentView { workload: web(), problem: problem.map(str::to_owned) }]
            }),
            certificates: Arc::new(move || vec![certificate(serial)]),
            node_certificate: Arc::new(|| {
                let name = "spiffe://cluster.local/culvert/node/node-a".to_owned();
                Some(NodeCertificateView { name, not_after: SystemTime::UNIX_EPOCH })
            }),
            connections: Arc::new(|| vec![connection()]),
            client_files: Arc::new(|_| BTreeMap::new()),
            direct: Arc::new(crate::admin::status::Direct::default),
            key_sets: Arc::new(|| vec![key_set()]),
            kernel: Arc::new(|| vec![("captured_egress", 4), ("captured", 5)]),
            events: Sink::new(),
        };
        Self { folder, views, stage }
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("admin.sock")
    }

    /// Serves a page on the unix socket for as long as the test lasts.
    fn serve(&self, page: Page) {
        let listener = Listener::Unix(UnixListener::bind(self.socket()).unwrap());
        let stop = CancellationToken::new();
        tokio::spawn(serve(listener, page, dump::LIMIT, self.views.events.clone(), stop));
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn configuration(folder: &Path) -> Value {
    let token = folder.join("join-token");
    fs::write(&token, SECRET).unwrap();
    let config = folder.join("node.yaml");
    let text = format!("node: node-a\nca: {{address: '10.9.0.1:15012', joinToken: {}}}\n", token.display());
    fs::write(&config, text).unwrap();
    let sources = Sources { config: Some(config), root: folder.to_owned(), ..Sources::default() };
    Config::read(&sources).unwrap().shown()
}

fn certificate(serial: Option<&str>) -> CertificateView {
    CertificateView {
        identity: "spiffe://cluster.local/ns/photo/sa/web".parse().unwrap(),
        serial: serial.map(str::to_owned),
        not_before: None,
        not_after: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(3_600)),
        renews_at: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800)),
        generation: Some(1),
        renewals: 2,
        failures: 0,
        last_problem: None,
    }
}

fn key_set() -> crate::jwks::KeySetView {
    crate::jwks::KeySetView {
        source: "https://id.example/keys".to_owned(),
        keys: None,
        problem: Some("cannot connect: refused".to_owned()),
    }
}

fn connection() -> ConnectionView {
    let source = Endpoint {
        address: Some("10.8.1.4:40000".parse().unwrap()),
        workload: Some(ObjectName::new("photo", "web-0")),
        identity: None,
        node: Some("node-a".into()),
    };
    let ends = Ends {
        connection: 3,
        direction: Direction::Outbound,
        path: crate::telemetry::Path::Tunnel,
        source,
        destination: Endpoint::default(),
        service: None,
        protocol: "tcp",
        mutual_tls: true,
    };
    ConnectionView { ends: Arc::new(ends), bytes_in: 10, bytes_out: 20, snapshot: 1 }
}

/// What a page says to one path.
fn said(page: &Page, path: &str) -> Answer {
    page(path).expect("there is such a page")
}

#[tokio::test]
async fn status_over_the_socket_says_what_is_so_and_reads_as_a_table() {
    let node = Node::new();
    node.serve(dump::page(node.views.clone()));
    let text = client::ask(&node.socket(), "/status").await.unwrap();
    let status: Status = serde_json::from_str(&text).unwrap();
    assert!(status.ready, "{:?}", status.missing);
    let workload = &status.workloads[0];
    assert_eq!(workload.name, "photo/web-0");
    assert!(workload.enrolled);
    assert_eq!(workload.connections, 1);
    assert_eq!((workload.ports[0].port, workload.ports[0].transport_mode.as_str()), (80, "PERMISSIVE"));
    let certificate = &status.certificates[0];
    assert_eq!(certificate.not_after.as_deref(), Some("1970-01-01T01:00:00Z"));
    assert_eq!(certificate.renews_at.as_deref(), Some("1970-01-01T00:30:00Z"));
    let policy = &status.policies[0];
    assert_eq!((policy.kind.as_str(), policy.name.as_str()), ("AuthorizationPolicy", "photo/broken"));
    assert!(!policy.accepted && policy.problem.is_some() && !policy.effect.is_empty(), "{policy:?}");
    assert_eq!(status.kernel["captured_egress"], 4);
    // policy A-13: what fails closed says so
    let text = status.to_string();
    assert!(
        text.contains("https://id.example/keys  none, tokens are refused  cannot connect: refused"),
        "{text}"
    );
    assert_eq!(status.connections[0].source.workload.as_deref(), Some("photo/web-0"));
    let table = status.to_string();
    for word in [
        "node-a",
        "photo/web-0",
        "enrolled",
        "1970-01-01T01:00:00Z",
        "photo/broken",
        "mutual",
        "80 PERMISSIVE",
    ] {
        assert!(table.contains(word), "no {word} in\n{table}");
    }
}

#[tokio::test]
async fn a_dump_has_the_mesh_and_the_configuration_and_no_secret() {
    let node = Node::new();
    node.serve(dump::page(node.views.clone()));
    let text = client::ask(&node.socket(), "/dump").await.unwrap();
    let dump: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(dump["all_workloads"][0]["placement"], "network namespace /run/netns/web");
    assert_eq!(dump["mesh"]["trust_domain"], "cluster.local");
    assert!(dump["configuration"]["ca"]["joinToken"].as_str().unwrap().ends_with("join-token"));
    assert!(!text.contains(SECRET) && !text.contains("PRIVATE KEY"));
}

#[tokio::test]
async fn whoever_asks_wrongly_is_told_so() {
    let node = Node::new();
    let absent = client::ask(&node.socket(), "/status").await.unwrap_err();
    assert!(matches!(absent, AskError::Absent { .. }) && absent.to_string().contains("--root"), "{absent}");
    node.serve(dump::page(node.views.clone()));
    let answer = client::ask(&node.socket(), "/keys").await.unwrap_err();
    assert!(matches!(answer, AskError::Answer { .. }) && answer.to_string().contains("404"), "{answer}");
    let mut stream = UnixStream::connect(node.socket()).await.unwrap();
    stream
        .write_all(b"POST /status HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 405 "), "{text}");
}

#[tokio::test]
async fn metrics_are_the_same_at_both_paths_and_hold_the_kernel_s_counters() {
    let node = Node::new();
    let page = metrics::page(node.views.events.clone(), Arc::clone(&node.views.kernel));
    let answer = said(&page, "/metrics");
    assert_eq!(answer, said(&page, "/stats/prometheus"));
    assert!(answer.content_type.starts_with("application/openmetrics-text"));
    assert!(
        answer.body.contains(r#"culvert_kernel_drops_total{reason="captured_egress"} 4"#),
        "{}",
        answer.body
    );
    assert!(
        answer.body.contains(r#"culvert_kernel_verdicts_total{verdict="captured"} 5"#),
        "{}",
        answer.body
    );
    assert!(answer.body.ends_with("# EOF\n"));
    assert_eq!(page("/status"), None);
}

#[test]
fn readiness_names_everything_that_is_missing() {
    let answer = |node: &Node| said(&ready::page(node.views.clone()), "/healthz/ready");
    assert_eq!(answer(&Node::new()), Answer::text(200, "ready\n".to_owned()));
    let table = [
        (Node::with(Some("no such namespace"), Some("1F")), "workload photo/web-0: no such namespace"),
        (Node::with(None, None), "certificate spiffe://cluster.local/ns/photo/sa/web: it is not there yet"),
    ];
    for (node, missing) in table {
        let answer = answer(&node);
        assert_eq!(answer.status, 503);
        assert!(answer.body.contains(missing), "{}", answer.body);
    }
    let mut node = Node::new();
    node.views.enrolments = Arc::new(Vec::new);
    assert!(answer(&node).body.contains("not enrolled yet"));
    let mut node = Node::new();
    node.views.node_certificate = Arc::new(|| None);
    assert!(answer(&node).body.contains("has not joined the mesh yet"));
    let node = Node::new();
    node.stage.send_replace(Stage::Draining);
    assert!(answer(&node).body.contains("draining"));
}

#[test]
fn a_node_whose_documents_are_unknown_is_not_ready() {
    // T-19
    let mut node = Node::new();
    let mut store = Store::new("node-a", "cluster.local".parse().unwrap());
    store.apply(Update::Unreadable { file: "p.yaml".into(), reason: "line 1".to_owned() });
    node.views.snapshots = watch::Sender::new(store.snapshot()).subscribe();
    let answer = said(&ready::page(node.views.clone()), "/healthz/ready");
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("p.yaml"), "{}", answer.body);
    assert!(dump::status(&node.views).to_string().contains("EVERYTHING IS DENIED"));
}

/// A TCP page, and its address.
async fn tcp_page(events: &Sink) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let page: Page = Arc::new(|_| Some(Answer::text(200, "here\n".to_owned())));
    tokio::spawn(serve(
        Listener::Tcp(listener),
        page,
        metrics::LIMIT,
        events.clone(),
        CancellationToken::new(),
    ));
    address
}

#[tokio::test]
async fn a_connection_beyond_the_limit_is_closed_and_counted_and_its_place_is_free_afterwards() {
    let events = Sink::new();
    let address = tcp_page(&events).await;
    let mut open = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut stream).await.contains("here"));
        open.push(stream);
    }
    let mut beyond = TcpStream::connect(address).await.unwrap();
    assert!(ask(&mut beyond).await.is_empty());
    let text = events.metrics().text().unwrap();
    assert!(text.contains(r#"culvert_limits_total{limit="metrics_connections"} 1"#), "{text}");
    let mut done = open.pop().unwrap();
    done.shutdown().await.unwrap();
    assert_eq!(done.read(&mut [0; 1]).await.unwrap(), 0);
    loop {
        let mut next = TcpStream::connect(address).await.unwrap();
        if ask(&mut next).await.contains("here") {
            break;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_finish_its_head_is_closed() {
    let address = tcp_page(&Sink::new()).await;
    let mut slow = TcpStream::connect(address).await.unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nhost").await.unwrap();
    let mut text = String::new();
    // Either way of closing is an end.
    let _ = slow.read_to_string(&mut text).await;
    assert!(!text.contains("here"), "{text}");
}

#[tokio::test]
async fn a_head_is_read_up_to_its_limit() {
    let address = tcp_page(&Sink::new()).await;
    for (padding, is_answered) in [(15 * 1024, true), (16 * 1024, false)] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("GET / HTTP/1.1\r\nconnection: close\r\nx: {}\r\n\r\n", "x".repeat(padding));
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut text = String::new();
        // What was not read of the head resets the connection.
        let _ = stream.read_to_string(&mut text).await;
        assert_eq!(text.contains("here"), is_answered, "{padding} bytes: {text}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_ends_is_closed_after_a_minute() {
    let address = tcp_page(&Sink::new()).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let before = tokio::time::Instant::now();
    let mut last = Duration::ZERO;
    while ask(&mut stream).await.contains("here") {
        last = before.elapsed();
        tokio::time::sleep(Duration::from_secs(4)).await;
    }
    assert!((55..=60).contains(&last.as_secs()), "{last:?}");
}

#[tokio::test]
async fn whoever_asks_does_not_wait_without_end_for_a_daemon_that_hangs() {
    let node = Node::new();
    let _hangs = UnixListener::bind(node.socket()).unwrap();
    tokio::time::pause();
    let before = tokio::time::Instant::now();
    let silent = client::ask(&node.socket(), "/status").await.unwrap_err();
    assert!(matches!(silent, AskError::Silent { .. }), "{silent}");
    assert_eq!(before.elapsed().as_secs(), 10);
}

#[tokio::test]
async fn an_answer_is_taken_up_to_its_limit() {
    let node = Node::new();
    node.serve(Arc::new(|_| Some(Answer::text(200, "x".repeat(1_000)))));
    for (bytes_max, is_taken) in [(1_000, true), (999, false)] {
        let stream = UnixStream::connect(node.socket()).await.unwrap();
        let answer = client::converse(stream, "/", bytes_max).await;
        assert_eq!(answer.is_ok(), is_taken, "{answer:?}");
    }
}

#[test]
fn connections_beyond_the_limits_are_counted_and_not_shown() {
    let mut node = Node::new();
    for (count, shown, more_in_table) in [
        (CONNECTIONS_IN_TABLE_MAX, CONNECTIONS_IN_TABLE_MAX, None),
        (CONNECTIONS_IN_TABLE_MAX + 1, CONNECTIONS_IN_TABLE_MAX + 1, Some(1)),
        (
            CONNECTIONS_SHOWN_MAX,
            CONNECTIONS_SHOWN_MAX,
            Some(CONNECTIONS_SHOWN_MAX - CONNECTIONS_IN_TABLE_MAX),
        ),
        (
            CONNECTIONS_SHOWN_MAX + 5,
            CONNECTIONS_SHOWN_MAX,
            Some(CONNECTIONS_SHOWN_MAX + 5 - CONNECTIONS_IN_TABLE_MAX),
        ),
    ] {
        node.views.connections = Arc::new(move || vec![connection(); count]);
        let status = dump::status(&node.views);
        assert_eq!((status.connections.len(), status.connections_total), (shown, count));
        let table = status.to_string();
        let told = table.lines().find_map(|line| line.strip_prefix("... and "));
        assert_eq!(told.map(str::to_owned), more_in_table.map(|more| format!("{more} more")));
    }
}

/// Sends a request on a connection that stays open, and reads what comes; empty if it was closed.
async fn ask(stream: &mut TcpStream) -> String {
    if stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.is_err() {
        return String::new();
    }
    let mut answer = vec![0; 4096];
    let mut length = 0;
    while !answer[..length].ends_with(b"here\n") {
        match stream.read(&mut answer[length..]).await {
            Ok(0) | Err(_) => return String::new(),
            Ok(read) => length += read,
        }
    }
    String::from_utf8(answer[..length].to_vec()).unwrap()
}
