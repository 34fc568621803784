//! Connections: TLS 1.3 with our own, live certificate; a client certificate is optional, and verified if given.
//!
//! What comes out is an accepted connection that knows its peer's leaf. Not tonic's own TLS: that one cannot replace
//! its certificate while it runs, and would resume sessions without verifying anybody.

use std::fmt;
use std::future::Future as _;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use ca_proto::convert::CsrDer;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::authorise;
use crate::clock::{Clock, Seconds};
use crate::csr::Csr;
use crate::issue::issue;
use crate::keys::Authority;
use crate::telemetry::{Event, Telemetry};

/// Connections that are served at once, handshakes included: 5,000 nodes with one each, and half as many again while
/// they reconnect. At the limit new ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 8192;

/// Connections without a client certificate that are served at once. Only joins come so, and one takes milliseconds.
/// At the limit a further one is closed after its handshake, so that strangers cannot displace nodes.
const STRANGERS_MAX: usize = 256;

/// How long a connection without a client certificate may last: a join over a slow line.
const STRANGER_AGE_MAX: Duration = Duration::from_secs(30);

/// How long a handshake may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Pause after the kernel refused to hand over a connection (no descriptors left): trying at once would spin.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Life of our own certificate, in seconds. It is replaced at half of it.
const SERVING_SECONDS: u64 = 86_400;

/// The certificate that the authority shows, replaced while it runs.
pub(crate) struct Serving {
    current: RwLock<Current>,
}

struct Current {
    certified: Arc<CertifiedKey>,
    issuer: CertificateDer<'static>,
    renew_at: Seconds,
    expires: Seconds,
}

/// Our own certificate could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the authority's own certificate: {0}")]
pub(crate) struct ServingError(String);

impl Serving {
    pub(crate) fn new(authority: &Authority, now: Seconds) -> Result<Self, ServingError> {
        Ok(Self { current: RwLock::new(certificate(authority, now)?) })
    }

    /// Replaces the certificate if half its life is over or the issuing key changed; says until when the new one lives.
    pub(crate) fn rotate(
        &self,
        authority: &Authority,
        now: Seconds,
    ) -> Result<Option<Seconds>, ServingError> {
        {
            let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
            if now < current.renew_at && current.issuer == *authority.issuing().certificate() {
                return Ok(None);
            }
        }
        let next = certificate(authority, now)?;
        let expires = next.expires;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(Some(expires))
    }
}

/// A new key, certified the way every other one is.
fn certificate(authority: &Authority, now: Seconds) -> Result<Current, ServingError> {
    let failed = |error: &dyn fmt::Display| ServingError(error.to_string());
    let key = rcgen::KeyPair::generate().map_err(|error| failed(&error))?;
    let mut request = rcgen::CertificateParams::default();
    request.distinguished_name = rcgen::DistinguishedName::new();
    let request = request.serialize_request(&key).map_err(|error| failed(&error))?;
    let request = CsrDer::from_der(request.der().to_vec()).map_err(|error| failed(&error))?;
    let csr = Csr::verify(&request).map_err(|error| failed(&error))?;
    let grant = authorise::authority_itself(authority.trust_domain(), SERVING_SECONDS);
    let issuing = authority.issuing();
    let issued = issue(&csr, grant, &issuing, now).map_err(|error| failed(&error))?;

    // The root goes with it: a node that joins knows only its pin.
    let chain = vec![issued.leaf, issued.issuer.clone(), authority.root().clone()];
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| failed(&error))?;
    let certified = CertifiedKey::from_der(chain, key, &provider()).map_err(|error| failed(&error))?;
    let renew_at = now.plus(issued.expires.since(now) / 2);
    Ok(Current { certified: Arc::new(certified), issuer: issued.issuer, renew_at, expires: issued.expires })
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).certified))
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Serving")
    }
}

/// The one line that chooses the cryptographic library.
fn provider() -> CryptoProvider {
    rustls::crypto::aws_lc_rs::default_provider()
}

