//! Certificates of workloads: asked for when a workload appears, renewed in time, dropped when it leaves.
//!
//! `node_core::rotation` says when; this does it. The old certificate serves until it expires, so an authority that is
//! away at a renewal harms nobody.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use node_core::rotation::{Next, Rotation};
use rustls::pki_types::CertificateDer;
use spiffe_id::{SpiffeId, TrustDomain};
use tokio::{sync::watch, task::JoinSet, time::Instant};

use super::{
    backoff::Backoff,
    client::{Authority, AuthorityFailed},
    key::PrivateKey,
    store::Store,
};
use crate::telemetry::{Event, Sink};

/// Requests to the authority at the same time: a node's cold start of fifty identities takes seven rounds of some
/// milliseconds, and a thousand nodes are no stampede.
const REQUESTS_AT_ONCE_MAX: usize = 8;

/// At least this often the wall clock is looked at, in seconds: it may have jumped, or the machine slept.
pub(super) const WALL_CHECK_SECONDS: u64 = 30;

/// A certificate with less than this part of its life left goes before routine renewals.
const NEAR_EXPIRY_DIVISOR: u32 = 4;

/// What the node needs certificates for. Follows the snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub identities: BTreeSet<SpiffeId>,
    /// Names under which the roots are valid besides the mesh's own.
    pub aliases: Vec<TrustDomain>,
}

/// One identity's state, for status and readiness.
#[derive(Clone, Debug)]
pub struct CertificateView {
    pub identity: SpiffeId,
    pub serial: Option<String>,
    pub not_before: Option<SystemTime>,
    pub not_after: Option<SystemTime>,
    /// When a new one is asked for.
    pub renews_at: Option<SystemTime>,
    /// Number of this certificate within the process.
    pub generation: Option<u64>,
    /// Certificates issued after the first.
    pub renewals: u64,
    /// Failed attempts since the last success.
    pub failures: u32,
    pub last_problem: Option<String>,
}

/// The views, written here only.
pub(super) type Views = Arc<Mutex<BTreeMap<SpiffeId, CertificateView>>>;

/// In the order in which requests are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    /// A workload waits for its first certificate, or its last has ended.
    New,
    NearExpiry,
    Routine,
}

struct Slot {
    rotation: Option<Rotation>,
    /// Before the first certificate: when to ask again.
    retry_at: Option<Instant>,
    backoff: Backoff,
    failures: u32,
    renewals: u64,
    in_flight: bool,
    expiry_told: bool,
}

enum Due {
    Now(Urgency),
    After(Duration),
}

/// Keeps [`Store`] in step with what is wanted, until dropped.
pub(super) struct Rotator<A> {
    pub(super) authority: Arc<A>,
    pub(super) store: Arc<Store>,
    pub(super) wanted: watch::Receiver<Wanted>,
    pub(super) events: Sink,
    pub(super) views: Views,
    pub(super) wall: fn() -> SystemTime,
}

