//! Which invoice is asked for when, as a table that time and jitter are handed to. It asks nobody and holds no timer:
//! `lookups.rs` does.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use super::Options;
use crate::wallet::{PaymentHash, Schedule, State};

/// The longest pause of an invoice that may still be paid, while few are followed. A payer waits.
const LONGEST: Duration = Duration::from_secs(5);
/// Wallets settle late: one look so long after an invoice has expired.
pub(super) const LATE: Duration = Duration::from_secs(2);
/// After that hardly anything comes any more. Each pause is three times the one before.
const DEAD: Duration = Duration::from_secs(300);
const DEAD_LONGEST: Duration = Duration::from_secs(3_600);
/// Look-ups that may come at once: a part of what a minute has.
const BURST: u32 = 20;

/// What is followed, and when each is due.
pub(super) struct Plan {
    followed: HashMap<PaymentHash, Followed>,
    /// The same by time, without what is being asked for: first what is urgent.
    due: [BTreeSet<(Instant, PaymentHash)>; 2],
    /// Of them, those that may still be paid.
    alive: usize,
    schedule: Schedule,
    least_pause: Duration,
    most: usize,
    /// Between two look-ups, on average.
    gap: Duration,
    /// The rest of a minute's look-ups, as the instant from which there are enough.
    spent_until: Option<Instant>,
    /// Nobody is asked for before this.
    held_until: Option<Instant>,
}

struct Followed {
    asked: u32,
    /// `None` while it is being asked for.
    at: Option<(Urgency, Instant)>,
    last_asked: Option<Instant>,
    /// A nudge came while it was being asked for.
    again: bool,
    state: State,
    expires_at: Option<Instant>,
    is_dead: bool,
    /// Looks since it died.
    looks_dead: u32,
    failures: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Urgency {
    /// Somebody has said that it was paid, or it is about to expire.
    Now = 0,
    Later = 1,
}

impl Plan {
    pub fn new(options: &Options) -> Self {
        Self {
            followed: HashMap::new(),
            due: Default::default(),
            alive: 0,
            schedule: options.schedule.clone(),
            least_pause: options.least_pause,
            most: options.most,
            gap: Duration::from_secs(60) / options.per_minute.max(1),
            spent_until: None,
            held_until: None,
        }
    }

    /// Due at once, and again when it expires. `false`: there are too many.
    pub fn follow(&mut self, hash: PaymentHash, expires_at: Option<Instant>, now: Instant) -> bool {
        if self.followed.contains_key(&hash) {
            return true;
        }
        if self.followed.len() >= self.most {
            return false;
        }
        let new = Followed {
            asked: 0,
            at: None,
            last_asked: None,
            again: false,
            state: State::Unknown,
            expires_at,
            is_dead: false,
            looks_dead: 0,
            failures: 0,
        };
        self.followed.insert(hash, new);
        self.alive += 1;
        self.put(hash, Urgency::Later, now);
        true
    }

    pub fn forget(&mut self, hash: PaymentHash) {
        let Some(followed) = self.followed.remove(&hash) else { return };
        self.alive -= usize::from(!followed.is_dead);
        if let Some((urgency, at)) = followed.at {
            self.due_of(urgency).remove(&(at, hash));
        }
    }

    /// Due soon, but not sooner than the least pause after the last time.
    pub fn nudge(&mut self, hash: PaymentHash, now: Instant) {
        let Some(followed) = self.followed.get_mut(&hash) else { return };
        let Some((_, at)) = followed.at else {
            followed.again = true;
            return;
        };
        let soon = followed.last_asked.map_or(now, |last| now.max(last + self.least_pause));
        self.put(hash, Urgency::Now, soon.min(at));
    }

    pub fn nudge_all(&mut self, now: Instant) {
        let all: Vec<_> = self.followed.iter().filter(|(_, f)| !f.is_dead).map(|(hash, _)| *hash).collect();
        for hash in all {
            self.nudge(hash, now);
        }
    }

    /// The wallet has had enough: nobody is asked for before `until`.
    pub fn hold(&mut self, until: Instant) {
        self.held_until = self.held_until.max(Some(until));
    }

    /// When the next one is due.
    pub fn next(&self) -> Option<Instant> {
        let [now, later] = &self.due;
        let first = now.first().into_iter().chain(later.first()).map(|(at, _)| *at).min()?;
        let room = self.spent_until.and_then(|until| until.checked_sub(self.gap * (BURST - 1)));
        Some(room.into_iter().chain(self.held_until).fold(first, Instant::max))
    }

