//! What a port demands of the connection itself: `PeerAuthentication` before `Policy` before `MeshPolicy` before the
//! mesh's default (policy A-4, F-1, F-4).

use std::{collections::BTreeMap, sync::Arc};

use super::{
    authentication::{Authentication, OriginStep},
    authn_v1alpha1::{DEFAULT_NAME, Policy, PortSelector, Target, Tokens},
    book::{Authorization, Book, Candidate, Notes},
    objects::Reach,
    request_authentication::RequestAuthentication,
    rules::Transport,
    security_v1::PeerAuthentication,
    tokens::TokenRules,
};
use crate::workload::{Protocol, Service, ServicePort, TransportMode, Workload};

/// One port of a local workload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub(super) workload: &'a Workload,
    /// `None`: any port that nothing names.
    pub(super) port: Option<u16>,
    pub(super) protocol: Protocol,
    pub(super) owner: Option<&'a Owner<'a>>,
    /// Those that select the workload, the oldest first.
    pub(super) authorizations: &'a [&'a Candidate<'a, Authorization<'a>>],
}

/// The service on whose behalf a port is open, and which of its ports lead there (policy A-4, H-1).
#[derive(Debug)]
pub(super) struct Owner<'a> {
    pub(super) service: &'a Service,
    pub(super) ports: Vec<&'a ServicePort>,
}

/// The transport of one port, and what it asks of the senders of requests.
pub(super) fn transport(
    place: &Place<'_>,
    book: &Book<'_>,
    notes: &mut Notes,
) -> (Transport, Authentication) {
    let (by_policy, policies) = by_policies(place, book, notes);
    let transport = match by_peer_authentication(place, book, notes) {
        None => by_policy,
        // Transport is the PeerAuthentication's alone; what the Policy asks of tokens still stands.
        Some(transport) if by_policy.is_unusable && !transport.is_unusable => {
            Transport { mode: transport.mode, ..by_policy }
        }
        Some(transport) => transport,
    };
    let authentication = match place.protocol {
        Protocol::Tcp => {
            note_idle_tokens(place, book, notes);
            Authentication::default() // policy A-7
        }
        Protocol::Http | Protocol::Grpc => authentication(place, &policies, book),
    };
    (transport, authentication)
}

/// A port that names no HTTP carries no request whose token could be looked at (policy A-7, H-8).
fn note_idle_tokens(place: &Place<'_>, book: &Book<'_>, notes: &mut Notes) {
    let Some(port) = place.port else { return };
    for candidate in &book.request_authentications {
        let Ok(body) = candidate.body else { continue };
        let is_selected = book.is_in_scope(&candidate.name.namespace, &place.workload.name.namespace)
            && selects(&body.selector, place.workload);
        if is_selected && !body.rules.is_empty() {
            let name = &place.workload.name;
            let sentence = format!("no effect on port {port} of {name}, which carries TCP, not HTTP");
            notes.problem(candidate.label, "spec.jwtRules", sentence);
        }
    }
}

/// A policy that applies to a port, and its name.
type Applied<'a> = (&'a Arc<str>, &'a Policy);

fn authentication(place: &Place<'_>, policies: &[Applied<'_>], book: &Book<'_>) -> Authentication {
    let step = |(label, policy): &Applied<'_>| {
        let asks = !policy.origins.is_empty();
        // policy: without peers and origins the binding has no effect.
        let binds_nothing = policy.binds_origin && policy.mode != TransportMode::Disabled;
        (asks || binds_nothing).then(|| OriginStep {
            policy: Arc::clone(label),
            methods: policy.origins.clone(),
            is_optional: matches!(policy.tokens, Tokens::Optional | Tokens::NotAsked),
            binds_origin: policy.binds_origin,
        })
    };
    let origins: Vec<OriginStep> = policies.iter().filter_map(step).collect();
    let selected = |candidate: &&Candidate<'_, &RequestAuthentication>| {
        book.is_in_scope(&candidate.name.namespace, &place.workload.name.namespace)
            && match candidate.body {
                Ok(body) => selects(&body.selector, place.workload),
                Err(Reach::Selected(selector)) => selects(selector, place.workload),
                Err(Reach::Scope | Reach::Unreadable) => true,
                Err(Reach::Targets(_) | Reach::Nobody) => false,
            }
    };
    let (mut requests, mut request_policy, mut unusable) = (Vec::new(), None, None);
    for candidate in book.request_authentications.iter().filter(selected) {
        match candidate.body {
            Ok(body) => {
                requests.extend(body.rules.iter().cloned());
                request_policy = request_policy.or_else(|| Some(Arc::clone(candidate.label)));
            }
            Err(_) => unusable = unusable.or_else(|| Some(Arc::clone(candidate.label))),
        }
    }
    let of_origins = origins.iter().flat_map(|step| step.methods.iter().map(|method| method.rule.clone()));
    let tokens =
        TokenRules::new(of_origins.chain(requests.iter().cloned()).collect(), book.mesh.needs_token_expiry);
    let peer_is_optional = !policies.is_empty() && policies.iter().all(|(_, policy)| policy.peer_is_optional);
    Authentication { peer_is_optional, origins, requests, request_policy, unusable, tokens }
}

