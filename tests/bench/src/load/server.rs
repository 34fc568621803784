//! The server of the load: every service on its port, until its standard input closes.

use std::{
    io::{self, Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
};

use super::{
    ANSWER_BYTES, CHUNK_BYTES, LARGE_BYTES, REQUEST_BYTES, SMALL_BYTES, padded, port, prepare, spawn,
};

/// Threads that take connections of one exchange: as many as are asked for at a time.
const TAKERS: usize = 16;

/// Bytes of one read of bulk data.
const READ_BYTES: usize = 256 * 1024;

/// Listens on all ports, says so in one line, and serves until standard input closes.
///
/// # Errors
/// If a port is taken.
pub fn serve() -> io::Result<()> {
    each(port::SINK, take)?;
    each(port::SOURCE, give)?;
    each(port::ECHO_SMALL, |stream| echo(stream, SMALL_BYTES))?;
    each(port::ECHO_LARGE, |stream| echo(stream, LARGE_BYTES))?;
    each(port::REQUESTS, answer)?;
    briefly(port::CONNECT)?;
    hold(port::HOLD)?;
    println!("listening");
    io::copy(&mut io::stdin().lock(), &mut io::sink())?;
    Ok(())
}

fn listen(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
}

/// Serves each connection on a thread of its own.
fn each(port: u16, serve: fn(TcpStream) -> io::Result<()>) -> io::Result<()> {
    let listener = listen(port)?;
    spawn(move || {
        for stream in listener.incoming().flatten() {
            // A connection that breaks, or that is not served for want of threads, is the client's to report.
            let _ = spawn(move || prepare(&stream).and_then(|()| serve(stream)));
        }
    })?;
    Ok(())
}

fn take(mut stream: TcpStream) -> io::Result<()> {
    // A client may stay silent between two loads as long as it likes.
    stream.set_read_timeout(None)?;
    let mut buffer = vec![0; READ_BYTES];
    while stream.read(&mut buffer)? > 0 {}
    Ok(())
}

fn give(mut stream: TcpStream) -> io::Result<()> {
    let chunk = vec![7; CHUNK_BYTES];
    loop {
        stream.write_all(&chunk)?;
    }
}

fn echo(mut stream: TcpStream, bytes: usize) -> io::Result<()> {
    let mut message = vec![0; bytes];
    loop {
        stream.read_exact(&mut message)?;
        stream.write_all(&message)?;
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    let body = ANSWER_BYTES - 100;
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {body:06}\r\n");
    // Padded by a header, so that head and body together have the size wanted.
    let pad = 100 - head.len() - "x: \r\n\r\n".len();
    let answer = padded(&format!("{head}x: {}\r\n\r\n", "-".repeat(pad)), ANSWER_BYTES);
    let mut request = [0; REQUEST_BYTES];
    loop {
        stream.read_exact(&mut request)?;
        stream.write_all(&answer)?;
    }
}

/// Several threads accept on one socket and serve what they accepted.
fn briefly(port: u16) -> io::Result<()> {
    let listener = Arc::new(listen(port)?);
    for _ in 0..TAKERS {
        let listener = Arc::clone(&listener);
        spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = exchange(stream);
            }
        })?;
    }
    Ok(())
}

fn exchange(mut stream: TcpStream) -> io::Result<()> {
    prepare(&stream)?;
    let mut message = [0; SMALL_BYTES];
    stream.read_exact(&mut message)?;
    stream.write_all(&message)?;
    // To the client's end.
    while stream.read(&mut message)? > 0 {}
    Ok(())
}

/// Keeps what it accepted for as long as the process lives: a server for one measurement of memory.
fn hold(port: u16) -> io::Result<()> {
    let listener = listen(port)?;
    spawn(move || {
        let mut held = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let mut message = [0; SMALL_BYTES];
            let exchanged = prepare(&stream)
                .and_then(|()| stream.read_exact(&mut message))
                .and_then(|()| stream.write_all(&message));
            if exchanged.is_ok() {
                held.push(stream);
            }
        }
    })?;
    Ok(())
}
