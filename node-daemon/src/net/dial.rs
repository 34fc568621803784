//! Connections that the daemon opens inside a workload's namespace.
//!
//! The socket is made in the namespace (two `setns` on the calling thread, no waiting); everything that waits happens
//! outside, in the runtime.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    os::fd::AsFd,
    time::Duration,
};

use nix::libc;
use rand::RngExt;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::{Exemption, LOOPBACK_BUFFER_BYTES};
use crate::sys::{
    Namespace,
    socket::{set_bind_address_no_port, set_transparent_v6},
};

/// Source ports that are tried for one transparent connection. Reckoning: with 20,000 connections of one client address over
/// some 30,000 ports, two of three are taken; 24 draws miss once in 17,000. At the limit the dial fails with `AddrInUse`.
const SOURCE_PORTS_TRIED: u32 = 24;

/// Lowest port shown to an application as its client's: those below are taken for a privileged process's by old protocols.
const SOURCE_PORT_MIN: u16 = 1_024;

/// Range of local ports where the namespace's own cannot be read: the kernel's default.
const LOCAL_PORTS_DEFAULT: RangeInclusive<u16> = 32_768..=60_999;

/// One connection to open.
pub struct Dial<'a> {
    pub namespace: &'a Namespace,
    pub exempt: &'a Exemption,
    pub target: SocketAddr,
    pub style: Style<'a>,
    /// For the connect alone. At the limit: [`DialError::TimedOut`].
    pub timeout: Duration,
}

/// From which address.
pub enum Style<'a> {
    /// From one of the namespace's own addresses: `bind`, or the kernel's choice.
    Ordinary { bind: Option<IpAddr> },
    /// To the workload itself, from its client's true address (capture.md 3.2 A): by way of `lo`, marked, and with a source port
    /// outside of those that the namespace gives to its own sockets.
    Transparent {
        client: IpAddr,
        /// The mark of captured packets, by which answers find back to `lo`.
        mark: u32,
        /// The client is in this namespace itself, under one of its addresses, loopback included: answers to that come by its
        /// own interface, so the socket is neither marked nor bound to a device.
        local: bool,
        /// Told the source and the target before the connect; needed where the kernel must know a delivery by its addresses
        /// (the host's namespace). What it returns an error for is not dialled.
        announce: Option<&'a (dyn Fn(SocketAddr, SocketAddr) -> io::Result<()> + Sync)>,
    },
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The other side answered with a reset: nothing listens there.
    #[error("{target} refused the connection")]
    Refused { target: SocketAddr },
    /// No answer within the time.
    #[error("{target} did not answer within {} ms", within.as_millis())]
    TimedOut { target: SocketAddr, within: Duration },
    /// No way leads there.
    #[error("{target} cannot be reached: {source}")]
    Unreachable { target: SocketAddr, source: io::Error },
    /// The socket could not be made, exempted or bound.
    #[error("cannot open a socket towards {target}: {call}: {source}")]
    Kernel { target: SocketAddr, call: &'static str, source: io::Error },
}

/// Opens one connection. Cancel-safe: a dropped dial leaves nothing behind.
pub async fn dial(dial: Dial<'_>) -> Result<TcpStream, DialError> {
    let target = dial.target;
    let within = dial.timeout;
    tokio::time::timeout(within, connect(&dial)).await.unwrap_or(Err(DialError::TimedOut { target, within }))
}

async fn connect(dial: &Dial<'_>) -> Result<TcpStream, DialError> {
    let target = SocketAddr::new(dial.target.ip().to_canonical(), dial.target.port());
    match &dial.style {
        Style::Ordinary { bind } => {
            let socket = open(dial, target, |socket| {
                if let Some(address) = bind {
                    set_bind_address_no_port(socket.as_fd())?;
                    socket.bind(&SocketAddr::new(address.to_canonical(), 0).into())?;
                }
                Ok(())
            })
            .map_err(|(call, source)| DialError::Kernel { target, call, source })?;
            finish(socket, target).await.map_err(|source| blame(target, source))
        }
        Style::Transparent { client, mark, local, announce } => {
            let mark = (!local).then_some(*mark);
            let client = client.to_canonical();
            let ports = local_ports(dial.namespace);
            let mut ports_left = SOURCE_PORTS_TRIED;
            loop {
                let source = SocketAddr::new(client, source_port(&ports, &mut rand::rng()));
                let outcome = transparent(dial, target, source, mark, *announce).await;
                if let Some(settled) = settled(outcome, target, &mut ports_left) {
                    return settled;
                }
            }
        }
    }
}

