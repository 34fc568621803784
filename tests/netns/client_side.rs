//! The client's side: what DestinationRules make of connections that leave, with servers that others wrote, and who may
//! answer for a service (policy C, D; T-18, T-20).
//!
//! On node-c, a machine without a daemon, nginx and `openssl s_server` stand for `api.example.com`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::Value;
use time::OffsetDateTime;
use world::at;
use world::expect::{field, is};
use world::foreign::Nginx;
use world::pod::{Family, Pod};
use world::process::Process;
use world::protocol::{Asked, Connect};

use crate::cases::Cases;
use crate::photo::{ECHO, GROUND, HTTP, NEEDLE, Photo};
use crate::policies::STRICT;

const FILE: &str = "client.yaml";

/// The file that tells of the host outside.
const ENTRY: &str = "entry.yaml";

const HOST: &str = "api.example.com";

/// Where its servers listen, by what is wrong with them.
const GOOD: u16 = 8443;
const OTHER_CA: u16 = 8444;
const OTHER_NAME: u16 = 8445;
const EXPIRED: u16 = 8446;
const ASKS: u16 = 8447;
const PLAINTEXT: u16 = 8448;
const OPENSSL: u16 = 8450;
const OPENSSL_ASKS: u16 = 8451;
const OPENSSL_OLD: u16 = 8452;

const PORTS: [u16; 9] =
    [GOOD, OTHER_CA, OTHER_NAME, EXPIRED, ASKS, PLAINTEXT, OPENSSL, OPENSSL_ASKS, OPENSSL_OLD];

/// What is spoken otherwise is ended within this (DESIGN 3.4.6); a second of the machine's own is allowed on top.
const CUT_TIME_MAX: Duration = Duration::from_secs(2);

/// `openssl s_server` says so when its port is open.
const OPENSSL_LISTENS: &str = "ACCEPT";

#[test]
fn client_side() {
    let edge = Edge::start();
    let mut cases = Cases::of("client side");
    outside(&edge, &mut cases);
    files(&edge, &mut cases);
    within(&edge, &mut cases);
    naming(&edge, &mut cases);
    cases.end();
}

/// The photo mesh, whose namespace `photo` was given a folder of files on node-a, and servers outside.
struct Edge {
    photo: Photo,
    folder: PathBuf,
    authority: Authority,
    _nginx: Nginx,
    _openssl: Vec<Process>,
}

impl Edge {
    #[track_caller]
    fn start() -> Self {
        let photo = Photo::prepare(&[(ENTRY, &entry())]);
        let folder = photo.world.folder().join("photo-files");
        std::fs::create_dir_all(&folder).expect("the world's folders are writable");
        let (authority, other) = (Authority::new("outside"), Authority::new("somebody else"));
        let keep = photo.world.folder().to_owned();
        authority.write(&folder, "client", &["client.example"], 1);
        std::fs::write(folder.join("ca.pem"), &authority.root).expect("written");
        std::fs::write(keep.join("ca.pem"), &authority.root).expect("written");
        let pairs = [
            (GOOD, authority.write(&keep, "good", &[HOST], 1)),
            (OTHER_CA, other.write(&keep, "other-ca", &[HOST], 1)),
            (OTHER_NAME, authority.write(&keep, "other-name", &["other.example"], 1)),
            (EXPIRED, authority.write(&keep, "expired", &[HOST], -1)),
            (ASKS, authority.write(&keep, "asks", &[HOST, "spiffe://elsewhere/api"], 1)),
        ];
        let nginx = photo.outside.nginx(&keep, &nginx_config(&pairs, &keep.join("ca.pem")));
        let (certificate, key) = &pairs[0].1;
        let openssl = [
            (OPENSSL, vec!["-tls1_3"]),
            (OPENSSL_ASKS, vec!["-tls1_3", "-Verify", "1", "-verify_return_error", "-CAfile", "ca.pem"]),
            (OPENSSL_OLD, vec!["-tls1_2"]),
        ];
        let openssl =
            openssl.map(|(port, more)| s_server(&photo.outside, &keep, (certificate, key), port, &more));
        photo.a.set(|settings| settings.more = format!("clientFiles: {{photo: {}}}\n", folder.display()));
        photo.world.start_ca();
        photo.world.start_daemons_of(&[&photo.a, &photo.b]);
        Self { photo, folder, authority, _nginx: nginx, _openssl: openssl.into() }
    }

