//! `cargo xtask check`: what reviewers should not have to look for.

use std::process::Command;

use crate::{
    ebpf, packages,
    packages::COMPILER,
    root,
    test::step,
    tidy,
    toolchain::{self, STABLE, cargo, run},
};

/// Holds licences and advisories; installed into the tools' folder like the linker.
const CARGO_DENY: &str = "0.20.2";

/// Each of these is also linted alone: that finds a dependency used by luck.
const PACKAGES: [&str; 11] = [
    "ebpf-abi",
    "spiffe-id",
    "ca-proto",
    "ca-server",
    "node-core",
    "node-daemon",
    "policy-oracle",
    "fuzz-bodies",
    "mesh-tests",
    "mesh-bench",
    "xtask",
];

/// # Errors
/// The first step that found something.
pub(crate) fn check() -> anyhow::Result<()> {
    step("packages and toolchains", || {
        packages::require(&[COMPILER])?;
        toolchain::stable()
    })?;
    step("tidy", || tidy::check(&root()))?;
    step("format", || run(stable().args(["fmt", "--all", "--check"])))?;
    step("kernel programs", || ebpf::build().map(drop))?;
    step("clippy", || {
        run(stable().args([
            "clippy",
            "--workspace",
            "--exclude",
            "ebpf",
            "--all-targets",
            "--",
            "--deny",
            "warnings",
        ]))
    })?;
    step("clippy of the kernel programs", ebpf::clippy)?;
    for package in PACKAGES {
        step(&format!("{package} alone"), || {
            run(stable().args(["clippy", "--package", package, "--", "--deny", "warnings"]))
        })?;
    }
    step("documentation", || {
        run(stable()
            .args(["doc", "--workspace", "--exclude", "ebpf", "--no-deps", "--document-private-items"])
            // The door of a room names its private rooms; private items are documented too, so the links hold.
            .env("RUSTDOCFLAGS", "--deny warnings --allow rustdoc::private_intra_doc_links"))
    })?;
    step("licences and fences of dependencies", deny)
}

fn stable() -> Command {
    let mut command = cargo(STABLE);
    command.current_dir(root());
    command
}

/// Licences, sources and who may use what; advisories need their data base, which is asked for separately.
fn deny() -> anyhow::Result<()> {
    let folder = toolchain::tool("cargo-deny", CARGO_DENY, STABLE)?;
    run(Command::new(folder.join("cargo-deny"))
        .current_dir(root())
        .args(["check", "bans", "licenses", "sources"]))
}
