//! How one written value is compared with one seen attribute. The matchers of the two ages stand side by side.
//!
//! Identities are compared as borrowed text: nothing here allocates once a pattern is compiled.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net};
use spiffe_id::{SpiffeId, TrustDomain};

/// A string pattern of the metadata kind (policy B-5), which the current API shares (policy F-3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Pattern {
    /// Matches even where nothing was seen: `user: "*"` and `allUsers` (policy B-8).
    Everyone,
    /// `*` of a header, and of what a token says, in 2018: it was sent, even if empty (policy B-5).
    Given,
    /// `*`: something was seen.
    Present,
    Exact(Box<str>),
    /// `abc*`
    Prefix(Box<str>),
    /// `*abc`; also `*abc*`, whose last star is an ordinary character (policy B-5).
    Suffix(Box<str>),
}

impl Pattern {
    pub(super) fn new(written: &str) -> Self {
        match (written.strip_prefix('*'), written.strip_suffix('*')) {
            (Some(""), _) => Self::Present,
            (Some(rest), _) => Self::Suffix(rest.into()),
            (None, Some(rest)) => Self::Prefix(rest.into()),
            (None, None) => Self::Exact(written.into()),
        }
    }

    /// The header and metadata forms of 2018, whose bare star asks for presence alone (policy B-5).
    pub(super) fn of_2018(written: &str) -> Self {
        if written == "*" { Self::Given } else { Self::new(written) }
    }

    /// `text` is `None` where the attribute is absent or hidden.
    pub(super) fn matches(&self, text: Option<Text<'_>>) -> bool {
        if matches!(self, Self::Everyone) {
            return true;
        }
        let Some(text) = text else { return false };
        match self {
            Self::Everyone | Self::Given => true,
            Self::Present => text.length() > 0,
            Self::Exact(whole) => text.length() == whole.len() && text.starts_with(whole),
            Self::Prefix(start) => text.starts_with(start),
            Self::Suffix(end) => text.ends_with(end),
        }
    }

    /// The same identity under every trust domain of the mesh, where the pattern names one of them (policy B-13).
    pub(super) fn in_trust_domains(&self, trusted: &TrustDomains) -> Vec<Self> {
        let written = match self {
            Self::Everyone | Self::Given | Self::Present => return vec![self.clone()],
            Self::Exact(text) => text.to_string(),
            Self::Prefix(text) => format!("{text}*"),
            Self::Suffix(text) => format!("*{text}"),
        };
        let [domain, "ns", namespace, "sa", account] = written.split('/').collect::<Vec<_>>()[..] else {
            return vec![self.clone()];
        };
        let under = |domain: &TrustDomain| Self::new(&format!("{domain}/ns/{namespace}/sa/{account}"));
        match domain.strip_prefix('*') {
            Some("") => vec![self.clone()],
            Some(end) if trusted.any(|known| known.as_str().ends_with(end)) => {
                std::iter::once(self.clone()).chain(trusted.all().map(under)).collect()
            }
            None if domain == DEFAULT_TRUST_DOMAIN || trusted.any(|known| known.as_str() == domain) => {
                trusted.all().map(under).collect()
            }
            Some(_) | None => vec![self.clone()],
        }
    }
}

/// As policies write it.
impl fmt::Display for Pattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everyone | Self::Given | Self::Present => formatter.write_str("*"),
            Self::Exact(text) => formatter.write_str(text),
            Self::Prefix(text) => write!(formatter, "{text}*"),
            Self::Suffix(text) => write!(formatter, "*{text}"),
        }
    }
}

/// The trust domain that 2018's examples were written for: in a pattern it means the mesh's own (policy B-13).
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

/// The mesh's own trust domain and its aliases.
#[derive(Clone, Debug)]
pub(super) struct TrustDomains {
    own: TrustDomain,
    aliases: Vec<TrustDomain>,
}

impl TrustDomains {
    pub(super) fn new(own: &TrustDomain, aliases: &[TrustDomain]) -> Self {
        Self { own: own.clone(), aliases: aliases.to_vec() }
    }

    pub(super) fn includes(&self, domain: &TrustDomain) -> bool {
        self.any(|known| known == domain)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &TrustDomain> {
        std::iter::once(&self.own).chain(&self.aliases)
    }

    fn any(&self, is_it: impl Fn(&TrustDomain) -> bool) -> bool {
        self.all().any(is_it)
    }
}

/// A seen text in up to five pieces, so that an identity need not be put together to be compared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Text<'a>([&'a str; 5]);

impl fmt::Display for Text<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|piece| formatter.write_str(piece))
    }
}

