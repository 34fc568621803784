//! Where things are pinned: `<bpffs>/culvert/<node>/v<schema>/{maps,links,host,workloads/<key>}`.
//!
//! The bpf file system knows no dots in names and no long ones, so names are encoded here and nowhere else.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use ebpf_abi::{SCHEMA_VERSION, limits::KEY_LEN_MAX, names};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use sha2::{Digest as _, Sha256};

use super::{
    KernelConfig,
    error::{KernelError, Report},
};

/// The name that a link has under the folder of its workload: its program's.
pub(super) const NEW_SUFFIX: &str = "-new";

/// Folders of one node and schema.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    node: PathBuf,
    schema: PathBuf,
}

impl Pins {
    /// Mounts the bpf file system where none is, and makes the folders of this node.
    pub(super) fn prepare(config: &KernelConfig) -> Result<Self, KernelError> {
        mount_bpffs(&config.bpffs)?;
        let pins = Self::of(config)?;
        for folder in [pins.maps(), pins.links(), pins.workloads()] {
            make(&folder)?;
        }
        Ok(pins)
    }

    /// The folders of this node, whether or not they exist.
    pub(super) fn of(config: &KernelConfig) -> Result<Self, KernelError> {
        if config.node.is_empty() {
            return Err(KernelError::Name {
                field: "node",
                value: config.node.clone(),
                expected: "the node needs a name",
            });
        }
        let node = config.bpffs.join("culvert").join(encode(&config.node));
        let schema = node.join(format!("v{SCHEMA_VERSION}"));
        Ok(Self { node, schema })
    }

    pub(super) fn node(&self) -> &Path {
        &self.node
    }

    pub(super) fn schema(&self) -> &Path {
        &self.schema
    }

    /// Maps that all instances of the node share.
    pub(super) fn maps(&self) -> PathBuf {
        self.schema.join("maps")
    }

    /// Links of the programs of the node.
    pub(super) fn links(&self) -> PathBuf {
        self.schema.join("links")
    }

    /// The instance of `steer` in the host's namespace.
    pub(super) fn host(&self) -> PathBuf {
        self.schema.join("host")
    }

    /// One folder for each workload.
    pub(super) fn workloads(&self) -> PathBuf {
        self.schema.join("workloads")
    }

    pub(super) fn workload(&self, key: &str) -> Result<PathBuf, KernelError> {
        if key.is_empty() || key.len() > KEY_LEN_MAX {
            return Err(KernelError::Name {
                field: "workload key",
                value: key.to_owned(),
                expected: "\"<namespace>_<name>\" with 1 to 320 bytes",
            });
        }
        Ok(self.workloads().join(encode(key)))
    }
}

/// Makes a folder with its parents, readable by its owner only.
pub(super) fn make(folder: &Path) -> Result<(), KernelError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(KernelError::file(folder, "making the folder"))
}

/// Removes a folder and what is pinned in it. Capture goes first and the guards last, so that nothing is open in between.
pub(super) fn remove(folder: &Path, report: &mut Report) -> Result<(), KernelError> {
    let mut found = list(folder)?;
    found.sort_by_key(|path| rank(path));
    for path in found {
        if path.is_dir() {
            remove(&path, report)?;
            continue;
        }
        fs::remove_file(&path).map_err(KernelError::file(&path, "removing the pin"))?;
        if is_link(&path) {
            report.links += 1;
        } else {
            report.maps += 1;
        }
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::file(folder, "removing the folder")(error))
        }
        _ => Ok(()),
    }
}

/// Removes one pin; none is no error.
pub(super) fn remove_pin(path: &Path) -> Result<(), KernelError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::file(path, "removing the pin")(error))
        }
        _ => Ok(()),
    }
}

/// Removes a folder that others may still use.
pub(super) fn remove_if_empty(folder: &Path) {
    // Fails where another node of this machine has pins: that is the point.
    let _: io::Result<()> = fs::remove_dir(folder);
}

