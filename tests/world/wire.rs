//! What somebody on the wire between the nodes sees.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::namespace::Namespace;

/// Room for what arrives while the reader is not scheduled: several seconds of a busy link.
const QUEUE_BYTES: usize = 256 * 1024 * 1024;

/// Larger than any segment that segmentation offload leaves whole.
const FRAME_BYTES_MAX: usize = 256 * 1024;

/// How often an idle reader looks whether it shall end.
const TURN_MILLISECONDS: i64 = 50;

/// Ports whose payload is encrypted by the mesh.
pub const ENCRYPTED_PORTS: [u16; 2] = [15008, 15012];

/// A capture under way.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    reader: JoinHandle<Seen>,
    wire: std::path::PathBuf,
}

/// What was seen on the wire.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// TCP payload bytes by sender and receiver.
    pub flows: BTreeMap<(SocketAddr, SocketAddr), u64>,
    /// How often the needle occurred in TCP payload, whatever the port.
    pub needles: u64,
    /// All frames.
    pub frames: u64,
    /// Frames that the capture missed: then a zero proves nothing.
    pub missed: u64,
}

impl Seen {
    /// TCP payload bytes of connections that are not the mesh's own.
    pub fn plaintext_bytes(&self) -> u64 {
        self.sum(|port| !ENCRYPTED_PORTS.contains(&port))
    }

    /// TCP payload bytes from or to a port.
    pub fn port_bytes(&self, port: u16) -> u64 {
        self.flows
            .iter()
            .filter(|((from, to), _)| from.port() == port || to.port() == port)
            .map(|(_, bytes)| bytes)
            .sum()
    }

    fn sum(&self, both: impl Fn(u16) -> bool) -> u64 {
        self.flows
            .iter()
            .filter(|((from, to), _)| both(from.port()) && both(to.port()))
            .map(|(_, bytes)| bytes)
            .sum()
    }

    /// Nothing of an application's went over the wire in the clear, and the capture missed nothing.
    ///
    /// # Panics
    /// If it is not so, with the connections that leaked.
    #[track_caller]
    pub fn assert_no_plaintext(&self) {
        assert_eq!(self.missed, 0, "the capture missed frames: it proves nothing");
        let leaked: Vec<_> = self
            .flows
            .iter()
            .filter(|((from, to), _)| {
                !ENCRYPTED_PORTS.contains(&from.port()) && !ENCRYPTED_PORTS.contains(&to.port())
            })
            .take(10)
            .collect();
        assert_eq!(self.plaintext_bytes(), 0, "plaintext between the nodes: {leaked:?}");
        assert_eq!(self.needles, 0, "the needle crossed the wire in the clear");
    }
}

/// Captures all that passes one interface of the wire's namespace, and looks for a needle in it.
///
/// # Errors
/// If a packet socket cannot be opened.
pub(crate) fn start(wire: &Namespace, interface: &str, needle: &str) -> Result<Capture> {
    let (packets, index) = wire.run(|| -> Result<_> { Ok((open()?, interface_index(interface)?)) })?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let needle = needle.as_bytes().to_vec();
    let reader = std::thread::spawn(move || read(&packets, index, &needle, &stopped));
    Ok(Capture { stop, reader, wire: wire.path().to_owned() })
}

impl Capture {
    /// Ends the capture after all that is queued has been read.
    ///
    /// # Panics
    /// If the reader failed.
    pub fn stop(self) -> Seen {
        let missed = missed(&self.wire);
        self.stop.store(true, Ordering::Relaxed);
        let mut seen = self.reader.join().expect("the reader does not panic");
        seen.missed = missed;
        seen
    }
}

/// Hears all protocols on all interfaces of the calling thread's namespace.
fn open() -> Result<OwnedFd> {
    let packets = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .context("opening a packet socket")?;
    setsockopt(&packets, sockopt::RcvBufForce, &QUEUE_BYTES)?;
    setsockopt(&packets, sockopt::ReceiveTimeout, &TimeVal::milliseconds(TURN_MILLISECONDS))?;
    Ok(packets)
}

/// From sysfs of the namespace would need a mount; the kernel answers by name as well.
fn interface_index(name: &str) -> Result<usize> {
    let index = nix::net::if_::if_nametoindex(name).with_context(|| format!("the interface {name}"))?;
    Ok(usize::try_from(index)?)
}

