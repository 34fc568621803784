//! The configuration of `culvert-ca`: one YAML file, unknown keys refused.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use spiffe_id::TrustDomain;

/// Port of the authority that proxies of this field dial.
const LISTEN_DEFAULT: &str = "0.0.0.0:15012";

/// Lifetime of a workload's certificate that asks for none, in seconds: an hour bounds what a stolen key is worth, and
/// costs 3.5 % of one core for 250,000 identities.
const WORKLOAD_SECONDS_DEFAULT: u64 = 3600;

/// Longest lifetime of a workload's certificate, in seconds; longer requests get this.
pub(crate) const WORKLOAD_SECONDS_MAX: u64 = 86_400;

/// Lifetime of a node's certificate, in seconds: a day survives an outage of the authority over night.
const NODE_SECONDS_DEFAULT: u64 = 86_400;

/// Longest lifetime of a node's certificate, in seconds: below the third of the issuing key's life at which that key
/// is replaced, so that no certificate is cut short.
const NODE_SECONDS_MAX: u64 = 7 * 86_400;

/// Shortest configurable lifetime, in seconds. Renewal at half of it still leaves time for two attempts.
const SECONDS_MIN: u64 = 10;

/// Longest accepted configuration file, in bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// For whose names it signs.
    pub trust_domain: TrustDomain,
    /// Where it serves gRPC.
    pub listen: SocketAddr,
    /// Folder of root, issuing key and ledger (0700).
    pub state: PathBuf,
    /// The operator's unix socket (0600).
    pub admin_socket: PathBuf,
    /// Folder (or file) of YAML documents that say which identity runs on which node.
    pub registry: PathBuf,
    /// Lifetime of a workload's certificate where the request does not say.
    pub workload_lifetime: Duration,
    /// Lifetime of a node's certificate.
    pub node_lifetime: Duration,
    /// Make a new root although there was one before. Not in the file: `--init-new-root`, for one start.
    pub init_new_root: bool,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}; name the configuration file with --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is longer than 64 KiB.
    #[error("{path} has {bytes} bytes, a configuration has at most {FILE_BYTES_MAX}")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// The file is not YAML of the expected shape: a wrong type, or a key that does not exist.
    #[error("{path}: {problem}")]
    Shape {
        /// The file.
        path: PathBuf,
        /// Where and what, as the parser said it.
        problem: String,
    },
    /// A field has a value that is not allowed.
    #[error("{path}: {field} is {value:?}, expected {expected}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The key.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        expected: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Raw {
    trust_domain: String,
    listen: Option<String>,
    state: Option<PathBuf>,
    admin_socket: Option<PathBuf>,
    registry: Option<PathBuf>,
    workload_lifetime_seconds: Option<u64>,
    node_lifetime_seconds: Option<u64>,
}

impl Config {
    /// Reads a file. `root` prefixes the default paths; paths in the file are used as they stand.
    ///
    /// # Errors
    /// Names the file, the field, the value and what was expected.
    pub fn load(path: &Path, root: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let bytes = std::fs::metadata(path).map_err(read)?.len();
        if bytes > FILE_BYTES_MAX {
            return Err(ConfigError::TooLong { path: path.to_owned(), bytes });
        }
        Self::parse(&std::fs::read_to_string(path).map_err(read)?, path, root)
    }

    fn parse(text: &str, path: &Path, root: &Path) -> Result<Self, ConfigError> {
        let raw: Raw = serde_saphyr::from_str(text)
            .map_err(|error| ConfigError::Shape { path: path.to_owned(), problem: error.to_string() })?;
        let field = |field, value: String, expected: String| ConfigError::Field {
            path: path.to_owned(),
            field,
            value,
            expected,
        };
        let listen = raw.listen.unwrap_or_else(|| LISTEN_DEFAULT.to_owned());
        Ok(Self {
            trust_domain: raw.trust_domain.parse().map_err(|error| {
                field("trustDomain", raw.trust_domain, format!("a name such as cluster.local ({error})"))
            })?,
            listen: listen
                .parse()
                .map_err(|_| field("listen", listen, "an address and port such as 10.9.0.1:15012".into()))?,
            state: raw.state.unwrap_or_else(|| root.join("var/lib/culvert-ca")),
            admin_socket: raw.admin_socket.unwrap_or_else(|| Self::default_admin_socket(root)),
            registry: raw.registry.unwrap_or_else(|| root.join("etc/culvert/registry.d")),
            workload_lifetime: lifetime(
                raw.workload_lifetime_seconds.unwrap_or(WORKLOAD_SECONDS_DEFAULT),
                WORKLOAD_SECONDS_MAX,
            )
            .map_err(|(value, expected)| field("workloadLifetimeSeconds", value, expected))?,
            node_lifetime: lifetime(
                raw.node_lifetime_seconds.unwrap_or(NODE_SECONDS_DEFAULT),
                NODE_SECONDS_MAX,
            )
            .map_err(|(value, expected)| field("nodeLifetimeSeconds", value, expected))?,
            init_new_root: false,
        })
    }

