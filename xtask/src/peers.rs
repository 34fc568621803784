//! Peers of layer 7 that others wrote: nginx and curl of the distribution, gRPC and WebSocket out of the Python package
//! index, in the versions of `tests/peers/requirements.txt`.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, ensure};

use crate::{
    packages::{self, CURL, NGINX, PIP, PYTHON},
    root,
    toolchain::{self, run, say},
};

/// What the Python programs of the tests import.
const IMPORTS: &str = "import grpc, grpc_health.v1.health_pb2_grpc, websockets.sync.server";

/// Sees to it that all of them are there. Python packages go into the tools' folder, where only the tests look.
///
/// # Errors
/// Names what is missing, or says what the package index did.
pub(crate) fn install() -> anyhow::Result<()> {
    let had_nginx = packages::is_there(NGINX.program());
    packages::require(&[NGINX, CURL, PYTHON])?;
    if !had_nginx && Path::new("/run/systemd/system").exists() {
        // The package starts a web server on port 80, which nobody asked for: the tests start their own.
        run(Command::new("systemctl").args(["disable", "--now", "--quiet", "nginx"]))?;
    }
    python_packages()
}

fn python_packages() -> anyhow::Result<()> {
    let requirements = root().join("tests/peers/requirements.txt");
    let wanted =
        fs::read(&requirements).with_context(|| format!("{} cannot be read", requirements.display()))?;
    // The tests look for it under the same name.
    let folder = toolchain::cache()?.join("tools/python-peers");
    let stamp = folder.join("requirements.txt");
    if fs::read(&stamp).is_ok_and(|there| there == wanted) && imports(&folder) {
        return Ok(());
    }
    packages::require(&[PIP])?;
    say(&format!("installing gRPC and WebSocket for Python into {}", folder.display()));
    // Beside the place and renamed at the end: an installation that was broken off leaves nothing that looks whole.
    let fresh = folder.with_extension(format!("new{}", std::process::id()));
    run(Command::new("pip3")
        .args(["--quiet", "--disable-pip-version-check", "install", "--no-deps", "--only-binary", ":all:"])
        .args(["--no-compile", "--root-user-action", "ignore", "--target"])
        .arg(&fresh)
        .arg("--requirement")
        .arg(&requirements))
    .context("gRPC and WebSocket for Python could not be installed: the package index must be reached")?;
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::rename(&fresh, &folder).with_context(|| format!("{} could not be put in place", folder.display()))?;
    ensure!(imports(&folder), "python3 cannot use what pip3 installed: the two must be of one version");
    fs::write(&stamp, wanted)?;
    Ok(())
}

fn imports(folder: &Path) -> bool {
    let tried = Command::new("python3").args(["-c", IMPORTS]).env("PYTHONPATH", folder).output();
    tried.is_ok_and(|tried| tried.status.success())
}
