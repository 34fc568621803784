//! What happens to sockets after the connect hook: a captured socket that listens is cleared, connects of host workloads
//! say who they are, and those of pods that the pair table permits are published (`direct`).

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_CLOSE,
        BPF_TCP_FIN_WAIT2, bpf_sock, bpf_sock_ops,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns},
    programs::SockOpsContext,
};
use ebpf::verdict::{self, Ended, Opening};
use ebpf_abi::{Address, DropReason, Origin, OriginKind, Tuple, WorkloadNumber};

use crate::{
    direct,
    maps::{
        close_origin, count_drop, forget_captured, forget_origin, host_workload, is_captured, is_exempt,
        is_instance_of_host_workload, is_origin, is_own_address, our_mark, port_owner, publish_origin,
        set_mark,
    },
    words::{AF_INET, address6, field, v4},
};

#[inline(always)]
pub(crate) fn event(context: &SockOpsContext) -> u32 {
    let raw = context.ops;
    match field!(raw, op) {
        BPF_SOCK_OPS_TCP_LISTEN_CB => listens(context),
        operation if is_instance_of_host_workload() => event_on_host(context, operation),
        operation => event_of_pod(context, operation),
    }
    0
}

#[inline(never)]
fn event_on_host(context: &SockOpsContext, operation: u32) {
    match operation {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connects(context),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => stands(context),
        BPF_SOCK_OPS_STATE_CB => {
            let [last_state, state] = states(context);
            if state == BPF_TCP_CLOSE {
                closes(context, last_state);
            }
        }
        _ => {}
    }
}

#[inline(always)]
fn event_of_pod(context: &SockOpsContext, operation: u32) {
    match operation {
        BPF_SOCK_OPS_TCP_CONNECT_CB => direct::connects(context),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => direct::stands(context),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => direct::accepted(context),
        BPF_SOCK_OPS_STATE_CB => {
            let [last_state, state] = states(context);
            match state {
                BPF_TCP_FIN_WAIT2 => direct::is_half_closed(context),
                BPF_TCP_CLOSE => direct::closes(context, last_state),
                _ => {}
            }
        }
        _ => {}
    }
}

/// The last state of a socket and the one that it enters.
#[inline(always)]
fn states(context: &SockOpsContext) -> [u32; 2] {
    let raw = context.ops;
    [field!(raw, __bindgen_anon_1.args[0]), field!(raw, __bindgen_anon_1.args[1])]
}

/// A captured socket that was disconnected and listens would send its SYN-ACKs to `lo`.
#[inline(always)]
fn listens(context: &SockOpsContext) {
    let sk = socket_of(context);
    // SAFETY: checked for null; the socket is the one of this hook's context.
    if sk.is_null() || !unsafe { is_captured(sk) } {
        return;
    }
    if !clear_mark(context, sk) {
        count_drop(DropReason::ClearFailed);
        return;
    }
    // SAFETY: as above.
    unsafe { forget_captured(sk) };
}

/// Publishes who connects, before the SYN: the daemon's listeners on a host serve many workloads, and local processes share
/// all addresses (T-27).
#[inline(always)]
fn connects(context: &SockOpsContext) {
    // SAFETY: the context is the one of this hook.
    let cookie = unsafe { bpf_get_netns_cookie(context.as_ptr()) };
    let Some(workload) = host_workload(cookie) else { return };
    let sk = socket_of(context);
    // SAFETY: checked for null; the socket is the one of this hook's context.
    if sk.is_null() || unsafe { is_exempt(sk) } {
        return;
    }
    let connect = Connect { sk, workload, tuple: tuple_of(context) };
    let Some(kind) = verdict::opened(&connect, workload) else { return };
    if publish(context, workload, kind, &connect.tuple) {
        return;
    }
    count_drop(DropReason::OriginFailed);
    if kind == OriginKind::Captured {
        // Nobody would know whose connection it is, and without an origin it could meet a listener of the host. Without
        // the mark it takes the way to the real interface, where the guard holds it: the connect times out.
        clear_mark(context, sk);
    }
}

