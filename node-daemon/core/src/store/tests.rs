use proptest::prelude::*;

use super::*;
use crate::{
    testing::{FILE, empty_store, join, named, pod, replace, service, store, unit, workload},
    workload::TransportMode,
};

const MESH: &str = "apiVersion: culvert.io/v1alpha1\nkind: Mesh\nmetadata: {name: default}\n";

/// Names and first addresses of the workloads in force.
fn known(store: &mut Store) -> Vec<String> {
    let snapshot = store.snapshot();
    let line = |workload: &Arc<crate::workload::Workload>| {
        format!("{} {}", workload.name.name, workload.addresses.first().expect("at least one address"))
    };
    snapshot.workloads().map(line).collect()
}

/// The first problem that an update causes, as one sentence.
#[track_caller]
fn problem(store: &mut Store, update: Update) -> String {
    let problems = store.apply(update);
    problems.first().expect("the update has a problem").to_string()
}

#[track_caller]
fn applies(store: &mut Store, file: &str, yaml: &str) {
    assert_eq!(store.apply(replace(file, yaml)), []);
}

fn unreadable(file: &str) -> Update {
    Update::Unreadable { file: file.into(), reason: "line 3: not YAML".to_owned() }
}

#[test]
fn workloads_come_change_and_go_with_their_file() {
    let mut store = empty_store();
    applies(&mut store, "a", &join(&[pod("web", "10.8.1.4", ""), pod("db", "10.8.1.5", "")]));
    assert_eq!(known(&mut store), ["db 10.8.1.5", "web 10.8.1.4"]);
    applies(&mut store, "a", &pod("web", "10.8.1.6", ""));
    assert_eq!(known(&mut store), ["web 10.8.1.6"]);
    assert_eq!(store.apply(Update::Remove { file: "a".into() }), []);
    assert_eq!(known(&mut store), [""; 0]);
}

#[test]
fn a_snapshot_has_a_number_of_its_own_and_is_shared_until_something_changes() {
    let (mut store, _) = store(&pod("web", "10.8.1.4", ""));
    let first = store.snapshot();
    assert!(Arc::ptr_eq(&first, &store.snapshot()));
    store.apply(replace("other", &pod("db", "10.8.1.5", "")));
    let second = store.snapshot();
    assert!(second.number() > first.number());
    assert!(Arc::ptr_eq(&workload(&first, "web"), &workload(&second, "web")), "unchanged ones are shared");
}

#[test]
fn a_bad_version_leaves_the_good_one_in_force() {
    let (mut store, _) = store(&join(&[pod("web", "10.8.1.4", ""), pod("db", "10.8.1.5", "")]));
    let bad = join(&[pod("web", "10.8.1.400", ""), pod("db", "10.8.1.6", "")]);
    assert_eq!(
        problem(&mut store, replace(FILE, &bad)),
        "mesh.yaml document 0: Workload photo/web: spec.addresses[0]: found \"10.8.1.400\", expected an IPv4 or \
         IPv6 address: write an address such as 10.8.1.4 or \"fd00::4\"; the version before stays in force"
    );
    assert_eq!(known(&mut store), ["db 10.8.1.6", "web 10.8.1.4"]);
    // It is still removed when it vanishes.
    applies(&mut store, FILE, &pod("db", "10.8.1.6", ""));
    assert_eq!(known(&mut store), ["db 10.8.1.6"]);
}

#[test]
fn a_bad_first_version_is_nobody_and_harms_nobody() {
    let (mut store, problems) = store(&join(&[pod("web", "x", ""), pod("db", "10.8.1.5", "")]));
    assert_eq!(problems.len(), 1);
    assert_eq!(known(&mut store), ["db 10.8.1.5"]);
    assert_eq!(store.snapshot().unreadable(), None);
    assert_eq!(store.snapshot().problems(), problems);
}

#[test]
fn kinds_that_nobody_understands_are_named_and_ignored() {
    let yaml = join(&[
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: photo}\nspec: {}\n"
            .to_owned(),
        "apiVersion: culvert.io/v1beta9\nkind: Workload\nmetadata: {name: web, namespace: photo}\n"
            .to_owned(),
        pod("web", "10.8.1.4", ""),
    ]);
    let (mut store, problems) = store(&yaml);
    let reasons: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        reasons,
        [
            "mesh.yaml document 0: Deployment photo/web: kind: apps/v1 Deployment is not understood, ignored",
            "mesh.yaml document 1: Workload photo/web: kind: culvert.io/v1beta9 Workload is not understood, ignored",
        ]
    );
    assert_eq!(known(&mut store), ["web 10.8.1.4"]);
}

