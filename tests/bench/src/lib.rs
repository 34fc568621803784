//! What the mesh costs, beside plain TCP and beside a peer: `cargo xtask bench`.
//!
//! ```text
//! plan      which rows: paths, topologies, measures, and what was asked for
//!  stage    the worlds: nodes with a host stack as a network plugin has it, pods, daemons or sidecars
//!   load    the load: a client and a server, ordinary blocking sockets, in the pods
//!  run      interleaved rounds
//! report    medians, ratios, JSON, Markdown, SVG
//! policy    what policy costs by itself
//! ```
//!
//! Only the proxies' CPU time and memory are counted; the load's are not. A path that cannot be run is named with its
//! reason, and has no rows.

pub mod envoy;
pub mod load;
pub mod machine;
pub mod plan;
pub mod policy;
pub mod report;
pub mod run;
pub mod stage;
