//! AuthorizationPolicy on layer 4.

use super::*;

const FRONTEND: &str = "photo/frontend tunnel > photo/backend:8080";
const PLAIN: &str = "plain > photo/backend:8080";
const YES: &str = "allow AuthorizationPolicy/photo/a rules[0]";
const NO: &str = "deny no_rule_allows AuthorizationPolicy/photo/a";
const DENIED: &str = "deny denied_by_rule AuthorizationPolicy/photo/a rules[0]";

/// One rule, as ALLOW and as DENY: the verdicts must be opposite, except where something cannot be judged.
#[track_caller]
fn both(rule: &str, connection: &str, allow: &str, deny: &str) {
    check(&format!("AuthorizationPolicy photo/a: {{rules: [{rule}]}}"), connection, allow);
    check(&format!("AuthorizationPolicy photo/a: {{action: DENY, rules: [{rule}]}}"), connection, deny);
    check(
        &format!("AuthorizationPolicy photo/a: {{action: CUSTOM, provider: {{name: x}}, rules: [{rule}]}}"),
        connection,
        deny,
    );
}

#[track_caller]
fn matches(rule: &str, connection: &str) {
    both(rule, connection, YES, DENIED);
}

#[track_caller]
fn misses(rule: &str, connection: &str) {
    both(rule, connection, NO, "allow");
}

/// Never grants, always denies.
#[track_caller]
fn closed(rule: &str, connection: &str) {
    both(rule, connection, NO, DENIED);
}

#[test]
fn without_rules_allow_denies_all_and_deny_denies_nobody() {
    // policy F-3
    for spec in ["{}", "{rules: []}", "{rules: null}", "null", "{action: ALLOW}", "{selector: {}}"] {
        check(&format!("AuthorizationPolicy photo/a: {spec}"), FRONTEND, NO);
    }
    check("AuthorizationPolicy photo/a: {action: DENY}", FRONTEND, "allow");
    matches("{}", FRONTEND);
    matches("{}", PLAIN);
}

#[test]
fn sources_are_compared_by_identity() {
    // policy F-3
    for source in [
        "principals: [cluster.local/ns/photo/sa/frontend]",
        "principals: [\"cluster.local/ns/photo/*\"]",
        "principals: [\"*/sa/frontend\"]",
        "principals: [x, \"*\"]",
        "namespaces: [photo]",
        "namespaces: [\"ph*\"]",
        "namespaces: [\"*oto\"]",
        "namespaces: [\"*\"]",
        "serviceAccounts: [frontend]",
        "serviceAccounts: [photo/frontend]",
        "service_accounts: [\"photo/*\"]",
        "serviceAccounts: [\"*\"]",
        "trustDomains: [cluster.local]",
        "trustDomains: [\"*.local\"]",
        "notPrincipals: [\"*/sa/other\"]",
        "not_namespaces: [shop]",
        "notServiceAccounts: [backend]",
        "notTrustDomains: [old.local]",
        "principals: [\"*\"], notPrincipals: [\"*/sa/other\"], namespaces: [photo]",
    ] {
        matches(&format!("{{from: [{{source: {{{source}}}}}]}}"), FRONTEND);
        if !source.starts_with("not") {
            misses(&format!("{{from: [{{source: {{{source}}}}}]}}"), PLAIN);
        }
    }
    for source in [
        "principals: [frontend]",
        "principals: [spiffe://cluster.local/ns/photo/sa/frontend]",
        "principals: [cluster.local/ns/photo/sa/backend]",
        "principals: [\"*photo*\"]",
        "namespaces: [phot]",
        "namespaces: [\"p*o\"]",
        "serviceAccounts: [backend]",
        "serviceAccounts: [shop/frontend]",
        "serviceAccounts: [photo/frontend/x]",
        "trustDomains: [local]",
        "trustDomains: [old.local]",
        "notPrincipals: [\"*\"]",
        "notPrincipals: [\"*/sa/frontend\"]",
        "notNamespaces: [photo]",
        "notServiceAccounts: [frontend]",
        "notTrustDomains: [cluster.local]",
        "principals: [\"*\"], namespaces: [shop]",
        "principals: [\"*\"], notNamespaces: [\"*\"]",
    ] {
        misses(&format!("{{from: [{{source: {{{source}}}}}]}}"), FRONTEND);
    }
}

