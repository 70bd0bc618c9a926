//! A uid for each container, so that no two share what the kernel counts by user. This file proposes them; who has one is
//! the engine's to say: a container is named by its uid, and an engine gives a name once.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::super::Error;

/// Where containers' uids are the host's: far from people, services and subuids, and from those of the local backend.
const FIRST: u32 = 1_879_200_000;
/// Where an engine gives its containers uids apart from the host's, and then seldom more than 65,536 of them.
const FIRST_APART: u32 = 10_000;

/// The uids of one node, each also a gid. A copy is the same ones.
#[derive(Debug, Clone)]
pub struct Uids(Arc<Mutex<Known>>);

#[derive(Debug)]
struct Known {
    first: u32,
    count: u32,
    /// Where to look next. One that was given back comes again after all others.
    next: u32,
    taken: BTreeSet<u32>,
}

/// A uid that no other container of this node has. It is given back when this is dropped, and that is for the one who
/// knows that its container is no more.
#[derive(Debug)]
pub struct Lease {
    uid: u32,
    all: Uids,
}

impl Uids {
    /// `apart` says whether the engine's containers have uids apart from the host's. Nodes start at different places, by
    /// the name of their `run`, so that they seldom want the same ones.
    pub fn new(first: Option<u32>, count: u32, apart: bool, run: &str) -> Uids {
        let first = first.unwrap_or(if apart { FIRST_APART } else { FIRST });
        // So that each is a number of a user: the last one that the kernel takes is 4294967294.
        let count = count.clamp(1, u32::MAX - first);
        let next =
            Sha256::digest(run).iter().fold(0u32, |n, byte| n.wrapping_mul(256) + u32::from(*byte)) % count;
        Uids(Arc::new(Mutex::new(Known { first, count, next, taken: BTreeSet::new() })))
    }

    /// A free one.
    ///
    /// # Errors
    /// `Full`, when all are in use.
    pub fn take(&self) -> Result<Lease, Error> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for step in 0..known.count {
            let n = (u64::from(known.next) + u64::from(step)) % u64::from(known.count);
            let n = u32::try_from(n).unwrap_or_default();
            if known.taken.insert(n) {
                known.next = n.wrapping_add(1);
                return Ok(Lease { uid: known.first + n, all: self.clone() });
            }
        }
        Err(Error::Full { backend: super::BACKEND, what: "uid", all: known.count })
    }
}

impl std::fmt::Display for Uids {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        write!(f, "{} from {} on", known.count, known.first)
    }
}

impl Lease {
    pub fn uid(&self) -> u32 {
        self.uid
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut known = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        let n = self.uid - known.first;
        known.taken.remove(&n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_uid_is_given_twice_and_when_all_are_the_refusal_says_so() {
        let uids = Uids::new(Some(5000), 3, false, "a");
        let leases: Vec<Lease> = (0..3).map(|_| uids.take().unwrap()).collect();
        let mut given: Vec<u32> = leases.iter().map(Lease::uid).collect();
        given.sort_unstable();
        assert_eq!(given, [5000, 5001, 5002]);
        let why = uids.clone().take().unwrap_err();
        assert!(matches!(why, Error::Full { what: "uid", all: 3, .. }), "{why}");
        assert_eq!(why.to_string(), "the docker sandbox has no uid left: all 3 are in use");
        drop(leases);
        assert!(uids.take().is_ok());
    }

    #[test]
    fn one_that_was_given_back_comes_again_after_all_others() {
        let uids = Uids::new(None, 3, false, "a");
        let first = uids.take().unwrap().uid();
        let others = [uids.take().unwrap().uid(), uids.take().unwrap().uid()];
        assert!(!others.contains(&first));
        assert_eq!(uids.take().unwrap().uid(), first);
    }

    #[test]
    fn an_engine_with_uids_of_its_own_gets_such_as_it_has() {
        for run in ["a", "b", "c"] {
            let apart = Uids::new(None, 1024, true, run).take().unwrap().uid();
            assert!((10_000..11_024).contains(&apart), "{apart}");
            let hosts = Uids::new(None, 1024, false, run).take().unwrap().uid();
            assert!((1_879_200_000..1_879_201_024).contains(&hosts), "{hosts}");
        }
        let last = Uids::new(Some(4_294_967_290), 1_000_000, false, "a");
        let all: Vec<Lease> = (0..5).map(|_| last.take().unwrap()).collect();
        assert!(all.iter().all(|lease| lease.uid() < u32::MAX) && last.take().is_err());
    }

    #[test]
    fn nodes_begin_at_different_places() {
        let begins: BTreeSet<u32> =
            (0..20).map(|n| Uids::new(None, 1024, false, &format!("run{n}")).take().unwrap().uid()).collect();
        assert!(begins.len() > 15, "{begins:?}");
    }
}
