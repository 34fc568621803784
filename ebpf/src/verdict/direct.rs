//! The node-local fast path: whether the kernel lets a connection by without the daemon.
//!
//! Asked three times for each connection, always of the table in force at that moment: [`judge`] when it connects, [`publish`]
//! before its SYN, [`arrive`] where the SYN arrives. A table that changes in between is noticed by the next question (T-14).

use ebpf_abi::{
    DirectArrival, DirectValue, PairVerdict, Port, TUNNEL_PORT, WorkloadNumber,
    limits::DIRECT_HANDSHAKE_NANOS,
};

/// One generation of the pair table.
pub trait PairTable {
    /// The class of a source; `None` where it has no rights.
    fn class(&self, source: WorkloadNumber) -> Option<u32>;
    /// What the table says of sources of a class towards one port, or towards [`ebpf_abi::PairKey::OTHER_PORTS`].
    fn pair(&self, class: u32, destination: WorkloadNumber, port: Port) -> Option<PairVerdict>;
}

/// What the table says of a connect. What it does not say is the daemon's to decide.
#[inline(always)]
pub fn judge(
    table: &impl PairTable,
    source: WorkloadNumber,
    destination: WorkloadNumber,
    port: Port,
) -> PairVerdict {
    // No application is served at the tunnel's port, and port 0 stands for others.
    if port == TUNNEL_PORT || port == OTHER_PORTS {
        return PairVerdict::Ask;
    }
    let Some(class) = table.class(source) else {
        return PairVerdict::Ask;
    };
    if let Some(verdict) = table.pair(class, destination, port) {
        return verdict;
    }
    table.pair(class, destination, OTHER_PORTS).unwrap_or(PairVerdict::Ask)
}

/// What is known of a socket of a pod right before its SYN.
pub trait Departing {
    /// Whether its connect was captured.
    fn is_captured(&self) -> bool;
    /// Whether the daemon recorded it as its own.
    fn is_exempt(&self) -> bool;
    /// Whose socket it is, if it belongs to a pod whose connects are captured.
    fn workload(&self) -> Option<WorkloadNumber>;
    /// Whether it goes to loopback or to an own address of the workload.
    fn is_local(&self, workload: WorkloadNumber) -> bool;
    /// Who alone has the address from which it connects.
    fn source_owner(&self) -> Option<WorkloadNumber>;
    /// Who alone has the address that it dials.
    fn target_owner(&self) -> Option<WorkloadNumber>;
    /// What the table in force says of it.
    fn judge(&self, source: WorkloadNumber, destination: WorkloadNumber) -> PairVerdict;
}

/// What happens to a connection right before its SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// Not ours, or decided by the connect hook.
    Leave,
    /// Is published for the destination.
    Publish { source: WorkloadNumber, destination: WorkloadNumber },
    /// The connect hook let it go and nothing permits it any more: captured here and now (T-14, T-17).
    Capture(WorkloadNumber),
}

/// A socket of a pod that is neither captured nor local was let go by the table, and by nothing else: so no record on the
/// socket is needed to know it, and whatever the table does not permit in this moment is captured. With Fast Open this may be
/// long after the connect.
#[inline(always)]
pub fn depart(socket: &impl Departing) -> Departure {
    if socket.is_captured() {
        return Departure::Leave;
    }
    let Some(source) = socket.workload() else {
        return Departure::Leave;
    };
    if socket.is_exempt() || socket.is_local(source) {
        return Departure::Leave;
    }
    // Who may bind to addresses of others must not be taken for them by the application.
    if socket.source_owner() != Some(source) {
        return Departure::Capture(source);
    }
    let Some(destination) = socket.target_owner() else {
        return Departure::Capture(source);
    };
    match socket.judge(source, destination) {
        PairVerdict::Permit => Departure::Publish { source, destination },
        // The daemon refuses what the table denies by now: it is too late for the connect to fail.
        PairVerdict::Deny | PairVerdict::Ask => Departure::Capture(source),
    }
}

/// Whether a published connection may go to the application of `instance`, the enrolment whose program this is.
#[inline(always)]
pub fn arrive(
    entry: &DirectValue,
    instance: WorkloadNumber,
    now_nanos: u64,
    verdict: impl FnOnce() -> PairVerdict,
) -> DirectArrival {
    if instance == WorkloadNumber::NONE || entry.destination != instance {
        // Meant for another enrolment, which had the address before (T-13): nobody's here.
        return DirectArrival::Unseen;
    }
    if is_over(entry, now_nanos) || verdict() != PairVerdict::Permit {
        return DirectArrival::Steered;
    }
    DirectArrival::Passed
}

