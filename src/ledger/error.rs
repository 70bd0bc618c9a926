//! Why a transfer is not made, and what is wrong with books that do not add up.

use crate::store;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("the transfer {id} is not well formed: {why}")]
    Malformed { id: String, why: &'static str },
    /// The same id with another body.
    #[error("the transfer {id} was made before, and it was another one")]
    Conflict { id: String },
    #[error("{available_msat} msat are there, {wanted_msat} msat are wanted")]
    Insufficient { available_msat: i128, wanted_msat: u64 },
    #[error(
        "{owed_msat} msat are owed, {wanted_msat} msat are to be written off; at most what is owed can be"
    )]
    NotOwed { owed_msat: i128, wanted_msat: i128 },
    #[error("the job {job} has no open hold: {}", if *.resolved { "it was resolved before" } else { "there never was one" })]
    NoHold { job: String, resolved: bool },
    /// Capture and rest must be the whole hold.
    #[error("the hold of {job} is {held_msat} msat, and the transfer resolves {resolved_msat}")]
    NotTheHold { job: String, held_msat: u64, resolved_msat: i128 },
    #[error(
        "the budget of {whose} for {days} days is {budget_msat} msat; with this it would be {would_msat}"
    )]
    OverBudget { whose: String, days: u64, budget_msat: u64, would_msat: u64 },
    /// A payment is booked when its lock goes, not beside it.
    #[error("the payment {payment_hash} is locked for a job that has not ended")]
    StillLocked { payment_hash: String },
    #[error("nothing is locked under {payment_hash} that this would give back")]
    NotTheLock { payment_hash: String },
    #[error("the account {account} would have {would_msat} msat, which it cannot have")]
    Overdrawn { account: String, would_msat: i128 },
    /// No balance of real money is so large; and what is written down must fit every reader.
    #[error("the account {account} would have {would_msat} msat, more than can be counted")]
    OutOfBounds { account: String, would_msat: i128 },
    /// A correction names what is not there, or does not undo it.
    #[error("{id} does not undo {of}")]
    NotACorrection { id: String, of: String },
}

/// The first entry of the log that breaks a rule of the books.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("entry {seq}: {source}")]
    Entry { seq: u64, source: Error },
    #[error("entry {seq}: the signed head of entry {of} is not the node's, or of another log")]
    Seal { seq: u64, of: u64 },
    #[error("entry {seq} is not the one that was noted: the log was changed, or is another one")]
    OtherHead { seq: u64 },
    #[error("the head was signed by {by}, which never opened this log")]
    OtherSigner { by: String },
    /// What is locked is always held by its job.
    #[error("the payment {payment_hash} is locked for the job {job}, which holds nothing")]
    Lock { payment_hash: String, job: String },
    #[error("the index says {indexed_msat} msat in {account}, the entries make {entries_msat}")]
    Index { account: String, indexed_msat: i128, entries_msat: i128 },
}

impl Broken {
    /// The entry that it is about, where there is one.
    pub fn entry(&self) -> Option<u64> {
        match self {
            Broken::Store(store::Error::Corrupt(damage)) => Some(damage.seq),
            Broken::Entry { seq, .. } | Broken::Seal { seq, .. } | Broken::OtherHead { seq } => Some(*seq),
            Broken::Store(_) | Broken::OtherSigner { .. } | Broken::Lock { .. } | Broken::Index { .. } => {
                None
            }
        }
    }
}
