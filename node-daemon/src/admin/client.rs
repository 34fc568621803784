//! Asks a daemon's admin socket for a page.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};

/// Time for an answer: a daemon that takes longer hangs.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Largest answer, in bytes: a dump of 10,000 connections and 10,000 workloads. A larger one is not used.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("{}: no daemon listens ({source}): start `culvert-node run`, or name its folder by --root", path.display())]
    Absent { path: PathBuf, source: io::Error },
    #[error("{}: {source}: the socket belongs to the daemon's user; ask as that user", path.display())]
    Forbidden { path: PathBuf, source: io::Error },
    #[error("{}: no answer within {} s: the daemon hangs", path.display(), ANSWER_TIME.as_secs())]
    Silent { path: PathBuf },
    #[error("{}: the answer cannot be used: {problem}", path.display())]
    Answer { path: PathBuf, problem: String },
}

/// Gets one page.
///
/// # Errors
/// Says whether nobody listens, nobody answers, or the answer is unusable.
pub async fn ask(socket: &Path, page: &str) -> Result<String, AskError> {
    let stream = UnixStream::connect(socket).await.map_err(|source| unconnected(socket, source))?;
    match timeout(ANSWER_TIME, converse(stream, page, ANSWER_BYTES_MAX)).await {
        Ok(Ok(text)) => Ok(text),
        Ok(Err(problem)) => Err(AskError::Answer { path: socket.to_owned(), problem }),
        Err(_) => Err(AskError::Silent { path: socket.to_owned() }),
    }
}

pub(super) async fn converse(
    stream: UnixStream,
    page: &str,
    answer_bytes_max: usize,
) -> Result<String, String> {
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    let driver = tokio::spawn(connection);
    let request = Request::get(page).header("host", "culvert").body(Empty::<Bytes>::new());
    let request = request.map_err(|error| error.to_string())?;
    let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), answer_bytes_max).collect().await;
    driver.abort();
    let body = body.map_err(|error| error.to_string())?.to_bytes();
    let text = String::from_utf8(body.to_vec()).map_err(|error| error.to_string())?;
    if status != StatusCode::OK {
        return Err(format!("{status}: {}", text.trim()));
    }
    Ok(text)
}

fn unconnected(socket: &Path, source: io::Error) -> AskError {
    let path = socket.to_owned();
    if source.kind() == io::ErrorKind::PermissionDenied {
        return AskError::Forbidden { path, source };
    }
    AskError::Absent { path, source }
}
