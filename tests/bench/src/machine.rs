//! On what machine, and with what settings, the figures were taken: they mean nothing without.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::report::Conditions;

/// The machine, as the first lines of a report say it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name and features that matter to encryption.
    pub cpu: String,
    /// Processors that this run may use.
    pub cores: usize,
    /// In bytes.
    pub memory_bytes: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// Of every socket of every way.
    pub congestion_control: String,
    /// Descriptors that a process may have.
    pub descriptors: u64,
    /// Worker threads of each proxy: daemon or sidecar.
    pub proxy_workers: usize,
    /// Bulk data goes this way.
    pub stream_direction: String,
}

/// Looks at the machine.
pub fn describe(conditions: &Conditions) -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
    Machine {
        cpu: processor(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: memory(&read("/proc/meminfo")),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        congestion_control: conditions.congestion_control.clone(),
        descriptors: limit.map_or(0, |(soft, _)| soft),
        proxy_workers: conditions.proxy_workers,
        stream_direction: conditions.stream_direction.clone(),
    }
}

/// The processor's name and features that matter to encryption.
pub fn processor() -> String {
    cpu(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn cpu(text: &str) -> String {
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    let name = field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let family = [("cpu family", "family"), ("model\t", "model")]
        .into_iter()
        .filter_map(|(key, word)| field(key).map(|value| format!("{word} {value}")));
    let flags = field("flags").unwrap_or_default();
    let notable = ["aes", "vaes", "vpclmulqdq", "avx512f"]
        .into_iter()
        .filter(|wanted| flags.split(' ').any(|flag| flag == *wanted))
        .map(ToOwned::to_owned);
    let more: Vec<String> = family.chain(notable).collect();
    format!("{name} ({})", more.join(", "))
}

fn memory(text: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or("0");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap_or_default();
    kib * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_named_with_what_matters_to_encryption() {
        let text = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t\t: fpu aes vaes\n";
        assert_eq!(cpu(text), "AMD EPYC (family 25, model 17, aes, vaes)");
        assert!(cpu("").ends_with(" ()"));
    }

    #[test]
    fn memory_is_in_bytes() {
        assert_eq!(memory("MemFree: 1 kB\nMemTotal:       24 kB\n"), 24 * 1024);
        assert_eq!(memory(""), 0);
    }
}
