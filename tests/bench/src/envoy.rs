//! The peer: a pair of Envoy sidecars that do on layer 4 what the mesh does between nodes.
//!
//! Mutual TLS 1.3 with certificates that carry SPIFFE ids, each side comparing the other's; one line for a connection
//! in an access log. The application dials its own sidecar, so the redirection that a mesh adds is not even counted.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType};
use serde_json::{Value, json};
use world::{cgroup::Cgroup, pod::Pod, process::Process};

use crate::load::port;

/// Added to a service's port: where its sidecars listen.
pub const PORT_OFFSET: u16 = 10_000;

/// From start to listening.
const START_TIME_MAX: Duration = Duration::from_secs(20);

/// Between two attempts to connect while it starts.
const START_TURN: Duration = Duration::from_millis(20);

/// One sidecar.
#[derive(Debug)]
pub struct Sidecar {
    name: &'static str,
    program: PathBuf,
    configuration: PathBuf,
    lines: PathBuf,
    concurrency: usize,
    // Before the group: a group is removed when its processes have ended.
    process: Option<Process>,
    cgroup: Cgroup,
}

/// Makes the sidecars of a client and of its server; they are not started yet.
///
/// # Errors
/// If a file cannot be written.
pub fn pair(
    program: &Path,
    folder: &Path,
    client: &Pod,
    server: &Pod,
    concurrency: usize,
) -> Result<[Sidecar; 2]> {
    fs::create_dir_all(folder)?;
    let authority = Authority::new()?;
    let upstream = IpAddr::from(server.v4());
    let sides = [
        ("client", client, server.identity(), Ipv4Addr::LOCALHOST, upstream),
        ("server", server, client.identity(), Ipv4Addr::UNSPECIFIED, Ipv4Addr::LOCALHOST.into()),
    ];
    let made: [Result<Sidecar>; 2] = sides.map(|(name, pod, peer, listen, upstream)| {
        let keys = authority.issue(folder, name, &pod.identity())?;
        let lines = folder.join(format!("{name}.log"));
        let side = Side { is_client: name == "client", listen, upstream, peer, keys, lines: lines.clone() };
        let configuration = folder.join(format!("{name}.json"));
        fs::write(&configuration, side.bootstrap(folder).to_string())?;
        let cgroup = pod.node().cgroup().below(&format!("sidecar-{}", pod.name()))?;
        let program = program.to_owned();
        Ok(Sidecar { name, program, configuration, lines, concurrency, process: None, cgroup })
    });
    let [client, server] = made;
    Ok([client?, server?])
}

impl Sidecar {
    /// Starts it, a running one anew, and waits until it listens.
    ///
    /// # Errors
    /// If it does not come up in time.
    pub fn start(&mut self, pod: &Pod) -> Result<()> {
        self.process = None;
        let mut command = pod.namespace().command(&self.cgroup, &self.program);
        command
            .arg("--config-path")
            .arg(&self.configuration)
            .args(["--concurrency", &self.concurrency.to_string()])
            .args(["--disable-hot-restart", "--log-level", "warning"]);
        let mut process = Process::start(&format!("envoy {}", self.name), &mut command)?;
        let deadline = Instant::now() + START_TIME_MAX;
        let last = port::ALL[port::ALL.len() - 1] + PORT_OFFSET;
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, last));
        while pod.namespace().run(|| TcpStream::connect(at)).is_err() {
            ensure!(process.runs(), "envoy ended\n{}", process.log().tail());
            ensure!(Instant::now() < deadline, "envoy does not listen\n{}", process.log().tail());
            std::thread::park_timeout(START_TURN);
        }
        self.process = Some(process);
        Ok(())
    }

    /// The group of its process.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The file of its access log.
    pub fn lines(&self) -> &Path {
        &self.lines
    }
}

/// Signs the certificates of one pair.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// Files of one side.
struct Keys {
    certificate: PathBuf,
    key: PathBuf,
    root: PathBuf,
}

impl Authority {
    fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)? })
    }

    fn issue(&self, folder: &Path, name: &str, identity: &str) -> Result<Keys> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let keys = Keys {
            certificate: folder.join(format!("{name}.pem")),
            key: folder.join(format!("{name}.key")),
            root: folder.join("root.pem"),
        };
        fs::write(&keys.certificate, certificate.pem())?;
        fs::write(&keys.root, self.issuer.pem())?;
        write_key(&keys.key, &key.serialize_pem())?;
        Ok(keys)
    }
}

fn write_key(path: &Path, pem: &str) -> Result<()> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let file = fs::File::options().create_new(true).write(true).mode(0o600).open(path);
    file.with_context(|| path.display().to_string())?.write_all(pem.as_bytes())?;
    Ok(())
}

