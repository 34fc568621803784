//! The kernel's half of the mesh: one entry point a hook.
//!
//! outbound: [`connect4`], [`connect6`] mark and record; [`socket_events`] keeps records true; [`guard_egress`] and
//! [`guard_ingress`] see to it that a record is kept even where a mark is not.
//! direct: what the pair table permits is published by [`socket_events`] before its SYN and let by where it arrives.
//! After its handshake [`shortcut`] takes its packets past the host's stack.
//! inbound: [`steer`] hands arriving and captured connections to the daemon's listeners.
//!
//! Every hook reads its context, asks a verdict, counts, returns. Every path that cannot be judged is closed for captured
//! sockets and untouched for all others.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod capture;

#[cfg(target_arch = "bpf")]
mod events;

#[cfg(target_arch = "bpf")]
mod direct;

#[cfg(target_arch = "bpf")]
mod shortcut;

#[cfg(target_arch = "bpf")]
mod guard;

#[cfg(target_arch = "bpf")]
mod steer;

#[cfg(target_arch = "bpf")]
mod words;

#[cfg(target_arch = "bpf")]
mod maps;

#[cfg(target_arch = "bpf")]
mod hooks {
    use aya_ebpf::{
        macros::{cgroup_skb, cgroup_sock_addr, classifier, sk_lookup, sock_ops},
        programs::{SkBuffContext, SkLookupContext, SockAddrContext, SockOpsContext, TcContext},
    };

    use crate::{capture, events, guard, shortcut, steer};

    /// An IPv4 connect is about to happen. 1 lets it, 0 refuses it.
    #[cgroup_sock_addr(connect4)]
    pub(crate) fn connect4(context: SockAddrContext) -> i32 {
        capture::connect4(&context)
    }

    /// An IPv6 or v4-mapped connect is about to happen. 1 lets it, 0 refuses it.
    #[cgroup_sock_addr(connect6)]
    pub(crate) fn connect6(context: SockAddrContext) -> i32 {
        capture::connect6(&context)
    }

    /// A socket listens, connects or ends. The answer has no meaning for these events.
    #[sock_ops]
    pub(crate) fn socket_events(context: SockOpsContext) -> u32 {
        events::event(&context)
    }

    /// A packet of a socket of this cgroup is about to leave by an interface. 1 lets it, 0 drops it.
    #[cgroup_skb(egress)]
    pub(crate) fn guard_egress(context: SkBuffContext) -> i32 {
        guard::egress(&context)
    }

    /// A packet for a socket of this cgroup has arrived. 1 lets it, 0 drops it.
    #[cgroup_skb(ingress)]
    pub(crate) fn guard_ingress(context: SkBuffContext) -> i32 {
        guard::ingress(&context)
    }

    /// A connection looks for its listener in this network namespace.
    #[sk_lookup]
    pub(crate) fn steer(context: SkLookupContext) -> u32 {
        steer::steer(&context)
    }

    /// A packet has come from a pod to the host side of its veth. 7 hands it to another pod, -1 lets it go on.
    #[classifier]
    pub(crate) fn shortcut(context: TcContext) -> i32 {
        shortcut::packet(&context)
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel accepts the helpers that are used only from programs under a licence compatible with the GPL.
#[cfg(target_arch = "bpf")]
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Built for the host there is nothing to run: `cargo xtask build-ebpf` builds the programs.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