    /// One that is due; from now on it is being asked for, until `learn` or `fail`.
    pub fn take_due(&mut self, now: Instant) -> Option<PaymentHash> {
        if self.next()? > now {
            return None;
        }
        let set = self.due.iter_mut().find(|set| set.first().is_some_and(|(at, _)| *at <= now))?;
        let (_, hash) = set.pop_first()?;
        self.spent_until = Some(self.spent_until.map_or(now, |until| until.max(now)) + self.gap);
        let followed = self.followed.get_mut(&hash)?;
        followed.at = None;
        followed.asked = followed.asked.saturating_add(1);
        followed.last_asked = Some(now);
        Some(hash)
    }

    /// What was answered. Gives the state where it is news. `unit` is the jitter.
    pub fn learn(&mut self, hash: PaymentHash, state: State, now: Instant, unit: f64) -> Option<State> {
        let followed = self.followed.get_mut(&hash)?;
        followed.failures = 0;
        // Unknown after a known state is a wallet in trouble, not news.
        let is_news = state != State::Unknown && state != followed.state;
        if is_news {
            followed.state = state.clone();
        }
        match state {
            State::Settled { .. } => self.forget(hash),
            _ => self.put_off(hash, now, unit),
        }
        is_news.then_some(state)
    }

    /// Nothing was answered that can be used. How often that is so without a break; 0: it is not followed any more.
    pub fn fail(&mut self, hash: PaymentHash, now: Instant, unit: f64) -> u32 {
        let Some(followed) = self.followed.get_mut(&hash) else { return 0 };
        followed.failures = followed.failures.saturating_add(1);
        let failures = followed.failures;
        self.put_off(hash, now, unit);
        failures
    }

    fn put_off(&mut self, hash: PaymentHash, now: Instant, unit: f64) {
        let (alive, least_pause) = (self.alive, self.least_pause);
        let Some(followed) = self.followed.get_mut(&hash) else { return };
        let late = followed.expires_at.map(|at| at + LATE);
        let is_over = match followed.state {
            State::Failed => true,
            State::Expired => late.is_none_or(|late| late <= now),
            State::Held { .. } => false,
            _ => late.is_some_and(|late| late <= now),
        };
        if is_over && !followed.is_dead {
            followed.is_dead = true;
            self.alive -= 1;
        }
        if std::mem::take(&mut followed.again) {
            return self.put(hash, Urgency::Now, now + least_pause);
        }
        if followed.is_dead {
            let pause = DEAD.saturating_mul(3_u32.saturating_pow(followed.looks_dead)).min(DEAD_LONGEST);
            followed.looks_dead = followed.looks_dead.saturating_add(1);
            return self.put(hash, Urgency::Later, now + pause.mul_f64(0.75 + 0.25 * unit.clamp(0.0, 1.0)));
        }
        // All together keep to what a minute has.
        let share = self.gap.saturating_mul(u32::try_from(alive).unwrap_or(u32::MAX)).max(LONGEST);
        let share = share.max(self.schedule.pause(1, 1.0));
        let pause = self.schedule.pause(followed.asked, unit).min(share);
        // Paid in the last second is paid.
        let ends = followed.expires_at.into_iter().chain(late).find(|at| *at > now);
        match ends.filter(|end| *end <= now + pause) {
            Some(end) => self.put(hash, Urgency::Now, end),
            None => self.put(hash, Urgency::Later, now + pause),
        }
    }

    /// After a look-up that never came back: puts off whatever is not due at any time.
    pub fn mend(&mut self, now: Instant) {
        let lost: Vec<_> =
            self.followed.iter().filter(|(_, f)| f.at.is_none()).map(|(hash, _)| *hash).collect();
        for hash in lost {
            self.put(hash, Urgency::Later, now + self.schedule.pause(u32::MAX, 1.0));
        }
    }

    fn due_of(&mut self, urgency: Urgency) -> &mut BTreeSet<(Instant, PaymentHash)> {
        let [now, later] = &mut self.due;
        if urgency == Urgency::Now { now } else { later }
    }

    fn put(&mut self, hash: PaymentHash, urgency: Urgency, at: Instant) {
        let Some(followed) = self.followed.get_mut(&hash) else { return };
        if let Some((before, was_at)) = followed.at.replace((urgency, at)) {
            self.due_of(before).remove(&(was_at, hash));
        }
        self.due_of(urgency).insert((at, hash));
    }
}

#[cfg(test)]
mod tests {
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
        assert!(plan.follow(hash(1), None, now) && plan.follow(hash(1), None, now));
        let at = asked(&mut plan, now, 120 * S, &State::Unknown);
        assert_eq!(
            at[..7],
            [0, 1, 2, 4, 8, 13, 18],
            "a payer who waits is not kept for more than five seconds"
        );

