//! Who may not come, and who may not pose: each refusal with what the refused one sees, the line and the counter.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ca_proto::refusal::{Reason, Refusal};
use tonic::{Code, Status};
use world::attacker::authority::Client;
use world::attacker::credentials::{Authority, Credentials, Leaf, signing_request, signing_request_pem};
use world::attacker::impostor::Impostor;
use world::attacker::tunnel::{Attempt, Outcome};
use world::expect::{LINE_TIME_MAX, is};
use world::pod::{FAMILIES, Family, Plan};
use world::protocol::{Connect, Listen, Mode};

use crate::cases::Cases;
use crate::photo::{CLOSED, ECHO, HTTP, NEEDLE, Photo};
use crate::policies::STRICT_2018;

const TUNNEL: u16 = 15008;

#[test]
fn identity() {
    let photo = Photo::start(&[("strict.yaml", STRICT_2018)]);
    let mesh = Authority::of_mesh(&photo.world.ca().state()).expect("the CA keeps its keys in its state");
    let mut cases = Cases::of("identity");

    for family in FAMILIES {
        cases.case(&format!("a stranger is refused by a STRICT destination ({family:?})"), || {
            strict(&photo, family)
        });
    }
    wrong_certificates(&photo, &mesh, &mut cases);
    mesh_tls(&photo, &mesh, &mut cases);
    authorities(&photo, &mesh, &mut cases);
    impostors(&photo, &mesh, &mut cases);
    cases.case("a stranger's headers say nothing about a source (T-9)", || forwarded(&photo, &mesh));
    cases.case("two replicas of one account share no tunnel (T-9)", || replicas(&photo));
    cases.case("a workload's certificate does not pose as the CA (T-10)", || false_authority(&photo, &mesh));
    cases.case("no key and no token is told to anybody", || secrets(&photo));
    cases.case("a daemon does not join a CA that its token does not pin", || false_pin(&photo));
    cases.end();
}

/// Needs no daemon.
#[test]
fn authority() {
    let photo = Photo::prepare(&[]);
    photo.world.start_ca();
    let mesh = Authority::of_mesh(&photo.world.ca().state()).expect("the CA keeps its keys in its state");
    let mut cases = Cases::of("authority");
    issuing(&photo, &mesh, &mut cases);
    joining(&photo, &mut cases);
    cases.end();
}

fn strict(photo: &Photo, family: Family) {
    let Photo { stranger, frontend, datastore, .. } = photo;
    let watch = photo.b.watch();
    let before = datastore.accepted(photo.listeners.http).len();
    let asked = stranger.http(datastore.at(family, HTTP));
    assert_eq!(asked.text, "", "no byte from the server");
    assert!(asked.end == "ECONNRESET" || asked.end == "eof", "{asked:?}");
    watch.refused(
        "inbound",
        "plaintext_refused",
        &[("verdict", "denied"), ("destination.workload", "datastore")],
    );
    assert_eq!(datastore.accepted(photo.listeners.http).len(), before, "the application never saw it");
    let served = frontend.http(datastore.at(family, HTTP));
    assert!(served.text.contains("datastore peer="), "an enrolled client is served: {served:?}");
}

fn frontend_of(photo: &Photo) -> String {
    photo.frontend.identity()
}

/// Dials the tunnel of the datastore from a pod that nobody enrolled.
fn attempt<'a>(photo: &Photo, credentials: Option<&'a Credentials>) -> Attempt<'a> {
    let datastore = &photo.datastore;
    Attempt::new(datastore.at(Family::V4, TUNNEL), credentials, &datastore.at(Family::V4, ECHO).to_string())
}