    fn api(&self, port: u16) -> SocketAddr {
        at(self.photo.outside.v4(), port)
    }

    /// With a rule for the host, and without it afterwards.
    #[track_caller]
    fn with(&self, documents: &str, body: impl FnOnce()) {
        self.photo.apply(FILE, documents);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        self.photo.withdraw(FILE);
        if let Err(panic) = panicked {
            std::panic::resume_unwind(panic);
        }
    }

    /// The frontend asks a server of the host: its answer and the line of node-a.
    #[track_caller]
    fn served(&self, port: u16) -> (Asked, Value) {
        let watch = self.photo.a.watch();
        let asked = self.photo.frontend.ask(Connect::to(self.api(port)), &question());
        let line =
            watch.served("outbound", &[("path", "passthrough"), ("source.workload", "photo-frontend")]);
        (asked, line)
    }

    /// The frontend gets no byte from it.
    #[track_caller]
    fn refused(&self, port: u16, reason: &str) -> Value {
        let watch = self.photo.a.watch();
        let asked = self.photo.frontend.ask(Connect::to(self.api(port)), &question());
        assert_eq!(asked.text, "", "no byte: {asked:?}");
        assert!(asked.refused.is_some() || asked.end == "ECONNRESET", "reset: {asked:?}");
        let line = watch.line(&[
            ("direction", "outbound"),
            ("reason", reason),
            ("source.workload", "photo-frontend"),
        ]);
        assert!(!is(&line, "verdict", "allowed"), "{line}");
        line
    }

    /// What status says of the rule.
    #[track_caller]
    fn status(&self) -> Value {
        let status = self.photo.a.status();
        let policies = status["policies"].as_array().cloned().unwrap_or_default();
        let rule = policies.into_iter().find(|policy| policy["kind"] == "DestinationRule");
        rule.expect("the rule has a status")
    }
}

fn question() -> String {
    format!("GET / HTTP/1.1\r\nhost: {HOST}\r\nx-needle: {NEEDLE}\r\nconnection: close\r\n\r\n")
}

fn entry() -> String {
    let ports: String =
        PORTS.iter().map(|port| format!("  - {{number: {port}, name: p{port}, protocol: TLS}}\n")).collect();
    format!(
        "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: api, namespace: photo}}
spec:
  hosts: [{HOST}]
  addresses: [10.9.0.13]
  location: MESH_EXTERNAL
  ports:
{ports}"
    )
}

fn rule(host: &str, tls: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: {{name: rule, namespace: photo}}
spec: {{host: {host}, trafficPolicy: {{tls: {{{tls}}}}}}}
"
    )
}

fn api(tls: &str) -> String {
    rule(HOST, tls)
}

const SIMPLE: &str = "mode: SIMPLE, caCertificates: ca.pem";
const MUTUAL: &str =
    "mode: MUTUAL, caCertificates: ca.pem, clientCertificate: client.pem, privateKey: client.key";

