use proptest::prelude::*;

use super::*;
use crate::testing::{empty_store, join, named, pod, replace, service, snapshot, unit};

fn policy(name: &str, action: &str, rules: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: photo}}\n\
         spec: {{selector: {{matchLabels: {{app: db}}}}, action: {action}, rules: {rules}}}\n"
    )
}

fn mode(mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: photo}}\n\
         spec: {{mtls: {{mode: {mode}}}}}\n"
    )
}

/// A caller, a server with an HTTP port and an opaque one, and more.
fn world(more: &[String]) -> Arc<Snapshot> {
    let mut documents = vec![
        pod("web", "10.8.1.4", ""),
        pod("cron", "10.8.1.6", ""),
        pod("db", "10.8.1.5", "ports: [{name: http, port: 80}, {port: 5432}]"),
    ];
    documents.extend_from_slice(more);
    snapshot(&join(&documents))
}

/// The verdict of `web` to `db` at one port.
#[track_caller]
fn check(more: &[String], port: u16, expected: PairVerdict) {
    let table = PairTable::desired(&world(more)).expect("a small world");
    assert_eq!(table.verdict(&named("web"), &named("db"), port), expected, "port {port}: {more:?}");
}

use PairVerdict::{Ask, Deny, Permit};

const CRON: &str = "[{from: [{source: {principals: [cluster.local/ns/photo/sa/cron]}}]}]";

#[test]
fn without_a_rule_the_kernel_permits_what_the_policy_permits() {
    for port in [80, 5432, 9, 65_535] {
        check(&[], port, Permit);
        check(&[mode("STRICT")], port, Permit);
        check(&[mode("PERMISSIVE")], port, Permit);
        check(&[mode("DISABLE")], port, Permit);
    }
}

#[test]
fn what_layer_4_denies_the_kernel_denies() {
    for port in [80, 5432, 9] {
        check(&[policy("only-cron", "ALLOW", CRON)], port, Deny);
    }
    let ports = "[{to: [{operation: {ports: [\"81\"]}}]}]";
    // A port that nobody declares, told apart by the rule alone.
    check(&[policy("not-81", "DENY", ports)], 81, Deny);
    check(&[policy("not-81", "DENY", ports)], 82, Permit);
    check(&[policy("only-81", "ALLOW", ports)], 81, Permit);
    check(&[policy("only-81", "ALLOW", ports)], 5432, Deny);
}

#[test]
fn what_only_a_request_can_answer_is_asked() {
    let get = policy("get", "ALLOW", "[{to: [{operation: {methods: [GET]}}]}]");
    check(std::slice::from_ref(&get), 80, Ask);
    // On a port that is not HTTP it grants nothing: certain.
    check(&[get], 5432, Deny);
    let tokens = "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: t, namespace: photo}\n\
        spec: {jwtRules: [{issuer: a, jwks: '{\"keys\": []}'}]}\n";
    check(&[tokens.to_owned()], 80, Ask);
    let audit = policy("audit", "AUDIT", "[{to: [{operation: {methods: [GET]}}]}]");
    check(&[audit], 80, Ask);
}

#[test]
fn a_source_address_that_a_rule_looks_at_counts_for_all_that_the_source_has() {
    let by = |range: &str| {
        policy("range", "ALLOW", &format!("[{{from: [{{source: {{ipBlocks: [\"{range}\"]}}}}]}}]"))
    };
    check(&[by("10.8.1.4/32")], 5432, Permit);
    check(&[by("10.8.1.6/32")], 5432, Deny);
    // The same account at two addresses, one of which may.
    let two = |range: &str| {
        let documents = [
            pod("web", "10.8.1.4", "").replace("\"10.8.1.4\"", "\"10.8.1.4\", \"10.8.1.7\""),
            pod("twin", "10.8.1.8", "").replace("serviceAccount: twin", "serviceAccount: web"),
            pod("db", "10.8.1.5", ""),
            by(range),
        ];
        PairTable::desired(&snapshot(&join(&documents))).expect("a small world")
    };
    for (range, web, twin) in
        [("10.8.1.7/32", Ask, Deny), ("10.8.1.8/32", Deny, Permit), ("10.8.1.0/24", Permit, Permit)]
    {
        let table = two(range);
        assert_eq!(table.verdict(&named("web"), &named("db"), 1), web, "{range}");
        assert_eq!(table.verdict(&named("twin"), &named("db"), 1), twin, "{range}");
    }
}

