//! Following one of our relays: what to subscribe to on a new connection, the gap to fill (on connect, on lag, on
//! a timer), and when the cursor is written down. The socket is `session.rs`'s, the check of events `verify.rs`'s.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nostr_sdk::prelude::{Alphabet, Event, EventId, Filter, Kind, PublicKey, SingleLetterTag, Timestamp};
use tokio::sync::{mpsc, watch};
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::answered::{Answered, RESULTS};
use super::fill::{Fill, Page};
use super::hints::{self, HINTS};
use super::inbox::{self, Inbox};
use super::limits::Limits;
use super::session::{Command, Link, Signal, Sink};
use super::subscriptions::Life;
use super::verify::{Counts, Intake, Source, Wanted};
use super::{Clock, Glance, Inbound, Memory, Options, lock};
use crate::store::record::Record;

const LIVE: &str = "live";
const CANCELS: &str = "cancels";
/// Each page has its own id, so that a late word about one is not taken for the next one's.
const FILL: &str = "fill-";
/// Ids in one `#e` filter, and such filters in one subscription.
const IDS_A_FILTER: usize = 100;
const MAX_FILTERS: usize = 8;
/// A relay with fewer subscriptions gets one at a time.
const SUBSCRIPTIONS: u64 = 3;
/// Forged events of one connection before we hang up; a good one makes up for a forged one.
const MAX_BAD: i64 = 200;
/// A relay that comes and goes is told of at most this often, and one that stays away is recalled this often.
const NEWS_EVERY: Duration = Duration::from_secs(60);
const RECALL_EVERY: Duration = Duration::from_secs(3600);

/// The page that is asked for now, and what has come of it.
#[derive(Debug, Default)]
pub(super) struct Asked {
    number: u64,
    id: String,
    page: Page,
}

impl Asked {
    /// A new page; the one before is forgotten.
    fn next(&mut self) -> String {
        self.number += 1;
        self.id = format!("{FILL}{}", self.number);
        self.page = Page::default();
        self.id.clone()
    }
}

/// What the session of one of our relays reports to.
pub(super) struct FollowSink {
    pub(super) source: Arc<Source>,
    pub(super) intake: Arc<Intake>,
    pub(super) inbox: Arc<Inbox>,
    pub(super) answered: Arc<Answered>,
    pub(super) receipts: Option<mpsc::Sender<Event>>,
    pub(super) page: Arc<Mutex<Asked>>,
    pub(super) signals: mpsc::UnboundedSender<Signal>,
    /// The balance when the connection began.
    pub(super) began_at: AtomicI64,
}

impl Sink for FollowSink {
    async fn event(&self, subscription: &str, wanted: &Arc<Wanted>, glance: Glance, frame: Utf8Bytes) {
        if inbox::is_ours(subscription) {
            return self.inbox.hear(&self.source, subscription, wanted, &glance, &frame);
        }
        if subscription == HINTS {
            return hints::hear(self.receipts.as_ref(), &self.source, wanted, &glance, &frame);
        }
        if subscription == RESULTS {
            return self.answered.hear(wanted, &frame);
        }
        if subscription.starts_with(FILL) && wanted.may_match(&glance) {
            let mut asked = lock(&self.page);
            if asked.id == subscription {
                asked.page.note(glance.created_at);
            }
        }
        self.intake.offer(&self.source, wanted, glance, frame).await;
    }

    fn signal(&self, signal: Signal) {
        if let Signal::Connected(_) = &signal {
            self.began_at.store(self.balance(), Ordering::Relaxed);
        }
        let Some(signal) = self.inbox.sort_out(&self.source.relay, signal) else { return };
        if self.signals.send(signal).is_err() {
            tracing::trace!("a relay spoke after its follower ended");
        }
    }

    fn is_hostile(&self) -> bool {
        self.balance().saturating_sub(self.began_at.load(Ordering::Relaxed)) > MAX_BAD
    }
}

