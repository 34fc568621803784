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
    slots: Slots,
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
            slots: Slots::new(REQUESTS_MAX),
        }
    }

    fn node(&self, peer: &Peer) -> Result<NodePeer, Refusal> {
        identify::node(peer.leaf.as_deref(), self.authority.trust_domain(), self.clock.now())
    }

    async fn join(self: &Arc<Self>, request: JoinRequest, peer: SocketAddr) -> Result<IssuedToNode, Refused> {
        let request = Join::try_from(request).map_err(|error| Refused::stranger(field(&error)))?;
        let _slot = self.slots.take().map_err(Refused::stranger)?;
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
        let _slot = self.slots.take().map_err(refused)?;
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
        let _slot = self.slots.take().map_err(refused)?;
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

/// Places for requests that are worked on at once.
struct Slots {
    free: Semaphore,
    requests_max: usize,
}

impl Slots {
    fn new(requests_max: usize) -> Self {
        Self { free: Semaphore::new(requests_max), requests_max }
    }

    /// A place until the end of the request.
    fn take(&self) -> Result<SemaphorePermit<'_>, Refusal> {
        self.free.try_acquire().map_err(|_| {
            Refusal::new(Reason::Overloaded, format!("{} requests are being worked on", self.requests_max))
        })
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

#[cfg(test)]
mod tests {
    use rcgen::KeyPair;
    use tonic::Code;

    use super::*;
    use crate::keys::tests::World;
    use crate::registry;

    const REGISTRY: &str = "apiVersion: culvert.io/v1alpha1\nkind: Workload\nmetadata: {name: a-0, namespace: shop}\n\
                            spec: {serviceAccount: cart, node: node-a}\n";

    /// The services without sockets: calls are made as tonic makes them.
    struct Called {
        world: World,
        rpc: Rpc,
        _publish: watch::Sender<Arc<Bundle>>,
        folder: std::path::PathBuf,
    }

    impl Called {
        fn new(name: &str, requests_max: usize) -> Self {
            let clock = Clock::system();
            let world = World::new(name, clock.now());
            let folder = std::env::temp_dir().join(format!("culvert-ca-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&folder).expect("made");
            std::fs::write(folder.join("all.yaml"), REGISTRY).expect("written");
            let config = Config {
                trust_domain: world.authority.trust_domain().clone(),
                listen: ([127, 0, 0, 1], 0).into(),
                state: folder.clone(),
                admin_socket: folder.join("ca.sock"),
                registry: folder.clone(),
                workload_lifetime: Duration::from_secs(60),
                node_lifetime: Duration::from_secs(60),
                init_new_root: false,
            };
            let bundle = Bundle { version: 1, roots: vec![world.authority.root().clone()] };
            let (publish, bundle) = watch::channel(Arc::new(bundle));
            let cancel = CancellationToken::new();
            let mut services = Services::new(
                &config,
                Arc::clone(&world.authority),
                Arc::clone(&world.ledger),
                Recorder::start(Arc::clone(&world.ledger)).expect("a thread"),
                registry::start(&folder, cancel.clone()).expect("readable"),
                bundle,
                Arc::default(),
                clock,
                cancel,
            );
            services.slots = Slots::new(requests_max);
            Self { world, rpc: Rpc(Arc::new(services)), _publish: publish, folder }
        }

        /// A request on a connection of node-a.
        fn request<T>(&self, message: T) -> Request<T> {
            let mut request = Request::new(message);
            request
                .extensions_mut()
                .insert(Peer { address: ([127, 0, 0, 1], 1).into(), leaf: Some(self.leaf()) });
            request
        }

        fn leaf(&self) -> Arc<CertificateDer<'static>> {
            let (services, now) = (&self.rpc.0, self.rpc.0.clock.now());
            let name: NodeId = "spiffe://cluster.local/culvert/node/node-a".parse().expect("a name");
            let hash = [1; 32];
            let token = crate::ledger::TokenRecord {
                secret_hash: hash,
                node: name.name().to_owned(),
                expires: now.plus(60),
                used: None,
            };
            let csr = Csr::verify(&csr()).expect("a good one");
            let domain = self.world.authority.trust_domain();
            let joining = authorise::join(&name, domain, &hash, &token, &csr, services.node_lifetime, now);
            let Joining::First(grant) = joining.expect("granted") else { panic!("the token is fresh") };
            Arc::new(issue(&csr, grant, &self.world.authority.issuing(), now).expect("issued").leaf)
        }

        fn counter(&self, name: &str) -> u64 {
            self.rpc.0.telemetry.counters().get(name).copied().unwrap_or(0)
        }
    }

    impl Drop for Called {
        fn drop(&mut self) {
            self.rpc.0.cancel.cancel();
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    /// Acknowledgements of a node that sends none.
    struct NoAcks;

    impl tonic::codec::Decoder for NoAcks {
        type Item = WatchRequest;
        type Error = Status;

        fn decode(&mut self, _: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<WatchRequest>, Status> {
            Ok(None)
        }
    }

    fn csr() -> ca_proto::convert::CsrDer {
        let key = KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let der = params.serialize_request(&key).expect("a request").der().to_vec();
        ca_proto::convert::CsrDer::from_der(der).expect("small")
    }

    fn ask_for(account: &str) -> IstioCertificateRequest {
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().expect("a name");
        let pem = ca_proto::convert::certificate_pem(csr().as_bytes());
        CreateCertificate::request(&identity, pem.replace("CERTIFICATE", "CERTIFICATE REQUEST"), None)
    }

    #[tokio::test]
    async fn requests_above_the_limit_are_refused_as_overload_and_counted() {
        let called = Called::new("requests", 1);
        let busy = called.rpc.0.slots.take().expect("within the limit");
        let join = JoinRequest {
            token: vec![1; 32],
            node: "spiffe://cluster.local/culvert/node/node-a".into(),
            csr: csr().as_bytes().to_vec(),
        };
        let renew = RenewRequest { csr: csr().as_bytes().to_vec() };
        for (call, refused) in [
            ("CreateCertificate", called.rpc.create_certificate(called.request(ask_for("cart"))).await.err()),
            ("Join", called.rpc.join(called.request(join)).await.err()),
            ("Renew", called.rpc.renew(called.request(renew)).await.err()),
        ] {
            let status = refused.unwrap_or_else(|| panic!("{call} is refused"));
            assert_eq!(
                (status.code(), status.message()),
                (Code::ResourceExhausted, "1 requests are being worked on"),
                "{call}: clients try again"
            );
            assert_eq!(called.counter(&format!("refused_total{{call=\"{call}\",reason=\"OVERLOADED\"}}")), 1);
        }
        drop(busy);
        called.rpc.create_certificate(called.request(ask_for("cart"))).await.expect("there is room again");
    }

    #[tokio::test]
    async fn what_the_registry_does_not_say_within_a_second_is_refused() {
        let called = Called::new("wait", 1);
        let request = called.request(ask_for("nobody"));
        tokio::time::pause();
        let before = tokio::time::Instant::now();
        let status = called.rpc.create_certificate(request).await.expect_err("refused");
        assert_eq!(
            (status.code(), before.elapsed().as_secs()),
            (Code::PermissionDenied, REGISTRY_WAIT.as_secs())
        );
        assert_eq!(
            called.counter("refused_total{call=\"CreateCertificate\",reason=\"IDENTITY_NOT_ON_NODE\"}"),
            1
        );
    }

    #[tokio::test]
    async fn a_node_that_does_not_read_finds_the_queue_and_no_more() {
        let called = Called::new("unread", 1);
        let silence = Streaming::new_request(NoAcks, tonic::body::Body::empty(), None, None);
        let request = called.request(silence);
        tokio::time::pause();
        let mut stream = called.rpc.watch(request).await.expect("watches").into_inner();
        // Twenty heartbeats are due, and nobody reads.
        tokio::time::sleep(Duration::from_secs(20 * ca_proto::WATCH_HEARTBEAT_SECONDS)).await;
        let (now, mut found) = (tokio::time::Instant::now(), 0);
        loop {
            tokio_stream::StreamExt::next(&mut stream).await.expect("it lives").expect("in order");
            if tokio::time::Instant::now() > now {
                break;
            }
            found += 1;
        }
        // The queue, the one that waited for room in it, and the one that was overdue behind that.
        assert_eq!(found, WATCH_QUEUE + 2);
    }
}
