//! What rules may look at: one connection, and on ports that are judged by requests one request.

use std::{borrow::Cow, collections::BTreeMap, net::IpAddr};

use serde_json::Value;
use spiffe_id::SpiffeId;

use super::{
    matching::{Pattern, Text},
    request::lower_case,
    tokens::claims_of,
};

/// The headers of a request. An implementation looks names up without regard to case.
pub trait Headers {
    /// Gives each value of `name` (written in lower case), in their order, as it was sent.
    fn each(&self, name: &str, visit: &mut dyn FnMut(&[u8]));
}

/// Names and values, one pair a line.
impl Headers for &[(&str, &str)] {
    fn each(&self, name: &str, visit: &mut dyn FnMut(&[u8])) {
        let lines = self.iter().filter(|(written, _)| written.eq_ignore_ascii_case(name));
        lines.for_each(|(_, value)| visit(value.as_bytes()));
    }
}

/// The value of a header, several of one name joined as RFC 9110, section 5.3 has it.
pub(crate) fn header(headers: &dyn Headers, name: &str) -> Option<String> {
    let mut joined: Option<String> = None;
    headers.each(name, &mut |value| {
        let value = String::from_utf8_lossy(value);
        match &mut joined {
            None => joined = Some(value.into_owned()),
            Some(before) => {
                before.push(',');
                before.push_str(&value);
            }
        }
    });
    joined
}

/// Names of headers that carried identity inside proxies of 2018: they are stripped, and no rule sees them (policy A-11).
pub(crate) fn is_reserved(name: &str) -> bool {
    let is = |reserved: &str| name.eq_ignore_ascii_case(reserved);
    let starts =
        name.get(..RESERVED_PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(RESERVED_PREFIX));
    starts || RESERVED_NAMES.into_iter().any(is)
}

/// Every header that begins so is reserved.
pub const RESERVED_PREFIX: &str = "istio-sec-";

/// Reserved beside those of [`RESERVED_PREFIX`].
pub const RESERVED_NAMES: [&str; 2] = ["sec-istio-auth-userinfo", "sec-istio-authn-payload"];

/// See the module.
#[derive(Clone, Copy)]
pub(crate) struct Seen<'a> {
    /// `None` where nothing was proven, or where the mode hides it (policy B-9).
    pub(crate) peer: Option<Peer<'a>>,
    pub(crate) source_address: IpAddr,
    pub(crate) destination_address: IpAddr,
    pub(crate) destination_port: u16,
    pub(crate) server_name: Option<&'a str>,
    /// What a filter of the destination's protocol told; `None`: there is no such filter (policy B-6).
    pub(crate) metadata: Option<&'a Metadata>,
    /// `None` on layer 4.
    pub(crate) request: Option<&'a SeenRequest<'a>>,
}

/// Filter, key, values.
pub(crate) type Metadata = BTreeMap<String, BTreeMap<String, Value>>;

/// A proven identity in pieces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer<'a> {
    pub(crate) principal: Text<'a>,
    pub(crate) trust_domain: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) service_account: &'a str,
}

impl<'a> Peer<'a> {
    pub(crate) fn of(id: &'a SpiffeId) -> Self {
        Self {
            principal: Text::principal(id),
            trust_domain: id.trust_domain().as_str(),
            namespace: id.namespace(),
            service_account: id.service_account(),
        }
    }
}

/// One request, as far as rules ask about it.
pub(crate) struct SeenRequest<'a> {
    pub(crate) method: Option<&'a str>,
    /// In its one form, without the query.
    pub(crate) path: Option<&'a str>,
    /// In lower case (policy G-18).
    pub(crate) host: Option<Cow<'a, str>>,
    pub(crate) headers: &'a dyn Headers,
    /// `request.auth.principal` (policy A-14).
    pub(crate) principal: Option<Text<'a>>,
    pub(crate) token: Option<SeenToken<'a>>,
}

/// What a verified token says (policy A-14).
#[derive(Clone, Copy, Debug)]
pub(crate) struct SeenToken<'a> {
    /// Both are needed for a principal.
    pub(crate) issuer_and_subject: Option<(&'a str, &'a str)>,
    pub(crate) audience: Option<&'a str>,
    pub(crate) presenter: Option<&'a str>,
    pub(crate) claims: &'a Value,
    /// Names of claims whose text is a list, beside the usual ones.
    pub(crate) spaced: &'a [String],
}

