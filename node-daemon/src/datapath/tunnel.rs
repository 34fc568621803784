//! HBONE: HTTP/2 CONNECT over mutual TLS, as both ends. The only file where a TLS session meets a socket.
//!
//! [`Pool`] keeps the tunnels that this node dialled, one set per [`PoolKey`]: who dials from where, as whom, to whom
//! and what it accepts there (T-9). [`serve`] takes the tunnels that others dialled. Both ends carry a stream as
//! [`Stream`], bounded by HTTP/2's windows in one direction and by the send buffer in the other.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use h2::{Reason as StreamReason, RecvStream, SendStream, client::SendRequest};
use http::{Method, Request, StatusCode, Uri};
use node_core::{
    tunnel::{header::authority, route::PoolKey},
    workload::ObjectName,
};
use rustls::{CommonState, ServerConfig, pki_types::ServerName, server::Accepted};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, server::StartHandshake, server::TlsStream};

use super::carry::Side;
use crate::{
    certs::{
        Credentials,
        verify::{Peer, PeerRefused, peer_of},
    },
    telemetry::{HandshakeRefusal, Reason, Tls},
};

/// Time for a TLS and HTTP/2 handshake, in seconds (DESIGN 4.1). At the limit the connection is closed.
pub const HANDSHAKE_SECONDS: u64 = 10;

/// Streams in one tunnel (DESIGN 4.1). At the limit another tunnel is dialled; a server refuses the stream.
pub const STREAMS_PER_TUNNEL_MAX: usize = 200;

/// Bytes that a peer may send on one stream before they are read: 10 Gbit/s at 3 ms. Bounds what a slow reader holds.
pub(super) const WINDOW_STREAM_BYTES: u32 = 4 * 1024 * 1024;

/// The same for all streams of a tunnel: eight readers may stall before the others of the same pair of workloads wait.
pub(super) const WINDOW_TUNNEL_BYTES: u32 = 8 * WINDOW_STREAM_BYTES;

/// Largest frame that is taken, in bytes: as ztunnel's. Those that are sent are as large as a read of the relay.
pub(super) const FRAME_BYTES_MAX: u32 = 1024 * 1024;

/// Bytes of one stream that wait to be sent: four reads of the relay. At the limit the application is not read.
pub(super) const SEND_BUFFER_BYTES: usize = 256 * 1024;

/// Largest head of a CONNECT, in bytes: an authority, and tracing headers that others send.
pub(super) const HEAD_BYTES_MAX: u32 = 16 * 1024;

/// An unused tunnel is closed after so many seconds: longer than most pools of applications keep theirs.
pub(super) const IDLE_SECONDS_MAX: u64 = 60;

/// How often idle and outdated tunnels are looked for, in seconds.
pub(super) const SWEEP_SECONDS: u64 = 10;

/// Time for the answer to CONNECT, in seconds: the peer dials its own workload, which may be slow to accept.
pub(super) const ANSWER_SECONDS: u64 = 10;

/// First and longest pause between two attempts to reach a peer's daemon that is away (T-4), in milliseconds.
pub(super) const RETRY_MILLISECONDS_MIN: u64 = 50;
pub(super) const RETRY_MILLISECONDS_MAX: u64 = 1_000;

/// A peer's node that vanished without a word is noticed within a minute: idle time before the first probe, pause
/// between probes, and their number.
pub(super) const KEEPALIVE_IDLE_SECONDS: u64 = 30;
pub(super) const KEEPALIVE_PROBE_SECONDS: u64 = 10;
pub(super) const KEEPALIVE_PROBES: u32 = 3;

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeFailed {
    /// This side refused the peer.
    #[error("{0}")]
    Refused(#[from] PeerRefused),
    #[error("not finished within {HANDSHAKE_SECONDS} s")]
    TimedOut,
    /// Not TLS, nothing in common, or the peer refused this side.
    #[error("{0}")]
    Tls(String),
    /// The connection broke: the peer's daemon may be on its way up or down.
    #[error("the connection broke: {0}")]
    Broken(io::Error),
}

impl HandshakeFailed {
    pub(super) fn new(error: io::Error) -> Self {
        if let Some(refused) = PeerRefused::of(&error) {
            return Self::Refused(refused);
        }
        if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
            return Self::Tls(error.to_string());
        }
        Self::Broken(error)
    }

    /// True if this side said no, and nothing merely failed.
    pub(super) const fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_))
    }

    pub(super) fn reason(&self) -> Reason {
        Reason::Handshake(match self {
            Self::Refused(refused) => refused.refusal(),
            Self::TimedOut => HandshakeRefusal::TimedOut,
            Self::Tls(_) | Self::Broken(_) => HandshakeRefusal::Tls,
        })
    }
}

