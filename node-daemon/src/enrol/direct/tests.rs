//! Events of the kernel become lines and counters, each once, in the words of the snapshot that decided.

use node_core::store::{Store, Update};
use serde_json::{Value, json};

use super::*;

const WEB: WorkloadNumber = WorkloadNumber(1);
const DB: WorkloadNumber = WorkloadNumber(2);

/// Two pods of this node; `denied`: the second one is for nobody.
fn documents(denied: bool) -> Vec<Value> {
    let pod = |name: &str, address: &str| {
        json!({
            "apiVersion": "culvert.io/v1alpha1", "kind": "Workload",
            "metadata": {"name": name, "namespace": "photo", "labels": {"app": name}},
            "spec": {"serviceAccount": name, "node": "node-a", "addresses": [address],
                     "networkNamespace": format!("/run/netns/{name}")},
        })
    };
    let nobody = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "nobody", "namespace": "photo"}, "spec": {},
    });
    let mut all = vec![pod("web", "10.8.1.4"), pod("db", "10.8.1.5")];
    all.extend(denied.then_some(nobody));
    all
}

struct World {
    ledger: Ledger,
    events: Sink,
    store: Store,
    refused: BTreeMap<WorkloadNumber, usize>,
}

impl World {
    fn new(denied: bool) -> Self {
        let events = Sink::new();
        let store = Store::new("node-a", "cluster.local".parse().expect("a trust domain"));
        let ledger = Ledger::new(events.clone());
        let mut world = Self { ledger, events, store, refused: BTreeMap::new() };
        world.publish(denied);
        world
    }

    fn publish(&mut self, denied: bool) {
        assert_eq!(self.store.apply(Update::replace("mesh.yaml", documents(denied))), []);
        let snapshot = self.store.snapshot();
        for (number, name) in [(WEB, "web"), (DB, "db")] {
            let workload = snapshot.workload(&node_core::workload::ObjectName::new("photo", name));
            self.ledger.learn(number, workload.expect("declared"));
        }
        self.ledger.judge_by(&snapshot);
    }

    fn tell(&mut self, events: &[DirectEvent]) {
        self.ledger.tell_all(events, &mut self.refused);
    }

    /// The value of the one counter whose line has all of these pieces; 0 without one.
    fn count(&self, pieces: &[&str]) -> u64 {
        let text = self.events.metrics().text().expect("text");
        let mut lines = text.lines().filter(|line| pieces.iter().all(|piece| line.contains(piece)));
        lines
            .next()
            .and_then(|line| line.rsplit(' ').next())
            .map_or(0, |value| value.parse().expect("a number"))
    }

    fn opened(&self) -> u64 {
        self.count(&["istio_tcp_connections_opened_total{reporter=\"source\"", "path=\"direct\""])
    }

    fn closed(&self) -> u64 {
        self.count(&["istio_tcp_connections_closed_total{reporter=\"destination\"", "path=\"direct\""])
    }
}

fn tuple(port: u16) -> Tuple {
    let at = |text: &str| text.parse().expect("an address");
    Tuple::new(SocketAddr::new(at("10.8.1.4"), port), SocketAddr::new(at("10.8.1.5"), 80))
}

fn event(kind: DirectEventKind, cookie: u64) -> DirectEvent {
    let is_refused = kind == DirectEventKind::Refused;
    let tuple = tuple(if is_refused { 0 } else { 40_000 });
    DirectEvent {
        kind: kind as u32,
        source: WEB,
        destination: DB,
        generation: ebpf_abi::Generation(1),
        tuple,
        aborted: 0,
        socket_cookie: cookie,
        at_nanos: 0,
        duration_nanos: 5,
        sent_bytes: 10,
        received_bytes: 20,
    }
}

fn listed(cookie: u64) -> (Tuple, DirectValue) {
    let value = DirectValue {
        source: WEB,
        destination: DB,
        generation: ebpf_abi::Generation(1),
        arrival: 1,
        accepted: 1,
        reserved: 0,
        socket_cookie: cookie,
        opened_nanos: 1,
        established_nanos: 2,
        received_at_half: 0,
    };
    (tuple(40_000), value)
}

#[test]
fn what_is_opened_and_closed_counts_once_for_each_reporter() {
    let mut world = World::new(false);
    world.tell(&[event(DirectEventKind::Opened, 7)]);
    assert_eq!((world.opened(), world.closed(), world.ledger.views().len()), (1, 0, 1));
    let view = world.ledger.views().remove(0);
    assert_eq!(view.ends.path, Path::Direct);
    assert_eq!(view.ends.source.address.map(|from| from.to_string()).as_deref(), Some("10.8.1.4:40000"));
    assert!(view.ends.destination.workload.as_ref().is_some_and(|name| &*name.name == "db"));
    world.tell(&[event(DirectEventKind::Closed, 7)]);
    assert_eq!((world.opened(), world.closed(), world.ledger.views().len()), (1, 1, 0));
    assert_eq!(world.count(&["istio_tcp_received_bytes_total{reporter=\"source\"", "path=\"direct\""]), 10);
    assert_eq!(world.count(&["istio_tcp_sent_bytes_total{reporter=\"source\"", "path=\"direct\""]), 20);
    assert_eq!(world.count(&["culvert_denials_total"]), 0);
}

