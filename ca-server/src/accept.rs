//! The gRPC services: decode, call, encode; nothing else. The only file with the wire's types.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ca_proto::ca::node_agent_server::NodeAgent;
use ca_proto::ca::{JoinRequest, JoinResponse, RenewRequest, RenewResponse, WatchRequest, WatchResponse};
use ca_proto::convert::{CreateCertificate, InvalidMessage, Issued, IssuedToNode, Join, Renew};
use ca_proto::istio::istio_certificate_service_server::IstioCertificateService;
use ca_proto::istio::{IstioCertificateRequest, IstioCertificateResponse};
use ca_proto::refusal::{Reason, Refusal};
use rustls::pki_types::CertificateDer;
use spiffe_id::NodeId;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::authorise::{self, Grant, Joining};
use crate::clock::Clock;
use crate::config::Config;
use crate::csr::Csr;
use crate::identify::{self, NodePeer};
use crate::issue::{Certificate, issue};
use crate::keys::Authority;
use crate::ledger::{Joined, Ledger, Recorder};
use crate::listen::Peer;
use crate::registry::View;
use crate::telemetry::{Event, Telemetry};

/// Largest request, in bytes: four times the largest signing request, for PEM and metadata. A larger one is refused
/// before it is decoded.
pub(crate) const REQUEST_BYTES_MAX: usize = 64 * 1024;

/// Requests that are worked on at once; the work is 200 microseconds of CPU and a share of a disk sync. Further ones
/// are refused as overload, which clients retry.
const REQUESTS_MAX: usize = 512;

/// How long a request for an identity that is not on the node waits for the registry to say so: node and authority
/// learn of a new workload from the same documents, in either order.
const REGISTRY_WAIT: Duration = Duration::from_secs(1);

/// Watch streams of one node: the daemon's, its successor's, and two that are about to time out. A further one is
/// refused.
const WATCHES_PER_NODE_MAX: usize = 4;

/// Messages that wait on one Watch stream. A node that does not read them gets its heartbeats later, then its stream
/// is closed by the connection's keepalive.
const WATCH_QUEUE: usize = 4;

/// All roots, with the version that nodes acknowledge.
#[derive(Debug)]
pub(crate) struct Bundle {
    pub(crate) version: u64,
    pub(crate) roots: Vec<CertificateDer<'static>>,
}

/// What the services need of the rest.
pub(crate) struct Services {
    pub(crate) authority: Arc<Authority>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) recorder: Recorder,
    pub(crate) registry: watch::Receiver<Arc<View>>,
    pub(crate) bundle: watch::Receiver<Arc<Bundle>>,
    pub(crate) watchers: Arc<Watchers>,
    pub(crate) telemetry: Arc<Telemetry>,
    pub(crate) clock: Clock,
    pub(crate) workload_lifetime: Duration,
    pub(crate) node_lifetime: Duration,
    pub(crate) cancel: CancellationToken,
    slots: Semaphore,
}

