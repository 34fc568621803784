//! The authority over real gRPC and TLS, without privilege, on loopback. The attacker is a test case.

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use ca_proto::ca::WatchRequest;
use ca_proto::ca::node_agent_client::NodeAgentClient;
use ca_proto::convert::{CreateCertificate, Watched, certificate_pem};
use ca_proto::istio::IstioCertificateRequest;
use ca_proto::istio::istio_certificate_service_client::IstioCertificateServiceClient;
use ca_proto::join_token::{JoinToken, TokenSecret};
use ca_proto::refusal::{Reason, Refusal};
use ca_server::{StartError, StateError, ask_status, ask_token};
use rcgen::{KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};
use spiffe_id::NodeId;
use support::{
    Folder, Node, Trust, World, cart, csr, csr_pem, id, key, names, node_uri, opaque, refused, request, write,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_stream::StreamExt as _;
use tonic::codegen::http;
use tonic::{Code, Status};
use tower::ServiceExt as _;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The preface of HTTP/2 and an empty SETTINGS frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

#[tokio::test]
async fn a_node_joins_asks_for_its_workload_and_renews() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    assert_eq!(names(&node.issued.issued.chain[0]), [node_uri("node-a")]);
    assert_eq!((node.issued.issued.chain.len(), node.issued.issued.roots.len()), (2, 1));

    let workload_key = key();
    let asked = request(&cart(), &csr(&workload_key, &[&cart().to_string()]));
    let workload = world.create(&node, asked).await.expect("granted");
    assert_eq!(names(&workload.chain[0]), [cart().to_string()]);
    assert_eq!(workload.roots, node.issued.issued.roots);

    let next_key = key();
    let next = world.renew(&node, csr(&next_key, &[])).await.expect("granted");
    assert_eq!(names(&next.issued.chain[0]), [node_uri("node-a")]);
    let next = Node { key: next_key, issued: next };
    world.create(&next, request(&cart(), &csr(&key(), &[]))).await.expect("the renewed certificate serves");

    assert_eq!(world.counter("issued_total{call=\"Join\"}").await, 1);
    assert_eq!(world.counter("issued_total{call=\"Renew\"}").await, 1);
    assert_eq!(world.counter("issued_total{call=\"CreateCertificate\"}").await, 2);
}

#[tokio::test]
async fn a_certificate_has_the_profile_and_no_more() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let workload_key = key();
    let asked = CreateCertificate::request(
        &cart(),
        csr_pem(&csr(&workload_key, &[])),
        Some(Duration::from_secs(600)),
    );
    let issued = world.create(&node, asked).await.expect("granted");
    for (der, lifetime) in [(&issued.chain[0], 600), (&node.issued.issued.chain[0], 86_400)] {
        let (_, leaf) = X509Certificate::from_der(der).expect("a certificate");
        assert_eq!(leaf.subject().iter().count(), 0, "the subject is empty");
        assert!(leaf.subject_alternative_name().expect("parses").expect("present").critical);
        let usage = leaf.key_usage().expect("parses").expect("present");
        assert!(usage.critical && usage.value.flags == 1, "digitalSignature alone: {usage:?}");
        let extended = leaf.extended_key_usage().expect("parses").expect("present").value;
        assert!(extended.server_auth && extended.client_auth && extended.other.is_empty() && !extended.any);
        let constraints = leaf.basic_constraints().expect("parses").expect("present");
        assert!(constraints.critical && !constraints.value.ca);
        assert_eq!(leaf.raw_serial().len(), 16);
        let validity = leaf.validity();
        assert_eq!(validity.not_after.timestamp() - validity.not_before.timestamp(), lifetime + 120);
        assert_eq!(leaf.extensions().len(), 6, "AKI, SAN, KU, EKU, SKI, BC");
    }
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).expect("a certificate");
    let (_, issuing) = X509Certificate::from_der(&issued.chain[1]).expect("a certificate");
    let (_, root) = X509Certificate::from_der(&issued.roots[0]).expect("a certificate");
    assert_eq!(leaf.public_key().raw, rcgen::PublicKeyData::subject_public_key_info(&workload_key));
    assert_eq!(
        issuing.basic_constraints().expect("parses").expect("present").value.path_len_constraint,
        Some(0)
    );
    assert_ne!(issuing.subject(), root.subject());
    assert_eq!(names(&issued.chain[1]), ["spiffe://cluster.local"]);
    assert_eq!(names(&issued.roots[0]), ["spiffe://cluster.local"]);
}

