//! The node's memory: an append-only, hash-chained, fsynced log that is the truth, and a sled index of it
//! that can be thrown away. It knows the shape of records, not what a job or a payment is allowed to do.
//! `docs/store.md` has the format on disk and what is promised.

mod apply;
mod blob;
mod books;
mod disk;
mod error;
mod frame;
mod gather;
mod index;
mod keys;
mod lock;
mod log;
pub mod money;
mod overlay;
mod packed;
mod reading;
pub mod record;
mod restored;
mod rows;
mod runs;
mod seen;
mod shelf;
mod tail;
mod upkeep;
mod view;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use self::blob::Blobs;
use self::lock::Locks;
use self::log::{Position, Reader};
use self::record::Record;
use self::shelf::Memory;
use self::tail::{Placed, Tail};
use self::view::{Source, View};
use self::writer::{Applied, Writer};

use crate::clock::{self, Clock, ClockFault};

pub use self::blob::BLOB_MAX_BYTES;
pub use self::books::{DAY_MS, InvoiceState, OpenHold};
pub use self::error::{Damage, Error};
pub use self::frame::{BATCH_MAX_BYTES, BATCH_MAX_RECORDS};
pub use self::lock::{HeldBy, Holder};
pub use self::reading::{Posted, Quote, between, hash_of, verify_log};
pub use self::restored::Restored;
pub use self::rows::{Delivery, Entry, Head, JobFilter, JobRow, JobState, Outgoing, Owed, Refusal};

const LOG: &str = "log";
const INDEX: &str = "index";
const BLOBS: &str = "blobs";

/// What a store may be told to do differently.
#[derive(Clone)]
pub struct Options {
    /// A segment that has grown to this many bytes is followed by a new one; at most 1 GiB.
    pub segment_bytes: u64,
    /// Bytes of index pages kept in memory.
    pub index_cache_bytes: u64,
    /// An index that does not open within this time is rebuilt.
    pub index_patience: Duration,
    /// Bytes of all blobs together, in whole blocks of 4 KiB; the oldest go when another one needs the room.
    pub blobs_bytes: u64,
    /// Folder of the key locks; `None`: one folder a user on this host.
    pub key_locks: Option<PathBuf>,
    pub clock: Clock,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            segment_bytes: 16 * 1024 * 1024,
            index_cache_bytes: 4 * 1024 * 1024,
            index_patience: Duration::from_secs(20),
            blobs_bytes: 1024 * 1024 * 1024,
            key_locks: None,
            clock: clock::system(),
        }
    }
}

/// How much has been written since the store was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Syncs of the log: one a group.
    pub syncs: u64,
    pub batches: u64,
    pub records: u64,
}

/// Whether the store still takes records.
#[derive(Debug, Clone)]
pub struct Health {
    /// Why it does not: every append fails with this until the store is opened again.
    pub poisoned: Option<Error>,
}

/// A batch with the bytes that it will be in the log.
pub struct Prepared {
    records: Vec<Record>,
    body: Vec<u8>,
}

impl Prepared {
    /// # Errors
    /// [`Error::EmptyBatch`] and [`Error::TooLarge`].
    pub fn new(records: Vec<Record>) -> Result<Prepared, Error> {
        let body = writer::encode(&records)?;
        Ok(Prepared { records, body })
    }

    pub fn records(&self) -> &[Record] {
        &self.records
    }
}

/// Called with a batch's outcome.
pub type Then = Box<dyn FnOnce(&Result<u64, Error>) + Send>;

/// A cheap handle of an open store. The last one to go closes it.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    blobs: Blobs,
    view: Arc<View>,
    /// `None` when the store was opened for reading only.
    writer: Option<Writer>,
    /// The end of the log as read, for a store without a writer.
    read_up_to: Applied,
    rebuilt: bool,
    locks: Mutex<Option<Locks>>,
}

// === impl Store ===

impl Store {
    /// Opens the store in `dir`, made when missing, for the one node that may write to it.
    ///
    /// # Errors
    /// [`Error::Held`] and [`Error::KeyHeld`] name the node that is in the way; [`Error::OtherKey`] says that jobs
    /// are open which another key has taken; [`Error::Corrupt`] and
    /// [`Error::Shortened`] the first entry that is not as it was written; [`Error::Full`] and
    /// [`Error::Io`] what the disk refused.
    pub fn open(dir: &Path, holder: &Holder) -> Result<Store, Error> {
        Store::open_with(dir, holder, Options::default())
    }

