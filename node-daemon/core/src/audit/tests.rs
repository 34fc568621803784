//! A log of two segments and a bit, and everything that somebody may do to it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{
    Digest, FORMAT, LINE_BYTES_MAX,
    chain::{Chain, Place, stamp, stamped},
    entry::{Decision, End, Entry, Recovered, Segment},
    tail::{Last, Tail, header},
    verify::{Anchor, Expected, Finding, Problem, Report, Testimony, Verifier, What, Witness},
};

const NODE: &str = "spiffe://cluster.local/culvert/node/node-a";
const OTHER_NODE: &str = "spiffe://cluster.local/culvert/node/node-b";
const RUN: &str = "00000000000000aa";
const BEGIN: u64 = 1_800_000_000;

/// Its certificates are the node's name, its key is the digest of that.
struct Names;

fn sign(node: &str, statement: &[u8]) -> String {
    let mut bytes = node.as_bytes().to_vec();
    bytes.extend(statement);
    Digest::of(&bytes).to_string()
}

impl Witness for Names {
    fn check(&self, testimony: &Testimony<'_>) -> Result<String, String> {
        let [node] = testimony.certificates else { return Err("one certificate".to_owned()) };
        if Digest::of(node.as_bytes()) != *testimony.signer {
            return Err("another certificate".to_owned());
        }
        if node.contains("/ns/") {
            return Err("a workload's".to_owned());
        }
        let good = sign(node, testimony.statement) == testimony.signature;
        good.then(|| node.clone()).ok_or_else(|| "by another key".to_owned())
    }
}

/// What a daemon writes, as lines by segment.
struct Log {
    chain: Chain,
    name: &'static str,
    node: &'static str,
    signer: &'static str,
    seconds: u64,
    segments: Vec<Vec<String>>,
}

impl Log {
    fn new(name: &'static str, node: &'static str) -> Self {
        Self { chain: Chain::BEGIN, name, node, signer: node, seconds: BEGIN, segments: vec![] }
    }

    fn now(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.seconds)
    }

    fn put(&mut self, entry: &Entry<'_>) {
        let mut out = Vec::new();
        self.chain.append(RUN, self.now(), entry, &mut out);
        let line = String::from_utf8(out).unwrap();
        let line = line.strip_suffix('\n').unwrap().to_owned();
        self.segments.last_mut().unwrap().push(line);
    }

    fn segment(&mut self) {
        let segment = self.segments.len() as u64 + 1;
        self.segments.push(vec![]);
        let (chain, node) = (self.name, self.node);
        let (checkpoint_records, checkpoint_seconds) = (4, 10);
        self.put(&Entry::Segment(Segment {
            format: FORMAT,
            chain,
            node,
            segment,
            checkpoint_records,
            checkpoint_seconds,
        }));
        let (signer, certificates) = (Digest::of(self.signer.as_bytes()), vec![self.signer.to_owned()]);
        self.put(&Entry::Signer { signer, certificates });
    }

    fn decide(&mut self, verdict: &str) {
        let (source, destination) = (End::default(), End::default());
        self.put(&Entry::Decision(Decision {
            connection: 7,
            direction: "inbound",
            path: "tunnel",
            source,
            destination,
            service: None,
            protocol: "tcp",
            request: None,
            verdict,
            policy: Some("AuthorizationPolicy/shop/\"cart\""),
            rule: None,
            reason: None,
            shadow: None,
            audit: None,
            snapshot: 3,
            digest: None,
        }));
    }

    fn checkpoint(&mut self) {
        let signer = Digest::of(self.signer.as_bytes());
        let place = Place { chain: self.name, node: self.node, run: RUN };
        let signature = sign(self.signer, &self.chain.statement(&place, self.now(), &signer));
        self.put(&Entry::Checkpoint { signer, signature: &signature });
    }

    fn last(&self) -> u64 {
        self.chain.last_sequence()
    }
}