#[test]
fn an_end_without_a_beginning_is_told_all_the_same() {
    let mut world = World::new(false);
    world.tell(&[event(DirectEventKind::Closed, 7)]);
    assert_eq!((world.opened(), world.closed()), (0, 1));
}

#[test]
fn a_refusal_is_told_with_the_reason_of_the_snapshot_that_gave_it() {
    let mut world = World::new(true);
    world.tell(&[event(DirectEventKind::Refused, 0)]);
    assert_eq!(world.count(&["culvert_denials_total", "outbound", "no_rule_allows"]), 1);
    // The policy went while the event was on its way.
    world.publish(false);
    world.tell(&[event(DirectEventKind::Refused, 0)]);
    assert_eq!(world.count(&["culvert_denials_total", "outbound", "no_rule_allows"]), 2);
    world.publish(false);
    world.tell(&[event(DirectEventKind::Refused, 0)]);
    assert_eq!(world.count(&["culvert_denials_total", "outbound", "rejudged"]), 1);
    assert_eq!(world.ledger.views().len(), 0);
}

#[test]
fn who_connects_in_vain_in_a_loop_does_not_fill_the_log() {
    let mut world = World::new(true);
    world.tell(&vec![event(DirectEventKind::Refused, 0); 10 * REFUSED_LINES_MAX]);
    let told = u64::try_from(REFUSED_LINES_MAX).expect("small");
    assert_eq!(world.count(&["culvert_denials_total", "no_rule_allows"]), told);
    assert_eq!(world.count(&["culvert_limits_total", REFUSED_LINES_LIMIT]), 1);
    // What others do is told.
    world.tell(&[event(DirectEventKind::Opened, 7)]);
    assert_eq!(world.ledger.views().len(), 1);
}

#[test]
fn what_is_ended_from_this_side_is_told_with_its_cause() {
    // T-18
    let mut world = World::new(false);
    world.tell(&[event(DirectEventKind::Opened, 7)]);
    world.publish(true);
    let (tuple, value) = listed(7);
    let cause = world.ledger.cause(&tuple, &value);
    assert!(matches!(&cause, Cause::Denied(denial) if denial.reason.label() == "no_rule_allows"));
    world.ledger.doom(7, cause);
    world.tell(&[DirectEvent { aborted: 1, ..event(DirectEventKind::Closed, 7) }]);
    assert_eq!(world.count(&["culvert_denials_total", "outbound", "no_rule_allows"]), 1);
    assert_eq!(world.closed(), 1);
}

#[test]
fn a_predecessors_connections_are_entered_at_once_and_others_when_nobody_told_of_them() {
    let world = World::new(false);
    let start = Instant::now();
    world.ledger.compare(&[listed(7)], start);
    assert_eq!(world.ledger.views().len(), 1);
    // Its event may be on its way.
    world.ledger.compare(&[listed(7), listed(8)], start);
    assert_eq!(world.ledger.views().len(), 1);
    world.ledger.compare(&[listed(7), listed(8)], start + UNTOLD_AFTER);
    assert_eq!(world.ledger.views().len(), 2);
    assert_eq!(world.opened(), 0);
}

#[test]
fn an_event_that_comes_after_the_list_is_told_once() {
    let mut world = World::new(false);
    let start = Instant::now();
    world.ledger.compare(&[listed(7)], start);
    world.tell(&[event(DirectEventKind::Opened, 7), event(DirectEventKind::Opened, 7)]);
    assert_eq!((world.opened(), world.ledger.views().len()), (1, 1));
    // It is closed in the kernel, and the event is on its way.
    world.ledger.compare(&[], start);
    world.ledger.compare(&[], start + UNTOLD_AFTER / 2);
    assert_eq!(world.closed(), 0);
    world.tell(&[event(DirectEventKind::Closed, 7)]);
    world.ledger.compare(&[], start + 2 * UNTOLD_AFTER);
    assert_eq!((world.opened(), world.closed()), (1, 1));
}

#[test]
fn an_end_that_was_never_told_is_told_by_its_absence() {
    let mut world = World::new(false);
    let start = Instant::now();
    world.tell(&[event(DirectEventKind::Opened, 7)]);
    world.ledger.compare(&[], start);
    assert_eq!(world.closed(), 0);
    world.ledger.compare(&[], start + UNTOLD_AFTER);
    assert_eq!((world.closed(), world.ledger.views().len()), (1, 0));
}

#[test]
fn a_workload_that_left_is_named_in_what_is_told_late() {
    let mut world = World::new(false);
    world.tell(&[event(DirectEventKind::Opened, 7)]);
    world.ledger.depart(WEB);
    world.tell(&[event(DirectEventKind::Closed, 7)]);
    assert_eq!(world.count(&["istio_tcp_connections_closed_total", "source_workload=\"web\""]), 1);
}

#[test]
fn what_goes_on_is_of_the_snapshot_that_judged_it_last() {
    let mut world = World::new(false);
    world.tell(&[event(DirectEventKind::Opened, 7)]);
    let before = world.ledger.views().remove(0).snapshot;
    world.publish(false);
    world.ledger.go_on();
    assert_eq!(world.ledger.views().remove(0).snapshot, before + 1);
}