#[tokio::test]
async fn openssl_verifies_the_chain_of_every_kind_of_key() {
    // policy E-6: the leaf first, the root last.
    let world = World::new().await;
    let node = world.joined("node-a").await;
    for kind in [&rcgen::PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
        let asked = request(&cart(), &csr(&KeyPair::generate_for(kind).expect("a key"), &[]));
        let issued = world.create(&node, asked).await.expect("granted");
        let file = |name: &str, der: &[u8]| write(&world.folder.0, name, &certificate_pem(der));
        let output = Command::new("openssl")
            .args(["verify", "-x509_strict", "-purpose", "sslclient", "-CAfile"])
            .arg(file("root.pem", &issued.roots[0]))
            .arg("-untrusted")
            .arg(file("issuing.pem", &issued.chain[1]))
            .arg(file("leaf.pem", &issued.chain[0]))
            .output()
            .expect("openssl runs");
        assert!(output.status.success(), "{output:?}");
    }
}

#[tokio::test]
async fn a_join_repeated_with_its_key_gets_the_same_answer_and_another_key_none() {
    let world = World::new().await;
    let (token, first_key) = (world.token("node-a").await, key());
    let first = world.join(&token, node_uri("node-a"), csr(&first_key, &[])).await.expect("granted");
    // A request made anew with the same key has another signature.
    let again = world.join(&token, node_uri("node-a"), csr(&first_key, &[])).await.expect("granted again");
    assert_eq!(first, again);
    assert_eq!(world.counter("join_repeated_total").await, 1);

    refused(world.join(&token, node_uri("node-a"), csr(&key(), &[])).await, Reason::TokenUsed);
    assert_eq!(world.counter("refused_total{call=\"Join\",reason=\"TOKEN_USED\"}").await, 1);

    world.advance(601);
    refused(world.join(&token, node_uri("node-a"), csr(&first_key, &[])).await, Reason::TokenExpired);
}

#[tokio::test]
async fn a_token_serves_one_node_once_and_in_its_time() {
    let world = World::new().await;
    let domain = "cluster.local".parse().expect("a trust domain");
    let made_up = TokenSecret::new([7; 32]);
    let wrong = JoinToken::new(made_up, world.handle.pin(), &NodeId::new(domain, "node-a").expect("a name"));
    opaque(world.join(&wrong, node_uri("node-a"), csr(&key(), &[])).await);
    // A stranger learns nothing of what is wrong with its request either.
    opaque(world.join(&wrong, node_uri("node-a"), vec![1, 2, 3]).await);
    opaque(world.join(&wrong, "spiffe://cluster.local/culvert/ca".into(), csr(&key(), &[])).await); // T-10

    let token = world.token("node-a").await;
    refused(world.join(&token, node_uri("node-b"), csr(&key(), &[])).await, Reason::TokenNode);
    let foreign = "spiffe://example.org/culvert/node/node-a".into();
    refused(world.join(&token, foreign, csr(&key(), &[])).await, Reason::TrustDomain);
    refused(world.join(&token, node_uri("node-a"), vec![1, 2, 3]).await, Reason::CsrMalformed);
    let other = csr(&key(), &[&node_uri("node-b")]);
    refused(world.join(&token, node_uri("node-a"), other).await, Reason::CsrNames);

    // None of these refusals used it up.
    world.join(&token, node_uri("node-a"), csr(&key(), &[])).await.expect("granted");

    let late = world.token("node-a").await;
    world.advance(601);
    refused(world.join(&late, node_uri("node-a"), csr(&key(), &[])).await, Reason::TokenExpired);
    assert_eq!(world.counter("refused_total{call=\"Join\",reason=\"TOKEN_NODE\"}").await, 1);
}

#[tokio::test]
async fn one_token_raced_by_many_keys_serves_one() {
    let world = World::new().await;
    let token = world.token("node-a").await;
    let requests: Vec<_> = (0..8).map(|_| csr(&key(), &[])).collect();
    let joins = requests.into_iter().map(|csr| world.join(&token, node_uri("node-a"), csr));
    let mut granted = 0;
    for result in futures(joins).await {
        match result {
            Ok(_) => granted += 1,
            Err(status) => _ = refused::<()>(Err(status), Reason::TokenUsed),
        }
    }
    assert_eq!(granted, 1);
}

#[tokio::test]
async fn a_token_of_another_authority_joins_neither() {
    let (own, other) = (World::new().await, World::new().await);
    let token = other.token("node-a").await;
    // Its pin does not fit, so the node never sends the secret.
    own.channel(Trust::Pin(*token.pin()), None).await.expect_err("another root");
    // And if a careless client did send it, nobody here knows it.
    let channel = own.channel(Trust::Pin(own.handle.pin()), None).await.expect("connects");
    let request = ca_proto::ca::JoinRequest {
        token: token.secret().expose().to_vec(),
        node: node_uri("node-a"),
        csr: csr(&key(), &[]),
    };
    opaque(NodeAgentClient::new(channel).join(request).await);
}

