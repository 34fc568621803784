//! What a node signs so that others may believe it later, and who made such a signature.
//!
//! The key is that of the node's certificate. A signature is judged by the time at which it says that it was made: the
//! certificate has ended long before anybody asks.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    SignatureScheme,
    pki_types::{CertificateDer, TrustAnchor, UnixTime, pem::PemObject as _},
    sign::CertifiedKey,
};
use spiffe_id::{NodeId, PeerName};
use webpki::{EndEntityCert, anchor_from_trusted_cert, aws_lc_rs::ECDSA_P256_SHA256};

use super::verify::{Leaf, PeerRefused, Side, chain};

/// The node's key, for signatures.
pub struct Seal {
    certified: CertifiedKey,
    not_after: SystemTime,
}

/// The key does not sign; a fault of the library of primitives.
#[derive(Debug, thiserror::Error)]
#[error("the node's key does not sign: {0}")]
pub struct SealFault(String);

impl Seal {
    pub(super) fn new(certified: CertifiedKey, not_after: SystemTime) -> Self {
        Self { certified, not_after }
    }

    /// DER, leaf first, without the root.
    pub fn certificates(&self) -> impl Iterator<Item = &[u8]> {
        self.certified.cert.iter().map(AsRef::as_ref)
    }

    /// Whether a signature of this moment would be believed.
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        now < self.not_after
    }

    /// ECDSA P-256 with SHA-256, in DER.
    ///
    /// # Errors
    /// [`SealFault`]
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SealFault> {
        let signer = self.certified.key.choose_scheme(&[SignatureScheme::ECDSA_NISTP256_SHA256]);
        let signer = signer.ok_or_else(|| SealFault("it is no P-256 key".to_owned()))?;
        signer.sign(message).map_err(|error| SealFault(error.to_string()))
    }
}

impl fmt::Debug for Seal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Seal").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// The seal in force: renewed with the node's certificate.
#[derive(Clone)]
pub struct Seals(Arc<dyn Fn() -> Option<Arc<Seal>> + Send + Sync>);

impl Seals {
    pub fn new(current: impl Fn() -> Option<Arc<Seal>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(current))
    }

    /// `None`: the node has no certificate, or none that lasts.
    pub fn at(&self, now: SystemTime) -> Option<Arc<Seal>> {
        (self.0)().filter(|seal| seal.is_valid_at(now))
    }
}

impl fmt::Debug for Seals {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Seals").finish_non_exhaustive()
    }
}

/// Tells which node made a signature, by roots alone.
#[derive(Debug)]
pub struct SealWitness {
    anchors: Vec<TrustAnchor<'static>>,
}

/// Why a signature is nobody's of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealRefused {
    #[error("it comes without a certificate")]
    NoCertificate,
    #[error("its certificate does not hold: {0}")]
    Certificate(PeerRefused),
    #[error("its certificate is {0}'s, which is no node")]
    NotANode(PeerName),
    #[error("another key than the certificate's made it, or for something else")]
    Signature,
}

/// Why roots cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootsFault {
    #[error("no PEM: {0}")]
    Pem(rustls::pki_types::pem::Error),
    #[error("it holds no certificate")]
    Empty,
    #[error("certificate {number} of it cannot be used as a root: {problem}")]
    Root { number: usize, problem: webpki::Error },
}