/// What a folder holds; nothing where there is none.
pub(super) fn list(folder: &Path) -> Result<Vec<PathBuf>, KernelError> {
    match fs::read_dir(folder) {
        Ok(entries) => entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()
            .map_err(KernelError::file(folder, "reading the folder")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(KernelError::file(folder, "reading the folder")(error)),
    }
}

fn is_link(path: &Path) -> bool {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
    let name = name.strip_suffix(NEW_SUFFIX).unwrap_or(name);
    name == names::PROGRAM_STEER || name == names::PROGRAM_SHORTCUT || names::CGROUP_PROGRAMS.contains(&name)
}

/// Order of removal: workloads before what they share; connect hooks, events, guards, steering, maps.
fn rank(path: &Path) -> usize {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return usize::MAX };
    let name = name.strip_suffix(NEW_SUFFIX).unwrap_or(name);
    let attach_order = names::CGROUP_PROGRAMS.iter().position(|program| *program == name);
    match (name, attach_order) {
        ("links", _) => 0,
        ("workloads", _) => 1,
        ("host", _) => 2,
        ("maps", _) => 3,
        (_, Some(position)) => 10 + names::CGROUP_PROGRAMS.len() - position,
        (names::PROGRAM_SHORTCUT, None) => 9,
        (names::PROGRAM_STEER, None) => 20,
        _ => 30,
    }
}

/// A name without dots and not too long, different for different names.
fn encode(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.chars().all(plain) && name.len() <= NAME_LEN_MAX {
        return name.to_owned();
    }
    let digest: String =
        Sha256::digest(name).iter().take(HASH_BYTES).map(|byte| format!("{byte:02x}")).collect();
    let readable: String = name.chars().map(|c| if plain(c) { c } else { '-' }).take(NAME_LEN_MAX).collect();
    format!("{readable}~{digest}")
}

fn mount_bpffs(path: &Path) -> Result<(), KernelError> {
    if is_bpffs(path) {
        return Ok(());
    }
    make(path)?;
    let folder = File::open(path).map_err(KernelError::file(path, "opening the folder"))?;
    // Two daemons that start together shall not mount one over the other: the second would hide the first one's pins.
    let _lock = Flock::lock(folder, FlockArg::LockExclusive)
        .map_err(|(_, error)| KernelError::file(path, "locking the folder")(error.into()))?;
    if is_bpffs(path) {
        return Ok(());
    }
    mount(
        Some("bpf"),
        path,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0700"),
    )
    .map_err(|error| KernelError::file(path, "mounting the bpf file system")(error.into()))
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|stats| stats.filesystem_type() == BPF_FS_MAGIC)
}

/// Bytes of an encoded name before its hash; 255 is the file system's limit.
const NAME_LEN_MAX: usize = 200;

/// Bytes of a hash that keeps encoded names apart; written as twice as many characters.
const HASH_BYTES: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names_stay_readable() {
        assert_eq!(encode("photo_photo-backend-0"), "photo_photo-backend-0");
    }

    #[test]
    fn names_that_the_file_system_refuses_are_encoded_and_stay_different() {
        let long = "a".repeat(KEY_LEN_MAX);
        let longer = format!("{long}b");
        let names = ["photo_a.b", "photo_a-b", "photo_a/b", "..", ".", "photo_ä", &long, &longer];
        let encoded: Vec<_> = names.iter().map(|name| encode(name)).collect();
        for (at, name) in encoded.iter().enumerate() {
            assert!(name.len() <= 255 && !name.contains(['.', '/']), "{name}");
            assert_eq!(encoded.iter().position(|other| other == name), Some(at), "{name}");
        }
    }

    #[test]
    fn a_name_is_readable_up_to_the_limit_and_has_a_hash_beyond() {
        let longest = "a".repeat(NAME_LEN_MAX);
        assert_eq!(encode(&longest), longest);
        for longer in [format!("{longest}a"), format!("{longest}b")] {
            let encoded = encode(&longer);
            assert!(encoded.starts_with(&longest), "{encoded}");
            assert_eq!(encoded.len(), NAME_LEN_MAX + 1 + 2 * HASH_BYTES, "{encoded}");
        }
    }

    #[test]
    fn capture_is_removed_first_and_maps_last() {
        let mut names = ["COUNTERS", "steer", "guard_egress", "connect4", "socket_events", "connect6-new"];
        names.sort_by_key(|name| rank(Path::new(name)));
        assert_eq!(names, ["connect6-new", "connect4", "socket_events", "guard_egress", "steer", "COUNTERS"]);
    }
}
