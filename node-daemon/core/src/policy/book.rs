//! The objects that count, sorted by age, ready to be asked what applies to one port.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    authn_v1alpha1::{DEFAULT_NAME, Policy},
    matching::TrustDomains,
    objects::{Body, Entry, Good, PolicyObjects, Reach, Refused, RefusedKind},
    rbac_v1alpha1::{AccessRule, ServiceRoleBinding, Switch},
    reader::Warning,
    request_authentication::RequestAuthentication,
    rules::{Condition, Holder, NamedRules, Rule},
    security_v1::{AuthorizationPolicy, PeerAuthentication},
};
use crate::workload::{Mesh, ObjectName};

/// One object in force, or one that stands where it might be.
#[derive(Debug)]
pub(super) struct Candidate<'a, T> {
    pub(super) label: &'a Arc<str>,
    pub(super) name: &'a ObjectName,
    pub(super) body: Result<T, &'a Reach>,
    created: Option<&'a str>,
}

/// A `ServiceRole`, compiled together with its bindings.
#[derive(Debug)]
pub(super) struct Role<'a> {
    pub(super) label: &'a Arc<str>,
    pub(super) rules: Vec<RoleRule<'a>>,
    /// Subjects that only a request can answer: binding, index, fields.
    pub(super) asking: Vec<(&'a Arc<str>, usize, String)>,
}

#[derive(Debug)]
pub(super) struct RoleRule<'a> {
    pub(super) written: &'a AccessRule,
    pub(super) index: usize,
    pub(super) conditions: Arc<[Condition]>,
    pub(super) holders: Arc<[Holder]>,
    /// With the bindings that are only tried; `None`: there are none (policy B-11).
    pub(super) holders_tried: Option<Arc<[Holder]>>,
}

/// An `AuthorizationPolicy`, its rules compiled once for all workloads that it selects.
#[derive(Debug)]
pub(super) struct Authorization<'a> {
    pub(super) written: &'a AuthorizationPolicy,
    pub(super) rules: NamedRules,
}

/// Which object switches RBAC (policy B-1, 0-8).
#[derive(Debug)]
pub(super) enum Chosen<'a> {
    Switch(&'a Arc<str>, &'a Switch),
    /// It cannot be read: closed everywhere.
    Unusable(&'a Arc<str>),
    /// There is none. Misnamed ones close what they were written for.
    Missing {
        misnamed: Vec<(&'a str, &'a Arc<str>)>,
    },
}

/// All objects, by what they decide.
#[derive(Debug)]
pub(super) struct Book<'a> {
    pub(super) mesh: &'a Mesh,
    pub(super) trusted: TrustDomains,
    pub(super) peer_authentications: Vec<Candidate<'a, &'a PeerAuthentication>>,
    pub(super) policies: Vec<Candidate<'a, &'a Policy>>,
    pub(super) mesh_policies: Vec<Candidate<'a, &'a Policy>>,
    authorizations: Vec<Candidate<'a, Authorization<'a>>>,
    /// Where the objects of each namespace stand in [`Self::authorizations`], in their order.
    authorizations_of: BTreeMap<&'a str, Vec<usize>>,
    pub(super) request_authentications: Vec<Candidate<'a, &'a RequestAuthentication>>,
    /// `Err`: an ALLOW that could not be read among [`Self::authorizations`].
    pub(super) unreadable_grants: BTreeSet<&'a str>,
    pub(super) switch: Chosen<'a>,
    /// By namespace: a role counts only for destinations of its own (policy B-2).
    pub(super) roles: BTreeMap<&'a str, Vec<Role<'a>>>,
    /// Objects of unknown kinds, by namespace.
    pub(super) unknown: Vec<(&'a str, &'a Arc<str>)>,
}

impl<'a> Book<'a> {
    pub(super) fn new(objects: &'a PolicyObjects, mesh: &'a Mesh, notes: &mut Notes) -> Self {
        let trusted = TrustDomains::new(&mesh.trust_domain, &mesh.trust_domain_aliases);
        let mut book = Self {
            mesh,
            trusted,
            peer_authentications: Vec::new(),
            policies: Vec::new(),
            mesh_policies: Vec::new(),
            authorizations: Vec::new(),
            authorizations_of: BTreeMap::new(),
            request_authentications: Vec::new(),
            unreadable_grants: BTreeSet::new(),
            switch: choose_switch(objects, &mesh.root_namespace, notes),
            roles: BTreeMap::new(),
            unknown: Vec::new(),
        };
        for (_, name, entry) in objects.entries() {
            book.enter(name, entry);
        }
        book.roles = roles(objects, &book.trusted, notes);
        by_age(&mut book.peer_authentications);
        by_age(&mut book.policies);
        by_age(&mut book.mesh_policies);
        by_age(&mut book.authorizations);
        by_age(&mut book.request_authentications);
        for (index, candidate) in book.authorizations.iter().enumerate() {
            book.authorizations_of.entry(&candidate.name.namespace).or_default().push(index);
        }
        book
    }

