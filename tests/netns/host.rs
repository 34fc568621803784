//! A service on a host: a process in a control group of its own and in the node's network namespace.

use world::pod::{FAMILIES, Family, Plan};
use world::protocol::{Connect, Mode};

use crate::cases::Cases;
use crate::photo::{ECHO, HTTP, NEEDLE, Photo};
use crate::policies::STRICT;

/// The host service's own port.
const LEDGER: u16 = 7000;

#[test]
fn host() {
    let photo = Photo::prepare(&[("strict.yaml", STRICT)]);
    let ledger = photo.world.host(&photo.b, Plan::new("books", "ledger").port("http", LEDGER));
    ledger.serve_http(LEDGER, "ledger");
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
    cases.end();
}
