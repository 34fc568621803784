//! Front end of `rbac.istio.io/v1alpha1`: `RbacConfig`, `ClusterRbacConfig`, `ServiceRole`, `ServiceRoleBinding`
//! (policy B-1 to B-11).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{
    authn_v1alpha1::DEFAULT_NAME,
    matching::{Glob, Pattern, config_time_matches},
    paths::PathPattern,
    reader::{Fault, Fields, Item, Usable, Warnings, networks, patterns, ports, warn_of_stars},
    rules::{Condition, MetadataPattern, Values},
    seen::Asked,
};
use crate::decode::Object;

/// Where RBAC runs (policy B-1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Switch {
    pub(super) mode: Mode,
    /// The list that the mode asks for; empty for the other modes.
    pub(super) listed: Listed,
    /// `enforcementMode: PERMISSIVE`: nobody is refused (policy B-11).
    pub(super) is_permissive: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Off,
    On,
    OnWithInclusion,
    OnWithExclusion,
}

/// Compared exactly, without wildcards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) services: BTreeSet<String>,
    pub(super) namespaces: BTreeSet<String>,
}

impl Switch {
    /// `service` is the complete name, or `None` for a port of no service (policy A-4).
    pub(super) fn runs(&self, service: Option<&str>, namespace: &str) -> bool {
        let is_listed = self.listed.namespaces.contains(namespace)
            || service.is_some_and(|service| self.listed.services.contains(service));
        match self.mode {
            Mode::Off => false,
            Mode::On => true,
            Mode::OnWithInclusion => is_listed,
            Mode::OnWithExclusion => !is_listed,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceRole {
    pub(super) rules: Vec<AccessRule>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AccessRule {
    /// Empty: any (policy 0-6).
    pub(super) services: Vec<String>,
    /// Decided once the destination is known.
    pub(super) destination: Vec<DestinationConstraint>,
    /// Decided for each connection, or for each request.
    pub(super) conditions: Vec<Condition>,
    /// Fields that only a request can answer: the rule is left out on layer 4 (policy B-10).
    pub(super) request_fields: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DestinationConstraint {
    pub(super) attribute: DestinationAttribute,
    pub(super) values: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DestinationAttribute {
    Label(String),
    Name,
    Namespace,
    User,
}

/// What a rule may ask of a destination before anyone connects.
#[derive(Clone, Copy, Debug)]
pub(super) struct Destination<'a> {
    /// Short and complete name of the service that owns the port.
    pub(super) service: Option<(&'a str, &'a str)>,
    pub(super) namespace: &'a str,
    pub(super) service_account: &'a str,
    pub(super) labels: &'a BTreeMap<String, String>,
}

impl AccessRule {
    /// Whether the rule is for this destination at all.
    pub(super) fn is_for(&self, destination: &Destination<'_>) -> bool {
        let complete = destination.service.map(|(_, complete)| complete);
        let service = self.services.is_empty() || any_matches(&self.services, complete);
        service && self.destination.iter().all(|constraint| constraint.holds(destination))
    }

    /// Whether the rule is for a service of this short and complete name, or for ports of none, whatever else it asks of
    /// destinations.
    pub(super) fn is_for_service(&self, service: Option<(&str, &str)>) -> bool {
        let is_named =
            self.services.is_empty() || any_matches(&self.services, service.map(|(_, complete)| complete));
        let names = self.destination.iter().filter(|each| each.attribute == DestinationAttribute::Name);
        is_named && names.into_iter().all(|each| any_matches(&each.values, service.map(|(short, _)| short)))
    }
}

impl DestinationConstraint {
    pub(super) fn is_met_by(&self, text: &str) -> bool {
        any_matches(&self.values, Some(text))
    }

    fn holds(&self, destination: &Destination<'_>) -> bool {
        match &self.attribute {
            DestinationAttribute::Label(key) => {
                // A label that is missing matches nothing, not even a star (policy B-6).
                let label = destination.labels.get(key).map(String::as_str);
                label.is_some() && any_matches(&self.values, label)
            }
            DestinationAttribute::Name => {
                any_matches(&self.values, destination.service.map(|(short, _)| short))
            }
            DestinationAttribute::Namespace => any_matches(&self.values, Some(destination.namespace)),
            DestinationAttribute::User => any_matches(&self.values, Some(destination.service_account)),
        }
    }
}

pub(super) fn any_matches(written: &[String], seen: Option<&str>) -> bool {
    written.iter().any(|pattern| config_time_matches(pattern, seen))
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceRoleBinding {
    pub(super) role: String,
    pub(super) subjects: Vec<Subject>,
    /// `mode: PERMISSIVE`: grants nothing (policy B-11).
    pub(super) is_permissive: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Subject {
    pub(super) conditions: Vec<Condition>,
    /// Fields that only a request can answer: the subject is left out on layer 4 (policy B-10, G-9).
    pub(super) request_fields: Vec<String>,
}

/// Reads `RbacConfig` and `ClusterRbacConfig`.
pub(super) fn switch(object: &Object, warnings: &mut Warnings) -> Result<Switch, Fault> {
    if &*object.name.name != DEFAULT_NAME {
        let name = Value::from(&*object.name.name);
        return Err(Fault::new("metadata.name", &name, "the name default", "rename the object to default"));
    }
    let mut fields = Fields::spec(object)?;
    let mode = mode(&mut fields, warnings)?;
    let (inclusion, exclusion) = (listed(&mut fields, "inclusion")?, listed(&mut fields, "exclusion")?);
    let is_permissive = fields.one_of("enforcementMode", &[("ENFORCED", false), ("PERMISSIVE", true)])?;
    let missing = |field: &str| {
        let remedy = format!("write {field}: {{namespaces: […]}}, or {field}: {{}} to list nothing");
        Fault::new(&format!("spec.{field}"), &Value::Null, "a mapping, because the mode asks for it", &remedy)
    };
    fields.finish()?;
    let listed = match mode {
        Mode::OnWithInclusion => inclusion.ok_or_else(|| missing("inclusion"))?,
        Mode::OnWithExclusion => exclusion.ok_or_else(|| missing("exclusion"))?,
        Mode::Off | Mode::On => Listed::default(),
    };
    Ok(Switch { mode, listed, is_permissive })
}

/// A bare ON or OFF reaches us as a boolean where the YAML reader follows version 1.1, as that of Kubernetes does.
fn mode(fields: &mut Fields<'_>, warnings: &mut Warnings) -> Result<Mode, Fault> {
    if let Some(Item { path, value: Value::Bool(is_on) }) = fields.take("mode")? {
        let (mode, name) = if *is_on { (Mode::On, "ON") } else { (Mode::Off, "OFF") };
        warnings.say(&path, format!("{is_on} is read as {name}: put the name in quotes"));
        return Ok(mode);
    }
    fields.one_of(
        "mode",
        &[
            ("OFF", Mode::Off),
            ("ON", Mode::On),
            ("ON_WITH_INCLUSION", Mode::OnWithInclusion),
            ("ON_WITH_EXCLUSION", Mode::OnWithExclusion),
        ],
    )
}

fn listed(fields: &mut Fields<'_>, name: &'static str) -> Result<Option<Listed>, Fault> {
    let Some(item) = fields.take(name)? else { return Ok(None) };
    let mut fields = Fields::open(&item)?;
    let mut names = |name| -> Result<BTreeSet<String>, Fault> {
        fields.texts(name)?.iter().map(|item| exact(item)).collect()
    };
    let listed = Listed { services: names("services")?, namespaces: names("namespaces")? };
    fields.finish()?;
    Ok(Some(listed))
}

/// A pattern here would list nothing, and under ON_WITH_INCLUSION leave open what was meant to be closed.
fn exact(item: &Item<'_>) -> Result<String, Fault> {
    let text = item.filled_text()?;
    if text.contains('*') {
        return Err(item.fault("a complete name without a star", "list each name, or use mode ON"));
    }
    Ok(text.to_owned())
}

/// Reads a `ServiceRole` (policy B-3).
pub(super) fn role(object: &Object, warnings: &mut Warnings) -> Result<ServiceRole, Fault> {
    let mut fields = Fields::spec(object)?;
    let items = fields.list("rules")?;
    fields.finish()?;
    if items.is_empty() {
        return Err(Fault::new(
            "spec.rules",
            &Value::Null,
            "at least one rule",
            "write a rule or remove the role",
        ));
    }
    let rules = items.iter().map(|item| access_rule(item, warnings)).collect::<Result<_, _>>()?;
    Ok(ServiceRole { rules })
}

fn access_rule(item: &Item<'_>, warnings: &mut Warnings) -> Result<AccessRule, Fault> {
    let mut fields = Fields::open(item)?;
    let services = fields.texts("services")?;
    warn_of_stars(&services, warnings);
    warn_of_short_services(&services, warnings);
    let mut request_fields = Vec::new();
    let mut conditions = Vec::new();
    for name in ["paths", "notPaths", "methods", "notMethods", "hosts", "notHosts"] {
        let values = fields.texts(name)?;
        if !values.is_empty() {
            request_fields.push(name.to_owned());
            conditions.push(operation(name, &values, warnings));
        }
    }
    let is_there = |name: &str| request_fields.iter().any(|field| field == name);
    if is_there("methods") && is_there("notMethods") {
        return Err(fields.fault("either methods or notMethods", "write two rules"));
    }
    let (ports, not_ports) = (port_list(&mut fields, "ports")?, port_list(&mut fields, "notPorts")?);
    if ports.is_some() && not_ports.is_some() {
        return Err(fields.fault("either ports or notPorts", "write two rules"));
    }
    let has_ports = ports.is_some() || not_ports.is_some();
    let mut rule = AccessRule {
        services: services.iter().filter_map(|item| item.value.as_str()).map(str::to_owned).collect(),
        destination: Vec::new(),
        conditions,
        request_fields,
    };
    rule.conditions.extend(ports.map(|read| Condition::new(read, Values::DestinationPorts)));
    rule.conditions.extend(not_ports.map(|read| Condition::not(read, Values::DestinationPorts)));
    for constraint in fields.list("constraints")? {
        self::constraint(&constraint, has_ports, &mut rule, warnings)?;
    }
    fields.finish()?;
    Ok(rule)
}

/// One of the fields that only a request can answer, by the header matcher of 2018 (policy B-5).
fn operation(name: &str, items: &[Item<'_>], warnings: &mut Warnings) -> Condition {
    let is_negated = name.starts_with("not");
    if matches!(name, "paths" | "notPaths") {
        warn_of_relative_paths(items, warnings);
        let read = patterns(items, warnings, PathPattern::of_2018);
        return Condition::either(is_negated, read, Values::Paths);
    }
    let is_host = matches!(name, "hosts" | "notHosts");
    let asked = if is_host { Asked::Host } else { Asked::Method };
    let read = patterns(items, warnings, |text| Pattern::of_2018(&asked.written(text)));
    Condition::either(is_negated, read, |patterns| Values::Request(asked, patterns))
}

/// What a request's header must be (policy B-5): its name without regard to case.
pub(super) fn header_condition(name: &str, items: &[Item<'_>], warnings: &mut Warnings) -> Condition {
    let asked = Asked::Header(name.to_ascii_lowercase().into());
    let read = patterns(items, warnings, |text| Pattern::of_2018(&asked.written(text)));
    Condition::new(read, |patterns| Values::Request(asked, patterns))
}

/// `experimental.envoy.filters.<name>[<key>]` (policy B-6).
pub(super) fn metadata_condition(
    key: &str,
    items: &[Item<'_>],
    warnings: &mut Warnings,
) -> Option<Condition> {
    let rest = key.strip_prefix("experimental.envoy.filters.")?.strip_suffix(']')?;
    let (filter, key) = rest.split_once('[').filter(|(filter, key)| !filter.is_empty() && !key.is_empty())?;
    let read = patterns(items, warnings, MetadataPattern::new);
    let (filter, key) = (filter.into(), key.into());
    Some(Condition::new(read, |values| Values::Metadata { filter, key, values }))
}

/// `ports` are numbers, and one outside 0 to 65535 refuses the role (policy B-3).
fn port_list(fields: &mut Fields<'_>, name: &'static str) -> Result<Option<Usable<u16>>, Fault> {
    let items = fields.list(name)?;
    let number = |item: &Item<'_>| {
        item.port_number()
            .ok_or_else(|| item.fault("a port number from 0 to 65535", "write the workload's port"))
    };
    let values: Vec<u16> = items.iter().map(number).collect::<Result<_, _>>()?;
    Ok(if values.is_empty() { None } else { Some(Usable { values, has_unusable: false }) })
}

fn constraint(
    item: &Item<'_>,
    has_ports: bool,
    rule: &mut AccessRule,
    warnings: &mut Warnings,
) -> Result<(), Fault> {
    let mut fields = Fields::open(item)?;
    let Some(key_item) = fields.take("key")? else {
        return Err(fields.fault("a constraint with a key", "name the attribute, such as destination.port"));
    };
    let key = key_item.filled_text()?;
    let values = fields.texts("values")?;
    fields.finish()?;
    if values.is_empty() {
        let field = format!("{}.values", item.path);
        return Err(Fault::new(
            &field,
            &Value::Null,
            "at least one value",
            "write a value or remove the constraint",
        ));
    }
    if key == "destination.port" && has_ports {
        return Err(key_item.fault("no destination.port beside ports or notPorts", "write the port once"));
    }
    let attribute = match key {
        "destination.name" => Some(DestinationAttribute::Name),
        "destination.namespace" => Some(DestinationAttribute::Namespace),
        "destination.user" => Some(DestinationAttribute::User),
        key => inside(key, "destination.labels").map(|label| DestinationAttribute::Label(label.to_owned())),
    };
    if let Some(attribute) = attribute {
        warn_of_stars(&values, warnings);
        let values = values.iter().filter_map(|item| item.value.as_str()).map(str::to_owned).collect();
        rule.destination.push(DestinationConstraint { attribute, values });
        return Ok(());
    }
    if let Some(name) = inside(key, "request.headers") {
        rule.request_fields.push(key.to_owned());
        rule.conditions.push(header_condition(name, &values, warnings));
        return Ok(());
    }
    if let Some(condition) = metadata_condition(key, &values, warnings) {
        rule.conditions.push(condition);
        return Ok(());
    }
    let condition = match key {
        "destination.ip" => Condition::new(networks(&values, warnings), Values::DestinationAddresses),
        "destination.port" => Condition::new(ports(&values, warnings), Values::DestinationPorts),
        "connection.sni" => {
            Condition::new(patterns(&values, warnings, Pattern::of_2018), Values::ServerNames)
        }
        _ => {
            // policy B-6, G-3: the original ignored the key, and the rule became broader.
            warnings.say(&key_item.path, format!("{key:?} is no constraint that a connection can answer"));
            Condition::undecidable()
        }
    };
    if condition.is_hopeless() {
        warnings.say(&item.path, "no value of this constraint can be used: its rule never matches");
    }
    rule.conditions.push(condition);
    Ok(())
}

/// Reads a `ServiceRoleBinding` (policy B-3).
pub(super) fn binding(object: &Object, warnings: &mut Warnings) -> Result<ServiceRoleBinding, Fault> {
    let mut fields = Fields::spec(object)?;
    let subjects = fields.list("subjects")?;
    let role = role_reference(&mut fields)?;
    let is_permissive = fields.one_of("mode", &[("ENFORCED", false), ("PERMISSIVE", true)])?;
    fields.finish()?;
    if subjects.is_empty() {
        let remedy = "write a subject, such as - user: \"*\", or remove the binding";
        return Err(Fault::new("spec.subjects", &Value::Null, "at least one subject", remedy));
    }
    let subjects = subjects.iter().map(|item| subject(item, warnings)).collect::<Result<_, _>>()?;
    Ok(ServiceRoleBinding { role, subjects, is_permissive })
}

fn role_reference(fields: &mut Fields<'_>) -> Result<String, Fault> {
    for name in ["actions", "role"] {
        if let Some(item) = fields.take(name)? {
            // Experimental in two releases, under names that others took over.
            return Err(item.fault(
                "no actions and no role",
                "write the rules into a ServiceRole and name it in roleRef",
            ));
        }
    }
    let Some(item) = fields.take("roleRef")? else {
        let remedy = "write roleRef: {kind: ServiceRole, name: …}";
        return Err(Fault::new("spec.roleRef", &Value::Null, "a reference to a role", remedy));
    };
    let mut fields = Fields::open(&item)?;
    let kind = fields.take("kind")?;
    if kind.as_ref().and_then(|kind| kind.value.as_str()) != Some("ServiceRole") {
        let value = kind.map_or(&Value::Null, |kind| kind.value);
        return Err(Fault::new(&fields.path_of("kind"), value, "ServiceRole", "write kind: ServiceRole"));
    }
    let Some(name) = fields.take("name")? else {
        return Err(Fault::new(
            &fields.path_of("name"),
            &Value::Null,
            "the name of a role",
            "name a ServiceRole of this namespace",
        ));
    };
    fields.finish()?;
    name.filled_text().map(str::to_owned)
}

fn subject(item: &Item<'_>, warnings: &mut Warnings) -> Result<Subject, Fault> {
    let mut fields = Fields::open(item)?;
    let mut subject = Subject { conditions: Vec::new(), request_fields: Vec::new() };
    if let Some(user) = fields.take("user")? {
        user.filled_text()?;
        subject.conditions.push(Condition::new(users(&[user], warnings), Values::Principals));
    }
    for name in ["group", "groups", "notGroups"] {
        if let Some(value) = fields.take(name)? {
            let filled = if name == "group" { vec![value] } else { value.items()? };
            for text in &filled {
                text.filled_text()?;
            }
            if !filled.is_empty() {
                subject.request_fields.push(name.to_owned());
                let read = patterns(&filled, warnings, Pattern::of_2018);
                let groups = Asked::Claim(vec!["groups".into()]); // policy B-7
                let is_negated = name == "notGroups";
                let condition = Condition::either(is_negated, read, |values| Values::Request(groups, values));
                subject.conditions.push(condition);
            }
        }
    }
    let lists = [("names", "notNames"), ("namespaces", "notNamespaces"), ("ips", "notIps")];
    let mut first_class = Vec::new();
    for (name, not_name) in lists {
        for (name, is_negated) in [(name, false), (not_name, true)] {
            let items = fields.texts(name)?;
            if items.is_empty() {
                continue;
            }
            first_class.push(name);
            subject.conditions.push(list_condition(name, is_negated, &items, warnings)?);
        }
    }
    let properties = properties(&mut fields, warnings)?;
    for property in &properties {
        property_condition(property, &first_class, &mut subject, warnings)?;
    }
    if subject.conditions.is_empty() && subject.request_fields.is_empty() {
        // policy B-3, B-4: an empty subject matches nobody, which cannot be what was meant.
        fields.finish()?;
        return Err(
            item.fault("a subject that names somebody", "write user, names, namespaces, ips or properties")
        );
    }
    fields.finish()?;
    Ok(subject)
}

fn list_condition(
    name: &str,
    is_negated: bool,
    items: &[Item<'_>],
    warnings: &mut Warnings,
) -> Result<Condition, Fault> {
    if matches!(name, "names" | "notNames")
        && let Some(star) = items.iter().find(|item| item.value.as_str() == Some("*"))
    {
        return Err(star.fault("no bare star", "write allUsers or allAuthenticatedUsers"));
    }
    let condition = match name {
        "names" => Condition::new(users(items, warnings), Values::Principals),
        "notNames" => Condition::not(users(items, warnings), Values::Principals),
        "namespaces" | "notNamespaces" => {
            let read = Usable {
                values: items.iter().filter_map(|item| item.value.as_str()).map(Glob::new).collect(),
                has_unusable: false,
            };
            let values = Values::NamespaceGlobs;
            if is_negated { Condition::not(read, values) } else { Condition::new(read, values) }
        }
        _ => {
            let (read, values) = (networks(items, warnings), Values::SourceAddresses);
            if is_negated { Condition::not(read, values) } else { Condition::new(read, values) }
        }
    };
    Ok(condition)
}

/// The values of `user` and `names`, with the special names of policy B-8.
fn users(items: &[Item<'_>], warnings: &mut Warnings) -> Usable<Pattern> {
    for item in items {
        let text = item.value.as_str().unwrap_or_default();
        let is_special = matches!(text, "allUsers" | "allAuthenticatedUsers");
        if !is_special && !text.contains(['/', '*']) {
            // policy 0-1
            warnings.say(
                &item.path,
                format!("{text:?} equals no identity: write <trust domain>/ns/<namespace>/sa/{text}, or */sa/{text}"),
            );
        }
        warn_of_scheme(item, warnings);
    }
    patterns(items, warnings, |text| match text {
        "*" | "allUsers" => Pattern::Everyone,
        "allAuthenticatedUsers" => Pattern::Present,
        text => Pattern::new(text),
    })
}

/// `properties` as a mapping, or as the list of mappings of the oldest documents (policy 0-2).
fn properties<'a>(
    fields: &mut Fields<'a>,
    warnings: &mut Warnings,
) -> Result<Vec<(&'a str, Item<'a>)>, Fault> {
    let Some(item) = fields.take("properties")? else { return Ok(Vec::new()) };
    let maps = if item.value.is_array() {
        warnings.say(&item.path, "a list is read as one mapping: write key: value pairs without dashes");
        item.items()?
    } else {
        vec![item]
    };
    let mut merged = Vec::new();
    for map in maps {
        let Value::Object(entries) = map.value else {
            return Err(map.fault("a mapping of strings", "write key: value pairs"));
        };
        for (key, value) in entries {
            let entry = Item { path: format!("{}[{key}]", map.path), value };
            entry.filled_text()?;
            merged.push((key.as_str(), entry));
        }
    }
    Ok(merged)
}

fn property_condition(
    (key, item): &(&str, Item<'_>),
    first_class: &[&str],
    subject: &mut Subject,
    warnings: &mut Warnings,
) -> Result<(), Fault> {
    let rivals: &[&str] = match *key {
        "source.principal" => &["names", "notNames"],
        "source.namespace" => &["namespaces", "notNamespaces"],
        "source.ip" => &["ips", "notIps"],
        _ => &[],
    };
    let group_rival = *key == "request.auth.claims[groups]"
        && subject.request_fields.iter().any(|field| matches!(field.as_str(), "groups" | "notGroups"));
    if group_rival || rivals.iter().any(|rival| first_class.contains(rival)) {
        return Err(
            item.fault("no property that says the same as a field of the subject", "remove the property")
        ); // policy B-3
    }
    let only = std::slice::from_ref(item);
    let condition = match *key {
        "source.principal" => {
            warn_of_scheme(item, warnings);
            // policy B-8, G-1: a star asks for somebody, unlike in user.
            Condition::new(patterns(only, warnings, Pattern::new), Values::Principals)
        }
        "source.namespace" => {
            let glob = item.value.as_str().map(Glob::new);
            Condition::new(
                Usable { values: glob.into_iter().collect(), has_unusable: false },
                Values::NamespaceGlobs,
            )
        }
        "source.ip" => Condition::new(networks(only, warnings), Values::SourceAddresses),
        key if asked(key).is_some() => {
            subject.request_fields.push(key.to_owned());
            if key == "source.user" {
                warn_of_scheme(item, warnings);
            }
            let asked = asked(key).unwrap_or(Asked::Principal);
            let is_peer = asked == Asked::User;
            let read = |text: &str| {
                if is_peer { Pattern::new(text) } else { Pattern::of_2018(&asked.written(text)) }
            };
            let read = patterns(only, warnings, read);
            Condition::new(read, |patterns| Values::Request(asked, patterns))
        }
        key => {
            warnings.say(&item.path, format!("{key:?} is no known property"));
            Condition::undecidable()
        }
    };
    if condition.is_hopeless() {
        warnings.say(&item.path, "this property cannot be used: its subject matches nobody"); // policy B-7
    }
    subject.conditions.push(condition);
    Ok(())
}

/// The properties that only a request can answer (policy B-7).
fn asked(key: &str) -> Option<Asked> {
    match key {
        "source.user" => Some(Asked::User),
        "request.auth.principal" => Some(Asked::Principal),
        "request.auth.audiences" => Some(Asked::Audience),
        "request.auth.presenter" => Some(Asked::Presenter),
        key => inside(key, "request.headers")
            .map(|name| Asked::Header(name.to_ascii_lowercase().into()))
            .or_else(|| inside(key, "request.auth.claims").map(|claim| Asked::Claim(vec![claim.into()]))),
    }
}

/// The text between the brackets of `name[…]`.
pub(super) fn inside<'a>(key: &'a str, name: &str) -> Option<&'a str> {
    key.strip_prefix(name)?.strip_prefix('[')?.strip_suffix(']').filter(|text| !text.is_empty())
}

/// An identity as policies write it has no scheme (policy H-7).
pub(super) fn warn_of_scheme(item: &Item<'_>, warnings: &mut Warnings) {
    let text = item.value.as_str().unwrap_or_default();
    if text.contains("spiffe://") {
        warnings.say(&item.path, format!("{text:?} equals no identity: leave spiffe:// out"));
    }
}

/// `services` are compared with complete names (policy B-5).
fn warn_of_short_services(items: &[Item<'_>], warnings: &mut Warnings) {
    for item in items {
        let text = item.value.as_str().unwrap_or_default();
        if !text.contains(['*', '.']) {
            warnings.say(
                &item.path,
                format!(
                    "{text:?} equals no service: write {text}.<namespace>.svc.cluster.local, or {text}.*"
                ),
            );
        }
    }
}

/// policy 0-5
fn warn_of_relative_paths(items: &[Item<'_>], warnings: &mut Warnings) {
    for item in items {
        let text = item.value.as_str().unwrap_or_default();
        if !text.starts_with(['/', '*']) {
            warnings.say(&item.path, format!("{text:?} equals no path: begin it with a slash"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_with_brackets_gives_what_is_inside() {
        assert_eq!(inside("request.headers[x-a]", "request.headers"), Some("x-a"));
        for key in ["request.headers", "request.headers[]", "request.headers[x", "request.header[x]", "x"] {
            assert_eq!(inside(key, "request.headers"), None, "{key}");
        }
    }
}
