//! A connection that is judged request by request: HTTP/1.1 or HTTP/2 from the client, the same to the workload.
//!
//! ```text
//! client --> [wire] [framing] --> hyper --> [request]: [head] --> tokens --> policy --> [upstream] --> workload
//!                                               |                               ^
//!                                               '--> [flights] <-- snapshots ---'        [exchange]: one line a request
//! ```
//!
//! No byte of a request goes to the workload before its [`RequestPermit`](node_core::policy::RequestPermit), and what goes
//! is what was judged. Bodies pass frame by frame. Knows nothing of how the client proved who it is.

mod body;
mod exchange;
mod flights;
mod framing;
mod head;
mod request;
#[cfg(test)]
mod tests;
mod upstream;
mod wire;

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
    upgrade::OnUpgrade,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout_at},
};

pub(super) use self::flights::Flights;
use self::{
    exchange::{Exchange, Telling},
    flights::Waiter,
    framing::{Framing, HEAD_BYTES_MAX, HEADERS_MAX},
    upstream::Upstream,
    wire::{HEAD_SECONDS, Signals, Wire},
};
use super::{
    Shared,
    accept::Site,
    carry::{Prefixed, Side},
    live::{Cut, Registration},
    record::{Ending, Record},
};
use crate::{
    net::{Ended, Progress, relay},
    telemetry::{Reason, RequestCounts},
};

/// Bytes that one stream of HTTP/2 may have on its way before they are read, and all streams of a connection: as a
/// browser's. Bounds what a slow reader holds.
const WINDOW_STREAM_BYTES: u32 = 256 * 1024;
const WINDOW_CONNECTION_BYTES: u32 = 2 * 1024 * 1024;

/// Streams of a client's HTTP/2 connection at once. At the limit the client is told to wait (RFC 9113, 5.1.2).
const STREAMS_MAX: u32 = 250;

/// Bytes of HTTP/1.1 that are read ahead of who takes them, and of HTTP/2 that wait to be sent on one stream.
const BUFFER_BYTES_MAX: usize = HEAD_BYTES_MAX + 16 * 1024;
const SEND_BUFFER_BYTES_MAX: usize = 256 * 1024;

/// The first bytes of HTTP/2 (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What the requests of one connection share.
struct Client {
    shared: Arc<Shared>,
    flights: Arc<Flights>,
    upstream: Upstream,
    telling: Arc<Telling>,
    signals: Arc<Signals>,
    upgrade: Mutex<Option<Upgrade>>,
}

/// A request that asked for another protocol. hyper then hands the client's side back when it is done.
struct Upgrade {
    client: OnUpgrade,
    /// The workload agreed.
    joined: Option<(OnUpgrade, Exchange)>,
}

impl Client {
    fn join(&self, upgrade: Upgrade) {
        *self.upgrade.lock().unwrap_or_else(PoisonError::into_inner) = Some(upgrade);
    }

