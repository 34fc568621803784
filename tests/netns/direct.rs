//! Two pods of one node: the kernel alone joins them where layer 4 decides, one relay where it does not.

use std::time::{Duration, Instant};

use serde_json::Value;
use world::app::App;
use world::expect::{LINE_TIME_MAX, field, is};
use world::node::Node;
use world::pod::{FAMILIES, Family};
use world::protocol::{Command, Connect, Connected, Mode, Storm};

use crate::cases::Cases;
use crate::photo::{ECHO, GROUND, NEEDLE, Photo};
use crate::policies::STRICT;

/// The file of a policy that a case brings.
const FILE: &str = "case.yaml";

/// What lost its permit ends within this time (T-18).
const CUT_TIME_MAX: Duration = Duration::from_secs(1);

/// Long enough to see that a connect waits.
const AWAY_MILLISECONDS: u64 = 3_000;

/// The frontend may not reach the backend.
const NOT_THE_FRONTEND: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-the-frontend, namespace: photo}
spec: {action: DENY, rules: [{from: [{source: {principals: [cluster.local/ns/photo/sa/photo-frontend]}}]}]}
";

/// Only a request can answer.
const ONLY_GET: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-get, namespace: photo}
spec: {selector: {matchLabels: {app: photo-backend}}, rules: [{to: [{operation: {methods: [GET]}}]}]}
";

#[test]
fn direct() {
    let photo = Photo::start(&[]);
    let mut cases = Cases::of("direct");
    for family in FAMILIES {
        for mapped in [false, true] {
            if mapped && family == Family::V6 {
                continue;
            }
            let socket = if mapped { "Mapped".to_owned() } else { format!("{family:?}") };
            cases.case(&format!("two pods of one node meet without the daemon ({socket})"), || {
                meet(&photo, family, mapped);
            });
        }
        cases.case(&format!("under STRICT, too ({family:?})"), || {
            with(&photo, STRICT, || meet(&photo, family, false));
        });
        cases.case(&format!("what the policy denies is refused at connect ({family:?})"), || {
            denied(&photo, family);
        });
        cases.case(&format!("the address of a pod is not enough (T-13, {family:?})"), || {
            with(&photo, STRICT, || outside_the_cgroup(&photo, family));
        });
    }
    cases.case("what is open is listed with its path", || listed(&photo));
    cases.case("a service's address is the relay's", || service(&photo));
    cases.case("either end may ask for the proxy", || proxied(&photo));
    cases.case("where a request decides the relay judges each one", || requests(&photo));
    cases.case("what lost its permit is ended within a second (T-14, T-18)", || rejudged(&photo));
    cases.case("what may go on by the daemon only is ended (T-18)", || made_proxied(&photo));
    cases.case("while the policy comes and goes no wrong connection is left standing (T-14)", || {
        flapping(&photo)
    });
    cases.case("an identity that is barred loses every connection and gets none", || barred(&photo));
    cases.case("a pod that takes another node's address draws nothing out in the clear", || {
        stolen_address(&photo)
    });
    cases.case("a workload that leaves the mesh keeps no direct connection", || leaves(&photo));
    cases.case("without the daemon what stands goes on and what is new waits (T-15)", || crash(&photo));
    cases.end();
}

/// With a document in force, and without it afterwards.
#[track_caller]
fn with(photo: &Photo, document: &str, body: impl FnOnce()) {
    apply(photo, FILE, document);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
    photo.withdraw(FILE);
    settled(&photo.a);
    if let Err(panic) = panicked {
        std::panic::resume_unwind(panic);
    }
}

#[track_caller]
fn apply(photo: &Photo, file: &str, document: &str) {
    photo.apply(file, document);
    settled(&photo.a);
}

/// Waits until the kernel has the pairs of the newest snapshot.
#[track_caller]
fn settled(node: &Node) {
    let deadline = Instant::now() + LINE_TIME_MAX;
    loop {
        let status = node.status();
        let (wanted, present) = (field(&status, "snapshot"), field(&status, "direct.snapshot"));
        if wanted == present {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "snapshot {wanted}, pairs of {present}: {:?}",
            status.get("direct")
        );
    }
}