/// What was negotiated.
pub(super) fn negotiated(session: &CommonState) -> Tls {
    let version = match session.protocol_version() {
        Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3",
        _ => "unknown",
    };
    let group = session.negotiated_key_exchange_group().map(|group| format!("{:?}", group.name()));
    let cipher = session.negotiated_cipher_suite().map(|suite| format!("{:?}", suite.suite()));
    Tls { version, group: group.unwrap_or_default(), cipher: cipher.unwrap_or_default(), server_name: None }
}

// ---- the end that is dialled ---------------------------------------------------------------------------------------

/// A verified client, on whatever it speaks next.
pub(super) struct Secured<I> {
    pub(super) stream: TlsStream<I>,
    pub(super) peer: Peer,
    pub(super) tls: Tls,
    /// What a client asked for by name; never trusted, policy may compare it.
    pub(super) server_name: Option<String>,
}

/// Terminates TLS with the destination workload's certificate.
pub(super) async fn accept<I>(stream: I, config: Arc<ServerConfig>) -> Result<Secured<I>, HandshakeFailed>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    secured(TlsAcceptor::from(config).accept(stream)).await
}

/// The same for a client whose first message was read already.
pub(super) async fn accept_hello<I>(
    hello: Accepted,
    stream: I,
    config: Arc<ServerConfig>,
) -> Result<Secured<I>, HandshakeFailed>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    secured(StartHandshake::from_parts(hello, stream).into_stream(config)).await
}

async fn secured<I>(
    handshake: impl Future<Output = io::Result<TlsStream<I>>>,
) -> Result<Secured<I>, HandshakeFailed> {
    let stream = timeout(Duration::from_secs(HANDSHAKE_SECONDS), handshake)
        .await
        .map_err(|_| HandshakeFailed::TimedOut)?
        .map_err(HandshakeFailed::new)?;
    let session = stream.get_ref().1;
    let peer = peer_of(session.peer_certificates())?;
    let tls = negotiated(session);
    let server_name = session.server_name().map(ToOwned::to_owned);
    Ok(Secured { stream, peer, tls, server_name })
}

/// A tunnel from another node. Streams come from [`ServerTunnel::next`], which must be polled for them to progress.
pub(super) struct ServerTunnel<I> {
    connection: h2::server::Connection<I, Bytes>,
}

/// A tunnel as it arrives on a socket.
pub(super) type Arrived = ServerTunnel<TlsStream<TcpStream>>;

/// One CONNECT that waits for its answer.
pub(super) struct Asked {
    request: Request<RecvStream>,
    respond: h2::server::SendResponse<Bytes>,
}

/// Speaks HTTP/2 on a verified connection.
pub(super) async fn serve<I>(stream: I) -> Result<ServerTunnel<I>, HandshakeFailed>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(WINDOW_STREAM_BYTES)
        .initial_connection_window_size(WINDOW_TUNNEL_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_concurrent_streams(u32::try_from(STREAMS_PER_TUNNEL_MAX).unwrap_or(u32::MAX))
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_header_list_size(HEAD_BYTES_MAX);
    let connection = timeout(Duration::from_secs(HANDSHAKE_SECONDS), builder.handshake(stream))
        .await
        .map_err(|_| HandshakeFailed::TimedOut)?
        .map_err(|error| HandshakeFailed::Tls(error.to_string()))?;
    Ok(ServerTunnel { connection })
}

impl<I: AsyncRead + AsyncWrite + Unpin> ServerTunnel<I> {
    /// The next stream; `None` when the tunnel is closed. Cancel-safe.
    pub(super) async fn next(&mut self) -> Option<Result<Asked, h2::Error>> {
        let asked = self.connection.accept().await?;
        Some(asked.map(|(request, respond)| Asked { request, respond }))
    }

    /// GOAWAY: streams that run go on, new ones go elsewhere.
    pub(super) fn finish(&mut self) {
        self.connection.graceful_shutdown();
    }
}

