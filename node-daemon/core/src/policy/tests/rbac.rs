//! RBAC of 2018 on layer 4.

use super::*;

const ON: &str = "ClusterRbacConfig default: {mode: ON}";

/// A role of one rule in namespace photo, bound to one subject, with RBAC on.
fn bound(rule: &str, subject: &str) -> String {
    format!(
        "{ON}
         ServiceRole photo/r: {{rules: [{rule}]}}
         ServiceRoleBinding photo/b: {{subjects: [{subject}], roleRef: {{kind: ServiceRole, name: r}}}}"
    )
}

#[track_caller]
fn rule(rule: &str, connection: &str, expected: &str) {
    check(&bound(rule, "{user: \"*\"}"), connection, expected);
}

#[track_caller]
fn subject(subject: &str, connection: &str, expected: &str) {
    check(&bound("{services: [\"*\"]}", subject), connection, expected);
}

const FRONTEND: &str = "photo/frontend tunnel > photo/backend:8080";
const PLAIN: &str = "plain > photo/backend:8080";
const NO: &str = "deny no_rule_allows ClusterRbacConfig/default";
const YES: &str = "allow ServiceRole/photo/r rules[0] via ServiceRoleBinding/photo/b";

#[test]
fn the_switch_says_where_rbac_runs() {
    // policy B-1
    let db = "photo/frontend tunnel > datastore/db:5432";
    for (spec, backend, db_expected) in [
        ("{}", "allow", "allow"),
        ("{mode: OFF}", "allow", "allow"),
        ("{mode: \"ON\"}", NO, NO),
        ("{mode: ON_WITH_INCLUSION, inclusion: {namespaces: [photo]}}", NO, "allow"),
        ("{mode: ON_WITH_INCLUSION, inclusion: {services: [db.datastore.svc.cluster.local]}}", "allow", NO),
        ("{mode: ON_WITH_INCLUSION, inclusion: {}}", "allow", "allow"),
        ("{mode: ON_WITH_INCLUSION, inclusion: {services: [backend]}}", "allow", "allow"),
        ("{mode: ON_WITH_EXCLUSION, exclusion: {namespaces: [photo]}}", "allow", NO),
        ("{mode: ON_WITH_EXCLUSION, exclusion: {services: [db.datastore.svc.cluster.local]}}", NO, "allow"),
        ("{mode: ON_WITH_EXCLUSION, exclusion: {}}", NO, NO),
        ("{mode: ON_WITH_EXCLUSION, exclusion: {namespaces: [phot]}}", NO, NO),
        ("{mode: ON_WITH_EXCLUSION, exclusion: {}, inclusion: {namespaces: [photo]}}", NO, NO),
    ] {
        let objects = format!("ClusterRbacConfig default: {spec}");
        check_each(&objects, &[(FRONTEND, backend), (db, db_expected)]);
    }
    check("", FRONTEND, "allow");
}

#[test]
fn a_listed_service_leaves_the_other_ports_of_its_workload_to_the_namespace() {
    // policy A-4: a port of no service has no service name
    let included = "ClusterRbacConfig default: {mode: ON_WITH_INCLUSION, inclusion: {services: [backend.photo.svc.cluster.local]}}";
    check_each(included, &[("plain > photo/backend:9000", NO), ("plain > photo/backend:9999", "allow")]);
    let excluded = "ClusterRbacConfig default: {mode: ON_WITH_EXCLUSION, exclusion: {services: [backend.photo.svc.cluster.local]}}";
    check_each(excluded, &[("plain > photo/backend:9000", "allow"), ("plain > photo/backend:9999", NO)]);
}

