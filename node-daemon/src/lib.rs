//! A node's daemon: everything that reads, writes, listens or waits. Decisions are in [`node_core`].

pub mod telemetry;

pub mod sys;

pub mod net;

pub mod kernel;

pub mod certs;

pub mod config;

pub mod control;

pub mod datapath;

pub mod admin;

pub mod enrol;

pub mod place;

pub mod app;