impl FollowSink {
    /// Forged events less good ones, so far. What cannot be read may be signed by a stranger, and is not counted.
    fn balance(&self) -> i64 {
        let counts = &self.source.counts;
        let count = |counter| i64::try_from(Counts::of(counter)).unwrap_or(i64::MAX);
        count(&counts.forged) - count(&counts.verified) - count(&counts.duplicate)
    }
}

/// The follower of one relay.
pub(super) struct Follow {
    pub(super) options: Options,
    pub(super) me: PublicKey,
    pub(super) source: Arc<Source>,
    pub(super) link: Arc<Mutex<Link>>,
    pub(super) page: Arc<Mutex<Asked>>,
    pub(super) memory: Arc<dyn Memory>,
    pub(super) clock: Clock,
    pub(super) commands: mpsc::UnboundedSender<Command>,
    pub(super) signals: mpsc::UnboundedReceiver<Signal>,
    /// Where the answers about deliveries go.
    pub(super) answers: mpsc::UnboundedSender<Signal>,
    pub(super) watched: watch::Receiver<Vec<EventId>>,
    pub(super) inbound: mpsc::WeakSender<Inbound>,
    /// Turns true when no more events are wanted.
    pub(super) draining: watch::Receiver<bool>,
}

/// What one connection is at.
#[derive(Default)]
struct State {
    connected: bool,
    /// One subscription at a time.
    lean: bool,
    page_limit: usize,
    /// The live subscription has told its stored events and was not closed since.
    live: bool,
    /// Everything up to the beginning of this connection was received.
    filled: bool,
    /// Where the first gap of this connection begins, Unix seconds.
    from: Option<u64>,
    /// When the list of results is waited for no longer.
    results_due: Option<Instant>,
    fill: Option<(Fill, u64)>,
    page_due: Option<Instant>,
    fill_at: Option<Instant>,
    written: Option<Instant>,
    verified_then: u64,
    unwritten: Option<u64>,
    watch_at: Option<Instant>,
}

/// What the log says of the connection.
#[derive(Default)]
struct News {
    lost: Option<Instant>,
    told: Option<Instant>,
}

impl News {
    fn may_tell(&mut self, every: Duration) -> bool {
        let may = self.told.is_none_or(|at| at.elapsed() >= every);
        if may {
            self.told = Some(Instant::now());
        }
        may
    }

    fn connected(&mut self, relay: &str) {
        match self.lost.take() {
            None => tracing::info!(relay, "relay connected"),
            Some(at) if self.told.take().is_some() => {
                tracing::info!(relay, after_s = at.elapsed().as_secs(), "relay connected again");
            }
            Some(_) => tracing::debug!(relay, "relay connected again"),
        }
    }

    fn lost(&mut self, relay: &str, why: &str) {
        self.lost = Some(Instant::now());
        if self.may_tell(NEWS_EVERY) {
            tracing::warn!(relay, why, "relay lost; it is tried again for ever");
        }
    }

    /// For a relay that is not connected.
    fn away(&mut self, relay: &str, link: &Link) {
        let Some(why) = link.trouble.as_deref().filter(|_| link.attempts > 0) else { return };
        self.lost.get_or_insert_with(Instant::now);
        if self.may_tell(RECALL_EVERY) {
            tracing::warn!(
                relay,
                why,
                attempts = link.attempts,
                "relay not reached; it is tried again for ever"
            );
        }
    }
}

