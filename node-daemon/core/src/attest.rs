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
/// Only [`attest`] and [`attest_within_host`] make one, and whoever presents a workload's certificate asks for one:
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
    #[error("nobody may speak as {0}: it is barred")]
    Barred(SpiffeId),
}

impl NotAttested {
    /// The metric's label and the access log's `reason`.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Unknown(_) => "source_unknown",
            Self::NotEnrolled(_) => "source_not_enrolled",
            Self::OtherNode { .. } => "source_other_node",
            Self::ForeignAddress { .. } => "source_foreign_address",
            Self::Barred(_) => "source_barred",
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
    vouch(snapshot, listener_of, client, |workload, client| workload.addresses.contains(&client))
}

/// Vouches for a connection between processes of this host, of which the kernel named the opener by its cgroup: there
/// loopback is as good an address of its own as the others (T-27). No tunnel can be dialled from it.
///
/// # Errors
/// Says which of the conditions does not hold.
pub fn attest_within_host(
    snapshot: &Snapshot,
    opener: &ObjectName,
    client: IpAddr,
) -> Result<Attested, NotAttested> {
    vouch(snapshot, opener, client, Workload::is_reached_at)
}

fn vouch(
    snapshot: &Snapshot,
    named: &ObjectName,
    client: IpAddr,
    is_own: impl Fn(&Workload, IpAddr) -> bool,
) -> Result<Attested, NotAttested> {
    let name = || named.clone();
    let workload = snapshot.workload(named).ok_or_else(|| NotAttested::Unknown(name()))?;
    if workload.node != snapshot.node() {
        return Err(NotAttested::OtherNode { name: name(), node: workload.node.clone() });
    }
    if !workload.enrolled {
        return Err(NotAttested::NotEnrolled(name()));
    }
    if snapshot.is_barred(&workload.identity) {
        return Err(NotAttested::Barred(workload.identity.clone()));
    }
    let client = client.to_canonical();
    if !is_own(workload, client) {
        return Err(NotAttested::ForeignAddress { name: name(), client });
    }
    Ok(Attested { workload: Arc::clone(workload), client })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{at, join, named, pod, snapshot, unit};

    fn world() -> Arc<Snapshot> {
        snapshot(&join(&[
            pod("web", "10.8.1.4", "").replace("\"10.8.1.4\"", "\"10.8.1.4\", \"fd00::4\""),
            pod("twin", "10.8.1.5", "").replace("serviceAccount: twin", "serviceAccount: web"),
            pod("far", "10.8.2.4", "").replace("node-a", "node-b"),
            pod("off", "10.8.1.6", "").replace("app: off", "culvert.io/mesh: disabled"),
            unit("db", 81),
            unit("cache", 82),
        ]))
    }

    #[track_caller]
    fn refused(name: &str, client: &str, expected: &str) {
        let refusal = attest(&world(), &named(name), at(client).ip()).expect_err("nobody vouches for it");
        assert_eq!(refusal.to_string(), expected);
    }

    #[test]
    fn a_connection_from_an_own_address_is_the_workloads() {
        for (name, client) in [
            ("web", "10.8.1.4:0"),
            ("web", "[fd00::4]:0"),
            ("web", "[::ffff:10.8.1.4]:0"),
            ("db", "10.9.0.2:0"),
            ("cache", "10.9.0.2:0"),
        ] {
            let attested = attest(&world(), &named(name), at(client).ip()).expect("it is its own");
            assert_eq!(attested.workload().name, named(name));
            assert_eq!(attested.identity(), &attested.workload().identity);
            assert_eq!(attested.client(), at(client).ip().to_canonical());
        }
    }

    #[test]
    fn a_source_address_alone_proves_nothing() {
        // A pod that forges its neighbour's address, of the same account even.
        refused("web", "10.8.1.5:0", "the client 10.8.1.5 is no address of workload photo/web");
        refused("twin", "10.8.1.4:0", "the client 10.8.1.4 is no address of workload photo/twin");
        refused("web", "127.0.0.1:0", "the client 127.0.0.1 is no address of workload photo/web");
        refused("web", "[fe80::1]:0", "the client fe80::1 is no address of workload photo/web");
        refused("db", "10.8.1.4:0", "the client 10.8.1.4 is no address of workload photo/db");
    }

    // T-27
    #[test]
    fn within_a_host_loopback_is_an_address_of_its_services_and_of_nobody_else() {
        let vouched = |name: &str, client: &str| attest_within_host(&world(), &named(name), at(client).ip());
        for client in ["127.0.0.1:0", "127.0.0.53:0", "[::1]:0", "[::ffff:127.0.0.1]:0", "10.9.0.2:0"] {
            let attested = vouched("db", client).expect("the kernel named it");
            assert_eq!(attested.workload().name, named("db"));
        }
        for (name, client) in [("web", "127.0.0.1:0"), ("web", "[::1]:0"), ("db", "10.8.1.4:0")] {
            let refusal = vouched(name, client).expect_err("nobody vouches for it");
            assert!(matches!(refusal, NotAttested::ForeignAddress { .. }), "{refusal}");
        }
        assert_eq!(
            vouched("off", "127.0.0.1:0").expect_err("not enrolled"),
            NotAttested::NotEnrolled(named("off"))
        );
        assert_eq!(vouched("nobody", "[::1]:0").expect_err("unknown"), NotAttested::Unknown(named("nobody")));
        // Nothing leaves the host from loopback.
        refused("db", "127.0.0.1:0", "the client 127.0.0.1 is no address of workload photo/db");
        refused("db", "[::1]:0", "the client ::1 is no address of workload photo/db");
    }

    #[test]
    fn workloads_that_are_not_this_nodes_are_never_attested() {
        refused("nobody", "10.8.1.4:0", "no workload photo/nobody is known");
        refused("far", "10.8.2.4:0", "workload photo/far runs on node node-b, not here");
        refused("off", "10.8.1.6:0", "workload photo/off is not enrolled");
    }
}
