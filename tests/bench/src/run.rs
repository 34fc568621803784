//! Rounds: in each one every measure is taken on every way, one after the other, so that what disturbs the machine for a
//! while disturbs all ways alike.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};

use crate::{
    load::{Answer, Counted, LARGE_BYTES, Load, Order, SMALL_BYTES, port},
    machine,
    plan::{Measure, Selection, Way},
    report::{Absent, Conditions, Report, Sample, Samples},
    stage::{self, Lane, Stage},
};

/// Bulk data fills the buffers of all on the way before it is counted, and the others their caches.
const WARM_TIME: Duration = Duration::from_millis(300);

/// Rounds of memory: each one starts the proxies anew.
const IDLE_ROUNDS_MAX: u32 = 3;

/// Most seconds of one run.
pub const SECONDS_MAX: u64 = 60;

/// Descriptors that the idle connections of the largest measure need in one proxy: two each, and some.
const DESCRIPTORS_MIN: u64 = 11_000;

/// What was asked for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Which rows.
    pub selection: Selection,
    /// Rounds.
    pub repeat: u32,
    /// Of each run.
    pub seconds: u64,
    /// Bulk data from the server to the client.
    pub down: bool,
    /// How the worlds are made.
    pub stage: stage::Settings,
}

/// Sets the stage, runs all rounds, and makes the report.
///
/// # Errors
/// If the worlds cannot be made, or a load fails.
pub fn run(wanted: &Wanted) -> Result<Report> {
    raise_descriptors()?;
    let ways = wanted.selection.ways();
    let measures = wanted.selection.measures();
    eprintln!(
        "bench: {} ways, {} measures, {} rounds of {} s",
        ways.len(),
        measures.len(),
        wanted.repeat,
        wanted.seconds
    );
    let mut stage = Stage::set(&ways, &wanted.stage)?;
    for (way, reason) in &stage.absent {
        eprintln!("bench: {way} is absent: {reason}");
    }
    let mut samples = Samples::default();
    let (idle, timed): (Vec<Measure>, Vec<Measure>) =
        measures.into_iter().partition(|measure| matches!(measure, Measure::Idle(_)));
    if !idle.is_empty() {
        memory(&mut stage, &idle, wanted.repeat.min(IDLE_ROUNDS_MAX), &mut samples)?;
    }
    for round in 1..=wanted.repeat {
        for measure in &timed {
            eprintln!("bench: round {round} of {}: {}", wanted.repeat, measure.label());
            for lane in &mut stage.lanes {
                let counted = count(lane, *measure, wanted)?;
                samples.add(lane.way, *measure, sample(*measure, &counted));
            }
        }
    }
    let absent = stage.absent.iter().map(|(way, reason)| Absent::new(*way, reason)).collect();
    Ok(samples.report(machine::describe(&conditions(wanted)), conditions(wanted), absent))
}

fn conditions(wanted: &Wanted) -> Conditions {
    Conditions {
        congestion_control: wanted.stage.congestion_control.clone(),
        stream_direction: if wanted.down { "server to client" } else { "client to server" }.to_owned(),
        proxy_workers: wanted.stage.workers,
        processors: match wanted.stage.processors {
            stage::Processors::OnePerNode => "each node has one processor, for its pods and its proxies",
            stage::Processors::Shared => "all nodes share all processors",
        }
        .to_owned(),
        seconds: wanted.seconds,
        repeat: wanted.repeat,
    }
}

fn count(lane: &mut Lane, measure: Measure, wanted: &Wanted) -> Result<Counted> {
    let Some((load, port)) = load(measure, wanted.down) else { bail!("{} is no load", measure.label()) };
    let order = Order::Run {
        load,
        target: lane.target(port),
        warm_ms: u64::try_from(WARM_TIME.as_millis())?,
        count_ms: wanted.seconds * 1000,
        cpu: lane.cpu_files(),
    };
    match lane.order(&order).with_context(|| measure.label())? {
        Answer::Counted(counted) => Ok(counted),
        Answer::Done | Answer::Failed(_) => bail!("the load of {} was not counted", measure.label()),
    }
}