#[tokio::test]
async fn a_signing_request_that_proves_nothing_is_refused() {
    // policy E-7, G-17: whoever asks for another name, or does not hold the key, gets nothing.
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let good = csr(&key(), &[]);
    let name = cart().to_string();
    let mut bad_signature = good.clone();
    *bad_signature.last_mut().expect("bytes") ^= 1;
    let mut trailing = good.clone();
    trailing.push(0);
    let other_name = id("spiffe://cluster.local/ns/shop/sa/till").to_string();

    for (what, der, reason) in [
        ("a bad signature", bad_signature, Reason::CsrSignature),
        ("a key that is not the signer's", swapped_key(), Reason::CsrSignature),
        ("junk", vec![0x30; 900], Reason::CsrMalformed),
        ("half of one", good[..good.len() / 2].to_vec(), Reason::CsrMalformed),
        ("one with more behind it", trailing, Reason::CsrMalformed),
        ("P-256 with SHA-384", openssl_csr(&world, &["-newkey", "ec:P256", "-sha384"]), Reason::CsrAlgorithm),
        ("P-384 with SHA-256", openssl_csr(&world, &["-newkey", "ec:P384", "-sha256"]), Reason::CsrAlgorithm),
        ("P-521", openssl_csr(&world, &["-newkey", "ec:P521", "-sha512"]), Reason::CsrKey),
        ("RSA of 1024 bits", openssl_csr(&world, &["-newkey", "rsa:1024", "-sha256"]), Reason::CsrKey),
        ("RSA with SHA-1", openssl_csr(&world, &["-newkey", "rsa:2048", "-sha1"]), Reason::CsrAlgorithm),
        ("another identity", csr(&key(), &[&other_name]), Reason::CsrNames),
        ("two names", csr(&key(), &[&name, &other_name]), Reason::CsrNames),
        ("the same name twice", csr(&key(), &[&name, &name]), Reason::CsrNames),
        ("the authority's name", csr(&key(), &["spiffe://cluster.local/culvert/ca"]), Reason::CsrNames), // T-10
        (
            "a DNS name",
            openssl_csr(&world, &["-newkey", "ec:P256", "-addext", "subjectAltName=DNS:a"]),
            Reason::CsrNames,
        ),
    ] {
        let message = refused(world.create(&node, request(&cart(), &der)).await, reason);
        assert!(message.starts_with("csr"), "{what}: {message}");
    }
    let rsa = openssl_csr(
        &world,
        &["-newkey", "rsa:2048", "-sha256", "-addext", &format!("subjectAltName=URI:{name}")],
    );
    world.create(&node, request(&cart(), &rsa)).await.expect("RSA of 2048 bits is signed");
}

#[tokio::test]
async fn the_limit_of_a_message_is_exact() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    // On the wire a field of this length has four bytes more: its number, and three of its length.
    let of_length = |bytes: usize| IstioCertificateRequest {
        csr: "x".repeat(bytes - 4),
        validity_duration: 0,
        metadata: None,
    };
    refused(world.create(&node, of_length(64 * 1024)).await, Reason::CsrTooLarge);
    let status = world.create(&node, of_length(64 * 1024 + 1)).await.expect_err("a refusal");
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
}

#[tokio::test]
async fn a_header_list_above_the_limit_is_refused_and_the_connection_serves_on() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let channel =
        world.channel(node.trust(), Some((&node.key, &node.issued.issued))).await.expect("connects");
    let ask = async |bytes: usize| {
        let mut asked = tonic::Request::new(request(&cart(), &csr(&key(), &[])));
        asked.metadata_mut().insert("x-token", "t".repeat(bytes).parse().expect("ASCII"));
        IstioCertificateServiceClient::new(channel.clone()).create_certificate(asked).await
    };
    ask(15 * 1024).await.expect("a token of a cluster has room");
    let status = ask(16 * 1024).await.expect_err("refused before it is a request");
    assert_eq!(Refusal::from_status(&status), None, "{status:?}");
    ask(0).await.expect("serves on");
}

#[tokio::test]
async fn requests_above_the_streams_of_a_connection_wait_for_the_others() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let channel =
        world.channel(node.trust(), Some((&node.key, &node.issued.issued))).await.expect("connects");
    World::create_on(channel.clone(), request(&cart(), &csr(&key(), &[]))).await.expect("granted");
    // Nobody runs there under this name, which is sure after a second: each stream is busy for that long.
    let nobody = request(&id("spiffe://cluster.local/ns/shop/sa/nobody"), &csr(&key(), &[]));
    tokio::time::pause();
    let before = tokio::time::Instant::now();
    let asked = futures((0..65).map(|_| async {
        refused(World::create_on(channel.clone(), nobody.clone()).await, Reason::IdentityNotOnNode);
        before.elapsed().as_secs()
    }));
    let mut seconds = asked.await;
    seconds.sort_unstable();
    assert_eq!((seconds[0], seconds[63], seconds[64]), (1, 1, 2));
}

#[tokio::test]
async fn a_connection_that_does_not_answer_is_closed_after_its_keepalive() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let mut silent = world.bare(&node).await;
    silent.write_all(PREFACE).await.expect("sent");
    tokio::time::pause();
    let before = tokio::time::Instant::now();
    while matches!(silent.read(&mut [0; 64]).await, Ok(1..)) {}
    assert_eq!(before.elapsed().as_secs(), 30 + 20);
}

