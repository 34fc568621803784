//! What the libraries lack of the kernel's interface: namespaces, socket options, sockets by tuple, cgroups, the process itself.
//!
//! The only room with `unsafe`: everything above it gets safe functions that say what they need (capability, kernel) and
//! what their errors mean. Nothing is decided here.
#![allow(unsafe_code, reason = "the one room that talks to the kernel where nix and socket2 do not")]

pub mod namespace;

pub mod socket;

pub mod diag;

pub mod conntrack;

pub mod watch;

pub mod cgroup;

pub mod bpf;

pub mod process;

pub use namespace::{Namespace, NamespaceError, in_namespace};
pub use socket::namespace_cookie;
pub use watch::Watch;
