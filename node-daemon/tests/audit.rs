//! `culvert audit verify` as operators run it: the built command, on files. Their chains are whole; who signs is tested where
//! keys are.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, UNIX_EPOCH},
};

use node_core::audit::{
    FORMAT,
    chain::Chain,
    entry::{Entry, Segment},
};

const NODE: &str = "spiffe://cluster.local/culvert/node/node-a";

/// An empty folder for one test.
fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("audit").join(test);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("the folder can be made");
    folder
}

/// A log of one segment with so many records after its first.
fn log(folder: &Path, records: usize) -> PathBuf {
    let (mut chain, mut text) = (Chain::BEGIN, Vec::new());
    let begin = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let segment = Segment {
        format: FORMAT,
        chain: "c0ffee",
        node: NODE,
        segment: 1,
        checkpoint_records: 8,
        checkpoint_seconds: 10,
    };
    chain.append("run", begin, &Entry::Segment(segment), &mut text);
    for number in 0..records {
        chain.append("run", begin, &Entry::Snapshot { number: number as u64, digest: "d1ge57" }, &mut text);
    }
    let file = folder.join("audit-00000001.jsonl");
    fs::write(&file, text).expect("the file can be written");
    file
}

#[track_caller]
fn check(arguments: &[&str], status: i32, words: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_culvert"))
        .args(["audit", "verify"])
        .args(arguments)
        .output()
        .expect("the command was built");
    let said = String::from_utf8([output.stdout, output.stderr].concat()).expect("it writes UTF-8");
    assert_eq!(output.status.code(), Some(status), "{said}");
    for word in words {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("it is UTF-8")
}

#[test]
fn a_whole_chain_holds_and_who_wrote_it_is_not_known() {
    let folder = folder("whole");
    let file = log(&folder, 3);
    let words =
        ["log of spiffe://cluster.local/culvert/node/node-a: 1 segments, records 1 to 4", "the log holds"];
    check(&[text(&folder), "--chain-only"], 0, &words);
    check(&[text(&file), "--chain-only"], 0, &["who wrote this is not known"]);
    check(&[text(&folder), "--chain-only", "--node", NODE, "--expect-at-least", "4"], 0, &["the log holds"]);
}

#[test]
fn what_is_not_as_it_was_written_is_named_by_file_and_line() {
    let folder = folder("changed");
    let file = log(&folder, 3);
    let whole = fs::read_to_string(&file).expect("it can be read");
    let lines: Vec<&str> = whole.lines().collect();
    let without = |at: usize| {
        let rest = lines.iter().enumerate().filter(|(number, _)| *number != at);
        rest.map(|(_, line)| format!("{line}\n")).collect::<String>()
    };
    for (text_of, at, words) in [
        (whole.replace("\"number\":1", "\"number\":9"), 4, "was changed"),
        (without(2), 3, "1 records were taken out"),
        (without(0), 1, "says whose it is"),
        (format!("{whole}{}\n", lines[2]), 5, "put in, put twice, or moved"),
        (format!("{whole}garbage\n"), 5, "no record"),
    ] {
        fs::write(&file, text_of).expect("it can be written");
        let place = format!("audit-00000001.jsonl:{at}: ");
        check(&[text(&folder), "--chain-only"], 1, &[&place, words, "the log does not hold"]);
    }
}

#[test]
fn what_was_seen_elsewhere_and_is_not_here_is_found() {
    let folder = folder("cut");
    log(&folder, 3);
    let ask = |anchor: &str, status, words: &[&str]| {
        check(&[text(&folder), "--chain-only", "--expect-at-least", anchor], status, words);
    };
    ask("5", 1, &["ends with record 4, and 5 was seen: 1 records were cut off"]);
    ask(&format!("4:{}", "0".repeat(64)), 1, &["another digest"]);
    ask("four", 2, &["expected a number"]);
    ask("4:00", 2, &["64 digits"]);
    let other = NODE.replace("node-a", "node-b");
    check(&[text(&folder), "--chain-only", "--node", &other], 1, &["node-b"]);
    check(&[text(&folder), "--chain-only", "--node", "node-a"], 2, &["node"]);
}

#[test]
fn without_roots_there_is_no_verdict() {
    let folder = folder("roots");
    log(&folder, 3);
    let empty = folder.join("no-root");
    check(&["--root", text(&empty), text(&folder)], 2, &["bundle.pem", "--root-ca"]);
    check(&[text(&folder), "--root-ca", "/nowhere.pem"], 2, &["/nowhere.pem", "--root-ca"]);
    check(&[text(&folder), "--root-ca", "/nowhere.pem", "--chain-only"], 2, &["cannot be used with"]);
    check(&[text(&folder.join("absent")), "--chain-only"], 2, &["absent"]);
    fs::create_dir_all(&empty).expect("a folder can be made");
    check(&[text(&empty), "--chain-only"], 2, &["no segment is in it"]);
    // Nothing is signed by anybody.
    let pem = rcgen::CertificateParams::default();
    let key = rcgen::KeyPair::generate().expect("a key");
    let root = empty.join("root.pem");
    fs::write(&root, pem.self_signed(&key).expect("a root").pem()).expect("it can be written");
    check(&[text(&folder), "--root-ca", text(&root)], 1, &["nothing is signed"]);
}
