//! Requests to a wallet and its answers, over its relays: each relay has a task that stays connected, every event of
//! the wallet is verified here, and an answer is handed to whoever waits for exactly it. What is asked, and what an
//! answer means, is `nwc.rs`'s.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nostr_sdk::prelude::{Event, EventBuilder, JsonUtil, Kind, PublicKey, Tag, Timestamp};
use serde_json::{Value, json};
use tokio::sync::{broadcast, oneshot, watch};
use tokio::task::JoinSet;
use url::Url;

use super::message::{self, Info};
use super::said::{self, Said};
use super::uri::Uri;
use crate::backoff::random_unit;
use crate::clock::Clock;
use crate::wallet::socket::Socket;
use crate::wallet::{Error, Hint, Limits, Schedule};

/// Requests that wait for an answer at the same time.
const MAX_WAITING: usize = 256;
/// How far the wallet's clock may be behind ours, seconds: its events are asked for from then on.
const MAX_SKEW_S: u64 = 600;
const TICK: Duration = Duration::from_secs(5);

/// The link to one wallet. Dropping it ends its tasks.
pub(super) struct Link {
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

struct Shared {
    uri: Uri,
    limits: Limits,
    clock: Clock,
    waiting: Mutex<HashMap<String, Waiting>>,
    orders: broadcast::Sender<Order>,
    info: watch::Sender<Option<Info>>,
    hints: broadcast::Sender<Hint>,
    connected: watch::Sender<usize>,
}

/// For the relays' tasks.
#[derive(Debug, Clone)]
enum Order {
    Send(String, Arc<str>),
    /// Nobody waits for this one any more.
    Done(String),
}

/// A request that was not answered yet.
struct Waiting {
    frame: Arc<str>,
    answer: Option<oneshot::Sender<Result<Event, String>>>,
    /// It was written to a relay, at least in part.
    sent: bool,
    /// Relays that will not take it.
    refusals: usize,
}

impl Link {
    /// # Errors
    /// Outside a tokio runtime.
    pub fn start(uri: Uri, limits: Limits, clock: Clock) -> Result<Self, Error> {
        let runtime = tokio::runtime::Handle::try_current()
            .map_err(|_| Error::Setup("a wallet over Nostr is opened inside the runtime".into()))?;
        let shared = Arc::new(Shared {
            uri,
            limits,
            clock,
            waiting: Mutex::default(),
            orders: broadcast::channel(2 * MAX_WAITING).0,
            info: watch::channel(None).0,
            hints: broadcast::channel(256).0,
            connected: watch::channel(0).0,
        });
        let mut tasks = JoinSet::new();
        for relay in shared.uri.relays.clone() {
            tasks.spawn_on(Arc::clone(&shared).serve(relay), &runtime);
        }
        Ok(Self { shared, _tasks: tasks })
    }

    pub fn uri(&self) -> &Uri {
        &self.shared.uri
    }

    pub fn hints(&self) -> broadcast::Receiver<Hint> {
        self.shared.hints.subscribe()
    }

    /// What the wallet says it can do; waits for it within `limit`.
    pub async fn info(&self, limit: Duration) -> Result<Info, Error> {
        let mut info = self.shared.info.subscribe();
        let found = tokio::time::timeout(limit, info.wait_for(Option::is_some)).await;
        let found = found.ok().and_then(Result::ok).and_then(|info| info.clone());
        found.ok_or_else(|| {
            Error::Unreachable(match *self.shared.connected.borrow() {
                0 => format!("no relay of the wallet ({}) can be reached", self.shared.uri.hosts()),
                _ => "its relays have no info event (kind 13194) of this wallet".into(),
            })
        })
    }

