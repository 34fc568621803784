//! The application in a pod: opens listeners and connections as it is told on standard input, one JSON object a line,
//! and answers on standard output. Knows nothing of the mesh.
//!
//! [`listen`] serves, [`dial`] connects, [`talk`] exchanges on one connection, [`load`] drives many.

mod dial;
mod listen;
mod load;
mod payload;
mod sockets;
mod talk;

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use socket2::{SockRef, Socket};
use world::protocol::{Answer, Command, Connected, Failure, Request, Response};

/// Stack of each thread; buffers live on the heap, so this is for calls alone and thousands of threads fit.
const STACK_BYTES: usize = 256 * 1024;

fn main() -> std::io::Result<()> {
    let application = Arc::new(Application::default());
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let request: Request = match serde_json::from_str(&line) {
            Ok(request) => request,
            Err(error) => {
                eprintln!("mesh-app: {error} in the request {line:?}");
                continue;
            }
        };
        let application = application.clone();
        spawn(move || {
            let outcome = application.obey(request.command);
            print(&Response { id: request.id, outcome });
        })?;
    }
    Ok(())
}

/// A thread with a small stack.
fn spawn<T: Send + 'static>(
    body: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<std::thread::JoinHandle<T>> {
    std::thread::Builder::new().stack_size(STACK_BYTES).spawn(body)
}

/// Writes one whole line; a harness that went away is no fault of ours.
fn print(response: &Response) {
    let mut line = serde_json::to_vec(response).expect("a response has only string keys");
    line.push(b'\n');
    let _ = std::io::stdout().lock().write_all(&line);
}

/// What is open.
#[derive(Default)]
struct Application {
    numbers: AtomicU64,
    sockets: Mutex<HashMap<u64, Arc<Socket>>>,
    listeners: Mutex<HashMap<u64, Arc<listen::Listeners>>>,
    storms: Mutex<HashMap<u64, Arc<load::Running>>>,
}

impl Application {
    fn obey(&self, command: Command) -> Result<Answer, Failure> {
        match command {
            Command::Listen(wanted) => self.listen(&wanted),
            Command::Accepted { listener } => Ok(Answer::Accepted(self.listener(listener)?.accepted())),
            Command::WaitAccepted { listener, after, count, ended, timeout_ms } => {
                let listener = self.listener(listener)?;
                listener.wait(after, count, ended, Duration::from_millis(timeout_ms)).map(Answer::Accepted)
            }
            Command::CloseListener { listener } => self.close_listener(listener),
            Command::Connect(wanted) => self.connect(&wanted),
            Command::Ask { connect, text } => Ok(Answer::Asked(talk::ask(&connect, &text))),
            Command::Send { socket, text } => {
                talk::send(&*self.socket(socket)?, text.as_bytes()).map(|()| Answer::Done)
            }
            Command::Receive { socket, bytes } => {
                talk::receive(&*self.socket(socket)?, bytes).map(Answer::Text)
            }
            Command::Exchange { socket, text } => {
                talk::exchange(&*self.socket(socket)?, &text).map(Answer::Text)
            }
            Command::Drain { socket, timeout_ms } => {
                let limit = Duration::from_millis(timeout_ms);
                talk::drain(&*self.socket(socket)?, limit).map(Answer::Ended)
            }
            Command::Bulk { socket, up, down, stall_ms } => {
                let limit = Duration::from_millis(stall_ms);
                let elapsed = talk::bulk(&self.socket(socket)?, up, &down, limit)?;
                Ok(Answer::Bulk { elapsed_ms: milliseconds(elapsed) })
            }
            Command::ShutdownWrite { socket } => {
                let socket = self.socket(socket)?;
                socket.shutdown(std::net::Shutdown::Write).map(|()| Answer::Done).map_err(failed("shutdown"))
            }
            Command::Close { socket } => self.take_socket(socket).map(|_| Answer::Done),
            Command::Reset { socket } => self.reset(socket),
            Command::SetMark { socket, mark } => {
                let socket = self.socket(socket)?;
                socket.set_mark(mark).map(|()| Answer::Done).map_err(failed("mark"))
            }
            Command::Many(wanted) => load::many(&wanted).map(Answer::Load),
            Command::StormStart(wanted) => self.storm(wanted),
            Command::StormProgress { storm, more, timeout_ms } => {
                let running = self.running(storm)?;
                running.progress(more, Duration::from_millis(timeout_ms)).map(Answer::Load)
            }
            Command::StormStop { storm } => {
                let running = self.running(storm)?;
                locked(&self.storms).remove(&storm);
                Ok(Answer::Load(running.stop()))
            }
            Command::Sockets => sockets::listed().map(Answer::Sockets).map_err(failed("read")),
        }
    }

