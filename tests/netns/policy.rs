//! Who may reach whom, by documents of both ages, and what a change of documents does to what stands.

use std::time::Duration;

use world::expect::{LINE_TIME_MAX, is};
use world::pod::{FAMILIES, Family, Plan, Pod};
use world::protocol::{Asked, Connect, Storm};

use crate::cases::Cases;
use crate::photo::{ECHO, GROUND, HTTP, Photo};
use crate::policies::{BACKEND_ONLY_2018, STRICT, STRICT_2018, authorization};

const FILE: &str = "policy.yaml";

/// What lost its permit is closed within this (DESIGN 3.4.6); a second of the machine's own is allowed on top.
const CUT_TIME_MAX: Duration = Duration::from_secs(2);

const FRONTEND: &str = "cluster.local/ns/photo/sa/photo-frontend";
const BACKEND: &str = "cluster.local/ns/photo/sa/photo-backend";

#[test]
fn policy() {
    let photo = Photo::start(&[]);
    let mut cases = Cases::of("policy");

    cases.case("without policy everybody is served (PERMISSIVE)", || {
        expect(&photo, &photo.frontend, HTTP, Ok(()));
        expect(&photo, &photo.stranger, HTTP, Ok(()));
    });
    for (name, document) in [("2018", STRICT_2018), ("today", STRICT)] {
        cases.case(&format!("STRICT of {name} refuses a stranger and serves the mesh"), || {
            with(&photo, document, || {
                expect(&photo, &photo.stranger, HTTP, Err("plaintext_refused"));
                expect(&photo, &photo.frontend, HTTP, Ok(()));
            });
        });
    }
    cases.case("a pair that no binding of 2018 names is refused, in both families", || {
        with(&photo, BACKEND_ONLY_2018, || {
            for family in FAMILIES {
                expect_of(&photo, &photo.backend, HTTP, family, Ok(()));
                expect_of(&photo, &photo.frontend, HTTP, family, Err("no_rule_allows"));
            }
            // Inclusion names one namespace: the others are as they were.
            assert!(photo.frontend.http(photo.backend.at(Family::V4, 8080)).text.contains("photo-backend"));
        });
    });
    cases.case("a refused pair by the service's address is refused as well", || {
        with(&photo, BACKEND_ONLY_2018, || {
            let asked = photo.frontend.http(photo.service(Family::V4, 80));
            assert_eq!(asked.text, "", "{asked:?}");
            assert!(photo.backend.http(photo.service(Family::V4, 80)).text.contains("datastore"));
        });
    });
    modern(&photo, &mut cases);
    http_only(&photo, &mut cases);
    cases.case("PeerAuthentication wins over Policy", || {
        let permissive = STRICT.replace("STRICT", "PERMISSIVE");
        with(&photo, &format!("{STRICT_2018}---\n{permissive}"), || {
            expect(&photo, &photo.stranger, HTTP, Ok(()));
        });
    });
    cases.case("under a policy without mtls the peer's identity is hidden from rules (B-9)", || {
        let none = "apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {name: default, namespace: datastore}
spec: {}
---
";
        with(&photo, &format!("{none}{BACKEND_ONLY_2018}"), || {
            expect(&photo, &photo.backend, HTTP, Err("no_rule_allows"));
        });
    });
    cases.case("a nested namespace is refused by a STRICT destination (T-7)", || {
        let nested =
            photo.world.pod(&photo.a, Plan::new("photo", "nested").outside().inside(&photo.frontend));
        with(&photo, STRICT, || expect(&photo, &nested, HTTP, Err("plaintext_refused")));
    });
    cases.case("what lost its permit is closed within a second (T-18)", || rejudged(&photo));
    cases.case("what changes while connections begin leaves no wrong one standing (T-18)", || {
        flapping(&photo)
    });
    malformed(&photo, &mut cases);
    cases.case("an unreadable file at a cold start denies all (T-19)", || cold_start(&photo));
    cases.end();
}

/// With a document in force, and without it afterwards.
#[track_caller]
fn with(photo: &Photo, document: &str, body: impl FnOnce()) {
    photo.apply(FILE, document);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
    photo.withdraw(FILE);
    if let Err(panic) = panicked {
        std::panic::resume_unwind(panic);
    }
}

