//! Rows that taking in a whole log only ever adds: flat and unordered while the log is read, then put in order and brought
//! down together. In a map each of them would cost comparisons all the way down, and memory of its own.

use super::Error;
use super::keys::{PLACE_BYTES, SHORT_BYTES};
use super::shelf::{Slots, Tree};

/// Bytes of a row: key and value.
pub(super) const ROW_BYTES: usize = SHORT_BYTES + PLACE_BYTES;
/// Key and value of one entry, one behind the other.
pub(super) type Row = [u8; ROW_BYTES];
/// Rows of one tree that are held. More than 32 MiB of them: what is larger than that, the allocator takes from the
/// system and gives back to it.
pub(super) const ROWS: usize = 1_200_000;

/// The rows of the trees that have one for each entry of the books.
pub(super) struct Runs {
    runs: [Run; 3],
    most_rows: usize,
}

struct Run {
    tree: Tree,
    key_bytes: usize,
    rows: Vec<Row>,
    /// So many at the front are in order.
    sorted: usize,
}

/// Rows behind those in order that are looked through one by one.
const LOOKED_THROUGH: usize = 1_024;

/// Bytes of a row's key, in the trees that have a row for each entry of the books.
pub(super) fn key_bytes(tree: Tree) -> Option<usize> {
    match tree {
        Tree::Transfers => Some(SHORT_BYTES),
        Tree::History | Tree::Postings => Some(ROW_BYTES),
        _ => None,
    }
}

pub(super) fn row(key_bytes: usize, key: &[u8], value: &[u8]) -> Result<Row, Error> {
    let mut row = [0; ROW_BYTES];
    match row.split_at_mut_checked(key_bytes) {
        Some((head, rest)) if head.len() == key.len() && rest.len() == value.len() => {
            head.copy_from_slice(key);
            rest.copy_from_slice(value);
            Ok(row)
        }
        _ => Err(Error::Index { why: "a row of another size than its tree's".into() }),
    }
}

// === impl Runs

impl Runs {
    pub(super) fn new(most_rows: usize) -> Self {
        let runs = [Tree::Transfers, Tree::History, Tree::Postings].map(|tree| {
            let key_bytes = key_bytes(tree).unwrap_or(ROW_BYTES);
            Run { tree, key_bytes, rows: Vec::new(), sorted: 0 }
        });
        Runs { runs, most_rows }
    }

    fn run(&mut self, tree: Tree) -> Option<&mut Run> {
        self.runs.iter_mut().find(|run| run.tree == tree)
    }

    pub(super) fn has(&self, tree: Tree) -> bool {
        self.runs.iter().any(|run| run.tree == tree)
    }

    /// Adds a row; when there is no room for one more, all of its tree go down first.
    pub(super) fn add(
        &mut self,
        tree: Tree,
        key: &[u8],
        value: &[u8],
        below: &dyn Slots,
    ) -> Result<(), Error> {
        let most = self.most_rows;
        let Some(run) = self.run(tree) else { return Ok(()) };
        let row = row(run.key_bytes, key, value)?;
        if run.rows.len() >= most {
            run.settle(below)?;
        }
        if run.rows.capacity() == 0 {
            run.rows.reserve_exact(most);
        }
        run.rows.push(row);
        Ok(())
    }

    /// The value that was added last under a key.
    pub(super) fn get(&mut self, tree: Tree, key: &[u8]) -> Option<Vec<u8>> {
        let run = self.run(tree)?;
        if run.rows.len() - run.sorted > LOOKED_THROUGH {
            run.sort();
        }
        let of = |row: &Row| row.starts_with(key);
        let (sorted, rest) = run.rows.split_at_checked(run.sorted)?;
        let after = sorted.partition_point(|row| row.as_slice() < key || of(row));
        let found = rest.iter().rev().find(|row| of(row)).or_else(|| {
            let last = sorted.get(..after)?.last()?;
            of(last).then_some(last)
        })?;
        Some(found.get(run.key_bytes..).unwrap_or_default().to_vec())
    }

    /// Brings everything down.
    pub(super) fn settle(&mut self, below: &dyn Slots) -> Result<(), Error> {
        self.runs.iter_mut().try_for_each(|run| run.settle(below))
    }
}

impl Run {
    fn sort(&mut self) {
        // Stable: of two under one key the later one counts.
        let key_bytes = self.key_bytes;
        self.rows.sort_by(|a, b| a.get(..key_bytes).cmp(&b.get(..key_bytes)));
        self.sorted = self.rows.len();
    }

    fn settle(&mut self, below: &dyn Slots) -> Result<(), Error> {
        self.sort();
        for row in &self.rows {
            let (key, value) = row.split_at_checked(self.key_bytes).unwrap_or_default();
            below.put(self.tree, key, value)?;
        }
        self.rows.clear();
        self.sorted = 0;
        Ok(())
    }
}
