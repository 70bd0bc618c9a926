//! What is owed to one relay: which event to send next, what its OK means, when to try again and when to stop.
//! Pure bookkeeping; `session.rs` does the sending, `outbox.rs` writes the last words down.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backoff::Backoff;
use crate::store::record::Answer;

/// Sent and not yet answered at a time.
const WINDOW: usize = 64;
/// Longest reason kept, characters.
const MAX_REASON: usize = 300;
/// A relay that still wants AUTH after this many is not going to let us in.
const MAX_AUTH_TRIES: u32 = 3;

/// One event for one relay.
#[derive(Debug, Clone)]
pub(super) struct Delivery {
    pub(super) id: [u8; 32],
    /// The relay as spelled where the event was queued: each spelling gets its answer.
    pub(super) names: Vec<String>,
    pub(super) json: Arc<str>,
    /// Unix milliseconds.
    pub(super) give_up_ms: u64,
}

/// What an `OK` with this reason means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    Stored,
    /// No retry can mend it.
    Rejected,
    /// Try this event later.
    Later,
    /// Send nothing for a while.
    SlowDown,
    /// After AUTH.
    Auth,
}

pub(super) fn meaning(accepted: bool, reason: &str) -> Meaning {
    let prefix = reason.split_once(':').map_or("", |(prefix, _)| prefix).trim();
    match (accepted, prefix) {
        (true, _) | (_, "duplicate") => Meaning::Stored,
        (_, "auth-required") => Meaning::Auth,
        (_, "rate-limited") => Meaning::SlowDown,
        (_, "blocked" | "invalid" | "pow" | "restricted" | "mute" | "deleted" | "unsupported") => {
            Meaning::Rejected
        }
        _ => Meaning::Later,
    }
}

/// What AUTH may change.
fn is_about_rights(reason: &str) -> bool {
    ["restricted:", "blocked:"].iter().any(|prefix| reason.starts_with(prefix))
}

/// The longest pause before an event is sent again to a relay that says nothing to it: about thirty sendings a day.
const SILENCE_LONGEST: Duration = Duration::from_secs(3600);

/// Everything owed to one relay.
#[derive(Debug)]
pub(super) struct Deliveries {
    owed: HashMap<[u8; 32], Owed>,
    /// Ids to look at for sending, oldest first; may name ids no longer owed or not due.
    line: VecDeque<[u8; 32]>,
    in_flight: usize,
    paused_until: Option<Instant>,
    pace: Backoff,
    retry: Backoff,
    ok_timeout: Duration,
}

#[derive(Debug)]
struct Owed {
    delivery: Delivery,
    state: State,
    retry: Backoff,
    /// For a relay that says nothing: it may pass on what it neither stores nor confirms.
    silence: Backoff,
    auth_tries: u32,
    /// The relay said nothing to it in time, and was not asked yet whether it has it.
    unconfirmed: bool,
    trouble: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    Sent(Instant),
    After(Instant),
    NeedsAuth,
}

impl Deliveries {
    pub(super) fn new(retry: Backoff, ok_timeout: Duration) -> Self {
        Self {
            owed: HashMap::new(),
            line: VecDeque::new(),
            in_flight: 0,
            paused_until: None,
            pace: retry.clone(),
            retry,
            ok_timeout,
        }
    }

    pub(super) fn push(&mut self, delivery: Delivery) {
        if let Some(owed) = self.owed.get_mut(&delivery.id) {
            for name in delivery.names {
                if !owed.delivery.names.contains(&name) {
                    owed.delivery.names.push(name);
                }
            }
            return;
        }
        let id = delivery.id;
        let owed = Owed {
            delivery,
            state: State::Ready,
            retry: self.retry.clone(),
            silence: Backoff::new(self.ok_timeout, SILENCE_LONGEST),
            auth_tries: 0,
            unconfirmed: false,
            trouble: "not connected yet".to_owned(),
        };
        self.owed.insert(id, owed);
        self.line.push_back(id);
    }

    pub(super) fn len(&self) -> usize {
        self.owed.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.owed.is_empty()
    }

