//! The audit log of a real daemon: what was decided stands in it, and `culvert audit verify` tells whether it is as it was
//! written.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use world::expect::{LINE_TIME_MAX, is};
use world::node::Node;
use world::pod::{Family, Pod};
use world::protocol::{Asked, Connect};

use crate::cases::Cases;
use crate::photo::{ECHO, HTTP, NEEDLE, Photo};
use crate::policies::{STRICT, authorization};

const FRONTEND: &str = "cluster.local/ns/photo/sa/photo-frontend";

/// A checkpoint after few records, and soon.
const AUDIT: &str = "audit: {checkpointRecords: 8, checkpointSeconds: 1}\n";

#[test]
fn audit() {
    let photo = Photo::prepare(&[("strict.yaml", STRICT), ("audit.yaml", &documents())]);
    photo.world.start_ca();
    photo.b.set(|settings| settings.more = AUDIT.to_owned());
    photo.world.start_daemons_of(&[&photo.a, &photo.b]);
    let mut cases = Cases::of("audit");
    let mut case = |sentence: &str, body: fn(&Photo)| {
        cases.case(sentence, || {
            photo.revive();
            body(&photo);
        });
    };
    case("each decision stands in the log, and after SIGTERM it holds by the root alone", decisions);
    case("after a kill -9 the log goes on, holds, and says what happened", killed);
    case("a line that the crash cut is removed and told", torn);
    case("a successor goes on with the log while its predecessor drains (T-24)", successor);
    case("a changed copy fails by its line, another authority's root for every signature", changed);
    case("a log that was cut off fails by the number that the metrics showed", cut_off);
    case("while the disk is full nothing passes that is not recorded, if so chosen", disk_full);
    cases.end();
}

/// TCP for all of the mesh, HTTP for GET only; what the frontend does is to be recorded.
fn documents() -> String {
    let allow = format!(
        "[{{to: [{{operation: {{ports: [\"{ECHO}\"]}}}}]}}, {{to: [{{operation: {{ports: [\"{HTTP}\"], methods: [GET]}}}}]}}]"
    );
    let record = format!("[{{from: [{{source: {{principals: [{FRONTEND}]}}}}]}}]");
    format!("{}---\n{}", authorization("reads", "ALLOW", &allow), authorization("record", "AUDIT", &record))
}

fn folder(node: &Node) -> PathBuf {
    node.root().join("var/lib/culvert/audit")
}

fn request(photo: &Photo, client: &Pod, method: &str) -> Asked {
    let to = Connect::to(photo.datastore.at(Family::V4, HTTP));
    client
        .ask(to, &format!("{method} /albums?key=secret HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"))
}

fn echo(photo: &Photo, client: &Pod) -> Asked {
    client.ask(Connect::to(photo.datastore.at(Family::V4, ECHO)), NEEDLE)
}

/// What `culvert audit verify` answers: its status and its words.
fn verify(node: &Node, log: &Path, more: &[&str]) -> (Option<i32>, String) {
    let done = Command::new(world::binary("culvert"))
        .arg("--root")
        .arg(node.root())
        .args(["audit", "verify"])
        .arg(log)
        .args(more)
        .output()
        .expect("culvert can be started");
    let said = [done.stdout, done.stderr].concat();
    (done.status.code(), String::from_utf8_lossy(&said).into_owned())
}

#[track_caller]
fn holds(node: &Node) -> String {
    let (status, said) = verify(node, &folder(node), &[]);
    assert_eq!(status, Some(0), "{said}");
    assert!(said.ends_with("the log holds\n"), "{said}");
    said
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("the log is there");
    let mut files: Vec<_> = entries.map(|entry| entry.expect("it can be listed").path()).collect();
    files.sort();
    files
}

