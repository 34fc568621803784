//! Two nodes of one mesh in one process; the backend's port speaks HTTP and is judged by requests.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn::http2 as client_http2,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};

use super::super::testing::{BACKEND, FRONTEND, Node, SERVICE, World, at, mesh, service, workload};
use crate::jwks::testing::{Mode, Server, Signer, key_set};

/// Long enough for anything that shall happen on this machine, short enough for a test that fails.
const SOON: Duration = Duration::from_secs(20);

/// Both pods and the service, the backend's port an HTTP one.
fn documents(mode: &str) -> Vec<Value> {
    let mut backend = workload("backend", "node-b", BACKEND);
    backend["spec"]["ports"] = json!([{"name": "http", "port": 8080}]);
    let mut service = service();
    service["spec"]["ports"][0]["name"] = "http".into();
    vec![mesh(mode), workload("frontend", "node-a", FRONTEND), backend, service]
}

/// Only requests of these rules reach the backend.
fn allow(rules: Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "backend", "namespace": "photo"},
        "spec": {"selector": {"matchLabels": {"app": "backend"}}, "action": "ALLOW", "rules": rules},
    })
}

/// The frontend may GET and POST below `/public`.
fn usual_rules() -> Value {
    json!([{
        "from": [{"source": {"principals": ["cluster.local/ns/photo/sa/frontend"]}}],
        "to": [{"operation": {"methods": ["GET", "POST"], "paths": ["/public*"]}}],
    }])
}

fn usual() -> Vec<Value> {
    let mut documents = documents("STRICT");
    documents.push(allow(usual_rules()));
    documents
}

/// Anybody may come in, in plaintext too, for `/public*`.
fn open() -> Vec<Value> {
    let mut documents = documents("PERMISSIVE");
    documents.push(allow(json!([{"to": [{"operation": {"paths": ["/public*"]}}]}])));
    documents
}

/// Answers with what arrived: the request line, headers in their order, an empty line, the body.
async fn echo(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let (parts, body) = request.into_parts();
    let mut text = format!("{} {}\n", parts.method, parts.uri);
    for (name, value) in &parts.headers {
        text.push_str(&format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
    }
    let body = body.collect().await?.to_bytes();
    text.push('\n');
    text.push_str(&String::from_utf8_lossy(&body));
    Ok(Response::new(Full::from(text)))
}

/// The backend's application, on every connection that reaches it.
fn serve_echo(world: &mut World) {
    let (_, nothing) = mpsc::channel(1);
    let mut backend = std::mem::replace(&mut world.backend, nothing);
    tokio::spawn(async move {
        while let Some((stream, _)) = backend.recv().await {
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(echo)));
        }
    });
}

/// One answer of HTTP/1.1.
#[derive(Debug)]
struct Answer {
    status: u16,
    /// In lower case.
    head: String,
    body: String,
}

/// A client that writes and reads bytes.
struct Raw {
    stream: TcpStream,
    read: BytesMut,
}

impl Raw {
    /// Through the tunnel.
    async fn new(world: &World) -> Self {
        Self { stream: world.a.connect(FRONTEND, at(SERVICE, 80)).await, read: BytesMut::new() }
    }

    /// In plaintext, on the backend's own port.
    async fn plain(node: &Arc<Node>) -> Self {
        Self { stream: node.approach(FRONTEND, at(BACKEND, 8080)).await, read: BytesMut::new() }
    }

    async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.expect("open");
    }

    async fn ask(&mut self, bytes: impl AsRef<[u8]>) -> Answer {
        self.send(bytes).await;
        self.answer().await
    }

    async fn more(&mut self) -> usize {
        let read = timeout(SOON, self.stream.read_buf(&mut self.read)).await.expect("in time");
        read.expect("no reset")
    }

    async fn until(&mut self, end: &str) -> String {
        loop {
            let text = String::from_utf8_lossy(&self.read).into_owned();
            if let Some(found) = text.find(end) {
                let taken = self.read.split_to(found + end.len());
                return String::from_utf8_lossy(&taken).into_owned();
            }
            assert_ne!(self.more().await, 0, "closed after {text:?}");
        }
    }

    async fn exactly(&mut self, bytes: usize) -> String {
        while self.read.len() < bytes {
            assert_ne!(self.more().await, 0, "closed early");
        }
        String::from_utf8_lossy(&self.read.split_to(bytes)).into_owned()
    }

    async fn answer(&mut self) -> Answer {
        let head = self.until("\r\n\r\n").await.to_ascii_lowercase();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status line");
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let body = match length.map(|length| length.trim().parse().expect("a number")) {
            Some(length) => self.exactly(length).await,
            None if head.contains("transfer-encoding: chunked") => {
                let mut body = String::new();
                loop {
                    let size = self.until("\r\n").await;
                    let size = usize::from_str_radix(size.trim(), 16).expect("a size");
                    body.push_str(&self.exactly(size).await);
                    self.until("\r\n").await;
                    if size == 0 {
                        break body;
                    }
                }
            }
            None => String::new(),
        };
        Answer { status, head, body }
    }

    /// Nothing more came, and the connection is closed, whichever way.
    async fn is_closed(&mut self) {
        let mut rest = Vec::new();
        let read = timeout(SOON, self.stream.read_to_end(&mut rest)).await.expect("it is closed");
        assert!(rest.is_empty() && self.read.is_empty(), "{:?} {:?}", read, String::from_utf8_lossy(&rest));
    }
}

