//! One key set from its server: a bounded GET, over TLS unless the operator allows otherwise (T-21).

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use node_core::policy::tokens::{InvalidKeySet, KeySource};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, lookup_host},
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;

use super::{KeysConfig, destination, keys::Keys};

/// Time for a fetch, from the name's resolution to the last byte, in seconds (policy A-13).
pub(super) const FETCH_SECONDS: u64 = 5;

/// Largest answer, in bytes (T-21).
pub(super) const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// An issuer's answer to discovery is used for so many seconds (policy A-13).
const DISCOVERY_SECONDS: u64 = 24 * 3_600;

/// Where distributions keep the system's roots; the first that is there counts.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Path of an issuer's configuration (OpenID Connect Discovery 1.0, section 4).
const DISCOVERY_PATH: &str = "/.well-known/openid-configuration";

/// Why the configured roots cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    #[error("jwks.roots: {}: cannot be read: {source}: name a file of certificates in PEM", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("jwks.roots: {}: found no usable certificate, expected certificates in PEM", path.display())]
    Empty { path: PathBuf },
}

/// Why there is no new key set. The text is for the log.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchFailed {
    #[error("the address is no http or https URL with a host")]
    Address,
    #[error("plain http is not fetched: write https, or set jwks.http in node.yaml")]
    PlainHttp,
    #[error("the name cannot be resolved: {0}")]
    Resolve(io::Error),
    #[error("{0}: list it under jwks.allow in node.yaml if it is meant")]
    Refused(&'static str),
    #[error("the system has no roots: set jwks.roots in node.yaml")]
    NoRoots,
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    #[error("HTTP: {0}")]
    Http(#[from] hyper::Error),
    #[error("the answer is {0}; redirects are not followed")]
    Status(StatusCode),
    #[error("the answer has more than {ANSWER_BYTES_MAX} bytes, or broke off: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("not whole within {FETCH_SECONDS} s")]
    TimedOut,
    #[error("the answer is no key set: {0}")]
    KeySet(#[from] InvalidKeySet),
    #[error("the answer is no text with a jwks_uri")]
    Discovery,
}

pub(super) struct Fetcher {
    config: KeysConfig,
    /// The system's roots are read when they are needed first.
    tls: OnceLock<Option<Arc<ClientConfig>>>,
}

impl Fetcher {
    pub(super) fn new(config: KeysConfig) -> Result<Self, RootsError> {
        let tls = OnceLock::new();
        if let Some(path) = &config.roots {
            let read = |source| RootsError::Read { path: path.clone(), source };
            let roots = roots(path).map_err(read)?.ok_or_else(|| RootsError::Empty { path: path.clone() })?;
            tls.get_or_init(|| Some(client(roots)));
        }
        Ok(Self { config, tls })
    }

    /// The keys of `source`. What discovery found is kept in `discovered`.
    pub(super) async fn keys(
        &self,
        source: &KeySource,
        discovered: &mut Option<(String, Instant)>,
    ) -> Result<Keys, FetchFailed> {
        let text = match source {
            KeySource::Inline(text) => text.to_string(),
            KeySource::Address(address) => self.get(address).await?,
            KeySource::Discovery(issuer) => {
                let fresh = Duration::from_secs(DISCOVERY_SECONDS);
                let known = discovered.as_ref().filter(|(_, at)| at.elapsed() < fresh);
                let address = match known {
                    Some((address, _)) => address.clone(),
                    None => self.discover(issuer).await?,
                };
                let text = self.get(&address).await.inspect_err(|_| *discovered = None)?;
                discovered.get_or_insert_with(|| (address, Instant::now()));
                text
            }
        };
        Ok(Keys::parse(&text)?)
    }

    async fn discover(&self, issuer: &str) -> Result<String, FetchFailed> {
        let issuer = issuer.strip_suffix('/').unwrap_or(issuer);
        let text = self.get(&format!("{issuer}{DISCOVERY_PATH}")).await?;
        let document: Value = serde_json::from_str(&text).map_err(|_| FetchFailed::Discovery)?;
        let address = document.get("jwks_uri").and_then(Value::as_str).ok_or(FetchFailed::Discovery)?;
        Ok(address.to_owned())
    }

    async fn get(&self, address: &str) -> Result<String, FetchFailed> {
        let within = Duration::from_secs(FETCH_SECONDS);
        timeout(within, self.get_unbounded(address)).await.unwrap_or(Err(FetchFailed::TimedOut))
    }

    async fn get_unbounded(&self, address: &str) -> Result<String, FetchFailed> {
        let uri: Uri = address.parse().map_err(|_| FetchFailed::Address)?;
        let host = uri.host().filter(|host| !host.is_empty()).ok_or(FetchFailed::Address)?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let (is_tls, usual) = match uri.scheme_str() {
            Some("https") => (true, 443),
            Some("http") if self.config.http => (false, 80),
            Some("http") => return Err(FetchFailed::PlainHttp),
            Some(_) | None => return Err(FetchFailed::Address),
        };
        let found =
            lookup_host((host, uri.port_u16().unwrap_or(usual))).await.map_err(FetchFailed::Resolve)?;
        let address = destination::choose(&self.config, found).map_err(FetchFailed::Refused)?;
        let stream = TcpStream::connect(address).await.map_err(FetchFailed::Connect)?;
        if !is_tls {
            return exchange(stream, &uri).await;
        }
        let name = ServerName::try_from(host.to_owned()).map_err(|_| FetchFailed::Address)?;
        let config = self.tls().ok_or(FetchFailed::NoRoots)?;
        let stream = TlsConnector::from(config).connect(name, stream).await.map_err(FetchFailed::Connect)?;
        exchange(stream, &uri).await
    }

    fn tls(&self) -> Option<Arc<ClientConfig>> {
        let system = || {
            let found = SYSTEM_ROOTS.iter().find_map(|path| roots(Path::new(path)).ok().flatten());
            found.map(client)
        };
        self.tls.get_or_init(system).clone()
    }
}

/// `None`: the file has no usable certificate.
fn roots(path: &Path) -> io::Result<Option<RootCertStore>> {
    let text = fs::read(path)?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&text).filter_map(Result::ok));
    Ok(Some(roots).filter(|roots| !roots.is_empty()))
}

fn client(roots: RootCertStore) -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider has suites for them");
    Arc::new(builder.with_root_certificates(roots).with_no_client_auth())
}

async fn exchange<I>(stream: I, uri: &Uri) -> Result<String, FetchFailed>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let host = uri.authority().map(http::uri::Authority::as_str).ok_or(FetchFailed::Address)?;
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let request = Request::get(path)
        .header(header::HOST, host.rsplit('@').next().unwrap_or(host))
        .header(header::ACCEPT, "application/json")
        .body(Empty::<Bytes>::new())
        .map_err(|_| FetchFailed::Address)?;
    let answer = async {
        let answer = sender.send_request(request).await?;
        if answer.status() != StatusCode::OK {
            return Err(FetchFailed::Status(answer.status()));
        }
        let whole = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok(whole.map_err(FetchFailed::Body)?.to_bytes())
    };
    tokio::pin!(answer, connection);
    let mut is_open = true;
    let bytes = loop {
        tokio::select! {
            biased;
            answer = &mut answer => break answer?,
            ended = &mut connection, if is_open => {
                ended?;
                is_open = false;
            }
        }
    };
    String::from_utf8(bytes.to_vec()).map_err(|_| FetchFailed::KeySet(InvalidKeySet::Shape))
}
