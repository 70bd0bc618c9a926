//! `bench intake`: how much of what the cores can parse and verify the intake path keeps, from a relay's frames to
//! events that were handed up and said `done` to. It measures the relay room and changes nothing in it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nostr_sdk::prelude::{Event, EventBuilder, Filter, JsonUtil, Keys, Kind, Tag};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use crate::relay::message::{Message, look};
use crate::relay::verify::{Intake, Source, Wanted};
use crate::relay::{Error, InMemory, Memory};

/// Share of cores × (parse + verify) that the intake path keeps at least.
pub const GOAL: f64 = 0.9;
const KIND: u16 = 5930;
/// Without any event for so long a round is over, whatever is missing.
const STALL: Duration = Duration::from_secs(10);

/// What is measured.
#[derive(Debug, Clone)]
pub struct Options {
    /// Events a round.
    pub events: usize,
    /// Bytes of content in each.
    pub content_bytes: usize,
    /// Each round measures both sides, one after the other.
    pub rounds: usize,
    /// Threads on either side; 0: one a core.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { events: 20_000, content_bytes: 200, rounds: 7, threads: 0 }
    }
}

/// The figures; the rates are medians over the rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub threads: usize,
    pub events: usize,
    /// Mean length of an `EVENT` frame, bytes.
    pub frame_bytes: usize,
    /// Events a second: every thread parses and verifies, and does nothing else.
    pub bare_per_s: f64,
    /// Events a second through the intake path.
    pub intake_per_s: f64,
    /// Median of the rounds' intake ÷ bare.
    pub ratio: f64,
    /// The same of processor time an event: on a busy host this one tells of the path, the other of the host.
    pub cpu_ratio: f64,
    /// Both ratios are to reach it.
    pub goal: f64,
    pub met: bool,
    /// Verified events for which nobody had room, over all rounds.
    pub lagged: u64,
    pub rounds: usize,
}

/// Measures. Takes a few seconds and all cores.
pub fn run(options: &Options) -> Result<Report, Error> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = if options.threads == 0 { cores } else { options.threads };
    let frames = frames(options, threads);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .map_err(Error::Threads)?;
    let (mut bare, mut intake, mut ratios, mut cpu_ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut lagged = 0;
    for round in 0..=options.rounds.max(1) {
        let before = cpu();
        let bare_per_s = rate(frames.len(), bare_round(&frames, threads));
        let between = cpu();
        let (took, lost) = runtime.block_on(intake_round(&frames, threads))?;
        let after = cpu();
        let intake_per_s = rate(frames.len().saturating_sub(lost), took);
        // The first round warms up.
        if round > 0 {
            bare.push(bare_per_s);
            intake.push(intake_per_s);
            ratios.push(intake_per_s / bare_per_s);
            cpu_ratios.push((between - before) / (after - between).max(1e-9));
            lagged += lost as u64;
        }
    }
    let (ratio, cpu_ratio) = (median(&mut ratios), median(&mut cpu_ratios));
    let bytes: usize = frames.iter().map(|frame| frame.len()).sum();
    Ok(Report {
        threads,
        events: frames.len(),
        frame_bytes: bytes / frames.len().max(1),
        bare_per_s: median(&mut bare),
        intake_per_s: median(&mut intake),
        ratio,
        cpu_ratio,
        goal: GOAL,
        met: ratio.min(cpu_ratio) >= GOAL,
        lagged,
        rounds: options.rounds.max(1),
    })
}

/// Signed requests as a relay would send them, all different.
fn frames(options: &Options, threads: usize) -> Vec<Utf8Bytes> {
    let content = "x".repeat(options.content_bytes);
    let share = options.events.max(1).div_ceil(threads);
    let (content, keys) = (&content, &Keys::generate());
    let sign = |n: usize| -> Option<Utf8Bytes> {
        let tag = Tag::parse(["param", "cmd_0", &n.to_string()]).ok()?;
        let event = EventBuilder::new(Kind::Custom(KIND), content).tag(tag).sign_with_keys(keys).ok()?;
        Some(format!(r#"["EVENT","live",{}]"#, event.as_json()).into())
    };
    let sign = &sign;
    thread::scope(|scope| {
        let parts: Vec<_> = (0..threads)
            .map(|t| scope.spawn(move || (t * share..(t + 1) * share).filter_map(sign).collect::<Vec<_>>()))
            .collect();
        parts.into_iter().filter_map(|part| part.join().ok()).flatten().collect()
    })
}

/// What the cores can do: each thread takes its share of the same frames, parses and verifies.
fn bare_round(frames: &[Utf8Bytes], threads: usize) -> Duration {
    let began = Instant::now();
    thread::scope(|scope| {
        for part in frames.chunks(frames.len().div_ceil(threads).max(1)) {
            scope.spawn(move || {
                for frame in part {
                    let (_, _, event): (&str, &str, Event) = match serde_json::from_str(frame) {
                        Ok(message) => message,
                        Err(_) => continue,
                    };
                    std::hint::black_box(event.verify().is_ok());
                }
            });
        }
    });
    began.elapsed()
}

/// The path of the node: look, seen set, pool, filter, hash, signature, hand up, `done`. Gives the time and
/// how many events did not come.
async fn intake_round(frames: &[Utf8Bytes], threads: usize) -> Result<(Duration, usize), Error> {
    let (inbound, mut events) = mpsc::channel(4096);
    let memory: Arc<dyn Memory> = Arc::new(InMemory::default());
    let intake = Intake::start(threads, 100_000, memory, inbound)?;
    let source = Source::new("ws://bench".into(), None);
    let wanted = Wanted::new(vec![Filter::new().kind(Kind::Custom(KIND))]);
    let frames = frames.to_vec();
    let expected = frames.len();
    let began = Instant::now();
    let reader = tokio::spawn(async move {
        for frame in frames {
            if let Some(Message::Event { glance, .. }) = look(&frame) {
                intake.offer(&source, &wanted, glance, frame).await;
            }
        }
        // Until the consumer has everything; dropping it ends the threads.
        intake
    });
    let mut handled = 0;
    let mut last = began;
    while handled < expected {
        match tokio::time::timeout(STALL, events.recv()).await {
            Ok(Some(inbound)) => {
                inbound.done();
                handled += 1;
                last = Instant::now();
            }
            Ok(None) | Err(_) => break,
        }
    }
    reader.await.map_err(|e| Error::Broken(e.to_string()))?;
    Ok((last - began, expected - handled))
}

/// Seconds of processor time that this process has used.
fn cpu() -> f64 {
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    getrusage(UsageWho::RUSAGE_SELF)
        .map_or(0.0, |used| seconds(used.user_time()) + seconds(used.system_time()))
}

fn rate(events: usize, took: Duration) -> f64 {
    events as f64 / took.as_secs_f64().max(1e-9)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_run_handles_every_event_on_both_sides() {
        let report = run(&Options { events: 300, content_bytes: 50, rounds: 2, threads: 2 }).unwrap();
        assert_eq!((report.events, report.lagged, report.rounds), (300, 0, 2));
        assert!(report.bare_per_s > 0.0 && report.intake_per_s > 0.0 && report.frame_bytes > 300);
    }
}
