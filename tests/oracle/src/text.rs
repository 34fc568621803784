//! The matchers of both ages (policy B-5, B-7, B-13, F-3), addresses and ports.

use std::net::IpAddr;

/// `services` and what is known of a destination beforehand.
pub fn config_time(pattern: &str, seen: Option<&str>) -> bool {
    if pattern == "*" {
        return true;
    }
    let Some(seen) = seen else { return false };
    if pattern.starts_with('*') && pattern.ends_with('*') {
        return seen.starts_with(&pattern[..pattern.len() - 1]) || seen.ends_with(&pattern[1..]);
    }
    if let Some(start) = pattern.strip_suffix('*') {
        return seen.starts_with(start);
    }
    if let Some(end) = pattern.strip_prefix('*') {
        return seen.ends_with(end);
    }
    seen == pattern
}

/// Headers, and what tokens and certificates say: `*` is presence.
pub fn present(pattern: &str, seen: Option<&str>) -> bool {
    let Some(seen) = seen else { return false };
    pattern == "*" || at_one_end(pattern, seen)
}

/// The current API: `*` is anything that is not empty. Also `source.principal` of 2018 (policy G-1).
pub fn filled(pattern: &str, seen: Option<&str>) -> bool {
    let Some(seen) = seen else { return false };
    if pattern == "*" { !seen.is_empty() } else { at_one_end(pattern, seen) }
}

fn at_one_end(pattern: &str, seen: &str) -> bool {
    // `*abc*` is a suffix whose last star is an ordinary character.
    if let Some(end) = pattern.strip_prefix('*') {
        return seen.ends_with(end);
    }
    if let Some(start) = pattern.strip_suffix('*') {
        return seen.starts_with(start);
    }
    seen == pattern
}

/// A star anywhere is any text, none included (policy B-7, `source.namespace`).
pub fn glob(pattern: &str, seen: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == seen,
        Some((head, tail)) => match seen.strip_prefix(head) {
            None => false,
            Some(rest) => (0..=rest.len()).any(|cut| rest.is_char_boundary(cut) && glob(tail, &rest[cut..])),
        },
    }
}

/// The same identity under every trust domain of the mesh (policy B-13).
pub fn in_every_domain(pattern: &str, domains: &[String]) -> Vec<String> {
    let parts: Vec<&str> = pattern.split('/').collect();
    if parts.len() != 5 || parts[1] != "ns" || parts[3] != "sa" {
        return vec![pattern.to_owned()];
    }
    let under = |domain: &String| format!("{domain}/ns/{}/sa/{}", parts[2], parts[4]);
    let first = parts[0];
    if first == "*" {
        return vec![pattern.to_owned()];
    }
    if let Some(end) = first.strip_prefix('*') {
        let mut all = vec![pattern.to_owned()];
        if domains.iter().any(|domain| domain.ends_with(end)) {
            all.extend(domains.iter().map(under));
        }
        return all;
    }
    if first == "cluster.local" || domains.iter().any(|domain| domain == first) {
        return domains.iter().map(under).collect();
    }
    vec![pattern.to_owned()]
}

/// `None`: nobody can use the value (policy G-5).
pub fn in_network(network: &str, address: IpAddr) -> Option<bool> {
    let (text, length) = match network.split_once('/') {
        Some((text, length)) => (text, Some(length.parse::<u32>().ok()?)),
        None => (network, None),
    };
    let (own, bits) = bits(text.parse::<IpAddr>().ok()?);
    let (seen, seen_bits) = bits_of_seen(address);
    let length = length.unwrap_or(bits);
    if length > bits {
        return None;
    }
    // IPv4 inside IPv6 is IPv4, written or seen.
    let (own, bits, length) = match text.parse::<IpAddr>() {
        Ok(IpAddr::V6(v6)) if v6.to_ipv4_mapped().is_some() && length >= 96 => {
            let v4 = v6.to_ipv4_mapped()?;
            (u128::from(v4.to_bits()), 32, length - 96)
        }
        _ => (own, bits, length),
    };
    if bits != seen_bits {
        return Some(false);
    }
    let shift = bits - length;
    Some(if shift == bits { true } else { own >> shift == seen >> shift })
}

fn bits(address: IpAddr) -> (u128, u32) {
    match address {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32),
        IpAddr::V6(v6) => (v6.to_bits(), 128),
    }
}

fn bits_of_seen(address: IpAddr) -> (u128, u32) {
    match address {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            bits(v6.to_ipv4_mapped().map_or(address, IpAddr::V4))
        }
        IpAddr::V4(_) | IpAddr::V6(_) => bits(address),
    }
}

/// A port in digits; `None`: nobody can use it.
pub fn port(text: &str) -> Option<u16> {
    if text.is_empty() || !text.chars().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}
