//! The whole node under faults that come from outside: hostile events, repositories and jobs, relays that go
//! away, customers in a hurry, a host that fails. Each has a defined answer; docs/faults.md lists them.

#[expect(dead_code, reason = "each test program uses a part of it")]
#[path = "../support/mod.rs"]
mod support;

mod account;
mod cancels;
mod commands;
mod engine;
mod events;
mod limits;
mod lives;
mod money;
mod papers;
mod patches;
mod queue;
mod refusals;
mod repositories;
mod secrecy;
