//! Reading the store: every look-up there is, over whichever shelf the index stands on, with the large texts
//! fetched from the log. A batch is seen wholly or not at all. Nothing here changes anything but the index.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use super::Error;
use super::apply;
use super::index::Index;
use super::keys::{Bytes, Place, StoredEvent, StoredJob, key, listed, pair, short};
use super::log::Reader;
use super::record::Record;
use super::rows::{Delivery, Entry, JobFilter, JobRow, JobState, Owed, Refusal};
use super::shelf::{Memory, Pairs, Shelf, Tree, after_prefix, under};
use super::tail::Placed;

/// Where the rows come from.
pub(super) enum Source {
    Index(Index),
    Memory(Memory),
    Closed,
}

pub(super) struct View {
    source: RwLock<Source>,
    /// Held by the applier while batches are seen in part, by readers while they want them whole.
    whole: RwLock<()>,
    log: Reader,
}

/// The right to read whole batches; the applier waits until it is given back.
struct Reading<'a> {
    source: RwLockReadGuard<'a, Source>,
    _whole: RwLockReadGuard<'a, ()>,
}

/// What a look-up of one row may see.
#[derive(Clone, Copy)]
pub(super) enum Look {
    /// Batches wholly or not at all: it waits for the applier.
    Whole,
    /// The row as it is, while its batch may not be here as a whole: for who knows what is on its way.
    Now,
}

impl Source {
    fn shelf(&self) -> Result<&dyn Shelf, Error> {
        match self {
            Source::Index(index) => Ok(index.shelf()),
            Source::Memory(memory) => Ok(memory),
            Source::Closed => Err(Error::Closed),
        }
    }
}

impl Reading<'_> {
    fn shelf(&self) -> Result<&dyn Shelf, Error> {
        self.source.shelf()
    }
}

impl View {
    pub(super) fn new(source: Source, log: Reader) -> Self {
        View { source: RwLock::new(source), whole: RwLock::new(()), log }
    }

