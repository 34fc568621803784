//! One connection or request, made of one value for each attribute, and what the policy says of it.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use serde_json::{Map, Value, json};
use spiffe_id::SpiffeId;

use super::{
    super::{
        Admission, ConnectionFacts, DenialReason, Headers, Presented, RequestFacts,
        compile::Compiled,
        matching::{Text, canonical},
        paths::Path,
        request::lower_case,
        seen::{Peer, Seen, SeenRequest, SeenToken},
        tokens::{
            Algorithm, BEARER, IssuerRule, KeySource, Location, Prefix, Signatures, TokenFault, TokenRules,
            Tokens, encode_base64url,
        },
    },
    Attribute,
};
use crate::workload::Workload;

/// See the module.
#[derive(Clone, Debug)]
pub struct Point {
    pub destination: Arc<Workload>,
    pub port: u16,
    pub destination_address: IpAddr,
    pub source_address: IpAddr,
    /// Who proved to be the peer.
    pub peer: Option<SpiffeId>,
    /// The kernel of this node vouches for the peer, instead of a certificate.
    pub is_attested: bool,
    /// With it the peer came over mesh TLS, else over the tunnel.
    pub server_name: Option<String>,
    /// `None`: judged as a connection.
    pub request: Option<RequestPoint>,
}

#[derive(Clone, Debug, Default)]
pub struct RequestPoint {
    pub method: String,
    /// With its query; `None` where the request has no path.
    pub path: Option<String>,
    pub host: Option<String>,
    /// Lines as sent, names in any case.
    pub headers: Vec<(String, String)>,
    pub(crate) token: TokenPoint,
}

/// The token of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum TokenPoint {
    /// Whatever the headers and the query carry.
    #[default]
    AsSent,
    Absent,
    /// None that anybody accepts.
    Bad(TokenPlace),
    /// One that its issuer signed.
    Good {
        place: TokenPlace,
        claims: BTreeMap<Vec<Box<str>>, ClaimPoint>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ClaimPoint {
    Text(String),
    List(Vec<String>),
}

/// Where a token stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TokenPlace {
    Header { name: Box<str>, before: Box<str> },
    Parameter(Box<str>),
    Cookie(Box<str>),
}

impl TokenPlace {
    /// The places of a rule, each way of writing one by itself.
    pub(super) fn all_of(rule: &IssuerRule) -> Vec<Self> {
        rule.locations.iter().flat_map(Self::of).collect()
    }

    fn of(location: &Location) -> Vec<Self> {
        let header = |name: &str, before: &str| Self::Header { name: name.into(), before: before.into() };
        match location {
            Location::Header { name, prefix: Prefix::Required(before) } => vec![header(name, before)],
            Location::Header { name, prefix: Prefix::OptionalBearer } => {
                vec![header(name, ""), header(name, BEARER)]
            }
            Location::Parameter(name) => vec![Self::Parameter(name.clone())],
            Location::Cookie(name) => vec![Self::Cookie(name.clone())],
        }
    }
}

/// One value of one attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Atom {
    Peer(Option<SpiffeId>),
    Source(IpAddr),
    Destination(IpAddr),
    ServerName(Option<String>),
    Method(String),
    Path(String),
    Host(Option<String>),
    /// The lines of one name.
    Header(Box<str>, Vec<String>),
    Token(TokenPoint),
    Claim(Vec<Box<str>>, Option<ClaimPoint>),
}

