//! `mesh-bench run` measures; `mesh-bench load` and `mesh-bench serve` are what it starts in the pods.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use mesh_bench::{load, plan::Selection, policy, run, stage};

#[derive(Parser)]
#[command(name = "mesh-bench")]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measures, and writes latest.json, latest.md and latest.svg
    Run(Run),
    /// Measures policy by itself, and writes policy.json and policy.md
    Policy(Policy),
    /// The client of the load; orders come on standard input
    Load,
    /// The server of the load
    Serve,
}

#[derive(clap::Args)]
struct Run {
    /// Only these paths, measures and topologies, e.g. `direct,rtt64`; plain comes along for the ratio
    #[arg(long)]
    only: Vec<String>,
    /// Rounds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat: u32,
    /// Seconds of each run
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=run::SECONDS_MAX))]
    seconds: u64,
    /// Bulk data from the server to the client instead of from the client to the server
    #[arg(long)]
    down: bool,
    /// Congestion control of every socket
    #[arg(long, default_value = stage::CONGESTION_CONTROL)]
    congestion: String,
    /// Let all processes run on all processors, instead of giving each node one
    #[arg(long)]
    shared_processors: bool,
    /// Worker threads of each daemon and each sidecar; default: one for each processor of a node
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: Option<u16>,
    /// The Envoy to compare with
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// Where the results are written
    #[arg(long)]
    out: PathBuf,
}

#[derive(clap::Args)]
struct Policy {
    /// Rounds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat: u32,
    /// Where the results are written
    #[arg(long)]
    out: PathBuf,
}

fn main() -> ExitCode {
    let done = match CommandLine::parse().command {
        Command::Run(wanted) => measure(wanted),
        Command::Policy(wanted) => measure_policy(&wanted),
        Command::Load => load::client::obey(),
        Command::Serve => load::server::serve().map_err(Into::into),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(wanted: Run) -> Result<()> {
    let selection = Selection::parse(&wanted.only)?;
    stage::prepare_folder(&wanted.out)?;
    let processors =
        if wanted.shared_processors { stage::Processors::Shared } else { stage::Processors::OnePerNode };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = if wanted.shared_processors { cores } else { 1 };
    let report = run::run(&run::Wanted {
        selection,
        repeat: wanted.repeat,
        seconds: wanted.seconds,
        down: wanted.down,
        stage: stage::Settings {
            congestion_control: wanted.congestion,
            envoy: wanted.envoy,
            processors,
            workers: wanted.workers.map_or(workers, usize::from),
        },
    })?;
    ensure!(!report.rows.is_empty(), "nothing could be measured: {:?}", report.absent);
    println!("{}", report.markdown());
    for path in run::write(&report, &wanted.out)? {
        eprintln!("bench: wrote {}", path.display());
    }
    Ok(())
}

fn measure_policy(wanted: &Policy) -> Result<()> {
    stage::prepare_folder(&wanted.out)?;
    let figures = policy::measure(wanted.repeat)?;
    println!("{}", figures.markdown());
    for path in policy::write(&figures, &wanted.out)? {
        eprintln!("bench: wrote {}", path.display());
    }
    Ok(())
}
