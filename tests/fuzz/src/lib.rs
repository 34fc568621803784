//! What each fuzz target does with its bytes: the decoders that read what others wrote, and properties that hold for
//! whatever they read. A body panics where one does not.
//!
//! libFuzzer calls the bodies through `tests/fuzz/targets` (`cargo xtask fuzz <target>`), and `tests/seeds.rs` calls
//! them with the kept seeds, so that they never rot. Doors that are no package's own are opened here by reading the file
//! again: nothing becomes public for the sake of a fuzzer.
#![forbid(unsafe_code)]

mod access_line;
mod authority;
mod datapath;
mod documents;
mod http1;
mod messages;
mod path;
mod token;

/// Where the documentation of `access_line`'s line leads at home.
mod telemetry {}

#[path = "../../../ca-server/src/csr.rs"]
mod csr;

/// A target: its name and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 9] = [
    ("access_line", access_line::access_line),
    ("documents", documents::documents),
    ("cases", documents::cases),
    ("path", path::path),
    ("token", token::token),
    ("keyset", token::key_set),
    ("authority", authority::authority),
    ("messages", messages::messages),
    ("http1", http1::http1),
];

/// Runs the body of a target.
///
/// # Panics
/// Where there is no such target, and where a property does not hold.
pub fn run(name: &str, data: &[u8]) {
    let (_, body) = TARGETS.iter().find(|(own, _)| *own == name).expect("a target of TARGETS");
    body(data);
}
