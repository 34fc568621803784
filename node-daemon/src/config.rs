//! One YAML file, over it the environment (`CULVERT_…`), over that the flags; unknown keys refused.
//!
//! A `Section` is a raw part of it: each key is taken out once, with its grammar, and what is left over is refused. A
//! leaf: knows no room. Refusals name field, value, what was expected and what to do.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::Args;
use ipnet::IpNet;
use serde_json::{Map, Value, json};
use spiffe_id::TrustDomain;
use tracing_subscriber::filter::{Directive, LevelFilter};

use crate::telemetry::log::LogFormat;

/// Largest configuration file, in bytes: a hundred times what all keys need.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Longest name of a node, in bytes: it stands in certificates, pin paths and cgroup names (RFC 1123 subdomain).
const NODE_NAME_BYTES_MAX: usize = 253;

/// Longest name of a namespace, in bytes (RFC 1123 label).
const NAMESPACE_BYTES_MAX: usize = 63;

/// Longest hold, in seconds: beyond it, applications have given up.
const HOLD_SECONDS_MAX: u64 = 300;

/// Longest drain, in seconds.
const DRAIN_SECONDS_MAX: u64 = 3_600;

/// Sizes of a segment of the audit log, in bytes: room for some records beside its two ends, and what tools still open.
const AUDIT_SEGMENT_BYTES: (u64, u64) = (1 << 18, 1 << 30);

/// Segments of the audit log that are kept: the one that is written and one before, and what a folder lists quickly.
const AUDIT_SEGMENTS: (u64, u64) = (2, 10_000);

/// Records, and seconds, between two checkpoints of the audit log. A signature takes some 30 us.
const AUDIT_CHECKPOINT_RECORDS: (u64, u64) = (1, 100_000);
const AUDIT_CHECKPOINT_SECONDS: (u64, u64) = (1, 3_600);

/// Most threads that run tasks.
const WORKERS_MAX: u64 = 256;

const DEFAULT_CONFIG: &str = "etc/culvert/node.yaml";
const DEFAULT_WORKLOADS: &str = "etc/culvert/mesh.d";
const DEFAULT_JOIN_TOKEN: &str = "etc/culvert/join-token";
const DEFAULT_BPFFS: &str = "/sys/fs/bpf";
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
const DEFAULT_METRICS_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15_020);
const DEFAULT_READY_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15_021);
const DEFAULT_HOLD_CERTIFICATE: Duration = Duration::from_secs(10);
const DEFAULT_HOLD_UNKNOWN_ADDRESS: Duration = Duration::from_secs(5);
const DEFAULT_HOLD_DEAD_PEER: Duration = Duration::from_secs(10);
const DEFAULT_DRAIN: Duration = Duration::from_secs(30);
const DEFAULT_AUDIT: &str = "var/lib/culvert/audit";
const DEFAULT_AUDIT_SEGMENT_BYTES: u64 = 64 << 20;
const DEFAULT_AUDIT_SEGMENTS: u64 = 16;
const DEFAULT_AUDIT_CHECKPOINT_RECORDS: u64 = 1_024;
const DEFAULT_AUDIT_CHECKPOINT_SECONDS: u64 = 10;

/// The whole configuration of a node's daemon, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub node: String,
    pub root: Root,
    /// Folder of YAML documents.
    pub workloads: PathBuf,
    /// cgroup2 folder under which all enrolled workloads of the node run; `None`: the cgroup2 mount.
    pub cgroup: Option<PathBuf>,
    pub bpffs: PathBuf,
    pub ca: CaConfig,
    pub metrics_listen: SocketAddr,
    pub ready_listen: SocketAddr,
    pub hold: HoldConfig,
    pub drain: Duration,
    /// Whether connections inside the node may skip the host's network stack.
    pub shortcut: bool,
    pub jwks: JwksConfig,
    /// By namespace: the folder beneath which its DestinationRules may name files (T-20).
    pub client_files: BTreeMap<String, PathBuf>,
    pub log: LogConfig,
    /// `None`: no audit log is kept.
    pub audit: Option<AuditConfig>,
    /// Threads that run tasks; `None`: one a processor.
    pub workers: Option<usize>,
}

/// Where the authority is and how to join.
#[derive(Clone, Debug, PartialEq)]
pub struct CaConfig {
    pub address: SocketAddr,
    pub trust_domain: TrustDomain,
    /// File of the one-time token; needed until the node has its certificate.
    pub join_token: PathBuf,
}

/// How long a connection is held before it is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldConfig {
    pub certificate: Duration,
    pub unknown_address: Duration,
    pub dead_peer: Duration,
}

/// Where the node may fetch key sets of tokens' issuers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JwksConfig {
    /// Addresses that are refused otherwise: loopback, link-local, this node's own, metadata services.
    pub allow: Vec<IpNet>,
    /// Whether plain http is fetched.
    pub http: bool,
    /// Roots in PEM; `None`: the system's.
    pub roots: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    pub format: LogFormat,
    /// A level, or a list such as `info,node_daemon::control=debug`.
    pub level: String,
}

