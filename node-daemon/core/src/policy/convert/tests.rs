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
        let documents =
            testing::documents(yaml).into_iter().filter(|document| !document.is_null()).enumerate();
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

const READER: &str = "ServiceRole photo/reader: {rules: [{services: ['*'], methods: [GET]}]}\n\
    ServiceRoleBinding photo/readers: {subjects: [{user: '*/sa/frontend'}], roleRef: {kind: ServiceRole, name: reader}}";

#[test]
fn where_rbac_runs_says_the_same_afterwards() {
    // policy B-1, B-11, F-4
    for (switch, words) in [
        ("{mode: ON}", &["name: rbac-default-deny\n  namespace: istio-system"][..]),
        ("{mode: ON, enforcementMode: PERMISSIVE}", &["istio.io/dry-run: \"true\""]),
        (
            "{mode: ON_WITH_INCLUSION, inclusion: {namespaces: [photo]}}",
            &["name: rbac-default-deny\n  namespace: photo"],
        ),
        (
            "{mode: ON_WITH_INCLUSION, inclusion: {services: [backend.photo.svc.cluster.local]}}",
            &["name: rbac-included-backend", "notPorts: [\"8080\", \"9000\"]"],
        ),
        (
            "{mode: ON_WITH_INCLUSION, inclusion: {services: [backend.photo.svc.cluster.local, db.datastore.svc.cluster.local], \
             namespaces: [shop]}}",
            &["name: rbac-included-db", "namespace: shop"],
        ),
        ("{mode: ON_WITH_INCLUSION, inclusion: {}}", &[]),
        ("{mode: ON_WITH_EXCLUSION, exclusion: {}}", &["rbac-default-deny"]),
        (
            "{mode: ON_WITH_EXCLUSION, exclusion: {namespaces: [photo, datastore]}}",
            &["name: rbac-excluded\n  namespace: datastore", "rules:\n  - {}"],
        ),
        (
            "{mode: ON_WITH_EXCLUSION, exclusion: {services: [frontend.photo.svc.cluster.local]}}",
            &["name: rbac-excluded-frontend"],
        ),
        ("{mode: 'OFF'}", &["# Left out: ServiceRole/photo/reader: spec: RBAC is off"]),
    ] {
        converted(&format!("ClusterRbacConfig default: {switch}\n{READER}"), words);
        converted(&format!("RbacConfig photo/default: {switch}\n{READER}"), words);
    }
    converted(READER, &["# Left out: ServiceRole/photo/reader: spec: RBAC runs nowhere"]);
}

#[test]
fn what_decides_nothing_is_left_out_and_named() {
    let loose = "ServiceRole photo/alone: {rules: [{services: ['*']}]}\n\
        ServiceRoleBinding photo/dangling: {subjects: [{user: '*'}], roleRef: {kind: ServiceRole, name: gone}}";
    let words = ["# Left out: ServiceRole/photo/alone", "# Left out: ServiceRoleBinding/photo/dangling"];
    converted(&format!("{ON}\n{loose}"), &words);
    let tried = "ServiceRole photo/r: {rules: [{services: ['*']}]}\n\
        ServiceRoleBinding photo/b: {mode: PERMISSIVE, subjects: [{user: '*'}], roleRef: {kind: ServiceRole, name: r}}";
    converted(&format!("{ON}\n{tried}"), &["name: r-dry-run", "istio.io/dry-run: \"true\""]); // policy B-11
}

