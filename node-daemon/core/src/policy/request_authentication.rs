//! `RequestAuthentication` of `security.istio.io/v1` (and `v1beta1`): tokens that must be valid if they are there
//! (policy F-2).

use std::sync::Arc;

use super::{
    origins::{boxed, issuer, key_source},
    reader::{Fault, Fields, Item, Warnings},
    security_v1::{Selector, refuse_target_references, selector},
    tokens::{IssuerRule, Location, Prefix},
};
use crate::decode::Object;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RequestAuthentication {
    pub(super) selector: Selector,
    pub(super) rules: Vec<Arc<IssuerRule>>,
}

pub(super) fn request_authentication(
    object: &Object,
    warnings: &mut Warnings,
) -> Result<RequestAuthentication, Fault> {
    let mut fields = Fields::spec(object)?;
    refuse_target_references(&mut fields)?;
    let selector = selector(&mut fields, warnings)?;
    let items = fields.list("jwtRules")?;
    fields.finish()?;
    let mut rules: Vec<Arc<IssuerRule>> = Vec::new();
    for item in &items {
        rules.push(Arc::new(jwt_rule(item, warnings)?));
    }
    Ok(RequestAuthentication { selector, rules })
}

fn jwt_rule(item: &Item<'_>, warnings: &mut Warnings) -> Result<IssuerRule, Fault> {
    let mut fields = Fields::open(item)?;
    let issuer = issuer(&mut fields, "a rule with an issuer")?;
    let audiences = boxed(&fields.texts("audiences")?);
    let parameters = boxed(&fields.texts("fromParams")?);
    let cookies = boxed(&fields.texts("fromCookies")?);
    let spaced = fields.texts("spaceDelimitedClaims")?;
    let keys = key_source(&mut fields, issuer, warnings)?;
    let mut locations = Vec::new();
    for header in fields.list("fromHeaders")? {
        locations.push(header_location(&header)?);
    }
    locations.extend(parameters.into_iter().map(Location::Parameter));
    locations.extend(cookies.into_iter().map(Location::Cookie));
    if locations.is_empty() {
        locations = Location::usual();
    }
    let payload_header = fields.text("outputPayloadToHeader")?.filter(|name| !name.is_empty());
    let mut claim_headers = Vec::new();
    for entry in fields.list("outputClaimToHeaders")? {
        claim_headers.push(claim_header(&entry)?);
    }
    if fields.text("timeout")?.is_some() {
        warnings.say(&format!("{}.timeout", item.path), "key sets are fetched under the node's own time-out");
    }
    let forwards = fields.flag("forwardOriginalToken")?;
    fields.finish()?;
    Ok(IssuerRule {
        issuer: issuer.into(),
        audiences,
        keys,
        locations,
        is_exchanged: false,
        spaced: spaced.iter().filter_map(|item| item.value.as_str()).map(str::to_owned).collect(),
        forwards,
        payload_header: payload_header.map(|name| name.to_ascii_lowercase().into()),
        claim_headers,
    })
}

/// `{name, prefix}`; with a prefix the value must begin with it.
fn header_location(item: &Item<'_>) -> Result<Location, Fault> {
    let mut fields = Fields::open(item)?;
    let Some(name) = fields.take("name")? else {
        return Err(fields.fault("a header with a name", "write - name: x-token"));
    };
    let prefix = fields.text("prefix")?.unwrap_or_default();
    fields.finish()?;
    Ok(Location::Header {
        name: name.filled_text()?.to_ascii_lowercase().into(),
        prefix: Prefix::Required(prefix.into()),
    })
}

/// `{header, claim}`
fn claim_header(item: &Item<'_>) -> Result<(Box<str>, Box<str>), Fault> {
    let mut fields = Fields::open(item)?;
    let (header, claim) = (fields.take("header")?, fields.take("claim")?);
    fields.finish()?;
    let (Some(header), Some(claim)) = (header, claim) else {
        return Err(item.fault("a header and a claim", "write - {header: x-name, claim: name}"));
    };
    Ok((header.filled_text()?.to_ascii_lowercase().into(), claim.filled_text()?.into()))
}