impl Asked {
    /// What the client wants to reach, as it wrote it; `None` if it is no CONNECT.
    pub(super) fn authority(&self) -> Option<&str> {
        let target = self.request.uri().authority().map(http::uri::Authority::as_str);
        target.filter(|_| self.request.method() == Method::CONNECT)
    }

    /// Refuses it. The answer carries no body: the status says whose matter it is (T-8).
    pub(super) fn refuse(mut self, status: StatusCode) {
        let mut answer = http::Response::new(());
        *answer.status_mut() = status;
        // An answer that cannot be sent has no reader any more.
        let _ = self.respond.send_response(answer, true);
    }

    /// Accepts it; bytes may flow.
    pub(super) fn accept(mut self) -> Result<Stream, h2::Error> {
        let send = self.respond.send_response(http::Response::new(()), false)?;
        Ok(Stream::new(send, self.request.into_body(), None))
    }
}

// ---- one stream ----------------------------------------------------------------------------------------------------

/// A stream of a tunnel as a byte stream. Dropped before its end it is cancelled, so that nobody takes it for whole.
pub(super) struct Stream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    /// What of the last frame has not been read.
    unread: Bytes,
    _place: Option<Place>,
}

impl Stream {
    fn new(send: SendStream<Bytes>, receive: RecvStream, place: Option<Place>) -> Self {
        Self { send, receive, unread: Bytes::new(), _place: place }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.unread.is_empty() {
            match ready!(self.receive.poll_data(context)) {
                Some(Ok(frame)) => self.unread = frame,
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let taken = self.unread.len().min(buffer.remaining());
        let bytes = self.unread.split_to(taken);
        buffer.put_slice(&bytes);
        // The relay reads only what it can hand on, so the window opens no faster than the reader takes.
        self.receive.flow_control().release_capacity(taken).map_err(io::Error::other)?;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        // Asked for only with bytes in hand: a reservation of an idle stream would be taken from the others.
        self.send.reserve_capacity(bytes.len());
        let granted = loop {
            match ready!(self.send.poll_capacity(context)) {
                Some(Ok(0)) => {}
                Some(Ok(granted)) => break granted.min(bytes.len()),
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        };
        self.send.send_data(Bytes::copy_from_slice(&bytes[..granted]), false).map_err(io::Error::other)?;
        Poll::Ready(Ok(granted))
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's own task writes.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.send.send_data(Bytes::new(), true).map_err(io::Error::other))
    }
}

impl Side for Stream {
    /// A stream that is dropped before its end is cancelled, which the other end sees as a reset.
    fn arm(&self) {}

    fn settle(&self) {}

    fn is_lost(&self, error: &io::Error) -> bool {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<h2::Error>());
        !inner.is_some_and(h2::Error::is_reset)
    }
}

impl Side for TlsStream<TcpStream> {
    fn arm(&self) {
        self.get_ref().0.arm();
    }

    fn settle(&self) {
        self.get_ref().0.settle();
    }

    fn is_lost(&self, _error: &io::Error) -> bool {
        false
    }
}

// ---- the end that dials --------------------------------------------------------------------------------------------

/// Why no stream came about.
#[derive(Debug)]
pub(super) enum OpenFailed {
    /// The peer's daemon answered, and not with 200.
    Answered(StatusCode),
    /// It is not who may run the service, or refuses who we are.
    Handshake(HandshakeFailed),
    /// It did not come up within the hold time (T-4); the last problem.
    Dead(String),
    /// What it speaks is not the tunnel's protocol.
    Protocol(String),
}

impl fmt::Display for OpenFailed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered(status) => write!(formatter, "the peer's daemon answered {status}"),
            Self::Handshake(failed) => failed.fmt(formatter),
            Self::Dead(problem) => write!(formatter, "the peer's daemon did not answer in time: {problem}"),
            Self::Protocol(problem) => write!(formatter, "the peer does not speak HBONE: {problem}"),
        }
    }
}

/// A stream to a workload of another node, open.
pub(super) struct Opened {
    pub(super) stream: Stream,
    pub(super) peer: Peer,
    pub(super) tls: Tls,
}