fn outside(edge: &Edge, cases: &mut Cases) {
    cases.case("without a rule a host outside is relayed as the application speaks", || {
        let (asked, line) = edge.served(PLAINTEXT);
        assert!(asked.text.contains("plaintext"), "{asked:?}");
        assert!(field(&line, "tls").is_null() && field(&line, "policy").is_null(), "{line}");
    });
    cases.case(
        "SIMPLE speaks TLS to nginx by the file and the name, and nothing of it is seen on the wire",
        || {
            edge.with(&api(SIMPLE), || {
                let capture = edge.photo.world.capture(&edge.photo.a, NEEDLE);
                let (asked, line) = edge.served(GOOD);
                let seen = capture.stop();
                assert!(asked.text.contains("served NONE"), "{asked:?}");
                assert_eq!((seen.needles, seen.missed), (0, 0));
                assert!(is(&line, "tls.version", "TLSv1.3"), "{line}");
                assert!(is(&line, "policy", "DestinationRule/photo/rule"), "{line}");
                assert!(is(&line, "rule", "spec.trafficPolicy.tls: SIMPLE"), "{line}");
            });
        },
    );
    cases.case("SIMPLE speaks TLS to openssl s_server", || {
        edge.with(&api(SIMPLE), || assert!(edge.served(OPENSSL).0.text.contains("s_server"), "its own page"));
    });
    cases.case("MUTUAL shows the certificate of the file to nginx and openssl", || {
        edge.with(&api(MUTUAL), || {
            assert!(edge.served(ASKS).0.text.contains("served SUCCESS"), "nginx has verified it");
            assert!(edge.served(OPENSSL_ASKS).0.text.contains("s_server"), "openssl has verified it");
        });
    });
    cases.case("subjectAltNames take the place of the host's name", || {
        let named = |name: &str| api(&format!("{MUTUAL}, subjectAltNames: [\"{name}\"]"));
        edge.with(&named("spiffe://elsewhere/api"), || assert!(edge.served(ASKS).0.text.contains("SUCCESS")));
        edge.with(&named("spiffe://elsewhere/ap"), || drop(edge.refused(ASKS, "secure_naming")));
    });
    let other_file =
        "mode: MUTUAL, caCertificates: ca.pem, clientCertificate: stranger.pem, privateKey: stranger.key";
    Authority::new("a stranger").write(&edge.folder, "stranger", &["client.example"], 1);
    let table = [
        ("another authority's server", SIMPLE, OTHER_CA, "other_ca"),
        ("the name of somebody else", SIMPLE, OTHER_NAME, "secure_naming"),
        ("a certificate that has ended", SIMPLE, EXPIRED, "certificate_expired"),
        ("a plaintext server", SIMPLE, PLAINTEXT, "tls"),
        ("a server that asks for a certificate, and gets none", SIMPLE, OPENSSL_ASKS, "tls"),
        ("a server that asks for a certificate of its own authority", other_file, OPENSSL_ASKS, "tls"),
        ("a server of TLS 1.2", SIMPLE, OPENSSL_OLD, "tls"),
        ("the roots of the system, which do not know it", "mode: SIMPLE", GOOD, "other_ca"),
        ("mesh TLS towards a server outside", "mode: ISTIO_MUTUAL", GOOD, "secure_naming_empty"),
    ];
    for (what, tls, port, reason) in table {
        cases.case(&format!("refused: {what}"), || {
            edge.with(&api(tls), || {
                let line = edge.refused(port, reason);
                if reason != "secure_naming_empty" {
                    assert!(is(&line, "policy", "DestinationRule/photo/rule"), "{line}");
                }
            });
        });
    }
    cases.case("a port's own block takes the place of the rule's", || {
        let blocks = format!(
            "apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: rule, namespace: photo}}
spec:
  host: \"*.example.com\"
  trafficPolicy:
    tls: {{{SIMPLE}}}
    portLevelSettings: [{{port: {{number: {PLAINTEXT}}}, tls: {{mode: DISABLE}}}}]
"
        );
        edge.with(&blocks, || {
            assert!(edge.served(GOOD).0.text.contains("served NONE"));
            let (asked, line) = edge.served(PLAINTEXT);
            assert!(asked.text.contains("plaintext"), "{asked:?}");
            assert!(is(&line, "rule", "spec.trafficPolicy.portLevelSettings[8448].tls: DISABLE"), "{line}");
        });
    });
}

