//! `culvert-node`: the daemon of one node. Parses, starts, waits; the exit status says how it went:
//! 0 it ended as it was asked to, 1 something failed, 2 the command line or the configuration cannot be used.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use node_daemon::{
    app,
    config::{Config, Sources},
    telemetry::log::{self, Lines},
};
use tokio::runtime::{Builder, Runtime};

const FAILED: u8 = 1;
const UNUSABLE: u8 = 2;

/// Captures, encrypts and authorises the traffic of this node's workloads.
#[derive(Parser)]
#[command(name = "culvert-node", version)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs until SIGTERM or SIGINT; started beside a running one, it takes over
    Run(Sources),
    /// Removes everything of this node from the kernel and the workloads' namespaces: their traffic is plaintext again.
    /// Keys and documents on disk stay
    Cleanup(Sources),
}

fn main() -> ExitCode {
    let command = CommandLine::parse().command;
    let (Command::Run(sources) | Command::Cleanup(sources)) = &command;
    let config = match Config::read(sources) {
        Ok(config) => config,
        Err(error) => return complain(UNUSABLE, &error.to_string()),
    };
    let done = match command {
        Command::Run(_) => run(config),
        Command::Cleanup(_) => cleanup(&config),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(FAILED, &format!("{error:#}")),
    }
}

fn run(config: Config) -> Result<()> {
    let (lines, _end) = Lines::start(io::stdout())?;
    let filter = config.log.level.parse().context("log.level")?;
    tracing::subscriber::set_global_default(log::subscriber(config.log.format, filter, lines.clone()))?;
    let runtime = runtime(config.workers)?;
    let done = runtime.block_on(app::run(config, lines));
    // What still runs has drained; a blocking call that hangs does not hold up the end.
    runtime.shutdown_background();
    done
}

fn cleanup(config: &Config) -> Result<()> {
    let report = runtime(config.workers)?.block_on(app::cleanup(config))?;
    writeln!(io::stdout(), "{report}")?;
    Ok(())
}

fn runtime(workers: Option<usize>) -> Result<Runtime> {
    let mut builder = match workers {
        // A single worker has nobody to share with, and is spared what sharing costs.
        Some(1) => Builder::new_current_thread(),
        Some(workers) => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(workers);
            builder
        }
        None => Builder::new_multi_thread(),
    };
    builder.thread_name("culvert").enable_all().build().context("start the runtime")
}

fn complain(status: u8, problem: &str) -> ExitCode {
    // Nobody is left to be told that stderr is gone.
    let _ = writeln!(io::stderr(), "culvert-node: {problem}");
    ExitCode::from(status)
}
