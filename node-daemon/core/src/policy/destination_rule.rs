//! Front end of `DestinationRule`: how a client speaks to a host, as far as TLS goes (policy C). The rest belongs to others.

use std::{cmp::Reverse, collections::BTreeMap, fmt, sync::Arc};

use serde_json::Value;

use super::{
    compile::SERVICE_SUFFIX,
    reader::{Fault, Fields, Item, Warnings},
};
use crate::{decode::Object, workload::ObjectName};

type Labels = BTreeMap<String, String>;

/// What a rule says about one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DestinationRule {
    pub(crate) host: String,
    policy: TrafficPolicy,
    subsets: BTreeMap<Arc<str>, Subset>,
}

/// Endpoints by their labels, and what is said of them alone.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Subset {
    labels: Labels,
    policy: TrafficPolicy,
}

/// The TLS part of a `trafficPolicy`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct TrafficPolicy {
    tls: Option<Arc<TlsSettings>>,
    /// By the service's port. A block without `tls` asks for none: blocks are not merged.
    ports: BTreeMap<u16, Option<Arc<TlsSettings>>>,
}

/// Which part of a rule speaks. Displays as the path of its `tls`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    pub subset: Option<Arc<str>>,
    pub port: Option<u16>,
}

impl fmt::Display for Part {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("spec.")?;
        if let Some(subset) = &self.subset {
            write!(formatter, "subsets[{subset}].")?;
        }
        formatter.write_str("trafficPolicy.")?;
        if let Some(port) = self.port {
            write!(formatter, "portLevelSettings[{port}].")?;
        }
        formatter.write_str("tls")
    }
}

/// `tls`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsSettings {
    pub mode: TlsMode,
    pub client_certificate: Option<String>,
    pub private_key: Option<String>,
    pub ca_certificates: Option<String>,
    pub subject_alt_names: Vec<String>,
    pub sni: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    Disable,
    Simple,
    Mutual,
    IstioMutual,
}

impl TlsMode {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Disable => "DISABLE",
            Self::Simple => "SIMPLE",
            Self::Mutual => "MUTUAL",
            Self::IstioMutual => "ISTIO_MUTUAL",
        }
    }
}

