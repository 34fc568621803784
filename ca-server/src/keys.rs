//! The keys that certify, on disk: a root that is made once and never silently replaced, and an issuing key below it.
//!
//! | File of the state folder | Content | Mode |
//! |---|---|---|
//! | `root.pem` | root key and certificate | 0600 |
//! | `issuing.pem` | issuing key and certificate, replaced as one when a third of its life is left | 0600 |
//! | `ledger.redb` | what was issued; also that a root existed, and which | 0600 |
//! | `lock` | held by the one process that uses the folder | 0600 |
//!
//! Files are written beside their place, synced, and renamed: a crash leaves the old or the new, never half of one.
//! The root's key is in memory only while it certifies an issuing key.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use ca_proto::convert::certificate_pem;
use ca_proto::join_token::RootPin;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use spiffe_id::TrustDomain;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;
use zeroize::{Zeroize as _, Zeroizing};

use crate::authorise::Grant;
use crate::clock::Seconds;
use crate::issue::{BACKDATE_SECONDS, moment, random_serial};
use crate::ledger::{Ledger, LedgerError};

const ROOT_FILE: &str = "root.pem";
const ISSUING_FILE: &str = "issuing.pem";
const LEDGER_FILE: &str = "ledger.redb";
const LOCK_FILE: &str = "lock";

/// Life of a root, in seconds: ten years.
const ROOT_SECONDS: u64 = 10 * 365 * 86_400;

/// Life of an issuing key, in seconds: 30 days bound what its theft is worth.
const ISSUING_SECONDS: u64 = 30 * 86_400;

/// An issuing key with less than this left is replaced, in seconds: a third of its life, longer than any certificate
/// that it signs lives, so none is cut short.
const ISSUING_SECONDS_LEFT_MIN: u64 = ISSUING_SECONDS / 3;

/// Largest file of keys that is read, in bytes; ours have 1.5 KiB. A larger one counts as damaged.
const PEM_BYTES_MAX: u64 = 64 * 1024;

/// Why the authority cannot use its state folder.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file or folder could not be read or written.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others may read the folder of keys.
    #[error(
        "{path} has mode {mode:04o} and owner {owner}, expected 0700 and our own user: `chmod 700 {path}`"
    )]
    Mode {
        /// The folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// Its owner's user id.
        owner: u32,
    },
    /// Another process uses the folder.
    #[error("{path} is in use by another culvert-ca; end that one first")]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// The root was there once.
    #[error(
        "{path} is missing, but this authority had a root before ({evidence}). A new root would cut off every node that \
         trusts the old one, so none is made. Restore {path} from its backup; or, to begin anew and join all nodes again, \
         start once with --init-new-root"
    )]
    RootVanished {
        /// Where it should be.
        path: PathBuf,
        /// How we know.
        evidence: String,
    },
    /// The root is there and unusable.
    #[error(
        "{path} is damaged: {problem}. Restore it from its backup; or, to begin anew and join all nodes again, start once \
         with --init-new-root"
    )]
    RootDamaged {
        /// Where it is.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The root is another than the one that the ledger knows.
    #[error(
        "{path} holds the root with pin {found}, but this authority had the one with pin {expected}. Put the right one back; \
         or, to begin anew and join all nodes again, start once with --init-new-root"
    )]
    RootReplaced {
        /// Where it is.
        path: PathBuf,
        /// Pin of the root in the file.
        found: RootPin,
        /// Pin of the root in the ledger.
        expected: String,
    },
    /// `--init-new-root` while the root is in order.
    #[error("{path} is in order, and --init-new-root would throw it away: start without --init-new-root")]
    RootInOrder {
        /// Where it is.
        path: PathBuf,
    },
    /// The configured trust domain is not that of the root.
    #[error(
        "{path} is the root of {found}, but trustDomain is {configured}: change trustDomain, or use another state folder"
    )]
    TrustDomain {
        /// The root's file.
        path: PathBuf,
        /// Name in the root.
        found: String,
        /// Name in the configuration.
        configured: TrustDomain,
    },
    /// The ledger cannot be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The cryptographic library refused to make or sign something.
    #[error("cannot make the {what}: {problem}")]
    Crypto {
        /// What was to be made.
        what: &'static str,
        /// What the library said.
        problem: String,
    },
}

