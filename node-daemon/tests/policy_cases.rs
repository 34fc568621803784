//! `culvert policy test` as operators run it: the built command, on files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// What the command said.
struct Said {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

fn run(arguments: &[&str]) -> Said {
    let output = Command::new(env!("CARGO_BIN_EXE_culvert"))
        .args(["policy", "test"])
        .args(arguments)
        .output()
        .expect("the command was built");
    Said {
        status: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("it writes UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("it writes UTF-8"),
    }
}

/// An empty folder for one test.
fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("policy-cases").join(test);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("the folder can be made");
    folder
}

fn write(folder: &Path, name: &str, text: impl AsRef<[u8]>) -> String {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().expect("it is in a folder")).expect("its folder can be made");
    fs::write(&path, text).expect("the file can be written");
    path.to_str().expect("it is UTF-8").to_owned()
}

const STRICT: &str = "apiVersion: authentication.istio.io/v1alpha1
kind: MeshPolicy
metadata: {name: default}
spec: {peers: [{mtls: {}}]}
";

/// One grant for the frontend, to read.
const READERS: &str = "apiVersion: rbac.istio.io/v1alpha1
kind: ClusterRbacConfig
metadata: {name: default}
spec: {mode: ON}
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRole
metadata: {name: reader, namespace: photo}
spec: {rules: [{services: ['*'], methods: [GET]}]}
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRoleBinding
metadata: {name: readers, namespace: photo}
spec:
  subjects: [{user: cluster.local/ns/photo/sa/frontend}]
  roleRef: {kind: ServiceRole, name: reader}
";

/// A case of one `method`, whose policies are `policies`.
fn case(name: &str, policies: &str, method: &str, expect: &str) -> String {
    format!(
        "- name: {name}
  policies: [{policies}]
  request:
    protocol: http
    source.principal: cluster.local/ns/photo/sa/frontend
    source.namespace: photo
    destination.service: backend.photo.svc.cluster.local
    destination.namespace: photo
    destination.port: 8080
    request.method: {method}
    request.path: /
  expect: {expect}
"
    )
}

fn file(cases: &[String]) -> String {
    format!("version: 1\ncases:\n{}", cases.concat())
}

#[test]
fn the_cases_of_this_project_hold() {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/policy");
    let mut files: Vec<String> = fs::read_dir(cases)
        .expect("the folder is there")
        .map(|entry| entry.expect("an entry").path().to_str().expect("UTF-8").to_owned())
        .collect();
    files.sort();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    assert!(!files.is_empty());
    let said = run(&files);
    assert_eq!(said.status, Some(0), "{}{}", said.stdout, said.stderr);
    assert!(said.stdout.ends_with(" passed, 0 failed\n"), "{}", said.stdout);
    assert_eq!(said.stdout.lines().count(), 1, "{}", said.stdout);
}

#[test]
fn all_hold_is_0_and_one_that_falls_short_is_1_with_its_line() {
    let folder = folder("status");
    write(&folder, "policies/readers.yaml", READERS);
    let good = case("reads", "policies", "GET", "{verdict: ALLOW, http_status: 200}");
    let bad = case("writes", "policies/readers.yaml", "POST", "{verdict: ALLOW}");
    let holds = write(&folder, "holds.yaml", file(std::slice::from_ref(&good)));
    let short = write(&folder, "short.yaml", file(&[good, bad]));

    let said = run(&[&holds]);
    assert_eq!((said.status, &*said.stdout, &*said.stderr), (Some(0), "1 passed, 0 failed\n", ""));

    let said = run(&[&short]);
    assert_eq!(said.status, Some(1));
    let lines: Vec<&str> = said.stdout.lines().collect();
    assert_eq!((lines.len(), lines[1]), (2, "1 passed, 1 failed"), "{}", said.stdout);
    for word in [
        "writes: ",
        "expected \"ALLOW\"",
        "got \"DENY\"",
        "photo/reader",
        "request.method is POST, wanted GET",
    ] {
        assert!(lines[0].contains(word), "{word}: {}", lines[0]);
    }

    let said = run(&[&holds, &short]);
    assert_eq!(said.status, Some(1));
    assert!(said.stdout.ends_with("\n2 passed, 1 failed\n"), "{}", said.stdout);
}

