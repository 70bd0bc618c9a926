//! How far one relay's history has been handled. It knows times and holds only; when to fill a gap and when
//! to write the cursor down is `follow.rs`'s business.
//!
//! The cursor may move to a second `t` when everything the relay had up to `t` was received (`cover`), none of
//! it was dropped for want of room (`lag`), and none is still being handled (a `Hold`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The state of one relay's history.
#[derive(Debug, Default)]
pub(super) struct Progress(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// How many events of each second were received and are not yet handled.
    holds: BTreeMap<u64, usize>,
    /// Time of the oldest event that was dropped for want of room.
    lagged_from: Option<u64>,
    /// Everything up to here was received.
    covered_to: u64,
    cursor: Option<u64>,
}

/// An event of a relay that is not handled yet; dropping it says that it is.
#[derive(Debug)]
pub(super) struct Hold {
    progress: Arc<Progress>,
    at: u64,
}

impl Progress {
    pub(super) fn new(cursor: Option<u64>) -> Arc<Self> {
        let inner = Inner { cursor, ..Inner::default() };
        Arc::new(Self(Mutex::new(inner)))
    }

    /// An event was received; until the hold is dropped the cursor stays before it.
    pub(super) fn hold(self: &Arc<Self>, created_at: u64) -> Hold {
        *self.lock().holds.entry(created_at).or_default() += 1;
        Hold { progress: Arc::clone(self), at: created_at }
    }

    /// Everything the relay has up to this second was received.
    pub(super) fn cover(&self, to: u64) {
        let mut inner = self.lock();
        inner.covered_to = inner.covered_to.max(to);
    }

    /// Time of the oldest event dropped for want of room, if any was.
    pub(super) fn lagged_from(&self) -> Option<u64> {
        self.lock().lagged_from
    }

    /// The gap left by the lag is being filled: forgets it. What lags from now on counts anew. The cursor
    /// stays until the next `cover`.
    pub(super) fn begin_fill(&self) {
        let mut inner = self.lock();
        inner.lagged_from = None;
        inner.covered_to = 0;
    }

    pub(super) fn cursor(&self) -> Option<u64> {
        self.lock().cursor
    }

    /// Moves the cursor as far as it may go; says where it is when it moved.
    pub(super) fn settle(&self) -> Option<u64> {
        let mut inner = self.lock();
        if inner.lagged_from.is_some() {
            return None;
        }
        let open = inner.holds.first_key_value().map_or(u64::MAX, |(at, _)| at.saturating_sub(1));
        let to = inner.covered_to.min(open);
        if to > inner.cursor.unwrap_or(0) {
            inner.cursor = Some(to);
            return Some(to);
        }
        None
    }

    /// Events received and not yet handled.
    pub(super) fn open(&self) -> usize {
        self.lock().holds.values().sum()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hold {
    /// The event was dropped for want of room: it has to be fetched again.
    pub(super) fn lag(self) {
        let mut inner = self.progress.lock();
        let from = inner.lagged_from.map_or(self.at, |from| from.min(self.at));
        inner.lagged_from = Some(from);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut inner = self.progress.lock();
        if let Some(count) = inner.holds.get_mut(&self.at) {
            *count -= 1;
            if *count == 0 {
                inner.holds.remove(&self.at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cursor_waits_for_the_oldest_event_not_yet_handled() {
        let progress = Progress::new(Some(100));
        let (old, new) = (progress.hold(150), progress.hold(180));
        progress.cover(200);
        assert_eq!(progress.settle(), Some(149));
        drop(new);
        assert_eq!(progress.settle(), None);
        drop(old);
        assert_eq!(progress.settle(), Some(200));
        assert_eq!(progress.settle(), None, "it moved once");
    }

    #[test]
    fn the_cursor_never_goes_back() {
        let progress = Progress::new(Some(100));
        let _late = progress.hold(20);
        progress.cover(300);
        assert_eq!(progress.settle(), None);
        assert_eq!(progress.cursor(), Some(100));
    }

    #[test]
    fn lag_freezes_the_cursor_until_the_gap_was_filled() {
        let progress = Progress::new(Some(100));
        progress.hold(150).lag();
        progress.hold(120).lag();
        progress.cover(400);
        assert_eq!((progress.settle(), progress.lagged_from(), progress.open()), (None, Some(120), 0));
        progress.begin_fill();
        assert_eq!(progress.settle(), None, "the fill is not done");
        progress.cover(500);
        assert_eq!(progress.settle(), Some(500));
    }
}
