//! Habits of this repository: `cargo xtask <habit>`.
//!
//! Builds with a plain `cargo` of a fresh machine; the toolchains that the rest needs are installed and called by name.
#![forbid(unsafe_code)]

mod ebpf;
mod toolchain;

use clap::{Parser, Subcommand};

fn main() -> anyhow::Result<()> {
    match Arguments::parse().habit {
        Habit::BuildEbpf => ebpf::build().map(drop),
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
}
