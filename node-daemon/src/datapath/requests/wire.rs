//! The client's side of an HTTP connection: bytes as [`Framing`] allows them, counted, and closed so that the last answer
//! arrives.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use super::framing::{Fault, Framing};
use crate::{datapath::carry::Side, net::Progress};

/// Time for a request's head from its first byte to its last, in seconds (DESIGN 4.1). At the limit the connection is
/// closed.
pub(in crate::datapath) const HEAD_SECONDS: u64 = 10;

/// After the last answer what the client still sends is read and thrown away, so that no reset overtakes the answer: for so
/// long, in seconds, and so many bytes at most.
const LINGER_SECONDS: u64 = 1;
const LINGER_BYTES_MAX: usize = 1024 * 1024;

/// What hyper gets in place of bytes that [`Framing`] refuses: no parser takes it, in no part of a request.
const JUNK: &[u8] = b"\0\r\n\r\n";

/// What hyper gets in place of the rest of a head that is too large, again and again: no head ends with it, so hyper answers
/// 431 once its own buffer is full (RFC 6585, section 5).
const ENDLESS: &[u8] = &[b'y'; 4 * 1024];

/// Bytes thrown away at once.
const SINK_BYTES: usize = 4 * 1024;

/// What a connection's wire and its requests tell each other.
#[derive(Debug, Default)]
pub(super) struct Signals {
    is_refused: AtomicBool,
    is_upgraded: AtomicBool,
}

impl Signals {
    /// True once the client sent something that has two readings.
    pub(super) fn is_refused(&self) -> bool {
        self.is_refused.load(Ordering::Acquire)
    }

    /// From here on it is no HTTP.
    pub(super) fn upgrade(&self) {
        self.is_upgraded.store(true, Ordering::Release);
    }
}

/// See the module.
pub(super) struct Wire<C> {
    stream: C,
    /// Read already, and not handed on.
    prefix: Bytes,
    /// `None` for HTTP/2, whose frames have one reading.
    framing: Option<Framing>,
    signals: Arc<Signals>,
    progress: Arc<Progress>,
    /// What is read instead, once something was refused.
    instead: Option<Instead>,
    head_until: Option<Pin<Box<Sleep>>>,
    linger: Option<Linger>,
}

#[derive(Clone, Copy)]
enum Instead {
    /// What is left of the junk.
    Junk(&'static [u8]),
    Endless,
}

struct Linger {
    until: Pin<Box<Sleep>>,
    left: usize,
}

impl<C: Side> Wire<C> {
    pub(super) fn new(
        stream: C,
        prefix: Bytes,
        framing: Option<Framing>,
        signals: Arc<Signals>,
        progress: Arc<Progress>,
    ) -> Self {
        Self { stream, prefix, framing, signals, progress, instead: None, head_until: None, linger: None }
    }

    /// Goes on after HTTP: what hyper has read already comes first.
    pub(super) fn resume(mut self, read: Bytes) -> Self {
        self.prefix = [read, std::mem::take(&mut self.prefix)].concat().into();
        self
    }

    /// From here on a drop is an orderly close.
    pub(super) fn settle(&self) {
        self.stream.settle();
    }

    /// Checks what was read at `start`, and puts junk in place of what is refused.
    fn check(&mut self, buffer: &mut ReadBuf<'_>, start: usize) {
        let Some(framing) = &mut self.framing else { return };
        if self.signals.is_upgraded.load(Ordering::Acquire) {
            self.head_until = None;
            return;
        }
        if let Err((good, fault)) = framing.walk(&buffer.filled()[start..]) {
            tracing::debug!(%fault, "request refused");
            self.signals.is_refused.store(true, Ordering::Release);
            self.head_until = None;
            let is_endless = fault == Fault::TooLarge && framing.is_at_head();
            buffer.set_filled(start + good);
            self.instead = Some(if is_endless { Instead::Endless } else { Instead::Junk(JUNK) });
            self.put_instead(buffer);
            return;
        }
        if !framing.is_in_head() {
            self.head_until = None;
        } else if self.head_until.is_none() {
            self.head_until = Some(Box::pin(sleep(Duration::from_secs(HEAD_SECONDS))));
        }
    }

    /// True if something is read instead of what the client sent.
    fn put_instead(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        match &mut self.instead {
            None => return false,
            Some(Instead::Junk(left)) => *left = put(buffer, left),
            Some(Instead::Endless) => {
                put(buffer, ENDLESS);
            }
        }
        true
    }

    fn poll_linger(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let linger = self.linger.get_or_insert_with(|| Linger {
            until: Box::pin(sleep(Duration::from_secs(LINGER_SECONDS))),
            left: LINGER_BYTES_MAX,
        });
        let mut sink = [0; SINK_BYTES];
        while linger.left > 0 {
            let mut buffer = ReadBuf::new(&mut sink);
            match Pin::new(&mut self.stream).poll_read(context, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                    linger.left = linger.left.saturating_sub(buffer.filled().len());
                }
                Poll::Ready(Ok(()) | Err(_)) => return Poll::Ready(()),
                Poll::Pending => {
                    ready!(linger.until.as_mut().poll(context));
                    return Poll::Ready(());
                }
            }
        }
        Poll::Ready(())
    }
}

/// Puts what fits; the rest.
fn put(buffer: &mut ReadBuf<'_>, bytes: &'static [u8]) -> &'static [u8] {
    let (fits, rest) = bytes.split_at(bytes.len().min(buffer.remaining()));
    buffer.put_slice(fits);
    rest
}

impl<C: Side> AsyncRead for Wire<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.put_instead(buffer) {
            return Poll::Ready(Ok(()));
        }
        let start = buffer.filled().len();
        if this.prefix.is_empty() {
            match Pin::new(&mut this.stream).poll_read(context, buffer) {
                Poll::Ready(read) => read?,
                Poll::Pending => {
                    let Some(until) = &mut this.head_until else { return Poll::Pending };
                    ready!(until.as_mut().poll(context));
                    let late = format!("the head was not whole within {HEAD_SECONDS} s");
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, late)));
                }
            }
        } else {
            let taken = this.prefix.len().min(buffer.remaining());
            buffer.put_slice(&this.prefix.split_to(taken));
        }
        this.progress.add_forward(buffer.filled().len() - start);
        this.check(buffer, start);
        Poll::Ready(Ok(()))
    }
}

impl<C: Side> AsyncWrite for Wire<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, bytes))?;
        self.progress.add_back(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(context, slices))?;
        self.progress.add_back(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    /// An orderly end: hyper asks for it after the last answer, and only then.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.signals.is_upgraded.load(Ordering::Acquire) {
            // One direction of two.
            return Pin::new(&mut self.stream).poll_shutdown(context);
        }
        if self.linger.is_none() {
            self.stream.settle();
            ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
        }
        self.poll_linger(context).map(Ok)
    }
}