/// How a tunnel's connection is made; called once per tunnel.
pub(super) trait Reach: Sync {
    /// Connects to the tunnel's endpoint from the source's own address.
    fn reach(&self) -> impl Future<Output = Result<TcpStream, crate::net::DialError>> + Send;
}

/// The tunnels that this node dialled.
pub(super) struct Pool {
    lanes: Mutex<BTreeMap<PoolKey, Arc<Lane>>>,
}

/// The tunnels of one key. The lock is held while one is dialled, so that a crowd dials once.
#[derive(Default)]
struct Lane {
    tunnels: tokio::sync::Mutex<Vec<Tunnel>>,
}

struct Tunnel {
    requests: SendRequest<Bytes>,
    places: Arc<Semaphore>,
    /// It takes no more streams: it broke, the other end said GOAWAY, or refused one.
    retired: Arc<AtomicBool>,
    used: Instant,
    generation: u64,
    /// The earlier end of both certificates: no new stream after it.
    not_after: SystemTime,
    peer: Peer,
    tls: Tls,
    alert: Alert,
}

/// A place in a tunnel, and what a stream needs of it.
struct Seat {
    requests: SendRequest<Bytes>,
    place: Place,
    peer: Peer,
    tls: Tls,
    alert: Alert,
    retired: Arc<AtomicBool>,
}

/// One of a tunnel's places, held by a stream.
struct Place {
    _permit: OwnedSemaphorePermit,
}

/// Why an attempt on one tunnel came to nothing.
enum Unopened {
    Failed(OpenFailed),
    /// No byte of the application was sent: another attempt is safe.
    Again(String),
}

impl Pool {
    pub(super) fn new() -> Self {
        Self { lanes: Mutex::new(BTreeMap::new()) }
    }

    /// Opens a stream to `target`, over a tunnel of `key`, with the present credentials of its source. Attempts are
    /// repeated until `deadline` while the peer's daemon is away (T-4).
    pub(super) async fn open(
        &self,
        key: &PoolKey,
        target: SocketAddr,
        credentials: &Credentials,
        reach: &impl Reach,
        deadline: Instant,
    ) -> Result<Opened, OpenFailed> {
        let lane = self.lane(key);
        let mut pause = Duration::from_millis(RETRY_MILLISECONDS_MIN);
        let mut last = "no attempt was made".to_owned();
        loop {
            match timeout_at(deadline, lane.attempt(key, target, credentials, reach)).await {
                Ok(Ok(opened)) => return Ok(opened),
                Ok(Err(Unopened::Failed(failed))) => return Err(failed),
                Ok(Err(Unopened::Again(problem))) => last = problem,
                Err(_) => return Err(OpenFailed::Dead(last)),
            }
            let jittered = pause.mul_f64(rand::random_range(0.5..=1.0));
            if Instant::now() + jittered >= deadline {
                return Err(OpenFailed::Dead(last));
            }
            tokio::time::sleep(jittered).await;
            pause = (pause * 2).min(Duration::from_millis(RETRY_MILLISECONDS_MAX));
        }
    }

    fn lane(&self, key: &PoolKey) -> Arc<Lane> {
        Arc::clone(self.lock().entry(key.clone()).or_default())
    }

    /// Closes idle tunnels, those of an earlier certificate, and forgets keys without any. `generation` says which
    /// certificate a source presents at present; `None`: it has none, or is gone.
    pub(super) async fn sweep_forever(&self, generation: impl Fn(&PoolKey) -> Option<u64>) {
        let mut ticks = tokio::time::interval(Duration::from_secs(SWEEP_SECONDS));
        loop {
            ticks.tick().await;
            self.sweep(&generation);
        }
    }

    fn sweep(&self, generation: impl Fn(&PoolKey) -> Option<u64>) {
        let idle = Duration::from_secs(IDLE_SECONDS_MAX);
        self.lock().retain(|key, lane| {
            // One that is dialling is in use.
            let Ok(mut tunnels) = lane.tunnels.try_lock() else { return true };
            let current = generation(key);
            tunnels.retain_mut(|tunnel| {
                let unused = tunnel.places.available_permits() == STREAMS_PER_TUNNEL_MAX;
                if !unused {
                    tunnel.used = Instant::now();
                }
                Some(tunnel.generation) == current
                    && tunnel.is_usable()
                    && !(unused && tunnel.used.elapsed() > idle)
            });
            !tunnels.is_empty() || Arc::strong_count(lane) > 1
        });
    }