/// The audit log. It is kept where the section stands, if only as `audit: {}`: it costs disk, and says who talks to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// Folder of the segments (0700).
    pub folder: PathBuf,
    /// Size at which a segment is followed by the next.
    pub segment_bytes: u64,
    /// Segments that are kept, the one that is written included. With `segment_bytes` this bounds the log.
    pub keep_segments: usize,
    /// A checkpoint is signed after so many records,
    pub checkpoint_records: u64,
    /// and so long after the first record that is not signed.
    pub checkpoint: Duration,
    pub on_full: OnFull,
}

/// What happens to a decision that the audit log has no place for: too many wait, or the disk is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFull {
    /// It stands, and the log says how many are missing.
    #[default]
    Drop,
    /// What would be allowed is denied: nothing passes that is not recorded.
    Deny,
}

impl OnFull {
    pub const fn label(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Deny => "deny",
        }
    }
}

impl FromStr for OnFull {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "drop" => Ok(Self::Drop),
            "deny" => Ok(Self::Deny),
            _ => Err(()),
        }
    }
}

/// The folder before `/etc/culvert`, `/var/lib/culvert` and `/run/culvert`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root(PathBuf);

impl Root {
    pub fn new(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    pub fn config(&self) -> PathBuf {
        self.0.join(DEFAULT_CONFIG)
    }

    /// What outlives a restart: keys, last good documents (0700).
    pub fn state(&self) -> PathBuf {
        self.0.join("var/lib/culvert")
    }

    /// Lock and admin socket (0700).
    pub fn runtime(&self) -> PathBuf {
        self.0.join("run/culvert")
    }

    pub fn admin_socket(&self) -> PathBuf {
        self.runtime().join("admin.sock")
    }
}

/// Which file, and what stands above it.
#[derive(Args, Clone, Debug, Default)]
pub struct Sources {
    /// The configuration file [default: ROOT/etc/culvert/node.yaml]
    #[arg(long, env = "CULVERT_CONFIG")]
    pub config: Option<PathBuf>,
    /// Folder before /etc/culvert, /var/lib/culvert and /run/culvert
    #[arg(long, env = "CULVERT_ROOT", default_value = "/")]
    pub root: PathBuf,
    #[command(flatten)]
    pub overrides: Overrides,
}

/// Every key of the file as a flag and an environment variable.
#[derive(Args, Clone, Debug, Default)]
pub struct Overrides {
    /// Name of this node
    #[arg(long, env = "CULVERT_NODE")]
    node: Option<String>,
    /// Folder of YAML documents
    #[arg(long, env = "CULVERT_WORKLOADS")]
    workloads: Option<String>,
    /// cgroup2 folder under which all enrolled workloads run
    #[arg(long, env = "CULVERT_CGROUP")]
    cgroup: Option<String>,
    /// Mount of the BPF file system
    #[arg(long, env = "CULVERT_BPFFS")]
    bpffs: Option<String>,
    /// Address and port of the CA
    #[arg(long, env = "CULVERT_CA_ADDRESS")]
    ca_address: Option<String>,
    /// Trust domain of the mesh
    #[arg(long, env = "CULVERT_CA_TRUST_DOMAIN")]
    ca_trust_domain: Option<String>,
    /// File of the join token
    #[arg(long, env = "CULVERT_CA_JOIN_TOKEN")]
    ca_join_token: Option<String>,
    /// Where /metrics is shown
    #[arg(long, env = "CULVERT_METRICS_LISTEN")]
    metrics_listen: Option<String>,
    /// Where /healthz/ready is shown
    #[arg(long, env = "CULVERT_READY_LISTEN")]
    ready_listen: Option<String>,
    /// Seconds to wait for a certificate
    #[arg(long, env = "CULVERT_HOLD_SECONDS_CERTIFICATE")]
    hold_seconds_certificate: Option<u64>,
    /// Seconds to wait for an unknown address of the mesh
    #[arg(long, env = "CULVERT_HOLD_SECONDS_UNKNOWN_ADDRESS")]
    hold_seconds_unknown_address: Option<u64>,
    /// Seconds to wait for the daemon of a peer's node
    #[arg(long, env = "CULVERT_HOLD_SECONDS_DEAD_PEER")]
    hold_seconds_dead_peer: Option<u64>,
    /// Seconds that standing connections get at the end
    #[arg(long, env = "CULVERT_DRAIN_SECONDS")]
    drain_seconds: Option<u64>,
    /// auto or off: whether connections inside the node skip the host's network stack
    #[arg(long, env = "CULVERT_SHORTCUT")]
    shortcut: Option<String>,
    /// json or text
    #[arg(long, env = "CULVERT_LOG_FORMAT")]
    log_format: Option<String>,
    /// Level, or a list of target=level
    #[arg(long, env = "CULVERT_LOG_LEVEL")]
    log_level: Option<String>,
    /// Threads that run tasks
    #[arg(long, env = "CULVERT_WORKERS")]
    workers: Option<u64>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: cannot be read: {source}: write the file, or name another by --config", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {problem}: mend the YAML", path.display())]
    Syntax { path: PathBuf, problem: String },
    #[error("{field}: found {value}, expected {expected}: {remedy}")]
    Invalid { field: String, value: String, expected: String, remedy: String },
}

