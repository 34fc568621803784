//! The certificate authority as seen from a node: join once, renew, ask for workloads, watch the roots.
//!
//! The only file that knows the authority's wire. The node's own key and certificate and the roots are kept on disk
//! (0600), so that a restart needs neither the token nor the authority; keys of workloads are kept nowhere.

use std::{
    fmt,
    future::Future,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use ca_proto::{
    MESSAGE_BYTES_MAX,
    ca::{JoinRequest, RenewRequest, WatchRequest, node_agent_client::NodeAgentClient},
    convert::{CreateCertificate, InvalidMessage, Issued, IssuedToNode, Watched, certificate_pem},
    istio::istio_certificate_service_client::IstioCertificateServiceClient,
    join_token::{InvalidJoinToken, JoinToken, RootPin},
};
use hyper_util::rt::TokioIo;
use node_core::rotation::{Next, Rotation};
use rustls::{
    ClientConfig,
    client::Resumption,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    version::TLS13,
};
use spiffe_id::{CaId, NodeId, SpiffeId, TrustDomain};
use tokio::{net::TcpStream, sync::mpsc, sync::watch, time::timeout};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use super::{
    backoff::Backoff,
    disk,
    key::{KeyFault, PrivateKey, Request},
    rotate::WALL_CHECK_SECONDS,
    seal::Seal,
    store::{CertificateFacts, Store, UnusableCertificate},
    verify::{AuthorityServer, AuthorityTrust, PeerRefused, Pin, provider},
};
use crate::telemetry::{Event, Sink};

/// Time for a connection to the authority, TLS included, in seconds.
const CONNECT_SECONDS: u64 = 5;

/// Time for one answer of the authority, in seconds: issuing takes milliseconds, a queue behind it seconds.
const ANSWER_SECONDS: u64 = 10;

/// A watched stream is given up after as many heartbeats without one.
const HEARTBEATS_MISSED_MAX: u32 = 3;

/// Versions of the bundle that wait to be acknowledged: the authority takes each at once. At the limit they wait, and as
/// long as for a heartbeat; then the stream is given up.
const ACKS_QUEUED_MAX: usize = 4;

/// Longest silence on a watched stream.
const SILENCE: Duration =
    Duration::from_secs(ca_proto::WATCH_HEARTBEAT_SECONDS * HEARTBEATS_MISSED_MAX as u64);

/// Where the authority is, and who this node is.
#[derive(Clone, Debug)]
pub struct AuthorityConfig {
    pub address: SocketAddr,
    pub trust_domain: TrustDomain,
    pub node: NodeId,
    /// File with the one-time token; read only while there is no certificate.
    pub join_token: PathBuf,
    /// Folder (0700) of the node's key and certificate and the roots.
    pub state: PathBuf,
}

/// Why an answer did not come or could not be used. All of them are tried again.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityFailed {
    /// The network, or an authority that is busy or not ready.
    #[error("the authority cannot be reached: {0}")]
    Unreachable(String),
    #[error("the authority refused: {0}")]
    Refused(String),
    #[error("the authority's answer cannot be used: {0}")]
    BadAnswer(String),
    #[error("join token {path}: {problem}")]
    Token { path: String, problem: String },
    #[error("{path}: {source}")]
    Disk { path: String, source: io::Error },
    #[error(transparent)]
    Key(#[from] KeyFault),
}

impl From<InvalidMessage> for AuthorityFailed {
    fn from(invalid: InvalidMessage) -> Self {
        Self::BadAnswer(invalid.to_string())
    }
}

impl From<UnusableCertificate> for AuthorityFailed {
    fn from(unusable: UnusableCertificate) -> Self {
        Self::BadAnswer(unusable.to_string())
    }
}

/// Who signs for workloads: the authority, or a test's.
pub(super) trait Authority: Send + Sync + 'static {
    /// A chain for `identity` and the key of `request`, leaf first, without the root.
    fn create(
        &self,
        identity: &SpiffeId,
        request: Request,
    ) -> impl Future<Output = Result<Vec<CertificateDer<'static>>, AuthorityFailed>> + Send;
}

