//! Transport: Policy, MeshPolicy, PeerAuthentication.

use super::*;

const FRONTEND: &str = "photo/frontend tunnel > photo/backend:8080";
const PLAIN: &str = "plain > photo/backend:8080";

#[test]
fn with_nothing_in_force_the_mesh_s_default_mode_decides() {
    // policy A-5, DESIGN's REC: PERMISSIVE
    check_each("", &[(FRONTEND, "allow"), (PLAIN, "allow"), ("plain > shop/cart:1", "allow")]);
    let mut strict = World::default();
    strict.mesh.default_mode = TransportMode::Strict;
    strict.check("", PLAIN, "deny plaintext_refused");
    strict.check("", FRONTEND, "allow");
    strict.check("", "photo/frontend attested > photo/backend:8080", "allow"); // T-27
}

#[test]
fn only_enrolled_workloads_of_this_node_are_delivered_to() {
    for name in ["photo/remote", "photo/off"] {
        check("", &format!("photo/frontend tunnel > {name}:80"), "deny not_enrolled");
    }
    let world = World::default();
    let compiled = world.compile(&PolicyObjects::new());
    let remote = &world.workloads[&object_name("photo/remote")];
    assert_eq!(
        compiled.transport_mode(remote, 80),
        TransportMode::Strict,
        "nothing unproven where nothing is known"
    );
}

#[test]
fn every_spelling_of_mutual_tls_is_strict() {
    // policy A-2, 0-3
    for peers in [
        "[{mtls: {}}]",
        "[{mtls: null}]",
        "[{mtls: }]",
        "[{mtls: {mode: STRICT}}]",
        "[{mtls: {mode: null}}]",
        "[{mTLS: {mode: STRICT}}]",
        "[{mTLS: null}]",
        "[{mtls: {allowTls: true}}]",
        "[{mtls: {allow_tls: true}}]",
        "[{mtls: {}}, {mtls: {mode: PERMISSIVE}}]",
    ] {
        let objects = format!("MeshPolicy default: {{peers: {peers}}}");
        check(&objects, PLAIN, "deny plaintext_refused MeshPolicy/default");
        check(&objects, FRONTEND, "allow");
        check(&objects, "plain > shop/cart:1", "deny plaintext_refused MeshPolicy/default");
    }
    for peers in [
        "[{mtls: {mode: PERMISSIVE}}]",
        "[{mTLS: {mode: PERMISSIVE}}]",
        "[{mtls: {mode: PERMISSIVE}}, {mtls: {}}]",
    ] {
        check_each(
            &format!("MeshPolicy default: {{peers: {peers}}}"),
            &[(PLAIN, "allow"), (FRONTEND, "allow")],
        );
    }
}

#[test]
fn peer_is_optional_does_not_open_strict() {
    // policy A-8, G-7
    for optional in ["peerIsOptional", "peer_is_optional"] {
        check(
            &format!("MeshPolicy default: {{peers: [{{mtls: {{}}}}], {optional}: true}}"),
            PLAIN,
            "deny plaintext_refused",
        );
    }
}

#[test]
fn the_closest_policy_alone_applies() {
    // policy A-4
    let objects = "
        MeshPolicy default: {peers: [{mtls: {}}]}
        Policy photo/default: {peers: [{mtls: {mode: PERMISSIVE}}]}
        Policy photo/backend: {targets: [{name: backend, ports: [{number: 80}]}], peers: [{mtls: {}}]}";
    check_each(
        objects,
        &[
            ("plain > photo/backend:8080", "deny plaintext_refused Policy/photo/backend"),
            ("plain > photo/backend:9000", "allow"),
            ("plain > photo/frontend:8080", "allow"),
            ("plain > datastore/db:5432", "deny plaintext_refused MeshPolicy/default"),
            ("plain > shop/cart:7", "deny plaintext_refused MeshPolicy/default"),
        ],
    );
}

#[test]
fn a_policy_that_asks_for_nothing_switches_mutual_tls_off() {
    // policy
    let objects = "
        MeshPolicy default: {peers: [{mtls: {}}]}
        Policy photo/open: {targets: [{name: backend}]}";
    check_each(objects, &[(PLAIN, "allow"), ("plain > photo/frontend:8080", "deny plaintext_refused")]);
    check_each("MeshPolicy default: {peers: [{mtls: {}}]}\nPolicy photo/default: {}", &[(PLAIN, "allow")]);
}

