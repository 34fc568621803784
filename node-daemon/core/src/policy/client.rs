//! The client's side: how it speaks TLS to a service, and whether that reaches the application (policy C, D).

use std::{collections::BTreeMap, sync::Arc};

use super::{
    compile::{Compiled, SERVICE_SUFFIX},
    destination_rule::{Chosen, ClientSetting, NamedFiles, Part, TlsMode, TlsSettings},
};
use crate::workload::{Mesh, ObjectName};

/// What is known of the server's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerMode {
    Strict,
    Permissive,
    /// Its policy asks for nothing.
    None,
    /// Its policy is not known.
    Unknown,
    /// There is no proxy.
    Naked,
}

/// What decides how a client speaks.
#[derive(Clone, Copy, Debug)]
pub struct ClientFacts<'a> {
    /// The setting of the DestinationRule that applies; `None`: there is none.
    pub rule: Option<&'a TlsSettings>,
    pub auto_mtls: bool,
    /// Outside the mesh: never automatic.
    pub mesh_external: bool,
    pub server: ServerMode,
    /// Whether the endpoint has a proxy.
    pub endpoint_enrolled: bool,
    /// Who may answer (policy D).
    pub identities: &'a [String],
    pub default_sni: Option<&'a str>,
}

/// How the client speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTls {
    pub mode: ClientMode,
    /// Names of which the server must prove one; `None`: nobody asks.
    pub subject_alt_names: Option<Vec<String>>,
    pub sni: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientMode {
    IstioMutual,
    Mutual,
    Simple,
    Plaintext,
}

impl ClientMode {
    pub const fn name(self) -> &'static str {
        match self {
            Self::IstioMutual => "ISTIO_MUTUAL",
            Self::Mutual => "MUTUAL",
            Self::Simple => "SIMPLE",
            Self::Plaintext => "PLAINTEXT",
        }
    }
}

/// What was asked for, as rules of clients name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// A complete name: that of a service, or a host outside the mesh.
    pub host: Arc<str>,
    /// Of the service, or of the document that tells of the host.
    pub namespace: Arc<str>,
    /// Of the service, never the workload's.
    pub port: u16,
}

impl Asked {
    /// The complete name of a service.
    pub fn host_of(service: &ObjectName) -> Arc<str> {
        format!("{}.{}.{SERVICE_SUFFIX}", service.name, service.namespace).into()
    }
}

impl Compiled {
    /// What the DestinationRules say about connections from a namespace to an endpoint with these labels.
    pub fn client_setting(
        &self,
        asked: &Asked,
        labels: &BTreeMap<String, String>,
        client_namespace: &str,
        mesh: &Mesh,
    ) -> ClientSetting<'_> {
        let namespaces = [client_namespace, &*asked.namespace, mesh.root_namespace.as_str()];
        self.client_rules.setting(&asked.host, asked.port, Chosen::Labelled(labels), namespaces)
    }

    /// The files that the DestinationRules name, and by which part of which rule (T-20).
    pub fn named_files(&self) -> impl Iterator<Item = (&ObjectName, Part, NamedFiles)> {
        self.client_rules.files()
    }
}

/// An explicit setting always wins, also when it is wrong; else automatic mutual TLS where both sides have a proxy and the
/// server's policy asks for certificates; else plaintext.
pub fn client_tls(facts: &ClientFacts<'_>) -> ClientTls {
    let own_names =
        |settings: &TlsSettings| Some(settings.subject_alt_names.clone()).filter(|names| !names.is_empty());
    let mesh = |settings: Option<&TlsSettings>| ClientTls {
        mode: ClientMode::IstioMutual,
        subject_alt_names: settings.and_then(own_names).or_else(|| Some(facts.identities.to_vec())),
        sni: settings.and_then(|own| own.sni.clone()).or_else(|| facts.default_sni.map(str::to_owned)),
    };
    let plain = ClientTls { mode: ClientMode::Plaintext, subject_alt_names: None, sni: None };
    let ordinary =
        |mode, own: &TlsSettings| ClientTls { mode, subject_alt_names: own_names(own), sni: own.sni.clone() };
    match facts.rule {
        Some(own) => match own.mode {
            TlsMode::Disable => plain,
            TlsMode::Simple => ordinary(ClientMode::Simple, own),
            TlsMode::Mutual => ordinary(ClientMode::Mutual, own),
            TlsMode::IstioMutual => mesh(Some(own)),
        },
        None => {
            let asks = matches!(facts.server, ServerMode::Strict | ServerMode::Permissive);
            if facts.auto_mtls && !facts.mesh_external && asks && facts.endpoint_enrolled {
                mesh(None)
            } else {
                plain
            }
        }
    }
}

