//! The wall clock of this machine, as one function and as a value that a test can hold still. How long something
//! takes is not read here: `std::time::Instant` does not jump.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;

/// Tells the time in Unix milliseconds.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Unix milliseconds; 0 on a machine whose clock is set before 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Unix seconds, as Nostr counts them.
pub fn now_s() -> u64 {
    now_ms() / 1000
}

/// The machine's clock as a value.
pub fn system() -> Clock {
    Arc::new(now_ms)
}

/// A moment for people: `2026-11-28 23:45:12 UTC`.
pub fn utc(at_ms: u64) -> String {
    let at = i64::try_from(at_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    at.map_or_else(|| "an unknown time".into(), |at| at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
}

/// How far the last entry of a log may be ahead of the clock: clocks are set back a little now and then.
pub const AHEAD_MS: u64 = 5 * 60_000;
/// A node that was away for longer has more likely a clock that is wrong.
const AWAY_MS: u64 = 180 * 86_400_000;

/// A clock that does not go with the log that it is to date.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClockFault {
    #[error(
        "the last entry of the log is from {}, and this machine's clock says {}: one of both is or was wrong",
        utc(*.last_ms), utc(*.now_ms)
    )]
    Behind { last_ms: u64, now_ms: u64 },
    #[error(
        "this machine's clock says {}, more than 180 days after the last entry of the log ({}): is it right?",
        utc(*.now_ms), utc(*.last_ms)
    )]
    FarAhead { last_ms: u64, now_ms: u64 },
}

impl ClockFault {
    /// Judges a clock by the time of the last entry; 0: there is none.
    pub fn between(last_ms: u64, now_ms: u64) -> Option<ClockFault> {
        if last_ms > now_ms.saturating_add(AHEAD_MS) {
            Some(ClockFault::Behind { last_ms, now_ms })
        } else if last_ms > 0 && now_ms > last_ms.saturating_add(AWAY_MS) {
            Some(ClockFault::FarAhead { last_ms, now_ms })
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_does_not_go_with_the_log_is_told_in_dates() {
        let now = 1_795_909_512_000;
        assert_eq!(utc(now), "2026-11-28 23:45:12 UTC");
        assert_eq!(utc(u64::MAX), "an unknown time");
        for fine in [0, now, now - 179 * 86_400_000, now + AHEAD_MS] {
            assert_eq!(ClockFault::between(fine, now), None);
        }
        let year = 365 * 86_400_000;
        let said = |last_ms| ClockFault::between(last_ms, now).unwrap().to_string();
        assert!(said(now + year).contains("2027-11-28") && said(now + year).contains("2026-11-28"));
        assert!(said(now - year).contains("2025-11-28"), "{}", said(now - year));
    }
}