fn wrong_certificates(photo: &Photo, mesh: &Authority, cases: &mut Cases) {
    let name = frontend_of(photo);
    let other = "spiffe://elsewhere.example/ns/photo/sa/photo-frontend";
    let stranger = Authority::stranger();
    let table: Vec<(&str, Credentials, &str)> = vec![
        ("of another CA", stranger.issue(&Leaf::of(&[&name])), "other_ca"),
        ("without a URI name", mesh.issue(&Leaf::of(&[]).dns("photo-frontend")), "no_uri_san"),
        ("with two URI names", mesh.issue(&Leaf::of(&[&name, &photo.backend.identity()])), "two_uri_sans"),
        ("of another trust domain", mesh.issue(&Leaf::of(&[other])), "trust_domain"),
        ("that ran out", mesh.issue(&Leaf::of(&[&name]).expired()), "certificate_expired"),
        // T-10
        (
            "of a node",
            mesh.issue(&Leaf::of(&["spiffe://cluster.local/culvert/node/node-a"])),
            "not_a_workload",
        ),
        ("of the CA itself", mesh.issue(&Leaf::of(&["spiffe://cluster.local/culvert/ca"])), "not_a_workload"),
        (
            "with a name of no known form",
            mesh.issue(&Leaf::of(&["spiffe://cluster.local/x"])),
            "not_a_workload",
        ),
    ];
    for (what, credentials, reason) in &table {
        cases.case(&format!("a client's certificate {what} is refused"), || {
            refused_tunnel(photo, Some(credentials), reason);
        });
    }
    cases.case("a client without a certificate is refused", || refused_tunnel(photo, None, "no_certificate"));
    cases.case("what is no TLS at all is refused", || {
        let watch = photo.b.watch();
        let asked = photo.stranger.ask(Connect::to(photo.datastore.at(Family::V4, TUNNEL)), NEEDLE);
        assert!(!asked.text.contains(NEEDLE), "{asked:?}");
        watch.refused("inbound", "tls", &[]);
    });
    cases.case("a certificate that is right is not refused", || {
        let credentials = mesh.issue(&Leaf::of(&[&name]));
        let outcome = attempt(photo, Some(&credentials)).run(photo.stranger.namespace());
        assert_eq!(outcome, Outcome::Through("ping".to_owned()), "or the refusals above prove nothing");
    });
}

fn refused_tunnel(photo: &Photo, credentials: Option<&Credentials>, reason: &str) {
    let watch = photo.b.watch();
    let before = photo.datastore.accepted(photo.listeners.echo).len();
    let outcome = attempt(photo, credentials).run(photo.stranger.namespace());
    assert!(matches!(outcome, Outcome::Closed(_)), "the handshake is ended: {outcome:?}");
    watch.refused("inbound", reason, &[]);
    assert_eq!(photo.datastore.accepted(photo.listeners.echo).len(), before, "the application never saw it");
}

/// A-6, the row STRICT: TLS on the workload's own port, as a sidecar speaks it.
fn mesh_tls(photo: &Photo, mesh: &Authority, cases: &mut Cases) {
    let name = frontend_of(photo);
    let (right, foreign) =
        (mesh.issue(&Leaf::of(&[&name])), Authority::stranger().issue(&Leaf::of(&[&name])));
    let two = mesh.issue(&Leaf::of(&[&name, &photo.backend.identity()]));
    let dial = |credentials, family| {
        let mut attempt = Attempt::new(photo.datastore.at(family, ECHO), credentials, "");
        attempt.alpn = b"istio";
        attempt.run_plainly(photo.stranger.namespace())
    };
    let table = [
        ("without a certificate", None, "no_certificate"),
        ("with a certificate of another CA", Some(&foreign), "other_ca"),
        ("with two URI names", Some(&two), "two_uri_sans"),
    ];
    for (what, credentials, reason) in table {
        cases.case(&format!("mesh TLS on the workload's port {what} is refused (A-6)"), || {
            for family in FAMILIES {
                let watch = photo.b.watch();
                let before = photo.datastore.accepted(photo.listeners.echo).len();
                let outcome = dial(credentials, family);
                assert!(matches!(outcome, Outcome::Closed(_)), "{outcome:?}");
                watch.refused("inbound", reason, &[]);
                assert_eq!(photo.datastore.accepted(photo.listeners.echo).len(), before);
            }
        });
    }
    cases.case("mesh TLS on the workload's port with a certificate that is right is served (A-6)", || {
        for family in FAMILIES {
            let watch = photo.b.watch();
            assert_eq!(dial(Some(&right), family), Outcome::Through("ping".to_owned()));
            watch.served("inbound", &[("path", "relay"), ("source.identity", &name)]);
        }
    });
    cases.case("other TLS on the workload's port is plaintext, and refused (A-6)", || {
        let mut attempt = Attempt::new(photo.datastore.at(Family::V4, ECHO), Some(&right), "");
        attempt.alpn = b"http/1.1";
        let watch = photo.b.watch();
        let outcome = attempt.run_plainly(photo.stranger.namespace());
        assert!(matches!(outcome, Outcome::Closed(_)), "{outcome:?}");
        watch.refused("inbound", "plaintext_refused", &[]);
    });
}

