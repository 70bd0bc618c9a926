//! The one writer: takes all batches that wait, puts them behind the log with one sync, brings the index up
//! to date, and answers the callers. It never waits for company; a group is what came in during the last
//! sync. What the bytes look like is `tail.rs`'s.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::frame::{BATCH_MAX_BYTES, BATCH_MAX_RECORDS};
use super::log::Position;
use super::record::Record;
use super::tail::{Placed, Tail};
use super::view::View;
use super::{Clock, Error, Prepared, Stats};

/// A lazy batch is durable after at most this long.
const LAZY: Duration = Duration::from_secs(1);
/// Lazy batches that may wait.
const LAZY_MOST: usize = 16 * 1024;
/// Bytes that lazy batches may hold.
const LAZY_MOST_BYTES: usize = 16 * 1024 * 1024;
/// Bytes of most bodies: a transfer or two.
const BODY_BYTES: usize = 1024;
/// Batches in one group.
const GROUP_MOST: usize = 4096;
/// Batches that the index takes in while nobody reads: each turn of reader and writer costs more than a batch.
const APPLIED_TOGETHER: usize = 8;

type Reply = Box<dyn FnOnce(Result<u64, Error>, Spent) + Send>;

/// What a batch was made of. It goes back with the answer, so that the thread that made it also frees it: else two threads
/// get in each other's way in the allocator, a dozen times a batch.
pub(super) struct Spent {
    _records: Vec<Record>,
    _body: Vec<u8>,
}

/// A batch on its way into the log.
struct Waiting {
    records: Vec<Record>,
    body: Vec<u8>,
    /// `None`: nobody waits for it.
    reply: Option<Reply>,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Waiting>,
    /// Batches in `waiting` that somebody waits for.
    eager: usize,
    lazy_bytes: usize,
    /// When the oldest lazy batch must go.
    due: Option<Instant>,
    closing: bool,
}

/// Where the log ends, as far as it is durable and in the index.
#[derive(Debug, Clone, Copy)]
pub(super) struct Applied {
    pub position: Position,
    pub segment: u64,
    pub offset: u64,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    poison: Mutex<Option<Error>>,
    applied: Mutex<Applied>,
    groups: AtomicU64,
    batches: AtomicU64,
    records: AtomicU64,
}

/// Handle of the writer thread.
pub(super) struct Writer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code that can panic runs under these locks, and their data is whole at every step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Writer {
    pub(super) fn start(tail: Tail, view: Arc<View>, clock: Clock) -> Result<Self, Error> {
        let (segment, offset) = tail.place();
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            wake: Condvar::new(),
            poison: Mutex::default(),
            applied: Mutex::new(Applied { position: tail.position(), segment, offset }),
            groups: AtomicU64::new(0),
            batches: AtomicU64::new(0),
            records: AtomicU64::new(0),
        });
        let work = Work { shared: shared.clone(), tail, view, clock };
        let watched = shared.clone();
        let thread = std::thread::Builder::new()
            .name("coinop-log".into())
            .spawn(move || {
                if catch_unwind(AssertUnwindSafe(|| work.run())).is_err() {
                    watched.give_up();
                }
            })
            .map_err(|e| Error::Io { doing: "start the thread of", path: "log".into(), source: e.into() })?;
        Ok(Writer { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Hands a batch in; `reply` is called from the writer's thread, or at once when the batch is not taken.
    pub(super) fn submit(&self, Prepared { records, body }: Prepared, reply: Reply) {
        let mut batch = Some(Waiting { records, body, reply: Some(reply) });
        if let (Err(e), Some(batch)) = (self.push(&mut batch), batch) {
            batch.answer(Err(e));
        }
    }

    /// Hands a batch in that rides with the next group.
    pub(super) fn submit_lazily(&self, Prepared { records, body }: Prepared) -> Result<(), Error> {
        self.push(&mut Some(Waiting { records, body, reply: None }))
    }

    /// Takes the batch, or leaves it and says why.
    fn push(&self, batch: &mut Option<Waiting>) -> Result<(), Error> {
        if let Some(e) = self.poison() {
            return Err(e);
        }
        let mut queue = lock(&self.shared.queue);
        if queue.closing {
            return Err(Error::Closed);
        }
        if let Some(lazy) = batch.as_ref().filter(|batch| batch.reply.is_none()) {
            let waiting = queue.waiting.len() - queue.eager;
            if waiting >= LAZY_MOST || queue.lazy_bytes + lazy.body.len() > LAZY_MOST_BYTES {
                return Err(Error::Busy);
            }
            queue.lazy_bytes += lazy.body.len();
            queue.due.get_or_insert_with(|| Instant::now() + LAZY);
        } else {
            queue.eager += 1;
        }
        queue.waiting.extend(batch.take());
        drop(queue);
        self.shared.wake.notify_one();
        Ok(())
    }

    /// Why nothing is written any more.
    pub(super) fn poison(&self) -> Option<Error> {
        lock(&self.shared.poison).clone()
    }

    pub(super) fn applied(&self) -> Applied {
        *lock(&self.shared.applied)
    }

    pub(super) fn stats(&self) -> Stats {
        Stats {
            syncs: self.shared.groups.load(Ordering::Relaxed),
            batches: self.shared.batches.load(Ordering::Relaxed),
            records: self.shared.records.load(Ordering::Relaxed),
        }
    }

    /// Writes what waits, then ends the thread. Later calls do nothing.
    pub(super) fn close(&self) {
        lock(&self.shared.queue).closing = true;
        self.shared.wake.notify_one();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            self.shared.give_up();
        }
    }
}

impl Shared {
    fn fail(&self, e: &Error) {
        lock(&self.poison).get_or_insert_with(|| e.clone());
    }

