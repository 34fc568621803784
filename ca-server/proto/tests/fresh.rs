//! The committed code of `src/generated` is what the `.proto` files say.
//!
//! `UPDATE_GENERATED=1 cargo test -p ca-proto --test fresh` writes it anew. protox compiles, no protoc is needed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const SOURCES: [&str; 3] = ["ca/v1/ca.proto", "istio/v1/auth/ca.proto", "google/rpc/error.proto"];

#[test]
fn the_committed_code_is_what_the_proto_files_say() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let committed = package.join("src/generated");
    let scratch = Scratch::new();

    generate(package, &scratch.0);
    if std::env::var_os("UPDATE_GENERATED").is_some() {
        for (name, text) in read_folder(&scratch.0) {
            fs::write(committed.join(name), text).expect("the folder of generated code is writable");
        }
    }

    let (fresh, committed) = (read_folder(&scratch.0), read_folder(&committed));
    assert_eq!(fresh.keys().collect::<Vec<_>>(), committed.keys().collect::<Vec<_>>());
    for (name, text) in fresh {
        assert!(committed[&name] == text, "{name} is stale: run this test with UPDATE_GENERATED=1");
    }
}

fn generate(package: &Path, out: &Path) {
    let mut compiler = protox::Compiler::new([package]).expect("the package folder is readable");
    compiler.include_source_info(true).include_imports(true);
    compiler.open_files(SOURCES).expect("the proto files are valid");
    tonic_prost_build::configure()
        .out_dir(out)
        .build_transport(false)
        .emit_rerun_if_changed(false)
        // Its token is a secret; `redact.rs` says what may be shown.
        .skip_debug(["culvert.ca.v1.JoinRequest"])
        .compile_fds(compiler.file_descriptor_set())
        .expect("the descriptors are valid");
}

fn read_folder(folder: &Path) -> BTreeMap<String, String> {
    fs::read_dir(folder)
        .expect("the folder is readable")
        .map(|entry| entry.expect("an entry").path())
        .map(|path| {
            let name = path.file_name().expect("a file").to_string_lossy().into_owned();
            (name, fs::read_to_string(&path).expect("text"))
        })
        .collect()
}

/// A folder of this process that is removed at the end, also when the test fails.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("culvert-ca-proto-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("the temporary folder is writable");
        Self(folder)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
