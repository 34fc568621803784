//! A world with one authority, and clients that verify it as a node's daemon does.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ca_proto::ca::node_agent_client::NodeAgentClient;
use ca_proto::ca::{JoinRequest, RenewRequest};
use ca_proto::convert::{CreateCertificate, Issued, IssuedToNode};
use ca_proto::istio::IstioCertificateRequest;
use ca_proto::istio::istio_certificate_service_client::IstioCertificateServiceClient;
use ca_proto::join_token::{JoinToken, RootPin};
use ca_proto::refusal::{Reason, Refusal};
use ca_server::{Clock, Config, Handle, StartError, ask_status, ask_token, start};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, SignatureScheme};
use spiffe_id::SpiffeId;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

pub(crate) const REGISTRY: &str = "
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: cart-0, namespace: shop}
spec: {serviceAccount: cart, node: node-a}
---
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: till-0, namespace: shop}
spec: {serviceAccount: till, node: node-b}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
";

/// A folder of this process, removed at the end, also when the test fails.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("culvert-ca-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(path.join("registry.d")).expect("the temporary folder is writable");
        std::fs::write(path.join("registry.d/all.yaml"), REGISTRY).expect("written");
        Self(path)
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.0.join("state")
    }

    pub(crate) fn config(&self) -> Config {
        Config {
            trust_domain: "cluster.local".parse().expect("a trust domain"),
            listen: "127.0.0.1:0".parse().expect("an address"),
            state: self.state(),
            admin_socket: self.0.join("ca.sock"),
            registry: self.0.join("registry.d"),
            workload_lifetime: Duration::from_secs(3600),
            node_lifetime: Duration::from_secs(86_400),
            init_new_root: false,
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running authority whose clock the test moves.
pub(crate) struct World {
    pub(crate) folder: Folder,
    pub(crate) handle: Handle,
    ahead: Arc<AtomicU64>,
}

impl World {
    pub(crate) async fn new() -> Self {
        let folder = Folder::new();
        let config = folder.config();
        Self::start(folder, config).await.expect("the authority starts")
    }

    pub(crate) async fn start(folder: Folder, config: Config) -> Result<Self, StartError> {
        let ahead = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&ahead);
        let clock =
            Clock::from_fn(move || SystemTime::now() + Duration::from_secs(seen.load(Ordering::Relaxed)));
        Ok(Self { handle: start(config, clock).await?, folder, ahead })
    }

    /// Stops the authority; its folder stays.
    pub(crate) async fn stop(self) -> Folder {
        self.handle.stop().await;
        self.folder
    }

    pub(crate) fn advance(&self, seconds: u64) {
        self.ahead.fetch_add(seconds, Ordering::Relaxed);
    }

    fn now(&self) -> UnixTime {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        UnixTime::since_unix_epoch(now + Duration::from_secs(self.ahead.load(Ordering::Relaxed)))
    }

    pub(crate) async fn token(&self, node: &str) -> JoinToken {
        let line =
            ask_token(self.handle.admin_socket(), node, Duration::from_secs(600)).await.expect("a token");
        line.parse().expect("a printed token")
    }

    /// A node that joined.
    pub(crate) async fn joined(&self, node: &str) -> Node {
        let token = self.token(node).await;
        let key = key();
        let issued = self.join(&token, node_uri(node), csr(&key, &[])).await.expect("the join is granted");
        Node { key, issued }
    }

    pub(crate) async fn join(
        &self,
        token: &JoinToken,
        node: String,
        csr: Vec<u8>,
    ) -> Result<IssuedToNode, Status> {
        let channel = self.channel(Trust::Pin(*token.pin()), None).await.expect("the pin fits");
        let request = JoinRequest { token: token.secret().expose().to_vec(), node, csr };
        let response = NodeAgentClient::new(channel).join(request).await?;
        Ok(response.into_inner().try_into().expect("a well-formed answer"))
    }

    pub(crate) async fn renew(&self, node: &Node, csr: Vec<u8>) -> Result<IssuedToNode, Status> {
        let channel =
            self.channel(node.trust(), Some((&node.key, &node.issued.issued))).await.expect("connects");
        let response = NodeAgentClient::new(channel).renew(RenewRequest { csr }).await?;
        Ok(response.into_inner().try_into().expect("a well-formed answer"))
    }

    pub(crate) async fn create(
        &self,
        node: &Node,
        request: IstioCertificateRequest,
    ) -> Result<Issued, Status> {
        let channel =
            self.channel(node.trust(), Some((&node.key, &node.issued.issued))).await.expect("connects");
        Self::create_on(channel, request).await
    }

    pub(crate) async fn create_on(
        channel: Channel,
        request: IstioCertificateRequest,
    ) -> Result<Issued, Status> {
        let response = IstioCertificateServiceClient::new(channel).create_certificate(request).await?;
        Ok(response.into_inner().try_into().expect("a well-formed answer"))
    }

    pub(crate) async fn channel(
        &self,
        trust: Trust,
        own: Option<(&KeyPair, &Issued)>,
    ) -> Result<Channel, String> {
        let (address, connector) = (self.handle.address(), self.connector(trust, own));
        let connect = tower::service_fn(move |_| {
            let connector = connector.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(handshake(connector, address).await?)) }
        });
        let endpoint = Endpoint::from_static("http://authority");
        endpoint.connect_with_connector(connect).await.map_err(|error| format!("{error:?}"))
    }

    /// A connection without a client certificate, before any HTTP.
    pub(crate) async fn anonymous(&self) -> TlsStream<TcpStream> {
        let connector = self.connector(Trust::Pin(self.handle.pin()), None);
        handshake(connector, self.handle.address()).await.expect("connects")
    }

    /// A connection with a node's certificate, before any HTTP.
    pub(crate) async fn bare(&self, node: &Node) -> TlsStream<TcpStream> {
        let connector = self.connector(node.trust(), Some((&node.key, &node.issued.issued)));
        handshake(connector, self.handle.address()).await.expect("connects")
    }

    fn connector(&self, trust: Trust, own: Option<(&KeyPair, &Issued)>) -> TlsConnector {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = Arc::new(Verifier { trust, now: self.now(), provider });
        let config = ClientConfig::builder_with_provider(Arc::clone(&verifier.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match own {
            None => config.with_no_client_auth(),
            Some((key, issued)) => {
                let key = PrivateKeyDer::try_from(key.serialize_der()).expect("PKCS#8");
                config.with_client_auth_cert(issued.chain.clone(), key).expect("key and certificate fit")
            }
        };
        config.alpn_protocols = vec![ca_proto::ALPN.to_vec()];
        config.enable_sni = false;
        TlsConnector::from(Arc::new(config))
    }

    pub(crate) async fn counter(&self, name: &str) -> u64 {
        let status = ask_status(self.handle.admin_socket()).await.expect("a status");
        status["counters"][name].as_u64().unwrap_or(0)
    }
}

async fn handshake(connector: TlsConnector, address: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(address).await?;
    // Or a segment would wait for an acknowledgement, which a paused clock does not wait for.
    tcp.set_nodelay(true)?;
    connector.connect(ServerName::IpAddress(address.ip().into()), tcp).await
}

/// A node's key and certificate.
pub(crate) struct Node {
    pub(crate) key: KeyPair,
    pub(crate) issued: IssuedToNode,
}

impl Node {
    pub(crate) fn trust(&self) -> Trust {
        Trust::Roots(self.issued.issued.roots.clone())
    }
}

pub(crate) fn node_uri(node: &str) -> String {
    format!("spiffe://cluster.local/culvert/node/{node}")
}

pub(crate) fn id(uri: &str) -> SpiffeId {
    uri.parse().expect("a name")
}

pub(crate) fn cart() -> SpiffeId {
    id("spiffe://cluster.local/ns/shop/sa/cart")
}

pub(crate) fn request(id: &SpiffeId, csr: &[u8]) -> IstioCertificateRequest {
    CreateCertificate::request(id, csr_pem(csr), None)
}

pub(crate) fn key() -> KeyPair {
    KeyPair::generate().expect("a key")
}

pub(crate) fn csr(key: &KeyPair, names: &[&str]) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names =
        names.iter().map(|name| SanType::URI((*name).try_into().expect("ASCII"))).collect();
    params.serialize_request(key).expect("a request").der().to_vec()
}

