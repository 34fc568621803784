use super::*;
use crate::{
    testing::{documents, pod, readable, service as service_yaml, unit},
    workload::{Mesh, Placement, Protocol, SameNode, Service, TargetPort, TransportMode, Workload},
};

fn trust_domain() -> spiffe_id::TrustDomain {
    "cluster.local".parse().expect("a trust domain")
}

/// Field and expectation of a refused head.
#[track_caller]
fn head_refused(yaml: &str, field: &str, object_title: &str) {
    let value = documents(yaml).pop().expect("the test gives a document");
    let refused = object(value, Source::new("a.yaml", 3)).expect_err("the head is not readable");
    assert_eq!((refused.field.as_str(), refused.object().as_str()), (field, object_title), "{refused}");
    assert!(refused.to_string().starts_with("a.yaml document 3: "), "{refused}");
}

#[track_caller]
fn decoded(yaml: &str) -> (Arc<Workload>, Enrolment) {
    let declared = workload(&readable(yaml), &trust_domain()).expect("the workload is good");
    (declared.workload, declared.enrolment)
}

#[track_caller]
fn workload_refused(yaml: &str, field: &str, value: &str) {
    let refused = workload(&readable(yaml), &trust_domain()).expect_err("the workload is not good");
    assert_eq!((refused.field.as_str(), refused.value.as_str()), (field, value), "{refused}");
    assert!(!refused.expected.is_empty() && !refused.remedy.is_empty(), "{refused}");
}

#[track_caller]
fn decoded_service(yaml: &str) -> Service {
    service(&readable(yaml)).expect("the service is good")
}

#[track_caller]
fn service_refused(ports: &str, field: &str, value: &str) {
    let yaml = service_yaml("web", "10.96.0.1", "web", ports);
    let refused = service(&readable(&yaml)).expect_err("the service is not good");
    assert_eq!((refused.field.as_str(), refused.value.as_str()), (field, value), "{refused}");
}

fn mesh_yaml(spec: &str) -> String {
    format!("apiVersion: culvert.io/v1alpha1\nkind: Mesh\nmetadata: {{name: default}}\nspec: {spec}\n")
}

#[track_caller]
fn mesh_refused(spec: &str, field: &str, value: &str) {
    let refused = mesh(&readable(&mesh_yaml(spec)), &trust_domain()).expect_err("the mesh is not good");
    assert_eq!((refused.field.as_str(), refused.value.as_str()), (field, value), "{refused}");
}

#[test]
fn a_head_without_its_parts_is_refused_by_field() {
    head_refused("[1, 2]", "document", "unknown object");
    head_refused("just text", "document", "unknown object");
    head_refused("apiVersion: v1\nmetadata: {name: a}", "kind", "unknown object");
    head_refused("apiVersion: v1\nkind: [Service]\nmetadata: {name: a}", "kind", "unknown object");
    head_refused("apiVersion: v1\nkind: List\nitems: []", "kind", "List without a usable name");
    head_refused("kind: Service\nmetadata: {name: a}", "apiVersion", "Service without a usable name");
    head_refused("apiVersion: v1\nkind: Service", "metadata", "Service without a usable name");
    head_refused("apiVersion: v1\nkind: Service\nmetadata: a", "metadata", "Service without a usable name");
    head_refused(
        "apiVersion: v1\nkind: Service\nmetadata: {}",
        "metadata.name",
        "Service without a usable name",
    );
    for name in ["7", "\"\"", "Web", "a_b", "-a", "a-", "a..b", "a/b", "..", "\"a\\nb\"", "ä"] {
        let yaml = format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}");
        head_refused(&yaml, "metadata.name", "Service without a usable name");
    }
    for namespace in ["7", "\"\"", "a.b", "A", "../etc"] {
        let yaml = format!("apiVersion: v1\nkind: Service\nmetadata: {{name: a, namespace: {namespace}}}");
        head_refused(&yaml, "metadata.namespace", "Service without a usable name");
    }
    let labelled = |map: &str| format!("apiVersion: v1\nkind: Service\nmetadata: {{name: a, {map}}}");
    head_refused(&labelled("labels: x"), "metadata.labels", "Service default/a");
    head_refused(&labelled("labels: {on: true}"), "metadata.labels.on", "Service default/a");
    head_refused(&labelled("annotations: {n: 1}"), "metadata.annotations.n", "Service default/a");
    head_refused(&labelled("creationTimestamp: 7"), "metadata.creationTimestamp", "Service default/a");
}

