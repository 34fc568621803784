//! Tables of objects of 2018: what becomes of them, what is refused, and what the proof says.

use std::{collections::BTreeMap, sync::Arc};

use super::*;
use crate::{decode, testing, workload::Workload};

/// Two services of one namespace, a database in another, and nothing of policy.
const MESH: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: backend, namespace: photo}
spec: {clusterIP: 10.96.0.20, selector: {app: backend}, ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp-admin, port: 9001, targetPort: admin}]}
---
apiVersion: v1
kind: Service
metadata: {name: frontend, namespace: photo}
spec: {clusterIP: 10.96.0.21, selector: {app: frontend}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: datastore}
spec: {clusterIP: 10.96.0.22, selector: {app: db}, ports: [{name: tcp-sql, port: 3306, targetPort: 5432}]}
---
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: backend-0, namespace: photo, labels: {app: backend, tier: middle}}
spec: {serviceAccount: backend, node: a, addresses: [10.8.1.3], networkNamespace: /run/netns/b, ports: [{name: http, port: 8080}, {name: admin, port: 9000}]}
---
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: frontend-0, namespace: photo, labels: {app: frontend, tier: front}}
spec: {serviceAccount: frontend, node: b, addresses: [10.8.1.2], networkNamespace: /run/netns/f, ports: [{name: http, port: 8080}]}
---
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: db-0, namespace: datastore, labels: {app: db}}
spec: {serviceAccount: db, node: a, addresses: [10.8.1.4], networkNamespace: /run/netns/d, ports: [{name: tcp-sql, port: 5432}]}
"#;

/// Documents that stand beside each other.
pub(super) struct World {
    objects: Vec<Object>,
    mesh: Mesh,
    workloads: BTreeMap<ObjectName, Arc<Workload>>,
    services: BTreeMap<ObjectName, Service>,
}

impl World {
    /// Policies one a line, as in [`crate::policy::tests`], beside documents of workloads and services.
    pub(super) fn new(mesh: &str, policies: &str) -> Self {
        let snapshot = testing::snapshot(mesh.trim_start());
        Self {
            objects: crate::policy::tests::read_objects(policies),
            mesh: snapshot.mesh().clone(),
            workloads: snapshot.workloads().map(|w| (w.name.clone(), Arc::clone(w))).collect(),
            services: snapshot.services().map(|s| (s.name.clone(), s.clone())).collect(),
        }
    }

    pub(super) fn documents(&self) -> Documents<'_> {
        let Self { objects, mesh, workloads, services } = self;
        Documents { objects, mesh, workloads, services }
    }

    pub(super) fn convert(&self) -> Conversion {
        convert(&self.documents())
    }

    /// What was written, read back as the daemon reads its folder.
    #[track_caller]
    pub(super) fn reread(yaml: &str) -> Vec<Object> {
        let documents = testing::documents(yaml).into_iter().enumerate();
        let read = |(index, value)| decode::object(value, decode::Source::new("converted.yaml", index));
        let objects: Vec<Object> =
            documents.map(read).map(|object| object.expect("what was written can be read")).collect();
        let mut accepted = PolicyObjects::new();
        for object in &objects {
            accepted.insert(object).expect("what was written is accepted");
        }
        objects
    }
}

/// It is converted as a whole, the proof holds, and the YAML has these words.
#[track_caller]
fn converted(policies: &str, words: &[&str]) -> Proof {
    converted_in(MESH, policies, words)
}

#[track_caller]
fn converted_in(mesh: &str, policies: &str, words: &[&str]) -> Proof {
    let world = World::new(mesh, policies);
    let conversion = world.convert();
    assert!(conversion.refusals.is_empty(), "{policies}\n{:#?}", conversion.refusals);
    let yaml = conversion.yaml();
    let proof = prove(&world.documents(), &World::reread(&yaml));
    let told: Vec<String> = match &proof.proven {
        Proven::Differs(examples) => examples.iter().map(ToString::to_string).collect(),
        Proven::Unknown(why) => vec![why.clone()],
        Proven::Equivalent => Vec::new(),
    };
    assert!(told.is_empty(), "{policies}\n{yaml}\n{told:#?}");
    assert!(proof.places > 0 && proof.points >= proof.places, "{proof:?}");
    for word in words {
        assert!(yaml.contains(word), "{policies}: {word}\n{yaml}");
    }
    proof
}

/// It is refused at this object and field, with these words.
#[track_caller]
fn refused(policies: &str, at: &str, words: &str) {
    refused_in(MESH, policies, at, words);
}

#[track_caller]
fn refused_in(mesh: &str, policies: &str, at: &str, words: &str) {
    let conversion = World::new(mesh, policies).convert();
    let told: Vec<String> = conversion.refusals.iter().map(ToString::to_string).collect();
    assert!(
        told.iter().any(|refusal| refusal.starts_with(&format!("{at}: ")) && refusal.contains(words)),
        "{policies}: {at}: {words}\n{told:#?}\n{}",
        conversion.yaml()
    );
}