/// The state folder. Ours alone while the [`StateLock`] lives that came with it.
#[derive(Debug)]
pub(crate) struct StateFolder {
    path: PathBuf,
}

/// Keeps other processes out of the state folder. Dropped last, when nothing writes there any more.
#[derive(Debug)]
pub(crate) struct StateLock {
    _lock: File,
}

impl StateFolder {
    /// Makes the folder if need be, checks that it is private, and locks it.
    pub(crate) fn open(path: &Path) -> Result<(Self, StateLock), StateError> {
        let failed = |action| move |source| StateError::Io { action, path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make the folder"))?;
        let found = std::fs::metadata(path).map_err(failed("read the folder"))?;
        let (mode, owner) = (found.mode() & 0o7777, found.uid());
        if mode & 0o077 != 0 || owner != nix::unistd::geteuid().as_raw() {
            return Err(StateError::Mode { path: path.to_owned(), mode, owner });
        }
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join(LOCK_FILE))
            .map_err(failed("open the lock"))?;
        lock.try_lock().map_err(|_| StateError::Locked { path: path.to_owned() })?;
        Ok((Self { path: path.to_owned() }, StateLock { _lock: lock }))
    }

    pub(crate) fn ledger_path(&self) -> PathBuf {
        self.path.join(LEDGER_FILE)
    }

    fn root_path(&self) -> PathBuf {
        self.path.join(ROOT_FILE)
    }

    /// Writes a private file whole or not at all. `Replace::Never` fails if there is one already.
    fn write(&self, name: &str, content: &[u8], replace: Replace) -> Result<(), StateError> {
        let (path, temporary) = (self.path.join(name), self.path.join(format!(".{name}.tmp")));
        let failed = |action| {
            let path = path.clone();
            move |source| StateError::Io { action, path, source }
        };
        // Left over from a crash; nobody else writes here, for the folder is locked.
        match std::fs::remove_file(&temporary) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("remove a stale temporary file")(error)),
        }
        let mut file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(failed("make a temporary file"))?;
        file.write_all(content).map_err(failed("write"))?;
        file.sync_all().map_err(failed("sync"))?;
        match replace {
            // Unlike a rename, a link fails if the name is taken.
            Replace::Never => std::fs::hard_link(&temporary, &path)
                .and_then(|()| std::fs::remove_file(&temporary))
                .map_err(failed("put in place"))?,
            Replace::Old => std::fs::rename(&temporary, &path).map_err(failed("rename"))?,
        }
        self.sync()
    }

    /// Moves a file out of the way, so that an operator can still look at it.
    fn retire(&self, name: &str, now: Seconds) -> Result<(), StateError> {
        let path = self.path.join(name);
        match std::fs::rename(&path, self.path.join(format!("{name}.retired-{}", now.0))) {
            Ok(()) => self.sync(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(StateError::Io { action: "move away", path, source }),
        }
    }

    fn sync(&self) -> Result<(), StateError> {
        File::open(&self.path).and_then(|folder| folder.sync_all()).map_err(|source| StateError::Io {
            action: "sync the folder",
            path: self.path.clone(),
            source,
        })
    }
}

#[derive(Clone, Copy)]
enum Replace {
    Never,
    Old,
}

/// The authority's keys in use.
#[derive(Debug)]
pub(crate) struct Authority {
    folder: StateFolder,
    trust_domain: TrustDomain,
    root: CertificateDer<'static>,
    pin: RootPin,
    root_expires: Seconds,
    issuing: RwLock<Arc<CaPair>>,
}

