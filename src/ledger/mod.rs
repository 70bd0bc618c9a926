//! Money as records in the store: which transfers may be made, and what the accounts say. It moves no sats and knows
//! no relay: what a wallet says is handed to it, and what a job costs is `market`'s to say. `docs/ledger.md` has the
//! promises.
//!
//! A transfer is judged and handed to the store's writer under one lock, so the order of the judgements is the order
//! of the log. What is on its way to the disk counts already; what the disk refuses ends the node.

mod error;
pub mod export;
mod pending;
pub mod receivable;
pub mod reconcile;
pub mod report;
mod rules;
mod seal;
pub mod transfer;
mod verify;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::store::money::{Account, Transfer};
use crate::store::record::Record;
use crate::store::{self, OpenHold, Posted, Prepared, Store};

pub use error::{Broken, Error};
pub use seal::{Seal, SealError, last_seal};
pub use verify::{Verified, verify, verify_against, verify_log};

pub use pending::Promise;
use pending::{Judged, Pending};

/// A cheap handle of the books.
#[derive(Clone)]
pub struct Ledger {
    store: Store,
    /// What is judged and on its way to the disk.
    pending: Arc<Mutex<Pending>>,
    /// Ways to the disk that have ended, to be taken out of `pending`. A lock of its own: the store may answer while
    /// `pending` is locked.
    ended: Arc<Mutex<Vec<u64>>>,
    /// Told each time a batch has landed.
    landed: Arc<Notify>,
}

/// How a batch came into the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Committed {
    /// It is durable, as this entry.
    New(u64),
    /// Its transfers were made before, the first of them in this entry; nothing was written now.
    Again(u64),
}

/// What may be spent, msat; 0: without a bound. Days are UTC; a week is seven of them, today with it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Budgets {
    /// A customer's charges and open holds.
    pub customer_day_msat: u64,
    pub customer_week_msat: u64,
    /// What jobs cost the node. A job is not begun once it is used up.
    pub node_day_msat: u64,
    pub node_week_msat: u64,
}

/// What a customer has with us.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Purse {
    /// What it may spend; below zero it owes us.
    pub available_msat: i128,
    /// What open jobs hold.
    pub held_msat: i128,
    /// What is on its way back.
    pub refunding_msat: i128,
}

// === impl Ledger

impl Ledger {
    /// The one ledger of a store: it keeps the balances that it has made, and a second one would judge by older ones.
    pub fn new(store: Store) -> Ledger {
        Ledger { store, pending: Arc::default(), ended: Arc::default(), landed: Arc::default() }
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Judges the transfers of a batch and makes the whole batch durable, or nothing of it. A batch without transfers
    /// goes through as it is.
    ///
    /// # Errors
    /// Why a transfer may not be made, or [`Error::Store`]: then the node must stop, as for any append.
    pub async fn commit(&self, records: Vec<Record>) -> Result<Committed, Error> {
        self.commit_within(records, &Budgets::default(), 0).await
    }

    /// As [`Ledger::commit`]; holds in it must keep to the budgets as of `now_ms`, Unix milliseconds.
    ///
    /// # Errors
    /// [`Error::OverBudget`] as well.
    pub async fn commit_within(
        &self,
        records: Vec<Record>,
        budgets: &Budgets,
        now_ms: u64,
    ) -> Result<Committed, Error> {
        // Its bytes are made before the lock, not under it; and what cannot be written is not judged.
        let mut batch = Some(Prepared::new(records)?);
        loop {
            // Registered before the judgement, so that what lands in between is not missed.
            let landed = self.landed.notified();
            let durable = {
                let mut pending = self.pending();
                let Some(judged) = batch.take() else { return Err(store::Error::Closed.into()) };
                match pending.judge(&self.store, judged.records())? {
                    Judged::Again(seq) => return Ok(Committed::Again(seq)),
                    Judged::OnItsWay => {
                        batch = Some(judged);
                        None
                    }
                    Judged::New(plan) => {
                        pending.within(&self.store, judged.records(), budgets, now_ms)?;
                        let way = pending.begin(plan);
                        let (ended, landed) = (Arc::clone(&self.ended), Arc::clone(&self.landed));
                        let then = Box::new(move |_: &Result<u64, store::Error>| {
                            ended.lock().unwrap_or_else(PoisonError::into_inner).push(way);
                            landed.notify_waiters();
                        });
                        Some(self.store.submit_prepared(judged, then)?)
                    }
                }
            };
            match durable {
                Some(durable) => return Ok(Committed::New(durable.await?)),
                None => landed.await,
            }
        }
    }

    /// Sets aside what a quote for this job counts on: the part of `most_msat` that the customer's credit, with a line
    /// of `line_msat`, covers beside what other quotes count on, and room in the budgets. Returns what is missing, msat;
    /// 0: the job needs no quote, and nothing is set aside. It lasts until the job is held or [`Ledger::forget`], and is
    /// not written down: the quote is.
    ///
    /// # Errors
    /// [`Error::OverBudget`].
    pub fn promise(
        &self,
        (job, customer): (&str, &str),
        (most_msat, line_msat): (u64, u64),
        budgets: &Budgets,
        now_ms: u64,
    ) -> Result<u64, Error> {
        let all = (most_msat, line_msat);
        self.pending().promise(&self.store, (job, customer), all, (budgets, now_ms))
    }

    /// Sets aside what a quote of an earlier life counts on.
    pub fn promise_again(&self, job: &str, promise: Promise) {
        self.pending().promised(job, promise);
    }

    /// A quote that does not count any more.
    pub fn forget(&self, job: &str) {
        self.pending().forget(job);
    }

    /// One transfer alone.
    pub async fn post(&self, transfer: Transfer) -> Result<Committed, Error> {
        self.commit(vec![Record::Transfer(transfer)]).await
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = std::mem::take(&mut *self.ended.lock().unwrap_or_else(PoisonError::into_inner));
        for way in ended {
            pending.end(way);
        }
        pending
    }

    /// Msat of an account, debits less credits, with what is on its way to the disk.
    pub fn balance(&self, account: &Account) -> Result<i128, Error> {
        self.pending().balance(&self.store, account)
    }

    pub fn purse(&self, customer: &str) -> Result<Purse, Error> {
        let pending = self.pending();
        let owed = |account: Account| pending.balance(&self.store, &account).map(|msat| -msat);
        Ok(Purse {
            available_msat: owed(Account::Credit(customer.to_owned()))?,
            held_msat: owed(Account::Held(customer.to_owned()))?,
            refunding_msat: owed(Account::Refunding(customer.to_owned()))?,
        })
    }

    /// The hold of a job that is neither captured nor void.
    pub fn hold(&self, job: &str) -> Result<Option<OpenHold>, Error> {
        self.pending().hold(&self.store, job)
    }

    /// A transfer that is durable.
    pub fn transfer(&self, id: &str) -> Result<Option<Posted>, Error> {
        Ok(self.store.transfer(id)?)
    }
}

#[cfg(test)]
mod tests;
