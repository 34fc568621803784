//! Objects that cannot be used: which field is named, and what is denied in their place.

use proptest::prelude::*;

use super::*;

/// The object is refused for `field`.
#[track_caller]
fn bad(object: &str, field: &str) {
    let (_, refused) = load(object);
    assert_eq!(refused, [field], "{object}");
}

#[test]
fn bad_authentication_policies_name_their_field() {
    // policy A-1 to A-3, G-24, 0-3, 0-4
    for (object, field) in [
        ("Policy photo/p: {peers: [{mtls: {}}]}", "metadata.name"),
        ("Policy photo/default: {targets: [{name: a}]}", "spec.targets"),
        ("MeshPolicy mesh: {peers: [{mtls: {}}]}", "metadata.name"),
        ("MeshPolicy default: {targets: [{name: a}]}", "spec.targets"),
        ("Policy photo/default: null", "spec"),
        ("Policy photo/default: []", "spec"),
        ("Policy photo/default: {peers: {mtls: {}}}", "spec.peers"),
        ("Policy photo/default: {peers: [{}]}", "spec.peers[0]"),
        ("Policy photo/default: {peers: [null]}", "spec.peers[0]"),
        ("Policy photo/default: {peers: [mtls]}", "spec.peers[0]"),
        ("Policy photo/default: {peers: [{mTls: {}}]}", "spec.peers[0].mTls"),
        ("Policy photo/default: {peers: [{MTLS: {}}]}", "spec.peers[0].MTLS"),
        ("Policy photo/default: {peers: [{mtls: {}, mTLS: {}}]}", "spec.peers[0]"),
        ("Policy photo/default: {peers: [{jwt: {issuer: a}}]}", "spec.peers[0].jwt"),
        ("Policy photo/default: {peers: [{mtls: {}, jwt: null}]}", "spec.peers[0].jwt"),
        ("Policy photo/default: {peers: [{mtls: STRICT}]}", "spec.peers[0].mtls"),
        ("Policy photo/default: {peers: [{mtls: []}]}", "spec.peers[0].mtls"),
        ("Policy photo/default: {peers: [{mtls: {mode: strict}}]}", "spec.peers[0].mtls.mode"),
        ("Policy photo/default: {peers: [{mtls: {mode: \"“STRICT”\"}}]}", "spec.peers[0].mtls.mode"),
        ("Policy photo/default: {peers: [{mtls: {mode: DISABLE}}]}", "spec.peers[0].mtls.mode"),
        ("Policy photo/default: {peers: [{mtls: {modes: STRICT}}]}", "spec.peers[0].mtls.modes"),
        ("Policy photo/default: {peers: [{mtls: {allowTls: yes please}}]}", "spec.peers[0].mtls.allowTls"),
        (
            "Policy photo/default: {peers: [{mtls: {allowTls: true, allow_tls: true}}]}",
            "spec.peers[0].mtls.allow_tls",
        ),
        ("Policy photo/default: {peers: [{mtls: {}}, {}]}", "spec.peers[1]"),
        ("Policy photo/default: {peer: [{mtls: {}}]}", "spec.peer"),
        ("Policy photo/default: {peers: [{mtls: }], peerIsOptional: 1}", "spec.peerIsOptional"),
        ("Policy photo/default: {peers: [{mtls: }], principalBinding: USE_BOTH}", "spec.principalBinding"),
        ("Policy photo/p: {targets: [{}]}", "spec.targets[0]"),
        ("Policy photo/p: {targets: [{name: a.b}]}", "spec.targets[0].name"),
        ("Policy photo/p: {targets: [{name: backend.photo.svc.cluster.local}]}", "spec.targets[0].name"),
        ("Policy photo/p: {targets: [{name: \"*\"}]}", "spec.targets[0].name"),
        ("Policy photo/p: {targets: [{name: Backend}]}", "spec.targets[0].name"),
        ("Policy photo/p: {targets: [{name: a, port: 80}]}", "spec.targets[0].port"),
        ("Policy photo/p: {targets: [{name: a, ports: [{}]}]}", "spec.targets[0].ports[0]"),
        ("Policy photo/p: {targets: [{name: a, ports: [80]}]}", "spec.targets[0].ports[0]"),
        ("Policy photo/p: {targets: [{name: a, ports: [{number: 0}]}]}", "spec.targets[0].ports[0].number"),
        (
            "Policy photo/p: {targets: [{name: a, ports: [{number: 65536}]}]}",
            "spec.targets[0].ports[0].number",
        ),
        (
            "Policy photo/p: {targets: [{name: a, ports: [{number: http}]}]}",
            "spec.targets[0].ports[0].number",
        ),
        ("Policy photo/p: {targets: [{name: a, ports: [{name: HTTP}]}]}", "spec.targets[0].ports[0].name"),
        ("Policy photo/p: {targets: [{name: a, ports: [{name: a, number: 1}]}]}", "spec.targets[0].ports[0]"),
        ("Policy photo/p: {targets: [{name: a, labels: [x]}]}", "spec.targets[0].labels"),
    ] {
        bad(object, field);
    }
}

