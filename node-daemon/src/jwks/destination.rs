//! Where a tenant's URL may lead (T-21): not to what trusts whoever reaches it from this node.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;

use super::KeysConfig;

/// Metadata services outside the link-local range (Alibaba, AWS over IPv6, Oracle).
const METADATA: [&str; 3] = ["100.100.100.200", "fd00:ec2::254", "192.0.0.192"];

/// Prefix of IPv4 addresses inside IPv6 ones (RFC 6052).
const NAT64: [u16; 6] = [0x64, 0xff9b, 0, 0, 0, 0];

/// The first address that may be dialled.
pub(super) fn choose(
    config: &KeysConfig,
    addresses: impl Iterator<Item = SocketAddr>,
) -> Result<SocketAddr, &'static str> {
    let own = own_addresses();
    let mut refusal = "the name has no address";
    for address in addresses {
        match refused(config, plain(address.ip()), &own) {
            None => return Ok(address),
            Some(why) => refusal = why,
        }
    }
    Err(refusal)
}

/// Addresses of this node; none if the kernel does not tell, and then nothing is dialled.
fn own_addresses() -> Option<Vec<IpAddr>> {
    let all = getifaddrs().ok()?;
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    };
    Some(all.filter_map(address).collect())
}

fn refused(config: &KeysConfig, address: IpAddr, own: &Option<Vec<IpAddr>>) -> Option<&'static str> {
    let within = |ranges: &[IpNet]| ranges.iter().any(|range| range.contains(&address));
    if within(&config.allow) {
        return None;
    }
    let Some(own) = own else { return Some("this node's own addresses are not known") };
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.segments()[0] & 0xffc0 == 0xfe80,
    };
    if address.is_loopback() || address.is_unspecified() || address.is_multicast() || is_link_local {
        return Some("it leads to a loopback, link-local, multicast or unspecified address");
    }
    if METADATA.iter().any(|metadata| metadata.parse() == Ok(address)) {
        return Some("it leads to a cloud's metadata service");
    }
    if own.contains(&address) {
        return Some("it leads to this node itself");
    }
    within(&config.refuse).then_some("it leads to the CA or the API server")
}

/// IPv4 is IPv4, however it is written.
fn plain(address: IpAddr) -> IpAddr {
    let address = address.to_canonical();
    if let IpAddr::V6(v6) = address {
        let [a, b, c, d, e, f, high, low] = v6.segments();
        if [a, b, c, d, e, f] == NAT64 {
            return Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, high, low).to_canonical();
        }
    }
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(config: &KeysConfig, addresses: &[&str], expected: Option<&str>) {
        let parsed =
            addresses.iter().map(|address| SocketAddr::new(address.parse().expect("an address"), 443));
        let chosen = choose(config, parsed).ok().map(|chosen| chosen.ip().to_string());
        assert_eq!(chosen.as_deref(), expected, "{addresses:?}");
    }

    #[test]
    fn what_trusts_this_node_is_refused() {
        // T-21
        let config =
            KeysConfig { refuse: vec!["10.9.0.1/32".parse().expect("a range")], ..KeysConfig::default() };
        for address in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "0.0.0.0",
            "::",
            "169.254.169.254",
            "fe80::1",
            "febf::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b::7f00:1",
            "100.100.100.200",
            "fd00:ec2::254",
            "192.0.0.192",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
            "10.9.0.1",
            "::ffff:10.9.0.1",
        ] {
            check(&config, &[address], None);
        }
        for own in own_addresses().expect("the kernel tells") {
            check(&config, &[&own.to_string()], None);
        }
        check(&config, &[], None);
    }

    #[test]
    fn others_and_what_the_operator_lists_are_dialled() {
        let none = KeysConfig::default();
        for address in ["203.0.113.9", "10.77.0.1", "2001:db8::1", "fd00::1"] {
            check(&none, &[address], Some(address));
        }
        check(&none, &["127.0.0.1", "203.0.113.9"], Some("203.0.113.9"));
        let listed =
            KeysConfig { allow: vec!["127.0.0.0/8".parse().expect("a range")], ..KeysConfig::default() };
        check(&listed, &["127.0.0.1"], Some("127.0.0.1"));
        check(&listed, &["::1"], None);
    }
}
