//! What an operator is told about each object.

use super::*;

/// The object is accepted, with this problem (its field, and a piece of the sentence) and a piece of its effect.
#[track_caller]
fn told(objects: &str, title: &str, field: Option<&str>, problem: &str, effect: &str) {
    let status = status_of(objects, title);
    assert!(status.accepted, "{status:?}");
    assert_eq!(status.field.as_deref(), field, "{status:?}");
    assert!(status.problem.as_deref().unwrap_or_default().contains(problem), "{status:?}");
    assert!(status.effect.contains(effect), "{status:?}");
    assert_eq!(status.problem.is_some(), field.is_some(), "{status:?}");
}

#[track_caller]
fn refused(objects: &str, title: &str, problem: &str, effect: &str) {
    let status = status_of(objects, title);
    assert!(!status.accepted, "{status:?}");
    assert!(status.problem.as_deref().unwrap_or_default().contains(problem), "{status:?}");
    assert!(status.effect.contains(effect), "{status:?}");
    assert!(status.field.is_some_and(|field| !field.is_empty()));
}

#[test]
fn a_good_object_says_what_it_does() {
    for (object, title, effect) in [
        (
            "MeshPolicy default: {peers: [{mtls: {}}]}",
            "MeshPolicy default",
            "mutual TLS is required for the mesh",
        ),
        (
            "Policy photo/default: {peers: [{mtls: {mode: PERMISSIVE}}]}",
            "Policy photo/default",
            "plaintext is accepted beside mutual TLS for namespace photo",
        ),
        (
            "Policy photo/p: {targets: [{name: backend}]}",
            "Policy photo/p",
            "rules see no identity, for targeted ports of backend in namespace photo",
        ),
        ("ClusterRbacConfig default: {}", "ClusterRbacConfig default", "RBAC is off"),
        (
            "ClusterRbacConfig default: {mode: ON_WITH_INCLUSION, inclusion: {namespaces: [photo]}}",
            "ClusterRbacConfig default",
            "RBAC runs for photo",
        ),
        (
            "ClusterRbacConfig default: {mode: ON_WITH_EXCLUSION, exclusion: {}, enforcementMode: PERMISSIVE}",
            "ClusterRbacConfig default",
            "RBAC runs except for nothing, but nobody is refused",
        ),
        (
            "PeerAuthentication istio-system/p: {mtls: {mode: STRICT}}",
            "PeerAuthentication istio-system/p",
            "mutual TLS is required for the mesh",
        ),
        (
            "PeerAuthentication photo/p: {selector: {matchLabels: {app: a}}, portLevelMtls: {80: {mode: DISABLE}}}",
            "PeerAuthentication photo/p",
            "the next level decides for workloads of namespace photo with app=a; on port 80 nothing is required",
        ),
        (
            "AuthorizationPolicy photo/a: {}",
            "AuthorizationPolicy photo/a",
            "allows nobody to reach namespace photo",
        ),
        (
            "AuthorizationPolicy photo/a: {action: DENY, rules: [{}]}",
            "AuthorizationPolicy photo/a",
            "what its rules match is denied",
        ),
        (
            "AuthorizationPolicy photo/a: {action: AUDIT, rules: [{}]}",
            "AuthorizationPolicy photo/a",
            "records what its rules match",
        ),
        (
            "AuthorizationPolicy photo/a: {action: CUSTOM, provider: {name: x}, rules: [{}]}",
            "AuthorizationPolicy photo/a",
            "no provider is asked in this version: what its rules match is denied",
        ),
        ("AuthorizationPolicy photo/a!dry-run: {}", "AuthorizationPolicy photo/a", "dry run: not enforced"),
        ("DestinationRule photo/d: {host: a.example}", "DestinationRule photo/d", "nothing is said of TLS"),
    ] {
        told(object, title, None, "", effect);
    }
}

