//! What the rules of a workload look at, so that whoever asks for all of its answers asks as often as needed and no more.

use std::collections::BTreeSet;

use super::{
    compile::{Compiled, DestinationRules},
    rules::{Authorisation, Condition, NamedRules, PortRules, Rule, Values},
};
use crate::workload::ObjectName;

impl Compiled {
    /// The ports of a local workload at which the answer may be another than at all those that are not among them.
    pub(crate) fn ports_told_apart(&self, workload: &ObjectName) -> BTreeSet<u16> {
        let Some(destination) = self.destinations.get(workload) else { return BTreeSet::new() };
        let mut ports: BTreeSet<u16> = destination.named.keys().copied().collect();
        for condition in conditions(&destination.other.authorisation) {
            if let Values::DestinationPorts(written) = condition.values() {
                ports.extend(written);
            }
        }
        ports
    }

    /// Whether the client's address can change an answer of a local workload, beside its identity.
    pub(crate) fn looks_at_source_addresses(&self, workload: &ObjectName) -> bool {
        let looks = |condition: &Condition| matches!(condition.values(), Values::SourceAddresses(_));
        self.destinations.get(workload).is_some_and(|destination| {
            destination.all().any(|port| conditions(&port.authorisation).any(looks))
        })
    }
}

impl DestinationRules {
    fn all(&self) -> impl Iterator<Item = &PortRules> {
        self.named.values().chain([&self.other])
    }
}

/// All conditions that may decide. Those that are only tried, or record, change no answer.
fn conditions(authorisation: &Authorisation) -> Box<dyn Iterator<Item = &Condition> + '_> {
    match authorisation {
        Authorisation::Open | Authorisation::Unusable(_) => Box::new(std::iter::empty()),
        Authorisation::Roles { grants, .. } => Box::new(grants.iter().flat_map(|grant| {
            let subjects = grant.holders.iter().flat_map(|holder| holder.subjects.iter().flatten());
            grant.conditions.iter().chain(subjects)
        })),
        Authorisation::Policies { denials, grants } => {
            Box::new(denials.iter().chain(grants.iter().flatten()).flat_map(of_rules))
        }
    }
}

fn of_rules(named: &NamedRules) -> impl Iterator<Item = &Condition> {
    named.rules.iter().flat_map(|rule: &Rule| rule.from.iter().chain(&rule.to).flatten().chain(&rule.when))
}
