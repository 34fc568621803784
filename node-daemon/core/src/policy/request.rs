//! The verdict on one request, on ports whose policy asks what only a request can answer (DESIGN 3.4.2).
//!
//! In the order of policy A-7: path, peer, tokens, rules. The first no is the answer.

use std::borrow::Cow;

use super::{
    ConnectionFacts, Denial, DenialReason, Permit, Verdict,
    authentication::{Authenticated, PEER_FAILED, Principal, Sender, Unauthenticated},
    compile::Compiled,
    evaluate::{seen, visible_identity},
    matching::Text,
    paths::{Path, PathFault},
    rules::PortRules,
    seen::{Headers, RESERVED_NAMES, Seen, SeenRequest, SeenToken, header},
    tokens::{KeptBack, TokenFault, TokenRules, Tokens},
};
use crate::workload::{Protocol, TransportMode, Workload};

/// What is known of one request. Nothing of it is believed to say who sends it.
#[derive(Clone, Copy)]
pub struct RequestFacts<'a> {
    pub method: &'a str,
    /// Path and query as sent; `None` where the request has none.
    pub path: Option<&'a str>,
    /// The authority (`:authority`, or `Host`), port included.
    pub host: Option<&'a str>,
    pub headers: &'a dyn Headers,
    /// Of [`Compiled::token_rules`].
    pub tokens: &'a Tokens,
}

/// How a connection goes on.
#[derive(Debug)]
#[must_use]
pub enum Admission {
    /// As a byte stream: it is allowed as a whole.
    Stream(Permit),
    /// As HTTP: each request is judged by [`Compiled::judge_request`].
    Requests,
}

/// Proof that the policy allowed one request. As with [`Permit`], only the policy makes one:
///
/// ```compile_fail
/// let permit = node_core::policy::RequestPermit { upstream_path: String::new() };
/// ```
///
/// It may be read:
///
/// ```
/// fn read(permit: &node_core::policy::RequestPermit) -> Option<&str> { permit.upstream_path() }
/// ```
#[derive(Debug)]
#[must_use]
pub struct RequestPermit {
    verdict: Verdict,
    upstream_path: Option<String>,
    removed: Vec<Box<str>>,
    removed_cookies: Vec<Box<str>>,
    added: Vec<(Box<str>, String)>,
    attributes: Attributes,
}

impl RequestPermit {
    /// The object and rule that allowed it.
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// Path and query that the workload must get: what was judged (policy B-5).
    pub fn upstream_path(&self) -> Option<&str> {
        self.upstream_path.as_deref()
    }

    /// Headers that the workload must not get, beside those whose names begin with [`super::RESERVED_PREFIX`]. In lower
    /// case.
    pub fn removed_headers(&self) -> impl Iterator<Item = &str> {
        self.removed.iter().map(|name| &**name)
    }

    /// Cookies that the workload must not get: [`without_cookies`](super::tokens::without_cookies) takes them out.
    pub fn removed_cookies(&self) -> impl Iterator<Item = &str> {
        self.removed_cookies.iter().map(|name| &**name)
    }

    /// Headers that the workload gets, after the removed ones are gone (policy F-2).
    pub fn added_headers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.added.iter().map(|(name, value)| (&**name, value.as_str()))
    }

    /// Who it came from.
    pub fn attributes(&self) -> &Attributes {
        &self.attributes
    }
}

/// What authentication found out about the sender (policy A-14). Names nobody that was not proven.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// `td/ns/<namespace>/sa/<account>`
    pub source_principal: Option<String>,
    pub source_namespace: Option<String>,
    pub principal: Option<String>,
    pub audience: Option<String>,
    pub presenter: Option<String>,
    /// The claims of the accepted token.
    pub claims: Option<serde_json::Value>,
    /// Names of its claims whose text is a list, beside the usual ones.
    pub spaced: Vec<String>,
}

/// A request that does not reach the workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestDenial {
    pub kind: RequestDenialKind,
    pub reason: DenialReason,
    pub verdict: Verdict,
    /// Why a token did not count, for the log.
    pub token_fault: Option<TokenFault>,
    is_grpc: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestDenialKind {
    /// Nobody can judge the path: 400.
    BadPath(PathFault),
    /// 401, with the text for the client.
    Unauthenticated(String),
    /// 403
    Denied,
}