#[test]
fn either_end_may_want_the_proxy() {
    let proxied = |name: &str, address: &str| pod(name, address, "sameNode: proxied");
    for documents in [
        [proxied("web", "10.8.1.4"), pod("db", "10.8.1.5", "")],
        [pod("web", "10.8.1.4", ""), proxied("db", "10.8.1.5")],
    ] {
        let table = PairTable::desired(&snapshot(&join(&documents))).expect("a small world");
        assert_eq!(table.verdict(&named("web"), &named("db"), 80), Ask);
    }
    let mesh =
        "apiVersion: culvert.io/v1alpha1\nkind: Mesh\nmetadata: {name: default}\nspec: {sameNode: proxied}\n";
    check(&[mesh.to_owned()], 80, Ask);
}

#[test]
fn what_is_no_pod_of_this_node_is_in_no_table() {
    let world = world(&[
        unit("disk", 81),
        pod("far", "10.8.2.4", "").replace("node-a", "node-b"),
        pod("off", "10.8.1.9", "").replace("app: off", "culvert.io/mesh: disabled"),
    ]);
    let table = PairTable::desired(&world).expect("a small world");
    for name in ["disk", "far", "off", "nobody"] {
        assert_eq!(table.verdict(&named("web"), &named(name), 81), Ask, "to {name}");
        assert_eq!(table.verdict(&named(name), &named("db"), 80), Ask, "from {name}");
    }
}

#[test]
fn the_tunnels_port_is_never_passed_by() {
    check(&[], TUNNEL_PORT, Ask);
    check(&[policy("only-cron", "ALLOW", CRON)], TUNNEL_PORT, Ask);
}

#[test]
fn who_may_not_answer_as_itself_is_left_to_the_relay() {
    let renamed = pod("db", "10.8.1.5", "").replace(
        "namespace: photo,",
        "namespace: photo, annotations: {alpha.istio.io/identity: cluster.local/ns/photo/sa/other},",
    );
    let table = PairTable::desired(&snapshot(&join(&[pod("web", "10.8.1.4", ""), renamed]))).expect("small");
    assert_eq!(table.verdict(&named("web"), &named("db"), 80), Ask);
}

#[test]
fn a_clients_rule_for_a_headless_service_is_the_daemons_business() {
    let headless = service("dbs", "None", "db", "[{name: tcp, port: 5432}]");
    let rule = |mode: &str| {
        format!(
            "apiVersion: networking.istio.io/v1alpha3\nkind: DestinationRule\nmetadata: {{name: dbs, namespace: photo}}\n\
             spec: {{host: dbs.photo.svc.cluster.local, trafficPolicy: {{tls: {{mode: {mode}}}}}}}\n"
        )
    };
    check(std::slice::from_ref(&headless), 5432, Permit);
    check(&[headless.clone(), rule("ISTIO_MUTUAL")], 5432, Permit);
    check(&[headless.clone(), rule("DISABLE")], 5432, Ask);
    check(&[headless, rule("DISABLE")], 80, Permit);
}

