//! Takes the kernel programs that `cargo xtask build-ebpf` built into the daemon. Without them an empty stub stands in
//! their place, so that everything compiles and is checked; such a daemon refuses to start.

use std::{env, fs, io, path::Path};

fn main() -> io::Result<()> {
    let package = env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?;
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    let object = Path::new(&package).join("../target/mesh-ebpf.o");
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = match fs::read(&object) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!("cargo::warning=target/mesh-ebpf.o is missing: `cargo xtask build-ebpf` builds it");
            Vec::new()
        }
        Err(error) => return Err(error),
    };
    fs::write(Path::new(&out).join("mesh-ebpf.o"), bytes)
}
