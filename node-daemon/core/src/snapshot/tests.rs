use super::*;
use crate::testing::{at, empty_store, join, named, pod, replace, service, snapshot, store, unit, workload};

const NAMESPACE_OFF: &str =
    "apiVersion: v1\nkind: Namespace\nmetadata: {name: photo, labels: {culvert.io/mesh: disabled}}\n";

fn mesh(spec: &str) -> String {
    format!("apiVersion: culvert.io/v1alpha1\nkind: Mesh\nmetadata: {{name: default}}\nspec: {spec}\n")
}

/// A caller, two replicas of a server, and its service on port 80.
fn world(more: &[String]) -> Arc<Snapshot> {
    let mut documents = vec![
        pod("caller", "10.8.0.1", ""),
        pod("web-0", "10.8.0.2", "ports: [{name: http, port: 8080}]").replace("app: web-0", "app: web"),
        pod("web-1", "10.8.0.3", "ports: [{name: http, port: 9090}]").replace("app: web-1", "app: web"),
        service("web", "10.96.0.1", "web", "[{port: 80, targetPort: http}, {port: 81, targetPort: admin}]"),
    ];
    documents.extend_from_slice(more);
    snapshot(&join(&documents))
}

fn route(snapshot: &Snapshot, target: &str, seed: u64) -> Route {
    snapshot.route(&workload(snapshot, "caller"), at(target), seed)
}

/// Endpoint, identities and service of a tunnel; else the whole answer.
fn words(route: &Route) -> String {
    match route {
        Route::Tunnel { destination, endpoint, allowed, service } => {
            let accounts: Vec<String> = allowed.iter().map(SpiffeId::principal).collect();
            let service = service.as_ref().map_or_else(|| "itself".to_owned(), ToString::to_string);
            format!("tunnel to {} {endpoint} as {service}: {}", destination.name.name, accounts.join(" "))
        }
        Route::Passthrough { target } => format!("passthrough to {target}"),
        Route::Unknown => "unknown".to_owned(),
        Route::Refused(refusal) => format!("{}: {refusal}", refusal.label()),
    }
}

#[track_caller]
fn check(snapshot: &Snapshot, target: &str, expected: &str) {
    assert_eq!(words(&route(snapshot, target, 7)), expected, "{target}");
}

#[test]
fn a_pod_dialled_by_address_is_expected_to_be_itself() {
    let world = world(&[]);
    check(
        &world,
        "10.8.0.2:1234",
        "tunnel to web-0 10.8.0.2:1234 as itself: cluster.local/ns/photo/sa/web-0",
    );
    check(
        &world,
        "[::ffff:10.8.0.2]:1234",
        "tunnel to web-0 10.8.0.2:1234 as itself: cluster.local/ns/photo/sa/web-0",
    );
}

#[test]
fn a_service_leads_to_each_endpoint_on_its_own_port_and_expects_any_of_them() {
    let world = world(&[]);
    let names = "cluster.local/ns/photo/sa/web-0 cluster.local/ns/photo/sa/web-1"; // D-2
    let expected = [
        format!("tunnel to web-0 10.8.0.2:8080 as photo/web: {names}"),
        format!("tunnel to web-1 10.8.0.3:9090 as photo/web: {names}"),
    ];
    let mut seen = [0_u32; 2];
    for seed in 0..1000 {
        let words = words(&route(&world, "10.96.0.1:80", seed));
        let which = expected.iter().position(|expected| *expected == words).expect("one of the two");
        seen[which] += 1;
        assert_eq!(
            route(&world, "10.96.0.1:80", seed),
            route(&world, "10.96.0.1:80", seed),
            "by the seed alone"
        );
    }
    assert!(seen.iter().all(|count| (400..600).contains(count)), "{seen:?}");
}

#[test]
fn answers_share_their_sets() {
    let world = world(&[]);
    let Route::Tunnel { allowed: first, .. } = route(&world, "10.96.0.1:80", 1) else { panic!("a tunnel") };
    let Route::Tunnel { allowed: second, .. } = route(&world, "10.96.0.1:80", 2) else { panic!("a tunnel") };
    assert!(Arc::ptr_eq(&first, &second));
}

