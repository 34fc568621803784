//! Everything that happens in the daemon and that somebody may want to know of: one enum.

use std::{fmt, net::SocketAddr, sync::Arc, time::Duration, time::SystemTime};

use node_core::{
    policy::{DenialReason, ShadowVerdict},
    workload::ObjectName,
};
use spiffe_id::SpiffeId;

use super::metrics::RequestCounts;

/// Something that happened. No key material, no token, no payload, in any field.
#[derive(Clone, Debug)]
pub enum Event {
    /// The daemon runs, and with which effective configuration (without secrets, one line of JSON).
    DaemonStarting { node: String, version: &'static str, configuration: String },
    /// Readiness changed; `missing` says what is lacking, empty when ready.
    Readiness { ready: bool, missing: Vec<String> },
    /// New connections are left to a successor, those that stand go on for at most `seconds`.
    DaemonDraining { cause: &'static str, seconds: u64 },
    /// The last event of a process.
    DaemonStopped { cause: &'static str },

    /// A workload is under capture.
    WorkloadEnrolled { workload: ObjectName, identity: SpiffeId },
    /// A workload stays outside, and closed if it was captured before; `reason` is a bounded label.
    WorkloadRefused { workload: ObjectName, reason: &'static str, problem: String },
    /// A workload is no longer under capture.
    WorkloadLeft { workload: ObjectName, cause: &'static str },
    /// Rules, routes or settings of a workload's namespace had been changed by somebody and stand again (T-5).
    WorkloadRepaired { workload: ObjectName, what: &'static str },
    /// Connections from before their workload was enrolled: `destroyed` were ended since the last such event, `remaining`
    /// stand at present (T-25).
    UnmeshedConnections { workload: ObjectName, destroyed: usize, remaining: usize },

    /// The authority accepted this node.
    NodeJoined { node: String },
    /// The authority could not be reached or refused; tried again after `retry`.
    AuthorityFailed { call: &'static str, problem: String, retry: Duration },
    /// The files that a rule names were read, for the first time or anew; what is spoken next uses them (T-20).
    RuleFilesRead { rule: String },
    /// The trust bundle was replaced.
    TrustChanged { roots: usize },
    /// A certificate is there. `identity` may be the node's own name.
    CertificateIssued { identity: String, serial: String, not_after: SystemTime, generation: u64 },
    /// A certificate could not be renewed; the old one serves on while it lasts.
    CertificateRenewalFailed { identity: String, failures: u32, problem: String, retry: Duration },
    /// A certificate ran out before a new one came.
    CertificateExpired { identity: String },
    /// No certificate for this identity is wanted any more.
    CertificateDropped { identity: String },

    /// A new view of workloads and policy is in force.
    SnapshotPublished { number: u64, local: usize, problems: usize },
    /// A document, or a part of it, is not used; what worked before goes on.
    DocumentRefused { file: String, object: String, field: String, problem: String },
    /// A file could not be read as documents; `effect` says what is used in its place (T-19).
    FileUnreadable { file: String, problem: String, effect: &'static str },

    /// The kernel's half failed at something; `call` says at what.
    KernelFailed { call: &'static str, problem: String },
    /// Whether connections inside the node may go by the kernel alone; `problem` says why not.
    DirectPath { on: bool, problem: Option<String> },
    /// Direct connections of a pod take no shortcut past the host's network stack, and work without; `problem` says why.
    ShortcutOff { workload: ObjectName, problem: String },
    /// A listener could not accept; it is tried again.
    AcceptFailed { workload: ObjectName, listener: &'static str, problem: String },
    /// A named limit was reached; its constant says what happens then. `limit` is the constant's name in lower case.
    LimitReached { limit: &'static str, workload: Option<ObjectName> },

    /// The audit log is open; its newest record has this number. `torn_bytes` of a line that a crash cut were removed, and
    /// where it was not `clean`, the run before did not end in order.
    AuditOpened { folder: String, sequence: u64, torn_bytes: u64, clean: bool },
    /// The audit log is signed up to this record; whoever keeps number and digest elsewhere can tell whether it was cut off.
    AuditCheckpoint { sequence: u64, digest: String, segment: u64 },
    /// So many decisions found no place in the audit log's queue. The log says so too.
    AuditLost { records: u64 },
    /// The audit log could not be written or signed; tried again. `effect` says what happens meanwhile.
    AuditFailed { call: &'static str, problem: String, effect: &'static str },

    /// A connection was admitted and its first byte may flow.
    ConnectionOpened(Arc<Ends>),
    /// A connection is over, or never came to be. The access log's line.
    ConnectionEnded(Box<ConnectionRecord>),
    /// One request of a connection that is judged by requests is answered, or was refused. A line of the access log.
    RequestEnded(Box<RequestRecord>),
}

/// Which way a connection goes, seen from the workload of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Inbound,
    Outbound,
}

impl Direction {
    pub const fn label(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// By which way the bytes went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Path {
    /// HBONE over mutual TLS.
    Tunnel,
    /// To or from outside the mesh, unchanged; or as a rule of the client's side says, past the tunnel.
    Passthrough,
    /// Inbound: on the workload's own port, plaintext under PERMISSIVE, mesh TLS, or a local process. Outbound: to a workload
    /// of the same node, without TLS.
    Relay,
    /// The kernel alone.
    Direct,
}

impl Path {
    pub const fn label(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Passthrough => "passthrough",
            Self::Relay => "relay",
            Self::Direct => "direct",
        }
    }
}

/// One end of a connection, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    pub address: Option<SocketAddr>,
    pub workload: Option<ObjectName>,
    /// Proven, or that which the mesh expects of the workload; never a guess from a stranger's address.
    pub identity: Option<SpiffeId>,
    pub node: Option<Arc<str>>,
}

/// Who talks to whom, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Number of this connection, unique within the process.
    pub connection: u64,
    pub direction: Direction,
    pub path: Path,
    pub source: Endpoint,
    pub destination: Endpoint,
    /// The service that was asked for, if any.
    pub service: Option<ObjectName>,
    /// `tcp`, or what the port declares.
    pub protocol: &'static str,
    /// True where both ends were authenticated by certificates.
    pub mutual_tls: bool,
}

impl Ends {
    /// Whether both ends are workloads of this node and this daemon tells of both: with one line, for two reporters.
    pub fn is_within_node(&self) -> bool {
        match self.path {
            Path::Direct => true,
            Path::Relay => self.direction == Direction::Outbound,
            Path::Tunnel | Path::Passthrough => false,
        }
    }
}

/// One connection at its end.
#[derive(Clone, Debug)]
pub struct ConnectionRecord {
    pub ends: Arc<Ends>,
    /// True where [`Event::ConnectionOpened`] was emitted for it.
    pub opened: bool,
    pub verdict: Verdict,
    /// Deciding object and rule, from the policy's verdict.
    pub policy: Option<Arc<str>>,
    pub rule: Option<Arc<str>>,
    /// Why it was denied, failed, or ended otherwise than by both ends closing.
    pub reason: Option<Reason>,
    /// Details of `reason` for people, such as an error of the operating system.
    pub detail: Option<String>,
    /// What the answer would be if everything were enforced that is only tried; `None`: nothing is.
    pub shadow: Option<Shadow>,
    /// The AUDIT policy that records it.
    pub audit: Option<Arc<str>>,
    pub tls: Option<Tls>,
    /// From the client to the server.
    pub bytes_in: u64,
    /// From the server to the client.
    pub bytes_out: u64,
    pub duration: Duration,
    /// Number of the snapshot by which it was judged last.
    pub snapshot: u64,
}

/// One request at its end.
#[derive(Clone, Debug)]
pub struct RequestRecord {
    pub ends: Arc<Ends>,
    /// Where requests of this connection are counted.
    pub counts: Arc<RequestCounts>,
    /// `http/1.0`, `http/1.1` or `http/2`, or `grpc`.
    pub protocol: &'static str,
    pub method: http::Method,
    /// As it was judged, or where it could not be, as it was sent. The query is never shown.
    pub path: Option<http::uri::PathAndQuery>,
    /// The authority, port included: rules may ask for it (policy B-5). `None` also where the head was not read.
    pub host: Option<String>,
    pub status: u16,
    pub verdict: Verdict,
    pub policy: Option<Arc<str>>,
    pub rule: Option<Arc<str>>,
    pub reason: Option<Reason>,
    /// Details of `reason`, such as why a token did not count.
    pub detail: Option<&'static str>,
    /// What the answer would be if everything were enforced that is only tried; `None`: nothing is.
    pub shadow: Option<Shadow>,
    /// The AUDIT policy that records it.
    pub audit: Option<Arc<str>>,
    pub duration: Duration,
    /// Number of the snapshot by which it was judged last.
    pub snapshot: u64,
}

/// A would-be verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shadow {
    pub verdict: Verdict,
    pub policy: Option<Arc<str>>,
    pub rule: Option<Arc<str>>,
}

impl From<ShadowVerdict> for Shadow {
    fn from(shadow: ShadowVerdict) -> Self {
        let ShadowVerdict { allowed, policy, rule } = shadow;
        Self { verdict: if allowed { Verdict::Allowed } else { Verdict::Denied }, policy, rule }
    }
}

/// How it went for a connection or request as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    Allowed,
    /// The answer was no, at the start or by a later snapshot.
    Denied,
    /// Nobody said no, but it did not come about.
    Failed,
}

impl Verdict {
    pub const fn label(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Denied => "denied",
            Self::Failed => "failed",
        }
    }
}

/// What was negotiated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Such as `TLSv1.3`.
    pub version: &'static str,
    /// Such as `X25519MLKEM768`.
    pub group: String,
    /// Such as `TLS13_AES_256_GCM_SHA384`.
    pub cipher: String,
    /// What the client called the server, where it did so within mesh TLS: rules may ask for it (policy B-6).
    pub server_name: Option<String>,
}

/// Why a connection was denied, failed or cut short. [`Reason::label`] is the access log's `reason` and the metric's
/// label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The policy of this node's workload.
    Policy(DenialReason),
    /// There is nowhere to go.
    Route(RouteReason),
    /// The peer's certificate.
    Handshake(HandshakeRefusal),
    /// `:authority` is not an address and port of the workload (T-8).
    BadAuthority,
    /// The peer's daemon answered 400.
    PeerBadAuthority,
    /// The peer's daemon answered 403.
    PeerDenied,
    /// No certificate came within the hold time.
    HoldCertificate,
    /// Nobody came to know the address within the hold time.
    HoldUnknownAddress,
    /// The peer's daemon did not answer within the hold time (T-4).
    DeadPeer,
    /// The workload, or the server outside, does not listen there.
    NothingListening,
    /// The original target is loopback or the listener itself (T-6).
    Loop,
    /// The client is none of the workload's own addresses, or its cgroup is nobody's (T-27).
    NotAttested,
    /// A named limit was reached (T-11).
    Limit,
    /// The other end spoke something that is not the protocol, or has two readings.
    Protocol,
    /// The client reset the connection.
    ClientReset,
    /// The server reset the connection.
    ServerReset,
    /// A direct connection was reset by one of its ends, or given up: the kernel does not say by which.
    Aborted,
    /// The tunnel beneath it broke.
    TunnelLost,
    /// The daemon drained for its full time.
    Drained,
    /// The port is judged by requests where it was not, or the other way round.
    Rejudged,
    /// The workload left the mesh.
    WorkloadLeft,
    /// The audit log takes no records, and what is not recorded is denied.
    AuditUnavailable,
    /// A call of the operating system failed.
    System,
}

/// Why no way leads to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteReason {
    NoEndpoints,
    NoSuchServicePort,
    /// No identity may run the service, so nobody may answer for it.
    SecureNamingEmpty,
    OwnAddress,
    /// A rule of the client's side cannot be used (T-20).
    ClientRule,
}

/// What is wrong with a peer's proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HandshakeRefusal {
    OtherCa,
    NoUriSan,
    TwoUriSans,
    TrustDomain,
    /// The name of a node, of the authority, or of nothing that the mesh knows (T-10).
    NotAWorkload,
    /// The right authority, but an identity that may not run the service.
    SecureNaming,
    CertificateExpired,
    /// It presented none.
    NoCertificate,
    /// Not finished in time.
    TimedOut,
    /// Anything else: no TLS, no common version, group or protocol.
    Tls,
}

impl HandshakeRefusal {
    pub const ALL: [Self; 10] = [
        Self::OtherCa,
        Self::NoUriSan,
        Self::TwoUriSans,
        Self::TrustDomain,
        Self::NotAWorkload,
        Self::SecureNaming,
        Self::CertificateExpired,
        Self::NoCertificate,
        Self::TimedOut,
        Self::Tls,
    ];

