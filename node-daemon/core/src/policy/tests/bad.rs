//! Bad objects, all of them in one table (`bad_objects.txt`): what their authors are told, and that none of them weakens what
//! stood before.

use super::*;
use crate::{
    policy::tokens::Tokens,
    store::{Store, Update},
};

const TABLE: &str = include_str!("bad_objects.txt");

/// An object in the short form, and the message.
fn table() -> Vec<(&'static str, &'static str)> {
    let mut lines = TABLE.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut table = Vec::new();
    while let Some(object) = lines.next() {
        let message = lines.next().and_then(|line| line.strip_prefix("    "));
        table.push((object, message.unwrap_or_else(|| panic!("{object} has no message"))));
    }
    table
}

#[test]
fn each_bad_object_is_refused_with_its_message() {
    // policy, G-24, 0-3, 0-4
    // policy B-1, B-3, F-1, F-2, F-3, C
    let table = table();
    assert!(table.len() >= 160, "only {} bad objects", table.len());
    for (text, expected) in table {
        let object = read_objects(text).remove(0);
        let invalid = PolicyObjects::new().insert(&object).expect_err(text);
        assert_eq!(format!("{}: {}", invalid.field, invalid.reason()), expected, "{text}");
    }
}

/// A good version of the object of this kind and name; `None` where the name or the kind is what is wrong.
fn good_version(object: &Object) -> Option<String> {
    let (kind, name) = (object.kind.as_str(), &object.name);
    let spec = match (kind, &*name.name) {
        ("Policy" | "MeshPolicy", "default") => "{peers: [{mtls: {}}]}",
        ("Policy", _) => "{targets: [{name: backend}], peers: [{mtls: {}}]}",
        ("ClusterRbacConfig" | "RbacConfig", "default") => "{mode: ON}",
        ("ServiceRole", _) => {
            "{rules: [{services: [\"*\"], methods: [GET]}, {constraints: [{key: destination.port, values: [\"9000\"]}]}]}"
        }
        ("ServiceRoleBinding", _) => {
            "{subjects: [{user: cluster.local/ns/photo/sa/frontend}], roleRef: {kind: ServiceRole, name: r}}"
        }
        ("PeerAuthentication", _) => "{mtls: {mode: STRICT}}",
        ("AuthorizationPolicy", _) => {
            "{action: DENY, rules: [{from: [{source: {namespaces: [photo]}}], to: [{operation: {methods: [GET]}}]}]}"
        }
        ("RequestAuthentication", _) => "{jwtRules: [{issuer: a}]}",
        ("DestinationRule", _) => "{host: a, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}",
        _ => return None,
    };
    Some(format!("{kind} {name}: {spec}"))
}

/// What may stand already: nothing, both ages, grants and denials.
const BASES: [&str; 5] = [
    "",
    "MeshPolicy default: {peers: [{mtls: {}}]}\nClusterRbacConfig default: {mode: ON}",
    "ClusterRbacConfig default: {mode: ON}\n\
     ServiceRole photo/r: {rules: [{services: [\"*\"]}]}\n\
     ServiceRoleBinding photo/b: {subjects: [{user: \"*\"}], roleRef: {kind: ServiceRole, name: r}}",
    "PeerAuthentication istio-system/m: {mtls: {mode: STRICT}}\n\
     AuthorizationPolicy photo/x: {rules: [{from: [{source: {namespaces: [photo]}}]}]}\n\
     AuthorizationPolicy photo/y: {action: DENY, rules: [{to: [{operation: {paths: [/b]}}]}]}",
    "Policy photo/default: {peers: [{mtls: {mode: PERMISSIVE}}], origins: [{jwt: {issuer: a, triggerRules: [{excludedPaths: [{exact: /a}]}]}}]}",
];

const CONNECTIONS: [&str; 6] = [
    "plain > photo/backend:8080",
    "photo/frontend tunnel > photo/backend:8080",
    "photo/frontend tunnel > photo/backend:9000",
    "photo/frontend tunnel > photo/backend:1",
    "shop/cart tunnel > photo/frontend:8080",
    "photo/backend tunnel > datastore/db:5432",
];

