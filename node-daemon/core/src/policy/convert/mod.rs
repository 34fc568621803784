//! Objects of 2018 in, objects of the current API out, and a proof that they say the same (policy F-4).
//!
//! ```text
//! objects of 2018 --> [authn] PeerAuthentication, RequestAuthentication --.
//!                 --> [rbac]  AuthorizationPolicy ------------------------+--> [yaml] --> whoever asked, who reads it back
//!                        |                                                                       |
//!                     [express] one condition in the other words                              [prove]
//! ```
//!
//! What the current API cannot say is refused by object and field: nothing is written that is nearly the same. Services are
//! selected by their labels and ports by the workload's numbers, so the documents of services and workloads are needed.
//! Reads and writes no file.

mod authn;
mod express;
mod prove;
mod rbac;
#[cfg(test)]
mod tests;
mod yaml;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use serde_json::{Map, Value, json};

use self::express::Inexpressible;
pub use self::prove::{CounterExample, POINTS_MAX, Proof, Proven};
use super::{
    compile::{Inventory, owners, protocol},
    objects::{Body, Entry, PolicyObjects},
    transport::selects,
};
use crate::{
    decode::Object,
    workload::{Mesh, ObjectName, Protocol, Service, ServicePort, TargetPort, Workload},
};

/// The documents that an operator has.
#[derive(Clone, Copy, Debug)]
pub struct Documents<'a> {
    /// Of policy, of both ages.
    pub objects: &'a [Object],
    pub mesh: &'a Mesh,
    pub workloads: &'a BTreeMap<ObjectName, Arc<Workload>>,
    pub services: &'a BTreeMap<ObjectName, Service>,
}

/// What became of the objects of 2018.
#[derive(Clone, Debug, Default)]
pub struct Conversion {
    documents: Vec<Document>,
    /// Why it is no whole; then nothing of it should be used.
    pub refusals: Vec<Refusal>,
    /// Objects that decide nothing, and why they are not there any more.
    pub left_out: Vec<Refusal>,
}

/// An object, or a part of it, and a sentence about it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Refusal {
    /// `Kind/namespace/name`
    pub object: String,
    pub field: String,
    pub why: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}: {}", self.object, self.field, self.why)
    }
}

/// One object of the current API.
#[derive(Clone, Debug)]
struct Document {
    value: Value,
    from: BTreeSet<String>,
    checks: BTreeSet<String>,
}

/// Whether an object belongs to the API of 2018.
pub fn is_of_2018(object: &Object) -> bool {
    matches!(object.api_version.split('/').next(), Some("authentication.istio.io" | "rbac.istio.io"))
}

/// Converts all objects of 2018 among the documents. Objects that the decoder refuses are refused.
pub fn convert(documents: &Documents<'_>) -> Conversion {
    let (mut old, mut conversion) = (PolicyObjects::new(), Conversion::default());
    for object in documents.objects {
        if let (Err(invalid), true) = (old.insert(object), is_of_2018(object)) {
            conversion.refuse(&label(object), &invalid.field, invalid.reason());
        }
    }
    if !conversion.refusals.is_empty() {
        return conversion;
    }
    let mut ground = Ground::new(documents, old);
    authn::convert(&mut ground, &mut conversion);
    rbac::convert(&mut ground, &mut conversion);
    conversion.refusals.sort();
    conversion.refusals.dedup();
    conversion
}

/// Whether the documents before say the same as those after, whose policy is given as objects.
pub fn prove(before: &Documents<'_>, after: &[Object]) -> Proof {
    let read = |objects: &mut dyn Iterator<Item = &Object>| {
        let mut read = PolicyObjects::new();
        for object in objects {
            // A refused one denies in both.
            let _ = read.insert(object);
        }
        read
    };
    let kept = before.objects.iter().filter(|object| !is_of_2018(object));
    let old = read(&mut before.objects.iter());
    let new = read(&mut kept.chain(after));
    prove::prove(
        &old,
        &new,
        &Inventory {
            mesh: before.mesh,
            workloads: before.workloads,
            services: before.services,
            node: prove::NODE,
        },
    )
}

