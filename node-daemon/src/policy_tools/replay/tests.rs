//! Logs, written by the daemon's own log wherever it can be, under folders of policy.

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use node_core::policy::DenialReason;
use serde_json::Value;
use tracing_subscriber::EnvFilter;

use super::*;
use crate::telemetry::{
    ConnectionRecord, Direction, Endpoint, Ends, Event, HandshakeRefusal, Path as Way, Reason, RequestCounts,
    RequestRecord, Sink, Tls, Verdict,
    log::{LogFormat, subscriber},
};

const MESH: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: backend, namespace: photo}
spec: {clusterIP: 10.96.0.20, selector: {app: backend}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: photo}
spec: {clusterIP: 10.96.0.22, selector: {app: db}, ports: [{name: tcp-sql, port: 5432}]}
---
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: backend-0, namespace: photo, labels: {app: backend}}
spec: {serviceAccount: backend, node: a, addresses: [10.8.1.3], networkNamespace: /run/netns/b, ports: [{name: http, port: 8080}]}
---
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: db-0, namespace: photo, labels: {app: db}}
spec: {serviceAccount: db, node: b, addresses: [10.8.2.4], networkNamespace: /run/netns/d, ports: [{name: tcp-sql, port: 5432}]}
---
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: out-0, namespace: photo, labels: {app: out, culvert.io/mesh: disabled}}
spec: {serviceAccount: out, node: a, addresses: [10.8.1.8], networkNamespace: /run/netns/o, ports: []}
"#;

const WEB: &str = "spiffe://cluster.local/ns/photo/sa/web";

/// A folder with the mesh and these policies, one a line: `Kind namespace/name: {spec}`.
struct Documents(PathBuf);

impl Documents {
    fn new(policies: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("culvert-replay-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).expect("the folder can be made");
        let mut text = MESH.to_owned();
        for line in policies.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (head, spec) = line.split_once(": ").expect("a colon behind the head");
            let (kind, name) = head.split_once(' ').expect("kind and name");
            let (namespace, name) = name.split_once('/').expect("namespace and name");
            text += &format!(
                "\n---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
            );
        }
        fs::write(folder.join("mesh.yaml"), text).expect("the file can be written");
        Self(folder)
    }
}

impl Drop for Documents {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn replayed(policies: &str, log: &str) -> Replayed {
    let documents = Documents::new(policies);
    let trust_domain = "cluster.local".parse().expect("a trust domain");
    replay(log.as_bytes(), &documents.0, &trust_domain).expect("the folder and the log can be read")
}

/// What the replay of these lines says, its last line left out.
#[track_caller]
fn check(policies: &str, log: &str, expected: &[&str]) {
    let told = replayed(policies, log).to_string();
    let lines: Vec<&str> = told.lines().collect();
    let (last, lines) = lines.split_last().expect("the count");
    assert!(last.ends_with("cannot be read"), "{last}");
    assert_eq!(lines.len(), expected.len(), "{policies}\n{told}");
    for (line, expected) in lines.iter().zip(expected) {
        assert!(line.contains(expected), "{policies}\n{expected}\n{told}");
    }
}

/// What the daemon would have written.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panics here").extend_from_slice(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn log(events: &[Event]) -> String {
    let written = Written::default();
    let writer = written.clone();
    let sink = Sink::new();
    let subscriber = subscriber(LogFormat::Json, EnvFilter::new("trace"), move || writer.clone());
    tracing::subscriber::with_default(subscriber, || events.iter().for_each(|event| sink.emit(event)));
    let bytes = written.0.lock().expect("nobody panics here").clone();
    String::from_utf8(bytes).expect("it writes UTF-8")
}