#[test]
fn an_account_without_namespace_is_of_the_policy_s_own() {
    let rule = "{rules: [{from: [{source: {serviceAccounts: [frontend]}}]}]}";
    check(&format!("AuthorizationPolicy istio-system/a: {rule}"), FRONTEND, "deny no_rule_allows");
    check(
        &format!("AuthorizationPolicy istio-system/a: {rule}"),
        "istio-system/frontend tunnel > photo/backend:8080",
        "allow",
    );
}

#[test]
fn addresses_and_ports_are_compared() {
    for rule in [
        "{from: [{source: {ipBlocks: [10.8.0.0/16]}}]}",
        "{from: [{source: {ip_blocks: [10.8.9.9]}}]}",
        "{from: [{source: {notIpBlocks: [10.9.0.0/16]}}]}",
        "{to: [{operation: {ports: [\"8080\"]}}]}",
        "{to: [{operation: {notPorts: [\"1\"]}}]}",
        "{to: [{operation: {ports: [\"1\"]}}, {operation: {ports: [\"8080\"]}}]}",
        "{from: [{source: {ipBlocks: [1.1.1.1]}}, {source: {namespaces: [photo]}}], to: [{operation: {ports: [\"8080\"]}}]}",
    ] {
        matches(rule, FRONTEND);
    }
    for rule in [
        "{from: [{source: {ipBlocks: [10.9.0.0/16, \"fd00::/8\"]}}]}",
        "{from: [{source: {notIpBlocks: [10.8.9.9]}}]}",
        "{to: [{operation: {ports: [\"80\"]}}]}",
        "{to: [{operation: {notPorts: [\"8080\"]}}]}",
        "{from: [{source: {namespaces: [photo]}}], to: [{operation: {ports: [\"1\"]}}]}",
        "{from: [{source: {namespaces: [shop]}}], to: [{operation: {ports: [\"8080\"]}}]}",
        "{to: [{operation: {ports: [\"8080\"]}}], when: [{key: source.ip, values: [1.1.1.1]}]}",
    ] {
        misses(rule, FRONTEND);
    }
    matches("{from: [{source: {ipBlocks: [10.1.1.1]}}]}", "plain > photo/backend:8080 from ::ffff:10.1.1.1");
    matches(
        "{from: [{source: {ipBlocks: [\"::ffff:10.1.1.0/120\"]}}]}",
        "plain > photo/backend:8080 from 10.1.1.1",
    );
    matches("{from: [{source: {ipBlocks: [\"fd00::/8\"]}}]}", "plain > photo/backend:8080 from fd00::1");
}

#[test]
fn conditions_compare_values_and_not_values() {
    // policy F-3
    for condition in [
        "{key: source.ip, values: [10.8.0.0/16]}",
        "{key: source.ip, notValues: [1.1.1.1]}",
        "{key: source.ip, not_values: [1.1.1.1]}",
        "{key: source.namespace, values: [photo]}",
        "{key: source.principal, values: [\"*/sa/frontend\"]}",
        "{key: source.serviceAccount, values: [photo/frontend]}",
        "{key: source.trustDomain, values: [cluster.local]}",
        "{key: destination.ip, values: [10.8.1.3]}",
        "{key: destination.port, values: [\"8080\"]}",
        "{key: destination.port, values: [\"8080\", \"1\"], notValues: [\"1\"]}",
        "{key: connection.sni, notValues: [x]}",
    ] {
        matches(&format!("{{when: [{condition}]}}"), FRONTEND);
    }
    for condition in [
        "{key: source.ip, values: [1.1.1.1]}",
        "{key: source.namespace, notValues: [photo]}",
        "{key: source.principal, values: [frontend]}",
        "{key: source.serviceAccount, values: [backend]}",
        "{key: source.trustDomain, values: [old.local]}",
        "{key: destination.ip, values: [10.8.9.9]}",
        "{key: destination.port, values: [\"80\"]}",
        "{key: destination.port, values: [\"8080\"], notValues: [\"8080\"]}",
        "{key: connection.sni, values: [\"*\"]}",
        "{key: source.ip, values: [10.8.9.9]}, {key: source.namespace, values: [shop]}",
    ] {
        misses(&format!("{{when: [{condition}]}}"), FRONTEND);
    }
    matches(
        "{when: [{key: connection.sni, values: [\"a.*\"]}]}",
        "photo/frontend mesh-tls:a.b > photo/backend:8080",
    );
}

