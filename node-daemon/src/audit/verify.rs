//! A log on disk, judged without a daemon: `culvert audit verify`.

use std::{
    fmt,
    fs::File,
    io::{self, BufRead, BufReader, Read as _},
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use node_core::audit::{
    Digest, LINE_BYTES_MAX,
    verify::{Expected, Report, Testimony, Verifier, Witness},
};

use super::journal::{segment_of, segments};
use crate::certs::{RootsFault, SealWitness};

/// Largest file of roots, in bytes: some hundred.
const ROOTS_BYTES_MAX: u64 = 256 * 1024;

/// What is asked of a log.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// Roots that a signature must lead to, in PEM; `None`: only the chain is judged.
    pub roots: Option<PathBuf>,
    /// The node's name in its certificates; `None`: any node of the mesh.
    pub node: Option<String>,
    /// What was seen elsewhere.
    pub anchor: Option<node_core::audit::verify::Anchor>,
}

/// Why a log cannot be judged.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: no segment is in it (audit-<number>.jsonl)", .0.display())]
    NoSegment(PathBuf),
    #[error("{}: {source}", path.display())]
    Roots { path: PathBuf, source: RootsFault },
    #[error("{}: {source}", path.display())]
    NoRoots { path: PathBuf, source: io::Error },
}

/// How a log was found.
#[derive(Debug)]
pub struct Verdict {
    pub report: Report,
    /// Signatures were judged.
    pub is_signed: bool,
}

/// Judges the log in a folder, or one segment of it.
///
/// # Errors
/// [`Unusable`]
pub fn verify(log: &Path, question: &Question) -> Result<Verdict, Unusable> {
    let read = |source| Unusable::Read { path: log.to_owned(), source };
    let witness = question.roots.as_deref().map(roots).transpose()?;
    let alone = !log.metadata().map_err(read)?.is_dir();
    let files = if alone {
        let name = log.file_name().and_then(|name| name.to_str());
        vec![(name.and_then(segment_of), log.to_owned())]
    } else {
        let found = segments(log).map_err(read)?;
        found.into_iter().map(|(number, path)| (Some(number), path)).collect()
    };
    if files.is_empty() {
        return Err(Unusable::NoSegment(log.to_owned()));
    }
    let expected = Expected { node: question.node.clone(), anchor: question.anchor, alone };
    let witness = witness.map(ByCertificate);
    let mut verifier = Verifier::new(expected, witness.as_ref().map(|witness| witness as &dyn Witness));
    for (number, path) in files {
        verifier.begin(&path.display().to_string(), number);
        lines(&path, &mut verifier).map_err(|source| Unusable::Read { path, source })?;
    }
    Ok(Verdict { report: verifier.finish(), is_signed: witness.is_some() })
}

fn roots(path: &Path) -> Result<SealWitness, Unusable> {
    let mut pem = String::new();
    let read = File::open(path).and_then(|file| file.take(ROOTS_BYTES_MAX).read_to_string(&mut pem));
    read.map_err(|source| Unusable::NoRoots { path: path.to_owned(), source })?;
    SealWitness::of_pem(&pem).map_err(|source| Unusable::Roots { path: path.to_owned(), source })
}

/// Feeds a file to the verifier. Of a line that is too long the rest is not kept.
fn lines(path: &Path, verifier: &mut Verifier<'_>) -> io::Result<()> {
    let mut file = BufReader::with_capacity(LINE_BYTES_MAX, File::open(path)?);
    let mut line = Vec::new();
    loop {
        line.clear();
        let most = LINE_BYTES_MAX as u64 + 2;
        let mut read = file.by_ref().take(most).read_until(b'\n', &mut line)? as u64;
        let mut is_whole = line.pop_if(|last| *last == b'\n').is_some();
        if !is_whole && read == most {
            let rest = skip_line(&mut file)?;
            (read, is_whole) = (read + rest.0, rest.1);
        }
        match (read, is_whole) {
            (0, _) => return Ok(()),
            (_, true) => verifier.line(&line),
            (bytes, false) => {
                verifier.torn(bytes);
                return Ok(());
            }
        }
    }
}

/// Skips what is left of a line: its bytes, and whether it ended.
fn skip_line(file: &mut impl BufRead) -> io::Result<(u64, bool)> {
    let mut skipped = 0;
    loop {
        let buffer = file.fill_buf()?;
        if buffer.is_empty() {
            return Ok((skipped, false));
        }
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let bytes = end.map_or(buffer.len(), |end| end + 1);
        file.consume(bytes);
        skipped += bytes as u64;
        if end.is_some() {
            return Ok((skipped, true));
        }
    }
}

/// Judges a checkpoint by the certificates that stand in the log, which must lead to a root.
struct ByCertificate(SealWitness);

impl Witness for ByCertificate {
    fn check(&self, testimony: &Testimony<'_>) -> Result<String, String> {
        let Testimony { signer, certificates, at, statement, signature } = *testimony;
        let decode = |text: &str| STANDARD.decode(text).map_err(|error| format!("no base64: {error}"));
        let certificates = certificates.iter().map(|text| decode(text)).collect::<Result<Vec<_>, _>>()?;
        if certificates.first().is_none_or(|leaf| Digest::of(leaf) != *signer) {
            return Err("its certificate is another than the checkpoint names".to_owned());
        }
        let node = self.0.check(&certificates, at, statement, &decode(signature)?);
        node.map(|node| node.to_string()).map_err(|refused| refused.to_string())
    }
}

impl Verdict {
    pub fn holds(&self) -> bool {
        self.report.holds()
    }

    fn say_signed(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = &self.report;
        match report.last_checkpoint {
            _ if !self.is_signed => {
                writeln!(formatter, "signatures were not judged: who wrote this is not known")
            }
            None => Ok(()),
            Some((sequence, digest)) => writeln!(
                formatter,
                "signed up to record {sequence} ({digest}) by {} checkpoints; {} records after it are chained, and not signed yet",
                report.checkpoints, report.unsigned
            ),
        }
    }
}

/// For people: what it is, what is worth knowing, what is wrong, and a last line that says which.
impl fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = &self.report;
        let node = report.node.as_deref().unwrap_or("nobody");
        let Report { segments, first, last, decisions, lost, .. } = report;
        writeln!(
            formatter,
            "log of {node}: {segments} segments, records {first} to {last}, {decisions} decisions, {lost} lost"
        )?;
        self.say_signed(formatter)?;
        for note in &report.notes {
            writeln!(formatter, "note: {note}")?;
        }
        for finding in &report.findings {
            writeln!(formatter, "{finding}")?;
        }
        match report.findings.len() as u64 + report.more {
            0 => writeln!(formatter, "the log holds"),
            count => writeln!(formatter, "the log does not hold: {count} findings"),
        }
    }
}

/// Where a node keeps the roots of its mesh, beneath its state folder.
pub fn roots_of_node(state: &Path) -> PathBuf {
    state.join("identity").join("bundle.pem")
}