/// Whether a selector selects the workload; an empty one selects all.
pub(super) fn selects(selector: &BTreeMap<String, String>, workload: &Workload) -> bool {
    selector.iter().all(|(key, value)| workload.labels.get(key) == Some(value))
}

/// Selector, namespace, mesh: the oldest of each level, and UNSET inherits (policy F-1).
fn by_peer_authentication(place: &Place<'_>, book: &Book<'_>, notes: &mut Notes) -> Option<Transport> {
    let own = &*place.workload.name.namespace;
    let root = book.mesh.root_namespace.as_str();
    let all = &book.peer_authentications;
    let selected = |candidate: &&Candidate<'_, &PeerAuthentication>| {
        book.is_in_scope(&candidate.name.namespace, own)
            && match candidate.body {
                Ok(body) => !body.selector.is_empty() && selects(&body.selector, place.workload),
                Err(Reach::Selected(selector)) => selects(selector, place.workload),
                Err(Reach::Unreadable) => true,
                Err(Reach::Scope | Reach::Targets(_) | Reach::Nobody) => false,
            }
    };
    let covers = |namespace: &str, candidate: &Candidate<'_, &PeerAuthentication>| {
        &*candidate.name.namespace == namespace
            && match candidate.body {
                Ok(body) => body.selector.is_empty(),
                Err(reach) => *reach == Reach::Scope,
            }
    };
    oldest(all.iter().filter(selected), notes)
        .and_then(|candidate| level(candidate, place))
        .or_else(|| {
            oldest(all.iter().filter(|c| covers(own, c)), notes).and_then(|candidate| level(candidate, place))
        })
        .or_else(|| {
            oldest(all.iter().filter(|c| covers(root, c)), notes)
                .and_then(|candidate| level(candidate, place))
        })
}

/// `None`: UNSET.
fn level(candidate: &Candidate<'_, &PeerAuthentication>, place: &Place<'_>) -> Option<Transport> {
    let policy = Some(candidate.label.clone());
    let Ok(body) = candidate.body else {
        return Some(Transport { mode: TransportMode::Strict, policy, is_unusable: true });
    };
    let by_port = place.port.and_then(|port| body.ports.get(&port).copied().flatten());
    let mode = by_port.or(body.mode)?;
    Some(Transport { mode, policy, is_unusable: false })
}

/// The first of the sorted candidates; the others learn that they have no effect (policy G-16).
fn oldest<'b, 'a: 'b, T: 'b>(
    mut candidates: impl Iterator<Item = &'b Candidate<'a, T>>,
    notes: &mut Notes,
) -> Option<&'b Candidate<'a, T>> {
    let first = candidates.next()?;
    for younger in candidates {
        let sentence = format!("where {} applies too, that one is older and alone has effect", first.label);
        notes.problem(younger.label, "metadata.creationTimestamp", sentence);
    }
    Some(first)
}

