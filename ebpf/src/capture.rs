//! Outbound: which connects are ours. The address is never touched; a mark leads the connection to `lo` and into the
//! daemon's listener, and a record on the socket says so to the guard.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::generated::{bpf_get_netns_cookie, bpf_set_retval},
    programs::SockAddrContext,
};
use ebpf::verdict::{self, Connect, Connecting};
use ebpf_abi::{Address, DropReason, PairVerdict, Verdict, WorkloadNumber};

use crate::{
    direct,
    maps::{
        InForce, count_drop, count_verdict, forget_captured, host_workload, is_captured, is_daemon_there,
        is_exempt, is_instance_of_host_workload, is_own_address, local_owner, our_mark, record_captured,
        set_mark, workload_of,
    },
    words::{address6, field, v4},
};

#[inline(always)]
pub(crate) fn connect4(context: &SockAddrContext) -> i32 {
    connect(context, |raw| v4(field!(raw, user_ip4)))
}

#[inline(always)]
pub(crate) fn connect6(context: &SockAddrContext) -> i32 {
    connect(context, |raw| address6!(raw, user_ip6))
}

#[inline(always)]
fn connect(context: &SockAddrContext, target: impl Fn(*mut bpf_sock_addr) -> Address) -> i32 {
    let raw = context.sock_addr;
    let socket = Socket { context: context.as_ptr(), raw, sk: field!(raw, __bindgen_anon_1.sk), target };
    match verdict::connect(&socket) {
        Connect::Pass => LET,
        Connect::PassExempt => {
            count_verdict(Verdict::PassedExempt);
            LET
        }
        Connect::PassLocal => {
            clear(&socket);
            count_verdict(Verdict::PassedConnect);
            LET
        }
        Connect::Capture(workload) => capture(&socket, workload),
        // Counted when it is published, before the SYN.
        Connect::Direct(_) => {
            clear(&socket);
            LET
        }
        Connect::Deny { source, destination } => {
            direct::tell_refused(source, destination, &socket.target(), socket.target_port());
            refuse(DropReason::DirectDenied)
        }
    }
}

/// Mark first, record second: a mark without a record is led to `lo` all the same, a record without a mark is held by
/// the guard. Either alone leaks nothing, so the order only decides what a failure in between looks like.
#[inline(always)]
fn capture<T>(socket: &Socket<T>, workload: WorkloadNumber) -> i32 {
    let mark = mark_of(socket.sk);
    // SAFETY: the context is the one of this hook.
    if mark & our_mark() != our_mark() && !unsafe { set_mark(socket.context, mark | our_mark()) } {
        return refuse(DropReason::MarkFailed);
    }
    // SAFETY: the socket is the one of this hook's context, which is never null.
    if !unsafe { record_captured(socket.sk, workload) } {
        return refuse(DropReason::RecordFailed);
    }
    count_verdict(Verdict::Captured);
    LET
}

/// Removes what a captured connect left on a socket that is used again. A record that stays behind keeps the socket
/// closed, never open.
#[inline(always)]
fn clear<T>(socket: &Socket<T>) {
    let mark = mark_of(socket.sk);
    // SAFETY: the context is the one of this hook.
    if mark & our_mark() != 0 && !unsafe { set_mark(socket.context, mark & !our_mark()) } {
        count_drop(DropReason::ClearFailed);
        return;
    }
    // SAFETY: the socket is the one of this hook's context, which is never null.
    unsafe {
        if is_captured(socket.sk) {
            forget_captured(socket.sk);
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "ports have 16 bits; the kernel keeps them in wider fields"
)]
impl<T> Socket<T> {
    #[inline(always)]
    fn target_port(&self) -> u16 {
        u16::from_be(field!(self.raw, user_port) as u16)
    }
}

/// Refuses the connect with ECONNREFUSED, which every application handles.
#[inline(always)]
fn refuse(reason: DropReason) -> i32 {
    count_drop(reason);
    // SAFETY: the helper only sets what connect() returns.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}

#[inline(always)]
fn mark_of(sk: *mut bpf_sock) -> u32 {
    field!(sk, mark)
}

struct Socket<T> {
    context: *mut c_void,
    raw: *mut bpf_sock_addr,
    sk: *mut bpf_sock,
    target: T,
}

impl<T: Fn(*mut bpf_sock_addr) -> Address> Connecting for Socket<T> {
    #[inline(always)]
    fn workload(&self) -> Option<WorkloadNumber> {
        // SAFETY: the context is the one of this hook.
        let cookie = unsafe { bpf_get_netns_cookie(self.context) };
        if is_instance_of_host_workload() { host_workload(cookie) } else { workload_of(cookie) }
    }

    #[inline(always)]
    fn is_exempt(&self) -> bool {
        // SAFETY: the socket is the one of this hook's context, which is never null.
        unsafe { is_exempt(self.sk) }
    }

    #[inline(always)]
    fn is_stream(&self) -> bool {
        let protocol = field!(self.raw, protocol);
        field!(self.raw, type_) == SOCK_STREAM && (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP)
    }

    #[inline(always)]
    fn target(&self) -> Address {
        (self.target)(self.raw)
    }

    #[inline(always)]
    fn is_own(&self, workload: WorkloadNumber, address: &Address) -> bool {
        is_own_address(workload, address)
    }

    #[inline(always)]
    fn local_owner(&self, address: &Address) -> Option<WorkloadNumber> {
        if is_instance_of_host_workload() { None } else { local_owner(address) }
    }

    #[inline(always)]
    fn is_daemon_there(&self) -> bool {
        is_daemon_there()
    }

    #[inline(always)]
    fn judge(&self, source: WorkloadNumber, destination: WorkloadNumber) -> PairVerdict {
        verdict::direct::judge(&InForce::fetch(), source, destination, self.target_port())
    }
}

const LET: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_MPTCP: u32 = 262;
