//! Which identity runs on which node, from a folder (or a file) of YAML documents that is watched.
//!
//! Read are documents of `kind: Workload` (`metadata.namespace`, `spec.serviceAccount`, `spec.node`); all other kinds
//! are other people's. A file that does not parse keeps the last good content of that file, and says what is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{EventKind, RecursiveMode, Watcher as _};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use spiffe_id::{NodeId, SpiffeId, TrustDomain};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Seconds between two readings of the folder without an event: events of a folder that was moved into place are lost.
const POLL: Duration = Duration::from_secs(60);

/// How long to wait after an event for those that belong to it: an editor writes a file in several steps.
const SETTLE: Duration = Duration::from_millis(50);

/// Largest file that is read, in bytes: 20,000 workloads of 400 bytes. A larger one is refused like one that does not
/// parse.
const FILE_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Documents of one file: as many of 256 bytes as [`FILE_BYTES_MAX`] holds. Of more the file is refused like one that does
/// not parse.
const DOCUMENTS_MAX: usize = 32_768;

/// Scalars, lists and maps of one file: thirty for each of so many documents. Of more the file is refused.
const NODES_MAX: usize = 1_000_000;

/// Nodes that aliases of one file may stand for, beyond what is written. Of more the file is refused.
const ALIASED_NODES_MAX: usize = 100_000;

/// How deep lists and maps of one file nest; ten levels are what objects have. A deeper file is refused.
const DEPTH_MAX: usize = 64;

/// Most files that are read: ten for each of a thousand nodes. Of more, the first by name are read, so that the same ones
/// stay in force from one reading to the next; how many are ignored is logged and stands in the status.
const FILES_MAX: usize = 10_000;

const WORKLOAD: &str = "Workload";
const GROUP: &str = "culvert.io/";

/// Which (namespace, service account) pairs run on which node. Immutable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Assignments {
    by_node: BTreeMap<String, BTreeSet<(String, String)>>,
}

impl Assignments {
    /// Whether any workload is on that node.
    pub(crate) fn knows_node(&self, node: &str) -> bool {
        self.by_node.contains_key(node)
    }

    /// Whether a workload of that service account is on that node.
    pub(crate) fn runs_on(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        let pair = (namespace.to_owned(), service_account.to_owned());
        self.by_node.get(node).is_some_and(|pairs| pairs.contains(&pair))
    }

    pub(crate) fn nodes(&self) -> usize {
        self.by_node.len()
    }

    pub(crate) fn identities(&self) -> usize {
        self.by_node.values().map(BTreeSet::len).sum()
    }

    fn add(&mut self, workload: &Workload) {
        let pair = (workload.namespace.clone(), workload.service_account.clone());
        self.by_node.entry(workload.node.clone()).or_default().insert(pair);
    }
}

/// What the files say, with what is wrong with them.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    pub(crate) assignments: Assignments,
    /// File -> what is wrong with it.
    pub(crate) problems: BTreeMap<PathBuf, String>,
}

/// Watches the registry until cancelled. The first reading is done when this returns.
///
/// # Errors
/// The folder cannot be read at all.
pub(crate) fn start(path: &Path, cancel: CancellationToken) -> std::io::Result<watch::Receiver<Arc<View>>> {
    let mut files = Files::new(path, FILES_MAX);
    files.read()?;
    let (sender, receiver) = watch::channel(Arc::new(files.view()));
    let (wake, woken) = mpsc::channel(1);
    tokio::spawn(follow(files, sender, wake, woken, cancel));
    Ok(receiver)
}

async fn follow(
    mut files: Files,
    publish: watch::Sender<Arc<View>>,
    wake: mpsc::Sender<()>,
    mut woken: mpsc::Receiver<()>,
    cancel: CancellationToken,
) {
    // Kept alive for its events. Without it the poll alone notices changes.
    let _watcher = watcher(&files.path, wake)
        .inspect_err(|error| tracing::warn!(%error, path = %files.path.display(), "the registry is polled, it cannot be watched"));
    // What changed between the first reading and the start of the watch.
    let mut next = Duration::ZERO;
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(next) => {}
            Some(()) = woken.recv() => {
                tokio::time::sleep(SETTLE).await;
                while woken.try_recv().is_ok() {}
            }
        }
        next = POLL;
        files = match tokio::task::spawn_blocking(move || read_again(files)).await {
            Ok(files) => files,
            Err(error) => {
                tracing::error!(%error, "the registry is no longer followed");
                return;
            }
        };
        let view = files.view();
        publish.send_if_modified(|current| {
            let changed = current.assignments != view.assignments || current.problems != view.problems;
            if changed {
                tracing::info!(
                    nodes = view.assignments.nodes(),
                    identities = view.assignments.identities(),
                    problems = view.problems.len(),
                    "registry changed"
                );
                *current = Arc::new(view);
            }
            changed
        });
    }
}

