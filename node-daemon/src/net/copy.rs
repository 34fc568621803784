//! Bytes from one connection to the other and back, until both directions have ended.
//!
//! A direction that ends at its source is closed at its sink (half-close) while the other goes on. A failure on one side ends
//! both; the owner then [`reset`]s what it still holds, so that nobody takes a broken stream for a finished one.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Bytes read at once. Reckoning: a TLS record is 16 KiB and a system call over loopback costs some 2 us, so four records a call
/// make it less than a tenth of the work.
pub const BUFFER_BYTES: usize = 64 * 1024;

/// Idle buffers kept for each thread of the runtime: 4 MiB. Connections hold a buffer only while they hold bytes, so an idle one
/// costs none. At the limit a buffer is freed, and allocated again when needed.
pub const BUFFERS_POOLED_MAX: usize = 64;

/// Bytes moved in one direction before other tasks get their turn. Reckoning: 1 MiB takes some 300 us.
const TURN_BYTES: usize = 1024 * 1024;

/// What has been carried so far; read by others while the relay runs, and still there when it was cancelled.
#[derive(Debug, Default)]
pub struct Progress {
    forward: AtomicU64,
    back: AtomicU64,
}

impl Progress {
    /// Bytes from the near side that the far side took.
    pub fn forward(&self) -> u64 {
        self.forward.load(Ordering::Relaxed)
    }

    /// Bytes from the far side that the near side took.
    pub fn back(&self) -> u64 {
        self.back.load(Ordering::Relaxed)
    }

