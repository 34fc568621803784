//! Documents of policy of both ages that several scenarios use.

/// Nothing in the clear, anywhere (2018).
pub(crate) const STRICT_2018: &str = "apiVersion: authentication.istio.io/v1alpha1
kind: MeshPolicy
metadata: {name: default}
spec: {peers: [{mtls: {}}]}
";

/// Nothing in the clear, anywhere (today).
pub(crate) const STRICT: &str = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
";

/// The namespace `datastore` is for the photo backend only (2018).
pub(crate) const BACKEND_ONLY_2018: &str = "apiVersion: rbac.istio.io/v1alpha1
kind: ClusterRbacConfig
metadata: {name: default}
spec: {mode: ON_WITH_INCLUSION, inclusion: {namespaces: [datastore]}}
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRole
metadata: {name: reader, namespace: datastore}
spec: {rules: [{services: [\"*\"]}]}
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRoleBinding
metadata: {name: backend-reads, namespace: datastore}
spec:
  subjects: [{user: cluster.local/ns/photo/sa/photo-backend}]
  roleRef: {kind: ServiceRole, name: reader}
";

/// An AuthorizationPolicy in the namespace `datastore` with this action and these rules (YAML, flow style).
pub(crate) fn authorization(name: &str, action: &str, rules: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: datastore}}
spec: {{action: {action}, rules: {rules}}}
"
    )
}