/// What the client is told (policy B-12).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer<'a> {
    pub status: u16,
    /// Empty for gRPC, whose answer is in `grpc-status` and `grpc-message`.
    pub body: &'a str,
    /// Status and message.
    pub grpc: Option<(u8, &'a str)>,
}

/// The body of every denial by rules, exactly (policy B-12).
pub const DENIED_BODY: &str = "RBAC: access denied";

const BAD_PATH_BODY: &str = "Bad Request";

/// Codes of gRPC.
const GRPC_INVALID_ARGUMENT: u8 = 3;
const GRPC_PERMISSION_DENIED: u8 = 7;
const GRPC_UNAUTHENTICATED: u8 = 16;

impl RequestDenial {
    pub(crate) fn new(
        kind: RequestDenialKind,
        reason: DenialReason,
        verdict: Verdict,
        headers: &dyn Headers,
    ) -> Self {
        Self { kind, reason, verdict, token_fault: None, is_grpc: is_grpc(headers) }
    }

    /// Nobody was asked: a document cannot be read (T-19), or nobody may speak as an end of the connection.
    pub(crate) fn unheard(denial: Denial, request: &RequestFacts<'_>) -> Self {
        Self::not_enrolled(denial, request)
    }

    fn not_enrolled(denial: Denial, request: &RequestFacts<'_>) -> Self {
        Self::new(RequestDenialKind::Denied, denial.reason, denial.verdict, request.headers)
    }

    /// What the client is told.
    pub fn answer(&self) -> Answer<'_> {
        let (status, code, text) = match &self.kind {
            RequestDenialKind::BadPath(_) => (400, GRPC_INVALID_ARGUMENT, BAD_PATH_BODY),
            RequestDenialKind::Unauthenticated(text) => (401, GRPC_UNAUTHENTICATED, text.as_str()),
            RequestDenialKind::Denied => (403, GRPC_PERMISSION_DENIED, DENIED_BODY),
        };
        if self.is_grpc {
            Answer { status: 200, body: "", grpc: Some((code, text)) }
        } else {
            Answer { status, body: text, grpc: None }
        }
    }
}

/// Whether a client expects gRPC's answers (policy A-12).
pub(crate) fn is_grpc(headers: &dyn Headers) -> bool {
    header(headers, "content-type").is_some_and(|value| value.starts_with("application/grpc"))
}

impl Compiled {
    /// Whether connections to this port must be taken apart into requests: it speaks HTTP or gRPC (policy H-8), and its
    /// policy asks what only a request can answer.
    pub fn needs_requests(&self, destination: &Workload, port: u16) -> bool {
        let rules = self.destinations.get(&destination.name).map(|destination| destination.port(port));
        rules.is_some_and(|rules| rules.needs_requests)
    }

    /// What is spoken on this port (policy H-8).
    pub fn protocol(&self, destination: &Workload, port: u16) -> Protocol {
        let rules = self.destinations.get(&destination.name).map(|destination| destination.port(port));
        rules.map_or(Protocol::Tcp, |rules| rules.protocol)
    }

    /// Whose tokens count on this port, if anybody's.
    pub fn token_rules(&self, destination: &Workload, port: u16) -> Option<&TokenRules> {
        let rules = self.destinations.get(&destination.name)?.port(port);
        Some(&rules.authentication.tokens).filter(|tokens| !tokens.is_empty())
    }

    /// Whether a connection may come in, and as what.
    ///
    /// # Errors
    /// The policy's [`Denial`]: the connection is closed without data.
    pub fn admit(&self, facts: &ConnectionFacts) -> Result<Admission, Denial> {
        let port = self.port(facts)?;
        // A foreign peer of an HTTP port is told so (policy A-8).
        let is_told = port.protocol != Protocol::Tcp && self.is_foreign(facts) && !port.transport.is_unusable;
        if is_told {
            return Ok(Admission::Requests);
        }
        if !port.needs_requests {
            return self.authorise(facts).map(Admission::Stream);
        }
        self.transport_admits(facts, port).map(|()| Admission::Requests)
    }

