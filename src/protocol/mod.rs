//! The NIP-90 wire as pure functions: bytes in, values out, values in, unsigned events out. No I/O, no
//! clock, no judgement of whether a job is wanted (that is `market`), and no signature checks on the way
//! in (that is `relay`, and `proof::check` for `verify`). A second wire profile is a new file here.
//!
//! The profile itself is written down in `docs/protocol.md`.

pub mod announcement;
pub mod cancel;
pub mod code;
pub mod draft;
pub mod encryption;
pub mod feedback;
pub mod order;
pub mod proof;
pub mod request;
pub mod result;
mod tags;

pub use code::Code;
pub use encryption::Scheme;
pub use feedback::{Feedback, Status};
pub use order::Order;
pub use proof::Proof;
pub use request::Request;
pub use result::Reply;

/// Kind of job feedback.
pub const FEEDBACK_KIND: u16 = 7000;
/// Kind of a customer's question about its own account: a request that is no job.
pub const ACCOUNT_KIND: u16 = 5939;
/// A result's kind is its request's kind plus this.
pub const RESULT_OFFSET: u16 = 1000;
/// All bitcoin there can be, in millisatoshi; larger numbers from outside are clamped to it.
pub const MAX_MSAT: u64 = 2_100_000_000_000_000_000;

/// Why an event of ours could not be made, or an answer to us could not be read. Requests have their own
/// [`request::Error`] and [`order::Error`], because each of those is told to a customer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The whole signed event, as JSON, would be longer than the cap.
    #[error("the {what} takes {bytes} bytes, the limit is {cap_bytes}")]
    TooLarge { what: &'static str, bytes: usize, cap_bytes: usize },
    #[error(transparent)]
    Encryption(#[from] encryption::Error),
    #[error("kind {kind} is not a {wanted}")]
    WrongKind { kind: u16, wanted: &'static str },
    #[error("the {what} names no request")]
    NoRequest { what: &'static str },
    #[error("the feedback has no status")]
    NoStatus,
    #[error("the feedback's status {0:?} is not one of NIP-90's")]
    UnknownStatus(String),
    #[error("an encrypted request needs the provider's key: name a provider")]
    NeedsProvider,
}

/// Lower-case hex of the sha256 of `bytes`.
pub fn sha256_hex(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    hex::encode(Sha256::digest(bytes))
}

/// Cuts text for display at `max_bytes` or just before, never inside a character.
pub fn clip(text: &str, max_bytes: usize) -> &str {
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}
