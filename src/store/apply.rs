//! What each record does to the index. Pure with regard to everything but the shelf: the same records in the
//! same order make the same index, live or rebuilt. A record that contradicts an earlier one changes
//! nothing: the first acceptance and the first terminal answer of a job count.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Error;
use super::record::{EventId, PublicKey, Record, Summary, Verdict};
use super::rows::{JobState, Refusal};
use super::shelf::{Shelf, Tree, under};
use super::tail::Placed;

/// Changes whenever the same log would make another index; an older index is then rebuilt.
pub(super) const INDEX_VERSION: u32 = 1;

/// Place of one record in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    pub segment: u64,
    pub offset: u64,
    pub nth: u32,
}

/// [`super::JobRow`] without the request, which stays in the log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct StoredJob {
    pub customer: PublicKey,
    pub kind: u16,
    pub skill: String,
    pub relay: String,
    pub request: Place,
    pub accepted_ms: u64,
    pub accepted_seq: u64,
    pub deadline_ms: u64,
    pub state: JobState,
    pub attempt: u32,
    pub commit: Option<String>,
    pub backend: Option<String>,
    pub answer: Option<EventId>,
    pub summary: Option<Summary>,
    pub verdict: Option<Verdict>,
    pub updated_ms: u64,
}

/// [`super::Outgoing`] without the event, which stays in the log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct StoredQueued {
    pub job: Option<EventId>,
    pub place: Place,
    pub left: Vec<String>,
    pub give_up_ms: u64,
}

/// Takes a batch in, record by record.
pub(super) fn apply(shelf: &dyn Shelf, at: &Placed, records: &[Record]) -> Result<(), Error> {
    for (nth, record) in records.iter().enumerate() {
        let place =
            Place { segment: at.segment, offset: at.offset, nth: u32::try_from(nth).unwrap_or(u32::MAX) };
        Applier { shelf, at, place }.record(record)?;
    }
    Ok(())
}

struct Applier<'a> {
    shelf: &'a dyn Shelf,
    at: &'a Placed,
    place: Place,
}

impl Applier<'_> {
    fn record(&self, record: &Record) -> Result<(), Error> {
        match record {
            Record::Opened { .. } => Ok(()),
            Record::Accepted { job, customer, kind, skill, request: _, relay, deadline_ms } => {
                self.remember(job)?;
                if self.shelf.get(Tree::Jobs, job.as_bytes())?.is_some() {
                    return Ok(());
                }
                let row = StoredJob {
                    customer: customer.clone(),
                    kind: *kind,
                    skill: skill.clone(),
                    relay: relay.clone(),
                    request: self.place,
                    accepted_ms: self.at.at_ms,
                    accepted_seq: self.at.seq,
                    deadline_ms: *deadline_ms,
                    state: JobState::Accepted,
                    attempt: 0,
                    commit: None,
                    backend: None,
                    answer: None,
                    summary: None,
                    verdict: None,
                    updated_ms: self.at.at_ms,
                };
                self.put_job(job, None, &row)
            }
            Record::Started { job, attempt, backend } => {
                self.remember(job)?;
                self.change_job(job, |row| {
                    row.state = JobState::Running;
                    row.attempt = *attempt;
                    row.backend = Some(backend.clone());
                })
            }
            Record::Pinned { job, commit } => {
                self.remember(job)?;
                self.change_job(job, |row| row.commit = Some(commit.clone()))
            }
            Record::Closed { job, verdict, answer, summary } => {
                self.remember(job)?;
                self.change_job(job, |row| {
                    row.state = JobState::of(verdict);
                    row.verdict = Some(verdict.clone());
                    row.answer = Some(answer.clone());
                    row.summary = Some(summary.clone());
                })
            }
            Record::Refused { request, customer, code, answered } => {
                self.remember(request)?;
                let row = Refusal {
                    customer: customer.clone(),
                    code: code.clone(),
                    answered: *answered,
                    at_ms: self.at.at_ms,
                };
                put(self.shelf, Tree::Refused, request.as_bytes(), &row)
            }
            Record::Cancelled { request, by } => {
                self.remember(request)?;
                self.shelf.put(Tree::Cancelled, &pair(request, by), &[])
            }
            Record::Queued { event, job, json: _, relays, give_up_ms } => {
                if let Some(job) = job {
                    self.remember(job)?;
                }
                self.queue(event, job, relays, *give_up_ms)
            }
            Record::Delivered { event, relay, answer } => {
                put(self.shelf, Tree::Delivered, &pair(event, relay), answer)?;
                let Some(mut queued) = get::<StoredQueued>(self.shelf, Tree::Queued, event.as_bytes())?
                else {
                    return Ok(());
                };
                if let Some(job) = &queued.job {
                    self.remember(job)?;
                }
                queued.left.retain(|r| r != relay);
                self.put_queued(event, &queued)
            }
            Record::Cursor { relay, until } => {
                self.shelf.put(Tree::Cursors, relay.as_bytes(), &until.to_be_bytes())
            }
        }
    }

    /// Puts this record into the history of `job`.
    fn remember(&self, job: &str) -> Result<(), Error> {
        let mut key = pair(job, "");
        key.extend_from_slice(&self.at.seq.to_be_bytes());
        key.extend_from_slice(&self.place.nth.to_be_bytes());
        put(self.shelf, Tree::History, &key, &(self.place, self.at.at_ms))
    }

    /// Changes an open job; an unknown or closed one stays as it is.
    fn change_job(&self, job: &str, change: impl FnOnce(&mut StoredJob)) -> Result<(), Error> {
        let Some(mut row) = get::<StoredJob>(self.shelf, Tree::Jobs, job.as_bytes())? else { return Ok(()) };
        if !row.state.is_open() {
            return Ok(());
        }
        let before = row.state;
        change(&mut row);
        row.updated_ms = self.at.at_ms;
        self.put_job(job, Some(before), &row)
    }

    fn put_job(&self, job: &str, before: Option<JobState>, row: &StoredJob) -> Result<(), Error> {
        put(self.shelf, Tree::Jobs, job.as_bytes(), row)?;
        if before == Some(row.state) {
            return Ok(());
        }
        let key = |state| listed_key(state, row.accepted_ms, row.accepted_seq, row.request.nth);
        if let Some(before) = before {
            self.shelf.remove(Tree::Listed, &key(before))?;
        }
        self.shelf.put(Tree::Listed, &key(row.state), job.as_bytes())
    }

    /// Queued once more (for more relays), the first event stays: it is never signed again.
    fn queue(
        &self,
        event: &str,
        job: &Option<EventId>,
        relays: &[String],
        give_up_ms: u64,
    ) -> Result<(), Error> {
        let old = get::<StoredQueued>(self.shelf, Tree::Queued, event.as_bytes())?;
        let mut queued = old.unwrap_or_else(|| StoredQueued {
            job: job.clone(),
            place: self.place,
            left: Vec::new(),
            give_up_ms,
        });
        queued.give_up_ms = queued.give_up_ms.max(give_up_ms);
        for relay in relays {
            let answered = self.shelf.get(Tree::Delivered, &pair(event, relay))?.is_some();
            if !answered && !queued.left.contains(relay) {
                queued.left.push(relay.clone());
            }
        }
        self.put_queued(event, &queued)
    }

    fn put_queued(&self, event: &str, queued: &StoredQueued) -> Result<(), Error> {
        put(self.shelf, Tree::Queued, event.as_bytes(), queued)?;
        if queued.left.is_empty() {
            self.shelf.remove(Tree::Owed, event.as_bytes())
        } else {
            self.shelf.put(Tree::Owed, event.as_bytes(), &[])
        }
    }
}