fn ends(destination: &str, address: &str, identity: Option<&str>) -> Ends {
    Ends {
        connection: 7,
        direction: Direction::Inbound,
        path: if identity.is_some() { Way::Tunnel } else { Way::Relay },
        source: Endpoint {
            address: Some("10.8.9.9:40000".parse().expect("an address")),
            workload: None,
            identity: identity.map(|identity| identity.parse().expect("an identity")),
            node: None,
        },
        destination: Endpoint {
            address: Some(address.parse().expect("an address")),
            workload: Some(ObjectName::new("photo", destination)),
            identity: None,
            node: Some("a".into()),
        },
        service: None,
        protocol: "tcp",
        mutual_tls: identity.is_some(),
    }
}

fn connection(
    ends: Ends,
    verdict: Verdict,
    reason: Option<Reason>,
    tls: Option<Tls>,
    bytes_in: u64,
) -> Event {
    Event::ConnectionEnded(Box::new(ConnectionRecord {
        ends: Arc::new(ends),
        opened: true,
        verdict,
        policy: None,
        rule: None,
        reason,
        detail: None,
        shadow: None,
        audit: None,
        tls,
        bytes_in,
        bytes_out: 1,
        duration: Duration::from_millis(1),
        snapshot: 1,
    }))
}

fn request(method: &str, path: &str, verdict: Verdict, reason: Option<Reason>) -> Event {
    let ends = Arc::new(ends("backend-0", "10.8.1.3:8080", Some(WEB)));
    Event::RequestEnded(Box::new(RequestRecord {
        counts: Arc::new(RequestCounts::new(&ends)),
        ends,
        protocol: "http/1.1",
        method: method.parse().expect("a method"),
        path: Some(path.parse().expect("a path")),
        host: Some("backend.photo".to_owned()),
        status: 200,
        verdict,
        policy: Some("AuthorizationPolicy/photo/old".into()),
        rule: Some("rules[0]".into()),
        reason,
        detail: None,
        shadow: None,
        audit: None,
        duration: Duration::from_millis(1),
        snapshot: 1,
    }))
}

fn to_db(identity: Option<&str>, verdict: Verdict, reason: Option<Reason>) -> String {
    log(&[connection(ends("db-0", "10.8.2.4:5432", identity), verdict, reason, None, 9)])
}

fn get(path: &str) -> String {
    log(&[request("GET", path, Verdict::Allowed, None)])
}

fn denied(reason: DenialReason) -> Option<Reason> {
    Some(Reason::Policy(reason))
}

const STRICT: &str = "PeerAuthentication istio-system/default: {mtls: {mode: STRICT}}";
const ONLY_WEB: &str = "AuthorizationPolicy photo/web: {rules: [{from: [{source: {principals: [cluster.local/ns/photo/sa/web]}}]}]}";
const READ: &str =
    "AuthorizationPolicy photo/read: {rules: [{to: [{operation: {methods: [GET], paths: ['/albums/*']}}]}]}";

#[test]
fn a_connection_is_judged_by_the_new_folder() {
    let web = to_db(Some(WEB), Verdict::Allowed, None);
    let plain = to_db(None, Verdict::Allowed, None);
    check("", &web, &[]);
    check("", &plain, &[]);
    check(ONLY_WEB, &web, &[]);
    check(STRICT, &web, &[]);
    check(
        STRICT,
        &plain,
        &[
            "would be refused: 10.8.9.9 (plaintext) to photo/db-0 port 5432, by PeerAuthentication/istio-system/default \
           (plaintext_refused): 1 times, lines 1",
        ],
    );
    check(ONLY_WEB, &plain, &["by AuthorizationPolicy/photo/web (no_rule_allows)"]);
    // What was refused and would be let in.
    let refused = to_db(Some(WEB), Verdict::Denied, denied(DenialReason::NoRuleAllows));
    check(
        ONLY_WEB,
        &refused,
        &["would be allowed: spiffe://cluster.local/ns/photo/sa/web to photo/db-0 port 5432, by \
        AuthorizationPolicy/photo/web rules[0], before by no_rule_allows: 1 times, lines 1"],
    );
    check("", &refused, &["would be allowed: "]);
    check("AuthorizationPolicy photo/none: {}", &refused, &[]);
}