/// Exactly one policy, without merging (policy A-4). Where several ports of the service lead to one port of the
/// workload, the strictest answer.
fn by_policies<'a>(place: &Place<'_>, book: &Book<'a>, notes: &mut Notes) -> (Transport, Vec<Applied<'a>>) {
    let mut strictest: Option<Transport> = None;
    let mut policies: Vec<Applied<'a>> = Vec::new();
    let owner_ports = place.owner.map_or(&[][..], |owner| &owner.ports);
    for port in owner_ports.iter().copied().map(Some).chain(owner_ports.is_empty().then_some(None)) {
        let (transport, policy) = by_policy(place, port, book, notes);
        policies.extend(policy.filter(|(label, _)| policies.iter().all(|(known, _)| known != label)));
        if strictest.as_ref().is_none_or(|known| strictness(&transport) > strictness(known)) {
            strictest = Some(transport);
        }
    }
    (strictest.unwrap_or_else(|| nothing(book)), policies)
}

/// No policy at all.
fn nothing(book: &Book<'_>) -> Transport {
    Transport { mode: book.mesh.default_mode, policy: None, is_unusable: false }
}

fn strictness(transport: &Transport) -> (bool, u8) {
    (transport.is_unusable, strictness_of(transport.mode))
}

pub(super) const fn strictness_of(mode: TransportMode) -> u8 {
    match mode {
        TransportMode::Strict => 2,
        TransportMode::Permissive => 1,
        TransportMode::Disabled => 0,
    }
}

fn by_policy<'a>(
    place: &Place<'_>,
    port: Option<&ServicePort>,
    book: &Book<'a>,
    notes: &mut Notes,
) -> (Transport, Option<Applied<'a>>) {
    let own = &*place.workload.name.namespace;
    let service = place.owner.map(|owner| &*owner.service.name.name);
    let mut here = book.policies.iter().filter(|candidate| &*candidate.name.namespace == own).peekable();
    let is_closer = |candidate: &&Candidate<'_, &Policy>| {
        let targets = |targets: &[Target]| {
            service.zip(port).is_some_and(|(service, port)| targets.iter().any(|t| t.includes(service, port)))
        };
        match candidate.body {
            Ok(policy) => targets(&policy.targets),
            Err(Reach::Targets(list)) => targets(list),
            Err(Reach::Unreadable) => true,
            Err(Reach::Scope | Reach::Selected(_) | Reach::Nobody) => false,
        }
    };
    let is_scope_wide = |candidate: &&Candidate<'_, &Policy>| match candidate.body {
        Ok(policy) => policy.targets.is_empty(),
        Err(reach) => *reach == Reach::Scope,
    };
    if here.peek().is_some() {
        let closer = oldest(here.clone().filter(is_closer), notes)
            .or_else(|| default_first(here.filter(is_scope_wide)));
        if let Some(candidate) = closer {
            return applied(candidate, place, notes);
        }
    }
    match default_first(book.mesh_policies.iter()) {
        Some(candidate) => applied(candidate, place, notes),
        None => (nothing(book), None),
    }
}

/// The one named `default`; else a misnamed one, which is unusable (policy A-3).
fn default_first<'b, 'a: 'b, T: 'b>(
    candidates: impl Iterator<Item = &'b Candidate<'a, T>>,
) -> Option<&'b Candidate<'a, T>> {
    candidates.min_by_key(|candidate| &*candidate.name.name != DEFAULT_NAME)
}

fn applied<'a>(
    candidate: &Candidate<'a, &'a Policy>,
    place: &Place<'_>,
    notes: &mut Notes,
) -> (Transport, Option<Applied<'a>>) {
    let label = Some(candidate.label.clone());
    let Ok(policy) = candidate.body else {
        return (Transport { mode: TransportMode::Strict, policy: label, is_unusable: true }, None);
    };
    if place.protocol == Protocol::Tcp && matches!(policy.tokens, Tokens::Required | Tokens::Impossible) {
        // policy A-7
        let port = place.port.map_or_else(|| "its other ports".to_owned(), |port| format!("port {port}"));
        let sentence = format!("no effect on {port} of {}, which carries TCP, not HTTP", place.workload.name);
        notes.problem(candidate.label, "spec.origins", sentence);
    }
    let transport = Transport { mode: policy.mode, policy: label, is_unusable: false };
    (transport, Some((candidate.label, policy)))
}

impl Target {
    pub(super) fn includes(&self, service: &str, port: &ServicePort) -> bool {
        let is_port = |selector: &PortSelector| match selector {
            PortSelector::Number(number) => *number == port.port,
            PortSelector::Name(name) => port.name.as_ref() == Some(name),
        };
        self.service == service && (self.ports.is_empty() || self.ports.iter().any(is_port))
    }
}
