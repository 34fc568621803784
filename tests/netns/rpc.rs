//! gRPC of others behind the mesh: all kinds of calls, their ends, and how a no looks to them (policy B-12, A-12).

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use world::expect::{LINE_TIME_MAX, is};
use world::foreign::Dialogue;
use world::issuer::{Signer, key_set};
use world::pod::{Family, Pod};

use crate::cases::Cases;
use crate::peers::{CLIENT, Peers, RPC, authorization};
use crate::policies::STRICT;

const OK: u64 = 0;
const CANCELLED: u64 = 1;
const DEADLINE_EXCEEDED: u64 = 4;
const PERMISSION_DENIED: u64 = 7;
const RESOURCE_EXHAUSTED: u64 = 8;
const UNAUTHENTICATED: u64 = 16;

/// Bytes of a big message: many times what a stream may have on its way.
const BIG_MESSAGE_BYTES: usize = 12 * 1024 * 1024;

/// The client may call everything but `Fail` of other methods' kind, and may ask for health.
fn usual() -> String {
    let paths = ["Unary", "Fail", "Down", "Up", "Talk", "Hang"]
        .map(|name| format!("/culvert.Test/{name}"))
        .join(", ");
    let rules = format!(
        "[{{from: [{{source: {{principals: [{CLIENT}]}}}}], to: [{{operation: {{paths: [{paths}, /grpc.health.v1.Health/Check]}}}}]}}]"
    );
    format!("{STRICT}---\n{}", authorization("rpc", "rpc", "ALLOW", &rules))
}

pub(crate) fn cases(peers: &Peers, cases: &mut Cases) {
    let server = peers.rpc_server();
    cases.case("gRPC is judged by requests from here on", || peers.apply("rpc.yaml", &usual()));
    for pod in peers.far_and_near() {
        let client = pod.python("rpc_client.py", &[]);
        let name = pod.name();
        let call = Call { to: peers.rpc.at(Family::V4, RPC).to_string(), client: &client, server: &server };
        cases.case(&format!("gRPC {name}: calls of all four kinds, and their status and trailers"), || {
            call.kinds()
        });
        cases.case(&format!("gRPC {name}: big messages"), || call.big());
        cases.case(&format!("gRPC {name}: a deadline, and a cancellation that reaches the server"), || {
            call.given_up()
        });
        cases.case(&format!("gRPC {name}: the standard health check"), || call.health());
        cases.case(&format!("gRPC {name}: denied is 7, unauthenticated is 16"), || call.refused(peers));
    }
    let other = peers.other.python("rpc_client.py", &[]);
    cases.case("gRPC: another account is denied with 7, and the server sees nothing of it", || {
        let from = server.log().position();
        let answer = other.ask("unary", json!({"to": peers.rpc.at(Family::V4, RPC).to_string()}));
        assert_eq!(answer["code"], PERMISSION_DENIED, "{answer}");
        assert_eq!(answer["details"], "RBAC: access denied");
        assert!(server.log().since(from).is_empty());
    });
    cases.case("gRPC: a server that is away is UNAVAILABLE", || away(peers, &peers.client));
    cases.case("gRPC is open again", || peers.withdraw("rpc.yaml"));
}

struct Call<'a> {
    to: String,
    client: &'a Dialogue,
    server: &'a Dialogue,
}

