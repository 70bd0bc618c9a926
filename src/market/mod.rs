//! Who may order what: job types, prices, admission rules and typed refusals. Pure judgement over a decoded
//! request; it starts nothing and writes nothing.

pub mod catalog;
pub mod job_type;
pub mod judge;
pub mod refusal;

pub use catalog::Catalog;
pub use job_type::JobType;
pub use judge::{Admission, Rules, fits, is_shared, judge, judge_time};
pub use refusal::{Code, Refusal};

pub use crate::config::Terms;
pub use crate::price::{Agreed, Metered, Price, Way};
