//! Changes kept in memory before the database: they reach it in the order of their keys, and what is put and removed
//! again in between never does. So the database touches a page a few times instead of once a record. It holds no truth:
//! after a crash the log makes all of it again.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::Error;
use super::shelf::{Pairs, Shelf, Slots, Tree, bound};

/// Over a shelf that nothing else changes.
pub(super) struct Overlay {
    below: Box<dyn Shelf>,
    changes: RwLock<Changes>,
    most_bytes: usize,
    /// Pairs that go down with each change while there is too much here.
    step: usize,
}

/// `None`: removed.
type Map = BTreeMap<Box<[u8]>, Option<Box<[u8]>>>;

#[derive(Default)]
struct Changes {
    /// By the place of the tree.
    trees: [Map; Tree::ALL.len()],
    bytes: usize,
    /// The tree, and the key in it, from which the next pairs go down.
    next: (usize, Box<[u8]>),
}

/// Bytes that a node holds, and how many pairs it then brings down with each new one: a few, so that no commit waits
/// long, and in the order of their keys from one time to the next.
const MOST_BYTES: usize = 4 * 1024 * 1024;
const STEP: usize = 16;
/// What a pair takes in memory beside its key and value.
const PAIR_BYTES: usize = 96;

// === impl Overlay

impl Overlay {
    pub(super) fn new(below: Box<dyn Shelf>) -> Self {
        Overlay { below, changes: RwLock::default(), most_bytes: MOST_BYTES, step: STEP }
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
        if changes.bytes > self.most_bytes { changes.settle(self.below.as_ref(), self.step) } else { Ok(()) }
    }

    /// Brings everything down.
    pub(super) fn settle(&self) -> Result<(), Error> {
        self.write().settle(self.below.as_ref(), usize::MAX)
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

    fn take(&mut self, tree: Tree, key: &[u8], value: Option<&[u8]>) {
        let Some(map) = self.trees.get_mut(tree as usize) else { return };
        if let Some(known) = map.get_mut(key) {
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
                Some(value) => below.put(tree, &key, value)?,
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

impl Slots for Overlay {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        let changes = self.read();
        if let Some(value) = changes.map(tree).and_then(|map| map.get(key)) {
            return Ok(value.as_deref().map(<[u8]>::to_vec));
        }
        self.below.get(tree, key)
    }

    fn put(&self, tree: Tree, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.change(tree, key, Some(value))
    }

    fn remove(&self, tree: Tree, key: &[u8]) -> Result<(), Error> {
        self.change(tree, key, None)
    }
}

impl Shelf for Overlay {
    fn upwards(&self, tree: Tree, from: &[u8], to: Option<&[u8]>, limit: usize) -> Result<Pairs, Error> {
        if to.is_some_and(|to| to <= from) {
            return Ok(Vec::new());
        }
        let look = |removed| self.below.upwards(tree, from, to, limit.saturating_add(removed));
        Ok(self.merged(tree, from, to, look)?.into_iter().take(limit).collect())
    }

    fn downwards(&self, tree: Tree, from: &[u8], to: &[u8], limit: usize) -> Result<Pairs, Error> {
        if to <= from {
            return Ok(Vec::new());
        }
        let look = |removed| self.below.downwards(tree, from, to, limit.saturating_add(removed));
        Ok(self.merged(tree, from, Some(to), look)?.into_iter().rev().take(limit).collect())
    }

    fn flush(&self) -> Result<(), Error> {
        self.settle()?;
        self.below.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::shelf::{Memory, under};
    use super::*;

    #[test]
    fn a_range_is_what_the_shelf_and_the_changes_over_it_make_together() {
        let (below, plain) = (Box::new(Memory::default()), Memory::default());
        let overlay = Overlay { most_bytes: 2_000, step: 3, ..Overlay::new(below) };
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
        assert_eq!(under(overlay.below.as_ref(), tree, &[]).unwrap(), under(&plain, tree, &[]).unwrap());
    }
}