    pub const fn label(self) -> &'static str {
        match self {
            Self::OtherCa => "other_ca",
            Self::NoUriSan => "no_uri_san",
            Self::TwoUriSans => "two_uri_sans",
            Self::TrustDomain => "trust_domain",
            Self::NotAWorkload => "not_a_workload",
            Self::SecureNaming => "secure_naming",
            Self::CertificateExpired => "certificate_expired",
            Self::NoCertificate => "no_certificate",
            Self::TimedOut => "handshake_timed_out",
            Self::Tls => "tls",
        }
    }
}

impl RouteReason {
    pub const ALL: [Self; 5] = [
        Self::NoEndpoints,
        Self::NoSuchServicePort,
        Self::SecureNamingEmpty,
        Self::OwnAddress,
        Self::ClientRule,
    ];

    pub const fn label(self) -> &'static str {
        match self {
            Self::NoEndpoints => "no_endpoints",
            Self::NoSuchServicePort => "no_such_service_port",
            Self::SecureNamingEmpty => "secure_naming_empty",
            Self::OwnAddress => "own_address",
            Self::ClientRule => "client_rule",
        }
    }
}

impl Reason {
    pub const fn label(self) -> &'static str {
        match self {
            Self::Policy(reason) => reason.label(),
            Self::Route(reason) => reason.label(),
            Self::Handshake(refusal) => refusal.label(),
            Self::BadAuthority => "bad_authority",
            Self::PeerBadAuthority => "peer_bad_authority",
            Self::PeerDenied => "peer_denied",
            Self::HoldCertificate => "hold_certificate",
            Self::HoldUnknownAddress => "hold_unknown_address",
            Self::DeadPeer => "dead_peer",
            Self::NothingListening => "nothing_listening",
            Self::Loop => "loop",
            Self::NotAttested => "not_attested",
            Self::Limit => "limit",
            Self::Protocol => "protocol",
            Self::ClientReset => "client_reset",
            Self::ServerReset => "server_reset",
            Self::Aborted => "aborted",
            Self::TunnelLost => "tunnel_lost",
            Self::Drained => "drained",
            Self::Rejudged => "rejudged",
            Self::WorkloadLeft => "workload_left",
            Self::AuditUnavailable => "audit_unavailable",
            Self::System => "system",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.label())
    }
}
