//! `culvert policy replay`: the access log of the past under another folder of documents.
//!
//! Each line with a verdict of a policy is judged again, by the evaluator that enforces. What a line does not say
//! (headers, tokens) is not guessed: where every value of it has the same verdict the line is told, elsewhere the attribute
//! that is missing is named.

mod line;
mod report;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, BufRead},
    net::SocketAddr,
    path::Path,
    sync::Arc,
};

use node_core::{
    policy::{Decision, Point, RequestPoint, Told, Unknown},
    snapshot::Snapshot,
    workload::{ObjectName, Workload},
};
use spiffe_id::TrustDomain;

pub use self::report::{GROUPS_MAX, LINES_NAMED_MAX, Replayed};
use self::{
    line::{BadLine, Judged, Line, Proof},
    report::{Changed, Undecided},
};
use super::library::{self, OfFile};

/// Longest line, in bytes: request heads of 64 KiB and all else that a line has. A longer one is not read.
pub const LINE_BYTES_MAX: usize = 256 * 1024;

/// Connections whose requests were told and whose own line is to come: as many as a node carries, thrice. At the limit the
/// connection's own line cannot be told.
pub const CONNECTIONS_MAX: usize = 180_000;

/// Snapshots that are kept, one for each node of the log. At the limit they are made anew when they are needed.
pub const SNAPSHOTS_MAX: usize = 16;

/// Why nothing was replayed, or not all.
#[derive(Debug, thiserror::Error)]
pub enum NoReplay {
    #[error("{0}")]
    Documents(String),
    #[error("reading line {line}: {source}")]
    Log { line: u64, source: io::Error },
}

/// Replays a log under the documents of a folder, or of one file.
///
/// # Errors
/// Documents or a log that cannot be read.
pub fn replay(log: impl BufRead, documents: &Path, trust_domain: &TrustDomain) -> Result<Replayed, NoReplay> {
    let files = library::load(documents).map_err(NoReplay::Documents)?;
    let mut replay = Replay::new(files, trust_domain.clone());
    replay.read(log)?;
    Ok(replay.replayed)
}

struct Replay {
    files: Vec<OfFile>,
    trust_domain: TrustDomain,
    /// For no node: who is where.
    places: Arc<Snapshot>,
    by_node: BTreeMap<String, Arc<Snapshot>>,
    /// Connections of which requests were told.
    by_requests: BTreeSet<(u64, SocketAddr, SocketAddr)>,
    replayed: Replayed,
}

impl Replay {
    fn new(files: Vec<OfFile>, trust_domain: TrustDomain) -> Self {
        let places = library::snapshot(&files, "", &trust_domain);
        let replayed = Replayed { notes: library::problems(&places), ..Replayed::default() };
        Self { files, trust_domain, places, by_node: BTreeMap::new(), by_requests: BTreeSet::new(), replayed }
    }

    fn read(&mut self, mut log: impl BufRead) -> Result<(), NoReplay> {
        let mut text = Vec::new();
        loop {
            let number = self.replayed.lines + 1;
            let found = next_line(&mut log, &mut text);
            match found.map_err(|source| NoReplay::Log { line: number, source })? {
                Found::End => return Ok(()),
                Found::Line if text.iter().all(u8::is_ascii_whitespace) => self.replayed.lines = number,
                Found::Line => {
                    self.replayed.lines = number;
                    match line::read(&text) {
                        Ok(line) => self.line(number, line),
                        Err(bad) => self.bad(number, &bad),
                    }
                }
                Found::TooLong => {
                    self.replayed.lines = number;
                    self.bad_line(number, format!("it has more than {LINE_BYTES_MAX} bytes"));
                }
            }
        }
    }

    fn bad(&mut self, number: u64, bad: &BadLine) {
        self.bad_line(number, bad.to_string());
    }

    fn bad_line(&mut self, number: u64, problem: String) {
        self.replayed.bad.add(number);
        if self.replayed.problems.len() < LINES_NAMED_MAX {
            self.replayed.problems.push((number, problem));
        }
    }

    fn line(&mut self, number: u64, line: Line) {
        let judged = match line {
            Line::Judged(judged) => judged,
            Line::Skipped(why) => {
                *self.replayed.skipped.entry(why).or_default() += 1;
                return;
            }
        };
        let key = (judged.connection, judged.source, judged.destination);
        let told_by_requests = match &judged.request {
            None => self.by_requests.remove(&key),
            Some(_) => {
                if self.by_requests.len() < CONNECTIONS_MAX {
                    self.by_requests.insert(key);
                }
                false
            }
        };
        match self.judge(&judged, told_by_requests) {
            Told::Surely(decision) if decision.allowed == judged.was_allowed => self.replayed.unchanged += 1,
            Told::Surely(decision) => {
                let groups =
                    if decision.allowed { &mut self.replayed.allowed } else { &mut self.replayed.refused };
                groups.add(changed(&judged, &decision), number);
            }
            Told::Needs(needs) => {
                let group = Undecided { to: to(&judged), needs: needs.join(", ") };
                self.replayed.undecided.add(group, number);
            }
        }
    }