#[test]
fn a_request_is_judged_by_method_path_and_host() {
    check(READ, &get("/albums/1?token=secret"), &[]);
    check(
        READ,
        &(get("/albums/1") + &get("/admin") + &get("/admin")),
        &[
            "would be refused: spiffe://cluster.local/ns/photo/sa/web to photo/backend-0 port 8080 GET /admin, by \
           AuthorizationPolicy/photo/read (no_rule_allows), before by AuthorizationPolicy/photo/old rules[0]: 2 times, lines 2, 3",
        ],
    );
    let hosts = |host: &str| {
        format!(
            "AuthorizationPolicy photo/h: {{action: DENY, rules: [{{to: [{{operation: {{hosts: [{host}]}}}}]}}]}}"
        )
    };
    check(&hosts("backend.photo"), &get("/"), &["(denied_by_rule)"]);
    check(&hosts("other"), &get("/"), &[]);
    let denied = log(&[request("GET", "/albums/1", Verdict::Denied, denied(DenialReason::DeniedByRule))]);
    check(READ, &denied, &["would be allowed: "]);
}

#[test]
fn what_a_line_does_not_say_is_not_guessed() {
    let header = |values: &str| {
        format!(
            "AuthorizationPolicy photo/h: {{rules: [{{to: [{{operation: {{methods: [GET]}}}}], when: [{{key: 'request.headers[x-a]', {values}}}]}}]}}"
        )
    };
    check(
        &header("values: [a]"),
        &get("/"),
        &["cannot be told: photo/backend-0 port 8080: it needs request.headers[x-a]: 1 times, lines 1"],
    );
    check(&header("notValues: [a*]"), &get("/"), &["it needs request.headers[x-a]"]);
    // Refused whatever the header is.
    let post = log(&[request("POST", "/", Verdict::Allowed, None)]);
    check(&header("values: [a]"), &post, &["would be refused: "]);
    // Allowed whatever it is.
    check(&format!("{}\n{READ}", header("values: [a]")), &get("/albums/1"), &[]);
    let token = "RequestAuthentication photo/t: {jwtRules: [{issuer: a}]}";
    // A bad one would be refused.
    check(token, &get("/"), &["it needs the token"]);
    let asks = format!(
        "{token}\nAuthorizationPolicy photo/t: {{rules: [{{from: [{{source: {{requestPrincipals: ['*']}}}}]}}]}}"
    );
    check(&asks, &get("/"), &["it needs the token"]);
}

#[test]
fn what_a_stream_carried_is_not_guessed_either() {
    let stream = |bytes| {
        log(&[connection(ends("backend-0", "10.8.1.3:8080", Some(WEB)), Verdict::Allowed, None, None, bytes)])
    };
    check(READ, &stream(9), &["it needs method and path of the requests that it carried"]);
    // It carried nothing.
    check(READ, &stream(0), &[]);
    // Nobody reads albums but others than web.
    let others = "AuthorizationPolicy photo/o: {rules: [{from: [{source: {principals: ['*/sa/x']}}], to: [{operation: {methods: [GET]}}]}]}";
    check(
        others,
        &stream(9),
        &["would be refused: spiffe://cluster.local/ns/photo/sa/web to photo/backend-0 port 8080, by"],
    );
    // Its requests have lines of their own.
    let told = log(&[
        request("GET", "/albums/1", Verdict::Allowed, None),
        connection(ends("backend-0", "10.8.1.3:8080", Some(WEB)), Verdict::Allowed, None, None, 9),
    ]);
    check(READ, &told, &[]);
    // A second connection of the same number is another one.
    check(
        READ,
        &(told + &stream(9)),
        &["it needs method and path of the requests that it carried: 1 times, lines 3"],
    );
}