impl Config {
    /// Reads the file and lays environment and flags over it.
    ///
    /// # Errors
    /// Names the file that cannot be read, or the first field that cannot be used.
    pub fn read(sources: &Sources) -> Result<Self, ConfigError> {
        let root = Root::new(&sources.root);
        let path = sources.config.clone().unwrap_or_else(|| root.config());
        let text = read_file(&path)?;
        Self::parse(&path, &text, root, &sources.overrides)
    }

    fn parse(path: &Path, text: &str, root: Root, overrides: &Overrides) -> Result<Self, ConfigError> {
        let mut top = Section::read(path, text)?;
        overrides.lay_over(&mut top)?;
        let config = Self {
            node: top.take("node", node_name)?.ok_or_else(|| {
                top.missing(
                    "node",
                    "the name of this node, as in spec.node of its workloads",
                    "add node: <name>",
                )
            })?,
            workloads: top.path("workloads")?.unwrap_or_else(|| root.0.join(DEFAULT_WORKLOADS)),
            cgroup: top.path("cgroup")?,
            bpffs: top.path("bpffs")?.unwrap_or_else(|| PathBuf::from(DEFAULT_BPFFS)),
            ca: CaConfig::parse(&mut top, &root)?,
            metrics_listen: top.parsed("metricsListen", ADDRESS)?.unwrap_or(DEFAULT_METRICS_LISTEN),
            ready_listen: top.parsed("readyListen", ADDRESS)?.unwrap_or(DEFAULT_READY_LISTEN),
            hold: HoldConfig::parse(&mut top)?,
            drain: top.seconds("drainSeconds", DRAIN_SECONDS_MAX)?.unwrap_or(DEFAULT_DRAIN),
            shortcut: top.take("shortcut", shortcut)?.unwrap_or(true),
            jwks: JwksConfig::parse(&mut top)?,
            client_files: client_files(&mut top)?,
            log: LogConfig::parse(&mut top)?,
            audit: AuditConfig::parse(&mut top, &root)?,
            workers: top
                .number("workers", 1, WORKERS_MAX)?
                .map(|workers| usize::try_from(workers).expect("at most 256")),
            root,
        };
        top.finish()?;
        if config.metrics_listen == config.ready_listen && config.ready_listen.port() != 0 {
            return Err(ConfigError::Invalid {
                field: "readyListen".to_owned(),
                value: config.ready_listen.to_string(),
                expected: "another address than metricsListen".to_owned(),
                remedy: "give one of the two another port".to_owned(),
            });
        }
        Ok(config)
    }

    /// The effective whole, defaults included. Holds no secret: those are in files that it only names.
    pub fn shown(&self) -> Value {
        json!({
            "node": self.node,
            "root": self.root.0,
            "workloads": self.workloads,
            "cgroup": self.cgroup,
            "bpffs": self.bpffs,
            "ca": {
                "address": self.ca.address.to_string(),
                "trustDomain": self.ca.trust_domain.to_string(),
                "joinToken": self.ca.join_token,
            },
            "metricsListen": self.metrics_listen.to_string(),
            "readyListen": self.ready_listen.to_string(),
            "holdSeconds": {
                "certificate": self.hold.certificate.as_secs(),
                "unknownAddress": self.hold.unknown_address.as_secs(),
                "deadPeer": self.hold.dead_peer.as_secs(),
            },
            "drainSeconds": self.drain.as_secs(),
            "shortcut": if self.shortcut { "auto" } else { "off" },
            "jwks": {"allow": self.jwks.allow, "http": self.jwks.http, "roots": self.jwks.roots},
            "clientFiles": self.client_files,
            "log": {"format": self.log.format.label(), "level": self.log.level},
            "audit": self.audit.as_ref().map(AuditConfig::shown),
            "workers": self.workers,
        })
    }
}

impl CaConfig {
    fn parse(top: &mut Section, root: &Root) -> Result<Self, ConfigError> {
        let mut section = top.section("ca")?;
        let config = Self {
            address: section.parsed("address", ADDRESS)?.ok_or_else(|| {
                section.missing("address", ADDRESS.expected, "add ca: {address: <ip:port of culvert-ca>}")
            })?,
            trust_domain: section
                .parsed("trustDomain", TRUST_DOMAIN)?
                .unwrap_or_else(|| DEFAULT_TRUST_DOMAIN.parse().expect("a valid name")),
            join_token: section.path("joinToken")?.unwrap_or_else(|| root.0.join(DEFAULT_JOIN_TOKEN)),
        };
        section.finish()?;
        Ok(config)
    }
}