#[test]
fn services_without_answers_are_refused_by_reason() {
    let world = world(&[
        service("empty", "10.96.0.2", "nobody", "[{port: 80}]"),
        service("all", "10.96.0.3", "x", "[{port: 80}]").replace("{app: x}", "{}"),
        pod("six", "fd00::6", ""),
        service("six", "10.96.0.5", "six", "[{port: 80}]"),
        service("elsewhere", "10.96.0.4", "web", "[{port: 80}]")
            .replace("namespace: photo", "namespace: other"),
    ]);
    check(&world, "10.96.0.1:82", "no_such_service_port: service photo/web has no TCP port 82");
    for (target, name) in [
        ("10.96.0.1:81", "photo/web"), // no workload has a port named admin
        ("10.96.0.2:80", "photo/empty"),
        ("10.96.0.3:80", "photo/all"), // an empty selector selects nothing
        ("10.96.0.5:80", "photo/six"), // the caller has no IPv6 address
        ("10.96.0.4:80", "other/elsewhere"),
    ] {
        let reason = format!("no_endpoints: service {name} has no endpoint for this port and address family");
        check(&world, target, &reason);
    }
}

#[test]
fn the_dialled_family_goes_first() {
    let dual = pod("dual", "10.8.0.5", "").replace("\"10.8.0.5\"", "\"10.8.0.5\", \"fd00::5\"");
    let caller = pod("both", "10.8.0.6", "").replace("\"10.8.0.6\"", "\"10.8.0.6\", \"fd00::6\"");
    let world = snapshot(&join(&[
        dual,
        caller,
        pod("four", "10.8.0.7", ""),
        service("dual", "fd00:96::1", "dual", "[{port: 80}]"),
        service("four", "fd00:96::2", "four", "[{port: 80}]"),
    ]));
    let endpoint = |target: &str| words(&world.route(&workload(&world, "both"), at(target), 0));
    assert!(endpoint("[fd00:96::1]:80").starts_with("tunnel to dual [fd00::5]:80 "));
    assert!(endpoint("[fd00:96::2]:80").starts_with("tunnel to four 10.8.0.7:80 "));
    assert!(endpoint("[fd00::5]:9").starts_with("tunnel to dual [fd00::5]:9 "));
}

#[test]
fn selectors_need_all_their_labels() {
    let labelled = |name: &str, address: &str, labels: &str| {
        pod(name, address, "").replace(&format!("app: {name}"), labels)
    };
    let both = service("both", "10.96.0.9", "x", "[{port: 80}]").replace("{app: x}", "{app: x, tier: front}");
    let world = snapshot(&join(&[
        pod("caller", "10.8.0.1", ""),
        labelled("match", "10.8.0.2", "app: x, tier: front, more: a"),
        labelled("back", "10.8.0.3", "app: x, tier: back"),
        labelled("half", "10.8.0.4", "tier: front"),
        both,
    ]));
    for seed in 0..20 {
        assert!(words(&route(&world, "10.96.0.9:80", seed)).starts_with("tunnel to match "));
    }
}

#[test]
fn annotations_of_a_service_add_identities() {
    // D-2, D-3, D-9
    let annotated = service("vms", "10.96.0.2", "web", "[{port: 80}]").replace(
        "namespace: photo",
        "namespace: photo, annotations: {alpha.istio.io/kubernetes-serviceaccounts: ' vm , vm,,other', \
         alpha.istio.io/canonical-serviceaccounts: 'old.local/ns/a/sa/b, spiffe://far.local/ns/c/sa/d'}",
    );
    let world = world(&[annotated]);
    let Route::Tunnel { allowed, .. } = route(&world, "10.96.0.2:80", 0) else { panic!("a tunnel") };
    let names: Vec<_> = allowed.iter().map(SpiffeId::principal).collect();
    assert_eq!(
        names,
        [
            "cluster.local/ns/photo/sa/other",
            "cluster.local/ns/photo/sa/vm",
            "cluster.local/ns/photo/sa/web-0",
            "cluster.local/ns/photo/sa/web-1",
            "far.local/ns/c/sa/d",
            "old.local/ns/a/sa/b",
        ]
    );
}

#[test]
fn aliases_of_the_trust_domain_are_names_of_the_same_identity() {
    // D-4
    let world = world(&[mesh("{trustDomainAliases: [old.local]}")]);
    check(
        &world,
        "10.8.0.2:80",
        "tunnel to web-0 10.8.0.2:80 as itself: cluster.local/ns/photo/sa/web-0 old.local/ns/photo/sa/web-0",
    );
}

