//! TCP sockets of a namespace by their addresses (`NETLINK_SOCK_DIAG`, linux/inet_diag.h): whose they are, which exist, and
//! their end.
//!
//! [`Diag::open`] -> [`Diag::find`] (one, exactly), [`Diag::list`] (all in some states), [`Diag::destroy`] (end one).

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

use super::Namespace;

/// Bytes of one read. A dump comes in datagrams of at most 32 KiB (`netlink_dump`); twice that leaves no doubt.
const READ_BYTES: usize = 64 * 1024;

/// How long the kernel may take for an answer. It answers from memory; beyond this the query fails.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Sockets that one list may hold. Reckoning: 28,000 local ports towards a handful of services, times two families.
/// At the limit the list ends and says so with [`io::ErrorKind::FileTooLarge`].
pub const SOCKETS_LISTED_MAX: usize = 262_144;

/// States of a TCP socket, numbered as the kernel does (`net/tcp_states.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    Established = 1,
    SynSent = 2,
    SynReceived = 3,
    FinWait1 = 4,
    FinWait2 = 5,
    TimeWait = 6,
    Close = 7,
    CloseWait = 8,
    LastAck = 9,
    Listen = 10,
    Closing = 11,
}

impl State {
    /// States in which a connection still carries or will carry bytes.
    pub const LIVE: [Self; 7] = [
        Self::Established,
        Self::SynReceived,
        Self::FinWait1,
        Self::FinWait2,
        Self::CloseWait,
        Self::LastAck,
        Self::Closing,
    ];

    const ALL: [Self; 11] = [
        Self::Established,
        Self::SynSent,
        Self::SynReceived,
        Self::FinWait1,
        Self::FinWait2,
        Self::TimeWait,
        Self::Close,
        Self::CloseWait,
        Self::LastAck,
        Self::Listen,
        Self::Closing,
    ];

    fn from_number(number: u8) -> Option<Self> {
        // TCP_NEW_SYN_RECV, the request that has no full socket yet, is reported as SYN_RECV by most kernels, as 12 by some.
        if number == 12 {
            return Some(Self::SynReceived);
        }
        Self::ALL.into_iter().find(|state| *state as u8 == number)
    }
}

/// One TCP socket as the kernel describes it. Addresses that are v4-mapped are given as IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// The socket's own side.
    pub local: SocketAddr,
    /// The other side; port 0 for a listener.
    pub remote: SocketAddr,
    pub state: State,
    /// Id of the cgroup in which the socket was made (`INET_DIAG_CGROUP_ID`); `None` where the kernel does not say (TIME_WAIT).
    pub cgroup: Option<u64>,
    /// 0 for a connection that nobody has accepted yet.
    pub inode: u32,
    handle: Handle,
}

/// What names exactly this socket to the kernel, so that another one that reuses its ports is never meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Handle {
    family: u8,
    id: [u8; SOCKET_ID_BYTES],
}

impl TcpSocket {
    /// Number of the socket, unique within one boot. Used to recognise it in a later list.
    pub fn cookie(&self) -> [u8; 8] {
        let mut cookie = [0; 8];
        cookie.copy_from_slice(&self.handle.id[COOKIE_AT..]);
        cookie
    }
}

/// A socket for questions about one namespace. It keeps the namespace alive: drop it soon.
#[derive(Debug)]
pub struct Diag {
    socket: Socket,
    sequence: u32,
}

/// Whether this kernel ends connections on request, tried on one of our own over loopback.
///
/// # Errors
/// Why it does not: [`io::ErrorKind::Unsupported`] without CONFIG_INET_DIAG_DESTROY, [`io::ErrorKind::PermissionDenied`] without
/// CAP_NET_ADMIN.
pub fn probe_destroy() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = TcpStream::connect_timeout(&listener.local_addr()?, ANSWER_WITHIN)?;
    let mut diag = Diag::open_here()?;
    let found = diag.find(client.local_addr()?, client.peer_addr()?)?;
    match found.map(|socket| diag.destroy(&socket)).transpose()? {
        Some(true) => Ok(()),
        Some(false) | None => Err(io::Error::other("a socket of our own was not found to be ended")),
    }
}

