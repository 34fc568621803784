//! What the cases came to, for people and for programs.

use serde_json::{Map, Value, json};

use super::{compare::Difference, fields::InvalidCases};

/// One case.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub name: String,
    pub pass: bool,
    /// Every key that applies to the check.
    pub got: Map<String, Value>,
    /// The deciding object, if one decided.
    pub policy: Option<String>,
    pub rule: Option<String>,
    /// The attribute that decided, in words.
    pub reason: Option<String>,
    /// Why the case could not be run: it holds as little as one that falls short.
    pub unusable: Option<InvalidCases>,
    pub(super) differences: Vec<Difference>,
}

/// All cases of one or more files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    pub cases: Vec<Outcome>,
}

impl Report {
    pub fn passed(&self) -> usize {
        self.cases.iter().filter(|case| case.pass).count()
    }

    pub fn failed(&self) -> usize {
        self.cases.len() - self.passed()
    }

    /// Why cases could not be run.
    pub fn unusable(&self) -> impl Iterator<Item = &InvalidCases> {
        self.cases.iter().filter_map(|case| case.unusable.as_ref())
    }

    /// Cases of another file behind these.
    pub fn append(&mut self, mut other: Self) {
        self.cases.append(&mut other.cases);
    }

    pub fn json(&self) -> Value {
        let case = |case: &Outcome| {
            json!({
                "name": case.name,
                "pass": case.pass,
                "got": case.got,
                "policy": case.policy,
                "rule": case.rule,
                "reason": case.reason,
            })
        };
        let cases: Vec<Value> = self.cases.iter().map(case).collect();
        json!({"cases": cases, "passed": self.passed(), "failed": self.failed()})
    }

    /// A line for each case that falls short, then the count.
    pub fn lines(&self) -> Vec<String> {
        let short = self.cases.iter().filter(|case| !case.pass).map(Outcome::line);
        let count = format!("{} passed, {} failed", self.passed(), self.failed());
        short.chain([count]).collect()
    }
}

impl Outcome {
    pub(super) fn unusable(name: &str, invalid: InvalidCases) -> Self {
        Self {
            name: name.to_owned(),
            pass: false,
            got: Map::new(),
            policy: None,
            rule: None,
            reason: Some(format!("it cannot be run: {invalid}")),
            unusable: Some(invalid),
            differences: Vec::new(),
        }
    }

    fn line(&self) -> String {
        if let Some(invalid) = &self.unusable {
            return format!("{}: it cannot be run: {invalid}", self.name);
        }
        let differences: Vec<String> = self
            .differences
            .iter()
            .map(|each| format!("{}: expected {}, got {}", each.key, each.expected, each.got))
            .collect();
        let decided: Vec<&str> =
            [self.policy.as_deref(), self.rule.as_deref()].into_iter().flatten().collect();
        let decided = if decided.is_empty() { "no object".to_owned() } else { decided.join(" ") };
        let reason = self.reason.as_deref().map(|reason| format!(" ({reason})")).unwrap_or_default();
        format!("{}: {}; decided by {decided}{reason}", self.name, differences.join("; "))
    }
}
