//! What an operator asks of policies without a daemon: do my cases hold, why does a connection or a
//! request fail, what would another folder have refused, and how are objects of 2018 written today?
//!
//! In: what stands on the command line. Out: what to print and the exit status that it stands for. Here are the files,
//! the clock and the throw-away keys that [`node_core`] asks for; signatures are checked by [`crate::jwks`], as on the
//! data path. Not here: any decision, and anything that needs a daemon or privileges.

mod cases;
mod convert;
mod library;
mod mint;
mod replay;
mod why;

pub use self::{
    cases::{Tested, UnusableCases, test},
    convert::{Converted, NoConversion, convert},
    replay::{
        CONNECTIONS_MAX, GROUPS_MAX, LINE_BYTES_MAX, LINES_NAMED_MAX, NoReplay, Replayed, SNAPSHOTS_MAX,
        replay,
    },
    why::{Answer, NoAnswer, Question, why},
};