#[test]
fn a_cluster_rbac_config_comes_before_an_rbac_config() {
    // policy 0-8
    check(
        "RbacConfig istio-system/default: {mode: ON}",
        FRONTEND,
        "deny no_rule_allows RbacConfig/istio-system/default",
    );
    check(
        "RbacConfig default/default: {mode: ON}",
        FRONTEND,
        "deny no_rule_allows RbacConfig/default/default",
    );
    check(
        "RbacConfig istio-system/default: {mode: ON}\nClusterRbacConfig default: {mode: OFF}",
        FRONTEND,
        "allow",
    );
    check(
        "RbacConfig istio-system/default: {mode: OFF}\nClusterRbacConfig default: {mode: ON}",
        FRONTEND,
        NO,
    );
    // A namespace does not take the switch from the root namespace.
    let rivals = "RbacConfig a/default@2010-01-01T00:00:00Z: {mode: OFF}\nRbacConfig istio-system/default@2018-01-01T00:00:00Z: {mode: ON}";
    check(rivals, FRONTEND, "deny no_rule_allows RbacConfig/istio-system/default");
    let others = "RbacConfig a/default@2018-01-01T00:00:00Z: {mode: OFF}\nRbacConfig b/default@2017-01-01T00:00:00Z: {mode: ON}";
    check(others, FRONTEND, "deny no_rule_allows RbacConfig/b/default");
}

#[test]
fn a_grant_needs_role_and_binding_of_the_destination_s_namespace() {
    // policy B-2
    let role = "ServiceRole photo/r: {rules: [{services: [\"*\"]}]}";
    let binding =
        "ServiceRoleBinding photo/b: {subjects: [{user: \"*\"}], roleRef: {kind: ServiceRole, name: r}}";
    check(&format!("{ON}\n{role}\n{binding}"), FRONTEND, YES);
    check(&format!("{ON}\n{role}"), FRONTEND, NO);
    check(&format!("{ON}\n{binding}"), FRONTEND, NO);
    check(&format!("{ON}\n{role}\n{binding}"), "photo/frontend tunnel > datastore/db:5432", NO);
    let elsewhere = binding.replace("photo/b", "datastore/b");
    check(&format!("{ON}\n{role}\n{elsewhere}"), FRONTEND, NO);
    let root = format!("{ON}\n{role}\n{binding}").replace("photo/", "istio-system/");
    check(&root, FRONTEND, NO);
    let other = binding.replace("name: r}", "name: q}");
    check(&format!("{ON}\n{role}\n{other}"), FRONTEND, NO);
    let snake = binding.replace("roleRef", "role_ref");
    check(&format!("{ON}\n{role}\n{snake}"), FRONTEND, YES);
}

