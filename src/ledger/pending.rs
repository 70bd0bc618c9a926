//! What is judged and on its way to the disk, kept until it arrives; and what the next judgement is likely to ask, so that
//! it need not ask the store. The rules themselves are `rules.rs`'s, the lock over all this is the ledger's.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use super::rules::{Past, allow, allow_new, hold_after};
use super::{Budgets, Error};
use crate::store::money::{Account, NODE, Transfer};
use crate::store::record::Record;
use crate::store::{OpenHold, Store};

/// What is judged and on its way to the disk, over what the store has. Each value is known here until the last batch
/// that touches it has arrived; then the store has it. Balances and open holds stay known for a while, so that whoever
/// is about to spend asks no disk.
#[derive(Default)]
pub(super) struct Pending {
    balances: Known<Account, i128>,
    holds: Known<String, Option<OpenHold>>,
    transfers: HashMap<String, Arc<Transfer>>,
    ways: HashMap<u64, Plan>,
    next: u64,
    /// What quotes count on, by job.
    promises: HashMap<String, Promise>,
}

/// What a quote that may still be paid counts on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promise {
    pub customer: String,
    /// What its job may cost, against the customer's budget.
    pub most_msat: u64,
    /// The part of it that the customer's credit covers.
    pub credit_msat: u64,
}

/// Values, each with the number of batches on their way that touch it.
struct Known<K, V> {
    values: HashMap<K, (V, usize)>,
    /// How many of them none touches.
    idle: usize,
}

/// Values that are kept although no batch is on its way that touches them: a few hundred bytes each.
const KNOWN: usize = 4_096;

/// What one batch makes of what it touches: a few of each.
#[derive(Default)]
pub(super) struct Plan {
    balances: Vec<(Account, i128)>,
    holds: Vec<(String, Option<OpenHold>)>,
    transfers: Vec<Arc<Transfer>>,
}

pub(super) enum Judged {
    New(Plan),
    /// Made before, in this entry.
    Again(u64),
    /// Made before, and on its way to the disk.
    OnItsWay,
}

impl Pending {
    /// Judges the transfers of a batch in order, each after the ones before it.
    pub(super) fn judge(&self, store: &Store, records: &[Record]) -> Result<Judged, Error> {
        let transfers = || records.iter().filter_map(transfer_of);
        let (mut made, mut made_in) = (0, None);
        for transfer in transfers() {
            let (seq, same) = match self.transfers.get(&transfer.id) {
                Some(first) => (None, **first == *transfer),
                None => match store.transfer_now(&transfer.id)? {
                    Some(posted) => (Some(posted.seq), posted.transfer == *transfer),
                    None => continue,
                },
            };
            if !same {
                return Err(Error::Conflict { id: transfer.id.clone() });
            }
            (made, made_in) = (made + 1, Some(seq));
        }
        match made_in {
            Some(seq) if made == transfers().count() => {
                return Ok(seq.map_or(Judged::OnItsWay, Judged::Again));
            }
            // Half of it was made before: not the same batch.
            Some(_) => {
                let id = transfers().map(|t| t.id.clone()).collect::<Vec<_>>().join(" + ");
                return Err(Error::Conflict { id });
            }
            None => {}
        }
        let mut draft = Draft { store, pending: self, plan: Plan::default() };
        for transfer in transfers() {
            if draft.plan.transfers.iter().any(|first| first.id == transfer.id) {
                return Err(Error::Conflict { id: transfer.id.clone() });
            }
            allow(&draft, transfer)?;
            allow_new(&draft, transfer)?;
            draft.take_in(transfer)?;
        }
        Ok(Judged::New(draft.plan))
    }

    /// Sets aside what a quote for this job counts on; returns what is missing, msat. Nothing is set aside when nothing
    /// is missing.
    pub(super) fn promise(
        &mut self,
        store: &Store,
        (job, customer): (&str, &str),
        (most_msat, line_msat): (u64, u64),
        (budgets, now_ms): (&Budgets, u64),
    ) -> Result<u64, Error> {
        self.promises.remove(job);
        self.keeps_to(store, (job, customer, most_msat), budgets, now_ms)?;
        let credit = -self.balance(store, &Account::Credit(customer.to_owned()))?;
        let available = credit + i128::from(line_msat) - i128::from(self.promised_msat(customer, job));
        let missing_msat = u64::try_from((i128::from(most_msat) - available).max(0)).unwrap_or(most_msat);
        if missing_msat > 0 {
            let credit_msat = most_msat.saturating_sub(missing_msat);
            self.promised(job, Promise { customer: customer.to_owned(), most_msat, credit_msat });
        }
        Ok(missing_msat)
    }