#[test]
fn empty_documents_and_files_say_nothing() {
    let mut store = empty_store();
    assert_eq!(store.apply(Update::replace("a", vec![Value::Null])), []);
    assert_eq!(store.apply(Update::replace("b", Vec::new())), []);
    assert_eq!(store.apply(Update::Remove { file: "never seen".into() }), []);
    assert_eq!(store.snapshot().unreadable(), None);
}

#[test]
fn one_object_in_two_files_stays_as_it_was_first() {
    let mut store = empty_store();
    applies(&mut store, "b", &pod("web", "10.8.1.4", ""));
    // The other file comes first by name: what worked goes before.
    assert_eq!(
        problem(&mut store, replace("a", &pod("web", "10.8.1.5", ""))),
        "a document 0: Workload photo/web: metadata.name: the same object stands in b document 0, which is in \
         force: remove one of the two"
    );
    assert_eq!(known(&mut store), ["web 10.8.1.4"]);
    // The owner may still change it, and when the owner lets go, the other one speaks.
    store.apply(replace("b", &pod("web", "10.8.1.6", "")));
    assert_eq!(known(&mut store), ["web 10.8.1.6"]);
    assert_eq!(store.apply(Update::Remove { file: "b".into() }), []);
    assert_eq!(known(&mut store), ["web 10.8.1.5"]);
    assert_eq!(store.snapshot().problems(), []);
}

#[test]
fn one_object_twice_in_a_file_stays_as_it_was() {
    let (mut store, _) = store(&pod("web", "10.8.1.4", ""));
    let twice = |first: &str, second: &str| join(&[pod("web", first, ""), pod("web", second, "")]);
    let sentence = problem(&mut store, replace(FILE, &twice("10.8.1.5", "10.8.1.4")));
    assert!(sentence.starts_with("mesh.yaml document 0: Workload photo/web: metadata.name: "), "{sentence}");
    assert_eq!(known(&mut store), ["web 10.8.1.4"]);
    assert_eq!(store.apply(replace(FILE, &twice("10.8.1.5", "10.8.1.6"))).len(), 2);
    assert_eq!(known(&mut store), ["web 10.8.1.4"]);
    let mut cold = empty_store();
    assert_eq!(cold.apply(replace(FILE, &twice("10.8.1.5", "10.8.1.6"))).len(), 1);
    assert_eq!(known(&mut cold), ["web 10.8.1.5"]);
}

#[test]
fn an_address_belongs_to_one_pod() {
    let (mut store, _) = store(&pod("web", "10.8.1.4", ""));
    assert_eq!(
        problem(&mut store, replace("a", &pod("attacker", "10.8.1.4", ""))),
        "a document 0: Workload photo/attacker: spec.addresses: 10.8.1.4 belongs to Workload photo/web: give each \
         its own address"
    );
    assert_eq!(known(&mut store), ["web 10.8.1.4"]);
    // The one that waits gets it when it is free.
    store.apply(Update::Remove { file: FILE.into() });
    assert_eq!(known(&mut store), ["attacker 10.8.1.4"]);
    assert_eq!(store.snapshot().problems(), []);
}

#[test]
fn a_newer_version_that_takes_a_foreign_address_waits_with_its_old_one() {
    let (mut store, _) = store(&join(&[pod("web", "10.8.1.4", ""), pod("db", "10.8.1.5", "")]));
    assert_eq!(
        store.apply(replace(FILE, &join(&[pod("web", "10.8.1.5", ""), pod("db", "10.8.1.5", "")]))).len(),
        1
    );
    assert_eq!(known(&mut store), ["db 10.8.1.5", "web 10.8.1.4"]);
}

#[test]
fn addresses_may_be_swapped_in_one_update() {
    let (mut store, _) = store(&join(&[pod("web", "10.8.1.4", ""), pod("db", "10.8.1.5", "")]));
    applies(&mut store, FILE, &join(&[pod("web", "10.8.1.5", ""), pod("db", "10.8.1.4", "")]));
    assert_eq!(known(&mut store), ["db 10.8.1.4", "web 10.8.1.5"]);
}