#[test]
fn a_kind_of_the_whole_mesh_has_no_namespace() {
    let yaml = "apiVersion: culvert.io/v1alpha1\nkind: Mesh\nmetadata: {name: default, namespace: photo}";
    head_refused(yaml, "metadata.namespace", "Mesh without a usable name");
    let namespace = readable("apiVersion: v1\nkind: Namespace\nmetadata: {name: photo}");
    assert_eq!(namespace.name, ObjectName::new("", "photo"));
}

#[test]
fn a_namespaced_object_without_a_namespace_is_in_default() {
    assert_eq!(
        readable("apiVersion: v1\nkind: Service\nmetadata: {name: a}").name,
        ObjectName::new("default", "a")
    );
}

#[test]
fn names_are_exactly_as_long_as_kubernetes_allows() {
    let yaml = |name: &str, namespace: &str| {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}")
    };
    let (name, namespace) = ("n".repeat(NAME_BYTES_MAX), "s".repeat(NAMESPACE_BYTES_MAX));
    assert_eq!(readable(&yaml(&name, &namespace)).name, ObjectName::new(&namespace, &name));
    head_refused(&yaml(&format!("{name}n"), "a"), "metadata.name", "Service without a usable name");
    head_refused(&yaml("a", &format!("{namespace}s")), "metadata.namespace", "Service without a usable name");
}

#[test]
fn names_of_nodes_and_ports_are_exactly_as_long_as_allowed() {
    let on = |node: &str| pod("web", "10.8.1.4", "").replace("node: node-a", &format!("node: {node}"));
    let longest = "n".repeat(workload::NODE_BYTES_MAX);
    assert_eq!(&*decoded(&on(&longest)).0.node, longest);
    let longer = format!("{longest}n");
    let refused = workload(&readable(&on(&longer)), &trust_domain()).expect_err("one byte more");
    assert_eq!(refused.field, "spec.node");

    let named = |name: &str| format!("[{{port: 80, name: {name}}}]");
    let longest = "p".repeat(port::PORT_NAME_BYTES_MAX);
    decoded_service(&service_yaml("web", "10.96.0.1", "web", &named(&longest)));
    let longer = format!("{longest}p");
    service_refused(&named(&longer), "spec.ports[0].name", &format!("\"{longer}\""));
}

#[test]
fn unknown_kinds_pass_whatever_their_head() {
    for (yaml, title) in [
        (
            "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {name: 'system:node'}",
            "ClusterRole system:node",
        ),
        (
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, namespace: b, labels: {on: true}}",
            "ConfigMap b/a",
        ),
        ("apiVersion: v1\nkind: Pod\nmetadata: {generateName: a-}", "Pod "),
        ("apiVersion: v1\nkind: Status", "Status "),
        ("apiVersion: other.io/v1\nkind: Mesh\nmetadata: {name: a, namespace: b}", "Mesh b/a"),
    ] {
        assert_eq!(readable(yaml).title(), title);
    }
}

#[test]
fn a_namespace_on_a_mesh_wide_policy_means_nothing() {
    for (version, kind) in
        [("authentication.istio.io/v1alpha1", "MeshPolicy"), ("rbac.istio.io/v1alpha1", "ClusterRbacConfig")]
    {
        let yaml = format!(
            "apiVersion: {version}\nkind: {kind}\nmetadata: {{name: default, namespace: istio-system}}"
        );
        assert_eq!(readable(&yaml).name, ObjectName::new("", "default"));
    }
}