fn read_again(mut files: Files) -> Files {
    if let Err(error) = files.read() {
        tracing::warn!(%error, path = %files.path.display(), "the registry cannot be read, what it said last stays in force");
    }
    files
}

/// Watches the folder, not the files: editors and Kubernetes volumes put new files in place of old ones.
fn watcher(path: &Path, wake: mpsc::Sender<()>) -> notify::Result<notify::RecommendedWatcher> {
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading is no news. A full channel means that a reading is due anyway.
        if !event.is_ok_and(|event| matches!(event.kind, EventKind::Access(_))) {
            let _ = wake.try_send(());
        }
    })?;
    watcher.watch(folder, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

/// The files as last read.
struct Files {
    path: PathBuf,
    read: BTreeMap<PathBuf, FileState>,
    files_max: usize,
    /// How many documents the last reading left out.
    ignored: usize,
}

#[derive(Default)]
struct FileState {
    /// Hash of the content that was last looked at, so that a bad file is logged once.
    seen: Option<[u8; 32]>,
    good: Vec<Workload>,
    problem: Option<String>,
}

impl Files {
    fn new(path: &Path, files_max: usize) -> Self {
        Self { path: path.to_owned(), read: BTreeMap::new(), files_max, ignored: 0 }
    }

    fn read(&mut self) -> std::io::Result<()> {
        let (present, ignored) = self.list()?;
        if ignored != self.ignored {
            tracing::warn!(path = %self.path.display(), ignored, limit = self.files_max, "files in the registry are ignored");
        }
        self.ignored = ignored;
        self.read.retain(|path, _| present.contains(path));
        for path in present {
            self.read.entry(path.clone()).or_default().read(&path);
        }
        Ok(())
    }

    /// The documents to read, and how many there are besides.
    fn list(&self) -> std::io::Result<(BTreeSet<PathBuf>, usize)> {
        if !std::fs::metadata(&self.path)?.is_dir() {
            return Ok(([self.path.clone()].into(), 0));
        }
        let (mut found, mut ignored) = (BTreeSet::new(), 0);
        for entry in std::fs::read_dir(&self.path)? {
            let path = entry?.path();
            if !is_document(&path) {
                continue;
            }
            found.insert(path);
            if found.len() > self.files_max {
                found.pop_last();
                ignored += 1;
            }
        }
        Ok((found, ignored))
    }

    fn view(&self) -> View {
        let mut view = View::default();
        for (path, file) in &self.read {
            file.good.iter().for_each(|workload| view.assignments.add(workload));
            if let Some(problem) = &file.problem {
                view.problems.insert(path.clone(), problem.clone());
            }
        }
        if self.ignored > 0 {
            let problem = format!(
                "{} files beyond the first {} by name are ignored: put several documents into one file",
                self.ignored, self.files_max
            );
            view.problems.insert(self.path.clone(), problem);
        }
        view
    }
}

impl FileState {
    fn read(&mut self, path: &Path) {
        let text = match read_text(path) {
            Ok(text) => text,
            Err(problem) => {
                self.seen = None;
                return self.refuse(path, problem);
            }
        };
        let hash: [u8; 32] = Sha256::digest(&text).into();
        if self.seen == Some(hash) {
            return;
        }
        self.seen = Some(hash);
        match workloads(&text) {
            Ok(workloads) => {
                self.good = workloads;
                self.problem = None;
            }
            Err(problem) => self.refuse(path, problem),
        }
    }

    fn refuse(&mut self, path: &Path, problem: String) {
        if self.problem.as_ref() != Some(&problem) {
            tracing::warn!(file = %path.display(), %problem, "registry file refused, its last good content stays in force");
        }
        self.problem = Some(problem);
    }
}

fn is_document(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let extension = path.extension().and_then(|extension| extension.to_str());
    !hidden && matches!(extension, Some("yaml" | "yml" | "json")) && path.is_file()
}

fn read_text(path: &Path) -> Result<String, String> {
    let bytes = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(format!("it has {bytes} bytes, expected at most {FILE_BYTES_MAX}: split it"));
    }
    std::fs::read_to_string(path).map_err(|error| error.to_string())
}

/// The three fields of a workload document that matter to the authority.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Workload {
    namespace: String,
    service_account: String,
    node: String,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "apiVersion", default)]
    api_version: serde_json::Value,
    #[serde(default)]
    kind: serde_json::Value,
}