pub(crate) fn csr_pem(der: &[u8]) -> String {
    ca_proto::convert::certificate_pem(der).replace("CERTIFICATE", "CERTIFICATE REQUEST")
}

#[track_caller]
pub(crate) fn refused<T: fmt::Debug>(result: Result<T, Status>, reason: Reason) -> String {
    let status = result.expect_err("a refusal");
    let refusal = Refusal::from_status(&status).unwrap_or_else(|| panic!("no reason in {status:?}"));
    assert_eq!(refusal.reason, reason, "{status:?}");
    assert_eq!(status.code(), reason.status_code());
    refusal.message
}

/// What a stranger gets: no reason.
#[track_caller]
pub(crate) fn opaque<T: fmt::Debug>(result: Result<T, Status>) {
    let status = result.expect_err("a refusal");
    assert_eq!((status.code(), status.message()), (tonic::Code::Unauthenticated, "not authenticated"));
    assert_eq!(status.details(), b"");
}

/// The URI names of a certificate, which has no others.
pub(crate) fn names(der: &[u8]) -> Vec<String> {
    let (_, certificate) = X509Certificate::from_der(der).expect("a certificate");
    let names =
        &certificate.subject_alternative_name().expect("names parse").expect("names").value.general_names;
    let uri = |name: &GeneralName<'_>| {
        let GeneralName::URI(uri) = name else { panic!("{name} is no URI") };
        (*uri).to_owned()
    };
    names.iter().map(uri).collect()
}

pub(crate) fn write(folder: &Path, name: &str, content: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, content).expect("written");
    path
}

/// What a client trusts.
#[derive(Clone, Debug)]
pub(crate) enum Trust {
    Pin(RootPin),
    Roots(Vec<CertificateDer<'static>>),
}

/// Verifies the authority as `ca_proto` says: path to the pinned root or to the bundle, and the exact name.
#[derive(Debug)]
struct Verifier {
    trust: Trust,
    now: UnixTime,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let roots = match &self.trust {
            Trust::Roots(roots) => roots.clone(),
            Trust::Pin(pin) => others
                .iter()
                .filter(|der| spki_pin(der) == *pin)
                .map(|der| der.clone().into_owned())
                .collect(),
        };
        let anchors: Vec<_> =
            roots.iter().map(|root| webpki::anchor_from_trusted_cert(root).expect("a root")).collect();
        let unknown = |_| TlsError::InvalidCertificate(CertificateError::UnknownIssuer);
        webpki::EndEntityCert::try_from(leaf)
            .map_err(unknown)?
            .verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &anchors,
                others,
                self.now,
                webpki::KeyUsage::server_auth(),
                None,
                None,
            )
            .map_err(unknown)?;
        if names(leaf) == ["spiffe://cluster.local/culvert/ca"] {
            return Ok(ServerCertVerified::assertion());
        }
        Err(TlsError::InvalidCertificate(CertificateError::NotValidForName))
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::General("TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, leaf, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn spki_pin(der: &[u8]) -> RootPin {
    let (_, certificate) = X509Certificate::from_der(der).expect("a certificate");
    RootPin::of_spki(certificate.public_key().raw)
}