#[test]
fn json_is_one_document_over_all_files_with_what_was_got_for_cases_that_pass_too() {
    let folder = folder("json");
    write(&folder, "readers.yaml", READERS);
    let one = write(&folder, "one.yaml", file(&[case("reads", "readers.yaml", "GET", "{verdict: ALLOW}")]));
    let two =
        write(&folder, "two.yaml", file(&[case("writes", "readers.yaml", "PUT", "{http_status: 200}")]));
    let said = run(&[&one, &two, "--output", "json"]);
    assert_eq!(said.status, Some(1));
    let document: Value = serde_json::from_str(&said.stdout).expect("it is one JSON document");
    assert_eq!((&document["passed"], &document["failed"]), (&1.into(), &1.into()));
    let cases = document["cases"].as_array().expect("a list");
    let [reads, writes] = &cases[..] else { panic!("{cases:?}") };
    assert_eq!((&reads["name"], &reads["pass"]), (&"reads".into(), &true.into()));
    assert_eq!((&reads["got"]["verdict"], &reads["got"]["http_status"]), (&"ALLOW".into(), &200.into()));
    assert_eq!((&writes["name"], &writes["pass"]), (&"writes".into(), &false.into()));
    assert_eq!(writes["got"]["http_status"], 403);
    assert_eq!(writes["got"]["body"], "RBAC: access denied");
    for case in cases {
        let keys: Vec<&String> = case.as_object().expect("a mapping").keys().collect();
        assert_eq!(keys, ["got", "name", "pass", "policy", "reason", "rule"]);
    }
    assert!(reads["policy"].as_str().is_some_and(|policy| policy.contains("photo/reader")), "{reads}");
}

#[test]
fn only_picks_cases_by_their_whole_name() {
    let folder = folder("only");
    write(&folder, "readers.yaml", READERS);
    let names = ["get one", "get two", "put one", "[x]"];
    let cases = names.map(|name| case(&format!("'{name}'"), "readers.yaml", "GET", "{verdict: ALLOW}"));
    let path = write(&folder, "cases.yaml", file(&cases));
    for (glob, count) in [
        ("get*", 2),
        ("get", 0),
        ("* one", 2),
        ("?et t?o", 1),
        ("*", 4),
        ("[gp]?t one", 2),
        ("[[]x]", 1),
        ("GET*", 0),
        ("", 0),
    ] {
        let said = run(&[&path, "--only", glob]);
        assert_eq!(said.status, Some(0), "{glob}: {}", said.stderr);
        assert_eq!(said.stdout, format!("{count} passed, 0 failed\n"), "{glob}");
        assert_eq!(said.stderr.contains("no case"), count == 0, "{glob}: {}", said.stderr);
    }
    assert_eq!(run(&[&path, "--only", "[a"]).status, Some(2));
}

#[test]
fn a_set_wins_over_an_equal_path_and_words_of_yaml_stay_words() {
    let folder = folder("sets");
    // By this file nobody may do anything.
    write(&folder, "same", "apiVersion: v1\nkind: Nothing\nmetadata: {name: x}\n");
    let set = READERS.lines().map(|line| format!("    {line}\n")).collect::<String>();
    let allowed = case("reads", "same", "GET", "{verdict: ALLOW}");
    let denied = case("writes", "same", "POST", "{verdict: DENY}");
    let text = format!("version: 1\npolicySets:\n  same: |\n{set}cases:\n{allowed}{denied}");
    let path = write(&folder, "cases.yaml", text);
    let said = run(&[&path]);
    assert_eq!((said.status, &*said.stdout), (Some(0), "2 passed, 0 failed\n"), "{}", said.stderr);
}

