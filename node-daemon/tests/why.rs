//! `culvert why`, on a folder of documents.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use node_core::policy::tokens::encode_base64url;

const MESH: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: photo, labels: {culvert.io/mesh: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: plain, labels: {culvert.io/mesh: disabled}}
---
apiVersion: v1
kind: Service
metadata: {name: backend, namespace: photo}
spec:
  clusterIP: 10.96.0.20
  selector: {app: backend}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp-db, port: 5432}]
---
apiVersion: v1
kind: Service
metadata: {name: empty, namespace: photo}
spec: {clusterIP: 10.96.0.21, selector: {app: nobody}, ports: [{name: http, port: 80}]}
---
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: frontend-0, namespace: photo, labels: {app: frontend}}
spec: {serviceAccount: frontend, node: a, addresses: [10.8.1.2], networkNamespace: /run/netns/f, ports: []}
---
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: backend-0, namespace: photo, labels: {app: backend}}
spec:
  serviceAccount: backend
  node: b
  addresses: [10.8.2.2]
  networkNamespace: /run/netns/b
  ports: [{name: http, port: 8080}, {name: tcp-db, port: 5432}]
---
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: old-0, namespace: plain, labels: {app: old}}
spec: {serviceAccount: old, node: a, addresses: [10.8.1.9], networkNamespace: /run/netns/o, ports: []}
"#;

const POLICIES: &str = r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: read, namespace: photo}
spec:
  rules:
  - from: [{source: {principals: [cluster.local/ns/photo/sa/frontend]}}]
    to: [{operation: {methods: [GET], ports: ["8080"]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-admin, namespace: photo}
spec:
  action: DENY
  rules: [{to: [{operation: {paths: ["/admin*"]}}]}]
"#;

fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("why").join(test);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(folder.join("mesh.d")).expect("the folder can be made");
    fs::write(folder.join("mesh.d/mesh.yaml"), MESH).expect("the file can be written");
    fs::write(folder.join("mesh.d/policies.yaml"), POLICIES).expect("the file can be written");
    folder
}

fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_culvert")).arg("why").args(arguments).output();
    let output = output.expect("the command was built");
    let text = |bytes| String::from_utf8(bytes).expect("it writes UTF-8");
    (output.status.code(), text(output.stdout) + &text(output.stderr))
}

/// The question is separated by blanks.
#[track_caller]
fn check(folder: &Path, question: &str, status: i32, words: &[&str]) {
    let documents = folder.join("mesh.d");
    let mut arguments: Vec<&str> = question.split(' ').collect();
    arguments.extend(["--policies", documents.to_str().expect("UTF-8")]);
    let (code, said) = run(&arguments);
    assert_eq!(code, Some(status), "{question}\n{said}");
    for word in words {
        assert!(said.contains(word), "{question}: {word}\n{said}");
    }
}

#[test]
fn the_fewest_attributes_that_turn_the_verdict_over_are_named() {
    let folder = folder("smallest");
    let of = |question: &str, status, words: &[&str]| check(&folder, question, status, words);
    of(
        "photo/frontend photo/backend:80 POST /albums",
        1,
        &["allowed with: request.method GET instead of POST"],
    );
    of("photo/backend photo/backend-0:8080 GET /", 2, &[]);
    of(
        "photo/frontend photo/backend:80 POST /admin",
        1,
        &["allowed with: request.method GET instead of POST, and request.path / instead of /admin"],
    );
    of(
        "photo/frontend photo/backend:80 GET /albums",
        0,
        &[
            "denied with: source.principal unset instead of cluster.local/ns/photo/sa/frontend",
            "denied with: request.path /admin instead of /albums",
        ],
    );
}

#[test]
fn the_deciding_object_rule_attribute_and_the_least_change_are_named() {
    let folder = folder("answers");
    check(
        &folder,
        "photo/frontend photo/backend:80 GET /albums",
        0,
        &[
            "allowed: photo/frontend-0 to photo/backend-0 port 8080, of service photo/backend",
            "caller: spiffe://cluster.local/ns/photo/sa/frontend",
            "decided by: AuthorizationPolicy/photo/read rules[0]",
            "denied if: AuthorizationPolicy/photo/read rules[0] did not match, or AuthorizationPolicy/photo/no-admin",
        ],
    );
    check(
        &folder,
        "photo/frontend-0 backend.photo.svc.cluster.local:80 POST /albums",
        1,
        &[
            "denied: ",
            "allowed if: AuthorizationPolicy/photo/read rules[0] matches: request.method is POST, wanted GET",
        ],
    );
    check(
        &folder,
        "10.8.1.2 10.8.2.2:8080 GET /admin/keys",
        1,
        &[
            "decided by: AuthorizationPolicy/photo/no-admin rules[0]",
            "allowed if: AuthorizationPolicy/photo/no-admin rules[0] does not match",
        ],
    );
    check(
        &folder,
        "cluster.local/ns/photo/sa/backend 10.8.2.2:8080 GET /",
        2,
        &["the target is the caller itself"],
    );
    check(
        &folder,
        "plain/old-0 photo/backend:80 GET /",
        1,
        &["caller: nobody (plaintext)", "reason: plaintext_refused\n", "allowed if: the caller is enrolled"],
    );
    check(&folder, "photo/frontend photo/backend:5432", 1, &["denied: "]);
}