/// What a dial from one port has come to; `None`: it is taken, and another is to be tried.
fn settled<T>(
    outcome: Result<T, DialError>,
    target: SocketAddr,
    ports_left: &mut u32,
) -> Option<Result<T, DialError>> {
    match outcome {
        // The port, or this very pair of addresses, is taken.
        Err(DialError::Kernel { source, .. } | DialError::Unreachable { source, .. })
            if matches!(source.raw_os_error(), Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL)) =>
        {
            *ports_left = ports_left.saturating_sub(1);
            (*ports_left == 0).then_some(Err(DialError::Kernel {
                target,
                call: "choose a source port",
                source,
            }))
        }
        outcome => Some(outcome),
    }
}

async fn transparent(
    dial: &Dial<'_>,
    target: SocketAddr,
    source: SocketAddr,
    mark: Option<u32>,
    announce: Option<&(dyn Fn(SocketAddr, SocketAddr) -> io::Result<()> + Sync)>,
) -> Result<TcpStream, DialError> {
    let socket = open(dial, target, |socket| {
        if let Some(mark) = mark {
            if source.is_ipv4() {
                socket.set_ip_transparent_v4(true)?;
            } else {
                set_transparent_v6(socket.as_fd())?;
            }
            socket.set_mark(mark)?;
            socket.bind_device(Some(b"lo"))?;
        }
        // Several connections of one client may share a port as long as their targets differ; the connect finds out.
        socket.set_reuse_address(true)?;
        if let Some(bytes) = LOOPBACK_BUFFER_BYTES {
            socket.set_send_buffer_size(bytes)?;
            socket.set_recv_buffer_size(bytes)?;
        }
        socket.bind(&source.into())
    })
    .map_err(|(call, source)| DialError::Kernel { target, call, source })?;
    if let Some(announce) = announce {
        announce(source, target).map_err(|source| DialError::Kernel {
            target,
            call: "announce the delivery",
            source,
        })?;
    }
    finish(socket, target).await.map_err(|source| blame(target, source))
}

/// Makes the socket in the namespace and prepares it there.
fn open(
    dial: &Dial<'_>,
    target: SocketAddr,
    prepare: impl FnOnce(&Socket) -> io::Result<()>,
) -> Result<Socket, (&'static str, io::Error)> {
    let made = dial
        .namespace
        .visit(|| Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP)))
        .map_err(|error| ("setns", error))?;
    // From here on the namespace is the socket's own, wherever the thread is.
    let socket = made.map_err(|error| ("socket", error))?;
    (dial.exempt)(socket.as_fd()).map_err(|error| ("exempt", error))?;
    socket.set_nonblocking(true).map_err(|error| ("set_nonblocking", error))?;
    socket.set_tcp_nodelay(true).map_err(|error| ("TCP_NODELAY", error))?;
    prepare(&socket).map_err(|error| ("bind", error))?;
    Ok(socket)
}

async fn finish(socket: Socket, target: SocketAddr) -> io::Result<TcpStream> {
    TcpSocket::from_std_stream(socket.into()).connect(target).await
}

fn blame(target: SocketAddr, source: io::Error) -> DialError {
    if matches!(source.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset) {
        DialError::Refused { target }
    } else {
        DialError::Unreachable { target, source }
    }
}

/// The ports that the namespace gives to its own sockets (`ip_local_port_range`), which hold for both families.
fn local_ports(namespace: &Namespace) -> RangeInclusive<u16> {
    namespace
        .visit(|| std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range"))
        .and_then(|text| text)
        .ok()
        .and_then(|text| parse_range(&text))
        .unwrap_or(LOCAL_PORTS_DEFAULT)
}

fn parse_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = text.split_ascii_whitespace().map(str::parse);
    match (numbers.next()?, numbers.next()?, numbers.next()) {
        (Ok(low), Ok(high), None) if low <= high => Some(low..=high),
        _ => None,
    }
}