#[tokio::test]
async fn a_host_with_the_dot_of_the_root_is_the_host_without() {
    // T-22
    let mut documents = documents("PERMISSIVE");
    documents.push(allow(json!([{"to": [{"operation": {"hosts": ["backend", "backend:80", "[::1]:80"]}}]}])));
    let mut world = World::new(documents);
    serve_echo(&mut world);
    let mut client = Raw::plain(&world.b).await;
    for (sent, expected) in [
        ("backend", Some("backend")),
        ("backend.", Some("backend")),
        ("backend.:80", Some("backend:80")),
        ("BACKEND.", Some("BACKEND")),
        ("[::1]:80", Some("[::1]:80")),
        ("backend.x.", None),
        ("other.", None),
    ] {
        let answer = client.ask(format!("GET /a HTTP/1.1\r\nHost: {sent}\r\n\r\n")).await;
        match expected {
            Some(host) => assert_eq!(answer.body, format!("GET /a\nhost: {host}\n\n")),
            None => assert_eq!((answer.status, answer.body.as_str()), (403, "RBAC: access denied"), "{sent}"),
        }
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: backend\r\n\r\n")
}

// ---- the happy path ------------------------------------------------------------------------------------------------

#[tokio::test]
async fn requests_of_one_connection_are_judged_one_by_one() {
    let mut world = World::new(usual());
    serve_echo(&mut world);
    let mut client = Raw::new(&world).await;
    for _ in 0..3 {
        let answer = client.ask(get("/public/a?x=1")).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.body, "GET /public/a?x=1\nhost: backend\n\n");
        let answer = client.ask(get("/private")).await;
        assert_eq!((answer.status, answer.body.as_str()), (403, "RBAC: access denied")); // B-12
        let answer = client.ask("DELETE /public HTTP/1.1\r\nHost: backend\r\n\r\n").await;
        assert_eq!((answer.status, answer.body.as_str()), (403, "RBAC: access denied"));
    }
    assert_eq!(world.b.ground.dials(at(BACKEND, 8080)), 1, "one connection to the workload");
    world.b.until_counted(&["istio_requests_total", "response_code=\"200\"", "sa/frontend", " 3"]).await;
    world
        .b
        .until_counted(&["istio_requests_total", "response_code=\"403\"", "request_protocol=\"http\"", " 6"])
        .await;
    world.b.until_counted(&["culvert_denials_total", "no_rule_allows", " 6"]).await;
}

#[tokio::test]
async fn a_request_that_is_denied_does_not_even_dial_the_workload() {
    let mut world = World::new(usual());
    serve_echo(&mut world);
    let mut client = Raw::new(&world).await;
    assert_eq!(client.ask(get("/private")).await.status, 403);
    assert_eq!(world.b.ground.dials(at(BACKEND, 8080)), 0);
    assert_eq!(client.ask(get("/public")).await.status, 200);
}

