//! The relay room against relays that lie, break, flood, dawdle and vanish. What the node does with a verified
//! event is tested elsewhere.

mod disk;
mod fake;
mod gaps;
mod hostile;
mod outbox;
mod rights;
mod speed;
mod talk;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use coinop::clock;
use coinop::relay::{Handle, InMemory, Inbound, Memory, Options, RelayStatus, Service, Wire};
use fake::Fake;
use nostr_sdk::prelude::*;
use tokio::sync::mpsc;

pub const REQUEST_KIND: u16 = 5930;

/// Quick time-outs, so that tests need not wait for real ones.
pub fn options(relays: &[&Fake]) -> Options {
    Options {
        relays: relays.iter().map(|relay| relay.url()).collect(),
        kinds: vec![REQUEST_KIND, 5100],
        cursor_every: Duration::from_millis(20),
        quiet_cursor_every: Duration::from_millis(50),
        watch_delay: Duration::from_millis(10),
        verify_threads: 2,
        wire: Wire {
            connect_timeout: Duration::from_secs(2),
            backoff_min: Duration::from_millis(10),
            backoff_max: Duration::from_millis(100),
            ok_timeout: Duration::from_millis(200),
            page_timeout: Duration::from_millis(500),
            linger: Duration::from_millis(150),
            tick: Duration::from_millis(10),
            ..Wire::default()
        },
        ..Options::default()
    }
}

/// A running room with its memory.
pub struct Node {
    pub handle: Handle,
    pub events: mpsc::Receiver<Inbound>,
    pub memory: Arc<InMemory>,
}

impl Node {
    pub fn start(options: Options) -> Self {
        Self::again(options, Arc::default())
    }

    /// Starts on a memory that an earlier run left.
    pub fn again(options: Options, memory: Arc<InMemory>) -> Self {
        Self::with_keys(options, memory, Keys::generate())
    }

    pub fn with_keys(options: Options, memory: Arc<InMemory>, keys: Keys) -> Self {
        let shared: Arc<dyn Memory> = Arc::clone(&memory) as _;
        let (handle, events) = Service::start(options, shared, keys, clock::system()).unwrap();
        Self { handle, events, memory }
    }

    /// The next event, within ten seconds.
    pub async fn next(&mut self) -> Inbound {
        let next = tokio::time::timeout(Duration::from_secs(10), self.events.recv()).await;
        let Ok(next) = next else { panic!("no event within ten seconds: {:#?}", self.handle.status()) };
        next.expect("the room is running")
    }

    /// The id of the next event, which is done.
    pub async fn next_id(&mut self) -> EventId {
        let inbound = self.next().await;
        inbound.done();
        inbound.event.id
    }

    /// Takes events, all done, until `count` came; by id with how often each came.
    pub async fn take(&mut self, count: usize) -> BTreeMap<EventId, usize> {
        let mut seen = BTreeMap::new();
        while seen.len() < count {
            let inbound = self.next().await;
            inbound.done();
            *seen.entry(inbound.event.id).or_default() += 1;
        }
        seen
    }

    /// Nothing more came.
    pub fn assert_nothing(&mut self) {
        assert!(self.events.try_recv().is_err(), "an event came that should not");
    }

    pub fn status(&self, relay: &Fake) -> RelayStatus {
        let all = self.handle.status();
        all.into_iter().find(|status| status.relay == relay.url()).expect("the relay is known")
    }

    pub fn cursor(&self, relay: &Fake) -> Option<u64> {
        self.memory.cursor(&relay.url())
    }
}

pub fn now() -> u64 {
    clock::now_s()
}

/// A signed request, `age` seconds old.
pub fn request(text: &str, age: u64) -> Event {
    signed(Kind::Custom(REQUEST_KIND), text, age, vec![])
}

pub fn signed(kind: Kind, text: &str, age: u64, tags: Vec<Tag>) -> Event {
    EventBuilder::new(kind, text)
        .tags(tags)
        .custom_created_at(Timestamp::from(now() - age))
        .sign_with_keys(&Keys::generate())
        .unwrap()
}

/// The event with other content under the same id and signature.
pub fn tampered(event: &Event) -> Event {
    let mut bad = event.clone();
    bad.content = "something else".into();
    bad
}

/// The event with another signature, and an id that is right for what it says.
pub fn forged() -> Event {
    let (mine, theirs) = (request("mine", 1), request("theirs", 1));
    Event::new(mine.id, mine.pubkey, mine.created_at, mine.kind, mine.tags.to_vec(), mine.content, theirs.sig)
}

pub fn frame(event: &Event) -> String {
    format!(r#"["EVENT","SUB",{}]"#, event.as_json())
}