#[test]
fn a_foreign_identity_gets_no_aliases() {
    let annotated = pod("vm", "10.8.0.9", "").replace(
        "labels:",
        "annotations: {alpha.istio.io/identity: 'spiffe://far.local/ns/a/sa/b'}, labels:",
    );
    let world = world(&[annotated, mesh("{trustDomainAliases: [old.local]}")]);
    check(&world, "10.8.0.9:80", "tunnel to vm 10.8.0.9:80 as itself: far.local/ns/a/sa/b");
}

#[test]
fn an_annotation_that_names_nobody_lets_nobody_answer() {
    // D-2, D-6
    for bad in ["''", "just-a-name", "'spiffe://cluster.local/culvert/ca'", "'*'"] {
        let annotated = pod("vm", "10.8.0.9", "")
            .replace("labels:", &format!("annotations: {{alpha.istio.io/identity: {bad}}}, labels:"));
        let yaml = join(&[
            pod("caller", "10.8.0.1", ""),
            annotated,
            service("vm", "10.96.0.9", "vm", "[{port: 80}]"),
        ]);
        let (mut store, _) = store(&yaml);
        let world = store.snapshot();
        let refused = |name: &str| Route::Refused(RouteRefusal::SecureNamingEmpty(named(name)));
        assert_eq!(route(&world, "10.8.0.9:80", 0), refused("vm"), "{bad}");
        assert_eq!(route(&world, "10.96.0.9:80", 0), refused("vm"), "{bad}");
        let fields: Vec<_> = world.problems().iter().map(|problem| problem.field.as_str()).collect();
        assert_eq!(fields, ["metadata.annotations.alpha.istio.io/identity"], "{bad}");
    }
}

#[test]
fn a_bad_entry_of_a_service_annotation_is_named_and_lets_nobody_in() {
    let annotated = service("vm", "10.96.0.9", "caller", "[{port: 80}]").replace(
        "namespace: photo",
        "namespace: photo, annotations: {alpha.istio.io/kubernetes-serviceaccounts: 'a/b', \
         alpha.istio.io/canonical-serviceaccounts: '*'}",
    );
    let (mut store, _) = store(&join(&[pod("caller", "10.8.0.1", ""), annotated]));
    let world = store.snapshot();
    assert_eq!(world.problems().len(), 2);
    check(
        &world,
        "10.96.0.9:80",
        "tunnel to caller 10.8.0.1:80 as photo/vm: cluster.local/ns/photo/sa/caller",
    );
}

#[test]
fn what_is_not_enrolled_is_reached_in_the_clear() {
    let world = world(&[NAMESPACE_OFF.to_owned()]);
    check(&world, "10.8.0.2:80", "passthrough to 10.8.0.2:80");
    assert!(words(&route(&world, "10.96.0.1:80", 0)).starts_with("passthrough to 10.8.0."));
    assert_eq!(world.local().count(), 0);
}

#[test]
fn an_address_of_the_pod_ranges_that_nobody_knows_is_held() {
    let world = world(&[mesh("{podRanges: [10.8.0.0/16, \"fd00:8::/32\"]}")]);
    check(&world, "10.8.255.255:80", "unknown");
    check(&world, "[fd00:8::1]:80", "unknown");
    check(&world, "[::ffff:10.8.0.99]:80", "unknown");
    check(&world, "10.9.0.1:80", "passthrough to 10.9.0.1:80");
    check(&world, "[fd00:9::1]:80", "passthrough to [fd00:9::1]:80");
}

#[test]
fn nobody_is_led_to_itself_or_to_loopback() {
    // T-6
    let world = world(&[]);
    for target in [
        "10.8.0.1:80",
        "127.0.0.1:80",
        "127.8.8.8:15008",
        "[::1]:80",
        "0.0.0.0:80",
        "[::]:80",
        "[::ffff:127.0.0.1]:1",
    ] {
        check(&world, target, "own_address: the target is the caller itself, or loopback");
    }
}

#[test]
fn a_service_may_lead_to_its_own_caller() {
    let world = world(&[service("self", "10.96.0.5", "caller", "[{port: 80}]")]);
    check(
        &world,
        "10.96.0.5:80",
        "tunnel to caller 10.8.0.1:80 as photo/self: cluster.local/ns/photo/sa/caller",
    );
}

