//! The one mutable thing: what the documents of all files say together.
//!
//! In come [`Update`]s, one file at a time; out comes a [`Snapshot`]. A document that is invalid or contradicts another
//! changes nothing that worked: the last good version of its object stays, and a [`Problem`] names file, field and
//! reason. Only an object that vanished from its file is removed.
//! Not here: reading files, watching them, keeping the last good set on disk.

mod choose;
mod claims;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use serde_json::Value;
use spiffe_id::{SpiffeId, TrustDomain};

use self::claims::{Claims, Holders};
use crate::{
    decode::{self, DeclaredWorkload, InvalidObject, Kind, Object, Source},
    policy::PolicyObjects,
    snapshot::{Contents, NamespaceWord, Snapshot},
    workload::{External, Mesh, ObjectName, Service},
};

/// What happened to one file.
#[derive(Clone, Debug)]
pub enum Update {
    /// It was read. [`Update::replace`] makes this from the file's documents.
    Replace {
        file: Arc<str>,
        objects: Vec<Object>,
        /// Documents without a readable head. While there are any, objects that vanished from the file stay, because
        /// one of these documents may be theirs.
        invalid: Vec<InvalidObject>,
    },
    /// It is gone, and its objects with it.
    Remove { file: Arc<str> },
    /// It is there and could not be read or parsed: its last good contents stay. Without any, what it targets is
    /// unknown, and everything is denied (T-19).
    Unreadable { file: Arc<str>, reason: String },
}

impl Update {
    /// The update for a file that was parsed into these documents, in their order.
    pub fn replace(file: &str, documents: Vec<Value>) -> Self {
        let file: Arc<str> = file.into();
        let (mut objects, mut invalid) = (Vec::new(), Vec::new());
        for (index, document) in documents.into_iter().enumerate() {
            // An empty document, such as after a last `---`.
            if document.is_null() {
                continue;
            }
            match decode::object(document, Source { file: Arc::clone(&file), index }) {
                Ok(object) => objects.push(object),
                Err(refused) => invalid.push(refused),
            }
        }
        Self::Replace { file, objects, invalid }
    }
}

/// A document, or a part of it, that does not do what its author may expect. Displays as one sentence.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    pub file: Arc<str>,
    /// Which document of the file, from 0; `None`: the whole file.
    pub index: Option<usize>,
    /// `Kind namespace/name`; empty for a whole file.
    pub object: String,
    /// Path of the field; empty where it is the whole object.
    pub field: String,
    pub reason: String,
}

impl Problem {
    fn of_document(source: &Source, object: String, field: &str, reason: String) -> Self {
        Self {
            file: Arc::clone(&source.file),
            index: Some(source.index),
            object,
            field: field.to_owned(),
            reason,
        }
    }

    fn of_file(file: &Arc<str>, reason: String) -> Self {
        Self { file: Arc::clone(file), index: None, object: String::new(), field: String::new(), reason }
    }
}

impl From<&InvalidObject> for Problem {
    fn from(invalid: &InvalidObject) -> Self {
        Self::of_document(&invalid.source, invalid.object(), &invalid.field, invalid.reason())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.file)?;
        if let Some(index) = self.index {
            write!(formatter, " document {index}")?;
        }
        for part in [&self.object, &self.field] {
            if !part.is_empty() {
                write!(formatter, ": {part}")?;
            }
        }
        write!(formatter, ": {}", self.reason)
    }
}

