//! Request + [`Grant`] -> certificate. The only caller of the issuing key for certificates of others.
//!
//! The profile is one for all: empty subject, exactly one URI name (critical), P-256 or what the request brought,
//! `digitalSignature`, server and client authentication, no authority over others.

use ca_proto::refusal::{Reason, Refusal};
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyUsagePurpose,
    SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use spiffe_id::{NodeId, PeerName};

use crate::authorise::Grant;
use crate::clock::Seconds;
use crate::csr::Csr;
use crate::keys::CaPair;

/// Seconds by which a certificate's life begins before its issue: clocks of peers run up to half a minute behind.
pub(crate) const BACKDATE_SECONDS: u64 = 120;

/// Bytes of a serial number: 126 random bits, a fixed length, positive (RFC 5280 section 4.1.2.2 allows 20 bytes).
pub(crate) const SERIAL_BYTES: usize = 16;

/// A certificate, and what the ledger notes of it.
#[derive(Clone, Debug)]
pub(crate) struct Certificate {
    pub(crate) leaf: CertificateDer<'static>,
    pub(crate) issuer: CertificateDer<'static>,
    pub(crate) serial: [u8; SERIAL_BYTES],
    pub(crate) key_hash: [u8; 32],
    pub(crate) name: PeerName,
    pub(crate) node: Option<NodeId>,
    pub(crate) expires: Seconds,
}

/// Issues one certificate for the key of `csr` with the name of `grant`.
///
/// Its life ends with that of the issuing key at the latest.
///
/// # Errors
/// [`Reason::CsrNames`] if the request asks for another name; [`Reason::NotReady`] if the issuing key has expired or
/// the certificate cannot be built.
pub(crate) fn issue(csr: &Csr, grant: Grant, issuing: &CaPair, now: Seconds) -> Result<Certificate, Refusal> {
    let name = grant.name().to_string();
    csr.asks_for_nothing_but(&name)?;
    if issuing.expires() <= now {
        return Err(not_ready(format!("the issuing key expired at {}, it is {now}", issuing.expires())));
    }
    let expires = now.plus(grant.lifetime_seconds()).min(issuing.expires());
    let serial = random_serial()?;
    let uri = name.try_into().map_err(|_| not_ready("the name is not ASCII".into()))?;
    let params = profile(SanType::URI(uri), serial, now.minus(BACKDATE_SECONDS), expires)?;
    let leaf = issuing.certify(&grant, &params, csr.key()).map_err(|error| not_ready(error.to_string()))?;
    Ok(Certificate {
        leaf,
        issuer: issuing.certificate().clone(),
        serial,
        key_hash: csr.key().hash(),
        name: grant.name().clone(),
        node: grant.node().cloned(),
        expires,
    })
}

/// Every field is set here: the defaults of the library are those of a toy (a subject, 1975 to 4096, no key usage).
fn profile(
    name: SanType,
    serial: [u8; SERIAL_BYTES],
    not_before: Seconds,
    not_after: Seconds,
) -> Result<CertificateParams, Refusal> {
    let mut params = CertificateParams::default();
    params.not_before = moment(not_before).ok_or_else(|| not_ready("the clock is out of range".into()))?;
    params.not_after = moment(not_after).ok_or_else(|| not_ready("the clock is out of range".into()))?;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![name];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.key_identifier_method = KeyIdMethod::Sha256;
    Ok(params)
}

pub(crate) fn moment(at: Seconds) -> Option<time::OffsetDateTime> {
    time::OffsetDateTime::from_unix_timestamp(i64::try_from(at.0).ok()?).ok()
}

pub(crate) fn random_serial() -> Result<[u8; SERIAL_BYTES], Refusal> {
    let mut serial = [0; SERIAL_BYTES];
    aws_lc_rs::rand::fill(&mut serial).map_err(|_| not_ready("there is no randomness".into()))?;
    // Positive, and never shorter than its 16 bytes.
    serial[0] = (serial[0] & 0x7f) | 0x40;
    Ok(serial)
}

fn not_ready(what: String) -> Refusal {
    Refusal::new(Reason::NotReady, format!("the authority cannot issue at present: {what}"))
}

#[cfg(test)]
mod tests {
    use ca_proto::convert::CsrDer;
    use proptest::prelude::*;
    use rcgen::{KeyPair, PublicKeyData as _};
    use rustls::pki_types::UnixTime;
    use spiffe_id::TrustDomain;

