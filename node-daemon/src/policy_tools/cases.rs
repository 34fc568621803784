//! `culvert policy test`: files of cases, one after the other.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use node_core::cases::{self, InvalidCases, Report};
use serde_json::Value;

use super::{library::Files, mint::ThrowAway};
use crate::control::file;

/// Largest file of cases, in bytes: some 50,000 cases. At the limit the file is not usable.
const CASES_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// What all files came to.
#[derive(Debug, Default)]
pub struct Tested {
    /// Of the files that could be used; a case of theirs that could not be is among them and does not hold.
    pub report: Report,
    pub unusable: Vec<UnusableCases>,
    /// Files that could not be used at all.
    pub files_unusable: usize,
}

/// A file of cases, or one case of it, that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UnusableCases {
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("{}:{} {invalid}", path.display(), Line(*line))]
    Field { path: PathBuf, line: Option<usize>, invalid: InvalidCases },
}

/// Runs the cases of all files whose name `is_wanted`, each file with the same keys and at the same time.
pub fn test(paths: &[PathBuf], is_wanted: &dyn Fn(&str) -> bool) -> Tested {
    let mint = ThrowAway::default();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    let mut tested = Tested::default();
    for path in paths {
        match test_file(path, &mint, now, is_wanted) {
            Ok((report, unusable)) => {
                tested.report.append(report);
                tested.unusable.extend(unusable);
            }
            Err(unusable) => {
                tested.unusable.push(unusable);
                tested.files_unusable += 1;
            }
        }
    }
    tested
}

fn test_file(
    path: &Path,
    mint: &ThrowAway,
    now: u64,
    is_wanted: &dyn Fn(&str) -> bool,
) -> Result<(Report, Vec<UnusableCases>), UnusableCases> {
    let unusable = |reason| UnusableCases::File { path: path.to_owned(), reason };
    let text = file::read(path, CASES_BYTES_MAX).map_err(unusable)?;
    let document = only_document(&text).map_err(unusable)?;
    let library = Files::beside(path);
    let field = |invalid: InvalidCases| UnusableCases::Field {
        path: path.to_owned(),
        line: invalid.line(&text),
        invalid,
    };
    let report = cases::run(&document, &library, mint, now, is_wanted).map_err(field)?;
    let unusable = report.unusable().cloned().map(field).collect();
    Ok((report, unusable))
}

fn only_document(text: &str) -> Result<Value, String> {
    let mut documents = file::parse(text)?;
    match (documents.pop(), documents.len()) {
        (Some(document), 0) => Ok(document),
        (None, _) => Err("it is empty, expected version, policySets and cases".to_owned()),
        (Some(_), others) => Err(format!(
            "it has {} YAML documents, expected one: the policies go into policySets",
            others + 1
        )),
    }
}

/// Behind the file's name, as compilers write it.
struct Line(Option<usize>);

impl fmt::Display for Line {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |line| write!(formatter, "{line}:"))
    }
}
