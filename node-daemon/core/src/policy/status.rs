//! What each object does, in words: what was accepted, what is wrong by field, and what is in force in its place.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    authn_v1alpha1::{Policy, Target, Tokens},
    book::{Book, Notes},
    client_status,
    compile::Inventory,
    objects::{Body, Entry, Good, PolicyObjects, Reach, Refused, RefusedKind},
    rbac_v1alpha1::{Mode, ServiceRole, ServiceRoleBinding, Switch},
    security_v1::{Action, AuthorizationPolicy, PeerAuthentication, Selector},
};
use crate::{
    decode::Source,
    workload::{ObjectName, TransportMode},
};

/// Problems of one object that are told; the others are counted. A screen shows no more.
const PROBLEMS_SHOWN_MAX: usize = 8;

/// One policy object as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectStatus {
    pub kind: String,
    pub name: ObjectName,
    /// False: the newest version could not be used.
    pub accepted: bool,
    /// Field, value, what was expected; also for an accepted object that does less than it says.
    pub problem: Option<String>,
    /// The field of the first problem.
    pub field: Option<String>,
    /// What the object does at present.
    pub effect: String,
    /// Where the newest version stands.
    pub source: Source,
}

pub(super) fn statuses(
    objects: &PolicyObjects,
    book: &Book<'_>,
    inventory: &Inventory<'_>,
    notes: &Notes,
) -> Vec<ObjectStatus> {
    let view = View { objects, book, inventory, notes };
    objects.entries().filter_map(|(kind, name, entry)| view.status(kind, name, entry)).collect()
}

struct View<'v> {
    objects: &'v PolicyObjects,
    book: &'v Book<'v>,
    inventory: &'v Inventory<'v>,
    notes: &'v Notes,
}