    /// The `AuthorizationPolicy` objects that speak for workloads of `own`, the oldest first. A workload asks for its own
    /// scope only: otherwise each would pay for the policies of the whole mesh.
    pub(super) fn authorizations(&self, own: &str) -> Vec<&Candidate<'a, Authorization<'a>>> {
        let namespaces = BTreeSet::from([own, self.mesh.root_namespace.as_str(), ""]);
        let lists = namespaces.into_iter().filter_map(|namespace| self.authorizations_of.get(namespace));
        let mut indices: Vec<usize> = lists.flatten().copied().collect();
        indices.sort_unstable();
        indices.into_iter().map(|index| &self.authorizations[index]).collect()
    }

    /// Whether an object of `namespace` speaks for workloads of `own`: the root namespace speaks for all.
    pub(super) fn is_in_scope(&self, namespace: &str, own: &str) -> bool {
        namespace == own || namespace == self.mesh.root_namespace || namespace.is_empty()
    }

    fn enter(&mut self, name: &'a ObjectName, entry: &'a Entry) {
        match entry {
            Entry { good: Some(good), .. } => {
                self.enter_good(name, &good.label, good.created.as_deref(), &good.body)
            }
            Entry { good: None, refused: Some(refused) } => {
                let created = refused.created.as_deref();
                let label = &refused.label;
                match &refused.kind {
                    RefusedKind::Policy(reach) => {
                        self.policies.push(Candidate { label, name, created, body: Err(reach) });
                    }
                    RefusedKind::MeshPolicy => {
                        self.mesh_policies.push(Candidate { label, name, created, body: Err(&Reach::Scope) });
                    }
                    RefusedKind::PeerAuthentication(reach) => {
                        self.peer_authentications.push(Candidate { label, name, created, body: Err(reach) });
                    }
                    RefusedKind::AuthorizationPolicy { reach, only_grants } => {
                        self.authorizations.push(Candidate { label, name, created, body: Err(reach) });
                        if *only_grants {
                            self.unreadable_grants.insert(label);
                        }
                    }
                    RefusedKind::RequestAuthentication(reach) => {
                        let body = Err(reach);
                        self.request_authentications.push(Candidate { label, name, created, body });
                    }
                    RefusedKind::Unknown => self.unknown.push((&name.namespace, label)),
                    RefusedKind::Switch { .. } | RefusedKind::Grant | RefusedKind::DestinationRule { .. } => {
                    }
                }
            }
            Entry { good: None, refused: None } => {}
        }
    }

    fn enter_good(
        &mut self,
        name: &'a ObjectName,
        label: &'a Arc<str>,
        created: Option<&'a str>,
        body: &'a Body,
    ) {
        match body {
            Body::Policy(policy) => self.policies.push(Candidate { label, name, created, body: Ok(policy) }),
            Body::MeshPolicy(policy) => {
                self.mesh_policies.push(Candidate { label, name, created, body: Ok(policy) });
            }
            Body::PeerAuthentication(body) => {
                self.peer_authentications.push(Candidate { label, name, created, body: Ok(body) });
            }
            Body::AuthorizationPolicy(written) => {
                let rules = NamedRules { policy: label.clone(), rules: policy_rules(written, &self.trusted) };
                let body = Ok(Authorization { written, rules });
                self.authorizations.push(Candidate { label, name, created, body });
            }
            Body::RequestAuthentication(body) => {
                self.request_authentications.push(Candidate { label, name, created, body: Ok(body) });
            }
            Body::RbacConfig(_)
            | Body::ClusterRbacConfig(_)
            | Body::ServiceRole(_)
            | Body::ServiceRoleBinding(_)
            | Body::DestinationRule(_) => {}
        }
    }
}

/// The oldest first; without a time of creation all are equally old (policy 0-7, F-1).
fn by_age<T>(candidates: &mut [Candidate<'_, T>]) {
    candidates.sort_by_key(|candidate| (candidate.created, candidate.name));
}

fn policy_rules(written: &AuthorizationPolicy, trusted: &TrustDomains) -> Arc<[Rule]> {
    written.rules.iter().map(|rule| rule.rule.in_mesh(trusted)).collect()
}

/// `ClusterRbacConfig` before `RbacConfig` (policy 0-8). Of several `RbacConfig`s the root namespace's, then the oldest:
/// a namespace cannot take the switch away from whoever had it first.
fn choose_switch<'a>(objects: &'a PolicyObjects, root: &str, notes: &mut Notes) -> Chosen<'a> {
    let mut found = Vec::new();
    let mut misnamed = Vec::new();
    for (kind, name, entry) in objects.entries() {
        let is_cluster = kind == "ClusterRbacConfig";
        let namespace = &*name.namespace;
        let (label, created, body) = match (&entry.good, &entry.refused) {
            (
                Some(Good { label, created, body: Body::RbacConfig(s) | Body::ClusterRbacConfig(s), .. }),
                _,
            ) => (label, created, Some(s)),
            (None, Some(Refused { label, created, kind: RefusedKind::Switch { .. }, .. })) => {
                (label, created, None)
            }
            (Some(_) | None, _) => continue,
        };
        if &*name.name == DEFAULT_NAME {
            found.push(((!is_cluster, namespace != root, created, name), label, body));
        } else {
            misnamed.push((if is_cluster { "" } else { namespace }, label));
        }
    }
    found.sort_by_key(|(rank, ..)| *rank);
    for (_, label, _) in found.iter().skip(1) {
        notes.effect(label, format!("has no effect: {} decides where RBAC runs", found[0].1));
    }
    let stray_cluster = misnamed.iter().find(|(namespace, _)| namespace.is_empty()).map(|(_, label)| *label);
    match (found.first(), stray_cluster) {
        (Some(((true, ..), ..)) | None, Some(label)) => Chosen::Unusable(label),
        (Some((_, label, Some(switch))), _) => Chosen::Switch(label, switch),
        (Some((_, label, None)), _) => Chosen::Unusable(label),
        (None, None) => Chosen::Missing { misnamed },
    }
}

