//! What was expected against what was got: only the keys that stand in the case count.

use serde_json::{Map, Value};

/// Every key that a case may expect.
pub(super) const KEYS: [&str; 22] = [
    "attributes",
    "body",
    "grpc_message",
    "grpc_status",
    "host",
    "http_status",
    "http_status_to_caller",
    "identities_unordered",
    "mode",
    "mtls",
    "policy",
    "policy_namespace",
    "port",
    "shadow",
    "sni",
    "subjectAltNames",
    "success",
    "tcp",
    "tls",
    "upstream_path",
    "valid",
    "verdict",
];

/// One key that is not as expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) key: String,
    pub(super) expected: Value,
    pub(super) got: Value,
}

pub(super) fn differences<'e>(
    expected: impl Iterator<Item = (&'e String, &'e Value)>,
    got: &Map<String, Value>,
) -> Vec<Difference> {
    let mut found = Vec::new();
    for (key, expected) in expected {
        compare(key, expected, got.get(key).unwrap_or(&Value::Null), &mut found);
    }
    found
}

fn compare(key: &str, expected: &Value, got: &Value, found: &mut Vec<Difference>) {
    let fits = match (expected, got) {
        (Value::Object(wanted), Value::Object(seen)) => {
            for (inner, wanted) in wanted {
                compare(&format!("{key}.{inner}"), wanted, inner_value(seen, inner), found);
            }
            true
        }
        // Nothing of a mapping is asked for that is not there.
        (Value::Object(wanted), Value::Null) => wanted.values().all(Value::is_null),
        (Value::Array(wanted), Value::Array(seen)) if key.ends_with("_unordered") => same_set(wanted, seen),
        (wanted, seen) => same(wanted, seen),
    };
    if !fits {
        found.push(Difference { key: key.to_owned(), expected: expected.clone(), got: got.clone() });
    }
}

/// `request.auth.claims[groups]` is `groups` inside `request.auth.claims`.
fn inner_value<'s>(seen: &'s Map<String, Value>, key: &str) -> &'s Value {
    let direct = seen.get(key);
    let inside = || {
        let (outer, inner) = key.strip_suffix(']')?.split_once('[')?;
        seen.get(outer)?.get(inner)
    };
    direct.or_else(inside).unwrap_or(&Value::Null)
}

/// Numbers may be in quotes.
fn same(wanted: &Value, seen: &Value) -> bool {
    match (wanted, seen) {
        (Value::String(text), Value::Number(number)) | (Value::Number(number), Value::String(text)) => {
            *text == number.to_string()
        }
        // One text is a list of one.
        (Value::String(_), Value::Array(list)) => matches!(&list[..], [only] if only == wanted),
        (Value::Array(list), Value::String(_)) => matches!(&list[..], [only] if only == seen),
        (wanted, seen) => wanted == seen,
    }
}

fn same_set(wanted: &[Value], seen: &[Value]) -> bool {
    let within = |some: &[Value], others: &[Value]| some.iter().all(|value| others.contains(value));
    within(wanted, seen) && within(seen, wanted)
}