fn label(object: &Object) -> String {
    format!("{}/{}", object.kind, object.name)
}

impl Conversion {
    fn refuse(&mut self, object: &str, field: &str, why: impl Into<String>) {
        self.refusals.push(Refusal { object: object.to_owned(), field: field.to_owned(), why: why.into() });
    }

    fn refuse_part(&mut self, object: &str, field: &str, part: Inexpressible) {
        self.refuse(object, field, format!("{}: {}", part.attribute, part.why));
    }

    fn leave_out(&mut self, object: &str, field: &str, why: &str) {
        self.left_out.push(Refusal {
            object: object.to_owned(),
            field: field.to_owned(),
            why: why.to_owned(),
        });
    }

    /// Without objects of 2018 there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    /// How many objects it has.
    pub fn count(&self) -> usize {
        self.documents.len()
    }

    /// All objects as YAML, with comments that say where they come from and what to look at.
    pub fn yaml(&self) -> String {
        let mut text = String::new();
        for left in &self.left_out {
            text.push_str(&comment(&format!("Left out: {left}")));
        }
        for (index, document) in self.documents.iter().enumerate() {
            if index > 0 {
                text.push_str("---\n");
            }
            let from: Vec<&str> = document.from.iter().map(String::as_str).collect();
            text.push_str(&comment(&format!("From {}.", from.join(", "))));
            for check in &document.checks {
                text.push_str(&comment(&format!("Check: {check}.")));
            }
            text.push_str(&yaml::document(&document.value));
        }
        text
    }
}

/// No text of an object ends a comment.
fn comment(text: &str) -> String {
    let clean: String = text.chars().map(|each| if each.is_control() { ' ' } else { each }).collect();
    format!("# {clean}\n")
}

/// Labels by which workloads are selected; empty selects all.
type Labels = BTreeMap<String, String>;

/// What converting stands on.
struct Ground<'a> {
    mesh: &'a Mesh,
    workloads: &'a BTreeMap<ObjectName, Arc<Workload>>,
    services: &'a BTreeMap<ObjectName, Service>,
    old: PolicyObjects,
    /// Without those that grant: what is asked of senders, which many rules want to know.
    asking: PolicyObjects,
    /// Kind, namespace and name of what is there already.
    taken: BTreeSet<(String, String, String)>,
}

impl<'a> Ground<'a> {
    fn new(documents: &Documents<'a>, old: PolicyObjects) -> Self {
        let names = documents.objects.iter().filter(|object| !is_of_2018(object));
        let taken = names
            .map(|object| {
                (object.kind.clone(), object.name.namespace.to_string(), object.name.name.to_string())
            })
            .collect();
        let Documents { mesh, workloads, services, .. } = *documents;
        let mut asking = PolicyObjects::new();
        let grants = ["ServiceRole", "ServiceRoleBinding", "AuthorizationPolicy"];
        for object in documents.objects.iter().filter(|object| !grants.contains(&object.kind.as_str())) {
            // What is refused asks nothing that could be written.
            let _ = asking.insert(object);
        }
        Self { mesh, workloads, services, old, asking, taken }
    }

    fn good(&self) -> impl Iterator<Item = (&ObjectName, &Arc<str>, &Body)> {
        self.old.entries().filter_map(|(_, name, entry)| match entry {
            Entry { good: Some(good), .. } => Some((name, &good.label, &good.body)),
            Entry { good: None, .. } => None,
        })
    }

