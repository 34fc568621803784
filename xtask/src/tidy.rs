//! What must never know what (ARCHITECTURE.md), held against the source as text.
//!
//! Package boundaries hold the coarse fences by themselves; this table holds the fine ones. A finding names the file, the
//! line and the reason. So does one of what is promised and no test cites: threats here, policy in [`cited`].

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::cited;

/// `needle` may stand only beneath the folders and files of `rooms`.
struct Fence {
    needle: &'static str,
    rooms: &'static [&'static str],
    why: &'static str,
}

const FENCES: &[Fence] = &[
    Fence {
        needle: "aya::",
        rooms: &["node-daemon/src/kernel/", "ebpf/abi/src/user.rs"],
        why: "aya's types stop at the kernel room",
    },
    Fence {
        needle: "rustls::",
        rooms: &[
            "node-daemon/src/certs/",
            "node-daemon/src/datapath/tunnel",
            "node-daemon/src/datapath/identify.rs",
            "node-daemon/src/datapath/originate.rs",
            "node-daemon/src/datapath/tests",
            "node-daemon/src/jwks/fetch.rs",
            "ca-server/",
            "tests/",
        ],
        why: "rustls' types stop at certs, the tunnel and the fetching of key sets",
    },
    Fence {
        needle: "ca_proto::",
        rooms: &["node-daemon/src/certs/client", "ca-server/", "tests/"],
        why: "the CA's wire stops at its client",
    },
    Fence {
        needle: "ca_server",
        rooms: &["ca-server/", "tests/"],
        why: "the signing code must not be linkable into a node image",
    },
    // The kernel's test disconnects a socket, which no safe call of a library does.
    Fence {
        needle: "unsafe {",
        rooms: &["ebpf/", "node-daemon/src/sys/", "node-daemon/tests/kernel.rs"],
        why: "unsafe has an address",
    },
];

/// Within `room`, none of `needles` may stand.
struct Ban {
    room: &'static str,
    needles: &'static [&'static str],
    why: &'static str,
}

const BANS: &[Ban] = &[
    Ban {
        room: "node-daemon/src/datapath/",
        needles: &["crate::control", "crate::kernel", "crate::admin", "crate::app", "crate::audit"],
        why: "the data path runs without a kernel, a cluster and a root",
    },
    Ban {
        room: "node-daemon/src/control/",
        needles: &["crate::datapath", "crate::kernel", "crate::certs", "crate::app"],
        why: "control publishes; who listens is not its business",
    },
    Ban {
        room: "node-daemon/src/telemetry/",
        needles: &[
            "crate::datapath",
            "crate::kernel",
            "crate::certs",
            "crate::control",
            "crate::enrol",
            "crate::audit",
            "crate::app",
        ],
        why: "telemetry is a leaf",
    },
    Ban {
        room: "node-daemon/core/src/",
        needles: &[
            "std::fs",
            "std::time::Instant",
            "Instant::now",
            "SystemTime::now",
            "std::thread",
            "tokio::",
        ],
        why: "a decision that can wait or fail cannot be tested exhaustively",
    },
    Ban {
        room: "node-daemon/src/policy_tools/",
        needles: &[
            "crate::admin",
            "crate::app",
            "crate::certs",
            "crate::datapath",
            "crate::enrol",
            "crate::kernel",
            "tokio::",
        ],
        why: "what needs no daemon must not come to need one",
    },
    Ban {
        room: "tests/oracle/src/",
        needles: &["node_core"],
        why: "a reading that shares code with the evaluator shares its errors",
    },
    Ban {
        room: "ca-server/spiffe/src/",
        needles: &["ca_proto", "tonic", "serde"],
        why: "whatever can be named in a certificate is decided in one place that knows nobody",
    },
];

/// Threats that this version answers; each is cited where a test proves it.
const THREATS_PROVEN: &[u32] = &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 18, 19, 20, 23, 24, 25, 27];

/// Checks the whole checkout.
///
/// # Errors
/// Names every finding, or the file that could not be read.
pub(crate) fn check(root: &Path) -> Result<()> {
    let findings = findings(root)?;
    if findings.is_empty() {
        return Ok(());
    }
    bail!("{} findings:\n{}", findings.len(), findings.join("\n"));
}

fn findings(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut cited = Vec::new();
    let files: Vec<String> =
        sources(root)?.iter().map(|file| file.to_string_lossy().replace('\\', "/")).collect();
    for name in &files {
        let text = fs::read_to_string(root.join(name)).with_context(|| format!("read {name}"))?;
        found.extend(walls_broken(name, &text));
        cited.extend(threats_cited(&text));
    }
    found.extend(cited::uncited(root, &files)?);
    for threat in THREATS_PROVEN {
        if !cited.contains(threat) {
            found.push(format!(
                "T-{threat}: no test cites this threat (`// T-{threat}` where a test proves it)"
            ));
        }
    }
    Ok(found)
}

fn walls_broken(file: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        for fence in FENCES {
            if code.contains(fence.needle) && !fence.rooms.iter().any(|room| file.starts_with(room)) {
                found.push(format!("{file}:{}: `{}`: {}", number + 1, fence.needle, fence.why));
            }
        }
        for ban in BANS.iter().filter(|ban| file.starts_with(ban.room)) {
            if let Some(needle) = ban.needles.iter().find(|needle| code.contains(**needle)) {
                found.push(format!("{file}:{}: `{needle}`: {}", number + 1, ban.why));
            }
        }
    }
    found
}

/// Threat numbers that comments of this text cite as `T-<number>`.
fn threats_cited(text: &str) -> Vec<u32> {
    let mut cited = Vec::new();
    for line in text.lines().filter(|line| line.contains("//")) {
        for piece in line.split("T-").skip(1) {
            let digits: String = piece.chars().take_while(char::is_ascii_digit).collect();
            cited.extend(digits.parse::<u32>());
        }
    }
    cited
}

/// Every Rust source of the product; this file names the needles itself.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for folder in ["ebpf", "node-daemon", "ca-server", "tests"] {
        walk(root, Path::new(folder), &mut files)?;
    }
    Ok(files)
}

fn walk(root: &Path, folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(root.join(folder)).with_context(|| format!("list {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            if entry.file_name() != "generated" && entry.file_name() != "target" {
                walk(root, &path, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_line(file: &str, line: &str, expected: usize) {
        assert_eq!(walls_broken(file, line).len(), expected, "{file}: {line}");
    }

    #[test]
    fn a_library_type_outside_its_room_is_found() {
        check_line("node-daemon/src/datapath/outbound.rs", "use aya::maps::HashMap;", 1);
        check_line("node-daemon/src/kernel/load.rs", "use aya::maps::HashMap;", 0);
        check_line("node-daemon/src/datapath/outbound.rs", "// as aya::maps does", 0);
    }

    #[test]
    fn the_data_path_may_not_name_the_kernel_room() {
        check_line("node-daemon/src/datapath/live.rs", "use crate::kernel::Exempt;", 1);
        check_line("node-daemon/src/enrol/mod.rs", "use crate::kernel::Exempt;", 0);
    }

    #[test]
    fn unsafe_elsewhere_is_found() {
        check_line("node-daemon/src/net/dial.rs", "let x = unsafe { y() };", 1);
    }

    #[test]
    fn citations_are_read_from_comments_only() {
        assert_eq!(threats_cited("// T-7, T-18: nested\nlet x = \"T-9\";"), [7, 18]);
    }

    #[test]
    fn the_checkout_is_tidy() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the checkout");
        check(root).expect("tidy");
    }
}