#[test]
fn the_first_document_gets_an_address_that_two_new_ones_want() {
    let (mut store, problems) = store(&join(&[pod("web", "10.8.1.4", ""), pod("db", "10.8.1.4", "")]));
    assert_eq!(problems.iter().map(|problem| problem.index).collect::<Vec<_>>(), [Some(1)]);
    assert_eq!(known(&mut store), ["web 10.8.1.4"]);
}

#[test]
fn a_service_and_a_pod_do_not_share_an_address() {
    let (mut store, _) = store(&pod("web", "10.8.1.4", ""));
    assert_eq!(
        problem(&mut store, replace("a", &service("web", "10.8.1.4", "web", "[]"))),
        "a document 0: Service photo/web: spec.clusterIP: 10.8.1.4 belongs to Workload photo/web: give each its own \
         address"
    );
}

#[test]
fn workloads_of_a_host_share_its_address_and_no_port() {
    let (mut store, problems) = store(&join(&[unit("web", 80), unit("db", 81)]));
    assert_eq!(problems, []);
    assert_eq!(
        problem(&mut store, replace("a", &unit("thief", 81))),
        "a document 0: Workload photo/thief: spec.addresses: 10.9.0.2 port 81 belongs to Workload photo/db: give \
         each its own address"
    );
    let sentence = problem(&mut store, replace("a", &pod("thief", "10.9.0.2", "")));
    assert!(sentence.contains("10.9.0.2 belongs to Workload photo/db"), "{sentence}");
    // Of two newer versions that want one port more, the one that had it keeps it.
    let greedy = unit("db", 81).replace("[{port: 81}]", "[{port: 81}, {port: 80}]");
    assert_eq!(store.apply(replace(FILE, &join(&[greedy, unit("web", 80)]))).len(), 1);
    let ports = |name: &str, store: &mut Store| workload(&store.snapshot(), name).ports.len();
    assert_eq!((ports("web", &mut store), ports("db", &mut store)), (1, 1));
}

#[test]
fn a_workload_needs_no_declared_namespace() {
    assert_eq!(store(&pod("web", "10.8.1.4", "")).1, []);
}

#[test]
fn a_namespace_enrols_or_not_and_the_workload_decides_first() {
    let labelled = |value: &str| {
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: photo, labels: {{culvert.io/mesh: {value}}}}}\n"
        )
    };
    let (mut store, _) = store(&join(&[
        labelled("disabled"),
        pod("web", "10.8.1.4", ""),
        pod("db", "10.8.1.5", "").replace("app: db", "culvert.io/mesh: enabled"),
    ]));
    let enrolled = |store: &mut Store| {
        let snapshot = store.snapshot();
        ["web", "db"].map(|name| workload(&snapshot, name).enrolled)
    };
    assert_eq!(enrolled(&mut store), [false, true]);
    let local: Vec<_> = store.snapshot().local().map(|workload| workload.name.clone()).collect();
    assert_eq!(local, [named("db")]);
    // A namespace with a value that nobody knows changes nothing.
    let bad = join(&[labelled("maybe"), pod("web", "10.8.1.4", "")]);
    assert_eq!(store.apply(replace(FILE, &bad)).len(), 1);
    assert!(!workload(&store.snapshot(), "web").enrolled);
}

#[test]
fn a_mesh_is_in_force_until_it_vanishes() {
    let (mut store, _) = store(&format!("{MESH}spec: {{defaultMode: STRICT}}"));
    assert_eq!(store.snapshot().mesh().default_mode, TransportMode::Strict);
    for bad in [
        "spec: {defaultMode: ALLOW}",
        "spec: {trustDomain: evil.local}",
        "spec: {defaultMode: PERMISSIVE, x: 1}",
    ] {
        let sentence = problem(&mut store, replace(FILE, &format!("{MESH}{bad}")));
        assert!(sentence.ends_with("; the version before stays in force"), "{sentence}");
        assert_eq!(store.snapshot().mesh().default_mode, TransportMode::Strict);
    }
    assert_eq!(store.apply(replace("other", &format!("{MESH}spec: {{}}"))).len(), 1, "there is one Mesh");
    assert_eq!(store.snapshot().mesh().default_mode, TransportMode::Strict);
    assert_eq!(store.snapshot().unreadable(), None);
}

