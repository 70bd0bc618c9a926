//! Durable commits of many jobs at once beside the same commits one after the other, in turn: what the grouping of the
//! log's syncs is worth. A job is a hold and a capture, each committed through the ledger's rules.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, ensure};
use serde::Serialize;

use super::{GROUPED_GOAL, Options, store_options};
use crate::bench::stats::p50;
use crate::ledger::{Ledger, transfer};
use crate::store::money::{About, Account};
use crate::store::record::Record;
use crate::store::{Holder, Store};

const HELD_MSAT: u64 = 10_000;
const CREDIT_MSAT: u64 = 1_000_000_000_000;

#[derive(Debug, Clone, Serialize)]
pub struct Grouped {
    pub at_once: usize,
    pub rounds: usize,
    /// Commits of each side, a round.
    pub commits: usize,
    pub at_once_per_s: f64,
    pub one_by_one_per_s: f64,
    /// Bare: as many bytes as a commit writes, and one fdatasync, again and again.
    pub fdatasync_per_s: f64,
    /// Commits that one sync of the log carried, on the side that goes at once.
    pub commits_per_sync: f64,
    /// Median of the rounds' own: at once over one by one.
    pub ratio: f64,
    /// Median of the rounds' own: at once over bare fdatasyncs.
    pub over_fdatasync: f64,
    pub goal: f64,
    pub met: bool,
}

pub async fn measure(options: &Options) -> anyhow::Result<Grouped> {
    let (data, locks) = (options.dir.join("commits"), options.dir.join("locks"));
    std::fs::create_dir_all(&locks)?;
    let store = Store::open_with(&data, &Holder::new(super::books::NODE), store_options(&locks))?;
    let ledger = Ledger::new(store.clone());
    for nth in 0..options.at_once.max(1) {
        ledger.post(transfer::grant(&nth.to_string(), &name(nth), CREDIT_MSAT, "bench")).await?;
    }
    let jobs = Arc::new(AtomicUsize::new(0));
    let pairs = (options.commits / 2).max(1);
    let bare = File::new(&options.dir.join("bare"))?;
    let mut rounds = Rounds::default();
    // One round before the first, unmeasured.
    for round in 0..=options.rounds.max(1) {
        let bare_per_s = bare.syncs(pairs * 2)?;
        let one_by_one = rate(&ledger, &jobs, 1, pairs).await?;
        let before = store.stats();
        let at_once = rate(&ledger, &jobs, options.at_once.max(1), pairs * 4).await?;
        let after = store.stats();
        if round > 0 {
            let carried =
                (after.batches - before.batches) as f64 / (after.syncs - before.syncs).max(1) as f64;
            rounds.take(bare_per_s, one_by_one, at_once, carried);
        }
    }
    store.close()?;
    let ratio = p50(&mut rounds.ratios);
    Ok(Grouped {
        at_once: options.at_once,
        rounds: options.rounds,
        commits: pairs * 2,
        at_once_per_s: p50(&mut rounds.at_once),
        one_by_one_per_s: p50(&mut rounds.one_by_one),
        fdatasync_per_s: p50(&mut rounds.bare),
        commits_per_sync: p50(&mut rounds.carried),
        ratio,
        over_fdatasync: p50(&mut rounds.over_bare),
        goal: GROUPED_GOAL,
        met: ratio >= GROUPED_GOAL,
    })
}

#[derive(Default)]
struct Rounds {
    bare: Vec<f64>,
    one_by_one: Vec<f64>,
    at_once: Vec<f64>,
    carried: Vec<f64>,
    ratios: Vec<f64>,
    over_bare: Vec<f64>,
}

impl Rounds {
    fn take(&mut self, bare: f64, one_by_one: f64, at_once: f64, carried: f64) {
        self.bare.push(bare);
        self.one_by_one.push(one_by_one);
        self.at_once.push(at_once);
        self.carried.push(carried);
        self.ratios.push(at_once / one_by_one);
        self.over_bare.push(at_once / bare);
    }
}

/// Commits a second of so many tasks that share `pairs` jobs, each hold and capture durable before the next.
async fn rate(ledger: &Ledger, jobs: &Arc<AtomicUsize>, tasks: usize, pairs: usize) -> anyhow::Result<f64> {
    let upto = jobs.load(Ordering::Relaxed) + pairs;
    let began = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    for task in 0..tasks {
        let (ledger, jobs) = (ledger.clone(), Arc::clone(jobs));
        running.spawn(async move {
            let customer = name(task);
            loop {
                let nth = jobs.fetch_add(1, Ordering::Relaxed);
                if nth >= upto {
                    return anyhow::Ok(());
                }
                pair(&ledger, nth, &customer).await?;
            }
        });
    }
    while let Some(ended) = running.join_next().await {
        ended.context("a task of the bench panicked")??;
    }
    let per_s = (pairs * 2) as f64 / began.elapsed().as_secs_f64();
    // Those that found nothing more to do have counted on.
    jobs.fetch_add(tasks, Ordering::Relaxed);
    ensure!(per_s.is_finite(), "no time went by");
    Ok(per_s)
}

async fn pair(ledger: &Ledger, nth: usize, customer: &str) -> anyhow::Result<()> {
    let job = format!("{nth:064x}");
    let hold = transfer::hold(&job, customer, HELD_MSAT, 0, u64::MAX / 4);
    ledger.commit(vec![Record::Transfer(hold)]).await?;
    let about = About {
        customer: customer.to_owned(),
        skill: "code".into(),
        backend: "local".into(),
        agent: "none".into(),
        ..About::default()
    };
    let revenue = Account::Revenue { skill: "code".into(), place: "local".into() };
    let capture = transfer::capture(&job, HELD_MSAT, 7_000, &[(revenue, 1)], about);
    ledger.commit(vec![Record::Transfer(capture)]).await?;
    Ok(())
}

fn name(nth: usize) -> String {
    format!("{:064x}", 0xc0_0000 + nth)
}

/// A file of zeros that bare syncs write into, as the log does.
struct File {
    file: std::fs::File,
}

/// About what a commit of one transfer takes in the log.
const COMMIT_BYTES: usize = 500;

impl File {
    fn new(path: &Path) -> anyhow::Result<File> {
        let file = std::fs::File::create(path)?;
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; 1 << 20], 0)?;
        file.sync_all()?;
        Ok(File { file })
    }

    fn syncs(&self, times: usize) -> anyhow::Result<f64> {
        let bytes = [7; COMMIT_BYTES];
        let began = Instant::now();
        for nth in 0..times {
            let at = (nth * COMMIT_BYTES) % ((1 << 20) - COMMIT_BYTES);
            std::os::unix::fs::FileExt::write_all_at(&self.file, &bytes, at as u64)?;
            self.file.sync_data()?;
        }
        Ok(times as f64 / began.elapsed().as_secs_f64())
    }
}
