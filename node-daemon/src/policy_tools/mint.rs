//! Keys that live as long as the command, for the tokens of cases.

use std::sync::OnceLock;

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair,
        EcdsaSigningAlgorithm, KeyPair as _, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512,
        RsaEncoding, RsaKeyPair,
    },
};
use node_core::{
    cases::Mint,
    policy::tokens::{Algorithm, Key, encode_base64url},
};
use serde_json::{Value, json};

use crate::jwks;

/// Keys that are made when a case asks for the first time: RSA takes some 100 ms.
#[derive(Default)]
pub(super) struct ThrowAway {
    keys: OnceLock<Keys>,
}

struct Keys {
    rsa: RsaKeyPair,
    p256: EcdsaKeyPair,
    p384: EcdsaKeyPair,
    /// Their public halves, as issuers publish them.
    set: Value,
}

impl ThrowAway {
    fn keys(&self) -> &Keys {
        self.keys.get_or_init(Keys::new)
    }
}

impl Mint for ThrowAway {
    fn key_set(&self) -> Value {
        self.keys().set.clone()
    }

    fn sign(&self, algorithm: Algorithm, input: &[u8]) -> Vec<u8> {
        let keys = self.keys();
        match algorithm {
            Algorithm::Rs256 => keys.sign_rsa(&RSA_PKCS1_SHA256, input),
            Algorithm::Rs384 => keys.sign_rsa(&RSA_PKCS1_SHA384, input),
            Algorithm::Rs512 => keys.sign_rsa(&RSA_PKCS1_SHA512, input),
            Algorithm::Es256 => sign_curve(&keys.p256, input),
            Algorithm::Es384 => sign_curve(&keys.p384, input),
        }
    }

    fn verify(&self, key: &Key, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> bool {
        jwks::is_signed_by(key, algorithm, signed, signature)
    }
}

impl Keys {
    fn new() -> Self {
        let rsa = RsaKeyPair::generate(KeySize::Rsa2048).expect("the library makes keys of this size");
        let p256 = curve(&ECDSA_P256_SHA256_FIXED_SIGNING);
        let p384 = curve(&ECDSA_P384_SHA384_FIXED_SIGNING);
        let keys = Algorithm::ALL.map(|algorithm| {
            let mut key = match algorithm {
                Algorithm::Rs256 | Algorithm::Rs384 | Algorithm::Rs512 => public_rsa(&rsa),
                Algorithm::Es256 => public_curve(&p256, "P-256"),
                Algorithm::Es384 => public_curve(&p384, "P-384"),
            };
            key["use"] = "sig".into();
            key["alg"] = algorithm.name().into();
            key["kid"] = format!("throw-away-{}", algorithm.name()).into();
            key
        });
        Self { rsa, p256, p384, set: json!({ "keys": keys }) }
    }

    fn sign_rsa(&self, padding: &'static dyn RsaEncoding, input: &[u8]) -> Vec<u8> {
        let mut signature = vec![0; self.rsa.public_modulus_len()];
        self.rsa
            .sign(padding, &SystemRandom::new(), input, &mut signature)
            .expect("the signature is as long as the modulus");
        signature
    }
}

fn curve(algorithm: &'static EcdsaSigningAlgorithm) -> EcdsaKeyPair {
    EcdsaKeyPair::generate(algorithm).expect("the library makes keys of its own curves")
}

fn sign_curve(key: &EcdsaKeyPair, input: &[u8]) -> Vec<u8> {
    let signature = key.sign(&SystemRandom::new(), input).expect("the key is one for signing");
    signature.as_ref().to_vec()
}

/// RFC 7518, section 6.3.1
fn public_rsa(key: &RsaKeyPair) -> Value {
    let public = key.public_key();
    json!({
        "kty": "RSA",
        "n": encode_base64url(public.modulus().big_endian_without_leading_zero()),
        "e": encode_base64url(public.exponent().big_endian_without_leading_zero()),
    })
}

/// RFC 7518, section 6.2.1: the two halves of the uncompressed point behind its first byte.
fn public_curve(key: &EcdsaKeyPair, name: &str) -> Value {
    let point = key.public_key().as_ref();
    let (x, y) = point[1..].split_at(point.len() / 2);
    json!({"kty": "EC", "crv": name, "x": encode_base64url(x), "y": encode_base64url(y)})
}

#[cfg(test)]
mod tests {
    use node_core::policy::tokens::KeySet;

    use super::*;

    #[test]
    fn each_algorithm_signs_what_the_published_key_of_its_name_verifies_and_no_other() {
        let mint = ThrowAway::default();
        let set = KeySet::parse(&mint.key_set().to_string()).expect("it is a key set");
        for algorithm in Algorithm::ALL {
            let kid = format!("throw-away-{}", algorithm.name());
            let key = set.candidates(algorithm, Some(&kid)).next().expect("one key for each");
            let signature = mint.sign(algorithm, b"header.payload");
            assert!(mint.verify(key, algorithm, b"header.payload", &signature), "{algorithm:?}");
            assert!(!mint.verify(key, algorithm, b"header.payloae", &signature), "{algorithm:?}");
            let mut bad = signature.clone();
            *bad.last_mut().expect("it is not empty") ^= 1;
            assert!(!mint.verify(key, algorithm, b"header.payload", &bad), "{algorithm:?}");
            for other in Algorithm::ALL.into_iter().filter(|other| *other != algorithm) {
                assert!(!mint.verify(key, other, b"header.payload", &signature), "{algorithm:?} {other:?}");
            }
        }
    }

    #[test]
    fn two_commands_have_different_keys() {
        assert_ne!(ThrowAway::default().key_set(), ThrowAway::default().key_set());
    }
}
