//! The file: its policy sets, and its cases with their policies.

use std::collections::BTreeMap;

use serde_json::Value;
use spiffe_id::TrustDomain;

use super::{
    Library,
    fields::{Fields, InvalidCases},
};
use crate::{
    decode::{self, InvalidObject, Object, Source},
    policy::PolicyObjects,
    workload::{Mesh, TransportMode},
};

/// Groups of attributes that may be written as a mapping.
const GROUPS: [&str; 8] =
    ["source", "destination", "request", "request.auth", "connection", "client", "jwks", "oidc"];

/// Attributes with names of their own inside, which may be written with brackets.
const MAPS: [&str; 3] = ["destination.labels", "request.auth.claims", "request.headers"];

pub(super) struct CaseFile {
    pub(super) mesh: Mesh,
    /// `Err`: why the text of a set is no YAML. The cases that name it cannot be run, the others can.
    sets: BTreeMap<String, Result<Vec<Value>, InvalidCases>>,
    pub(super) cases: Vec<WrittenCase>,
}

/// A case as far as it can be used.
pub(super) struct WrittenCase {
    /// That of its place in the list where the case has no usable one.
    pub(super) name: String,
    pub(super) read: Result<Case, InvalidCases>,
}

pub(super) struct Case {
    pub(super) name: String,
    pub(super) path: String,
    pub(super) check: CheckKind,
    policies: Vec<String>,
    pub(super) request: Fields,
    pub(super) expect: Fields,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CheckKind {
    Authorize,
    Authenticate,
    Connect,
    Select,
    Validate,
    SecureNaming,
    ClientTls,
}

/// The policies of one case.
pub(super) struct Policies {
    pub(super) objects: PolicyObjects,
    /// What could be read as an object at all.
    pub(super) read: Vec<Object>,
    pub(super) refused: Vec<InvalidObject>,
    /// Why there is nothing to read.
    pub(super) unparsed: Option<String>,
    /// A document of which nobody can tell what it targets: everything is denied, as by the daemon (T-19).
    pub(super) unreadable: Option<String>,
}

impl CaseFile {
    pub(super) fn read(file: &Value, library: &dyn Library) -> Result<Self, InvalidCases> {
        let fields = Fields::new("", file)?;
        fields.only(&[
            "version",
            "trustDomain",
            "trustDomainAliases",
            "rootNamespace",
            "defaultMode",
            "policySets",
            "cases",
        ])?;
        if fields.text("version")?.as_deref() != Some("1") {
            return Err(fields.invalid("version", "1"));
        }
        let mut sets = BTreeMap::new();
        let written = fields.map("policySets")?;
        for (name, _) in written.entries() {
            let text = written.text(name)?.unwrap_or_default();
            let documents = library.parse(&text).map_err(|reason| written.invalid(name, reason));
            sets.insert(name.clone(), documents);
        }
        if !fields.has("cases") {
            return Err(fields.invalid("cases", "a list of cases"));
        }
        let cases =
            fields.items("cases")?.into_iter().map(|(path, case)| WrittenCase::read(&path, case)).collect();
        Ok(Self { mesh: mesh(&fields)?, sets, cases })
    }

