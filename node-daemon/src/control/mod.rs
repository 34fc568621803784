//! The control flow: a folder of YAML documents -> [`Update`](node_core::store::Update)s -> store -> numbered snapshots.
//!
//! [`mod@file`] reads and watches, [`publish`] applies and publishes, [`last_good`] remembers on disk what was in force.
//! Publishes and calls nobody: who listens to the snapshots is not its business.

pub mod file;
pub mod last_good;
pub mod publish;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use node_core::snapshot::Snapshot;
use spiffe_id::TrustDomain;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use self::{file::Watched, last_good::LastGood, publish::Publisher};
use crate::telemetry::Sink;

/// What this room needs to know.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    pub node: String,
    pub trust_domain: TrustDomain,
    /// Folder of YAML documents.
    pub folder: PathBuf,
    /// File of the last good documents.
    pub last_good: PathBuf,
}

/// What became of the documents, beside the snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DocumentsView {
    pub folder: PathBuf,
    /// Files whose documents are in force.
    pub files: usize,
    /// Why the folder as a whole cannot be read.
    pub folder_problem: Option<String>,
    /// Files that cannot be read and whose last good documents came from disk (T-19).
    pub from_last_good: Vec<Arc<str>>,
    /// Why the last good documents cannot be used or kept.
    pub last_good_problem: Option<String>,
}

/// A running control flow.
#[derive(Debug)]
pub struct Handle {
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    pub documents: watch::Receiver<DocumentsView>,
    retired: Arc<AtomicBool>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// Reads the folder once, publishes the first snapshot, and then follows the folder's changes.
///
/// Never fails: a folder that cannot be read is an answer (everything denied, readiness false), and is tried again.
pub async fn start(config: ControlConfig, events: Sink) -> Handle {
    let mut watched = Watched::new(&config.folder);
    let last_good = LastGood::new(&config.last_good);
    let retired = last_good.retired();
    let mut publisher = Publisher::new(&config.node, config.trust_domain, &config.folder, last_good, events);
    publisher.begin(watched.scan().await);
    let (snapshots, documents) = (publisher.snapshots(), publisher.documents());
    let stop = CancellationToken::new();
    let task = tokio::spawn(follow(watched, publisher, stop.clone()));
    Handle { snapshots, documents, retired, stop, task }
}

async fn follow(mut watched: Watched, mut publisher: Publisher, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changes = watched.changed() => {
                if !changes.is_empty() {
                    publisher.apply(changes);
                }
            }
        }
    }
}

impl Handle {
    /// Leaves the file of the last good documents to a successor; changes are followed on.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    /// Ends the following of changes; the last snapshot stays.
    pub async fn stop(self) {
        self.stop.cancel();
        // A panic of the task was printed where it happened.
        let _ = self.task.await;
    }
}

#[cfg(test)]
mod tests;
