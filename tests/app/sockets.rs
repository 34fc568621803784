//! The namespace's TCP sockets, as `ss` would list them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use world::protocol::Socket;

/// All of `/proc/net/tcp` and `/proc/net/tcp6`. A namespace without IPv6 has no `tcp6`.
pub(crate) fn listed() -> io::Result<Vec<Socket>> {
    let mut sockets = parse(&std::fs::read_to_string("/proc/net/tcp")?);
    if let Ok(text) = std::fs::read_to_string("/proc/net/tcp6") {
        sockets.extend(parse(&text));
    }
    Ok(sockets)
}

fn parse(text: &str) -> Vec<Socket> {
    text.lines().skip(1).filter_map(line).collect()
}

fn line(line: &str) -> Option<Socket> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let local = address(words.next()?)?;
    let remote = address(words.next()?)?;
    let state = u8::from_str_radix(words.next()?, 16).ok()?;
    Some(Socket { local, remote, state })
}

/// `0100007F:0050`: words of the address in the byte order of the machine.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let words: Vec<u32> = address
        .as_bytes()
        .chunks(8)
        .map(|word| u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok())
        .collect::<Option<_>>()?;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let ip = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(bytes) => IpAddr::V4(Ipv4Addr::from(bytes)),
        Err(_) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?)),
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_hexadecimal_is_read_in_both_families() {
        let four = "  sl\n   0: 0100007F:1F90 0A08000A:C350 01 00000000:00000000 00:00000000";
        assert_eq!(
            parse(four),
            vec![Socket {
                local: "127.0.0.1:8080".parse().expect("an address"),
                remote: "10.0.8.10:50000".parse().expect("an address"),
                state: 1
            }]
        );
        let six = "  sl\n   0: 000000000000000000000000010000000:0050 x";
        assert!(parse(six).is_empty(), "33 digits are no address");
        let six =
            "  sl\n   0: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A";
        assert_eq!(parse(six)[0].local, "[::1]:80".parse().expect("an address"));
    }
}
