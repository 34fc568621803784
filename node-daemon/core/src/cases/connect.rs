//! `connect`: both steps, from raw facts or from a client and its DestinationRules (policy A-7, B, C).

use std::sync::Arc;

use spiffe_id::SpiffeId;

use super::{
    authenticate::{Arrived, CaseRequest, NOT_DECLARED, Offered, arrive, is_probe, not_declared, offered},
    authorize::{allowed, closed, refused},
    check::{Check, Found},
    client::{UPSTREAM_FAILED, server_mode_of},
    fields::InvalidCases,
    world::World,
};
use crate::{
    policy::{
        Chosen, ClientFacts, ClientMode, ClientSetting, ConnectionFacts, Presented, RequestDenialKind,
        client_tls, reason,
        trial::{Given, Refusal},
    },
    workload::{Protocol, TransportMode},
};

/// How a case says who connects.
enum Caller {
    Facts(Offered),
    /// With its name; its proxy, if it has one, tells it of failures.
    Client {
        id: SpiffeId,
        offered: Offered,
        reaches: bool,
        is_proxied: bool,
    },
}

pub(super) fn connect(check: &Check<'_>) -> Result<Found, InvalidCases> {
    let world = World::new(check)?;
    let request = CaseRequest::read(check, &world)?;
    let mut found = Found::default();
    let caller = caller(check, &world)?;
    let (arrived, is_proxied) = match &caller {
        Caller::Facts(offered) => (arrive(check, &world, *offered)?, false),
        Caller::Client { reaches: false, is_proxied, .. } => {
            let (policy, _) = selected(&world);
            (Arrived::Failed(policy, "client and server do not speak the same".to_owned()), *is_proxied)
        }
        Caller::Client { id, offered, is_proxied, .. } => {
            let presented = match offered {
                Offered::Mesh => Presented::Tunnel(id.clone()),
                Offered::Plaintext | Offered::Unproven | Offered::Application => Presented::Plaintext,
            };
            let facts = ConnectionFacts {
                presented,
                source_address: world.source_address,
                destination_address: world.destination_address,
                destination_port: world.port,
                destination: Arc::clone(&world.workload),
            };
            (world.arrive(facts, *offered), *is_proxied)
        }
    };
    match arrived {
        Arrived::Probe if !is_probe(&request.facts(), world.protocol) => {
            refused(&mut found, "DENY", &not_declared(&request.facts()));
            found.reason = Some(NOT_DECLARED.to_owned());
        }
        Arrived::Probe => {
            allowed(&mut found, world.protocol, check.case.request.text("request.path")?.as_deref());
            found.reason = Some("a declared probe of the kubelet".to_owned());
        }
        Arrived::Failed(policy, reason) => {
            failed(&mut found, world.protocol, is_proxied);
            found.policy = policy;
            found.reason = Some(reason);
        }
        Arrived::Through(facts) if !matches!(facts.presented, Presented::Plaintext) => {
            // Inside the tunnel the request can be read; who sends it is hidden (policy B-9).
            judge(&world, &facts, &request, &mut found);
        }
        Arrived::Through(_) => stream(&world, None, &mut found),
        Arrived::As(facts) => judge(&world, &facts, &request, &mut found),
    }
    Ok(found)
}

fn selected(world: &World) -> (Option<String>, TransportMode) {
    let (policy, mode) =
        world.compiled.selected(&world.workload, world.port).unwrap_or((None, TransportMode::Strict));
    (policy.map(|label| label.to_string()), mode)
}

fn judge(world: &World, facts: &ConnectionFacts, request: &CaseRequest, found: &mut Found) {
    if world.protocol == Protocol::Tcp {
        stream(world, Some(facts), found);
        return;
    }
    let explained = world.compiled.explain(facts, Some(&request.facts()));
    match world.compiled.judge_request(facts, &request.facts()) {
        Ok(permit) => {
            allowed(found, world.protocol, permit.upstream_path());
            found.decided(permit.verdict(), Some(reason(None, &explained.considered)));
        }
        Err(denial) => {
            refused(found, "DENY", &denial);
            if matches!(denial.kind, RequestDenialKind::Unauthenticated(_)) {
                found.also = Some(("verdict", "UNAUTHENTICATED"));
            }
            let fault = denial.token_fault.map(|fault| format!(": {fault}")).unwrap_or_default();
            let label = format!("{}{fault}", denial.reason.label());
            let why = match denial.kind {
                RequestDenialKind::Denied => reason(Some(&label), &explained.considered),
                RequestDenialKind::BadPath(_) | RequestDenialKind::Unauthenticated(_) => label,
            };
            found.decided(&denial.verdict, Some(why));
        }
    }
}

