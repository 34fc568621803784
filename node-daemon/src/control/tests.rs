//! A folder's changes become updates, what was good stays, and a restart knows it.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use node_core::snapshot::Snapshot;
use tokio::{sync::watch, time::timeout};

use super::{
    ControlConfig, Handle,
    file::{
        self, ALIASED_NODES_MAX, Change, DEPTH_MAX, DOCUMENTS_MAX, FILE_BYTES_MAX, FILES_MAX, Folder,
        NODES_MAX, NOTICES_MAX, SETTLE, SETTLE_MAX, Watched, quiet,
    },
    last_good::{LastGood, LastGoodError, Remembered, Texts},
    start,
};
use crate::telemetry::Sink;

/// Longest wait for a snapshot; one comes within a tenth of a second.
const WAIT: Duration = Duration::from_secs(20);

/// A node's folders, removed with it.
struct Node {
    base: PathBuf,
    /// Of the folder.
    name: &'static str,
    events: Sink,
}

impl Node {
    fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let base = std::env::temp_dir().join(format!("culvert-control-{}-{number}", std::process::id()));
        fs::create_dir_all(base.join("mesh.d")).unwrap();
        Self { base, name: "mesh.d", events: Sink::new() }
    }

    fn folder(&self) -> PathBuf {
        self.base.join(self.name)
    }

    fn last_good(&self) -> PathBuf {
        self.base.join("last-good")
    }

    fn put(&self, file: &str, text: &str) {
        // Hidden files do not count, so nobody sees half a file.
        let beside = self.folder().join(".beside");
        fs::write(&beside, text).unwrap();
        fs::rename(beside, self.folder().join(file)).unwrap();
    }

    fn remove(&self, file: &str) {
        fs::remove_file(self.folder().join(file)).unwrap();
    }

    async fn start(&self) -> Handle {
        let config = ControlConfig {
            node: "node-a".to_owned(),
            trust_domain: "cluster.local".parse().unwrap(),
            folder: self.folder(),
            last_good: self.last_good(),
        };
        start(config, self.events.clone()).await
    }

    fn scan(&self, folder: &mut Folder) -> Vec<String> {
        folder.scan().iter().map(|change| self.told(change)).collect()
    }

    fn told(&self, change: &Change) -> String {
        let name = |file: &str| Path::new(file).strip_prefix(self.folder()).unwrap().display().to_string();
        match change {
            Change::Read { file, documents, .. } => format!("read {} {}", name(file), documents.len()),
            Change::Removed { file } => format!("removed {}", name(file)),
            Change::Unreadable { file, reason, .. } => format!("unreadable {}: {reason}", name(file)),
            Change::FolderUnreadable { reason, .. } => format!("folder unreadable: {reason}"),
            Change::FolderReadable { files } => format!("folder readable {}", files.len()),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.base);
    }
}

fn workload(name: &str, address: &str) -> String {
    format!(
        "apiVersion: culvert.io/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: photo, labels: \
         {{culvert.io/mesh: enabled}}}}\nspec: {{serviceAccount: web, node: node-a, addresses: [{address}], \
         networkNamespace: /run/netns/{name}}}\n"
    )
}

fn local(snapshot: &Snapshot) -> BTreeSet<String> {
    snapshot.local().map(|workload| workload.name.name.to_string()).collect()
}

