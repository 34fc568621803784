//! The one thread that writes the log: batches, checkpoints when they are due, what was lost, and the end.

use std::{
    collections::BTreeMap,
    mem,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant, SystemTime},
};

use node_core::audit::entry::Entry;

use super::{
    journal::{Found, Journal, WriteFault},
    line,
    queue::{Item, Queue},
};
use crate::{
    certs::Seals,
    config::{AuditConfig, OnFull},
    telemetry::{Decision, Event, Sink},
};

/// Decisions that are written at once: one call of the kernel for as many. More only wait longer.
pub(super) const BATCH_MAX: usize = 256;

/// What is written is on the disk within this, in seconds.
pub(super) const SYNC_SECONDS: u64 = 1;

/// Between two tries to write where the disk is full or refuses, and to sign where there is no certificate.
const RETRY: Duration = Duration::from_secs(1);

/// Snapshots whose digest is known: a request may have been judged by one that was replaced since, not by one of long ago.
const DIGESTS_KNOWN_MAX: usize = 64;

/// What is denied or lost while the log cannot be written.
const EFFECT_DROP: &str = "decisions wait, and are dropped and counted when too many do";
const EFFECT_DENY: &str = "what would be allowed is denied";

/// What happens while nothing can be signed.
const EFFECT_UNSIGNED: &str = "records are chained, and signed by the next checkpoint";

/// See the module.
pub(super) struct Writer {
    journal: Journal,
    seals: Seals,
    queue: Arc<Queue>,
    events: Sink,
    checkpoint_records: u64,
    checkpoint_every: Duration,
    effect: &'static str,
    digests: BTreeMap<u64, Arc<str>>,
    /// What is to be written, in its order.
    waiting: Vec<Waiting>,
    /// Decisions that were dropped, and of which no record tells yet.
    lost: u64,
    /// Since when records are unsigned, and since when some are not on the disk.
    unsigned_since: Option<Instant>,
    unsynced_since: Option<Instant>,
    /// What was told of the failure that lasts.
    told: Option<String>,
    sign_told: Option<String>,
}

/// One record to be.
enum Waiting {
    Entry { at: SystemTime, entry: Box<Entry<'static>> },
    Snapshot { at: SystemTime, number: u64, digest: Arc<str> },
    Decision { at: SystemTime, decision: Box<Decision> },
}

impl Writer {
    pub(super) fn new(
        config: &AuditConfig,
        journal: Journal,
        seals: Seals,
        queue: Arc<Queue>,
        events: Sink,
    ) -> Self {
        Self {
            journal,
            seals,
            queue,
            events,
            checkpoint_records: config.checkpoint_records,
            checkpoint_every: config.checkpoint,
            effect: match config.on_full {
                OnFull::Drop => EFFECT_DROP,
                OnFull::Deny => EFFECT_DENY,
            },
            digests: BTreeMap::new(),
            waiting: Vec::new(),
            lost: 0,
            unsigned_since: None,
            unsynced_since: None,
            told: None,
            sign_told: None,
        }
    }

    /// The first records of a run.
    pub(super) fn begin(&mut self, found: Found, is_successor: bool) {
        let at = SystemTime::now();
        // A predecessor that still writes has no stop, and nothing is wrong with that.
        if !(found.is_clean() || is_successor && found.is_whole()) {
            self.waiting.push(Waiting::Entry { at, entry: Box::new(found.entry()) });
        }
        let entry = Box::new(Entry::Start { version: env!("CARGO_PKG_VERSION") });
        self.waiting.push(Waiting::Entry { at, entry });
    }

    /// Writes until it is to stop.
    pub(super) fn run(mut self, items: &Receiver<Item>) {
        self.turn(Instant::now());
        while !self.queue.is_stopping() {
            self.receive(items);
            self.turn(Instant::now());
        }
        // What came before the stop.
        while let Ok(item) = items.try_recv() {
            self.take(item);
        }
        self.finish();
    }

