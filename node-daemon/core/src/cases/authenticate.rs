//! `authenticate`: raw facts in, who it is out (policy A).

use std::sync::Arc;

use serde_json::{Map, Value};
use spiffe_id::SpiffeId;

use super::{
    authorize::{HeaderLines, closed, refused},
    check::{Check, Found},
    fields::{Fields, InvalidCases},
    token::{CaseKeys, Place, carried},
    world::World,
};
use crate::{
    policy::{
        Attributes, ConnectionFacts, DenialReason, Presented, RequestDenial, RequestDenialKind, RequestFacts,
        Verdict, claims_of,
        tokens::{TokenRules, Tokens},
    },
    workload::{Protocol, TransportMode},
};

/// What a client offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offered {
    Plaintext,
    /// A mesh certificate and the mesh's ALPN.
    Mesh,
    /// The mesh's ALPN, and no certificate that counts.
    Unproven,
    /// The application's own TLS.
    Application,
}

/// What becomes of a connection before anybody looks at requests.
pub(super) enum Arrived {
    /// Known as far as this.
    As(ConnectionFacts),
    /// The kubelet probes what the workload declares (policy H-4, T-12).
    Probe,
    /// To the application, unread.
    Through(ConnectionFacts),
    /// Ended without data, and why.
    Failed(Option<String>, String),
}

pub(super) fn offered(request: &Fields) -> Result<Offered, InvalidCases> {
    let default = if request.at("client.identity").is_some() { Offered::Mesh } else { Offered::Plaintext };
    if request.at("connection.tls").is_none() {
        return Ok(default);
    }
    request.one_of(
        "connection.tls",
        &[
            ("plaintext", Offered::Plaintext),
            ("mtls", Offered::Mesh),
            ("tls-no-cert", Offered::Unproven),
            ("tls-foreign-cert", Offered::Unproven),
            ("tls-app", Offered::Application),
        ],
    )
}

/// policy
pub(super) fn arrive(check: &Check<'_>, world: &World, offered: Offered) -> Result<Arrived, InvalidCases> {
    let request = &check.case.request;
    if request.one_of("client.kind", &[("workload", false), ("kubelet", true)])?
        && offered == Offered::Plaintext
    {
        return Ok(Arrived::Probe);
    }
    let presented = match offered {
        Offered::Mesh => {
            Presented::MeshTls { peer: identity(request)?, server_name: request.text("connection.sni")? }
        }
        Offered::Plaintext | Offered::Unproven | Offered::Application => Presented::Plaintext,
    };
    let facts = ConnectionFacts {
        presented,
        source_address: world.source_address,
        destination_address: world.destination_address,
        destination_port: world.port,
        destination: Arc::clone(&world.workload),
    };
    Ok(world.arrive(facts, offered))
}

/// `client.identity`, which a mesh certificate always names.
fn identity(request: &Fields) -> Result<SpiffeId, InvalidCases> {
    let expected =
        "an identity such as cluster.local/ns/photo/sa/frontend, because a mesh certificate names somebody";
    let text = request.text("client.identity")?.unwrap_or_default();
    let uri = if text.starts_with("spiffe://") { text } else { format!("spiffe://{text}") };
    uri.parse().map_err(|_| request.invalid("client.identity", expected))
}

