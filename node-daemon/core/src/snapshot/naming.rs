//! Secure naming (policy D): which identities may answer for a service, or for a workload dialled by its address.

use std::{collections::BTreeSet, sync::Arc};

use spiffe_id::{SpiffeId, TrustDomain};

use crate::workload::{Mesh, Service, Workload};

/// On a workload: the identity that stands for it instead of the one of its service account (policy D-2).
const ANNOTATION_IDENTITY: &str = "alpha.istio.io/identity";

/// On a service: accounts of its namespace that may run it, a comma list (policy D-2, D-9).
const ANNOTATION_ACCOUNTS: &str = "alpha.istio.io/kubernetes-serviceaccounts";

/// On a service: complete identities that may run it, a comma list (policy D-2).
const ANNOTATION_IDENTITIES: &str = "alpha.istio.io/canonical-serviceaccounts";

/// An annotation, or an entry of one, that names nobody.
pub(super) struct Unusable {
    pub(super) annotation: &'static str,
    pub(super) reason: String,
}

/// Who answers for one workload. An unusable annotation names nobody: the account's identity is replaced all the same.
pub(super) fn of_workload(workload: &Workload) -> Result<SpiffeId, Unusable> {
    match workload.annotations.get(ANNOTATION_IDENTITY) {
        None => Ok(workload.identity.clone()),
        Some(text) => identity(text, ANNOTATION_IDENTITY), // D-2
    }
}

/// Who may run a service beside its endpoints, and the entries that name nobody.
pub(super) fn of_annotations(service: &Service, mesh: &Mesh) -> (Vec<SpiffeId>, Vec<Unusable>) {
    let accounts = entries(service, ANNOTATION_ACCOUNTS).map(|account| {
        SpiffeId::new(mesh.trust_domain.clone(), &service.name.namespace, account).map_err(|error| Unusable {
            annotation: ANNOTATION_ACCOUNTS,
            reason: format!("{account:?} is ignored: {error}; write names of service accounts"),
        })
    });
    let identities =
        entries(service, ANNOTATION_IDENTITIES).map(|entry| identity(entry, ANNOTATION_IDENTITIES));
    let (mut usable, mut unusable) = (Vec::new(), Vec::new());
    for entry in accounts.chain(identities) {
        match entry {
            Ok(id) => usable.push(id),
            Err(reason) => unusable.push(reason),
        }
    }
    (usable, unusable)
}

/// The set itself: every identity of the mesh under each of its names (policy D-4, REC).
pub(super) fn allowed(
    identities: impl IntoIterator<Item = SpiffeId>,
    mesh: &Mesh,
) -> Arc<BTreeSet<SpiffeId>> {
    let domains: Vec<&TrustDomain> = mesh.trust_domain_aliases.iter().chain([&mesh.trust_domain]).collect();
    let mut set = BTreeSet::new();
    for id in identities {
        if domains.contains(&id.trust_domain()) {
            let under = |domain: &&TrustDomain| {
                SpiffeId::new((*domain).clone(), id.namespace(), id.service_account()).ok()
            };
            set.extend(domains.iter().filter_map(under));
        }
        set.insert(id);
    }
    Arc::new(set)
}

/// Who may answer for endpoints that these workloads are, and these identities beside them (policy D-2).
pub(super) fn answering<'w>(
    endpoints: impl Iterator<Item = &'w Workload>,
    named: Vec<SpiffeId>,
    mesh: &Mesh,
) -> Arc<BTreeSet<SpiffeId>> {
    let identities = endpoints.filter_map(|workload| of_workload(workload).ok());
    allowed(identities.chain(named).collect::<Vec<_>>(), mesh)
}

/// [1.0] put the scheme in front, [1.4] takes the entry as written: both spellings are read.
fn identity(entry: &str, annotation: &'static str) -> Result<SpiffeId, Unusable> {
    let entry = entry.trim();
    let uri = if entry.starts_with("spiffe://") { entry.to_owned() } else { format!("spiffe://{entry}") };
    uri.parse().map_err(|error| Unusable {
        annotation,
        reason: format!("{entry:?} names nobody: {error}; write an identity of a workload"),
    })
}

/// Blanks around commas do not count (policy D-3).
fn entries<'a>(service: &'a Service, annotation: &str) -> impl Iterator<Item = &'a str> {
    let list = service.annotations.get(annotation).map_or("", String::as_str);
    list.split(',').map(str::trim).filter(|entry| !entry.is_empty())
}
