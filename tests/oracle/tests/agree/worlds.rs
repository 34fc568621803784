//! Random policies, workloads and requests, near misses and shapes of attackers included.

use std::{collections::BTreeMap, net::IpAddr};

use policy_oracle::facts::{
    Connection, Document, Mode, Peer, Place, Protocol, Request, Service, ServicePort, Token, Workload, World,
};
use proptest::{collection::vec, option, prelude::*, sample::select};
use serde_json::{Map, Value, json};

/// 2019-01-01T00:00:00Z
pub(crate) const NOW: u64 = 1_546_300_800;

/// One question.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) world: World,
    pub(crate) connection: Connection,
    pub(crate) request: Request,
}

pub(crate) fn asked() -> impl Strategy<Value = Asked> {
    (domains(), services(), mode(), documents(), connection(), request(), address()).prop_map(
        |((trust_domain, aliases), services, default_mode, documents, mut connection, request, address)| {
            let labels = [("app", "web"), ("tier", "x")];
            let workload = Workload {
                namespace: "apps".to_owned(),
                name: "web".to_owned(),
                account: "web-sa".to_owned(),
                labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
                address,
                ports: vec![(8080, Protocol::Http), (9000, Protocol::Tcp), (7070, Protocol::Http)],
            };
            if let Some(peer) = &mut connection.peer {
                // The mesh's own domain more often than chance has it.
                if peer.domain == "own" {
                    peer.domain.clone_from(&trust_domain);
                }
            }
            let world = World {
                trust_domain,
                aliases,
                root_namespace: "istio-system".to_owned(),
                default_mode,
                documents,
                workload,
                services,
                now: NOW,
            };
            Asked { world, connection, request }
        },
    )
}

fn one_of(words: &'static [&'static str]) -> impl Strategy<Value = String> + Clone {
    select(words).prop_map(str::to_owned)
}

fn domains() -> impl Strategy<Value = (String, Vec<String>)> {
    let aliases = select(vec![vec![], vec!["old.local"], vec!["old.local", "cluster.local"]]);
    (one_of(&["cluster.local", "td.example"]), aliases).prop_map(|(own, aliases)| {
        let aliases = aliases.into_iter().filter(|alias| *alias != own).map(str::to_owned).collect();
        (own, aliases)
    })
}

fn mode() -> impl Strategy<Value = Mode> {
    select(vec![Mode::Disabled, Mode::Permissive, Mode::Permissive, Mode::Strict])
}

/// `web` owns the HTTP port 8080 and the TCP port 9000, unless `alt`, which comes first by name, has 8080 too.
fn services() -> impl Strategy<Value = Vec<Service>> {
    any::<(bool, bool)>().prop_map(|(with_alt, with_web)| {
        let service = |name: &str, app: &str, ports: &[(&str, u16, u16, Protocol)]| Service {
            namespace: "apps".to_owned(),
            name: name.to_owned(),
            selector: BTreeMap::from([("app".to_owned(), app.to_owned())]),
            ports: ports
                .iter()
                .map(|(name, port, target, protocol)| ServicePort {
                    name: (*name).to_owned(),
                    port: *port,
                    target: *target,
                    protocol: *protocol,
                })
                .collect(),
        };
        let mut services = vec![service("other", "other", &[("http", 80, 8080, Protocol::Http)])];
        if with_web || !with_alt {
            let ports = [("http", 80, 8080, Protocol::Http), ("tcp-admin", 9001, 9000, Protocol::Tcp)];
            services.push(service("web", "web", &ports));
        }
        if with_alt {
            services.push(service("alt", "web", &[("http-alt", 81, 8080, Protocol::Http)]));
        }
        services
    })
}

fn address() -> impl Strategy<Value = IpAddr> {
    let written = ["10.0.0.1", "10.0.1.2", "192.168.0.7", "::1", "fd00::1", "::ffff:10.0.0.1"];
    select(written.map(|text| text.parse::<IpAddr>().expect("an address")).to_vec())
}

fn connection() -> impl Strategy<Value = Connection> {
    let peer = (
        one_of(&["own", "own", "own", "cluster.local", "old.local", "evil.example"]),
        one_of(&["apps", "apps", "other", "a-s", "istio-system"]),
        one_of(&["web-sa", "front", "a", "default"]),
    );
    let peer = peer.prop_map(|(domain, namespace, account)| Peer { domain, namespace, account });
    let server_name = one_of(&["web.apps", "outbound_.80_._.web", "x"]);
    let port = select(vec![8080_u16, 8080, 8080, 9000, 7000, 7070]);
    (option::weighted(0.8, peer), option::of(server_name), address(), port).prop_map(
        |(peer, server_name, source, port)| Connection {
            server_name: server_name.filter(|_| peer.is_some()),
            peer,
            source,
            port,
        },
    )
}

