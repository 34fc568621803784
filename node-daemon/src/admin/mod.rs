//! What operators and machines may look at: readiness, metrics, status. Reads views, changes nothing.
//!
//! [`serve`] answers HTTP/1.1 on a socket, bounded; [`ready`] on `readyListen`, [`metrics`] on `metricsListen`, [`dump`] on
//! the admin socket; [`status`] is what it answers; [`client`] asks for it.

pub mod client;
pub mod dump;
pub mod metrics;
pub mod ready;
pub mod serve;
pub mod status;

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use node_core::{snapshot::Snapshot, workload::ObjectName};
use serde_json::Value;
use tokio::sync::watch;

use crate::{
    certs::{CertificateView, RuleFault},
    control::DocumentsView,
    datapath::ConnectionView,
    jwks::KeySetView,
    telemetry::Sink,
};

/// A look at something, now.
pub type View<T> = Arc<dyn Fn() -> T + Send + Sync>;

/// What is wrong with the files that the rules of a snapshot name, by rule (T-20).
pub type ClientFilesView = Arc<dyn Fn(&Snapshot) -> BTreeMap<ObjectName, RuleFault> + Send + Sync>;

/// Whether a local workload is under capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnrolmentView {
    pub workload: ObjectName,
    /// `None`: under capture. Else why not.
    pub problem: Option<String>,
}

/// The part of its life in which a daemon is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Running,
    /// A successor owns the kernel's half, or the end was asked for; what stands goes on for a while.
    Draining,
}

/// The node's own certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeCertificateView {
    pub name: String,
    pub not_after: SystemTime,
}

/// What can be looked at, wired by the composition root.
#[derive(Clone)]
pub struct Views {
    pub node: String,
    /// The effective configuration.
    pub configuration: Value,
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    pub documents: watch::Receiver<DocumentsView>,
    pub stage: watch::Receiver<Stage>,
    pub enrolments: View<Vec<EnrolmentView>>,
    pub certificates: View<Vec<CertificateView>>,
    pub node_certificate: View<Option<NodeCertificateView>>,
    pub connections: View<Vec<ConnectionView>>,
    /// Of the kernel's pair table.
    pub direct: View<status::Direct>,
    /// Rules whose files cannot be used.
    pub client_files: ClientFilesView,
    /// Key sets of tokens' issuers that are fetched.
    pub key_sets: View<Vec<KeySetView>>,
    /// Counters of the kernel's half, by label.
    pub kernel: View<Vec<(&'static str, u64)>>,
    pub events: Sink,
}

#[cfg(test)]
mod tests;
