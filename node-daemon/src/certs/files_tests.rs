//! Files that rules name: which are opened, what is made of them, and what a bad change does (T-20).

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use node_core::store::{Store, Update};
use serde_json::{Value, json};

use super::{
    super::testing::{Outside, Span},
    *,
};

const NAMESPACE: &str = "photo";

/// A folder of the operator's with a root, a client's chain and key; beside it what nobody may name.
struct Ground {
    top: PathBuf,
    authority: Outside,
    files: Arc<ClientFiles>,
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.top);
    }
}

impl Ground {
    fn new(name: &str) -> Self {
        let top = std::env::temp_dir().join(format!("culvert-files-{name}-{}", std::process::id()));
        fs::create_dir_all(top.join("photo/deep")).expect("a folder");
        let authority = Outside::new("outside");
        let files = ClientFiles::new([(NAMESPACE.to_owned(), top.join("photo"))].into(), Sink::new());
        let ground = Self { top, authority, files };
        ground.put("ca.pem", &ground.authority.root_pem);
        ground.put_pair(&Span::good());
        fs::write(ground.top.join("secret.pem"), &ground.authority.root_pem).expect("written");
        ground
    }

    fn put(&self, name: &str, text: &str) {
        // As a rename, so that nobody reads half of it.
        let beside = self.top.join("beside");
        fs::write(&beside, text).expect("written");
        fs::rename(&beside, self.folder().join(name)).expect("moved");
    }

    fn put_pair(&self, span: &Span) {
        let (chain, key) = self.authority.leaf(&["client.example"], span);
        self.put("client.pem", &chain);
        self.put("key.pem", &key);
    }

    fn folder(&self) -> PathBuf {
        self.top.join("photo")
    }

    fn open(&self, path: &str) -> Result<(), FileFault> {
        let named = NamedFiles {
            namespace: NAMESPACE.into(),
            ca_certificates: Some(path.to_owned()),
            client_certificate: None,
            private_key: None,
        };
        self.files.read(&named).map(|_| ())
    }
}

fn named(namespace: &str, ca: &str, certificate: Option<&str>, key: Option<&str>) -> NamedFiles {
    NamedFiles {
        namespace: namespace.into(),
        ca_certificates: Some(ca.to_owned()),
        client_certificate: certificate.map(str::to_owned),
        private_key: key.map(str::to_owned),
    }
}

#[test]
fn only_what_lies_beneath_the_folder_is_opened() {
    let ground = Ground::new("beneath");
    let folder = ground.folder();
    let at = |path: &str| folder.join(path).display().to_string();
    symlink("ca.pem", folder.join("inside")).expect("a link");
    symlink(ground.top.join("secret.pem"), folder.join("absolute")).expect("a link");
    symlink("../secret.pem", folder.join("relative")).expect("a link");
    symlink("..", folder.join("up")).expect("a link");
    symlink("/proc/self/root", folder.join("magic")).expect("a link");
    nix::unistd::mkfifo(&folder.join("pipe"), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let big = "x".repeat(usize::try_from(FILE_BYTES_MAX).expect("it fits") + 1);
    fs::write(folder.join("big"), big).expect("written");
    for good in ["ca.pem", "./ca.pem", "deep/../ca.pem", "inside", &at("ca.pem"), &at("deep/../inside")] {
        assert_eq!(ground.open(good), Ok(()), "{good}");
    }
    let refused = [
        ("../secret.pem", "a path beneath"),
        ("deep/../../secret.pem", "a path beneath"),
        ("/etc/ssl/certs/ca-certificates.crt", "a path beneath"),
        (&at("../secret.pem"), "a path beneath"),
        (&format!("{}x/ca.pem", folder.display()), "a path beneath"),
        ("absolute", "a path beneath"),
        ("relative", "a path beneath"),
        ("up/secret.pem", "a path beneath"),
        ("magic/etc/hostname", "a path beneath"),
        ("/proc/self/root", "a path beneath"),
        ("missing.pem", "a file in"),
        ("ca.pem/x", "a file that can be opened"),
        ("deep", "a regular file"),
        ("pipe", "a regular file"),
        (".", "a regular file"),
        ("big", "at most"),
    ];
    for (path, expected) in refused {
        let fault = ground.open(path).expect_err(path);
        assert!(fault.expected.contains(expected), "{path}: {fault}");
        assert_eq!((fault.field, fault.value.as_str()), ("caCertificates", path)); // T-20
    }
}

#[test]
fn a_namespace_without_a_folder_may_name_nothing() {
    let ground = Ground::new("nobody");
    let path = ground.folder().join("ca.pem").display().to_string();
    for namespace in ["datastore", "", "Photo", "photo/.."] {
        let refused = ground.files.read(&named(namespace, &path, None, None));
        let fault = refused.map(|_| ()).expect_err("another's folder");
        assert!(fault.remedy.contains("clientFiles"), "{fault}");
    }
}

#[test]
fn what_is_no_pair_of_key_and_certificate_is_refused_by_field() {
    let ground = Ground::new("pairs");
    let other = ground.authority.leaf(&["other.example"], &Span::good());
    let (ended, ended_key) = ground.authority.leaf(&["client.example"], &Span::ended());
    ground.put("other.key", &other.1);
    ground.put("ended.pem", &ended);
    ground.put("ended.key", &ended_key);
    ground.put("words", "no certificate\n");
    ground.put("empty", "");
    ground.put("torn", &ground.authority.root_pem[..200]);
    ground.put("nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let read = |ca: &str, certificate: Option<&str>, key: Option<&str>| {
        ground.files.read(&named(NAMESPACE, ca, certificate, key)).map(|_| ()).map_err(|fault| fault.field)
    };
    assert_eq!(read("ca.pem", Some("client.pem"), Some("key.pem")), Ok(()));
    for ca in ["words", "empty", "torn", "nonsense", "key.pem"] {
        assert_eq!(read(ca, None, None), Err("caCertificates"), "{ca}");
    }
    for (certificate, key, field) in [
        ("client.pem", "other.key", "privateKey"),
        ("client.pem", "words", "privateKey"),
        ("client.pem", "client.pem", "privateKey"),
        ("client.pem", "missing", "privateKey"),
        ("words", "key.pem", "clientCertificate"),
        ("key.pem", "key.pem", "clientCertificate"),
        ("nonsense", "key.pem", "clientCertificate"),
        ("missing", "key.pem", "clientCertificate"),
        ("ended.pem", "ended.key", "clientCertificate"),
    ] {
        assert_eq!(read("ca.pem", Some(certificate), Some(key)), Err(field), "{certificate} {key}");
    }
}

fn snapshot(tls: &Value) -> Arc<Snapshot> {
    let mut store = Store::new("node-a", "cluster.local".parse().expect("a trust domain"));
    let rule = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "outside", "namespace": NAMESPACE},
        "spec": {"host": "api.example.com", "trafficPolicy": {"tls": tls}},
    });
    assert_eq!(store.apply(Update::replace("a.yaml", vec![rule])), []);
    store.snapshot()
}