#[test]
fn bad_tokens_name_their_field() {
    // policy A-3.6 to A-3.11
    for (origins, field) in [
        ("[{}]", "origins[0]"),
        ("[null]", "origins[0]"),
        ("[{jwt: null}]", "origins[0]"),
        ("[{jwt: {}}]", "origins[0].jwt"),
        ("[{jwt: {issuer: \"\"}}]", "origins[0].jwt.issuer"),
        ("[{jwt: {issuer: a, audiences: [\"\"]}}]", "origins[0].jwt.audiences[0]"),
        ("[{jwt: {issuer: a, audiences: b}}]", "origins[0].jwt.audiences"),
        ("[{jwt: {issuer: a, jwtHeaders: [\"\"]}}]", "origins[0].jwt.jwtHeaders[0]"),
        ("[{jwt: {issuer: a, jwt_params: [\"\"]}}]", "origins[0].jwt.jwt_params[0]"),
        ("[{jwt: {issuer: a, jwksUri: a.test}}]", "origins[0].jwt.jwksUri"),
        ("[{jwt: {issuer: a, jwksUri: \"ftp://a.test\"}}]", "origins[0].jwt.jwksUri"),
        ("[{jwt: {issuer: a, jwksUri: \"https://\"}}]", "origins[0].jwt.jwksUri"),
        ("[{jwt: {issuer: a, jwks_uri: \"https://a.test:x/\"}}]", "origins[0].jwt.jwks_uri"),
        ("[{jwt: {issuer: a, jwksUri: \"https://a.test\", jwks: \"{}\"}}]", "origins[0].jwt.jwks"),
        ("[{jwt: {issuer: a}}, {jwt: {issuer: a}}]", "origins[1].jwt.issuer"),
        (
            "[{jwt: {issuer: a, triggerRules: [{excludedPaths: [{}]}]}}]",
            "origins[0].jwt.triggerRules[0].excludedPaths[0]",
        ),
        ("[{jwt: {issuer: a, triggerRules: [{paths: []}]}}]", "origins[0].jwt.triggerRules[0].paths"),
        (
            "[{jwt: {issuer: a, trigger_rules: [{includedPaths: [{exact: /a, prefix: /b}]}]}}]",
            "origins[0].jwt.trigger_rules[0].includedPaths[0]",
        ),
        ("[{jwt: {issuer: a, leeway: 5}}]", "origins[0].jwt.leeway"),
        ("[{mtls: {}}]", "origins[0].mtls"),
    ] {
        bad(&format!("Policy photo/default: {{origins: {origins}}}"), &format!("spec.{field}"));
    }
}

