//! When to ask a wallet again: pauses that grow, with jitter, to a longest one. It holds no timer.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// Pauses between look-ups of one invoice, and between connections to one relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    first: Duration,
    longest: Duration,
}

impl Schedule {
    /// Each pause is half as long again as the one before, from `first` to `longest`; `longest` counts for at least
    /// `first`, and `first` for at least a millisecond.
    pub fn new(first: Duration, longest: Duration) -> Self {
        let first = first.max(Duration::from_millis(1));
        Self { first, longest: longest.max(first) }
    }

    /// The pause after the `asked`-th look-up, counted from 1. `unit` in 0..1 is the jitter: the upper half of the
    /// step is spread, so that many invoices made together are not asked for together.
    pub fn pause(&self, asked: u32, unit: f64) -> Duration {
        // 1.5^100 is more than any pause; the exponent is kept finite.
        let steps = i32::try_from(asked.saturating_sub(1).min(100)).unwrap_or(100);
        let step = (self.first.as_secs_f64() * 1.5_f64.powi(steps)).min(self.longest.as_secs_f64());
        Duration::from_secs_f64(step * (0.5 + 0.5 * unit.clamp(0.0, 1.0)))
    }
}

impl Default for Schedule {
    /// From one second to a minute: a payer looks at the screen at first.
    fn default() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_secs(60))
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
    fn pauses_grow_by_half_up_to_the_longest() {
        let schedule = Schedule::new(Duration::from_secs(2), Duration::from_secs(10));
        let pauses: Vec<_> = (1..8).map(|asked| schedule.pause(asked, 1.0).as_millis()).collect();
        assert_eq!(pauses, [2_000, 3_000, 4_500, 6_750, 10_000, 10_000, 10_000]);
        assert_eq!(
            schedule.pause(u32::MAX, 0.0),
            Duration::from_secs(5),
            "no overflow, and the jitter's lower end"
        );
        assert_eq!(schedule.pause(0, 1.0), Duration::from_secs(2));
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
