//! A decision, as its line has it.

use node_core::audit::entry::{self, Entry};

use crate::telemetry::{Asked, Decision, Endpoint, Shadow};

/// Longest path that is kept, in bytes: servers accept 8 KiB and more, and what identifies a request comes first.
pub(super) const PATH_BYTES_MAX: usize = 1_024;

/// Longest method that is kept, in bytes; the longest that is registered has 17.
pub(super) const METHOD_BYTES_MAX: usize = 64;

/// Hands the line of a decision to `write`. `digest` is that of its snapshot, if it is known.
pub(super) fn with_entry<R>(
    decision: &Decision,
    digest: Option<&str>,
    write: impl FnOnce(&Entry<'_>) -> R,
) -> R {
    let ends = &*decision.ends;
    let (source, destination) = (Names::of(&ends.source), Names::of(&ends.destination));
    let service = ends.service.as_ref().map(ToString::to_string);
    write(&Entry::Decision(entry::Decision {
        connection: ends.connection,
        direction: ends.direction.label(),
        path: ends.path.label(),
        source: source.end(&ends.source),
        destination: destination.end(&ends.destination),
        service: service.as_deref(),
        protocol: decision.request.as_ref().map_or(ends.protocol, |asked| asked.protocol),
        request: decision.request.as_ref().map(request),
        verdict: decision.verdict.label(),
        policy: decision.policy.as_deref(),
        rule: decision.rule.as_deref(),
        reason: decision.reason.map(|reason| reason.label()),
        shadow: decision.shadow.as_ref().map(shadow),
        audit: decision.audit.as_deref(),
        snapshot: decision.snapshot,
        digest,
    }))
}

/// Names of one end, as text.
struct Names {
    workload: Option<String>,
    identity: Option<String>,
}

impl Names {
    fn of(end: &Endpoint) -> Self {
        Self {
            workload: end.workload.as_ref().map(ToString::to_string),
            identity: end.identity.as_ref().map(ToString::to_string),
        }
    }

    fn end(&self, end: &Endpoint) -> entry::End<'_> {
        entry::End {
            address: end.address,
            workload: self.workload.as_deref(),
            identity: self.identity.as_deref(),
        }
    }
}

/// The query may hold secrets.
fn request(asked: &Asked) -> entry::Request<'_> {
    let whole = asked.path.as_ref().map(http::uri::PathAndQuery::path);
    let path = whole.map(|path| &path[..path.floor_char_boundary(PATH_BYTES_MAX)]);
    let whole_method = asked.method.as_str();
    let method = &whole_method[..whole_method.floor_char_boundary(METHOD_BYTES_MAX)];
    entry::Request { method, path, is_cut: (Some(method), path) != (Some(whole_method), whole) }
}

fn shadow(shadow: &Shadow) -> entry::Shadow<'_> {
    entry::Shadow {
        verdict: shadow.verdict.label(),
        policy: shadow.policy.as_deref(),
        rule: shadow.rule.as_deref(),
    }
}
