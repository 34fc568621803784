//! `rbac.istio.io/v1alpha1` (policy B): where it runs, which rule and which subject match.

use serde_json::Value;

use crate::{
    facts::{Document, Seen, World, by_age, entries, texts},
    text::{config_time, filled, glob, in_every_domain, in_network, port, present},
    token,
};

/// `None` never: where nothing switches RBAC on, everything is allowed.
pub fn judge(world: &World, seen: &Seen, tried: bool) -> bool {
    let Some(switch) = switch(world) else { return true };
    if switch.is_broken {
        return false;
    }
    if !runs(world, switch.spec(), seen.port) {
        return true;
    }
    let is_permissive = switch.spec()["enforcementMode"].as_str() == Some("PERMISSIVE");
    if is_permissive && !tried {
        return true; // policy B-11
    }
    is_granted(world, seen, tried)
}

/// policy B-1, 0-8
fn switch(world: &World) -> Option<&Document> {
    let named = |kind: &'static str| world.of_kind(kind).filter(|document| document.name() == "default");
    let mut others = by_age(named("RbacConfig"));
    others.sort_by_key(|document| document.namespace() != world.root_namespace);
    named("ClusterRbacConfig").next().or_else(|| others.first().copied())
}

fn service_name(world: &World, port: u16) -> Option<(String, String)> {
    let (service, _) = world.owner(port)?;
    Some((service.name.clone(), format!("{}.{}.svc.cluster.local", service.name, service.namespace)))
}

fn runs(world: &World, spec: &Value, port: u16) -> bool {
    let namespace = &world.workload.namespace;
    let listed = |list: &Value| {
        texts(&list["namespaces"]).contains(namespace)
            || service_name(world, port)
                .is_some_and(|(_, complete)| texts(&list["services"]).contains(&complete))
    };
    match spec["mode"].as_str() {
        Some("ON") => true,
        Some("ON_WITH_INCLUSION") => listed(&spec["inclusion"]),
        Some("ON_WITH_EXCLUSION") => !listed(&spec["exclusion"]),
        _ => false,
    }
}

/// policy B-2, B-4: some rule of a role and some subject of a binding that names it, all of the destination's namespace.
fn is_granted(world: &World, seen: &Seen, tried: bool) -> bool {
    let here = |kind: &'static str| {
        world.of_kind(kind).filter(|d| d.namespace() == world.workload.namespace && !d.is_broken)
    };
    here("ServiceRole").any(|role| {
        let is_permitted = entries(&role.spec()["rules"]).iter().any(|rule| rule_matches(world, rule, seen));
        let is_held = here("ServiceRoleBinding").any(|binding| {
            let counts = tried || binding.spec()["mode"].as_str() != Some("PERMISSIVE");
            let names = binding.spec()["roleRef"]["name"].as_str() == Some(role.name());
            let subjects = entries(&binding.spec()["subjects"]);
            counts && names && subjects.iter().any(|subject| subject_matches(world, subject, seen))
        });
        is_permitted && is_held
    })
}

fn rule_matches(world: &World, rule: &Value, seen: &Seen) -> bool {
    let services = texts(&rule["services"]);
    let complete = service_name(world, seen.port).map(|(_, complete)| complete);
    if !services.is_empty() && !services.iter().any(|pattern| config_time(pattern, complete.as_deref())) {
        return false;
    }
    let (positive, negative) = (|name: &str| texts(&rule[name]), |name: &str| texts(&rule[name]));
    for (name, not_name) in [("paths", "notPaths"), ("methods", "notMethods"), ("hosts", "notHosts")] {
        let (wanted, unwanted) = (positive(name), negative(not_name));
        if wanted.is_empty() && unwanted.is_empty() {
            continue;
        }
        let Some(request) = &seen.request else { return false }; // policy B-10
        let own = match name {
            "paths" => request.path.clone(),
            "methods" => Some(request.method.clone()),
            _ => request.host.as_ref().map(|host| host.to_ascii_lowercase()),
        };
        // policy G-18
        let written =
            |pattern: &String| if name == "hosts" { pattern.to_ascii_lowercase() } else { pattern.clone() };
        let matches = |list: &[String]| list.iter().any(|pattern| present(&written(pattern), own.as_deref()));
        if (!wanted.is_empty() && !matches(&wanted)) || matches(&unwanted) {
            return false;
        }
    }
    let ports = |name: &str| -> Vec<u64> { entries(&rule[name]).iter().filter_map(Value::as_u64).collect() };
    let (wanted, unwanted) = (ports("ports"), ports("notPorts"));
    if (!wanted.is_empty() && !wanted.contains(&u64::from(seen.port)))
        || unwanted.contains(&u64::from(seen.port))
    {
        return false;
    }
    entries(&rule["constraints"]).iter().all(|constraint| {
        let key = constraint["key"].as_str().unwrap_or_default();
        texts(&constraint["values"]).iter().any(|value| constraint_holds(world, key, value, seen))
    })
}

