//! Files of certificates and keys that tenants' rules name: opened beneath the folder that the operator gave to the rule's
//! namespace and nowhere else (T-20), read again when they change.
//!
//! In: what a DestinationRule names. Out: roots to judge a server by and what to show it, or which field of the rule cannot
//! be followed and why. A version that cannot be used changes nothing where one before could.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, SystemTime},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
};
use node_core::{
    policy::{NamedFiles, Part},
    snapshot::Snapshot,
    workload::ObjectName,
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    sign::CertifiedKey,
};
use tokio::{sync::watch, task::spawn_blocking, time::sleep};
use zeroize::Zeroizing;

use super::{
    store::{CertificateFacts, Presented},
    verify::any_signer,
};
use crate::telemetry::{Event, Sink};

/// Largest file, in bytes: four times the bundle of public roots of a distribution. A larger one is not read.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Sets of files that are kept: ten for each of 100 namespaces. Rules beyond it are refused, and [`SETS_LIMIT`] is told.
const SETS_MAX: usize = 1_024;

const SETS_LIMIT: &str = "client_file_sets";

/// The files in use are looked at this often, in seconds. An fstat each; mounted secrets change within a minute anyway.
const LOOK_SECONDS: u64 = 2;

/// Where distributions keep the system's roots; the first that is there counts.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// By which roots a server is judged, and what it is shown.
pub struct Material {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) shown: Option<Arc<Presented>>,
}

/// A field of a rule that names a file which cannot be used. Displays as one sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: found {value:?}, expected {expected}: {remedy}")]
pub struct FileFault {
    pub field: &'static str,
    pub value: String,
    pub expected: String,
    pub remedy: String,
}

/// What is wrong with the files of one rule at present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleFault {
    /// Path of the field, such as `spec.trafficPolicy.tls.privateKey`.
    pub field: String,
    pub fault: FileFault,
    /// Whether a version from before is still in use; else the rule's host is denied.
    pub keeps_older: bool,
}

/// See the module.
pub struct ClientFiles {
    folders: BTreeMap<String, PathBuf>,
    system_roots: OnceLock<Option<Arc<RootCertStore>>>,
    sets: Mutex<BTreeMap<NamedFiles, Known>>,
    events: Sink,
}

/// One set of files.
#[derive(Clone)]
struct Known {
    seen: Seen,
    used: Option<Arc<Material>>,
    fault: Option<FileFault>,
}

