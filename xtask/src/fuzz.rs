//! `cargo xtask fuzz <target>`: libFuzzer on one of the decoders, from the kept seeds.

use std::{fs, path::Path};

use anyhow::{Context as _, bail};

use crate::{
    root,
    toolchain::{self, NIGHTLY, cargo, path_with, run, say},
};

/// Drives libFuzzer; installed into the tools' folder like the linker.
const CARGO_FUZZ: &str = "0.13.2";

/// Longest input, in bytes: what is wrong with long ones is wrong with short ones, and those are found.
const INPUT_BYTES_MAX: u32 = 4096;

/// Longest run of one input, in seconds; more is a hang.
const INPUT_SECONDS_MAX: u32 = 10;

/// Memory of the fuzzer, in MiB.
const MEMORY_MEBIBYTES_MAX: u32 = 2048;

/// Runs a target for some time.
///
/// # Errors
/// Where there is no such target, and where an input was found that its body does not hold for: the input lies beneath
/// `target/fuzz/found`, and belongs among the seeds once it is mended.
pub(crate) fn fuzz(target: &str, seconds: u64) -> anyhow::Result<()> {
    let (seeds, folder) = (root().join("tests/fuzz/seeds"), root().join("tests/fuzz/targets"));
    let known = targets(&folder.join("fuzz_targets"))?;
    if !known.iter().any(|name| name == target) {
        bail!("{target:?} is no target, expected one of {}", known.join(", "));
    }
    toolchain::nightly()?;
    let tools = toolchain::tool("cargo-fuzz", CARGO_FUZZ, NIGHTLY)?;
    let (kept, found) = (root().join("target/fuzz/corpus").join(target), root().join("target/fuzz/found"));
    for made in [&kept, &found] {
        fs::create_dir_all(made).with_context(|| format!("make {}", made.display()))?;
    }
    say(&format!("{target} for {seconds} s; what is found lies in {}", found.display()));
    // Without a sanitizer: nothing of this is unsafe, and it runs twice as fast.
    let mut command = cargo(NIGHTLY);
    command.current_dir(&folder).env("PATH", path_with(&tools)?).args(["fuzz", "run", "--sanitizer", "none"]);
    command.arg("--fuzz-dir").arg(&folder).arg(target).arg(&kept).arg(seeds.join(target)).arg("--");
    command.arg(format!("-artifact_prefix={}/{target}-", found.display()));
    command.args([
        format!("-max_total_time={seconds}"),
        format!("-max_len={INPUT_BYTES_MAX}"),
        format!("-timeout={INPUT_SECONDS_MAX}"),
        format!("-rss_limit_mb={MEMORY_MEBIBYTES_MAX}"),
        "-print_final_stats=1".to_owned(),
    ]);
    run(&mut command)
}

/// The names of the targets, in order.
fn targets(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_targets_are_found() {
        let names = targets(&root().join("tests/fuzz/targets/fuzz_targets")).expect("the folder is there");
        assert!(names.iter().any(|name| name == "http1"), "{names:?}");
    }
}