#[test]
fn what_nobody_can_judge_never_grants_and_always_denies() {
    // policy G-3, G-5, G-23
    for rule in [
        "{from: [{source: {ipBlocks: [bad]}}]}",
        "{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}",
        "{from: [{source: {notIpBlocks: [bad]}}]}",
        "{from: [{source: {notIpBlocks: [bad, 1.1.1.1]}}]}",
        "{to: [{operation: {ports: [http]}}]}",
        "{to: [{operation: {ports: [\"65536\"]}}]}",
        "{to: [{operation: {notPorts: [\"-1\"]}}]}",
        "{when: [{key: source.ip, values: [bad]}]}",
        "{when: [{key: destination.port, notValues: [\"x\"]}]}",
        "{when: [{key: made.up, values: [x]}]}",
        "{when: [{key: request.headers, values: [x]}]}",
        "{when: [{key: source.labels, notValues: [x]}]}",
        "{when: [{key: \"experimental.envoy.filters.a[b]\", values: [x]}]}",
    ] {
        closed(rule, FRONTEND);
        closed(rule, PLAIN);
    }
    // A good value grants; in a denial the bad one still counts as met.
    both("{to: [{operation: {ports: [http, \"8080\"]}}]}", FRONTEND, YES, DENIED);
    both("{to: [{operation: {ports: [http, \"1\"]}}]}", FRONTEND, NO, DENIED);
    // The rest of the rule must hold all the same.
    misses("{from: [{source: {namespaces: [shop]}}], when: [{key: made.up, values: [x]}]}", FRONTEND);
}

#[test]
fn request_attributes_never_grant_and_drop_out_of_denials() {
    // policy F-3
    for rule in [
        "{from: [{source: {requestPrincipals: [\"*\"]}}]}",
        "{from: [{source: {notRequestPrincipals: [\"*\"]}}]}",
        "{from: [{source: {namespaces: [photo], requestPrincipals: [x]}}]}",
        "{to: [{operation: {methods: [GET]}}]}",
        "{to: [{operation: {notMethods: [GET]}}]}",
        "{to: [{operation: {paths: [/a]}}]}",
        "{to: [{operation: {notPaths: [/a], ports: [\"8080\"]}}]}",
        "{to: [{operation: {hosts: [a]}}]}",
        "{to: [{operation: {not_hosts: [a]}}]}",
        "{when: [{key: \"request.headers[x]\", values: [\"*\"]}]}",
        "{when: [{key: \"request.auth.claims[a][b]\", values: [x]}]}",
        "{when: [{key: request.auth.principal, values: [x]}]}",
        "{when: [{key: request.auth.audiences, values: [x]}]}",
        "{when: [{key: request.auth.presenter, notValues: [x]}]}",
    ] {
        closed(rule, FRONTEND);
    }
    misses("{from: [{source: {namespaces: [shop], requestPrincipals: [x]}}]}", FRONTEND);
    misses("{to: [{operation: {methods: [GET], ports: [\"1\"]}}]}", FRONTEND);
    // One source that asks for requests makes the whole ALLOW rule unusable.
    both(
        "{from: [{source: {namespaces: [photo]}}, {source: {requestPrincipals: [x]}}]}",
        FRONTEND,
        NO,
        DENIED,
    );
}

#[test]
fn denials_come_before_grants() {
    // policy F-3
    let allow = "AuthorizationPolicy photo/a: {rules: [{}]}";
    let deny = "AuthorizationPolicy photo/z: {action: DENY, rules: [{from: [{source: {namespaces: [shop]}}]}, {from: [{source: {namespaces: [photo]}}]}]}";
    let custom = "AuthorizationPolicy photo/y: {action: CUSTOM, provider: {name: x}, rules: [{from: [{source: {namespaces: [photo]}}]}]}";
    check(&format!("{allow}\n{deny}"), FRONTEND, "deny denied_by_rule AuthorizationPolicy/photo/z rules[1]");
    check(
        &format!("{allow}\n{deny}\n{custom}"),
        FRONTEND,
        "deny denied_by_rule AuthorizationPolicy/photo/y rules[0]",
    );
    check(&format!("{allow}\n{deny}"), "datastore/db tunnel > photo/backend:8080", YES);
    check(deny, "datastore/db tunnel > photo/backend:8080", "allow");
    let second = "AuthorizationPolicy photo/b: {rules: [{from: [{source: {namespaces: [shop]}}]}]}";
    check(
        &format!("AuthorizationPolicy photo/a: {{}}\n{second}"),
        "shop/cart tunnel > photo/backend:8080",
        "allow AuthorizationPolicy/photo/b rules[0]",
    );
    check(&format!("AuthorizationPolicy photo/a: {{}}\n{second}"), FRONTEND, NO);
}

