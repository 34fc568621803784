//! The harness' end of an application: a `mesh-app` process that runs in a pod's namespace and cgroup.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cgroup::Cgroup;
use crate::namespace::Namespace;
use crate::protocol::{
    Accepted, Answer, Asked, Command, Connect, Connected, Ended, Failure, Listen, Load, Many, Mode, Payload,
    Request, Response, Socket, Storm,
};

/// Every command of the protocol ends within its own limits; this is for an application that died.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(180);

type Outcome = Result<Answer, Failure>;
type Waiting = Arc<Mutex<HashMap<u64, Sender<Outcome>>>>;

/// A running application.
#[derive(Debug)]
pub struct App {
    name: String,
    child: Child,
    stdin: Mutex<ChildStdin>,
    numbers: AtomicU64,
    waiting: Waiting,
}

/// A listener of an application.
#[derive(Debug, Clone, Copy)]
pub struct Listener {
    number: u64,
    /// Its (first) port.
    pub port: u16,
}

/// A command under way.
#[derive(Debug)]
pub struct Pending {
    name: String,
    outcome: Receiver<Outcome>,
}

impl Pending {
    /// Waits for what came of it.
    ///
    /// # Errors
    /// If the command failed.
    #[track_caller]
    pub fn outcome(self) -> Outcome {
        match self.outcome.recv_timeout(ANSWER_TIME_MAX) {
            Ok(outcome) => outcome,
            Err(_) => panic!("the application of {} does not answer", self.name),
        }
    }
}

impl App {
    /// Starts an application inside a namespace and a cgroup.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(name: &str, namespace: &Namespace, cgroup: &Cgroup) -> Result<Self> {
        let mut child = namespace
            .command(cgroup, &crate::binary("mesh-app"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting mesh-app")?;
        let stdin = Mutex::new(child.stdin.take().expect("it is piped"));
        let stdout = child.stdout.take().expect("it is piped");
        let waiting = Waiting::default();
        let answered = waiting.clone();
        std::thread::spawn(move || hear(stdout, &answered));
        Ok(Self { name: name.to_owned(), child, stdin, numbers: AtomicU64::new(1), waiting })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Begins a command.
    #[track_caller]
    pub fn begin(&self, command: Command) -> Pending {
        let id = self.numbers.fetch_add(1, Ordering::Relaxed);
        let (sender, outcome) = channel();
        self.waiting.lock().expect("no holder panics").insert(id, sender);
        let mut line = serde_json::to_vec(&Request { id, command }).expect("a request has only string keys");
        line.push(b'\n');
        let written = self.stdin.lock().expect("no holder panics").write_all(&line);
        written.unwrap_or_else(|error| panic!("the application of {} is gone: {error}", self.name));
        Pending { name: self.name.clone(), outcome }
    }

    /// Does a command.
    ///
    /// # Errors
    /// If the command failed.
    #[track_caller]
    pub fn call(&self, command: Command) -> Outcome {
        self.begin(command).outcome()
    }

    #[track_caller]
    fn must(&self, command: Command) -> Answer {
        let said = format!("{command:?}");
        self.call(command).unwrap_or_else(|failure| panic!("{}: {said}: {failure}", self.name))
    }

    /// Opens a listener that must open.
    #[track_caller]
    pub fn listen(&self, wanted: Listen) -> Listener {
        let Answer::Listening { listener, port } = self.must(Command::Listen(wanted)) else { unexpected() };
        Listener { number: listener, port }
    }

    /// Opens a listener for both families on a port; 0 lets the kernel choose.
    #[track_caller]
    pub fn serve(&self, port: u16, mode: Mode) -> Listener {
        self.listen(Listen::at(SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port), mode))
    }

    /// Serves HTTP, with a name that every answer repeats.
    #[track_caller]
    pub fn serve_http(&self, port: u16, text: &str) -> Listener {
        let at = SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port);
        self.listen(Listen { text: text.to_owned(), ..Listen::at(at, Mode::Http) })
    }

    /// Whom a listener accepted.
    #[track_caller]
    pub fn accepted(&self, listener: Listener) -> Vec<Accepted> {
        let Answer::Accepted(accepted) = self.must(Command::Accepted { listener: listener.number }) else {
            unexpected()
        };
        accepted
    }

    /// Waits until a listener accepted so many after its first `after`, and so many of them ended if wished.
    #[track_caller]
    pub fn wait_accepted(
        &self,
        listener: Listener,
        after: usize,
        count: usize,
        ended: bool,
    ) -> Vec<Accepted> {
        let timeout_ms = 20_000;
        let Answer::Accepted(accepted) =
            self.must(Command::WaitAccepted { listener: listener.number, after, count, ended, timeout_ms })
        else {
            unexpected()
        };
        accepted
    }

    /// Closes a listener; its port is free afterwards.
    #[track_caller]
    pub fn close_listener(&self, listener: Listener) {
        self.must(Command::CloseListener { listener: listener.number });
    }

    /// Tries to connect.
    ///
    /// # Errors
    /// If it failed.
    #[track_caller]
    pub fn try_connect(&self, wanted: Connect) -> Result<Connected, Failure> {
        let Answer::Connected(connected) = self.call(Command::Connect(wanted))? else { unexpected() };
        Ok(connected)
    }

    /// Opens a connection that must open.
    #[track_caller]
    pub fn connect(&self, wanted: Connect) -> Connected {
        let said = format!("{wanted:?}");
        self.try_connect(wanted).unwrap_or_else(|failure| panic!("{}: {said}: {failure}", self.name))
    }

    /// A whole conversation: connect, say, read to the end.
    #[track_caller]
    pub fn ask(&self, connect: Connect, text: &str) -> Asked {
        let Answer::Asked(asked) = self.must(Command::Ask { connect, text: text.to_owned() }) else {
            unexpected()
        };
        asked
    }