#[test]
fn a_host_address_belongs_to_who_declares_the_port() {
    let world = world(&[
        unit("web", 80),
        unit("db", 81),
        service("db", "10.96.0.6", "db", "[{port: 5432, targetPort: 81}, {port: 5433, targetPort: 80}]"),
    ]);
    let name =
        |port: u16| world.workload_at(at("10.9.0.2:0").ip(), port).map(|workload| workload.name.clone());
    assert_eq!((name(80), name(81), name(22)), (Some(named("web")), Some(named("db")), None));
    check(&world, "10.9.0.2:81", "tunnel to db 10.9.0.2:81 as itself: cluster.local/ns/photo/sa/db");
    check(&world, "10.9.0.2:22", "passthrough to 10.9.0.2:22");
    check(&world, "10.96.0.6:5432", "tunnel to db 10.9.0.2:81 as photo/db: cluster.local/ns/photo/sa/db");
    // Port 80 of that host is another workload's.
    let reason = "no_endpoints: service photo/db has no endpoint for this port and address family";
    check(&world, "10.96.0.6:5433", reason);
    // A workload of the same host is another one. T-27
    let neighbour = words(&world.route(&workload(&world, "web"), at("10.9.0.2:81"), 0));
    assert!(neighbour.starts_with("tunnel to db "), "{neighbour}");
    assert_eq!(
        world.route(&workload(&world, "web"), at("10.9.0.2:80"), 0),
        Route::Refused(RouteRefusal::OwnAddress)
    );
}

// T-27
#[test]
fn loopback_belongs_to_the_one_service_of_this_host_that_declares_the_port() {
    let world = world(&[
        unit("web", 80),
        unit("db", 81),
        unit("db-too", 81).replace("10.9.0.2", "10.9.0.3"),
        unit("far", 82).replace("node-a", "node-b"),
        unit("off", 83).replace("app: off", "culvert.io/mesh: disabled"),
    ]);
    let name = |port: u16| world.workload_at_loopback(port).map(|workload| workload.name.clone());
    assert_eq!(name(80), Some(named("web")));
    assert_eq!(name(81), None, "two declare it");
    for (port, why) in [(82, "another node's"), (83, "not enrolled"), (22, "nobody's"), (8080, "a pod's")] {
        assert_eq!(name(port), None, "{why}");
    }
    let reached = |name: &str, address: &str| workload(&world, name).is_reached_at(at(address).ip());
    for address in ["10.9.0.2:0", "127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
        assert!(reached("web", address), "{address}");
    }
    assert!(!reached("web", "10.9.0.3:0"));
    assert!(!reached("caller", "127.0.0.1:0"), "a pod's loopback is its own affair");
}

#[test]
fn a_workload_is_found_by_any_of_its_addresses_and_never_by_a_service() {
    let world = world(&[]);
    assert_eq!(
        world.workload_at(at("[::ffff:10.8.0.2]:0").ip(), 1).map(|found| found.name.clone()),
        Some(named("web-0"))
    );
    assert!(world.workload_at(at("10.96.0.1:0").ip(), 80).is_none());
    assert!(world.workload_at(at("10.8.9.9:0").ip(), 80).is_none());
}

#[test]
fn workloads_of_other_nodes_are_known_and_not_local() {
    let world = world(&[pod("far", "10.8.1.1", "").replace("node-a", "node-b")]);
    assert!(world.workload(&named("far")).is_some_and(|far| far.enrolled));
    assert!(world.local().all(|workload| workload.node == "node-a"));
    assert_eq!(world.local().count(), 3);
}

#[test]
fn while_a_file_is_unreadable_everyone_is_denied() {
    // T-19
    let (mut store, _) = store(&pod("web", "10.8.0.2", ""));
    store.apply(crate::store::Update::Unreadable { file: "policy".into(), reason: "half a file".to_owned() });
    let world = store.snapshot();
    let web = workload(&world, "web");
    for presented in [
        policy::Presented::Plaintext,
        policy::Presented::Tunnel(web.identity.clone()),
        policy::Presented::Attested(web.identity.clone()),
    ] {
        let facts = ConnectionFacts {
            presented,
            source_address: at("10.8.0.9:0").ip(),
            destination_address: at("10.8.0.2:0").ip(),
            destination_port: 80,
            destination: Arc::clone(&web),
        };
        let denial = world.authorise(&facts).expect_err("nothing is known of the policy");
        assert_eq!(denial.reason, DenialReason::PolicyUnusable);
        let headers: &[(&str, &str)] = &[];
        let tokens = policy::tokens::Tokens::none();
        let request =
            RequestFacts { method: "GET", path: Some("/"), host: None, headers: &headers, tokens: &tokens };
        let denial = world.judge_request(&facts, &request).expect_err("as the connection");
        assert_eq!((denial.reason, denial.answer().status), (DenialReason::PolicyUnusable, 403));
        let explained = world.explain(&facts, Some(&request));
        assert!(!explained.allowed && explained.reason.contains("half a file"), "{}", explained.reason);
    }
}

