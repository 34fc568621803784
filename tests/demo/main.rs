//! The three-tier photo example as a mesh of two nodes on this machine: real kernel capture, real certificates, ordinary
//! Python services that know nothing of it, and policy files written as in 2018.
//!
//! Shows who reaches whom and by which proof, what is refused, and that nothing of it is readable between the nodes.

mod report;
mod stage;

use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal};

use crate::report::Report;
use crate::stage::Stage;

fn main() -> ExitCode {
    let keep = std::env::args().skip(1).any(|argument| argument == "--keep");
    // Blocked before any thread starts, so that the wait below is the only one that hears them.
    let endings = endings();
    let stage = Stage::set();
    let report = play(&stage);
    report.print();
    if keep {
        stage.say_what_to_try();
        let _ = endings.wait();
    }
    println!("cleaning up …");
    drop(stage);
    println!("{}", report.last_line());
    if report.is_as_expected() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Who asks whom, and what shall come of it.
const SCENES: [Scene; 7] = [
    Scene { from: "photo-frontend", to: "photo-backend", path: "/", expected: Expected::Answer },
    Scene { from: "photo-frontend", to: "photo-backend", path: "/deeper", expected: Expected::Answer },
    Scene { from: "photo-backend", to: "datastore", path: "/", expected: Expected::Answer },
    Scene { from: "photo-worker", to: "datastore", path: "/", expected: Expected::Answer },
    Scene {
        from: "photo-frontend",
        to: "datastore",
        path: "/",
        expected: Expected::Refusal("no_rule_allows"),
    },
    Scene {
        from: "datastore",
        to: "photo-backend",
        path: "/",
        expected: Expected::Refusal("no_rule_allows"),
    },
    Scene { from: "visitor", to: "datastore", path: "/", expected: Expected::Refusal("plaintext_refused") },
];

/// One request.
pub(crate) struct Scene {
    from: &'static str,
    to: &'static str,
    path: &'static str,
    expected: Expected,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    Answer,
    /// No answer, and the access log names this reason.
    Refusal(&'static str),
}

fn play(stage: &Stage) -> Report {
    let mut report = Report::default();
    let meshed = stage.capture();
    for scene in &SCENES {
        report.scene(stage.play(scene));
    }
    report.wire(&meshed.stop());
    let unmeshed = stage.capture();
    stage.ask_without_mesh();
    report.control(&unmeshed.stop());
    report
}

fn endings() -> SigSet {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().expect("signals can be blocked");
    signals
}
