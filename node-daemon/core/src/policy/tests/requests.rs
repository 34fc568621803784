//! Requests: which ports need them, what becomes of them, what the workload gets.

use serde_json::json;

use super::*;
use crate::policy::tokens::{
    Algorithm, KeySource, Signatures, TokenFault, TokenRules, Tokens, encode_base64url,
};

/// Every signature is good that says so. Proves nothing.
struct Trusting;

impl Signatures for Trusting {
    fn verify(
        &self,
        _: &KeySource,
        _: Algorithm,
        _: Option<&str>,
        _: &[u8],
        signature: &[u8],
    ) -> Result<(), TokenFault> {
        if signature == b"good" { Ok(()) } else { Err(TokenFault::Signature) }
    }
}

const NOW: u64 = 1_546_300_800;

fn token(claims: &Value) -> String {
    let part = |value: &Value| encode_base64url(value.to_string().as_bytes());
    format!("{}.{}.{}", part(&json!({"alg": "RS256"})), part(claims), encode_base64url(b"good"))
}

#[track_caller]
fn needs(objects: &str, expected: bool) {
    let world = World::default();
    let compiled = world.compile(&load(objects).0);
    let backend = &world.workloads[&object_name("photo/backend")];
    assert_eq!(compiled.needs_requests(backend, 8080), expected, "{objects}");
    assert!(!compiled.needs_requests(backend, 9000), "TCP never does: {objects}");
    let facts = world.facts(FRONTEND);
    let is_taken_apart = matches!(compiled.admit(&facts), Ok(Admission::Requests));
    assert_eq!(is_taken_apart, expected, "{objects}");
}

const FRONTEND: &str = "photo/frontend tunnel > photo/backend:8080";

#[test]
fn only_what_asks_requests_takes_connections_apart() {
    let role = |rule: &str, subject: &str| {
        format!(
            "ClusterRbacConfig default: {{mode: \"ON\"}}\nServiceRole photo/r: {{rules: [{rule}]}}\n\
             ServiceRoleBinding photo/b: {{subjects: [{subject}], roleRef: {{kind: ServiceRole, name: r}}}}"
        )
    };
    for objects in [
        role("{methods: [GET]}", "{user: \"*\"}"),
        role("{notPaths: [/a]}", "{user: \"*\"}"),
        role("{}", "{group: a}"),
        role("{}", "{properties: {\"request.auth.principal\": a}}"),
        role("{}", "{properties: {source.user: a}}"),
        "Policy photo/default: {origins: [{jwt: {issuer: a}}]}".to_owned(),
        "Policy photo/default: {peers: [{mtls: }], principalBinding: USE_ORIGIN}".to_owned(),
        "RequestAuthentication photo/r: {jwtRules: [{issuer: a}]}".to_owned(),
        "RequestAuthentication photo/r: {jwtRules: [{}]}".to_owned(),
        "AuthorizationPolicy photo/a: {action: DENY, rules: [{to: [{operation: {paths: [/a]}}]}]}".to_owned(),
        "AuthorizationPolicy photo/a: {action: AUDIT, rules: [{to: [{operation: {paths: [/a]}}]}]}"
            .to_owned(),
        "AuthorizationPolicy photo/a!dry-run: {rules: [{to: [{operation: {paths: [/a]}}]}]}".to_owned(),
    ] {
        needs(&objects, true);
    }
    for objects in [
        String::new(),
        role("{}", "{user: \"*\"}"),
        role("{methods: [GET], services: [\"x*\"]}, {}", "{user: \"*\"}"),
        "Policy photo/default: {origins: [{jwt: {issuer: a}}], originIsOptional: true}".to_owned(),
        "RequestAuthentication photo/r: {jwtRules: []}".to_owned(),
        "RequestAuthentication photo/r: {selector: {matchLabels: {app: x}}, jwtRules: [{issuer: a}]}"
            .to_owned(),
        "AuthorizationPolicy photo/a: {rules: [{from: [{source: {namespaces: [photo]}}]}]}".to_owned(),
    ] {
        needs(&objects, false);
    }
}

/// Judges one request of the frontend; gives what the client or the workload gets.
fn judge(objects: &str, connection: &str, method: &str, path: &str, headers: &[(&str, &str)]) -> String {
    judge_at("backend", objects, connection, method, path, headers)
}

fn judge_host(objects: &str, host: &str) -> String {
    judge_at(host, objects, FRONTEND, "GET", "/", &[])
}