fn load(measure: Measure, down: bool) -> Option<(Load, u16)> {
    Some(match measure {
        Measure::Stream(connections) if down => (Load::Down { connections }, port::SOURCE),
        Measure::Stream(connections) => (Load::Up { connections }, port::SINK),
        Measure::RoundTrip(bytes) if usize::from(bytes) == SMALL_BYTES => {
            (Load::Echo { bytes: SMALL_BYTES }, port::ECHO_SMALL)
        }
        Measure::RoundTrip(_) => (Load::Echo { bytes: LARGE_BYTES }, port::ECHO_LARGE),
        Measure::KeepAlive(connections) => (Load::Requests { connections }, port::REQUESTS),
        Measure::Connect(parallel) => (Load::Connects { parallel }, port::CONNECT),
        Measure::Idle(_) => return None,
    })
}

/// From what was counted to the units of the report.
#[expect(clippy::cast_precision_loss, reason = "counts of seconds are far below 2^52")]
fn sample(measure: Measure, counted: &Counted) -> Sample {
    let seconds = counted.nanoseconds as f64 / 1e9;
    let amount = counted.amount as f64;
    let cpu_seconds = counted.cpu_microseconds as f64 / 1e6;
    let p50 = counted.p50_nanoseconds.map(|time| time as f64 / 1e3);
    let p99 = counted.p99_nanoseconds.map(|time| time as f64 / 1e3);
    let value = match measure {
        Measure::Stream(_) => amount * 8.0 / seconds / 1e9,
        Measure::RoundTrip(_) => p50.unwrap_or(f64::NAN),
        Measure::KeepAlive(_) | Measure::Connect(_) | Measure::Idle(_) => amount / seconds,
    };
    let cpu = match measure {
        Measure::Stream(_) => cpu_seconds / (amount / f64::from(1 << 30)),
        Measure::RoundTrip(_) | Measure::KeepAlive(_) | Measure::Connect(_) | Measure::Idle(_) => {
            cpu_seconds * 1e6 / amount
        }
    };
    Sample { value, p50, p99, cpu: Some(cpu) }
}

/// Memory of proxies that have done nothing else: from start, with more and more connections.
fn memory(stage: &mut Stage, measures: &[Measure], rounds: u32, samples: &mut Samples) -> Result<()> {
    for round in 1..=rounds {
        for lane in stage.lanes.iter_mut().filter(|lane| lane.has_proxies()) {
            eprintln!("bench: round {round} of {rounds}: memory of {}", lane.way);
            lane.restart()?;
            for (measure, value) in
                grown(lane, measures).with_context(|| format!("memory of {}", lane.way))?
            {
                samples.add(lane.way, measure, Sample { value, p50: None, p99: None, cpu: None });
            }
        }
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "bytes of memory are far below 2^52")]
fn grown(lane: &mut Lane, measures: &[Measure]) -> Result<Vec<(Measure, f64)>> {
    let target = lane.target(port::HOLD);
    // What a first connection brings along, such as the tunnel, is not what each one costs.
    lane.order(&Order::Hold { target, connections: 1 })?;
    let before = lane.resident_bytes()?;
    let mut grown = Vec::new();
    for measure in measures {
        let Measure::Idle(connections) = *measure else { continue };
        if connections == 0 {
            grown.push((*measure, before as f64));
            continue;
        }
        lane.order(&Order::Hold { target, connections: connections + 1 })?;
        let more = lane.resident_bytes()?.saturating_sub(before);
        grown.push((*measure, more as f64 / f64::from(connections)));
    }
    lane.restart_load()?;
    Ok(grown)
}

/// Raises this process's limit, which all others inherit, to what the machine allows.
fn raise_descriptors() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    if hard < DESCRIPTORS_MIN {
        bail!("{hard} descriptors for a process are too few: {DESCRIPTORS_MIN} are needed (ulimit -Hn)");
    }
    Ok(())
}

/// Where Envoy is, if the ways that were asked for need it.
#[must_use]
pub fn needs_envoy(ways: &[Way]) -> bool {
    ways.iter().any(|way| way.path == crate::plan::Path::Envoy)
}

/// Files of a report in a folder.
///
/// # Errors
/// If they cannot be written.
pub fn write(report: &Report, folder: &std::path::Path) -> Result<Vec<PathBuf>> {
    let files =
        [("latest.json", report.json()?), ("latest.md", report.markdown()), ("latest.svg", report.chart())];
    let mut written = Vec::new();
    for (name, text) in files {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
        written.push(path);
    }
    Ok(written)
}