    pub(super) fn promised(&mut self, job: &str, promise: Promise) {
        self.promises.insert(job.to_owned(), promise);
    }

    /// The quote was paid, or does not count any more.
    pub(super) fn forget(&mut self, job: &str) {
        self.promises.remove(job);
    }

    fn promises_to<'a>(&'a self, customer: &'a str, job: &'a str) -> impl Iterator<Item = &'a Promise> {
        let others = self.promises.iter().filter(move |(other, _)| *other != job);
        others.map(|(_, promise)| promise).filter(move |promise| promise.customer == customer)
    }

    fn promised_msat(&self, customer: &str, job: &str) -> u64 {
        self.promises_to(customer, job).map(|promise| promise.credit_msat).fold(0, u64::saturating_add)
    }

    /// Whether the holds of a batch keep to the budgets. What was quoted was held against them then.
    pub(super) fn within(
        &self,
        store: &Store,
        records: &[Record],
        budgets: &Budgets,
        now_ms: u64,
    ) -> Result<(), Error> {
        if *budgets == Budgets::default() {
            return Ok(());
        }
        let holds = records.iter().filter_map(transfer_of).filter_map(hold_after);
        for hold in holds.filter_map(|(_, hold)| hold) {
            if !self.promises.contains_key(&hold.job) {
                self.keeps_to(store, (&hold.job, &hold.customer, hold.msat), budgets, now_ms)?;
            }
        }
        Ok(())
    }

    /// Whether a hold of so many msat for this job keeps to the budgets, beside what is held and promised.
    fn keeps_to(
        &self,
        store: &Store,
        (job, customer, msat): (&str, &str, u64),
        budgets: &Budgets,
        now_ms: u64,
    ) -> Result<(), Error> {
        if *budgets == Budgets::default() {
            return Ok(());
        }
        let held = -self.balance(store, &Account::Held(customer.to_owned()))?;
        let promised = self.promises_to(customer, job).map(|promise| promise.most_msat);
        let held = promised.fold(u64::try_from(held).unwrap_or_default(), u64::saturating_add);
        let held = held.saturating_add(msat);
        let own = [(1, budgets.customer_day_msat), (7, budgets.customer_week_msat)];
        let node = [(1, budgets.node_day_msat), (7, budgets.node_week_msat)];
        let all = own.map(|bound| (customer, held, bound));
        // What a job will cost the node is not known before: it may begin while anything is left.
        for (whose, more, (days, budget_msat)) in all.into_iter().chain(node.map(|bound| (NODE, 1, bound))) {
            if budget_msat == 0 {
                continue;
            }
            let on_their_way = self.transfers.values().filter_map(|transfer| transfer.spends());
            let coming = on_their_way.filter(|(who, _)| *who == whose).map(|(_, msat)| msat).sum();
            let spent = store.spent(whose, now_ms, days)?;
            let would_msat = spent.saturating_add(coming).saturating_add(more);
            if would_msat > budget_msat {
                return Err(Error::OverBudget { whose: whose.to_owned(), days, budget_msat, would_msat });
            }
        }
        Ok(())
    }

    /// A batch is on its way.
    pub(super) fn begin(&mut self, plan: Plan) -> u64 {
        for (account, msat) in &plan.balances {
            self.balances.begin(account, *msat);
        }
        for (job, hold) in &plan.holds {
            // From here on the hold counts, not the promise.
            self.promises.remove(job);
            self.holds.begin(job, hold.clone());
        }
        for transfer in &plan.transfers {
            self.transfers.insert(transfer.id.clone(), Arc::clone(transfer));
        }
        self.next += 1;
        self.ways.insert(self.next, plan);
        self.next
    }

    /// It has arrived, or will not; then the store takes nothing any more, and what is left here does not matter.
    pub(super) fn end(&mut self, way: u64) {
        let Some(plan) = self.ways.remove(&way) else { return };
        for (account, _) in &plan.balances {
            self.balances.end(account, |_| true);
        }
        for (job, _) in &plan.holds {
            self.holds.end(job, Option::is_some);
        }
        for transfer in &plan.transfers {
            self.transfers.remove(&transfer.id);
        }
    }

    #[cfg(test)]
    pub(super) fn is_small(&self) -> bool {
        let touched =
            self.balances.values.len() - self.balances.idle + self.holds.values.len() - self.holds.idle;
        touched + self.transfers.len() + self.ways.len() <= 8
    }

    pub(super) fn balance(&self, store: &Store, account: &Account) -> Result<i128, Error> {
        match self.balances.get(account) {
            Some(msat) => Ok(*msat),
            None => Ok(store.balance_now(account)?),
        }
    }

    pub(super) fn hold(&self, store: &Store, job: &str) -> Result<Option<OpenHold>, Error> {
        match self.holds.get(job) {
            Some(hold) => Ok(hold.clone()),
            None => Ok(store.hold_now(job)?),
        }
    }
}

