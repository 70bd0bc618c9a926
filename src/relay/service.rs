//! The relay room as the node sees it: started once, asked and told through a `Handle`, verified events out of a
//! channel. It wires the parts together and holds no logic of its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nostr_sdk::prelude::{Event, EventId, Keys, PublicKey};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::answered::Answered;
use super::finder::{Finder, Peer};
use super::follow::{Asked, Follow, FollowSink};
use super::inbox::Inbox;
use super::outbox::{Links, Note, Outbox};
use super::session::{Command, Link, Session};
use super::verify::{Counts, Inbound, Intake, Source};
use super::{Address, Clock, Error, Memory, Wire, install_crypto, lock};
use crate::store::Outgoing;

/// How the room is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Our relays: listened to, and answered on.
    pub relays: Vec<String>,
    /// Request kinds to subscribe to (5000–5999). Their cancels (kind 5) come with them.
    pub kinds: Vec<u16>,
    /// Whether relays at private addresses may be used when a stranger names them. Our own may be written
    /// as private addresses without it.
    pub allow_private: bool,
    /// Seconds of history asked on the first contact with a relay.
    pub look_back_s: u64,
    /// Seconds asked again before a cursor, for events that reached the relay late.
    pub overlap_s: u64,
    /// Seconds before now from which on live events are wanted by their own date, at least `overlap_s`.
    pub live_back_s: u64,
    /// How often history is asked for although nothing was noticed missing.
    pub refill_every: Duration,
    /// How often a cursor is written while events come.
    pub cursor_every: Duration,
    /// How often a cursor is written while none come. Less than `overlap_s`.
    pub quiet_cursor_every: Duration,
    /// Changes of the watched cancels within this time are one.
    pub watch_delay: Duration,
    /// Verified events waiting for the node; more are dropped and fetched again.
    pub inbound_capacity: usize,
    /// Threads that verify; 0: one a core.
    pub verify_threads: usize,
    /// Event ids remembered, at least.
    pub seen_capacity: usize,
    /// Events asked for a page.
    pub page_limit: usize,
    /// Relays of one customer's NIP-65 list that are told by `reads_at`; 0 looks none up.
    pub max_read_relays: usize,
    /// Where zap receipts to our key go from now on, as far as there is room; `None`: they are not asked for.
    pub receipts: Option<mpsc::Sender<Event>>,
    pub wire: Wire,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            relays: Vec::new(),
            kinds: Vec::new(),
            allow_private: false,
            look_back_s: 3600,
            overlap_s: 600,
            live_back_s: 600,
            refill_every: Duration::from_secs(600),
            cursor_every: Duration::from_secs(5),
            quiet_cursor_every: Duration::from_secs(240),
            watch_delay: Duration::from_millis(250),
            inbound_capacity: 1024,
            verify_threads: 0,
            seen_capacity: 50_000,
            page_limit: 500,
            max_read_relays: 8,
            receipts: None,
            wire: Wire::default(),
        }
    }
}

/// Starts the room.
#[derive(Debug)]
pub struct Service;