impl Authority {
    /// Loads root and issuing key; makes what was never there.
    ///
    /// # Errors
    /// A root that was there and is gone, damaged or another one is never replaced, unless `init_new_root` says so.
    pub(crate) fn open(
        folder: StateFolder,
        ledger: &Ledger,
        trust_domain: &TrustDomain,
        init_new_root: bool,
        now: Seconds,
    ) -> Result<Self, StateError> {
        let known = known_root(&folder, ledger, now)?;
        let root = match (known, init_new_root) {
            (Known::InOrder(root), false) => *root,
            (Known::InOrder(_), true) => return Err(StateError::RootInOrder { path: folder.root_path() }),
            (Known::Nothing, _) => new_root(&folder, trust_domain, now)?,
            (Known::Wrong(error), false) => return Err(error),
            (Known::Wrong(_), true) => {
                folder.retire(ROOT_FILE, now)?;
                folder.retire(ISSUING_FILE, now)?;
                ledger.forget_tokens()?;
                new_root(&folder, trust_domain, now)?
            }
        };
        let expected = trust_domain.uri();
        if root.uri.as_deref() != Some(expected.as_str()) {
            return Err(StateError::TrustDomain {
                path: folder.root_path(),
                found: root.uri.unwrap_or_else(|| "no trust domain".into()),
                configured: trust_domain.clone(),
            });
        }
        ledger.remember_root(&root.pin.to_string())?;
        let issuing = match load_issuing(&folder, &root, now) {
            Some(issuing) => issuing,
            None => new_issuing(&folder, &root, trust_domain, now)?,
        };
        Ok(Self {
            folder,
            trust_domain: trust_domain.clone(),
            root: root.certificate.clone(),
            pin: root.pin,
            root_expires: root.expires,
            issuing: RwLock::new(Arc::new(issuing)),
        })
    }

    pub(crate) fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The root's certificate.
    pub(crate) fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// What a join token carries of the root.
    pub(crate) fn pin(&self) -> RootPin {
        self.pin
    }

    pub(crate) fn root_expires(&self) -> Seconds {
        self.root_expires
    }