fn lines(node: &Node) -> Vec<Value> {
    let read = |file: &PathBuf| fs::read_to_string(file).expect("the log can be read");
    let text: String = files(&folder(node)).iter().map(read).collect();
    text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

/// A decision with these words at these places.
#[track_caller]
fn decided(lines: &[Value], what: &[(&str, &str)]) -> Value {
    let matches = |line: &&Value| {
        line["kind"] == "decision"
            && what.iter().all(|(key, word)| line.pointer(key) == Some(&(*word).into()))
    };
    lines.iter().find(matches).unwrap_or_else(|| panic!("no decision with {what:?}")).clone()
}

fn decisions(photo: &Photo) {
    assert!(echo(photo, &photo.frontend).text.contains(NEEDLE));
    assert!(echo(photo, &photo.backend).text.contains(NEEDLE));
    assert_eq!(echo(photo, &photo.stranger).text, "");
    assert!(request(photo, &photo.frontend, "GET").text.starts_with("HTTP/1.1 200 "));
    assert!(request(photo, &photo.frontend, "DELETE").text.starts_with("HTTP/1.1 403 "));
    photo.b.terminate();
    let said = holds(&photo.b);
    assert!(said.starts_with("log of spiffe://cluster.local/culvert/node/node-b: "), "{said}");
    assert!(said.contains("; 0 records after it"), "{said}");
    assert!(!said.contains("note: "), "{said}");
    // Another node of the mesh has the same roots; the log itself brings the rest.
    assert_eq!(verify(&photo.a, &folder(&photo.b), &[]).0, Some(0));
    let other = ["--node", "spiffe://cluster.local/culvert/node/node-a"];
    assert_eq!(verify(&photo.a, &folder(&photo.b), &other).0, Some(1));

    let lines = lines(&photo.b);
    let frontend = "spiffe://cluster.local/ns/photo/sa/photo-frontend";
    let allowed = [("/verdict", "allowed"), ("/policy", "AuthorizationPolicy/datastore/reads")];
    let marked = [("/audit", "AuthorizationPolicy/datastore/record"), ("/source/identity", frontend)];
    let one = decided(
        &lines,
        &[&allowed[..], &marked, &[("/protocol", "tcp"), ("/direction", "inbound")]].concat(),
    );
    assert!(one.get("request").is_none(), "{one}");
    let backend = "spiffe://cluster.local/ns/photo/sa/photo-backend";
    let two = decided(&lines, &[&allowed[..], &[("/source/identity", backend)]].concat());
    assert!(two.get("audit").is_none(), "{two}");
    decided(&lines, &[("/verdict", "denied"), ("/reason", "plaintext_refused")]);
    let get = decided(&lines, &[&allowed[..], &marked, &[("/request/method", "GET")]].concat());
    assert_eq!(get["request"]["path"], "/albums");
    let delete = [("/verdict", "denied"), ("/reason", "no_rule_allows"), ("/request/method", "DELETE")];
    decided(&lines, &[&delete[..], &marked].concat());
    // By which documents, as anybody may reckon it.
    assert_eq!(one["digest"], digest(&photo.b.root().join("etc/culvert/mesh.d")), "{one}");
    assert!(!lines.iter().any(|line| line.to_string().contains("secret")));
}

/// `sha256sum <folder>/*.yaml | sha256sum`
fn digest(folder: &Path) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let line = |file: PathBuf| {
        format!("{}  {}\n", hex(&Sha256::digest(fs::read(&file).expect("it can be read"))), file.display())
    };
    let all: String = files(folder).into_iter().map(line).collect();
    hex(&Sha256::digest(all.as_bytes()))
}

fn killed(photo: &Photo) {
    let before = lines(&photo.b).len();
    assert!(echo(photo, &photo.frontend).text.contains(NEEDLE));
    photo.b.kill();
    let (status, said) = verify(&photo.b, &folder(&photo.b), &[]);
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("has no stop"), "{said}");
    photo.b.start();
    assert!(echo(photo, &photo.frontend).text.contains(NEEDLE));
    photo.b.terminate();
    let said = holds(&photo.b);
    assert!(said.contains("after a run that did not end in order"), "{said}");
    let lines = lines(&photo.b);
    let kinds: Vec<_> = lines[before..].iter().filter_map(|line| line["kind"].as_str()).collect();
    let recovered = kinds.iter().position(|kind| *kind == "recovered").expect("it is told");
    assert_eq!(kinds[recovered + 1], "start");
}

