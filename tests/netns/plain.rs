//! The world without a mesh: what the other scenarios stand on, and the control for "no plaintext on the wire".

use world::World;
use world::pod::{FAMILIES, Plan};
use world::protocol::{Connect, Mode, Payload};

const NEEDLE: &str = "needle in the clear ";

#[test]
fn bytes_between_the_nodes_are_seen_on_the_wire() {
    const MIB: u64 = 1024 * 1024;
    let world = World::new();
    let (a, b) = (world.node("node-a"), world.node("node-b"));
    let client = world.pod(&a, Plan::new("photo", "client"));
    let server = world.pod(&b, Plan::new("photo", "server"));
    let listener = server.serve(9000, Mode::Bulk);
    for family in FAMILIES {
        let capture = world.capture(&a, NEEDLE);
        let connection = client.connect(Connect::to(server.at(family, 9000)));
        let took =
            client.bulk(&connection, Payload::repeated(100 * MIB, NEEDLE), Payload::seeded(100 * MIB, 7));
        println!("100 MiB each way: {:?}", took.expect("every byte arrives"));
        let seen = capture.stop();
        assert_eq!(seen.missed, 0, "the capture misses nothing");
        assert!(seen.plaintext_bytes() >= 200 * MIB, "{} bytes seen", seen.plaintext_bytes());
        assert!(seen.needles > 1000, "{} needles", seen.needles);
    }
    let peers = server.wait_accepted(listener, 0, 2, true);
    assert_eq!(peers[0].peer.ip().to_canonical(), client.v4());
    assert_eq!(peers[1].peer.ip(), client.v6());
}
