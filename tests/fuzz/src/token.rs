//! Tokens in requests, and key sets of issuers.

use node_core::policy::tokens::{
    Algorithm, InvalidKeySet, KEYS_MAX, KeySet, KeySource, Signatures, TOKENS_MAX, TokenFault,
    decode_base64url, encode_base64url,
};
use serde_json::json;

use crate::path::Place;

/// No signature is good: whatever a request says of itself, nobody gets in by it.
struct Nobody;

impl Signatures for Nobody {
    fn verify(
        &self,
        _: &KeySource,
        _: Algorithm,
        _: Option<&str>,
        _: &[u8],
        _: &[u8],
    ) -> Result<(), TokenFault> {
        Err(TokenFault::Signature)
    }
}

/// The value of a header, and behind the first line feed the query.
pub(crate) fn token(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (value, query) = text.split_once('\n').unwrap_or((text, ""));
    let place = Place::new(json!({
        "apiVersion": "authentication.istio.io/v1alpha1",
        "kind": "Policy",
        "metadata": {"name": "default", "namespace": "apps"},
        "spec": {"origins": [
            {"jwt": {"issuer": "i", "jwksUri": "https://i/k"}},
            {"jwt": {"issuer": "j", "jwksUri": "https://j/k", "jwtHeaders": ["x-tok"], "jwtParams": ["tok"], "audiences": ["a"]}},
            {"jwt": {"issuer": "k", "jwksUri": "https://k/k", "jwtHeaders": ["ingress-authorization"]}},
        ]},
    }));
    let rules = place.compiled.token_rules(&place.facts.destination, place.facts.destination_port);
    let rules = rules.expect("tokens count there");
    let headers: &[(&str, &str)] =
        &[("authorization", value), ("x-tok", value), ("ingress-authorization", value), ("cookie", value)];
    let path = format!("/?{query}");
    let found = rules.locate(Some(&path), &headers);
    let _ = TOKENS_MAX;
    let tokens = rules.verify(found, 1_546_300_800, &Nobody);
    let request = node_core::policy::RequestFacts {
        method: "GET",
        path: Some("/"),
        host: None,
        headers: &headers,
        tokens: &tokens,
    };
    let answer = place.compiled.judge_request(&place.facts, &request);
    assert_eq!(answer.expect_err("no signature is good").answer().status, 401);
}

/// What is no set is said so, what is one offers no key twice and none of another kind.
pub(crate) fn key_set(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        if let Some(bytes) = decode_base64url(text) {
            assert_eq!(encode_base64url(&bytes), text, "one spelling for each value");
        }
        match KeySet::parse(text) {
            Ok(set) => {
                for algorithm in Algorithm::ALL {
                    assert!(set.candidates(algorithm, None).count() <= KEYS_MAX);
                    assert!(
                        set.candidates(algorithm, Some("k")).count()
                            <= set.candidates(algorithm, None).count()
                    );
                }
            }
            Err(InvalidKeySet::Shape | InvalidKeySet::TooMany) => {}
        }
    }
}
