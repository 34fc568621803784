//! Which DestinationRule counts for a connection that leaves, and which part of it (policy C).

use std::collections::BTreeMap;

use node_core::{
    decode::{self, Source},
    policy::{Asked, ClientSetting, Inventory, PolicyObjects, compile},
    workload::Mesh,
};
use policy_oracle::{client, facts::Document};
use proptest::{collection::vec, option, prelude::*, sample::select, test_runner::TestRunner};
use serde_json::{Value, json};

use crate::{agreed, cases, config};

const ROOT: &str = "istio-system";

#[derive(Clone, Debug)]
struct Question {
    rules: Vec<Document>,
    host: &'static str,
    client_namespace: &'static str,
    port: u16,
    labels: BTreeMap<String, String>,
}

fn question() -> impl Strategy<Value = Question> {
    let labels = select(vec![vec![], vec![("v", "1")], vec![("v", "2")], vec![("v", "1"), ("w", "x")]]);
    (
        vec(rule(), 0..6),
        select(vec!["web.apps.svc.cluster.local", "db.apps.svc.cluster.local", "api.outside.example"]),
        select(vec!["apps", "other", ROOT]),
        select(vec![80_u16, 443]),
        labels,
    )
        .prop_map(|(rules, host, client_namespace, port, labels)| {
            let mut known = std::collections::BTreeSet::new();
            let name = |rule: &Document| (rule.namespace().to_owned(), rule.name().to_owned());
            let rules = rules.into_iter().filter(|rule| known.insert(name(rule))).collect();
            let labels = labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
            Question { rules, host, client_namespace, port, labels }
        })
}

fn traffic_policy() -> impl Strategy<Value = Value> {
    let tls = || {
        select(vec![
            json!({"mode": "DISABLE"}),
            json!({"mode": "SIMPLE", "sni": "s"}),
            json!({"mode": "ISTIO_MUTUAL"}),
            json!({"mode": "ISTIO_MUTUAL", "sni": "t", "subjectAltNames": ["u"]}),
            json!({"mode": "MUTUAL", "clientCertificate": "c", "privateKey": "k"}),
        ])
    };
    let block = option::of(tls()).prop_map(|tls| match tls {
        Some(tls) => json!({"port": {"number": 80}, "tls": tls}),
        None => json!({"port": {"number": 80}}),
    });
    (option::weighted(0.7, tls()), option::weighted(0.4, block)).prop_map(|(tls, block)| {
        let mut policy = json!({});
        if let Some(tls) = tls {
            policy["tls"] = tls;
        }
        if let Some(block) = block {
            policy["portLevelSettings"] = json!([block]);
        }
        policy
    })
}

fn rule() -> impl Strategy<Value = Document> {
    let subset = (
        select(vec!["a", "b"]),
        select(vec![json!({}), json!({"v": "1"}), json!({"w": "x"})]),
        option::of(traffic_policy()),
    )
        .prop_map(|(name, labels, policy)| match policy {
            Some(policy) => json!({"name": name, "labels": labels, "trafficPolicy": policy}),
            None => json!({"name": name, "labels": labels}),
        });
    let host = select(vec![
        "web.apps.svc.cluster.local",
        "web",
        "db",
        "*",
        "*.local",
        "*.apps.svc.cluster.local",
        "*.svc.cluster.local",
        "api.outside.example",
        "*.example",
        "*web.apps.svc.cluster.local",
    ]);
    let subsets = vec(subset, 0..3).prop_map(|mut subsets| {
        subsets.dedup_by(|a, b| a["name"] == b["name"]);
        subsets
    });
    (
        select(vec!["apps", "other", ROOT]),
        select(vec!["d1", "d2", "d3"]),
        host,
        option::weighted(0.9, traffic_policy()),
        subsets,
        prop::bool::weighted(0.1),
    )
        .prop_map(|(namespace, name, host, policy, subsets, is_broken)| {
            let mut spec = json!({"host": host, "subsets": subsets});
            if let Some(policy) = policy {
                spec["trafficPolicy"] = policy;
            }
            if is_broken {
                spec["trafficPolicy"] = json!({"tls": {"mode": "MUTUAL"}});
            }
            let value = json!({
                "apiVersion": "networking.istio.io/v1alpha3",
                "kind": "DestinationRule",
                "metadata": {"name": name, "namespace": namespace},
                "spec": spec,
            });
            Document { value, is_broken }
        })
}

/// `DENIED`, nothing, or the setting as it was written.
fn naive(question: &Question) -> Option<String> {
    let service_namespace = if question.host.starts_with("api.") { "other" } else { "apps" };
    let rule =
        client::chosen(&question.rules, question.host, question.client_namespace, service_namespace, ROOT)?;
    match client::said(rule, question.port, &question.labels) {
        Err(client::Unusable) => Some(format!("{} DENIED", rule.name())),
        Ok(None) => None,
        Ok(Some(tls)) => Some(format!(
            "{} {} {} {}",
            rule.name(),
            tls["mode"].as_str().unwrap_or_default(),
            tls["sni"].as_str().unwrap_or("-"),
            tls["subjectAltNames"][0].as_str().unwrap_or("-"),
        )),
    }
}

fn enforced(question: &Question) -> Option<String> {
    let mut objects = PolicyObjects::new();
    for (index, document) in question.rules.iter().enumerate() {
        let object =
            decode::object(document.value.clone(), Source::new("random.yaml", index)).expect("a head");
        assert_eq!(objects.insert(&object).is_err(), document.is_broken, "{}", document.value);
    }
    let mut mesh = Mesh::defaults("cluster.local".parse().expect("a trust domain"));
    mesh.root_namespace = ROOT.to_owned();
    let inventory =
        Inventory { mesh: &mesh, workloads: &BTreeMap::new(), services: &BTreeMap::new(), node: "n" };
    let compiled = compile(&objects, &inventory);
    let namespace = if question.host.starts_with("api.") { "other" } else { "apps" };
    let asked = Asked { host: question.host.into(), namespace: namespace.into(), port: question.port };
    let name = |label: &str| label.rsplit('/').next().unwrap_or_default().to_owned();
    match compiled.client_setting(&asked, &question.labels, question.client_namespace, &mesh) {
        ClientSetting::Unsaid => None,
        ClientSetting::Refused { rule, .. } => Some(format!("{} DENIED", name(rule))),
        ClientSetting::Tls(said) => Some(format!(
            "{} {} {} {}",
            name(said.rule),
            said.settings.mode.name(),
            said.settings.sni.as_deref().unwrap_or("-"),
            said.settings.subject_alt_names.first().map_or("-", String::as_str),
        )),
    }
}

#[test]
fn the_same_rule_speaks_for_a_connection_that_leaves() {
    // policy C
    let mut runner = TestRunner::new(config(cases()));
    agreed(runner.run(&question(), |question| {
        prop_assert_eq!(naive(&question), enforced(&question), "{:?}", question);
        Ok(())
    }));
}

#[test]
fn another_order_of_namespaces_is_found_out() {
    let mut runner = TestRunner::new(config(cases()));
    let result = runner.run(&question(), |question| {
        let mut misread = question.clone();
        misread.client_namespace = "apps";
        prop_assert_eq!(naive(&misread), enforced(&question));
        Ok(())
    });
    assert!(result.is_err(), "nobody noticed");
}
