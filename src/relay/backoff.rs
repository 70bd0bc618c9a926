//! How long to wait before trying again: exponential with jitter, for ever. It holds no timer.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// Doubles from `min` to `max`; each pause is spread over the upper half of its step.
#[derive(Debug, Clone)]
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    pub(super) fn new(min: Duration, max: Duration) -> Self {
        Self { min, max: max.max(min), failures: 0 }
    }

    /// The next pause. `unit` in 0..1 is the jitter.
    pub(super) fn next(&mut self, unit: f64) -> Duration {
        let step = self.min.saturating_mul(1u32 << self.failures.min(20)).min(self.max);
        self.failures = self.failures.saturating_add(1);
        step.mul_f64(0.5 + 0.5 * unit.clamp(0.0, 1.0))
    }

    /// From now on the longest pause, until `reset`.
    pub(super) fn worst(&mut self) {
        self.failures = 20;
    }

    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A number in 0..1 for jitter; not for secrets.
pub(super) fn random_unit() -> f64 {
    let bits = RandomState::new().build_hasher().finish() >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_start_again_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(10));
        let pauses: Vec<_> = (0..6).map(|_| backoff.next(1.0).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 10, 10]);
        backoff.reset();
        assert_eq!(backoff.next(1.0).as_secs(), 1);
        backoff.worst();
        assert_eq!(backoff.next(1.0).as_secs(), 10);
    }

    #[test]
    fn jitter_spreads_over_the_upper_half_and_never_overflows() {
        let mut backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(60));
        assert_eq!(backoff.next(0.0), Duration::from_secs(1));
        for _ in 0..200 {
            let pause = backoff.next(random_unit());
            assert!(pause >= Duration::from_secs(2) && pause <= Duration::from_secs(60), "{pause:?}");
        }
    }
}
