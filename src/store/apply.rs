//! What each record does to the index. Pure with regard to everything but the shelf: the same records in the
//! same order make the same index, live or rebuilt. A record that contradicts an earlier one changes
//! nothing: the first acceptance and the first terminal answer of a job count.

use super::Error;
use super::books;
use super::keys::{HISTORY_IN_ROW, Place, StoredEvent, StoredJob, key, later, listed, pair};
use super::record::Record;
use super::rows::JobState;
use super::shelf::{Slots, Tree};
use super::tail::Placed;

/// Changes whenever the same log would make another index; an older index is then rebuilt.
pub(super) const INDEX_VERSION: u32 = 7;

/// In `meta`: the key that opened the log last.
const OPENED_BY: &[u8] = b"opened by";

/// The key that opened the log last, as the node told it.
pub(super) fn opened_by(slots: &dyn Slots) -> Result<Option<String>, Error> {
    let unreadable = |_| Error::Index { why: "the last holder's key does not read".into() };
    slots.get(Tree::Meta, OPENED_BY)?.map(|key| String::from_utf8(key).map_err(unreadable)).transpose()
}

/// Takes a batch in, record by record.
pub(super) fn apply(slots: &dyn Slots, at: &Placed, records: &[Record]) -> Result<(), Error> {
    let offset = u32::try_from(at.offset).map_err(|_| Error::Index { why: "a segment over 4 GiB".into() })?;
    for (nth, record) in records.iter().enumerate() {
        let nth =
            u16::try_from(nth).map_err(|_| Error::Index { why: "a batch of too many records".into() })?;
        let place = Place { segment: at.segment, offset, nth };
        Applier { slots, at_ms: at.at_ms, place }.record(record)?;
    }
    Ok(())
}

struct Applier<'a> {
    slots: &'a dyn Slots,
    at_ms: u64,
    place: Place,
}

