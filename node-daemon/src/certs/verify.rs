//! Who is at the other end of a handshake: one judgement for clients and servers of the mesh.
//!
//! In come the chain that a peer presented and the current trust; out comes a [`Peer`] or the typed reason why not.
//! The order is: exactly one URI name, its grammar, the leaf's shape, the trust domain, the chain, and for servers
//! secure naming (policy D-5). Reasons travel through rustls as `CertificateError::Other` and are found again by
//! [`PeerRefused::of`].

use std::{
    collections::BTreeSet,
    fmt, io,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs as library, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, TrustAnchor, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::SigningKey,
};
use spiffe_id::{CaId, InvalidSpiffeId, PeerName, SpiffeId, TrustDomain};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::telemetry::HandshakeRefusal;

/// How far a peer's clock may be ahead, in seconds: a certificate is accepted this long before it becomes valid.
/// Its end is never extended.
pub const CLOCK_AHEAD_SECONDS_MAX: u64 = 120;

/// A peer whose certificate was accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub identity: SpiffeId,
    /// Seconds since the epoch at which its certificate ends.
    pub not_after: u64,
}

impl Peer {
    /// How much longer its certificate lasts, by this node's clock.
    pub fn lasts_for(&self) -> Duration {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Duration::from_secs(self.not_after).saturating_sub(now)
    }
}

/// Why a peer was refused, for people; [`PeerRefused::refusal`] is the label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefused {
    #[error("the peer presented no certificate")]
    NoCertificate,
    #[error("the peer's certificate is not readable: {what}")]
    Malformed { what: &'static str },
    #[error("the peer's certificate carries no URI name, exactly one is expected")]
    NoUriName,
    #[error("the peer's certificate carries {count} URI names, exactly one is expected")]
    SeveralUriNames { count: usize },
    #[error("the peer's URI name is not a name of the mesh: {0}")]
    BadName(#[from] InvalidSpiffeId),
    #[error("the peer is {name}, which is no workload and may not speak as one")]
    NotAWorkload { name: PeerName },
    #[error("the peer is {name}, expected the certificate authority {expected}")]
    NotTheAuthority { name: PeerName, expected: CaId },
    #[error("the peer's certificate may sign others, a workload's may not")]
    IsAuthority,
    #[error("the peer's certificate may not be used for this: {what}")]
    Usage { what: &'static str },
    #[error("the peer is of trust domain {found}, this mesh is {expected}")]
    TrustDomain { found: TrustDomain, expected: TrustDomain },
    #[error("the peer's certificate does not lead to a root of this mesh")]
    OtherAuthority,
    #[error(
        "the peer's certificate ended at {not_after}, this node's clock says {now} (seconds since 1970): \
         if that is not so, compare the clocks of both nodes"
    )]
    Expired { now: u64, not_after: u64 },
    #[error(
        "the peer's certificate begins at {not_before}, this node's clock says {now} (seconds since 1970): \
         compare the clocks of both nodes"
    )]
    NotYetValid { now: u64, not_before: u64 },
    #[error("the peer is {peer}, which may not run the service that was asked for (allowed: {allowed})")]
    NotAllowed { peer: SpiffeId, allowed: String },
    #[error("the server proves {found}, expected {expected}")]
    Misnamed { found: String, expected: String },
    #[error("the authority's chain holds no root with the token's fingerprint: it is another authority")]
    PinMismatch,
}

impl PeerRefused {
    /// The reason in the words of the log and the counters.
    pub const fn refusal(&self) -> HandshakeRefusal {
        match self {
            Self::NoCertificate => HandshakeRefusal::NoCertificate,
            Self::NoUriName => HandshakeRefusal::NoUriSan,
            Self::SeveralUriNames { .. } => HandshakeRefusal::TwoUriSans,
            Self::BadName(_) | Self::NotAWorkload { .. } | Self::IsAuthority => {
                HandshakeRefusal::NotAWorkload
            }
            Self::TrustDomain { .. } => HandshakeRefusal::TrustDomain,
            Self::OtherAuthority | Self::PinMismatch | Self::NotTheAuthority { .. } => {
                HandshakeRefusal::OtherCa
            }
            Self::Expired { .. } | Self::NotYetValid { .. } => HandshakeRefusal::CertificateExpired,
            Self::NotAllowed { .. } | Self::Misnamed { .. } => HandshakeRefusal::SecureNaming,
            Self::Malformed { .. } | Self::Usage { .. } => HandshakeRefusal::Tls,
        }
    }

