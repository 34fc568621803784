//! Wires the rooms; the only file that knows them all.

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ca_proto::ca::node_agent_server::NodeAgentServer;
use ca_proto::istio::istio_certificate_service_server::IstioCertificateServiceServer;
use ca_proto::join_token::RootPin;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::Server;
use tower::util::MapResponseLayer;

use crate::accept::{Bundle, REQUEST_BYTES_MAX, Rpc, Services};
use crate::admin::{self, AdminError};
use crate::clock::Clock;
use crate::config::Config;
use crate::keys::{Authority, StateError, StateFolder, StateLock};
use crate::ledger::{self, Ledger, LedgerError, Recorder};
use crate::listen::{self, Connection, Serving};
use crate::registry;
use crate::telemetry::{Event, Telemetry};

/// Seconds between two looks at what is due: keys, pruning.
const HOUSEKEEPING: Duration = Duration::from_secs(60);

/// How long a connection lives before the client is asked to make another: nodes spread over replicas again, and show
/// a fresh certificate.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(30 * 60);

/// How long its open requests then have.
const CONNECTION_GRACE: Duration = Duration::from_secs(30);

/// A silent connection is asked after this time whether it lives...
const KEEPALIVE: Duration = Duration::from_secs(30);

/// ...and closed if it does not answer within this.
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(20);

/// Streams of one connection: a node asks for all its workloads at once, 8 at a time, beside its Watch.
const STREAMS_PER_CONNECTION_MAX: u32 = 64;

/// Largest header list of a request, in bytes; a token of a cluster takes 2 KiB.
const HEADERS_BYTES_MAX: u32 = 16 * 1024;

/// Connections between handshake and server; the server takes them at once.
const ACCEPTED_QUEUE: usize = 64;

/// How long open requests have when the authority stops.
const STOP: Duration = Duration::from_secs(5);

/// Why the authority did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Keys or state folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// The registry cannot be read at all.
    #[error(
        "registry {path}: {source}; make the folder, or set registry to the one with the Workload documents"
    )]
    Registry {
        /// The configured path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The address cannot be listened on.
    #[error(
        "listen {address}: {source}; is another culvert-ca running, and is the address one of this machine's?"
    )]
    Listen {
        /// The configured address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The operator's socket.
    #[error("adminSocket {0}")]
    Admin(#[from] AdminError),
    /// A defect, or a machine without threads or randomness.
    #[error("cannot start: {0}")]
    Bug(String),
}

impl From<LedgerError> for StartError {
    fn from(error: LedgerError) -> Self {
        Self::State(error.into())
    }
}

/// A running authority. Dropping it stops nothing; call [`Handle::stop`].
#[derive(Debug)]
pub struct Handle {
    address: SocketAddr,
    admin_socket: PathBuf,
    pin: RootPin,
    cancel: CancellationToken,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    rooms: Vec<JoinHandle<()>>,
    ledger: Arc<Ledger>,
    lock: StateLock,
}

impl Handle {
    /// Where it serves gRPC, with the port that the system chose if the configuration said 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The operator's socket.
    pub fn admin_socket(&self) -> &Path {
        &self.admin_socket
    }

    /// What join tokens carry of the root.
    pub fn pin(&self) -> RootPin {
        self.pin
    }

    /// Waits until `stop` is ready; `false` if the server ended by itself before.
    pub async fn wait(&mut self, stop: impl Future<Output = ()>) -> bool {
        tokio::select! {
            () = stop => true,
            ended = &mut self.server => {
                tracing::error!(?ended, "the server ended by itself");
                false
            }
        }
    }

    /// Stops accepting, lets open requests end within five seconds, removes the socket.
    pub async fn stop(self) {
        self.cancel.cancel();
        let abort = self.server.abort_handle();
        if !self.server.is_finished() && tokio::time::timeout(STOP, self.server).await.is_err() {
            abort.abort();
        }
        for room in self.rooms {
            // A room that panicked said so when it did.
            let _ = room.await;
        }
        self.ledger.close();
        drop(self.lock);
    }
}

/// Starts the authority; when this returns, it serves.
///
/// # Errors
/// Says which part could not start, and what to do.
pub async fn start(config: Config, clock: Clock) -> Result<Handle, StartError> {
    let bug = |error: &dyn std::fmt::Display| StartError::Bug(error.to_string());
    let cancel = CancellationToken::new();
    let telemetry = Arc::new(Telemetry::default());

    // What was started ends with an attempt that fails.
    let started = cancel.clone().drop_guard();
    let (authority, ledger, lock) = open(&config, &clock)?;
    let recorder = Recorder::start(Arc::clone(&ledger)).map_err(|error| bug(&error))?;
    let (publish, bundle) = watch::channel(Arc::new(bundle(&authority, &ledger)?));
    let registry = registry::start(&config.registry, cancel.clone())
        .map_err(|source| StartError::Registry { path: config.registry.clone(), source })?;
    let serving = Arc::new(Serving::new(&authority, clock.now()).map_err(|error| bug(&error))?);
    let tls = listen::tls(&authority, Arc::clone(&serving), &clock).map_err(|error| bug(&error))?;
    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.map_err(|source| StartError::Listen { address: config.listen, source })?;
    let address = listener.local_addr().map_err(|error| bug(&error))?;
    let admin_listener = admin::listen(&config.admin_socket).await?;

    let services = Arc::new(Services::new(
        &config,
        Arc::clone(&authority),
        Arc::clone(&ledger),
        recorder,
        registry,
        bundle,
        Arc::clone(&telemetry),
        clock.clone(),
        cancel.clone(),
    ));
    let (accepted, connections) = mpsc::channel(ACCEPTED_QUEUE);
    let keeper = Keeper {
        authority: Arc::clone(&authority),
        ledger: Arc::clone(&ledger),
        serving,
        clock,
        telemetry: Arc::clone(&telemetry),
        _publish: publish,
    };
    let rooms = vec![
        tokio::spawn(listen::accept(listener, tls, accepted, Arc::clone(&telemetry), cancel.clone())),
        tokio::spawn(admin::serve(
            admin_listener,
            config.admin_socket.clone(),
            Arc::clone(&services),
            cancel.clone(),
        )),
        tokio::spawn(keeper.keep(cancel.clone())),
    ];
    let server = tokio::spawn(serve(services, connections, telemetry, cancel.clone()));
    tracing::info!(%address, trust_domain = %config.trust_domain, pin = %authority.pin(), "serving");
    started.disarm();
    Ok(Handle {
        address,
        admin_socket: config.admin_socket,
        pin: authority.pin(),
        cancel,
        server,
        rooms,
        ledger,
        lock,
    })
}

fn open(config: &Config, clock: &Clock) -> Result<(Arc<Authority>, Arc<Ledger>, StateLock), StartError> {
    let (folder, lock) = StateFolder::open(&config.state)?;
    let ledger = Ledger::open(&folder.ledger_path())?;
    let authority =
        Authority::open(folder, &ledger, &config.trust_domain, config.init_new_root, clock.now())?;
    Ok((Arc::new(authority), Arc::new(ledger), lock))
}

fn bundle(authority: &Authority, ledger: &Ledger) -> Result<Bundle, LedgerError> {
    let roots = vec![authority.root().clone()];
    let mut fingerprint = Sha256::new();
    for root in &roots {
        fingerprint.update(root);
    }
    let fingerprint: String = fingerprint.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Bundle { version: ledger.bundle_version(&fingerprint)?, roots })
}

