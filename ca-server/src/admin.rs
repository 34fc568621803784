//! The operator's unix socket: makes join tokens, says how things stand. 0600, and only root and our own user are heard.
//!
//! One JSON object in a line asks, one answers: `{"command":"token-create","node":"node-a","ttlSeconds":1800}` gives
//! `{"ok":{"token":"culvert-join.v1…","expires":"…"}}`, `{"command":"status"}` gives `{"ok":{…}}`, and what is refused
//! gives `{"error":"…"}`.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ca_proto::join_token::{JoinToken, SECRET_BYTES, TokenSecret};
use serde::{Deserialize, Serialize};
use serde_json::json;
use spiffe_id::NodeId;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::accept::Services;
use crate::listen::ACCEPT_PAUSE;
use crate::telemetry::Event;

/// Longest life of a join token, in seconds: long enough to carry it to a machine, short enough that a copy in a
/// terminal's history is worth nothing.
const TOKEN_SECONDS_MAX: u64 = 3600;

/// Longest line in either direction, in bytes, its newline included; a status of 5,000 nodes takes half of it. A longer
/// one is refused.
const LINE_BYTES_MAX: u64 = 1024 * 1024;

/// How long one exchange may take.
const EXCHANGE_MAX: Duration = Duration::from_secs(5);

/// Exchanges at once; the operator is one person. Further ones wait in the kernel's queue.
const EXCHANGES_MAX: usize = 8;

/// Why the operator's socket did not serve.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The socket cannot be made or reached.
    #[error("{path}: cannot {action}: {source}")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody answers on the socket already, or it is no socket.
    #[error("{path} is in use: end the other culvert-ca, or set adminSocket")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The authority refused.
    #[error("{0}")]
    Refused(String),
    /// The answer is not what it should be.
    #[error("{path}: the answer is not that of culvert-ca: {problem}")]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
enum Command {
    #[serde(rename_all = "camelCase")]
    TokenCreate {
        node: String,
        ttl_seconds: u64,
    },
    Status,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Ok(serde_json::Value),
    Error(String),
}

/// Makes the socket. One that a dead process left behind is replaced, one that answers is not.
pub(crate) async fn listen(path: &Path) -> Result<UnixListener, AdminError> {
    let failed = |action| move |source| AdminError::Socket { action, path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        tokio::fs::create_dir_all(folder).await.map_err(failed("make its folder"))?;
    }
    match tokio::fs::symlink_metadata(path).await {
        Ok(found) if found.file_type().is_socket() && UnixStream::connect(path).await.is_err() => {
            tokio::fs::remove_file(path).await.map_err(failed("remove what a dead process left"))?;
        }
        Ok(_) => return Err(AdminError::InUse { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("look at")(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed("make"))?;
    // Until then the kernel's word on who is at the other end keeps others out.
    let private = std::fs::Permissions::from_mode(0o600);
    tokio::fs::set_permissions(path, private).await.map_err(failed("make private"))?;
    Ok(listener)
}

/// Answers until cancelled, then removes the socket.
pub(crate) async fn serve(
    listener: UnixListener,
    path: PathBuf,
    services: Arc<Services>,
    cancel: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(EXCHANGES_MAX));
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => break,
            accepted = next(&listener, &slots) => accepted,
        };
        let Ok((stream, slot)) = accepted.inspect_err(|error| tracing::warn!(%error, "admin socket")) else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let services = Arc::clone(&services);
        tokio::spawn(async move {
            let _slot = slot;
            match tokio::time::timeout(EXCHANGE_MAX, exchange(stream, &services)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "admin exchange failed"),
                Err(_) => tracing::debug!("admin exchange took too long"),
            }
        });
    }
    let _ = tokio::fs::remove_file(&path).await;
}

async fn next(
    listener: &UnixListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(UnixStream, OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, slot))
}

async fn exchange(mut stream: UnixStream, services: &Arc<Services>) -> io::Result<()> {
    let caller = stream.peer_cred()?.uid();
    let (read, mut write) = stream.split();
    let answer = if caller == 0 || caller == nix::unistd::geteuid().as_raw() {
        match read_line(read, LINE_BYTES_MAX).await?.map(|line| serde_json::from_str(&line)) {
            Ok(Ok(command)) => run(command, services).await,
            Ok(Err(error)) => Answer::Error(format!("not a command: {error}")),
            Err(TooLong) => Answer::Error(format!("not a command: it is longer than {LINE_BYTES_MAX} bytes")),
        }
    } else {
        tracing::warn!(uid = caller, "admin socket: refused a caller that is neither root nor our own user");
        Answer::Error("only root and the authority's own user are heard here".into())
    };
    let mut line = Zeroizing::new(serde_json::to_vec(&answer)?);
    line.push(b'\n');
    write.write_all(&line).await
}

/// A line has no end within the limit.
#[derive(Debug, PartialEq, Eq)]
struct TooLong;

/// One line; a stream that ends without a newline ends it too.
async fn read_line(
    from: impl AsyncRead + Unpin,
    bytes_max: u64,
) -> io::Result<Result<Zeroizing<String>, TooLong>> {
    let mut line = Zeroizing::new(String::new());
    // One byte more than the limit tells a line that is too long from one that ends there.
    let read = BufReader::new(from.take(bytes_max + 1)).read_line(&mut line).await?;
    Ok(if read as u64 > bytes_max { Err(TooLong) } else { Ok(line) })
}