impl Services {
    #[expect(
        clippy::too_many_arguments,
        reason = "the one place where the rooms of the authority are put together"
    )]
    pub(crate) fn new(
        config: &Config,
        authority: Arc<Authority>,
        ledger: Arc<Ledger>,
        recorder: Recorder,
        registry: watch::Receiver<Arc<View>>,
        bundle: watch::Receiver<Arc<Bundle>>,
        telemetry: Arc<Telemetry>,
        clock: Clock,
        cancel: CancellationToken,
    ) -> Self {
        Self {
            authority,
            ledger,
            recorder,
            registry,
            bundle,
            watchers: Arc::default(),
            telemetry,
            clock,
            workload_lifetime: config.workload_lifetime,
            node_lifetime: config.node_lifetime,
            cancel,
            slots: Semaphore::new(REQUESTS_MAX),
        }
    }

    fn node(&self, peer: &Peer) -> Result<NodePeer, Refusal> {
        identify::node(peer.leaf.as_deref(), self.authority.trust_domain(), self.clock.now())
    }

    fn slot(&self) -> Result<SemaphorePermit<'_>, Refusal> {
        self.slots.try_acquire().map_err(|_| {
            Refusal::new(Reason::Overloaded, format!("{REQUESTS_MAX} requests are being worked on"))
        })
    }

    async fn join(self: &Arc<Self>, request: JoinRequest, peer: SocketAddr) -> Result<IssuedToNode, Refused> {
        let request = Join::try_from(request).map_err(|error| Refused::stranger(field(&error)))?;
        let _slot = self.slot().map_err(Refused::stranger)?;
        let node = request.node.clone();
        let services = Arc::clone(self);
        // Note and answer are one transaction with a sync of the disk.
        let redeemed = tokio::task::spawn_blocking(move || services.redeem(&request)).await;
        let joined = redeemed.unwrap_or_else(|error| Err(Refusal::new(Reason::NotReady, error.to_string())));
        let Joined { leaf, issuer, issued } = joined.map_err(|refusal| {
            // Every other reason is given only to who showed a secret that is on record.
            let known = refusal.reason != Reason::Stranger;
            Refused { refusal, node: Some(node.clone()), known }
        })?;
        match &issued {
            Some(certificate) => self.telemetry.tell(&Event::Issued { call: "Join", certificate, peer }),
            None => self.telemetry.tell(&Event::Repeated { node: &node, peer }),
        }
        Ok(self.to_node(vec![leaf, issuer]))
    }

    fn redeem(&self, request: &Join) -> Result<Joined, Refusal> {
        let (now, hash) = (self.clock.now(), request.secret.hash());
        let joined = self.ledger.redeem(&hash, |token| {
            // Only a holder of the secret has its request looked at, and learns what is wrong with it.
            let Some(token) = token else {
                return Err(Refusal::new(
                    Reason::Stranger,
                    "token: no such token was made by this authority",
                ));
            };
            let csr = Csr::verify(&request.csr)?;
            let trust_domain = self.authority.trust_domain();
            match authorise::join(&request.node, trust_domain, &hash, token, &csr, self.node_lifetime, now)? {
                Joining::Again => Ok(None),
                Joining::First(grant) => issue(&csr, grant, &self.authority.issuing(), now).map(Some),
            }
        });
        joined.unwrap_or_else(|error| {
            tracing::error!(%error, "a join could not be recorded");
            Err(Refusal::new(Reason::NotReady, "the authority cannot issue at present: the ledger failed"))
        })
    }

    async fn renew(&self, request: RenewRequest, peer: &Peer) -> Result<IssuedToNode, Refused> {
        let caller = self.node(peer).map_err(Refused::stranger)?;
        let refused = |refusal| Refused::node(refusal, &caller);
        let Renew { csr } = Renew::try_from(request).map_err(|error| refused(field(&error)))?;
        let _slot = self.slot().map_err(refused)?;
        let csr = Csr::verify(&csr).map_err(refused)?;
        let grant = authorise::renew(&caller, &csr, self.node_lifetime).map_err(refused)?;
        let certificate = self.issue("Renew", &csr, grant, peer.address).await.map_err(refused)?;
        Ok(self.to_node(vec![certificate.leaf, certificate.issuer]))
    }

    async fn create(&self, request: IstioCertificateRequest, peer: &Peer) -> Result<Issued, Refused> {
        let caller = self.node(peer).map_err(Refused::stranger)?;
        let refused = |refusal| Refused::node(refusal, &caller);
        let request = CreateCertificate::try_from(request).map_err(|error| refused(field(&error)))?;
        let grant = self.authorise(&caller, &request).await.map_err(refused)?;
        let _slot = self.slot().map_err(refused)?;
        let csr = Csr::verify(&request.csr).map_err(refused)?;
        let certificate =
            self.issue("CreateCertificate", &csr, grant, peer.address).await.map_err(refused)?;
        let roots = self.bundle.borrow().roots.clone();
        Ok(Issued { chain: vec![certificate.leaf, certificate.issuer], roots })
    }

    /// Judges by the registry; what it does not know yet, it may know in a moment.
    async fn authorise(&self, caller: &NodePeer, request: &CreateCertificate) -> Result<Grant, Refusal> {
        let mut registry = self.registry.clone();
        let until = tokio::time::Instant::now() + REGISTRY_WAIT;
        loop {
            let view = Arc::clone(&registry.borrow_and_update());
            let refusal = match authorise::workload(
                caller,
                request.identity.as_ref(),
                request.lifetime,
                self.workload_lifetime,
                &view.assignments,
            ) {
                Ok(grant) => return Ok(grant),
                Err(refusal) => refusal,
            };
            let may_change = matches!(refusal.reason, Reason::NodeUnknown | Reason::IdentityNotOnNode);
            if !may_change || !matches!(tokio::time::timeout_at(until, registry.changed()).await, Ok(Ok(())))
            {
                return Err(refusal);
            }
        }
    }

    async fn issue(
        &self,
        call: &'static str,
        csr: &Csr,
        grant: Grant,
        peer: SocketAddr,
    ) -> Result<Certificate, Refusal> {
        let certificate = issue(csr, grant, &self.authority.issuing(), self.clock.now())?;
        self.recorder.record(certificate.clone()).await?;
        self.telemetry.tell(&Event::Issued { call, certificate: &certificate, peer });
        Ok(certificate)
    }

    fn to_node(&self, chain: Vec<CertificateDer<'static>>) -> IssuedToNode {
        let bundle = self.bundle.borrow();
        IssuedToNode { issued: Issued { chain, roots: bundle.roots.clone() }, bundle_version: bundle.version }
    }

    fn refuse(&self, call: &'static str, refused: &Refused, peer: SocketAddr) -> Status {
        let Refused { refusal, node, known } = refused;
        self.telemetry.tell(&Event::Refused { call, node: node.as_ref(), refusal, peer });
        // Load is no secret, and must not be taken for a refusal for good.
        let load = matches!(refusal.reason, Reason::Overloaded | Reason::NotReady);
        if *known || load { refusal.to_status() } else { Refusal::opaque_status() }
    }
}

