//! Certificates: who this node's workloads are, and who their peers may be.
//!
//! [`verify`] judges peers; [`store`] holds what workloads present; [`rotate`] keeps it fresh; [`client`] speaks to the
//! authority. [`files`] holds what rules of tenants name beside it, and [`outside`] judges servers by that. The data path gets a [`Store`] to look things up in and to wait on. Private keys do not leave this room.

mod backoff;
mod client;
mod disk;
mod files;
mod key;
mod outside;
mod rotate;
mod seal;
mod store;
pub mod verify;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use tokio::{sync::watch, task::JoinSet};

use self::{client::Client, rotate::Rotator};
pub use self::{
    client::{AuthorityConfig, AuthorityFailed},
    files::{ClientFiles, FileFault, Material, RuleFault},
    key::PrivateKey,
    outside::{NoServerName, server_name},
    rotate::{CertificateView, Wanted},
    seal::{RootsFault, Seal, SealFault, SealRefused, SealWitness, Seals},
    store::{ALPN_MESH, ALPN_TUNNEL, Credentials, NoCertificateInTime, Store},
};
use crate::telemetry::Sink;
use spiffe_id::NodeId;

/// The room, running. Dropping it ends its tasks; the store goes on serving what it has.
pub struct Handle {
    store: Arc<Store>,
    client: Arc<Client>,
    views: rotate::Views,
    _tasks: JoinSet<()>,
}

/// Starts joining, watching and renewing for what is `wanted`. An authority that is away delays certificates, nothing
/// else.
pub fn start(config: AuthorityConfig, wanted: watch::Receiver<Wanted>, events: Sink) -> Handle {
    let store = Arc::new(Store::new(config.trust_domain.clone()));
    let client = Arc::new(Client::new(config, Arc::clone(&store), events.clone()));
    let views = rotate::Views::new(Mutex::new(BTreeMap::new()));
    let rotator = Rotator {
        authority: Arc::clone(&client),
        store: Arc::clone(&store),
        wanted,
        events,
        views: Arc::clone(&views),
        wall: SystemTime::now,
    };
    let mut joined = client.joined();
    let mut tasks = JoinSet::new();
    tasks.spawn(Arc::clone(&client).run());
    tasks.spawn(async move {
        // Nothing can be asked for before the node itself is known.
        if joined.wait_for(|joined| *joined).await.is_ok() {
            rotator.run().await;
        }
    });
    Handle { store, client, views, _tasks: tasks }
}

impl Handle {
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Every identity that is wanted, with or without a certificate.
    pub fn views(&self) -> Vec<CertificateView> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// What the node signs with, as its certificate is renewed.
    pub fn seals(&self) -> Seals {
        let client = Arc::clone(&self.client);
        Seals::new(move || client.seal())
    }

    /// The node's own name and the end of its certificate, once it has joined.
    pub fn node_certificate(&self) -> Option<(NodeId, SystemTime)> {
        self.client.node_certificate()
    }
}
