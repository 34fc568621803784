//! Documents of files, and files of cases: from bytes to a snapshot, and to a report.

use std::net::{IpAddr, Ipv4Addr};

use node_core::{
    cases::{self, Library, Mint},
    policy::{
        ConnectionFacts, Presented, RequestFacts,
        tokens::{Algorithm, Key, Tokens},
    },
    snapshot::Snapshot,
    store::{Store, Update},
};
use serde_json::{Value, json};

const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 8, 1, 3));

/// As the daemon reads files: words of YAML 1.2 (policy B-1).
fn parse(text: &str) -> Result<Vec<Value>, String> {
    let options = serde_saphyr::options! { strict_booleans: true };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|error| error.to_string())
}

/// A workload of this node, so that policies have somebody to be compiled for.
fn backend() -> Vec<Value> {
    vec![
        json!({
            "apiVersion": "culvert.io/v1alpha1",
            "kind": "Workload",
            "metadata": {"name": "backend-0", "namespace": "photo", "labels": {"app": "backend"}},
            "spec": {
                "serviceAccount": "backend",
                "node": "n",
                "addresses": [ADDRESS.to_string()],
                "networkNamespace": "/run/netns/x",
                "ports": [{"name": "http", "port": 8080}],
            },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "backend", "namespace": "photo"},
            "spec": {"selector": {"app": "backend"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
        }),
    ]
}

/// Whatever a tenant's file says, the daemon goes on, and a file that takes nothing away when it is gone.
pub(crate) fn documents(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(documents) = parse(text) else { return };
    let mut store = Store::new("n", "cluster.local".parse().expect("a trust domain"));
    store.apply(Update::replace("a.yaml", backend()));
    let before = asked(&store.snapshot());
    store.apply(Update::replace("b.yaml", documents));
    let with = store.snapshot();
    asked(&with);
    for status in with.statuses() {
        assert!(!status.name.name.is_empty() || !status.kind.is_empty());
    }
    store.apply(Update::Remove { file: "b.yaml".into() });
    assert_eq!(asked(&store.snapshot()), before, "a file that is gone says nothing");
}

/// The verdicts on a few connections and one request.
fn asked(snapshot: &Snapshot) -> Vec<String> {
    let mut answers = Vec::new();
    for destination in snapshot.local() {
        for port in [8080, 9000] {
            for presented in [
                Presented::Plaintext,
                Presented::Tunnel("spiffe://cluster.local/ns/photo/sa/frontend".parse().expect("a name")),
            ] {
                let facts = ConnectionFacts {
                    presented,
                    source_address: ADDRESS,
                    destination_address: ADDRESS,
                    destination_port: port,
                    destination: destination.clone(),
                };
                answers.push(format!("{:?}", snapshot.authorise(&facts)));
                let headers: &[(&str, &str)] = &[("x-a", "v")];
                let tokens = Tokens::none();
                let request = RequestFacts {
                    method: "GET",
                    path: Some("/a/../b?c"),
                    host: Some("backend"),
                    headers: &headers,
                    tokens: &tokens,
                };
                answers.push(format!("{:?}", snapshot.judge_request(&facts, &request)));
            }
        }
    }
    answers
}

/// No files beside the cases, and a signature that is good if it is the word.
struct Nothing;

impl Library for Nothing {
    fn parse(&self, text: &str) -> Result<Vec<Value>, String> {
        parse(text)
    }

    fn load(&self, _: &str) -> Result<Vec<(String, Vec<Value>)>, String> {
        Err("there are no files".to_owned())
    }
}

impl Mint for Nothing {
    fn key_set(&self) -> Value {
        json!({"keys": [{"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "k", "alg": "RS256"}]})
    }

    fn sign(&self, _: Algorithm, _: &[u8]) -> Vec<u8> {
        b"good".to_vec()
    }

    fn verify(&self, _: &Key, _: Algorithm, _: &[u8], signature: &[u8]) -> bool {
        signature == b"good"
    }
}

/// Whatever stands in a file of cases, each case is told once, and the counts add up.
pub(crate) fn cases(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(documents) = parse(text) else { return };
    let Some(file) = documents.first() else { return };
    match cases::run(file, &Nothing, &Nothing, 1_546_300_800, &|_| true) {
        Ok(report) => {
            let written = file["cases"].as_array().map_or(0, Vec::len);
            assert_eq!(report.cases.len(), written);
            assert_eq!(report.passed() + report.failed(), written);
            assert!(report.unusable().all(|invalid| !invalid.to_string().is_empty()));
            assert_eq!(report.lines().len(), report.failed() + 1);
        }
        Err(invalid) => assert!(!invalid.to_string().is_empty()),
    }
}