#[test]
fn transport_says_the_same_afterwards() {
    // policy A-2, A-4, A-5, F-1, F-4
    for policies in [
        "MeshPolicy default: {peers: [{mtls: {}}]}",
        "MeshPolicy default: {peers: [{mtls: null}]}",
        "MeshPolicy default: {}",
        "Policy photo/default: {peers: [{mtls: {mode: PERMISSIVE}}]}\nMeshPolicy default: {peers: [{mtls: {}}]}",
        "Policy photo/default: {}\nMeshPolicy default: {peers: [{mtls: {}}]}",
        "Policy photo/b: {targets: [{name: backend}], peers: [{mtls: {}}]}",
        "Policy photo/b: {targets: [{name: backend, ports: [{number: 80}]}], peers: [{mtls: {}}]}\n\
         Policy photo/c: {targets: [{name: backend, ports: [{name: tcp-admin}]}, {name: frontend}]}\n\
         Policy photo/default: {peers: [{mtls: {mode: PERMISSIVE}}]}",
        "Policy photo/new@2020-01-01T00:00:00Z: {targets: [{name: backend}], peers: [{mtls: {}}]}\n\
         Policy photo/old@2019-01-01T00:00:00Z: {targets: [{name: backend}], peers: [{mtls: {mode: PERMISSIVE}}]}",
        "Policy photo/b: {targets: [{name: backend, ports: [{number: 99}]}], peers: [{mtls: {}}]}",
        "MeshPolicy default: {peers: [{mtls: {mode: PERMISSIVE}}], peerIsOptional: false}\n\
         Policy photo/open: {targets: [{name: backend}], peerIsOptional: true}",
    ] {
        converted(policies, &[]);
        converted(&format!("{ON}\n{READER}\n{policies}"), &[]);
    }
    let ports = converted(
        "Policy photo/b: {targets: [{name: backend, ports: [{number: 80}]}], peers: [{mtls: {}}]}",
        &["portLevelMtls:\n    \"8080\":\n      mode: STRICT", "app: backend"],
    );
    assert!(ports.bad_token.is_none() && ports.answer.is_none(), "{ports:?}");
}

/// A policy of the backend that asks for tokens of one issuer.
fn origins(jwt: &str, more: &str) -> String {
    format!(
        "Policy photo/b: {{targets: [{{name: backend}}], origins: [{{jwt: {{issuer: 'https://id.test', {jwt}}}}}]{more}}}"
    )
}

#[test]
fn tokens_say_the_same_afterwards() {
    // policy A-9 to A-11, A-13, F-2, F-4
    for (jwt, more, words) in [
        ("", "", &["issuer: \"https://id.test\"", "forwardOriginalToken: true", "action: DENY"][..]),
        ("audiences: [a, 'b c']", "", &["audiences: [a, \"b c\"]"]),
        ("jwksUri: 'https://id.test/k'", ", originIsOptional: true", &["jwksUri: \"https://id.test/k\""]),
        ("jwks: '{\"keys\": []}'", "", &["jwks: \"{\\\"keys\\\": []}\""]),
        ("jwtParams: [t]", "", &["fromParams: [t]"]),
        ("jwtHeaders: [X-Token]", "", &["- name: x-token", "# Check: the header holds the token alone"]),
        ("", ", peers: [{mtls: {}}], principalBinding: USE_ORIGIN", &["mode: STRICT"]),
        (
            "triggerRules: [{excludedPaths: [{prefix: /pub/}, {suffix: .css}]}, {includedPaths: [{exact: /pub/x}]}]",
            "",
            &["notPaths: [\"/pub/*\", \"*.css\"]", "paths: [\"/pub/x\"]"],
        ),
    ] {
        let proof = converted(&origins(jwt, more), words);
        assert!(proof.bad_token.is_some() || proof.answer.is_some(), "{jwt}: {proof:?}");
        converted(
            &format!(
                "{}\nMeshPolicy default: {{peers: [{{mtls: {{}}}}]}}\n{ON}\n{READER}",
                origins(jwt, more)
            ),
            &[],
        );
    }
    let two = "Policy photo/b: {targets: [{name: backend}], principalBinding: USE_ORIGIN, origins: [{jwt: {issuer: a}}, {jwt: {issuer: b}}]}";
    let roles = role(
        "[{services: [backend.photo.svc.cluster.local], methods: [GET]}]",
        "[{properties: {request.auth.principal: 'a/ann'}}, {properties: {request.auth.principal: 'b/*', 'request.auth.claims[scope]': w}}]",
    );
    converted(two, &["notValues: [a, b]"]);
    converted(&format!("{two}\n{roles}"), &["requestPrincipals: [\"b/*\"]", "requestPrincipals: [a/ann]"]);
    // policy A-9.4, A-9.7: grants by token hold where a token is asked for, and in no preflight.
    let asks = origins("triggerRules: [{excludedPaths: [{prefix: /pub/}]}]", "");
    let groups = role(
        "[{services: [backend.photo.svc.cluster.local]}, {services: [backend.photo.svc.cluster.local], methods: [PUT], notPaths: [/x]}]",
        "[{group: admins}, {properties: {'request.auth.claims[role]': a*}}, {user: '*/sa/x'}]",
    );
    converted(&format!("{asks}\n{groups}"), &["notPaths: [\"/x\", \"/pub/*\"]", "notMethods: [OPTIONS]"]);
    // The namespace's and the mesh's policies ask on the HTTP ports of each service.
    for policy in [
        "Policy photo/default: {origins: [{jwt: {issuer: a}}]}",
        "MeshPolicy default: {origins: [{jwt: {issuer: a}}]}",
    ] {
        converted(policy, &["default-backend-token", "default-frontend-token"]);
    }
}