/// Builds the TLS side: 1.3 only, no resumption (a resumed session skips the verification of the client).
pub(crate) fn tls(
    authority: &Authority,
    serving: Arc<Serving>,
    clock: &Clock,
) -> Result<TlsAcceptor, ServingError> {
    let failed = |error: &dyn fmt::Display| ServingError(error.to_string());
    let provider = Arc::new(provider());
    let mut roots = RootCertStore::empty();
    roots.add(authority.root().clone()).map_err(|error| failed(&error))?;
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(|error| failed(&error))?;
    let mut config = ServerConfig::builder_with_details(provider, Arc::new(clock.clone()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| failed(&error))?
        .with_client_cert_verifier(clients)
        .with_cert_resolver(serving);
    config.alpn_protocols = vec![ca_proto::ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Accepts until cancelled; handshakes run beside each other.
pub(crate) async fn accept(
    listener: TcpListener,
    tls: TlsAcceptor,
    connections: mpsc::Sender<std::io::Result<Connection>>,
    telemetry: Arc<Telemetry>,
    cancel: CancellationToken,
) {
    accept_within(listener, tls, connections, telemetry, cancel, CONNECTIONS_MAX).await;
}

async fn accept_within(
    listener: TcpListener,
    tls: TlsAcceptor,
    connections: mpsc::Sender<std::io::Result<Connection>>,
    telemetry: Arc<Telemetry>,
    cancel: CancellationToken,
    connections_max: usize,
) {
    let slots = Arc::new(Semaphore::new(connections_max));
    let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
    loop {
        if slots.available_permits() == 0 {
            telemetry.tell(&Event::ConnectionsLimited);
        }
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = next(&listener, &slots) => accepted,
        };
        let (tcp, peer, slot) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let handshake = Handshake {
            tls: tls.clone(),
            strangers: Arc::clone(&strangers),
            connections: connections.clone(),
            telemetry: Arc::clone(&telemetry),
        };
        tokio::spawn(handshake.run(tcp, peer, slot));
    }
}

async fn next(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(std::io::Error::other)?;
    let (tcp, peer) = listener.accept().await?;
    Ok((tcp, peer, slot))
}

struct Handshake {
    tls: TlsAcceptor,
    strangers: Arc<Semaphore>,
    connections: mpsc::Sender<std::io::Result<Connection>>,
    telemetry: Arc<Telemetry>,
}

impl Handshake {
    async fn run(self, tcp: TcpStream, peer: SocketAddr, slot: OwnedSemaphorePermit) {
        let failed = |problem| self.telemetry.tell(&Event::HandshakeFailed { peer, problem });
        // A request is one small segment; waiting for more would only add delay.
        if let Err(error) = tcp.set_nodelay(true) {
            return failed(error.to_string());
        }
        let stream = match tokio::time::timeout(HANDSHAKE_MAX, self.tls.accept(tcp)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return failed(error.to_string()),
            Err(_) => return failed(format!("it took longer than {HANDSHAKE_MAX:?}")),
        };
        let leaf = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| chain.first())
            .map(|leaf| leaf.clone().into_owned());
        let stranger = match leaf {
            Some(_) => None,
            None => match Arc::clone(&self.strangers).try_acquire_owned() {
                Ok(permit) => {
                    Some(Stranger { _slot: permit, until: Box::pin(tokio::time::sleep(STRANGER_AGE_MAX)) })
                }
                Err(_) => return self.telemetry.tell(&Event::StrangersLimited { peer }),
            },
        };
        let peer = Peer { address: peer, leaf: leaf.map(Arc::new) };
        // Fails only when the server is gone.
        let _ = self.connections.send(Ok(Connection { stream, peer, stranger, _slot: slot })).await;
    }
}

/// Who is at the other end.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// The leaf that the handshake verified up to the root; `None` if the client presented none.
    pub(crate) leaf: Option<Arc<CertificateDer<'static>>>,
}

/// An accepted connection. Its places among the limits are free again when it is dropped.
pub(crate) struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    stranger: Option<Stranger>,
    _slot: OwnedSemaphorePermit,
}

