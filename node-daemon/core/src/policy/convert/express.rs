//! One compiled condition of 2018 in the words of the current API (policy F-4).

use serde_json::{Value, json};

use super::super::{
    matching::Pattern,
    paths::PathPattern,
    rules::{Condition, Values},
    seen::Asked,
};

/// Whose name `request.auth.principal` is where the rule applies (policy A-14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Principals {
    /// USE_PEER, or no origins.
    Peer,
    /// USE_ORIGIN
    Token,
    /// It differs from port to port.
    Both,
}

/// A list of conditions, as far as it is written in the current API.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Written {
    pub(super) source: Vec<(&'static str, Vec<String>)>,
    pub(super) operation: Vec<(&'static str, Vec<String>)>,
    pub(super) when: Vec<Value>,
    /// It holds for requests alone, and no field above says so.
    pub(super) only_requests: bool,
    /// What somebody should look at.
    pub(super) checks: Vec<String>,
}

/// What cannot be written: attribute and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Inexpressible {
    pub(super) attribute: String,
    pub(super) why: String,
}

/// `None`: the conditions can never be met.
pub(super) fn written(
    conditions: &[Condition],
    principals: Principals,
) -> Result<Option<Written>, Inexpressible> {
    let mut written = Written::default();
    for condition in conditions {
        if !written.add(condition, principals)? {
            return Ok(None);
        }
    }
    Ok(Some(written))
}

impl Written {
    /// Whether any field of it is one that only a request can answer.
    pub(super) fn asks_requests(&self) -> bool {
        let of_requests = |(name, _): &(&str, Vec<String>)| !matches!(*name, "ports" | "notPorts");
        self.only_requests
            || self.operation.iter().any(of_requests)
            || self.source.iter().any(|(name, _)| name.ends_with("equestPrincipals"))
            || self
                .when
                .iter()
                .any(|when| when["key"].as_str().is_some_and(|key| key.starts_with("request.")))
    }

    /// False: it can never be met.
    fn add(&mut self, condition: &Condition, principals: Principals) -> Result<bool, Inexpressible> {
        let values = condition.values();
        let is_negated = condition.is_negated();
        if condition.is_hopeless() || (condition.has_unusable() && is_negated) {
            return Ok(false);
        }
        if condition.has_unusable() {
            self.checks.push("values that could never be met are left out".to_owned());
        }
        match values {
            Values::Principals(patterns) => {
                if patterns.iter().any(|pattern| matches!(pattern, Pattern::Everyone)) {
                    return Ok(!is_negated);
                }
                self.put_source(
                    "principals",
                    "notPrincipals",
                    "source.principal",
                    is_negated,
                    texts(patterns),
                );
            }
            Values::NamespaceGlobs(globs) => {
                let written: Vec<String> = globs.iter().map(ToString::to_string).collect();
                for text in &written {
                    let inner = text.strip_prefix('*').or_else(|| text.strip_suffix('*')).unwrap_or(text);
                    if inner.contains('*') {
                        return Err(inexpressible(
                            "source.namespace",
                            format!("{text:?}: in the current API a star stands at one end only"),
                        ));
                    }
                }
                self.put_source("namespaces", "notNamespaces", "source.namespace", is_negated, written);
            }
            Values::SourceAddresses(networks) => {
                self.put_source("ipBlocks", "notIpBlocks", "source.ip", is_negated, texts(networks));
            }
            Values::DestinationAddresses(networks) => {
                self.put_when("destination.ip", is_negated, texts(networks));
            }
            Values::DestinationPorts(ports) => {
                self.put_operation("ports", "notPorts", Some("destination.port"), is_negated, texts(ports));
            }
            Values::ServerNames(patterns) => self.put_when("connection.sni", is_negated, texts(patterns)),
            Values::Metadata { filter, key, values } => {
                self.checks.push(format!("nothing in this mesh tells the metadata of filter {filter}"));
                self.put_when(
                    &format!("experimental.envoy.filters.{filter}[{key}]"),
                    is_negated,
                    texts(values),
                );
            }
            Values::Paths(paths) => {
                let written: Vec<String> = paths.iter().map(PathPattern::to_string).collect();
                if let Some(text) = written.iter().find(|text| is_template(text)) {
                    let why = format!("{text:?}: in the current API these braces are operators");
                    return Err(inexpressible("request.path", why));
                }
                self.put_operation("paths", "notPaths", None, is_negated, written);
            }
            Values::Request(asked, patterns) => {
                return self.add_asked(asked, patterns, is_negated, principals);
            }
            // Kinds that only the current API makes, and what nobody can tell.
            Values::Namespaces(_)
            | Values::ServiceAccounts(_)
            | Values::TrustDomains(_)
            | Values::TokenPrincipals(_)
            | Values::Undecidable => return Ok(false),
        }
        Ok(true)
    }