    /// The reason in an error of a handshake, if this side refused the peer.
    pub fn of(error: &io::Error) -> Option<Self> {
        Self::of_tls(error.get_ref()?.downcast_ref::<rustls::Error>()?)
    }

    fn of_tls(error: &rustls::Error) -> Option<Self> {
        if matches!(error, rustls::Error::NoCertificatesPresented) {
            return Some(Self::NoCertificate);
        }
        let rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(reason))) = error else {
            return None;
        };
        reason.downcast_ref::<Self>().cloned()
    }
}

impl From<PeerRefused> for rustls::Error {
    fn from(refused: PeerRefused) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refused))))
    }
}

/// The roots of the mesh, and which trust domains they speak for.
#[derive(Clone, Debug)]
pub struct Trust {
    own: TrustDomain,
    aliases: Vec<TrustDomain>,
    anchors: Vec<TrustAnchor<'static>>,
}

impl Trust {
    /// Trusts nobody yet.
    pub fn new(own: TrustDomain) -> Self {
        Self { own, aliases: Vec::new(), anchors: Vec::new() }
    }

    /// # Errors
    /// [`PeerRefused::Malformed`] if one of the roots is no certificate: a bundle is used whole or not at all.
    pub fn with_roots(self, roots: &[CertificateDer<'_>]) -> Result<Self, PeerRefused> {
        let anchors = roots
            .iter()
            .map(|root| anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned()))
            .collect::<Result<_, _>>()
            .map_err(|_| PeerRefused::Malformed { what: "a root of the bundle" })?;
        Ok(Self { anchors, ..self })
    }

    /// The roots of another, with the names of this one.
    #[must_use]
    pub fn with_roots_of(self, other: &Self) -> Self {
        Self { anchors: other.anchors.clone(), ..self }
    }

    /// The same roots, speaking for these trust domains too.
    #[must_use]
    pub fn with_aliases(self, aliases: Vec<TrustDomain>) -> Self {
        Self { aliases, ..self }
    }

    /// Judges a workload's chain.
    fn workload(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        side: Side,
        now: UnixTime,
    ) -> Result<Peer, PeerRefused> {
        let parsed = Leaf::parse(leaf)?;
        // T-10: the authority and the nodes have names of other forms.
        let PeerName::Workload(identity) = parsed.name else {
            return Err(PeerRefused::NotAWorkload { name: parsed.name });
        };
        let found = identity.trust_domain();
        if *found != self.own && !self.aliases.contains(found) {
            return Err(PeerRefused::TrustDomain { found: found.clone(), expected: self.own.clone() });
        }
        chain(leaf, intermediates, &self.anchors, side, now)?;
        Ok(Peer { identity, not_after: parsed.not_after })
    }
}

/// The current [`Trust`], replaced whole when the bundle or the aliases change; handshakes read it each time.
pub type SharedTrust = Arc<ArcSwap<Trust>>;

/// Whom the other end must be, in the role that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Server,
}

/// What the leaf itself says.
pub(super) struct Leaf {
    pub(super) name: PeerName,
    not_after: u64,
}

impl Leaf {
    pub(super) fn parse(der: &CertificateDer<'_>) -> Result<Self, PeerRefused> {
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|_| PeerRefused::Malformed { what: "the leaf" })?;
        if !rest.is_empty() {
            return Err(PeerRefused::Malformed { what: "bytes after the leaf" });
        }
        let name = PeerName::parse_uri(&the_uri(&certificate)?)?;
        let constraints = certificate
            .basic_constraints()
            .map_err(|_| PeerRefused::Malformed { what: "basic constraints" })?;
        if constraints.is_some_and(|constraints| constraints.value.ca) {
            return Err(PeerRefused::IsAuthority);
        }
        let usage = certificate.key_usage().map_err(|_| PeerRefused::Malformed { what: "key usage" })?;
        if let Some(usage) = usage {
            if usage.value.key_cert_sign() || usage.value.crl_sign() {
                return Err(PeerRefused::IsAuthority);
            }
            if !usage.value.digital_signature() {
                return Err(PeerRefused::Usage { what: "key usage lacks digitalSignature" });
            }
        }
        let not_after = u64::try_from(certificate.validity().not_after.timestamp())
            .map_err(|_| PeerRefused::Malformed { what: "validity" })?;
        Ok(Self { name, not_after })
    }
}

