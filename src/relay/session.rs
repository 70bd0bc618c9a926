//! One relay, kept up for ever: connect, authenticate, subscribe, deliver, and again with longer pauses. It moves
//! messages between the socket and its `Sink`; what they mean for cursors is `follow.rs`, for the outbox
//! `outbox.rs`.

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nostr_sdk::prelude::{EventBuilder, EventId, Filter, JsonUtil, Keys, RelayUrl};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::connection::Connection;
use super::delivery::{Deliveries, Delivery};
use super::limits::Limits;
use super::message::{self, Message};
use super::subscriptions::{Ended, Life, Subscriptions};
use super::verify::{Counts, Wanted, check};
use super::{Address, Clock, Error, Glance, Wire, lock};
use crate::backoff::{Backoff, random_unit};
use crate::store::record::Answer;

/// Frames that are no relay messages before we hang up.
const MAX_NONSENSE: u32 = 64;
/// In the first minutes after a relay was lost the pauses are short: most outages are.
const EARLY: Duration = Duration::from_secs(10 * 60);
const EARLY_PAUSE: Duration = Duration::from_secs(30);
/// How long a relay may leave our AUTH without an answer before what it sent until then counts as all it has.
const AUTH_PATIENCE: Duration = Duration::from_secs(3);
/// Subscription ids by which a relay that says no OK is asked whether it has our events.
const SENT: &str = "sent-";
/// Subscriptions that the node has for itself on one connection; only beyond them is one for that.
const SUBSCRIPTIONS: u64 = 5;

/// Who listens to a session. Both are called from the session's task, in the relay's order.
pub(super) trait Sink: Send + Sync + 'static {
    /// An event that came under a subscription of ours, not verified. The wait holds the relay back.
    fn event(
        &self,
        subscription: &str,
        wanted: &Arc<Wanted>,
        glance: Glance,
        frame: Utf8Bytes,
    ) -> impl Future<Output = ()> + Send;

    /// Must not block.
    fn signal(&self, signal: Signal);

    /// The relay has sent more rubbish than an honest one would.
    fn is_hostile(&self) -> bool {
        false
    }
}

#[derive(Debug)]
pub(super) enum Signal {
    Connected(Limits),
    /// The relay took our AUTH: from now on it may show more. What was asked before is asked again.
    Authenticated,
    /// With the reason.
    Disconnected(String),
    /// All stored events of this subscription were handed over.
    EndOfStored(String),
    Closed {
        subscription: String,
        reason: String,
    },
    Answered(Delivery, Answer),
    /// The session is over; commands sent to it now are lost.
    Ended,
}

#[derive(Debug)]
pub(super) enum Command {
    Subscribe(String, Arc<Wanted>, Life),
    Unsubscribe(String),
    Deliver(Delivery),
    Close,
}

/// What the outside may know of a session at any time.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Link {
    pub connected: bool,
    /// Unix milliseconds of the last change of `connected`.
    pub since_ms: u64,
    /// Connections tried.
    pub attempts: u64,
    pub authenticated: bool,
    /// The last trouble, also when it is over.
    pub trouble: Option<String>,
    /// Events owed to this relay.
    pub owed: usize,
    pub limits: Limits,
    /// Unix milliseconds when the relay was last heard.
    pub heard_ms: u64,
    /// Frames over the cap, dropped unread.
    pub oversized: u64,
    /// Events of strangers that cannot be read, dropped.
    pub unreadable: u64,
}

pub(super) struct Session<S> {
    pub(super) address: Address,
    pub(super) allow_private: bool,
    pub(super) wire: Wire,
    pub(super) keys: Option<Keys>,
    pub(super) clock: Clock,
    pub(super) sink: Arc<S>,
    pub(super) commands: mpsc::UnboundedReceiver<Command>,
    pub(super) link: Arc<Mutex<Link>>,
    /// Set for a relay that is only delivered to: connections are counted, and it ends when idle.
    pub(super) on_demand: Option<Arc<Semaphore>>,
}

/// What one run of the loop keeps between connections.
struct Kept {
    subscriptions: Subscriptions,
    deliveries: Deliveries,
    limits: Option<Limits>,
    /// When the connection was last of use: made, or an event answered for.
    busy: Instant,
    /// Number of the last subscription that asked for our own events.
    asked: u64,
    closing: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Auth {
    /// The relay has not asked.
    None,
    /// Asked; answered when it is needed or at once.
    Asked(String),
    Sent(Sent),
    Done,
    Refused,
}

/// An AUTH of ours that the relay has not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sent {
    id: [u8; 32],
    challenge: String,
    at: Instant,
    /// It was waited for long enough; an answer still counts.
    late: bool,
    /// A challenge that came meanwhile.
    newer: Option<String>,
}

