//! One picture: for each topology and measure a group of bars, with the range of the rounds as a whisker.

use std::fmt::Write as _;

use super::{Report, Row, markdown::short};
use crate::plan::{MEASURES, Measure, Path, Topology, WAYS};

const WIDTH: f64 = 1080.0;
const COLUMN_WIDTH: f64 = 520.0;
const LABEL_WIDTH: f64 = 70.0;
const VALUE_WIDTH: f64 = 150.0;
const BAR_HEIGHT: f64 = 14.0;
const BAR_STEP: f64 = 18.0;
const GROUP_GAP: f64 = 40.0;
const TOP: f64 = 64.0;

impl Report {
    /// The report as an SVG.
    pub fn chart(&self) -> String {
        let mut bars = String::new();
        let mut height = TOP;
        for (column, topology) in [(0.0, Topology::SameNode), (1.0, Topology::Between)] {
            let left = 20.0 + column * (COLUMN_WIDTH + 20.0);
            let bottom = self.column(&mut bars, left, topology);
            height = height.max(bottom);
        }
        let machine = format!(
            "{}, {} cores, Linux {}, {}; {} rounds of {} s; bars: medians, whiskers: least to most",
            self.machine.cpu,
            self.machine.cores,
            self.machine.kernel,
            self.conditions.congestion_control,
            self.conditions.repeat,
            self.conditions.seconds
        );
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"20\" y=\"20\" font-size=\"14\" font-weight=\"bold\">What the mesh costs</text>\n\
             <text x=\"20\" y=\"38\" fill=\"#555\">{}</text>\n{bars}</svg>\n",
            escaped(&machine)
        )
    }

    /// Draws one topology, and says where it ends.
    fn column(&self, bars: &mut String, left: f64, topology: Topology) -> f64 {
        let mut top = TOP;
        let rows = |measure: Measure| -> Vec<(Path, &Row)> {
            let ways = WAYS.into_iter().filter(|way| way.topology == topology);
            let label = measure.label();
            ways.filter_map(|way| Some((way.path, self.row(topology.label(), way.path.label(), &label)?)))
                .collect()
        };
        for measure in MEASURES {
            let rows = rows(measure);
            if rows.is_empty() {
                continue;
            }
            let title = format!(
                "{} {}, {} ({} is better)",
                topology.label(),
                measure.label(),
                measure.unit(),
                if measure.more_is_better() { "more" } else { "less" }
            );
            let _ = writeln!(
                bars,
                "<text x=\"{left}\" y=\"{top}\" font-weight=\"bold\">{}</text>",
                escaped(&title)
            );
            let most = rows.iter().map(|(_, row)| row.max).fold(f64::MIN_POSITIVE, f64::max);
            for (path, row) in rows {
                top += BAR_STEP;
                bar(bars, left, top, path, row, (COLUMN_WIDTH - LABEL_WIDTH - VALUE_WIDTH) / most);
            }
            top += GROUP_GAP;
        }
        top
    }
}

fn bar(bars: &mut String, left: f64, baseline: f64, path: Path, row: &Row, scale: f64) {
    let (start, top) = (left + LABEL_WIDTH, baseline - BAR_HEIGHT + 3.0);
    let middle = top + BAR_HEIGHT / 2.0;
    let ratio =
        row.ratio_to_plain.filter(|_| path != Path::Plain).map(|ratio| format!(" ({}x)", short(ratio)));
    let value = format!("{}{}", short(row.median), ratio.unwrap_or_default());
    let _ = writeln!(
        bars,
        "<text x=\"{left}\" y=\"{baseline}\">{name}</text>\
         <rect x=\"{start}\" y=\"{top}\" width=\"{width:.1}\" height=\"{BAR_HEIGHT}\" fill=\"{colour}\"/>\
         <line x1=\"{low:.1}\" x2=\"{high:.1}\" y1=\"{middle}\" y2=\"{middle}\" stroke=\"#333\"/>\
         <text x=\"{beside:.1}\" y=\"{baseline}\">{value}</text>",
        name = path.label(),
        width = row.median * scale,
        colour = colour(path),
        low = start + row.min * scale,
        high = start + row.max * scale,
        beside = start + row.max * scale + 6.0,
    );
}

const fn colour(path: Path) -> &'static str {
    match path {
        Path::Plain => "#9e9e9e",
        Path::Direct => "#2e7d32",
        Path::Redirect => "#66bb6a",
        Path::Relay => "#1976d2",
        Path::Between => "#0d47a1",
        Path::Envoy => "#c2185b",
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn every_row_has_a_bar_as_long_as_its_median() {
        let report = report();
        let chart = report.chart();
        assert!(chart.starts_with("<svg ") && chart.ends_with("</svg>\n"));
        // The background, and a bar for each row.
        assert_eq!(chart.matches("<rect ").count(), 1 + report.rows.len());
        assert!(chart.contains("width=\"150.0\""), "10 of 20 requests/s on 300 pixels\n{chart}");
        assert!(chart.contains("5.00 (0.50x)"), "{chart}");
    }

    #[test]
    fn words_of_the_machine_cannot_break_the_picture() {
        assert_eq!(escaped("a<b> & c"), "a&lt;b&gt; &amp; c");
    }
}
