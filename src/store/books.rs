//! What records of money do to the index: balances, open holds, quotes, and invoices that are watched. Whether a
//! transfer may be made was judged before it was written, by `ledger`; here the first
//! transfer of an id counts, and a second changes nothing.

use std::fmt::{self, Write};

use serde::Serialize;

use super::Error;
use super::keys::{Bytes, Place, key, later, short};
use super::money::{Account, Transfer, Why};
use super::record::{EventId, Invoice, PublicKey};
use super::shelf::{Slots, Tree};

/// A hold that is neither captured nor void.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OpenHold {
    pub job: EventId,
    pub customer: PublicKey,
    pub msat: u64,
    /// Unix milliseconds.
    pub expires_ms: u64,
}

/// Where an invoice stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum InvoiceState {
    /// Watched.
    Open,
    Paid,
    /// Given up unpaid; a payment that comes after all still counts.
    Closed,
}

pub(super) fn account_key(account: &Account) -> Vec<u8> {
    let mut key = String::with_capacity(ACCOUNT_BYTES);
    // A string takes all that there is memory for.
    let _taken: fmt::Result = write!(key, "{account}");
    key.into_bytes()
}

/// Bytes of most accounts' names: a word and a key.
const ACCOUNT_BYTES: usize = 80;

/// The job that a transfer belongs to.
pub(super) fn job_of(transfer: &Transfer) -> Option<&str> {
    match &transfer.why {
        Why::Hold { job, .. } | Why::Capture { job } | Why::Void { job, .. } | Why::Cost { job, .. } => {
            Some(job)
        }
        Why::Locked { job, .. } | Why::Unlocked { job, .. } => Some(job),
        _ => None,
    }
}

pub(super) fn take_in(slots: &dyn Slots, place: Place, at_ms: u64, transfer: &Transfer) -> Result<(), Error> {
    let id = short(&transfer.id);
    if slots.get(Tree::Transfers, &id)?.is_some() {
        return Ok(());
    }
    let mut at = Vec::with_capacity(14);
    place.write(&mut at);
    slots.put(Tree::Transfers, &id, &at)?;
    for (account, net) in transfer.nets() {
        let account = account_key(account);
        let balance = balance(slots.get(Tree::Balances, &account)?.as_deref())?;
        let balance =
            balance.checked_add(net).ok_or_else(|| Error::Index { why: "a balance overflows".into() })?;
        slots.put(Tree::Balances, &account, &balance.to_be_bytes())?;
    }
    if let Some(customer) = transfer.customer() {
        slots.put(Tree::Postings, &later(customer, place), &[])?;
    }
    if let Some((whose, msat)) = transfer.spends() {
        let day = spent_key(whose, at_ms / DAY_MS);
        let spent = match slots.get(Tree::Spent, &day)? {
            Some(stored) => Bytes(&stored).u64()?,
            None => 0,
        };
        slots.put(Tree::Spent, &day, &spent.saturating_add(msat).to_be_bytes())?;
    }
    match &transfer.why {
        Why::Hold { job, expires_ms, .. } => {
            let Some(customer) = transfer.customer() else { return Ok(()) };
            let held = -transfer.net_msat(&Account::Held(customer.to_owned()));
            let mut value = expires_ms.to_be_bytes().to_vec();
            value.extend_from_slice(&u64::try_from(held).unwrap_or_default().to_be_bytes());
            value.extend_from_slice(&key(customer));
            slots.put(Tree::Holds, &key(job), &value)
        }
        Why::Capture { job } | Why::Void { job, .. } => slots.remove(Tree::Holds, &key(job)),
        Why::RefundBegun { payment_hash, .. } => slots.put(Tree::Refunds, &key(payment_hash), &at),
        Why::RefundPaid { payment_hash, .. } | Why::RefundFailed { payment_hash, .. } => {
            slots.remove(Tree::Refunds, &key(payment_hash))
        }
        Why::Paid { payment_hash, .. } => close_invoice(slots, payment_hash, InvoiceState::Paid),
        _ => Ok(()),
    }
}

/// Milliseconds of a day, and the day's number since 1970: UTC.
pub const DAY_MS: u64 = 86_400_000;

pub(super) fn spent_key(whose: &str, day: u64) -> Vec<u8> {
    let mut key = short(whose).to_vec();
    key.extend_from_slice(&day.to_be_bytes());
    key
}

pub(super) fn free_jobs_key(customer: &str, skill: &str, at_ms: u64) -> Vec<u8> {
    let mut key = spent_key(customer, at_ms / DAY_MS);
    key.extend_from_slice(&short(skill));
    key
}

/// One more free job of this customer.
pub(super) fn free_job(slots: &dyn Slots, customer: &str, skill: &str, at_ms: u64) -> Result<(), Error> {
    let key = free_jobs_key(customer, skill, at_ms);
    let begun = match slots.get(Tree::FreeJobs, &key)? {
        Some(stored) => Bytes(&stored).u64()?,
        None => 0,
    };
    slots.put(Tree::FreeJobs, &key, &(begun + 1).to_be_bytes())
}

/// The balance as it is stored; 0 where there is none.
pub(super) fn balance(stored: Option<&[u8]>) -> Result<i128, Error> {
    let Some(bytes) = stored else { return Ok(0) };
    let bytes = bytes.try_into().map_err(|_| Error::Index { why: "a balance is cut short".into() })?;
    Ok(i128::from_be_bytes(bytes))
}

pub(super) fn open_hold(job: &[u8], value: &[u8]) -> Result<OpenHold, Error> {
    let mut value = Bytes(value);
    let (expires_ms, msat) = (value.u64()?, value.u64()?);
    Ok(OpenHold { job: Bytes(job).name()?, customer: value.name()?, msat, expires_ms })
}

pub(super) fn quote(slots: &dyn Slots, place: Place, job: &str) -> Result<(), Error> {
    if slots.get(Tree::Quotes, &key(job))?.is_some() {
        return Ok(());
    }
    let mut at = Vec::with_capacity(14);
    place.write(&mut at);
    slots.put(Tree::Quotes, &key(job), &at)
}

pub(super) fn invoice(slots: &dyn Slots, place: Place, invoice: &Invoice) -> Result<(), Error> {
    let hash = key(&invoice.payment_hash);
    if slots.get(Tree::Invoices, &hash)?.is_some() {
        return Ok(());
    }
    let mut value = Vec::with_capacity(15);
    place.write(&mut value);
    value.push(InvoiceState::Open as u8);
    slots.put(Tree::Invoices, &hash, &value)?;
    slots.put(Tree::Unpaid, &hash, &invoice.expires_ms.to_be_bytes())
}

pub(super) fn close_invoice(slots: &dyn Slots, payment_hash: &str, state: InvoiceState) -> Result<(), Error> {
    let hash = key(payment_hash);
    let Some(mut value) = slots.get(Tree::Invoices, &hash)? else { return Ok(()) };
    if let Some(last) = value.last_mut() {
        // Paid is the last word.
        if *last != InvoiceState::Paid as u8 {
            *last = state as u8;
        }
    }
    slots.put(Tree::Invoices, &hash, &value)?;
    slots.remove(Tree::Unpaid, &hash)
}

/// Place and state of an invoice.
pub(super) fn stored_invoice(value: &[u8]) -> Result<(Place, InvoiceState), Error> {
    let place = Bytes(value).place()?;
    let state = match value.last() {
        Some(1) => InvoiceState::Paid,
        Some(2) => InvoiceState::Closed,
        _ => InvoiceState::Open,
    };
    Ok((place, state))
}
