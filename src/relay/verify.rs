//! Nothing unsigned comes in: every event's id and signature are checked here, on a bounded pool of threads,
//! whatever the relay says. The order is by price: size, a glance at id, kind and time, the seen set, the
//! subscription's filters, the id's hash, the signature. It decides nothing about what an event wants.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use nostr_sdk::prelude::{Event, Filter, MatchEventOptions};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::cursor::{Hold, Progress};
use super::seen::Seen;
use super::{Error, Glance, Memory, lock, message};

/// Frames waiting for a thread, bytes in all.
const WAITING_BYTES: usize = 16 << 20;
/// Taken from the queue by one thread at a time.
const BATCH: usize = 128;

/// A verified event, once. Say `done` when it is written down: until then the cursors of the relays that sent
/// it stay before it. Dropped without `done`, it is fetched again.
#[derive(Debug)]
pub struct Inbound {
    /// Its id and signature were checked, and it matches what we asked for.
    pub event: Event,
    /// The relay that was first.
    pub relay: String,
    receipt: Receipt,
}

impl Inbound {
    /// The event was handled, or needs no handling. Saying it twice is harmless.
    pub fn done(&self) {
        self.receipt.done();
    }
}

/// What is asked of a relay under one subscription.
#[derive(Debug)]
pub struct Wanted {
    filters: Vec<Filter>,
}

impl Wanted {
    pub fn new(filters: Vec<Filter>) -> Arc<Self> {
        Arc::new(Self { filters })
    }

    pub(super) fn filters(&self) -> &[Filter] {
        &self.filters
    }

    /// Whether an event of this kind and time can match at all.
    pub(super) fn may_match(&self, glance: &Glance) -> bool {
        self.filters.iter().any(|filter| {
            filter.kinds.as_ref().is_none_or(|kinds| kinds.contains(&glance.kind.into()))
                && filter.since.is_none_or(|since| glance.created_at >= since.as_secs())
                && filter.until.is_none_or(|until| glance.created_at <= until.as_secs())
        })
    }

    pub(super) fn matches(&self, event: &Event) -> bool {
        self.filters.iter().any(|filter| filter.match_event(event, MatchEventOptions::new()))
    }
}

/// What became of one relay's events.
#[derive(Debug, Default)]
pub struct Counts {
    pub received: AtomicU64,
    pub verified: AtomicU64,
    pub duplicate: AtomicU64,
    /// Not what was asked for.
    pub unwanted: AtomicU64,
    /// Over the cap, not JSON, or not an event.
    pub malformed: AtomicU64,
    /// The id or the signature is wrong.
    pub forged: AtomicU64,
    /// Verified, but nobody had room; fetched again later.
    pub lagged: AtomicU64,
}