impl ClientTls {
    /// Whether a request reaches the application (the result matrix of policy C; D-6 for an empty set of names).
    pub fn reaches(&self, server: ServerMode) -> bool {
        let is_open = matches!(server, ServerMode::None | ServerMode::Unknown | ServerMode::Naked);
        match self.mode {
            ClientMode::Plaintext => server != ServerMode::Strict,
            ClientMode::IstioMutual => {
                !is_open && self.subject_alt_names.as_ref().is_none_or(|names| !names.is_empty())
            }
            // The application's own TLS: passed through, unless the server asks for the mesh's.
            ClientMode::Simple | ClientMode::Mutual => server != ServerMode::Strict,
        }
    }
}

/// Whether a server that proves these names may answer for one of which `allowed` is the set: one name equals one entry
/// exactly, and an empty set allows nobody (policy D-5, D-6).
pub fn may_answer<'n>(allowed: &[String], proven: impl IntoIterator<Item = &'n str>) -> bool {
    proven.into_iter().any(|name| allowed.iter().any(|entry| entry == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(mode: TlsMode) -> TlsSettings {
        TlsSettings {
            mode,
            client_certificate: None,
            private_key: None,
            ca_certificates: None,
            subject_alt_names: Vec::new(),
            sni: None,
        }
    }

    const SERVERS: [ServerMode; 5] = [
        ServerMode::Strict,
        ServerMode::Permissive,
        ServerMode::None,
        ServerMode::Unknown,
        ServerMode::Naked,
    ];

    #[track_caller]
    fn check(rule: Option<TlsMode>, auto_mtls: bool, expected: [(ClientMode, bool); 5]) {
        let rule = rule.map(settings);
        let identities = ["spiffe://td/ns/a/sa/b".to_owned()];
        for (server, expected) in SERVERS.into_iter().zip(expected) {
            let facts = ClientFacts {
                rule: rule.as_ref(),
                auto_mtls,
                mesh_external: false,
                server,
                endpoint_enrolled: true,
                identities: &identities,
                default_sni: Some("x"),
            };
            let tls = client_tls(&facts);
            assert_eq!((tls.mode, tls.reaches(server)), expected, "{rule:?} {server:?}");
        }
    }

    #[test]
    fn the_matrix_of_client_and_server() {
        // policy C
        use ClientMode::{IstioMutual, Plaintext, Simple};
        let plain =
            [(Plaintext, false), (Plaintext, true), (Plaintext, true), (Plaintext, true), (Plaintext, true)];
        check(None, false, plain);
        check(Some(TlsMode::Disable), true, plain);
        let mesh = [
            (IstioMutual, true),
            (IstioMutual, true),
            (IstioMutual, false),
            (IstioMutual, false),
            (IstioMutual, false),
        ];
        check(Some(TlsMode::IstioMutual), false, mesh);
        let auto = [
            (IstioMutual, true),
            (IstioMutual, true),
            (Plaintext, true),
            (Plaintext, true),
            (Plaintext, true),
        ];
        check(None, true, auto);
        check(
            Some(TlsMode::Simple),
            true,
            [(Simple, false), (Simple, true), (Simple, true), (Simple, true), (Simple, true)],
        );
    }

    #[test]
    fn an_empty_set_of_names_allows_nobody() {
        // policy D-5, D-6
        let one = ["spiffe://td/ns/a/sa/b".to_owned()];
        assert!(may_answer(&one, ["other", "spiffe://td/ns/a/sa/b"]));
        for proven in ["spiffe://td/ns/a/sa/bb", "spiffe://td/ns/a/sa/B", "td/ns/a/sa/b", ""] {
            assert!(!may_answer(&one, [proven]), "{proven}");
        }
        assert!(!may_answer(&[], ["spiffe://td/ns/a/sa/b"]));
        assert!(!may_answer(&one, []));
    }
}
