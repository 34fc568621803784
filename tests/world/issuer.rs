//! An issuer of tokens: its keys, its tokens, and its server of key sets, which does as it is told.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use crate::namespace::Namespace;

/// A request that does not come is not waited for longer.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(20);

/// One key of an issuer.
#[derive(Debug)]
pub struct Signer {
    kid: String,
    pair: EcdsaKeyPair,
}

impl Signer {
    /// A fresh key on P-256.
    ///
    /// # Panics
    /// Without random bytes.
    pub fn new(kid: &str) -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("random bytes");
        Self { kid: kid.to_owned(), pair }
    }

    fn public(&self) -> Value {
        let point = self.pair.public_key().as_ref();
        let (x, y) = (encoded(&point[1..33]), encoded(&point[33..]));
        json!({"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": self.kid, "use": "sig", "x": x, "y": y})
    }

    /// A token with these claims, signed.
    ///
    /// # Panics
    /// Without random bytes.
    pub fn token(&self, claims: &Value) -> String {
        let header = json!({"alg": "ES256", "typ": "JWT", "kid": self.kid});
        let signed =
            format!("{}.{}", encoded(header.to_string().as_bytes()), encoded(claims.to_string().as_bytes()));
        let signature = self.pair.sign(&SystemRandom::new(), signed.as_bytes()).expect("random bytes");
        format!("{signed}.{}", encoded(signature.as_ref()))
    }
}

fn encoded(bytes: &[u8]) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

/// The key set of these keys, in JSON.
pub fn key_set(signers: &[&Signer]) -> String {
    json!({"keys": signers.iter().map(|signer| signer.public()).collect::<Vec<_>>()}).to_string()
}

/// What a server of keys does with a request.
#[derive(Debug, Clone)]
pub enum Mode {
    /// Answers 200 with this text.
    Text(String),
    /// Leads elsewhere.
    Redirect(String),
    /// Says nothing until the mode changes.
    Silent,
}

/// A server of key sets.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    scheme: &'static str,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    mode: Mutex<Mode>,
    changed: Condvar,
    asked: AtomicUsize,
    is_down: AtomicBool,
    tls: Option<Arc<ServerConfig>>,
}

impl Server {
    /// Opens a port at an address of a namespace.
    ///
    /// # Panics
    /// If the address is not there.
    #[track_caller]
    pub fn start(inside: &Namespace, ip: IpAddr, mode: Mode) -> Self {
        Self::open(inside, SocketAddr::new(ip, 0), mode, None)
    }

    /// The same over TLS, with the certificate of a root.
    ///
    /// # Panics
    /// If the address is not there.
    #[track_caller]
    pub fn start_tls(inside: &Namespace, ip: IpAddr, mode: Mode, root: &Root) -> Self {
        Self::open(inside, SocketAddr::new(ip, 0), mode, Some(root.server(ip)))
    }

    #[track_caller]
    fn open(inside: &Namespace, at: SocketAddr, mode: Mode, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = inside.run(|| TcpListener::bind(at)).expect("the port is free");
        let address = listener.local_addr().expect("it is bound");
        let scheme = if tls.is_some() { "https" } else { "http" };
        let shared = Arc::new(Shared {
            mode: Mutex::new(mode),
            changed: Condvar::new(),
            asked: AtomicUsize::new(0),
            is_down: AtomicBool::new(false),
            tls,
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || serve(&listener, &serving));
        Self { address, scheme, shared }
    }

    /// A URL of it.
    pub fn url(&self, path: &str) -> String {
        format!("{}://{}{path}", self.scheme, self.address)
    }

    /// What it does with requests from here on, those that wait included.
    pub fn set(&self, mode: Mode) {
        *self.shared.mode() = mode;
        self.shared.changed.notify_all();
    }

    /// While it is down, connections are closed without a word.
    pub fn set_down(&self, is_down: bool) {
        self.shared.is_down.store(is_down, Ordering::SeqCst);
    }

    /// Connections that came so far.
    pub fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::SeqCst)
    }
}

impl Shared {
    fn mode(&self) -> MutexGuard<'_, Mode> {
        self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the server shall be silent.
    fn spoken(&self) -> Mode {
        let mut mode = self.mode();
        while matches!(*mode, Mode::Silent) {
            mode = self.changed.wait(mode).unwrap_or_else(PoisonError::into_inner);
        }
        mode.clone()
    }
}

fn serve(listener: &TcpListener, shared: &Arc<Shared>) {
    for stream in listener.incoming().flatten() {
        shared.asked.fetch_add(1, Ordering::SeqCst);
        if shared.is_down.load(Ordering::SeqCst) {
            continue;
        }
        let shared = Arc::clone(shared);
        // A client that has heard enough closes early.
        std::thread::spawn(move || drop(answer(stream, &shared)));
    }
}

fn answer(stream: TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_read_timeout(Some(REQUEST_TIME_MAX))?;
    match &shared.tls {
        None => exchange(stream, shared),
        Some(config) => {
            let connection = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
            exchange(StreamOwned::new(connection, stream), shared)
        }
    }
}

fn exchange(mut stream: impl Read + Write, shared: &Shared) -> io::Result<()> {
    let mut request = Vec::new();
    let mut piece = [0; 1024];
    while !request.ends_with(b"\r\n\r\n") {
        let read = stream.read(&mut piece)?;
        if read == 0 {
            return Ok(());
        }
        request.extend_from_slice(&piece[..read]);
    }
    let answer = match shared.spoken() {
        Mode::Text(text) => {
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}", text.len())
        }
        Mode::Redirect(to) => {
            format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        }
        Mode::Silent => return Ok(()),
    };
    stream.write_all(answer.as_bytes())?;
    stream.flush()
}

/// A root of certificates for servers of keys.
pub struct Root {
    certificate: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
}

impl Root {
    /// A fresh one.
    ///
    /// # Panics
    /// Without random bytes.
    #[expect(clippy::new_without_default, reason = "each is another")]
    pub fn new() -> Self {
        let key = rcgen::KeyPair::generate().expect("random bytes");
        let mut wanted = rcgen::CertificateParams::default();
        // A name of its own: roots are told apart by their names.
        wanted.distinguished_name.push(rcgen::DnType::CommonName, format!("root {:?}", key.public_key_raw()));
        wanted.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate =
            rcgen::CertifiedIssuer::self_signed(wanted, key).expect("the parameters are in order");
        Self { certificate }
    }

    /// In PEM.
    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    fn server(&self, ip: IpAddr) -> Arc<ServerConfig> {
        let key = rcgen::KeyPair::generate().expect("random bytes");
        let wanted = rcgen::CertificateParams::new(vec![ip.to_string()]).expect("an address is a name");
        let own = wanted.signed_by(&key, &self.certificate).expect("the parameters are in order");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let private = PrivateKeyDer::try_from(key.serialize_der()).expect("rcgen writes what rustls reads");
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider has suites for them")
            .with_no_client_auth()
            .with_single_cert(vec![own.der().clone()], private)
            .expect("key and certificate are of one make");
        Arc::new(config)
    }
}

impl std::fmt::Debug for Root {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Root").finish_non_exhaustive()
    }
}