async fn serve(
    services: Arc<Services>,
    connections: mpsc::Receiver<std::io::Result<Connection>>,
    telemetry: Arc<Telemetry>,
    cancel: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let rpc = Rpc(services);
    let count = MapResponseLayer::new(move |response: tonic::codegen::http::Response<tonic::body::Body>| {
        // Such a message is refused before any code of ours sees it.
        let status = response.headers().get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()));
        if status == Some(Code::OutOfRange) {
            telemetry.tell(&Event::MessageTooLarge);
        }
        response
    });
    Server::builder()
        .layer(count)
        .max_connection_age(CONNECTION_AGE_MAX)
        .max_connection_age_grace(CONNECTION_GRACE)
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_max_header_list_size(HEADERS_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_ANSWER))
        .add_service(NodeAgentServer::new(rpc.clone()).max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(IstioCertificateServiceServer::new(rpc).max_decoding_message_size(REQUEST_BYTES_MAX))
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), cancel.cancelled_owned())
        .await
}

/// Does each minute what is due.
struct Keeper {
    authority: Arc<Authority>,
    ledger: Arc<Ledger>,
    serving: Arc<Serving>,
    clock: Clock,
    telemetry: Arc<Telemetry>,
    /// Held so that Watch streams live as long as the authority. The bundle changes when roots are rotated.
    _publish: watch::Sender<Arc<Bundle>>,
}

impl Keeper {
    async fn keep(self, cancel: CancellationToken) {
        let keeper = Arc::new(self);
        let mut due = tokio::time::interval(HOUSEKEEPING);
        due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = due.tick() => {}
            }
            let keeper = Arc::clone(&keeper);
            if let Err(error) = tokio::task::spawn_blocking(move || keeper.once()).await {
                tracing::error!(%error, "housekeeping failed");
            }
        }
    }

    fn once(&self) {
        let now = self.clock.now();
        match self.authority.rotate(now) {
            Ok(false) => {}
            Ok(true) => self
                .telemetry
                .tell(&Event::IssuingKeyReplaced { expires: self.authority.issuing().expires() }),
            Err(error) => {
                tracing::error!(%error, expires = %self.authority.issuing().expires(), "the issuing key is due and cannot be replaced")
            }
        }
        match self.serving.rotate(&self.authority, now) {
            Ok(None) => {}
            Ok(Some(expires)) => self.telemetry.tell(&Event::ServingReplaced { expires }),
            Err(error) => {
                tracing::error!(%error, "the authority's own certificate is due and cannot be replaced")
            }
        }
        ledger::prune(&self.ledger, &self.clock);
    }
}
