//! The daemon's three listeners in one network namespace.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsFd, BorrowedFd},
};

use ebpf_abi::SocketSlot;
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

use super::Exemption;
use crate::sys::{Namespace, socket::set_transparent_v6};

/// Connections that may wait to be accepted, for each listener. Reckoning: the daemon accepts within milliseconds; 4,096 is what
/// a burst of a pod's whole connection pool needs, and `net.core.somaxconn` of the namespace caps it. At the limit the kernel
/// drops SYNs, which are sent again after a second.
const BACKLOG: i32 = 4_096;

/// The daemon's listeners in one namespace. Their ports mean nothing: the kernel steers to the sockets themselves.
#[derive(Debug)]
pub struct Listeners {
    /// Captured connections on their way out: a connection's local address is its original target.
    pub outbound: TcpListener,
    /// Connections that arrive at the workload's ports.
    pub inbound: TcpListener,
    /// Tunnels from other nodes.
    pub tunnel: TcpListener,
}

impl Listeners {
    /// In the order of [`SocketSlot::ALL`].
    pub fn by_slot(&self) -> [BorrowedFd<'_>; 3] {
        SocketSlot::ALL.map(|slot| match slot {
            SocketSlot::Outbound => self.outbound.as_fd(),
            SocketSlot::Inbound => self.inbound.as_fd(),
            SocketSlot::Tunnel => self.tunnel.as_fd(),
        })
    }
}

/// Opens the listeners inside `namespace`: for both families, or for IPv4 alone where the kernel has no IPv6.
pub fn open_listeners(namespace: &Namespace, exempt: &Exemption) -> io::Result<Listeners> {
    namespace.visit(|| {
        Ok(Listeners {
            // Answers come from addresses that are not the namespace's own.
            outbound: listener(true, exempt, BACKLOG)?,
            inbound: listener(false, exempt, BACKLOG)?,
            tunnel: listener(false, exempt, BACKLOG)?,
        })
    })?
}

fn listener(transparent: bool, exempt: &Exemption, backlog: i32) -> io::Result<TcpListener> {
    let (socket, address) = match Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            if transparent {
                set_transparent_v6(socket.as_fd())?;
            }
            (socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)))
        }
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            if transparent {
                socket.set_ip_transparent_v4(true)?;
            }
            (socket, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))
        }
        Err(error) => return Err(error),
    };
    exempt(socket.as_fd())?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(backlog)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;

    #[test]
    fn a_socket_that_cannot_be_exempted_does_not_listen() {
        // T-2
        let refuse: Exemption = Arc::new(|_| Err(io::Error::from_raw_os_error(libc::ENOMEM)));
        let refused = listener(false, &refuse, BACKLOG).expect_err("the record could not be written");
        assert_eq!(refused.raw_os_error(), Some(libc::ENOMEM));
    }

    #[test]
    fn beyond_the_backlog_a_connect_is_neither_refused_nor_finished() {
        let accept: Exemption = Arc::new(|_| Ok(()));
        let listener = listener(false, &accept, 1).expect("no privilege is needed");
        let port = listener.local_addr().expect("bound").port();
        let connect = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.connect_timeout(
                &SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into(),
                Duration::from_millis(50),
            )?;
            Ok::<_, io::Error>(socket)
        };
        // The kernel keeps one more than was asked for.
        let waiting = [connect().expect("the first waits"), connect().expect("the second waits")];
        let unfinished = connect().expect_err("its SYN is dropped");
        assert_eq!(unfinished.kind(), io::ErrorKind::TimedOut);
        for _ in &waiting {
            listener.accept().expect("none of those that waited is lost");
        }
        connect().expect("there is room again");
    }

    #[test]
    fn one_listener_serves_both_families() {
        let accept: Exemption = Arc::new(|_| Ok(()));
        let listener = listener(false, &accept, BACKLOG).expect("no privilege is needed");
        let port = listener.local_addr().expect("bound").port();
        std::net::TcpStream::connect(("127.0.0.1", port)).expect("IPv4");
        std::net::TcpStream::connect(("::1", port)).expect("IPv6");
    }
}
