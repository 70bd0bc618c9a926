//! How much strangers may cost us a minute: refusals that are signed, and cancellations of requests that we do not
//! know. What is over is for `intake` to pass over.

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
