//! How connections leave (policy C, D, T-20): one caller, one service, and what rules say of it.

use super::*;
use crate::testing::{at, join, pod, service, store, workload};

const SERVICE: &str = "10.96.0.1:80";
const OUTSIDE: &str = "192.0.2.7:443";

/// A rule of a namespace, by host and traffic policy.
fn rule(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1alpha3\nkind: DestinationRule\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

fn tls(tls: &str) -> String {
    format!("host: web, trafficPolicy: {{tls: {{{tls}}}}}")
}

fn entry(namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n\
         metadata: {{name: outside, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

fn world(more: &[String]) -> Arc<Snapshot> {
    store(&join(&documents(more))).0.snapshot()
}

fn documents(more: &[String]) -> Vec<String> {
    let mut documents = vec![
        "apiVersion: culvert.io/v1alpha1\nkind: Mesh\nmetadata: {name: default}\n\
         spec: {podRanges: [10.8.0.0/16], rootNamespace: root}\n"
            .to_owned(),
        pod("caller", "10.8.0.1", ""),
        pod("web", "10.8.0.2", "ports: [{name: http, port: 8080}]")
            .replace("app: web", "app: web, version: v1, canary: x"),
        pod("naked", "10.8.0.3", "ports: [{name: http, port: 8080}]")
            .replace("app: naked", "app: naked, culvert.io/mesh: disabled"),
        pod("sidecar", "10.8.0.4", "ports: [{name: http, port: 8080}]").replace(
            "app: sidecar",
            "app: sidecar, culvert.io/mesh: disabled, security.istio.io/tlsMode: istio",
        ),
        service("web", "10.96.0.1", "web", "[{port: 80, targetPort: 8080}, {port: 81, targetPort: 8080}]"),
        service("naked", "10.96.0.2", "naked", "[{port: 80, targetPort: 8080}]"),
        service("sidecar", "10.96.0.3", "sidecar", "[{port: 80, targetPort: 8080, name: grpc}]"),
        service("bare", "None", "web", "[{port: 8081, targetPort: 8081}]"),
    ];
    documents.extend_from_slice(more);
    documents
}

/// Way, what is spoken, and who decided.
fn words(leaving: &Leaving) -> String {
    let spoken = leaving.originated.as_ref().map_or_else(String::new, |spoken| {
        let sni = spoken.sni.as_deref().unwrap_or("nothing");
        let http2 = if spoken.is_http2 { " h2" } else { "" };
        let proof = match &spoken.proof {
            Proof::Mesh(allowed) => {
                format!("mesh {}", allowed.iter().map(SpiffeId::principal).collect::<Vec<_>>().join(" "))
            }
            Proof::Files { files, names } => {
                let files = files.as_ref().map_or_else(
                    || "system".to_owned(),
                    |files| {
                        let paths = [&files.ca_certificates, &files.client_certificate, &files.private_key];
                        let paths: Vec<&str> = paths.map(|path| path.as_deref().unwrap_or("-")).to_vec();
                        format!("{} of {}", paths.join(","), files.namespace)
                    },
                );
                format!("{files} {names:?}")
            }
        };
        format!(" as {sni}{http2} by {proof}")
    });
    let decided = leaving.decided.as_ref().map_or_else(String::new, |decided| format!(" [{}]", decided.rule));
    match &leaving.route {
        Route::Tunnel { endpoint, allowed, .. } => {
            let allowed: Vec<String> = allowed.iter().map(SpiffeId::principal).collect();
            format!("tunnel {endpoint} to {}{spoken}{decided}", allowed.join(" "))
        }
        Route::Passthrough { target } => format!("straight {target}{spoken}{decided}"),
        Route::Unknown => "unknown".to_owned(),
        Route::Refused(refusal) => format!("{}: {refusal}", refusal.label()),
    }
}

#[track_caller]
fn check(documents: &[String], target: &str, expected: &str) {
    let world = world(documents);
    let leaving = world.leave(&workload(&world, "caller"), at(target), 7);
    let words = words(&leaving);
    assert!(words.starts_with(expected), "{target}\n found {words}\nwanted {expected}");
}

const WEB: &str = "tunnel 10.8.0.2:8080 to cluster.local/ns/photo/sa/web";

#[test]
fn between_enrolled_workloads_the_tunnel_is_spoken_without_being_told() {
    check(&[], SERVICE, WEB); // policy C, DESIGN 3.4.7
    check(&[], "10.8.0.2:8080", WEB);
    check(&[], "10.96.0.2:80", "straight 10.8.0.3:8080");
    check(&[], OUTSIDE, "straight 192.0.2.7:443");
    check(&[], "10.8.9.9:1", "unknown");
}

#[test]
fn what_another_kind_of_proxy_serves_gets_mesh_tls_on_its_own_port() {
    let expected = "straight 10.8.0.4:8080 as outbound_.80_._.sidecar.photo.svc.cluster.local h2 by mesh cluster.local/ns/photo/sa/sidecar";
    check(&[], "10.96.0.3:80", expected); // policy C
    let disable = rule("photo", "d", "host: sidecar, trafficPolicy: {tls: {mode: DISABLE}}");
    check(&[disable], "10.96.0.3:80", "straight 10.8.0.4:8080 [spec.trafficPolicy.tls: DISABLE]");
}

#[test]
fn an_explicit_rule_always_wins_also_when_it_is_wrong() {
    // policy C
    let by_file = "caCertificates: ca.pem";
    let mutual = "clientCertificate: c.pem, privateKey: k.pem";
    let table = [
        ("mode: DISABLE", "straight 10.8.0.2:8080 [spec.trafficPolicy.tls: DISABLE]".to_owned()),
        ("mode: ISTIO_MUTUAL", format!("{WEB} [spec.trafficPolicy.tls: ISTIO_MUTUAL]")),
        ("mode: ISTIO_MUTUAL, subjectAltNames: [\"spiffe://cluster.local/ns/x/sa/y\"]",
         "tunnel 10.8.0.2:8080 to cluster.local/ns/x/sa/y [".to_owned()),
        ("mode: ISTIO_MUTUAL, subjectAltNames: [web.example]",
         "client_rule: DestinationRule/photo/d denies it: spec.trafficPolicy.tls.subjectAltNames names no identity".to_owned()),
        ("mode: SIMPLE",
         "straight 10.8.0.2:8080 as web.photo.svc.cluster.local by system Host(\"web.photo.svc.cluster.local\") [spec.trafficPolicy.tls: SIMPLE]".to_owned()),
        ("mode: SIMPLE, sni: a.example", "straight 10.8.0.2:8080 as a.example by system Host(\"a.example\")".to_owned()),
        ("mode: SIMPLE, subjectAltNames: [b.example]",
         "straight 10.8.0.2:8080 as web.photo.svc.cluster.local by system OneOf([\"b.example\"])".to_owned()),
    ];
    for (written, expected) in table {
        check(&[rule("photo", "d", &tls(written))], SERVICE, &expected);
    }
    check(
        &[rule("photo", "d", &tls(&format!("mode: SIMPLE, {by_file}, {mutual}")))],
        SERVICE,
        "straight 10.8.0.2:8080 as web.photo.svc.cluster.local by ca.pem,-,- of photo Host",
    );
    check(
        &[rule("photo", "d", &tls(&format!("mode: MUTUAL, {by_file}, {mutual}")))],
        SERVICE,
        "straight 10.8.0.2:8080 as web.photo.svc.cluster.local by ca.pem,c.pem,k.pem of photo Host",
    );
}

#[test]
fn a_rule_that_cannot_be_used_denies_its_host_and_no_other() {
    // T-20
    let unusable = [
        "mode: OFF",
        "mode: MUTUAL",
        "mode: MUTUAL, privateKey: k.pem",
        "mode: SIMPLE, insecureSkipVerify: true",
        "mode: SIMPLE, credentialName: secret",
        "mode: SIMPLE, subjectAltNames: web",
    ];
    for written in unusable {
        let broken = rule("photo", "d", &tls(written));
        let expected =
            "client_rule: DestinationRule/photo/d denies it: the rule for this host cannot be used";
        check(std::slice::from_ref(&broken), SERVICE, expected);
        check(std::slice::from_ref(&broken), "10.96.0.1:81", expected);
        check(&[broken], "10.96.0.2:80", "straight 10.8.0.3:8080");
    }
}

#[test]
fn subset_before_port_before_rule_and_blocks_are_not_merged() {
    // policy C
    let with = |more: &str| {
        rule(
            "photo",
            "d",
            &format!(
                "{}, {more}",
                tls("mode: DISABLE").trim_end_matches('}').to_owned()
                    + "}, portLevelSettings: [{port: {number: 80}, tls: {mode: ISTIO_MUTUAL}}, {port: {number: 81}}]}"
            ),
        )
    };
    let plain = with("subsets: []");
    check(
        std::slice::from_ref(&plain),
        SERVICE,
        &format!("{WEB} [spec.trafficPolicy.portLevelSettings[80].tls"),
    );
    // A block without tls asks for none: what holds without a rule holds.
    check(&[plain], "10.96.0.1:81", WEB);
    let of = |name: &str, labels: &str, mode: &str| {
        format!("{{name: {name}, labels: {{{labels}}}, trafficPolicy: {{tls: {{mode: {mode}}}}}}}")
    };
    let v1 = of("v1", "version: v1", "DISABLE");
    let disabled = "straight 10.8.0.2:8080 [spec.subsets[v1].trafficPolicy.tls: DISABLE]";
    check(&[with(&format!("subsets: [{v1}]"))], SERVICE, disabled);
    let v2 = of("v2", "version: v2", "SIMPLE");
    check(&[with(&format!("subsets: [{v2}, {v1}]"))], SERVICE, disabled);
    let other = of("canary", "canary: x", "SIMPLE");
    check(
        &[with(&format!("subsets: [{v1}, {other}]"))],
        SERVICE,
        "client_rule: DestinationRule/photo/d denies it: the endpoint belongs to the subsets canary, v1",
    );
    let agreeing = of("canary", "canary: x", "DISABLE");
    check(
        &[with(&format!("subsets: [{v1}, {agreeing}]"))],
        SERVICE,
        "straight 10.8.0.2:8080 [spec.subsets[canary]",
    );
    // Without labels no endpoint belongs to it.
    check(&[with(&format!("subsets: [{}]", of("all", "", "DISABLE")))], SERVICE, WEB);
}

#[test]
fn one_rule_counts_the_clients_then_the_services_then_the_roots() {
    // policy C
    let host = "web.photo.svc.cluster.local";
    let of = |namespace: &str, name: &str, host: &str, mode: &str| {
        rule(namespace, name, &format!("host: \"{host}\", trafficPolicy: {{tls: {{mode: {mode}}}}}"))
    };
    let root = of("root", "r", host, "DISABLE");
    check(std::slice::from_ref(&root), SERVICE, "straight 10.8.0.2:8080 [");
    check(&[root.clone(), of("photo", "p", "*.local", "ISTIO_MUTUAL")], SERVICE, WEB);
    check(&[of("photo", "p", "*.local", "DISABLE"), of("photo", "q", "web", "ISTIO_MUTUAL")], SERVICE, WEB);
    check(&[of("elsewhere", "e", host, "DISABLE")], SERVICE, WEB);
    check(&[of("photo", "b", host, "DISABLE"), of("photo", "a", host, "ISTIO_MUTUAL")], SERVICE, WEB);
    // A short name is of the rule's own namespace.
    check(&[of("root", "r", "web", "DISABLE")], SERVICE, WEB);
}

#[test]
fn a_service_without_an_address_is_known_by_its_pods() {
    let disable = rule("photo", "d", "host: bare, trafficPolicy: {tls: {mode: DISABLE}}");
    check(std::slice::from_ref(&disable), "10.8.0.2:8081", "straight 10.8.0.2:8081 [");
    check(std::slice::from_ref(&disable), "10.8.0.2:8080", WEB);
    check(&[disable], SERVICE, WEB);
}

const API: &str = "hosts: [api.example.com], addresses: [192.0.2.7], ports: [{number: 443, name: tls}]";

#[test]
fn a_host_outside_is_known_by_the_entry_of_the_clients_namespace() {
    // policy D-4
    let simple = rule("photo", "d", "host: api.example.com, trafficPolicy: {tls: {mode: SIMPLE}}");
    let spoken = "straight 192.0.2.7:443 as api.example.com by system Host(\"api.example.com\")";
    check(&[entry("photo", API)], OUTSIDE, "straight 192.0.2.7:443");
    check(&[entry("photo", API), simple.clone()], OUTSIDE, spoken);
    check(&[entry("root", API), simple.clone()], OUTSIDE, spoken);
    // A tenant leads nobody else's connections.
    check(&[entry("elsewhere", API), simple.clone()], OUTSIDE, "straight 192.0.2.7:443");
    check(std::slice::from_ref(&simple), OUTSIDE, "straight 192.0.2.7:443");
    // Another port of the same address is left alone.
    check(&[entry("photo", API), simple.clone()], "192.0.2.7:80", "straight 192.0.2.7:80");
    let named = format!("{API}, subjectAltNames: [a, b]");
    check(
        &[entry("photo", &named), simple.clone()],
        OUTSIDE,
        "straight 192.0.2.7:443 as api.example.com by system OneOf([\"a\", \"b\"])",
    );
    let fixed =
        format!("{API}, resolution: STATIC, endpoints: [{{address: 192.0.2.9, ports: {{tls: 8443}}}}]");
    check(&[entry("photo", &fixed), simple], OUTSIDE, "straight 192.0.2.9:8443 as api.example.com");
    let wild = rule("photo", "d", "host: \"*.example.com\", trafficPolicy: {tls: {mode: DISABLE}}");
    check(&[entry("photo", API), wild], OUTSIDE, "straight 192.0.2.7:443 [");
    let mesh = rule("photo", "d", "host: api.example.com, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}");
    check(&[entry("photo", API), mesh], OUTSIDE, "secure_naming_empty"); // policy D-6
}

#[test]
fn entries_that_cannot_be_followed_by_address_are_refused() {
    let table = [
        ("hosts: [a.example, b.example], addresses: [192.0.2.7], ports: [{number: 1}]", "spec.hosts"),
        ("hosts: [\"*.example\"], addresses: [192.0.2.7], ports: [{number: 1}]", "spec.hosts[0]"),
        ("addresses: [192.0.2.7], ports: [{number: 1}]", "spec.hosts"),
        ("hosts: [a.example], ports: [{number: 1}]", "spec"),
        ("hosts: [a.example], addresses: [192.0.2.0/24], ports: [{number: 1}]", "spec.addresses[0]"),
        ("hosts: [a.example], addresses: [127.0.0.1], ports: [{number: 1}]", "spec.addresses[0]"),
        ("hosts: [a.example], addresses: [192.0.2.7]", "spec.ports"),
        ("hosts: [a.example], addresses: [192.0.2.7], ports: [{number: 0}]", "spec.ports[0].number"),
        ("hosts: [a.example], addresses: [192.0.2.7], ports: [{number: 1}, {number: 1}]", "spec.ports[1]"),
        (
            "hosts: [a.example], addresses: [192.0.2.7], ports: [{number: 1}], resolution: DNS",
            "spec.resolution",
        ),
        (
            "hosts: [a.example], addresses: [192.0.2.7], ports: [{number: 1}], resolution: STATIC",
            "spec.endpoints",
        ),
        (
            "hosts: [a.example], addresses: [192.0.2.7], ports: [{number: 1}], endpoints: [{address: 192.0.2.9}]",
            "spec.endpoints",
        ),
        ("hosts: [a.example], addresses: [192.0.2.7], ports: [{number: 1}], location: MARS", "spec.location"),
        (
            "hosts: [a.example], addresses: [192.0.2.7], ports: [{number: 1}], exportTo: [\".\"]",
            "spec.exportTo",
        ),
    ];
    for (spec, field) in table {
        let mut store = crate::testing::empty_store();
        let problems = store.apply(crate::testing::replace("a.yaml", &entry("photo", spec)));
        assert_eq!(
            problems.iter().map(|problem| problem.field.as_str()).collect::<Vec<_>>(),
            [field],
            "{spec}"
        );
    }
}

#[test]
fn an_entry_for_an_address_of_the_mesh_is_left_out_and_said() {
    for address in ["10.96.0.1", "10.8.0.2", "10.8.7.7"] {
        let steal =
            entry("photo", &format!("hosts: [a.example], addresses: [{address}], ports: [{{number: 80}}]"));
        let (mut store, problems) = store(&join(&documents(&[steal])));
        assert_eq!(problems, [], "it can be read");
        let snapshot = store.snapshot();
        let reasons: Vec<&str> = snapshot.problems().iter().map(|problem| problem.reason.as_str()).collect();
        let expected = format!(
            "{address} is an address of the mesh, and is left out here: give each address one meaning"
        );
        assert_eq!(reasons, [expected]);
    }
}

#[test]
fn more_identities_may_come_fewer_may_not() {
    let spoken = |names: &[&str], sni: &str| Originated {
        sni: Some(sni.to_owned()),
        proof: Proof::Mesh(Arc::new(names.iter().map(|name| name.parse().expect("a name")).collect())),
        is_http2: false,
    };
    let (a, b) = ("spiffe://td/ns/a/sa/a", "spiffe://td/ns/a/sa/b");
    let host = |name: &str| Originated {
        sni: None,
        proof: Proof::Files { files: None, names: Names::Host(name.to_owned()) },
        is_http2: false,
    };
    assert!(spoken(&[a], "x").may_go_on(&spoken(&[a, b], "x"))); // T-18
    assert!(!spoken(&[a, b], "x").may_go_on(&spoken(&[a], "x")));
    assert!(!spoken(&[a], "x").may_go_on(&spoken(&[a], "y")));
    assert!(!spoken(&[a], "x").may_go_on(&host("x")));
    assert!(!host("x").may_go_on(&host("y")));
    assert!(host("x").may_go_on(&host("x")));
}
