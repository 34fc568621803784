//! The evaluator that enforces against the naive one, over random policies, workloads and requests.
//!
//! A disagreement is printed with its shrunk documents, and its seed is kept in `disagreements.txt` beside this file:
//! it is tried first ever after. `ORACLE_CASES` sets how many are tried.

mod client;
mod worlds;

use std::{collections::BTreeMap, env, path::PathBuf, sync::Arc};

use node_core::{
    decode::{self, Source},
    policy::{
        Admission, Compiled, ConnectionFacts, Inventory, PolicyObjects, Presented, RequestFacts,
        Verdict as Given, compile,
        tokens::{Algorithm, KeySource, Signatures, TokenFault, Tokens},
    },
    workload::{
        Mesh, ObjectName, Placement, Protocol as Spoken, Service, ServicePort, TargetPort, TransportMode,
        Workload, WorkloadPort,
    },
};
use policy_oracle::facts::{Mode, Outcome, Peer, Protocol, Verdict, World};
use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, FileFailurePersistence, RngAlgorithm, TestError, TestRng, TestRunner},
};
use spiffe_id::SpiffeId;
use worlds::{Asked, NOW, asked, path};

/// How many questions are asked: some ten seconds.
const CASES: u32 = 6000;

/// How many a mutation may survive at most.
const MUTANT_CASES: u32 = 20_000;

const NODE: &str = "n";

/// Stands where cryptography would: the signature is a word.
struct Words;