fn files(edge: &Edge, cases: &mut Cases) {
    let refused = [
        ("a path out of the folder", "caCertificates: ../ca.pem", "a path beneath"),
        ("a path of the node", "caCertificates: /etc/ssl/certs/ca-certificates.crt", "a path beneath"),
        ("a link out of the folder", "caCertificates: link.pem", "a path beneath"),
        ("a file that is not there", "caCertificates: missing.pem", "a file in"),
        ("a file of something else", "caCertificates: client.key", "certificates in PEM"),
    ];
    std::os::unix::fs::symlink("../ca.pem", edge.folder.join("link.pem")).expect("a link can be made");
    for (what, written, expected) in refused {
        cases.case(&format!("{what} denies the host, and status says which field (T-20)"), || {
            edge.with(&api(&format!("mode: SIMPLE, {written}")), || {
                drop(edge.refused(GOOD, "client_rule"));
                let status = edge.status();
                assert_eq!(status["accepted"], false, "{status}");
                assert_eq!(status["field"], "spec.trafficPolicy.tls.caCertificates", "{status}");
                let problem = status["problem"].as_str().unwrap_or_default();
                let value = written.split(": ").nth(1).unwrap_or_default();
                assert!(problem.contains(expected) && problem.contains(value), "{status}");
            });
        });
    }
    cases.case("a key that does not belong to the certificate denies the host (T-20)", || {
        let tls = MUTUAL.replace("client.key", "stranger.key");
        edge.with(&api(&tls), || {
            drop(edge.refused(ASKS, "client_rule"));
            assert_eq!(edge.status()["field"], "spec.trafficPolicy.tls.privateKey");
        });
    });
    cases.case("a rule of a namespace without a folder denies its host (T-20)", || {
        let of_root = api(SIMPLE).replace("namespace: photo", "namespace: istio-system");
        edge.with(&of_root, || {
            drop(edge.refused(GOOD, "client_rule"));
            let problem = edge.status()["problem"].as_str().unwrap_or_default().to_owned();
            assert!(problem.contains("clientFiles: {istio-system: <folder>}"), "{problem}");
        });
    });
    cases.case(
        "a file that appears is read, one that goes bad keeps what was, one that is mended is read anew",
        || {
            let tls = "mode: SIMPLE, caCertificates: late.pem";
            let late = edge.folder.join("late.pem");
            edge.with(&api(tls), || {
                drop(edge.refused(GOOD, "client_rule"));
                let change = |text: &str, message: &str| {
                    let watch = edge.photo.a.watch();
                    replace(&late, text);
                    watch.event(message, &[]);
                };
                change(&edge.authority.root, "files of a rule read");
                assert!(edge.served(GOOD).0.text.contains("served NONE"));
                change("no certificate", "document refused");
                assert!(edge.served(GOOD).0.text.contains("served NONE"), "the file before stays in use");
                let status = edge.status();
                assert_eq!(status["accepted"], false, "{status}");
                assert!(
                    status["effect"].as_str().unwrap_or_default().starts_with("the files before stay"),
                    "{status}"
                );
                change(&Authority::new("another").root, "files of a rule read");
                drop(edge.refused(GOOD, "other_ca"));
                change(&edge.authority.root, "files of a rule read");
                assert!(edge.served(GOOD).0.text.contains("served NONE"));
            });
        },
    );
}

fn replace(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text)
        .and_then(|()| std::fs::rename(&beside, path))
        .expect("the folder is writable");
}

/// The rule for the datastore's service, of the clients in `photo`.
fn datastore(tls: &str) -> String {
    rule("datastore.datastore.svc.cluster.local", tls)
}