fn judge_at(
    host: &str,
    objects: &str,
    connection: &str,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
) -> String {
    let world = World::default();
    let compiled = world.compile(&load(objects).0);
    let facts = world.facts(connection);
    let verify = |rules: &TokenRules| rules.verify(rules.locate(Some(path), &headers), NOW, &Trusting);
    let rules = compiled.token_rules(&facts.destination, facts.destination_port);
    let tokens = rules.map_or_else(Tokens::none, verify);
    let request =
        RequestFacts { method, path: Some(path), host: Some(host), headers: &headers, tokens: &tokens };
    match compiled.judge_request(&facts, &request) {
        Ok(permit) => {
            let mut removed: Vec<&str> =
                permit.removed_headers().filter(|n| !RESERVED_NAMES.contains(n)).collect();
            removed.dedup();
            let added: Vec<String> =
                permit.added_headers().map(|(name, value)| format!("{name}={value}")).collect();
            format!(
                "{} -{} +{}",
                permit.upstream_path().unwrap_or_default(),
                removed.join(","),
                added.join(",")
            )
        }
        Err(denial) => {
            let answer = denial.answer();
            format!("{} {} {}", answer.status, answer.body, denial.reason.label())
        }
    }
}

#[test]
fn a_request_is_judged_in_order() {
    // policy A-7, B-12, T-22
    let strict = "MeshPolicy default: {peers: [{mtls: {}}]}\nAuthorizationPolicy photo/a: {rules: [{to: [{operation: {paths: [/a]}}]}]}";
    for (connection, path, expected) in [
        (FRONTEND, "/a", "/a - +"),
        (FRONTEND, "/x/../a?q=/b", "/a?q=/b - +"),
        (FRONTEND, "/b", "403 RBAC: access denied no_rule_allows"),
        (FRONTEND, "/a%00", "400 Bad Request bad_path"),
        ("plain > photo/backend:8080", "/a", "401 Peer authentication failed. peer_unauthenticated"),
        (
            "td:photo/web tunnel > photo/backend:8080",
            "/a",
            "401 Peer authentication failed. peer_unauthenticated",
        ),
        ("plain > photo/backend:8080", "/a%00", "400 Bad Request bad_path"),
    ] {
        assert_eq!(judge(strict, connection, "GET", path, &[]), expected, "{connection} {path}");
    }
    let optional = "MeshPolicy default: {peers: [{mtls: {}}], peerIsOptional: true}";
    let refused = judge(optional, "plain > photo/backend:8080", "GET", "/", &[]);
    assert_eq!(refused, "401 Peer authentication failed. plaintext_refused");
    let unusable = judge("Policy photo/default: {peers: [{}]}", FRONTEND, "GET", "/", &[]);
    assert_eq!(unusable, "401 Peer authentication failed. policy_unusable");
    assert_eq!(
        judge(strict, "plain > photo/remote:8080", "GET", "/a", &[]),
        "403 RBAC: access denied not_enrolled"
    );
}

#[test]
fn a_stranger_to_an_http_port_is_told_so() {
    // policy A-8
    let world = World::default();
    let compiled = world.compile(&load("MeshPolicy default: {peers: [{mtls: {}}]}").0);
    let admit = |connection| compiled.admit(&world.facts(connection));
    assert!(matches!(admit("td:photo/web tunnel > photo/backend:8080"), Ok(Admission::Requests)));
    assert!(admit("td:photo/web tunnel > photo/backend:9000").is_err());
    assert!(admit("plain > photo/backend:8080").is_err());
    assert!(matches!(admit(FRONTEND), Ok(Admission::Stream(_))));
}

#[test]
fn the_workload_gets_what_the_policy_forwards() {
    // policy F-2, A-11
    let rule = |more: &str| format!("RequestAuthentication photo/r: {{jwtRules: [{{issuer: i{more}}}]}}");
    let good = token(&json!({"iss": "i", "sub": "s", "team": "red", "num": 7, "evil": "a\r\nb: c"}));
    let bearer = format!("Bearer {good}");
    let headers = [("Authorization", bearer.as_str()), ("x-team", "forged")];
    let judge =
        |objects: &str, path: &str, headers: &[(&str, &str)]| judge(objects, FRONTEND, "GET", path, headers);
    assert_eq!(judge(&rule(""), "/a", &headers), "/a -authorization +");
    assert_eq!(judge(&rule(", forwardOriginalToken: true"), "/a", &headers), "/a - +");
    let query = format!("/a?x=1&access_token={good}&y=2");
    assert_eq!(judge(&rule(""), &query, &[]), "/a?x=1&y=2 - +");
    assert_eq!(judge(&rule(", forwardOriginalToken: true"), &query, &[]), format!("{query} - +"));
    let told = ", outputClaimToHeaders: [{header: x-team, claim: team}, {header: x-n, claim: num}, {header: x-evil, claim: evil}]";
    assert_eq!(judge(&rule(told), "/a", &headers), "/a -authorization,x-team,x-n,x-evil +x-team=red,x-n=7");
    // Without a token nobody else speaks in its place.
    assert_eq!(judge(&rule(told), "/a", &[("x-team", "forged")]), "/a -x-team,x-n,x-evil +");
    let origin = "Policy photo/default: {origins: [{jwt: {issuer: i}}]}";
    assert_eq!(judge(origin, "/a", &headers), "/a - +");
    assert_eq!(judge(origin, "/a", &[]), "401 Origin authentication failed. token_refused");
}

