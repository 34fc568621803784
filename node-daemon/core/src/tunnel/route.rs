//! Which streams may share a tunnel.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use spiffe_id::SpiffeId;

use crate::workload::ObjectName;

/// What two streams must have in common to share a tunnel: two replicas of one account never do (T-9), nor two
/// services whose servers may be different ones.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolKey {
    pub source: ObjectName,
    /// From which the tunnel is dialled, so that `source.ip` is true.
    pub source_address: IpAddr,
    /// Whose certificate is presented.
    pub identity: SpiffeId,
    /// Whose certificate is accepted (policy D).
    pub allowed: Arc<BTreeSet<SpiffeId>>,
    /// The destination workload's address and the tunnel's port.
    pub endpoint: SocketAddr,
}