impl Follow {
    pub(super) async fn run(mut self) {
        let mut state = State::default();
        let mut news = News::default();
        let mut asked_results = false;
        let mut tick = tokio::time::interval(self.options.wire.tick);
        let mut drained = false;
        loop {
            tokio::select! {
                signal = self.signals.recv() => match signal {
                    None => break,
                    Some(Signal::Ended) => break,
                    Some(signal) => {
                        match &signal {
                            Signal::Connected(_) => news.connected(&self.source.relay),
                            Signal::Disconnected(why) if !drained => news.lost(&self.source.relay, why),
                            _ => {}
                        }
                        let is_first = matches!(signal, Signal::Connected(_)) && !drained && !asked_results;
                        self.on_signal(&mut state, signal, drained, is_first);
                        asked_results |= is_first;
                    }
                },
                changed = self.watched.changed(), if !drained => {
                    if changed.is_ok() && state.watch_at.is_none() {
                        state.watch_at = Some(Instant::now() + self.options.watch_delay);
                    }
                }
                changed = self.draining.changed(), if !drained => {
                    drained = changed.is_err() || *self.draining.borrow();
                    if drained {
                        self.send(Command::Unsubscribe(LIVE.into()));
                        self.send(Command::Unsubscribe(CANCELS.into()));
                        self.send(Command::Unsubscribe(HINTS.into()));
                        self.send(Command::Unsubscribe(RESULTS.into()));
                        self.send(Command::Unsubscribe(self.asked().id.clone()));
                        state.fill = None;
                        state.results_due = None;
                        state.live = false;
                    }
                }
                _ = tick.tick() => {
                    if !state.connected && !drained {
                        news.away(&self.source.relay, &lock(&self.link));
                    }
                    self.on_tick(&mut state, drained);
                }
            }
        }
        self.settle(&mut state, true);
    }

    fn on_signal(&self, state: &mut State, signal: Signal, drained: bool, is_first: bool) {
        match signal {
            Signal::Connected(limits) if !drained => self.on_connected(state, limits, is_first),
            // What came before was for strangers: the whole gap is asked for again.
            Signal::Authenticated if state.connected && state.results_due.is_none() && !drained => {
                state.filled = false;
                self.start_fill(state);
            }
            Signal::Connected(_) | Signal::Authenticated | Signal::Ended => {}
            Signal::Disconnected(_) => {
                let (written, unwritten) = (state.written, state.unwritten);
                *state = State { written, unwritten, verified_then: state.verified_then, ..State::default() };
                self.settle(state, true);
            }
            Signal::EndOfStored(id) if id == RESULTS => self.listen(state),
            Signal::EndOfStored(id) if id == LIVE => {
                state.live = true;
                if !state.filled && state.fill.is_none() && !drained {
                    self.start_fill(state);
                }
            }
            Signal::EndOfStored(id) if id == self.asked().id => self.on_page(state),
            Signal::EndOfStored(_) => {}
            Signal::Closed { subscription, reason } => {
                tracing::warn!(
                    relay = self.source.relay,
                    subscription,
                    reason,
                    "a relay closed a subscription"
                );
                match subscription.as_str() {
                    // Whatever came meanwhile is a gap.
                    LIVE => (state.live, state.filled) = (false, false),
                    RESULTS => self.listen(state),
                    id if id == self.asked().id => self.abandon_fill(state),
                    _ => {}
                }
            }
            answered @ Signal::Answered(..) => {
                if self.answers.send(answered).is_err() {
                    tracing::debug!("a relay answered after the outbox ended; the event will be sent again");
                }
            }
        }
    }

    /// `is_first`: of this process at this relay.
    fn on_connected(&self, state: &mut State, limits: Limits, is_first: bool) {
        state.connected = true;
        state.lean = limits.max_subscriptions.is_some_and(|max| max < SUBSCRIPTIONS);
        let most = limits.max_limit.and_then(|max| usize::try_from(max).ok()).unwrap_or(usize::MAX);
        state.page_limit = self.options.page_limit.min(most);
        if self.options.receipts.is_some()
            && let Some(wanted) = hints::wanted(self.me, self.now(), &limits)
        {
            self.send(Command::Subscribe(HINTS.into(), wanted, Life::Connection));
        }
        if is_first && !self.options.kinds.is_empty() {
            // Before the requests: of those which have a result already none is begun.
            let wanted = Answered::wanted(&self.options.kinds, self.gap(), state.page_limit);
            self.send(Command::Subscribe(RESULTS.into(), wanted, Life::Once));
            state.results_due = Some(Instant::now() + self.options.wire.page_timeout);
        } else {
            state.results_due = Some(Instant::now());
            self.listen(state);
        }
    }

