//! Changes kept in memory before the database: they reach it in the order of their keys, and what is put and removed
//! again in between never does. So the database touches a page a few times instead of once a record. It holds no truth:
//! after a crash the log makes all of it again.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::Error;
use super::runs::{ROW_BYTES, Row, key_bytes, row};
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
pub(super) type Change = Option<Box<[u8]>>;
type Map = BTreeMap<Box<[u8]>, Change>;

#[derive(Default)]
struct Changes {
    /// By the place of the tree.
    maps: [Map; Tree::ALL.len()],
    /// Of the trees that have a row for each entry of the books: what was put. Their maps have what was removed.
    rows: [BTreeSet<Row>; Tree::ALL.len()],
    bytes: usize,
    /// The map, or behind the maps the set of rows, and the key in it, from which the next pairs go down.
    next: (usize, Box<[u8]>),
}

/// Bytes that a node holds, and how many pairs it then brings down with each new one: a few, so that no commit waits
/// long, and in the order of their keys from one time to the next.
const MOST_BYTES: usize = 4 * 1024 * 1024;
const STEP: usize = 16;
/// What a pair takes in memory beside its key and value, and what a row takes.
const PAIR_BYTES: usize = 96;
const ROW_COSTS: usize = 48;

/// Several changes under one lock: the readers and the one that changes get in each other's way once a batch.
struct Together<'a> {
    below: &'a dyn Shelf,
    changes: RefCell<RwLockWriteGuard<'a, Changes>>,
    made: Cell<usize>,
}

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
        self.together(&mut |slots| match value {
            Some(value) => slots.put(tree, key, value),
            None => slots.remove(tree, key),
        })
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
        let here = || changes.maps.get(tree as usize).into_iter().flat_map(|map| map.range::<[u8], _>(range));
        let removed = here().filter(|(_, value)| value.is_none()).count();
        let mut pairs: BTreeMap<_, _> = look(removed)?.into_iter().collect();
        for (key, value) in here() {
            match value {
                Some(value) => pairs.insert(key.to_vec(), value.to_vec()),
                None => pairs.remove(key.as_ref()),
            };
        }
        pairs.extend(changes.rows_of(tree, from, to).map(|(key, value)| (key.to_vec(), value.to_vec())));
        Ok(pairs)
    }
}

impl Changes {
    /// The rows of a range, as keys and values.
    fn rows_of<'c, 'k>(
        &'c self,
        tree: Tree,
        from: &'k [u8],
        to: Option<&'k [u8]>,
    ) -> impl Iterator<Item = (&'c [u8], &'c [u8])> {
        let rows = key_bytes(tree).zip(self.rows.get(tree as usize)).into_iter();
        let pairs = rows.flat_map(|(key_bytes, rows)| {
            rows.range(least(from)..).filter_map(move |row| row.split_at_checked(key_bytes))
        });
        pairs
            .skip_while(move |(key, _)| *key < from)
            .take_while(move |(key, _)| to.is_none_or(|to| *key < to))
    }

    /// The value under a key; `Some(None)`: removed.
    fn get(&self, tree: Tree, key: &[u8]) -> Option<Option<&[u8]>> {
        let known = self.maps.get(tree as usize)?.get(key).map(Option::as_deref);
        known.or_else(|| {
            let (found, value) = self.rows_of(tree, key, None).next()?;
            (found == key).then_some(Some(value))
        })
    }

    fn take(&mut self, tree: Tree, key: &[u8], value: Option<&[u8]>) -> Result<(), Error> {
        if let Some(key_bytes) = key_bytes(tree) {
            let old = self.rows_of(tree, key, None).next().filter(|(found, _)| *found == key);
            let old = old.map(|(key, value)| row(key_bytes, key, value)).transpose()?;
            let Some(rows) = self.rows.get_mut(tree as usize) else { return Ok(()) };
            if let Some(old) = old {
                rows.remove(&old);
                self.bytes = self.bytes.saturating_sub(ROW_COSTS);
            }
            if let Some(value) = value {
                rows.insert(row(key_bytes, key, value)?);
                self.bytes += ROW_COSTS;
                if let Some(gone) = self.maps.get_mut(tree as usize).and_then(|map| map.remove(key)) {
                    self.bytes = self.bytes.saturating_sub(pair_bytes(key, gone.as_deref()));
                }
                return Ok(());
            }
        }
        let Some(map) = self.maps.get_mut(tree as usize) else { return Ok(()) };
        match (map.get_mut(key), value) {
            (Some(known), value) => replace(known, value, &mut self.bytes),
            (None, value) => {
                self.bytes += pair_bytes(key, value);
                map.insert(key.into(), value.map(Box::from));
            }
        }
        Ok(())
    }

    /// Brings at most `most` pairs down, from where the last ones ended.
    fn settle(&mut self, below: &dyn Shelf, most: usize) -> Result<(), Error> {
        let trees = Tree::ALL.len();
        let (mut left, mut turns) = (most, 0);
        while left > 0 && turns <= 2 * trees {
            let nth = self.next.0 % (2 * trees);
            let Some(tree) = Tree::ALL.get(nth % trees).copied() else { break };
            let gone = if nth < trees { self.pop(nth) } else { self.pop_row(tree) };
            let Some((key, value)) = gone else {
                self.next = (nth + 1, Box::default());
                turns += 1;
                continue;
            };
            left -= 1;
            match &value {
                Some(value) => below.put(tree, &key, value)?,
                None => below.remove(tree, &key)?,
            }
            self.next = (nth, key);
        }
        Ok(())
    }

