//! Measured promises: each bench prints ratios taken in one interleaved run. It measures the rooms and changes none.

pub mod checkout;
pub mod intake;
pub mod job;
pub mod ledger;
pub mod memory;
pub mod stats;
pub mod tti;
