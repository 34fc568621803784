//! Settings of a namespace without which answers do not find back to the daemon (capture.md 3.2 A).

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::sys::Namespace;

/// Sockets that an application accepts inherit the mark, so their answers take our table; resets of closed ports too.
const SETTINGS: [&str; 3] =
    ["net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect", "net/ipv6/fwmark_reflect"];

const WANTED: &str = "1";

/// A setting and the value that it had before us.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Former {
    pub(super) setting: String,
    pub(super) value: String,
}

/// The values as they stand. A setting that this kernel does not have (no IPv6) is left out.
pub(super) fn read(namespace: &Namespace) -> io::Result<Vec<Former>> {
    namespace.visit(|| {
        let mut values = Vec::new();
        for setting in SETTINGS {
            match fs::read_to_string(path(setting)) {
                Ok(value) => {
                    values.push(Former { setting: setting.to_owned(), value: value.trim().to_owned() });
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(named(setting, &error)),
            }
        }
        Ok(values)
    })?
}

/// Sets what is not as wanted, and returns how many that were.
pub(super) fn apply(namespace: &Namespace) -> io::Result<usize> {
    let values = read(namespace)?;
    let wrong: Vec<&Former> = values.iter().filter(|former| former.value != WANTED).collect();
    if wrong.is_empty() {
        return Ok(0);
    }
    namespace.visit(|| {
        for former in &wrong {
            fs::write(path(&former.setting), WANTED).map_err(|error| named(&former.setting, &error))?;
        }
        Ok(wrong.len())
    })?
}

/// Gives back the values of before. Only settings that this daemon changes are touched, whatever `former` says.
pub(super) fn restore(namespace: &Namespace, former: &[Former]) -> io::Result<()> {
    namespace.visit(|| {
        for former in former.iter().filter(|former| SETTINGS.contains(&former.setting.as_str())) {
            fs::write(path(&former.setting), &former.value)
                .map_err(|error| named(&former.setting, &error))?;
        }
        Ok(())
    })?
}

/// `/proc/sys/net` shows the namespace of the thread that reads it.
fn path(setting: &str) -> std::path::PathBuf {
    Path::new("/proc/sys").join(setting)
}

fn named(setting: &str, error: &io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("{}: {error}; /proc/sys has to be writable for the daemon", setting.replace('/', ".")),
    )
}
