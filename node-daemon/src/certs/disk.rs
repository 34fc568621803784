//! Secrets on disk: written whole or not at all, readable by this user only.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

/// Mode of every file of this room.
const MODE_SECRET: u32 = 0o600;

/// Mode of the folder.
const MODE_FOLDER: u32 = 0o700;

/// Longest file that is read, in bytes: a bundle of 32 roots takes 64 KiB. A longer one is none of ours.
const FILE_BYTES_MAX: u64 = 256 * 1024;

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
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = zeroize::Zeroizing::new(String::new());
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        let problem = format!("it has more than {FILE_BYTES_MAX} bytes, so it is not what this daemon wrote");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, problem));
    }
    Ok(Some(text))
}

/// Removes a file that may not be there.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_the_limit() {
        let path = std::env::temp_dir().join(format!("culvert-disk-{}.pem", std::process::id()));
        let of_length = |bytes: u64| {
            fs::write(&path, "x".repeat(usize::try_from(bytes).expect("small"))).expect("writable");
            read(&path).map(|text| text.map_or(0, |text| text.len() as u64))
        };
        let (within, above) = (of_length(FILE_BYTES_MAX), of_length(FILE_BYTES_MAX + 1));
        remove(&path).expect("removed");
        assert_eq!(within.expect("at the limit"), FILE_BYTES_MAX);
        assert_eq!(above.expect_err("above the limit").kind(), io::ErrorKind::FileTooLarge);
        assert!(read(&path).expect("no fault").is_none(), "one that is not there");
    }
}