impl<'a> Text<'a> {
    pub(crate) fn plain(text: &'a str) -> Self {
        Self([text, "", "", "", ""])
    }

    /// `<trust domain>/ns/<namespace>/sa/<service account>`, without a scheme (policy H-7).
    pub(super) fn principal(id: &'a SpiffeId) -> Self {
        Self([id.trust_domain().as_str(), "/ns/", id.namespace(), "/sa/", id.service_account()])
    }

    fn length(self) -> usize {
        self.0.iter().map(|piece| piece.len()).sum()
    }

    fn starts_with(self, start: &str) -> bool {
        let mut seen = self.0.iter().flat_map(|piece| piece.bytes());
        start.bytes().all(|byte| seen.next() == Some(byte))
    }

    fn ends_with(self, end: &str) -> bool {
        let mut seen = self.0.iter().rev().flat_map(|piece| piece.bytes().rev());
        end.bytes().rev().all(|byte| seen.next() == Some(byte))
    }
}

/// A namespace in which a star anywhere stands for any text (policy B-7 `source.namespace`, B-8, G-11).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Glob(Box<str>);

impl Glob {
    pub(super) fn new(written: &str) -> Self {
        Self(written.into())
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        let mut pieces = self.0.split('*');
        let first = pieces.next().unwrap_or_default();
        let Some(mut rest) = text.strip_prefix(first) else { return false };
        let Some(last) = pieces.next_back() else { return rest.is_empty() };
        for piece in pieces {
            let Some(at) = rest.find(piece) else { return false };
            rest = &rest[at + piece.len()..];
        }
        rest.ends_with(last)
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// A service account of the current API: `namespace/account`, or `account` in the policy's own namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Account {
    namespace: Pattern,
    account: Pattern,
}

impl Account {
    pub(super) fn new(written: &str, own_namespace: &str) -> Self {
        match written.split_once('/') {
            Some((namespace, account)) => {
                Self { namespace: Pattern::new(namespace), account: Pattern::new(account) }
            }
            None if written == "*" => Self { namespace: Pattern::Present, account: Pattern::Present },
            None => Self { namespace: Pattern::Exact(own_namespace.into()), account: Pattern::new(written) },
        }
    }

    pub(super) fn matches(&self, namespace: &str, account: &str) -> bool {
        self.namespace.matches(Some(Text::plain(namespace)))
            && self.account.matches(Some(Text::plain(account)))
    }
}

impl fmt::Display for Account {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.namespace, self.account)
    }
}

/// Issuer and subject of a token, in the current API: the text is split at its last slash, because an issuer may be an
/// address (policy F-3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TokenPrincipal {
    written: Box<str>,
    issuer: Pattern,
    subject: Pattern,
}

impl TokenPrincipal {
    pub(super) fn new(written: &str) -> Self {
        let exact = |text: &str| Pattern::Exact(text.into());
        let (issuer, subject) = match (written.rsplit_once('/'), written) {
            (None, "*") => (Pattern::Present, Pattern::Present),
            (None, text) if text.starts_with('*') => (Pattern::Present, Pattern::new(text)),
            (None, text) if text.ends_with('*') => (Pattern::new(text), Pattern::Present),
            (None, text) => (exact(text), exact("")),
            (Some((issuer, subject)), text) if text.starts_with('*') => {
                (Pattern::new(issuer), exact(subject))
            }
            (Some((issuer, subject)), _) => (exact(issuer), Pattern::new(subject)),
        };
        Self { written: written.into(), issuer, subject }
    }

    pub(super) fn matches(&self, issuer: &str, subject: &str) -> bool {
        self.issuer.matches(Some(Text::plain(issuer))) && self.subject.matches(Some(Text::plain(subject)))
    }
}

impl fmt::Display for TokenPrincipal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.written)
    }
}

/// The config-time matcher of policy B-5, for what is known of a destination before anyone connects.
/// `seen` is `None` where the destination has no such thing: then only `*` matches (policy A-4).
pub(super) fn config_time_matches(written: &str, seen: Option<&str>) -> bool {
    if written == "*" {
        return true;
    }
    let Some(seen) = seen else { return false };
    let prefix = written.strip_suffix('*').is_some_and(|start| seen.starts_with(start));
    let suffix = written.strip_prefix('*').is_some_and(|end| seen.ends_with(end));
    prefix || suffix || seen == written
}

