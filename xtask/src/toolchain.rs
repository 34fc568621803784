//! The pinned tools: which versions, and how they come onto a machine that lacks them.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

/// Builds everything that runs in user space.
pub(crate) const STABLE: &str = "1.99.1";
/// Builds the kernel programs: its LLVM is the one that [`BPF_LINKER`] is written for.
pub(crate) const NIGHTLY: &str = "nightly-2026-07-20";
/// Links the kernel programs; uses the LLVM inside rustc, so no LLVM packages are needed.
pub(crate) const BPF_LINKER: &str = "0.10.3";

/// Sees to it that the stable toolchain with its usual components is there.
pub(crate) fn stable() -> anyhow::Result<()> {
    toolchain(STABLE, &["clippy", "rustfmt"])
}

/// Sees to it that the nightly toolchain with the sources of `core` is there.
pub(crate) fn nightly() -> anyhow::Result<()> {
    toolchain(NIGHTLY, &["rust-src"])
}

/// As [`nightly`], with the lints.
pub(crate) fn nightly_with_clippy() -> anyhow::Result<()> {
    toolchain(NIGHTLY, &["rust-src", "clippy"])
}

/// Sees to it that bpf-linker is there, and returns the folder that holds it.
pub(crate) fn bpf_linker() -> anyhow::Result<PathBuf> {
    tool("bpf-linker", BPF_LINKER, NIGHTLY)
}

/// Sees to it that a tool is there in exactly this version, built by this toolchain, and returns the folder that holds it.
pub(crate) fn tool(name: &str, version: &str, toolchain: &str) -> anyhow::Result<PathBuf> {
    let root = cache()?.join("tools");
    let folder = root.join("bin");
    if version_of(&folder.join(name)).as_deref() == Some(version) {
        return Ok(folder);
    }
    say(&format!("installing {name} {version} into {} (minutes)", root.display()));
    run(cargo(toolchain)
        .args(["install", name, "--locked", "--force", "--version", version, "--root"])
        .arg(&root))
    .with_context(|| format!("{name} {version} could not be installed into {}", root.display()))?;
    Ok(folder)
}

/// `cargo` of a pinned toolchain, free of what the calling cargo left in the environment.
pub(crate) fn cargo(version: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", version, "cargo"]);
    for name in ["CARGO", "RUSTC", "RUSTDOC", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(name);
    }
    command
}

/// Runs a command to its end; its output is the user's to see.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command
        .status()
        .with_context(|| format!("{} could not be started", command.get_program().to_string_lossy()))?;
    if !status.success() {
        bail!("`{}` ended with {status}", shown(command));
    }
    Ok(())
}

/// One line about what happens next, on standard error: standard output belongs to results.
pub(crate) fn say(what: &str) {
    eprintln!("xtask: {what}");
}

/// The value of PATH with a folder in front.
pub(crate) fn path_with(folder: &Path) -> anyhow::Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(folder.to_owned()).chain(env::split_paths(&path));
    env::join_paths(folders).context("a folder in PATH has a colon in its name")
}

fn toolchain(version: &str, components: &[&str]) -> anyhow::Result<()> {
    if components.iter().all(|component| has(version, component)) {
        return Ok(());
    }
    say(&format!("installing Rust {version} with {}", components.join(", ")));
    let mut install = Command::new("rustup");
    install.args(["toolchain", "install", version, "--profile", "minimal", "--no-self-update"]);
    for component in components {
        install.args(["--component", component]);
    }
    run(&mut install).with_context(|| {
        format!("Rust {version} is needed; install rustup, which fetches it, or the toolchain itself")
    })
}

/// Whether a toolchain with a component is installed; asks the file system of rustup, which never installs by itself.
fn has(version: &str, component: &str) -> bool {
    let sysroot = Command::new("rustup").args(["run", version, "rustc", "--print", "sysroot"]).output();
    let Ok(output) = sysroot else { return false };
    if !output.status.success() {
        return false;
    }
    let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let evidence = match component {
        "rust-src" => "lib/rustlib/src/rust/library/core/Cargo.toml",
        "clippy" => "bin/cargo-clippy",
        "rustfmt" => "bin/rustfmt",
        _ => "bin/cargo",
    };
    sysroot.join(evidence).exists() && sysroot.join("bin/cargo").exists()
}

/// The version that a tool prints of itself, e.g. `bpf-linker 0.10.3`.
fn version_of(tool: &Path) -> Option<String> {
    let output = Command::new(tool).arg("--version").output().ok()?;
    let line = String::from_utf8(output.stdout).ok()?;
    line.split_whitespace().nth(1).map(str::to_owned)
}

/// Where tools are kept between checkouts: `$XDG_CACHE_HOME/culvert`, else `~/.cache/culvert`.
pub(crate) fn cache() -> anyhow::Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    Ok(base.join("culvert"))
}

fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