impl Signatures for Words {
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

/// What the evaluator that enforces does.
#[derive(Debug)]
enum Enforced {
    Closed(Given),
    /// As a whole: nobody looks at requests.
    Stream(Given),
    Refused(u16, Given),
    Delivered {
        path: Option<String>,
        principal: Option<String>,
        peer: Option<String>,
        verdict: Given,
    },
}

fn enforce(asked: &Asked) -> Result<Enforced, String> {
    let (compiled, workload) = compiled(&asked.world)?;
    let connection = &asked.connection;
    let presented = match (&connection.peer, &connection.server_name) {
        (None, _) => Presented::Plaintext,
        (Some(peer), None) => Presented::Tunnel(identity(peer)),
        (Some(peer), server_name) => {
            Presented::MeshTls { peer: identity(peer), server_name: server_name.clone() }
        }
    };
    let facts = ConnectionFacts {
        presented,
        source_address: connection.source,
        destination_address: asked.world.workload.address,
        destination_port: connection.port,
        destination: Arc::clone(&workload),
    };
    let lines: Vec<(&str, &str)> =
        asked.request.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let headers = &lines[..];
    let path = asked.request.path.as_deref();
    let tokens = compiled
        .token_rules(&workload, connection.port)
        .map_or_else(Tokens::none, |rules| rules.verify(rules.locate(path, &headers), NOW, &Words));
    let request = RequestFacts {
        method: &asked.request.method,
        path,
        host: asked.request.host.as_deref(),
        headers: &headers,
        tokens: &tokens,
    };
    Ok(match compiled.admit(&facts) {
        Err(denial) => Enforced::Closed(denial.verdict),
        Ok(Admission::Stream(permit)) => Enforced::Stream(permit.verdict().clone()),
        Ok(Admission::Requests) => match compiled.judge_request(&facts, &request) {
            Ok(permit) => Enforced::Delivered {
                path: permit.upstream_path().map(str::to_owned),
                principal: permit.attributes().principal.clone(),
                peer: permit.attributes().source_principal.clone(),
                verdict: permit.verdict().clone(),
            },
            Err(denial) => {
                let answer = denial.answer();
                let status = match answer.grpc {
                    None => answer.status,
                    Some((16, _)) => 401,
                    Some((7, _)) => 403,
                    Some((3, _)) => 400,
                    Some((code, _)) => return Err(format!("gRPC status {code}")),
                };
                let is_grpc = lines.iter().any(|(name, value)| {
                    name.eq_ignore_ascii_case("content-type") && value.starts_with("application/grpc")
                });
                if is_grpc != answer.grpc.is_some() || (is_grpc && answer.status != 200) {
                    return Err(format!("the answer is not of the client's protocol: {answer:?}"));
                }
                Enforced::Refused(status, denial.verdict.clone())
            }
        },
    })
}

fn compiled(world: &World) -> Result<(Compiled, Arc<Workload>), String> {
    let mut objects = PolicyObjects::new();
    for (index, document) in world.documents.iter().enumerate() {
        let object = decode::object(document.value.clone(), Source::new("random.yaml", index))
            .map_err(|invalid| format!("no head: {invalid}"))?;
        let inserted = objects.insert(&object);
        if inserted.is_ok() == document.is_broken {
            return Err(format!(
                "meant to be broken: {}, got {inserted:?}: {}",
                document.is_broken, document.value
            ));
        }
    }
    let own = &world.workload;
    let workload = Arc::new(Workload {
        name: ObjectName::new(&own.namespace, &own.name),
        labels: own.labels.clone(),
        annotations: BTreeMap::new(),
        service_account: own.account.clone(),
        identity: identity(&Peer {
            domain: world.trust_domain.clone(),
            namespace: own.namespace.clone(),
            account: own.account.clone(),
        }),
        node: NODE.to_owned(),
        addresses: vec![own.address],
        placement: Placement::NetworkNamespace(PathBuf::from("/run/netns/x")),
        ports: own
            .ports
            .iter()
            .map(|(port, protocol)| WorkloadPort { name: None, port: *port, protocol: spoken(*protocol) })
            .collect(),
        exempt_inbound_ports: Vec::new(),
        enrolled: true,
    });
    let mut mesh = Mesh::defaults(world.trust_domain.parse().map_err(|_| "no trust domain")?);
    mesh.trust_domain_aliases = world.aliases.iter().filter_map(|alias| alias.parse().ok()).collect();
    mesh.root_namespace.clone_from(&world.root_namespace);
    mesh.default_mode = match world.default_mode {
        Mode::Disabled => TransportMode::Disabled,
        Mode::Permissive => TransportMode::Permissive,
        Mode::Strict => TransportMode::Strict,
    };
    let services = world.services.iter().map(|service| Service {
        name: ObjectName::new(&service.namespace, &service.name),
        annotations: BTreeMap::new(),
        addresses: Vec::new(),
        selector: service.selector.clone(),
        ports: service
            .ports
            .iter()
            .map(|port| ServicePort {
                name: Some(port.name.clone()),
                port: port.port,
                target: TargetPort::Number(port.target),
                protocol: spoken(port.protocol),
            })
            .collect(),
    });
    let services: BTreeMap<_, _> = services.map(|service| (service.name.clone(), service)).collect();
    let workloads = BTreeMap::from([(workload.name.clone(), Arc::clone(&workload))]);
    let inventory = Inventory { mesh: &mesh, workloads: &workloads, services: &services, node: NODE };
    Ok((compile(&objects, &inventory), workload))
}

fn identity(peer: &Peer) -> SpiffeId {
    let domain = peer.domain.parse().expect("a trust domain");
    SpiffeId::new(domain, &peer.namespace, &peer.account).expect("an identity")
}

fn spoken(protocol: Protocol) -> Spoken {
    match protocol {
        Protocol::Tcp => Spoken::Tcp,
        Protocol::Http => Spoken::Http,
    }
}

/// `Err`: how the two differ.
fn compare(asked: &Asked, naive: &Verdict, enforced: &Enforced) -> Result<(), String> {
    let is_http = asked.world.protocol(asked.connection.port) == Protocol::Http;
    let same = match (&naive.outcome, enforced) {
        (Outcome::Closed, Enforced::Closed(_)) => true,
        // Where no rule asks about requests, a denial is the connection's.
        (Outcome::Refused(403 | 400), Enforced::Closed(_)) => is_http,
        (Outcome::Refused(naive), Enforced::Refused(enforced, _)) => naive == enforced,
        // Nor does anybody look at their paths.
        (Outcome::Refused(400) | Outcome::Delivered(_), Enforced::Stream(_)) => true,
        (Outcome::Delivered(naive), Enforced::Delivered { path, .. }) => naive == path,
        _ => false,
    };
    if !same {
        return Err(format!("naive {:?}, enforced {enforced:?}", naive.outcome));
    }
    if let Enforced::Delivered { principal, peer, .. } = enforced {
        let own = naive.peer.as_ref().map(Peer::principal);
        if (&naive.principal, &own) != (principal, peer) {
            return Err(format!("naive {:?} {own:?}, enforced {principal:?} {peer:?}", naive.principal));
        }
    }
    let verdict = match enforced {
        Enforced::Closed(verdict) | Enforced::Stream(verdict) | Enforced::Refused(_, verdict) => verdict,
        Enforced::Delivered { verdict, .. } => verdict,
    };
    let is_allowed = matches!(naive.outcome, Outcome::Delivered(_));
    if let Some(naive) = naive.would_be {
        let enforced = verdict.shadow.as_ref().map_or(is_allowed, |shadow| shadow.allowed);
        if naive != enforced {
            return Err(format!(
                "if everything were enforced: naive {naive}, enforced {enforced}: {verdict:?}"
            ));
        }
    }
    Ok(())
}

/// Where the specification says nothing, or both answers are its.
fn is_open(asked: &Asked) -> bool {
    // Under no transport policy a stranger is nobody on HTTP, and on TCP is turned away: the tunnel knows no strangers.
    let is_foreign =
        asked.connection.peer.as_ref().is_some_and(|peer| !asked.world.domains().contains(&peer.domain));
    let is_tcp = asked.world.protocol(asked.connection.port) == Protocol::Tcp;
    is_foreign && is_tcp
}

fn check(asked: &Asked, read: impl Fn(&Asked) -> Asked) -> Result<(), TestCaseError> {
    let seen = read(asked);
    let naive = policy_oracle::judge(&seen.world, &seen.connection, &seen.request);
    let enforced = enforce(asked).map_err(TestCaseError::fail)?;
    let differ = |how: String| {
        let documents: Vec<String> =
            asked.world.documents.iter().map(|each| each.value.to_string()).collect();
        TestCaseError::fail(format!(
            "{how}\n{}\n{:?}\n{:?}",
            documents.join("\n---\n"),
            asked.connection,
            asked.request
        ))
    };
    compare(asked, &naive, &enforced).map_err(differ)
}

/// The question is told by the reason: its documents, connection and request.
#[track_caller]
fn agreed<T>(result: Result<(), TestError<T>>) {
    match result {
        Ok(()) => {}
        Err(TestError::Fail(reason, _)) => panic!("{reason}"),
        Err(TestError::Abort(reason)) => panic!("given up: {reason}"),
    }
}

/// Of questions whose seed is printed and not kept.
fn config(cases: u32) -> Config {
    Config { cases, failure_persistence: None, ..Config::default() }
}

fn cases() -> u32 {
    env::var("ORACLE_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(CASES)
}

#[test]
fn the_two_evaluators_agree() {
    let kept = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/agree/disagreements.txt");
    let config = Config {
        cases: cases(),
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(kept))),
        max_shrink_iters: 20_000,
        ..Config::default()
    };
    let mut runner = TestRunner::new(config);
    let result = runner.run(&asked(), |asked| {
        prop_assume!(!is_open(&asked));
        check(&asked, Asked::clone)
    });
    agreed(result);
}

