//! The events already verified, over all relays: bounded, two generations. Only a verified event is marked, so
//! that a forged copy that comes first cannot hide the good one. It does no cryptography itself.

use std::collections::{HashMap, HashSet};
use std::mem;

use super::cursor::Hold;

type Id = [u8; 32];

/// Which ids were verified, and which relays wait for one of them to be handled.
#[derive(Debug)]
pub(super) struct Seen {
    /// Verified and handed up, not yet handled: the holds of every relay that sent it.
    open: HashMap<Id, Vec<Hold>>,
    young: HashSet<Id>,
    old: HashSet<Id>,
    /// Ids a generation holds.
    capacity: usize,
}

impl Seen {
    /// Remembers at least the last `capacity` ids, at most twice as many.
    pub(super) fn new(capacity: usize) -> Self {
        Self { open: HashMap::new(), young: HashSet::new(), old: HashSet::new(), capacity: capacity.max(1) }
    }

    /// If the id is known: keeps the hold for as long as the event is being handled, and is `None`.
    /// Otherwise gives the hold back.
    pub(super) fn is_new(&mut self, id: &Id, hold: Hold) -> Option<Hold> {
        if let Some(holds) = self.open.get_mut(id) {
            // A relay that repeats itself needs no second hold; three relays are a few.
            if holds.len() < 64 {
                holds.push(hold);
            }
            return None;
        }
        if self.young.contains(id) || self.old.contains(id) { None } else { Some(hold) }
    }

    /// Marks a verified event. `false`: another relay's copy was faster.
    pub(super) fn mark(&mut self, id: Id, hold: Hold) -> bool {
        let Some(hold) = self.is_new(&id, hold) else { return false };
        if self.young.len() >= self.capacity {
            self.old = mem::take(&mut self.young);
        }
        self.young.insert(id);
        self.open.insert(id, vec![hold]);
        true
    }

    /// The event was handled: its relays' cursors may pass it.
    pub(super) fn done(&mut self, id: &Id) -> Vec<Hold> {
        self.open.remove(id).unwrap_or_default()
    }

    /// The event was not handled: forgets it, so that it can come again.
    pub(super) fn forget(&mut self, id: &Id) -> Vec<Hold> {
        self.young.remove(id);
        self.old.remove(id);
        self.done(id)
    }

    pub(super) fn open(&self) -> usize {
        self.open.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::cursor::Progress;
    use super::*;

    fn id(n: u32) -> Id {
        let mut id = [0; 32];
        id[..4].copy_from_slice(&n.to_be_bytes());
        id
    }

    #[test]
    fn an_event_is_new_once_and_every_relay_waits_for_it() {
        let (mut seen, a, b) = (Seen::new(10), Progress::new(None), Progress::new(None));
        assert!(seen.is_new(&id(1), a.hold(5)).is_some());
        assert!(seen.mark(id(1), a.hold(5)));
        assert!(!seen.mark(id(1), b.hold(5)));
        assert_eq!((a.open(), b.open()), (1, 1));
        drop(seen.done(&id(1)));
        assert_eq!((a.open(), b.open()), (0, 0));
        assert!(seen.is_new(&id(1), a.hold(5)).is_none(), "still known");
    }

    #[test]
    fn an_event_given_back_can_come_again() {
        let (mut seen, a) = (Seen::new(10), Progress::new(None));
        assert!(seen.mark(id(1), a.hold(5)));
        drop(seen.forget(&id(1)));
        assert!(seen.mark(id(1), a.hold(5)));
    }

    #[test]
    fn memory_is_bounded_and_the_newest_are_remembered() {
        let (mut seen, a) = (Seen::new(100), Progress::new(None));
        for n in 0..10_000 {
            assert!(seen.mark(id(n), a.hold(1)));
            drop(seen.done(&id(n)));
        }
        assert!(seen.young.len() + seen.old.len() <= 200);
        assert!((9_900..10_000).all(|n| seen.is_new(&id(n), a.hold(1)).is_none()));
    }
}
