//! The audit log: every decision of the policy, in lines that are chained and signed
//! ([`node_core::audit`] has the format).
//!
//! ```text
//! datapath --> telemetry::Sink --> [queue] --> [writer] --> [journal] --> folder of segments
//!                                    | full      | checkpoints: certs::Seals
//!                                    '- dropped and counted, or denied (audit.onFull)
//! ```
//!
//! The data path never waits: a decision finds a place in the queue, or none. One thread writes. What is written is in the
//! kernel's hands at once, and on the disk within [`writer::SYNC_SECONDS`] and at each checkpoint: a daemon that is killed
//! loses what was in the queue, a machine that loses its power the last second besides.
//! [`verify`] judges a log without a daemon. Not here: who decides, what a line means.

mod journal;
mod line;
mod queue;
#[cfg(test)]
mod tests;
pub mod verify;
mod writer;

use std::{io, path::PathBuf, sync::Arc, thread, time::Duration};

use spiffe_id::NodeId;
use tokio::{sync::oneshot, time::timeout};

use self::{journal::Journal, queue::Queue, writer::Writer};
use crate::{
    certs::Seals,
    config::AuditConfig,
    telemetry::{Event, Sink},
};

/// At the end, so long may writing what waits take.
const STOP_TIME: Duration = Duration::from_secs(5);

/// Why there is no audit log. A daemon that is to keep one does not start without.
#[derive(Debug, thiserror::Error)]
pub enum AuditFault {
    #[error("audit.folder {}: {source}: make it a folder that only this user may enter", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("audit.folder {}: it holds the log of {found}, this is {own}: give another folder", path.display())]
    OtherNode { path: PathBuf, found: String, own: String },
    #[error("audit: its thread cannot be started: {0}")]
    Thread(io::Error),
}

/// The log, open.
pub struct Handle {
    queue: Arc<Queue>,
    ended: oneshot::Receiver<()>,
}

/// Opens the log and from here on keeps the decisions of `events` and its clones. `seals` may give nothing for a while: lines
/// are chained meanwhile, and signed later. `is_successor`: a predecessor still writes.
///
/// # Errors
/// [`AuditFault`]
pub fn start(
    config: &AuditConfig,
    node: &NodeId,
    seals: Seals,
    is_successor: bool,
    events: &Sink,
) -> Result<Handle, AuditFault> {
    let run = format!("{:016x}", rand::random::<u64>());
    let (journal, found) = Journal::open(config, node, run)?;
    events.emit(&Event::AuditOpened {
        folder: config.folder.display().to_string(),
        sequence: journal.sequence(),
        torn_bytes: found.torn_bytes(),
        clean: is_successor || found.is_clean(),
    });
    let (queue, items) = Queue::new(config.on_full);
    let queue = Arc::new(queue);
    let mut writer = Writer::new(config, journal, seals, Arc::clone(&queue), events.clone());
    writer.begin(found, is_successor);
    let (end, ended) = oneshot::channel();
    let run = move || {
        writer.run(&items);
        // Nobody waits any more where the daemon ends otherwise.
        let _ = end.send(());
    };
    thread::Builder::new().name("audit".to_owned()).spawn(run).map_err(AuditFault::Thread)?;
    events.keep_decisions(Arc::clone(&queue) as _);
    Ok(Handle { queue, ended })
}

impl Handle {
    /// Writes what waits, a stop and its checkpoint. What is decided later is not recorded.
    pub async fn stop(self) {
        self.queue.stop();
        if timeout(STOP_TIME, self.ended).await.is_err() {
            tracing::warn!("the audit log was left without a stop");
        }
    }
}
