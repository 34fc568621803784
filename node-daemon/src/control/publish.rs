//! `Store::apply` -> [`Snapshot`] -> watch channel; tells what was refused, keeps the last good documents on disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use node_core::{
    audit::Digest,
    snapshot::Snapshot,
    store::{Problem, Store, Update},
};
use sha2::{Digest as _, Sha256};
use spiffe_id::TrustDomain;
use tokio::sync::watch;

use super::{
    DocumentsView,
    file::{Change, parse},
    last_good::{LastGood, Remembered, Texts},
};
use crate::telemetry::{Event, Sink};

/// What stands in the place of a file that cannot be read.
const FROM_MEMORY: &str = "its last good documents stay in force";
const FROM_DISK: &str = "its last good documents were taken from disk";
const NOTHING: &str = "nothing of it is in force, and everything else stays as it is";
const DENIED: &str = "everything is denied on this node until it can be read";

/// Owns the store.
#[derive(Debug)]
pub struct Publisher {
    store: Store,
    published: watch::Sender<Arc<Snapshot>>,
    documents: watch::Sender<DocumentsView>,
    view: DocumentsView,
    last_good: LastGood,
    /// What is, or should be, on disk. A damaged file is replaced as soon as something good was read.
    remembered: Remembered,
    /// Files that were read by this process or taken from disk.
    known: BTreeSet<Arc<str>>,
    /// A whole set of documents was in force once, in this process or before it. From then on a file that was never
    /// readable changes nothing; before, nobody knows whom it restricts (T-19).
    is_established: bool,
    /// Problems that were told.
    told: BTreeSet<Told>,
    folder: Arc<str>,
    events: Sink,
}

/// One problem as it was told.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Told {
    file: String,
    object: String,
    field: String,
    problem: String,
}

impl Publisher {
    pub fn new(
        node: &str,
        trust_domain: TrustDomain,
        folder: &Path,
        last_good: LastGood,
        events: Sink,
    ) -> Self {
        let mut store = Store::new(node, trust_domain);
        let view = DocumentsView { folder: folder.to_owned(), ..DocumentsView::default() };
        Self {
            published: watch::Sender::new(store.snapshot()),
            documents: watch::Sender::new(view.clone()),
            store,
            view,
            last_good,
            remembered: Remembered { folder: folder.to_string_lossy().into_owned(), ..Remembered::default() },
            known: BTreeSet::new(),
            is_established: false,
            told: BTreeSet::new(),
            folder: folder.to_string_lossy().into(),
            events,
        }
    }

    pub fn snapshots(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.published.subscribe()
    }

    pub fn documents(&self) -> watch::Receiver<DocumentsView> {
        self.documents.subscribe()
    }

    /// The first look at the folder. What was in force before this process comes first, so that a document that was
    /// broken in the meantime changes nothing that worked (T-19).
    pub fn begin(&mut self, changes: Vec<Change>) {
        match self.last_good.read() {
            Ok(remembered) => self.recall(remembered, &changes),
            Err(error) => self.view.last_good_problem = Some(error.to_string()),
        }
        if let Some(problem) = self.view.last_good_problem.clone() {
            let file = self.last_good.path().display().to_string();
            self.events.emit(&Event::FileUnreadable {
                file,
                problem,
                effect: "the last good documents are lost",
            });
        }
        self.apply(changes);
    }

    /// Takes what changed, publishes one snapshot for all of it, and tells what is refused.
    pub fn apply(&mut self, changes: Vec<Change>) {
        let mut read = Vec::new();
        for change in changes {
            self.apply_one(change, &mut read);
        }
        let snapshot = self.store.snapshot();
        self.is_established |= snapshot.unreadable().is_none();
        self.remember(&snapshot, read);
        self.view.files = self.known.len();
        self.documents.send_replace(self.view.clone());
        // Before it judges anything, so that what keeps decisions knows by what they were made.
        self.events.judging_by(snapshot.number(), || digest(&self.remembered));
        self.published.send_replace(Arc::clone(&snapshot));
        // Told when it is in force, so that whoever reads the line may rely on it.
        self.tell(&snapshot);
    }

