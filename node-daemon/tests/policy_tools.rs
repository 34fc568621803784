//! `culvert policy convert` and `culvert policy replay` as operators run them: the built command, on files.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

const MESH: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: backend, namespace: photo}
spec: {clusterIP: 10.96.0.20, selector: {app: backend}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: culvert.io/v1alpha1
kind: Workload
metadata: {name: backend-0, namespace: photo, labels: {app: backend}}
spec: {serviceAccount: backend, node: a, addresses: [10.8.1.3], networkNamespace: /run/netns/b, ports: [{name: http, port: 8080}]}
"#;

const STRICT: &str = "apiVersion: authentication.istio.io/v1alpha1
kind: MeshPolicy
metadata: {name: default}
spec: {peers: [{mtls: {}}]}
";

const READERS: &str = "apiVersion: rbac.istio.io/v1alpha1
kind: ClusterRbacConfig
metadata: {name: default}
spec: {mode: ON}
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRole
metadata: {name: reader, namespace: photo}
spec: {rules: [{services: [backend.photo.svc.cluster.local], methods: [GET], paths: [/albums/*]}]}
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRoleBinding
metadata: {name: readers, namespace: photo}
spec: {subjects: [{user: cluster.local/ns/photo/sa/web}], roleRef: {kind: ServiceRole, name: reader}}
";

/// What the command said.
struct Said {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

fn run(arguments: &[&str], input: &str) -> Said {
    let mut command = Command::new(env!("CARGO_BIN_EXE_culvert"))
        .arg("policy")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command was built");
    // It may end before it has read everything.
    let _ = command.stdin.take().expect("it has an input").write_all(input.as_bytes());
    let output = command.wait_with_output().expect("it ends");
    let text = |bytes| String::from_utf8(bytes).expect("it writes UTF-8");
    Said { status: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A folder for one test with these documents.
fn folder(test: &str, documents: &[&str]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("policy-tools").join(test);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("the folder can be made");
    fs::write(folder.join("mesh.yaml"), documents.join("---\n")).expect("the file can be written");
    folder
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The folder is converted, or not, with this status, and these words stand on standard error.
#[track_caller]
fn converts(test: &str, documents: &[&str], status: i32, words: &[&str]) -> String {
    let folder = folder(test, documents);
    let said = run(&["convert", text(&folder)], "");
    assert_eq!(said.status, Some(status), "{}\n{}", said.stdout, said.stderr);
    for word in words {
        assert!(said.stderr.contains(word), "{word}\n{}", said.stderr);
    }
    let checked = run(&["convert", text(&folder), "--check"], "");
    assert_eq!((checked.status, checked.stdout.as_str(), &checked.stderr), (Some(status), "", &said.stderr));
    said.stdout
}

#[test]
fn a_folder_is_converted_with_its_proof_and_the_result_has_nothing_more_to_convert() {
    let yaml = converts("round", &[MESH, STRICT, READERS], 0, &["3 objects, proven the same at"]);
    assert!(
        yaml.contains("kind: AuthorizationPolicy") && yaml.contains("kind: PeerAuthentication"),
        "{yaml}"
    );
    let again = converts("again", &[MESH, &yaml], 0, &["there are no objects of 2018"]);
    assert_eq!(again, "");
}

#[test]
fn what_is_not_proven_is_not_written_or_says_so() {
    let refused = READERS.replace("methods: [GET]", "hosts: ['*']");
    let words = [
        "cannot be converted: ServiceRole/photo/reader: spec.rules[0]: request.host",
        "1 parts cannot be converted",
    ];
    assert_eq!(converts("refused", &[MESH, &refused], 1, &words), "");
    // A policy of the current API set the roles aside, and would join those that are written.
    let beside = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: post, namespace: photo}
spec: {rules: [{to: [{operation: {methods: [POST]}}]}]}
";
    let words = [
        "counter-example: to photo/backend-0 port 8080",
        "after allowed by AuthorizationPolicy/photo/reader-backend",
        "nothing was written",
    ];
    assert_eq!(converts("differs", &[MESH, READERS, beside], 1, &words), "");
    let template = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: t, namespace: photo}
spec: {action: DENY, rules: [{to: [{operation: {paths: ['/a/{*}']}}]}]}
";
    let yaml = converts("unproven", &[MESH, STRICT, template], 3, &["NOT PROVEN", "only tried"]);
    assert!(yaml.contains("kind: PeerAuthentication"), "{yaml}");
}

#[test]
fn a_folder_that_cannot_be_used_is_not_converted() {
    for (test, documents, words) in [
        ("yaml", vec!["a: [", ""], "mesh.yaml"),
        ("twice", vec![STRICT, STRICT], "it stands in"),
        ("head", vec!["kind: MeshPolicy\n", STRICT], "apiVersion"),
    ] {
        converts(test, &documents, 2, &[words]);
    }
    let said = run(&["convert", "/no/such/folder"], "");
    assert_eq!(said.status, Some(2), "{}", said.stderr);
    // A document that is refused denies, which no conversion does.
    converts("bad", &[&STRICT.replace("mtls", "mutual")], 1, &["MeshPolicy/default: spec.peers[0]"]);
}

const LINE: &str = r#"{"target":"access","connection":1,"direction":"inbound","path":"tunnel","source":{"address":"10.8.1.2:4000","identity":"spiffe://cluster.local/ns/photo/sa/web"},"destination":{"address":"10.8.1.3:8080","workload":"backend-0","namespace":"photo","node":"a"},"protocol":"http/1.1","method":"GET","request_path":"/albums/1","host":"backend","status":200,"verdict":"allowed"}"#;

#[test]
fn a_log_is_replayed_from_a_file_or_standard_input() {
    let folder = folder("replay", &[MESH, READERS]);
    let log = folder.join("access.log");
    let post = LINE.replace("GET", "POST");
    for (lines, status, words) in [
        (LINE.to_owned(), 0, "1 lines: 1 unchanged, 0 would be refused"),
        (
            format!("{LINE}\n{post}\n"),
            1,
            "would be refused: spiffe://cluster.local/ns/photo/sa/web to photo/backend-0 port 8080 POST /albums/1",
        ),
        (format!("{LINE}\ngarbage\n"), 2, "line 2 cannot be read"),
        (String::new(), 0, "0 lines: 0 unchanged"),
    ] {
        fs::write(&log, &lines).expect("the file can be written");
        let said = run(&["replay", text(&log), text(&folder)], "");
        assert_eq!(said.status, Some(status), "{}{}", said.stdout, said.stderr);
        assert!(said.stdout.contains(words), "{words}\n{}", said.stdout);
        let piped = run(&["replay", "-", text(&folder), "--json"], &lines);
        assert_eq!(piped.status, Some(status), "{}{}", piped.stdout, piped.stderr);
        let json: Value = serde_json::from_str(&piped.stdout).expect("it writes JSON");
        assert_eq!(json["lines"], lines.lines().count());
    }
    let missing = run(&["replay", "/no/such/log", text(&folder)], "");
    assert_eq!(missing.status, Some(2), "{}", missing.stderr);
    let nowhere = run(&["replay", text(&log), "/no/such/folder"], "");
    assert_eq!(nowhere.status, Some(2), "{}", nowhere.stderr);
}
