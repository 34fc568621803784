//! Keys of the issuers of tokens: fetched, kept, and used to check signatures (policy; T-21).
//!
//! In: a [`KeySource`] and a token's pieces. Out: a yes or a no. A source that was never fetched has no keys, and a token
//! without a key is not valid: every failure here ends in a no. Requests never wait for a server without a bound. Knows
//! nothing of policies, connections or requests.

mod destination;
mod fetch;
mod keys;
mod seen;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use ipnet::IpNet;
use node_core::policy::tokens::{Algorithm, Key, KeySource, Signatures, TokenFault};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout},
};

pub use self::fetch::RootsError;
use self::{fetch::Fetcher, keys::Keys};
use crate::telemetry::{Event, Sink};

/// Key sets that are kept, inline ones included: ten for each of 100 namespaces of a node. At the limit the one that was
/// not asked for the longest makes room, and [`SOURCES_LIMIT`] is told.
pub const SOURCES_MAX: usize = 1_024;

const SOURCES_LIMIT: &str = "key_sources";

/// A set is fetched anew after so many seconds (policy A-13).
const REFRESH_SECONDS: u64 = 20 * 60;

/// A set that nobody asked for is dropped after so many seconds (policy A-13).
const UNUSED_SECONDS_MAX: u64 = 7 * 24 * 3_600;

/// First and longest pause after a failed fetch, in seconds.
const RETRY_SECONDS_MIN: u64 = 2;
const RETRY_SECONDS_MAX: u64 = 300;

/// A key that a set does not have lets the set be fetched early, at most once in so many seconds: strangers' tokens must
/// not make this node a flood.
const EARLY_SECONDS_MIN: u64 = 30;

/// A request waits for the first fetch of a set, or for an early one, so many seconds at most: then it goes on without.
const WAIT_SECONDS_MAX: u64 = 5;

/// Where key sets may be fetched from (section `jwks` of node.yaml).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeysConfig {
    /// Addresses that would be refused otherwise (T-21).
    pub allow: Vec<IpNet>,
    /// Whether plain http is fetched at all.
    pub http: bool,
    /// Roots in PEM; `None`: the system's.
    pub roots: Option<PathBuf>,
    /// Addresses that are refused beside the usual ones, such as the CA's.
    pub refuse: Vec<IpNet>,
}

/// A key set that is fetched, for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySetView {
    /// Its address, or its issuer's.
    pub source: String,
    /// Keys that can be used; `None`: it was never fetched, and no token is valid by it.
    pub keys: Option<usize>,
    /// Why the last fetch failed; keys that were there before go on.
    pub problem: Option<String>,
}

/// All key sets of a node. Dropped, their fetching ends.
pub struct Store {
    entries: ArcSwap<BTreeMap<KeySource, Arc<Entry>>>,
    /// Held while `entries` is replaced.
    writing: Mutex<()>,
    fetcher: Arc<Fetcher>,
    started: Instant,
    events: Sink,
    own: Weak<Self>,
}

/// One key set.
struct Entry {
    keys: ArcSwapOption<Keys>,
    /// Of the last fetch.
    problem: Mutex<Option<String>>,
    /// Seconds since the store started at which it was asked for last.
    used: AtomicU64,
    /// Fetches that came to an end, whichever.
    attempts: watch::Sender<u64>,
    /// Asks for a fetch ahead of time.
    early: Notify,
    is_fetching: AtomicBool,
    early_fetch: Mutex<EarlyFetch>,
}

/// The fetch that was asked for ahead of time last.
#[derive(Default)]
struct EarlyFetch {
    /// Seconds since the store started.
    asked: Option<u64>,
    /// It is over once so many fetches came to an end.
    attempt: u64,
}

/// A set that lacked a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missed {
    source: KeySource,
    /// Number of the keys that were at hand.
    number: u64,
}

impl Store {
    /// Ready to fetch, with nothing fetched.
    ///
    /// # Errors
    /// The configured file of roots cannot be used.
    pub fn start(config: KeysConfig, events: Sink) -> Result<Arc<Self>, RootsError> {
        let fetcher = Arc::new(Fetcher::new(config)?);
        Ok(Arc::new_cyclic(|own| Self {
            entries: ArcSwap::default(),
            writing: Mutex::new(()),
            fetcher,
            started: Instant::now(),
            events,
            own: Weak::clone(own),
        }))
    }

