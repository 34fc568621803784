//! What the harness says to the application in a pod, and what that answers: one JSON object a line.
//!
//! A [`Request`] carries a number; its [`Response`] repeats it. Requests run concurrently, so responses come in any order.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// One line on the application's standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Repeated by the response.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// One line on the application's standard output.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Response {
    /// The request's number.
    pub id: u64,
    /// What came of it.
    pub outcome: Result<Answer, Failure>,
}

/// What an application can be told to do. Every command ends within its own time limit.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Command {
    /// Opens one listener, or [`Listen::count`] of them on consecutive ports. Answers [`Answer::Listening`].
    Listen(Listen),
    /// Whom the listener has accepted so far. Answers [`Answer::Accepted`].
    Accepted {
        /// As answered by `Listen`.
        listener: u64,
    },
    /// Waits until the listener has accepted this many connections after its first `after`, and as many of those have
    /// ended if `ended` is set. Answers [`Answer::Accepted`] with those.
    WaitAccepted {
        /// As answered by `Listen`.
        listener: u64,
        /// How many are of no interest.
        after: usize,
        /// How many.
        count: usize,
        /// Whether they must have ended.
        ended: bool,
        /// At most so long.
        timeout_ms: u64,
    },
    /// Closes the listener; accepted connections go on. Answers [`Answer::Done`].
    CloseListener {
        /// As answered by `Listen`.
        listener: u64,
    },
    /// Opens a connection. Answers [`Answer::Connected`].
    Connect(Connect),
    /// Opens a connection, sends a text, reads to the end, closes. Answers [`Answer::Asked`], never a failure:
    /// how it ended is the answer.
    Ask {
        /// How to connect.
        connect: Connect,
        /// What to say; nothing for a server that speaks first.
        text: String,
    },
    /// Sends a text. Answers [`Answer::Done`].
    Send {
        /// As answered by `Connect`.
        socket: u64,
        /// What to send.
        text: String,
    },
    /// Reads exactly so many bytes. Answers [`Answer::Text`].
    Receive {
        /// As answered by `Connect`.
        socket: u64,
        /// How many bytes.
        bytes: usize,
    },
    /// Sends a text and reads as many bytes back. Answers [`Answer::Text`].
    Exchange {
        /// As answered by `Connect`.
        socket: u64,
        /// What to send.
        text: String,
    },
    /// Reads until the connection ends. Answers [`Answer::Ended`].
    Drain {
        /// As answered by `Connect`.
        socket: u64,
        /// At most so long.
        timeout_ms: u64,
    },
    /// Sends and receives bulk data on a fresh connection to a [`Mode::Bulk`] listener, both ways at once, with
    /// checksums. Answers [`Answer::Bulk`].
    Bulk {
        /// As answered by `Connect`.
        socket: u64,
        /// From here to there.
        up: Payload,
        /// From there to here.
        down: Payload,
        /// At most so long without progress.
        stall_ms: u64,
    },
    /// Sends FIN. Answers [`Answer::Done`].
    ShutdownWrite {
        /// As answered by `Connect`.
        socket: u64,
    },
    /// Closes. Answers [`Answer::Done`].
    Close {
        /// As answered by `Connect`.
        socket: u64,
    },
    /// Closes with RST. Answers [`Answer::Done`].
    Reset {
        /// As answered by `Connect`.
        socket: u64,
    },
    /// `SO_MARK` on an open connection. Answers [`Answer::Done`].
    SetMark {
        /// As answered by `Connect`.
        socket: u64,
        /// The mark.
        mark: u32,
    },
    /// Many connections to echo listeners. Answers [`Answer::Load`].
    Many(Many),
    /// Starts to connect, exchange and close in a loop. Answers [`Answer::Storming`].
    StormStart(Storm),
    /// Waits until the storm has so many successes more than now. Answers [`Answer::Load`].
    StormProgress {
        /// As answered by `StormStart`.
        storm: u64,
        /// How many more.
        more: u64,
        /// At most so long.
        timeout_ms: u64,
    },
    /// Ends the storm once the running attempts have ended. Answers [`Answer::Load`].
    StormStop {
        /// As answered by `StormStart`.
        storm: u64,
    },
    /// The namespace's TCP sockets as `/proc/net/tcp` and `tcp6` show them. Answers [`Answer::Sockets`].
    Sockets,
}

