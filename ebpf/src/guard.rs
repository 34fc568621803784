//! What a mark promises, a record keeps: no segment of a captured connection leaves by a real interface, and no reset
//! ends a captured connect while the daemon is away.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, BPF_TCP_SYN_SENT, bpf_sock},
    helpers::generated::{bpf_sk_fullsock, bpf_skb_load_bytes},
    programs::SkBuffContext,
};
use ebpf::verdict;
use ebpf_abi::DropReason;

use crate::{
    maps::{count_drop, is_captured},
    words::field,
};

#[inline(always)]
pub(crate) fn egress(context: &SkBuffContext) -> i32 {
    let raw = context.as_ptr().cast::<__sk_buff>();
    let may_leave = verdict::may_leave(field!(raw, ifindex), || {
        let sk = socket_of(raw);
        // SAFETY: checked for null; the socket is the one of this hook's context.
        !sk.is_null() && unsafe { is_captured(sk) }
    });
    if may_leave {
        return LET;
    }
    count_drop(DropReason::CapturedEgress);
    DROP
}

#[inline(always)]
pub(crate) fn ingress(context: &SkBuffContext) -> i32 {
    let raw = context.as_ptr().cast::<__sk_buff>();
    let sk = socket_of(raw);
    // SAFETY: checked for null; the socket is the one of this hook's context.
    if sk.is_null() || !unsafe { is_captured(sk) } {
        return LET;
    }
    if verdict::may_reset(true, is_connecting(sk)) || !is_reset(context.as_ptr()) {
        return LET;
    }
    count_drop(DropReason::ResetWhileWaiting);
    DROP
}

#[inline(always)]
fn socket_of(raw: *mut __sk_buff) -> *mut bpf_sock {
    field!(raw, __bindgen_anon_2.sk)
}

#[inline(always)]
fn is_connecting(sk: *mut bpf_sock) -> bool {
    // SAFETY: the socket is the one of this hook's context and not null.
    let full = unsafe { bpf_sk_fullsock(sk) };
    !full.is_null() && field!(full, state) == BPF_TCP_SYN_SENT
}

/// Whether the packet is a TCP reset. A reset carries no extension header: the kernel that sends it is our own.
#[inline(always)]
fn is_reset(context: *mut c_void) -> bool {
    let Some(first) = byte(context, 0) else { return false };
    let transport = match first >> 4 {
        4 => {
            if byte(context, V4_PROTOCOL) != Some(IPPROTO_TCP) {
                return false;
            }
            u32::from(first & 0xf) * 4
        }
        6 => {
            if byte(context, V6_NEXT_HEADER) != Some(IPPROTO_TCP) {
                return false;
            }
            V6_HEADER_LEN
        }
        _ => return false,
    };
    byte(context, transport + TCP_FLAGS).is_some_and(|flags| flags & TCP_RST != 0)
}

#[inline(always)]
fn byte(context: *mut c_void, offset: u32) -> Option<u8> {
    let mut byte = 0_u8;
    // SAFETY: the context is the one of this hook, and one byte fits.
    let status = unsafe { bpf_skb_load_bytes(context, offset, (&raw mut byte).cast(), 1) };
    (status == 0).then_some(byte)
}

const LET: i32 = 1;
const DROP: i32 = 0;
const IPPROTO_TCP: u8 = 6;
const V4_PROTOCOL: u32 = 9;
const V6_NEXT_HEADER: u32 = 6;
const V6_HEADER_LEN: u32 = 40;
const TCP_FLAGS: u32 = 13;
const TCP_RST: u8 = 4;
