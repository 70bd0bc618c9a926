//! How much others may cost us a minute: refusals, quotes and balances that are signed, and cancellations of requests that
//! we do not know. What is done about those that are over is for `intake` and `paying` to say.

use std::collections::HashMap;

/// Cancellations of requests that we do not know, kept a minute: all together, and of one author.
const TOMBSTONES_PER_MINUTE: u32 = 120;
const TOMBSTONES_PER_AUTHOR: u32 = 16;

/// A token bucket over a minute.
#[derive(Debug, Default)]
pub(super) struct Bucket {
    minute: u64,
    taken: u32,
}

impl Bucket {
    pub(super) fn take(&mut self, now_ms: u64, per_minute: u32) -> bool {
        let minute = now_ms / 60_000;
        if minute != self.minute {
            *self = Bucket { minute, taken: 0 };
        }
        self.taken += 1;
        self.taken <= per_minute
    }
}

/// Refusals told in the log one by one in a minute; more are counted.
const TOLD_PER_MINUTE: u32 = 20;

/// What of a flood is told in the log.
#[derive(Debug, Default)]
pub(super) struct Sample {
    minute: Bucket,
    untold: u64,
}

impl Sample {
    /// Whether to tell this one, and how many were not told before it.
    pub(super) fn tell(&mut self, now_ms: u64) -> Option<u64> {
        if self.minute.take(now_ms, TOLD_PER_MINUTE) {
            return Some(std::mem::take(&mut self.untold));
        }
        self.untold += 1;
        None
    }
}

/// A budget of a minute that nobody uses up for all: one author has the first half at most, the rest goes in shares of
/// an eighth. Whoever is in our books has as much again, which keys that cost nothing cannot use up.
#[derive(Debug, Default)]
pub(super) struct Fair {
    all: Shares,
    regulars: Shares,
}

#[derive(Debug, Default)]
struct Shares {
    minute: u64,
    taken: u32,
    /// No more authors than the minute's budget.
    by: HashMap<String, u32>,
}

impl Shares {
    /// Whether this author may take one more.
    fn may(&self, minute: u64, author: &str, per_minute: u32) -> bool {
        if minute != self.minute {
            return per_minute > 0;
        }
        let own = self.by.get(author).copied().unwrap_or_default();
        self.taken < per_minute && (self.taken < per_minute.div_ceil(2) || own < (per_minute / 8).max(2))
    }

    fn take(&mut self, minute: u64, author: &str) {
        if minute != self.minute {
            *self = Shares { minute, ..Shares::default() };
        }
        self.taken += 1;
        *self.by.entry(author.to_owned()).or_default() += 1;
    }
}

impl Fair {
    /// Whether this author may take one more; `regular` is asked only where it decides.
    pub(super) fn may(
        &self,
        now_ms: u64,
        author: &str,
        regular: impl FnOnce() -> bool,
        per_minute: u32,
    ) -> bool {
        let minute = now_ms / 60_000;
        self.all.may(minute, author, per_minute)
            || (self.regulars.may(minute, author, per_minute) && regular())
    }

    /// Takes one, where the author may.
    pub(super) fn take(
        &mut self,
        now_ms: u64,
        author: &str,
        regular: impl FnOnce() -> bool,
        per_minute: u32,
    ) -> bool {
        let minute = now_ms / 60_000;
        let from = if self.all.may(minute, author, per_minute) {
            &mut self.all
        } else if self.regulars.may(minute, author, per_minute) && regular() {
            &mut self.regulars
        } else {
            return false;
        };
        from.take(minute, author);
        true
    }
}

/// What is left of the minute for cancellations of requests that we do not know.
#[derive(Debug, Default)]
pub(super) struct Tombstones {
    all: Bucket,
    /// No more authors than the minute has tombstones.
    by: HashMap<String, u32>,
}

impl Tombstones {
    pub(super) fn take(&mut self, now_ms: u64, author: &str) -> bool {
        if self.all.minute != now_ms / 60_000 {
            self.by.clear();
        }
        if self.by.get(author).is_some_and(|taken| *taken >= TOMBSTONES_PER_AUTHOR)
            || !self.all.take(now_ms, TOMBSTONES_PER_MINUTE)
        {
            return false;
        }
        *self.by.entry(author.to_owned()).or_default() += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_flood_a_few_are_told_a_minute_and_the_rest_is_counted() {
        let mut sample = Sample::default();
        let told = (0..100_000).filter(|_| sample.tell(60_000).is_some()).count();
        assert_eq!(told, 20);
        assert_eq!((sample.tell(120_000), sample.tell(120_001)), (Some(99_980), Some(0)));
    }

    #[test]
    fn one_author_uses_up_half_of_a_minute_and_the_rest_is_shared() {
        let mut left = Fair::default();
        let take = |left: &mut Fair, now_ms: u64, author: &str, times: u32, regular: bool| {
            (0..times).filter(|_| left.take(now_ms, author, || regular, 32)).count()
        };
        assert_eq!(take(&mut left, 0, "junk", 100, false), 16);
        assert_eq!(take(&mut left, 0, "honest", 100, false), 4, "an eighth");
        let free_keys = (0..100).map(|n| take(&mut left, 59_999, &n.to_string(), 1, false)).sum::<usize>();
        assert_eq!(free_keys, 12, "all together no more than the minute has");
        assert_eq!(take(&mut left, 59_999, "stranger", 1, false), 0);
        assert_eq!(
            take(&mut left, 59_999, "regular", 100, true),
            16,
            "whoever is in the books still has his"
        );
        assert_eq!(take(&mut left, 60_000, "stranger", 1, false), 1, "the next minute");
        assert!(!Fair::default().take(0, "a", || true, 0));
        assert!(!Fair::default().may(60_000, "a", || true, 0));
    }

    #[test]
    fn one_author_has_a_share_of_the_tombstones_and_all_together_the_whole() {
        let mut left = Tombstones::default();
        let take = |left: &mut Tombstones, now_ms: u64, author: u32, times: u32| {
            (0..times).filter(|_| left.take(now_ms, &author.to_string())).count() as u32
        };
        assert_eq!(take(&mut left, 0, 1, 256), TOMBSTONES_PER_AUTHOR);
        assert_eq!(take(&mut left, 59_999, 2, 10), 10, "another one has its own");
        let rest: u32 = (3..100).map(|author| take(&mut left, 59_999, author, 256)).sum();
        assert_eq!(rest, TOMBSTONES_PER_MINUTE - TOMBSTONES_PER_AUTHOR - 10);
        assert!(left.by.len() <= TOMBSTONES_PER_MINUTE as usize);
        assert_eq!(take(&mut left, 60_000, 1, 256), TOMBSTONES_PER_AUTHOR, "the next minute");
    }
}
