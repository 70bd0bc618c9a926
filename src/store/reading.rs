//! Reading money and spans of time out of the store: balances, transfers, holds, invoices, quotes, and every record
//! between two moments. What they mean is `ledger`'s.

use std::path::{Path, PathBuf};

use super::books::{self, InvoiceState, OpenHold};
use super::keys::{Bytes, Place, key, short};
use super::log;
use super::money::{Account, NoAccount, Transfer};
use super::record::{Invoice, Record};
use super::rows::{Entry, Head};
use super::shelf::Tree;
use super::view::{Look, View};
use super::{Error, LOG, Store, index, upkeep};
use crate::price::Agreed;

/// A transfer as it stands in the log.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Posted {
    /// Seq of the entry that it is in.
    pub seq: u64,
    /// Unix milliseconds.
    pub at_ms: u64,
    pub transfer: Transfer,
}

/// A request that is to be paid before it is a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quote {
    pub customer: String,
    pub kind: u16,
    pub skill: String,
    /// The request event as JSON, as received.
    pub request: String,
    pub relay: String,
    pub agreed: Agreed,
    pub payment_hash: Option<String>,
    /// Unix milliseconds.
    pub quoted_ms: u64,
    /// Unix milliseconds.
    pub expires_ms: u64,
}

// === impl Store: money

impl Store {
    /// Msat of an account, debits less credits.
    pub fn balance(&self, account: &Account) -> Result<i128, Error> {
        self.inner.view.balance(Look::Whole, account)
    }

    /// As [`Store::balance`], and does not wait for a batch that is being taken in: for who knows what is on its way.
    pub(crate) fn balance_now(&self, account: &Account) -> Result<i128, Error> {
        self.inner.view.balance(Look::Now, account)
    }

    /// Every account that was ever used, with its msat, by name.
    pub fn balances(&self) -> Result<Vec<(Account, i128)>, Error> {
        self.inner.view.balances()
    }

    /// A transfer by its id.
    pub fn transfer(&self, id: &str) -> Result<Option<Posted>, Error> {
        self.inner.view.transfer(Look::Whole, id)
    }

    /// As [`Store::transfer`], and does not wait for a batch that is being taken in.
    pub(crate) fn transfer_now(&self, id: &str) -> Result<Option<Posted>, Error> {
        self.inner.view.transfer(Look::Now, id)
    }

    /// The newest `limit` transfers in a customer's books, newest first.
    pub fn postings(&self, customer: &str, limit: usize) -> Result<Vec<Posted>, Error> {
        self.inner.view.postings(customer, limit)
    }

    /// Msat that `whose` has spent on the `days` UTC days up to and with the one of `now_ms`; see
    /// [`Transfer::spends`].
    pub fn spent(&self, whose: &str, now_ms: u64, days: u64) -> Result<u64, Error> {
        let today = now_ms / books::DAY_MS;
        let first = (today + 1).saturating_sub(days);
        (first..=today).try_fold(0_u64, |sum, day| {
            let stored = self.inner.view.get(Tree::Spent, &books::spent_key(whose, day))?;
            let spent = stored.map_or(Ok(0), |stored| Bytes(&stored).u64())?;
            Ok(sum.saturating_add(spent))
        })
    }

    /// The open hold of a job.
    pub fn hold(&self, job: &str) -> Result<Option<OpenHold>, Error> {
        self.inner.view.hold(Look::Whole, job)
    }

    /// As [`Store::hold`], and does not wait for a batch that is being taken in.
    pub(crate) fn hold_now(&self, job: &str) -> Result<Option<OpenHold>, Error> {
        self.inner.view.hold(Look::Now, job)
    }

    /// All open holds.
    pub fn holds(&self) -> Result<Vec<OpenHold>, Error> {
        self.inner.view.holds()
    }

    /// An invoice of ours by its payment hash.
    pub fn invoice(&self, payment_hash: &str) -> Result<Option<(Invoice, InvoiceState)>, Error> {
        self.inner.view.invoice(payment_hash)
    }

    /// Refunds that have begun and not ended.
    pub fn refunds(&self) -> Result<Vec<Posted>, Error> {
        self.inner.view.refunds()
    }

    /// Invoices that are watched.
    pub fn unpaid(&self) -> Result<Vec<Invoice>, Error> {
        self.inner.view.unpaid()
    }

