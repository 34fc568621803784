//! Builds the kernel programs into one object.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use crate::{
    root,
    toolchain::{self, NIGHTLY, cargo, run, say},
};

/// Where the daemon's build script looks for the object.
const OBJECT: &str = "target/mesh-ebpf.o";

/// Builds `target/mesh-ebpf.o` and returns its path. Installs the toolchain and the linker where they are missing.
pub(crate) fn build() -> anyhow::Result<PathBuf> {
    toolchain::nightly()?;
    let linker_folder = toolchain::bpf_linker()?;
    let root = root();
    let target = root.join("target/bpf");
    say("building the kernel programs");
    run(cargo(NIGHTLY)
        .current_dir(&root)
        .args(["build", "-Z", "build-std=core", "--target", "bpfel-unknown-none", "--release", "-p", "ebpf"])
        .args(["--bin", "mesh-ebpf", "--target-dir"])
        .arg(&target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags().join("\x1f"))
        .env("PATH", toolchain::path_with(&linker_folder)?))?;
    let object = root.join(OBJECT);
    replace(&target.join("bpfel-unknown-none/release/mesh-ebpf"), &object)?;
    say(&format!("built {}", object.display()));
    Ok(object)
}

/// Lints the kernel programs as they are built: for the kernel's target.
pub(crate) fn clippy() -> anyhow::Result<()> {
    toolchain::nightly_with_clippy()?;
    run(cargo(NIGHTLY)
        .current_dir(root())
        .args(["clippy", "-Z", "build-std=core", "--target", "bpfel-unknown-none", "--release", "-p", "ebpf"])
        .args(["--bin", "mesh-ebpf", "--target-dir", "target/bpf", "--", "--deny", "warnings"])
        .env("CARGO_ENCODED_RUSTFLAGS", flags().join("\x1f")))
}

/// The maps of type socket storage carry BTF, so debug information is kept and turned into BTF by the linker.
fn flags() -> [String; 5] {
    [
        "--cfg".to_owned(),
        format!("bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        // The linker tries several places for rustc's LLVM and mentions each that is empty.
        "-Alinker-messages".to_owned(),
    ]
}

/// Copies the object where it differs, so that a build without changes does not rebuild the daemon.
fn replace(built: &Path, object: &Path) -> anyhow::Result<()> {
    let bytes = fs::read(built).with_context(|| format!("{} is missing after the build", built.display()))?;
    if fs::read(object).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    let new = object.with_extension("o.new");
    fs::write(&new, &bytes).with_context(|| format!("{} could not be written", new.display()))?;
    fs::rename(&new, object).with_context(|| format!("{} could not be written", object.display()))
}