/// By what a change is noticed, of each file in the order of the fields.
type Seen = Vec<Option<Stamp>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl ClientFiles {
    /// `folders`: what the operator gave to each namespace.
    pub fn new(folders: BTreeMap<String, PathBuf>, events: Sink) -> Arc<Self> {
        Arc::new(Self { folders, system_roots: OnceLock::new(), sets: Mutex::default(), events })
    }

    /// Reads what rules name, and reads it again when it changes, until no snapshot comes any more.
    pub async fn follow(self: Arc<Self>, mut snapshots: watch::Receiver<Arc<Snapshot>>) {
        loop {
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            let files = Arc::clone(&self);
            // Reading failed only if the runtime is going down.
            let _ = spawn_blocking(move || files.refresh(&snapshot)).await;
            tokio::select! {
                changed = snapshots.changed() => if changed.is_err() { return },
                () = sleep(Duration::from_secs(LOOK_SECONDS)) => {}
            }
        }
    }

    /// What these files hold; `None`: the system's roots, and nothing to show. Files that nobody looked at yet are read now.
    ///
    /// # Errors
    /// Which field cannot be followed, if it never could.
    pub async fn material(self: &Arc<Self>, named: Option<&NamedFiles>) -> Result<Arc<Material>, FileFault> {
        let known = named.and_then(|named| self.lock().get(named).cloned());
        let known = match (known, named.cloned()) {
            (Some(known), _) => known,
            (None, named) => {
                let files = Arc::clone(self);
                let read = spawn_blocking(move || match named {
                    Some(named) => files.look_at(&named),
                    None => files.read_system(),
                });
                read.await
                    .map_err(|_| FileFault::new("caCertificates", "", "a running daemon", "try again"))?
            }
        };
        match known {
            Known { used: Some(material), .. } => Ok(material),
            Known { fault: Some(fault), .. } => Err(fault),
            Known { used: None, fault: None, .. } => {
                Err(FileFault::new("caCertificates", "", "a file that was read", "try again"))
            }
        }
    }

    /// What is wrong at present, by rule.
    pub fn faults(&self, snapshot: &Snapshot) -> BTreeMap<ObjectName, RuleFault> {
        let sets = self.lock();
        let mut faults = BTreeMap::new();
        for (rule, part, named) in snapshot.named_files() {
            let Some(Known { fault: Some(fault), used, .. }) = sets.get(&named) else { continue };
            faults.entry(rule.clone()).or_insert_with(|| RuleFault {
                field: field_path(&part, fault),
                fault: fault.clone(),
                keeps_older: used.is_some(),
            });
        }
        faults
    }

    /// Looks at all files that the rules name, and forgets the others.
    pub fn refresh(&self, snapshot: &Snapshot) {
        let named: Vec<(&ObjectName, Part, NamedFiles)> = snapshot.named_files().collect();
        let wanted: BTreeSet<&NamedFiles> = named.iter().map(|(.., named)| named).collect();
        self.lock().retain(|known, _| wanted.contains(known));
        for (rule, part, named) in &named {
            let before = self.lock().get(named).cloned();
            let known = self.look_at(named);
            let (used, fault) = before.map_or((None, None), |before| (before.used, before.fault));
            match known {
                Known { fault: Some(fault_now), used, .. } if fault.as_ref() != Some(&fault_now) => {
                    let effect =
                        if used.is_some() { "the version before stays in use" } else { "its host is denied" };
                    self.events.emit(&Event::DocumentRefused {
                        file: fault_now.value.clone(),
                        object: format!("DestinationRule {rule}"),
                        field: field_path(part, &fault_now),
                        problem: format!("{fault_now}; {effect}"),
                    });
                }
                Known { fault: None, used: Some(newer), .. }
                    if used.as_ref().is_none_or(|used| !Arc::ptr_eq(used, &newer)) =>
                {
                    self.events.emit(&Event::RuleFilesRead { rule: format!("DestinationRule {rule}") });
                }
                Known { .. } => {}
            }
        }
    }

    /// Reads a set anew if a file of it changed.
    fn look_at(&self, named: &NamedFiles) -> Known {
        let before = self.lock().get(named).cloned();
        let seen = self.seen(named);
        if let Some(before) = before.as_ref().filter(|before| before.seen == seen && !before.may_recover()) {
            return before.clone();
        }
        let used = before.and_then(|before| before.used);
        let known = match self.read(named) {
            Ok(material) => Known { seen, used: Some(Arc::new(material)), fault: None },
            Err(fault) => Known { seen, used, fault: Some(fault) },
        };
        let mut sets = self.lock();
        if sets.len() >= SETS_MAX && !sets.contains_key(named) {
            self.events.emit(&Event::LimitReached { limit: SETS_LIMIT, workload: None });
            let expected = format!("at most {SETS_MAX} sets of files on a node");
            let fault = FileFault::new("caCertificates", "", &expected, "let rules share their files");
            return Known { seen: known.seen, used: None, fault: Some(fault) };
        }
        sets.insert(named.clone(), known.clone());
        known
    }

    fn read_system(&self) -> Known {
        let roots = self.system_roots.get_or_init(system_roots).clone();
        let fault = || {
            let remedy = "install the distribution's ca-certificates, or name a file";
            FileFault::new("caCertificates", "", "a file, as the system has no roots", remedy)
        };
        match roots {
            Some(roots) => {
                Known { seen: Vec::new(), used: Some(Arc::new(Material { roots, shown: None })), fault: None }
            }
            None => Known { seen: Vec::new(), used: None, fault: Some(fault()) },
        }
    }

    fn seen(&self, named: &NamedFiles) -> Seen {
        let stamp = |(field, path): (&'static str, &str)| {
            let opened = self.open(named, field, path).ok()?;
            Stamp::of(&opened).ok()
        };
        fields(named).into_iter().map(stamp).collect()
    }

    fn read(&self, named: &NamedFiles) -> Result<Material, FileFault> {
        let contents = |field: &'static str, path: &Option<String>| {
            path.as_ref().map(|path| self.contents(named, field, path)).transpose()
        };
        let roots = match (&named.ca_certificates, contents("caCertificates", &named.ca_certificates)?) {
            (Some(path), Some(text)) => Arc::new(roots_of(path, &text)?),
            _ => self.read_system().used.map(|system| Arc::clone(&system.roots)).ok_or_else(|| {
                let remedy = "install the distribution's ca-certificates, or name a file";
                FileFault::new("caCertificates", "", "a file, as the system has no roots", remedy)
            })?,
        };
        let chain = contents("clientCertificate", &named.client_certificate)?;
        let key = contents("privateKey", &named.private_key)?;
        let shown = match (chain, key) {
            (Some(chain), Some(key)) => Some(Arc::new(shown(named, &chain, &key)?)),
            _ => None,
        };
        Ok(Material { roots, shown })
    }

    fn contents(
        &self,
        named: &NamedFiles,
        field: &'static str,
        path: &str,
    ) -> Result<Zeroizing<Vec<u8>>, FileFault> {
        let file = self.open(named, field, path)?;
        let mut text = Zeroizing::new(Vec::new());
        let unread = |error: io::Error| {
            FileFault::new(
                field,
                path,
                &format!("a file that can be read ({error})"),
                "let the daemon read it",
            )
        };
        (&file).take(FILE_BYTES_MAX + 1).read_to_end(&mut text).map_err(unread)?;
        if text.len() as u64 > FILE_BYTES_MAX {
            let expected = format!("at most {FILE_BYTES_MAX} bytes");
            return Err(FileFault::new(field, path, &expected, "name a file of certificates in PEM"));
        }
        Ok(text)
    }

    /// Opens a file beneath the namespace's folder: no path and no link leads out of it (T-20).
    #[allow(clippy::wildcard_enum_match_arm, reason = "the kernel's other errors are told as they are")]
    fn open(&self, named: &NamedFiles, field: &'static str, path: &str) -> Result<File, FileFault> {
        let Some(folder) = self.folders.get(&*named.namespace) else {
            let expected = format!("a folder of files for namespace {}", named.namespace);
            let remedy = format!(
                "the operator gives one by clientFiles: {{{}: <folder>}} in node.yaml",
                named.namespace
            );
            return Err(FileFault::new(field, path, &expected, &remedy));
        };
        let fault = |expected: String, remedy: &str| FileFault::new(field, path, &expected, remedy);
        let beneath = format!("a path beneath {}", folder.display());
        let relative = match Path::new(path) {
            written if written.is_absolute() => written
                .strip_prefix(folder)
                .map_err(|_| fault(beneath.clone(), "write a path beneath it, absolute or not"))?,
            written => written,
        };
        let opened = File::open(folder).and_then(|folder| Ok(openat2(&folder, relative, beneath_it())?));
        let file = File::from(opened.map_err(|error| {
            match Errno::from_raw(error.raw_os_error().unwrap_or_default()) {
                Errno::EXDEV => fault(beneath.clone(), "neither .. nor a link may lead out of it"),
                Errno::ELOOP => {
                    fault(format!("{beneath} without links of the kernel's own"), "name the file itself")
                }
                Errno::ENOENT => fault(
                    format!("a file in {}", folder.display()),
                    "put the file there, or correct the path",
                ),
                _ => fault(format!("a file that can be opened ({error})"), "let the daemon read it"),
            }
        })?);
        match file.metadata() {
            Ok(found) if found.is_file() => Ok(file),
            Ok(_) => Err(fault("a regular file".to_owned(), "name the file itself")),
            Err(error) => {
                Err(fault(format!("a file that can be looked at ({error})"), "let the daemon read it"))
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NamedFiles, Known>> {
        self.sets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// A fault that is not the files' own may pass without their change: a folder that appears, a right that is given, a clock.
    fn may_recover(&self) -> bool {
        self.fault.is_some()
    }
}

/// A pipe or device does not hold the daemon up.
fn beneath_it() -> OpenHow {
    OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS)
}

fn fields(named: &NamedFiles) -> Vec<(&'static str, &str)> {
    let all = [
        ("caCertificates", &named.ca_certificates),
        ("clientCertificate", &named.client_certificate),
        ("privateKey", &named.private_key),
    ];
    all.into_iter().filter_map(|(field, path)| Some((field, path.as_deref()?))).collect()
}

fn field_path(part: &Part, fault: &FileFault) -> String {
    format!("{part}.{}", fault.field)
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

impl FileFault {
    fn new(field: &'static str, value: &str, expected: &str, remedy: &str) -> Self {
        Self { field, value: value.to_owned(), expected: expected.to_owned(), remedy: remedy.to_owned() }
    }
}

fn system_roots() -> Option<Arc<RootCertStore>> {
    SYSTEM_ROOTS.iter().find_map(|path| {
        let text = std::fs::read(path).ok()?;
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&text).filter_map(Result::ok));
        (!roots.is_empty()).then(|| Arc::new(roots))
    })
}

/// All of a tenant's roots, or none: half a bundle is not what was meant.
fn roots_of(path: &str, text: &[u8]) -> Result<RootCertStore, FileFault> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("caCertificates", path, text)? {
        roots.add(certificate).map_err(|error| {
            let expected = format!("certificates of authorities in PEM ({error})");
            FileFault::new("caCertificates", path, &expected, "remove what is no root from the file")
        })?;
    }
    Ok(roots)
}

