//! What a replay found, in groups: for people, and as one document for programs.

use std::{collections::BTreeMap, fmt};

use serde_json::{Value, json};

use super::line::Skipped;

/// Groups of changes, or of what cannot be told, that are kept: more than anybody reads. Beyond it changes are counted only.
pub const GROUPS_MAX: usize = 5_000;

/// Lines of one group, and bad lines, that are named.
pub const LINES_NAMED_MAX: usize = 10;

/// See the module.
#[derive(Debug, Default)]
pub struct Replayed {
    pub(super) lines: u64,
    pub(super) unchanged: u64,
    pub(super) refused: Groups<Changed>,
    pub(super) allowed: Groups<Changed>,
    pub(super) undecided: Groups<Undecided>,
    pub(super) bad: Numbers,
    pub(super) problems: Vec<(u64, String)>,
    pub(super) skipped: BTreeMap<Skipped, u64>,
    /// What is wrong with the folder's documents.
    pub(super) notes: Vec<String>,
}

/// Verdicts that would be others, and are alike.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Changed {
    pub(super) is_request: bool,
    pub(super) from: String,
    pub(super) to: String,
    /// Method and path.
    pub(super) request: Option<(String, String)>,
    pub(super) decided_by: Option<String>,
    pub(super) reason: Option<String>,
    /// Who decided before, as the log has it.
    pub(super) before: Option<String>,
}

/// Lines that lack the same.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Undecided {
    pub(super) to: String,
    pub(super) needs: String,
}

/// The numbers of some lines: how many, and the first of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Numbers {
    pub(super) count: u64,
    pub(super) first: Vec<u64>,
}

impl Numbers {
    pub(super) fn add(&mut self, number: u64) {
        self.count += 1;
        if self.first.len() < LINES_NAMED_MAX {
            self.first.push(number);
        }
    }
}

#[derive(Debug)]
pub(super) struct Groups<K> {
    groups: BTreeMap<K, Numbers>,
    count: u64,
    /// Of those that no group was made for.
    rest: Numbers,
}

impl<K> Default for Groups<K> {
    fn default() -> Self {
        Self { groups: BTreeMap::new(), count: 0, rest: Numbers::default() }
    }
}

impl<K: Ord> Groups<K> {
    pub(super) fn add(&mut self, key: K, number: u64) {
        self.count += 1;
        if self.groups.len() >= GROUPS_MAX && !self.groups.contains_key(&key) {
            self.rest.add(number);
        } else {
            self.groups.entry(key).or_default().add(number);
        }
    }

    #[cfg(test)]
    pub(super) fn rest_count(&self) -> u64 {
        self.rest.count
    }

    /// The largest first.
    fn sorted(&self) -> Vec<(&K, &Numbers)> {
        let mut groups: Vec<(&K, &Numbers)> = self.groups.iter().collect();
        groups.sort_by(|one, other| other.1.count.cmp(&one.1.count).then_with(|| one.0.cmp(other.0)));
        groups
    }
}

impl Replayed {
    /// Whether some verdict would be another, or cannot be told.
    pub fn has_changes(&self) -> bool {
        self.refused.count > 0 || self.allowed.count > 0 || self.undecided.count > 0
    }

    /// Whether some line could not be read.
    pub fn has_bad_lines(&self) -> bool {
        self.bad.count > 0
    }

    /// One document with everything.
    pub fn json(&self) -> Value {
        let changed = |groups: &Groups<Changed>| {
            let all = groups.sorted().into_iter().map(|(key, numbers)| {
                json!({
                    "kind": if key.is_request { "request" } else { "connection" },
                    "from": key.from,
                    "to": key.to,
                    "method": key.request.as_ref().map(|(method, _)| method),
                    "path": key.request.as_ref().map(|(_, path)| path),
                    "decidedBy": key.decided_by,
                    "reason": key.reason,
                    "before": key.before,
                    "count": numbers.count,
                    "lines": numbers.first,
                })
            });
            json!({"count": groups.count, "groups": all.collect::<Vec<_>>(), "ungrouped": groups.rest.count})
        };
        let undecided = self.undecided.sorted().into_iter().map(|(key, numbers)| {
            json!({"to": key.to, "needs": key.needs, "count": numbers.count, "lines": numbers.first})
        });
        let problems = self.problems.iter().map(|(line, problem)| json!({"line": line, "problem": problem}));
        let skipped = self.skipped.iter().map(|(why, count)| json!({"why": why.words(), "count": count}));
        json!({
            "lines": self.lines,
            "unchanged": self.unchanged,
            "refused": changed(&self.refused),
            "allowed": changed(&self.allowed),
            "undecided": {
                "count": self.undecided.count,
                "groups": undecided.collect::<Vec<_>>(),
                "ungrouped": self.undecided.rest.count,
            },
            "unreadable": {"count": self.bad.count, "lines": problems.collect::<Vec<_>>()},
            "skipped": skipped.collect::<Vec<_>>(),
            "notes": self.notes,
        })
    }
}

/// Several lines; the last is the count.
impl fmt::Display for Replayed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (groups, words) in [(&self.refused, "would be refused"), (&self.allowed, "would be allowed")] {
            for (key, numbers) in groups.sorted() {
                writeln!(formatter, "{words}: {key}{}", Shown(numbers))?;
            }
            if groups.rest.count > 0 {
                writeln!(
                    formatter,
                    "{words}: {} more of other kinds{}",
                    groups.rest.count,
                    Shown(&groups.rest)
                )?;
            }
        }
        for (key, numbers) in self.undecided.sorted() {
            let Undecided { to, needs } = key;
            writeln!(formatter, "cannot be told: {to}: it needs {needs}{}", Shown(numbers))?;
        }
        if self.undecided.rest.count > 0 {
            let rest = &self.undecided.rest;
            writeln!(formatter, "cannot be told: {} more of other kinds{}", rest.count, Shown(rest))?;
        }
        for (line, problem) in &self.problems {
            writeln!(formatter, "line {line} cannot be read: {problem}")?;
        }
        let named = u64::try_from(self.problems.len()).unwrap_or(u64::MAX);
        if self.bad.count > named {
            writeln!(formatter, "{} more lines cannot be read", self.bad.count - named)?;
        }
        for (why, count) in &self.skipped {
            writeln!(formatter, "not judged: {count} lines, {}", why.words())?;
        }
        self.notes.iter().try_for_each(|note| writeln!(formatter, "note: {note}"))?;
        writeln!(
            formatter,
            "{} lines: {} unchanged, {} would be refused, {} would be allowed, {} cannot be told, {} cannot be read",
            self.lines,
            self.unchanged,
            self.refused.count,
            self.allowed.count,
            self.undecided.count,
            self.bad.count
        )
    }
}

impl fmt::Display for Changed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, request, decided_by, reason, before, .. } = self;
        write!(formatter, "{from} to {to}")?;
        if let Some((method, path)) = request {
            write!(formatter, " {method} {path}")?;
        }
        write!(formatter, ", by {}", decided_by.as_deref().unwrap_or("no object"))?;
        if let Some(reason) = reason {
            write!(formatter, " ({reason})")?;
        }
        before.as_ref().map_or(Ok(()), |before| write!(formatter, ", before by {before}"))
    }
}

/// Behind a group: how often, and where first.
struct Shown<'n>(&'n Numbers);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Numbers { count, first } = self.0;
        let numbers: Vec<String> = first.iter().map(u64::to_string).collect();
        let more = if *count > u64::try_from(first.len()).unwrap_or(u64::MAX) { ", …" } else { "" };
        write!(formatter, ": {count} times, lines {}{more}", numbers.join(", "))
    }
}
