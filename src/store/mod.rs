//! The node's memory: an append-only, hash-chained, fsynced log that is the truth, and a sled index of it
//! that can be thrown away. It knows the shape of records, not what a job or a payment is allowed to do.

pub mod record;
