//! `cargo xtask test`: everything that proves the product, in the order in which a failure is cheapest.

use std::time::Instant;

use anyhow::Context as _;

use crate::{
    ebpf, packages,
    packages::{COMPILER, IP, NFT, NSENTER, OPENSSL, PYTHON},
    peers, root, tidy,
    toolchain::{self, STABLE, cargo, run, say},
};

/// Packages with tests that need no privilege.
const UNPRIVILEGED: [&str; 9] = [
    "ebpf-abi",
    "spiffe-id",
    "ca-proto",
    "ca-server",
    "node-core",
    "node-daemon",
    "policy-oracle",
    "fuzz-bodies",
    "xtask",
];

/// Builds all, runs the tests without privilege, then those in network namespaces.
///
/// # Errors
/// The first step that failed, by name.
pub(crate) fn test(filter: &[String]) -> anyhow::Result<()> {
    packages::require_root("`cargo xtask test`")?;
    step("packages and toolchains", || {
        packages::require(&[COMPILER, IP, NSENTER, NFT, OPENSSL, PYTHON])?;
        peers::install()?;
        toolchain::stable()
    })?;
    step("tidy", || tidy::check(&root()))?;
    step("kernel programs", || ebpf::build().map(drop))?;
    step("build", || build(&["--all-targets"]))?;
    if filter.is_empty() {
        step("tests without privilege", || {
            let mut command = cargo(STABLE);
            command.current_dir(root()).args(["test", "--quiet"]);
            for package in UNPRIVILEGED {
                command.args(["--package", package]);
            }
            run(&mut command)
        })?;
        step("kernel verdicts on the host", || {
            run(cargo(STABLE).current_dir(root()).args(["test", "--quiet", "--package", "ebpf", "--lib"]))
        })?;
    }
    step("tests in network namespaces", || {
        run(cargo(STABLE)
            .current_dir(root())
            .args(["test", "--package", "mesh-tests", "--package", "mesh-bench", "--", "--test-threads=1"])
            .args(filter))
    })
}

/// Builds the whole workspace but for the kernel programs.
pub(crate) fn build(extra: &[&str]) -> anyhow::Result<()> {
    run(cargo(STABLE).current_dir(root()).args(["build", "--workspace", "--exclude", "ebpf"]).args(extra))
}

/// Runs one step, and says how long it took.
pub(crate) fn step(name: &str, what: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    say(&format!("{name} …"));
    let began = Instant::now();
    what().with_context(|| format!("{name} failed"))?;
    say(&format!("{name}: {:.0} s", began.elapsed().as_secs_f64()));
    Ok(())
}