    /// As [`Store::open`], with other options.
    pub fn open_with(dir: &Path, holder: &Holder, options: Options) -> Result<Store, Error> {
        disk::make_dir(dir)?;
        let key_dir = match &options.key_locks {
            Some(key_dir) => key_dir.clone(),
            None => lock::key_lock_dir()?,
        };
        let locks = Locks::take(dir, &key_dir, holder, (options.clock)())?;
        let log_dir = dir.join(LOG);
        for folder in [&log_dir, &dir.join(BLOBS)] {
            disk::make_dir(folder)?;
            upkeep::sweep_temporary(folder)?;
        }
        // An earlier start may have made the folders and died before their names were durable.
        disk::sync_dir(dir)?;
        let opened =
            index::open(&dir.join(INDEX), &log_dir, options.index_cache_bytes, options.index_patience)?;
        let tail = Tail::open(&log_dir, &opened.end, options.segment_bytes)?;
        let (segment, offset) = tail.place();
        let read_up_to = Applied { position: tail.position(), segment, offset };
        let view = Arc::new(View::new(Source::Index(opened.index), Reader::new(&log_dir)));
        let writer = Writer::start(tail, view.clone(), options.clock)?;
        let inner = Inner {
            dir: dir.to_path_buf(),
            blobs: Blobs::new(dir.join(BLOBS), options.blobs_bytes),
            view,
            writer: Some(writer),
            read_up_to,
            rebuilt: opened.rebuilt,
            locks: Mutex::new(Some(locks)),
        };
        let store = Store { inner: Arc::new(inner) };
        store.check_key(dir, &holder.pubkey)?;
        // The first write shows at once whether this disk takes any.
        let opened = Record::Opened { node: holder.pubkey.clone(), version: holder.version.clone() };
        store.append_blocking(vec![opened])?;
        Ok(store)
    }

    /// Open jobs can be answered, and encrypted ones read, with the key that took them only.
    fn check_key(&self, dir: &Path, key: &str) -> Result<(), Error> {
        let Some(taken_by) = self.inner.view.opened_by()?.filter(|last| last != key) else { return Ok(()) };
        match self.open_jobs()?.len() {
            0 => Ok(()),
            open => Err(Error::OtherKey { dir: dir.to_path_buf(), taken_by, key: key.to_owned(), open }),
        }
    }

    /// Reads the log of `dir` into memory, whether a node runs on it or not; appends fail with
    /// [`Error::ReadOnly`], and what is written later is not seen.
    pub fn read_only(dir: &Path) -> Result<Store, Error> {
        let log_dir = dir.join(LOG);
        if !disk::is_folder(&log_dir)? {
            return Err(Error::Missing { dir: dir.to_path_buf() });
        }
        let memory = Memory::default();
        let promise = upkeep::promise_of(&log_dir)?;
        let end = log::scan(&log_dir, false, &mut |met| {
            if let Some(promise) = &promise {
                promise.check(&log_dir, met.seq, &met.hash)?;
            }
            let placed = Placed { seq: met.seq, at_ms: met.at_ms, segment: met.segment, offset: met.offset };
            apply::apply(&memory, &placed, &log::records(&log_dir, met)?)
        })?;
        index::check_end(&log_dir, promise.as_ref(), &end.position)?;
        let read_up_to =
            Applied { position: end.position, segment: end.segment.unwrap_or_default(), offset: end.offset };
        let inner = Inner {
            dir: dir.to_path_buf(),
            // Nothing is put through this handle.
            blobs: Blobs::new(dir.join(BLOBS), 0),
            view: Arc::new(View::new(Source::Memory(memory), Reader::new(&log_dir))),
            writer: None,
            read_up_to,
            rebuilt: true,
            locks: Mutex::new(None),
        };
        Ok(Store { inner: Arc::new(inner) })
    }

    /// Appends a batch: durable and to be read when this returns, or not acknowledged at all. Returns its
    /// seq. A caller that goes away takes nothing back.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Io`] or [`Error::Index`] also mean that no later append will be taken; the
    /// batch that failed is then in doubt until the store is opened again.
    pub async fn append(&self, records: Vec<Record>) -> Result<u64, Error> {
        self.submit(records, Box::new(|_| {}))?.await
    }

    /// Hands a batch in at once, so that batches have the order of these calls; the future is [`Store::append`]'s.
    /// `then` is called with the outcome, whether or not somebody still waits, from another thread or from this one.
    pub fn submit(
        &self,
        records: Vec<Record>,
        then: Then,
    ) -> Result<impl Future<Output = Result<u64, Error>> + use<>, Error> {
        self.submit_prepared(Prepared::new(records)?, then)
    }