    /// How many of them may still be paid at this Unix millisecond.
    pub fn unexpired_invoices(&self, now_ms: u64) -> Result<usize, Error> {
        self.inner.view.unexpired(now_ms)
    }

    /// Free jobs of this customer and skill that were accepted on the day (UTC) of `now_ms`.
    pub fn free_jobs(&self, customer: &str, skill: &str, now_ms: u64) -> Result<u64, Error> {
        let key = books::free_jobs_key(customer, skill, now_ms);
        self.inner.view.get(Tree::FreeJobs, &key)?.map_or(Ok(0), |stored| Bytes(&stored).u64())
    }

    /// What a request was quoted.
    pub fn quote(&self, job: &str) -> Result<Option<Quote>, Error> {
        self.inner.view.quote(job)
    }

    /// As [`Store::verify`], and shows every record on the way, oldest first.
    pub fn verify_with<E: From<Error>>(
        &self,
        visit: &mut dyn FnMut(Entry) -> Result<(), E>,
    ) -> Result<Head, E> {
        let position = upkeep::verify_with(&self.inner.dir.join(LOG), Some(self.inner.applied()), visit)?;
        Ok(super::head(&position))
    }

    /// The data folder.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// The entry of the last head that was signed, a [`Record::Sealed`].
    pub fn last_seal(&self) -> Result<Option<Entry>, Error> {
        self.inner.view.last_seal()
    }
}

/// As [`Store::verify_with`], from the log of a data folder alone, whether a node runs on it or not.
pub fn verify_log<E: From<Error>>(
    data_dir: &Path,
    visit: &mut dyn FnMut(Entry) -> Result<(), E>,
) -> Result<Head, E> {
    let position = upkeep::verify_with(&log_dir(data_dir)?, None, visit)?;
    Ok(super::head(&position))
}

/// Lower-case hex of the hash of an entry, read from the one that follows it. `None`: there is none that follows.
pub fn hash_of(data_dir: &Path, seq: u64) -> Result<Option<String>, Error> {
    Ok(log::hash_before(&log_dir(data_dir)?, seq.saturating_add(1))?.map(hex::encode))
}

fn log_dir(data_dir: &Path) -> Result<PathBuf, Error> {
    let dir = data_dir.join(LOG);
    if super::disk::is_folder(&dir)? { Ok(dir) } else { Err(Error::Missing { dir: data_dir.to_path_buf() }) }
}

/// Shows each record written in `[from_ms, to_ms)` to the log of a data folder, oldest first, whether a node runs on it
/// or not. Only batches in which `needle` occurs as text are looked into; an empty one lets all through. Reads the
/// segments that count, not the whole log. Blocks.
///
/// # Errors
/// The visitor's, and the store's as for any reading: also where the log is shorter than it was, or a segment is gone.
pub fn between<E: From<Error>>(
    data_dir: &Path,
    from_ms: u64,
    to_ms: u64,
    needle: &str,
    visit: &mut dyn FnMut(Entry) -> Result<(), E>,
) -> Result<(), E> {
    let dir = log_dir(data_dir)?;
    let promise = upkeep::promise_of(&dir)?;
    let promised = promise.as_ref().map_or(0, |promise| promise.seq);
    let Some(mut walk) = log::Walk::between(&dir, from_ms, to_ms)? else {
        return Ok(index::check_length(&dir, promise.as_ref(), 0)?);
    };
    let finder = memchr::memmem::Finder::new(needle.as_bytes());
    while let Some(met) = walk.next(promised)? {
        if let Some(promise) = &promise {
            promise.check(&dir, met.seq, &met.hash)?;
        }
        if !(from_ms..to_ms).contains(&met.at_ms) || finder.find(met.body).is_none() {
            continue;
        }
        for record in log::records(&dir, &met)? {
            visit(Entry { seq: met.seq, at_ms: met.at_ms, record })?;
        }
    }
    Ok(index::check_length(&dir, promise.as_ref(), walk.seq())?)
}

// === impl View: money

impl View {
    fn balance(&self, look: Look, account: &Account) -> Result<i128, Error> {
        books::balance(self.look(look, Tree::Balances, &books::account_key(account))?.as_deref())
    }