impl HoldConfig {
    fn parse(top: &mut Section) -> Result<Self, ConfigError> {
        let mut section = top.section("holdSeconds")?;
        let mut seconds = |key, default| Ok(section.seconds(key, HOLD_SECONDS_MAX)?.unwrap_or(default));
        let config = Self {
            certificate: seconds("certificate", DEFAULT_HOLD_CERTIFICATE)?,
            unknown_address: seconds("unknownAddress", DEFAULT_HOLD_UNKNOWN_ADDRESS)?,
            dead_peer: seconds("deadPeer", DEFAULT_HOLD_DEAD_PEER)?,
        };
        section.finish()?;
        Ok(config)
    }
}

impl JwksConfig {
    fn parse(top: &mut Section) -> Result<Self, ConfigError> {
        let mut section = top.section("jwks")?;
        let config = Self {
            allow: section.take("allow", ranges)?.unwrap_or_default(),
            http: section.take("http", |value| value.as_bool().ok_or(BOOLEAN))?.unwrap_or_default(),
            roots: section.path("roots")?,
        };
        section.finish()?;
        Ok(config)
    }
}

/// `clientFiles: {<namespace>: <folder>}`
fn client_files(top: &mut Section) -> Result<BTreeMap<String, PathBuf>, ConfigError> {
    let mut section = top.section("clientFiles")?;
    let namespaces: Vec<String> = section.keys.keys().cloned().collect();
    let mut folders = BTreeMap::new();
    for namespace in namespaces {
        if !is_namespace(&namespace) {
            return Err(ConfigError::Invalid {
                field: section.field(&namespace),
                value: namespace,
                expected: "the name of a namespace: 1 to 63 of a-z, 0-9 and '-'".to_owned(),
                remedy: "write namespace: folder lines".to_owned(),
            });
        }
        if let Some(folder) = section.path(&namespace)? {
            folders.insert(namespace, folder);
        }
    }
    section.finish()?;
    Ok(folders)
}