impl View<'_> {
    fn status(&self, kind: &str, name: &ObjectName, entry: &Entry) -> Option<ObjectStatus> {
        let status = |accepted, field, problem, effect, source: &Source| ObjectStatus {
            kind: kind.to_owned(),
            name: name.clone(),
            accepted,
            problem,
            field,
            effect,
            source: source.clone(),
        };
        match (&entry.good, &entry.refused) {
            (Some(good), None) => {
                let (field, problem) = self.problems(name, good);
                Some(status(true, field, problem, self.effect(name, good), &good.source))
            }
            (good, Some(refused)) => {
                let effect = match good {
                    Some(good) => format!("the version before stays in force: {}", self.effect(name, good)),
                    None => self.refused_effect(name, refused),
                };
                let invalid = &refused.invalid;
                let problem = format!("{}: {}", invalid.field, invalid.reason());
                Some(status(false, Some(invalid.field.clone()), Some(problem), effect, &invalid.source))
            }
            (None, None) => None,
        }
    }

    fn problems(&self, name: &ObjectName, good: &Good) -> (Option<String>, Option<String>) {
        let mut all: Vec<(String, String)> =
            good.warnings.iter().map(|w| (w.field.clone(), w.sentence.clone())).collect();
        all.extend(self.not_enforced(name, &good.body));
        let noted = self.notes.problems.get(&good.label).into_iter().flatten();
        all.extend(noted.map(|warning| (warning.field.clone(), warning.sentence.clone())));
        let field = all.first().map(|(field, _)| field.clone());
        let mut told: Vec<String> = all
            .iter()
            .take(PROBLEMS_SHOWN_MAX)
            .map(|(field, sentence)| format!("{field}: {sentence}"))
            .collect();
        if all.len() > told.len() {
            told.push(format!("and {} more", all.len() - told.len()));
        }
        (field, Some(told.join("; ")).filter(|told| !told.is_empty()))
    }

    /// What an accepted object says that its author should look at again.
    fn not_enforced(&self, name: &ObjectName, body: &Body) -> Vec<(String, String)> {
        let say = |field: &str, sentence: String| (field.to_owned(), sentence);
        match body {
            Body::Policy(policy) | Body::MeshPolicy(policy) => {
                let tokens = tokens_problem(policy).map(|sentence| say("spec.origins", sentence.to_owned()));
                tokens.into_iter().chain(self.missing_targets(name, policy)).collect()
            }
            Body::DestinationRule(rule) => client_status::notes(name, rule, self.objects, self.inventory),
            Body::RbacConfig(_)
            | Body::ClusterRbacConfig(_)
            | Body::ServiceRole(_)
            | Body::ServiceRoleBinding(_)
            | Body::PeerAuthentication(_)
            | Body::AuthorizationPolicy(_)
            | Body::RequestAuthentication(_) => Vec::new(),
        }
    }

    fn missing_targets(&self, name: &ObjectName, policy: &Policy) -> Vec<(String, String)> {
        let is_missing = |target: &Target| {
            !self.inventory.services.contains_key(&ObjectName::new(&name.namespace, &target.service))
        };
        let missing = policy.targets.iter().enumerate().filter(|(_, target)| is_missing(target));
        missing
            .map(|(index, target)| {
                let sentence = format!("{:?} is no service of namespace {}", target.service, name.namespace);
                (format!("spec.targets[{index}].name"), sentence)
            })
            .collect()
    }

    fn effect(&self, name: &ObjectName, good: &Good) -> String {
        let own = match &good.body {
            Body::Policy(policy) => policy_effect(policy, &policy_scope(name, &policy.targets)),
            Body::MeshPolicy(policy) => policy_effect(policy, "the mesh, where nothing closer applies"),
            Body::RbacConfig(switch) | Body::ClusterRbacConfig(switch) => switch_effect(switch),
            Body::ServiceRole(role) => role_effect(name, role),
            Body::ServiceRoleBinding(binding) => binding_effect(binding),
            Body::PeerAuthentication(body) => {
                peer_authentication_effect(body, &self.scope(name, &body.selector))
            }
            Body::AuthorizationPolicy(policy) => {
                policy_rules_effect(policy, &self.scope(name, &policy.selector))
            }
            Body::RequestAuthentication(body) => {
                let scope = self.scope(name, &body.selector);
                match body.rules.len() {
                    0 => format!("asks nothing of requests to {scope}"),
                    count => {
                        format!("a token for one of {count} issuers must be valid if it is sent to {scope}")
                    }
                }
            }
            Body::DestinationRule(rule) => client_status::effect(name, rule, &self.book.mesh.root_namespace),
        };
        let noted = self.notes.effects.get(&good.label).into_iter().flatten();
        noted.fold(own, |effect, sentence| format!("{effect}; {sentence}"))
    }

    fn refused_effect(&self, name: &ObjectName, refused: &Refused) -> String {
        let denied = |scope: String| format!("every connection is denied to {scope}");
        match &refused.kind {
            RefusedKind::Policy(Reach::Targets(targets)) => denied(policy_scope(name, targets)),
            RefusedKind::Policy(Reach::Scope) => denied(format!(
                "{}, where nothing closer applies and no policy is named default",
                policy_scope(name, &[])
            )),
            RefusedKind::Policy(_) => denied(policy_scope(name, &[])),
            RefusedKind::MeshPolicy => {
                denied("the mesh, where nothing closer applies and no MeshPolicy is named default".to_owned())
            }
            RefusedKind::Switch { is_cluster } => {
                let scope = if *is_cluster {
                    "the mesh".to_owned()
                } else {
                    "what it would have governed".to_owned()
                };
                format!("{}, unless another object decides where RBAC runs", denied(scope))
            }
            RefusedKind::PeerAuthentication(Reach::Scope) => {
                denied(format!("{}, where nothing closer applies", self.scope(name, &Selector::new())))
            }
            RefusedKind::AuthorizationPolicy { reach: Reach::Nobody, .. } => {
                "none: it denies and grants nothing".to_owned()
            }
            RefusedKind::AuthorizationPolicy { reach, only_grants: true } => {
                format!("{}, unless another AuthorizationPolicy allows it", denied(self.reach(name, reach)))
            }
            RefusedKind::PeerAuthentication(reach) | RefusedKind::AuthorizationPolicy { reach, .. } => {
                denied(self.reach(name, reach))
            }
            RefusedKind::Grant => "it grants nothing".to_owned(),
            RefusedKind::RequestAuthentication(reach) => {
                format!("every request is denied to HTTP ports of {}", self.reach(name, reach))
            }
            RefusedKind::DestinationRule { host } => {
                client_status::refused_effect(name, host.as_deref(), &self.book.mesh.root_namespace)
            }
            RefusedKind::Unknown => denied(self.scope(name, &Selector::new())),
        }
    }

    fn reach(&self, name: &ObjectName, reach: &Reach) -> String {
        match reach {
            Reach::Selected(selector) => self.scope(name, selector),
            Reach::Scope | Reach::Targets(_) | Reach::Unreadable | Reach::Nobody => {
                self.scope(name, &Selector::new())
            }
        }
    }

    fn scope(&self, name: &ObjectName, selector: &Selector) -> String {
        let is_mesh = name.namespace.is_empty() || *name.namespace == *self.book.mesh.root_namespace;
        let place = if is_mesh { "the mesh".to_owned() } else { format!("namespace {}", name.namespace) };
        if selector.is_empty() {
            return place;
        }
        let labels: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
        format!("workloads of {place} with {}", labels.join(", "))
    }
}

