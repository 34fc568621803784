//! A run of one second: that the worlds stand, that the load runs, and that the result is what programs can read. It says
//! nothing about speed.

use std::{fs, path::PathBuf, process::Command};

use serde_json::Value;

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[track_caller]
fn run(words: &str) -> Value {
    let folder =
        Folder(std::env::temp_dir().join(format!("mesh-bench-{}-{}", std::process::id(), words.len())));
    let done = Command::new(env!("CARGO_BIN_EXE_mesh-bench"))
        .args(["run", "--repeat", "1", "--seconds", "1", "--only", words, "--out"])
        .arg(&folder.0)
        .output()
        .expect("the benchmark can be started");
    assert!(done.status.success(), "{words}: {}", String::from_utf8_lossy(&done.stderr));
    assert!(fs::read_to_string(folder.0.join("latest.svg")).is_ok_and(|text| text.starts_with("<svg ")));
    assert!(fs::read_to_string(folder.0.join("latest.md")).is_ok_and(|text| text.contains("| rtt64 |")));
    let text = fs::read_to_string(folder.0.join("latest.json")).expect("the result is written");
    serde_json::from_str(&text).expect("the result is JSON")
}

#[test]
fn one_second_between_nodes_gives_rows_with_ratio_and_cpu_time() {
    let result = run("between,rtt64");
    let rows = result["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 2, "{result:#}");
    let [plain, ours] = [&rows[0], &rows[1]];
    assert_eq!((&plain["path"], &ours["path"]), (&Value::from("plain"), &Value::from("between")));
    for row in rows {
        assert_eq!((&row["measure"], &row["unit"]), (&Value::from("rtt64"), &Value::from("us")));
        assert!(row["median"].as_f64().is_some_and(|median| median > 0.0), "{row}");
    }
    assert_eq!(plain["ratio_to_plain"], 1.0);
    assert!(plain["proxy_cpu"].is_null() && ours["proxy_cpu"].as_f64().is_some_and(|cpu| cpu > 0.0));
}

#[test]
fn a_way_that_cannot_be_run_is_named_with_its_reason_and_has_no_row() {
    let result = run("envoy,same-node,rtt64");
    let absent = &result["absent"][0];
    assert_eq!(
        (&absent["path"], &absent["reason"]),
        (&Value::from("envoy"), &Value::from("no Envoy was given"))
    );
    let rows = result["rows"].as_array().expect("rows");
    assert!(rows.iter().all(|row| row["path"] == "plain"), "{result:#}");
}

#[test]
fn unknown_words_are_refused_before_anything_is_made() {
    let done = Command::new(env!("CARGO_BIN_EXE_mesh-bench"))
        .args(["run", "--only", "sidecar", "--out", "/dev/null/nowhere"])
        .output()
        .expect("the benchmark can be started");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(!done.status.success() && said.contains("--only sidecar: expected one of"), "{said}");
}
