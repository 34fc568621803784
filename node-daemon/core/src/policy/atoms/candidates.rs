//! Values to try, from what the conditions compare with.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use spiffe_id::{SpiffeId, TrustDomain};

use super::{
    super::{
        compile::Compiled,
        matching::Pattern,
        paths::{Path, PathPattern},
        rules::{PortRules, Values},
        seen::Asked,
        tokens::IssuerRule,
    },
    Atom, Attribute, PREFLIGHT_HEADERS, TokenPoint,
    clauses::{attributes, patterns},
    is_http,
    point::{ClaimPoint, TokenPlace, claim_path},
    texts::Texts,
};

/// Addresses that hardly any policy names (RFC 5737, RFC 3849).
const NOBODYS_ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 77)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x77)),
];

/// The method that most requests have.
const USUAL_METHOD: &str = "GET";

/// See the module.
pub(super) struct Candidates<'r> {
    compiled: &'r Compiled,
    is_http: bool,
    texts: BTreeMap<Attribute, Texts>,
    namespaces: Texts,
    accounts: Texts,
    trust_domains: Texts,
    networks: BTreeSet<IpNet>,
    issuers: Vec<Arc<IssuerRule>>,
    has_origins: bool,
    holes: BTreeSet<String>,
}

impl<'r> Candidates<'r> {
    pub(super) fn new(compiled: &'r Compiled, rules: &[&PortRules]) -> Self {
        let is_http = rules.iter().any(|rules| is_http(rules));
        let issuers = rules.iter().flat_map(|rules| rules.authentication.tokens.rules().cloned());
        let mut candidates = Self {
            compiled,
            is_http,
            texts: BTreeMap::new(),
            namespaces: Texts::default(),
            accounts: Texts::default(),
            trust_domains: Texts::default(),
            networks: BTreeSet::new(),
            issuers: issuers.filter(|_| is_http).collect(),
            has_origins: rules.iter().any(|rules| !rules.authentication.origins.is_empty()),
            holes: BTreeSet::new(),
        };
        for step in rules.iter().flat_map(|rules| &rules.authentication.origins) {
            for trigger in step.methods.iter().flat_map(|method| &method.triggers) {
                if !trigger.add_to(&mut |pattern| candidates.texts(Attribute::Path).add(pattern)) {
                    candidates.holes.insert("regular expressions of triggerRules are only tried".to_owned());
                }
            }
        }
        candidates
    }

    fn texts(&mut self, attribute: Attribute) -> &mut Texts {
        self.texts.entry(attribute).or_default()
    }

    pub(super) fn add(&mut self, values: &Values) {
        match values {
            Values::SourceAddresses(networks) => self.networks.extend(networks),
            Values::NamespaceGlobs(globs) => globs.iter().for_each(|glob| self.add_glob(&glob.to_string())),
            Values::Namespaces(patterns) => patterns.iter().for_each(|pattern| self.namespaces.add(pattern)),
            Values::TrustDomains(patterns) => {
                patterns.iter().for_each(|pattern| self.trust_domains.add(pattern));
            }
            Values::ServiceAccounts(accounts) => {
                for account in accounts {
                    let written = account.to_string();
                    let (namespace, account) = written.split_once('/').unwrap_or(("*", &written));
                    self.namespaces.add(&Pattern::new(namespace));
                    self.accounts.add(&Pattern::new(account));
                }
            }
            Values::Paths(paths) => paths.iter().for_each(|path| self.add_path(path)),
            Values::TokenPrincipals(principals) => {
                principals.iter().for_each(|principal| self.add_principal(&principal.to_string()));
            }
            Values::Principals(_) | Values::ServerNames(_) | Values::Request(..) => {
                for pattern in patterns(values) {
                    self.add_pattern(values, pattern);
                }
            }
            Values::DestinationAddresses(_)
            | Values::DestinationPorts(_)
            | Values::Metadata { .. }
            | Values::Undecidable => {}
        }
        // Also where every pattern is a star.
        for attribute in attributes(values) {
            self.texts.entry(attribute).or_default();
        }
    }