    /// The results are known, or nobody tells: now the requests.
    fn listen(&self, state: &mut State) {
        if state.results_due.take().is_none() {
            return;
        }
        if !state.lean {
            self.subscribe_live(state);
            self.subscribe_cancels();
        }
        self.start_fill(state);
    }

    /// Where the gap in this relay's history begins, Unix seconds.
    fn gap(&self) -> u64 {
        match self.source.progress.cursor() {
            Some(cursor) => cursor.saturating_sub(self.options.overlap_s),
            None => self.now().saturating_sub(self.options.look_back_s),
        }
    }

    fn on_tick(&self, state: &mut State, drained: bool) {
        let now = Instant::now();
        if state.connected && !drained {
            if state.results_due.is_some_and(|due| due <= now) {
                self.send(Command::Unsubscribe(RESULTS.into()));
                self.listen(state);
            }
            if state.results_due.is_none() && state.watch_at.is_some_and(|at| at <= now) {
                state.watch_at = None;
                if state.lean && state.fill.is_none() {
                    self.subscribe_live(state);
                } else if !state.lean {
                    self.subscribe_cancels();
                }
            }
            if state.page_due.is_some_and(|due| due <= now) {
                tracing::debug!(relay = self.source.relay, "a page of stored events took too long");
                self.send(Command::Unsubscribe(self.asked().id.clone()));
                self.abandon_fill(state);
            }
            if state.fill.is_none()
                && state.results_due.is_none()
                && (state.fill_at.is_some_and(|at| at <= now) || self.can_mend_lag(state, now))
            {
                self.start_fill(state);
            }
            if state.live && state.filled {
                let heard = lock(&self.link).heard_ms / 1000;
                self.source.progress.cover(heard);
            }
        }
        self.settle(state, drained);
    }

    /// Events were dropped, and there is room again.
    fn can_mend_lag(&self, state: &State, now: Instant) -> bool {
        if self.source.progress.lagged_from().is_none() {
            return false;
        }
        let room =
            self.inbound.upgrade().is_some_and(|inbound| inbound.capacity() * 2 >= inbound.max_capacity());
        // Not sooner after the last fill than a tick: `fill_at` is set far ahead by a good fill only.
        room && state.page_due.is_none_or(|due| due <= now)
    }

    // === What is asked ===

    fn requests(&self) -> Vec<Filter> {
        let kinds: BTreeSet<u16> = self.options.kinds.iter().copied().collect();
        if kinds.is_empty() {
            return Vec::new();
        }
        let k = SingleLetterTag::lowercase(Alphabet::K);
        let cancels = Filter::new().kind(Kind::EventDeletion);
        vec![
            Filter::new().kinds(kinds.iter().map(|kind| Kind::from(*kind))),
            cancels.clone().custom_tags(k, kinds.iter().map(u16::to_string)),
            cancels.pubkey(self.me),
        ]
    }

    fn cancels(&self) -> Vec<Filter> {
        let watched = self.watched.borrow();
        if watched.len() > IDS_A_FILTER * MAX_FILTERS {
            tracing::warn!(
                open = watched.len(),
                "too many open jobs to watch each for a cancel without a `k` tag"
            );
        }
        let cancels = |ids: &[EventId]| Filter::new().kind(Kind::EventDeletion).events(ids.iter().copied());
        watched.chunks(IDS_A_FILTER).take(MAX_FILTERS).map(cancels).collect()
    }