/// Whether each of some connections and requests is allowed.
fn answers(compiled: &Compiled, world: &World) -> Vec<(String, bool)> {
    let mut answers = Vec::new();
    let headers: &[(&str, &str)] = &[];
    let tokens = Tokens::none();
    for connection in CONNECTIONS {
        let facts = world.facts(connection);
        for (method, path) in [("GET", "/a"), ("POST", "/b")] {
            let request = RequestFacts {
                method,
                path: Some(path),
                host: Some("backend"),
                headers: &headers,
                tokens: &tokens,
            };
            let is_allowed = match compiled.admit(&facts) {
                Err(_) => false,
                Ok(Admission::Stream(_)) => true,
                Ok(Admission::Requests) => compiled.judge_request(&facts, &request).is_ok(),
            };
            answers.push((format!("{connection} {method} {path}"), is_allowed));
        }
    }
    answers
}

fn insert_all(objects: &mut PolicyObjects, text: &str) {
    for object in read_objects(text) {
        objects.insert(&object).expect("the base is good");
    }
}

#[test]
fn no_bad_object_weakens_what_stood_before() {
    // policy A-3, H-6
    let world = World::default();
    for (text, _) in table() {
        let bad = read_objects(text).remove(0);
        for base in BASES {
            // It is new: nobody gets in whom its absence kept out.
            let mut objects = PolicyObjects::new();
            insert_all(&mut objects, base);
            let before = answers(&world.compile(&objects), &world);
            objects.insert(&bad).expect_err(text);
            let after = answers(&world.compile(&objects), &world);
            for ((what, was_allowed), (_, is_allowed)) in before.iter().zip(&after) {
                assert!(*was_allowed || !is_allowed, "{text}\nover {base}\nlets in {what}");
            }
            // It follows a good version: all answers stay.
            let Some(good) = good_version(&bad) else { continue };
            let mut objects = PolicyObjects::new();
            insert_all(&mut objects, base);
            insert_all(&mut objects, &good);
            let before = answers(&world.compile(&objects), &world);
            objects.insert(&bad).expect_err(text);
            assert_eq!(
                answers(&world.compile(&objects), &world),
                before,
                "{text}\nafter {good}\nover {base}"
            );
        }
    }
}

/// The same through the store, file by file, as the daemon has it.
#[test]
fn a_file_that_goes_bad_leaves_in_force_what_it_said() {
    // policy A-3, H-6
    let mesh = testing::join(&[
        testing::pod("frontend", "10.8.0.1", "ports: [{name: http, port: 8080}]"),
        testing::pod("backend", "10.8.0.2", "ports: [{name: http, port: 8080}, {name: tcp, port: 9000}]"),
        testing::service("backend", "10.96.0.1", "backend", "[{name: http, port: 80, targetPort: 8080}]"),
    ]);
    let answers = |store: &mut Store| {
        let snapshot = store.snapshot();
        let backend = testing::workload(&snapshot, "backend");
        let facts = |presented: &Presented, port| ConnectionFacts {
            presented: presented.clone(),
            source_address: testing::at("10.8.0.1:0").ip(),
            destination_address: testing::at("10.8.0.2:0").ip(),
            destination_port: port,
            destination: Arc::clone(&backend),
        };
        let peers = [Presented::Plaintext, Presented::Tunnel(identity("photo/frontend"))];
        let each = peers.iter().flat_map(|peer| [8080, 9000].map(|port| facts(peer, port)));
        each.map(|facts| format!("{:?}", snapshot.authorise(&facts).map(|permit| permit.verdict().clone())))
            .collect::<Vec<_>>()
    };
    for (text, _) in table() {
        let bad = read_objects(text).remove(0);
        let Some(good) = good_version(&bad) else { continue };
        let mut store = testing::empty_store();
        store.apply(testing::replace(testing::FILE, &mesh));
        store.apply(Update::replace("policy.yaml", vec![document(&good)]));
        let before = answers(&mut store);
        let problems = store.apply(Update::replace("policy.yaml", vec![document(text)]));
        assert!(!problems.is_empty(), "{text}: nobody is told");
        assert_eq!(answers(&mut store), before, "{text}\nafter {good}");
        store.apply(Update::Unreadable { file: "policy.yaml".into(), reason: "half a file".to_owned() });
        assert_eq!(answers(&mut store), before, "unreadable after {text}");
    }
}
