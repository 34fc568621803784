//! Which DestinationRule speaks for a connection that leaves, and what it says (policy C).

use std::collections::BTreeMap;

use serde_json::Value;

use crate::facts::{Document, entries};

/// One rule a host: the client's namespace, then the service's, then the root's; in each the most specific host.
pub fn chosen<'d>(
    documents: &'d [Document],
    host: &str,
    client_namespace: &str,
    service_namespace: &str,
    root_namespace: &str,
) -> Option<&'d Document> {
    for namespace in [client_namespace, service_namespace, root_namespace] {
        let mut here: Vec<(usize, &Document)> = documents
            .iter()
            .filter(|document| document.kind() == "DestinationRule" && document.namespace() == namespace)
            .filter_map(|document| Some((specificity(document, host)?, document)))
            .collect();
        here.sort_by_key(|(rank, document)| (usize::MAX - rank, document.name()));
        if let Some((_, first)) = here.first() {
            return Some(first);
        }
    }
    None
}

/// A whole name says most, and the longer it is written the more; of wildcards likewise.
fn specificity(document: &Document, host: &str) -> Option<usize> {
    let written = document.spec()["host"].as_str()?;
    if let Some(end) = written.strip_prefix('*') {
        return host.ends_with(end).then_some(end.len());
    }
    let is_short = !written.contains('.');
    let complete = if is_short {
        format!("{written}.{}.svc.cluster.local", document.namespace())
    } else {
        written.to_owned()
    };
    (complete == host).then_some(1_000_000 + written.len())
}

/// What the rule says about a port of an endpoint: the subset's part, else the rule's. `Err`: nobody can tell, because it
/// could not be read or two subsets of the endpoint differ.
pub fn said<'d>(
    rule: &'d Document,
    port: u16,
    labels: &BTreeMap<String, String>,
) -> Result<Option<&'d Value>, Unusable> {
    if rule.is_broken {
        return Err(Unusable);
    }
    let mut by_subset: Vec<&Value> = Vec::new();
    for subset in entries(&rule.spec()["subsets"]) {
        let wanted = subset["labels"].as_object();
        let is_own = wanted.is_some_and(|wanted| {
            !wanted.is_empty()
                && wanted.iter().all(|(key, value)| labels.get(key).map(String::as_str) == value.as_str())
        });
        if is_own {
            by_subset.extend(tls(&subset["trafficPolicy"], port));
        }
    }
    if by_subset.iter().any(|each| *each != by_subset[0]) {
        return Err(Unusable);
    }
    Ok(by_subset.first().copied().or_else(|| tls(&rule.spec()["trafficPolicy"], port)))
}

/// Nobody can tell what was meant: the destination is denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unusable;

/// A port's block replaces the whole of `tls`.
fn tls(policy: &Value, port: u16) -> Option<&Value> {
    let blocks = entries(&policy["portLevelSettings"]);
    let own = blocks.iter().find(|block| block["port"]["number"].as_u64() == Some(u64::from(port)));
    own.unwrap_or(policy).get("tls").filter(|tls| !tls.is_null())
}
