//! Documents from files, read as the daemon reads its folder, with the same limits: the policies that cases refer to, and
//! whole meshes.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use node_core::{
    cases::Library,
    decode::Source,
    snapshot::Snapshot,
    store::{Store, Update},
};
use serde_json::Value;
use spiffe_id::TrustDomain;

use crate::control::file::{self, Change, FILE_BYTES_MAX, Folder};

/// A file's name and its documents.
pub(super) type OfFile = (String, Vec<Value>);

/// Files relative to a file of cases. Each path is read once, so that all cases see the same policies.
pub(super) struct Files {
    folder: PathBuf,
    loaded: RefCell<BTreeMap<String, Result<Vec<OfFile>, String>>>,
}

impl Files {
    pub(super) fn beside(cases: &Path) -> Self {
        let folder = cases.parent().map(Path::to_owned).unwrap_or_default();
        Self { folder, loaded: RefCell::default() }
    }
}

impl Library for Files {
    fn parse(&self, text: &str) -> Result<Vec<Value>, String> {
        file::parse(text)
    }

    fn load(&self, path: &str) -> Result<Vec<OfFile>, String> {
        if let Some(known) = self.loaded.borrow().get(path) {
            return known.clone();
        }
        let loaded = load(&self.folder.join(path));
        self.loaded.borrow_mut().insert(path.to_owned(), loaded.clone());
        loaded
    }
}

/// A file, or all files of a folder.
pub(super) fn load(path: &Path) -> Result<Vec<OfFile>, String> {
    if path.is_dir() {
        return Folder::new(path).scan().into_iter().map(documents).collect();
    }
    let text = file::read(path, FILE_BYTES_MAX).map_err(|reason| format!("{}: {reason}", path.display()))?;
    let documents = file::parse(&text).map_err(|reason| format!("{}: {reason}", path.display()))?;
    Ok(vec![(path.display().to_string(), documents)])
}

/// The daemon goes on with what it knew of a broken file; here nothing is known of it.
fn documents(change: Change) -> Result<OfFile, String> {
    match change {
        Change::Read { file, documents, .. } => Ok((file.to_string(), documents)),
        Change::Unreadable { file, reason, .. } => Err(format!("{file}: {reason}")),
        Change::FolderUnreadable { reason, .. } => Err(reason),
        Change::Removed { file } => Err(format!("{file}: it is gone")),
        Change::FolderReadable { .. } => Err("it changed while it was read".to_owned()),
    }
}

/// What these files say together, compiled for one node.
pub(super) fn snapshot(files: &[OfFile], node: &str, trust_domain: &TrustDomain) -> Arc<Snapshot> {
    let mut store = Store::new(node, trust_domain.clone());
    for (file, documents) in files {
        store.apply(Update::replace(file, documents.clone()));
    }
    store.snapshot()
}

/// What is wrong with the documents: the answer may hang on it.
pub(super) fn problems(snapshot: &Snapshot) -> Vec<String> {
    let of_documents = snapshot.problems().iter().map(ToString::to_string);
    let is_told = |source: &Source| {
        snapshot.problems().iter().any(|told| told.file == source.file && told.index == Some(source.index))
    };
    let refused = snapshot.statuses().iter().filter(|status| !status.accepted && !is_told(&status.source));
    let of_policies = refused.filter_map(|status| {
        let problem = status.problem.as_deref()?;
        Some(format!("{}: {} {}: {problem}", status.source.file, status.kind, status.name))
    });
    of_documents.chain(of_policies).collect()
}
