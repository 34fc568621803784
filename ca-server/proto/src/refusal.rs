//! Why the authority refused, for programs: a reason code in the details of the gRPC status.
//!
//! Only callers that proved who they are (a node's certificate, or the secret of a token) get one. Strangers get an
//! opaque text: what exists and what does not is none of their business.

use std::collections::HashMap;
use std::fmt;

use prost::Message as _;
use prost_types::Any;
use tonic::{Code, Status};

use crate::rpc;

const DOMAIN: &str = "culvert.io";
const ERROR_INFO_URL: &str = "type.googleapis.com/google.rpc.ErrorInfo";

/// What strangers are told.
const OPAQUE: &str = "not authenticated";

macro_rules! reasons {
    ($($(#[$doc:meta])+ $variant:ident = $code:literal, $status:ident;)+) => {
        /// The reason of a refusal. Its code stands in the wire, in the log and in the counter's label.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason { $($(#[$doc])+ $variant,)+ }

        impl Reason {
            /// Every reason, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The code on the wire.
            pub fn code(self) -> &'static str {
                match self { $(Self::$variant => $code,)+ }
            }

            /// The gRPC status that carries it.
            pub fn status_code(self) -> Code {
                match self { $(Self::$variant => Code::$status,)+ }
            }
        }
    };
}

reasons! {
    /// The caller presented neither a node's certificate nor a token that the authority knows.
    Stranger = "STRANGER", Unauthenticated;
    /// The presented certificate is valid but not a node's.
    NotANode = "NOT_A_NODE", Unauthenticated;
    /// The token was used with another key.
    TokenUsed = "TOKEN_USED", Unauthenticated;
    /// The token's time is over.
    TokenExpired = "TOKEN_EXPIRED", Unauthenticated;
    /// The token was made for a node of another name.
    TokenNode = "TOKEN_NODE", Unauthenticated;
    /// No workload document names the calling node.
    NodeUnknown = "NODE_UNKNOWN", PermissionDenied;
    /// No workload of that identity runs on the calling node.
    IdentityNotOnNode = "IDENTITY_NOT_ON_NODE", PermissionDenied;
    /// The request names no identity to issue for.
    IdentityMissing = "IDENTITY_MISSING", PermissionDenied;
    /// The name is that of a node or of the authority, which cannot be asked for.
    IdentityReserved = "IDENTITY_RESERVED", PermissionDenied;
    /// The name belongs to another trust domain.
    TrustDomain = "TRUST_DOMAIN", PermissionDenied;
    /// A field of the request does not parse.
    Field = "FIELD", InvalidArgument;
    /// The signing request is larger than the limit.
    CsrTooLarge = "CSR_TOO_LARGE", InvalidArgument;
    /// The signing request is not PKCS#10.
    CsrMalformed = "CSR_MALFORMED", InvalidArgument;
    /// Its key is of a kind or size that is not signed.
    CsrKey = "CSR_KEY", InvalidArgument;
    /// Its signature algorithm does not go with its key.
    CsrAlgorithm = "CSR_ALGORITHM", InvalidArgument;
    /// Its signature is not by its key: no proof of possession.
    CsrSignature = "CSR_SIGNATURE", InvalidArgument;
    /// It asks for names other than the granted one.
    CsrNames = "CSR_NAMES", InvalidArgument;
    /// A renewal came with the key of the present certificate.
    KeyReused = "KEY_REUSED", InvalidArgument;
    /// Too many requests at once.
    Overloaded = "OVERLOADED", ResourceExhausted;
    /// The authority cannot issue at present; the request may be repeated.
    NotReady = "NOT_READY", Unavailable;
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// A refusal with its reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct Refusal {
    /// For programs.
    pub reason: Reason,
    /// For people: the field, the value, what was expected, what to do.
    pub message: String,
}

impl Refusal {
    /// A refusal with its sentence.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// The gRPC status for a caller that proved who it is.
    pub fn to_status(&self) -> Status {
        let code = self.reason.status_code();
        let info = rpc::ErrorInfo {
            reason: self.reason.code().to_owned(),
            domain: DOMAIN.to_owned(),
            metadata: HashMap::new(),
        };
        let details = rpc::Status {
            code: code.into(),
            message: self.message.clone(),
            details: vec![Any { type_url: ERROR_INFO_URL.to_owned(), value: info.encode_to_vec() }],
        };
        Status::with_details(code, self.message.clone(), details.encode_to_vec().into())
    }

    /// The gRPC status for a stranger: no reason, the same text each time.
    pub fn opaque_status() -> Status {
        Status::unauthenticated(OPAQUE)
    }

    /// Reads the reason from a status; `None` for one without (strangers, other authorities, newer reasons).
    pub fn from_status(status: &Status) -> Option<Self> {
        let details = rpc::Status::decode(status.details()).ok()?;
        let any = details.details.iter().find(|any| any.type_url == ERROR_INFO_URL)?;
        let info = rpc::ErrorInfo::decode(any.value.as_slice()).ok()?;
        let reason =
            Reason::ALL.iter().find(|reason| info.domain == DOMAIN && info.reason == reason.code())?;
        Some(Self { reason: *reason, message: status.message().to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_the_wire() {
        for reason in Reason::ALL {
            let refusal = Refusal::new(*reason, "the field, the value, what was expected");
            assert_eq!(Refusal::from_status(&refusal.to_status()), Some(refusal));
        }
    }

    #[test]
    fn codes_are_distinct() {
        let codes: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.code()).collect();
        assert_eq!(codes.len(), Reason::ALL.len());
    }

    #[test]
    fn a_status_without_details_or_with_foreign_ones_has_no_reason() {
        assert_eq!(Refusal::from_status(&Refusal::opaque_status()), None);
        assert_eq!(
            Refusal::from_status(&Status::with_details(Code::Internal, "x", vec![1, 2, 3].into())),
            None
        );
    }

    #[test]
    fn load_is_never_told_as_missing_authentication() {
        assert_eq!(Reason::Overloaded.status_code(), Code::ResourceExhausted);
        assert_eq!(Reason::NotReady.status_code(), Code::Unavailable);
    }
}