#[test]
fn a_port_selector_means_the_service_s_port() {
    // policy A-1, H-1: 80 leads to 8080, 9001 to the port named admin, which is 9000
    let with = |ports: &str| {
        format!("Policy photo/p: {{targets: [{{name: backend, ports: {ports}}}], peers: [{{mtls: {{}}}}]}}")
    };
    for (ports, connection, expected) in [
        ("[{number: 80}]", "plain > photo/backend:8080", "deny plaintext_refused"),
        ("[{number: \"80\"}]", "plain > photo/backend:8080", "deny plaintext_refused"),
        ("[{name: http}]", "plain > photo/backend:8080", "deny plaintext_refused"),
        ("[{number: 9001}]", "plain > photo/backend:9000", "deny plaintext_refused"),
        ("[{name: tcp-admin}]", "plain > photo/backend:9000", "deny plaintext_refused"),
        ("[{number: 80}, {name: tcp-admin}]", "plain > photo/backend:9000", "deny plaintext_refused"),
        ("[]", "plain > photo/backend:9000", "deny plaintext_refused"),
        ("[{number: 8080}]", "plain > photo/backend:8080", "allow"),
        ("[{name: admin}]", "plain > photo/backend:9000", "allow"),
        ("[{number: 80}]", "plain > photo/backend:9000", "allow"),
        ("[]", "plain > photo/backend:9999", "allow"),
        ("[]", "plain > photo/frontend:8080", "allow"),
    ] {
        check(&with(ports), connection, expected);
    }
}

#[test]
fn a_port_of_no_service_gets_the_namespace_s_or_the_mesh_s_policy() {
    // policy A-4, G-25
    let targeted = "Policy photo/p: {targets: [{name: backend}], peers: [{mtls: {}}]}";
    check_each(targeted, &[("plain > photo/backend:9999", "allow"), ("plain > photo/backend:1", "allow")]);
    let namespace = "Policy photo/default: {peers: [{mtls: {}}]}";
    for port in [9999, 1] {
        check(
            namespace,
            &format!("plain > photo/backend:{port}"),
            "deny plaintext_refused Policy/photo/default",
        );
    }
    check(
        "MeshPolicy default: {peers: [{mtls: {}}]}",
        "plain > photo/backend:1",
        "deny plaintext_refused MeshPolicy/default",
    );
}

#[test]
fn the_first_service_owns_a_port_that_two_claim() {
    // policy A-4
    let mut world = World::default();
    let rival = service("photo/aaa", "backend", &[("http", 82, "8080", Protocol::Http)]);
    world.services.insert(rival.name.clone(), rival);
    let strict =
        |name: &str| format!("Policy photo/p: {{targets: [{{name: {name}}}], peers: [{{mtls: {{}}}}]}}");
    world.check(&strict("aaa"), PLAIN, "deny plaintext_refused");
    world.check(&strict("backend"), PLAIN, "allow");
    world.check(&strict("backend"), "plain > photo/backend:9000", "deny plaintext_refused");
}

#[test]
fn of_two_service_ports_that_lead_to_one_the_stricter_counts() {
    let mut world = World::default();
    let ports = [("http", 80, "8080", Protocol::Http), ("http-b", 81, "8080", Protocol::Http)];
    world.services.insert(object_name("photo/backend"), service("photo/backend", "backend", &ports));
    for port in [80, 81] {
        let policy = format!(
            "Policy photo/p: {{targets: [{{name: backend, ports: [{{number: {port}}}]}}], peers: [{{mtls: {{}}}}]}}"
        );
        world.check(&policy, PLAIN, "deny plaintext_refused");
    }
}

#[test]
fn the_oldest_of_several_service_policies_counts() {
    // policy 0-7, G-16
    let policies = |a: &str, b: &str| {
        format!(
            "Policy photo/a@{a}: {{targets: [{{name: backend}}], peers: [{{mtls: {{}}}}]}}
             Policy photo/b@{b}: {{targets: [{{name: backend}}]}}"
        )
    };
    check(
        &policies("2018-01-01T00:00:00Z", "2019-01-01T00:00:00Z"),
        PLAIN,
        "deny plaintext_refused Policy/photo/a",
    );
    check(&policies("2019-01-01T00:00:00Z", "2018-01-01T00:00:00Z"), PLAIN, "allow");
    // Equally old: by name.
    let untimed = "Policy photo/b: {targets: [{name: backend}]}\nPolicy photo/a: {targets: [{name: backend}], peers: [{mtls: }]}";
    check(untimed, PLAIN, "deny plaintext_refused Policy/photo/a");
}