/// The form of a path, apart: many more of them.
#[test]
fn a_path_has_one_form() {
    // policy B-5, T-22
    let mut runner = TestRunner::new(config(cases() * 4));
    let any_path = prop_oneof![4 => path(), 1 => "/[%2e./a\\\\?#]{0,12}", 1 => "\\PC{0,8}"];
    let result = runner.run(&(any_path, prop_oneof![Just("GET"), Just("OPTIONS")]), |(path, method)| {
        let mut asked = plain(&path);
        asked.request.method = method.to_owned();
        check(&asked, Asked::clone)?;
        // What is forwarded is its own form: nobody behind reads it otherwise.
        if let Ok(once) = policy_oracle::path::normalise(&path, method) {
            prop_assert_eq!(policy_oracle::path::normalise(&once.upstream, method), Ok(once.clone()));
        }
        Ok(())
    });
    agreed(result);
}

/// A request that only its path can fail.
fn plain(path: &str) -> Asked {
    let mut runner = TestRunner::new(config(1));
    let mut asked = asked().new_tree(&mut runner).expect("a world").current();
    let rules = r#"{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "a", "namespace": "apps"},
        "spec": {"rules": [{"to": [{"operation": {"notPaths": ["/admin*", "*/b"]}}]}]}}"#;
    let value = serde_json::from_str(rules).expect("a document");
    asked.world.documents = vec![policy_oracle::facts::Document { value, is_broken: false }];
    asked.world.default_mode = Mode::Permissive;
    asked.connection.peer = None;
    asked.connection.server_name = None;
    asked.connection.port = 7070;
    asked.request.path = Some(path.to_owned());
    asked.request.headers.clear();
    asked.request.tokens.clear();
    asked
}

