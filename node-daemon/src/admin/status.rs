//! The answer of `/status`, as JSON and as a table for people.

use std::fmt::{self, Write as _};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Connections in one answer: some 5 MB. The rest is only counted.
pub const CONNECTIONS_SHOWN_MAX: usize = 10_000;

/// Connections in the table for people. The rest is only counted.
pub(super) const CONNECTIONS_IN_TABLE_MAX: usize = 20;

/// Everything about a node that is no secret.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub node: String,
    pub version: String,
    /// `running` or `draining`.
    pub stage: String,
    pub ready: bool,
    /// What is missing until it is ready.
    pub missing: Vec<String>,
    pub snapshot: u64,
    pub trust_domain: String,
    /// The node's own certificate.
    pub node_certificate: Option<NodeCertificate>,
    pub workloads: Vec<Workload>,
    pub certificates: Vec<Certificate>,
    pub policies: Vec<Policy>,
    pub documents: Documents,
    /// At most [`CONNECTIONS_SHOWN_MAX`].
    pub connections: Vec<Connection>,
    pub connections_total: usize,
    pub direct: Direct,
    /// Those of tokens' issuers that are fetched.
    pub key_sets: Vec<KeySet>,
    /// Counters of the kernel's half.
    pub kernel: std::collections::BTreeMap<String, u64>,
}

/// Whether connections inside the node may go by the kernel alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Direct {
    pub on: bool,
    /// Why it is off.
    pub problem: Option<String>,
    /// Number of the snapshot whose pairs are in force.
    pub snapshot: u64,
    /// Number of the table in force.
    pub generation: u32,
    /// Entries of it.
    pub pairs: usize,
    /// Pods whose direct connections skip the host's network stack.
    pub shortcuts: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeCertificate {
    pub name: String,
    pub not_after: String,
}

/// A workload of this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// `namespace/name`
    pub name: String,
    pub identity: String,
    pub addresses: Vec<String>,
    pub enrolled: bool,
    /// Why it is not enrolled.
    pub reason: Option<String>,
    /// Of ports that are not declared.
    pub transport_mode: String,
    /// Those that are declared.
    pub ports: Vec<Port>,
    /// Ports that bypass the daemon.
    pub exempt_inbound_ports: Vec<u16>,
    /// `direct` or `proxied`: how it wants its connections inside the node.
    pub same_node: String,
    /// Open ones, both directions.
    pub connections: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Port {
    pub port: u16,
    /// `STRICT`, `PERMISSIVE` or `DISABLE`.
    pub transport_mode: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    pub identity: String,
    pub serial: Option<String>,
    pub not_after: Option<String>,
    pub renews_at: Option<String>,
    pub generation: Option<u64>,
    /// Certificates issued after the first.
    pub renewals: u64,
    /// Failed attempts since the last success.
    pub failures: u32,
    pub last_error: Option<String>,
}

