//! Who is it (policy A-4 to A-10, F-1, F-2): transport, the peer step, the origin step, in this order (policy A-7).

use serde_json::Value;

use crate::{
    facts::{Connection, Document, Mode, Peer, Protocol, Request, World, by_age, entries},
    token::{self, Issuer},
};

/// What came out of authentication.
pub enum Identified {
    Closed,
    Unauthenticated,
    As(Known),
}

#[derive(Default)]
pub struct Known {
    /// `source.principal`
    pub peer: Option<Peer>,
    /// `request.auth.principal`
    pub principal: Option<String>,
    /// Of the one token that was accepted.
    pub claims: Option<Value>,
    pub spaced: Vec<String>,
}

/// What applies to a port.
enum Applies<'w> {
    Nothing,
    Policy(&'w Document),
    /// One that could not be read (policy A-3).
    Refuses,
}

/// Exactly one policy (policy A-4).
fn policy(world: &World, port: u16) -> Applies<'_> {
    let owner = world.owner(port);
    let own = by_age(world.of_kind("Policy").filter(|policy| policy.namespace() == world.workload.namespace));
    let of_service = own.iter().copied().find(|policy| {
        let Some((service, service_port)) = owner else { return false };
        entries(&policy.spec()["targets"]).iter().any(|target| {
            let ports = entries(&target["ports"]);
            let includes = |written: &Value| {
                written["number"].as_u64() == Some(u64::from(service_port.port))
                    || written["name"].as_str() == Some(&service_port.name)
            };
            target["name"].as_str() == Some(&service.name) && (ports.is_empty() || ports.iter().any(includes))
        })
    });
    let of_namespace = || own.iter().copied().find(|policy| policy.name() == "default");
    let of_mesh = || world.of_kind("MeshPolicy").find(|policy| policy.name() == "default");
    match of_service.or_else(of_namespace).or_else(of_mesh) {
        Some(policy) if policy.is_broken => Applies::Refuses,
        Some(policy) => Applies::Policy(policy),
        None => Applies::Nothing,
    }
}

/// The first `mtls` decides (policy A-2).
fn mode_of(policy: &Document) -> Mode {
    let written = entries(&policy.spec()["peers"])
        .iter()
        .find_map(|peer| peer.get("mtls").or_else(|| peer.get("mTLS"))); // policy 0-3
    match written {
        None => Mode::Disabled,
        Some(mtls) if mtls["mode"].as_str() == Some("PERMISSIVE") => Mode::Permissive,
        Some(_) => Mode::Strict,
    }
}

/// What the PeerAuthentications say; `None`: nothing, at no level (policy F-1). `Err`: one that could not be read.
fn by_peer_authentication(world: &World, port: u16) -> Option<Result<Mode, ()>> {
    let has_selector = |document: &&Document| {
        document.spec()["selector"]["matchLabels"].as_object().is_some_and(|labels| !labels.is_empty())
    };
    let all = || world.of_kind("PeerAuthentication");
    let own = || all().filter(|document| document.namespace() == world.workload.namespace);
    let levels = [
        by_age(own().filter(has_selector).filter(|document| world.selects(document))),
        by_age(own().filter(|document| !has_selector(document))),
        by_age(
            all()
                .filter(|d| d.namespace() == world.root_namespace)
                .filter(|document| !has_selector(document)),
        ),
    ];
    for level in levels {
        let Some(oldest) = level.first() else { continue };
        if oldest.is_broken {
            return Some(Err(()));
        }
        let by_port = mode_named(&oldest.spec()["portLevelMtls"][port.to_string().as_str()]);
        if let Some(mode) = by_port.or_else(|| mode_named(&oldest.spec()["mtls"])) {
            return Some(Ok(mode));
        }
    }
    None
}

/// `None`: UNSET.
fn mode_named(mtls: &Value) -> Option<Mode> {
    match mtls["mode"].as_str() {
        Some("STRICT") => Some(Mode::Strict),
        Some("PERMISSIVE") => Some(Mode::Permissive),
        Some("DISABLE") => Some(Mode::Disabled),
        _ => None,
    }
}

/// What the port accepts. `Err`: nobody can tell, so nobody gets in.
fn mode(world: &World, port: u16) -> Result<Mode, ()> {
    let by_policy = match policy(world, port) {
        Applies::Refuses => return Err(()),
        Applies::Policy(policy) => mode_of(policy),
        Applies::Nothing => world.default_mode,
    };
    // policy F-4
    by_peer_authentication(world, port).unwrap_or(Ok(by_policy))
}

fn is_foreign(world: &World, connection: &Connection) -> bool {
    connection.peer.as_ref().is_some_and(|peer| !world.domains().contains(&peer.domain))
}

/// Whether the connection ends before anybody reads a request.
pub fn transport_closes(world: &World, connection: &Connection) -> bool {
    match mode(world, connection.port) {
        Err(()) => true,
        Ok(Mode::Strict) if connection.peer.is_none() => true,
        Ok(_) => world.protocol(connection.port) == Protocol::Tcp && is_foreign(world, connection),
    }
}