    fn balances(&self) -> Result<Vec<(Account, i128)>, Error> {
        let stored = self.all(Tree::Balances)?;
        let read = |(name, value): (Vec<u8>, Vec<u8>)| {
            let account = String::from_utf8_lossy(&name).parse();
            let account = account.map_err(|e: NoAccount| Error::Index { why: e.to_string() })?;
            Ok((account, books::balance(Some(&value))?))
        };
        stored.into_iter().map(read).collect()
    }

    fn transfer(&self, look: Look, id: &str) -> Result<Option<Posted>, Error> {
        let Some(at) = self.look(look, Tree::Transfers, &short(id))? else { return Ok(None) };
        self.posted(&Bytes(&at).place()?).map(Some)
    }

    fn posted(&self, place: &Place) -> Result<Posted, Error> {
        let Entry { seq, at_ms, record } = self.record(place)?;
        match record {
            Record::Transfer(transfer) => Ok(Posted { seq, at_ms, transfer }),
            _ => Err(strays("a transfer", place)),
        }
    }

    fn postings(&self, customer: &str, limit: usize) -> Result<Vec<Posted>, Error> {
        let prefix = short(customer);
        let keys = self.newest_under(Tree::Postings, &prefix, limit)?;
        let place = |key: &Vec<u8>| Bytes(key.get(prefix.len()..).unwrap_or_default()).place();
        keys.iter().map(|key| self.posted(&place(key)?)).collect()
    }

    fn hold(&self, look: Look, job: &str) -> Result<Option<OpenHold>, Error> {
        let key = key(job);
        self.look(look, Tree::Holds, &key)?.map(|value| books::open_hold(&key, &value)).transpose()
    }

    fn holds(&self) -> Result<Vec<OpenHold>, Error> {
        self.all(Tree::Holds)?.iter().map(|(job, value)| books::open_hold(job, value)).collect()
    }

    fn invoice(&self, payment_hash: &str) -> Result<Option<(Invoice, InvoiceState)>, Error> {
        let Some(value) = self.get(Tree::Invoices, &key(payment_hash))? else { return Ok(None) };
        let (place, state) = books::stored_invoice(&value)?;
        match self.record(&place)?.record {
            Record::Invoiced(invoice) => Ok(Some((invoice, state))),
            _ => Err(strays("an invoice", &place)),
        }
    }

    fn refunds(&self) -> Result<Vec<Posted>, Error> {
        self.all(Tree::Refunds)?.iter().map(|(_, at)| self.posted(&Bytes(at).place()?)).collect()
    }

    fn unpaid(&self) -> Result<Vec<Invoice>, Error> {
        let mut unpaid = Vec::new();
        for (hash, _) in self.all(Tree::Unpaid)? {
            unpaid.extend(self.invoice(&Bytes(&hash).name()?)?.map(|(invoice, _)| invoice));
        }
        Ok(unpaid)
    }

    fn unexpired(&self, now_ms: u64) -> Result<usize, Error> {
        let mut unexpired = 0;
        for (_, expires_ms) in self.all(Tree::Unpaid)? {
            unexpired += usize::from(Bytes(&expires_ms).u64()? > now_ms);
        }
        Ok(unexpired)
    }

    fn quote(&self, job: &str) -> Result<Option<Quote>, Error> {
        let Some(at) = self.get(Tree::Quotes, &key(job))? else { return Ok(None) };
        let place = Bytes(&at).place()?;
        let Entry { at_ms, record, .. } = self.record(&place)?;
        let Record::Quoted {
            customer, kind, skill, request, relay, agreed, payment_hash, expires_ms, ..
        } = record
        else {
            return Err(strays("a quote", &place));
        };
        let quoted_ms = at_ms;
        Ok(Some(Quote { customer, kind, skill, request, relay, agreed, payment_hash, quoted_ms, expires_ms }))
    }

    fn last_seal(&self) -> Result<Option<Entry>, Error> {
        let Some(at) = self.last(Tree::Seals)? else { return Ok(None) };
        let place = Bytes(&at).place()?;
        let entry = self.record(&place)?;
        match entry.record {
            Record::Sealed { .. } => Ok(Some(entry)),
            _ => Err(strays("a signed head", &place)),
        }
    }
}

fn strays(wanted: &str, place: &Place) -> Error {
    Error::Index { why: format!("{place:?} should be {wanted} and is not") }
}
