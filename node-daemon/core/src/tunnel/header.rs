//! `:authority` of a CONNECT on the tunnel port: an address of the workload that was reached, and nothing else (T-8).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::RESERVED_PORTS;
use crate::workload::Workload;

/// Longest authority, in bytes: a full IPv6 literal in brackets and a port of five digits.
pub const AUTHORITY_BYTES_MAX: usize = 47;

/// Why a tunnel's target is refused; all of them are answered with 400. The peer is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAuthority {
    #[error("the authority is no IP literal with a port, such as 10.8.1.4:8080 or [fd00::4]:8080")]
    NotLiteral,
    #[error("the authority names port 0")]
    PortZero,
    #[error("the authority is {0}, which is no address of the workload that was reached")]
    ForeignAddress(IpAddr),
    #[error("the authority names port {0}, which belongs to the mesh itself")]
    ReservedPort(u16),
    #[error("the authority names port {0} of a host, which the workload does not declare")]
    UndeclaredPort(u16),
}

impl BadAuthority {
    /// The metric's label and the access log's `reason`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::NotLiteral => "authority_not_literal",
            Self::PortZero => "authority_port_zero",
            Self::ForeignAddress(_) => "authority_foreign_address",
            Self::ReservedPort(_) => "authority_reserved_port",
            Self::UndeclaredPort(_) => "authority_undeclared_port",
        }
    }
}

/// Reads `address:port` or `[address]:port`; one spelling of an address and a port, no names, no scopes.
///
/// # Errors
/// [`BadAuthority::NotLiteral`] and [`BadAuthority::PortZero`].
pub fn parse_authority(text: &str) -> Result<SocketAddr, BadAuthority> {
    if text.len() > AUTHORITY_BYTES_MAX {
        return Err(BadAuthority::NotLiteral);
    }
    let (host, port) = text.rsplit_once(':').ok_or(BadAuthority::NotLiteral)?;
    let address = match host.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
        Some(Some(literal)) => literal.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        Some(None) => None,
        None => host.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
    };
    // A v4-mapped address would be a second spelling of an IPv4 one.
    let address =
        address.filter(|address| address.to_canonical() == *address).ok_or(BadAuthority::NotLiteral)?;
    Ok(SocketAddr::new(address, parse_port(port)?))
}

/// Writes the form that [`parse_authority`] reads.
pub fn authority(target: SocketAddr) -> String {
    SocketAddr::new(target.ip().to_canonical(), target.port()).to_string()
}

/// Is this what the workload that was reached may be asked for?
///
/// # Errors
/// The other three variants of [`BadAuthority`].
pub fn check_target(workload: &Workload, target: SocketAddr) -> Result<(), BadAuthority> {
    if !workload.addresses.contains(&target.ip().to_canonical()) {
        return Err(BadAuthority::ForeignAddress(target.ip()));
    }
    if RESERVED_PORTS.contains(&target.port()) {
        return Err(BadAuthority::ReservedPort(target.port()));
    }
    // A host's address is shared: only the declared ports are this workload's.
    if workload.is_host() && !workload.ports.iter().any(|port| port.port == target.port()) {
        return Err(BadAuthority::UndeclaredPort(target.port()));
    }
    Ok(())
}

fn parse_port(text: &str) -> Result<u16, BadAuthority> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(BadAuthority::NotLiteral);
    }
    if text == "0" {
        return Err(BadAuthority::PortZero);
    }
    if text.starts_with('0') {
        return Err(BadAuthority::NotLiteral);
    }
    text.parse().map_err(|_| BadAuthority::NotLiteral)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{at, pod, snapshot, unit, workload};

    #[track_caller]
    fn refused(text: &str, expected: BadAuthority) {
        assert_eq!(parse_authority(text), Err(expected), "{text:?}");
    }

    #[test]
    fn ip_literals_with_a_port_are_read_and_written_alike() {
        for text in ["10.8.1.4:8080", "[fd00:8:1::4]:1", "255.255.255.255:65535", "[::1]:80"] {
            let target = parse_authority(text).expect("a literal");
            assert_eq!(authority(target), text);
        }
        assert_eq!(authority(at("[::ffff:10.8.1.4]:80")), "10.8.1.4:80");
    }

    #[test]
    fn everything_else_is_refused() {
        // T-8
        for text in [
            "",
            ":",
            ":80",
            "10.8.1.4",
            "10.8.1.4:",
            "10.8.1.4:http",
            "10.8.1.4:+80",
            "10.8.1.4:-1",
            "10.8.1.4: 80",
            "10.8.1.4:080",
            "10.8.1.4:00",
            "10.8.1.4:65536",
            "10.8.1.4:99999999999",
            "10.8.1.4:80:80",
            "10.8.1.4:80/",
            "10.8.1.4:80\0",
            " 10.8.1.4:80",
            "10.8.1:80",
            "10.8.1.004:80",
            "0x0a080104:80",
            "168296708:80",
            "[10.8.1.4]:80",
            "fd00::4:80",
            "[fd00::4]",
            "[fd00::4]80",
            "[fd00::4:80",
            "fd00::4]:80",
            "[[fd00::4]]:80",
            "[fd00::4%1]:80",
            "[fe80::1%eth0]:80",
            "[::ffff:10.8.1.4]:80",
            "localhost:80",
            "photo-backend.photo.svc.cluster.local:80",
            "user@10.8.1.4:80",
            "http://10.8.1.4:80",
            "١٠.8.1.4:80",
            "10.8.1.4:٨٠",
        ] {
            refused(text, BadAuthority::NotLiteral);
        }
        refused("10.8.1.4:0", BadAuthority::PortZero);
        refused("[fd00::4]:0", BadAuthority::PortZero);
    }

    #[test]
    fn the_longest_literal_is_read_and_nothing_longer() {
        let longest = "[1111:2222:3333:4444:5555:6666:7777:8888]:65535";
        assert_eq!(longest.len(), AUTHORITY_BYTES_MAX);
        assert!(parse_authority(longest).is_ok());
        refused(&format!("{longest}0"), BadAuthority::NotLiteral);
    }

    #[test]
    fn only_own_addresses_and_ports_of_the_application_may_be_asked_for() {
        // T-8
        let world = snapshot(&format!("{}\n---\n{}", pod("web", "10.8.1.4", ""), unit("db", 81)));
        let (web, db) = (workload(&world, "web"), workload(&world, "db"));
        for target in ["10.8.1.4:80", "10.8.1.4:1", "[::ffff:10.8.1.4]:80"] {
            assert_eq!(check_target(&web, at(target)), Ok(()), "{target}");
        }
        for target in
            ["127.0.0.1:80", "169.254.169.254:80", "10.8.1.5:80", "10.9.0.2:81", "[::1]:80", "0.0.0.0:80"]
        {
            let foreign = Err(BadAuthority::ForeignAddress(at(target).ip()));
            assert_eq!(check_target(&web, at(target)), foreign, "{target}");
        }
        for port in RESERVED_PORTS {
            let reserved = Err(BadAuthority::ReservedPort(port));
            assert_eq!(check_target(&web, at(&format!("10.8.1.4:{port}"))), reserved);
        }
        assert_eq!(check_target(&db, at("10.9.0.2:81")), Ok(()));
        assert_eq!(check_target(&db, at("10.9.0.2:22")), Err(BadAuthority::UndeclaredPort(22)));
    }
}