    fn judge(&mut self, judged: &Judged, told_by_requests: bool) -> Told {
        let Some(workload) = self.places.workload(&judged.workload).cloned() else {
            return Told::Needs(vec![format!("the document of Workload {}", judged.workload)]);
        };
        if !workload.enrolled {
            return Told::Surely(outside());
        }
        let snapshot = self.snapshot(&workload.node);
        let Some(workload) = snapshot.workload(&judged.workload) else { return Told::Surely(outside()) };
        tell(&snapshot, workload, judged, told_by_requests)
    }

    /// Policies are compiled for one node.
    fn snapshot(&mut self, node: &str) -> Arc<Snapshot> {
        if let Some(known) = self.by_node.get(node) {
            return Arc::clone(known);
        }
        if self.by_node.len() >= SNAPSHOTS_MAX {
            self.by_node.clear();
        }
        let made = library::snapshot(&self.files, node, &self.trust_domain);
        self.by_node.insert(node.to_owned(), Arc::clone(&made));
        made
    }
}

/// A destination that is not enrolled is reached by everybody, and nobody is asked.
fn outside() -> Decision {
    Decision {
        allowed: true,
        reason: None,
        policy: None,
        rule: Some("the destination is not enrolled".into()),
        has_bad_token: false,
        needs_request: false,
    }
}

fn tell(snapshot: &Snapshot, workload: &Arc<Workload>, judged: &Judged, told_by_requests: bool) -> Told {
    let request = judged.request.as_ref().map(|request| {
        RequestPoint::new(&request.method, request.path.as_deref(), request.host.as_deref(), Vec::new())
    });
    let server_name = match &judged.proof {
        Proof::MeshTls(_, name) => name.clone(),
        Proof::None | Proof::Identity(_) | Proof::Either(_) => None,
    };
    let point = Point {
        destination: Arc::clone(workload),
        port: judged.destination.port(),
        destination_address: judged.destination.ip(),
        source_address: judged.source.ip(),
        peer: judged.proof.identity().cloned(),
        is_attested: matches!(judged.proof, Proof::Identity(_)),
        server_name,
        request,
    };
    let unknown = Unknown {
        host: judged.request.as_ref().is_some_and(|request| request.host.is_none()),
        server_name: matches!(judged.proof, Proof::Either(_)),
        request: false,
    };
    let compiled = snapshot.compiled();
    let told = compiled.tell(&point, &unknown);
    let needs_request = matches!(&told, Told::Surely(decision) if decision.needs_request);
    if !needs_request || told_by_requests || (judged.was_allowed && !judged.has_bytes) {
        return told;
    }
    // A stream until now, which would be taken apart: nobody knows what it carried.
    let carried = RequestPoint::new("GET", Some("/"), None, Vec::new());
    match compiled.tell(&Point { request: Some(carried), ..point }, &Unknown { request: true, ..unknown }) {
        Told::Needs(_) => Told::Needs(vec![CARRIED.to_owned()]),
        told @ Told::Surely(_) => told,
    }
}

/// What the line of a stream lacks if its port is judged request by request.
const CARRIED: &str = "method and path of the requests that it carried";

fn to(judged: &Judged) -> String {
    format!("{} port {}", judged.workload, judged.destination.port())
}

fn changed(judged: &Judged, decision: &Decision) -> Changed {
    let named = |policy: Option<&str>, rule: Option<&str>| {
        let parts: Vec<&str> = policy.into_iter().chain(rule).collect();
        (!parts.is_empty()).then(|| parts.join(" "))
    };
    let request = judged.request.as_ref();
    let name = |name: &ObjectName| name.to_string();
    let before = named(judged.policy.as_deref(), judged.rule.as_deref());
    Changed {
        is_request: request.is_some(),
        from: match (judged.proof.identity(), &judged.source_workload) {
            (Some(identity), _) => identity.to_string(),
            (None, Some(workload)) => format!("{} (plaintext)", name(workload)),
            (None, None) => format!("{} (plaintext)", judged.source.ip()),
        },
        to: to(judged),
        request: request.map(|request| (request.method.clone(), request.path.clone().unwrap_or_default())),
        decided_by: named(decision.policy.as_deref(), decision.rule.as_deref()),
        reason: decision.reason.map(|reason| reason.label().to_owned()),
        before: before.or_else(|| judged.reason.clone().filter(|_| !judged.was_allowed)),
    }
}

enum Found {
    Line,
    TooLong,
    End,
}

/// Reads a line into `text`, without its end. Of a line that is too long nothing is kept.
fn next_line(log: &mut impl BufRead, text: &mut Vec<u8>) -> io::Result<Found> {
    text.clear();
    let (mut is_any, mut is_too_long) = (false, false);
    loop {
        let piece = match log.fill_buf() {
            Ok(piece) => piece,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if piece.is_empty() {
            break;
        }
        is_any = true;
        let end = piece.iter().position(|byte| *byte == b'\n');
        let own = &piece[..end.unwrap_or(piece.len())];
        if text.len() + own.len() > LINE_BYTES_MAX {
            is_too_long = true;
            text.clear();
        }
        if !is_too_long {
            text.extend_from_slice(own);
        }
        let taken = end.map_or(piece.len(), |end| end + 1);
        log.consume(taken);
        if end.is_some() {
            break;
        }
    }
    Ok(match (is_any, is_too_long) {
        (false, _) => Found::End,
        (true, true) => Found::TooLong,
        (true, false) => Found::Line,
    })
}