    /// The next event to send now, marked as sent. `None`: the window is full, or nothing is due.
    pub(super) fn next(&mut self, now: Instant, authed: bool) -> Option<Arc<str>> {
        if self.in_flight >= WINDOW || self.paused_until.is_some_and(|until| now < until) {
            return None;
        }
        self.paused_until = None;
        for _ in 0..self.line.len() {
            let id = self.line.pop_front()?;
            let Some(owed) = self.owed.get_mut(&id) else { continue };
            let due = match owed.state {
                State::Ready => true,
                State::After(at) => at <= now,
                State::NeedsAuth => authed,
                State::Sent(_) => continue,
            };
            if due {
                owed.state = State::Sent(now);
                self.in_flight += 1;
                return Some(Arc::clone(&owed.delivery.json));
            }
            self.line.push_back(id);
        }
        None
    }

    /// The relay's `OK`. A last word comes back with its delivery. `auth_pending`: the relay does not know yet who we
    /// are, so a refusal of our right to send is none of us.
    pub(super) fn answered(
        &mut self,
        id: &[u8; 32],
        accepted: bool,
        reason: &str,
        auth_pending: bool,
        now: Instant,
        jitter: f64,
    ) -> Option<(Delivery, Answer)> {
        let meaning = match meaning(accepted, reason) {
            Meaning::Rejected if auth_pending && is_about_rights(reason) => Meaning::Auth,
            meaning => meaning,
        };
        let owed = self.owed.get_mut(id)?;
        // A second answer to one sending: only a last word counts.
        let was_sent = matches!(owed.state, State::Sent(_));
        if was_sent {
            self.in_flight = self.in_flight.saturating_sub(1);
        } else if !matches!(meaning, Meaning::Stored | Meaning::Rejected) {
            return None;
        }
        let reason: String = reason.chars().take(MAX_REASON).collect();
        let last_word = match meaning {
            Meaning::Stored => Some(Answer::Stored),
            Meaning::Rejected => Some(Answer::Rejected { reason }),
            Meaning::Auth if owed.auth_tries >= MAX_AUTH_TRIES => Some(Answer::Rejected { reason }),
            Meaning::Auth => {
                owed.auth_tries += 1;
                owed.trouble = reason;
                owed.state = State::NeedsAuth;
                None
            }
            Meaning::Later | Meaning::SlowDown => {
                owed.trouble = reason;
                owed.state = State::After(now + owed.retry.next(jitter));
                None
            }
        };
        match meaning {
            Meaning::SlowDown => self.paused_until = Some(now + self.pace.next(jitter)),
            Meaning::Stored => self.pace.reset(),
            _ => {}
        }
        match last_word {
            Some(answer) => self.owed.remove(id).map(|owed| (owed.delivery, answer)),
            None => {
                self.line.push_back(*id);
                None
            }
        }
    }

    /// The relay does not let us in: what waits for that is tried once more later, or was refused often enough.
    pub(super) fn auth_failed(&mut self, now: Instant, jitter: f64) -> Vec<(Delivery, Answer)> {
        let mut refused = Vec::new();
        for (id, owed) in self.owed.iter_mut().filter(|(_, owed)| owed.state == State::NeedsAuth) {
            if owed.auth_tries >= MAX_AUTH_TRIES {
                refused.push(*id);
            } else {
                owed.state = State::After(now + owed.retry.next(jitter));
            }
        }
        let reason = |owed: &Owed| Answer::Rejected { reason: owed.trouble.clone() };
        refused.iter().filter_map(|id| self.take(id, reason)).collect()
    }

    /// Sent, and not answered in time: events that the relay may have all the same. Each is told once a sending.
    pub(super) fn take_unconfirmed(&mut self) -> Vec<[u8; 32]> {
        let silent =
            |(id, owed): (&[u8; 32], &mut Owed)| std::mem::take(&mut owed.unconfirmed).then_some(*id);
        self.owed.iter_mut().filter_map(silent).take(WINDOW).collect()
    }

    /// The relay will never take this event: too large, or the address is refused.
    pub(super) fn reject_all(
        &mut self,
        reason: &str,
        which: impl Fn(&Delivery) -> bool,
    ) -> Vec<(Delivery, Answer)> {
        let ids: Vec<_> =
            self.owed.iter().filter(|(_, owed)| which(&owed.delivery)).map(|(id, _)| *id).collect();
        ids.iter()
            .filter_map(|id| self.take(id, |_| Answer::Rejected { reason: reason.to_owned() }))
            .collect()
    }