impl Service {
    /// Connects to the relays and keeps connected. Fails only for an address that is none, or without
    /// threads; a relay that cannot be reached is tried for ever.
    pub fn start(
        options: Options,
        memory: Arc<dyn Memory>,
        keys: Keys,
        clock: Clock,
    ) -> Result<(Handle, mpsc::Receiver<Inbound>), Error> {
        install_crypto();
        let me = keys.public_key();
        let (inbound, events) = mpsc::channel(options.inbound_capacity.max(1));
        let weak_inbound = inbound.downgrade();
        let intake = Arc::new(Intake::start(
            options.verify_threads,
            options.seen_capacity,
            Arc::clone(&memory),
            inbound,
        )?);
        let (watch_cancels, watched) = watch::channel(Vec::new());
        let (drain, draining) = watch::channel(false);
        let (note, notes) = mpsc::unbounded_channel();
        let (answer, answers) = mpsc::unbounded_channel();
        let answered = Arc::new(Answered::default());
        let (links, mut tasks) = (Links::default(), JoinSet::new());
        let (mut own, mut sources) = (HashMap::new(), Vec::new());
        let (reads, asked) = Inbox::new(options.max_read_relays, Arc::clone(&clock));
        let mut peers = Vec::new();
        for url in &options.relays {
            let address = Address::parse(url)?;
            if own.contains_key(&address) {
                continue;
            }
            let (commands, inbox) = mpsc::unbounded_channel();
            let (signals, heard) = mpsc::unbounded_channel();
            let source = Source::new(address.to_string(), memory.cursor(address.as_str()));
            let page = Arc::new(Mutex::new(Asked::default()));
            let link = Arc::new(Mutex::new(Link::default()));
            let sink = FollowSink {
                source: Arc::clone(&source),
                intake: Arc::clone(&intake),
                inbox: Arc::clone(&reads),
                answered: Arc::clone(&answered),
                receipts: options.receipts.clone(),
                page: Arc::clone(&page),
                signals,
                began_at: Default::default(),
            };
            tasks.spawn(
                Session {
                    allow_private: options.allow_private || address.is_plainly_private(),
                    address: address.clone(),
                    wire: options.wire.clone(),
                    keys: Some(keys.clone()),
                    clock: Arc::clone(&clock),
                    sink: Arc::new(sink),
                    commands: inbox,
                    link: Arc::clone(&link),
                    on_demand: None,
                }
                .run(),
            );
            tasks.spawn(
                Follow {
                    options: options.clone(),
                    me,
                    source: Arc::clone(&source),
                    link: Arc::clone(&link),
                    page,
                    memory: Arc::clone(&memory),
                    clock: Arc::clone(&clock),
                    commands: commands.clone(),
                    signals: heard,
                    answers: answer.clone(),
                    watched: watched.clone(),
                    inbound: weak_inbound.clone(),
                    draining: draining.clone(),
                }
                .run(),
            );
            peers.push(Peer {
                relay: source.relay.clone(),
                commands: commands.clone(),
                link: Arc::clone(&link),
            });
            lock(&links).insert(address.clone(), link);
            sources.push(source);
            own.insert(address, commands);
        }
        tasks.spawn(Finder { inbox: Arc::clone(&reads), asked, peers, draining }.run());
        let wake = Arc::new(Notify::new());
        let sessions = own.values().cloned().collect();
        let outbox = Outbox {
            memory,
            own,
            wire: options.wire,
            allow_private: options.allow_private,
            keys,
            clock,
            wake: Arc::clone(&wake),
            notes,
            note: note.clone(),
            answers,
            links: Arc::clone(&links),
        };
        let outbox = tokio::spawn(outbox.run());
        let room = Room {
            me,
            answered,
            intake,
            reads,
            wake,
            note,
            watch_cancels,
            drain,
            links,
            sources,
            sessions,
            outbox,
            tasks: Mutex::new(tasks),
        };
        Ok((Handle { room: Arc::new(room) }, events))
    }
}

/// Talks to the running room. Cheap to clone; when the last one is dropped the room ends at once.
#[derive(Debug, Clone)]
pub struct Handle {
    room: Arc<Room>,
}

#[derive(Debug)]
struct Room {
    me: PublicKey,
    answered: Arc<Answered>,
    intake: Arc<Intake>,
    reads: Arc<Inbox>,
    wake: Arc<Notify>,
    note: mpsc::UnboundedSender<Note>,
    watch_cancels: watch::Sender<Vec<EventId>>,
    drain: watch::Sender<bool>,
    links: Links,
    sources: Vec<Arc<Source>>,
    sessions: Vec<mpsc::UnboundedSender<Command>>,
    outbox: tokio::task::JoinHandle<()>,
    tasks: Mutex<JoinSet<()>>,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.outbox.abort();
    }
}

/// One relay, for people.
#[derive(Debug, Clone, serde::Serialize)]
pub struct RelayStatus {
    pub relay: String,
    /// One of ours; otherwise only answered on.
    pub ours: bool,
    #[serde(flatten)]
    pub link: Link,
    pub received: u64,
    pub verified: u64,
    pub duplicate: u64,
    pub unwanted: u64,
    pub malformed: u64,
    pub forged: u64,
    pub lagged: u64,
    /// Verified events of this relay that the node has not handled yet.
    pub open: usize,
    /// Unix seconds up to which its history was handled.
    pub cursor: Option<u64>,
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Drained {
    /// Events that some relay has not taken; they are sent after the next start.
    pub undelivered: usize,
}

impl Handle {
    /// The store owes more than before: look again.
    pub fn wake(&self) {
        self.room.wake.notify_one();
    }

