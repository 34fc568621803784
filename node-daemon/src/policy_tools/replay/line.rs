//! One line of the access log, as [`crate::telemetry`] writes it: what was asked, and what the answer was.

use std::net::SocketAddr;

use node_core::{policy::DenialReason, workload::ObjectName};
use serde::Deserialize;
use serde_json::Value;
use spiffe_id::SpiffeId;

/// What a line is to a replay.
#[derive(Debug)]
pub(super) enum Line {
    /// A verdict of the policy of the destination's node.
    Judged(Box<Judged>),
    /// No verdict of a policy.
    Skipped(Skipped),
}

/// Why a line is not judged again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Skipped {
    /// Another kind of event.
    Event,
    /// The destination's node judges, and its log says how.
    Outbound,
    /// It ended before a policy was asked, or came to nothing all the same.
    Unjudged,
}

impl Skipped {
    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::Event => "other events",
            Self::Outbound => "outbound: the log of the destination's node has the verdict",
            Self::Unjudged => "failed, or refused before a policy was asked",
        }
    }
}

#[derive(Debug)]
pub(super) struct Judged {
    pub(super) connection: u64,
    pub(super) source: SocketAddr,
    pub(super) source_workload: Option<ObjectName>,
    pub(super) destination: SocketAddr,
    pub(super) workload: ObjectName,
    pub(super) proof: Proof,
    pub(super) was_allowed: bool,
    pub(super) policy: Option<String>,
    pub(super) rule: Option<String>,
    pub(super) reason: Option<String>,
    /// From the client.
    pub(super) has_bytes: bool,
    pub(super) request: Option<Request>,
}

/// How the peer came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    None,
    /// The kernel's word, or a certificate over the tunnel.
    Identity(SpiffeId),
    /// A certificate over mesh TLS; the server's name is known only of a connection.
    MeshTls(SpiffeId, Option<String>),
    /// The kernel's word or mesh TLS: a request's line does not say which.
    Either(SpiffeId),
}

impl Proof {
    pub(super) fn identity(&self) -> Option<&SpiffeId> {
        match self {
            Self::None => None,
            Self::Identity(identity) | Self::MeshTls(identity, _) | Self::Either(identity) => Some(identity),
        }
    }
}

#[derive(Debug)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: Option<String>,
    pub(super) host: Option<String>,
}

/// A line that is no line of the log, or lacks what every line has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadLine {
    #[error("it is no JSON object: only a log in format json can be replayed")]
    Json,
    #[error("{field}: found {found}, expected {expected}")]
    Field { field: &'static str, found: String, expected: &'static str },
}

/// The fields that count. Others may stand beside them.
#[derive(Debug, Deserialize)]
struct Written {
    connection: Option<u64>,
    direction: Option<String>,
    path: Option<String>,
    #[serde(default)]
    source: End,
    #[serde(default)]
    destination: End,
    verdict: Option<String>,
    policy: Option<String>,
    rule: Option<String>,
    reason: Option<String>,
    tls: Option<WrittenTls>,
    bytes_in: Option<u64>,
    method: Option<String>,
    request_path: Option<String>,
    host: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct End {
    address: Option<String>,
    workload: Option<String>,
    namespace: Option<String>,
    identity: Option<String>,
}

#[derive(Debug, Deserialize)]
struct WrittenTls {
    server_name: Option<String>,
}

/// Reads one line.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read(text: &[u8]) -> Result<Line, BadLine> {
    let value: Value = serde_json::from_slice(text).map_err(|_| BadLine::Json)?;
    if !value.is_object() {
        return Err(BadLine::Json);
    }
    if value.get("target").and_then(Value::as_str) != Some(ACCESS) {
        return match value.get("target") {
            Some(Value::String(_)) => Ok(Line::Skipped(Skipped::Event)),
            found => Err(field("target", found, "the name of what wrote the line")),
        };
    }
    let written: Written = serde_json::from_value(value).map_err(|error| BadLine::Field {
        field: "line",
        found: error.to_string(),
        expected: "fields of the kinds that the access log has",
    })?;
    written.judged()
}

/// The target of the lines of the access log.
const ACCESS: &str = "access";

fn field(field: &'static str, found: Option<&Value>, expected: &'static str) -> BadLine {
    let found = found.map_or_else(|| "nothing".to_owned(), Value::to_string);
    BadLine::Field { field, found: found.chars().take(SHOWN_CHARACTERS_MAX).collect(), expected }
}