    /// Whether one request of an admitted connection may reach the workload.
    ///
    /// # Errors
    /// What the client is told, and who decided.
    pub fn judge_request(
        &self,
        connection: &ConnectionFacts,
        request: &RequestFacts<'_>,
    ) -> Result<RequestPermit, RequestDenial> {
        let port = self.port(connection).map_err(|denial| RequestDenial::not_enrolled(denial, request))?;
        let path = port.path(connection, request)?;
        let known = self.identify(connection, request, path.as_ref(), port)?;
        let asked = asked(request, path.as_ref(), &known);
        let seen = seen_of(connection, port, &asked, &known);
        let (answer, verdict) = port.judge(&seen, port.verdict(connection));
        match answer {
            Ok(()) => Ok(port.permit(verdict, &known, path.as_ref(), request)),
            Err(reason) => {
                Err(RequestDenial::new(RequestDenialKind::Denied, reason, verdict, request.headers))
            }
        }
    }

    /// Hands on what rules see of a request whose sender is known.
    pub(super) fn with_seen<T>(
        &self,
        connection: &ConnectionFacts,
        request: &RequestFacts<'_>,
        use_it: impl FnOnce(&Seen<'_>) -> T,
    ) -> Option<T> {
        let port = self.port(connection).ok()?;
        let path = port.path(connection, request).ok()?;
        let known = self.identify(connection, request, path.as_ref(), port).ok()?;
        let asked = asked(request, path.as_ref(), &known);
        Some(use_it(&seen_of(connection, port, &asked, &known)))
    }

    /// The first half of [`Self::judge_request`]: who sends it (policy A-7).
    ///
    /// # Errors
    /// As there.
    pub fn authenticate_request(
        &self,
        connection: &ConnectionFacts,
        request: &RequestFacts<'_>,
    ) -> Result<Attributes, RequestDenial> {
        let port = self.port(connection).map_err(|denial| RequestDenial::not_enrolled(denial, request))?;
        let path = port.path(connection, request)?;
        self.identify(connection, request, path.as_ref(), port).map(|known| Attributes::of(&known))
    }

    fn identify<'a>(
        &self,
        connection: &'a ConnectionFacts,
        request: &RequestFacts<'a>,
        path: Option<&'a Path<'a>>,
        port: &'a PortRules,
    ) -> Result<Authenticated<'a>, RequestDenial> {
        let peer = visible_identity(connection, port);
        let is_missing = port.transport.mode == TransportMode::Strict && peer.is_none();
        let is_unusable = port.transport.is_unusable;
        let sender = Sender {
            peer: if is_missing || self.is_foreign_peer(connection, port) { Err(()) } else { Ok(peer) },
            method: Some(request.method),
            path: path.map(Path::matched),
            headers: request.headers,
            tokens: request.tokens,
        };
        let known = match port.authentication.authenticate(&sender) {
            // Plaintext is refused as such: peerIsOptional does not let it in (policy A-6).
            Ok(_) if is_unusable || is_missing => Err(Unauthenticated {
                reason: if is_unusable {
                    DenialReason::PolicyUnusable
                } else {
                    DenialReason::PlaintextRefused
                },
                policy: port.transport.policy.clone(),
                text: PEER_FAILED.to_owned(),
                fault: None,
            }),
            known => known,
        };
        known.map_err(|refused| {
            let policy = refused.policy.or_else(|| port.transport.policy.clone());
            let verdict = Verdict { policy, ..port.verdict(connection) };
            let kind = RequestDenialKind::Unauthenticated(refused.text);
            let denial = RequestDenial::new(kind, refused.reason, verdict, request.headers);
            RequestDenial { token_fault: refused.fault, ..denial }
        })
    }

    /// Under a policy without mtls nobody is a peer, and nobody a foreign one (policy A-8).
    fn is_foreign_peer(&self, connection: &ConnectionFacts, port: &PortRules) -> bool {
        port.transport.mode != TransportMode::Disabled && self.is_foreign(connection)
    }
}