#[test]
fn a_mesh_that_was_never_usable_denies_everything() {
    // Its default mode may have been STRICT. T-19
    let (mut store, _) = store(&format!("{MESH}spec: {{defaultMode: strict}}"));
    assert!(store.snapshot().unreadable().is_some_and(|reason| reason.contains("spec.defaultMode")));
    applies(&mut store, FILE, &format!("{MESH}spec: {{defaultMode: STRICT}}"));
    assert_eq!(store.snapshot().unreadable(), None);
}

#[test]
fn an_unreadable_file_with_good_contents_keeps_them() {
    // T-19
    let (mut store, _) = store(&pod("web", "10.8.1.4", ""));
    assert_eq!(
        problem(&mut store, unreadable(FILE)),
        "mesh.yaml: it cannot be read: line 3: not YAML; its last good contents stay in force"
    );
    assert_eq!(known(&mut store), ["web 10.8.1.4"]);
    assert_eq!(store.snapshot().unreadable(), None);
    applies(&mut store, FILE, &pod("web", "10.8.1.4", ""));
}

#[test]
fn an_unreadable_file_without_good_contents_denies_everything() {
    // T-19
    let (mut store, _) = store(&pod("web", "10.8.1.4", ""));
    assert_eq!(
        problem(&mut store, unreadable("policy.yaml")),
        "policy.yaml: it cannot be read: line 3: not YAML; everything is denied on this node until it can be read"
    );
    let reason = store.snapshot().unreadable().map(str::to_owned);
    assert_eq!(reason.as_deref(), Some("policy.yaml cannot be read: line 3: not YAML"));
    store.apply(unreadable("policy.yaml"));
    assert!(store.snapshot().unreadable().is_some(), "a second attempt is no good contents");
    store.apply(Update::Remove { file: "policy.yaml".into() });
    assert_eq!(store.snapshot().unreadable(), None);
}

#[test]
fn a_document_without_a_head_denies_everything_only_where_it_may_restrict() {
    // T-19
    for (document, denies) in [
        ("kind: AuthorizationPolicy\napiVersion: security.istio.io/v1", true),
        ("kind: Mesh\napiVersion: culvert.io/v1alpha1", true),
        ("kind: List\napiVersion: v1\nitems: []", true),
        ("spec: {action: DENY}", true),
        ("[]", true),
        ("kind: Workload\napiVersion: culvert.io/v1alpha1", false),
        ("kind: Service\nmetadata: {name: a}", false),
        ("kind: Namespace\napiVersion: v1\nmetadata: {name: A}", false),
    ] {
        let (mut store, problems) = store(&join(&[document.to_owned(), pod("web", "10.8.1.4", "")]));
        assert_eq!(problems.len(), 1, "{document}");
        assert_eq!(store.snapshot().unreadable().is_some(), denies, "{document}");
        assert_eq!(known(&mut store), ["web 10.8.1.4"], "{document}");
        store.apply(replace(FILE, &pod("web", "10.8.1.4", "")));
        assert_eq!(store.snapshot().unreadable(), None, "{document}");
    }
}

#[test]
fn objects_that_vanish_beside_a_document_without_a_head_stay() {
    let (mut store, _) = store(&join(&[pod("web", "10.8.1.4", ""), pod("db", "10.8.1.5", "")]));
    let headless = |head: &str| join(&[head.to_owned(), pod("db", "10.8.1.6", "")]);
    // The first document may be the newest version of web.
    for head in
        ["kind: Workload\napiVersion: culvert.io/v1alpha1\nmetadata: {}", "metadata: {name: web}", "7"]
    {
        assert_eq!(store.apply(replace(FILE, &headless(head))).len(), 1);
        assert_eq!(known(&mut store), ["db 10.8.1.6", "web 10.8.1.4"], "{head}");
        assert_eq!(store.snapshot().unreadable(), None);
    }
    // A Service is no Workload, and another name is another object.
    let labelled =
        "kind: Workload\napiVersion: culvert.io/v1alpha1\nmetadata: {name: x, namespace: photo, labels: 1}";
    for head in ["kind: Service\napiVersion: v1\nmetadata: {}", labelled] {
        store.apply(replace(FILE, &join(&[pod("web", "10.8.1.4", ""), pod("db", "10.8.1.5", "")])));
        store.apply(replace(FILE, &headless(head)));
        assert_eq!(known(&mut store), ["db 10.8.1.6"], "{head}");
    }
    // What was kept goes with the first version that is readable as a whole.
    store.apply(replace(FILE, &join(&[pod("web", "10.8.1.4", ""), pod("db", "10.8.1.5", "")])));
    store.apply(replace(FILE, &headless("7")));
    store.apply(replace(FILE, &pod("db", "10.8.1.6", "")));
    assert_eq!(known(&mut store), ["db 10.8.1.6"]);
}

