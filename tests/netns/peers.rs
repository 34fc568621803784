//! Servers and clients that others wrote, behind and before the mesh: nginx and curl, gRPC, WebSocket.
//!
//! ```text
//!   node-a  client, other (enrolled), stranger (a pod nobody enrolled)
//!   node-b  web (nginx), rpc (gRPC), chat (WebSocket), near (enrolled, the client's account: the same node)
//!   node-c  a machine without a daemon: servers of key sets
//! ```

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;

use world::World;
use world::foreign::{Dialogue, Nginx};
use world::node::Node;
use world::pod::{Family, Plan, Pod};

use crate::cases::Cases;
use crate::photo::change;
use crate::{chat, flight, rpc, web};

/// Ports of the web server: HTTP/1.1, and HTTP/2 without TLS.
pub(crate) const ONE: u16 = 8080;
pub(crate) const TWO: u16 = 8081;

/// Ports of the others.
pub(crate) const RPC: u16 = 50_051;
pub(crate) const CHAT: u16 = 8090;

/// The file of the policy that a case puts in force.
pub(crate) const FILE: &str = "policy.yaml";

/// Bytes of the file `/files/big`, and of `/files/huge`, which takes no room.
pub(crate) const BIG_BYTES: usize = 24 * 1024 * 1024;
pub(crate) const HUGE_BYTES: u64 = 1024 * 1024 * 1024;

pub(crate) const CLIENT: &str = "cluster.local/ns/shop/sa/client";