    /// The key that signs at present.
    pub(crate) fn issuing(&self) -> Arc<CaPair> {
        Arc::clone(&self.issuing.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the issuing key if it is due; says whether it was. Certificates of the old one stay valid: they carry
    /// its certificate with them.
    pub(crate) fn rotate(&self, now: Seconds) -> Result<bool, StateError> {
        if !self.issuing().is_due(now) {
            return Ok(false);
        }
        let path = self.folder.root_path();
        let root = CaPair::read(&path)
            .and_then(|root| root.ok_or_else(|| "it is missing".into()))
            .map_err(|problem| StateError::RootDamaged { path: path.clone(), problem })?;
        if root.pin != self.pin {
            return Err(StateError::RootReplaced { path, found: root.pin, expected: self.pin.to_string() });
        }
        let next = new_issuing(&self.folder, &root, &self.trust_domain, now)?;
        *self.issuing.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        Ok(true)
    }
}

/// What the state folder says of a root.
enum Known {
    Nothing,
    InOrder(Box<CaPair>),
    Wrong(StateError),
}

fn known_root(folder: &StateFolder, ledger: &Ledger, now: Seconds) -> Result<Known, StateError> {
    let path = folder.root_path();
    let remembered = ledger.root()?;
    let root = match CaPair::read(&path) {
        Ok(Some(root)) => root,
        Ok(None) => {
            let evidence = match remembered {
                Some(pin) => format!("the ledger knows its pin, {pin}"),
                None if folder.path.join(ISSUING_FILE).exists() => format!("{ISSUING_FILE} is still there"),
                None => return Ok(Known::Nothing),
            };
            return Ok(Known::Wrong(StateError::RootVanished { path, evidence }));
        }
        Err(problem) => return Ok(Known::Wrong(StateError::RootDamaged { path, problem })),
    };
    if let Some(expected) = remembered.filter(|pin| *pin != root.pin.to_string()) {
        return Ok(Known::Wrong(StateError::RootReplaced { path, found: root.pin, expected }));
    }
    if root.expires <= now {
        let problem = format!("it expired at {}, it is {now}", root.expires);
        return Ok(Known::Wrong(StateError::RootDamaged { path, problem }));
    }
    if !root.is_signed_by(&root) {
        let problem = "its certificate is not signed by its own key".into();
        return Ok(Known::Wrong(StateError::RootDamaged { path, problem }));
    }
    Ok(Known::InOrder(Box::new(root)))
}

fn new_root(folder: &StateFolder, trust_domain: &TrustDomain, now: Seconds) -> Result<CaPair, StateError> {
    let crypto = |problem: String| StateError::Crypto { what: "root", problem };
    let key = SecretKey::generate().map_err(|error| crypto(error.to_string()))?;
    let params =
        ca_params("root", &key, trust_domain, BasicConstraints::Unconstrained, now, now.plus(ROOT_SECONDS))
            .map_err(crypto)?;
    let certificate = params.self_signed(&key.0).map_err(|error| crypto(error.to_string()))?;
    let root = CaPair::new(key, certificate.der().clone()).map_err(crypto)?;
    folder.write(ROOT_FILE, root.pem().as_bytes(), Replace::Never)?;
    Ok(root)
}

/// The issuing key on disk, if it is usable for a while. It is no trust anchor, so a lost one is simply replaced.
fn load_issuing(folder: &StateFolder, root: &CaPair, now: Seconds) -> Option<CaPair> {
    let issuing = CaPair::read(&folder.path.join(ISSUING_FILE)).ok()??;
    (issuing.is_signed_by(root) && !issuing.is_due(now)).then_some(issuing)
}

fn new_issuing(
    folder: &StateFolder,
    root: &CaPair,
    trust_domain: &TrustDomain,
    now: Seconds,
) -> Result<CaPair, StateError> {
    let crypto = |problem: String| StateError::Crypto { what: "issuing key", problem };
    let key = SecretKey::generate().map_err(|error| crypto(error.to_string()))?;
    let expires = now.plus(ISSUING_SECONDS).min(root.expires);
    let params = ca_params("issuing", &key, trust_domain, BasicConstraints::Constrained(0), now, expires)
        .map_err(crypto)?;
    let certificate =
        params.signed_by(&key.0, &root.issuer()).map_err(|error| crypto(error.to_string()))?.der().clone();
    let issuing = CaPair::new(key, certificate).map_err(crypto)?;
    folder.write(ISSUING_FILE, issuing.pem().as_bytes(), Replace::Old)?;
    Ok(issuing)
}

/// A key that certifies, with its certificate. Neither `Clone` nor serialisable, and its `Debug` shows no key.
pub(crate) struct CaPair {
    key: SecretKey,
    certificate: CertificateDer<'static>,
    /// Subject and key identifier, as those whom it certifies name their issuer.
    view: CertificateParams,
    pin: RootPin,
    uri: Option<String>,
    expires: Seconds,
}

impl CaPair {
    /// Certifies a key with the name that `_proof` grants.
    pub(crate) fn certify(
        &self,
        _proof: &Grant,
        params: &CertificateParams,
        key: &impl PublicKeyData,
    ) -> Result<CertificateDer<'static>, rcgen::Error> {
        params.signed_by(key, &self.issuer()).map(|certificate| certificate.der().clone())
    }

    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub(crate) fn expires(&self) -> Seconds {
        self.expires
    }

    fn is_due(&self, now: Seconds) -> bool {
        self.expires.since(now) < ISSUING_SECONDS_LEFT_MIN
    }

    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.view, &self.key.0)
    }

    fn new(key: SecretKey, certificate: CertificateDer<'static>) -> Result<Self, String> {
        let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|error| error.to_string())?;
        if !parsed.is_ca() {
            return Err("its certificate is not that of an authority".into());
        }
        let spki = parsed.public_key().raw;
        if key.0.subject_public_key_info() != spki {
            return Err("key and certificate do not belong together".into());
        }
        let common_name = parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
        let view = issuer_view(common_name.ok_or("its certificate has no common name")?);
        let uri = parsed.subject_alternative_name().ok().flatten().and_then(|names| {
            let [GeneralName::URI(uri)] = names.value.general_names[..] else { return None };
            Some(uri.to_owned())
        });
        let expires = Seconds(u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0));
        let pin = RootPin::of_spki(spki);
        Ok(Self { key, view, pin, uri, expires, certificate })
    }

    /// Reads key and certificate from a file; `None` if there is no file.
    fn read(path: &Path) -> Result<Option<Self>, String> {
        let Some(text) = read_pem(path)? else { return Ok(None) };
        let certificate = CertificateDer::from_pem_slice(text.as_bytes())
            .map_err(|_| "it holds no certificate".to_owned())?;
        let mut der = PrivateKeyDer::from_pem_slice(text.as_bytes())
            .map_err(|_| "it holds no private key".to_owned())?;
        let key = KeyPair::try_from(&der).map(SecretKey);
        der.zeroize();
        Self::new(key.map_err(|error| format!("its key is unusable: {error}"))?, certificate).map(Some)
    }

    fn pem(&self) -> Zeroizing<String> {
        let key = Zeroizing::new(self.key.0.serialize_pem());
        let certificate = certificate_pem(&self.certificate);
        let mut pem = Zeroizing::new(String::with_capacity(key.len() + 1 + certificate.len()));
        pem.push_str(&key);
        if !key.ends_with('\n') {
            pem.push('\n');
        }
        pem.push_str(&certificate);
        pem
    }

    fn is_signed_by(&self, signer: &Self) -> bool {
        let (Ok((_, own)), Ok((_, signer))) =
            (X509Certificate::from_der(&self.certificate), X509Certificate::from_der(&signer.certificate))
        else {
            return false;
        };
        own.issuer() == signer.subject() && own.verify_signature(Some(signer.public_key())).is_ok()
    }
}

