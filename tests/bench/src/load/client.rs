//! The client of the load: does one [`Order`] after the other.

use std::{
    fs,
    io::{self, BufRead, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{
    ANSWER_BYTES, Answer, CHUNK_BYTES, CONNECTIONS_MAX, Counted, Load, Order, REQUEST_BYTES, SMALL_BYTES,
    padded, prepare, spawn,
};

/// Exchanges whose time one thread keeps: a minute at 60,000 a second. Later ones are counted without their time.
const SAMPLES_MAX: usize = 4_000_000;

/// Longest load of one order.
const RUN_TIME_MAX: Duration = Duration::from_secs(120);

/// Reads orders from standard input until it closes, and answers each in one line.
///
/// # Errors
/// If standard input or output breaks, or an order is no order.
pub fn obey() -> Result<()> {
    let mut held = Vec::new();
    for line in io::stdin().lock().lines() {
        let order = serde_json::from_str(&line?).context("an order")?;
        let answer = done(order, &mut held).unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        io::stdout().lock().write_all(&line)?;
    }
    Ok(())
}

fn done(order: Order, held: &mut Vec<TcpStream>) -> Result<Answer> {
    match order {
        Order::Run { load, target, warm_ms, count_ms, cpu } => {
            let (warm, count) = (Duration::from_millis(warm_ms), Duration::from_millis(count_ms));
            ensure!(warm + count <= RUN_TIME_MAX, "a load runs for {RUN_TIME_MAX:?} at most");
            run(load, target, warm, count, &cpu).map(Answer::Counted)
        }
        Order::Hold { target, connections } => {
            ensure!(connections <= CONNECTIONS_MAX, "{CONNECTIONS_MAX} connections at most");
            while held.len() < usize::from(connections) {
                let opened = exchanged(target).with_context(|| format!("connection {}", held.len() + 1))?;
                held.push(opened);
            }
            Ok(Answer::Done)
        }
        Order::Release => {
            held.clear();
            Ok(Answer::Done)
        }
    }
}

fn run(load: Load, target: SocketAddr, warm: Duration, count: Duration, cpu: &[PathBuf]) -> Result<Counted> {
    let crew = Crew::start(load, target)?;
    thread::sleep(warm);
    let (cpu_before, amount_before) = (cpu_of(cpu)?, crew.amount());
    let began = Instant::now();
    crew.shared.counts.store(true, Ordering::Relaxed);
    thread::sleep(count);
    let elapsed = began.elapsed();
    let amount = crew.amount() - amount_before;
    let cpu_microseconds = cpu_of(cpu)?.saturating_sub(cpu_before);
    let mut samples = crew.stop()?;
    Ok(Counted {
        amount,
        nanoseconds: u64::try_from(elapsed.as_nanos())?,
        cpu_microseconds,
        p50_nanoseconds: percentile(&mut samples, 50),
        p99_nanoseconds: percentile(&mut samples, 99),
    })
}

/// The threads of one load.
struct Crew {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<Result<Vec<u32>>>>,
}

#[derive(Default)]
struct Shared {
    /// Times are kept from here on.
    counts: AtomicBool,
    stop: AtomicBool,
    amount: AtomicU64,
}

impl Crew {
    fn start(load: Load, target: SocketAddr) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let mut threads = Vec::new();
        let number = match load {
            Load::Up { connections } | Load::Down { connections } | Load::Requests { connections } => {
                connections
            }
            Load::Connects { parallel } => parallel,
            Load::Echo { .. } => 1,
        };
        ensure!(number <= CONNECTIONS_MAX, "{CONNECTIONS_MAX} connections at most");
        for _ in 0..number {
            let worker = Worker { shared: Arc::clone(&shared), times: Vec::new() };
            threads.push(match load {
                Load::Connects { .. } => spawn(move || worker.connects(target))?,
                Load::Up { .. } => {
                    let stream = opened(target)?;
                    spawn(move || worker.up(stream))?
                }
                Load::Down { .. } => {
                    let stream = opened(target)?;
                    spawn(move || worker.down(stream))?
                }
                Load::Echo { bytes } => {
                    let stream = opened(target)?;
                    spawn(move || worker.exchanges(stream, &vec![b'x'; bytes], bytes))?
                }
                Load::Requests { .. } => {
                    let stream = opened(target)?;
                    let head = "GET / HTTP/1.1\r\nhost: service.example\r\naccept: text/plain\r\nx: ";
                    let pad = "-".repeat(REQUEST_BYTES - head.len() - 4);
                    let request = padded(&format!("{head}{pad}\r\n\r\n"), REQUEST_BYTES);
                    spawn(move || worker.exchanges(stream, &request, ANSWER_BYTES))?
                }
            });
        }
        Ok(Self { shared, threads })
    }

    fn amount(&self) -> u64 {
        self.shared.amount.load(Ordering::Relaxed)
    }

    /// Ends the load; the times of all exchanges that were counted, in nanoseconds.
    fn stop(self) -> Result<Vec<u32>> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut times = Vec::new();
        for thread in self.threads {
            let Ok(outcome) = thread.join() else { anyhow::bail!("a thread of the load panicked") };
            times.append(&mut outcome?);
        }
        Ok(times)
    }
}