/// Two segments: 1 header, 2 signer, 3 start, 4 to 6 decisions, 7 checkpoint; 8 header, 9 signer, 10 and 11 decisions,
/// 12 checkpoint, 13 and 14 decisions, 15 stop, 16 checkpoint.
fn good_of(name: &'static str, node: &'static str) -> Log {
    let mut log = Log::new(name, node);
    log.segment();
    log.put(&Entry::Start { version: "0" });
    for verdict in ["allowed", "denied", "allowed"] {
        log.decide(verdict);
    }
    log.checkpoint();
    log.segment();
    log.decide("allowed");
    log.decide("denied");
    log.checkpoint();
    log.decide("allowed");
    log.decide("allowed");
    log.put(&Entry::Stop);
    log.checkpoint();
    log
}

fn good() -> Log {
    good_of("c0ffee", NODE)
}

fn verified(
    segments: &[Vec<String>],
    first: u64,
    expected: Expected,
    witness: Option<&dyn Witness>,
) -> Report {
    let mut verifier = Verifier::new(expected, witness);
    for (number, lines) in (first..).zip(segments) {
        verifier.begin(&format!("{number}"), Some(number));
        for line in lines {
            verifier.line(line.as_bytes());
        }
    }
    verifier.finish()
}

#[track_caller]
fn found(log: &Log, expected: &[(&str, u64, Problem)]) {
    found_of(&log.segments, 1, Expected::default(), expected);
}

#[track_caller]
fn found_of(segments: &[Vec<String>], first: u64, asked: Expected, expected: &[(&str, u64, Problem)]) {
    let report = verified(segments, first, asked, Some(&Names));
    let expected: Vec<_> = expected
        .iter()
        .map(|(file, line, problem)| Finding {
            file: (*file).to_owned(),
            line: *line,
            problem: problem.clone(),
        })
        .collect();
    assert_eq!(report.findings, expected);
}

fn by_another_key() -> Problem {
    Problem::Signature("by another key".to_owned())
}

#[test]
fn what_was_written_holds_and_is_counted() {
    let log = good();
    let report = verified(&log.segments, 1, Expected::default(), Some(&Names));
    assert!(report.holds(), "{:?}", report.findings);
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    assert_eq!((report.segments, report.records, report.decisions), (2, 16, 7));
    assert_eq!((report.first, report.last, report.checkpoints, report.unsigned), (1, 16, 3, 0));
    assert_eq!(report.last_checkpoint, Some((16, log.chain.last_digest())));
    assert_eq!(report.node.as_deref(), Some(NODE));
}

#[test]
fn a_line_is_one_object_whose_text_from_outside_is_escaped() {
    let log = good();
    let line: serde_json::Value = serde_json::from_str(&log.segments[0][3]).unwrap();
    assert_eq!(
        (&line["seq"], &line["kind"], &line["verdict"]),
        (&4.into(), &"decision".into(), &"allowed".into())
    );
    assert_eq!(line["policy"], "AuthorizationPolicy/shop/\"cart\"");
    assert_eq!(line["prev"], Digest::of(log.segments[0][2].as_bytes()).to_string());
    assert_eq!(line["time"], "2027-01-15T08:00:00.000Z");
    assert!(line.get("reason").is_none());
}

#[test]
fn a_changed_record_is_found_where_the_next_one_continues_another() {
    for (segment, at) in [(0, 3), (0, 5), (1, 2)] {
        let mut log = good();
        let line = &mut log.segments[segment][at];
        *line = line.replace("allowed", "dropped");
        let file = ["1", "2"][segment];
        found(&log, &[(file, at as u64 + 2, Problem::Changed)]);
    }
}

#[test]
fn a_changed_last_record_of_a_segment_is_found_at_the_next_segment() {
    let mut log = good();
    let last = log.segments[0].last_mut().unwrap();
    *last = last.replace("\"run\"", "\"run\" ");
    found(&log, &[("2", 1, Problem::Changed)]);
}

#[test]
fn a_record_that_was_taken_out_is_found() {
    let mut log = good();
    log.segments[0].remove(4);
    found(&log, &[("1", 5, Problem::Missing { expected: 5, found: 6 })]);
    let mut log = good();
    log.segments[1].drain(2..4);
    found(&log, &[("2", 3, Problem::Missing { expected: 10, found: 12 })]);
}

