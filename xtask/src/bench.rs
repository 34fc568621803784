//! `cargo xtask bench`: what the mesh costs, beside plain TCP and beside Envoy.

use std::process::Command;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};

use crate::{
    ebpf, envoy, packages,
    packages::{COMPILER, IP, NFT, NSENTER},
    root,
    test::step,
    toolchain::{self, STABLE, cargo, run},
};

/// Programs that are measured or measure, as they are released.
const PACKAGES: [&str; 4] = ["node-daemon", "ca-server", "mesh-tests", "mesh-bench"];

/// What to measure; all of it takes some ten minutes on two cores after the build.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Wanted {
    #[command(subcommand)]
    alone: Option<Alone>,
    /// Only these paths, measures and topologies, e.g. `direct,rtt64`; plain comes along for the ratio
    #[arg(long)]
    only: Vec<String>,
    /// Rounds [default: 5]
    #[arg(long)]
    repeat: Option<u32>,
    /// Seconds of each run [default: 1]
    #[arg(long)]
    seconds: Option<u64>,
    /// Bulk data from the server to the client instead of from the client to the server
    #[arg(long)]
    down: bool,
    /// Congestion control of every socket [default: reno, which every kernel allows in namespaces]
    #[arg(long)]
    congestion: Option<String>,
    /// Let all processes run on all processors, instead of giving each node one
    #[arg(long)]
    shared_processors: bool,
    /// Worker threads of each daemon and each sidecar [default: one for each processor of a node]
    #[arg(long)]
    workers: Option<u16>,
}

/// What is measured without the rest.
#[derive(Subcommand)]
enum Alone {
    /// What 10,000 policies cost by themselves: compiled, one changed, and asked; leaves policy.json and policy.md
    Policy {
        /// Rounds [default: 5]
        #[arg(long)]
        repeat: Option<u32>,
    },
}

/// Builds the release, measures it, and leaves latest.json, latest.md and latest.svg in target/bench.
///
/// # Errors
/// A step that failed.
pub(crate) fn bench(wanted: &Wanted) -> anyhow::Result<()> {
    if let Some(Alone::Policy { repeat }) = &wanted.alone {
        return policy(*repeat);
    }
    packages::require_root("`cargo xtask bench`")?;
    step("packages and toolchains", || {
        packages::require(&[COMPILER, IP, NSENTER, NFT])?;
        toolchain::stable()
    })?;
    step("kernel programs", || ebpf::build().map(drop))?;
    step("release build", || build(&PACKAGES))?;
    let target = root().join("target");
    let mut bench = Command::new(target.join("release/mesh-bench"));
    bench.arg("run").arg("--out").arg(target.join("bench"));
    if needs_envoy(&wanted.only) {
        bench.arg("--envoy").arg(envoy::installed()?);
    }
    for words in &wanted.only {
        bench.args(["--only", words]);
    }
    let numbers = [
        ("--repeat", wanted.repeat.map(u64::from)),
        ("--seconds", wanted.seconds),
        ("--workers", wanted.workers.map(u64::from)),
    ];
    for (option, number) in numbers {
        if let Some(number) = number {
            bench.arg(option).arg(number.to_string());
        }
    }
    if let Some(congestion) = &wanted.congestion {
        bench.args(["--congestion", congestion]);
    }
    let flags = [("--down", wanted.down), ("--shared-processors", wanted.shared_processors)];
    bench.args(flags.into_iter().filter(|(_, is_set)| *is_set).map(|(flag, _)| flag));
    measure(&mut bench)
}

/// Needs neither root nor kernel programs: no connection is made.
fn policy(repeat: Option<u32>) -> anyhow::Result<()> {
    step("toolchain", toolchain::stable)?;
    step("release build", || build(&["mesh-bench"]))?;
    let target = root().join("target");
    let mut bench = Command::new(target.join("release/mesh-bench"));
    bench.arg("policy").arg("--out").arg(target.join("bench"));
    bench.args(repeat.iter().flat_map(|repeat| ["--repeat".to_owned(), repeat.to_string()]));
    measure(&mut bench)
}

fn build(packages: &[&str]) -> anyhow::Result<()> {
    let mut build = cargo(STABLE);
    build.current_dir(root()).args(["build", "--release", "--bins"]);
    run(build.args(packages.iter().flat_map(|package| ["--package", package])))
}

fn measure(bench: &mut Command) -> anyhow::Result<()> {
    let status = bench.status().context("mesh-bench could not be started")?;
    if !status.success() {
        bail!("the benchmark ended with {status}");
    }
    Ok(())
}

/// Without a word about paths, or with one about Envoy, it is measured.
fn needs_envoy(only: &[String]) -> bool {
    const OTHERS: [&str; 5] = ["plain", "direct", "redirect", "relay", "between"];
    let words: Vec<&str> = only.iter().flat_map(|words| words.split(',')).map(str::trim).collect();
    words.contains(&"envoy") || !words.iter().any(|word| OTHERS.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envoy_is_installed_only_for_what_is_compared_with_it() {
        for (only, needed) in [
            ("", true),
            ("rtt64", true),
            ("same-node", true),
            ("plain,envoy", true),
            ("plain", false),
            ("direct, relay,stream1", false),
        ] {
            assert_eq!(needs_envoy(&[only.to_owned()]), needed, "{only}");
        }
    }
}