#[test]
fn the_spellings_of_the_oldest_documents_are_accepted_with_a_warning() {
    // policy 0-1, 0-2, 0-3, 0-5
    let role = "ServiceRole photo/r: {rules: [{services: [\"*\"]}]}";
    let binding = |subject: &str| {
        format!(
            "{role}\nServiceRoleBinding photo/b: {{subjects: [{subject}], roleRef: {{kind: ServiceRole, name: r}}}}"
        )
    };
    told(
        "MeshPolicy default: {peers: [{mTLS: {}}]}",
        "MeshPolicy default",
        Some("spec.peers[0].mTLS"),
        "mTLS is read as mtls",
        "mutual TLS is required",
    );
    told(
        &binding("{user: frontend}"),
        "ServiceRoleBinding photo/b",
        Some("spec.subjects[0].user"),
        "\"frontend\" equals no identity",
        "",
    );
    told(
        &binding("{properties: [{source.ip: 1.1.1.1}]}"),
        "ServiceRoleBinding photo/b",
        Some("spec.subjects[0].properties"),
        "a list is read as one mapping",
        "",
    );
    told(
        &binding("{user: \"spiffe://a/b\"}"),
        "ServiceRoleBinding photo/b",
        Some("spec.subjects[0].user"),
        "leave spiffe:// out",
        "",
    );
    for (mode, said) in [("ON", "true is read as ON"), ("OFF", "false is read as OFF")] {
        let config = format!("ClusterRbacConfig default: {{mode: {mode}}}");
        told(&config, "ClusterRbacConfig default", Some("spec.mode"), said, "RBAC");
        told(&config.replace(mode, &format!("\"{mode}\"")), "ClusterRbacConfig default", None, "", "RBAC");
    }
    for subject in [
        "{user: \"*\"}",
        "{user: a/b}",
        "{user: \"*x\"}",
        "{user: allUsers}",
        "{names: [allAuthenticatedUsers]}",
    ] {
        told(&binding(subject), "ServiceRoleBinding photo/b", None, "", "1 of 1 subjects by connections");
    }
    told(
        &binding("{user: \"*\"}").replace("services: [\"*\"]", "paths: [pkg.S/M]"),
        "ServiceRole photo/r",
        Some("spec.rules[0].paths[0]"),
        "begin it with a slash",
        "0 of 1 rules grant connections",
    );
    told(
        &binding("{user: \"*\"}").replace("\"*\"]}]", "backend]}]"),
        "ServiceRole photo/r",
        Some("spec.rules[0].services[0]"),
        "\"backend\" equals no service",
        "",
    );
}

#[test]
fn what_layer_4_does_not_enforce_is_said() {
    for (objects, title, field, problem) in [
        (
            "Policy photo/default: {origins: [{jwt: {issuer: a}}]}",
            "Policy photo/default",
            "spec.origins",
            "no effect on port 9000 of photo/backend, which carries TCP",
        ), // policy A-7
        (
            "Policy photo/default: {peers: [{mtls: }], principalBinding: USE_ORIGIN}",
            "Policy photo/default",
            "spec.origins",
            "USE_ORIGIN without origins",
        ),
        (
            "RequestAuthentication photo/r: {jwtRules: [{issuer: a}]}",
            "RequestAuthentication photo/r",
            "spec.jwtRules",
            "no effect on port 9000 of photo/backend, which carries TCP",
        ), // policy A-7
        (
            "DestinationRule photo/d: {host: \"*.local\", trafficPolicy: {tls: {mode: DISABLE}}}",
            "DestinationRule photo/d",
            "spec.trafficPolicy.tls.mode",
            "a receiver under STRICT refuses them",
        ), // policy C
        (
            "DestinationRule photo/d: {host: nowhere, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}",
            "DestinationRule photo/d",
            "spec.host",
            "\"nowhere\" is no service of namespace photo",
        ),
        (
            "DestinationRule photo/d: {host: \"*.local\", trafficPolicy: {tls: {mode: ISTIO_MUTUAL, sni: a.b}}}",
            "DestinationRule photo/d",
            "spec.trafficPolicy.tls.sni",
            "the tunnel sends no name",
        ),
        (
            "DestinationRule photo/d: {host: \"*.local\", trafficPolicy: {tls: {mode: ISTIO_MUTUAL, subjectAltNames: [a.b]}}}",
            "DestinationRule photo/d",
            "spec.trafficPolicy.tls.subjectAltNames",
            "no identity of a workload",
        ),
        (
            "DestinationRule photo/d: {host: \"*.local\", subsets: [{name: v1, trafficPolicy: {tls: {mode: SIMPLE}}}]}",
            "DestinationRule photo/d",
            "spec.subsets[v1].labels",
            "no endpoint belongs to this subset",
        ),
        (
            "DestinationRule photo/c: {host: a.b.c}\nDestinationRule photo/d: {host: a.b.c}",
            "DestinationRule photo/d",
            "spec.host",
            "DestinationRule photo/c is for the same host",
        ),
        (
            "ClusterRbacConfig default: {mode: \"ON\"}\nServiceRole photo/r: {rules: [{ports: [1]}, {methods: [GET], paths: [/a]}]}\nServiceRoleBinding photo/b: {subjects: [{user: \"*\"}], roleRef: {kind: ServiceRole, name: r}}",
            "ServiceRole photo/r",
            "spec.rules[1]",
            "paths, methods: only a request can answer, so this rule grants nothing on port 9000 of photo/backend, which carries TCP",
        ), // policy B-10
        (
            "ClusterRbacConfig default: {mode: \"ON\"}\nServiceRole photo/r: {rules: [{}]}\nServiceRoleBinding photo/b: {subjects: [{user: \"*\"}, {group: a}], roleRef: {kind: ServiceRole, name: r}}",
            "ServiceRoleBinding photo/b",
            "spec.subjects[1]",
            "group: only a request can answer",
        ),
        (
            "AuthorizationPolicy photo/a: {rules: [{to: [{operation: {methods: [GET]}}]}]}",
            "AuthorizationPolicy photo/a",
            "spec.rules[0]",
            "this rule never matches on port 9000 of photo/backend",
        ),
        (
            "AuthorizationPolicy photo/a: {action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}",
            "AuthorizationPolicy photo/a",
            "spec.rules[0]",
            "denies more",
        ),
    ] {
        told(objects, title, Some(field), problem, "");
    }
}

