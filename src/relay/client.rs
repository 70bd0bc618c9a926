//! The customer's side: a few relays, events published with each relay's answer, verified events received. It keeps
//! nothing on disk and has no opinion on kinds.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nostr_sdk::prelude::{Event, Filter, JsonUtil, Keys};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::delivery::Delivery;
use super::fill::{Fill, Page};
use super::session::{Command, Link, Session, Signal, Sink};
use super::subscriptions::Life;
use super::verify::{Counts, Wanted, check};
use super::{Address, Error, Glance, Wire, install_crypto, lock};
use crate::clock;
use crate::store::record::Answer;

/// Events waiting for a reader of one subscription; then the relays are held back.
const WAITING: usize = 1024;
/// Stored events asked for at a time.
const PAGE: usize = 500;
const LEAST_PAGE: usize = 50;
/// Ids remembered for one subscription; an older event may come twice.
const SEEN: usize = 65_536;

/// A relay's answer to a published event.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Published {
    pub relay: String,
    pub answer: Answer,
}

/// A verified event that matches its subscription.
#[derive(Debug, Clone)]
pub struct Received {
    pub event: Event,
    /// The relay that was first.
    pub relay: String,
}

/// What relays have stored.
#[derive(Debug, Default)]
pub struct Stored {
    /// Newest first, each once.
    pub events: Vec<Event>,
    /// Relays that were not heard to the end: they may have more.
    pub cut: Vec<String>,
}

/// Connections to some relays. Dropping it cuts them; `close` says goodbye first.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    relays: Vec<Relay>,
    tasks: JoinSet<()>,
}

#[derive(Debug)]
struct Relay {
    name: String,
    commands: mpsc::UnboundedSender<Command>,
    link: Arc<Mutex<Link>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Counts up with every change that somebody may wait for.
    changed: watch::Sender<u64>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    subscriptions: HashMap<String, Listener>,
    /// Answers by event, then relay.
    answers: HashMap<[u8; 32], BTreeMap<usize, Answer>>,
    connected: HashSet<usize>,
}

#[derive(Debug)]
struct Listener {
    events: mpsc::Sender<Received>,
    seen: HashSet<[u8; 32]>,
    /// Relays that have sent all they had stored (true), or will not.
    told: HashMap<usize, bool>,
}

/// Events of one subscription, from all relays, each once. Dropping it unsubscribes.
#[derive(Debug)]
pub struct Subscription {
    id: String,
    events: mpsc::Receiver<Received>,
    shared: Arc<Shared>,
    relays: Vec<mpsc::UnboundedSender<Command>>,
}

impl Subscription {
    /// The next event; `None` when the client is gone.
    pub async fn next(&mut self) -> Option<Received> {
        self.events.recv().await
    }

    /// Waits until every relay has sent what it had stored, or `within` is over: how many have.
    pub async fn stored(&self, within: Duration) -> usize {
        let all = self.relays.len();
        let told = || lock(&self.shared.state).subscriptions.get(&self.id).map_or(all, |l| l.told.len());
        self.shared.until(within, || told() >= all).await;
        told()
    }

    /// Hands on every event until this relay has told all it has stored (true), or will not.
    async fn gather(&mut self, relay: usize, mut take: impl FnMut(Event)) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut changes = shared.changed.subscribe();
        loop {
            while let Ok(received) = self.events.try_recv() {
                take(received.event);
            }
            let told =
                lock(&shared.state).subscriptions.get(&self.id).and_then(|l| l.told.get(&relay).copied());
            if let Some(whole) = told
                && self.events.is_empty()
            {
                return whole;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return false },
                received = self.events.recv() => match received {
                    Some(received) => take(received.event),
                    None => return false,
                },
            }
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        lock(&self.shared.state).subscriptions.remove(&self.id);
        for relay in &self.relays {
            if relay.send(Command::Unsubscribe(self.id.clone())).is_err() {
                tracing::trace!("a relay's session ended first");
            }
        }
    }
}

impl Client {
    /// Connects to all of them and waits at most `within` for the first; the others go on trying. `keys` answer a
    /// relay that asks who we are. Private addresses need `allow_private` unless they are written as such.
    pub async fn connect(
        relays: &[String],
        keys: Option<Keys>,
        allow_private: bool,
        wire: Wire,
        within: Duration,
    ) -> Result<Self, Error> {
        install_crypto();
        let mut addresses: Vec<Address> = Vec::new();
        for relay in relays {
            let address = Address::parse(relay)?;
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            return Err(Error::NoRelay("none was named".into()));
        }
        let shared = Arc::new(Shared::default());
        let (mut tasks, mut started) = (JoinSet::new(), Vec::new());
        for (index, address) in addresses.into_iter().enumerate() {
            let (commands, inbox) = mpsc::unbounded_channel();
            let link = Arc::new(Mutex::new(Link::default()));
            let name = address.to_string();
            let sink = ClientSink { shared: Arc::clone(&shared), index, name: name.clone() };
            let session = Session {
                allow_private: allow_private || address.is_plainly_private(),
                address,
                wire: wire.clone(),
                keys: keys.clone(),
                clock: clock::system(),
                sink: Arc::new(sink),
                commands: inbox,
                link: Arc::clone(&link),
                on_demand: None,
            };
            tasks.spawn(session.run());
            started.push(Relay { name, commands, link });
        }
        let client = Self { shared, relays: started, tasks };
        client.shared.until(within, || !lock(&client.shared.state).connected.is_empty()).await;
        if lock(&client.shared.state).connected.is_empty() {
            let trouble = client.troubles();
            return Err(Error::NoRelay(trouble));
        }
        Ok(client)
    }