    /// As [`Store::submit`], of a batch whose bytes were made before.
    pub fn submit_prepared(
        &self,
        batch: Prepared,
        then: Then,
    ) -> Result<impl Future<Output = Result<u64, Error>> + use<>, Error> {
        let (tell, told) = tokio::sync::oneshot::channel();
        self.writer()?.submit(
            batch,
            Box::new(move |result, spent| {
                then(&result);
                if let Err((Err(lost), _)) = tell.send((result, spent)) {
                    tracing::warn!(error = %lost, "a batch failed and nobody waited for it any more");
                }
            }),
        );
        Ok(async move { told.await.map_or(Err(Error::Closed), |(result, _)| result) })
    }

    /// As [`Store::append`], for a thread that may wait.
    pub fn append_blocking(&self, records: Vec<Record>) -> Result<u64, Error> {
        let (tell, told) = std::sync::mpsc::channel();
        self.writer()?.submit(
            Prepared::new(records)?,
            Box::new(move |result, spent| {
                if let Err(unheard) = tell.send((result, spent)) {
                    tracing::warn!(result = ?unheard.0.0, "nobody waited for a batch any more");
                }
            }),
        );
        told.recv().map_or(Err(Error::Closed), |(result, _)| result)
    }

    /// Appends a batch that may be lost in a crash within the next second, and is not to be read before it
    /// is written: it goes with the next group, or alone after a second. Batches keep their order.
    ///
    /// # Errors
    /// [`Error::Busy`] when too many wait already.
    pub fn append_lazily(&self, records: Vec<Record>) -> Result<(), Error> {
        self.writer()?.submit_lazily(Prepared::new(records)?)
    }

    fn writer(&self) -> Result<&Writer, Error> {
        self.inner.writer.as_ref().ok_or(Error::ReadOnly)
    }

    /// Writes what waits, puts the index away in order, and lets go of the locks. Every handle is useless
    /// afterwards; closing again does nothing. Blocks for some milliseconds.
    pub fn close(&self) -> Result<(), Error> {
        self.inner.close()
    }

    /// Whether records are still taken.
    pub fn health(&self) -> Health {
        Health { poisoned: self.inner.writer.as_ref().and_then(Writer::poison) }
    }

    /// How much this handle's store has written.
    pub fn stats(&self) -> Stats {
        let none = Stats { syncs: 0, batches: 0, records: 0 };
        self.inner.writer.as_ref().map_or(none, Writer::stats)
    }

    /// True when the index was made again from the log at the start.
    pub fn was_rebuilt(&self) -> bool {
        self.inner.rebuilt
    }

    /// The last batch that is durable.
    pub fn head(&self) -> Head {
        head(&self.inner.applied().position)
    }

    /// Whether this machine's clock is one that the log's times can follow on.
    pub fn clock_fault(&self, now_ms: u64) -> Option<ClockFault> {
        ClockFault::between(self.inner.read_up_to.position.at_ms, now_ms)
    }

    /// Reads the whole log from disk and checks every checksum and the chain up to the present head.
    ///
    /// # Errors
    /// [`Error::Corrupt`] names the first bad entry by segment, offset and seq.
    pub fn verify(&self) -> Result<Head, Error> {
        upkeep::verify(&self.inner.dir.join(LOG), Some(self.inner.applied())).map(|p| head(&p))
    }

    /// Copies log and blobs as of now into the new folder `to` and checks the copy. The copy opens as a data
    /// folder; keys and configuration are not in it.
    pub fn backup(&self, to: &Path) -> Result<Head, Error> {
        upkeep::backup(&self.inner.dir, to, &self.inner.applied()).map(|p| head(&p))
    }

    /// As [`Store::backup`], of a data folder that a node may run on: what is durable now.
    pub fn backup_of(dir: &Path, to: &Path) -> Result<Head, Error> {
        upkeep::backup_of(dir, to).map(|p| head(&p))
    }

    /// Puts the log and the blobs of a checked backup in the place of those in `dir`, on which no node may run. What
    /// was there is kept beside them; the second value says where.
    ///
    /// # Errors
    /// [`Error::Held`] while a node runs there; what is wrong with the backup.
    pub fn restore(dir: &Path, from: &Path) -> Result<(Head, Option<PathBuf>), Error> {
        disk::make_dir(dir)?;
        let now_ms = clock::system()();
        let _lock = Locks::folder(dir, now_ms)?;
        upkeep::restore(dir, from, now_ms).map(|(p, aside)| (head(&p), aside))
    }

