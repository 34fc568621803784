//! What was issued to whom, which tokens were made and used, and that a root existed. A redb file, bounded, pruned by
//! expiry. Of tokens only a hash is kept.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use ca_proto::refusal::{Reason, Refusal};
use redb::backends::FileBackend;
use redb::{
    Database, ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata as _, TableDefinition,
    WriteTransaction,
};
use rustls::pki_types::CertificateDer;
use tokio::sync::{mpsc, oneshot};

use crate::clock::{Clock, Seconds};
use crate::issue::Certificate;

/// Most certificates on record: 250,000 identities with two live certificates each, and some to spare; 250 bytes each.
/// At the limit those that expire next are forgotten first, with a warning.
const ISSUED_MAX: u64 = 600_000;

/// Most tokens on record, used ones included. At the limit no more are made until some expire.
const TOKENS_MAX: u64 = 10_000;

/// Seconds for which an expired token is remembered, so that its holder is told why it is refused.
const TOKEN_MEMORY_SECONDS: u64 = 3600;

/// Most certificates that wait to be recorded; the queue drains at thousands per second, so this is a fraction of a
/// second. At the limit requests are refused as overload.
const RECORDS_QUEUED_MAX: usize = 1024;

/// Most certificates recorded in one transaction, hence with one sync of the disk.
const RECORDS_BATCH_MAX: usize = 256;

/// Bytes of a token's hash by which it is found. The whole hash is then compared in constant time.
const TOKEN_KEY_BYTES: usize = 8;

const ROOT: &str = "root";
const BUNDLE: &str = "bundle";

const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
/// First bytes of the hash -> (hash, node, expires, hash of the key that used it, leaf, issuer).
const TOKENS: TableDefinition<'_, &[u8], TokenRow<'_>> = TableDefinition::new("tokens");
/// Serial -> (hash of the key, name, node, expires).
const ISSUED: TableDefinition<'_, &[u8], (&[u8], &str, &str, u64)> = TableDefinition::new("issued");
/// (expires, serial): which certificates to forget first.
const EXPIRY: TableDefinition<'_, (u64, &[u8]), ()> = TableDefinition::new("expiry");

type TokenRow<'a> = (&'a [u8], &'a str, u64, &'a [u8], &'a [u8], &'a [u8]);

/// Why the ledger cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The file could not be made or opened.
    #[error("{path}: cannot open the ledger: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The data base refused.
    #[error(
        "{path}: the ledger failed ({source}). If it is damaged, restore it, or move it away: join tokens that were not \
         used yet are then void"
    )]
    Database {
        /// The file.
        path: PathBuf,
        /// What the data base said.
        source: Box<redb::Error>,
    },
    /// The authority is stopping.
    #[error("{path}: the ledger is closed, the authority stops")]
    Closed {
        /// The file.
        path: PathBuf,
    },
    /// As many tokens as are kept.
    #[error("{count} join tokens are on record, as many as are kept; wait until some expire")]
    TooManyTokens {
        /// How many.
        count: u64,
    },
}

/// A token on record.
#[derive(Clone, Debug)]
pub(crate) struct TokenRecord {
    /// SHA-256 of its secret.
    pub(crate) secret_hash: [u8; 32],
    /// Name of the node that it is for.
    pub(crate) node: String,
    /// From then on it is void.
    pub(crate) expires: Seconds,
    /// By whom it was used, and what the answer was.
    pub(crate) used: Option<Used>,
}

/// The one use of a token.
#[derive(Clone, Debug)]
pub(crate) struct Used {
    /// Hash of the key that was certified.
    pub(crate) key_hash: [u8; 32],
    leaf: CertificateDer<'static>,
    issuer: CertificateDer<'static>,
}

/// What a join is answered with: leaf and issuer.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) leaf: CertificateDer<'static>,
    pub(crate) issuer: CertificateDer<'static>,
    /// What was issued just now; `None` if the answer is a repetition.
    pub(crate) issued: Option<Certificate>,
}

