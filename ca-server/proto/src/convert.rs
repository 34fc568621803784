//! Wire -> domain: what passed here is well formed, and an error names the field.

use std::time::Duration;

use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use spiffe_id::{InvalidSpiffeId, NodeId, PeerName, SpiffeId};

use crate::ca::{JoinRequest, JoinResponse, NodeCertificate, RenewRequest, RenewResponse, WatchResponse};
use crate::istio::{IstioCertificateRequest, IstioCertificateResponse};
use crate::join_token::{SECRET_BYTES, TokenSecret};

/// Key of the metadata that names the workload for which a node asks.
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// Largest signing request in bytes, as PEM or DER. An RSA-8192 key with its signature takes 3 KiB.
pub const CSR_BYTES_MAX: usize = 16 * 1024;

/// Most certificates in a chain: a leaf and the six intermediates that webpki follows, with one to spare.
pub const CHAIN_MAX: usize = 8;

/// Most roots in a bundle: several trust domains in the middle of a rotation.
pub const ROOTS_MAX: usize = 32;

/// Why a message is not what its contract says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMessage {
    /// A required field is absent or empty.
    #[error("{field} is missing")]
    Missing {
        /// Name of the field as in the `.proto` file.
        field: &'static str,
    },
    /// A field has a wrong length.
    #[error("{field} has {found} {unit}, expected {expected}")]
    Length {
        /// Name of the field as in the `.proto` file.
        field: &'static str,
        /// Length found.
        found: usize,
        /// What is counted.
        unit: &'static str,
        /// Length expected.
        expected: String,
    },
    /// A field is not a name of the mesh.
    #[error("{field} is not a name of the mesh: {source}")]
    Name {
        /// Name of the field as in the `.proto` file.
        field: &'static str,
        /// What is wrong with it.
        source: InvalidSpiffeId,
    },
    /// A field is not PEM of the expected kind.
    #[error("{field} is not PEM, expected {expected}")]
    Pem {
        /// Name of the field as in the `.proto` file.
        field: &'static str,
        /// What was expected.
        expected: &'static str,
    },
}

/// A signing request within the size limit; nothing else about it is known yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CsrDer(Vec<u8>);

impl CsrDer {
    /// # Errors
    /// [`InvalidMessage::Missing`] if empty, [`InvalidMessage::Length`] above [`CSR_BYTES_MAX`].
    pub fn from_der(der: Vec<u8>) -> Result<Self, InvalidMessage> {
        within("csr", &der)?;
        Ok(Self(der))
    }

    /// # Errors
    /// As [`Self::from_der`], for the PEM text; [`InvalidMessage::Pem`] if it holds no "CERTIFICATE REQUEST".
    pub fn from_pem(pem: &str) -> Result<Self, InvalidMessage> {
        within("csr", pem.as_bytes())?;
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| InvalidMessage::Pem { field: "csr", expected: "one CERTIFICATE REQUEST" })?;
        Self::from_der(der.to_vec())
    }

    /// The DER of the PKCS#10 structure.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A node asks for its first certificate.
#[derive(Debug)]
pub struct Join {
    /// Proof that it may.
    pub secret: TokenSecret,
    /// Who it says it is.
    pub node: NodeId,
    /// The key to sign.
    pub csr: CsrDer,
}

impl TryFrom<JoinRequest> for Join {
    type Error = InvalidMessage;

    fn try_from(wire: JoinRequest) -> Result<Self, Self::Error> {
        let found = wire.token.len();
        let token = zeroize::Zeroizing::new(wire.token);
        let secret = TokenSecret::from_slice(&token).ok_or_else(|| InvalidMessage::Length {
            field: "token",
            found,
            unit: "bytes",
            expected: SECRET_BYTES.to_string(),
        })?;
        let node = wire.node.parse().map_err(|source| InvalidMessage::Name { field: "node", source })?;
        Ok(Self { secret, node, csr: CsrDer::from_der(wire.csr)? })
    }
}