const AUTHORIZATION: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: rules, namespace: photo}\nspec: ";
const AUTHENTICATION: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: photo}\nspec: ";

/// What becomes of a connection of `web` to `db` over the tunnel.
fn verdict(store: &mut Store) -> &'static str {
    let snapshot = store.snapshot();
    let (web, db) = (workload(&snapshot, "web"), workload(&snapshot, "db"));
    let facts = crate::policy::ConnectionFacts {
        presented: crate::policy::Presented::Tunnel(web.identity.clone()),
        source_address: web.addresses[0],
        destination_address: db.addresses[0],
        destination_port: 5432,
        destination: db,
    };
    snapshot.authorise(&facts).map_or_else(|denial| denial.reason.label(), |_permit| "allowed")
}

#[test]
fn a_policy_is_in_force_until_it_vanishes_and_a_bad_version_changes_nothing() {
    let mut store = empty_store();
    applies(&mut store, "pods", &join(&[pod("web", "10.8.1.4", ""), pod("db", "10.8.1.5", "")]));
    assert_eq!(verdict(&mut store), "allowed");
    applies(&mut store, "rules", &format!("{AUTHORIZATION}{{action: ALLOW}}"));
    assert_eq!(verdict(&mut store), "no_rule_allows");
    for bad in ["{action: PERMIT}", "{actoin: ALLOW}", "[]"] {
        let sentence = problem(&mut store, replace("rules", &format!("{AUTHORIZATION}{bad}")));
        assert!(
            sentence.starts_with("rules document 0: AuthorizationPolicy photo/rules: spec"),
            "{sentence}"
        );
        assert_eq!(verdict(&mut store), "no_rule_allows", "{bad}");
    }
    for headless in ["7", "kind: AuthorizationPolicy\nmetadata: {name: rules, namespace: photo}"] {
        assert!(!store.apply(replace("rules", headless)).is_empty());
        assert_eq!(verdict(&mut store), "no_rule_allows", "{headless}");
    }
    store.apply(unreadable("rules"));
    assert_eq!(verdict(&mut store), "no_rule_allows");
    store.apply(Update::Remove { file: "rules".into() });
    assert_eq!(verdict(&mut store), "allowed");
}

#[test]
fn a_policy_that_was_never_usable_denies_what_it_would_have_governed() {
    let mut store = empty_store();
    applies(&mut store, "pods", &join(&[pod("web", "10.8.1.4", ""), pod("db", "10.8.1.5", "")]));
    assert_eq!(store.apply(replace("rules", &format!("{AUTHORIZATION}{{action: PERMIT}}"))).len(), 1);
    assert_eq!(verdict(&mut store), "policy_unusable");
    assert_eq!(store.snapshot().unreadable(), None);
    applies(&mut store, "rules", &format!("{AUTHORIZATION}{{action: ALLOW, rules: [{{}}]}}"));
    assert_eq!(verdict(&mut store), "allowed");
}

#[test]
fn a_policy_in_two_files_stays_as_it_was_first() {
    let mut store = empty_store();
    applies(&mut store, "b", &format!("{AUTHENTICATION}{{mtls: {{mode: STRICT}}}}"));
    applies(&mut store, "pods", &pod("db", "10.8.1.5", ""));
    let mode = |store: &mut Store| {
        let snapshot = store.snapshot();
        snapshot.transport_mode(&workload(&snapshot, "db"), 80)
    };
    assert_eq!(store.apply(replace("a", &format!("{AUTHENTICATION}{{mtls: {{mode: DISABLE}}}}"))).len(), 1);
    assert_eq!(mode(&mut store), TransportMode::Strict);
    store.apply(Update::Remove { file: "b".into() });
    assert_eq!(mode(&mut store), TransportMode::Disabled);
}

