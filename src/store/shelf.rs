//! Where the index keeps its keys and values: a sled database for the node, plain memory for a look from
//! outside and for tests. Holds no truth: all of it can be made again from the log.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::Error;

/// The trees of the index. A new kind of look-up (balances, holds) is a new line here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tree {
    /// What the index has taken in: one key.
    Meta,
    /// job → state, times, places of its records.
    Jobs,
    /// state, accepted_ms, place of the acceptance → job.
    Listed,
    /// request, place → nothing: records about what is no job, and those a job's row has no room for.
    History,
    /// request → place of the refusal.
    Refused,
    /// request, author of the kind 5 → place.
    Cancelled,
    /// event → place of the signed event.
    Events,
    /// event → relays that owe a last word.
    Owed,
    /// event, relay → place of the answer.
    Delivered,
    /// relay → Unix seconds.
    Cursors,
    /// account → msat, 16 bytes.
    Balances,
    /// transfer → place.
    Transfers,
    /// customer, place → nothing: transfers in that customer's books.
    Postings,
    /// job → customer, msat, expiry of a hold that is not resolved.
    Holds,
    /// whose, day (UTC) → msat that were charged to a customer, or that jobs cost the node.
    Spent,
    /// payment hash → place of a refund that has begun and not ended.
    Refunds,
    /// payment hash → place of the invoice, and whether it is open.
    Invoices,
    /// payment hash → when it expires, of invoices that are watched.
    Unpaid,
    /// customer, day (UTC), skill → free jobs that were accepted.
    FreeJobs,
    /// job → place of its quote.
    Quotes,
    /// seq that was signed → place.
    Seals,
}

impl Tree {
    pub(super) const ALL: [Tree; 21] = [
        Tree::Meta,
        Tree::Jobs,
        Tree::Listed,
        Tree::History,
        Tree::Refused,
        Tree::Cancelled,
        Tree::Events,
        Tree::Owed,
        Tree::Delivered,
        Tree::Cursors,
        Tree::Balances,
        Tree::Transfers,
        Tree::Postings,
        Tree::Holds,
        Tree::Spent,
        Tree::Refunds,
        Tree::Invoices,
        Tree::Unpaid,
        Tree::FreeJobs,
        Tree::Quotes,
        Tree::Seals,
    ];

    fn name(self) -> &'static str {
        match self {
            Tree::Meta => "meta",
            Tree::Jobs => "jobs",
            Tree::Listed => "listed",
            Tree::History => "history",
            Tree::Refused => "refused",
            Tree::Cancelled => "cancelled",
            Tree::Events => "events",
            Tree::Owed => "owed",
            Tree::Delivered => "delivered",
            Tree::Cursors => "cursors",
            Tree::Balances => "balances",
            Tree::Transfers => "transfers",
            Tree::Postings => "postings",
            Tree::Holds => "holds",
            Tree::Spent => "spent",
            Tree::Refunds => "refunds",
            Tree::Invoices => "invoices",
            Tree::Unpaid => "unpaid",
            Tree::FreeJobs => "free jobs",
            Tree::Quotes => "quotes",
            Tree::Seals => "seals",
        }
    }
}

/// Keys and values in order.
pub(super) type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// A map for each tree: all that taking records in needs. Only the applier writes.
pub(super) trait Slots {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error>;
    fn put(&self, tree: Tree, key: &[u8], value: &[u8]) -> Result<(), Error>;
    fn remove(&self, tree: Tree, key: &[u8]) -> Result<(), Error>;
}

/// Slots in order, to be looked through.
pub(super) trait Shelf: Slots + Send + Sync {
    /// Pairs from `from` up to but without `to`, at most `limit`.
    fn upwards(&self, tree: Tree, from: &[u8], to: Option<&[u8]>, limit: usize) -> Result<Pairs, Error>;
    /// Pairs below `to`, downwards to `from`, at most `limit`.
    fn downwards(&self, tree: Tree, from: &[u8], to: &[u8], limit: usize) -> Result<Pairs, Error>;
    /// Makes several changes at one go, where that is cheaper.
    fn together(&self, work: &mut dyn FnMut(&dyn Slots) -> Result<(), Error>) -> Result<(), Error>;
    /// Puts everything on disk, not yet durably.
    fn flush(&self) -> Result<(), Error>;
}

/// All pairs whose key begins with `prefix`.
pub(super) fn under(shelf: &dyn Shelf, tree: Tree, prefix: &[u8]) -> Result<Pairs, Error> {
    let to = after_prefix(prefix);
    shelf.upwards(tree, prefix, to.as_deref(), usize::MAX)
}

/// The smallest key that is larger than every key with this prefix.
pub(super) fn after_prefix(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut to = prefix.to_vec();
    while let Some(last) = to.pop() {
        if last < u8::MAX {
            to.push(last + 1);
            return Some(to);
        }
    }
    None
}

pub(super) fn bound(to: Option<&[u8]>) -> Bound<&[u8]> {
    to.map_or(Bound::Unbounded, Bound::Excluded)
}

/// The node's shelf.
pub(super) struct Sled {
    db: sled::Db,
    trees: Vec<sled::Tree>,
}

