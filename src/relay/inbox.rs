//! Where customers read (NIP-65): what our own relays have told, remembered for a while and for so many. Nobody
//! waits here; the asking is `finder.rs`'s. Whether such a relay may be dialled is judged when it is, after
//! resolving its name (`address.rs`); which answers go there is `job`'s business.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use nostr_sdk::prelude::{Event, EventId, PublicKey};
use tokio::sync::{Notify, mpsc};

use super::session::Signal;
use super::verify::{Counts, Source, Wanted, check};
use super::{Address, Clock, Glance, lock};

/// Subscription ids that begin so are ours.
const PREFIX: &str = "reads-";
/// Customers waiting to be asked for; one more is looked up when it is asked for again.
const WAITING: usize = 256;
/// Customers remembered.
const REMEMBERED: usize = 1024;
/// Relays keep one 10002 an author. More than this many times as many are not worth their check.
const SURPLUS: usize = 2;
/// A list that was found is looked up again after this long, milliseconds.
const FOUND_MS: u64 = 60 * 60_000;
/// The same when every relay said that there is none.
const NONE_MS: u64 = 10 * 60_000;
/// The same when no relay could say.
const UNKNOWN_MS: u64 = 15_000;

/// What is known about customers' read relays.
pub(super) struct Inbox {
    state: Mutex<State>,
    /// One more relay has told all it has, or will not.
    told: Notify,
    ask: mpsc::Sender<PublicKey>,
    clock: Clock,
    /// Most relays kept of one customer.
    most: usize,
}

#[derive(Default)]
struct State {
    known: HashMap<PublicKey, Known>,
    round: Round,
}

struct Known {
    relays: Vec<String>,
    /// Of the list that the relays are from, Unix seconds and id; `None`: none was found yet.
    list: Option<(u64, EventId)>,
    /// Unix milliseconds after which this is forgotten.
    until_ms: u64,
}

/// The REQ that is open; there is one at a time.
#[derive(Default)]
struct Round {
    number: u64,
    id: String,
    /// Relays that have not told all yet, each with the events that it may still send.
    left: HashMap<String, usize>,
    /// Every relay asked has told all it has stored.
    whole: bool,
}

impl Inbox {
    /// `most`: relays kept of one customer; 0 asks for none. The receiver is for the finder.
    pub(super) fn new(most: usize, clock: Clock) -> (Arc<Self>, mpsc::Receiver<PublicKey>) {
        let (ask, asked) = mpsc::channel(WAITING);
        let state = Mutex::new(State::default());
        (Arc::new(Self { state, told: Notify::new(), ask, clock, most }), asked)
    }

    /// The relays on which this key says it reads, as far as known now. Not known: a look-up begins.
    pub(super) fn reads_at(&self, key: &PublicKey) -> Vec<String> {
        if self.most == 0 {
            return Vec::new();
        }
        let now_ms = (self.clock)();
        let mut state = self.lock();
        if let Some(known) = state.known.get(key).filter(|known| now_ms < known.until_ms) {
            return known.relays.clone();
        }
        state.known.remove(key);
        if self.ask.try_send(*key).is_ok() {
            state.make_room(now_ms);
            state.known.insert(*key, Known::nothing(now_ms));
        }
        Vec::new()
    }

    /// An event that came under a subscription of ours, not verified yet.
    pub(super) fn hear(
        &self,
        source: &Source,
        subscription: &str,
        wanted: &Wanted,
        glance: &Glance,
        frame: &str,
    ) {
        if !wanted.may_match(glance) {
            return Counts::add(&source.counts.unwanted);
        }
        {
            let mut state = self.lock();
            let asked = state.round.id == subscription;
            let left = state.round.left.get_mut(&source.relay).filter(|left| asked && **left > 0);
            let Some(left) = left else { return };
            *left -= 1;
        }
        let Some(event) = check(frame, wanted, &source.counts) else { return };
        let until_ms = (self.clock)().saturating_add(FOUND_MS);
        if let Some(known) = self.lock().known.get_mut(&event.pubkey) {
            known.take(&event, self.most, until_ms);
        }
    }

