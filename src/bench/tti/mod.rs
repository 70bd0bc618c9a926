//! Time to interactive: from `create` to the end of the first `echo`, in the three ways the field measures it: one
//! after the other, at even intervals, all at once. This file says when each lane starts and judges the promises;
//! what a lane does is `lanes`', what its output costs is `streaming`'s, what many sandboxes leave is `soak`'s.

mod goals;
mod lanes;
mod soak;
mod streaming;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::Serialize;

pub use goals::Goal;
pub use lanes::Name;
pub use soak::Soak;
pub use streaming::Stream;

use super::stats::rank;
use crate::sandbox::Error;
use crate::sandbox::docker::Options as DockerOptions;
use lanes::{Lane, Lanes, Times};

/// Between two starts of `Mode::Staggered`.
const INTERVAL: Duration = Duration::from_millis(200);
/// How often the lanes take turns there, each with its share of the starts.
const TURNS: usize = 4;
/// How often each lane without an engine starts all at once; with one it takes minutes and is done once.
const BURSTS: usize = 3;
/// How long the kernel may clear away an engine's namespaces, which all others wait for, before the next lane.
const CLEARING: Duration = Duration::from_millis(100);
/// Bytes sent through each lane for the cost of streaming.
const BYTES: usize = 1000;

#[derive(Debug, Clone)]
pub struct Options {
    /// Starts of each lane in each mode; in turn, one in ten more goes before them, unmeasured.
    pub rounds: usize,
    pub modes: Vec<Mode>,
    pub lanes: Vec<Name>,
    /// The program whose `jail-init` is run; by default the one that is running.
    pub helper: Option<PathBuf>,
    /// An empty folder for the bench alone.
    pub state_dir: PathBuf,
    /// The engine for the docker lanes; its pool is the bench's to size.
    pub engine: Option<DockerOptions>,
    /// How many sandboxes are made and ended to see what stays in memory; 0: not looked at.
    pub soak: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Mode {
    /// One after the other, the lanes in turn
    InTurn,
    /// One every 200 ms, whether or not the one before is done
    Staggered,
    /// All at once; times count from that moment
    AtOnce,
}

/// Milliseconds of one lane in one mode.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    pub name: Name,
    pub min_ms: f64,
    pub p50_ms: f64,
    pub p95_ms: f64,
    pub p99_ms: f64,
    /// p50 of a sandbox until `create` returned, the rest being the command; of `docker run` until its line was read.
    pub first_p50_ms: Option<f64>,
    /// p50 over the plain spawn's p50 in this mode; none without that lane.
    pub ratio: Option<f64>,
    pub starts: usize,
    /// Starts whose program ended with 0 and whose line was read.
    pub successes: usize,
    /// Of the first start that was none.
    pub failure: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ModeReport {
    pub mode: Mode,
    pub lanes: Vec<Figures>,
}

/// A lane that cannot be had here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    pub name: Name,
    pub why: String,
}

#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub rounds: usize,
    pub as_root: bool,
    pub modes: Vec<ModeReport>,
    pub streaming: Vec<Stream>,
    pub soak: Option<Soak>,
    pub skipped: Vec<Skipped>,
    pub goals: Vec<Goal>,
}

/// Runs all modes. Blocks; call it outside a runtime.
///
/// # Errors
/// A host on which the local backend does not start. A start that fails is counted.
pub fn run(options: &Options) -> Result<Report, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|source| Error::Host { doing: "start a runtime", source })?;
    let mut report = Report {
        rounds: options.rounds,
        as_root: nix::unistd::geteuid().is_root(),
        modes: Vec::new(),
        streaming: Vec::new(),
        soak: None,
        skipped: Vec::new(),
        goals: Vec::new(),
    };
    runtime.block_on(async {
        for &mode in &options.modes {
            // A pool holds what may be asked for before it can be filled again.
            let pool = match mode {
                Mode::InTurn => 1,
                Mode::Staggered => options.rounds.div_ceil(TURNS),
                Mode::AtOnce => options.rounds,
            };
            let lanes = Lanes::make(options, pool).await?;
            let taken = match mode {
                Mode::InTurn => in_turn(&lanes.all, options.rounds).await,
                Mode::Staggered => staggered(&lanes.all, options.rounds).await,
                Mode::AtOnce => at_once(&lanes.all, options.rounds).await,
            };
            if mode == Mode::InTurn {
                report.streaming = streaming::measure(&lanes.all, BYTES.min(options.rounds * 10)).await?;
            }
            for (name, why) in &lanes.skipped {
                let skipped = Skipped { name: *name, why: why.clone() };
                if !report.skipped.contains(&skipped) {
                    report.skipped.push(skipped);
                }
            }
            lanes.close().await;
            report.modes.push(ModeReport { mode, lanes: figures(taken) });
        }
        if options.soak > 0 {
            report.soak = Some(soak::run(options).await?);
        }
        Ok::<_, Error>(())
    })?;
    report.goals = goals::judge(&report);
    Ok(report)
}

/// Every start of one lane.
struct Taken {
    name: Name,
    starts: Vec<Result<Times, String>>,
}