/// Bytes that nobody takes apart.
fn stream(world: &World, facts: Option<&ConnectionFacts>, found: &mut Found) {
    let (_, mode) = selected(world);
    let peer = facts.and_then(|facts| match (&facts.presented, mode) {
        (_, TransportMode::Disabled) | (Presented::Plaintext, _) => None,
        (Presented::Tunnel(id) | Presented::Attested(id) | Presented::MeshTls { peer: id, .. }, _) => {
            Some(id)
        }
    });
    let principal = peer.map(SpiffeId::principal);
    let server_name = facts.and_then(|facts| match &facts.presented {
        Presented::MeshTls { server_name, .. } => server_name.as_deref(),
        Presented::Tunnel(_) | Presented::Attested(_) | Presented::Plaintext => None,
    });
    let given = Given {
        principal: principal.as_deref(),
        namespace: None,
        source_address: world.source_address,
        destination_address: world.destination_address,
        destination_port: world.port,
        server_name,
        metadata: None,
        request: None,
    };
    let judged = world.compiled.judge_given(&world.workload, &given);
    let refusal = match &judged.answer {
        Ok(_) => {
            allowed(found, Protocol::Tcp, None);
            None
        }
        Err(Refusal::Connection(reason)) => {
            closed(found, "DENY");
            Some(reason.label())
        }
        Err(Refusal::Request(denial)) => {
            refused(found, "DENY", denial);
            Some(denial.reason.label())
        }
    };
    found.decided(&judged.verdict, Some(reason(refusal, &judged.considered)));
}

/// A client without a proxy sees the connection end; a proxy answers for it (policy C).
fn failed(found: &mut Found, protocol: Protocol, is_proxied: bool) {
    found.also = Some(("verdict", "CONNECTION_FAILED"));
    match (protocol, is_proxied) {
        (Protocol::Http | Protocol::Grpc, true) => {
            found.set("verdict", "DENY");
            found.set("http_status", 503);
            found.set("body", UPSTREAM_FAILED);
        }
        (Protocol::Tcp, _) | (_, false) => closed(found, "DENY"),
    }
}

fn caller(check: &Check<'_>, world: &World) -> Result<Caller, InvalidCases> {
    let request = &check.case.request;
    if !request.has("client.workload") && !request.has("client.proxied") {
        return Ok(Caller::Facts(offered(request)?));
    }
    let (id, namespace) = client(check, world)?;
    let is_proxied = request.flag("client.proxied")?.unwrap_or(true);
    if !is_proxied {
        return Ok(Caller::Client { id, offered: Offered::Plaintext, reaches: true, is_proxied });
    }
    let (_, mode) = selected(world);
    let server = server_mode_of(mode);
    let identities = [world.workload.identity.to_string()];
    let rules = check.policies.objects.client_rules();
    let own = &*world.workload.name.namespace;
    let namespaces = [namespace.as_str(), own, check.file.mesh.root_namespace.as_str()];
    let setting = world.host.as_deref().map_or(ClientSetting::Unsaid, |host| {
        rules.setting(host, world.service_port, Chosen::Labelled(&world.workload.labels), namespaces)
    });
    let rule = match setting {
        ClientSetting::Unsaid => None,
        ClientSetting::Tls(said) => Some(&**said.settings),
        ClientSetting::Refused { .. } => {
            return Ok(Caller::Client { id, offered: Offered::Plaintext, reaches: false, is_proxied });
        }
    };
    let tls = client_tls(&ClientFacts {
        rule,
        // Between enrolled workloads the mesh's TLS is always spoken, unless a rule says otherwise.
        auto_mtls: request.flag("auto_mtls")?.unwrap_or(true),
        mesh_external: false,
        server,
        endpoint_enrolled: true,
        identities: &identities,
        default_sni: None,
    });
    let offered = match tls.mode {
        ClientMode::IstioMutual => Offered::Mesh,
        ClientMode::Plaintext => Offered::Plaintext,
        ClientMode::Simple | ClientMode::Mutual => Offered::Application,
    };
    Ok(Caller::Client { id, offered, reaches: tls.reaches(server), is_proxied })
}

/// `name`, `name.namespace` or `namespace/name`; without a word the destination's namespace.
fn client(check: &Check<'_>, world: &World) -> Result<(SpiffeId, String), InvalidCases> {
    let request = &check.case.request;
    let written = request.text("client.workload")?.unwrap_or_else(|| "client".to_owned());
    let (name, own) = match (written.split_once('/'), written.split_once('.')) {
        (Some((namespace, name)), _) => (name, Some(namespace)),
        (None, Some((name, rest))) => (name, rest.split('.').next()),
        (None, None) => (written.as_str(), None),
    };
    let said = match request.text("client.namespace")? {
        Some(namespace) => Some(namespace),
        None => request.text("source.namespace")?,
    };
    let of_identity = request.text("client.identity")?;
    let expected = "an identity such as cluster.local/ns/photo/sa/frontend";
    if let Some(text) = of_identity {
        let id: SpiffeId = format!("spiffe://{}", text.trim_start_matches("spiffe://"))
            .parse()
            .map_err(|_| request.invalid("client.identity", expected))?;
        let namespace = own.map(str::to_owned).or(said).unwrap_or_else(|| id.namespace().to_owned());
        return Ok((id, namespace));
    }
    let namespace =
        own.map(str::to_owned).or(said).unwrap_or_else(|| world.workload.name.namespace.to_string());
    let id = SpiffeId::new(check.file.mesh.trust_domain.clone(), &namespace, name)
        .map_err(|_| request.invalid("client.workload", "the name of a workload"))?;
    Ok((id, namespace))
}