#[tokio::test]
async fn an_old_connection_is_closed_and_its_streams_have_half_a_minute() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let channel =
        world.channel(node.trust(), Some((&node.key, &node.issued.issued))).await.expect("connects");
    let stream = NodeAgentClient::new(channel).watch(tokio_stream::pending::<WatchRequest>()).await;
    let mut stream = stream.expect("watches").into_inner();
    tokio::time::pause();
    let before = tokio::time::Instant::now();
    while let Some(Ok(_)) = stream.next().await {}
    assert_eq!(before.elapsed().as_secs(), 30 * 60 + 30);
}

#[tokio::test]
async fn a_request_that_never_ends_does_not_hold_up_the_stop() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let channel =
        world.channel(node.trust(), Some((&node.key, &node.issued.issued))).await.expect("connects");
    let mut endless = Box::pin(
        channel.clone().oneshot(
            http::Request::post("http://authority/culvert.ca.v1.NodeAgent/Renew")
                .header("content-type", "application/grpc")
                .body(tonic::body::Body::new(tonic::codec::EncodeBody::new_client(
                    Never,
                    tokio_stream::pending(),
                    None,
                    None,
                )))
                .expect("a request"),
        ),
    );
    // A call that is answered behind it: the authority has begun with the endless one.
    tokio::select! {
        answered = &mut endless => panic!("{answered:?}"),
        granted = World::create_on(channel, request(&cart(), &csr(&key(), &[]))) => drop(granted.expect("granted")),
    }
    tokio::time::pause();
    let before = tokio::time::Instant::now();
    world.handle.stop().await;
    assert_eq!(before.elapsed().as_secs(), 5);
}

#[tokio::test]
async fn a_message_above_the_limit_is_refused_and_the_authority_serves_on() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let junk = |bytes: usize| IstioCertificateRequest { csr: "x".repeat(bytes), ..request(&cart(), &[0x30]) };
    refused(world.create(&node, junk(20_000)).await, Reason::CsrTooLarge);
    let status = world.create(&node, junk(1024 * 1024)).await.expect_err("a refusal");
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    assert_eq!(world.counter("refused_total{call=\"\",reason=\"MESSAGE_TOO_LARGE\"}").await, 1);
    world.create(&node, request(&cart(), &csr(&key(), &[]))).await.expect("serves on");
}

#[tokio::test]
async fn a_node_speaks_for_what_runs_on_it_and_for_nothing_else() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let stray = world.joined("node-z").await;
    let csr = csr(&key(), &[]);
    let asked = |name: &str| {
        let mut asked = request(&cart(), &csr);
        let value = prost_types::value::Kind::StringValue(name.to_owned());
        let fields = &mut asked.metadata.as_mut().expect("metadata").fields;
        fields.insert("ImpersonatedIdentity".into(), prost_types::Value { kind: Some(value) });
        asked
    };
    for (caller, name, reason) in [
        (&node, "spiffe://cluster.local/ns/shop/sa/till", Reason::IdentityNotOnNode), // T-26
        (&node, "spiffe://cluster.local/ns/till/sa/shop", Reason::IdentityNotOnNode),
        (&node, "spiffe://example.org/ns/shop/sa/cart", Reason::TrustDomain),
        (&node, "spiffe://cluster.local/culvert/ca", Reason::IdentityReserved), // T-10
        (&node, "spiffe://cluster.local/culvert/node/node-a", Reason::IdentityReserved), // T-10
        (&node, "spiffe://cluster.local/culvert/node/node-b", Reason::IdentityReserved), // T-10
        (&node, "spiffe://cluster.local/ns/shop/sa/cart/", Reason::Field),
        (&node, "cluster.local/ns/shop/sa/cart", Reason::Field),
        (&node, "", Reason::IdentityMissing),
        (&stray, "spiffe://cluster.local/ns/shop/sa/cart", Reason::NodeUnknown),
    ] {
        let message = refused(world.create(caller, asked(name)).await, reason);
        assert!(
            message.contains("ImpersonatedIdentity") || reason == Reason::NodeUnknown,
            "{name}: {message}"
        );
    }
    let without = IstioCertificateRequest { metadata: None, ..asked("") };
    refused(world.create(&node, without).await, Reason::IdentityMissing);
    assert_eq!(
        world.counter("refused_total{call=\"CreateCertificate\",reason=\"IDENTITY_RESERVED\"}").await,
        3
    );
}