/// Everything that the documents say, and what of it is in force.
#[derive(Debug)]
pub struct Store {
    node: Arc<str>,
    trust_domain: TrustDomain,
    files: BTreeMap<Arc<str>, File>,
    /// Where the documents of an object stand: several places are a contradiction.
    speakers: BTreeMap<Key, BTreeSet<Source>>,
    /// What is in force.
    held: BTreeMap<Key, Held>,
    /// What of it came from which file.
    held_by_file: BTreeMap<Arc<str>, BTreeSet<Key>>,
    /// Who owns which address, of what is in force.
    holders: Holders,
    /// Objects whose newest version waits for an address that another one owns.
    waiting: BTreeSet<Key>,
    /// What is wrong, by object.
    troubles: BTreeMap<Key, Vec<Problem>>,
    policies: PolicyObjects,
    /// Beside those that the Mesh bars.
    barred: BTreeSet<SpiffeId>,
    number: u64,
    current: Option<Arc<Snapshot>>,
    changed: bool,
}

/// The newest version of one file.
#[derive(Debug, Default)]
struct File {
    /// By their index.
    versions: BTreeMap<usize, Version>,
    invalid: Vec<InvalidObject>,
    /// Documents of kinds that nobody here understands.
    ignored: Vec<Problem>,
    /// Why the newest version could not be read at all.
    unread: Option<String>,
    /// No version of it was ever fully readable: what it targets is unknown (T-19).
    is_cold: bool,
}

/// One version of an object, as a document of a file says it.
#[derive(Clone, Debug)]
struct Version {
    key: Key,
    object: Arc<Object>,
    content: Result<Arc<Content>, InvalidObject>,
}

/// What a version says, in values of the domain.
#[derive(Debug)]
enum Content {
    Namespace(NamespaceWord),
    ServiceAccount,
    Service(Service),
    ServiceEntry(External),
    Workload(DeclaredWorkload),
    Mesh(Mesh),
    /// Judged by the policy room.
    Policy,
}

/// A version in force.
#[derive(Clone, Debug)]
struct Held {
    object: Arc<Object>,
    content: Arc<Content>,
    claims: Claims,
}

/// Which object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    kind: KeyKind,
    name: ObjectName,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum KeyKind {
    Own(Kind),
    Policy(Arc<str>),
}

impl Store {
    /// Without documents: nobody is known. `node` is this node's name, `trust_domain` the configured one.
    pub fn new(node: &str, trust_domain: TrustDomain) -> Self {
        Self {
            node: node.into(),
            trust_domain,
            files: BTreeMap::new(),
            speakers: BTreeMap::new(),
            held: BTreeMap::new(),
            held_by_file: BTreeMap::new(),
            holders: Holders::default(),
            waiting: BTreeSet::new(),
            troubles: BTreeMap::new(),
            policies: PolicyObjects::new(),
            barred: BTreeSet::new(),
            number: 0,
            current: None,
            changed: true,
        }
    }

    /// Takes one update. Gives the problems of that file, and new ones that it caused elsewhere; the snapshot has all.
    pub fn apply(&mut self, update: Update) -> Vec<Problem> {
        let before: BTreeSet<Problem> = self.troubles.values().flatten().cloned().collect();
        let file = match &update {
            Update::Replace { file, .. } | Update::Remove { file } | Update::Unreadable { file, .. } => {
                Arc::clone(file)
            }
        };
        match update {
            Update::Replace { file, objects, invalid } => self.replace(&file, objects, invalid),
            Update::Remove { file } => self.remove(&file),
            Update::Unreadable { file, reason } => self.unreadable(&file, reason),
        }
        self.changed = true;
        self.problems()
            .into_iter()
            .filter(|problem| problem.file == file || !before.contains(problem))
            .collect()
    }

    /// From the next snapshot on nobody may speak as one of these, beside those that the Mesh bars: what was revoked.
    pub fn bar(&mut self, identities: BTreeSet<SpiffeId>) {
        self.changed |= identities != self.barred;
        self.barred = identities;
    }

    /// What is in force, compiled. The same one as before if nothing was applied since.
    pub fn snapshot(&mut self) -> Arc<Snapshot> {
        if !self.changed
            && let Some(current) = &self.current
        {
            return Arc::clone(current);
        }
        self.number += 1;
        self.changed = false;
        let snapshot = Arc::new(Snapshot::build(self.contents()));
        self.current = Some(Arc::clone(&snapshot));
        snapshot
    }

