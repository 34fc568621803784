//! The workload's side of an HTTP connection: dialled with the first permitted request, and again when the workload has
//! closed it in between.

use std::{net::SocketAddr, sync::Arc};

use hyper::{
    Request, Response,
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use node_core::policy::{ConnectionFacts, RequestPermit};
use tokio::{net::TcpStream, sync::Mutex, task::JoinHandle};

use super::{WINDOW_CONNECTION_BYTES, WINDOW_STREAM_BYTES, body::Upload, framing::HEAD_BYTES_MAX};
use crate::datapath::{accept::Site, carry::Side as _, deliver::deliver, record::Ending};

/// Why the workload did not answer.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// It was not reached.
    Unreached(Ending),
    /// It was, and broke off, or does not speak the client's HTTP.
    Broken(hyper::Error),
}

/// See the module.
pub(super) struct Upstream {
    site: Arc<Site>,
    is_http2: bool,
    lane: Mutex<Option<Lane>>,
}

/// A connection that stands. Dropped, it ends.
enum Lane {
    One(http1::SendRequest<Upload>, #[expect(dead_code, reason = "held for its drop")] Driven),
    Two(http2::SendRequest<Upload>, #[expect(dead_code, reason = "held for its drop")] Driven),
}

/// The task that moves a connection's bytes.
struct Driven(JoinHandle<()>);

impl Drop for Driven {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Lane {
    /// Waits for its turn; false if it is closed.
    async fn is_usable(&mut self) -> bool {
        match self {
            Self::One(sender, _) => sender.ready().await.is_ok(),
            Self::Two(sender, _) => sender.ready().await.is_ok(),
        }
    }
}

impl Upstream {
    pub(super) fn new(site: Arc<Site>, is_http2: bool) -> Self {
        Self { site, is_http2, lane: Mutex::new(None) }
    }

    /// Sends one request. Asks for its permit: no byte goes to the workload without one.
    pub(super) async fn send(
        &self,
        permit: &RequestPermit,
        connection: &ConnectionFacts,
        mut request: Request<Upload>,
    ) -> Result<Response<Incoming>, Unanswered> {
        let mut is_fresh = false;
        loop {
            // Requests of HTTP/1.1 come one after another; those of HTTP/2 only wait here while one dials.
            let mut lane = self.lane.lock().await;
            let is_usable = match lane.as_mut() {
                Some(lane) => lane.is_usable().await,
                None => false,
            };
            if !is_usable {
                is_fresh = true;
                // What was closed is gone before its successor is dialled.
                *lane = None;
            }
            let open = match lane.take() {
                Some(open) => open,
                None => self.dial(permit, connection).await?,
            };
            let sent = match lane.insert(open) {
                Lane::One(sender, _) => sender.try_send_request(request).await,
                Lane::Two(sender, _) => {
                    let mut sender = sender.clone();
                    drop(lane);
                    sender.try_send_request(request).await
                }
            };
            match sent {
                Ok(answer) => return Ok(answer),
                Err(failed) => request = again(failed, is_fresh)?,
            }
        }
    }

    async fn dial(&self, permit: &RequestPermit, connection: &ConnectionFacts) -> Result<Lane, Unanswered> {
        let target = SocketAddr::new(connection.destination_address, connection.destination_port);
        let (workload, client) = (&connection.destination.name, connection.source_address);
        let reached = deliver(permit, &self.site, workload, client, target).await;
        let stream = reached.map_err(Unanswered::Unreached)?;
        // Bodies of requests say where they end, so an orderly close misleads nobody.
        stream.settle();
        let stream = TokioIo::new(stream);
        let lane = if self.is_http2 { http2_lane(stream).await } else { http1_lane(stream).await };
        lane.map_err(Unanswered::Broken)
    }
}

/// The request, if it may be sent on another connection: this one was closed meanwhile, and saw nothing of it.
fn again(mut failed: TrySendError<Request<Upload>>, is_fresh: bool) -> Result<Request<Upload>, Unanswered> {
    match failed.take_message() {
        Some(unsent) if !is_fresh => Ok(unsent),
        Some(_) | None => Err(Unanswered::Broken(failed.into_error())),
    }
}

async fn http1_lane(stream: TokioIo<TcpStream>) -> hyper::Result<Lane> {
    let (sender, connection) = http1::Builder::new().handshake(stream).await?;
    let driven = tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "workload's connection ended");
        }
    });
    Ok(Lane::One(sender, Driven(driven)))
}

async fn http2_lane(stream: TokioIo<TcpStream>) -> hyper::Result<Lane> {
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(WINDOW_STREAM_BYTES)
        .initial_connection_window_size(WINDOW_CONNECTION_BYTES)
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
        .handshake(stream)
        .await?;
    let driven = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "workload's connection ended");
        }
    });
    Ok(Lane::Two(sender, Driven(driven)))
}
