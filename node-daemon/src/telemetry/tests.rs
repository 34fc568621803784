//! Each event is one line and its counter; no text from outside makes a line of its own.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, mpsc},
    time::{Duration, SystemTime},
};

use node_core::{policy::DenialReason, workload::ObjectName};
use serde_json::Value;
use tracing_subscriber::EnvFilter;

use super::{
    ConnectionRecord, Direction, Endpoint, Ends, Event, HandshakeRefusal, Path, Reason, RequestCounts,
    RequestRecord, RouteReason, Shadow, Sink, Tls, Verdict,
    log::{self, Lines, LogFormat},
    metrics::{LABEL_SETS_MAX, OTHER},
};

/// Where a test's lines go.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What `told` wrote.
fn lines(format: LogFormat, told: impl FnOnce()) -> Vec<String> {
    let written = Written::default();
    let writer = written.clone();
    let subscriber = log::subscriber(format, EnvFilter::new("trace"), move || writer.clone());
    tracing::subscriber::with_default(subscriber, told);
    let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn web() -> ObjectName {
    ObjectName::new("photo", "web-0")
}

fn ends() -> Ends {
    Ends {
        connection: 7,
        direction: Direction::Inbound,
        path: Path::Tunnel,
        source: Endpoint {
            address: Some("10.8.1.4:40000".parse().unwrap()),
            workload: Some(web()),
            identity: Some("spiffe://cluster.local/ns/photo/sa/web".parse().unwrap()),
            node: Some("node-a".into()),
        },
        destination: Endpoint { address: Some("[fd00:8:2::4]:80".parse().unwrap()), ..Endpoint::default() },
        service: Some(ObjectName::new("datastore", "db")),
        protocol: "tcp",
        mutual_tls: true,
    }
}

fn record(verdict: Verdict, opened: bool, reason: Option<Reason>) -> ConnectionRecord {
    ConnectionRecord {
        ends: Arc::new(ends()),
        opened,
        verdict,
        policy: Some("AuthorizationPolicy/datastore/db".into()),
        rule: Some("rules[0]".into()),
        reason,
        detail: None,
        shadow: None,
        audit: None,
        tls: Some(Tls {
            version: "TLSv1.3",
            group: "X25519MLKEM768".to_owned(),
            cipher: "TLS13_AES_128_GCM_SHA256".to_owned(),
            server_name: Some("web.photo".to_owned()),
        }),
        bytes_in: 100,
        bytes_out: 2_000,
        duration: Duration::from_millis(12),
        snapshot: 3,
    }
}

fn ended(verdict: Verdict, opened: bool, reason: Option<Reason>) -> Event {
    Event::ConnectionEnded(Box::new(record(verdict, opened, reason)))
}

/// The event makes exactly one line of this message, and raises this counter to this value.
#[track_caller]
fn check(event: &Event, message: &str, counter: &str) {
    let sink = Sink::new();
    let lines = lines(LogFormat::Json, || sink.emit(event));
    assert_eq!(lines.len(), 1, "{lines:?}");
    let line: Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!(line.get("message").and_then(Value::as_str).unwrap_or_default(), message, "{line}");
    let text = sink.metrics().text().unwrap();
    assert!(counter.is_empty() || text.lines().any(|line| line == counter), "no `{counter}` in\n{text}");
}

#[test]
fn each_event_is_one_line_and_its_counter() {
    let identity = || "spiffe://cluster.local/ns/photo/sa/web".to_owned();
    let retry = Duration::from_secs(1);
    let problem = || "x".to_owned();
    let not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let table: Vec<(Event, &str, &str)> = vec![
        (
            Event::DaemonStarting { node: "a".to_owned(), version: "0", configuration: "{}".to_owned() },
            "daemon starting",
            "",
        ),
        (Event::Readiness { ready: true, missing: vec![] }, "ready", "culvert_ready 1"),
        (Event::Readiness { ready: false, missing: vec![problem()] }, "not ready", "culvert_ready 0"),
        (Event::DaemonDraining { cause: "SIGTERM", seconds: 30 }, "daemon draining", ""),
        (Event::DaemonStopped { cause: "SIGTERM" }, "daemon stopped", "culvert_ready 0"),
        (
            Event::WorkloadEnrolled { workload: web(), identity: identity().parse().unwrap() },
            "workload enrolled",
            "culvert_enrolled_workloads 1",
        ),
        (
            Event::WorkloadRefused { workload: web(), reason: "address", problem: problem() },
            "workload refused",
            r#"culvert_enrolment_refusals_total{reason="address"} 1"#,
        ),
        (
            Event::WorkloadLeft { workload: web(), cause: "removed" },
            "workload left",
            "culvert_enrolled_workloads -1",
        ),
        (
            Event::WorkloadRepaired { workload: web(), what: "rule" },
            "workload repaired",
            "culvert_repairs_total 1",
        ),
        (
            Event::UnmeshedConnections { workload: web(), destroyed: 1, remaining: 2 },
            "unmeshed connections",
            "culvert_unmeshed_connections 2",
        ),
        (Event::NodeJoined { node: "a".to_owned() }, "node joined", ""),
        (
            Event::AuthorityFailed { call: "Join", problem: problem(), retry },
            "authority failed",
            "culvert_authority_failures_total 1",
        ),
        (Event::RuleFilesRead { rule: "DestinationRule photo/a".to_owned() }, "files of a rule read", ""),
        (Event::TrustChanged { roots: 1 }, "trust changed", ""),
        (
            Event::CertificateIssued {
                identity: identity(),
                serial: "1f".to_owned(),
                not_after,
                generation: 1,
            },
            "certificate issued",
            r#"culvert_certificate_expiry_seconds{identity="spiffe://cluster.local/ns/photo/sa/web"} 1800000000"#,
        ),
        (
            Event::CertificateRenewalFailed { identity: identity(), failures: 1, problem: problem(), retry },
            "certificate renewal failed",
            "culvert_certificate_failures_total 1",
        ),
        (Event::CertificateExpired { identity: identity() }, "certificate expired", ""),
        (Event::CertificateDropped { identity: identity() }, "certificate dropped", ""),
        (
            Event::SnapshotPublished { number: 9, local: 1, problems: 2 },
            "snapshot published",
            "culvert_snapshot_number 9",
        ),
        (
            Event::DocumentRefused {
                file: "a.yaml".to_owned(),
                object: "Service a/b".to_owned(),
                field: "spec".to_owned(),
                problem: problem(),
            },
            "document refused",
            "culvert_documents_refused_total 1",
        ),
        (
            Event::FileUnreadable { file: "a.yaml".to_owned(), problem: problem(), effect: "denied" },
            "file unreadable",
            "culvert_documents_refused_total 1",
        ),
        (
            Event::KernelFailed { call: "steer", problem: problem() },
            "kernel failed",
            "culvert_kernel_failures_total 1",
        ),
        (
            Event::AcceptFailed { workload: web(), listener: "tunnel", problem: problem() },
            "accept failed",
            "culvert_accept_failures_total 1",
        ),
        (
            Event::LimitReached { limit: "connections_per_workload", workload: Some(web()) },
            "limit reached",
            r#"culvert_limits_total{limit="connections_per_workload"} 1"#,
        ),
        (
            Event::AuditOpened { folder: "/a".to_owned(), sequence: 7, torn_bytes: 0, clean: true },
            "audit opened",
            "",
        ),
        (
            Event::AuditOpened { folder: "/a".to_owned(), sequence: 7, torn_bytes: 3, clean: false },
            "audit recovered",
            "",
        ),
        (
            Event::AuditCheckpoint { sequence: 9, digest: "00".to_owned(), segment: 1 },
            "audit checkpoint",
            "culvert_audit_checkpoint_sequence 9",
        ),
        (Event::AuditLost { records: 3 }, "audit records lost", "culvert_audit_lost_total 3"),
        (
            Event::AuditFailed { call: "write", problem: problem(), effect: "denied" },
            "audit failed",
            "culvert_audit_failures_total 1",
        ),
        (Event::ConnectionOpened(Arc::new(ends())), "connection opened", ""),
        (
            ended(Verdict::Denied, false, Some(Reason::Policy(DenialReason::NoRuleAllows))),
            "",
            r#"culvert_denials_total{direction="inbound",reason="no_rule_allows"} 1"#,
        ),
        (
            ended(Verdict::Failed, false, Some(Reason::DeadPeer)),
            "",
            r#"culvert_denials_total{direction="inbound",reason="dead_peer"} 1"#,
        ),
    ];
    for (event, message, counter) in &table {
        check(event, message, counter);
    }
}

#[test]
fn a_connection_counts_at_its_opening_and_at_its_end_under_istio_s_labels() {
    let sink = Sink::new();
    sink.emit(&Event::ConnectionOpened(Arc::new(ends())));
    sink.emit(&ended(Verdict::Allowed, true, None));
    let text = sink.metrics().text().unwrap();
    let labels = concat!(
        r#"{reporter="destination",source_workload="web-0",source_workload_namespace="photo","#,
        r#"source_principal="spiffe://cluster.local/ns/photo/sa/web",destination_workload="unknown","#,
        r#"destination_workload_namespace="unknown",destination_principal="unknown","#,
        r#"destination_service="db.datastore.svc.cluster.local",destination_service_name="db","#,
        r#"destination_service_namespace="datastore",request_protocol="tcp",connection_security_policy="mutual_tls",path="tunnel"}"#,
    );
    for (name, value) in [
        ("istio_tcp_connections_opened_total", 1),
        ("istio_tcp_connections_closed_total", 1),
        ("istio_tcp_received_bytes_total", 100),
        ("istio_tcp_sent_bytes_total", 2_000),
    ] {
        let line = format!("{name}{labels} {value}");
        assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
    }
    assert!(!text.contains("culvert_denials_total{"), "{text}");
}

#[test]
fn a_connection_inside_the_node_has_one_line_and_two_reporters() {
    for path in [Path::Direct, Path::Relay] {
        let sink = Sink::new();
        let ends = Arc::new(Ends { path, direction: Direction::Outbound, mutual_tls: false, ..ends() });
        let Event::ConnectionEnded(record) = ended(Verdict::Allowed, true, None) else { panic!("an end") };
        let lines = lines(LogFormat::Json, || {
            sink.emit(&Event::ConnectionOpened(Arc::clone(&ends)));
            sink.emit(&Event::ConnectionEnded(Box::new(ConnectionRecord {
                ends: Arc::clone(&ends),
                ..*record
            })));
        });
        assert_eq!(lines.iter().filter(|line| line.contains("\"access\"")).count(), 1, "{lines:?}");
        let text = sink.metrics().text().unwrap();
        let path = format!("path=\"{}\"", path.label());
        for name in ["opened_total", "closed_total"] {
            for reporter in ["source", "destination"] {
                let is_it = |line: &&str| {
                    line.starts_with(&format!("istio_tcp_connections_{name}{{reporter=\"{reporter}\""))
                        && line.contains(&path)
                        && line.ends_with(" 1")
                };
                assert!(text.lines().any(|line| is_it(&line)), "{name} of {reporter}:\n{text}");
            }
        }
    }
}

#[test]
fn connections_from_before_are_counted_over_all_workloads_as_they_stand() {
    // T-25
    let sink = Sink::new();
    let standing = |workload: &str, remaining| {
        let workload = ObjectName::new("photo", workload);
        sink.emit(&Event::UnmeshedConnections { workload, destroyed: 0, remaining });
    };
    let counted = || {
        let text = sink.metrics().text().unwrap();
        text.lines().find_map(|line| line.strip_prefix("culvert_unmeshed_connections ")).unwrap().to_owned()
    };
    standing("a", 3);
    standing("b", 2);
    assert_eq!(counted(), "5");
    standing("a", 1);
    assert_eq!(counted(), "3");
    sink.emit(&Event::WorkloadLeft { workload: ObjectName::new("photo", "b"), cause: "removed" });
    assert_eq!(counted(), "1");
    standing("a", 0);
    assert_eq!(counted(), "0");
}

#[test]
fn an_access_line_nests_both_ends_and_the_tls_parameters() {
    let sink = Sink::new();
    let event = ended(Verdict::Denied, true, Some(Reason::Handshake(HandshakeRefusal::SecureNaming)));
    let lines = lines(LogFormat::Json, || sink.emit(&event));
    let line: Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!(line["target"], "access");
    assert_eq!(line["source"]["workload"], "web-0");
    assert_eq!(line["source"]["namespace"], "photo");
    assert_eq!(line["source"]["address"], "10.8.1.4:40000");
    assert_eq!(line["destination"]["address"], "[fd00:8:2::4]:80");
    assert_eq!(line["destination"].get("identity"), None);
    assert_eq!(line["service"], "datastore/db");
    assert_eq!(line["tls"]["group"], "X25519MLKEM768");
    assert_eq!(line["verdict"], "denied");
    assert_eq!(line["reason"], "secure_naming");
    assert_eq!(line["rule"], "rules[0]");
    assert_eq!(line["bytes_out"], 2_000);
    assert_eq!(line["duration_ms"], 12);
    assert_eq!(line["snapshot"], 3);
    assert_eq!(line["connection"], 7);
    assert!(line["time"].as_str().unwrap().ends_with('Z'));
}

#[test]
fn a_request_is_one_line_without_its_query_and_counts_by_its_status() {
    let ends = Arc::new(ends());
    let counts = Arc::new(RequestCounts::new(&ends));
    let request = |status, verdict, reason| {
        Event::RequestEnded(Box::new(RequestRecord {
            ends: Arc::clone(&ends),
            counts: Arc::clone(&counts),
            protocol: "http/1.1",
            method: http::Method::GET,
            path: Some("/photos/1?access_token=secret".parse().unwrap()),
            host: Some("photo.test:80".to_owned()),
            status,
            verdict,
            policy: Some("AuthorizationPolicy/datastore/db".into()),
            rule: None,
            reason,
            detail: None,
            shadow: Some(Shadow {
                verdict: Verdict::Denied,
                policy: Some("ServiceRole/a/b".into()),
                rule: None,
            }),
            audit: None,
            duration: Duration::from_millis(1),
            snapshot: 3,
        }))
    };
    let sink = Sink::new();
    let denied = Some(Reason::Policy(DenialReason::NoRuleAllows));
    let lines = lines(LogFormat::Json, || {
        sink.emit(&request(200, Verdict::Allowed, None));
        sink.emit(&request(200, Verdict::Allowed, None));
        sink.emit(&request(403, Verdict::Denied, denied));
    });
    assert_eq!(lines.len(), 3);
    assert!(!lines.concat().contains("secret"));
    let line: Value = serde_json::from_str(&lines[2]).unwrap();
    assert_eq!(line["target"], "access");
    assert_eq!(line["method"], "GET");
    assert_eq!(line["request_path"], "/photos/1");
    assert_eq!(line["status"], 403);
    assert_eq!(line["verdict"], "denied");
    assert_eq!(line["reason"], "no_rule_allows");
    assert_eq!(line["shadow"]["verdict"], "denied");
    assert_eq!(line["source"]["workload"], "web-0");
    let text = sink.metrics().text().unwrap();
    for pieces in [
        ["istio_requests_total", "response_code=\"200\"", "} 2"],
        ["istio_requests_total", "response_code=\"403\"", "} 1"],
        ["culvert_shadow_verdicts_total", "verdict=\"denied\"", "} 3"],
        ["culvert_denials_total", "no_rule_allows", "} 1"],
    ] {
        assert!(
            text.lines().any(|line| pieces.iter().all(|piece| line.contains(piece))),
            "{pieces:?}\n{text}"
        );
    }
}

#[test]
fn no_text_from_outside_begins_a_line_or_a_field() {
    let sink = Sink::new();
    let problem = "a\nb verdict=allowed \u{1b}[2J\"".to_owned();
    let event = Event::KernelFailed { call: "steer", problem };
    for format in [LogFormat::Json, LogFormat::Text] {
        let lines = lines(format, || sink.emit(&event));
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(!lines[0].contains('\u{1b}'), "{lines:?}");
    }
    let text = lines(LogFormat::Text, || sink.emit(&event));
    assert!(text[0].contains(r#"problem="a\nb verdict=allowed"#), "{text:?}");
}

#[test]
fn reasons_of_one_kind_have_labels_of_their_own() {
    let mut labels: Vec<_> =
        HandshakeRefusal::ALL.into_iter().map(|refusal| Reason::Handshake(refusal).label()).collect();
    labels.extend(RouteReason::ALL.into_iter().map(|reason| Reason::Route(reason).label()));
    labels.push(Reason::BadAuthority.label());
    let all = labels.len();
    labels.sort_unstable();
    labels.dedup();
    assert_eq!(labels.len(), all);
}

#[test]
fn beyond_the_limit_of_label_sets_a_new_one_is_counted_as_other_and_the_limit_with_it() {
    let sink = Sink::new();
    let opened = |number: usize| {
        let mut ends = ends();
        ends.source.workload = Some(ObjectName::new("photo", &format!("web-{number}")));
        Event::ConnectionOpened(Arc::new(ends))
    };
    for number in 0..LABEL_SETS_MAX {
        sink.emit(&opened(number));
    }
    assert!(!sink.metrics().text().unwrap().contains("label_sets"));
    sink.emit(&opened(LABEL_SETS_MAX));
    sink.emit(&opened(0));
    let text = sink.metrics().text().unwrap();
    assert!(text.contains(r#"culvert_limits_total{limit="label_sets"} 1"#));
    assert!(text.contains(&format!(r#"source_workload="{OTHER}""#)));
    assert!(!text.contains(&format!(r#"source_workload="web-{LABEL_SETS_MAX}""#)));
}

/// A reader that is at each line for as long as the test wants.
struct Held(Arc<Mutex<Vec<u8>>>, mpsc::SyncSender<()>);

impl Write for Held {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let _ = self.1.send(());
        self.0.lock().unwrap().extend_from_slice(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn as_many_lines_wait_as_the_limit_says_and_one_more_is_left_out() {
    let written = Arc::new(Mutex::new(Vec::new()));
    let (at_it, begun) = mpsc::sync_channel(0);
    let (mut lines, end) = Lines::start_within(Held(Arc::clone(&written), at_it), 2).unwrap();
    let holding = written.lock().unwrap();
    lines.write_all(b"1").unwrap();
    begun.recv().unwrap(); // the first is with the reader
    for line in [b"2", b"3"] {
        lines.write_all(line).unwrap();
    }
    assert_eq!(lines.lost(), 0, "at the limit");
    lines.write_all(b"4").unwrap();
    assert_eq!(lines.lost(), 1);
    drop((holding, begun));
    drop(end);
    assert_eq!(*written.lock().unwrap(), b"123");
}

#[test]
fn lines_that_find_no_place_are_left_out_and_counted_and_the_rest_is_written_at_the_end() {
    let (reader, writer) = io::pipe().unwrap();
    let (mut lines, end) = Lines::start(writer).unwrap();
    // Nobody reads: the pipe fills, then the queue.
    let line = vec![b'x'; 1024];
    let mut sent = 0;
    let lost = loop {
        lines.write_all(&line).unwrap();
        sent += 1;
        let lost = lines.lost();
        if lost > 0 {
            break lost;
        }
    };
    let read = std::thread::spawn(move || io::read_to_string(reader).unwrap().len());
    drop(end);
    drop(lines);
    assert_eq!(read.join().unwrap() as u64, (sent - lost) * 1024);
}
