//! Who sends a request: the peer step, the origin step, the tokens of the current API, in this order (policy,
//! F-2).

use std::sync::Arc;

use spiffe_id::SpiffeId;

use super::{
    DenialReason,
    origins::Trigger,
    seen::{Headers, header},
    tokens::{IssuerRule, TokenFault, TokenRules, Tokens, VerifiedToken},
};

/// What one port asks of the senders of requests.
#[derive(Clone, Debug, Default)]
pub(super) struct Authentication {
    /// `peerIsOptional`: a peer that fails is nobody (policy A-8).
    pub(super) peer_is_optional: bool,
    /// One for each `Policy` that applies; usually one at most.
    pub(super) origins: Vec<OriginStep>,
    /// The rules of every `RequestAuthentication` that applies (policy F-2).
    pub(super) requests: Vec<Arc<IssuerRule>>,
    /// Their objects, for messages.
    pub(super) request_policy: Option<Arc<str>>,
    /// A `RequestAuthentication` that cannot be used: every request is refused (policy A-3).
    pub(super) unusable: Option<Arc<str>>,
    pub(super) tokens: TokenRules,
}

/// What one `Policy` asks of tokens.
#[derive(Clone, Debug)]
pub(super) struct OriginStep {
    pub(super) policy: Arc<str>,
    pub(super) methods: Vec<OriginMethod>,
    pub(super) is_optional: bool,
    /// `USE_ORIGIN`
    pub(super) binds_origin: bool,
}

/// One `jwt` among `origins`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OriginMethod {
    pub(super) rule: Arc<IssuerRule>,
    pub(super) triggers: Vec<Trigger>,
}

/// Who a request proved to come from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Authenticated<'a> {
    pub(super) peer: Option<&'a SpiffeId>,
    pub(super) principal: Principal<'a>,
    pub(super) token: Option<&'a VerifiedToken>,
    pub(super) rule: Option<&'a Arc<IssuerRule>>,
}

/// `request.auth.principal` (policy A-14).
#[derive(Clone, Copy, Debug)]
pub(super) enum Principal<'a> {
    Unset,
    Peer(&'a SpiffeId),
    Token(&'a str),
}

/// A request whose sender is not known as the policy wants it: 401.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unauthenticated {
    pub(super) reason: DenialReason,
    pub(super) policy: Option<Arc<str>>,
    pub(super) text: String,
    pub(super) fault: Option<TokenFault>,
}

/// Bodies of 2018 (policy ).
pub(super) const PEER_FAILED: &str = "Peer authentication failed.";
pub(super) const ORIGIN_FAILED: &str = "Origin authentication failed.";

/// One request while it is authenticated.
#[derive(Clone, Copy)]
pub(super) struct Sender<'a> {
    /// `Err`: somebody that the port does not accept as a peer (policy A-8).
    pub(super) peer: Result<Option<&'a SpiffeId>, ()>,
    pub(super) method: Option<&'a str>,
    /// In its one form, without the query.
    pub(super) path: Option<&'a str>,
    pub(super) headers: &'a dyn Headers,
    pub(super) tokens: &'a Tokens,
}

impl Authentication {
    /// Whether a request can fail here, or be told apart from its connection.
    pub(super) fn asks(&self) -> bool {
        self.unusable.is_some()
            || !self.requests.is_empty()
            || self.origins.iter().any(|step| !step.is_optional)
    }

    /// Whether it looks at tokens at all.
    pub(super) fn asks_anything(&self) -> bool {
        self.asks() || !self.origins.is_empty()
    }

    /// Who refuses every connection that is judged without its requests.
    pub(super) fn refuses_connections(&self) -> Option<&Arc<str>> {
        let origin = self.origins.iter().find(|step| !step.is_optional).map(|step| &step.policy);
        self.unusable
            .as_ref()
            .or(origin)
            .or_else(|| self.request_policy.as_ref().filter(|_| !self.requests.is_empty()))
    }