#[test]
fn records_that_changed_places_are_found() {
    let mut log = good();
    log.segments[0].swap(3, 4);
    found(
        &log,
        &[
            ("1", 4, Problem::Missing { expected: 4, found: 5 }),
            ("1", 5, Problem::Moved { expected: 6, found: 4 }),
            ("1", 6, Problem::Missing { expected: 5, found: 6 }),
        ],
    );
}

#[test]
fn a_record_that_was_put_in_or_twice_is_found() {
    let mut log = good();
    let again = log.segments[0][3].clone();
    log.segments[0].insert(4, again);
    found(&log, &[("1", 5, Problem::Moved { expected: 5, found: 4 })]);
}

/// Somebody who changes a record and all that follow, so that the chain is whole.
fn forged(from_checkpoint: bool) -> Log {
    let mut log = good();
    log.segments[1].truncate(if from_checkpoint { 4 } else { 7 });
    let lines = log.segments[1].clone();
    let before = &lines[if from_checkpoint { 1 } else { 4 }];
    let keep = if from_checkpoint { 2 } else { 5 };
    log.segments[1].truncate(keep);
    log.chain = Chain::after(7 + keep as u64, Digest::of(before.as_bytes()));
    log
}

#[test]
fn a_chain_that_was_written_anew_fails_at_the_next_checkpoint() {
    let mut log = forged(true);
    log.decide("allowed");
    log.decide("allowed");
    // The old signature, in a record that fits into the chain.
    let genuine: serde_json::Value = serde_json::from_str(&good().segments[1][4]).unwrap();
    let (signer, signature) = (genuine["signer"].as_str().unwrap(), genuine["signature"].as_str().unwrap());
    log.put(&Entry::Checkpoint { signer: signer.parse().unwrap(), signature });
    found(&log, &[("2", 5, by_another_key())]);
}

#[test]
fn a_chain_that_was_written_anew_without_checkpoints_is_unsigned_for_too_long() {
    let mut log = forged(false);
    let due = |records, seconds| Problem::Unsigned { records, seconds, due_records: 4, due_seconds: 10 };
    for _ in 0..24 {
        log.decide("allowed");
    }
    found(&log, &[]);
    log.decide("allowed");
    found(&log, &[("2", 30, due(25, 0))]);
    let mut log = forged(false);
    log.decide("allowed");
    log.seconds += 21;
    log.decide("allowed");
    found(&log, &[]);
    log.seconds += 1;
    log.decide("allowed");
    found(&log, &[("2", 8, due(3, 22))]);
}

#[test]
fn a_log_without_signatures_is_no_proof() {
    let mut log = Log::new("c0ffee", NODE);
    log.segment();
    log.decide("allowed");
    found(&log, &[("1", 0, Problem::NothingSigned)]);
    let report = verified(&log.segments, 1, Expected::default(), None);
    assert!(report.holds(), "its chain alone is whole: {report:?}");
    assert_eq!(report.checkpoints, 0);
}

#[test]
fn signatures_of_anybody_but_the_node_are_found() {
    let workload = "spiffe://cluster.local/ns/shop/sa/cart";
    for (signer, problem) in [
        (workload, Problem::Signature("a workload's".to_owned())),
        (OTHER_NODE, Problem::SignedByOther { expected: NODE.to_owned(), found: OTHER_NODE.to_owned() }),
    ] {
        let mut log = Log::new("c0ffee", NODE);
        log.signer = signer;
        log.segment();
        log.decide("allowed");
        log.checkpoint();
        found(&log, &[("1", 4, problem), ("1", 0, Problem::NothingSigned)]);
    }
}

#[test]
fn a_checkpoint_says_who_signed_in_its_own_segment() {
    let mut log = good();
    let signer = Digest::of(b"nobody");
    log.put(&Entry::Checkpoint { signer, signature: "" });
    found(&log, &[("2", 10, Problem::UnknownSigner(signer))]);
    // The certificates of the first segment do not count in the second: the first is removed one day.
    let mut log = good();
    log.segments.truncate(1);
    log.chain = Chain::after(7, Digest::of(log.segments[0][6].as_bytes()));
    log.segment();
    log.segments[1].pop();
    log.chain = Chain::after(8, Digest::of(log.segments[1][0].as_bytes()));
    log.checkpoint();
    found(&log, &[("2", 2, Problem::UnknownSigner(Digest::of(NODE.as_bytes())))]);
}

