//! The node-local fast path: a connection that the pair table permits goes from workload to workload without the daemon, as
//! ordinary TCP.
//!
//! connect hook (permits) -> [`connects`] (publishes, before the SYN) -> [`arrives`] (at the destination) -> [`accepted`] there
//! and [`stands`] here -> [`closes`]. Nothing of this runs for a packet of an established connection.
//!
//! What `socket_events` calls are functions of their own in the program, too: a chain of calls has 512 bytes of stack, and all of
//! them in one frame would not leave room for what they call.

use aya_ebpf::{
    EbpfContext as _,
    bindings::BPF_SOCK_OPS_STATE_CB_FLAG,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns},
    programs::SockOpsContext,
};
use ebpf::verdict::{
    self, Ended,
    direct::{Counted, Departing, Departure, Stood},
};
use ebpf_abi::{
    Address, DirectArrival, DirectEvent, DirectEventKind, DirectValue, DropReason, PairVerdict, Tuple,
    Verdict, WorkloadNumber,
};

use crate::{
    events::{socket_of, tuple_of},
    maps::{
        InForce, count_drop, count_verdict, direct, forget_direct, is_captured, is_daemon_there, is_exempt,
        is_own_address, local_owner, note_arrival, our_mark, publish_direct, record_captured, set_mark,
        steered_workload, tell, workload_of,
    },
    shortcut,
    words::field,
};

/// Right before the SYN, when the source's port is known.
#[inline(never)]
pub(crate) fn connects(context: &SockOpsContext) {
    let connect = Connect { context, tuple: tuple_of(context) };
    match verdict::direct::depart(&connect) {
        Departure::Leave => {}
        Departure::Publish { source, destination } => {
            if publish(context, source, destination, &connect.tuple) {
                count_verdict(Verdict::Direct);
            } else {
                count_drop(DropReason::DirectUnpublished);
                capture(context, source);
            }
        }
        Departure::Capture(source) => {
            count_verdict(Verdict::DirectCaptured);
            capture(context, source);
        }
    }
}