    /// The writer is gone without a word: nobody may wait for it, now or later.
    fn give_up(&self) {
        let e = Error::Index { why: "the log's writer panicked".into() };
        tracing::error!("the log's writer panicked; the log is checked at the next start");
        self.fail(&e);
        let mut queue = lock(&self.queue);
        queue.closing = true;
        let waiting = std::mem::take(&mut queue.waiting);
        drop(queue);
        waiting.into_iter().for_each(|batch| batch.answer(Err(e.clone())));
    }
}

impl Waiting {
    fn answer(self, result: Result<u64, Error>) {
        if let Some(reply) = self.reply {
            reply(result, Spent { _records: self.records, _body: self.body });
        }
    }
}

/// The body of a batch's frame.
pub(super) fn encode(records: &[Record]) -> Result<Vec<u8>, Error> {
    if records.is_empty() {
        return Err(Error::EmptyBatch);
    }
    if records.len() > BATCH_MAX_RECORDS {
        let (is, most) = (records.len() as u64, BATCH_MAX_RECORDS as u64);
        return Err(Error::TooLarge { what: "batch (records)", is, most });
    }
    let mut body = Vec::with_capacity(BODY_BYTES);
    serde_json::to_writer(&mut body, records).map_err(|e| Error::Index { why: e.to_string() })?;
    if body.len() > BATCH_MAX_BYTES {
        let (is, most) = (body.len() as u64, BATCH_MAX_BYTES as u64);
        return Err(Error::TooLarge { what: "batch (bytes)", is, most });
    }
    Ok(body)
}

/// What the thread owns.
struct Work {
    shared: Arc<Shared>,
    tail: Tail,
    view: Arc<View>,
    clock: Clock,
}

impl Work {
    fn run(mut self) {
        while let Some(mut group) = self.next_group() {
            while !group.is_empty() {
                let rest = group.split_off(first_group(&group));
                self.write(group);
                group = rest;
            }
        }
        if lock(&self.shared.poison).is_none()
            && let Err(e) = self.tail.finish()
        {
            tracing::warn!(error = %e, "the log was not put away in order; it is complete all the same");
            self.shared.fail(&e);
        }
    }

    /// Everything that waits, or `None` when the store closes and nothing does.
    fn next_group(&self) -> Option<Vec<Waiting>> {
        let mut queue = lock(&self.shared.queue);
        loop {
            let due_in = queue.due.map(|due| due.saturating_duration_since(Instant::now()));
            if queue.eager > 0 || queue.closing || due_in.is_some_and(|d| d.is_zero()) {
                if queue.waiting.is_empty() && queue.closing {
                    return None;
                }
                queue.eager = 0;
                queue.lazy_bytes = 0;
                queue.due = None;
                return Some(std::mem::take(&mut queue.waiting));
            }
            queue = match due_in {
                Some(due_in) => {
                    let waited = self.shared.wake.wait_timeout(queue, due_in);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn write(&mut self, group: Vec<Waiting>) {
        let poison = lock(&self.shared.poison).clone();
        let written = match poison {
            Some(e) => Err(e),
            None => self.tail.write((self.clock)(), group.iter().map(|w| w.body.as_slice())),
        };
        let placed = match written {
            Ok(placed) => placed,
            Err(e) => {
                tracing::error!(error = %e, batches = group.len(), "the log takes no more records");
                self.shared.fail(&e);
                group.into_iter().for_each(|batch| batch.answer(Err(e.clone())));
                return;
            }
        };
        self.shared.groups.fetch_add(1, Ordering::Relaxed);
        self.shared.batches.fetch_add(group.len() as u64, Ordering::Relaxed);
        let records = group.iter().map(|w| w.records.len() as u64).sum();
        self.shared.records.fetch_add(records, Ordering::Relaxed);
        // The log and its head move together, batch by batch below only the index does.
        let (segment, offset) = self.tail.place();
        *lock(&self.shared.applied) = Applied { position: self.tail.position(), segment, offset };
        let mut group = group.into_iter();
        for placed in placed.chunks(APPLIED_TOGETHER) {
            self.take_in(placed, group.by_ref().take(placed.len()).collect());
        }
    }

    /// Brings the index up to date with these batches, and answers for them.
    fn take_in(&self, placed: &[Placed], batches: Vec<Waiting>) {
        let poison = lock(&self.shared.poison).clone();
        let mut taken = 0;
        let applied = match poison {
            Some(e) => Err(e),
            None => self.apply(placed, &batches, &mut taken),
        };
        for (nth, (batch, placed)) in batches.into_iter().zip(placed).enumerate() {
            let result = if nth < taken { Ok(()) } else { applied.clone() };
            batch.answer(result.map(|()| placed.seq));
        }
    }

    /// sled may panic on a disk that fails it; then the index is stale, and the store must say so.
    fn apply(&self, placed: &[Placed], batches: &[Waiting], taken: &mut usize) -> Result<(), Error> {
        let pairs = placed.iter().zip(batches.iter().map(|batch| batch.records.as_slice()));
        let work = AssertUnwindSafe(|| self.view.apply(pairs, taken));
        let applied = catch_unwind(work)
            .unwrap_or_else(|_| Err(Error::Index { why: "sled panicked while taking in a batch".into() }));
        if let Err(e) = &applied {
            tracing::error!(error = %e, "the index does not follow the log");
            self.shared.fail(e);
        }
        applied
    }
}

/// How many batches of the front fit into one group.
fn first_group(group: &[Waiting]) -> usize {
    let mut bytes = 0;
    let fit = group.iter().take(GROUP_MOST).take_while(|w| {
        bytes += w.body.len();
        bytes <= BATCH_MAX_BYTES
    });
    fit.count().max(1)
}