/// Paths with the tricks of attackers.
pub(crate) fn path() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        6 => one_of(&["a", "b", "admin", "free", "pub", "x.txt"]),
        2 => one_of(&["..", ".", "", "%2e", "%2E%2e", ".%2e", "%61", "%2F", "%2fadmin", "a;b", "..;", "...", "%7E"]),
        1 => one_of(&["%C3%A9", "%zz", "%", "%2", "%00", "%ff", "\\", "é", " ", "\u{1}", "{*}", "*", "%5C"]),
        1 => "[ -~]{0,4}",
    ];
    let query = prop_oneof![
        5 => Just(String::new()),
        2 => one_of(&["?x=1", "?", "?a=/b/../c", "?x=%zz", "?y=1&z"]),
        1 => one_of(&["#f", "?x#f", "? ", "?\u{e9}"]),
    ];
    let start = prop_oneof![20 => Just("/".to_owned()), 1 => one_of(&["", "//", "http://x/", "*"])];
    (start, vec(piece, 0..4), query)
        .prop_map(|(start, pieces, query)| format!("{start}{}{query}", pieces.join("/")))
}

fn request() -> impl Strategy<Value = Request> {
    let method = one_of(&["GET", "GET", "POST", "OPTIONS", "get", "PURGE"]);
    let host = one_of(&["web.example.com", "Web.Example.COM:8080", "web", "10.0.0.1"]);
    let headers = (
        option::of(one_of(&["v", "a-v", "v-b", "", "*"])),
        option::of(one_of(&["w", "W"])),
        option::weighted(0.2, one_of(&["o", ""])),
        option::weighted(0.2, one_of(&["GET", ""])),
        option::weighted(0.1, one_of(&["application/grpc", "application/grpc+proto", "text/plain"])),
        option::weighted(0.1, one_of(&["v"])),
    );
    let tokens = prop_oneof![3 => vec(token(), 0..2), 1 => vec(token(), 2)];
    (method, option::weighted(0.97, path()), option::weighted(0.9, host), headers, tokens).prop_map(
        |(method, mut path, host, headers, written)| {
            let names =
                ["X-A", "x-b", "Origin", "access-control-request-method", "content-type", "istio-sec-x"];
            let values = [headers.0, headers.1, headers.2, headers.3, headers.4, headers.5];
            let mut lines: Vec<(String, String)> = names
                .into_iter()
                .zip(values)
                .filter_map(|(name, value)| Some((name.to_owned(), value?)))
                .collect();
            let mut tokens: Vec<Token> = Vec::new();
            for token in written {
                let is_taken = |other: &Token| match (&other.place, &token.place) {
                    (Place::Header { name: a, .. }, Place::Header { name: b, .. }) => {
                        a.eq_ignore_ascii_case(b)
                    }
                    (Place::Parameter(a), Place::Parameter(b)) => a == b,
                    (Place::Header { .. }, Place::Parameter(_))
                    | (Place::Parameter(_), Place::Header { .. }) => false,
                };
                if tokens.iter().any(is_taken) {
                    continue;
                }
                let text = text_of(&token);
                match &token.place {
                    Place::Header { name, before } => lines.push((name.clone(), format!("{before}{text}"))),
                    Place::Parameter(name) => match &mut path {
                        Some(path) if !path.contains('#') => {
                            let mark = if path.contains('?') { '&' } else { '?' };
                            path.push_str(&format!("{mark}{name}={text}"));
                        }
                        Some(_) | None => continue,
                    },
                }
                tokens.push(token);
            }
            Request { method, path, host, headers: lines, tokens }
        },
    )
}

fn token() -> impl Strategy<Value = Token> {
    let place = prop_oneof![
        3 => Just(("authorization", "Bearer ")),
        1 => select(vec![("Authorization", "bearer "), ("authorization", ""), ("Authorization", "Basic ")]),
        3 => select(vec![("x-tok", ""), ("X-Tok", "Bearer "), ("x-tok", "tok "), ("x-tok", "other ")]),
    ];
    let place = prop_oneof![
        3 => place.prop_map(|(name, before)| Place::Header { name: name.to_owned(), before: before.to_owned() }),
        1 => one_of(&["access_token", "tok"]).prop_map(Place::Parameter),
    ];
    let algorithm = prop_oneof![8 => one_of(&["RS256", "ES256", "RS512", "ES384"]), 1 => one_of(&["none", "HS256", "PS256", "rs256"])];
    (place, algorithm, prop::bool::weighted(0.9), claims()).prop_map(
        |(place, algorithm, is_signed_well, claims)| Token { place, algorithm, is_signed_well, claims },
    )
}