impl SealWitness {
    /// Roots in PEM.
    ///
    /// # Errors
    /// [`RootsFault`]: roots are used whole or not at all.
    pub fn of_pem(pem: &str) -> Result<Self, RootsFault> {
        let roots: Vec<CertificateDer<'_>> = CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(RootsFault::Pem)?;
        if roots.is_empty() {
            return Err(RootsFault::Empty);
        }
        let anchor = |(number, root): (usize, &CertificateDer<'_>)| {
            let anchor = anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned());
            anchor.map_err(|problem| RootsFault::Root { number: number + 1, problem })
        };
        Ok(Self { anchors: roots.iter().enumerate().map(anchor).collect::<Result<_, _>>()? })
    }

    /// Who made a signature at a time. `certificates`: DER, leaf first.
    ///
    /// # Errors
    /// [`SealRefused`]
    pub fn check(
        &self,
        certificates: &[Vec<u8>],
        at: SystemTime,
        message: &[u8],
        signature: &[u8],
    ) -> Result<NodeId, SealRefused> {
        let certificates: Vec<CertificateDer<'_>> =
            certificates.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let (leaf, intermediates) = certificates.split_first().ok_or(SealRefused::NoCertificate)?;
        let name = Leaf::parse(leaf).map_err(SealRefused::Certificate)?.name;
        let PeerName::Node(node) = name else { return Err(SealRefused::NotANode(name)) };
        let at = UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO));
        chain(leaf, intermediates, &self.anchors, Side::Client, at).map_err(SealRefused::Certificate)?;
        let certificate = EndEntityCert::try_from(leaf)
            .map_err(|_| SealRefused::Certificate(PeerRefused::Malformed { what: "the leaf" }))?;
        certificate
            .verify_signature(ECDSA_P256_SHA256, message, signature)
            .map_err(|_| SealRefused::Signature)?;
        Ok(node)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::ExtendedKeyUsagePurpose;

    use super::*;
    use crate::certs::{
        PrivateKey,
        testing::{Ca, Shape},
    };

    const NODE: &str = "spiffe://cluster.local/culvert/node/node-a";

    fn witness(of: &Ca) -> SealWitness {
        SealWitness { anchors: vec![anchor_from_trusted_cert(&of.root).expect("a root").to_owned()] }
    }

    /// Signs with a key of this shape's certificate, and has it judged at `after` seconds from now.
    fn judged(shape: &Shape, roots: &Ca, ours: &Ca, after: i64) -> Result<String, SealRefused> {
        let seal = ours.seal(shape);
        let certificates: Vec<Vec<u8>> = seal.certificates().map(<[u8]>::to_vec).collect();
        let signature = seal.sign(b"message").expect("it signs");
        let distance = Duration::from_secs(after.unsigned_abs());
        let at = if after < 0 { SystemTime::now() - distance } else { SystemTime::now() + distance };
        let node = witness(roots).check(&certificates, at, b"message", &signature)?;
        Ok(node.to_string())
    }

    #[test]
    fn a_node_s_signature_is_known_by_the_root_alone_at_its_time() {
        let ours = Ca::new("ours");
        assert_eq!(judged(&Shape::good(NODE), &ours, &ours, 0), Ok(NODE.to_owned()));
        assert_eq!(judged(&Shape::good(NODE), &ours, &ours, 3_599), Ok(NODE.to_owned()));
        for (after, word) in [(3_700, "ended"), (-3_600, "begins")] {
            let refused = judged(&Shape::good(NODE), &ours, &ours, after).expect_err("outside of its time");
            assert!(refused.to_string().contains(word), "{refused}");
        }
    }

    #[test]
    fn nobody_else_s_signature_counts() {
        let (ours, others) = (Ca::new("ours"), Ca::new("others"));
        let shape = Shape::good(NODE);
        let other_ca = SealRefused::Certificate(PeerRefused::OtherAuthority);
        assert_eq!(judged(&shape, &ours, &others, 0), Err(other_ca));
        for uri in ["spiffe://cluster.local/ns/shop/sa/cart", "spiffe://cluster.local/culvert/ca"] {
            let refused = judged(&Shape::good(uri), &ours, &ours, 0).expect_err("no node");
            assert!(matches!(refused, SealRefused::NotANode(_)), "{refused}");
        }
        let two = Shape { uris: vec![NODE.to_owned(), NODE.to_owned()], ..shape.clone() };
        let several = SealRefused::Certificate(PeerRefused::SeveralUriNames { count: 2 });
        assert_eq!(judged(&two, &ours, &ours, 0), Err(several));
        let authority = Shape { is_ca: true, ..shape.clone() };
        assert_eq!(
            judged(&authority, &ours, &ours, 0),
            Err(SealRefused::Certificate(PeerRefused::IsAuthority))
        );
        let usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
        let refused = judged(&Shape { usages, ..shape }, &ours, &ours, 0).expect_err("of another use");
        assert!(matches!(refused, SealRefused::Certificate(PeerRefused::Usage { .. })), "{refused}");
    }

    #[test]
    fn a_signature_is_of_one_key_and_one_message() {
        let ours = Ca::new("ours");
        let (seal, other) = (ours.seal(&Shape::good(NODE)), ours.seal(&Shape::good(NODE)));
        let certificates: Vec<Vec<u8>> = seal.certificates().map(<[u8]>::to_vec).collect();
        let check = |certificates: &[Vec<u8>], message: &[u8], signature: &[u8]| {
            witness(&ours).check(certificates, SystemTime::now(), message, signature)
        };
        let signature = seal.sign(b"message").expect("it signs");
        assert!(check(&certificates, b"message", &signature).is_ok());
        assert_eq!(check(&certificates, b"massage", &signature), Err(SealRefused::Signature));
        assert_eq!(check(&certificates, b"message", b""), Err(SealRefused::Signature));
        let others = other.sign(b"message").expect("it signs");
        assert_eq!(check(&certificates, b"message", &others), Err(SealRefused::Signature));
        assert_eq!(check(&[], b"message", &signature), Err(SealRefused::NoCertificate));
        assert!(matches!(
            check(&[vec![1, 2, 3]], b"message", &signature),
            Err(SealRefused::Certificate(PeerRefused::Malformed { .. }))
        ));
        // Without the intermediate nothing leads to the root.
        let alone = SealRefused::Certificate(PeerRefused::OtherAuthority);
        assert_eq!(check(&certificates[..1], b"message", &signature), Err(alone));
    }

    #[test]
    fn a_seal_that_has_ended_is_not_offered() {
        let seal = Arc::new(Ca::new("ours").seal(&Shape::good(NODE)));
        let seals = Seals::new(move || Some(Arc::clone(&seal)));
        let now = SystemTime::now();
        assert!(seals.at(now).is_some());
        assert!(seals.at(now + Duration::from_secs(3_601)).is_none());
        assert!(Seals::new(|| None).at(now).is_none());
        assert!(!format!("{:?}", Ca::new("ours").seal(&Shape::good(NODE))).contains("key"));
    }

    #[test]
    fn roots_are_used_whole_or_not_at_all() {
        assert!(matches!(SealWitness::of_pem(""), Err(RootsFault::Empty)));
        let key = PrivateKey::generate().expect("a key").expose_pem();
        assert!(matches!(SealWitness::of_pem(&key), Err(RootsFault::Empty)));
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(matches!(SealWitness::of_pem(broken), Err(RootsFault::Root { number: 1, .. })));
        assert!(matches!(SealWitness::of_pem("-----BEGIN CERTIFICATE-----\nA"), Err(RootsFault::Pem(_))));
    }
}