#[test]
fn problems_elsewhere_are_told_once() {
    let (mut store, _) = store(&pod("web", "10.8.1.4", ""));
    assert_eq!(store.apply(replace("a", &pod("web", "10.8.1.5", ""))).len(), 1);
    assert_eq!(store.apply(replace("b", &pod("db", "10.8.1.6", ""))), []);
    assert_eq!(store.snapshot().problems().len(), 1);
}

/// One document of a random file: sometimes bad, often in contradiction with others.
fn any_document() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["a", "b", "c", "d"]);
    let address = prop::sample::select(vec!["10.8.0.1", "10.8.0.2", "10.9.0.2", "nonsense", "127.0.0.1"]);
    let pods = (name.clone(), address.clone()).prop_map(|(name, address)| pod(name, address, ""));
    let units = (name.clone(), 80..82_u16).prop_map(|(name, port)| unit(name, port));
    let services = (name.clone(), address, name)
        .prop_map(|(name, address, app)| service(name, address, app, "[{port: 80}]"));
    let others = prop::sample::select(vec![
        "[]".to_owned(),
        "kind: Workload".to_owned(),
        format!("{MESH}spec: {{defaultMode: STRICT}}"),
        format!("{MESH}spec: {{trustDomain: evil.local}}"),
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: photo, labels: {culvert.io/mesh: disabled}}"
            .to_owned(),
    ]);
    prop_oneof![3 => pods, 2 => units, 2 => services, 1 => others]
}

fn any_update() -> impl Strategy<Value = Update> {
    let file = prop::sample::select(vec!["a", "b", "c"]);
    (file, prop::collection::vec(any_document(), 0..4), 0..8_u8).prop_map(
        |(file, documents, turn)| match turn {
            0 => Update::Remove { file: file.into() },
            1 => unreadable(file),
            _ => replace(file, &join(&documents)),
        },
    )
}

/// No two owners of one address, whatever the documents say.
fn is_consistent(snapshot: &Snapshot) -> bool {
    let mut owners = BTreeSet::new();
    let of_workload = |workload: &Arc<crate::workload::Workload>| -> Vec<_> {
        let ports: Vec<u16> =
            if workload.is_host() { workload.ports.iter().map(|port| port.port).collect() } else { vec![0] };
        workload.addresses.iter().flat_map(|address| ports.iter().map(|port| (*address, *port))).collect()
    };
    let workloads = snapshot.workloads().flat_map(of_workload);
    let services =
        snapshot.services().flat_map(|service| service.addresses.iter().map(|address| (*address, 0)));
    workloads.chain(services).all(|owner| owners.insert(owner))
}

proptest! {
    #[test]
    fn any_updates_leave_a_consistent_store(updates in prop::collection::vec(any_update(), 1..12)) {
        let mut store = empty_store();
        for update in updates {
            store.apply(update);
            let snapshot = store.snapshot();
            prop_assert!(is_consistent(&snapshot));
            prop_assert!(!snapshot.problems().is_empty() || snapshot.unreadable().is_none());
        }
    }

    #[test]
    fn a_bad_update_leaves_the_meaning(updates in prop::collection::vec(any_update(), 1..6), turn in 0..4_usize) {
        let mut store = empty_store();
        applies(&mut store, "good", &join(&[pod("web", "10.7.0.1", ""), unit("db", 90)]));
        for update in updates {
            store.apply(update);
        }
        let before = (known(&mut store), store.snapshot().mesh().clone());
        let bad = [
            replace("good", &join(&[pod("web", "x", ""), unit("db", 0)])),
            replace("good", &join(&["kind: Workload".to_owned(), "[7]".to_owned()])),
            unreadable("good"),
            replace("good", &join(&[pod("web", "10.7.0.1", "cgroup: both"), "text".to_owned()])),
        ];
        prop_assert!(!store.apply(bad[turn].clone()).is_empty());
        prop_assert_eq!(before, (known(&mut store), store.snapshot().mesh().clone()));
    }
}
