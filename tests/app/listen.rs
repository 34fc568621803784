//! Serves: one thread a listener, one thread a connection.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use socket2::{Domain, Protocol, Socket, Type};
use world::protocol::{Accepted, Failure, Listen, Mode, Payload};

use crate::{dial, errno, locked, spawn, talk};

/// Connections beyond this are served but not listed; more than any test opens.
const ACCEPTED_MAX: usize = 16 * 1024;

/// How often an idle accept loop looks whether it shall end.
const ACCEPT_TURN: Duration = Duration::from_millis(100);

/// A connection on which nothing happens for so long is given up, so that no thread outlives its test by much.
const IDLE_MAX: Duration = Duration::from_secs(120);

/// One buffer a connection.
const BUFFER_BYTES: usize = 16 * 1024;

/// A request head or a bulk head longer than this is refused.
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// Listeners on consecutive ports that share a record.
pub(crate) struct Listeners {
    port: u16,
    closing: Arc<AtomicBool>,
    record: Arc<Record>,
    loops: Mutex<Vec<JoinHandle<()>>>,
}

/// Whom they accepted.
#[derive(Default)]
struct Record {
    accepted: Mutex<Vec<Accepted>>,
    changed: Condvar,
}

/// Binds, listens, and serves until closed.
pub(crate) fn open(wanted: &Listen) -> io::Result<Listeners> {
    let closing = Arc::new(AtomicBool::new(false));
    let record = Arc::new(Record::default());
    let mut loops = Vec::new();
    let mut first = wanted.at.port();
    for index in 0..wanted.count.max(1) {
        let port = if index == 0 { first } else { first + index };
        let socket = bind(wanted, SocketAddr::new(wanted.at.ip(), port))?;
        if index == 0 {
            first = dial::address(socket.local_addr())?.port();
        }
        let service = Service { mode: wanted.mode, text: wanted.text.clone(), record: record.clone() };
        let closing = closing.clone();
        loops.push(spawn(move || accept_until(&socket, &closing, &service))?);
    }
    Ok(Listeners { port: first, closing, record, loops: Mutex::new(loops) })
}

impl Listeners {
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn accepted(&self) -> Vec<Accepted> {
        locked(&self.record.accepted).clone()
    }

    /// Waits for a number of connections after the first `after`, and for their end if wished.
    pub(crate) fn wait(
        &self,
        after: usize,
        count: usize,
        ended: bool,
        limit: Duration,
    ) -> Result<Vec<Accepted>, Failure> {
        let deadline = Instant::now() + limit;
        let mut accepted = locked(&self.record.accepted);
        loop {
            let new = accepted.get(after..).unwrap_or_default();
            let reached = new.iter().filter(|one| !ended || one.end.is_some()).count();
            if reached >= count {
                return Ok(new.to_vec());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure { step: "wait".to_owned(), errno: format!("{reached} of {count}") });
            }
            accepted =
                self.record.changed.wait_timeout(accepted, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Returns when the ports are free.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
        for running in locked(&self.loops).drain(..) {
            let _ = running.join();
        }
    }
}

fn bind(wanted: &Listen, at: SocketAddr) -> io::Result<Socket> {
    let protocol = if wanted.mptcp { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(protocol))?;
    socket.set_reuse_address(true)?;
    if at.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_read_timeout(Some(ACCEPT_TURN))?;
    socket.bind(&at.into())?;
    socket.listen(wanted.backlog)?;
    Ok(socket)
}

fn accept_until(socket: &Socket, closing: &AtomicBool, service: &Service) {
    while !closing.load(Ordering::Relaxed) {
        let Ok((connection, peer)) = socket.accept() else { continue };
        let (Some(peer), Ok(local)) = (peer.as_socket(), dial::address(connection.local_addr())) else {
            continue;
        };
        let index = service.record.begin(peer, local);
        let service = service.clone();
        let _ = spawn(move || {
            let end = service.serve(&connection, index);
            drop(connection);
            service.record.end(index, end);
        });
    }
}

impl Record {
    fn begin(&self, peer: SocketAddr, local: SocketAddr) -> usize {
        let mut accepted = locked(&self.accepted);
        if accepted.len() < ACCEPTED_MAX {
            accepted.push(Accepted { peer, local, received: 0, end: None });
        }
        self.changed.notify_all();
        accepted.len() - 1
    }

