//! What this room needs of the store, as a trait, so that its tests need no disk. It stores nothing for the
//! node: that is `store`.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::store::record::{Answer, Record};
use crate::store::{Outgoing, Owed, Store};

/// The store as the relay room sees it. Called from many threads; each call is quick.
pub trait Memory: Send + Sync + 'static {
    /// All stored events of this relay up to this Unix second were handled.
    fn cursor(&self, relay: &str) -> Option<u64>;
    /// Signed events of ours that some relay has not answered for yet.
    fn owed(&self) -> Vec<Owed>;
    /// The text of such an event; `None` when it cannot be had now.
    fn event(&self, id: &str) -> Option<String>;
    /// Nothing is left to do about this request (hex id) of this customer (hex key): a job, refused, or
    /// cancelled by its author.
    fn knows(&self, request: &str, customer: &str) -> bool;
    /// Written down soon; losing it costs a repetition, nothing more.
    fn append_lazily(&self, records: Vec<Record>);
}

impl Memory for Store {
    fn cursor(&self, relay: &str) -> Option<u64> {
        Store::cursor(self, relay).unwrap_or_else(|error| {
            tracing::error!(relay, %error, "the cursor cannot be read; history is asked again");
            None
        })
    }

    fn owed(&self) -> Vec<Owed> {
        Store::owed(self).unwrap_or_else(|error| {
            tracing::error!(%error, "what is owed cannot be read; nothing new is sent until it can");
            Vec::new()
        })
    }

    fn event(&self, id: &str) -> Option<String> {
        Store::answer(self, id).unwrap_or_else(|error| {
            tracing::error!(event = id, %error, "an owed event cannot be read; it is sent when it can");
            None
        })
    }

    fn knows(&self, request: &str, customer: &str) -> bool {
        Store::knows(self, request, customer).unwrap_or_else(|error| {
            tracing::error!(request, %error, "the store cannot be asked for a request; it is handed up again");
            false
        })
    }

    fn append_lazily(&self, records: Vec<Record>) {
        if let Err(error) = Store::append_lazily(self, records) {
            tracing::error!(%error, "cursors and relays' answers are not kept; both will be asked for again");
        }
    }
}

/// A memory that ends with the process: for tests and benches.
#[derive(Debug, Default)]
pub struct InMemory(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    cursors: HashMap<String, u64>,
    outgoing: Vec<Outgoing>,
    known: HashSet<String>,
    delivered: Vec<(String, String, Answer)>,
    /// Texts of events that were asked for.
    read: usize,
}

impl InMemory {
    /// Owes an event, as `Record::Queued` does.
    pub fn queue(&self, outgoing: Outgoing) {
        self.lock().outgoing.push(outgoing);
    }

    /// Knows a request from now on.
    pub fn know(&self, request: &str) {
        self.lock().known.insert(request.to_owned());
    }

    /// The relays' last words about an event.
    pub fn deliveries(&self, event: &str) -> Vec<(String, Answer)> {
        let kept = self.lock();
        kept.delivered.iter().filter(|(e, ..)| e == event).map(|(_, r, a)| (r.clone(), a.clone())).collect()
    }

    /// How often the text of an event was asked for.
    pub fn events_read(&self) -> usize {
        self.lock().read
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory for InMemory {
    fn cursor(&self, relay: &str) -> Option<u64> {
        self.lock().cursors.get(relay).copied()
    }

    fn owed(&self) -> Vec<Owed> {
        let owed = |o: &Outgoing| Owed {
            event: o.event.clone(),
            job: o.job.clone(),
            relays_left: o.relays_left.clone(),
            give_up_ms: o.give_up_ms,
        };
        self.lock().outgoing.iter().filter(|o| !o.relays_left.is_empty()).map(owed).collect()
    }

    fn event(&self, id: &str) -> Option<String> {
        let mut kept = self.lock();
        kept.read += 1;
        kept.outgoing.iter().find(|o| o.event == id).map(|o| o.json.clone())
    }

    fn knows(&self, request: &str, _: &str) -> bool {
        self.lock().known.contains(request)
    }

    fn append_lazily(&self, records: Vec<Record>) {
        let mut kept = self.lock();
        for record in records {
            match record {
                Record::Cursor { relay, until } => {
                    kept.cursors.insert(relay, until);
                }
                Record::Delivered { event, relay, answer } => {
                    for outgoing in kept.outgoing.iter_mut().filter(|o| o.event == event) {
                        outgoing.relays_left.retain(|left| *left != relay);
                    }
                    kept.delivered.push((event, relay, answer));
                }
                _ => {}
            }
        }
    }
}
