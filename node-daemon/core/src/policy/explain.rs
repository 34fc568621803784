//! Why a verdict fell: every rule that was asked, and what did not fit. Collected only when somebody asks.
//!
//! The conditions are asked by the same [`Condition::holds`] that decides, so the two cannot disagree.

use std::{fmt, sync::Arc};

use super::{
    ConnectionFacts, Denial, DenialReason,
    compile::Compiled,
    evaluate::seen,
    request::{Admission, RequestDenialKind, RequestFacts},
    rules::{Authorisation, Condition, Doubt, Grant, NamedRules, Rule, Values},
    seen::Seen,
};

/// An attribute that is not as a rule wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// As policies write it, such as `request.path`.
    pub attribute: String,
    pub wanted: String,
    /// `None`: there was nothing.
    pub seen: Option<String>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = self.seen.as_deref().unwrap_or("unset");
        write!(formatter, "{} is {seen}, wanted {}", self.attribute, self.wanted)
    }
}

/// A rule that was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Considered {
    pub policy: Arc<str>,
    pub rule: Arc<str>,
    pub denies: bool,
    /// Empty: it matches.
    pub missing: Vec<Mismatch>,
}

/// A verdict with its reasons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    pub allowed: bool,
    pub policy: Option<Arc<str>>,
    pub rule: Option<Arc<str>>,
    /// One sentence.
    pub reason: String,
    pub considered: Vec<Considered>,
}

impl Explanation {
    /// Denied before any rule.
    pub(crate) fn unheard(denial: &Denial, unreadable: Option<&str>, considered: Vec<Considered>) -> Self {
        let label = denial.reason.label();
        let reason = unreadable.map_or_else(|| label.to_owned(), |problem| format!("{label}: {problem}"));
        Self { allowed: false, policy: None, rule: None, reason, considered }
    }
}

impl Compiled {
    /// What [`Self::admit`] and, with a request, [`Self::judge_request`] say, and why.
    pub fn explain(&self, connection: &ConnectionFacts, request: Option<&RequestFacts<'_>>) -> Explanation {
        let considered = self.considered(connection, request);
        let (answer, verdict) = match (self.admit(connection), request) {
            (Err(Denial { reason, verdict }), _) => (Err((reason, reason.label().to_owned())), verdict),
            (Ok(Admission::Stream(permit)), None) => (Ok(()), permit.verdict().clone()),
            (Ok(Admission::Stream(_) | Admission::Requests), Some(request)) => {
                match self.judge_request(connection, request) {
                    Ok(permit) => (Ok(()), permit.verdict().clone()),
                    Err(denial) => {
                        let text = match (&denial.kind, denial.token_fault) {
                            (_, Some(fault)) => format!("{}: {fault}", denial.reason.label()),
                            (RequestDenialKind::BadPath(fault), None) => {
                                format!("{}: {fault}", denial.reason.label())
                            }
                            (_, None) => denial.reason.label().to_owned(),
                        };
                        (Err((denial.reason, text)), denial.verdict)
                    }
                }
            }
            (Ok(Admission::Requests), None) => (Ok(()), super::Verdict::default()),
        };
        let reason = match &answer {
            Ok(()) => reason(None, &considered),
            Err((DenialReason::DeniedByRule | DenialReason::NoRuleAllows, text)) => {
                reason(Some(text), &considered)
            }
            // No rule was asked.
            Err((_, text)) => text.clone(),
        };
        let allowed = answer.is_ok();
        Explanation { allowed, policy: verdict.policy, rule: verdict.rule, reason, considered }
    }

    fn considered(
        &self,
        connection: &ConnectionFacts,
        request: Option<&RequestFacts<'_>>,
    ) -> Vec<Considered> {
        let Ok(port) = self.port(connection) else { return Vec::new() };
        let Some(request) = request else {
            return port.authorisation.considered(&seen(connection, port, None));
        };
        self.with_seen(connection, request, |seen| port.authorisation.considered(seen)).unwrap_or_default()
    }
}

/// The nearest rule tells what would have been wanted.
pub(crate) fn reason(refusal: Option<&str>, considered: &[Considered]) -> String {
    let matching = considered.iter().find(|rule| rule.missing.is_empty());
    let nearest = considered.iter().filter(|rule| !rule.denies).min_by_key(|rule| rule.missing.len());
    match (refusal, matching, nearest) {
        (None, Some(rule), _) => format!("{} {} matches", rule.policy, rule.rule),
        (None, None, _) => "nothing in force forbids it".to_owned(),
        (Some(refusal), Some(rule), _) if rule.denies => {
            format!("{refusal}: {} {} matches", rule.policy, rule.rule)
        }
        (Some(refusal), _, Some(rule)) if !rule.missing.is_empty() => {
            let missing: Vec<String> = rule.missing.iter().map(Mismatch::to_string).collect();
            format!("{refusal}: nearest is {} {}, but {}", rule.policy, rule.rule, missing.join("; "))
        }
        (Some(refusal), _, _) => refusal.to_owned(),
    }
}

impl Authorisation {
    /// Every rule, in the order in which it is asked.
    pub(crate) fn considered(&self, seen: &Seen<'_>) -> Vec<Considered> {
        match self {
            Self::Open | Self::Unusable(_) => Vec::new(),
            Self::Roles { grants, .. } => grants.iter().flat_map(|grant| grant.considered(seen)).collect(),
            Self::Policies { denials, grants } => {
                let denials = denials.iter().flat_map(|rules| rules.considered(seen, Doubt::Met));
                let grants = grants.iter().flatten().flat_map(|rules| rules.considered(seen, Doubt::NotMet));
                denials.chain(grants).collect()
            }
        }
    }
}

