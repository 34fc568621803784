//! Keys and certificates that somebody may hold.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer, X509Certificate};

/// A key and the chain that goes with it, leaf first.
#[derive(Debug)]
pub struct Credentials {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

/// Somebody who signs certificates: a stranger, or one who holds the mesh's own issuing key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// From the signer's certificate towards the root, which is left out unless it signs itself.
    chain: Vec<CertificateDer<'static>>,
}

/// What a leaf shall say.
#[derive(Debug, Clone)]
pub struct Leaf {
    uris: Vec<String>,
    dns: Vec<String>,
    valid: std::ops::Range<Duration>,
}

impl Leaf {
    /// A certificate for these URI names, valid for an hour.
    pub fn of(uris: &[&str]) -> Self {
        let uris = uris.iter().map(|uri| (*uri).to_owned()).collect();
        Self { uris, dns: Vec::new(), valid: Duration::minutes(-2)..Duration::hours(1) }
    }

    /// With a DNS name beside.
    pub fn dns(mut self, name: &str) -> Self {
        self.dns.push(name.to_owned());
        self
    }

    /// Ran out a minute ago.
    pub fn expired(mut self) -> Self {
        self.valid = Duration::hours(-1)..Duration::minutes(-1);
        self
    }
}

impl Authority {
    /// A self-signed root that nobody in the mesh knows.
    pub fn stranger() -> Self {
        let key = key_pair();
        let mut params = authority_params("another authority");
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key).expect("the parameters are sound");
        let chain = vec![root.der().clone()];
        Self { issuer: Issuer::new(params, key), chain }
    }

    /// The mesh's own CA, from the folder with its keys: for names that it would never sign itself.
    ///
    /// # Errors
    /// If there is no issuing key, or no certificate that goes with it.
    pub fn of_mesh(state: &Path) -> Result<Self> {
        let files = files(state)?;
        let keys: Vec<KeyPair> = files.iter().filter_map(|file| private_key(file)).collect();
        let certificates: Vec<CertificateDer<'static>> =
            files.iter().flat_map(|file| certificates(file)).collect();
        let issuing = certificates.iter().find_map(|der| {
            let (_, certificate) = X509Certificate::from_der(der).ok()?;
            let intermediate = certificate.subject() != certificate.issuer() && certificate.is_ca();
            let key =
                keys.iter().position(|key| key.subject_public_key_info() == certificate.public_key().raw)?;
            intermediate.then(|| (der.clone(), key, subject(&certificate)))
        });
        let Some((der, key, subject)) = issuing else {
            bail!("no issuing key with its certificate in {}: {files:?}", state.display());
        };
        let mut params = authority_params("");
        params.distinguished_name = subject;
        let key =
            KeyPair::try_from(&PrivateKeyDer::from(PrivatePkcs8KeyDer::from(keys[key].serialize_der())))?;
        Ok(Self { issuer: Issuer::new(params, key), chain: vec![der] })
    }

    /// A fresh key with a certificate of this authority.
    ///
    /// # Panics
    /// If the leaf names what no certificate can hold.
    pub fn issue(&self, leaf: &Leaf) -> Credentials {
        let key = key_pair();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "attacker");
        let uris = leaf.uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().expect("ASCII")));
        let dns = leaf.dns.iter().map(|name| SanType::DnsName(name.as_str().try_into().expect("ASCII")));
        params.subject_alt_names = uris.chain(dns).collect();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.not_before = OffsetDateTime::now_utc() + leaf.valid.start;
        params.not_after = OffsetDateTime::now_utc() + leaf.valid.end;
        let certificate = params.signed_by(&key, &self.issuer).expect("the parameters are sound");
        let chain = std::iter::once(certificate.der().clone()).chain(self.chain.iter().cloned()).collect();
        Credentials { chain, key: PrivatePkcs8KeyDer::from(key.serialize_der()).into() }
    }
}

/// A signing request with a fresh key, DER.
///
/// # Panics
/// Never for names in ASCII.
pub fn signing_request(uris: &[&str]) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names =
        uris.iter().map(|uri| SanType::URI((*uri).try_into().expect("ASCII"))).collect();
    params.serialize_request(&key_pair()).expect("the parameters are sound").der().to_vec()
}

/// PEM around a signing request.
pub fn signing_request_pem(der: &[u8]) -> String {
    ca_proto::convert::certificate_pem(der).replace("CERTIFICATE-----", "CERTIFICATE REQUEST-----")
}

fn key_pair() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("the provider makes P-256 keys")
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

/// The subject as an issuer's name must repeat it.
fn subject(certificate: &X509Certificate<'_>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for attribute in certificate.subject().iter_attributes() {
        let oid: Vec<u64> = attribute.attr_type().iter().map(|arcs| arcs.collect()).unwrap_or_default();
        name.push(DnType::from_oid(&oid), attribute.as_str().unwrap_or_default());
    }
    name
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(files(&entry.path())?);
        } else {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn private_key(file: &Path) -> Option<KeyPair> {
    KeyPair::try_from(&PrivateKeyDer::from_pem_file(file).ok()?).ok()
}

fn certificates(file: &Path) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_file_iter(file).into_iter().flatten().filter_map(Result::ok).collect()
}