#[tokio::test]
async fn only_the_certificate_of_a_node_speaks_for_a_node() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let asked = || request(&cart(), &csr(&key(), &[]));

    let anonymous = world.channel(node.trust(), None).await.expect("connects");
    opaque(World::create_on(anonymous, asked()).await);

    let workload_key = key();
    let workload = world.create(&node, request(&cart(), &csr(&workload_key, &[]))).await.expect("granted");
    let channel = world.channel(node.trust(), Some((&workload_key, &workload))).await.expect("connects");
    refused(World::create_on(channel.clone(), asked()).await, Reason::NotANode); // T-10
    let renewal = ca_proto::ca::RenewRequest { csr: csr(&key(), &[]) };
    refused(NodeAgentClient::new(channel).renew(renewal).await, Reason::NotANode);

    let elsewhere = World::new().await;
    let foreign = elsewhere.joined("node-a").await;
    let status = match world.channel(node.trust(), Some((&foreign.key, &foreign.issued.issued))).await {
        Ok(channel) => format!("{:?}", World::create_on(channel, asked()).await.expect_err("refused")),
        Err(problem) => problem,
    };
    assert!(!status.contains("PermissionDenied"), "the handshake already fails: {status}");
    assert_eq!(world.counter("handshakes_failed_total").await, 1);

    let channel =
        world.channel(node.trust(), Some((&node.key, &node.issued.issued))).await.expect("connects");
    World::create_on(channel.clone(), asked()).await.expect("granted");
    world.advance(86_400);
    opaque(World::create_on(channel, asked()).await); // expired while the connection was open
}

#[tokio::test]
async fn a_renewal_comes_with_a_new_key() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    refused(world.renew(&node, csr(&node.key, &[])).await, Reason::KeyReused);
    refused(world.renew(&node, csr(&key(), &[&node_uri("node-b")])).await, Reason::CsrNames); // T-26
    refused(world.renew(&node, vec![]).await, Reason::Field);
    world.renew(&node, csr(&key(), &[&node_uri("node-a")])).await.expect("granted");
}

#[tokio::test]
async fn lifetimes_above_the_maximum_are_cut_and_none_means_the_default() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    for (asked, seconds) in
        [(-1, 3600), (0, 3600), (60, 60), (86_400, 86_400), (86_401, 86_400), (i64::MAX, 86_400)]
    {
        let request =
            IstioCertificateRequest { validity_duration: asked, ..request(&cart(), &csr(&key(), &[])) };
        let issued = world.create(&node, request).await.expect("granted");
        let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).expect("a certificate");
        let validity = leaf.validity();
        let life = validity.not_after.timestamp() - validity.not_before.timestamp();
        assert_eq!(life, seconds + 120, "asked for {asked} s");
    }
}

#[tokio::test]
async fn a_workload_that_appears_while_its_node_asks_is_granted() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let newcomer = id("spiffe://cluster.local/ns/shop/sa/newcomer");
    let asking = world.create(&node, request(&newcomer, &csr(&key(), &[])));
    let document = "apiVersion: culvert.io/v1alpha1\nkind: Workload\nmetadata: {name: n, namespace: shop}\n\
                    spec: {serviceAccount: newcomer, node: node-a}\n";
    write(&world.folder.0.join("registry.d"), "newcomer.yaml", document);
    asking.await.expect("granted");

    // A file that does not parse changes nothing that worked, and is named.
    let bad = write(
        &world.folder.0.join("registry.d"),
        "newcomer.yaml",
        &document.replace("node: node-a", "node: ''"),
    );
    let problems = loop {
        let status = ask_status(world.handle.admin_socket()).await.expect("a status");
        let problems = status["registry"]["problems"].clone();
        if problems != serde_json::json!({}) {
            break problems;
        }
        tokio::task::yield_now().await;
    };
    let problem = problems[bad.to_str().expect("a path")].as_str().expect("a problem");
    assert!(problem.contains("document 1") && problem.contains("spec.node"), "{problem}");
    world.create(&node, request(&newcomer, &csr(&key(), &[]))).await.expect("its last good content stays");
}

#[tokio::test]
async fn watching_tells_the_bundle_at_once_and_notes_the_ack() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let channel =
        world.channel(node.trust(), Some((&node.key, &node.issued.issued))).await.expect("connects");
    let (acks, requests) = tokio::sync::mpsc::channel(4);
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut stream = NodeAgentClient::new(channel).watch(requests).await.expect("watches").into_inner();
    let first: Watched =
        stream.next().await.expect("a message").expect("no error").try_into().expect("well formed");
    let Watched::Bundle { version, roots } = first else { panic!("{first:?} is no bundle") };
    assert_eq!((version, &roots), (node.issued.bundle_version, &node.issued.issued.roots));

    // A version that nobody gave out counts as the highest one that was.
    acks.send(WatchRequest { acked_version: version + 5 }).await.expect("sent");
    loop {
        let status = ask_status(world.handle.admin_socket()).await.expect("a status");
        if status["watching"]["node-a"]["ackedBundle"] == version {
            break;
        }
        tokio::task::yield_now().await;
    }
    let anonymous = world.channel(node.trust(), None).await.expect("connects");
    let nothing = tokio_stream::empty::<WatchRequest>();
    opaque(NodeAgentClient::new(anonymous).watch(nothing).await);

    world.handle.stop().await;
    while stream.next().await.is_some() {}
}

