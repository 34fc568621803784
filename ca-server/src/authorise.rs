//! May the caller have a certificate with that name? The only place where a [`Grant`] is made.
//!
//! Pure: it is told who asks, what runs where and what time it is.

use std::time::Duration;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use ca_proto::refusal::{Reason, Refusal};
use spiffe_id::{CaId, NodeId, PeerName, TrustDomain};

use crate::clock::Seconds;
use crate::config::WORKLOAD_SECONDS_MAX;
use crate::csr::Csr;
use crate::identify::NodePeer;
use crate::ledger::TokenRecord;
use crate::registry::Assignments;

/// Proof that a certificate with one name may be issued, once. `issue` takes it by value.
///
/// Its fields are private and it is neither `Clone` nor `Default`: whoever wants one has to pass this file.
#[derive(Debug)]
#[must_use]
pub(crate) struct Grant {
    name: PeerName,
    node: Option<NodeId>,
    lifetime_seconds: u64,
}

impl Grant {
    /// The name that the certificate will carry.
    pub(crate) fn name(&self) -> &PeerName {
        &self.name
    }

    /// The node that asked; `None` for the authority's own certificate.
    pub(crate) fn node(&self) -> Option<&NodeId> {
        self.node.as_ref()
    }

    /// How long the certificate may live.
    pub(crate) fn lifetime_seconds(&self) -> u64 {
        self.lifetime_seconds
    }
}

/// A node asks for one of its workloads.
///
/// Granted iff a workload document says that this identity runs on this node: whoever takes over a node obtains the
/// identities that run on it and no more (T-26). Names of nodes and of the authority are never granted here (T-10).
///
/// # Errors
/// A refusal with its reason; the caller is an authenticated node and may know it.
pub(crate) fn workload(
    caller: &NodePeer,
    identity: Option<&PeerName>,
    lifetime: Option<Duration>,
    lifetime_default: Duration,
    assignments: &Assignments,
) -> Result<Grant, Refusal> {
    const FIELD: &str = "metadata.ImpersonatedIdentity";
    let node = caller.node();
    let identity = match identity {
        None => {
            return Err(Refusal::new(
                Reason::IdentityMissing,
                format!("{FIELD} is missing: a node asks for the identity of one of its workloads"),
            ));
        }
        Some(name @ (PeerName::Node(_) | PeerName::Ca(_))) => {
            return Err(Refusal::new(
                Reason::IdentityReserved,
                format!(
                    "{FIELD} is {name}, which is no workload: nodes join and renew, the authority issues to itself"
                ),
            ));
        }
        Some(PeerName::Workload(id)) => id,
    };
    if identity.trust_domain() != node.trust_domain() {
        return Err(Refusal::new(
            Reason::TrustDomain,
            format!("{FIELD} is {identity}, expected the trust domain {}", node.trust_domain()),
        ));
    }
    if !assignments.knows_node(node.name()) {
        return Err(Refusal::new(
            Reason::NodeUnknown,
            format!("no Workload document of the registry has spec.node {:?}", node.name()),
        ));
    }
    if !assignments.runs_on(node.name(), identity.namespace(), identity.service_account()) {
        return Err(Refusal::new(
            Reason::IdentityNotOnNode,
            format!(
                "{FIELD} is {identity}: no Workload document of the registry with namespace {:?} and \
                 serviceAccount {:?} has spec.node {:?}",
                identity.namespace(),
                identity.service_account(),
                node.name()
            ),
        ));
    }
    let wanted = lifetime.unwrap_or(lifetime_default).as_secs();
    Ok(Grant {
        name: PeerName::Workload(identity.clone()),
        node: Some(node.clone()),
        lifetime_seconds: wanted.min(WORKLOAD_SECONDS_MAX),
    })
}

/// What a token is worth to who presents it.
#[derive(Debug)]
pub(crate) enum Joining {
    /// It is fresh.
    First(Grant),
    /// It was used with this very key: the same answer is due again.
    Again,
}

/// A stranger asks, with a token, for the first certificate of a node.
///
/// # Errors
/// [`Reason::Stranger`] for a secret that the authority does not know. Whoever knows the secret may also know why the
/// token is not good any more.
pub(crate) fn join(
    node: &NodeId,
    trust_domain: &TrustDomain,
    secret_hash: &[u8; 32],
    token: &TokenRecord,
    csr: &Csr,
    lifetime: Duration,
    now: Seconds,
) -> Result<Joining, Refusal> {
    // It was found by the first bytes of the hash; the rest is compared without telling where it differs.
    if verify_slices_are_equal(&token.secret_hash, secret_hash).is_err() {
        return Err(Refusal::new(Reason::Stranger, "token: no such token was made by this authority"));
    }
    if node.trust_domain() != trust_domain {
        return Err(Refusal::new(
            Reason::TrustDomain,
            format!("node is {node}, expected the trust domain {trust_domain}"),
        ));
    }
    if token.node != node.name() {
        return Err(Refusal::new(
            Reason::TokenNode,
            format!("token: it was made for a node of another name than {:?}", node.name()),
        ));
    }
    if token.expires <= now {
        return Err(Refusal::new(
            Reason::TokenExpired,
            format!(
                "token: it expired at {} and it is {now}; make another with `culvert-ca token create`",
                token.expires
            ),
        ));
    }
    match &token.used {
        None => Ok(Joining::First(Grant {
            name: PeerName::Node(node.clone()),
            node: Some(node.clone()),
            lifetime_seconds: lifetime.as_secs(),
        })),
        Some(used) if used.key_hash == csr.key().hash() => Ok(Joining::Again),
        Some(_) => Err(Refusal::new(
            Reason::TokenUsed,
            "token: it was used with another key; if that was not this node, find out who has it, \
             then make another with `culvert-ca token create`",
        )),
    }
}

/// A node asks for its next certificate: the same name, another key.
///
/// # Errors
/// [`Reason::KeyReused`] for the key of the certificate that it presented.
pub(crate) fn renew(caller: &NodePeer, csr: &Csr, lifetime: Duration) -> Result<Grant, Refusal> {
    if caller.spki() == csr.key().spki() {
        return Err(Refusal::new(
            Reason::KeyReused,
            "csr: its key is that of the present certificate; a renewal comes with a new one",
        ));
    }
    Ok(Grant {
        name: PeerName::Node(caller.node().clone()),
        node: Some(caller.node().clone()),
        lifetime_seconds: lifetime.as_secs(),
    })
}

/// The certificate with which the authority itself serves.
pub(crate) fn authority_itself(trust_domain: &TrustDomain, lifetime_seconds: u64) -> Grant {
    Grant { name: PeerName::Ca(CaId::new(trust_domain.clone())), node: None, lifetime_seconds }
}
