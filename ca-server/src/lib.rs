//! The certificate authority of a mesh: who asks, may it speak for that name, then a certificate.
//!
//! A request takes the same steps as a connection does on a node:
//! `accept` (decode) -> `identify` (who asks) -> `authorise` (a `Grant` or a refusal) -> `issue` (a
//! certificate) -> `ledger` (what was issued to whom). Around them: `listen` (TLS), `keys` (root and issuing
//! key), `registry` (which identity runs on which node), `admin` (the operator's socket), `telemetry`.
//!
//! Not here: policy, tunnels, maps; nothing of this crate is linked into a node's daemon. Both meet in `spiffe-id` and
//! `ca-proto` only.
#![forbid(unsafe_code)]

mod accept;
mod identify;

mod authorise;
mod csr;
mod issue;

mod keys;
mod ledger;
mod registry;

mod admin;
mod listen;
mod telemetry;

mod app;
mod clock;
mod config;

pub use admin::{AdminError, ask_status, ask_token};
pub use app::{Handle, StartError, start};
pub use clock::Clock;
pub use config::{Config, ConfigError};
pub use keys::{RootShown, StateError, show_root};
