//! Lines: one for an event, JSON or text, on stdout.
//!
//! Access-log lines have the target `access`, other events `event`; what rooms say beside events (`debug!`) has their
//! module as target.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    io::{self, Write},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tracing::{
    Subscriber, debug, error,
    field::{Field, Visit},
    info, warn,
};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, MakeWriter,
        format::{FormatEvent, FormatFields, Writer},
    },
    registry::LookupSpan,
};

use super::event::{ConnectionRecord, Ends, Event, RequestRecord};

/// Lines that wait for stdout: 2 s of a node that ends 4,000 connections a second, 1 KiB each. At the limit a line is
/// left out and counted ([`Lines::lost`]); a reader that hangs does not stop connections.
pub const LINES_WAITING_MAX: usize = 8_192;

/// For how long lines that follow closely are gathered: 200 wake-ups a second at most. It is how much later than its event such
/// a line may be seen, and what a killed daemon may leave unsaid.
const GATHER_TIME: Duration = Duration::from_millis(5);

/// Bytes that are written at once: 200 MiB a second, more than any reader takes. At the limit the rest waits its turn.
const GATHERED_BYTES_MAX: usize = 1024 * 1024;

/// How a line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Json,
    Text,
}

impl LogFormat {
    pub const fn label(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Text => "text",
        }
    }
}

impl FromStr for LogFormat {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "json" => Ok(Self::Json),
            "text" => Ok(Self::Text),
            _ => Err(()),
        }
    }
}

/// A subscriber that writes lines of `format` to `writer`; `filter` is a level or a list of `target=level`.
pub fn subscriber<W>(format: LogFormat, filter: EnvFilter, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_env_filter(filter)
        .with_writer(writer)
        .event_format(Format(format))
        .finish()
}

/// Writes the line of one event.
pub(super) fn write(event: &Event) {
    match event {
        Event::DaemonStarting { node, version, configuration } => {
            info!(target: "event", %node, version, configuration, "daemon starting");
        }
        Event::Readiness { ready: true, .. } => info!(target: "event", "ready"),
        Event::Readiness { ready: false, missing } => {
            info!(target: "event", missing = missing.join("; "), "not ready");
        }
        Event::DaemonDraining { cause, seconds } => info!(target: "event", cause, seconds, "daemon draining"),
        Event::DaemonStopped { cause } => info!(target: "event", cause, "daemon stopped"),
        Event::WorkloadEnrolled { workload, identity } => {
            info!(target: "event", %workload, %identity, "workload enrolled");
        }
        Event::WorkloadRefused { workload, reason, problem } => {
            warn!(target: "event", %workload, reason, problem, "workload refused");
        }
        Event::WorkloadLeft { workload, cause } => info!(target: "event", %workload, cause, "workload left"),
        Event::WorkloadRepaired { workload, what } => {
            warn!(target: "event", %workload, what, "workload repaired")
        }
        Event::UnmeshedConnections { workload, destroyed, remaining } => {
            info!(target: "event", %workload, destroyed, remaining, "unmeshed connections");
        }
        Event::NodeJoined { node } => info!(target: "event", node, "node joined"),
        Event::AuthorityFailed { call, problem, retry } => {
            warn!(target: "event", call, problem, retry_ms = milliseconds(*retry), "authority failed");
        }
        Event::RuleFilesRead { rule } => info!(target: "event", rule, "files of a rule read"),
        Event::TrustChanged { roots } => info!(target: "event", roots, "trust changed"),
        Event::CertificateIssued { identity, serial, not_after, generation } => {
            let not_after = rfc3339(*not_after);
            info!(target: "event", identity, serial, not_after, generation, "certificate issued");
        }
        Event::CertificateRenewalFailed { identity, failures, problem, retry } => {
            let retry_ms = milliseconds(*retry);
            warn!(target: "event", identity, failures, problem, retry_ms, "certificate renewal failed");
        }
        Event::CertificateExpired { identity } => error!(target: "event", identity, "certificate expired"),
        Event::CertificateDropped { identity } => info!(target: "event", identity, "certificate dropped"),
        Event::SnapshotPublished { number, local, problems } => {
            info!(target: "event", number, local, problems, "snapshot published");
        }
        Event::DocumentRefused { file, object, field, problem } => {
            warn!(target: "event", file, object, field, problem, "document refused");
        }
        Event::FileUnreadable { file, problem, effect } => {
            warn!(target: "event", file, problem, effect, "file unreadable");
        }
        Event::KernelFailed { call, problem } => error!(target: "event", call, problem, "kernel failed"),
        Event::DirectPath { on: true, .. } => info!(target: "event", "direct path on"),
        Event::DirectPath { on: false, problem } => {
            warn!(target: "event", problem, "direct path off");
        }
        Event::ShortcutOff { workload, problem } => {
            info!(target: "event", %workload, problem, "shortcut off");
        }
        Event::AcceptFailed { workload, listener, problem } => {
            error!(target: "event", %workload, listener, problem, "accept failed");
        }
        Event::LimitReached { limit, workload } => {
            let workload = workload.as_ref().map(tracing::field::display);
            warn!(target: "event", limit, workload, "limit reached");
        }
        Event::AuditOpened { folder, sequence, torn_bytes, clean: true } => {
            info!(target: "event", folder, sequence, torn_bytes, "audit opened");
        }
        Event::AuditOpened { folder, sequence, torn_bytes, clean: false } => {
            warn!(target: "event", folder, sequence, torn_bytes, "audit recovered");
        }
        Event::AuditCheckpoint { sequence, digest, segment } => {
            info!(target: "event", sequence, digest, segment, "audit checkpoint");
        }
        Event::AuditLost { records } => warn!(target: "event", records, "audit records lost"),
        Event::AuditFailed { call, problem, effect } => {
            error!(target: "event", call, problem, effect, "audit failed");
        }
        Event::ConnectionOpened(ends) => write_opened(ends),
        Event::ConnectionEnded(record) => write_ended(record),
        Event::RequestEnded(record) => write_request(record),
    }
}

