//! How fast output may be taken: so many bytes a second, and a second's worth at once. Nothing is thrown away; who prints
//! faster waits. It reads no clock and takes nothing itself.

use std::time::Duration;

/// What may be taken at once after a silence, as time at the rate.
pub const BURST: Duration = Duration::from_secs(1);
/// Less than this much, as time at the rate, is not worth a look at a stream.
const PIECE: Duration = Duration::from_millis(50);
/// What was taken without waiting for room holds up the next no longer than this, and its piece.
const DEBT: Duration = Duration::from_millis(250);

/// A bucket of bytes. Times are since any moment that stays the same.
#[derive(Debug, Clone)]
pub struct Pace {
    bytes_per_s: u64,
    /// When the whole burst is there again, if nothing is taken meanwhile.
    full_at: Duration,
    /// Who took last. He waits for two pieces: another one's turn comes between.
    last: Option<u64>,
}

impl Pace {
    /// `bytes_per_s` is at least 1; 0 counts as 1.
    pub fn new(bytes_per_s: u64) -> Pace {
        Pace { bytes_per_s: bytes_per_s.max(1), full_at: Duration::ZERO, last: None }
    }

    /// Bytes that this one may take now; 0 as long as it must `wait`.
    pub fn room(&self, now: Duration, who: u64) -> usize {
        if !self.wait(now, who).is_zero() {
            return 0;
        }
        let there = (now + BURST).saturating_sub(self.full_at.max(now));
        let bytes = u128::from(self.bytes_per_s) * there.as_nanos() / 1_000_000_000;
        usize::try_from(bytes).unwrap_or(usize::MAX).max(1)
    }

    /// How long until there is room for this one, if nobody takes anything meanwhile.
    pub fn wait(&self, now: Duration, who: u64) -> Duration {
        let piece = if self.last == Some(who) { 2 * PIECE } else { PIECE };
        (self.full_at + piece).saturating_sub(now + BURST)
    }

    /// So many bytes were taken, with or without room.
    pub fn took(&mut self, now: Duration, who: u64, bytes: usize) {
        let nanos = bytes as u128 * 1_000_000_000 / u128::from(self.bytes_per_s);
        let time = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.full_at = self.full_at.max(now).saturating_add(time).min(now + BURST + DEBT);
        self.last = Some(who);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// What one reader that takes all it may gets by `end`.
    fn taken(pace: &mut Pace, end: Duration) -> usize {
        let (mut now, mut sum) = (Duration::ZERO, 0);
        while now <= end {
            match pace.room(now, 1) {
                0 => now += pace.wait(now, 1),
                room => {
                    pace.took(now, 1, room);
                    sum += room;
                }
            }
        }
        sum
    }

    #[test]
    fn a_second_s_worth_passes_at_once_and_then_the_rate_holds() {
        let mut pace = Pace::new(10_000);
        assert_eq!(pace.room(ms(7), 1), 10_000);
        pace.took(ms(7), 1, 10_000);
        assert_eq!((pace.room(ms(7), 1), pace.wait(ms(7), 1)), (0, ms(100)));
        for rate in [1_024, 10_000, 1 << 20, 1 << 40] {
            let all = taken(&mut Pace::new(rate), ms(10_000)) as u64;
            assert!(all <= 11 * rate && all >= 11 * rate - rate / 5, "{all} bytes at {rate}");
        }
    }

    #[test]
    fn a_silence_saves_no_more_than_a_second_s_worth() {
        let mut pace = Pace::new(1000);
        pace.took(ms(0), 1, 1000);
        assert_eq!(pace.room(ms(3_600_000), 1), 1000);
    }

    #[test]
    fn who_took_last_lets_another_go_first() {
        let mut pace = Pace::new(1000);
        pace.took(ms(0), 1, 1000);
        assert_eq!((pace.wait(ms(0), 1), pace.wait(ms(0), 2)), (ms(100), ms(50)));
        assert_eq!((pace.room(ms(50), 1), pace.room(ms(50), 2)), (0, 50));
    }

    #[test]
    fn what_was_taken_without_room_is_a_short_wait_whatever_it_was() {
        let mut pace = Pace::new(1024);
        pace.took(ms(0), 1, 1 << 30);
        assert!(pace.wait(ms(0), 2) <= ms(300), "{:?}", pace.wait(ms(0), 2));
        assert!(pace.wait(ms(0), 2) >= ms(200));
    }

    #[test]
    fn a_rate_beyond_all_bounds_is_no_bound() {
        let mut pace = Pace::new(u64::MAX);
        pace.took(ms(0), 1, usize::MAX >> 1);
        assert!(pace.room(ms(1), 1) > 1 << 40);
        assert_eq!(Pace::new(0).room(ms(0), 1), 1);
    }
}
