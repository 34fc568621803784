//! `culvert`: what an operator asks of a node's daemon, over its admin socket, and of policies, without one.
//! Exit status: 0 it answered, 1 the answer cannot be used, cases fall short or the answer is a no, 2 there is no daemon, a
//! file cannot be used, or the command line cannot, 3 a conversion is not proven.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use glob::Pattern;
use node_core::audit::verify::Anchor;
use node_daemon::{
    admin::{
        client::{self, AskError},
        status::Status,
    },
    audit::{self, verify::Unusable},
    config::{Config, Root, Sources},
    control::file,
    policy_tools::{self, Converted, Question, Tested},
};
use spiffe_id::{NodeId, TrustDomain};
use tokio::runtime::Builder;

const FAILED: u8 = 1;
const ABSENT: u8 = 2;
const UNUSABLE: u8 = 2;
const UNPROVEN: u8 = 3;

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
    /// The audit log, without a daemon
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Why a connection or a request is allowed or denied, from documents alone. Exit status: 0 allowed, 1 denied,
    /// 2 no answer
    Why(Why),
}

#[derive(Subcommand)]
enum PolicyCommand {
    /// Do cases hold? Exit status 0: all do, 1: some fall short, 2: a file cannot be used
    Test(PolicyTest),
    /// What would another folder have refused, or allowed? Exit status 0: nothing else than was, 1: some verdicts would be
    /// others or cannot be told, 2: a line, the log or the folder cannot be read
    Replay(PolicyReplay),
    /// Objects of 2018 as objects of the current API, with a proof that they say the same. Exit status 0: proven, 1: it
    /// cannot be said or does not say the same, 2: the folder cannot be used, 3: written, and not proven
    Convert(PolicyConvert),
}

#[derive(Args)]
struct PolicyReplay {
    /// The daemon's access log in format json; - is standard input
    #[arg(value_name = "ACCESS LOG")]
    log: PathBuf,
    /// Documents under which it is judged: workloads, services and policies
    folder: PathBuf,
    /// One document with everything that was found
    #[arg(long)]
    json: bool,
    #[arg(long, default_value = "cluster.local")]
    trust_domain: TrustDomain,
}

#[derive(Args)]
struct PolicyConvert {
    /// Documents: workloads, services and policies
    folder: PathBuf,
    /// Write no document, say only whether it can be done
    #[arg(long)]
    check: bool,
    #[arg(long, default_value = "cluster.local")]
    trust_domain: TrustDomain,
}

#[derive(Subcommand)]
enum AuditCommand {
    /// Is a log as the node wrote it? Exit status 0: it holds, 1: it does not, 2: a file cannot be used
    Verify(AuditVerify),
}

#[derive(Args)]
struct AuditVerify {
    /// Folder of a log, or one segment of it
    log: PathBuf,
    /// Roots of the mesh in PEM, to which whoever signed must lead [default: this node's own, beneath ROOT]
    #[arg(long, value_name = "FILE", conflicts_with = "chain_only")]
    root_ca: Option<PathBuf>,
    /// Leave signatures aside: then nothing tells who wrote the log
    #[arg(long)]
    chain_only: bool,
    /// Whose log it must be, as spiffe://TRUST-DOMAIN/culvert/node/NAME
    #[arg(long, value_name = "NODE")]
    node: Option<NodeId>,
    /// Number of a record that was seen elsewhere, in the metric culvert_audit_checkpoint_sequence or the daemon's log; with
    /// its digest if that is known. A log that ends before it was cut off
    #[arg(long, value_name = "SEQUENCE[:DIGEST]")]
    expect_at_least: Option<Anchor>,
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
        Command::Policy(PolicyCommand::Replay(asked)) => policy_replay(&asked),
        Command::Policy(PolicyCommand::Convert(asked)) => policy_convert(&asked),
        Command::Audit(AuditCommand::Verify(asked)) => audit_verify(&command_line.root, asked),
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

fn audit_verify(root: &Path, asked: AuditVerify) -> ExitCode {
    let roots = match (asked.chain_only, asked.root_ca) {
        (true, _) => None,
        (false, Some(file)) => Some(file),
        (false, None) => Some(audit::verify::roots_of_node(&Root::new(root).state())),
    };
    let node = asked.node.map(|node| node.to_string());
    let question = audit::verify::Question { roots, node, anchor: asked.expect_at_least };
    match audit::verify::verify(&asked.log, &question) {
        Ok(verdict) => {
            let status = if verdict.holds() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) };
            print(&verdict.to_string(), status)
        }
        Err(unusable @ (Unusable::Roots { .. } | Unusable::NoRoots { .. })) => {
            complain(UNUSABLE, &format!("{unusable}: name the roots of the mesh by --root-ca"))
        }
        Err(unusable) => complain(UNUSABLE, &unusable.to_string()),
    }
}

fn policy_replay(asked: &PolicyReplay) -> ExitCode {
    let log: Box<dyn BufRead> = if asked.log == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        match File::open(&asked.log) {
            Ok(file) => Box::new(BufReader::new(file)),
            Err(error) => return complain(UNUSABLE, &format!("{}: {error}", asked.log.display())),
        }
    };
    let replayed = match policy_tools::replay(log, &asked.folder, &asked.trust_domain) {
        Ok(replayed) => replayed,
        Err(problem) => return complain(UNUSABLE, &problem.to_string()),
    };
    let status = match (replayed.has_bad_lines(), replayed.has_changes()) {
        (true, _) => ExitCode::from(UNUSABLE),
        (false, true) => ExitCode::from(FAILED),
        (false, false) => ExitCode::SUCCESS,
    };
    let shown = if asked.json { format!("{}\n", replayed.json()) } else { replayed.to_string() };
    print(&shown, status)
}

fn policy_convert(asked: &PolicyConvert) -> ExitCode {
    let converted = match policy_tools::convert(&asked.folder, &asked.trust_domain) {
        Ok(converted) => converted,
        Err(problem) => return complain(UNUSABLE, &problem.to_string()),
    };
    let status = match &converted {
        Converted::Nothing => 0,
        Converted::Refused(_) | Converted::Differs { .. } => FAILED,
        Converted::Written { .. } if converted.is_proven() => 0,
        Converted::Written { .. } => UNPROVEN,
    };
    let told = converted.lines().iter().fold(ExitCode::from(status), |_, line| complain(status, line));
    match converted {
        Converted::Written { yaml, .. } if !asked.check => print(&yaml, told),
        Converted::Nothing
        | Converted::Refused(_)
        | Converted::Differs { .. }
        | Converted::Written { .. } => told,
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