/// Longest value that is repeated in a message, in characters: one line of a terminal.
const SHOWN_CHARACTERS_MAX: usize = 80;

fn word<'w>(
    name: &'static str,
    found: Option<&'w String>,
    expected: &'static str,
) -> Result<&'w str, BadLine> {
    found.map(String::as_str).ok_or_else(|| field(name, None, expected))
}

fn parsed<T: std::str::FromStr>(
    name: &'static str,
    found: Option<&String>,
    expected: &'static str,
) -> Result<T, BadLine> {
    let text = word(name, found, expected)?;
    text.parse().map_err(|_| field(name, Some(&Value::from(text)), expected))
}

impl Written {
    fn judged(self) -> Result<Line, BadLine> {
        let direction = word("direction", self.direction.as_ref(), "inbound or outbound")?;
        let path = word("path", self.path.as_ref(), "direct, relay, tunnel or passthrough")?;
        let is_here = match (direction, path) {
            ("inbound", "tunnel" | "relay" | "direct" | "passthrough") | ("outbound", "direct" | "relay") => {
                true
            }
            ("outbound", "tunnel" | "passthrough") => false,
            ("inbound" | "outbound", other) => {
                let expected = "direct, relay, tunnel or passthrough";
                return Err(field("path", Some(&Value::from(other)), expected));
            }
            (other, _) => return Err(field("direction", Some(&Value::from(other)), "inbound or outbound")),
        };
        let is_by_policy = self.reason.as_deref().is_some_and(is_reason_of_policy);
        let was_allowed = match word("verdict", self.verdict.as_ref(), VERDICTS)? {
            "allowed" => true,
            "denied" if is_by_policy => false,
            "denied" | "failed" => return Ok(Line::Skipped(Skipped::Unjudged)),
            other => return Err(field("verdict", Some(&Value::from(other)), VERDICTS)),
        };
        if !is_here {
            return Ok(Line::Skipped(Skipped::Outbound));
        }
        let identity: Option<SpiffeId> = match &self.source.identity {
            None => None,
            some => Some(parsed("source.identity", some.as_ref(), "spiffe://<trust domain>/ns/…/sa/…")?),
        };
        if identity.is_none() && self.reason.as_deref() == Some(DenialReason::TrustDomain.label()) {
            // The handshake said so, of a certificate that nobody wrote down.
            return Ok(Line::Skipped(Skipped::Unjudged));
        }
        let is_request = self.method.is_some();
        let (name, namespace) = (self.destination.workload.as_ref(), self.destination.namespace.as_ref());
        let workload = ObjectName::new(
            word("destination.namespace", namespace, "the namespace of the workload that judged")?,
            word("destination.workload", name, "the name of the workload that judged")?,
        );
        let source_workload = self.source.namespace.as_deref().zip(self.source.workload.as_deref());
        Ok(Line::Judged(Box::new(Judged {
            connection: self
                .connection
                .ok_or_else(|| field("connection", None, "the connection's number"))?,
            source: parsed("source.address", self.source.address.as_ref(), "an address and a port")?,
            source_workload: source_workload.map(|(namespace, name)| ObjectName::new(namespace, name)),
            destination: parsed(
                "destination.address",
                self.destination.address.as_ref(),
                "an address and a port",
            )?,
            workload,
            proof: match (identity, path, direction, &self.tls) {
                (None, ..) => Proof::None,
                (Some(identity), "relay", "inbound", Some(tls)) => {
                    Proof::MeshTls(identity, tls.server_name.clone())
                }
                (Some(identity), "relay", "inbound", None) if is_request => Proof::Either(identity),
                (Some(identity), ..) => Proof::Identity(identity),
            },
            was_allowed,
            policy: self.policy,
            rule: self.rule,
            reason: self.reason,
            has_bytes: self.bytes_in.is_some_and(|bytes| bytes > 0),
            request: self.method.map(|method| Request { method, path: self.request_path, host: self.host }),
        })))
    }
}

const VERDICTS: &str = "allowed, denied or failed";

/// Who may speak as whom is no matter of documents.
fn is_reason_of_policy(reason: &str) -> bool {
    let is = |known: &DenialReason| *known != DenialReason::IdentityBarred && known.label() == reason;
    DenialReason::ALL.iter().any(is)
}