#[track_caller]
fn expect(photo: &Photo, client: &Pod, port: u16, expected: Result<(), &str>) {
    expect_of(photo, client, port, Family::V4, expected);
}

/// One request to the datastore: served, or refused with the reason in line and counter.
#[track_caller]
fn expect_of(photo: &Photo, client: &Pod, port: u16, family: Family, expected: Result<(), &str>) {
    let watch = photo.b.watch();
    let before = photo.datastore.accepted(photo.listeners.http).len();
    let asked = client.http(photo.datastore.at(family, port));
    match expected {
        Ok(()) => {
            assert!(asked.text.contains("datastore peer="), "{} is served: {asked:?}", client.name());
            watch.served("inbound", &[("destination.workload", "datastore")]);
        }
        Err(reason) => {
            assert_closed_without_a_byte(&asked);
            let line = watch.refused(
                "inbound",
                reason,
                &[("verdict", "denied"), ("destination.workload", "datastore")],
            );
            let after = photo.datastore.accepted(photo.listeners.http).len();
            assert_eq!(after, before, "the application never saw it: {line}");
        }
    }
}

/// B-12 on layer 4: closed, no data.
#[track_caller]
fn assert_closed_without_a_byte(asked: &Asked) {
    assert_eq!(asked.text, "", "no byte from the server: {asked:?}");
    assert!(asked.refused.is_some() || asked.end == "ECONNRESET" || asked.end == "eof", "closed: {asked:?}");
}

/// Served, or refused with this reason.
type Expected = Result<(), &'static str>;

fn modern(photo: &Photo, cases: &mut Cases) {
    let no_rule = Err("no_rule_allows");
    let by_rule = Err("denied_by_rule");
    let table: Vec<(&str, String, Expected, Expected)> = vec![
        (
            "ALLOW by principal",
            authorization("p", "ALLOW", &format!("[{{from: [{{source: {{principals: [{BACKEND}]}}}}]}}]")),
            no_rule,
            Ok(()),
        ),
        (
            "DENY by principal",
            authorization("p", "DENY", &format!("[{{from: [{{source: {{principals: [{FRONTEND}]}}}}]}}]")),
            by_rule,
            Ok(()),
        ),
        (
            "ALLOW by namespace",
            authorization("p", "ALLOW", "[{from: [{source: {namespaces: [photo]}}]}]"),
            Ok(()),
            Ok(()),
        ),
        (
            "ALLOW by another namespace",
            authorization("p", "ALLOW", "[{from: [{source: {namespaces: [elsewhere]}}]}]"),
            no_rule,
            no_rule,
        ),
        (
            "ALLOW by a port",
            authorization("p", "ALLOW", &format!("[{{to: [{{operation: {{ports: [\"{HTTP}\"]}}}}]}}]")),
            Ok(()),
            Ok(()),
        ),
        (
            "ALLOW by another port",
            authorization("p", "ALLOW", "[{to: [{operation: {ports: [\"1\"]}}]}]"),
            no_rule,
            no_rule,
        ),
        (
            "DENY by address",
            authorization(
                "p",
                "DENY",
                &format!("[{{from: [{{source: {{ipBlocks: [\"{}/32\"]}}}}]}}]", photo.frontend.v4()),
            ),
            by_rule,
            Ok(()),
        ),
        ("ALLOW of nobody", authorization("p", "ALLOW", "[]"), no_rule, no_rule),
        (
            "DENY goes before ALLOW",
            format!(
                "{}---\n{}",
                authorization("p", "ALLOW", "[{}]"),
                authorization(
                    "q",
                    "DENY",
                    &format!("[{{from: [{{source: {{principals: [{FRONTEND}]}}}}]}}]")
                )
            ),
            by_rule,
            Ok(()),
        ),
    ];
    for (what, document, frontend, backend) in table {
        cases.case(&format!("AuthorizationPolicy: {what}"), || {
            with(photo, &document, || {
                expect(photo, &photo.frontend, HTTP, frontend);
                expect(photo, &photo.backend, HTTP, backend);
            });
        });
    }
}