fn is_namespace(text: &str) -> bool {
    (1..=NAMESPACE_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && !text.starts_with('-')
        && !text.ends_with('-')
}

impl LogConfig {
    fn parse(top: &mut Section) -> Result<Self, ConfigError> {
        let mut section = top.section("log")?;
        let config = Self {
            format: section.parsed("format", LOG_FORMAT)?.unwrap_or_default(),
            level: section.take("level", level)?.unwrap_or_else(|| "info".to_owned()),
        };
        section.finish()?;
        Ok(config)
    }
}

impl AuditConfig {
    fn parse(top: &mut Section, root: &Root) -> Result<Option<Self>, ConfigError> {
        if !top.keys.contains_key("audit") {
            return Ok(None);
        }
        let mut section = top.section("audit")?;
        let mut number =
            |key, (least, most), default| Ok(section.number(key, least, most)?.unwrap_or(default));
        let segment_bytes = number("segmentBytes", AUDIT_SEGMENT_BYTES, DEFAULT_AUDIT_SEGMENT_BYTES)?;
        let segments = number("keepSegments", AUDIT_SEGMENTS, DEFAULT_AUDIT_SEGMENTS)?;
        let checkpoint_records =
            number("checkpointRecords", AUDIT_CHECKPOINT_RECORDS, DEFAULT_AUDIT_CHECKPOINT_RECORDS)?;
        let seconds =
            number("checkpointSeconds", AUDIT_CHECKPOINT_SECONDS, DEFAULT_AUDIT_CHECKPOINT_SECONDS)?;
        let config = Self {
            folder: section.path("folder")?.unwrap_or_else(|| root.0.join(DEFAULT_AUDIT)),
            segment_bytes,
            keep_segments: usize::try_from(segments).expect("at most 10,000"),
            checkpoint_records,
            checkpoint: Duration::from_secs(seconds),
            on_full: section.parsed("onFull", ON_FULL)?.unwrap_or_default(),
        };
        section.finish()?;
        Ok(Some(config))
    }

    fn shown(&self) -> Value {
        json!({
            "folder": self.folder,
            "segmentBytes": self.segment_bytes,
            "keepSegments": self.keep_segments,
            "checkpointRecords": self.checkpoint_records,
            "checkpointSeconds": self.checkpoint.as_secs(),
            "onFull": self.on_full.label(),
        })
    }
}

impl Overrides {
    fn lay_over(&self, top: &mut Section) -> Result<(), ConfigError> {
        top.lay("node", self.node.clone());
        top.lay("workloads", self.workloads.clone());
        top.lay("cgroup", self.cgroup.clone());
        top.lay("bpffs", self.bpffs.clone());
        top.lay_in("ca", "address", self.ca_address.clone())?;
        top.lay_in("ca", "trustDomain", self.ca_trust_domain.clone())?;
        top.lay_in("ca", "joinToken", self.ca_join_token.clone())?;
        top.lay("metricsListen", self.metrics_listen.clone());
        top.lay("readyListen", self.ready_listen.clone());
        top.lay_in("holdSeconds", "certificate", self.hold_seconds_certificate)?;
        top.lay_in("holdSeconds", "unknownAddress", self.hold_seconds_unknown_address)?;
        top.lay_in("holdSeconds", "deadPeer", self.hold_seconds_dead_peer)?;
        top.lay("drainSeconds", self.drain_seconds);
        top.lay("shortcut", self.shortcut.clone());
        top.lay_in("log", "format", self.log_format.clone())?;
        top.lay_in("log", "level", self.log_level.clone())?;
        top.lay("workers", self.workers);
        Ok(())
    }
}

/// A grammar in words.
struct Grammar {
    expected: &'static str,
    remedy: &'static str,
}

const ADDRESS: Grammar = Grammar {
    expected: "an address and a port, such as 10.9.0.1:15012",
    remedy: "write an IP address, not a name",
};
const TRUST_DOMAIN: Grammar = Grammar {
    expected: "a trust domain of a-z, 0-9, '.', '-' and '_', such as cluster.local",
    remedy: "write the mesh's trust domain, as in the Mesh document",
};
const BOOLEAN: Grammar = Grammar { expected: "true or false", remedy: "choose one of the two" };
const RANGES: Grammar = Grammar {
    expected: "a list of addresses or ranges, such as [10.0.0.0/8, 127.0.0.1]",
    remedy: "write IP addresses or ranges, not names",
};
const LOG_FORMAT: Grammar = Grammar { expected: "json or text", remedy: "choose one of the two" };

const ON_FULL: Grammar = Grammar {
    expected: "drop or deny",
    remedy: "choose whether what is not recorded stands (drop) or is denied (deny)",
};

/// A raw part of the configuration.
struct Section {
    /// Dotted path of this part, empty at the top.
    at: String,
    keys: Map<String, Value>,
}

impl Section {
    fn read(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let value: Option<Value> = serde_saphyr::from_str(text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            problem: error.without_snippet().to_string(),
        })?;
        Self::of(String::new(), value.unwrap_or(Value::Null))
    }

    fn of(at: String, value: Value) -> Result<Self, ConfigError> {
        match value {
            Value::Object(keys) => Ok(Self { at, keys }),
            Value::Null => Ok(Self { at, keys: Map::new() }),
            other @ (Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => {
                Err(ConfigError::Invalid {
                    field: if at.is_empty() { "the file".to_owned() } else { at },
                    value: other.to_string(),
                    expected: "a map of keys".to_owned(),
                    remedy: "write key: value lines".to_owned(),
                })
            }
        }
    }

    fn section(&mut self, key: &str) -> Result<Self, ConfigError> {
        let value = self.keys.remove(key).unwrap_or(Value::Null);
        Self::of(self.field(key), value)
    }

    /// Takes a key; an explicit null is the same as no key.
    fn take<T>(
        &mut self,
        key: &str,
        grammar: impl FnOnce(&Value) -> Result<T, Grammar>,
    ) -> Result<Option<T>, ConfigError> {
        match self.keys.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                grammar(&value).map(Some).map_err(|grammar| self.invalid(key, value.to_string(), &grammar))
            }
        }
    }

    fn parsed<T: FromStr>(&mut self, key: &str, grammar: Grammar) -> Result<Option<T>, ConfigError> {
        self.take(key, |value| value.as_str().and_then(|text| text.parse().ok()).ok_or(grammar))
    }

    fn path(&mut self, key: &str) -> Result<Option<PathBuf>, ConfigError> {
        self.take(key, |value| {
            let path = value.as_str().map(PathBuf::from).filter(|path| path.is_absolute());
            path.ok_or(Grammar { expected: "an absolute path", remedy: "begin it with /" })
        })
    }

    fn number(&mut self, key: &str, least: u64, most: u64) -> Result<Option<u64>, ConfigError> {
        match self.keys.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64().filter(|number| (least..=most).contains(number)) {
                Some(number) => Ok(Some(number)),
                None => Err(ConfigError::Invalid {
                    field: self.field(key),
                    value: value.to_string(),
                    expected: format!("a whole number from {least} to {most}"),
                    remedy: "write such a number".to_owned(),
                }),
            },
        }
    }

    fn seconds(&mut self, key: &str, most: u64) -> Result<Option<Duration>, ConfigError> {
        Ok(self.number(key, 0, most)?.map(Duration::from_secs))
    }

    fn lay(&mut self, key: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.keys.insert(key.to_owned(), value.into());
        }
    }

    fn lay_in(&mut self, outer: &str, key: &str, value: Option<impl Into<Value>>) -> Result<(), ConfigError> {
        if let Some(value) = value {
            let mut section = self.section(outer)?;
            section.lay(key, Some(value));
            self.keys.insert(outer.to_owned(), Value::Object(section.keys));
        }
        Ok(())
    }

    fn finish(self) -> Result<(), ConfigError> {
        match self.keys.iter().next() {
            None => Ok(()),
            Some((key, value)) => Err(ConfigError::Invalid {
                field: self.field(key),
                value: value.to_string(),
                expected: "no such key".to_owned(),
                remedy: "remove it, or mend its spelling".to_owned(),
            }),
        }
    }

    fn missing(&self, key: &str, expected: &str, remedy: &str) -> ConfigError {
        ConfigError::Invalid {
            field: self.field(key),
            value: "nothing".to_owned(),
            expected: expected.to_owned(),
            remedy: remedy.to_owned(),
        }
    }

    fn invalid(&self, key: &str, value: String, grammar: &Grammar) -> ConfigError {
        ConfigError::Invalid {
            field: self.field(key),
            value,
            expected: grammar.expected.to_owned(),
            remedy: grammar.remedy.to_owned(),
        }
    }

    fn field(&self, key: &str) -> String {
        if self.at.is_empty() { key.to_owned() } else { format!("{}.{key}", self.at) }
    }
}