    fn source(&self) -> RwLockReadGuard<'_, Source> {
        self.source.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> Reading<'_> {
        // In the applier's order.
        let whole = self.whole.read().unwrap_or_else(PoisonError::into_inner);
        Reading { source: self.source(), _whole: whole }
    }

    /// Takes batches in, unseen until all of them are whole; `taken` counts them.
    pub(super) fn apply<'b>(
        &self,
        batches: impl Iterator<Item = (&'b Placed, &'b [Record])>,
        taken: &mut usize,
    ) -> Result<(), Error> {
        let _whole = self.whole.write().unwrap_or_else(PoisonError::into_inner);
        let source = self.source();
        for (placed, records) in batches {
            source.shelf()?.together(&mut |slots| apply::apply(slots, placed, records))?;
            *taken += 1;
        }
        Ok(())
    }

    /// Ends all reading and hands the index back, if there was one.
    pub(super) fn close(&self) -> Option<Index> {
        let mut source = self.source.write().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *source, Source::Closed) {
            Source::Index(index) => Some(index),
            Source::Memory(_) | Source::Closed => None,
        }
    }

    pub(super) fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        self.look(Look::Whole, tree, key)
    }

    /// One row.
    pub(super) fn look(&self, look: Look, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        match look {
            Look::Whole => self.read().shelf()?.get(tree, key),
            Look::Now => self.source().shelf()?.get(tree, key),
        }
    }

    /// All pairs of a tree.
    pub(super) fn all(&self, tree: Tree) -> Result<Pairs, Error> {
        under(self.read().shelf()?, tree, &[])
    }

    /// The last `limit` keys that begin with `prefix`, the last first.
    pub(super) fn newest_under(
        &self,
        tree: Tree,
        prefix: &[u8],
        limit: usize,
    ) -> Result<Vec<Vec<u8>>, Error> {
        let to = after_prefix(prefix).unwrap_or_else(|| vec![u8::MAX; 64]);
        let found = self.read().shelf()?.downwards(tree, prefix, &to, limit)?;
        Ok(found.into_iter().map(|(key, _)| key).collect())
    }

    /// The value of the last key.
    pub(super) fn last(&self, tree: Tree) -> Result<Option<Vec<u8>>, Error> {
        let found = self.read().shelf()?.downwards(tree, &[], &[u8::MAX; 64], 1)?;
        Ok(found.into_iter().next().map(|(_, value)| value))
    }

    pub(super) fn record(&self, place: &Place) -> Result<Entry, Error> {
        self.log.record(place)
    }

    /// The key that opened the log last.
    pub(super) fn opened_by(&self) -> Result<Option<String>, Error> {
        apply::opened_by(self.read().shelf()?)
    }

    pub(super) fn job(&self, job: &str) -> Result<Option<JobRow>, Error> {
        let stored = self.read().shelf()?.get(Tree::Jobs, &key(job))?;
        stored.map(|s| self.row(job.to_owned(), &StoredJob::read(&s)?)).transpose()
    }

    /// A row from the records that the index points at.
    fn row(&self, job: String, stored: &StoredJob) -> Result<JobRow, Error> {
        let Record::Accepted { customer, kind, skill, request, relay, deadline_ms, agreed, .. } =
            self.log.record(&stored.accepted)?.record
        else {
            return Err(strays("an acceptance", &stored.accepted));
        };
        let mut row = JobRow {
            job,
            customer,
            kind,
            skill,
            request,
            relay,
            accepted_ms: stored.accepted_ms,
            deadline_ms,
            agreed,
            state: stored.state,
            attempt: 0,
            commit: None,
            backend: None,
            answer: None,
            summary: None,
            verdict: None,
            updated_ms: stored.updated_ms,
        };
        if let Some(place) = &stored.started {
            let Record::Started { attempt, backend, .. } = self.log.record(place)?.record else {
                return Err(strays("an attempt", place));
            };
            row.attempt = attempt;
            row.backend = Some(backend);
        }
        if let Some(place) = &stored.pinned {
            let Record::Pinned { commit, .. } = self.log.record(place)?.record else {
                return Err(strays("a pin", place));
            };
            row.commit = Some(commit);
        }
        if let Some(place) = &stored.closed {
            let Record::Closed { verdict, answer, summary, .. } = self.log.record(place)?.record else {
                return Err(strays("a terminal answer", place));
            };
            row.verdict = Some(verdict);
            row.answer = Some(answer);
            row.summary = Some(summary);
        }
        Ok(row)
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
                let from = [state as u8];
                let to = match filter.before_ms {
                    Some(before) => listed(state, before, None),
                    None => vec![state as u8 + 1],
                };
                keys.extend(shelf.downwards(Tree::Listed, &from, &to, limit)?);
            }
            // Newest first over all states: what follows the state in the key is the time.
            keys.sort_by(|(a, _), (b, _)| b.get(1..).cmp(&a.get(1..)));
            keys.truncate(limit);
            for (_, job) in &keys {
                if let Some(row) = shelf.get(Tree::Jobs, job)? {
                    stored.push((Bytes(job).name()?, StoredJob::read(&row)?));
                }
            }
        }
        stored.into_iter().map(|(job, s)| self.row(job, &s)).collect()
    }

    pub(super) fn history(&self, job: &str) -> Result<Vec<Entry>, Error> {
        let mut places = Vec::new();
        {
            let reading = self.read();
            let shelf = reading.shelf()?;
            let prefix = short(job);
            for (key, _) in under(shelf, Tree::History, &prefix)? {
                places.push(Bytes(key.get(prefix.len()..).unwrap_or_default()).place()?);
            }
            if let Some(row) = shelf.get(Tree::Jobs, &key(job))? {
                places.extend(StoredJob::read(&row)?.history);
            }
        }
        places.sort();
        places.iter().map(|p| self.log.record(p)).collect()
    }

    pub(super) fn refusal(&self, request: &str) -> Result<Option<Refusal>, Error> {
        let Some(value) = self.read().shelf()?.get(Tree::Refused, &key(request))? else { return Ok(None) };
        let place = Bytes(&value).place()?;
        let entry = self.log.record(&place)?;
        match entry.record {
            Record::Refused { customer, code, answered, .. } => {
                Ok(Some(Refusal { customer, code, answered, at_ms: entry.at_ms }))
            }
            _ => Err(strays("a refusal", &place)),
        }
    }

    pub(super) fn cancelled(&self, request: &str) -> Result<Vec<String>, Error> {
        let prefix = key(request);
        let found = under(self.read().shelf()?, Tree::Cancelled, &prefix)?;
        found.iter().map(|(key, _)| Bytes(key.get(prefix.len()..).unwrap_or_default()).name()).collect()
    }

    pub(super) fn is_cancelled(&self, request: &str, by: &str) -> Result<bool, Error> {
        Ok(self.read().shelf()?.get(Tree::Cancelled, &pair(request, by))?.is_some())
    }

    pub(super) fn knows(&self, request: &str, customer: &str) -> Result<bool, Error> {
        let reading = self.read();
        let shelf = reading.shelf()?;
        Ok(shelf.get(Tree::Jobs, &key(request))?.is_some()
            || shelf.get(Tree::Quotes, &key(request))?.is_some()
            || shelf.get(Tree::Refused, &key(request))?.is_some()
            || shelf.get(Tree::Cancelled, &pair(request, customer))?.is_some())
    }

    pub(super) fn owed(&self) -> Result<Vec<Owed>, Error> {
        let mut owed = Vec::new();
        let reading = self.read();
        let shelf = reading.shelf()?;
        for (event, left) in under(shelf, Tree::Owed, &[])? {
            if let Some(row) = shelf.get(Tree::Events, &event)? {
                let StoredEvent { place, give_up_ms, job } = StoredEvent::read(&row)?;
                let relays_left = apply::relays(&left)?;
                owed.push((place, Owed { event: Bytes(&event).name()?, job, relays_left, give_up_ms }));
            }
        }
        // The order of the log is the order of signing.
        owed.sort_by_key(|(place, _)| *place);
        Ok(owed.into_iter().map(|(_, owed)| owed).collect())
    }

    fn event(&self, stored: &StoredEvent) -> Result<String, Error> {
        match self.log.record(&stored.place)?.record {
            Record::Queued { json, .. } => Ok(json),
            _ => Err(strays("a signed event", &stored.place)),
        }
    }

    pub(super) fn answer(&self, event: &str) -> Result<Option<String>, Error> {
        let stored = self.read().shelf()?.get(Tree::Events, &key(event))?;
        stored.map(|s| self.event(&StoredEvent::read(&s)?)).transpose()
    }

    pub(super) fn deliveries(&self, event: &str) -> Result<Vec<Delivery>, Error> {
        let prefix = key(event);
        let found = under(self.read().shelf()?, Tree::Delivered, &prefix)?;
        let mut deliveries = Vec::new();
        for (_, value) in found {
            let place = Bytes(&value).place()?;
            match self.log.record(&place)?.record {
                Record::Delivered { relay, answer, .. } => deliveries.push((relay, answer)),
                _ => return Err(strays("a relay's answer", &place)),
            }
        }
        Ok(deliveries)
    }

    pub(super) fn cursor(&self, relay: &str) -> Result<Option<u64>, Error> {
        let found = self.read().shelf()?.get(Tree::Cursors, &key(relay))?;
        found.map(|v| Bytes(&v).u64()).transpose()
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

fn strays(wanted: &str, place: &Place) -> Error {
    Error::Index { why: format!("{place:?} should be {wanted} and is not") }
}