/// Addresses and ports at both ends are each other's own: nobody stands between. Line and counters tell of it.
fn meet(photo: &Photo, family: Family, mapped: bool) {
    let Photo { frontend, backend, a, .. } = photo;
    let listener = backend.serve(0, Mode::Echo);
    let watch = a.watch();
    let connection = frontend.connect(Connect { mapped, ..Connect::to(backend.at(family, listener.port)) });
    assert_eq!(frontend.exchange(&connection, NEEDLE).as_deref(), Ok(NEEDLE));
    let accepted = backend.accepted(listener);
    assert_eq!(canonical(accepted[0].peer), canonical(connection.local), "the client's own address and port");
    assert_eq!(canonical(accepted[0].local), backend.at(family, listener.port));
    frontend.close(&connection);
    backend.close_listener(listener);

    let line = watch.served("outbound", &[("path", "direct"), ("destination.workload", "photo-backend")]);
    assert!(is(&line, "source.address", &canonical(connection.local).to_string()), "{line}");
    assert!(is(&line, "source.identity", &frontend.identity()), "{line}");
    assert!(is(&line, "destination.identity", &backend.identity()), "{line}");
    let bytes = Value::from(NEEDLE.len());
    assert_eq!((field(&line, "bytes_in"), field(&line, "bytes_out")), (&bytes, &bytes), "{line}");
    for reporter in ["source", "destination"] {
        for (counter, least) in [
            ("istio_tcp_connections_opened_total", 1.0),
            ("istio_tcp_connections_closed_total", 1.0),
            ("istio_tcp_sent_bytes_total", 40.0),
            ("istio_tcp_received_bytes_total", 40.0),
        ] {
            let grew = watch.grew(counter, &[("reporter", reporter), ("path", "direct")]);
            assert!(grew >= least, "{counter} of {reporter} grew by {grew}");
        }
    }
    for path in ["relay", "tunnel", "passthrough"] {
        let through = watch.grew("istio_tcp_received_bytes_total", &[("path", path)]);
        assert!(through < 1.0, "{through} bytes went through the daemon by {path}");
    }
}

fn denied(photo: &Photo, family: Family) {
    let Photo { frontend, backend, a, .. } = photo;
    with(photo, NOT_THE_FRONTEND, || {
        let watch = a.watch();
        let refused = frontend.try_connect(Connect::to(backend.at(family, ECHO))).expect_err("it is denied");
        assert_eq!((refused.step.as_str(), refused.errno.as_str()), ("connect", "ECONNREFUSED"));
        let fields = [("path", "direct"), ("destination.workload", "photo-backend")];
        let line = watch.refused("outbound", "denied_by_rule", &fields);
        assert!(is(&line, "policy", "AuthorizationPolicy/photo/not-the-frontend"), "{line}");
        assert!(is(&line, "rule", "rules[0]"), "{line}");
        assert!(is(&line, "source.identity", &frontend.identity()), "{line}");
    });
}

/// A process in the pod's own network namespace, outside the control groups of this node: the kernel vouches for nobody.
fn outside_the_cgroup(photo: &Photo, family: Family) {
    let Photo { frontend, backend, a, b, .. } = photo;
    let intruder = App::start("intruder", frontend.namespace(), b.daemon_cgroup()).expect("it starts");
    let watch = a.watch();
    let mut connect = Connect::to(backend.at(family, ECHO));
    connect.timeout_ms = 5_000;
    let asked = intruder.ask(connect, NEEDLE);
    assert_eq!(asked.text, "", "the address alone proves nothing: {asked:?}");
    watch.refused("inbound", "plaintext_refused", &[("destination.workload", "photo-backend")]);
    assert_eq!(watch.lines(&[("path", "direct")]), Vec::<Value>::new());
}