#[tokio::test]
async fn a_fifth_stream_of_one_node_is_refused() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let channel =
        world.channel(node.trust(), Some((&node.key, &node.issued.issued))).await.expect("connects");
    let mut open = Vec::new();
    for _ in 0..4 {
        let stream =
            NodeAgentClient::new(channel.clone()).watch(tokio_stream::pending::<WatchRequest>()).await;
        open.push(stream.expect("within the limit"));
    }
    let fifth = NodeAgentClient::new(channel.clone()).watch(tokio_stream::pending::<WatchRequest>()).await;
    refused(fifth, Reason::Overloaded);
}

#[tokio::test]
async fn a_silent_stream_has_heartbeats() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let channel =
        world.channel(node.trust(), Some((&node.key, &node.issued.issued))).await.expect("connects");
    // A client that has nothing more to say still listens.
    let stream = NodeAgentClient::new(channel).watch(tokio_stream::empty::<WatchRequest>()).await;
    let mut stream = stream.expect("watches").into_inner();
    stream.next().await.expect("a message").expect("the bundle");
    tokio::time::pause();
    let before = tokio::time::Instant::now();
    let next: Watched =
        stream.next().await.expect("a message").expect("no error").try_into().expect("well formed");
    assert_eq!(next, Watched::Heartbeat { version: node.issued.bundle_version });
    assert_eq!(before.elapsed().as_secs(), ca_proto::WATCH_HEARTBEAT_SECONDS);
}

#[tokio::test]
async fn a_client_that_never_shakes_hands_is_closed_after_ten_seconds() {
    let world = World::new().await;
    tokio::time::pause();
    let before = tokio::time::Instant::now();
    let mut silent = tokio::net::TcpStream::connect(world.handle.address()).await.expect("connects");
    assert_eq!(silent.read(&mut [0; 1]).await.expect("closed in order"), 0);
    assert_eq!(before.elapsed().as_secs(), 10);
    tokio::time::resume();
    assert_eq!(world.counter("handshakes_failed_total").await, 1);
}

#[tokio::test]
async fn a_stranger_has_half_a_minute() {
    let world = World::new().await;
    let mut stranger = world.anonymous().await;
    tokio::time::pause();
    let before = tokio::time::Instant::now();
    stranger.write_all(PREFACE).await.expect("sent"); // then nothing
    while matches!(stranger.read(&mut [0; 64]).await, Ok(1..)) {}
    assert!((29..=31).contains(&before.elapsed().as_secs()), "{:?}", before.elapsed());
}

#[tokio::test]
async fn strangers_do_not_displace_nodes() {
    let world = World::new().await;
    let node = world.joined("node-a").await;
    let mut strangers = Vec::new();
    for _ in 0..256 {
        strangers.push(world.anonymous().await);
    }
    let mut refused = world.anonymous().await;
    while matches!(refused.read(&mut [0; 64]).await, Ok(1..)) {}
    assert_eq!(world.counter("strangers_limited_total").await, 1);
    world.create(&node, request(&cart(), &csr(&key(), &[]))).await.expect("a node is served");
}