impl Counts {
    pub(super) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn of(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}

/// One relay as a source of events.
#[derive(Debug)]
pub struct Source {
    pub relay: String,
    pub counts: Counts,
    pub(super) progress: Arc<Progress>,
}

impl Source {
    pub fn new(relay: String, cursor: Option<u64>) -> Arc<Self> {
        Arc::new(Self { relay, counts: Counts::default(), progress: Progress::new(cursor) })
    }
}

/// Checks one frame's event alone, without pool or seen set: the customer's side.
pub(super) fn check(frame: &str, wanted: &Wanted, counts: &Counts) -> Option<Event> {
    parse(frame, wanted, counts).filter(|event| is_genuine(event, counts))
}

fn parse(frame: &str, wanted: &Wanted, counts: &Counts) -> Option<Event> {
    let Some(event) = message::event(frame) else {
        Counts::add(&counts.malformed);
        return None;
    };
    if !wanted.matches(&event) {
        Counts::add(&counts.unwanted);
        return None;
    }
    Some(event)
}

fn is_genuine(event: &Event, counts: &Counts) -> bool {
    let genuine = event.verify_id() && event.verify_signature();
    if !genuine {
        Counts::add(&counts.forged);
    }
    genuine
}

/// The pool. Dropping it ends its threads.
#[derive(Debug)]
pub struct Intake {
    shared: Arc<Shared>,
    room: Arc<Semaphore>,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    seen: Arc<Mutex<Seen>>,
    memory: Arc<dyn Memory>,
    inbound: mpsc::Sender<Inbound>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Item>,
    /// Threads that wait and were not woken yet.
    idle: usize,
    /// Wakings that no thread has taken note of.
    woken: usize,
    closed: bool,
}

struct Item {
    frame: Utf8Bytes,
    glance: Glance,
    source: Arc<Source>,
    wanted: Arc<Wanted>,
    hold: Hold,
    _room: OwnedSemaphorePermit,
}

impl Intake {
    /// Starts `threads` (0: one a core) that put verified events into `inbound`. The last `seen` ids at least
    /// are remembered.
    pub fn start(
        threads: usize,
        seen: usize,
        memory: Arc<dyn Memory>,
        inbound: mpsc::Sender<Inbound>,
    ) -> Result<Self, Error> {
        let threads = match threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            work: Condvar::new(),
            seen: Arc::new(Mutex::new(Seen::new(seen))),
            memory,
            inbound,
        });
        let intake = Self { shared: Arc::clone(&shared), room: Arc::new(Semaphore::new(WAITING_BYTES)) };
        for n in 0..threads {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name(format!("verify-{n}"))
                .stack_size(512 << 10)
                .spawn(move || shared.work())
                .map_err(Error::Threads)?;
        }
        Ok(intake)
    }

    /// Takes a frame that `message::look` called an event. Waits only while the threads are behind by
    /// 16 MiB; never for whoever reads the verified events.
    pub async fn offer(&self, source: &Arc<Source>, wanted: &Arc<Wanted>, glance: Glance, frame: Utf8Bytes) {
        Counts::add(&source.counts.received);
        if !wanted.may_match(&glance) {
            Counts::add(&source.counts.unwanted);
            return;
        }
        let hold = source.progress.hold(glance.created_at);
        let Some(hold) = lock(&self.shared.seen).is_new(&glance.id, hold) else {
            Counts::add(&source.counts.duplicate);
            return;
        };
        let cost = u32::try_from(frame.len().clamp(512, WAITING_BYTES)).unwrap_or(u32::MAX);
        let Ok(room) = Arc::clone(&self.room).acquire_many_owned(cost).await else { return hold.lag() };
        let item =
            Item { frame, glance, source: Arc::clone(source), wanted: Arc::clone(wanted), hold, _room: room };
        let wake = {
            let mut queue = lock(&self.shared.queue);
            queue.items.push_back(item);
            let wake = queue.idle > 0;
            if wake {
                queue.idle -= 1;
                queue.woken += 1;
            }
            wake
        };
        // A waking is a system call: one a sleeping thread, not one a frame.
        if wake {
            self.shared.work.notify_one();
        }
    }

    /// Nothing waits for a thread, and nobody holds an event that is not done.
    pub fn is_quiet(&self) -> bool {
        self.room.available_permits() == WAITING_BYTES && lock(&self.shared.seen).open() == 0
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn work(&self) {
        let mut batch = Vec::with_capacity(BATCH);
        let mut verified = Vec::with_capacity(BATCH);
        while self.take(&mut batch) {
            for Item { frame, glance, source, wanted, hold, _room } in batch.drain(..) {
                let judged = catch_unwind(AssertUnwindSafe(|| self.judge(&source, &wanted, glance, &frame)));
                match judged {
                    Ok(Some(event)) => verified.push((source, event, hold)),
                    Ok(None) => drop(hold),
                    Err(_) => {
                        Counts::add(&source.counts.malformed);
                        tracing::error!(relay = source.relay, "checking an event panicked; it was dropped");
                    }
                }
            }
            // Together: the reader is woken once a batch, and a batch is one event when little comes.
            self.hand_up(&mut verified);
        }
    }

    /// Waits for work; `false` when there will be no more.
    fn take(&self, batch: &mut Vec<Item>) -> bool {
        let mut queue = lock(&self.queue);
        while queue.items.is_empty() {
            if queue.closed {
                return false;
            }
            queue.idle += 1;
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            match queue.woken.checked_sub(1) {
                Some(rest) => queue.woken = rest,
                // It woke by itself, or for the end.
                None => queue.idle = queue.idle.saturating_sub(1),
            }
        }
        // Half of what is there, so that a second thread finds something, too.
        let share = queue.items.len().div_ceil(2).min(BATCH);
        batch.extend(queue.items.drain(..share));
        true
    }

    fn judge(&self, source: &Source, wanted: &Wanted, glance: Glance, frame: &str) -> Option<Event> {
        let counts = &source.counts;
        let event = parse(frame, wanted, counts)?;
        // The glance and the parser must have read the same event.
        if event.id.as_bytes() != &glance.id {
            Counts::add(&counts.malformed);
            return None;
        }
        // Verified before this process began: a replay is dropped, nothing is believed.
        let (mut id, mut author) = ([0; 64], [0; 64]);
        if glance.kind != 5
            && self
                .memory
                .knows(hex(event.id.as_bytes(), &mut id), hex(&event.pubkey.to_bytes(), &mut author))
        {
            Counts::add(&counts.duplicate);
            return None;
        }
        is_genuine(&event, counts).then_some(event)
    }

    fn hand_up(&self, verified: &mut Vec<(Arc<Source>, Event, Hold)>) {
        let mut fresh = Vec::with_capacity(verified.len());
        {
            let mut seen = lock(&self.seen);
            for (source, event, hold) in verified.drain(..) {
                match seen.mark(event.id.to_bytes(), hold) {
                    true => fresh.push((source, event)),
                    false => Counts::add(&source.counts.duplicate),
                }
            }
        }
        for (source, event) in fresh {
            let id = event.id.to_bytes();
            let receipt = Receipt { id, seen: Arc::clone(&self.seen), finished: AtomicBool::new(false) };
            let inbound = Inbound { event, relay: source.relay.clone(), receipt };
            match self.inbound.try_send(inbound) {
                Ok(()) => Counts::add(&source.counts.verified),
                // Dropping it marks the lag and makes it new again.
                Err(TrySendError::Full(_)) => Counts::add(&source.counts.lagged),
                Err(TrySendError::Closed(_)) => {}
            }
        }
    }
}

/// Lower-case hex on the stack: this is done for every event, and a String each costs as much as the parser.
fn hex<'a>(bytes: &[u8; 32], text: &'a mut [u8; 64]) -> &'a str {
    // Cannot fail: 32 bytes are 64 ASCII digits.
    hex::encode_to_slice(bytes, text).ok().and_then(|()| std::str::from_utf8(text).ok()).unwrap_or_default()
}

/// Ties an event to the cursors that wait for it.
#[derive(Debug)]
struct Receipt {
    id: [u8; 32],
    seen: Arc<Mutex<Seen>>,
    finished: AtomicBool,
}

impl Receipt {
    fn done(&self) {
        if self.finished.swap(true, Ordering::Relaxed) {
            return;
        }
        let holds = lock(&self.seen).done(&self.id);
        drop(holds);
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        if *self.finished.get_mut() {
            return;
        }
        let holds = lock(&self.seen).forget(&self.id);
        for hold in holds {
            hold.lag();
        }
    }
}