impl World {
    pub(super) fn arrive(&self, facts: ConnectionFacts, offered: Offered) -> Arrived {
        let (policy, mode) =
            self.compiled.selected(&self.workload, self.port).unwrap_or((None, TransportMode::Strict));
        let failed = |reason: &str| Arrived::Failed(policy.map(|label| label.to_string()), reason.to_owned());
        let asks_senders = self.compiled.asks_senders(&self.workload, self.port);
        let is_stranger = self.compiled.is_stranger(&facts);
        if let Err(denial) = self.compiled.accepts(&facts) {
            // On HTTP a stranger is answered (policy A-8); under no policy nobody looks.
            let is_read = self.protocol != Protocol::Tcp || mode == TransportMode::Disabled;
            let is_answered = is_stranger && is_read && offered == Offered::Mesh;
            if !is_answered {
                return failed(denial.reason.label());
            }
        }
        match (mode, offered) {
            (TransportMode::Disabled, Offered::Mesh) if !asks_senders => Arrived::Through(facts),
            (_, Offered::Plaintext | Offered::Mesh) => Arrived::As(facts),
            (TransportMode::Strict, Offered::Unproven | Offered::Application) => failed("plaintext_refused"),
            (TransportMode::Permissive, Offered::Unproven) => failed("no certificate of the mesh"),
            // Tokens inside TLS that nobody reads cannot be checked.
            (_, Offered::Unproven | Offered::Application) if asks_senders => {
                failed("nobody can read the request")
            }
            (_, Offered::Unproven | Offered::Application) => Arrived::Through(facts),
        }
    }
}

/// The request of a case, ready to be judged.
pub(super) struct CaseRequest {
    method: String,
    path: Option<String>,
    host: Option<String>,
    headers: HeaderLines,
    tokens: Tokens,
}

impl CaseRequest {
    pub(super) fn read(check: &Check<'_>, world: &World) -> Result<Self, InvalidCases> {
        let request = &check.case.request;
        let mut headers = HeaderLines::read(request, world.protocol)?;
        let mut path = request.text("request.path")?;
        for token in carried(request, check.mint, check.now)? {
            match token.place {
                Place::Header { name, scheme: Some(scheme) } => {
                    headers.0.push((name, format!("{scheme} {}", token.text)));
                }
                Place::Header { name, scheme: None } => headers.0.push((name, token.text)),
                Place::Query(name) => {
                    let before = path.unwrap_or_else(|| "/".to_owned());
                    let mark = if before.contains('?') { '&' } else { '?' };
                    path = Some(format!("{before}{mark}{name}={}", token.text));
                }
                Place::Cookie(name) => {
                    headers.0.push(("cookie".to_owned(), format!("{name}={}", token.text)))
                }
            }
        }
        let keys = CaseKeys::read(request, check.mint)?;
        let verify = |rules: &TokenRules| {
            let candidates = rules.locate(path.as_deref(), &headers);
            rules.verify(candidates, check.now, &keys)
        };
        let tokens =
            world.compiled.token_rules(&world.workload, world.port).map(verify).unwrap_or_else(Tokens::none);
        Ok(Self {
            method: request.text("request.method")?.unwrap_or_else(|| "GET".to_owned()),
            host: request.text("request.host")?,
            path,
            headers,
            tokens,
        })
    }

    pub(super) fn facts(&self) -> RequestFacts<'_> {
        RequestFacts {
            method: &self.method,
            path: self.path.as_deref(),
            host: self.host.as_deref(),
            headers: &self.headers,
            tokens: &self.tokens,
        }
    }
}

pub(super) fn authenticate(check: &Check<'_>) -> Result<Found, InvalidCases> {
    let world = World::new(check)?;
    let request = CaseRequest::read(check, &world)?;
    let mut found = Found::default();
    let facts = match arrive(check, &world, offered(&check.case.request)?)? {
        Arrived::As(facts) => facts,
        Arrived::Probe if !is_probe(&request.facts(), world.protocol) => {
            refused(&mut found, "DENY", &not_declared(&request.facts()));
            found.set("attributes", nobody());
            found.reason = Some(NOT_DECLARED.to_owned());
            return Ok(found);
        }
        Arrived::Probe => {
            known(&mut found, world.protocol, &Attributes::default());
            found.reason = Some("a declared probe of the kubelet".to_owned());
            return Ok(found);
        }
        Arrived::Through(_) => {
            found.set("verdict", "PASS_THROUGH");
            found.set("attributes", nobody());
            return Ok(found);
        }
        Arrived::Failed(policy, reason) => {
            closed(&mut found, "CONNECTION_FAILED");
            found.set("attributes", nobody());
            found.policy = policy;
            found.reason = Some(reason);
            return Ok(found);
        }
    };
    let (policy, _) =
        world.compiled.selected(&world.workload, world.port).unwrap_or((None, TransportMode::Strict));
    found.policy = policy.map(|label| label.to_string());
    if world.protocol == Protocol::Tcp {
        known(&mut found, world.protocol, &world.peer(&facts));
        return Ok(found);
    }
    match world.compiled.authenticate_request(&facts, &request.facts()) {
        Ok(attributes) => known(&mut found, world.protocol, &attributes),
        Err(denial) => {
            let is_bad_path = matches!(denial.kind, RequestDenialKind::BadPath(_));
            refused(&mut found, if is_bad_path { "DENY" } else { "UNAUTHENTICATED" }, &denial);
            found.set("attributes", nobody());
            let fault = denial.token_fault.map(|fault| format!(": {fault}")).unwrap_or_default();
            found.decided(&denial.verdict, Some(format!("{}{fault}", denial.reason.label())));
        }
    }
    Ok(found)
}

