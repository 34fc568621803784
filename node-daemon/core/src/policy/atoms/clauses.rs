//! The rules of a port as lists of conditions, and which of them may still count once some attributes are known.

use std::{collections::BTreeMap, ops::Range};

use super::{
    super::{
        matching::Pattern,
        rules::{Authorisation, Condition, Doubt, Grant, NamedRules, PortRules, Rule, Values},
        seen::{Asked, is_reserved},
    },
    Attribute,
};

/// All groups must be met, each by one of its lists, and a list by all its conditions.
struct Clause<'r> {
    doubt: Doubt,
    groups: Vec<Vec<&'r [Condition]>>,
}

/// The clauses of one or two sets of rules, ready to be asked by attribute.
pub(super) struct Clauses<'r> {
    probes: BTreeMap<Attribute, Vec<Probe<'r>>>,
    /// By clause and group: the numbers of the lists.
    groups: Vec<Vec<Range<usize>>>,
    lists: usize,
}

/// One condition on one attribute.
struct Probe<'r> {
    condition: &'r Condition,
    doubt: Doubt,
    clause: usize,
    list: usize,
    /// Whether a no ends its list: nothing else can make it a yes.
    settles: bool,
}

impl<'r> Clauses<'r> {
    pub(super) fn new(rules: &[&'r PortRules]) -> Self {
        let mut all = Self { probes: BTreeMap::new(), groups: Vec::new(), lists: 0 };
        for clause in rules.iter().flat_map(|rules| of_authorisation(&rules.authorisation)) {
            all.add(&clause);
        }
        all
    }

    fn add(&mut self, clause: &Clause<'r>) {
        let mut groups = Vec::new();
        for lists in &clause.groups {
            let first = self.lists;
            for conditions in lists {
                for condition in *conditions {
                    self.add_condition(condition, clause.doubt);
                }
                self.lists += 1;
            }
            groups.push(first..self.lists);
        }
        self.groups.push(groups);
    }

    fn add_condition(&mut self, condition: &'r Condition, doubt: Doubt) {
        let asked = attributes(condition.values());
        // What hangs on several attributes is settled by the last of them, and a principal that may be the peer's or the
        // token's by none.
        let is_open = matches!(condition.values(), Values::Request(Asked::Principal, _));
        let last = asked.last().cloned();
        for attribute in asked {
            let settles = !is_open && last.as_ref() == Some(&attribute);
            let probe = Probe { condition, doubt, clause: self.groups.len(), list: self.lists, settles };
            self.probes.entry(attribute).or_default().push(probe);
        }
    }

    pub(super) fn conditions(&self) -> impl Iterator<Item = &'r Condition> {
        self.probes.values().flatten().map(|probe| probe.condition)
    }
}

fn of_authorisation(authorisation: &Authorisation) -> Vec<Clause<'_>> {
    match authorisation {
        Authorisation::Open | Authorisation::Unusable(_) => Vec::new(),
        Authorisation::Roles { grants, .. } => grants.iter().map(of_grant).collect(),
        Authorisation::Policies { denials, grants } => {
            let denials = denials.iter().flat_map(|named| of_rules(named, Doubt::Met));
            let grants = grants.iter().flatten().flat_map(|named| of_rules(named, Doubt::NotMet));
            denials.chain(grants).collect()
        }
    }
}

fn of_grant(grant: &Grant) -> Clause<'_> {
    let subjects = grant.holders.iter().flat_map(|holder| holder.subjects.iter().map(Vec::as_slice));
    Clause { doubt: Doubt::NotMet, groups: vec![vec![&*grant.conditions], subjects.collect()] }
}

fn of_rules(named: &NamedRules, doubt: Doubt) -> impl Iterator<Item = Clause<'_>> {
    named.rules.iter().map(move |rule| of_rule(rule, doubt))
}

fn of_rule(rule: &Rule, doubt: Doubt) -> Clause<'_> {
    let mut groups = vec![vec![rule.when.as_slice()]];
    for alternatives in [&rule.from, &rule.to] {
        if !alternatives.is_empty() {
            groups.push(alternatives.iter().map(Vec::as_slice).collect());
        }
    }
    Clause { doubt, groups }
}

/// Which lists can still be met.
#[derive(Clone)]
pub(super) struct Live(Vec<bool>);

/// Lists that a value ended, with their clauses.
pub(super) type Ended = Vec<(usize, usize)>;

