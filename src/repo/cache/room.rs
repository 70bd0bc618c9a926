//! Room in the cache: what goes when it is over its cap, how a mirror shrinks under jobs that hold its bases, and
//! the refusal when all that is left is in use. What a fetch or a base needs is `cache`'s business.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use git2::Oid;

use super::super::budget::Budget;
use super::super::mirror::Mirror;
use super::super::{Error, lean};
use super::{Cache, Slot, Temporary, lock};

/// A mirror with so many packs starts anew: each fetch adds a pack, and every look-up asks them all.
const MAX_PACKS: usize = 40;

impl Cache {
    /// Makes room before something is added for `slot`, whose turn the caller has; `next` is in its mirror and
    /// stays. A base in use stays, and of a mirror what belongs to one; that alone can be too much.
    ///
    /// # Errors
    /// `Full` when others' work holds so much that nothing may be added. A repository alone on the node is never
    /// refused so, however small the cap.
    pub fn make_room(&self, slot: &Slot, next: Option<Oid>, budget: &Budget) -> Result<(), Error> {
        let cap = self.options.cache_bytes;
        self.trim();
        if self.bytes() < cap {
            return Ok(());
        }
        self.shrink_if_due(slot, next, budget)?;
        let others: Vec<Arc<Slot>> =
            lock(&self.slots).values().filter(|s| s.dir != slot.dir).cloned().collect();
        for other in others {
            if self.bytes() < cap {
                break;
            }
            // Never waited for: whoever has the turn may be waiting for ours.
            if let Ok(_turn) = other.turn.clone().try_lock_owned() {
                self.shrink_if_due(&other, None, budget)?;
            }
        }
        let left = self.bytes();
        if left < cap || left == slot.mirror_bytes.load(Relaxed) {
            return Ok(());
        }
        Err(Error::Full { cap })
    }

    /// Starts a mirror anew that has gathered too many packs.
    pub fn thin_out(&self, slot: &Slot, budget: &Budget) -> Result<(), Error> {
        let mirror = slot.mirror()?;
        let packs = mirror.packs();
        if packs >= MAX_PACKS && !slot.in_use() {
            self.drop_mirror(slot)
        } else if packs >= MAX_PACKS && packs.is_multiple_of(MAX_PACKS) {
            // Larger, too, if need be: here it is about their number.
            self.shrink(slot, &slot.built(None), mirror.bytes().saturating_mul(2), budget)
        } else {
            Ok(())
        }
    }

    /// Shrinks the slot's mirror to what its bases need, if enough has come in since the last time to pay for it.
    fn shrink_if_due(&self, slot: &Slot, next: Option<Oid>, budget: &Budget) -> Result<(), Error> {
        let (now, lean) = (slot.mirror_bytes.load(Relaxed), slot.lean_bytes.load(Relaxed));
        let keep = slot.built(next);
        match keep.is_empty() {
            true if now > 0 => self.drop_mirror(slot),
            false if now > lean.saturating_add(lean / 2) => self.shrink(slot, &keep, now, budget),
            _ => Ok(()),
        }
    }

    /// Puts a new mirror with these commits alone in the place of the old one, if it takes less than `most` bytes.
    fn shrink(&self, slot: &Slot, keep: &[Oid], most: u64, budget: &Budget) -> Result<(), Error> {
        let old = slot.mirror()?;
        let made = Temporary::new(self)?;
        let path = made.path.join("mirror");
        let new = Mirror::open(&path)?;
        match lean::copy(&old, &new, keep, most, &self.options.limits, budget) {
            Ok(true) => {}
            Ok(false) => {
                slot.lean_bytes.store(old.bytes(), Relaxed);
                return Ok(());
            }
            // The caller's own end, not the mirror's.
            Err(e @ (Error::Cancelled | Error::Timeout { .. })) => return Err(e),
            Err(e) => {
                tracing::warn!(error = %e, mirror = %slot.dir.display(), "a mirror could not be made smaller");
                slot.lean_bytes.store(old.bytes(), Relaxed);
                return Ok(());
            }
        }
        let bytes = new.bytes();
        self.discard(&slot.dir.join("mirror"))?;
        fs::rename(&path, slot.dir.join("mirror")).map_err(Error::host("put a mirror in its place"))?;
        slot.lean_bytes.store(bytes, Relaxed);
        slot.mirror_bytes.store(bytes, Relaxed);
        Ok(())
    }