#[test]
fn bad_rbac_objects_name_their_field() {
    // policy B-1 to B-3
    for (object, field) in [
        ("ClusterRbacConfig other: {mode: ON}", "metadata.name"),
        ("RbacConfig istio-system/other: {mode: ON}", "metadata.name"),
        ("ClusterRbacConfig default: {mode: 1}", "spec.mode"),
        ("ClusterRbacConfig default: {mode: \"on\"}", "spec.mode"),
        ("ClusterRbacConfig default: {mode: ON_WITH_INCLUSION}", "spec.inclusion"),
        ("ClusterRbacConfig default: {mode: ON_WITH_INCLUSION, inclusion: null}", "spec.inclusion"),
        ("ClusterRbacConfig default: {mode: ON_WITH_EXCLUSION, exclusion: null}", "spec.exclusion"),
        ("ClusterRbacConfig default: {mode: ON_WITH_EXCLUSION, inclusion: {}}", "spec.exclusion"),
        (
            "ClusterRbacConfig default: {mode: ON_WITH_INCLUSION, inclusion: {namespaces: [\"*\"]}}",
            "spec.inclusion.namespaces[0]",
        ),
        (
            "ClusterRbacConfig default: {mode: ON_WITH_INCLUSION, inclusion: {services: [\"a*\"]}}",
            "spec.inclusion.services[0]",
        ),
        (
            "ClusterRbacConfig default: {mode: ON_WITH_INCLUSION, inclusion: {namespace: [a]}}",
            "spec.inclusion.namespace",
        ),
        ("ClusterRbacConfig default: {modes: ON}", "spec.modes"),
        ("ClusterRbacConfig default: {mode: ON, enforcementMode: LOG}", "spec.enforcementMode"),
        ("ServiceRole photo/r: {}", "spec.rules"),
        ("ServiceRole photo/r: {rules: []}", "spec.rules"),
        ("ServiceRole photo/r: {rules: [null]}", "spec.rules[0]"),
        ("ServiceRole photo/r: {rules: [{service: [\"*\"]}]}", "spec.rules[0].service"),
        ("ServiceRole photo/r: {rules: [{services: \"*\"}]}", "spec.rules[0].services"),
        ("ServiceRole photo/r: {rules: [{services: [\"\"]}]}", "spec.rules[0].services[0]"),
        ("ServiceRole photo/r: {rules: [{services: [1]}]}", "spec.rules[0].services[0]"),
        ("ServiceRole photo/r: {rules: [{methods: [GET], notMethods: [PUT]}]}", "spec.rules[0]"),
        ("ServiceRole photo/r: {rules: [{ports: [1], notPorts: [2]}]}", "spec.rules[0]"),
        ("ServiceRole photo/r: {rules: [{ports: [65536]}]}", "spec.rules[0].ports[0]"),
        ("ServiceRole photo/r: {rules: [{ports: [-1]}]}", "spec.rules[0].ports[0]"),
        ("ServiceRole photo/r: {rules: [{notPorts: [http]}]}", "spec.rules[0].notPorts[0]"),
        ("ServiceRole photo/r: {rules: [{constraints: [{values: [a]}]}]}", "spec.rules[0].constraints[0]"),
        (
            "ServiceRole photo/r: {rules: [{constraints: [{key: \"\", values: [a]}]}]}",
            "spec.rules[0].constraints[0].key",
        ),
        (
            "ServiceRole photo/r: {rules: [{constraints: [{key: destination.ip}]}]}",
            "spec.rules[0].constraints[0].values",
        ),
        (
            "ServiceRole photo/r: {rules: [{constraints: [{key: destination.ip, values: []}]}]}",
            "spec.rules[0].constraints[0].values",
        ),
        (
            "ServiceRole photo/r: {rules: [{constraints: [{key: destination.port, values: [80]}]}]}",
            "spec.rules[0].constraints[0].values[0]",
        ),
        (
            "ServiceRole photo/r: {rules: [{ports: [1], constraints: [{key: destination.port, values: [\"1\"]}]}]}",
            "spec.rules[0].constraints[0].key",
        ),
        ("ServiceRole photo/r: {rules: [{constraints: {destination.ip: [a]}}]}", "spec.rules[0].constraints"),
    ] {
        bad(object, field);
    }
}

