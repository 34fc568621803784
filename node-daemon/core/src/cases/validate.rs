//! `validate`: is an object admitted (policy A-3, B-3, C).

use serde_json::Value;

use super::{
    check::{Check, Found},
    fields::InvalidCases,
};
use crate::policy::{KeySetAddress, tls_of};

pub(super) fn validate(check: &Check<'_>) -> Result<Found, InvalidCases> {
    let request = &check.case.request;
    let kind = request.required_text("object")?;
    let mut found = Found::default();
    match kind.as_str() {
        "jwksUri" => {
            let text = request.text("value")?.unwrap_or_default();
            let address = KeySetAddress::parse(&text);
            found.set("valid", address.is_some());
            if let Some(address) = address {
                found.set("host", address.host);
                found.set("port", address.port);
                found.set("tls", address.is_tls);
            }
        }
        "TLSSettings" => {
            let read = tls_of(request.at("value").unwrap_or(&Value::Null));
            found.set("valid", read.is_ok());
            found.reason = read.err().map(|(field, expected)| format!("{field}: {expected}"));
        }
        kind => object(check, kind, &mut found)?,
    }
    Ok(found)
}

/// Every object of the kind among the policies must be good.
fn object(check: &Check<'_>, kind: &str, found: &mut Found) -> Result<(), InvalidCases> {
    let policies = check.policies;
    if let Some(reason) = &policies.unparsed {
        found.set("valid", false);
        found.reason = Some(reason.clone());
        return Ok(());
    }
    let refused =
        policies.refused.iter().find(|invalid| invalid.kind_name == kind || invalid.kind_name.is_empty());
    let is_there = policies.read.iter().any(|object| object.kind == kind);
    if refused.is_none() && !is_there {
        return Err(check.case.request.invalid("object", "a kind of which the policies hold an object"));
    }
    found.set("valid", refused.is_none());
    if let Some(invalid) = refused {
        found.policy = Some(invalid.object());
        found.reason = Some(format!("{}: {}", invalid.field, invalid.reason()));
    }
    Ok(())
}