/// Which subset is meant.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Chosen<'a> {
    /// The one of this name, or none.
    Named(Option<&'a str>),
    /// That to which an endpoint with these labels belongs.
    Labelled(&'a Labels),
}

/// The subsets of an endpoint say different things.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Conflict(Vec<Arc<str>>);

impl DestinationRule {
    /// The setting for one port of the host: the subset's, else the port's block, else the rule's (policy C).
    pub(crate) fn tls(&self, port: Option<u16>, subset: Option<&str>) -> Option<&TlsSettings> {
        let (_, settings) = self.said(port, Chosen::Named(subset)).ok().flatten()?;
        Some(settings)
    }

    fn said(
        &self,
        port: Option<u16>,
        chosen: Chosen<'_>,
    ) -> Result<Option<(Part, &Arc<TlsSettings>)>, Conflict> {
        let meant = self.subsets.iter().filter(|(name, subset)| match chosen {
            Chosen::Named(named) => named == Some(&***name),
            Chosen::Labelled(labels) => subset.selects(labels),
        });
        let mut speaking = Vec::new();
        for (name, subset) in meant {
            if let Some((port, settings)) = subset.policy.said(port) {
                speaking.push((Part { subset: Some(Arc::clone(name)), port }, settings));
            }
        }
        if speaking.iter().any(|(_, settings)| *settings != speaking[0].1) {
            return Err(Conflict(speaking.into_iter().filter_map(|(part, _)| part.subset).collect()));
        }
        let whole = || self.policy.said(port).map(|(port, settings)| (Part { subset: None, port }, settings));
        Ok(speaking.into_iter().next().or_else(whole))
    }

    /// All settings, for what status says and for the files that they name.
    pub(super) fn settings(&self) -> impl Iterator<Item = (Part, &Arc<TlsSettings>)> {
        let subsets = self.subsets.iter().map(|(name, subset)| (Some(name), &subset.policy));
        std::iter::once((None, &self.policy)).chain(subsets).flat_map(|(subset, policy)| {
            let whole = policy.tls.iter().map(|settings| (None, settings));
            let ports = policy.ports.iter().filter_map(|(port, tls)| Some((Some(*port), tls.as_ref()?)));
            let part = move |port| Part { subset: subset.cloned(), port };
            whole.chain(ports).map(move |(port, settings)| (part(port), settings))
        })
    }

    /// Subsets that say something of TLS and select no endpoint, as they name no label.
    pub(super) fn idle_subsets(&self) -> impl Iterator<Item = &Arc<str>> {
        let idle = self.subsets.iter().filter(|(_, subset)| {
            let speaks = subset.policy.tls.is_some() || !subset.policy.ports.is_empty();
            speaks && subset.labels.is_empty()
        });
        idle.map(|(name, _)| name)
    }
}

impl Subset {
    fn selects(&self, labels: &Labels) -> bool {
        !self.labels.is_empty() && self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// All rules of the mesh, by namespace.
#[derive(Clone, Debug, Default)]
pub(crate) struct ClientRules(Vec<ClientRule>);

#[derive(Clone, Debug)]
struct ClientRule {
    name: ObjectName,
    label: Arc<str>,
    host: String,
    /// `None`: it could not be used.
    rule: Option<DestinationRule>,
}

/// What the rules say about one destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientSetting<'a> {
    /// No rule, or one that is silent about TLS.
    Unsaid,
    Tls(Said<'a>),
    /// The rule cannot be used: the destination is denied (T-20).
    Refused {
        rule: &'a Arc<str>,
        problem: String,
    },
}

/// One setting, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said<'a> {
    /// `DestinationRule/namespace/name`
    pub rule: &'a Arc<str>,
    /// Of the rule: whose files it may name (T-20).
    pub namespace: &'a Arc<str>,
    pub part: Part,
    pub settings: &'a Arc<TlsSettings>,
}

/// Files that one setting of a rule names (T-20).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NamedFiles {
    /// Of the rule: the operator gives folders to namespaces.
    pub namespace: Arc<str>,
    pub ca_certificates: Option<String>,
    pub client_certificate: Option<String>,
    pub private_key: Option<String>,
}

impl NamedFiles {
    /// `None`: the setting reads no file of its own.
    pub fn of(namespace: &Arc<str>, settings: &TlsSettings) -> Option<Self> {
        let is_mutual = settings.mode == TlsMode::Mutual;
        if !is_mutual && settings.mode != TlsMode::Simple {
            return None;
        }
        let mutual = |path: &Option<String>| path.clone().filter(|_| is_mutual);
        let named = Self {
            namespace: Arc::clone(namespace),
            ca_certificates: settings.ca_certificates.clone(),
            client_certificate: mutual(&settings.client_certificate),
            private_key: mutual(&settings.private_key),
        };
        Some(named).filter(|named| named.ca_certificates.is_some() || is_mutual)
    }
}

impl ClientRules {
    pub(super) fn add(
        &mut self,
        name: &ObjectName,
        label: &Arc<str>,
        rule: Result<&DestinationRule, &String>,
    ) {
        let host = rule.map_or_else(|host| host, |rule| &rule.host).clone();
        self.0.push(ClientRule { name: name.clone(), label: label.clone(), host, rule: rule.ok().cloned() });
    }

    /// One rule counts: of the client's namespace, else of the service's, else of the root namespace; in each the one
    /// whose host says most (policy C). `host` is a complete name, `port` the service's.
    pub(crate) fn setting(
        &self,
        host: &str,
        port: u16,
        chosen: Chosen<'_>,
        namespaces: [&str; 3],
    ) -> ClientSetting<'_> {
        let rule = namespaces.into_iter().find_map(|namespace| {
            let here = self.0.iter().filter(|rule| *rule.name.namespace == *namespace);
            let fitting = here.filter_map(|rule| Some((rule.specificity(host)?, Reverse(&rule.name), rule)));
            fitting.max_by_key(|(rank, name, _)| (*rank, *name)).map(|(.., rule)| rule)
        });
        let Some(found) = rule else { return ClientSetting::Unsaid };
        let refused = |problem| ClientSetting::Refused { rule: &found.label, problem };
        let Some(rule) = &found.rule else {
            return refused("the rule for this host cannot be used".to_owned());
        };
        match rule.said(Some(port), chosen) {
            Ok(None) => ClientSetting::Unsaid,
            Ok(Some((part, settings))) => ClientSetting::Tls(Said {
                rule: &found.label,
                namespace: &found.name.namespace,
                part,
                settings,
            }),
            Err(Conflict(subsets)) => refused(format!(
                "the endpoint belongs to the subsets {}, which say different things: let their labels tell them apart",
                subsets.join(", ")
            )),
        }
    }

    /// The files that the rules name, each once, and by which field of which rule.
    pub(crate) fn files(&self) -> impl Iterator<Item = (&ObjectName, Part, NamedFiles)> {
        let usable = self.0.iter().filter_map(|known| Some((&known.name, known.rule.as_ref()?)));
        usable.flat_map(|(name, rule)| {
            let named = move |(part, settings): (Part, &Arc<TlsSettings>)| {
                Some((name, part, NamedFiles::of(&name.namespace, settings)?))
            };
            rule.settings().filter_map(named)
        })
    }
}

impl ClientRule {
    /// How much the rule's host says about `host`; `None`: it is for another one. A short name is of the rule's own
    /// namespace.
    fn specificity(&self, host: &str) -> Option<(bool, usize)> {
        if let Some(end) = self.host.strip_prefix('*') {
            return host.ends_with(end).then_some((false, end.len()));
        }
        let is_short = !self.host.contains('.');
        let complete = format!("{}.{}.{SERVICE_SUFFIX}", self.host, self.name.namespace);
        (self.host == host || (is_short && complete == host)).then_some((true, self.host.len()))
    }
}

