//! The NIP-90 wire as pure functions: bytes in, values out, values in, unsigned events out. No I/O, no
//! clock, no judgement of whether a job is wanted (that is `market`). A second wire profile is a new file here.

pub mod announcement;
pub mod encryption;
pub mod feedback;
pub mod order;
pub mod proof;
pub mod request;
pub mod result;

pub use encryption::Scheme;
pub use feedback::{Feedback, Status};
pub use order::Order;
pub use proof::Proof;
pub use request::Request;
