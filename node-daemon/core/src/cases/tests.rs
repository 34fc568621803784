//! The project's own cases, in `tests/policy`, and what the runner says of files that it cannot use.

use std::{collections::BTreeSet, fs, path::PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::policy::tokens::{Algorithm, Key, KeyMaterial, encode_base64url};

/// 2019-01-01T00:00:00Z
const NOW: u64 = 1_546_300_800;

/// Stands where cryptography would: a signature is the input's check sum under the key's name. Proves nothing.
struct TestMint;

fn number(algorithm: Algorithm) -> String {
    encode_base64url(algorithm.name().as_bytes())
}

fn check_sum(algorithm: Algorithm, input: &[u8]) -> Vec<u8> {
    let start =
        algorithm.name().bytes().fold(7_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let sum = input.iter().fold(start, |sum, byte| sum.wrapping_mul(0x0100_0000_01b3) ^ u64::from(*byte));
    sum.to_be_bytes().to_vec()
}

impl Mint for TestMint {
    fn key_set(&self) -> Value {
        let keys = Algorithm::ALL.map(|algorithm| {
            let n = number(algorithm);
            let head = match algorithm {
                Algorithm::Rs256 | Algorithm::Rs384 | Algorithm::Rs512 => {
                    json!({"kty": "RSA", "n": n, "e": "AQAB"})
                }
                Algorithm::Es256 => json!({"kty": "EC", "crv": "P-256", "x": n, "y": n}),
                Algorithm::Es384 => json!({"kty": "EC", "crv": "P-384", "x": n, "y": n}),
            };
            let mut key = head;
            key["kid"] = format!("key-{}", algorithm.name()).into();
            key["alg"] = algorithm.name().into();
            key
        });
        json!({ "keys": keys })
    }

    fn sign(&self, algorithm: Algorithm, input: &[u8]) -> Vec<u8> {
        check_sum(algorithm, input)
    }

    fn verify(&self, key: &Key, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> bool {
        let (KeyMaterial::Rsa { modulus: name, .. }
        | KeyMaterial::P256 { x: name, .. }
        | KeyMaterial::P384 { x: name, .. }) = &key.material;
        name == algorithm.name().as_bytes() && signature == check_sum(algorithm, signed)
    }
}

struct TestLibrary;

fn parse(text: &str) -> Result<Vec<Value>, String> {
    let options = serde_saphyr::options! { strict_booleans: true };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|error| error.to_string())
}

impl Library for TestLibrary {
    fn parse(&self, text: &str) -> Result<Vec<Value>, String> {
        parse(text)
    }

    fn load(&self, path: &str) -> Result<Vec<(String, Vec<Value>)>, String> {
        match path {
            "strict.yaml" => Ok(vec![(path.to_owned(), parse(STRICT)?)]),
            _ => Err("no such file".to_owned()),
        }
    }
}

const STRICT: &str = "apiVersion: authentication.istio.io/v1alpha1
kind: MeshPolicy
metadata: {name: default}
spec: {peers: [{mtls: {}}]}
";

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/policy")
}

fn run_text(text: &str) -> Result<Report, InvalidCases> {
    let file = parse(text).expect("the test's file is YAML").pop().expect("one document");
    run(&file, &TestLibrary, &TestMint, NOW, &|_| true)
}

#[test]
fn the_cases_of_this_project_hold() {
    let mut names: Vec<PathBuf> = fs::read_dir(folder())
        .expect("the folder is there")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    names.sort();
    assert!(!names.is_empty());
    let mut all = Report::default();
    for name in &names {
        let text = fs::read_to_string(name).expect("the file can be read");
        let report = run_text(&text).unwrap_or_else(|invalid| {
            panic!("{}:{}: {invalid}", name.display(), invalid.line(&text).unwrap_or_default())
        });
        assert!(!report.cases.is_empty(), "{} holds no case", name.display());
        all.append(report);
    }
    let short = all.lines();
    assert_eq!(all.failed(), 0, "\n{}", short.join("\n"));
    assert!(all.passed() >= 900, "only {} cases", all.passed());
    let names: BTreeSet<&str> = all.cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), all.cases.len(), "each name once");
}