    /// A set wins over an equal path. The order has no effect: of two versions of one object that differ, the one whose
    /// text comes first counts.
    ///
    /// # Errors
    /// Where a set, a file or a folder cannot be read.
    pub(super) fn policies(&self, case: &Case, library: &dyn Library) -> Result<Policies, InvalidCases> {
        let mut documents: Vec<(String, Value)> = Vec::new();
        for (index, name) in case.policies.iter().enumerate() {
            if let Some(set) = self.sets.get(name) {
                let set = set.as_ref().map_err(InvalidCases::clone)?;
                documents.extend(set.iter().map(|document| (name.clone(), document.clone())));
                continue;
            }
            let files = library.load(name).map_err(|reason| {
                let field = format!("{}.policies[{index}]", case.path);
                InvalidCases::new(
                    &field,
                    &Value::from(name.as_str()),
                    format!("a policy set, a file or a folder: {reason}"),
                )
            })?;
            for (file, of_file) in files {
                documents.extend(of_file.into_iter().map(|document| (file.clone(), document)));
            }
        }
        documents.retain(|(_, document)| !document.is_null());
        documents.sort_by_cached_key(|(_, document)| document.to_string());
        let mut policies = Policies::none();
        for (index, (source, document)) in documents.into_iter().enumerate() {
            match decode::object(document, Source::new(&source, index)) {
                Ok(object) => policies.add(object),
                Err(invalid) => policies.refuse(invalid),
            }
        }
        Ok(policies)
    }
}

impl WrittenCase {
    fn read(path: &str, case: &Value) -> Self {
        let fields = Fields::new(path, case);
        let name = fields.as_ref().ok().and_then(|fields| fields.required_text("name").ok());
        Self { name: name.unwrap_or_else(|| path.to_owned()), read: fields.and_then(Case::read) }
    }
}

impl Policies {
    pub(super) fn none() -> Self {
        Self {
            objects: PolicyObjects::new(),
            read: Vec::new(),
            refused: Vec::new(),
            unparsed: None,
            unreadable: None,
        }
    }

    pub(super) fn unparsed(reason: &InvalidCases) -> Self {
        Self { unparsed: Some(reason.to_string()), ..Self::none() }
    }

    fn refuse(&mut self, invalid: InvalidObject) {
        let is_harmless =
            matches!(invalid.kind_name.as_str(), "Namespace" | "ServiceAccount" | "Service" | "Workload");
        if !is_harmless {
            self.unreadable.get_or_insert_with(|| invalid.object());
        }
        self.refused.push(invalid);
    }

    fn add(&mut self, object: Object) {
        let is_same = |other: &Object| other.kind == object.kind && other.name == object.name;
        if self.read.iter().any(is_same) {
            return;
        }
        if PolicyObjects::handles(&object.api_version, &object.kind)
            && let Err(invalid) = self.objects.insert(&object)
        {
            self.refused.push(invalid);
        }
        self.read.push(object);
    }
}

impl Case {
    fn read(fields: Fields) -> Result<Self, InvalidCases> {
        fields.only(&["name", "check", "policies", "request", "expect"])?;
        let check = fields.one_of(
            "check",
            &[
                ("authorize", CheckKind::Authorize),
                ("authenticate", CheckKind::Authenticate),
                ("connect", CheckKind::Connect),
                ("select", CheckKind::Select),
                ("validate", CheckKind::Validate),
                ("secureNaming", CheckKind::SecureNaming),
                ("clientTls", CheckKind::ClientTls),
            ],
        )?;
        let expect = fields.map("expect")?;
        if expect.entries().next().is_none() {
            return Err(fields.invalid("expect", "at least one key"));
        }
        expect.only(&super::compare::KEYS)?;
        let request = fields.map("request")?.flattened(&GROUPS).unbracketed(&MAPS);
        request.only(&super::check::KEYS)?;
        Ok(Self {
            name: fields.required_text("name")?,
            path: fields.path.clone(),
            check,
            policies: fields.texts("policies")?,
            request,
            expect,
        })
    }
}

fn mesh(fields: &Fields) -> Result<Mesh, InvalidCases> {
    let expected = "a trust domain, such as cluster.local";
    let own = fields.parsed::<TrustDomain>("trustDomain", expected)?;
    let own = own
        .map_or_else(|| "cluster.local".parse(), Ok)
        .map_err(|_| fields.invalid("trustDomain", expected))?;
    let mut mesh = Mesh::defaults(own);
    for alias in fields.texts("trustDomainAliases")? {
        let alias = alias.parse().map_err(|_| fields.invalid("trustDomainAliases", "trust domains"))?;
        mesh.trust_domain_aliases.push(alias);
    }
    if let Some(root) = fields.text("rootNamespace")? {
        mesh.root_namespace = root;
    }
    // policy A-5: without a word nothing is required.
    mesh.default_mode = fields.one_of(
        "defaultMode",
        &[
            ("NONE", TransportMode::Disabled),
            ("DISABLE", TransportMode::Disabled),
            ("PERMISSIVE", TransportMode::Permissive),
            ("STRICT", TransportMode::Strict),
        ],
    )?;
    Ok(mesh)
}
