//! A second evaluator of policy, naive on purpose: a plain reading of the policy specification over the documents as
//! they are written, slow, without any compiled form. What it says is compared with the evaluator that enforces
//! (`tests/agree.rs`); where the two differ, one of them has misread the specification.
//!
//! In come documents, facts of one connection and of one request; out comes an [`Outcome`]. It knows nothing of
//! `node-core`: an error that both share would go unseen.
//!
//! 1. [`facts`]: what is asked.
//! 2. [`text`], [`path`], [`token`]: matchers, the form of a path, the validity of a token.
//! 3. [`authentication`]: transport, the peer step, the origin step (policy A, F-1, F-2).
//! 4. [`roles`], [`current`]: the rules of both ages (policy B, F-3).
//! 5. [`client`]: the choice of a DestinationRule (policy C).
#![forbid(unsafe_code)]

pub mod authentication;
pub mod client;
pub mod current;
pub mod facts;
pub mod path;
pub mod roles;
pub mod text;
pub mod token;

use crate::{
    authentication::{Identified, identify},
    facts::{Connection, Outcome, Protocol, Request, Seen, Verdict, World},
};

/// What becomes of one request on one connection; on a TCP port of the connection.
pub fn judge(world: &World, connection: &Connection, request: &Request) -> Verdict {
    let protocol = world.protocol(connection.port);
    let asked = (protocol != Protocol::Tcp).then_some(request);
    // policy B-5, T-22: before anybody looks at anything else
    let normal = match asked
        .map(|request| request.path.as_deref().map(|path| path::normalise(path, &request.method)))
    {
        Some(Some(Err(path::Unusable))) => {
            return match authentication::transport_closes(world, connection) {
                true => Verdict::of(Outcome::Closed),
                false => Verdict::of(Outcome::Refused(400)),
            };
        }
        Some(Some(Ok(normal))) => Some(normal),
        Some(None) | None => None,
    };
    let known =
        match identify(world, connection, asked, normal.as_ref().map(|normal| normal.matched.as_str())) {
            Identified::Closed => return Verdict::of(Outcome::Closed),
            Identified::Unauthenticated => return Verdict::of(Outcome::Refused(401)),
            Identified::As(known) => known,
        };
    let seen = Seen {
        peer: known.peer.clone(),
        server_name: connection.server_name.clone(),
        source: connection.source,
        destination: world.workload.address,
        port: connection.port,
        request: asked.map(|request| facts::SeenRequest {
            method: request.method.clone(),
            path: normal.as_ref().map(|normal| normal.matched.clone()),
            host: request.host.clone(),
            headers: request.headers.clone(),
            principal: known.principal.clone(),
            claims: known.claims.clone(),
            spaced: known.spaced.clone(),
        }),
    };
    let allowed = authorise(world, &seen, false);
    let would_be = authorise(world, &seen, true);
    let outcome = match (allowed, protocol) {
        (true, _) => Outcome::Delivered(normal.map(|normal| normal.upstream)),
        (false, Protocol::Tcp) => Outcome::Closed,
        (false, Protocol::Http) => Outcome::Refused(403),
    };
    Verdict { outcome, would_be: Some(would_be), principal: known.principal, peer: known.peer }
}

/// `tried`: as if everything were enforced that is only tried (policy B-11, F-3).
fn authorise(world: &World, seen: &Seen, tried: bool) -> bool {
    // policy F-4: the current API sets roles aside only by what is enforced and decides.
    match current::judge(world, seen, tried) {
        Some(allowed) => allowed,
        None => roles::judge(world, seen, tried),
    }
}
