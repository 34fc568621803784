use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::{InvalidSpiffeId, Piece, TrustDomain, URI_BYTES_MAX, segment};

const WORKLOAD_FORM: &str = "spiffe://<trust domain>/ns/<namespace>/sa/<service account>";
const NODE_FORM: &str = "spiffe://<trust domain>/culvert/node/<name>";
const CA_FORM: &str = "spiffe://<trust domain>/culvert/ca";
const ANY_FORM: &str = "spiffe://<trust domain>/ns/<namespace>/sa/<service account>, \
     spiffe://<trust domain>/culvert/node/<name> or spiffe://<trust domain>/culvert/ca";

/// Any name that a certificate of the mesh may carry.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerName {
    /// A workload.
    Workload(SpiffeId),
    /// A node's daemon.
    Node(NodeId),
    /// The certificate authority.
    Ca(CaId),
}

impl PeerName {
    /// Reads the URI of a certificate's subject alternative name.
    ///
    /// # Errors
    /// Names the piece that is wrong; [`InvalidSpiffeId::Path`] for a well-formed URI of another shape.
    pub fn parse_uri(uri: &str) -> Result<Self, InvalidSpiffeId> {
        let (trust_domain, path) = split(uri)?;
        match path.split('/').collect::<Vec<_>>()[..] {
            ["ns", namespace, "sa", service_account] => {
                SpiffeId::new(trust_domain, namespace, service_account).map(Self::Workload)
            }
            ["culvert", "node", name] => NodeId::new(trust_domain, name).map(Self::Node),
            ["culvert", "ca"] => Ok(Self::Ca(CaId::new(trust_domain))),
            _ => Err(InvalidSpiffeId::Path { expected: ANY_FORM }),
        }
    }

    /// The trust domain, whichever form it is.
    pub fn trust_domain(&self) -> &TrustDomain {
        match self {
            Self::Workload(id) => id.trust_domain(),
            Self::Node(id) => id.trust_domain(),
            Self::Ca(id) => id.trust_domain(),
        }
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(id) => id.fmt(f),
            Self::Node(id) => id.fmt(f),
            Self::Ca(id) => id.fmt(f),
        }
    }
}

/// The identity of a workload: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl SpiffeId {
    /// Puts a name together from its pieces.
    ///
    /// # Errors
    /// Names the piece that is empty, too long or holds a character that is not allowed.
    pub fn new(
        trust_domain: TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, InvalidSpiffeId> {
        Ok(Self {
            trust_domain,
            namespace: segment(namespace, Piece::Namespace)?,
            service_account: segment(service_account, Piece::ServiceAccount)?,
        })
    }

    /// Under whose roots the name is valid.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &str {
        &self.service_account
    }

    /// `<trust domain>/ns/<namespace>/sa/<service account>`: the form that policies write, without the scheme.
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let (trust_domain, path) = split(uri)?;
        let ["ns", namespace, "sa", service_account] = path.split('/').collect::<Vec<_>>()[..] else {
            return Err(InvalidSpiffeId::Path { expected: WORKLOAD_FORM });
        };
        Self::new(trust_domain, namespace, service_account)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

/// The name of a node's daemon: `spiffe://<trust domain>/culvert/node/<name>`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId {
    trust_domain: TrustDomain,
    name: Arc<str>,
}

impl NodeId {
    /// Puts a name together from its pieces.
    ///
    /// # Errors
    /// Says what is wrong with the node's name.
    pub fn new(trust_domain: TrustDomain, name: &str) -> Result<Self, InvalidSpiffeId> {
        Ok(Self { trust_domain, name: segment(name, Piece::NodeName)? })
    }

    /// Under whose roots the name is valid.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The node's name as in `spec.node` of its workloads.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FromStr for NodeId {
    type Err = InvalidSpiffeId;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let (trust_domain, path) = split(uri)?;
        let ["culvert", "node", name] = path.split('/').collect::<Vec<_>>()[..] else {
            return Err(InvalidSpiffeId::Path { expected: NODE_FORM });
        };
        Self::new(trust_domain, name)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/culvert/node/{}", self.trust_domain, self.name)
    }
}

/// The name of the certificate authority's server: `spiffe://<trust domain>/culvert/ca`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CaId {
    trust_domain: TrustDomain,
}

impl CaId {
    /// The authority of `trust_domain`.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self { trust_domain }
    }

    /// Under whose roots the name is valid.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }
}

