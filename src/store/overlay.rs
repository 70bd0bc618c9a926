//! Changes kept in memory before the database: they reach it in the order of their keys, and what is put and removed
//! again in between never does. So the database touches a page a few times instead of once a record. It holds no truth:
//! after a crash the log makes all of it again.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Bound;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::Error;
use super::shelf::{Pairs, Shelf, Slots, Tree, bound};

/// Over a shelf that nothing else changes.
pub(super) struct Overlay<'a> {
    below: Below<'a>,
    changes: RwLock<Changes>,
    most_bytes: usize,
    /// Pairs that go down with each change while there is too much here.
    step: usize,
}

enum Below<'a> {
    Own(Box<dyn Shelf>),
    Lent(&'a dyn Shelf),
}

/// `None`: removed.
type Map = BTreeMap<Box<[u8]>, Option<Box<[u8]>>>;

#[derive(Default)]
struct Changes {
    /// By the place of the tree.
    trees: [Map; Tree::ALL.len()],
    bytes: usize,
    /// What may be in the shelf below, where that is known.
    settled: Option<Seen>,
    /// The tree, and the key in it, from which the next pairs go down.
    next: (usize, Box<[u8]>),
}

/// Bytes that a rebuild holds before it brings all of it down.
const REBUILD_BYTES: usize = 128 * 1024 * 1024;
/// Bytes that a node holds, and how many pairs it then brings down with each new one: a few, so that no commit waits
/// long, and in the order of their keys from one time to the next.
const LIVE_BYTES: usize = 4 * 1024 * 1024;
const LIVE_STEP: usize = 16;
/// What a pair takes in memory beside its key and value.
const PAIR_BYTES: usize = 96;

// === impl Overlay

impl Overlay<'static> {
    /// For a node that runs.
    pub(super) fn live(below: Box<dyn Shelf>) -> Self {
        Overlay {
            below: Below::Own(below),
            changes: RwLock::default(),
            most_bytes: LIVE_BYTES,
            step: LIVE_STEP,
        }
    }
}

impl<'a> Overlay<'a> {
    /// For taking in a whole log. The shelf below must be empty.
    pub(super) fn rebuilding(below: &'a dyn Shelf) -> Self {
        let changes = Changes { settled: Some(Seen::new()), ..Changes::default() };
        Overlay {
            below: Below::Lent(below),
            changes: RwLock::new(changes),
            most_bytes: REBUILD_BYTES,
            step: usize::MAX,
        }
    }

