//! Daemons and authorities that die, are replaced, or are away; and what is left when all is taken away.

use std::time::Duration;

use nix::sys::signal::Signal;
use world::World;
use world::expect::{LINE_TIME_MAX, is};
use world::pod::{FAMILIES, Family, Plan};
use world::protocol::{Command, Connect, Load, Storm};

use crate::cases::{Cases, say};
use crate::photo::{ECHO, HTTP, NEEDLE, Photo};
use crate::policies::STRICT;

/// For so long nobody is there after a crash.
const AWAY_MILLISECONDS: u64 = 3_000;

/// SYN retransmissions wait 1, 2, 4 s: a connect that began while nobody was there is served by the second or third.
const CONNECT_MILLISECONDS: u64 = 20_000;

#[test]
fn restart() {
    let photo = Photo::start(&[("strict.yaml", STRICT)]);
    let mut cases = Cases::of("restart");
    let mut case = |sentence: &str, body: fn(&Photo)| {
        cases.case(sentence, || {
            photo.revive();
            body(&photo);
        });
    };
    case("a crash of the client's daemon: connects wait, nothing leaks (T-3)", crash_of_source);
    case("a crash of the server's daemon: peers are retried (T-4)", crash_of_destination);
    case("a peer daemon that stays away ends in a reset after the hold time (T-4)", dead_peer);
    case("a successor takes over under 5,000 connects without a failure (T-24)", successor);
    case("a second successor finds no remains of the first (T-24)", successor_again);
    case("a rule deleted by the workload: dropped, repaired, told (T-5)", rule_deleted);
    case("all rules flushed by the workload: nothing leaks, ours come back (T-5)", rules_flushed);
    case("connections from before an enrolment are ended under STRICT, or counted (T-25)", unmeshed);
    case("removal of a workload frees its network namespace", removal);
    case("a pod that goes without its document frees its network namespace", vanished);
    case("without the CA what has a certificate serves on", without_ca);
    case("after SIGTERM the workloads stay closed (T-23)", terminated);
    case("after the cleanup nothing is left", cleaned_up);
    cases.end();
}

fn storm(photo: &Photo, family: Family, attempts_max: u64, parallel: usize) -> Storm {
    Storm {
        to: vec![photo.datastore.at(family, ECHO)],
        parallel,
        text: NEEDLE.to_owned(),
        bytes: 400,
        timeout_ms: CONNECT_MILLISECONDS,
        attempts_max,
    }
}

/// Failures of a kind that must not be; connections that stood when a daemon was killed are reset and no wonder.
fn refused(load: &Load) -> u64 {
    load.failed.iter().filter(|(step, _)| step.contains("ECONNREFUSED")).map(|(_, count)| count).sum()
}

/// Connections that are under way at one time while a daemon is killed, in each family.
const PARALLEL: usize = 4;

/// T-3 and the crash: 0 plaintext bytes, nothing refused in either family, new connections afterwards.
fn crash_of_source(photo: &Photo) {
    let capture = photo.world.capture(&photo.a, NEEDLE);
    let storms = FAMILIES.map(|family| photo.frontend.storm(storm(photo, family, u64::MAX, PARALLEL)));
    for storm in &storms {
        storm.progress(20, Duration::from_secs(20));
    }
    photo.a.kill();
    // Three seconds during which a connect can only wait: that is the clock of this case. Some clear their mark while
    // their SYN waits, which must not let its retransmission out (T-1).
    let waiting: Vec<_> = FAMILIES
        .into_iter()
        .flat_map(|family| [false, true].map(|clear_mark| (family, clear_mark)))
        .map(|(family, clear_mark)| {
            let mut connect = Connect::to(photo.datastore.at(family, ECHO));
            (connect.timeout_ms, connect.nonblocking) = (AWAY_MILLISECONDS, true);
            (connect.clear_mark, connect.first) = (clear_mark, NEEDLE.to_owned());
            photo.frontend.begin(Command::Ask { connect, text: NEEDLE.to_owned() })
        })
        .collect();
    for ask in waiting {
        let outcome = format!("{:?}", ask.outcome());
        assert!(outcome.contains("timeout"), "a connect waits while nobody is there: {outcome}");
    }
    photo.a.start();
    for storm in &storms {
        storm.progress(50, Duration::from_secs(30));
    }
    // Counted by the kernel all the while, and told by the successor.
    assert_counted(&photo.a, "no_outbound_listener");
    assert_counted(&photo.a, "reset_while_waiting");
    for (storm, family) in storms.into_iter().zip(FAMILIES) {
        let load = storm.stop();
        say(&format!("    {family:?}: {load:?}"));
        assert_eq!(refused(&load), 0, "{family:?}: {load:?}");
        // A connect that waits is never told of a reset: the kernel calls that ECONNREFUSED (`tcp_reset`). ECONNRESET is of a
        // connection that stood before its thread ran again; there are no more of those than threads.
        let stood = load.failed.get("connect ECONNRESET").copied().unwrap_or_default();
        assert!(stood <= PARALLEL as u64, "{family:?}: {load:?}");
        let waited = |step: &String| step.starts_with("connect") && step != "connect ECONNRESET";
        assert!(!load.failed.keys().any(waited), "{family:?}: {load:?}");
    }
    capture.stop().assert_no_plaintext();
}

