//! A signing request that proved itself: its key is of an allowed kind, and who sent it holds the private half.
//!
//! Parsed with x509-parser, not with rcgen: rcgen takes the key's algorithm from the request's *signature*, and then
//! issues certificates that nobody can decode where hash and curve do not go together (rcgen #448).

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, ED25519, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, UnparsedPublicKey, VerificationAlgorithm,
};
use ca_proto::convert::CsrDer;
use ca_proto::refusal::{Reason, Refusal};
use rcgen::PublicKeyData as _;
use sha2::{Digest as _, Sha256};
use x509_parser::asn1_rs::{Any, Oid};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_PKCS1_RSAENCRYPTION,
    OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA, OID_SIG_ECDSA_WITH_SHA256,
    OID_SIG_ECDSA_WITH_SHA384, OID_SIG_ED25519, OID_X509_EXT_SUBJECT_ALT_NAME,
};
use x509_parser::prelude::FromDer as _;
use x509_parser::public_key::PublicKey as ParsedKey;
use x509_parser::x509::{AlgorithmIdentifier, SubjectPublicKeyInfo};

/// Smallest RSA key that is signed, in bits; below it lies what can be factored.
const RSA_BITS_MIN: usize = 2048;

/// Largest RSA key that is signed, in bits; verifying a larger one costs peers milliseconds a handshake.
const RSA_BITS_MAX: usize = 8192;

/// A verified request: key, and the names that it asks for.
#[derive(Debug)]
pub(crate) struct Csr {
    key: PublicKey,
    names: Vec<String>,
}

impl Csr {
    /// Reads and verifies a request.
    ///
    /// # Errors
    /// A refusal that names what is wrong with it.
    pub(crate) fn verify(der: &CsrDer) -> Result<Self, Refusal> {
        let (rest, csr) = X509CertificationRequest::from_der(der.as_bytes())
            .map_err(|error| malformed(format!("it is not PKCS#10 ({error})")))?;
        if !rest.is_empty() {
            return Err(malformed(format!("{} bytes follow it", rest.len())));
        }
        let info = &csr.certification_request_info;
        if info.version.0 != 0 {
            return Err(malformed(format!("its version is {}, expected 0", info.version.0)));
        }
        let kind = KeyKind::of(&info.subject_pki)?;
        let key = PublicKey::new(kind, &info.subject_pki)?;
        kind.verify(&csr.signature_algorithm, &key, info.raw, &csr.signature_value.data)?;
        Ok(Self { key, names: requested_names(&csr)? })
    }

    /// The key to certify.
    pub(crate) fn key(&self) -> &PublicKey {
        &self.key
    }

    /// The names that the request asks for: none, or exactly the granted one.
    ///
    /// # Errors
    /// A refusal that repeats the first name that was not granted.
    pub(crate) fn asks_for_nothing_but(&self, granted: &str) -> Result<(), Refusal> {
        match &self.names[..] {
            [] => Ok(()),
            [name] if name == granted => Ok(()),
            [name] => Err(Refusal::new(
                Reason::CsrNames,
                format!("csr: it asks for {name:?}, expected no name or {granted:?}"),
            )),
            names => Err(Refusal::new(
                Reason::CsrNames,
                format!("csr: it asks for {} names, expected none or {granted:?} alone", names.len()),
            )),
        }
    }
}

/// A public key of an allowed kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PublicKey {
    kind: KeyKind,
    /// SubjectPublicKeyInfo as it stood in the request; certificates carry it byte for byte.
    spki: Vec<u8>,
    /// The bits within it.
    bits: Vec<u8>,
}

impl PublicKey {
    fn new(kind: KeyKind, spki: &SubjectPublicKeyInfo<'_>) -> Result<Self, Refusal> {
        let key = Self { kind, spki: spki.raw.to_vec(), bits: spki.subject_public_key.data.to_vec() };
        // The certificate's builder writes the algorithm itself. Only a key whose encoding it reproduces is copied
        // verbatim, so any other encoding is refused.
        if key.subject_public_key_info() != key.spki {
            return Err(refused_key("its encoding is not DER in the usual form"));
        }
        Ok(key)
    }

    /// SubjectPublicKeyInfo, DER.
    pub(crate) fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// SHA-256 of the SubjectPublicKeyInfo.
    pub(crate) fn hash(&self) -> [u8; 32] {
        Sha256::digest(&self.spki).into()
    }
}