/// The kernel's own count of frames that found the queue full.
fn missed(wire: &std::path::Path) -> u64 {
    let listed = Command::new("nsenter")
        .arg(format!("--net={}", wire.display()))
        .args(["ss", "--packet", "--memory", "--no-header"])
        .output()
        .expect("ss (package iproute2) runs");
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let counts: Vec<u64> = text
        .split("skmem:(")
        .skip(1)
        .filter_map(|memory| memory.split(')').next()?.rsplit(",d").next()?.parse().ok())
        .collect();
    assert!(!counts.is_empty(), "ss does not list the packet socket: {text:?}");
    counts.iter().sum()
}

fn read(packets: &OwnedFd, interface: usize, needle: &[u8], stop: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    let mut buffer = vec![0; FRAME_BYTES_MAX];
    loop {
        match recvfrom::<LinkAddr>(packets.as_raw_fd(), &mut buffer) {
            Ok((length, Some(from))) if from.ifindex() == interface => {
                seen.frames += 1;
                if let Some((flow, payload)) = tcp(&buffer[..length]) {
                    *seen.flows.entry(flow).or_default() += payload.len() as u64;
                    seen.needles += occurrences(payload, needle);
                }
            }
            Ok(_) | Err(Errno::EINTR) => {}
            // The queue is empty: everything sent before the wish to stop has been read.
            Err(Errno::EAGAIN) => {
                if stop.load(Ordering::Relaxed) {
                    return seen;
                }
            }
            Err(error) => panic!("reading a packet socket: {error}"),
        }
    }
}

type Flow = (SocketAddr, SocketAddr);

/// Addresses and payload of an Ethernet frame that carries TCP over IPv4 or IPv6.
fn tcp(frame: &[u8]) -> Option<(Flow, &[u8])> {
    let (kind, packet) = (frame.get(12..14)?, frame.get(14..)?);
    let (from, to, segment): (IpAddr, IpAddr, &[u8]) = match kind {
        [0x08, 0x00] => {
            let header = usize::from(packet.first()? & 0x0f) * 4;
            let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            if *packet.get(9)? != 6 {
                return None;
            }
            let from: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            (
                Ipv4Addr::from(from).into(),
                Ipv4Addr::from(to).into(),
                packet.get(header..total.min(packet.len()))?,
            )
        }
        [0x86, 0xdd] => {
            let length = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
            if *packet.get(6)? != 6 {
                return None;
            }
            let from: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            let to: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            (
                Ipv6Addr::from(from).into(),
                Ipv6Addr::from(to).into(),
                packet.get(40..(40 + length).min(packet.len()))?,
            )
        }
        _ => return None,
    };
    let source = u16::from_be_bytes([*segment.first()?, *segment.get(1)?]);
    let destination = u16::from_be_bytes([*segment.get(2)?, *segment.get(3)?]);
    let header = usize::from(*segment.get(12)? >> 4) * 4;
    Some(((SocketAddr::new(from, source), SocketAddr::new(to, destination)), segment.get(header..)?))
}

fn occurrences(payload: &[u8], needle: &[u8]) -> u64 {
    let Some(first) = needle.first() else { return 0 };
    let mut count = 0;
    let mut rest = payload;
    while let Some(offset) = rest.iter().position(|byte| byte == first) {
        rest = &rest[offset..];
        if rest.starts_with(needle) {
            count += 1;
            rest = &rest[needle.len()..];
        } else {
            rest = &rest[1..];
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_needle_is_found_wherever_it_stands() {
        assert_eq!(occurrences(b"xxneedleneedneedle", b"needle"), 2);
        assert_eq!(occurrences(b"needl", b"needle"), 0);
        assert_eq!(occurrences(b"", b"needle"), 0);
    }

    #[test]
    fn ethernet_padding_is_no_payload() {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0, 0, 41, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x1f, 0x90, 0x00, 0x50, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0, b'x']);
        frame.extend([0; 10]);
        let ((from, to), payload) = tcp(&frame).expect("it is TCP");
        assert_eq!(
            (from.to_string(), to.to_string()),
            ("10.0.0.1:8080".to_owned(), "10.0.0.2:80".to_owned())
        );
        assert_eq!(payload, b"x");
    }
}