#[test]
fn bad_bindings_name_their_field() {
    // policy B-3
    let reference = "roleRef: {kind: ServiceRole, name: r}";
    for (spec, field) in [
        (format!("{{{reference}}}"), "spec.subjects"),
        (format!("{{subjects: [], {reference}}}"), "spec.subjects"),
        (format!("{{subjects: [{{}}], {reference}}}"), "spec.subjects[0]"),
        (format!("{{subjects: [{{user: \"\"}}], {reference}}}"), "spec.subjects[0].user"),
        (format!("{{subjects: [{{user: [a]}}], {reference}}}"), "spec.subjects[0].user"),
        (format!("{{subjects: [{{users: [a]}}], {reference}}}"), "spec.subjects[0].users"),
        (format!("{{subjects: [{{names: [\"*\"]}}], {reference}}}"), "spec.subjects[0].names[0]"),
        (format!("{{subjects: [{{notNames: [a, \"*\"]}}], {reference}}}"), "spec.subjects[0].notNames[1]"),
        (
            format!("{{subjects: [{{properties: {{source.ip: \"\"}}}}], {reference}}}"),
            "spec.subjects[0].properties[source.ip]",
        ),
        (format!("{{subjects: [{{properties: source.ip}}], {reference}}}"), "spec.subjects[0].properties"),
        (
            format!("{{subjects: [{{properties: [source.ip]}}], {reference}}}"),
            "spec.subjects[0].properties[0]",
        ),
        (format!("{{subjects: [{{properties: {{}}}}], {reference}}}"), "spec.subjects[0]"),
        (
            format!("{{subjects: [{{names: [a/b], properties: {{source.principal: x}}}}], {reference}}}"),
            "spec.subjects[0].properties[source.principal]",
        ),
        (
            format!(
                "{{subjects: [{{notNamespaces: [a], properties: {{source.namespace: x}}}}], {reference}}}"
            ),
            "spec.subjects[0].properties[source.namespace]",
        ),
        (
            format!("{{subjects: [{{ips: [1.1.1.1], properties: {{source.ip: 1.1.1.1}}}}], {reference}}}"),
            "spec.subjects[0].properties[source.ip]",
        ),
        (
            format!(
                "{{subjects: [{{groups: [a], properties: {{\"request.auth.claims[groups]\": a}}}}], {reference}}}"
            ),
            "spec.subjects[0].properties[request.auth.claims[groups]]",
        ),
        ("{subjects: [{user: \"*\"}]}".to_owned(), "spec.roleRef"),
        ("{subjects: [{user: \"*\"}], roleRef: {name: r}}".to_owned(), "spec.roleRef.kind"),
        ("{subjects: [{user: \"*\"}], roleRef: {kind: Role, name: r}}".to_owned(), "spec.roleRef.kind"),
        ("{subjects: [{user: \"*\"}], roleRef: {kind: ServiceRole}}".to_owned(), "spec.roleRef.name"),
        (
            "{subjects: [{user: \"*\"}], roleRef: {kind: ServiceRole, name: \"\"}}".to_owned(),
            "spec.roleRef.name",
        ),
        (
            "{subjects: [{user: \"*\"}], roleRef: {kind: ServiceRole, name: r, namespace: n}}".to_owned(),
            "spec.roleRef.namespace",
        ),
        ("{subjects: [{user: \"*\"}], role: r}".to_owned(), "spec.role"),
        ("{subjects: [{user: \"*\"}], actions: [{}]}".to_owned(), "spec.actions"),
        (format!("{{subjects: [{{user: \"*\"}}], mode: SILENT, {reference}}}"), "spec.mode"),
    ] {
        bad(&format!("ServiceRoleBinding photo/b: {spec}"), field);
    }
}