    fn below(&self) -> &dyn Shelf {
        match &self.below {
            Below::Own(shelf) => shelf.as_ref(),
            Below::Lent(shelf) => *shelf,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Changes> {
        self.changes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Changes> {
        self.changes.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, tree: Tree, key: &[u8], value: Option<&[u8]>) -> Result<(), Error> {
        let mut changes = self.write();
        changes.take(tree, key, value);
        if changes.bytes > self.most_bytes { changes.settle(self.below(), self.step) } else { Ok(()) }
    }

    /// Brings everything down.
    pub(super) fn settle(&self) -> Result<(), Error> {
        self.write().settle(self.below(), usize::MAX)
    }

    /// Pairs of a range with the changes in it; `look` asks the shelf below for so many more than are removed here.
    fn merged(
        &self,
        tree: Tree,
        from: &[u8],
        to: Option<&[u8]>,
        look: impl FnOnce(usize) -> Result<Pairs, Error>,
    ) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error> {
        let changes = self.read();
        let range = (Bound::Included(from), bound(to));
        let here = || changes.map(tree).into_iter().flat_map(|map| map.range::<[u8], _>(range));
        let removed = here().filter(|(_, value)| value.is_none()).count();
        let mut pairs: BTreeMap<_, _> = look(removed)?.into_iter().collect();
        for (key, value) in here() {
            match value {
                Some(value) => pairs.insert(key.to_vec(), value.to_vec()),
                None => pairs.remove(key.as_ref()),
            };
        }
        Ok(pairs)
    }
}

impl Changes {
    fn map(&self, tree: Tree) -> Option<&Map> {
        self.trees.get(tree as usize)
    }

    fn may_be_below(&self, tree: Tree, key: &[u8]) -> bool {
        self.settled.as_ref().is_none_or(|settled| settled.may_have(tree, key))
    }

    fn take(&mut self, tree: Tree, key: &[u8], value: Option<&[u8]>) {
        // What was never brought down is gone without a trace.
        let forget = value.is_none() && !self.may_be_below(tree, key);
        let Some(map) = self.trees.get_mut(tree as usize) else { return };
        if forget {
            if let Some(known) = map.remove(key) {
                self.bytes = self.bytes.saturating_sub(pair_bytes(key, known.as_deref()));
            }
        } else if let Some(known) = map.get_mut(key) {
            self.bytes += value.map_or(0, <[u8]>::len);
            self.bytes = self.bytes.saturating_sub(known.as_deref().map_or(0, <[u8]>::len));
            *known = value.map(Box::from);
        } else {
            self.bytes += pair_bytes(key, value);
            map.insert(key.into(), value.map(Box::from));
        }
    }

    /// Brings at most `most` pairs down, from where the last ones ended.
    fn settle(&mut self, below: &dyn Shelf, most: usize) -> Result<(), Error> {
        let (mut left, mut turns) = (most, 0);
        while left > 0 && turns <= Tree::ALL.len() {
            let nth = self.next.0 % Tree::ALL.len();
            let (Some(tree), Some(map)) = (Tree::ALL.get(nth).copied(), self.trees.get_mut(nth)) else {
                break;
            };
            let following = (Bound::Included(self.next.1.as_ref()), Bound::Unbounded);
            let Some(key) = map.range::<[u8], _>(following).next().map(|(key, _)| key.clone()) else {
                self.next = (nth + 1, Box::default());
                turns += 1;
                continue;
            };
            let value = map.remove(&key).flatten();
            left -= 1;
            self.bytes = self.bytes.saturating_sub(pair_bytes(&key, value.as_deref()));
            match &value {
                Some(value) => {
                    if let Some(settled) = &mut self.settled {
                        settled.add(tree, &key);
                    }
                    below.put(tree, &key, value)?;
                }
                None => below.remove(tree, &key)?,
            }
            self.next = (nth, key);
        }
        Ok(())
    }
}

fn pair_bytes(key: &[u8], value: Option<&[u8]>) -> usize {
    key.len() + value.map_or(0, <[u8]>::len) + PAIR_BYTES
}

impl Slots for Overlay<'_> {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        let changes = self.read();
        if let Some(value) = changes.map(tree).and_then(|map| map.get(key)) {
            return Ok(value.as_deref().map(<[u8]>::to_vec));
        }
        // Most keys of a ledger are new, and asking the database for each costs a page.
        if changes.may_be_below(tree, key) { self.below().get(tree, key) } else { Ok(None) }
    }

    fn put(&self, tree: Tree, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.change(tree, key, Some(value))
    }

    fn remove(&self, tree: Tree, key: &[u8]) -> Result<(), Error> {
        self.change(tree, key, None)
    }
}

impl Shelf for Overlay<'_> {
    fn upwards(&self, tree: Tree, from: &[u8], to: Option<&[u8]>, limit: usize) -> Result<Pairs, Error> {
        if to.is_some_and(|to| to <= from) {
            return Ok(Vec::new());
        }
        let look = |removed| self.below().upwards(tree, from, to, limit.saturating_add(removed));
        Ok(self.merged(tree, from, to, look)?.into_iter().take(limit).collect())
    }

    fn downwards(&self, tree: Tree, from: &[u8], to: &[u8], limit: usize) -> Result<Pairs, Error> {
        if to <= from {
            return Ok(Vec::new());
        }
        let look = |removed| self.below().downwards(tree, from, to, limit.saturating_add(removed));
        Ok(self.merged(tree, from, Some(to), look)?.into_iter().rev().take(limit).collect())
    }

    fn flush(&self) -> Result<(), Error> {
        self.settle()?;
        self.below().flush()
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
                        agreed: crate::price::Agreed::default(),
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
        let overlay = Overlay { most_bytes: 500, ..Overlay::rebuilding(&rebuilt) };
        take_in(&overlay);
        let (held, all) = (overlay.read().bytes, live.under_all());
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
    fn a_range_is_what_the_shelf_and_the_changes_over_it_make_together() {
        let (below, plain) = (Box::new(Memory::default()), Memory::default());
        let overlay = Overlay { most_bytes: 2_000, step: 3, ..Overlay::live(below) };
        let tree = Tree::Postings;
        for n in 0..2_000_u32 {
            let key = (n.wrapping_mul(2_654_435_761) % 97).to_be_bytes();
            for slots in [&overlay as &dyn Slots, &plain] {
                if n % 3 == 0 { slots.remove(tree, &key) } else { slots.put(tree, &key, &n.to_be_bytes()) }
                    .unwrap();
            }
            let (from, to, limit) = ((n % 50).to_be_bytes(), (n % 97).to_be_bytes(), n as usize % 7);
            assert_eq!(overlay.get(tree, &key).unwrap(), plain.get(tree, &key).unwrap());
            for to in [Some(&to[..]), None] {
                let found = overlay.upwards(tree, &from, to, limit).unwrap();
                assert_eq!(found, plain.upwards(tree, &from, to, limit).unwrap());
            }
            let found = overlay.downwards(tree, &from, &to, limit).unwrap();
            assert_eq!(found, plain.downwards(tree, &from, &to, limit).unwrap());
        }
        overlay.settle().unwrap();
        assert_eq!(overlay.read().bytes, 0);
        assert_eq!(under(overlay.below(), tree, &[]).unwrap(), under(&plain, tree, &[]).unwrap());
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