fn listed(photo: &Photo) {
    let connection = open(photo, Family::V4);
    let local = canonical(connection.local).to_string();
    let deadline = Instant::now() + LINE_TIME_MAX;
    loop {
        let status = photo.a.status();
        let connections = status.get("connections").and_then(Value::as_array).cloned().unwrap_or_default();
        let found = connections.iter().find(|shown| is(shown, "source.address", &local));
        if let Some(shown) = found {
            assert!(is(shown, "path", "direct"), "{shown}");
            assert!(is(shown, "destination.workload", "photo/photo-backend"), "{shown}");
            break;
        }
        assert!(Instant::now() < deadline, "{local} is not among {connections:?}");
    }
    photo.frontend.close(&connection);
}

fn service(photo: &Photo) {
    let watch = photo.a.watch();
    let asked = photo.frontend.http("10.96.0.20:8080".parse().expect("an address"));
    assert!(asked.text.contains(&format!("peer=[::ffff:{}]:", photo.frontend.v4())), "{asked:?}");
    let fields = [("path", "relay"), ("service", "photo/photo-backend")];
    let line = watch.served("outbound", &fields);
    assert!(is(&line, "source.identity", &photo.frontend.identity()), "{line}");
    assert!(is(&line, "destination.identity", &photo.backend.identity()), "{line}");
    assert_eq!(field(&line, "tls"), &Value::Null, "{line}");
    assert_eq!(watch.lines(&[("target", "access")]).len(), 1, "one line for one connection");
}

fn proxied(photo: &Photo) {
    for pod in [&photo.frontend, &photo.backend] {
        let file = pod.document_file();
        apply(photo, &file, &format!("{}  sameNode: proxied\n", pod.document()));
        let relayed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| is_relayed(photo)));
        apply(photo, &file, &pod.document());
        assert!(relayed.is_ok(), "where {} asks for the proxy", pod.name());
        meet(photo, Family::V4, false);
    }
}

#[track_caller]
fn is_relayed(photo: &Photo) {
    let watch = photo.a.watch();
    let asked = photo.frontend.http(photo.backend.at(Family::V4, 8080));
    assert!(asked.text.contains(&format!("peer=[::ffff:{}]:", photo.frontend.v4())), "{asked:?}");
    watch.served("outbound", &[("path", "relay"), ("destination.workload", "photo-backend")]);
    assert_eq!(watch.lines(&[("path", "direct")]), Vec::<Value>::new());
}

fn requests(photo: &Photo) {
    let Photo { frontend, backend, a, .. } = photo;
    with(photo, ONLY_GET, || {
        is_relayed(photo);
        let watch = a.watch();
        let post = "POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        let asked = frontend.ask(Connect::to(backend.at(Family::V4, 8080)), post);
        assert!(asked.text.starts_with("HTTP/1.1 403"), "{asked:?}");
        watch.refused("outbound", "no_rule_allows", &[("path", "relay"), ("method", "POST")]);
    });
}

fn rejudged(photo: &Photo) {
    for family in FAMILIES {
        let (frontend, backend) = (&photo.frontend, &photo.backend);
        let listener = backend.serve(0, Mode::Echo);
        let connection = frontend.connect(Connect::to(backend.at(family, listener.port)));
        assert_eq!(frontend.exchange(&connection, "x").as_deref(), Ok("x"));
        let watch = photo.a.watch();
        photo.apply(FILE, NOT_THE_FRONTEND);
        let ended = frontend.drain(&connection, CUT_TIME_MAX);
        assert!(["ECONNRESET", "ECONNABORTED"].contains(&ended.end.as_str()), "{ended:?}");
        let served = backend.wait_accepted(listener, 0, 1, true);
        assert_ne!(served[0].end.as_deref(), Some("eof"), "never an orderly end: {served:?}");
        let line = watch.refused("outbound", "denied_by_rule", &[("path", "direct")]);
        assert!(is(&line, "verdict", "denied"), "{line}");
        assert_eq!(field(&line, "bytes_in"), &Value::from(1), "{line}");
        photo.withdraw(FILE);
        settled(&photo.a);
        frontend.close(&connection);
        backend.close_listener(listener);
    }
}

