//! `bench ledger`: what durable commits gain from going in groups, and what a ledger of many entries costs: opening it
//! after an orderly stop and after a power cut, the report of a month, checking all of it, and the memory of a node
//! that has it. The entries are `books.rs`'s, the commits `commits.rs`'s, the node's memory `memory`'s of the bench above.

mod books;
mod commits;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use serde::Serialize;

use self::books::Written;
use super::memory;
use super::stats::p50;
use crate::ledger::{self, report};
use crate::store::{Holder, Options as StoreOptions, Store};

/// Commits of 64 jobs at once, at least so many times those of one after the other.
pub const GROUPED_GOAL: f64 = 10.0;
/// Of the ledger that the promises speak of.
pub const ENTRIES: usize = 1_000_000;
pub const ORDERLY_GOAL_S: f64 = 0.5;
pub const POWER_CUT_GOAL_S: f64 = 10.0;
pub const REPORT_GOAL_S: f64 = 1.0;
pub const RSS_GOAL_BYTES: u64 = 60 << 20;

#[derive(Debug, Clone)]
pub struct Options {
    /// Entries of the ledger that is opened, read and checked, from 100.
    pub entries: usize,
    /// How often each figure is taken.
    pub rounds: usize,
    /// Jobs that commit at once.
    pub at_once: usize,
    /// Commits of each side of the ratio, a round.
    pub commits: usize,
    /// An empty folder for the bench alone.
    pub dir: PathBuf,
    /// The program to start as the node; by default the one that is running.
    pub program: Option<PathBuf>,
}

/// Seconds: the best, and the worst beside it.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Seconds {
    pub best_s: f64,
    pub p50_s: f64,
    pub worst_s: f64,
    pub goal_s: f64,
    pub met: bool,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct Resident {
    /// Of the node's process, after it has served one job.
    pub rss_bytes: u64,
    pub goal_bytes: u64,
    pub met: bool,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct Check {
    pub s: f64,
    pub entries_per_s: f64,
    pub mb_per_s: f64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub commits: commits::Grouped,
    pub entries: usize,
    pub customers: usize,
    pub log_bytes: u64,
    pub index_bytes: u64,
    pub build_s: f64,
    /// The ledger is opened after an orderly stop.
    pub open_orderly: Seconds,
    /// … and after a power cut: the index is made again from the log.
    pub open_power_cut: Seconds,
    /// The report of one calendar month.
    pub report: Seconds,
    /// Transfers in that month, by the books that were written.
    pub report_entries: usize,
    pub verify: Check,
    pub node_orderly: Resident,
    pub node_power_cut: Resident,
    pub met: bool,
}

/// Measures.
///
/// # Errors
/// Books that do not come out as they were written, and what kept the ledger or the node from opening.
pub async fn run(options: &Options) -> anyhow::Result<Report> {
    let commits = commits::measure(options).await?;
    let data = options.dir.join("node");
    let locks = options.dir.join("locks");
    for folder in [&data, &locks] {
        std::fs::create_dir_all(folder)?;
    }
    let began = Instant::now();
    let written = books::write(&data, &locks, options.entries).await?;
    let build_s = began.elapsed().as_secs_f64();
    let rounds = options.rounds.max(1);
    let open_orderly = times(rounds, ORDERLY_GOAL_S, || open(&data, &locks, false))?;
    let index_bytes = folder_bytes(&data.join("index"))?;
    let report = times(rounds, REPORT_GOAL_S, || month(&data, &written))?;
    let verify = check(&data, &written)?;
    let node_orderly = node(options, &data).await?;
    let open_power_cut = times(rounds, POWER_CUT_GOAL_S, || {
        cut_power(&data)?;
        open(&data, &locks, true)
    })?;
    cut_power(&data)?;
    let node_power_cut = node(options, &data).await?;
    let met = commits.met
        && open_orderly.met
        && open_power_cut.met
        && report.met
        && node_orderly.met
        && node_power_cut.met;
    Ok(Report {
        commits,
        entries: written.entries,
        customers: books::CUSTOMERS,
        log_bytes: written.log_bytes,
        index_bytes,
        build_s,
        open_orderly,
        open_power_cut,
        report,
        report_entries: written.month_entries,
        verify,
        node_orderly,
        node_power_cut,
        met,
    })
}

fn times(
    rounds: usize,
    goal_s: f64,
    mut take: impl FnMut() -> anyhow::Result<f64>,
) -> anyhow::Result<Seconds> {
    let mut taken = (0..rounds).map(|_| take()).collect::<anyhow::Result<Vec<f64>>>()?;
    let p50_s = p50(&mut taken);
    let best_s = taken.first().copied().unwrap_or(f64::NAN);
    let worst_s = taken.last().copied().unwrap_or(f64::NAN);
    Ok(Seconds { best_s, p50_s, worst_s, goal_s, met: p50_s <= goal_s })
}

fn store_options(locks: &Path) -> StoreOptions {
    StoreOptions { key_locks: Some(locks.to_path_buf()), ..StoreOptions::default() }
}

/// Seconds until the store has taken its first record; closed in order afterwards.
fn open(data: &Path, locks: &Path, rebuilds: bool) -> anyhow::Result<f64> {
    let began = Instant::now();
    let store = Store::open_with(data, &Holder::new(books::NODE), store_options(locks))?;
    let took = began.elapsed().as_secs_f64();
    ensure!(store.was_rebuilt() == rebuilds, "the index was not opened the way that is measured");
    store.close()?;
    Ok(took)
}

/// What a power cut leaves: no marker that vouches for the index.
fn cut_power(data: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(data.join("index").join("CLEAN")) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context("cannot remove the marker"),
        _ => Ok(()),
    }
}

fn month(data: &Path, written: &Written) -> anyhow::Result<f64> {
    let began = Instant::now();
    let found = report::report(data, &written.month, report::By::Skill)?;
    let took = began.elapsed().as_secs_f64();
    let total = (found.total.jobs, found.total.revenue_msat);
    ensure!(total == written.month_total, "the report says {total:?}, written was {:?}", written.month_total);
    Ok(took)
}

fn check(data: &Path, written: &Written) -> anyhow::Result<Check> {
    let began = Instant::now();
    let verified = ledger::verify_log(data)?;
    let s = began.elapsed().as_secs_f64();
    ensure!(verified.transfers == written.entries as u64 && verified.sum_msat == 0, "not what was written");
    let bytes = written.log_bytes as f64;
    Ok(Check { s, entries_per_s: written.entries as f64 / s, mb_per_s: bytes / 1e6 / s })
}

/// A node of its own process on this data folder. It is killed afterwards, so the next start rebuilds.
async fn node(options: &Options, data: &Path) -> anyhow::Result<Resident> {
    let stage = options.dir.join("stage");
    std::fs::create_dir_all(&stage)?;
    let mut node = memory::Node::start(options.program.as_deref(), &stage, data, 1).await?;
    node.serve_one().await?;
    node.settled().await?;
    let rss_bytes = node.rss_bytes()?;
    node.end().await?;
    std::fs::remove_dir_all(&stage)?;
    Ok(Resident { rss_bytes, goal_bytes: RSS_GOAL_BYTES, met: rss_bytes <= RSS_GOAL_BYTES })
}

pub(super) fn folder_bytes(dir: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let about = entry.metadata()?;
        bytes += if about.is_dir() { folder_bytes(&entry.path())? } else { about.len() };
    }
    Ok(bytes)
}
