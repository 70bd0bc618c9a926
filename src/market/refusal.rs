//! A typed reason with its sentence: why a request is not taken, or why an accepted job has no result.

pub use crate::protocol::Code;

/// A code with its sentence for the person who reads it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {reason}")]
pub struct Refusal {
    pub code: Code,
    pub reason: String,
    /// What the job may cost at most, msat, when it is refused for want of money.
    pub quote_msat: Option<u64>,
}

impl Refusal {
    /// For want of money: the customer is told the price.
    pub fn quote(code: Code, msat: u64, reason: impl Into<String>) -> Refusal {
        Refusal { quote_msat: Some(msat), ..Refusal::new(code, reason) }
    }

    pub fn new(code: Code, reason: impl Into<String>) -> Refusal {
        Refusal { code, reason: reason.into(), quote_msat: None }
    }
}