#[test]
fn what_the_current_api_cannot_say_is_refused_by_object_and_field() {
    let of_rule = |rules: &str, words: &str| {
        refused(&role(rules, WEB), "ServiceRole/photo/reader: spec.rules[0]", words)
    };
    of_rule("[{services: ['*'], hosts: ['*']}]", "met by an empty value too");
    of_rule("[{constraints: [{key: 'request.headers[x]', values: ['*']}]}]", "met by an empty value too");
    of_rule("[{services: [gone.photo.svc.cluster.local]}]", "is no Service of these documents");
    of_rule(
        "[{constraints: [{key: destination.user, values: [backend]}]}]",
        "selects workloads by labels only",
    );
    of_rule("[{paths: ['/a/{*}/b']}]", "these braces are operators");
    let of_subject = |subjects: &str, words: &str| {
        let at = "ServiceRoleBinding/photo/readers: spec.subjects[0]";
        refused(&role("[{services: ['*']}]", subjects), at, words);
    };
    of_subject("[{properties: {source.namespace: 'a*b'}}]", "a star stands at one end only");
    of_subject("[{namespaces: ['*a*']}]", "a star stands at one end only");
    of_subject("[{properties: {'request.headers[x]': '*'}}]", "met by an empty value too");
    refused(
        &format!(
            "{ON}\nServiceRole istio-system/r: {{rules: [{{services: ['*']}}]}}\n\
            ServiceRoleBinding istio-system/b: {{subjects: [{{user: '*'}}], roleRef: {{kind: ServiceRole, name: r}}}}"
        ),
        "ServiceRole/istio-system/r: metadata.namespace",
        "speak for the whole mesh",
    );
    for (switch, at, words) in [
        (
            "{mode: ON_WITH_INCLUSION, inclusion: {services: [x.photo.svc.cluster.local]}}",
            "spec.inclusion.services",
            "is no Service",
        ),
        (
            "{mode: ON_WITH_EXCLUSION, exclusion: {services: [x.photo.svc.cluster.local]}}",
            "spec.exclusion.services",
            "is no Service",
        ),
        (
            "{mode: ON_WITH_EXCLUSION, exclusion: {namespaces: [istio-system]}}",
            "spec.exclusion.namespaces",
            "root namespace",
        ),
        (
            "{mode: ON_WITH_INCLUSION, inclusion: {namespaces: [istio-system]}}",
            "spec.inclusion.namespaces",
            "root namespace",
        ),
        ("{mode: SOMETIMES}", "spec.mode", "expected one of"),
    ] {
        refused(
            &format!("ClusterRbacConfig default: {switch}"),
            &format!("ClusterRbacConfig/default: {at}"),
            words,
        );
    }
    for (policy, at, words) in [
        (
            "Policy photo/b: {targets: [{name: gone}], peers: [{mtls: {}}]}",
            "Policy/photo/b: spec.targets[0].name",
            "is no Service",
        ),
        (
            "Policy photo/b: {targets: [{name: backend}], peers: [{mtls: {}}], peerIsOptional: true}",
            "Policy/photo/b: spec.peerIsOptional",
            "no such mode",
        ),
        (
            "Policy photo/b: {targets: [{name: backend}], peers: [{mtls: {}}], principalBinding: USE_ORIGIN}",
            "Policy/photo/b: spec.principalBinding",
            "lets no request through",
        ),
        (
            "Policy istio-system/default: {peers: [{mtls: {}}]}",
            "Policy/istio-system/default: metadata.namespace",
            "speaks for the whole mesh",
        ),
        (
            "Policy photo/b: {targets: [{name: backend}], peers: [{}]}",
            "Policy/photo/b: spec.peers[0]",
            "expected a peer method",
        ),
        (
            "MeshPolicy other: {peers: [{mtls: {}}]}",
            "MeshPolicy/other: metadata.name",
            "expected the name default",
        ),
    ] {
        refused(policy, at, words);
    }
    for (jwt, at, words) in [
        ("jwtHeaders: [ingress-authorization]", "jwt.jwtHeaders", "original_claims"),
        (
            "triggerRules: [{includedPaths: [{regex: '/a.*'}]}]",
            "jwt.triggerRules[0]",
            "no regular expressions",
        ),
        (
            "triggerRules: [{includedPaths: [{exact: '/a*'}]}]",
            "jwt.triggerRules[0]",
            "its star is a wildcard",
        ),
        (
            "triggerRules: [{}, {excludedPaths: [{prefix: '*a'}]}]",
            "jwt.triggerRules[1]",
            "its star is a wildcard",
        ),
        (
            "triggerRules: [{includedPaths: [{prefix: '/a/{**}'}]}]",
            "jwt.triggerRules[0]",
            "braces are operators",
        ),
    ] {
        refused(&origins(jwt, ""), &format!("Policy/photo/b: spec.origins[0].{at}"), words);
    }
    refused(
        "Policy photo/b: {targets: [{name: backend}], origins: [{jwt: {issuer: a}}, {jwt: {issuer: b, triggerRules: [{includedPaths: [{exact: /x}]}]}}]}",
        "Policy/photo/b: spec.origins[1].jwt.triggerRules",
        "differ from issuer to issuer",
    );
}