    pub(super) fn authenticate<'a>(
        &'a self,
        sender: &Sender<'a>,
    ) -> Result<Authenticated<'a>, Unauthenticated> {
        if let Some(policy) = &self.unusable {
            return Err(Unauthenticated {
                reason: DenialReason::PolicyUnusable,
                policy: Some(policy.clone()),
                text: TokenFault::KeysUnavailable.to_string(),
                fault: None,
            });
        }
        let peer = match sender.peer {
            Ok(peer) => peer,
            Err(()) if self.peer_is_optional => None,
            Err(()) => {
                return Err(Unauthenticated {
                    reason: DenialReason::PeerUnauthenticated,
                    policy: None,
                    text: PEER_FAILED.to_owned(),
                    fault: None,
                });
            }
        };
        let mut known = Authenticated { peer, principal: Principal::Unset, token: None, rule: None };
        if self.origins.is_empty() && self.requests.is_empty() {
            known.principal = peer.map_or(Principal::Unset, Principal::Peer);
        }
        for step in &self.origins {
            step.check(sender, &mut known)?;
        }
        self.check_requests(sender, &mut known)?;
        Ok(known)
    }

    /// No token passes, a bad one does not (policy F-2).
    fn check_requests<'a>(
        &'a self,
        sender: &Sender<'a>,
        known: &mut Authenticated<'a>,
    ) -> Result<(), Unauthenticated> {
        let valid = sender.tokens.all_valid(&self.requests).map_err(|fault| Unauthenticated {
            reason: DenialReason::TokenRefused,
            policy: self.request_policy.clone(),
            text: fault.to_string(),
            fault: Some(fault),
        })?;
        if let (Some((rule, token)), None) = (valid, known.token) {
            known.token = Some(token);
            known.rule = Some(rule);
            known.principal = token.principal.as_deref().map_or(Principal::Unset, Principal::Token);
        }
        Ok(())
    }
}

impl OriginStep {
    fn check<'a>(
        &'a self,
        sender: &Sender<'a>,
        known: &mut Authenticated<'a>,
    ) -> Result<(), Unauthenticated> {
        let accepted = match self.accept(sender) {
            Ok(accepted) => accepted,
            Err(_) if self.is_optional => return Ok(()), // policy: no principal, under either binding
            Err(fault) => {
                return Err(Unauthenticated {
                    reason: DenialReason::TokenRefused,
                    policy: Some(self.policy.clone()),
                    text: ORIGIN_FAILED.to_owned(),
                    fault,
                });
            }
        };
        if let (Some((rule, token)), None) = (accepted, known.token) {
            known.token = Some(token);
            known.rule = Some(rule);
        }
        if let Principal::Unset = known.principal {
            known.principal = if self.binds_origin {
                let own = accepted.and_then(|(_, token)| token.principal.as_deref());
                own.map_or(Principal::Unset, Principal::Token)
            } else {
                known.peer.map_or(Principal::Unset, Principal::Peer)
            };
        }
        Ok(())
    }

    /// `Ok(None)`: nothing is asked of this request. `Err`: why there is no valid token, if there is one at all.
    fn accept<'a>(
        &'a self,
        sender: &Sender<'a>,
    ) -> Result<Option<(&'a Arc<IssuerRule>, &'a VerifiedToken)>, Option<TokenFault>> {
        if is_cors_preflight(sender.method, sender.headers) {
            return Ok(None); // policy
        }
        if self.methods.is_empty() {
            return Err(None); // policy
        }
        let (mut is_triggered, mut fault) = (false, None);
        for OriginMethod { rule, triggers } in &self.methods {
            if !Trigger::any_fires(triggers, sender.path) {
                continue;
            }
            is_triggered = true;
            if let Some(token) = sender.tokens.of(rule) {
                return Ok(Some((rule, token)));
            }
            fault = fault.or_else(|| sender.tokens.fault_of(rule));
        }
        if is_triggered { Err(fault) } else { Ok(None) } // policy
    }
}

/// policy
fn is_cors_preflight(method: Option<&str>, headers: &dyn Headers) -> bool {
    let is_filled = |name: &str| header(headers, name).is_some_and(|value| !value.is_empty());
    method == Some("OPTIONS") && is_filled("origin") && is_filled("access-control-request-method")
}