    fn subscribe_live(&self, state: &mut State) {
        let since = self.now().saturating_sub(self.options.live_back_s.max(self.options.overlap_s));
        // What is stored is the fill's to get; the limit does not count for what comes from now on.
        let live = |filter: Filter| filter.since(Timestamp::from(since)).limit(state.page_limit);
        let mut filters: Vec<_> = self.requests().into_iter().map(live).collect();
        if state.lean {
            filters.extend(self.cancels());
        }
        state.live = false;
        if !filters.is_empty() {
            self.send(Command::Subscribe(LIVE.into(), Wanted::new(filters), Life::Connection));
        }
    }

    fn subscribe_cancels(&self) {
        let filters = self.cancels();
        if filters.is_empty() {
            self.send(Command::Unsubscribe(CANCELS.into()));
        } else {
            self.send(Command::Subscribe(CANCELS.into(), Wanted::new(filters), Life::Connection));
        }
    }

    // === The gap ===

    fn start_fill(&self, state: &mut State) {
        let (now, progress) = (self.now(), &self.source.progress);
        let mut since = self.gap();
        if !state.filled {
            // The cursor may have moved since: by what a relay showed to a stranger.
            since = since.min(*state.from.get_or_insert(since));
        }
        if let Some(lagged) = progress.lagged_from() {
            since = since.min(lagged);
        }
        progress.begin_fill();
        if state.lean {
            self.send(Command::Unsubscribe(LIVE.into()));
            state.live = false;
        }
        state.fill_at = None;
        state.fill = Some((Fill::new(self.requests(), since, state.page_limit), now));
        self.ask_page(state);
    }

    fn ask_page(&self, state: &mut State) {
        let Some((fill, began)) = &state.fill else { return };
        match fill.next() {
            Some(filter) => {
                let id = self.asked().next();
                self.send(Command::Subscribe(id, Wanted::new(vec![filter]), Life::Once));
                state.page_due = Some(Instant::now() + self.options.wire.page_timeout);
            }
            None => {
                if fill.crowded > 0 {
                    tracing::warn!(
                        relay = self.source.relay,
                        seconds = fill.crowded,
                        "more events in one second than this relay sends at once; some may be missed"
                    );
                }
                self.source.progress.cover(*began);
                state.filled = true;
                self.end_fill(state, self.options.refill_every);
            }
        }
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        lock(&self.page)
    }

    fn on_page(&self, state: &mut State) {
        let page = self.asked().page;
        let Some((fill, _)) = &mut state.fill else { return };
        if fill.page(page) {
            self.ask_page(state);
        } else {
            tracing::warn!(relay = self.source.relay, "this relay's history has no end; left");
            self.abandon_fill(state);
        }
    }

    fn abandon_fill(&self, state: &mut State) {
        state.filled = false;
        self.end_fill(state, self.options.wire.page_timeout);
    }

    fn end_fill(&self, state: &mut State, next: Duration) {
        state.fill = None;
        state.page_due = None;
        state.fill_at = Some(Instant::now() + next);
        if state.lean {
            self.subscribe_live(state);
        }
    }

    // === The cursor ===

    /// Moves the cursor, and writes it down: soon when something was handled, seldom when all is quiet.
    fn settle(&self, state: &mut State, at_once: bool) {
        state.unwritten = self.source.progress.settle().or(state.unwritten);
        let Some(until) = state.unwritten else { return };
        let verified = Counts::of(&self.source.counts.verified);
        let pause = match verified == state.verified_then {
            true => self.options.quiet_cursor_every,
            false => self.options.cursor_every,
        };
        if at_once || state.written.is_none_or(|at| at.elapsed() >= pause) {
            self.memory.append_lazily(vec![Record::Cursor { relay: self.source.relay.clone(), until }]);
            state.unwritten = None;
            state.written = Some(Instant::now());
            state.verified_then = verified;
        }
    }

    fn now(&self) -> u64 {
        (self.clock)() / 1000
    }

    fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            tracing::trace!(relay = self.source.relay, "the session has ended");
        }
    }
}
