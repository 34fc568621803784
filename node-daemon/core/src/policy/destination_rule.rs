//! Front end of `DestinationRule`: how a client speaks to a host, as far as TLS goes (policy C). The rest belongs to others.

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc};

use serde_json::Value;

use super::{
    compile::SERVICE_SUFFIX,
    reader::{Fault, Fields, Item, Warnings},
};
use crate::{decode::Object, workload::ObjectName};

/// What a rule says about one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DestinationRule {
    pub(crate) host: String,
    policy: TrafficPolicy,
    subsets: BTreeMap<String, TrafficPolicy>,
}

/// The TLS part of a `trafficPolicy`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct TrafficPolicy {
    tls: Option<TlsSettings>,
    /// By the service's port. A block without `tls` asks for none: blocks are not merged.
    ports: BTreeMap<u16, Option<TlsSettings>>,
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

impl DestinationRule {
    /// The setting for one port of the host: the subset's, else the port's block, else the rule's.
    pub(crate) fn tls(&self, port: Option<u16>, subset: Option<&str>) -> Option<&TlsSettings> {
        let of_subset = subset.and_then(|name| self.subsets.get(name)).and_then(|policy| policy.tls(port));
        of_subset.or_else(|| self.policy.tls(port))
    }

    /// All settings, for what status says.
    pub(super) fn modes(&self) -> impl Iterator<Item = TlsMode> {
        std::iter::once(&self.policy).chain(self.subsets.values()).flat_map(|policy| {
            policy.tls.iter().chain(policy.ports.values().flatten()).map(|settings| settings.mode)
        })
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientSetting<'a> {
    /// No rule, or one that is silent about TLS.
    Unsaid,
    Tls(&'a TlsSettings),
    /// The rule cannot be used: the destination is denied (T-20).
    Refused(&'a Arc<str>),
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
        subset: Option<&str>,
        namespaces: [&str; 3],
    ) -> ClientSetting<'_> {
        let chosen = namespaces.into_iter().find_map(|namespace| {
            let here = self.0.iter().filter(|rule| *rule.name.namespace == *namespace);
            let fitting = here.filter_map(|rule| Some((rule.specificity(host)?, Reverse(&rule.name), rule)));
            fitting.max_by_key(|(rank, name, _)| (*rank, *name)).map(|(.., rule)| rule)
        });
        let Some(chosen) = chosen else { return ClientSetting::Unsaid };
        match &chosen.rule {
            Some(rule) => rule.tls(Some(port), subset).map_or(ClientSetting::Unsaid, ClientSetting::Tls),
            None => ClientSetting::Refused(&chosen.label),
        }
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
    fn tls(&self, port: Option<u16>) -> Option<&TlsSettings> {
        match port.and_then(|port| self.ports.get(&port)) {
            Some(block) => block.as_ref(),
            None => self.tls.as_ref(),
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
        subsets.insert(name.filled_text()?.to_owned(), traffic_policy(&mut subset, warnings)?);
    }
    Ok(DestinationRule { host, policy, subsets })
}

fn traffic_policy(fields: &mut Fields<'_>, warnings: &mut Warnings) -> Result<TrafficPolicy, Fault> {
    let Some(item) = fields.take("trafficPolicy")? else { return Ok(TrafficPolicy::default()) };
    let mut inner = Fields::open(&item)?;
    let tls = inner.take("tls")?.map(|item| tls_settings(&item, warnings)).transpose()?;
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
        let tls = block_fields.take("tls")?.map(|item| tls_settings(&item, warnings)).transpose()?;
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