const GROUND: &str = "apiVersion: culvert.io/v1alpha1
kind: Mesh
metadata: {name: default}
spec: {trustDomain: cluster.local, podRanges: [\"10.8.0.0/16\", \"fd00:8::/32\"]}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  clusterIP: 10.96.0.30
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: http2, port: 81, targetPort: 8081}
---
apiVersion: v1
kind: Service
metadata: {name: rpc, namespace: shop}
spec:
  selector: {app: rpc}
  clusterIP: 10.96.0.31
  ports: [{name: grpc, port: 50051}]
---
apiVersion: v1
kind: Service
metadata: {name: chat, namespace: shop}
spec:
  selector: {app: chat}
  clusterIP: 10.96.0.32
  ports: [{name: http, port: 8090}]
";

/// Each place says which it is, in the answer's `X-Place` and in the log.
const SITES: &str = r#"
log_format seen escape=json '{"event":"request","id":"$http_x_case","place":"$place","method":"$request_method",'
  '"target":"$request_uri","uri":"$uri","status":"$status","host":"$http_host","peer":"$remote_addr",'
  '"connection":"$connection","stored":"$request_body_file","protocol":"$server_protocol",'
  '"claims":"$http_sec_istio_auth_userinfo","whole":"$request_completion"}';
default_type application/octet-stream;
keepalive_requests 1000000;
client_max_body_size 0;
large_client_header_buffers 8 128k;
server {
  listen [::]:8080 ipv6only=off backlog=4096;
  listen [::]:8081 ipv6only=off backlog=4096 http2;
  access_log /dev/stdout seen;
  add_header X-Place $place always;
  set $place other;
  location / { return 200 "other\n"; }
  location /public { set $place public; return 200 "public $request_method $uri\n"; }
  location /admin { set $place admin; return 200 "admin\n"; }
  location /files { set $place files; root {www}; }
  location /gz { set $place gz; root {www}; gzip on; gzip_types *; gzip_min_length 1; gzip_http_version 1.0; }
  location /upload {
    set $place upload;
    client_body_in_file_only on;
    proxy_pass_request_body off;
    proxy_set_header Content-Length "";
    proxy_pass http://unix:{www}/sink.sock:/;
  }
}
server { listen unix:{www}/sink.sock; location / { return 200 "stored\n"; } }
"#;

/// All of it, started.
#[derive(Debug)]
pub(crate) struct Peers {
    // The programs first: a control group is removed when its processes have ended.
    pub(crate) nginx: Nginx,
    pub(crate) a: Arc<Node>,
    pub(crate) b: Arc<Node>,
    pub(crate) client: Arc<Pod>,
    pub(crate) other: Arc<Pod>,
    pub(crate) near: Arc<Pod>,
    pub(crate) stranger: Arc<Pod>,
    pub(crate) web: Arc<Pod>,
    pub(crate) rpc: Arc<Pod>,
    pub(crate) chat: Arc<Pod>,
    // Last: everything else is in it.
    pub(crate) world: World,
}

impl Peers {
    /// With the web server; the others are started by whoever asks for them.
    #[track_caller]
    pub(crate) fn start() -> Self {
        Self::start_with(|_, _| ())
    }

    /// The same, with a last word on what stands before the daemons are started.
    #[track_caller]
    pub(crate) fn start_with(before: impl FnOnce(&World, [&Node; 2])) -> Self {
        let world = World::new();
        let (a, b) = (world.node("node-a"), world.node("node-b"));
        let client = world.pod(&a, Plan::new("shop", "client"));
        let other = world.pod(&a, Plan::new("shop", "other").port("http", ONE));
        let stranger = world.pod(&a, Plan::new("shop", "stranger").outside());
        let near = world.pod(&b, Plan::new("shop", "near").account("client"));
        let web = world.pod(&b, Plan::new("shop", "web").port("http", ONE).port("http2", TWO));
        let rpc = world.pod(&b, Plan::new("shop", "rpc").port("grpc", RPC));
        let chat = world.pod(&b, Plan::new("shop", "chat").port("http", CHAT));
        world.documents().put("ground.yaml", GROUND);
        let www = files(world.folder());
        let nginx = web.nginx(world.folder(), &SITES.replace("{www}", &www.display().to_string()));
        before(&world, [&a, &b]);
        world.start_ca();
        world.start_daemons_of(&[&a, &b]);
        Self { nginx, a, b, client, other, near, stranger, web, rpc, chat, world }
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

    /// One of another node than the servers, and one of the same.
    pub(crate) fn far_and_near(&self) -> [&Pod; 2] {
        [&self.client, &self.near]
    }

    /// A URL of the web server, by its pod's address.
    pub(crate) fn url(&self, port: u16, path: &str) -> String {
        format!("http://{}{path}", self.web.at(Family::V4, port))
    }

    /// The gRPC server.
    #[track_caller]
    pub(crate) fn rpc_server(&self) -> Dialogue {
        self.rpc.python("rpc_server.py", &[&RPC.to_string()])
    }
}

/// What the web server serves.
fn files(folder: &Path) -> PathBuf {
    let www = folder.join("www");
    for name in ["files", "gz"] {
        std::fs::create_dir_all(www.join(name)).expect("the world's folders are writable");
    }
    let put = |name: &str, bytes: &[u8]| {
        std::fs::write(www.join(name), bytes).expect("the world's folders are writable");
    };
    put("files/big", &noise(BIG_BYTES));
    put("files/small", &noise(1000));
    put("gz/text", "a line that is long enough to be worth packing\n".repeat(2000).as_bytes());
    let huge = std::fs::File::create(www.join("files/huge")).expect("the world's folders are writable");
    huge.set_len(HUGE_BYTES).expect("a file of holes takes no room");
    www
}

/// Bytes in which nothing repeats.
pub(crate) fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

/// What curl said and got.
#[derive(Debug)]
pub(crate) struct Curl {
    /// curl's own: 0 is success.
    pub(crate) exit: i32,
    pub(crate) out: Vec<u8>,
    pub(crate) said: String,
}

impl Curl {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }
}

/// Runs curl in a pod.
#[track_caller]
pub(crate) fn curl(pod: &Pod, arguments: &[&str]) -> Curl {
    let mut all = vec!["--silent", "--show-error", "--max-time", "60", "--noproxy", "*", "--path-as-is"];
    all.extend_from_slice(arguments);
    let Output { status, stdout, stderr } = pod.run("curl", &all);
    let said = String::from_utf8_lossy(&stderr).into_owned();
    Curl { exit: status.code().unwrap_or(-1), out: stdout, said }
}

/// An AuthorizationPolicy for one of the servers, with this action and these rules (YAML, flow style).
pub(crate) fn authorization(name: &str, app: &str, action: &str, rules: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: shop}}
spec: {{selector: {{matchLabels: {{app: {app}}}}}, action: {action}, rules: {rules}}}
"
    )
}

#[test]
fn peers() {
    let peers = Peers::start();
    let mut cases = Cases::of("peers");
    web::cases(&peers, &mut cases);
    rpc::cases(&peers, &mut cases);
    chat::cases(&peers, &mut cases);
    flight::cases(&peers, &mut cases);
    cases.end();
}
