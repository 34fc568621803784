//! Habits of this repository: `cargo xtask <habit>`.
//!
//! Builds with a plain `cargo` of a fresh machine; the toolchains that the rest needs are installed and called by name.
#![forbid(unsafe_code)]

mod bench;
mod check;
mod cited;
mod demo;
mod ebpf;
mod envoy;
mod fuzz;
mod packages;
mod peers;
mod policy_items;
mod test;
mod tidy;
mod toolchain;

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};

fn main() -> anyhow::Result<()> {
    match Arguments::parse().habit {
        Habit::BuildEbpf => ebpf::build().map(drop),
        Habit::Check => check::check(),
        Habit::Test { filter } => test::test(&filter),
        Habit::Demo { keep } => demo::demo(keep),
        Habit::Fuzz { target, seconds } => fuzz::fuzz(&target, seconds),
        Habit::Bench(wanted) => bench::bench(&wanted),
        Habit::InstallEnvoy => envoy::installed().map(|program| println!("{}", program.display())),
    }
}

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Habits of this repository")]
struct Arguments {
    #[command(subcommand)]
    habit: Habit,
}

#[derive(Subcommand)]
enum Habit {
    /// Build the kernel programs into target/mesh-ebpf.o, installing what that needs
    BuildEbpf,
    /// Format, fences, lints, documentation, licences: what reviewers should not have to look for
    Check,
    /// Build all and run every test, those in network namespaces included (root)
    Test {
        /// Run only the namespace tests whose names contain one of these
        filter: Vec<String>,
    },
    /// Show the three-tier photo example as a mesh of two nodes on this machine (root)
    Demo {
        /// Leave it running and say what to try
        #[arg(long)]
        keep: bool,
    },
    /// Throw bytes at one of the decoders: a name in tests/fuzz/targets/fuzz_targets
    Fuzz {
        target: String,
        /// How long, in seconds
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Measure what the mesh costs, beside plain TCP and beside Envoy (root)
    Bench(bench::Wanted),
    /// Install the Envoy that benchmarks compare with into the tools' folder, and print where it is
    InstallEnvoy,
}

/// The checkout.
fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_owned()
}
