//! The compiled form that both ages share: conditions on one connection, and lists of them.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use serde_json::Value;

use super::{
    authentication::Authentication,
    matching::{Account, Glob, Pattern, Text, TokenPrincipal, TrustDomains},
    paths::PathPattern,
    reader::Usable,
    seen::{Asked, Peer, Seen, SeenRequest},
};
use crate::workload::{ObjectName, Protocol, TransportMode};

/// How a condition counts that holds a value nobody can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    /// It grants: never met (policy G-3, G-5).
    NotMet,
    /// It denies: met (policy G-23).
    Met,
}

/// One attribute compared with written values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    values: Values,
    is_negated: bool,
    has_unusable: bool,
}

/// The attribute, and what it is compared with. Any one value suffices (policy B-4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Values {
    Principals(Vec<Pattern>),
    /// A star anywhere is any text: the 2018 form (policy B-7).
    NamespaceGlobs(Vec<Glob>),
    Namespaces(Vec<Pattern>),
    ServiceAccounts(Vec<Account>),
    TrustDomains(Vec<Pattern>),
    SourceAddresses(Vec<IpNet>),
    DestinationAddresses(Vec<IpNet>),
    DestinationPorts(Vec<u16>),
    ServerNames(Vec<Pattern>),
    /// What a filter of the protocol told, on either layer (policy B-6).
    Metadata {
        filter: Box<str>,
        key: Box<str>,
        values: Vec<MetadataPattern>,
    },
    /// Only a request can answer.
    Request(Asked, Vec<Pattern>),
    /// Only a request can answer.
    Paths(Vec<PathPattern>),
    /// Only a request can answer: `requestPrincipals` (policy F-3).
    TokenPrincipals(Vec<TokenPrincipal>),
    /// Nobody can tell: an unknown key, or an attribute that this version does not see.
    Undecidable,
}

impl Condition {
    pub(super) fn new<T>(read: Usable<T>, values: impl FnOnce(Vec<T>) -> Values) -> Self {
        Self { values: values(read.values), is_negated: false, has_unusable: read.has_unusable }
    }

    pub(super) fn not<T>(read: Usable<T>, values: impl FnOnce(Vec<T>) -> Values) -> Self {
        Self { is_negated: true, ..Self::new(read, values) }
    }

    pub(super) fn either<T>(
        is_negated: bool,
        read: Usable<T>,
        values: impl FnOnce(Vec<T>) -> Values,
    ) -> Self {
        Self { is_negated, ..Self::new(read, values) }
    }

    pub(super) fn undecidable() -> Self {
        Self { values: Values::Undecidable, is_negated: false, has_unusable: true }
    }

    pub(super) fn holds(&self, seen: &Seen<'_>, doubt: Doubt) -> bool {
        if !self.values.can_be_told(seen) {
            return doubt == Doubt::Met; // policy B-10, F-3
        }
        if self.has_unusable && doubt == Doubt::Met {
            return true;
        }
        let eager = (doubt == Doubt::Met) != self.is_negated;
        let is_among = self.values.include(seen, eager);
        if self.is_negated { !is_among && !self.has_unusable } else { is_among }
    }

    /// Whether only a request can answer.
    pub(super) fn asks_requests(&self) -> bool {
        matches!(self.values, Values::Request(..) | Values::Paths(_) | Values::TokenPrincipals(_))
    }

    pub(super) fn values(&self) -> &Values {
        &self.values
    }

    pub(super) fn is_negated(&self) -> bool {
        self.is_negated
    }

    pub(super) fn has_unusable(&self) -> bool {
        self.has_unusable
    }

    /// Whether it could never be met, whoever comes.
    pub(super) fn is_hopeless(&self) -> bool {
        self.has_unusable && (self.is_negated || self.values.are_none())
    }

    /// With the identities of the mesh's other trust domains added (policy B-13).
    pub(super) fn in_mesh(&self, trusted: &TrustDomains) -> Self {
        let values = match &self.values {
            Values::Principals(patterns) => Values::Principals(in_trust_domains(patterns, trusted)),
            Values::Request(Asked::User, patterns) => {
                Values::Request(Asked::User, in_trust_domains(patterns, trusted))
            }
            other @ (Values::NamespaceGlobs(_)
            | Values::Namespaces(_)
            | Values::ServiceAccounts(_)
            | Values::TrustDomains(_)
            | Values::SourceAddresses(_)
            | Values::DestinationAddresses(_)
            | Values::DestinationPorts(_)
            | Values::ServerNames(_)
            | Values::Metadata { .. }
            | Values::Request(..)
            | Values::Paths(_)
            | Values::TokenPrincipals(_)
            | Values::Undecidable) => other.clone(),
        };
        Self { values, ..*self }
    }
}

fn in_trust_domains(patterns: &[Pattern], trusted: &TrustDomains) -> Vec<Pattern> {
    patterns.iter().flat_map(|pattern| pattern.in_trust_domains(trusted)).collect()
}

/// `[v]`: a list that holds v. `v`: a text (policy B-6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum MetadataPattern {
    Element(Pattern),
    Whole(Pattern),
}