#[test]
fn another_s_certificates_under_the_signer_s_name_are_found() {
    let mut log = Log::new("c0ffee", NODE);
    log.segment();
    let signer = Digest::of(NODE.as_bytes());
    log.put(&Entry::Signer { signer, certificates: vec![OTHER_NODE.to_owned()] });
    log.checkpoint();
    let problem = Problem::Signature("another certificate".to_owned());
    found(&log, &[("1", 4, problem), ("1", 0, Problem::NothingSigned)]);
}

#[test]
fn a_segment_of_another_node_or_chain_is_found() {
    let other = good_of("0ff1ce", OTHER_NODE);
    let mut log = good();
    log.segments[1] = other.segments[1].clone();
    let problem = Problem::OtherChain { expected: "c0ffee".to_owned(), found: "0ff1ce".to_owned() };
    let node = Problem::OtherNode { expected: NODE.to_owned(), found: OTHER_NODE.to_owned() };
    found(&log, &[("2", 1, Problem::Changed), ("2", 1, problem.clone()), ("2", 1, node.clone())]);
    // The whole log of another node.
    let asked = Expected { node: Some(NODE.to_owned()), ..Expected::default() };
    found_of(&other.segments, 1, asked.clone(), &[("1", 1, node.clone()), ("2", 1, node)]);
    found_of(&good().segments, 1, asked, &[]);
    // Of another time of the same node.
    let mut log = good();
    log.segments[1] = good_of("0ff1ce", NODE).segments[1].clone();
    found(&log, &[("2", 1, Problem::Changed), ("2", 1, problem)]);
}

#[test]
fn segments_that_are_missing_or_bear_another_number_are_found() {
    let mut log = good();
    log.segment();
    log.checkpoint();
    let of = |numbers: &[(u64, usize)]| {
        let mut verifier = Verifier::new(Expected::default(), Some(&Names));
        for (number, at) in numbers {
            verifier.begin(&number.to_string(), Some(*number));
            log.segments[*at].iter().for_each(|line| verifier.line(line.as_bytes()));
        }
        let findings = verifier.finish().findings;
        findings.into_iter().map(|found| (found.file, found.line, found.problem)).collect::<Vec<_>>()
    };
    assert_eq!(of(&[(1, 0), (2, 1), (3, 2)]), []);
    let missing = Problem::Missing { expected: 8, found: 17 };
    let gone = Problem::SegmentMissing { up_to: 2 };
    assert_eq!(of(&[(1, 0), (3, 2)]), [("3".to_owned(), 0, gone), ("3".to_owned(), 1, missing.clone())]);
    let other = Problem::OtherSegment { expected: 2, found: 3 };
    assert_eq!(of(&[(1, 0), (2, 2)]), [("2".to_owned(), 1, missing), ("2".to_owned(), 1, other)]);
    assert_eq!(of(&[(2, 1), (3, 2)]), [("2".to_owned(), 1, Problem::NotRetired)]);
}

#[test]
fn the_oldest_segment_may_go_only_in_order() {
    let mut log = good();
    let digest = Digest::of(log.segments[0][6].as_bytes());
    log.put(&Entry::Retired { segment: 1, last: 7, digest });
    log.checkpoint();
    found_of(&log.segments[1..], 2, Expected::default(), &[]);
    // Here both stand, as after a crash between the record and the removal.
    found(&log, &[]);
    for (segment, last, digest) in [(2, 7, digest), (1, 6, digest), (1, 7, Digest::of(b"another"))] {
        let mut log = good();
        log.put(&Entry::Retired { segment, last, digest });
        log.checkpoint();
        found_of(&log.segments[1..], 2, Expected::default(), &[("2", 1, Problem::NotRetired)]);
    }
    // One file alone says nothing of what went before.
    let alone = Expected { alone: true, ..Expected::default() };
    found_of(&good().segments[1..], 2, alone, &[]);
}