#[test]
fn a_barred_identity_is_denied_at_either_end() {
    let mut store = empty_store();
    assert_eq!(
        store.apply(replace("all", &join(&[pod("web", "10.8.1.4", ""), pod("db", "10.8.1.5", "")]))),
        []
    );
    let before = PairTable::desired(&store.snapshot()).expect("small");
    assert_eq!(before.verdict(&named("web"), &named("db"), 80), Permit);
    store.bar(["spiffe://cluster.local/ns/photo/sa/web".parse().expect("an identity")].into());
    let after = PairTable::desired(&store.snapshot()).expect("small");
    assert_eq!(after.verdict(&named("web"), &named("db"), 80), Deny);
    assert_eq!(after.verdict(&named("db"), &named("web"), 80), Deny);
}

#[test]
fn while_a_file_is_unreadable_the_daemon_is_asked() {
    // T-19
    let mut store = empty_store();
    assert_eq!(
        store.apply(replace("all", &join(&[pod("web", "10.8.1.4", ""), pod("db", "10.8.1.5", "")]))),
        []
    );
    store.apply(crate::store::Update::Unreadable { file: "policy".into(), reason: "half a file".to_owned() });
    assert_eq!(PairTable::desired(&store.snapshot()), Ok(PairTable::default()));
}

#[test]
fn sources_with_equal_rights_share_a_class() {
    let pods: Vec<String> =
        (0..50_u8).map(|n| pod(&format!("pod-{n}"), &format!("10.8.3.{n}"), "")).collect();
    let open = PairTable::desired(&snapshot(&join(&pods))).expect("small");
    assert_eq!(open.sources.len(), 50);
    // One class, and two entries for each destination: all ports, and the tunnel's.
    assert_eq!(open.pairs.len(), 100);
    let closed = PairTable::desired(&world(&[policy("only-cron", "ALLOW", CRON)])).expect("small");
    assert_ne!(closed.sources[&named("web")], closed.sources[&named("cron")]);
    assert_eq!(closed.sources[&named("web")], closed.sources[&named("db")]);
}

#[test]
fn at_a_limit_there_is_no_table() {
    let world = world(&[]);
    // Three groups ask about 1 + 1 + 3 ports; one class has three sources and six entries.
    assert_eq!(PairTable::within(&world, 14, 100), Err(NoTable::TooManyQuestions));
    assert_eq!(PairTable::within(&world, 15, 8), Err(NoTable::TooManyPairs));
    assert!(PairTable::within(&world, 15, 9).is_ok());
}

/// Rules in which each part of the policy has its say.
fn any_documents() -> impl Strategy<Value = Vec<String>> {
    let name = prop::sample::select(vec!["a", "b", "c"]);
    let one_pod = (
        prop::sample::select(vec![
            "",
            "ports: [{name: http, port: 80}]",
            "ports: [{port: 81}]",
            "sameNode: proxied",
        ]),
        prop::sample::select(vec!["a", "b", "c"]),
        any::<bool>(),
    );
    let pods = prop::collection::vec(one_pod, 3);
    let rule = prop::sample::select(vec![
        "[{}]",
        "[{from: [{source: {principals: [cluster.local/ns/photo/sa/a]}}]}]",
        "[{from: [{source: {notPrincipals: [cluster.local/ns/photo/sa/a]}}]}]",
        "[{from: [{source: {ipBlocks: [10.8.1.0/31]}}]}]",
        "[{from: [{source: {notIpBlocks: [\"fd00::1/128\"]}}]}]",
        "[{to: [{operation: {ports: [\"82\"]}}]}]",
        "[{to: [{operation: {notPorts: [\"80\"]}}]}]",
        "[{to: [{operation: {methods: [GET]}}]}]",
        "[{when: [{key: destination.port, values: [\"83\"]}]}]",
        "[{when: [{key: destination.ip, values: [10.8.1.1]}]}]",
        "[{when: [{key: source.namespace, notValues: [photo]}]}]",
    ]);
    let action = prop::sample::select(vec!["ALLOW", "DENY", "AUDIT"]);
    let rules = prop::collection::vec((action, rule, name), 0..4);
    let modes = prop::option::of(prop::sample::select(vec!["STRICT", "PERMISSIVE", "DISABLE"]));
    (pods, rules, modes).prop_map(|(pods, rules, transport)| {
        let mut documents: Vec<String> = pods
            .into_iter()
            .zip(["a", "b", "c"])
            .enumerate()
            .map(|(index, ((more, account, dual), name))| {
                let v4 = format!("10.8.1.{index}");
                let addresses =
                    if dual { format!("\"{v4}\", \"fd00::{index}\"") } else { format!("\"{v4}\"") };
                pod(name, &v4, more)
                    .replace(&format!("\"{v4}\""), &addresses)
                    .replace(&format!("serviceAccount: {name}"), &format!("serviceAccount: {account}"))
            })
            .collect();
        documents.extend(rules.into_iter().enumerate().map(|(index, (action, rules, app))| {
            policy(&format!("p{index}"), action, rules).replace("app: db", &format!("app: {app}"))
        }));
        documents.extend(transport.map(mode));
        documents
    })
}

