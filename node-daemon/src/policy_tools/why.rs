//! `culvert why`: one connection or request, followed from its caller to the verdict.
//!
//! It goes the way of traffic: a target resolves to an endpoint by [`Snapshot::route`], and the endpoint's policy judges.

use std::{
    cell::Cell,
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use node_core::{
    policy::{
        Admission, Change, ConnectionFacts, Considered, DenialReason, Explanation, Headers, Mismatch, Point,
        Presented, RequestFacts, RequestPoint,
        tokens::{Algorithm, KeySet, KeySource, Signatures, TokenFault, TokenRules, Tokens},
    },
    snapshot::{Route, Snapshot},
    workload::{ObjectName, Workload},
};
use spiffe_id::TrustDomain;

use super::library;
use crate::jwks;

const WHOLE: &str = "the connection is judged as a whole: method, path, headers and token do not count";
const ASSUMED: &str = "the token's signature is taken for good: keys of issuers are not fetched here";

/// What is asked.
#[derive(Debug)]
pub struct Question {
    /// A workload or a service account as `namespace/name`, an identity, or a workload's address.
    pub from: String,
    /// A service or a workload as `namespace/name` or by its name in DNS, or an address; then `:` and a port.
    pub to: String,
    /// Method, and path with query.
    pub request: Option<(String, String)>,
    pub headers: Vec<(String, String)>,
    /// Sent as `Authorization: Bearer`.
    pub token: Option<String>,
}

/// Displays as several lines.
#[derive(Debug)]
pub struct Answer {
    pub allowed: bool,
    subject: String,
    identity: String,
    explanation: Explanation,
    change: Vec<String>,
    /// Ways to turn the verdict over with the fewest attributes.
    smallest: Vec<Vec<Change>>,
    notes: Vec<String>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum NoAnswer {
    #[error("{0}")]
    Documents(String),
    #[error("{0} is no workload, service account, identity or workload's address of these documents")]
    Caller(String),
    #[error(
        "{0}: expected a service, a workload or an address, then a colon and a port, such as photo/backend:80"
    )]
    Target(String),
    #[error("{0} is no service or workload with an address of these documents")]
    UnknownTarget(String),
    #[error("nobody is asked: {0}")]
    NotJudged(String),
    #[error("port {0} is judged request by request: say method and path, such as GET /")]
    RequestNeeded(u16),
}

/// Answers from the documents of a folder, or of one file.
///
/// # Errors
/// What cannot be read or is not in the documents.
pub fn why(documents: &Path, trust_domain: &TrustDomain, question: &Question) -> Result<Answer, NoAnswer> {
    let files = library::load(documents).map_err(NoAnswer::Documents)?;
    // Policies are compiled for one node: that of the destination, which has to be found first.
    let anywhere = library::snapshot(&files, "", trust_domain);
    let (_, found) = follow(&anywhere, question)?;
    let snapshot = library::snapshot(&files, &found.destination.node, trust_domain);
    let (caller, found) = follow(&snapshot, question)?;
    judge(&snapshot, &caller, &found, question)
}

/// Where a connection ends.
struct Found {
    destination: Arc<Workload>,
    endpoint: SocketAddr,
    service: Option<ObjectName>,
}

fn follow(snapshot: &Snapshot, question: &Question) -> Result<(Arc<Workload>, Found), NoAnswer> {
    let caller = caller(snapshot, &question.from)?;
    let target = target(snapshot, &caller, &question.to)?;
    let not_judged = |why: String| Err(NoAnswer::NotJudged(format!("{} {why}", question.to)));
    let leaving = snapshot.leave(&caller, target, 0);
    match leaving.route {
        Route::Tunnel { destination, endpoint, service, .. } => {
            Ok((caller, Found { destination, endpoint, service }))
        }
        Route::Passthrough { target } => not_judged(match leaving.decided {
            Some(decided) => format!(
                "({target}) is reached past the tunnel and without an identity: {} says so ({})",
                decided.policy, decided.rule
            ),
            None => format!("({target}) is not enrolled in the mesh"),
        }),
        Route::Unknown => not_judged(format!("({target}) is an address of the mesh that belongs to nobody")),
        Route::Refused(refusal) => not_judged(format!("is refused at its caller: {refusal}")),
    }
}

