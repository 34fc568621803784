//! One case: its question asked, its answer compared.

use serde_json::{Map, Value};

use super::{
    Mint, authenticate, authorize, client,
    compare::differences,
    connect,
    fields::InvalidCases,
    file::{Case, CaseFile, CheckKind, Policies},
    report::Outcome,
    validate, world,
};
use crate::{
    policy::{DenialReason, RequestDenial, RequestDenialKind, Verdict},
    workload::Protocol,
};

/// Every key that a request may have.
pub(super) const KEYS: [&str; 51] = [
    "allowed",
    "auto_mtls",
    "client",
    "client.identity",
    "client.kind",
    "client.namespace",
    "client.proxied",
    "client.workload",
    "connection.sni",
    "connection.tls",
    "default_sni",
    "destination.ip",
    "destination.labels",
    "destination.namespace",
    "destination.port",
    "destination.service",
    "destination.service_port",
    "destination.service_port_name",
    "destination.user",
    "dr",
    "dr_tls",
    "endpoint_labels",
    "jwks.fetch",
    "jwks.no_alg",
    "jwks.no_kid",
    "jwt",
    "mesh_external",
    "metadata",
    "object",
    "oidc.discovery",
    "pods",
    "port",
    "protocol",
    "request.auth.audiences",
    "request.auth.claims",
    "request.auth.presenter",
    "request.auth.principal",
    "request.headers",
    "request.host",
    "request.method",
    "request.path",
    "server_mode",
    "server_san",
    "service",
    "service_identities",
    "source.ip",
    "source.namespace",
    "source.principal",
    "subset",
    "trust_domain",
    "value",
];

/// A case with all that answers it.
pub(super) struct Check<'c> {
    pub(super) file: &'c CaseFile,
    pub(super) case: &'c Case,
    pub(super) policies: &'c Policies,
    pub(super) mint: &'c dyn Mint,
    pub(super) now: u64,
}

/// What a check found out.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) got: Map<String, Value>,
    pub(super) policy: Option<String>,
    pub(super) rule: Option<String>,
    pub(super) reason: Option<String>,
    /// Another word for a key that a case may use.
    pub(super) also: Option<(&'static str, &'static str)>,
}

impl Found {
    pub(super) fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.got.insert(key.to_owned(), value.into());
    }

    pub(super) fn decided(&mut self, verdict: &Verdict, reason: Option<String>) {
        self.policy = verdict.policy.as_deref().map(str::to_owned);
        self.rule = verdict.rule.as_deref().map(str::to_owned);
        self.reason = reason;
        if let Some(shadow) = &verdict.shadow {
            self.set("shadow", if shadow.allowed { "ALLOW" } else { "DENY" });
        }
    }
}

impl Check<'_> {
    pub(super) fn run(&self) -> Result<Outcome, InvalidCases> {
        let found = match self.case.check {
            CheckKind::Authorize | CheckKind::Authenticate | CheckKind::Connect
                if let Some(unreadable) = &self.policies.unreadable =>
            {
                self.denied_unread(unreadable)
            }
            CheckKind::Authorize => authorize::authorize(self),
            CheckKind::Authenticate => authenticate::authenticate(self),
            CheckKind::Connect => connect::connect(self),
            CheckKind::Select => world::select(self),
            CheckKind::Validate => validate::validate(self),
            CheckKind::SecureNaming => client::secure_naming(self),
            CheckKind::ClientTls => client::client_tls(self),
        }?;
        let mut differences = differences(self.case.expect.entries(), &found.got);
        let is_meant = |key: &str, word: &Value| found.also.is_some_and(|(k, w)| k == key && word == w);
        differences.retain(|each| !is_meant(&each.key, &each.expected));
        Ok(Outcome {
            name: self.case.name.clone(),
            pass: differences.is_empty(),
            got: found.got,
            policy: found.policy,
            rule: found.rule,
            reason: found.reason,
            unusable: None,
            differences,
        })
    }

    /// As the daemon has it while it knows nothing of what a document says (T-19).
    fn denied_unread(&self, document: &str) -> Result<Found, InvalidCases> {
        let request = &self.case.request;
        let protocol = world::protocol(request)?;
        let mut found = Found { policy: Some(document.to_owned()), ..Found::default() };
        let (kind, reason) = (RequestDenialKind::Denied, DenialReason::PolicyUnusable);
        match (self.case.check, protocol) {
            (CheckKind::Authenticate, _) => {
                authorize::closed(&mut found, "CONNECTION_FAILED");
                found.set("attributes", authenticate::nobody());
            }
            (_, Protocol::Tcp) => authorize::closed(&mut found, "DENY"),
            (_, Protocol::Http | Protocol::Grpc) => {
                let headers = authorize::HeaderLines::read(request, protocol)?;
                let denial = RequestDenial::new(kind, reason, Verdict::default(), &headers);
                authorize::refused(&mut found, "DENY", &denial);
            }
        }
        found.reason = Some(format!("{}: nobody can tell what the document says", reason.label()));
        Ok(found)
    }
}