#[test]
fn the_name_of_the_server_is_known_of_connections_over_mesh_tls() {
    let sni = "AuthorizationPolicy photo/s: {rules: [{when: [{key: connection.sni, values: [db.photo]}]}]}";
    let over = |server_name: Option<&str>| {
        let tls = Tls {
            version: "TLSv1.3",
            group: "x".to_owned(),
            cipher: "y".to_owned(),
            server_name: server_name.map(str::to_owned),
        };
        let relay = Ends { path: Way::Relay, ..ends("db-0", "10.8.2.4:5432", Some(WEB)) };
        log(&[connection(relay, Verdict::Allowed, None, Some(tls), 9)])
    };
    check(sni, &over(Some("db.photo")), &[]);
    check(sni, &over(Some("x.photo")), &["would be refused"]);
    check(sni, &over(None), &["would be refused"]);
    check(sni, &to_db(Some(WEB), Verdict::Allowed, None), &["would be refused"]);
}

#[test]
fn lines_without_a_verdict_of_this_policy_are_counted_and_not_judged() {
    let not_judged = |event: Event, words: &str| check(STRICT, &log(&[event]), &[words]);
    not_judged(Event::Readiness { ready: true, missing: vec![] }, "not judged: 1 lines, other events");
    let outbound = Ends { direction: Direction::Outbound, ..ends("db-0", "10.8.2.4:5432", Some(WEB)) };
    not_judged(
        connection(outbound.clone(), Verdict::Allowed, None, None, 9),
        "not judged: 1 lines, outbound",
    );
    let db = || ends("db-0", "10.8.2.4:5432", None);
    for (verdict, reason) in [
        (Verdict::Failed, Reason::NothingListening),
        (Verdict::Denied, Reason::Loop),
        (Verdict::Denied, Reason::Handshake(HandshakeRefusal::OtherCa)),
        (Verdict::Denied, Reason::Handshake(HandshakeRefusal::TrustDomain)),
        (Verdict::Denied, Reason::Policy(DenialReason::IdentityBarred)),
    ] {
        not_judged(
            connection(db(), verdict, Some(reason), None, 0),
            "not judged: 1 lines, failed, or refused before",
        );
    }
    // Inside the node the one line is the sender's.
    for path in [Way::Direct, Way::Relay] {
        let inside = Ends { path, ..outbound.clone() };
        check(ONLY_WEB, &log(&[connection(inside, Verdict::Allowed, None, None, 9)]), &[]);
    }
    check("", "\n  \n", &[]);
}

#[test]
fn destinations_are_those_of_the_new_folder() {
    let gone = log(&[connection(ends("gone-0", "10.8.2.9:80", Some(WEB)), Verdict::Allowed, None, None, 9)]);
    check(
        STRICT,
        &gone,
        &["cannot be told: photo/gone-0 port 80: it needs the document of Workload photo/gone-0"],
    );
    let out =
        |verdict, reason| log(&[connection(ends("out-0", "10.8.1.8:80", None), verdict, reason, None, 9)]);
    check(STRICT, &out(Verdict::Allowed, None), &[]);
    check(
        STRICT,
        &out(Verdict::Denied, denied(DenialReason::PlaintextRefused)),
        &["the destination is not enrolled"],
    );
    // Objects that cannot be used deny, and are named.
    let broken = "PeerAuthentication istio-system/default: {mtls: {mode: MAYBE}}";
    check(
        broken,
        &to_db(Some(WEB), Verdict::Allowed, None),
        &["by PeerAuthentication/istio-system/default (policy_unusable)", "note: "],
    );
}

