//! What customers owe, and for how long: read from the entries of the log. What is paid pays the oldest debt first. Holds
//! of open jobs are no debt yet.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use serde::Serialize;

use super::report::TRANSFER;
use crate::store::money::Transfer;
use crate::store::record::Record;
use crate::store::{self, DAY_MS, Entry};

/// Ends of the first ages, in days; the last age has none.
pub const AGES_DAYS: [u64; 3] = [7, 30, 90];

/// One customer's debt, msat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Receivable {
    pub customer: String,
    pub owed_msat: u64,
    /// Unix milliseconds of the oldest part.
    pub since_ms: u64,
    /// The same, by age: up to 7, 30 and 90 days, and older.
    pub by_age_msat: [u64; 4],
}

/// What is owed as of `now_ms`, the oldest first. Blocks.
///
/// # Errors
/// The store's, as for any reading.
pub fn receivables(data_dir: &Path, now_ms: u64) -> Result<Vec<Receivable>, store::Error> {
    let mut books = Books::default();
    let mut visit = |entry: Entry| {
        if let Record::Transfer(transfer) = &entry.record {
            books.take_in(entry.seq, entry.at_ms, transfer);
        }
        Ok::<_, store::Error>(())
    };
    store::between(data_dir, 0, u64::MAX, TRANSFER, &mut visit)?;
    books.end_entry();
    let debts = books.customers.into_iter().filter(|(_, of)| !of.debts.is_empty());
    let mut all: Vec<_> = debts.map(|(customer, of)| of.receivable(customer, now_ms)).collect();
    all.sort_by_key(|receivable| receivable.since_ms);
    Ok(all)
}

#[derive(Default)]
struct Books {
    customers: BTreeMap<String, Customer>,
    /// The entry that is being read, its time, and what it does to each customer: its transfers are made together.
    entry: (u64, u64),
    nets: BTreeMap<String, i128>,
}

#[derive(Default)]
struct Customer {
    /// Above zero it owes us.
    balance_msat: i128,
    /// Unix milliseconds and msat, the oldest first.
    debts: VecDeque<(u64, i128)>,
}

impl Books {
    fn take_in(&mut self, seq: u64, at_ms: u64, transfer: &Transfer) {
        if seq != self.entry.0 {
            self.end_entry();
            self.entry = (seq, at_ms);
        }
        for (account, net) in transfer.nets() {
            if let Some(customer) = account.customer() {
                *self.nets.entry(customer.to_owned()).or_default() += net;
            }
        }
    }

    fn end_entry(&mut self) {
        let at_ms = self.entry.1;
        for (customer, net) in std::mem::take(&mut self.nets) {
            self.customers.entry(customer).or_default().change(at_ms, net);
        }
    }
}

impl Customer {
    fn change(&mut self, at_ms: u64, net: i128) {
        let owed = self.balance_msat.max(0);
        self.balance_msat += net;
        let more = self.balance_msat.max(0) - owed;
        if more > 0 {
            self.debts.push_back((at_ms, more));
        }
        let mut paid = -more;
        while paid > 0 {
            let Some((_, debt)) = self.debts.front_mut() else { return };
            let part = paid.min(*debt);
            (*debt, paid) = (*debt - part, paid - part);
            if *debt == 0 {
                self.debts.pop_front();
            }
        }
    }

    fn receivable(self, customer: String, now_ms: u64) -> Receivable {
        let since_ms = self.debts.front().map_or(now_ms, |(at_ms, _)| *at_ms);
        let (mut owed_msat, mut by_age_msat) = (0_u64, [0_u64; 4]);
        for (at_ms, msat) in self.debts {
            let msat = u64::try_from(msat).unwrap_or(u64::MAX);
            let days = now_ms.saturating_sub(at_ms) / DAY_MS;
            let age = AGES_DAYS.iter().take_while(|end| days >= **end).count();
            owed_msat = owed_msat.saturating_add(msat);
            if let Some(sum) = by_age_msat.get_mut(age) {
                *sum = sum.saturating_add(msat);
            }
        }
        Receivable { customer, owed_msat, since_ms, by_age_msat }
    }
}