/// T-8: the tunnel leads to the workload in whose namespace it arrived, and nowhere else.
fn authorities(photo: &Photo, mesh: &Authority, cases: &mut Cases) {
    let credentials = mesh.issue(&Leaf::of(&[&frontend_of(photo)]));
    let own = |port| photo.datastore.at(Family::V4, port).to_string();
    let table = [
        ("its loopback", "127.0.0.1:9100".to_owned(), 400, "bad_authority"),
        ("its loopback in the other family", "[::1]:9100".to_owned(), 400, "bad_authority"),
        ("any address", format!("0.0.0.0:{ECHO}"), 400, "bad_authority"),
        ("a cloud's metadata", "169.254.169.254:80".to_owned(), 400, "bad_authority"),
        ("another workload", photo.backend.at(Family::V4, 8080).to_string(), 400, "bad_authority"),
        ("the node", format!("{}:15020", photo.b.v4()), 400, "bad_authority"),
        ("a name", format!("datastore.datastore:{ECHO}"), 400, "bad_authority"),
        ("the tunnel itself", own(TUNNEL), 400, "bad_authority"),
        ("a closed port", own(CLOSED), 503, "nothing_listening"),
        ("a loopback-only port at its own address", own(9100), 503, "nothing_listening"),
    ];
    for (what, authority, status, reason) in table {
        cases.case(&format!("a tunnel to {what} is answered {status} (T-8)"), || {
            let watch = photo.b.watch();
            let mut attempt = attempt(photo, Some(&credentials));
            attempt.authority = authority;
            assert_eq!(attempt.run(photo.stranger.namespace()), Outcome::Status(status));
            watch.refused("inbound", reason, &[("source.identity", &frontend_of(photo))]);
        });
    }
}

/// T-9: the server's view of the client is the tunnel's own source address.
fn forwarded(photo: &Photo, mesh: &Authority) {
    let credentials = mesh.issue(&Leaf::of(&[&frontend_of(photo)]));
    let before = photo.datastore.accepted(photo.listeners.echo).len();
    let mut attempt = attempt(photo, Some(&credentials));
    attempt.headers = vec![("forwarded", "for=10.8.1.2"), ("x-forwarded-for", "10.8.1.2")];
    assert_eq!(attempt.run(photo.stranger.namespace()), Outcome::Through("ping".to_owned()));
    let accepted = photo.datastore.wait_accepted(photo.listeners.echo, before, 1, false);
    assert_eq!(accepted[0].peer.ip().to_canonical(), photo.stranger.ip(Family::V4));
}

fn replicas(photo: &Photo) {
    let replica = photo.world.pod(&photo.a, Plan::new("photo", "photo-frontend-1").account("photo-frontend"));
    photo.a.log().wait_from(0, "photo-frontend-1 is enrolled", LINE_TIME_MAX, |line| {
        is(line, "message", "workload enrolled") && line.to_string().contains("photo-frontend-1")
    });
    let capture = photo.world.capture(&photo.a, NEEDLE);
    for client in [&photo.frontend, &replica] {
        let before = photo.datastore.accepted(photo.listeners.echo).len();
        let connection = client.connect(Connect::to(photo.datastore.at(Family::V4, ECHO)));
        assert_eq!(client.exchange(&connection, NEEDLE).as_deref(), Ok(NEEDLE));
        let accepted = photo.datastore.wait_accepted(photo.listeners.echo, before, 1, false);
        assert_eq!(accepted[0].peer.ip().to_canonical(), client.ip(Family::V4));
        client.close(&connection);
    }
    let seen = capture.stop();
    for client in [&photo.frontend, &replica] {
        let own =
            seen.flows.keys().any(|(from, to)| from.ip() == client.ip(Family::V4) && to.port() == TUNNEL);
        assert!(own, "a tunnel from {}'s own address: {:?}", client.name(), seen.flows);
    }
    seen.assert_no_plaintext();
}

