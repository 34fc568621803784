//! What a DestinationRule does, in words (policy C, T-20).

use super::{
    client::Asked,
    compile::{Inventory, SERVICE_SUFFIX},
    destination_rule::{DestinationRule, TlsMode, TlsSettings},
    objects::{Body, PolicyObjects},
};
use crate::workload::ObjectName;

/// Where an accepted rule does less than it says, or what its author should know: field and sentence.
pub(super) fn notes(
    name: &ObjectName,
    rule: &DestinationRule,
    objects: &PolicyObjects,
    inventory: &Inventory<'_>,
) -> Vec<(String, String)> {
    let mut notes = Vec::new();
    let mut say = |field: String, sentence: String| notes.push((field, sentence));
    if let Some(first) = first_for_host(name, rule, objects) {
        say(
            "spec.host".to_owned(),
            format!(
                "DestinationRule {first} is for the same host and comes first by name: this one has no effect"
            ),
        );
    }
    if let Some(service) = service_of(&rule.host, name)
        && !inventory.services.contains_key(&service)
    {
        say(
            "spec.host".to_owned(),
            format!("{:?} is no service of namespace {}", rule.host, service.namespace),
        );
    }
    for subset in rule.idle_subsets() {
        say(
            format!("spec.subsets[{subset}].labels"),
            "no label is named, so no endpoint belongs to this subset and it has no effect".to_owned(),
        );
    }
    for (part, settings) in rule.settings() {
        if settings.mode == TlsMode::Disable {
            let sentence =
                "DISABLE: connections leave in plaintext, and a receiver under STRICT refuses them";
            say(format!("{part}.mode"), sentence.to_owned());
        }
        if settings.mode == TlsMode::IstioMutual && settings.sni.is_some() {
            let sentence = "has no effect towards enrolled workloads: the tunnel sends no name";
            say(format!("{part}.sni"), sentence.to_owned());
        }
        if settings.mode == TlsMode::IstioMutual {
            for unknown in settings.subject_alt_names.iter().filter(|name| !is_identity(name)) {
                let sentence =
                    format!("{unknown:?} is no identity of a workload: none of the mesh proves it");
                say(format!("{part}.subjectAltNames"), sentence);
            }
        }
    }
    notes
}

/// What the rule does for whom.
pub(super) fn effect(name: &ObjectName, rule: &DestinationRule, root_namespace: &str) -> String {
    let mut said: Vec<String> =
        rule.settings().map(|(part, settings)| format!("{part}: {}", words(settings))).collect();
    if said.is_empty() {
        said.push(
            "nothing is said of TLS: the tunnel to what is enrolled, else what the client says".to_owned(),
        );
    }
    format!("{} to {}: {}", clients(name, root_namespace), rule.host, said.join("; "))
}

/// What a rule does that cannot be used.
pub(super) fn refused_effect(name: &ObjectName, host: Option<&str>, root_namespace: &str) -> String {
    match host {
        Some(host) => format!("{} to {host} are denied", clients(name, root_namespace)),
        None => "none: it does not say for which host it is".to_owned(),
    }
}

/// policy C: the client's namespace, else the service's, else the root namespace.
fn clients(name: &ObjectName, root_namespace: &str) -> String {
    if *name.namespace == *root_namespace {
        return "connections of clients without a closer rule".to_owned();
    }
    format!(
        "connections of clients of namespace {0}, and of others to services of {0} without a closer rule,",
        name.namespace
    )
}

fn words(settings: &TlsSettings) -> String {
    let roots = settings.ca_certificates.as_deref().unwrap_or("the system");
    let names = || match (&settings.subject_alt_names[..], &settings.sni) {
        ([], None) => "the host's name".to_owned(),
        ([], Some(sni)) => format!("the name {sni}"),
        (names, _) => format!("one of {}", names.join(", ")),
    };
    match settings.mode {
        TlsMode::Disable => "plaintext".to_owned(),
        TlsMode::Simple => format!("TLS, the server proves {} by a root of {roots}", names()),
        TlsMode::Mutual => format!(
            "TLS, the server proves {} by a root of {roots}, the client shows {}",
            names(),
            settings.client_certificate.as_deref().unwrap_or_default()
        ),
        TlsMode::IstioMutual if settings.subject_alt_names.is_empty() => "the mesh's own TLS".to_owned(),
        TlsMode::IstioMutual => format!("the mesh's own TLS, the server is {}", names()),
    }
}

fn is_identity(name: &str) -> bool {
    name.parse::<spiffe_id::SpiffeId>().is_ok()
}

/// The service that a host without wildcards names, if it is one of the cluster's.
fn service_of(host: &str, rule: &ObjectName) -> Option<ObjectName> {
    if host.contains('*') {
        return None;
    }
    if !host.contains('.') {
        return Some(ObjectName::new(&rule.namespace, host));
    }
    let (name, namespace) = host.strip_suffix(SERVICE_SUFFIX)?.strip_suffix('.')?.split_once('.')?;
    Some(ObjectName::new(namespace, name))
}

/// A rule of the same namespace for the same host that counts before this one.
fn first_for_host<'o>(
    name: &ObjectName,
    rule: &DestinationRule,
    objects: &'o PolicyObjects,
) -> Option<&'o ObjectName> {
    let complete = |host: &str, of: &ObjectName| {
        service_of(host, of).map_or_else(|| host.into(), |service| Asked::host_of(&service))
    };
    let same =
        |other: &DestinationRule, of: &ObjectName| complete(&other.host, of) == complete(&rule.host, name);
    let mut others = objects.entries().filter(|(_, other, _)| other.namespace == name.namespace);
    let found = others.find(|(_, other, entry)| match entry.good.as_ref().map(|good| &good.body) {
        Some(Body::DestinationRule(body)) => **other < *name && same(body, other),
        _ => false,
    });
    found.map(|(_, other, _)| other)
}