#[tokio::test]
async fn a_client_that_ends_its_half_after_asking_is_answered() {
    let mut world = World::new(usual());
    serve_echo(&mut world);
    for (path, status) in [("/public", 200), ("/private", 403)] {
        let mut client = Raw::new(&world).await;
        client.send(get(path)).await;
        client.stream.shutdown().await.expect("open");
        assert_eq!(client.answer().await.status, status, "{path}");
        assert_eq!(client.more().await, 0, "{path}: an orderly end");
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let mut world = World::new(usual());
    serve_echo(&mut world);
    let mut client = Raw::new(&world).await;
    let paths = ["/public/1", "/private", "/public/2", "/private", "/public/3"];
    client.send(paths.map(get).concat()).await;
    for path in paths {
        let answer = client.answer().await;
        match path {
            "/private" => assert_eq!(answer.status, 403),
            path => assert!(answer.body.starts_with(&format!("GET {path}\n")), "{answer:?}"),
        }
    }
}

#[tokio::test]
async fn bodies_of_both_framings_go_both_ways_with_their_trailers() {
    let mut world = World::new(usual());
    serve_echo(&mut world);
    let mut client = Raw::new(&world).await;
    let answer = client.ask("POST /public HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello").await;
    assert_eq!(answer.body, "POST /public\nhost: a\ncontent-length: 5\n\nhello");
    let chunked = "POST /public HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: x, istio-sec-y\r\n\r\n\
                   3\r\nabc\r\n2;z=1\r\nde\r\n0\r\nX: y\r\nistio-sec-y: z\r\n\r\n";
    let answer = client.ask(chunked).await;
    assert!(answer.body.ends_with("\n\nabcde"), "{answer:?}");
    assert!(answer.body.contains("transfer-encoding: chunked\n"), "{answer:?}");
    assert_eq!(client.ask(get("/public")).await.status, 200, "the connection goes on");
}

#[tokio::test]
async fn an_expectation_is_met_before_the_body_is_sent() {
    let mut world = World::new(usual());
    serve_echo(&mut world);
    let mut client = Raw::new(&world).await;
    let head = |path: &str| {
        format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    };
    client.send(head("/public")).await;
    assert_eq!(client.until("\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    assert!(client.ask("body").await.body.ends_with("\n\nbody"));
    let answer = client.ask(head("/private")).await;
    assert_eq!(answer.status, 403, "without a 100");
}

#[tokio::test]
async fn what_the_workload_gets_says_only_what_was_judged() {
    // A-11, T-22
    let mut world = World::new(usual());
    serve_echo(&mut world);
    let mut client = Raw::new(&world).await;
    let answer = client
        .ask(
            "GET http://backend/public/%61/../b//c?q=%2e HTTP/1.1\r\nHost: BACKEND\r\nConnection: keep-alive, x-hop\r\n\
             X-Hop: 1\r\nKeep-Alive: 3\r\nProxy-Connection: x\r\nTE: gzip\r\nUpgrade: h2c\r\nX-Kept: a\r\nX-Kept: b\r\n\
             Istio-Sec-0: me\r\nsec-istio-auth-userinfo: me\r\nSec-Istio-Authn-Payload: me\r\n\r\n",
        )
        .await;
    assert_eq!(answer.body, "GET /public/b//c?q=%2e\nhost: BACKEND\nx-kept: a\nx-kept: b\n\n");
    for path in ["/public/../private", "/public/%2e%2e/private", "/private"] {
        assert_eq!(client.ask(get(path)).await.status, 403, "{path}");
    }
    for path in ["/public/%00", "/public/%zz", "/public\\..\\private", "/public/%ff", "public"] {
        let mut client = Raw::new(&world).await;
        assert_eq!(client.ask(get(path)).await.status, 400, "{path}");
    }
}

#[tokio::test]
async fn a_workload_that_closes_between_requests_is_dialled_again() {
    let mut world = World::new(usual());
    let mut client = Raw::new(&world).await;
    for round in 1..=3 {
        client.send(get("/public")).await;
        let (mut server, seen) = world.backend.recv().await.expect("the backend is reached");
        assert_eq!(seen.to_string(), FRONTEND); // H-5
        let mut request = [0; 256];
        let read = server.read(&mut request).await.expect("open");
        assert!(request[..read].ends_with(b"\r\n\r\n"));
        server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.expect("open");
        drop(server);
        assert_eq!(client.answer().await.body, "ok");
        assert_eq!(world.b.ground.dials(at(BACKEND, 8080)), round);
    }
}

#[tokio::test]
async fn a_workload_that_is_away_or_breaks_off_is_told_as_such() {
    let mut world = World::new(usual());
    world.b.ground.forget(at(BACKEND, 8080));
    let mut client = Raw::new(&world).await;
    let answer = client.ask(get("/public")).await;
    assert_eq!((answer.status, answer.body.as_str()), (503, "upstream connect error"));
    let grpc =
        "POST /public HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc\r\nContent-Length: 0\r\n\r\n";
    let answer = client.ask(grpc).await;
    assert!(answer.status == 200 && answer.head.contains("grpc-status: 14"), "{answer:?}");
    world.backend = world.b.ground.serve(at(BACKEND, 8080));
    client.send(get("/public")).await;
    drop(world.backend.recv().await.expect("the backend is reached"));
    assert_eq!(client.answer().await.status, 502);
    client.send(get("/public")).await;
    let (mut server, _) = world.backend.recv().await.expect("the backend is reached");
    server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok").await.expect("open");
    client.until("ok").await;
    drop(server);
    let broken = timeout(SOON, client.stream.read(&mut [0; 1])).await.expect("in time");
    assert!(broken.is_err(), "an answer that broke off does not look whole: {broken:?}");
}

// ---- HTTP/2 and gRPC -----------------------------------------------------------------------------------------------

type Outgoing = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;

fn whole(text: &'static str) -> Outgoing {
    Full::from(text).boxed_unsync()
}

async fn http2_client(stream: TcpStream) -> client_http2::SendRequest<Outgoing> {
    let (sender, connection) =
        client_http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
    tokio::spawn(connection);
    sender
}

/// Echoes the body, and ends with trailers as gRPC does.
async fn grpc_like(request: Request<Incoming>) -> Result<Response<Outgoing>, Infallible> {
    let (parts, body) = request.into_parts();
    let trailers = async {
        let mut trailers = http::HeaderMap::new();
        trailers.insert("grpc-status", 0.into());
        Ok(Frame::trailers(trailers))
    };
    let echoed = futures_util::stream::unfold(Some(body), |body| async {
        let mut body = body?;
        let frame = body.frame().await?.ok()?;
        let data = frame.into_data().ok()?;
        Some((Ok(Frame::data(data)), Some(body)))
    });
    let frames = futures_util::StreamExt::chain(echoed, futures_util::stream::once(trailers));
    let answer = Response::builder()
        .header("path-seen", parts.uri.path())
        .header("authority-seen", parts.uri.authority().map_or("", |authority| authority.as_str()))
        .header("content-type", "application/grpc");
    Ok(answer.body(StreamBody::new(frames).boxed_unsync()).expect("an answer"))
}

fn serve_grpc(world: &mut World) {
    let (_, nothing) = mpsc::channel(1);
    let mut backend = std::mem::replace(&mut world.backend, nothing);
    tokio::spawn(async move {
        while let Some((stream, _)) = backend.recv().await {
            let serve = http2::Builder::new(TokioExecutor::new());
            tokio::spawn(serve.serve_connection(TokioIo::new(stream), service_fn(grpc_like)));
        }
    });
}

fn call(path: &str, content_type: &str) -> Request<Outgoing> {
    Request::post(format!("http://backend:80{path}"))
        .header(header::CONTENT_TYPE, content_type)
        .header("te", "trailers")
        .body(whole("message"))
        .expect("a request")
}

#[tokio::test]
async fn calls_of_grpc_pass_with_their_trailers_and_are_denied_by_trailers() {
    let mut world = World::new(usual());
    serve_grpc(&mut world);
    let mut client = http2_client(world.a.connect(FRONTEND, at(SERVICE, 80)).await).await;
    for _ in 0..3 {
        let answer = client.send_request(call("/public/Call", "application/grpc")).await.expect("an answer");
        assert_eq!(answer.headers()["path-seen"], "/public/Call");
        assert_eq!(answer.headers()["authority-seen"], "backend:80");
        let whole = answer.into_body().collect().await.expect("whole");
        assert_eq!(whole.trailers().expect("trailers")["grpc-status"], "0");
        assert_eq!(whole.to_bytes(), "message");
        // B-12
        let answer =
            client.send_request(call("/private/Call", "application/grpc+proto")).await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()["grpc-status"], "7");
        assert_eq!(answer.headers()["grpc-message"], "RBAC: access denied");
        assert_eq!(answer.headers()["content-type"], "application/grpc");
        let answer = client.send_request(call("/private", "text/plain")).await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::FORBIDDEN);
        assert_eq!(answer.into_body().collect().await.expect("whole").to_bytes(), "RBAC: access denied");
    }
    assert_eq!(world.b.ground.dials(at(BACKEND, 8080)), 1);
    world
        .b
        .until_counted(&["istio_requests_total", "response_code=\"200\"", "request_protocol=\"grpc\"", " 6"])
        .await;
}

#[tokio::test]
async fn many_streams_at_once_share_one_connection_to_the_workload() {
    let mut world = World::new(usual());
    serve_grpc(&mut world);
    let client = http2_client(world.a.connect(FRONTEND, at(SERVICE, 80)).await).await;
    let calls = (0..100).map(|_| {
        let mut client = client.clone();
        tokio::spawn(async move {
            let answer = client.send_request(call("/public", "application/grpc")).await.expect("an answer");
            answer.into_body().collect().await.expect("whole").to_bytes()
        })
    });
    for call in calls.collect::<Vec<_>>() {
        assert_eq!(call.await.expect("no panic"), "message");
    }
    assert_eq!(world.b.ground.dials(at(BACKEND, 8080)), 1);
}

// ---- what has two readings -----------------------------------------------------------------------------------------

#[tokio::test]
async fn a_request_with_two_readings_is_refused_with_its_connection() {
    // T-22
    let world = World::new(open());
    let with = |line: &str| format!("GET /public HTTP/1.1\r\nHost: a\r\n{line}\r\n\r\n");
    let smuggled = "0\r\n\r\nGET /private HTTP/1.1\r\nHost: a\r\n\r\n";
    for sent in [
        with("Content-Length: 4\r\nTransfer-Encoding: chunked") + smuggled,
        with("Transfer-Encoding: chunked\r\nContent-Length: 4") + smuggled,
        with("Content-Length: 3\r\nContent-Length: 4") + "abcd",
        with("Content-Length: 3, 4") + "abcd",
        with("Transfer-Encoding: chunked, identity") + smuggled,
        with("Transfer-Encoding : chunked") + smuggled,
        with("Transfer-Encoding:\x0bchunked") + smuggled,
        with("Host: b"),
        with("X: a\r\n b"),
        with("X: a\nY: b"),
        with("X: a\rY: b"),
        with("X: \0"),
        with("Connection: content-length\r\nContent-Length: 3") + "abc",
        with("Connection: host"),
        "GET /public HTTP/1.1\nHost: a\n\n".to_owned(),
        "GET /public HTTP/1.1\r\n\r\n".to_owned(),
        "GET http://b/public HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "GET http://x@a/public HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "GET /public\0 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "GET /pub lic HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "GET /public HTTP/3.0\r\nHost: a\r\n\r\n".to_owned(),
        with("X: y").replace("Host: a", "Host: a.."),
        with("X: y").replace("Host: a", "Host: ."),
        "GET /public/..%2fprivate HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".to_owned(),
    ] {
        let mut client = Raw::plain(&world.b).await;
        let shown = &sent[..sent.len().min(120)];
        assert_eq!(client.ask(&sent).await.status, 400, "{shown:?}");
        client.is_closed().await;
    }
    let filler = "y".repeat(super::HEAD_BYTES_MAX);
    for sent in [
        with(&"X: y\r\n".repeat(super::HEADERS_MAX)),
        with(&"X: y\r\n".repeat(10 * super::HEADERS_MAX)),
        with(&format!("X: {filler}")),
        with(&filler),
        format!("GET /{filler} HTTP/1.1\r\nHost: a\r\n\r\n"),
        format!("GET /{filler}"),
        format!("GET /{filler}{filler}{filler}{filler}"),
    ] {
        // RFC 6585, section 5
        let mut client = Raw::plain(&world.b).await;
        assert_eq!(client.ask(&sent).await.status, 431, "{:?} of {} bytes", &sent[..30], sent.len());
        client.is_closed().await;
    }
    for sent in [
        "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n".to_owned(),
        "CONNECT /public HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
    ] {
        let mut client = Raw::plain(&world.b).await;
        assert!(matches!(client.ask(&sent).await.status, 400 | 405), "{sent:?}");
        client.is_closed().await;
    }
    assert_eq!(world.b.ground.dials(at(BACKEND, 8080)), 0, "nothing of it reached the workload");
}

#[tokio::test]
async fn a_bad_chunk_ends_the_request_that_it_belongs_to() {
    // T-22
    let head = "POST /public HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    for chunk in [
        "3\nabc\r\n",
        "3\r\nabcd\r\n",
        "0x3\r\nabc\r\n",
        "ffffffffffffffff1\r\n",
        "-1\r\n",
        "0\r\n X: y\r\n\r\n",
    ] {
        let mut world = World::new(open());
        serve_echo(&mut world);
        let mut client = Raw::plain(&world.b).await;
        client.send(format!("{head}{chunk}{}", get("/public/smuggled"))).await;
        let mut all = Vec::new();
        let _ = timeout(SOON, client.stream.read_to_end(&mut all)).await.expect("it is closed");
        let all = String::from_utf8_lossy(&all);
        assert!(!all.contains("smuggled") && !all.contains(" 200 "), "{chunk:?}: {all}");
    }
}

