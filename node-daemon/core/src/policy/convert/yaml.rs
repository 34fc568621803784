//! Values as YAML of the plainest kind: blocks, and quotes around whatever could be read as something else.

use std::fmt::Write as _;

use serde_json::{Map, Value};

/// Keys of an object in the order in which people write them; the others follow by name.
const FIRST: [&str; 14] = [
    "apiVersion",
    "kind",
    "metadata",
    "name",
    "namespace",
    "key",
    "spec",
    "selector",
    "action",
    "issuer",
    "rules",
    "from",
    "to",
    "when",
];

/// One document, without its separator.
pub(super) fn document(value: &Value) -> String {
    let mut text = String::new();
    if let Value::Object(map) = value {
        block(map, 0, &mut text);
    }
    text
}

fn block(map: &Map<String, Value>, depth: usize, text: &mut String) {
    let rank = |key: &str| FIRST.iter().position(|first| *first == key).unwrap_or(FIRST.len());
    let mut entries: Vec<(&String, &Value)> = map.iter().collect();
    entries.sort_by_key(|(key, _)| (rank(key), *key));
    for (key, value) in entries {
        indent(depth, text);
        text.push_str(&scalar(key));
        text.push(':');
        nested(value, depth, text);
    }
}

/// What stands behind a key, to the end of its last line.
fn nested(value: &Value, depth: usize, text: &mut String) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            text.push('\n');
            block(map, depth + 1, text);
        }
        Value::Array(items) if items.iter().any(|item| item.is_object()) => {
            text.push('\n');
            for item in items {
                list_item(item, depth, text);
            }
        }
        other @ (Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::String(_)
        | Value::Array(_)
        | Value::Object(_)) => {
            // Writing to a text does not fail.
            let _ = writeln!(text, " {}", flow(other));
        }
    }
}

fn list_item(item: &Value, depth: usize, text: &mut String) {
    match item {
        Value::Object(map) if !map.is_empty() => {
            let mut inner = String::new();
            block(map, depth + 1, &mut inner);
            indent(depth, text);
            text.push_str("- ");
            text.push_str(inner.trim_start());
        }
        other @ (Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::String(_)
        | Value::Array(_)
        | Value::Object(_)) => {
            indent(depth, text);
            let _ = writeln!(text, "- {}", flow(other));
        }
    }
}

/// On one line.
fn flow(value: &Value) -> String {
    match value {
        Value::String(text) => scalar(text),
        Value::Array(items) => format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", ")),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => other.to_string(),
    }
}

fn indent(depth: usize, text: &mut String) {
    text.push_str(&"  ".repeat(depth));
}

/// Without quotes only where nobody takes it for anything but a text.
fn scalar(text: &str) -> String {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._/".contains(&byte))
        && text.starts_with(|first: char| first.is_ascii_alphabetic())
        && !WORDS.iter().any(|word| text.eq_ignore_ascii_case(word));
    if is_plain { text.to_owned() } else { Value::from(text).to_string() }
}

/// Words that YAML 1.1 or 1.2 reads as something else.
const WORDS: [&str; 9] = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing;

    #[test]
    fn what_is_written_is_read_as_it_was() {
        for value in [
            json!({"kind": "X", "spec": {}, "metadata": {"name": "a", "labels": {"app": "on", "8": "1"}}}),
            json!({"spec": {"rules": [{}, {"to": [{"operation": {"ports": ["80"], "paths": ["/a*", "*", "{x}"]}}]}]}}),
            json!({"a": {"b": [], "c": [["x"], "y: z"], "d": true, "e": 1, "f": "#", "g": "é\n\"", "h": ""}}),
            json!({"spec": {"portLevelMtls": {"8080": {"mode": "STRICT"}}, "jwks": "{\"keys\": []}"}}),
        ] {
            assert_eq!(testing::yaml(&document(&value)), value, "{}", document(&value));
        }
    }
}
