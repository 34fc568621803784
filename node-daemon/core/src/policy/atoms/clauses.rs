//! The rules of a port as lists of conditions, and which of them may still count once some attributes are known.

use super::{
    super::{
        matching::Pattern,
        rules::{Authorisation, Condition, Doubt, Grant, NamedRules, PortRules, Rule, Values},
        seen::{Asked, is_reserved},
    },
    Attribute,
};

/// All groups must be met, each by one of its lists, and a list by all its conditions.
pub(super) struct Clause<'r> {
    doubt: Doubt,
    groups: Vec<Vec<&'r [Condition]>>,
}

/// The clauses of one or two sets of rules.
pub(super) fn clauses<'r>(rules: &[&'r PortRules]) -> Vec<Clause<'r>> {
    rules.iter().flat_map(|rules| of_authorisation(&rules.authorisation)).collect()
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

impl<'r> Clause<'r> {
    pub(super) fn conditions(&self) -> impl Iterator<Item = (&'r Condition, Doubt)> {
        let doubt = self.doubt;
        self.groups.iter().flatten().flat_map(|list| list.iter()).map(move |condition| (condition, doubt))
    }
}

/// Which lists of which clauses can still be met.
#[derive(Clone)]
pub(super) struct Live {
    /// By clause, group and list; an empty clause is one that cannot be met.
    lists: Vec<Vec<Vec<bool>>>,
}

impl Live {
    pub(super) fn all(clauses: &[Clause<'_>]) -> Self {
        let groups =
            |clause: &Clause<'_>| clause.groups.iter().map(|lists| vec![true; lists.len()]).collect();
        Self { lists: clauses.iter().map(groups).collect() }
    }

    /// Asks every condition on `attribute` that may still count, and gives the answers and what is left.
    pub(super) fn ask(
        &self,
        clauses: &[Clause<'_>],
        attribute: &Attribute,
        holds: &dyn Fn(&Condition, Doubt) -> bool,
    ) -> (Vec<bool>, Self) {
        let (mut answers, mut left) = (Vec::new(), self.clone());
        for (clause, groups) in clauses.iter().zip(&mut left.lists) {
            for (lists, lives) in clause.groups.iter().zip(groups.iter_mut()) {
                for (conditions, is_live) in lists.iter().zip(lives.iter_mut()).filter(|(_, live)| **live) {
                    for condition in *conditions {
                        let asked = attributes(condition.values());
                        if !asked.contains(attribute) {
                            continue;
                        }
                        let answer = holds(condition, clause.doubt);
                        answers.push(answer);
                        // What hangs on several attributes is settled by the last of them, and a principal that may be
                        // the peer's or the token's by none.
                        let is_open = matches!(condition.values(), Values::Request(Asked::Principal, _));
                        *is_live &= answer || is_open || asked.last() != Some(attribute);
                    }
                }
            }
            if groups.iter().any(|lives| !lives.iter().any(|live| *live)) {
                groups.clear();
            }
        }
        (answers, left)
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