impl Atom {
    /// As explanations show it.
    pub(crate) fn shown(&self) -> String {
        let optional = |text: Option<&String>| text.map_or_else(|| "unset".to_owned(), |text| quoted(text));
        match self {
            Self::Peer(peer) => peer.as_ref().map_or_else(|| "unset".to_owned(), SpiffeId::principal),
            Self::Source(address) | Self::Destination(address) => address.to_string(),
            Self::ServerName(text) | Self::Host(text) => optional(text.as_ref()),
            Self::Method(text) | Self::Path(text) => quoted(text),
            Self::Header(_, lines) if lines.is_empty() => "unset".to_owned(),
            Self::Header(_, lines) => lines.iter().map(|line| quoted(line)).collect::<Vec<_>>().join(" and "),
            Self::Token(TokenPoint::AsSent) => "as it was sent".to_owned(),
            Self::Token(TokenPoint::Absent) => "absent".to_owned(),
            Self::Token(TokenPoint::Bad(_)) => "one that is not valid".to_owned(),
            Self::Token(TokenPoint::Good { claims, .. }) => {
                let issuer = claims.get(&claim_path("iss")).map_or_else(String::new, ClaimPoint::shown);
                format!("a valid one of {issuer}")
            }
            Self::Claim(_, claim) => claim.as_ref().map_or_else(|| "unset".to_owned(), ClaimPoint::shown),
        }
    }
}

impl ClaimPoint {
    fn shown(&self) -> String {
        match self {
            Self::Text(text) => quoted(text),
            Self::List(list) => list.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(" and "),
        }
    }
}

/// A plain word as it is, anything else so that its ends are seen.
fn quoted(text: &str) -> String {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"') {
        text.to_owned()
    } else {
        format!("{text:?}")
    }
}

pub(super) fn claim_path(name: &str) -> Vec<Box<str>> {
    vec![name.into()]
}

impl Point {
    /// Changes one attribute. What only a request has is left alone where there is none.
    pub(crate) fn apply(&mut self, atom: &Atom) {
        match atom {
            Atom::Peer(peer) => {
                self.peer.clone_from(peer);
                self.is_attested &= peer.is_some();
                self.server_name = self.server_name.take().filter(|_| peer.is_some());
            }
            Atom::Source(address) => self.source_address = *address,
            Atom::Destination(address) => self.destination_address = *address,
            Atom::ServerName(name) => self.server_name.clone_from(name),
            other @ (Atom::Method(_)
            | Atom::Path(_)
            | Atom::Host(_)
            | Atom::Header(..)
            | Atom::Token(_)
            | Atom::Claim(..)) => {
                if let Some(request) = &mut self.request {
                    request.apply(other);
                }
            }
        }
    }

    /// The value of one attribute.
    pub(crate) fn atom(&self, attribute: &Attribute) -> Option<Atom> {
        let request = self.request.as_ref();
        match attribute {
            Attribute::Peer => Some(Atom::Peer(self.peer.clone())),
            Attribute::Source => Some(Atom::Source(self.source_address)),
            Attribute::Destination => Some(Atom::Destination(self.destination_address)),
            Attribute::ServerName => Some(Atom::ServerName(self.server_name.clone())),
            Attribute::Method => request.map(|request| Atom::Method(request.method.clone())),
            Attribute::Path => request.and_then(|request| request.path.clone()).map(Atom::Path),
            Attribute::Host => request.map(|request| Atom::Host(request.host.clone())),
            Attribute::Header(name) => request
                .map(|request| Atom::Header(name.clone(), request.lines(name).map(str::to_owned).collect())),
            Attribute::Token => request.map(|request| Atom::Token(request.token.clone())),
            Attribute::Subject => request.map(|request| request.claim(&claim_path("sub"))),
            Attribute::Audience => request.map(|request| request.claim(&claim_path("aud"))),
            Attribute::Presenter => request.map(|request| request.claim(&claim_path("azp"))),
            Attribute::Claim(path) => request.map(|request| request.claim(path)),
        }
    }

    /// Whether a token stands behind `Bearer ` in another header than the one that is made for it.
    pub(crate) fn has_scheme_in_header_of_its_own(&self) -> bool {
        let place = match self.request.as_ref().map(|request| &request.token) {
            Some(TokenPoint::Good { place, .. } | TokenPoint::Bad(place)) => place,
            Some(TokenPoint::AsSent | TokenPoint::Absent) | None => return false,
        };
        matches!(place, TokenPlace::Header { name, before } if **before == *BEARER && **name != *AUTHORIZATION)
    }