/// A listener to open.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Listen {
    /// Where; port 0 lets the kernel choose.
    pub at: SocketAddr,
    /// What it does with a connection.
    pub mode: Mode,
    /// How many listeners on consecutive ports.
    pub count: u16,
    /// An MPTCP socket.
    pub mptcp: bool,
    /// Length of the accept queue.
    pub backlog: i32,
    /// What a [`Mode::Greet`], [`Mode::Farewell`] or [`Mode::Http`] server says.
    pub text: String,
}

impl Listen {
    /// One plain TCP listener.
    pub fn at(at: SocketAddr, mode: Mode) -> Self {
        Self { at, mode, count: 1, mptcp: false, backlog: 4096, text: String::from("hello\n") }
    }
}

/// What a listener does with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Sends back what comes, until the end.
    Echo,
    /// The other half of [`Command::Bulk`].
    Bulk,
    /// Speaks first, then echoes.
    Greet,
    /// Speaks, sends FIN, and goes on reading.
    Farewell,
    /// Answers one HTTP/1.1 request with the text and the peer's address, then closes.
    Http,
    /// Reads and forgets.
    Sink,
    /// Never reads.
    Hold,
}

/// A connection to open.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Connect {
    /// Whereto.
    pub to: SocketAddr,
    /// Where from, else the kernel's choice.
    pub bind: Option<SocketAddr>,
    /// An `AF_INET6` socket for an IPv4 destination (`::ffff:a.b.c.d`).
    pub mapped: bool,
    /// A non-blocking connect that is then polled for.
    pub nonblocking: bool,
    /// TCP Fast Open, with `first` in the SYN.
    pub fast_open: FastOpen,
    /// An MPTCP socket.
    pub mptcp: bool,
    /// `SO_BINDTODEVICE`.
    pub device: Option<String>,
    /// `SO_MARK` before connect; 0 leaves it alone.
    pub mark: u32,
    /// `SO_MARK = 0` after connect and before the first write.
    pub clear_mark: bool,
    /// Sent with the connect (Fast Open) or right after it.
    pub first: String,
    /// Limit of the connect, and of every later read and write.
    pub timeout_ms: u64,
}

impl Connect {
    /// A plain blocking connect.
    pub fn to(to: SocketAddr) -> Self {
        Self {
            to,
            bind: None,
            mapped: false,
            nonblocking: false,
            fast_open: FastOpen::Off,
            mptcp: false,
            device: None,
            mark: 0,
            clear_mark: false,
            first: String::new(),
            timeout_ms: 20_000,
        }
    }
}

/// The two ways to ask for TCP Fast Open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FastOpen {
    /// No.
    Off,
    /// `sendto(…, MSG_FASTOPEN)`.
    SendTo,
    /// `TCP_FASTOPEN_CONNECT`, then connect and write.
    Connect,
}

/// Bulk data: a text repeated, or a stream that a seed determines.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Payload {
    /// How many bytes.
    pub bytes: u64,
    /// Which stream.
    pub seed: u64,
    /// Repeated instead of the seed's stream when not empty.
    pub needle: String,
}

impl Payload {
    /// The seed's stream.
    pub fn seeded(bytes: u64, seed: u64) -> Self {
        Self { bytes, seed, needle: String::new() }
    }

    /// `needle` again and again.
    pub fn repeated(bytes: u64, needle: &str) -> Self {
        Self { bytes, seed: 0, needle: needle.to_owned() }
    }
}

