//! Who asks: a node by its certificate. (A node without one presents a token, which `authorise::join` judges.)
//!
//! The path to the root was verified in the handshake; here the name is read, as strictly as it is written.

use ca_proto::refusal::{Reason, Refusal};
use rustls::pki_types::CertificateDer;
use spiffe_id::{NodeId, PeerName, TrustDomain};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

use crate::clock::Seconds;

/// A node that proved its name.
#[derive(Clone, Debug)]
pub(crate) struct NodePeer {
    node: NodeId,
    spki: Vec<u8>,
}

impl NodePeer {
    pub(crate) fn node(&self) -> &NodeId {
        &self.node
    }

    /// SubjectPublicKeyInfo of the certificate that it presented.
    pub(crate) fn spki(&self) -> &[u8] {
        &self.spki
    }
}

/// Reads a node's name from the leaf that the handshake verified; `None` if the client presented none.
///
/// # Errors
/// [`Reason::Stranger`] without a certificate or with one that expired during the connection, [`Reason::NotANode`] for a
/// certificate of anything else than a node of this trust domain.
pub(crate) fn node(
    leaf: Option<&CertificateDer<'_>>,
    trust_domain: &TrustDomain,
    now: Seconds,
) -> Result<NodePeer, Refusal> {
    let leaf = leaf.ok_or_else(|| stranger("no client certificate was presented"))?;
    let (_, certificate) =
        X509Certificate::from_der(leaf).map_err(|_| not_a_node("the certificate does not parse"))?;
    let expires = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
    if expires <= now.0 {
        return Err(stranger("the client certificate expired"));
    }
    let name = only_name(&certificate)?;
    let PeerName::Node(node) = name else {
        return Err(not_a_node(&format!("the certificate is that of {name}"))); // T-10
    };
    if node.trust_domain() != trust_domain {
        return Err(not_a_node(&format!(
            "the certificate is that of {node}, expected the trust domain {trust_domain}"
        )));
    }
    Ok(NodePeer { node, spki: certificate.public_key().raw.to_vec() })
}

/// The name of a certificate that has exactly one subject alternative name, which is a URI.
fn only_name(certificate: &X509Certificate<'_>) -> Result<PeerName, Refusal> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| not_a_node("the certificate's names do not parse"))?
        .map(|extension| &extension.value.general_names[..]);
    match names {
        Some([GeneralName::URI(uri)]) => PeerName::parse_uri(uri)
            .map_err(|error| not_a_node(&format!("the certificate's name is refused: {error}"))),
        Some(names) => {
            Err(not_a_node(&format!("the certificate has {} names, expected one URI", names.len())))
        }
        None => Err(not_a_node("the certificate has no name")),
    }
}

fn stranger(what: &str) -> Refusal {
    Refusal::new(Reason::Stranger, what)
}

fn not_a_node(what: &str) -> Refusal {
    Refusal::new(Reason::NotANode, format!("{what}; this call needs the certificate of a node"))
}
