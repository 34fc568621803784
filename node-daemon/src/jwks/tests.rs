use std::time::Duration;

use node_core::policy::tokens::{Algorithm, KeySource, Signatures as _, TokenFault, decode_base64url};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{
    KeysConfig, Missed, REFRESH_SECONDS, SOURCES_MAX, Store, UNUSED_SECONDS_MAX, WAIT_SECONDS_MAX,
    fetch::ANSWER_BYTES_MAX,
    testing::{Mode, Server, Signer, key_set},
};
use crate::telemetry::Sink;

fn store(config: KeysConfig) -> std::sync::Arc<Store> {
    Store::start(config, Sink::new()).expect("no file of roots is given")
}

/// Loopback and plain http are listed, as tests need them.
fn listed() -> KeysConfig {
    KeysConfig { allow: vec!["127.0.0.0/8".parse().expect("a range")], http: true, ..KeysConfig::default() }
}

fn at(url: String) -> KeySource {
    KeySource::Address(url.into())
}

/// What becomes of a token, once keys were waited for.
async fn verified(store: &Store, source: &KeySource, token: &str, kid: &str) -> Result<(), TokenFault> {
    store.ready(std::iter::once(source)).await;
    let once = || {
        let (signed, signature) = token.rsplit_once('.').expect("a token");
        let signature = decode_base64url(signature).expect("a token");
        let verifier = store.signatures();
        let verified = verifier.verify(source, Algorithm::Es256, Some(kid), signed.as_bytes(), &signature);
        (verified, verifier.missed())
    };
    let (verified, missed) = once();
    if missed.is_empty() || !store.refresh(missed).await {
        return verified;
    }
    once().0
}

#[tokio::test]
async fn keys_are_fetched_once_and_kept() {
    let signer = Signer::new("a");
    let token = signer.token(&json!({"iss": "x"}));
    let server = Server::start(Mode::Text(key_set(&[&signer]))).await;
    let (store, source) = (store(listed()), at(server.url("/keys")));
    for _ in 0..5 {
        assert_eq!(verified(&store, &source, &token, "a").await, Ok(()));
    }
    assert_eq!(server.asked(), 1);
    let other = Signer::new("a").token(&json!({"iss": "x"}));
    assert_eq!(verified(&store, &source, &other, "a").await, Err(TokenFault::Signature));
    assert_eq!(verified(&store, &source, &format!("e{}", &token[1..]), "a").await, Ok(()));
    assert_eq!(
        verified(&store, &source, &format!("f{}", &token[1..]), "a").await,
        Err(TokenFault::Signature)
    );
}

#[tokio::test]
async fn an_inline_set_needs_no_server_and_an_unreadable_one_has_no_key() {
    let signer = Signer::new("a");
    let token = signer.token(&json!({}));
    let store = store(KeysConfig::default());
    let inline = KeySource::Inline(key_set(&[&signer]).into());
    assert_eq!(verified(&store, &inline, &token, "a").await, Ok(()));
    assert_eq!(verified(&store, &inline, &token, "b").await, Err(TokenFault::NoKey));
    let garbage = KeySource::Inline("{}".into());
    assert_eq!(verified(&store, &garbage, &token, "a").await, Err(TokenFault::KeysUnavailable));
}

#[tokio::test]
async fn discovery_names_the_address_and_a_slash_more_or_less_is_the_same() {
    let signer = Signer::new("a");
    let keys = Server::start(Mode::Text(key_set(&[&signer]))).await;
    let document = json!({"issuer": "x", "jwks_uri": keys.url("/keys")}).to_string();
    let issuer = Server::start(Mode::Text(document)).await;
    let token = signer.token(&json!({}));
    for end in ["", "/"] {
        let source = KeySource::Discovery(issuer.url(end).into());
        assert_eq!(verified(&store(listed()), &source, &token, "a").await, Ok(()));
    }
    issuer.set(Mode::Text("{}".to_owned()));
    let source = KeySource::Discovery(issuer.url("").into());
    assert_eq!(verified(&store(listed()), &source, &token, "a").await, Err(TokenFault::KeysUnavailable));
}