    fn services_of<'s>(&'s self, namespace: &'s str) -> impl Iterator<Item = &'a Service> + 's {
        self.services.values().filter(move |service| &*service.name.namespace == namespace)
    }

    /// A name that nothing of this kind has yet.
    fn name(&mut self, kind: &str, namespace: &str, wanted: &str) -> String {
        let mut name: String = wanted.chars().take(NAME_CHARACTERS_MAX).collect();
        name.truncate(name.trim_end_matches(['.', '-']).len());
        let first = name.clone();
        let mut number = 1;
        while !self.taken.insert((kind.to_owned(), namespace.to_owned(), name.clone())) {
            number += 1;
            name = format!("{first}-{number}");
        }
        name
    }

    fn head(&mut self, kind: &str, namespace: &str, wanted: &str) -> Value {
        let name = self.name(kind, namespace, wanted);
        json!({
            "apiVersion": "security.istio.io/v1",
            "kind": kind,
            "metadata": {"name": name, "namespace": namespace},
            "spec": {},
        })
    }

    /// Where a service is served: the workload's ports that it owns, and what is spoken there (policy A-4, H-1).
    ///
    /// # Errors
    /// Why no selector and list of ports says it.
    fn served(&self, service: &Service) -> Result<BTreeMap<u16, Served<'a>>, String> {
        let Some((_, service)) = self.services.get_key_value(&service.name) else {
            return Err("it is no Service of these documents".to_owned());
        };
        if service.selector.is_empty() {
            return Err(format!(
                "service {} has no selector, so that no label says which workloads it has",
                service.name
            ));
        }
        let here = |workload: &&Arc<Workload>| {
            workload.name.namespace == service.name.namespace && selects(&service.selector, workload)
        };
        let mut found: Option<(&ObjectName, BTreeMap<u16, Served<'_>>)> = None;
        for workload in self.workloads.values().filter(here) {
            let owned = owned(service, workload, self.services);
            match &found {
                Some((first, known)) if !known.keys().eq(owned.keys()) || !same_protocols(known, &owned) => {
                    return Err(format!(
                        "its workloads {first} and {} do not serve it on the same ports: give them labels of their own",
                        workload.name
                    ));
                }
                Some(_) => {}
                None => found = Some((&workload.name, owned)),
            }
        }
        match found {
            Some((_, served)) => Ok(served),
            None => declared(service),
        }
    }
}

/// Longest name that is made here, in characters: room for a number remains within the 253 of Kubernetes.
const NAME_CHARACTERS_MAX: usize = 240;

/// One port of a service's workloads.
#[derive(Clone, Debug)]
struct Served<'a> {
    protocol: Protocol,
    ports: Vec<&'a ServicePort>,
}

fn same_protocols(one: &BTreeMap<u16, Served<'_>>, other: &BTreeMap<u16, Served<'_>>) -> bool {
    one.values().map(|served| served.protocol).eq(other.values().map(|served| served.protocol))
}

fn owned<'a>(
    service: &Service,
    workload: &Workload,
    services: &'a BTreeMap<ObjectName, Service>,
) -> BTreeMap<u16, Served<'a>> {
    let owners = owners(workload, services);
    let of_service = owners.into_iter().filter(|(_, owner)| owner.service.name == service.name);
    of_service
        .map(|(port, owner)| {
            let protocol = protocol(workload, port, Some(&owner));
            (port, Served { protocol, ports: owner.ports })
        })
        .collect()
}

/// Of a service without workloads.
fn declared(service: &Service) -> Result<BTreeMap<u16, Served<'_>>, String> {
    let mut served: BTreeMap<u16, Served<'_>> = BTreeMap::new();
    for port in &service.ports {
        let TargetPort::Number(target) = &port.target else {
            return Err(format!(
                "service {} has a port that its workloads name, and no Workload document that says its number",
                service.name
            ));
        };
        let entry = served.entry(*target).or_insert(Served { protocol: port.protocol, ports: Vec::new() });
        entry.ports.push(port);
        if entry.protocol == Protocol::Tcp {
            entry.protocol = port.protocol;
        }
    }
    Ok(served)
}

fn selector(labels: &Labels) -> Value {
    json!({ "matchLabels": labels })
}

/// Both together, if a workload can carry both.
fn both(one: &Labels, other: &Labels) -> Option<Labels> {
    let mut all = one.clone();
    for (key, value) in other {
        if all.insert(key.clone(), value.clone()).is_some_and(|before| before != *value) {
            return None;
        }
    }
    Some(all)
}

fn object(entries: &[(&'static str, Vec<String>)]) -> Value {
    let entries = entries.iter().map(|(name, values)| ((*name).to_owned(), json!(values)));
    Value::Object(entries.collect::<Map<_, _>>())
}