impl std::fmt::Debug for CaPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CaPair")
            .field("pin", &self.pin)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

/// A private key, wiped at its end.
struct SecretKey(KeyPair);

impl SecretKey {
    fn generate() -> Result<Self, rcgen::Error> {
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map(Self)
    }
}

impl Drop for SecretKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// What `culvert-ca root show` prints.
#[derive(Clone, Debug)]
pub struct RootShown {
    /// The root's certificate, PEM.
    pub pem: String,
    /// What join tokens carry of it.
    pub pin: RootPin,
}

/// Reads the root of a state folder, also while an authority uses it.
///
/// # Errors
/// [`StateError::RootVanished`] or [`StateError::RootDamaged`] with the file's name.
pub fn show_root(state: &Path) -> Result<RootShown, StateError> {
    let path = state.join(ROOT_FILE);
    match CaPair::read(&path) {
        Ok(Some(root)) => Ok(RootShown { pem: certificate_pem(&root.certificate), pin: root.pin }),
        Ok(None) => Err(StateError::Io { action: "read", path, source: io::ErrorKind::NotFound.into() }),
        Err(problem) => Err(StateError::RootDamaged { path, problem }),
    }
}

fn read_pem(path: &Path) -> Result<Option<Zeroizing<String>>, String> {
    match std::fs::metadata(path) {
        Ok(found) if found.len() > PEM_BYTES_MAX => {
            return Err(format!("it has {} bytes, expected at most {PEM_BYTES_MAX}", found.len()));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("it cannot be read: {error}")),
    }
    std::fs::read_to_string(path)
        .map(|text| Some(Zeroizing::new(text)))
        .map_err(|error| format!("it cannot be read: {error}"))
}