/// One node's view of the authority.
pub(super) struct Client {
    config: AuthorityConfig,
    store: Arc<Store>,
    events: Sink,
    /// Connected lazily, replaced when the node's certificate is.
    session: ArcSwapOption<Session>,
    joined: watch::Sender<bool>,
    /// What [`Store`] trusts at present, to tell a change from a repetition.
    roots: Mutex<Vec<CertificateDer<'static>>>,
}

/// The node's certificate in use, and the channel that presents it.
struct Session {
    rotation: Rotation,
    channel: Channel,
    seal: Arc<Seal>,
}

impl Client {
    pub(super) fn new(config: AuthorityConfig, store: Arc<Store>, events: Sink) -> Self {
        Self {
            config,
            store,
            events,
            session: ArcSwapOption::empty(),
            joined: watch::Sender::new(false),
            roots: Mutex::default(),
        }
    }

    /// Joins if need be, then renews and watches until dropped.
    pub(super) async fn run(self: Arc<Self>) {
        self.establish().await;
        tokio::join!(self.renew_forever(), self.watch_forever());
    }

    /// True once the node has a certificate.
    pub(super) fn joined(&self) -> watch::Receiver<bool> {
        self.joined.subscribe()
    }

    /// The node's own certificate: name, end.
    pub(super) fn node_certificate(&self) -> Option<(NodeId, SystemTime)> {
        let session = self.session.load_full()?;
        Some((self.config.node.clone(), session.rotation.not_after))
    }

    pub(super) fn seal(&self) -> Option<Arc<Seal>> {
        Some(Arc::clone(&self.session.load_full()?.seal))
    }

    async fn establish(&self) {
        let mut backoff = Backoff::new();
        loop {
            let attempt = match self.recover() {
                Ok(true) => return,
                Ok(false) => self.join().await,
                Err(failed) => Err(failed),
            };
            match attempt {
                Ok(()) => return,
                Err(failed) => self.pause("Join", &failed, backoff.next()).await,
            }
        }
    }

    async fn pause(&self, call: &'static str, failed: &AuthorityFailed, retry: Duration) {
        self.events.emit(&Event::AuthorityFailed { call, problem: failed.to_string(), retry });
        tokio::time::sleep(retry).await;
    }

    // ---- what is on disk -------------------------------------------------------------------------------------------

    fn path(&self, name: &str) -> PathBuf {
        self.config.state.join(name)
    }

    fn read(&self, name: &str) -> Result<Option<zeroize::Zeroizing<String>>, AuthorityFailed> {
        let path = self.path(name);
        disk::read(&path).map_err(|source| AuthorityFailed::Disk { path: path.display().to_string(), source })
    }

    fn write(&self, name: &str, contents: &[u8]) -> Result<(), AuthorityFailed> {
        let path = self.path(name);
        disk::replace(&path, contents)
            .map_err(|source| AuthorityFailed::Disk { path: path.display().to_string(), source })
    }

    /// Takes up the certificate of an earlier run, if there is one that has not ended.
    fn recover(&self) -> Result<bool, AuthorityFailed> {
        let (Some(own), Some(roots)) = (self.read(NODE_FILE)?, self.read(BUNDLE_FILE)?) else {
            return Ok(false);
        };
        let (Ok(key), Ok(chain), Ok(roots)) =
            (PrivateKey::from_pem(&own), certificates(&own), certificates(&roots))
        else {
            return Err(AuthorityFailed::BadAnswer(format!(
                "{} or {} is damaged; remove both and join again with a new token",
                self.path(NODE_FILE).display(),
                self.path(BUNDLE_FILE).display()
            )));
        };
        let facts = chain
            .first()
            .ok_or_else(|| AuthorityFailed::BadAnswer(format!("{NODE_FILE} holds no certificate")))
            .and_then(|leaf| Ok(CertificateFacts::read(leaf)?))?;
        if facts.not_after <= SystemTime::now() {
            self.events.emit(&Event::CertificateExpired { identity: self.config.node.to_string() });
            return Ok(false);
        }
        self.trust(&roots)?;
        self.install(&key, chain)?;
        Ok(true)
    }