impl Diag {
    /// Opens it inside `namespace`.
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        namespace.visit(Self::open_here)?
    }

    /// Opens it in the namespace of the calling thread.
    pub fn open_here() -> io::Result<Self> {
        Self::open_within(ANSWER_WITHIN)
    }

    fn open_within(answer_within: Duration) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::from(libc::AF_NETLINK),
            Type::DGRAM,
            Some(Protocol::from(libc::NETLINK_SOCK_DIAG)),
        )?;
        socket.set_read_timeout(Some(answer_within))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// The socket of `local` in its connection with `remote`, if there is one.
    pub fn find(&mut self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<TcpSocket>> {
        let request = Request::one(local, remote);
        let mut found = None;
        let answer = self.ask(SOCK_DIAG_BY_FAMILY, 0, &request.bytes(), |socket| {
            // Where no connection matches the kernel offers the listener instead; that is not the socket asked for.
            if socket.local == canonical(local) && socket.remote == canonical(remote) {
                found = Some(socket);
            }
            Ok(())
        });
        match answer {
            Ok(()) => Ok(found),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All sockets of both families in one of `states`.
    pub fn list(&mut self, states: &[State]) -> io::Result<Vec<TcpSocket>> {
        self.list_within(states, SOCKETS_LISTED_MAX)
    }

    fn list_within(&mut self, states: &[State], sockets_max: usize) -> io::Result<Vec<TcpSocket>> {
        let mut sockets = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let request = Request::all(family, states);
            self.ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &request.bytes(), |socket| {
                add_within(&mut sockets, socket, sockets_max)
            })?;
        }
        Ok(sockets)
    }

    /// Ends a connection as if it had been reset; both of its ends learn of it. True if it was still there.
    /// Needs CAP_NET_ADMIN and a kernel with CONFIG_INET_DIAG_DESTROY ([`io::ErrorKind::Unsupported`] without).
    pub fn destroy(&mut self, socket: &TcpSocket) -> io::Result<bool> {
        let request = Request { family: socket.handle.family, states: 0, id: socket.handle.id };
        match self.ask(SOCK_DESTROY, NLM_F_ACK, &request.bytes(), |_| Ok(())) {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel cannot destroy sockets (CONFIG_INET_DIAG_DESTROY is not set)",
            )),
            Err(error) => Err(error),
        }
    }

    /// Sends one request and hands over each socket of the answer.
    fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        payload: &[u8],
        mut each: impl FnMut(TcpSocket) -> io::Result<()>,
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = netlink_message(kind, NLM_F_REQUEST | flags, self.sequence, payload)?;
        (&self.socket).write_all(&message)?;
        let expects_many = flags & NLM_F_DUMP != 0;
        let mut buffer = vec![0; READ_BYTES];
        let mut outcome = Ok(());
        loop {
            let read = (&self.socket).read(&mut buffer)?;
            let mut rest = &buffer[..read];
            while let Some((header, body, after)) = next_message(rest)? {
                rest = after;
                if header.sequence != self.sequence {
                    continue;
                }
                match header.kind {
                    NLMSG_DONE => return outcome,
                    NLMSG_ERROR => {
                        let code = body
                            .first_chunk()
                            .map(|bytes| i32::from_ne_bytes(*bytes))
                            .unwrap_or(-libc::EPROTO);
                        return if code == 0 { outcome } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    SOCK_DIAG_BY_FAMILY => {
                        if outcome.is_ok()
                            && let Some(socket) = parse_socket(body)
                        {
                            // The rest of a dump is read even after a refusal, or the next question would meet it.
                            outcome = each(socket);
                        }
                        if !expects_many && flags & NLM_F_ACK == 0 {
                            return outcome;
                        }
                    }
                    _ => {}
                }
            }
        }
    }
}

fn add_within(sockets: &mut Vec<TcpSocket>, socket: TcpSocket, sockets_max: usize) -> io::Result<()> {
    if sockets.len() == sockets_max {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("more than {sockets_max} TCP sockets in one namespace"),
        ));
    }
    sockets.push(socket);
    Ok(())
}