fn nothing_taken(lanes: &[Arc<Lane>]) -> Vec<Taken> {
    lanes.iter().map(|lane| Taken { name: lane.name, starts: Vec::new() }).collect()
}

async fn in_turn(lanes: &[Arc<Lane>], rounds: usize) -> Vec<Taken> {
    let mut taken = nothing_taken(lanes);
    let unmeasured = rounds / 10 + 1;
    for round in 0..unmeasured + rounds {
        for at in 0..lanes.len() {
            // Each lane follows each other one in turn.
            let at = (at + round) % lanes.len();
            let (Some(lane), Some(taken)) = (lanes.get(at), taken.get_mut(at)) else { continue };
            let start = match lane.ready().await {
                Ok(()) => lane.once(&format!("turn-{round}"), Instant::now(), true).await,
                Err(why) => Err(why),
            };
            // Its pool's work is not to fall into the next lane's time.
            let ready = lane.ready().await;
            if lane.name.needs_engine() {
                tokio::time::sleep(CLEARING).await;
            }
            if round >= unmeasured {
                taken.starts.push(ready.and(start));
            }
        }
    }
    taken
}

async fn staggered(lanes: &[Arc<Lane>], rounds: usize) -> Vec<Taken> {
    let mut taken = nothing_taken(lanes);
    for turn in 0..TURNS {
        let share = rounds * (turn + 1) / TURNS - rounds * turn / TURNS;
        for (lane, taken) in lanes.iter().zip(&mut taken) {
            taken.starts.extend(burst(lane, &format!("staggered-{turn}"), share, INTERVAL).await);
        }
    }
    taken
}

async fn at_once(lanes: &[Arc<Lane>], rounds: usize) -> Vec<Taken> {
    let mut taken = nothing_taken(lanes);
    for turn in 0..BURSTS {
        for (lane, taken) in lanes.iter().zip(&mut taken) {
            if turn == 0 || !lane.name.needs_engine() {
                taken.starts.extend(burst(lane, &format!("at-once-{turn}"), rounds, Duration::ZERO).await);
            }
        }
    }
    taken
}

/// Starts so many, one every interval. All of one moment count from that moment: whoever is served last waited longest.
async fn burst(lane: &Arc<Lane>, id: &str, starts: usize, every: Duration) -> Vec<Result<Times, String>> {
    if let Err(why) = lane.ready().await {
        return vec![Err(why); starts];
    }
    let begin = Instant::now();
    let mut running = Vec::with_capacity(starts);
    for n in 0..starts {
        let (lane, id) = (lane.clone(), format!("{id}-{n}"));
        let due = begin + every * u32::try_from(n).unwrap_or(u32::MAX);
        running.push(tokio::spawn(async move {
            let mut from = begin;
            if !every.is_zero() {
                tokio::time::sleep_until(due.into()).await;
                from = Instant::now();
            }
            lane.once(&id, from, false).await
        }));
    }
    let mut all = Vec::with_capacity(starts);
    for one in running {
        all.push(one.await.unwrap_or_else(|why| Err(why.to_string())));
    }
    if let Err(why) = lane.ready().await {
        tracing::warn!(lane = lane.name.as_str(), %why, "its pool is not full again");
    }
    all
}

fn figures(taken: Vec<Taken>) -> Vec<Figures> {
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let mut all: Vec<Figures> = taken
        .into_iter()
        .map(|Taken { name, starts }| {
            let good = || starts.iter().flatten();
            let mut times: Vec<f64> = good().map(|times| ms(times.whole)).collect();
            let mut firsts: Vec<f64> = good().filter_map(|times| times.first).map(ms).collect();
            Figures {
                name,
                min_ms: rank(&mut times, 0.0),
                p50_ms: rank(&mut times, 0.50),
                p95_ms: rank(&mut times, 0.95),
                p99_ms: rank(&mut times, 0.99),
                first_p50_ms: (!firsts.is_empty()).then(|| rank(&mut firsts, 0.50)),
                ratio: None,
                starts: starts.len(),
                successes: times.len(),
                failure: starts.iter().find_map(|start| start.as_ref().err().cloned()),
            }
        })
        .collect();
    let plain = all.iter().find(|lane| lane.name == Name::Plain).map(|lane| lane.p50_ms);
    for lane in &mut all {
        lane.ratio = plain.map(|plain| lane.p50_ms / plain);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_start_is_counted_and_told_and_has_no_part_in_the_times() {
        let good = |ms| Ok(Times { first: None, whole: Duration::from_millis(ms) });
        let plain = Taken { name: Name::Plain, starts: vec![good(1), good(1)] };
        let cold =
            Taken { name: Name::Cold, starts: vec![good(3), Err("no room".to_owned()), good(4), good(5)] };
        let all = figures(vec![plain, cold]);
        let cold = all.last().unwrap();
        assert_eq!((cold.min_ms, cold.p50_ms, cold.p99_ms), (3.0, 4.0, 5.0));
        assert_eq!((cold.starts, cold.successes, cold.failure.as_deref()), (4, 3, Some("no room")));
        assert_eq!(cold.ratio, Some(4.0));
    }
}