    /// Keeps what a session says about subscriptions of ours; the rest comes back.
    pub(super) fn sort_out(&self, relay: &str, signal: Signal) -> Option<Signal> {
        match signal {
            Signal::EndOfStored(id) if is_ours(&id) => self.tell(relay, &id, true),
            Signal::Closed { subscription, .. } if is_ours(&subscription) => {
                self.tell(relay, &subscription, false);
            }
            signal @ Signal::Disconnected(_) => {
                let open = self.lock().round.id.clone();
                self.tell(relay, &open, false);
                return Some(signal);
            }
            Signal::Authenticated => {
                // Before it knew us, a relay may have kept a list to itself.
                let now_ms = (self.clock)();
                let mut state = self.lock();
                state.known.values_mut().filter(|known| known.list.is_none()).for_each(|known| {
                    known.until_ms = known.until_ms.min(now_ms.saturating_add(UNKNOWN_MS));
                });
                return Some(Signal::Authenticated);
            }
            other => return Some(other),
        }
        None
    }

    /// This relay will say no more; `all`: because it has told all it has.
    pub(super) fn tell(&self, relay: &str, id: &str, all: bool) {
        let mut state = self.lock();
        if state.round.id == id && state.round.left.remove(relay).is_some() {
            state.round.whole &= all;
            drop(state);
            self.told.notify_one();
        }
    }

    /// Opens a round; its subscription id.
    pub(super) fn begin(&self, relays: impl Iterator<Item = String>, authors: usize) -> String {
        let mut state = self.lock();
        let number = state.round.number + 1;
        let left: HashMap<_, _> = relays.map(|relay| (relay, authors * SURPLUS)).collect();
        let id = format!("{PREFIX}{number}");
        state.round = Round { number, id: id.clone(), whole: !left.is_empty(), left };
        id
    }

    pub(super) async fn all_told(&self) {
        while !self.lock().round.left.is_empty() {
            self.told.notified().await;
        }
    }