#[tokio::test]
async fn a_good_request_before_a_bad_one_is_answered() {
    let mut world = World::new(open());
    serve_echo(&mut world);
    let mut client = Raw::plain(&world.b).await;
    client.send(get("/public") + "GET /public HTTP/1.1\nHost: a\n\n").await;
    assert_eq!(client.answer().await.status, 200);
    assert_eq!(client.answer().await.status, 400);
    client.is_closed().await;
}

#[tokio::test]
async fn streams_of_http2_with_two_readings_are_refused_and_the_others_go_on() {
    // T-22
    let mut world = World::new(open());
    serve_grpc(&mut world);
    let stream = world.b.approach(FRONTEND, at(BACKEND, 8080)).await;
    let mut client = http2_client(stream).await;
    let mut two_hosts = call("/public", "text/plain");
    two_hosts.headers_mut().insert(header::HOST, "other".parse().expect("a value"));
    let answer = client.send_request(two_hosts).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    let connect = Request::connect("a:80").body(whole("")).expect("a request");
    assert!(
        client
            .send_request(connect)
            .await
            .is_ok_and(|answer| answer.status() == StatusCode::METHOD_NOT_ALLOWED)
    );
    let mut many = call("/public", "text/plain");
    for _ in 0..=super::HEADERS_MAX {
        many.headers_mut().append("x", "y".parse().expect("a value"));
    }
    let answer = client.send_request(many).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    for path in ["/public/../private", "/%70rivate"] {
        let answer = client.send_request(call(path, "text/plain")).await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    }
    let answer = client.send_request(call("/public", "text/plain")).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn a_head_that_does_not_end_is_not_waited_for() {
    for part in ["GET /public HT", "PRI * HTTP", "GET /public HTTP/1.1\r\nHost: a\r\n"] {
        let world = World::new(open());
        let mut client = Raw::plain(&world.b).await;
        client.send(part).await;
        let before = tokio::time::Instant::now();
        let mut rest = Vec::new();
        let _ = client.stream.read_to_end(&mut rest).await;
        let waited = before.elapsed().as_secs();
        assert!((9..=12).contains(&waited), "{part:?}: {waited} s");
    }
}

// ---- plaintext -----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn plaintext_is_judged_where_it_is_accepted_and_closed_where_it_is_not() {
    let mut world = World::new(open());
    serve_echo(&mut world);
    let mut client = Raw::plain(&world.b).await;
    assert_eq!(client.ask(get("/public")).await.status, 200);
    assert_eq!(client.ask(get("/private")).await.status, 403);
    let mut documents = documents("PERMISSIVE");
    documents.push(allow(usual_rules()));
    world.b.publish(documents);
    assert_eq!(client.ask(get("/public")).await.status, 403, "who is not proven is nobody");
    world.b.publish(usual());
    let mut client = Raw::plain(&world.b).await;
    client.send(get("/public")).await;
    let mut rest = Vec::new();
    let read = timeout(SOON, client.stream.read_to_end(&mut rest)).await.expect("it is closed");
    assert!(read.is_err() || rest.is_empty(), "A-6: no HTTP answer");
}

