//! Whole files as people wrote them, of both ages.

use super::*;

const OF_2018: &str = r#"
apiVersion: "authentication.istio.io/v1alpha1"
kind: "MeshPolicy"
metadata:
  name: "default"
spec:
  peers:
  - mtls: {}
---
apiVersion: "rbac.istio.io/v1alpha1"
kind: RbacConfig
metadata:
  name: default
  namespace: istio-system
spec:
  mode: ON_WITH_INCLUSION
  inclusion:
    namespaces: ["photo", "datastore"]
---
apiVersion: "rbac.istio.io/v1alpha1"
kind: ServiceRole
metadata:
  name: db-writer
  namespace: datastore
spec:
  rules:
  - services: ["db.datastore.svc.cluster.local"]
    constraints:
    - key: "destination.port"
      values: ["5432"]
---
apiVersion: "rbac.istio.io/v1alpha1"
kind: ServiceRoleBinding
metadata:
  name: backend-writes
  namespace: datastore
spec:
  subjects:
  - user: "cluster.local/ns/photo/sa/backend"
  - properties:
    - source.namespace: "ops"
    - source.ip: 10.0.0.0/8
  roleRef:
    kind: ServiceRole
    name: "db-writer"
"#;

const CURRENT: &str = r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: default
  namespace: istio-system
spec:
  mtls:
    mode: STRICT
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: nothing
  namespace: istio-system
spec: {}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: db
  namespace: datastore
spec:
  selector:
    matchLabels:
      app: db
  action: ALLOW
  rules:
  - from:
    - source:
        principals: ["cluster.local/ns/photo/sa/backend"]
    to:
    - operation:
        ports: ["5432"]
"#;

#[test]
fn a_mesh_of_2018_works_as_written() {
    let reader = "ServiceRole/datastore/db-writer rules[0] via ServiceRoleBinding/datastore/backend-writes";
    check_each(
        OF_2018,
        &[
            ("photo/backend tunnel > datastore/db:5432", &format!("allow {reader}")),
            ("ops/job tunnel > datastore/db:5432", &format!("allow {reader}")),
            (
                "photo/frontend tunnel > datastore/db:5432",
                "deny no_rule_allows RbacConfig/istio-system/default",
            ),
            ("ops/job tunnel > datastore/db:5432 from 192.168.0.1", "deny no_rule_allows"),
            ("photo/backend tunnel > datastore/db:9999", "deny no_rule_allows"),
            ("photo/frontend tunnel > photo/backend:8080", "deny no_rule_allows"),
            ("plain > datastore/db:5432", "deny plaintext_refused MeshPolicy/default"),
            ("photo/frontend tunnel > shop/cart:7", "allow"),
        ],
    );
}

#[test]
fn a_current_mesh_works_as_written() {
    check_each(
        CURRENT,
        &[
            ("photo/backend tunnel > datastore/db:5432", "allow AuthorizationPolicy/datastore/db rules[0]"),
            ("photo/frontend tunnel > datastore/db:5432", "deny no_rule_allows"),
            ("photo/backend tunnel > datastore/db:9999", "deny no_rule_allows"),
            (
                "photo/frontend tunnel > photo/backend:8080",
                "deny no_rule_allows AuthorizationPolicy/istio-system/nothing",
            ),
            ("plain > datastore/db:5432", "deny plaintext_refused PeerAuthentication/istio-system/default"),
        ],
    );
}

#[test]
fn both_ages_at_once() {
    // policy F-4: for the db the current policy decides, for the others RBAC.
    let without_root =
        CURRENT.split("---\n").filter(|text| !text.contains("nothing")).collect::<Vec<_>>().join("---\n");
    let both = format!("{}\n---\n{}", OF_2018.trim(), without_root.trim());
    check_each(
        &both,
        &[
            ("ops/job tunnel > datastore/db:5432", "deny no_rule_allows AuthorizationPolicy/datastore/db"),
            ("photo/backend tunnel > datastore/db:5432", "allow AuthorizationPolicy/datastore/db"),
            (
                "photo/frontend tunnel > photo/backend:8080",
                "deny no_rule_allows RbacConfig/istio-system/default",
            ),
        ],
    );
}

#[test]
fn the_order_of_documents_has_no_effect() {
    let mut documents: Vec<&str> = OF_2018.split("\n---\n").collect();
    for _ in 0..documents.len() {
        documents.rotate_left(1);
        let text = documents.iter().map(|text| text.trim()).collect::<Vec<_>>().join("\n---\n");
        check(&text, "photo/backend tunnel > datastore/db:5432", "allow ServiceRole/datastore/db-writer");
        check(&text, "photo/frontend tunnel > datastore/db:5432", "deny no_rule_allows");
    }
}
