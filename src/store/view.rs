//! Reading the store: every look-up there is, over whichever shelf the index stands on, with the large texts
//! fetched from the log. A batch is seen wholly or not at all. Nothing here changes anything but the index.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use super::Error;
use super::apply::{self, Place, StoredJob, StoredQueued, get, listed_key, pair, second};
use super::index::Index;
use super::log::Reader;
use super::record::{Answer, Record};
use super::rows::{Delivery, Entry, JobFilter, JobRow, JobState, Outgoing, Refusal};
use super::shelf::{Memory, Shelf, Tree, under};
use super::tail::Placed;

/// Where the rows come from.
pub(super) enum Source {
    Index(Index),
    Memory(Memory),
    Closed,
}

pub(super) struct View {
    source: RwLock<Source>,
    log: Reader,
}

/// The right to read; the applier waits until it is given back.
struct Reading<'a>(RwLockReadGuard<'a, Source>);

impl Reading<'_> {
    fn shelf(&self) -> Result<&dyn Shelf, Error> {
        match &*self.0 {
            Source::Index(index) => Ok(index.shelf()),
            Source::Memory(memory) => Ok(memory),
            Source::Closed => Err(Error::Closed),
        }
    }
}

impl View {
    pub(super) fn new(source: Source, log: Reader) -> Self {
        View { source: RwLock::new(source), log }
    }

    fn read(&self) -> Reading<'_> {
        Reading(self.source.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes a batch in, unseen until it is whole.
    pub(super) fn apply(&self, placed: &Placed, records: &[Record]) -> Result<(), Error> {
        let source = self.source.write().unwrap_or_else(PoisonError::into_inner);
        match &*source {
            Source::Index(index) => apply::apply(index.shelf(), placed, records),
            Source::Memory(memory) => apply::apply(memory, placed, records),
            Source::Closed => Err(Error::Closed),
        }
    }

    /// Ends all reading and hands the index back, if there was one.
    pub(super) fn close(&self) -> Option<Index> {
        let mut source = self.source.write().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *source, Source::Closed) {
            Source::Index(index) => Some(index),
            Source::Memory(_) | Source::Closed => None,
        }
    }

    fn record(&self, place: &Place) -> Result<Record, Error> {
        let (_, records) = self.log.read(place.segment, place.offset)?;
        let found = records.into_iter().nth(place.nth as usize);
        found.ok_or_else(|| Error::Index { why: format!("no record {} at {}", place.nth, place.offset) })
    }

    pub(super) fn job(&self, job: &str) -> Result<Option<JobRow>, Error> {
        let stored = get::<StoredJob>(self.read().shelf()?, Tree::Jobs, job.as_bytes())?;
        stored.map(|s| self.row(job.to_owned(), s)).transpose()
    }

    fn row(&self, job: String, stored: StoredJob) -> Result<JobRow, Error> {
        let request = match self.record(&stored.request)? {
            Record::Accepted { request, .. } => request,
            _ => return Err(Error::Index { why: format!("job {job} does not point at its acceptance") }),
        };
        Ok(JobRow {
            job,
            customer: stored.customer,
            kind: stored.kind,
            skill: stored.skill,
            request,
            relay: stored.relay,
            accepted_ms: stored.accepted_ms,
            deadline_ms: stored.deadline_ms,
            state: stored.state,
            attempt: stored.attempt,
            commit: stored.commit,
            backend: stored.backend,
            answer: stored.answer,
            summary: stored.summary,
            verdict: stored.verdict,
            updated_ms: stored.updated_ms,
        })
    }

    pub(super) fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobRow>, Error> {
        self.listed(filter, filter.limit.clamp(1, JobFilter::MOST))
    }

    pub(super) fn open_jobs(&self) -> Result<Vec<JobRow>, Error> {
        self.listed(&JobFilter { open_only: true, ..JobFilter::default() }, usize::MAX)
    }

    fn listed(&self, filter: &JobFilter, limit: usize) -> Result<Vec<JobRow>, Error> {
        let mut keys = Vec::new();
        let mut stored = Vec::new();
        {
            let reading = self.read();
            let shelf = reading.shelf()?;
            let wanted = |s: &JobState| {
                (!filter.open_only || s.is_open()) && filter.state.is_none_or(|only| only == *s)
            };
            for state in JobState::ALL.into_iter().filter(wanted) {
                let from = listed_key(state, 0, 0, 0);
                let to = match filter.before_ms {
                    Some(before) => listed_key(state, before, 0, 0),
                    None => vec![state as u8 + 1],
                };
                keys.extend(shelf.downwards(Tree::Listed, &from, &to, limit)?);
            }
            // Newest first over all states: what follows the state in the key is the time.
            keys.sort_by(|(a, _), (b, _)| b.get(1..).cmp(&a.get(1..)));
            keys.truncate(limit);
            for (_, job) in &keys {
                if let Some(row) = get::<StoredJob>(shelf, Tree::Jobs, job)? {
                    stored.push((String::from_utf8_lossy(job).into_owned(), row));
                }
            }
        }
        stored.into_iter().map(|(job, s)| self.row(job, s)).collect()
    }