    fn add_pattern(&mut self, values: &Values, pattern: &Pattern) {
        if let Values::Request(Asked::Principal, _) = values {
            self.add_principal(&pattern.to_string());
            self.texts(Attribute::Peer).add(pattern);
            return;
        }
        if let Some(attribute) = attributes(values).pop().filter(|attribute| *attribute != Attribute::Token) {
            self.texts(attribute).add(pattern);
        }
    }

    /// Stars anywhere: the pieces at both ends, and for the middle a text that has them all.
    fn add_glob(&mut self, written: &str) {
        let pieces: Vec<&str> = written.split('*').collect();
        match pieces[..] {
            [whole] => self.namespaces.whole(whole),
            [first, last] => {
                if !first.is_empty() {
                    self.namespaces.beginning(first);
                }
                if !last.is_empty() {
                    self.namespaces.end(last);
                }
            }
            _ => {
                self.namespaces.whole(&pieces.concat());
                self.namespaces.whole(&pieces.join("q"));
                self.holes.insert(format!("namespaces that fit {written:?} are only tried"));
            }
        }
    }

    fn add_path(&mut self, path: &PathPattern) {
        let PathPattern::Plain(pattern) = path else {
            let written = path.to_string();
            let texts = self.texts(Attribute::Path);
            for (segment, rest) in [("q", "q/q"), ("q", ""), ("", "q"), ("q/q", "q")] {
                texts.whole(&written.replace("{**}", rest).replace("{*}", segment));
            }
            self.holes.insert(format!("paths that fit {written:?} are only tried"));
            return;
        };
        self.texts(Attribute::Path).add(pattern);
    }

    /// `issuer/subject`, where the issuer is one of those that are known.
    fn add_principal(&mut self, written: &str) {
        let issuers: Vec<Box<str>> = self.issuers.iter().map(|rule| rule.issuer.clone()).collect();
        let texts = self.texts(Attribute::Subject);
        for issuer in &issuers {
            if let Some(subject) = written.strip_prefix(&**issuer).and_then(|rest| rest.strip_prefix('/')) {
                texts.add(&Pattern::new(subject));
            }
        }
        if let Some(end) = written.strip_prefix('*') {
            texts.add(&Pattern::new(written));
            if let Some((_, subject)) = end.rsplit_once('/') {
                texts.whole(subject);
            }
        }
    }

    /// The atoms of each attribute, and what they do not cover.
    pub(super) fn finish(
        mut self,
        varies: &dyn Fn(&Attribute) -> bool,
    ) -> (BTreeMap<Attribute, Vec<Atom>>, BTreeSet<String>) {
        let mut axes = BTreeMap::new();
        // By far the most values.
        if varies(&Attribute::Peer) {
            axes.insert(Attribute::Peer, self.peers());
        }
        if !self.networks.is_empty() {
            axes.insert(Attribute::Source, addresses(&self.networks).into_iter().map(Atom::Source).collect());
        }
        if self.is_http {
            self.add_requests(&mut axes);
        }
        if let Some(texts) = self.texts.get(&Attribute::ServerName) {
            let names = texts.samples().into_iter().filter(|name| !name.is_empty()).map(Some);
            axes.insert(
                Attribute::ServerName,
                std::iter::once(None).chain(names).map(Atom::ServerName).collect(),
            );
        }
        (axes, self.holes)
    }