    fn replace(&mut self, file: &Arc<str>, objects: Vec<Object>, invalid: Vec<InvalidObject>) {
        let was_cold = self.files.get(file).is_none_or(|old| old.is_cold);
        let mut touched = self.forget_speakers(file);
        let mut new = File { invalid, ..File::default() };
        for object in objects {
            let source = object.source.clone();
            match self.version(object) {
                Ok(version) => {
                    self.speakers.entry(version.key.clone()).or_default().insert(source.clone());
                    touched.insert(version.key.clone());
                    new.versions.insert(source.index, version);
                }
                Err(ignored) => new.ignored.push(ignored),
            }
        }
        new.is_cold = was_cold && new.invalid.iter().any(|refused| self.may_restrict(refused));
        self.files.insert(Arc::clone(file), new);
        self.settle(touched);
    }

    fn remove(&mut self, file: &Arc<str>) {
        let touched = self.forget_speakers(file);
        self.files.remove(file);
        self.settle(touched);
    }

    fn unreadable(&mut self, file: &Arc<str>, reason: String) {
        let cold = File { is_cold: true, ..File::default() };
        self.files.entry(Arc::clone(file)).or_insert(cold).unread = Some(reason);
    }

    /// The objects of a file no longer speak from there. Gives those about which to decide anew.
    fn forget_speakers(&mut self, file: &Arc<str>) -> BTreeSet<Key> {
        // Beside what the file says: what was kept while a document of it had no readable head.
        let mut touched = self.held_by_file.get(file).cloned().unwrap_or_default();
        for (index, version) in self.files.get(file).into_iter().flat_map(|old| &old.versions) {
            if let Some(sources) = self.speakers.get_mut(&version.key) {
                sources.remove(&Source { file: Arc::clone(file), index: *index });
                if sources.is_empty() {
                    self.speakers.remove(&version.key);
                }
            }
            touched.insert(version.key.clone());
        }
        touched
    }

    fn version(&self, object: Object) -> Result<Version, Problem> {
        let (kind, content) = match Kind::of(&object.api_version, &object.kind) {
            Some(kind) => (KeyKind::Own(kind), self.content(kind, &object)),
            None if PolicyObjects::handles(&object.api_version, &object.kind) => {
                (KeyKind::Policy(object.kind.as_str().into()), Ok(Content::Policy))
            }
            None => {
                let reason = format!("{} {} is not understood, ignored", object.api_version, object.kind);
                return Err(Problem::of_document(&object.source, object.title(), "kind", reason));
            }
        };
        let key = Key { kind, name: object.name.clone() };
        Ok(Version { key, object: Arc::new(object), content: content.map(Arc::new) })
    }

    fn content(&self, kind: Kind, object: &Object) -> Result<Content, InvalidObject> {
        Ok(match kind {
            Kind::Namespace => Content::Namespace(NamespaceWord {
                enrolment: decode::enrolment(object)?,
                same_node: decode::same_node_label(object)?,
            }),
            Kind::ServiceAccount => Content::ServiceAccount,
            Kind::Service => Content::Service(decode::service(object)?),
            Kind::ServiceEntry => Content::ServiceEntry(decode::service_entry(object)?),
            Kind::Workload => Content::Workload(decode::workload(object, &self.trust_domain)?),
            Kind::Mesh => Content::Mesh(decode::mesh(object, &self.trust_domain)?),
        })
    }

    /// Might this document have restricted someone, if it could be read? Workloads, services and accounts never do.
    fn may_restrict(&self, refused: &InvalidObject) -> bool {
        let is_harmless =
            matches!(refused.kind_name.as_str(), "Namespace" | "ServiceAccount" | "Service" | "Workload");
        let is_held = |name: &ObjectName| {
            self.held.keys().any(|key| key.name == *name && key.is_named(&refused.kind_name))
        };
        !is_harmless && !refused.name.as_ref().is_some_and(is_held)
    }