#[test]
fn bad_objects_of_the_current_api_name_their_field() {
    // policy F
    for (object, field) in [
        ("PeerAuthentication photo/p: {mtls: {mode: strict}}", "spec.mtls.mode"),
        ("PeerAuthentication photo/p: {mtls: STRICT}", "spec.mtls"),
        ("PeerAuthentication photo/p: {mTLS: {mode: STRICT}}", "spec.mTLS"),
        ("PeerAuthentication photo/p: {portLevelMtls: {80: {mode: STRICT}}}", "spec.portLevelMtls"),
        (
            "PeerAuthentication photo/p: {selector: {matchLabels: {a: b}}, portLevelMtls: {0: {}}}",
            "spec.portLevelMtls[0]",
        ),
        (
            "PeerAuthentication photo/p: {selector: {matchLabels: {a: b}}, portLevelMtls: {http: {}}}",
            "spec.portLevelMtls[http]",
        ),
        (
            "PeerAuthentication photo/p: {selector: {matchLabels: {a: b}}, portLevelMtls: {80: STRICT}}",
            "spec.portLevelMtls[80]",
        ),
        ("PeerAuthentication photo/p: {selector: {app: a}}", "spec.selector.app"),
        ("PeerAuthentication photo/p: {selector: {matchLabels: [a]}}", "spec.selector.matchLabels"),
        ("PeerAuthentication photo/p: {selector: {matchLabels: {a: 1}}}", "spec.selector.matchLabels.a"),
        ("PeerAuthentication photo/p: {selector: {matchLabels: {a: \"*\"}}}", "spec.selector"),
        ("AuthorizationPolicy photo/a: {action: deny}", "spec.action"),
        ("AuthorizationPolicy photo/a: {action: CUSTOM, rules: [{}]}", "spec.provider"),
        ("AuthorizationPolicy photo/a: {action: DENY, provider: {name: x}}", "spec.provider"),
        ("AuthorizationPolicy photo/a: {targetRef: {kind: Service, name: x}}", "spec.targetRef"),
        ("AuthorizationPolicy photo/a: {targetRefs: [{kind: Gateway, name: x}]}", "spec.targetRefs"),
        ("AuthorizationPolicy photo/a: {rules: {}}", "spec.rules"),
        ("AuthorizationPolicy photo/a: {rules: [null]}", "spec.rules[0]"),
        ("AuthorizationPolicy photo/a: {rules: [{from: []}]}", "spec.rules[0].from"),
        ("AuthorizationPolicy photo/a: {rules: [{from: [{}]}]}", "spec.rules[0].from[0]"),
        ("AuthorizationPolicy photo/a: {rules: [{from: [{source: {}}]}]}", "spec.rules[0].from[0].source"),
        (
            "AuthorizationPolicy photo/a: {rules: [{from: [{source: {principals: []}}]}]}",
            "spec.rules[0].from[0].source",
        ),
        (
            "AuthorizationPolicy photo/a: {rules: [{from: [{source: {principal: [a]}}]}]}",
            "spec.rules[0].from[0].source.principal",
        ),
        (
            "AuthorizationPolicy photo/a: {rules: [{from: [{source: {principals: [\"\"]}}]}]}",
            "spec.rules[0].from[0].source.principals[0]",
        ),
        (
            "AuthorizationPolicy photo/a: {rules: [{from: [{principals: [a]}]}]}",
            "spec.rules[0].from[0].principals",
        ),
        ("AuthorizationPolicy photo/a: {rules: [{to: []}]}", "spec.rules[0].to"),
        ("AuthorizationPolicy photo/a: {rules: [{to: [{operation: {}}]}]}", "spec.rules[0].to[0].operation"),
        (
            "AuthorizationPolicy photo/a: {rules: [{to: [{operation: {ports: [80]}}]}]}",
            "spec.rules[0].to[0].operation.ports[0]",
        ),
        (
            "AuthorizationPolicy photo/a: {rules: [{to: [{operation: {ports: \"80\"}}]}]}",
            "spec.rules[0].to[0].operation.ports",
        ),
        (
            "AuthorizationPolicy photo/a: {rules: [{to: [{operation: {method: [GET]}}]}]}",
            "spec.rules[0].to[0].operation.method",
        ),
        ("AuthorizationPolicy photo/a: {rules: [{when: [{values: [a]}]}]}", "spec.rules[0].when[0]"),
        ("AuthorizationPolicy photo/a: {rules: [{when: [{key: source.ip}]}]}", "spec.rules[0].when[0]"),
        (
            "AuthorizationPolicy photo/a: {rules: [{when: [{key: source.ip, value: [a]}]}]}",
            "spec.rules[0].when[0].value",
        ),
        (
            "AuthorizationPolicy photo/a: {rules: [{form: [{source: {namespaces: [a]}}]}]}",
            "spec.rules[0].form",
        ),
        ("AuthorizationPolicy photo/a: {rule: [{}]}", "spec.rule"),
        ("RequestAuthentication photo/r: {jwtRules: [{}]}", "spec.jwtRules[0]"),
        ("RequestAuthentication photo/r: {jwtRules: [{issuer: \"\"}]}", "spec.jwtRules[0].issuer"),
        (
            "RequestAuthentication photo/r: {jwtRules: [{issuer: a, audience: [b]}]}",
            "spec.jwtRules[0].audience",
        ),
        ("RequestAuthentication photo/r: {rules: []}", "spec.rules"),
        ("DestinationRule photo/d: {}", "spec.host"),
        (
            "DestinationRule photo/d: {host: a, trafficPolicy: {tls: {mode: OFF}}}",
            "spec.trafficPolicy.tls.mode",
        ),
        ("AuthorizationPolicy@rbac.istio.io/v1alpha1 photo/a: {allow: []}", "apiVersion"),
        ("AuthorizationPolicy@security.istio.io/v2 photo/a: {}", "apiVersion"),
        ("Policy@authentication.istio.io/v1beta1 photo/default: {}", "apiVersion"),
        ("Surprise@security.istio.io/v1 photo/a: {}", "apiVersion"),
    ] {
        bad(object, field);
    }
}

