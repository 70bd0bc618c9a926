//! Which invoice is asked for when, as a table that time and jitter are handed to. It asks nobody and holds no timer:
//! `lookups.rs` does.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

use super::Options;
use crate::wallet::{PaymentHash, Schedule, State};

/// What is followed, and when each is due.
pub(super) struct Plan {
    followed: HashMap<PaymentHash, Followed>,
    /// The same by time, without what is being asked for.
    due: BTreeSet<(Instant, PaymentHash)>,
    schedule: Schedule,
    least_pause: std::time::Duration,
    most: usize,
}

struct Followed {
    asked: u32,
    /// `None` while it is being asked for.
    at: Option<Instant>,
    last_asked: Option<Instant>,
    /// A nudge came while it was being asked for.
    again: bool,
    state: State,
}

impl Plan {
    pub fn new(options: &Options) -> Self {
        Self {
            followed: HashMap::new(),
            due: BTreeSet::new(),
            schedule: options.schedule.clone(),
            least_pause: options.least_pause,
            most: options.most,
        }
    }

    /// Due at once. `false`: there are too many.
    pub fn follow(&mut self, hash: PaymentHash, now: Instant) -> bool {
        if self.followed.contains_key(&hash) {
            return true;
        }
        if self.followed.len() >= self.most {
            return false;
        }
        let new = Followed { asked: 0, at: None, last_asked: None, again: false, state: State::Unknown };
        self.followed.insert(hash, new);
        self.put(hash, now);
        true
    }

    pub fn forget(&mut self, hash: PaymentHash) {
        if let Some(Followed { at: Some(at), .. }) = self.followed.remove(&hash) {
            self.due.remove(&(at, hash));
        }
    }

    /// Due soon, but not sooner than the least pause after the last time.
    pub fn nudge(&mut self, hash: PaymentHash, now: Instant) {
        let Some(followed) = self.followed.get_mut(&hash) else { return };
        let Some(at) = followed.at else {
            followed.again = true;
            return;
        };
        let soon = followed.last_asked.map_or(now, |last| now.max(last + self.least_pause));
        if soon < at {
            self.put(hash, soon);
        }
    }

    pub fn nudge_all(&mut self, now: Instant) {
        let all: Vec<_> = self.followed.keys().copied().collect();
        for hash in all {
            self.nudge(hash, now);
        }
    }

