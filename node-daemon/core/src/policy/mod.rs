//! Who may reach whom: objects of both ages in, one compiled form, verdicts out.
//!
//! ```text
//! Object --> [authn_v1alpha1 | rbac_v1alpha1 | security_v1] --> objects --> book --> compile --> evaluate
//!             front ends, through one reader                    last good   by age   per port     Permit | Denial
//! ```
//!
//! [`PolicyObjects`] keeps the last good version of each object and remembers refused ones; [`compile()`] makes, from them
//! and the [`Inventory`], one table for each port of each local workload; [`Compiled::authorise`] gives a [`Permit`] or a
//! [`Denial`]. What cannot be enforced denies, and [`ObjectStatus`] says so. Knows no socket, no certificate and no clock.
//!
//! On a port that [`Compiled::needs_requests`], [`Compiled::judge_request`] judges each request, after [`tokens`] were
//! verified; elsewhere what only a request can answer is judged as layer 4 must.

mod atoms;
mod authentication;
mod authn_v1alpha1;
mod book;
mod client;
mod client_status;
mod compile;
pub mod convert;
mod destination_rule;
mod evaluate;
mod explain;
mod matching;
mod objects;
mod origins;
mod paths;
mod rbac_v1alpha1;
mod reach;
mod reader;
mod request;
mod request_authentication;
mod rules;
mod security_v1;
mod seen;
mod status;
#[cfg(test)]
mod tests;
pub mod tokens;
mod transport;
pub(crate) mod trial;

use std::{net::IpAddr, sync::Arc};

use spiffe_id::SpiffeId;

pub use self::{
    atoms::{
        CHANGED_ATTRIBUTES_MAX, CHANGES_TRIED_MAX, Change, Decision, POINTS_OF_LINE_MAX, Point, RequestPoint,
        Told, Unknown,
    },
    client::{Asked, ClientFacts, ClientMode, ClientTls, ServerMode, client_tls, may_answer},
    compile::{Compiled, Inventory, compile},
    destination_rule::{ClientSetting, NamedFiles, Part, Said, TlsMode, TlsSettings},
    explain::{Considered, Explanation, Mismatch},
    objects::PolicyObjects,
    origins::KeySetAddress,
    paths::PathFault,
    request::{
        Admission, Answer, Attributes, DENIED_BODY, RequestDenial, RequestDenialKind, RequestFacts,
        RequestPermit,
    },
    seen::{Headers, RESERVED_NAMES, RESERVED_PREFIX},
    status::ObjectStatus,
};
pub(crate) use self::{
    destination_rule::{Chosen, rule_of, tls_of},
    explain::reason,
    seen::{Metadata, header},
    tokens::claims_of,
};
use crate::workload::{ObjectName, Workload};

/// What is known of one connection when it asks for admission.
#[derive(Clone, Debug)]
pub struct ConnectionFacts {
    pub presented: Presented,
    /// The client's true address (policy H-5).
    pub source_address: IpAddr,
    /// The address on which the workload was asked for: its own, never the service's.
    pub destination_address: IpAddr,
    /// The port the workload listens on (policy H-1).
    pub destination_port: u16,
    pub destination: Arc<Workload>,
}

/// How the peer came, and who it proved to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presented {
    /// Over the tunnel, with a verified certificate.
    Tunnel(SpiffeId),
    /// Mesh TLS (ALPN `istio`) on the workload's port, with a verified certificate.
    MeshTls { peer: SpiffeId, server_name: Option<String> },
    /// The kernel of this node vouches for the socket: a workload of this node, without a certificate.
    Attested(SpiffeId),
    /// Nothing was proven.
    Plaintext,
}

impl Presented {
    /// Whom the peer proved to be.
    pub fn identity(&self) -> Option<&SpiffeId> {
        match self {
            Self::Tunnel(id) | Self::Attested(id) | Self::MeshTls { peer: id, .. } => Some(id),
            Self::Plaintext => None,
        }
    }
}