#[test]
fn any_rule_and_any_subject_of_a_role_go_together() {
    // policy B-4
    let objects = format!(
        "{ON}
         ServiceRole photo/r: {{rules: [{{ports: [1]}}, {{ports: [8080]}}]}}
         ServiceRoleBinding photo/a: {{subjects: [{{user: \"*/sa/nobody\"}}], roleRef: {{kind: ServiceRole, name: r}}}}
         ServiceRoleBinding photo/b: {{subjects: [{{user: x}}, {{user: \"*/sa/frontend\"}}], roleRef: {{kind: ServiceRole, name: r}}}}"
    );
    check(&objects, FRONTEND, "allow ServiceRole/photo/r rules[1] via ServiceRoleBinding/photo/b");
    check(&objects, "photo/backend tunnel > photo/backend:8080", NO);
    check(
        &objects,
        "photo/nobody tunnel > photo/backend:1",
        "allow ServiceRole/photo/r rules[0] via ServiceRoleBinding/photo/a",
    );
}

#[test]
fn services_are_compared_with_the_complete_name() {
    // policy B-5, 0-6
    for (services, expected) in [
        ("[\"*\"]", YES),
        ("[backend.photo.svc.cluster.local]", YES),
        ("[\"backend*\"]", YES),
        ("[\"*.photo.svc.cluster.local\"]", YES),
        ("[x, \"back*\"]", YES),
        ("[backend]", NO),
        ("[frontend.photo.svc.cluster.local]", NO),
        ("[\"*end\"]", NO),
        ("[\"*backend*\"]", NO),
        ("[Backend.photo.svc.cluster.local]", NO),
    ] {
        rule(&format!("{{services: {services}}}"), FRONTEND, expected);
    }
    rule("{}", FRONTEND, YES);
    rule("{services: []}", FRONTEND, YES);
    // policy A-4: a port of no service
    for (services, expected) in
        [("[\"*\"]", YES), ("[\"*.photo.svc.cluster.local\"]", NO), ("[\"backend*\"]", NO)]
    {
        rule(&format!("{{services: {services}}}"), "plain > photo/backend:9999", expected);
    }
    rule("{}", "plain > photo/backend:9999", YES);
}

#[test]
fn ports_are_the_workload_s() {
    // policy B-6, H-1
    for (written, expected) in [
        ("{ports: [8080]}", YES),
        ("{ports: [\"8080\"]}", YES),
        ("{ports: [1, 8080]}", YES),
        ("{notPorts: [1]}", YES),
        ("{not_ports: [1]}", YES),
        ("{ports: [80]}", NO),
        ("{notPorts: [8080]}", NO),
        ("{notPorts: [1, 8080]}", NO),
    ] {
        rule(written, FRONTEND, expected);
    }
}

#[track_caller]
fn constraint(key: &str, values: &str, expected: &str) {
    rule(&format!("{{constraints: [{{key: \"{key}\", values: {values}}}]}}"), FRONTEND, expected);
}

#[test]
fn constraints_describe_the_destination() {
    // policy B-5, B-6
    for (key, values, expected) in [
        ("destination.ip", "[10.8.1.3]", YES),
        ("destination.ip", "[10.8.0.0/16]", YES),
        ("destination.ip", "[10.9.0.0/16, 10.8.1.3/32]", YES),
        ("destination.ip", "[\"::ffff:10.8.1.3\"]", YES),
        ("destination.ip", "[10.8.1.4]", NO),
        ("destination.ip", "[\"fd00::/8\"]", NO),
        ("destination.port", "[\"8080\"]", YES),
        ("destination.port", "[\"1\", \"8080\"]", YES),
        ("destination.port", "[\"80\"]", NO),
        ("destination.labels[app]", "[backend]", YES),
        ("destination.labels[app]", "[\"back*\"]", YES),
        ("destination.labels[app]", "[\"*\"]", YES),
        ("destination.labels[app]", "[frontend]", NO),
        ("destination.labels[version]", "[\"*\"]", NO),
        ("destination.name", "[backend]", YES),
        ("destination.name", "[\"*end\"]", YES),
        ("destination.name", "[backend.photo.svc.cluster.local]", NO),
        ("destination.namespace", "[photo]", YES),
        ("destination.namespace", "[datastore]", NO),
        ("destination.user", "[backend]", YES),
        ("destination.user", "[frontend]", NO),
        ("destination.user", "[\"cluster.local/ns/photo/sa/backend\"]", NO),
    ] {
        constraint(key, values, expected);
    }
    rule("{constraints: [{key: destination.name, values: [backend]}]}", "plain > photo/backend:9999", NO);
}

#[test]
fn the_server_name_is_that_of_mesh_tls() {
    // policy B-6
    let sni = |values: &str, connection: &str, expected: &str| {
        rule(&format!("{{constraints: [{{key: connection.sni, values: {values}}}]}}"), connection, expected);
    };
    sni("[\"a.b\"]", "photo/frontend mesh-tls:a.b > photo/backend:8080", YES);
    sni("[\"*.b\"]", "photo/frontend mesh-tls:a.b > photo/backend:8080", YES);
    sni("[\"*\"]", "photo/frontend mesh-tls:a.b > photo/backend:8080", YES);
    sni("[\"*\"]", "photo/frontend mesh-tls > photo/backend:8080", NO);
    sni("[\"*\"]", FRONTEND, NO);
    sni("[\"*\"]", PLAIN, NO);
    sni("[\"x.b\"]", "photo/frontend mesh-tls:a.b > photo/backend:8080", NO);
}

#[test]
fn a_constraint_that_nobody_can_judge_grants_nothing() {
    // policy B-6, G-3, G-5
    for (key, values) in [
        ("source.ip", "[10.0.0.0/8]"),
        ("request.auth.principal", "[x]"),
        ("destination.labels", "[backend]"),
        ("destination.labels[]", "[\"*\"]"),
        ("destination.labels[app", "[\"*\"]"),
        ("request.headers", "[x]"),
        ("destination.unknown", "[\"*\"]"),
        ("Destination.port", "[\"8080\"]"),
        ("experimental.envoy.filters.mysql[t]", "[x]"),
        ("destination.ip", "[10.8.1.3/33]"),
        ("destination.ip", "[\"*\"]"),
        ("destination.port", "[\"65536\"]"),
        ("destination.port", "[http]"),
        ("destination.port", "[\"8*\"]"),
    ] {
        constraint(key, values, NO);
    }
    // A value that can be used still counts.
    constraint("destination.port", "[http, \"8080\"]", YES);
    constraint("destination.ip", "[x, 10.8.1.3]", YES);
}

#[test]
fn a_constraint_that_stands_twice_counts_twice() {
    // policy B-4, G-4
    let twice = |a: &str, b: &str| {
        format!(
            "{{constraints: [{{key: destination.port, values: {a}}}, {{key: destination.port, values: {b}}}]}}"
        )
    };
    rule(&twice("[\"8080\"]", "[\"8080\", \"1\"]"), FRONTEND, YES);
    rule(&twice("[\"1\"]", "[\"8080\"]"), FRONTEND, NO);
    rule(&twice("[\"8080\"]", "[\"1\"]"), FRONTEND, NO);
}

#[test]
fn rules_about_requests_grant_nothing_on_layer_4() {
    // policy B-10
    for request in [
        "methods: [\"*\"]",
        "methods: [GET]",
        "notMethods: [GET]",
        "not_methods: [GET]",
        "paths: [\"*\"]",
        "paths: [/a]",
        "notPaths: [/a]",
        "hosts: [a]",
        "notHosts: [a]",
        "constraints: [{key: \"request.headers[x]\", values: [\"*\"]}]",
    ] {
        rule(&format!("{{services: [\"*\"], {request}}}"), FRONTEND, NO);
        // The other rules of the role remain.
        let rules = format!("{{services: [\"*\"], {request}}}, {{services: [\"*\"]}}");
        check(
            &bound(&rules, "{user: \"*\"}"),
            FRONTEND,
            "allow ServiceRole/photo/r rules[1] via ServiceRoleBinding/photo/b",
        );
    }
    rule("{methods: [], paths: []}", FRONTEND, YES);
}

#[test]
fn subjects_that_only_requests_can_answer_are_left_out() {
    // policy B-10, G-9
    for request in [
        "{group: admins}",
        "{groups: [admins]}",
        "{notGroups: [admins]}",
        "{user: \"*\", group: admins}",
        "{properties: {request.auth.principal: \"*\"}}",
        "{properties: {request.auth.presenter: \"*\"}}",
        "{properties: {request.auth.audiences: \"*\"}}",
        "{properties: {\"request.auth.claims[groups]\": \"*\"}}",
        "{properties: {\"request.headers[x]\": \"*\"}}",
        "{user: \"*\", properties: {source.user: \"*\"}}",
    ] {
        subject(request, FRONTEND, NO);
        // Only that subject.
        subject(&format!("{request}, {{user: \"*\"}}"), FRONTEND, YES);
    }
}

#[test]
fn a_user_is_the_whole_identity() {
    // policy 0-1, B-5, H-7
    for (user, expected) in [
        ("cluster.local/ns/photo/sa/frontend", YES),
        ("*/sa/frontend", YES), // G-10
        ("cluster.local/ns/photo/*", YES),
        ("*", YES),
        ("allUsers", YES),
        ("allAuthenticatedUsers", YES),
        ("frontend", NO),
        ("spiffe://cluster.local/ns/photo/sa/frontend", NO),
        ("cluster.local/ns/photo/sa/front", NO),
        ("cluster.local/ns/photo/sa/Frontend", NO),
        ("*photo*", NO),
        ("*/sa/front", NO),
    ] {
        subject(&format!("{{user: \"{user}\"}}"), FRONTEND, expected);
        if user != "*" {
            subject(&format!("{{names: [x, \"{user}\"]}}"), FRONTEND, expected);
        }
    }
}

#[test]
fn stars_ask_for_somebody_except_in_user() {
    // policy B-8, G-1, G-11
    for (written, plain) in [
        ("{user: \"*\"}", YES),
        ("{user: allUsers}", YES),
        ("{names: [allUsers]}", YES),
        ("{user: allAuthenticatedUsers}", NO),
        ("{names: [allAuthenticatedUsers]}", NO),
        ("{properties: {source.principal: \"*\"}}", NO),
        ("{properties: {source.namespace: \"*\"}}", NO),
        ("{namespaces: [\"*\"]}", NO),
        ("{user: \"*\", properties: {source.principal: \"*\"}}", NO),
    ] {
        subject(written, PLAIN, plain);
        subject(written, FRONTEND, YES);
    }
}

#[test]
fn an_identity_needs_mutual_tls() {
    // policy B-9
    let objects = bound("{}", "{properties: {source.namespace: photo}}");
    check(&objects, FRONTEND, YES);
    check(&objects, PLAIN, NO);
    for off in ["Policy photo/default: {}", "PeerAuthentication photo/default: {mtls: {mode: DISABLE}}"] {
        check(&format!("{objects}\n{off}"), FRONTEND, NO);
    }
}

#[test]
fn properties_describe_the_source() {
    // policy B-7
    for (properties, expected) in [
        ("{source.ip: 10.8.9.9}", YES),
        ("{source.ip: 10.8.0.0/16}", YES),
        ("{source.ip: \"::ffff:10.8.0.0/112\"}", YES),
        ("{source.ip: 10.8.9.8}", NO),
        ("{source.ip: 10.8.9.9/40}", NO),
        ("{source.ip: any}", NO),
        ("{source.namespace: photo}", YES),
        ("{source.namespace: \"ph*\"}", YES),
        ("{source.namespace: \"p*o\"}", YES),
        ("{source.namespace: phot}", NO),
        ("{source.namespace: \"*/ns/photo/*\"}", NO),
        ("{source.principal: cluster.local/ns/photo/sa/frontend}", YES),
        ("{source.principal: \"*/sa/frontend\"}", YES),
        ("{source.principal: frontend}", NO),
        ("{source.principal: allUsers}", NO),
        ("{source.namespace: photo, source.ip: 10.8.9.9}", YES),
        ("{source.namespace: photo, source.ip: 10.8.9.8}", NO),
        ("{made.up: \"*\"}", NO),
        ("{source.labels: \"*\"}", NO),
    ] {
        subject(&format!("{{properties: {properties}}}"), FRONTEND, expected);
        subject(&format!("{{user: \"*\", properties: {properties}}}"), FRONTEND, expected);
    }
    // policy B-4: user and source.principal are joined
    subject("{user: \"*/sa/frontend\", properties: {source.principal: \"*/sa/other\"}}", FRONTEND, NO);
    subject("{user: \"*/sa/other\", properties: {source.principal: \"*/sa/frontend\"}}", FRONTEND, NO);
}

#[test]
fn properties_as_a_list_are_merged() {
    // policy 0-2
    subject("{properties: [{source.namespace: photo}, {source.ip: 10.8.9.9}]}", FRONTEND, YES);
    subject("{properties: [{source.namespace: photo}, {source.ip: 10.8.9.8}]}", FRONTEND, NO);
    subject("{properties: [{source.namespace: other}, {source.ip: 10.8.9.9}]}", FRONTEND, NO);
}

#[test]
fn first_class_fields_are_joined_and_negated() {
    // policy B-2, B-4
    for (written, expected) in [
        ("{namespaces: [photo, shop]}", YES),
        ("{namespaces: [shop]}", NO),
        ("{notNamespaces: [shop]}", YES),
        ("{not_namespaces: [photo]}", NO),
        ("{ips: [10.0.0.0/8]}", YES),
        ("{ips: [192.168.0.0/16]}", NO),
        ("{notIps: [192.168.0.0/16]}", YES),
        ("{notIps: [10.8.9.9]}", NO),
        ("{notIps: [bad]}", NO),
        ("{ips: [bad]}", NO),
        ("{ips: [bad, 10.8.9.9]}", YES),
        ("{notIps: [bad, 1.1.1.1]}", NO),
        ("{names: [\"*/sa/frontend\"], namespaces: [shop]}", NO),
        ("{names: [\"*/sa/frontend\"], notNames: [\"cluster.local/ns/photo/*\"]}", NO),
        ("{notNames: [\"*/sa/other\"]}", YES),
        ("{notNames: [\"*/sa/frontend\"]}", NO),
        ("{notNames: [allUsers]}", NO),
    ] {
        subject(written, FRONTEND, expected);
    }
    subject("{notNames: [allAuthenticatedUsers]}", FRONTEND, NO);
    subject("{notNames: [allAuthenticatedUsers]}", PLAIN, YES); // policy B-5: what is missing is not among them
}

#[test]
fn a_name_of_the_mesh_s_trust_domains_means_all_of_them() {
    // policy B-13
    let from_old = "old.local:photo/frontend tunnel > photo/backend:8080";
    for user in [
        "cluster.local/ns/photo/sa/frontend",
        "old.local/ns/photo/sa/frontend",
        "*local/ns/photo/sa/frontend",
    ] {
        subject(&format!("{{user: \"{user}\"}}"), from_old, YES);
        subject(&format!("{{names: [\"{user}\"]}}"), FRONTEND, YES);
        subject(&format!("{{properties: {{source.principal: \"{user}\"}}}}"), FRONTEND, YES);
    }
    subject("{user: other.org/ns/photo/sa/frontend}", FRONTEND, NO);
    subject("{user: cluster.local/ns/photo/*}", from_old, NO); // not of five segments
    let mut world = World::default();
    world.mesh.trust_domain = domain("new.org");
    world.mesh.trust_domain_aliases.clear();
    let objects = bound("{}", "{user: cluster.local/ns/photo/sa/frontend}");
    world.check(&objects, "new.org:photo/frontend tunnel > photo/backend:8080", YES);
    world.check(&objects, FRONTEND, "deny trust_domain");
}

#[test]
fn a_permissive_switch_refuses_nobody() {
    // policy B-11
    let objects = bound("{}", "{user: \"*/sa/frontend\"}")
        .replace("{mode: ON}", "{mode: ON, enforcementMode: PERMISSIVE}");
    check(&objects, FRONTEND, YES);
    check(&objects, PLAIN, "allow ClusterRbacConfig/default");
    check(&objects.replace("enforcementMode", "enforcement_mode"), PLAIN, "allow ClusterRbacConfig/default");
    check(&objects.replace("PERMISSIVE", "ENFORCED"), PLAIN, NO);
}

#[test]
fn a_permissive_binding_grants_nothing() {
    // policy B-11
    let objects = bound("{}", "{user: \"*\"}").replace("subjects:", "mode: PERMISSIVE, subjects:");
    check(&objects, FRONTEND, NO);
    let enforced =
        "ServiceRoleBinding photo/c: {subjects: [{user: \"*\"}], roleRef: {kind: ServiceRole, name: r}}";
    check(
        &format!("{objects}\n{enforced}"),
        FRONTEND,
        "allow ServiceRole/photo/r rules[0] via ServiceRoleBinding/photo/c",
    );
}

#[test]
fn tcp_is_under_rbac_too() {
    // policy B-10, G-8
    check(ON, "photo/backend tunnel > datastore/db:5432", NO);
    check(ON, "plain > shop/cart:7", NO);
}

#[test]
fn a_grant_does_not_open_a_strict_port() {
    let objects = bound("{}", "{user: \"*\"}") + "\nMeshPolicy default: {peers: [{mtls: {}}]}";
    check(&objects, PLAIN, "deny plaintext_refused MeshPolicy/default");
    check(&objects, FRONTEND, YES);
    check(&objects, "evil.org:photo/frontend tunnel > photo/backend:8080", "deny trust_domain");
}
