//! Encoding and reading job feedback (kind 7000).

/// The five states of NIP-90 feedback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    PaymentRequired,
    Processing,
    Error,
    Success,
    Partial,
}

/// One feedback about one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feedback {
    pub status: Status,
    /// The third element of the `status` tag: for errors `code: what happened`.
    pub extra: Option<String>,
    /// Millisatoshi and, when there is an invoice, its bolt11.
    pub amount: Option<(u64, Option<String>)>,
    pub content: String,
}
