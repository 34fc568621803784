//! Which packets a shortcut may take: segments of TCP that stand for themselves.

use ebpf_abi::{Address, Tuple};

/// Bytes that are read of every packet: the Ethernet header and an IPv6 header, or an IPv4 header without options and a
/// TCP header without options.
pub const HEAD_BYTES: usize = ETHERNET_BYTES + V6_BYTES;

/// Bytes that are read of the TCP header behind an IPv6 header: ports, numbers, flags.
pub const V6_TCP_BYTES: usize = TCP_FLAGS + 1;

/// What a shortcut needs to know of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub tuple: Tuple,
    /// It opens a connection: it takes the way through the host's stack, whose rules decide.
    pub opens: bool,
}

/// The network protocol of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    V4,
    V6,
}

/// What the Ethernet header says.
#[inline(always)]
pub fn network(head: &[u8; HEAD_BYTES]) -> Option<Network> {
    match [head[12], head[13]] {
        [0x08, 0x00] => Some(Network::V4),
        [0x86, 0xdd] => Some(Network::V6),
        _ => None,
    }
}

/// Reads a segment in IPv4. Options and fragments are the host's to judge.
#[inline(always)]
pub fn segment_v4(head: &[u8; HEAD_BYTES]) -> Option<Segment> {
    let is_plain = head[IP] == 0x45;
    let is_fragment = (head[IP + 6] & !DO_NOT_FRAGMENT) | head[IP + 7] != 0;
    if !is_plain || is_fragment || head[IP + 9] != TCP {
        return None;
    }
    let port = |at: usize| u16::from_be_bytes([head[V4_TCP + at], head[V4_TCP + at + 1]]);
    let address =
        |at: usize| Address::v4([head[IP + at], head[IP + at + 1], head[IP + at + 2], head[IP + at + 3]]);
    Some(Segment {
        tuple: Tuple { source: address(12), target: address(16), source_port: port(0), target_port: port(2) },
        opens: head[V4_TCP + TCP_FLAGS] & SYN != 0,
    })
}

/// Reads a segment in IPv6. Extension headers, fragments among them, are the host's to judge.
#[inline(always)]
pub fn segment_v6(head: &[u8; HEAD_BYTES], tcp: &[u8; V6_TCP_BYTES]) -> Option<Segment> {
    if head[IP] >> 4 != 6 || head[IP + 6] != TCP {
        return None;
    }
    let mut source = [0; 16];
    let mut target = [0; 16];
    let mut at = 0;
    while at < 16 {
        source[at] = head[IP + 8 + at];
        target[at] = head[IP + 24 + at];
        at += 1;
    }
    Some(Segment {
        tuple: Tuple {
            source: Address(source),
            target: Address(target),
            source_port: u16::from_be_bytes([tcp[0], tcp[1]]),
            target_port: u16::from_be_bytes([tcp[2], tcp[3]]),
        },
        opens: tcp[TCP_FLAGS] & SYN != 0,
    })
}

const ETHERNET_BYTES: usize = 14;
const V6_BYTES: usize = 40;
const IP: usize = ETHERNET_BYTES;
const V4_TCP: usize = IP + 20;
const TCP_FLAGS: usize = 13;
const DO_NOT_FRAGMENT: u8 = 0x40;
const TCP: u8 = 6;
const SYN: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    const ACK: u8 = 0x10;

    fn v4(flags: u8) -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        head[12..14].copy_from_slice(&[0x08, 0x00]);
        head[IP] = 0x45;
        head[IP + 6] = DO_NOT_FRAGMENT;
        head[IP + 9] = TCP;
        head[IP + 12..IP + 20].copy_from_slice(&[10, 8, 1, 4, 10, 8, 1, 5]);
        head[V4_TCP..V4_TCP + 4].copy_from_slice(&[0xc3, 0x50, 0x1f, 0x90]);
        head[V4_TCP + TCP_FLAGS] = flags;
        head
    }

    fn v6() -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        head[12..14].copy_from_slice(&[0x86, 0xdd]);
        head[IP] = 0x60;
        head[IP + 6] = TCP;
        head[IP + 8] = 0xfd;
        head[IP + 23] = 4;
        head[IP + 24] = 0xfd;
        head[IP + 39] = 5;
        head
    }

    fn tcp(flags: u8) -> [u8; V6_TCP_BYTES] {
        [0xc3, 0x50, 0x1f, 0x90, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags]
    }

    #[test]
    fn a_segment_is_read_with_its_tuple() {
        let segment = segment_v4(&v4(ACK)).expect("a segment");
        let expected = Tuple {
            source: Address::v4([10, 8, 1, 4]),
            target: Address::v4([10, 8, 1, 5]),
            source_port: 50_000,
            target_port: 8080,
        };
        assert_eq!(segment, Segment { tuple: expected, opens: false });
        let segment = segment_v6(&v6(), &tcp(ACK)).expect("a segment");
        assert_eq!((segment.tuple.source.0[0], segment.tuple.source.0[15]), (0xfd, 4));
        assert_eq!((segment.tuple.target.0[0], segment.tuple.target.0[15]), (0xfd, 5));
        assert_eq!((segment.tuple.source_port, segment.tuple.target_port), (50_000, 8080));
        assert!(!segment.opens);
    }

    #[test]
    fn what_carries_syn_opens_whatever_else_it_carries() {
        for flags in [SYN, SYN | ACK, SYN | 1, 0xff] {
            assert!(segment_v4(&v4(flags)).is_some_and(|segment| segment.opens), "{flags:#x}");
            assert!(segment_v6(&v6(), &tcp(flags)).is_some_and(|segment| segment.opens), "{flags:#x}");
        }
        for flags in [ACK, ACK | 1, ACK | 8, 4, 0] {
            assert!(segment_v4(&v4(flags)).is_some_and(|segment| !segment.opens), "{flags:#x}");
        }
    }

    #[test]
    fn whatever_is_no_plain_segment_is_the_hosts_to_judge() {
        let changes: [(&str, usize, u8); 7] = [
            ("UDP", IP + 9, 17),
            ("ICMP", IP + 9, 1),
            ("options", IP, 0x46),
            ("another version", IP, 0x65),
            ("more fragments follow", IP + 6, 0x20),
            ("a fragment's offset, high byte", IP + 6, 0x01),
            ("a fragment's offset, low byte", IP + 7, 1),
        ];
        for (what, at, value) in changes {
            let mut head = v4(ACK);
            head[at] = value;
            assert_eq!(segment_v4(&head), None, "{what}");
        }
        let changes: [(&str, usize, u8); 4] = [
            ("UDP", IP + 6, 17),
            ("a fragment", IP + 6, 44),
            ("hop-by-hop options", IP + 6, 0),
            ("another version", IP, 0x45),
        ];
        for (what, at, value) in changes {
            let mut head = v6();
            head[at] = value;
            assert_eq!(segment_v6(&head, &tcp(ACK)), None, "{what}");
        }
    }

    #[test]
    fn only_ip_without_a_tag_is_looked_at() {
        let mut head = v4(ACK);
        assert_eq!((network(&head), network(&v6())), (Some(Network::V4), Some(Network::V6)));
        for kind in [[0x08, 0x06], [0x81, 0x00], [0x88, 0xa8], [0, 0]] {
            head[12..14].copy_from_slice(&kind);
            assert_eq!(network(&head), None, "{kind:?}");
        }
    }
}