fn made_proxied(photo: &Photo) {
    let connection = open(photo, Family::V6);
    let watch = photo.a.watch();
    let file = photo.backend.document_file();
    photo.apply(&file, &format!("{}  sameNode: proxied\n", photo.backend.document()));
    let ended = photo.frontend.drain(&connection, CUT_TIME_MAX);
    apply(photo, &file, &photo.backend.document());
    assert!(["ECONNRESET", "ECONNABORTED"].contains(&ended.end.as_str()), "{ended:?}");
    watch.line(&[("path", "direct"), ("reason", "rejudged")]);
}

fn flapping(photo: &Photo) {
    let to = photo.backend.at(Family::V4, ECHO);
    let storm = photo.frontend.storm(Storm {
        to: vec![to],
        parallel: 8,
        text: "x".to_owned(),
        bytes: 64,
        timeout_ms: 5_000,
        // A refusal comes at once, so there are many.
        attempts_max: u64::MAX,
    });
    storm.progress(50, Duration::from_secs(20));
    for _ in 0..10 {
        photo.apply(FILE, NOT_THE_FRONTEND);
        photo.withdraw(FILE);
    }
    settled(&photo.a);
    storm.progress(50, Duration::from_secs(20));
    let held: Vec<_> = (0..50).map(|_| open(photo, Family::V4)).collect();
    photo.apply(FILE, NOT_THE_FRONTEND);
    for connection in &held {
        let ended = photo.frontend.drain(connection, CUT_TIME_MAX);
        assert_ne!(ended.end, "EAGAIN", "a connection without a permit still stands");
    }
    settled(&photo.a);
    let load = storm.stop();
    let standing: Vec<_> = photo
        .backend
        .sockets()
        .into_iter()
        .filter(|socket| socket.state == ESTABLISHED && socket.local.port() == ECHO)
        .collect();
    photo.withdraw(FILE);
    settled(&photo.a);
    assert_eq!(standing, [], "nothing that is denied is established");
    assert!(load.failed.keys().all(|step| !step.contains("mismatch")), "{load:?}");
}

/// `TCP_ESTABLISHED` of `include/net/tcp_states.h`.
const ESTABLISHED: u8 = 1;

fn barred(photo: &Photo) {
    let Photo { frontend, backend, datastore, a, .. } = photo;
    let direct = open(photo, Family::V4);
    let relayed = frontend.connect(Connect::to("10.96.0.20:8080".parse().expect("an address")));
    let tunnelled = frontend.connect(Connect::to(datastore.at(Family::V4, ECHO)));
    assert_eq!(frontend.exchange(&tunnelled, "x").as_deref(), Ok("x"));
    let bar = format!("barredIdentities: [\"{}\"], podRanges", frontend.identity());
    photo.apply("ground.yaml", &GROUND.replace("podRanges", &bar));
    let ended: Vec<_> = [("direct", &direct), ("relay", &relayed), ("tunnel", &tunnelled)]
        .map(|(path, connection)| (path, frontend.drain(connection, CUT_TIME_MAX).end))
        .into();
    settled(a);
    let watch = a.watch();
    let refused = frontend.try_connect(Connect::to(backend.at(Family::V4, ECHO)));
    let asked = frontend.ask(Connect::to(datastore.at(Family::V4, ECHO)), "x");
    let others = backend.ask(Connect::to(datastore.at(Family::V4, crate::photo::GREET)), "");
    let denied = watch.refused("outbound", "identity_barred", &[("path", "direct")]);
    apply(photo, "ground.yaml", GROUND);
    for (path, end) in ended {
        assert!(["ECONNRESET", "ECONNABORTED"].contains(&end.as_str()), "{path}: {end}");
    }
    assert_eq!(refused.expect_err("nobody speaks as it").errno, "ECONNREFUSED", "{denied}");
    assert_eq!(asked.text, "", "{asked:?}");
    assert_ne!(others.text, "", "others go on: {others:?}");
    meet(photo, Family::V4, false);
}