#[test]
fn lines_that_cannot_be_read_are_named_by_number() {
    let good = to_db(Some(WEB), Verdict::Allowed, None);
    let spoilt = |change: &dyn Fn(&mut Value)| {
        let mut line: Value = serde_json::from_str(&good).expect("a line of the log");
        change(&mut line);
        format!("{line}\n")
    };
    for (line, words) in [
        ("garbage\n".to_owned(), "it is no JSON object: only a log in format json"),
        ("[]\n".to_owned(), "it is no JSON object"),
        ("{}\n".to_owned(), "target: found nothing"),
        ("\u{0}\n".to_owned(), "it is no JSON object"),
        (
            spoilt(&|line| line["direction"] = "sideways".into()),
            "direction: found \"sideways\", expected inbound or outbound",
        ),
        (spoilt(&|line| line["path"] = "train".into()), "path: found \"train\""),
        (spoilt(&|line| line["verdict"] = "perhaps".into()), "verdict: found \"perhaps\""),
        (spoilt(&|line| line["verdict"] = Value::Null), "verdict: found nothing"),
        (spoilt(&|line| line["source"]["address"] = "here".into()), "source.address: found \"here\""),
        (spoilt(&|line| line["source"]["identity"] = "web".into()), "source.identity: found \"web\""),
        (
            spoilt(&|line| line["destination"]["workload"] = Value::Null),
            "destination.workload: found nothing",
        ),
        (spoilt(&|line| line["destination"]["address"] = Value::Null), "destination.address: found nothing"),
        (spoilt(&|line| line["connection"] = Value::Null), "connection: found nothing"),
        (spoilt(&|line| line["connection"] = "7".into()), "line: found invalid type"),
        (good.trim_end().trim_end_matches('}').to_owned(), "it is no JSON object"),
        (format!("{}\n", " ".repeat(LINE_BYTES_MAX) + &good), "it has more than"),
    ] {
        let found = replayed("", &(good.clone() + &line + &good));
        let told = found.to_string();
        assert!(found.has_bad_lines(), "{told}");
        assert!(told.contains(&format!("line 2 cannot be read: {words}")), "{words}\n{told}");
    }
}

#[test]
fn many_bad_lines_and_many_kinds_of_changes_are_counted() {
    let many = "garbage\n".repeat(25);
    let found = replayed("", &many).to_string();
    assert!(found.contains("15 more lines cannot be read"), "{found}");
    let mut groups = report::Groups::default();
    for number in 0..GROUPS_MAX as u64 + 3 {
        groups.add(number, number);
    }
    groups.add(0, 9);
    let found = Replayed { allowed: report::Groups::default(), ..Replayed::default() };
    assert!(!found.has_changes());
    assert_eq!(groups.rest_count(), 3);
}

#[test]
fn the_document_has_everything_that_the_text_has() {
    let log = get("/admin") + &to_db(None, Verdict::Allowed, None) + "garbage\n";
    let json = replayed(&format!("{READ}\n{STRICT}"), &log).json();
    assert_eq!(json["lines"], 3);
    assert_eq!(json["unchanged"], 0);
    assert_eq!(json["refused"]["count"], 2);
    let groups = json["refused"]["groups"].as_array().expect("a list");
    let request = groups.iter().find(|group| group["kind"] == "request").expect("the request");
    assert_eq!(request["method"], "GET");
    assert_eq!(request["path"], "/admin");
    assert_eq!(request["lines"], serde_json::json!([1]));
    assert_eq!(request["decidedBy"], "AuthorizationPolicy/photo/read");
    assert_eq!(json["unreadable"]["lines"][0]["line"], 3);
    assert_eq!(json["allowed"]["count"], 0);
}

#[test]
fn a_log_or_a_folder_that_cannot_be_read_is_no_replay() {
    struct Broken;
    impl io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("the disk is gone"))
        }
    }
    let trust_domain = "cluster.local".parse().expect("a trust domain");
    let documents = Documents::new("");
    let broken = replay(io::BufReader::new(Broken), &documents.0, &trust_domain);
    assert!(matches!(broken, Err(NoReplay::Log { line: 1, .. })), "{broken:?}");
    let nowhere = replay(&b""[..], &documents.0.join("nowhere"), &trust_domain);
    assert!(matches!(nowhere, Err(NoReplay::Documents(_))), "{nowhere:?}");
}