impl Auth {
    /// The relay is about to learn who we are: what it says until then is for strangers.
    fn is_pending(&self) -> bool {
        match self {
            Auth::Asked(_) => true,
            Auth::Sent(sent) => !sent.late,
            Auth::None | Auth::Done | Auth::Refused => false,
        }
    }

    /// Nothing is to be hoped for from AUTH on this connection.
    fn has_failed(&self) -> bool {
        matches!(self, Auth::Refused) || matches!(self, Auth::Sent(sent) if sent.late)
    }
}

impl<S: Sink> Session<S> {
    /// Runs until told to close, or idle when on demand.
    pub(super) async fn run(mut self) {
        let retry = Backoff::new(self.wire.backoff_min, self.wire.backoff_max);
        let mut pauses = Pauses::new(&self.wire);
        let mut kept = Kept {
            subscriptions: Subscriptions::default(),
            deliveries: Deliveries::new(retry, self.wire.ok_timeout),
            limits: None,
            busy: Instant::now(),
            asked: 0,
            closing: false,
        };
        while !kept.closing {
            let permit = self.permit(&mut kept).await;
            if kept.closing {
                break;
            }
            lock(&self.link).attempts += 1;
            let (address, wire) = (self.address.clone(), self.wire.clone());
            let (private, ask) = (self.allow_private, kept.limits.is_none());
            let opened = self
                .attend(&mut kept, async move { Connection::open(&address, &wire, private, ask).await })
                .await;
            let trouble = match opened {
                None => break,
                Some(Err(error)) => error,
                Some(Ok((connection, limits))) => {
                    kept.limits = limits.or(kept.limits);
                    let began = Instant::now();
                    let error = self.connected(&mut kept, connection).await;
                    if began.elapsed() >= self.wire.backoff_max.min(EARLY_PAUSE) {
                        pauses = Pauses::new(&self.wire);
                    }
                    error
                }
            };
            drop(permit);
            if kept.closing {
                break;
            }
            if self.on_demand.is_some() && self.nothing_owed(&mut kept) {
                break;
            }
            if let Error::Private { .. } | Error::Address { .. } = trouble {
                let rejected = kept.deliveries.reject_all(&trouble.to_string(), |_| true);
                self.report(rejected);
                pauses.worst();
            }
            if let Error::Hostile(_) = trouble {
                pauses.worst();
            }
            let pause = pauses.next(Instant::now(), random_unit());
            tracing::debug!(relay = %self.address, error = %trouble, ?pause, "relay lost");
            lock(&self.link).trouble = Some(trouble.to_string());
            if self.attend(&mut kept, tokio::time::sleep(pause)).await.is_none() {
                break;
            }
        }
        self.commands.close();
        self.sink.signal(Signal::Ended);
    }

    /// A relay on demand waits for work and for its turn.
    async fn permit(&mut self, kept: &mut Kept) -> Option<OwnedSemaphorePermit> {
        let turns = self.on_demand.clone()?;
        let turn = self.attend(kept, async move { turns.acquire_owned().await.ok() }).await;
        turn.flatten()
    }

    /// Waits for `work` while taking commands and giving up what is late. `None`: told to close.
    async fn attend<F: Future>(&mut self, kept: &mut Kept, work: F) -> Option<F::Output> {
        tokio::pin!(work);
        let mut tick = tokio::time::interval(self.wire.tick);
        loop {
            tokio::select! {
                done = &mut work => return Some(done),
                command = self.commands.recv() => {
                    self.obey(kept, command);
                    if kept.closing {
                        return None;
                    }
                }
                _ = tick.tick() => self.give_up_late(kept),
            }
        }
    }

    fn obey(&mut self, kept: &mut Kept, command: Option<Command>) {
        match command {
            Some(Command::Subscribe(id, wanted, life)) => kept.subscriptions.subscribe(id, wanted, life),
            Some(Command::Unsubscribe(id)) => kept.subscriptions.unsubscribe(&id),
            Some(Command::Deliver(delivery)) => {
                let max = kept.limits.and_then(|limits| limits.max_message_length);
                let long = max.is_some_and(|max| delivery.json.len() as u64 + 10 > max);
                kept.deliveries.push(delivery);
                if long {
                    self.refuse_long(kept);
                }
            }
            Some(Command::Close) | None => kept.closing = true,
        }
        lock(&self.link).owed = kept.deliveries.len();
    }