struct Stranger {
    _slot: OwnedSemaphorePermit,
    until: Pin<Box<Sleep>>,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if let Some(stranger) = &mut self.stranger
            && stranger.until.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(std::io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::tests::World;
    use tokio::io::AsyncReadExt as _;

    /// Accepts with room for so many connections, and for so many that the server has not taken yet.
    struct Accepting {
        _world: World,
        address: SocketAddr,
        telemetry: Arc<Telemetry>,
        accepted: mpsc::Receiver<std::io::Result<Connection>>,
        cancel: CancellationToken,
        room: tokio::task::JoinHandle<()>,
    }

    impl Accepting {
        async fn new(name: &str, connections_max: usize, queue: usize) -> Self {
            let clock = Clock::system();
            let world = World::new(name, clock.now());
            let serving = Arc::new(Serving::new(&world.authority, clock.now()).expect("a certificate"));
            let tls = tls(&world.authority, serving, &clock).expect("a configuration");
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = listener.local_addr().expect("an address");
            let (sender, accepted) = mpsc::channel(queue);
            let (telemetry, cancel) = (Arc::new(Telemetry::default()), CancellationToken::new());
            let (told, ended) = (Arc::clone(&telemetry), cancel.clone());
            let room = tokio::spawn(accept_within(listener, tls, sender, told, ended, connections_max));
            Self { _world: world, address, telemetry, accepted, cancel, room }
        }

        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.address).await.expect("connects")
        }

        /// Waits until something was counted so often.
        async fn counted(&self, counter: &str, times: u64) {
            while self.telemetry.counters().get(counter).copied().unwrap_or(0) < times {
                tokio::task::yield_now().await;
            }
            assert_eq!(self.telemetry.counters()[counter], times);
        }

        async fn stop(self) {
            self.cancel.cancel();
            self.room.await.expect("it ends");
        }
    }

    #[tokio::test]
    async fn at_the_limit_new_connections_wait_and_are_counted() {
        let world = Accepting::new("connections", 2, 9).await;
        let (first, _second) = (world.connect().await, world.connect().await);
        world.counted("connections_limited_total", 1).await;
        let third = world.connect().await;
        // Only a connection that was taken can fail in its handshake.
        drop(third);
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(world.telemetry.counters().get("handshakes_failed_total"), None, "the third waits");
        drop(first);
        world.counted("handshakes_failed_total", 2).await;
        world.stop().await;
    }

    #[tokio::test]
    async fn connections_that_the_server_does_not_take_wait_and_none_is_lost() {
        let mut world = Accepting::new("accepted", 9, 1).await;
        let mut clients = Vec::new();
        for _ in 0..3 {
            let client = tokio_rustls::TlsConnector::from(Arc::new(careless()))
                .connect("authority".try_into().expect("a name"), world.connect().await)
                .await
                .expect("shakes hands");
            clients.push(client);
        }
        for _ in 0..3 {
            world.accepted.recv().await.expect("a connection").expect("in order");
        }
        for mut client in clients {
            assert_eq!(
                client.read(&mut [0; 1]).await.ok().filter(|read| *read > 0),
                None,
                "dropped by the test"
            );
        }
        world.stop().await;
    }

    /// A client that believes every certificate: what it proves is how many are served.
    fn careless() -> rustls::ClientConfig {
        use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
        #[derive(Debug)]
        struct Anyone;
        impl ServerCertVerifier for Anyone {
            fn verify_server_cert(
                &self,
                _: &CertificateDer<'_>,
                _: &[CertificateDer<'_>],
                _: &rustls::pki_types::ServerName<'_>,
                _: &[u8],
                _: rustls::pki_types::UnixTime,
            ) -> Result<ServerCertVerified, rustls::Error> {
                Ok(ServerCertVerified::assertion())
            }
            fn verify_tls12_signature(
                &self,
                _: &[u8],
                _: &CertificateDer<'_>,
                _: &rustls::DigitallySignedStruct,
            ) -> Result<HandshakeSignatureValid, rustls::Error> {
                Ok(HandshakeSignatureValid::assertion())
            }
            fn verify_tls13_signature(
                &self,
                _: &[u8],
                _: &CertificateDer<'_>,
                _: &rustls::DigitallySignedStruct,
            ) -> Result<HandshakeSignatureValid, rustls::Error> {
                Ok(HandshakeSignatureValid::assertion())
            }
            fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
                provider().signature_verification_algorithms.supported_schemes()
            }
        }
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone))
            .with_no_client_auth();
        config.alpn_protocols = vec![ca_proto::ALPN.to_vec()];
        config
    }
}
