//! A year of books for `bench ledger`: top-ups, holds and captures of a thousand customers, each a valid entry of its
//! own in the log, as jobs make them. Nothing is measured here.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use sha2::{Digest, Sha256};

use crate::ledger::report::Window;
use crate::ledger::transfer;
use crate::store::money::{About, Account, Transfer};
use crate::store::record::Record;
use crate::store::{Holder, Options, Store};

pub const CUSTOMERS: usize = 1_000;
/// The key that opens the store.
pub const NODE: &str = "00000000000000000000000000000000000000000000000000000000000000aa";
const SKILLS: [&str; 4] = ["code", "review", "test", "image/build"];
/// Entries handed in before the first of them is waited for.
const FLIGHT: usize = 2_048;
/// Holds that are open at any time.
const OPEN: usize = 64;
const TOPUP_MSAT: u64 = 1_000_000_000;
/// One entry in so many is a top-up.
const TOPUP_EVERY: usize = 21;
const HELD_MSAT: u64 = 20_000;
/// For the building only: a cache that holds the whole index.
const CACHE_BYTES: u64 = 512 << 20;

/// What was written, and what a report of its month must say.
pub struct Written {
    pub entries: usize,
    pub log_bytes: u64,
    pub month: Window,
    /// Transfers in that month.
    pub month_entries: usize,
    /// Jobs and msat of revenue in that month.
    pub month_total: (u64, i128),
}

/// Writes so many entries, spread evenly over the twelve calendar months before this one.
pub async fn write(data: &Path, locks: &Path, entries: usize) -> anyhow::Result<Written> {
    let (from_ms, month, to_ms) = year()?;
    let now = Arc::new(AtomicU64::new(from_ms));
    let clock = {
        let now = Arc::clone(&now);
        Arc::new(move || now.load(Ordering::Relaxed))
    };
    let options = Options {
        index_cache_bytes: CACHE_BYTES,
        key_locks: Some(locks.to_path_buf()),
        clock,
        ..Options::default()
    };
    let store = Store::open_with(data, &Holder::new(NODE), options)?;
    let mut books = Books::default();
    let (mut month_entries, mut month_total) = (0, (0, 0));
    let mut made = 0;
    while made < entries {
        let at_ms = from_ms + (to_ms - from_ms) * made as u64 / entries.max(1) as u64;
        now.store(at_ms, Ordering::Relaxed);
        let flight = FLIGHT.min(entries - made).min(entries / 100 + 1);
        let mut last = None;
        for _ in 0..flight {
            let (transfer, earned_msat) = books.next();
            if (month.from_ms..month.to_ms).contains(&at_ms) {
                month_entries += 1;
                month_total.0 += u64::from(earned_msat > 0);
                month_total.1 += i128::from(earned_msat);
            }
            last = Some(store.submit(vec![Record::Transfer(transfer)], Box::new(|_| {}))?);
        }
        // They arrive in order, so the last stands for all.
        if let Some(last) = last {
            last.await?;
        }
        made += flight;
    }
    now.store(to_ms, Ordering::Relaxed);
    store.close()?;
    let log_bytes = super::folder_bytes(&data.join("log"))?;
    Ok(Written { entries, log_bytes, month, month_entries, month_total })
}

/// Unix milliseconds: the first of this month a year ago, the month in the middle, and the first of this month.
fn year() -> anyhow::Result<(u64, Window, u64)> {
    let zone = TimeZone::UTC;
    let this = Timestamp::now().to_zoned(zone.clone()).date().first_of_month();
    let ms = |date: Date| -> anyhow::Result<u64> {
        let at = date.to_zoned(TimeZone::UTC)?.timestamp().as_millisecond();
        u64::try_from(at).context("a clock before 1970")
    };
    let months_ago = |n: i32| this.checked_sub(n.months()).map_err(anyhow::Error::from);
    let month = Window { from_ms: ms(months_ago(6)?)?, to_ms: ms(months_ago(5)?)?, zone };
    Ok((ms(months_ago(12)?)?, month, ms(this)?))
}

/// Transfers in an order that the rules allow.
#[derive(Default)]
struct Books {
    nth: usize,
    jobs: usize,
    topups: usize,
    open: VecDeque<usize>,
    /// The next one of a job resolves the oldest.
    resolve: bool,
}

impl Books {
    /// The next transfer, and what it earns, msat.
    fn next(&mut self) -> (Transfer, u64) {
        self.nth += 1;
        if self.nth <= CUSTOMERS || self.nth.is_multiple_of(TOPUP_EVERY) {
            let nth = self.topups;
            self.topups += 1;
            let (hash, key) = (name("payment", nth), customer(nth));
            return (transfer::paid(&hash, "lnbits", Some(&key), TOPUP_MSAT), 0);
        }
        self.resolve = !self.resolve && self.open.len() >= OPEN;
        match if self.resolve { self.open.pop_front() } else { None } {
            Some(job) => captured(job),
            None => {
                let job = self.jobs;
                self.jobs += 1;
                self.open.push_back(job);
                (transfer::hold(&name("job", job), &customer(job), HELD_MSAT, 0, u64::MAX / 4), 0)
            }
        }
    }
}

fn captured(job: usize) -> (Transfer, u64) {
    let earned_msat = 1_000 + (job as u64 * 37) % 15_000;
    let skill = SKILLS.get(job % SKILLS.len()).copied().unwrap_or("code");
    let place = if job.is_multiple_of(3) { "docker" } else { "local" };
    let about = About {
        customer: customer(job),
        skill: skill.into(),
        repo: Some(format!("https://git.example/team-{}/project-{}.git", job % 97, job % 397)),
        backend: place.into(),
        agent: "none".into(),
        unpaid_msat: 0,
    };
    let revenue = Account::Revenue { skill: skill.into(), place: place.into() };
    (transfer::capture(&name("job", job), HELD_MSAT, earned_msat, &[(revenue, 1)], about), earned_msat)
}

fn customer(nth: usize) -> String {
    name("customer", nth % CUSTOMERS)
}

/// 64 hex digits that look like an event's id.
fn name(of: &str, nth: usize) -> String {
    hex::encode(Sha256::digest(format!("{of} {nth}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger;

    #[tokio::test]
    async fn the_books_that_are_written_follow_the_rules_and_report_what_was_earned() {
        let dir = tempfile::tempdir().unwrap();
        let (data, locks) = (dir.path().join("data"), dir.path().join("locks"));
        std::fs::create_dir_all(&locks).unwrap();
        let written = write(&data, &locks, 5_000).await.unwrap();
        let verified = ledger::verify_log(&data).unwrap();
        assert_eq!(verified.transfers, 5_000);
        assert!((OPEN - 1..=OPEN).contains(&verified.open_holds), "{}", verified.open_holds);
        let report = ledger::report::report(&data, &written.month, ledger::report::By::Day).unwrap();
        assert_eq!((report.total.jobs, report.total.revenue_msat), written.month_total);
        assert!((300..550).contains(&written.month_entries), "{}", written.month_entries);
    }
}