/// B-10: what speaks of HTTP cannot be judged on a port that speaks something else, so it grants nothing there and a DENY
/// denies more. On a port that speaks HTTP each request is judged.
fn http_only(photo: &Photo, cases: &mut Cases) {
    let role = BACKEND_ONLY_2018
        .replace("rules: [{services: [\"*\"]}]", "rules: [{services: [\"*\"], methods: [\"GET\"]}]");
    cases.case("a role with methods grants nothing on layer 4 (B-10)", || {
        assert_ne!(role, BACKEND_ONLY_2018);
        with(photo, &role, || expect(photo, &photo.backend, ECHO, Err("no_rule_allows")));
    });
    cases.case("a role with methods grants these methods on HTTP (B-4)", || {
        with(photo, &role, || {
            answered(photo, &photo.backend, "GET");
            forbidden(photo, &photo.backend, "DELETE", "no_rule_allows");
            forbidden(photo, &photo.frontend, "GET", "no_rule_allows");
        });
    });
    let allow = authorization("p", "ALLOW", "[{to: [{operation: {methods: [\"GET\"]}}]}]");
    cases.case("an ALLOW rule with methods matches nothing on layer 4", || {
        with(photo, &allow, || expect(photo, &photo.backend, ECHO, Err("no_rule_allows")));
    });
    cases.case("an ALLOW rule with methods allows these methods on HTTP (F-3)", || {
        with(photo, &allow, || {
            answered(photo, &photo.frontend, "GET");
            forbidden(photo, &photo.frontend, "POST", "no_rule_allows");
        });
    });
    let deny = authorization("p", "DENY", "[{to: [{operation: {methods: [\"DELETE\"]}}]}]");
    cases.case("a DENY rule with methods denies more on layer 4", || {
        with(photo, &deny, || expect(photo, &photo.backend, ECHO, Err("denied_by_rule")));
    });
    cases.case("a DENY rule with methods denies these methods on HTTP (F-3)", || {
        with(photo, &deny, || {
            answered(photo, &photo.backend, "GET");
            forbidden(photo, &photo.backend, "DELETE", "denied_by_rule");
        });
    });
    cases.case("an HTTP-only rule shows as such in the status", || {
        with(photo, &allow, || {
            let status = photo.b.status().to_string();
            assert!(status.contains("methods"), "{status}");
        });
    });
}

/// One request of this method to the datastore's page.
#[track_caller]
fn request(photo: &Photo, client: &Pod, method: &str) -> Asked {
    let to = Connect::to(photo.datastore.at(Family::V4, HTTP));
    client.ask(to, &format!("{method} / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"))
}

#[track_caller]
fn answered(photo: &Photo, client: &Pod, method: &str) {
    let asked = request(photo, client, method);
    assert!(asked.text.starts_with("HTTP/1.1 200 "), "{method} of {}: {asked:?}", client.name());
    let (_, peer) = asked.text.split_once("datastore peer=").expect("the page says whom it saw");
    assert!(peer.contains(&format!("{}]:", client.v4())), "the true client: {asked:?}");
}

/// B-12 on HTTP: 403 with its words, the reason in the request's line, and the application never saw it.
#[track_caller]
fn forbidden(photo: &Photo, client: &Pod, method: &str, reason: &str) {
    let (log, before) = (photo.b.log(), photo.datastore.accepted(photo.listeners.http).len());
    let from = log.position();
    let asked = request(photo, client, method);
    assert!(asked.text.starts_with("HTTP/1.1 403 "), "{method} of {}: {asked:?}", client.name());
    assert!(asked.text.ends_with("\r\n\r\nRBAC: access denied"), "{asked:?}");
    log.wait_from(from, "that the request was denied", LINE_TIME_MAX, |line| {
        is(line, "method", method) && is(line, "reason", reason) && line["status"] == 403
    });
    assert_eq!(photo.datastore.accepted(photo.listeners.http).len(), before, "the application never saw it");
}

/// T-18, the plain half: an open connection ends when its permit does, another goes on.
fn rejudged(photo: &Photo) {
    let to = photo.datastore.at(Family::V4, ECHO);
    let (lost, kept) = (photo.frontend.connect(Connect::to(to)), photo.backend.connect(Connect::to(to)));
    assert_eq!(photo.frontend.exchange(&lost, "before").as_deref(), Ok("before"));
    assert_eq!(photo.backend.exchange(&kept, "before").as_deref(), Ok("before"));
    let watch = photo.b.watch();
    with(photo, BACKEND_ONLY_2018, || {
        let ended = photo.frontend.drain(&lost, Duration::from_secs(10));
        assert_ne!(ended.end, "EAGAIN", "it still stands");
        assert!(u128::from(ended.elapsed_ms) <= CUT_TIME_MAX.as_millis(), "{ended:?}");
        watch.refused("inbound", "no_rule_allows", &[("source.workload", "photo-frontend")]);
        assert_eq!(photo.backend.exchange(&kept, "after").as_deref(), Ok("after"));
    });
    photo.backend.close(&kept);
}