fn caller(snapshot: &Snapshot, from: &str) -> Result<Arc<Workload>, NoAnswer> {
    let name = object_name(from);
    let by_name = name.as_ref().and_then(|name| snapshot.workload(name));
    let address: Option<IpAddr> = from.parse().ok();
    let uri = if from.contains("://") { from.to_owned() } else { format!("spiffe://{from}") };
    let fits = |workload: &Workload| {
        let is_account = name.as_ref().is_some_and(|name| {
            workload.name.namespace == name.namespace && *workload.service_account == *name.name
        });
        let is_there = address.is_some_and(|address| workload.addresses.contains(&address));
        is_account || is_there || workload.identity.to_string() == uri
    };
    let found = by_name.or_else(|| snapshot.workloads().find(|workload| fits(workload)));
    found.cloned().ok_or_else(|| NoAnswer::Caller(from.to_owned()))
}

/// The address that the caller would dial.
fn target(snapshot: &Snapshot, caller: &Workload, to: &str) -> Result<SocketAddr, NoAnswer> {
    let malformed = || NoAnswer::Target(to.to_owned());
    let (host, port) = to.rsplit_once(':').ok_or_else(malformed)?;
    let port: u16 = port.parse().map_err(|_| malformed())?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if let Ok(address) = bare.parse() {
        return Ok(SocketAddr::new(address, port));
    }
    let name = object_name(host).ok_or_else(malformed)?;
    let service = snapshot.services().find(|service| service.name == name);
    let has_port = service.is_some_and(|service| service.ports.iter().any(|each| each.port == port));
    let of_service = service.map_or(&[][..], |service| &service.addresses);
    let of_workload = snapshot.workload(&name).map_or(&[][..], |workload| &workload.addresses);
    let addresses =
        if !of_service.is_empty() && (has_port || of_workload.is_empty()) { of_service } else { of_workload };
    let is_v4 = caller.addresses.first().is_none_or(IpAddr::is_ipv4);
    let same_family = addresses.iter().find(|address| address.is_ipv4() == is_v4);
    let address = same_family.or_else(|| addresses.first());
    let address = address.ok_or_else(|| NoAnswer::UnknownTarget(host.to_owned()))?;
    Ok(SocketAddr::new(*address, port))
}

/// `namespace/name`, or `name.namespace` with or without what DNS has behind it.
fn object_name(text: &str) -> Option<ObjectName> {
    if let Some((namespace, name)) = text.split_once('/') {
        return Some(ObjectName::new(namespace, name));
    }
    let mut parts = text.split('.');
    let (name, namespace) = (parts.next()?, parts.next()?);
    Some(ObjectName::new(namespace, name))
}

fn judge(
    snapshot: &Snapshot,
    caller: &Workload,
    found: &Found,
    question: &Question,
) -> Result<Answer, NoAnswer> {
    let same_family =
        caller.addresses.iter().find(|address| address.is_ipv4() == found.endpoint.is_ipv4()).copied();
    let facts = ConnectionFacts {
        presented: match caller.enrolled {
            true => Presented::Tunnel(caller.identity.clone()),
            false => Presented::Plaintext,
        },
        source_address: same_family
            .or_else(|| caller.addresses.first().copied())
            .unwrap_or_else(|| found.endpoint.ip()),
        destination_address: found.endpoint.ip(),
        destination_port: found.endpoint.port(),
        destination: Arc::clone(&found.destination),
    };
    let rules = snapshot.token_rules(&found.destination, found.endpoint.port());
    let asked = Asked::new(question, rules);
    let request = asked.facts();
    let mut notes = library::problems(snapshot);
    let (denied, is_by_request) = match (snapshot.admit(&facts), &request) {
        (Err(denial), _) => (Some(denial.reason), false),
        (Ok(Admission::Stream(_)), _) => (None, false),
        (Ok(Admission::Requests), Some(request)) => {
            (snapshot.judge_request(&facts, request).err().map(|denial| denial.reason), true)
        }
        (Ok(Admission::Requests), None) => {
            return Err(NoAnswer::RequestNeeded(found.endpoint.port()));
        }
    };
    if request.is_some() && !is_by_request {
        notes.push(WHOLE.to_owned());
    }
    if asked.has_assumed && is_by_request {
        notes.push(ASSUMED.to_owned());
    }
    let explanation = snapshot.explain(&facts, request.as_ref().filter(|_| is_by_request));
    let service = found.service.as_ref().map(|service| format!(", of service {service}"));
    Ok(Answer {
        allowed: explanation.allowed,
        subject: format!(
            "{} to {} port {}{}",
            caller.name,
            found.destination.name,
            found.endpoint.port(),
            service.unwrap_or_default()
        ),
        identity: if caller.enrolled { caller.identity.to_string() } else { "nobody (plaintext)".to_owned() },
        change: change(denied, &explanation.considered),
        smallest: smallest(snapshot, &facts, &asked, is_by_request),
        explanation,
        notes,
    })
}