    fn contents(&self) -> Contents<'_> {
        let mut namespaces = BTreeMap::new();
        let mut workloads = Vec::new();
        let mut services = BTreeMap::new();
        let mut externals = Vec::new();
        let mut mesh = None;
        for (key, held) in &self.held {
            match &*held.content {
                Content::Namespace(word) => {
                    namespaces.insert(Arc::clone(&key.name.name), *word);
                }
                Content::Service(service) => {
                    services.insert(key.name.clone(), (service.clone(), held.object.source.clone()));
                }
                Content::ServiceEntry(external) => externals.push((external, &held.object.source)),
                Content::Workload(workload) => workloads.push((workload, &held.object.source)),
                Content::Mesh(content) => mesh = Some(content.clone()),
                Content::ServiceAccount | Content::Policy => {}
            }
        }
        Contents {
            number: self.number,
            node: Arc::clone(&self.node),
            mesh: mesh.unwrap_or_else(|| Mesh::defaults(self.trust_domain.clone())),
            namespaces,
            workloads,
            services,
            externals,
            policies: &self.policies,
            problems: self.problems(),
            unreadable: self.unreadable_reason(),
            barred: &self.barred,
            previous: self.current.clone(),
        }
    }

    fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (file, contents) in &self.files {
            problems.extend(contents.problems(file));
        }
        problems.extend(self.troubles.values().flatten().cloned());
        problems.sort();
        problems
    }

    /// Why nobody can say who may reach whom, if so (T-19).
    fn unreadable_reason(&self) -> Option<String> {
        let cold = self.files.iter().find(|(_, contents)| contents.is_cold).map(|(file, contents)| {
            match (&contents.unread, contents.invalid.first()) {
                (Some(reason), _) => format!("{file} cannot be read: {reason}"),
                (None, Some(refused)) => Problem::from(refused).to_string(),
                (None, None) => format!("{file} cannot be read"),
            }
        });
        cold.or_else(|| self.unusable_mesh())
    }

    /// A Mesh that was never usable: its default mode may be stricter than ours.
    fn unusable_mesh(&self) -> Option<String> {
        let is_mesh = |key: &Key| key.kind == KeyKind::Own(Kind::Mesh);
        if self.held.keys().any(is_mesh) || !self.speakers.keys().any(is_mesh) {
            return None;
        }
        let problems =
            self.troubles.iter().filter(|(key, _)| is_mesh(key)).flat_map(|(_, problems)| problems);
        problems.map(Problem::to_string).next()
    }
}

impl File {
    /// What is wrong with it beside the contents of its objects.
    fn problems(&self, file: &Arc<str>) -> Vec<Problem> {
        let mut problems = Vec::new();
        if let Some(reason) = &self.unread {
            let effect = if self.is_cold {
                "everything is denied on this node until it can be read"
            } else {
                "its last good contents stay in force"
            };
            problems.push(Problem::of_file(file, format!("it cannot be read: {reason}; {effect}")));
        }
        problems.extend(self.invalid.iter().map(Problem::from));
        problems.extend(self.ignored.iter().cloned());
        problems
    }
}

impl Key {
    fn is_named(&self, kind: &str) -> bool {
        self.kind.label() == kind
    }
}

impl KeyKind {
    fn label(&self) -> &str {
        match self {
            Self::Own(Kind::Namespace) => "Namespace",
            Self::Own(Kind::ServiceAccount) => "ServiceAccount",
            Self::Own(Kind::Service) => "Service",
            Self::Own(Kind::ServiceEntry) => "ServiceEntry",
            Self::Own(Kind::Workload) => "Workload",
            Self::Own(Kind::Mesh) => "Mesh",
            Self::Policy(kind) => kind,
        }
    }
}

#[cfg(test)]
mod tests;
