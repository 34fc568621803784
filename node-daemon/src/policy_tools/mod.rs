//! What an operator asks of policies without a daemon: do my cases hold, and why does a connection or a request fail?
//!
//! In: what stands on the command line. Out: what to print and the exit status that it stands for. Here are the files,
//! the clock and the throw-away keys that [`node_core`] asks for; signatures are checked by [`crate::jwks`], as on the
//! data path. Not here: any decision, and anything that needs a daemon or privileges.

mod cases;
mod library;
mod mint;
mod why;

pub use self::{
    cases::{Tested, UnusableCases, test},
    why::{Answer, NoAnswer, Question, why},
};