/// An attribute that only a request can answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Method,
    /// Patterns in lower case.
    Host,
    Header(Box<str>),
    /// `source.user`: the peer, but not on layer 4 (policy B-7).
    User,
    Principal,
    Audience,
    Presenter,
    /// A claim, or one inside it.
    Claim(Vec<Box<str>>),
}

impl Asked {
    /// A written value in the form in which the attribute is seen: hosts have no case, under whichever name (policy G-18).
    pub(super) fn written<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let is_host = match self {
            Self::Host => true,
            Self::Header(name) => matches!(&**name, "host" | ":authority"),
            Self::Method
            | Self::User
            | Self::Principal
            | Self::Audience
            | Self::Presenter
            | Self::Claim(_) => false,
        };
        if is_host { lower_case(text) } else { text.into() }
    }

    /// As policies write it.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Method => "request.method".to_owned(),
            Self::Host => "request.host".to_owned(),
            Self::Header(name) => format!("request.headers[{name}]"),
            Self::User => "source.user".to_owned(),
            Self::Principal => "request.auth.principal".to_owned(),
            Self::Audience => "request.auth.audiences".to_owned(),
            Self::Presenter => "request.auth.presenter".to_owned(),
            Self::Claim(path) => format!("request.auth.claims[{}]", path.join("][")),
        }
    }

    /// Whether one of the patterns matches. `eager`: a yes refuses, so that one of several values suffices.
    pub(super) fn matches(
        &self,
        patterns: &[Pattern],
        seen: &Seen<'_>,
        request: &SeenRequest<'_>,
        eager: bool,
    ) -> bool {
        let any = |text: Option<Text<'_>>| patterns.iter().any(|pattern| pattern.matches(text));
        let token = request.token.as_ref();
        match self {
            Self::Method => any(request.method.map(Text::plain)),
            Self::Host => any(request.host.as_deref().map(Text::plain)),
            Self::Header(name) => request.header_matches(name, &any, eager),
            Self::User => any(seen.peer.map(|peer| peer.principal)),
            Self::Principal => any(request.principal),
            Self::Audience => any(token.and_then(|token| token.audience).map(Text::plain)),
            Self::Presenter => any(token.and_then(|token| token.presenter).map(Text::plain)),
            Self::Claim(path) => token.is_some_and(|token| {
                let values = claims_of(token.claims, path, token.spaced);
                values.iter().any(|value| any(Some(Text::plain(value))))
            }),
        }
    }

    /// What was seen, for an explanation.
    pub(super) fn seen(&self, seen: &Seen<'_>, request: &SeenRequest<'_>) -> Option<String> {
        let token = request.token.as_ref();
        match self {
            Self::Method => request.method.map(str::to_owned),
            Self::Host => request.host.as_deref().map(str::to_owned),
            Self::Header(name) => request.header(name),
            Self::User => seen.peer.map(|peer| peer.principal.to_string()),
            Self::Principal => request.principal.map(|principal| principal.to_string()),
            Self::Audience => token.and_then(|token| token.audience).map(str::to_owned),
            Self::Presenter => token.and_then(|token| token.presenter).map(str::to_owned),
            Self::Claim(path) => {
                let values =
                    token.map(|token| claims_of(token.claims, path, token.spaced)).unwrap_or_default();
                Some(values.join(", ")).filter(|text| !text.is_empty())
            }
        }
    }
}

impl SeenRequest<'_> {
    /// Reserved names are never seen, pseudo headers and `host` as the request line has them.
    fn header(&self, name: &str) -> Option<String> {
        match name {
            ":method" => self.method.map(str::to_owned),
            ":path" => self.path.map(str::to_owned),
            ":authority" | "host" => self.host.as_deref().map(str::to_owned),
            name if is_reserved(name) => None,
            name => header(self.headers, name),
        }
    }

    fn header_matches(&self, name: &str, any: &dyn Fn(Option<Text<'_>>) -> bool, eager: bool) -> bool {
        if any(self.header(name).as_deref().map(Text::plain)) {
            return true;
        }
        let mut single = false;
        if eager && !is_reserved(name) {
            self.headers.each(name, &mut |value| {
                single |= any(Some(Text::plain(&String::from_utf8_lossy(value))));
            });
        }
        single
    }
}