/// The end of the socket is told to [`closes`] from here on.
#[inline(always)]
fn publish(
    context: &SockOpsContext,
    source: WorkloadNumber,
    destination: WorkloadNumber,
    tuple: &Tuple,
) -> bool {
    let flags = field!(context.ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    if context.set_cb_flags(flags as i32).is_err() {
        return false;
    }
    let value = DirectValue {
        source,
        destination,
        generation: InForce::fetch().number(source),
        arrival: DirectArrival::Unseen as u32,
        accepted: 0,
        reserved: 0,
        socket_cookie: cookie_of(context),
        opened_nanos: now_nanos(),
        established_nanos: 0,
        received_at_half: 0,
    };
    publish_direct(tuple, &value)
}

/// Leads the connection to the daemon although its route is chosen: setting the mark drops that route. If the record cannot be
/// made the mark alone does it.
#[inline(always)]
fn capture(context: &SockOpsContext, workload: WorkloadNumber) {
    let sk = socket_of(context);
    if sk.is_null() {
        return;
    }
    let mark = field!(sk, mark);
    // SAFETY: the context is the one of this hook.
    if !unsafe { set_mark(context.as_ptr(), mark | our_mark()) } {
        count_drop(DropReason::MarkFailed);
    }
    // SAFETY: checked for null; the socket is the one of this hook's context.
    if !unsafe { record_captured(sk, workload) } {
        count_drop(DropReason::RecordFailed);
    }
}

/// A connection looks for its listener in the namespace of a pod. `None` where the kernel published none like it.
#[inline(always)]
pub(crate) fn arrives(tuple: &Tuple) -> Option<DirectArrival> {
    let entry = direct(tuple)?;
    // SAFETY: the entry is memory of the map; a copy of it may be half of two states, and each field is right by itself.
    let value = unsafe { entry.read_volatile() };
    let arrival = verdict::direct::arrive(&value, steered_workload(), now_nanos(), || {
        if !is_daemon_there() {
            return PairVerdict::Ask;
        }
        verdict::direct::judge(&InForce::fetch(), value.source, value.destination, tuple.target_port)
    });
    // A later SYN does not take back what the first one was told: the client learns of that one.
    if arrival != DirectArrival::Unseen && value.arrival != DirectArrival::Passed as u32 {
        // SAFETY: as above.
        unsafe { note_arrival(entry, arrival) };
    }
    Some(arrival)
}

/// The destination's socket stands: no listener is looked up any more.
#[inline(never)]
pub(crate) fn accepted(context: &SockOpsContext) {
    let Some(entry) = direct(&tuple_of(context).reversed()) else { return };
    // SAFETY: the entry is memory of the map; this is the only writer of the field.
    unsafe { (&raw mut (*entry).accepted).write_volatile(1) };
}

/// The client's socket stands. Its first segment after the SYN is not sent yet.
#[inline(never)]
pub(crate) fn stands(context: &SockOpsContext) {
    let tuple = tuple_of(context);
    let Some(entry) = own_entry(context, &tuple) else { return };
    // SAFETY: the entry is memory of the map, and the field a number that does not tear.
    let arrival = unsafe { (&raw const (*entry).arrival).read_volatile() };
    match verdict::direct::stood(arrival) {
        Stood::Direct => {
            let now = now_nanos();
            // SAFETY: the entry is memory of the map; this is the only writer of the field, and the others that are read were
            // written before it was published.
            unsafe { (&raw mut (*entry).established_nanos).write_volatile(now) };
            // SAFETY: as above.
            shortcut::stands(&tuple, unsafe { &*entry });
            tell(DirectEventKind::Opened, |event| {
                // SAFETY: the event is memory of the ring, and the entry memory of the map.
                unsafe { fill(event, DirectEventKind::Opened, &tuple, entry, now) };
            });
        }
        Stood::Steered => forget_direct(&tuple),
        Stood::Misled => {
            // Nothing of it leaves the namespace any more: the guard sees to that.
            count_drop(DropReason::DirectMisled);
            // SAFETY: the entry is memory of the map; the field was written before it was published.
            capture(context, unsafe { (*entry).source });
            forget_direct(&tuple);
        }
    }
}

/// Our FIN is acknowledged and the other side has not closed.
#[inline(never)]
pub(crate) fn is_half_closed(context: &SockOpsContext) {
    let Some(entry) = own_entry(context, &tuple_of(context)) else { return };
    let received = field!(context.ops, bytes_received);
    // SAFETY: the entry is memory of the map; this is the only writer of the field.
    unsafe { (&raw mut (*entry).received_at_half).write_volatile(received) };
}

/// The client's socket is closed: no SYN with its tuple is let by any more.
#[inline(never)]
pub(crate) fn closes(context: &SockOpsContext, last_state: u32) {
    let tuple = tuple_of(context);
    let Some(entry) = own_entry(context, &tuple) else { return };
    // SAFETY: the entry is memory of the map; only this socket's events write the fields.
    let [established_nanos, received_at_half] =
        unsafe { [(*entry).established_nanos, (*entry).received_at_half] };
    if established_nanos != 0 {
        let now = now_nanos();
        // SAFETY: the entry is memory of the map; the fields were written before it was published.
        shortcut::closes(&tuple, unsafe { &*entry }, now);
        tell(DirectEventKind::Closed, |event| {
            let raw = context.ops;
            let [sent_bytes, received_bytes] = verdict::direct::payload(&Counted {
                last_state,
                bytes_acked: field!(raw, bytes_acked),
                bytes_received: field!(raw, bytes_received),
                first_unacked: field!(raw, snd_una),
                next: field!(raw, snd_nxt),
                received_at_half,
            });
            // SAFETY: the event is memory of the ring, and the entry memory of the map.
            unsafe {
                fill(event, DirectEventKind::Closed, &tuple, entry, now);
                (*event).aborted = u32::from(verdict::ended(last_state) == Ended::Aborted);
                (*event).duration_nanos = now.saturating_sub(established_nanos);
                (*event).sent_bytes = sent_bytes;
                (*event).received_bytes = received_bytes;
            }
        });
    }
    // Last: what is removed may be another connection's at once.
    forget_direct(&tuple);
}

/// Tells of a connect that the pair table denies.
#[inline(always)]
pub(crate) fn tell_refused(source: WorkloadNumber, destination: WorkloadNumber, target: &Address, port: u16) {
    let generation = InForce::fetch().number(source);
    tell(DirectEventKind::Refused, |event| {
        // SAFETY: the event is memory of the ring.
        unsafe {
            empty(event, DirectEventKind::Refused, now_nanos());
            (*event).source = source;
            (*event).destination = destination;
            (*event).generation = generation;
            (*event).tuple.source = Address([0; 16]);
            (*event).tuple.target = *target;
            (*event).tuple.source_port = 0;
            (*event).tuple.target_port = port;
            (*event).socket_cookie = 0;
        }
    });
}

/// # Safety
/// `event` is memory of the ring, `entry` memory of the map.
#[inline(always)]
unsafe fn fill(
    event: *mut DirectEvent,
    kind: DirectEventKind,
    tuple: &Tuple,
    entry: *const DirectValue,
    at_nanos: u64,
) {
    // SAFETY: the caller vouches for both; the fields were written before the entry was published.
    unsafe {
        empty(event, kind, at_nanos);
        (*event).source = (*entry).source;
        (*event).destination = (*entry).destination;
        (*event).generation = (*entry).generation;
        (*event).tuple = *tuple;
        (*event).socket_cookie = (*entry).socket_cookie;
    }
}

/// # Safety
/// `event` is memory of the ring.
#[inline(always)]
unsafe fn empty(event: *mut DirectEvent, kind: DirectEventKind, at_nanos: u64) {
    // SAFETY: the caller vouches for it.
    unsafe {
        (*event).kind = kind as u32;
        (*event).aborted = 0;
        (*event).at_nanos = at_nanos;
        (*event).duration_nanos = 0;
        (*event).sent_bytes = 0;
        (*event).received_bytes = 0;
    }
}

/// The entry that this socket published. Another socket may have published one with the same tuple since.
#[inline(always)]
fn own_entry(context: &SockOpsContext, tuple: &Tuple) -> Option<*mut DirectValue> {
    let entry = direct(tuple)?;
    // SAFETY: the entry is memory of the map; the field was written before it was published.
    (unsafe { (*entry).socket_cookie } == cookie_of(context)).then_some(entry)
}

#[inline(always)]
fn cookie_of(context: &SockOpsContext) -> u64 {
    // SAFETY: the context is the one of this hook.
    unsafe { bpf_get_socket_cookie(context.as_ptr()) }
}

#[inline(always)]
fn now_nanos() -> u64 {
    // SAFETY: the helper only reads the clock.
    unsafe { bpf_ktime_get_ns() }
}

struct Connect<'a> {
    context: &'a SockOpsContext,
    tuple: Tuple,
}