fn shown(named: &NamedFiles, chain: &[u8], key: &[u8]) -> Result<Presented, FileFault> {
    let path = |path: &Option<String>| path.clone().unwrap_or_default();
    let (chain_path, key_path) = (path(&named.client_certificate), path(&named.private_key));
    let chain = certificates("clientCertificate", &chain_path, chain)?;
    let facts = CertificateFacts::read(&chain[0]).map_err(|error| {
        FileFault::new("clientCertificate", &chain_path, "a certificate in PEM", &error.to_string())
    })?;
    if facts.not_after <= SystemTime::now() {
        let expected = "a certificate that has not ended by this node's clock";
        return Err(FileFault::new("clientCertificate", &chain_path, expected, "renew it"));
    }
    let unusable = |expected: &str| {
        FileFault::new("privateKey", &key_path, expected, "write the key that belongs to clientCertificate")
    };
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|_| unusable("a private key in PEM, without a password"))?;
    let signer = any_signer(&key).map_err(|_| unusable("a key of RSA, ECDSA or Ed25519"))?;
    let certified = CertifiedKey::new(chain, signer);
    certified.keys_match().map_err(|_| unusable("the key of the certificate in clientCertificate"))?;
    Ok(Presented(Arc::new(certified)))
}

/// At least one.
fn certificates(
    field: &'static str,
    path: &str,
    text: &[u8],
) -> Result<Vec<CertificateDer<'static>>, FileFault> {
    let unusable =
        || FileFault::new(field, path, "certificates in PEM", "write them in PEM, each of them whole");
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>().map_err(|_| unusable())?;
    if found.is_empty() { Err(unusable()) } else { Ok(found) }
}

impl fmt::Debug for ClientFiles {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ClientFiles").field("folders", &self.folders).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