/// A file of one case.
fn one(policies: &str, check: &str, request: &str, expect: &str) -> String {
    format!(
        "version: 1\npolicySets:\n  strict: |\n{}cases:\n- name: a\n  check: {check}\n  policies: {policies}\n  request: {request}\n  expect: {expect}\n",
        STRICT.lines().map(|line| format!("    {line}\n")).collect::<String>()
    )
}

const MTLS: &str = "{connection.tls: mtls, client.identity: a/ns/b/sa/c, destination.service: b.apps.svc.cluster.local, destination.service_port: 80}";

#[test]
fn a_case_that_falls_short_says_how() {
    let plain = MTLS.replace("tls: mtls", "tls: plaintext");
    let report = run_text(&one("[strict]", "authenticate", &plain, "{verdict: ALLOW, body: x}")).unwrap();
    assert_eq!((report.passed(), report.failed()), (0, 1));
    let lines = report.lines();
    assert_eq!(
        lines[0],
        "a: body: expected \"x\", got null; verdict: expected \"ALLOW\", got \"CONNECTION_FAILED\"; decided by \
         MeshPolicy/default (plaintext_refused)"
    );
    assert_eq!(lines[1], "0 passed, 1 failed");
    let json = report.json();
    assert_eq!(json["failed"], 1);
    assert_eq!(json["cases"][0]["got"]["verdict"], "CONNECTION_FAILED");
    assert_eq!(json["cases"][0]["policy"], "MeshPolicy/default");
}

#[test]
fn the_nearest_rule_and_the_attribute_are_named() {
    let text = "version: 1
policySets:
  p: |
    apiVersion: security.istio.io/v1
    kind: AuthorizationPolicy
    metadata: {name: a, namespace: apps}
    spec: {rules: [{to: [{operation: {paths: [/x], methods: [PUT]}}]}, {to: [{operation: {paths: [/y, /z]}}]}]}
cases:
- name: a
  policies: [p]
  request: {request.path: /w, request.method: GET, destination.service: b.apps.svc.cluster.local}
  expect: {verdict: DENY}
";
    let case = run_text(text).unwrap().cases.remove(0);
    assert!(case.pass);
    assert_eq!(
        case.reason.as_deref(),
        Some(
            "no_rule_allows: nearest is AuthorizationPolicy/apps/a rules[1], but request.path is /w, wanted one of /y, /z"
        )
    );
}

#[test]
fn only_the_keys_that_stand_are_compared_and_null_means_unset() {
    for (expect, pass) in [
        ("{verdict: UNAUTHENTICATED}", true),
        ("{http_status: 401}", true),
        ("{http_status: \"401\"}", true),
        ("{grpc_status: null}", true),
        ("{attributes: {source.principal: null}}", true),
        ("{attributes: null}", false),
        ("{http_status: null}", false),
        ("{http_status: 403}", false),
        ("{verdict: ALLOW}", false),
        ("{verdict: unauthenticated}", false),
        ("{valid: true}", false),
        ("{attributes: {source.principal: x}}", false),
    ] {
        let report = run_text(&one("[strict]", "authenticate", MTLS, expect)).unwrap();
        assert_eq!(report.failed() == 0, pass, "{expect}");
    }
}

#[test]
fn policies_come_from_sets_then_from_files_in_any_order() {
    let select = "{destination.service: b.apps.svc.cluster.local, destination.service_port: 80}";
    for policies in ["[strict]", "[strict.yaml]", "[strict, strict.yaml]", "strict"] {
        let report = run_text(&one(policies, "select", select, "{mtls: STRICT}")).unwrap();
        assert_eq!(report.failed(), 0, "{policies}");
    }
}