impl std::fmt::Display for MetadataPattern {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Element(pattern) => write!(formatter, "[{pattern}]"),
            Self::Whole(pattern) => pattern.fmt(formatter),
        }
    }
}

impl MetadataPattern {
    pub(super) fn new(written: &str) -> Self {
        let inner = written.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        inner.map_or_else(
            || Self::Whole(Pattern::of_2018(written)),
            |text| Self::Element(Pattern::of_2018(text)),
        )
    }

    fn matches(&self, value: Option<&Value>) -> bool {
        let fits = |pattern: &Pattern, value: &Value| pattern.matches(value.as_str().map(Text::plain));
        match (self, value) {
            (Self::Element(pattern), Some(Value::Array(list))) => {
                list.iter().any(|value| fits(pattern, value))
            }
            (Self::Whole(pattern), Some(value)) => fits(pattern, value),
            (Self::Element(_), Some(_)) | (_, None) => false,
        }
    }
}

impl Values {
    /// Whether what is seen can answer at all.
    fn can_be_told(&self, seen: &Seen<'_>) -> bool {
        match self {
            Self::Request(..) | Self::Paths(_) | Self::TokenPrincipals(_) => seen.request.is_some(),
            Self::Metadata { .. } => seen.metadata.is_some(),
            Self::Undecidable => false,
            Self::SourceAddresses(_)
            | Self::DestinationAddresses(_)
            | Self::Principals(_)
            | Self::NamespaceGlobs(_)
            | Self::Namespaces(_)
            | Self::ServiceAccounts(_)
            | Self::TrustDomains(_)
            | Self::DestinationPorts(_)
            | Self::ServerNames(_) => true,
        }
    }

    fn include(&self, seen: &Seen<'_>, eager: bool) -> bool {
        let peer = seen.peer;
        let any = |patterns: &[Pattern], text: Option<Text<'_>>| patterns.iter().any(|p| p.matches(text));
        let of_peer = |patterns: &[Pattern], piece: fn(Peer<'_>) -> &str| {
            peer.is_some_and(|peer| any(patterns, Some(Text::plain(piece(peer)))))
        };
        let contain = |networks: &[IpNet], address: IpAddr| networks.iter().any(|n| n.contains(&address));
        let in_request = |ask: &dyn Fn(&SeenRequest<'_>) -> bool| seen.request.is_some_and(ask);
        match self {
            Self::Principals(patterns) => any(patterns, peer.map(|peer| peer.principal)),
            Self::NamespaceGlobs(globs) => {
                peer.is_some_and(|peer| globs.iter().any(|glob| glob.matches(peer.namespace)))
            }
            Self::Namespaces(patterns) => of_peer(patterns, |peer| peer.namespace),
            Self::ServiceAccounts(accounts) => peer.is_some_and(|peer| {
                accounts.iter().any(|account| account.matches(peer.namespace, peer.service_account))
            }),
            Self::TrustDomains(patterns) => of_peer(patterns, |peer| peer.trust_domain),
            Self::SourceAddresses(networks) => contain(networks, seen.source_address),
            Self::DestinationAddresses(networks) => contain(networks, seen.destination_address),
            Self::DestinationPorts(ports) => ports.contains(&seen.destination_port),
            Self::ServerNames(patterns) => any(patterns, seen.server_name.map(Text::plain)),
            Self::Metadata { filter, key, values } => {
                let told = seen.metadata.and_then(|metadata| metadata.get(&**filter)?.get(&**key));
                values.iter().any(|value| value.matches(told))
            }
            Self::Request(asked, patterns) => {
                in_request(&|request| asked.matches(patterns, seen, request, eager))
            }
            Self::Paths(paths) => in_request(&|request| paths.iter().any(|path| path.matches(request.path))),
            Self::TokenPrincipals(principals) => in_request(&|request| {
                let named = request.token.and_then(|token| token.issuer_and_subject);
                named.is_some_and(|(issuer, subject)| principals.iter().any(|p| p.matches(issuer, subject)))
            }),
            Self::Undecidable => false,
        }
    }

    fn are_none(&self) -> bool {
        match self {
            Self::Principals(patterns)
            | Self::Namespaces(patterns)
            | Self::TrustDomains(patterns)
            | Self::ServerNames(patterns)
            | Self::Request(_, patterns) => patterns.is_empty(),
            Self::NamespaceGlobs(globs) => globs.is_empty(),
            Self::ServiceAccounts(accounts) => accounts.is_empty(),
            Self::SourceAddresses(networks) | Self::DestinationAddresses(networks) => networks.is_empty(),
            Self::DestinationPorts(ports) => ports.is_empty(),
            Self::Metadata { values, .. } => values.is_empty(),
            Self::Paths(paths) => paths.is_empty(),
            Self::TokenPrincipals(principals) => principals.is_empty(),
            Self::Undecidable => true,
        }
    }
}

/// All of them must hold.
pub(super) fn all_hold(conditions: &[Condition], seen: &Seen<'_>, doubt: Doubt) -> bool {
    conditions.iter().all(|condition| condition.holds(seen, doubt))
}

/// A rule of the current API: one of `from`, one of `to`, all of `when` (policy F-3). An empty list is no demand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    /// `rules[0]`
    pub(super) label: Arc<str>,
    pub(super) from: Vec<Vec<Condition>>,
    pub(super) to: Vec<Vec<Condition>>,
    pub(super) when: Vec<Condition>,
    /// Whether any condition is one that only a request can answer.
    pub(super) asks_requests: bool,
}

