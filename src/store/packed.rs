//! Many small pairs in one pair of the database below: sled keeps some memory for every sixteen keys, so a tree that has
//! a row for each entry of the books must not have a key for each. The pairs look as if they stood alone.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Error;
use super::keys::{PLACE_BYTES, SHORT_BYTES};
use super::shelf::{Pairs, Shelf, Slots, Tree};

/// Over a shelf that nothing else changes.
pub(super) struct Packed<S> {
    below: S,
    /// The bucket that was changed last, not yet below: those that settle in the order of their keys change one bucket
    /// many times.
    last: Mutex<Option<Bucket>>,
}

struct Bucket {
    tree: Tree,
    key: Vec<u8>,
    rows: Vec<u8>,
}

/// How a tree's pairs stand in buckets: in a bucket are rows of one width, in order, each the rest of a key and a value.
#[derive(Clone, Copy)]
struct Form {
    key_bytes: usize,
    value_bytes: usize,
    /// Bytes of the key that its row leaves out: the bucket's key begins with them.
    left_out: usize,
    by: By,
}

#[derive(Clone, Copy)]
enum By {
    /// The first 14 bits of a key: for hashes.
    Bits,
    /// The bytes that the row leaves out.
    Bytes,
}

/// Buckets that a range reads at a time.
const AT_A_TIME: usize = 64;

fn form(tree: Tree) -> Option<Form> {
    let later = SHORT_BYTES + PLACE_BYTES;
    match tree {
        Tree::Transfers => {
            Some(Form { key_bytes: SHORT_BYTES, value_bytes: PLACE_BYTES, left_out: 1, by: By::Bits })
        }
        Tree::History => Some(Form { key_bytes: later, value_bytes: 0, left_out: 1, by: By::Bits }),
        // Of one customer, what stands in the same 16 MiB of a segment.
        Tree::Postings => Some(Form { key_bytes: later, value_bytes: 0, left_out: later - 5, by: By::Bytes }),
        // Of one customer, what it spent on 256 days.
        Tree::Spent => Some(Form {
            key_bytes: SHORT_BYTES + 8,
            value_bytes: 8,
            left_out: SHORT_BYTES + 7,
            by: By::Bytes,
        }),
        _ => None,
    }
}

impl Form {
    /// The key of the bucket for a key, or the smallest for those that begin with a part of one.
    fn bucket(&self, key: &[u8]) -> Vec<u8> {
        match self.by {
            By::Bytes => key.iter().take(self.left_out).copied().collect(),
            By::Bits => key.iter().zip([0xff, 0xfc]).map(|(byte, mask)| byte & mask).collect(),
        }
    }

    fn width(&self) -> usize {
        self.key_bytes - self.left_out + self.value_bytes
    }

    /// Where the row of a key begins, or would.
    fn find(&self, rows: &[u8], key: &[u8]) -> Result<usize, usize> {
        let rest = key.get(self.left_out..).unwrap_or_default();
        let (mut low, mut high) = (0, rows.len() / self.width());
        while low < high {
            let middle = low + (high - low) / 2;
            let at = middle * self.width();
            match rows.get(at..at + rest.len()).unwrap_or_default().cmp(rest) {
                std::cmp::Ordering::Equal => return Ok(at),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Err(low * self.width())
    }

    fn value<'r>(&self, rows: &'r [u8], at: usize) -> &'r [u8] {
        let from = at + self.key_bytes - self.left_out;
        rows.get(from..from + self.value_bytes).unwrap_or_default()
    }

    /// The pairs of a bucket.
    fn pairs<'r>(
        &self,
        bucket: &'r [u8],
        rows: &'r [u8],
    ) -> impl DoubleEndedIterator<Item = (Vec<u8>, Vec<u8>)> {
        let (left_out, rest) = (self.left_out, self.key_bytes - self.left_out);
        rows.chunks_exact(self.width()).map(move |row| {
            let (rest, value) = row.split_at(rest);
            let mut key = bucket.get(..left_out).unwrap_or_default().to_vec();
            key.extend_from_slice(rest);
            (key, value.to_vec())
        })
    }
}

// === impl Packed

impl<S: Shelf> Packed<S> {
    pub(super) fn new(below: S) -> Self {
        Packed { below, last: Mutex::default() }
    }

    fn last(&self) -> MutexGuard<'_, Option<Bucket>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the bucket that was changed last down.
    fn put_down(&self, last: &mut Option<Bucket>) -> Result<(), Error> {
        match last.take() {
            Some(bucket) if bucket.rows.is_empty() => self.below.remove(bucket.tree, &bucket.key),
            Some(bucket) => self.below.put(bucket.tree, &bucket.key, &bucket.rows),
            None => Ok(()),
        }
    }

    fn change(&self, form: Form, tree: Tree, key: &[u8], value: Option<&[u8]>) -> Result<(), Error> {
        let fits = |value: &[u8]| value.len() == form.value_bytes;
        if key.len() != form.key_bytes || !value.is_none_or(fits) {
            return Err(Error::Index { why: "a pair of another size than its tree's".into() });
        }
        let mut last = self.last();
        let wanted = form.bucket(key);
        if last.as_ref().is_none_or(|bucket| bucket.tree != tree || bucket.key != wanted) {
            self.put_down(&mut last)?;
            let rows = self.below.get(tree, &wanted)?.unwrap_or_default();
            *last = Some(Bucket { tree, key: wanted, rows });
        }
        let Some(Bucket { rows, .. }) = last.as_mut() else { return Ok(()) };
        let row = |value: &[u8]| {
            let rest = key.get(form.left_out..).unwrap_or_default();
            rest.iter().chain(value).copied().collect::<Vec<u8>>()
        };
        match (form.find(rows, key), value) {
            (Ok(at), Some(value)) => drop(rows.splice(at..at + form.width(), row(value))),
            (Ok(at), None) => drop(rows.drain(at..at + form.width())),
            (Err(at), Some(value)) => drop(rows.splice(at..at, row(value))),
            (Err(_), None) => {}
        }
        Ok(())
    }

