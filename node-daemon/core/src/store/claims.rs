//! Who owns which address. Two owners of one are a contradiction.

use std::{collections::BTreeMap, net::IpAddr};

use super::{Content, Key};

/// The addresses that one version of an object would own.
pub(super) type Claims = BTreeMap<IpAddr, Share>;

/// How much of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// All of it: a pod, or a service.
    Whole,
    /// These ports: a workload on a host, beside others.
    Ports(Vec<u16>),
}

impl Share {
    /// The part that both claim.
    pub(super) fn overlap(&self, other: &Self) -> Option<Self> {
        match (self, other) {
            (Self::Whole, Self::Whole) => Some(Self::Whole),
            // A pod's or service's address is nobody else's, whatever the ports.
            (Self::Whole, Self::Ports(_)) | (Self::Ports(_), Self::Whole) => Some(Self::Whole),
            (Self::Ports(own), Self::Ports(others)) => {
                let common: Vec<u16> = own.iter().copied().filter(|port| others.contains(port)).collect();
                (!common.is_empty()).then_some(Self::Ports(common))
            }
        }
    }

    /// The port at fault, in words, after an address.
    pub(super) fn words(&self) -> String {
        match self {
            Self::Whole => String::new(),
            Self::Ports(ports) => ports.first().map_or_else(String::new, |port| format!(" port {port}")),
        }
    }
}

impl Content {
    pub(super) fn claims(&self) -> Claims {
        match self {
            Self::Workload(declared) => {
                let workload = &declared.workload;
                let share = if workload.is_host() {
                    Share::Ports(workload.ports.iter().map(|port| port.port).collect())
                } else {
                    Share::Whole
                };
                workload.addresses.iter().map(|address| (*address, share.clone())).collect()
            }
            Self::Service(service) => {
                service.addresses.iter().map(|address| (*address, Share::Whole)).collect()
            }
            // Each namespace has its own view of what is outside the mesh.
            Self::ServiceEntry(_)
            | Self::Namespace(_)
            | Self::ServiceAccount
            | Self::Mesh(_)
            | Self::Policy => Claims::new(),
        }
    }
}

/// The owners of all addresses, without contradiction.
#[derive(Debug, Default)]
pub(super) struct Holders(BTreeMap<IpAddr, Vec<(Key, Share)>>);

impl Holders {
    pub(super) fn add(&mut self, key: &Key, claims: &Claims) {
        for (address, share) in claims {
            self.0.entry(*address).or_default().push((key.clone(), share.clone()));
        }
    }

    pub(super) fn remove(&mut self, key: &Key, claims: &Claims) {
        for address in claims.keys() {
            if let Some(owners) = self.0.get_mut(address) {
                owners.retain(|(owner, _)| owner != key);
                if owners.is_empty() {
                    self.0.remove(address);
                }
            }
        }
    }

    /// Owners of an address.
    pub(super) fn at(&self, address: &IpAddr) -> &[(Key, Share)] {
        self.0.get(address).map_or(&[], Vec::as_slice)
    }
}