    fn listen(&self, wanted: &world::protocol::Listen) -> Result<Answer, Failure> {
        let opened = listen::open(wanted).map_err(failed("listen"))?;
        let port = opened.port();
        let listener = self.number();
        locked(&self.listeners).insert(listener, Arc::new(opened));
        Ok(Answer::Listening { listener, port })
    }

    fn close_listener(&self, listener: u64) -> Result<Answer, Failure> {
        let closing = self.listener(listener)?;
        locked(&self.listeners).remove(&listener);
        closing.close();
        Ok(Answer::Done)
    }

    fn connect(&self, wanted: &world::protocol::Connect) -> Result<Answer, Failure> {
        let started = std::time::Instant::now();
        let opened = dial::dial(wanted)?;
        let elapsed_ms = milliseconds(started.elapsed());
        let local = dial::address(opened.local_addr()).map_err(failed("getsockname"))?;
        let peer = dial::address(opened.peer_addr()).map_err(failed("getpeername"))?;
        let socket = self.number();
        locked(&self.sockets).insert(socket, Arc::new(opened));
        Ok(Answer::Connected(Connected { socket, local, peer, elapsed_ms }))
    }

    /// RST instead of FIN.
    fn reset(&self, socket: u64) -> Result<Answer, Failure> {
        let socket = self.take_socket(socket)?;
        SockRef::from(&*socket).set_linger(Some(Duration::ZERO)).map_err(failed("linger"))?;
        Ok(Answer::Done)
    }

    fn storm(&self, wanted: world::protocol::Storm) -> Result<Answer, Failure> {
        let running = load::start(wanted).map_err(failed("thread"))?;
        let storm = self.number();
        locked(&self.storms).insert(storm, running);
        Ok(Answer::Storming { storm })
    }

    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    fn socket(&self, number: u64) -> Result<Arc<Socket>, Failure> {
        locked(&self.sockets).get(&number).cloned().ok_or_else(|| unknown("socket"))
    }

    fn take_socket(&self, number: u64) -> Result<Arc<Socket>, Failure> {
        locked(&self.sockets).remove(&number).ok_or_else(|| unknown("socket"))
    }

    fn listener(&self, number: u64) -> Result<Arc<listen::Listeners>, Failure> {
        locked(&self.listeners).get(&number).cloned().ok_or_else(|| unknown("listener"))
    }

    fn running(&self, number: u64) -> Result<Arc<load::Running>, Failure> {
        locked(&self.storms).get(&number).cloned().ok_or_else(|| unknown("storm"))
    }
}

/// The lock, also after another thread panicked with it.
fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unknown(what: &str) -> Failure {
    Failure { step: what.to_owned(), errno: "unknown".to_owned() }
}

/// Names the step and the errno of an input or output error.
fn failed(step: &'static str) -> impl Fn(std::io::Error) -> Failure {
    move |error| Failure { step: step.to_owned(), errno: errno(&error) }
}

/// The errno's name, or `eof`.
fn errno(error: &std::io::Error) -> String {
    if error.kind() == std::io::ErrorKind::UnexpectedEof {
        return "eof".to_owned();
    }
    match error.raw_os_error() {
        Some(number) => format!("{:?}", nix::errno::Errno::from_raw(number)),
        None => format!("{:?}", error.kind()),
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