proptest! {
    #[test]
    fn the_table_says_what_the_relay_would(documents in any_documents()) {
        let world = snapshot(&join(&documents));
        let table = PairTable::desired(&world).expect("a small world");
        for source in world.local() {
            for destination in world.local().filter(|destination| destination.name != source.name) {
                for port in [1, 79, 80, 81, 82, 83, 84, TUNNEL_PORT, 65_535] {
                    let verdict = table.verdict(&source.name, &destination.name, port);
                    let answers = relayed(&world, source, destination, port);
                    let wants_proxy =
                        [source, destination].iter().any(|end| world.same_node(&end.name) == SameNode::Proxied);
                    let expected = match answers.as_slice() {
                        _ if wants_proxy || port == TUNNEL_PORT => Ask,
                        [first, rest @ ..] if rest.iter().all(|other| other == first) => *first,
                        _ => Ask,
                    };
                    prop_assert_eq!(verdict, expected, "{} to {}:{}", source.name, destination.name, port);
                }
            }
        }
    }
}

/// What the daemon would answer, for every pair of addresses by which these two can meet.
fn relayed(
    world: &Snapshot,
    source: &Arc<Workload>,
    destination: &Arc<Workload>,
    port: u16,
) -> Vec<PairVerdict> {
    let mut answers = Vec::new();
    for to in &destination.addresses {
        for from in source.addresses.iter().filter(|from| from.is_ipv4() == to.is_ipv4()) {
            let facts = ConnectionFacts {
                presented: Presented::Attested(source.identity.clone()),
                source_address: *from,
                destination_address: *to,
                destination_port: port,
                destination: Arc::clone(destination),
            };
            answers.push(match world.admit(&facts) {
                Ok(Admission::Stream(_)) => Permit,
                Ok(Admission::Requests) => Ask,
                Err(_) => Deny,
            });
        }
    }
    answers
}

#[test]
fn two_hundred_pods_are_one_table() {
    let mut documents: Vec<String> = (0..200_u8)
        .map(|n| {
            pod(&format!("pod-{n}"), &format!("10.8.3.{n}"), "ports: [{name: http, port: 80}, {port: 81}]")
        })
        .collect();
    documents.extend((0..200).map(|n| {
        let rules = format!("[{{from: [{{source: {{principals: [cluster.local/ns/photo/sa/pod-{n}]}}}}]}}]");
        policy(&format!("p{n}"), "ALLOW", &rules).replace("app: db", &format!("app: pod-{}", (n + 1) % 200))
    }));
    let world = snapshot(&join(&documents));
    let table = PairTable::desired(&world).expect("within the limits");
    assert_eq!(table.sources.len(), 200);
    assert_eq!(table.verdict(&named("pod-0"), &named("pod-1"), 81), Permit);
    assert_eq!(table.verdict(&named("pod-0"), &named("pod-2"), 81), Deny);
    assert!(table.pairs.len() >= 80_000, "each of them has rights of its own");
}
