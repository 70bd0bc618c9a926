//! What taking in a whole log gathers before the database: the last value of each key, and the rows that are only ever
//! added. When there is much of it, all goes down in the order of its keys, so the database touches a page a few times
//! instead of once a record. Only looked up by key; what a running node holds is `overlay.rs`'s.

use std::cell::RefCell;
use std::collections::HashMap;

use super::Error;
use super::overlay::{self, Change, pair_bytes, replace};
use super::runs::{ROWS, Runs};
use super::seen::Seen;
use super::shelf::{Slots, Tree};

/// Over slots that are empty at first, and that nothing else changes.
pub(super) struct Gather<'a> {
    below: &'a dyn Slots,
    held: RefCell<Held>,
    most_bytes: usize,
}

type Map = HashMap<Box<[u8]>, Change>;

struct Held {
    /// By the place of the tree.
    maps: [Map; Tree::ALL.len()],
    bytes: usize,
    runs: Runs,
    /// What may be in the runs or below.
    seen: Seen,
    /// What `overlay.rs` will ask about: every key of its trees that was put.
    for_overlay: Seen,
}

/// 16 MiB: among 4 million keys it takes one in ten thousand for seen that is not.
const SEEN_LINES: usize = 1 << 18;
/// Bytes of pairs that are held, without the rows of the runs.
const MOST_BYTES: usize = 32 * 1024 * 1024;

// === impl Gather

impl<'a> Gather<'a> {
    pub(super) fn new(below: &'a dyn Slots) -> Self {
        Gather::with_room(below, MOST_BYTES, ROWS)
    }

    fn with_room(below: &'a dyn Slots, most_bytes: usize, most_rows: usize) -> Self {
        let maps = std::array::from_fn(|_| Map::new());
        let held = Held {
            maps,
            bytes: 0,
            runs: Runs::new(most_rows),
            seen: Seen::new(SEEN_LINES),
            for_overlay: Seen::new(overlay::SEEN_LINES),
        };
        Gather { below, held: RefCell::new(held), most_bytes }
    }

    /// Brings everything down; tells what is below now, for an overlay over it.
    pub(super) fn settle(self) -> Result<Seen, Error> {
        let mut held = self.held.into_inner();
        held.settle(self.below)?;
        held.runs.settle(self.below)?;
        Ok(held.for_overlay)
    }

    fn change(&self, tree: Tree, key: &[u8], value: Option<&[u8]>) -> Result<(), Error> {
        let mut held = self.held.borrow_mut();
        if value.is_some() && overlay::may_be_new(tree) {
            held.for_overlay.add(tree, key);
        }
        if held.runs.has(tree) {
            return held.add(tree, key, value, self.below);
        }
        held.take(tree, key, value);
        if held.bytes > self.most_bytes { held.settle(self.below) } else { Ok(()) }
    }
}

impl Held {
    fn add(&mut self, tree: Tree, key: &[u8], value: Option<&[u8]>, below: &dyn Slots) -> Result<(), Error> {
        let Some(value) = value else {
            self.runs.settle(below)?;
            return below.remove(tree, key);
        };
        // Nobody looks up the others while a log is taken in.
        if tree == Tree::Transfers {
            self.seen.add(tree, key);
        }
        self.runs.add(tree, key, value, below)
    }

    fn take(&mut self, tree: Tree, key: &[u8], value: Option<&[u8]>) {
        let Some(map) = self.maps.get_mut(tree as usize) else { return };
        // What was never brought down is gone without a trace.
        if value.is_none() && !self.seen.may_have(tree, key) {
            if let Some(known) = map.remove(key) {
                self.bytes = self.bytes.saturating_sub(pair_bytes(key, known.as_deref()));
            }
            return;
        }
        match (map.get_mut(key), value) {
            (Some(known), value) => replace(known, value, &mut self.bytes),
            (None, value) => {
                self.bytes += pair_bytes(key, value);
                map.insert(key.into(), value.map(Box::from));
            }
        }
    }

