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
        let unusable = |invalid: &InvalidCases| {
            panic!("{}:{}: {invalid}", name.display(), invalid.line(&text).unwrap_or_default())
        };
        let report = run_text(&text).unwrap_or_else(|invalid| unusable(&invalid));
        if let Some(invalid) = report.unusable().next() {
            unusable(invalid);
        }
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
    let invalid = match run_text(text) {
        Err(invalid) => invalid,
        Ok(report) => {
            let case = report.cases.last().expect("a case");
            assert!(!case.pass && case.got.is_empty(), "{case:?}");
            case.unusable.clone().expect("the case cannot be used")
        }
    };
    assert_eq!((invalid.field.as_str(), invalid.line(text)), (field, Some(line)), "{invalid}");
}

#[test]
fn beside_a_case_that_cannot_be_used_the_others_are_run() {
    let text = "version: \"1\"
policySets: {broken: \"a: [\"}
cases:
- {name: first, expect: {verdict: ALLOW}}
- {name: second, check: look, expect: {verdict: ALLOW}}
- {name: third, policies: [broken], expect: {verdict: ALLOW}}
- {policies: [broken], expect: {verdict: ALLOW}}
- 7
- {name: last, expect: {verdict: DENY}}
";
    let report = run_text(text).expect("the file can be used");
    assert_eq!((report.passed(), report.failed(), report.unusable().count()), (1, 5, 4));
    let lines = report.lines();
    assert!(lines[0].starts_with("second: it cannot be run: cases[1].check: \"look\""), "{lines:?}");
    assert!(lines[1].starts_with("third: it cannot be run: policySets.broken"), "{lines:?}");
    assert!(lines[2].starts_with("cases[3]: it cannot be run: cases[3].name"), "{lines:?}");
    assert!(lines[3].starts_with("cases[4]: it cannot be run: cases[4]: 7"), "{lines:?}");
    assert!(lines[4].starts_with("last: verdict: "), "{lines:?}");
    let json = report.json();
    assert_eq!((&json["passed"], &json["failed"]), (&json!(1), &json!(5)));
    assert_eq!((&json["cases"][1]["pass"], &json["cases"][1]["got"]), (&json!(false), &json!({})));
}

/// A file with one set.
fn with_set(set: &str, case: &str) -> String {
    let set = set.lines().map(|line| format!("    {line}\n")).collect::<String>();
    format!("version: 1\npolicySets:\n  p: |\n{set}cases:\n- {{name: a, policies: [p], {case}}}\n")
}

#[test]
fn a_document_that_nobody_can_place_denies_as_it_does_in_the_daemon() {
    // T-19
    let request = "destination.service: b.apps.svc.cluster.local, destination.port: 80";
    let http = format!("request: {{protocol: http, {request}}}");
    let tcp = format!("request: {{protocol: tcp, {request}}}");
    for set in [
        "kind: MeshPolicy\nmetadata: {name: default}",
        "apiVersion: authentication.istio.io/v1alpha1\nkind: MeshPolicy",
        "apiVersion: authentication.istio.io/v1alpha1\nkind: Policy\nmetadata: {name: A_B, namespace: apps}",
        "apiVersion: v1\nkind: List\nitems: []",
        "- a list",
        "text",
    ] {
        for case in [
            format!("{http}, expect: {{verdict: DENY, http_status: 403, body: \"RBAC: access denied\"}}"),
            format!("{tcp}, expect: {{verdict: DENY, tcp: closed-without-data}}"),
            format!("check: connect, {http}, expect: {{verdict: DENY}}"),
            format!(
                "check: authenticate, {http}, expect: {{verdict: CONNECTION_FAILED, attributes: {{source.principal: null}}}}"
            ),
        ] {
            let report = run_text(&with_set(set, &case)).expect("the file can be used");
            assert_eq!(report.failed(), 0, "{set}: {case}: {:?}", report.lines());
        }
    }
    let harmless = "apiVersion: v1\nkind: Service\nmetadata: {name: A_B}";
    let report = run_text(&with_set(harmless, &format!("{http}, expect: {{verdict: ALLOW}}"))).unwrap();
    assert_eq!(report.failed(), 0, "{:?}", report.lines());
}

#[test]
fn a_set_that_is_no_yaml_holds_no_valid_object() {
    // policy A-3
    let text = "version: 1
policySets: {broken: \"kind: Policy\\nspec: [\"}
cases:
- {name: a, check: validate, policies: [broken], request: {object: Policy}, expect: {valid: false}}
";
    let report = run_text(text).unwrap();
    assert_eq!(report.failed(), 0, "{:?}", report.lines());
}

#[test]
fn maps_may_be_written_with_brackets() {
    let set = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: apps}
spec:
  selector: {matchLabels: {tier: x}}
  rules:
  - when: [{key: \"request.auth.claims[g]\", values: [v]}, {key: \"request.headers[h]\", values: [w]}]";
    for (attributes, verdict) in [
        (
            "\"destination.labels[tier]\": x, \"request.auth.claims[g]\": [u, v], \"request.headers[H]\": w",
            "ALLOW",
        ),
        (
            "\"destination.labels[tier]\": x, request.auth.claims: {a: [b]}, \"request.auth.claims[g]\": [v], request.headers: {h: w}",
            "ALLOW",
        ),
        (
            "\"destination.labels[tier]\": x, \"request.auth.claims[g]\": [u], \"request.headers[h]\": w",
            "DENY",
        ),
        ("\"destination.labels[tier]\": y, \"request.auth.claims[g]\": [u]", "ALLOW"),
    ] {
        let case = format!(
            "request: {{destination.service: b.apps.svc.cluster.local, {attributes}}}, expect: {{verdict: {verdict}}}"
        );
        let report = run_text(&with_set(set, &case)).unwrap();
        assert_eq!(report.failed(), 0, "{attributes}: {:?}", report.lines());
    }
    unusable(
        "version: 1\ncases:\n- {name: a, request: {\"source.ip[x]\": y}, expect: {verdict: ALLOW}}\n",
        "cases[0].request.source.ip[x]",
        3,
    );
}

#[test]
fn of_the_kubelet_only_what_a_probe_asks_passes() {
    // T-12, policy H-4
    for (asked, expect) in [
        ("protocol: http, request.method: GET", "verdict: ALLOW, http_status: 200"),
        ("protocol: http", "verdict: ALLOW, http_status: 200"),
        ("protocol: http, request.method: POST", "verdict: DENY, http_status: 403"),
        ("protocol: http, request.method: HEAD", "verdict: DENY, http_status: 403"),
        (
            "protocol: grpc, request.method: POST, request.path: /grpc.health.v1.Health/Check",
            "verdict: ALLOW",
        ),
        (
            "protocol: grpc, request.method: POST, request.path: /grpc.health.v1.Health/Watch",
            "verdict: DENY, grpc_status: 7",
        ),
        ("protocol: tcp", "verdict: ALLOW"),
    ] {
        for check in ["authenticate", "connect"] {
            let case = format!(
                "check: {check}, request: {{client.kind: kubelet, destination.service: b.apps.svc.cluster.local, destination.port: 80, {asked}}}, expect: {{{expect}}}"
            );
            let report = run_text(&with_set(STRICT, &case)).unwrap();
            assert_eq!(report.failed(), 0, "{asked}: {:?}", report.lines());
        }
    }
}

#[test]
fn a_mesh_wide_policy_of_the_current_api_is_named_with_or_without_its_namespace() {
    // policy F-1
    let set = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: m, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}";
    for (namespace, failed) in [("\"\"", 0), ("istio-system", 0), ("apps", 1), ("null", 1)] {
        let case = format!(
            "check: select, request: {{destination.service: b.apps.svc.cluster.local, destination.service_port: 80}}, expect: {{policy: m, policy_namespace: {namespace}}}"
        );
        assert_eq!(run_text(&with_set(set, &case)).unwrap().failed(), failed, "{namespace}");
    }
}

#[test]
fn every_way_to_write_yaml_is_one_way() {
    let text = "%YAML 1.2
---
# A comment.
version: 1
policySets:
  nothing: \"\"
  comments: |
    # only this
    ---
    ---
  strict: &strict |
    ---
    apiVersion: \"authentication.istio.io/v1alpha1\"
    kind: 'MeshPolicy'
    metadata:
      name: default
      creationTimestamp: null
    spec:
      peers:
      - mtls:
    ...
  json: '{\"apiVersion\":\"authentication.istio.io/v1alpha1\",\"kind\":\"MeshPolicy\",\"metadata\":{\"name\":\"default\"},\"spec\":{\"peers\":[{\"mtls\":null}]}}'
  again: *strict
cases:
- name: anchored
  check: select
  policies: [strict, again, json, nothing, comments]
  request: &request
    destination.service: b.apps.svc.cluster.local
    destination.service_port: \"80\"
  expect: {policy: default, policy_namespace: '', mtls: STRICT}
- {name: !!str merged, check: select, policies: !!seq [json], request: {<<: *request, destination.port: 0x50}, expect: {mtls: STRICT}}
- name: >-
    folded
    name
  check: \"select\"
  policies: again
  request: {<<: *request}
  expect:
    ? mtls
    : STRICT
- {name: nothing given, check: select, policies: null, request: *request, expect: {policy: null, policy_namespace: ~, mtls: NONE}}
- {name: 7, check: null, policies: [], request: null, expect: {verdict: ALLOW, http_status: \"200\", tcp: null}}
";
    let report = run_text(text).expect("the file can be used");
    assert_eq!((report.passed(), report.failed()), (5, 0), "{:?}", report.lines());
    let names: Vec<&str> = report.cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names, ["anchored", "merged", "folded name", "nothing given", "7"]);
    let windows = run_text(&text.replace('\n', "\r\n")).expect("lines may end as on Windows");
    assert_eq!((windows.passed(), windows.failed()), (5, 0), "{:?}", windows.lines());
}

#[test]
fn a_file_that_cannot_be_used_is_named_by_field_and_line() {
    let case = |request: &str| one("[strict]", "authenticate", request, "{verdict: ALLOW}");
    unusable("version: 2\ncases: []\n", "version", 1);
    unusable("version: 1\ncase: []\n", "case", 2);
    unusable("version: 1\ntrustDomain: A_B\ncases: []\n", "trustDomain", 2);
    unusable("version: 1\ndefaultMode: LAX\ncases: []\n", "defaultMode", 2);
    unusable(
        "version: 1\npolicySets:\n  a: \"{\"\ncases: [{name: a, policies: [a], expect: {verdict: ALLOW}}]\n",
        "policySets.a",
        3,
    );
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