fn claims() -> impl Strategy<Value = Value> {
    let text = |words| one_of(words).prop_map(Value::from);
    let time = || select(vec![json!(NOW - 1), json!(NOW), json!(NOW + 1), json!(NOW + 900)]);
    (
        option::weighted(0.95, text(&["https://a.test", "https://a.test", "b", "c/d"])),
        option::weighted(0.9, text(&["ann", "bob smith", "*"])),
        option::of(select(vec![
            json!("x"),
            json!("http://x/"),
            json!(["x", "y"]),
            json!(["y", "https://x"]),
            json!("x y"),
            json!([]),
        ])),
        option::weighted(0.3, text(&["presenter", "p"])),
        option::weighted(0.7, time()),
        option::weighted(0.2, time()),
        option::of(select(vec![
            json!("g1 g2"),
            json!(["g1", "g2"]),
            json!(["g2"]),
            json!(7),
            json!(["g1", 7]),
            json!(null),
        ])),
        option::weighted(
            0.3,
            select(vec![json!("u v"), json!(["u"]), json!({"b": "v"}), json!({"b": ["v", "w"]})]),
        ),
    )
        .prop_map(|(iss, sub, aud, azp, exp, nbf, groups, custom)| {
            let all = [
                ("iss", iss),
                ("sub", sub),
                ("aud", aud),
                ("azp", azp),
                ("exp", exp),
                ("nbf", nbf),
                ("groups", groups),
                ("a", custom),
            ];
            let claims = all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
            Value::Object(claims.collect())
        })
}

/// In the compact form; the signature is a word that [`crate::Words`] understands.
fn text_of(token: &Token) -> String {
    let part = |bytes: &[u8]| node_core::policy::tokens::encode_base64url(bytes);
    let header = json!({"alg": token.algorithm, "kid": "k"}).to_string();
    let signature: &[u8] = if token.is_signed_well { b"good" } else { b"bad" };
    format!("{}.{}.{}", part(header.as_bytes()), part(token.claims.to_string().as_bytes()), part(signature))
}

/// A pattern near a text: whole, cut at either end, or beside it.
fn near(texts: &'static [&'static str]) -> impl Strategy<Value = String> + Clone {
    (select(texts), any::<prop::sample::Index>(), 0..12_u8).prop_map(|(text, index, how)| {
        let cuts: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let at = cuts[index.index(cuts.len())];
        match how {
            0..=4 => text.to_owned(),
            5 => format!("{}*", &text[..at]),
            6 => format!("*{}", &text[at..]),
            7 => "*".to_owned(),
            8 => format!("*{}*", &text[..at]),
            9 => format!("{text}x"),
            10 => text.to_ascii_uppercase(),
            _ => format!("{}*{}", &text[..at], &text[at..]),
        }
    })
}

fn list(each: impl Strategy<Value = String> + 'static) -> BoxedStrategy<Value> {
    vec(each, 1..3).prop_map(Value::from).boxed()
}

fn principal() -> impl Strategy<Value = String> + Clone {
    near(&[
        "cluster.local/ns/apps/sa/front",
        "cluster.local/ns/apps/sa/web-sa",
        "td.example/ns/apps/sa/front",
        "old.local/ns/other/sa/a",
        "*/ns/apps/sa/front",
        "*l/ns/apps/sa/front",
        "*example/ns/apps/sa/a",
        "evil.example/ns/apps/sa/front",
        "front",
    ])
}

fn network() -> impl Strategy<Value = String> + Clone {
    one_of(&[
        "10.0.0.1",
        "10.0.0.0/23",
        "10.0.0.0/8",
        "0.0.0.0/0",
        "::/0",
        "::1",
        "fd00::/8",
        "::ffff:10.0.0.0/104",
        "192.168.0.7/32",
        "10.0.0.1/33",
        "10.0.0",
        "x",
    ])
}

fn namespace() -> impl Strategy<Value = String> + Clone {
    near(&["apps", "other", "a-s", "istio-system"])
}

fn path_pattern() -> impl Strategy<Value = String> + Clone {
    near(&["/a/b", "/admin", "/", "/a/", "/free/a", "/a/x.txt", "/a;b", "/%2Fadmin", "/a//b"])
}

fn template() -> impl Strategy<Value = String> + Clone {
    one_of(&[
        "/{*}",
        "/a/{*}",
        "/{*}/b",
        "/a/{**}",
        "/{**}",
        "/{**}/b",
        "/{*}/{**}",
        "/a{*}",
        "/{**}/{*}",
        "/{**}/x.txt",
        "/{*}/b*",
    ])
}

/// A name, its values, and how seldom it is absent.
fn field(
    name: &'static str,
    weight: f64,
    values: BoxedStrategy<Value>,
) -> BoxedStrategy<Option<(String, Value)>> {
    option::weighted(weight, values.prop_map(move |value| (name.to_owned(), value))).boxed()
}

fn object(fields: Vec<BoxedStrategy<Option<(String, Value)>>>) -> BoxedStrategy<Value> {
    fields.prop_map(|fields| Value::Object(fields.into_iter().flatten().collect::<Map<_, _>>())).boxed()
}

fn filled_object(fields: Vec<BoxedStrategy<Option<(String, Value)>>>, or: Value) -> BoxedStrategy<Value> {
    object(fields).prop_map(move |value| if value == json!({}) { or.clone() } else { value }).boxed()
}

