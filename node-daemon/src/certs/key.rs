//! Private keys of the node and its workloads. They are made here, sign here and stay here.

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _},
    sign::CertifiedKey,
};
use zeroize::Zeroizing;

use super::verify::signer;

/// A P-256 key. It can be neither printed nor copied:
///
/// ```compile_fail
/// fn printable<T: std::fmt::Debug>() {}
/// printable::<node_daemon::certs::PrivateKey>();
/// ```
///
/// ```compile_fail
/// fn copied<T: Clone>() {}
/// copied::<node_daemon::certs::PrivateKey>();
/// ```
///
/// ```
/// fn named<T>() {}
/// named::<node_daemon::certs::PrivateKey>();
/// ```
pub struct PrivateKey(KeyPair);

/// The library of primitives refused; a fault of this program or its random source.
#[derive(Debug, thiserror::Error)]
#[error("private key: {0}")]
pub struct KeyFault(#[from] rcgen::Error);

impl PrivateKey {
    pub fn generate() -> Result<Self, KeyFault> {
        Ok(Self(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?))
    }

    /// Reads what [`PrivateKey::expose_pem`] wrote.
    pub(super) fn from_pem(pem: &str) -> Result<Self, KeyFault> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| rcgen::Error::CouldNotParseKeyPair)?;
        Ok(Self(KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ECDSA_P256_SHA256)?))
    }

    /// For the node's own key file (0600), nothing else.
    pub(super) fn expose_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.0.serialize_pem())
    }

    /// A request (PKCS#10) for one name, without a subject.
    pub(super) fn request(&self, name: &str) -> Result<Request, KeyFault> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(name.try_into()?)];
        let request = params.serialize_request(&self.0)?;
        Ok(Request { der: request.der().to_vec(), pem: request.pem()? })
    }

    /// Joins the key with the chain that was issued for it; refused if they do not fit.
    pub(super) fn certify(&self, chain: Vec<CertificateDer<'static>>) -> Result<CertifiedKey, rustls::Error> {
        let der = Zeroizing::new(self.0.serialize_der());
        let signer = signer(&PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(der.as_slice())))?;
        let certified = CertifiedKey::new(chain, signer);
        certified.keys_match()?;
        Ok(certified)
    }

    /// For authorities of tests, who certify its public half.
    #[cfg(test)]
    pub(super) fn pair(&self) -> &KeyPair {
        &self.0
    }
}

/// A signing request in both encodings of the wire.
pub(super) struct Request {
    pub(super) der: Vec<u8>,
    pub(super) pem: String,
}