#[test]
fn null_inside_a_spec_stays() {
    //
    let yaml = "apiVersion: authentication.istio.io/v1alpha1\nkind: Policy\nmetadata: {name: default}\nspec:\n  peers:\n  - mtls:\n";
    let object = readable(yaml);
    assert_eq!(object.spec, serde_json::json!({"peers": [{"mtls": null}]}));
}

#[test]
fn long_values_are_cut_in_messages() {
    // Quotes are shown too.
    let longest = "ä".repeat(SHOWN_CHARACTERS_MAX - 2);
    assert_eq!(shown(&Value::from(longest.clone())), format!("\"{longest}\""));
    for longer in [format!("{longest}x"), "x".repeat(10_000)] {
        let text = shown(&Value::from(longer));
        assert_eq!(text.chars().count(), SHOWN_CHARACTERS_MAX + 3);
        assert!(text.ends_with("..."), "{text}");
    }
}

#[test]
fn a_workload_is_read_whole() {
    let yaml = pod(
        "web",
        "10.8.1.4",
        "ports: [{name: http-main, port: 8080}, {name: raw, port: 9, appProtocol: grpc}, {port: 10}]\n\
         exemptInboundPorts: [9090, 22, 22]\nsameNode: proxied",
    );
    let (workload, enrolment) = decoded(&yaml);
    assert_eq!(workload.identity.to_string(), "spiffe://cluster.local/ns/photo/sa/web");
    assert_eq!(workload.placement, Placement::NetworkNamespace("/run/netns/web".into()));
    let ports: Vec<_> =
        workload.ports.iter().map(|port| (port.name.as_deref(), port.port, port.protocol)).collect();
    let expected = [
        (Some("http-main"), 8080, Protocol::Http),
        (Some("raw"), 9, Protocol::Grpc),
        (None, 10, Protocol::Tcp),
    ];
    assert_eq!(ports, expected); // policy H-8
    assert_eq!(workload.exempt_inbound_ports, [22, 9090]);
    assert_eq!(enrolment, Enrolment::Unsaid);
    assert!(!workload.is_host());
}

#[test]
fn a_workload_without_an_account_runs_as_default() {
    // D-1
    let (workload, _) = decoded(&pod("web", "10.8.1.4", "").replace("  serviceAccount: web\n", ""));
    assert_eq!(workload.identity.service_account(), "default");
}

#[test]
fn a_host_workload_is_found_by_its_cgroup_or_unit() {
    assert_eq!(decoded(&unit("web", 80)).0.placement, Placement::Cgroup("culvert/web".into()));
    let by_unit = unit("web", 80).replace("cgroup: culvert/web", "systemdUnit: web.service");
    assert_eq!(decoded(&by_unit).0.placement, Placement::SystemdUnit("web.service".into()));
}

#[test]
fn exactly_one_placement() {
    let none = pod("web", "10.8.1.4", "").replace("  networkNamespace: /run/netns/web\n", "");
    workload_refused(&none, "spec", "nothing");
    workload_refused(&pod("web", "10.8.1.4", "cgroup: a"), "spec", "\"networkNamespace and cgroup\"");
    let placed = |text: &str| pod("web", "10.8.1.4", "").replace("networkNamespace: /run/netns/web", text);
    workload_refused(&placed("networkNamespace: netns/web"), "spec.networkNamespace", "\"netns/web\"");
    workload_refused(&placed("networkNamespace: 7"), "spec.networkNamespace", "7");
    workload_refused(&placed("cgroup: a/../b"), "spec.cgroup", "\"a/../b\"");
    workload_refused(&placed("systemdUnit: web"), "spec.systemdUnit", "\"web\"");
    workload_refused(&placed("systemdUnit: a/web.service"), "spec.systemdUnit", "\"a/web.service\"");
}