/// policy B-6: what nobody can use never matches (policy G-3, G-5).
fn constraint_holds(world: &World, key: &str, value: &str, seen: &Seen) -> bool {
    let workload = &world.workload;
    match key {
        "destination.ip" => in_network(value, seen.destination) == Some(true),
        "destination.port" => port(value) == Some(seen.port),
        "destination.name" => {
            config_time(value, service_name(world, seen.port).map(|(short, _)| short).as_deref())
        }
        "destination.namespace" => config_time(value, Some(&workload.namespace)),
        "destination.user" => config_time(value, Some(&workload.account)),
        "connection.sni" => present(value, seen.server_name.as_deref()),
        _ => {
            if let Some(label) = within(key, "destination.labels") {
                return workload.labels.get(label).is_some_and(|own| config_time(value, Some(own)));
            }
            if let Some(header) = within(key, "request.headers") {
                return header_matches(header, value, seen);
            }
            false
        }
    }
}

fn header_matches(header: &str, value: &str, seen: &Seen) -> bool {
    let is_host = header.eq_ignore_ascii_case("host") || header.eq_ignore_ascii_case(":authority");
    let value = if is_host { value.to_ascii_lowercase() } else { value.to_owned() };
    seen.request.as_ref().is_some_and(|request| present(&value, request.header(header).as_deref()))
}

/// policy B-7, B-8; every field that is there must match.
fn subject_matches(world: &World, subject: &Value, seen: &Seen) -> bool {
    let Some(fields) = subject.as_object() else { return false };
    let principal = seen.peer.as_ref().map(crate::facts::Peer::principal);
    let is_named = |name: &String| match name.as_str() {
        "*" | "allUsers" => true,
        "allAuthenticatedUsers" => principal.is_some(),
        pattern => in_every_domain(pattern, &world.domains()).iter().any(|p| filled(p, principal.as_deref())),
    };
    let in_namespace =
        |pattern: &String| seen.peer.as_ref().is_some_and(|peer| glob(pattern, &peer.namespace));
    let in_groups = |pattern: &String| {
        let Some(request) = &seen.request else { return false };
        let groups =
            request.claims.iter().flat_map(|claims| token::claim(claims, &["groups"], &request.spaced));
        groups.into_iter().any(|group| present(pattern, Some(&group)))
    };
    let at_address = |pattern: &String| in_network(pattern, seen.source) == Some(true);
    let is_unusable = |pattern: &String| in_network(pattern, seen.source).is_none();
    for (name, value) in fields {
        let list = texts(value);
        let holds = match name.as_str() {
            "user" | "names" => list.iter().any(is_named),
            "notNames" => !list.iter().any(is_named),
            "group" | "groups" => list.iter().any(in_groups),
            "notGroups" => seen.request.is_some() && !list.iter().any(in_groups), // policy B-10
            "namespaces" => list.iter().any(in_namespace),
            "notNamespaces" => !list.iter().any(in_namespace),
            "ips" => list.iter().any(at_address),
            "notIps" => !list.iter().any(at_address) && !list.iter().any(is_unusable),
            "properties" => {
                let properties = value.as_object();
                properties
                    .into_iter()
                    .flatten()
                    .all(|(key, value)| property_holds(world, key, value.as_str().unwrap_or_default(), seen))
            }
            _ => false,
        };
        if !holds {
            return false;
        }
    }
    true
}

fn property_holds(world: &World, key: &str, value: &str, seen: &Seen) -> bool {
    let principal = seen.peer.as_ref().map(crate::facts::Peer::principal);
    let as_identity =
        || in_every_domain(value, &world.domains()).iter().any(|p| filled(p, principal.as_deref()));
    match key {
        "source.ip" => return in_network(value, seen.source) == Some(true),
        "source.namespace" => return seen.peer.as_ref().is_some_and(|peer| glob(value, &peer.namespace)),
        "source.principal" => return as_identity(), // policy G-1
        _ => {}
    }
    let Some(request) = &seen.request else { return false }; // policy B-10
    let claims = request.claims.as_ref();
    match key {
        "source.user" => as_identity(),
        "request.auth.principal" => present(value, request.principal.as_deref()),
        "request.auth.audiences" => present(value, claims.and_then(token::audience).as_deref()),
        "request.auth.presenter" => present(value, claims.and_then(|claims| claims["azp"].as_str())),
        _ => {
            if let Some(header) = within(key, "request.headers") {
                return header_matches(header, value, seen);
            }
            if let Some(name) = within(key, "request.auth.claims") {
                let told =
                    claims.map(|claims| token::claim(claims, &[name], &request.spaced)).unwrap_or_default();
                return told.iter().any(|text| present(value, Some(text)));
            }
            false
        }
    }
}

/// `name[inner]`
pub(crate) fn within<'k>(key: &'k str, name: &str) -> Option<&'k str> {
    key.strip_prefix(name)?.strip_prefix('[')?.strip_suffix(']').filter(|inner| !inner.is_empty())
}