/// Secure naming and the other faults of a server: the client's daemon ends the handshake and sends nothing.
fn impostors(photo: &Photo, mesh: &Authority, cases: &mut Cases) {
    let victim = "spiffe://cluster.local/ns/datastore/sa/datastore";
    let stranger = Authority::stranger();
    let table: Vec<(&str, Credentials, &str)> = vec![
        (
            "of the right CA, for an identity that may not run the service",
            mesh.issue(&Leaf::of(&[&frontend_of(photo)])),
            "secure_naming",
        ),
        ("of another CA", stranger.issue(&Leaf::of(&[victim])), "other_ca"),
        ("with two URI names", mesh.issue(&Leaf::of(&[victim, &frontend_of(photo)])), "two_uri_sans"),
        ("without a URI name", mesh.issue(&Leaf::of(&[]).dns("datastore")), "no_uri_san"),
        (
            "of another trust domain",
            mesh.issue(&Leaf::of(&["spiffe://elsewhere.example/ns/datastore/sa/datastore"])),
            "trust_domain",
        ),
        (
            "of the node",
            mesh.issue(&Leaf::of(&["spiffe://cluster.local/culvert/node/node-a"])),
            "not_a_workload",
        ),
    ];
    // A pod that the documents place on a node whose daemon the attacker holds.
    let place = photo.world.pod(&photo.b, Plan::new("datastore", "replica").account("datastore").outside());
    let document = place.document_of("node-d", "networkNamespace: /run/netns/nowhere");
    photo.apply(&place.document_file(), &document);
    for (what, credentials, reason) in &table {
        cases.case(&format!("a server's certificate {what} is refused"), || {
            for family in FAMILIES {
                let impostor = Impostor::start(place.namespace(), place.at(family, TUNNEL), credentials);
                let watch = photo.a.watch();
                let mut connect = Connect::to(place.at(family, ECHO));
                connect.timeout_ms = 30_000;
                let asked = photo.frontend.ask(connect, NEEDLE);
                assert_eq!(asked.text, "");
                assert!(asked.refused.is_some() || asked.end == "ECONNRESET", "{asked:?}");
                watch.refused("outbound", reason, &[("source.workload", "photo-frontend")]);
                assert!(impostor.dialled() > 0, "the impostor was there to be believed");
                assert_eq!(impostor.requests(), 0, "nothing was asked of the impostor");
            }
        });
    }
    cases.case("a server of the right identity is believed", || {
        let credentials = mesh.issue(&Leaf::of(&[victim]));
        let impostor = Impostor::start(place.namespace(), place.at(Family::V4, TUNNEL), &credentials);
        let _ = photo.frontend.ask(Connect::to(place.at(Family::V4, ECHO)), NEEDLE);
        assert!(impostor.requests() > 0, "or the refusals above prove nothing");
    });
    photo.withdraw(&place.document_file());
}

/// T-10: a daemon that finds somebody else in the CA's place tells him nothing.
fn false_authority(photo: &Photo, mesh: &Authority) {
    let at: SocketAddr = "10.9.0.1:15112".parse().expect("an address");
    let true_address = photo.world.ca().address();
    for name in [frontend_of(photo), "spiffe://cluster.local/culvert/node/node-a".to_owned()] {
        let impostor = Impostor::start(photo.world.wire(), at, &mesh.issue(&Leaf::of(&[&name])));
        photo.a.terminate();
        photo.a.set(|settings| settings.ca = at);
        photo.a.launch();
        photo.a.log().wait_from(0, "the authority is refused", LINE_TIME_MAX, |line| {
            is(line, "message", "authority failed")
        });
        assert!(impostor.dialled() > 0, "the impostor was there to be believed");
        assert_eq!(impostor.requests(), 0, "nothing was asked of {name}");
        photo.a.kill();
    }
    photo.a.set(|settings| settings.ca = true_address);
    photo.a.start();
}

