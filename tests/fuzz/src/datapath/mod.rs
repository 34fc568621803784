//! The place of the framing in its own package, whose names it uses.

pub(crate) mod requests;