// From linux/netlink.h, linux/sock_diag.h and linux/inet_diag.h.
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const INET_DIAG_CGROUP_ID: u16 = 21;
const NETLINK_HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = 56;
/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const SOCKET_ID_BYTES: usize = 48;
const COOKIE_AT: usize = 40;
/// `struct inet_diag_msg`.
const ANSWER_BYTES: usize = 72;
const INODE_AT: usize = 68;

/// `struct inet_diag_req_v2` for TCP.
struct Request {
    family: u8,
    states: u32,
    id: [u8; SOCKET_ID_BYTES],
}

impl Request {
    fn one(local: SocketAddr, remote: SocketAddr) -> Self {
        let (local, remote) = (canonical(local), canonical(remote));
        let mut id = [0; SOCKET_ID_BYTES];
        id[0..2].copy_from_slice(&local.port().to_be_bytes());
        id[2..4].copy_from_slice(&remote.port().to_be_bytes());
        put_address(&mut id[4..20], local.ip());
        put_address(&mut id[20..36], remote.ip());
        // INET_DIAG_NOCOOKIE: any socket with these addresses.
        id[COOKIE_AT..].fill(0xff);
        Self { family: family_of(local.ip()), states: u32::MAX, id }
    }

    fn all(family: libc::c_int, states: &[State]) -> Self {
        let states = states.iter().fold(0, |mask, state| mask | 1_u32 << *state as u8);
        let family = if family == libc::AF_INET6 { FAMILY_V6 } else { FAMILY_V4 };
        Self { family, states, id: [0; SOCKET_ID_BYTES] }
    }

    fn bytes(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0] = self.family;
        bytes[1] = PROTOCOL_TCP;
        bytes[4..8].copy_from_slice(&self.states.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.id);
        bytes
    }
}

const FAMILY_V4: u8 = 2;
const FAMILY_V6: u8 = 10;
const PROTOCOL_TCP: u8 = 6;

fn family_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { FAMILY_V4 } else { FAMILY_V6 }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn put_address(into: &mut [u8], address: IpAddr) {
    match address {
        IpAddr::V4(v4) => into[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => into.copy_from_slice(&v6.octets()),
    }
}

fn netlink_message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(NETLINK_HEADER_BYTES + payload.len()).map_err(io::Error::other)?;
    let mut message = Vec::with_capacity(NETLINK_HEADER_BYTES + payload.len());
    message.extend_from_slice(&length.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&sequence.to_ne_bytes());
    message.extend_from_slice(&0_u32.to_ne_bytes());
    message.extend_from_slice(payload);
    Ok(message)
}

struct Header {
    kind: u16,
    sequence: u32,
}

/// A message's header, its body, and what follows it in the datagram.
type Message<'a> = (Header, &'a [u8], &'a [u8]);

/// Splits the next message off; `None` at the end of the datagram.
fn next_message(bytes: &[u8]) -> io::Result<Option<Message<'_>>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let broken =
        || io::Error::new(io::ErrorKind::InvalidData, "a netlink message of the kernel is cut short");
    let length = usize::try_from(number(bytes, 0).ok_or_else(broken)?).map_err(io::Error::other)?;
    let sequence = number(bytes, 8).ok_or_else(broken)?;
    let kind = bytes.get(4..6).and_then(|two| two.first_chunk()).map(|two| u16::from_ne_bytes(*two));
    let kind = kind.ok_or_else(broken)?;
    let body = bytes.get(NETLINK_HEADER_BYTES..length).ok_or_else(broken)?;
    let after = bytes.get(aligned(length)..).unwrap_or_default();
    Ok(Some((Header { kind, sequence }, body, after)))
}

fn parse_socket(body: &[u8]) -> Option<TcpSocket> {
    let family = *body.first()?;
    let state = State::from_number(*body.get(1)?)?;
    let id: [u8; SOCKET_ID_BYTES] = *body.get(4..4 + SOCKET_ID_BYTES)?.first_chunk()?;
    let local = SocketAddr::new(address(family, &id[4..20])?, u16::from_be_bytes([id[0], id[1]]));
    let remote = SocketAddr::new(address(family, &id[20..36])?, u16::from_be_bytes([id[2], id[3]]));
    let inode = number(body, INODE_AT)?;
    let cgroup = attribute(body.get(ANSWER_BYTES..)?, INET_DIAG_CGROUP_ID)
        .and_then(|value| value.first_chunk())
        .map(|value| u64::from_ne_bytes(*value));
    Some(TcpSocket { local, remote, state, cgroup, inode, handle: Handle { family, id } })
}

