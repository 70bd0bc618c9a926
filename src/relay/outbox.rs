//! Delivery of what the store says is owed: hands each event to the session of each relay, makes sessions for
//! relays that are not ours, and writes down every relay's last word. When to try again is `delivery.rs`'s.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nostr_sdk::prelude::{EventId, Keys};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::delivery::Delivery;
use super::session::{Command, Link, Session, Signal, Sink};
use super::verify::Wanted;
use super::{Address, Clock, Glance, Memory, Wire, lock};
use crate::store::record::{Answer, Record};
use crate::store::{Outgoing, Owed};

/// Connections at a time to relays that are not ours.
const CONNECTIONS: usize = 32;
/// Such relays known at a time; more have to wait for a scan.
const RELAYS: usize = 512;
/// Of these, relays on one host and port: a path costs a stranger nothing.
const A_HOST: usize = 4;
/// How long a relay that is not ours is tried. The answer is at the relay of the request and at ours, too.
const OTHERS_PATIENCE: Duration = Duration::from_secs(15 * 60);
/// Of what such a relay sends only the OK is wanted, bytes.
const OTHERS_FRAME: usize = 64 << 10;
/// Events handed to one session at a time; more stay in the store until it has room.
const A_SESSION: usize = 256;
/// The store is asked this often although nobody woke us.
const SCAN_EVERY: Duration = Duration::from_secs(30);

pub(super) enum Note {
    /// A freshly queued event, so that no scan is needed.
    Owe(Box<Outgoing>),
    /// A session of one of our relays, or of another, has an answer.
    Signal(Signal),
    /// The session for this relay is over.
    Ended(Address),
    /// Tell when nothing is owed.
    Flush(oneshot::Sender<()>),
}

/// Sessions by relay, ours and those made to answer, for `status`.
pub(super) type Links = Arc<Mutex<HashMap<Address, Arc<Mutex<Link>>>>>;

pub(super) struct Outbox {
    pub(super) memory: Arc<dyn Memory>,
    pub(super) own: HashMap<Address, mpsc::UnboundedSender<Command>>,
    pub(super) wire: Wire,
    pub(super) allow_private: bool,
    pub(super) keys: Keys,
    pub(super) clock: Clock,
    pub(super) wake: Arc<Notify>,
    pub(super) notes: mpsc::UnboundedReceiver<Note>,
    pub(super) note: mpsc::UnboundedSender<Note>,
    /// Answers passed on by the followers of our relays.
    pub(super) answers: mpsc::UnboundedReceiver<Signal>,
    pub(super) links: Links,
}

struct State {
    /// What was handed out or answered, by event, then by the relay's name as queued.
    tracked: HashMap<[u8; 32], HashMap<String, Track>>,
    handed: HashMap<Address, usize>,
    others: HashMap<Address, mpsc::UnboundedSender<Command>>,
    turns: Arc<Semaphore>,
    sessions: JoinSet<()>,
    flush: Vec<oneshot::Sender<()>>,
    /// A session had its fill, and more is owed to it.
    more: bool,
    /// What an earlier life of the node owed was looked through.
    sorted: bool,
}

impl State {
    /// There are as many relays on this host as are taken, and this is another one.
    fn is_crowded(&self, address: &Address) -> bool {
        !self.others.contains_key(address)
            && self.others.keys().filter(|other| other.shares_host(address)).count() >= A_HOST
    }
}

enum Track {
    Handed(Address),
    /// The last word is on its way into the store.
    Answered,
}