    fn joined(&self) -> Option<Upgrade> {
        self.upgrade.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Serves a client until it closes, breaks, loses its right, or this side drains.
pub(super) async fn serve<C: Side + Send + 'static>(
    shared: &Arc<Shared>,
    site: &Arc<Site>,
    mut stream: C,
    flights: Arc<Flights>,
    registration: &Registration,
    record: &mut Record,
) -> Ending {
    stream.arm();
    let first = tokio::select! {
        biased;
        cut = registration.cut() => {
            if matches!(cut, Cut::Rejudged) {
                stream.settle();
            }
            return cut.into();
        }
        () = site.closing().cancelled() => return drained(&stream),
        first = first_bytes(&mut stream) => first,
    };
    let (is_http2, prefix) = match first {
        Ok(Some(first)) => first,
        Ok(None) => {
            stream.settle();
            return Ending::finished();
        }
        Err(ending) => return ending,
    };
    let signals = Arc::new(Signals::default());
    let telling = Telling {
        events: shared.events.clone(),
        ends: record.ends(),
        counts: Arc::new(RequestCounts::new(&record.ends())),
    };
    let client = Arc::new(Client {
        shared: Arc::clone(shared),
        flights,
        upstream: Upstream::new(Arc::clone(site), is_http2),
        telling: Arc::new(telling),
        signals: Arc::clone(&signals),
        upgrade: Mutex::new(None),
    });
    let framing = (!is_http2).then(Framing::new);
    let wire = TokioIo::new(Wire::new(stream, prefix, framing, signals, record.progress()));
    let ending = if is_http2 {
        serve_http2(&client, site, wire, registration).await
    } else {
        serve_http1(&client, site, wire, registration).await
    };
    record.rejudged(registration);
    ending
}

/// Nothing was sent yet, so nothing is lost.
fn drained(stream: &impl Side) -> Ending {
    stream.settle();
    Ending::broken(Reason::Drained, "the daemon drains, and no request was under way")
}

/// Whether a client speaks HTTP/2, and what was read to find out; `None` if it closed without a word.
async fn first_bytes<C: Side>(stream: &mut C) -> Result<Option<(bool, Bytes)>, Ending> {
    let mut read = BytesMut::new();
    let reset = |error| Ending::broken(Reason::ClientReset, error);
    // As long as it says nothing it may stay, as it may between two requests.
    if stream.read_buf(&mut read).await.map_err(reset)? == 0 {
        return Ok(None);
    }
    let late = Instant::now() + Duration::from_secs(HEAD_SECONDS);
    while read.len() < PREFACE.len() && PREFACE.starts_with(&read) {
        match timeout_at(late, stream.read_buf(&mut read)).await {
            Ok(Ok(0)) => break,
            Ok(more) => more.map_err(reset)?,
            Err(_) => {
                return Err(Ending::broken(Reason::Protocol, format!("no head within {HEAD_SECONDS} s")));
            }
        };
    }
    Ok(Some((read.starts_with(PREFACE), read.freeze())))
}

async fn serve_http1<C: Side + Send + 'static>(
    client: &Arc<Client>,
    site: &Site,
    wire: TokioIo<Wire<C>>,
    registration: &Registration,
) -> Ending {
    let requests = Arc::clone(client);
    let service = service_fn(move |request| request::serve(Arc::clone(&requests), request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // Heads have their time from their first byte on; see `Wire`.
        .header_read_timeout(None)
        .max_headers(HEADERS_MAX)
        .max_buf_size(BUFFER_BYTES_MAX)
        .auto_date_header(false)
        // A client may end its own half once it has asked, and still read the answer.
        .half_close(true)
        .serve_connection(wire, service)
        .with_upgrades();
    let connection = pin!(connection);
    let served =
        match served(connection, http1::UpgradeableConnection::graceful_shutdown, site, registration).await {
            Ok(served) => served,
            Err(cut) => return cut.into(),
        };
    match client.joined() {
        Some(Upgrade { client, joined: Some((server, exchange)) }) => {
            carry_upgraded::<C>(client, server, exchange, registration).await
        }
        Some(Upgrade { client: refused, joined: None }) => {
            close_refused::<C>(refused).await;
            ended(client, served)
        }
        None => ended(client, served),
    }
}

async fn serve_http2<C: Side + Send + 'static>(
    client: &Arc<Client>,
    site: &Site,
    wire: TokioIo<Wire<C>>,
    registration: &Registration,
) -> Ending {
    let requests = Arc::clone(client);
    let service = service_fn(move |request| request::serve(Arc::clone(&requests), request));
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW_STREAM_BYTES)
        .initial_connection_window_size(WINDOW_CONNECTION_BYTES)
        .max_concurrent_streams(STREAMS_MAX)
        .max_send_buf_size(SEND_BUFFER_BYTES_MAX)
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
        .auto_date_header(false)
        .serve_connection(wire, service);
    let connection = pin!(connection);
    match served(connection, http2::Connection::graceful_shutdown, site, registration).await {
        Ok(served) => ended(client, served),
        Err(cut) => cut.into(),
    }
}