    /// Stores bytes outside the log; returns their SHA-256 in lower-case hex. At most [`BLOB_MAX_BYTES`].
    /// Durable when it returns, but not kept for ever: the oldest go when [`Options::blobs_bytes`] are taken. Blocks.
    pub fn put_blob(&self, bytes: &[u8]) -> Result<String, Error> {
        self.writer()?;
        self.inner.blobs.put(bytes)
    }

    /// A blob of at most `cap` bytes, checked against its name; `None` when it is not here. Blocks.
    pub fn blob(&self, sha: &str, cap: u64) -> Result<Option<Vec<u8>>, Error> {
        blob::get(&self.inner.dir.join(BLOBS), sha, cap)
    }

    /// A job, by its request's id.
    pub fn job(&self, job: &str) -> Result<Option<JobRow>, Error> {
        self.inner.view.job(job)
    }

    /// Jobs, newest first.
    pub fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobRow>, Error> {
        self.inner.view.jobs(filter)
    }

    /// All jobs that are owed an answer, newest first.
    pub fn open_jobs(&self) -> Result<Vec<JobRow>, Error> {
        self.inner.view.open_jobs()
    }

    /// Every record about a request, oldest first.
    pub fn history(&self, job: &str) -> Result<Vec<Entry>, Error> {
        self.inner.view.history(job)
    }

    /// Why a request was refused.
    pub fn refusal(&self, request: &str) -> Result<Option<Refusal>, Error> {
        self.inner.view.refusal(request)
    }

    /// Everybody who has sent a kind 5 for this request. Anybody can: only its own customer's counts, see
    /// [`Store::is_cancelled`].
    pub fn cancelled(&self, request: &str) -> Result<Vec<record::PublicKey>, Error> {
        self.inner.view.cancelled(request)
    }

    /// True when this request was taken back by `customer`, its author.
    pub fn is_cancelled(&self, request: &str, customer: &str) -> Result<bool, Error> {
        self.inner.view.is_cancelled(request, customer)
    }

    /// True when nothing is to be done about this request of `customer` that is not being done already: it
    /// is a job, was refused, or was cancelled by its author. A stranger's kind 5 does not count.
    pub fn knows(&self, request: &str, customer: &str) -> Result<bool, Error> {
        self.inner.view.knows(request, customer)
    }

    /// Signed events that some relay has not answered, in the order of signing. [`Store::answer`] has their text.
    pub fn owed(&self) -> Result<Vec<Owed>, Error> {
        self.inner.view.owed()
    }

    /// Each relay's last word about an event of ours.
    pub fn deliveries(&self, event: &str) -> Result<Vec<Delivery>, Error> {
        self.inner.view.deliveries(event)
    }

    /// An event that we have signed, as JSON.
    pub fn answer(&self, event: &str) -> Result<Option<String>, Error> {
        self.inner.view.answer(event)
    }

    /// Unix seconds up to which this relay's events have been handled.
    pub fn cursor(&self, relay: &str) -> Result<Option<u64>, Error> {
        self.inner.view.cursor(relay)
    }

    /// Every key and value of the index, one a line, for comparing one made live with one made from the log.
    #[doc(hidden)]
    pub fn dump_index(&self) -> Result<Vec<String>, Error> {
        self.inner.view.dump()
    }
}

fn head(position: &Position) -> Head {
    Head { seq: position.seq, hash: hex::encode(position.hash) }
}

// === impl Inner ===

impl Inner {
    fn applied(&self) -> Applied {
        self.writer.as_ref().map_or(self.read_up_to, Writer::applied)
    }

    fn close(&self) -> Result<(), Error> {
        let Some(writer) = &self.writer else { return Ok(()) };
        writer.close();
        let closed = match (self.view.close(), writer.poison()) {
            // Without a marker, the next start makes the index again: the right thing after a failure.
            (index, Some(e)) => {
                drop(index);
                Err(e)
            }
            (Some(index), None) => index.close(&writer.applied().position),
            (None, None) => Ok(()),
        };
        drop(self.locks.lock().unwrap_or_else(PoisonError::into_inner).take());
        closed
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Err(e) = self.close() {
            tracing::warn!(error = %e, "the store was not closed in order; the next start checks the log");
        }
    }
}
