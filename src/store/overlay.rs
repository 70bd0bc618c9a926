//! Changes kept in memory before the database: they reach it in the order of their keys, and what is put and removed
//! again in between never does. So the database touches a page a few times instead of once a record. It holds no truth:
//! after a crash the log makes all of it again.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::Error;
use super::runs::{ROW_BYTES, Row, key_bytes, row};
use super::seen::Seen;
use super::shelf::{Pairs, Shelf, Slots, Tree, bound};

/// Over a shelf that nothing else changes. One thread changes it; others may ask for single keys meanwhile, but for
/// ranges only while nothing changes.
pub(super) struct Overlay {
    below: Box<dyn Shelf>,
    /// Transfers and jobs that may be here or below: each new one is looked for before it is made.
    seen: Arc<Seen>,
    /// By the place of the tree. A lock each, and never held while the shelf below takes a change: who asks for a key
    /// waits for no batch.
    trees: [RwLock<Changes>; Tree::ALL.len()],
    bytes: AtomicUsize,
    /// The tree, and the key in it, from which the next pairs go down.
    next: Mutex<(usize, Box<[u8]>)>,
    most_bytes: usize,
    /// Pairs that go down with each change while there is too much here.
    step: usize,
}

/// `None`: removed.
pub(super) type Change = Option<Box<[u8]>>;
type Map = BTreeMap<Box<[u8]>, Change>;

/// Changes of one tree.
#[derive(Default)]
struct Changes {
    map: Map,
    /// Of a tree that has a row for each entry of the books: what was put. Its map has what was removed.
    rows: BTreeSet<Row>,
}

/// 1 MiB: among a million transfers it takes three in a hundred for made that are not. Among many millions it is of no use
/// any more, and the shelf below is asked.
pub(super) const SEEN_LINES: usize = 1 << 14;

/// The trees whose keys are in that filter.
pub(super) fn may_be_new(tree: Tree) -> bool {
    matches!(tree, Tree::Transfers | Tree::Jobs)
}

/// Bytes that a node holds, and how many pairs it then brings down with each new one: a few, so that no commit waits
/// long, and in the order of their keys from one time to the next.
const MOST_BYTES: usize = 4 * 1024 * 1024;
const STEP: usize = 16;
/// What a pair takes in memory beside its key and value, and what a row takes.
const PAIR_BYTES: usize = 96;
const ROW_COSTS: usize = 48;

/// Several changes, after which as many pairs go down as they are worth.
struct Together<'a> {
    overlay: &'a Overlay,
    made: Cell<usize>,
}

// === impl Overlay

impl Overlay {
    /// `seen` has every transfer and every job that is below.
    pub(super) fn new(below: Box<dyn Shelf>, seen: Arc<Seen>) -> Self {
        Overlay {
            below,
            seen,
            trees: Default::default(),
            bytes: AtomicUsize::new(0),
            next: Mutex::default(),
            most_bytes: MOST_BYTES,
            step: STEP,
        }
    }

    fn read(&self, tree: Tree) -> RwLockReadGuard<'_, Changes> {
        self.trees[tree as usize].read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, tree: Tree) -> RwLockWriteGuard<'_, Changes> {
        self.trees[tree as usize].write().unwrap_or_else(PoisonError::into_inner)
    }

    /// True when the key is neither here nor below; what is not new may still be neither.
    fn is_new(&self, tree: Tree, key: &[u8]) -> bool {
        may_be_new(tree) && !self.seen.may_have(tree, key)
    }

    fn change(&self, tree: Tree, key: &[u8], value: Option<&[u8]>) -> Result<(), Error> {
        let new = self.is_new(tree, key);
        if new && value.is_some() {
            self.seen.add(tree, key);
        }
        // Only this thread changes it.
        let mut bytes = self.bytes.load(Ordering::Relaxed);
        let changed = self.write(tree).take(tree, key, value, new, &mut bytes);
        self.bytes.store(bytes, Ordering::Relaxed);
        changed
    }

    /// Brings at most `most` pairs down, from where the last ones ended. What goes is below before it is gone here, so
    /// that whoever asks finds it.
    fn settle(&self, most: usize) -> Result<(), Error> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut left, mut turns) = (most, 0);
        while left > 0 && turns <= Tree::ALL.len() {
            let nth = next.0 % Tree::ALL.len();
            let Some(tree) = Tree::ALL.get(nth).copied() else { break };
            let following = self.read(tree).following(tree, &next.1);
            let Some((key, value)) = following else {
                *next = (nth + 1, Box::default());
                turns += 1;
                continue;
            };
            left -= 1;
            match &value {
                Some(value) => self.below.put(tree, &key, value)?,
                None => self.below.remove(tree, &key)?,
            }
            let mut bytes = self.bytes.load(Ordering::Relaxed);
            self.write(tree).forget(tree, &key, value.as_deref(), &mut bytes)?;
            self.bytes.store(bytes, Ordering::Relaxed);
            *next = (nth, key);
        }
        Ok(())
    }

    /// Pairs of a range with the changes in it; `look` asks the shelf below for so many more than are removed here.
    fn merged(
        &self,
        tree: Tree,
        from: &[u8],
        to: Option<&[u8]>,
        look: impl FnOnce(usize) -> Result<Pairs, Error>,
    ) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error> {
        let changes = self.read(tree);
        let range = (Bound::Included(from), bound(to));
        let here = || changes.map.range::<[u8], _>(range);
        let removed = here().filter(|(_, value)| value.is_none()).count();
        let mut pairs: BTreeMap<_, _> = look(removed)?.into_iter().collect();
        for (key, value) in here() {
            match value {
                Some(value) => pairs.insert(key.to_vec(), value.to_vec()),
                None => pairs.remove(key.as_ref()),
            };
        }
        pairs.extend(changes.rows(tree, from, to).map(|(key, value)| (key.to_vec(), value.to_vec())));
        Ok(pairs)
    }
}