/// A node asks for its next certificate.
#[derive(Debug)]
pub struct Renew {
    /// The new key to sign.
    pub csr: CsrDer,
}

impl TryFrom<RenewRequest> for Renew {
    type Error = InvalidMessage;

    fn try_from(wire: RenewRequest) -> Result<Self, Self::Error> {
        Ok(Self { csr: CsrDer::from_der(wire.csr)? })
    }
}

/// A node asks for a certificate of one of its workloads.
#[derive(Debug)]
pub struct CreateCertificate {
    /// The key to sign.
    pub csr: CsrDer,
    /// How long the certificate shall live; `None`: the authority's default.
    pub lifetime: Option<Duration>,
    /// For whom; `None` if the request does not say.
    pub identity: Option<PeerName>,
}

impl CreateCertificate {
    /// The request of a node for one of its workloads; `csr_pem` holds one "CERTIFICATE REQUEST".
    pub fn request(
        identity: &SpiffeId,
        csr_pem: String,
        lifetime: Option<Duration>,
    ) -> IstioCertificateRequest {
        let value = Value { kind: Some(Kind::StringValue(identity.to_string())) };
        IstioCertificateRequest {
            csr: csr_pem,
            validity_duration: lifetime.map_or(0, |l| i64::try_from(l.as_secs()).unwrap_or(i64::MAX)),
            metadata: Some(Struct { fields: [(IMPERSONATED_IDENTITY.to_owned(), value)].into() }),
        }
    }
}

impl TryFrom<IstioCertificateRequest> for CreateCertificate {
    type Error = InvalidMessage;

    fn try_from(wire: IstioCertificateRequest) -> Result<Self, Self::Error> {
        let lifetime = u64::try_from(wire.validity_duration).ok().filter(|seconds| *seconds > 0);
        let identity = impersonated(wire.metadata.as_ref())
            .map(PeerName::parse_uri)
            .transpose()
            .map_err(|source| InvalidMessage::Name { field: "metadata.ImpersonatedIdentity", source })?;
        Ok(Self { csr: CsrDer::from_pem(&wire.csr)?, lifetime: lifetime.map(Duration::from_secs), identity })
    }
}

/// A certificate as its owner receives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// The leaf first, then the intermediates towards the root. Never empty.
    pub chain: Vec<CertificateDer<'static>>,
    /// All roots that the authority names. Never empty.
    pub roots: Vec<CertificateDer<'static>>,
}

impl From<&Issued> for IstioCertificateResponse {
    /// One element for each certificate of the chain, then one with all roots.
    fn from(issued: &Issued) -> Self {
        let roots = issued.roots.iter().map(|root| certificate_pem(root)).collect::<String>();
        let chain = issued.chain.iter().map(|certificate| certificate_pem(certificate));
        Self { cert_chain: chain.chain([roots]).collect() }
    }
}

impl TryFrom<IstioCertificateResponse> for Issued {
    type Error = InvalidMessage;

    fn try_from(wire: IstioCertificateResponse) -> Result<Self, Self::Error> {
        const FIELD: &str = "cert_chain";
        let [chain @ .., roots] = &wire.cert_chain[..] else {
            return Err(InvalidMessage::Missing { field: FIELD });
        };
        let chain = chain.iter().map(|pem| match &certificates(FIELD, pem)?[..] {
            [certificate] => Ok(certificate.clone()),
            other => Err(InvalidMessage::Length {
                field: FIELD,
                found: other.len(),
                unit: "certificates in one element",
                expected: "1".into(),
            }),
        });
        checked(FIELD, chain.collect::<Result<_, _>>()?, FIELD, certificates(FIELD, roots)?)
    }
}

/// A node's own certificate as the node receives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedToNode {
    /// The certificate and the roots.
    pub issued: Issued,
    /// Version of the roots, to acknowledge on the `Watch` stream.
    pub bundle_version: u64,
}

