//! TLS that a client's rules ask for: to servers outside the mesh by roots of files, and mesh TLS to proxies of other kinds.
//!
//! The verifier judges chain and name within the handshake, before this side's certificate goes out (policy C, D-5).

use std::{collections::BTreeSet, sync::Arc};

use node_core::snapshot::Names;
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::verify_tls13_signature,
    pki_types::{CertificateDer, ServerName, UnixTime},
    version::TLS13,
};
use spiffe_id::SpiffeId;
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{
    files::Material,
    store::{ALPN_MESH, ALPN_TUNNEL, Credentials},
    verify::{NAMES_LISTED_MAX, PeerRefused, no_tls12, provider, tls13_only, why},
};

/// A name that TLS cannot carry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no name of a server: write a host name or an address in sni or host")]
pub struct NoServerName {
    pub name: String,
}

impl Material {
    /// For a server that proves `names`. HTTP/2 is offered where the application speaks it.
    ///
    /// # Errors
    /// The host is no name that a certificate can carry.
    pub fn client(&self, names: &Names, is_http2: bool) -> Result<Arc<ClientConfig>, NoServerName> {
        let expected = match names {
            Names::Host(name) => Expected::Host(server_name(name)?),
            Names::OneOf(names) => Expected::OneOf(names.clone()),
        };
        let verifier = Arc::new(OutsideServer { roots: Arc::clone(&self.roots), expected });
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has suites and groups of TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &self.shown {
            Some(shown) => {
                builder.with_client_cert_resolver(Arc::clone(shown) as Arc<dyn ResolvesClientCert>)
            }
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        if is_http2 {
            config.alpn_protocols = vec![ALPN_TUNNEL.to_vec()];
        }
        Ok(Arc::new(config))
    }
}

impl Credentials {
    /// Mesh TLS on a workload's own port, as a sidecar speaks it: ALPN `istio`, and a name is sent (policy C).
    pub fn mesh_client(&self, allowed: Arc<BTreeSet<SpiffeId>>, is_http2: bool) -> Arc<ClientConfig> {
        let mut config = ClientConfig::clone(&self.client(allowed));
        config.enable_sni = true;
        config.alpn_protocols = vec![ALPN_MESH.to_vec()];
        if is_http2 {
            config.alpn_protocols.push(ALPN_TUNNEL.to_vec());
        }
        Arc::new(config)
    }
}

/// The name to send; an address is compared, not sent.
///
/// # Errors
/// It is neither.
pub fn server_name(name: &str) -> Result<ServerName<'static>, NoServerName> {
    ServerName::try_from(name.to_owned()).map_err(|_| NoServerName { name: name.to_owned() })
}

/// Judges a server by roots of a file and a name.
#[derive(Debug)]
struct OutsideServer {
    roots: Arc<RootCertStore>,
    expected: Expected,
}

#[derive(Debug)]
enum Expected {
    Host(ServerName<'static>),
    OneOf(Vec<String>),
}

impl OutsideServer {
    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), PeerRefused> {
        let certificate =
            EndEntityCert::try_from(leaf).map_err(|_| PeerRefused::Malformed { what: "the leaf" })?;
        let algorithms = provider().signature_verification_algorithms.all;
        let usage = KeyUsage::server_auth();
        certificate
            .verify_for_usage(algorithms, &self.roots.roots, intermediates, now, usage, None, None)
            .map_err(|error| why(&error))?;
        match &self.expected {
            Expected::Host(name) => {
                let proven = certificate.verify_is_valid_for_subject_name(name);
                proven.map_err(|_| misnamed(leaf, name.to_str().into_owned()))
            }
            Expected::OneOf(names) if names_of(leaf).iter().any(|name| names.contains(name)) => Ok(()),
            Expected::OneOf(names) => Err(misnamed(leaf, some_of(names))),
        }
    }
}

fn misnamed(leaf: &CertificateDer<'_>, expected: String) -> PeerRefused {
    PeerRefused::Misnamed { found: some_of(&names_of(leaf)), expected }
}

fn some_of(names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMES_LISTED_MAX);
    let listed = names.iter().take(NAMES_LISTED_MAX).cloned().collect::<Vec<_>>().join(", ");
    match (listed.is_empty(), more) {
        (true, _) => "no name".to_owned(),
        (false, 0) => listed,
        (false, more) => format!("{listed} and {more} more"),
    }
}

/// What a certificate says of its holder: DNS, URI and address names, as they are written.
#[allow(clippy::wildcard_enum_match_arm, reason = "kinds of names that servers do not have")]
fn names_of(leaf: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(leaf) else { return Vec::new() };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let written = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) | GeneralName::URI(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match **bytes {
            [a, b, c, d] => Some(std::net::Ipv4Addr::new(a, b, c, d).to_string()),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| std::net::Ipv6Addr::from(bytes).to_string()),
        },
        _ => None,
    });
    written.collect()
}

impl ServerCertVerifier for OutsideServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    tls13_only!();
}