        let now = plan.next().unwrap();
        assert_eq!(plan.take_due(now), Some(hash(1)));
        assert_eq!(plan.learn(hash(1), State::Unknown, now, 0.5), None, "not to be known is no news");
        assert_eq!(plan.learn(hash(1), State::Pending, now, 0.5), Some(State::Pending));
        assert_eq!(plan.learn(hash(1), State::Pending, now, 0.5), None);
        assert_eq!(plan.learn(hash(1), State::Unknown, now, 0.5), None, "a wallet in trouble");
        assert_eq!(plan.learn(hash(1), State::Expired, now, 1.0), Some(State::Expired));
        assert_eq!(plan.next(), Some(now + 300 * S), "it is followed on, seldom");
        assert_eq!(
            plan.learn(hash(1), settled(), now, 0.5),
            Some(settled()),
            "the wallet was wrong about it"
        );
        assert_eq!(plan.next(), None, "and that is the end");
        assert_eq!(plan.learn(hash(1), settled(), now, 0.5), None);
    }

    #[test]
    fn it_is_asked_for_at_its_expiry_and_once_again_a_moment_later_and_then_seldom() {
        let now = Instant::now();
        let mut plan = Plan::new(&Options::default());
        plan.follow(hash(1), Some(now + 61 * S), now);
        let at = asked(&mut plan, now, 4_000 * S, &State::Pending);
        let last: Vec<_> = at.into_iter().skip_while(|at| *at < 61).collect();
        assert_eq!(last, [61, 63, 363, 1_263, 3_963]);

        // One that the wallet calls expired at that moment may still turn out to be paid.
        let mut plan = Plan::new(&Options::default());
        plan.follow(hash(1), Some(now + S), now);
        plan.take_due(now + S).unwrap();
        plan.learn(hash(1), State::Expired, now + S, 1.0);
        assert_eq!(plan.next(), Some(now + S + LATE));
    }

    #[test]
    fn all_look_ups_together_keep_to_what_a_minute_has_and_what_is_urgent_goes_first() {
        let now = Instant::now();
        let mut plan = Plan::new(&Options { per_minute: 60, ..Options::default() });
        for n in 0..200 {
            plan.follow(hash(n), Some(now + 3_600 * S), now);
        }
        let mut looks = Vec::new();
        while let Some(next) = plan.next().filter(|next| *next < now + 600 * S) {
            // Somebody has paid.
            if looks.len() == 100 {
                plan.nudge(hash(199), next);
            }
            let hash = plan.take_due(next).unwrap();
            looks.push(((next - now).as_secs(), hash));
            plan.learn(hash, State::Pending, next, 1.0);
        }
        assert_eq!(looks[100].1, hash(199), "before all that are overdue");
        for minute in 0..10 {
            let in_it = looks.iter().filter(|(at, _)| at / 60 == minute).count();
            assert!(in_it <= 60 + BURST as usize, "{in_it} in minute {minute}");
        }
        let seen: std::collections::HashSet<_> = looks.iter().map(|(_, hash)| *hash).collect();
        assert_eq!(seen.len(), 200, "nobody is left out");

        let end = now + 600 * S;
        plan.hold(end + 30 * S);
        assert_eq!(plan.next(), Some(end + 30 * S), "a wallet that has had enough is left alone");
        assert_eq!(plan.take_due(end + 29 * S), None);
    }

    #[test]
    fn failures_are_counted_until_there_is_an_answer() {
        let now = Instant::now();
        let mut plan = Plan::new(&Options::default());
        plan.follow(hash(1), None, now);
        assert_eq!([1, 2, 3].map(|_| plan.fail(hash(1), now, 0.5)), [1, 2, 3]);
        plan.learn(hash(1), State::Unknown, now, 0.5);
        assert_eq!((plan.fail(hash(1), now, 0.5), plan.fail(hash(2), now, 0.5)), (1, 0));
    }

    #[test]
    fn a_hint_brings_the_next_look_forward_and_a_flood_of_hints_does_not() {
        let now = Instant::now();
        let slow = Schedule::new(1_000 * S, 1_000 * S);
        let mut plan = Plan::new(&Options { schedule: slow, least_pause: 2 * S, ..Options::default() });
        plan.follow(hash(1), None, now);
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
        assert!(plan.follow(hash(1), None, now) && plan.follow(hash(2), None, now));
        assert!(!plan.follow(hash(3), None, now));
        plan.forget(hash(1));
        assert!(plan.follow(hash(3), None, now));
        assert_eq!((plan.take_due(now), plan.take_due(now)), (Some(hash(2)), Some(hash(3))));
        plan.forget(hash(2));
        assert_eq!(plan.learn(hash(2), settled(), now, 0.0), None, "forgotten while it was asked for");
        assert_eq!(plan.next(), None);
        plan.mend(now);
        assert_eq!(plan.next(), Some(now + 60 * S), "a look-up that never came back is not the end");
    }
}