/// Key of two strings. Ids and URLs hold no zero byte; where one does, two keys may meet but none is lost.
pub(super) fn pair(first: &str, second: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(first.len() + 1 + second.len());
    key.extend_from_slice(first.as_bytes());
    key.push(0);
    key.extend_from_slice(second.as_bytes());
    key
}

/// What stands after `first` in a key made by [`pair`].
pub(super) fn second(first: &str, key: &[u8]) -> String {
    String::from_utf8_lossy(key.get(first.len() + 1..).unwrap_or_default()).into_owned()
}

/// Keys of one state, oldest first.
pub(super) fn listed_key(state: JobState, accepted_ms: u64, seq: u64, nth: u32) -> Vec<u8> {
    let mut key = vec![state as u8];
    key.extend_from_slice(&accepted_ms.to_be_bytes());
    key.extend_from_slice(&seq.to_be_bytes());
    key.extend_from_slice(&nth.to_be_bytes());
    key
}

/// Places of a job's records, oldest first, each with its time.
pub(super) fn history(shelf: &dyn Shelf, job: &str) -> Result<Vec<(u64, u64, Place)>, Error> {
    let prefix = pair(job, "");
    let mut out = Vec::new();
    for (key, value) in under(shelf, Tree::History, &prefix)? {
        let seq = key.get(prefix.len()..).and_then(|k| k.first_chunk::<8>()).map(|s| u64::from_be_bytes(*s));
        let (place, at_ms): (Place, u64) = parse(&value)?;
        out.push((seq.unwrap_or_default(), at_ms, place));
    }
    Ok(out)
}

pub(super) fn get<T: DeserializeOwned>(
    shelf: &dyn Shelf,
    tree: Tree,
    key: &[u8],
) -> Result<Option<T>, Error> {
    shelf.get(tree, key)?.map(|v| parse(&v)).transpose()
}

pub(super) fn parse<T: DeserializeOwned>(value: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(value).map_err(|e| Error::Index { why: format!("a row does not read: {e}") })
}

fn put<T: Serialize>(shelf: &dyn Shelf, tree: Tree, key: &[u8], value: &T) -> Result<(), Error> {
    let value = serde_json::to_vec(value).map_err(|e| Error::Index { why: e.to_string() })?;
    shelf.put(tree, key, &value)
}
