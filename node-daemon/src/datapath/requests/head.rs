//! A request's head as it is judged and forwarded: what ends at this hop is taken out first, so that nothing is judged that
//! the workload does not get, and what has two readings is refused (T-22).

use std::time::{SystemTime, UNIX_EPOCH};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, Version, header, request,
    uri::{Authority, PathAndQuery, Scheme},
};
use node_core::policy::{RequestPermit, tokens::without_cookies};

use super::{body::strip_reserved, flights::Asked, framing::HEADERS_MAX};

/// Headers that end at this hop (RFC 9110, section 7.6.1), beside those that `Connection` names.
const HOP_HEADERS: [HeaderName; 6] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::EXPECT,
];

/// The protocol to which a connection may be upgraded. Others could carry requests that nobody judges.
const WEBSOCKET: &str = "websocket";

/// Why a head is not even judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadHead {
    #[error("more than {HEADERS_MAX} headers")]
    TooMany,
    #[error("CONNECT: this is no proxy of that kind")]
    Connect,
    #[error("the authority and Host differ, or there is not one of them")]
    Host,
    #[error("Connection or Upgrade has two readings")]
    Connection,
}

impl BadHead {
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::Connect => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooMany => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Host | Self::Connection => StatusCode::BAD_REQUEST,
        }
    }

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::TooMany => "headers_max",
            Self::Connect => "connect",
            Self::Host => "host",
            Self::Connection => "connection",
        }
    }
}

/// What is forwarded besides what is judged.
#[derive(Clone, Debug)]
pub(super) struct Way {
    pub(super) version: Version,
    /// Of HTTP/2.
    authority: Option<(Scheme, Authority)>,
    /// The client asks for a WebSocket.
    pub(super) is_upgrade: bool,
    pub(super) is_grpc: bool,
}

/// Takes a head apart.
pub(super) fn read(parts: request::Parts, has_body: bool) -> Result<(Asked, Way), BadHead> {
    let request::Parts { method, uri, version, mut headers, .. } = parts;
    if method == Method::CONNECT {
        return Err(BadHead::Connect);
    }
    if headers.len() > HEADERS_MAX {
        return Err(BadHead::TooMany);
    }
    let is_upgrade = strip_hop(&mut headers)?;
    if is_upgrade && (has_body || version != Version::HTTP_11) {
        return Err(BadHead::Connection);
    }
    let uri = uri.into_parts();
    let host = host(&headers, uri.authority.as_ref(), version)?.map(absolute).transpose()?;
    if let Some(host) = host.as_ref().filter(|_| headers.contains_key(header::HOST)) {
        headers.insert(header::HOST, HeaderValue::from_str(host).map_err(|_| BadHead::Host)?);
    }
    let authority = match version {
        Version::HTTP_2 => {
            let authority = host.as_deref().and_then(|host| host.parse().ok()).ok_or(BadHead::Host)?;
            headers.remove(header::HOST);
            Some((uri.scheme.unwrap_or(Scheme::HTTP), authority))
        }
        _ => None,
    };
    let is_grpc = headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    let asked = Asked { method, path: uri.path_and_query, host, headers, arrived: now() };
    Ok((asked, Way { version, authority, is_upgrade, is_grpc }))
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Whom the client means: one reading, wherever it is written.
fn host(
    headers: &HeaderMap,
    authority: Option<&Authority>,
    version: Version,
) -> Result<Option<String>, BadHead> {
    let mut lines = headers.get_all(header::HOST).iter();
    let line = lines.next();
    if lines.next().is_some() {
        return Err(BadHead::Host);
    }
    let text = |value: &HeaderValue| value.to_str().map(str::to_owned).map_err(|_| BadHead::Host);
    let line = line.map(text).transpose()?;
    // RFC 9110, section 4.2.4: a name before the host misleads.
    if authority.is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(BadHead::Host);
    }
    match (line, authority) {
        (Some(line), Some(authority)) if !line.eq_ignore_ascii_case(authority.as_str()) => Err(BadHead::Host),
        (Some(line), _) => Ok(Some(line)),
        (None, Some(authority)) if version == Version::HTTP_2 => Ok(Some(authority.as_str().to_owned())),
        (None, None) if version == Version::HTTP_10 => Ok(None),
        (None, _) => Err(BadHead::Host),
    }
}

/// Without the dot of the root: `a.` and `a` are one host for every server, so they are one for policy, and the workload
/// gets what was matched (T-22).
fn absolute(host: String) -> Result<String, BadHead> {
    let is_port = |port: &str| port.bytes().all(|digit| digit.is_ascii_digit());
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if is_port(port) && !name.is_empty() => (name, Some(port)),
        _ => (host.as_str(), None),
    };
    let Some(relative) = name.strip_suffix('.') else { return Ok(host) };
    if relative.is_empty() || relative.ends_with('.') {
        return Err(BadHead::Host);
    }
    Ok(match port {
        Some(port) => format!("{relative}:{port}"),
        None => relative.to_owned(),
    })
}

