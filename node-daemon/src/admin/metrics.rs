//! `/metrics` and `/stats/prometheus` on `metricsListen`.

use std::sync::Arc;

use super::{
    View,
    serve::{Answer, Page},
};
use crate::telemetry::Sink;

/// Name of the limit of connections to this page.
pub const LIMIT: &str = "metrics_connections";

/// OpenMetrics, as Prometheus asks for it.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The page; the kernel's counters are read for each answer.
pub fn page(events: Sink, kernel: View<Vec<(&'static str, u64)>>) -> Page {
    Arc::new(move |path| match path {
        "/metrics" | "/stats/prometheus" => {
            events.metrics().set_kernel_counters(&kernel());
            Some(answer(&events))
        }
        _ => None,
    })
}

fn answer(events: &Sink) -> Answer {
    match events.metrics().text() {
        Ok(body) => Answer { status: 200, content_type: CONTENT_TYPE, body },
        Err(error) => Answer::text(500, format!("metrics cannot be written: {error}\n")),
    }
}