impl Sled {
    /// Opens or makes the database; it keeps at most `cache_bytes` of pages. sled may hang or panic on a bad
    /// file, so `index.rs` calls this in a thread of its own.
    pub(super) fn open(dir: &Path, cache_bytes: u64) -> Result<Self, Error> {
        let db = sled::Config::new()
            .path(dir)
            .cache_capacity(cache_bytes)
            // The log is what is durable: between orderly stops sled writes only when its buffers are full.
            .flush_every_ms(None)
            .open()
            .map_err(index_trouble)?;
        let trees = Tree::ALL
            .iter()
            .map(|t| db.open_tree(t.name()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(index_trouble)?;
        Ok(Sled { db, trees })
    }

    fn tree(&self, tree: Tree) -> Result<&sled::Tree, Error> {
        self.trees
            .get(tree as usize)
            .ok_or_else(|| Error::Index { why: format!("tree {} is not open", tree.name()) })
    }
}

fn index_trouble(e: sled::Error) -> Error {
    match e {
        sled::Error::Io(e) => super::disk::trouble("work on the index", Path::new("index"))(e),
        e => Error::Index { why: e.to_string() },
    }
}

impl Slots for Sled {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.tree(tree)?.get(key).map_err(index_trouble)?.map(|v| v.to_vec()))
    }

    fn put(&self, tree: Tree, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.tree(tree)?.insert(key, value).map_err(index_trouble).map(drop)
    }

    fn remove(&self, tree: Tree, key: &[u8]) -> Result<(), Error> {
        self.tree(tree)?.remove(key).map_err(index_trouble).map(drop)
    }
}

impl Shelf for Sled {
    fn upwards(&self, tree: Tree, from: &[u8], to: Option<&[u8]>, limit: usize) -> Result<Pairs, Error> {
        collect(self.tree(tree)?.range::<&[u8], _>((Bound::Included(from), bound(to))).take(limit))
    }

    fn downwards(&self, tree: Tree, from: &[u8], to: &[u8], limit: usize) -> Result<Pairs, Error> {
        collect(
            self.tree(tree)?
                .range::<&[u8], _>((Bound::Included(from), Bound::Excluded(to)))
                .rev()
                .take(limit),
        )
    }

    fn together(&self, work: &mut dyn FnMut(&dyn Slots) -> Result<(), Error>) -> Result<(), Error> {
        work(self)
    }

    fn flush(&self) -> Result<(), Error> {
        self.db.flush().map_err(index_trouble).map(drop)
    }
}

fn collect(pairs: impl Iterator<Item = sled::Result<(sled::IVec, sled::IVec)>>) -> Result<Pairs, Error> {
    pairs.map(|p| p.map(|(k, v)| (k.to_vec(), v.to_vec())).map_err(index_trouble)).collect()
}

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

/// A shelf in memory.
#[derive(Default)]
pub(super) struct Memory {
    maps: Mutex<BTreeMap<Tree, Map>>,
}

impl Memory {
    fn with<T>(&self, tree: Tree, f: impl FnOnce(&mut Map) -> T) -> T {
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        f(maps.entry(tree).or_default())
    }
}

impl Slots for Memory {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.with(tree, |m| m.get(key).cloned()))
    }

    fn put(&self, tree: Tree, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.with(tree, |m| m.insert(key.to_vec(), value.to_vec()));
        Ok(())
    }

    fn remove(&self, tree: Tree, key: &[u8]) -> Result<(), Error> {
        self.with(tree, |m| m.remove(key));
        Ok(())
    }
}

impl Shelf for Memory {
    fn upwards(&self, tree: Tree, from: &[u8], to: Option<&[u8]>, limit: usize) -> Result<Pairs, Error> {
        if to.is_some_and(|to| to <= from) {
            return Ok(Vec::new());
        }
        let range = (Bound::Included(from), bound(to));
        Ok(self.with(tree, |m| {
            m.range::<[u8], _>(range).take(limit).map(|(k, v)| (k.clone(), v.clone())).collect()
        }))
    }

    fn downwards(&self, tree: Tree, from: &[u8], to: &[u8], limit: usize) -> Result<Pairs, Error> {
        if to <= from {
            return Ok(Vec::new());
        }
        let range = (Bound::Included(from), Bound::Excluded(to));
        Ok(self.with(tree, |m| {
            m.range::<[u8], _>(range).rev().take(limit).map(|(k, v)| (k.clone(), v.clone())).collect()
        }))
    }

    fn together(&self, work: &mut dyn FnMut(&dyn Slots) -> Result<(), Error>) -> Result<(), Error> {
        work(self)
    }

    fn flush(&self) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_the_next_one() {
        assert_eq!(after_prefix(b"ab").as_deref(), Some(&b"ac"[..]));
        assert_eq!(after_prefix(&[1, 255]).as_deref(), Some(&[2][..]));
        assert_eq!(after_prefix(&[255]), None);
    }

    #[test]
    fn every_tree_has_its_own_place() {
        for (nth, tree) in Tree::ALL.iter().enumerate() {
            assert_eq!(*tree as usize, nth);
        }
    }
}
