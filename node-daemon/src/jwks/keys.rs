//! One key set, its keys parsed.

use std::sync::atomic::{AtomicU64, Ordering};

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RsaPublicKeyComponents,
};
use node_core::policy::tokens::{Algorithm, InvalidKeySet, Key, KeyMaterial, KeySet, TokenFault};

/// First byte of an uncompressed point (SEC 1, 2.3.3).
const UNCOMPRESSED: u8 = 4;

/// Numbers of sets; none is used twice in a process.
static NUMBERS: AtomicU64 = AtomicU64::new(0);

pub(super) struct Keys {
    number: u64,
    set: KeySet,
    parsed: Vec<Parsed>,
}

struct Parsed {
    algorithm: Algorithm,
    key: Key,
    public: ParsedPublicKey,
}

impl Keys {
    /// Keys that the library refuses, such as RSA below 2,048 bits, are left out.
    pub(super) fn parse(text: &str) -> Result<Self, InvalidKeySet> {
        let set = KeySet::parse(text)?;
        let each = |algorithm: Algorithm| set.candidates(algorithm, None).map(move |key| (algorithm, key));
        let parse = |(algorithm, key): (Algorithm, &Key)| {
            Some(Parsed { algorithm, key: key.clone(), public: public(algorithm, &key.material)? })
        };
        let parsed = Algorithm::ALL.into_iter().flat_map(each).filter_map(parse).collect();
        Ok(Self { number: NUMBERS.fetch_add(1, Ordering::Relaxed), set, parsed })
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Keys that can be used.
    pub(super) fn usable(&self) -> usize {
        let mut used: Vec<&Key> = Vec::new();
        for parsed in &self.parsed {
            if !used.contains(&&parsed.key) {
                used.push(&parsed.key);
            }
        }
        used.len()
    }

    pub(super) fn verify(
        &self,
        algorithm: Algorithm,
        kid: Option<&str>,
        signed: &[u8],
        signature: &[u8],
    ) -> Result<(), TokenFault> {
        let mut fault = TokenFault::NoKey;
        for key in self.set.candidates(algorithm, kid) {
            let own = |parsed: &&Parsed| parsed.algorithm == algorithm && parsed.key == *key;
            let Some(parsed) = self.parsed.iter().find(own) else { continue };
            if parsed.public.verify_sig(signed, signature).is_ok() {
                return Ok(());
            }
            fault = TokenFault::Signature;
        }
        Err(fault)
    }
}

/// Whether `signature` is one of `signed` by this one key.
pub(super) fn is_signed_by(key: &Key, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> bool {
    let public = public(algorithm, &key.material);
    public.is_some_and(|public| public.verify_sig(signed, signature).is_ok())
}

/// `None` also for an algorithm that is not one of this kind of key.
fn public(algorithm: Algorithm, material: &KeyMaterial) -> Option<ParsedPublicKey> {
    let rsa = |parameters| {
        let KeyMaterial::Rsa { modulus, exponent } = material else { return None };
        RsaPublicKeyComponents { n: modulus, e: exponent }.to_parsed_public_key(parameters).ok()
    };
    match (algorithm, material) {
        (Algorithm::Rs256, _) => rsa(&RSA_PKCS1_2048_8192_SHA256),
        (Algorithm::Rs384, _) => rsa(&RSA_PKCS1_2048_8192_SHA384),
        (Algorithm::Rs512, _) => rsa(&RSA_PKCS1_2048_8192_SHA512),
        (Algorithm::Es256, KeyMaterial::P256 { x, y }) => {
            ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point(x, y, 32)?).ok()
        }
        (Algorithm::Es384, KeyMaterial::P384 { x, y }) => {
            ParsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, point(x, y, 48)?).ok()
        }
        (Algorithm::Es256 | Algorithm::Es384, _) => None,
    }
}

/// Coordinates of full length (RFC 7518, section 6.2.1.2).
fn point(x: &[u8], y: &[u8], bytes: usize) -> Option<Vec<u8>> {
    (x.len() == bytes && y.len() == bytes).then(|| [&[UNCOMPRESSED], x, y].concat())
}