/// Every workload of a stream of documents.
fn workloads(text: &str) -> Result<Vec<Workload>, String> {
    workloads_within(text, NODES_MAX)
}

fn workloads_within(text: &str, nodes_max: usize) -> Result<Vec<Workload>, String> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_documents: DOCUMENTS_MAX,
            max_nodes: nodes_max,
            // Each node is an event, and each list, map and document ends with one more.
            max_events: nodes_max.saturating_mul(3),
            max_depth: DEPTH_MAX,
            // The limit of what aliases stand for says more than their number.
            enforce_alias_anchor_ratio: false,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: ALIASED_NODES_MAX },
    };
    let documents: Vec<serde_json::Value> =
        serde_saphyr::from_multiple_with_options(text, options).map_err(|error| error.to_string())?;
    let mut found = Vec::new();
    for (index, document) in documents.iter().enumerate() {
        // A document that is not even an object with a kind says nothing to anyone; the nodes complain about it.
        let Ok(kind) = Kind::deserialize(document) else { continue };
        let ours = kind.api_version.as_str().is_some_and(|version| version.starts_with(GROUP));
        if ours && kind.kind.as_str() == Some(WORKLOAD) {
            found.push(workload(document).map_err(|problem| format!("document {}: {problem}", index + 1))?);
        }
    }
    Ok(found)
}

fn workload(document: &serde_json::Value) -> Result<Workload, String> {
    let field = |pointer: &str, name: &str| match document.pointer(pointer) {
        Some(serde_json::Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("{name} is {other}, expected a name")),
        None => Err(format!("{name} is missing, expected a name")),
    };
    let workload = Workload {
        namespace: field("/metadata/namespace", "metadata.namespace")?,
        service_account: field("/spec/serviceAccount", "spec.serviceAccount")?,
        node: field("/spec/node", "spec.node")?,
    };
    check_names(&workload)?;
    Ok(workload)
}