// ---- WebSocket -----------------------------------------------------------------------------------------------------

const WEBSOCKET: &str =
    "GET /public HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";

/// A WebSocket's both ends.
async fn upgraded(world: &mut World) -> (Raw, TcpStream) {
    let mut client = Raw::new(world).await;
    client.send(WEBSOCKET).await;
    let (mut server, _) = timeout(SOON, world.backend.recv()).await.expect("in time").expect("reached");
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        server.read_buf(&mut request).await.expect("open");
    }
    let request = String::from_utf8_lossy(&request).to_ascii_lowercase();
    assert!(
        request.contains("connection: upgrade\r\n") && request.contains("upgrade: websocket\r\n"),
        "{request}"
    );
    let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nfirst";
    server.write_all(answer.as_bytes()).await.expect("open");
    assert_eq!(client.answer().await.status, 101);
    assert_eq!(client.exactly(5).await, "first");
    (client, server)
}

#[tokio::test]
async fn a_websocket_carries_bytes_and_half_closes_until_both_sides_end() {
    let mut world = World::new(usual());
    let (mut client, mut server) = upgraded(&mut world).await;
    client.send("\0no http\n").await;
    let mut read = [0; 9];
    timeout(SOON, server.read_exact(&mut read)).await.expect("in time").expect("open");
    assert_eq!(&read, b"\0no http\n");
    client.stream.shutdown().await.expect("open");
    assert_eq!(timeout(SOON, server.read(&mut read)).await.expect("in time").expect("an orderly end"), 0);
    server.write_all(b"last").await.expect("open");
    drop(server);
    assert_eq!(client.exactly(4).await, "last");
    assert_eq!(client.more().await, 0, "an orderly end");
    world.b.until_counted(&["istio_requests_total", "response_code=\"101\""]).await;
}