#[test]
fn a_misspelled_spec_is_no_empty_one() {
    let mut object = read_objects("Policy photo/default: {}").remove(0);
    object.extra.insert("sepc".to_owned(), json!({"peers": [{"mtls": {}}]}));
    assert_eq!(PolicyObjects::new().insert(&object).expect_err("refused").field, "sepc");
}

#[test]
fn policy_groups_are_handled_and_no_others() {
    for (version, kind, expected) in [
        ("authentication.istio.io/v1alpha1", "Policy", true),
        ("rbac.istio.io/v1alpha1", "ServiceRole", true),
        ("rbac.istio.io/v1alpha1", "AuthorizationPolicy", true),
        ("security.istio.io/v1beta1", "PeerAuthentication", true),
        ("security.istio.io/v7", "Whatever", true),
        ("networking.istio.io/v1alpha3", "DestinationRule", true),
        ("networking.istio.io/v1alpha3", "VirtualService", false),
        ("rbac.authorization.k8s.io/v1", "Role", false),
        ("v1", "Service", false),
        ("security.istio.io", "PeerAuthentication", false),
        ("culvert.io/v1alpha1", "Workload", false),
    ] {
        assert_eq!(PolicyObjects::handles(version, kind), expected, "{version} {kind}");
    }
}

const BACKEND: &str = "photo/frontend tunnel > photo/backend:8080";
const ADMIN: &str = "photo/frontend tunnel > photo/backend:9000";
const FRONT: &str = "photo/backend tunnel > photo/frontend:8080";
const DB: &str = "photo/backend tunnel > datastore/db:5432";
const UNUSABLE: &str = "deny policy_unusable";

/// What a refused object without a last good version denies: to the backend, its admin port, the frontend, the db.
#[track_caller]
fn closes(objects: &str, expected: [&str; 4]) {
    check_each(
        objects,
        &[(BACKEND, expected[0]), (ADMIN, expected[1]), (FRONT, expected[2]), (DB, expected[3])],
    );
}