#[test]
fn unusable_addresses_are_refused() {
    for (address, shown) in [
        ("10.8.1", "\"10.8.1\""),
        ("10.8.1.4/32", "\"10.8.1.4/32\""),
        ("10.8.1.04", "\"10.8.1.04\""),
        ("host", "\"host\""),
        ("", "\"\""),
        ("127.0.0.1", "\"127.0.0.1\""),
        ("0.0.0.0", "\"0.0.0.0\""),
        ("224.0.0.1", "\"224.0.0.1\""),
        ("169.254.169.254", "\"169.254.169.254\""),
        ("255.255.255.255", "\"255.255.255.255\""),
        ("::", "\"::\""),
        ("::1", "\"::1\""),
        ("fe80::1", "\"fe80::1\""),
        ("fe80::1%eth0", "\"fe80::1%eth0\""),
        ("ff02::1", "\"ff02::1\""),
        ("::ffff:10.8.1.4", "\"::ffff:10.8.1.4\""),
    ] {
        workload_refused(&pod("web", address, ""), "spec.addresses[0]", shown);
    }
    let addressed = |list: &str| pod("web", "x", "").replace("[\"x\"]", list);
    workload_refused(&addressed("[]"), "spec.addresses", "[]");
    workload_refused(&addressed("10.8.1.4"), "spec.addresses", "\"10.8.1.4\"");
    workload_refused(&addressed("null"), "spec.addresses", "nothing");
    workload_refused(
        &addressed("[10.8.1.4, \"fd00::1\", \"fd00:0::1\"]"),
        "spec.addresses[2]",
        "\"fd00:0::1\"",
    );
}

#[test]
fn unusable_ports_are_refused() {
    let with = |ports: &str| pod("web", "10.8.1.4", ports);
    for (port, shown) in [("0", "0"), ("65536", "65536"), ("-1", "-1"), ("\"80\"", "\"80\""), ("8.5", "8.5")]
    {
        workload_refused(&with(&format!("ports: [{{port: {port}}}]")), "spec.ports[0].port", shown);
        workload_refused(
            &with(&format!("exemptInboundPorts: [{port}]")),
            "spec.exemptInboundPorts[0]",
            shown,
        );
    }
    workload_refused(&with("ports: [{name: a}]"), "spec.ports[0].port", "nothing");
    workload_refused(&with("ports: [80]"), "spec.ports[0]", "80");
    workload_refused(&with("ports: {port: 80}"), "spec.ports", "{\"port\":80}");
    workload_refused(&with("ports: [{port: 80}, {port: 80}]"), "spec.ports[1]", "{\"port\":80}");
    workload_refused(
        &with("ports: [{port: 80, name: a}, {port: 81, name: a}]"),
        "spec.ports[1]",
        "{\"name\":\"a\",\"port\":81}",
    );
    workload_refused(&with("ports: [{port: 80, protocol: UDP}]"), "spec.ports[0].protocol", "\"UDP\"");
    workload_refused(&with("ports: [{port: 80, name: HTTP}]"), "spec.ports[0].name", "\"HTTP\"");
    workload_refused(&with("ports: [{port: 80, name: \"80\"}]"), "spec.ports[0].name", "\"80\"");
    workload_refused(
        &with("ports: [{port: 80, name: abcdefghijklmnop}]"),
        "spec.ports[0].name",
        "\"abcdefghijklmnop\"",
    );
    workload_refused(&with("ports: [{port: 80, targetPort: 81}]"), "spec.ports[0].targetPort", "81");
    workload_refused(&with("exemptInboundPorts: [15008]"), "spec.exemptInboundPorts[0]", "15008");
}