#[test]
fn a_policy_of_another_namespace_does_not_reach_over() {
    let objects = "Policy shop/backend: {targets: [{name: backend}], peers: [{mtls: {}}]}\nPolicy shop/default: {peers: [{mtls: {}}]}";
    check_each(
        objects,
        &[(PLAIN, "allow"), ("plain > shop/cart:7", "deny plaintext_refused Policy/shop/default")],
    );
}

#[test]
fn tokens_that_cannot_be_checked_close_http_ports() {
    // policy: a node that looks at no request cannot let any through.
    let origin = "origins: [{jwt: {issuer: a, jwksUri: \"https://a.test/keys\"}}]";
    for spec in [
        format!("{{{origin}}}"),
        format!("{{peers: [{{mtls: {{}}}}], {origin}}}"),
        format!("{{peers: [{{mtls: {{mode: PERMISSIVE}}}}], {origin}, principalBinding: USE_ORIGIN}}"),
        format!("{{{origin}, peer_is_optional: true, principal_binding: USE_ORIGIN}}"),
        "{origins: [{jwt: {issuer: a, trigger_rules: [{excluded_paths: [{exact: /health}]}]}}]}".to_owned(),
        "{peers: [{mtls: {}}], principalBinding: USE_ORIGIN}".to_owned(), // policy
    ] {
        let objects = format!("Policy photo/default: {spec}");
        check(&objects, FRONTEND, "deny policy_unusable Policy/photo/default");
        check(&objects, PLAIN, "deny");
        check(&objects, "photo/frontend tunnel > photo/backend:9000", "allow"); // policy A-7: TCP
        check(&objects, "datastore/db tunnel > datastore/db:5432", "allow");
    }
    for spec in [format!("{{{origin}, originIsOptional: true}}"), "{principalBinding: USE_ORIGIN}".to_owned()]
    {
        check(&format!("Policy photo/default: {spec}"), FRONTEND, "allow"); // policy
    }
}

#[test]
fn a_peer_of_another_trust_domain_is_refused_in_every_mode() {
    // policy A-8, G-12
    for mode in [
        "{}",
        "{peers: [{mtls: {}}]}",
        "{peers: [{mtls: {mode: PERMISSIVE}}]}",
        "{peers: [{mtls: {}}], peerIsOptional: true}",
    ] {
        let objects = format!("MeshPolicy default: {mode}");
        for how in ["tunnel", "mesh-tls", "attested"] {
            check(
                &objects,
                &format!("evil.org:photo/frontend {how} > photo/backend:8080"),
                "deny trust_domain",
            );
            check(&objects, &format!("old.local:photo/frontend {how} > photo/backend:8080"), "allow");
        }
    }
}

#[test]
fn peer_authentication_has_three_levels_and_unset_inherits() {
    // policy F-1
    let objects = "
        PeerAuthentication istio-system/default: {mtls: {mode: STRICT}}
        PeerAuthentication photo/default: {mtls: {mode: PERMISSIVE}}
        PeerAuthentication photo/backend: {selector: {matchLabels: {app: backend}}, mtls: {mode: STRICT}, portLevelMtls: {9000: {mode: DISABLE}, 7: {mode: UNSET}}}";
    check_each(
        objects,
        &[
            ("plain > photo/backend:8080", "deny plaintext_refused PeerAuthentication/photo/backend"),
            ("plain > photo/backend:7", "deny plaintext_refused PeerAuthentication/photo/backend"),
            ("plain > photo/backend:9000", "allow"),
            ("plain > photo/frontend:8080", "allow"),
            ("plain > datastore/db:5432", "deny plaintext_refused PeerAuthentication/istio-system/default"),
        ],
    );
    let inherits = "
        PeerAuthentication istio-system/default: {mtls: {mode: STRICT}}
        PeerAuthentication photo/default: {mtls: {mode: UNSET}}
        PeerAuthentication photo/backend: {selector: {matchLabels: {app: backend}}}";
    check(inherits, PLAIN, "deny plaintext_refused PeerAuthentication/istio-system/default");
    check("PeerAuthentication photo/default: {}", PLAIN, "allow");
}