    fn apply_one(&mut self, change: Change, read: &mut Vec<(Arc<str>, Arc<str>)>) {
        match change {
            Change::Read { file, text, documents } => {
                self.introduce(&file);
                self.store.apply(Update::replace(&file, documents));
                self.view.from_last_good.retain(|other| *other != file);
                self.known.insert(Arc::clone(&file));
                read.push((file, text));
            }
            Change::Removed { file } => self.removed(file),
            Change::Unreadable { file, reason, limit } => {
                self.limit(limit);
                let effect = self.in_place_of(&file);
                self.tell_unreadable(&file, &reason, effect);
                self.introduce(&file);
                self.store.apply(Update::Unreadable { file, reason });
            }
            Change::FolderUnreadable { reason, limit } => self.folder_unreadable(reason, limit),
            Change::FolderReadable { files } => self.folder_readable(&files),
        }
    }

    /// A file that appears when a whole set is in force had good contents before: none.
    fn introduce(&mut self, file: &Arc<str>) {
        if self.is_established && !self.known.contains(file) {
            self.store.apply(Update::replace(file, Vec::new()));
        }
    }

    fn in_place_of(&self, file: &Arc<str>) -> &'static str {
        if self.view.from_last_good.contains(file) {
            FROM_DISK
        } else if self.known.contains(file) {
            FROM_MEMORY
        } else if self.is_established {
            NOTHING
        } else {
            DENIED
        }
    }

    /// Every file of it stays as it is; without any, nobody knows who may reach whom.
    fn folder_unreadable(&mut self, reason: String, limit: Option<&'static str>) {
        self.limit(limit);
        let effect = match (self.is_established, self.view.from_last_good.is_empty()) {
            (false, _) => DENIED,
            (true, true) => FROM_MEMORY,
            (true, false) => FROM_DISK,
        };
        let folder = Arc::clone(&self.folder);
        self.tell_unreadable(&folder, &reason, effect);
        if !self.is_established {
            self.store.apply(Update::Unreadable { file: folder, reason: reason.clone() });
        }
        for file in self.known.clone() {
            self.store.apply(Update::Unreadable { file, reason: format!("{}: {reason}", self.folder) });
        }
        self.view.folder_problem = Some(reason);
    }

    /// What it holds is told by changes of their own; what it does not hold any more goes.
    fn folder_readable(&mut self, files: &BTreeSet<Arc<str>>) {
        self.view.folder_problem = None;
        self.store.apply(Update::Remove { file: Arc::clone(&self.folder) });
        let gone: Vec<_> = self.known.difference(files).cloned().collect();
        for file in gone {
            self.removed(file);
        }
    }

    fn removed(&mut self, file: Arc<str>) {
        self.view.from_last_good.retain(|other| *other != file);
        self.known.remove(&file);
        self.remembered.files.remove(&*file);
        self.store.apply(Update::Remove { file });
    }

    fn tell_unreadable(&self, file: &Arc<str>, reason: &str, effect: &'static str) {
        let (file, problem) = (file.to_string(), reason.to_owned());
        self.events.emit(&Event::FileUnreadable { file, problem, effect });
    }

    fn limit(&self, limit: Option<&'static str>) {
        if let Some(limit) = limit {
            self.events.emit(&Event::LimitReached { limit, workload: None });
        }
    }

    /// Puts into the store what was in force before, and notes which files live from that.
    fn recall(&mut self, remembered: Option<Remembered>, changes: &[Change]) {
        let Some(remembered) = remembered.filter(|remembered| *remembered.folder == *self.folder) else {
            return;
        };
        self.is_established = true;
        let is_folder_away = changes.iter().any(|change| matches!(change, Change::FolderUnreadable { .. }));
        let unread: BTreeSet<_> = changes.iter().filter_map(unreadable_file).collect();
        let present: BTreeSet<_> = changes.iter().filter_map(present_file).collect();
        for (name, texts) in remembered.files {
            let file: Arc<str> = name.as_str().into();
            if !is_folder_away && !present.contains(&file) {
                continue;
            }
            for text in texts.good.iter().chain(&texts.parsed) {
                if let Ok(documents) = parse(text) {
                    self.store.apply(Update::replace(&file, documents));
                }
            }
            self.known.insert(Arc::clone(&file));
            if is_folder_away || unread.contains(&file) {
                self.view.from_last_good.push(Arc::clone(&file));
            }
            self.remembered.files.insert(name, texts);
        }
    }

    /// Notes the texts that were just read, and writes the whole if it changed.
    fn remember(&mut self, snapshot: &Snapshot, read: Vec<(Arc<str>, Arc<str>)>) {
        let with_problems: BTreeSet<&str> =
            snapshot.problems().iter().map(|problem| &*problem.file).collect();
        for (file, text) in read {
            let is_good = !with_problems.contains(&*file);
            self.remembered.files.entry(file.to_string()).or_default().note(&text, is_good);
        }
        if snapshot.unreadable().is_some() {
            // No good set: written now, it would make the next start trust what this one does not (T-19).
            return;
        }
        match self.last_good.keep(&self.remembered) {
            Ok(()) => self.view.last_good_problem = None,
            Err(error) => {
                let problem = error.to_string();
                if self.view.last_good_problem.as_ref() != Some(&problem) {
                    let file = self.last_good.path().display().to_string();
                    let effect = "a restart would not know the last good documents";
                    self.events.emit(&Event::FileUnreadable { file, problem: problem.clone(), effect });
                }
                self.view.last_good_problem = Some(problem);
            }
        }
    }

    fn tell(&mut self, snapshot: &Snapshot) {
        let current = problems(snapshot);
        for new in current.difference(&self.told) {
            let Told { file, object, field, problem } = new.clone();
            self.events.emit(&Event::DocumentRefused { file, object, field, problem });
        }
        let (local, problems) = (snapshot.local().count(), current.len());
        self.told = current;
        self.events.emit(&Event::SnapshotPublished { number: snapshot.number(), local, problems });
    }
}