#[test]
fn one_header_that_two_rules_read_differently_is_one_token() {
    // policy F-2: a token that is present must be valid; what one rule reads, another need not.
    let rule = |prefix: &str| {
        format!("{{issuer: i, forwardOriginalToken: true, fromHeaders: [{{name: x-tok{prefix}}}]}}")
    };
    let objects = format!(
        "RequestAuthentication photo/r: {{jwtRules: [{}, {}]}}",
        rule(", prefix: 'Bearer '"),
        rule("")
    );
    let good = token(&json!({"iss": "i", "sub": "s"}));
    for (value, expected) in [
        (format!("Bearer {good}"), "/a"),
        (good.clone(), "/a"),
        (format!("Bearer {good}x"), "401"),
        (format!("Other {good}"), "401"),
        (format!("Bearer Bearer {good}"), "401"),
    ] {
        let answer = judge(&objects, FRONTEND, "GET", "/a", &[("X-Tok", value.as_str())]);
        assert!(answer.starts_with(expected), "{value}: {answer}");
    }
    let other_place = format!("/a?access_token=Bearer%20{good}");
    let both =
        "RequestAuthentication photo/r: {jwtRules: [{issuer: i, fromHeaders: [{name: x-tok}]}, {issuer: i}]}";
    let answer = judge(both, FRONTEND, "GET", &other_place, &[("x-tok", good.as_str())]);
    assert!(answer.starts_with("401"), "{answer}");
}

#[test]
fn hosts_have_no_case_under_whichever_name() {
    // policy G-18
    let deny = |key: &str| {
        format!(
            "AuthorizationPolicy photo/a: {{action: DENY, rules: [{{when: [{{key: 'request.headers[{key}]', values: [Admin.Example.com, '*.INTERNAL']}}]}}]}}"
        )
    };
    for key in ["host", "Host", ":authority"] {
        for host in ["admin.example.com", "ADMIN.example.COM", "x.internal"] {
            assert!(judge_host(&deny(key), host).starts_with("403"), "{key} {host}");
        }
        assert!(judge_host(&deny(key), "admin.example.org").starts_with('/'), "{key}");
    }
    assert!(judge_host(&deny("x-host"), "admin.example.com").starts_with('/'));
}

#[test]
fn too_many_tokens_are_too_many() {
    let objects = "RequestAuthentication photo/r: {jwtRules: [{issuer: i}]}";
    let good = token(&json!({"iss": "i", "sub": "s"}));
    let query = |count: usize| format!("/a?{}", vec![format!("access_token={good}x"); count].join("&"));
    let long = format!("/a?access_token={}", "a".repeat(tokens::TOKEN_BYTES_MAX + 1));
    for path in [query(tokens::TOKENS_MAX), query(tokens::TOKENS_MAX + 1), long] {
        assert!(judge(objects, FRONTEND, "GET", &path, &[]).starts_with("401 "), "{}", path.len());
    }
    let same = format!("/a?{}", vec![format!("access_token={good}"); tokens::TOKENS_MAX].join("&"));
    assert_eq!(judge(objects, FRONTEND, "GET", &same, &[]), "/a - +");
}

#[test]
fn a_cookie_that_carried_a_token_is_taken_out_and_no_other() {
    use crate::policy::tokens::without_cookies;
    let without = |value: &str| {
        without_cookies(value.as_bytes(), |name| name == "t")
            .map(|kept| String::from_utf8(kept).expect("text"))
    };
    for (value, expected) in [
        ("t=x", None),
        ("t=x; t=y", None),
        ("t=", None),
        ("a=1; t=x; b=2", Some("a=1; b=2")),
        ("t=x;a=1", Some("a=1")),
        ("a=1;  b=2 ", Some("a=1; b=2")),
        ("tt=x; T=y; t", Some("tt=x; T=y; t")),
        ("a=t=x", Some("a=t=x")),
        (" ; ;", None),
    ] {
        assert_eq!(without(value).as_deref(), expected, "{value}");
    }
    assert_eq!(without_cookies(b"a=\xff; t=x", |name| name == "t").as_deref(), Some(&b"a=\xff"[..]));
}

