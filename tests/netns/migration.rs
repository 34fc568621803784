//! From PERMISSIVE to STRICT, and from a trial to the real thing, while clients of the mesh ask all the time: none of their
//! requests fails (policy A-6, B-11, F-3).

use serde_json::{Value, json};
use world::expect::{LINE_TIME_MAX, is};
use world::foreign::Dialogue;
use world::pod::{Family, Pod};

use crate::cases::{Cases, say};
use crate::peers::{CLIENT, ONE, Peers, authorization};
use crate::policies::{STRICT, STRICT_2018};

/// Requests that must have gone well before, between and after two changes.
const BETWEEN: u64 = 80;

#[test]
fn migration() {
    let peers = Peers::start();
    let mut cases = Cases::of("migration");
    for (name, strict) in [("2018", STRICT_2018), ("today", STRICT)] {
        for (how, requests) in [("connections", ""), ("requests", "judged by requests")] {
            cases.case(&format!("PERMISSIVE to STRICT of {name} under load, judged by {how}"), || {
                if !requests.is_empty() {
                    peers.apply(
                        "web.yaml",
                        &authorization("web", "web", "ALLOW", "[{to: [{operation: {methods: [GET]}}]}]"),
                    );
                }
                to_strict(&peers, strict);
                if !requests.is_empty() {
                    peers.withdraw("web.yaml");
                }
            });
        }
    }
    cases.case("a dry run is judged, told and counted, then enforced under load (F-3)", || {
        trial(&peers, |is_enforced| {
            let document = authorization("web", "web", "ALLOW", &rules());
            match is_enforced {
                true => document,
                false => document.replace(
                    "namespace: shop}",
                    "namespace: shop, annotations: {istio.io/dry-run: \"true\"}}",
                ),
            }
        });
    });
    cases.case(
        "enforcementMode PERMISSIVE is judged, told and counted, then ENFORCED under load (B-11)",
        || {
            trial(&peers, |is_enforced| {
                let mode = if is_enforced { "ENFORCED" } else { "PERMISSIVE" };
                format!(
                    "apiVersion: rbac.istio.io/v1alpha1
kind: ClusterRbacConfig
metadata: {{name: default}}
spec: {{mode: ON_WITH_INCLUSION, inclusion: {{namespaces: [shop]}}, enforcementMode: {mode}}}
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRole
metadata: {{name: reader, namespace: shop}}
spec: {{rules: [{{services: [\"*\"], methods: [GET], paths: [\"/public*\"]}}]}}
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRoleBinding
metadata: {{name: clients, namespace: shop}}
spec: {{subjects: [{{user: {CLIENT}}}], roleRef: {{kind: ServiceRole, name: reader}}}}
"
                )
            });
        },
    );
    cases.end();
}

fn rules() -> String {
    format!(
        "[{{from: [{{source: {{principals: [{CLIENT}]}}}}], to: [{{operation: {{methods: [GET], paths: [\"/public*\"]}}}}]}}]"
    )
}

/// Clients that ask at a constant rate, of another node and of the same.
struct Clients(Vec<Dialogue>);

impl Clients {
    #[track_caller]
    fn start(peers: &Peers) -> Self {
        let clients = peers.far_and_near().map(|pod| {
            let client = pod.python("load.py", &[]);
            let at = peers.web.at(Family::V4, ONE);
            client.ask(
                "start",
                json!({
                    "host": at.ip().to_string(), "port": at.port(), "path": "/public",
                    "staying_count": 10, "staying_per_second": 60, "fresh_count": 4, "fresh_per_second": 20,
                }),
            );
            client
        });
        Self(clients.into())
    }

    /// Waits for more of their requests.
    #[track_caller]
    fn go_on(&self) {
        let asked: Vec<_> =
            self.0.iter().map(|client| client.begin("progress", json!({"more": BETWEEN}))).collect();
        asked.into_iter().for_each(|asked| none_failed(&asked.answer()));
    }

    #[track_caller]
    fn stop(self) {
        for client in self.0 {
            let totals = client.ask("stop", json!({}));
            none_failed(&totals);
            say(&format!(
                "    {} requests, {} on a new connection after an orderly close",
                totals["succeeded"], totals["reopened"]
            ));
        }
    }
}

#[track_caller]
fn none_failed(totals: &Value) {
    assert_eq!(totals["failed"], json!({}), "{totals}");
}

fn is_served(peers: &Peers, pod: &Pod) -> bool {
    pod.http(peers.web.at(Family::V4, ONE)).text.starts_with("HTTP/1.1 ")
}

fn to_strict(peers: &Peers, strict: &str) {
    assert!(is_served(peers, &peers.stranger), "PERMISSIVE");
    let clients = Clients::start(peers);
    clients.go_on();
    peers.apply("strict.yaml", strict);
    assert!(!is_served(peers, &peers.stranger), "STRICT");
    clients.go_on();
    let asked = peers.stranger.http(peers.web.at(Family::V4, ONE));
    assert_eq!(asked.text, "", "and it stays so: {asked:?}");
    peers.withdraw("strict.yaml");
    clients.go_on();
    assert!(is_served(peers, &peers.stranger), "PERMISSIVE again");
    clients.stop();
}

/// What would be denied is served, told and counted while it is tried; then denied.
fn trial(peers: &Peers, document: impl Fn(bool) -> String) {
    let ask = |path: &str| {
        let to = world::protocol::Connect::to(peers.web.at(Family::V4, ONE));
        let text = format!("GET {path} HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n");
        peers.client.ask(to, &text).text
    };
    let clients = Clients::start(peers);
    clients.go_on();
    let watch = peers.b.watch();
    let log = peers.b.log();
    peers.apply("trial.yaml", &document(false));
    let from = log.position();
    assert!(ask("/admin").starts_with("HTTP/1.1 200 "), "only tried");
    let line = log
        .wait_from(from, "the would-be verdict", LINE_TIME_MAX, |line| is(line, "shadow.verdict", "denied"));
    assert!(is(&line, "verdict", "allowed") && line["status"] == 200, "{line}");
    clients.go_on();
    assert!(
        watch.grew("culvert_shadow_verdicts_total", &[("verdict", "denied")]) >= 1.0,
        "what would be denied is counted"
    );
    assert!(
        watch.grew("culvert_shadow_verdicts_total", &[("verdict", "allowed")]) >= 1.0,
        "what would be allowed too"
    );
    peers.apply("trial.yaml", &document(true));
    assert!(ask("/admin").starts_with("HTTP/1.1 403 "), "enforced");
    clients.go_on();
    peers.withdraw("trial.yaml");
    assert!(ask("/admin").starts_with("HTTP/1.1 200 "));
    clients.stop();
}