impl rcgen::PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.bits
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        match self.kind {
            KeyKind::P256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            KeyKind::P384 => &rcgen::PKCS_ECDSA_P384_SHA384,
            KeyKind::Ed25519 => &rcgen::PKCS_ED25519,
            KeyKind::Rsa => &rcgen::PKCS_RSA_SHA256,
        }
    }
}

/// The kinds of keys that are signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeyKind {
    P256,
    P384,
    Ed25519,
    Rsa,
}

impl KeyKind {
    fn of(spki: &SubjectPublicKeyInfo<'_>) -> Result<Self, Refusal> {
        let algorithm = &spki.algorithm.algorithm;
        if *algorithm == OID_SIG_ED25519 {
            return Ok(Self::Ed25519);
        }
        if *algorithm == OID_PKCS1_RSAENCRYPTION {
            return rsa(spki);
        }
        if *algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY {
            return Err(refused_key(&format!("its algorithm is {algorithm}")));
        }
        let curve = spki.algorithm.parameters.as_ref().and_then(|any: &Any<'_>| any.clone().oid().ok());
        let (kind, point_bytes) = match curve {
            Some(curve) if curve == OID_EC_P256 => (Self::P256, 65),
            Some(curve) if curve == OID_NIST_EC_P384 => (Self::P384, 97),
            Some(curve) => return Err(refused_key(&format!("its curve is {curve}"))),
            None => return Err(refused_key("its curve is not named")),
        };
        match &spki.subject_public_key.data[..] {
            point @ [4, ..] if point.len() == point_bytes => Ok(kind),
            _ => Err(refused_key("its point is not uncompressed")),
        }
    }

    /// Proof of possession, by the algorithm of the *key*: the one that the request names must go with it.
    fn verify(
        self,
        named: &AlgorithmIdentifier<'_>,
        key: &PublicKey,
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), Refusal> {
        let allowed: &[(Oid<'_>, &'static dyn VerificationAlgorithm)] = match self {
            Self::P256 => &[(OID_SIG_ECDSA_WITH_SHA256, &ECDSA_P256_SHA256_ASN1)],
            Self::P384 => &[(OID_SIG_ECDSA_WITH_SHA384, &ECDSA_P384_SHA384_ASN1)],
            Self::Ed25519 => &[(OID_SIG_ED25519, &ED25519)],
            Self::Rsa => &[
                (OID_PKCS1_SHA256WITHRSA, &RSA_PKCS1_2048_8192_SHA256),
                (OID_PKCS1_SHA384WITHRSA, &RSA_PKCS1_2048_8192_SHA384),
                (OID_PKCS1_SHA512WITHRSA, &RSA_PKCS1_2048_8192_SHA512),
            ],
        };
        let Some((_, algorithm)) = allowed.iter().find(|(oid, _)| *oid == named.algorithm) else {
            return Err(Refusal::new(
                Reason::CsrAlgorithm,
                format!(
                    "csr: its signature algorithm is {}, expected {} for a key of kind {}",
                    algorithm_name(&named.algorithm),
                    self.expected_algorithm(),
                    self.name()
                ),
            ));
        };
        UnparsedPublicKey::new(*algorithm, &key.bits).verify(message, signature).map_err(|_| {
            Refusal::new(
                Reason::CsrSignature,
                "csr: its signature is not by its own key, so nobody proved to hold the private half",
            )
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::P256 => "P-256",
            Self::P384 => "P-384",
            Self::Ed25519 => "Ed25519",
            Self::Rsa => "RSA",
        }
    }

    fn expected_algorithm(self) -> &'static str {
        match self {
            Self::P256 => "ecdsa-with-SHA256",
            Self::P384 => "ecdsa-with-SHA384",
            Self::Ed25519 => "Ed25519",
            Self::Rsa => "sha256WithRSAEncryption (or sha384, sha512)",
        }
    }
}

fn rsa(spki: &SubjectPublicKeyInfo<'_>) -> Result<KeyKind, Refusal> {
    let Ok(ParsedKey::RSA(key)) = spki.parsed() else {
        return Err(refused_key("it is not an RSA key although it says so"));
    };
    let significant = key.modulus.iter().skip_while(|byte| **byte == 0).count();
    let first = key.modulus.iter().find(|byte| **byte != 0).map_or(8, |byte| byte.leading_zeros() as usize);
    let bits = (significant * 8).saturating_sub(first);
    if !(RSA_BITS_MIN..=RSA_BITS_MAX).contains(&bits) {
        return Err(refused_key(&format!("it is RSA of {bits} bits")));
    }
    Ok(KeyKind::Rsa)
}

/// Every name of every subject alternative name that the request asks for, as URI text or as a description of a name
/// of another type (which equals no granted name).
fn requested_names(csr: &X509CertificationRequest<'_>) -> Result<Vec<String>, Refusal> {
    let mut names = Vec::new();
    for attribute in csr.certification_request_info.iter_attributes() {
        let ParsedCriAttribute::ExtensionRequest(request) = attribute.parsed_attribute() else {
            continue;
        };
        for extension in request.extensions.iter().filter(|e| e.oid == OID_X509_EXT_SUBJECT_ALT_NAME) {
            let ParsedExtension::SubjectAlternativeName(asked) = extension.parsed_extension() else {
                return Err(malformed("its subject alternative name does not parse".into()));
            };
            names.extend(asked.general_names.iter().map(name_text));
        }
    }
    Ok(names)
}

fn name_text(name: &GeneralName<'_>) -> String {
    if let GeneralName::URI(uri) = name {
        (*uri).to_owned()
    } else {
        format!("a name that is no URI: {name}")
    }
}

fn algorithm_name(oid: &Oid<'_>) -> String {
    if *oid == OID_SIG_ECDSA_WITH_SHA256 {
        "ecdsa-with-SHA256".into()
    } else if *oid == OID_SIG_ECDSA_WITH_SHA384 {
        "ecdsa-with-SHA384".into()
    } else {
        oid.to_id_string()
    }
}

fn malformed(what: String) -> Refusal {
    Refusal::new(Reason::CsrMalformed, format!("csr: {what}; expected a PKCS#10 request"))
}

fn refused_key(what: &str) -> Refusal {
    Refusal::new(
        Reason::CsrKey,
        format!(
            "csr: its key is refused, {what}; expected P-256, P-384, Ed25519 or RSA of 2048 to 8192 bits"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SubjectPublicKeyInfo of an RSA key whose modulus has so many bits, all of them ones.
    fn rsa_of(bits: usize) -> Vec<u8> {
        let mut modulus = vec![0xff; bits.div_ceil(8)];
        modulus[0] >>= (8 - bits % 8) % 8;
        if modulus[0] >= 0x80 {
            modulus.insert(0, 0); // or it would be negative
        }
        let key = tlv(0x30, &[tlv(0x02, &modulus), tlv(0x02, &[1, 0, 1])].concat());
        let oid = [0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];
        tlv(0x30, &[tlv(0x30, &oid), tlv(0x03, &[vec![0], key].concat())].concat())
    }

    fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = content.len().to_be_bytes();
        let significant: Vec<u8> = length.into_iter().skip_while(|byte| *byte == 0).collect();
        let head = match content.len() {
            0..0x80 => vec![tag, length[7]],
            _ => [vec![tag, 0x80 | u8::try_from(significant.len()).expect("few")], significant].concat(),
        };
        [head, content.to_vec()].concat()
    }

    #[test]
    fn the_limits_of_an_rsa_key_are_exact() {
        for (bits, signed) in [
            (RSA_BITS_MIN - 1, false),
            (RSA_BITS_MIN, true),
            (3072, true),
            (RSA_BITS_MAX, true),
            (RSA_BITS_MAX + 1, false),
            (RSA_BITS_MAX + 8, false),
            (9, false),
        ] {
            let der = rsa_of(bits);
            let (_, spki) = SubjectPublicKeyInfo::from_der(&der).expect("well formed");
            match KeyKind::of(&spki) {
                Ok(kind) => assert!(signed && kind == KeyKind::Rsa, "{bits} bits"),
                Err(refusal) => {
                    assert!(!signed && refusal.reason == Reason::CsrKey, "{bits} bits: {}", refusal.message);
                    assert!(refusal.message.contains(&format!("RSA of {bits} bits")), "{}", refusal.message);
                }
            }
        }
    }
}
