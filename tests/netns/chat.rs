//! WebSocket through the mesh: the request that asks for it is judged, and what it became lives as long as its permission.

use std::time::{Duration, Instant};

use serde_json::json;
use world::expect::{LINE_TIME_MAX, is};
use world::pod::Family;

use crate::cases::Cases;
use crate::peers::{CHAT, CLIENT, Peers, authorization};
use crate::policies::STRICT;

/// What lost its permission is closed within a second (policy B-10, DESIGN 3.4.6); one of the machine's own on top.
pub(crate) const CUT_TIME_MAX: Duration = Duration::from_secs(2);

/// The client may open these rooms.
fn rooms(paths: &str) -> String {
    let rules = format!(
        "[{{from: [{{source: {{principals: [{CLIENT}]}}}}], to: [{{operation: {{methods: [GET], paths: [{paths}]}}}}], when: [{{key: \"request.headers[upgrade]\", notValues: [h2c]}}]}}]"
    );
    format!("{STRICT}---\n{}", authorization("chat", "chat", "ALLOW", &rules))
}

pub(crate) fn cases(peers: &Peers, cases: &mut Cases) {
    let server = peers.chat.python("chat_server.py", &[&CHAT.to_string()]);
    for pod in peers.far_and_near() {
        let client = pod.python("chat_client.py", &[]);
        let name = pod.name();
        let uri = |path: &str| format!("ws://{}{path}", peers.chat.at(Family::V4, CHAT));
        cases.case(&format!("WebSocket {name}: opened by a request that policy allows, else 403"), || {
            peers.apply("chat.yaml", &rooms("/room/1, /room/2"));
            let from = server.log().position();
            let open = |name: &str, path: &str| client.ask("open", json!({"name": name, "uri": uri(path)}));
            let refused = open("no", "/room/3");
            assert_eq!((&refused["status"], &refused["body"]), (&json!(403), &json!("RBAC: access denied")));
            assert_eq!(open("no", "/room/1/../3")["status"], 403);
            assert!(!server.log().since(from).iter().any(|line| is(line, "event", "opened")));
            assert_eq!(open("one", "/room/1")["status"], 101);
            assert_eq!(open("two", "/room/2")["status"], 101);
            assert_eq!(client.ask("exchange", json!({"name": "one", "text": "hello"})), "hello");
            assert_eq!(client.ask("bulk", json!({"name": "two", "size": 8 * 1024 * 1024})), true);
        });
        cases.case(
            &format!("WebSocket {name}: what lost its permission is cut within a second, another lives on"),
            || {
                // Another change leaves both as they are.
                peers.apply("other.yaml", &authorization("other", "web", "ALLOW", "[{}]"));
                peers.withdraw("other.yaml");
                for room in ["one", "two"] {
                    assert_eq!(client.ask("exchange", json!({"name": room, "text": "still"})), "still");
                }
                let log = peers.b.log();
                let from = log.position();
                let ending = client.begin("ending", json!({"name": "one"}));
                let started = Instant::now();
                peers.apply("chat.yaml", &rooms("/room/2"));
                assert!(ending.answer().as_str().is_some_and(|how| how.starts_with("ConnectionClosed")));
                assert!(started.elapsed() < CUT_TIME_MAX, "{:?}", started.elapsed());
                log.wait_from(from, "that it lost its permission", LINE_TIME_MAX, |line| {
                    is(line, "verdict", "denied")
                        && is(line, "reason", "no_rule_allows")
                        && line["status"] == 101
                });
                assert_eq!(client.ask("exchange", json!({"name": "two", "text": "on"})), "on");
                assert_eq!(client.ask("close", json!({"name": "two"})), "closed");
                peers.withdraw("chat.yaml");
            },
        );
    }
}