/// No listener is looked up any more for a connection that stands: what only `steer` needed to know goes.
#[inline(always)]
fn stands(context: &SockOpsContext) {
    let tuple = tuple_of(context);
    if is_origin(&tuple, OriginKind::Own) {
        // SAFETY: the context is the one of this hook.
        forget_origin(&tuple, unsafe { bpf_get_socket_cookie(context.as_ptr()) });
    }
}

/// An origin outlives its socket only where the daemon may still have the connection in its queue.
#[inline(always)]
fn closes(context: &SockOpsContext, last_state: u32) {
    let tuple = tuple_of(context);
    // SAFETY: the context is the one of this hook.
    let cookie = unsafe { bpf_get_socket_cookie(context.as_ptr()) };
    match verdict::ended(last_state) {
        Ended::Aborted => forget_origin(&tuple, cookie),
        // SAFETY: the helper only reads the clock.
        Ended::InOrder => close_origin(&tuple, cookie, unsafe { bpf_ktime_get_ns() }),
    }
}

#[inline(always)]
fn publish(context: &SockOpsContext, workload: WorkloadNumber, kind: OriginKind, tuple: &Tuple) -> bool {
    let flags = field!(context.ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    if context.set_cb_flags(flags as i32).is_err() {
        return false;
    }
    // SAFETY: the context is the one of this hook.
    let socket_cookie = unsafe { bpf_get_socket_cookie(context.as_ptr()) };
    publish_origin(tuple, &Origin { workload, kind: kind as u32, socket_cookie, closed_nanos: 0 })
}

struct Connect {
    /// The socket of this hook's context, which is not null.
    sk: *mut bpf_sock,
    workload: WorkloadNumber,
    tuple: Tuple,
}

impl Opening for Connect {
    #[inline(always)]
    fn is_captured(&self) -> bool {
        // SAFETY: the field's invariant.
        unsafe { is_captured(self.sk) }
    }

    #[inline(always)]
    fn target(&self) -> Address {
        self.tuple.target
    }

    #[inline(always)]
    fn is_own(&self, address: &Address) -> bool {
        is_own_address(self.workload, address)
    }

    #[inline(always)]
    fn port_owner(&self) -> Option<WorkloadNumber> {
        port_owner(self.tuple.target_port)
    }
}

/// False where the mark could not be cleared.
#[inline(always)]
pub(crate) fn clear_mark(context: &SockOpsContext, sk: *mut bpf_sock) -> bool {
    let mark = field!(sk, mark);
    // SAFETY: the context is the one of this hook.
    mark & our_mark() == 0 || unsafe { set_mark(context.as_ptr(), mark & !our_mark()) }
}

#[inline(always)]
pub(crate) fn socket_of(context: &SockOpsContext) -> *mut bpf_sock {
    field!(context.ops, __bindgen_anon_2.sk)
}

/// The connection from the view of the socket that opened it.
#[inline(never)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "ports have 16 bits; the kernel keeps them in wider fields"
)]
pub(crate) fn tuple_of(context: &SockOpsContext) -> Tuple {
    let raw: *mut bpf_sock_ops = context.ops;
    let [source, target] = addresses_of(raw);
    Tuple {
        source,
        target,
        source_port: field!(raw, local_port) as u16,
        // The upper half in network byte order.
        target_port: u32::from_be(field!(raw, remote_port)) as u16,
    }
}

/// A v4-mapped socket has its addresses in the IPv4 fields, too, and there earlier. All fields are read before any branch:
/// two branches that each end in a load are folded into one load through a computed pointer.
#[inline(always)]
fn addresses_of(raw: *mut bpf_sock_ops) -> [Address; 2] {
    let v4_pair = [v4(field!(raw, local_ip4)), v4(field!(raw, remote_ip4))];
    let v6_pair = [address6!(raw, local_ip6), address6!(raw, remote_ip6)];
    let is_v4 = field!(raw, family) == AF_INET || verdict::is_v4_mapped(&v6_pair[1]);
    if is_v4 { v4_pair } else { v6_pair }
}
