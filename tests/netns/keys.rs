//! Servers of key sets that are down, slow, too large, deceitful or change their keys (policy A-13, T-21): a token without
//! a key is not valid, the status says why, and what comes back is used again.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use world::issuer::{Mode, Root, Server, Signer, key_set};
use world::node::Node;
use world::pod::{Family, Plan, Pod};
use world::protocol::Connect;

use crate::cases::Cases;
use crate::peers::{FILE, ONE, Peers};

/// A fetch ends within this, and so does a request that waits for one (policy A-13); what follows is the machine's own.
const FETCH_TIME_MAX: Duration = Duration::from_secs(5);
const MACHINE_TIME_MAX: Duration = Duration::from_secs(2);

/// After a failed fetch the next ones come after 2 s, 4 s and so on.
const RECOVERY_TIME_MAX: Duration = Duration::from_secs(15);

/// Requests at once with tokens whose key is not there.
const HERD: usize = 40;

struct Keys {
    // Before the world in it.
    host: Arc<Pod>,
    peers: Peers,
    root: Root,
}

#[test]
fn keys() {
    let root = Root::new();
    let mut host = None;
    let peers = Peers::start_with(|world, [a, b]| {
        let roots = world.folder().join("roots.pem");
        std::fs::write(&roots, root.pem()).expect("the world's folders are writable");
        let roots = format!("roots: {}", roots.display());
        // Both know the root. Only the web server's node may speak plain http, and may reach one loopback address.
        a.set(|settings| settings.more = format!("jwks: {{{roots}}}\n"));
        b.set(|settings| {
            settings.more = format!("jwks: {{http: true, allow: [\"127.0.0.2/32\"], {roots}}}\n")
        });
        let node = world.node("node-c");
        host = Some(world.host(&node, Plan::new("nowhere", "issuer").outside()));
    });
    let keys = Keys { host: host.expect("it was made"), peers, root };
    let mut cases = Cases::of("keys");
    cases.case("a server that is down at first: refused and told, and used once it is there", || keys.down());
    cases.case("a server that says nothing: a request waits 5 s at most, others not at all", || keys.slow());
    cases.case("a set of more than 1 MiB is no set", || keys.huge());
    cases.case("keys that change: a new one is fetched for once, an old one is gone", || keys.rotating());
    cases.case("many tokens without a key fetch once", || keys.herd());
    cases.case("a redirect is not followed, wherever it leads", || keys.redirect());
    cases.case("addresses that trust this node are not asked (T-21)", || keys.forbidden());
    cases.case("plain http is not fetched where it is not configured", || keys.plain_http());
    cases.case("a server whose certificate is of another root", || keys.unknown_root());
    cases.case("a set that was there goes on while its server is away", || keys.away());
    cases.case("keys that discovery finds", || keys.discovery());
    cases.end();
}

impl Keys {
    fn ip(&self) -> IpAddr {
        self.host.v4().into()
    }

    fn server(&self, mode: Mode) -> Server {
        Server::start(self.host.namespace(), self.ip(), mode)
    }

    /// The web server asks for a token of this issuer.
    #[track_caller]
    fn require(&self, source: &str) {
        self.peers.apply(FILE, &policy("web", source));
    }

    /// The status of a request with this token.
    fn ask(&self, token: &str) -> String {
        status(&self.peers.client, &self.peers.web, token)
    }

    /// What the status says of a source.
    #[track_caller]
    fn told(&self, node: &Node, source: &str) -> Value {
        let status = node.status();
        let sets = status["key_sets"].as_array().expect("a list").clone();
        let found = sets.into_iter().find(|set| set["source"] == source);
        found.unwrap_or_else(|| panic!("{source} is not told of: {status}"))
    }

    /// A token is refused, and the status names the source with the cause.
    #[track_caller]
    fn refused(&self, source: &str, cause: &str) {
        assert_eq!(self.ask(&Signer::new("k1").token(&claims())), "401");
        let told = self.told(&self.peers.b, source);
        assert_eq!(told["keys"], Value::Null, "{told}");
        assert!(told["problem"].as_str().is_some_and(|problem| problem.contains(cause)), "{told}");
    }