    /// Brings the pairs down.
    fn settle(&mut self, below: &dyn Slots) -> Result<(), Error> {
        for (tree, map) in Tree::ALL.into_iter().zip(&mut self.maps) {
            let mut pairs: Vec<_> = std::mem::take(map).into_iter().collect();
            pairs.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
            for (key, value) in pairs {
                match &value {
                    Some(value) => {
                        self.seen.add(tree, &key);
                        below.put(tree, &key, value)?;
                    }
                    None => below.remove(tree, &key)?,
                }
            }
        }
        self.bytes = 0;
        Ok(())
    }
}

impl Slots for Gather<'_> {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        let mut held = self.held.borrow_mut();
        if !held.runs.has(tree) {
            if let Some(value) = held.maps.get(tree as usize).and_then(|map| map.get(key)) {
                return Ok(value.as_deref().map(<[u8]>::to_vec));
            }
        } else if tree != Tree::Transfers {
            held.runs.settle(self.below)?;
            return self.below.get(tree, key);
        }
        // Most keys of a ledger are new, and asking the database for each costs a page.
        if !held.seen.may_have(tree, key) {
            return Ok(None);
        }
        match held.runs.get(tree, key) {
            Some(value) => Ok(Some(value)),
            None => self.below.get(tree, key),
        }
    }

    fn put(&self, tree: Tree, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.change(tree, key, Some(value))
    }

    fn remove(&self, tree: Tree, key: &[u8]) -> Result<(), Error> {
        self.change(tree, key, None)
    }
}

#[cfg(test)]
mod tests {
    use super::super::apply::apply;
    use super::super::money::{Account, Leg, Transfer, Why};
    use super::super::record::{Answer, Record};
    use super::super::shelf::{Memory, Pairs, under};
    use super::super::tail::Placed;
    use super::*;

    #[test]
    fn a_rebuild_that_settles_many_times_makes_the_same_index() {
        let batches: Vec<Vec<Record>> = (0..300_u32)
            .map(|n| {
                let (job, event) = (format!("job {}", n % 40), format!("event {}", n % 60));
                let relay = format!("ws://{}", n % 3);
                match n % 5 {
                    0 if n < 160 => vec![Record::Accepted {
                        job,
                        customer: "c".into(),
                        kind: 5000,
                        skill: "s".into(),
                        request: String::new(),
                        relay,
                        deadline_ms: 1,
                        agreed: crate::price::Agreed { of_quota: n % 3 == 0, ..Default::default() },
                    }],
                    0 => vec![Record::Started { job, attempt: n, backend: "b".into() }],
                    1 => vec![Record::Cancelled { request: job, by: event }],
                    2 => vec![Record::Delivered { event, relay, answer: Answer::Stored }],
                    3 => vec![Record::Queued {
                        event,
                        job: Some(job),
                        json: String::new(),
                        relays: vec![relay],
                        give_up_ms: n.into(),
                    }],
                    // Each comes twice, and counts once.
                    _ => vec![Record::Transfer(charged(n % 100)), Record::Transfer(charged(n % 100))],
                }
            })
            .collect();
        let take_in = |slots: &dyn Slots| {
            for (offset, batch) in (0_u64..).zip(&batches) {
                apply(slots, &Placed { seq: offset + 1, at_ms: offset, segment: 1, offset }, batch).unwrap();
            }
        };
        let (live, rebuilt) = (Memory::default(), Memory::default());
        take_in(&live);
        // Room for a few changes only: every later read must find in the shelf what was settled.
        let gather = Gather::with_room(&rebuilt, 500, 7);
        take_in(&gather);
        let (held, all) = (gather.held.borrow().bytes, live.under_all());
        assert!(held <= 500, "{held} bytes are held");
        gather.settle().unwrap();
        assert!(all.iter().map(|(_, pairs)| pairs.len()).sum::<usize>() > 100);
        assert_eq!(rebuilt.under_all(), all);
    }

    fn charged(n: u32) -> Transfer {
        let (held, job) = (Account::Held(format!("{:064x}", n % 7)), format!("job {}", n % 60));
        let leg = Leg { from: Account::Fees, to: held, msat: u64::from(n) + 1 };
        Transfer { id: format!("{n}"), why: Why::Capture { job }, legs: vec![leg], about: None }
    }

    impl Memory {
        fn under_all(&self) -> Vec<(Tree, Pairs)> {
            Tree::ALL.map(|tree| (tree, under(self, tree, &[]).unwrap())).to_vec()
        }
    }
}
