//! The data path's way back into a workload's namespace.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use ebpf_abi::WorkloadNumber;
use futures_util::future::BoxFuture;
use node_core::workload::ObjectName;
use tokio::net::TcpStream;

use crate::{
    datapath::Ground,
    kernel::{Announced, Deliveries, Origins},
    net::{Dial, DialError, Exemption, Style, dial},
    sys::Namespace,
};

/// Numbers of the host's workloads, shared between enrolment and the data path.
#[derive(Debug, Default)]
pub(super) struct Numbers(RwLock<BTreeMap<ObjectName, WorkloadNumber>>);

impl Numbers {
    pub(super) fn insert(&self, name: ObjectName, number: WorkloadNumber) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(name, number);
    }

    pub(super) fn remove(&self, name: &ObjectName) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    fn number(&self, name: &ObjectName) -> Option<WorkloadNumber> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }

    fn name(&self, number: WorkloadNumber) -> Option<ObjectName> {
        let numbers = self.0.read().unwrap_or_else(PoisonError::into_inner);
        numbers.iter().find(|(_, known)| **known == number).map(|(name, _)| name.clone())
    }
}

/// A pod's namespace.
pub(super) struct PodGround {
    pub(super) namespace: Arc<Namespace>,
    pub(super) exempt: Exemption,
    pub(super) mark: u32,
}

/// The host's namespace, with all of its workloads.
pub(super) struct HostGround {
    pub(super) pod: PodGround,
    pub(super) numbers: Arc<Numbers>,
    pub(super) origins: Origins,
    pub(super) deliveries: Deliveries,
}

impl PodGround {
    async fn dial_from(
        &self,
        bind: Option<IpAddr>,
        target: SocketAddr,
        timeout: Duration,
    ) -> Result<TcpStream, DialError> {
        let style = Style::Ordinary { bind };
        dial(Dial { namespace: &self.namespace, exempt: &self.exempt, target, style, timeout }).await
    }

    async fn deliver_from(
        &self,
        client: IpAddr,
        local: bool,
        target: SocketAddr,
        timeout: Duration,
        announce: Option<&(dyn Fn(SocketAddr, SocketAddr) -> io::Result<()> + Sync)>,
    ) -> Result<TcpStream, DialError> {
        let style = Style::Transparent { client, mark: self.mark, local, announce };
        dial(Dial { namespace: &self.namespace, exempt: &self.exempt, target, style, timeout }).await
    }
}

impl Ground for PodGround {
    fn dial(
        &self,
        bind: Option<IpAddr>,
        target: SocketAddr,
        within: Duration,
    ) -> BoxFuture<'_, Result<TcpStream, DialError>> {
        Box::pin(self.dial_from(bind, target, within))
    }

    fn deliver(
        &self,
        _workload: &ObjectName,
        client: IpAddr,
        target: SocketAddr,
        within: Duration,
    ) -> BoxFuture<'_, Result<TcpStream, DialError>> {
        Box::pin(self.deliver_from(client, false, target, within, None))
    }

    /// In a pod the namespace says who it is; nobody asks.
    fn origin(&self, _client: SocketAddr, _target: SocketAddr) -> io::Result<Option<ObjectName>> {
        Ok(None)
    }

    fn local_client(&self, _client: SocketAddr, _target: SocketAddr) -> io::Result<Option<ObjectName>> {
        Ok(None)
    }
}

impl Ground for HostGround {
    fn dial(
        &self,
        bind: Option<IpAddr>,
        target: SocketAddr,
        within: Duration,
    ) -> BoxFuture<'_, Result<TcpStream, DialError>> {
        self.pod.dial(bind, target, within)
    }

    /// The delivery is announced until the connection stands: from then on no listener is looked up for it.
    fn deliver(
        &self,
        workload: &ObjectName,
        client: IpAddr,
        target: SocketAddr,
        within: Duration,
    ) -> BoxFuture<'_, Result<TcpStream, DialError>> {
        let number = self.numbers.number(workload);
        Box::pin(async move {
            let Some(number) = number else {
                let source = io::Error::new(io::ErrorKind::NotFound, "the workload left");
                return Err(DialError::Kernel { target, call: "deliver", source });
            };
            let announced: Mutex<Option<Announced>> = Mutex::new(None);
            let announce = |source: SocketAddr, target: SocketAddr| {
                let fresh = self.deliveries.announce(number, source, target).map_err(io::Error::other)?;
                *announced.lock().unwrap_or_else(PoisonError::into_inner) = Some(fresh);
                Ok(())
            };
            let is_own = |address| {
                self.deliveries.is_own(number, address).map_err(|error| DialError::Kernel {
                    target,
                    call: "deliver",
                    source: io::Error::other(error),
                })
            };
            let local = client.is_loopback() || is_own(client)?;
            self.pod.deliver_from(client, local, target, within, Some(&announce)).await
        })
    }

    fn origin(&self, client: SocketAddr, target: SocketAddr) -> io::Result<Option<ObjectName>> {
        let number = self.origins.take(client, target).map_err(io::Error::other)?;
        Ok(number.and_then(|number| self.numbers.name(number)))
    }

    /// The kernel publishes the origin of every connect of a host workload's cgroup to a service of the host that is not its
    /// own (T-27).
    fn local_client(&self, client: SocketAddr, target: SocketAddr) -> io::Result<Option<ObjectName>> {
        self.origin(client, target)
    }
}
