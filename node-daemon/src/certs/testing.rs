//! Authorities of tests: good ones, and those that make every wrong kind of certificate.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SignatureAlgorithm,
};
use rustls::{ClientConfig, ServerConfig, pki_types::CertificateDer};
use spiffe_id::{SpiffeId, TrustDomain};
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer as _};

use super::{
    key::{PrivateKey, Request},
    seal::Seal,
    store::{ALPN_TUNNEL, Presented, Store, client, server},
    verify::{SharedTrust, Trust, WorkloadServer},
};

/// A root with an issuing intermediate.
pub(crate) struct Ca {
    pub(crate) root: CertificateDer<'static>,
    intermediate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// What a certificate says.
#[derive(Clone)]
pub(crate) struct Shape {
    pub(crate) uris: Vec<String>,
    /// Seconds from now.
    pub(crate) begins: i64,
    pub(crate) ends: i64,
    pub(crate) is_ca: bool,
    pub(crate) usages: Vec<ExtendedKeyUsagePurpose>,
    pub(crate) key_usages: Vec<KeyUsagePurpose>,
}

/// The identity of account `account` in namespace `photo` of `cluster.local`.
pub(crate) fn identity(account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/photo/sa/{account}").parse().expect("a name")
}

pub(crate) fn own_domain() -> TrustDomain {
    "cluster.local".parse().expect("a trust domain")
}

impl Shape {
    /// A good workload's, for an hour.
    pub(crate) fn good(uri: &str) -> Self {
        Self {
            uris: vec![uri.to_owned()],
            begins: -60,
            ends: 3_600,
            is_ca: false,
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            key_usages: vec![KeyUsagePurpose::DigitalSignature],
        }
    }
}

impl Ca {
    pub(crate) fn new(label: &str) -> Self {
        let authority = |name: String, path: u8| {
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            params
        };
        let key = || KeyPair::generate().expect("a key");
        let (root_key, issuing_key) = (key(), key());
        let root_params = authority(format!("{label} root"), 1);
        let root = root_params.self_signed(&root_key).expect("a root");
        let root_issuer = Issuer::new(root_params, root_key);
        let issuing = authority(format!("{label} issuing"), 0);
        let intermediate = issuing.signed_by(&issuing_key, &root_issuer).expect("an intermediate");
        Self {
            root: root.der().clone(),
            intermediate: intermediate.der().clone(),
            issuer: Issuer::new(issuing, issuing_key),
        }
    }

    /// Leaf and intermediate.
    pub(crate) fn chain(&self, key: &PrivateKey, shape: &Shape) -> Vec<CertificateDer<'static>> {
        self.chain_for(key.pair(), shape)
    }