#[test]
fn unusable_values_are_named() {
    // policy G-3, G-5, G-23, B-5
    let role =
        |constraint: &str| format!("ServiceRole photo/r: {{rules: [{{constraints: [{constraint}]}}]}}");
    for (objects, title, field, problem) in [
        (role("{key: made.up, values: [a]}"), "ServiceRole photo/r", "spec.rules[0].constraints[0].key", "no constraint that a connection can answer"),
        (role("{key: destination.ip, values: [a]}"), "ServiceRole photo/r", "spec.rules[0].constraints[0].values[0]", "its rule never matches"),
        (role("{key: destination.name, values: [\"a*b\"]}"), "ServiceRole photo/r", "spec.rules[0].constraints[0].values[0]", "only at one end"),
        ("AuthorizationPolicy photo/a: {rules: [{from: [{source: {ipBlocks: [a]}}]}]}".to_owned(), "AuthorizationPolicy photo/a", "spec.rules[0].from[0].source.ipBlocks[0]", "\"a\" is not usable, expected an IP address or CIDR"),
        ("AuthorizationPolicy photo/a: {action: DENY, rules: [{when: [{key: x.y, values: [a]}]}]}".to_owned(), "AuthorizationPolicy photo/a", "spec.rules[0].when[0].key", "no attribute that a connection can answer"),
        ("AuthorizationPolicy photo/a: {action: DENY}".to_owned(), "AuthorizationPolicy photo/a", "spec.rules", "it denies nobody"),
        ("ServiceRoleBinding photo/b: {subjects: [{properties: {a.b: c}}], roleRef: {kind: ServiceRole, name: r}}".to_owned(), "ServiceRoleBinding photo/b", "spec.subjects[0].properties[a.b]", "its subject matches nobody"),
        ("PeerAuthentication photo/p: {selector: {}}".to_owned(), "PeerAuthentication photo/p", "spec.selector", "selects every workload"),
        ("Policy photo/p: {targets: [{name: nope}]}".to_owned(), "Policy photo/p", "spec.targets[0].name", "\"nope\" is no service of namespace photo"),
        ("Policy photo/p: {targets: [{name: backend, labels: {a: b}}]}".to_owned(), "Policy photo/p", "spec.targets[0].labels", "never implemented"),
    ] {
        told(&objects, title, Some(field), problem, "");
    }
}

#[test]
fn references_that_lead_nowhere_are_named() {
    // policy B-2
    let binding =
        "ServiceRoleBinding photo/b: {subjects: [{user: \"*\"}], roleRef: {kind: ServiceRole, name: gone}}";
    told(
        binding,
        "ServiceRoleBinding photo/b",
        Some("spec.roleRef.name"),
        "\"gone\" is no usable ServiceRole of namespace photo",
        "",
    );
    told(
        "ServiceRole photo/r: {rules: [{}]}",
        "ServiceRole photo/r",
        Some("metadata.name"),
        "no binding names this role",
        "",
    );
}