#[test]
fn a_log_that_was_cut_off_is_found_by_what_was_seen_elsewhere() {
    let anchored = |seq: u64, digest: Option<Digest>| Expected {
        anchor: Some(Anchor { seq, digest }),
        ..Expected::default()
    };
    let whole = good();
    let digest_of_12 = Digest::of(whole.segments[1][4].as_bytes());
    let mut cut = good();
    cut.segments[1].truncate(3);
    found(&cut, &[]);
    found_of(&cut.segments, 1, anchored(10, None), &[]);
    let problem = |expected| Problem::CutOff { last: 10, expected };
    found_of(&cut.segments, 1, anchored(11, None), &[("2", 3, problem(11))]);
    found_of(&cut.segments, 1, anchored(12, Some(digest_of_12)), &[("2", 3, problem(12))]);
    found_of(&whole.segments, 1, anchored(12, Some(digest_of_12)), &[]);
    // A whole log that another one was put in place of.
    let other = Digest::of(b"seen");
    found_of(&whole.segments, 1, anchored(12, Some(other)), &[("2", 5, Problem::AnchorDiffers(12))]);
    // What was seen was removed since.
    let mut retired = good();
    let digest = Digest::of(retired.segments[0][6].as_bytes());
    retired.put(&Entry::Retired { segment: 1, last: 7, digest });
    retired.checkpoint();
    found_of(&retired.segments[1..], 2, anchored(7, None), &[]);
    let gone = [("2", 0, Problem::AnchorRetired(7))];
    found_of(&retired.segments[1..], 2, anchored(7, Some(digest)), &gone);
}

#[test]
fn headers_stand_first_and_only_there_and_are_of_a_known_format() {
    let mut log = good();
    log.segments[0].remove(0);
    let report = verified(&log.segments, 1, Expected::default(), Some(&Names));
    assert_eq!(report.findings[0].problem, Problem::NoHeader);
    let mut log = good();
    let more = log.segments.pop().unwrap();
    log.segments[0].extend(more);
    found(&log, &[("1", 8, Problem::HeaderInside)]);
    let mut log = good();
    log.segments[0][0] = log.segments[0][0].replace("\"format\":1", "\"format\":2");
    found(&log, &[("1", 1, Problem::Format(2)), ("1", 2, Problem::Changed)]);
}

