//! What was earned and what it cost, from the entries of a span of time: revenue, costs, fees, refunds, what is unpaid,
//! profit. Nothing is kept for it; it is read from the log, from the segment in which the span begins.

use std::collections::BTreeMap;
use std::path::Path;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;

use crate::canonical::canonical_text;
use crate::store::money::{About, Account, AccountKind, Transfer, Why};
use crate::store::record::Record;
use crate::store::{self, Entry};

/// Batches without a transfer are not looked into.
pub(super) const TRANSFER: &str = "\"record\":\"transfer\"";

/// What the rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// Days of the report's time zone.
    Day,
    /// Months of the report's time zone.
    Month,
    Skill,
    Customer,
    Repo,
    Backend,
    Agent,
}

/// A span of time, `[from, to)` in Unix milliseconds, and the zone that its days are of.
#[derive(Debug, Clone)]
pub struct Window {
    pub from_ms: u64,
    pub to_ms: u64,
    pub zone: TimeZone,
}

impl Window {
    /// The end for other programs; `None` where there is none: many of them cannot read a number of that size.
    pub fn ends_ms(&self) -> Option<u64> {
        (self.to_ms != u64::MAX).then_some(self.to_ms)
    }
}

/// One row, msat. Profit is revenue less model and container cost, fees, grants and what was written off.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Sums {
    /// Jobs that were delivered and charged.
    pub jobs: u64,
    pub revenue_msat: i128,
    pub model_cost_msat: i128,
    pub container_cost_msat: i128,
    pub fees_msat: i128,
    pub grants_msat: i128,
    pub written_off_msat: i128,
    pub profit_msat: i128,
    /// Paid out to customers; no part of profit.
    pub refunds_msat: i128,
    /// Earned on a credit line and not covered when it was earned; part of revenue.
    pub unpaid_msat: i128,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The day, skill, customer, …; `-` for what belongs to none.
    pub key: String,
    #[serde(flatten)]
    pub sums: Sums,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    pub from_ms: u64,
    /// `None`: without an end.
    pub to_ms: Option<u64>,
    pub zone: String,
    pub by: By,
    pub rows: Vec<Row>,
    pub total: Sums,
}

/// Reads the report of a data folder, whether a node runs on it or not. Blocks.
///
/// # Errors
/// The store's, as for any reading.
pub fn report(data_dir: &Path, window: &Window, by: By) -> Result<Report, store::Error> {
    let mut rows: BTreeMap<String, Sums> = BTreeMap::new();
    let mut total = Sums::default();
    let mut visit = |entry: Entry| {
        let Record::Transfer(transfer) = &entry.record else { return Ok(()) };
        let key = key(transfer, entry.at_ms, by, &window.zone);
        total.add(transfer);
        rows.entry(key).or_default().add(transfer);
        Ok::<_, store::Error>(())
    };
    store::between(data_dir, window.from_ms, window.to_ms, TRANSFER, &mut visit)?;
    let rows = rows.into_iter().filter(|(_, sums)| *sums != Sums::default());
    Ok(Report {
        from_ms: window.from_ms,
        to_ms: window.ends_ms(),
        zone: window.zone.iana_name().map_or_else(|| format!("{:?}", window.zone), str::to_owned),
        by,
        rows: rows.map(|(key, sums)| Row { key, sums }).collect(),
        total,
    })
}

fn key(transfer: &Transfer, at_ms: u64, by: By, zone: &TimeZone) -> String {
    let about = |f: fn(&About) -> Option<&str>| transfer.about.as_ref().and_then(f);
    // Entries of older versions have the URL as the customer wrote it.
    let repo = about(|a| a.repo.as_deref()).map(canonical_text);
    let found = match by {
        By::Day => return day(at_ms, zone),
        By::Month => return day(at_ms, zone).chars().take("2026-11".len()).collect(),
        By::Skill => about(|a| Some(&a.skill)),
        By::Customer => transfer.customer(),
        By::Repo => repo.as_deref(),
        By::Backend => about(|a| Some(&a.backend)),
        By::Agent => about(|a| Some(&a.agent)),
    };
    found.filter(|key| !key.is_empty()).unwrap_or("-").to_owned()
}

/// `2026-11-21` in that zone.
pub fn day(at_ms: u64, zone: &TimeZone) -> String {
    let at = i64::try_from(at_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    at.map_or_else(|| "-".into(), |at| at.to_zoned(zone.clone()).date().to_string())
}

impl Sums {
    fn add(&mut self, transfer: &Transfer) {
        for (account, net) in transfer.nets() {
            match account {
                Account::Revenue { .. } => self.revenue_msat -= net,
                Account::ModelCost(_) => self.model_cost_msat += net,
                Account::ContainerCost(_) => self.container_cost_msat += net,
                Account::Fees => self.fees_msat += net,
                Account::Grants => self.grants_msat += net,
                Account::WriteOff => self.written_off_msat += net,
                Account::Credit(_)
                | Account::Held(_)
                | Account::Refunding(_)
                | Account::Supplier(_)
                | Account::Wallet(_)
                | Account::Locked(_)
                | Account::Suspense => {}
            }
            // By the kind, so that no account of income or expense can be left out of it.
            if matches!(account.kind(), AccountKind::Income | AccountKind::Expense) {
                self.profit_msat -= net;
            }
        }
        match &transfer.why {
            Why::Capture { .. } => self.jobs += 1,
            Why::RefundPaid { .. } => {
                let refunding = |leg: &&crate::store::money::Leg| matches!(leg.to, Account::Refunding(_));
                let paid: u64 = transfer.legs.iter().filter(refunding).map(|leg| leg.msat).sum();
                self.refunds_msat += i128::from(paid);
            }
            _ => {}
        }
        self.unpaid_msat += transfer.about.as_ref().map_or(0, |about| i128::from(about.unpaid_msat));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::transfer;

    #[test]
    fn six_spellings_of_one_repository_are_one_row_of_the_report() {
        let spelt = [
            "https://git.example/acme/tool",
            "https://git.example/acme/tool/",
            "https://git.example/acme/tool.git",
            "https://GIT.example:443/acme/tool.git/",
            "https://git.example/acme/tool?ref=main",
            "https://git.example/acme/x/../tool",
        ];
        for repo in spelt {
            let about = About { repo: Some(repo.into()), ..About::default() };
            let cost =
                transfer::cost("job", 0, Account::ContainerCost("local".into()), "here", 5, None, about);
            assert_eq!(key(&cost, 0, By::Repo, &TimeZone::UTC), "https://git.example/acme/tool", "{repo}");
        }
    }
}