    /// Sends again what got no OK in time, and gives up what is too late.
    pub(super) fn tick(&mut self, now: Instant, now_ms: u64, jitter: f64) -> Vec<(Delivery, Answer)> {
        let mut late = Vec::new();
        for (id, owed) in &mut self.owed {
            if owed.delivery.give_up_ms <= now_ms {
                late.push(*id);
            } else if let State::Sent(at) = owed.state
                && now.duration_since(at) >= self.ok_timeout
            {
                owed.trouble = format!("no OK within {} s", self.ok_timeout.as_secs());
                owed.unconfirmed = true;
                owed.state = State::After(now + owed.silence.next(jitter));
                self.in_flight = self.in_flight.saturating_sub(1);
                self.line.push_back(*id);
            }
        }
        late.iter()
            .filter_map(|id| self.take(id, |owed| Answer::GaveUp { reason: owed.trouble.clone() }))
            .collect()
    }

    /// The connection is gone: whatever was sent is sent again on the next one.
    pub(super) fn disconnected(&mut self, why: &str) {
        self.in_flight = 0;
        self.paused_until = None;
        for (id, owed) in &mut self.owed {
            if matches!(owed.state, State::Sent(_)) {
                self.line.push_back(*id);
            }
            if !matches!(owed.state, State::After(_)) {
                owed.state = State::Ready;
                owed.trouble = why.chars().take(MAX_REASON).collect();
            }
        }
    }

