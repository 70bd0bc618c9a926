//! Coinop, a NIP-90 provider node, as a library: the rooms of the house, each below naming what it does.
//!
//! A room imports only rooms below it: `backoff`, `canonical`, `clock`, `escape`, `net`, `price`, `protocol`, `store` and `wallet` are the ground; `ledger`,
//! `repo` and `sandbox` stand on them; then `agent` and `market`; then `job`; then `relay`, `node` and `cli`. The binary in `main.rs` only
//! parses arguments and hands over to `cli`.

pub mod agent;
mod announcer;
pub mod backoff;
pub mod bench;
mod canonical;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod customer;
pub mod demo;
pub mod desk;
pub mod escape;
pub mod job;
pub mod keys;
pub mod ledger;
pub mod market;
pub mod net;
pub mod node;
pub mod price;
pub mod protocol;
pub mod relay;
pub mod repo;
pub mod sandbox;
pub mod store;
pub mod units;
pub mod wallet;
