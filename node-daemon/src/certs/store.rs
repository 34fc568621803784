//! Identity -> key and chain, ready to use: what the data path takes its TLS configurations from.
//!
//! [`Credentials`] are immutable and shared; a renewal replaces them whole and raises their generation. Private keys
//! enter here inside a signer of rustls and never leave.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use rustls::{
    ClientConfig, ServerConfig,
    client::{ResolvesClientCert, Resumption},
    pki_types::CertificateDer,
    server::{NoServerSessionStorage, ResolvesServerCert},
    sign::CertifiedKey,
    version::TLS13,
};
use spiffe_id::{SpiffeId, TrustDomain};
use tokio::{sync::watch, time::Instant};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    key::PrivateKey,
    verify::{PeerRefused, SharedTrust, Trust, WorkloadClient, WorkloadServer, peer_of, provider},
};

/// ALPN of the tunnel.
pub const ALPN_TUNNEL: &[u8] = b"h2";

/// ALPN by which a client says that it speaks mesh TLS on the workload's own port (policy A-6). Never selected.
pub const ALPN_MESH: &[u8] = b"istio";

/// What one identity presents, until its certificate ends or a newer generation takes its place.
pub struct Credentials {
    identity: SpiffeId,
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
    generation: u64,
    tunnel_server: Arc<ServerConfig>,
    mesh_server: Arc<ServerConfig>,
    client: ClientConfig,
    trust: SharedTrust,
}

/// Why an answer of the authority cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UnusableCertificate {
    #[error("the certificate is for {found}, asked for was {wanted}: the authority answered for another")]
    OtherIdentity { wanted: SpiffeId, found: String },
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    #[error("the certificate's key is not the one that was asked for: {0}")]
    Key(rustls::Error),
    #[error("the certificate has ended already by this node's clock: compare it with the authority's")]
    Ended,
}

