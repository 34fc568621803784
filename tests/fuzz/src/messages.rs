//! What arrives at the CA and at its clients: messages, and the signing requests inside them.

use ca_proto::{
    ca::{JoinRequest, JoinResponse, RenewRequest, RenewResponse, WatchResponse},
    convert::{CreateCertificate, CsrDer, Issued, IssuedToNode, Join, Renew, Watched},
    istio::{IstioCertificateRequest, IstioCertificateResponse},
};
use prost::Message;

use crate::csr::Csr;

/// The first byte chooses the message.
pub(crate) fn messages(data: &[u8]) {
    let Some((which, rest)) = data.split_first() else { return };
    match which % 9 {
        0 => through::<JoinRequest, Join>(rest),
        1 => through::<JoinResponse, IssuedToNode>(rest),
        2 => through::<RenewRequest, Renew>(rest),
        3 => through::<RenewResponse, IssuedToNode>(rest),
        4 => through::<WatchResponse, Watched>(rest),
        5 => through::<IstioCertificateRequest, CreateCertificate>(rest),
        6 => through::<IstioCertificateResponse, Issued>(rest),
        7 => drop(CsrDer::from_der(rest.to_vec()).map(|der| signing_request(&der))),
        _ => {
            if let Ok(text) = std::str::from_utf8(rest) {
                drop(CsrDer::from_pem(text).map(|der| signing_request(&der)));
            }
        }
    }
}

/// Decoded and converted; a refusal says what is wrong.
fn through<M: Message + Default, T: TryFrom<M>>(bytes: &[u8])
where
    T::Error: std::fmt::Display,
{
    let Ok(message) = M::decode(bytes) else { return };
    if let Err(refused) = T::try_from(message) {
        assert!(!refused.to_string().is_empty());
    }
}

/// A request that is accepted carries a key that certificates can name, and asks for no name that it was not granted.
fn signing_request(der: &CsrDer) {
    match Csr::verify(der) {
        Ok(csr) => {
            assert!(!csr.key().spki().is_empty() && csr.key().hash() != [0; 32]);
            assert!(!rcgen::PublicKeyData::subject_public_key_info(csr.key()).is_empty());
            drop(csr.asks_for_nothing_but("spiffe://cluster.local/ns/a/sa/b"));
        }
        Err(refusal) => assert!(!refusal.to_string().is_empty()),
    }
}