/// An address alone is a range of one.
fn ranges(value: &Value) -> Result<Vec<IpNet>, Grammar> {
    let range = |value: &Value| {
        let text = value.as_str()?;
        text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
    };
    let all = value.as_array().and_then(|list| list.iter().map(range).collect());
    all.ok_or(RANGES)
}

fn read_file(path: &Path) -> Result<String, ConfigError> {
    let read = |source| ConfigError::Read { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(read)?.len();
    if size > FILE_BYTES_MAX {
        return Err(read(io::Error::other(format!("{size} bytes are more than {FILE_BYTES_MAX}"))));
    }
    fs::read_to_string(path).map_err(read)
}

/// RFC 1123 subdomain: the name stands in certificates, folders and cgroups.
/// YAML reads a bare `off` as a word or as false, by its version.
fn shortcut(value: &Value) -> Result<bool, Grammar> {
    match value {
        Value::String(word) if word == "auto" => Ok(true),
        Value::String(word) if word == "off" => Ok(false),
        Value::Bool(false) => Ok(false),
        Value::Null
        | Value::Bool(true)
        | Value::Number(_)
        | Value::String(_)
        | Value::Array(_)
        | Value::Object(_) => Err(Grammar {
            expected: "auto or off",
            remedy: "write auto to skip the host's network stack where that is safe, off never to do so",
        }),
    }
}

fn node_name(value: &Value) -> Result<String, Grammar> {
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    };
    match value.as_str() {
        Some(name) if name.len() <= NODE_NAME_BYTES_MAX && name.split('.').all(is_label) => {
            Ok(name.to_owned())
        }
        Some(_) | None => Err(Grammar {
            expected: "1 to 253 of a-z, 0-9, '-' and '.', beginning and ending with a letter or digit",
            remedy: "write the node's name as in spec.node of its workloads",
        }),
    }
}