#[test]
fn services_that_no_selector_tells_apart_are_refused() {
    let with = |more: &str| format!("{MESH}\n---\n{more}");
    let service = |name: &str, selector: &str, target: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: photo}}\n\
             spec: {{clusterIP: 10.96.0.30, selector: {selector}, ports: [{{name: http, port: 80, targetPort: {target}}}]}}"
        )
    };
    let strict =
        |name: &str| format!("Policy photo/{name}: {{targets: [{{name: {name}}}], peers: [{{mtls: {{}}}}]}}");
    // Both select backend-0, by different labels.
    let two = with(&service("middle", "{tier: middle}", "7000"));
    let both = format!("{}\n{}", strict("backend"), strict("middle"));
    refused_in(&two, &both, "Policy/photo/middle: spec.targets", "of several PeerAuthentications one counts");
    converted_in(&two, &strict("middle"), &[]);
    let inclusion = "ClusterRbacConfig default: {mode: ON_WITH_INCLUSION, inclusion: {services: \
        [backend.photo.svc.cluster.local, middle.photo.svc.cluster.local]}}";
    refused_in(
        &two,
        inclusion,
        "ClusterRbacConfig/default: spec.inclusion.services",
        "what one closes the other opens",
    );
    // Its port has a name, and no workload says its number.
    let named = with(&service("nobody", "{app: nobody}", "web"));
    refused_in(
        &named,
        &strict("nobody"),
        "Policy/photo/nobody: spec.targets[0].name",
        "no Workload document that says its number",
    );
    // Without workloads the number stands in the service.
    converted_in(&with(&service("nobody", "{app: nobody}", "8080")), &strict("nobody"), &["\"8080\""]);
    // The same label, other ports.
    let uneven = with(
        "apiVersion: culvert.io/v1alpha1\nkind: Workload\nmetadata: {name: backend-1, namespace: photo, labels: {app: backend}}\n\
         spec: {serviceAccount: backend, node: a, addresses: [10.8.1.9], networkNamespace: /run/netns/c, ports: [{name: admin, port: 9100}]}",
    );
    refused_in(
        &uneven,
        &strict("backend"),
        "Policy/photo/backend: spec.targets[0].name",
        "do not serve it on the same ports",
    );
    // An HTTP port that only the workload declares.
    let free = with(
        "apiVersion: culvert.io/v1alpha1\nkind: Workload\nmetadata: {name: solo, namespace: photo, labels: {app: solo}}\n\
         spec: {serviceAccount: solo, node: a, addresses: [10.8.1.9], networkNamespace: /run/netns/c, ports: [{name: http, port: 8081}]}",
    );
    let asks = "Policy photo/default: {origins: [{jwt: {issuer: a}}]}";
    refused_in(
        &free,
        asks,
        "Policy/photo/default: spec.origins",
        "port 8081 of workload photo/solo belongs to no service",
    );
}

