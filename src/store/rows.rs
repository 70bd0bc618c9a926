//! What the store answers with when it is read: rows made from records. Plain data.

use serde::{Deserialize, Serialize};

use super::record::{Answer, EventId, PublicKey, Record, Summary, Verdict};
use crate::price::Agreed;

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Owed, not begun.
    Accepted,
    /// An attempt has begun; after a restart it may be an attempt that died.
    Running,
    Done,
    Failed,
    Cancelled,
}

impl JobState {
    pub const ALL: [JobState; 5] =
        [JobState::Accepted, JobState::Running, JobState::Done, JobState::Failed, JobState::Cancelled];

    /// True while a terminal answer is owed.
    pub fn is_open(self) -> bool {
        matches!(self, JobState::Accepted | JobState::Running)
    }

    pub(super) fn of(verdict: &Verdict) -> Self {
        match verdict {
            Verdict::Done => JobState::Done,
            Verdict::Failed { .. } => JobState::Failed,
            Verdict::Cancelled => JobState::Cancelled,
        }
    }
}

/// A job as its records have made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JobRow {
    pub job: EventId,
    pub customer: PublicKey,
    pub kind: u16,
    pub skill: String,
    /// The request event as JSON, as received.
    pub request: String,
    /// The relay that it came from.
    pub relay: String,
    /// Unix milliseconds.
    pub accepted_ms: u64,
    /// Unix milliseconds.
    pub deadline_ms: u64,
    pub agreed: Agreed,
    pub state: JobState,
    /// The last attempt begun, 0 before the first.
    pub attempt: u32,
    pub commit: Option<String>,
    pub backend: Option<String>,
    /// Id of the signed terminal answer.
    pub answer: Option<EventId>,
    pub summary: Option<Summary>,
    pub verdict: Option<Verdict>,
    /// Unix milliseconds of the last record that changed this row.
    pub updated_ms: u64,
}

/// Which jobs to list, newest first.
#[derive(Debug, Clone)]
pub struct JobFilter {
    pub open_only: bool,
    pub state: Option<JobState>,
    /// At most this many, 1 ..= [`JobFilter::MOST`].
    pub limit: usize,
    /// Only jobs accepted before this Unix millisecond.
    pub before_ms: Option<u64>,
}

impl JobFilter {
    /// Largest page.
    pub const MOST: usize = 10_000;
}

impl Default for JobFilter {
    fn default() -> Self {
        JobFilter { open_only: false, state: None, limit: 100, before_ms: None }
    }
}

/// One record of a job's life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Seq of the batch that it was in.
    pub seq: u64,
    /// Unix milliseconds.
    pub at_ms: u64,
    pub record: Record,
}

/// A request that was turned down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    pub customer: PublicKey,
    pub code: String,
    /// True when the customer was told.
    pub answered: bool,
    /// Unix milliseconds.
    pub at_ms: u64,
}

/// A signed event of ours as it is queued, with its text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outgoing {
    pub event: EventId,
    pub job: Option<EventId>,
    /// The signed event.
    pub json: String,
    pub relays_left: Vec<String>,
    /// Unix milliseconds after which no relay is tried any more.
    pub give_up_ms: u64,
}

/// A signed event of ours that some relay has not answered yet. Its text is asked for when it is sent: there may be
/// many.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Owed {
    pub event: EventId,
    pub job: Option<EventId>,
    /// Relays without a last word.
    pub relays_left: Vec<String>,
    /// Unix milliseconds after which no relay is tried any more.
    pub give_up_ms: u64,
}

/// A relay's last word about an event of ours.
pub type Delivery = (String, Answer);

/// The end of the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Seq of the last batch, 0 in an empty log.
    pub seq: u64,
    /// Lower-case hex of the SHA-256 of its frame.
    pub hash: String,
}
