//! What the data path needs of the place where a workload lives: sockets in its namespace, and who opened a socket.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures_util::future::BoxFuture;
use node_core::workload::ObjectName;
use tokio::net::TcpStream;

use crate::net::DialError;

/// The border to the kernel: a workload's namespace, or a test's sockets.
pub trait Ground: Send + Sync + 'static {
    /// Connects from the workload's own address `bind`, exempt from capture.
    fn dial(
        &self,
        bind: Option<IpAddr>,
        target: SocketAddr,
        within: Duration,
    ) -> BoxFuture<'_, Result<TcpStream, DialError>>;

    /// Connects to the workload itself, from its client's true address.
    fn deliver(
        &self,
        workload: &ObjectName,
        client: IpAddr,
        target: SocketAddr,
        within: Duration,
    ) -> BoxFuture<'_, Result<TcpStream, DialError>>;

    /// On a host: the workload whose process opened the captured connection of `client` to `target`.
    ///
    /// # Errors
    /// The kernel could not be asked; then nobody is vouched for.
    fn origin(&self, client: SocketAddr, target: SocketAddr) -> io::Result<Option<ObjectName>>;

    /// On a host: the workload to whose cgroup the local process belongs that dials `target` from `client`, at loopback or
    /// another address of the host (T-27).
    ///
    /// # Errors
    /// The kernel could not be asked; then nobody is vouched for.
    fn local_client(&self, client: SocketAddr, target: SocketAddr) -> io::Result<Option<ObjectName>>;
}