impl Grant {
    fn considered(&self, seen: &Seen<'_>) -> Vec<Considered> {
        let of_rule = missing(&self.conditions, seen, Doubt::NotMet);
        let by = |rule: Arc<str>, more: Vec<Mismatch>| Considered {
            policy: self.role.clone(),
            rule,
            denies: false,
            missing: of_rule.iter().cloned().chain(more).collect(),
        };
        if self.holders.is_empty() {
            let nobody = Mismatch {
                attribute: "subject".to_owned(),
                wanted: "a binding of the role".to_owned(),
                seen: None,
            };
            return vec![by(format!("rules[{}]", self.index).into(), vec![nobody])];
        }
        let holders = self.holders.iter().map(|holder| {
            let subjects = holder.subjects.iter().map(|subject| missing(subject, seen, Doubt::NotMet));
            by(holder.label.clone(), subjects.min_by_key(Vec::len).unwrap_or_default())
        });
        holders.collect()
    }
}

impl NamedRules {
    fn considered(&self, seen: &Seen<'_>, doubt: Doubt) -> Vec<Considered> {
        let each = self.rules.iter().map(|rule| Considered {
            policy: self.policy.clone(),
            rule: rule.label.clone(),
            denies: doubt == Doubt::Met,
            missing: rule.missing(seen, doubt),
        });
        each.collect()
    }
}

impl Rule {
    fn missing(&self, seen: &Seen<'_>, doubt: Doubt) -> Vec<Mismatch> {
        if self.matches(seen, doubt) {
            return Vec::new();
        }
        let nearest = |lists: &[Vec<Condition>]| {
            lists.iter().map(|list| missing(list, seen, doubt)).min_by_key(Vec::len).unwrap_or_default()
        };
        let mut all = nearest(&self.from);
        all.extend(nearest(&self.to));
        all.extend(missing(&self.when, seen, doubt));
        if all.is_empty() {
            // Only the layer is wrong.
            all.push(Mismatch {
                attribute: "request".to_owned(),
                wanted: "a port that carries HTTP".to_owned(),
                seen: None,
            });
        }
        all
    }
}

fn missing(conditions: &[Condition], seen: &Seen<'_>, doubt: Doubt) -> Vec<Mismatch> {
    conditions.iter().filter(|condition| !condition.holds(seen, doubt)).map(|c| c.mismatch(seen)).collect()
}

impl Condition {
    fn mismatch(&self, seen: &Seen<'_>) -> Mismatch {
        let (attribute, written, seen) = self.values().told(seen);
        let unusable = if self.has_unusable() { " (and a value that cannot be used)" } else { "" };
        let wanted = match (self.is_negated(), &written[..]) {
            (false, [one]) => one.clone(),
            (false, several) => format!("one of {}", several.join(", ")),
            (true, several) => format!("none of {}", several.join(", ")),
        };
        Mismatch { attribute, wanted: format!("{wanted}{unusable}"), seen }
    }
}

impl Values {
    /// Attribute, written values, seen value.
    fn told(&self, seen: &Seen<'_>) -> (String, Vec<String>, Option<String>) {
        fn texts<T: fmt::Display>(values: &[T]) -> Vec<String> {
            values.iter().map(T::to_string).collect()
        }
        let peer = seen.peer;
        let told = |name: &str, written, seen: Option<String>| (name.to_owned(), written, seen);
        let namespace = peer.map(|peer| peer.namespace.to_owned());
        match self {
            Self::Principals(values) => {
                told("source.principal", texts(values), peer.map(|peer| peer.principal.to_string()))
            }
            Self::NamespaceGlobs(values) => told("source.namespace", texts(values), namespace),
            Self::Namespaces(values) => told("source.namespace", texts(values), namespace),
            Self::ServiceAccounts(values) => {
                let own = peer.map(|peer| format!("{}/{}", peer.namespace, peer.service_account));
                told("source.serviceAccount", texts(values), own)
            }
            Self::TrustDomains(values) => {
                told("source.trustDomain", texts(values), peer.map(|peer| peer.trust_domain.to_owned()))
            }
            Self::SourceAddresses(values) => {
                told("source.ip", texts(values), Some(seen.source_address.to_string()))
            }
            Self::DestinationAddresses(values) => {
                told("destination.ip", texts(values), Some(seen.destination_address.to_string()))
            }
            Self::DestinationPorts(values) => {
                told("destination.port", texts(values), Some(seen.destination_port.to_string()))
            }
            Self::ServerNames(values) => {
                told("connection.sni", texts(values), seen.server_name.map(str::to_owned))
            }
            Self::Metadata { filter, key, values } => {
                let value = seen.metadata.and_then(|metadata| metadata.get(&**filter)?.get(&**key));
                let name = format!("experimental.envoy.filters.{filter}[{key}]");
                (name, texts(values), value.map(ToString::to_string))
            }
            Self::Request(asked, values) => {
                let value = seen.request.and_then(|request| asked.seen(seen, request));
                (asked.name(), texts(values), value)
            }
            Self::Paths(values) => {
                let path = seen.request.and_then(|request| request.path);
                told("request.path", texts(values), path.map(str::to_owned))
            }
            Self::TokenPrincipals(values) => {
                let named = seen.request.and_then(|request| request.token?.issuer_and_subject);
                let named = named.map(|(issuer, subject)| format!("{issuer}/{subject}"));
                told("request.auth.principal", texts(values), named)
            }
            Self::Undecidable => told("an attribute that nobody can tell", Vec::new(), None),
        }
    }
}
