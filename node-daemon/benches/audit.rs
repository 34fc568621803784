//! What a record of the audit log costs, in CPU time: where it is decided, and where it is written.
//!
//! `cargo bench -p node-daemon --bench audit`

use std::{
    fs,
    io::{self, Write as _},
    sync::Arc,
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use node_core::workload::ObjectName;
use node_daemon::{
    audit::{self, verify::Question},
    certs::Seals,
    config::{AuditConfig, OnFull},
    telemetry::{Asked, Decision, Direction, Endpoint, Ends, Path, Sink, Verdict},
};
use tokio::runtime::Builder;

/// Decisions of one round: as many as wait at most, so that none is dropped.
const ROUND: u64 = 8_000;
const ROUNDS: u64 = 25;

fn main() -> io::Result<()> {
    let folder = std::env::temp_dir().join(format!("culvert-audit-bench-{}", std::process::id()));
    let config = AuditConfig {
        folder: folder.clone(),
        segment_bytes: 64 << 20,
        keep_segments: 16,
        checkpoint_records: 1_024,
        checkpoint: Duration::from_secs(10),
        on_full: OnFull::Drop,
    };
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let node = "spiffe://cluster.local/culvert/node/node-a".parse().map_err(io::Error::other)?;
    let (off, on) = (Sink::new(), Sink::new());
    // Nobody signs: a signature takes some 30 us, one for a thousand records.
    let handle = audit::start(&config, &node, Seals::new(|| None), false, &on).map_err(io::Error::other)?;
    on.judging_by(3, || "0".repeat(64));
    let (mut without, mut with) = (Duration::ZERO, Duration::ZERO);
    let before = cpu(ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
    for _ in 0..ROUNDS {
        without += decide(&off)?;
        with += decide(&on)?;
        // Until the writer has taken them: it sleeps when nothing is left.
        drain()?;
    }
    runtime.block_on(handle.stop());
    let all = cpu(ClockId::CLOCK_PROCESS_CPUTIME_ID)? - before;
    let own = cpu(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    let decided = u128::from(ROUND * ROUNDS);
    let report = audit::verify::verify(&folder, &Question::default()).map_err(io::Error::other)?.report;
    // On a busy machine some find no place; they cost nothing here.
    let written = u128::from(report.decisions.max(1));
    let bytes: u64 = fs::read_dir(&folder)?
        .map(|entry| entry?.metadata().map(|file| file.len()))
        .sum::<io::Result<u64>>()?;
    fs::remove_dir_all(&folder)?;
    let mut out = io::stdout();
    writeln!(out, "decided, no audit log   {:>6} ns", without.as_nanos() / decided)?;
    writeln!(out, "decided and queued      {:>6} ns", with.as_nanos() / decided)?;
    writeln!(out, "written by the thread   {:>6} ns", all.saturating_sub(own).as_nanos() / written)?;
    writeln!(out, "written, of decided     {written:>6} of {decided}")?;
    writeln!(out, "bytes of a record       {:>6}", u128::from(bytes) / written)
}

/// One round of decisions: the CPU time of this thread.
fn decide(events: &Sink) -> io::Result<Duration> {
    let ends = Arc::new(ends());
    let (policy, rule): (Arc<str>, Arc<str>) = ("AuthorizationPolicy/photo/db".into(), "rules[0]".into());
    let path = "/albums/7".parse().ok();
    let before = cpu(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    for _ in 0..ROUND {
        let decided = events.decide(|| Decision {
            ends: Arc::clone(&ends),
            request: Some(Asked {
                protocol: "http/1.1",
                method: http::Method::GET,
                path: Clone::clone(&path),
            }),
            verdict: Verdict::Allowed,
            policy: Some(Arc::clone(&policy)),
            rule: Some(Arc::clone(&rule)),
            reason: None,
            shadow: None,
            audit: None,
            snapshot: 3,
        });
        decided.map_err(io::Error::other)?;
    }
    Ok(cpu(ClockId::CLOCK_THREAD_CPUTIME_ID)? - before)
}

fn ends() -> Ends {
    let end = |account: &str, address: &str| Endpoint {
        address: address.parse().ok(),
        workload: Some(ObjectName::new("photo", account)),
        identity: format!("spiffe://cluster.local/ns/photo/sa/{account}").parse().ok(),
        node: None,
    };
    Ends {
        connection: 7,
        direction: Direction::Inbound,
        path: Path::Tunnel,
        source: end("web", "10.8.1.4:40000"),
        destination: end("db", "10.8.2.4:80"),
        service: Some(ObjectName::new("photo", "db")),
        protocol: "http",
        mutual_tls: true,
    }
}

fn cpu(clock: ClockId) -> io::Result<Duration> {
    Ok(clock_gettime(clock)?.into())
}

/// The process's CPU time stands still when nothing is left to write.
fn drain() -> io::Result<()> {
    let mut seen = cpu(ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
    loop {
        std::thread::sleep(Duration::from_millis(5));
        let now = cpu(ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
        if now - seen < Duration::from_micros(200) {
            return Ok(());
        }
        seen = now;
    }
}
