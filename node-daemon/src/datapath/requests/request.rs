//! One request: its head -> tokens -> the policy -> the workload, and its answer back.

use std::{convert::Infallible, future::poll_fn, sync::Arc};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use hyper::body::{Body as _, Incoming};
use node_core::{
    policy::{Answer, DENIED_BODY, RequestDenial, RequestPermit, tokens::Tokens},
    snapshot::Snapshot,
};

use super::{
    Client, Upgrade,
    body::{Reply, Upload},
    exchange::Exchange,
    flights::{Asked, Flight, Lines, Waiter},
    head::{self, BadHead, Way},
    upstream::Unanswered,
};
use crate::telemetry::{Reason, Verdict};

/// What a client is told when its request has no one reading.
const BAD_REQUEST_BODY: &str = "Bad Request";

/// What a client is told when the workload is not there, and when it broke off.
const UNREACHED_BODY: &str = "upstream connect error";
const BROKEN_BODY: &str = "upstream broke off";

/// The codes of gRPC for a no of the policy, and for a server that is away.
const GRPC_PERMISSION_DENIED: u8 = 7;
const GRPC_UNAVAILABLE: u8 = 14;

/// Answers one request of a client.
pub(super) async fn serve(
    client: Arc<Client>,
    mut request: Request<Incoming>,
) -> Result<Response<Reply>, Infallible> {
    let upgrade = hyper::upgrade::on(&mut request);
    if request.headers().contains_key(header::UPGRADE) {
        client.join(Upgrade { client: upgrade.clone(), joined: None });
    }
    let (parts, body) = request.into_parts();
    let protocol = protocol(&parts);
    let mut exchange = Exchange::new(
        Arc::clone(&client.telling),
        protocol,
        parts.method.clone(),
        parts.uri.path_and_query().cloned(),
    );
    let (asked, way) = match head::read(parts, !body.is_end_stream()) {
        Ok(read) => read,
        Err(bad) => return Ok(bad_head(bad, exchange)),
    };
    exchange.asks_for(asked.host.as_deref());
    Ok(judged(&client, asked, way, body, upgrade, exchange).await)
}

fn protocol(parts: &http::request::Parts) -> &'static str {
    let kind = parts.headers.get(header::CONTENT_TYPE);
    match parts.version {
        _ if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) => "grpc",
        Version::HTTP_2 => "http/2",
        Version::HTTP_10 => "http/1.0",
        _ => "http/1.1",
    }
}

async fn judged(
    client: &Arc<Client>,
    asked: Asked,
    way: Way,
    body: Incoming,
    upgrade: hyper::upgrade::OnUpgrade,
    mut exchange: Exchange,
) -> Response<Reply> {
    let snapshot = client.shared.snapshot();
    exchange.judged_by(snapshot.number());
    // Nothing is judged by a snapshot that would not let the connection in.
    let connection = client.flights.connection();
    if let Err(denial) = snapshot.admit(connection) {
        exchange.turned_away(denial, StatusCode::FORBIDDEN);
        return closing(text(StatusCode::FORBIDDEN, DENIED_BODY));
    }
    let tokens = tokens(client, &snapshot, &asked).await;
    let permit = match asked.judge(connection, &snapshot, &tokens) {
        Ok(permit) => permit,
        Err(denial) => return denied(&denial, exchange),
    };
    let path = head::path(&asked, &permit);
    exchange.permitted(&permit, path);
    let airborne = client.flights.register(asked, &snapshot);
    client.flights.confirm(airborne.flight(), &client.shared.snapshot());
    let flight = Arc::clone(airborne.flight());
    exchange.takes_off(airborne);
    if let Some(denial) = flight.cut() {
        return denied(denial, exchange);
    }
    if exchange.decided().is_err() {
        return unrecorded(&way, exchange);
    }
    forward(client, &flight, &way, &permit, body, upgrade, exchange).await
}

/// What the tokens of a request are worth. Waits for keys that were never fetched, or that lack one, for a bounded time.
async fn tokens(client: &Client, snapshot: &Snapshot, asked: &Asked) -> Tokens {
    let connection = client.flights.connection();
    let Some(rules) = snapshot.token_rules(&connection.destination, connection.destination_port) else {
        return Tokens::none();
    };
    let candidates = rules.locate(asked.path(), &Lines(&asked.headers));
    if candidates.is_empty() {
        return Tokens::none();
    }
    let keys = &client.shared.keys;
    keys.ready(rules.key_sources()).await;
    let (tokens, missed) = {
        let signatures = keys.signatures();
        let tokens = rules.verify(candidates, asked.arrived, &signatures);
        (tokens, signatures.missed())
    };
    if missed.is_empty() || !keys.refresh(missed).await {
        return tokens;
    }
    let candidates = rules.locate(asked.path(), &Lines(&asked.headers));
    rules.verify(candidates, asked.arrived, &keys.signatures())
}