/// T-18, the race: connections begin all the time while a policy comes and goes. After the last "no", none exchanges.
fn flapping(photo: &Photo) {
    let to = photo.datastore.at(Family::V4, ECHO);
    let storm = photo.frontend.storm(Storm {
        to: vec![to],
        parallel: 8,
        text: "x".to_owned(),
        bytes: 64,
        timeout_ms: 5_000,
        attempts_max: 1_000_000,
    });
    storm.progress(50, Duration::from_secs(20));
    for _ in 0..10 {
        photo.apply(FILE, BACKEND_ONLY_2018);
        photo.withdraw(FILE);
    }
    storm.progress(50, Duration::from_secs(20));
    let held: Vec<_> = (0..50).map(|_| photo.frontend.connect(Connect::to(to))).collect();
    for connection in &held {
        assert_eq!(photo.frontend.exchange(connection, "x").as_deref(), Ok("x"));
    }
    photo.apply(FILE, BACKEND_ONLY_2018);
    for connection in &held {
        let ended = photo.frontend.drain(connection, CUT_TIME_MAX);
        assert_ne!(ended.end, "EAGAIN", "a connection without a permit still stands");
    }
    let load = storm.stop();
    photo.withdraw(FILE);
    assert!(load.failed.keys().all(|step| !step.contains("mismatch")), "{load:?}");
}

/// What a document gets wrong is named, and nothing that worked is changed.
fn malformed(photo: &Photo, cases: &mut Cases) {
    let table = [
        (
            "a workload without a node",
            "apiVersion: culvert.io/v1alpha1\nkind: Workload\nmetadata: {name: x, namespace: photo}\nspec: {addresses: [10.8.1.99], cgroup: x}\n",
            "spec.node",
        ),
        (
            "a workload with an unknown key",
            "apiVersion: culvert.io/v1alpha1\nkind: Workload\nmetadata: {name: x, namespace: photo}\nspec: {node: node-a, addresses: [10.8.1.99], cgroup: x, colour: red}\n",
            "spec.colour",
        ),
        (
            "a second mesh",
            "apiVersion: culvert.io/v1alpha1\nkind: Mesh\nmetadata: {name: other}\nspec: {}\n",
            "metadata.name",
        ),
        (
            "a second document for the same mesh",
            "apiVersion: culvert.io/v1alpha1\nkind: Mesh\nmetadata: {name: default}\nspec: {defaultMode: STRICT}\n",
            "metadata.name",
        ),
    ];
    for (what, document, field) in table {
        cases.case(&format!("{what} is named and changes nothing"), || {
            let watch = photo.b.watch();
            photo.world.documents().put("malformed.yaml", document);
            let event = watch.event("document refused", &[("field", field)]);
            assert!(event.to_string().contains("malformed.yaml"), "the file is named: {event}");
            assert!(watch.grew("culvert_documents_refused_total", &[]) >= 1.0);
            expect(photo, &photo.frontend, HTTP, Ok(()));
            photo.withdraw("malformed.yaml");
        });
    }
    cases.case("a changed document that is wrong is named, and its last good version stays", || {
        let watch = photo.b.watch();
        let wrong = GROUND.replace("trustDomain: cluster.local", "trustDomain: elsewhere.example");
        photo.world.documents().put("ground.yaml", &wrong);
        let event = watch.event("document refused", &[("field", "spec.trustDomain")]);
        assert!(event.to_string().contains("ground.yaml"), "the file is named: {event}");
        expect(photo, &photo.frontend, HTTP, Ok(()));
        photo.apply("ground.yaml", GROUND);
    });
    cases.case("a workload that claims another's address is named and changes nothing", || {
        let thief = photo.datastore.document().replace("name: datastore\n", "name: thief\n");
        assert_ne!(thief, photo.datastore.document());
        let watch = photo.b.watch();
        photo.world.documents().put("thief.yaml", &thief);
        let event = watch.event("document refused", &[]);
        assert!(event.to_string().contains("thief"), "{event}");
        expect(photo, &photo.frontend, HTTP, Ok(()));
        photo.withdraw("thief.yaml");
    });
    cases.case("a namespace that does not hold the workload's address is refused", || {
        // Another's namespace for an address that is nobody's: an identity for whoever may write a path.
        let document = photo
            .stranger
            .document()
            .replace(&photo.stranger.v4().to_string(), "10.8.1.201")
            .replace(&photo.stranger.v6().to_string(), "fd00:8:1::c9");
        let watch = photo.a.watch();
        photo.world.documents().put("false.yaml", &document);
        let event = watch.event("workload refused", &[]);
        assert!(event.to_string().contains("stranger"), "{event}");
        assert!(watch.grew("culvert_enrolment_refusals_total", &[]) >= 1.0);
        photo.withdraw("false.yaml");
    });
    cases.case("a file that is no YAML leaves its last good contents in force", || {
        photo.apply(FILE, BACKEND_ONLY_2018);
        let watch = photo.b.watch();
        photo.world.documents().put(FILE, "kind: [ServiceRole\n\tnot: yaml");
        watch.event("file unreadable", &[]);
        expect(photo, &photo.frontend, HTTP, Err("no_rule_allows"));
        expect(photo, &photo.backend, HTTP, Ok(()));
        photo.withdraw(FILE);
        expect(photo, &photo.frontend, HTTP, Ok(()));
    });
}