#[tokio::test]
async fn whatever_a_server_does_wrong_leaves_no_keys() {
    // T-21, A-13
    let signer = Signer::new("a");
    let token = signer.token(&json!({}));
    let good = Server::start(Mode::Text(key_set(&[&signer]))).await;
    let redirect = format!("HTTP/1.1 302 Found\r\nLocation: {}\r\nContent-Length: 0\r\n\r\n", good.url("/"));
    let set = key_set(&[&signer]);
    let padded = format!("{set}{}", " ".repeat(ANSWER_BYTES_MAX));
    for (what, mode) in [
        ("a redirect", Mode::Raw(redirect)),
        ("an error", Mode::Raw("HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n".to_owned())),
        (
            "a set with another status",
            Mode::Raw(format!("HTTP/1.1 203 OK\r\nContent-Length: {}\r\n\r\n{set}", set.len())),
        ),
        ("an answer that is too large", Mode::Text(padded.clone())),
        ("one without an end", Mode::Raw(format!("HTTP/1.1 200 OK\r\n\r\n{padded}"))),
        (
            "one that breaks off",
            Mode::Raw(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{set}", set.len() + 1)),
        ),
        ("garbage", Mode::Text("<html>".to_owned())),
        ("no list", Mode::Text(r#"{"keys": {}}"#.to_owned())),
        ("no HTTP", Mode::Raw("SSH-2.0-x\r\n".to_owned())),
        ("nothing", Mode::Raw(String::new())),
    ] {
        let server = Server::start(mode).await;
        let source = at(server.url("/"));
        assert_eq!(
            verified(&store(listed()), &source, &token, "a").await,
            Err(TokenFault::KeysUnavailable),
            "{what}"
        );
        assert_eq!(server.asked(), 1, "{what}");
    }
    assert_eq!(good.asked(), 0, "a redirect is not followed");
}

#[tokio::test]
async fn a_server_that_may_not_be_asked_is_not_even_dialled() {
    // T-21
    let signer = Signer::new("a");
    let token = signer.token(&json!({}));
    let server = Server::start(Mode::Text(key_set(&[&signer]))).await;
    let port = server.address.port();
    let only_http = KeysConfig { http: true, ..KeysConfig::default() };
    let only_loopback = KeysConfig { http: false, ..listed() };
    for (config, url) in [
        (only_http.clone(), server.url("/")),
        (only_http.clone(), format!("http://localhost:{port}/")),
        (only_http, format!("http://[::ffff:127.0.0.1]:{port}/")),
        (only_loopback, server.url("/")),
        (listed(), format!("ftp://127.0.0.1:{port}/")),
        (listed(), format!("127.0.0.1:{port}")),
        (listed(), format!("http://nobody.invalid:{port}/")),
        (listed(), String::new()),
    ] {
        let denied = verified(&store(config), &at(url.clone()), &token, "a").await;
        assert_eq!(denied, Err(TokenFault::KeysUnavailable), "{url}");
    }
    assert_eq!(server.asked(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_holds_a_request_for_a_bounded_time_and_only_once() {
    let server = Server::start(Mode::Silent).await;
    let (store, source) = (store(listed()), at(server.url("/")));
    let token = Signer::new("a").token(&json!({}));
    let before = Instant::now();
    assert_eq!(verified(&store, &source, &token, "a").await, Err(TokenFault::KeysUnavailable));
    assert!(before.elapsed() <= Duration::from_secs(WAIT_SECONDS_MAX + 1), "{:?}", before.elapsed());
    sleep(Duration::from_millis(100)).await;
    let before = Instant::now();
    assert_eq!(verified(&store, &source, &token, "a").await, Err(TokenFault::KeysUnavailable));
    assert!(before.elapsed() < Duration::from_secs(1), "it is known to be away");
}

#[tokio::test]
async fn a_new_key_is_found_early_but_strangers_do_not_make_the_node_ask_again_and_again() {
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    let server = Server::start(Mode::Text(key_set(&[&old]))).await;
    let (store, source) = (store(listed()), at(server.url("/")));
    assert_eq!(verified(&store, &source, &old.token(&json!({})), "old").await, Ok(()));
    server.set(Mode::Text(key_set(&[&new])));
    assert_eq!(verified(&store, &source, &new.token(&json!({})), "new").await, Ok(()));
    assert_eq!(server.asked(), 2);
    assert_eq!(verified(&store, &source, &old.token(&json!({})), "old").await, Err(TokenFault::NoKey));
    for stranger in 0..20 {
        let kid = format!("stranger-{stranger}");
        let token = Signer::new(&kid).token(&json!({}));
        assert_eq!(verified(&store, &source, &token, &kid).await, Err(TokenFault::NoKey));
    }
    assert_eq!(server.asked(), 2);
}

#[tokio::test]
async fn all_who_lack_a_key_wait_for_the_one_fetch() {
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    let server = Server::start(Mode::Text(key_set(&[&old]))).await;
    let (store, source) = (store(listed()), at(server.url("/")));
    assert_eq!(verified(&store, &source, &old.token(&json!({})), "old").await, Ok(()));
    server.set(Mode::Text(key_set(&[&new])));
    let token = new.token(&json!({}));
    // All of them miss the key before the first of them has asked for a fetch.
    let herd = (0..50).map(|_| verified(&store, &source, &token, "new"));
    let all = futures_util::future::join_all(herd).await;
    assert_eq!(all, vec![Ok(()); 50]);
    assert_eq!(server.asked(), 2, "one for all");
    // One that missed it by keys that were replaced meanwhile is judged by the new ones without any fetch.
    let stale = Missed { source, number: 0 };
    assert!(store.refresh(vec![stale]).await);
    assert_eq!(server.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_set_goes_on_while_its_refreshes_fail() {
    // A-13
    let signer = Signer::new("a");
    let token = signer.token(&json!({}));
    let server = Server::start(Mode::Text(key_set(&[&signer]))).await;
    let (store, source) = (store(listed()), at(server.url("/")));
    assert_eq!(verified(&store, &source, &token, "a").await, Ok(()));
    server.set(Mode::Raw("HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n".to_owned()));
    sleep(Duration::from_secs(REFRESH_SECONDS * 3)).await;
    assert!(server.asked() > 2, "it is tried again: {}", server.asked());
    assert_eq!(verified(&store, &source, &token, "a").await, Ok(()));
    server.set(Mode::Text(key_set(&[&Signer::new("a")])));
    sleep(Duration::from_secs(REFRESH_SECONDS)).await;
    assert_eq!(
        verified(&store, &source, &token, "a").await,
        Err(TokenFault::Signature),
        "a good one replaces it"
    );
}

#[tokio::test(start_paused = true)]
async fn a_set_that_nobody_asks_for_is_dropped_and_fetched_no_more() {
    // A-13
    let signer = Signer::new("a");
    let server = Server::start(Mode::Text(key_set(&[&signer]))).await;
    let (store, source) = (store(listed()), at(server.url("/")));
    assert_eq!(verified(&store, &source, &signer.token(&json!({})), "a").await, Ok(()));
    sleep(Duration::from_secs(UNUSED_SECONDS_MAX + 2 * REFRESH_SECONDS)).await;
    assert!(store.entries.load().is_empty());
    let asked = server.asked();
    sleep(Duration::from_secs(3 * REFRESH_SECONDS)).await;
    assert_eq!(server.asked(), asked);
    assert_eq!(verified(&store, &source, &signer.token(&json!({})), "a").await, Ok(()));
}

#[tokio::test]
async fn over_tls_only_a_server_that_the_roots_vouch_for_is_believed() {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let path = std::env::temp_dir().join(format!("culvert-roots-{}.pem", std::process::id()));
    std::fs::write(&path, made.cert.pem()).expect("a file");
    let signer = Signer::new("a");
    let token = signer.token(&json!({}));
    let server = Server::start_tls(Mode::Text(key_set(&[&signer])), &made).await;
    let port = server.address.port();
    let config = |roots| KeysConfig { allow: listed().allow, roots, ..KeysConfig::default() };
    let rooted = || config(Some(path.clone()));
    let by_name = at(format!("https://localhost:{port}/"));
    assert_eq!(verified(&store(rooted()), &by_name, &token, "a").await, Ok(()));
    let by_address = at(format!("https://127.0.0.1:{port}/"));
    for (config, source) in [(rooted(), &by_address), (config(None), &by_name)] {
        assert_eq!(verified(&store(config), source, &token, "a").await, Err(TokenFault::KeysUnavailable));
    }
    std::fs::write(&path, "no certificate").expect("a file");
    assert!(Store::start(rooted(), Sink::new()).is_err_and(|error| error.to_string().contains("no usable")));
    std::fs::remove_file(&path).expect("a file");
    assert!(
        Store::start(rooted(), Sink::new()).is_err_and(|error| error.to_string().contains("cannot be read"))
    );
}

#[tokio::test]
async fn the_number_of_sets_is_bounded() {
    let events = Sink::new();
    let store = Store::start(KeysConfig::default(), events.clone()).expect("no file of roots is given");
    for number in 0..SOURCES_MAX + 10 {
        store.entry(&KeySource::Inline(format!("{{\"keys\": [], \"n\": {number}}}").into()));
    }
    assert_eq!(store.entries.load().len(), SOURCES_MAX);
    assert!(
        events.metrics().text().expect("text").contains("culvert_limits_total{limit=\"key_sources\"} 10")
    );
}
