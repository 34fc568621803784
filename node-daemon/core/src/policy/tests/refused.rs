//! Objects that cannot be used: what is denied in their place.

use proptest::prelude::*;

use super::*;

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