/// T-19: what a file says that nobody can read is unknown, so all are refused until it can be read.
fn cold_start(photo: &Photo) {
    photo.b.terminate();
    photo.b.cleanup().expect("a stopped daemon can be cleaned up");
    forget_good_set(photo);
    photo.b.documents().put("broken.yaml", "kind: [AuthorizationPolicy\n\tnot: yaml");
    photo.b.launch();
    photo
        .b
        .log()
        .wait_from(0, "the file is unreadable", LINE_TIME_MAX, |line| is(line, "message", "file unreadable"));
    let deadline = std::time::Instant::now() + LINE_TIME_MAX;
    let asked = loop {
        // The enrolment of the workload may still be under way: until then nobody is served either.
        let asked = photo.frontend.http(photo.datastore.at(Family::V4, HTTP));
        let denied = photo.b.log().since(0).iter().any(|line| is(line, "reason", "policy_unusable"));
        assert_eq!(asked.text, "", "{asked:?}");
        if denied {
            break asked;
        }
        assert!(std::time::Instant::now() < deadline, "{asked:?}\n{}", photo.b.log().tail());
    };
    assert_closed_without_a_byte(&asked);
    assert_eq!(photo.b.readiness(), Some(503), "{}", photo.b.readiness_text());
    assert!(photo.b.readiness_text().contains("broken.yaml"), "{}", photo.b.readiness_text());

    photo.b.documents().put("broken.yaml", "# mended\n");
    photo.b.wait_ready();
    expect(photo, &photo.frontend, HTTP, Ok(()));

    // With a last good set the same file does no harm, and that is said.
    photo.apply(FILE, BACKEND_ONLY_2018);
    photo.b.documents().put("broken.yaml", "kind: [AuthorizationPolicy\n\tnot: yaml");
    photo.b.terminate();
    photo.b.start();
    let event = photo.b.log().wait_from(0, "the last good set is used", LINE_TIME_MAX, |line| {
        is(line, "message", "file unreadable")
    });
    assert!(event.to_string().contains("last good"), "{event}");
    expect(photo, &photo.frontend, HTTP, Err("no_rule_allows"));
    expect(photo, &photo.backend, HTTP, Ok(()));
    photo.b.documents().put("broken.yaml", "# mended\n");
    photo.withdraw(FILE);
}

/// As on a machine that never ran: the joined node's certificate stays, its memory of documents goes.
fn forget_good_set(photo: &Photo) {
    let state = photo.b.root().join("var/lib/culvert");
    let mut folders = vec![state];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains("good") || name.contains("documents") {
                let _ = std::fs::remove_dir_all(entry.path());
                let _ = std::fs::remove_file(entry.path());
            } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            }
        }
    }
}