/// The crash itself may come in the middle of a line; here it does.
fn torn(photo: &Photo) {
    photo.b.kill();
    let file = files(&folder(&photo.b)).pop().expect("there is a segment");
    let mut text = fs::read_to_string(&file).expect("the log can be read");
    let line = text.lines().last().expect("there are lines").to_owned();
    text.push_str(&line[..40]);
    fs::write(&file, text).expect("the log can be written");
    let log = &photo.b;
    log.start();
    log.log().wait_from(0, "that the log was repaired", LINE_TIME_MAX, |line| {
        is(line, "message", "audit recovered") && line["torn_bytes"] == 40
    });
    log.terminate();
    assert!(holds(log).contains("40 bytes of a torn line were removed"));
}

fn successor(photo: &Photo) {
    let before = lines(&photo.b).len();
    let to = photo.datastore.at(Family::V4, ECHO);
    let open = photo.frontend.connect(Connect::to(to));
    assert_eq!(photo.frontend.exchange(&open, "before").as_deref(), Ok("before"));
    photo.b.launch();
    photo.b.log().wait_from(0, "the successor is ready", LINE_TIME_MAX, |line| is(line, "message", "ready"));
    assert!(echo(photo, &photo.backend).text.contains(NEEDLE));
    photo.frontend.close(&open);
    photo.b.wait_predecessor(Duration::from_secs(20));
    assert!(echo(photo, &photo.backend).text.contains(NEEDLE));
    photo.b.terminate();
    holds(&photo.b);
    let lines = lines(&photo.b);
    let of = |kind: &str| lines[before..].iter().filter(|line| line["kind"] == kind).count();
    // The predecessor began before that.
    assert_eq!((of("start"), of("stop"), of("recovered")), (1, 2, 0));
}

/// A copy of the log, to be changed.
fn copy(photo: &Photo, name: &str) -> PathBuf {
    let copy = photo.b.root().join(name);
    fs::create_dir_all(&copy).expect("a folder can be made");
    for file in files(&folder(&photo.b)) {
        let target = copy.join(file.file_name().expect("it has a name"));
        fs::copy(&file, target).expect("a file can be copied");
    }
    copy
}

fn changed(photo: &Photo) {
    let copy = copy(photo, "changed");
    let file = files(&copy).remove(0);
    let text = fs::read_to_string(&file).expect("the copy can be read");
    let at = text.lines().position(|line| line.contains("\"denied\"")).expect("somebody was denied");
    fs::write(&file, text.replacen("\"denied\"", "\"allowed\"", 1)).expect("the copy can be written");
    let (status, said) = verify(&photo.b, &copy, &[]);
    assert_eq!(status, Some(1), "{said}");
    // The line after it shows it.
    assert!(said.contains(&format!("{}:{}: ", file.display(), at + 2)), "{said}");
    assert!(said.ends_with("the log does not hold: 1 findings\n"), "{said}");
    // Another authority's root.
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let other = photo.b.root().join("other-root.pem");
    fs::write(&other, params.self_signed(&key).expect("a root").pem()).expect("it can be written");
    let root = ["--root-ca", other.to_str().expect("it is UTF-8")];
    let (status, said) = verify(&photo.b, &folder(&photo.b), &root);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("does not lead to a root of this mesh"), "{said}");
    // No root at all.
    let root = ["--root-ca", "/nowhere.pem"];
    assert_eq!(verify(&photo.b, &folder(&photo.b), &root).0, Some(2));
}