impl FromStr for CaId {
    type Err = InvalidSpiffeId;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let (trust_domain, path) = split(uri)?;
        if path != "culvert/ca" {
            return Err(InvalidSpiffeId::Path { expected: CA_FORM });
        }
        Ok(Self::new(trust_domain))
    }
}

impl fmt::Display for CaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/culvert/ca", self.trust_domain)
    }
}

/// A name in a log or a failed assertion reads as what stands in the certificate.
macro_rules! debug_as_display {
    ($($name:ty),+) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    )+};
}
debug_as_display!(PeerName, SpiffeId, NodeId, CaId);

/// The trust domain, and the path without its first slash.
fn split(uri: &str) -> Result<(TrustDomain, &str), InvalidSpiffeId> {
    if uri.len() > URI_BYTES_MAX {
        return Err(InvalidSpiffeId::TooLong { bytes: uri.len() });
    }
    let rest = uri.strip_prefix("spiffe://").ok_or(InvalidSpiffeId::Scheme)?;
    let (trust_domain, path) = rest.split_once('/').unwrap_or((rest, ""));
    Ok((trust_domain.parse()?, path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SEGMENT_BYTES_MAX, TRUST_DOMAIN_BYTES_MAX};

    #[track_caller]
    fn accepted(uri: &str) {
        let name = PeerName::parse_uri(uri).expect("a valid name");
        assert_eq!(name.to_string(), uri, "a name reads back as it was written");
        let kinds =
            [uri.parse::<SpiffeId>().is_ok(), uri.parse::<NodeId>().is_ok(), uri.parse::<CaId>().is_ok()];
        let expected = match name {
            PeerName::Workload(_) => [true, false, false],
            PeerName::Node(_) => [false, true, false],
            PeerName::Ca(_) => [false, false, true],
        };
        assert_eq!(kinds, expected, "{uri} is of exactly one kind"); // T-10
    }

    #[track_caller]
    fn refused(uri: &str, expected: InvalidSpiffeId) {
        assert_eq!(PeerName::parse_uri(uri).expect_err("not a name"), expected, "{uri}");
        assert!(
            uri.parse::<SpiffeId>().is_err()
                && uri.parse::<NodeId>().is_err()
                && uri.parse::<CaId>().is_err()
        );
    }

    fn bad_path() -> InvalidSpiffeId {
        InvalidSpiffeId::Path { expected: ANY_FORM }
    }

    fn character(piece: Piece, character: char) -> InvalidSpiffeId {
        InvalidSpiffeId::Character { piece, character }
    }

    #[test]
    fn the_three_forms_are_accepted_and_never_mistaken_for_each_other() {
        accepted("spiffe://cluster.local/ns/photo/sa/photo-frontend");
        accepted("spiffe://td/ns/culvert/sa/ca");
        accepted("spiffe://td/ns/a/sa/b.c_d-E9");
        accepted("spiffe://td/ns/ns/sa/sa");
        accepted("spiffe://td/culvert/node/node-a");
        accepted("spiffe://td/culvert/node/ns");
        accepted("spiffe://td/culvert/ca");
        accepted("spiffe://a-b_c.1/culvert/ca");
        accepted("spiffe://td/ns/.../sa/..a");
    }

    #[test]
    fn the_scheme_is_lower_case_and_present() {
        for uri in
            ["", "td/ns/a/sa/b", "SPIFFE://td/ns/a/sa/b", "spiffe:/td/ns/a/sa/b", " spiffe://td/culvert/ca"]
        {
            refused(uri, InvalidSpiffeId::Scheme);
        }
    }

    #[test]
    fn a_path_of_another_shape_is_no_name() {
        for uri in [
            "spiffe://td",
            "spiffe://td/",
            "spiffe://td/ns/a",
            "spiffe://td/ns/a/sa",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td//ns/a/sa/b",
            "spiffe://td/sa/a/ns/b",
            "spiffe://td/NS/a/sa/b",
            "spiffe://td/culvert",
            "spiffe://td/culvert/ca/",
            "spiffe://td/culvert/ca/x",
            "spiffe://td/culvert/node",
            "spiffe://td/culvert/node/a/b",
            "spiffe://td/node/a",
            "spiffe://td/./culvert/ca",
            "spiffe://td/x/../culvert/ca",
        ] {
            refused(uri, bad_path());
        }
    }

    #[test]
    fn an_empty_piece_is_named() {
        refused("spiffe:///ns/a/sa/b", InvalidSpiffeId::Empty(Piece::TrustDomain));
        refused("spiffe://", InvalidSpiffeId::Empty(Piece::TrustDomain));
        refused("spiffe://td/ns//sa/b", InvalidSpiffeId::Empty(Piece::Namespace));
        refused("spiffe://td/ns/a/sa/", InvalidSpiffeId::Empty(Piece::ServiceAccount));
        refused("spiffe://td/culvert/node/", InvalidSpiffeId::Empty(Piece::NodeName));
    }

    #[test]
    fn relative_pieces_are_refused() {
        refused("spiffe://../culvert/ca", InvalidSpiffeId::Relative(Piece::TrustDomain));
        refused("spiffe://td/ns/../sa/b", InvalidSpiffeId::Relative(Piece::Namespace));
        refused("spiffe://td/ns/a/sa/.", InvalidSpiffeId::Relative(Piece::ServiceAccount));
        refused("spiffe://td/culvert/node/..", InvalidSpiffeId::Relative(Piece::NodeName));
    }

    #[test]
    fn characters_outside_the_allowed_ones_are_named() {
        refused("spiffe://Td/ns/a/sa/b", character(Piece::TrustDomain, 'T'));
        refused("spiffe://td:443/ns/a/sa/b", character(Piece::TrustDomain, ':'));
        refused("spiffe://user@td/ns/a/sa/b", character(Piece::TrustDomain, '@'));
        refused("spiffe://td?x/ns/a/sa/b", character(Piece::TrustDomain, '?'));
        refused("spiffe://td/ns/a%2fb/sa/b", character(Piece::Namespace, '%'));
        refused("spiffe://td/ns/a b/sa/b", character(Piece::Namespace, ' '));
        refused("spiffe://td/ns/a/sa/b?q=1", character(Piece::ServiceAccount, '?'));
        refused("spiffe://td/ns/a/sa/b#f", character(Piece::ServiceAccount, '#'));
        refused("spiffe://td/ns/a/sa/b\0", character(Piece::ServiceAccount, '\0'));
        refused("spiffe://td/ns/a/sa/b\n", character(Piece::ServiceAccount, '\n'));
        refused("spiffe://td/ns/a/sa/é", character(Piece::ServiceAccount, 'é'));
        refused("spiffe://td/ns/a/sa/*", character(Piece::ServiceAccount, '*'));
        refused("spiffe://td/culvert/node/a:b", character(Piece::NodeName, ':'));
    }

    #[test]
    fn each_limit_is_exact() {
        let (longest_domain, longest) = ("t".repeat(TRUST_DOMAIN_BYTES_MAX), "s".repeat(SEGMENT_BYTES_MAX));
        accepted(&format!("spiffe://{longest_domain}/ns/{longest}/sa/{longest}"));
        let too_long =
            |piece, bytes_max| InvalidSpiffeId::PieceTooLong { piece, bytes: bytes_max + 1, bytes_max };
        refused(
            &format!("spiffe://{longest_domain}t/culvert/ca"),
            too_long(Piece::TrustDomain, TRUST_DOMAIN_BYTES_MAX),
        );
        refused(&format!("spiffe://td/ns/{longest}s/sa/b"), too_long(Piece::Namespace, SEGMENT_BYTES_MAX));
        refused(
            &format!("spiffe://td/culvert/node/{longest}s"),
            too_long(Piece::NodeName, SEGMENT_BYTES_MAX),
        );
        let of_length = |bytes: usize| format!("spiffe://td/{}", "/".repeat(bytes - "spiffe://td/".len()));
        refused(&of_length(URI_BYTES_MAX), bad_path());
        refused(&of_length(URI_BYTES_MAX + 1), InvalidSpiffeId::TooLong { bytes: URI_BYTES_MAX + 1 });
    }

    #[test]
    fn a_principal_is_the_name_without_its_scheme() {
        let id: SpiffeId = "spiffe://td/ns/photo/sa/web".parse().expect("a valid name");
        assert_eq!(id.principal(), "td/ns/photo/sa/web");
        assert_eq!(
            (id.trust_domain().as_str(), id.namespace(), id.service_account()),
            ("td", "photo", "web")
        );
        assert_eq!(format!("{id:?}"), "spiffe://td/ns/photo/sa/web");
    }

    #[test]
    fn pieces_are_checked_when_a_name_is_put_together() {
        let domain: TrustDomain = "td".parse().expect("a valid trust domain");
        assert_eq!(
            SpiffeId::new(domain.clone(), "a/sa/b", "c").expect_err("a slash"),
            character(Piece::Namespace, '/')
        );
        assert_eq!(NodeId::new(domain, "a/b").expect_err("a slash"), character(Piece::NodeName, '/'));
    }
}
