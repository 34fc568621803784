//! Entries of the host's connection tracking (`NETLINK_NETFILTER`, linux/netfilter/nfnetlink_conntrack.h).

use std::{
    io::{self, Write as _},
    net::SocketAddr,
};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Tuple},
};
use nix::libc;
use socket2::{Domain, Protocol as SocketProtocol, Socket, Type};

/// Entries that one call of the kernel removes: some 90 bytes each, so that a batch is a fraction of the socket's send buffer
/// (208 KiB by default).
const BATCH: usize = 256;

/// A socket for changes in one namespace.
#[derive(Debug)]
pub struct Conntrack {
    socket: Socket,
}

impl Conntrack {
    /// Opens it in the namespace of the calling thread. Needs CAP_NET_ADMIN to remove something.
    pub fn open_here() -> io::Result<Self> {
        let socket = Socket::new(
            Domain::from(libc::AF_NETLINK),
            Type::RAW,
            Some(SocketProtocol::from(libc::NETLINK_NETFILTER)),
        )?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }

    /// Removes the entries of TCP connections, each given by its two ends. Those that are not tracked, and all of them in a
    /// kernel without tracking, are no error.
    pub fn forget(&mut self, connections: &[(SocketAddr, SocketAddr)]) -> io::Result<()> {
        for batch in connections.chunks(BATCH) {
            let bytes: Vec<u8> =
                batch.iter().flat_map(|(client, server)| removal(*client, *server)).collect();
            (&self.socket).write_all(&bytes)?;
            self.drain()?;
        }
        Ok(())
    }

    /// The kernel answers where there was nothing to remove; it has done so before a write returns.
    fn drain(&mut self) -> io::Result<()> {
        let mut answer = [std::mem::MaybeUninit::uninit(); 512];
        loop {
            match self.socket.recv(&mut answer) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // More answers than fit: they said the same.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn removal(client: SocketAddr, server: SocketAddr) -> Vec<u8> {
    let (from, to) = (client.ip().to_canonical(), server.ip().to_canonical());
    let family = if from.is_ipv4() { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 };
    let tuple = vec![
        Tuple::Ip(vec![IPTuple::SourceAddress(from), IPTuple::DestinationAddress(to)]),
        Tuple::Proto(vec![
            ProtoTuple::Protocol(Protocol::Tcp),
            ProtoTuple::SourcePort(client.port()),
            ProtoTuple::DestinationPort(server.port()),
        ]),
    ];
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let removal = NetfilterMessage::new(
        NetfilterHeader::new(family, 0, 0),
        ConntrackMessage::Delete(vec![ConntrackAttribute::CtaTupleOrig(tuple)]),
    );
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(removal));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_names_both_ends_and_the_protocol() {
        let bytes = removal("10.8.1.4:50000".parse().expect("ends"), "10.8.1.5:8080".parse().expect("ends"));
        let length = u32::from_ne_bytes(*bytes.first_chunk().expect("a header"));
        assert_eq!((length as usize, bytes.len() % 4), (bytes.len(), 0));
        // IPCTNL_MSG_CT_DELETE of NFNL_SUBSYS_CTNETLINK.
        assert_eq!(u16::from_ne_bytes([bytes[4], bytes[5]]), 0x0102);
        for part in
            [&[10, 8, 1, 4][..], &[10, 8, 1, 5], &50_000_u16.to_be_bytes(), &8080_u16.to_be_bytes(), &[6]]
        {
            assert!(bytes.windows(part.len()).any(|window| window == part), "{part:?}");
        }
    }

    #[test]
    fn a_mapped_address_is_tracked_as_ipv4() {
        let [mapped, plain] = ["[::ffff:10.8.1.4]:1", "10.8.1.4:1"].map(|text| text.parse().expect("an end"));
        let server = "10.8.1.5:8080".parse().expect("an end");
        assert_eq!(removal(mapped, server), removal(plain, server));
    }
}