impl Credentials {
    fn new(
        identity: SpiffeId,
        key: &PrivateKey,
        chain: Vec<CertificateDer<'static>>,
        generation: u64,
        trust: &SharedTrust,
    ) -> Result<Self, UnusableCertificate> {
        let found =
            peer_of(Some(&chain)).map_err(|refused| UnusableCertificate::Unreadable(refused.to_string()))?;
        if found.identity != identity {
            return Err(UnusableCertificate::OtherIdentity {
                wanted: identity,
                found: found.identity.to_string(),
            });
        }
        let facts = CertificateFacts::read(&chain[0])?;
        let certified = Arc::new(Presented(Arc::new(key.certify(chain).map_err(UnusableCertificate::Key)?)));
        Ok(Self {
            identity,
            serial: facts.serial,
            not_before: facts.not_before,
            not_after: facts.not_after,
            generation,
            tunnel_server: Arc::new(server(&certified, trust, &[ALPN_TUNNEL])),
            mesh_server: Arc::new(server(&certified, trust, &[])),
            client: client(&certified, trust),
            trust: Arc::clone(trust),
        })
    }

    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// Serial number in hexadecimal, as `openssl x509 -serial` prints it.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Grows with each certificate of the node.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// For the tunnel listener: ALPN `h2`, a client certificate of the mesh required.
    pub fn tunnel_server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.tunnel_server)
    }

    /// For mesh TLS on the workload's own port: no ALPN is selected, a client certificate is required.
    pub fn mesh_server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.mesh_server)
    }

    /// For one tunnel: only a server that is one of `allowed` is answered (secure naming, policy D).
    pub fn client(&self, allowed: Arc<BTreeSet<SpiffeId>>) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(WorkloadServer { trust: Arc::clone(&self.trust), allowed }));
        Arc::new(config)
    }

    fn is_valid_at(&self, now: SystemTime) -> bool {
        now < self.not_after
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Credentials")
            .field("identity", &self.identity)
            .field("serial", &self.serial)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// What the log and the schedule need of a certificate.
pub(super) struct CertificateFacts {
    pub(super) serial: String,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

impl CertificateFacts {
    pub(super) fn read(leaf: &CertificateDer<'_>) -> Result<Self, UnusableCertificate> {
        let (_, certificate) = X509Certificate::from_der(leaf)
            .map_err(|error| UnusableCertificate::Unreadable(error.to_string()))?;
        let validity = certificate.validity();
        Ok(Self {
            serial: certificate.raw_serial().iter().map(|byte| format!("{byte:02X}")).collect(),
            not_before: at(validity.not_before.timestamp()),
            not_after: at(validity.not_after.timestamp()),
        })
    }
}

/// Times before 1970 are as good as 1970: such a certificate has ended.
fn at(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// Presents one certificate whatever the other end says that it likes; refused by it, not by guessing.
pub(super) struct Presented(pub(super) Arc<CertifiedKey>);

impl fmt::Debug for Presented {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Presented(<key>)")
    }
}

impl ResolvesServerCert for Presented {
    fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

impl ResolvesClientCert for Presented {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// No resumption: a resumed session would skip the verification of the client (DESIGN 3.3.4).
pub(super) fn server(certified: &Arc<Presented>, trust: &SharedTrust, alpn: &[&[u8]]) -> ServerConfig {
    let verifier = Arc::new(WorkloadClient { trust: Arc::clone(trust) });
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites and groups of TLS 1.3")
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::clone(certified) as Arc<dyn ResolvesServerCert>);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config
}

pub(super) fn client(certified: &Arc<Presented>, trust: &SharedTrust) -> ClientConfig {
    let nobody = WorkloadServer { trust: Arc::clone(trust), allowed: Arc::default() };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites and groups of TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(nobody))
        .with_client_cert_resolver(Arc::clone(certified) as Arc<dyn ResolvesClientCert>);
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.alpn_protocols = vec![ALPN_TUNNEL.to_vec()];
    config
}

type Table = BTreeMap<SpiffeId, Arc<Credentials>>;

/// The certificates of this node's workloads. One table, replaced whole; readers never wait for a writer.
pub struct Store {
    table: watch::Sender<Arc<Table>>,
    trust: SharedTrust,
    generation: AtomicU64,
    wall: fn() -> SystemTime,
}

/// No certificate in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no certificate within the time that a connection is held for one")]
pub struct NoCertificateInTime;

impl Store {
    /// `own`: the trust domain. Until a bundle comes nobody is trusted.
    pub fn new(own: TrustDomain) -> Self {
        Self::with_clock(own, SystemTime::now)
    }

    pub(super) fn with_clock(own: TrustDomain, wall: fn() -> SystemTime) -> Self {
        Self {
            table: watch::Sender::new(Arc::default()),
            trust: Arc::new(ArcSwap::from_pointee(Trust::new(own))),
            generation: AtomicU64::new(0),
            wall,
        }
    }

    /// The unexpired credentials of an identity.
    pub fn credentials(&self, identity: &SpiffeId) -> Option<Arc<Credentials>> {
        let found = self.table.borrow().get(identity).cloned()?;
        found.is_valid_at((self.wall)()).then_some(found)
    }

    /// Waits for the credentials of an identity.
    ///
    /// # Errors
    /// [`NoCertificateInTime`] at the deadline.
    pub async fn wait(
        &self,
        identity: &SpiffeId,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, NoCertificateInTime> {
        let mut table = self.table.subscribe();
        let found = async {
            loop {
                table.borrow_and_update();
                if let Some(credentials) = self.credentials(identity) {
                    return Some(credentials);
                }
                table.changed().await.ok()?;
            }
        };
        tokio::time::timeout_at(deadline, found).await.ok().flatten().ok_or(NoCertificateInTime)
    }

    /// Every change of the table: for tunnels that shall not outlive their generation, and for readiness.
    pub fn changes(&self) -> watch::Receiver<Arc<Table>> {
        self.table.subscribe()
    }

    /// All credentials, expired ones included.
    pub fn all(&self) -> Vec<Arc<Credentials>> {
        self.table.borrow().values().cloned().collect()
    }

    /// The roots by which peers are judged; handshakes read it each time.
    pub fn trust(&self) -> &SharedTrust {
        &self.trust
    }

    /// Puts a new certificate in the place of the old one.
    ///
    /// # Errors
    /// [`UnusableCertificate`]; the old one stays.
    pub(super) fn insert(
        &self,
        identity: &SpiffeId,
        key: &PrivateKey,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<Arc<Credentials>, UnusableCertificate> {
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        let made = Arc::new(Credentials::new(identity.clone(), key, chain, generation, &self.trust)?);
        if !made.is_valid_at((self.wall)()) {
            return Err(UnusableCertificate::Ended);
        }
        self.table.send_modify(|table| {
            Arc::make_mut(table).insert(identity.clone(), Arc::clone(&made));
        });
        Ok(made)
    }

    /// Forgets an identity that runs here no longer.
    pub(super) fn remove(&self, identity: &SpiffeId) {
        self.table.send_if_modified(|table| Arc::make_mut(table).remove(identity).is_some());
    }

    /// Puts other roots to use at once, for the handshakes that follow.
    ///
    /// # Errors
    /// As [`Trust::with_roots`]; the old roots stay.
    pub(super) fn trust_roots(&self, roots: &[CertificateDer<'_>]) -> Result<(), PeerRefused> {
        let rooted = Trust::clone(&self.trust.load()).with_roots(roots)?;
        self.trust.rcu(|trust| Trust::clone(trust).with_roots_of(&rooted));
        Ok(())
    }

    /// Lets the roots speak for these trust domains too.
    pub(super) fn trust_aliases(&self, aliases: &[TrustDomain]) {
        self.trust.rcu(|trust| Trust::clone(trust).with_aliases(aliases.to_vec()));
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let identities: Vec<String> = self.table.borrow().keys().map(ToString::to_string).collect();
        formatter.debug_struct("Store").field("identities", &identities).finish_non_exhaustive()
    }
}