fn cut_off(photo: &Photo) {
    assert!(echo(photo, &photo.frontend).text.contains(NEEDLE));
    let from = photo.b.log().position();
    let told = photo.b.log().wait_from(from.min(1), "a checkpoint", LINE_TIME_MAX, |line| {
        is(line, "message", "audit checkpoint")
    });
    // The line is written before the metric is set.
    let deadline = Instant::now() + LINE_TIME_MAX;
    let told_seq = told["sequence"].as_f64().expect("a number");
    let seen = loop {
        let seen = photo.b.metrics().sum("culvert_audit_checkpoint_sequence", &[]);
        if seen >= told_seq {
            break seen;
        }
        assert!(Instant::now() < deadline, "the metric stays at {seen}");
    };
    photo.b.terminate();
    let seen = format!("{seen:.0}");
    assert_eq!(verify(&photo.b, &folder(&photo.b), &["--expect-at-least", &seen]).0, Some(0));
    let by_line = format!("{}:{}", told["sequence"], told["digest"].as_str().expect("a text"));
    assert_eq!(verify(&photo.b, &folder(&photo.b), &["--expect-at-least", &by_line]).0, Some(0));
    let copy = copy(photo, "cut");
    let file = files(&copy).pop().expect("there is a segment");
    let text = fs::read_to_string(&file).expect("the copy can be read");
    let keep = text.lines().take_while(|line| !line.contains(&format!("\"seq\":{},", told["sequence"])));
    fs::write(&file, keep.map(|line| format!("{line}\n")).collect::<String>()).expect("it can be written");
    let (status, said) = verify(&photo.b, &copy, &["--expect-at-least", &seen]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("were cut off"), "{said}");
}

/// A file system of its own that is full at once.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(node: &Node) -> Self {
        let folder = node.root().join("small");
        fs::create_dir_all(&folder).expect("a folder can be made");
        let options = Some("size=16m,mode=0700");
        mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::empty(), options).expect("it can be mounted");
        Self(folder)
    }

    fn fill(&self) {
        let mut file = fs::File::create(self.0.join("filler")).expect("a file can be made");
        while std::io::Write::write_all(&mut file, &[0; 4_096]).is_ok() {}
    }

    fn free(&self) {
        fs::remove_file(self.0.join("filler")).expect("it is there");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn disk_full(photo: &Photo) {
    let node: &Arc<Node> = &photo.b;
    let disk = SmallDisk::mount(node);
    node.terminate();
    node.set(|settings| {
        settings.more =
            format!("audit: {{folder: {}, checkpointSeconds: 1, onFull: deny}}\n", disk.0.display());
    });
    node.start();
    assert!(echo(photo, &photo.frontend).text.contains(NEEDLE));
    disk.fill();
    // The first that is not written shows it; from then on nothing is allowed.
    let from = node.log().position();
    let deadline = Instant::now() + LINE_TIME_MAX;
    while echo(photo, &photo.frontend).text.contains(NEEDLE) {
        assert!(Instant::now() < deadline, "it goes on without a record");
    }
    node.log().wait_from(from, "the reason", LINE_TIME_MAX, |line| {
        is(line, "verdict", "denied") && is(line, "reason", "audit_unavailable")
    });
    node.log().wait_from(from, "the failure", LINE_TIME_MAX, |line| {
        is(line, "message", "audit failed")
            && line["problem"].as_str().is_some_and(|text| text.contains("No space"))
    });
    let answer = request(photo, &photo.frontend, "GET").text;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    let from = node.log().position();
    disk.free();
    node.log().wait_from(from, "that it is written again", LINE_TIME_MAX, |line| {
        is(line, "message", "audit checkpoint")
    });
    assert!(echo(photo, &photo.frontend).text.contains(NEEDLE));
    node.terminate();
    let (status, said) = verify(node, &disk.0, &[]);
    assert_eq!(status, Some(0), "{said}");
    node.set(|settings| settings.more = AUDIT.to_owned());
}