#[track_caller]
fn unusable(text: &str, field: &str, line: usize) {
    let invalid = run_text(text).expect_err("the file cannot be used");
    assert_eq!((invalid.field.as_str(), invalid.line(text)), (field, Some(line)), "{invalid}");
}

#[test]
fn a_file_that_cannot_be_used_is_named_by_field_and_line() {
    let case = |request: &str| one("[strict]", "authenticate", request, "{verdict: ALLOW}");
    unusable("version: 2\ncases: []\n", "version", 1);
    unusable("version: 1\ncase: []\n", "case", 2);
    unusable("version: 1\ntrustDomain: A_B\ncases: []\n", "trustDomain", 2);
    unusable("version: 1\ndefaultMode: LAX\ncases: []\n", "defaultMode", 2);
    unusable("version: 1\npolicySets: {a: \"{\"}\ncases: []\n", "policySets.a", 2);
    unusable(&case("{connection.tls: maybe}"), "cases[0].request.connection.tls", 12);
    unusable(&case("{protocol: udp}"), "cases[0].request.protocol", 12);
    unusable(&case("{request.verb: GET}"), "cases[0].request.request.verb", 12);
    unusable(&case("{destination.port: 70000}"), "cases[0].request.destination.port", 12);
    unusable(&case("{source.ip: 1.2}"), "cases[0].request.source.ip", 12);
    unusable(&case("{connection.tls: mtls, client.identity: null}"), "cases[0].request.client.identity", 12);
    unusable(&case("{jwt: [{location: body}]}"), "cases[0].request.jwt[0].location", 12);
    unusable(&case("{jwt: [{expires: past}]}"), "cases[0].request.jwt[0].expires", 12);
    unusable(&case("{jwt: [{exp: soon}]}"), "cases[0].request.jwt[0].exp", 12);
    unusable(&one("[nowhere]", "select", "{}", "{mtls: NONE}"), "cases[0].policies[0]", 11);
    unusable(&one("[]", "look", "{}", "{mtls: NONE}"), "cases[0].check", 10);
    unusable(&one("[]", "select", "{}", "{}"), "cases[0].expect", 13);
    unusable(&one("[]", "select", "{}", "{verdikt: ALLOW}"), "cases[0].expect.verdikt", 13);
    unusable(&one("[]", "select", "7", "{mtls: NONE}"), "cases[0].request", 12);
    unusable(&one("[]", "validate", "{object: Policy}", "{valid: true}"), "cases[0].request.object", 12);
    unusable("version: 1\ncases:\n- {expect: {verdict: ALLOW}}\n", "cases[0].name", 3);
    let second = "version: 1\ncases:\n- name: a\n  expect: {verdict: ALLOW}\n- name: b\n  request: {protocol: x}\n  expect: {verdict: ALLOW}\n";
    unusable(second, "cases[1].request.protocol", 6);
}

#[test]
fn attributes_may_be_grouped() {
    let grouped = "{protocol: http, source: {principal: cluster.local/ns/a/sa/b}, destination: {service: b.apps.svc.cluster.local, port: 80}, request: {method: GET, path: /a/../b, auth: {principal: i/s, claims: {g: [x]}}}}";
    let report = run_text(&one("[]", "authorize", grouped, "{verdict: ALLOW, upstream_path: /b}")).unwrap();
    assert_eq!(report.failed(), 0, "{:?}", report.lines());
}

#[test]
fn only_wanted_cases_run() {
    let text =
        "version: 1\ncases:\n- {name: a, expect: {verdict: ALLOW}}\n- {name: b, expect: {verdict: DENY}}\n";
    let file = parse(text).unwrap().pop().unwrap();
    let report = run(&file, &TestLibrary, &TestMint, NOW, &|name| name == "b").unwrap();
    assert_eq!(report.cases.iter().map(|case| case.name.as_str()).collect::<Vec<_>>(), ["b"]);
    assert!(!report.cases[0].pass);
}
