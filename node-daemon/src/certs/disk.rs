//! Secrets on disk: written whole or not at all, readable by this user only.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

/// Mode of every file of this room.
const MODE_SECRET: u32 = 0o600;

/// Mode of the folder.
const MODE_FOLDER: u32 = 0o700;

/// Writes `contents` beside `path`, syncs, renames, and syncs the folder: after a crash the old or the new file is
/// there, whole.
pub(super) fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or_else(|| io::Error::other("the path has no folder"))?;
    fs::DirBuilder::new().recursive(true).mode(MODE_FOLDER).create(folder)?;
    let draft = path.with_extension("new");
    // A draft of a crashed predecessor may be there; never follow or reuse it.
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(MODE_SECRET).open(&draft)?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(&draft, path)?;
    File::open(folder)?.sync_all()
}

/// Reads a file that may not be there.
pub(super) fn read(path: &Path) -> io::Result<Option<zeroize::Zeroizing<String>>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(zeroize::Zeroizing::new(text))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a file that may not be there.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}