fn within(edge: &Edge, cases: &mut Cases) {
    let photo = &edge.photo;
    let service = photo.service(Family::V4, 80);
    cases.case("without a rule the tunnel is spoken, and ISTIO_MUTUAL says the same", || {
        for documents in ["", &datastore("mode: ISTIO_MUTUAL")] {
            let ask = || {
                let watch = photo.a.watch();
                assert!(photo.frontend.http(service).text.contains("datastore peer="));
                watch.served("outbound", &[("path", "tunnel"), ("destination.workload", "datastore")])
            };
            if documents.is_empty() {
                assert!(field(&ask(), "policy").is_null());
            } else {
                edge.with(documents, || {
                    let line = ask();
                    assert!(is(&line, "rule", "spec.trafficPolicy.tls: ISTIO_MUTUAL"), "{line}");
                });
            }
        }
    });
    cases.case(
        "DISABLE goes out in plaintext, is served under PERMISSIVE, and is said at both ends (C)",
        || {
            edge.with(&datastore("mode: DISABLE"), || {
                let watches = [photo.a.watch(), photo.b.watch()];
                let capture = photo.world.capture(&photo.a, NEEDLE);
                let asked = photo.frontend.ask(Connect::to(service), &question());
                let seen = capture.stop();
                assert!(asked.text.contains("datastore peer="), "{asked:?}");
                assert!(seen.needles > 0, "it was in the clear");
                let line = watches[0]
                    .served("outbound", &[("path", "passthrough"), ("destination.workload", "datastore")]);
                assert!(
                    is(&line, "policy", "DestinationRule/photo/rule") && field(&line, "tls").is_null(),
                    "{line}"
                );
                let there =
                    watches[1].served("inbound", &[("path", "relay"), ("destination.workload", "datastore")]);
                assert!(field(&there, "source.identity").is_null(), "{there}");
                let warning = edge.status()["problem"].as_str().unwrap_or_default().to_owned();
                assert!(warning.contains("a receiver under STRICT refuses them"), "{warning}");
            });
        },
    );
    cases.case("DISABLE towards STRICT fails, and both ends say why (C)", || {
        edge.with(&format!("{}---\n{STRICT}", datastore("mode: DISABLE")), || {
            let watches = [photo.a.watch(), photo.b.watch()];
            let asked = photo.frontend.http(service);
            assert_eq!(asked.text, "", "{asked:?}");
            watches[1].refused("inbound", "plaintext_refused", &[("destination.workload", "datastore")]);
            let line = watches[0].line(&[("direction", "outbound"), ("reason", "server_reset")]);
            let detail = field(&line, "detail").as_str().unwrap_or_default();
            assert!(detail.contains("a receiver under STRICT refuses that"), "{line}");
            assert!(is(&line, "rule", "spec.trafficPolicy.tls: DISABLE"), "{line}");
        });
    });
    cases.case("SIMPLE towards a workload that speaks plaintext fails", || {
        edge.with(&datastore(SIMPLE), || {
            let watch = photo.a.watch();
            let echo = photo.service(Family::V4, ECHO);
            assert_eq!(photo.frontend.ask(Connect::to(echo), &question()).text, "");
            watch.line(&[
                ("direction", "outbound"),
                ("reason", "tls"),
                ("destination.workload", "datastore"),
            ]);
        });
    });
    cases.case("a rule that cannot be read denies its host and no other", || {
        edge.with(&datastore("mode: SIMPLE, insecureSkipVerify: true"), || {
            let watch = photo.a.watch();
            assert_eq!(photo.frontend.http(service).text, "");
            watch.refused("outbound", "client_rule", &[("policy", "DestinationRule/photo/rule")]);
            assert!(photo.frontend.http(at(photo.backend.v4(), 8080)).text.contains("photo-backend"));
        });
    });
    cases.case("a rule of another client's namespace means nothing here", || {
        let elsewhere = datastore("mode: DISABLE").replace("namespace: photo", "namespace: nowhere");
        edge.with(&elsewhere, || {
            let watch = photo.a.watch();
            assert!(photo.frontend.http(service).text.contains("datastore peer="));
            watch.served("outbound", &[("path", "tunnel")]);
        });
    });
    cases.case("what a rule says by now ends what is spoken otherwise within a second (T-18)", || {
        let open = || {
            let connection = photo.frontend.connect(Connect::to(photo.service(Family::V4, ECHO)));
            assert_eq!(photo.frontend.exchange(&connection, "before").as_deref(), Ok("before"));
            connection
        };
        let ends = |connection| {
            let ended = photo.frontend.drain(&connection, Duration::from_secs(10));
            assert_eq!(ended.end, "ECONNRESET", "{ended:?}");
            assert!(u128::from(ended.elapsed_ms) <= CUT_TIME_MAX.as_millis(), "{ended:?}");
        };
        let tunnelled = open();
        let mut plain = None;
        edge.with(&datastore("mode: DISABLE"), || {
            ends(tunnelled);
            plain = Some(open());
        });
        ends(plain.expect("it was opened"));
    });
}