/// The registry decides what a node gets; T-26 in part.
fn issuing(photo: &Photo, mesh: &Authority, cases: &mut Cases) {
    let node_a = mesh.issue(&Leaf::of(&["spiffe://cluster.local/culvert/node/node-a"]));
    let workload = mesh.issue(&Leaf::of(&[&frontend_of(photo)]));
    let foreign = Authority::stranger().issue(&Leaf::of(&["spiffe://cluster.local/culvert/node/node-a"]));
    let client = |credentials| Client {
        inside: photo.world.wire(),
        authority: photo.world.ca().address(),
        credentials,
    };
    let own = frontend_of(photo);
    let pem = |uris: &[&str]| signing_request_pem(&signing_request(uris));
    let mut broken = signing_request(&[&own]);
    let last = broken.len() - 1;
    broken[last] ^= 1;
    let table: Vec<(&str, Option<&Credentials>, &str, String, Expected)> = vec![
        (
            "an identity that does not run on the node",
            Some(&node_a),
            "spiffe://cluster.local/ns/datastore/sa/datastore",
            pem(&[]),
            Expected::Told(Reason::IdentityNotOnNode),
        ),
        (
            "an identity of another trust domain",
            Some(&node_a),
            "spiffe://elsewhere.example/ns/photo/sa/photo-frontend",
            pem(&[]),
            Expected::Told(Reason::TrustDomain),
        ),
        (
            "the CA's own name",
            Some(&node_a),
            "spiffe://cluster.local/culvert/ca",
            pem(&[]),
            Expected::Told(Reason::IdentityReserved),
        ),
        (
            "a node's name",
            Some(&node_a),
            "spiffe://cluster.local/culvert/node/node-a",
            pem(&[]),
            Expected::Told(Reason::IdentityReserved),
        ),
        ("no identity", Some(&node_a), "", pem(&[]), Expected::Told(Reason::IdentityMissing)),
        (
            "another name in the request",
            Some(&node_a),
            &own,
            pem(&[&photo.backend.identity()]),
            Expected::Told(Reason::CsrNames),
        ),
        (
            "a request with a bad signature",
            Some(&node_a),
            &own,
            signing_request_pem(&broken),
            Expected::Told(Reason::CsrSignature),
        ),
        (
            "a P-256 key signed with SHA-384",
            Some(&node_a),
            &own,
            odd_request("prime256v1", "sha384"),
            Expected::Told(Reason::CsrAlgorithm),
        ),
        (
            "a P-384 key signed with SHA-256",
            Some(&node_a),
            &own,
            odd_request("secp384r1", "sha256"),
            Expected::Told(Reason::CsrAlgorithm),
        ),
        ("1 MiB of junk", Some(&node_a), &own, "x".repeat(1024 * 1024), Expected::Refused),
        ("junk below every limit", Some(&node_a), &own, "x".repeat(8 * 1024), Expected::Refused),
        ("a workload's certificate to ask with", Some(&workload), &own, pem(&[]), Expected::Refused),
        ("a node's certificate of another CA", Some(&foreign), &own, pem(&[]), Expected::Refused),
        ("no certificate at all", None, &own, pem(&[]), Expected::Refused),
    ];
    for (what, credentials, identity, csr, expected) in table {
        cases.case(&format!("the CA issues nothing for {what}"), || {
            let told = Told::until_now(photo);
            let answer = client(credentials).create(identity, csr);
            expected.check(answer.map(|issued| issued.cert_chain.len()));
            match expected {
                Expected::Told(reason) => told.expect(photo, reason),
                Expected::Refused => told.expect_any(photo),
            }
        });
    }
    cases.case("the CA issues for an identity that runs on the node", || {
        let issued =
            client(Some(&node_a)).create(&own, pem(&[&own])).expect("or the refusals above prove nothing");
        assert!(issued.cert_chain.len() >= 2, "a chain and its root");
    });
}

enum Expected {
    /// With a reason that a program can read.
    Told(Reason),
    /// In whatever words: the caller proved nothing, or did not even speak the protocol.
    Refused,
}

