//! `bench job`: a no-op job from posting to its result, beside a bare relay round trip of events of the same
//! sizes, in turn, so that the ratio holds whatever the host's mood; then 64 jobs at once. Relay, node and
//! customer share this process and its cores.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use nostr_sdk::prelude::{Event, EventBuilder, Filter, JsonUtil, Keys, Kind, Tag};
use serde::Serialize;

use super::stats::{p50, p99};
use crate::config::Config;
use crate::demo::Stage;
use crate::protocol::draft::Draft;
use crate::relay::{Client, Subscription, Wire};
use crate::store::record::Record;

/// Most that a no-op job may take, as a multiple of the bare round trip (p50).
pub const GOAL: f64 = 15.0;
const PATIENCE: Duration = Duration::from_secs(60);
/// Kinds of the bare round trip: requests that no node here serves, and their results.
const BARE_REQUEST: u16 = 5999;
const BARE_RESULT: u16 = 6999;

#[derive(Debug, Clone)]
pub struct Options {
    /// Pairs of one bare round trip and one job; one in ten more goes before them, unmeasured.
    pub rounds: usize,
    /// Jobs posted at once.
    pub at_once: usize,
    /// An empty folder for the bench alone.
    pub dir: PathBuf,
}

/// Milliseconds, p50 and p99.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Spread {
    pub p50_ms: f64,
    pub p99_ms: f64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub rounds: usize,
    pub bare: Spread,
    pub job: Spread,
    /// p50 of the job over p50 of the bare round trip.
    pub ratio: f64,
    pub goal: f64,
    pub met: bool,
    /// From the node's log, whole milliseconds each, so read them as shares: posted → accepted → attempt begun →
    /// pinned → result signed → received.
    pub legs: Vec<(&'static str, Spread)>,
    pub at_once: usize,
    pub jobs_per_s: f64,
}

/// Measures. `config` gives the node's limits; relays, folders and queue are set here.
///
/// # Errors
/// What kept a job from its result.
pub async fn run(options: &Options, mut config: Config) -> anyhow::Result<Report> {
    config.data_dir = options.dir.clone();
    config.max_jobs = config.max_jobs.max(4);
    config.queue.max_open_jobs = 10_000;
    config.queue.max_open_jobs_per_customer = 10_000;
    config.queue.max_running_per_customer = 1_000;
    let stage = Stage::set(config).await?;
    let bench = Bench::new(&stage).await?;
    let (mut bare, mut job) = (Vec::new(), Vec::new());
    let mut legs: HashMap<&'static str, Vec<f64>> = HashMap::new();
    let unmeasured = options.rounds / 10 + 1;
    for round in 0..unmeasured + options.rounds {
        let (bare_ms, (job_ms, on_the_way)) = (bench.bare().await?, bench.job().await?);
        if round >= unmeasured {
            bare.push(bare_ms);
            job.push(job_ms);
            for (leg, ms) in on_the_way {
                legs.entry(leg).or_default().push(ms);
            }
        }
    }
    let jobs_per_s = bench.at_once(options.at_once).await?;
    drop(bench);
    stage.node.drain().await?;
    let (bare, job) = (spread(&mut bare), spread(&mut job));
    let ratio = job.p50_ms / bare.p50_ms;
    let legs = LEGS.iter().map(|leg| (*leg, spread(legs.entry(leg).or_default()))).collect();
    Ok(Report {
        rounds: options.rounds,
        bare,
        job,
        ratio,
        goal: GOAL,
        met: ratio <= GOAL,
        legs,
        at_once: options.at_once,
        jobs_per_s,
    })
}

const LEGS: [&str; 5] = ["accepted", "begun", "pinned", "signed", "received"];

fn spread(times: &mut [f64]) -> Spread {
    Spread { p50_ms: p50(times), p99_ms: p99(times) }
}

struct Bench<'a> {
    stage: &'a Stage,
    keys: Keys,
    customer: Client,
    /// Answers the bare requests, as the quickest provider that there can be.
    echo: tokio::task::JoinHandle<()>,
}

impl Drop for Bench<'_> {
    fn drop(&mut self) {
        self.echo.abort();
    }
}