/// A binding and its label.
type Bound<'a> = (&'a Arc<str>, &'a ServiceRoleBinding);

/// Joins each role with the bindings of its namespace that name it (policy B-2, B-4).
fn roles<'a>(
    objects: &'a PolicyObjects,
    trusted: &TrustDomains,
    notes: &mut Notes,
) -> BTreeMap<&'a str, Vec<Role<'a>>> {
    let mut bindings: BTreeMap<(&str, &str), Vec<Bound<'_>>> = BTreeMap::new();
    for (_, name, entry) in objects.entries() {
        if let Some((label, Body::ServiceRoleBinding(binding))) = good(entry) {
            bindings.entry((&name.namespace, &binding.role)).or_default().push((label, binding));
        }
    }
    let mut roles: BTreeMap<&str, Vec<Role<'_>>> = BTreeMap::new();
    for (_, name, entry) in objects.entries() {
        let Some((label, Body::ServiceRole(role))) = good(entry) else { continue };
        let bound = bindings.remove(&(&*name.namespace, &*name.name)).unwrap_or_default();
        if bound.is_empty() {
            notes.problem(label, "metadata.name", "no binding names this role: it grants nothing");
        }
        let is_tried = bound.iter().any(|(_, binding)| binding.is_permissive);
        let rule = |(index, written): (usize, &'a AccessRule)| RoleRule {
            written,
            index,
            conditions: written.conditions.iter().map(|c| c.in_mesh(trusted)).collect(),
            holders: holders(index, &bound, false, trusted),
            holders_tried: is_tried.then(|| holders(index, &bound, true, trusted)),
        };
        let rules = role.rules.iter().enumerate().map(rule).collect();
        let asking = bound.iter().flat_map(|(label, binding)| {
            let subjects = binding.subjects.iter().enumerate();
            let asking = subjects.filter(|(_, subject)| !subject.request_fields.is_empty());
            asking.map(move |(index, subject)| (*label, index, subject.request_fields.join(", ")))
        });
        let asking = asking.collect();
        roles.entry(&*name.namespace).or_default().push(Role { label, rules, asking });
    }
    for ((namespace, role), dangling) in bindings {
        for (label, _) in dangling {
            let sentence =
                format!("{role:?} is no usable ServiceRole of namespace {namespace}: it grants nothing");
            notes.problem(label, "spec.roleRef.name", sentence);
        }
    }
    roles
}

fn good(entry: &Entry) -> Option<(&Arc<str>, &Body)> {
    entry.good.as_ref().map(|good| (&good.label, &good.body))
}

/// A binding in PERMISSIVE mode holds nothing (policy B-11), unless it is asked what would be if it did.
fn holders(
    rule_index: usize,
    bindings: &[Bound<'_>],
    with_tried: bool,
    trusted: &TrustDomains,
) -> Arc<[Holder]> {
    let in_mesh =
        |conditions: &[Condition]| conditions.iter().map(|c| c.in_mesh(trusted)).collect::<Vec<_>>();
    bindings
        .iter()
        .filter(|(_, binding)| with_tried || !binding.is_permissive)
        .map(|(label, binding)| Holder {
            label: format!("rules[{rule_index}] via {label}").into(),
            subjects: binding.subjects.iter().map(|subject| in_mesh(&subject.conditions)).collect(),
        })
        .collect()
}

/// What compiling finds out about objects, for their status.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) problems: BTreeMap<Arc<str>, BTreeSet<Warning>>,
    pub(super) effects: BTreeMap<Arc<str>, BTreeSet<String>>,
}

impl Notes {
    pub(super) fn problem(&mut self, label: &Arc<str>, field: &str, sentence: impl Into<String>) {
        let warning = Warning { field: field.to_owned(), sentence: sentence.into() };
        self.problems.entry(label.clone()).or_default().insert(warning);
    }

    pub(super) fn effect(&mut self, label: &Arc<str>, sentence: impl Into<String>) {
        self.effects.entry(label.clone()).or_default().insert(sentence.into());
    }
}