#[test]
fn a_refused_object_denies_what_it_targets() {
    // policy A-3, T-19
    const NO: &str = UNUSABLE;
    for (objects, expected) in [
        // Targets that can be read.
        ("Policy photo/p: {targets: [{name: backend}], peers: [{}]}", [NO, NO, "allow", "allow"]),
        (
            "Policy photo/p: {targets: [{name: backend, ports: [{number: 80}]}], peers: [{}]}",
            [NO, "allow", "allow", "allow"],
        ),
        ("Policy photo/default: {peers: [{}]}", [NO, NO, NO, "allow"]),
        ("MeshPolicy default: {peers: [{}]}", [NO, NO, NO, NO]),
        ("MeshPolicy mesh: {peers: [{mtls: {}}]}", [NO, NO, NO, NO]),
        (
            "PeerAuthentication photo/p: {selector: {matchLabels: {app: backend}}, mtls: {mode: x}}",
            [NO, NO, "allow", "allow"],
        ),
        ("PeerAuthentication photo/p: {mtls: {mode: x}}", [NO, NO, NO, "allow"]),
        ("PeerAuthentication istio-system/p: {mtls: {mode: x}}", [NO, NO, NO, NO]),
        (
            "AuthorizationPolicy photo/p: {action: DENY, selector: {matchLabels: {app: backend}}, rules: [{x: 1}]}",
            [NO, NO, "allow", "allow"],
        ),
        ("AuthorizationPolicy photo/p: {action: nope}", [NO, NO, NO, "allow"]),
        ("AuthorizationPolicy istio-system/p: {action: DENY, rules: [{x: 1}]}", [NO, NO, NO, NO]),
        // Targets that cannot: the whole namespace.
        ("Policy photo/p: {targets: [{name: a.b}]}", [NO, NO, NO, "allow"]),
        ("Policy photo/p: {targets: backend}", [NO, NO, NO, "allow"]),
        ("Policy photo/p: {target: [{name: backend}], peers: []}", [NO, NO, NO, "allow"]),
        ("PeerAuthentication photo/p: {selector: {app: backend}}", [NO, NO, NO, "allow"]),
        ("AuthorizationPolicy photo/p: {action: DENY, selector: 7}", [NO, NO, NO, "allow"]),
        (
            "AuthorizationPolicy photo/p: {targetRefs: [{kind: Service, name: backend}], action: DENY}",
            [NO, NO, NO, "allow"],
        ),
        ("Surprise@security.istio.io/v1 photo/a: {}", [NO, NO, NO, "allow"]),
        ("AuthorizationPolicy@rbac.istio.io/v1alpha1 photo/a: {}", [NO, NO, NO, "allow"]),
        // Only HTTP ports have tokens.
        ("RequestAuthentication photo/r: {jwtRules: [{}]}", [NO, "allow", NO, "allow"]),
        // The switch of RBAC: the whole mesh.
        ("ClusterRbacConfig default: {mode: x}", [NO, NO, NO, NO]),
        ("ClusterRbacConfig other: {mode: ON}", [NO, NO, NO, NO]),
        ("RbacConfig istio-system/default: {mode: x}", [NO, NO, NO, NO]),
        ("RbacConfig photo/other: {mode: ON}", [NO, NO, NO, "allow"]),
        // Nothing is lost where an object could only have granted, or is not enforced anyway.
        ("ServiceRole photo/r: {}", ["allow"; 4]),
        ("ServiceRoleBinding photo/b: {}", ["allow"; 4]),
        ("DestinationRule photo/d: {}", ["allow"; 4]),
        ("AuthorizationPolicy photo/p: {action: AUDIT, rules: [{x: 1}]}", ["allow"; 4]),
        ("AuthorizationPolicy photo/p!dry-run: {action: DENY, rules: [{x: 1}]}", ["allow"; 4]),
        ("AuthorizationPolicy photo/p: {targetRefs: [{kind: Gateway, name: g}], action: DENY}", ["allow"; 4]),
    ] {
        closes(objects, expected);
    }
}

#[test]
fn a_refused_object_takes_the_rank_that_a_good_one_would_have() {
    // policy A-4, F-1
    let shielded = "Policy photo/default: {peers: [{mtls: {}}]}\nMeshPolicy default: {peers: [{}]}";
    closes(shielded, ["allow", "allow", "allow", UNUSABLE]);
    let misnamed = "Policy photo/stray: {peers: [{mtls: {}}]}\nPolicy photo/default: {peers: [{mtls: {}}]}";
    closes(misnamed, ["allow"; 4]);
    let younger = "Policy photo/a@2018-01-01T00:00:00Z: {targets: [{name: backend}]}\nPolicy photo/b@2019-01-01T00:00:00Z: {targets: [{name: backend}], peers: [{}]}";
    closes(younger, ["allow"; 4]);
    let older = younger.replace("2019", "2017");
    closes(&older, [UNUSABLE, UNUSABLE, "allow", "allow"]);
    let closer = "PeerAuthentication photo/a: {selector: {matchLabels: {app: backend}}, mtls: {mode: STRICT}}\nPeerAuthentication photo/b: {mtls: {mode: x}}";
    closes(closer, ["allow", "allow", UNUSABLE, "allow"]);
    closes(
        "ClusterRbacConfig default: {mode: OFF}\nRbacConfig istio-system/default: {mode: x}",
        ["allow"; 4],
    );
    closes("ClusterRbacConfig default: {mode: OFF}\nClusterRbacConfig other: {mode: ON}", ["allow"; 4]);
}

#[test]
fn a_refused_allow_can_be_made_good_by_another_and_a_refused_deny_cannot() {
    // policy F-3: an ALLOW only ever grants, once there is one.
    let good = "AuthorizationPolicy photo/good: {rules: [{}]}";
    let allow = "AuthorizationPolicy photo/p: {rules: [{x: 1}]}";
    closes(allow, [UNUSABLE, UNUSABLE, UNUSABLE, "allow"]);
    closes(&format!("{allow}\n{good}"), ["allow"; 4]);
    for deny in ["action: DENY, ", "action: deny, ", "aktion: DENY, "] {
        let objects = format!("AuthorizationPolicy photo/p: {{{deny}rules: [{{x: 1}}]}}\n{good}");
        closes(&objects, [UNUSABLE, UNUSABLE, UNUSABLE, "allow"]);
    }
    // It does not bring RBAC back, which would grant by other rules.
    let rbac = "ClusterRbacConfig default: {mode: OFF}";
    closes(&format!("{allow}\n{rbac}"), [UNUSABLE, UNUSABLE, UNUSABLE, "allow"]);
}