impl TrafficPolicy {
    /// The setting, and the port in whose block it stands.
    fn said(&self, port: Option<u16>) -> Option<(Option<u16>, &Arc<TlsSettings>)> {
        match port.and_then(|port| Some((port, self.ports.get(&port)?))) {
            Some((port, block)) => Some((Some(port), block.as_ref()?)),
            None => Some((None, self.tls.as_ref()?)),
        }
    }
}

pub(super) fn destination_rule(object: &Object, warnings: &mut Warnings) -> Result<DestinationRule, Fault> {
    let mut fields = Fields::spec(object)?;
    let host = match fields.take("host")? {
        Some(host) => host.filled_text()?.to_owned(),
        None => {
            let remedy = "name the host that the rule is for";
            return Err(Fault::new("spec.host", &object.spec["host"], "the name of a service", remedy));
        }
    };
    let policy = traffic_policy(&mut fields, warnings)?;
    let mut subsets = BTreeMap::new();
    for item in fields.list("subsets")? {
        let mut subset = Fields::open(&item)?;
        let Some(name) = subset.take("name")? else {
            return Err(subset.fault("a subset with a name", "write - name: v1"));
        };
        let name: Arc<str> = name.filled_text()?.into();
        let labels = subset.labels("labels")?.unwrap_or_default();
        subsets.insert(name, Subset { labels, policy: traffic_policy(&mut subset, warnings)? });
    }
    Ok(DestinationRule { host, policy, subsets })
}

fn traffic_policy(fields: &mut Fields<'_>, warnings: &mut Warnings) -> Result<TrafficPolicy, Fault> {
    let Some(item) = fields.take("trafficPolicy")? else { return Ok(TrafficPolicy::default()) };
    let mut inner = Fields::open(&item)?;
    let tls = inner.take("tls")?.map(|item| tls_settings(&item, warnings)).transpose()?.map(Arc::new);
    let mut ports = BTreeMap::new();
    for block in inner.list("portLevelSettings")? {
        let mut block_fields = Fields::open(&block)?;
        let expected = "a block with port: {number: …}";
        let Some(port) = block_fields.take("port")? else {
            return Err(block_fields.fault(expected, "name the port of the service"));
        };
        let number = Fields::open(&port)?.take("number")?;
        let number = number.and_then(|number| number.port_number()).filter(|number| *number > 0);
        let Some(number) = number else { return Err(port.fault(expected, "write a number from 1 to 65535")) };
        let tls =
            block_fields.take("tls")?.map(|item| tls_settings(&item, warnings)).transpose()?.map(Arc::new);
        ports.insert(number, tls);
    }
    Ok(TrafficPolicy { tls, ports })
}

/// Reads the rule of one document, and what it says about a port.
pub(crate) fn rule_of(object: &Object) -> Result<DestinationRule, (String, String)> {
    destination_rule(object, &mut Warnings::default()).map_err(told)
}

fn told(fault: Fault) -> (String, String) {
    (fault.field, format!("expected {}: {}", fault.expected, fault.remedy))
}

/// Reads `tls` alone.
pub(crate) fn tls_of(value: &Value) -> Result<TlsSettings, (String, String)> {
    let item = Item { path: "tls".to_owned(), value };
    tls_settings(&item, &mut Warnings::default()).map_err(told)
}

fn tls_settings(item: &Item<'_>, warnings: &mut Warnings) -> Result<TlsSettings, Fault> {
    let mut fields = Fields::open(item)?;
    let modes = [TlsMode::Disable, TlsMode::Simple, TlsMode::Mutual, TlsMode::IstioMutual];
    let mode = fields.one_of("mode", &modes.map(|mode| (mode.name(), mode)))?;
    let mut path = |name| -> Result<Option<String>, Fault> {
        Ok(fields.text(name)?.filter(|text| !text.is_empty()).map(str::to_owned))
    };
    let (client_certificate, private_key) = (path("clientCertificate")?, path("privateKey")?);
    let (ca_certificates, sni) = (path("caCertificates")?, path("sni")?);
    let names = fields.texts("subjectAltNames")?;
    let subject_alt_names = names.iter().filter_map(|name| name.value.as_str()).map(str::to_owned).collect();
    for (name, value) in [("clientCertificate", &client_certificate), ("privateKey", &private_key)] {
        if mode == TlsMode::Mutual && value.is_none() {
            return Err(Fault::new(
                &fields.path_of(name),
                &Value::Null,
                "a file, because the mode is MUTUAL",
                "name the file, or write mode: ISTIO_MUTUAL for the mesh's own certificates",
            ));
        }
    }
    let files = [&client_certificate, &private_key, &ca_certificates];
    if mode == TlsMode::IstioMutual && files.iter().any(|file| file.is_some()) {
        warnings.say(&item.path, "ISTIO_MUTUAL uses the mesh's own certificates: the files are not read");
    }
    fields.finish()?;
    Ok(TlsSettings { mode, client_certificate, private_key, ca_certificates, subject_alt_names, sni })
}
