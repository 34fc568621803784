//! The evaluator's two halves, one by one, for [`crate::cases`]: what a port asks of a connection, and what its rules say
//! of attributes that somebody gives. The second half is the one that decides about traffic.

use std::{net::IpAddr, sync::Arc};

use serde_json::Value;

use super::{
    ConnectionFacts, Denial, DenialReason, Headers, RequestDenial, RequestDenialKind, Verdict,
    compile::Compiled,
    explain::Considered,
    matching::{Text, canonical},
    paths::Path,
    request::lower_case,
    rules::PortRules,
    seen::{Metadata, Peer, Seen, SeenRequest, SeenToken},
};
use crate::workload::{TransportMode, Workload};

/// Attributes after authentication.
pub(crate) struct Given<'a> {
    /// Without a scheme; any text.
    pub(crate) principal: Option<&'a str>,
    /// In the place of the one in the principal.
    pub(crate) namespace: Option<&'a str>,
    pub(crate) source_address: IpAddr,
    pub(crate) destination_address: IpAddr,
    pub(crate) destination_port: u16,
    pub(crate) server_name: Option<&'a str>,
    pub(crate) metadata: Option<&'a Metadata>,
    /// `None` on layer 4.
    pub(crate) request: Option<GivenRequest<'a>>,
}

pub(crate) struct GivenRequest<'a> {
    pub(crate) method: Option<&'a str>,
    pub(crate) path: Option<&'a str>,
    pub(crate) host: Option<&'a str>,
    pub(crate) headers: &'a dyn Headers,
    pub(crate) principal: Option<&'a str>,
    pub(crate) audience: Option<&'a str>,
    pub(crate) presenter: Option<&'a str>,
    pub(crate) claims: &'a Value,
}

/// The answer of the rules.
pub(crate) struct Judged {
    /// Path and query that the workload gets, on layer 7.
    pub(crate) answer: Result<Option<String>, Refusal>,
    pub(crate) verdict: Verdict,
    pub(crate) considered: Vec<Considered>,
}

pub(crate) enum Refusal {
    Connection(DenialReason),
    Request(RequestDenial),
}

impl Compiled {
    /// What the rules of one port say.
    pub(crate) fn judge_given(&self, destination: &Workload, given: &Given<'_>) -> Judged {
        let Some(port) = self.port_rules(destination, given.destination_port) else {
            let answer = Err(Refusal::Connection(DenialReason::NotEnrolled));
            return Judged { answer, verdict: Verdict::default(), considered: Vec::new() };
        };
        let verdict = Verdict { service: port.service.clone(), ..Verdict::default() };
        let Some(request) = &given.request else {
            let seen = given.seen(None);
            let (answer, verdict) = port.judge(&seen, verdict);
            let considered = port.authorisation.considered(&seen);
            return Judged {
                answer: answer.map(|()| None).map_err(Refusal::Connection),
                verdict,
                considered,
            };
        };
        let refuse = |kind, reason, verdict: &Verdict| {
            Err(Refusal::Request(RequestDenial::new(kind, reason, verdict.clone(), request.headers)))
        };
        let method = request.method.unwrap_or_default();
        let path = match request.path.map(|path| Path::normalise(path, method)).transpose() {
            Ok(path) => path,
            Err(fault) => {
                let answer = refuse(RequestDenialKind::BadPath(fault), DenialReason::BadPath, &verdict);
                return Judged { answer, verdict, considered: Vec::new() };
            }
        };
        let asked = request.seen(path.as_ref());
        let seen = given.seen(Some(&asked));
        let (answer, verdict) = port.judge(&seen, verdict);
        let considered = port.authorisation.considered(&seen);
        let answer = match answer {
            Ok(()) => Ok(path.map(|path| path.upstream.into_owned())),
            Err(reason) => refuse(RequestDenialKind::Denied, reason, &verdict),
        };
        Judged { answer, verdict, considered }
    }

    /// The object that decides about transport, and what it accepts.
    pub(crate) fn selected(
        &self,
        destination: &Workload,
        port: u16,
    ) -> Option<(Option<&Arc<str>>, TransportMode)> {
        let transport = &self.port_rules(destination, port)?.transport;
        Some((transport.policy.as_ref(), transport.mode))
    }

    /// Whether the connection itself is accepted, whoever may use the port.
    pub(crate) fn accepts(&self, facts: &ConnectionFacts) -> Result<(), Denial> {
        self.transport_admits(facts, self.port(facts)?)
    }

    /// Whether the peer is of a trust domain that is not of the mesh.
    pub(crate) fn is_stranger(&self, facts: &ConnectionFacts) -> bool {
        self.is_foreign(facts)
    }

    /// Whether requests can fail for who sends them.
    pub(crate) fn asks_senders(&self, destination: &Workload, port: u16) -> bool {
        self.port_rules(destination, port).is_some_and(|port| port.authentication.asks_anything())
    }

    /// The ports of a destination that something names, and their rules.
    pub(super) fn ports(&self, destination: &Workload) -> Option<impl Iterator<Item = (u16, &PortRules)>> {
        Some(self.destinations.get(&destination.name)?.named())
    }

    /// Every rule that was asked about a request or a connection.
    pub(crate) fn port_rules(&self, destination: &Workload, port: u16) -> Option<&PortRules> {
        Some(self.destinations.get(&destination.name)?.port(port))
    }
}

impl<'a> Given<'a> {
    fn seen(&self, request: Option<&'a SeenRequest<'a>>) -> Seen<'a> {
        Seen {
            peer: self.peer(),
            source_address: canonical(self.source_address),
            destination_address: canonical(self.destination_address),
            destination_port: self.destination_port,
            server_name: self.server_name,
            metadata: self.metadata,
            request,
        }
    }

    fn peer(&self) -> Option<Peer<'a>> {
        if self.principal.is_none() && self.namespace.is_none() {
            return None;
        }
        let principal = self.principal.unwrap_or_default();
        let (trust_domain, namespace, service_account) = match principal.split('/').collect::<Vec<_>>()[..] {
            [trust_domain, "ns", namespace, "sa", account] => (trust_domain, namespace, account),
            _ => ("", "", ""),
        };
        Some(Peer {
            principal: Text::plain(principal),
            trust_domain,
            namespace: self.namespace.unwrap_or(namespace),
            service_account,
        })
    }
}

impl<'a> GivenRequest<'a> {
    fn seen(&self, path: Option<&'a Path<'a>>) -> SeenRequest<'a> {
        let has_token = self.principal.is_some()
            || self.audience.is_some()
            || self.presenter.is_some()
            || !self.claims.is_null();
        SeenRequest {
            method: self.method,
            path: path.map(Path::matched),
            host: self.host.map(lower_case),
            headers: self.headers,
            principal: self.principal.map(Text::plain),
            token: has_token.then_some(SeenToken {
                issuer_and_subject: self.principal.and_then(|principal| principal.rsplit_once('/')),
                audience: self.audience,
                presenter: self.presenter,
                claims: self.claims,
                spaced: &[],
            }),
        }
    }
}
