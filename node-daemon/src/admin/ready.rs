//! `/healthz/ready` on `readyListen`: 200, or 503 and the list of what is missing.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{
    EnrolmentView, Stage, Views,
    serve::{Answer, Page},
};
use crate::telemetry::Event;

/// Name of the limit of connections to this page.
pub const LIMIT: &str = "ready_connections";

/// How often readiness is looked at for its event; the page itself always looks.
const LOOK: Duration = Duration::from_millis(200);

/// The page.
pub fn page(views: Views) -> Page {
    Arc::new(move |path| match path {
        "/healthz/ready" => Some(answer(&missing(&views))),
        _ => None,
    })
}

/// Emits an event whenever readiness changes.
pub async fn follow(views: Views, stop: CancellationToken) {
    let mut last = None;
    loop {
        let missing = missing(&views);
        if last.as_ref() != Some(&missing) {
            views.events.emit(&Event::Readiness { ready: missing.is_empty(), missing: missing.clone() });
            last = Some(missing);
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(LOOK) => {}
        }
    }
}

/// What is missing until this node is ready, in words; empty when it is.
pub fn missing(views: &Views) -> Vec<String> {
    if *views.stage.borrow() == Stage::Draining {
        return vec!["the daemon is draining".to_owned()];
    }
    let snapshot = Arc::clone(&views.snapshots.borrow());
    let mut missing = Vec::new();
    if let Some(problem) = snapshot.unreadable() {
        missing.push(format!("documents: {problem}")); // T-19
    }
    if (views.node_certificate)().is_none() {
        missing.push("the node's own certificate: it has not joined the mesh yet".to_owned());
    }
    let enrolments: BTreeMap<_, _> = (views.enrolments)()
        .into_iter()
        .map(|EnrolmentView { workload, problem }| (workload, problem))
        .collect();
    let with_certificate: Vec<_> = (views.certificates)()
        .into_iter()
        .filter(|view| view.serial.is_some())
        .map(|view| view.identity)
        .collect();
    for workload in snapshot.local() {
        match enrolments.get(&workload.name) {
            Some(None) => {}
            Some(Some(problem)) => missing.push(format!("workload {}: {problem}", workload.name)),
            None => missing.push(format!("workload {}: it is not enrolled yet", workload.name)),
        }
        if !with_certificate.contains(&workload.identity) {
            missing.push(format!("certificate {}: it is not there yet", workload.identity));
        }
    }
    missing.sort();
    missing.dedup();
    missing
}

fn answer(missing: &[String]) -> Answer {
    if missing.is_empty() {
        return Answer::text(200, "ready\n".to_owned());
    }
    Answer::text(503, format!("not ready:\n  {}\n", missing.join("\n  ")))
}
