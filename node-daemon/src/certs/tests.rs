use std::{io, sync::Arc};

use rcgen::{ExtendedKeyUsagePurpose, KeyUsagePurpose};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection, pki_types::ServerName};

use super::{
    testing::{Ca, Shape, identity, own_domain},
    verify::{
        AuthorityServer, AuthorityTrust, CLOCK_AHEAD_SECONDS_MAX, NAMES_LISTED_MAX, PeerRefused, Pin, Trust,
        some_of,
    },
};
use crate::telemetry::HandshakeRefusal;

/// Two ends of one handshake in memory, as far as it got.
struct Shaken {
    client: Result<(), rustls::Error>,
    server: Result<(), rustls::Error>,
    server_saw_certificate: bool,
    group: Option<rustls::NamedGroup>,
}

fn shake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Shaken {
    let name = ServerName::try_from("10.8.2.4").expect("an address");
    let mut client = ClientConnection::new(client, name).expect("a client");
    let mut server = ServerConnection::new(server).expect("a server");
    let (mut client_result, mut server_result) = (Ok(()), Ok(()));
    for _ in 0..8 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).expect("memory");
        }
        feed(&wire, |bytes| server.read_tls(bytes));
        server_result = server_result.and_then(|()| server.process_new_packets().map(|_| ()));
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).expect("memory");
        }
        feed(&wire, |bytes| client.read_tls(bytes));
        client_result = client_result.and_then(|()| client.process_new_packets().map(|_| ()));
    }
    Shaken {
        client: client_result,
        server: server_result,
        server_saw_certificate: server.peer_certificates().is_some(),
        group: client.negotiated_key_exchange_group().map(|group| group.name()),
    }
}

fn feed(mut wire: &[u8], mut read: impl FnMut(&mut &[u8]) -> io::Result<usize>) {
    while !wire.is_empty() && read(&mut wire).is_ok_and(|taken| taken > 0) {}
}

fn refused(result: Result<(), rustls::Error>) -> Option<PeerRefused> {
    PeerRefused::of(&io::Error::other(result.err()?))
}

const BACKEND: &str = "spiffe://cluster.local/ns/photo/sa/backend";

fn shape(change: impl FnOnce(&mut Shape)) -> Shape {
    let mut shape = Shape::good(BACKEND);
    change(&mut shape);
    shape
}

fn named(uris: &[&str]) -> Shape {
    shape(|shape| shape.uris = uris.iter().map(|uri| (*uri).to_owned()).collect())
}

/// One wrong certificate, presented by a client and by a server to a peer that is in order.
#[track_caller]
fn check(why: &str, by: &Ca, wrong: &Shape, expected: HandshakeRefusal) {
    let ours = Ca::new("ours");
    let by = if why.contains("other authority") { by } else { &ours };
    let trust = ours.trust();
    let good = Shape::good("spiffe://cluster.local/ns/photo/sa/frontend");
    let all = [identity("frontend"), identity("backend")];
    let (good_client, good_server) = ours.configs(&good, &trust, &all);
    let (wrong_client, wrong_server) = by.configs(wrong, &trust, &all);
    let as_client = refused(shake(wrong_client, good_server).server).map(|refused| refused.refusal());
    assert_eq!(as_client, Some(expected), "{why}, as a client");
    let shaken = shake(good_client, wrong_server);
    let as_server = refused(shaken.client).map(|refused| refused.refusal());
    assert_eq!(as_server, Some(expected), "{why}, as a server");
    assert!(!shaken.server_saw_certificate, "{why}: this side's certificate went out");
}

