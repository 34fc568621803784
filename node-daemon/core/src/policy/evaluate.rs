//! The verdict on one connection: enrolled here, transport, trust domain, then the rules. The first no is the answer.

use std::sync::Arc;

use spiffe_id::SpiffeId;

use super::{
    ConnectionFacts, Denial, DenialReason, Permit, Presented, Verdict,
    compile::Compiled,
    matching::canonical,
    rules::{Authorisation, Doubt, Grant, NamedRules, PortRules, Seen, all_hold},
    status::ObjectStatus,
};
use crate::workload::{TransportMode, Workload};

impl Compiled {
    /// Whether the connection may be delivered to the workload.
    ///
    /// # Errors
    /// The reason, and the object that decided.
    pub fn authorise(&self, facts: &ConnectionFacts) -> Result<Permit, Denial> {
        let Some(destination) = self.destinations.get(&facts.destination.name) else {
            return Err(Denial { reason: DenialReason::NotEnrolled, verdict: Verdict::default() });
        };
        let port = destination.port(facts.destination_port);
        self.transport_admits(facts, port)?;
        let principal = visible_identity(facts, port);
        let seen = Seen {
            identity: principal,
            source_address: canonical(facts.source_address),
            destination_address: canonical(facts.destination_address),
            destination_port: facts.destination_port,
            server_name: server_name(&facts.presented),
        };
        let decision = port.authorisation.judge(&seen);
        let verdict = Verdict {
            policy: decision.policy.cloned(),
            rule: decision.rule.cloned(),
            principal: principal.cloned(),
            service: port.service.clone(),
        };
        match decision.answer {
            Ok(()) => Ok(Permit { verdict }),
            Err(reason) => Err(Denial { reason, verdict }),
        }
    }

    /// What the workload's port accepts. A workload that was not compiled for here accepts nothing unproven.
    pub fn transport_mode(&self, workload: &Workload, port: u16) -> TransportMode {
        let destination = self.destinations.get(&workload.name);
        destination.map_or(TransportMode::Strict, |destination| destination.port(port).transport.mode)
    }

    /// Each object that was read, and what it does.
    pub fn statuses(&self) -> &[ObjectStatus] {
        &self.statuses
    }

    fn transport_admits(&self, facts: &ConnectionFacts, port: &PortRules) -> Result<(), Denial> {
        let transport = &port.transport;
        let proven = proven_identity(&facts.presented);
        let reason = if transport.is_unusable {
            DenialReason::PolicyUnusable // policy A-3
        } else if proven.is_none() && transport.mode == TransportMode::Strict {
            DenialReason::PlaintextRefused // policy A-6
        } else if proven.is_some_and(|id| !self.trusted.includes(id.trust_domain())) {
            DenialReason::TrustDomain // policy A-8, G-12
        } else {
            return Ok(());
        };
        let verdict = Verdict {
            policy: transport.policy.clone(),
            rule: None,
            principal: visible_identity(facts, port).cloned(),
            service: port.service.clone(),
        };
        Err(Denial { reason, verdict })
    }
}

fn proven_identity(presented: &Presented) -> Option<&SpiffeId> {
    match presented {
        Presented::Tunnel(id) | Presented::Attested(id) | Presented::MeshTls { peer: id, .. } => Some(id),
        Presented::Plaintext => None,
    }
}

/// Without mtls in the port's policy nobody has an identity, whatever was presented (policy A-5, B-9).
fn visible_identity<'a>(facts: &'a ConnectionFacts, port: &PortRules) -> Option<&'a SpiffeId> {
    match port.transport.mode {
        TransportMode::Strict | TransportMode::Permissive => proven_identity(&facts.presented),
        TransportMode::Disabled => None,
    }
}

fn server_name(presented: &Presented) -> Option<&str> {
    match presented {
        Presented::MeshTls { server_name, .. } => server_name.as_deref(),
        Presented::Tunnel(_) | Presented::Attested(_) | Presented::Plaintext => None,
    }
}

/// An answer and who gave it, borrowed: nothing is allocated until the verdict leaves.
struct Decision<'a> {
    answer: Result<(), DenialReason>,
    policy: Option<&'a Arc<str>>,
    rule: Option<&'a Arc<str>>,
}

impl<'a> Decision<'a> {
    fn allowed(policy: &'a Arc<str>, rule: &'a Arc<str>) -> Self {
        Self { answer: Ok(()), policy: Some(policy), rule: Some(rule) }
    }

    fn refused(reason: DenialReason, policy: Option<&'a Arc<str>>) -> Self {
        Self { answer: Err(reason), policy, rule: None }
    }
}

impl Authorisation {
    fn judge(&self, seen: &Seen<'_>) -> Decision<'_> {
        match self {
            Self::Open => Decision { answer: Ok(()), policy: None, rule: None },
            Self::Unusable(policy) => Decision::refused(DenialReason::PolicyUnusable, Some(policy)),
            Self::Roles { switch, is_permissive, grants } => {
                judge_roles(switch, *is_permissive, grants, seen)
            }
            Self::Policies { denials, grants } => judge_policies(denials, grants.as_deref(), seen),
        }
    }
}

/// There are only grants, in any order (policy B-1, B-4).
fn judge_roles<'a>(
    switch: &'a Arc<str>,
    is_permissive: bool,
    grants: &'a [Grant],
    seen: &Seen<'_>,
) -> Decision<'a> {
    for grant in grants.iter().filter(|grant| all_hold(&grant.conditions, seen, Doubt::NotMet)) {
        let is_holder =
            |subjects: &[Vec<_>]| subjects.iter().any(|conditions| all_hold(conditions, seen, Doubt::NotMet));
        if let Some(holder) = grant.holders.iter().find(|holder| is_holder(&holder.subjects)) {
            return Decision::allowed(&grant.role, &holder.label);
        }
    }
    if is_permissive {
        // policy B-11: the would-be denial is seen by the absence of a rule.
        return Decision { answer: Ok(()), policy: Some(switch), rule: None };
    }
    Decision::refused(DenialReason::NoRuleAllows, Some(switch))
}

/// Denials first; without any grant in force the rest is allowed (policy F-3).
fn judge_policies<'a>(
    denials: &'a [NamedRules],
    grants: Option<&'a [NamedRules]>,
    seen: &Seen<'_>,
) -> Decision<'a> {
    if let Some((policy, rule)) = first_match(denials, seen, Doubt::Met) {
        let answer = Err(DenialReason::DeniedByRule);
        return Decision { answer, policy: Some(policy), rule: Some(rule) };
    }
    let Some(grants) = grants else { return Decision { answer: Ok(()), policy: None, rule: None } };
    match first_match(grants, seen, Doubt::NotMet) {
        Some((policy, rule)) => Decision::allowed(policy, rule),
        None => Decision::refused(DenialReason::NoRuleAllows, grants.first().map(|rules| &rules.policy)),
    }
}

fn first_match<'a>(
    policies: &'a [NamedRules],
    seen: &Seen<'_>,
    doubt: Doubt,
) -> Option<(&'a Arc<str>, &'a Arc<str>)> {
    policies.iter().find_map(|named| {
        let rule = named.rules.iter().find(|rule| rule.matches(seen, doubt))?;
        Some((&named.policy, &rule.label))
    })
}
