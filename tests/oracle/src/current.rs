//! `AuthorizationPolicy` (policy F-3, F-4).

use serde_json::Value;

use crate::{
    facts::{Document, Seen, World, entries, texts},
    roles::within,
    text::{filled, in_every_domain, in_network, port},
    token,
};

/// What a value says of a connection: nobody may be able to tell.
type Told = Option<bool>;

/// `None`: no policy of this age decides about the workload.
pub fn judge(world: &World, seen: &Seen, tried: bool) -> Option<bool> {
    let counts = |document: &&Document| {
        let is_dry_run =
            document.value["metadata"]["annotations"]["istio.io/dry-run"].as_str() == Some("true");
        world.selects(document) && action(document) != "AUDIT" && (tried || !is_dry_run)
    };
    let here: Vec<&Document> = world.of_kind("AuthorizationPolicy").filter(counts).collect();
    // policy A-3: what is there and cannot be read might deny.
    if here.iter().any(|document| document.is_broken && action(document) != "ALLOW") {
        return Some(false);
    }
    let usable: Vec<&&Document> = here.iter().filter(|document| !document.is_broken).collect();
    let allows: Vec<&&&Document> = usable.iter().filter(|document| action(document) == "ALLOW").collect();
    if allows.is_empty() && here.iter().any(|document| document.is_broken) {
        return Some(false);
    }
    if usable.is_empty() {
        return None;
    }
    let matches = |document: &Document, denies: bool| {
        entries(&document.spec()["rules"])
            .iter()
            .any(|rule| rule_matches(world, document, rule, seen, denies))
    };
    for action_name in ["CUSTOM", "DENY"] {
        if usable.iter().any(|document| action(document) == action_name && matches(document, true)) {
            return Some(false);
        }
    }
    Some(allows.is_empty() || allows.iter().any(|document| matches(document, false)))
}

fn action(document: &Document) -> &str {
    document.spec()["action"].as_str().unwrap_or("ALLOW")
}

fn rule_matches(world: &World, document: &Document, rule: &Value, seen: &Seen, denies: bool) -> bool {
    // policy F-3: on TCP an ALLOW rule with HTTP attributes is unusable, whole.
    if !denies && seen.request.is_none() && asks_requests(rule) {
        return false;
    }
    let alternatives = |list: &str, inner: &str, each: &dyn Fn(&str, &str) -> Told| {
        let entries = entries(&rule[list]);
        entries.is_empty()
            || entries.iter().any(|entry| {
                let fields = entry[inner].as_object();
                fields
                    .into_iter()
                    .flatten()
                    .all(|(name, values)| field_holds(name, &texts(values), each, denies))
            })
    };
    let source = |name: &str, value: &str| source_matches(world, document, name, value, seen);
    let operation = |name: &str, value: &str| operation_matches(name, value, seen);
    alternatives("from", "source", &source)
        && alternatives("to", "operation", &operation)
        && entries(&rule["when"]).iter().all(|condition| {
            let key = condition["key"].as_str().unwrap_or_default();
            let told = |_: &str, value: &str| condition_matches(world, document, key, value, seen);
            let (values, not_values) = (texts(&condition["values"]), texts(&condition["notValues"]));
            (values.is_empty() || field_holds("values", &values, &told, denies))
                && (not_values.is_empty() || field_holds("notValues", &not_values, &told, denies))
        })
}

fn asks_requests(rule: &Value) -> bool {
    let fields = |list: &str, inner: &str| {
        let parts = entries(&rule[list]).iter().filter_map(|entry| entry[inner].as_object());
        parts.flat_map(|part| part.keys().cloned()).collect::<Vec<_>>()
    };
    let asks = |field: &String| {
        let field = field.to_ascii_lowercase();
        ["requestprincipals", "hosts", "methods", "paths"].iter().any(|name| field.ends_with(name))
    };
    fields("from", "source").iter().any(asks)
        || fields("to", "operation").iter().any(asks)
        || entries(&rule["when"])
            .iter()
            .any(|condition| condition["key"].as_str().is_some_and(|key| key.starts_with("request.")))
}

/// One field: any of its values, or with `not` none. Doubt counts for the one who denies (policy G-23).
fn field_holds(name: &str, values: &[String], each: &dyn Fn(&str, &str) -> Told, denies: bool) -> bool {
    let (positive, is_negated) = match name.strip_prefix("not") {
        Some(rest) => (rest[..1].to_ascii_lowercase() + &rest[1..], true),
        None => (name.to_owned(), false),
    };
    let told: Vec<Told> = values.iter().map(|value| each(&positive, value)).collect();
    let has_doubt = told.contains(&None);
    if has_doubt && denies {
        return true;
    }
    let any = told.contains(&Some(true));
    if is_negated { !any && !has_doubt } else { any }
}

fn source_matches(world: &World, document: &Document, name: &str, value: &str, seen: &Seen) -> Told {
    let peer = seen.peer.as_ref();
    match name {
        "principals" => {
            let own = peer.map(crate::facts::Peer::principal);
            Some(in_every_domain(value, &world.domains()).iter().any(|p| filled(p, own.as_deref())))
        }
        "namespaces" => Some(filled(value, peer.map(|peer| peer.namespace.as_str()))),
        "trustDomains" => Some(filled(value, peer.map(|peer| peer.domain.as_str()))),
        "serviceAccounts" => {
            let Some(peer) = peer else { return Some(false) };
            Some(match value.split_once('/') {
                Some((namespace, account)) => {
                    filled(namespace, Some(&peer.namespace)) && filled(account, Some(&peer.account))
                }
                None if value == "*" => true,
                None => peer.namespace == document.namespace() && filled(value, Some(&peer.account)),
            })
        }
        "ipBlocks" | "remoteIpBlocks" => in_network(value, seen.source),
        "requestPrincipals" => {
            let request = seen.request.as_ref()?; // policy F-3: on TCP nobody can tell
            Some(request.claims.as_ref().is_some_and(|claims| token_principal(value, claims)))
        }
        _ => None,
    }
}