    /// Waits for something to do: decisions, or what is due. While writing fails nothing is taken out of the queue.
    fn receive(&mut self, items: &Receiver<Item>) {
        if !self.waiting.is_empty() {
            std::thread::park_timeout(RETRY);
            return;
        }
        let first = match self.due_in(Instant::now()) {
            Some(time) => items.recv_timeout(time),
            None => items.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        let Ok(first) = first else { return };
        self.take(first);
        for item in items.try_iter().take(BATCH_MAX - 1) {
            self.take(item);
        }
    }

    /// How long until something is due that no decision brings about; `None`: nothing is.
    pub(super) fn due_in(&self, now: Instant) -> Option<Duration> {
        let left =
            |since: Option<Instant>, time: Duration| Some(time.saturating_sub(now.duration_since(since?)));
        let sync = left(self.unsynced_since, Duration::from_secs(SYNC_SECONDS));
        // One that is late is looked for again and again.
        let checkpoint = left(self.unsigned_since, self.checkpoint_every)
            .map(|left| if left.is_zero() { RETRY } else { left });
        sync.into_iter().chain(checkpoint).min()
    }

    pub(super) fn take(&mut self, item: Item) {
        match item {
            Item::Decided { at, decision } => {
                self.waiting.push(Waiting::Decision { at, decision });
            }
            Item::Wake => {}
        }
    }

    /// Writes what waits, and what is due.
    pub(super) fn turn(&mut self, now: Instant) {
        self.count_lost();
        let is_due =
            self.unsigned_since.is_some_and(|since| now.duration_since(since) >= self.checkpoint_every);
        if self.told.is_none() {
            self.take_snapshots();
            self.take_lost();
        }
        if !self.waiting.is_empty() || is_due {
            let written = self.write(is_due, now);
            self.tell(written);
        }
        self.sync_if_due(now);
    }

    fn count_lost(&mut self) {
        let records = self.queue.take_lost();
        if records > 0 {
            self.events.emit(&Event::AuditLost { records });
            self.lost += records;
        }
    }

    fn take_lost(&mut self) {
        let records = mem::take(&mut self.lost);
        if records > 0 {
            self.waiting
                .push(Waiting::Entry { at: SystemTime::now(), entry: Box::new(Entry::Lost { records }) });
        }
    }

    /// They stand before the decisions that were made by them, which are in `waiting` already.
    fn take_snapshots(&mut self) {
        let snapshots = self.queue.take_snapshots();
        for published in &snapshots {
            self.digests.insert(published.number, Arc::clone(&published.digest));
            if self.digests.len() > DIGESTS_KNOWN_MAX {
                self.digests.pop_first();
            }
        }
        let records = snapshots.into_iter().map(|published| Waiting::Snapshot {
            at: published.at,
            number: published.number,
            digest: published.digest,
        });
        self.waiting.splice(0..0, records);
    }

    fn write(&mut self, is_due: bool, now: Instant) -> Result<(), WriteFault> {
        let waiting = mem::take(&mut self.waiting);
        let mut done = 0;
        let written = self.write_all(&waiting, &mut done, is_due, now);
        // What is not in the file yet is tried again.
        self.waiting.extend(waiting.into_iter().skip(done));
        written
    }

    /// `done`: how many stand in the file.
    fn write_all(
        &mut self,
        waiting: &[Waiting],
        done: &mut usize,
        is_due: bool,
        now: Instant,
    ) -> Result<(), WriteFault> {
        let _lock = self.journal.begin()?;
        for (number, record) in waiting.iter().enumerate() {
            self.put(record);
            if self.journal.is_full() {
                // The end of a segment is signed, so that each can be judged alone.
                let is_signed = self.checkpoint();
                self.journal.flush()?;
                *done = number + 1;
                self.told_checkpoint(is_signed);
                self.journal.rotate(SystemTime::now())?;
            } else if self.journal.unsigned() >= self.checkpoint_records {
                let is_signed = self.checkpoint();
                self.journal.flush()?;
                *done = number + 1;
                self.told_checkpoint(is_signed);
            }
        }
        let is_signed = is_due && self.journal.unsigned() > 0 && self.checkpoint();
        self.journal.flush()?;
        *done = waiting.len();
        self.told_checkpoint(is_signed);
        self.unsynced_since = self.unsynced_since.or(Some(now));
        if self.journal.unsigned() > 0 {
            self.unsigned_since = self.unsigned_since.or(Some(now));
        }
        Ok(())
    }

    fn put(&mut self, record: &Waiting) {
        match record {
            Waiting::Entry { at, entry } => self.journal.put(*at, entry),
            Waiting::Snapshot { at, number, digest } => {
                self.journal.put(*at, &Entry::Snapshot { number: *number, digest });
            }
            Waiting::Decision { at, decision } => {
                let digest = self.digests.get(&decision.snapshot).map(|digest| &**digest);
                let journal = &mut self.journal;
                line::with_entry(decision, digest, |entry| journal.put(*at, entry));
            }
        }
    }

    /// Puts a checkpoint into the batch, if the node can sign.
    fn checkpoint(&mut self) -> bool {
        let at = SystemTime::now();
        let Some(seal) = self.seals.at(at) else { return false };
        match self.journal.checkpoint(&seal, at) {
            Ok(()) => {
                self.sign_told = None;
                true
            }
            Err(fault) => {
                let problem = fault.to_string();
                if self.sign_told.as_ref() != Some(&problem) {
                    let (call, effect) = ("sign", EFFECT_UNSIGNED);
                    self.events.emit(&Event::AuditFailed { call, problem: problem.clone(), effect });
                    self.sign_told = Some(problem);
                }
                false
            }
        }
    }

    /// A checkpoint is in the file: told for whoever keeps its number elsewhere, once it is on the disk.
    fn told_checkpoint(&mut self, is_signed: bool) {
        if !is_signed {
            return;
        }
        self.unsigned_since = None;
        self.sync();
        let (sequence, digest) = self.journal.last();
        let segment = self.journal.segment();
        self.events.emit(&Event::AuditCheckpoint { sequence, digest: digest.to_string(), segment });
    }

    fn sync_if_due(&mut self, now: Instant) {
        let time = Duration::from_secs(SYNC_SECONDS);
        if self.unsynced_since.is_some_and(|since| now.duration_since(since) >= time) {
            self.sync();
        }
    }

    fn sync(&mut self) {
        self.unsynced_since = None;
        let synced = self.journal.sync();
        if let Err(fault) = synced {
            self.events.emit(&Event::AuditFailed {
                call: "sync",
                problem: fault.to_string(),
                effect: "what was written may be lost with the machine's power",
            });
        }
    }

    /// A failure is told once for as long as it lasts.
    fn tell(&mut self, written: Result<(), WriteFault>) {
        self.queue.set_failing(written.is_err());
        let problem = written.err().map(|fault| fault.to_string());
        if let Some(problem) = problem.clone().filter(|problem| self.told.as_ref() != Some(problem)) {
            self.events.emit(&Event::AuditFailed { call: "write", problem, effect: self.effect });
        }
        self.told = problem;
    }

    /// The last records of a run. There is one try: a disk that is full does not hold up the end.
    fn finish(&mut self) {
        self.count_lost();
        self.take_snapshots();
        self.take_lost();
        self.waiting.push(Waiting::Entry { at: SystemTime::now(), entry: Box::new(Entry::Stop) });
        let written = self.write(true, Instant::now());
        self.tell(written);
        self.sync();
    }
}