async fn forward(
    client: &Arc<Client>,
    flight: &Arc<Flight>,
    way: &Way,
    permit: &RequestPermit,
    body: Incoming,
    upgrade: hyper::upgrade::OnUpgrade,
    mut exchange: Exchange,
) -> Response<Reply> {
    let body = Upload::new(body, Arc::clone(flight));
    let Some(request) = head::forwarded(flight.asked(), way, permit, body) else {
        return bad_head(BadHead::Host, exchange);
    };
    let connection = client.flights.connection();
    let answer = tokio::select! {
        biased;
        () = poll_fn(|context| flight.poll_cut(context, Waiter::Head).map(|_| ())) => None,
        answer = client.upstream.send(permit, connection, request) => Some(answer),
    };
    match answer {
        None => {
            let denial = flight.cut().cloned();
            match denial {
                Some(denial) => denied(&denial, exchange),
                None => closing(text(StatusCode::FORBIDDEN, DENIED_BODY)),
            }
        }
        Some(Ok(answer)) if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
            upgraded(client, way, answer, upgrade, exchange)
        }
        Some(Ok(answer)) => relayed(answer, way, exchange),
        Some(Err(unanswered)) => {
            // What broke may be the client's own body.
            if client.signals.is_refused() {
                exchange.answered(StatusCode::BAD_REQUEST, Verdict::Denied, Some(Reason::Protocol), None);
                return closing(text(StatusCode::BAD_REQUEST, BAD_REQUEST_BODY));
            }
            unreached(unanswered, way, exchange)
        }
    }
}

/// The workload's answer, as it comes.
fn relayed(answer: Response<Incoming>, way: &Way, mut exchange: Exchange) -> Response<Reply> {
    let (mut parts, body) = answer.into_parts();
    head::strip_answer(&mut parts.headers);
    parts.version = way.version;
    exchange.begins(parts.status);
    if body.is_end_stream() {
        exchange.finished();
    }
    Response::from_parts(parts, Reply::Relayed { body, exchange: Box::new(exchange) })
}

/// The workload agreed to a WebSocket: both sides are joined when the answer is out.
fn upgraded(
    client: &Arc<Client>,
    way: &Way,
    mut answer: Response<Incoming>,
    upgrade: hyper::upgrade::OnUpgrade,
    mut exchange: Exchange,
) -> Response<Reply> {
    if !way.is_upgrade {
        exchange.answered(StatusCode::BAD_GATEWAY, Verdict::Failed, Some(Reason::Protocol), None);
        return closing(text(StatusCode::BAD_GATEWAY, BROKEN_BODY));
    }
    let server = hyper::upgrade::on(&mut answer);
    let (mut parts, _) = answer.into_parts();
    let protocol = parts.headers.get(header::UPGRADE).cloned();
    head::strip_answer(&mut parts.headers);
    parts.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    parts.headers.insert(header::UPGRADE, protocol.unwrap_or(HeaderValue::from_static("websocket")));
    exchange.begins(parts.status);
    client.signals.upgrade();
    client.join(Upgrade { client: upgrade, joined: Some((server, exchange)) });
    Response::from_parts(parts, Reply::Text(None))
}

fn unreached(unanswered: Unanswered, way: &Way, mut exchange: Exchange) -> Response<Reply> {
    let (status, body, reason) = match unanswered {
        Unanswered::Unreached(ending) => (
            StatusCode::SERVICE_UNAVAILABLE,
            UNREACHED_BODY,
            ending.reason.unwrap_or(Reason::NothingListening),
        ),
        Unanswered::Broken(error) => {
            tracing::debug!(%error, "no answer");
            (StatusCode::BAD_GATEWAY, BROKEN_BODY, Reason::ServerReset)
        }
    };
    if way.is_grpc {
        exchange.answered(StatusCode::OK, Verdict::Failed, Some(reason), None);
        return grpc(StatusCode::OK, GRPC_UNAVAILABLE, body);
    }
    exchange.answered(status, Verdict::Failed, Some(reason), None);
    text(status, body)
}

fn bad_head(bad: BadHead, mut exchange: Exchange) -> Response<Reply> {
    exchange.answered(bad.status(), Verdict::Denied, Some(Reason::Protocol), Some(bad.label()));
    closing(text(bad.status(), BAD_REQUEST_BODY))
}

/// The policy's no (policy B-12).
fn denied(denial: &RequestDenial, mut exchange: Exchange) -> Response<Reply> {
    let Answer { status, body, grpc: code } = denial.answer();
    exchange.denied(denial, status);
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::FORBIDDEN);
    match code {
        Some((code, message)) => grpc(status, code, message),
        None => text(status, body),
    }
}

/// Allowed, and denied all the same: it would leave no trace.
fn unrecorded(way: &Way, mut exchange: Exchange) -> Response<Reply> {
    let status = if way.is_grpc { StatusCode::OK } else { StatusCode::FORBIDDEN };
    exchange.answered(status, Verdict::Denied, Some(Reason::AuditUnavailable), None);
    if way.is_grpc { grpc(status, GRPC_PERMISSION_DENIED, DENIED_BODY) } else { text(status, DENIED_BODY) }
}

fn text(status: StatusCode, body: &str) -> Response<Reply> {
    let mut answer = Response::new(Reply::Text(Some(Bytes::from(body.to_owned()))));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    answer
}

/// An answer of trailers only.
fn grpc(status: StatusCode, code: u8, message: &str) -> Response<Reply> {
    let mut answer = Response::new(Reply::Text(None));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", u16::from(code).into());
    if let Ok(message) = HeaderValue::from_str(&percent_encoded(message)) {
        headers.insert("grpc-message", message);
    }
    answer
}

/// As gRPC has it: everything but printable ASCII, and the percent sign.
fn percent_encoded(message: &str) -> String {
    let mut encoded = String::with_capacity(message.len());
    for byte in message.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// The last answer of its connection.
fn closing(mut answer: Response<Reply>) -> Response<Reply> {
    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    answer
}
