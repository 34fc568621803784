//! The load: [`server`] and [`client`] are processes in pods, steered by [`Order`]s, one JSON object a line.
//!
//! Blocking sockets and a thread for each connection: as little as possible between the two kernels. Everything is
//! bounded: connections, time, samples, and the time that one call may hang.

pub mod client;
pub mod server;

use std::{
    io,
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// Ports of the services; each one does one thing.
pub mod port {
    /// Takes what comes.
    pub const SINK: u16 = 9001;
    /// Gives without end.
    pub const SOURCE: u16 = 9002;
    /// Answers each 64 bytes with 64.
    pub const ECHO_SMALL: u16 = 9003;
    /// Answers each 16 KiB with as much.
    pub const ECHO_LARGE: u16 = 9004;
    /// Answers requests.
    pub const REQUESTS: u16 = 9005;
    /// One exchange, then waits for the end.
    pub const CONNECT: u16 = 9006;
    /// One exchange, then keeps the connection.
    pub const HOLD: u16 = 9007;
    /// All of them.
    pub const ALL: [u16; 7] = [SINK, SOURCE, ECHO_SMALL, ECHO_LARGE, REQUESTS, CONNECT, HOLD];
}

/// Bytes of a request and of its answer, heads included: a small resource of an ordinary service.
pub const REQUEST_BYTES: usize = 200;
/// Bytes of an answer.
pub const ANSWER_BYTES: usize = 1024;
/// Bytes of the message of a round trip and of a connection's one exchange.
pub const SMALL_BYTES: usize = 64;
/// Bytes of the larger round trip.
pub const LARGE_BYTES: usize = 16 * 1024;
/// Bytes of one write of bulk data.
pub const CHUNK_BYTES: usize = 64 * 1024;

/// Connections that one order may open: more than any measure asks for, less than the descriptors of a process.
pub const CONNECTIONS_MAX: u16 = 10_000;

/// A call on a socket that takes longer is a failure.
pub const STALL_TIME_MAX: Duration = Duration::from_secs(10);

/// What the client is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Order {
    /// Runs a load: opens its connections, runs for `warm_ms`, then counts for `count_ms`.
    Run { load: Load, target: SocketAddr, warm_ms: u64, count_ms: u64, cpu: Vec<PathBuf> },
    /// Sees to it that so many connections are open, each after one exchange.
    Hold { target: SocketAddr, connections: u16 },
    /// Closes those that are held.
    Release,
}

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Load {
    /// Bulk data from the client to the server.
    Up { connections: u16 },
    /// Bulk data from the server to the client.
    Down { connections: u16 },
    /// Messages and their echoes on one connection.
    Echo { bytes: usize },
    /// Requests, one after the other on each connection.
    Requests { connections: u16 },
    /// Connections with one exchange, so many at a time.
    Connects { parallel: u16 },
}

/// What the client answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// What was counted.
    Counted(Counted),
    /// It is done.
    Done,
    /// It could not be done.
    Failed(String),
}

/// What was counted while a load ran.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Counted {
    /// Bytes of a stream; exchanges of the others.
    pub amount: u64,
    /// For how long.
    pub nanoseconds: u64,
    /// CPU time of the given control groups in that time.
    pub cpu_microseconds: u64,
    /// Of the exchanges; `None` for a stream.
    pub p50_nanoseconds: Option<u64>,
    /// Of the exchanges; `None` for a stream.
    pub p99_nanoseconds: Option<u64>,
}

/// Stack of each thread; buffers live on the heap.
const STACK_BYTES: usize = 128 * 1024;

/// A thread with a small stack.
fn spawn<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> io::Result<thread::JoinHandle<T>> {
    thread::Builder::new().stack_size(STACK_BYTES).spawn(body)
}

/// What every connection of the load has.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STALL_TIME_MAX))?;
    stream.set_write_timeout(Some(STALL_TIME_MAX))
}

/// A message of exactly `bytes` bytes with an HTTP head in front.
fn padded(head: &str, bytes: usize) -> Vec<u8> {
    let mut message = head.as_bytes().to_vec();
    message.resize(bytes, b'.');
    message
}