/// The request of a question, its token verified.
struct Asked<'q> {
    question: &'q Question,
    headers: Lines,
    tokens: Tokens,
    has_assumed: bool,
    /// Seconds since 1970.
    now: u64,
}

impl<'q> Asked<'q> {
    fn new(question: &'q Question, rules: Option<&TokenRules>) -> Self {
        let mut headers = Lines(question.headers.clone());
        if let Some(token) = &question.token {
            headers.0.push(("authorization".to_owned(), format!("Bearer {token}")));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
        let keys = KeysAtHand::default();
        let path = question.request.as_ref().map(|(_, path)| path.as_str());
        let verify = |rules: &TokenRules| rules.verify(rules.locate(path, &headers), now, &keys);
        let tokens = rules.map_or_else(Tokens::none, verify);
        Self { question, headers, tokens, has_assumed: keys.has_assumed.get(), now }
    }

    fn facts(&self) -> Option<RequestFacts<'_>> {
        let (method, path) = self.question.request.as_ref()?;
        let host = self.headers.0.iter().find(|(name, _)| name.eq_ignore_ascii_case("host"));
        // What a client writes that was given this name.
        let dialled = Some(self.question.to.as_str()).filter(|to| !to.contains('/'));
        Some(RequestFacts {
            method,
            path: Some(path),
            host: host.map(|(_, value)| value.as_str()).or(dialled),
            headers: &self.headers,
            tokens: &self.tokens,
        })
    }
}

struct Lines(Vec<(String, String)>);

impl Headers for Lines {
    fn each(&self, name: &str, visit: &mut dyn FnMut(&[u8])) {
        let lines = self.0.iter().filter(|(written, _)| written.eq_ignore_ascii_case(name));
        lines.for_each(|(_, value)| visit(value.as_bytes()));
    }
}

/// Keys that stand in a policy count; those of servers are not here, and their signatures are taken for good.
#[derive(Default)]
struct KeysAtHand {
    has_assumed: Cell<bool>,
}

impl Signatures for KeysAtHand {
    fn verify(
        &self,
        keys: &KeySource,
        algorithm: Algorithm,
        kid: Option<&str>,
        signed: &[u8],
        signature: &[u8],
    ) -> Result<(), TokenFault> {
        let KeySource::Inline(text) = keys else {
            self.has_assumed.set(true);
            return Ok(());
        };
        let set = KeySet::parse(text).map_err(|_| TokenFault::KeysUnavailable)?;
        let mut candidates = set.candidates(algorithm, kid).peekable();
        if candidates.peek().is_none() {
            return Err(TokenFault::NoKey);
        }
        let is_good = candidates.any(|key| jwks::is_signed_by(key, algorithm, signed, signature));
        if is_good { Ok(()) } else { Err(TokenFault::Signature) }
    }
}

/// The fewest attributes of the caller or the request that would turn the verdict over.
fn smallest(
    snapshot: &Snapshot,
    facts: &ConnectionFacts,
    asked: &Asked<'_>,
    is_by_request: bool,
) -> Vec<Vec<Change>> {
    let peer = match &facts.presented {
        Presented::Tunnel(peer) | Presented::Attested(peer) | Presented::MeshTls { peer, .. } => {
            Some(peer.clone())
        }
        Presented::Plaintext => None,
    };
    let request = asked.facts().filter(|_| is_by_request).map(|request| {
        RequestPoint::new(request.method, request.path, request.host, asked.headers.0.clone())
    });
    let point = Point {
        destination: Arc::clone(&facts.destination),
        port: facts.destination_port,
        destination_address: facts.destination_address,
        source_address: facts.source_address,
        peer,
        is_attested: matches!(facts.presented, Presented::Attested(_)),
        server_name: None,
        request,
    };
    snapshot.compiled().smallest_changes(&point, asked.now, &KeysAtHand::default())
}

