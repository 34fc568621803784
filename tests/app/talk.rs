//! Exchanges on one connection.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use socket2::Socket;
use world::protocol::{Asked, Connect, Ended, Failure, Payload};

use crate::payload::{CHUNK_BYTES, Source, digest};
use crate::{dial, failed, milliseconds, spawn};

/// More than any answer in the tests; what is longer is cut.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;

/// A bulk server's last word: the digest and the count of what came.
pub(crate) const TRAILER_BYTES: usize = 32 + 8;

/// Connects, says the text, reads to the end.
pub(crate) fn ask(connect: &Connect, text: &str) -> Asked {
    let started = Instant::now();
    let socket = match dial::dial(connect) {
        Ok(socket) => socket,
        Err(failure) => {
            return Asked {
                refused: Some(failure.errno),
                text: String::new(),
                end: String::new(),
                elapsed_ms: milliseconds(started.elapsed()),
            };
        }
    };
    let mut answer = Vec::new();
    let end =
        converse(&socket, text, &mut answer).map_or_else(|failure| failure.errno, |()| "eof".to_owned());
    Asked {
        refused: None,
        text: String::from_utf8_lossy(&answer).into_owned(),
        end,
        elapsed_ms: milliseconds(started.elapsed()),
    }
}

fn converse(socket: &Socket, text: &str, answer: &mut Vec<u8>) -> Result<(), Failure> {
    send(socket, text.as_bytes())?;
    // Where the other end was faster with its reset, reading says how it ended.
    let _ = socket.shutdown(Shutdown::Write);
    socket.take(ANSWER_BYTES_MAX).read_to_end(answer).map_err(failed("receive"))?;
    Ok(())
}

/// Sends all of it.
pub(crate) fn send(mut socket: &Socket, bytes: &[u8]) -> Result<(), Failure> {
    socket.write_all(bytes).map_err(failed("send"))
}

/// Reads exactly so much.
pub(crate) fn receive(mut socket: &Socket, bytes: usize) -> Result<String, Failure> {
    let mut buffer = vec![0; bytes];
    socket.read_exact(&mut buffer).map_err(failed("receive"))?;
    Ok(String::from_utf8_lossy(&buffer).into_owned())
}

/// Sends a text and reads as much back.
pub(crate) fn exchange(socket: &Socket, text: &str) -> Result<String, Failure> {
    send(socket, text.as_bytes())?;
    receive(socket, text.len())
}

/// Reads until the connection ends.
pub(crate) fn drain(mut socket: &Socket, limit: Duration) -> Result<Ended, Failure> {
    let started = Instant::now();
    let before = socket.read_timeout().map_err(failed("option"))?;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut bytes = 0;
    let end = loop {
        let left = limit.saturating_sub(started.elapsed()).max(Duration::from_millis(1));
        socket.set_read_timeout(Some(left)).map_err(failed("option"))?;
        match socket.read(&mut buffer) {
            Ok(0) => break "eof".to_owned(),
            Ok(length) => bytes += length as u64,
            Err(error) => break crate::errno(&error),
        }
        if limit < started.elapsed() {
            break "EAGAIN".to_owned();
        }
    };
    socket.set_read_timeout(before).map_err(failed("option"))?;
    Ok(Ended { bytes, end, elapsed_ms: milliseconds(started.elapsed()) })
}

/// Both directions at once, checked with digests: `up` in a thread, `down` here.
pub(crate) fn bulk(
    socket: &Arc<Socket>,
    up: Payload,
    down: &Payload,
    stall: Duration,
) -> Result<Duration, Failure> {
    let started = Instant::now();
    socket.set_read_timeout(Some(stall)).map_err(failed("option"))?;
    socket.set_write_timeout(Some(stall)).map_err(failed("option"))?;
    let mut head = serde_json::to_vec(down).expect("a payload has only string keys");
    head.push(b'\n');
    let upward = {
        let socket = socket.clone();
        spawn(move || -> Result<[u8; TRAILER_BYTES], Failure> {
            send(&socket, &head)?;
            let trailer = send_payload(&socket, &up)?;
            socket.shutdown(Shutdown::Write).map_err(failed("shutdown"))?;
            Ok(trailer)
        })
        .map_err(failed("thread"))?
    };
    let received = receive_digest(socket, down.bytes);
    let mut trailer = [0; TRAILER_BYTES];
    let told = received.and_then(|received| {
        (&**socket).read_exact(&mut trailer).map_err(failed("receive"))?;
        Ok(received)
    });
    let sent = upward.join().map_err(|_| failure("thread", "panicked"))?;
    let (received, sent) = (told?, sent?);
    if received != digest(down) {
        return Err(failure("down", "mismatch"));
    }
    if trailer != sent {
        return Err(failure("up", "mismatch"));
    }
    Ok(started.elapsed())
}

/// Sends a payload; what the other end should say of it.
pub(crate) fn send_payload(socket: &Socket, payload: &Payload) -> Result<[u8; TRAILER_BYTES], Failure> {
    let mut source = Source::new(payload);
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut hash = Sha256::new();
    loop {
        let chunk = source.next(&mut buffer);
        if chunk.is_empty() {
            return Ok(trailer(hash, payload.bytes));
        }
        hash.update(chunk);
        send(socket, chunk)?;
    }
}

/// Digest and count as they are sent at the end.
pub(crate) fn trailer(hash: Sha256, bytes: u64) -> [u8; TRAILER_BYTES] {
    let mut trailer = [0; TRAILER_BYTES];
    trailer[..32].copy_from_slice(&hash.finalize());
    trailer[32..].copy_from_slice(&bytes.to_le_bytes());
    trailer
}

/// The digest of exactly so many bytes.
fn receive_digest(mut socket: &Socket, bytes: u64) -> Result<[u8; 32], Failure> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut hash = Sha256::new();
    let mut left = bytes;
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES);
        match socket.read(&mut buffer[..wanted]) {
            Ok(0) => return Err(failure("receive", "eof")),
            Ok(length) => {
                hash.update(&buffer[..length]);
                left -= length as u64;
            }
            Err(error) => return Err(failed("receive")(error)),
        }
    }
    Ok(hash.finalize().into())
}

fn failure(step: &str, errno: &str) -> Failure {
    Failure { step: step.to_owned(), errno: errno.to_owned() }
}