    pub(crate) fn facts(&self) -> ConnectionFacts {
        let presented = match (&self.peer, &self.server_name) {
            (None, _) => Presented::Plaintext,
            (Some(peer), _) if self.is_attested => Presented::Attested(peer.clone()),
            (Some(peer), Some(name)) => {
                Presented::MeshTls { peer: peer.clone(), server_name: Some(name.clone()) }
            }
            (Some(peer), None) => Presented::Tunnel(peer.clone()),
        };
        ConnectionFacts {
            presented,
            source_address: self.source_address,
            destination_address: self.destination_address,
            destination_port: self.port,
            destination: Arc::clone(&self.destination),
        }
    }

    /// What rules would see if nobody were refused before they are asked. `by_token`: the principal is the token's.
    pub(super) fn with_seen<T>(&self, by_token: bool, use_it: impl FnOnce(&Seen<'_>) -> T) -> T {
        let peer = self.peer.as_ref();
        let seen = Seen {
            peer: peer.map(Peer::of),
            source_address: canonical(self.source_address),
            destination_address: canonical(self.destination_address),
            destination_port: self.port,
            server_name: self.server_name.as_deref().filter(|_| peer.is_some()),
            metadata: None,
            request: None,
        };
        let Some(request) = &self.request else { return use_it(&seen) };
        let claims = request.claims();
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        let issuer_and_subject = text("iss").zip(text("sub"));
        let of_token = issuer_and_subject.map(|(issuer, subject)| format!("{issuer}/{subject}"));
        let principal =
            if by_token { of_token.as_deref().map(Text::plain) } else { peer.map(Text::principal) };
        let path = request.path.as_deref().and_then(|path| Path::normalise(path, &request.method).ok());
        let token = claims.is_object().then(|| SeenToken {
            issuer_and_subject,
            audience: text("aud"),
            presenter: text("azp"),
            claims: &claims,
            spaced: &[],
        });
        let asked = SeenRequest {
            method: Some(&request.method),
            path: path.as_ref().map(Path::matched),
            host: request.host.as_deref().map(lower_case),
            headers: request,
            principal,
            token,
        };
        use_it(&Seen { request: Some(&asked), ..seen })
    }
}

impl Headers for RequestPoint {
    fn each(&self, name: &str, visit: &mut dyn FnMut(&[u8])) {
        self.lines(name).for_each(|value| visit(value.as_bytes()));
    }
}

impl RequestPoint {
    /// A request as it was sent.
    pub fn new(method: &str, path: Option<&str>, host: Option<&str>, headers: Vec<(String, String)>) -> Self {
        Self {
            method: method.to_owned(),
            path: path.map(str::to_owned),
            host: host.map(str::to_owned),
            headers,
            token: TokenPoint::AsSent,
        }
    }

    fn lines(&self, name: &str) -> impl Iterator<Item = &str> {
        let of_name = self.headers.iter().filter(move |(written, _)| written.eq_ignore_ascii_case(name));
        of_name.map(|(_, value)| value.as_str())
    }

    fn apply(&mut self, atom: &Atom) {
        match atom {
            Atom::Method(method) => self.method.clone_from(method),
            Atom::Path(path) => self.path = Some(path.clone()),
            Atom::Host(host) => self.host.clone_from(host),
            Atom::Header(name, lines) => {
                self.headers.retain(|(written, _)| !written.eq_ignore_ascii_case(name));
                self.headers.extend(lines.iter().map(|line| (name.to_string(), line.clone())));
            }
            Atom::Token(token) => self.token = token.clone(),
            Atom::Claim(path, value) => {
                if let TokenPoint::Good { claims, .. } = &mut self.token {
                    match value {
                        Some(value) => claims.insert(path.clone(), value.clone()),
                        None => claims.remove(path),
                    };
                }
            }
            Atom::Peer(_) | Atom::Source(_) | Atom::Destination(_) | Atom::ServerName(_) => {}
        }
    }

    fn claim(&self, path: &[Box<str>]) -> Atom {
        let value = match &self.token {
            TokenPoint::Good { claims, .. } => claims.get(path).cloned(),
            TokenPoint::AsSent | TokenPoint::Absent | TokenPoint::Bad(_) => None,
        };
        Atom::Claim(path.to_vec(), value)
    }

