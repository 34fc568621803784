//! Requests that are under way when the policy changes (T-18), and readers who do not read (T-11).

use std::time::{Duration, Instant};

use serde_json::json;
use world::expect::{LINE_TIME_MAX, is};
use world::pod::{Family, Pod};
use world::protocol::{Connect, Connected};

use crate::cases::{Cases, say};
use crate::chat::CUT_TIME_MAX;
use crate::peers::{CLIENT, FILE, ONE, Peers, RPC, TWO, authorization, curl};
use crate::policies::STRICT;
use crate::rpc::is_cut;

/// Readers who have asked for a gibibyte and do not read. Fewer than may stall a tunnel, since others shall be served.
const SLOW_READERS: usize = 6;

/// Loads that are read at full speed, before the slow readers come and beside them.
const HONEST_LOADS: usize = 4;

/// What one of them may cost both daemons together, in resident memory: the window of its tunnel's stream, 4 MiB, as much again
/// for the buffers that the allocator keeps around it, and 2 MiB for what waits to be sent and was read ahead on the other
/// connections of its way. Seen: 3 to 8 MiB.
const SLOW_READER_BYTES_MAX: u64 = 10 * 1024 * 1024;

/// Only these paths.
fn only(app: &str, paths: &str) -> String {
    let rules = format!(
        "[{{from: [{{source: {{principals: [{CLIENT}]}}}}], to: [{{operation: {{paths: [{paths}]}}}}]}}]"
    );
    format!("{STRICT}---\n{}", authorization("p", app, "ALLOW", &rules))
}

pub(crate) fn cases(peers: &Peers, cases: &mut Cases) {
    for pod in peers.far_and_near() {
        let name = pod.name();
        cases.case(&format!("flight {name}: an upload in progress"), || upload(peers, pod));
        cases.case(&format!("flight {name}: an answer that streams"), || download(peers, pod));
        cases.case(&format!("flight {name}: the next request of a connection"), || next(peers, pod));
        cases.case(&format!("flight {name}: one stream of HTTP/2 among others"), || streams(peers, pod));
        cases.case(&format!("flight {name}: a change that changes nothing for it"), || unchanged(peers, pod));
    }
    for (version, port) in [("--http1.1", ONE), ("--http2-prior-knowledge", TWO)] {
        cases.case(
            &format!("readers of 1 GiB who do not read cost a bounded memory, {version} (T-11)"),
            || {
                slow_readers(peers, version, port);
            },
        );
    }
}

#[track_caller]
fn open(peers: &Peers, pod: &Pod, text: &str) -> Connected {
    let connection = pod.connect(Connect::to(peers.web.at(Family::V4, ONE)));
    assert_eq!(pod.send(&connection, text), Ok(()));
    connection
}

/// The connection ends soon.
#[track_caller]
fn ends_soon(pod: &Pod, connection: &Connected, since: Instant) {
    let ended = pod.drain(connection, Duration::from_secs(10));
    assert_ne!(ended.end, "EAGAIN", "it still stands");
    assert!(since.elapsed() < CUT_TIME_MAX, "{:?}: {ended:?}", since.elapsed());
}

fn upload(peers: &Peers, pod: &Pod) {
    peers.apply(FILE, &only("web", "/upload/*"));
    let (log, served) = (peers.b.log(), peers.nginx.log().position());
    let from = log.position();
    let begun =
        "POST /upload/x HTTP/1.1\r\nHost: web\r\nX-Case: cut\r\nContent-Length: 1000000\r\n\r\nthe beginning";
    let connection = open(peers, pod, begun);
    // Only a request that is under way can lose its permission: the answer to another one of its kind says that it is.
    let other = curl(pod, &["-d", "whole", &peers.url(ONE, "/upload/x")]);
    assert_eq!(other.text(), "stored\n", "{}", other.said);
    let since = Instant::now();
    peers.apply(FILE, &only("web", "/public*"));
    ends_soon(pod, &connection, since);
    log.wait_from(from, "that the upload lost its permission", LINE_TIME_MAX, |line| {
        is(line, "verdict", "denied") && is(line, "method", "POST") && is(line, "reason", "no_rule_allows")
    });
    let line =
        peers.nginx.log().wait_from(served, "that it ended", LINE_TIME_MAX, |line| is(line, "id", "cut"));
    assert!(["400", "499"].contains(&line["status"].as_str().unwrap_or_default()), "never whole: {line}");
    peers.withdraw(FILE);
}

fn download(peers: &Peers, pod: &Pod) {
    peers.apply(FILE, &only("web", "/files/*"));
    let from = peers.b.log().position();
    let connection = open(peers, pod, "GET /files/huge HTTP/1.1\r\nHost: web\r\n\r\n");
    assert!(pod.receive(&connection, 15).is_ok_and(|text| text == "HTTP/1.1 200 OK"));
    let since = Instant::now();
    peers.apply(FILE, &only("web", "/public*"));
    ends_soon(pod, &connection, since);
    let line = peers.b.log().wait_from(from, "that the answer lost its permission", LINE_TIME_MAX, |line| {
        is(line, "verdict", "denied") && is(line, "method", "GET") && line["status"] == 200
    });
    assert!(is(&line, "reason", "no_rule_allows"), "{line}");
    peers.withdraw(FILE);
}