#[test]
fn unknown_keys_of_a_workload_are_refused() {
    workload_refused(&pod("web", "10.8.1.4", "adresses: []"), "spec.adresses", "[]");
    workload_refused(&format!("{}specs: 1\n", pod("web", "10.8.1.4", "")), "specs", "1");
    let misspelled = pod("web", "10.8.1.4", "").replace("labels:", "lables:");
    workload_refused(&misspelled, "metadata.lables", "{\"app\":\"web\"}");
    let of_the_cluster =
        pod("web", "10.8.1.4", "").replace("labels:", "uid: a, resourceVersion: \"1\", labels:");
    decoded(&of_the_cluster);
}

#[test]
fn names_that_cannot_stand_in_a_certificate_are_refused() {
    let account = |text: &str| pod("web", "10.8.1.4", "").replace("serviceAccount: web", text);
    workload_refused(&account("serviceAccount: a/b"), "spec.serviceAccount", "\"a/b\"");
    workload_refused(&account("serviceAccount: ''"), "spec.serviceAccount", "\"\"");
    workload_refused(&account("serviceAccount: .."), "spec.serviceAccount", "\"..\"");
    workload_refused(&account("serviceAccount: 7"), "spec.serviceAccount", "7");
    let node = |text: &str| pod("web", "10.8.1.4", "").replace("node: node-a", text);
    workload_refused(&node("node: a/b"), "spec.node", "\"a/b\"");
    workload_refused(&node("node: .."), "spec.node", "\"..\"");
    workload_refused(&node(""), "spec.node", "nothing");
}

#[test]
fn a_workload_needs_a_spec() {
    workload_refused(
        "apiVersion: culvert.io/v1alpha1\nkind: Workload\nmetadata: {name: a}",
        "spec",
        "nothing",
    );
    workload_refused(&pod("web", "10.8.1.4", "sameNode: maybe"), "spec.sameNode", "\"maybe\"");
}

#[test]
fn enrolment_follows_the_labels() {
    use Enrolment::{Disabled, Enabled, Unsaid};
    let with = |labels: &str| pod("web", "10.8.1.4", "").replace("app: web", labels);
    for (labels, expected) in [
        ("culvert.io/mesh: enabled", Enabled),
        ("culvert.io/mesh: disabled", Disabled),
        ("istio.io/dataplane-mode: culvert", Enabled),
        ("istio.io/dataplane-mode: none", Disabled),
        ("istio.io/dataplane-mode: ambient", Unsaid),
        ("app: web", Unsaid),
        ("culvert.io/mesh: enabled, istio.io/dataplane-mode: none", Enabled),
        ("culvert.io/mesh: disabled, istio.io/dataplane-mode: culvert", Disabled),
    ] {
        assert_eq!(decoded(&with(labels)).1, expected, "{labels}");
    }
    let field = "metadata.labels.culvert.io/mesh";
    workload_refused(&with("culvert.io/mesh: Enabled"), field, "\"Enabled\"");
    workload_refused(&with("culvert.io/mesh: \"true\""), field, "\"true\"");
    for (pod, namespace, expected) in [
        (Enabled, Disabled, true),
        (Enabled, Unsaid, true),
        (Disabled, Enabled, false),
        (Disabled, Unsaid, false),
        (Unsaid, Enabled, true),
        (Unsaid, Disabled, false),
        (Unsaid, Unsaid, true),
    ] {
        assert_eq!(Enrolment::resolve(pod, namespace), expected, "{pod:?} in {namespace:?}");
    }
}

#[test]
fn the_way_inside_a_node_is_the_specs_word_and_else_the_labels() {
    let with = |labels: &str, spec: &str| pod("web", "10.8.1.4", spec).replace("app: web", labels);
    for (labels, spec, expected) in [
        ("app: web", "", None),
        ("app: web", "sameNode: proxied", Some(SameNode::Proxied)),
        ("culvert.io/same-node: proxied", "", Some(SameNode::Proxied)),
        ("culvert.io/same-node: proxied", "sameNode: direct", Some(SameNode::Direct)),
    ] {
        let declared = workload(&readable(&with(labels, spec)), &trust_domain()).expect("it is good");
        assert_eq!(declared.same_node, expected, "{labels} {spec}");
    }
    let field = "metadata.labels.culvert.io/same-node";
    workload_refused(&with("culvert.io/same-node: Proxied", ""), field, "\"Proxied\"");
}

