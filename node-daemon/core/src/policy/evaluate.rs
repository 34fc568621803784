//! The verdict on one connection: enrolled here, transport, trust domain, then the rules. The first no is the answer.

use std::sync::Arc;

use spiffe_id::SpiffeId;

use super::{
    ConnectionFacts, Denial, DenialReason, Permit, Presented, ShadowVerdict, Verdict,
    compile::Compiled,
    matching::canonical,
    rules::{Authorisation, Doubt, Grant, NamedRules, PortRules, all_hold},
    seen::{Peer, Seen, SeenRequest},
    status::ObjectStatus,
};
use crate::workload::{TransportMode, Workload};

impl Compiled {
    /// Whether the connection may be delivered to the workload, judged by itself: what only a request can answer counts
    /// against it (policy B-10, F-3).
    ///
    /// # Errors
    /// The reason, and the object that decided.
    pub fn authorise(&self, facts: &ConnectionFacts) -> Result<Permit, Denial> {
        let port = self.port(facts)?;
        self.transport_admits(facts, port)?;
        if let Some(policy) = port.authentication.refuses_connections() {
            let verdict = Verdict { policy: Some(policy.clone()), ..port.verdict(facts) };
            return Err(Denial { reason: DenialReason::PolicyUnusable, verdict });
        }
        let seen = seen(facts, port, None);
        let (answer, verdict) = port.judge(&seen, port.verdict(facts));
        match answer {
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

    pub(super) fn port(&self, facts: &ConnectionFacts) -> Result<&PortRules, Denial> {
        match self.destinations.get(&facts.destination.name) {
            Some(destination) => Ok(destination.port(facts.destination_port)),
            None => Err(Denial { reason: DenialReason::NotEnrolled, verdict: Verdict::default() }),
        }
    }

    pub(super) fn transport_admits(&self, facts: &ConnectionFacts, port: &PortRules) -> Result<(), Denial> {
        let transport = &port.transport;
        let reason = if transport.is_unusable {
            DenialReason::PolicyUnusable // policy A-3
        } else if facts.presented.identity().is_none() && transport.mode == TransportMode::Strict {
            DenialReason::PlaintextRefused // policy A-6
        } else if self.is_foreign(facts) {
            DenialReason::TrustDomain // policy A-8, G-12
        } else {
            return Ok(());
        };
        let verdict = Verdict { policy: transport.policy.clone(), ..port.verdict(facts) };
        Err(Denial { reason, verdict })
    }

    /// Whether somebody of a trust domain proved to be so that is not of the mesh (policy A-8, G-12).
    pub(super) fn is_foreign(&self, facts: &ConnectionFacts) -> bool {
        facts.presented.identity().is_some_and(|id| !self.trusted.includes(id.trust_domain()))
    }
}

impl PortRules {
    /// A verdict that nobody has given yet.
    pub(super) fn verdict(&self, facts: &ConnectionFacts) -> Verdict {
        Verdict {
            principal: visible_identity(facts, self).cloned(),
            service: self.service.clone(),
            ..Verdict::default()
        }
    }

    /// The rules' answer, what it would be if everything were enforced, and who records it.
    pub(crate) fn judge(&self, seen: &Seen<'_>, verdict: Verdict) -> (Result<(), DenialReason>, Verdict) {
        let decision = self.authorisation.judge(seen);
        let shadow = self.shadow.as_ref().map(|shadow| shadow.judge(seen));
        let audit = first_match(&self.audits, seen, Doubt::NotMet);
        let verdict = Verdict {
            policy: decision.policy.cloned(),
            rule: decision.rule.cloned(),
            shadow: shadow.map(|shadow| ShadowVerdict {
                allowed: shadow.answer.is_ok(),
                policy: shadow.policy.cloned(),
                rule: shadow.rule.cloned(),
            }),
            audit: audit.map(|(policy, _)| policy.clone()),
            ..verdict
        };
        (decision.answer, verdict)
    }
}

/// What the rules of a port may look at.
pub(super) fn seen<'a>(
    facts: &'a ConnectionFacts,
    port: &PortRules,
    request: Option<&'a SeenRequest<'a>>,
) -> Seen<'a> {
    Seen {
        peer: visible_identity(facts, port).map(Peer::of),
        source_address: canonical(facts.source_address),
        destination_address: canonical(facts.destination_address),
        destination_port: facts.destination_port,
        server_name: server_name(&facts.presented),
        metadata: None,
        request,
    }
}

/// Without mtls in the port's policy nobody has an identity, whatever was presented (policy A-5, B-9).
pub(super) fn visible_identity<'a>(facts: &'a ConnectionFacts, port: &PortRules) -> Option<&'a SpiffeId> {
    match port.transport.mode {
        TransportMode::Strict | TransportMode::Permissive => facts.presented.identity(),
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