    fn add_requests(&mut self, axes: &mut BTreeMap<Attribute, Vec<Atom>>) {
        if self.has_origins {
            self.texts(Attribute::Method).whole("OPTIONS");
            for name in PREFLIGHT_HEADERS {
                self.texts(Attribute::Header(name.into()));
            }
        }
        if !self.issuers.is_empty() {
            axes.insert(Attribute::Token, self.tokens());
            let audiences: Vec<Box<str>> =
                self.issuers.iter().flat_map(|rule| rule.audiences.iter().cloned()).collect();
            if !audiences.is_empty() {
                let texts = self.texts(Attribute::Audience);
                audiences.iter().for_each(|audience| texts.whole(audience));
            }
        }
        for (attribute, texts) in &self.texts {
            let atoms = match attribute {
                Attribute::Method => methods(texts),
                Attribute::Path => paths(texts),
                Attribute::Host => std::iter::once(None)
                    .chain(texts.samples().into_iter().map(Some))
                    .map(Atom::Host)
                    .collect(),
                Attribute::Header(name) => headers(name, texts),
                Attribute::Subject if self.issuers.is_empty() => continue,
                Attribute::Subject => claims(&claim_path("sub"), texts),
                Attribute::Audience => claims(&claim_path("aud"), texts),
                Attribute::Presenter => claims(&claim_path("azp"), texts),
                Attribute::Claim(path) => claims(path, texts),
                Attribute::Peer
                | Attribute::Source
                | Attribute::Destination
                | Attribute::ServerName
                | Attribute::Token => continue,
            };
            axes.insert(attribute.clone(), atoms);
        }
        let is_place = |name: &str| {
            let places = self.issuers.iter().flat_map(|rule| TokenPlace::all_of(rule));
            places
                .into_iter()
                .any(|place| matches!(place, TokenPlace::Header { name: own, .. } if *own == *name))
        };
        for attribute in axes.keys() {
            if let Attribute::Header(name) = attribute
                && is_place(name)
            {
                self.holes
                    .insert(format!("{} carries tokens too: its values are only tried", attribute.name()));
            }
        }
    }

    fn tokens(&self) -> Vec<Atom> {
        let mut places: Vec<TokenPlace> = Vec::new();
        let mut atoms = vec![Atom::Token(TokenPoint::Absent)];
        let mut good = Vec::new();
        for rule in &self.issuers {
            let issuer = (claim_path("iss"), ClaimPoint::Text(rule.issuer.to_string()));
            // Most tokens have a subject and are for somebody; others are among the values of those attributes.
            let subject = (claim_path("sub"), ClaimPoint::Text("q".to_owned()));
            let audience = rule.audiences.first();
            let audience =
                audience.map(|audience| (claim_path("aud"), ClaimPoint::Text(audience.to_string())));
            for place in TokenPlace::all_of(rule) {
                let claims = [issuer.clone(), subject.clone()].into_iter().chain(audience.clone()).collect();
                good.push(Atom::Token(TokenPoint::Good { place: place.clone(), claims }));
                if !places.contains(&place) {
                    places.push(place);
                }
            }
        }
        good.dedup();
        atoms.extend(good);
        atoms.extend(places.into_iter().map(|place| Atom::Token(TokenPoint::Bad(place))));
        atoms
    }

    fn peers(&self) -> Vec<Atom> {
        let none = Texts::default();
        let principals = self.texts.get(&Attribute::Peer).unwrap_or(&none);
        let stranger = [principals, &self.namespaces, &self.accounts, &self.trust_domains]
            .into_iter()
            .fold(Texts::default(), |mut all, texts| {
                texts.samples().iter().for_each(|text| all.whole(text));
                all
            })
            .stranger();
        let identities: Vec<SpiffeId> =
            principals.samples_with(&middles(&stranger)).iter().filter_map(|text| identity(text)).collect();
        let of = |piece: fn(&SpiffeId) -> &str, texts: &Texts| {
            let mut pool: BTreeSet<String> = identities.iter().map(|id| piece(id).to_owned()).collect();
            pool.extend(texts.samples());
            pool.insert(stranger.clone());
            pool
        };
        let namespaces = of(SpiffeId::namespace, &self.namespaces);
        let accounts = of(SpiffeId::service_account, &self.accounts);
        let mut domains = of(|id| id.trust_domain().as_str(), &self.trust_domains);
        domains.extend(self.compiled.trusted.all().map(TrustDomain::to_string));
        let mut peers = vec![Atom::Peer(None)];
        for domain in domains.iter().filter_map(|domain| domain.parse::<TrustDomain>().ok()) {
            for namespace in &namespaces {
                let ids = accounts.iter().map(|account| SpiffeId::new(domain.clone(), namespace, account));
                peers.extend(ids.filter_map(Result::ok).map(Some).map(Atom::Peer));
            }
        }
        peers
    }
}