const ON: &str = "ClusterRbacConfig default: {mode: ON}";

/// A role and its binding under RBAC that is on everywhere.
fn role(rules: &str, subjects: &str) -> String {
    format!(
        "{ON}\nServiceRole photo/reader: {{rules: {rules}}}\n\
         ServiceRoleBinding photo/readers: {{subjects: {subjects}, roleRef: {{kind: ServiceRole, name: reader}}}}"
    )
}

const WEB: &str = "[{user: cluster.local/ns/photo/sa/frontend}]";

#[test]
fn a_role_becomes_a_policy_for_each_service_that_it_names() {
    // policy F-4
    let rules = "[{services: [backend.photo.svc.cluster.local], methods: [GET, HEAD], paths: [/albums/*, '*/thumbnail']}]";
    converted(
        &role(rules, WEB),
        &[
            "name: rbac-default-deny",
            "name: reader-backend",
            "app: backend",
            "methods: [GET, HEAD]",
            "ports: [\"8080\", \"9000\"]",
            "principals: [cluster.local/ns/photo/sa/frontend]",
            "# From ServiceRole/photo/reader, ServiceRoleBinding/photo/readers.",
        ],
    );
}

#[test]
fn each_kind_of_rule_says_the_same_afterwards() {
    // policy B-4 to B-8, F-4
    for rules in [
        "[{services: ['*'], methods: ['*']}]",
        "[{services: ['*']}]",
        "[{methods: [GET]}, {paths: ['*']}]",
        "[{services: ['back*'], notPaths: [/admin*]}]",
        "[{services: ['*'], hosts: [Photo.test, '*.photo.test'], notHosts: [x.photo.test]}]",
        "[{services: ['*'], ports: [9000]}]",
        "[{services: [backend.photo.svc.cluster.local], notPorts: [9000], notMethods: [DELETE]}]",
        "[{constraints: [{key: destination.port, values: ['8080', '1']}]}]",
        "[{constraints: [{key: 'destination.labels[tier]', values: [middle]}]}]",
        "[{constraints: [{key: 'destination.labels[tier]', values: ['*']}]}]",
        "[{constraints: [{key: 'destination.labels[tier]', values: [front, gone]}, {key: destination.name, values: [frontend]}]}]",
        "[{constraints: [{key: destination.namespace, values: [photo]}]}]",
        "[{constraints: [{key: destination.namespace, values: [shop]}]}, {methods: [GET]}]",
        "[{constraints: [{key: destination.ip, values: [10.8.1.3, 10.9.0.0/16]}]}]",
        "[{constraints: [{key: 'request.headers[X-A]', values: [v1, v2*]}]}]",
        "[{constraints: [{key: 'request.headers[x-a]', values: [a*]}, {key: 'request.headers[x-a]', values: ['*b']}]}]",
        "[{constraints: [{key: connection.sni, values: ['*.photo.test']}]}]",
        "[{constraints: [{key: destination.port, values: ['8080', 'x']}]}]",
        "[{constraints: [{key: source.ip, values: [10.0.0.1]}]}, {methods: [GET]}]",
    ] {
        converted(&role(rules, WEB), &[]);
    }
}

#[test]
fn each_kind_of_subject_says_the_same_afterwards() {
    // policy B-4, B-7, B-8, B-10
    for subjects in [
        "[{user: '*'}]",
        "[{names: [allUsers]}]",
        "[{names: [allAuthenticatedUsers]}]",
        "[{names: [a/ns/b/sa/c, '*/sa/frontend'], notNames: [cluster.local/ns/x/sa/frontend]}]",
        "[{user: cluster.local/ns/photo/*, properties: {source.principal: '*/sa/web'}}]",
        "[{properties: {source.namespace: photo}}]",
        "[{properties: {source.namespace: '*'}}]",
        "[{namespaces: [pho*], notNamespaces: ['*to'], ips: [10.8.0.0/16], notIps: [10.8.1.0/24]}]",
        "[{properties: {source.ip: 10.8.1.2}}, {user: '*/sa/x'}]",
        "[{properties: {source.ip: 'fd00::/8'}, user: '*'}]",
        "[{properties: {source.user: '*/sa/x'}}]",
        "[{properties: {request.auth.principal: cluster.local/ns/photo/sa/frontend}}]",
        "[{properties: {'request.headers[x-user]': ann}}, {user: '*/sa/x'}]",
        "[{group: admins}]",
        "[{groups: [a, b*], notGroups: [c]}]",
        "[{properties: {request.auth.audiences: shop, request.auth.presenter: '*app'}}]",
        "[{properties: {'request.auth.claims[role]': admin}}, {properties: {request.host: x}}]",
        "[{user: nobody, properties: {no.such.key: x}}, {user: '*/sa/x'}]",
    ] {
        converted(
            &role("[{services: ['*'], methods: [GET]}, {services: ['*'], ports: [9000]}]", subjects),
            &[],
        );
    }
}