fn drops(metrics: &world::metrics::Metrics) -> Vec<String> {
    metrics.names().into_iter().filter(|name| name.contains("kernel_drops")).collect()
}

/// T-4: the sending daemon retries the tunnel port within its hold time.
fn crash_of_destination(photo: &Photo) {
    photo.b.kill();
    let begun: Vec<_> = FAMILIES
        .into_iter()
        .map(|family| {
            let mut connect = Connect::to(photo.datastore.at(family, HTTP));
            connect.timeout_ms = CONNECT_MILLISECONDS;
            photo.frontend.begin(Command::Ask { connect, text: "GET / HTTP/1.1\r\n\r\n".to_owned() })
        })
        .collect();
    // A stranger's connect reaches the pod without a daemon: refused at once, never served by the application.
    let mut stranger = Connect::to(photo.datastore.at(Family::V4, HTTP));
    stranger.timeout_ms = AWAY_MILLISECONDS;
    let asked = photo.stranger.ask(stranger, "GET / HTTP/1.1\r\n\r\n");
    assert_eq!(asked.text, "", "without a daemon nobody is served: {asked:?}");
    photo.b.start();
    for ask in begun {
        let outcome = format!("{:?}", ask.outcome());
        assert!(outcome.contains("datastore peer="), "the connect of a peer is held and served: {outcome}");
    }
    assert_counted(&photo.b, "no_inbound_listener");
    assert_counted(&photo.b, "no_tunnel_listener");
}

/// The daemon takes the kernel's counters over now and then: scraped until it has, within a bound.
#[track_caller]
fn assert_counted(node: &world::node::Node, reason: &str) {
    let deadline = std::time::Instant::now() + LINE_TIME_MAX;
    loop {
        let metrics = node.metrics();
        if metrics.sum("culvert_kernel_drops_total", &[("reason", reason)]) >= 1.0 {
            return;
        }
        let late = std::time::Instant::now() > deadline;
        assert!(!late, "the kernel counts no {reason}: {:?}", drops(&metrics));
    }
}

fn dead_peer(photo: &Photo) {
    photo.b.kill();
    let watch = photo.a.watch();
    let mut connect = Connect::to(photo.datastore.at(Family::V4, ECHO));
    connect.timeout_ms = 30_000;
    let asked = photo.frontend.ask(connect, NEEDLE);
    assert_eq!(asked.text, "");
    assert_eq!(asked.end, "ECONNRESET", "{asked:?}");
    assert!((8_000..20_000).contains(&asked.elapsed_ms), "the hold time is 10 s: {asked:?}");
    watch.refused("outbound", "dead_peer", &[("source.workload", "photo-frontend")]);
    photo.b.start();
}

fn successor(photo: &Photo) {
    const CONNECTS: u64 = 2_500;
    let storms = FAMILIES.map(|family| photo.frontend.storm(storm(photo, family, CONNECTS, 8)));
    for storm in &storms {
        storm.progress(100, Duration::from_secs(20));
    }
    // Both ends of the tunnels get a new daemon while connects go on.
    for node in [&photo.a, &photo.b] {
        node.launch();
        node.log().wait_from(0, "the successor is ready", LINE_TIME_MAX, |line| is(line, "message", "ready"));
        node.wait_predecessor(Duration::from_secs(20));
    }
    for (storm, family) in storms.into_iter().zip(FAMILIES) {
        let load = progress_to(storm, CONNECTS);
        say(&format!("    {family:?}: {load:?}"));
        assert_eq!((load.succeeded, load.failed), (CONNECTS, Default::default()), "{family:?}");
    }
}