#[test]
fn the_way_inside_a_node_is_the_workloads_word_then_the_namespaces_then_the_meshs() {
    let mesh = |word: &str| mesh(&format!("{{sameNode: {word}}}"));
    let namespace = |word: &str| {
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: photo, labels: {{culvert.io/same-node: {word}}}}}\n"
        )
    };
    let own = |word: &str| pod("web", "10.8.0.2", &format!("sameNode: {word}"));
    let silent = pod("web", "10.8.0.2", "");
    use SameNode::{Direct, Proxied};
    for (documents, expected) in [
        (vec![silent.clone()], Direct),
        (vec![silent.clone(), mesh("proxied")], Proxied),
        (vec![silent.clone(), mesh("proxied"), namespace("direct")], Direct),
        (vec![silent, mesh("direct"), namespace("proxied")], Proxied),
        (vec![own("direct"), mesh("proxied"), namespace("proxied")], Direct),
        (vec![own("proxied"), mesh("direct"), namespace("direct")], Proxied),
    ] {
        assert_eq!(snapshot(&join(&documents)).same_node(&named("web")), expected, "{documents:?}");
    }
}

#[test]
fn nobody_speaks_as_a_barred_identity_or_to_one() {
    let mut store = empty_store();
    let documents = [pod("web", "10.8.0.2", ""), pod("db", "10.8.0.3", "")];
    assert_eq!(store.apply(replace("all", &join(&documents))), []);
    let facts = |world: &Snapshot, source: &str, destination: &str| ConnectionFacts {
        presented: policy::Presented::Attested(workload(world, source).identity.clone()),
        source_address: at("10.8.0.9:0").ip(),
        destination_address: at("10.8.0.2:0").ip(),
        destination_port: 80,
        destination: workload(world, destination),
    };
    let before = store.snapshot();
    assert!(before.authorise(&facts(&before, "web", "db")).is_ok());

    store.bar([workload(&before, "web").identity.clone()].into());
    let after = store.snapshot();
    assert!(after.number() > before.number());
    for (source, destination) in [("web", "db"), ("db", "web")] {
        let denial = after.authorise(&facts(&after, source, destination)).expect_err("one end is barred");
        assert_eq!(denial.reason, DenialReason::IdentityBarred);
        assert!(after.admit(&facts(&after, source, destination)).is_err());
    }
    let vouched = |name, client: &str| crate::attest::attest(&after, &named(name), at(client).ip());
    assert!(matches!(vouched("web", "10.8.0.2:0"), Err(crate::attest::NotAttested::Barred(_))));
    assert!(vouched("db", "10.8.0.3:0").is_ok());

    store.bar(BTreeSet::new());
    let again = store.snapshot();
    assert!(again.authorise(&facts(&again, "web", "db")).is_ok());
}

#[test]
fn ten_thousand_workloads_are_looked_up_as_one() {
    let mut documents = vec![pod("caller", "10.8.0.1", "")];
    for number in 0..10_000 {
        let address = format!("10.{}.{}.{}", 16 + number / 65_536, number / 256 % 256, number % 256);
        documents.push(pod(&format!("web-{number}"), &address, "").replace("app: web-", "app: web, n: n"));
    }
    documents.push(service("web", "10.96.0.1", "web", "[{port: 80}]"));
    let mut store = empty_store();
    assert_eq!(store.apply(replace("all", &join(&documents))), []);
    let world = store.snapshot();
    let Route::Tunnel { allowed, .. } = route(&world, "10.96.0.1:80", 3) else { panic!("a tunnel") };
    assert_eq!(allowed.len(), 10_000);
    assert_eq!(world.workloads().count(), 10_001);
}