    /// Lets go of all that is here of a repository whose server took it back. What a job holds stays until it ends. The
    /// caller has the turn.
    pub fn withdraw(&self, slot: &Slot) -> Result<(), Error> {
        lock(&slot.grants).clear();
        let unused: Vec<Oid> = {
            let bases = lock(&slot.bases);
            bases.iter().filter(|(_, k)| k.live.strong_count() == 0).map(|(id, _)| *id).collect()
        };
        for id in unused {
            self.drop_base(slot, id)?;
        }
        if slot.in_use() {
            return slot.set_withdrawn(true);
        }
        self.drop_mirror(slot)?;
        slot.set_withdrawn(false)
    }

    /// Lets go of one commit that the server no longer gives. The caller has the turn.
    pub fn forget(&self, slot: &Slot, commit: Oid) -> Result<(), Error> {
        lock(&slot.grants).retain(|(_, id), _| *id != commit);
        self.drop_base(slot, commit)?;
        if lock(&slot.bases).contains_key(&commit) {
            // A job at work still needs its objects.
            return Ok(());
        }
        slot.unpin(commit);
        Ok(())
    }

    /// Lets go of what was taken back while jobs held it, once they have ended.
    fn drop_withdrawn(&self) {
        let taken_back: Vec<Arc<Slot>> =
            lock(&self.slots).values().filter(|s| s.withdrawn.load(Relaxed)).cloned().collect();
        for slot in taken_back {
            if let Ok(_turn) = slot.turn.clone().try_lock_owned()
                && slot.withdrawn.load(Relaxed)
                && let Err(e) = self.withdraw(&slot)
            {
                tracing::warn!(error = %e, folder = %slot.dir.display(), "what a server took back is still here");
            }
        }
    }

    /// Removes a base unless somebody holds it.
    fn drop_base(&self, slot: &Slot, id: Oid) -> Result<(), Error> {
        let mut bases = lock(&slot.bases);
        // Looked at under its lock: nobody can take it from here on.
        if bases.get(&id).is_none_or(|k| k.live.strong_count() > 0) {
            return Ok(());
        }
        self.discard(&slot.base_dir(id))?;
        bases.remove(&id);
        Ok(())
    }

    fn drop_mirror(&self, slot: &Slot) -> Result<(), Error> {
        if slot.dir.join("mirror").exists() {
            self.discard(&slot.dir.join("mirror"))?;
        }
        slot.mirror_bytes.store(0, Relaxed);
        slot.lean_bytes.store(0, Relaxed);
        slot.mirror().map(|_| ())
    }

    /// Removes what was used least lately and is not in use, until the cache is under its cap.
    pub fn trim(&self) {
        self.drop_withdrawn();
        while self.bytes() >= self.options.cache_bytes {
            match self.evict_one() {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => {
                    tracing::warn!(error = %e, "the repository cache could not be trimmed");
                    return;
                }
            }
        }
    }

    /// Evicts the oldest base, or a mirror without bases; `false` if everything is in use.
    fn evict_one(&self) -> Result<bool, Error> {
        let mut slots = lock(&self.slots);
        let oldest_base = slots
            .values()
            .filter_map(|s| s.oldest().map(|(used, id)| (used, id, s.clone())))
            .min_by_key(|c| c.0);
        let oldest_mirror = slots
            .iter()
            .filter(|(_, s)| Arc::strong_count(s) == 1 && lock(&s.bases).is_empty())
            .map(|(name, s)| (s.used.load(Relaxed), name.clone()))
            .min();
        match (oldest_base, oldest_mirror) {
            (Some((base_used, ..)), Some((used, name))) if used < base_used => {
                self.drop_slot(&mut slots, &name)
            }
            (Some((_, id, slot)), _) => self.drop_base(&slot, id).map(|()| true),
            (None, Some((_, name))) => self.drop_slot(&mut slots, &name),
            (None, None) => Ok(false),
        }
    }

    fn drop_slot(&self, slots: &mut HashMap<String, Arc<Slot>>, name: &str) -> Result<bool, Error> {
        if let Some(slot) = slots.remove(name)
            && slot.dir.exists()
        {
            self.discard(&slot.dir)?;
        }
        Ok(true)
    }
}

impl Slot {
    /// The commits whose bases stand here, and `next`.
    fn built(&self, next: Option<Oid>) -> Vec<Oid> {
        let mut commits: Vec<Oid> = lock(&self.bases).keys().copied().chain(next).collect();
        commits.sort_unstable();
        commits.dedup();
        commits
    }
}
