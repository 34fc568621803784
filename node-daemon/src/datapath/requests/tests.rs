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
    world.b.until_counted(&["istio_requests_total", "response_code=\"403\"", "mutual_tls", " 6"]).await;
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
    let answer =
        client.ask("POST /public HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello").await;
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
    let head = |path: &str| format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n");
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
    let grpc = "POST /public HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc\r\nContent-Length: 0\r\n\r\n";
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
        let answer = client.send_request(call("/private/Call", "application/grpc+proto")).await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()["grpc-status"], "7");
        assert_eq!(answer.headers()["grpc-message"], "RBAC: access denied");
        assert_eq!(answer.headers()["content-type"], "application/grpc");
        let answer = client.send_request(call("/private", "text/plain")).await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::FORBIDDEN);
        assert_eq!(answer.into_body().collect().await.expect("whole").to_bytes(), "RBAC: access denied");
    }
    assert_eq!(world.b.ground.dials(at(BACKEND, 8080)), 1);
    world.b.until_counted(&["istio_requests_total", "response_code=\"200\"", "http/2", " 6"]).await;
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
