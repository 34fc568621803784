//! Opens one connection in any of the ways an application may.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use world::protocol::{Connect, Failure, FastOpen};

use crate::{failed, talk};

/// `MSG_FASTOPEN` of `linux/socket.h`.
const MSG_FASTOPEN: i32 = 0x2000_0000;

/// A connected, blocking socket; `first` has been sent.
pub(crate) fn dial(wanted: &Connect) -> Result<Socket, Failure> {
    let target = target(wanted);
    let socket = open(wanted, &target).map_err(failed("socket"))?;
    let limit = Duration::from_millis(wanted.timeout_ms);
    match wanted.fast_open {
        FastOpen::SendTo => fast_open(&socket, &target, wanted)?,
        FastOpen::Connect => {
            setsockopt(&socket, sockopt::TcpFastOpenConnect, &true)
                .map_err(io::Error::from)
                .map_err(failed("option"))?;
            connect(&socket, &target, wanted, limit)?;
            talk::send(&socket, wanted.first.as_bytes())?;
        }
        FastOpen::Off => {
            connect(&socket, &target, wanted, limit)?;
            talk::send(&socket, wanted.first.as_bytes())?;
        }
    }
    Ok(socket)
}

/// A `sockaddr` of IPv4 or IPv6.
pub(crate) fn address(address: io::Result<SockAddr>) -> io::Result<SocketAddr> {
    address?.as_socket().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn target(wanted: &Connect) -> SocketAddr {
    match wanted.to.ip() {
        IpAddr::V4(ip) if wanted.mapped => SocketAddr::new(IpAddr::V6(ip.to_ipv6_mapped()), wanted.to.port()),
        IpAddr::V4(_) | IpAddr::V6(_) => wanted.to,
    }
}

fn open(wanted: &Connect, target: &SocketAddr) -> io::Result<Socket> {
    let protocol = if wanted.mptcp { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(*target), Type::STREAM, Some(protocol))?;
    if wanted.mapped {
        socket.set_only_v6(false)?;
    }
    let limit = Some(Duration::from_millis(wanted.timeout_ms));
    socket.set_read_timeout(limit)?;
    socket.set_write_timeout(limit)?;
    if let Some(device) = &wanted.device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if wanted.mark != 0 {
        socket.set_mark(wanted.mark)?;
    }
    if let Some(from) = wanted.bind {
        socket.bind(&from.into())?;
    }
    Ok(socket)
}

/// Blocking, or non-blocking and then waited for.
fn connect(socket: &Socket, target: &SocketAddr, wanted: &Connect, limit: Duration) -> Result<(), Failure> {
    if !wanted.nonblocking {
        socket.connect(&(*target).into()).map_err(connect_failed)?;
        return clear_mark(socket, wanted);
    }
    if !wanted.clear_mark {
        return socket.connect_timeout(&(*target).into(), limit).map_err(connect_failed);
    }
    socket.set_nonblocking(true).map_err(failed("option"))?;
    let begun = socket.connect(&(*target).into());
    clear_mark(socket, wanted)?;
    socket.set_nonblocking(false).map_err(failed("option"))?;
    match begun {
        Ok(()) => Ok(()),
        // Asked again on a blocking socket, connect waits for the attempt that is under way and runs no hook.
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EINPROGRESS as i32) => {
            socket.connect(&(*target).into()).map_err(connect_failed)
        }
        Err(error) => Err(connect_failed(error)),
    }
}

fn fast_open(socket: &Socket, target: &SocketAddr, wanted: &Connect) -> Result<(), Failure> {
    let bytes = wanted.first.as_bytes();
    let sent = socket.send_to_with_flags(bytes, &(*target).into(), MSG_FASTOPEN).map_err(connect_failed)?;
    clear_mark(socket, wanted)?;
    talk::send(socket, &bytes[sent..])
}

fn clear_mark(socket: &Socket, wanted: &Connect) -> Result<(), Failure> {
    if wanted.clear_mark {
        socket.set_mark(0).map_err(failed("mark"))?;
    }
    Ok(())
}

/// A connect that a time limit ended says EINPROGRESS, EALREADY or EAGAIN; `timeout` is what is meant.
fn connect_failed(error: io::Error) -> Failure {
    let mut failure = failed("connect")(error);
    if ["EINPROGRESS", "EALREADY", "EAGAIN", "TimedOut"].contains(&failure.errno.as_str()) {
        failure.errno = "timeout".to_owned();
    }
    failure
}