fn document(
    kind: &str,
    namespace: &str,
    name: &str,
    created: Option<u8>,
    spec: Value,
    is_broken: bool,
) -> Document {
    let version = match kind {
        "Policy" | "MeshPolicy" => "authentication.istio.io/v1alpha1",
        "PeerAuthentication" | "RequestAuthentication" | "AuthorizationPolicy" => "security.istio.io/v1",
        "DestinationRule" => "networking.istio.io/v1alpha3",
        _ => "rbac.istio.io/v1alpha1",
    };
    let mut metadata = json!({"name": name});
    if !namespace.is_empty() {
        metadata["namespace"] = namespace.into();
    }
    if let Some(created) = created {
        metadata["creationTimestamp"] = format!("2018-01-0{}T00:00:00Z", created % 9 + 1).into();
    }
    Document {
        value: json!({"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}),
        is_broken,
    }
}

/// Documents of one age or of both. Each object once.
fn documents() -> impl Strategy<Value = Vec<Document>> {
    let authentication = prop_oneof![
        3 => (vec(policy(), 0..3), option::of(mesh_policy()), vec(peer_authentication(), 0..2)).prop_map(|(own, mesh, peers)| {
            own.into_iter().chain(mesh).chain(peers).collect::<Vec<_>>()
        }),
        2 => (vec(peer_authentication(), 0..3), vec(request_authentication(), 0..3)).prop_map(|(peers, requests)| {
            peers.into_iter().chain(requests).collect::<Vec<_>>()
        }),
    ];
    let roles = (
        option::weighted(0.9, cluster_switch()),
        option::weighted(0.2, switch()),
        vec(role(), 0..4),
        vec(binding(), 0..4),
    )
        .prop_map(|(cluster, switch, roles, bindings)| {
            cluster.into_iter().chain(switch).chain(roles).chain(bindings).collect::<Vec<_>>()
        })
        .boxed();
    let rules = prop_oneof![
        4 => roles.clone(),
        3 => vec(authorization(), 1..4),
        2 => (roles, vec(authorization(), 0..2)).prop_map(|(roles, current)| roles.into_iter().chain(current).collect()),
        1 => Just(Vec::new()),
    ];
    (authentication, rules).prop_map(|(authentication, rules)| {
        let mut known = std::collections::BTreeSet::new();
        let all = authentication.into_iter().chain(rules);
        all.filter(|document| {
            known.insert((
                document.kind().to_owned(),
                document.namespace().to_owned(),
                document.name().to_owned(),
            ))
        })
        .collect()
    })
}

fn created() -> impl Strategy<Value = Option<u8>> {
    option::of(0..4_u8)
}

fn policy_spec(with_targets: bool) -> impl Strategy<Value = Value> {
    let port = select(vec![
        json!({"number": 80}),
        json!({"number": 81}),
        json!({"number": 9001}),
        json!({"name": "http"}),
        json!({"name": "tcp-admin"}),
    ]);
    let target = (one_of(&["web", "web", "alt", "other"]), option::weighted(0.5, vec(port, 1..3))).prop_map(
        |(name, ports)| match ports {
            Some(ports) => json!({"name": name, "ports": ports}),
            None => json!({"name": name}),
        },
    );
    let targets = if with_targets { vec(target, 1..3).boxed() } else { Just(Vec::new()).boxed() };
    let peer = select(vec![
        json!({"mtls": null}),
        json!({"mtls": {}}),
        json!({"mtls": {"mode": "STRICT"}}),
        json!({"mtls": {"mode": "PERMISSIVE"}}),
        json!({"mTLS": {"mode": "PERMISSIVE"}}),
    ]);
    let peers = prop_oneof![1 => Just(Vec::new()), 4 => vec(peer, 1..3)];
    let origins = prop_oneof![2 => Just(Vec::new()), 3 => origins()];
    let flag = || option::weighted(0.3, any::<bool>());
    (targets, peers, flag(), origins, flag(), option::of(one_of(&["USE_PEER", "USE_ORIGIN"]))).prop_map(
        |(targets, peers, peer_optional, origins, origin_optional, binding)| {
            let mut spec = json!({});
            if !targets.is_empty() {
                spec["targets"] = targets.into();
            }
            if !peers.is_empty() {
                spec["peers"] = peers.into();
            }
            if !origins.is_empty() {
                spec["origins"] = origins.into();
            }
            for (name, value) in [
                ("peerIsOptional", peer_optional.map(Value::from)),
                ("originIsOptional", origin_optional.map(Value::from)),
                ("principalBinding", binding.map(Value::from)),
            ] {
                if let Some(value) = value {
                    spec[name] = value;
                }
            }
            spec
        },
    )
}

fn origins() -> impl Strategy<Value = Vec<Value>> {
    let matching = prop_oneof![
        one_of(&["/a/b", "/free", "/"]).prop_map(|text| json!({"exact": text})),
        one_of(&["/a", "/free", "/pub/"]).prop_map(|text| json!({"prefix": text})),
        one_of(&["b", ".txt", "/"]).prop_map(|text| json!({"suffix": text})),
        one_of(&["/a.*", "/(free|pub)", "/[ab]/?.*", "a|/b"]).prop_map(|text| json!({"regex": text})),
    ];
    let paths = |weight: f64| option::weighted(weight, vec(matching.clone(), 1..3).prop_map(Value::from));
    let trigger = (paths(0.5), paths(0.5)).prop_map(|(excluded, included)| {
        let mut rule = json!({});
        if let Some(excluded) = excluded {
            rule["excludedPaths"] = excluded;
        }
        if let Some(included) = included {
            rule["includedPaths"] = included;
        }
        rule
    });
    let jwt = (
        option::weighted(0.4, list(one_of(&["x", "https://x", "y", "z"]))),
        option::weighted(0.4, Just(json!(["x-tok"]))),
        option::weighted(0.2, Just(json!(["tok"]))),
        prop_oneof![2 => Just(Vec::new()), 1 => vec(trigger, 1..3)],
    );
    (vec(jwt, 1..3), any::<bool>()).prop_map(|(all, swapped)| {
        let mut issuers = vec!["https://a.test", "b"];
        if swapped {
            issuers.reverse();
        }
        let each =
            issuers.into_iter().zip(all).map(|(issuer, (audiences, headers, parameters, triggers))| {
                let mut jwt = json!({"issuer": issuer, "jwksUri": "https://keys.test/k"});
                for (name, value) in
                    [("audiences", audiences), ("jwtHeaders", headers), ("jwtParams", parameters)]
                {
                    if let Some(value) = value {
                        jwt[name] = value;
                    }
                }
                if !triggers.is_empty() {
                    jwt["triggerRules"] = triggers.into();
                }
                json!({ "jwt": jwt })
            });
        each.collect()
    })
}

fn policy() -> impl Strategy<Value = Document> {
    let namespace = || one_of(&["apps", "apps", "apps", "other"]);
    let named = (namespace(), one_of(&["p1", "p2", "p3"]), created(), policy_spec(true));
    let default = (namespace(), Just("default".to_owned()), created(), policy_spec(false));
    (prop_oneof![named, default], prop::bool::weighted(0.05)).prop_map(
        |((namespace, name, created, mut spec), is_broken)| {
            if is_broken {
                spec["origins"] = json!([{}]);
            }
            document("Policy", &namespace, &name, created, spec, is_broken)
        },
    )
}

fn mesh_policy() -> impl Strategy<Value = Document> {
    (policy_spec(false), prop::bool::weighted(0.05)).prop_map(|(mut spec, is_broken)| {
        if is_broken {
            spec["origins"] = json!([null]);
        }
        document("MeshPolicy", "", "default", None, spec, is_broken)
    })
}

fn selector() -> impl Strategy<Value = Value> {
    select(vec![
        json!({"matchLabels": {"app": "web"}}),
        json!({"matchLabels": {"app": "web", "tier": "x"}}),
        json!({"matchLabels": {"app": "other"}}),
    ])
}

fn peer_authentication() -> impl Strategy<Value = Document> {
    let mode = || {
        select(vec![
            json!({}),
            json!({"mode": "UNSET"}),
            json!({"mode": "STRICT"}),
            json!({"mode": "PERMISSIVE"}),
            json!({"mode": "DISABLE"}),
        ])
    };
    let ports = vec((select(vec![8080_u16, 9000, 7000, 80]), mode()), 0..3);
    (
        one_of(&["apps", "apps", "istio-system", "other"]),
        one_of(&["q1", "q2"]),
        created(),
        option::of(selector()),
        option::weighted(0.8, mode()),
        ports,
        prop::bool::weighted(0.05),
    )
        .prop_map(|(namespace, name, created, selector, mtls, ports, is_broken)| {
            let mut spec = json!({});
            if let (Some(selector), true) = (selector, namespace != "istio-system") {
                spec["selector"] = selector;
                for (port, mode) in ports {
                    spec["portLevelMtls"][port.to_string()] = mode;
                }
            }
            if let Some(mtls) = mtls {
                spec["mtls"] = mtls;
            }
            if is_broken {
                spec["mtls"] = json!({"mode": "LAX"});
            }
            document("PeerAuthentication", &namespace, &name, created, spec, is_broken)
        })
}

fn request_authentication() -> impl Strategy<Value = Document> {
    let rule = (
        one_of(&["https://a.test", "b"]),
        option::weighted(0.4, list(one_of(&["x", "https://x", "y"]))),
        option::weighted(
            0.3,
            select(vec![
                json!([{"name": "x-tok"}]),
                json!([{"name": "X-Tok", "prefix": "tok "}]),
                json!([{"name": "x-tok", "prefix": "Bearer "}]),
            ]),
        ),
        option::weighted(0.2, Just(json!(["tok"]))),
        option::weighted(0.2, Just(json!(["a"]))),
    );
    let rule = rule.prop_map(|(issuer, audiences, headers, parameters, spaced)| {
        let mut rule =
            json!({"issuer": issuer, "jwksUri": "https://keys.test/k", "forwardOriginalToken": true});
        for (name, value) in [
            ("audiences", audiences),
            ("fromHeaders", headers),
            ("fromParams", parameters),
            ("spaceDelimitedClaims", spaced),
        ] {
            if let Some(value) = value {
                rule[name] = value;
            }
        }
        rule
    });
    (
        one_of(&["apps", "apps", "istio-system", "other"]),
        one_of(&["t1", "t2"]),
        created(),
        option::weighted(0.3, selector()),
        vec(rule, 0..3),
        prop::bool::weighted(0.05),
    )
        .prop_map(|(namespace, name, created, selector, rules, is_broken)| {
            let mut spec = json!({"jwtRules": rules});
            if let Some(selector) = selector {
                spec["selector"] = selector;
            }
            if is_broken {
                spec["jwtRules"] = json!([{"audiences": ["x"]}]);
            }
            document("RequestAuthentication", &namespace, &name, created, spec, is_broken)
        })
}

fn switch_spec() -> impl Strategy<Value = (Value, bool)> {
    let listed = (
        option::of(list(one_of(&["apps", "other"]))),
        option::of(list(one_of(&["web.apps.svc.cluster.local", "alt.apps.svc.cluster.local", "web"]))),
    )
        .prop_map(|(namespaces, services)| {
            let mut listed = json!({});
            if let Some(namespaces) = namespaces {
                listed["namespaces"] = namespaces;
            }
            if let Some(services) = services {
                listed["services"] = services;
            }
            listed
        });
    let mode = one_of(&["ON", "ON", "ON", "ON", "ON_WITH_INCLUSION", "ON_WITH_EXCLUSION", "OFF"]);
    (mode, listed, option::weighted(0.2, one_of(&["ENFORCED", "PERMISSIVE"])), prop::bool::weighted(0.03))
        .prop_map(|(mode, listed, enforcement, is_broken)| {
            let mut spec = json!({"mode": mode});
            match mode.as_str() {
                "ON_WITH_INCLUSION" if !is_broken => spec["inclusion"] = listed,
                "ON_WITH_EXCLUSION" if !is_broken => spec["exclusion"] = listed,
                _ => {}
            }
            if let Some(enforcement) = enforcement {
                spec["enforcementMode"] = enforcement.into();
            }
            let is_broken = is_broken && mode.starts_with("ON_WITH");
            (spec, is_broken)
        })
}

fn cluster_switch() -> impl Strategy<Value = Document> {
    switch_spec()
        .prop_map(|(spec, is_broken)| document("ClusterRbacConfig", "", "default", None, spec, is_broken))
}

fn switch() -> impl Strategy<Value = Document> {
    (one_of(&["istio-system", "apps"]), switch_spec()).prop_map(|(namespace, (spec, is_broken))| {
        document("RbacConfig", &namespace, "default", None, spec, is_broken)
    })
}

fn role() -> impl Strategy<Value = Document> {
    let services = near(&[
        "web.apps.svc.cluster.local",
        "alt.apps.svc.cluster.local",
        "*",
        "*",
        "*.apps.svc.cluster.local",
        "web*",
    ]);
    let keyed = |key: &'static str, values: BoxedStrategy<Value>| {
        values.prop_map(move |values| json!({"key": key, "values": values})).boxed()
    };
    let constraint = prop_oneof![
        keyed("destination.ip", list(network())),
        keyed("destination.port", list(one_of(&["8080", "9000", "80", "70000", "x", "7000"]))),
        keyed("destination.labels[app]", list(near(&["web", "other"]))),
        keyed("destination.labels[none]", list(near(&["web"]))),
        keyed("destination.name", list(near(&["web", "alt"]))),
        keyed("destination.namespace", list(near(&["apps", "other"]))),
        keyed("destination.user", list(near(&["web-sa"]))),
        keyed("request.headers[x-a]", list(near(&["v", "a-v"]))),
        keyed("request.headers[X-B]", list(near(&["w"]))),
        keyed("request.headers[Host]", list(near(&["web.example.com"]))),
        keyed("request.headers[:path]", list(path_pattern())),
        keyed("request.headers[istio-sec-x]", list(near(&["v"]))),
        keyed("connection.sni", list(near(&["web.apps"]))),
        keyed("source.ip", list(network())),
        keyed("destination.labels", list(near(&["web"]))),
    ];
    let method = near(&["GET", "POST"]);
    let host = near(&["web.example.com", "Web.Example.com:8080"]);
    let rule = (
        option::of(list(services)),
        option::weighted(0.3, (any::<bool>(), list(method))),
        option::weighted(0.3, (any::<bool>(), list(path_pattern()))),
        option::weighted(0.1, list(path_pattern())),
        option::weighted(0.15, (any::<bool>(), list(host))),
        option::weighted(0.2, (any::<bool>(), vec(select(vec![8080_u16, 9000, 7000, 80]), 1..3))),
        vec(constraint, 0..3),
    );
    let rule = rule.prop_map(|(services, methods, paths, not_paths, hosts, ports, constraints)| {
        let mut rule = json!({});
        if let Some(services) = services {
            rule["services"] = services;
        }
        for (name, not_name, values) in
            [("methods", "notMethods", methods), ("paths", "notPaths", paths), ("hosts", "notHosts", hosts)]
        {
            if let Some((is_negated, values)) = values {
                rule[if is_negated { not_name } else { name }] = values;
            }
        }
        if let (Some(values), true) = (not_paths, rule.get("notPaths").is_none()) {
            rule["notPaths"] = values;
        }
        // policy B-3: not beside a constraint of the same.
        let has_port = constraints.iter().any(|constraint| constraint["key"] == "destination.port");
        if let (Some((is_negated, values)), false) = (ports, has_port) {
            rule[if is_negated { "notPorts" } else { "ports" }] = values.into();
        }
        if !constraints.is_empty() {
            rule["constraints"] = constraints.into();
        }
        rule
    });
    (
        one_of(&["apps", "apps", "apps", "other"]),
        one_of(&["r1", "r2"]),
        vec(rule, 1..3),
        prop::bool::weighted(0.05),
    )
        .prop_map(|(namespace, name, rules, is_broken)| {
            let rules = if is_broken { Vec::new() } else { rules };
            document("ServiceRole", &namespace, &name, None, json!({"rules": rules}), is_broken)
        })
}

fn subject() -> BoxedStrategy<Value> {
    let property = |key: &'static str, values: BoxedStrategy<String>| {
        values.prop_map(move |value| (key.to_owned(), Value::from(value))).boxed()
    };
    let property = prop_oneof![
        property("source.ip", network().boxed()),
        property("source.namespace", namespace().boxed()),
        property("source.principal", principal().boxed()),
        property("source.user", principal().boxed()),
        property("request.headers[x-a]", near(&["v", "a-v"]).boxed()),
        property(
            "request.auth.principal",
            near(&["https://a.test/ann", "b/bob smith", "cluster.local/ns/apps/sa/front"]).boxed()
        ),
        property("request.auth.audiences", near(&["x", "http://x/"]).boxed()),
        property("request.auth.presenter", near(&["presenter"]).boxed()),
        property("request.auth.claims[groups]", near(&["g1", "g2"]).boxed()),
        property("request.auth.claims[a]", near(&["u", "u v"]).boxed()),
        property("request.auth.claims[iss]", near(&["b"]).boxed()),
        property("destination.port", near(&["8080"]).boxed()),
    ];
    let user = prop_oneof![2 => principal(), 1 => one_of(&["*", "allUsers", "allAuthenticatedUsers"])];
    let names = prop_oneof![3 => principal(), 1 => one_of(&["allUsers", "allAuthenticatedUsers"])]
        .prop_map(|name| if name == "*" { "*x".to_owned() } else { name });
    let properties = vec(property, 1..3).prop_map(|all| Value::Object(all.into_iter().collect()));
    let fields = vec![
        field("user", 0.5, user.prop_map(Value::from).boxed()),
        field("names", 0.15, list(names.clone())),
        field("notNames", 0.15, list(names)),
        field("group", 0.1, near(&["g1"]).prop_map(Value::from).boxed()),
        field("groups", 0.1, list(near(&["g1", "g2"]))),
        field("notGroups", 0.1, list(near(&["g1", "g2"]))),
        field("namespaces", 0.15, list(namespace())),
        field("notNamespaces", 0.15, list(namespace())),
        field("ips", 0.1, list(network())),
        field("notIps", 0.1, list(network())),
        field("properties", 0.4, properties.boxed()),
    ];
    let subject = filled_object(fields, json!({"user": "*"}));
    // policy B-3: a property that says the same as a field is refused.
    subject
        .prop_map(|mut subject| {
            let rivals = [
                ("source.principal", ["names", "notNames"]),
                ("source.namespace", ["namespaces", "notNamespaces"]),
                ("source.ip", ["ips", "notIps"]),
                ("request.auth.claims[groups]", ["groups", "notGroups"]),
            ];
            for (property, fields) in rivals {
                if fields.iter().any(|field| subject.get(field).is_some())
                    && let Some(properties) = subject.get_mut("properties").and_then(Value::as_object_mut)
                {
                    properties.remove(property);
                }
            }
            if subject == json!({"properties": {}}) {
                json!({"user": "allAuthenticatedUsers"})
            } else {
                subject
            }
        })
        .boxed()
}