/// What was written is spoilt on the way, and the proof says where.
#[track_caller]
fn caught(policies: &str, right: &str, wrong: &str) {
    let world = World::new(MESH, policies);
    let yaml = world.convert().yaml();
    assert!(yaml.contains(right), "{right}\n{yaml}");
    let proof = prove(&world.documents(), &World::reread(&yaml.replace(right, wrong)));
    let Proven::Differs(examples) = &proof.proven else {
        panic!("{right} -> {wrong}: {:?}\n{yaml}", proof.proven);
    };
    let told = examples[0].to_string();
    assert!(told.contains(": before ") && told.contains(", after "), "{told}");
}

#[test]
fn a_wrong_conversion_is_caught_by_the_proof() {
    let roles = role(
        "[{services: [backend.photo.svc.cluster.local], methods: [GET], paths: [/albums/*], notPaths: ['*.key']}]",
        "[{user: cluster.local/ns/photo/sa/frontend, properties: {source.ip: 10.8.0.0/16}}, {group: admins}]",
    );
    for (right, wrong) in [
        ("methods: [GET]", "methods: [GET, HEAD]"),
        ("methods: [GET]", "methods: [\"G*\"]"),
        ("/albums/*", "/albums*"),
        ("/albums/*", "/albums/"),
        ("/albums/*", "*/albums/*"),
        ("*.key", "*key"),
        ("*.key", "/*.key"),
        ("cluster.local/ns/photo/sa/frontend", "cluster.local/ns/photo/sa/*"),
        ("cluster.local/ns/photo/sa/frontend", "\"*/sa/frontend\""),
        ("cluster.local/ns/photo/sa/frontend", "cluster.local/ns/photo/sa/front"),
        ("10.8.0.0/16", "10.8.0.0/17"),
        ("10.8.0.0/16", "10.8.0.0/15"),
        ("[\"8080\", \"9000\"]", "[\"8080\", \"9000\"]\n        notHosts: [evil]"),
        ("[\"8080\", \"9000\"]", "[\"9000\"]"),
        ("app: backend", "tier: front"),
        ("name: rbac-default-deny\n  namespace: istio-system", "name: rbac-default-deny\n  namespace: photo"),
        ("rbac-default-deny", "rbac-default-deny\n  annotations: {istio.io/dry-run: \"true\"}"),
        ("name: reader-backend", "name: reader-backend\n  annotations: {istio.io/dry-run: \"true\"}"),
    ] {
        caught(&roles, right, wrong);
    }
    for (right, wrong) in [
        ("mode: STRICT", "mode: PERMISSIVE"),
        ("mode: STRICT", "mode: DISABLE"),
        ("\"8080\"", "\"80\""),
        ("app: backend", "app: frontend"),
    ] {
        caught(
            "Policy photo/b: {targets: [{name: backend, ports: [{number: 80}]}], peers: [{mtls: {}}]}",
            right,
            wrong,
        );
    }
    let asks = origins("triggerRules: [{excludedPaths: [{prefix: /pub/}]}], audiences: [a]", "");
    for (right, wrong) in [
        ("notPaths: [\"/pub/*\"]", "notPaths: [\"/pu*\"]"),
        ("notPaths: [\"/pub/*\"]", "notPaths: [\"/pub/x*\"]"),
        ("notMethods: [OPTIONS]", "notMethods: [OPTIONS, GET]"),
        ("audiences: [a]", "audiences: [a, b]"),
        ("action: DENY", "action: AUDIT"),
        ("issuer: \"https://id.test\"", "issuer: \"https://other.test\""),
        ("request.headers[origin]", "request.headers[referer]"),
    ] {
        caught(&asks, right, wrong);
    }
    // policy A-9.4, A-9.7: in 2018 a token says nothing where none is asked for.
    let groups =
        format!("{asks}\n{}", role("[{services: [backend.photo.svc.cluster.local]}]", "[{group: admins}]"));
    let untold = "notMethods: [OPTIONS]\n        notPaths: [\"/pub/*\"]";
    for (right, wrong) in [
        (untold, "notMethods: [OPTIONS]"),
        (untold, "notPaths: [\"/pub/*\"]"),
        (
            "key: \"request.auth.claims[groups]\"\n      values: [admins]",
            "key: \"request.auth.claims[groups]\"\n      values: [\"admins*\"]",
        ),
    ] {
        caught(&groups, right, wrong);
    }
}