    use super::*;
    use crate::authorise;
    use crate::keys::tests::World;

    const NOW: Seconds = Seconds(1_800_000_000);

    /// A key of each allowed kind, with each signature that goes with it.
    fn keys() -> [KeyPair; 6] {
        [
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ED25519,
            &rcgen::PKCS_RSA_SHA256,
            &rcgen::PKCS_RSA_SHA384,
            &rcgen::PKCS_RSA_SHA512,
        ]
        .map(|kind| KeyPair::generate_for(kind).expect("a key"))
    }

    fn csr(key: &KeyPair, subject: &str) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, subject);
        params.serialize_request(key).expect("a request").der().to_vec()
    }

    fn grant(lifetime_seconds: u64) -> Grant {
        let domain: TrustDomain = "cluster.local".parse().expect("a trust domain");
        authorise::authority_itself(&domain, lifetime_seconds)
    }

    fn is_verified(world: &World, certificate: &Certificate, at: Seconds) -> bool {
        let anchor = webpki::anchor_from_trusted_cert(world.authority.root()).expect("a root");
        let leaf = webpki::EndEntityCert::try_from(&certificate.leaf).expect("decodable");
        [webpki::KeyUsage::client_auth(), webpki::KeyUsage::server_auth()].into_iter().all(|usage| {
            leaf.verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                std::slice::from_ref(&anchor),
                std::slice::from_ref(&certificate.issuer),
                UnixTime::since_unix_epoch(std::time::Duration::from_secs(at.0)),
                usage,
                None,
                None,
            )
            .is_ok()
        })
    }

    #[test]
    fn whatever_request_is_accepted_gives_a_leaf_that_webpki_accepts() {
        let (world, keys) = (World::new("property", NOW), keys());
        proptest!(ProptestConfig::with_cases(400), |(
            kind in 0..keys.len(),
            subject in "[ -~]{0,20}",
            lifetime in 1..200_000_u64,
            mutation in proptest::option::of((any::<prop::sample::Index>(), any::<u8>())),
            cut in proptest::option::weighted(0.1, any::<prop::sample::Index>()),
        )| {
            let mut der = csr(&keys[kind], &subject);
            let whole = mutation.is_none() && cut.is_none();
            if let Some((at, byte)) = mutation {
                let at = at.index(der.len());
                der[at] = byte;
            }
            if let Some(at) = cut {
                der.truncate(at.index(der.len()).max(1));
            }
            let verified = Csr::verify(&CsrDer::from_der(der).expect("within the limit"));
            prop_assert!(verified.is_ok() || !whole, "{verified:?}");
            if let Ok(csr) = verified {
                let issued = issue(&csr, grant(lifetime), &world.authority.issuing(), NOW).expect("issued");
                prop_assert_eq!(csr.key().spki(), keys[kind].subject_public_key_info());
                let is_verified = |at| is_verified(&world, &issued, at);
                prop_assert!(is_verified(NOW));
                prop_assert!(is_verified(NOW.minus(BACKDATE_SECONDS)), "clocks behind ours are served");
                prop_assert!(is_verified(NOW.plus(lifetime)));
                prop_assert!(!is_verified(NOW.plus(lifetime + 1)));
            }
        });
    }

    #[test]
    fn no_certificate_outlives_its_issuer_and_an_expired_issuer_signs_nothing() {
        let world = World::new("outlive", NOW);
        let issuing = world.authority.issuing();
        let key = KeyPair::generate().expect("a key");
        let csr = Csr::verify(&CsrDer::from_der(csr(&key, "")).expect("a request")).expect("a good one");
        let late = issuing.expires().minus(10);
        let issued = issue(&csr, grant(3600), &issuing, late).expect("issued");
        assert_eq!(issued.expires, issuing.expires());
        let refusal = issue(&csr, grant(3600), &issuing, issuing.expires()).expect_err("refused");
        assert_eq!(refusal.reason, Reason::NotReady);
    }

    #[test]
    fn serials_are_positive_of_one_length_and_distinct() {
        let serials: std::collections::BTreeSet<_> =
            (0..100).map(|_| random_serial().expect("random")).collect();
        assert_eq!(serials.len(), 100);
        assert!(serials.iter().all(|serial| serial[0] & 0xc0 == 0x40));
    }
}
