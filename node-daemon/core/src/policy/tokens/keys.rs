//! Key sets (RFC 7517), as far as a token can name a key of them.

use serde_json::Value;

use super::{encoding::decode, verify::Algorithm};

/// Keys of one set that are kept; the largest known issuers publish a dozen.
pub const KEYS_MAX: usize = 64;

/// Why a text is no key set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKeySet {
    #[error("it is no JSON object with a list named keys")]
    Shape,
    #[error("it has more than {KEYS_MAX} keys")]
    TooMany,
}

/// The usable public keys of an issuer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeySet {
    keys: Vec<Key>,
}

/// One public key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    pub kid: Option<String>,
    pub algorithm: Option<String>,
    pub material: KeyMaterial,
}

/// Numbers in big-endian order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyMaterial {
    Rsa { modulus: Vec<u8>, exponent: Vec<u8> },
    P256 { x: Vec<u8>, y: Vec<u8> },
    P384 { x: Vec<u8>, y: Vec<u8> },
}

impl KeySet {
    /// Reads a set. Keys of other kinds, for other uses or without their numbers are left out.
    ///
    /// # Errors
    /// Where it is no set at all.
    pub fn parse(text: &str) -> Result<Self, InvalidKeySet> {
        let set: Value = serde_json::from_str(text).map_err(|_| InvalidKeySet::Shape)?;
        let keys = set.get("keys").and_then(Value::as_array).ok_or(InvalidKeySet::Shape)?;
        if keys.len() > KEYS_MAX {
            return Err(InvalidKeySet::TooMany);
        }
        Ok(Self { keys: keys.iter().filter_map(key).collect() })
    }

    /// The keys that may have signed a token: the same `kid` and `alg` where both sides have one (policy A-12), and a key
    /// of the algorithm's kind.
    pub fn candidates(&self, algorithm: Algorithm, kid: Option<&str>) -> impl Iterator<Item = &Key> {
        self.keys.iter().filter(move |key| {
            let same_kid = key.kid.as_deref().zip(kid).is_none_or(|(own, wanted)| own == wanted);
            let same_algorithm = key.algorithm.as_deref().is_none_or(|own| own == algorithm.name());
            same_kid && same_algorithm && key.material.fits(algorithm)
        })
    }
}

impl KeyMaterial {
    fn fits(&self, algorithm: Algorithm) -> bool {
        match algorithm {
            Algorithm::Rs256 | Algorithm::Rs384 | Algorithm::Rs512 => matches!(self, Self::Rsa { .. }),
            Algorithm::Es256 => matches!(self, Self::P256 { .. }),
            Algorithm::Es384 => matches!(self, Self::P384 { .. }),
        }
    }
}

fn key(value: &Value) -> Option<Key> {
    let text = |name: &str| value.get(name).and_then(Value::as_str);
    let number = |name: &str| decode(text(name)?).filter(|bytes| !bytes.is_empty());
    if text("use").is_some_and(|purpose| purpose != "sig") {
        return None;
    }
    let material = match (text("kty")?, text("crv")) {
        ("RSA", _) => KeyMaterial::Rsa { modulus: number("n")?, exponent: number("e")? },
        ("EC", Some("P-256")) => KeyMaterial::P256 { x: number("x")?, y: number("y")? },
        ("EC", Some("P-384")) => KeyMaterial::P384 { x: number("x")?, y: number("y")? },
        _ => return None,
    };
    Some(Key { kid: text("kid").map(str::to_owned), algorithm: text("alg").map(str::to_owned), material })
}