/// The rest of a storm that ends by itself.
fn progress_to(storm: world::app::Storming<'_>, attempts: u64) -> Load {
    let mut load = storm.progress(0, Duration::from_secs(1));
    while load.attempts < attempts {
        load = storm.progress(1, Duration::from_secs(30));
    }
    storm.stop()
}

fn successor_again(photo: &Photo) {
    let links = photo.b.pins().len();
    photo.b.launch();
    photo.b.log().wait_from(0, "the successor is ready", LINE_TIME_MAX, |line| is(line, "message", "ready"));
    photo.b.wait_predecessor(Duration::from_secs(20));
    assert_eq!(photo.b.pins().len(), links, "programs are swapped, not stacked: {:?}", photo.b.pins());
    assert!(photo.frontend.http(photo.datastore.at(Family::V4, HTTP)).text.contains("datastore"));
}

/// Rules with a firewall mark, as `ip` lists them for a family.
fn marked_rules(photo: &Photo, family: &str) -> Vec<String> {
    let listed = photo.frontend.namespace().ip(&format!("{family} rule list")).expect("ip lists rules");
    listed.lines().filter(|line| line.contains("fwmark")).map(|line| line.trim().to_owned()).collect()
}

fn rule_deleted(photo: &Photo) {
    let capture = photo.world.capture(&photo.a, NEEDLE);
    let connection = photo.frontend.connect(Connect::to(photo.datastore.at(Family::V4, ECHO)));
    assert_eq!(photo.frontend.exchange(&connection, NEEDLE).as_deref(), Ok(NEEDLE));
    let watch = photo.a.watch();
    for family in ["-4", "-6"] {
        let rules = marked_rules(photo, family);
        assert!(!rules.is_empty(), "there is a rule to delete ({family})");
        for rule in rules {
            let (preference, _) = rule.split_once(':').expect("a preference comes first");
            let delete = format!("{family} rule del pref {preference}");
            photo.frontend.namespace().ip(&delete).expect("a workload with NET_ADMIN may do so");
        }
    }
    // Written while no rule stands: dropped by the guard, or sent after the repair; never seen on the wire.
    let exchanged =
        photo.frontend.begin(Command::Exchange { socket: connection.socket, text: NEEDLE.repeat(10) });
    watch.event("workload repaired", &[]);
    let _ = exchanged.outcome();
    assert!(watch.grew("culvert_repairs_total", &[]) >= 1.0);
    // Each family is repaired, and told of, by itself.
    let deadline = std::time::Instant::now() + LINE_TIME_MAX;
    for family in ["-4", "-6"] {
        while marked_rules(photo, family).is_empty() {
            assert!(std::time::Instant::now() < deadline, "the rule does not come back ({family})");
        }
    }
    let asked = photo.frontend.http(photo.datastore.at(Family::V4, HTTP));
    assert!(asked.text.contains("datastore peer="), "new connections succeed: {asked:?}");
    capture.stop().assert_no_plaintext();
}

fn rules_flushed(photo: &Photo) {
    let capture = photo.world.capture(&photo.a, NEEDLE);
    let watch = photo.a.watch();
    for flush in ["-4 rule flush", "-6 rule flush"] {
        photo.backend.namespace().ip(flush).expect("a workload with NET_ADMIN may do so");
    }
    for family in FAMILIES {
        let mut connect = Connect::to(photo.datastore.at(family, ECHO));
        connect.timeout_ms = 1_000;
        // `main` is the pod's own loss: the connect may fail in any way, but in no other way than closed.
        let _ = photo.backend.ask(connect, NEEDLE);
    }
    watch.event("workload repaired", &[]);
    for own in [
        "-4 rule add pref 32766 lookup main",
        "-4 rule add pref 32767 lookup default",
        "-6 rule add pref 32766 lookup main",
    ] {
        photo.backend.namespace().ip(own).expect("the pod mends what it broke");
    }
    let asked = photo.backend.http(photo.datastore.at(Family::V4, HTTP));
    assert!(asked.text.contains("datastore peer="), "with main back all is well: {asked:?}");
    capture.stop().assert_no_plaintext();
}