    fn received(&self, index: usize, bytes: usize) {
        if let Some(one) = locked(&self.accepted).get_mut(index) {
            one.received += bytes as u64;
        }
    }

    fn end(&self, index: usize, end: io::Result<()>) {
        if let Some(one) = locked(&self.accepted).get_mut(index) {
            one.end = Some(end.map_or_else(|error| errno(&error), |()| "eof".to_owned()));
        }
        self.changed.notify_all();
    }
}

/// What to do with a connection.
#[derive(Clone)]
struct Service {
    mode: Mode,
    text: String,
    record: Arc<Record>,
}

impl Service {
    fn serve(&self, mut connection: &Socket, index: usize) -> io::Result<()> {
        // An accepted socket inherits the listener's short time limit.
        connection.set_read_timeout(Some(IDLE_MAX))?;
        connection.set_write_timeout(Some(IDLE_MAX))?;
        match self.mode {
            Mode::Echo => self.read_all(connection, index, |bytes| connection_write(connection, bytes)),
            Mode::Bulk => self.bulk(connection, index),
            Mode::Greet => {
                connection.write_all(self.text.as_bytes())?;
                self.read_all(connection, index, |bytes| connection_write(connection, bytes))
            }
            Mode::Farewell => {
                connection.write_all(self.text.as_bytes())?;
                connection.shutdown(Shutdown::Write)?;
                self.read_all(connection, index, |_| Ok(()))
            }
            Mode::Http => self.http(connection, index),
            Mode::Sink => self.read_all(connection, index, |_| Ok(())),
            Mode::Hold => {
                std::thread::park_timeout(IDLE_MAX);
                Ok(())
            }
        }
    }

    fn read_all(
        &self,
        mut connection: &Socket,
        index: usize,
        mut take: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let length = connection.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            self.record.received(index, length);
            take(&buffer[..length])?;
        }
    }

    /// Reads `up` and sends `down` at once, then says what came.
    fn bulk(&self, connection: &Socket, index: usize) -> io::Result<()> {
        let head = head(connection, b"\n")?;
        let down: Payload = serde_json::from_slice(&head)?;
        let mut hash = Sha256::new();
        let mut bytes = 0;
        let downward = {
            let connection = connection.try_clone()?;
            spawn(move || talk::send_payload(&connection, &down).map(|_| ()))?
        };
        self.read_all(connection, index, |chunk| {
            hash.update(chunk);
            bytes += chunk.len() as u64;
            Ok(())
        })?;
        downward.join().map_err(|_| io::Error::other("panicked"))?.map_err(io::Error::other)?;
        connection_write(connection, &talk::trailer(hash, bytes))?;
        connection.shutdown(Shutdown::Write)
    }

    fn http(&self, connection: &Socket, index: usize) -> io::Result<()> {
        let head = head(connection, b"\r\n\r\n")?;
        self.record.received(index, head.len());
        let peer = dial::address(connection.peer_addr())?;
        let body = format!("{} peer={peer}\n", self.text.trim_end());
        let answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        connection_write(connection, answer.as_bytes())?;
        connection.shutdown(Shutdown::Write)?;
        self.read_all(connection, index, |_| Ok(()))
    }
}

fn connection_write(mut connection: &Socket, bytes: &[u8]) -> io::Result<()> {
    connection.write_all(bytes)
}

/// Reads up to and with the end mark, no byte more.
fn head(mut connection: &Socket, end: &[u8]) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    while !head.ends_with(end) {
        let mut byte = [0];
        connection.read_exact(&mut byte)?;
        head.push(byte[0]);
        if head.len() > HEAD_BYTES_MAX {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
    }
    Ok(head)
}