/// What the two sides differ in.
struct Side {
    is_client: bool,
    listen: Ipv4Addr,
    upstream: IpAddr,
    peer: String,
    keys: Keys,
    lines: PathBuf,
}

impl Side {
    fn bootstrap(&self, folder: &Path) -> Value {
        let listeners: Vec<Value> = port::ALL.iter().map(|port| self.listener(*port)).collect();
        let clusters: Vec<Value> = port::ALL.iter().map(|port| self.cluster(*port)).collect();
        json!({
            "node": {"id": if self.is_client { "client" } else { "server" }, "cluster": "bench"},
            "static_resources": {"listeners": listeners, "clusters": clusters},
            "application_log_config": {"log_format": {"text_format": "%v"}},
            "stats_flush_interval": "60s",
            "admin": {"address": {"pipe": {"path": folder.join(if self.is_client { "client.sock" } else { "server.sock" })}}},
        })
    }

    fn listener(&self, port: u16) -> Value {
        let mut chain = json!({"filters": [{
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": format!("p{port}"),
                "cluster": format!("p{port}"),
                "access_log": [self.access_log()],
            },
        }]});
        if !self.is_client {
            chain["transport_socket"] = json!({
                "name": "envoy.transport_sockets.tls",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                    "require_client_certificate": true,
                    "common_tls_context": self.tls(),
                },
            });
        }
        json!({
            "name": format!("p{port}"),
            "address": address(self.listen.into(), port + PORT_OFFSET),
            "filter_chains": [chain],
        })
    }

    fn cluster(&self, port: u16) -> Value {
        let offset = if self.is_client { PORT_OFFSET } else { 0 };
        let mut cluster = json!({
            "name": format!("p{port}"),
            "type": "STATIC",
            "connect_timeout": "10s",
            // The defaults of the circuit breaker would stop at 1,024 connections.
            "circuit_breakers": {"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000}]},
            "load_assignment": {
                "cluster_name": format!("p{port}"),
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(self.upstream, port + offset)}}]}],
            },
        });
        if self.is_client {
            cluster["transport_socket"] = json!({
                "name": "envoy.transport_sockets.tls",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                    "common_tls_context": self.tls(),
                },
            });
        }
        cluster
    }

    fn tls(&self) -> Value {
        json!({
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
                "ecdh_curves": ["X25519MLKEM768", "X25519"],
            },
            "tls_certificates": [{
                "certificate_chain": {"filename": self.keys.certificate},
                "private_key": {"filename": self.keys.key},
            }],
            "validation_context": {
                "trusted_ca": {"filename": self.keys.root},
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": self.peer}}],
            },
        })
    }

    fn access_log(&self) -> Value {
        json!({
            "name": "envoy.access_loggers.file",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                "path": self.lines,
                "log_format": {"json_format": {
                    "time": "%START_TIME%",
                    "source": "%DOWNSTREAM_REMOTE_ADDRESS%",
                    "destination": "%UPSTREAM_HOST%",
                    "peer": if self.is_client { "%UPSTREAM_PEER_URI_SAN%" } else { "%DOWNSTREAM_PEER_URI_SAN%" },
                    "flags": "%RESPONSE_FLAGS%",
                    "bytes_in": "%BYTES_RECEIVED%",
                    "bytes_out": "%BYTES_SENT%",
                    "duration_ms": "%DURATION%",
                }},
            },
        })
    }
}

fn address(ip: IpAddr, port: u16) -> Value {
    json!({"socket_address": {"address": ip.to_string(), "port_value": port}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_side_asks_for_the_others_identity_and_only_the_right_side_of_the_wire_is_plain() {
        let keys = |name: &str| Keys { certificate: name.into(), key: name.into(), root: name.into() };
        for is_client in [true, false] {
            let peer = "spiffe://cluster.local/ns/bench/sa/peer".to_owned();
            let (listen, upstream) = (Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST.into());
            let side = Side { is_client, listen, upstream, peer, keys: keys("k"), lines: "l".into() };
            let (listener, cluster) = (side.listener(9001), side.cluster(9001));
            let downstream = &listener["filter_chains"][0]["transport_socket"]["typed_config"];
            let upstream = &cluster["transport_socket"]["typed_config"];
            assert_eq!(downstream.is_object(), !is_client);
            assert_eq!(upstream.is_object(), is_client);
            let tls = if is_client { upstream } else { downstream };
            let names = &tls["common_tls_context"]["validation_context"]["match_typed_subject_alt_names"];
            assert_eq!(names[0]["matcher"]["exact"], "spiffe://cluster.local/ns/bench/sa/peer");
        }
    }
}