    pub(super) fn history(&self, job: &str) -> Result<Vec<Entry>, Error> {
        let places = apply::history(self.read().shelf()?, job)?;
        let entry = |(seq, at_ms, place)| Ok(Entry { seq, at_ms, record: self.record(&place)? });
        places.into_iter().map(entry).collect()
    }

    pub(super) fn refusal(&self, request: &str) -> Result<Option<Refusal>, Error> {
        get(self.read().shelf()?, Tree::Refused, request.as_bytes())
    }

    pub(super) fn cancelled(&self, request: &str) -> Result<Vec<String>, Error> {
        let found = under(self.read().shelf()?, Tree::Cancelled, &pair(request, ""))?;
        Ok(found.iter().map(|(key, _)| second(request, key)).collect())
    }

    pub(super) fn is_cancelled(&self, request: &str, by: &str) -> Result<bool, Error> {
        Ok(self.read().shelf()?.get(Tree::Cancelled, &pair(request, by))?.is_some())
    }

    pub(super) fn knows(&self, request: &str, customer: &str) -> Result<bool, Error> {
        let reading = self.read();
        let shelf = reading.shelf()?;
        Ok(shelf.get(Tree::Jobs, request.as_bytes())?.is_some()
            || shelf.get(Tree::Refused, request.as_bytes())?.is_some()
            || shelf.get(Tree::Cancelled, &pair(request, customer))?.is_some())
    }

    pub(super) fn outgoing(&self) -> Result<Vec<Outgoing>, Error> {
        let mut stored = Vec::new();
        {
            let reading = self.read();
            let shelf = reading.shelf()?;
            for (event, _) in under(shelf, Tree::Owed, &[])? {
                if let Some(queued) = get::<StoredQueued>(shelf, Tree::Queued, &event)? {
                    stored.push((String::from_utf8_lossy(&event).into_owned(), queued));
                }
            }
        }
        // The order of the log is the order of signing.
        stored.sort_by_key(|(_, q)| (q.place.segment, q.place.offset, q.place.nth));
        let outgoing = |(event, queued): (String, StoredQueued)| {
            let json = self.event(&event, &queued)?;
            let StoredQueued { job, left, give_up_ms, .. } = queued;
            Ok(Outgoing { event, job, json, relays_left: left, give_up_ms })
        };
        stored.into_iter().map(outgoing).collect()
    }

    fn event(&self, event: &str, queued: &StoredQueued) -> Result<String, Error> {
        match self.record(&queued.place)? {
            Record::Queued { json, .. } => Ok(json),
            _ => Err(Error::Index { why: format!("event {event} does not point at its record") }),
        }
    }

    pub(super) fn answer(&self, event: &str) -> Result<Option<String>, Error> {
        let queued = get::<StoredQueued>(self.read().shelf()?, Tree::Queued, event.as_bytes())?;
        queued.map(|q| self.event(event, &q)).transpose()
    }

    pub(super) fn deliveries(&self, event: &str) -> Result<Vec<Delivery>, Error> {
        let found = under(self.read().shelf()?, Tree::Delivered, &pair(event, ""))?;
        let delivery = |(key, value): (Vec<u8>, Vec<u8>)| -> Result<Delivery, Error> {
            Ok((second(event, &key), apply::parse::<Answer>(&value)?))
        };
        found.into_iter().map(delivery).collect()
    }

    pub(super) fn cursor(&self, relay: &str) -> Result<Option<u64>, Error> {
        let found = self.read().shelf()?.get(Tree::Cursors, relay.as_bytes())?;
        Ok(found.and_then(|v| v.first_chunk::<8>().map(|b| u64::from_be_bytes(*b))))
    }

    /// Everything in the index, for comparing two of them.
    pub(super) fn dump(&self) -> Result<Vec<String>, Error> {
        let reading = self.read();
        let shelf = reading.shelf()?;
        let mut all = Vec::new();
        for tree in Tree::ALL.into_iter().filter(|t| *t != Tree::Meta) {
            let line = |(key, value): &(Vec<u8>, Vec<u8>)| {
                format!("{tree:?} {} = {}", key.escape_ascii(), value.escape_ascii())
            };
            all.extend(under(shelf, tree, &[])?.iter().map(line));
        }
        Ok(all)
    }
}