#[test]
fn a_peer_that_is_not_exactly_a_workload_of_this_mesh_is_refused_in_both_directions() {
    use HandshakeRefusal::{
        CertificateExpired, NoUriSan, NotAWorkload, OtherCa, Tls, TrustDomain, TwoUriSans,
    };
    let theirs = Ca::new("theirs");
    for (why, wrong, expected) in [
        ("of another authority (other authority)", Shape::good(BACKEND), OtherCa),
        ("without a URI name", named(&[]), NoUriSan),
        ("with two URI names", named(&[BACKEND, "spiffe://cluster.local/ns/photo/sa/frontend"]), TwoUriSans),
        ("with the same URI name twice", named(&[BACKEND, BACKEND]), TwoUriSans),
        ("of another trust domain", named(&["spiffe://other.local/ns/photo/sa/backend"]), TrustDomain),
        // T-10
        ("with a node's name", named(&["spiffe://cluster.local/culvert/node/node-a"]), NotAWorkload),
        ("with the authority's name", named(&["spiffe://cluster.local/culvert/ca"]), NotAWorkload),
        ("with a web address", named(&["https://cluster.local/ns/photo/sa/backend"]), NotAWorkload),
        ("with a name in upper case", named(&["spiffe://Cluster.local/ns/photo/sa/backend"]), NotAWorkload),
        ("with an escaped name", named(&["spiffe://cluster.local/ns/photo/sa/%62ackend"]), NotAWorkload),
        ("with a name that goes up", named(&["spiffe://cluster.local/ns/photo/sa/.."]), NotAWorkload),
        ("with a longer name", named(&["spiffe://cluster.local/ns/photo/sa/backend/x"]), NotAWorkload),
        ("that may sign others", shape(|shape| shape.is_ca = true), NotAWorkload),
        (
            "whose key may sign certificates",
            shape(|shape| shape.key_usages.push(KeyUsagePurpose::KeyCertSign)),
            NotAWorkload,
        ),
        (
            "whose key may not sign handshakes",
            shape(|shape| shape.key_usages = vec![KeyUsagePurpose::KeyEncipherment]),
            Tls,
        ),
        ("for code signing", shape(|shape| shape.usages = vec![ExtendedKeyUsagePurpose::CodeSigning]), Tls),
        ("that has ended", shape(|shape| shape.ends = -5), CertificateExpired),
        ("that begins in an hour", shape(|shape| shape.begins = 3_600 - 60), CertificateExpired),
    ] {
        check(why, &theirs, &wrong, expected);
    }
}

#[test]
fn an_ended_certificate_is_told_with_both_clocks() {
    let ours = Ca::new("ours");
    let trust = ours.trust();
    let (good, _) = ours.configs(&Shape::good(BACKEND), &trust, &[identity("backend")]);
    let (_, ended) = ours.configs(&shape(|shape| (shape.begins, shape.ends) = (-3_600, -90)), &trust, &[]);
    let Some(PeerRefused::Expired { now, not_after }) = refused(shake(good, ended).client) else {
        unreachable!("an ended certificate is refused as such");
    };
    assert!((89..=92).contains(&(now - not_after)), "now {now}, not after {not_after}");
}

#[test]
fn a_peer_whose_clock_is_a_little_ahead_is_served() {
    let ours = Ca::new("ours");
    let trust = ours.trust();
    let limit = CLOCK_AHEAD_SECONDS_MAX.cast_signed();
    let shaken = |begins| {
        let (client, server) =
            ours.configs(&shape(|shape| shape.begins = begins), &trust, &[identity("backend")]);
        shake(client, server)
    };
    let within = shaken(limit);
    assert_eq!((within.client, within.server), (Ok(()), Ok(())));
    // The clock goes on while this test runs, towards the beginning.
    let beyond = refused(shaken(limit + 60).client);
    assert!(matches!(beyond, Some(PeerRefused::NotYetValid { .. })), "{beyond:?}");
}

#[test]
fn a_server_that_may_not_run_the_service_never_sees_the_clients_certificate() {
    let ours = Ca::new("ours");
    let trust = ours.trust();
    let (_, backend) = ours.configs(&Shape::good(BACKEND), &trust, &[]);
    for (allowed, listed) in [
        (vec![identity("frontend")], "spiffe://cluster.local/ns/photo/sa/frontend"),
        (vec![], "nobody"), // D-6
    ] {
        let (client, _) = ours.configs(&Shape::good(BACKEND), &trust, &allowed);
        let shaken = shake(client, Arc::clone(&backend));
        assert_eq!(
            refused(shaken.client),
            Some(PeerRefused::NotAllowed { peer: identity("backend"), allowed: listed.to_owned() })
        );
        assert!(!shaken.server_saw_certificate);
        assert!(shaken.server.is_err(), "the server is told");
    }
}

#[test]
fn of_many_names_some_are_listed_and_the_rest_is_counted() {
    let accounts = ["a", "b", "c", "d", "e", "f"].map(identity);
    for (count, tail) in
        [(0, "nobody"), (1, "sa/a"), (4, "sa/d"), (5, "sa/d and 1 more"), (6, "sa/d and 2 more")]
    {
        let listed = some_of(&accounts[..count].iter().cloned().collect());
        assert!(listed.ends_with(tail), "{listed}");
        assert_eq!(listed.matches("spiffe://").count(), count.min(NAMES_LISTED_MAX));
    }
}