#[tokio::test]
async fn a_websocket_that_lost_its_permission_is_reset() {
    // T-18
    let mut world = World::new(usual());
    let (mut client, mut server) = upgraded(&mut world).await;
    world.b.publish(without_public());
    let reset =
        timeout(Duration::from_secs(1), client.stream.read(&mut [0; 1])).await.expect("within a second");
    assert!(reset.is_err(), "{reset:?}");
    assert!(timeout(SOON, server.read(&mut [0; 1])).await.expect("in time").is_err());
}

#[tokio::test]
async fn only_a_websocket_that_was_asked_for_is_one() {
    let mut world = World::new(usual());
    let mut client = Raw::new(&world).await;
    client.send(get("/public")).await;
    let (mut server, _) = world.backend.recv().await.expect("reached");
    let answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    server.write_all(answer).await.expect("open");
    assert_eq!(client.answer().await.status, 502);
    for bad in [
        WEBSOCKET.replace("\r\n\r\n", "\r\nContent-Length: 3\r\n\r\nabc"),
        WEBSOCKET.replace("HTTP/1.1", "HTTP/1.0"),
    ] {
        let mut client = Raw::new(&world).await;
        assert_eq!(client.ask(bad).await.status, 400);
    }
}

// ---- live ----------------------------------------------------------------------------------------------------------

/// As the usual ones, but only `/other` is allowed.
fn without_public() -> Vec<Value> {
    let mut documents = documents("STRICT");
    documents.push(allow(json!([{"to": [{"operation": {"paths": ["/other*"]}}]}])));
    documents
}

#[tokio::test]
async fn an_answer_under_way_that_lost_its_permission_is_reset_within_a_second() {
    // T-18
    let mut world = World::new(usual());
    let mut client = Raw::new(&world).await;
    client.send(get("/public")).await;
    let (mut server, _) = world.backend.recv().await.expect("reached");
    server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart").await.expect("open");
    client.until("part").await;
    world.b.publish(without_public());
    let reset =
        timeout(Duration::from_secs(1), client.stream.read(&mut [0; 1])).await.expect("within a second");
    assert!(reset.is_err(), "{reset:?}");
    world.b.until_counted(&["culvert_denials_total", "no_rule_allows"]).await;
}

#[tokio::test]
async fn a_request_that_waits_for_its_answer_is_told_no() {
    // T-18
    let mut world = World::new(usual());
    let mut client = Raw::new(&world).await;
    client.send(get("/public")).await;
    let _server = world.backend.recv().await.expect("reached");
    world.b.publish(without_public());
    let answer = timeout(Duration::from_secs(1), client.answer()).await.expect("within a second");
    assert_eq!((answer.status, answer.body.as_str()), (403, "RBAC: access denied"));
}

#[tokio::test]
async fn an_idle_connection_is_judged_by_its_next_request() {
    let mut world = World::new(usual());
    serve_echo(&mut world);
    let mut client = Raw::new(&world).await;
    assert_eq!(client.ask(get("/public")).await.status, 200);
    world.b.publish(without_public());
    assert_eq!(client.ask(get("/public")).await.status, 403);
    assert_eq!(client.ask(get("/other")).await.status, 200);
    world.b.publish(usual());
    assert_eq!(client.ask(get("/public")).await.status, 200);
}

