//! Who may reach whom: objects of both ages in, one compiled form, verdicts out.
//!
//! Takes [`Object`](crate::decode::Object)s and the inventory of workloads and services; gives a [`Permit`] or a
//! [`Denial`]. Knows no socket, no certificate and no clock.

mod minimal;

pub use minimal::{Compiled, Inventory, ObjectStatus, PolicyObjects, compile};

use std::{net::IpAddr, sync::Arc};

use spiffe_id::SpiffeId;

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
    /// The kernel of this node vouches for the socket (a local process of a host, T-27).
    Attested(SpiffeId),
    /// Nothing was proven.
    Plaintext,
}

/// Proof that the policy allowed one connection.
///
/// Only the policy makes one, and every function that sends a byte to a workload asks for one:
///
/// ```compile_fail
/// let permit = node_core::policy::Permit { rule: todo!() };
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
}

impl DenialReason {
    pub const ALL: [Self; 6] = [
        Self::PlaintextRefused,
        Self::TrustDomain,
        Self::DeniedByRule,
        Self::NoRuleAllows,
        Self::PolicyUnusable,
        Self::NotEnrolled,
    ];

    pub const fn label(self) -> &'static str {
        match self {
            Self::PlaintextRefused => "plaintext_refused",
            Self::TrustDomain => "trust_domain",
            Self::DeniedByRule => "denied_by_rule",
            Self::NoRuleAllows => "no_rule_allows",
            Self::PolicyUnusable => "policy_unusable",
            Self::NotEnrolled => "not_enrolled",
        }
    }
}