impl Rule {
    pub(super) fn matches(&self, seen: &Seen<'_>, doubt: Doubt) -> bool {
        if self.asks_requests && seen.request.is_none() && doubt == Doubt::NotMet {
            return false; // policy F-3: as a whole, whatever its other alternatives say
        }
        let one_of = |lists: &[Vec<Condition>]| {
            lists.is_empty() || lists.iter().any(|conditions| all_hold(conditions, seen, doubt))
        };
        one_of(&self.from) && one_of(&self.to) && all_hold(&self.when, seen, doubt)
    }

    pub(super) fn in_mesh(&self, trusted: &TrustDomains) -> Self {
        let each = |conditions: &Vec<Condition>| conditions.iter().map(|c| c.in_mesh(trusted)).collect();
        Self {
            label: self.label.clone(),
            from: self.from.iter().map(each).collect(),
            to: self.to.iter().map(each).collect(),
            when: each(&self.when),
            asks_requests: self.asks_requests,
        }
    }
}

/// The rules of one object of the current API.
#[derive(Clone, Debug)]
pub(super) struct NamedRules {
    /// `AuthorizationPolicy/namespace/name`
    pub(super) policy: Arc<str>,
    pub(super) rules: Arc<[Rule]>,
}

/// One rule of a `ServiceRole` that applies to the port, and who may use it (policy B-4).
#[derive(Clone, Debug)]
pub(super) struct Grant {
    /// `ServiceRole/namespace/name`
    pub(super) role: Arc<str>,
    /// Which of its rules.
    pub(super) index: usize,
    pub(super) conditions: Arc<[Condition]>,
    pub(super) holders: Arc<[Holder]>,
}

/// One binding of the role.
#[derive(Clone, Debug)]
pub(super) struct Holder {
    /// `rules[0] via ServiceRoleBinding/namespace/name`
    pub(super) label: Arc<str>,
    pub(super) subjects: Arc<[Vec<Condition>]>,
}

/// All that decides about connections to one port of one workload.
#[derive(Clone, Debug)]
pub(crate) struct PortRules {
    pub(super) service: Option<ObjectName>,
    pub(super) protocol: Protocol,
    pub(super) transport: Transport,
    pub(super) authentication: Authentication,
    pub(super) authorisation: Authorisation,
    /// What would decide if everything were enforced that is only tried; `None`: nothing is (policy B-11, F-3).
    pub(super) shadow: Option<Authorisation>,
    /// They record and decide nothing (policy F-3).
    pub(super) audits: Vec<NamedRules>,
    /// Whether a request may be judged otherwise than its connection.
    pub(super) needs_requests: bool,
}

/// What the port demands of the connection itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Transport {
    pub(super) mode: TransportMode,
    /// The object that says so; `None`: nothing applies, the mesh's default is in force.
    pub(super) policy: Option<Arc<str>>,
    /// What the object asks cannot be checked or read: nobody gets in (policy A-3).
    pub(super) is_unusable: bool,
}

/// Who may use the port.
#[derive(Clone, Debug)]
pub(crate) enum Authorisation {
    /// Nothing is in force (policy B-1, F-3).
    Open,
    /// The named object cannot be read, and it might deny (policy A-3, G-23).
    Unusable(Arc<str>),
    /// 2018: only grants (policy B-1).
    Roles { switch: Arc<str>, is_permissive: bool, grants: Vec<Grant> },
    /// Current: denials first, then grants if there are any (policy F-3).
    Policies { denials: Vec<NamedRules>, grants: Option<Vec<NamedRules>> },
}

impl Authorisation {
    /// Whether some rule asks what only a request can answer.
    pub(super) fn asks_requests(&self) -> bool {
        let in_rules = |named: &[NamedRules]| named.iter().any(NamedRules::asks_requests);
        match self {
            Self::Open | Self::Unusable(_) => false,
            Self::Roles { grants, .. } => grants.iter().any(Grant::asks_requests),
            Self::Policies { denials, grants } => {
                in_rules(denials) || grants.as_deref().is_some_and(in_rules)
            }
        }
    }
}

impl NamedRules {
    pub(super) fn asks_requests(&self) -> bool {
        self.rules.iter().any(|rule| rule.asks_requests)
    }
}

impl Grant {
    /// Whether a request can be granted something by it that its connection is not.
    fn asks_requests(&self) -> bool {
        let ask = |conditions: &[Condition]| conditions.iter().any(Condition::asks_requests);
        let held = self.holders.iter().any(|holder| !holder.subjects.is_empty());
        let by_subject = || self.holders.iter().flat_map(|holder| holder.subjects.iter()).any(|c| ask(c));
        held && (ask(&self.conditions) || by_subject())
    }
}
