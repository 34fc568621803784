//! The one form of a path, against the naive reading.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use node_core::{
    decode::{self, Source},
    policy::{
        Compiled, ConnectionFacts, Inventory, PolicyObjects, Presented, RequestFacts, compile, tokens::Tokens,
    },
    workload::{Mesh, ObjectName, Placement, Protocol, Workload, WorkloadPort},
};
use serde_json::json;
use spiffe_id::SpiffeId;

const PORT: u16 = 8080;

/// A workload behind one policy, whose requests are judged one by one.
pub(crate) struct Place {
    pub(crate) compiled: Compiled,
    pub(crate) facts: ConnectionFacts,
}

impl Place {
    pub(crate) fn new(document: serde_json::Value) -> Self {
        let object = decode::object(document, Source::new("a.yaml", 0)).expect("a head");
        let mut objects = PolicyObjects::new();
        objects.insert(&object).expect("a good object");
        let domain: spiffe_id::TrustDomain = "cluster.local".parse().expect("a trust domain");
        let workload = Arc::new(Workload {
            name: ObjectName::new("apps", "web"),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            service_account: "web".to_owned(),
            identity: SpiffeId::new(domain.clone(), "apps", "web").expect("a name"),
            node: "n".to_owned(),
            addresses: vec![[10, 8, 1, 3].into()],
            placement: Placement::NetworkNamespace(PathBuf::new()),
            ports: vec![WorkloadPort { name: None, port: PORT, protocol: Protocol::Http }],
            exempt_inbound_ports: Vec::new(),
            enrolled: true,
        });
        let workloads = BTreeMap::from([(workload.name.clone(), Arc::clone(&workload))]);
        let mesh = Mesh::defaults(domain);
        let inventory =
            Inventory { mesh: &mesh, workloads: &workloads, services: &BTreeMap::new(), node: "n" };
        let facts = ConnectionFacts {
            presented: Presented::Plaintext,
            source_address: [10, 8, 1, 2].into(),
            destination_address: [10, 8, 1, 3].into(),
            destination_port: PORT,
            destination: workload,
        };
        Self { compiled: compile(&objects, &inventory), facts }
    }
}

/// Both readings refuse the same and make the same of the rest; the form is its own form, and no rule is passed by another
/// spelling of a path.
pub(crate) fn path(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (method, sent) = match text.strip_prefix('!') {
        Some(rest) => ("OPTIONS", rest),
        None => ("GET", text),
    };
    let place = Place::new(json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "a", "namespace": "apps"},
        "spec": {"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/admin", "/admin/*"]}}]}]},
    }));
    let headers: &[(&str, &str)] = &[];
    let tokens = Tokens::none();
    let request = RequestFacts { method, path: Some(sent), host: None, headers: &headers, tokens: &tokens };
    let naive = policy_oracle::path::normalise(sent, method);
    match (place.compiled.judge_request(&place.facts, &request), naive) {
        (Ok(permit), Ok(naive)) => {
            assert_eq!(permit.upstream_path(), Some(&*naive.upstream), "{sent:?}");
            assert!(!is_admin(&naive.matched), "{sent:?} was let through as {:?}", naive.matched);
            assert_eq!(policy_oracle::path::normalise(&naive.upstream, method), Ok(naive));
        }
        (Err(denial), Ok(naive)) => {
            assert_eq!(denial.answer().status, 403, "{sent:?}");
            assert!(is_admin(&naive.matched), "{sent:?}: {:?}", naive.matched);
        }
        (Err(denial), Err(policy_oracle::path::Unusable)) => {
            assert_eq!(denial.answer().status, 400, "{sent:?}")
        }
        (Ok(permit), Err(policy_oracle::path::Unusable)) => {
            panic!("{sent:?} was let through as {:?}", permit.upstream_path())
        }
    }
}

fn is_admin(path: &str) -> bool {
    path == "/admin" || path.starts_with("/admin/")
}