    /// Takes every command that is there, then says whether there is nothing to deliver.
    fn nothing_owed(&mut self, kept: &mut Kept) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            self.obey(kept, Some(command));
        }
        kept.deliveries.is_empty()
    }

    /// What this relay says it never takes is not sent to it.
    fn refuse_long(&self, kept: &mut Kept) {
        let Some(max) = kept.limits.and_then(|limits| limits.max_message_length) else { return };
        let reason = format!("invalid: larger than this relay's max_message_length of {max} bytes");
        // `["EVENT",` and `]` are ten bytes more.
        let refused = kept.deliveries.reject_all(&reason, |d| d.json.len() as u64 + 10 > max);
        self.report(refused);
    }

    fn give_up_late(&self, kept: &mut Kept) {
        let late = kept.deliveries.tick(Instant::now(), (self.clock)(), random_unit());
        self.report(late);
        self.ask_for_unconfirmed(kept);
        lock(&self.link).owed = kept.deliveries.len();
    }

    /// A relay may store and pass on what it says no OK to: asked for our own events, it shows what it has. They are
    /// sent again all the same.
    fn ask_for_unconfirmed(&self, kept: &mut Kept) {
        let ids = kept.deliveries.take_unconfirmed();
        let most = kept.limits.and_then(|limits| limits.max_subscriptions);
        let has_room = self.on_demand.is_some() || most.is_none_or(|most| most > SUBSCRIPTIONS);
        if ids.is_empty() || !has_room {
            return;
        }
        kept.subscriptions.unsubscribe(&format!("{SENT}{}", kept.asked));
        kept.asked += 1;
        let ours = Filter::new().ids(ids.into_iter().map(EventId::from_byte_array));
        kept.subscriptions.subscribe(format!("{SENT}{}", kept.asked), Wanted::new(vec![ours]), Life::Once);
    }

    fn report(&self, words: Vec<(Delivery, Answer)>) {
        for (delivery, answer) in words {
            self.sink.signal(Signal::Answered(delivery, answer));
        }
    }

    /// Serves one connection to its end; says why it ended.
    async fn connected(&mut self, kept: &mut Kept, mut connection: Connection) -> Error {
        self.mark(true);
        lock(&self.link).limits = kept.limits.unwrap_or_default();
        self.refuse_long(kept);
        self.sink.signal(Signal::Connected(kept.limits.unwrap_or_default()));
        let error = match self.serve(kept, &mut connection).await {
            Ok(()) => Error::Gone,
            Err(error) => error,
        };
        if kept.closing {
            connection.close().await;
        }
        self.mark(false);
        kept.subscriptions.disconnected();
        kept.deliveries.disconnected(&error.to_string());
        self.sink.signal(Signal::Disconnected(error.to_string()));
        error
    }

    fn mark(&self, connected: bool) {
        let now = (self.clock)();
        let mut link = lock(&self.link);
        link.connected = connected;
        link.authenticated = false;
        link.since_ms = now;
        link.heard_ms = now;
    }

    async fn serve(&mut self, kept: &mut Kept, connection: &mut Connection) -> Result<(), Error> {
        let mut auth = Auth::None;
        let mut nonsense = 0;
        kept.busy = Instant::now();
        let mut tick = tokio::time::interval(self.wire.tick);
        loop {
            self.pump(kept, connection, &mut auth).await?;
            tokio::select! {
                frame = connection.next() => {
                    self.take(kept, &mut auth, &mut nonsense, frame?).await?;
                }
                command = self.commands.recv() => {
                    self.obey(kept, command);
                    self.nothing_owed(kept);
                    if kept.closing {
                        return Ok(());
                    }
                }
                _ = tick.tick() => {
                    connection.tick().await?;
                    self.give_up_late(kept);
                    self.wait_no_more_for_auth(kept, &mut auth);
                    self.heard(connection);
                    if self.sink.is_hostile() {
                        return Err(Error::Hostile("too many forged or malformed events".into()));
                    }
                    if self.on_demand.is_some() && kept.busy.elapsed() >= self.wire.linger {
                        kept.closing = self.nothing_owed(kept);
                        if kept.closing {
                            return Ok(());
                        }
                        // A relay that never says OK must not keep the turn of one that would.
                        let limit_ms = u64::try_from(self.wire.linger.as_millis()).unwrap_or(u64::MAX);
                        return Err(Error::Slow { what: "an OK", limit_ms });
                    }
                }
            }
        }
    }

    fn heard(&self, connection: &Connection) {
        let ago = u64::try_from(connection.heard().elapsed().as_millis()).unwrap_or(u64::MAX);
        lock(&self.link).heard_ms = (self.clock)().saturating_sub(ago);
    }

    /// Sends whatever is due.
    async fn pump(
        &mut self,
        kept: &mut Kept,
        connection: &mut Connection,
        auth: &mut Auth,
    ) -> Result<(), Error> {
        let now = Instant::now();
        let mut fed = false;
        if let Auth::Asked(challenge) = auth {
            match self.auth_event(challenge) {
                Some((id, event)) => {
                    connection.feed(format!(r#"["AUTH",{event}]"#)).await?;
                    let challenge = std::mem::take(challenge);
                    *auth = Auth::Sent(Sent { id, challenge, at: now, late: false, newer: None });
                    fed = true;
                }
                None => {
                    *auth = Auth::Refused;
                    self.auth_failed(kept);
                }
            }
        }
        let authed = *auth == Auth::Done;
        for message in kept.subscriptions.due(now, authed) {
            connection.feed(message).await?;
            fed = true;
        }
        while let Some(json) = kept.deliveries.next(now, authed) {
            connection.feed(format!(r#"["EVENT",{json}]"#)).await?;
            fed = true;
        }
        if fed { connection.flush().await } else { Ok(()) }
    }

    async fn take(
        &mut self,
        kept: &mut Kept,
        auth: &mut Auth,
        nonsense: &mut u32,
        frame: Utf8Bytes,
    ) -> Result<(), Error> {
        if frame.len() > self.wire.max_event_bytes {
            lock(&self.link).oversized += 1;
            tracing::debug!(relay = %self.address, bytes = frame.len(), "a frame over the cap was dropped");
            return Ok(());
        }
        let Some(message) = message::look(&frame) else {
            if message::is_event(&frame) {
                // Anybody may sign an event that no parser takes: passing it on is no fault of the relay's.
                lock(&self.link).unreadable += 1;
                return Ok(());
            }
            *nonsense += 1;
            return if *nonsense > MAX_NONSENSE { Err(Error::Hostile("not Nostr".into())) } else { Ok(()) };
        };
        match message {
            Message::Event { subscription, .. } if subscription.starts_with(SENT) => {
                let wanted = kept.subscriptions.wanted(&subscription);
                if let Some(event) = wanted.and_then(|wanted| check(&frame, wanted, &Counts::default())) {
                    self.answered(kept, event.id.as_bytes(), true, "", auth);
                }
            }
            Message::Event { subscription, glance } => {
                if let Some(wanted) = kept.subscriptions.wanted(&subscription) {
                    let (wanted, subscription) = (Arc::clone(wanted), subscription.into_owned());
                    self.sink.event(&subscription, &wanted, glance, frame).await;
                }
            }
            Message::EndOfStored { subscription } => {
                if kept.subscriptions.end_of_stored(&subscription, auth.is_pending()) {
                    self.told(subscription.into_owned());
                }
            }
            Message::Closed { subscription, reason } => {
                let needs_auth = self.keys.is_some()
                    && match auth {
                        Auth::None | Auth::Asked(_) | Auth::Sent(_)
                            if reason.starts_with("auth-required") =>
                        {
                            true
                        }
                        auth => auth.is_pending() && reason.starts_with("restricted"),
                    };
                let ended =
                    kept.subscriptions.closed(&subscription, needs_auth, Instant::now(), random_unit());
                if let Some(ended) = ended {
                    lock(&self.link).trouble = Some(format!("closed: {reason}"));
                    if (ended == Ended::Gone || !needs_auth) && !subscription.starts_with(SENT) {
                        self.sink.signal(Signal::Closed { subscription: subscription.into_owned(), reason });
                    }
                }
            }
            Message::Ok { event, accepted, reason } => match auth {
                Auth::Sent(sent) if sent.id == event => {
                    let newer = sent.newer.take();
                    let mut link = lock(&self.link);
                    link.authenticated = accepted;
                    if !accepted {
                        link.trouble = Some(format!("AUTH refused: {reason}"));
                    }
                    drop(link);
                    *auth = match newer {
                        // It was asked anew before it had our answer.
                        Some(challenge) if !accepted => Auth::Asked(challenge),
                        _ if accepted => Auth::Done,
                        _ => Auth::Refused,
                    };
                    match auth {
                        Auth::Done => {
                            kept.subscriptions.authenticated();
                            self.sink.signal(Signal::Authenticated);
                        }
                        Auth::Refused => self.auth_failed(kept),
                        _ => {}
                    }
                }
                auth => self.answered(kept, &event, accepted, &reason, auth),
            },
            Message::Auth { challenge } => {
                // Each answer costs a signature: a relay asks once or twice, not for sport.
                *nonsense += 1;
                match auth {
                    Auth::Sent(sent) if sent.challenge == challenge => {}
                    Auth::Sent(sent) => sent.newer = Some(challenge),
                    _ if *nonsense <= MAX_NONSENSE => *auth = Auth::Asked(challenge),
                    _ => {}
                }
            }
            Message::Notice { text } => {
                tracing::debug!(relay = %self.address, notice = %text, "a relay says");
                lock(&self.link).trouble = Some(format!("notice: {text}"));
            }
            Message::Other => {}
        }
        Ok(())
    }

    fn answered(&self, kept: &mut Kept, event: &[u8; 32], accepted: bool, reason: &str, auth: &Auth) {
        let (now, jitter) = (Instant::now(), random_unit());
        let answer = kept.deliveries.answered(event, accepted, reason, auth.is_pending(), now, jitter);
        if answer.is_some() {
            kept.busy = now;
        }
        self.report(answer.into_iter().collect());
        if auth.has_failed() {
            let refused = kept.deliveries.auth_failed(now, jitter);
            self.report(refused);
        }
        lock(&self.link).owed = kept.deliveries.len();
    }

    /// All stored events of a subscription have come.
    fn told(&self, subscription: String) {
        if !subscription.starts_with(SENT) {
            self.sink.signal(Signal::EndOfStored(subscription));
        }
    }

    fn wait_no_more_for_auth(&self, kept: &mut Kept, auth: &mut Auth) {
        if let Auth::Sent(sent) = auth
            && !sent.late
            && sent.at.elapsed() >= AUTH_PATIENCE.min(self.wire.ok_timeout)
        {
            sent.late = true;
            self.auth_failed(kept);
        }
    }

    /// We stay strangers here: what the relay has said counts, and nothing waits for AUTH.
    fn auth_failed(&self, kept: &mut Kept) {
        let (now, jitter) = (Instant::now(), random_unit());
        let (told, gone) = kept.subscriptions.auth_failed(now, jitter);
        told.into_iter().for_each(|subscription| self.told(subscription));
        for subscription in gone.into_iter().filter(|id| !id.starts_with(SENT)) {
            let reason = "auth-required: and our AUTH came to nothing".to_owned();
            self.sink.signal(Signal::Closed { subscription, reason });
        }
        let refused = kept.deliveries.auth_failed(now, jitter);
        self.report(refused);
    }

    /// A signed answer to the relay's challenge (NIP-42), if we have a key.
    fn auth_event(&self, challenge: &str) -> Option<([u8; 32], String)> {
        let keys = self.keys.as_ref()?;
        let url = RelayUrl::parse(self.address.as_str()).ok()?;
        let event = EventBuilder::auth(challenge, url).sign_with_keys(keys).ok()?;
        Some((event.id.to_bytes(), event.as_json()))
    }
}

/// The pauses between connections: short for the first minutes, long when a relay stays away.
struct Pauses {
    early: Backoff,
    later: Backoff,
    began: Option<Instant>,
    worst: bool,
}

impl Pauses {
    fn new(wire: &Wire) -> Self {
        let early = Backoff::new(wire.backoff_min, wire.backoff_max.min(EARLY_PAUSE));
        let later = Backoff::new(wire.backoff_min, wire.backoff_max);
        Self { early, later, began: None, worst: false }
    }

    /// No retry soon can mend it.
    fn worst(&mut self) {
        self.later.worst();
        self.worst = true;
    }

    fn next(&mut self, now: Instant, unit: f64) -> Duration {
        let began = *self.began.get_or_insert(now);
        let (early, later) = (self.early.next(unit), self.later.next(unit));
        if !self.worst && now.duration_since(began) < EARLY { early } else { later }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_is_tried_every_30_s_at_least_in_the_first_minutes_and_seldom_after_an_hour() {
        let (mut pauses, start) = (Pauses::new(&Wire::default()), Instant::now());
        let mut now = start;
        while now.duration_since(start) < EARLY {
            let pause = pauses.next(now, 1.0);
            assert!(pause <= Duration::from_secs(30), "{pause:?} after {:?}", now.duration_since(start));
            now += pause;
        }
        let pause = pauses.next(start + Duration::from_secs(3600), 1.0);
        assert_eq!(pause, Wire::default().backoff_max);
        let mut hostile = Pauses::new(&Wire::default());
        hostile.worst();
        assert_eq!(
            hostile.next(start, 1.0),
            Wire::default().backoff_max,
            "what no retry mends is not hurried"
        );
    }
}