    fn keep(&self, key: &PrivateKey, issued: &Issued) -> Result<(), AuthorityFailed> {
        self.write(BUNDLE_FILE, bundle_pem(&issued.roots).as_bytes())?;
        let mut own = key.expose_pem();
        for certificate in &issued.chain {
            own.push_str(&certificate_pem(certificate));
        }
        self.write(NODE_FILE, own.as_bytes())
    }

    // ---- calls -----------------------------------------------------------------------------------------------------

    /// Trades the token for the first certificate. The key is kept before it is shown, so that a crash between the
    /// authority's answer and this node's disk burns nothing: the same key gets the same answer.
    async fn join(&self) -> Result<(), AuthorityFailed> {
        let token = self.token()?;
        let key = if let Some(pem) = self.read(JOINING_FILE)? {
            PrivateKey::from_pem(&pem)?
        } else {
            let key = PrivateKey::generate()?;
            self.write(JOINING_FILE, key.expose_pem().as_bytes())?;
            key
        };
        let pin = *token.pin();
        let pin = Pin(Arc::new(move |spki| RootPin::of_spki(spki) == pin));
        let channel = self.channel(self.tls(AuthorityTrust::Pinned(pin.clone()), None)?);
        let request = JoinRequest {
            token: token.secret().expose().to_vec(),
            node: self.config.node.to_string(),
            csr: key.request(&self.config.node.to_string())?.der,
        };
        let answer = ask(node_agent(channel).join(request)).await?;
        let IssuedToNode { issued, .. } = answer.try_into()?;
        if !issued.roots.iter().any(|root| pin.matches(root)) {
            return Err(AuthorityFailed::BadAnswer(
                "the bundle lacks the root that the token names".to_owned(),
            ));
        }
        self.keep(&key, &issued)?;
        self.trust(&issued.roots)?;
        self.install(&key, issued.chain)?;
        self.events.emit(&Event::NodeJoined { node: self.config.node.name().to_owned() });
        let joining = self.path(JOINING_FILE);
        disk::remove(&joining)
            .map_err(|source| AuthorityFailed::Disk { path: joining.display().to_string(), source })
    }

    fn token(&self) -> Result<JoinToken, AuthorityFailed> {
        let path = self.config.join_token.display().to_string();
        let problem = |problem: String| AuthorityFailed::Token { path: path.clone(), problem };
        let text = disk::read(&self.config.join_token)
            .map_err(|error| problem(error.to_string()))?
            .ok_or_else(|| problem("not there; make one with `culvert-ca token create`".to_owned()))?;
        let token: JoinToken =
            text.parse().map_err(|invalid: InvalidJoinToken| problem(invalid.to_string()))?;
        if token.node() != self.config.node.name() {
            let expected = self.config.node.name();
            return Err(problem(format!("is for node {}, this is node {expected}", token.node())));
        }
        Ok(token)
    }

    async fn renew(&self, session: &Session) -> Result<(), AuthorityFailed> {
        let key = PrivateKey::generate()?;
        let request = RenewRequest { csr: key.request(&self.config.node.to_string())?.der };
        let answer = ask(node_agent(session.channel.clone()).renew(request)).await?;
        let IssuedToNode { issued, .. } = answer.try_into()?;
        self.keep(&key, &issued)?;
        self.install(&key, issued.chain)
    }