impl<'a> Bench<'a> {
    async fn new(stage: &'a Stage) -> anyhow::Result<Bench<'a>> {
        let relays = [stage.relay.url()];
        let connect = || Client::connect(&relays, None, true, Wire::default(), PATIENCE);
        let (customer, provider) = (connect().await?, connect().await?);
        let requests = Filter::new().kind(Kind::from(BARE_REQUEST));
        let mut asked = provider.subscribe(vec![requests]);
        asked.stored(PATIENCE).await;
        let echo = tokio::spawn(async move {
            let keys = Keys::generate();
            while let Some(request) = asked.next().await {
                let answer = EventBuilder::new(Kind::from(BARE_RESULT), "x".repeat(1_500))
                    .tags([Tag::event(request.event.id), Tag::public_key(request.event.pubkey)]);
                if let Ok(answer) = answer.sign_with_keys(&keys) {
                    provider.publish(&answer, PATIENCE).await;
                }
            }
        });
        Ok(Bench { stage, keys: Keys::generate(), customer, echo })
    }

    fn request(&self) -> anyhow::Result<Event> {
        // What a no-op job is: one command that does nothing, in a checkout. The number makes each its own.
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let draft = Draft {
            kind: 5930,
            repo: Some(self.stage.server.url()),
            commands: vec!["true".into()],
            params: vec![("round".into(), number.to_string())],
            ..Draft::default()
        };
        let now_s = crate::clock::now_s();
        Ok(draft.unsigned(&self.keys, now_s)?.sign_with_keys(&self.keys)?)
    }

    /// Milliseconds from posting a request of the same tags to the echo's answer.
    async fn bare(&self) -> anyhow::Result<f64> {
        let tags = self.request()?.tags;
        let request =
            EventBuilder::new(Kind::from(BARE_REQUEST), "").tags(tags).sign_with_keys(&self.keys)?;
        let mut answers = self.listen(&request, BARE_RESULT).await;
        let started = Instant::now();
        tokio::join!(self.customer.publish(&request, PATIENCE), next(&mut answers)).1?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    }

    async fn job(&self) -> anyhow::Result<(f64, Vec<(&'static str, f64)>)> {
        let request = self.request()?;
        let mut answers = self.listen(&request, 6930).await;
        let (started, started_ms) = (Instant::now(), crate::clock::now_ms());
        let (_, answer) = tokio::join!(self.customer.publish(&request, PATIENCE), next(&mut answers));
        let elapsed_ms = started.elapsed().as_secs_f64() * 1e3;
        answer?;
        let mut legs = Vec::new();
        for entry in self.stage.node.store().history(&request.id.to_hex())? {
            let leg = match entry.record {
                Record::Accepted { .. } => "accepted",
                Record::Started { .. } => "begun",
                Record::Pinned { .. } => "pinned",
                Record::Closed { .. } => "signed",
                _ => continue,
            };
            legs.push((leg, entry.at_ms.saturating_sub(started_ms) as f64));
        }
        legs.push(("received", elapsed_ms));
        Ok((elapsed_ms, legs))
    }

    /// Jobs a second when `count` are posted at once.
    async fn at_once(&self, count: usize) -> anyhow::Result<f64> {
        let requests = (0..count).map(|_| self.request()).collect::<Result<Vec<_>, _>>()?;
        let filter = Filter::new().kind(Kind::from(6930u16)).events(requests.iter().map(|r| r.id));
        let mut answers = self.customer.subscribe(vec![filter]);
        answers.stored(PATIENCE).await;
        let started = Instant::now();
        let publish = futures_util::future::join_all(
            requests.iter().map(|request| self.customer.publish(request, PATIENCE)),
        );
        let gather = async {
            for _ in 0..count {
                next(&mut answers).await?;
            }
            Ok::<_, anyhow::Error>(())
        };
        tokio::join!(publish, gather).1?;
        Ok(count as f64 / started.elapsed().as_secs_f64())
    }

    async fn listen(&self, request: &Event, kind: u16) -> Subscription {
        let filter = Filter::new().kind(Kind::from(kind)).event(request.id);
        let answers = self.customer.subscribe(vec![filter]);
        answers.stored(PATIENCE).await;
        answers
    }
}

async fn next(answers: &mut Subscription) -> anyhow::Result<Event> {
    let received = tokio::time::timeout(PATIENCE, answers.next()).await;
    let received = received.context("no answer within a minute")?.context("the relay went away")?;
    tracing::trace!(event = %received.event.as_json(), "answer");
    Ok(received.event)
}
