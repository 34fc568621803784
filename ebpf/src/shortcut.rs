//! The shortcut: segments of a direct connection go from the host side of one pod's veth straight into the other pod, past
//! the host's network stack.
//!
//! [`stands`] enters both directions -> [`packet`] hands over whatever has an entry -> [`closes`] notes the end; the daemon removes the
//! entries a minute later. The handshake takes the host's way, so the rules of its network decide whether there is a
//! connection; from then on FIN and RST take the same way as the data.

use aya_ebpf::{
    EbpfContext as _,
    bindings::__sk_buff,
    helpers::generated::{bpf_redirect_peer, bpf_skb_change_type, bpf_skb_load_bytes},
    programs::TcContext,
};
use ebpf::verdict::shortcut::{HEAD_BYTES, Network, Segment, V6_TCP_BYTES, network, segment_v4, segment_v6};
use ebpf_abi::{DirectValue, DropReason, ShortcutKey, ShortcutValue, Tuple, Verdict};

use crate::{
    maps::{
        close_shortcut, count_drop, count_verdict, forget_shortcut, host_interface, shortcut, take_shortcut,
    },
    words::field,
};

/// A packet comes from a pod.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the helper answers with an action, which is a small number"
)]
pub(crate) fn packet(context: &TcContext) -> i32 {
    let raw = context.as_ptr().cast::<__sk_buff>();
    let Some(segment) = segment(raw) else { return GO_ON };
    if segment.opens {
        return GO_ON;
    }
    let key = ShortcutKey { interface: field!(raw, ingress_ifindex), tuple: segment.tuple };
    let Some(target) = shortcut(&key) else { return GO_ON };
    // On the port of a bridge a packet for the bridge's other side counts as a stranger's, and the pod would drop it.
    if field!(raw, pkt_type) != PACKET_HOST {
        // SAFETY: the context is the one of this hook.
        let changed = unsafe { bpf_skb_change_type(raw, PACKET_HOST) };
        if changed != 0 {
            return GO_ON;
        }
    }
    count_verdict(Verdict::Shortcut);
    // SAFETY: the helper only notes where the packet is to go.
    let redirect = unsafe { bpf_redirect_peer(target, 0) };
    redirect as i32
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "headers have some dozens of bytes")]
fn segment(raw: *mut __sk_buff) -> Option<Segment> {
    let mut head = [0; HEAD_BYTES];
    // SAFETY: the context is the one of this hook, and so many bytes fit.
    if unsafe { bpf_skb_load_bytes(raw.cast(), 0, head.as_mut_ptr().cast(), HEAD_BYTES as u32) } != 0 {
        return None;
    }
    match network(&head)? {
        Network::V4 => segment_v4(&head),
        Network::V6 => {
            let mut tcp = [0; V6_TCP_BYTES];
            // SAFETY: as above.
            let status = unsafe {
                bpf_skb_load_bytes(
                    raw.cast(),
                    HEAD_BYTES as u32,
                    tcp.as_mut_ptr().cast(),
                    V6_TCP_BYTES as u32,
                )
            };
            if status != 0 {
                return None;
            }
            segment_v6(&head, &tcp)
        }
    }
}

/// A direct connection stands, and nothing but its SYN and SYN-ACK was sent. Both directions or none.
///
/// A function of its own, as [`closes`] is: the stack of a program has 512 bytes, and those of `socket_events` are taken.
#[inline(never)]
pub(crate) fn stands(tuple: &Tuple, connection: &DirectValue) {
    let Some((mut key, back)) = first_key(tuple, connection) else { return };
    let mut value = ShortcutValue {
        socket_cookie: connection.socket_cookie,
        closed_nanos: 0,
        interface: back,
        reserved: 0,
    };
    if take_shortcut(&key, &value) {
        value.interface = key.interface;
        turn(&mut key, back);
        if take_shortcut(&key, &value) {
            return;
        }
        turn(&mut key, value.interface);
        forget_shortcut(&key);
    }
    count_drop(DropReason::ShortcutFull);
}

/// The client's socket is closed.
#[inline(never)]
pub(crate) fn closes(tuple: &Tuple, connection: &DirectValue, now_nanos: u64) {
    let Some((mut key, back)) = first_key(tuple, connection) else { return };
    close_shortcut(&key, connection.socket_cookie, now_nanos);
    turn(&mut key, back);
    close_shortcut(&key, connection.socket_cookie, now_nanos);
}

/// The key of what the client sends, and the interface of what it receives. `None` where one of the two pods has no shortcut.
#[inline(always)]
fn first_key(tuple: &Tuple, connection: &DirectValue) -> Option<(ShortcutKey, u32)> {
    let there = host_interface(&connection.source)?;
    let back = host_interface(&connection.destination)?;
    Some((ShortcutKey { interface: there, tuple: *tuple }, back))
}

/// Makes a key the one of the other direction.
#[inline(always)]
fn turn(key: &mut ShortcutKey, interface: u32) {
    key.interface = interface;
    key.tuple = key.tuple.reversed();
}

/// The next program, or the host's stack (`TCX_NEXT`).
const GO_ON: i32 = -1;
const PACKET_HOST: u32 = 0;
