//! A log on disk, written by daemons that end in order, are killed, take over, run out of disk, or are meddled with.

use std::{
    cell::Cell,
    fs,
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use node_core::{
    audit::verify::{Anchor, Problem, What},
    policy::DenialReason,
};
use serde_json::Value;

use super::{
    AuditFault,
    journal::{Append, Found, Journal, segment_of, segments},
    line::{METHOD_BYTES_MAX, PATH_BYTES_MAX},
    queue::{DECISIONS_WAITING_MAX, Item, Queue, SNAPSHOTS_WAITING_MAX},
    verify::{Question, Unusable, Verdict as Judged, verify},
    writer::Writer,
};
use crate::{
    certs::{
        Seals,
        testing::{Ca, Shape},
    },
    config::{AuditConfig, OnFull},
    telemetry::{
        Asked, Decision, Direction, Endpoint, Ends, NotRecorded, Path as Way, Reason, Recorder as _, Shadow,
        Sink, Verdict,
    },
};

const NODE: &str = "spiffe://cluster.local/culvert/node/node-a";

/// A folder that goes with its test, and an authority.
struct World {
    folder: PathBuf,
    ca: Ca,
    config: AuditConfig,
}

impl World {
    fn new(test: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("culvert-audit-{}-{test}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let config = AuditConfig {
            folder: folder.join("log"),
            segment_bytes: 1 << 20,
            keep_segments: 3,
            checkpoint_records: 1_000,
            checkpoint: Duration::from_secs(10),
            on_full: OnFull::Drop,
        };
        Self { folder, ca: Ca::new("ours"), config }
    }

    fn seals(&self) -> Seals {
        let seal = Arc::new(self.ca.seal(&Shape::good(NODE)));
        Seals::new(move || Some(Arc::clone(&seal)))
    }

    fn journal(&self, node: &str) -> Result<(Journal, Found), AuditFault> {
        Journal::open(&self.config, &node.parse().unwrap(), format!("{:016x}", rand::random::<u64>()))
    }

    fn daemon(&self) -> Daemon {
        self.daemon_with(self.seals(), false, DECISIONS_WAITING_MAX)
    }

    fn daemon_with(&self, seals: Seals, is_successor: bool, decisions_max: usize) -> Daemon {
        let (journal, found) = self.journal(NODE).unwrap();
        let (queue, items) = Queue::within(self.config.on_full, decisions_max);
        let (queue, events) = (Arc::new(queue), Sink::new());
        let mut writer = Writer::new(&self.config, journal, seals, Arc::clone(&queue), events.clone());
        writer.begin(found, is_successor);
        let mut daemon = Daemon { writer, queue, items, events, now: Instant::now() };
        daemon.turn();
        daemon
    }

    fn question(&self) -> Question {
        let roots = self.folder.join("roots.pem");
        let root = STANDARD.encode(&self.ca.root);
        fs::write(&roots, format!("-----BEGIN CERTIFICATE-----\n{root}\n-----END CERTIFICATE-----\n"))
            .unwrap();
        Question { roots: Some(roots), ..Question::default() }
    }

    fn judged(&self) -> Judged {
        verify(&self.config.folder, &self.question()).unwrap()
    }

    #[track_caller]
    fn holds(&self) -> Judged {
        let judged = self.judged();
        assert!(judged.holds(), "{judged}");
        judged
    }

    fn files(&self) -> Vec<PathBuf> {
        segments(&self.config.folder).unwrap().into_iter().map(|(_, path)| path).collect()
    }

    fn lines(&self) -> Vec<Value> {
        let text: String = self.files().iter().map(|file| fs::read_to_string(file).unwrap()).collect();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn kinds(&self) -> Vec<String> {
        self.lines().iter().map(|line| line["kind"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A writer whose turns are the test's. Dropped, it is killed.
struct Daemon {
    writer: Writer,
    queue: Arc<Queue>,
    items: Receiver<Item>,
    events: Sink,
    now: Instant,
}

impl Daemon {
    fn decide(&self, verdict: Verdict) -> Result<(), NotRecorded> {
        self.queue.record(decision(verdict))
    }

    fn turn(&mut self) {
        for item in self.items.try_iter() {
            self.writer.take(item);
        }
        self.writer.turn(self.now);
    }

    fn decided(&mut self, verdicts: &[Verdict]) {
        for verdict in verdicts {
            self.decide(*verdict).unwrap();
        }
        self.turn();
    }

    fn later(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        self.turn();
    }

    fn stop(self) {
        self.queue.stop();
        self.writer.run(&self.items);
    }

    fn counted(&self, name: &str) -> Option<u64> {
        let text = self.events.metrics().text().unwrap();
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }
}

fn ends() -> Ends {
    let identity = |account: &str| Some(crate::certs::testing::identity(account));
    let end = |address: &str, account| Endpoint {
        address: Some(address.parse().unwrap()),
        workload: Some(node_core::workload::ObjectName::new("photo", account)),
        identity: identity(account),
        node: None,
    };
    Ends {
        connection: 7,
        direction: Direction::Inbound,
        path: Way::Tunnel,
        source: end("10.8.1.4:40000", "web"),
        destination: end("[fd00::4]:80", "db"),
        service: None,
        protocol: "tcp",
        mutual_tls: true,
    }
}

fn decision(verdict: Verdict) -> Decision {
    Decision {
        ends: Arc::new(ends()),
        request: None,
        verdict,
        policy: Some("AuthorizationPolicy/photo/db".into()),
        rule: Some("rules[0]".into()),
        reason: (verdict == Verdict::Denied).then_some(Reason::Policy(DenialReason::DeniedByRule)),
        shadow: None,
        audit: None,
        snapshot: 3,
    }
}

const ALLOWED: Verdict = Verdict::Allowed;
const DENIED: Verdict = Verdict::Denied;

#[test]
fn what_was_decided_stands_in_the_log_and_holds_by_the_root_alone() {
    let world = World::new("order");
    let mut daemon = world.daemon();
    daemon.queue.snapshot(3, "d1ge57");
    daemon.decided(&[ALLOWED, DENIED]);
    daemon.stop();
    assert_eq!(
        world.kinds(),
        ["segment", "start", "snapshot", "decision", "decision", "stop", "signer", "checkpoint"]
    );
    let judged = world.holds();
    assert_eq!((judged.report.decisions, judged.report.unsigned, judged.report.checkpoints), (2, 0, 1));
    assert!(judged.report.notes.is_empty(), "{judged}");
    let line = &world.lines()[4];
    for (key, expected) in [
        ("/verdict", "denied"),
        ("/reason", "denied_by_rule"),
        ("/policy", "AuthorizationPolicy/photo/db"),
        ("/rule", "rules[0]"),
        ("/source/identity", "spiffe://cluster.local/ns/photo/sa/web"),
        ("/source/address", "10.8.1.4:40000"),
        ("/destination/workload", "photo/db"),
        ("/destination/address", "[fd00::4]:80"),
        ("/digest", "d1ge57"),
        ("/direction", "inbound"),
        ("/path", "tunnel"),
    ] {
        assert_eq!(line.pointer(key).and_then(Value::as_str), Some(expected), "{line}");
    }
    assert_eq!((&line["snapshot"], &line["connection"]), (&3.into(), &7.into()));
}

#[test]
fn files_and_folder_are_this_user_s_alone() {
    let world = World::new("modes");
    fs::create_dir_all(&world.config.folder).unwrap();
    fs::set_permissions(&world.config.folder, fs::Permissions::from_mode(0o755)).unwrap();
    drop(world.daemon());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&world.config.folder), 0o700);
    assert_eq!(mode(&world.files()[0]), 0o600);
}

#[test]
fn what_is_tried_and_what_an_audit_policy_marks_is_kept_and_no_query() {
    // B-11, F-3
    let world = World::new("request");
    let mut daemon = world.daemon();
    let shadow = Shadow { verdict: DENIED, policy: Some("ServiceRole/a/b".into()), rule: None };
    let path = format!("/photos/{}?access_token=secret", "x".repeat(PATH_BYTES_MAX));
    let request = |path: &str, method: &str| Asked {
        protocol: "http/1.1",
        method: method.parse().unwrap(),
        path: Some(path.parse().unwrap()),
    };
    let audit = Some("AuthorizationPolicy/photo/record".into());
    let one = Decision { request: Some(request("/a?b=secret", "GET")), audit, ..decision(ALLOWED) };
    let long = request(&path, &"M".repeat(METHOD_BYTES_MAX + 1));
    let two = Decision { request: Some(long), shadow: Some(shadow), ..decision(ALLOWED) };
    daemon.queue.record(one).unwrap();
    daemon.queue.record(two).unwrap();
    daemon.turn();
    daemon.stop();
    let lines = world.lines();
    assert_eq!(lines[2]["request"], serde_json::json!({"method": "GET", "path": "/a"}));
    assert_eq!(lines[2]["audit"], "AuthorizationPolicy/photo/record");
    assert_eq!(lines[2]["protocol"], "http/1.1");
    assert_eq!(lines[3]["shadow"], serde_json::json!({"verdict": "denied", "policy": "ServiceRole/a/b"}));
    assert_eq!(lines[3]["request"]["path"].as_str().unwrap().len(), PATH_BYTES_MAX);
    assert_eq!(lines[3]["request"]["method"].as_str().unwrap().len(), METHOD_BYTES_MAX);
    assert_eq!(lines[3]["request"]["is_cut"], true);
    assert!(!format!("{lines:?}").contains("secret"));
}

#[test]
fn a_restart_goes_on_with_the_chain() {
    let world = World::new("restart");
    for _ in 0..3 {
        let mut daemon = world.daemon();
        daemon.decided(&[ALLOWED]);
        daemon.stop();
    }
    let judged = world.holds();
    assert_eq!((judged.report.decisions, judged.report.segments), (3, 1));
    assert!(judged.report.notes.is_empty(), "{judged}");
    assert_eq!(world.kinds().iter().filter(|kind| *kind == "recovered").count(), 0);
}

#[test]
fn a_killed_daemon_loses_what_it_had_not_written_and_the_log_says_so() {
    let world = World::new("killed");
    let mut daemon = world.daemon();
    daemon.decided(&[ALLOWED, ALLOWED]);
    daemon.decide(DENIED).unwrap();
    drop(daemon);
    let mut daemon = world.daemon();
    daemon.decided(&[ALLOWED]);
    daemon.stop();
    let judged = world.holds();
    assert_eq!(judged.report.decisions, 3, "the one in the queue is lost");
    let notes: Vec<_> = judged.report.notes.iter().map(|note| (note.line, note.what.clone())).collect();
    let recovered = What::Recovered { torn_bytes: 0, unreadable_lines: 0 };
    let [(5, first), (2, What::NoStop(_))] = &notes[..] else { panic!("{judged}") };
    assert_eq!(*first, recovered);
}

/// Appends to the newest segment.
fn append(world: &World, bytes: &[u8]) {
    let file = world.files().pop().unwrap();
    fs::OpenOptions::new().append(true).open(file).unwrap().write_all(bytes).unwrap();
}

#[test]
fn a_line_that_a_crash_cut_is_removed_and_told() {
    let world = World::new("torn");
    let mut daemon = world.daemon();
    daemon.decided(&[ALLOWED]);
    daemon.later(11);
    drop(daemon);
    append(&world, br#"{"seq":6,"prev":"#);
    let torn = world.holds();
    assert_eq!(torn.report.notes[0].what, What::Torn(16), "before it is repaired");
    drop(world.daemon());
    let line = world.lines().into_iter().find(|line| line["kind"] == "recovered").unwrap();
    assert_eq!(line["torn_bytes"], 16);
    assert_eq!(line["torn_digest"], node_core::audit::Digest::of(br#"{"seq":6,"prev":"#).to_string());
    let judged = world.holds();
    let recovered = What::Recovered { torn_bytes: 16, unreadable_lines: 0 };
    assert!(judged.report.notes.iter().any(|note| note.what == recovered), "{judged}");
}

#[test]
fn a_segment_that_was_begun_and_not_written_is_no_end() {
    let world = World::new("begun");
    let mut daemon = world.daemon();
    daemon.decided(&[ALLOWED]);
    daemon.stop();
    for rest in ["", "{\"seq\""] {
        let begun = world.config.folder.join("audit-00000002.jsonl");
        fs::write(&begun, rest).unwrap();
        world.daemon().stop();
        assert!(!begun.exists());
        assert_eq!(world.holds().report.segments, 1);
    }
    assert_eq!(world.kinds().iter().filter(|kind| *kind == "recovered").count(), 1);
    // The first of all.
    let world = World::new("begun-first");
    fs::create_dir_all(&world.config.folder).unwrap();
    fs::write(world.config.folder.join("audit-00000001.jsonl"), "{").unwrap();
    world.daemon().stop();
    assert_eq!(world.kinds()[..3], ["segment", "recovered", "start"]);
    world.holds();
}

#[test]
fn segments_are_bounded_in_size_and_number_and_go_in_order() {
    let mut world = World::new("rotation");
    world.config.segment_bytes = 140 * 1024;
    let mut daemon = world.daemon();
    for _ in 0..120 {
        daemon.decided(&[ALLOWED; 2]);
    }
    daemon.stop();
    let files = world.files();
    assert_eq!(files.len(), 3);
    assert!(!files[0].ends_with("audit-00000001.jsonl"), "{files:?}");
    for file in &files {
        assert!(fs::metadata(file).unwrap().len() <= world.config.segment_bytes);
    }
    let judged = world.holds();
    assert!(judged.report.first > 1);
    assert!(judged.report.notes.iter().any(|note| matches!(note.what, What::Retired(_))), "{judged}");
    // Each segment ends with a checkpoint and may be judged alone.
    for file in &files {
        let alone = verify(file, &world.question()).unwrap();
        assert!(alone.holds(), "{alone}");
        assert_eq!(alone.report.unsigned, 0);
    }
    // Somebody removes one more.
    fs::remove_file(&files[0]).unwrap();
    let problems: Vec<_> = world.judged().report.findings.into_iter().map(|found| found.problem).collect();
    assert_eq!(problems, [Problem::NotRetired]);
}

#[test]
fn a_checkpoint_is_due_after_records_and_after_seconds() {
    let mut world = World::new("due");
    world.config.checkpoint_records = 5;
    let mut daemon = world.daemon();
    let checkpoints = || world.kinds().iter().filter(|kind| *kind == "checkpoint").count();
    daemon.decided(&[ALLOWED; 2]);
    assert_eq!(checkpoints(), 0, "four records");
    daemon.decided(&[ALLOWED]);
    assert_eq!(checkpoints(), 1, "five");
    daemon.decided(&[ALLOWED; 13]);
    assert_eq!(checkpoints(), 3, "also inside of a batch");
    daemon.later(9);
    assert_eq!(checkpoints(), 3);
    daemon.later(1);
    assert_eq!(checkpoints(), 4);
    daemon.later(100);
    assert_eq!(checkpoints(), 4, "nothing is new");
    assert_eq!(daemon.writer.due_in(daemon.now), None);
    let last = world.holds().report.last;
    assert_eq!(daemon.counted("culvert_audit_checkpoint_sequence "), Some(last));
    drop(daemon);
}

#[test]
fn a_node_without_a_certificate_signs_later() {
    let world = World::new("unsigned");
    let given = Arc::new(std::sync::Mutex::new(None));
    let seals = Seals::new({
        let given = Arc::clone(&given);
        move || given.lock().unwrap().clone()
    });
    let mut daemon = world.daemon_with(seals, false, 8);
    daemon.decided(&[ALLOWED]);
    daemon.later(60);
    let problems: Vec<_> = world.judged().report.findings.into_iter().map(|found| found.problem).collect();
    assert_eq!(problems, [Problem::NothingSigned]);
    assert_eq!(daemon.writer.due_in(daemon.now), Some(Duration::from_secs(1)), "looked for again");
    *given.lock().unwrap() = Some(Arc::new(world.ca.seal(&Shape { ends: -1, ..Shape::good(NODE) })));
    daemon.later(1);
    assert_eq!(world.judged().report.checkpoints, 0, "one that has ended signs nothing");
    *given.lock().unwrap() = Some(Arc::new(world.ca.seal(&Shape::good(NODE))));
    daemon.later(1);
    assert_eq!(world.holds().report.unsigned, 0);
    // A renewed one says who it is.
    *given.lock().unwrap() = Some(Arc::new(world.ca.seal(&Shape::good(NODE))));
    daemon.decided(&[ALLOWED]);
    daemon.stop();
    assert_eq!(world.holds().report.checkpoints, 2);
    assert_eq!(world.kinds().iter().filter(|kind| *kind == "signer").count(), 2);
}

#[test]
fn a_log_by_another_authority_node_or_workload_does_not_hold() {
    let mut world = World::new("signers");
    world.daemon().stop();
    world.holds();
    let question = Question { node: Some(NODE.replace("node-a", "node-b")), ..world.question() };
    let problem = verify(&world.config.folder, &question).unwrap().report.findings.remove(0).problem;
    assert!(matches!(problem, Problem::OtherNode { .. }), "{problem}");
    let ours = std::mem::replace(&mut world.ca, Ca::new("others"));
    let judged = world.judged().to_string();
    assert!(judged.contains("does not lead to a root of this mesh"), "{judged}");
    world.ca = ours;
    for (name, word) in [
        (NODE.replace("node-a", "node-b"), "was signed by spiffe://cluster.local/culvert/node/node-b"),
        ("spiffe://cluster.local/ns/photo/sa/web".to_owned(), "which is no node"),
    ] {
        let seal = Arc::new(world.ca.seal(&Shape::good(&name)));
        world.config.folder = world.folder.join(word.len().to_string());
        world.daemon_with(Seals::new(move || Some(Arc::clone(&seal))), false, 8).stop();
        let judged = world.judged().to_string();
        assert!(judged.contains(word), "{judged}");
    }
}

#[test]
fn a_predecessor_and_its_successor_write_one_log() {
    // T-24
    let world = World::new("successor");
    let mut before = world.daemon();
    before.decided(&[ALLOWED]);
    let mut after = world.daemon_with(world.seals(), true, 8);
    for _ in 0..3 {
        after.decided(&[ALLOWED]);
        before.decided(&[DENIED, DENIED]);
    }
    before.later(11);
    after.later(11);
    before.stop();
    after.decided(&[ALLOWED]);
    after.stop();
    let judged = world.holds();
    assert_eq!(judged.report.decisions, 11);
    assert!(judged.report.notes.is_empty(), "{judged}");
}

#[test]
fn a_successor_that_begins_the_next_segment_is_followed() {
    let mut world = World::new("successor-rotates");
    world.config.segment_bytes = 140 * 1024;
    world.config.keep_segments = 100;
    let mut before = world.daemon();
    let mut after = world.daemon_with(world.seals(), true, 8);
    for _ in 0..60 {
        after.decided(&[ALLOWED]);
        before.decided(&[DENIED]);
    }
    before.stop();
    after.stop();
    let judged = world.holds();
    assert_eq!(judged.report.decisions, 120);
    assert!(judged.report.segments > 2);
}

#[test]
fn who_changes_files_beneath_a_running_daemon_is_found() {
    let cut = |path: &Path| {
        let text = fs::read_to_string(path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        fs::write(path, lines[..lines.len() - 2].join("\n") + "\n").unwrap();
    };
    let gone = |path: &Path| fs::remove_file(path).unwrap();
    let emptied = |path: &Path| fs::write(path, "").unwrap();
    let garbage = |path: &Path| fs::write(path, "garbage\n").unwrap();
    let changed = |path: &Path| {
        // Of the same length, in another file.
        let text = fs::read_to_string(path).unwrap();
        fs::remove_file(path).unwrap();
        fs::write(path, text.replace("\"denied\"", "\"allows\"")).unwrap();
    };
    type Case<'a> = (&'a str, &'a dyn Fn(&Path));
    let table: [Case<'_>; 5] =
        [("cut", &cut), ("gone", &gone), ("emptied", &emptied), ("garbage", &garbage), ("changed", &changed)];
    for (what, meddle) in table {
        let world = World::new(&format!("meddled-{what}"));
        let mut daemon = world.daemon();
        daemon.decided(&[ALLOWED]);
        daemon.later(11);
        daemon.decided(&[ALLOWED, ALLOWED, DENIED]);
        meddle(&world.files()[0]);
        daemon.decided(&[ALLOWED]);
        daemon.stop();
        let judged = world.judged();
        assert!(!judged.holds(), "{what}: {judged}");
        let told = judged.report.notes.iter().any(|note| matches!(note.what, What::Gap { expected: 8, .. }));
        assert!(told, "{what}: {judged}");
        assert_eq!(judged.report.unsigned, 0, "{what}: it goes on: {judged}");
    }
}

#[test]
fn a_changed_record_of_an_earlier_run_is_found_by_its_line() {
    let world = World::new("changed");
    let mut daemon = world.daemon();
    daemon.decided(&[DENIED, DENIED]);
    daemon.stop();
    let file = &world.files()[0];
    let text = fs::read_to_string(file).unwrap();
    fs::write(file, text.replacen("\"denied\"", "\"allowed\"", 1)).unwrap();
    world.daemon().stop();
    let judged = world.judged();
    let findings: Vec<_> = judged.report.findings.iter().map(|found| (found.line, &found.problem)).collect();
    assert_eq!(findings, [(4, &Problem::Changed)]);
    assert!(judged.to_string().contains("audit-00000001.jsonl:4: "), "{judged}");
    assert!(judged.to_string().ends_with("the log does not hold: 1 findings\n"), "{judged}");
}

#[test]
fn a_log_that_was_cut_off_while_no_daemon_ran_is_found_by_its_anchor_alone() {
    let world = World::new("cut");
    let mut daemon = world.daemon();
    daemon.decided(&[ALLOWED, ALLOWED]);
    daemon.later(11);
    let (seq, digest) = world.holds().report.last_checkpoint.unwrap();
    daemon.decided(&[DENIED]);
    daemon.stop();
    let seen = world.holds().report.last_checkpoint.unwrap();
    let file = &world.files()[0];
    let text = fs::read_to_string(file).unwrap();
    let keep = usize::try_from(seq).unwrap();
    fs::write(file, text.lines().take(keep).map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    assert!(world.judged().holds(), "by itself it looks whole");
    let asked = |seq, digest| {
        let question = Question { anchor: Some(Anchor { seq, digest }), ..world.question() };
        verify(&world.config.folder, &question).unwrap()
    };
    assert!(asked(seq, Some(digest)).holds());
    let cut = asked(seen.0, None).report.findings.remove(0).problem;
    assert_eq!(cut, Problem::CutOff { last: seq, expected: seen.0 });
    // A daemon goes on, past the number; the digest tells.
    world.daemon().stop();
    world.daemon().stop();
    world.holds();
    let other = asked(seen.0, Some(seen.1)).report.findings.remove(0).problem;
    assert_eq!(other, Problem::AnchorDiffers(seen.0));
}

#[test]
fn another_node_s_log_is_not_gone_on_with() {
    let world = World::new("other-node");
    world.daemon().stop();
    let before = fs::read_to_string(&world.files()[0]).unwrap();
    let refused = world.journal(&NODE.replace("node-a", "node-b")).err().unwrap();
    assert!(matches!(refused, AuditFault::OtherNode { .. }), "{refused}");
    assert!(refused.to_string().contains("give another folder"), "{refused}");
    assert_eq!(fs::read_to_string(&world.files()[0]).unwrap(), before);
}

#[test]
fn a_folder_that_cannot_be_used_is_refused() {
    let mut world = World::new("folder");
    world.config.folder = world.folder.join("file");
    fs::write(&world.config.folder, "").unwrap();
    let refused = world.journal(NODE).err().unwrap();
    assert!(refused.to_string().starts_with("audit.folder "), "{refused}");
    // A link in a segment's place is not followed.
    let world = World::new("link");
    fs::create_dir_all(&world.config.folder).unwrap();
    let target = world.folder.join("target");
    fs::write(&target, "precious\n").unwrap();
    std::os::unix::fs::symlink(&target, world.config.folder.join("audit-00000001.jsonl")).unwrap();
    assert!(world.journal(NODE).is_err());
    assert_eq!(fs::read_to_string(target).unwrap(), "precious\n");
}

#[test]
fn what_no_daemon_wrote_is_left_and_a_new_chain_begins_behind_it() {
    let world = World::new("garbage");
    fs::create_dir_all(&world.config.folder).unwrap();
    let first = world.config.folder.join("audit-00000001.jsonl");
    for garbage in ["garbage\n".to_owned(), "x".repeat(100_000)] {
        fs::write(&first, &garbage).unwrap();
        world.daemon().stop();
        assert_eq!(fs::read_to_string(&first).unwrap(), garbage);
        assert!(!world.judged().holds());
        for file in world.files() {
            fs::remove_file(file).unwrap();
        }
    }
    fs::write(world.config.folder.join("notes.txt"), "not ours").unwrap();
    world.daemon().stop();
    world.holds();
}

#[test]
fn a_full_queue_drops_and_the_log_says_how_many() {
    let world = World::new("dropped");
    let mut daemon = world.daemon_with(world.seals(), false, 2);
    for _ in 0..5 {
        daemon.decide(ALLOWED).unwrap();
    }
    daemon.turn();
    daemon.decided(&[ALLOWED]);
    assert_eq!(daemon.counted("culvert_audit_lost_total "), Some(3));
    daemon.stop();
    let judged = world.holds();
    assert_eq!((judged.report.decisions, judged.report.lost), (3, 3));
    assert!(judged.to_string().contains("3 decisions found no place"), "{judged}");
}

#[test]
fn a_full_queue_denies_where_nothing_may_pass_unrecorded() {
    let mut world = World::new("denied");
    world.config.on_full = OnFull::Deny;
    let mut daemon = world.daemon_with(world.seals(), false, 2);
    assert_eq!(daemon.decide(ALLOWED), Ok(()));
    assert_eq!(daemon.decide(ALLOWED), Ok(()), "at the limit");
    assert_eq!(daemon.decide(ALLOWED), Err(NotRecorded));
    assert_eq!(daemon.decide(DENIED), Ok(()), "a no needs no place");
    daemon.turn();
    assert_eq!(daemon.decide(ALLOWED), Ok(()), "there is room again");
    daemon.stop();
    let judged = world.holds();
    assert_eq!((judged.report.decisions, judged.report.lost), (3, 1));
}

#[test]
fn as_many_snapshots_wait_as_the_limit_says_and_the_oldest_goes() {
    let (queue, _items) = Queue::new(OnFull::Drop);
    for number in 0..=SNAPSHOTS_WAITING_MAX as u64 {
        queue.snapshot(number, "");
    }
    let numbers: Vec<u64> = queue.take_snapshots().iter().map(|published| published.number).collect();
    assert_eq!(numbers, (1..=SNAPSHOTS_WAITING_MAX as u64).collect::<Vec<_>>());
}

#[test]
fn after_the_stop_nothing_is_kept_and_nothing_unrecorded_is_allowed() {
    let (queue, _items) = Queue::new(OnFull::Deny);
    queue.stop();
    assert_eq!(queue.record(decision(ALLOWED)), Err(NotRecorded));
    let (queue, _items) = Queue::new(OnFull::Drop);
    queue.stop();
    assert_eq!(queue.record(decision(ALLOWED)), Ok(()));
    assert_eq!(queue.take_lost(), 1);
}

thread_local! {
    /// So many bytes go onto this thread's disk.
    static ROOM: Cell<usize> = const { Cell::new(usize::MAX) };
    /// Whether what was half written can be cut.
    static CUTS: Cell<bool> = const { Cell::new(true) };
}

struct SmallDisk(fs::File);

impl Append for SmallDisk {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let room = ROOM.get();
        let (fits, rest) = bytes.split_at(room.min(bytes.len()));
        self.0.write_all(fits)?;
        ROOM.set(room - fits.len());
        if rest.is_empty() { Ok(()) } else { Err(io::Error::from_raw_os_error(nix::libc::ENOSPC)) }
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        if CUTS.get() { self.0.set_len(length) } else { Err(io::Error::from_raw_os_error(nix::libc::EIO)) }
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A daemon on a disk that has so much room left.
fn on_small_disk(world: &World, room: usize) -> Daemon {
    ROOM.set(usize::MAX);
    CUTS.set(true);
    let (mut journal, found) = world.journal(NODE).unwrap();
    journal.open_with(|file| Box::new(SmallDisk(file)));
    let (queue, items) = Queue::within(world.config.on_full, 4);
    let (queue, events) = (Arc::new(queue), Sink::new());
    let mut writer = Writer::new(&world.config, journal, world.seals(), Arc::clone(&queue), events.clone());
    writer.begin(found, false);
    let mut daemon = Daemon { writer, queue, items, events, now: Instant::now() };
    daemon.turn();
    ROOM.set(room);
    daemon
}

#[test]
fn a_full_disk_keeps_what_waits_and_the_log_is_whole_again() {
    for room in [0, 1, 100, 1_000] {
        let world = World::new(&format!("full-{room}"));
        let mut daemon = on_small_disk(&world, room);
        let before = fs::metadata(&world.files()[0]).unwrap().len();
        daemon.decided(&[ALLOWED, DENIED, ALLOWED]);
        daemon.later(1);
        assert_eq!(fs::metadata(&world.files()[0]).unwrap().len(), before, "half a batch is none");
        assert_eq!(daemon.counted("culvert_audit_failures_total "), Some(1), "told once");
        ROOM.set(usize::MAX);
        daemon.later(1);
        daemon.stop();
        let judged = world.holds();
        assert_eq!((judged.report.decisions, judged.report.lost), (3, 0));
    }
}

#[test]
fn what_cannot_even_be_cut_is_repaired_and_told() {
    let world = World::new("uncut");
    let mut daemon = on_small_disk(&world, 100);
    let before = fs::metadata(&world.files()[0]).unwrap().len();
    CUTS.set(false);
    daemon.decided(&[ALLOWED]);
    CUTS.set(true);
    daemon.later(1);
    assert_eq!(fs::metadata(&world.files()[0]).unwrap().len(), before, "repaired, and still no room");
    ROOM.set(usize::MAX);
    daemon.later(1);
    daemon.stop();
    let judged = world.holds();
    assert_eq!(judged.report.decisions, 1);
    let recovered = What::Recovered { torn_bytes: 100, unreadable_lines: 0 };
    assert!(judged.report.notes.iter().any(|note| note.what == recovered), "{judged}");
}

#[test]
fn while_the_disk_is_full_nothing_unrecorded_is_allowed_if_so_chosen() {
    for (on_full, while_full) in [(OnFull::Drop, Ok(())), (OnFull::Deny, Err(NotRecorded))] {
        let mut world = World::new(&format!("full-{}", on_full.label()));
        world.config.on_full = on_full;
        let mut daemon = on_small_disk(&world, 0);
        assert_eq!(daemon.decide(ALLOWED), Ok(()), "nobody knows yet");
        daemon.turn();
        assert_eq!(daemon.decide(ALLOWED), while_full);
        assert_eq!(daemon.decide(DENIED), Ok(()));
        ROOM.set(usize::MAX);
        daemon.later(1);
        assert_eq!(daemon.decide(ALLOWED), Ok(()));
        daemon.stop();
        world.holds();
    }
}

#[test]
fn what_is_lost_while_the_disk_is_full_is_one_record() {
    let world = World::new("full-lost");
    let mut daemon = on_small_disk(&world, 0);
    daemon.decided(&[ALLOWED]);
    for _ in 0..5 {
        // Nothing is taken out of the queue meanwhile, which holds four.
        for _ in 0..3 {
            daemon.decide(ALLOWED).unwrap();
        }
        daemon.writer.turn(daemon.now);
    }
    assert_eq!(daemon.counted("culvert_audit_lost_total "), Some(11));
    ROOM.set(usize::MAX);
    daemon.later(1);
    daemon.stop();
    let judged = world.holds();
    assert_eq!((judged.report.decisions, judged.report.lost), (5, 11));
    assert_eq!(world.kinds().iter().filter(|kind| *kind == "lost").count(), 1);
}

#[test]
fn a_line_that_nobody_could_read_is_counted() {
    let world = World::new("long");
    let mut daemon = world.daemon();
    let long = Decision { policy: Some("x".repeat(70_000).into()), ..decision(ALLOWED) };
    daemon.queue.record(long).unwrap();
    daemon.decided(&[ALLOWED]);
    daemon.stop();
    let judged = world.holds();
    assert_eq!((judged.report.decisions, judged.report.lost), (1, 1));
}

#[test]
fn names_of_segments_have_one_form() {
    assert_eq!(segment_of("audit-00000001.jsonl"), Some(1));
    assert_eq!(segment_of("audit-123456789.jsonl"), Some(123_456_789));
    for name in [
        "audit-1.jsonl",
        "audit-+0000001.jsonl",
        "audit-00000001.json",
        "audit-0000000a.jsonl",
        "00000001.jsonl",
        "",
    ] {
        assert_eq!(segment_of(name), None, "{name}");
    }
}

#[test]
fn a_log_or_roots_that_cannot_be_read_are_no_verdict() {
    let world = World::new("unusable");
    let ask = |log: &Path, question: &Question| verify(log, question).unwrap_err();
    assert!(matches!(ask(&world.config.folder, &world.question()), Unusable::Read { .. }));
    fs::create_dir_all(&world.config.folder).unwrap();
    assert!(matches!(ask(&world.config.folder, &world.question()), Unusable::NoSegment(_)));
    let question = |name: &str| Question { roots: Some(world.folder.join(name)), ..Question::default() };
    assert!(matches!(ask(&world.config.folder, &question("absent.pem")), Unusable::NoRoots { .. }));
    fs::write(world.folder.join("empty.pem"), "").unwrap();
    assert!(matches!(ask(&world.config.folder, &question("empty.pem")), Unusable::Roots { .. }));
    // A chain alone may be judged, and that is said.
    world.daemon().stop();
    let alone = verify(&world.config.folder, &Question::default()).unwrap();
    assert!(alone.to_string().contains("who wrote this is not known"), "{alone}");
}

#[test]
fn lines_are_read_up_to_their_limit_and_the_rest_of_the_file_is_read_all_the_same() {
    let world = World::new("lines");
    world.daemon().stop();
    let file = &world.files()[0];
    let text = fs::read_to_string(file).unwrap();
    let (first, rest) = text.split_once('\n').unwrap();
    fs::write(file, format!("{first}\n{}\n{rest}", "x".repeat(300_000))).unwrap();
    let judged = world.judged();
    let findings: Vec<_> = judged.report.findings.iter().map(|found| found.line).collect();
    assert_eq!(findings, [2, 3], "{judged}");
    fs::write(file, format!("{text}{}", "x".repeat(300_000))).unwrap();
    assert_eq!(world.holds().report.notes[0].what, What::Torn(300_000));
}

#[test]
fn a_log_is_written_by_its_thread_and_ends_with_a_stop() {
    let world = World::new("thread");
    let events = Sink::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let node = NODE.parse().unwrap();
        let handle = super::start(&world.config, &node, world.seals(), false, &events).unwrap();
        events.judging_by(3, || "d1ge57".to_owned());
        events.decide(|| decision(ALLOWED)).unwrap();
        handle.stop().await;
    });
    let judged = world.holds();
    assert_eq!((judged.report.decisions, judged.report.unsigned), (1, 0));
    assert!(judged.report.notes.is_empty(), "{judged}");
    assert_eq!(world.lines()[3]["digest"], "d1ge57");
}