    /// Puts a certificate of the node to use for the connections to come. Its renewal is reckoned from now, not from
    /// its beginning: authorities date certificates back.
    fn install(&self, key: &PrivateKey, chain: Vec<CertificateDer<'static>>) -> Result<(), AuthorityFailed> {
        let leaf = chain.first().ok_or_else(|| AuthorityFailed::BadAnswer("an empty chain".to_owned()))?;
        let facts = CertificateFacts::read(leaf)?;
        let now = SystemTime::now();
        if facts.not_after <= now {
            return Err(UnusableCertificate::Ended.into());
        }
        let trust = AuthorityTrust::Bundle(Arc::clone(self.store.trust()));
        let certified = key.certify(chain.clone()).map_err(bad_certificate)?;
        let seal = Arc::new(Seal::new(certified, facts.not_after));
        let channel = self.channel(self.tls(trust, Some((key, chain)))?);
        let rotation = Rotation::issued(now, facts.not_after, rand::random());
        self.session.store(Some(Arc::new(Session { rotation, channel, seal })));
        self.events.emit(&Event::CertificateIssued {
            identity: self.config.node.to_string(),
            serial: facts.serial,
            not_after: facts.not_after,
            generation: 0,
        });
        self.joined.send_replace(true);
        Ok(())
    }

    fn trust(&self, roots: &[CertificateDer<'static>]) -> Result<(), AuthorityFailed> {
        let mut present = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        if *present == roots {
            return Ok(());
        }
        self.store
            .trust_roots(roots)
            .map_err(|refused: PeerRefused| AuthorityFailed::BadAnswer(refused.to_string()))?;
        *present = roots.to_vec();
        self.events.emit(&Event::TrustChanged { roots: roots.len() });
        Ok(())
    }

    // ---- for as long as the daemon runs ----------------------------------------------------------------------------

    async fn renew_forever(&self) {
        let mut failures = None;
        loop {
            let Some(session) = self.session.load_full() else { return };
            let rotation = failures.unwrap_or(session.rotation);
            let now = SystemTime::now();
            match rotation.next(now) {
                Next::WaitUntil(due) => {
                    // The wall clock may jump, so look again now and then.
                    let wait = due.duration_since(now).unwrap_or_default();
                    tokio::time::sleep(wait.min(Duration::from_secs(WALL_CHECK_SECONDS))).await;
                }
                next @ (Next::Renew | Next::Expired) => {
                    // An ended certificate opens no connection to the authority: only a token helps.
                    let attempt =
                        if next == Next::Renew { self.renew(&session).await } else { self.join().await };
                    failures = match attempt {
                        Ok(()) => None,
                        Err(failed) => {
                            let failed_now = rotation.failed(SystemTime::now());
                            let retry = self.retry_after(&failed_now);
                            self.events.emit(&Event::CertificateRenewalFailed {
                                identity: self.config.node.to_string(),
                                failures: failed_now.failures,
                                problem: failed.to_string(),
                                retry,
                            });
                            tokio::time::sleep(retry).await;
                            Some(failed_now)
                        }
                    };
                }
            }
        }
    }

    fn retry_after(&self, rotation: &Rotation) -> Duration {
        rotation.retry_at().and_then(|at| at.duration_since(SystemTime::now()).ok()).unwrap_or_default()
    }

    async fn watch_forever(&self) {
        let mut backoff = Backoff::new();
        loop {
            let Some(session) = self.session.load_full() else { return };
            match self.watch(&session).await {
                // The authority ends old connections in order; the next one is made at once.
                Ok(received) if received > 0 => backoff = Backoff::new(),
                Ok(_) => {
                    let ended = AuthorityFailed::Unreachable("the stream ended at once".to_owned());
                    self.pause("Watch", &ended, backoff.next()).await;
                }
                Err(failed) => self.pause("Watch", &failed, backoff.next()).await,
            }
        }
    }

    /// Follows the roots until the stream ends; the number of messages that came.
    async fn watch(&self, session: &Session) -> Result<usize, AuthorityFailed> {
        let (acks, queue) = mpsc::channel(ACKS_QUEUED_MAX);
        let acked = |version| WatchRequest { acked_version: version };
        acks.try_send(acked(0))
            .map_err(|_| AuthorityFailed::Unreachable("the stream is closed".to_owned()))?;
        let mut client = node_agent(session.channel.clone());
        let mut stream = ask(client.watch(ReceiverStream::new(queue))).await?;
        let mut received = 0;
        loop {
            let Some(message) = within_silence(stream.message()).await? else { return Ok(received) };
            received += 1;
            if let Watched::Bundle { version, roots } = message.try_into()? {
                self.trust(&roots)?;
                self.write(BUNDLE_FILE, bundle_pem(&roots).as_bytes())?;
                if !acknowledge(&acks, acked(version)).await? {
                    return Ok(received);
                }
            }
        }
    }

    // ---- connections -----------------------------------------------------------------------------------------------

    fn tls(
        &self,
        trust: AuthorityTrust,
        own: Option<(&PrivateKey, Vec<CertificateDer<'static>>)>,
    ) -> Result<Arc<ClientConfig>, AuthorityFailed> {
        let name = CaId::new(self.config.trust_domain.clone());
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has suites and groups of TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AuthorityServer { name, trust }));
        let mut config = match own {
            None => builder.with_no_client_auth(),
            Some((key, chain)) => {
                let certified = key.certify(chain).map_err(bad_certificate)?;
                builder.with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)))
            }
        };
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        config.alpn_protocols = vec![ca_proto::ALPN.to_vec()];
        Ok(Arc::new(config))
    }

    fn channel(&self, tls: Arc<ClientConfig>) -> Channel {
        let address = self.config.address;
        let silence = Duration::from_secs(ca_proto::WATCH_HEARTBEAT_SECONDS);
        Endpoint::from_static("http://culvert-ca")
            .connect_timeout(Duration::from_secs(CONNECT_SECONDS))
            .http2_keep_alive_interval(silence)
            .keep_alive_timeout(silence)
            .keep_alive_while_idle(true)
            .connect_with_connector_lazy(service_fn(move |_: Uri| connect(address, Arc::clone(&tls))))
    }
}