/// Two workloads claim an address, one of them by itself: no document says so, and the connection takes the tunnel.
fn stolen_address(photo: &Photo) {
    let Photo { frontend, backend, datastore, a, .. } = photo;
    let capture = photo.world.capture(a, NEEDLE);
    let taken = [format!("{}/32", datastore.v4()), format!("{}/128", datastore.v6())];
    for address in &taken {
        backend.namespace().ip(&format!("addr add {address} dev eth0 nodad")).expect("the address is free");
    }
    for family in FAMILIES {
        let watch = a.watch();
        let connection = frontend.connect(Connect::to(datastore.at(family, ECHO)));
        assert_eq!(frontend.exchange(&connection, NEEDLE).as_deref(), Ok(NEEDLE));
        frontend.close(&connection);
        watch.served("outbound", &[("path", "tunnel"), ("destination.workload", "datastore")]);
    }
    for address in &taken {
        backend.namespace().ip(&format!("addr del {address} dev eth0")).expect("the address was added");
    }
    capture.stop().assert_no_plaintext();
}

fn leaves(photo: &Photo) {
    let connection = open(photo, Family::V4);
    let watch = photo.a.watch();
    let file = photo.backend.document_file();
    photo.world.documents().remove(&file);
    let ended = photo.frontend.drain(&connection, Duration::from_secs(5));
    watch.event("workload left", &[("workload", "photo/photo-backend")]);
    let back = photo.a.watch();
    photo.world.documents().put(&file, &photo.backend.document());
    back.event("workload enrolled", &[("workload", "photo/photo-backend")]);
    settled(&photo.a);
    assert!(["ECONNRESET", "ECONNABORTED"].contains(&ended.end.as_str()), "{ended:?}");
    watch.line(&[("path", "direct"), ("reason", "workload_left")]);
    meet(photo, Family::V4, false);
}

fn crash(photo: &Photo) {
    let Photo { frontend, backend, a, .. } = photo;
    let standing = FAMILIES.map(|family| open(photo, family));
    a.kill();
    for connection in &standing {
        assert_eq!(frontend.exchange(connection, NEEDLE).as_deref(), Ok(NEEDLE), "what stands goes on");
    }
    let waiting = FAMILIES.map(|family| {
        let mut connect = Connect::to(backend.at(family, ECHO));
        (connect.timeout_ms, connect.nonblocking) = (AWAY_MILLISECONDS, true);
        frontend.begin(Command::Ask { connect, text: NEEDLE.to_owned() })
    });
    for ask in waiting {
        let outcome = format!("{:?}", ask.outcome());
        assert!(outcome.contains("timeout"), "a connect waits while nobody is there: {outcome}");
    }
    let begun = FAMILIES.map(|family| {
        let mut connect = Connect::to(backend.at(family, 8080));
        connect.timeout_ms = 30_000;
        frontend.begin(Command::Ask { connect, text: "GET / HTTP/1.1\r\nhost: test\r\n\r\n".to_owned() })
    });
    a.start();
    settled(a);
    for ask in begun {
        let outcome = format!("{:?}", ask.outcome());
        assert!(outcome.contains("photo-backend peer="), "then it is served: {outcome}");
    }
    let watch = a.watch();
    for connection in &standing {
        assert_eq!(frontend.exchange(connection, NEEDLE).as_deref(), Ok(NEEDLE), "it still goes on");
        frontend.close(connection);
        let local = canonical(connection.local).to_string();
        let line = watch.line(&[("path", "direct"), ("source.address", &local)]);
        assert_eq!(
            field(&line, "bytes_in"),
            &Value::from(NEEDLE.len() * 2 + 1),
            "the successor tells: {line}"
        );
    }
    for family in FAMILIES {
        meet(photo, family, false);
    }
}

/// A direct connection that has carried a byte each way.
#[track_caller]
fn open(photo: &Photo, family: Family) -> Connected {
    let connection = photo.frontend.connect(Connect::to(photo.backend.at(family, ECHO)));
    assert_eq!(photo.frontend.exchange(&connection, "x").as_deref(), Ok("x"));
    connection
}

fn canonical(address: std::net::SocketAddr) -> std::net::SocketAddr {
    std::net::SocketAddr::new(address.ip().to_canonical(), address.port())
}