#[test]
fn a_bad_change_keeps_what_was_and_is_said() {
    let ground = Ground::new("changes");
    let tls = json!({"mode": "MUTUAL", "caCertificates": "ca.pem", "clientCertificate": "client.pem", "privateKey": "key.pem"});
    let snapshot = snapshot(&tls);
    let rule = ObjectName::new(NAMESPACE, "outside");
    let set = named(NAMESPACE, "ca.pem", Some("client.pem"), Some("key.pem"));
    let used = || {
        ground.files.refresh(&snapshot);
        let known = ground.files.lock().get(&set).cloned().expect("it is named");
        (known.used, ground.files.faults(&snapshot).remove(&rule))
    };
    let (Some(first), None) = used() else { panic!("the files are good") };
    let (Some(again), None) = used() else { panic!("nothing changed") };
    assert!(Arc::ptr_eq(&first, &again), "unchanged files are not read again");
    type Break<'g> = Box<dyn Fn() + 'g>;
    let bad: [(&str, Break<'_>); 3] = [
        ("spec.trafficPolicy.tls.caCertificates", Box::new(|| ground.put("ca.pem", "words"))),
        (
            "spec.trafficPolicy.tls.clientCertificate",
            Box::new(|| fs::remove_file(ground.folder().join("client.pem")).expect("it was there")),
        ),
        (
            "spec.trafficPolicy.tls.privateKey",
            Box::new(|| {
                ground.put_pair(&Span::good());
                let (_, other) = ground.authority.leaf(&["other"], &Span::good());
                ground.put("key.pem", &other);
            }),
        ),
    ];
    for (field, break_it) in bad {
        ground.put("ca.pem", &ground.authority.root_pem);
        break_it();
        let (Some(kept), Some(fault)) = used() else { panic!("{field}: kept, and said") };
        assert!(Arc::ptr_eq(&first, &kept), "{field}");
        assert_eq!((fault.field.as_str(), fault.keeps_older), (field, true));
    }
    ground.put_pair(&Span::good());
    let (Some(newer), None) = used() else { panic!("mended") };
    assert!(!Arc::ptr_eq(&first, &newer));
    // What no rule names is forgotten.
    ground.files.refresh(&self::snapshot(&json!({"mode": "SIMPLE"})));
    assert!(ground.files.lock().is_empty());
}

#[test]
fn what_never_was_good_is_a_fault_without_an_older_version() {
    let ground = Ground::new("never");
    let snapshot = snapshot(&json!({"mode": "SIMPLE", "caCertificates": "../secret.pem"}));
    ground.files.refresh(&snapshot);
    let faults = ground.files.faults(&snapshot);
    let fault = &faults[&ObjectName::new(NAMESPACE, "outside")];
    assert_eq!((fault.field.as_str(), fault.keeps_older), ("spec.trafficPolicy.tls.caCertificates", false));
    assert!(
        fault.fault.to_string().contains("found \"../secret.pem\", expected a path beneath"),
        "{}",
        fault.fault
    );
}

#[tokio::test]
async fn files_that_nobody_looked_at_yet_are_read_when_they_are_asked_for() {
    let ground = Ground::new("asked");
    let good = ground.files.material(Some(&named(NAMESPACE, "ca.pem", None, None))).await;
    assert!(good.is_ok_and(|material| material.shown.is_none()));
    let fault = ground.files.material(Some(&named(NAMESPACE, "x.pem", None, None))).await.map(|_| ());
    assert_eq!(fault.map_err(|fault| fault.value), Err("x.pem".to_owned()));
}

#[test]
fn beyond_the_limit_rules_are_refused() {
    let ground = Ground::new("limit");
    for number in 0..SETS_MAX {
        let mut set = named(NAMESPACE, "ca.pem", None, None);
        set.private_key = Some(number.to_string());
        let known = Known { seen: Vec::new(), used: None, fault: None };
        ground.files.lock().insert(set, known);
    }
    let known = ground.files.look_at(&named(NAMESPACE, "ca.pem", None, None));
    assert!(known.used.is_none());
    assert!(known.fault.is_some_and(|fault| fault.expected.contains("at most 1024")));
    assert!(Path::new(&ground.folder()).exists());
}