fn bad_certificate(error: rustls::Error) -> AuthorityFailed {
    AuthorityFailed::BadAnswer(format!("the node's certificate: {error}"))
}

/// The node's key and certificate, in one file so that they always fit each other.
const NODE_FILE: &str = "node.pem";

/// The roots.
const BUNDLE_FILE: &str = "bundle.pem";

/// The key of a join whose answer has not come yet.
const JOINING_FILE: &str = "joining.pem";

async fn connect(
    address: SocketAddr,
    tls: Arc<ClientConfig>,
) -> io::Result<TokioIo<tokio_rustls::client::TlsStream<TcpStream>>> {
    let within = Duration::from_secs(CONNECT_SECONDS);
    let connected = timeout(within, async {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        // No name is sent (no SNI) and none is compared: the verifier asks for the authority's own.
        let handshake = TlsConnector::from(tls).connect(ServerName::IpAddress(address.ip().into()), stream);
        // Said in the verifier's own words.
        handshake.await.map_err(|error| PeerRefused::of(&error).map_or(error, io::Error::other))
    });
    match connected.await {
        Ok(stream) => stream.map(TokioIo::new),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("{address} did not answer in time"))),
    }
}

fn node_agent(channel: Channel) -> NodeAgentClient<Channel> {
    NodeAgentClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// The next message of a watched stream; `None` at its end.
async fn within_silence<T>(
    message: impl Future<Output = Result<Option<T>, tonic::Status>>,
) -> Result<Option<T>, AuthorityFailed> {
    match timeout(SILENCE, message).await {
        Ok(message) => message.map_err(|status| failure(&status)),
        Err(_) => Err(AuthorityFailed::Unreachable(format!("silent for {} s", SILENCE.as_secs()))),
    }
}

/// Tells the authority what was put to use; false where the stream has ended.
async fn acknowledge(acks: &mpsc::Sender<WatchRequest>, ack: WatchRequest) -> Result<bool, AuthorityFailed> {
    match timeout(SILENCE, acks.send(ack)).await {
        Ok(sent) => Ok(sent.is_ok()),
        Err(_) => {
            let problem = format!("it takes no acknowledgement for {} s", SILENCE.as_secs());
            Err(AuthorityFailed::Unreachable(problem))
        }
    }
}

async fn ask<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, AuthorityFailed> {
    match timeout(Duration::from_secs(ANSWER_SECONDS), call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(failure(&status)),
        Err(_) => Err(AuthorityFailed::Unreachable(format!("no answer within {ANSWER_SECONDS} s"))),
    }
}

fn failure(status: &tonic::Status) -> AuthorityFailed {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        // Some layers repeat the words of the one below.
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    match status.code() {
        tonic::Code::Unauthenticated
        | tonic::Code::PermissionDenied
        | tonic::Code::InvalidArgument
        | tonic::Code::FailedPrecondition
        | tonic::Code::NotFound
        | tonic::Code::AlreadyExists
        | tonic::Code::OutOfRange
        | tonic::Code::Unimplemented => AuthorityFailed::Refused(format!("{:?}: {text}", status.code())),
        tonic::Code::Ok
        | tonic::Code::Cancelled
        | tonic::Code::Unknown
        | tonic::Code::DeadlineExceeded
        | tonic::Code::ResourceExhausted
        | tonic::Code::Aborted
        | tonic::Code::Internal
        | tonic::Code::Unavailable
        | tonic::Code::DataLoss => AuthorityFailed::Unreachable(format!("{:?}: {text}", status.code())),
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, rustls::pki_types::pem::Error> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect()
}

fn bundle_pem(roots: &[CertificateDer<'_>]) -> String {
    roots.iter().map(|root| certificate_pem(root)).collect()
}

impl Authority for Client {
    async fn create(
        &self,
        identity: &SpiffeId,
        request: Request,
    ) -> Result<Vec<CertificateDer<'static>>, AuthorityFailed> {
        let Some(session) = self.session.load_full() else {
            return Err(AuthorityFailed::Unreachable("this node has not joined yet".to_owned()));
        };
        let request = CreateCertificate::request(identity, request.pem, None);
        let mut client = IstioCertificateServiceClient::new(session.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let issued: Issued = ask(client.create_certificate(request)).await?.try_into()?;
        Ok(issued.chain)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Client").field("config", &self.config).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use ca_proto::ca::{
        JoinResponse, NodeCertificate, RenewResponse, WatchResponse,
        node_agent_server::{NodeAgent, NodeAgentServer},
    };
    use tokio::{net::TcpListener, time::Instant};
    use tokio_stream::StreamExt as _;
    use tonic::{Request as Call, Response, Status, Streaming};

    use super::*;
    use crate::certs::testing::own_domain;

    #[tokio::test(start_paused = true)]
    async fn an_answer_has_its_time_and_no_more() {
        let answer = |seconds| async move {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            Ok(Response::new(seconds))
        };
        assert_eq!(ask(answer(ANSWER_SECONDS - 1)).await.expect("in time"), ANSWER_SECONDS - 1);
        let before = Instant::now();
        let late = ask(answer(ANSWER_SECONDS + 1)).await.expect_err("too late");
        assert!(matches!(late, AuthorityFailed::Unreachable(_)), "{late}");
        assert_eq!(before.elapsed().as_secs(), ANSWER_SECONDS);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_given_up_after_three_heartbeats_without_one() {
        let message = |seconds| async move {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            Ok(Some(seconds))
        };
        assert_eq!(within_silence(message(14)).await.expect("in time"), Some(14));
        let before = Instant::now();
        let silent = within_silence(message(16)).await.expect_err("silent");
        assert!(silent.to_string().contains("silent for 15 s"), "{silent}");
        assert_eq!(before.elapsed(), SILENCE);
    }

    #[tokio::test(start_paused = true)]
    async fn acknowledgements_that_nobody_takes_wait_and_then_the_stream_is_given_up() {
        let (acks, mut queue) = mpsc::channel(ACKS_QUEUED_MAX);
        let ack = |version| WatchRequest { acked_version: version };
        for version in 0..4 {
            assert!(acknowledge(&acks, ack(version)).await.expect("there is room"));
        }
        let before = Instant::now();
        let stuck = acknowledge(&acks, ack(4)).await.expect_err("no room");
        assert!(matches!(stuck, AuthorityFailed::Unreachable(_)), "{stuck}");
        assert_eq!(before.elapsed(), SILENCE);
        assert_eq!(queue.recv().await, Some(ack(0)));
        assert!(acknowledge(&acks, ack(5)).await.expect("there is room again"));
        drop(queue);
        assert!(!acknowledge(&acks, ack(6)).await.expect("the end of a stream is no fault"));
    }

    #[tokio::test]
    async fn an_authority_that_never_shakes_hands_is_given_up_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("bound");
        let config = AuthorityConfig {
            address,
            trust_domain: own_domain(),
            node: NodeId::new(own_domain(), "node-a").expect("a name"),
            join_token: PathBuf::new(),
            state: PathBuf::new(),
        };
        let store = Arc::new(Store::new(own_domain()));
        let client = Client::new(config, Arc::clone(&store), Sink::new());
        let tls =
            client.tls(AuthorityTrust::Bundle(Arc::clone(store.trust())), None).expect("a configuration");
        tokio::time::pause();
        let before = Instant::now();
        let error = connect(address, tls).await.map(drop).expect_err("nobody shakes hands");
        assert_eq!((error.kind(), before.elapsed().as_secs()), (io::ErrorKind::TimedOut, CONNECT_SECONDS));
    }

    /// Answers each renewal with a certificate of this many bytes.
    struct Talkative(usize);

    #[tonic::async_trait]
    impl NodeAgent for Talkative {
        async fn join(&self, _: Call<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
            Err(Status::unimplemented("not asked for here"))
        }

        async fn renew(&self, _: Call<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
            let certificate =
                NodeCertificate { chain: vec![vec![7; self.0]], bundle: Vec::new(), bundle_version: 0 };
            Ok(Response::new(RenewResponse { certificate: Some(certificate) }))
        }

        type WatchStream = tokio_stream::Pending<Result<WatchResponse, Status>>;

        async fn watch(
            &self,
            _: Call<Streaming<WatchRequest>>,
        ) -> Result<Response<Self::WatchStream>, Status> {
            Err(Status::unimplemented("not asked for here"))
        }
    }

    async fn renewed(certificate_bytes: usize) -> Result<RenewResponse, AuthorityFailed> {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let incoming = tokio_stream::once(Ok::<_, io::Error>(far)).chain(tokio_stream::pending());
        let server = tonic::transport::Server::builder()
            .add_service(NodeAgentServer::new(Talkative(certificate_bytes)))
            .serve_with_incoming(incoming);
        let server = tokio::spawn(server);
        let mut near = Some(near);
        let connect = service_fn(move |_: Uri| {
            let near = near.take().ok_or_else(|| io::Error::other("connected already"));
            async move { near.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://authority")
            .connect_with_connector(connect)
            .await
            .expect("connects");
        let answer = ask(node_agent(channel).renew(RenewRequest { csr: vec![1] })).await;
        server.abort();
        answer
    }

    #[tokio::test]
    async fn the_limit_of_an_answer_is_exact() {
        // Each of the two messages around the bytes has a field's number and three bytes of length.
        let largest = MESSAGE_BYTES_MAX - 8;
        let answer = renewed(largest).await.expect("at the limit");
        assert_eq!(answer.certificate.map(|certificate| certificate.chain[0].len()), Some(largest));
        let refused = renewed(largest + 1).await.expect_err("above the limit");
        assert!(refused.to_string().contains("OutOfRange"), "{refused}");
    }
}
