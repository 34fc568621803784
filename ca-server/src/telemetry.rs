//! One event -> one log line and one counter, so that the two cannot disagree.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};

use ca_proto::refusal::Refusal;
use spiffe_id::NodeId;

use crate::clock::Seconds;
use crate::issue::Certificate;

/// What happened.
#[derive(Debug)]
pub(crate) enum Event<'a> {
    /// A certificate was issued and recorded.
    Issued { call: &'static str, certificate: &'a Certificate, peer: SocketAddr },
    /// A join was repeated with the same key and answered as before.
    Repeated { node: &'a NodeId, peer: SocketAddr },
    /// A request was refused.
    Refused { call: &'static str, node: Option<&'a NodeId>, refusal: &'a Refusal, peer: SocketAddr },
    /// A message was larger than the limit; it never was decoded.
    MessageTooLarge,
    /// A TLS handshake failed or took too long.
    HandshakeFailed { peer: SocketAddr, problem: String },
    /// More connections without a client certificate than are served at once.
    StrangersLimited { peer: SocketAddr },
    /// As many connections as are served at once; new ones wait.
    ConnectionsLimited,
    /// A token was made.
    TokenMade { node: &'a str, expires: Seconds },
    /// The issuing key was replaced.
    IssuingKeyReplaced { expires: Seconds },
    /// The authority's own certificate was replaced.
    ServingReplaced { expires: Seconds },
}

/// Counts events, and tells the log of them.
#[derive(Debug, Default)]
pub(crate) struct Telemetry {
    counters: Mutex<BTreeMap<String, u64>>,
}

impl Telemetry {
    pub(crate) fn tell(&self, event: &Event<'_>) {
        *self.counters.lock().unwrap_or_else(PoisonError::into_inner).entry(counter(event)).or_default() += 1;
        log(event);
    }

    /// Counter -> value; the reason of a refusal is part of the name.
    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn counter(event: &Event<'_>) -> String {
    match event {
        Event::Issued { call, .. } => format!("issued_total{{call=\"{call}\"}}"),
        Event::Repeated { .. } => "join_repeated_total".into(),
        Event::Refused { call, refusal, .. } => {
            format!("refused_total{{call=\"{call}\",reason=\"{}\"}}", refusal.reason)
        }
        Event::MessageTooLarge => "refused_total{call=\"\",reason=\"MESSAGE_TOO_LARGE\"}".into(),
        Event::HandshakeFailed { .. } => "handshakes_failed_total".into(),
        Event::StrangersLimited { .. } => "strangers_limited_total".into(),
        Event::ConnectionsLimited => "connections_limited_total".into(),
        Event::TokenMade { .. } => "tokens_total".into(),
        Event::IssuingKeyReplaced { .. } => "issuing_keys_total".into(),
        Event::ServingReplaced { .. } => "serving_certificates_total".into(),
    }
}

fn log(event: &Event<'_>) {
    match event {
        Event::Issued { call, certificate, peer } => tracing::info!(
            call,
            identity = %certificate.name,
            node = certificate.node.as_ref().map(|node| node.name()),
            serial = hex(&certificate.serial),
            expires = %certificate.expires,
            %peer,
            "certificate issued"
        ),
        Event::Repeated { node, peer } => {
            tracing::info!(call = "Join", node = node.name(), %peer, "join repeated")
        }
        Event::Refused { call, node, refusal, peer } => tracing::info!(
            call,
            node = node.map(NodeId::name),
            reason = refusal.reason.code(),
            message = refusal.message,
            %peer,
            "request refused"
        ),
        Event::MessageTooLarge => tracing::info!(reason = "MESSAGE_TOO_LARGE", "request refused"),
        Event::HandshakeFailed { peer, problem } => tracing::debug!(%peer, problem, "handshake failed"),
        Event::StrangersLimited { peer } => {
            tracing::debug!(%peer, "connection closed: too many without a certificate")
        }
        Event::ConnectionsLimited => {
            tracing::warn!("as many connections as are served at once, new ones wait")
        }
        Event::TokenMade { node, expires } => tracing::info!(node, %expires, "join token made"),
        Event::IssuingKeyReplaced { expires } => tracing::info!(%expires, "issuing key replaced"),
        Event::ServingReplaced { expires } => tracing::debug!(%expires, "own certificate replaced"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
