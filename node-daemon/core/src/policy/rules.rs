//! The compiled form that both ages share: conditions on one connection, and lists of them.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use spiffe_id::SpiffeId;

use super::{
    matching::{Account, Glob, Pattern, Text, TrustDomains},
    reader::Usable,
};
use crate::workload::{ObjectName, TransportMode};

/// What rules may look at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen<'a> {
    /// `None` where nothing was proven, or where the mode hides it (policy B-9).
    pub(super) identity: Option<&'a SpiffeId>,
    pub(super) source_address: IpAddr,
    pub(super) destination_address: IpAddr,
    pub(super) destination_port: u16,
    pub(super) server_name: Option<&'a str>,
}

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

    pub(super) fn undecidable() -> Self {
        Self { values: Values::Undecidable, is_negated: false, has_unusable: true }
    }

    pub(super) fn holds(&self, seen: &Seen<'_>, doubt: Doubt) -> bool {
        if self.has_unusable && doubt == Doubt::Met {
            return true;
        }
        let is_among = self.values.include(seen);
        if self.is_negated { !is_among && !self.has_unusable } else { is_among }
    }

    /// Whether it could never be met, whoever comes.
    pub(super) fn is_hopeless(&self) -> bool {
        self.has_unusable && (self.is_negated || self.values.are_none())
    }

    /// With the identities of the mesh's other trust domains added (policy B-13).
    pub(super) fn in_mesh(&self, trusted: &TrustDomains) -> Self {
        let values = match &self.values {
            Values::Principals(patterns) => Values::Principals(
                patterns.iter().flat_map(|pattern| pattern.in_trust_domains(trusted)).collect(),
            ),
            other @ (Values::NamespaceGlobs(_)
            | Values::Namespaces(_)
            | Values::ServiceAccounts(_)
            | Values::TrustDomains(_)
            | Values::SourceAddresses(_)
            | Values::DestinationAddresses(_)
            | Values::DestinationPorts(_)
            | Values::ServerNames(_)
            | Values::Undecidable) => other.clone(),
        };
        Self { values, ..*self }
    }
}

impl Values {
    fn include(&self, seen: &Seen<'_>) -> bool {
        let identity = seen.identity;
        let any = |patterns: &[Pattern], text: Option<Text<'_>>| patterns.iter().any(|p| p.matches(text));
        let contain = |networks: &[IpNet], address: IpAddr| networks.iter().any(|n| n.contains(&address));
        match self {
            Self::Principals(patterns) => any(patterns, identity.map(Text::principal)),
            Self::NamespaceGlobs(globs) => {
                identity.is_some_and(|id| globs.iter().any(|glob| glob.matches(id.namespace())))
            }
            Self::Namespaces(patterns) => any(patterns, identity.map(|id| Text::plain(id.namespace()))),
            Self::ServiceAccounts(accounts) => {
                identity.is_some_and(|id| accounts.iter().any(|account| account.matches(id)))
            }
            Self::TrustDomains(patterns) => {
                any(patterns, identity.map(|id| Text::plain(id.trust_domain().as_str())))
            }
            Self::SourceAddresses(networks) => contain(networks, seen.source_address),
            Self::DestinationAddresses(networks) => contain(networks, seen.destination_address),
            Self::DestinationPorts(ports) => ports.contains(&seen.destination_port),
            Self::ServerNames(patterns) => any(patterns, seen.server_name.map(Text::plain)),
            Self::Undecidable => false,
        }
    }

    fn are_none(&self) -> bool {
        match self {
            Self::Principals(patterns)
            | Self::Namespaces(patterns)
            | Self::TrustDomains(patterns)
            | Self::ServerNames(patterns) => patterns.is_empty(),
            Self::NamespaceGlobs(globs) => globs.is_empty(),
            Self::ServiceAccounts(accounts) => accounts.is_empty(),
            Self::SourceAddresses(networks) | Self::DestinationAddresses(networks) => networks.is_empty(),
            Self::DestinationPorts(ports) => ports.is_empty(),
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
}

impl Rule {
    pub(super) fn matches(&self, seen: &Seen<'_>, doubt: Doubt) -> bool {
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
pub(super) struct PortRules {
    pub(super) service: Option<ObjectName>,
    pub(super) transport: Transport,
    pub(super) authorisation: Authorisation,
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
pub(super) enum Authorisation {
    /// Nothing is in force (policy B-1, F-3).
    Open,
    /// The named object cannot be read, and it might deny (policy A-3, G-23).
    Unusable(Arc<str>),
    /// 2018: only grants (policy B-1).
    Roles { switch: Arc<str>, is_permissive: bool, grants: Vec<Grant> },
    /// Current: denials first, then grants if there are any (policy F-3).
    Policies { denials: Vec<NamedRules>, grants: Option<Vec<NamedRules>> },
}
