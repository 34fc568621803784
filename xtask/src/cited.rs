//! Which items of the policy specification a test cites.
//!
//! A citation is a comment such as `// policy, B-1` in test code, or the name of a case in `tests/policy`. What
//! stands in the head of a file cites nothing: it proves nothing.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result};

use crate::policy_items::{ITEMS, Says};

/// The word before the numbers, in comments of Rust sources.
const WORD: &str = "policy ";

/// What tests are made with, and what they are compared with, proves nothing by itself.
const HARNESSES: [&str; 6] =
    ["tests/app/", "tests/bench/", "tests/demo/", "tests/fuzz/src/", "tests/oracle/src/", "tests/world/"];

/// Letters of the specification's sections.
const SECTIONS: &str = "0ABCDEFGH";

/// One sentence for each item that states behaviour and that no test cites.
///
/// # Errors
/// Names the file that could not be read.
pub(crate) fn uncited(root: &Path, sources: &[String]) -> Result<Vec<String>> {
    let mut cited = BTreeSet::new();
    for file in sources {
        let text = fs::read_to_string(root.join(file)).with_context(|| format!("read {file}"))?;
        test_code(file, &text).lines().for_each(|line| cited.extend(in_comment(line)));
    }
    for file in case_files(root)? {
        let text = fs::read_to_string(root.join(&file)).with_context(|| format!("read {file}"))?;
        text.lines().for_each(|line| cited.extend(in_case_name(line)));
    }
    Ok(missing(&cited))
}

fn missing(cited: &BTreeSet<String>) -> Vec<String> {
    let states = ITEMS.iter().filter(|item| item.says == Says::Behaviour);
    let mut missing: Vec<String> = states
        .filter(|item| !cited.contains(item.id))
        .map(|item| {
            format!(
                "policy {}: no test cites it ({}): `// policy {}` where a test proves it",
                item.id, item.title, item.id
            )
        })
        .collect();
    for id in cited {
        match ITEMS.iter().find(|item| item.id == id) {
            None => missing.push(format!("policy {id}: a test cites it, and there is no such item")),
            Some(item) => {
                if let Says::NotHere(why) = item.says {
                    missing
                        .push(format!("policy {id}: a test cites it, but it is said not to be here: {why}"));
                }
            }
        }
    }
    missing
}

/// The part of a source that is compiled for tests only.
fn test_code<'t>(file: &str, text: &'t str) -> &'t str {
    let name = file.rsplit('/').next().unwrap_or(file);
    if HARNESSES.iter().any(|harness| file.starts_with(harness)) {
        return "";
    }
    if file.starts_with("tests/") || file.contains("/tests/") || name == "tests.rs" {
        return text;
    }
    text.find("#[cfg(test)]\nmod ").map_or("", |start| &text[start..])
}

/// The items that a comment names behind the word.
fn in_comment(line: &str) -> Vec<String> {
    let Some((_, comment)) = line.split_once("//") else { return Vec::new() };
    // The documentation of a file or of an item tells; it proves nothing.
    if comment.starts_with('!') || comment.starts_with('/') {
        return Vec::new();
    }
    comment.split(WORD).skip(1).flat_map(items).collect()
}

/// The items that the name of a case begins with or holds.
fn in_case_name(line: &str) -> Vec<String> {
    let line = line.trim_start();
    let name = line.strip_prefix("- name:").or_else(|| line.strip_prefix("- {name:"));
    let name = name.map(|rest| rest.split_once(", check:").map_or(rest, |(name, _)| name));
    name.map(items).unwrap_or_default()
}

/// `A-3.4, B-1`: every item in a text.
fn items(text: &str) -> Vec<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    let words = text.split(|c: char| !is_part(c)).map(|word| word.trim_end_matches('.'));
    words.filter(|word| is_item(word)).map(str::to_owned).collect()
}

fn is_item(word: &str) -> bool {
    if word == "C" {
        return true;
    }
    let Some((section, number)) = word.split_once('-') else { return false };
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (number, sub) = number.split_once('.').map_or((number, None), |(number, sub)| (number, Some(sub)));
    section.len() == 1 && SECTIONS.contains(section) && is_number(number) && sub.is_none_or(is_number)
}

fn case_files(root: &Path) -> Result<Vec<String>> {
    let folder = "tests/policy";
    let mut files = Vec::new();
    for entry in fs::read_dir(root.join(folder)).with_context(|| format!("list {folder}"))? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".yaml") {
            files.push(format!("{folder}/{name}"));
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn comment(line: &str, expected: &[&str]) {
        assert_eq!(in_comment(line), expected, "{line}");
    }

    #[test]
    fn comments_cite_behind_the_word() {
        comment("    // policy A-3.4, B-1: and more", &["A-3.4", "B-1"]);
        comment("let x = 1; // policy C", &["C"]);
        comment("// A-3 without the word", &[]);
        comment("let policy = \"policy A-3\";", &[]);
        comment("//! policy A-3", &[]);
        comment("/// policy A-3", &[]);
        comment("// policy T-19, A-x, A-3.x, AA-3, I-1, 1-1", &[]);
        comment("// (policy G-2).", &["G-2"]);
    }

    #[test]
    fn names_of_cases_cite() {
        assert_eq!(in_case_name("- name: \"A-6 STRICT (G-15)\""), ["A-6", "G-15"]);
        assert_eq!(in_case_name("  - {name: D-6 nobody, check: secureNaming}"), ["D-6"]);
        assert!(in_case_name("# A-6 in a head").is_empty());
        assert!(in_case_name("  request: {request.path: /A-6}").is_empty());
    }

    #[test]
    fn only_test_code_proves() {
        let text = "// policy A-1\nfn f() {}\n#[cfg(test)]\nmod tests {\n    // policy A-2\n}\n";
        assert!(!test_code("node-daemon/src/x.rs", text).contains("A-1"));
        assert!(test_code("node-daemon/src/x.rs", text).contains("A-2"));
        for file in
            ["tests/netns/x.rs", "node-daemon/tests/x.rs", "node-daemon/core/src/x/tests.rs", "a/tests/x.rs"]
        {
            assert!(test_code(file, text).contains("A-1"), "{file}");
        }
        for file in ["tests/oracle/src/roles.rs", "tests/world/node.rs"] {
            assert!(test_code(file, text).is_empty(), "{file}");
        }
        assert!(test_code("a/x.rs", "// policy A-1\nfn f() {}\n#[cfg(test)]\nuse x;\n").is_empty());
    }

    #[test]
    fn what_is_missing_and_what_is_no_item_is_said() {
        let all: BTreeSet<String> =
            ITEMS.iter().filter(|item| item.says == Says::Behaviour).map(|item| item.id.to_owned()).collect();
        assert!(missing(&all).is_empty());
        let mut fewer = all.clone();
        fewer.remove("A-3.4");
        assert!(missing(&fewer)[0].starts_with("policy A-3.4: no test cites it"));
        for (id, word) in [("A-99", "no such item"), ("E-8", "said not to be here")] {
            let mut more = all.clone();
            more.insert(id.to_owned());
            assert!(missing(&more)[0].contains(word), "{id}");
        }
    }

    #[test]
    fn each_item_stands_once() {
        let ids: BTreeSet<&str> = ITEMS.iter().map(|item| item.id).collect();
        assert_eq!(ids.len(), ITEMS.len());
        assert!(ITEMS.iter().all(|item| is_item(item.id) && !item.title.is_empty()));
    }
}
