//! Talks to the certificate authority as whoever one wants to be.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ca_proto::ca::node_agent_client::NodeAgentClient;
use ca_proto::ca::{JoinRequest, JoinResponse};
use ca_proto::istio::istio_certificate_service_client::IstioCertificateServiceClient;
use ca_proto::istio::{IstioCertificateRequest, IstioCertificateResponse};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::careless::Careless;
use super::credentials::Credentials;
use super::{STEP_SECONDS_MAX, provider, runtime};
use crate::namespace::Namespace;

/// A client of the CA that presents certain credentials, or none, and believes every server.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    /// Where its sockets are.
    pub inside: &'a Namespace,
    /// The CA.
    pub authority: SocketAddr,
    /// Presented, if any.
    pub credentials: Option<&'a Credentials>,
}

impl Client<'_> {
    /// Exchanges a token's secret for a node's certificate.
    ///
    /// # Errors
    /// The CA's refusal, or why the channel broke.
    pub fn join(&self, token: &[u8], node: &str, csr: Vec<u8>) -> Result<JoinResponse, Status> {
        let request = JoinRequest { token: token.to_vec(), node: node.to_owned(), csr };
        self.inside.run(|| {
            runtime().block_on(limited(async {
                let mut client = NodeAgentClient::new(self.channel().await?);
                client.join(request).await.map(tonic::Response::into_inner)
            }))
        })
    }

    /// Asks for a workload's certificate.
    ///
    /// # Errors
    /// The CA's refusal, or why the channel broke.
    pub fn create(&self, identity: &str, csr_pem: String) -> Result<IstioCertificateResponse, Status> {
        let request = request(identity, csr_pem);
        self.inside.run(|| {
            runtime().block_on(limited(async {
                let mut client = IstioCertificateServiceClient::new(self.channel().await?);
                client.create_certificate(request).await.map(tonic::Response::into_inner)
            }))
        })
    }

    async fn channel(&self) -> Result<Channel, Status> {
        let connector = TlsConnector::from(Arc::new(self.config()));
        let authority = self.authority;
        let dial = tower::service_fn(move |_| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(authority).await?;
                let stream = connector.connect(ServerName::from(authority.ip()), stream).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        Endpoint::from_static("http://authority")
            .connect_with_connector(dial)
            .await
            .map_err(|error| Status::unavailable(format!("{error:?}")))
    }

    fn config(&self) -> ClientConfig {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider speaks TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Careless(provider())));
        let mut config = match self.credentials {
            Some(Credentials { chain, key }) => {
                builder.with_client_auth_cert(chain.clone(), key.clone_key()).expect("the key is usable")
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![ca_proto::ALPN.to_vec()];
        config.enable_sni = false;
        config
    }
}

/// The identity as it was given, sound or not.
fn request(identity: &str, csr: String) -> IstioCertificateRequest {
    use prost_types::value::Kind;
    let value = prost_types::Value { kind: Some(Kind::StringValue(identity.to_owned())) };
    let fields = [(ca_proto::convert::IMPERSONATED_IDENTITY.to_owned(), value)].into();
    IstioCertificateRequest { csr, validity_duration: 0, metadata: Some(prost_types::Struct { fields }) }
}

async fn limited<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(Duration::from_secs(STEP_SECONDS_MAX), call).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded("no answer")),
    }
}