/// T-25: connections that exist when a workload is enrolled.
fn unmeshed(photo: &Photo) {
    let late = photo.world.pod(&photo.b, Plan::new("datastore", "late").outside());
    late.serve(ECHO, world::protocol::Mode::Echo);
    let inbound = photo.stranger.connect(Connect::to(late.at(Family::V4, ECHO)));
    assert_eq!(photo.stranger.exchange(&inbound, "early").as_deref(), Ok("early"));
    let outbound = late.connect(Connect::to(photo.outside.at(Family::V4, ECHO)));
    assert_eq!(late.exchange(&outbound, "early").as_deref(), Ok("early"));

    let watch = photo.b.watch();
    photo.world.documents().put(&late.document_file(), &late.document());
    let event = watch.event("unmeshed connections", &[]);
    assert!(event.to_string().contains("late"), "{event}");
    let ended = photo.stranger.drain(&inbound, Duration::from_secs(5));
    assert_eq!(ended.end, "ECONNRESET", "under STRICT an inbound one is destroyed");
    assert_eq!(late.exchange(&outbound, "goes on").as_deref(), Ok("goes on"));
    let standing = watch.grew("culvert_unmeshed_connections", &[]);
    assert!(standing >= 1.0, "{standing} stand, by the metric; {event}");
    let left = photo.b.watch();
    photo.world.documents().remove(&late.document_file());
    left.event("workload left", &[]);
    photo.world.remove_pod(late);
}

/// The node's end of the link to the pod that was made last.
fn last_interface(node: &world::node::Node) -> String {
    let listed = node.namespace().ip("-o link show type veth").expect("ip lists links");
    let last = listed.lines().filter_map(|line| line.split(": ").nth(1)).rfind(|name| name.starts_with('p'));
    let name = last.expect("a pod has a link").split('@').next().expect("the first part");
    format!(" {name}@")
}

/// A veth goes with its namespace, so the node's end tells whether the kernel let the namespace go. That happens in
/// a worker of the kernel some time after the last handle was closed.
#[track_caller]
fn assert_freed(node: &world::node::Node, interface: &str) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while node.namespace().ip("-o link show").expect("ip lists links").contains(interface) {
        assert!(
            std::time::Instant::now() < deadline,
            "somebody still holds the namespace behind {interface}"
        );
        std::thread::yield_now();
    }
}

fn removal(photo: &Photo) {
    let watch = photo.b.watch();
    let pod = photo.world.pod(&photo.b, Plan::new("datastore", "passing"));
    watch.event("workload enrolled", &[]);
    let interface = last_interface(&photo.b);
    pod.serve_http(HTTP, "passing");
    assert!(photo.frontend.http(pod.at(Family::V4, HTTP)).text.contains("passing"));
    let standing = photo.frontend.connect(Connect::to(pod.at(Family::V4, HTTP)));
    photo.world.documents().remove(&pod.document_file());
    watch.event("workload left", &[]);
    let ended = photo.frontend.drain(&standing, Duration::from_secs(10));
    assert_ne!(ended.end, "EAGAIN", "a connection of a workload that left does not go on");
    photo.world.remove_pod(pod);
    assert_freed(&photo.b, &interface);
}

fn vanished(photo: &Photo) {
    let watch = photo.b.watch();
    let pod = photo.world.pod(&photo.b, Plan::new("datastore", "vanishing"));
    watch.event("workload enrolled", &[]);
    let interface = last_interface(&photo.b);
    let file = pod.document_file();
    photo.world.remove_pod(pod);
    watch.event("workload left", &[]);
    assert_freed(&photo.b, &interface);
    photo.withdraw_quietly(&file);
}