#[test]
fn the_proof_counts_kinds_of_peers_with_paths_of_their_own_by_their_sum() {
    use std::fmt::Write as _;
    let mut policies = ON.to_owned();
    for number in 0..40 {
        let _ = write!(
            policies,
            "\nServiceRole photo/r{number}: {{rules: [{{services: ['*'], methods: [GET], paths: [/p{number}/*, '*.x{number}']}}]}}\n\
             ServiceRoleBinding photo/b{number}: {{subjects: [{{user: cluster.local/ns/photo/sa/u{number}}}], roleRef: {{kind: ServiceRole, name: r{number}}}}}"
        );
    }
    let proof = converted(&policies, &[]);
    assert!(proof.points < 5_000, "{proof:?}");
}

#[test]
fn what_is_only_tried_is_not_called_proven() {
    // A template of the current API stands beside the policy of 2018.
    let policies = "MeshPolicy default: {peers: [{mtls: {}}]}\n\
        AuthorizationPolicy shop/t: {action: DENY, rules: [{to: [{operation: {paths: ['/a/{*}/b']}}]}]}";
    let mesh = format!(
        "{MESH}\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: till, namespace: shop}}\n\
         spec: {{clusterIP: 10.96.0.40, selector: {{app: till}}, ports: [{{name: http, port: 80}}]}}"
    );
    let world = World::new(&mesh, policies);
    let proof = prove(&world.documents(), &World::reread(&world.convert().yaml()));
    assert!(matches!(&proof.proven, Proven::Unknown(why) if why.contains("only tried")), "{proof:?}");
}

mod random {
    //! Objects of 2018 at random: each is refused by name, or says the same afterwards, of points at random too.

    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::policy::{Point, RequestPoint, atoms::NoKeys, compile};