impl Expected {
    #[track_caller]
    fn check<T: std::fmt::Debug>(&self, answer: Result<T, Status>) {
        let status = answer.expect_err("it must be refused");
        match self {
            Self::Told(reason) => {
                let told = Refusal::from_status(&status).map(|refusal| refusal.reason);
                assert_eq!(told, Some(*reason), "{status:?}");
            }
            Self::Refused => assert_ne!(status.code(), Code::DeadlineExceeded, "a refusal, not silence"),
        }
    }
}

/// What the authority has said and counted until now.
struct Told {
    said: usize,
    refusals: BTreeMap<String, u64>,
}

impl Told {
    fn until_now(photo: &Photo) -> Self {
        let ca = photo.world.ca();
        Self { said: ca.log().position(), refusals: ca.refusals() }
    }

    /// One refusal with this reason since: a line and a count.
    #[track_caller]
    fn expect(&self, photo: &Photo, reason: Reason) {
        let ca = photo.world.ca();
        ca.log().wait_from(self.said, reason.code(), LINE_TIME_MAX, |line| {
            let line = line.to_string();
            line.contains("request refused") && line.contains(reason.code())
        });
        let label = format!("reason=\"{reason}\"");
        let count = |counters: &BTreeMap<String, u64>| -> u64 {
            counters.iter().filter(|(name, _)| name.contains(&label)).map(|(_, count)| count).sum()
        };
        let now = ca.refusals();
        assert_eq!(count(&now), count(&self.refusals) + 1, "{label}: {now:?}");
    }

    /// Some refusal since: a count.
    #[track_caller]
    fn expect_any(&self, photo: &Photo) {
        let total = |counters: &BTreeMap<String, u64>| counters.values().sum::<u64>();
        let now = photo.world.ca().refusals();
        assert!(total(&now) > total(&self.refusals), "nothing was counted: {now:?}");
    }
}