    /// Where the configuration is if nobody says.
    pub fn default_path(root: &Path) -> PathBuf {
        root.join("etc/culvert/ca.yaml")
    }

    /// Where the operator's socket is if nobody says.
    pub fn default_admin_socket(root: &Path) -> PathBuf {
        root.join("run/culvert/ca.sock")
    }
}

fn lifetime(seconds: u64, seconds_max: u64) -> Result<Duration, (String, String)> {
    if (SECONDS_MIN..=seconds_max).contains(&seconds) {
        return Ok(Duration::from_secs(seconds));
    }
    Err((seconds.to_string(), format!("{SECONDS_MIN} to {seconds_max} seconds")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("ca.yaml"), Path::new("/r"))
    }

    #[track_caller]
    fn refused(text: &str, parts: &[&str]) {
        let message = parse(text).expect_err("a refused configuration").to_string();
        for part in parts {
            assert!(message.contains(part), "{message:?} does not say {part:?}");
        }
    }

    #[test]
    fn defaults_stand_beneath_the_root_folder() {
        let config = parse("trustDomain: cluster.local").expect("the shortest configuration");
        assert_eq!(config.listen.to_string(), "0.0.0.0:15012");
        assert_eq!(config.state, Path::new("/r/var/lib/culvert-ca"));
        assert_eq!(config.admin_socket, Path::new("/r/run/culvert/ca.sock"));
        assert_eq!(config.registry, Path::new("/r/etc/culvert/registry.d"));
        assert_eq!(config.workload_lifetime, Duration::from_secs(3600));
        assert_eq!(config.node_lifetime, Duration::from_secs(86_400));
        assert!(!config.init_new_root);
    }

    #[test]
    fn paths_in_the_file_are_used_as_they_stand() {
        let config =
            parse("{trustDomain: td, state: /s, adminSocket: a, registry: /g}").expect("a configuration");
        assert_eq!(
            (config.state, config.admin_socket, config.registry),
            ("/s".into(), "a".into(), "/g".into())
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        refused("listen: 127.0.0.1:1", &["ca.yaml", "trustDomain"]);
        refused("{trustDomain: td, trustDomian: td}", &["ca.yaml", "trustDomian"]);
        refused("{trustDomain: Td}", &["trustDomain is \"Td\"", "cluster.local", "'T'"]);
        refused("{trustDomain: td, listen: \"15012\"}", &["listen is \"15012\"", "10.9.0.1:15012"]);
        refused("{trustDomain: td, listen: ca:15012}", &["listen is \"ca:15012\""]);
        refused("{trustDomain: td, workloadLifetimeSeconds: soon}", &["workloadLifetimeSeconds"]);
        refused("{trustDomain: td, initNewRoot: true}", &["initNewRoot"]);
        refused("- a list", &["ca.yaml"]);
        refused("", &["ca.yaml"]);
    }

    #[test]
    fn a_file_above_the_limit_is_refused() {
        let path = std::env::temp_dir().join(format!("culvert-ca-config-{}.yaml", std::process::id()));
        let load = |bytes: u64| {
            let mut text = String::from("trustDomain: td\n#");
            text.push_str(&" ".repeat(usize::try_from(bytes).expect("small") - text.len()));
            std::fs::write(&path, text).expect("written");
            Config::load(&path, Path::new("/r"))
        };
        let (within, above) = (load(FILE_BYTES_MAX), load(FILE_BYTES_MAX + 1));
        std::fs::remove_file(&path).expect("removed");
        within.expect("at the limit");
        let error = above.expect_err("above the limit");
        assert!(
            matches!(error, ConfigError::TooLong { bytes, .. } if bytes == FILE_BYTES_MAX + 1),
            "{error}"
        );
    }

    #[test]
    fn the_limits_of_a_lifetime_are_exact() {
        for (key, max) in
            [("workloadLifetimeSeconds", WORKLOAD_SECONDS_MAX), ("nodeLifetimeSeconds", NODE_SECONDS_MAX)]
        {
            for seconds in [SECONDS_MIN, max] {
                parse(&format!("{{trustDomain: td, {key}: {seconds}}}")).expect("a lifetime at the limit");
            }
            for seconds in [0, SECONDS_MIN - 1, max + 1] {
                let text = format!("{{trustDomain: td, {key}: {seconds}}}");
                refused(&text, &[key, &format!("10 to {max} seconds")]);
            }
        }
    }
}