/// Whether no listener is to be looked up any more for this connection: a further SYN is another one.
///
/// The client is done first. With a SYN cookie its last segment looks up the listener once more, so the destination's socket
/// has the last word.
#[inline(always)]
fn is_over(entry: &DirectValue, now_nanos: u64) -> bool {
    let is_late = entry.established_nanos != 0
        && now_nanos.saturating_sub(entry.established_nanos) >= DIRECT_HANDSHAKE_NANOS;
    entry.accepted != 0 || is_late
}

/// What the client's socket found when its handshake was done, by the entry's [`DirectArrival`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stood {
    /// The application of the destination.
    Direct,
    /// The daemon: not direct, and the daemon's to tell.
    Steered,
    /// Somebody whose program did not see it: another owner of the address (T-13).
    Misled,
}

#[inline(always)]
pub fn stood(arrival: u32) -> Stood {
    if arrival == DirectArrival::Passed as u32 {
        Stood::Direct
    } else if arrival == DirectArrival::Steered as u32 {
        Stood::Steered
    } else {
        Stood::Misled
    }
}

/// What the kernel counts of a TCP connection: sequence numbers, in which SYN and FIN take one each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// The state before CLOSE, in the kernel's numbers.
    pub last_state: u32,
    pub bytes_acked: u64,
    pub bytes_received: u64,
    /// The first byte that is not acknowledged, and the one after the last that was sent.
    pub first_unacked: u32,
    pub next: u32,
    /// What had been received when our FIN was acknowledged.
    pub received_at_half: u64,
}

/// Payload in both directions, as {sent, received}.
#[inline(always)]
pub fn payload(counted: &Counted) -> [u64; 2] {
    let is_all_acked = counted.first_unacked == counted.next;
    let our_fin = is_all_acked && matches!(counted.last_state, TCP_FIN_WAIT2 | TCP_CLOSING | TCP_LAST_ACK);
    let their_fin = match counted.last_state {
        TCP_CLOSE_WAIT | TCP_CLOSING | TCP_LAST_ACK => true,
        // The kernel leaves this state early where the application closed its socket and the other side did not.
        TCP_FIN_WAIT2 => counted.bytes_received > counted.received_at_half,
        _ => false,
    };
    [
        counted.bytes_acked.saturating_sub(SYN).saturating_sub(u64::from(our_fin)),
        counted.bytes_received.saturating_sub(u64::from(their_fin)),
    ]
}

const OTHER_PORTS: Port = ebpf_abi::PairKey::OTHER_PORTS;
/// Our SYN is acknowledged like a byte.
const SYN: u64 = 1;