#[test]
fn the_last_good_version_stays_in_force() {
    // policy A-3
    let strict = "MeshPolicy default: {peers: [{mtls: {}}]}\nMeshPolicy default: {peers: [{}]}";
    check_each(
        strict,
        &[(BACKEND, "allow"), ("plain > photo/backend:8080", "deny plaintext_refused MeshPolicy/default")],
    );
    let deny = "AuthorizationPolicy photo/a: {action: DENY, rules: [{from: [{source: {namespaces: [photo]}}]}]}\nAuthorizationPolicy photo/a: {action: nope}";
    check_each(deny, &[(BACKEND, "deny denied_by_rule"), ("shop/cart tunnel > photo/backend:8080", "allow")]);
    let mended = format!("{deny}\nAuthorizationPolicy photo/a: {{rules: [{{}}]}}");
    check(&mended, BACKEND, "allow AuthorizationPolicy/photo/a rules[0]");
}

#[test]
fn a_removed_object_is_gone_in_whatever_state() {
    let world = World::default();
    for text in ["MeshPolicy default: {peers: [{mtls: {}}]}", "MeshPolicy default: {peers: [{}]}"] {
        let (mut objects, _) = load(text);
        objects.remove("MeshPolicy", &ObjectName::new("", "default"));
        let compiled = world.compile(&objects);
        assert_eq!(verdict(&compiled, &world.facts("plain > photo/backend:8080")), "allow");
        assert_eq!(compiled.statuses(), []);
    }
}

/// Values that look like a policy's as often as not.
fn values() -> impl Strategy<Value = Value> {
    let names = prop::sample::select(vec![
        "peers",
        "mtls",
        "mode",
        "targets",
        "name",
        "ports",
        "origins",
        "jwt",
        "issuer",
        "rules",
        "from",
        "source",
        "principals",
        "to",
        "operation",
        "when",
        "key",
        "values",
        "selector",
        "matchLabels",
        "action",
        "services",
        "constraints",
        "subjects",
        "user",
        "properties",
        "roleRef",
        "kind",
        "inclusion",
        "portLevelMtls",
    ]);
    let words = prop::sample::select(vec![
        "*",
        "STRICT",
        "DENY",
        "ON",
        "a",
        "",
        "destination.port",
        "source.ip",
        "10.0.0.0/8",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u16>().prop_map(Value::from),
        words.prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::vec((names.clone(), inner), 0..4)
                .prop_map(|pairs| pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    })
}

proptest! {
    /// Whatever an object says, it is read or refused by field; and an object of an AuthorizationPolicy's or a
    /// PeerAuthentication's kind that is refused never lets anyone in whom its absence would have kept out.
    #[test]
    fn no_object_brings_the_reader_down_or_opens_by_being_refused(spec in values(), kind in 0..8_usize) {
        let kinds = [
            "Policy photo/default", "MeshPolicy default", "ClusterRbacConfig default", "ServiceRole photo/r",
            "ServiceRoleBinding photo/b", "PeerAuthentication photo/p", "AuthorizationPolicy photo/p",
            "RequestAuthentication photo/r",
        ];
        let base = "ClusterRbacConfig default: {mode: ON}\nMeshPolicy default: {peers: [{mtls: {}}]}";
        let world = World::default();
        let (mut objects, _) = load(base);
        let facts = [world.facts("plain > photo/backend:8080"), world.facts(BACKEND), world.facts(DB)];
        let before = world.compile(&objects);
        let object = read_objects(&format!("{}: {spec}", kinds[kind])).remove(0);
        if let Err(invalid) = objects.insert(&object) {
            prop_assert!(!invalid.field.is_empty() && !invalid.expected.is_empty() && !invalid.remedy.is_empty());
            let after = world.compile(&objects);
            for facts in &facts {
                prop_assert!(before.authorise(facts).is_ok() || after.authorise(facts).is_err());
            }
        }
    }
}