    /// Lets the tunnels of one source end with their last stream: their sockets keep its namespace alive.
    pub(super) fn forget(&self, source: &ObjectName) {
        self.lock().retain(|key, _| key.source != *source);
    }

    /// Lets all tunnels end with their last stream.
    pub(super) fn finish(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<PoolKey, Arc<Lane>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lane {
    async fn attempt(
        &self,
        key: &PoolKey,
        target: SocketAddr,
        credentials: &Credentials,
        reach: &impl Reach,
    ) -> Result<Opened, Unopened> {
        let seat = self.seat(key, credentials, reach).await?;
        connect(seat, target).await
    }

    /// A place in a tunnel that stands, or in a new one.
    async fn seat(
        &self,
        key: &PoolKey,
        credentials: &Credentials,
        reach: &impl Reach,
    ) -> Result<Seat, Unopened> {
        let mut tunnels = self.tunnels.lock().await;
        // Streams of an outdated tunnel go on without being listed here; it closes with the last of them.
        tunnels.retain(|tunnel| tunnel.generation >= credentials.generation() && tunnel.is_usable());
        if let Some(found) = tunnels.iter_mut().find_map(Tunnel::take_seat) {
            return Ok(found);
        }
        let mut made = dial(key, credentials, reach).await?;
        let found = made.take_seat();
        tunnels.push(made);
        found.ok_or_else(|| Unopened::Again("the peer allows no stream".to_owned()))
    }
}

impl Tunnel {
    fn is_usable(&self) -> bool {
        !self.retired.load(Ordering::Acquire) && SystemTime::now() < self.not_after
    }

    fn take_seat(&mut self) -> Option<Seat> {
        let taken = STREAMS_PER_TUNNEL_MAX - self.places.available_permits();
        if taken >= self.requests.current_max_send_streams() {
            return None;
        }
        let permit = Arc::clone(&self.places).try_acquire_owned().ok()?;
        self.used = Instant::now();
        Some(Seat {
            requests: self.requests.clone(),
            place: Place { _permit: permit },
            peer: self.peer.clone(),
            tls: self.tls.clone(),
            alert: Arc::clone(&self.alert),
            retired: Arc::clone(&self.retired),
        })
    }
}

/// Makes one tunnel: TCP from the source's address, TLS as the source, HTTP/2.
async fn dial(key: &PoolKey, credentials: &Credentials, reach: &impl Reach) -> Result<Tunnel, Unopened> {
    let stream = reach.reach().await.map_err(|error| Unopened::Again(error.to_string()))?;
    keep_alive(&stream);
    let config = credentials.client(Arc::clone(&key.allowed));
    // No name is sent and none is compared; the verifier asks for one of the allowed identities.
    let name = ServerName::IpAddress(key.endpoint.ip().into());
    let handshake = TlsConnector::from(config).connect(name, stream);
    let stream = match timeout(Duration::from_secs(HANDSHAKE_SECONDS), handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            return Err(match HandshakeFailed::new(error) {
                HandshakeFailed::Broken(error) => Unopened::Again(format!("the handshake broke: {error}")),
                failed @ (HandshakeFailed::Refused(_)
                | HandshakeFailed::TimedOut
                | HandshakeFailed::Tls(_)) => Unopened::Failed(OpenFailed::Handshake(failed)),
            });
        }
        Err(_) => return Err(Unopened::Again("the handshake was not finished in time".to_owned())),
    };
    let session = stream.get_ref().1;
    let peer = peer_of(session.peer_certificates())
        .map_err(|refused| Unopened::Failed(OpenFailed::Handshake(refused.into())))?;
    let tls = negotiated(session);
    let peer_ends = UNIX_EPOCH + Duration::from_secs(peer.not_after);
    tunnel(stream, credentials.generation(), credentials.not_after().min(peer_ends), peer, tls).await
}

/// Speaks HTTP/2 on a verified connection, in a task of its own.
async fn tunnel<I>(
    stream: I,
    generation: u64,
    not_after: SystemTime,
    peer: Peer,
    tls: Tls,
) -> Result<Tunnel, Unopened>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(WINDOW_STREAM_BYTES)
        .initial_connection_window_size(WINDOW_TUNNEL_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_header_list_size(HEAD_BYTES_MAX)
        .enable_push(false);
    let alert = Alert::default();
    let stream = Listening { stream, alert: Arc::clone(&alert) };
    let handshake = timeout(Duration::from_secs(HANDSHAKE_SECONDS), builder.handshake(stream));
    let (requests, connection) = match handshake.await {
        Ok(Ok(parts)) => parts,
        Ok(Err(error)) if error.is_io() => return Err(lost(&alert, error.to_string())),
        Ok(Err(error)) => return Err(Unopened::Failed(OpenFailed::Protocol(error.to_string()))),
        Err(_) => return Err(Unopened::Again("HTTP/2 did not begin in time".to_owned())),
    };
    let retired = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&retired);
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "tunnel ended");
        }
        flag.store(true, Ordering::Release);
    });
    let places = Arc::new(Semaphore::new(STREAMS_PER_TUNNEL_MAX));
    Ok(Tunnel { requests, places, retired, used: Instant::now(), generation, not_after, peer, tls, alert })
}