/// Fields of a certificate that certifies. Each key has a subject of its own: verifiers that look issuers up by name
/// would otherwise try one after the other.
fn ca_params(
    role: &str,
    key: &SecretKey,
    trust_domain: &TrustDomain,
    path: BasicConstraints,
    now: Seconds,
    expires: Seconds,
) -> Result<CertificateParams, String> {
    let key_id = RootPin::of_spki(&key.0.subject_public_key_info()).to_string();
    let mut params = issuer_view(&format!("Culvert {role} {}", &key_id[..16]));
    params.not_before = moment(now.minus(BACKDATE_SECONDS)).ok_or("the clock is out of range")?;
    params.not_after = moment(expires).ok_or("the clock is out of range")?;
    let serial = random_serial().map_err(|refusal| refusal.message)?;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    let uri = trust_domain.uri().try_into().map_err(|_| "the trust domain is not ASCII")?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    params.is_ca = IsCa::Ca(path);
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// The part of a certificate's fields that those below it repeat.
fn issuer_view(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.key_identifier_method = KeyIdMethod::Sha256;
    params
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An authority of its own folder, without a server.
    pub(crate) struct World {
        pub(crate) authority: Arc<Authority>,
        pub(crate) ledger: Arc<Ledger>,
        path: PathBuf,
        _lock: StateLock,
    }

    impl World {
        pub(crate) fn new(name: &str, now: Seconds) -> Self {
            let path = std::env::temp_dir().join(format!("culvert-ca-unit-{name}-{}", std::process::id()));
            let (folder, lock) = StateFolder::open(&path).expect("a folder");
            let ledger = Ledger::open(&folder.ledger_path()).expect("a ledger");
            let domain = "cluster.local".parse().expect("a trust domain");
            let authority = Authority::open(folder, &ledger, &domain, false, now).expect("an authority");
            Self { authority: Arc::new(authority), ledger: Arc::new(ledger), path, _lock: lock }
        }
    }

    impl Drop for World {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }

    const NOW: Seconds = Seconds(1_800_000_000);

    #[test]
    fn the_issuing_key_is_replaced_when_a_third_of_its_life_is_left_and_its_root_stays() {
        let world = World::new("rotate", NOW);
        let (authority, first) = (&world.authority, world.authority.issuing());
        let due = first.expires().minus(ISSUING_SECONDS_LEFT_MIN);
        assert!(!authority.rotate(due).expect("looked"), "not yet");
        assert!(authority.rotate(due.plus(1)).expect("looked"), "due");
        let second = authority.issuing();
        assert_ne!(first.certificate(), second.certificate());
        assert_eq!(second.expires(), due.plus(1 + ISSUING_SECONDS));
        let root = CaPair::read(&world.path.join(ROOT_FILE)).expect("readable").expect("there");
        assert!(first.is_signed_by(&root) && second.is_signed_by(&root));
        assert!(!root.is_signed_by(&second));
        assert_eq!(authority.pin(), root.pin);
        // The subjects of two keys differ, or verifiers would have to try both.
        assert_ne!(first.view.distinguished_name, second.view.distinguished_name);
    }

    #[test]
    fn a_root_that_vanishes_while_the_authority_runs_stops_the_replacement_only() {
        let world = World::new("vanish", NOW);
        std::fs::remove_file(world.path.join(ROOT_FILE)).expect("removed");
        let due = world.authority.issuing().expires().minus(10);
        let error = world.authority.rotate(due).expect_err("no root, no issuing key");
        assert!(matches!(error, StateError::RootDamaged { .. }), "{error}");
        assert!(world.authority.issuing().expires() > due, "the present one serves on");
    }

    #[test]
    fn a_private_file_is_written_whole_or_not_at_all() {
        let world = World::new("write", NOW);
        let folder = StateFolder { path: world.path.clone() };
        folder.write(ROOT_FILE, b"x", Replace::Never).expect_err("a root is there");
        assert!(
            std::fs::read_to_string(world.path.join(ROOT_FILE)).expect("readable").contains("CERTIFICATE")
        );
        std::fs::write(world.path.join(".file.tmp"), "left by a crash").expect("written");
        folder.write("file", b"one", Replace::Never).expect("written");
        folder.write("file", b"two", Replace::Old).expect("replaced");
        assert_eq!(std::fs::read(world.path.join("file")).expect("readable"), b"two");
        assert_eq!(std::fs::metadata(world.path.join("file")).expect("there").mode() & 0o777, 0o600);
    }

    #[test]
    fn a_file_of_keys_above_the_limit_counts_as_damaged() {
        let world = World::new("pem", NOW);
        let path = world.path.join("padded.pem");
        let mut text = std::fs::read(world.path.join(ROOT_FILE)).expect("readable");
        for (bytes, readable) in [(PEM_BYTES_MAX, true), (PEM_BYTES_MAX + 1, false)] {
            text.resize(usize::try_from(bytes).expect("small"), b'\n');
            std::fs::write(&path, &text).expect("written");
            match CaPair::read(&path) {
                Ok(found) => assert!(readable && found.is_some(), "{bytes} bytes"),
                Err(problem) => assert!(!readable && problem.contains("at most 65536"), "{problem}"),
            }
        }
    }

    #[test]
    fn a_pair_shows_no_key() {
        let world = World::new("debug", NOW);
        let issuing = world.authority.issuing();
        let pem = issuing.pem();
        let secret = pem.lines().nth(1).expect("a line of the key");
        let key = issuing.key.0.serialize_der();
        let shown = format!("{issuing:?} {:?}", world.authority);
        assert!(!shown.contains(secret) && !shown.contains(&format!("{key:?}")[..40]), "{shown}");
    }
}