impl Outbox {
    pub(super) async fn run(mut self) {
        let mut state = State {
            tracked: HashMap::new(),
            handed: HashMap::new(),
            others: HashMap::new(),
            turns: Arc::new(Semaphore::new(CONNECTIONS)),
            sessions: JoinSet::new(),
            flush: Vec::new(),
            more: false,
            sorted: false,
        };
        let wake = Arc::clone(&self.wake);
        let mut timer = tokio::time::interval(SCAN_EVERY);
        loop {
            tokio::select! {
                // The first tick comes at once: what an earlier run owed.
                _ = timer.tick() => self.scan(&mut state),
                () = wake.notified() => self.scan(&mut state),
                Some(signal) = self.answers.recv() => self.on_signal(&mut state, signal),
                Some(_) = state.sessions.join_next() => {}
                note = self.notes.recv() => match note {
                    None => return,
                    Some(Note::Owe(outgoing)) => {
                        let Outgoing { event, job, json, relays_left, give_up_ms } = *outgoing;
                        let owed = Owed { event, job, relays_left, give_up_ms };
                        self.hand_out(&mut state, &owed, Some(json.into()));
                    }
                    Some(Note::Signal(signal)) => self.on_signal(&mut state, signal),
                    Some(Note::Ended(address)) => self.on_ended(&mut state, &address),
                    Some(Note::Flush(done)) => {
                        self.scan(&mut state);
                        state.flush.push(done);
                    }
                },
            }
            if !state.flush.is_empty() && state.handed.is_empty() {
                for done in state.flush.drain(..) {
                    if done.send(()).is_err() {
                        tracing::trace!("nobody waits for the outbox any more");
                    }
                }
            }
        }
    }

    /// Everything owed that is not handed out yet; forgets what the store has put away.
    fn scan(&mut self, state: &mut State) {
        state.more = false;
        let owed = self.memory.owed();
        let ids: std::collections::HashSet<_> = owed.iter().filter_map(|o| id(&o.event)).collect();
        state.tracked.retain(|id, relays| {
            ids.contains(id) || relays.values().any(|track| matches!(track, Track::Handed(_)))
        });
        if !std::mem::replace(&mut state.sorted, true) {
            self.drop_for_left_relays(state, &owed);
        }
        for owed in &owed {
            self.hand_out(state, owed, None);
        }
    }

    /// The node's own events were owed to its relays only: to one that left the configuration they are dropped. A
    /// customer may read there, so answers are still tried, for as long as at any relay that is not ours.
    fn drop_for_left_relays(&self, state: &mut State, owed: &[Owed]) {
        let mut left: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for owed in owed {
            let Some(id) = id(&owed.event) else { continue };
            for name in &owed.relays_left {
                if Address::parse(name).is_ok_and(|address| self.own.contains_key(&address)) {
                    continue;
                }
                let (dropped, tried) = left.entry(name).or_default();
                if owed.job.is_some() {
                    *tried += 1;
                    continue;
                }
                *dropped += 1;
                let reason = "the relay is not in the configuration any more".into();
                self.last_word(state, id, name, Answer::GaveUp { reason });
            }
        }
        for (relay, (dropped, tried)) in left.into_iter().filter(|(_, (dropped, _))| *dropped > 0) {
            let words = "not in the configuration any more: announcements owed to it are dropped, answers tried for a while";
            tracing::warn!(relay, dropped, tried, "{words}");
        }
    }

    /// `json` is the event's text, if it is at hand; otherwise it is read for the first session that has room, so
    /// that what nobody takes costs no memory.
    fn hand_out(&mut self, state: &mut State, owed: &Owed, mut json: Option<Arc<str>>) {
        let Some(id) = id(&owed.event) else {
            tracing::error!(event = owed.event, "an owed event has no proper id; it cannot be sent");
            return;
        };
        for name in &owed.relays_left {
            if state.tracked.get(&id).is_some_and(|relays| relays.contains_key(name)) {
                continue;
            }
            let address = match Address::parse(name) {
                Ok(address) => address,
                Err(error) => {
                    self.last_word(state, id, name, Answer::Rejected { reason: error.to_string() });
                    continue;
                }
            };
            if state.handed.get(&address).is_some_and(|handed| *handed >= A_SESSION) {
                state.more = true;
                continue;
            }
            let mut give_up_ms = owed.give_up_ms;
            if !self.own.contains_key(&address) {
                if state.is_crowded(&address) {
                    let reason = "too many relays of one host to answer at".into();
                    self.last_word(state, id, name, Answer::GaveUp { reason });
                    continue;
                }
                let patience_ms = u64::try_from(OTHERS_PATIENCE.as_millis()).unwrap_or(u64::MAX);
                give_up_ms = give_up_ms.min((self.clock)().saturating_add(patience_ms));
            }
            let Some(session) = self.session(state, &address) else {
                if owed.give_up_ms <= (self.clock)() {
                    let reason = "too many relays to answer at once".into();
                    self.last_word(state, id, name, Answer::GaveUp { reason });
                }
                continue;
            };
            let Some(text) = json.take().or_else(|| self.memory.event(&owed.event).map(Into::into)) else {
                return;
            };
            json = Some(Arc::clone(&text));
            let delivery = Delivery { id, names: vec![name.clone()], json: text, give_up_ms };
            // A session that ended just now says so; then this is handed out again.
            if session.send(Command::Deliver(delivery)).is_ok() {
                *state.handed.entry(address.clone()).or_default() += 1;
                state.tracked.entry(id).or_default().insert(name.clone(), Track::Handed(address));
            }
        }
    }