fn tokens_problem(policy: &Policy) -> Option<&'static str> {
    match policy.tokens {
        Tokens::NotAsked | Tokens::Optional | Tokens::Required => None,
        Tokens::Impossible => Some(
            "principalBinding USE_ORIGIN without origins lets no request through: those to the HTTP ports it targets \
             are refused",
        ),
    }
}

fn policy_scope(name: &ObjectName, targets: &[Target]) -> String {
    if targets.is_empty() {
        return format!("namespace {}", name.namespace);
    }
    let services: BTreeSet<&str> = targets.iter().map(|target| target.service.as_str()).collect();
    format!("targeted ports of {} in namespace {}", Vec::from_iter(services).join(", "), name.namespace)
}

fn policy_effect(policy: &Policy, scope: &str) -> String {
    format!("{} for {scope}", mode_words(policy.mode))
}

fn mode_words(mode: TransportMode) -> &'static str {
    match mode {
        TransportMode::Strict => "mutual TLS is required",
        TransportMode::Permissive => "plaintext is accepted beside mutual TLS",
        TransportMode::Disabled => "nothing is required, and rules see no identity,",
    }
}

fn peer_authentication_effect(body: &PeerAuthentication, scope: &str) -> String {
    let mode = body.mode.map_or("the next level decides", mode_words);
    let ports: BTreeMap<u16, &str> = body
        .ports
        .iter()
        .map(|(port, mode)| (*port, mode.map_or("as for other ports", mode_words)))
        .collect();
    let ports: String = ports.iter().map(|(port, words)| format!("; on port {port} {words}")).collect();
    format!("{mode} for {scope}{ports}")
}

fn switch_effect(switch: &Switch) -> String {
    let listed = || {
        let names = switch.listed.namespaces.iter().chain(&switch.listed.services);
        let names = names.map(String::as_str).collect::<Vec<_>>().join(", ");
        if names.is_empty() { "nothing".to_owned() } else { names }
    };
    let place = match switch.mode {
        Mode::Off => return "RBAC is off".to_owned(),
        Mode::On => "everywhere".to_owned(),
        Mode::OnWithInclusion => {
            format!("for {}", listed())
        }
        Mode::OnWithExclusion => {
            format!("except for {}", listed())
        }
    };
    let only_seen = if switch.is_permissive { ", but nobody is refused" } else { "" };
    format!("RBAC runs {place}{only_seen}")
}

fn role_effect(name: &ObjectName, role: &ServiceRole) -> String {
    let usable = role.rules.iter().filter(|rule| rule.request_fields.is_empty()).count();
    let count = role.rules.len();
    format!(
        "{count} rules grant requests, and {usable} of {count} rules grant connections, in namespace {}",
        name.namespace
    )
}

fn binding_effect(binding: &ServiceRoleBinding) -> String {
    let (role, count) = (&binding.role, binding.subjects.len());
    if binding.is_permissive {
        return format!("mode PERMISSIVE: it grants nothing of role {role}"); // policy B-11
    }
    let usable = binding.subjects.iter().filter(|subject| subject.request_fields.is_empty()).count();
    format!(
        "{count} subjects may use role {role} by requests, and {usable} of {count} subjects by connections"
    )
}

fn policy_rules_effect(policy: &AuthorizationPolicy, scope: &str) -> String {
    if policy.is_dry_run {
        return format!("dry run: not enforced for {scope}");
    }
    match policy.action {
        Action::Allow if policy.rules.is_empty() => format!("allows nobody to reach {scope}"),
        Action::Allow => format!("only what some ALLOW rule matches reaches {scope}"),
        Action::Deny => format!("what its rules match is denied to {scope}"),
        Action::Audit => format!("records what its rules match on its way to {scope}, and decides nothing"),
        Action::Custom => {
            format!("no provider is asked in this version: what its rules match is denied to {scope}")
        }
    }
}