/// A port at random, outside `local` and not privileged; any unprivileged one where `local` leaves none.
fn source_port(local: &RangeInclusive<u16>, random: &mut impl RngExt) -> u16 {
    let below = SOURCE_PORT_MIN..*local.start().max(&SOURCE_PORT_MIN);
    let above = u32::from(*local.end().max(&(SOURCE_PORT_MIN - 1))) + 1..=u32::from(u16::MAX);
    let below_count = u32::from(below.end - below.start);
    let above_count = u32::from(u16::MAX) + 1 - above.start();
    let count = below_count + above_count;
    if count == 0 {
        return random.random_range(SOURCE_PORT_MIN..=u16::MAX);
    }
    let drawn = random.random_range(0..count);
    let port = if drawn < below_count {
        u32::from(below.start) + drawn
    } else {
        above.start() + drawn - below_count
    };
    u16::try_from(port).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_port(local: RangeInclusive<u16>, allowed: impl Fn(u16) -> bool) {
        let mut random = rand::rng();
        for _ in 0..2_000 {
            let port = source_port(&local, &mut random);
            assert!(allowed(port), "{port} for {local:?}");
        }
    }

    #[test]
    fn a_source_port_is_none_that_the_workload_gives_to_its_own_sockets() {
        check_port(32_768..=60_999, |port| port >= 1_024 && !(32_768..=60_999).contains(&port));
    }

    #[test]
    fn a_range_at_either_end_leaves_the_other() {
        check_port(1..=60_999, |port| port >= 61_000);
        check_port(40_000..=65_535, |port| (1_024..40_000).contains(&port));
        check_port(1..=1_000, |port| port >= 1_024);
    }

    #[test]
    fn a_range_of_everything_leaves_the_unprivileged_ports() {
        check_port(1..=65_535, |port| port >= 1_024);
    }

    /// So many ports are taken; returns how many were tried, and the outcome.
    fn tried(taken: u32, code: i32) -> (u32, Result<(), DialError>) {
        let target = SocketAddr::from(([10, 0, 0, 1], 80));
        let mut ports_left = SOURCE_PORTS_TRIED;
        for tried in 1.. {
            let source = io::Error::from_raw_os_error(code);
            let outcome = if tried > taken { Ok(()) } else { Err(DialError::Unreachable { target, source }) };
            if let Some(settled) = settled(outcome, target, &mut ports_left) {
                return (tried, settled);
            }
        }
        unreachable!("it ends at the limit")
    }

    #[test]
    fn the_last_port_that_is_tried_may_be_the_free_one_and_then_the_dial_fails() {
        for code in [libc::EADDRINUSE, libc::EADDRNOTAVAIL] {
            let (tries, outcome) = tried(SOURCE_PORTS_TRIED - 1, code);
            outcome.expect("one was free");
            assert_eq!(tries, SOURCE_PORTS_TRIED);
            let (tries, outcome) = tried(SOURCE_PORTS_TRIED, code);
            assert_eq!(tries, SOURCE_PORTS_TRIED);
            let Err(DialError::Kernel { call, source, .. }) = outcome else { panic!("{outcome:?}") };
            assert_eq!((call, source.raw_os_error()), ("choose a source port", Some(code)));
        }
        let (tries, outcome) = tried(1, libc::ENETUNREACH);
        outcome.expect_err("no other port helps here");
        assert_eq!(tries, 1);
    }

    #[test]
    fn the_kernels_range_is_read_and_nonsense_is_not() {
        assert_eq!(parse_range("32768\t60999\n"), Some(32_768..=60_999));
        for nonsense in ["", "5", "9 3", "a b", "1 2 3", "1 70000"] {
            assert_eq!(parse_range(nonsense), None, "{nonsense:?}");
        }
    }
}