    /// Takes the next pair to go down out of a map.
    fn pop(&mut self, nth: usize) -> Option<(Box<[u8]>, Change)> {
        let map = self.maps.get_mut(nth)?;
        let following = (Bound::Included(self.next.1.as_ref()), Bound::Unbounded);
        let key = map.range::<[u8], _>(following).next().map(|(key, _)| key.clone())?;
        let value = map.remove(&key)?;
        self.bytes = self.bytes.saturating_sub(pair_bytes(&key, value.as_deref()));
        Some((key, value))
    }

    fn pop_row(&mut self, tree: Tree) -> Option<(Box<[u8]>, Change)> {
        let (key_bytes, rows) = key_bytes(tree).zip(self.rows.get_mut(tree as usize))?;
        let row = rows.range(least(&self.next.1)..).next().copied()?;
        rows.remove(&row);
        self.bytes = self.bytes.saturating_sub(ROW_COSTS);
        let (key, value) = row.split_at_checked(key_bytes)?;
        Some((key.into(), Some(value.into())))
    }
}

/// The smallest row whose key may be `from` or after it.
fn least(from: &[u8]) -> Row {
    let mut row = [0; ROW_BYTES];
    row.iter_mut().zip(from).for_each(|(byte, from)| *byte = *from);
    row
}

/// Puts another value in the place of a known one, and keeps the count of bytes.
pub(super) fn replace(known: &mut Change, value: Option<&[u8]>, bytes: &mut usize) {
    match (&mut *known, value) {
        (Some(known), Some(value)) if known.len() == value.len() => known.copy_from_slice(value),
        _ => {
            *bytes += value.map_or(0, <[u8]>::len);
            *bytes = bytes.saturating_sub(known.as_deref().map_or(0, <[u8]>::len));
            *known = value.map(Box::from);
        }
    }
}

pub(super) fn pair_bytes(key: &[u8], value: Option<&[u8]>) -> usize {
    key.len() + value.map_or(0, <[u8]>::len) + PAIR_BYTES
}

impl Together<'_> {
    fn take(&self, tree: Tree, key: &[u8], value: Option<&[u8]>) -> Result<(), Error> {
        self.made.set(self.made.get() + 1);
        self.changes.borrow_mut().take(tree, key, value)
    }
}

impl Slots for Together<'_> {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        match self.changes.borrow().get(tree, key) {
            Some(value) => Ok(value.map(<[u8]>::to_vec)),
            None => self.below.get(tree, key),
        }
    }

    fn put(&self, tree: Tree, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.take(tree, key, Some(value))
    }

    fn remove(&self, tree: Tree, key: &[u8]) -> Result<(), Error> {
        self.take(tree, key, None)
    }
}

impl Slots for Overlay {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        // Held while the shelf below is asked: what goes down meanwhile would be in neither.
        let changes = self.read();
        match changes.get(tree, key) {
            Some(value) => Ok(value.map(<[u8]>::to_vec)),
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

    fn together(&self, work: &mut dyn FnMut(&dyn Slots) -> Result<(), Error>) -> Result<(), Error> {
        let changes = RefCell::new(self.write());
        let all = Together { below: self.below.as_ref(), changes, made: Cell::new(0) };
        work(&all)?;
        let (mut changes, mut steps) = (all.changes.into_inner(), all.made.get());
        while steps > 0 && changes.bytes > self.most_bytes {
            changes.settle(self.below.as_ref(), self.step)?;
            steps -= 1;
        }
        Ok(())
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
        for tree in [Tree::Transfers, Tree::Postings, Tree::Listed] {
            ranges_of(tree);
        }
    }

    /// Keys and values of the sizes that the tree has, or of a few bytes.
    fn ranges_of(tree: Tree) {
        let (below, plain) = (Box::new(Memory::default()), Memory::default());
        let overlay = Overlay { most_bytes: 2_000, step: 3, ..Overlay::new(below) };
        let key_bytes = key_bytes(tree);
        let key =
            |n: u32| [n.to_be_bytes().to_vec(), vec![7; key_bytes.map_or(0, |bytes| bytes - 4)]].concat();
        let value_bytes = key_bytes.map_or(4, |bytes| ROW_BYTES - bytes);
        for n in 0..2_000_u32 {
            let changed = key(n.wrapping_mul(2_654_435_761) % 97);
            let value = vec![n as u8; value_bytes];
            for slots in [&overlay as &dyn Slots, &plain] {
                if n % 3 == 0 { slots.remove(tree, &changed) } else { slots.put(tree, &changed, &value) }
                    .unwrap();
            }
            let (from, to, limit) = (key(n % 50), key(n % 97), n as usize % 7);
            assert_eq!(overlay.get(tree, &changed).unwrap(), plain.get(tree, &changed).unwrap());
            // Ends that are no keys, but the beginning of some, or more than one.
            for (from, to) in [(from.as_slice(), to.as_slice()), (&from[..4], &to[..3]), (&from, &[255; 64])]
            {
                for to in [Some(to), None] {
                    let found = overlay.upwards(tree, from, to, limit).unwrap();
                    assert_eq!(found, plain.upwards(tree, from, to, limit).unwrap());
                }
                let found = overlay.downwards(tree, from, to, limit).unwrap();
                assert_eq!(found, plain.downwards(tree, from, to, limit).unwrap());
            }
        }
        overlay.settle().unwrap();
        assert_eq!(overlay.read().bytes, 0);
        assert_eq!(under(overlay.below.as_ref(), tree, &[]).unwrap(), under(&plain, tree, &[]).unwrap());
    }
}
