//! The counters behind `/metrics`, each fed by one kind of event.
//!
//! Names and labels of the `istio_` ones are Istio's standard metrics; those of our own begin with `culvert_`.

use std::{
    collections::BTreeMap,
    fmt,
    hash::Hash,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use ebpf_abi::reason::{DropReason, Verdict as KernelVerdict};
use node_core::workload::ObjectName;
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use spiffe_id::SpiffeId;

use super::event::{ConnectionRecord, Direction, Endpoint, Ends, Event, RequestRecord, Shadow, Verdict};

/// Label sets of one metric: 500 workloads of a node with 8 peers each. Beyond it, what is new is counted under
/// [`OTHER`] in every label, and [`LABEL_SETS_LIMIT`] is counted.
pub const LABEL_SETS_MAX: usize = 4_096;

/// Name of the limit [`LABEL_SETS_MAX`].
pub const LABEL_SETS_LIMIT: &str = "label_sets";

/// The value of every label beyond [`LABEL_SETS_MAX`].
pub const OTHER: &str = "other";

/// The value of a label that is not known, as in Istio.
const UNKNOWN: &str = "unknown";

/// All metrics of a daemon.
pub struct Metrics {
    registry: Registry,
    opened: Bounded<ConnectionLabels, Counter>,
    closed: Bounded<ConnectionLabels, Counter>,
    sent_bytes: Family<ConnectionLabels, Counter>,
    received_bytes: Family<ConnectionLabels, Counter>,
    requests: Bounded<RequestLabels, Counter>,
    denials: Family<DenialLabels, Counter>,
    shadow_verdicts: Family<VerdictLabels, Counter>,
    kernel_drops: Family<ReasonLabels, Counter<u64, AtomicU64>>,
    kernel_verdicts: Family<VerdictLabels, Counter<u64, AtomicU64>>,
    unmeshed: Gauge,
    /// By workload, where there are any.
    unmeshed_by_workload: Mutex<BTreeMap<ObjectName, usize>>,
    certificate_expiry: Bounded<IdentityLabels, Gauge>,
    certificates_issued: Counter,
    certificate_failures: Counter,
    authority_failures: Counter,
    limits: Family<LimitLabels, Counter>,
    enrolled: Gauge,
    refusals: Family<ReasonLabels, Counter>,
    repairs: Counter,
    snapshot: Gauge,
    document_problems: Gauge,
    documents_refused: Counter,
    kernel_failures: Counter,
    accept_failures: Counter,
    direct_path: Gauge,
    audit_checkpoint: Gauge,
    audit_lost: Counter,
    audit_failures: Counter,
    ready: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectionLabels {
    reporter: &'static str,
    source_workload: String,
    source_workload_namespace: String,
    source_principal: String,
    destination_workload: String,
    destination_workload_namespace: String,
    destination_principal: String,
    destination_service: String,
    destination_service_name: String,
    destination_service_namespace: String,
    request_protocol: &'static str,
    connection_security_policy: &'static str,
    /// Ours, beside Istio's: by which way the bytes went.
    path: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    #[prometheus(flatten)]
    connection: ConnectionLabels,
    response_code: u32,
}

/// The counters of one connection's requests, looked up once for each status: a request costs no label.
#[derive(Debug)]
pub struct RequestCounts {
    labels: Vec<ConnectionLabels>,
    by_status: Mutex<Vec<(u16, &'static str, Vec<Counter>)>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DenialLabels {
    direction: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabels {
    verdict: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IdentityLabels {
    identity: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabels {
    limit: &'static str,
}

impl Metrics {
    /// The text of `/metrics` (OpenMetrics 1.0).
    ///
    /// # Errors
    /// Only a formatter that refuses to take text.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// Takes over what the kernel counted since its maps were made, by the labels of [`DropReason`] and
    /// [`KernelVerdict`].
    pub fn set_kernel_counters(&self, counters: &[(&'static str, u64)]) {
        for (label, total) in counters.iter().copied() {
            if DropReason::ALL.iter().any(|reason| reason.label() == label) {
                let labels = ReasonLabels { reason: label };
                self.kernel_drops.get_or_create(&labels).inner().store(total, Ordering::Relaxed);
            } else if KernelVerdict::ALL.iter().any(|verdict| verdict.label() == label) {
                let labels = VerdictLabels { verdict: label };
                self.kernel_verdicts.get_or_create(&labels).inner().store(total, Ordering::Relaxed);
            }
        }
    }

    /// Counts one event; the name of the limit that it met, if it met one.
    pub(super) fn count(&self, event: &Event) -> Option<&'static str> {
        match event {
            Event::ConnectionOpened(ends) => return self.count_opened(ends),
            Event::ConnectionEnded(record) => return self.count_ended(record),
            Event::RequestEnded(record) => return self.count_request(record),
            Event::WorkloadEnrolled { .. } => {
                self.enrolled.inc();
            }
            Event::WorkloadLeft { workload, .. } => {
                self.enrolled.dec();
                self.set_unmeshed(workload, 0);
            }
            Event::WorkloadRefused { reason, .. } => {
                self.refusals.get_or_create(&ReasonLabels { reason }).inc();
            }
            Event::WorkloadRepaired { .. } => {
                self.repairs.inc();
            }
            Event::UnmeshedConnections { workload, remaining, .. } => self.set_unmeshed(workload, *remaining),
            Event::CertificateIssued { identity, not_after, .. } => {
                self.certificates_issued.inc();
                return self.set_expiry(identity, *not_after);
            }
            Event::CertificateDropped { identity } => {
                self.certificate_expiry.forget(&IdentityLabels { identity: identity.clone() });
            }
            Event::CertificateRenewalFailed { .. } => {
                self.certificate_failures.inc();
            }
            Event::AuthorityFailed { .. } => {
                self.authority_failures.inc();
            }
            Event::LimitReached { limit, .. } => {
                self.limits.get_or_create(&LimitLabels { limit }).inc();
            }
            Event::SnapshotPublished { number, problems, .. } => {
                self.snapshot.set(i64::try_from(*number).unwrap_or(i64::MAX));
                self.document_problems.set(i64::try_from(*problems).unwrap_or(i64::MAX));
            }
            Event::DocumentRefused { .. } | Event::FileUnreadable { .. } => {
                self.documents_refused.inc();
            }
            Event::KernelFailed { .. } => {
                self.kernel_failures.inc();
            }
            Event::DirectPath { on, .. } => {
                self.direct_path.set(i64::from(*on));
            }
            Event::AcceptFailed { .. } => {
                self.accept_failures.inc();
            }
            Event::Readiness { ready, .. } => {
                self.ready.set(i64::from(*ready));
            }
            Event::DaemonStopped { .. } => {
                self.ready.set(0);
            }
            Event::AuditCheckpoint { sequence, .. } => {
                self.audit_checkpoint.set(i64::try_from(*sequence).unwrap_or(i64::MAX));
            }
            Event::AuditLost { records } => {
                self.audit_lost.inc_by(*records);
            }
            Event::AuditFailed { .. } => {
                self.audit_failures.inc();
            }
            Event::DaemonStarting { .. }
            | Event::AuditOpened { .. }
            | Event::DaemonDraining { .. }
            | Event::NodeJoined { .. }
            | Event::ShortcutOff { .. }
            | Event::RuleFilesRead { .. }
            | Event::TrustChanged { .. }
            | Event::CertificateExpired { .. } => {}
        }
        None
    }

    fn count_opened(&self, ends: &Ends) -> Option<&'static str> {
        let mut met = None;
        for labels in ConnectionLabels::of(ends) {
            let (labels, limit) = self.opened.admit(labels, ConnectionLabels::other);
            self.opened.family.get_or_create(&labels).inc();
            met = met.or(limit);
        }
        met
    }

    /// What the answer would be if everything were enforced that is only tried (policy B-11, F-3).
    fn count_shadow(&self, shadow: Option<&Shadow>) {
        if let Some(shadow) = shadow {
            self.shadow_verdicts.get_or_create(&VerdictLabels { verdict: shadow.verdict.label() }).inc();
        }
    }

    fn count_ended(&self, record: &ConnectionRecord) -> Option<&'static str> {
        self.count_shadow(record.shadow.as_ref());
        if let Some(reason) = record.reason.filter(|_| record.verdict != Verdict::Allowed) {
            let labels = DenialLabels { direction: record.ends.direction.label(), reason: reason.label() };
            self.denials.get_or_create(&labels).inc();
        }
        if !record.opened {
            return None;
        }
        let mut met = None;
        for labels in ConnectionLabels::of(&record.ends) {
            let (labels, limit) = self.closed.admit(labels, ConnectionLabels::other);
            self.closed.family.get_or_create(&labels).inc();
            self.received_bytes.get_or_create(&labels).inc_by(record.bytes_in);
            self.sent_bytes.get_or_create(&labels).inc_by(record.bytes_out);
            met = met.or(limit);
        }
        met
    }

    fn count_request(&self, record: &RequestRecord) -> Option<&'static str> {
        self.count_shadow(record.shadow.as_ref());
        if let Some(reason) = record.reason.filter(|_| record.verdict != Verdict::Allowed) {
            let labels = DenialLabels { direction: record.ends.direction.label(), reason: reason.label() };
            self.denials.get_or_create(&labels).inc();
        }
        let counts = &record.counts;
        let mut by_status = counts.by_status.lock().unwrap_or_else(PoisonError::into_inner);
        // As in Istio, whichever the version.
        let protocol = if record.protocol == "grpc" { "grpc" } else { "http" };
        let is_same = |known: &&(u16, &str, Vec<Counter>)| known.0 == record.status && known.1 == protocol;
        if let Some((_, _, counters)) = by_status.iter().find(is_same) {
            counters.iter().for_each(|counter| {
                counter.inc();
            });
            return None;
        }
        let other = |labels: RequestLabels| RequestLabels { connection: labels.connection.other(), ..labels };
        let (mut met, mut counters) = (None, Vec::new());
        for labels in &counts.labels {
            let connection = ConnectionLabels { request_protocol: protocol, ..labels.clone() };
            let labels = RequestLabels { connection, response_code: record.status.into() };
            let (labels, limit) = self.requests.admit(labels, other);
            let counter = self.requests.family.get_or_create(&labels).clone();
            counter.inc();
            counters.push(counter);
            met = met.or(limit);
        }
        by_status.push((record.status, protocol, counters));
        met
    }

    fn set_unmeshed(&self, workload: &ObjectName, remaining: usize) {
        let mut by_workload = self.unmeshed_by_workload.lock().unwrap_or_else(PoisonError::into_inner);
        if remaining == 0 {
            by_workload.remove(workload);
        } else {
            by_workload.insert(workload.clone(), remaining);
        }
        let all: usize = by_workload.values().sum();
        self.unmeshed.set(i64::try_from(all).unwrap_or(i64::MAX));
    }

    fn set_expiry(&self, identity: &str, not_after: SystemTime) -> Option<&'static str> {
        let seconds = not_after.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let other = |_: IdentityLabels| IdentityLabels { identity: OTHER.to_owned() };
        let (labels, limit) =
            self.certificate_expiry.admit(IdentityLabels { identity: identity.to_owned() }, other);
        self.certificate_expiry.family.get_or_create(&labels).set(i64::try_from(seconds).unwrap_or(i64::MAX));
        limit
    }
}

/// A family that stops at [`LABEL_SETS_MAX`] label sets.
#[derive(Clone)]
struct Bounded<L, M> {
    family: Family<L, M>,
    sets: Arc<AtomicUsize>,
}

impl<L: Clone + Hash + Eq, M: Default> Default for Bounded<L, M> {
    fn default() -> Self {
        Self { family: Family::default(), sets: Arc::default() }
    }
}

impl<L, M> Bounded<L, M>
where
    L: Clone + Hash + Eq,
    M: Clone + Default,
{
    /// `labels` if they are counted already or may still be, else `other`, and then the limit's name. Two threads that
    /// meet at the limit may pass it by one.
    fn admit(&self, labels: L, other: impl FnOnce(L) -> L) -> (L, Option<&'static str>) {
        if self.family.get(&labels).is_some() {
            return (labels, None);
        }
        if self.sets.load(Ordering::Relaxed) >= LABEL_SETS_MAX {
            return (other(labels), Some(LABEL_SETS_LIMIT));
        }
        self.sets.fetch_add(1, Ordering::Relaxed);
        drop(self.family.get_or_create(&labels));
        (labels, None)
    }

    fn forget(&self, labels: &L) {
        if self.family.remove(labels) {
            self.sets.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl RequestCounts {
    pub fn new(ends: &Ends) -> Self {
        Self { labels: ConnectionLabels::of(ends), by_status: Mutex::default() }
    }
}

impl ConnectionLabels {
    /// Once for each end of which this daemon is the reporter.
    fn of(ends: &Ends) -> Vec<Self> {
        let reporters: &[&str] = match ends.direction {
            _ if ends.is_within_node() => &["source", "destination"],
            Direction::Inbound => &["destination"],
            Direction::Outbound => &["source"],
        };
        reporters.iter().map(|reporter| Self::reported(ends, reporter)).collect()
    }

    fn reported(ends: &Ends, reporter: &'static str) -> Self {
        let service = ends.service.as_ref();
        Self {
            reporter,
            source_workload: name(ends.source.workload.as_ref()),
            source_workload_namespace: namespace(ends.source.workload.as_ref()),
            source_principal: principal(&ends.source),
            destination_workload: name(ends.destination.workload.as_ref()),
            destination_workload_namespace: namespace(ends.destination.workload.as_ref()),
            destination_principal: principal(&ends.destination),
            destination_service: service.map_or_else(
                || UNKNOWN.to_owned(),
                |service| format!("{}.{}.svc.cluster.local", service.name, service.namespace),
            ),
            destination_service_name: name(service),
            destination_service_namespace: namespace(service),
            request_protocol: "tcp",
            connection_security_policy: if ends.mutual_tls { "mutual_tls" } else { "none" },
            path: ends.path.label(),
        }
    }

    fn other(self) -> Self {
        let other = || OTHER.to_owned();
        Self {
            source_workload: other(),
            source_workload_namespace: other(),
            source_principal: other(),
            destination_workload: other(),
            destination_workload_namespace: other(),
            destination_principal: other(),
            destination_service: other(),
            destination_service_name: other(),
            destination_service_namespace: other(),
            ..self
        }
    }
}

fn name(object: Option<&ObjectName>) -> String {
    object.map_or(UNKNOWN, |object| &object.name).to_owned()
}

fn namespace(object: Option<&ObjectName>) -> String {
    object.map_or(UNKNOWN, |object| &object.namespace).to_owned()
}

fn principal(endpoint: &Endpoint) -> String {
    endpoint.identity.as_ref().map_or_else(|| UNKNOWN.to_owned(), SpiffeId::to_string)
}

impl fmt::Debug for Metrics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut all = Self {
            registry: Registry::default(),
            opened: Bounded::default(),
            closed: Bounded::default(),
            sent_bytes: Family::default(),
            received_bytes: Family::default(),
            requests: Bounded::default(),
            denials: Family::default(),
            shadow_verdicts: Family::default(),
            kernel_drops: Family::default(),
            kernel_verdicts: Family::default(),
            unmeshed: Gauge::default(),
            unmeshed_by_workload: Mutex::default(),
            certificate_expiry: Bounded::default(),
            certificates_issued: Counter::default(),
            certificate_failures: Counter::default(),
            authority_failures: Counter::default(),
            limits: Family::default(),
            enrolled: Gauge::default(),
            refusals: Family::default(),
            repairs: Counter::default(),
            snapshot: Gauge::default(),
            document_problems: Gauge::default(),
            documents_refused: Counter::default(),
            kernel_failures: Counter::default(),
            accept_failures: Counter::default(),
            direct_path: Gauge::default(),
            audit_checkpoint: Gauge::default(),
            audit_lost: Counter::default(),
            audit_failures: Counter::default(),
            ready: Gauge::default(),
        };
        all.register();
        all
    }
}

impl Metrics {
    /// Gives every metric its name. Counters get the ending `_total` by the encoder.
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "istio_tcp_connections_opened",
            "Connections that were admitted",
            self.opened.family.clone(),
        );
        registry.register(
            "istio_tcp_connections_closed",
            "Admitted connections that are over",
            self.closed.family.clone(),
        );
        registry.register("istio_tcp_sent_bytes", "Bytes from servers to clients", self.sent_bytes.clone());
        registry.register(
            "istio_tcp_received_bytes",
            "Bytes from clients to servers",
            self.received_bytes.clone(),
        );
        registry.register("istio_requests", "Requests that were answered", self.requests.family.clone());
        registry.register(
            "culvert_denials",
            "Connections and requests denied or failed, by reason",
            self.denials.clone(),
        );
        registry.register(
            "culvert_shadow_verdicts",
            "What the answer to connections and requests would be if what is only tried were enforced",
            self.shadow_verdicts.clone(),
        );
        registry.register(
            "culvert_kernel_drops",
            "What the kernel's half refused",
            self.kernel_drops.clone(),
        );
        registry.register(
            "culvert_kernel_verdicts",
            "What the kernel's half let go on",
            self.kernel_verdicts.clone(),
        );
        registry.register(
            "culvert_unmeshed_connections",
            "Connections from before their workload was enrolled that still stand outside the mesh",
            self.unmeshed.clone(),
        );
        registry.register(
            "culvert_certificate_expiry_seconds",
            "Unix time at which the certificate in use expires",
            self.certificate_expiry.family.clone(),
        );
        registry.register(
            "culvert_certificates_issued",
            "Certificates obtained",
            self.certificates_issued.clone(),
        );
        registry.register(
            "culvert_certificate_failures",
            "Renewals that failed",
            self.certificate_failures.clone(),
        );
        registry.register(
            "culvert_authority_failures",
            "Calls to the CA that failed",
            self.authority_failures.clone(),
        );
        registry.register("culvert_limits", "Times a named limit was reached", self.limits.clone());
        registry.register("culvert_enrolled_workloads", "Workloads under capture", self.enrolled.clone());
        registry.register("culvert_enrolment_refusals", "Workloads that were refused", self.refusals.clone());
        registry.register("culvert_repairs", "Repairs in workloads' namespaces", self.repairs.clone());
        registry.register(
            "culvert_snapshot_number",
            "Number of the snapshot in force",
            self.snapshot.clone(),
        );
        registry.register(
            "culvert_document_problems",
            "Documents or parts of them that are not used",
            self.document_problems.clone(),
        );
        registry.register(
            "culvert_documents_refused",
            "Refusals of documents",
            self.documents_refused.clone(),
        );
        registry.register(
            "culvert_kernel_failures",
            "Calls to the kernel's half that failed",
            self.kernel_failures.clone(),
        );
        registry.register(
            "culvert_accept_failures",
            "Failures to accept a connection",
            self.accept_failures.clone(),
        );
        registry.register(
            "culvert_audit_checkpoint_sequence",
            "Number of the newest signed record of the audit log",
            self.audit_checkpoint.clone(),
        );
        registry.register(
            "culvert_audit_lost",
            "Decisions that found no place in the audit log's queue",
            self.audit_lost.clone(),
        );
        registry.register(
            "culvert_audit_failures",
            "Failures to write or sign the audit log",
            self.audit_failures.clone(),
        );
        registry.register(
            "culvert_direct_path",
            "1 when connections inside the node may go by the kernel alone",
            self.direct_path.clone(),
        );
        registry.register("culvert_ready", "1 when ready", self.ready.clone());
    }
}
