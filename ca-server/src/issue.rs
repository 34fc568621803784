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
