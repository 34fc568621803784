//! What only a whole snapshot shows.

use std::collections::BTreeSet;

use super::*;
use crate::{snapshot::Route, store::Update};

fn pod(name: &str, account: &str, address: &str) -> String {
    testing::pod(name, address, "ports: [{name: http, port: 8080}]")
        .replace(&format!("app: {name}"), "app: web")
        .replace(&format!("serviceAccount: {name}"), &format!("serviceAccount: {account}"))
}

/// The endpoint, who may answer there, and for which service.
fn routed(
    snapshot: &crate::snapshot::Snapshot,
    target: &str,
    seed: u64,
) -> (String, BTreeSet<String>, Option<String>) {
    let caller = testing::workload(snapshot, "caller");
    let route = snapshot.route(&caller, testing::at(target), seed);
    let Route::Tunnel { destination, allowed, service, .. } = route else {
        panic!("{target} leads to {route:?}");
    };
    (
        destination.identity.principal(),
        allowed.iter().map(SpiffeId::principal).collect(),
        service.map(|name| name.to_string()),
    )
}

#[test]
fn an_endpoint_and_its_right_to_answer_come_and_go_together() {
    // policy D-7: whichever endpoint a snapshot leads to, it is in that snapshot's set.
    let service = testing::service("web", "10.96.0.1", "web", "[{port: 80, targetPort: 8080}]");
    let caller = testing::pod("caller", "10.8.0.1", "");
    let worlds = [
        vec![pod("web-0", "old", "10.8.0.2")],
        vec![pod("web-0", "old", "10.8.0.2"), pod("web-1", "new", "10.8.0.3")],
        vec![pod("web-1", "new", "10.8.0.3")],
    ];
    let mut store = testing::empty_store();
    for (pods, accounts) in worlds.into_iter().zip([&["old"][..], &["new", "old"], &["new"]]) {
        let documents: Vec<String> = pods.into_iter().chain([service.clone(), caller.clone()]).collect();
        store.apply(testing::replace(testing::FILE, &testing::join(&documents)));
        let snapshot = store.snapshot();
        let expected: BTreeSet<String> =
            accounts.iter().map(|account| format!("cluster.local/ns/photo/sa/{account}")).collect();
        for seed in 0..8 {
            let (endpoint, allowed, _) = routed(&snapshot, "10.96.0.1:80", seed);
            assert!(allowed.contains(&endpoint), "{endpoint} among {allowed:?}");
            assert_eq!(allowed, expected);
        }
    }
}

#[test]
fn the_service_is_the_one_whose_address_was_dialled() {
    // policy D-8: an address that a client chose by itself is nobody's service.
    let documents = [
        pod("web-0", "zero", "10.8.0.2"),
        pod("web-1", "one", "10.8.0.3"),
        testing::service("web", "10.96.0.1", "web", "[{port: 80, targetPort: 8080}]"),
        testing::pod("caller", "10.8.0.1", ""),
    ];
    let snapshot = testing::snapshot(&testing::join(&documents));
    let both: BTreeSet<String> =
        ["zero", "one"].map(|name| format!("cluster.local/ns/photo/sa/{name}")).into();
    let (_, allowed, service) = routed(&snapshot, "10.96.0.1:80", 1);
    assert_eq!((allowed, service.as_deref()), (both, Some("photo/web")));
    let (_, allowed, service) = routed(&snapshot, "10.8.0.3:8080", 1);
    assert_eq!(allowed, BTreeSet::from(["cluster.local/ns/photo/sa/one".to_owned()]));
    assert_eq!(service, None);
}

#[test]
fn documents_of_the_mixer_generation_are_named_and_grant_nothing() {
    // policy B-15
    let mut store = testing::empty_store();
    store.apply(testing::replace(
        testing::FILE,
        &testing::pod("backend", "10.8.0.2", "ports: [{name: http, port: 8080}]"),
    ));
    let old = |kind: &str, spec: &str| {
        format!(
            "apiVersion: config.istio.io/v1alpha2\nkind: {kind}\nmetadata: {{name: x, namespace: photo}}\nspec: {spec}\n"
        )
    };
    let documents = [
        "apiVersion: rbac.istio.io/v1alpha1\nkind: ClusterRbacConfig\nmetadata: {name: default}\nspec: {mode: ON}\n".to_owned(),
        old("ServiceRole", "{rules: [{services: [\"*\"], methods: [\"*\"]}]}"),
        old("ServiceRoleBinding", "{subjects: [{user: \"*\"}], roleRef: {kind: ServiceRole, name: x}}"),
        old("rule", "{match: \"true\"}"),
    ];
    let problems = store.apply(testing::replace("old.yaml", &testing::join(&documents)));
    for kind in ["ServiceRole", "ServiceRoleBinding", "rule"] {
        let is_named = problems.iter().any(|problem| {
            problem
                .to_string()
                .contains(&format!("config.istio.io/v1alpha2 {kind} is not understood, ignored"))
        });
        assert!(is_named, "{kind}: {problems:?}");
    }
    let snapshot = store.snapshot();
    let backend = testing::workload(&snapshot, "backend");
    let facts = ConnectionFacts {
        presented: Presented::Tunnel(identity("photo/frontend")),
        source_address: testing::at("10.8.0.1:0").ip(),
        destination_address: testing::at("10.8.0.2:0").ip(),
        destination_port: 8080,
        destination: backend,
    };
    assert_eq!(snapshot.authorise(&facts).expect_err("nobody is granted").reason, DenialReason::NoRuleAllows);
}

#[test]
fn without_any_configuration_a_workload_that_is_not_known_accepts_nobody() {
    // policy H-6
    let world = World::default();
    let stranger = Arc::new(workload("photo/stranger", "10.8.7.7", &[]));
    let compiled = world.compile(&PolicyObjects::new());
    let facts = ConnectionFacts {
        destination: Arc::clone(&stranger),
        ..world.facts("photo/frontend tunnel > photo/backend:8080")
    };
    assert_eq!(compiled.authorise(&facts).expect_err("closed").reason, DenialReason::NotEnrolled);
    assert_eq!(compiled.transport_mode(&stranger, 8080), TransportMode::Strict);
    let mut store = testing::empty_store();
    store.apply(testing::replace(testing::FILE, &testing::pod("web", "10.8.0.2", "")));
    store.apply(Update::Unreadable { file: "policy.yaml".into(), reason: "half a file".to_owned() });
    let snapshot = store.snapshot();
    let facts = ConnectionFacts { destination: testing::workload(&snapshot, "web"), ..facts };
    assert_eq!(snapshot.authorise(&facts).expect_err("closed").reason, DenialReason::PolicyUnusable);
}

#[test]
fn a_port_that_is_named_wrongly_carries_tcp_and_status_says_what_that_costs() {
    // policy H-8
    let role = "ClusterRbacConfig default: {mode: ON}\nServiceRole datastore/r: {rules: [{paths: [/a]}]}\n\
        ServiceRoleBinding datastore/b: {subjects: [{user: \"*\"}], roleRef: {kind: ServiceRole, name: r}}";
    let status = status_of(role, "ServiceRole datastore/r");
    let sentence = format!("{status:?}");
    assert!(
        sentence.contains("grants nothing on port 5432 of datastore/db, which carries TCP"),
        "{sentence}"
    );
    check(role, "photo/backend tunnel > datastore/db:5432", "deny no_rule_allows");
}
