//! HTTP/1.1 on a TCP or unix socket, for pages that are made in memory.
//!
//! Bounded: connections at a time, time for the head of a request, time for a whole connection. A client beyond the
//! first bound is closed at once; beyond the others likewise.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, header::CONTENT_TYPE, server::conn::http1, service,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::telemetry::{Event, Sink};

/// Connections to one page at a time: a scraper, a probe and an operator with a few windows. At the limit a new one is
/// closed at once.
pub const CONNECTIONS_MAX: usize = 16;

/// Time for the head of a request: these clients are on the same machine.
const HEAD_TIME: Duration = Duration::from_secs(5);

/// Time for a whole connection, requests in a row included.
const CONNECTION_TIME: Duration = Duration::from_secs(60);

/// Largest head of a request, in bytes; the pages are asked for by short paths.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Pause after an accept that failed, which is nearly always a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where a page is shown.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Makes the answer to a path; `None`: there is no such page.
pub type Page = Arc<dyn Fn(&str) -> Option<Answer> + Send + Sync>;

/// One answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub content_type: &'static str,
    pub body: String,
}

impl Answer {
    pub fn text(status: u16, body: String) -> Self {
        Self { status, content_type: "text/plain; charset=utf-8", body }
    }

    pub fn json(body: String) -> Self {
        Self { status: 200, content_type: "application/json", body }
    }
}

/// Serves `page` until `stop`. `limit` is the name under which [`CONNECTIONS_MAX`] is counted for it.
pub async fn serve(
    listener: Listener,
    page: Page,
    limit: &'static str,
    events: Sink,
    stop: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok(stream) = accepted else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        match Arc::clone(&places).try_acquire_owned() {
            Ok(place) => drop(tokio::spawn(converse(stream, Arc::clone(&page), place, stop.clone()))),
            Err(_) => events.emit(&Event::LimitReached { limit, workload: None }),
        }
    }
}

async fn converse(stream: Box<dyn Stream>, page: Page, place: OwnedSemaphorePermit, stop: CancellationToken) {
    let answer = service::service_fn(move |request| {
        let answer = answer(&page, &request);
        async move { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), answer);
    // A client that breaks off, or speaks no HTTP, is not worth a line.
    tokio::select! {
        () = stop.cancelled() => {}
        _ = timeout(CONNECTION_TIME, connection) => {}
    }
    drop(place);
}

fn answer(page: &Page, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return response(Answer::text(StatusCode::METHOD_NOT_ALLOWED.as_u16(), "only GET\n".to_owned()));
    }
    let none = || Answer::text(StatusCode::NOT_FOUND.as_u16(), "no such page\n".to_owned());
    response(page(request.uri().path()).unwrap_or_else(none))
}

fn response(answer: Answer) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(answer.body)));
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(answer.content_type));
    response
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Self::Tcp(listener) => Ok(Box::new(listener.accept().await?.0)),
            Self::Unix(listener) => Ok(Box::new(listener.accept().await?.0)),
        }
    }
}