#[test]
fn a_service_is_read_as_kubernetes_writes_it() {
    let yaml = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: photo, uid: x}\n\
        spec:\n  type: ClusterIP\n  clusterIP: 10.96.0.1\n  clusterIPs: [10.96.0.1, \"fd00::1\"]\n  \
        ipFamilyPolicy: PreferDualStack\n  selector: {app: web}\n  ports:\n  \
        - {name: http, port: 80, targetPort: 8080, protocol: TCP, nodePort: 30080}\n  \
        - {name: grpc-api, port: 81, targetPort: api}\n  - {name: dns, port: 53, protocol: UDP}\n  \
        - {name: dns-tcp, port: 53}\nstatus: {loadBalancer: {}}\n";
    let service = decoded_service(yaml);
    assert_eq!(service.addresses.len(), 2);
    let ports: Vec<_> =
        service.ports.iter().map(|port| (port.port, port.target.clone(), port.protocol)).collect();
    let expected = [
        (80, TargetPort::Number(8080), Protocol::Http),
        (81, TargetPort::Name("api".to_owned()), Protocol::Grpc),
        (53, TargetPort::Number(53), Protocol::Tcp),
    ];
    assert_eq!(ports, expected);
}

#[test]
fn a_service_may_be_headless_or_select_nothing() {
    for address in ["None", ""] {
        assert!(decoded_service(&service_yaml("web", address, "web", "[]")).addresses.is_empty());
    }
    assert!(
        decoded_service("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {}").selector.is_empty()
    );
}

#[test]
fn unusable_service_ports_are_refused() {
    service_refused("[{port: 0}]", "spec.ports[0].port", "0");
    service_refused("[{port: 70000}]", "spec.ports[0].port", "70000");
    service_refused("[{name: a}]", "spec.ports[0].port", "nothing");
    service_refused("[{port: 80, targetPort: 0}]", "spec.ports[0].targetPort", "0");
    service_refused("[{port: 80, targetPort: \"8080\"}]", "spec.ports[0].targetPort", "\"8080\"");
    service_refused("[{port: 80, targetPort: [a]}]", "spec.ports[0].targetPort", "[\"a\"]");
    service_refused("[{port: 80, protocol: tcp}]", "spec.ports[0].protocol", "\"tcp\"");
    service_refused("[{port: 80}, {port: 80}]", "spec.ports[1]", "{\"port\":80}");
    service_refused("80", "spec.ports", "80");
}

#[test]
fn unusable_service_addresses_and_selectors_are_refused() {
    for (old, new, field) in [
        ("\"10.96.0.1\"", "\"10.96.0\"", "spec.clusterIP"),
        ("\"10.96.0.1\"", "127.0.0.1", "spec.clusterIP"),
        ("{app: web}", "{app: 1}", "spec.selector.app"),
        ("{app: web}", "web", "spec.selector"),
    ] {
        let yaml = service_yaml("web", "10.96.0.1", "web", "[]").replace(old, new);
        let refused = service(&readable(&yaml)).expect_err("the service is not good");
        assert_eq!(refused.field, field, "{refused}");
    }
}

