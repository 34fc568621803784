//! Names that arrive as text: the authority of a tunnel, identities, trust domains, join tokens.

use ca_proto::join_token::JoinToken;
use node_core::tunnel::header::{authority as written, parse_authority};
use spiffe_id::{PeerName, SpiffeId, TrustDomain};

/// What is read has one spelling, and it is the one that was read.
pub(crate) fn authority(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(target) = parse_authority(text) {
        assert_eq!(parse_authority(&written(target)), Ok(target), "{text:?}");
        assert!(target.port() > 0 && target.ip().to_canonical() == target.ip(), "{text:?}");
    }
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.to_string(), text);
        assert_eq!(PeerName::parse_uri(text), Ok(PeerName::Workload(id)));
    }
    if let Ok(name) = PeerName::parse_uri(text) {
        assert_eq!(name.to_string(), text);
    }
    if let Ok(domain) = text.parse::<TrustDomain>() {
        assert_eq!(domain.to_string(), text);
    }
    if let Ok(token) = text.parse::<JoinToken>() {
        assert_eq!(&**token.expose(), text.trim());
    }
}