/// Whether a star stands where no matcher takes it for a wildcard (policy B-5).
pub(super) fn star_is_misplaced(written: &str) -> bool {
    let inner = written.strip_prefix('*').or_else(|| written.strip_suffix('*')).unwrap_or(written);
    inner.contains('*')
}

/// Reads an address or a CIDR; IPv4 written inside IPv6 becomes IPv4, as seen addresses do.
pub(super) fn network(written: &str) -> Option<IpNet> {
    let network = match written.parse::<IpNet>() {
        Ok(network) => network,
        Err(_) => IpNet::from(written.parse::<IpAddr>().ok()?),
    };
    if let IpNet::V6(v6) = network
        && let (Some(v4), Some(length)) =
            (v6.addr().to_ipv4_mapped(), v6.prefix_len().checked_sub(MAPPED_BITS))
    {
        return Ipv4Net::new(v4, length).ok().map(IpNet::V4);
    }
    Some(network)
}

/// Length of the prefix `::ffff:0:0/96` under which IPv6 sockets show IPv4 peers (RFC 4291, section 2.5.5.2).
const MAPPED_BITS: u8 = 96;

/// `address` as rules see it: an IPv4 address in IPv6 clothing is an IPv4 address.
pub(super) fn canonical(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => Ipv6Addr::to_canonical(&v6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(uri: &str) -> SpiffeId {
        uri.parse().expect("a valid identity")
    }

    #[track_caller]
    fn principal(written: &str, expected: bool) {
        let web = id("spiffe://td/ns/photo/sa/web");
        assert_eq!(Pattern::new(written).matches(Some(Text::principal(&web))), expected, "{written}");
    }

    #[test]
    fn a_principal_is_compared_whole() {
        // policy B-5, B-8, H-7
        for written in [
            "td/ns/photo/sa/web",
            "*",
            "td/ns/photo/*",
            "td*",
            "*/sa/web",
            "*td/ns/photo/sa/web",
            "td/ns/photo/sa/web*",
        ] {
            principal(written, true);
        }
        for written in [
            "",
            "web",
            "spiffe://td/ns/photo/sa/web",
            "td/ns/photo/sa/we",
            "td/ns/photo/sa/webb",
            "td/ns/photo/sa/Web",
            "td/ns/photo2/sa/web",
            "*/sa/web2",
            "*photo*",
            "td/*/sa/web",
            "xtd/ns/photo/sa/web*",
            "*xtd/ns/photo/sa/web",
        ] {
            principal(written, false);
        }
    }

    #[test]
    fn what_is_absent_matches_only_everyone() {
        // policy B-8
        for written in ["", "*", "a", "a*", "*a"] {
            assert!(!Pattern::new(written).matches(None), "{written}");
        }
        assert!(Pattern::Everyone.matches(None));
    }

    #[test]
    fn a_trust_domain_of_the_mesh_stands_for_all_of_them() {
        // policy B-13
        let domain = |text: &str| text.parse::<TrustDomain>().expect("a trust domain");
        let trusted = TrustDomains::new(&domain("td"), &[domain("old.td")]);
        let expanded = |written: &str| {
            Pattern::new(written)
                .in_trust_domains(&trusted)
                .iter()
                .map(|p| format!("{p:?}"))
                .collect::<Vec<_>>()
        };
        let both = [r#"Exact("td/ns/a/sa/b")"#, r#"Exact("old.td/ns/a/sa/b")"#];
        assert_eq!(expanded("td/ns/a/sa/b"), both);
        assert_eq!(expanded("old.td/ns/a/sa/b"), both);
        assert_eq!(expanded("cluster.local/ns/a/sa/b"), both);
        assert_eq!(expanded("*d/ns/a/sa/b").len(), 3);
        for unchanged in ["*", "*/sa/b", "*/ns/a/sa/b", "*x/ns/a/sa/b", "foreign/ns/a/sa/b", "td/ns/a/sb/b"] {
            assert_eq!(expanded(unchanged), [format!("{:?}", Pattern::new(unchanged))], "{unchanged}");
        }
        assert_eq!(expanded("td/ns/a/sa/*").len(), 2);
    }

    #[track_caller]
    fn config_time(written: &str, seen: Option<&str>, expected: bool) {
        assert_eq!(config_time_matches(written, seen), expected, "{written} against {seen:?}");
    }

    #[test]
    fn a_destination_is_matched_as_in_2018() {
        // policy B-5
        let service = Some("products.shop.svc.cluster.local");
        config_time("*", service, true);
        config_time("products*", service, true);
        config_time("*.shop.svc.cluster.local", service, true);
        config_time("products.shop.svc.cluster.local", service, true);
        config_time("products", service, false);
        config_time("*shop*", service, false);
        config_time("*shop*", Some("*shop-x"), true);
        config_time("*shop*", Some("x-shop*"), true);
        config_time("Products*", service, false);
        config_time("", service, false);
        config_time("*", None, true);
        config_time("a*", None, false);
        config_time("", None, false);
    }

    #[test]
    fn a_star_in_a_namespace_is_any_text() {
        // policy B-7, B-8
        for (written, text, expected) in [
            ("*", "photo", true),
            ("p*o", "photo", true),
            ("*h*t*", "photo", true),
            ("photo", "photo", true),
            ("photo*", "photo", true),
            ("phot", "photo", false),
            ("hoto", "photo", false),
            ("p*p", "photo", false),
            ("ph*hoto", "photo", false),
            ("*x*", "photo", false),
            ("", "photo", false),
        ] {
            assert_eq!(Glob::new(written).matches(text), expected, "{written} against {text}");
        }
    }

    #[test]
    fn a_service_account_without_a_namespace_is_of_the_policy_s_own() {
        for (written, expected) in [
            ("web", true),
            ("photo/web", true),
            ("photo/*", true),
            ("*/web", true),
            ("*", true),
            ("w*", true),
            ("other/web", false),
            ("other/*", false),
            ("photo/web/x", false),
            ("photo", false),
        ] {
            assert_eq!(Account::new(written, "photo").matches("photo", "web"), expected, "{written}");
        }
        assert!(!Account::new("web", "other").matches("photo", "web"));
        assert!(!Account::new("w*", "other").matches("photo", "web"));
    }

    #[test]
    fn a_token_s_principal_is_split_at_the_last_slash() {
        // policy F-3
        for (written, issuer, subject, expected) in [
            ("https://id.test/ann", "https://id.test", "ann", true),
            ("https://id.test/*", "https://id.test", "ann", true),
            ("https://id.test/a*", "https://id.test", "ann", true),
            ("*/ann", "https://id.test", "ann", true),
            ("*.test/ann", "https://id.test", "ann", true),
            ("*nn", "https://id.test", "ann", true),
            ("id*", "id.test", "ann", true),
            ("*", "a", "b", true),
            ("*", "a", "", false),
            ("*", "", "b", false),
            ("https://id.test/ann", "https://id.test/a", "nn", false),
            ("https://id.test/x/ann", "https://id.test", "x/ann", false),
            ("https://id.test/ann", "https://id.test", "anna", false),
            ("https://id*", "https://id.test", "ann", false),
            ("id.test", "id.test", "ann", false),
            ("", "id.test", "ann", false),
        ] {
            let principal = TokenPrincipal::new(written);
            assert_eq!(principal.matches(issuer, subject), expected, "{written} against {issuer} {subject}");
        }
    }

    #[test]
    fn networks_are_read_and_mapped_addresses_are_ipv4() {
        for (written, expected) in [
            ("10.0.0.1", Some("10.0.0.1/32")),
            ("10.0.0.0/8", Some("10.0.0.0/8")),
            ("fd00::/8", Some("fd00::/8")),
            ("::1", Some("::1/128")),
            ("::ffff:10.0.0.0/104", Some("10.0.0.0/8")),
            ("::ffff:10.0.0.1", Some("10.0.0.1/32")),
            ("10.0.0.0/33", None),
            ("10.0.0", None),
            ("10.0.0.0/", None),
            (" 10.0.0.1", None),
            ("010.0.0.1", None),
            ("host", None),
            ("", None),
        ] {
            let expected = expected.map(|text| text.parse::<IpNet>().expect("a network"));
            assert_eq!(network(written), expected, "{written}");
        }
        assert_eq!(canonical("::ffff:10.0.0.1".parse().unwrap()), "10.0.0.1".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn a_star_in_the_middle_is_noticed() {
        for written in ["a*b", "*a*", "**", "a**", "*a*b"] {
            assert!(star_is_misplaced(written), "{written}");
        }
        for written in ["*", "a*", "*a", "a", ""] {
            assert!(!star_is_misplaced(written), "{written}");
        }
    }
}
