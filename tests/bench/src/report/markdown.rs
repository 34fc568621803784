//! A table for each topology: values with their range and ratio, then latency, then the proxies' CPU time.

use std::fmt::Write as _;

use super::{Report, Row};
use crate::plan::{MEASURES, Measure, Topology, WAYS};

impl Report {
    /// The report as a page.
    pub fn markdown(&self) -> String {
        let mut page = String::from("# What the mesh costs\n\n");
        self.say_machine(&mut page);
        for topology in [Topology::SameNode, Topology::Between] {
            let paths = self.paths(topology);
            if paths.is_empty() {
                continue;
            }
            let title = match topology {
                Topology::SameNode => "Two pods of one node",
                Topology::Between => "Two pods of two nodes",
            };
            let _ = writeln!(page, "\n## {title}\n");
            let _ = writeln!(page, "Median (least to most), and in bold the ratio to plain TCP.\n");
            self.table(&mut page, topology, &paths, value);
            let _ = writeln!(page, "\nLatency in microseconds, p50 / p99:\n");
            self.table(&mut page, topology, &paths, latency);
            let _ = writeln!(page, "\nCPU time of all proxies together, their kernel's part included:\n");
            self.table(&mut page, topology, &paths, cpu);
        }
        self.say_absent(&mut page);
        page
    }

    fn say_machine(&self, page: &mut String) {
        let (machine, conditions) = (&self.machine, &self.conditions);
        let _ = writeln!(
            page,
            "{cpu}, {cores} cores, {memory} GiB, Linux {kernel}; congestion control `{congestion}` on every socket; \
             {processors}; {workers} worker thread(s) in each proxy; bulk data {direction}; {repeat} interleaved rounds of \
             {seconds} s; release build.",
            cpu = machine.cpu,
            cores = machine.cores,
            memory = machine.memory_bytes >> 30,
            kernel = machine.kernel,
            congestion = conditions.congestion_control,
            processors = conditions.processors,
            workers = conditions.proxy_workers,
            direction = conditions.stream_direction,
            repeat = conditions.repeat,
            seconds = conditions.seconds,
        );
    }

    /// Those with rows, in the order of [`WAYS`].
    fn paths(&self, topology: Topology) -> Vec<&'static str> {
        let of = WAYS.into_iter().filter(|way| way.topology == topology).map(|way| way.path.label());
        of.filter(|path| self.rows.iter().any(|row| row.topology == topology.label() && row.path == *path))
            .collect()
    }

    fn table(
        &self,
        page: &mut String,
        topology: Topology,
        paths: &[&str],
        cell: fn(Measure, &Row) -> Option<String>,
    ) {
        let _ = writeln!(page, "| | {} |", paths.join(" | "));
        let _ = writeln!(page, "|---|{}", "---|".repeat(paths.len()));
        for measure in MEASURES {
            let label = measure.label();
            let cells: Vec<Option<String>> = paths
                .iter()
                .map(|path| self.row(topology.label(), path, &label).and_then(|row| cell(measure, row)))
                .collect();
            if cells.iter().all(Option::is_none) {
                continue;
            }
            let cells: Vec<String> =
                cells.into_iter().map(|cell| cell.unwrap_or_else(|| "-".to_owned())).collect();
            let _ = writeln!(page, "| {label} | {} |", cells.join(" | "));
        }
    }

    fn say_absent(&self, page: &mut String) {
        if self.absent.is_empty() {
            return;
        }
        let _ = writeln!(page, "\n## Not measured\n");
        for absent in &self.absent {
            let reason = absent.reason.lines().next().unwrap_or_default();
            let _ = writeln!(page, "* {} ({}): {reason}", absent.path, absent.topology);
        }
    }
}

fn value(measure: Measure, row: &Row) -> Option<String> {
    let ratio =
        row.ratio_to_plain.filter(|_| row.path != "plain").map(|ratio| format!(" **{}**", short(ratio)));
    Some(format!(
        "{} {} ({} to {}){}",
        short(row.median),
        measure.unit(),
        short(row.min),
        short(row.max),
        ratio.unwrap_or_default()
    ))
}

fn latency(_measure: Measure, row: &Row) -> Option<String> {
    Some(format!("{} / {}", short(row.p50?), short(row.p99?)))
}

fn cpu(_measure: Measure, row: &Row) -> Option<String> {
    Some(format!("{} {}", short(row.proxy_cpu?), row.proxy_cpu_unit.as_deref()?))
}

/// As many digits as a person compares.
pub(super) fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size < 10.0 => format!("{value:.2}"),
        size if size < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn the_page_has_a_row_for_each_measure_and_names_what_is_absent() {
        let page = report().markdown();
        for line in [
            "| | plain | between |",
            "| keepalive1 | 10.0 requests/s (8.00 to 20.0) | 5.00 requests/s (5.00 to 6.00) **0.50** |",
            "| keepalive1 | 50.0 / 90.0 | 50.0 / 90.0 |",
            "| keepalive1 | - | 85.4 us/request |",
            "| idle1000 | - | 6543 bytes/connection (6543 to 6543) |",
            "* envoy (between): no <Envoy> & \"none\"",
        ] {
            assert!(page.lines().any(|one| one == line), "{line}\nin\n{page}");
        }
        assert!(!page.contains("one node"), "no rows, no table");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 0.261, 9.5, 85.43, 12_345.6].map(short), ["0", "0.26", "9.50", "85.4", "12346"]);
    }
}
