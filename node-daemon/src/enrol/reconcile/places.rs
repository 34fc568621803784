//! Network namespaces in which something is enrolled: their settings, rules and routes, and who keeps them.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use node_core::workload::{ObjectName, Workload};

use super::{Entry, Place, Reconciler};
use crate::{
    enrol::{
        Refusal,
        keeper::Keeper,
        routes::{self, RouteError, Want},
        state::Entry as StateEntry,
        sysctl::{self, Former},
    },
    sys::{Namespace, Watch},
};

impl Reconciler {
    /// Makes settings, rules and routes of a namespace, or adds a tenant to one that has them.
    pub(super) async fn open_place(
        &mut self,
        workload: &Workload,
        namespace: &Arc<Namespace>,
        own: &BTreeSet<IpAddr>,
    ) -> Result<(), Refusal> {
        let cookie = namespace.cookie();
        if let Some(place) = self.places.get_mut(&cookie) {
            place.tenants.insert(workload.name.clone());
            let want = self.want(cookie, Some(workload));
            if let Some(place) = self.places.get(&cookie) {
                // First, or the keeper would take this for somebody else's doing.
                place.keeper.want(want.clone());
            }
            routes::ensure(namespace, &want).await?;
            return Ok(());
        }
        let setting = |source| Refusal::Call { call: "setting sysctls", source };
        let settings = sysctl::read(namespace).map_err(setting)?;
        self.state.remember(StateEntry {
            cookie,
            path: namespace.path().map(ToOwned::to_owned),
            settings,
        })?;
        sysctl::apply(namespace).map_err(setting)?;
        let watch = Watch::open(namespace)
            .map_err(|source| Refusal::Call { call: "watching the namespace", source })?;
        let want = self.want(cookie, Some(workload));
        let (_, addresses) = routes::ensure(namespace, &want).await?;
        let keeper = Keeper::start(Arc::clone(namespace), watch, want, own.clone(), self.told.clone());
        let place = Place {
            namespace: Arc::clone(namespace),
            keeper,
            addresses,
            tenants: BTreeSet::from([workload.name.clone()]),
        };
        self.places.insert(cookie, place);
        Ok(())
    }

    /// Sources of captured connections in a namespace: the addresses of its tenants.
    pub(super) fn want(&self, cookie: u64, joining: Option<&Workload>) -> Want {
        let tenants = self.entries.values().filter(|entry| entry.cookie == cookie);
        let mut sources: Vec<IpAddr> = joining.map(|new| new.addresses.clone()).unwrap_or_default();
        let is_joining = |entry: &&Entry| joining.is_some_and(|new| new.name == entry.workload.name);
        sources.extend(
            tenants
                .filter(|entry| !is_joining(entry))
                .flat_map(|entry| entry.workload.addresses.iter().copied()),
        );
        Want { mark: self.config.mark, sources }
    }

    /// Takes a tenant out of a namespace; with the last one go rules, routes, settings and the namespace's handles.
    pub(super) async fn close_place(&mut self, cookie: u64, tenant: &ObjectName) {
        let Some(place) = self.places.get_mut(&cookie) else {
            // It was refused before anything but the record was made.
            self.forget(cookie).await;
            return;
        };
        place.tenants.remove(tenant);
        if !place.tenants.is_empty() {
            let want = self.want(cookie, None);
            if let Some(place) = self.places.get(&cookie) {
                place.keeper.want(want);
            }
            return;
        }
        if let Some(place) = self.places.remove(&cookie) {
            place.keeper.stop().await;
        }
        self.forget(cookie).await;
    }

    /// Gives a namespace back what was changed there, and strikes it from the record.
    pub(super) async fn forget(&mut self, cookie: u64) {
        match self.state.forget(cookie) {
            Ok(None) => {}
            Ok(Some(entry)) => {
                if let Some(namespace) = namespace_of(&entry)
                    && let Err(error) = give_back(&namespace, &entry.settings).await
                {
                    self.failed("giving back routes and settings", &error);
                }
            }
            Err(error) => self.failed("recording enrolments", &error),
        }
    }
}

/// The namespace of a record, if it is still the same.
pub(in crate::enrol) fn namespace_of(entry: &StateEntry) -> Option<Namespace> {
    let namespace = match &entry.path {
        Some(path) => Namespace::open(path),
        None => Namespace::own(),
    };
    namespace.ok().filter(|namespace| namespace.cookie() == entry.cookie)
}

/// Removes rules and routes, and restores settings.
pub(in crate::enrol) async fn give_back(
    namespace: &Namespace,
    settings: &[Former],
) -> Result<(), RouteError> {
    routes::remove(namespace).await?;
    sysctl::restore(namespace, settings)
        .map_err(|source| RouteError::Kernel { call: "restoring sysctls", source })
}