/// The only URI among the subject's alternative names.
fn the_uri(certificate: &X509Certificate<'_>) -> Result<String, PeerRefused> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| PeerRefused::Malformed { what: "subject alternative name" })?
        .ok_or(PeerRefused::NoUriName)?;
    let uris: Vec<&str> = names
        .value
        .general_names
        .iter()
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
        .collect();
    match uris[..] {
        [] => Err(PeerRefused::NoUriName),
        [uri] => Ok(uri.to_owned()),
        _ => Err(PeerRefused::SeveralUriNames { count: uris.len() }),
    }
}

/// Leads the leaf to one of the anchors.
pub(super) fn chain(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    anchors: &[TrustAnchor<'_>],
    side: Side,
    now: UnixTime,
) -> Result<(), PeerRefused> {
    match chain_at(leaf, intermediates, anchors, side, now) {
        Err(early @ PeerRefused::NotYetValid { .. }) => {
            let ahead = now.as_secs() + CLOCK_AHEAD_SECONDS_MAX;
            let ahead = UnixTime::since_unix_epoch(Duration::from_secs(ahead));
            let later = chain_at(leaf, intermediates, anchors, side, ahead);
            later.map_err(|late| if matches!(late, PeerRefused::NotYetValid { .. }) { early } else { late })
        }
        result => result,
    }
}

fn chain_at(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    anchors: &[TrustAnchor<'_>],
    side: Side,
    now: UnixTime,
) -> Result<(), PeerRefused> {
    let usage = match side {
        Side::Client => KeyUsage::client_auth(),
        Side::Server => KeyUsage::server_auth(),
    };
    let algorithms = provider().signature_verification_algorithms.all;
    let certificate =
        EndEntityCert::try_from(leaf).map_err(|_| PeerRefused::Malformed { what: "the leaf" })?;
    certificate
        .verify_for_usage(algorithms, anchors, intermediates, now, usage, None, None)
        .map(|_| ())
        .map_err(|error| why(&error))
}

/// Translates webpki's reasons. What it cannot lead to one of our roots is another authority's.
#[allow(clippy::wildcard_enum_match_arm, reason = "webpki's errors are not exhaustive")]
pub(super) fn why(error: &webpki::Error) -> PeerRefused {
    match error {
        webpki::Error::CertExpired { time, not_after } => {
            PeerRefused::Expired { now: time.as_secs(), not_after: not_after.as_secs() }
        }
        webpki::Error::CertNotValidYet { time, not_before } => {
            PeerRefused::NotYetValid { now: time.as_secs(), not_before: not_before.as_secs() }
        }
        webpki::Error::CaUsedAsEndEntity => PeerRefused::IsAuthority,
        webpki::Error::RequiredEkuNotFoundContext(_) | webpki::Error::EmptyEkuExtension => {
            PeerRefused::Usage { what: "extended key usage" }
        }
        webpki::Error::BadDer | webpki::Error::BadDerTime | webpki::Error::TrailingData(_) => {
            PeerRefused::Malformed { what: "the chain" }
        }
        webpki::Error::UnsupportedCriticalExtension => {
            PeerRefused::Malformed { what: "an unknown critical extension" }
        }
        _ => PeerRefused::OtherAuthority,
    }
}

/// Who a finished handshake was with. The chain was verified during it; this reads the name again.
///
/// # Errors
/// As during the handshake: an empty chain is [`PeerRefused::NoCertificate`].
pub fn peer_of(chain: Option<&[CertificateDer<'_>]>) -> Result<Peer, PeerRefused> {
    let leaf = chain.and_then(<[_]>::first).ok_or(PeerRefused::NoCertificate)?;
    let parsed = Leaf::parse(leaf)?;
    match parsed.name {
        PeerName::Workload(identity) => Ok(Peer { identity, not_after: parsed.not_after }),
        name @ (PeerName::Node(_) | PeerName::Ca(_)) => Err(PeerRefused::NotAWorkload { name }),
    }
}

/// What every verifier here says of signatures: TLS 1.3 is spoken, by the algorithms of [`provider`].
macro_rules! tls13_only {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(no_tls12())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            provider().signature_verification_algorithms.supported_schemes()
        }
    };
}
pub(super) use tls13_only;

/// Judges clients of a workload's listeners: any workload of the mesh.
#[derive(Debug)]
pub struct WorkloadClient {
    pub trust: SharedTrust,
}

impl ClientCertVerifier for WorkloadClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.trust.load().workload(end_entity, intermediates, Side::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }

    tls13_only!();
}