/// What a workload can declare of the kubelet's requests (T-12): the path is the case's.
pub(super) fn is_probe(request: &RequestFacts<'_>, protocol: Protocol) -> bool {
    match protocol {
        Protocol::Tcp => true,
        Protocol::Http => request.method == "GET",
        Protocol::Grpc => request.path == Some("/grpc.health.v1.Health/Check"),
    }
}

pub(super) const NOT_DECLARED: &str = "the kubelet asks what no probe asks";

pub(super) fn not_declared(request: &RequestFacts<'_>) -> RequestDenial {
    let (kind, reason) = (RequestDenialKind::Denied, DenialReason::NoRuleAllows);
    RequestDenial::new(kind, reason, Verdict::default(), request.headers)
}

impl World {
    /// What layer 4 knows of the peer.
    fn peer(&self, facts: &ConnectionFacts) -> Attributes {
        let (_, mode) =
            self.compiled.selected(&self.workload, self.port).unwrap_or((None, TransportMode::Strict));
        let (Presented::MeshTls { peer, .. }, TransportMode::Strict | TransportMode::Permissive) =
            (&facts.presented, mode)
        else {
            return Attributes::default();
        };
        Attributes {
            source_principal: Some(peer.principal()),
            source_namespace: Some(peer.namespace().to_owned()),
            ..Attributes::default()
        }
    }
}

fn known(found: &mut Found, protocol: Protocol, known: &Attributes) {
    found.set("verdict", "ALLOW");
    if protocol != Protocol::Tcp {
        found.set("http_status", 200);
    }
    found.set("attributes", attributes(known));
}

/// Nobody proved anything.
pub(super) fn nobody() -> Map<String, Value> {
    attributes(&Attributes::default())
}

/// policy A-14
fn attributes(known: &Attributes) -> Map<String, Value> {
    let mut all = Map::new();
    let claims = known.claims.as_ref().map(|claims| {
        let names = claims.as_object().into_iter().flatten().map(|(name, _)| name);
        let told = names.filter_map(|name| {
            let values = claims_of(claims, &[name.as_str().into()], &known.spaced);
            let values: Vec<Value> = values.iter().map(|value| Value::from(&**value)).collect();
            (!values.is_empty()).then(|| (name.clone(), Value::from(values)))
        });
        told.collect::<Map<_, _>>()
    });
    for (name, value) in [
        ("source.principal", &known.source_principal),
        ("source.user", &known.source_principal),
        ("source.namespace", &known.source_namespace),
        ("request.auth.principal", &known.principal),
        ("request.auth.audiences", &known.audience),
        ("request.auth.presenter", &known.presenter),
    ] {
        all.insert(name.to_owned(), value.clone().into());
    }
    let raw = known.claims.as_ref().map(Value::to_string);
    all.insert("request.auth.claims".to_owned(), claims.map_or(Value::Null, Value::Object));
    all.insert("request.auth.raw_claims".to_owned(), raw.into());
    all
}