impl From<&IssuedToNode> for NodeCertificate {
    fn from(node: &IssuedToNode) -> Self {
        let bytes = |list: &[CertificateDer<'_>]| list.iter().map(|der| der.to_vec()).collect();
        Self {
            chain: bytes(&node.issued.chain),
            bundle: bytes(&node.issued.roots),
            bundle_version: node.bundle_version,
        }
    }
}

impl TryFrom<Option<NodeCertificate>> for IssuedToNode {
    type Error = InvalidMessage;

    fn try_from(wire: Option<NodeCertificate>) -> Result<Self, Self::Error> {
        let wire = wire.ok_or(InvalidMessage::Missing { field: "certificate" })?;
        let (chain, roots) = (ders(wire.chain), ders(wire.bundle));
        let issued = checked("certificate.chain", chain, "certificate.bundle", roots)?;
        Ok(Self { issued, bundle_version: wire.bundle_version })
    }
}

impl TryFrom<JoinResponse> for IssuedToNode {
    type Error = InvalidMessage;

    fn try_from(wire: JoinResponse) -> Result<Self, Self::Error> {
        wire.certificate.try_into()
    }
}

impl TryFrom<RenewResponse> for IssuedToNode {
    type Error = InvalidMessage;

    fn try_from(wire: RenewResponse) -> Result<Self, Self::Error> {
        wire.certificate.try_into()
    }
}

/// What the authority tells a watching node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// These roots are to be used; acknowledge `version` once they are.
    Bundle {
        /// Version of the roots.
        version: u64,
        /// All roots. Never empty.
        roots: Vec<CertificateDer<'static>>,
    },
    /// Nothing changed.
    Heartbeat {
        /// Version of the roots that the node should hold.
        version: u64,
    },
}

impl TryFrom<WatchResponse> for Watched {
    type Error = InvalidMessage;

    fn try_from(wire: WatchResponse) -> Result<Self, Self::Error> {
        if wire.bundle.is_empty() {
            return Ok(Self::Heartbeat { version: wire.version });
        }
        let roots = counted("bundle", ders(wire.bundle), ROOTS_MAX)?;
        Ok(Self::Bundle { version: wire.version, roots })
    }
}

