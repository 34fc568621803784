//! A node's daemon: everything that reads, writes, listens or waits. Decisions are in [`node_core`].
//!
//! In reading order: what the operator says ([`config`]), documents to snapshots ([`control`]), who is who ([`certs`]), who is
//! under capture ([`enrol`], [`kernel`]), whose tokens count ([`jwks`]), one connection from end to end ([`datapath`]). Beneath them [`net`] and [`sys`]; beside
//! them [`telemetry`], [`audit`] and [`admin`]; apart from the daemon, [`policy_tools`]. [`place`] is the daemon's hold on its node, [`app`] wires all of it.
#![deny(unsafe_code)]

pub mod config;

pub mod control;

pub mod certs;

pub mod enrol;

pub mod kernel;

pub mod jwks;

pub mod datapath;

pub mod net;

pub mod sys;

pub mod telemetry;

pub mod audit;

pub mod admin;

pub mod policy_tools;

pub mod place;

pub mod app;