/// A key set of tokens' issuers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeySet {
    /// Its address, or its issuer's.
    pub source: String,
    /// Keys that can be used; `None`: none was ever fetched, and no token is valid by it.
    pub keys: Option<usize>,
    /// Why the last fetch failed; keys that were there before go on.
    pub problem: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    pub kind: String,
    pub name: String,
    pub accepted: bool,
    pub problem: Option<String>,
    pub field: Option<String>,
    /// What it does at present.
    pub effect: String,
    pub file: String,
    /// Which document of the file, from 0.
    pub document: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Documents {
    pub folder: String,
    pub files: usize,
    pub problems: Vec<DocumentProblem>,
    /// Why everything is denied, if so (T-19).
    pub unreadable: Option<String>,
    pub folder_problem: Option<String>,
    /// Files that cannot be read and whose last good documents came from disk.
    pub from_last_good: Vec<String>,
    pub last_good_problem: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DocumentProblem {
    pub file: String,
    /// Which document of the file, from 0; absent for the whole file.
    pub document: Option<usize>,
    pub object: String,
    pub field: String,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    pub connection: u64,
    pub direction: String,
    pub path: String,
    pub source: End,
    pub destination: End,
    pub service: Option<String>,
    pub mutual_tls: bool,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// By which it was judged last.
    pub snapshot: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct End {
    pub address: Option<String>,
    pub workload: Option<String>,
    pub identity: Option<String>,
    pub node: Option<String>,
}

/// The answer of `/dump`: the status, the configuration, and the whole mesh as this node knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dump {
    pub status: Status,
    pub configuration: Value,
    pub mesh: Mesh,
    pub all_workloads: Vec<KnownWorkload>,
    pub services: Vec<Service>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mesh {
    pub trust_domain: String,
    pub trust_domain_aliases: Vec<String>,
    pub root_namespace: String,
    pub default_mode: String,
    pub same_node: String,
    pub barred_identities: Vec<String>,
    pub pod_ranges: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KnownWorkload {
    pub name: String,
    pub identity: String,
    pub node: String,
    pub addresses: Vec<String>,
    pub ports: Vec<u16>,
    pub enrolled: bool,
    /// Where it is found on its node.
    pub placement: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    pub name: String,
    pub addresses: Vec<String>,
    pub ports: Vec<u16>,
    pub selector: std::collections::BTreeMap<String, String>,
}

/// For people: workloads, certificates, policies, documents with problems, connections.
impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ready = if self.ready { "ready" } else { "not ready" };
        writeln!(
            formatter,
            "node {}  {ready}, {}, snapshot {}, version {}",
            self.node, self.stage, self.snapshot, self.version
        )?;
        for missing in &self.missing {
            writeln!(formatter, "  missing: {missing}")?;
        }
        match &self.node_certificate {
            Some(certificate) => {
                writeln!(formatter, "  {} until {}", certificate.name, certificate.not_after)?
            }
            None => writeln!(formatter, "  this node has not joined the CA yet")?,
        }
        match &self.direct.problem {
            None if self.direct.on => writeln!(formatter, "  direct path: on, {} pairs", self.direct.pairs)?,
            None => writeln!(formatter, "  direct path: not yet")?,
            Some(problem) => writeln!(formatter, "  direct path: off: {problem}")?,
        }
        write!(formatter, "\n{}", self.workload_table())?;
        write!(formatter, "\n{}", self.certificate_table())?;
        write!(formatter, "\n{}", self.policy_table())?;
        if !self.key_sets.is_empty() {
            write!(formatter, "\n{}", self.key_set_table())?;
        }
        write!(formatter, "{}", self.document_list())?;
        write!(formatter, "\n{}", self.connection_table())
    }
}

impl Status {
    fn workload_table(&self) -> Table {
        let mut table =
            Table::new(["WORKLOAD", "IDENTITY", "ADDRESSES", "STATE", "PORTS", "SAME NODE", "CONNECTIONS"]);
        for workload in &self.workloads {
            let state = match &workload.reason {
                _ if workload.enrolled => "enrolled".to_owned(),
                Some(reason) => format!("refused: {reason}"),
                None => "not enrolled yet".to_owned(),
            };
            let mut ports: Vec<_> =
                workload.ports.iter().map(|port| format!("{} {}", port.port, port.transport_mode)).collect();
            ports.push(format!("others {}", workload.transport_mode));
            ports.extend(workload.exempt_inbound_ports.iter().map(|port| format!("{port} EXEMPT")));
            table.row([
                workload.name.clone(),
                workload.identity.clone(),
                workload.addresses.join(", "),
                state,
                ports.join(", "),
                workload.same_node.clone(),
                workload.connections.to_string(),
            ]);
        }
        table
    }

    fn certificate_table(&self) -> Table {
        let mut table = Table::new(["CERTIFICATE", "SERIAL", "EXPIRES", "RENEWALS", "LAST ERROR"]);
        for certificate in &self.certificates {
            table.row([
                certificate.identity.clone(),
                shown(certificate.serial.as_deref()),
                shown(certificate.not_after.as_deref()),
                certificate.renewals.to_string(),
                shown(certificate.last_error.as_deref()),
            ]);
        }
        table
    }

    fn policy_table(&self) -> Table {
        let mut table = Table::new(["POLICY", "NAME", "STATE", "EFFECT", "PROBLEM"]);
        for policy in &self.policies {
            let problem = match (&policy.field, &policy.problem) {
                (Some(field), Some(problem)) if !problem.starts_with(field) => format!("{field}: {problem}"),
                (_, Some(problem)) => problem.clone(),
                (_, None) => "-".to_owned(),
            };
            table.row([
                policy.kind.clone(),
                policy.name.clone(),
                if policy.accepted { "accepted" } else { "refused" }.to_owned(),
                policy.effect.clone(),
                problem,
            ]);
        }
        table
    }

    fn key_set_table(&self) -> Table {
        let mut table = Table::new(["KEY SET", "KEYS", "PROBLEM"]);
        for set in &self.key_sets {
            let keys =
                set.keys.map_or_else(|| "none, tokens are refused".to_owned(), |keys| keys.to_string());
            table.row([set.source.clone(), keys, shown(set.problem.as_deref())]);
        }
        table
    }

    fn document_list(&self) -> String {
        let documents = &self.documents;
        let mut lines = Vec::new();
        lines.extend(documents.unreadable.iter().map(|problem| format!("EVERYTHING IS DENIED: {problem}")));
        lines.extend(
            documents.folder_problem.iter().map(|problem| format!("{}: {problem}", documents.folder)),
        );
        lines.extend(
            documents
                .from_last_good
                .iter()
                .map(|file| format!("{file}: its last good documents were taken from disk")),
        );
        lines.extend(documents.last_good_problem.clone());
        for problem in &documents.problems {
            let document =
                problem.document.map_or_else(String::new, |document| format!(" document {document}"));
            let parts = [&problem.object, &problem.field, &problem.reason];
            let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).cloned().collect();
            lines.push(format!("{}{document}: {}", problem.file, parts.join(": ")));
        }
        if lines.is_empty() {
            return format!("\nDOCUMENTS  {} files in {}, no problems\n", documents.files, documents.folder);
        }
        let head = format!("\nDOCUMENTS  {} files in {}, problems:\n", documents.files, documents.folder);
        lines.iter().fold(head, |text, line| text + "  " + line + "\n")
    }

    fn connection_table(&self) -> String {
        let mut table = Table::new(["CONNECTION", "DIRECTION", "PATH", "FROM", "TO", "TLS", "IN", "OUT"]);
        for connection in self.connections.iter().take(CONNECTIONS_IN_TABLE_MAX) {
            table.row([
                connection.connection.to_string(),
                connection.direction.clone(),
                connection.path.clone(),
                connection.source.shown(),
                connection.destination.shown(),
                if connection.mutual_tls { "mutual" } else { "none" }.to_owned(),
                connection.bytes_in.to_string(),
                connection.bytes_out.to_string(),
            ]);
        }
        let mut text = table.to_string();
        let more = self.connections_total - self.connections.len().min(CONNECTIONS_IN_TABLE_MAX);
        if more > 0 {
            // Writing to a string does not fail.
            let _ = writeln!(text, "... and {more} more");
        }
        text
    }
}

impl End {
    fn shown(&self) -> String {
        let address = shown(self.address.as_deref());
        match &self.workload {
            Some(workload) => format!("{workload} ({address})"),
            None => address,
        }
    }
}

fn shown(text: Option<&str>) -> String {
    text.unwrap_or("-").to_owned()
}

/// Columns as wide as their widest cell.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new<const COLUMNS: usize>(head: [&str; COLUMNS]) -> Self {
        Self { rows: vec![head.map(str::to_owned).to_vec()] }
    }

    fn row<const COLUMNS: usize>(&mut self, cells: [String; COLUMNS]) {
        // Texts from documents and peers do not get to move the cursor.
        let plain =
            |cell: String| cell.chars().map(|shown| if shown.is_control() { ' ' } else { shown }).collect();
        self.rows.push(cells.map(plain).to_vec());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<_> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                write!(line, "{cell:width$}  ")?;
            }
            writeln!(formatter, "{}", line.trim_end())?;
        }
        if self.rows.len() == 1 {
            writeln!(formatter, "  none")?;
        }
        Ok(())
    }
}