#[test]
fn what_cannot_be_answered_says_why() {
    let folder = folder("refusals");
    for (question, word) in [
        ("photo/nobody photo/backend:80 GET /", "photo/nobody is no workload"),
        ("photo/frontend photo/nothing:80 GET /", "photo/nothing is no service"),
        ("photo/frontend photo/backend GET /", "a colon and a port"),
        ("photo/frontend photo/backend:http GET /", "a colon and a port"),
        ("photo/frontend backend:80 GET /", "such as photo/backend:80"),
        ("photo/frontend photo/backend:81 GET /", "has no TCP port 81"),
        ("photo/frontend photo/empty:80 GET /", "no endpoint"),
        ("photo/frontend plain/old-0:80 GET /", "is not enrolled"),
        ("photo/frontend 192.0.2.1:80 GET /", "is not enrolled"),
        ("photo/frontend photo/backend:80", "say method and path"),
        ("photo/frontend photo/backend:80 GET / -H nothing", "a colon and a value"),
        ("photo/frontend photo/backend:80 GET / --jwt /nowhere", "/nowhere: there is no such file"),
    ] {
        check(&folder, question, 2, &[word]);
    }
    assert_eq!(run(&["photo/frontend", "photo/backend:80", "GET"]).0, Some(2), "a method without a path");
    fs::write(folder.join("mesh.d/broken.yaml"), "a: [").expect("the file can be written");
    check(&folder, "photo/frontend photo/backend:80 GET /", 2, &["broken.yaml", "line 1"]);
}

#[test]
fn documents_that_cannot_be_used_are_told_with_the_answer() {
    let folder = folder("problems");
    let unusable = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: odd, namespace: photo}
spec: {action: PERHAPS}
";
    fs::write(folder.join("mesh.d/odd.yaml"), unusable).expect("the file can be written");
    check(
        &folder,
        "photo/frontend photo/backend:80 GET /",
        1,
        &["policy_unusable", "note: ", "odd", "PERHAPS"],
    );
}

/// policy A-11 to A-13
#[test]
fn a_token_counts_by_keys_in_the_policy_and_is_else_taken_for_good_which_is_said() {
    let folder = folder("tokens");
    let part = |text: &str| encode_base64url(text.as_bytes());
    let token = |name: &str, claims: &str| {
        let token = format!("{}.{}.{}\n", part(r#"{"alg":"RS256"}"#), part(claims), part("signed"));
        let path = folder.join(name);
        fs::write(&path, token).expect("the file can be written");
        path.to_str().expect("UTF-8").to_owned()
    };
    let ann = token("ann", r#"{"iss":"https://id.test","sub":"ann"}"#);
    let bob = token("bob", r#"{"iss":"https://id.test","sub":"bob"}"#);
    let late = token("late", r#"{"iss":"https://id.test","sub":"ann","exp":1}"#);
    let policies = |keys: &str| {
        let text = format!(
            "{POLICIES}---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: tokens, namespace: photo}}
spec: {{jwtRules: [{{issuer: 'https://id.test', {keys}}}]}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: ann, namespace: photo}}
spec: {{rules: [{{from: [{{source: {{requestPrincipals: ['https://id.test/ann']}}}}], to: [{{operation: {{methods: [PUT]}}}}]}}]}}
"
        );
        fs::write(folder.join("mesh.d/policies.yaml"), text).expect("the file can be written");
    };
    let put = "photo/frontend photo/backend:80 PUT /x";
    policies("jwksUri: 'https://id.test/keys'");
    let good = "taken for good";
    check(&folder, &format!("{put} --jwt {ann}"), 0, &["AuthorizationPolicy/photo/ann rules[0]", good]);
    check(
        &folder,
        &format!("{put} --jwt {bob}"),
        1,
        &["request.auth.principal is https://id.test/bob", good],
    );
    check(&folder, &format!("{put} --jwt {late}"), 1, &["Jwt is expired", "a token that the policy accepts"]);
    check(&folder, put, 1, &["request.auth.principal is unset"]);
    policies(r#"jwks: '{"keys": []}'"#);
    check(&folder, &format!("{put} --jwt {ann}"), 1, &["token_refused"]);
}

#[test]
fn without_a_folder_the_daemons_own_documents_are_asked() {
    let folder = folder("root");
    let root = folder.to_str().expect("UTF-8");
    let question = ["photo/frontend", "photo/backend:80", "GET", "/", "--root", root];
    let (status, said) = run(&question);
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("node.yaml") && said.contains("--policies"), "{said}");
    let config = format!(
        "node: b\nworkloads: {root}/mesh.d\nca: {{address: '127.0.0.1:15012', trustDomain: cluster.local, joinToken: /x}}\n"
    );
    fs::create_dir_all(folder.join("etc/culvert")).expect("the folder can be made");
    fs::write(folder.join("etc/culvert/node.yaml"), config).expect("the file can be written");
    let (status, said) = run(&question);
    assert_eq!(status, Some(0), "{said}");
}