/// `iss/sub`, split at the last slash; both are needed.
fn token_principal(value: &str, claims: &Value) -> bool {
    let (Some(issuer), Some(subject)) = (claims["iss"].as_str(), claims["sub"].as_str()) else {
        return false;
    };
    match value.rsplit_once('/') {
        None if value == "*" => !issuer.is_empty() && !subject.is_empty(),
        None => false,
        Some((wanted, own)) if value.starts_with('*') => filled(wanted, Some(issuer)) && subject == own,
        Some((wanted, own)) => issuer == wanted && filled(own, Some(subject)),
    }
}

fn operation_matches(name: &str, value: &str, seen: &Seen) -> Told {
    if name == "ports" {
        return port(value).map(|port| port == seen.port);
    }
    let request = seen.request.as_ref()?;
    match name {
        "methods" => Some(filled(value, Some(&request.method))),
        "hosts" => {
            let own = request.host.as_ref().map(|host| host.to_ascii_lowercase());
            Some(filled(&value.to_ascii_lowercase(), own.as_deref()))
        }
        "paths" if value.contains("{*}") || value.contains("{**}") => {
            let is_usable = is_template(value);
            is_usable.then(|| request.path.as_deref().is_some_and(|path| template(value, path)))
        }
        "paths" => Some(filled(value, request.path.as_deref())),
        _ => None,
    }
}

/// Operators are whole segments, and `{**}` is the last of them.
fn is_template(written: &str) -> bool {
    let Some(rest) = written.strip_prefix('/') else { return false };
    let segments: Vec<&str> = rest.split('/').collect();
    let is_operator = |segment: &&str| **segment == *"{*}" || **segment == *"{**}";
    let is_text = |segment: &&str| !segment.contains(['*', '{', '}']);
    let deep = segments.iter().position(|segment| *segment == "{**}");
    let after = deep.map_or(&[][..], |at| &segments[at + 1..]);
    segments.iter().all(|segment| is_operator(segment) || is_text(segment)) && !after.iter().any(is_operator)
}

/// By trying every way to cut the path.
fn template(written: &str, path: &str) -> bool {
    match (written.find("{*}"), written.find("{**}")) {
        (None, None) => written == path,
        (Some(at), _) if written[..at].len() < written.find("{**}").unwrap_or(usize::MAX) => {
            let (head, tail) = (&written[..at], &written[at + 3..]);
            path.strip_prefix(head).is_some_and(|rest| {
                (1..=rest.len()).any(|end| !rest[..end].contains('/') && template(tail, &rest[end..]))
            })
        }
        (_, Some(at)) => {
            let (head, tail) = (&written[..at], &written[at + 4..]);
            path.strip_prefix(head).is_some_and(|rest| rest.ends_with(tail))
        }
        (Some(_), None) => false,
    }
}

fn condition_matches(world: &World, document: &Document, key: &str, value: &str, seen: &Seen) -> Told {
    match key {
        "source.ip" | "remote.ip" => in_network(value, seen.source),
        "source.namespace" => source_matches(world, document, "namespaces", value, seen),
        "source.principal" => source_matches(world, document, "principals", value, seen),
        "source.serviceAccount" => source_matches(world, document, "serviceAccounts", value, seen),
        "source.trustDomain" => source_matches(world, document, "trustDomains", value, seen),
        "destination.ip" => in_network(value, seen.destination),
        "destination.port" => port(value).map(|port| port == seen.port),
        "connection.sni" => Some(filled(value, seen.server_name.as_deref())),
        "request.auth.principal" => source_matches(world, document, "requestPrincipals", value, seen),
        _ => {
            let is_known = within(key, "request.headers").is_some()
                || within(key, "request.auth.claims").is_some()
                || matches!(key, "request.auth.audiences" | "request.auth.presenter");
            if !is_known {
                return None; // policy G-3
            }
            let request = seen.request.as_ref()?;
            let claims = request.claims.as_ref();
            if let Some(header) = within(key, "request.headers") {
                let is_host =
                    header.eq_ignore_ascii_case("host") || header.eq_ignore_ascii_case(":authority");
                let value = if is_host { value.to_ascii_lowercase() } else { value.to_owned() };
                return Some(filled(&value, request.header(header).as_deref()));
            }
            Some(match key {
                "request.auth.audiences" => filled(value, claims.and_then(token::audience).as_deref()),
                "request.auth.presenter" => filled(value, claims.and_then(|claims| claims["azp"].as_str())),
                _ => {
                    let path: Vec<&str> =
                        within(key, "request.auth.claims").unwrap_or_default().split("][").collect();
                    let told =
                        claims.map(|claims| token::claim(claims, &path, &request.spaced)).unwrap_or_default();
                    told.iter().any(|text| filled(value, Some(text)))
                }
            })
        }
    }
}
