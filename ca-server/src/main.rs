//! `culvert-ca`: the certificate authority as a process, and the operator's commands for it.
#![forbid(unsafe_code)]

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use ca_server::{Clock, Config, ask_status, ask_token, show_root, start};
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(name = "culvert-ca", version, about = "The certificate authority of a Culvert mesh")]
struct Arguments {
    /// Prefix of the default paths (/etc/culvert, /var/lib/culvert-ca, /run/culvert).
    #[arg(long, global = true, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve certificates until SIGTERM.
    Serve {
        /// Configuration file [default: etc/culvert/ca.yaml beneath --root].
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Make a new root although there was one before. Every node has to join again.
        #[arg(long)]
        init_new_root: bool,
    },
    /// Join tokens.
    #[command(subcommand)]
    Token(Token),
    /// The root.
    #[command(subcommand)]
    Root(Root),
    /// How the running authority stands, as JSON.
    Status {
        /// The authority's adminSocket [default: run/culvert/ca.sock beneath --root].
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
    },
}

#[derive(Subcommand)]
enum Token {
    /// Make a one-time token with which one node may join, and print it.
    Create {
        /// Name of the node, as in `spec.node` of its workloads.
        #[arg(long)]
        node: String,
        /// For how long it is good, at most 1h (s, m or h).
        #[arg(long, default_value = "1h", value_parser = duration)]
        ttl: Duration,
        /// The authority's adminSocket [default: run/culvert/ca.sock beneath --root].
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
    },
}

#[derive(Subcommand)]
enum Root {
    /// Print the pin and the certificate.
    Show {
        /// Configuration file [default: etc/culvert/ca.yaml beneath --root].
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One sentence for the operator, whatever the environment says of backtraces.
            let _ = writeln!(std::io::stderr().lock(), "culvert-ca: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(Arguments { root, command }: Arguments) -> anyhow::Result<()> {
    let config =
        |path: Option<PathBuf>| Config::load(&path.unwrap_or_else(|| Config::default_path(&root)), &root);
    let socket = |path: Option<PathBuf>| path.unwrap_or_else(|| Config::default_admin_socket(&root));
    match command {
        Command::Serve { config: path, init_new_root } => {
            serve(Config { init_new_root, ..config(path)? }).await
        }
        Command::Token(Token::Create { node, ttl, socket: path }) => {
            print(&ask_token(&socket(path), &node, ttl).await?)
        }
        Command::Root(Root::Show { config: path }) => {
            let shown = show_root(&config(path)?.state)?;
            print(&format!("pin: {}\n{}", shown.pin, shown.pem.trim_end()))
        }
        Command::Status { socket: path } => {
            print(&serde_json::to_string_pretty(&ask_status(&socket(path)).await?)?)
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    protect_memory()?;
    let filter = EnvFilter::try_from_env("CULVERT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stdout().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_target(false).with_ansi(colours).init();
    tracing::info!(?config, "configuration");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut handle = start(config, Clock::system()).await?;
    let asked = handle
        .wait(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
        .await;
    tracing::info!("stopping");
    handle.stop().await;
    anyhow::ensure!(asked, "the server ended by itself; the log says why");
    Ok(())
}

/// Keys stay out of core dumps and out of reach of a debugger of the same user.
fn protect_memory() -> anyhow::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("cannot forbid core dumps")?;
    nix::sys::prctl::set_dumpable(false).context("cannot make the process undumpable")
}

fn print(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout().lock(), "{text}").context("cannot print")
}

fn duration(text: &str) -> Result<Duration, String> {
    let expected = || format!("{text:?} is no duration, expected a number with s, m or h, such as 30m");
    let (number, seconds) = match text.as_bytes().last() {
        Some(b's') => (&text[..text.len() - 1], 1),
        Some(b'm') => (&text[..text.len() - 1], 60),
        Some(b'h') => (&text[..text.len() - 1], 3600),
        _ => return Err(expected()),
    };
    let number: u64 = number.parse().map_err(|_| expected())?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_has_a_number_and_a_unit() {
        for (text, seconds) in [("90s", 90), ("30m", 1800), ("1h", 3600)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "5", "m", "-1m", "1d", "1.5h", "99999999999999999999s", "9999999999999999999h", "1µ"]
        {
            duration(text).expect_err(text);
        }
    }
}