#[tokio::test]
async fn the_root_survives_a_restart_and_so_do_certificates_and_tokens() {
    let world = World::new().await;
    let (pin, node, token) = (world.handle.pin(), world.joined("node-a").await, world.token("node-b").await);
    let folder = world.stop().await;
    for file in ["root.pem", "issuing.pem", "ledger.redb", "lock"] {
        let mode = std::fs::metadata(folder.state().join(file)).expect("present").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    assert_eq!(std::fs::metadata(folder.state()).expect("present").permissions().mode() & 0o777, 0o700);

    let config = folder.config();
    let world = World::start(folder, config).await.expect("starts again");
    assert_eq!(world.handle.pin(), pin);
    let issued = world.create(&node, request(&cart(), &csr(&key(), &[]))).await.expect("granted");
    assert_eq!(issued.chain[1], node.issued.issued.chain[1], "the same issuing key");
    world.join(&token, node_uri("node-b"), csr(&key(), &[])).await.expect("the token is remembered");
    let world_issued = ask_status(world.handle.admin_socket()).await.expect("a status");
    assert_eq!(world_issued["bundleVersion"], 1, "the same bundle");
}

#[tokio::test]
async fn a_root_that_is_gone_or_wrong_is_never_silently_replaced() {
    let away = |name: &'static str| {
        move |folder: &Folder| std::fs::remove_file(folder.state().join(name)).expect("removed")
    };
    let both = |folder: &Folder| {
        away("root.pem")(folder);
        away("ledger.redb")(folder);
    };
    let damaged = |folder: &Folder| {
        let path = folder.state().join("root.pem");
        let text = std::fs::read_to_string(&path).expect("readable");
        std::fs::write(&path, &text[..text.len() - 100]).expect("written");
    };
    let emptied = |folder: &Folder| std::fs::write(folder.state().join("root.pem"), "").expect("written");
    let replaced = |folder: &Folder| {
        let issuing = std::fs::read(folder.state().join("issuing.pem")).expect("readable");
        std::fs::write(folder.state().join("root.pem"), issuing).expect("written");
    };
    type Case<'a> = (&'a dyn Fn(&Folder), fn(&StateError) -> bool);
    let cases: [Case<'_>; 5] = [
        (&away("root.pem"), |error| matches!(error, StateError::RootVanished { .. })),
        (&both, |error| matches!(error, StateError::RootVanished { .. })),
        (&damaged, |error| matches!(error, StateError::RootDamaged { .. })),
        (&emptied, |error| matches!(error, StateError::RootDamaged { .. })),
        (&replaced, |error| matches!(error, StateError::RootReplaced { .. })),
    ];
    for (harm, expected) in cases {
        let world = World::new().await;
        let (old_pin, token) = (world.handle.pin(), world.token("node-a").await);
        let folder = world.stop().await;
        harm(&folder);
        let mut config = folder.config();
        let error =
            ca_server::start(config.clone(), ca_server::Clock::system()).await.expect_err("refuses to start");
        let StartError::State(state) = &error else { panic!("{error}") };
        assert!(expected(state), "{error}");
        assert!(
            error.to_string().contains("--init-new-root") && error.to_string().contains("root.pem"),
            "{error}"
        );

        config.init_new_root = true;
        let world = World::start(folder, config).await.expect("begins anew when told so");
        assert_ne!(world.handle.pin(), old_pin);
        let careless = JoinToken::new(
            TokenSecret::new(*token.secret().expose()),
            world.handle.pin(),
            &node_uri("node-a").parse().expect("a name"),
        );
        opaque(world.join(&careless, node_uri("node-a"), csr(&key(), &[])).await);
    }
}

#[tokio::test]
async fn a_state_folder_that_is_not_ours_alone_is_refused() {
    async fn start(config: ca_server::Config) -> String {
        ca_server::start(config, ca_server::Clock::system()).await.expect_err("refuses to start").to_string()
    }
    let world = World::new().await;
    let config = world.folder.config();
    let second = ca_server::Config { admin_socket: world.folder.0.join("second.sock"), ..config.clone() };
    assert!(start(second).await.contains("in use by another culvert-ca"));
    let socket = ca_server::Config { state: world.folder.0.join("second"), ..config.clone() };
    assert!(start(socket).await.contains("adminSocket"));
    let folder = world.stop().await;

    let config = folder.config();
    let message = start(ca_server::Config { init_new_root: true, ..config.clone() }).await;
    assert!(message.contains("is in order") && message.contains("without --init-new-root"), "{message}");
    let domain = ca_server::Config { trust_domain: "example.org".parse().expect("a name"), ..config.clone() };
    assert!(start(domain).await.contains("trustDomain is example.org"));
    let registry = ca_server::Config { registry: folder.0.join("nowhere"), ..config.clone() };
    assert!(start(registry).await.starts_with("registry "));
    std::fs::set_permissions(folder.state(), std::fs::Permissions::from_mode(0o755)).expect("set");
    assert!(start(config).await.contains("chmod 700"));
}

#[tokio::test]
async fn the_operators_socket_refuses_by_field() {
    let world = World::new().await;
    let socket = world.handle.admin_socket();
    assert_eq!(std::fs::metadata(socket).expect("present").permissions().mode() & 0o777, 0o600);
    for (node, seconds, expected) in [
        ("node-a", 0, "ttl is 0 s"),
        ("node-a", 3601, "ttl is 3601 s, expected 1 to 3600 s"),
        ("node/a", 60, "node is \"node/a\""),
        ("", 60, "node is \"\""),
        ("..", 60, "node is \"..\""),
    ] {
        let error =
            ask_token(socket, node, Duration::from_secs(seconds)).await.expect_err("refused").to_string();
        assert!(error.contains(expected), "{error}");
    }
    ask_token(socket, "node-a", Duration::from_secs(3600)).await.expect("the longest time");
    let nowhere = world.folder.0.join("nowhere.sock");
    let error = ask_status(&nowhere).await.expect_err("nobody there").to_string();
    assert!(error.contains("is it running"), "{error}");
}