/// A part is a level, or a target and a level: a level with a typing error is no target that is left silent.
fn level(value: &Value) -> Result<String, Grammar> {
    let is_part = |part: &str| {
        let level = part.split_once('=').map_or(part, |(_, level)| level);
        level.parse::<LevelFilter>().is_ok() && part.parse::<Directive>().is_ok()
    };
    let is_filter = |text: &&str| text.split(',').all(is_part);
    value.as_str().filter(is_filter).map(str::to_owned).ok_or(Grammar {
        expected: "error, warn, info, debug, trace, or a list of target=level",
        remedy: "write a level such as info",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "node: node-a\nca: {address: '10.9.0.1:15012'}\n";

    fn parse(text: &str, overrides: &Overrides) -> Result<Config, ConfigError> {
        Config::parse(Path::new("node.yaml"), text, Root::new(Path::new("/r")), overrides)
    }

    #[track_caller]
    fn accepted(text: &str) -> Config {
        parse(text, &Overrides::default()).unwrap()
    }

    /// The refusal names `field` and holds `word`.
    #[track_caller]
    fn refused(text: &str, field: &str, word: &str) {
        let refusal = parse(text, &Overrides::default()).unwrap_err().to_string();
        assert!(refusal.starts_with(field), "{refusal}");
        assert!(refusal.contains(word), "{refusal}");
    }

    #[test]
    fn the_least_file_has_the_documented_defaults() {
        let config = accepted(LEAST);
        assert_eq!(config.workloads, Path::new("/r/etc/culvert/mesh.d"));
        assert_eq!(config.bpffs, Path::new("/sys/fs/bpf"));
        assert_eq!(config.metrics_listen.to_string(), "127.0.0.1:15020");
        assert_eq!(config.ready_listen.to_string(), "127.0.0.1:15021");
        assert_eq!(config.hold.certificate, Duration::from_secs(10));
        assert_eq!(config.hold.unknown_address, Duration::from_secs(5));
        assert_eq!(config.hold.dead_peer, Duration::from_secs(10));
        assert_eq!(config.drain, Duration::from_secs(30));
        assert_eq!(config.jwks, JwksConfig::default());
        assert!(config.client_files.is_empty(), "no namespace may name files");
        assert_eq!(config.log, LogConfig { format: LogFormat::Json, level: "info".to_owned() });
        assert_eq!(config.ca.trust_domain.to_string(), "cluster.local");
        assert_eq!(config.root.admin_socket(), Path::new("/r/run/culvert/admin.sock"));
    }

    #[test]
    fn an_audit_log_is_kept_where_its_section_stands() {
        assert_eq!(accepted(LEAST).audit, None);
        for text in ["audit: {}", "audit:"] {
            let audit = accepted(&format!("{LEAST}{text}\n")).audit.unwrap();
            assert_eq!(audit.folder, Path::new("/r/var/lib/culvert/audit"));
            assert_eq!((audit.segment_bytes, audit.keep_segments), (64 << 20, 16));
            assert_eq!((audit.checkpoint_records, audit.checkpoint.as_secs()), (1_024, 10));
            assert_eq!(audit.on_full, OnFull::Drop);
        }
        let text =
            "audit: {folder: /a, segmentBytes: 262144, keepSegments: 2, checkpointRecords: 1, onFull: deny}";
        let config = accepted(&format!("{LEAST}{text}\n"));
        assert_eq!(config.audit.as_ref().unwrap().on_full, OnFull::Deny);
        assert_eq!(config.shown()["audit"]["folder"], "/a");
    }

    #[test]
    fn the_file_of_the_example_folder_is_accepted() {
        accepted(include_str!("../../deploy/host/example/node.yaml"));
    }

    #[test]
    fn a_key_that_nobody_knows_is_refused_at_every_depth() {
        refused(&format!("{LEAST}nodes: 3\n"), "nodes: found 3", "no such key");
        refused("node: a\nca: {address: '1.2.3.4:5', tokn: x}\n", "ca.tokn: ", "spelling");
        refused(
            &format!("{LEAST}holdSeconds: {{certificat: 1}}\n"),
            "holdSeconds.certificat: ",
            "no such key",
        );
        refused(&format!("{LEAST}log: {{colour: red}}\n"), "log.colour: ", "no such key");
    }

    #[test]
    fn a_value_outside_its_grammar_is_refused_by_field() {
        let tail = |line: &str| format!("{LEAST}{line}\n");
        refused("ca: {address: '1.2.3.4:5'}\n", "node: found nothing", "add node");
        refused("node: ../a\nca: {address: '1.2.3.4:5'}\n", "node: found \"../a\"", "a-z");
        refused("node: A\nca: {address: '1.2.3.4:5'}\n", "node: ", "a-z");
        refused("node: a..b\nca: {address: '1.2.3.4:5'}\n", "node: ", "a-z");
        refused("node: 7\nca: {address: '1.2.3.4:5'}\n", "node: found 7", "a-z");
        refused("node: a\n", "ca.address: found nothing", "ip:port");
        refused("node: a\nca: {address: 'ca.local:5'}\n", "ca.address: found \"ca.local:5\"", "not a name");
        refused("node: a\nca: {address: '1.2.3.4'}\n", "ca.address: ", "a port");
        refused("node: a\nca: []\n", "ca: found []", "map");
        refused(
            "node: a\nca: {address: '1.2.3.4:5', trustDomain: 'A B'}\n",
            "ca.trustDomain: ",
            "trust domain",
        );
        refused(&tail("workloads: mesh.d"), "workloads: found \"mesh.d\"", "absolute");
        refused(&tail("cgroup: 5"), "cgroup: found 5", "absolute");
        refused(&tail("metricsListen: '15020'"), "metricsListen: ", "a port");
        refused(&tail("readyListen: '127.0.0.1:15020'"), "readyListen: ", "another address");
        refused(&tail("holdSeconds: {certificate: -1}"), "holdSeconds.certificate: found -1", "0 to 300");
        refused(&tail("holdSeconds: {deadPeer: 301}"), "holdSeconds.deadPeer: found 301", "0 to 300");
        refused(&tail("drainSeconds: 1.5"), "drainSeconds: found 1.5", "whole number");
        refused(&tail("log: {format: xml}"), "log.format: found \"xml\"", "json or text");
        refused(&tail("log: {level: 'a=b=c'}"), "log.level: ", "level");
        refused(&tail("log: {level: inof}"), "log.level: found \"inof\"", "level");
        refused(&tail("log: {level: 'info,'}"), "log.level: ", "level");
        refused(&tail("jwks: {allow: [host.example]}"), "jwks.allow: ", "not names");
        refused(&tail("jwks: {allow: 10.0.0.0/8}"), "jwks.allow: ", "a list");
        refused(&tail("jwks: {http: 1}"), "jwks.http: found 1", "true or false");
        refused(&tail("jwks: {roots: ca.pem}"), "jwks.roots: ", "absolute");
        refused(&tail("jwks: {redirects: true}"), "jwks.redirects: ", "no such key");
        refused(&tail("clientFiles: {photo: tls}"), "clientFiles.photo: ", "absolute"); // T-20
        refused(&tail("clientFiles: {Photo: /tls}"), "clientFiles.Photo: ", "name of a namespace");
        refused(&tail("clientFiles: {\"*\": /tls}"), "clientFiles.*: ", "name of a namespace");
        refused(&tail("clientFiles: [/tls]"), "clientFiles: ", "a map of keys");
        refused(&tail("audit: {folder: audit}"), "audit.folder: ", "absolute");
        refused(&tail("audit: {segmentBytes: 1000}"), "audit.segmentBytes: found 1000", "262144 to");
        refused(&tail("audit: {keepSegments: 1}"), "audit.keepSegments: found 1", "2 to 10000");
        refused(&tail("audit: {checkpointRecords: 0}"), "audit.checkpointRecords: ", "1 to 100000");
        refused(&tail("audit: {checkpointSeconds: 3601}"), "audit.checkpointSeconds: ", "1 to 3600");
        refused(&tail("audit: {onFull: block}"), "audit.onFull: found \"block\"", "drop or deny");
        refused(&tail("audit: {fsync: always}"), "audit.fsync: ", "no such key");
        refused(&tail("audit: true"), "audit: found true", "map");
        refused(&tail("workers: 0"), "workers: found 0", "1 to 256");
        refused(&tail("workers: 257"), "workers: found 257", "1 to 256");
        refused(&tail("drainSeconds: 3601"), "drainSeconds: found 3601", "0 to 3600");
        refused("- node\n", "the file: ", "map");
        refused("", "node: found nothing", "add node");
    }

    #[test]
    fn the_limits_of_numbers_and_names_are_exact() {
        for seconds in [0, HOLD_SECONDS_MAX] {
            let hold = accepted(&format!("{LEAST}holdSeconds: {{certificate: {seconds}}}\n")).hold;
            assert_eq!(hold.certificate, Duration::from_secs(seconds));
        }
        let drain = accepted(&format!("{LEAST}drainSeconds: {DRAIN_SECONDS_MAX}\n")).drain;
        assert_eq!(drain, Duration::from_secs(DRAIN_SECONDS_MAX));
        for workers in [1, WORKERS_MAX] {
            accepted(&format!("{LEAST}workers: {workers}\n"));
        }
        let named = |name: &str| format!("node: {name}\nca: {{address: '10.9.0.1:15012'}}\n");
        let longest = "n".repeat(NODE_NAME_BYTES_MAX);
        assert_eq!(accepted(&named(&longest)).node, longest);
        refused(&named(&format!("{longest}n")), "node: ", "a-z");
    }

    #[test]
    fn a_file_is_read_up_to_the_limit() {
        let path = std::env::temp_dir().join(format!("culvert-config-{}.yaml", std::process::id()));
        let of_length = |bytes: u64| {
            fs::write(&path, "#".repeat(usize::try_from(bytes).unwrap())).unwrap();
            read_file(&path).map(|text| text.len() as u64)
        };
        let (within, above) = (of_length(FILE_BYTES_MAX), of_length(FILE_BYTES_MAX + 1));
        fs::remove_file(&path).unwrap();
        assert_eq!(within.unwrap(), FILE_BYTES_MAX);
        assert!(above.unwrap_err().to_string().contains("65537 bytes are more than 65536"));
    }

    #[test]
    fn what_is_no_yaml_or_says_a_key_twice_is_refused_with_its_file_and_line() {
        refused("node: a\nnode: b\n", "node.yaml: ", "line 2");
        refused("node: [a\n", "node.yaml: ", "line");
    }

    #[test]
    fn a_flag_or_variable_stands_above_the_file() {
        let overrides = Overrides {
            node: Some("node-z".to_owned()),
            ca_address: Some("[fd00::1]:15012".to_owned()),
            hold_seconds_certificate: Some(3),
            log_format: Some("text".to_owned()),
            ..Overrides::default()
        };
        let config = parse(LEAST, &overrides).unwrap();
        assert_eq!(config.node, "node-z");
        assert_eq!(config.ca.address.to_string(), "[fd00::1]:15012");
        assert_eq!(config.hold.certificate, Duration::from_secs(3));
        assert_eq!(config.log.format, LogFormat::Text);
        accepted(&format!("{LEAST}log: {{level: 'info,node_daemon::control=debug'}}\n"));
        let overrides = Overrides { drain_seconds: Some(3_601), ..Overrides::default() };
        assert!(parse(LEAST, &overrides).unwrap_err().to_string().starts_with("drainSeconds: found 3601"));
    }

    #[test]
    fn the_effective_whole_names_the_token_s_file_and_no_more() {
        let text = "node: a\nca: {address: '1.2.3.4:5', joinToken: /etc/culvert/join-token}\n";
        let shown = accepted(text).shown();
        assert_eq!(shown["ca"]["joinToken"], "/etc/culvert/join-token");
        assert_eq!(shown["holdSeconds"]["deadPeer"], 10);
    }
}