type Answer = Result<(PrivateKey, Vec<CertificateDer<'static>>), AuthorityFailed>;

impl<A: Authority> Rotator<A> {
    pub(super) async fn run(mut self) {
        let mut slots = BTreeMap::new();
        let mut requests = JoinSet::new();
        loop {
            self.follow_wanted(&mut slots);
            let wait = self.ask_for_due(&mut slots, &mut requests);
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() { return },
                Some(Ok((identity, answer))) = requests.join_next(), if !requests.is_empty() => {
                    self.take(&mut slots, identity, answer);
                }
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn follow_wanted(&mut self, slots: &mut BTreeMap<SpiffeId, Slot>) {
        let wanted = self.wanted.borrow_and_update().clone();
        self.store.trust_aliases(&wanted.aliases);
        slots.retain(|identity, _| {
            let keep = wanted.identities.contains(identity);
            if !keep {
                self.store.remove(identity);
                self.views.lock().unwrap_or_else(PoisonError::into_inner).remove(identity);
                self.events.emit(&Event::CertificateDropped { identity: identity.to_string() });
            }
            keep
        });
        for identity in wanted.identities {
            slots.entry(identity).or_insert_with(|| Slot {
                rotation: None,
                retry_at: None,
                backoff: Backoff::new(),
                failures: 0,
                renewals: 0,
                in_flight: false,
                expiry_told: false,
            });
        }
        for (identity, slot) in slots.iter() {
            self.show(identity, slot, None);
        }
    }

    /// Asks for what is due, the urgent first; the time until something else may be.
    fn ask_for_due(
        &self,
        slots: &mut BTreeMap<SpiffeId, Slot>,
        requests: &mut JoinSet<(SpiffeId, Answer)>,
    ) -> Duration {
        let now = (self.wall)();
        let mut wait = Duration::from_secs(WALL_CHECK_SECONDS);
        let mut due = Vec::new();
        for (identity, slot) in slots.iter_mut().filter(|(_, slot)| !slot.in_flight) {
            self.tell_expiry(identity, slot, now);
            match slot.due(now) {
                Due::Now(urgency) => due.push((urgency, identity.clone())),
                Due::After(later) => wait = wait.min(later),
            }
        }
        due.sort();
        let free = REQUESTS_AT_ONCE_MAX.saturating_sub(requests.len());
        for (_, identity) in due.into_iter().take(free) {
            if let Some(slot) = slots.get_mut(&identity) {
                slot.in_flight = true;
            }
            let authority = Arc::clone(&self.authority);
            requests.spawn(async move {
                let answer = request(authority.as_ref(), &identity).await;
                (identity, answer)
            });
        }
        wait
    }

    fn tell_expiry(&self, identity: &SpiffeId, slot: &mut Slot, now: SystemTime) {
        let ended = slot.rotation.is_some_and(|rotation| rotation.next(now) == Next::Expired);
        if ended && !slot.expiry_told {
            slot.expiry_told = true;
            self.events.emit(&Event::CertificateExpired { identity: identity.to_string() });
        }
    }

    fn take(&self, slots: &mut BTreeMap<SpiffeId, Slot>, identity: SpiffeId, answer: Answer) {
        // An identity that left while its request was under way gets nothing.
        let Some(slot) = slots.get_mut(&identity) else { return };
        slot.in_flight = false;
        let installed = answer.and_then(|(key, chain)| Ok(self.store.insert(&identity, &key, chain)?));
        match installed {
            Ok(credentials) => {
                slot.renewals += u64::from(slot.rotation.is_some());
                // From now, not from its beginning: authorities date certificates back.
                slot.rotation =
                    Some(Rotation::issued((self.wall)(), credentials.not_after(), rand::random()));
                (slot.failures, slot.retry_at, slot.backoff, slot.expiry_told) =
                    (0, None, Backoff::new(), false);
                self.events.emit(&Event::CertificateIssued {
                    identity: identity.to_string(),
                    serial: credentials.serial().to_owned(),
                    not_after: credentials.not_after(),
                    generation: credentials.generation(),
                });
                self.show(&identity, slot, None);
            }
            Err(failed) => self.put_off(&identity, slot, &failed),
        }
    }

    fn put_off(&self, identity: &SpiffeId, slot: &mut Slot, failed: &AuthorityFailed) {
        let now = (self.wall)();
        slot.failures = slot.failures.saturating_add(1);
        slot.rotation = slot.rotation.map(|rotation| rotation.failed(now));
        let retry = match slot.rotation.and_then(|rotation| rotation.retry_at()) {
            Some(at) => at.duration_since(now).unwrap_or_default(),
            None => slot.backoff.next(),
        };
        slot.retry_at = Some(Instant::now() + retry);
        let problem = failed.to_string();
        self.show(identity, slot, Some(problem.clone()));
        self.events.emit(&Event::CertificateRenewalFailed {
            identity: identity.to_string(),
            failures: slot.failures,
            problem,
            retry,
        });
    }

    fn show(&self, identity: &SpiffeId, slot: &Slot, problem: Option<String>) {
        let credentials = self.store.all().into_iter().find(|credentials| credentials.identity() == identity);
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        let earlier = views.get(identity).and_then(|view| view.last_problem.clone());
        let view = CertificateView {
            identity: identity.clone(),
            serial: credentials.as_ref().map(|credentials| credentials.serial().to_owned()),
            not_before: credentials.as_ref().map(|credentials| credentials.not_before()),
            not_after: credentials.as_ref().map(|credentials| credentials.not_after()),
            renews_at: slot.rotation.and_then(|rotation| match rotation.next((self.wall)()) {
                Next::WaitUntil(at) => Some(at),
                Next::Renew | Next::Expired => None,
            }),
            generation: credentials.as_ref().map(|credentials| credentials.generation()),
            renewals: slot.renewals,
            failures: slot.failures,
            last_problem: if slot.failures == 0 { None } else { problem.or(earlier) },
        };
        views.insert(identity.clone(), view);
    }
}

impl Slot {
    fn due(&self, now: SystemTime) -> Due {
        let until_retry = || {
            let left = self.retry_at.map(|at| at.saturating_duration_since(Instant::now()));
            left.filter(|left| !left.is_zero())
        };
        let Some(rotation) = self.rotation else {
            return until_retry().map_or(Due::Now(Urgency::New), Due::After);
        };
        match rotation.next(now) {
            Next::Renew => Due::Now(urgency(&rotation, now)),
            Next::WaitUntil(at) => Due::After(at.duration_since(now).unwrap_or_default()),
            Next::Expired => until_retry().map_or(Due::Now(Urgency::New), Due::After),
        }
    }
}

fn urgency(rotation: &Rotation, now: SystemTime) -> Urgency {
    let lifetime = rotation.not_after.duration_since(rotation.issued_at).unwrap_or_default();
    let left = rotation.not_after.duration_since(now).unwrap_or_default();
    if left < lifetime / NEAR_EXPIRY_DIVISOR { Urgency::NearExpiry } else { Urgency::Routine }
}

async fn request<A: Authority>(authority: &A, identity: &SpiffeId) -> Answer {
    let key = PrivateKey::generate()?;
    let request = key.request(&identity.to_string())?;
    let chain = authority.create(identity, request).await?;
    Ok((key, chain))
}

#[cfg(test)]
mod tests;