fn write_opened(ends: &Ends) {
    debug!(
        target: "event",
        connection = ends.connection,
        direction = ends.direction.label(),
        path = ends.path.label(),
        "connection opened"
    );
}

fn write_ended(record: &ConnectionRecord) {
    let ends = &record.ends;
    let (source, destination, shadow) = (&ends.source, &ends.destination, record.shadow.as_ref());
    info!(
        target: "access",
        connection = ends.connection,
        direction = ends.direction.label(),
        path = ends.path.label(),
        source.address = source.address.map(|address| address.to_string()),
        source.workload = source.workload.as_ref().map(|workload| &*workload.name),
        source.namespace = source.workload.as_ref().map(|workload| &*workload.namespace),
        source.identity = source.identity.as_ref().map(tracing::field::display),
        source.node = source.node.as_deref(),
        destination.address = destination.address.map(|address| address.to_string()),
        destination.workload = destination.workload.as_ref().map(|workload| &*workload.name),
        destination.namespace = destination.workload.as_ref().map(|workload| &*workload.namespace),
        destination.identity = destination.identity.as_ref().map(tracing::field::display),
        destination.node = destination.node.as_deref(),
        service = ends.service.as_ref().map(tracing::field::display),
        protocol = ends.protocol,
        verdict = record.verdict.label(),
        policy = record.policy.as_deref(),
        rule = record.rule.as_deref(),
        reason = record.reason.map(|reason| reason.label()),
        detail = record.detail.as_deref(),
        shadow.verdict = shadow.map(|shadow| shadow.verdict.label()),
        shadow.policy = shadow.and_then(|shadow| shadow.policy.as_deref()),
        shadow.rule = shadow.and_then(|shadow| shadow.rule.as_deref()),
        audit = record.audit.as_deref(),
        tls.version = record.tls.as_ref().map(|tls| tls.version),
        tls.group = record.tls.as_ref().map(|tls| &*tls.group),
        tls.cipher = record.tls.as_ref().map(|tls| &*tls.cipher),
        tls.server_name = record.tls.as_ref().and_then(|tls| tls.server_name.as_deref()),
        bytes_in = record.bytes_in,
        bytes_out = record.bytes_out,
        duration_ms = milliseconds(record.duration),
        snapshot = record.snapshot,
    );
}