    fn add_asked(
        &mut self,
        asked: &Asked,
        patterns: &[Pattern],
        is_negated: bool,
        principals: Principals,
    ) -> Result<bool, Inexpressible> {
        let name = asked.name();
        let has_star = patterns.iter().any(|pattern| matches!(pattern, Pattern::Given));
        match asked {
            Asked::Method => {
                // No method is empty, so that the two stars say the same.
                self.put_operation("methods", "notMethods", None, is_negated, texts(patterns));
            }
            Asked::Host | Asked::Header(_) if has_star => {
                return Err(inexpressible(
                    &name,
                    "\"*\": it is met by an empty value too, and the current API's star is not".to_owned(),
                ));
            }
            Asked::Host => self.put_operation("hosts", "notHosts", None, is_negated, texts(patterns)),
            Asked::Header(_) => self.put_when(&name, is_negated, texts(patterns)),
            Asked::User => {
                self.only_requests = true;
                self.put_source(
                    "principals",
                    "notPrincipals",
                    "source.principal",
                    is_negated,
                    texts(patterns),
                );
            }
            Asked::Principal => match principals {
                Principals::Peer => {
                    self.only_requests = true;
                    self.put_source(
                        "principals",
                        "notPrincipals",
                        "source.principal",
                        is_negated,
                        texts(patterns),
                    );
                }
                Principals::Token => self.put_source(
                    "requestPrincipals",
                    "notRequestPrincipals",
                    "request.auth.principal",
                    is_negated,
                    texts(patterns),
                ),
                Principals::Both => {
                    let why =
                        "it is the peer on some of the ports that the rule is for, and the token's on others";
                    return Err(inexpressible(&name, why.to_owned()));
                }
            },
            Asked::Audience | Asked::Presenter | Asked::Claim(_) => {
                if has_star {
                    self.checks.push(format!("an empty {name} was as good as any other, and is none now"));
                }
                self.put_when(&name, is_negated, texts(patterns));
            }
        }
        Ok(true)
    }

    /// A second list of the same field goes into `when`, because both must be met.
    fn put_source(
        &mut self,
        name: &'static str,
        not_name: &'static str,
        key: &str,
        is_negated: bool,
        values: Vec<String>,
    ) {
        let name = if is_negated { not_name } else { name };
        if self.source.iter().any(|(taken, _)| *taken == name) {
            self.put_when(key, is_negated, values);
        } else {
            self.source.push((name, values));
        }
    }

    fn put_operation(
        &mut self,
        name: &'static str,
        not_name: &'static str,
        key: Option<&str>,
        is_negated: bool,
        values: Vec<String>,
    ) {
        let name = if is_negated { not_name } else { name };
        match key {
            Some(key) if self.operation.iter().any(|(taken, _)| *taken == name) => {
                self.put_when(key, is_negated, values);
            }
            // Of the other fields a rule of 2018 has one each.
            Some(_) | None => self.operation.push((name, values)),
        }
    }

    fn put_when(&mut self, key: &str, is_negated: bool, values: Vec<String>) {
        let list = if is_negated { "notValues" } else { "values" };
        self.when.push(json!({ "key": key, list: values }));
    }
}

/// Whether the current API reads operators in a path.
pub(super) fn is_template(text: &str) -> bool {
    text.contains("{*}") || text.contains("{**}")
}

pub(super) fn inexpressible(attribute: &str, why: String) -> Inexpressible {
    Inexpressible { attribute: attribute.to_owned(), why }
}

fn texts<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}
