//! Texts that stand for all texts, as far as some patterns can tell them apart.
//!
//! A pattern knows a text by its beginning, by its end, or whole. So every text falls together with one of: a whole one, a
//! beginning with an end (side by side, overlapping, or with something between them that no pattern knows), or with a text
//! that no pattern knows.

use std::collections::BTreeSet;

use super::super::matching::Pattern;

/// Beginnings, ends and whole texts of the patterns of one attribute.
#[derive(Clone, Debug, Default)]
pub(super) struct Texts {
    whole: BTreeSet<String>,
    beginnings: BTreeSet<String>,
    ends: BTreeSet<String>,
}

impl Texts {
    pub(super) fn add(&mut self, pattern: &Pattern) {
        match pattern {
            Pattern::Everyone | Pattern::Given | Pattern::Present => {}
            Pattern::Exact(text) => self.whole(text),
            Pattern::Prefix(text) => self.beginning(text),
            Pattern::Suffix(text) => self.end(text),
        }
    }

    pub(super) fn whole(&mut self, text: &str) {
        self.whole.insert(text.to_owned());
    }

    pub(super) fn beginning(&mut self, text: &str) {
        self.beginnings.insert(text.to_owned());
    }

    pub(super) fn end(&mut self, text: &str) {
        self.ends.insert(text.to_owned());
    }

    /// A short text that stands in no pattern: whoever puts it between a beginning and an end meets no longer one.
    pub(super) fn stranger(&self) -> String {
        let all = || self.whole.iter().chain(&self.beginnings).chain(&self.ends);
        let is_strange = |text: &String| !all().any(|known| known.contains(text.as_str()));
        // Letters that are no hexadecimal digits, so that they end an escape in a path.
        let letters = || "qzxjkvwygmnprstuhilo".chars();
        let singles = letters().map(String::from);
        let pairs = letters().flat_map(|first| letters().map(move |second| format!("{first}{second}")));
        let numbered = (0_u64..).map(|number| format!("q{number}z"));
        // The last are without end, and only so many texts are known.
        singles.chain(pairs).chain(numbered).find(is_strange).unwrap_or_default()
    }

    /// One text for each kind of text, the empty one included, and the shortest first: they are the plainest.
    pub(super) fn samples(&self) -> Vec<String> {
        let stranger = self.stranger();
        self.samples_with(std::slice::from_ref(&stranger))
    }

    /// As [`Self::samples`], with several texts that may stand between a beginning and an end.
    pub(super) fn samples_with(&self, between: &[String]) -> Vec<String> {
        let none = String::new();
        let mut samples: BTreeSet<String> = self.whole.iter().cloned().collect();
        samples.insert(String::new());
        for beginning in std::iter::once(&none).chain(&self.beginnings) {
            for end in std::iter::once(&none).chain(&self.ends) {
                samples.insert(format!("{beginning}{end}"));
                samples.extend(between.iter().map(|middle| format!("{beginning}{middle}{end}")));
                samples.extend(overlapping(beginning, end));
            }
        }
        let mut samples: Vec<String> = samples.into_iter().collect();
        samples.sort_by_key(String::len);
        samples
    }
}

/// Texts that begin and end as said and are shorter than both together.
fn overlapping<'t>(beginning: &'t str, end: &'t str) -> impl Iterator<Item = String> + 't {
    let shared = (1..=beginning.len().min(end.len())).filter(|bytes| end.is_char_boundary(*bytes));
    shared.filter_map(move |bytes| {
        let (overlap, rest) = end.split_at(bytes);
        beginning.ends_with(overlap).then(|| format!("{beginning}{rest}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(patterns: &[&str]) -> Texts {
        let mut texts = Texts::default();
        patterns.iter().for_each(|written| texts.add(&Pattern::new(written)));
        texts
    }

    #[test]
    fn every_kind_of_text_has_a_sample() {
        let samples = texts(&["/a*", "*b", "/a/x", "/ab*"]).samples();
        for expected in ["", "/a", "/ab", "/a/x", "/aqb", "/abqb", "q", "qb", "b", "/aq"] {
            assert!(samples.iter().any(|sample| sample == expected), "{expected} in {samples:?}");
        }
    }

    #[test]
    fn a_stranger_stands_in_no_pattern() {
        assert_eq!(texts(&["a", "b*"]).stranger(), "q");
        assert_eq!(texts(&["q", "xz*", "*j"]).stranger(), "k");
    }

    #[test]
    fn beginnings_and_ends_may_overlap() {
        let found: Vec<String> = overlapping("/a/b", "b/c").collect();
        assert_eq!(found, ["/a/b/c"]);
        assert_eq!(overlapping("aa", "aa").collect::<Vec<_>>(), ["aaa", "aa"]);
        assert_eq!(overlapping("a", "b").count(), 0);
    }
}