/// Asks for `target` on a tunnel.
async fn connect(seat: Seat, target: SocketAddr) -> Result<Opened, Unopened> {
    let Seat { requests, place, peer, tls, alert, retired } = seat;
    let again = |error: h2::Error| {
        retired.store(true, Ordering::Release);
        lost(&alert, error.to_string())
    };
    let mut requests = requests.ready().await.map_err(again)?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.version_mut() = http::Version::HTTP_2;
    *request.uri_mut() = authority(target)
        .parse::<Uri>()
        .map_err(|error| Unopened::Failed(OpenFailed::Protocol(error.to_string())))?;
    let (answer, send) = requests.send_request(request, false).map_err(again)?;
    let answer = timeout(Duration::from_secs(ANSWER_SECONDS), answer).await.map_err(|_| {
        Unopened::Failed(OpenFailed::Dead(format!("no answer to CONNECT within {ANSWER_SECONDS} s")))
    })?;
    match answer {
        Ok(answer) if answer.status() == StatusCode::OK => {
            let stream = Stream::new(send, answer.into_body(), Some(place));
            Ok(Opened { stream, peer, tls })
        }
        Ok(answer) => Err(Unopened::Failed(OpenFailed::Answered(answer.status()))),
        Err(error) if error.is_io() || error.is_go_away() || is_refused(&error) => Err(again(error)),
        Err(error) => Err(Unopened::Failed(OpenFailed::Protocol(error.to_string()))),
    }
}

fn is_refused(error: &h2::Error) -> bool {
    error.reason() == Some(StreamReason::REFUSED_STREAM)
}

/// A tunnel that broke before its first stream. In TLS 1.3 the server judges the client after the client believes the
/// handshake done, so its refusal arrives here, as an alert: repeating it would not help.
fn lost(alert: &Alert, problem: String) -> Unopened {
    match alert.get() {
        Some(alert) => {
            let refused = format!("the peer's daemon refused this side: {alert}");
            Unopened::Failed(OpenFailed::Handshake(HandshakeFailed::Tls(refused)))
        }
        None => Unopened::Again(problem),
    }
}

/// The fatal alert that the peer sent, if it did.
type Alert = Arc<OnceLock<String>>;

/// A TLS session whose alerts are remembered: HTTP/2 keeps only the words of an error, not its kind.
struct Listening<I> {
    stream: I,
    alert: Alert,
}

impl<I: AsyncRead + Unpin> AsyncRead for Listening<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        if let Err(error) = &read
            && let Some(rustls::Error::AlertReceived(alert)) =
                error.get_ref().and_then(|inner| inner.downcast_ref())
        {
            self.alert.get_or_init(|| format!("{alert:?}"));
        }
        Poll::Ready(read)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Listening<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Lets the kernel notice a peer whose node vanished.
pub(super) fn keep_alive(stream: &TcpStream) {
    let probes = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(KEEPALIVE_IDLE_SECONDS))
        .with_interval(Duration::from_secs(KEEPALIVE_PROBE_SECONDS))
        .with_retries(KEEPALIVE_PROBES);
    // Without it a vanished peer is noticed at the next write: slower, not wrong.
    if let Err(error) = socket2::SockRef::from(stream).set_tcp_keepalive(&probes) {
        tracing::debug!(%error, "keep-alive");
    }
}
