//! What was seen, for people: a table, the wire, and one line that says it all.

use serde_json::Value;
use world::wire::Seen;

use crate::{Expected, Scene};

/// How one scene went.
pub(crate) struct Outcome<'scene> {
    pub(crate) scene: &'scene Scene,
    /// What the asker got.
    pub(crate) said: String,
    /// The access log's line at the destination.
    pub(crate) record: Value,
    pub(crate) as_expected: bool,
}

#[derive(Default)]
pub(crate) struct Report {
    lines: Vec<String>,
    as_expected: usize,
    all: usize,
    plaintext_bytes: u64,
}

impl Report {
    pub(crate) fn scene(&mut self, outcome: Outcome<'_>) {
        let Outcome { scene, said, record, as_expected } = outcome;
        let (outcome, expected) = match scene.expected {
            Expected::Answer => ("answered", "an answer"),
            Expected::Refusal(_) => ("refused", "a refusal"),
        };
        let route = format!("{} -> {}{}", scene.from, scene.to, scene.path);
        self.count(as_expected);
        if !as_expected {
            self.lines
                .push(format!("NOT AS EXPECTED  {route}: expected {expected}, got: {said}\n    {record}"));
            return;
        }
        self.lines.push(format!(
            "{route:40} {outcome:9} as {identity}\n{:40} by {decision}\n{:40} path {path}, {tls}",
            "",
            "",
            identity = text(&record["source"]["identity"], "nobody: no certificate was shown"),
            decision = decision(&record),
            path = text(&record["path"], "?"),
            tls = tls(&record["tls"]),
        ));
    }

    /// What somebody between the nodes saw of all that.
    pub(crate) fn wire(&mut self, seen: &Seen) {
        self.plaintext_bytes = seen.plaintext_bytes();
        self.count(self.plaintext_bytes == 0 && seen.needles == 0 && seen.missed == 0);
        self.lines.push(format!(
            "\nbetween the nodes: {} frames, {} bytes of TCP payload in the tunnel, {} bytes of the applications' payload in \
             plaintext, their marker {} times",
            seen.frames,
            seen.port_bytes(15008),
            self.plaintext_bytes,
            seen.needles,
        ));
    }

    /// The same count for a pair outside the mesh: it must not be 0, or the count above proves nothing.
    pub(crate) fn control(&mut self, seen: &Seen) {
        self.count(seen.plaintext_bytes() > 0 && seen.needles > 0);
        self.lines.push(format!(
            "control, the same request between two pods outside the mesh: {} bytes in plaintext, the marker {} times",
            seen.plaintext_bytes(),
            seen.needles
        ));
    }

    pub(crate) fn print(&self) {
        for line in &self.lines {
            println!("{line}");
        }
    }

    pub(crate) fn is_as_expected(&self) -> bool {
        self.as_expected == self.all && self.plaintext_bytes == 0
    }

    pub(crate) fn last_line(&self) -> String {
        format!(
            "demo: {} of {} as expected, {} plaintext bytes between the nodes",
            self.as_expected, self.all, self.plaintext_bytes
        )
    }

    fn count(&mut self, as_expected: bool) {
        self.all += 1;
        self.as_expected += usize::from(as_expected);
    }
}

fn decision(record: &Value) -> String {
    let policy = text(&record["policy"], "no policy");
    let rule = record["rule"].as_str().map(|rule| format!(", {rule}")).unwrap_or_default();
    let reason = record["reason"].as_str().map(|reason| format!(" ({reason})")).unwrap_or_default();
    format!("{policy}{rule}{reason}")
}

fn tls(facts: &Value) -> String {
    if facts.is_null() {
        return "no TLS".to_owned();
    }
    format!(
        "{}, {}, {}",
        text(&facts["version"], "?"),
        text(&facts["group"], "?"),
        text(&facts["cipher"], "?")
    )
}

fn text<'value>(value: &'value Value, otherwise: &'value str) -> &'value str {
    value.as_str().unwrap_or(otherwise)
}