/// Removes what ends at this hop. True where the client asks for a WebSocket.
fn strip_hop(headers: &mut HeaderMap) -> Result<bool, BadHead> {
    let trailers = headers.get_all(header::TE).iter().any(|value| has_token(value, "trailers"));
    headers.remove(header::TE);
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if !HOP_HEADERS.iter().any(|name| headers.contains_key(name)) {
        return Ok(false);
    }
    let (mut named, mut upgrades) = (Vec::new(), false);
    for value in headers.get_all(header::CONNECTION) {
        for token in value.to_str().map_err(|_| BadHead::Connection)?.split(',') {
            match token.trim() {
                "" => {}
                token if token.eq_ignore_ascii_case("upgrade") => upgrades = true,
                token => named.push(HeaderName::try_from(token).map_err(|_| BadHead::Connection)?),
            }
        }
    }
    let mut wanted = headers.get_all(header::UPGRADE).iter();
    let is_websocket =
        wanted.next().is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(WEBSOCKET.as_bytes()));
    let is_upgrade = upgrades && is_websocket && wanted.next().is_none();
    for name in named {
        // What says where the message ends or whom it means is no matter of one hop.
        if [header::HOST, header::CONTENT_LENGTH, header::AUTHORIZATION, header::COOKIE].contains(&name) {
            return Err(BadHead::Connection);
        }
        if name != header::TE {
            headers.remove(name);
        }
    }
    HOP_HEADERS.iter().for_each(|name| {
        headers.remove(name);
    });
    Ok(is_upgrade)
}

fn has_token(value: &HeaderValue, wanted: &str) -> bool {
    let tokens = value.to_str().unwrap_or_default().split(',');
    tokens
        .map(|token| token.split(';').next().unwrap_or_default().trim())
        .any(|token| token.eq_ignore_ascii_case(wanted))
}

/// The request as the workload gets it: what was judged (T-22), less what it must not get (policy A-11), and what it is
/// told (policy F-2).
///
/// `None`: the permit says what cannot be written in a head.
pub(super) fn forwarded<B>(asked: &Asked, way: &Way, permit: &RequestPermit, body: B) -> Option<Request<B>> {
    let mut headers = asked.headers.clone();
    strip_reserved(&mut headers);
    for name in permit.removed_headers() {
        headers.remove(name);
    }
    remove_cookies(&mut headers, permit);
    for (name, value) in permit.added_headers() {
        headers.append(HeaderName::try_from(name).ok()?, HeaderValue::try_from(value).ok()?);
    }
    if way.is_upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static(WEBSOCKET));
    }
    let mut request = Request::new(body);
    *request.method_mut() = asked.method.clone();
    *request.version_mut() = way.version;
    *request.headers_mut() = headers;
    *request.uri_mut() = uri(way, path(asked, permit)?)?;
    Some(request)
}

/// Other cookies stay as they are.
fn remove_cookies(headers: &mut HeaderMap, permit: &RequestPermit) {
    if permit.removed_cookies().next().is_none() || !headers.contains_key(header::COOKIE) {
        return;
    }
    let is_removed = |name: &str| permit.removed_cookies().any(|removed| removed == name);
    let kept: Vec<HeaderValue> = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| without_cookies(value.as_bytes(), is_removed))
        .filter_map(|value| HeaderValue::from_bytes(&value).ok())
        .collect();
    headers.remove(header::COOKIE);
    for value in kept {
        headers.append(header::COOKIE, value);
    }
}

/// The path that was judged.
pub(super) fn path(asked: &Asked, permit: &RequestPermit) -> Option<PathAndQuery> {
    match (permit.upstream_path(), &asked.path) {
        (Some(judged), Some(sent)) if sent == judged => Some(sent.clone()),
        (Some(judged), _) => PathAndQuery::from_maybe_shared(bytes::Bytes::from(judged.to_owned())).ok(),
        (None, _) => None,
    }
}

fn uri(way: &Way, path: PathAndQuery) -> Option<Uri> {
    let mut parts = http::uri::Parts::default();
    parts.path_and_query = Some(path);
    if let Some((scheme, authority)) = &way.authority {
        parts.scheme = Some(scheme.clone());
        parts.authority = Some(authority.clone());
    }
    Uri::from_parts(parts).ok()
}

/// Removes what ends at this hop from an answer.
pub(super) fn strip_answer(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.to_str().unwrap_or_default().split(','))
        .filter_map(|token| HeaderName::try_from(token.trim()).ok())
        .filter(|name| *name != header::CONTENT_LENGTH)
        .collect();
    for name in named.iter().chain(&HOP_HEADERS) {
        headers.remove(name);
    }
}