impl Call<'_> {
    #[track_caller]
    fn ask(&self, what: &str, mut arguments: Value) -> Value {
        arguments["to"] = json!(self.to);
        self.client.ask(what, arguments)
    }

    fn kinds(&self) {
        let answer = self.ask("unary", json!({"size": 1000}));
        assert_eq!((&answer["code"], &answer["same"]), (&json!(OK), &json!(true)), "{answer}");
        assert_eq!(answer["first"]["x-first"], "'kept'", "{answer}");
        assert_eq!(answer["trailers"]["x-trailer"], "'kept'", "{answer}");
        assert_eq!(answer["trailers"]["x-trailer-bin"], "b'\\x00\\xff'", "{answer}");
        let answer = self.ask("unary", json!({"method": "Fail"}));
        assert_eq!(answer["code"], RESOURCE_EXHAUSTED, "{answer}");
        assert_eq!(answer["details"], "quota of 100 % ünits", "{answer}");
        assert_eq!(answer["trailers"]["x-trailer"], "'kept'", "{answer}");
        let mut wanted = Sha256::new();
        (0..200_u8).for_each(|number| wanted.update([number; 1000]));
        let answer = self.ask("down", json!({"count": 200, "size": 1000}));
        assert_eq!(
            (&answer["code"], &answer["sha256"]),
            (&json!(OK), &json!(hex(&wanted.finalize()))),
            "{answer}"
        );
        let answer = self.ask("up", json!({"count": 200, "size": 1000}));
        assert_eq!((&answer["code"], &answer["heard"]["count"]), (&json!(OK), &json!(200)), "{answer}");
        assert_eq!(answer["heard"]["sha256"], answer["sha256"], "{answer}");
        self.ask("talk", json!({"name": "t"}));
        for text in ["one", "two", "three"] {
            assert_eq!(self.client.ask("exchange", json!({"name": "t", "text": text}))["heard"], text);
        }
        assert_eq!(self.client.ask("finish", json!({"name": "t"}))["code"], OK);
    }

    fn big(&self) {
        let answer = self.ask("unary", json!({"size": BIG_MESSAGE_BYTES}));
        assert_eq!((&answer["code"], &answer["same"]), (&json!(OK), &json!(true)), "{answer}");
    }

    fn given_up(&self) {
        let from = self.server.log().position();
        let answer = self.ask("unary", json!({"method": "Hang", "timeout": 0.5}));
        assert_eq!(answer["code"], DEADLINE_EXCEEDED, "{answer}");
        let line = self
            .server
            .log()
            .wait_from(from, "that it hangs", LINE_TIME_MAX, |line| is(line, "event", "hanging"));
        let remaining = line["remaining"].as_f64().expect("the deadline came along");
        assert!((0.1..0.6).contains(&remaining), "{line}");
        self.server
            .log()
            .wait_from(from, "that the call ended", LINE_TIME_MAX, |line| is(line, "event", "ended"));
        let from = self.server.log().position();
        self.ask("begin", json!({"name": "c"}));
        self.server
            .log()
            .wait_from(from, "that it hangs", LINE_TIME_MAX, |line| is(line, "event", "hanging"));
        assert_eq!(self.client.ask("cancel", json!({"name": "c"})), true);
        self.server
            .log()
            .wait_from(from, "that the call ended", LINE_TIME_MAX, |line| is(line, "event", "ended"));
        // The connection lives on.
        self.ask("talk", json!({"name": "after"}));
        assert_eq!(self.client.ask("exchange", json!({"name": "after", "text": "x"}))["heard"], "x");
        assert_eq!(self.client.ask("finish", json!({"name": "after"}))["code"], OK);
    }

    fn health(&self) {
        let answer = self.ask("health", json!({"service": "culvert.Test"}));
        assert_eq!((&answer["code"], &answer["status"]), (&json!(OK), &json!(1)), "SERVING: {answer}");
        assert_eq!(self.ask("health", json!({"service": "unknown"}))["code"], 5);
    }

    fn refused(&self, peers: &Peers) {
        let answer = self.ask("unary", json!({"method": "Other"}));
        assert_eq!(
            (&answer["code"], &answer["details"]),
            (&json!(PERMISSION_DENIED), &json!("RBAC: access denied"))
        );
        self.ask("talk", json!({"name": "denied", "method": "DeniedLater"}));
        let answer = self.client.ask("exchange", json!({"name": "denied", "text": "x"}));
        assert_eq!(answer["code"], PERMISSION_DENIED, "{answer}");
        let signer = Signer::new("k1");
        let keys = key_set(&[&signer]);
        let document = format!(
            "{}---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: rpc, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: rpc}}}}
  jwtRules: [{{issuer: \"https://id.shop\", jwks: '{keys}'}}]
",
            usual()
        );
        peers.apply("rpc.yaml", &document);
        let from = self.server.log().position();
        for (claims, expected) in [
            (json!({"iss": "https://id.shop", "sub": "ann"}), OK),
            (json!({"iss": "https://id.shop", "sub": "ann", "exp": 1}), UNAUTHENTICATED),
            (json!({"iss": "https://elsewhere", "sub": "ann"}), UNAUTHENTICATED),
        ] {
            let token = format!("Bearer {}", signer.token(&claims));
            let answer = self.ask("unary", json!({"metadata": [["authorization", token]]}));
            assert_eq!(answer["code"], expected, "{claims}: {answer}");
        }
        let calls = self.server.log().since(from).iter().filter(|line| is(line, "event", "call")).count();
        assert_eq!(calls, 1, "what is refused is not seen by the server");
        peers.apply("rpc.yaml", &usual());
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Nobody listens at the chat's port yet.
fn away(peers: &Peers, pod: &Pod) {
    let client = pod.python("rpc_client.py", &[]);
    let rules = "[{to: [{operation: {paths: [\"/culvert.Test/*\"]}}]}]";
    peers.apply("chat.yaml", &authorization("chat", "chat", "ALLOW", rules));
    let answer =
        client.ask("unary", json!({"to": peers.chat.at(Family::V4, crate::peers::CHAT).to_string()}));
    assert_eq!(answer["code"], 14, "{answer}");
    peers.withdraw("chat.yaml");
}

/// How a stream that lost its permission ends for its client: with the reset of a stream, whichever code that becomes.
pub(crate) fn is_cut(ended: &Value) -> bool {
    [CANCELLED, 2, PERMISSION_DENIED, 13, 14].iter().any(|code| ended["code"] == *code)
}