fn names<const COUNT: usize>(names: [&str; COUNT]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

/// Waits for a snapshot that is so.
#[track_caller]
fn until(handle: &mut Handle, so: impl FnMut(&Arc<Snapshot>) -> bool) -> impl Future<Output = Arc<Snapshot>> {
    let snapshots: &mut watch::Receiver<Arc<Snapshot>> = &mut handle.snapshots;
    async move {
        let found = timeout(WAIT, snapshots.wait_for(so)).await.expect("the snapshot comes").unwrap();
        Arc::clone(&found)
    }
}

fn now(handle: &Handle) -> Arc<Snapshot> {
    Arc::clone(&handle.snapshots.borrow())
}

#[test]
fn a_scan_tells_what_was_added_changed_renamed_and_removed_removals_first() {
    let node = Node::new();
    let mut folder = Folder::new(&node.folder());
    assert!(node.scan(&mut folder).is_empty());
    node.put("b.yaml", "a: 1\n---\na: 2\n");
    node.put("a.yml", "a: 1\n");
    assert_eq!(node.scan(&mut folder), ["read a.yml 1", "read b.yaml 2"]);
    assert!(node.scan(&mut folder).is_empty(), "nothing changed");
    node.put("b.yaml", "a: 1\n");
    assert_eq!(node.scan(&mut folder), ["read b.yaml 1"]);
    fs::rename(node.folder().join("b.yaml"), node.folder().join("0.yaml")).unwrap();
    assert_eq!(node.scan(&mut folder), ["removed b.yaml", "read 0.yaml 1"]);
    node.remove("a.yml");
    assert_eq!(node.scan(&mut folder), ["removed a.yml"]);
}

#[test]
fn what_is_no_document_file_is_left_alone() {
    let node = Node::new();
    let mut folder = Folder::new(&node.folder());
    for name in [".hidden.yaml", "a.yaml~", "a.json", "4913", "yaml"] {
        fs::write(node.folder().join(name), "{").unwrap();
    }
    assert!(node.scan(&mut folder).is_empty());
}

#[test]
fn what_cannot_be_read_is_told_once_with_its_reason() {
    let node = Node::new();
    let mut folder = Folder::new(&node.folder());
    node.put("a.yaml", "a: 1\nb: [1\nc: 2\n");
    fs::write(node.folder().join("b.yaml"), b"a: \xff").unwrap();
    fs::create_dir(node.folder().join("c.yaml")).unwrap();
    nix::unistd::mkfifo(&node.folder().join("d.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("nowhere", node.folder().join("e.yaml")).unwrap();
    node.put("f.yaml", &"#".repeat(usize::try_from(FILE_BYTES_MAX).unwrap() + 1));
    node.put("g.yaml", &"#".repeat(usize::try_from(FILE_BYTES_MAX).unwrap()));
    node.put("h.yaml", "a: 1\na: 2\n");
    let told = node.scan(&mut folder);
    let expected = [
        ("unreadable a.yaml: ", "line"),
        ("unreadable b.yaml: ", "no UTF-8 at byte 3"),
        ("unreadable c.yaml: ", "no regular file"),
        ("unreadable d.yaml: ", "no regular file"),
        ("unreadable e.yaml: ", "No such file"),
        ("unreadable f.yaml: ", "more than 1048576 bytes"),
        ("read g.yaml 0", ""),
        ("unreadable h.yaml: ", "line 2"),
    ];
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for (told, (start, word)) in told.iter().zip(expected) {
        assert!(told.starts_with(start) && told.contains(word) && !told.contains('\n'), "{told}");
    }
    assert!(node.scan(&mut folder).is_empty(), "told once");
}

#[test]
fn a_folder_with_too_many_files_or_none_at_all_is_unreadable_and_changes_nothing() {
    let node = Node::new();
    let mut folder = Folder::new(&node.folder());
    for number in 0..FILES_MAX {
        fs::write(node.folder().join(format!("{number}.yaml")), "").unwrap();
    }
    assert_eq!(node.scan(&mut folder).len(), FILES_MAX, "the limit itself is allowed");
    fs::write(node.folder().join("one-more.yaml"), "").unwrap();
    let told = node.scan(&mut folder);
    assert_eq!(told.len(), 1);
    assert!(told[0].contains("more than 1024 files"), "{told:?}");
    assert!(node.scan(&mut folder).is_empty(), "told once");
    node.remove("one-more.yaml");
    let told = node.scan(&mut folder);
    assert_eq!(told[0], format!("folder readable {FILES_MAX}"));
    assert_eq!(told.len(), 1 + FILES_MAX, "all is told anew");
    fs::remove_dir_all(node.folder()).unwrap();
    assert!(node.scan(&mut folder)[0].starts_with("folder unreadable: "));
}

#[test]
fn nulls_inside_a_document_survive_and_empty_documents_do_not() {
    // Policy A-2: `mtls: null` is a rule, an absent key is none.
    let documents =
        file::parse("---\n---\nspec: {peers: [{mtls: null}, {mtls: }, {mtls: ~}, {}]}\n---\n").unwrap();
    assert_eq!(documents.len(), 1);
    let peers = &documents[0]["spec"]["peers"];
    for peer in 0..3 {
        assert_eq!(peers[peer].get("mtls"), Some(&serde_json::Value::Null), "{peers}");
    }
    assert_eq!(peers[3].get("mtls"), None);
}

#[test]
fn a_bomb_of_aliases_is_refused() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..9 {
        let before = format!("*a{}, ", level - 1).repeat(10);
        text += &format!("a{level}: &a{level} [{}]\n", before.trim_end_matches(", "));
    }
    assert!(file::parse(&text).is_err());
}

#[test]
fn the_limit_of_aliases_is_exact() {
    // A list of 98 is a hundred nodes: its beginning and its end count too.
    let text = |aliases: usize| {
        format!("base: &base [{}]\nlist: [{}]\n", ["x"; 98].join(", "), vec!["*base"; aliases].join(", "))
    };
    assert!(file::parse(&text(ALIASED_NODES_MAX / 100)).is_ok());
    let refused = file::parse(&text(ALIASED_NODES_MAX / 100 + 1)).unwrap_err();
    assert!(refused.contains("alias"), "{refused}");
}

#[test]
fn the_limits_of_a_file_s_contents_are_exact() {
    let documents = |count| "---\na: 1\n".repeat(count);
    // The list itself is one.
    let nodes = |count| format!("- {}", "x\n- ".repeat(count - 2) + "x");
    let depth = |levels| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    for (what, within, beyond) in [
        ("documents", documents(DOCUMENTS_MAX), documents(DOCUMENTS_MAX + 1)),
        ("nodes", nodes(NODES_MAX), nodes(NODES_MAX + 1)),
        ("depth", depth(DEPTH_MAX), depth(DEPTH_MAX + 1)),
    ] {
        assert!(within.len() as u64 <= FILE_BYTES_MAX, "{what}: the file itself is within its limit");
        let parsed = file::parse(&within).map(|documents| documents.len());
        assert!(parsed.is_ok(), "{what}: {parsed:?}");
        let refused = file::parse(&beyond).unwrap_err();
        assert!(refused.contains(what), "{what}: {refused}");
    }
}

#[tokio::test(start_paused = true)]
async fn changes_in_a_row_put_off_the_reading_only_so_long() {
    let (notice, mut notices) = tokio::sync::mpsc::channel(NOTICES_MAX);
    let before = tokio::time::Instant::now();
    quiet(&mut notices).await;
    assert_eq!(before.elapsed(), SETTLE, "without a further notice");
    let restless = tokio::spawn(async move {
        loop {
            tokio::time::sleep(SETTLE / 2).await;
            let _ = notice.try_send(());
        }
    });
    let before = tokio::time::Instant::now();
    quiet(&mut notices).await;
    assert_eq!(before.elapsed(), SETTLE_MAX);
    restless.abort();
}

#[tokio::test]
async fn more_changes_than_notices_wait_for_are_all_read() {
    let node = Node::new();
    let mut watched = Watched::new(&node.folder());
    assert!(watched.scan().await.is_empty());
    for number in 0..50 * NOTICES_MAX {
        node.put(&format!("{number}.yaml"), "");
    }
    assert_eq!(watched.changed().await.len(), 50 * NOTICES_MAX);
}

#[test]
fn last_good_documents_are_kept_up_to_the_limit() {
    // T-19
    let node = Node::new();
    let of_length = |bytes: usize| Remembered {
        folder: "/mesh.d".to_owned(),
        files: [("a.yaml".to_owned(), Texts { good: Some("#".repeat(bytes)), parsed: None })].into(),
    };
    LastGood::new(&node.last_good()).keep(&of_length(1)).unwrap();
    let around = fs::metadata(node.last_good()).unwrap().len() - 1;
    let mut kept = LastGood::within(&node.last_good(), around + 100);
    kept.keep(&of_length(100)).unwrap();
    assert_eq!(kept.read().unwrap(), Some(of_length(100)), "at the limit");
    let refused = kept.keep(&of_length(101)).unwrap_err();
    assert!(refused.to_string().contains("at most"), "{refused}");
    assert_eq!(kept.read().unwrap(), Some(of_length(100)), "what was kept before stays");

    LastGood::new(&node.last_good()).keep(&of_length(101)).unwrap();
    assert!(matches!(kept.read(), Err(LastGoodError::Damaged { .. })), "a longer one is not used");
}

#[tokio::test]
async fn changes_of_the_folder_become_snapshots() {
    let node = Node::new();
    node.put("a.yaml", &workload("a", "10.8.1.1"));
    let mut handle = node.start().await;
    assert_eq!(local(&now(&handle)), names(["a"]), "the first snapshot is full");
    node.put("b.yaml", &workload("b", "10.8.1.2"));
    until(&mut handle, |snapshot| local(snapshot) == names(["a", "b"])).await;
    node.put("b.yaml", &workload("c", "10.8.1.3"));
    until(&mut handle, |snapshot| local(snapshot) == names(["a", "c"])).await;
    fs::rename(node.folder().join("b.yaml"), node.folder().join("z.yaml")).unwrap();
    let renamed = until(&mut handle, |snapshot| snapshot.number() > 4).await;
    assert_eq!(local(&renamed), names(["a", "c"]));
    assert!(renamed.problems().is_empty(), "{:?}", renamed.problems());
    node.remove("a.yaml");
    until(&mut handle, |snapshot| local(snapshot) == names(["c"])).await;
    handle.stop().await;
}

#[tokio::test]
async fn a_folder_whose_files_point_through_one_link_is_exchanged_as_a_whole() {
    let node = Node::new();
    for (version, name, address) in [("..1", "a", "10.8.1.1"), ("..2", "b", "10.8.1.2")] {
        fs::create_dir(node.folder().join(version)).unwrap();
        fs::write(node.folder().join(version).join("mesh.yaml"), workload(name, address)).unwrap();
    }
    symlink("..1", node.folder().join("..data")).unwrap();
    symlink("..data/mesh.yaml", node.folder().join("mesh.yaml")).unwrap();
    let mut handle = node.start().await;
    assert_eq!(local(&now(&handle)), names(["a"]));
    symlink("..2", node.folder().join("..data_tmp")).unwrap();
    fs::rename(node.folder().join("..data_tmp"), node.folder().join("..data")).unwrap();
    until(&mut handle, |snapshot| local(snapshot) == names(["b"])).await;
    handle.stop().await;
}

#[tokio::test]
async fn a_file_that_breaks_changes_nothing_that_worked_and_is_named() {
    let node = Node::new();
    node.put("a.yaml", &workload("a", "10.8.1.1"));
    let mut handle = node.start().await;
    node.put("a.yaml", "kind: [\n");
    let broken = until(&mut handle, |snapshot| !snapshot.problems().is_empty()).await;
    assert_eq!(local(&broken), names(["a"]));
    assert_eq!(broken.unreadable(), None);
    assert!(broken.problems()[0].to_string().contains("a.yaml"), "{:?}", broken.problems());
    node.put("a.yaml", &workload("b", "10.8.1.1"));
    let mended = until(&mut handle, |snapshot| snapshot.problems().is_empty()).await;
    assert_eq!(local(&mended), names(["b"]));
    handle.stop().await;
}

#[tokio::test]
async fn a_new_file_that_is_broken_changes_nothing_that_worked_also_after_a_restart() {
    let node = Node::new();
    node.put("a.yaml", &workload("a", "10.8.1.1"));
    let mut handle = node.start().await;
    for text in ["kind: AuthorizationPolicy\n", "kind: [\n"] {
        node.put("new.yaml", text);
        let broken = until(&mut handle, |snapshot| !snapshot.problems().is_empty()).await;
        assert_eq!(broken.unreadable(), None);
        assert!(broken.problems()[0].to_string().contains("new.yaml"), "{:?}", broken.problems());
        node.remove("new.yaml");
        until(&mut handle, |snapshot| snapshot.problems().is_empty()).await;
    }
    handle.stop().await;
    node.put("new.yaml", "kind: [\n");
    let handle = node.start().await;
    assert_eq!(now(&handle).unreadable(), None, "a whole set was in force before");
    assert_eq!(local(&now(&handle)), names(["a"]));
    assert_eq!(now(&handle).problems().len(), 1);
    handle.stop().await;
}

#[tokio::test]
async fn last_good_documents_of_another_folder_are_no_last_good_set() {
    // T-19
    let mut node = Node::new();
    node.put("a.yaml", &workload("a", "10.8.1.1"));
    node.start().await.stop().await;
    node.name = "other.d";
    fs::create_dir(node.folder()).unwrap();
    node.put("a.yaml", "kind: [\n");
    let handle = node.start().await;
    assert!(now(&handle).unreadable().is_some());
    handle.stop().await;
}

#[tokio::test]
async fn a_file_that_is_broken_at_a_cold_start_denies_everything_until_it_is_mended() {
    // T-19
    let node = Node::new();
    node.put("a.yaml", &workload("a", "10.8.1.1"));
    node.put("policy.yaml", "kind: [\n");
    let handle = node.start().await;
    assert!(now(&handle).unreadable().is_some());
    handle.stop().await;
    let mut handle = node.start().await;
    assert!(now(&handle).unreadable().is_some(), "a second start knows no more than the first");
    node.put("policy.yaml", "");
    let mended = until(&mut handle, |snapshot| snapshot.unreadable().is_none()).await;
    assert_eq!(local(&mended), names(["a"]));
    handle.stop().await;
}

#[tokio::test]
async fn at_a_cold_start_the_last_good_documents_stand_in_for_a_broken_file_and_that_is_said() {
    // T-19
    let node = Node::new();
    node.put("a.yaml", &workload("a", "10.8.1.1"));
    node.put("b.yaml", &workload("b", "10.8.1.2"));
    node.start().await.stop().await;
    assert_eq!(fs::metadata(node.last_good()).unwrap().permissions().mode() & 0o777, 0o600);
    node.put("a.yaml", "kind: [\n");
    node.remove("b.yaml");
    let handle = node.start().await;
    let snapshot = now(&handle);
    assert_eq!(local(&snapshot), names(["a"]), "the broken file's stand, the removed file's do not");
    assert_eq!(snapshot.unreadable(), None);
    let documents = handle.documents.borrow().clone();
    assert_eq!(documents.from_last_good.len(), 1);
    assert!(documents.from_last_good[0].ends_with("a.yaml"), "{documents:?}");
    handle.stop().await;
    // What stood in once stands in again.
    let handle = node.start().await;
    assert_eq!(local(&now(&handle)), names(["a"]));
    handle.stop().await;
}

#[tokio::test]
async fn an_object_that_broke_while_the_daemon_was_away_keeps_its_last_good_version() {
    // T-19
    let node = Node::new();
    node.put("a.yaml", &workload("a", "10.8.1.1"));
    node.start().await.stop().await;
    node.put("a.yaml", &(workload("a", "nonsense") + "---\n" + &workload("b", "10.8.1.2")));
    for start in ["first", "second"] {
        let handle = node.start().await;
        let snapshot = now(&handle);
        assert_eq!(local(&snapshot), names(["a", "b"]), "{start} start");
        assert_eq!(snapshot.problems().len(), 1, "{:?}", snapshot.problems());
        assert!(handle.documents.borrow().from_last_good.is_empty(), "the file itself can be read");
        handle.stop().await;
    }
}

#[tokio::test]
async fn an_object_that_moved_to_another_file_while_the_daemon_was_away_is_no_contradiction() {
    for (from, to) in [("a.yaml", "b.yaml"), ("b.yaml", "a.yaml")] {
        let node = Node::new();
        node.put(from, &workload("w", "10.8.1.1"));
        node.put(to, "");
        node.start().await.stop().await;
        node.put(to, &workload("w", "10.8.1.1"));
        node.put(from, "");
        let handle = node.start().await;
        assert_eq!(local(&now(&handle)), names(["w"]));
        assert!(now(&handle).problems().is_empty(), "{:?}", now(&handle).problems());
        handle.stop().await;
    }
}

#[tokio::test]
async fn a_damaged_or_open_file_of_last_good_documents_is_not_used() {
    // T-19
    let damages: [fn(&Path); 4] = [
        |path| {
            let text = fs::read_to_string(path).unwrap().replace("10.8.1.1", "10.8.1.9");
            fs::write(path, text).unwrap();
        },
        |path| fs::set_permissions(path, fs::Permissions::from_mode(0o640)).unwrap(),
        |path| fs::write(path, "").unwrap(),
        |path| {
            let kept = path.with_extension("kept");
            fs::rename(path, &kept).unwrap();
            symlink(kept, path).unwrap();
        },
    ];
    for damage in damages {
        let node = Node::new();
        node.put("a.yaml", &workload("a", "10.8.1.1"));
        node.start().await.stop().await;
        damage(&node.last_good());
        node.put("a.yaml", "kind: [\n");
        let handle = node.start().await;
        assert!(now(&handle).unreadable().is_some(), "denies");
        assert_eq!(local(&now(&handle)), names([]));
        handle.stop().await;
    }
}

#[tokio::test]
async fn a_folder_that_vanishes_leaves_everything_in_force_and_comes_back() {
    let node = Node::new();
    node.put("a.yaml", &workload("a", "10.8.1.1"));
    node.put("b.yaml", &workload("b", "10.8.1.2"));
    let mut handle = node.start().await;
    let away = node.base.join("away");
    fs::rename(node.folder(), &away).unwrap();
    let gone = until(&mut handle, |snapshot| !snapshot.problems().is_empty()).await;
    assert_eq!(local(&gone), names(["a", "b"]));
    assert_eq!(gone.unreadable(), None);
    assert!(handle.documents.borrow().folder_problem.is_some());
    fs::remove_file(away.join("b.yaml")).unwrap();
    fs::rename(away, node.folder()).unwrap();
    let back = until(&mut handle, |snapshot| snapshot.problems().is_empty()).await;
    assert_eq!(local(&back), names(["a"]));
    handle.stop().await;
}

#[tokio::test]
async fn a_folder_that_is_missing_at_a_cold_start_denies_everything_until_it_is_there() {
    // T-19
    let node = Node::new();
    fs::remove_dir(node.folder()).unwrap();
    let mut handle = node.start().await;
    assert!(now(&handle).unreadable().is_some());
    fs::create_dir(node.folder()).unwrap();
    node.put("a.yaml", &workload("a", "10.8.1.1"));
    let there = until(&mut handle, |snapshot| snapshot.unreadable().is_none()).await;
    assert_eq!(local(&there), names(["a"]));
    handle.stop().await;
}