fn address(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match family {
        FAMILY_V4 => Some(IpAddr::V4(Ipv4Addr::from(*bytes.first_chunk::<4>()?))),
        FAMILY_V6 => Some(IpAddr::V6(Ipv6Addr::from(*bytes.first_chunk::<16>()?)).to_canonical()),
        _ => None,
    }
}

/// Value of the first attribute of this kind; `None` also where an attribute is cut short.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let [l0, l1, k0, k1] = *bytes.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = bytes.get(4..length)?;
        if u16::from_ne_bytes([k0, k1]) == wanted {
            return Some(value);
        }
        bytes = bytes.get(aligned(length)..)?;
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..at + 4)?.first_chunk()?))
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_says_whether_connections_can_be_ended() {
        match probe_destroy() {
            Ok(()) => {}
            Err(error) => assert!(
                matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported),
                "{error}"
            ),
        }
    }

    /// An answer of the kernel for one socket, then `attributes`.
    fn answer(
        family: u8,
        state: u8,
        local: (&[u8], u16),
        remote: (&[u8], u16),
        attributes: &[u8],
    ) -> Vec<u8> {
        let mut body = vec![0; ANSWER_BYTES];
        body[0] = family;
        body[1] = state;
        body[4..6].copy_from_slice(&local.1.to_be_bytes());
        body[6..8].copy_from_slice(&remote.1.to_be_bytes());
        body[8..8 + local.0.len()].copy_from_slice(local.0);
        body[24..24 + remote.0.len()].copy_from_slice(remote.0);
        body[INODE_AT..INODE_AT + 4].copy_from_slice(&77_u32.to_ne_bytes());
        body.extend_from_slice(attributes);
        body
    }

    fn cgroup_attribute(id: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        // An attribute that is not asked for comes first, with a length that needs padding.
        bytes.extend_from_slice(&5_u16.to_ne_bytes());
        bytes.extend_from_slice(&8_u16.to_ne_bytes());
        bytes.extend_from_slice(&[1, 0, 0, 0]);
        bytes.extend_from_slice(&12_u16.to_ne_bytes());
        bytes.extend_from_slice(&INET_DIAG_CGROUP_ID.to_ne_bytes());
        bytes.extend_from_slice(&id.to_ne_bytes());
        bytes
    }

    #[test]
    fn an_answer_names_both_ends_state_and_cgroup() {
        let body =
            answer(FAMILY_V4, 1, (&[10, 0, 0, 1], 40000), (&[10, 0, 0, 2], 80), &cgroup_attribute(4711));
        let socket = parse_socket(&body).expect("well formed");
        assert_eq!(socket.local, "10.0.0.1:40000".parse().expect("an address"));
        assert_eq!(socket.remote, "10.0.0.2:80".parse().expect("an address"));
        assert_eq!((socket.state, socket.cgroup, socket.inode), (State::Established, Some(4711), 77));
    }

    #[test]
    fn a_mapped_address_is_given_as_ipv4() {
        let mapped = Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets();
        let body = answer(FAMILY_V6, 8, (&mapped, 1), (&mapped, 2), &[]);
        let socket = parse_socket(&body).expect("well formed");
        assert_eq!(socket.local, "10.0.0.1:1".parse().expect("an address"));
        assert_eq!(socket.cgroup, None);
    }

    #[test]
    fn what_is_cut_short_or_of_another_kind_is_no_socket() {
        let whole = answer(FAMILY_V4, 1, (&[1, 1, 1, 1], 1), (&[2, 2, 2, 2], 2), &cgroup_attribute(1));
        for length in 0..ANSWER_BYTES {
            assert_eq!(parse_socket(&whole[..length]), None, "{length} bytes");
        }
        assert_eq!(parse_socket(&answer(7, 1, (&[], 1), (&[], 2), &[])), None, "unknown family");
        assert_eq!(parse_socket(&answer(FAMILY_V4, 99, (&[], 1), (&[], 2), &[])), None, "unknown state");
    }

    #[test]
    fn an_attribute_that_lies_about_its_length_names_no_cgroup() {
        for lie in [0_u16, 3, 200] {
            let mut bytes = cgroup_attribute(9);
            bytes[0..2].copy_from_slice(&lie.to_ne_bytes());
            let body = answer(FAMILY_V4, 1, (&[], 1), (&[], 2), &bytes);
            assert_eq!(parse_socket(&body).expect("the fixed part is whole").cgroup, None, "length {lie}");
        }
    }

    #[test]
    fn a_message_that_is_cut_short_is_an_error() {
        let whole = netlink_message(SOCK_DIAG_BY_FAMILY, 0, 5, &[0; 8]).expect("short");
        assert!(next_message(&whole).expect("whole").is_some());
        for length in 1..whole.len() {
            assert!(next_message(&whole[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_request_has_the_layout_of_the_kernel() {
        let request =
            Request::one("10.0.0.1:258".parse().expect("a"), "[::ffff:10.0.0.2]:80".parse().expect("a"));
        let bytes = request.bytes();
        assert_eq!(bytes[..4], [FAMILY_V4, PROTOCOL_TCP, 0, 0]);
        assert_eq!(bytes[8..12], [1, 2, 0, 80]);
        assert_eq!(bytes[12..16], [10, 0, 0, 1]);
        assert_eq!(bytes[28..32], [10, 0, 0, 2]);
        assert_eq!(bytes[48..], [0xff; 8]);
        let states = Request::all(libc::AF_INET, &[State::Established, State::Listen]).states;
        assert_eq!(states, 1 << 1 | 1 << 10);
    }

    #[test]
    fn a_list_holds_as_many_sockets_as_the_limit_says_and_refuses_one_more() {
        let body = answer(FAMILY_V4, 1, (&[10, 0, 0, 1], 1), (&[10, 0, 0, 2], 2), &[]);
        let socket = parse_socket(&body).expect("well formed");
        let mut sockets = Vec::new();
        for _ in 0..3 {
            add_within(&mut sockets, socket, 3).expect("within the limit");
        }
        let refused = add_within(&mut sockets, socket, 3).expect_err("above the limit");
        assert_eq!((refused.kind(), sockets.len()), (io::ErrorKind::FileTooLarge, 3));
    }

    #[test]
    fn after_a_list_that_was_refused_the_next_question_is_answered() {
        let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port is free"));
        let mut diag = Diag::open_here().expect("sock_diag needs no privilege");
        let refused = diag.list_within(&[State::Listen], 2).expect_err("three listen");
        assert_eq!(refused.kind(), io::ErrorKind::FileTooLarge);
        let listed = diag.list(&[State::Listen]).expect("the rest of the refused list is not in the way");
        for listener in listeners {
            let local = listener.local_addr().expect("bound");
            assert!(listed.iter().any(|socket| socket.local == local));
        }
    }

    #[test]
    fn a_question_without_an_answer_fails() {
        const NLMSG_NOOP: u16 = 1; // which the kernel passes over in silence
        let mut diag = Diag::open_within(Duration::from_millis(1)).expect("sock_diag needs no privilege");
        let failed = diag.ask(NLMSG_NOOP, 0, &[], |_| Ok(())).expect_err("nobody answers");
        assert_eq!(failed.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_live_connection_is_found_from_both_ends_and_a_listener_is_none() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let server = listener.local_addr().expect("bound");
        let client = TcpStream::connect(server).expect("it listens");
        let local = client.local_addr().expect("connected");
        let mut diag = Diag::open_here().expect("sock_diag needs no privilege");
        let found = diag.find(local, server).expect("the kernel answers").expect("it is established");
        assert_eq!((found.local, found.remote), (local, server));
        assert!(diag.find(server, local).expect("the kernel answers").is_some());
        let nobody = SocketAddr::new(local.ip(), if local.port() == 1 { 2 } else { 1 });
        assert_eq!(
            diag.find(server, nobody).expect("the kernel answers"),
            None,
            "the listener is not the answer"
        );
        let listed = diag.list(&[State::Listen]).expect("the kernel answers");
        assert!(listed.iter().any(|socket| socket.local == server));
    }
}
