//! Where a pod's veth ends in the host's namespace, and whether its packets may take a shortcut there.
//!
//! An index alone proves nothing: each namespace counts its interfaces from one. So both ends must name each other, and the
//! host's end must name the very namespace of the pod.
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel's attributes are many and grow; those not named here say nothing about a veth"
)]

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _},
    pin::pin,
};

use super::netlink::{Failed, Netlink, collect};
use crate::sys::Namespace;
use futures_util::StreamExt;
use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::AddressAttribute,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
    tc::TcAttribute,
};

/// Why packets of a pod take no shortcut. It works without one.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoShortcut {
    /// More than one interface, or none, has the workload's addresses.
    #[error(
        "the workload's addresses are on {0} interfaces of its network namespace; a shortcut needs them on one"
    )]
    Scattered(usize),
    /// A macvlan, an ipvlan, a device of its own.
    #[error("interface {0} of the pod is no veth; only a veth has another end to hand packets to")]
    NoVeth(u32),
    /// The other end is elsewhere, as in nested containers.
    #[error("the other end of the pod's veth is not in the network namespace of this daemon")]
    Elsewhere,
    /// Classic tc programs judge packets there.
    #[error(
        "interface {0} has the queueing discipline `{1}` of another owner, whose filters would not see what a shortcut takes"
    )]
    Filtered(u32, String),
    /// The kernel refused a question.
    #[error("{call} failed: {source}")]
    Kernel { call: &'static str, source: io::Error },
}

impl From<Failed> for NoShortcut {
    fn from(failed: Failed) -> Self {
        Self::Kernel { call: failed.call, source: failed.source }
    }
}

/// Index of the host side of the veth that has the workload's `addresses`, an interface of `host`.
pub(super) async fn host_side(
    pod: &Namespace,
    host: &Namespace,
    addresses: &[IpAddr],
) -> Result<u32, NoShortcut> {
    let inside = Netlink::open(pod)?;
    let interface = inside.interface_of(addresses).await?;
    let link = inside.link(interface).await?.ok_or(NoShortcut::NoVeth(interface))?;
    let other = veth_of(&link).ok_or(NoShortcut::NoVeth(interface))?.other;
    let outside = Netlink::open(host)?;
    let found = outside.link(other).await?.as_ref().and_then(veth_of).ok_or(NoShortcut::Elsewhere)?;
    let namespace = outside.id_of(pod).await?;
    if found.other != interface || namespace.is_none() || found.namespace != namespace {
        return Err(NoShortcut::Elsewhere);
    }
    match outside.filter_of(other).await? {
        Some(kind) => Err(NoShortcut::Filtered(other, kind)),
        None => Ok(other),
    }
}

/// One end of a veth, and where the other is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Veth {
    /// Index of the other end in its namespace.
    other: u32,
    /// That namespace, as this one numbers it; `None` where it is this one.
    namespace: Option<i32>,
}

fn veth_of(link: &LinkMessage) -> Option<Veth> {
    let mut is_veth = false;
    let mut other = None;
    let mut namespace = None;
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::LinkInfo(infos) => {
                is_veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
            }
            LinkAttribute::Link(index) => other = Some(*index),
            LinkAttribute::LinkNetNsId(id) => namespace = Some(*id),
            _ => {}
        }
    }
    other.filter(|_| is_veth).map(|other| Veth { other, namespace })
}

impl Netlink {
    async fn interface_of(&self, wanted: &[IpAddr]) -> Result<u32, NoShortcut> {
        let all = collect("listing addresses", self.handle.address().get().execute()).await?;
        let has_one = |attributes: &[AddressAttribute]| {
            attributes.iter().any(|attribute| match attribute {
                AddressAttribute::Local(address) | AddressAttribute::Address(address) => {
                    wanted.contains(address)
                }
                _ => false,
            })
        };
        let found: BTreeSet<u32> = all
            .iter()
            .filter(|message| has_one(&message.attributes))
            .map(|message| message.header.index)
            .collect();
        match found.first() {
            Some(interface) if found.len() == 1 => Ok(*interface),
            _ => Err(NoShortcut::Scattered(found.len())),
        }
    }

    async fn link(&self, index: u32) -> Result<Option<LinkMessage>, NoShortcut> {
        match collect("reading an interface", self.handle.link().get().match_index(index).execute()).await {
            Ok(links) => Ok(links.into_iter().next()),
            Err(failed) if failed.source.raw_os_error() == Some(nix::libc::ENODEV) => Ok(None),
            Err(failed) => Err(failed.into()),
        }
    }

    /// How this namespace numbers another one; `None` where it has no number for it.
    async fn id_of(&self, other: &Namespace) -> Result<Option<i32>, NoShortcut> {
        let call = "asking for the number of the pod's namespace";
        let descriptor = u32::try_from(other.as_fd().as_raw_fd())
            .map_err(|error| NoShortcut::Kernel { call, source: io::Error::other(error) })?;
        let mut question = NsidMessage::default();
        question.attributes.push(NsidAttribute::Fd(descriptor));
        let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(question));
        message.header.flags = NLM_F_REQUEST;
        let mut handle = self.handle.clone();
        let answers = handle.request(message).map_err(|error| Failed::of(call, error))?;
        let mut answers = pin!(answers);
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(found)) => {
                    let id = found.attributes.iter().find_map(|attribute| match attribute {
                        NsidAttribute::Id(id) => Some(*id),
                        _ => None,
                    });
                    return Ok(id.filter(|id| *id >= 0));
                }
                NetlinkPayload::Error(error) => {
                    return Err(NoShortcut::Kernel { call, source: error.to_io() });
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// The queueing discipline that holds filters of arriving packets, if there is one.
    async fn filter_of(&self, index: u32) -> Result<Option<String>, NoShortcut> {
        let signed = i32::try_from(index).unwrap_or(i32::MAX);
        let all = collect("listing queueing disciplines", self.handle.qdisc().get().index(signed).execute())
            .await?;
        let kinds = all.iter().filter(|message| message.header.index == signed).flat_map(|message| {
            message.attributes.iter().filter_map(|attribute| match attribute {
                TcAttribute::Kind(kind) => Some(kind.clone()),
                _ => None,
            })
        });
        Ok(kinds.into_iter().find(|kind| kind == "clsact" || kind == "ingress"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(kind: Option<InfoKind>, other: Option<u32>, namespace: Option<i32>) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.attributes.extend(kind.map(|kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])));
        message.attributes.extend(other.map(LinkAttribute::Link));
        message.attributes.extend(namespace.map(LinkAttribute::LinkNetNsId));
        message
    }

    #[test]
    fn a_veth_says_where_its_other_end_is() {
        let veth = veth_of(&link(Some(InfoKind::Veth), Some(7), Some(3)));
        assert_eq!(veth, Some(Veth { other: 7, namespace: Some(3) }));
        let veth = veth_of(&link(Some(InfoKind::Veth), Some(7), None));
        assert_eq!(veth, Some(Veth { other: 7, namespace: None }));
    }

    #[test]
    fn what_is_no_veth_has_no_other_end() {
        for (kind, other) in [
            (None, Some(7)),
            (Some(InfoKind::Vlan), Some(7)),
            (Some(InfoKind::MacVlan), Some(7)),
            (Some(InfoKind::IpVlan), Some(7)),
            (Some(InfoKind::Veth), None),
        ] {
            assert_eq!(veth_of(&link(kind.clone(), other, Some(3))), None, "{kind:?} {other:?}");
        }
    }
}