/// `path` is in its normal form.
pub fn identify(
    world: &World,
    connection: &Connection,
    request: Option<&Request>,
    path: Option<&str>,
) -> Identified {
    if transport_closes(world, connection) {
        return Identified::Closed;
    }
    let Ok(mode) = mode(world, connection.port) else { return Identified::Closed };
    // policy A-5, B-9: without mtls nobody has an identity.
    let peer = connection.peer.clone().filter(|_| mode != Mode::Disabled);
    let Some(request) = request else {
        return Identified::As(Known { peer, ..Known::default() }); // policy A-7: origins have no effect on TCP
    };
    let policy = match policy(world, connection.port) {
        Applies::Policy(policy) => Some(policy.spec()),
        Applies::Nothing | Applies::Refuses => None,
    };
    let flag = |name: &str| policy.is_some_and(|spec| spec[name].as_bool() == Some(true));
    // policy A-8
    let peer = if peer.is_some() && is_foreign(world, connection) {
        if !flag("peerIsOptional") {
            return Identified::Unauthenticated;
        }
        None
    } else {
        peer
    };
    let requests: Vec<&Document> =
        by_age(world.of_kind("RequestAuthentication").filter(|document| world.selects(document)));
    if requests.iter().any(|document| document.is_broken) {
        return Identified::Unauthenticated;
    }
    let mut known = Known { peer, ..Known::default() };
    if !origin_step(world, policy, request, path, &mut known) {
        return Identified::Unauthenticated;
    }
    if requests.is_empty() {
        return Identified::As(known);
    }
    if request_step(world, &requests, request, &mut known) {
        Identified::As(known)
    } else {
        Identified::Unauthenticated
    }
}

/// policy A-9
fn origin_step(
    world: &World,
    policy: Option<&Value>,
    request: &Request,
    path: Option<&str>,
    known: &mut Known,
) -> bool {
    let by_peer = known.peer.as_ref().map(Peer::principal);
    let Some(spec) = policy else {
        known.principal = by_peer;
        return true;
    };
    let origins: Vec<&Value> = entries(&spec["origins"]).iter().map(|origin| &origin["jwt"]).collect();
    let has_peers = !entries(&spec["peers"]).is_empty();
    let uses_origin = spec["principalBinding"].as_str() == Some("USE_ORIGIN");
    let is_optional = spec["originIsOptional"].as_bool() == Some(true);
    if origins.is_empty() && !(uses_origin && has_peers) {
        known.principal = by_peer; // policy A-14: under USE_PEER the peer all the same; A-3.10
        return true;
    }
    let filled = |name: &str| {
        request.headers.iter().any(|(own, value)| own.eq_ignore_ascii_case(name) && !value.is_empty())
    };
    let is_preflight =
        request.method == "OPTIONS" && filled("origin") && filled("access-control-request-method"); // policy A-9.7
    let triggered: Vec<&&Value> = origins.iter().filter(|jwt| is_triggered(jwt, path)).collect(); // policy A-9.2
    let nothing_asked = is_preflight || (!origins.is_empty() && triggered.is_empty()); // policy A-9.4
    let accepted = if nothing_asked {
        None
    } else {
        let found = triggered.iter().find_map(|jwt| {
            let issuer = Issuer { written: jwt, is_of_2018: true };
            issuer.finds(request).into_iter().find(|token| issuer.accepts(token, world.now))
        });
        match found {
            Some(token) => Some(token),         // policy A-9.3
            None if is_optional => return true, // policy A-9.6: no principal, under either binding
            None => return false,               // policy A-9.1, A-9.5
        }
    };
    known.claims = accepted.map(|token| token.claims.clone());
    known.principal = if uses_origin { known.claims.as_ref().and_then(token::principal) } else { by_peer };
    true
}

/// policy A-10
fn is_triggered(jwt: &Value, path: Option<&str>) -> bool {
    let rules = entries(&jwt["triggerRules"]);
    let Some(path) = path else { return true };
    let matches = |list: &Value| entries(list).iter().any(|each| string_match(each, path));
    rules.is_empty()
        || rules.iter().any(|rule| {
            let included = entries(&rule["includedPaths"]);
            !matches(&rule["excludedPaths"]) && (included.is_empty() || matches(&rule["includedPaths"]))
        })
}

fn string_match(written: &Value, path: &str) -> bool {
    let text = |name: &str| written[name].as_str();
    if let Some(exact) = text("exact") {
        return path == exact;
    }
    if let Some(prefix) = text("prefix") {
        return path.starts_with(prefix);
    }
    if let Some(suffix) = text("suffix") {
        return path.ends_with(suffix);
    }
    let whole = format!(r"\A(?:{})\z", text("regex").unwrap_or_default());
    regex::Regex::new(&whole).is_ok_and(|regex| regex.is_match(path))
}

/// A token that stands where a rule looks must be valid for one of the rules; none is fine (policy F-2).
fn request_step(world: &World, documents: &[&Document], request: &Request, known: &mut Known) -> bool {
    let rules: Vec<&Value> =
        documents.iter().flat_map(|document| entries(&document.spec()["jwtRules"])).collect();
    if rules.is_empty() {
        return true;
    }
    // The current API knows no principal but a token's.
    known.principal = None;
    let issuers: Vec<Issuer<'_>> =
        rules.iter().map(|rule| Issuer { written: rule, is_of_2018: false }).collect();
    for issuer in &issuers {
        for found in issuer.finds(request) {
            let is_good = issuers.iter().any(|other| {
                other.finds(request).iter().any(|own| std::ptr::eq(*own, found))
                    && other.accepts(found, world.now)
            });
            if !is_good {
                return false;
            }
        }
    }
    let first = issuers.iter().find_map(|issuer| {
        let token = issuer.finds(request).into_iter().find(|token| issuer.accepts(token, world.now))?;
        Some((issuer, token))
    });
    if let Some((issuer, token)) = first {
        known.claims = Some(token.claims.clone());
        known.principal = token::principal(&token.claims);
        known.spaced = crate::facts::texts(&issuer.written["spaceDelimitedClaims"]);
    }
    true
}