/// The CA is away: at a daemon's start, and for new connections.
fn without_ca(photo: &Photo) {
    photo.world.ca().stop();
    photo.a.terminate();
    photo.a.launch();
    let asked = photo.backend.http(photo.frontend.at(Family::V4, 1));
    assert_eq!(asked.text, "", "nobody listens there, but the question must not hang: {asked:?}");
    let served = photo.stranger.http(photo.outside.at(Family::V4, ECHO));
    assert!(served.refused.is_none(), "strangers are no business of the mesh: {served:?}");
    // Node b was not restarted: its certificates serve on.
    assert!(photo.b.runs() && photo.b.readiness() == Some(200));
    photo.world.start_ca();
    photo.a.wait_ready();
    assert!(photo.frontend.http(photo.datastore.at(Family::V4, HTTP)).text.contains("datastore peer="));
}

fn terminated(photo: &Photo) {
    let standing = photo.frontend.connect(Connect::to(photo.datastore.at(Family::V4, ECHO)));
    let capture = photo.world.capture(&photo.a, NEEDLE);
    photo.a.signal(Signal::SIGTERM);
    photo.a.log().wait_from(0, "it drains", LINE_TIME_MAX, |line| is(line, "message", "daemon draining"));
    assert_eq!(photo.frontend.exchange(&standing, NEEDLE).as_deref(), Ok(NEEDLE), "what stands goes on");
    photo.frontend.close(&standing);
    photo.a.terminate();
    for family in FAMILIES {
        let mut connect = Connect::to(photo.datastore.at(family, ECHO));
        connect.timeout_ms = 1_500;
        let asked = photo.frontend.ask(connect, NEEDLE);
        assert_eq!(asked.refused.as_deref(), Some("timeout"), "closed, by waiting: {asked:?}");
        let mut connect = Connect::to(photo.backend.at(family, 8080));
        connect.timeout_ms = 1_500;
        let asked = photo.stranger.ask(connect, "GET / HTTP/1.1\r\n\r\n");
        assert_eq!(asked.text, "", "the application is not reached past the daemon: {asked:?}");
    }
    assert!(!photo.a.pins().is_empty(), "hooks and maps stay");
    capture.stop().assert_no_plaintext();
    photo.a.start();
}

fn cleaned_up(photo: &Photo) {
    let fresh = photo.world.pod(&photo.a, Plan::new("photo", "fresh").outside());
    photo.a.terminate();
    photo.a.cleanup().expect("a stopped daemon can be cleaned up");
    assert_eq!(photo.a.pins(), Vec::<std::path::PathBuf>::new());
    for pod in [&photo.frontend, &photo.backend] {
        for family in ["-4", "-6"] {
            for list in ["rule list", "route show table all"] {
                let normal = |pod: &world::pod::Pod| comparable(pod, &format!("{family} {list}"));
                assert_eq!(
                    normal(pod),
                    normal(&fresh),
                    "{} differs from a pod never enrolled: {list}",
                    pod.name()
                );
            }
        }
        for sysctl in ["net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect", "net/ipv6/fwmark_reflect"] {
            let of = |pod: &world::pod::Pod| pod.namespace().sysctl(sysctl).expect("the sysctl exists");
            assert_eq!(of(pod), of(&fresh), "{sysctl} of {}", pod.name());
        }
        let listening = pod.sockets().into_iter().filter(|socket| socket.state == 10);
        assert!(listening.into_iter().all(|socket| [8080, ECHO].contains(&socket.local.port())));
    }
    let asked = photo.frontend.http(photo.outside.at(Family::V4, ECHO));
    assert!(asked.refused.is_none(), "as without the mesh: {asked:?}");
    let connection = photo.frontend.connect(Connect::to(photo.outside.at(Family::V4, ECHO)));
    assert_eq!(photo.frontend.exchange(&connection, "plain").as_deref(), Ok("plain"));
    photo.a.start();
    assert!(photo.frontend.http(photo.datastore.at(Family::V4, HTTP)).text.contains("datastore peer="));
}

/// What `ip` lists, without what differs from pod to pod: own addresses.
fn comparable(pod: &world::pod::Pod, command: &str) -> Vec<String> {
    let listed = pod.namespace().ip(command).expect("ip lists");
    let mut lines: Vec<String> = listed
        .lines()
        .filter(|line| !line.contains("fe80:"))
        .map(|line| line.replace(&pod.v4().to_string(), "OWN").replace(&pod.v6().to_string(), "OWN"))
        .map(|line| line.trim().to_owned())
        .collect();
    lines.sort();
    lines
}