    /// Waits until each of `sources` was fetched, or tried to be, once; at most [`WAIT_SECONDS_MAX`].
    pub async fn ready(&self, sources: impl Iterator<Item = &KeySource>) {
        let waiting: Vec<_> =
            sources.map(|source| self.entry(source)).filter(|entry| entry.is_new()).collect();
        let all = async {
            for entry in waiting {
                let mut attempts = entry.attempts.subscribe();
                // The entry holds the sender, so it cannot fail.
                let _ = attempts.wait_for(|attempts| *attempts > 0).await;
            }
        };
        let _ = timeout(Duration::from_secs(WAIT_SECONDS_MAX), all).await;
    }

    /// Checks signatures with the keys that are at hand.
    pub fn signatures(&self) -> Verifier<'_> {
        Verifier { store: self, missed: RefCell::default() }
    }

    /// Fetches sets that lacked a key, unless they were just fetched for that; whoever comes while one is fetched waits for it
    /// with the others. True if one of them is another by now: then it is worth asking again.
    pub async fn refresh(&self, missed: Vec<Missed>) -> bool {
        let now = self.seconds();
        let missed: Vec<_> =
            missed.into_iter().map(|missed| (self.entry(&missed.source), missed.number)).collect();
        let all = async {
            for (entry, number) in &missed {
                if entry.number() == Some(*number) {
                    let attempt = entry.early_attempt(now);
                    let mut attempts = entry.attempts.subscribe();
                    // The entry holds the sender, so it cannot fail.
                    let _ = attempts.wait_for(|attempts| *attempts >= attempt).await;
                }
            }
        };
        let _ = timeout(Duration::from_secs(WAIT_SECONDS_MAX), all).await;
        missed.iter().any(|(entry, number)| entry.number() != Some(*number))
    }

    /// The sets that are fetched, by their sources.
    pub fn views(&self) -> Vec<KeySetView> {
        let entries = self.entries.load();
        let fetched = entries.iter().filter(|(source, _)| !matches!(source, KeySource::Inline(_)));
        let view = |(source, entry): (&KeySource, &Arc<Entry>)| KeySetView {
            source: source_address(source).to_owned(),
            keys: entry.keys.load().as_ref().map(|keys| keys.usable()),
            problem: entry.problem.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        };
        fetched.map(view).collect()
    }

    fn entry(&self, source: &KeySource) -> Arc<Entry> {
        let now = self.seconds();
        if let Some(entry) = self.entries.load().get(source) {
            if entry.used.load(Ordering::Relaxed) != now {
                entry.used.store(now, Ordering::Relaxed);
            }
            return Arc::clone(entry);
        }
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = BTreeMap::clone(&self.entries.load());
        let entry = entries.entry(source.clone()).or_insert_with(|| self.make(source, now));
        let entry = Arc::clone(entry);
        let unused = |entry: &Entry| entry.used.load(Ordering::Relaxed);
        entries.retain(|_, entry| now.saturating_sub(unused(entry)) < UNUSED_SECONDS_MAX);
        if entries.len() > SOURCES_MAX {
            self.events.emit(&Event::LimitReached { limit: SOURCES_LIMIT, workload: None });
            let others = entries.iter().filter(|(other, _)| *other != source);
            let oldest = others.min_by_key(|(_, entry)| unused(entry)).map(|(source, _)| source.clone());
            oldest.and_then(|oldest| entries.remove(&oldest));
        }
        self.entries.store(Arc::new(entries));
        entry
    }

    fn make(&self, source: &KeySource, now: u64) -> Arc<Entry> {
        let entry = Arc::new(Entry {
            keys: ArcSwapOption::empty(),
            problem: Mutex::default(),
            used: AtomicU64::new(now),
            attempts: watch::Sender::new(0),
            early: Notify::new(),
            is_fetching: AtomicBool::new(false),
            early_fetch: Mutex::default(),
        });
        if let KeySource::Inline(text) = source {
            entry.take(Keys::parse(text).map_err(|problem| problem.to_string()));
        } else {
            let (store, kept) = (Weak::clone(&self.own), Arc::downgrade(&entry));
            tokio::spawn(keep(store, kept, source.clone(), Arc::clone(&self.fetcher)));
        }
        entry
    }

    /// Drops a set that nobody asked for in a long time. True if it did.
    fn drops(&self, source: &KeySource, entry: &Entry) -> bool {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.seconds().saturating_sub(entry.used.load(Ordering::Relaxed)) < UNUSED_SECONDS_MAX {
            return false;
        }
        let mut entries = BTreeMap::clone(&self.entries.load());
        entries.remove(source);
        self.entries.store(Arc::new(entries));
        true
    }

    fn seconds(&self) -> u64 {
        self.started.elapsed().as_secs()
    }
}

impl Entry {
    fn is_new(&self) -> bool {
        self.keys.load().is_none() && *self.attempts.borrow() == 0
    }