#[test]
fn tokens_are_real_ones() {
    // policy A-12
    let policy = "apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {name: default, namespace: photo}
spec:
  origins: [{jwt: {issuer: 'https://id.test', jwksUri: 'https://id.test/keys', audiences: [albums]}}]
  principalBinding: USE_ORIGIN
";
    let token = |name: &str, token: &str, more: &str, verdict: &str| {
        format!(
            "- name: {name}
  check: authenticate
  policies: [tokens.yaml]
  request:
    protocol: http
    connection.tls: plaintext
    destination.service: backend.photo.svc.cluster.local
    destination.namespace: photo
    destination.service_port: 80
    request.method: GET
    request.path: /
    jwt: [{{{token}}}]
{more}  expect: {{verdict: {verdict}}}
"
        )
    };
    let good = "iss: 'https://id.test', sub: ann, aud: albums";
    let mut cases = Vec::new();
    for algorithm in ["RS256", "RS384", "RS512", "ES256", "ES384"] {
        let written = format!("{good}, alg: {algorithm}");
        cases.push(token(&format!("good {algorithm}"), &written, "", "ALLOW"));
        for (name, more) in [
            ("no kid", "    jwks.no_kid: true\n"),
            ("no alg", "    jwks.no_alg: true\n"),
            ("neither", "    jwks.no_kid: true\n    jwks.no_alg: true\n"),
        ] {
            cases.push(token(&format!("{name} {algorithm}"), &written, more, "ALLOW"));
        }
        let written = format!("{written}, signature: bad");
        cases.push(token(&format!("bad {algorithm}"), &written, "", "UNAUTHENTICATED"));
    }
    for (name, written) in [
        ("no signature", format!("{good}, alg: none")),
        ("shared secret", format!("{good}, alg: HS256")),
        ("expired", format!("{good}, exp: past")),
        ("not yet", format!("{good}, nbf: future")),
        ("no subject", "iss: 'https://id.test', aud: albums".to_owned()),
        ("another audience", "iss: 'https://id.test', sub: ann, aud: [billing]".to_owned()),
        ("another issuer", "iss: 'https://other.test', sub: ann, aud: albums".to_owned()),
        ("another key", format!("{good}, kid: not-there")),
        ("no token", "raw: x.y.z".to_owned()),
        ("two parts", "raw: e30.e30".to_owned()),
    ] {
        let verdict = if name == "no subject" { "ALLOW" } else { "UNAUTHENTICATED" };
        cases.push(token(name, &written, "", verdict));
    }
    for (name, more) in [("fails", "    jwks.fetch: fails\n"), ("garbage", "    jwks.fetch: garbage\n")] {
        cases.push(token(name, good, more, "UNAUTHENTICATED"));
    }
    for (name, written) in
        [("never expires", format!("{good}, exp: null")), ("begun", format!("{good}, nbf: past"))]
    {
        cases.push(token(name, &written, "", "ALLOW"));
    }
    let folder = folder("tokens");
    write(&folder, "tokens.yaml", policy);
    let path = write(&folder, "cases.yaml", file(&cases));
    let said = run(&[&path]);
    assert_eq!(said.status, Some(0), "{}{}", said.stdout, said.stderr);
}

#[test]
fn a_file_that_cannot_be_used_is_named_with_line_and_field() {
    let folder = folder("unusable");
    write(&folder, "strict.yaml", STRICT);
    write(&folder, "broken/one.yaml", STRICT);
    write(&folder, "broken/two.yaml", "a: [");
    write(&folder, "broken.yaml", "a: b\nc: [");
    let good = case("reads", "strict.yaml", "GET", "{verdict: ALLOW}");
    let with = |from: &str, to: &str| {
        let text = file(std::slice::from_ref(&good));
        assert!(text.contains(from), "{from}");
        text.replacen(from, to, 1)
    };
    for (name, text, words) in [
        ("empty", String::new(), &["empty", "version"][..]),
        ("no-yaml", "version: 1\ncases: [".to_owned(), &["line 2"]),
        ("key-twice", "version: 1\nversion: 1\ncases: []\n".to_owned(), &["line 2", "version"]),
        ("two-documents", "version: 1\n---\nversion: 1\n".to_owned(), &["2 YAML documents"]),
        ("a-list", "- version: 1\n".to_owned(), &[": the file: ", "a mapping"]),
        ("no-version", "cases: []\n".to_owned(), &["version"]),
        ("version-2", with("version: 1", "version: 2"), &[":1: version"]),
        ("no-cases", "version: 1\n".to_owned(), &["cases"]),
        ("unknown-key", with("version: 1", "version: 1\nverdict: 1"), &[":2: verdict"]),
        ("mode", with("version: 1", "version: 1\ndefaultMode: LOOSE"), &[":2: defaultMode", "PERMISSIVE"]),
        (
            "check",
            with("  policies:", "  check: authorise\n  policies:"),
            &[":4: cases[0].check", "authorize"],
        ),
        ("request-key", with("request.method", "request.verb"), &["cases[0].request.request.verb"]),
        ("protocol", with("protocol: http", "protocol: smtp"), &[":6: cases[0].request.protocol", "smtp"]),
        ("port", with("8080", "80800"), &["cases[0].request.destination.port", "80800"]),
        ("expect-key", with("{verdict: ALLOW}", "{answer: DENY}"), &["cases[0].expect.answer"]),
        ("no-expect", with("{verdict: ALLOW}", "{}"), &["cases[0].expect"]),
        ("no-name", with("name: reads", "name: ''"), &[":3: cases[0].name"]),
        ("no-policy", with("strict.yaml", "absent"), &["cases[0].policies[0]", "absent", "no such file"]),
        (
            "bad-policy",
            with("strict.yaml", "broken.yaml"),
            &["cases[0].policies[0]", "broken.yaml", "line 2"],
        ),
        ("bad-folder", with("strict.yaml", "broken"), &["cases[0].policies[0]", "broken/two.yaml"]),
        (
            "bad-set",
            with("version: 1", "version: 1\npolicySets: {strict.yaml: 'a: ['}"),
            &[":2: policySets.strict.yaml"],
        ),
        ("set-no-text", with("version: 1", "version: 1\npolicySets: {s: {a: b}}"), &[":2: policySets.s"]),
        ("long", "#".repeat(16 * 1024 * 1024 + 1), &["more than 16777216 bytes"]),
    ] {
        let path = write(&folder, &format!("{name}.yaml"), text);
        refused(&path, words);
    }
    refused(&write(&folder, "latin.yaml", b"name: \xe9"), &["UTF-8"]);
    refused(folder.to_str().expect("UTF-8"), &["folder"]);
    refused(folder.join("nowhere.yaml").to_str().expect("UTF-8"), &["no such file"]);
    let at_limit = write(&folder, "at-limit.yaml", {
        let text = file(std::slice::from_ref(&good));
        let rest = 16 * 1024 * 1024 - text.len();
        text + &"#".repeat(rest)
    });
    assert_eq!(run(&[&at_limit]).status, Some(0));
}

