//! Measured promises: each bench prints ratios taken in one interleaved run. It measures the rooms and changes none.

pub mod checkout;
pub mod intake;