#[tokio::test]
async fn exchanges_above_the_limit_wait_until_silent_ones_are_cut() {
    let world = World::new().await;
    let socket = world.handle.admin_socket();
    let connect = || async { tokio::net::UnixStream::connect(socket).await.expect("connects") };
    let ask = async || {
        let mut stream = connect().await;
        stream.write_all(b"{\"command\":\"status\"}\n").await.expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        assert!(answer.starts_with("{\"ok\""), "{answer}");
    };
    let mut silent = Vec::new();
    for _ in 0..7 {
        silent.push(connect().await);
    }
    tokio::time::pause();
    let before = tokio::time::Instant::now();
    ask().await;
    assert_eq!(before.elapsed().as_secs(), 0, "the eighth is answered beside seven that are silent");
    silent.push(connect().await);
    ask().await;
    assert_eq!(before.elapsed().as_secs(), 5, "the ninth waits until the silent ones are cut");
    for mut stream in silent {
        assert_eq!(stream.read(&mut [0; 1]).await.expect("closed in order"), 0);
    }
}

#[test]
fn the_program_serves_and_its_commands_answer() {
    let folder = Folder::new();
    let config = format!(
        "trustDomain: cluster.local\nlisten: 127.0.0.1:0\nstate: {0}/state\nadminSocket: {0}/ca.sock\nregistry: {0}/registry.d\n",
        folder.0.display()
    );
    let config = write(&folder.0, "ca.yaml", &config);
    let program = || Command::new(env!("CARGO_BIN_EXE_culvert-ca"));
    let mut serving = program()
        .args(["serve", "--config"])
        .arg(&config)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("the program runs");
    let log = std::io::BufReader::new(serving.stdout.take().expect("piped"));
    let lines = std::io::BufRead::lines(log).map_while(Result::ok);
    let mut seen = lines.skip_while(|line| !line.contains("serving"));
    seen.next().expect("it says that it serves");

    let run = |arguments: &[&str]| {
        let output = program().args(arguments).output().expect("the program runs");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("text")
    };
    let (socket, config) = (folder.0.join("ca.sock").display().to_string(), config.display().to_string());
    let token = run(&["token", "create", "--node", "node-a", "--ttl", "30m", "--socket", &socket]);
    assert_eq!(token.lines().count(), 1);
    let token: JoinToken = token.parse().expect("a printed token");
    let root = run(&["root", "show", "--config", &config]);
    assert!(
        root.contains(&token.pin().to_string())
            && root.contains("BEGIN CERTIFICATE")
            && !root.contains("KEY")
    );
    assert!(run(&["status", "--socket", &socket]).contains("\"trustDomain\": \"cluster.local\""));

    let refused =
        program().args(["token", "create", "--node", "a", "--ttl", "2h", "--socket", &socket]).output();
    let refused = refused.expect("the program runs");
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("ttl is 7200 s"), "{refused:?}");

    let pid = nix::unistd::Pid::from_raw(serving.id().try_into().expect("a process id"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signalled");
    let rest: Vec<_> = seen.collect();
    assert!(rest.iter().any(|line| line.contains("stopping")), "{rest:?}");
    assert!(serving.wait().expect("it ends").success());
    assert!(!folder.0.join("ca.sock").exists(), "the socket is gone");
}

/// A request whose key was exchanged after it was signed.
fn swapped_key() -> Vec<u8> {
    let (own, other) = (key(), key());
    let (mut request, own_bits) = (csr(&own, &[]), own.public_key_raw().to_vec());
    let at = request.windows(own_bits.len()).position(|window| window == own_bits).expect("the key is in it");
    request[at..at + own_bits.len()].copy_from_slice(other.public_key_raw());
    request
}

/// A request that openssl made. `ec:P256` stands for its two arguments.
fn openssl_csr(world: &World, arguments: &[&str]) -> Vec<u8> {
    let path = world.folder.0.join("made.csr");
    let mut command = Command::new("openssl");
    command.args([
        "req",
        "-new",
        "-nodes",
        "-subj",
        "/CN=ignored",
        "-outform",
        "DER",
        "-keyout",
        "/dev/null",
        "-out",
    ]);
    command.arg(&path);
    for argument in arguments {
        match argument.strip_prefix("ec:") {
            Some(curve) => {
                command.args(["ec", "-pkeyopt", &format!("ec_paramgen_curve:{}", curve.replace('P', "P-"))])
            }
            None => command.arg(argument),
        };
    }
    let output = command.output().expect("openssl runs");
    assert!(output.status.success(), "{output:?}");
    std::fs::read(path).expect("made")
}

/// Encodes the messages of a body in which none ever comes.
struct Never;

impl tonic::codec::Encoder for Never {
    type Item = ();
    type Error = Status;

    fn encode(&mut self, (): (), _: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), Status> {
        Ok(())
    }
}

/// All of them at once.
async fn futures<F: Future>(all: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut waiting: Vec<_> = all.map(Box::pin).map(Some).collect();
    let mut done = Vec::new();
    std::future::poll_fn(|context| {
        for slot in &mut waiting {
            if let Some(future) = slot
                && let std::task::Poll::Ready(output) = future.as_mut().poll(context)
            {
                done.push(output);
                *slot = None;
            }
        }
        if waiting.iter().all(Option::is_none) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    done
}
