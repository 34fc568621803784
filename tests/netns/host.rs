//! A service on a host: a process in a control group of its own and in the node's network namespace.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use world::pod::{FAMILIES, Family, Plan};
use world::protocol::{Connect, Listen, Mode};

use crate::cases::Cases;
use crate::photo::{ECHO, HTTP, NEEDLE, Photo};
use crate::policies::STRICT;

/// The host service's own port.
const LEDGER: u16 = 7000;

/// Another port of it, at which it listens at loopback only.
const VAULT: u16 = 7001;

/// Nobody may reach the namespace of the service.
const NOBODY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: books}
spec: {}
";

fn loopback(family: Family, port: u16) -> SocketAddr {
    match family {
        Family::V4 => (Ipv4Addr::LOCALHOST, port).into(),
        Family::V6 => (Ipv6Addr::LOCALHOST, port).into(),
    }
}

#[test]
fn host() {
    let photo = Photo::prepare(&[("strict.yaml", STRICT)]);
    let plan = Plan::new("books", "ledger").port("http", LEDGER).port("http-vault", VAULT);
    let ledger = photo.world.host(&photo.b, plan);
    ledger.serve_http(LEDGER, "ledger");
    for family in FAMILIES {
        ledger.listen(Listen { text: "vault".to_owned(), ..Listen::at(loopback(family, VAULT), Mode::Http) });
    }
    let neighbour = photo.world.host(&photo.b, Plan::new("books", "neighbour").outside());
    photo.world.start_ca();
    photo.world.start_daemons_of(&[&photo.a, &photo.b]);
    let mut cases = Cases::of("host");

    for family in FAMILIES {
        cases.case(&format!("a pod of another node reaches it, proven and encrypted ({family:?})"), || {
            let capture = photo.world.capture(&photo.a, NEEDLE);
            let watch = photo.b.watch();
            let asked = photo.frontend.http(ledger.at(family, LEDGER));
            assert!(asked.text.contains("ledger peer="), "{asked:?}");
            assert!(
                asked.text.contains(&photo.frontend.ip(family).to_string()),
                "the true client: {asked:?}"
            );
            let line = watch.served("inbound", &[("path", "tunnel"), ("destination.workload", "ledger")]);
            assert!(world::expect::is(&line, "source.identity", &photo.frontend.identity()), "{line}");
            capture.stop().assert_no_plaintext();
        });
        cases.case(&format!("it reaches a pod of another node, proven and encrypted ({family:?})"), || {
            let capture = photo.world.capture(&photo.a, NEEDLE);
            let watch = photo.a.watch();
            let connection = ledger.connect(Connect::to(photo.backend.at(family, ECHO)));
            assert_eq!(ledger.exchange(&connection, NEEDLE).as_deref(), Ok(NEEDLE));
            ledger.close(&connection);
            let line =
                watch.served("inbound", &[("path", "tunnel"), ("destination.workload", "photo-backend")]);
            assert!(world::expect::is(&line, "source.identity", &ledger.identity()), "{line}");
            capture.stop().assert_no_plaintext();
        });
        cases.case(&format!("it reaches a pod of its own node ({family:?})"), || {
            let asked = ledger.http(photo.datastore.at(family, HTTP));
            assert!(asked.text.contains("datastore peer="), "{asked:?}");
        });
        cases.case(&format!("a process of another control group is refused (T-27, {family:?})"), || {
            let watch = photo.b.watch();
            let asked = neighbour.http(ledger.at(family, LEDGER));
            assert_eq!(asked.text, "", "an own address is no pass here: {asked:?}");
            watch.refused("inbound", "plaintext_refused", &[("destination.workload", "ledger")]);
        });
        cases.case(
            &format!("a process of another control group is refused at loopback (T-27, {family:?})"),
            || {
                for port in [LEDGER, VAULT] {
                    let watch = photo.b.watch();
                    let asked = neighbour.http(loopback(family, port));
                    assert_eq!(asked.text, "", "loopback is no pass here: {asked:?}");
                    watch.refused("inbound", "plaintext_refused", &[("destination.workload", "ledger")]);
                }
            },
        );
        cases.case(
            &format!("what listens at loopback only is not reached from elsewhere (T-27, {family:?})"),
            || {
                let watch = photo.b.watch();
                let asked = photo.frontend.http(ledger.at(family, VAULT));
                assert_eq!(asked.text, "", "{asked:?}");
                watch.line(&[("direction", "inbound"), ("reason", "nothing_listening")]);
            },
        );
        cases.case(&format!("a stranger's pod is refused ({family:?})"), || {
            let asked = photo.stranger.http(ledger.at(family, LEDGER));
            assert_eq!(asked.text, "", "{asked:?}");
        });
    }
    cases.case("the host's other ports are untouched", || {
        let listener = neighbour.serve(0, Mode::Echo);
        let connection = photo.outside.connect(Connect::to(neighbour.at(Family::V4, listener.port)));
        assert_eq!(photo.outside.exchange(&connection, "plain").as_deref(), Ok("plain"));
        let accepted = neighbour.accepted(listener);
        assert_eq!(accepted[0].peer.ip().to_canonical(), photo.outside.ip(Family::V4));
    });
    cases.case("the host's other processes connect as without the mesh", || {
        let connection = neighbour.connect(Connect::to(photo.outside.at(Family::V4, ECHO)));
        assert_eq!(neighbour.exchange(&connection, "plain").as_deref(), Ok("plain"));
    });
    // A second service at the same address: only the kernel can tell the two apart.
    let watch = photo.b.watch();
    let clerk = photo.world.host(&photo.b, Plan::new("books", "clerk"));
    watch.event("workload enrolled", &[("workload", "books/clerk")]);
    for family in FAMILIES {
        cases.case(
            &format!("an enrolled process of another control group is judged as itself (T-27, {family:?})"),
            || {
                let watch = photo.b.watch();
                let asked = clerk.http(ledger.at(family, LEDGER));
                assert!(asked.text.contains("ledger peer="), "{asked:?}");
                let line = watch.served("inbound", &[("destination.workload", "ledger")]);
                assert!(world::expect::is(&line, "source.identity", &clerk.identity()), "{line}");
            },
        );
    }
    for family in FAMILIES {
        cases.case(&format!("at loopback, too, it is judged as itself (T-27, {family:?})"), || {
            for (port, text) in [(LEDGER, "ledger peer="), (VAULT, "vault peer=")] {
                let watch = photo.b.watch();
                let at = loopback(family, port);
                let asked = clerk.http(at);
                assert!(asked.text.contains(text), "{asked:?}");
                assert!(asked.text.contains(&at.ip().to_string()), "the true client: {asked:?}");
                let line = watch.served("inbound", &[("destination.workload", "ledger")]);
                assert!(world::expect::is(&line, "source.identity", &clerk.identity()), "{line}");
            }
        });
    }
    cases.case("a service that talks to itself is left alone, whatever the policy (T-27)", || {
        photo.apply("nobody.yaml", NOBODY);
        for family in FAMILIES {
            for at in [loopback(family, LEDGER), loopback(family, VAULT), ledger.at(family, LEDGER)] {
                let watch = photo.b.watch();
                let refused = clerk.http(at);
                assert_eq!(refused.text, "", "{at}: {refused:?}");
                watch.refused("inbound", "no_rule_allows", &[("destination.workload", "ledger")]);
                let asked = ledger.http(at);
                assert!(asked.text.contains(" peer="), "{at}: {asked:?}");
                assert_eq!(
                    watch.lines(&[("destination.workload", "ledger")]).len(),
                    1,
                    "the daemon is not asked"
                );
            }
        }
        photo.withdraw("nobody.yaml");
    });
    cases.end();
}