#[test]
fn port_level_mode_is_by_the_workload_s_port() {
    // policy F-1, F-4
    let objects = "PeerAuthentication photo/p: {selector: {matchLabels: {app: backend}}, portLevelMtls: {8080: {mode: STRICT}, \"4444\": {mode: STRICT}}}";
    check_each(
        objects,
        &[
            (PLAIN, "deny plaintext_refused PeerAuthentication/photo/p"),
            ("plain > photo/backend:4444", "deny plaintext_refused"),
            ("plain > photo/backend:80", "allow"),
            ("plain > photo/frontend:8080", "allow"),
        ],
    );
}

#[test]
fn the_oldest_peer_authentication_of_a_level_counts() {
    // policy F-1
    let objects = "
        PeerAuthentication photo/a@2022-01-01T00:00:00Z: {mtls: {mode: PERMISSIVE}}
        PeerAuthentication photo/b@2021-01-01T00:00:00Z: {mtls: {mode: STRICT}}";
    check(objects, PLAIN, "deny plaintext_refused PeerAuthentication/photo/b");
}

#[test]
fn peer_authentication_wins_over_policy_and_mesh_policy() {
    // policy F-4, DESIGN 3.4.10
    let both = |peer: &str, policy: &str| {
        format!(
            "PeerAuthentication istio-system/p: {{mtls: {{mode: {peer}}}}}\nPolicy photo/default: {{peers: [{{mtls: {{mode: {policy}}}}}]}}"
        )
    };
    check(&both("STRICT", "PERMISSIVE"), PLAIN, "deny plaintext_refused PeerAuthentication/istio-system/p");
    check(&both("PERMISSIVE", "STRICT"), PLAIN, "allow");
    check(&both("UNSET", "STRICT"), PLAIN, "deny plaintext_refused Policy/photo/default");
    // What the Policy asks of tokens still stands.
    let tokens = "PeerAuthentication photo/p: {mtls: {mode: STRICT}}\nPolicy photo/default: {origins: [{jwt: {issuer: a}}]}";
    check(tokens, FRONTEND, "deny policy_unusable Policy/photo/default");
}

#[test]
fn without_mutual_tls_nobody_has_an_identity() {
    // policy A-5, B-9
    let rules = "AuthorizationPolicy photo/a: {rules: [{from: [{source: {principals: [\"*\"]}}]}]}";
    for off in ["Policy photo/default: {}", "PeerAuthentication photo/default: {mtls: {mode: DISABLE}}"] {
        let objects = format!("{rules}\n{off}");
        for how in ["tunnel", "mesh-tls", "attested"] {
            check(&objects, &format!("photo/frontend {how} > photo/backend:8080"), "deny no_rule_allows");
        }
    }
    check(rules, FRONTEND, "allow");
    check(rules, PLAIN, "deny no_rule_allows");
}

#[test]
fn a_permit_names_the_peer_and_the_service() {
    let world = World::default();
    let compiled = world.compile(&PolicyObjects::new());
    let permit =
        compiled.authorise(&world.facts("photo/frontend tunnel > photo/backend:9000")).expect("allowed");
    assert_eq!(permit.verdict().principal, Some(identity("photo/frontend")));
    assert_eq!(permit.verdict().service, Some(object_name("photo/backend")));
    let permit = compiled.authorise(&world.facts("plain > photo/backend:1")).expect("allowed");
    assert_eq!((&permit.verdict().principal, &permit.verdict().service), (&None, &None));
}

#[test]
fn the_transport_mode_of_a_port_is_told() {
    let world = World::default();
    let (objects, _) =
        load("Policy photo/p: {targets: [{name: backend, ports: [{number: 80}]}], peers: [{mtls: {}}]}");
    let compiled = world.compile(&objects);
    let backend = &world.workloads[&object_name("photo/backend")];
    assert_eq!(compiled.transport_mode(backend, 8080), TransportMode::Strict);
    assert_eq!(compiled.transport_mode(backend, 9000), TransportMode::Permissive);
    assert_eq!(compiled.transport_mode(backend, 5), TransportMode::Permissive);
}
