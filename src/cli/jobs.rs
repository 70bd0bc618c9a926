//! `coinop jobs {list,show,logs,cancel}`: what the log of a node says, and the owner's stop. Reading works
//! whether a node runs or not; cancelling asks the running node.

use clap::{Subcommand, ValueEnum};
use nostr_sdk::prelude::PublicKey;
use serde_json::json;

use super::common::{Common, Overrides};
use super::exit::{Exit, Failure, OrExit, Outcome};
use super::output::{self, Cell, Table, Tone};
use crate::clock;
use crate::config::Config;
use crate::control::{self, Ask};
use crate::keys::npub;
use crate::store::record::{Answer, Record, Verdict};
use crate::store::{self, Entry, JobFilter, JobRow, JobState, Store};

/// Most of a log that is read back.
const LOG_CAP_BYTES: u64 = 64 << 20;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List this node's jobs, newest first
    List {
        /// Only jobs that have no answer yet
        #[arg(long)]
        open: bool,
        #[arg(long, value_enum)]
        state: Option<State>,
        /// At most this many
        #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        limit: u32,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one job with its whole history
    Show {
        /// The request's id, or its first digits
        job: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the output of a job's commands; of a running job, the output so far
    Logs(Logs),
    /// Stop a job of the running node; its customer is sent an error with that reason
    Cancel {
        /// The request's id, or its first digits
        job: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
pub struct Logs {
    /// The request's id, or its first digits
    pub job: String,
    /// Print the raw bytes; by default control characters are escaped, in a pipe as well
    #[arg(long, conflicts_with = "json")]
    pub raw: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum State {
    Accepted,
    Running,
    Done,
    Failed,
    Cancelled,
}

impl From<State> for JobState {
    fn from(state: State) -> JobState {
        match state {
            State::Accepted => JobState::Accepted,
            State::Running => JobState::Running,
            State::Done => JobState::Done,
            State::Failed => JobState::Failed,
            State::Cancelled => JobState::Cancelled,
        }
    }
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let config = common.start_quietly(Overrides::default())?;
    match args.command {
        Command::List { open, state, limit, json } => {
            let limit = usize::try_from(limit).unwrap_or(JobFilter::MOST);
            let filter = JobFilter { open_only: open, state: state.map(Into::into), limit, before_ms: None };
            list(&config, &filter, json)
        }
        Command::Show { job, json } => show(&config, &job, json),
        Command::Logs(args) => logs(&config, &args),
        Command::Cancel { job, json } => cancel(&config, &job, json),
    }
}

/// `None` when no node ever ran here.
fn open(config: &Config) -> Result<Option<Store>, Failure> {
    match Store::read_only(&config.data_dir) {
        Ok(store) => Ok(Some(store)),
        Err(store::Error::Missing { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The one job whose id begins like this.
fn find(config: &Config, id: &str) -> Result<(Store, JobRow), Failure> {
    let none =
        || Failure::say(Exit::Failure, format!("there is no job {id} in {}", config.data_dir.display()));
    let store = open(config)?.ok_or_else(none)?;
    if let Some(row) = store.job(id)? {
        return Ok((store, row));
    }
    if id.is_empty() || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Failure::say(Exit::Usage, format!("{id:?} is not the beginning of a job's id")));
    }
    let id = id.to_ascii_lowercase();
    let all = store.jobs(&JobFilter { limit: JobFilter::MOST, ..JobFilter::default() })?;
    let mut alike = all.into_iter().filter(|row| row.job.starts_with(&id));
    match (alike.next(), alike.next()) {
        (Some(row), None) => Ok((store, row)),
        (Some(_), Some(_)) => Err(Failure::say(Exit::Usage, format!("more than one job begins with {id}"))),
        (None, _) => match store.refusal(&id)? {
            Some(refusal) => {
                let words = format!("{id} is no job: it was refused ({})", output::tame(&refusal.code, 60));
                Err(Failure::say(Exit::Failure, words))
            }
            None => Err(none()),
        },
    }
}

fn list(config: &Config, filter: &JobFilter, as_json: bool) -> Outcome {
    let rows = match open(config)? {
        Some(store) => store.jobs(filter)?,
        None => Vec::new(),
    };
    if as_json {
        output::json(&rows.iter().map(to_json).collect::<Vec<_>>())?;
        return Ok(Exit::Ok);
    }
    if rows.is_empty() {
        output::talk(&format!("No jobs in {}", config.data_dir.display()));
        return Ok(Exit::Ok);
    }
    let now = clock::now_ms();
    let ran = |row: &JobRow| row.summary.clone().filter(|used| used.wall_ms > 0);
    let mut table = Table::new(&["job", "skill", "state", "accepted", ">wall", ">memory", "customer", "end"]);
    for row in &rows {
        let used = ran(row);
        table.row(vec![
            output::short(&row.job).into(),
            output::tame(&row.skill, 20).into(),
            state(row.state),
            output::relative(row.accepted_ms, now).into(),
            used.as_ref().map(|s| output::span(s.wall_ms)).unwrap_or_default().into(),
            used.as_ref().map(|s| output::bytes(s.peak_memory_bytes)).unwrap_or_default().into(),
            output::short(&customer(row)).into(),
            row.verdict.as_ref().map(end).unwrap_or_default().into(),
        ]);
    }
    table.print()?;
    Ok(Exit::Ok)
}

fn show(config: &Config, id: &str, as_json: bool) -> Outcome {
    let (store, row) = find(config, id)?;
    let history = store.history(&row.job)?;
    let deliveries = match &row.answer {
        Some(answer) => store.deliveries(answer)?,
        None => Vec::new(),
    };
    let answer = match &row.answer {
        Some(answer) => store.answer(answer)?,
        None => None,
    };
    if as_json {
        let parsed = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
        let relays: Vec<_> =
            deliveries.iter().map(|(relay, a)| json!({ "relay": relay, "answer": a })).collect();
        output::json(&json!({
            "job": to_json(&row),
            "request": parsed(&row.request),
            "answer": answer.as_deref().and_then(parsed),
            "deliveries": relays,
            "history": history,
        }))?;
        return Ok(Exit::Ok);
    }
    let now = clock::now_ms();
    let mut table = Table::pairs();
    let mut pair = |name: &str, value: Cell| table.row(vec![name.into(), value]);
    pair("job", row.job.clone().into());
    pair("state", state(row.state));
    pair("skill", format!("{} (kind {})", output::tame(&row.skill, 40), row.kind).into());
    pair("customer", customer(&row).into());
    pair("received from", output::tame(&row.relay, 200).into());
    pair("accepted", output::relative(row.accepted_ms, now).into());
    if row.state.is_open() {
        pair("deadline", output::relative(row.deadline_ms, now).into());
    }
    pair("attempt", row.attempt.to_string().into());
    if let Some(commit) = &row.commit {
        pair("commit", commit.clone().into());
    }
    if let Some(backend) = &row.backend {
        pair("sandbox", output::tame(backend, 60).into());
    }
    if let Some(used) = &row.summary {
        pair("wall time", output::span(used.wall_ms).into());
        let cpu = used.cpu_ms.map_or_else(|| "not counted".to_owned(), output::span);
        pair("CPU time", cpu.into());
        pair("memory", output::bytes(used.peak_memory_bytes).into());
        pair("price", output::sats(used.price_msat).into());
    }
    if let Some(verdict) = &row.verdict {
        pair("end", end(verdict).into());
    }
    if let Some(answer) = &row.answer {
        pair("answer", answer.clone().into());
    }
    for (relay, answer) in &deliveries {
        pair("delivered", format!("{}: {}", output::tame(relay, 200), delivery(answer)).into());
    }
    table.print()?;
    output::data("")?;
    let mut table = Table::new(&[">seq", "when", "record"]);
    for entry in &history {
        let when = output::relative(entry.at_ms, now);
        table.row(vec![entry.seq.to_string().into(), when.into(), record(entry, &row.customer).into()]);
    }
    table.print()?;
    Ok(Exit::Ok)
}

fn logs(config: &Config, args: &Logs) -> Outcome {
    let (store, row) = find(config, &args.job)?;
    if row.state.is_open() {
        return live_log(config, &row, args);
    }
    let blob = row.summary.as_ref().and_then(|summary| summary.log_blob.as_deref());
    let log = match blob {
        Some(sha) => store.blob(sha, LOG_CAP_BYTES)?,
        None => None,
    };
    if args.json {
        let text = log.as_deref().map(String::from_utf8_lossy);
        output::json(&json!({ "job": row.job, "state": row.state, "sha256": blob, "log": text }))?;
        return Ok(Exit::Ok);
    }
    let Some(log) = log else {
        let why = if blob.is_none() { "no log was kept" } else { "the log is no longer here" };
        return Err(Failure::say(Exit::Failure, format!("job {}: {why}", output::short(&row.job))));
    };
    print_log(&log, args.raw)
}

/// What an open job has printed so far: the running node knows.
fn live_log(config: &Config, row: &JobRow, args: &Logs) -> Outcome {
    let log = match control::ask(&config.data_dir, &Ask::Logs(row.job.clone())) {
        Ok(log) => log.as_str().unwrap_or_default().to_owned(),
        Err(error @ control::Error::NotRunning(_)) => return Err(error).or_exit(Exit::Held),
        Err(control::Error::Refused(_)) => {
            let words = format!("job {} has not begun to run", output::short(&row.job));
            return Err(Failure::say(Exit::Failure, words));
        }
        Err(error) => return Err(error.into()),
    };
    if args.json {
        output::json(&json!({ "job": row.job, "state": row.state, "sha256": null, "log": log }))?;
        return Ok(Exit::Ok);
    }
    print_log(log.as_bytes(), args.raw)?;
    output::talk(&format!("job {} is still running", output::short(&row.job)));
    Ok(Exit::Ok)
}

/// Escaped, also in a pipe: a pager at its other end shows a terminal what it gets.
fn print_log(log: &[u8], raw: bool) -> Outcome {
    if raw {
        output::raw(log)?;
    } else {
        output::raw(output::tame_lines(&String::from_utf8_lossy(log)).as_bytes())?;
    }
    Ok(Exit::Ok)
}

fn cancel(config: &Config, id: &str, as_json: bool) -> Outcome {
    let (_, row) = find(config, id)?;
    if !row.state.is_open() {
        let words = format!("job {} has ended already: {}", output::short(&row.job), state(row.state).text);
        return Err(Failure::say(Exit::Failure, words));
    }
    match control::ask(&config.data_dir, &Ask::Cancel(row.job.clone())) {
        Ok(_) => {}
        Err(error @ control::Error::NotRunning(_)) => {
            return Err(error).or_exit(Exit::Held);
        }
        Err(error) => return Err(error.into()),
    }
    if as_json {
        output::json(&json!({ "job": row.job, "cancelled": true }))?;
    } else {
        output::talk(&format!("job {} is being stopped", output::short(&row.job)));
    }
    Ok(Exit::Ok)
}

/// Without the request, which `show` gives whole.
fn to_json(row: &JobRow) -> serde_json::Value {
    json!({
        "job": row.job, "customer": row.customer, "kind": row.kind, "skill": row.skill, "relay": row.relay,
        "state": row.state, "accepted_ms": row.accepted_ms, "deadline_ms": row.deadline_ms,
        "attempt": row.attempt, "commit": row.commit, "backend": row.backend, "answer": row.answer,
        "summary": row.summary, "verdict": row.verdict, "updated_ms": row.updated_ms,
    })
}

fn state(state: JobState) -> Cell {
    match state {
        JobState::Accepted => Cell::toned("accepted", Tone::Faint),
        JobState::Running => Cell::toned("running", Tone::Unsure),
        JobState::Done => Cell::toned("done", Tone::Good),
        JobState::Failed => Cell::toned("failed", Tone::Bad),
        JobState::Cancelled => Cell::toned("cancelled", Tone::Faint),
    }
}

fn customer(row: &JobRow) -> String {
    PublicKey::from_hex(&row.customer).map_or_else(|_| row.customer.clone(), |key| npub(&key))
}

fn end(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Done => "result".into(),
        Verdict::Failed { code, reason } => output::tame(&format!("{code}: {reason}"), 100),
        Verdict::Cancelled => "cancelled".into(),
    }
}

fn delivery(answer: &Answer) -> String {
    match answer {
        Answer::Stored => "stored".into(),
        Answer::Rejected { reason } => format!("rejected: {}", output::tame(reason, 200)),
        Answer::GaveUp { reason } => format!("given up: {}", output::tame(reason, 200)),
    }
}

fn record(entry: &Entry, customer: &str) -> String {
    match &entry.record {
        Record::Opened { version, .. } => format!("opened by version {version}"),
        Record::Accepted { skill, relay, .. } => {
            format!("accepted as {skill} from {}", output::tame(relay, 200))
        }
        Record::Started { attempt, backend, .. } => {
            format!("attempt {attempt} in {}", output::tame(backend, 60))
        }
        Record::Pinned { commit, .. } => format!("commit fixed at {}", output::short(commit)),
        Record::Closed { verdict, answer, .. } => {
            format!("finished: {} {}", end(verdict), output::short(answer))
        }
        Record::Refused { code, answered, .. } => {
            format!("refused: {}{}", output::tame(code, 60), if *answered { ", and answered" } else { "" })
        }
        Record::Cancelled { by, .. } if by == customer => "cancelled by the customer".into(),
        Record::Cancelled { .. } => "cancelled by the node's owner".into(),
        Record::Queued { event, relays, .. } => {
            format!("answer {} pending on {}", output::short(event), output::count(relays.len(), "relay"))
        }
        Record::Delivered { relay, answer, event } => {
            format!("{} at {}: {}", output::short(event), output::tame(relay, 200), delivery(answer))
        }
        Record::Cursor { relay, until } => {
            let until = clock::utc(until.saturating_mul(1_000));
            format!("{} read up to {until}", output::tame(relay, 200))
        }
        Record::Transfer(transfer) => {
            let moved: u64 = transfer.legs.iter().map(|leg| leg.msat).sum();
            format!("{moved} msat moved: {}", output::tame(&transfer.id, 200))
        }
        Record::Quoted { agreed, .. } => format!("quoted at {} msat", agreed.most_msat),
        Record::Invoiced(invoice) => format!("invoice over {} msat", invoice.amount_msat),
        Record::InvoiceClosed { reason, .. } => format!("invoice given up: {}", output::tame(reason, 200)),
        Record::Sealed { seq, .. } => format!("signed the log's head at entry {seq}"),
    }
}