/// Serves to the end; asked to close, in whichever version, it takes no further request and ends with those under way.
///
/// # Errors
/// What ends it at once.
async fn served<T: Future<Output = hyper::Result<()>>>(
    mut connection: Pin<&mut T>,
    shut: impl Fn(Pin<&mut T>),
    site: &Site,
    registration: &Registration,
) -> Result<hyper::Result<()>, Cut> {
    let mut is_closing = false;
    loop {
        tokio::select! {
            biased;
            cut = registration.cut(), if !is_closing => match cut {
                Cut::Rejudged => {
                    is_closing = true;
                    shut(connection.as_mut());
                }
                cut @ (Cut::Denied(_)
                | Cut::Rerouted(_)
                | Cut::Respoken(_)
                | Cut::WorkloadLeft
                | Cut::Drained) => return Err(cut),
            },
            () = site.closing().cancelled(), if !is_closing => {
                is_closing = true;
                shut(connection.as_mut());
            }
            served = connection.as_mut() => return Ok(served),
        }
    }
}

fn ended(client: &Client, served: hyper::Result<()>) -> Ending {
    match served {
        _ if client.signals.is_refused() => {
            Ending::broken(Reason::Protocol, "the client sent what has two readings")
        }
        Ok(()) => Ending::finished(),
        Err(error) if error.is_parse() => Ending::broken(Reason::Protocol, error),
        Err(error) => Ending::broken(Reason::ClientReset, error),
    }
}

/// After a no to an upgrade hyper leaves the orderly end to others.
async fn close_refused<C: Side + Send + 'static>(client: OnUpgrade) {
    let Ok(handed_back) = client.await else { return };
    if let Ok(parts) = handed_back.downcast::<TokioIo<Wire<C>>>() {
        // A client that is gone already needs no end.
        let _ = parts.io.into_inner().shutdown().await;
    }
}

/// Joins both sides of a WebSocket.
async fn carry_upgraded<C: Side + Send + 'static>(
    client: OnUpgrade,
    server: OnUpgrade,
    mut exchange: Exchange,
    registration: &Registration,
) -> Ending {
    let (client, server) = match tokio::try_join!(client, server) {
        Ok(sides) => sides,
        Err(error) => return Ending::broken(Reason::ServerReset, error),
    };
    let (Ok(client), Ok(server)) =
        (client.downcast::<TokioIo<Wire<C>>>(), server.downcast::<TokioIo<TcpStream>>())
    else {
        return Ending::failed(Reason::System, "the upgraded connection is another than was made");
    };
    let mut near = client.io.into_inner().resume(client.read_buf);
    let mut far = Prefixed::new(server.read_buf, server.io.into_inner());
    far.arm();
    // The wire counts.
    let progress = Progress::default();
    let flight = exchange.airborne().map(|airborne| Arc::clone(airborne.flight()));
    let lost = poll_fn(|context| match &flight {
        Some(flight) => flight.poll_cut(context, Waiter::Head).map(Clone::clone),
        None => std::task::Poll::Pending,
    });
    let relayed = tokio::select! {
        biased;
        cut = registration.cut() => return cut.into(),
        denial = lost => {
            exchange.denied(&denial, http::StatusCode::SWITCHING_PROTOCOLS.as_u16());
            return Ending::finished();
        }
        relayed = relay(&mut near, &mut far, &progress) => relayed,
    };
    match relayed.ended {
        Ended::Finished => {
            near.settle();
            far.settle();
            exchange.finished();
            Ending::finished()
        }
        Ended::Near(error) => Ending::broken(Reason::ClientReset, error),
        Ended::Far(error) => Ending::broken(Reason::ServerReset, error),
    }
}