    /// The session for this relay: ours, one made before, or a new one if there is room.
    fn session(&mut self, state: &mut State, address: &Address) -> Option<mpsc::UnboundedSender<Command>> {
        if let Some(own) = self.own.get(address) {
            return Some(own.clone());
        }
        if let Some(other) = state.others.get(address) {
            return Some(other.clone());
        }
        if state.others.len() >= RELAYS {
            return None;
        }
        let (commands, inbox) = mpsc::unbounded_channel();
        let link = Arc::new(Mutex::new(Link::default()));
        lock(&self.links).insert(address.clone(), Arc::clone(&link));
        let session = Session {
            address: address.clone(),
            allow_private: self.allow_private,
            wire: Wire { max_frame_bytes: OTHERS_FRAME, max_event_bytes: OTHERS_FRAME, ..self.wire.clone() },
            keys: Some(self.keys.clone()),
            clock: Arc::clone(&self.clock),
            sink: Arc::new(AnswerSink { address: address.clone(), note: self.note.clone() }),
            commands: inbox,
            link,
            on_demand: Some(Arc::clone(&state.turns)),
        };
        state.sessions.spawn(session.run());
        state.others.insert(address.clone(), commands.clone());
        Some(commands)
    }

    fn on_signal(&mut self, state: &mut State, signal: Signal) {
        if let Signal::Answered(delivery, answer) = signal {
            for name in &delivery.names {
                self.last_word(state, delivery.id, name, answer.clone());
            }
        }
    }

    fn on_ended(&mut self, state: &mut State, address: &Address) {
        state.others.remove(address);
        state.handed.remove(address);
        lock(&self.links).remove(address);
        let mut lost = false;
        for relays in state.tracked.values_mut() {
            let before = relays.len();
            relays.retain(|_, track| !matches!(track, Track::Handed(to) if to == address));
            lost |= relays.len() < before;
        }
        if lost {
            self.scan(state);
        }
    }

    fn last_word(&self, state: &mut State, id: [u8; 32], name: &str, answer: Answer) {
        let event = hex::encode(id);
        match &answer {
            Answer::GaveUp { reason } => {
                tracing::info!(event, relay = name, reason, "given up: not delivered there")
            }
            answer => tracing::debug!(event, relay = name, ?answer, "a relay's last word"),
        }
        let record = Record::Delivered { event, relay: name.to_owned(), answer };
        self.memory.append_lazily(vec![record]);
        let before = state.tracked.entry(id).or_default().insert(name.to_owned(), Track::Answered);
        if let Some(Track::Handed(address)) = before
            && let Some(handed) = state.handed.get_mut(&address)
        {
            *handed = handed.saturating_sub(1);
            if state.more && *handed == A_SESSION / 2 {
                self.wake.notify_one();
            }
            if *handed == 0 {
                state.handed.remove(&address);
            }
        }
    }
}

fn id(hex_id: &str) -> Option<[u8; 32]> {
    EventId::from_hex(hex_id).ok().map(EventId::to_bytes)
}

/// Listens to a relay that is only delivered to: no event of its is wanted.
struct AnswerSink {
    address: Address,
    note: mpsc::UnboundedSender<Note>,
}

impl Sink for AnswerSink {
    async fn event(&self, _: &str, _: &Arc<Wanted>, _: Glance, _: Utf8Bytes) {}

    fn signal(&self, signal: Signal) {
        let note = match signal {
            Signal::Ended => Note::Ended(self.address.clone()),
            answered @ Signal::Answered(..) => Note::Signal(answered),
            _ => return,
        };
        if self.note.send(note).is_err() {
            tracing::trace!("a relay answered after the outbox ended");
        }
    }
}