    /// Ends every connection in order, within a second; what is still on its way is lost.
    pub async fn close(mut self) {
        for relay in &self.relays {
            if relay.commands.send(Command::Close).is_err() {
                tracing::trace!(relay = relay.name, "the session had ended already");
            }
        }
        let ended = tokio::time::timeout(Duration::from_secs(1), async {
            while self.tasks.join_next().await.is_some() {}
        });
        if ended.await.is_err() {
            tracing::debug!("a relay session did not end in time; it is cut");
        }
    }

    /// The relays that are connected now.
    pub fn connected(&self) -> Vec<String> {
        let state = lock(&self.shared.state);
        let up =
            |(index, relay): (usize, &Relay)| state.connected.contains(&index).then(|| relay.name.clone());
        self.relays.iter().enumerate().filter_map(up).collect()
    }

    /// Sends an event to every relay and waits at most `within` for their answers. A relay that did not give a
    /// last word in time has `GaveUp` with its last trouble.
    pub async fn publish(&self, event: &Event, within: Duration) -> Vec<Published> {
        let id = event.id.to_bytes();
        lock(&self.shared.state).answers.insert(id, BTreeMap::new());
        let json: Arc<str> = event.as_json().into();
        let give_up_ms =
            clock::now_ms().saturating_add(u64::try_from(within.as_millis()).unwrap_or(u64::MAX));
        for relay in &self.relays {
            let delivery =
                Delivery { id, names: vec![relay.name.clone()], json: Arc::clone(&json), give_up_ms };
            if relay.commands.send(Command::Deliver(delivery)).is_err() {
                tracing::trace!(relay = relay.name, "the session has ended");
            }
        }
        let answered = || lock(&self.shared.state).answers.get(&id).map_or(0, BTreeMap::len);
        self.shared.until(within, || answered() >= self.relays.len()).await;
        let mut answers = lock(&self.shared.state).answers.remove(&id).unwrap_or_default();
        let missing = |relay: &Relay| {
            let trouble = lock(&relay.link).trouble.clone();
            Answer::GaveUp { reason: trouble.unwrap_or_else(|| "no answer in time".into()) }
        };
        self.relays
            .iter()
            .enumerate()
            .map(|(index, relay)| Published {
                relay: relay.name.clone(),
                answer: answers.remove(&index).unwrap_or_else(|| missing(relay)),
            })
            .collect()
    }

    /// Subscribes at every relay, over breaks and reconnects, until dropped.
    pub fn subscribe(&self, filters: Vec<Filter>) -> Subscription {
        self.listen(filters, Life::Always, &self.relays)
    }

    /// What the relays have stored, newest first, each event once; waits at most `within` for the slowest.
    pub async fn query(&self, filters: Vec<Filter>, within: Duration) -> Vec<Event> {
        self.stored(filters, within).await.events
    }

    /// As [`Client::query`], and which relays may have more. Of a filter without a limit, or with more than a relay sends
    /// at once, the next page is asked until there is none.
    pub async fn stored(&self, filters: Vec<Filter>, within: Duration) -> Stored {
        let until = Instant::now() + within;
        let told =
            self.relays.iter().enumerate().map(|(index, relay)| self.history(index, relay, &filters, until));
        let told = futures_util::future::join_all(told).await;
        let mut all = Stored::default();
        let mut known = HashSet::new();
        for (relay, (events, whole)) in self.relays.iter().zip(told) {
            all.events.extend(events.into_iter().filter(|event| known.insert(event.id)));
            if !whole {
                all.cut.push(relay.name.clone());
            }
        }
        all.events.sort();
        all
    }