// Numbers of include/net/tcp_states.h, which are part of the kernel's interface.
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE_WAIT: u32 = 8;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{collections::BTreeMap, vec, vec::Vec};

    use ebpf_abi::Generation;

    use super::*;

    const SOURCE: WorkloadNumber = WorkloadNumber(7);
    const DESTINATION: WorkloadNumber = WorkloadNumber(9);
    const PORT: Port = 8080;

    /// Classes of sources, and verdicts of {class, destination, port}.
    #[derive(Clone, Default)]
    struct Table {
        classes: BTreeMap<u32, u32>,
        pairs: BTreeMap<(u32, u32, Port), PairVerdict>,
    }

    impl PairTable for Table {
        fn class(&self, source: WorkloadNumber) -> Option<u32> {
            self.classes.get(&source.0).copied()
        }
        fn pair(&self, class: u32, destination: WorkloadNumber, port: Port) -> Option<PairVerdict> {
            self.pairs.get(&(class, destination.0, port)).copied()
        }
    }

    fn table(pairs: &[(Port, PairVerdict)]) -> Table {
        Table {
            classes: [(SOURCE.0, 1)].into(),
            pairs: pairs.iter().map(|(port, verdict)| ((1, DESTINATION.0, *port), *verdict)).collect(),
        }
    }

    #[track_caller]
    fn check(pairs: &[(Port, PairVerdict)], port: Port, expected: PairVerdict) {
        assert_eq!(judge(&table(pairs), SOURCE, DESTINATION, port), expected);
    }

    use PairVerdict::{Ask, Deny, Permit};

    #[test]
    fn what_a_table_does_not_say_the_daemon_is_asked() {
        check(&[], PORT, Ask);
        check(&[(81, Permit)], PORT, Ask);
        let permits = table(&[(OTHER_PORTS, Permit)]);
        assert_eq!(judge(&Table::default(), SOURCE, DESTINATION, PORT), Ask);
        assert_eq!(judge(&permits, WorkloadNumber(8), DESTINATION, PORT), Ask, "a source without a class");
        assert_eq!(judge(&permits, SOURCE, WorkloadNumber(8), PORT), Ask, "another destination");
        assert_eq!(judge(&permits, DESTINATION, SOURCE, PORT), Ask, "the other direction");
        let other_class = Table { classes: [(SOURCE.0, 2)].into(), ..permits };
        assert_eq!(judge(&other_class, SOURCE, DESTINATION, PORT), Ask);
    }

    #[test]
    fn a_ports_own_entry_wins_over_that_of_all_others() {
        for (own, others) in [(Deny, Permit), (Permit, Deny), (Ask, Permit), (Ask, Deny)] {
            check(&[(PORT, own), (OTHER_PORTS, others)], PORT, own);
            check(&[(PORT, own), (OTHER_PORTS, others)], 81, others);
        }
    }

    #[test]
    fn the_tunnels_port_and_port_zero_are_never_the_kernels_to_decide() {
        for verdict in [Permit, Deny] {
            let pairs = [(OTHER_PORTS, verdict), (TUNNEL_PORT, verdict)];
            check(&pairs, TUNNEL_PORT, Ask);
            check(&pairs, OTHER_PORTS, Ask);
        }
    }

    #[derive(Clone, Copy)]
    struct Socket {
        captured: bool,
        exempt: bool,
        workload: Option<WorkloadNumber>,
        local: bool,
        source_owner: Option<WorkloadNumber>,
        target_owner: Option<WorkloadNumber>,
        verdict: PairVerdict,
    }

    impl Departing for Socket {
        fn is_captured(&self) -> bool {
            self.captured
        }
        fn is_exempt(&self) -> bool {
            self.exempt
        }
        fn workload(&self) -> Option<WorkloadNumber> {
            self.workload
        }
        fn is_local(&self, _: WorkloadNumber) -> bool {
            self.local
        }
        fn source_owner(&self) -> Option<WorkloadNumber> {
            self.source_owner
        }
        fn target_owner(&self) -> Option<WorkloadNumber> {
            self.target_owner
        }
        fn judge(&self, source: WorkloadNumber, destination: WorkloadNumber) -> PairVerdict {
            assert_eq!((source, destination), (SOURCE, DESTINATION));
            self.verdict
        }
    }

    const SOCKET: Socket = Socket {
        captured: false,
        exempt: false,
        workload: Some(SOURCE),
        local: false,
        source_owner: Some(SOURCE),
        target_owner: Some(DESTINATION),
        verdict: Permit,
    };

    #[test]
    fn what_is_permitted_before_its_syn_is_published_and_nothing_else() {
        let published = Departure::Publish { source: SOURCE, destination: DESTINATION };
        let captured = Departure::Capture(SOURCE);
        for (socket, expected) in [
            (SOCKET, published),
            (Socket { verdict: Deny, ..SOCKET }, captured),
            (Socket { verdict: Ask, ..SOCKET }, captured),
            // T-17: the address went after the connect hook.
            (Socket { target_owner: None, ..SOCKET }, captured),
            (Socket { source_owner: None, ..SOCKET }, captured),
            (Socket { source_owner: Some(DESTINATION), ..SOCKET }, captured),
            (Socket { captured: true, ..SOCKET }, Departure::Leave),
            (Socket { exempt: true, ..SOCKET }, Departure::Leave),
            (Socket { workload: None, ..SOCKET }, Departure::Leave),
            (Socket { local: true, ..SOCKET }, Departure::Leave),
        ] {
            assert_eq!(depart(&socket), expected);
        }
    }

    const ENTRY: DirectValue = DirectValue {
        source: SOURCE,
        destination: DESTINATION,
        generation: Generation(3),
        arrival: DirectArrival::Unseen as u32,
        accepted: 0,
        reserved: 0,
        socket_cookie: 1,
        opened_nanos: NOW - 1,
        established_nanos: 0,
        received_at_half: 0,
    };
    const NOW: u64 = 100 * DIRECT_HANDSHAKE_NANOS;

    #[track_caller]
    fn arriving(entry: DirectValue, instance: WorkloadNumber, verdict: PairVerdict, expected: DirectArrival) {
        assert_eq!(arrive(&entry, instance, NOW, || verdict), expected);
    }

    #[test]
    fn a_published_connection_passes_while_it_is_permitted() {
        arriving(ENTRY, DESTINATION, Permit, DirectArrival::Passed);
        arriving(ENTRY, DESTINATION, Deny, DirectArrival::Steered);
        arriving(ENTRY, DESTINATION, Ask, DirectArrival::Steered);
    }

    // T-13
    #[test]
    fn a_permit_for_one_enrolment_is_none_for_another() {
        for instance in [SOURCE, WorkloadNumber(10), WorkloadNumber::NONE] {
            arriving(ENTRY, instance, Permit, DirectArrival::Unseen);
        }
        let of_nobody = DirectValue { destination: WorkloadNumber::NONE, ..ENTRY };
        arriving(of_nobody, WorkloadNumber::NONE, Permit, DirectArrival::Unseen);
    }

    #[test]
    fn a_syn_is_let_by_until_the_destinations_socket_stands() {
        // The SYN again, or the last segment after a SYN cookie: the client's side may be done by then.
        for established_nanos in [0, NOW, NOW - 1, NOW - DIRECT_HANDSHAKE_NANOS + 1] {
            let entry = DirectValue { established_nanos, ..ENTRY };
            arriving(entry, DESTINATION, Permit, DirectArrival::Passed);
            arriving(DirectValue { accepted: 1, ..entry }, DESTINATION, Permit, DirectArrival::Steered);
        }
        let late = DirectValue { established_nanos: NOW - DIRECT_HANDSHAKE_NANOS, ..ENTRY };
        arriving(late, DESTINATION, Permit, DirectArrival::Steered);
    }

    #[test]
    fn a_client_believes_the_destinations_own_program_only() {
        for (arrival, expected) in [
            (DirectArrival::Passed as u32, Stood::Direct),
            (DirectArrival::Steered as u32, Stood::Steered),
            (DirectArrival::Unseen as u32, Stood::Misled),
            (77, Stood::Misled),
        ] {
            assert_eq!(stood(arrival), expected);
        }
    }

    #[test]
    fn syn_and_fin_are_no_payload() {
        const ESTABLISHED: u32 = 1;
        const FIN_WAIT1: u32 = 4;
        // last state, acknowledged, received, received at half, all acknowledged -> sent, received
        for (last_state, acked, received, at_half, all_acked, expected) in [
            (ESTABLISHED, 11, 5, 0, true, [10, 5]),
            (FIN_WAIT1, 11, 5, 0, true, [10, 5]),
            (TCP_CLOSE_WAIT, 11, 6, 0, true, [10, 5]),
            (TCP_LAST_ACK, 12, 6, 0, true, [10, 5]),
            (TCP_LAST_ACK, 11, 6, 0, false, [10, 5]),
            (TCP_CLOSING, 12, 6, 0, true, [10, 5]),
            (TCP_FIN_WAIT2, 12, 5, 5, true, [10, 5]),
            (TCP_FIN_WAIT2, 12, 6, 5, true, [10, 5]),
            (TCP_FIN_WAIT2, 12, 6, 0, true, [10, 5]),
            (ESTABLISHED, 0, 0, 0, true, [0, 0]),
        ] {
            let counted = Counted {
                last_state,
                bytes_acked: acked,
                bytes_received: received,
                first_unacked: 1,
                next: if all_acked { 1 } else { 2 },
                received_at_half: at_half,
            };
            assert_eq!(payload(&counted), expected, "{counted:?}");
        }
    }

    /// One client and one change of the table after another, each as the steps that others may come between (T-14).
    #[derive(Clone)]
    struct Model {
        /// What each generation says of the pair; the first one is in force at the start.
        generations: Vec<PairVerdict>,
        in_force: usize,
        /// What the daemon does next, of each change: put the next one in force, wait, list and destroy.
        daemon: usize,
        /// Whether the daemon waits for running programs.
        waits: bool,
        /// Whether the table is asked once more where the SYN arrives.
        asks_again: bool,
        client: Client,
        /// In the program that runs: the generation that was in force when it began.
        running: Option<usize>,
        entry: Option<DirectValue>,
        /// Whether the application has the connection, and whether anybody ended it.
        is_served: bool,
        is_destroyed: bool,
    }

    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Client {
        Connects,
        Judges,
        Departs,
        JudgesAgain,
        Publishes,
        Arrives,
        JudgesThere,
        Stands,
        Ended,
    }

    impl Model {
        fn table(&self) -> Table {
            let generation = self.running.expect("a program runs");
            table(&[(PORT, *self.generations.get(generation).expect("a generation"))])
        }

        fn verdict(&self) -> PairVerdict {
            judge(&self.table(), SOURCE, DESTINATION, PORT)
        }

        fn ends(&mut self, next: Client) {
            self.running = None;
            self.client = next;
        }

        fn client_steps(&mut self) -> bool {
            match self.client {
                Client::Connects => {
                    self.running = Some(self.in_force);
                    self.client = Client::Judges;
                }
                Client::Judges => {
                    let next = if self.verdict() == Permit { Client::Departs } else { Client::Ended };
                    self.ends(next);
                }
                Client::Departs => {
                    self.running = Some(self.in_force);
                    self.client = Client::JudgesAgain;
                }
                Client::JudgesAgain => match depart(&Socket { verdict: self.verdict(), ..SOCKET }) {
                    Departure::Publish { .. } => self.client = Client::Publishes,
                    Departure::Leave | Departure::Capture(_) => self.ends(Client::Ended),
                },
                Client::Publishes => {
                    self.entry = Some(ENTRY);
                    self.ends(Client::Arrives);
                }
                Client::Arrives => {
                    if self.is_destroyed {
                        self.ends(Client::Ended);
                        return true;
                    }
                    self.running = Some(self.in_force);
                    self.client = Client::JudgesThere;
                }
                Client::JudgesThere => {
                    let entry = self.entry.expect("published");
                    let verdict = if self.asks_again { self.verdict() } else { Permit };
                    let arrival = arrive(&entry, DESTINATION, NOW, || verdict);
                    self.entry = Some(DirectValue { arrival: arrival as u32, ..entry });
                    self.ends(Client::Stands);
                }
                Client::Stands => {
                    let entry = self.entry.expect("published");
                    self.is_served = stood(entry.arrival) == Stood::Direct;
                    self.client = Client::Ended;
                }
                Client::Ended => return false,
            }
            true
        }

        fn daemon_steps(&mut self) -> bool {
            if self.daemon / 3 + 1 >= self.generations.len() {
                return false;
            }
            match self.daemon % 3 {
                0 => self.in_force += 1,
                1 => {
                    if self.waits && self.running.is_some_and(|began| began != self.in_force) {
                        return false;
                    }
                }
                _ => {
                    let verdict = *self.generations.get(self.in_force).expect("a generation");
                    self.is_destroyed |= self.entry.is_some() && verdict != Permit;
                }
            }
            self.daemon += 1;
            true
        }

        /// Every order of all steps; the number of those at whose end a connection stands that the last table does not permit.
        fn escapes(&self, ends: &mut usize) -> usize {
            let (mut client, mut daemon) = (self.clone(), self.clone());
            let mut escaped = 0;
            let mut is_over = true;
            if client.client_steps() {
                is_over = false;
                escaped += client.escapes(ends);
            }
            if daemon.daemon_steps() {
                is_over = false;
                escaped += daemon.escapes(ends);
            }
            if is_over {
                *ends += 1;
                let last = *self.generations.last().expect("a generation");
                escaped += usize::from(self.is_served && !self.is_destroyed && last != Permit);
            }
            escaped
        }
    }

    fn model(generations: Vec<PairVerdict>, waits: bool, asks_again: bool) -> Model {
        Model {
            generations,
            in_force: 0,
            daemon: 0,
            waits,
            asks_again,
            client: Client::Connects,
            running: None,
            entry: None,
            is_served: false,
            is_destroyed: false,
        }
    }

    // T-14
    #[test]
    fn in_no_order_of_steps_does_a_connection_outlive_its_permit() {
        for before in [Permit, Deny, Ask] {
            for between in [Permit, Deny, Ask] {
                for after in [Permit, Deny, Ask] {
                    for generations in [vec![before, after], vec![before, between, after]] {
                        // Either of both would do.
                        for (waits, asks_again) in [(true, true), (true, false), (false, true)] {
                            let mut ends = 0;
                            let model = model(generations.clone(), waits, asks_again);
                            assert_eq!(model.escapes(&mut ends), 0, "{generations:?} {waits} {asks_again}");
                            assert!(ends > 1);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn without_waiting_and_asking_again_one_would() {
        assert!(model(vec![Permit, Deny], false, false).escapes(&mut 0) > 0);
    }

    #[test]
    fn a_permit_that_stays_is_served_in_some_order() {
        let mut served = model(vec![Permit], true, true);
        while served.client_steps() {}
        assert!(served.is_served && !served.is_destroyed);
    }
}