#[test]
fn what_is_no_record_is_found_once() {
    for (line, word) in [
        ("", "EOF"),
        ("{", "EOF"),
        ("null", "expected"),
        ("{\"seq\":4}", "prev"),
        (r#"{"seq":4,"prev":"00","time":"","run":"","kind":"stop"}"#, "64 digits"),
        (r#"{"seq":-1,"prev":"","time":"","run":"","kind":"stop"}"#, "u64"),
        (r#"{"seq":4,"seq":4,"prev":"","time":"","run":"","kind":"stop"}"#, "duplicate"),
    ] {
        let mut log = good();
        line.clone_into(&mut log.segments[0][3]);
        let report = verified(&log.segments, 1, Expected::default(), Some(&Names));
        let [Finding { line: 4, problem: Problem::NotARecord(why), .. }, changed] = &report.findings[..]
        else {
            panic!("{line}: {:?}", report.findings)
        };
        assert!(why.contains(word), "{why}");
        assert_eq!((changed.line, &changed.problem), (5, &Problem::Changed));
    }
    for key in ["chain", "node", "segment", "format", "checkpoint_records", "checkpoint_seconds"] {
        let mut log = good();
        log.segments[0][0] = log.segments[0][0].replace(&format!("\"{key}\":"), "\"x\":");
        let report = verified(&log.segments, 1, Expected::default(), Some(&Names));
        let problem = &report.findings[0].problem;
        assert_eq!(*problem, Problem::NotARecord(format!("{key} is missing")));
    }
}

#[test]
fn the_limit_of_a_line_is_exact() {
    for (bytes, expected) in
        [(LINE_BYTES_MAX, "expected"), (LINE_BYTES_MAX + 1, "a record has at most 65536")]
    {
        let mut verifier = Verifier::new(Expected::default(), None);
        verifier.begin("1", Some(1));
        verifier.line("x".repeat(bytes).as_bytes());
        let report = verifier.finish();
        assert!(report.findings[0].to_string().contains(expected), "{:?}", report.findings);
    }
}

#[test]
fn a_torn_line_is_told_at_the_end_and_found_elsewhere() {
    let log = good();
    let torn = |last: bool| {
        let mut verifier = Verifier::new(Expected::default(), Some(&Names));
        for (number, lines) in (1..).zip(&log.segments) {
            verifier.begin(&number.to_string(), Some(number));
            lines.iter().for_each(|line| verifier.line(line.as_bytes()));
            if (number == 2) == last {
                verifier.torn(9);
            }
        }
        verifier.finish()
    };
    let report = torn(true);
    assert!(report.holds());
    assert_eq!(report.notes.len(), 1);
    assert_eq!((report.notes[0].line, &report.notes[0].what), (10, &What::Torn(9)));
    let found = &torn(false).findings;
    assert_eq!(
        found[..],
        [Finding { file: "1".to_owned(), line: 8, problem: Problem::TornInside { bytes: 9 } }]
    );
}

#[test]
fn an_empty_log_is_no_log() {
    let mut verifier = Verifier::new(Expected::default(), Some(&Names));
    assert_eq!(Verifier::new(Expected::default(), None).finish().findings[0].problem, Problem::Empty);
    verifier.begin("1", Some(1));
    assert_eq!(verifier.finish().findings[0].problem, Problem::Empty);
}

#[test]
fn what_a_crash_and_a_full_queue_left_is_told_and_no_finding() {
    let mut log = good();
    let mut restarted = |torn_bytes| {
        let torn_digest = Some(Digest::of(b"torn"));
        log.put(&Entry::Recovered(Recovered { torn_bytes, torn_digest, unreadable_lines: 0 }));
        log.put(&Entry::Start { version: "0" });
    };
    restarted(5);
    log.put(&Entry::Lost { records: 3 });
    log.put(&Entry::Gap { expected: 30, found: 20 });
    log.checkpoint();
    let report = verified(&log.segments, 1, Expected::default(), Some(&Names));
    assert!(report.holds(), "{:?}", report.findings);
    let told: Vec<_> = report.notes.iter().map(|note| (note.line, note.what.clone())).collect();
    let recovered = What::Recovered { torn_bytes: 5, unreadable_lines: 0 };
    let gap = What::Gap { expected: 30, found: 20 };
    let no_stop = What::NoStop(RUN.to_owned());
    assert_eq!(told, [(10, recovered), (12, What::Lost(3)), (13, gap), (11, no_stop)]);
    assert_eq!(report.lost, 3);
}

#[test]
fn time_without_a_daemon_is_no_time_without_a_signature() {
    let mut log = good();
    log.decide("allowed");
    log.seconds += 86_400;
    log.put(&Entry::Start { version: "0" });
    log.decide("allowed");
    found(&log, &[]);
}

#[test]
fn what_was_signed_late_is_told() {
    let mut log = Log::new("c0ffee", NODE);
    log.segment();
    log.seconds += 21;
    log.checkpoint();
    log.decide("allowed");
    log.seconds += 22;
    log.checkpoint();
    let report = verified(&log.segments, 1, Expected::default(), Some(&Names));
    assert!(report.holds(), "{:?}", report.findings);
    let [note] = &report.notes[..] else { panic!("{:?}", report.notes) };
    assert_eq!((note.line, &note.what), (5, &What::LateSignature { seconds: 22, due_seconds: 10 }));
}

#[test]
fn findings_are_listed_up_to_the_limit_and_counted_beyond() {
    let mut verifier = Verifier::new(Expected::default(), None);
    verifier.begin("1", Some(1));
    (0..103).for_each(|_| verifier.line(b"x"));
    let report = verifier.finish();
    // One more: there is no record at all.
    assert_eq!((report.findings.len(), report.more), (100, 4));
}

fn tail_of(text: &str) -> Tail {
    Tail::of(text.as_bytes())
}

#[test]
fn the_tail_of_a_segment_tells_where_the_next_line_goes() {
    let log = good();
    let text =
        |lines: usize| log.segments[1][..lines].iter().map(|line| format!("{line}\n")).collect::<String>();
    let last = |lines: usize, unreadable_lines, is_stopped| {
        let line = log.segments[1][lines - 1].as_bytes();
        let chain = Chain::after(7 + lines as u64, Digest::of(line));
        Some(Last { chain, unreadable_lines, is_stopped })
    };
    assert_eq!(tail_of(""), Tail::default());
    assert_eq!(tail_of(&text(7)).last, last(7, 0, false));
    assert_eq!(tail_of(&text(8)).last, last(8, 0, true), "a stop");
    assert_eq!(tail_of(&text(9)).last, last(9, 0, true), "and its checkpoint");
    assert_eq!(tail_of(&text(5)).last, last(5, 0, false), "a checkpoint alone");
    let torn = tail_of(&(text(7) + "{\"seq\":"));
    assert_eq!((torn.last, torn.torn), (last(7, 0, false), Some((7, Digest::of(b"{\"seq\":")))));
    assert_eq!(tail_of("{\"seq\":").torn, Some((7, Digest::of(b"{\"seq\":"))));
    // What is no record takes a place all the same, and nothing is in order after it.
    let unreadable = tail_of(&(text(9) + "x\ny\n")).last.unwrap();
    assert_eq!(unreadable.chain, Chain::after(18, Digest::of(b"y")));
    assert_eq!((unreadable.unreadable_lines, unreadable.is_stopped), (2, false));
    assert_eq!(tail_of("x\ny\n").last, None);
}

#[test]
fn a_header_tells_what_went_before() {
    let log = good();
    let opening = header(log.segments[1][0].as_bytes()).unwrap();
    assert_eq!((&*opening.chain, opening.segment, opening.before), ("c0ffee", 2, 7));
    assert_eq!(opening.digest, Digest::of(log.segments[0][6].as_bytes()));
    assert_eq!(header(log.segments[1][1].as_bytes()), None);
    assert_eq!(header(b"x"), None);
}

#[test]
fn digests_anchors_and_times_have_one_form() {
    let digest = Digest::of(b"");
    assert_eq!(digest.to_string(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    assert_eq!(digest.to_string().parse(), Ok(digest));
    let text = digest.to_string();
    for bad in ["", "e3", &text[1..], &text.to_uppercase(), &text.replace('e', "g"), &format!("{text}0")] {
        assert!(bad.parse::<Digest>().is_err(), "{bad}");
    }
    assert_eq!("12".parse(), Ok(Anchor { seq: 12, digest: None }));
    assert_eq!(format!("12:{text}").parse(), Ok(Anchor { seq: 12, digest: Some(digest) }));
    for bad in ["", ":", "x", "-1", "1:", "1:00", " 1"] {
        assert!(bad.parse::<Anchor>().is_err(), "{bad}");
    }
    let time = UNIX_EPOCH + Duration::from_millis(1_800_000_000_123);
    assert_eq!(stamp(time), "2027-01-15T08:00:00.123Z");
    assert_eq!(stamped(&stamp(time)), Some(time));
    assert_eq!(stamp(UNIX_EPOCH - Duration::from_secs(1)), "1970-01-01T00:00:00.000Z");
    for bad in ["", "yesterday", "2027-01-15", "1969-12-31T23:59:59Z", "2027-13-01T00:00:00Z"] {
        assert_eq!(stamped(bad), None, "{bad}");
    }
}

#[test]
fn the_last_number_that_there_is_ends_no_reader() {
    let line =
        format!(r#"{{"seq":{},"prev":"{}","time":"","run":"","kind":"stop"}}"#, u64::MAX, Digest::NONE);
    let tail = tail_of(&format!("{line}\nx\n"));
    assert_eq!(tail.last.unwrap().chain.last_sequence(), u64::MAX - 1);
    let mut verifier = Verifier::new(Expected::default(), None);
    verifier.begin("1", None);
    verifier.line(line.as_bytes());
    verifier.line(b"x");
    verifier.line(line.as_bytes());
    assert!(!verifier.finish().holds());
}

#[test]
fn numbers_of_the_log_are_told_by_its_last_line() {
    let log = good();
    assert_eq!(log.last(), 16);
}