impl Changes {
    /// The rows of a range, as keys and values.
    fn rows<'c, 'k>(
        &'c self,
        tree: Tree,
        from: &'k [u8],
        to: Option<&'k [u8]>,
    ) -> impl Iterator<Item = (&'c [u8], &'c [u8])> {
        let pairs = key_bytes(tree).into_iter().flat_map(move |key_bytes| {
            self.rows.range(least(from)..).filter_map(move |row| row.split_at_checked(key_bytes))
        });
        pairs
            .skip_while(move |(key, _)| *key < from)
            .take_while(move |(key, _)| to.is_none_or(|to| *key < to))
    }

    /// The value under a key; `Some(None)`: removed.
    fn get(&self, tree: Tree, key: &[u8]) -> Option<Change> {
        self.map.get(key).cloned().or_else(|| {
            let key_bytes = key_bytes(tree).filter(|bytes| *bytes == key.len())?;
            Some(Some(self.row(key)?.get(key_bytes..)?.into()))
        })
    }

    /// The row under a whole key.
    fn row(&self, key: &[u8]) -> Option<Row> {
        self.rows.range(least(key)..).next().filter(|row| row.starts_with(key)).copied()
    }

    /// Takes a change in; `new` says that the key is not here.
    fn take(
        &mut self,
        tree: Tree,
        key: &[u8],
        value: Option<&[u8]>,
        new: bool,
        bytes: &mut usize,
    ) -> Result<(), Error> {
        if let Some(key_bytes) = key_bytes(tree) {
            if let Some(old) = if new { None } else { self.row(key) } {
                self.rows.remove(&old);
                *bytes = bytes.saturating_sub(ROW_COSTS);
            }
            if let Some(value) = value {
                self.rows.insert(row(key_bytes, key, value)?);
                *bytes += ROW_COSTS;
                if let Some(gone) = self.map.remove(key) {
                    *bytes = bytes.saturating_sub(pair_bytes(key, gone.as_deref()));
                }
                return Ok(());
            }
        }
        match (self.map.get_mut(key), value) {
            (Some(known), value) => replace(known, value, bytes),
            (None, value) => {
                *bytes += pair_bytes(key, value);
                self.map.insert(key.into(), value.map(Box::from));
            }
        }
        Ok(())
    }

    /// The first change at a key or behind it.
    fn following(&self, tree: Tree, key: &[u8]) -> Option<(Box<[u8]>, Change)> {
        let pair = self.map.range::<[u8], _>((Bound::Included(key), Bound::Unbounded)).next();
        let pair = pair.map(|(key, value)| (key.as_ref(), value.as_deref()));
        let row = self.rows(tree, key, None).next().map(|(key, value)| (key, Some(value)));
        let (key, value) = pair.into_iter().chain(row).min()?;
        Some((key.into(), value.map(Box::from)))
    }

    /// A change is in the shelf below.
    fn forget(
        &mut self,
        tree: Tree,
        key: &[u8],
        value: Option<&[u8]>,
        bytes: &mut usize,
    ) -> Result<(), Error> {
        if self.map.remove(key).is_some() {
            *bytes = bytes.saturating_sub(pair_bytes(key, value));
        } else if let (Some(key_bytes), Some(value)) = (key_bytes(tree), value)
            && self.rows.remove(&row(key_bytes, key, value)?)
        {
            *bytes = bytes.saturating_sub(ROW_COSTS);
        }
        Ok(())
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
    fn change(&self, tree: Tree, key: &[u8], value: Option<&[u8]>) -> Result<(), Error> {
        self.made.set(self.made.get() + 1);
        self.overlay.change(tree, key, value)
    }
}

impl Slots for Together<'_> {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        self.overlay.get(tree, key)
    }

    fn put(&self, tree: Tree, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.change(tree, key, Some(value))
    }

    fn remove(&self, tree: Tree, key: &[u8]) -> Result<(), Error> {
        self.change(tree, key, None)
    }
}

impl Slots for Overlay {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        if self.is_new(tree, key) {
            return Ok(None);
        }
        let known = self.read(tree).get(tree, key);
        match known {
            Some(value) => Ok(value.map(Vec::from)),
            None => self.below.get(tree, key),
        }
    }

    fn put(&self, tree: Tree, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.together(&mut |slots| slots.put(tree, key, value))
    }

    fn remove(&self, tree: Tree, key: &[u8]) -> Result<(), Error> {
        self.together(&mut |slots| slots.remove(tree, key))
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
        let all = Together { overlay: self, made: Cell::new(0) };
        work(&all)?;
        let mut steps = all.made.get();
        while steps > 0 && self.bytes.load(Ordering::Relaxed) > self.most_bytes {
            self.settle(self.step)?;
            steps -= 1;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), Error> {
        self.settle(usize::MAX)?;
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
        let overlay = Overlay { most_bytes: 2_000, step: 3, ..Overlay::new(below, Arc::new(Seen::new(8))) };
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
        overlay.settle(usize::MAX).unwrap();
        assert_eq!(overlay.bytes.load(Ordering::Relaxed), 0);
        assert_eq!(under(overlay.below.as_ref(), tree, &[]).unwrap(), under(&plain, tree, &[]).unwrap());
    }
}
