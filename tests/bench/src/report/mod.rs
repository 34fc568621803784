//! From samples to what people and programs read: [`Report::json`], [`Report::markdown`], [`Report::chart`].

mod chart;
mod markdown;

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{
    machine::Machine,
    plan::{Measure, Path, Way},
};

/// One run of one measure on one way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// In the measure's unit.
    pub value: f64,
    /// Of the exchanges, in microseconds.
    pub p50: Option<f64>,
    /// Of the exchanges, in microseconds.
    pub p99: Option<f64>,
    /// Of the proxies, in the measure's unit of CPU time.
    pub cpu: Option<f64>,
}

/// All runs, in the order of rounds.
#[derive(Debug, Default)]
pub struct Samples(BTreeMap<(Measure, Way), Vec<Sample>>);

/// What else was the same for all runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Conditions {
    /// Of every socket.
    pub congestion_control: String,
    /// Of bulk data.
    pub stream_direction: String,
    /// Threads of each proxy.
    pub proxy_workers: usize,
    /// Who runs on which.
    pub processors: String,
    /// Of each run.
    pub seconds: u64,
    /// Rounds.
    pub repeat: u32,
}

/// All that is said.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Where it was measured.
    pub machine: Machine,
    /// How it was measured.
    pub conditions: Conditions,
    /// What was measured.
    pub rows: Vec<Row>,
    /// What was asked for and could not be measured.
    pub absent: Vec<Absent>,
}

/// One measure on one way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// A label of [`Path`].
    pub path: String,
    /// A label of [`Measure`].
    pub measure: String,
    /// A label of [`crate::plan::Topology`].
    pub topology: String,
    /// Of the next three.
    pub unit: String,
    /// Over all rounds.
    pub median: f64,
    /// Over all rounds.
    pub min: f64,
    /// Over all rounds.
    pub max: f64,
    /// Median of the rounds' medians, in microseconds; none for streams and memory.
    pub p50: Option<f64>,
    /// Median of the rounds', in microseconds.
    pub p99: Option<f64>,
    /// Median of the rounds' ratios to the plain way of the same topology.
    pub ratio_to_plain: Option<f64>,
    /// Median, of all proxies of the way together.
    pub proxy_cpu: Option<f64>,
    /// Of `proxy_cpu`.
    pub proxy_cpu_unit: Option<String>,
}

/// A way without rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Absent {
    /// A label of [`Path`].
    pub path: String,
    /// A label of [`crate::plan::Topology`].
    pub topology: String,
    /// Why.
    pub reason: String,
}

impl Absent {
    /// A way that could not be run.
    pub fn new(way: Way, reason: &str) -> Self {
        Self {
            path: way.path.label().to_owned(),
            topology: way.topology.label().to_owned(),
            reason: reason.to_owned(),
        }
    }
}

impl Samples {
    /// Adds the next round's run.
    pub fn add(&mut self, way: Way, measure: Measure, sample: Sample) {
        self.0.entry((measure, way)).or_default().push(sample);
    }

    /// Sums up.
    pub fn report(&self, machine: Machine, conditions: Conditions, absent: Vec<Absent>) -> Report {
        let rows = self.0.iter().map(|((measure, way), samples)| self.row(*measure, *way, samples)).collect();
        Report { machine, conditions, rows, absent }
    }