fn write_request(record: &RequestRecord) {
    let ends = &record.ends;
    let (source, destination, shadow) = (&ends.source, &ends.destination, record.shadow.as_ref());
    info!(
        target: "access",
        connection = ends.connection,
        direction = ends.direction.label(),
        path = ends.path.label(),
        source.address = source.address.map(|address| address.to_string()),
        source.workload = source.workload.as_ref().map(|workload| &*workload.name),
        source.namespace = source.workload.as_ref().map(|workload| &*workload.namespace),
        source.identity = source.identity.as_ref().map(tracing::field::display),
        source.node = source.node.as_deref(),
        destination.address = destination.address.map(|address| address.to_string()),
        destination.workload = destination.workload.as_ref().map(|workload| &*workload.name),
        destination.namespace = destination.workload.as_ref().map(|workload| &*workload.namespace),
        destination.identity = destination.identity.as_ref().map(tracing::field::display),
        destination.node = destination.node.as_deref(),
        service = ends.service.as_ref().map(tracing::field::display),
        protocol = record.protocol,
        method = record.method.as_str(),
        request_path = record.path.as_ref().map(http::uri::PathAndQuery::path),
        host = record.host.as_deref(),
        status = record.status,
        verdict = record.verdict.label(),
        policy = record.policy.as_deref(),
        rule = record.rule.as_deref(),
        reason = record.reason.map(|reason| reason.label()),
        detail = record.detail,
        shadow.verdict = shadow.map(|shadow| shadow.verdict.label()),
        shadow.policy = shadow.and_then(|shadow| shadow.policy.as_deref()),
        shadow.rule = shadow.and_then(|shadow| shadow.rule.as_deref()),
        audit = record.audit.as_deref(),
        duration_ms = milliseconds(record.duration),
        snapshot = record.snapshot,
    );
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A time as lines and views show it: RFC 3339, UTC, to the second's fraction that it has.
pub fn rfc3339(time: SystemTime) -> String {
    let nanoseconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    i128::try_from(nanoseconds)
        .ok()
        .and_then(|nanoseconds| OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).ok())
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_else(|| "unknown".to_owned())
}

/// Formats one line. Field names with a dot become nested objects in JSON.
struct Format(LogFormat);

impl<S, N> FormatEvent<S, N> for Format
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields(Vec::new());
        event.record(&mut fields);
        let head = [
            ("time", Value::from(rfc3339(SystemTime::now()))),
            ("level", Value::from(event.metadata().level().as_str().to_ascii_lowercase())),
            ("target", Value::from(event.metadata().target())),
        ];
        match self.0 {
            LogFormat::Json => json_line(&mut writer, head.into_iter().chain(fields.0)),
            LogFormat::Text => text_line(&mut writer, head.into_iter().chain(fields.0)),
        }
    }
}

fn json_line(writer: &mut Writer<'_>, fields: impl Iterator<Item = (&'static str, Value)>) -> fmt::Result {
    let mut line = Map::new();
    for (name, value) in fields {
        match name.split_once('.') {
            Some((outer, inner)) => {
                let nested = line.entry(outer).or_insert_with(|| Value::Object(Map::new()));
                if let Value::Object(nested) = nested {
                    nested.insert(inner.to_owned(), value);
                }
            }
            None => {
                line.insert(name.to_owned(), value);
            }
        }
    }
    writeln!(writer, "{}", Value::Object(line))
}