#[tokio::test]
async fn of_many_streams_only_those_end_that_lost_their_permission() {
    let mut world = World::new(usual());
    let (sender, body) = mpsc::channel(1);
    let mut client = http2_client(world.a.connect(FRONTEND, at(SERVICE, 80)).await).await;
    let mut documents = documents("STRICT");
    documents.push(allow(json!([{"to": [{"operation": {"paths": ["/public*", "/other*"]}}]}])));
    world.b.publish(documents);
    serve_grpc(&mut world);
    let stream = |path: &str, body: mpsc::Receiver<Bytes>| {
        let frames = futures_util::stream::unfold(body, |mut body| async {
            Some((Ok(Frame::data(body.recv().await?)), body))
        });
        let request = Request::post(format!("http://a{path}"));
        request.body(StreamBody::new(frames).boxed_unsync()).expect("a request")
    };
    let (other_sender, other_body) = mpsc::channel(1);
    let lost = client.send_request(stream("/public", body)).await.expect("an answer");
    let kept = client.send_request(stream("/other", other_body)).await.expect("an answer");
    sender.send(Bytes::from("a")).await.expect("open");
    let mut lost = lost.into_body();
    assert_eq!(lost.frame().await.expect("more").expect("open").into_data().expect("data"), "a");
    world.b.publish(without_public());
    let reset = timeout(Duration::from_secs(1), lost.frame()).await.expect("within a second");
    assert!(reset.expect("no orderly end").is_err());
    other_sender.send(Bytes::from("b")).await.expect("open");
    drop(other_sender);
    assert_eq!(kept.into_body().collect().await.expect("whole").to_bytes(), "b");
}

#[tokio::test]
async fn a_port_that_is_judged_otherwise_closes_what_is_open() {
    let mut world = World::new(usual());
    serve_echo(&mut world);
    let mut client = Raw::new(&world).await;
    assert_eq!(client.ask(get("/public")).await.status, 200);
    world.b.publish(documents("STRICT"));
    client.is_closed().await;
    // And the other way round: a byte stream may carry anything.
    let mut stream = Raw::new(&world).await;
    assert_eq!(stream.ask(get("/private")).await.status, 200);
    world.b.publish(usual());
    let mut rest = Vec::new();
    let read =
        timeout(Duration::from_secs(1), stream.stream.read_to_end(&mut rest)).await.expect("within a second");
    assert!(read.is_err(), "a reset");
}

#[tokio::test]
async fn a_drain_lets_the_request_under_way_end_and_closes() {
    let mut world = World::new(usual());
    let mut idle = Raw::new(&world).await;
    idle.send("").await;
    let mut client = Raw::new(&world).await;
    client.send(get("/public")).await;
    let (mut server, _) = world.backend.recv().await.expect("reached");
    world.b.shared.closing.cancel();
    server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.expect("open");
    assert_eq!(client.answer().await.body, "ok");
    client.is_closed().await;
}

// ---- bounds --------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_slow_reader_on_either_side_stops_the_sender_after_a_bounded_number_of_bytes() {
    // T-11. Windows, buffers, and the kernel's own buffers of six sockets, up to 32 MiB each.
    const BYTES_MAX: usize = 208 * 1024 * 1024;
    let junk = vec![b'x'; 256 * 1024];
    let fill = async |stream: &mut TcpStream| {
        let mut taken = 0;
        while let Ok(written) = timeout(Duration::from_millis(500), stream.write(&junk)).await {
            taken += written.expect("open");
            assert!(taken < BYTES_MAX, "{taken} bytes without a reader");
        }
        assert!(taken > 1024 * 1024, "{taken}");
    };
    let mut world = World::new(usual());
    let mut up = Raw::new(&world).await;
    up.send("POST /public HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n").await;
    let _unread = world.backend.recv().await.expect("reached");
    fill(&mut up.stream).await;
    let mut down = Raw::new(&world).await;
    down.send(get("/public")).await;
    let (mut server, _) = world.backend.recv().await.expect("reached");
    server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n").await.expect("open");
    fill(&mut server).await;
}