    /// Closes the round. How long nothing is believed to be nothing depends on who said so.
    pub(super) fn end(&self, authors: &[PublicKey]) {
        let now_ms = (self.clock)();
        let mut state = self.lock();
        let whole = state.round.whole && state.round.left.is_empty();
        state.round.id.clear();
        let until_ms = now_ms.saturating_add(if whole { NONE_MS } else { UNKNOWN_MS });
        for author in authors {
            if let Some(known) = state.known.get_mut(author).filter(|known| known.list.is_none()) {
                known.until_ms = until_ms;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").field("known", &self.lock().known.len()).finish_non_exhaustive()
    }
}

impl State {
    fn make_room(&mut self, now_ms: u64) {
        if self.known.len() < REMEMBERED {
            return;
        }
        self.known.retain(|_, known| now_ms < known.until_ms);
        while self.known.len() >= REMEMBERED {
            let next = self.known.iter().min_by_key(|(_, known)| known.until_ms).map(|(key, _)| *key);
            let Some(next) = next else { return };
            self.known.remove(&next);
        }
    }
}

impl Known {
    fn nothing(now_ms: u64) -> Self {
        Self { relays: Vec::new(), list: None, until_ms: now_ms.saturating_add(UNKNOWN_MS) }
    }

    /// The newest list counts; of two of one second, the one with the lower id (NIP-01).
    fn take(&mut self, event: &Event, most: usize, until_ms: u64) {
        let at = event.created_at.as_secs();
        let newer = self.list.is_none_or(|(then, id)| at > then || (at == then && event.id < id));
        if newer {
            *self = Self { relays: read_relays(event, most), list: Some((at, event.id)), until_ms };
        }
    }
}

pub(super) fn is_ours(subscription: &str) -> bool {
    subscription.starts_with(PREFIX)
}

/// The first `most` relays of a kind 10002 that are for reading: `r` tags without a marker or with `read`.
fn read_relays(event: &Event, most: usize) -> Vec<String> {
    let mut relays = Vec::new();
    for tag in event.tags.iter() {
        let [name, url, rest @ ..] = tag.as_slice() else { continue };
        if name != "r" || rest.first().is_some_and(|marker| !matches!(marker.as_str(), "" | "read")) {
            continue;
        }
        let Ok(address) = Address::parse(url) else { continue };
        let address = address.to_string();
        if relays.len() < most && !relays.contains(&address) {
            relays.push(address);
        }
    }
    relays
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use nostr_sdk::prelude::{EventBuilder, Filter, JsonUtil, Keys, Kind, Tag, Timestamp};

    use super::*;
    use crate::relay::message::{self, Message};

    const START_MS: u64 = 1_790_000_000_000;

    struct Room {
        inbox: Arc<Inbox>,
        asked: mpsc::Receiver<PublicKey>,
        now_ms: Arc<AtomicU64>,
        source: Arc<Source>,
    }

    fn room() -> Room {
        let now_ms = Arc::new(AtomicU64::new(START_MS));
        let hands = Arc::clone(&now_ms);
        let (inbox, asked) = Inbox::new(2, Arc::new(move || hands.load(Ordering::Relaxed)));
        Room { inbox, asked, now_ms, source: Source::new("wss://ours".into(), None) }
    }

    impl Room {
        pub(super) fn begin(&self) -> String {
            self.inbox.begin(["wss://ours".to_string()].into_iter(), 1)
        }

        fn hear(&self, id: &str, asked_for: &Keys, event: &str) {
            let frame = format!(r#"["EVENT","{id}",{event}]"#);
            let Some(Message::Event { glance, .. }) = message::look(&frame) else { panic!("{frame}") };
            let filter = Filter::new().kind(Kind::RelayList).author(asked_for.public_key());
            self.inbox.hear(&self.source, id, &Wanted::new(vec![filter]), &glance, &frame);
        }

        fn pass(&self, ms: u64) {
            self.now_ms.fetch_add(ms, Ordering::Relaxed);
        }
    }

    fn list(keys: &Keys, at: u64, rows: &[&[&str]]) -> Event {
        EventBuilder::new(Kind::RelayList, "")
            .tags(rows.iter().map(|row| Tag::parse(row.iter().copied()).unwrap()))
            .custom_created_at(Timestamp::from(at))
            .sign_with_keys(keys)
            .unwrap()
    }

    #[test]
    fn relays_without_a_marker_or_for_reading_are_taken_up_to_the_cap() {
        let rows: &[&[&str]] = &[
            &["r", "wss://writes", "write"],
            &["r", "wss://Both/"],
            &["r", "https://no.relay"],
            &["r"],
            &["r", "wss://both", "read"],
            &["p", "wss://not.r"],
            &["r", "wss://else", "outbox"],
            &["r", "wss://reads", "read"],
            &["r", "wss://third", ""],
        ];
        let event = list(&Keys::generate(), 1, rows);
        assert_eq!(read_relays(&event, 8), ["wss://both", "wss://reads", "wss://third"]);
        assert_eq!(read_relays(&event, 2), ["wss://both", "wss://reads"]);
    }

    #[test]
    fn a_customer_is_asked_for_once_and_known_as_soon_as_a_relay_has_told() {
        let (mut room, keys) = (room(), Keys::generate());
        let key = keys.public_key();
        assert!(room.inbox.reads_at(&key).is_empty() && room.inbox.reads_at(&key).is_empty());
        assert_eq!(room.asked.try_recv(), Ok(key));
        assert!(room.asked.try_recv().is_err(), "once");
        let id = room.begin();
        room.hear(&id, &keys, &list(&keys, 1, &[&["r", "wss://a"]]).as_json());
        assert_eq!(room.inbox.reads_at(&key), ["wss://a"], "before the round has ended");
    }

    #[test]
    fn the_newest_list_counts_and_a_forged_one_does_not() {
        let (room, keys) = (room(), Keys::generate());
        room.inbox.reads_at(&keys.public_key());
        let id = room.inbox.begin(["wss://ours".to_string()].into_iter(), 9);
        let forged = list(&keys, 9, &[&["r", "wss://a"]]).as_json().replace("wss://a", "wss://evil");
        let strangers = list(&Keys::generate(), 9, &[&["r", "wss://evil"]]).as_json();
        for event in [
            list(&keys, 2, &[&["r", "wss://new"]]).as_json(),
            list(&keys, 1, &[&["r", "wss://old"]]).as_json(),
            forged,
            strangers,
        ] {
            room.hear(&id, &keys, &event);
        }
        assert_eq!(room.inbox.reads_at(&keys.public_key()), ["wss://new"]);
        let counts = &room.source.counts;
        assert_eq!((Counts::of(&counts.forged), Counts::of(&counts.unwanted)), (1, 1));
    }

    #[test]
    fn what_is_known_is_forgotten_after_an_hour_and_that_there_is_none_sooner() {
        let (mut room, keys, none) = (room(), Keys::generate(), Keys::generate());
        let authors = [keys.public_key(), none.public_key()];
        let ask = |room: &mut Room| {
            authors.iter().for_each(|key| drop(room.inbox.reads_at(key)));
            std::iter::from_fn(|| room.asked.try_recv().ok()).collect::<Vec<_>>()
        };
        assert_eq!(ask(&mut room), authors);
        let id = room.begin();
        room.hear(&id, &keys, &list(&keys, 1, &[&["r", "wss://a"]]).as_json());
        assert!(
            room.inbox.sort_out("wss://ours", Signal::EndOfStored(id)).is_none(),
            "it is not the follower's"
        );
        room.inbox.end(&authors);
        room.pass(NONE_MS - 1);
        assert_eq!(ask(&mut room), []);
        room.pass(1);
        assert_eq!(ask(&mut room), [none.public_key()]);
        room.pass(FOUND_MS - NONE_MS);
        assert_eq!(ask(&mut room), authors);
        assert!(room.inbox.reads_at(&keys.public_key()).is_empty());
    }

    #[test]
    fn a_relay_that_cannot_say_is_no_word_that_there_is_none() {
        let (mut room, key) = (room(), Keys::generate().public_key());
        for signal in [
            Signal::Disconnected("gone".into()),
            Signal::Closed { subscription: "reads-2".into(), reason: "error: busy".into() },
        ] {
            assert!(room.inbox.reads_at(&key).is_empty());
            assert_eq!(room.asked.try_recv(), Ok(key));
            room.begin();
            let passed_on = matches!(signal, Signal::Disconnected(_));
            assert_eq!(room.inbox.sort_out("wss://ours", signal).is_some(), passed_on);
            room.inbox.end(&[key]);
            room.pass(UNKNOWN_MS);
        }
    }

    #[test]
    fn a_relay_that_sends_more_than_it_was_asked_for_is_not_listened_to() {
        let (room, keys) = (room(), Keys::generate());
        room.inbox.reads_at(&keys.public_key());
        let id = room.begin();
        for at in 1..=10 {
            let url = format!("wss://r{at}");
            room.hear(&id, &keys, &list(&keys, at, &[&["r", url.as_str()]]).as_json());
        }
        assert_eq!(room.inbox.reads_at(&keys.public_key()), ["wss://r2"]);
        room.inbox.end(&[keys.public_key()]);
        room.hear(&id, &keys, &list(&keys, 99, &[&["r", "wss://late"]]).as_json());
        assert_eq!(room.inbox.reads_at(&keys.public_key()), ["wss://r2"], "the round is over");
    }

    #[test]
    fn no_more_customers_are_remembered_than_the_cap() {
        let mut room = room();
        for n in 0..REMEMBERED as u64 + 100 {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&n.to_be_bytes());
            room.inbox.reads_at(&PublicKey::from_byte_array(bytes));
            assert!(room.asked.try_recv().is_ok());
        }
        assert_eq!(room.inbox.lock().known.len(), REMEMBERED);
    }

    #[tokio::test]
    async fn a_round_ends_when_all_have_told() {
        let (room, moment) = (room(), std::time::Duration::from_millis(5));
        let id = room.begin();
        assert!(tokio::time::timeout(moment, room.inbox.all_told()).await.is_err(), "nobody has told");
        let tell = async { room.inbox.tell("wss://ours", &id, true) };
        let (told, ()) = tokio::join!(tokio::time::timeout(moment * 1000, room.inbox.all_told()), tell);
        assert!(told.is_ok());
    }
}