/// SHA-256 of what `sha256sum` says of the files in force, in the order of their names: a folder without problems gives the same
/// by `sha256sum <folder>/*.yaml | sha256sum`. Of a file with problems the last good text stands before the present one.
fn digest(remembered: &Remembered) -> String {
    let mut all = Sha256::new();
    for (file, texts) in &remembered.files {
        for text in texts.good.iter().chain(&texts.parsed) {
            all.update(format!("{}  {file}\n", Digest::of(text.as_bytes())));
        }
    }
    all.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Documents with problems: those that the store refused, and policies that do not do all they say. Whole files are told
/// when they become unreadable.
fn problems(snapshot: &Snapshot) -> BTreeSet<Told> {
    let of_documents =
        snapshot.problems().iter().filter(|problem| problem.index.is_some()).map(|problem: &Problem| Told {
            file: problem.file.to_string(),
            object: problem.object.clone(),
            field: problem.field.clone(),
            problem: problem.reason.clone(),
        });
    let mut all: BTreeSet<Told> = of_documents.collect();
    let told: BTreeMap<String, ()> = all.iter().map(|told| (told.object.clone(), ())).collect();
    let of_policies = snapshot.statuses().iter().filter_map(|status| {
        let object = format!("{} {}", status.kind, status.name);
        let problem = status.problem.as_ref().filter(|_| !told.contains_key(&object))?;
        let field = status.field.clone().unwrap_or_default();
        let problem = problem.strip_prefix(&format!("{field}: ")).unwrap_or(problem).to_owned();
        Some(Told { file: status.source.file.to_string(), object, field, problem })
    });
    all.extend(of_policies);
    all
}

fn unreadable_file(change: &Change) -> Option<Arc<str>> {
    match change {
        Change::Unreadable { file, .. } => Some(Arc::clone(file)),
        Change::Read { .. }
        | Change::Removed { .. }
        | Change::FolderUnreadable { .. }
        | Change::FolderReadable { .. } => None,
    }
}

fn present_file(change: &Change) -> Option<Arc<str>> {
    match change {
        Change::Unreadable { file, .. } | Change::Read { file, .. } => Some(Arc::clone(file)),
        Change::Removed { .. } | Change::FolderUnreadable { .. } | Change::FolderReadable { .. } => None,
    }
}

impl Texts {
    fn note(&mut self, text: &str, is_good: bool) {
        if is_good {
            *self = Self { good: Some(text.to_owned()), parsed: None };
        } else {
            self.parsed = Some(text.to_owned());
        }
    }
}
