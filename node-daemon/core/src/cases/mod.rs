//! `culvert policy test`: cases that operators keep beside their policies, run through the evaluator that enforces.
//!
//! Takes a file of cases as one JSON value, a [`Library`] that reads policies and a [`Mint`] that makes tokens; gives a
//! [`Report`]. Nothing here decides about a request: a case becomes an inventory, the policies go through the decoder of
//! files and API server, and [`crate::policy`] answers.

mod authenticate;
mod authorize;
mod check;
mod client;
mod compare;
mod connect;
mod fields;
mod file;
mod report;
#[cfg(test)]
mod tests;
mod token;
mod validate;
mod world;

use serde_json::Value;

use self::{
    check::Check,
    file::{CaseFile, CheckKind, Policies, WrittenCase},
};
pub use self::{
    fields::InvalidCases,
    report::{Outcome, Report},
    token::Mint,
};

/// Reads what a file of cases refers to.
pub trait Library {
    /// The documents of a text.
    ///
    /// # Errors
    /// Why it is no YAML, with the line.
    fn parse(&self, text: &str) -> Result<Vec<Value>, String>;

    /// The documents of a file, or of all files of a folder, relative to the file of cases: each with its file's name.
    ///
    /// # Errors
    /// Why it cannot be read.
    fn load(&self, path: &str) -> Result<Vec<(String, Vec<Value>)>, String>;
}

/// Runs the cases whose name `is_wanted`. `now` is in seconds since 1970. A case that cannot be used is told in its
/// outcome; the others are run.
///
/// # Errors
/// Where the file cannot be used as it stands: nothing was run then.
pub fn run(
    file: &Value,
    library: &dyn Library,
    mint: &dyn Mint,
    now: u64,
    is_wanted: &dyn Fn(&str) -> bool,
) -> Result<Report, InvalidCases> {
    let file = CaseFile::read(file, library)?;
    let run = |written: &WrittenCase| {
        let case = written.read.as_ref().map_err(InvalidCases::clone)?;
        let policies = match (file.policies(case, library), case.check) {
            // What is no YAML is no object that anybody admits (policy A-3).
            (Err(unreadable), CheckKind::Validate) if unreadable.is_of_a_set() => {
                Policies::unparsed(&unreadable)
            }
            (policies, _) => policies?,
        };
        Check { file: &file, case, policies: &policies, mint, now }.run()
    };
    let wanted = file.cases.iter().filter(|written| is_wanted(&written.name));
    let cases = wanted
        .map(|written| run(written).unwrap_or_else(|invalid| Outcome::unusable(&written.name, invalid)));
    Ok(Report { cases: cases.collect() })
}
