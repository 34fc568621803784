//! The bytes of a permitted connection, until both ends close, one fails, or it loses its right.
//!
//! Sockets are armed when they are accepted or dialled: whoever drops one resets it, so that nobody takes a failure
//! for an orderly end. Only an orderly end disarms.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{
    live::Registration,
    record::{Ending, Record},
};
use crate::{
    net::{Ended, relay},
    telemetry::{HandshakeRefusal, Reason},
};

/// One side of a relayed connection.
pub(super) trait Side: AsyncRead + AsyncWrite + Unpin {
    /// From here on a drop is a reset.
    fn arm(&self);

    /// From here on a drop is an orderly close.
    fn settle(&self);

    /// True if `error` is the loss of a tunnel beneath this side, not the act of its far end.
    fn is_lost(&self, error: &io::Error) -> bool;

    /// In words, if `error` says that the far end refused who this side is.
    fn refusal(&self, _error: &io::Error) -> Option<String> {
        None
    }
}

impl Side for TcpStream {
    fn arm(&self) {
        linger(self, Some(Duration::ZERO));
    }

    fn settle(&self) {
        linger(self, None);
    }

    fn is_lost(&self, _error: &io::Error) -> bool {
        false
    }
}

fn linger(stream: &TcpStream, time: Option<Duration>) {
    if let Err(error) = socket2::SockRef::from(stream).set_linger(time) {
        tracing::debug!(%error, "SO_LINGER");
    }
}

/// A connection of which some bytes were read already.
pub(super) struct Prefixed {
    prefix: Bytes,
    stream: TcpStream,
}

impl Prefixed {
    pub(super) fn new(prefix: Bytes, stream: TcpStream) -> Self {
        Self { prefix, stream }
    }
}

impl AsyncRead for Prefixed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.stream).poll_read(context, buffer);
        }
        let taken = self.prefix.len().min(buffer.remaining());
        buffer.put_slice(&self.prefix.split_to(taken));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Prefixed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl Side for Prefixed {
    fn arm(&self) {
        self.stream.arm();
    }

    fn settle(&self) {
        self.stream.settle();
    }

    fn is_lost(&self, _error: &io::Error) -> bool {
        false
    }
}

/// Relays between the client's side and the server's. Both are dropped in the end: settled after an orderly end, else
/// reset.
pub(super) async fn carry<C: Side, S: Side>(
    mut client: C,
    mut server: S,
    record: &mut Record,
    registration: &Registration,
) -> Ending {
    client.arm();
    server.arm();
    let progress = record.progress();
    let ended = tokio::select! {
        biased;
        cut = registration.cut() => Err(cut),
        relayed = relay(&mut client, &mut server, &progress) => Ok(relayed.ended),
    };
    record.rejudged(registration);
    match ended {
        Ok(Ended::Finished) => {
            client.settle();
            server.settle();
            Ending::finished()
        }
        Ok(Ended::Near(error)) if client.is_lost(&error) => Ending::broken(Reason::TunnelLost, error),
        Ok(Ended::Near(error)) => Ending::broken(Reason::ClientReset, error),
        Ok(Ended::Far(error)) if server.is_lost(&error) => Ending::broken(Reason::TunnelLost, error),
        Ok(Ended::Far(error)) => match server.refusal(&error) {
            Some(refusal) => Ending::failed(Reason::Handshake(HandshakeRefusal::Tls), refusal),
            None => Ending::broken(Reason::ServerReset, error),
        },
        Err(cut) => cut.into(),
    }
}
