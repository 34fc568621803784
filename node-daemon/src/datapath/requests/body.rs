//! Bodies on their way, frame by frame: nothing is kept here, so whoever reads slowly slows the sender down.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use node_core::policy::{RESERVED_NAMES, RESERVED_PREFIX};

use super::{
    exchange::Exchange,
    flights::{Flight, Waiter},
};

/// Why a body ended before its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyBroken {
    #[error("the request lost its permission")]
    Cut,
    #[error(transparent)]
    Transport(#[from] hyper::Error),
}

/// A request's body on its way to the workload.
pub(super) struct Upload {
    body: Incoming,
    flight: Arc<Flight>,
}

impl Upload {
    pub(super) fn new(body: Incoming, flight: Arc<Flight>) -> Self {
        Self { body, flight }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BodyBroken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyBroken>>> {
        if self.flight.poll_cut(context, Waiter::Request).is_ready() {
            return Poll::Ready(Some(Err(BodyBroken::Cut)));
        }
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(context));
        Poll::Ready(frame.map(|frame| Ok(without_reserved(frame?))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A trailer says no more than a header may (policy A-11).
fn without_reserved(mut frame: Frame<Bytes>) -> Frame<Bytes> {
    if let Some(trailers) = frame.trailers_mut() {
        strip_reserved(trailers);
    }
    frame
}

/// Removes the headers that carried identity inside proxies of 2018.
pub(super) fn strip_reserved(headers: &mut http::HeaderMap) {
    for name in RESERVED_NAMES {
        headers.remove(name);
    }
    let is_reserved = |name: &&http::HeaderName| name.as_str().starts_with(RESERVED_PREFIX);
    let reserved: Vec<_> = headers.keys().filter(is_reserved).cloned().collect();
    for name in reserved {
        headers.remove(name);
    }
}

/// What a client gets: a text of ours, or the workload's answer.
pub(super) enum Reply {
    Text(Option<Bytes>),
    Relayed {
        body: Incoming,
        /// Ends, and is told of, with the body.
        exchange: Box<Exchange>,
    },
}

impl Body for Reply {
    type Data = Bytes;
    type Error = BodyBroken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyBroken>>> {
        match &mut *self {
            Self::Text(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::Relayed { body, exchange } => {
                if exchange.poll_cut(context).is_ready() {
                    return Poll::Ready(Some(Err(BodyBroken::Cut)));
                }
                let frame = std::task::ready!(Pin::new(body).poll_frame(context));
                match &frame {
                    None => exchange.finished(),
                    Some(Err(error)) => exchange.broken(error),
                    Some(Ok(_)) => {}
                }
                Poll::Ready(frame.map(|frame| frame.map_err(BodyBroken::from)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Text(text) => text.is_none(),
            Self::Relayed { body, .. } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, Bytes::len) as u64),
            Self::Relayed { body, .. } => body.size_hint(),
        }
    }
}