/// A name that no certificate can carry is refused where it is written, not where it is asked for.
fn check_names(workload: &Workload) -> Result<(), String> {
    let any: TrustDomain = "any".parse().map_err(|error| format!("{error}"))?;
    SpiffeId::new(any.clone(), &workload.namespace, &workload.service_account).map_err(|error| {
        format!(
            "metadata.namespace {:?} with spec.serviceAccount {:?} is no identity: {error}",
            workload.namespace, workload.service_account
        )
    })?;
    NodeId::new(any, &workload.node)
        .map_err(|error| format!("spec.node {:?} is no node's name: {error}", workload.node))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "apiVersion: culvert.io/v1alpha1\nkind: Workload\nmetadata: {name: a-0, namespace: shop}\n\
                        spec: {serviceAccount: cart, node: node-a, addresses: [10.0.0.1]}\n";

    fn names(text: &str) -> Vec<(String, String, String)> {
        let found = workloads(text).expect("a good file");
        found.into_iter().map(|w| (w.namespace, w.service_account, w.node)).collect()
    }

    fn cart() -> (String, String, String) {
        ("shop".into(), "cart".into(), "node-a".into())
    }

    #[test]
    fn only_workloads_count() {
        assert_eq!(names(""), []);
        assert_eq!(names(GOOD), [cart()]);
        let others = "kind: Service\nmetadata: 3\nspec: [1]\n---\n- a list\n---\njust text\n---\n";
        let foreign = "---\napiVersion: example.com/v1\nkind: Workload\nspec: {}\n";
        assert_eq!(names(&format!("{others}{GOOD}{foreign}")), [cart()]);
    }

    #[test]
    fn a_bad_document_is_refused_by_field() {
        for (text, parts) in [
            (GOOD.replace("node: node-a, ", ""), &["document 1", "spec.node is missing"][..]),
            (GOOD.replace(", namespace: shop", ""), &["metadata.namespace is missing"]),
            (GOOD.replace("serviceAccount: cart", "serviceAccount: 7"), &["spec.serviceAccount is 7"]),
            (GOOD.replace("node-a", "node/a"), &["spec.node \"node/a\"", "'/'"]),
            (GOOD.replace("cart", "../ca"), &["spec.serviceAccount \"../ca\"", "is no identity"]),
            (format!("kind: X\n---\n{}", GOOD.replace("node-a", "''")), &["document 2", "empty"]),
        ] {
            let problem = workloads(&text).expect_err("a bad file");
            for part in parts {
                assert!(problem.contains(part), "{problem:?} does not say {part:?}");
            }
        }
        workloads("a: [1").expect_err("not YAML");
        workloads("a: 1\na: 2").expect_err("a key twice");
    }

    #[test]
    fn a_bad_file_keeps_its_last_good_content_and_a_removed_one_loses_it() {
        let folder = Folder::new("registry");
        let (one, two) = (folder.0.join("one.yaml"), folder.0.join("two.yml"));
        std::fs::write(&one, GOOD).expect("written");
        std::fs::write(&two, GOOD.replace("cart", "till")).expect("written");
        std::fs::write(folder.0.join(".hidden.yaml"), "a: [").expect("written");
        std::fs::write(folder.0.join("notes.txt"), "a: [").expect("written");
        let mut files = Files::new(&folder.0, FILES_MAX);
        files.read().expect("readable");
        let runs = |files: &Files, account| files.view().assignments.runs_on("node-a", "shop", account);
        assert!(runs(&files, "cart") && runs(&files, "till") && files.view().problems.is_empty());

        std::fs::write(&one, "a: [").expect("written");
        files.read().expect("readable");
        assert!(runs(&files, "cart"), "the last good content stays in force");
        assert_eq!(files.view().problems.keys().collect::<Vec<_>>(), [&one]);

        std::fs::remove_file(&two).expect("removed");
        std::fs::write(&one, GOOD).expect("written");
        files.read().expect("readable");
        assert!(runs(&files, "cart") && !runs(&files, "till") && files.view().problems.is_empty());
        assert!(!files.view().assignments.knows_node("node-b"));
    }

    #[test]
    fn the_limits_of_a_files_contents_are_exact() {
        let documents = |count| "---\na: 1\n".repeat(count);
        // The list itself is one.
        let nodes = |count: usize| format!("- {}x", "x\n- ".repeat(count - 2));
        let depth = |levels| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        // A list of 98 is a hundred nodes: its beginning and its end count too.
        let aliases = |count| {
            format!("base: &base [{}]\nlist: [{}]\n", ["x"; 98].join(", "), vec!["*base"; count].join(", "))
        };
        for (what, within, beyond) in [
            ("documents", documents(DOCUMENTS_MAX), documents(DOCUMENTS_MAX + 1)),
            ("depth", depth(DEPTH_MAX), depth(DEPTH_MAX + 1)),
            ("alias", aliases(ALIASED_NODES_MAX / 100), aliases(ALIASED_NODES_MAX / 100 + 1)),
        ] {
            assert!(within.len() as u64 <= FILE_BYTES_MAX, "{what}: the file itself is within its limit");
            assert_eq!(names(&within), [], "{what}");
            let refused = workloads(&beyond).expect_err("above the limit");
            assert!(refused.contains(what), "{what}: {refused}");
        }
        workloads_within(&nodes(1_000), 1_000).expect("at the limit");
        let refused = workloads_within(&nodes(1_001), 1_000).expect_err("above the limit");
        assert!(refused.contains("nodes"), "{refused}");
    }

    #[test]
    fn a_file_of_as_many_workloads_as_are_reckoned_with_is_read() {
        let text = format!("{GOOD}---\n").repeat(20_000);
        assert_eq!(names(&text).len(), 20_000);
    }

    #[test]
    fn a_file_above_the_limit_is_refused() {
        let folder = Folder::new("registry-limit");
        let path = folder.0.join("big.yaml");
        let file = std::fs::File::create(&path).expect("made");
        file.set_len(FILE_BYTES_MAX + 1).expect("sized");
        assert!(read_text(&path).expect_err("too large").contains("split it"));
        file.set_len(FILE_BYTES_MAX).expect("sized");
        read_text(&path).expect("at the limit");
    }

    #[test]
    fn of_too_many_files_the_first_by_name_are_read_and_the_others_are_told() {
        let folder = Folder::new("registry-files");
        // The folder lists them in an order of its own.
        for name in ["c", "a", "d", "b"] {
            std::fs::write(folder.0.join(format!("{name}.yaml")), GOOD.replace("cart", name))
                .expect("written");
        }
        for (files_max, in_force, ignored) in [(4, "abcd", 0), (3, "abc", 1), (2, "ab", 2)] {
            let mut files = Files::new(&folder.0, files_max);
            files.read().expect("readable");
            let view = files.view();
            let runs: String = "abcd"
                .chars()
                .filter(|name| view.assignments.runs_on("node-a", "shop", &name.to_string()))
                .collect();
            assert_eq!(runs, in_force);
            let told = view
                .problems
                .get(&folder.0)
                .map(|problem| problem.starts_with(&format!("{ignored} files beyond")));
            assert_eq!(told, (ignored > 0).then_some(true), "{:?}", view.problems);
        }
    }

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("culvert-ca-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).expect("made");
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}
