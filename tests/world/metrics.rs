//! Counters as a scrape shows them.

use std::collections::BTreeMap;

/// All samples of one scrape.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Debug, Clone, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Reads the text format.
    pub fn parse(text: &str) -> Self {
        Self { samples: text.lines().filter_map(sample).collect() }
    }

    /// The sum of all samples of a name that carry these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.samples
            .iter()
            .filter(|sample| sample.name == name)
            .filter(|sample| {
                labels.iter().all(|(label, value)| sample.labels.get(*label).is_some_and(|is| is == value))
            })
            .map(|sample| sample.value)
            .sum()
    }

    /// The names, for a message.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .samples
            .iter()
            .map(|sample| format!("{} {:?} {}", sample.name, sample.labels, sample.value))
            .collect();
        names.dedup();
        names
    }
}

/// `name{label="value",…} number`
fn sample(line: &str) -> Option<Sample> {
    if line.starts_with('#') {
        return None;
    }
    let (head, value) = line.rsplit_once(' ')?;
    let (name, labels) = match head.split_once('{') {
        Some((name, labels)) => (name, parse_labels(labels.strip_suffix('}')?)?),
        None => (head, BTreeMap::new()),
    };
    Some(Sample { name: name.to_owned(), labels, value: value.parse().ok()? })
}

fn parse_labels(mut text: &str) -> Option<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    while !text.is_empty() {
        let (label, rest) = text.split_once("=\"")?;
        let (value, rest) = rest.split_once('"')?;
        labels.insert(label.to_owned(), value.to_owned());
        text = rest.strip_prefix(',').unwrap_or(rest);
    }
    Some(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_the_labels_asked_for() {
        let metrics = Metrics::parse(
            "# HELP x y\nx{reason=\"a\",node=\"n\"} 2\nx{reason=\"b\",node=\"n\"} 3\nx{reason=\"a\",node=\"m\"} 4\ny 1\n",
        );
        assert!((metrics.sum("x", &[("reason", "a")]) - 6.0).abs() < f64::EPSILON);
        assert!((metrics.sum("x", &[("reason", "a"), ("node", "n")]) - 2.0).abs() < f64::EPSILON);
        assert!((metrics.sum("y", &[]) - 1.0).abs() < f64::EPSILON);
        assert!(metrics.sum("z", &[]).abs() < f64::EPSILON);
    }
}