    /// Null where there is no token that was made here.
    fn claims(&self) -> Value {
        let TokenPoint::Good { claims, .. } = &self.token else { return Value::Null };
        let mut all = Value::Object(Map::new());
        for (path, claim) in claims {
            let value = match claim {
                ClaimPoint::Text(text) => json!(text),
                ClaimPoint::List(list) => json!(list),
            };
            put(&mut all, path, value);
        }
        all
    }

    /// Headers and path with the token where it belongs, and without any that was sent there before.
    fn sent(&self, places: &[TokenPlace]) -> (Vec<(String, String)>, Option<String>) {
        let (text, place) = match &self.token {
            TokenPoint::AsSent => return (self.headers.clone(), self.path.clone()),
            TokenPoint::Absent => (String::new(), None),
            TokenPoint::Bad(place) => (BAD_TOKEN.to_owned(), Some(place)),
            TokenPoint::Good { place, .. } => (minted(&self.claims()), Some(place)),
        };
        let is_place = |line: &(String, String)| {
            places.iter().any(|place| {
                matches!(place, TokenPlace::Header { name, before }
                    if line.0.eq_ignore_ascii_case(name) && line.1.starts_with(&**before))
            })
        };
        let mut headers: Vec<_> = self.headers.iter().filter(|line| !is_place(line)).cloned().collect();
        let mut path = self.path.as_deref().map(|path| without_parameters(path, places));
        match place {
            None => {}
            Some(TokenPlace::Header { name, before }) => {
                headers.push((name.to_string(), format!("{before}{text}")));
            }
            Some(TokenPlace::Cookie(name)) => headers.push(("cookie".to_owned(), format!("{name}={text}"))),
            Some(TokenPlace::Parameter(name)) => {
                path = path.map(|path| {
                    let joint = if path.contains('?') { '&' } else { '?' };
                    format!("{path}{joint}{name}={text}")
                });
            }
        }
        (headers, path)
    }
}

fn without_parameters(path: &str, places: &[TokenPlace]) -> String {
    let Some((bare, query)) = path.split_once('?') else { return path.to_owned() };
    let is_place = |pair: &str| {
        let name = pair.split('=').next().unwrap_or_default();
        places.iter().any(|place| matches!(place, TokenPlace::Parameter(own) if **own == *name))
    };
    let kept: Vec<&str> = query.split('&').filter(|pair| !is_place(pair)).collect();
    if kept.is_empty() { bare.to_owned() } else { format!("{bare}?{}", kept.join("&")) }
}

fn put(all: &mut Value, path: &[Box<str>], value: Value) {
    let Some((last, outer)) = path.split_last() else { return };
    let mut inner = all;
    for name in outer {
        let Value::Object(map) = inner else { return };
        inner = map.entry(name.to_string()).or_insert_with(|| Value::Object(Map::new()));
    }
    if let Value::Object(map) = inner {
        map.insert(last.to_string(), value);
    }
}

/// Three parts, none of which says anything.
const BAD_TOKEN: &str = "e30.e30.AA";

/// The signature of tokens that are made here, and that count as good here and nowhere else.
const MINTED: &[u8] = b"made for an explanation";

fn minted(claims: &Value) -> String {
    let head = encode_base64url(br#"{"alg":"RS256"}"#);
    let claims = encode_base64url(claims.to_string().as_bytes());
    format!("{head}.{claims}.{}", encode_base64url(MINTED))
}

/// Believes what was made here, and leaves the rest to others.
struct Believing<'s>(&'s dyn Signatures);

impl Signatures for Believing<'_> {
    fn verify(
        &self,
        keys: &KeySource,
        algorithm: Algorithm,
        kid: Option<&str>,
        signed: &[u8],
        signature: &[u8],
    ) -> Result<(), TokenFault> {
        if signature == MINTED {
            return Ok(());
        }
        self.0.verify(keys, algorithm, kid, signed, signature)
    }
}

/// The header that tokens behind `Bearer ` are made for.
const AUTHORIZATION: &str = "authorization";

/// No key at all.
pub(crate) struct NoKeys;

