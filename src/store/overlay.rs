//! Changes of a rebuild, collected in memory and brought to the database in the order of their keys, so that each of
//! its pages is touched a few times instead of once a record. It holds no truth and makes no decisions.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::Error;
use super::shelf::{Shelf, Slots, Tree};

/// Over a shelf that was empty when this was made, and that nothing else changes meanwhile.
pub(super) struct Overlay<'a> {
    below: &'a dyn Shelf,
    changes: RefCell<Changes>,
    /// What may be in the shelf below.
    settled: RefCell<Seen>,
    most_bytes: usize,
}

/// `None`: removed.
type Map = BTreeMap<Box<[u8]>, Option<Box<[u8]>>>;

#[derive(Default)]
struct Changes {
    /// By the place of the tree.
    trees: [Map; Tree::ALL.len()],
    bytes: usize,
}

/// Bytes that an overlay holds before it writes them down.
const OVERLAY_BYTES: usize = 64 * 1024 * 1024;
/// What a pair takes in memory beside its key and value.
const PAIR_BYTES: usize = 96;

// === impl Overlay

impl<'a> Overlay<'a> {
    pub(super) fn new(below: &'a dyn Shelf) -> Self {
        Overlay {
            below,
            changes: RefCell::default(),
            settled: RefCell::new(Seen::new()),
            most_bytes: OVERLAY_BYTES,
        }
    }

    fn change(&self, tree: Tree, key: &[u8], value: Option<&[u8]>) -> Result<(), Error> {
        let mut changes = self.changes.borrow_mut();
        let Changes { trees, bytes } = &mut *changes;
        let map = map(trees, tree)?;
        match map.get_mut(key) {
            // What was never settled is gone without a trace.
            Some(_) if value.is_none() && !self.settled.borrow().may_have(tree, key) => {
                drop(map.remove(key));
            }
            Some(known) => {
                *bytes += value.map_or(0, <[u8]>::len);
                *bytes = bytes.saturating_sub(known.as_ref().map_or(0, |v| v.len()));
                *known = value.map(Box::from);
            }
            None if value.is_none() && !self.settled.borrow().may_have(tree, key) => {}
            None => {
                *bytes += key.len() + value.map_or(0, <[u8]>::len) + PAIR_BYTES;
                map.insert(key.into(), value.map(Box::from));
            }
        }
        let full = *bytes > self.most_bytes;
        drop(changes);
        if full { self.settle() } else { Ok(()) }
    }

    /// Brings everything down.
    pub(super) fn settle(&self) -> Result<(), Error> {
        let changes = self.changes.take();
        let mut settled = self.settled.borrow_mut();
        for (tree, map) in Tree::ALL.into_iter().zip(changes.trees) {
            for (key, value) in map {
                match value {
                    Some(value) => {
                        settled.add(tree, &key);
                        self.below.put(tree, &key, &value)?;
                    }
                    None => self.below.remove(tree, &key)?,
                }
            }
        }
        Ok(())
    }
}

fn map(trees: &mut [Map], tree: Tree) -> Result<&mut Map, Error> {
    trees.get_mut(tree as usize).ok_or_else(|| Error::Index { why: "a tree that is none".into() })
}

impl Slots for Overlay<'_> {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        if let Some(value) = map(&mut self.changes.borrow_mut().trees, tree)?.get(key) {
            return Ok(value.as_deref().map(<[u8]>::to_vec));
        }
        // Most keys of a ledger are new, and asking the database for each costs a page.
        if self.settled.borrow().may_have(tree, key) { self.below.get(tree, key) } else { Ok(None) }
    }

    fn put(&self, tree: Tree, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.change(tree, key, Some(value))
    }

    fn remove(&self, tree: Tree, key: &[u8]) -> Result<(), Error> {
        self.change(tree, key, None)
    }
}

/// A Bloom filter: what it says is not there is not.
struct Seen {
    bits: Vec<u64>,
}

/// 16 MiB: among 4 million keys it takes one in a hundred thousand for seen that is not.
const SEEN_BITS: u64 = 1 << 27;
const SEEN_HASHES: u64 = 7;

impl Seen {
    fn new() -> Self {
        Seen { bits: vec![0; (SEEN_BITS / 64) as usize] }
    }

    fn places(tree: Tree, key: &[u8]) -> impl Iterator<Item = (usize, u64)> {
        let mut hasher = DefaultHasher::new();
        (tree as usize, key).hash(&mut hasher);
        let hash = hasher.finish();
        let step = hash.rotate_left(32) | 1;
        (0..SEEN_HASHES).map(move |n| {
            let bit = hash.wrapping_add(step.wrapping_mul(n)) >> (64 - SEEN_BITS.trailing_zeros());
            ((bit / 64) as usize, 1 << (bit % 64))
        })
    }

    fn add(&mut self, tree: Tree, key: &[u8]) {
        for (word, bit) in Seen::places(tree, key) {
            if let Some(word) = self.bits.get_mut(word) {
                *word |= bit;
            }
        }
    }

    fn may_have(&self, tree: Tree, key: &[u8]) -> bool {
        Seen::places(tree, key).all(|(word, bit)| self.bits.get(word).is_some_and(|word| word & bit != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::super::apply::apply;
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
                match n % 4 {
                    0 if n < 160 => vec![Record::Accepted {
                        job,
                        customer: "c".into(),
                        kind: 5000,
                        skill: "s".into(),
                        request: String::new(),
                        relay,
                        deadline_ms: 1,
                    }],
                    0 => vec![Record::Started { job, attempt: n, backend: "b".into() }],
                    1 => vec![Record::Cancelled { request: job, by: event }],
                    2 => vec![Record::Delivered { event, relay, answer: Answer::Stored }],
                    _ => vec![Record::Queued {
                        event,
                        job: Some(job),
                        json: String::new(),
                        relays: vec![relay],
                        give_up_ms: n.into(),
                    }],
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
        let overlay = Overlay { most_bytes: 500, ..Overlay::new(&rebuilt) };
        take_in(&overlay);
        let (held, all) = (overlay.changes.borrow().bytes, live.under_all());
        assert!(held <= 500, "{held} bytes are held");
        overlay.settle().unwrap();
        assert!(all.iter().map(|(_, pairs)| pairs.len()).sum::<usize>() > 100);
        assert_eq!(rebuilt.under_all(), all);
    }

    impl Memory {
        fn under_all(&self) -> Vec<(Tree, Pairs)> {
            Tree::ALL.map(|tree| (tree, under(self, tree, &[]).unwrap())).to_vec()
        }
    }

    #[test]
    fn what_was_added_may_be_there_and_almost_nothing_else() {
        let mut seen = Seen::new();
        (0..10_000_u32).for_each(|n| seen.add(Tree::Jobs, &n.to_be_bytes()));
        assert!((0..10_000_u32).all(|n| seen.may_have(Tree::Jobs, &n.to_be_bytes())));
        let strays = (0..10_000_u32).filter(|n| seen.may_have(Tree::Events, &n.to_be_bytes())).count();
        assert!(strays < 5, "{strays}");
    }
}
