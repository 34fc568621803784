//! HTTP/1.1 as the daemon frames it, against the parser behind it (T-22): whoever reads the bytes that the framing lets
//! through sees the same requests in the same places.

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, Response, body::Incoming, rt::ReadBufCursor, server::conn::http1::Builder, service::service_fn,
};

use crate::datapath::requests::{Walked, walk};

/// Longest input that is looked at, in bytes: some heads and bodies.
const BYTES_MAX: usize = 16 * 1024;

/// What somebody saw of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sight {
    method: String,
    target: String,
    body: Vec<u8>,
}

pub(crate) fn http1(data: &[u8]) {
    if data.len() > BYTES_MAX {
        return;
    }
    let walked = walk(data);
    let passed = walked.fault.as_ref().map_or(data.len(), |(before, _)| *before);
    let (framed, hyper) = (framed(data, &walked), by_hyper(&data[..passed]));
    assert!(
        hyper.len() <= framed.len(),
        "behind the framing somebody saw {} requests where it saw {}: {hyper:?}, {framed:?}",
        hyper.len(),
        framed.len()
    );
    for (framed, hyper) in framed.iter().zip(&hyper) {
        assert_eq!(framed, hyper, "{walked:?}");
    }
}

/// The complete requests, read by the simplest means from between the ends that the framing found.
fn framed(data: &[u8], walked: &Walked) -> Vec<Sight> {
    let mut sights = Vec::new();
    let mut start = 0;
    for end in &walked.ends {
        let request = &data[start..*end];
        let head_end = walked
            .heads
            .iter()
            .find(|head| (start + 1..=*end).contains(*head))
            .map_or(0, |head| head - start);
        start = *end;
        let (head, body) = request.split_at(head_end);
        let head = String::from_utf8_lossy(head);
        let head = head.trim_start_matches("\r\n");
        let mut words = head.lines().next().unwrap_or_default().split(' ');
        let is_chunked = head.lines().any(|line| line.to_ascii_lowercase().starts_with("transfer-encoding:"));
        sights.push(Sight {
            method: words.next().unwrap_or_default().to_owned(),
            // A fragment is no part of a request: hyper cuts it off, and so does the policy.
            target: words.next().unwrap_or_default().split('#').next().unwrap_or_default().to_owned(),
            body: if is_chunked { unchunked(body) } else { body.to_vec() },
        });
    }
    sights
}

fn unchunked(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(end) = body.iter().position(|byte| *byte == b'\n') {
        let line = String::from_utf8_lossy(&body[..end]);
        let digits: String = line.trim_start().chars().take_while(char::is_ascii_hexdigit).collect();
        let size = usize::from_str_radix(&digits, 16).unwrap_or_default();
        let rest = &body[end + 1..];
        if size == 0 || rest.len() < size + 2 {
            break;
        }
        whole.extend_from_slice(&rest[..size]);
        body = &rest[size + 2..];
    }
    whole
}

/// The complete requests that hyper serves.
fn by_hyper(data: &[u8]) -> Vec<Sight> {
    let seen: Arc<Mutex<Vec<Sight>>> = Arc::default();
    let service = service_fn(|request: Request<Incoming>| {
        let seen = Arc::clone(&seen);
        async move {
            let (method, target) = (request.method().to_string(), request.uri().to_string());
            if let Ok(body) = request.into_body().collect().await {
                let body = body.to_bytes().to_vec();
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(Sight { method, target, body });
            }
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::new())))
        }
    });
    let connection = Builder::new().serve_connection(Wire { left: data.to_vec() }, service);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers");
    // What it makes of the rest is an error or the end.
    drop(runtime.block_on(connection));
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    seen.clone()
}

/// Gives bytes, then the end; takes whatever is written.
struct Wire {
    left: Vec<u8>,
}

impl hyper::rt::Read for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        mut into: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let count = into.remaining().min(self.left.len());
        let taken: Vec<u8> = self.left.drain(..count).collect();
        into.put_slice(&taken);
        Poll::Ready(Ok(()))
    }
}

impl hyper::rt::Write for Wire {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
