//! Inbound, and the last step of outbound: connections that look for a listener in this network namespace get the
//! daemon's, whatever address and port they name. Runs for the first segment of a connection only.

use aya_ebpf::{
    bindings::{
        bpf_sk_lookup,
        sk_action::{SK_DROP, SK_PASS},
    },
    programs::SkLookupContext,
};
use ebpf::verdict::{self, Arriving, Steer};
use ebpf_abi::{Address, DirectArrival, DropReason, OriginKind, PortAction, SocketSlot, Tuple, Verdict};

use crate::{
    direct,
    maps::{
        Handed, count_drop, count_verdict, hand_to, has_action, is_delivery, is_host, is_origin,
        is_steer_address,
    },
    words::{AF_INET, address6, field, v4},
};

#[inline(always)]
pub(crate) fn steer(context: &SkLookupContext) -> u32 {
    let arrival = Arrival::read(context.lookup);
    let verdict = if is_host() { verdict::steer_in_host(&arrival) } else { verdict::steer_in_pod(&arrival) };
    match verdict {
        Steer::Pass => {
            count_verdict(Verdict::PassedArrival);
            SK_PASS
        }
        Steer::PassDirect => {
            count_verdict(Verdict::PassedDirect);
            SK_PASS
        }
        Steer::ToStale => {
            count_drop(DropReason::DirectStale);
            hand(context, SocketSlot::Inbound)
        }
        Steer::To(slot) => hand(context, slot),
    }
}

/// Where there is no listener the daemon is away: closed.
#[inline(always)]
fn hand(context: &SkLookupContext, slot: SocketSlot) -> u32 {
    let (verdict, reason) = match slot {
        SocketSlot::Outbound => (Verdict::SteeredOutbound, DropReason::NoOutboundListener),
        SocketSlot::Inbound => (Verdict::SteeredInbound, DropReason::NoInboundListener),
        SocketSlot::Tunnel => (Verdict::SteeredTunnel, DropReason::NoTunnelListener),
    };
    match hand_to(context, slot) {
        Handed::Over => {
            count_verdict(verdict);
            SK_PASS
        }
        Handed::NoListener => {
            count_drop(reason);
            SK_DROP
        }
        Handed::Refused => {
            count_drop(DropReason::SteerFailed);
            SK_DROP
        }
    }
}

struct Arrival {
    protocol: u32,
    interface: u32,
    tuple: Tuple,
}

impl Arrival {
    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "ports have 16 bits; the kernel keeps them in wider fields"
    )]
    fn read(raw: *mut bpf_sk_lookup) -> Self {
        // All fields of both families, read before any branch: two branches that each end in a load are folded into one
        // load through a computed pointer.
        let v4_pair = [v4(field!(raw, remote_ip4)), v4(field!(raw, local_ip4))];
        let v6_pair = [address6!(raw, remote_ip6), address6!(raw, local_ip6)];
        let [source, target] = if field!(raw, family) == AF_INET { v4_pair } else { v6_pair };
        Self {
            protocol: field!(raw, protocol),
            interface: field!(raw, ingress_ifindex),
            tuple: Tuple {
                source,
                target,
                source_port: u16::from_be(field!(raw, remote_port)),
                target_port: field!(raw, local_port) as u16,
            },
        }
    }
}

impl Arriving for Arrival {
    #[inline(always)]
    fn is_tcp(&self) -> bool {
        self.protocol == IPPROTO_TCP
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        self.interface
    }

    #[inline(always)]
    fn source(&self) -> Address {
        self.tuple.source
    }

    #[inline(always)]
    fn target(&self) -> Address {
        self.tuple.target
    }

    #[inline(always)]
    fn target_port(&self) -> u16 {
        self.tuple.target_port
    }

    #[inline(always)]
    fn is_own(&self, address: &Address) -> bool {
        is_steer_address(address)
    }

    #[inline(always)]
    fn direct(&self) -> Option<DirectArrival> {
        direct::arrives(&self.tuple)
    }

    #[inline(always)]
    fn is_exempt_port(&self, port: u16) -> bool {
        has_action(port, PortAction::Exempt)
    }

    #[inline(always)]
    fn is_inbound_port(&self, port: u16) -> bool {
        has_action(port, PortAction::Inbound)
    }

    #[inline(always)]
    fn is_captured(&self) -> bool {
        is_origin(&self.tuple, OriginKind::Captured)
    }

    #[inline(always)]
    fn is_to_itself(&self) -> bool {
        is_origin(&self.tuple, OriginKind::Own)
    }

    #[inline(always)]
    fn is_delivery(&self) -> bool {
        is_delivery(&self.tuple)
    }
}

const IPPROTO_TCP: u32 = 6;
