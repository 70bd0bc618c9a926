//! Checking the books from the entries alone: every rule that was asked when a transfer was made is asked again, every
//! signed head is held against the chain, and the balances that come out against the index.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::rules::{self, Past};
use super::{Broken, Error, Seal};
use crate::store::money::{Account, Transfer, Why};
use crate::store::record::Record;
use crate::store::{self, Entry, Head, OpenHold, Store};

/// What was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verified {
    pub head: Head,
    pub transfers: u64,
    pub accounts: usize,
    pub open_holds: usize,
    /// Heads that the node has signed.
    pub seals: u64,
    /// The last of them.
    pub last_seal: Option<Seal>,
    /// Msat of all accounts together: 0.
    pub sum_msat: i128,
    /// Keys that have opened the log.
    #[serde(skip)]
    pub nodes: Vec<String>,
}

/// Holds a checked log against a head that was noted before, with who signed it where it is signed. Blocks.
///
/// # Errors
/// When the log is shorter than it was then, or that entry is another one.
pub fn verify_against(
    data_dir: &Path,
    checked: &Verified,
    noted: &Head,
    by: Option<&str>,
) -> Result<(), Broken> {
    if let Some(by) = by.filter(|by| !checked.nodes.iter().any(|node| node == by)) {
        return Err(Broken::OtherSigner { by: by.to_owned() });
    }
    if noted.seq > checked.head.seq {
        let (promised, found) = (noted.seq, checked.head.seq);
        return Err(store::Error::Shortened { dir: data_dir.to_path_buf(), promised, found }.into());
    }
    let same = if noted.seq == checked.head.seq {
        noted.hash == checked.head.hash
    } else {
        store::hash_of(data_dir, noted.seq)?.is_some_and(|hash| hash == noted.hash)
    };
    if same { Ok(()) } else { Err(Broken::OtherHead { seq: noted.seq }) }
}

/// Checks log, chain and books of a store from the first entry to its present head. Blocks.
///
/// # Errors
/// The first entry that is not as it was written, or that breaks a rule.
pub fn verify(store: &Store) -> Result<Verified, Broken> {
    let mut books = Books::default();
    let head = store.verify_with(&mut |entry: Entry| books.take_in(entry))?;
    books.check_locks()?;
    books.check_seals(store.dir())?;
    for (account, indexed_msat) in store.balances()? {
        let entries_msat = books.balances.get(&account).copied().unwrap_or_default();
        // A node that runs has gone on since.
        if indexed_msat != entries_msat && store.head().seq == head.seq {
            return Err(Broken::Index { account: account.to_string(), indexed_msat, entries_msat });
        }
    }
    Ok(books.verified(head))
}

/// As [`verify`], from the log of a data folder alone, whether a node runs on it or not. Blocks.
///
/// # Errors
/// As [`verify`].
pub fn verify_log(data_dir: &Path) -> Result<Verified, Broken> {
    let mut books = Books::default();
    let head = store::verify_log(data_dir, &mut |entry: Entry| books.take_in(entry))?;
    books.check_locks()?;
    books.check_seals(data_dir)?;
    Ok(books.verified(head))
}

/// The books as the entries make them.
#[derive(Default)]
struct Books {
    balances: HashMap<Account, i128>,
    holds: HashMap<String, OpenHold>,
    /// Half of the hash of each id: a million of them must fit.
    ids: HashSet<[u8; 16]>,
    /// Bodies that a later entry may ask for.
    asked_for: HashMap<String, Transfer>,
    nodes: Vec<String>,
    /// Each with its own entry's number.
    seals: Vec<(u64, Seal)>,
    count: u64,
}

impl Books {
    fn check_locks(&self) -> Result<(), Broken> {
        for transfer in self.asked_for.values() {
            if let Why::Locked { job, payment_hash, .. } = &transfer.why
                && !self.holds.contains_key(job)
            {
                return Err(Broken::Lock { payment_hash: payment_hash.clone(), job: job.clone() });
            }
        }
        Ok(())
    }

    fn check_seals(&self, data_dir: &Path) -> Result<(), Broken> {
        for (seq, Seal { head, by, .. }) in &self.seals {
            let node = self.nodes.contains(by);
            let hash = store::hash_of(data_dir, head.seq)?;
            if !node || hash.as_deref() != Some(head.hash.as_str()) {
                return Err(Broken::Seal { seq: *seq, of: head.seq });
            }
        }
        Ok(())
    }

    fn verified(mut self, head: Head) -> Verified {
        Verified {
            transfers: self.count,
            accounts: self.balances.len(),
            open_holds: self.holds.len(),
            seals: self.seals.len() as u64,
            last_seal: self.seals.pop().map(|(_, seal)| seal),
            sum_msat: self.balances.values().sum(),
            nodes: self.nodes,
            head,
        }
    }

    fn take_in(&mut self, entry: Entry) -> Result<(), Broken> {
        let seq = entry.seq;
        match entry.record {
            Record::Opened { node, .. } if !self.nodes.contains(&node) => {
                self.nodes.push(node);
                Ok(())
            }
            Record::Transfer(transfer) => {
                self.transfer(transfer).map_err(|source| Broken::Entry { seq, source })
            }
            Record::Sealed { seq: of, event } => {
                self.seals.push((seq, Seal::read(of, &event).ok_or(Broken::Seal { seq, of })?));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn transfer(&mut self, transfer: Transfer) -> Result<(), Error> {
        if self.ids.contains(&short(&transfer.id)) {
            return Err(Error::Conflict { id: transfer.id });
        }
        rules::allow(self, &transfer)?;
        for (account, net) in transfer.nets() {
            match self.balances.get_mut(account) {
                Some(msat) => *msat += net,
                None => drop(self.balances.insert(account.clone(), net)),
            }
        }
        match rules::hold_after(&transfer) {
            Some((job, Some(hold))) => drop(self.holds.insert(job.to_owned(), hold)),
            Some((job, None)) => drop(self.holds.remove(job)),
            None => {}
        }
        self.ids.insert(short(&transfer.id));
        self.count += 1;
        if let Why::Unlocked { payment_hash, .. } = &transfer.why {
            // It goes once.
            self.asked_for.remove(&super::transfer::locked_id(payment_hash));
        }
        if rules::may_be_asked_for(&transfer) {
            self.asked_for.insert(transfer.id.clone(), transfer);
        }
        Ok(())
    }
}

fn short(id: &str) -> [u8; 16] {
    let hash: [u8; 32] = Sha256::digest(id.as_bytes()).into();
    let mut short = [0; 16];
    short.copy_from_slice(&hash[..16]);
    short
}

impl Past for Books {
    fn balance(&self, account: &Account) -> Result<i128, Error> {
        Ok(self.balances.get(account).copied().unwrap_or_default())
    }

    fn hold(&self, job: &str) -> Result<Option<OpenHold>, Error> {
        Ok(self.holds.get(job).cloned())
    }

    fn transfer(&self, id: &str) -> Result<Option<Transfer>, Error> {
        Ok(self.asked_for.get(id).cloned())
    }

    fn was_made(&self, id: &str) -> Result<bool, Error> {
        Ok(self.ids.contains(&short(id)))
    }
}