    fn take(&mut self, id: &[u8; 32], answer: impl Fn(&Owed) -> Answer) -> Option<(Delivery, Answer)> {
        let owed = self.owed.remove(id)?;
        if matches!(owed.state, State::Sent(_)) {
            self.in_flight = self.in_flight.saturating_sub(1);
        }
        let answer = answer(&owed);
        Some((owed.delivery, answer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deliveries() -> Deliveries {
        Deliveries::new(Backoff::new(Duration::from_secs(1), Duration::from_secs(8)), Duration::from_secs(20))
    }

    fn owed(n: u8) -> Delivery {
        Delivery {
            id: [n; 32],
            names: vec!["wss://r".into()],
            json: format!("{n}").into(),
            give_up_ms: 10_000,
        }
    }

    #[test]
    fn every_prefix_has_its_meaning() {
        for (reason, expected) in [
            ("duplicate: have it", Meaning::Stored),
            ("auth-required: who are you", Meaning::Auth),
            ("rate-limited: slow down", Meaning::SlowDown),
            ("blocked: go away", Meaning::Rejected),
            ("invalid: too large", Meaning::Rejected),
            ("pow: 28 bits", Meaning::Rejected),
            ("restricted: members only", Meaning::Rejected),
            ("mute: nobody listens", Meaning::Rejected),
            ("error: database is down", Meaning::Later),
            ("", Meaning::Later),
            ("blocked without a colon", Meaning::Later),
        ] {
            assert_eq!(meaning(false, reason), expected, "{reason}");
            assert_eq!(meaning(true, reason), Meaning::Stored);
        }
    }

    #[test]
    fn a_relay_that_never_says_ok_is_sent_an_event_some_thirty_times_a_day_and_not_every_20_seconds() {
        let (mut all, mut now, mut sent) = (deliveries(), Instant::now(), 0);
        all.push(Delivery { give_up_ms: u64::MAX, ..owed(1) });
        for _ in 0..24 * 3600 / 10 {
            sent += u32::from(all.next(now, false).is_some());
            now += Duration::from_secs(10);
            assert!(all.tick(now, 0, 1.0).is_empty());
        }
        assert!((25..40).contains(&sent), "{sent}");
    }

    #[test]
    fn trouble_is_tried_again_later_and_given_up_with_its_reason() {
        let (mut all, now) = (deliveries(), Instant::now());
        all.push(owed(1));
        assert!(all.next(now, false).is_some());
        assert!(all.answered(&[1; 32], false, "error: disk", false, now, 1.0).is_none());
        assert!(all.next(now, false).is_none(), "too early");
        assert!(all.next(now + Duration::from_secs(1), false).is_some());
        let given_up = all.tick(now, 10_000, 1.0);
        assert_eq!(given_up[0].1, Answer::GaveUp { reason: "error: disk".into() });
        assert!(all.is_empty());
        assert_eq!(all.in_flight, 0);
    }

    #[test]
    fn a_rate_limit_pauses_everything_for_this_relay() {
        let (mut all, now) = (deliveries(), Instant::now());
        all.push(owed(1));
        assert!(all.next(now, false).is_some());
        all.answered(&[1; 32], false, "rate-limited: slow", false, now, 1.0);
        all.push(owed(2));
        assert!(all.next(now, false).is_none());
        assert!(all.next(now + Duration::from_millis(1001), false).is_some());
        assert!(all.next(now + Duration::from_millis(1001), false).is_some());
    }

    #[test]
    fn without_an_ok_it_is_sent_again_and_after_a_break_at_once() {
        let (mut all, now) = (deliveries(), Instant::now());
        all.push(owed(1));
        assert!(all.next(now, false).is_some());
        let later = now + Duration::from_secs(20);
        assert!(all.tick(later, 1, 1.0).is_empty());
        assert!(all.next(later + Duration::from_secs(19), false).is_none());
        assert!(all.next(later + Duration::from_secs(20), false).is_some());
        all.disconnected("gone");
        assert!(all.next(later, false).is_some());
        assert!(all.next(later, false).is_none(), "once");
    }

    #[test]
    fn auth_is_waited_for_but_not_for_ever() {
        let (mut all, now) = (deliveries(), Instant::now());
        all.push(owed(1));
        for _ in 0..3 {
            assert!(all.next(now, true).is_some());
            assert!(all.answered(&[1; 32], false, "auth-required: x", false, now, 1.0).is_none());
            assert!(all.next(now, false).is_none(), "not before AUTH");
        }
        assert!(all.next(now, true).is_some());
        let word = all.answered(&[1; 32], false, "auth-required: x", false, now, 1.0);
        assert!(matches!(word, Some((_, Answer::Rejected { .. }))));
    }

    #[test]
    fn a_refusal_before_auth_is_none_and_one_that_auth_does_not_mend_is() {
        let (mut all, now) = (deliveries(), Instant::now());
        all.push(owed(1));
        assert!(all.next(now, false).is_some());
        assert!(all.answered(&[1; 32], false, "restricted: members only", true, now, 1.0).is_none());
        assert!(all.next(now, false).is_none() && all.next(now, true).is_some(), "again after AUTH");
        let word = all.answered(&[1; 32], false, "restricted: members only", false, now, 1.0);
        assert!(matches!(word, Some((_, Answer::Rejected { .. }))));
    }

    #[test]
    fn what_waits_for_auth_does_not_wait_when_the_relay_does_not_let_us_in() {
        let (mut all, mut now) = (deliveries(), Instant::now());
        all.push(owed(1));
        for tried in 1..=MAX_AUTH_TRIES {
            assert!(all.next(now, false).is_some(), "sending {tried}");
            assert!(all.answered(&[1; 32], false, "auth-required: who?", false, now, 1.0).is_none());
            let words = all.auth_failed(now, 1.0);
            assert_eq!(words.is_empty(), tried < MAX_AUTH_TRIES, "{words:?}");
            now += Duration::from_secs(8);
        }
        assert!(all.is_empty());
    }

    #[test]
    fn what_got_no_ok_is_asked_for_once_a_sending() {
        let (mut all, now) = (deliveries(), Instant::now());
        all.push(owed(1));
        assert!(all.next(now, false).is_some());
        assert!(all.take_unconfirmed().is_empty(), "there is time yet");
        let later = now + Duration::from_secs(20);
        assert!(all.tick(later, 1, 1.0).is_empty());
        assert_eq!((all.take_unconfirmed(), all.take_unconfirmed()), (vec![[1; 32]], vec![]));
        assert!(all.answered(&[1; 32], true, "", false, later, 1.0).is_some(), "the relay has it");
    }

    #[test]
    fn the_window_bounds_what_is_in_flight() {
        let (mut all, now) = (deliveries(), Instant::now());
        (0..200).for_each(|n| all.push(owed(n)));
        assert_eq!(std::iter::from_fn(|| all.next(now, false)).count(), WINDOW);
        all.answered(&[0; 32], true, "", false, now, 1.0);
        assert!(all.next(now, false).is_some());
    }
}