    /// The same for the key of a request.
    pub(super) fn answer(&self, request: &Request, shape: &Shape) -> Vec<CertificateDer<'static>> {
        let (_, request) = X509CertificationRequest::from_der(&request.der).expect("a request");
        let key = request.certification_request_info.subject_pki.subject_public_key.data.to_vec();
        self.chain_for(&P256(key), shape)
    }

    fn chain_for(&self, key: &impl PublicKeyData, shape: &Shape) -> Vec<CertificateDer<'static>> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let uri = |uri: &String| SanType::URI(uri.as_str().try_into().expect("ASCII"));
        params.subject_alt_names = shape.uris.iter().map(uri).collect();
        params.not_before = moment(shape.begins);
        params.not_after = moment(shape.ends);
        params.is_ca =
            if shape.is_ca { IsCa::Ca(BasicConstraints::Unconstrained) } else { IsCa::ExplicitNoCa };
        params.extended_key_usages.clone_from(&shape.usages);
        params.key_usages.clone_from(&shape.key_usages);
        let leaf = params.signed_by(key, &self.issuer).expect("a leaf");
        vec![leaf.der().clone(), self.intermediate.clone()]
    }

    /// A key that signs, with a certificate of this shape.
    pub(crate) fn seal(&self, shape: &Shape) -> Seal {
        let key = PrivateKey::generate().expect("a key");
        let certified = key.certify(self.chain(&key, shape)).expect("its own key");
        Seal::new(certified, moment(shape.ends).into())
    }

    /// What peers are judged by who trust this authority.
    pub(crate) fn trust(&self) -> SharedTrust {
        let trust = Trust::new(own_domain()).with_roots(std::slice::from_ref(&self.root)).expect("a root");
        Arc::new(ArcSwap::from_pointee(trust))
    }

    /// A store that trusts this authority and holds a good certificate for each account.
    pub(crate) fn store(&self, accounts: &[&str]) -> Arc<Store> {
        let store = Arc::new(Store::new(own_domain()));
        store.trust_roots(std::slice::from_ref(&self.root)).expect("a root");
        for account in accounts {
            self.issue(&store, account);
        }
        store
    }

    /// Puts a good certificate for an account into a store.
    pub(crate) fn issue(&self, store: &Store, account: &str) {
        let (key, id) = (PrivateKey::generate().expect("a key"), identity(account));
        let chain = self.chain(&key, &Shape::good(&id.to_string()));
        store.insert(&id, &key, chain).expect("a good certificate");
    }

    /// TLS configurations that present whatever `shape` says, as a store would never make them.
    pub(crate) fn configs(
        &self,
        shape: &Shape,
        trust: &SharedTrust,
        allowed: &[SpiffeId],
    ) -> (Arc<ClientConfig>, Arc<ServerConfig>) {
        let key = PrivateKey::generate().expect("a key");
        let certified = key.certify(self.chain(&key, shape)).expect("its own key");
        let presented = Arc::new(Presented(Arc::new(certified)));
        let mut dialling = client(&presented, trust);
        let allowed: Arc<BTreeSet<SpiffeId>> = Arc::new(allowed.iter().cloned().collect());
        dialling
            .dangerous()
            .set_certificate_verifier(Arc::new(WorkloadServer { trust: Arc::clone(trust), allowed }));
        (Arc::new(dialling), Arc::new(server(&presented, trust, &[ALPN_TUNNEL])))
    }
}

/// A public key as it stands in a request.
struct P256(Vec<u8>);

impl PublicKeyData for P256 {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

fn moment(from_now: i64) -> time::OffsetDateTime {
    let distance = Duration::from_secs(from_now.unsigned_abs());
    let now = SystemTime::now();
    if from_now < 0 { (now - distance).into() } else { (now + distance).into() }
}

/// A server of one certificate that is no workload's.
pub(crate) fn acceptor(own: &rcgen::CertifiedKey<KeyPair>) -> tokio_rustls::TlsAcceptor {
    let key = rustls::pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der()).expect("a key");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)
        .expect("a pair");
    tokio_rustls::TlsAcceptor::from(Arc::new(config))
}

/// An authority outside the mesh, as PEM.
pub(crate) struct Outside {
    pub(crate) root_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// When a certificate is valid, in seconds from now.
pub(crate) struct Span(i64, i64);

impl Span {
    pub(crate) fn good() -> Self {
        Self(-60, 3_600)
    }

    pub(crate) fn ended() -> Self {
        Self(-3_600, -60)
    }
}

impl Outside {
    pub(crate) fn new(label: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, label);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("a key");
        let root = params.self_signed(&key).expect("a root");
        Self { root_pem: root.pem(), issuer: Issuer::new(params, key) }
    }

    /// Chain and key of somebody with these names; those with a `:` are URIs.
    pub(crate) fn leaf(&self, names: &[&str], span: &Span) -> (String, String) {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let name = |name: &&str| {
            let text = (*name).try_into().expect("ASCII");
            if name.contains(':') { SanType::URI(text) } else { SanType::DnsName(text) }
        };
        params.subject_alt_names = names.iter().map(name).collect();
        (params.not_before, params.not_after) = (moment(span.0), moment(span.1));
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let leaf = params.signed_by(&key, &self.issuer).expect("a leaf");
        (leaf.pem(), key.serialize_pem())
    }
}