#[test]
fn the_protocol_is_app_protocol_first_and_the_name_else() {
    // policy H-8
    for (app_protocol, name, expected) in [
        (None, None, Protocol::Tcp),
        (None, Some("http"), Protocol::Http),
        (None, Some("http2-web"), Protocol::Http),
        (None, Some("grpc"), Protocol::Grpc),
        (None, Some("grpc-web"), Protocol::Grpc),
        (None, Some("httpd"), Protocol::Tcp),
        (None, Some("https"), Protocol::Tcp),
        (None, Some("web-http"), Protocol::Tcp),
        (None, Some("mysql"), Protocol::Tcp),
        (Some("tcp"), Some("http"), Protocol::Tcp),
        (Some("HTTP"), Some("tcp"), Protocol::Http),
        (Some("kubernetes.io/h2c"), None, Protocol::Http),
        (Some("grpc"), Some("http"), Protocol::Grpc),
        (Some("something/else"), Some("http"), Protocol::Tcp),
    ] {
        assert_eq!(port::protocol(app_protocol, name), expected, "{app_protocol:?} {name:?}");
    }
}

#[test]
fn a_mesh_says_what_it_says_and_the_rest_is_default() {
    let empty = mesh(&readable(&mesh_yaml("{}")), &trust_domain()).expect("the mesh is good");
    assert_eq!(empty, Mesh::defaults(trust_domain()));
    assert_eq!(empty.default_mode, TransportMode::Permissive);
    let spec = "{trustDomain: cluster.local, trustDomainAliases: [old.local], rootNamespace: mesh-root, \
        defaultMode: STRICT, sameNode: proxied, requireTokenExpiry: true, \
        barredIdentities: [\"spiffe://cluster.local/ns/photo/sa/web\"], podRanges: [10.8.0.0/16, \"fd00:8::/32\"]}";
    let full = mesh(&readable(&mesh_yaml(spec)), &trust_domain()).expect("the mesh is good");
    assert_eq!((full.default_mode, full.pod_ranges.len()), (TransportMode::Strict, 2));
    assert!(full.needs_token_expiry && !empty.needs_token_expiry); // policy G-6
    assert_eq!((full.same_node, full.barred_identities.len()), (SameNode::Proxied, 1));
    assert_eq!((full.trust_domain_aliases.len(), full.root_namespace.as_str()), (1, "mesh-root"));
}

#[test]
fn an_unusable_mesh_is_refused_by_field() {
    mesh_refused("{trustDomain: other.local}", "spec.trustDomain", "\"other.local\"");
    mesh_refused("{trustDomain: Cluster.Local}", "spec.trustDomain", "\"Cluster.Local\"");
    mesh_refused("{trustDomainAliases: [\"a/b\"]}", "spec.trustDomainAliases[0]", "\"a/b\"");
    mesh_refused("{trustDomainAliases: a}", "spec.trustDomainAliases", "\"a\"");
    mesh_refused("{rootNamespace: A}", "spec.rootNamespace", "\"A\"");
    mesh_refused("{defaultMode: strict}", "spec.defaultMode", "\"strict\"");
    mesh_refused("{defaultMode: “STRICT”}", "spec.defaultMode", "\"“STRICT”\""); // 0-4
    mesh_refused("{defaultMod: STRICT}", "spec.defaultMod", "\"STRICT\"");
    mesh_refused("{requireTokenExpiry: \"yes\"}", "spec.requireTokenExpiry", "\"yes\"");
    mesh_refused("{sameNode: never}", "spec.sameNode", "\"never\"");
    mesh_refused("{barredIdentities: [web]}", "spec.barredIdentities[0]", "\"web\"");
    mesh_refused("{podRanges: [10.8.0.0]}", "spec.podRanges[0]", "\"10.8.0.0\"");
    mesh_refused("{podRanges: [10.8.0.1/16]}", "spec.podRanges[0]", "\"10.8.0.1/16\"");
    mesh_refused("{podRanges: [10.8.0.0/33]}", "spec.podRanges[0]", "\"10.8.0.0/33\"");
    mesh_refused("strict", "spec", "\"strict\"");
    let other = mesh_yaml("{}").replace("name: default", "name: second");
    let refused = mesh(&readable(&other), &trust_domain()).expect_err("there is one Mesh");
    assert_eq!(refused.field, "metadata.name");
}
