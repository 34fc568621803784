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
    assert!(all.passed() >= 300, "only {} cases", all.passed());
    let names: BTreeSet<&str> = all.cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), all.cases.len(), "each name once");
}
