//! Who opened an outbound connection: facts of the kernel and the snapshot in, an [`Attested`] workload out.
//!
//! The kernel says to which workload the listener belongs on which the connection arrived (its network namespace), or
//! to which one the client's socket belongs (its cgroup, on a host). The source address alone is never a proof.

use std::{net::IpAddr, sync::Arc};

use spiffe_id::SpiffeId;

use crate::{
    snapshot::Snapshot,
    workload::{ObjectName, Workload},
};

/// Proof that the kernel of this node vouches for the source of a connection.
///
/// Only [`attest`] makes one, and whoever presents a workload's certificate asks for one:
///
/// ```compile_fail
/// let attested = node_core::attest::Attested { workload: todo!(), client: todo!() };
/// ```
///
/// It is no one's to copy:
///
/// ```compile_fail
/// fn copy(attested: &node_core::attest::Attested) -> node_core::attest::Attested {
///     attested.clone()
/// }
/// ```
#[derive(Debug)]
#[must_use]
pub struct Attested {
    workload: Arc<Workload>,
    client: IpAddr,
}

impl Attested {
    pub fn workload(&self) -> &Arc<Workload> {
        &self.workload
    }

    pub fn identity(&self) -> &SpiffeId {
        &self.workload.identity
    }

    /// From which tunnels of this connection are dialled (T-9).
    pub fn client(&self) -> IpAddr {
        self.client
    }
}

/// Why nobody vouches for a connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAttested {
    #[error("no workload {0} is known")]
    Unknown(ObjectName),
    #[error("workload {0} is not enrolled")]
    NotEnrolled(ObjectName),
    #[error("workload {name} runs on node {node}, not here")]
    OtherNode { name: ObjectName, node: String },
    #[error("the client {client} is no address of workload {name}")]
    ForeignAddress { name: ObjectName, client: IpAddr },
}

impl NotAttested {
    /// The metric's label and the access log's `reason`.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Unknown(_) => "source_unknown",
            Self::NotEnrolled(_) => "source_not_enrolled",
            Self::OtherNode { .. } => "source_other_node",
            Self::ForeignAddress { .. } => "source_foreign_address",
        }
    }
}

/// Vouches for a connection of the workload that the kernel named, if it comes from one of its own addresses.
///
/// # Errors
/// Says which of the conditions does not hold.
pub fn attest(
    snapshot: &Snapshot,
    listener_of: &ObjectName,
    client: IpAddr,
) -> Result<Attested, NotAttested> {
    let name = || listener_of.clone();
    let workload = snapshot.workload(listener_of).ok_or_else(|| NotAttested::Unknown(name()))?;
    if workload.node != snapshot.node() {
        return Err(NotAttested::OtherNode { name: name(), node: workload.node.clone() });
    }
    if !workload.enrolled {
        return Err(NotAttested::NotEnrolled(name()));
    }
    let client = client.to_canonical();
    if !workload.addresses.contains(&client) {
        return Err(NotAttested::ForeignAddress { name: name(), client });
    }
    Ok(Attested { workload: Arc::clone(workload), client })
}