fn next(peers: &Peers, pod: &Pod) {
    peers.apply(FILE, &only("web", "/files/*"));
    let ask = "HEAD /files/small HTTP/1.1\r\nHost: web\r\n\r\n";
    let connection = open(peers, pod, ask);
    assert!(pod.receive(&connection, 15).is_ok_and(|text| text == "HTTP/1.1 200 OK"));
    peers.apply(FILE, &only("web", "/public*"));
    let again = "GET /files/small HTTP/1.1\r\nHost: web\r\n\r\n";
    let answers = pod.send(&connection, again).and_then(|()| {
        let mut text = String::new();
        while !text.ends_with("RBAC: access denied") {
            text.push_str(&pod.receive(&connection, 1)?);
        }
        Ok(text)
    });
    assert!(answers.as_ref().is_ok_and(|text| text.contains("HTTP/1.1 403 ")), "{answers:?}");
    // And once it is allowed again the same connection goes on.
    peers.apply(FILE, &only("web", "/files/*"));
    assert_eq!(pod.send(&connection, ask), Ok(()));
    assert!(pod.receive(&connection, 15).is_ok_and(|text| text == "HTTP/1.1 200 OK"));
    pod.close(&connection);
    peers.withdraw(FILE);
}

fn streams(peers: &Peers, pod: &Pod) {
    let server = peers.rpc_server();
    let client = pod.python("rpc_client.py", &[]);
    let to = peers.rpc.at(Family::V4, RPC).to_string();
    peers.apply(FILE, &only("rpc", "/culvert.Test/*"));
    for (name, method) in [("lives", "Talk"), ("lost", "DeniedLater"), ("too", "Talk")] {
        client.ask("talk", json!({"to": to, "name": name, "method": method}));
        assert_eq!(client.ask("exchange", json!({"name": name, "text": "a"}))["heard"], "a");
    }
    let from = server.log().position();
    let ending = client.begin("ending", json!({"name": "lost"}));
    let since = Instant::now();
    peers.apply(FILE, &only("rpc", "/culvert.Test/Talk"));
    let ended = ending.answer();
    assert!(is_cut(&ended) && since.elapsed() < CUT_TIME_MAX, "{ended} after {:?}", since.elapsed());
    server
        .log()
        .wait_from(from, "that the stream ended", LINE_TIME_MAX, |line| is(line, "method", "denied_later"));
    for name in ["lives", "too"] {
        assert_eq!(client.ask("exchange", json!({"name": name, "text": "b"}))["heard"], "b");
        assert_eq!(client.ask("finish", json!({"name": name}))["code"], 0);
    }
    assert_eq!(
        server.log().since(from).iter().filter(|line| is(line, "event", "call")).count(),
        0,
        "nothing was asked twice"
    );
    peers.withdraw(FILE);
}

/// A policy for others, and another rule that allows the same.
fn unchanged(peers: &Peers, pod: &Pod) {
    peers.apply(FILE, &only("web", "/upload/*"));
    let served = peers.nginx.log().position();
    let begun = "POST /upload/x HTTP/1.1\r\nHost: web\r\nX-Case: kept\r\nContent-Length: 8\r\n\r\nhalf";
    let connection = open(peers, pod, begun);
    peers.apply("other.yaml", &authorization("other", "rpc", "ALLOW", "[{}]"));
    peers.apply(FILE, &only("web", "/upload/x, /public"));
    peers.withdraw("other.yaml");
    assert_eq!(pod.send(&connection, "half"), Ok(()));
    assert!(pod.receive(&connection, 15).is_ok_and(|text| text == "HTTP/1.1 200 OK"));
    let line =
        peers.nginx.log().wait_from(served, "the request", LINE_TIME_MAX, |line| is(line, "id", "kept"));
    assert!(is(&line, "status", "200"), "{line}");
    pod.close(&connection);
    peers.withdraw(FILE);
}

/// Each asks for a gibibyte and reads next to nothing; others are served meanwhile.
fn slow_readers(peers: &Peers, version: &str, port: u16) {
    peers.apply(FILE, &only("web", "/files/*, /public*"));
    let honest = || {
        let got = curl(
            &peers.client,
            &[version, &peers.url(port, "/files/big"), "-o", "/dev/null", "-w", "%{http_code}"],
        );
        assert_eq!(got.text(), "200", "{}", got.said);
    };
    // What a daemon grows by for anybody who loads much is no matter of slow readers: it has grown by that before.
    for _ in 0..HONEST_LOADS {
        honest();
    }
    let before = memory_bytes(peers);
    let mut slow = Vec::new();
    for _ in 0..SLOW_READERS {
        let mut command = peers.client.command("curl");
        command.args(["--silent", "--noproxy", "*", "--limit-rate", "1k", version, "-o", "/dev/null"]);
        slow.push(Reader(
            command.arg(peers.url(port, "/files/huge")).spawn().expect("a shell can be started"),
        ));
    }
    // As long as these take the buffers of the others have time to fill.
    for _ in 0..HONEST_LOADS {
        honest();
    }
    let grown = memory_bytes(peers).saturating_sub(before);
    say(&format!("    the daemons grew by {} KiB", grown / 1024));
    assert!(slow.iter_mut().all(Reader::runs), "all of them still read");
    drop(slow);
    let most = SLOW_READERS as u64 * SLOW_READER_BYTES_MAX;
    assert!(grown < most, "{grown} bytes for {SLOW_READERS} slow readers, more than {most}");
    peers.withdraw(FILE);
}

fn memory_bytes(peers: &Peers) -> u64 {
    peers.a.resident_bytes() + peers.b.resident_bytes()
}

struct Reader(std::process::Child);

impl Reader {
    fn runs(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