fn binding() -> impl Strategy<Value = Document> {
    (
        one_of(&["apps", "apps", "apps", "other"]),
        one_of(&["b1", "b2", "b3"]),
        one_of(&["r1", "r1", "r2", "r9"]),
        vec(subject(), 1..3),
        option::weighted(0.2, one_of(&["ENFORCED", "PERMISSIVE"])),
        prop::bool::weighted(0.05),
    )
        .prop_map(|(namespace, name, role, subjects, mode, is_broken)| {
            let subjects = if is_broken { Vec::new() } else { subjects };
            let mut spec = json!({"subjects": subjects, "roleRef": {"kind": "ServiceRole", "name": role}});
            if let Some(mode) = mode {
                spec["mode"] = mode.into();
            }
            document("ServiceRoleBinding", &namespace, &name, None, spec, is_broken)
        })
}

fn authorization() -> impl Strategy<Value = Document> {
    let token_principal = one_of(&[
        "https://a.test/ann",
        "*",
        "https://a.test/*",
        "*/ann",
        "b/bob smith",
        "b/*",
        "x",
        "https://a.test/",
    ]);
    let account = one_of(&["front", "apps/front", "other/a", "*", "apps/*", "web-sa", "fr*"]);
    let domain = near(&["cluster.local", "old.local", "td.example"]);
    let source = vec![
        field("principals", 0.25, list(principal())),
        field("notPrincipals", 0.15, list(principal())),
        field("requestPrincipals", 0.15, list(token_principal.clone())),
        field("notRequestPrincipals", 0.1, list(token_principal.clone())),
        field("namespaces", 0.25, list(namespace())),
        field("notNamespaces", 0.15, list(namespace())),
        field("ipBlocks", 0.1, list(network())),
        field("notIpBlocks", 0.1, list(network())),
        field("remoteIpBlocks", 0.05, list(network())),
        field("serviceAccounts", 0.1, list(account.clone())),
        field("notServiceAccounts", 0.1, list(account.clone())),
        field("trustDomains", 0.1, list(domain.clone())),
        field("notTrustDomains", 0.1, list(domain.clone())),
    ];
    let source =
        filled_object(source, json!({"namespaces": ["*"]})).prop_map(|source| json!({ "source": source }));
    let port = one_of(&["8080", "9000", "7000", "80", "70000", "x"]);
    let path = prop_oneof![2 => path_pattern(), 1 => template()];
    let host = near(&["web.example.com", "WEB"]);
    let method = near(&["GET", "POST"]);
    let operation = vec![
        field("hosts", 0.15, list(host.clone())),
        field("notHosts", 0.1, list(host)),
        field("ports", 0.25, list(port.clone())),
        field("notPorts", 0.1, list(port.clone())),
        field("methods", 0.3, list(method.clone())),
        field("notMethods", 0.15, list(method)),
        field("paths", 0.3, list(path.clone())),
        field("notPaths", 0.15, list(path)),
    ];
    let operation = filled_object(operation, json!({"methods": ["*"]}))
        .prop_map(|operation| json!({ "operation": operation }));
    let keyed = |key: &'static str, values: BoxedStrategy<Value>| {
        (option::weighted(0.7, values.clone()), option::weighted(0.3, values))
            .prop_filter_map("one of both", move |(values, not_values)| {
                let mut condition = json!({"key": key});
                if values.is_none() && not_values.is_none() {
                    return None;
                }
                for (name, values) in [("values", values), ("notValues", not_values)] {
                    if let Some(values) = values {
                        condition[name] = values;
                    }
                }
                Some(condition)
            })
            .boxed()
    };
    let condition = prop_oneof![
        keyed("source.ip", list(network())),
        keyed("remote.ip", list(network())),
        keyed("source.namespace", list(namespace())),
        keyed("source.principal", list(principal())),
        keyed("source.serviceAccount", list(account)),
        keyed("source.trustDomain", list(domain)),
        keyed("destination.ip", list(network())),
        keyed("destination.port", list(port)),
        keyed("connection.sni", list(near(&["web.apps"]))),
        keyed("request.headers[X-A]", list(near(&["v", "a-v"]))),
        keyed("request.headers[host]", list(near(&["web.example.com"]))),
        keyed("request.auth.principal", list(token_principal)),
        keyed("request.auth.audiences", list(near(&["x", "y"]))),
        keyed("request.auth.presenter", list(near(&["presenter"]))),
        keyed("request.auth.claims[groups]", list(near(&["g1", "g2"]))),
        keyed("request.auth.claims[a][b]", list(near(&["v", "w"]))),
        keyed("source.user", list(near(&["x"]))),
    ];
    let rule = (option::of(vec(source, 1..3)), option::of(vec(operation, 1..3)), vec(condition, 0..2))
        .prop_map(|(from, to, when)| {
            let mut rule = json!({});
            if let Some(from) = from {
                rule["from"] = from.into();
            }
            if let Some(to) = to {
                rule["to"] = to.into();
            }
            if !when.is_empty() {
                rule["when"] = when.into();
            }
            rule
        });
    let action = option::weighted(0.8, one_of(&["ALLOW", "ALLOW", "DENY", "DENY", "CUSTOM", "AUDIT"]));
    (
        one_of(&["apps", "apps", "istio-system", "other"]),
        one_of(&["k1", "k2", "k3"]),
        option::weighted(0.3, selector()),
        action,
        vec(rule, 0..3),
        prop::bool::weighted(0.15),
        prop::bool::weighted(0.05),
    )
        .prop_map(|(namespace, name, selector, action, rules, is_dry_run, is_broken)| {
            let mut spec = json!({"rules": rules});
            if let Some(selector) = selector {
                spec["selector"] = selector;
            }
            if action.as_deref() == Some("CUSTOM") {
                spec["provider"] = json!({"name": "x"});
            }
            if let Some(action) = action {
                spec["action"] = action.into();
            }
            if is_broken {
                spec["rules"] = json!([{"from": []}]);
            }
            let mut document = document("AuthorizationPolicy", &namespace, &name, None, spec, is_broken);
            if is_dry_run && !is_broken {
                document.value["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
            }
            document
        })
}