impl Live {
    pub(super) fn all(clauses: &Clauses<'_>) -> Self {
        Self(vec![true; clauses.lists])
    }

    /// Asks every condition on `attribute` that may still count.
    pub(super) fn ask(
        &self,
        clauses: &Clauses<'_>,
        attribute: &Attribute,
        holds: &dyn Fn(&Condition, Doubt) -> bool,
    ) -> (Vec<bool>, Ended) {
        let (mut answers, mut ended) = (Vec::new(), Vec::new());
        let probes = clauses.probes.get(attribute).into_iter().flatten();
        for probe in probes.filter(|probe| self.0[probe.list]) {
            let answer = holds(probe.condition, probe.doubt);
            answers.push(answer);
            if !answer && probe.settles {
                ended.push((probe.clause, probe.list));
            }
        }
        (answers, ended)
    }

    /// Without the lists that ended, and without clauses of which a group has none left.
    pub(super) fn without(&self, clauses: &Clauses<'_>, ended: &Ended) -> Self {
        let mut left = self.clone();
        for (_, list) in ended {
            left.0[*list] = false;
        }
        for (clause, _) in ended {
            let groups = &clauses.groups[*clause];
            if groups.iter().any(|lists| !left.0[lists.clone()].contains(&true)) {
                groups.iter().for_each(|lists| left.0[lists.clone()].fill(false));
            }
        }
        left
    }
}

/// The attributes on which a comparison hangs; none: nothing that a connection or request can vary.
pub(super) fn attributes(values: &Values) -> Vec<Attribute> {
    match values {
        Values::Principals(_)
        | Values::NamespaceGlobs(_)
        | Values::Namespaces(_)
        | Values::ServiceAccounts(_)
        | Values::TrustDomains(_)
        | Values::Request(Asked::User, _) => vec![Attribute::Peer],
        Values::SourceAddresses(_) => vec![Attribute::Source],
        Values::DestinationAddresses(_) => vec![Attribute::Destination],
        Values::ServerNames(_) => vec![Attribute::ServerName],
        Values::Request(Asked::Method, _) => vec![Attribute::Method],
        Values::Request(Asked::Host, _) => vec![Attribute::Host],
        Values::Request(Asked::Header(name), _) => match &**name {
            ":method" => vec![Attribute::Method],
            ":path" => vec![Attribute::Path],
            ":authority" | "host" => vec![Attribute::Host],
            name if is_reserved(name) => Vec::new(),
            name => vec![Attribute::Header(name.into())],
        },
        Values::Paths(_) => vec![Attribute::Path],
        Values::TokenPrincipals(_) => vec![Attribute::Token, Attribute::Subject],
        Values::Request(Asked::Principal, _) => vec![Attribute::Peer, Attribute::Token, Attribute::Subject],
        Values::Request(Asked::Audience, _) => vec![Attribute::Token, Attribute::Audience],
        Values::Request(Asked::Presenter, _) => vec![Attribute::Token, Attribute::Presenter],
        Values::Request(Asked::Claim(path), _) => {
            match path.iter().map(|name| &**name).collect::<Vec<_>>()[..] {
                ["iss"] => vec![Attribute::Token],
                ["sub"] => vec![Attribute::Token, Attribute::Subject],
                ["aud"] => vec![Attribute::Token, Attribute::Audience],
                ["azp"] => vec![Attribute::Token, Attribute::Presenter],
                _ => vec![Attribute::Token, Attribute::Claim(path.clone())],
            }
        }
        // The port is one of the places for which rules are compiled; filters' metadata does not exist here.
        Values::DestinationPorts(_) | Values::Metadata { .. } | Values::Undecidable => Vec::new(),
    }
}

/// The patterns of a comparison by texts.
pub(super) fn patterns(values: &Values) -> &[Pattern] {
    match values {
        Values::Principals(patterns)
        | Values::Namespaces(patterns)
        | Values::TrustDomains(patterns)
        | Values::ServerNames(patterns)
        | Values::Request(_, patterns) => patterns,
        Values::NamespaceGlobs(_)
        | Values::ServiceAccounts(_)
        | Values::SourceAddresses(_)
        | Values::DestinationAddresses(_)
        | Values::DestinationPorts(_)
        | Values::Metadata { .. }
        | Values::Paths(_)
        | Values::TokenPrincipals(_)
        | Values::Undecidable => &[],
    }
}
