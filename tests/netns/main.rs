//! Scenarios with network namespaces as nodes and pods, and the real programs in the real kernel.
//!
//! Root is needed. Run them with `cargo xtask test`, which builds the programs first and uses one thread. Every case
//! that a threat or a rule of the policy asks for cites it.

mod audit;
mod capture;
mod cases;
mod chat;
mod client_side;
mod direct;
mod flight;
mod host;
mod hostile;
mod identity;
mod keys;
mod migration;
mod peers;
mod photo;
mod plain;
mod policies;
mod policy;
mod restart;
mod rpc;
mod shortcut;
mod web;