/// How much is on record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counts {
    pub(crate) issued: u64,
    pub(crate) tokens: u64,
}

/// The authority's memory.
pub(crate) struct Ledger {
    /// `None` once it is closed.
    database: RwLock<Option<Database>>,
    path: PathBuf,
    issued_max: u64,
    tokens_max: u64,
}

impl Ledger {
    /// Opens the file, or makes it (0600).
    pub(crate) fn open(path: &Path) -> Result<Self, LedgerError> {
        let open = |source| LedgerError::Open { path: path.to_owned(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(open)?;
        let failed = |source| LedgerError::Database { path: path.to_owned(), source: Box::new(source) };
        let backend = FileBackend::new(file).map_err(|error| failed(error.into()))?;
        let database =
            Database::builder().create_with_backend(backend).map_err(|error| failed(error.into()))?;
        let database = RwLock::new(Some(database));
        let ledger = Self { database, path: path.to_owned(), issued_max: ISSUED_MAX, tokens_max: TOKENS_MAX };
        // Readers may then assume that every table exists.
        ledger.write(|txn| {
            txn.open_table(META)?;
            txn.open_table(TOKENS)?;
            txn.open_table(ISSUED)?;
            txn.open_table(EXPIRY)?;
            Ok(())
        })?;
        Ok(ledger)
    }

    /// Pin of the root that this authority has or had.
    pub(crate) fn root(&self) -> Result<Option<String>, LedgerError> {
        self.read(|txn| Ok(txn.open_table(META)?.get(ROOT)?.map(|pin| pin.value().to_owned())))
    }

    /// Notes that the root exists.
    pub(crate) fn remember_root(&self, pin: &str) -> Result<(), LedgerError> {
        if self.root()?.as_deref() == Some(pin) {
            return Ok(());
        }
        self.write(|txn| {
            txn.open_table(META)?.insert(ROOT, pin)?;
            Ok(())
        })
    }

    /// Version of the bundle with this fingerprint: one higher than the last if it is another bundle.
    pub(crate) fn bundle_version(&self, fingerprint: &str) -> Result<u64, LedgerError> {
        self.write(|txn| {
            let mut meta = txn.open_table(META)?;
            let last = meta.get(BUNDLE)?.map(|row| row.value().to_owned());
            let (version, known) = last
                .as_deref()
                .and_then(|row| row.split_once(' '))
                .map_or((0, ""), |(version, known)| (version.parse().unwrap_or(0), known));
            if known == fingerprint {
                return Ok(version);
            }
            meta.insert(BUNDLE, format!("{} {fingerprint}", version + 1).as_str())?;
            Ok(version + 1)
        })
    }

    /// Notes a fresh token.
    pub(crate) fn add_token(
        &self,
        secret_hash: &[u8; 32],
        node: &str,
        expires: Seconds,
        now: Seconds,
    ) -> Result<(), LedgerError> {
        let count = self.write(|txn| {
            let mut tokens = txn.open_table(TOKENS)?;
            let forgotten = now.minus(TOKEN_MEMORY_SECONDS).0;
            tokens.retain(|_, (_, _, expires, _, _, _)| expires > forgotten)?;
            let count = tokens.len()?;
            if count < self.tokens_max {
                let row: TokenRow<'_> = (secret_hash, node, expires.0, &[], &[], &[]);
                tokens.insert(&secret_hash[..TOKEN_KEY_BYTES], row)?;
            }
            Ok(count)
        })?;
        if count < self.tokens_max { Ok(()) } else { Err(LedgerError::TooManyTokens { count }) }
    }

    /// Uses a token: `decide` sees what is on record and says `Some` fresh certificate, `None` for the same answer
    /// again, or a refusal. Decision and note are one transaction, so two nodes never use one token.
    pub(crate) fn redeem(
        &self,
        secret_hash: &[u8; 32],
        decide: impl FnOnce(Option<&TokenRecord>) -> Result<Option<Certificate>, Refusal>,
    ) -> Result<Result<Joined, Refusal>, LedgerError> {
        let key = &secret_hash[..TOKEN_KEY_BYTES];
        // Guesses of strangers stay off the one writer.
        if self.read(|txn| Ok(txn.open_table(TOKENS)?.get(key)?.is_none()))? {
            let refusal = decide(None).err();
            return Ok(Err(refusal.unwrap_or_else(|| Refusal::new(Reason::Stranger, "token: unknown"))));
        }
        self.write(|txn| {
            let record = txn.open_table(TOKENS)?.get(key)?.and_then(|row| token_record(row.value()));
            match decide(record.as_ref()) {
                Err(refusal) => Ok(Err(refusal)),
                Ok(None) => Ok(again(record)),
                Ok(Some(certificate)) => {
                    let Some(record) = record else { return Ok(again(None)) };
                    let row: TokenRow<'_> = (
                        &record.secret_hash,
                        &record.node,
                        record.expires.0,
                        &certificate.key_hash,
                        &certificate.leaf,
                        &certificate.issuer,
                    );
                    txn.open_table(TOKENS)?.insert(key, row)?;
                    insert(txn, std::slice::from_ref(&certificate), self.issued_max)?;
                    let (leaf, issuer) = (certificate.leaf.clone(), certificate.issuer.clone());
                    Ok(Ok(Joined { leaf, issuer, issued: Some(certificate) }))
                }
            }
        })
    }

    /// Makes all tokens void: they carry the pin of a root that is no more.
    pub(crate) fn forget_tokens(&self) -> Result<(), LedgerError> {
        self.write(|txn| Ok(txn.open_table(TOKENS)?.retain(|_, _| false)?))
    }

    /// Notes certificates, durably.
    fn record(&self, certificates: &[Certificate]) -> Result<(), LedgerError> {
        let forgotten = self.write(|txn| insert(txn, certificates, self.issued_max))?;
        if forgotten > 0 {
            tracing::warn!(
                forgotten,
                limit = self.issued_max,
                "the ledger is full, certificates that expire next are forgotten"
            );
        }
        Ok(())
    }

    /// Forgets what expired.
    pub(crate) fn prune(&self, now: Seconds) -> Result<(), LedgerError> {
        self.write(|txn| {
            let (mut issued, mut expiry) = (txn.open_table(ISSUED)?, txn.open_table(EXPIRY)?);
            let bound = (now.0, &[][..]);
            for entry in expiry.extract_from_if(..bound, |_, ()| true)? {
                issued.remove(entry?.0.value().1)?;
            }
            Ok(())
        })
    }

    pub(crate) fn counts(&self) -> Result<Counts, LedgerError> {
        self.read(|txn| {
            Ok(Counts { issued: txn.open_table(ISSUED)?.len()?, tokens: txn.open_table(TOKENS)?.len()? })
        })
    }

    /// Waits for the transactions under way and gives the file free, whoever still holds the ledger.
    pub(crate) fn close(&self) {
        *self.database.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn read<T>(
        &self,
        read: impl FnOnce(&redb::ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, LedgerError> {
        self.with(|database| read(&database.begin_read()?))
    }

    /// One transaction; nothing of it happened if `write` fails.
    fn write<T>(
        &self,
        write: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, LedgerError> {
        self.with(|database| {
            let txn = database.begin_write()?;
            let done = write(&txn)?;
            txn.commit()?;
            Ok(done)
        })
    }

    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, LedgerError> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let database = database.as_ref().ok_or_else(|| LedgerError::Closed { path: self.path.clone() })?;
        work(database).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: redb::Error) -> LedgerError {
        LedgerError::Database { path: self.path.clone(), source: Box::new(source) }
    }
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Adds certificates; says how many others were forgotten for them.
fn insert(txn: &WriteTransaction, certificates: &[Certificate], issued_max: u64) -> Result<u64, redb::Error> {
    let (mut issued, mut expiry) = (txn.open_table(ISSUED)?, txn.open_table(EXPIRY)?);
    let mut forgotten = 0;
    for certificate in certificates {
        while issued.len()? >= issued_max {
            let Some(next) = expiry.pop_first()?.map(|(key, _)| key.value().1.to_vec()) else { break };
            issued.remove(next.as_slice())?;
            forgotten += 1;
        }
        let (name, node) =
            (certificate.name.to_string(), certificate.node.as_ref().map_or("", |node| node.name()));
        let row = (&certificate.key_hash[..], name.as_str(), node, certificate.expires.0);
        issued.insert(&certificate.serial[..], row)?;
        expiry.insert((certificate.expires.0, &certificate.serial[..]), ())?;
    }
    Ok(forgotten)
}

fn token_record((hash, node, expires, key_hash, leaf, issuer): TokenRow<'_>) -> Option<TokenRecord> {
    let used = key_hash.try_into().ok().map(|key_hash| Used {
        key_hash,
        leaf: CertificateDer::from(leaf.to_vec()),
        issuer: CertificateDer::from(issuer.to_vec()),
    });
    Some(TokenRecord {
        secret_hash: hash.try_into().ok()?,
        node: node.to_owned(),
        expires: Seconds(expires),
        used,
    })
}

fn again(record: Option<TokenRecord>) -> Result<Joined, Refusal> {
    match record.and_then(|record| record.used) {
        Some(used) => Ok(Joined { leaf: used.leaf, issuer: used.issuer, issued: None }),
        None => Err(Refusal::new(Reason::Stranger, "token: unknown")),
    }
}

/// Notes certificates on a thread of its own, many with one sync of the disk. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Recorder(mpsc::Sender<Pending>);

struct Pending {
    certificate: Certificate,
    done: oneshot::Sender<Result<(), Refusal>>,
}

impl Recorder {
    /// Starts the thread. It ends when the last clone is dropped.
    pub(crate) fn start(ledger: Arc<Ledger>) -> std::io::Result<Self> {
        let (recorder, queue) = Self::queue(RECORDS_QUEUED_MAX);
        std::thread::Builder::new().name("ledger".into()).spawn(move || drain(&ledger, queue))?;
        Ok(recorder)
    }

    fn queue(records_max: usize) -> (Self, mpsc::Receiver<Pending>) {
        let (sender, queue) = mpsc::channel(records_max);
        (Self(sender), queue)
    }

    /// Returns when the certificate is durably on record: none leaves without that.
    ///
    /// # Errors
    /// [`Reason::Overloaded`] if too many wait, [`Reason::NotReady`] if the disk refuses.
    pub(crate) async fn record(&self, certificate: Certificate) -> Result<(), Refusal> {
        let (done, recorded) = oneshot::channel();
        self.0.try_send(Pending { certificate, done }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Refusal::new(
                Reason::Overloaded,
                format!("{} certificates wait to be recorded", self.0.max_capacity()),
            ),
            mpsc::error::TrySendError::Closed(_) => not_recorded("the ledger is closed"),
        })?;
        recorded.await.unwrap_or_else(|_| Err(not_recorded("the ledger is closed")))
    }
}

fn drain(ledger: &Ledger, mut queue: mpsc::Receiver<Pending>) {
    while let Some(first) = queue.blocking_recv() {
        let (certificates, waiting) = batch(first, &mut queue, RECORDS_BATCH_MAX);
        let result = ledger.record(&certificates).map_err(|error| {
            tracing::error!(%error, "certificates could not be recorded and were not handed out");
            not_recorded("the ledger failed")
        });
        for done in waiting {
            // Whoever asked may have gone; the record stands.
            let _ = done.send(result.clone());
        }
    }
}

/// What is recorded together: the first, and those that wait behind it. The rest is the next batch's.
fn batch(
    first: Pending,
    queue: &mut mpsc::Receiver<Pending>,
    batch_max: usize,
) -> (Vec<Certificate>, Vec<oneshot::Sender<Result<(), Refusal>>>) {
    let (mut certificates, mut waiting) = (vec![first.certificate], vec![first.done]);
    while certificates.len() < batch_max
        && let Ok(next) = queue.try_recv()
    {
        certificates.push(next.certificate);
        waiting.push(next.done);
    }
    (certificates, waiting)
}

fn not_recorded(what: &str) -> Refusal {
    Refusal::new(Reason::NotReady, format!("the authority cannot issue at present: {what}"))
}

/// Keeps the token and certificate tables within bounds as the clock moves on.
pub(crate) fn prune(ledger: &Ledger, clock: &Clock) {
    if let Err(error) = ledger.prune(clock.now()) {
        tracing::error!(%error, "the ledger could not be pruned");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::issue::SERIAL_BYTES;
    use crate::keys::tests::World;

    const NOW: Seconds = Seconds(1_800_000_000);

    fn certificate(serial: u8, expires: Seconds) -> Certificate {
        Certificate {
            leaf: CertificateDer::from(vec![serial]),
            issuer: CertificateDer::from(vec![0]),
            serial: [serial; SERIAL_BYTES],
            key_hash: [serial; 32],
            name: spiffe_id::PeerName::parse_uri("spiffe://td/ns/a/sa/b").expect("a name"),
            node: None,
            expires,
        }
    }

    fn issued(ledger: &Ledger) -> u64 {
        ledger.counts().expect("readable").issued
    }

    #[test]
    fn certificates_are_forgotten_when_they_expire_and_the_next_to_expire_at_the_limit() {
        let mut world = World::new("issued", NOW);
        Arc::get_mut(&mut world.ledger).expect("nobody else holds it").issued_max = 3;
        let ledger = &world.ledger;
        for (serial, expires) in [(1, 30), (2, 10), (3, 20)] {
            ledger.record(&[certificate(serial, NOW.plus(expires))]).expect("recorded");
        }
        assert_eq!(issued(ledger), 3);
        ledger.record(&[certificate(4, NOW.plus(40))]).expect("recorded");
        assert_eq!(issued(ledger), 3, "the limit holds");
        ledger.prune(NOW.plus(20)).expect("pruned");
        assert_eq!(issued(ledger), 3, "number 2 was forgotten at the limit, 3 expires only now");
        ledger.prune(NOW.plus(21)).expect("pruned");
        assert_eq!(issued(ledger), 2);
        ledger.prune(NOW.plus(99)).expect("pruned");
        assert_eq!(issued(ledger), 0);
    }

    #[test]
    fn tokens_have_a_limit_and_are_forgotten_an_hour_after_their_end() {
        let mut world = World::new("tokens", NOW);
        Arc::get_mut(&mut world.ledger).expect("nobody else holds it").tokens_max = 2;
        let add = |number: u8, now| world.ledger.add_token(&[number; 32], "node-a", NOW.plus(60), now);
        add(1, NOW).expect("within the limit");
        add(2, NOW).expect("at the limit");
        let error = add(3, NOW).expect_err("above the limit");
        assert!(matches!(error, LedgerError::TooManyTokens { count: 2 }), "{error}");
        let later = NOW.plus(60 + TOKEN_MEMORY_SECONDS);
        add(3, later.minus(1)).expect_err("still remembered");
        add(3, later).expect("the others are forgotten");
    }

    #[test]
    fn a_hash_that_begins_alike_is_another_token() {
        let world = World::new("alike", NOW);
        let mut other = [5; 32];
        world.ledger.add_token(&other, "node-a", NOW.plus(60), NOW).expect("added");
        other[31] = 6;
        let seen = world.ledger.redeem(&other, |token| {
            assert_ne!(token.expect("found by its first bytes").secret_hash, other);
            Err(Refusal::new(Reason::Stranger, "not the same"))
        });
        assert_eq!(seen.expect("readable").expect_err("refused").reason, Reason::Stranger);
    }

    #[test]
    fn a_refused_use_leaves_the_token_fresh() {
        let world = World::new("fresh", NOW);
        world.ledger.add_token(&[7; 32], "node-a", NOW.plus(60), NOW).expect("added");
        let refuse = |_: Option<&TokenRecord>| Err(Refusal::new(Reason::CsrKey, "no"));
        world.ledger.redeem(&[7; 32], refuse).expect("readable").expect_err("refused");
        let accept = |token: Option<&TokenRecord>| {
            assert!(token.expect("on record").used.is_none());
            Ok(Some(certificate(1, NOW.plus(60))))
        };
        let joined = world.ledger.redeem(&[7; 32], accept).expect("readable").expect("granted");
        assert!(joined.issued.is_some());
        let repeat = |token: Option<&TokenRecord>| {
            assert_eq!(token.and_then(|token| token.used.as_ref()).expect("used").key_hash, [1; 32]);
            Ok(None)
        };
        let again = world.ledger.redeem(&[7; 32], repeat).expect("readable").expect("the same answer");
        assert_eq!((&again.leaf, again.issued.is_some()), (&joined.leaf, false));
    }

    #[test]
    fn the_bundle_has_a_new_version_only_if_it_is_another() {
        let world = World::new("bundle", NOW);
        let version = |fingerprint| world.ledger.bundle_version(fingerprint).expect("readable");
        assert_eq!([version("a"), version("a"), version("b"), version("b"), version("a")], [1, 1, 2, 2, 3]);
    }

    #[tokio::test]
    async fn a_full_queue_refuses_the_next_certificate_and_loses_none_of_those_that_wait() {
        let world = World::new("queue", NOW);
        let (recorder, queue) = Recorder::queue(2);
        let record = |serial| recorder.record(certificate(serial, NOW.plus(60)));
        let (mut first, mut second) = (Box::pin(record(1)), Box::pin(record(2)));
        for waiting in [&mut first, &mut second] {
            assert!(futures_pending(waiting).await, "it waits for the disk");
        }
        let refusal = record(3).await.expect_err("a third does not fit");
        assert_eq!(
            (refusal.reason, &*refusal.message),
            (Reason::Overloaded, "2 certificates wait to be recorded")
        );

        let ledger = Arc::clone(&world.ledger);
        let recording = std::thread::spawn(move || drain(&ledger, queue));
        first.await.expect("recorded");
        second.await.expect("recorded");
        record(3).await.expect("there is room again");
        assert_eq!(issued(&world.ledger), 3);
        drop(recorder);
        recording.join().expect("it ends with its last client");
    }

    #[tokio::test]
    async fn a_batch_takes_as_many_as_fit_and_leaves_the_rest() {
        let (recorder, mut queue) = Recorder::queue(9);
        for serial in 0..5 {
            let mut waiting = Box::pin(recorder.record(certificate(serial, NOW)));
            assert!(futures_pending(&mut waiting).await);
        }
        for expected in [3, 2] {
            let first = queue.try_recv().expect("one waits");
            let (certificates, waiting) = batch(first, &mut queue, 3);
            assert_eq!((certificates.len(), waiting.len()), (expected, expected));
        }
        assert!(queue.try_recv().is_err());
    }

    /// Whether a future, asked once, is not done.
    async fn futures_pending(future: &mut (impl Future + Unpin)) -> bool {
        let asked = std::future::poll_fn(|context| {
            std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(context).is_pending())
        });
        asked.await
    }

    #[test]
    fn a_closed_ledger_refuses() {
        let world = World::new("closed", NOW);
        world.ledger.close();
        assert!(matches!(world.ledger.counts(), Err(LedgerError::Closed { .. })));
    }
}
