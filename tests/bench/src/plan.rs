//! What is measured, and on which ways.

use std::fmt;

use anyhow::{Result, bail};

/// By which means a connection's bytes go from one pod to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// Without a mesh.
    Plain,
    /// Authorised by the kernel, no proxy.
    Direct,
    /// The same, and the host's stack is passed by.
    Redirect,
    /// One daemon, no TLS.
    Relay,
    /// Two daemons and mutual TLS between them.
    Between,
    /// Two Envoy sidecars and mutual TLS between them.
    Envoy,
}

/// Where the pods are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topology {
    /// Two pods of one node.
    SameNode,
    /// Two pods of two nodes.
    Between,
}

/// One way from a client to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Way {
    /// Where.
    pub topology: Topology,
    /// How.
    pub path: Path,
}

/// All ways, in the order of reports; of each topology the plain one comes first.
pub const WAYS: [Way; 8] = [
    Way { topology: Topology::SameNode, path: Path::Plain },
    Way { topology: Topology::SameNode, path: Path::Direct },
    Way { topology: Topology::SameNode, path: Path::Redirect },
    Way { topology: Topology::SameNode, path: Path::Relay },
    Way { topology: Topology::SameNode, path: Path::Envoy },
    Way { topology: Topology::Between, path: Path::Plain },
    Way { topology: Topology::Between, path: Path::Between },
    Way { topology: Topology::Between, path: Path::Envoy },
];

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    /// Bulk data on so many connections.
    Stream(u16),
    /// A message of so many bytes and its echo.
    RoundTrip(u16),
    /// Requests one after the other on each of so many connections.
    KeepAlive(u16),
    /// Connect, request, answer, close, so many at a time.
    Connect(u16),
    /// The proxies' memory with so many connections.
    Idle(u16),
}

/// All measures, in the order of reports.
pub const MEASURES: [Measure; 11] = [
    Measure::Stream(1),
    Measure::Stream(4),
    Measure::RoundTrip(64),
    Measure::RoundTrip(16 * 1024),
    Measure::KeepAlive(1),
    Measure::KeepAlive(32),
    Measure::Connect(1),
    Measure::Connect(16),
    Measure::Idle(0),
    Measure::Idle(1_000),
    Measure::Idle(5_000),
];

impl Path {
    /// As in reports.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Direct => "direct",
            Self::Redirect => "redirect",
            Self::Relay => "relay",
            Self::Between => "between",
            Self::Envoy => "envoy",
        }
    }
}

impl Topology {
    /// As in reports.
    pub const fn label(self) -> &'static str {
        match self {
            Self::SameNode => "same-node",
            Self::Between => "between",
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} ({})", self.path.label(), self.topology.label())
    }
}

impl Measure {
    /// As in reports.
    pub fn label(self) -> String {
        match self {
            Self::Stream(connections) => format!("stream{connections}"),
            Self::RoundTrip(bytes) if bytes >= 1024 => format!("rtt{}k", bytes / 1024),
            Self::RoundTrip(bytes) => format!("rtt{bytes}"),
            Self::KeepAlive(connections) => format!("keepalive{connections}"),
            Self::Connect(parallel) => format!("connect{parallel}"),
            Self::Idle(connections) => format!("idle{connections}"),
        }
    }

    /// Unit of the values.
    pub const fn unit(self) -> &'static str {
        match self {
            Self::Stream(_) => "Gbit/s",
            Self::RoundTrip(_) => "us",
            Self::KeepAlive(_) => "requests/s",
            Self::Connect(_) => "connections/s",
            Self::Idle(0) => "bytes",
            Self::Idle(_) => "bytes/connection",
        }
    }

    /// Unit of the proxies' CPU time; `None` where none is counted.
    pub const fn cpu_unit(self) -> Option<&'static str> {
        match self {
            Self::Stream(_) => Some("s/GiB"),
            Self::RoundTrip(_) => Some("us/round trip"),
            Self::KeepAlive(_) => Some("us/request"),
            Self::Connect(_) => Some("us/connection"),
            Self::Idle(_) => None,
        }
    }

    /// Whether a greater value is a better one.
    pub const fn more_is_better(self) -> bool {
        match self {
            Self::Stream(_) | Self::KeepAlive(_) | Self::Connect(_) => true,
            Self::RoundTrip(_) | Self::Idle(_) => false,
        }
    }
}

/// The rows that were asked for. Nothing said is everything.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    paths: Vec<Path>,
    topologies: Vec<Topology>,
    measures: Vec<Measure>,
}