/// What becomes of a request with this token in a cookie, by the rule and by whether tokens need an end.
#[track_caller]
fn cookie(forwards: bool, needs_expiry: bool, claims: &Value) -> (bool, Vec<String>) {
    let mut world = World::default();
    world.mesh.needs_token_expiry = needs_expiry;
    let objects = format!(
        "RequestAuthentication photo/r: {{jwtRules: [{{issuer: i, fromCookies: [t], forwardOriginalToken: {forwards}}}]}}"
    );
    let compiled = world.compile(&load(&objects).0);
    let facts = world.facts(FRONTEND);
    let rules = compiled.token_rules(&facts.destination, facts.destination_port).expect("tokens count there");
    let value = format!("a=1; t={}", token(claims));
    let headers: &[(&str, &str)] = &[("cookie", &value)];
    let tokens = rules.verify(rules.locate(Some("/"), &headers), NOW, &Trusting);
    let request =
        RequestFacts { method: "GET", path: Some("/"), host: None, headers: &headers, tokens: &tokens };
    match compiled.judge_request(&facts, &request) {
        Ok(permit) => (true, permit.removed_cookies().map(str::to_owned).collect()),
        Err(_) => (false, Vec::new()),
    }
}

#[test]
fn a_token_that_is_not_forwarded_leaves_its_cookie_and_one_without_an_end_is_a_matter_of_the_mesh() {
    // policy F-2, G-6, A-12
    let endless = json!({"iss": "i", "sub": "s"});
    let lasting = json!({"iss": "i", "sub": "s", "exp": NOW + 60});
    let ended = json!({"iss": "i", "sub": "s", "exp": NOW});
    let empty = json!({"iss": "i", "sub": "s", "exp": null});
    let taken = vec!["t".to_owned()];
    for (forwards, needs_expiry, claims, expected) in [
        (false, false, &endless, (true, taken.clone())),
        (true, false, &endless, (true, Vec::new())),
        (false, true, &lasting, (true, taken)),
        (false, true, &endless, (false, Vec::new())),
        (true, true, &empty, (false, Vec::new())),
        (false, false, &ended, (false, Vec::new())),
        (false, true, &ended, (false, Vec::new())),
    ] {
        assert_eq!(cookie(forwards, needs_expiry, claims), expected, "{forwards} {needs_expiry} {claims}");
    }
}

#[test]
fn an_explanation_names_what_was_wanted() {
    let world = World::default();
    let objects = "AuthorizationPolicy photo/a: {rules: [{from: [{source: {namespaces: [shop]}}], to: [{operation: {methods: [PUT]}}]}, {to: [{operation: {methods: [POST]}}]}]}";
    let compiled = world.compile(&load(objects).0);
    let facts = world.facts(FRONTEND);
    let headers: &[(&str, &str)] = &[];
    let tokens = Tokens::none();
    let request =
        RequestFacts { method: "GET", path: Some("/"), host: None, headers: &headers, tokens: &tokens };
    let explained = compiled.explain(&facts, Some(&request));
    assert!(!explained.allowed);
    assert_eq!(
        explained.reason,
        "no_rule_allows: nearest is AuthorizationPolicy/photo/a rules[1], but request.method is GET, wanted POST"
    );
    assert_eq!(explained.considered.len(), 2);
    assert_eq!(explained.considered[0].missing.len(), 2);
    let allowed = compiled.explain(&facts, Some(&RequestFacts { method: "POST", ..request }));
    assert_eq!((allowed.allowed, allowed.rule.as_deref()), (true, Some("rules[1]")));
    assert_eq!(allowed.reason, "AuthorizationPolicy/photo/a rules[1] matches");
}

#[test]
fn secrets_are_not_shown() {
    let objects = "RequestAuthentication photo/r: {jwtRules: [{issuer: i}]}";
    let world = World::default();
    let compiled = world.compile(&load(objects).0);
    let backend = &world.workloads[&object_name("photo/backend")];
    let rules = compiled.token_rules(backend, 8080).expect("tokens count there");
    let good = token(&json!({"iss": "i", "sub": "s", "secret": "swordfish"}));
    let bearer = format!("Bearer {good}");
    let headers: &[(&str, &str)] = &[("authorization", &bearer)];
    let found = rules.locate(Some("/"), &headers);
    assert!(!format!("{found:?}").contains(&good));
    assert!(!format!("{:?}", rules.verify(found, NOW, &Trusting)).contains("swordfish"));
}