/// Certificates of seconds: the CA is away for a renewal and comes back before the certificate's end.
#[test]
fn the_authority_is_away_at_a_renewal() {
    const LIFETIME_SECONDS: u32 = 20;
    let photo = Photo::prepare(&[("strict.yaml", STRICT)]);
    photo.world.ca().set_workload_lifetime(LIFETIME_SECONDS);
    photo.world.start_ca();
    photo.world.start_daemons_of(&[&photo.a, &photo.b]);
    photo.world.ca().stop();
    let limit = Duration::from_secs(u64::from(LIFETIME_SECONDS));
    for node in [&photo.a, &photo.b] {
        node.log()
            .wait_from(0, "a renewal fails", limit, |line| is(line, "message", "certificate renewal failed"));
    }
    let served = photo.frontend.http(photo.datastore.at(Family::V4, HTTP));
    assert!(served.text.contains("datastore peer="), "the existing certificate serves on: {served:?}");
    let positions = [photo.a.log().position(), photo.b.log().position()];
    photo.world.start_ca();
    for (node, position) in [&photo.a, &photo.b].into_iter().zip(positions) {
        node.log().wait_from(position, "a renewal succeeds", limit * 4, |line| {
            is(line, "message", "certificate issued")
        });
    }
    let served = photo.frontend.http(photo.datastore.at(Family::V4, HTTP));
    assert!(served.text.contains("datastore peer="), "and the new one does: {served:?}");
}

/// Never ready without a first certificate; connections are held, then reset; the CA's coming mends it all.
#[test]
fn the_authority_is_away_at_the_first_start() {
    let photo = Photo::prepare(&[("strict.yaml", STRICT)]);
    photo.world.start_ca();
    photo.world.give_token(&photo.a);
    photo.world.give_token(&photo.b);
    photo.world.ca().stop();
    photo.a.set(|settings| settings.hold_seconds = [3, 5, 10]);
    photo.a.launch();
    photo.b.launch();
    photo
        .a
        .log()
        .wait_from(0, "the CA is away", LINE_TIME_MAX, |line| is(line, "message", "authority failed"));
    assert_eq!(photo.a.readiness(), Some(503));
    let capture = photo.world.capture(&photo.a, NEEDLE);
    photo.a.log().wait_from(0, "the workload is enrolled", LINE_TIME_MAX, |line| {
        is(line, "message", "workload enrolled") && line.to_string().contains("photo-frontend")
    });
    let asked = photo.frontend.ask(Connect::to(photo.datastore.at(Family::V4, ECHO)), NEEDLE);
    assert_eq!((asked.text.as_str(), asked.end.as_str()), ("", "ECONNRESET"), "held, then reset: {asked:?}");
    assert!(asked.elapsed_ms >= 2_500, "held for the hold time: {asked:?}");
    let line =
        photo.a.log().wait_from(0, "why", LINE_TIME_MAX, |line| is(line, "reason", "hold_certificate"));
    assert!(is(&line, "verdict", "failed"), "{line}");
    photo.world.start_ca();
    photo.a.wait_ready();
    photo.b.wait_ready();
    let served = photo.frontend.http(photo.datastore.at(Family::V4, HTTP));
    assert!(served.text.contains("datastore peer="), "{served:?}");
    capture.stop().assert_no_plaintext();
}

/// An exclusive owner: the cleanup does not pull the ground from under a running daemon.
#[test]
fn a_cleanup_beside_a_running_daemon_is_refused() {
    let photo = Photo::start(&[]);
    assert!(photo.a.cleanup().is_err(), "a daemon runs");
    assert!(photo.frontend.http(photo.datastore.at(Family::V4, HTTP)).text.contains("datastore peer="));
}

/// A control for the cases above: the kernel lets a namespace go when nobody holds it.
#[test]
fn a_plain_pod_frees_its_namespace() {
    let world = World::new();
    let node = world.node("node-a");
    let pod = world.pod(&node, Plan::new("photo", "passing").outside());
    let interface = last_interface(&node);
    assert!(node.namespace().ip("-o link show").expect("ip lists links").contains(&interface));
    world.remove_pod(pod);
    assert_freed(&node, &interface);
}