    /// Sends one request and waits for its answer's `result`, all within `limit`. The request expires with it, so that
    /// a wallet that wakes up later leaves it alone.
    pub async fn ask(&self, method: &'static str, params: Value, limit: Duration) -> Result<Value, Error> {
        let began = tokio::time::Instant::now();
        let info = self.info(limit).await?;
        if !info.can(method) {
            let wallet = format!("nwc at {}", self.shared.uri.hosts());
            return Err(Error::Unsupported {
                wallet,
                what: method,
                detail: "its info event has it not".into(),
            });
        }
        let left = limit.saturating_sub(began.elapsed());
        let expires_s = self.shared.now_s() + left.as_secs().max(1);
        let plain = json!({ "method": method, "params": params }).to_string();
        let content = message::encrypt(&self.shared.uri, info.scheme, &plain)?;
        let mut tags =
            vec![Tag::public_key(self.shared.uri.wallet), Tag::expiration(Timestamp::from(expires_s))];
        tags.extend(message::scheme_tags(info.scheme));
        let request = EventBuilder::new(Kind::WalletConnectRequest, content)
            .tags(tags)
            .custom_created_at(Timestamp::from(self.shared.now_s()))
            .sign_with_keys(&self.shared.uri.keys)
            .map_err(|error| Error::Setup(format!("cannot sign a request: {error}")))?;
        let answer = self.shared.exchange(&request, method, left).await?;
        let plain = message::decrypt(&self.shared.uri, info.scheme, &answer.content)?;
        message::result(&plain, method)
    }
}

/// Takes the request out of the table however the wait for it ends.
struct Place<'a>(&'a Shared, String);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        lock(&self.0.waiting).remove(&self.1);
        self.0.order(Order::Done(self.1.clone()));
    }
}

impl Shared {
    fn now_s(&self) -> u64 {
        (self.clock)() / 1000
    }