    /// Buckets from one key on; `next` finds those after the last one.
    fn range(
        &self,
        limit: usize,
        mut next: impl FnMut(Option<&[u8]>) -> Result<Pairs, Error>,
        mut open: impl FnMut(&[u8], &[u8], &mut Pairs),
    ) -> Result<Pairs, Error> {
        self.put_down(&mut self.last())?;
        let (mut found, mut after) = (Pairs::new(), None);
        while found.len() < limit {
            let buckets = next(after.as_deref())?;
            let Some((last, _)) = buckets.last() else { break };
            after = Some(last.clone());
            for (bucket, rows) in &buckets {
                open(bucket, rows, &mut found);
            }
        }
        found.truncate(limit);
        Ok(found)
    }
}

impl<S: Shelf> Slots for Packed<S> {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        let Some(form) = form(tree) else { return self.below.get(tree, key) };
        let wanted = form.bucket(key);
        let look = |rows: &[u8]| form.find(rows, key).ok().map(|at| form.value(rows, at).to_vec());
        if let Some(bucket) = self.last().as_ref()
            && bucket.tree == tree
            && bucket.key == wanted
        {
            return Ok(look(&bucket.rows));
        }
        Ok(self.below.get(tree, &wanted)?.and_then(|rows| look(&rows)))
    }

    fn put(&self, tree: Tree, key: &[u8], value: &[u8]) -> Result<(), Error> {
        match form(tree) {
            Some(form) => self.change(form, tree, key, Some(value)),
            None => self.below.put(tree, key, value),
        }
    }

    fn remove(&self, tree: Tree, key: &[u8]) -> Result<(), Error> {
        match form(tree) {
            Some(form) => self.change(form, tree, key, None),
            None => self.below.remove(tree, key),
        }
    }
}

impl<S: Shelf> Shelf for Packed<S> {
    fn upwards(&self, tree: Tree, from: &[u8], to: Option<&[u8]>, limit: usize) -> Result<Pairs, Error> {
        let Some(form) = form(tree) else { return self.below.upwards(tree, from, to, limit) };
        let next = |after: Option<&[u8]>| {
            // The next key there can be.
            let first = after.map_or_else(|| form.bucket(from), |after| [after, &[0]].concat());
            self.below.upwards(tree, &first, to, AT_A_TIME)
        };
        let wanted = |key: &[u8]| key >= from && to.is_none_or(|to| key < to);
        self.range(limit, next, |bucket, rows, found| {
            found.extend(form.pairs(bucket, rows).filter(|(key, _)| wanted(key)));
        })
    }

    fn downwards(&self, tree: Tree, from: &[u8], to: &[u8], limit: usize) -> Result<Pairs, Error> {
        let Some(form) = form(tree) else { return self.below.downwards(tree, from, to, limit) };
        let next = |after: Option<&[u8]>| {
            self.below.downwards(tree, &form.bucket(from), after.unwrap_or(to), AT_A_TIME)
        };
        self.range(limit, next, |bucket, rows, found| {
            found.extend(
                form.pairs(bucket, rows)
                    .rev()
                    .filter(|(key, _)| key.as_slice() >= from && key.as_slice() < to),
            );
        })
    }

    fn together(&self, work: &mut dyn FnMut(&dyn Slots) -> Result<(), Error>) -> Result<(), Error> {
        work(self)
    }

    fn flush(&self) -> Result<(), Error> {
        self.put_down(&mut self.last())?;
        self.below.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::short;
    use super::super::shelf::Memory;
    use super::*;

    #[test]
    fn packed_pairs_read_as_if_they_stood_alone() {
        let (packed, plain) = (Packed::new(Memory::default()), Memory::default());
        for tree in [Tree::Transfers, Tree::History, Tree::Postings, Tree::Spent, Tree::Jobs] {
            let (key_bytes, value_bytes) = form(tree).map_or((20, 3), |f| (f.key_bytes, f.value_bytes));
            let make = |n: u32| {
                let mut key = short(&(n % 40).to_string()).to_vec();
                key.resize(key_bytes.max(SHORT_BYTES), 0);
                if let Some(end) = key.get_mut(SHORT_BYTES..) {
                    end.fill((n % 11) as u8);
                }
                key
            };
            for n in 0..2_000_u32 {
                let (key, value) = (make(n.wrapping_mul(2_654_435_761) >> 8), vec![n as u8; value_bytes]);
                for slots in [&packed as &dyn Slots, &plain] {
                    if n % 3 == 0 { slots.remove(tree, &key) } else { slots.put(tree, &key, &value) }
                        .unwrap();
                }
                assert_eq!(packed.get(tree, &make(n)).unwrap(), plain.get(tree, &make(n)).unwrap());
                if n % 7 == 0 {
                    let (from, to, limit) = (make(n), make(n / 3), n as usize % 30);
                    let from = &from[..(n as usize % 16)];
                    for to in [Some(to.as_slice()).filter(|to| *to > from), None] {
                        let found = packed.upwards(tree, from, to, limit).unwrap();
                        assert_eq!(found, plain.upwards(tree, from, to, limit).unwrap());
                    }
                    let found = packed.downwards(tree, from, &to, limit).unwrap();
                    assert_eq!(found, plain.downwards(tree, from, &to, limit).unwrap());
                }
            }
        }
        let far = packed.put(Tree::Transfers, b"short", &[]);
        assert!(matches!(far, Err(Error::Index { .. })));
    }
}
