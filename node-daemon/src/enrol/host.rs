//! Services on the host itself: from a unit or a folder to the cgroup that tells their sockets from others'.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Component, Path, PathBuf},
};

use node_core::workload::Placement;

use crate::sys::cgroup::{cgroup_id, own_folder};

/// Levels of slices that are searched for a unit. systemd nests one level for each dash in a slice's name; user services are at
/// the fifth. At the limit the unit counts as not running.
const SLICE_DEPTH_MAX: usize = 6;

/// Cgroups beneath one workload that are known as its own when its standing connections are counted. At the limit the rest is
/// not counted.
const CGROUPS_MAX: usize = 1_024;

/// Why a host workload's cgroup cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error(
        "the unit `{unit}` is not running: no folder of its name in the slices under {mount}; start it, then it is enrolled"
    )]
    UnitMissing { unit: String, mount: PathBuf },
    #[error("`{unit}` is not the name of a unit; a name such as photo.service was expected")]
    UnitName { unit: String },
    #[error("{path}: there is no such cgroup; it is enrolled when it is there")]
    Missing { path: PathBuf },
    #[error("{path}: this is not a folder beneath the cgroup2 mount {mount}; name one that is")]
    Outside { path: PathBuf, mount: PathBuf },
    #[error(
        "{path}: this cgroup holds the daemon itself, whose connections would be taken for the workload's; give the workload one of its own"
    )]
    HoldsDaemon { path: PathBuf },
    #[error("{path}: {call} failed: {source}")]
    Kernel { path: PathBuf, call: &'static str, source: io::Error },
}

/// A host workload's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cgroup {
    pub(super) folder: PathBuf,
    pub(super) id: u64,
}

/// Finds the cgroup of a placement that is not a namespace.
pub(super) fn cgroup_of(placement: &Placement, mount: &Path) -> Result<Cgroup, HostError> {
    let own = own_folder(mount).map_err(|source| HostError::Kernel {
        path: "/proc/self/cgroup".into(),
        call: "reading",
        source,
    })?;
    let folder = match placement {
        Placement::SystemdUnit(unit) => unit_folder(unit, mount)?,
        Placement::Cgroup(path) | Placement::NetworkNamespace(path) => beneath(path, mount)?,
    };
    let id = cgroup_id(&folder).map_err(|source| {
        let path = folder.clone();
        if source.kind() == io::ErrorKind::NotFound {
            HostError::Missing { path }
        } else if source.kind() == io::ErrorKind::InvalidInput {
            HostError::Outside { path, mount: mount.to_owned() }
        } else {
            HostError::Kernel { path, call: "stat", source }
        }
    })?;
    if own.starts_with(&folder) {
        return Err(HostError::HoldsDaemon { path: folder });
    }
    Ok(Cgroup { folder, id })
}

/// True where one of the two lies within the other: a socket would belong to both.
pub(super) fn overlap(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

/// Ids of the cgroup and of those beneath it.
pub(super) fn ids_beneath(folder: &Path) -> BTreeSet<u64> {
    ids_within(folder, CGROUPS_MAX, cgroup_id)
}

fn ids_within(folder: &Path, cgroups_max: usize, id_of: impl Fn(&Path) -> io::Result<u64>) -> BTreeSet<u64> {
    let mut ids = BTreeSet::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        if ids.len() == cgroups_max {
            break;
        }
        // One that vanishes meanwhile has no sockets.
        let Ok(id) = id_of(&folder) else { continue };
        ids.insert(id);
        folders.extend(subfolders(&folder));
    }
    ids
}

fn beneath(path: &Path, mount: &Path) -> Result<PathBuf, HostError> {
    let outside = || HostError::Outside { path: path.to_owned(), mount: mount.to_owned() };
    if path.components().any(|part| matches!(part, Component::ParentDir | Component::CurDir)) {
        return Err(outside());
    }
    let folder = mount.join(path);
    if !folder.starts_with(mount) || folder == mount {
        return Err(outside());
    }
    Ok(folder)
}

fn unit_folder(unit: &str, mount: &Path) -> Result<PathBuf, HostError> {
    let well_formed = unit.contains('.') && !unit.starts_with('.') && !unit.contains('/');
    if !well_formed {
        return Err(HostError::UnitName { unit: unit.to_owned() });
    }
    let missing = || HostError::UnitMissing { unit: unit.to_owned(), mount: mount.to_owned() };
    let usual = mount.join("system.slice").join(unit);
    if usual.is_dir() {
        return Ok(usual);
    }
    let mut level = vec![mount.to_owned()];
    for _ in 0..SLICE_DEPTH_MAX {
        let mut next = Vec::new();
        for folder in &level {
            for child in subfolders(folder) {
                let name = child.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                if name == unit {
                    return Ok(child);
                }
                // Units nest in slices, and in the user's own manager (user@1000.service).
                if name.ends_with(".slice") || name.starts_with("user@") {
                    next.push(child);
                }
            }
        }
        level = next;
    }
    Err(missing())
}

fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str, folders: &[&str]) -> Self {
            let root = std::env::temp_dir().join(format!("culvert-host-{name}-{}", std::process::id()));
            for folder in folders {
                fs::create_dir_all(root.join(folder)).expect("the temporary folder is writable");
            }
            Self(root)
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_unit_is_found_in_whatever_slice_it_runs() {
        let tree = Tree::new(
            "slices",
            &[
                "system.slice/a.service",
                "system.slice/system-getty.slice/getty@tty1.service",
                "photo.slice/photo-web.slice/web.service",
                "user.slice/user-1000.slice/user@1000.service/app.slice/own.service",
            ],
        );
        for (unit, folder) in [
            ("a.service", "system.slice/a.service"),
            ("getty@tty1.service", "system.slice/system-getty.slice/getty@tty1.service"),
            ("web.service", "photo.slice/photo-web.slice/web.service"),
            ("own.service", "user.slice/user-1000.slice/user@1000.service/app.slice/own.service"),
        ] {
            assert_eq!(unit_folder(unit, &tree.0).expect(unit), tree.0.join(folder));
        }
    }

    #[test]
    fn a_unit_that_does_not_run_is_missing_and_a_path_is_no_unit() {
        let tree = Tree::new("missing", &["system.slice/a.service/b.service"]);
        let refused = unit_folder("b.service", &tree.0).expect_err("inside another unit, not in a slice");
        assert!(matches!(refused, HostError::UnitMissing { .. }), "{refused}");
        for unit in ["", "photo", "..", "../x.service", "a/b.service", ".service"] {
            let refused = unit_folder(unit, &tree.0).expect_err(unit);
            assert!(matches!(refused, HostError::UnitName { .. }), "{unit}: {refused}");
        }
    }

    #[test]
    fn a_unit_deeper_than_slices_nest_counts_as_not_running() {
        let nested = |levels: usize| format!("{}deep.service", "a.slice/".repeat(levels));
        let tree = Tree::new("depth", &[&nested(SLICE_DEPTH_MAX)]);
        let refused = unit_folder("deep.service", &tree.0).expect_err("one level too deep");
        assert!(matches!(refused, HostError::UnitMissing { .. }), "{refused}");
        fs::create_dir_all(tree.0.join(nested(SLICE_DEPTH_MAX - 1)))
            .expect("the temporary folder is writable");
        unit_folder("deep.service", &tree.0).expect("the deepest level that is searched");
    }

    #[test]
    fn no_more_cgroups_than_the_limit_are_a_workloads_own() {
        use std::os::unix::fs::MetadataExt;
        let tree = Tree::new("cgroups", &["a/b", "a/c", "d"]);
        let id_of = |folder: &Path| fs::metadata(folder).map(|described| described.ino());
        let all = ids_within(&tree.0, 5, id_of);
        assert_eq!(all.len(), 5, "itself and those beneath, at the limit");
        let some = ids_within(&tree.0, 4, id_of);
        assert_eq!(some.len(), 4, "the rest is not counted");
        assert!(some.is_subset(&all) && some.contains(&id_of(&tree.0).expect("there")));
    }

    #[test]
    fn a_folder_elsewhere_is_refused_and_so_is_the_whole_tree() {
        let mount = Path::new("/sys/fs/cgroup");
        for path in ["/etc", "../etc", "a/../../etc", "", "/sys/fs/cgroup", "/sys/fs/cgroup2/a"] {
            let refused = beneath(Path::new(path), mount).expect_err(path);
            assert!(matches!(refused, HostError::Outside { .. }), "{path}: {refused}");
        }
        assert_eq!(beneath(Path::new("a/b"), mount).expect("beneath"), mount.join("a/b"));
        assert_eq!(beneath(Path::new("/sys/fs/cgroup/a"), mount).expect("beneath"), mount.join("a"));
    }

    #[test]
    fn folders_overlap_where_one_holds_the_other() {
        assert!(overlap(Path::new("/c/a"), Path::new("/c/a/b")));
        assert!(overlap(Path::new("/c/a"), Path::new("/c/a")));
        assert!(!overlap(Path::new("/c/a"), Path::new("/c/ab")));
    }
}