/// A peer that failed its step is nobody (policy A-8).
fn seen_of<'a>(
    connection: &'a ConnectionFacts,
    port: &PortRules,
    asked: &'a SeenRequest<'a>,
    known: &Authenticated<'_>,
) -> Seen<'a> {
    let seen = seen(connection, port, Some(asked));
    Seen { peer: seen.peer.filter(|_| known.peer.is_some()), ..seen }
}

/// The request as rules see it.
fn asked<'a>(
    request: &RequestFacts<'a>,
    path: Option<&'a Path<'a>>,
    known: &Authenticated<'a>,
) -> SeenRequest<'a> {
    SeenRequest {
        method: Some(request.method),
        path: path.map(Path::matched),
        host: request.host.map(lower_case),
        headers: request.headers,
        principal: match known.principal {
            Principal::Unset => None,
            Principal::Peer(peer) => Some(Text::principal(peer)),
            Principal::Token(principal) => Some(Text::plain(principal)),
        },
        token: known.token.map(|token| SeenToken {
            issuer_and_subject: token.issuer_and_subject(),
            audience: token.audience.as_deref(),
            presenter: token.presenter.as_deref(),
            claims: &token.claims,
            spaced: known.rule.map_or(&[], |rule| &rule.spaced),
        }),
    }
}

impl PortRules {
    fn path<'a>(
        &self,
        connection: &ConnectionFacts,
        request: &RequestFacts<'a>,
    ) -> Result<Option<Path<'a>>, RequestDenial> {
        let path = request.path.map(|path| Path::normalise(path, request.method)).transpose();
        path.map_err(|fault| {
            let kind = RequestDenialKind::BadPath(fault);
            RequestDenial::new(kind, DenialReason::BadPath, self.verdict(connection), request.headers)
        })
    }

    fn permit(
        &self,
        verdict: Verdict,
        known: &Authenticated<'_>,
        path: Option<&Path<'_>>,
        request: &RequestFacts<'_>,
    ) -> RequestPermit {
        let mut removed: Vec<Box<str>> = RESERVED_NAMES.iter().map(|name| (*name).into()).collect();
        let KeptBack { headers, parameters, cookies } = request.tokens.kept_back();
        removed.extend(headers.into_iter().map(Into::into));
        let removed_cookies = cookies.into_iter().map(Into::into).collect();
        let mut added = Vec::new();
        for rule in &self.authentication.requests {
            let token =
                known.token.filter(|_| known.rule.is_some_and(|own| std::sync::Arc::ptr_eq(own, rule)));
            for (name, value) in rule.outputs(token) {
                removed.push(name.clone());
                added.extend(value.map(|value| (name, value)));
            }
        }
        let upstream_path = path.map(|path| {
            if parameters.is_empty() {
                path.upstream.to_string()
            } else {
                path.without_parameters(|name| parameters.contains(&name))
            }
        });
        RequestPermit {
            verdict,
            upstream_path,
            removed,
            removed_cookies,
            added,
            attributes: Attributes::of(known),
        }
    }
}

impl Attributes {
    fn of(known: &Authenticated<'_>) -> Self {
        let token = known.token;
        Self {
            source_principal: known.peer.map(spiffe_id::SpiffeId::principal),
            source_namespace: known.peer.map(|peer| peer.namespace().to_owned()),
            principal: match known.principal {
                Principal::Unset => None,
                Principal::Peer(peer) => Some(peer.principal()),
                Principal::Token(principal) => Some(principal.to_owned()),
            },
            audience: token.and_then(|token| token.audience.clone()),
            presenter: token.and_then(|token| token.presenter.clone()),
            claims: token.map(|token| token.claims.clone()),
            spaced: known.rule.map(|rule| rule.spaced.clone()).unwrap_or_default(),
        }
    }
}

/// Names of hosts have no case (policy G-18).
pub(crate) fn lower_case(host: &str) -> Cow<'_, str> {
    if host.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Cow::Owned(host.to_ascii_lowercase())
    } else {
        Cow::Borrowed(host)
    }
}