    /// Asks until it is served, or for too long.
    #[track_caller]
    fn recovers(&self, token: &str) {
        let since = Instant::now();
        let mut answer = self.ask(token);
        while answer != "200" {
            assert!(since.elapsed() < RECOVERY_TIME_MAX, "{answer} for {:?}", since.elapsed());
            answer = self.ask(token);
        }
    }

    fn down(&self) {
        let (signer, server) = (Signer::new("k1"), self.server(Mode::Silent));
        server.set_down(true);
        let source = server.url("/down");
        self.require(&jwks(&source));
        self.refused(&source, "HTTP");
        // A server that is asked again and again is asked by the back-off, not by each request.
        for _ in 0..20 {
            assert_eq!(self.ask(&signer.token(&claims())), "401");
        }
        assert!(server.asked() <= 4, "{}", server.asked());
        server.set(Mode::Text(key_set(&[&signer])));
        server.set_down(false);
        self.recovers(&signer.token(&claims()));
        let told = self.told(&self.peers.b, &source);
        assert_eq!((&told["keys"], &told["problem"]), (&json!(1), &Value::Null), "{told}");
        self.peers.withdraw(FILE);
    }

    fn slow(&self) {
        let (signer, server) = (Signer::new("k1"), self.server(Mode::Silent));
        let source = server.url("/slow");
        self.require(&jwks(&source));
        let since = Instant::now();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| self.ask(&signer.token(&claims())));
            // One without a token is answered meanwhile.
            assert_eq!(self.ask(""), "403");
            assert!(since.elapsed() < FETCH_TIME_MAX, "{:?}", since.elapsed());
            assert_eq!(waiting.join().expect("no panic"), "401");
        });
        assert!(since.elapsed() < FETCH_TIME_MAX + MACHINE_TIME_MAX, "{:?}", since.elapsed());
        self.refused(&source, "within 5 s");
        server.set(Mode::Text(key_set(&[&signer])));
        self.recovers(&signer.token(&claims()));
        self.peers.withdraw(FILE);
    }

    fn huge(&self) {
        let signer = Signer::new("k1");
        let set = key_set(&[&signer]);
        let server = self.server(Mode::Text(format!("{set}{}", " ".repeat(1024 * 1024))));
        let source = server.url("/huge");
        self.require(&jwks(&source));
        self.refused(&source, "more than 1048576 bytes");
        server.set(Mode::Text(format!("{set}{}", " ".repeat(1024 * 1024 - set.len()))));
        self.recovers(&signer.token(&claims()));
        self.peers.withdraw(FILE);
    }

    fn rotating(&self) {
        let (old, new) = (Signer::new("old"), Signer::new("new"));
        let server = self.server(Mode::Text(key_set(&[&old])));
        self.require(&jwks(&server.url("/rotating")));
        assert_eq!(self.ask(&old.token(&claims())), "200");
        assert_eq!(self.ask(&new.token(&claims())), "401");
        assert_eq!(server.asked(), 2, "once at first, and once for the key that was not there");
        // Within the time in which nothing is fetched early again.
        server.set(Mode::Text(key_set(&[&new])));
        assert_eq!(self.ask(&new.token(&claims())), "401");
        assert_eq!(server.asked(), 2);
        let server = self.server(Mode::Text(key_set(&[&old])));
        self.require(&jwks(&server.url("/rotating")));
        assert_eq!(self.ask(&old.token(&claims())), "200");
        server.set(Mode::Text(key_set(&[&new])));
        assert_eq!(self.ask(&new.token(&claims())), "200", "the new key is fetched for");
        assert_eq!(self.ask(&old.token(&claims())), "401", "the old one is gone");
        assert_eq!(server.asked(), 2);
        self.peers.withdraw(FILE);
    }

    fn herd(&self) {
        let (old, new) = (Signer::new("old"), Signer::new("new"));
        let server = self.server(Mode::Text(key_set(&[&old])));
        self.require(&jwks(&server.url("/herd")));
        let all = |token: &str| {
            std::thread::scope(|scope| {
                let asked: Vec<_> = (0..HERD).map(|_| scope.spawn(|| self.ask(token))).collect();
                asked.into_iter().map(|one| one.join().expect("no panic")).collect::<Vec<_>>()
            })
        };
        let answers = all(&old.token(&claims()));
        assert!(answers.iter().all(|answer| answer == "200"), "{answers:?}");
        assert_eq!(server.asked(), 1, "the first fetch is one for all");
        server.set(Mode::Text(key_set(&[&new])));
        let answers = all(&new.token(&claims()));
        assert!(
            answers.iter().all(|answer| answer == "200"),
            "whoever waited for the fetch is judged by it: {answers:?}"
        );
        assert_eq!(server.asked(), 2, "and so is the one for the new key");
        self.peers.withdraw(FILE);
    }

    fn redirect(&self) {
        let signer = Signer::new("k1");
        let inside =
            Server::start(self.peers.b.namespace(), [127, 0, 0, 1].into(), Mode::Text(key_set(&[&signer])));
        let other = self.server(Mode::Text(key_set(&[&signer])));
        for (path, to) in [("/inwards", inside.url("/keys")), ("/elsewhere", other.url("/keys"))] {
            let server = self.server(Mode::Redirect(to));
            let source = server.url(path);
            self.require(&jwks(&source));
            self.refused(&source, "302");
            assert_eq!(self.ask(&signer.token(&claims())), "401");
        }
        assert_eq!((inside.asked(), other.asked()), (0, 0), "nobody went there");
        self.peers.withdraw(FILE);
    }

    fn forbidden(&self) {
        let signer = Signer::new("k1");
        let keys = || Mode::Text(key_set(&[&signer]));
        let node = self.peers.b.namespace();
        let loopback = Server::start(node, [127, 0, 0, 1].into(), keys());
        let own = Server::start(node, self.peers.b.v4().into(), keys());
        let ca = Server::start(self.peers.world.wire(), [10, 9, 0, 1].into(), keys());
        for (server, cause) in [(&loopback, "loopback"), (&own, "this node itself"), (&ca, "the CA")] {
            let source = server.url("/forbidden");
            self.require(&jwks(&source));
            self.refused(&source, cause);
            assert_eq!(self.ask(&signer.token(&claims())), "401");
            assert_eq!(server.asked(), 0);
        }
        for (source, cause) in [
            ("http://169.254.169.254/latest".to_owned(), "link-local"),
            ("http://100.100.100.200/keys".to_owned(), "metadata"),
            (format!("http://[::ffff:127.0.0.1]:{}/keys", port(&loopback)), "loopback"),
            (format!("http://localhost:{}/keys", port(&loopback)), "loopback"),
            (format!("http://0.0.0.0:{}/keys", port(&loopback)), "unspecified"),
        ] {
            self.require(&jwks(&source));
            self.refused(&source, cause);
        }
        // What the operator lists is asked.
        let listed = Server::start(node, [127, 0, 0, 2].into(), keys());
        self.require(&jwks(&listed.url("/listed")));
        assert_eq!(self.ask(&signer.token(&claims())), "200");
        assert_eq!((listed.asked(), loopback.asked()), (1, 0));
        self.peers.withdraw(FILE);
    }

    /// The other node's own workload is asked, from a pod of the first node.
    fn plain_http(&self) {
        let signer = Signer::new("k1");
        let (server, secure) = (
            self.server(Mode::Text(key_set(&[&signer]))),
            Server::start_tls(self.host.namespace(), self.ip(), Mode::Text(key_set(&[&signer])), &self.root),
        );
        let pod = &self.peers.other;
        let listener = pod.serve_http(ONE, "other");
        let ask = || status(&self.peers.client, pod, &signer.token(&claims()));
        self.peers.apply(FILE, &policy("other", &jwks(&server.url("/plain"))));
        assert_eq!(ask(), "401");
        assert_eq!(server.asked(), 0);
        let told = self.told(&self.peers.a, &server.url("/plain"));
        assert!(
            told["problem"].as_str().is_some_and(|problem| problem.contains("plain http is not fetched")),
            "{told}"
        );
        self.peers.apply(FILE, &policy("other", &jwks(&secure.url("/secure"))));
        assert_eq!(ask(), "200", "over TLS it is");
        self.peers.withdraw(FILE);
        pod.close_listener(listener);
    }

    fn unknown_root(&self) {
        let signer = Signer::new("k1");
        let keys = || Mode::Text(key_set(&[&signer]));
        let server = Server::start_tls(self.host.namespace(), self.ip(), keys(), &Root::new());
        let source = server.url("/unknown-root");
        self.require(&jwks(&source));
        self.refused(&source, "UnknownIssuer");
        // The same keys by a server of the root that is known.
        let known = Server::start_tls(self.host.namespace(), self.ip(), keys(), &self.root);
        self.require(&jwks(&known.url("/known-root")));
        assert_eq!(self.ask(&signer.token(&claims())), "200");
        self.peers.withdraw(FILE);
    }

    fn away(&self) {
        let (signer, other) = (Signer::new("k1"), Signer::new("k2"));
        let server = self.server(Mode::Text(key_set(&[&signer])));
        let source = server.url("/away");
        self.require(&jwks(&source));
        assert_eq!(self.ask(&signer.token(&claims())), "200");
        server.set_down(true);
        assert_eq!(self.ask(&other.token(&claims())), "401", "the early fetch fails");
        assert_eq!(self.ask(&signer.token(&claims())), "200", "and the keys that were there go on");
        let told = self.told(&self.peers.b, &source);
        assert_eq!(told["keys"], 1, "{told}");
        assert!(told["problem"].is_string(), "{told}");
        self.peers.withdraw(FILE);
    }

    fn discovery(&self) {
        let signer = Signer::new("k1");
        let set = self.server(Mode::Text(key_set(&[&signer])));
        let issuer = self.server(Mode::Text(json!({"jwks_uri": set.url("/keys")}).to_string()));
        let claims = json!({"iss": issuer.url(""), "sub": "ann"});
        self.peers.apply(FILE, &policy_of("web", &issuer.url(""), ""));
        assert_eq!(self.ask(&signer.token(&claims)), "200");
        assert_eq!((issuer.asked(), set.asked()), (1, 1));
        let broken = self.server(Mode::Text("{}".to_owned()));
        let claims = json!({"iss": broken.url(""), "sub": "ann"});
        self.peers.apply(FILE, &policy_of("web", &broken.url(""), ""));
        assert_eq!(self.ask(&signer.token(&claims)), "401");
        let told = self.told(&self.peers.b, &broken.url(""));
        assert!(told["problem"].as_str().is_some_and(|problem| problem.contains("jwks_uri")), "{told}");
        self.peers.withdraw(FILE);
    }
}