    async fn exchange(&self, request: &Event, method: &'static str, limit: Duration) -> Result<Event, Error> {
        let id = request.id.to_hex();
        let frame: Arc<str> = format!(r#"["EVENT",{}]"#, request.as_json()).into();
        let (sender, answer) = oneshot::channel();
        {
            let mut waiting = lock(&self.waiting);
            if waiting.len() >= MAX_WAITING {
                return Err(Error::Full { max: MAX_WAITING });
            }
            let new = Waiting { frame: Arc::clone(&frame), answer: Some(sender), sent: false, refusals: 0 };
            waiting.insert(id.clone(), new);
        }
        let place = Place(self, id.clone());
        self.order(Order::Send(id.clone(), frame));
        let answered = tokio::time::timeout(limit, answer).await;
        let was_sent = lock(&self.waiting).get(&id).is_some_and(|waiting| waiting.sent);
        drop(place);
        match answered {
            Ok(Ok(Ok(event))) => Ok(event),
            Ok(Ok(Err(why))) => Err(Error::Failed { code: "relay".into(), message: why }),
            Ok(Err(_)) => Err(Error::Cut("the link was closed".into())),
            Err(_) if !was_sent => Err(Error::Unreachable(format!(
                "no relay of the wallet ({}) could be written to",
                self.uri.hosts()
            ))),
            Err(_) => {
                let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                Err(Error::Slow { what: method, limit_ms })
            }
        }
    }

    fn order(&self, order: Order) {
        // No receiver: no relay is connected. Whichever connects in time sends what is in the table.
        if self.orders.send(order).is_err() {
            tracing::trace!("no relay of the wallet is connected");
        }
    }

    /// One relay, for ever.
    async fn serve(self: Arc<Self>, relay: Url) {
        let schedule = Schedule::new(Duration::from_millis(500), Duration::from_secs(60));
        let mut failures = 0;
        loop {
            let began = tokio::time::Instant::now();
            let error = match Socket::open(&relay, &self.limits).await {
                Ok(socket) => {
                    self.connected.send_modify(|n| *n += 1);
                    let ended = self.talk(&relay, socket).await;
                    self.connected.send_modify(|n| *n = n.saturating_sub(1));
                    ended
                }
                Err(error) => error,
            };
            failures =
                if began.elapsed() > Duration::from_secs(30) { 1 } else { u32::saturating_add(failures, 1) };
            let pause = schedule.pause(failures, random_unit());
            tracing::debug!(relay = relay.host_str(), %error, ?pause, "a wallet's relay was lost");
            tokio::time::sleep(pause).await;
        }
    }

    /// One connection, to its end.
    async fn talk(&self, relay: &Url, mut socket: Socket) -> Error {
        let mut orders = self.orders.subscribe();
        match self.converse(relay, &mut socket, &mut orders).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn converse(
        &self,
        relay: &Url,
        socket: &mut Socket,
        orders: &mut broadcast::Receiver<Order>,
    ) -> Result<std::convert::Infallible, Error> {
        let mut sent = HashSet::new();
        let mut auth = None;
        socket.send(&self.subscription()).await?;
        self.send_waiting(socket, &mut sent).await?;
        self.hint(Hint::Anything);
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                said = socket.next() => match said::read(&said?) {
                    Said::Event(event) => self.take(*event),
                    Said::Ok { event, accepted, .. } if auth.as_ref() == Some(&event) => {
                        auth = None;
                        if accepted {
                            socket.send(&self.subscription()).await?;
                            sent.clear();
                            self.send_waiting(socket, &mut sent).await?;
                        }
                    }
                    Said::Ok { event, accepted: false, reason } if !is_before_auth(auth.is_some(), &reason) => {
                        self.refused(&event, reason);
                    }
                    Said::Auth(challenge) => {
                        let event = message::auth(&self.uri, relay, &challenge)?;
                        auth = Some(event.id.to_hex());
                        socket.send(&format!(r#"["AUTH",{}]"#, event.as_json())).await?;
                    }
                    Said::Closed(reason) if !is_before_auth(auth.is_some(), &reason) => return Err(Error::Cut(reason)),
                    Said::Ok { .. } | Said::Closed(_) | Said::Other => {}
                },
                order = orders.recv() => match order {
                    Ok(Order::Send(id, frame)) => self.send_once(socket, &mut sent, id, &frame).await?,
                    Ok(Order::Done(id)) => if sent.remove(&id) {
                        socket.send(&json!(["CLOSE", short(&id)]).to_string()).await?;
                    },
                    Err(_) => self.send_waiting(socket, &mut sent).await?,
                },
                _ = tick.tick() => socket.tick().await?,
            }
        }
    }

    /// The wallet's info event, and what it tells us unasked.
    fn subscription(&self) -> String {
        let wallet = self.uri.wallet.to_hex();
        let mut to_us = json!({ "kinds": [23196, 23197], "authors": [wallet] });
        if let Some(filter) = to_us.as_object_mut() {
            filter.insert("#p".into(), json!([self.uri.keys.public_key().to_hex()]));
            filter.insert("since".into(), json!(self.now_s().saturating_sub(MAX_SKEW_S)));
        }
        json!(["REQ", "wallet", { "kinds": [13194], "authors": [wallet], "limit": 1 }, to_us]).to_string()
    }

    /// Sends what waits and was not sent over this connection.
    async fn send_waiting(&self, socket: &mut Socket, sent: &mut HashSet<String>) -> Result<(), Error> {
        let all: Vec<_> =
            lock(&self.waiting).iter().map(|(id, w)| (id.clone(), Arc::clone(&w.frame))).collect();
        for (id, frame) in all {
            self.send_once(socket, sent, id, &frame).await?;
        }
        Ok(())
    }

    /// Asks for a request's answer, then sends it, once over a connection; the same event again is the same request to
    /// the wallet. The answer is asked for by the request's id, because not every wallet names us in it.
    async fn send_once(
        &self,
        socket: &mut Socket,
        sent: &mut HashSet<String>,
        id: String,
        frame: &str,
    ) -> Result<(), Error> {
        if !lock(&self.waiting).contains_key(&id) || !sent.insert(id.clone()) {
            return Ok(());
        }
        let wallet = self.uri.wallet.to_hex();
        let answer = json!(["REQ", short(&id), { "kinds": [23195], "authors": [wallet], "#e": [id] }]);
        socket.send(&answer.to_string()).await?;
        self.mark_sent(&id);
        socket.send(frame).await
    }

    /// Before the first byte: from here on nobody can say that it was not sent.
    fn mark_sent(&self, id: &str) {
        if let Some(waiting) = lock(&self.waiting).get_mut(id) {
            waiting.sent = true;
        }
    }

    /// A relay will not pass a request on. Once all have said so, there is nothing to wait for.
    fn refused(&self, id: &str, reason: String) {
        let mut waiting = lock(&self.waiting);
        let Some(request) = waiting.get_mut(id) else { return };
        request.refusals += 1;
        if request.refusals >= self.uri.relays.len()
            && let Some(answer) = request.answer.take()
            && answer.send(Err(reason)).is_err()
        {
            tracing::trace!("nobody waits for a refused request");
        }
    }

    /// An event that a relay handed us: the wallet's own and untouched, or nothing.
    fn take(&self, event: Event) {
        if event.pubkey != self.uri.wallet || !event.verify_id() || !event.verify_signature() {
            tracing::debug!(id = %event.id, "an event that is not the wallet's was dropped");
            return;
        }
        match event.kind.as_u16() {
            13194 => {
                let info = Info::read(&event);
                self.info.send_if_modified(|known| {
                    let is_news = known.as_ref().is_none_or(|known| known.created_at_s < info.created_at_s);
                    if is_news {
                        *known = Some(info);
                    }
                    is_news
                });
            }
            23195 if is_for(&event, &self.uri.keys.public_key()).unwrap_or(true) => {
                let mut waiting = lock(&self.waiting);
                let request =
                    event.tags.event_ids().find_map(|id| waiting.get_mut(&id.to_hex())?.answer.take());
                if let Some(answer) = request
                    && answer.send(Ok(event)).is_err()
                {
                    tracing::trace!("nobody waits for an answer any more");
                }
            }
            23196 | 23197 if is_for(&event, &self.uri.keys.public_key()) == Some(true) => {
                match message::notified(&self.uri, &event) {
                    Ok(hash) => self.hint(Hint::Changed(hash)),
                    Err(error) => tracing::debug!(%error, "a notification that cannot be read"),
                }
            }
            _ => {}
        }
    }

    fn hint(&self, hint: Hint) {
        if self.hints.send(hint).is_err() {
            tracing::trace!("nobody listens to the wallet's hints");
        }
    }
}

/// A refusal that AUTH may mend: the relay asks for it, or does not know us while it is under way. All is asked and sent
/// again once it took our AUTH.
fn is_before_auth(pending: bool, reason: &str) -> bool {
    let about_rights = ["restricted:", "blocked:"].iter().any(|prefix| reason.starts_with(prefix));
    reason.starts_with("auth-required") || (pending && about_rights)
}

/// Whether it names us; `None` where it names nobody.
fn is_for(event: &Event, us: &PublicKey) -> Option<bool> {
    let mut named = event.tags.public_keys().peekable();
    named.peek()?;
    Some(named.any(|key| key == us))
}

/// A subscription id: relays take up to 64 characters, some fewer.
fn short(id: &str) -> &str {
    id.get(..32).unwrap_or(id)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_counts_once_the_relay_knows_us_and_not_before() {
        for (pending, reason, before) in [
            (true, "restricted: members only", true),
            (true, "blocked: who are you?", true),
            (false, "restricted: members only", false),
            (true, "invalid: bad event", false),
            (false, "auth-required: who are you?", true),
        ] {
            assert_eq!(is_before_auth(pending, reason), before, "{reason}");
        }
    }
}