    fn one(choices: &'static [&'static str]) -> impl Strategy<Value = String> {
        proptest::sample::select(choices).prop_map(str::to_owned)
    }

    fn rule() -> impl Strategy<Value = String> {
        let services = one(&[
            "'*'",
            "backend.photo.svc.cluster.local",
            "back*",
            "'*.photo.svc.cluster.local'",
            "gone.photo.svc.cluster.local",
        ]);
        let more = one(&[
            "",
            ", methods: [GET]",
            ", methods: ['*']",
            ", notMethods: [P*]",
            ", paths: [/a*, /b]",
            ", notPaths: ['*.k']",
            ", paths: ['*'], notPaths: [/a/*]",
            ", hosts: [H.test]",
            ", hosts: ['*']",
            ", ports: [8080]",
            ", notPorts: [9000]",
            ", constraints: [{key: destination.port, values: ['8080']}]",
            ", constraints: [{key: 'destination.labels[tier]', values: [middle]}]",
            ", constraints: [{key: 'request.headers[x-a]', values: [a*]}]",
            ", constraints: [{key: destination.ip, values: [10.8.1.0/24]}]",
            ", constraints: [{key: no.such, values: [x]}]",
        ]);
        (services, more).prop_map(|(services, more)| format!("{{services: [{services}]{more}}}"))
    }

    fn subject() -> impl Strategy<Value = String> {
        one(&[
            "{user: '*'}",
            "{user: cluster.local/ns/photo/sa/frontend}",
            "{user: '*/sa/frontend', properties: {source.ip: 10.8.1.0/24}}",
            "{names: [allAuthenticatedUsers], notNames: [cluster.local/ns/photo/*]}",
            "{namespaces: [pho*]}",
            "{properties: {source.namespace: 'p*o'}}",
            "{ips: [10.8.0.0/16], notIps: [10.8.1.2]}",
            "{properties: {'request.headers[x-a]': ab}}",
            "{properties: {request.auth.principal: 'a/*'}}",
            "{properties: {request.auth.principal: cluster.local/ns/photo/sa/frontend}}",
            "{group: g}",
            "{properties: {'request.auth.claims[c]': v*}}",
            "{properties: {source.user: '*/sa/frontend'}}",
        ])
    }

    fn transport() -> impl Strategy<Value = String> {
        one(&[
            "",
            "\nMeshPolicy default: {peers: [{mtls: {}}]}",
            "\nMeshPolicy default: {peers: [{mtls: {mode: PERMISSIVE}}]}\nPolicy photo/default: {}",
            "\nPolicy photo/b: {targets: [{name: backend}], peers: [{mtls: {}}]}",
            "\nPolicy photo/b: {targets: [{name: backend}], origins: [{jwt: {issuer: a}}]}",
            "\nPolicy photo/b: {targets: [{name: backend}], peers: [{mtls: {}}], origins: [{jwt: {issuer: a}}], principalBinding: USE_ORIGIN}",
            "\nPolicy photo/b: {targets: [{name: backend}], origins: [{jwt: {issuer: a, triggerRules: [{excludedPaths: [{prefix: /a}]}]}}]}",
        ])
    }

    fn switch() -> impl Strategy<Value = String> {
        one(&[
            "ClusterRbacConfig default: {mode: ON}",
            "ClusterRbacConfig default: {mode: ON_WITH_INCLUSION, inclusion: {namespaces: [photo]}}",
            "ClusterRbacConfig default: {mode: ON_WITH_INCLUSION, inclusion: {services: [backend.photo.svc.cluster.local]}}",
            "ClusterRbacConfig default: {mode: ON_WITH_EXCLUSION, exclusion: {services: [frontend.photo.svc.cluster.local]}}",
            "ClusterRbacConfig default: {mode: ON, enforcementMode: PERMISSIVE}",
        ])
    }

    prop_compose! {
        fn policies()(
            switch in switch(),
            transport in transport(),
            rules in vec(rule(), 1..4),
            subjects in vec(subject(), 1..4),
            mode in one(&["", ", mode: PERMISSIVE"]),
        ) -> String {
            let (rules, subjects) = (rules.join(", "), subjects.join(", "));
            format!(
                "{switch}{transport}\nServiceRole photo/r: {{rules: [{rules}]}}\n\
                 ServiceRoleBinding photo/b: {{subjects: [{subjects}], roleRef: {{kind: ServiceRole, name: r}}{mode}}}"
            )
        }
    }

    prop_compose! {
        fn point()(
            destination in one(&["photo/backend-0", "photo/frontend-0", "datastore/db-0"]),
            port in proptest::sample::select(vec![8080_u16, 9000, 5432, 7]),
            peer in one(&["", "cluster.local/ns/photo/sa/frontend", "cluster.local/ns/other/sa/frontend", "cluster.local/ns/photo/sa/x"]),
            source in one(&["10.8.1.2", "10.8.1.3", "10.8.9.9", "10.9.0.1"]),
            method in one(&["GET", "POST", "PUT"]),
            path in one(&["/", "/a", "/a/x", "/b", "/b/c.k", "/a/../b"]),
            host in one(&["h.test", "H.test", "x"]),
            header in one(&["", "a", "ab", "b"]),
        ) -> (String, u16, String, String, String, String, String, String) {
            (destination, port, peer, source, method, path, host, header)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

        #[test]
        fn whatever_is_converted_says_the_same(policies in policies(), points in vec(point(), 24)) {
            let world = World::new(MESH, &policies);
            let conversion = world.convert();
            if !conversion.refusals.is_empty() {
                prop_assert!(conversion.refusals.iter().all(|refusal| !refusal.object.is_empty() && !refusal.field.is_empty()));
                return Ok(());
            }
            let after = World::reread(&conversion.yaml());
            let proof = prove(&world.documents(), &after);
            let is_proven = matches!(proof.proven, Proven::Equivalent);
            let read = |objects: &[Object]| {
                let mut read = PolicyObjects::new();
                objects.iter().for_each(|object| { let _ = read.insert(object); });
                read
            };
            let workloads: BTreeMap<_, _> = world.workloads.iter().map(|(name, workload)| {
                (name.clone(), Arc::new(Workload { node: "here".to_owned(), ..(**workload).clone() }))
            }).collect();
            let inventory = Inventory { mesh: &world.mesh, workloads: &workloads, services: &world.services, node: "here" };
            let (old, new) = (compile(&read(&world.objects), &inventory), compile(&read(&after), &inventory));
            for (destination, port, peer, source, method, path, host, header) in points {
                let (namespace, name) = destination.split_once('/').unwrap();
                let headers = if header.is_empty() { Vec::new() } else { vec![("X-A".to_owned(), header)] };
                let point = Point {
                    destination: Arc::clone(&workloads[&ObjectName::new(namespace, name)]),
                    port,
                    destination_address: workloads[&ObjectName::new(namespace, name)].addresses[0],
                    source_address: source.parse().unwrap(),
                    peer: (!peer.is_empty()).then(|| format!("spiffe://{peer}").parse().unwrap()),
                    is_attested: false,
                    server_name: None,
                    request: (port == 8080).then(|| RequestPoint::new(&method, Some(&path), Some(&host), headers)),
                };
                let (before, after) = (old.decide(&point, 0, &NoKeys), new.decide(&point, 0, &NoKeys));
                prop_assert!(before.allowed == after.allowed || !is_proven, "{policies}\n{point:?}\n{before:?}\n{after:?}\n{}", conversion.yaml());
            }
            // What nobody refused differs only where tokens are shown to rules on paths that ask for none.
            let has_tokens = policies.contains("issuer") && (policies.contains("group") || policies.contains("request.auth"));
            let is_explained = is_proven || has_tokens;
            prop_assert!(is_explained, "{policies}\n{:?}\n{}", proof.proven, conversion.yaml());
        }
    }
}
