//! What tests of this package share: documents as text, and worlds made of them.

use std::{net::SocketAddr, sync::Arc};

use serde_json::Value;

use crate::{
    decode::{Object, Source, object},
    snapshot::Snapshot,
    store::{Problem, Store, Update},
    workload::{ObjectName, Workload},
};

pub(crate) const FILE: &str = "mesh.yaml";

/// One document, read as the daemon reads it: a bare `ON` is a word, as in YAML 1.2.
pub(crate) fn yaml(text: &str) -> Value {
    let options = serde_saphyr::options! { strict_booleans: true };
    serde_saphyr::from_str_with_options(text, options).expect("the test's YAML is valid")
}

/// The documents of a text, separated by lines of `---`.
pub(crate) fn documents(text: &str) -> Vec<Value> {
    text.split("\n---\n").filter(|text| !text.trim().is_empty()).map(yaml).collect()
}

/// One document whose head is good.
pub(crate) fn readable(yaml: &str) -> Object {
    let value = documents(yaml).pop().expect("the test gives a document");
    object(value, Source::new(FILE, 0)).expect("the test's head is readable")
}

pub(crate) fn replace(file: &str, yaml: &str) -> Update {
    Update::replace(file, documents(yaml))
}

pub(crate) fn empty_store() -> Store {
    Store::new("node-a", "cluster.local".parse().expect("a trust domain"))
}

/// A store of one file, and what is wrong with it.
pub(crate) fn store(yaml: &str) -> (Store, Vec<Problem>) {
    let mut store = empty_store();
    let problems = store.apply(replace(FILE, yaml));
    (store, problems)
}

/// The snapshot of one file without problems.
pub(crate) fn snapshot(yaml: &str) -> Arc<Snapshot> {
    let (mut store, problems) = store(yaml);
    assert_eq!(problems, [], "the test's documents are good");
    store.snapshot()
}

/// A Workload in the namespace `photo` on `node-a`, with more lines of its spec, two blanks deep.
pub(crate) fn pod(name: &str, address: &str, more: &str) -> String {
    let mut text = format!(
        "apiVersion: culvert.io/v1alpha1\nkind: Workload\n\
         metadata: {{name: {name}, namespace: photo, labels: {{app: {name}}}}}\n\
         spec:\n  serviceAccount: {name}\n  node: node-a\n  addresses: [\"{address}\"]\n  \
         networkNamespace: /run/netns/{name}\n"
    );
    for line in more.lines() {
        text.push_str(&format!("  {line}\n"));
    }
    text
}

/// A Workload in a cgroup of `node-a`, whose address is 10.9.0.2, listening on `port`.
pub(crate) fn unit(name: &str, port: u16) -> String {
    pod(name, "10.9.0.2", &format!("ports: [{{port: {port}}}]"))
        .replace("networkNamespace: /run/netns/", "cgroup: culvert/")
}

/// A Service in the namespace `photo` that selects the workloads with `app: <app>`.
pub(crate) fn service(name: &str, address: &str, app: &str, ports: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: photo}}\n\
         spec:\n  clusterIP: \"{address}\"\n  selector: {{app: {app}}}\n  ports: {ports}\n"
    )
}

pub(crate) fn join<T: AsRef<str>>(documents: &[T]) -> String {
    documents.iter().map(AsRef::as_ref).collect::<Vec<_>>().join("\n---\n")
}

pub(crate) fn named(name: &str) -> ObjectName {
    ObjectName::new("photo", name)
}

#[track_caller]
pub(crate) fn workload(snapshot: &Snapshot, name: &str) -> Arc<Workload> {
    Arc::clone(snapshot.workload(&named(name)).expect("the test's workload is known"))
}

pub(crate) fn at(text: &str) -> SocketAddr {
    text.parse().expect("the test's address is valid")
}