/// Proof that the policy allowed one connection.
///
/// Only the policy makes one, and every function that sends a byte to a workload asks for one:
///
/// ```compile_fail
/// let permit = node_core::policy::Permit { verdict: node_core::policy::Verdict::default() };
/// ```
///
/// Nor is there a way to make a second one out of the first:
///
/// ```compile_fail
/// fn keep(permit: &node_core::policy::Permit) -> node_core::policy::Permit { permit.clone() }
/// ```
///
/// Its verdict may be read, which shows that the two refusals above are about making:
///
/// ```
/// fn read(permit: &node_core::policy::Permit) -> &node_core::policy::Verdict { permit.verdict() }
/// ```
#[derive(Debug)]
#[must_use]
pub struct Permit {
    verdict: Verdict,
}

impl Permit {
    /// The object and rule that allowed it, for the access log.
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }
}

/// The deciding object and rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// `Kind/namespace/name` of the deciding object; `None`: nothing was in force.
    pub policy: Option<Arc<str>>,
    /// Which of its rules, in words such as `rules[0]`.
    pub rule: Option<Arc<str>>,
    /// The peer's identity as rules see it; `None` where it is hidden or absent.
    pub principal: Option<SpiffeId>,
    /// The service on whose behalf the port is open, if any.
    pub service: Option<ObjectName>,
    /// What the answer would be if everything were enforced that is only tried (policy B-11); `None`: nothing is.
    pub shadow: Option<ShadowVerdict>,
    /// The AUDIT policy that records this (policy F-3).
    pub audit: Option<Arc<str>>,
}

/// A would-be verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShadowVerdict {
    pub allowed: bool,
    pub policy: Option<Arc<str>>,
    pub rule: Option<Arc<str>>,
}

/// An answer, not a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    pub reason: DenialReason,
    pub verdict: Verdict,
}

/// Why the policy said no. [`DenialReason::label`] is the access log's `reason` and the metric's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DenialReason {
    /// STRICT, and nothing was proven (policy A-6).
    PlaintextRefused,
    /// A proven peer of another trust domain that is no alias (policy A-8, G-12).
    TrustDomain,
    /// A DENY rule matched.
    DeniedByRule,
    /// Rules are in force and none allows (policy B-1, F-3).
    NoRuleAllows,
    /// An object that could not be used stands where it might have denied (policy A-3, G; T-19).
    PolicyUnusable,
    /// The destination is not enrolled on this node.
    NotEnrolled,
    /// The peer of an HTTP port is nobody that its policy accepts (policy A-8).
    PeerUnauthenticated,
    /// A token is missing or not valid (policy A-9, F-2).
    TokenRefused,
    /// A path that nobody can judge (policy B-5).
    BadPath,
    /// Nobody may speak as the identity of one of the ends.
    IdentityBarred,
}

impl DenialReason {
    pub const ALL: [Self; 10] = [
        Self::PlaintextRefused,
        Self::TrustDomain,
        Self::DeniedByRule,
        Self::NoRuleAllows,
        Self::PolicyUnusable,
        Self::NotEnrolled,
        Self::PeerUnauthenticated,
        Self::TokenRefused,
        Self::BadPath,
        Self::IdentityBarred,
    ];

    pub const fn label(self) -> &'static str {
        match self {
            Self::PlaintextRefused => "plaintext_refused",
            Self::TrustDomain => "trust_domain",
            Self::DeniedByRule => "denied_by_rule",
            Self::NoRuleAllows => "no_rule_allows",
            Self::PolicyUnusable => "policy_unusable",
            Self::NotEnrolled => "not_enrolled",
            Self::PeerUnauthenticated => "peer_unauthenticated",
            Self::TokenRefused => "token_refused",
            Self::BadPath => "bad_path",
            Self::IdentityBarred => "identity_barred",
        }
    }
}