/// `time level target message key=value …`; a value with spaces, quotes or control characters is quoted and escaped, so
/// that no text from outside can begin a line or a field of its own.
fn text_line(writer: &mut Writer<'_>, fields: impl Iterator<Item = (&'static str, Value)>) -> fmt::Result {
    let mut tail = String::new();
    let mut head: BTreeMap<&str, String> = BTreeMap::new();
    for (name, value) in fields {
        let text = plain(&value).map_or_else(|| value.to_string(), str::to_owned);
        match name {
            "time" | "level" | "target" | "message" => {
                head.insert(name, text);
            }
            _ => write!(tail, " {name}={text}")?,
        }
    }
    let of = |name: &str| head.get(name).map_or("", |text| text.as_str());
    writeln!(writer, "{} {:5} {} {}{tail}", of("time"), of("level"), of("target"), of("message"))
}

/// The text, where it may stand without quotes.
fn plain(value: &Value) -> Option<&str> {
    value.as_str().filter(|text| !text.is_empty() && text.chars().all(is_plain))
}

fn is_plain(character: char) -> bool {
    character.is_ascii_graphic() && character != '"' && character != '\\'
}

struct Fields(Vec<(&'static str, Value)>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.push((field.name(), Value::from(format!("{value:?}"))));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.push((field.name(), Value::from(value)));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.push((field.name(), Value::from(value)));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.push((field.name(), Value::from(value)));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.push((field.name(), Value::from(value)));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.push((field.name(), Value::from(value)));
    }
}

/// Takes lines and writes them on a thread of its own.
#[derive(Clone, Debug)]
pub struct Lines {
    waiting: SyncSender<Vec<u8>>,
    lost: Arc<AtomicU64>,
}

/// The end of the log: when it is dropped, what still waits is written.
#[derive(Debug)]
pub struct LinesEnd {
    waiting: SyncSender<Vec<u8>>,
    thread: Option<JoinHandle<()>>,
}

impl Lines {
    /// Starts the thread that writes to `out`.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(out: impl Write + Send + 'static) -> io::Result<(Self, LinesEnd)> {
        Self::start_within(out, LINES_WAITING_MAX)
    }

    pub(super) fn start_within(
        out: impl Write + Send + 'static,
        lines_max: usize,
    ) -> io::Result<(Self, LinesEnd)> {
        let (waiting, lines) = sync_channel(lines_max);
        let thread = thread::Builder::new().name("log".to_owned()).spawn(move || write_lines(&lines, out))?;
        let end = LinesEnd { waiting: waiting.clone(), thread: Some(thread) };
        Ok((Self { waiting, lost: Arc::default() }, end))
    }

    /// Lines that were left out since the last call.
    pub fn lost(&self) -> u64 {
        self.lost.swap(0, Ordering::Relaxed)
    }
}

/// A line is written as it comes, and those that follow closely are gathered: waking this thread for each of thousands a
/// second would cost more than writing them.
fn write_lines(lines: &Receiver<Vec<u8>>, mut out: impl Write) {
    let mut gathered = Vec::new();
    let mut ended = false;
    while !ended && let Ok(line) = lines.recv() {
        gathered.extend_from_slice(&line);
        ended = line.is_empty();
        while !gathered.is_empty() {
            // Nobody is left to be told that stdout is gone.
            let _ = out.write_all(&gathered);
            gathered.clear();
            if !ended {
                thread::sleep(GATHER_TIME);
                ended = gather(lines, &mut gathered);
            }
        }
    }
    let _ = out.flush();
}

/// Takes what waits; true at the end. An empty line is the end: the format never makes one.
fn gather(lines: &Receiver<Vec<u8>>, gathered: &mut Vec<u8>) -> bool {
    while gathered.len() < GATHERED_BYTES_MAX
        && let Ok(line) = lines.try_recv()
    {
        if line.is_empty() {
            return true;
        }
        gathered.extend_from_slice(&line);
    }
    false
}

impl Drop for LinesEnd {
    fn drop(&mut self) {
        let _ = self.waiting.send(Vec::new());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl<'writer> MakeWriter<'writer> for Lines {
    type Writer = Self;

    fn make_writer(&'writer self) -> Self::Writer {
        self.clone()
    }
}

impl Write for Lines {
    /// The subscriber hands over whole lines.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Err(TrySendError::Full(_)) = self.waiting.try_send(line.to_vec()) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