/// Many connections to echo listeners.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Many {
    /// Connection n goes to the n-th of these, round and round.
    pub to: Vec<SocketAddr>,
    /// By `AF_INET6` sockets to IPv4 destinations.
    pub mapped: bool,
    /// How many in all.
    pub count: usize,
    /// How many at a time.
    pub parallel: usize,
    /// Whether each holds its connection until all that run with it are connected.
    pub together: bool,
    /// Sent and expected back on each.
    pub bytes: usize,
    /// Limit of each connect, read and write.
    pub timeout_ms: u64,
}

/// A loop of connect, exchange, close.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Storm {
    /// Attempt n goes to the n-th of these, round and round.
    pub to: Vec<SocketAddr>,
    /// How many loops at a time.
    pub parallel: usize,
    /// Sent and expected back; repeated to [`Storm::bytes`].
    pub text: String,
    /// How many bytes each way.
    pub bytes: usize,
    /// Limit of each connect, read and write.
    pub timeout_ms: u64,
    /// Ends by itself after so many attempts.
    pub attempts_max: u64,
}

/// What came of a command that did not fail.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Answer {
    /// Nothing to say.
    Done,
    /// Of `Listen`.
    Listening {
        /// For later commands.
        listener: u64,
        /// The (first) port.
        port: u16,
    },
    /// Of `Accepted`.
    Accepted(Vec<Accepted>),
    /// Of `Connect`.
    Connected(Connected),
    /// Of `Ask`.
    Asked(Asked),
    /// Of `Receive` and `Exchange`.
    Text(String),
    /// Of `Drain`.
    Ended(Ended),
    /// Of `Bulk`.
    Bulk {
        /// How long it took.
        elapsed_ms: u64,
    },
    /// Of `Many`, `StormProgress`, `StormStop`.
    Load(Load),
    /// Of `StormStart`.
    Storming {
        /// For later commands.
        storm: u64,
    },
    /// Of `Sockets`.
    Sockets(Vec<Socket>),
}

/// A connection that a listener accepted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Accepted {
    /// As `accept` gave it.
    pub peer: SocketAddr,
    /// As `getsockname` gave it.
    pub local: SocketAddr,
    /// Bytes read so far.
    pub received: u64,
    /// How it ended: `eof` or the name of an errno; absent while it is open.
    pub end: Option<String>,
}

/// A connection that was opened.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Connected {
    /// For later commands.
    pub socket: u64,
    /// As `getsockname` gave it.
    pub local: SocketAddr,
    /// As `getpeername` gave it.
    pub peer: SocketAddr,
    /// How long it took.
    pub elapsed_ms: u64,
}

/// How a whole conversation went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// The errno of the connect, if it failed.
    pub refused: Option<String>,
    /// All that was read.
    pub text: String,
    /// `eof` or the name of an errno; empty if the connect failed.
    pub end: String,
    /// From the connect to the end.
    pub elapsed_ms: u64,
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Bytes that came before.
    pub bytes: u64,
    /// `eof` or the name of an errno (`EAGAIN`: not within the limit).
    pub end: String,
    /// How long it took.
    pub elapsed_ms: u64,
}

/// Counts of many connections.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Load {
    /// All that ended.
    pub attempts: u64,
    /// Exchanged everything.
    pub succeeded: u64,
    /// By step and errno, such as `connect ECONNREFUSED`.
    pub failed: BTreeMap<String, u64>,
    /// The slowest success.
    pub slowest_ms: u64,
}

/// One line of `/proc/net/tcp` or `tcp6`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// As in `include/net/tcp_states.h`; 1 is established, 10 is listening.
    pub state: u8,
}

/// Why a command failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The step: `connect`, `send`, `receive`, …
    pub step: String,
    /// The errno's name, `eof`, or `mismatch`.
    pub errno: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} {}", self.step, self.errno)
    }
}

impl std::error::Error for Failure {}