impl Applier<'_> {
    fn record(&self, record: &Record) -> Result<(), Error> {
        match record {
            Record::Opened { node, .. } => self.slots.put(Tree::Meta, OPENED_BY, node.as_bytes()),
            Record::Accepted { job, customer, skill, agreed, .. } => {
                if agreed.of_quota && self.slots.get(Tree::Jobs, &key(job))?.is_none() {
                    books::free_job(self.slots, customer, skill, self.at_ms)?;
                }
                self.accept(job)
            }
            Record::Started { job, .. } => self.about(job, |row| {
                if row.state.is_open() {
                    row.state = JobState::Running;
                    row.started = Some(self.place);
                    row.updated_ms = self.at_ms;
                }
            }),
            Record::Pinned { job, .. } => self.about(job, |row| {
                if row.state.is_open() {
                    row.pinned = Some(self.place);
                    row.updated_ms = self.at_ms;
                }
            }),
            Record::Closed { job, verdict, .. } => self.about(job, |row| {
                if row.state.is_open() {
                    row.state = JobState::of(verdict);
                    row.closed = Some(self.place);
                    row.updated_ms = self.at_ms;
                }
            }),
            Record::Refused { request, .. } => {
                self.about(request, |_| {})?;
                self.point(Tree::Refused, &key(request))
            }
            Record::Cancelled { request, by } => {
                self.about(request, |_| {})?;
                self.point(Tree::Cancelled, &pair(request, by))
            }
            Record::Queued { event, job, relays, give_up_ms, .. } => {
                if let Some(job) = job {
                    self.about(job, |_| {})?;
                }
                self.queue(event, job.as_deref(), relays, *give_up_ms)
            }
            Record::Delivered { event, relay, .. } => {
                self.point(Tree::Delivered, &pair(event, relay))?;
                let event = key(event);
                let Some(stored) = self.slots.get(Tree::Events, &event)? else { return Ok(()) };
                if let Some(job) = StoredEvent::read(&stored)?.job {
                    self.about(&job, |_| {})?;
                }
                let mut left = self.owed(&event)?;
                left.retain(|r| r != relay);
                self.owe(&event, &left)
            }
            Record::Cursor { relay, until } => {
                self.slots.put(Tree::Cursors, &key(relay), &until.to_be_bytes())
            }
            Record::Transfer(transfer) => {
                if let Some(job) = books::job_of(transfer) {
                    self.about(job, |_| {})?;
                }
                books::take_in(self.slots, self.place, self.at_ms, transfer)
            }
            Record::Quoted { job, .. } => {
                self.about(job, |_| {})?;
                books::quote(self.slots, self.place, job)
            }
            Record::Invoiced(invoice) => {
                if let Some(job) = &invoice.job {
                    self.about(job, |_| {})?;
                }
                books::invoice(self.slots, self.place, invoice)
            }
            Record::InvoiceClosed { payment_hash, .. } => {
                books::close_invoice(self.slots, payment_hash, books::InvoiceState::Closed)
            }
            Record::Sealed { seq, .. } => {
                let mut value = Vec::with_capacity(14);
                self.place.write(&mut value);
                self.slots.put(Tree::Seals, &seq.to_be_bytes(), &value)
            }
        }
    }

    /// Puts the place of this record under a key.
    fn point(&self, tree: Tree, key: &[u8]) -> Result<(), Error> {
        let mut value = Vec::with_capacity(14);
        self.place.write(&mut value);
        self.slots.put(tree, key, &value)
    }

    fn accept(&self, job: &str) -> Result<(), Error> {
        if self.slots.get(Tree::Jobs, &key(job))?.is_some() {
            return self.about(job, |_| {});
        }
        let row = StoredJob {
            state: JobState::Accepted,
            accepted_ms: self.at_ms,
            updated_ms: self.at_ms,
            accepted: self.place,
            started: None,
            pinned: None,
            closed: None,
            history: vec![self.place],
        };
        self.slots.put(Tree::Jobs, &key(job), &row.to_bytes())?;
        self.slots.put(Tree::Listed, &listed(row.state, row.accepted_ms, Some(row.accepted)), &key(job))
    }

    /// Puts this record into the history of a request and, if that is a job, makes the change.
    fn about(&self, job: &str, change: impl FnOnce(&mut StoredJob)) -> Result<(), Error> {
        let Some(bytes) = self.slots.get(Tree::Jobs, &key(job))? else {
            return self.slots.put(Tree::History, &later(job, self.place), &[]);
        };
        let old = StoredJob::read(&bytes)?;
        let mut row = old.clone();
        if row.history.len() < HISTORY_IN_ROW {
            row.history.push(self.place);
        } else {
            self.slots.put(Tree::History, &later(job, self.place), &[])?;
        }
        change(&mut row);
        if row != old {
            self.slots.put(Tree::Jobs, &key(job), &row.to_bytes())?;
        }
        if row.state != old.state {
            let listed = |state| listed(state, row.accepted_ms, Some(row.accepted));
            self.slots.remove(Tree::Listed, &listed(old.state))?;
            self.slots.put(Tree::Listed, &listed(row.state), &key(job))?;
        }
        Ok(())
    }

    /// Queued once more (for more relays), the first event stays: it is never signed again.
    fn queue(&self, event: &str, job: Option<&str>, relays: &[String], give_up_ms: u64) -> Result<(), Error> {
        let id = key(event);
        let mut stored = match self.slots.get(Tree::Events, &id)? {
            Some(old) => StoredEvent::read(&old)?,
            None => StoredEvent { place: self.place, give_up_ms, job: job.map(str::to_owned) },
        };
        stored.give_up_ms = stored.give_up_ms.max(give_up_ms);
        self.slots.put(Tree::Events, &id, &stored.to_bytes())?;
        let mut left = self.owed(&id)?;
        for relay in relays {
            let answered = self.slots.get(Tree::Delivered, &pair(event, relay))?.is_some();
            if !answered && !left.contains(relay) {
                left.push(relay.clone());
            }
        }
        self.owe(&id, &left)
    }

    fn owed(&self, event: &[u8]) -> Result<Vec<String>, Error> {
        self.slots.get(Tree::Owed, event)?.map_or(Ok(Vec::new()), |v| relays(&v))
    }

    fn owe(&self, event: &[u8], left: &[String]) -> Result<(), Error> {
        if left.is_empty() {
            return self.slots.remove(Tree::Owed, event);
        }
        let value = serde_json::to_vec(left).map_err(|e| Error::Index { why: e.to_string() })?;
        self.slots.put(Tree::Owed, event, &value)
    }
}

/// The relays of an owed event.
pub(super) fn relays(value: &[u8]) -> Result<Vec<String>, Error> {
    serde_json::from_slice(value).map_err(|e| Error::Index { why: format!("a row does not read: {e}") })
}
