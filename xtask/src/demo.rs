//! `cargo xtask demo`: the three-tier photo example as a mesh of two nodes on this machine.

use std::process::Command;

use anyhow::bail;

use crate::{
    ebpf, packages,
    packages::{COMPILER, IP, NSENTER, PYTHON},
    root,
    test::{build, step},
    toolchain,
};

/// Builds what is needed and runs the demo.
///
/// # Errors
/// A step that failed, or a demo in which something was not as expected.
pub(crate) fn demo(keep: bool) -> anyhow::Result<()> {
    packages::require_root("`cargo xtask demo`")?;
    step("packages and toolchains", || {
        packages::require(&[COMPILER, IP, NSENTER, PYTHON])?;
        toolchain::stable()
    })?;
    step("kernel programs", || ebpf::build().map(drop))?;
    step("daemon, CA and demo", || build(&["--bins"]))?;
    let mut demo = Command::new(root().join("target/debug/mesh-demo"));
    if keep {
        demo.arg("--keep");
    }
    let status = demo.status()?;
    if !status.success() {
        bail!("the demo did not go as expected ({status})");
    }
    Ok(())
}