impl<K: Hash + Eq + Clone, V> Known<K, V> {
    fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.values.get(key).map(|(value, _)| value)
    }

    fn begin(&mut self, key: &K, value: V) {
        let Some((known, ways)) = self.values.get_mut(key) else {
            self.values.insert(key.clone(), (value, 1));
            return;
        };
        self.idle -= usize::from(*ways == 0);
        (*known, *ways) = (value, *ways + 1);
    }

    /// One batch less touches it; after the last one it is kept if that is of use.
    fn end(&mut self, key: &K, of_use: impl FnOnce(&V) -> bool) {
        let Some((value, ways)) = self.values.get_mut(key) else { return };
        *ways -= 1;
        if *ways > 0 {
            return;
        }
        if of_use(value) {
            self.idle += 1;
        } else {
            self.values.remove(key);
        }
        if self.idle > KNOWN {
            self.values.retain(|_, (_, ways)| *ways > 0);
            self.idle = 0;
        }
    }
}

impl<K, V> Default for Known<K, V> {
    fn default() -> Self {
        Known { values: HashMap::new(), idle: 0 }
    }
}

fn transfer_of(record: &Record) -> Option<&Transfer> {
    match record {
        Record::Transfer(transfer) => Some(transfer),
        _ => None,
    }
}

/// A batch being judged, over what is on its way, over the store.
struct Draft<'a> {
    store: &'a Store,
    pending: &'a Pending,
    plan: Plan,
}

impl Draft<'_> {
    fn take_in(&mut self, transfer: &Transfer) -> Result<(), Error> {
        for (account, net) in transfer.nets() {
            let msat = self.balance(account)? + net;
            if i64::try_from(msat).is_err() {
                return Err(Error::OutOfBounds { account: account.to_string(), would_msat: msat });
            }
            match self.plan.balances.iter_mut().find(|(known, _)| known == account) {
                Some((_, known)) => *known = msat,
                None => self.plan.balances.push((account.clone(), msat)),
            }
        }
        if let Some((job, hold)) = hold_after(transfer) {
            match self.plan.holds.iter_mut().find(|(known, _)| known == job) {
                Some((_, known)) => *known = hold,
                None => self.plan.holds.push((job.to_owned(), hold)),
            }
        }
        self.plan.transfers.push(Arc::new(transfer.clone()));
        Ok(())
    }
}

impl Past for Draft<'_> {
    fn promised_msat(&self, customer: &str, job: &str) -> u64 {
        self.pending.promised_msat(customer, job)
    }

    fn balance(&self, account: &Account) -> Result<i128, Error> {
        match self.plan.balances.iter().find(|(known, _)| known == account) {
            Some((_, msat)) => Ok(*msat),
            None => self.pending.balance(self.store, account),
        }
    }

    fn hold(&self, job: &str) -> Result<Option<OpenHold>, Error> {
        match self.plan.holds.iter().find(|(known, _)| known == job) {
            Some((_, hold)) => Ok(hold.clone()),
            None => self.pending.hold(self.store, job),
        }
    }

    fn transfer(&self, id: &str) -> Result<Option<Transfer>, Error> {
        let here = self.plan.transfers.iter().find(|transfer| transfer.id == id);
        if let Some(transfer) = here.or_else(|| self.pending.transfers.get(id)) {
            return Ok(Some(Transfer::clone(transfer)));
        }
        Ok(self.store.transfer_now(id)?.map(|posted| posted.transfer))
    }
}