const ISSUER: &str = "https://id.shop";

fn claims() -> Value {
    json!({"iss": ISSUER, "sub": "ann"})
}

fn jwks(source: &str) -> String {
    format!(", jwksUri: \"{source}\"")
}

/// A token of the issuer is required.
fn policy(service: &str, keys: &str) -> String {
    policy_of(service, ISSUER, keys)
}

fn policy_of(app: &str, issuer: &str, keys: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: tokens, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: {app}}}}}
  jwtRules: [{{issuer: \"{issuer}\"{keys}}}]
---
{}",
        crate::peers::authorization(
            "tokens",
            app,
            "ALLOW",
            "[{from: [{source: {requestPrincipals: [\"*\"]}}]}]"
        )
    )
}

fn port(server: &Server) -> String {
    let url = server.url("");
    url.rsplit(':').next().unwrap_or_default().to_owned()
}

/// The status of one request; without a token where that is empty.
fn status(client: &Pod, server: &Pod, token: &str) -> String {
    let header = if token.is_empty() { String::new() } else { format!("Authorization: Bearer {token}\r\n") };
    let text = format!("GET /public HTTP/1.1\r\nHost: web\r\n{header}Connection: close\r\n\r\n");
    let answered = client.ask(Connect::to(server.at(Family::V4, ONE)), &text).text;
    answered.get(9..12).unwrap_or_default().to_owned()
}
