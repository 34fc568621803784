//! One line of the access log, as `culvert policy replay` reads it.

#[path = "../../../node-daemon/src/policy_tools/replay/line.rs"]
mod line;

use self::line::{Judged, Line, Proof, Request, read};

/// A server's name comes with an identity only; what is skipped or refused says why.
pub(crate) fn access_line(data: &[u8]) {
    match read(data) {
        Ok(Line::Judged(judged)) => {
            let Judged { connection, source, source_workload, destination, workload, proof, .. } = &*judged;
            let asked = format!("{connection} from {source} {source_workload:?} to {workload} {destination}");
            let server_name = match proof {
                Proof::MeshTls(_, server_name) => server_name.as_deref(),
                Proof::None | Proof::Identity(_) | Proof::Either(_) => None,
            };
            assert!(proof.identity().is_some() || server_name.is_none(), "{asked}");
            let Judged { was_allowed, policy, rule, reason, has_bytes, request, .. } = &*judged;
            let told = format!("{was_allowed} {policy:?} {rule:?} {reason:?} {has_bytes}");
            if let Some(Request { method, path, host }) = request {
                drop(format!("{told} {method} {path:?} {host:?}"));
            }
        }
        Ok(Line::Skipped(skipped)) => assert!(!skipped.words().is_empty()),
        Err(bad) => assert!(!bad.to_string().is_empty()),
    }
}