struct Worker {
    shared: Arc<Shared>,
    times: Vec<u32>,
}

impl Worker {
    fn goes_on(&self) -> bool {
        !self.shared.stop.load(Ordering::Relaxed)
    }

    fn moved(&self, amount: usize) {
        self.shared.amount.fetch_add(amount as u64, Ordering::Relaxed);
    }

    fn timed(&mut self, since: Instant) {
        self.moved(1);
        if self.shared.counts.load(Ordering::Relaxed) && self.times.len() < SAMPLES_MAX {
            // Four seconds are the end of the scale.
            self.times.push(u32::try_from(since.elapsed().as_nanos()).unwrap_or(u32::MAX));
        }
    }

    fn up(self, mut stream: TcpStream) -> Result<Vec<u32>> {
        let chunk = vec![7; CHUNK_BYTES];
        while self.goes_on() {
            stream.write_all(&chunk).context("write")?;
            self.moved(chunk.len());
        }
        // What is under way must not disturb the next measurement: the server closes when it has all.
        stream.shutdown(Shutdown::Write)?;
        let rest = stream.read(&mut [0; 1]).context("the server's end")?;
        ensure!(rest == 0, "the server of a stream has nothing to say");
        Ok(self.times)
    }

    fn down(self, mut stream: TcpStream) -> Result<Vec<u32>> {
        let mut chunk = vec![0; 4 * CHUNK_BYTES];
        while self.goes_on() {
            let read = stream.read(&mut chunk).context("read")?;
            ensure!(read > 0, "the server ended the stream");
            self.moved(read);
        }
        Ok(self.times)
    }

    fn exchanges(mut self, mut stream: TcpStream, request: &[u8], answer_bytes: usize) -> Result<Vec<u32>> {
        let mut answer = vec![0; answer_bytes];
        while self.goes_on() {
            let began = Instant::now();
            stream.write_all(request).context("write")?;
            stream.read_exact(&mut answer).context("read")?;
            self.timed(began);
        }
        Ok(self.times)
    }

    fn connects(mut self, target: SocketAddr) -> Result<Vec<u32>> {
        while self.goes_on() {
            let began = Instant::now();
            drop(exchanged(target)?);
            self.timed(began);
        }
        Ok(self.times)
    }
}

fn opened(target: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, super::STALL_TIME_MAX).context("connect")?;
    prepare(&stream)?;
    Ok(stream)
}

/// A connection after one exchange.
fn exchanged(target: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(target).context("connect")?;
    prepare(&stream)?;
    let mut message = [b'x'; SMALL_BYTES];
    stream.write_all(&message).context("write")?;
    stream.read_exact(&mut message).context("read")?;
    Ok(stream)
}

/// CPU time of control groups so far, in microseconds.
fn cpu_of(files: &[PathBuf]) -> Result<u64> {
    let mut sum = 0;
    for file in files {
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        sum += usage(&text).with_context(|| format!("{} has no usage_usec", file.display()))?;
    }
    Ok(sum)
}

fn usage(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.trim().parse().ok())
}

fn percentile(times: &mut [u32], percent: usize) -> Option<u64> {
    let index = (times.len() * percent / 100).min(times.len().checked_sub(1)?);
    Some(u64::from(*times.select_nth_unstable(index).1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_occurred() {
        let mut times: Vec<u32> = (1..=1000).rev().collect();
        assert_eq!(percentile(&mut times, 50), Some(501));
        assert_eq!(percentile(&mut times, 99), Some(991));
        assert_eq!(percentile(&mut [7], 99), Some(7));
        assert_eq!(percentile(&mut [], 50), None);
    }

    #[test]
    fn cpu_time_is_read_from_the_groups_own_file() {
        assert_eq!(usage("usage_usec 1234\nuser_usec 1000\nsystem_usec 234\n"), Some(1234));
        for text in ["", "user_usec 1\n", "usage_usec \n", "usage_usec x\n"] {
            assert_eq!(usage(text), None, "{text:?}");
        }
    }
}