/// A refusal, and whether its reason may be told.
struct Refused {
    refusal: Refusal,
    node: Option<NodeId>,
    known: bool,
}

impl Refused {
    fn stranger(refusal: Refusal) -> Self {
        // Who presents a certificate of this mesh is no stranger to it, only no node.
        let known = refusal.reason == Reason::NotANode;
        Self { refusal, node: None, known }
    }

    fn node(refusal: Refusal, caller: &NodePeer) -> Self {
        Self { refusal, node: Some(caller.node().clone()), known: true }
    }
}

fn field(error: &InvalidMessage) -> Refusal {
    let reason = match error {
        InvalidMessage::Length { field: "csr", .. } => Reason::CsrTooLarge,
        InvalidMessage::Pem { field: "csr", .. } => Reason::CsrMalformed,
        InvalidMessage::Missing { .. }
        | InvalidMessage::Length { .. }
        | InvalidMessage::Name { .. }
        | InvalidMessage::Pem { .. } => Reason::Field,
    };
    Refusal::new(reason, error.to_string())
}

/// The services as tonic sees them. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Rpc(pub(crate) Arc<Services>);

impl Rpc {
    fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
        let peer = request.extensions().get::<Peer>();
        peer.cloned().ok_or_else(|| Status::internal("a connection without a peer"))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Rpc {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = Self::peer(&request)?;
        match self.0.create(request.into_inner(), &peer).await {
            Ok(issued) => Ok(Response::new((&issued).into())),
            Err(refused) => Err(self.0.refuse("CreateCertificate", &refused, peer.address)),
        }
    }
}