/// The least that would turn the verdict over.
fn change(denied: Option<DenialReason>, considered: &[Considered]) -> Vec<String> {
    let words = |text: &str| vec![text.to_owned()];
    match denied {
        None => to_deny(considered),
        Some(DenialReason::DeniedByRule | DenialReason::NoRuleAllows) => to_allow(considered),
        Some(DenialReason::PlaintextRefused | DenialReason::PeerUnauthenticated) => {
            words("the caller is enrolled, so that it can prove who it is")
        }
        Some(DenialReason::TrustDomain) => {
            words("the Mesh document lists the caller's trust domain under trustDomainAliases")
        }
        Some(DenialReason::PolicyUnusable) => words("the object that cannot be used is corrected or removed"),
        Some(DenialReason::NotEnrolled) => words("the destination is enrolled"),
        Some(DenialReason::TokenRefused) => words("the request carries a token that the policy accepts"),
        Some(DenialReason::IdentityBarred) => words("neither identity is barred any more"),
        Some(DenialReason::BadPath) => words("the path is one that can be judged"),
    }
}

/// No rule that denies may match, and one that allows must.
fn to_allow(considered: &[Considered]) -> Vec<String> {
    let denying = considered.iter().filter(|rule| rule.denies && rule.missing.is_empty());
    let mut all: BTreeSet<String> = denying.map(|rule| format!("{} does not match", named(rule))).collect();
    let mut allowing = considered.iter().filter(|rule| !rule.denies).peekable();
    let has_any = allowing.peek().is_some();
    let nearest = allowing.min_by_key(|rule| rule.missing.len());
    match nearest {
        Some(rule) if !rule.missing.is_empty() => {
            all.insert(format!("{} matches: {}", named(rule), listed(&rule.missing)));
        }
        None if all.is_empty() && !has_any => {
            all.insert("some rule allows it: none names this port".to_owned());
        }
        Some(_) | None => {}
    }
    all.into_iter().collect()
}

/// Either no rule that allows matches, or one that denies does; where nothing allows, only the second.
fn to_deny(considered: &[Considered]) -> Vec<String> {
    let allowing: BTreeSet<String> =
        considered.iter().filter(|rule| !rule.denies && rule.missing.is_empty()).map(named).collect();
    let mut ways = Vec::new();
    if !allowing.is_empty() {
        let names: Vec<String> = allowing.into_iter().collect();
        ways.push(format!("{} did not match", names.join(" and ")));
    }
    let nearest = considered.iter().filter(|rule| rule.denies).min_by_key(|rule| rule.missing.len());
    ways.extend(nearest.map(|rule| format!("{} matched: {}", named(rule), listed(&rule.missing))));
    if ways.len() < 2 { ways } else { vec![ways.join(", or ")] }
}

fn named(rule: &Considered) -> String {
    format!("{} {}", rule.policy, rule.rule)
}

fn listed(missing: &[Mismatch]) -> String {
    missing.iter().map(Mismatch::to_string).collect::<Vec<_>>().join("; ")
}

impl fmt::Display for Answer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verdict, other) = if self.allowed { ("allowed", "denied") } else { ("denied", "allowed") };
        writeln!(formatter, "{verdict}: {}", self.subject)?;
        writeln!(formatter, "caller: {}", self.identity)?;
        let decided = [self.explanation.policy.as_deref(), self.explanation.rule.as_deref()];
        let decided: Vec<&str> = decided.into_iter().flatten().collect();
        let decided = if decided.is_empty() { "no object".to_owned() } else { decided.join(" ") };
        writeln!(formatter, "decided by: {decided}")?;
        writeln!(formatter, "reason: {}", self.explanation.reason)?;
        if !self.change.is_empty() {
            writeln!(formatter, "{other} if: {}", self.change.join(", and "))?;
        }
        for changes in &self.smallest {
            let each = changes
                .iter()
                .map(|Change { attribute, from, to }| format!("{attribute} {to} instead of {from}"));
            writeln!(formatter, "{other} with: {}", each.collect::<Vec<_>>().join(", and "))?;
        }
        self.notes.iter().try_for_each(|note| writeln!(formatter, "note: {note}"))
    }
}