/// Only node-a believes these documents: there the datastore runs as somebody else.
fn naming(edge: &Edge, cases: &mut Cases) {
    let photo = &edge.photo;
    let service = photo.service(Family::V4, 80);
    let accounts = "alpha.istio.io/kubernetes-serviceaccounts";
    let identities = "alpha.istio.io/canonical-serviceaccounts";
    let own = photo.datastore.identity();
    let table = [
        ("nobody else", String::new(), false),
        (
            "the account among others, with blanks (D-2, D-3, D-9)",
            format!("{accounts}: \"x , datastore\""),
            true,
        ),
        ("another account (D-5)", format!("{accounts}: \"datastores,data\""), false),
        ("the identity (D-2)", format!("{identities}: \"{own}\""), true),
        (
            "the identity without its scheme (D-2)",
            format!("{identities}: \"{}\"", own.trim_start_matches("spiffe://")),
            true,
        ),
        (
            "the same account of another namespace (D-5)",
            format!("{identities}: \"spiffe://cluster.local/ns/photo/sa/datastore\""),
            false,
        ),
        ("something that is no identity (D-5)", format!("{identities}: datastore"), false),
    ];
    for (what, annotation, is_served) in table {
        cases.case(&format!("a service whose annotations name {what}"), || {
            let annotations =
                format!("metadata: {{name: datastore, namespace: datastore, annotations: {{{annotation}}}}}");
            let ground =
                GROUND.replacen("metadata: {name: datastore, namespace: datastore}", &annotations, 1);
            assert_ne!(ground, GROUND);
            let pod = photo.datastore.document();
            let impostor = pod.replace("serviceAccount: datastore", "serviceAccount: impostor");
            assert_ne!(pod, impostor);
            let on_a = |file: &str, text: &str| {
                let watch = photo.a.watch();
                photo.a.documents().put(file, text);
                watch.event("snapshot published", &[]);
            };
            let file = photo.datastore.document_file();
            on_a(&file, &impostor);
            if !annotation.is_empty() {
                on_a("ground.yaml", &ground);
            }
            let watch = photo.a.watch();
            let asked = photo.frontend.http(service);
            if is_served {
                assert!(asked.text.contains("datastore peer="), "{asked:?}");
            } else {
                assert_eq!(asked.text, "", "{asked:?}");
                watch.refused("outbound", "secure_naming", &[]);
            }
            on_a(&file, &pod);
            if !annotation.is_empty() {
                on_a("ground.yaml", GROUND);
            }
        });
    }
    cases.case("as the documents are again, the datastore answers", || {
        assert!(photo.frontend.http(at(photo.datastore.v4(), HTTP)).text.contains("datastore peer="));
    });
}

/// An authority outside the mesh.
struct Authority {
    root: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("random bytes");
        let root = params.self_signed(&key).expect("a root can be made");
        Self { root: root.pem(), issuer: Issuer::new(params, key) }
    }

    /// Writes chain and key of somebody with these names, valid from two hours ago until so many hours from now.
    fn write(&self, folder: &Path, file: &str, names: &[&str], hours: i64) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, file);
        params.subject_alt_names = names
            .iter()
            .map(|name| {
                let text = (*name).try_into().expect("ASCII");
                if name.contains(':') { SanType::URI(text) } else { SanType::DnsName(text) }
            })
            .collect();
        params.not_before = OffsetDateTime::now_utc() - time::Duration::hours(2);
        params.not_after = OffsetDateTime::now_utc() + time::Duration::hours(hours);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("random bytes");
        let leaf = params.signed_by(&key, &self.issuer).expect("a leaf can be made");
        let (certificate_path, key_path) =
            (folder.join(format!("{file}.pem")), folder.join(format!("{file}.key")));
        std::fs::write(&certificate_path, leaf.pem()).expect("the world's folders are writable");
        std::fs::write(&key_path, key.serialize_pem()).expect("the world's folders are writable");
        (certificate_path, key_path)
    }
}

fn nginx_config(pairs: &[(u16, (PathBuf, PathBuf))], ca: &Path) -> String {
    let mut servers = format!(
        "ssl_protocols TLSv1.3;
keepalive_timeout 0;
server {{ listen {PLAINTEXT}; return 200 \"plaintext\\n\"; }}
"
    );
    for (port, (certificate, key)) in pairs {
        let verify = if *port == ASKS {
            format!("ssl_verify_client on; ssl_client_certificate {};", ca.display())
        } else {
            String::new()
        };
        servers.push_str(&format!(
            "server {{ listen {port} ssl; ssl_certificate {}; ssl_certificate_key {}; {verify} return 200 \"served $ssl_client_verify\\n\"; }}\n",
            certificate.display(),
            key.display()
        ));
    }
    servers
}

/// `openssl s_server` with its page of what was agreed upon.
#[track_caller]
fn s_server(
    pod: &Pod,
    folder: &Path,
    (certificate, key): (&Path, &Path),
    port: u16,
    more: &[&str],
) -> Process {
    let mut command = pod.command("openssl");
    command.current_dir(folder).args(["s_server", "-www", "-accept", &port.to_string()]);
    command.arg("-cert").arg(certificate).arg("-key").arg(key).args(more).stdin(Stdio::null());
    let process =
        Process::start(&format!("openssl s_server {port}"), &mut command).expect("it can be started");
    process.log().wait_from(0, "that it listens", Duration::from_secs(20), |line| {
        line.as_str().is_some_and(|line| line.contains(OPENSSL_LISTENS))
    });
    process
}