/// A signing request whose hash does not go with its curve, as openssl makes them on request.
fn odd_request(curve: &str, hash: &str) -> String {
    let done = std::process::Command::new("openssl")
        .args([
            "req",
            "-new",
            "-nodes",
            "-subj",
            "/CN=odd",
            "-newkey",
            "ec",
            "-keyout",
            "/dev/null",
            "-pkeyopt",
        ])
        .arg(format!("ec_paramgen_curve:{curve}"))
        .arg(format!("-{hash}"))
        .output()
        .expect("openssl runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).expect("PEM is ASCII")
}

fn joining(photo: &Photo, cases: &mut Cases) {
    let ca = photo.world.ca();
    let client = Client { inside: photo.world.wire(), authority: ca.address(), credentials: None };
    let name = "spiffe://cluster.local/culvert/node/node-e";
    let csr = || signing_request(&[]);
    let secret = |lifetime: &str| -> Vec<u8> {
        let token = ca.token("node-e", lifetime).expect("the CA mints tokens");
        let token: ca_proto::join_token::JoinToken = token.parse().expect("what it mints it can read");
        token.secret().expose().to_vec()
    };
    cases.case("a token joins its node once, and again only with the same key", || {
        let token = secret("1h");
        let first = csr();
        let joined = client.join(&token, name, first.clone()).expect("a fresh token joins");
        let again = client.join(&token, name, first).expect("a crash burns nothing");
        assert_eq!(joined, again, "the same answer");
        let told = Told::until_now(photo);
        client.join(&token, name, csr()).expect_err("a used token joins nobody else");
        told.expect(photo, Reason::TokenUsed);
    });
    cases.case("a token joins no other node", || {
        let other = "spiffe://cluster.local/culvert/node/node-a";
        let token = secret("1h");
        let told = Told::until_now(photo);
        client.join(&token, other, csr()).expect_err("it was made for node-e");
        told.expect(photo, Reason::TokenNode);
    });
    cases.case("an expired token joins nobody", || {
        let token = secret("1s");
        // The clock of the CA is the only event there is: asked until the token's second is over.
        let first = csr();
        let started = std::time::Instant::now();
        while client.join(&token, name, first.clone()).is_ok() {
            assert!(started.elapsed().as_secs() < 20, "a token of one second is good for longer");
        }
        let told = Told::until_now(photo);
        client.join(&token, name, first).expect_err("it stays so");
        told.expect(photo, Reason::TokenExpired);
    });
    cases.case("a token of another CA joins nobody", || {
        let told = Told::until_now(photo);
        let status = client.join(&[7; 32], name, csr()).expect_err("nobody minted it");
        told.expect(photo, Reason::Stranger);
        assert_eq!(Refusal::from_status(&status), None, "a stranger is not told why");
        client.join(&[7; 5], name, csr()).expect_err("nor this");
    });
}

/// Whatever a program says or shows, and whoever may read its files.
fn secrets(photo: &Photo) {
    let ca = photo.world.ca();
    let mut told: Vec<(String, String)> =
        vec![("the CA's log".to_owned(), format!("{:?}", ca.log().since(0)))];
    for node in [&photo.a, &photo.b] {
        told.push((format!("the log of {}", node.name()), format!("{:?}", node.log().since(0))));
        told.push((format!("the status of {}", node.name()), node.status().to_string()));
        told.push((format!("the dump of {}", node.name()), node.dump()));
    }
    let mut secrets = Vec::new();
    for folder in [ca.state(), photo.a.root().join("var/lib/culvert"), photo.b.root().join("var/lib/culvert")]
    {
        secrets.extend(keys_below(&folder));
    }
    assert!(secrets.len() >= 4, "root, issuing key and two nodes' keys are on disk: {}", secrets.len());
    for node in [&photo.a, &photo.b] {
        let token = std::fs::read_to_string(node.root().join("etc/culvert/join-token"));
        secrets.extend(token.iter().map(|token| token.trim().to_owned()));
    }
    for (what, text) in &told {
        assert!(!text.contains("PRIVATE KEY"), "{what} shows a key");
        for secret in &secrets {
            assert!(!text.contains(secret.as_str()), "{what} shows a secret");
        }
    }
}

/// First lines of the keys' bodies; asserts that nobody but root may read them.
fn keys_below(folder: &std::path::Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("the folder is there").flatten() {
        let (path, metadata) = (entry.path(), entry.metadata().expect("it is there"));
        if metadata.is_dir() {
            found.extend(keys_below(&path));
            continue;
        }
        let text = String::from_utf8_lossy(&std::fs::read(&path).expect("root may read")).into_owned();
        let mut lines = text.lines();
        if lines.any(|line| line.contains("PRIVATE KEY")) {
            assert_eq!(metadata.mode() & 0o077, 0, "{} is open to others", path.display());
            found.push(lines.next().expect("a key has a body").to_owned());
        }
    }
    found
}

fn false_pin(photo: &Photo) {
    let stranger = Authority::stranger().issue(&Leaf::of(&["spiffe://cluster.local/culvert/ca"]));
    let at: SocketAddr = "10.9.0.1:15212".parse().expect("an address");
    let impostor = Impostor::start(photo.world.wire(), at, &stranger);
    let node = photo.world.node("node-e");
    photo.world.give_token(&node);
    node.set(|settings| settings.ca = at);
    node.launch();
    node.log().wait_from(0, "the authority is refused", LINE_TIME_MAX, |line| {
        is(line, "message", "authority failed")
    });
    assert!(impostor.dialled() > 0, "the impostor was there to be believed");
    assert_eq!(impostor.requests(), 0, "the token was not shown to it");
    assert_eq!(node.readiness(), Some(503));
    node.kill();
}

#[test]
fn an_impostor_with_a_careless_client_is_believed() {
    let world = world::World::new();
    let (a, b) = (world.node("node-a"), world.node("node-b"));
    let client = world.pod(&a, Plan::new("photo", "client").outside());
    let server = world.pod(&b, Plan::new("photo", "server").outside());
    server.listen(Listen::at("127.0.0.1:9100".parse().expect("an address"), Mode::Echo));
    let credentials = Authority::stranger().issue(&Leaf::of(&["spiffe://cluster.local/ns/photo/sa/server"]));
    let impostor = Impostor::start(server.namespace(), server.at(Family::V6, TUNNEL), &credentials);
    let attempt = Attempt::new(server.at(Family::V6, TUNNEL), Some(&credentials), "[fd00::1]:80");
    let _ = attempt.run(client.namespace());
    assert_eq!((impostor.dialled(), impostor.requests()), (1, 1));
}
