//! What an operator asks of policies without a daemon: do my cases hold?
//!
//! In: paths on the command line. Out: what to print and the exit status it stands for. Here are the files, the clock and
//! the throw-away keys that [`node_core::cases`] asks for; signatures are checked by [`crate::jwks`], as for real tokens.
//! Not here: any decision, and anything that needs a daemon or privileges.

mod cases;
mod library;
mod mint;

pub use self::cases::{Tested, UnusableCases, test};