    fn row(&self, measure: Measure, way: Way, samples: &[Sample]) -> Row {
        let of = |pick: fn(&Sample) -> Option<f64>| -> Vec<f64> { samples.iter().filter_map(pick).collect() };
        let values = of(|sample| Some(sample.value));
        let is_plain = way.path == Path::Plain;
        Row {
            path: way.path.label().to_owned(),
            measure: measure.label(),
            topology: way.topology.label().to_owned(),
            unit: measure.unit().to_owned(),
            median: rounded(median(&values).unwrap_or(f64::NAN)),
            min: rounded(values.iter().copied().fold(f64::INFINITY, f64::min)),
            max: rounded(values.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
            p50: median(&of(|sample| sample.p50)).map(rounded),
            p99: median(&of(|sample| sample.p99)).map(rounded),
            ratio_to_plain: median(&self.ratios(measure, way, samples)).map(rounded),
            proxy_cpu: median(&of(|sample| sample.cpu)).filter(|_| !is_plain).map(rounded),
            proxy_cpu_unit: measure.cpu_unit().filter(|_| !is_plain).map(ToOwned::to_owned),
        }
    }

    /// Round by round: what disturbed a round disturbed both.
    fn ratios(&self, measure: Measure, way: Way, samples: &[Sample]) -> Vec<f64> {
        let plain = self.0.get(&(measure, Way { path: Path::Plain, ..way }));
        let pairs = samples.iter().zip(plain.into_iter().flatten());
        pairs.map(|(sample, plain)| sample.value / plain.value).collect()
    }
}

impl Report {
    /// The whole report.
    ///
    /// # Errors
    /// If a value has no place in JSON.
    pub fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    fn row(&self, topology: &str, path: &str, measure: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.topology == topology && row.path == path && row.measure == measure)
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    Some((sorted[middle - 1] + upper) / 2.0)
}

/// To four significant digits: more are noise.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10_f64.powf(3.0 - value.abs().log10().floor());
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Topology;

    pub(super) fn report() -> Report {
        let mut samples = Samples::default();
        let way = |path| Way { topology: Topology::Between, path };
        let sample = |value, cpu| Sample { value, p50: Some(50.0), p99: Some(90.0), cpu: Some(cpu) };
        for (plain, ours) in [(10.0, 5.0), (20.0, 5.0), (8.0, 6.0)] {
            samples.add(way(Path::Plain), Measure::KeepAlive(1), sample(plain, 0.0));
            samples.add(way(Path::Between), Measure::KeepAlive(1), sample(ours, 85.4321));
        }
        let memory = Sample { value: 6_543.0, p50: None, p99: None, cpu: None };
        samples.add(way(Path::Between), Measure::Idle(1_000), memory);
        let conditions = Conditions {
            congestion_control: "reno".to_owned(),
            stream_direction: "client to server".to_owned(),
            proxy_workers: 2,
            processors: "all".to_owned(),
            seconds: 1,
            repeat: 3,
        };
        let machine = crate::machine::describe(&conditions);
        let absent = vec![Absent::new(way(Path::Envoy), "no <Envoy> & \"none\"")];
        samples.report(machine, conditions, absent)
    }

    #[test]
    fn rows_have_the_median_of_values_and_of_the_rounds_ratios() {
        let report = report();
        let ours = report.row("between", "between", "keepalive1").expect("a row");
        assert_eq!((ours.median, ours.min, ours.max), (5.0, 5.0, 6.0));
        assert_eq!(ours.ratio_to_plain, Some(0.5), "of 0.5, 0.25 and 0.75");
        assert_eq!((ours.proxy_cpu, ours.proxy_cpu_unit.as_deref()), (Some(85.43), Some("us/request")));
        let plain = report.row("between", "plain", "keepalive1").expect("a row");
        assert_eq!((plain.ratio_to_plain, plain.proxy_cpu, &plain.proxy_cpu_unit), (Some(1.0), None, &None));
        let memory = report.row("between", "between", "idle1000").expect("a row");
        assert_eq!((memory.p50, memory.ratio_to_plain, memory.proxy_cpu), (None, None, None));
        assert_eq!(memory.unit, "bytes/connection");
    }

    #[test]
    fn the_json_has_every_field_of_its_format_and_reads_back() {
        let report = report();
        let text = report.json().expect("finite values");
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let fields = [
            "path",
            "measure",
            "topology",
            "unit",
            "median",
            "min",
            "max",
            "p50",
            "p99",
            "ratio_to_plain",
            "proxy_cpu",
            "proxy_cpu_unit",
        ];
        for row in value["rows"].as_array().expect("rows") {
            for field in fields {
                assert!(row.get(field).is_some(), "{field} in {row}");
            }
        }
        assert_eq!(serde_json::from_str::<Report>(&text).expect("a report"), report);
    }

    #[test]
    fn medians_of_even_and_odd_numbers() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn four_digits_are_kept() {
        assert_eq!([12_345.6, 0.123_456, 9.9999, -1234.5].map(rounded), [12_350.0, 0.1235, 10.0, -1235.0]);
        assert_eq!(rounded(0.0), 0.0);
    }
}