#[test]
fn both_ends_in_order_agree_on_the_post_quantum_group() {
    let ours = Ca::new("ours");
    let trust = ours.trust();
    let (client, server) = ours.configs(&Shape::good(BACKEND), &trust, &[identity("backend")]);
    let shaken = shake(client, server);
    assert_eq!((shaken.client, shaken.server), (Ok(()), Ok(())));
    assert!(shaken.server_saw_certificate);
    assert_eq!(shaken.group, Some(rustls::NamedGroup::X25519MLKEM768));
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let ours = Ca::new("ours");
    let trust = ours.trust();
    let (client, server) = ours.configs(&Shape::good(BACKEND), &trust, &[identity("backend")]);
    let mut bare = ClientConfig::clone(&client);
    bare.client_auth_cert_resolver = Arc::new(Nothing);
    let server = refused(shake(Arc::new(bare), server).server);
    assert_eq!(server, Some(PeerRefused::NoCertificate));
}

#[derive(Debug)]
struct Nothing;

impl rustls::client::ResolvesClientCert for Nothing {
    fn resolve(
        &self,
        _hints: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[test]
fn an_alias_of_the_trust_domain_is_the_mesh_and_its_roots_are_read_at_each_handshake() {
    let ours = Ca::new("ours");
    let trust = ours.trust();
    let alias = named(&["spiffe://old.local/ns/photo/sa/backend"]);
    let allowed = ["spiffe://old.local/ns/photo/sa/backend".parse().expect("a name")];
    let (client, server) = ours.configs(&alias, &trust, &allowed);
    let before = shake(Arc::clone(&client), Arc::clone(&server));
    assert!(matches!(refused(before.client), Some(PeerRefused::TrustDomain { .. })));
    trust.rcu(|trust| Trust::clone(trust).with_aliases(vec!["old.local".parse().expect("a trust domain")]));
    assert_eq!(shake(Arc::clone(&client), Arc::clone(&server)).client, Ok(()));
    trust.store(Arc::new(Trust::new(own_domain())));
    let after = shake(client, server);
    assert!(after.client.is_err(), "roots that were withdrawn count no longer");
}

/// What a node makes of an authority with this name, whose chain ends in `root` or without one.
fn authority(name: &str, root: Option<&Ca>, trust: AuthorityTrust, by: &Ca) -> Result<(), PeerRefused> {
    let (_, resolver) = by.configs(&Shape::good(name), &by.trust(), &[]);
    let resolver =
        WithRoot { inner: Arc::clone(&resolver.cert_resolver), root: root.map(|root| root.root.clone()) };
    let server = ServerConfig::builder_with_provider(super::verify::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(resolver));
    let name = spiffe_id::CaId::new(own_domain());
    let client = ClientConfig::builder_with_provider(super::verify::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AuthorityServer { name, trust }))
        .with_no_client_auth();
    match shake(Arc::new(client), Arc::new(server)).client {
        Ok(()) => Ok(()),
        Err(error) => Err(refused(Err(error)).expect("a reason")),
    }
}

#[derive(Debug)]
struct WithRoot {
    inner: Arc<dyn rustls::server::ResolvesServerCert>,
    root: Option<rustls::pki_types::CertificateDer<'static>>,
}

impl rustls::server::ResolvesServerCert for WithRoot {
    fn resolve(&self, hello: rustls::server::ClientHello<'_>) -> Option<Arc<rustls::sign::CertifiedKey>> {
        let certified = self.inner.resolve(hello)?;
        let chain = certified.cert.iter().cloned().chain(self.root.clone()).collect();
        Some(Arc::new(rustls::sign::CertifiedKey::new(chain, Arc::clone(&certified.key))))
    }
}

fn pin(root: &rustls::pki_types::CertificateDer<'_>) -> AuthorityTrust {
    use x509_parser::prelude::FromDer as _;
    let (_, root) = x509_parser::certificate::X509Certificate::from_der(root).expect("a certificate");
    let key = root.public_key().raw.to_vec();
    AuthorityTrust::Pinned(Pin(Arc::new(move |spki: &[u8]| spki == key)))
}

const CA: &str = "spiffe://cluster.local/culvert/ca";

#[test]
fn the_authority_is_its_name_and_its_root_together() {
    let (ours, theirs) = (Ca::new("ours"), Ca::new("theirs"));
    assert_eq!(authority(CA, Some(&ours), pin(&ours.root), &ours), Ok(()));
    assert_eq!(authority(CA, None, AuthorityTrust::Bundle(ours.trust()), &ours), Ok(()));
    let pinned_to_another = authority(CA, Some(&ours), pin(&theirs.root), &ours);
    assert_eq!(pinned_to_another, Err(PeerRefused::PinMismatch));
    assert_eq!(authority(CA, None, pin(&ours.root), &ours), Err(PeerRefused::PinMismatch));
    let another_root = authority(CA, Some(&ours), AuthorityTrust::Bundle(theirs.trust()), &ours);
    assert_eq!(another_root, Err(PeerRefused::OtherAuthority));
}

#[test]
fn neither_workload_nor_node_nor_another_domain_poses_as_the_authority() {
    // T-10
    let ours = Ca::new("ours");
    for name in [BACKEND, "spiffe://cluster.local/culvert/node/node-a", "spiffe://other.local/culvert/ca"] {
        for trust in [pin(&ours.root), AuthorityTrust::Bundle(ours.trust())] {
            let result = authority(name, Some(&ours), trust, &ours);
            assert!(matches!(result, Err(PeerRefused::NotTheAuthority { .. })), "{name}: {result:?}");
        }
    }
}

#[test]
fn a_root_that_is_presented_beside_the_pin_does_not_vouch_for_a_foreign_leaf() {
    // An attacker may copy the pinned root, which is public, into a chain of another authority.
    let (ours, theirs) = (Ca::new("ours"), Ca::new("theirs"));
    let posing = authority(CA, Some(&ours), pin(&ours.root), &theirs);
    assert_eq!(posing, Err(PeerRefused::OtherAuthority));
}

#[test]
fn no_key_shows_in_the_debug_output_of_what_holds_one() {
    let ours = Ca::new("ours");
    let store = ours.store(&["frontend"]);
    let credentials = store.credentials(&identity("frontend")).expect("it was issued");
    let key = super::PrivateKey::generate().expect("a key");
    let secret = key.expose_pem();
    let line = secret.lines().nth(1).expect("a body");
    let certified = key.certify(ours.chain(&key, &Shape::good(BACKEND))).expect("its own key");
    let presented = super::store::Presented(Arc::new(certified));
    for shown in [
        format!("{credentials:?}"),
        format!("{store:?}"),
        format!("{presented:?}"),
        format!("{:?}", credentials.tunnel_server()),
        format!("{:?}", credentials.client(Arc::default())),
    ] {
        assert!(!shown.contains(line) && !shown.contains("PRIVATE"), "{shown}");
        assert!(!shown.contains("serialized_der") && !shown.contains("[48, "), "{shown}");
    }
}

#[test]
fn a_certificate_for_another_identity_or_key_is_not_taken() {
    let ours = Ca::new("ours");
    let store = ours.store(&[]);
    let key = super::PrivateKey::generate().expect("a key");
    let chain = ours.chain(&key, &Shape::good(BACKEND));
    let error = store.insert(&identity("frontend"), &key, chain.clone()).expect_err("another's");
    assert!(matches!(error, super::store::UnusableCertificate::OtherIdentity { .. }), "{error}");
    let other = super::PrivateKey::generate().expect("a key");
    let error = store.insert(&identity("backend"), &other, chain).expect_err("another key");
    assert!(matches!(error, super::store::UnusableCertificate::Key(_)), "{error}");
    assert!(store.credentials(&identity("backend")).is_none());
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_a_certificate_gets_it_or_learns_at_the_deadline() {
    let ours = Ca::new("ours");
    let store = ours.store(&[]);
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    let late = store.wait(&identity("backend"), deadline).await;
    assert_eq!(late.err(), Some(super::NoCertificateInTime));
    assert_eq!(tokio::time::Instant::now(), deadline);
    let waiting = {
        let store = Arc::clone(&store);
        let deadline = deadline + std::time::Duration::from_secs(10);
        tokio::spawn(async move { store.wait(&identity("backend"), deadline).await })
    };
    tokio::task::yield_now().await;
    ours.issue(&store, "frontend");
    ours.issue(&store, "backend");
    let found = waiting.await.expect("no panic").expect("it came");
    assert_eq!((found.identity(), found.generation()), (&identity("backend"), 2));
}