async fn run(command: Command, services: &Arc<Services>) -> Answer {
    let services = Arc::clone(services);
    let done = tokio::task::spawn_blocking(move || match command {
        Command::TokenCreate { node, ttl_seconds } => create_token(&node, ttl_seconds, &services),
        Command::Status => status(&services),
    });
    match done.await {
        Ok(Ok(value)) => Answer::Ok(value),
        Ok(Err(problem)) => Answer::Error(problem),
        Err(error) => Answer::Error(error.to_string()),
    }
}

fn create_token(node: &str, ttl_seconds: u64, services: &Services) -> Result<serde_json::Value, String> {
    let node = NodeId::new(services.authority.trust_domain().clone(), node)
        .map_err(|error| format!("node is {node:?}, expected the name of a node: {error}"))?;
    if !(1..=TOKEN_SECONDS_MAX).contains(&ttl_seconds) {
        return Err(format!(
            "ttl is {ttl_seconds} s, expected 1 to {TOKEN_SECONDS_MAX} s: a join token is used at once"
        ));
    }
    let mut random = Zeroizing::new([0; SECRET_BYTES]);
    aws_lc_rs::rand::fill(&mut *random).map_err(|_| "there is no randomness".to_owned())?;
    let secret = TokenSecret::new(*random);
    let now = services.clock.now();
    let expires = now.plus(ttl_seconds);
    services
        .ledger
        .add_token(&secret.hash(), node.name(), expires, now)
        .map_err(|error| error.to_string())?;
    services.telemetry.tell(&Event::TokenMade { node: node.name(), expires });
    let token = JoinToken::new(secret, services.authority.pin(), &node);
    Ok(json!({"token": *token.expose(), "expires": expires.to_string()}))
}

fn status(services: &Services) -> Result<serde_json::Value, String> {
    let counts = services.ledger.counts().map_err(|error| error.to_string())?;
    let view = Arc::clone(&services.registry.borrow());
    let nodes: serde_json::Map<_, _> = services
        .watchers
        .nodes()
        .into_iter()
        .map(|(node, state)| (node, json!({"streams": state.streams, "ackedBundle": state.acked_version})))
        .collect();
    Ok(json!({
        "trustDomain": services.authority.trust_domain().as_str(),
        "rootPin": services.authority.pin().to_string(),
        "rootExpires": services.authority.root_expires().to_string(),
        "issuingExpires": services.authority.issuing().expires().to_string(),
        "bundleVersion": services.bundle.borrow().version,
        "ledger": {"certificates": counts.issued, "tokens": counts.tokens},
        "registry": {
            "nodes": view.assignments.nodes(),
            "identities": view.assignments.identities(),
            "problems": view.problems.iter().map(|(file, what)| (file.display().to_string(), what)).collect::<std::collections::BTreeMap<_, _>>(),
        },
        "watching": nodes,
        "counters": services.telemetry.counters(),
    }))
}

/// Asks a running authority for a join token; the answer is the token's printed line.
///
/// # Errors
/// The authority does not run, or refuses the node's name or the time.
pub async fn ask_token(socket: &Path, node: &str, ttl: Duration) -> Result<Zeroizing<String>, AdminError> {
    let command = Command::TokenCreate { node: node.to_owned(), ttl_seconds: ttl.as_secs() };
    match ask(socket, &command).await?.get_mut("token").map(serde_json::Value::take) {
        Some(serde_json::Value::String(token)) => Ok(Zeroizing::new(token)),
        _ => Err(AdminError::Answer { path: socket.to_owned(), problem: "it holds no token".into() }),
    }
}

/// Asks a running authority how things stand.
///
/// # Errors
/// The authority does not run, or its ledger fails.
pub async fn ask_status(socket: &Path) -> Result<serde_json::Value, AdminError> {
    ask(socket, &Command::Status).await
}

async fn ask(socket: &Path, command: &Command) -> Result<serde_json::Value, AdminError> {
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await?;
        let (read, mut write) = stream.split();
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        write.write_all(&line).await?;
        let answer = read_line(read, LINE_BYTES_MAX).await?;
        answer.map_err(|TooLong| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("its answer is longer than {LINE_BYTES_MAX} bytes"),
            )
        })
    };
    let answer = tokio::time::timeout(EXCHANGE_MAX, exchange)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(|source| AdminError::Socket {
            action: "ask culvert-ca (is it running, and with this adminSocket?)",
            path: socket.to_owned(),
            source,
        })?;
    match serde_json::from_str(&answer) {
        Ok(Answer::Ok(value)) => Ok(value),
        Ok(Answer::Error(problem)) => Err(AdminError::Refused(problem)),
        Err(error) => Err(AdminError::Answer { path: socket.to_owned(), problem: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_line_ends_at_the_limit_or_is_refused() {
        for (text, expected) in [
            ("12345678\n", Ok("12345678\n")),
            ("123456789", Ok("123456789")),
            ("123456789\n", Err(TooLong)),
            ("1234567890", Err(TooLong)),
            // White space behind a command is no way around it either.
            ("{}        \n", Err(TooLong)),
            ("{}\nand more behind it", Ok("{}\n")),
            ("", Ok("")),
        ] {
            let read = read_line(text.as_bytes(), 9).await.expect("readable");
            assert_eq!(read.as_ref().map(|line| line.as_str()), expected.as_ref().copied(), "{text:?}");
        }
    }
}