#[tokio::test]
async fn many_bytes_arrive_whole_in_both_framings() {
    let mut world = World::new(usual());
    serve_echo(&mut world);
    let body: String = (0..400_000).map(|number| format!("{number:07} ")).collect();
    let mut client = Raw::new(&world).await;
    let head = format!("POST /public HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
    let answer = client.ask(format!("{head}{body}")).await;
    assert!(answer.body.ends_with(&body));
    let mut chunked = "POST /public HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned();
    for piece in body.as_bytes().chunks(7_777) {
        chunked.push_str(&format!("{:x}\r\n{}\r\n", piece.len(), String::from_utf8_lossy(piece)));
    }
    let answer = client.ask(chunked + "0\r\n\r\n").await;
    assert!(answer.body.ends_with(&body));
}

// ---- tokens --------------------------------------------------------------------------------------------------------

const ISSUER: &str = "https://issuer.example";

/// A token of the issuer is needed, its keys are at `url`, and only `alice` may come.
fn with_tokens(url: &str) -> Vec<Value> {
    let mut documents = documents("STRICT");
    documents.push(json!({
        "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
        "metadata": {"name": "backend", "namespace": "photo"},
        "spec": {"selector": {"matchLabels": {"app": "backend"}},
                 "jwtRules": [{"issuer": ISSUER, "jwksUri": url, "audiences": ["photo"]}]},
    }));
    documents
        .push(allow(json!([{"from": [{"source": {"requestPrincipals": [format!("{ISSUER}/alice")]}}]}])));
    documents
}

fn bearing(token: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n")
}

#[tokio::test]
async fn tokens_are_verified_with_the_keys_of_their_issuer() {
    // F-2
    let (signer, stranger) = (Signer::new("a"), Signer::new("a"));
    let server = Server::start(Mode::Text(key_set(&[&signer]))).await;
    let mut world = World::new(with_tokens(&server.url("/keys")));
    serve_echo(&mut world);
    let claims = |changed: Value| {
        let mut claims = json!({"iss": ISSUER, "sub": "alice", "aud": "photo", "exp": 4_000_000_000_u64});
        for (name, value) in changed.as_object().expect("an object") {
            claims[name] = value.clone();
        }
        claims
    };
    let good = signer.token(&claims(json!({})));
    let mut client = Raw::new(&world).await;
    for _ in 0..3 {
        let answer = client.ask(bearing(&good)).await;
        assert_eq!(answer.status, 200);
        assert!(!answer.body.contains("authorization"), "F-2: it is not forwarded: {}", answer.body);
    }
    assert_eq!(server.asked(), 1);
    for (status, token, text) in [
        (401, stranger.token(&claims(json!({}))), "Jwt verification fails"),
        (401, signer.token(&claims(json!({"exp": 1}))), "Jwt is expired"),
        (401, signer.token(&claims(json!({"nbf": 4_000_000_000_u64}))), "Jwt not yet valid"),
        (401, signer.token(&claims(json!({"aud": "other"}))), "Audiences in Jwt are not allowed"),
        (401, signer.token(&claims(json!({"iss": "other"}))), "Jwt issuer is not configured"),
        (
            401,
            "a.b".to_owned(),
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
        ),
        (
            401,
            format!("eyJhbGciOiJub25lIn0.{}.", good.split('.').nth(1).expect("a token")),
            "Jwt header [alg] is not supported",
        ),
        (403, signer.token(&claims(json!({"sub": "bob"}))), "RBAC: access denied"),
    ] {
        let answer = client.ask(bearing(&token)).await;
        assert_eq!((answer.status, answer.body.as_str()), (status, text));
    }
    assert_eq!(client.ask(get("/")).await.status, 403, "no token is nobody");
    world.b.until_counted(&["culvert_denials_total", "token_refused"]).await;
}

#[tokio::test]
async fn a_key_that_was_changed_is_found_and_a_server_that_is_away_lets_nobody_in() {
    //
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    let claims = json!({"iss": ISSUER, "sub": "alice", "aud": ["photo"]});
    let server = Server::start(Mode::Text(key_set(&[&old]))).await;
    let mut world = World::new(with_tokens(&server.url("/keys")));
    serve_echo(&mut world);
    let mut client = Raw::new(&world).await;
    assert_eq!(client.ask(bearing(&old.token(&claims))).await.status, 200);
    server.set(Mode::Text(key_set(&[&new])));
    assert_eq!(client.ask(bearing(&new.token(&claims))).await.status, 200);
    let away = Server::start(Mode::Raw(String::new())).await;
    world.b.publish(with_tokens(&away.url("/keys")));
    let answer = client.ask(bearing(&new.token(&claims))).await;
    assert_eq!((answer.status, answer.body.as_str()), (401, "Jwks remote fetch is failed"));
}

#[tokio::test]
async fn a_cookie_with_a_token_that_is_not_forwarded_stays_behind() {
    // F-2
    let signer = Signer::new("a");
    let server = Server::start(Mode::Text(key_set(&[&signer]))).await;
    let mut documents = with_tokens(&server.url("/keys"));
    let rule = documents.iter_mut().find(|document| document["kind"] == "RequestAuthentication");
    rule.expect("one of the documents")["spec"]["jwtRules"][0]["fromCookies"] = json!(["session"]);
    let mut world = World::new(documents);
    serve_echo(&mut world);
    let good = signer.token(&json!({"iss": ISSUER, "sub": "alice", "aud": "photo"}));
    let mut client = Raw::new(&world).await;
    for (cookies, kept) in [
        (format!("theme=dark; session={good}; sessions=3"), Some("theme=dark; sessions=3")),
        (format!("session={good}"), None),
    ] {
        let head = format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: {cookies}\r\n\r\n");
        let answer = client.ask(head).await;
        assert_eq!(answer.status, 200);
        assert!(!answer.body.contains(&good), "{}", answer.body);
        assert_eq!(answer.body.contains("cookie"), kept.is_some(), "{}", answer.body);
        assert!(kept.is_none_or(|kept| answer.body.contains(kept)), "{}", answer.body);
    }
}