    /// All that one relay has, and whether it said that this is all.
    async fn history(
        &self,
        index: usize,
        relay: &Relay,
        filters: &[Filter],
        until: Instant,
    ) -> (Vec<Event>, bool) {
        let (mut found, mut known) = (Vec::new(), HashSet::new());
        for filter in filters {
            let most = filter.limit.unwrap_or(usize::MAX);
            let since = filter.since.map_or(0, |since| since.as_secs());
            // Of a few the first may be unreadable: what was asked for is behind it.
            let mut fill = Fill::new(vec![filter.clone()], since, most.clamp(LEAST_PAGE, PAGE));
            let mut count = 0;
            while let Some(page) = fill.next().filter(|_| count < most) {
                let mut subscription = self.listen(vec![page], Life::Once, std::slice::from_ref(relay));
                let mut page = Page::default();
                let gathered = subscription.gather(index, |event| {
                    page.note(event.created_at.as_secs());
                    if known.insert(event.id) && count < most {
                        count += 1;
                        found.push(event);
                    }
                });
                let whole = tokio::time::timeout_at(until, gathered).await.unwrap_or(false);
                if !whole || !fill.page(page) {
                    tracing::debug!(relay = relay.name, "a relay did not tell all it has stored");
                    return (found, false);
                }
            }
        }
        (found, true)
    }

    fn listen(&self, filters: Vec<Filter>, life: Life, relays: &[Relay]) -> Subscription {
        let (sender, events) = mpsc::channel(WAITING);
        let id = {
            let mut state = lock(&self.shared.state);
            state.next += 1;
            let id = format!("c{}", state.next);
            let listener = Listener { events: sender, seen: HashSet::new(), told: HashMap::new() };
            state.subscriptions.insert(id.clone(), listener);
            id
        };
        let wanted = Wanted::new(filters);
        for relay in relays {
            let command = Command::Subscribe(id.clone(), Arc::clone(&wanted), life);
            if relay.commands.send(command).is_err() {
                tracing::trace!(relay = relay.name, "the session has ended");
            }
        }
        let relays = relays.iter().map(|relay| relay.commands.clone()).collect();
        Subscription { id, events, shared: Arc::clone(&self.shared), relays }
    }

    fn troubles(&self) -> String {
        let trouble = |relay: &Relay| {
            let trouble = lock(&relay.link).trouble.clone();
            format!("{}: {}", relay.name, trouble.as_deref().unwrap_or("no answer yet"))
        };
        self.relays.iter().map(trouble).collect::<Vec<_>>().join("; ")
    }
}

impl Shared {
    fn change(&self) {
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Waits until it is so, at most `within`.
    async fn until(&self, within: Duration, so: impl Fn() -> bool) {
        let mut changes = self.changed.subscribe();
        let wait = async {
            while !so() {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        if tokio::time::timeout(within, wait).await.is_err() {
            tracing::trace!("waited in vain");
        }
    }
}

struct ClientSink {
    shared: Arc<Shared>,
    index: usize,
    name: String,
}

impl Sink for ClientSink {
    async fn event(&self, subscription: &str, wanted: &Arc<Wanted>, glance: Glance, frame: Utf8Bytes) {
        let counts = &self.shared.counts;
        let known = |state: &State| {
            state.subscriptions.get(subscription).is_none_or(|listener| listener.seen.contains(&glance.id))
        };
        if !wanted.may_match(&glance) || known(&lock(&self.shared.state)) {
            return;
        }
        let Some(event) = check(&frame, wanted, counts) else { return };
        let events = {
            let mut state = lock(&self.shared.state);
            let Some(listener) = state.subscriptions.get_mut(subscription) else { return };
            if listener.seen.len() >= SEEN {
                listener.seen.clear();
            }
            // Marked only now: a forged copy must not hide the good one.
            if !listener.seen.insert(event.id.to_bytes()) {
                return;
            }
            listener.events.clone()
        };
        if events.send(Received { event, relay: self.name.clone() }).await.is_err() {
            tracing::trace!("nobody reads this subscription any more");
        }
    }

    fn signal(&self, signal: Signal) {
        {
            let mut state = lock(&self.shared.state);
            match signal {
                Signal::Connected(_) => {
                    state.connected.insert(self.index);
                }
                Signal::Disconnected(_) => {
                    state.connected.remove(&self.index);
                    for listener in state.subscriptions.values_mut() {
                        listener.told.entry(self.index).or_insert(false);
                    }
                }
                Signal::EndOfStored(id) => {
                    if let Some(listener) = state.subscriptions.get_mut(&id) {
                        listener.told.insert(self.index, true);
                    }
                }
                Signal::Closed { subscription: id, .. } => {
                    if let Some(listener) = state.subscriptions.get_mut(&id) {
                        listener.told.entry(self.index).or_insert(false);
                    }
                }
                Signal::Answered(delivery, answer) => {
                    if let Some(answers) = state.answers.get_mut(&delivery.id) {
                        answers.insert(self.index, answer);
                    }
                }
                Signal::Authenticated | Signal::Ended => {}
            }
        }
        self.shared.change();
    }

    fn is_hostile(&self) -> bool {
        Counts::of(&self.shared.counts.forged) > 1000
    }
}