impl Departing for Connect<'_> {
    #[inline(always)]
    fn is_captured(&self) -> bool {
        let sk = socket_of(self.context);
        // SAFETY: checked for null; the socket is the one of this hook's context.
        !sk.is_null() && unsafe { is_captured(sk) }
    }

    #[inline(always)]
    fn is_exempt(&self) -> bool {
        let sk = socket_of(self.context);
        // SAFETY: checked for null; the socket is the one of this hook's context.
        !sk.is_null() && unsafe { is_exempt(sk) }
    }

    #[inline(always)]
    fn workload(&self) -> Option<WorkloadNumber> {
        // SAFETY: the context is the one of this hook.
        workload_of(unsafe { bpf_get_netns_cookie(self.context.as_ptr()) })
    }

    #[inline(always)]
    fn is_local(&self, workload: WorkloadNumber) -> bool {
        verdict::is_loopback(&self.tuple.target) || is_own_address(workload, &self.tuple.target)
    }

    #[inline(always)]
    fn source_owner(&self) -> Option<WorkloadNumber> {
        local_owner(&self.tuple.source)
    }

    #[inline(always)]
    fn target_owner(&self) -> Option<WorkloadNumber> {
        local_owner(&self.tuple.target)
    }

    #[inline(always)]
    fn judge(&self, source: WorkloadNumber, destination: WorkloadNumber) -> PairVerdict {
        verdict::direct::judge(&InForce::fetch(), source, destination, self.tuple.target_port)
    }
}