#[tonic::async_trait]
impl NodeAgent for Rpc {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let peer = Self::peer(&request)?;
        match self.0.join(request.into_inner(), peer.address).await {
            Ok(issued) => Ok(Response::new(JoinResponse { certificate: Some((&issued).into()) })),
            Err(refused) => Err(self.0.refuse("Join", &refused, peer.address)),
        }
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let peer = Self::peer(&request)?;
        match self.0.renew(request.into_inner(), &peer).await {
            Ok(issued) => Ok(Response::new(RenewResponse { certificate: Some((&issued).into()) })),
            Err(refused) => Err(self.0.refuse("Renew", &refused, peer.address)),
        }
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let peer = Self::peer(&request)?;
        let services = &self.0;
        let watching = services
            .node(&peer)
            .map_err(Refused::stranger)
            .and_then(|node| services.watchers.enter(&node).map_err(|refusal| Refused::node(refusal, &node)))
            .map_err(|refused| services.refuse("Watch", &refused, peer.address))?;
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        let (bundle, cancel) = (services.bundle.clone(), services.cancel.clone());
        tokio::spawn(watch_on(watching, request.into_inner(), sender, bundle, cancel));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// One Watch stream: the bundle at once and at each change, heartbeats in between, acks noted.
async fn watch_on(
    watching: Watching,
    mut acks: Streaming<WatchRequest>,
    messages: mpsc::Sender<Result<WatchResponse, Status>>,
    mut bundle: watch::Receiver<Arc<Bundle>>,
    cancel: CancellationToken,
) {
    bundle.mark_changed();
    let mut acks_open = true;
    let mut heartbeat = tokio::time::interval(Duration::from_secs(ca_proto::WATCH_HEARTBEAT_SECONDS));
    heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    heartbeat.reset();
    loop {
        let message = tokio::select! {
            () = cancel.cancelled() => return,
            () = messages.closed() => return,
            ack = acks.message(), if acks_open => match ack {
                Ok(Some(ack)) => {
                    // Nobody has put to use what does not exist.
                    watching.acked(ack.acked_version.min(bundle.borrow().version));
                    continue;
                }
                // A client that only listens is served on.
                Ok(None) => {
                    acks_open = false;
                    continue;
                }
                Err(_) => return,
            },
            changed = bundle.changed() => match changed {
                Ok(()) => {
                    let bundle = bundle.borrow_and_update();
                    let roots = bundle.roots.iter().map(|root| root.to_vec()).collect();
                    WatchResponse { version: bundle.version, bundle: roots }
                }
                Err(_) => return,
            },
            _ = heartbeat.tick() => WatchResponse { version: bundle.borrow().version, bundle: Vec::new() },
        };
        if messages.send(Ok(message)).await.is_err() {
            return;
        }
    }
}

/// Which nodes watch, and what they have put to use.
#[derive(Debug, Default)]
pub(crate) struct Watchers(Mutex<BTreeMap<String, NodeState>>);

/// What is known of one watching node.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct NodeState {
    /// Open streams.
    pub(crate) streams: usize,
    /// Highest bundle version that it acknowledged.
    pub(crate) acked_version: u64,
}

impl Watchers {
    /// Every node that watches.
    pub(crate) fn nodes(&self) -> BTreeMap<String, NodeState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn enter(self: &Arc<Self>, node: &NodePeer) -> Result<Watching, Refusal> {
        let mut nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let state = nodes.entry(node.node().name().to_owned()).or_default();
        if state.streams >= WATCHES_PER_NODE_MAX {
            let message = format!("node {:?} has {WATCHES_PER_NODE_MAX} Watch streams", node.node().name());
            return Err(Refusal::new(Reason::Overloaded, message));
        }
        state.streams += 1;
        Ok(Watching { watchers: Arc::clone(self), node: node.node().name().to_owned() })
    }
}

/// One stream's place among the watchers.
struct Watching {
    watchers: Arc<Watchers>,
    node: String,
}

impl Watching {
    fn acked(&self, version: u64) {
        let mut nodes = self.watchers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(state) = nodes.get_mut(&self.node) {
            state.acked_version = state.acked_version.max(version);
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let mut nodes = self.watchers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(state) = nodes.get_mut(&self.node) {
            state.streams -= 1;
            if state.streams == 0 {
                nodes.remove(&self.node);
            }
        }
    }
}