impl Selection {
    /// Reads names of paths, measures and topologies; names of one kind are alternatives. `between` is the path.
    ///
    /// # Errors
    /// Names a word that is none of these.
    pub fn parse(words: &[String]) -> Result<Self> {
        let mut selection = Self::default();
        for word in
            words.iter().flat_map(|words| words.split(',')).map(str::trim).filter(|word| !word.is_empty())
        {
            let path = WAYS.iter().map(|way| way.path).find(|path| path.label() == word);
            let measures: Vec<Measure> = MEASURES.into_iter().filter(|one| one.is_called(word)).collect();
            if let Some(path) = path {
                selection.paths.push(path);
            } else if word == Topology::SameNode.label() {
                selection.topologies.push(Topology::SameNode);
            } else if measures.is_empty() {
                bail!("--only {word}: expected one of {}", Self::words().join(", "));
            }
            selection.measures.extend(measures);
        }
        Ok(selection)
    }

    fn words() -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        for way in WAYS {
            words.push(way.path.label().to_owned());
        }
        words.push(Topology::SameNode.label().to_owned());
        words.extend(MEASURES.into_iter().map(Measure::label));
        words.extend(["stream", "rtt", "keepalive", "connect", "idle"].map(str::to_owned));
        words.dedup();
        words
    }

    /// The ways to run: those asked for, and the plain one of their topology, which ratios are taken to.
    pub fn ways(&self) -> Vec<Way> {
        let asked: Vec<Way> = WAYS
            .into_iter()
            .filter(|way| self.paths.is_empty() || self.paths.contains(&way.path))
            .filter(|way| self.topologies.is_empty() || self.topologies.contains(&way.topology))
            .collect();
        let is_needed = |way: &Way| {
            asked.contains(way)
                || (way.path == Path::Plain && asked.iter().any(|one| one.topology == way.topology))
        };
        WAYS.into_iter().filter(is_needed).collect()
    }

    /// The measures to take.
    pub fn measures(&self) -> Vec<Measure> {
        let is_asked = |measure: &Measure| self.measures.is_empty() || self.measures.contains(measure);
        MEASURES.into_iter().filter(is_asked).collect()
    }
}

impl Measure {
    /// By its whole name, or by that of its kind.
    fn is_called(self, word: &str) -> bool {
        let label = self.label();
        label == word || label.trim_end_matches(|last: char| last.is_ascii_digit() || last == 'k') == word
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn selected(words: &str, ways: &[&str], measures: &[&str]) {
        let selection = Selection::parse(&[words.to_owned()]).expect("known words");
        let named: Vec<String> = selection.ways().iter().map(ToString::to_string).collect();
        assert_eq!(named, ways, "{words}");
        let named: Vec<String> = selection.measures().into_iter().map(Measure::label).collect();
        assert_eq!(named, measures, "{words}");
    }

    #[test]
    fn what_is_asked_for_brings_the_plain_way_of_its_topology_along() {
        selected("direct,rtt64", &["plain (same-node)", "direct (same-node)"], &["rtt64"]);
        selected("between,stream", &["plain (between)", "between (between)"], &["stream1", "stream4"]);
        selected("same-node, envoy ,idle1000", &["plain (same-node)", "envoy (same-node)"], &["idle1000"]);
        selected("plain,rtt", &["plain (same-node)", "plain (between)"], &["rtt64", "rtt16k"]);
    }

    #[test]
    fn nothing_said_is_everything() {
        let all = Selection::parse(&[]).expect("no word");
        assert_eq!((all.ways().len(), all.measures().len()), (WAYS.len(), MEASURES.len()));
    }

    #[test]
    fn unknown_words_are_refused_by_name() {
        for word in ["sidecar", "stream2", "rtt1", "idle5", "Plain", "*"] {
            let error = Selection::parse(&[format!("plain,{word}")]).expect_err(word).to_string();
            assert!(error.starts_with(&format!("--only {word}: expected one of plain")), "{error}");
        }
    }

    #[test]
    fn labels_are_those_of_the_report() {
        let labels: Vec<String> = MEASURES.into_iter().map(Measure::label).collect();
        assert_eq!(labels[..4], ["stream1", "stream4", "rtt64", "rtt16k"]);
        assert_eq!(labels[4..8], ["keepalive1", "keepalive32", "connect1", "connect16"]);
        assert_eq!(labels[8..], ["idle0", "idle1000", "idle5000"]);
    }
}