    /// Counts what was carried by other means than [`relay`].
    pub fn add_forward(&self, bytes: usize) {
        self.forward.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// The same for the other direction.
    pub fn add_back(&self, bytes: usize) {
        self.back.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// How a relay ended.
#[derive(Debug)]
pub struct Relayed {
    /// Bytes from near to far.
    pub forward: u64,
    /// Bytes from far to near.
    pub back: u64,
    pub ended: Ended,
}

/// By whom, and why.
#[derive(Debug)]
pub enum Ended {
    /// Both sides closed in order.
    Finished,
    /// The near side broke.
    Near(io::Error),
    /// The far side broke.
    Far(io::Error),
}

/// Carries bytes both ways until both directions are closed or one side fails. The streams stay with the caller: after
/// [`Ended::Near`] and [`Ended::Far`], or when this future is dropped, they are to be reset.
pub async fn relay<N, F>(near: &mut N, far: &mut F, progress: &Progress) -> Relayed
where
    N: AsyncRead + AsyncWrite + Unpin,
    F: AsyncRead + AsyncWrite + Unpin,
{
    let mut forward = Direction::default();
    let mut back = Direction::default();
    let ended = poll_fn(|context| {
        let forwarded = match forward.advance(context, near, far, &progress.forward) {
            Poll::Ready(Err(Side::Source(error))) => return Poll::Ready(Ended::Near(error)),
            Poll::Ready(Err(Side::Sink(error))) => return Poll::Ready(Ended::Far(error)),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        match back.advance(context, far, near, &progress.back) {
            Poll::Ready(Err(Side::Source(error))) => Poll::Ready(Ended::Far(error)),
            Poll::Ready(Err(Side::Sink(error))) => Poll::Ready(Ended::Near(error)),
            Poll::Ready(Ok(())) if forwarded => Poll::Ready(Ended::Finished),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
        }
    })
    .await;
    Relayed { forward: progress.forward(), back: progress.back(), ended }
}

/// Closes a connection with RST, so that the other end sees a failure and no orderly end.
pub fn reset(stream: TcpStream) {
    // Without the option the close is an orderly one, which is all that can be done then.
    let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
}

/// One way, and what is under way in it.
#[derive(Default)]
struct Direction {
    /// Held only while it holds bytes.
    buffer: Option<Buffer>,
    start: usize,
    end: usize,
    unflushed: bool,
    phase: Phase,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    #[default]
    Carrying,
    Closing,
    Closed,
}

enum Side {
    Source(io::Error),
    Sink(io::Error),
}

impl Direction {
    fn advance<S, T>(
        &mut self,
        context: &mut Context<'_>,
        source: &mut S,
        sink: &mut T,
        carried: &AtomicU64,
    ) -> Poll<Result<(), Side>>
    where
        S: AsyncRead + Unpin,
        T: AsyncWrite + Unpin,
    {
        let mut moved = 0;
        loop {
            match self.phase {
                Phase::Closed => return Poll::Ready(Ok(())),
                Phase::Closing => {
                    ready!(Pin::new(&mut *sink).poll_shutdown(context)).map_err(Side::Sink)?;
                    self.phase = Phase::Closed;
                }
                Phase::Carrying => {
                    ready!(self.drain(context, sink, carried, &mut moved))?;
                    if moved >= TURN_BYTES {
                        context.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    ready!(self.fill(context, source, sink))?;
                }
            }
        }
    }

    /// Writes what is held; the buffer goes back when all is written.
    fn drain<T: AsyncWrite + Unpin>(
        &mut self,
        context: &mut Context<'_>,
        sink: &mut T,
        carried: &AtomicU64,
        moved: &mut usize,
    ) -> Poll<Result<(), Side>> {
        while let Some(buffer) = &self.buffer
            && self.start < self.end
        {
            let written =
                ready!(Pin::new(&mut *sink).poll_write(context, &buffer.bytes()[self.start..self.end]))
                    .map_err(Side::Sink)?;
            if written == 0 {
                return Poll::Ready(Err(Side::Sink(io::ErrorKind::WriteZero.into())));
            }
            self.start += written;
            self.unflushed = true;
            *moved += written;
            carried.fetch_add(written as u64, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }

    /// Reads more, or notices the end.
    fn fill<S: AsyncRead + Unpin, T: AsyncWrite + Unpin>(
        &mut self,
        context: &mut Context<'_>,
        source: &mut S,
        sink: &mut T,
    ) -> Poll<Result<(), Side>> {
        let mut buffer = self.buffer.take().unwrap_or_else(Buffer::take);
        let mut read = ReadBuf::new(buffer.bytes_mut());
        match Pin::new(source).poll_read(context, &mut read) {
            Poll::Pending => {
                drop(buffer);
                // Nothing more for the moment: what a layer below still holds back must go now.
                if self.unflushed {
                    ready!(Pin::new(sink).poll_flush(context)).map_err(Side::Sink)?;
                    self.unflushed = false;
                }
                Poll::Pending
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(Side::Source(error))),
            Poll::Ready(Ok(())) => {
                self.start = 0;
                self.end = read.filled().len();
                if self.end == 0 {
                    self.phase = Phase::Closing;
                } else {
                    self.buffer = Some(buffer);
                }
                Poll::Ready(Ok(()))
            }
        }
    }
}

thread_local! {
    static POOL: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`BUFFER_BYTES`] that goes back to its thread's pool.
struct Buffer(Option<Box<[u8]>>);

impl Buffer {
    fn take() -> Self {
        let pooled = POOL.with_borrow_mut(Vec::pop);
        Self(Some(pooled.unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice())))
    }

    fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(bytes) = self.0.take() else { return };
        // While a thread ends its pool is gone already; the buffer is freed then.
        let _ = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            if pool.len() < BUFFERS_POOLED_MAX {
                pool.push(bytes);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        net::TcpListener,
    };

    use super::*;

    /// A relay between two pipes of `capacity` bytes; the outer ends are returned.
    fn relayed(capacity: usize) -> (DuplexStream, DuplexStream, tokio::task::JoinHandle<Relayed>) {
        let (client, mut near) = duplex(capacity);
        let (mut far, server) = duplex(capacity);
        let task = tokio::spawn(async move { relay(&mut near, &mut far, &Progress::default()).await });
        (client, server, task)
    }

    #[tokio::test(start_paused = true)]
    async fn a_half_close_ends_one_direction_and_leaves_the_other() {
        let (mut client, mut server, task) = relayed(64);
        client.write_all(b"question").await.expect("open");
        client.shutdown().await.expect("open");
        let mut question = String::new();
        server.read_to_string(&mut question).await.expect("closed in order");
        assert_eq!(question, "question");
        server.write_all(b"a longer answer").await.expect("this direction is open");
        server.shutdown().await.expect("open");
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("closed in order");
        assert_eq!(answer, "a longer answer");
        let relayed = task.await.expect("no panic");
        assert!(matches!(relayed.ended, Ended::Finished), "{relayed:?}");
        assert_eq!((relayed.forward, relayed.back), (8, 15));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_speaks_first_and_closes_first_is_served() {
        let (mut client, mut server, task) = relayed(64);
        server.write_all(b"220 ready").await.expect("open");
        server.shutdown().await.expect("open");
        let mut greeting = String::new();
        client.read_to_string(&mut greeting).await.expect("closed in order");
        client.write_all(b"thanks").await.expect("this direction is open");
        drop(client);
        let mut thanks = String::new();
        server.read_to_string(&mut thanks).await.expect("closed in order");
        assert_eq!((greeting.as_str(), thanks.as_str()), ("220 ready", "thanks"));
        assert!(matches!(task.await.expect("no panic").ended, Ended::Finished));
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_beyond_one_buffer_arrive_whole_and_in_order() {
        let (mut client, mut server, task) = relayed(1_000);
        let sent: Vec<u8> = (0..=250).cycle().take(3 * BUFFER_BYTES + 17).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move {
            client.write_all(&sent).await.expect("open");
            client.shutdown().await.expect("open");
            client
        });
        let mut received = Vec::new();
        server.read_to_end(&mut received).await.expect("closed in order");
        assert!(received == expected);
        drop((server, writer.await.expect("no panic")));
        assert_eq!(task.await.expect("no panic").forward, expected.len() as u64);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_stops_the_sender_after_a_bounded_number_of_bytes() {
        let (mut client, server, _task) = relayed(1_000);
        let mut taken = 0;
        let junk = [0; 4_096];
        while let Ok(Ok(written)) = tokio::time::timeout(Duration::from_secs(1), client.write(&junk)).await {
            taken += written;
            assert!(taken <= BUFFER_BYTES + 2_000, "{taken} bytes without a reader");
        }
        assert!(taken >= 2_000);
        drop(server);
    }

    #[tokio::test(start_paused = true)]
    async fn a_far_side_that_went_away_is_named() {
        let (mut client, server, task) = relayed(64);
        drop(server);
        client.write_all(b"anybody?").await.expect("the pipe takes it");
        let relayed = task.await.expect("no panic");
        assert!(matches!(relayed.ended, Ended::Far(_)), "{relayed:?}");
    }

    #[tokio::test]
    async fn a_reset_of_the_near_side_is_named_and_passed_on() {
        let (near_outer, near) = tcp_pair().await;
        let (far, mut far_outer) = tcp_pair().await;
        let task = tokio::spawn(async move {
            let (mut near, mut far) = (near, far);
            let relayed = relay(&mut near, &mut far, &Progress::default()).await;
            reset(near);
            reset(far);
            relayed
        });
        reset(near_outer);
        let relayed = task.await.expect("no panic");
        assert!(
            matches!(&relayed.ended, Ended::Near(error) if error.kind() == io::ErrorKind::ConnectionReset)
        );
        let seen = far_outer.read(&mut [0; 8]).await.expect_err("the failure is passed on");
        assert_eq!(seen.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_relay_leaves_its_counts() {
        let (mut client, mut near) = duplex(64);
        let (mut far, mut server) = duplex(64);
        let progress = Progress::default();
        client.write_all(b"12345").await.expect("open");
        let mut received = [0; 5];
        tokio::select! {
            _ = relay(&mut near, &mut far, &progress) => unreachable!("both ends are open"),
            read = server.read_exact(&mut received) => { read.expect("open"); }
        }
        assert_eq!((progress.forward(), progress.back()), (5, 0));
    }

    #[test]
    fn a_direction_that_never_pauses_lets_others_have_their_turn() {
        let mut context = Context::from_waker(std::task::Waker::noop());
        let (mut source, mut sink) = (tokio::io::repeat(7), tokio::io::sink());
        let (mut direction, carried) = (Direction::default(), AtomicU64::new(0));
        for turn in 1..=3 {
            assert!(direction.advance(&mut context, &mut source, &mut sink, &carried).is_pending());
            assert_eq!(carried.load(Ordering::Relaxed), turn * TURN_BYTES as u64);
        }
    }

    #[test]
    fn the_pool_keeps_no_more_than_its_limit() {
        let held: Vec<Buffer> = (0..BUFFERS_POOLED_MAX + 10).map(|_| Buffer::take()).collect();
        drop(held);
        assert_eq!(POOL.with_borrow(Vec::len), BUFFERS_POOLED_MAX);
    }

    async fn tcp_pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("bound");
        let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        (dialled.expect("it listens"), accepted.expect("it was dialled").0)
    }
}