/// A reading of the specification with one error in it is found out.
#[track_caller]
fn is_found_out(name: &str, misread: Misread) {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let config = Config {
        cases: MUTANT_CASES,
        failure_persistence: None,
        max_shrink_iters: 0,
        max_global_rejects: MUTANT_CASES,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, rng);
    let result = runner.run(&asked(), |asked| {
        prop_assume!(!is_open(&asked));
        check(&asked, misread)
    });
    assert!(result.is_err(), "{name}: nobody noticed in {MUTANT_CASES} questions");
}

/// A reading with an error in it.
type Misread = fn(&Asked) -> Asked;

/// The documents, changed before the naive evaluator reads them.
fn rewritten(asked: &Asked, rewrite: impl Fn(&mut serde_json::Value)) -> Asked {
    let mut asked = asked.clone();
    for document in &mut asked.world.documents {
        rewrite(&mut document.value["spec"]);
    }
    asked
}

/// Every mapping inside a value.
fn each_mapping(
    value: &mut serde_json::Value,
    change: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>),
) {
    use serde_json::Value;
    match value {
        Value::Object(map) => {
            change(map);
            map.values_mut().for_each(|value| each_mapping(value, change));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| each_mapping(value, change)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn without_key(asked: &Asked, key: &'static str) -> Asked {
    rewritten(asked, |spec| each_mapping(spec, &|map| drop(map.remove(key))))
}

#[test]
fn an_error_in_either_evaluator_is_found_out() {
    let mutants: [(&str, Misread); 16] = [
        ("denials are grants", |asked| {
            rewritten(asked, |spec| {
                if spec["action"] == "DENY" {
                    spec["action"] = "ALLOW".into();
                }
            })
        }),
        ("an audit denies", |asked| {
            rewritten(asked, |spec| {
                if spec["action"] == "AUDIT" {
                    spec["action"] = "DENY".into();
                }
            })
        }),
        ("notPaths is not read", |asked| without_key(asked, "notPaths")),
        ("notPrincipals is not read", |asked| without_key(asked, "notPrincipals")),
        ("constraints are not read", |asked| without_key(asked, "constraints")),
        ("properties are not read", |asked| without_key(asked, "properties")),
        ("audiences are not read", |asked| without_key(asked, "audiences")),
        ("trigger rules are not read", |asked| without_key(asked, "triggerRules")),
        ("the binding of the principal is not read", |asked| without_key(asked, "principalBinding")),
        ("port-level modes are not read", |asked| without_key(asked, "portLevelMtls")),
        ("bindings on trial grant", |asked| without_key(asked, "mode")),
        ("targets have no ports", |asked| {
            rewritten(asked, |spec| {
                for target in
                    spec.get_mut("targets").and_then(|list| list.as_array_mut()).into_iter().flatten()
                {
                    target.as_object_mut().map(|target| target.remove("ports"));
                }
            })
        }),
        ("aliases are not read", |asked| {
            let mut asked = asked.clone();
            asked.world.aliases.clear();
            asked
        }),
        ("signatures are not checked", |asked| {
            let mut asked = asked.clone();
            asked.request.tokens.iter_mut().for_each(|token| token.is_signed_well = true);
            asked
        }),
        ("the clock stands", |asked| {
            let mut asked = asked.clone();
            asked.world.now -= 1;
            asked
        }),
        ("all objects are equally old", |asked| {
            let mut asked = asked.clone();
            for document in &mut asked.world.documents {
                document.value["metadata"].as_object_mut().map(|map| map.remove("creationTimestamp"));
            }
            asked
        }),
    ];
    for (name, misread) in mutants {
        is_found_out(name, misread);
    }
}
