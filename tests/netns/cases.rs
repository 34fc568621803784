//! Many cases in one world: each is a sentence, all run, and the failed ones are named at the end.
//!
//! `CULVERT_CASE=words` runs only the cases whose sentence contains the words.

use std::any::Any;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

/// The cases of one world.
#[derive(Debug)]
pub(crate) struct Cases {
    module: &'static str,
    only: Option<String>,
    failed: Vec<String>,
    ran: usize,
    started: Instant,
}

impl Cases {
    pub(crate) fn of(module: &'static str) -> Self {
        let only = std::env::var("CULVERT_CASE").ok();
        Self { module, only, failed: Vec::new(), ran: 0, started: Instant::now() }
    }

    /// Runs one case; its time is said past libtest, which would keep it back.
    pub(crate) fn case(&mut self, sentence: &str, body: impl FnOnce()) {
        if self.only.as_ref().is_some_and(|only| !sentence.contains(only.as_str())) {
            return;
        }
        let started = Instant::now();
        self.ran += 1;
        let (word, problem) = match catch_unwind(AssertUnwindSafe(body)) {
            Ok(()) => ("ok", None),
            Err(panic) => ("FAILED", Some(message(&*panic))),
        };
        say(&format!("  {}: {sentence} … {word} ({:.1} s)", self.module, started.elapsed().as_secs_f64()));
        if let Some(problem) = problem {
            self.failed.push(format!("{sentence}: {problem}"));
        }
    }

    /// Fails if a case did.
    pub(crate) fn end(self) {
        say(&format!(
            "  {}: {} cases in {:.1} s",
            self.module,
            self.ran,
            self.started.elapsed().as_secs_f64()
        ));
        assert!(
            self.failed.is_empty(),
            "{} of {} cases failed:\n{}",
            self.failed.len(),
            self.ran,
            self.failed.join("\n")
        );
    }
}

pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text =
        panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").chars().take(3000).collect()
}