    /// This was just queued in the store: send it without asking the store. Quicker than `wake`, and as safe,
    /// because the store remembers.
    pub fn owe(&self, outgoing: Outgoing) {
        if self.room.note.send(Note::Owe(Box::new(outgoing))).is_err() {
            tracing::warn!("the outbox has ended; the event is sent after the next start");
        }
    }

    /// The relays on which this key says it reads (NIP-65), at most `max_read_relays`, as far as known now. Not
    /// known: a look-up begins, and a later call may tell. Never waits.
    pub fn reads_at(&self, key: &PublicKey) -> Vec<String> {
        self.room.reads.reads_at(key)
    }

    /// The jobs that a cancel may stop now; each call replaces the ones before.
    pub fn watch_cancels(&self, jobs: Vec<EventId>) {
        self.room.watch_cancels.send_if_modified(|watched| {
            let changed = *watched != jobs;
            if changed {
                *watched = jobs;
            }
            changed
        });
    }

    /// Whether this request had a result already when the relays were first asked: by anybody where we were not asked
    /// by name, else by us.
    pub fn has_result(&self, request: &Event) -> bool {
        self.room.answered.has(request, &self.room.me)
    }

    /// All relays: ours in their order, then those being answered.
    pub fn status(&self) -> Vec<RelayStatus> {
        let links = lock(&self.room.links).clone();
        let mut all: Vec<_> = links
            .iter()
            .map(|(address, link)| {
                let link = lock(link).clone();
                let place = self.room.sources.iter().position(|source| source.relay == address.as_str());
                let source = place.and_then(|place| self.room.sources.get(place));
                (place.unwrap_or(usize::MAX), status(address, link, source))
            })
            .collect();
        all.sort_by(|(a, x), (b, y)| a.cmp(b).then_with(|| x.relay.cmp(&y.relay)));
        all.into_iter().map(|(_, status)| status).collect()
    }

    /// Takes no more events in, on any relay, until the next start; what is owed is delivered as before.
    pub fn stop_following(&self) {
        if self.room.drain.send(true).is_err() {
            tracing::trace!("no relay is followed");
        }
    }

    /// False after [`Handle::stop_following`] and [`Handle::drain`].
    pub fn is_following(&self) -> bool {
        !*self.room.drain.borrow()
    }

    /// Stops taking events in, delivers what is owed for at most `within`, writes the cursors, hangs up.
    pub async fn drain(&self, within: Duration) -> Drained {
        self.stop_following();
        let (done, flushed) = oneshot::channel();
        if self.room.note.send(Note::Flush(done)).is_err()
            || tokio::time::timeout(within, flushed).await.is_err()
        {
            tracing::warn!("some events were not delivered in time; they are sent after the next start");
        }
        let undelivered = lock(&self.room.links).values().map(|link| lock(link).owed).sum();
        for session in &self.room.sessions {
            if session.send(Command::Close).is_err() {
                tracing::trace!("a session had ended already");
            }
        }
        let mut tasks = std::mem::take(&mut *lock(&self.room.tasks));
        let ended = tokio::time::timeout(Duration::from_secs(2), async {
            while tasks.join_next().await.is_some() {}
        });
        if ended.await.is_err() {
            tracing::warn!("a relay session did not end in time; it was cut");
        }
        self.room.outbox.abort();
        Drained { undelivered }
    }

    /// No event waits for its check, and none that was handed up waits for its `done`.
    pub fn is_quiet(&self) -> bool {
        self.room.intake.is_quiet()
    }
}

fn status(address: &Address, link: Link, source: Option<&Arc<Source>>) -> RelayStatus {
    let nothing = Counts::default();
    let counts = source.map_or(&nothing, |source| &source.counts);
    RelayStatus {
        relay: address.to_string(),
        ours: source.is_some(),
        link,
        received: Counts::of(&counts.received),
        verified: Counts::of(&counts.verified),
        duplicate: Counts::of(&counts.duplicate),
        unwanted: Counts::of(&counts.unwanted),
        malformed: Counts::of(&counts.malformed),
        forged: Counts::of(&counts.forged),
        lagged: Counts::of(&counts.lagged),
        open: source.map_or(0, |source| source.progress.open()),
        cursor: source.and_then(|source| source.progress.cursor()),
    }
}
