//! nginx behind the mesh, asked by curl and by bytes: HTTP as it is must stay as it is, and what policy denies is never
//! reached, however it is spelt (T-22).

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use world::expect::{LINE_TIME_MAX, is};
use world::issuer::{Signer, key_set};
use world::pod::{Family, Pod};
use world::protocol::Connect;

use crate::cases::Cases;
use crate::peers::{BIG_BYTES, CLIENT, Curl, ONE, Peers, TWO, authorization, curl, noise};
use crate::policies::STRICT;

/// How curl is told the version of HTTP, and the port that speaks it.
const VERSIONS: [(&str, u16); 2] = [("--http1.1", ONE), ("--http2-prior-knowledge", TWO)];

/// The client may do all but reach `/admin`, for which it needs a header.
fn usual() -> String {
    let rules = format!(
        "[{{from: [{{source: {{principals: [{CLIENT}]}}}}], to: [{{operation: {{methods: [GET, HEAD, POST, PUT], paths: [\"/public*\", \"/files/*\", \"/gz/*\", \"/upload/*\"]}}}}]}},
          {{from: [{{source: {{principals: [{CLIENT}]}}}}], to: [{{operation: {{paths: [\"/admin*\"]}}}}], when: [{{key: \"request.headers[x-role]\", values: [admin]}}]}}]"
    );
    format!("{STRICT}---\n{}", authorization("web", "web", "ALLOW", &rules))
}

pub(crate) fn cases(peers: &Peers, cases: &mut Cases) {
    cases.case("the web server is judged by requests from here on", || peers.apply("web.yaml", &usual()));
    for (version, port) in VERSIONS {
        for pod in peers.far_and_near() {
            let name = pod.name();
            cases.case(&format!("web {version} {name}: a large file arrives whole"), || {
                download(peers, pod, version, port);
            });
            cases.case(&format!("web {version} {name}: uploads arrive whole, chunked or not"), || {
                upload(peers, pod, version, port);
            });
            cases.case(&format!("web {version} {name}: HEAD, ranges, conditions and packed bodies"), || {
                untouched(peers, pod, version, port);
            });
            cases.case(&format!("web {version} {name}: a no is a 403 with its words (B-12)"), || {
                forbidden(peers, pod, version, port);
            });
            cases.case(&format!("web {version} {name}: too many and too long headers are refused"), || {
                huge_headers(peers, pod, version, port);
            });
        }
    }
    for pod in peers.far_and_near() {
        let name = pod.name();
        cases.case(&format!("web {name}: a connection is kept for many requests"), || kept(peers, pod));
        cases.case(&format!("web {name}: HTTP/1.1 stays HTTP/1.1, whatever upgrade is offered"), || {
            not_upgraded(peers, pod);
        });
    }
    cases.case("web: requests one behind the other are answered in order", || pipelined(peers));
    cases.case("web: a Host with a dot at its end, and absolute URIs", || hosts(peers));
    cases.case("web: a head of 1 MiB is refused with 431, whichever line it is", || endless_line(peers));
    for token_age in ["2018", "today"] {
        cases.case(&format!("web: tokens and their faults, by objects of {token_age} (A-12, F-2)"), || {
            tokens(peers, token_age);
        });
    }
    cases.case("web: no spelling reaches what no rule allows (T-22)", || {
        tricks(
            peers,
            &authorization("web", "web", "ALLOW", "[{to: [{operation: {paths: [\"/public*\"]}}]}]"),
            &[],
        );
    });
    cases.case(
        "web: no spelling reaches what a rule denies, but where the server merges slashes, which stay (T-22, B-5)",
        || {
            let deny = "[{to: [{operation: {paths: [\"/admin*\"]}}]}]";
            tricks(
                peers,
                &authorization("web", "web", "DENY", deny),
                &["//admin", "///admin/x", "/.//admin", "//public/../admin", "/%2fadmin", "/%2Fadmin"],
            );
        },
    );
    cases.case("the web server is open again", || peers.withdraw("web.yaml"));
}

#[track_caller]
fn good(got: &Curl) {
    assert_eq!(got.exit, 0, "{}", got.said);
}

fn kept(peers: &Peers, pod: &Pod) {
    let from = peers.nginx.log().position();
    let (public, admin) = (peers.url(ONE, "/public/x"), peers.url(ONE, "/admin"));
    let write = "%{num_connects} %{http_code}\\n";
    let to_nowhere = ["-o", "/dev/null"].repeat(4);
    let mut arguments = vec!["--http1.1", "-w", write, &public, &admin, &admin, &public];
    arguments.extend_from_slice(&to_nowhere);
    let got = curl(pod, &arguments);
    good(&got);
    assert_eq!(got.text(), "1 200\n0 403\n0 403\n0 200\n");
    let lines = requests(peers, from, 2);
    assert_eq!(lines[0]["connection"], lines[1]["connection"], "and one to the server: {lines:?}");
    let peer = lines[0]["peer"].as_str().unwrap_or_default();
    assert!(peer.ends_with(&pod.v4().to_string()), "the true client: {lines:?}");
}

/// curl offers h2c; nobody may slip out of HTTP/1.1 into what nobody judges.
fn not_upgraded(peers: &Peers, pod: &Pod) {
    for (path, code) in [("/public", "200"), ("/admin", "403")] {
        let write = "%{http_code} %{http_version}";
        let got = curl(pod, &["--http2", "-o", "/dev/null", "-w", write, &peers.url(ONE, path)]);
        assert_eq!(got.text(), format!("{code} 1.1"), "{}", got.said);
    }
}

/// Waits for so many lines of the server.
#[track_caller]
fn requests(peers: &Peers, from: usize, count: usize) -> Vec<Value> {
    let log = peers.nginx.log();
    let seen = std::cell::Cell::new(0);
    log.wait_from(from, "that it served these requests", LINE_TIME_MAX, |line| {
        seen.set(seen.get() + usize::from(is(line, "event", "request")));
        seen.get() >= count
    });
    log.since(from).into_iter().filter(|line| is(line, "event", "request")).collect()
}

fn download(peers: &Peers, pod: &Pod, version: &str, port: u16) {
    let got = curl(pod, &[version, &peers.url(port, "/files/big")]);
    good(&got);
    assert_eq!(got.out.len(), BIG_BYTES);
    assert_eq!(Sha256::digest(&got.out), Sha256::digest(noise(BIG_BYTES)));
}

fn upload(peers: &Peers, pod: &Pod, version: &str, port: u16) {
    let big = peers.world.folder().join("www/files/big");
    let data = format!("@{}", big.display());
    let wanted = Sha256::digest(noise(BIG_BYTES));
    let mut ways = vec![vec!["-H", "Expect: 100-continue"]];
    if port == ONE {
        ways.push(vec!["-H", "Transfer-Encoding: chunked", "-H", "Expect:"]);
    }
    for way in ways {
        let from = peers.nginx.log().position();
        let url = peers.url(port, "/upload/x");
        let mut arguments = vec![version, "-v", "--data-binary", &data, &url];
        arguments.extend_from_slice(&way);
        let got = curl(pod, &arguments);
        good(&got);
        assert_eq!(got.text(), "stored\n", "{}", got.said);
        if port == ONE && way.len() == 2 {
            assert!(got.said.contains("HTTP/1.1 100 Continue"), "{}", got.said);
        }
        let stored = requests(peers, from, 1)[0]["stored"].as_str().expect("a file").to_owned();
        let arrived = std::fs::read(&stored).expect("the server wrote it");
        std::fs::remove_file(&stored).expect("it is there");
        assert_eq!(Sha256::digest(&arrived), wanted, "{way:?}: {} bytes", arrived.len());
    }
    // What is denied is not read first: the client learns of it before it has sent all. (curl 7.88 takes the end of a
    // stream of HTTP/2 that it still sends on for an error, also without a mesh.)
    if port == ONE {
        let got = curl(pod, &[version, "--data-binary", &data, &peers.url(port, "/admin")]);
        assert_eq!(got.text(), "RBAC: access denied", "{}", got.said);
    }
}

/// What the server says over the mesh is what it says to itself, which the mesh leaves alone.
fn untouched(peers: &Peers, pod: &Pod, version: &str, port: u16) {
    let ways: [&[&str]; 7] = [
        &["-I"],
        &["-r", "100-199"],
        &["-r", "-1"],
        &["-r", "0-9,990-"],
        &["-r", "5000-"],
        &["-H", "If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT"],
        &["-H", "If-Match: \"another\""],
    ];
    for way in ways {
        same(peers, pod, version, port, "/files/small", way);
    }
    for way in [&["-H", "Accept-Encoding: gzip"][..], &["-I", "-H", "Accept-Encoding: gzip"], &[]] {
        same(peers, pod, version, port, "/gz/text", way);
    }
    let got = curl(
        pod,
        &[
            version,
            "-I",
            &peers.url(port, "/files/small"),
            &peers.url(port, "/files/small"),
            "-w",
            "%{num_connects}\n",
        ],
    );
    assert!(got.text().ends_with("0\n"), "HEAD has no body to wait for: {}", got.text());
}

#[track_caller]
fn same(peers: &Peers, pod: &Pod, version: &str, port: u16, path: &str, way: &[&str]) {
    let ask = |pod: &Pod| {
        let url = peers.url(port, path);
        let mut arguments = vec![version, "-i", &url];
        arguments.extend_from_slice(way);
        let got = curl(pod, &arguments);
        good(&got);
        let end = got.out.windows(4).position(|bytes| bytes == b"\r\n\r\n").expect("a head") + 4;
        (head(&got.out[..end]), got.out[end..].to_vec())
    };
    let ((over_head, over), (direct_head, direct)) = (ask(pod), ask(&peers.web));
    assert_eq!(over_head, direct_head, "{path} {way:?}");
    // Parts of several ranges have a boundary that the server counts up.
    let counted = over_head.values().any(|value| value.contains("multipart"));
    assert!(over == direct || (counted && over.len() == direct.len()), "{path} {way:?}: the body is another");
}

/// The head without what names a moment or a hop.
fn head(text: &[u8]) -> BTreeMap<String, String> {
    let text = String::from_utf8_lossy(text).to_ascii_lowercase();
    let mut lines = text.lines();
    let status = lines.next().unwrap_or_default().trim().to_owned();
    let fields = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut head: BTreeMap<_, _> =
        fields.filter(|(name, _)| !["date", "connection", "keep-alive"].contains(&name.as_str())).collect();
    if let Some(kind) = head.get_mut("content-type").filter(|kind| kind.contains("boundary")) {
        kind.truncate("multipart/byteranges".len());
    }
    head.insert("status".to_owned(), status);
    head
}

fn forbidden(peers: &Peers, pod: &Pod, version: &str, port: u16) {
    let from = peers.nginx.log().position();
    for (path, more) in [
        ("/admin", &[][..]),
        ("/admin", &["-H", "x-role: user"]),
        ("/elsewhere", &[]),
        ("/public", &["-X", "DELETE"]),
        ("/public", &["-X", "get"]),
        ("/Public", &[]),
        ("/", &[]),
    ] {
        let log = peers.b.log();
        let position = log.position();
        let url = peers.url(port, path);
        let mut arguments = vec![version, "-i", &url];
        arguments.extend_from_slice(more);
        let got = curl(pod, &arguments);
        good(&got);
        let first = if port == TWO { "HTTP/2 403" } else { "HTTP/1.1 403 Forbidden" };
        assert!(got.text().starts_with(first), "{path} {more:?}: {}", got.text());
        assert!(got.text().to_ascii_lowercase().contains("\r\ncontent-length: 19\r\n"), "{}", got.text());
        assert!(got.text().ends_with("\r\n\r\nRBAC: access denied"), "{path} {more:?}: {}", got.text());
        log.wait_from(position, "that it denied the request", LINE_TIME_MAX, |line| {
            is(line, "verdict", "denied") && is(line, "reason", "no_rule_allows") && line["status"] == 403
        });
    }
    let got = curl(
        pod,
        &[
            version,
            "-H",
            "x-role: admin",
            "-H",
            "X-Case: last",
            "-H",
            "sec-istio-auth-userinfo: forged",
            &peers.url(port, "/admin"),
        ],
    );
    assert_eq!(got.text(), "admin\n");
    let lines = requests(peers, from, 1);
    assert_eq!(lines.len(), 1, "none of the others reached the server: {lines:?}");
    assert!(is(&lines[0], "claims", ""), "a reserved name is no header of a client (A-11): {lines:?}");
}

fn huge_headers(peers: &Peers, pod: &Pod, version: &str, port: u16) {
    let from = peers.nginx.log().position();
    let file = peers.world.folder().join(format!("headers-{}", pod.name()));
    let from_file = format!("@{}", file.display());
    // As much as curl sends. On HTTP/2 so many bytes are a flood of frames, which ends the connection. Many small headers are
    // too much as well; as many as servers usually take are not.
    let flooded = if port == TWO { "000" } else { "431" };
    for (count, bytes, expected) in [
        (14, 64 * 1024, flooded),
        (2, 36 * 1024, flooded),
        (200, 1, "431"),
        (80, 1, "200"),
        (16, 1024, "200"),
    ] {
        let line = |number: usize| format!("X-{number}: {}\n", "y".repeat(bytes));
        std::fs::write(&file, (0..count).map(line).collect::<String>())
            .expect("the world's folders are writable");
        let url = peers.url(port, "/public");
        let got = curl(pod, &[version, "-o", "/dev/null", "-w", "%{http_code}", "-H", &from_file, &url]);
        assert_eq!(got.text(), expected, "{count} headers of {bytes} bytes: {}", got.said);
    }
    assert_eq!(requests(peers, from, 2).len(), 2);
}

/// One conversation in bytes with the web server.
#[track_caller]
fn raw(peers: &Peers, pod: &Pod, text: &str) -> String {
    pod.ask(Connect::to(peers.web.at(Family::V4, ONE)), text).text
}

/// Status codes in their order.
fn statuses(text: &str) -> Vec<&str> {
    text.match_indices("HTTP/1.1 ").map(|(at, found)| &text[at + found.len()..][..3]).collect()
}

fn pipelined(peers: &Peers) {
    for pod in peers.far_and_near() {
        let from = peers.nginx.log().position();
        let mut text = String::new();
        for (index, path) in
            ["/public/0", "/admin", "/public/2", "/%61dmin", "/public/4"].into_iter().enumerate()
        {
            text.push_str(&format!("GET {path} HTTP/1.1\r\nHost: web\r\nX-Case: {index}\r\n\r\n"));
        }
        text.push_str("POST /upload/x HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\n\r\nfirst");
        text.push_str("POST /upload/x HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n6\r\nsecond\r\n0\r\n\r\n");
        let answered = raw(peers, pod, &text);
        assert_eq!(statuses(&answered), ["200", "403", "200", "403", "200", "200", "200"], "{answered}");
        let lines = requests(peers, from, 5);
        let ids: Vec<_> = lines.iter().map(|line| line["id"].as_str().unwrap_or_default()).collect();
        assert_eq!(ids, ["0", "2", "4", "", ""], "{lines:?}");
    }
}

fn hosts(peers: &Peers) {
    let deny = "[{to: [{operation: {hosts: [\"secret.shop\", \"secret.shop:*\"]}}]}]";
    let document = format!("{}---\n{}", usual(), authorization("hosts", "web", "DENY", deny));
    peers.apply("web.yaml", &document);
    let ask = |target: &str, host: &str| {
        raw(
            peers,
            &peers.client,
            &format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"),
        )
    };
    let from = peers.nginx.log().position();
    for (target, host, expected) in [
        ("/public", "web.shop", "200"),
        ("/public", "web.shop.", "200"),
        ("/public", "web.shop.:80", "200"),
        ("http://web.shop/public", "web.shop", "200"),
        ("HTTP://WEB.shop/public", "web.SHOP", "200"),
        ("http://web.shop/admin", "web.shop", "403"),
        ("http://web.shop/public/../admin", "web.shop", "403"),
        ("/public", "secret.shop", "403"),
        ("/public", "SECRET.shop", "403"),
        ("/public", "secret.shop.", "403"),
        ("/public", "secret.shop.:80", "403"),
        ("http://secret.shop/public", "secret.shop", "403"),
        ("http://secret.shop./public", "secret.shop.", "403"),
        ("http://secret.shop/public", "web.shop", "400"),
        ("http://web.shop/public", "secret.shop", "400"),
        ("http://user@web.shop/public", "web.shop", "400"),
        ("/public", "web.shop\r\nHost: secret.shop", "400"),
        ("/public", "web.shop..", "400"),
        ("/public", ".", "400"),
    ] {
        let answered = ask(target, host);
        assert_eq!(statuses(&answered), [expected], "{target} at {host}: {answered}");
    }
    let reached: Vec<_> = requests(peers, from, 5)
        .iter()
        .map(|line| line["host"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(
        reached,
        ["web.shop", "web.shop", "web.shop:80", "web.shop", "web.SHOP"],
        "forwarded as matched"
    );
    peers.apply("web.yaml", &usual());
}

fn endless_line(peers: &Peers) {
    let long = "y".repeat(1024 * 1024);
    for (text, expected) in [
        (format!("GET /public HTTP/1.1\r\nHost: web\r\nX-Long: {long}"), "431"),
        (format!("GET /public HTTP/1.1\r\n{long}"), "431"),
        (format!("GET /public?{long} HTTP/1.1\r\nHost: web\r\n\r\n"), "431"),
        (format!("GET /public?{long}"), "431"),
    ] {
        let answered = raw(peers, &peers.client, &text);
        assert_eq!(statuses(&answered), [expected], "{answered}");
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn tokens(peers: &Peers, age: &str) {
    let (own, foreign) = (Signer::new("k1"), Signer::new("k1"));
    let keys = key_set(&[&own]);
    let (no_token, bad_token) = match age {
        "2018" => ("401", "Origin authentication failed."),
        _ => ("403", "RBAC: access denied"),
    };
    let document = if age == "2018" {
        format!(
            "apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {{name: web, namespace: shop}}
spec:
  targets: [{{name: web}}]
  peers: [{{mtls: {{}}}}]
  origins: [{{jwt: {{issuer: \"https://id.shop\", audiences: [web], jwks: '{keys}'}}}}]
"
        )
    } else {
        format!(
            "{STRICT}---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: web, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: web}}}}
  jwtRules: [{{issuer: \"https://id.shop\", audiences: [web], jwks: '{keys}'}}]
---
{}",
            authorization(
                "web",
                "web",
                "ALLOW",
                "[{from: [{source: {requestPrincipals: [\"https://id.shop/ann\"]}}]}]"
            )
        )
    };
    peers.apply("web.yaml", &document);
    let claims = |change: Value| {
        let mut claims = json!({"iss": "https://id.shop", "sub": "ann", "aud": "web", "exp": now() + 600});
        for (name, value) in change.as_object().expect("an object") {
            claims[name] = value.clone();
        }
        claims
    };
    let token = |change: Value| own.token(&claims(change));
    let unsigned = |alg: &str, signature: &str| {
        let mut parts: Vec<String> = token(json!({})).split('.').map(str::to_owned).collect();
        parts[0] = base64_of(&json!({"alg": alg, "typ": "JWT", "kid": "k1"}).to_string());
        parts[2] = signature.to_owned();
        parts.join(".")
    };
    let table = [
        ("a good one", Some(token(json!({}))), "200", ""),
        ("none", None, no_token, ""),
        ("expired", Some(token(json!({"exp": now() - 1}))), "401", "expired"),
        ("of the future", Some(token(json!({"nbf": now() + 600}))), "401", "not_yet_valid"),
        ("for others", Some(token(json!({"aud": "elsewhere"}))), "401", "audience"),
        ("of another issuer", Some(token(json!({"iss": "https://elsewhere"}))), "401", ""),
        ("signed by another", Some(foreign.token(&claims(json!({})))), "401", ""),
        ("of an unknown key", Some(Signer::new("k2").token(&claims(json!({})))), "401", ""),
        ("unsigned", Some(unsigned("none", "")), "401", ""),
        ("HS256", Some(unsigned("HS256", "c2ln")), "401", ""),
        ("garbage", Some("x.y.z".to_owned()), "401", ""),
        ("two parts", Some("e30.e30".to_owned()), "401", ""),
    ];
    for (what, token, expected, fault) in table {
        let log = peers.b.log();
        let from = log.position();
        let header = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
        let answered = raw(
            peers,
            &peers.client,
            &format!("GET /public HTTP/1.1\r\nHost: web\r\n{header}Connection: close\r\n\r\n"),
        );
        assert_eq!(statuses(&answered), [expected], "{what}: {answered}");
        match expected {
            "200" => {}
            _ if what == "none" => {
                assert!(answered.ends_with(&format!("\r\n\r\n{bad_token}")), "{what}: {answered}")
            }
            _ => assert!(age == "today" || answered.ends_with(bad_token), "{what}: {answered}"),
        }
        let line = log.wait_from(from, "the request's line", LINE_TIME_MAX, |line| {
            line["status"].as_u64().is_some_and(|status| expected.parse() == Ok(status))
        });
        assert!(fault.is_empty() || line.to_string().contains(fault), "{what} is told as {fault}: {line}");
    }
    peers.apply("web.yaml", &usual());
}

fn base64_of(text: &str) -> String {
    use base64::Engine as _;
    base64::prelude::BASE64_URL_SAFE_NO_PAD.encode(text)
}

/// Ways to spell `/admin` so that somebody might not see it.
const TRICKS: &[&str] = &[
    "/admin",
    "/admin/",
    "/admin?x",
    "/admin#x",
    "/%61dmin",
    "/%61%64%6d%69%6e",
    "/%41dmin",
    "/%2561dmin",
    "/ADMIN",
    "/./admin",
    "/%2e/admin",
    "/.%2Fadmin",
    "/x/../admin",
    "/public/../admin",
    "/public/%2e%2e/admin",
    "/public/.%2E/admin",
    "/public/..%2fadmin",
    "/public/..%2Fadmin",
    "/public%2f..%2fadmin",
    "/public/%2e%2e%2fadmin",
    "/public/x%2f..%2f..%2fadmin",
    "/public%2f%2e%2e/admin",
    "/public/..%252fadmin",
    "/public/%252e%252e/admin",
    "/public/..;/admin",
    "/public;/../admin",
    "/public/;/admin",
    "/admin;x=y",
    "/;/admin",
    "/public\\..\\admin",
    "/public/..\\admin",
    "/public/..%5cadmin",
    "/public%5c..%5cadmin",
    "\\admin",
    "/\\admin",
    "/%5cadmin",
    "/%2fadmin",
    "/%2Fadmin",
    "%2fadmin",
    "//admin",
    "///admin/x",
    "/.//admin",
    "/public//../admin",
    "/public/..//admin",
    "//public/../admin",
    "/admin%00",
    "/admin%00/public",
    "/public%00/../admin",
    "/public/%00../admin",
    "/admin%20",
    "/admin%09",
    "/admin%0a",
    "/admin.",
    "/admin/.",
    "/admin/x/..",
    "/public/%c0%ae%c0%ae/admin",
    "/public/%e0%80%ae%e0%80%ae/admin",
    "/public/%ff../admin",
    "/public/%u002e%u002e/admin",
    "/public/%2",
    "/public/%/../admin",
    "/public?/../admin",
    "/public?x=/admin",
    "/public/..?/admin",
    "/public#/../admin",
    "/public/../../../admin",
    "/../admin",
    "/..%2f..%2fadmin",
    "/public/...//../admin",
    "/public/.../admin",
    "http://web/admin",
    "http://web/public/../admin",
    "http://web//admin",
    "http://web\\admin",
    "http://web?/admin",
    "http://web/%61dmin",
    "admin",
    "*",
    "",
    "?/admin",
];

/// Sends each, and compares what the policy said with what the server saw.
fn tricks(peers: &Peers, document: &str, merged_by_server: &[&str]) {
    peers.apply("web.yaml", &format!("{STRICT}---\n{document}"));
    let from = peers.nginx.log().position();
    let mut answers = BTreeMap::new();
    for (index, target) in TRICKS.iter().enumerate() {
        let text =
            format!("GET {target} HTTP/1.1\r\nHost: web\r\nX-Case: {index}\r\nConnection: close\r\n\r\n");
        answers.insert(index.to_string(), (*target, raw(peers, &peers.client, &text)));
    }
    // Whatever is under way is older than this one.
    raw(
        peers,
        &peers.client,
        "GET /public HTTP/1.1\r\nHost: web\r\nX-Case: last\r\nConnection: close\r\n\r\n",
    );
    peers.nginx.log().wait_from(from, "the last request", LINE_TIME_MAX, |line| is(line, "id", "last"));
    let mut reached: BTreeMap<String, Value> = BTreeMap::new();
    for line in peers.nginx.log().since(from) {
        if is(&line, "event", "request") {
            reached.insert(line["id"].as_str().unwrap_or_default().to_owned(), line);
        }
    }
    let mut wrong = Vec::new();
    for (id, (target, answered)) in &answers {
        let status = statuses(answered);
        match reached.get(id) {
            None if matches!(status[..], ["400" | "403"]) => {}
            None => {
                wrong.push(format!("{target}: {status:?} although nobody denied or served it: {answered}"))
            }
            Some(line)
                if is(line, "place", "admin")
                    && !merged_by_server.iter().any(|merged| target.ends_with(merged)) =>
            {
                wrong.push(format!("{target} reached what is denied: {line}"));
            }
            Some(line) if answered.contains("RBAC") => {
                wrong.push(format!("{target} was denied and served: {line}"))
            }
            Some(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    peers.apply("web.yaml", &usual());
}