    /// One HTTP request.
    #[track_caller]
    pub fn http(&self, to: SocketAddr) -> Asked {
        self.http_by(Connect::to(to))
    }

    /// One HTTP request on a connection of this kind.
    #[track_caller]
    pub fn http_by(&self, connect: Connect) -> Asked {
        self.ask(connect, "GET / HTTP/1.1\r\nhost: test\r\n\r\n")
    }

    /// Sends on an open connection.
    ///
    /// # Errors
    /// If it failed.
    #[track_caller]
    pub fn send(&self, on: &Connected, text: &str) -> Result<(), Failure> {
        self.call(Command::Send { socket: on.socket, text: text.to_owned() }).map(|_| ())
    }

    /// Reads exactly so many bytes.
    ///
    /// # Errors
    /// If it failed.
    #[track_caller]
    pub fn receive(&self, on: &Connected, bytes: usize) -> Result<String, Failure> {
        text(self.call(Command::Receive { socket: on.socket, bytes })?)
    }

    /// Sends a text and reads as much back.
    ///
    /// # Errors
    /// If it failed.
    #[track_caller]
    pub fn exchange(&self, on: &Connected, said: &str) -> Result<String, Failure> {
        text(self.call(Command::Exchange { socket: on.socket, text: said.to_owned() })?)
    }

    /// Reads until the connection ends, at most so long.
    #[track_caller]
    pub fn drain(&self, on: &Connected, limit: Duration) -> Ended {
        let timeout_ms = u64::try_from(limit.as_millis()).expect("a short time");
        let Answer::Ended(ended) = self.must(Command::Drain { socket: on.socket, timeout_ms }) else {
            unexpected()
        };
        ended
    }

    /// Sends and receives bulk data with checksums on a connection to a [`Mode::Bulk`] listener.
    ///
    /// # Errors
    /// If a byte is wrong or nothing moves for twenty seconds.
    #[track_caller]
    pub fn bulk(&self, on: &Connected, up: Payload, down: Payload) -> Result<Duration, Failure> {
        let Answer::Bulk { elapsed_ms } =
            self.call(Command::Bulk { socket: on.socket, up, down, stall_ms: 20_000 })?
        else {
            unexpected()
        };
        Ok(Duration::from_millis(elapsed_ms))
    }

    /// Sends FIN.
    #[track_caller]
    pub fn shutdown_write(&self, on: &Connected) {
        self.must(Command::ShutdownWrite { socket: on.socket });
    }

    /// Closes.
    #[track_caller]
    pub fn close(&self, on: &Connected) {
        self.must(Command::Close { socket: on.socket });
    }

    /// Closes with RST.
    #[track_caller]
    pub fn reset(&self, on: &Connected) {
        self.must(Command::Reset { socket: on.socket });
    }

    /// `SO_MARK` on an open connection.
    #[track_caller]
    pub fn set_mark(&self, on: &Connected, mark: u32) {
        self.must(Command::SetMark { socket: on.socket, mark });
    }

    /// Many connections to echo listeners.
    #[track_caller]
    pub fn many(&self, wanted: Many) -> Load {
        load(self.must(Command::Many(wanted)))
    }

    /// Starts a loop of connect, exchange, close.
    #[track_caller]
    pub fn storm(&self, wanted: Storm) -> Storming<'_> {
        let Answer::Storming { storm } = self.must(Command::StormStart(wanted)) else { unexpected() };
        Storming { app: self, storm, stopped: false }
    }

    /// The namespace's TCP sockets.
    #[track_caller]
    pub fn sockets(&self) -> Vec<Socket> {
        let Answer::Sockets(sockets) = self.must(Command::Sockets) else { unexpected() };
        sockets
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A storm under way.
#[derive(Debug)]
pub struct Storming<'a> {
    app: &'a App,
    storm: u64,
    stopped: bool,
}

impl Storming<'_> {
    /// Waits for so many more successes.
    #[track_caller]
    pub fn progress(&self, more: u64, limit: Duration) -> Load {
        let timeout_ms = u64::try_from(limit.as_millis()).expect("a short time");
        load(self.app.must(Command::StormProgress { storm: self.storm, more, timeout_ms }))
    }

    /// Lets the running attempts end; what came of all.
    #[track_caller]
    pub fn stop(mut self) -> Load {
        self.stopped = true;
        load(self.app.must(Command::StormStop { storm: self.storm }))
    }
}

impl Drop for Storming<'_> {
    /// A case that failed must not storm on through the next ones.
    fn drop(&mut self) {
        if !self.stopped {
            drop(self.app.begin(Command::StormStop { storm: self.storm }));
        }
    }
}

/// Gives each line to whoever waits for it.
fn hear(stdout: ChildStdout, waiting: &Waiting) {
    for line in BufReader::new(stdout).lines() {
        let Ok(line) = line else { break };
        match serde_json::from_str::<Response>(&line) {
            Ok(response) => {
                if let Some(sender) = waiting.lock().expect("no holder panics").remove(&response.id) {
                    let _ = sender.send(response.outcome);
                }
            }
            Err(error) => eprintln!("mesh-app said {line:?}: {error}"),
        }
    }
    // Whoever still waits learns that no answer comes.
    waiting.lock().expect("no holder panics").clear();
}

fn text(answer: Answer) -> Result<String, Failure> {
    let Answer::Text(text) = answer else { unexpected() };
    Ok(text)
}

#[track_caller]
fn load(answer: Answer) -> Load {
    let Answer::Load(load) = answer else { unexpected() };
    load
}

#[track_caller]
fn unexpected() -> ! {
    panic!("mesh-app answers another question")
}