#[track_caller]
fn refused(path: &str, words: &[&str]) {
    let said = run(&[path]);
    assert_eq!(said.status, Some(2), "{path}: {}", said.stderr);
    // Of a file whose only case cannot be used.
    let counted =
        said.stdout.ends_with("\n0 passed, 1 failed\n") && said.stdout.contains("it cannot be run: ");
    assert!(said.stdout.is_empty() || counted, "{path}: {}", said.stdout);
    let lines: Vec<&str> = said.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{path}: {}", said.stderr);
    for word in [path].iter().chain(words) {
        assert!(lines[0].contains(word), "{path}: {word}: {}", lines[0]);
    }
}

#[test]
fn beside_a_file_that_cannot_be_used_the_others_are_run_and_the_status_is_2() {
    let folder = folder("beside");
    write(&folder, "readers.yaml", READERS);
    let good = write(&folder, "good.yaml", file(&[case("reads", "readers.yaml", "GET", "{verdict: ALLOW}")]));
    let short =
        write(&folder, "short.yaml", file(&[case("puts", "readers.yaml", "PUT", "{verdict: ALLOW}")]));
    let bad = write(&folder, "bad.yaml", "version: 3\n");
    let said = run(&[&good, &bad, &short]);
    assert_eq!(said.status, Some(2));
    assert!(said.stdout.ends_with("1 passed, 1 failed\n"), "{}", said.stdout);
    assert!(said.stderr.contains("bad.yaml:1: version"), "{}", said.stderr);
    let one_bad = write(&folder, "one-bad.yaml", {
        let good = case("reads", "readers.yaml", "GET", "{verdict: ALLOW}");
        let bad = good.replace("protocol: http", "protocol: smtp").replace("reads", "mails");
        file(&[good.clone(), bad, good.replace("reads", "again")])
    });
    let said = run(&[&one_bad]);
    assert_eq!(said.status, Some(2));
    assert!(said.stdout.starts_with("mails: it cannot be run: cases[1].request.protocol"), "{}", said.stdout);
    assert!(said.stdout.ends_with("\n2 passed, 1 failed\n"), "{}", said.stdout);
    assert!(said.stderr.contains("one-bad.yaml:18: cases[1].request.protocol"), "{}", said.stderr);
    let said = run(&[&one_bad, "--only", "reads"]);
    assert_eq!((said.status, &*said.stdout), (Some(0), "1 passed, 0 failed\n"), "{}", said.stderr);
    let said = run(&[&one_bad, "--output", "json"]);
    let document: Value = serde_json::from_str(&said.stdout).expect("it is one JSON document");
    assert_eq!((said.status, &document["passed"], &document["failed"]), (Some(2), &2.into(), &1.into()));
    assert_eq!(document["cases"][1]["pass"], false);
    assert_eq!(run(&[]).status, Some(2));
    assert_eq!(run(&[&good, "--output", "xml"]).status, Some(2));
}