#[test]
fn rivals_are_told_who_won() {
    // policy G-16, 0-7, 0-8, F-4
    let policies =
        "Policy photo/a: {targets: [{name: backend}]}\nPolicy photo/b: {targets: [{name: backend}]}";
    told(policies, "Policy photo/a", None, "", "");
    told(
        policies,
        "Policy photo/b",
        Some("metadata.creationTimestamp"),
        "where Policy/photo/a applies too, that one is older",
        "",
    );
    let switches =
        "ClusterRbacConfig default: {mode: \"ON\"}\nRbacConfig istio-system/default: {mode: \"OFF\"}";
    told(
        switches,
        "RbacConfig istio-system/default",
        None,
        "",
        "has no effect: ClusterRbacConfig/default decides where RBAC runs",
    );
    let ages = "ClusterRbacConfig default: {mode: \"ON\"}\nAuthorizationPolicy photo/a: {}";
    told(ages, "AuthorizationPolicy photo/a", None, "", "v1alpha1 RBAC objects are set aside");
    let dry = "ClusterRbacConfig default: {mode: \"ON\"}\nAuthorizationPolicy photo/a!dry-run: {}";
    assert!(!status_of(dry, "AuthorizationPolicy photo/a").effect.contains("set aside"));
}

#[test]
fn a_refused_object_says_what_is_denied_in_its_place() {
    for (objects, title, problem, effect) in [
        (
            "Policy photo/p: {targets: [{name: backend}], peers: [{}]}",
            "Policy photo/p",
            "spec.peers[0]: found {}, expected a peer method",
            "denied to targeted ports of backend",
        ),
        (
            "Policy photo/default: {peers: [{}]}",
            "Policy photo/default",
            "spec.peers[0]",
            "denied to namespace photo",
        ),
        (
            "Policy photo/p: {targets: 1}",
            "Policy photo/p",
            "spec.targets: found 1, expected a list",
            "denied to namespace photo",
        ),
        ("MeshPolicy default: {peers: 1}", "MeshPolicy default", "spec.peers", "denied to the mesh"),
        (
            "ClusterRbacConfig default: {mode: SOMETIMES}",
            "ClusterRbacConfig default",
            "expected one of OFF, ON, ON_WITH_INCLUSION, ON_WITH_EXCLUSION",
            "denied to the mesh",
        ),
        (
            "PeerAuthentication photo/p: {mtls: {mode: x}}",
            "PeerAuthentication photo/p",
            "expected one of UNSET, DISABLE, PERMISSIVE, STRICT",
            "denied to namespace photo, where nothing closer applies",
        ),
        (
            "AuthorizationPolicy photo/p: {selector: {matchLabels: {app: a}}, action: x}",
            "AuthorizationPolicy photo/p",
            "spec.action",
            "denied to workloads of namespace photo with app=a",
        ),
        (
            "AuthorizationPolicy photo/p: {rules: 1}",
            "AuthorizationPolicy photo/p",
            "spec.rules",
            "unless another AuthorizationPolicy allows it",
        ),
        (
            "AuthorizationPolicy photo/p: {action: AUDIT, rules: 1}",
            "AuthorizationPolicy photo/p",
            "spec.rules",
            "denies and grants nothing",
        ),
        ("ServiceRole photo/r: {}", "ServiceRole photo/r", "expected at least one rule", "grants nothing"),
        (
            "DestinationRule photo/d: {}",
            "DestinationRule photo/d",
            "spec.host",
            "does not say for which host",
        ),
        (
            "DestinationRule photo/d: {host: a, trafficPolicy: {tls: {mode: OFF}}}",
            "DestinationRule photo/d",
            "spec.trafficPolicy.tls.mode",
            "to a are denied",
        ),
        (
            "Surprise@security.istio.io/v1 photo/a: {}",
            "Surprise photo/a",
            "apiVersion",
            "denied to namespace photo",
        ),
        (
            "MeshPolicy default: {peers: [{mtls: {}}]}\nMeshPolicy default: {peers: 1}",
            "MeshPolicy default",
            "spec.peers: found 1",
            "the version before stays in force: mutual TLS is required",
        ),
    ] {
        refused(objects, title, problem, effect);
    }
}

#[test]
fn many_problems_are_counted() {
    let binding = |subjects: usize| {
        let subjects = vec!["{user: x}"; subjects].join(", ");
        format!(
            "ServiceRoleBinding photo/b: {{subjects: [{subjects}], roleRef: {{kind: ServiceRole, name: r}}}}"
        )
    };
    // One for each subject, and the role that does not exist.
    for (subjects, last) in [(7, "; spec.roleRef"), (8, "; and 1 more"), (20, "; and 13 more")] {
        let object = binding(subjects);
        told(&object, "ServiceRoleBinding photo/b", Some("spec.subjects[0].user"), last, "");
    }
    let eight = status_of(&binding(7), "ServiceRoleBinding photo/b").problem.expect("a problem");
    assert!(eight.matches("; ").count() >= 7 && !eight.contains(" more"), "{eight}");
}
