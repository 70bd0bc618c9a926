//! When to try again: pauses that grow, with jitter, to a longest one, for ever. It holds no timer and no clock; what is
//! tried is the caller's.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// Pauses by their number.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    first: Duration,
    longest: Duration,
    growth: f64,
}

impl Schedule {
    /// Each pause is half as long again as the one before, from `first` to `longest`; `longest` counts for at least
    /// `first`, and `first` for at least a millisecond.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self::growing(first, longest, 1.5)
    }

    fn growing(first: Duration, longest: Duration, growth: f64) -> Self {
        let first = first.max(Duration::from_millis(1));
        Self { first, longest: longest.max(first), growth }
    }

    /// The pause after the `tried`-th try, counted from 1. `unit` in 0..1 is the jitter: the upper half of the step is
    /// spread, so that what began together is not tried again together.
    pub fn pause(&self, tried: u32, unit: f64) -> Duration {
        // A hundred steps lead over any longest pause; the exponent is kept finite.
        let steps = i32::try_from(tried.saturating_sub(1).min(100)).unwrap_or(100);
        let step = (self.first.as_secs_f64() * self.growth.powi(steps)).min(self.longest.as_secs_f64());
        Duration::from_secs_f64(step * (0.5 + 0.5 * unit.clamp(0.0, 1.0)))
    }
}

impl Default for Schedule {
    /// From one second to a minute: a payer looks at the screen at first.
    fn default() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_secs(60))
    }
}

/// Pauses that double and are counted here.
#[derive(Debug, Clone)]
pub struct Backoff {
    schedule: Schedule,
    failures: u32,
}

impl Backoff {
    /// From `first` to `longest`, bounded as [`Schedule::new`].
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { schedule: Schedule::growing(first, longest, 2.0), failures: 0 }
    }

    /// The next pause, with jitter as [`Schedule::pause`].
    pub fn next(&mut self, unit: f64) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.schedule.pause(self.failures, unit)
    }

    /// From now on the longest pause, until `reset`.
    pub fn worst(&mut self) {
        self.failures = u32::MAX;
    }

    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A number in 0..1 for jitter; not for secrets.
pub fn random_unit() -> f64 {
    let bits = RandomState::new().build_hasher().finish() >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn pauses_grow_by_half_up_to_the_longest() {
        let schedule = Schedule::new(2 * S, 10 * S);
        let pauses: Vec<_> = (1..8).map(|tried| schedule.pause(tried, 1.0).as_millis()).collect();
        assert_eq!(pauses, [2_000, 3_000, 4_500, 6_750, 10_000, 10_000, 10_000]);
        assert_eq!(schedule.pause(u32::MAX, 0.0), 5 * S, "no overflow, and the jitter's lower end");
        assert_eq!(schedule.pause(0, 1.0), 2 * S);
    }

    #[test]
    fn counted_pauses_double_up_to_the_longest_and_start_again_after_a_success() {
        let mut backoff = Backoff::new(S, 10 * S);
        let pauses: Vec<_> = (0..6).map(|_| backoff.next(1.0).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 10, 10]);
        backoff.reset();
        assert_eq!(backoff.next(1.0), S);
        backoff.worst();
        assert_eq!((backoff.next(1.0), backoff.next(1.0)), (10 * S, 10 * S));
    }

    #[test]
    fn jitter_spreads_over_the_upper_half_and_never_overflows() {
        let mut backoff = Backoff::new(2 * S, 60 * S);
        assert_eq!(backoff.next(0.0), S);
        for _ in 0..200 {
            let pause = backoff.next(random_unit());
            assert!(pause >= 2 * S && pause <= 60 * S, "{pause:?}");
        }
    }

    #[test]
    fn odd_bounds_are_mended() {
        let schedule = Schedule::new(Duration::ZERO, Duration::ZERO);
        assert!(schedule.pause(1, 0.0) > Duration::ZERO, "never a busy loop");
        for _ in 0..100 {
            assert!((0.0..1.0).contains(&random_unit()));
        }
    }
}
