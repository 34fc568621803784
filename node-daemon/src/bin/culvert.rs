//! `culvert`: what an operator asks of a node's daemon, over its admin socket, and of policies, without one.
//! Exit status: 0 it answered, 1 the answer cannot be used, cases fall short or the answer is a no, 2 there is no daemon, a
//! file cannot be used, or the command line cannot.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use glob::Pattern;
use node_daemon::{
    admin::{
        client::{self, AskError},
        status::Status,
    },
    config::{Config, Root, Sources},
    control::file,
    policy_tools::{self, Question, Tested},
};
use spiffe_id::TrustDomain;
use tokio::runtime::Builder;

const FAILED: u8 = 1;
const ABSENT: u8 = 2;
const UNUSABLE: u8 = 2;

/// Largest file of a token, in bytes: far more than servers accept in a header.
const TOKEN_FILE_BYTES_MAX: u64 = 64 * 1024;

/// Looks at the daemon of this node, and tests policies.
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
    /// Policies, without a daemon
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Why a connection or a request is allowed or denied, from documents alone. Exit status: 0 allowed, 1 denied,
    /// 2 no answer
    Why(Why),
}

#[derive(Subcommand)]
enum PolicyCommand {
    /// Do cases hold? Exit status 0: all do, 1: some fall short, 2: a file cannot be used
    Test(PolicyTest),
}

#[derive(Args)]
struct PolicyTest {
    /// Files of cases; the policies that they name lie relative to them
    #[arg(required = true, value_name = "CASES.yaml")]
    cases: Vec<PathBuf>,
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Only cases whose whole name matches; `*` is any text, `?` one character, `[…]` one of these
    #[arg(long, value_name = "GLOB")]
    only: Option<Pattern>,
}

#[derive(Args)]
struct Why {
    /// A workload or service account as namespace/name, an identity, or a workload's address
    from: String,
    /// A service or workload as namespace/name or by its name in DNS, or an address; with its port
    #[arg(value_name = "TO:PORT")]
    to: String,
    /// Where the port is judged request by request
    #[arg(requires = "path")]
    method: Option<String>,
    /// With query
    path: Option<String>,
    /// A header of the request
    #[arg(short = 'H', value_name = "NAME:VALUE", value_parser = header)]
    header: Vec<(String, String)>,
    /// File of a token, sent as Authorization: Bearer
    #[arg(long, value_name = "FILE")]
    jwt: Option<PathBuf>,
    /// Folder of documents, policies and workloads [default: the daemon's, by ROOT/etc/culvert/node.yaml]
    #[arg(long, value_name = "FOLDER")]
    policies: Option<PathBuf>,
    /// Trust domain of the mesh where --policies is used
    #[arg(long, default_value = "cluster.local")]
    trust_domain: TrustDomain,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    /// A line for each case that falls short, then the count
    Text,
    /// One document with all cases
    Json,
}

fn main() -> ExitCode {
    let command_line = CommandLine::parse();
    match command_line.command {
        Command::Status { json: true } => ask(&command_line.root, "/status", |text| Ok(text + "\n")),
        Command::Status { json: false } => ask(&command_line.root, "/status", |text| {
            serde_json::from_str::<Status>(&text).map(|status| status.to_string())
        }),
        Command::Dump => ask(&command_line.root, "/dump", |text| Ok(text + "\n")),
        Command::Policy(PolicyCommand::Test(asked)) => policy_test(&asked),
        Command::Why(asked) => why(&command_line.root, asked),
    }
}

/// One page of the daemon, as `show` has it.
fn ask(root: &Path, page: &str, show: impl FnOnce(String) -> serde_json::Result<String>) -> ExitCode {
    let socket = Root::new(root).admin_socket();
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
    match show(text) {
        Ok(shown) => print(&shown, ExitCode::SUCCESS),
        Err(error) => complain(FAILED, &format!("the daemon is of another version: {error}")),
    }
}

fn policy_test(asked: &PolicyTest) -> ExitCode {
    let is_wanted = |name: &str| asked.only.as_ref().is_none_or(|pattern| pattern.matches(name));
    let tested = policy_tools::test(&asked.cases, &is_wanted);
    let mut status = if tested.report.failed() == 0 { ExitCode::SUCCESS } else { ExitCode::from(FAILED) };
    for unusable in &tested.unusable {
        status = complain(UNUSABLE, &unusable.to_string());
    }
    if tested.files_unusable == asked.cases.len() {
        return status;
    }
    if let (true, Some(pattern)) = (tested.report.cases.is_empty(), &asked.only) {
        // Not a failure, and all the same hardly what was meant.
        complain(0, &format!("no case has a name that matches {pattern}"));
    }
    print(&shown(&tested, asked.output), status)
}

fn shown(tested: &Tested, output: Output) -> String {
    match output {
        Output::Text => tested.report.lines().join("\n") + "\n",
        Output::Json => format!("{}\n", tested.report.json()),
    }
}

fn why(root: &Path, asked: Why) -> ExitCode {
    let token = match asked.jwt.as_deref().map(|path| (path, file::read(path, TOKEN_FILE_BYTES_MAX))) {
        None => None,
        Some((_, Ok(text))) => Some(text.trim().to_owned()),
        Some((path, Err(reason))) => {
            return complain(UNUSABLE, &format!("{}: {reason}", path.display()));
        }
    };
    let (folder, trust_domain) = match asked.policies {
        Some(folder) => (folder, asked.trust_domain),
        None => match Config::read(&Sources { root: root.to_owned(), ..Sources::default() }) {
            Ok(config) => (config.workloads, config.ca.trust_domain),
            Err(error) => {
                return complain(UNUSABLE, &format!("{error}; or name a folder with --policies"));
            }
        },
    };
    let request = asked.method.zip(asked.path);
    let question = Question { from: asked.from, to: asked.to, request, headers: asked.header, token };
    match policy_tools::why(&folder, &trust_domain, &question) {
        Ok(answer) => {
            let status = if answer.allowed { ExitCode::SUCCESS } else { ExitCode::from(FAILED) };
            print(&answer.to_string(), status)
        }
        Err(problem) => complain(UNUSABLE, &problem.to_string()),
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("expected a name, a colon and a value")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

fn print(text: &str, status: ExitCode) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => status,
        // The reader has seen enough, as `head` does.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => status,
        Err(error) => complain(FAILED, &error.to_string()),
    }
}

fn complain(status: u8, problem: &str) -> ExitCode {
    // Nobody is left to be told that stderr is gone.
    let _ = writeln!(io::stderr(), "culvert: {problem}");
    ExitCode::from(status)
}