/// Judges the server of a tunnel: one of the identities that may run the service (secure naming, policy D).
///
/// It refuses before this side's certificate goes out: in TLS 1.3 the client answers after it has judged.
#[derive(Debug)]
pub struct WorkloadServer {
    pub trust: SharedTrust,
    /// Empty allows nobody (policy D-6).
    pub allowed: Arc<BTreeSet<SpiffeId>>,
}

impl WorkloadServer {
    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Peer, PeerRefused> {
        let peer = self.trust.load().workload(leaf, intermediates, Side::Server, now)?;
        if !self.allowed.contains(&peer.identity) {
            return Err(PeerRefused::NotAllowed { peer: peer.identity, allowed: some_of(&self.allowed) });
        }
        Ok(peer)
    }
}

/// Names listed in a message about secure naming; the rest is counted.
pub(super) const NAMES_LISTED_MAX: usize = 4;

pub(super) fn some_of(allowed: &BTreeSet<SpiffeId>) -> String {
    let listed: Vec<String> = allowed.iter().take(NAMES_LISTED_MAX).map(ToString::to_string).collect();
    let more = allowed.len().saturating_sub(NAMES_LISTED_MAX);
    match (listed.is_empty(), more) {
        (true, _) => "nobody".to_owned(),
        (false, 0) => listed.join(", "),
        (false, more) => format!("{} and {more} more", listed.join(", ")),
    }
}

impl ServerCertVerifier for WorkloadServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    tls13_only!();
}

/// Says whether a public key (SubjectPublicKeyInfo, DER) is the one that a join token names.
pub type IsPinned = dyn Fn(&[u8]) -> bool + Send + Sync;

/// Recognises the root that a join token names.
#[derive(Clone)]
pub struct Pin(pub Arc<IsPinned>);

impl Pin {
    /// Whether `certificate` has the pinned key.
    pub fn matches(&self, certificate: &CertificateDer<'_>) -> bool {
        X509Certificate::from_der(certificate)
            .is_ok_and(|(_, certificate)| (self.0)(certificate.public_key().raw))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Pin")
    }
}

/// Where the authority's root comes from.
#[derive(Clone, Debug)]
pub enum AuthorityTrust {
    /// First contact: the root is in the presented chain and has this key.
    Pinned(Pin),
    /// Later: the bundle.
    Bundle(SharedTrust),
}

/// Judges the certificate authority's server: exactly its name, besides the root (T-10).
#[derive(Debug)]
pub struct AuthorityServer {
    pub name: CaId,
    pub trust: AuthorityTrust,
}

impl AuthorityServer {
    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), PeerRefused> {
        let parsed = Leaf::parse(leaf)?;
        if parsed.name != PeerName::Ca(self.name.clone()) {
            return Err(PeerRefused::NotTheAuthority { name: parsed.name, expected: self.name.clone() });
        }
        match &self.trust {
            AuthorityTrust::Pinned(pin) => {
                let root = intermediates
                    .iter()
                    .find(|certificate| pin.matches(certificate))
                    .ok_or(PeerRefused::PinMismatch)?;
                let anchor = anchor_from_trusted_cert(root)
                    .map_err(|_| PeerRefused::Malformed { what: "the pinned root" })?;
                chain(leaf, intermediates, &[anchor], Side::Server, now)
            }
            AuthorityTrust::Bundle(trust) => {
                chain(leaf, intermediates, &trust.load().anchors, Side::Server, now)
            }
        }
    }
}

impl ServerCertVerifier for AuthorityServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    tls13_only!();
}

pub(super) fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken here".to_owned())
}

/// What may be agreed upon, in order of preference, by the `library` that this file chooses.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: std::sync::LazyLock<Arc<CryptoProvider>> = std::sync::LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                library::cipher_suite::TLS13_AES_128_GCM_SHA256,
                library::cipher_suite::TLS13_AES_256_GCM_SHA384,
                library::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: vec![
                library::kx_group::X25519MLKEM768,
                library::kx_group::X25519,
                library::kx_group::SECP256R1,
            ],
            ..library::default_provider()
        })
    });
    Arc::clone(&PROVIDER)
}

/// A signer for a P-256 key in PKCS#8; the caller wipes its copy.
pub(super) fn signer(key: &PrivateKeyDer<'_>) -> Result<Arc<dyn SigningKey>, rustls::Error> {
    library::sign::any_ecdsa_type(key)
}

/// The same for a key of any kind that a tenant brings.
pub(super) fn any_signer(key: &PrivateKeyDer<'_>) -> Result<Arc<dyn SigningKey>, rustls::Error> {
    library::sign::any_supported_type(key)
}

impl fmt::Display for Peer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.identity.fmt(formatter)
    }
}
