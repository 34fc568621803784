//! Control groups: where the version 2 tree is mounted, and the number of a group.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// The first mount point of a cgroup2 tree that this process sees.
pub fn mount_point() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    parse_mount_point(&mounts).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "no cgroup2 file system is mounted; mount one, or name it as `cgroup`",
        )
    })
}

/// Number of the group whose folder this is, as the kernel reports it for sockets. Refuses what is no cgroup2 folder.
pub fn cgroup_id(folder: &Path) -> io::Result<u64> {
    let described = fs::metadata(folder)?;
    if !described.is_dir() || statfs(folder)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "this is not a folder of a cgroup2 file system",
        ));
    }
    // On 64-bit kernels the inode number of a kernfs node is its id (kernfs_ino, 5.5 and later).
    Ok(described.ino())
}

/// Folder of the group in which this process runs, beneath `mount`.
pub fn own_folder(mount: &Path) -> io::Result<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    let within = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    Ok(mount.join(within))
}

fn parse_mount_point(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (_, place, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(unescaped(place)))
    })
}

/// `/proc/self/mounts` writes space, tab, newline and backslash as three octal digits.
fn unescaped(field: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .into_iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_version_is_found_among_others() {
        let mounts = "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/un\\040ified cgroup2 rw 0 0\n";
        assert_eq!(parse_mount_point(mounts), Some(PathBuf::from("/sys/fs/cgroup/un ified")));
    }

    #[test]
    fn the_first_version_alone_is_none() {
        assert_eq!(parse_mount_point("cgroup /sys/fs/cgroup cgroup rw 0 0\nshort\n"), None);
    }

    #[test]
    fn a_folder_elsewhere_is_no_group() {
        let refused = cgroup_id(Path::new("/tmp")).expect_err("not cgroup2");
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        assert!(cgroup_id(Path::new("/nonexistent")).is_err());
    }
}