/// Everything that may stand in the middle of an identity.
fn middles(stranger: &str) -> Vec<String> {
    let whole = format!("{stranger}/ns/{stranger}/sa/{stranger}");
    let bytes = 0..=whole.len();
    let pieces = bytes.clone().flat_map(|from| bytes.clone().map(move |to| (from, to)));
    let texts: BTreeSet<&str> = pieces.filter_map(|(from, to)| whole.get(from..to)).collect();
    texts.into_iter().map(str::to_owned).collect()
}

fn identity(principal: &str) -> Option<SpiffeId> {
    format!("spiffe://{principal}").parse().ok()
}

/// The first and the last address of each network, their neighbours outside, and nobody's.
fn addresses(networks: &BTreeSet<IpNet>) -> BTreeSet<IpAddr> {
    let around = networks.iter().flat_map(|network| {
        let (first, last) = (network.network(), network.broadcast());
        [Some(first), Some(last), neighbour(first, false), neighbour(last, true)]
    });
    around.flatten().chain(NOBODYS_ADDRESSES).collect()
}

fn neighbour(address: IpAddr, is_next: bool) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => {
            let bits = u32::from(v4);
            let bits = if is_next { bits.checked_add(1) } else { bits.checked_sub(1) };
            bits.map(Ipv4Addr::from).map(IpAddr::V4)
        }
        IpAddr::V6(v6) => {
            let bits = u128::from(v6);
            let bits = if is_next { bits.checked_add(1) } else { bits.checked_sub(1) };
            bits.map(Ipv6Addr::from).map(IpAddr::V6)
        }
    }
}

/// Only what a method may be (RFC 9110, section 5.6.2).
fn methods(texts: &Texts) -> Vec<Atom> {
    let is_token = |text: &String| {
        let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        !text.is_empty() && text.bytes().all(is_good)
    };
    let samples = texts.samples().into_iter().chain([USUAL_METHOD.to_owned()]);
    samples.filter(is_token).map(Atom::Method).collect()
}

/// Only paths in the form in which rules see them; they begin with a slash.
fn paths(texts: &Texts) -> Vec<Atom> {
    let mut texts = texts.clone();
    texts.beginning("/");
    let stranger = texts.stranger();
    // What a beginning that ends within an escape may go on with.
    let middles =
        [stranger.clone(), format!("/{stranger}/"), format!("2F{stranger}"), format!("F{stranger}")];
    let is_form = |text: &String| {
        Path::normalise(text, USUAL_METHOD)
            .is_ok_and(|path| path.upstream == *text && path.matched() == *text)
    };
    texts.samples_with(&middles).into_iter().filter(is_form).map(Atom::Path).collect()
}

/// Absent, empty, one line of each kind, and two lines.
fn headers(name: &str, texts: &Texts) -> Vec<Atom> {
    let stranger = texts.stranger();
    let is_value = |text: &String| text.bytes().all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte));
    let samples: Vec<String> = texts.samples().into_iter().filter(is_value).collect();
    let mut atoms = vec![Atom::Header(name.into(), Vec::new())];
    atoms.extend(samples.iter().map(|value| Atom::Header(name.into(), vec![value.clone()])));
    atoms
        .extend(samples.iter().map(|value| Atom::Header(name.into(), vec![value.clone(), stranger.clone()])));
    atoms
}

/// Unset, and one of each kind. An issuer does not sign an empty one.
fn claims(path: &[Box<str>], texts: &Texts) -> Vec<Atom> {
    let samples = texts.samples().into_iter().filter(|text| !text.is_empty());
    let values = samples.map(|text| Some(ClaimPoint::Text(text)));
    std::iter::once(None).chain(values).map(|value| Atom::Claim(path.to_vec(), value)).collect()
}
