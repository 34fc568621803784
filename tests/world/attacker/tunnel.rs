//! Dials the tunnel port, or speaks TLS on a workload's own port as a sidecar does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Uri};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio_rustls::TlsConnector;

use super::careless::Careless;
use super::credentials::Credentials;
use super::{STEP_SECONDS_MAX, provider, runtime};
use crate::namespace::Namespace;

/// One attempt.
#[derive(Debug, Clone)]
pub struct Attempt<'a> {
    /// The tunnel port of the victim.
    pub to: SocketAddr,
    /// Where from, else the kernel's choice.
    pub from: Option<SocketAddr>,
    /// Presented, if any.
    pub credentials: Option<&'a Credentials>,
    /// `:authority` of the CONNECT.
    pub authority: String,
    /// More headers.
    pub headers: Vec<(&'a str, &'a str)>,
    /// Sent through the tunnel; an echo is read back.
    pub text: &'a str,
    /// ALPN.
    pub alpn: &'a [u8],
}

impl<'a> Attempt<'a> {
    /// CONNECT to an authority, over mutual TLS with a certificate.
    pub fn new(to: SocketAddr, credentials: Option<&'a Credentials>, authority: &str) -> Self {
        let authority = authority.to_owned();
        Self { to, from: None, credentials, authority, headers: Vec::new(), text: "ping", alpn: b"h2" }
    }

    /// From an address of the attacker's choice.
    pub fn from(mut self, from: SocketAddr) -> Self {
        self.from = Some(from);
        self
    }

    /// Runs it inside a namespace.
    pub fn run(&self, inside: &Namespace) -> Outcome {
        inside.run(|| runtime().block_on(limited(self.steps())))
    }

    /// TLS and the text, without a tunnel around it: `to` is the workload's own port.
    pub fn run_plainly(&self, inside: &Namespace) -> Outcome {
        inside.run(|| runtime().block_on(limited(self.plain_steps())))
    }

    async fn plain_steps(&self) -> Result<Outcome, Outcome> {
        let stream = self.dial().await.map_err(|error| Outcome::Refused(error.to_string()))?;
        let connector = TlsConnector::from(Arc::new(self.config()));
        let mut stream = connector.connect(ServerName::from(self.to.ip()), stream).await.map_err(closed)?;
        stream.write_all(self.text.as_bytes()).await.map_err(closed)?;
        let mut echoed = vec![0; self.text.len()];
        stream.read_exact(&mut echoed).await.map_err(closed)?;
        Ok(Outcome::Through(String::from_utf8_lossy(&echoed).into_owned()))
    }

    async fn steps(&self) -> Result<Outcome, Outcome> {
        let stream = self.dial().await.map_err(|error| Outcome::Refused(error.to_string()))?;
        let connector = TlsConnector::from(Arc::new(self.config()));
        let name = ServerName::from(self.to.ip());
        let stream = connector.connect(name, stream).await.map_err(closed)?;
        // In TLS 1.3 a server's refusal of the client's certificate arrives only here.
        let (sender, connection) = h2::client::handshake(stream).await.map_err(closed)?;
        let driven = tokio::spawn(connection);
        let mut sender = match sender.ready().await {
            Ok(sender) => sender,
            Err(error) => return Err(ended(error, driven).await),
        };
        let request = self.request();
        let (answer, mut out) = match sender.send_request(request, false) {
            Ok(sent) => sent,
            Err(error) => return Err(ended(error, driven).await),
        };
        let answer = match answer.await {
            Ok(answer) => answer,
            Err(error) => return Err(ended(error, driven).await),
        };
        let status = answer.status().as_u16();
        if status != 200 {
            return Ok(Outcome::Status(status));
        }
        out.send_data(Bytes::copy_from_slice(self.text.as_bytes()), true).map_err(closed)?;
        let mut body = answer.into_body();
        let mut echoed = Vec::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk.map_err(closed)?;
            let _ = body.flow_control().release_capacity(chunk.len());
            echoed.extend_from_slice(&chunk);
        }
        Ok(Outcome::Through(String::from_utf8_lossy(&echoed).into_owned()))
    }

    async fn dial(&self) -> std::io::Result<tokio::net::TcpStream> {
        let socket = if self.to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(from) = self.from {
            socket.bind(from)?;
        }
        socket.connect(self.to).await
    }

    fn config(&self) -> ClientConfig {
        let careless = Arc::new(Careless(provider()));
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider speaks TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(careless);
        let mut config = match self.credentials {
            Some(Credentials { chain, key }) => {
                builder.with_client_auth_cert(chain.clone(), key.clone_key()).expect("the key is usable")
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![self.alpn.to_vec()];
        config.enable_sni = false;
        config
    }

    fn request(&self) -> Request<()> {
        let uri = Uri::builder().authority(self.authority.as_str()).build().expect("an authority");
        let mut request = Request::builder().method(Method::CONNECT).uri(uri);
        for (name, value) in &self.headers {
            request = request.header(*name, *value);
        }
        request.body(()).expect("sound headers")
    }
}

async fn limited(steps: impl Future<Output = Result<Outcome, Outcome>>) -> Outcome {
    match tokio::time::timeout(Duration::from_secs(STEP_SECONDS_MAX), steps).await {
        Ok(outcome) => outcome.unwrap_or_else(|outcome| outcome),
        Err(_) => Outcome::Nothing,
    }
}

/// The connection's own error says more than the stream's.
async fn ended(error: h2::Error, driven: tokio::task::JoinHandle<Result<(), h2::Error>>) -> Outcome {
    match tokio::time::timeout(Duration::from_secs(1), driven).await {
        Ok(Ok(Err(cause))) => closed(cause),
        _ => closed(error),
    }
}

fn closed(error: impl std::error::Error) -> Outcome {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    Outcome::Closed(text)
}

/// How far it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The TCP connection was refused.
    Refused(String),
    /// TLS or HTTP/2 was ended by the other side, with what it said.
    Closed(String),
    /// The CONNECT was answered with a status other than 200.
    Status(u16),
    /// The tunnel opened; what came back through it.
    Through(String),
    /// Nothing happened within the time limit.
    Nothing,
}
