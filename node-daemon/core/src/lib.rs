//! The decisions of a node, pure: documents in, a numbered immutable [`Snapshot`](snapshot::Snapshot) out, and answers
//! from it. Who is known, who may reach whom, where a connection goes, when a certificate is renewed, what the kernel
//! must be told.
//!
//! Read in this order:
//!
//! 1. [`workload`]: the values of the domain.
//! 2. [`decode`]: one document -> [`Object`](decode::Object), refusals by field.
//! 3. [`store`]: [`Update`](store::Update)s -> what is in force; a bad document changes nothing that worked.
//! 4. [`snapshot`]: the store's contents compiled: lookups, routes, secure naming.
//! 5. [`policy`]: [`Permit`](policy::Permit) or [`Denial`](policy::Denial).
//! 6. [`attest`]: facts of the kernel -> [`Attested`](attest::Attested).
//! 7. [`tunnel`]: the tunnel's header, the key of its pool.
//! 8. [`kernel_plan`]: from what the kernel knows to what it should know.
//! 9. [`pairs`]: what of it the kernel may decide by itself, between pods of one node.
//! 10. [`rotation`]: when to renew, to back off, to give up.
//! 11. [`cases`]: cases of operators, run through the evaluator that enforces.
//! 12. [`audit`]: the decision log's lines, and whether a log is as it was written.
//!
//! Not here: clocks, randomness, sockets, files, locks, Kubernetes. Times and seeds are arguments.
#![forbid(unsafe_code)]

pub mod attest;
pub mod audit;
pub mod cases;
pub mod decode;
pub mod kernel_plan;
pub mod pairs;
pub mod policy;
pub mod rotation;
mod seed;
pub mod snapshot;
pub mod store;
#[cfg(test)]
mod testing;
pub mod tunnel;
pub mod workload;