    /// When the next one is due.
    pub fn next(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// One that is due; from now on it is being asked for, until `learn`.
    pub fn take_due(&mut self, now: Instant) -> Option<PaymentHash> {
        let (at, hash) = *self.due.first()?;
        if at > now {
            return None;
        }
        self.due.pop_first();
        let followed = self.followed.get_mut(&hash)?;
        followed.at = None;
        followed.asked = followed.asked.saturating_add(1);
        followed.last_asked = Some(now);
        Some(hash)
    }

    /// What was answered, `Unknown` where nothing was. Gives the state where it is news. `unit` is the jitter.
    pub fn learn(&mut self, hash: PaymentHash, state: State, now: Instant, unit: f64) -> Option<State> {
        let followed = self.followed.get_mut(&hash)?;
        let again = std::mem::take(&mut followed.again);
        // Unknown after a known state is a wallet in trouble, not news.
        let is_news = state != State::Unknown && state != followed.state;
        if is_news {
            followed.state = state.clone();
        }
        // Hardly anything comes of these any more.
        let asked = match followed.state {
            State::Expired | State::Failed => u32::MAX,
            _ => followed.asked,
        };
        let pause = if again { self.least_pause } else { self.schedule.pause(asked, unit) };
        match state {
            State::Settled { .. } => self.forget(hash),
            _ => self.put(hash, now + pause),
        }
        is_news.then_some(state)
    }

    /// After a look-up that never came back: puts off whatever is not due at any time.
    pub fn mend(&mut self, now: Instant) {
        let lost: Vec<_> =
            self.followed.iter().filter(|(_, f)| f.at.is_none()).map(|(hash, _)| *hash).collect();
        for hash in lost {
            self.put(hash, now + self.schedule.pause(u32::MAX, 1.0));
        }
    }

    fn put(&mut self, hash: PaymentHash, at: Instant) {
        let Some(followed) = self.followed.get_mut(&hash) else { return };
        if let Some(before) = followed.at.replace(at) {
            self.due.remove(&(before, hash));
        }
        self.due.insert((at, hash));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn hash(n: u8) -> PaymentHash {
        PaymentHash::from_bytes([n; 32])
    }

    fn settled() -> State {
        State::Settled { received_msat: Some(1), settled_at_s: None, fee_msat: None }
    }

    /// Asks whenever one is due, from `began` for `span`; gives the seconds at which it asked.
    fn asked(plan: &mut Plan, began: Instant, span: Duration, answer: &State) -> Vec<u64> {
        let mut at = Vec::new();
        while let Some(next) = plan.next().filter(|next| *next <= began + span) {
            let hash = plan.take_due(next).unwrap();
            at.push((next - began).as_secs());
            plan.learn(hash, answer.clone(), next, 1.0);
        }
        at
    }

    #[test]
    fn an_invoice_is_asked_for_with_growing_pauses_and_told_only_when_it_changes() {
        let now = Instant::now();
        let mut plan = Plan::new(&Options::default());
        assert!(plan.follow(hash(1), now) && plan.follow(hash(1), now));
        let at = asked(&mut plan, now, 120 * S, &State::Unknown);
        assert_eq!(at, [0, 1, 2, 4, 8, 13, 20, 32, 49, 74, 113]);

        let now = plan.next().unwrap();
        assert_eq!(plan.take_due(now), Some(hash(1)));
        assert_eq!(plan.learn(hash(1), State::Unknown, now, 0.5), None, "not to be known is no news");
        assert_eq!(plan.learn(hash(1), State::Pending, now, 0.5), Some(State::Pending));
        assert_eq!(plan.learn(hash(1), State::Pending, now, 0.5), None);
        assert_eq!(plan.learn(hash(1), State::Unknown, now, 0.5), None, "a wallet in trouble");
        assert_eq!(plan.learn(hash(1), State::Expired, now, 1.0), Some(State::Expired));
        assert_eq!(plan.next(), Some(now + 60 * S), "it is followed on, seldom");
        assert_eq!(
            plan.learn(hash(1), settled(), now, 0.5),
            Some(settled()),
            "the wallet was wrong about it"
        );
        assert_eq!(plan.next(), None, "and that is the end");
        assert_eq!(plan.learn(hash(1), settled(), now, 0.5), None);
    }

    #[test]
    fn a_hint_brings_the_next_look_forward_and_a_flood_of_hints_does_not() {
        let now = Instant::now();
        let slow = Schedule::new(1_000 * S, 1_000 * S);
        let mut plan = Plan::new(&Options { schedule: slow, least_pause: 2 * S, ..Options::default() });
        plan.follow(hash(1), now);
        assert_eq!(plan.take_due(now), Some(hash(1)));
        plan.nudge(hash(1), now);
        plan.learn(hash(1), State::Pending, now, 1.0);
        assert_eq!(plan.next(), Some(now + 2 * S), "a hint during the look-up is not lost");
        plan.take_due(now + 2 * S).unwrap();
        plan.learn(hash(1), State::Pending, now + 2 * S, 1.0);
        assert_eq!(plan.next(), Some(now + 1_002 * S));

        for _ in 0..100 {
            plan.nudge(hash(1), now + 3 * S);
            plan.nudge(hash(9), now + 3 * S);
        }
        assert_eq!(plan.next(), Some(now + 4 * S), "two seconds after the last look");
        plan.nudge_all(now + 100 * S);
        assert_eq!(plan.next(), Some(now + 4 * S), "a hint never puts off");
        assert!(
            plan.take_due(now + 4 * S).is_some() && plan.next().is_none(),
            "what is not followed is not asked for"
        );
    }

    #[test]
    fn what_is_forgotten_is_not_asked_for_and_the_number_of_followed_is_bounded() {
        let now = Instant::now();
        let mut plan = Plan::new(&Options { most: 2, ..Options::default() });
        assert!(plan.follow(hash(1), now) && plan.follow(hash(2), now));
        assert!(!plan.follow(hash(3), now));
        plan.forget(hash(1));
        assert!(plan.follow(hash(3), now));
        assert_eq!((plan.take_due(now), plan.take_due(now)), (Some(hash(2)), Some(hash(3))));
        plan.forget(hash(2));
        assert_eq!(plan.learn(hash(2), settled(), now, 0.0), None, "forgotten while it was asked for");
        assert_eq!(plan.next(), None);
        plan.mend(now);
        assert_eq!(plan.next(), Some(now + 60 * S), "a look-up that never came back is not the end");
    }
}