impl Signatures for NoKeys {
    fn verify(
        &self,
        _: &KeySource,
        _: Algorithm,
        _: Option<&str>,
        _: &[u8],
        _: &[u8],
    ) -> Result<(), TokenFault> {
        Err(TokenFault::KeysUnavailable)
    }
}

/// What the policy says of a [`Point`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    pub reason: Option<DenialReason>,
    /// `Kind/namespace/name` of the deciding object.
    pub policy: Option<Arc<str>>,
    pub rule: Option<Arc<str>>,
    /// Refused because a token is there that is not valid.
    pub has_bad_token: bool,
    /// The port is judged request by request, and no request was given.
    pub needs_request: bool,
}

impl Decision {
    /// Refused for who sends it, before any rule is asked.
    pub(crate) fn is_unauthenticated(&self) -> bool {
        matches!(self.reason, Some(DenialReason::TokenRefused | DenialReason::PeerUnauthenticated))
    }
}

impl Compiled {
    /// The verdict of [`Self::admit`] and, where requests are judged, of [`Self::judge_request`]. `now` in seconds since
    /// 1970.
    pub fn decide(&self, point: &Point, now: u64, signatures: &dyn Signatures) -> Decision {
        let facts = point.facts();
        let decision = |answer: Option<DenialReason>, policy, rule| Decision {
            allowed: answer.is_none(),
            reason: answer,
            policy,
            rule,
            has_bad_token: false,
            needs_request: false,
        };
        match (self.admit(&facts), &point.request) {
            (Err(denial), _) => decision(Some(denial.reason), denial.verdict.policy, denial.verdict.rule),
            (Ok(Admission::Stream(permit)), _) => {
                decision(None, permit.verdict().policy.clone(), permit.verdict().rule.clone())
            }
            (Ok(Admission::Requests), None) => Decision { needs_request: true, ..decision(None, None, None) },
            (Ok(Admission::Requests), Some(request)) => {
                let (headers, path, tokens) = self.tokens(point, request, now, signatures);
                let lines = pairs(&headers);
                let lines = lines.as_slice();
                let asked = RequestFacts {
                    method: &request.method,
                    path: path.as_deref(),
                    host: request.host.as_deref(),
                    headers: &lines,
                    tokens: &tokens,
                };
                match self.judge_request(&facts, &asked) {
                    Ok(permit) => {
                        decision(None, permit.verdict().policy.clone(), permit.verdict().rule.clone())
                    }
                    Err(denial) => Decision {
                        has_bad_token: denial.token_fault.is_some(),
                        ..decision(Some(denial.reason), denial.verdict.policy, denial.verdict.rule)
                    },
                }
            }
        }
    }
}

impl Compiled {
    /// What is sent, and what the port's rules find of tokens in it.
    fn tokens(
        &self,
        point: &Point,
        request: &RequestPoint,
        now: u64,
        signatures: &dyn Signatures,
    ) -> (Vec<(String, String)>, Option<String>, Tokens) {
        let rules = self.token_rules(&point.destination, point.port);
        let (headers, path) = request.sent(&rules.map(places).unwrap_or_default());
        let verify = |rules: &TokenRules| {
            let candidates = rules.locate(path.as_deref(), &pairs(&headers).as_slice());
            rules.verify(candidates, now, &Believing(signatures))
        };
        let tokens = rules.map_or_else(Tokens::none, verify);
        (headers, path, tokens)
    }

    /// Whether a token that was made here is valid for some issuer of the port.
    pub(crate) fn accepts_token(&self, point: &Point) -> bool {
        let tokens = point.request.as_ref().map(|request| self.tokens(point, request, 0, &NoKeys).2);
        tokens.is_some_and(|tokens| tokens.has_valid())
    }
}

fn pairs(headers: &[(String, String)]) -> Vec<(&str, &str)> {
    headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
}

/// Wherever these rules look for tokens.
pub(super) fn places(rules: &TokenRules) -> Vec<TokenPlace> {
    let mut places: Vec<TokenPlace> = rules.rules().flat_map(|rule| TokenPlace::all_of(rule)).collect();
    places.sort();
    places.dedup();
    places
}