/// The PEM text of a certificate, with its last newline.
pub fn certificate_pem(der: &[u8]) -> String {
    use base64::Engine as _;
    const LINE: usize = 64; // RFC 7468, section 2
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::with_capacity(body.len() + body.len() / LINE + 64);
    pem.push_str("-----BEGIN CERTIFICATE-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(LINE));
        pem.push_str(line);
        pem.push('\n');
        rest = tail;
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

/// The identity in the metadata. Empty counts as absent; values that are no strings are someone else's.
fn impersonated(metadata: Option<&Struct>) -> Option<&str> {
    match &metadata?.fields.get(IMPERSONATED_IDENTITY)?.kind {
        Some(Kind::StringValue(text)) if !text.is_empty() => Some(text),
        _ => None,
    }
}

fn within(field: &'static str, bytes: &[u8]) -> Result<(), InvalidMessage> {
    match bytes.len() {
        0 => Err(InvalidMessage::Missing { field }),
        1..=CSR_BYTES_MAX => Ok(()),
        found => Err(InvalidMessage::Length {
            field,
            found,
            unit: "bytes",
            expected: format!("at most {CSR_BYTES_MAX}"),
        }),
    }
}

fn checked(
    chain_field: &'static str,
    chain: Vec<CertificateDer<'static>>,
    roots_field: &'static str,
    roots: Vec<CertificateDer<'static>>,
) -> Result<Issued, InvalidMessage> {
    Ok(Issued {
        chain: counted(chain_field, chain, CHAIN_MAX)?,
        roots: counted(roots_field, roots, ROOTS_MAX)?,
    })
}

fn counted<T>(field: &'static str, list: Vec<T>, count_max: usize) -> Result<Vec<T>, InvalidMessage> {
    match list.len() {
        0 => Err(InvalidMessage::Missing { field }),
        found if found > count_max => Err(InvalidMessage::Length {
            field,
            found,
            unit: "certificates",
            expected: format!("at most {count_max}"),
        }),
        _ => Ok(list),
    }
}

fn ders(list: Vec<Vec<u8>>) -> Vec<CertificateDer<'static>> {
    list.into_iter().map(CertificateDer::from).collect()
}

fn certificates(field: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, InvalidMessage> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| InvalidMessage::Pem { field, expected: "CERTIFICATE blocks" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn csr_pem(bytes: usize) -> String {
        certificate_pem(&vec![0x30; bytes]).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    }

    fn with_identity(value: Option<Kind>) -> IstioCertificateRequest {
        IstioCertificateRequest {
            csr: csr_pem(10),
            validity_duration: 0,
            metadata: Some(Struct {
                fields: [(IMPERSONATED_IDENTITY.to_owned(), Value { kind: value })].into(),
            }),
        }
    }

    #[test]
    fn a_request_for_a_workload_reads_back() {
        let id: SpiffeId = "spiffe://td/ns/a/sa/b".parse().expect("a name");
        let wire = CreateCertificate::request(&id, csr_pem(10), Some(Duration::from_secs(60)));
        let read = CreateCertificate::try_from(wire).expect("a request");
        assert_eq!(read.identity, Some(PeerName::Workload(id)));
        assert_eq!(read.lifetime, Some(Duration::from_secs(60)));
        assert_eq!(read.csr.as_bytes(), [0x30; 10]);
    }

    #[test]
    fn a_lifetime_of_nothing_or_less_means_the_default() {
        for seconds in [0, -1, i64::MIN] {
            let wire = IstioCertificateRequest { validity_duration: seconds, ..with_identity(None) };
            assert_eq!(CreateCertificate::try_from(wire).expect("a request").lifetime, None);
        }
    }

    #[test]
    fn metadata_of_other_people_is_tolerated() {
        for value in [None, Some(Kind::StringValue(String::new())), Some(Kind::NumberValue(1.0))] {
            assert_eq!(CreateCertificate::try_from(with_identity(value)).expect("a request").identity, None);
        }
    }

    #[test]
    fn a_malformed_identity_is_refused_by_field() {
        let wire = with_identity(Some(Kind::StringValue("spiffe://td/ns/a%2f/sa/b".into())));
        let error = CreateCertificate::try_from(wire).expect_err("not a name");
        assert!(error.to_string().starts_with("metadata.ImpersonatedIdentity is not a name"), "{error}");
    }

    #[test]
    fn the_limit_of_a_signing_request_is_exact() {
        CsrDer::from_der(vec![0; CSR_BYTES_MAX]).expect("the largest allowed");
        for result in
            [CsrDer::from_der(vec![0; CSR_BYTES_MAX + 1]), CsrDer::from_pem(&"x".repeat(CSR_BYTES_MAX + 1))]
        {
            assert!(matches!(result, Err(InvalidMessage::Length { field: "csr", .. })));
        }
        assert_eq!(CsrDer::from_der(vec![]), Err(InvalidMessage::Missing { field: "csr" }));
        assert!(matches!(CsrDer::from_pem("junk"), Err(InvalidMessage::Pem { field: "csr", .. })));
        assert!(matches!(CsrDer::from_pem(&certificate_pem(&[1])), Err(InvalidMessage::Pem { .. })));
    }

    #[test]
    fn a_join_with_a_short_secret_or_a_foreign_name_is_refused_by_field() {
        let wire =
            |token: usize, node: &str| JoinRequest { token: vec![1; token], node: node.into(), csr: vec![1] };
        Join::try_from(wire(32, "spiffe://td/culvert/node/a")).expect("a join");
        let error = Join::try_from(wire(31, "spiffe://td/culvert/node/a")).expect_err("a short secret");
        assert_eq!(error.to_string(), "token has 31 bytes, expected 32");
        for node in ["", "a", "spiffe://td/culvert/ca", "spiffe://td/ns/a/sa/b"] {
            let error = Join::try_from(wire(32, node)).expect_err("no node's name"); // T-10
            assert!(matches!(error, InvalidMessage::Name { field: "node", .. }));
        }
    }

    #[test]
    fn a_response_has_the_leaf_first_and_all_roots_in_its_last_element() {
        let der = |byte: u8| CertificateDer::from(vec![byte; 100]);
        let issued = Issued { chain: vec![der(1), der(2)], roots: vec![der(3), der(4)] };
        let wire = IstioCertificateResponse::from(&issued);
        assert_eq!(wire.cert_chain.len(), 3);
        assert_eq!(wire.cert_chain[2].matches("BEGIN").count(), 2);
        assert!(wire.cert_chain.iter().all(|pem| pem.ends_with("-----\n")));
        assert_eq!(Issued::try_from(wire).expect("a response"), issued);
    }

    #[test]
    fn a_response_that_breaks_its_contract_is_refused() {
        let one = certificate_pem(&[1; 9]);
        for chain in
            [vec![], vec![one.clone()], vec![one.clone(), String::new()], vec![one.repeat(2), one.clone()]]
        {
            Issued::try_from(IstioCertificateResponse { cert_chain: chain }).expect_err("not a chain");
        }
    }

    #[test]
    fn the_limits_of_chain_and_bundle_are_exact() {
        let one = certificate_pem(&[1; 9]);
        for (chain, roots, field) in [
            (CHAIN_MAX, ROOTS_MAX, None),
            (CHAIN_MAX + 1, 1, Some(("chain", CHAIN_MAX))),
            (1, ROOTS_MAX + 1, Some(("bundle", ROOTS_MAX))),
        ] {
            let expected = |named: &'static str| match field {
                None => Ok(()),
                Some((_, max)) => {
                    Err(format!("{named} has {} certificates, expected at most {max}", max + 1))
                }
            };
            let told = |result: Result<(), InvalidMessage>| result.map_err(|error| error.to_string());

            let mut cert_chain = vec![one.clone(); chain];
            cert_chain.push(one.repeat(roots));
            let issued = Issued::try_from(IstioCertificateResponse { cert_chain });
            assert_eq!(told(issued.map(drop)), expected("cert_chain"));

            let ders = |count| vec![vec![1; 9]; count];
            let node = NodeCertificate { chain: ders(chain), bundle: ders(roots), bundle_version: 1 };
            let node = IssuedToNode::try_from(Some(node)).map(drop);
            let named =
                field.map_or(
                    "",
                    |(name, _)| if name == "chain" { "certificate.chain" } else { "certificate.bundle" },
                );
            assert_eq!(told(node), expected(named));

            let watched = Watched::try_from(WatchResponse { version: 1, bundle: ders(roots) }).map(drop);
            assert_eq!(told(watched).is_ok(), roots <= ROOTS_MAX);
        }
    }

    #[test]
    fn an_empty_bundle_is_a_heartbeat() {
        let wire = WatchResponse { version: 3, bundle: vec![] };
        assert_eq!(Watched::try_from(wire), Ok(Watched::Heartbeat { version: 3 }));
        let wire = WatchResponse { version: 3, bundle: vec![vec![1]] };
        assert!(matches!(Watched::try_from(wire), Ok(Watched::Bundle { version: 3, .. })));
    }

    #[test]
    fn a_node_certificate_without_its_parts_is_refused_by_field() {
        let none = JoinResponse { certificate: None };
        assert_eq!(IssuedToNode::try_from(none), Err(InvalidMessage::Missing { field: "certificate" }));
        let empty = RenewResponse { certificate: Some(NodeCertificate::default()) };
        assert_eq!(
            IssuedToNode::try_from(empty),
            Err(InvalidMessage::Missing { field: "certificate.chain" })
        );
    }
}