    /// The end of a fetch: what was there before goes on while there is nothing new.
    fn take(&self, keys: Result<Keys, String>) {
        let problem = keys.map(|keys| self.keys.store(Some(Arc::new(keys)))).err();
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
        self.is_fetching.store(false, Ordering::Release);
        self.attempts.send_modify(|attempts| *attempts += 1);
    }

    /// Number of the keys that are at hand.
    fn number(&self) -> Option<u64> {
        self.keys.load().as_ref().map(|keys| keys.number())
    }

    /// The fetch to wait for: a new one if it is due, else the last one, which may be over.
    fn early_attempt(&self, now: u64) -> u64 {
        let mut last = self.early_fetch.lock().unwrap_or_else(PoisonError::into_inner);
        if last.asked.is_none_or(|asked| now >= asked + EARLY_SECONDS_MIN) {
            // One that is under way may have asked before the key was there.
            let others = u64::from(self.is_fetching.load(Ordering::Acquire));
            *last = EarlyFetch { asked: Some(now), attempt: *self.attempts.borrow() + others + 1 };
            self.early.notify_one();
        }
        last.attempt
    }
}

/// Fetches one set for as long as it is kept.
async fn keep(store: Weak<Store>, entry: Weak<Entry>, source: KeySource, fetcher: Arc<Fetcher>) {
    let mut retry = Duration::from_secs(RETRY_SECONDS_MIN);
    let mut discovered = None;
    loop {
        let Some(kept) = entry.upgrade() else { return };
        kept.is_fetching.store(true, Ordering::Release);
        drop(kept);
        let fetched = fetcher.keys(&source, &mut discovered).await;
        let Some(kept) = entry.upgrade() else { return };
        if store.upgrade().is_none_or(|store| store.drops(&source, &kept)) {
            return;
        }
        let pause = match fetched {
            Ok(keys) => {
                kept.take(Ok(keys));
                retry = Duration::from_secs(RETRY_SECONDS_MIN);
                Duration::from_secs(REFRESH_SECONDS)
            }
            Err(problem) => {
                tracing::warn!(source = source_address(&source), %problem, "key set not fetched");
                kept.take(Err(problem.to_string()));
                let pause = retry;
                retry = (retry * 2).min(Duration::from_secs(RETRY_SECONDS_MAX));
                pause
            }
        };
        // In slices, so that an entry that was dropped does not live on in here.
        let until = Instant::now() + pause;
        drop(kept);
        while let Some(kept) = entry.upgrade() {
            let now = Instant::now();
            let slice = until.saturating_duration_since(now).min(Duration::from_secs(EARLY_SECONDS_MIN));
            if slice.is_zero() || timeout(slice, kept.early.notified()).await.is_ok() {
                break;
            }
        }
    }
}

fn source_address(source: &KeySource) -> &str {
    match source {
        KeySource::Inline(_) => "inline",
        KeySource::Address(address) | KeySource::Discovery(address) => address,
    }
}

/// Whether `signature` is one of `signed` by this one key: for tools that bring keys of their own.
pub fn is_signed_by(key: &Key, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> bool {
    keys::is_signed_by(key, algorithm, signed, signature)
}

/// Signatures, checked with the keys that are at hand; remembers which sets lacked a key.
pub struct Verifier<'a> {
    store: &'a Store,
    missed: RefCell<Vec<Missed>>,
}

impl Verifier<'_> {
    /// The sets that lacked a key and can be fetched anew.
    pub fn missed(self) -> Vec<Missed> {
        self.missed.into_inner()
    }
}

impl Signatures for Verifier<'_> {
    fn verify(
        &self,
        source: &KeySource,
        algorithm: Algorithm,
        kid: Option<&str>,
        signed: &[u8],
        signature: &[u8],
    ) -> Result<(), TokenFault> {
        let entry = self.store.entry(source);
        let keys = entry.keys.load();
        let Some(keys) = &*keys else { return Err(TokenFault::KeysUnavailable) };
        let digest = seen::digest(keys.number(), algorithm, kid, signed, signature);
        if seen::contains(&digest) {
            return Ok(());
        }
        let verified = keys.verify(algorithm, kid, signed, signature);
        match verified {
            Ok(()) => seen::insert(digest),
            Err(TokenFault::NoKey) if !matches!(source, KeySource::Inline(_)) => {
                let missed = Missed { source: source.clone(), number: keys.number() };
                self.missed.borrow_mut().push(missed);
            }
            Err(_) => {}
        }
        verified
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Store").finish_non_exhaustive()
    }
}
