//! `culvert`: what an operator asks of a node's daemon, over its admin socket.
//! Exit status: 0 it answered, 1 the answer cannot be used, 2 there is no daemon (or the command line cannot be used).

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use node_daemon::{
    admin::{
        client::{self, AskError},
        status::Status,
    },
    config::Root,
};
use tokio::runtime::Builder;

const FAILED: u8 = 1;
const ABSENT: u8 = 2;

/// Looks at the daemon of this node.
#[derive(Parser)]
#[command(name = "culvert", version)]
struct CommandLine {
    /// Folder before /run/culvert, as the daemon's
    #[arg(long, env = "CULVERT_ROOT", default_value = "/", global = true)]
    root: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Workloads, certificates, policies with problems, connections
    Status {
        /// As JSON, all of it
        #[arg(long)]
        json: bool,
    },
    /// Everything that the daemon knows and that is no secret, as JSON
    Dump,
}

fn main() -> ExitCode {
    let command_line = CommandLine::parse();
    let socket = Root::new(&command_line.root).admin_socket();
    let page = match command_line.command {
        Command::Status { .. } => "/status",
        Command::Dump => "/dump",
    };
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return complain(FAILED, &error.to_string()),
    };
    let text = match runtime.block_on(client::ask(&socket, page)) {
        Ok(text) => text,
        Err(error @ (AskError::Absent { .. } | AskError::Forbidden { .. } | AskError::Silent { .. })) => {
            return complain(ABSENT, &error.to_string());
        }
        Err(error @ AskError::Answer { .. }) => return complain(FAILED, &error.to_string()),
    };
    let shown = match command_line.command {
        Command::Status { json: false } => {
            serde_json::from_str::<Status>(&text).map(|status| status.to_string())
        }
        Command::Status { json: true } | Command::Dump => Ok(text + "\n"),
    };
    let written = match shown {
        Ok(shown) => io::stdout().write_all(shown.as_bytes()),
        Err(error) => return complain(FAILED, &format!("the daemon is of another version: {error}")),
    };
    match written {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has seen enough, as `head` does.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => complain(FAILED, &error.to_string()),
    }
}

fn complain(status: u8, problem: &str) -> ExitCode {
    // Nobody is left to be told that stderr is gone.
    let _ = writeln!(io::stderr(), "culvert: {problem}");
    ExitCode::from(status)
}