#[test]
fn audit_and_dry_runs_decide_nothing() {
    // policy F-3, DESIGN 3.4.10
    for policy in [
        "AuthorizationPolicy photo/a: {action: AUDIT, rules: [{}]}",
        "AuthorizationPolicy photo/a!dry-run: {}",
        "AuthorizationPolicy photo/a!dry-run: {action: DENY, rules: [{}]}",
        "AuthorizationPolicy photo/a!dry-run: {action: CUSTOM, provider: {name: x}, rules: [{}]}",
    ] {
        check(policy, FRONTEND, "allow");
        check(
            &format!("{policy}\nClusterRbacConfig default: {{mode: ON}}"),
            FRONTEND,
            "deny no_rule_allows ClusterRbacConfig/default",
        );
    }
}

#[test]
fn an_enforced_policy_sets_rbac_aside_for_the_workloads_it_selects() {
    // policy F-4
    let rbac = "ClusterRbacConfig default: {mode: ON}";
    for policy in [
        "AuthorizationPolicy photo/a: {selector: {matchLabels: {app: backend}}, rules: [{}]}",
        "AuthorizationPolicy photo/a: {selector: {matchLabels: {app: backend}}, action: DENY}",
        "AuthorizationPolicy photo/a: {selector: {matchLabels: {app: backend}}, action: CUSTOM, provider: {name: x}}",
    ] {
        check(&format!("{policy}\n{rbac}"), FRONTEND, "allow");
        check(
            &format!("{policy}\n{rbac}"),
            "plain > photo/frontend:8080",
            "deny no_rule_allows ClusterRbacConfig/default",
        );
    }
}

#[test]
fn scope_and_selector_choose_the_workloads() {
    // policy F-3
    for (policy, backend, cart) in [
        ("AuthorizationPolicy photo/a: {}", "deny", "allow"),
        ("AuthorizationPolicy istio-system/a: {}", "deny", "deny"),
        ("AuthorizationPolicy istio-system/a: {selector: {matchLabels: {app: backend}}}", "deny", "allow"),
        (
            "AuthorizationPolicy photo/a: {selector: {match_labels: {app: backend, tier: test}}}",
            "deny",
            "allow",
        ),
        ("AuthorizationPolicy photo/a: {selector: {matchLabels: {}}}", "deny", "allow"),
        ("AuthorizationPolicy photo/a: {selector: {matchLabels: {app: frontend}}}", "allow", "allow"),
        (
            "AuthorizationPolicy photo/a: {selector: {matchLabels: {app: backend, tier: live}}}",
            "allow",
            "allow",
        ),
        ("AuthorizationPolicy datastore/a: {selector: {matchLabels: {app: backend}}}", "allow", "allow"),
    ] {
        check_each(policy, &[(FRONTEND, backend), ("plain > shop/cart:7", cart)]);
    }
}

#[test]
fn principals_mean_all_trust_domains_of_the_mesh() {
    // policy B-13
    let rule = "{from: [{source: {principals: [cluster.local/ns/photo/sa/frontend]}}]}";
    matches(rule, "old.local:photo/frontend tunnel > photo/backend:8080");
    both(
        rule,
        "evil.org:photo/frontend tunnel > photo/backend:8080",
        "deny trust_domain",
        "deny trust_domain",
    );
    matches("{when: [{key: source.principal, values: [old.local/ns/photo/sa/frontend]}]}", FRONTEND);
}

#[test]
fn the_older_version_of_the_api_reads_the_same() {
    let v1beta1 = "AuthorizationPolicy@security.istio.io/v1beta1 photo/a: {action: DENY, rules: [{}]}";
    check(v1beta1, FRONTEND, DENIED);
    check(
        "PeerAuthentication@security.istio.io/v1beta1 photo/a: {mtls: {mode: STRICT}}",
        PLAIN,
        "deny plaintext_refused",
    );
}

#[test]
fn what_layer_4_cannot_check_closes_http_ports_and_no_others() {
    // policy F-2, A-3
    let jwt = "RequestAuthentication photo/r: {selector: {matchLabels: {app: backend}}, jwtRules: [{issuer: a, jwksUri: \"https://a.test\"}]}";
    check(jwt, FRONTEND, "deny policy_unusable RequestAuthentication/photo/r");
    check(jwt, "photo/frontend tunnel > photo/backend:9000", "allow");
    let needs = "AuthorizationPolicy photo/a: {rules: [{from: [{source: {requestPrincipals: [\"*\"]}}]}]}";
    check(needs, FRONTEND, NO);
    check(
        "DestinationRule photo/d: {host: backend, trafficPolicy: {tls: {mode: DISABLE}}}",
        FRONTEND,
        "allow",
    );
}
