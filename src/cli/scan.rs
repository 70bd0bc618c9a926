//! `coinop scan`: the requests on relays, each with accept or the typed reason why not. The judgement is
//! `market::judge`'s; nothing is stored, answered or run.

use std::time::Duration;

use nostr_sdk::prelude::{Event, Filter, Keys, Kind, Timestamp};
use serde_json::json;

use super::common::{Common, Overrides, block_on};
use super::exit::{Exit, Failure, OrExit, Outcome};
use super::output::{self, Cell, Table, Tone};
use crate::clock;
use crate::config::Config;
use crate::keys::{self, NodeKey, npub};
use crate::market::{Admission, Code, Refusal, Rules, judge};
use crate::net::without_user;
use crate::node;
use crate::protocol::request::{self, Request};
use crate::relay::{Client, Stored, Wire};
use crate::store::Store;
use crate::units;

const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Relay to read; may be repeated [default: `relays` of the configuration]
    #[arg(long, value_name = "URL")]
    pub relay: Vec<String>,
    /// Evaluate as a node with only these job types
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub skills: Vec<String>,
    /// Only these kinds [default: those of the job types]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(5000..=5999))]
    pub kind: Vec<u16>,
    /// Go back this far: 90s, 15m, 1d, or a number of seconds
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = units::seconds)]
    pub since_secs: u64,
    /// At most this many requests
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=5_000))]
    pub limit: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// One request with its judgement.
struct Seen {
    event: Event,
    request: Option<Request>,
    verdict: Result<Admission, Refusal>,
    /// What this node has done about it already.
    past: Option<String>,
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let mut over = Overrides::default();
    over.list("relays", "--relay", &args.relay);
    over.list("skills", "--skills", &args.skills);
    let config = common.start_quietly(over)?;
    if config.relays.is_empty() {
        let words = "no relay to look at: give --relay wss://…, or set `relays` in the configuration file";
        return Err(Failure::say(Exit::Config, words));
    }
    let key = node_key(&config)?;
    let rules = node::rules(&config, key.public_key(), node::catalog(&config).or_exit(Exit::Config)?);
    block_on(look(args, config, key, rules))
}

/// The node's key where there is one: what is meant for it is judged as such. None is made for a look.
fn node_key(config: &Config) -> Result<NodeKey, Failure> {
    match keys::load(&config.key_file, &keys::password_from_env_or_terminal) {
        Err(keys::Error::Missing(_)) => Ok(NodeKey::ephemeral()),
        other => other.or_exit(Exit::Config),
    }
}

async fn look(args: Args, config: Config, key: NodeKey, rules: Rules) -> Outcome {
    let kinds = if args.kind.is_empty() { rules.catalog.kinds() } else { args.kind.clone() };
    let now_s = clock::now_s();
    let limit = usize::try_from(args.limit).unwrap_or(usize::MAX);
    let filter = Filter::new()
        .kinds(kinds.into_iter().map(Kind::from))
        .since(Timestamp::from(now_s.saturating_sub(args.since_secs)))
        .limit(limit);
    let keys = key.keys();
    let client = Client::connect(&config.relays, Some(keys.clone()), true, Wire::default(), PATIENCE)
        .await
        .or_exit(Exit::Unreachable)?;
    let Stored { mut events, cut } = client.stored(vec![filter], PATIENCE).await;
    events.truncate(limit);
    if !cut.is_empty() {
        let all = config.relays.len();
        output::talk(&format!(
            "{} of {all} relays did not return all their events: {}",
            cut.len(),
            cut.join(", ")
        ));
    }
    client.close().await;
    // A store of another version or a damaged one is no reason not to look at relays.
    let store = Store::read_only(&config.data_dir).ok();
    let seen: Vec<Seen> =
        events.into_iter().map(|event| judged(event, keys, &rules, store.as_ref(), now_s)).collect();
    report(&seen, now_s, args.json)
}

fn judged(event: Event, keys: &Keys, rules: &Rules, store: Option<&Store>, now_s: u64) -> Seen {
    let past = store.and_then(|store| past(store, &event.id.to_hex(), &event.pubkey.to_hex()));
    match Request::decode(&event, keys) {
        Ok(request) => {
            let verdict = judge(rules, &request, now_s).and_then(|a| a.within_bid(&request));
            Seen { event, request: Some(request), verdict, past }
        }
        Err(error) => {
            let code = if error == request::Error::NotForUs { Code::NotForUs } else { error.code() };
            Seen { event, request: None, verdict: Err(Refusal::new(code, error.to_string())), past }
        }
    }
}

fn past(store: &Store, id: &str, customer: &str) -> Option<String> {
    if let Ok(Some(row)) = store.job(id) {
        return serde_json::to_value(row.state).ok()?.as_str().map(|state| format!("job {state}"));
    }
    if let Ok(Some(refusal)) = store.refusal(id) {
        return Some(format!("refused: {}", refusal.code));
    }
    matches!(store.is_cancelled(id, customer), Ok(true)).then(|| "taken back".to_string())
}

fn report(seen: &[Seen], now_s: u64, as_json: bool) -> Outcome {
    if as_json {
        output::json(&seen.iter().map(to_json).collect::<Vec<_>>())?;
        return Ok(Exit::Ok);
    }
    if seen.is_empty() {
        output::talk("no requests");
        return Ok(Exit::Ok);
    }
    let mut table = Table::new(&["request", "kind", "age", "customer", "verdict", "why or what"]);
    for one in seen {
        let (verdict, why) = match &one.verdict {
            Ok(admission) => (Cell::toned("accept", Tone::Good), what(admission)),
            Err(refusal) => (Cell::toned(refusal.code.as_str(), Tone::Unsure), refusal.reason.clone()),
        };
        let why = one.past.as_ref().map_or(why.clone(), |past| format!("[{past}] {why}"));
        table.row(vec![
            output::short(&one.event.id.to_hex()).into(),
            one.event.kind.as_u16().to_string().into(),
            output::relative(one.event.created_at.as_secs().saturating_mul(1000), now_s * 1000).into(),
            output::short(&npub(&one.event.pubkey)).into(),
            verdict,
            output::tame(&why, 100).into(),
        ]);
    }
    table.print()?;
    let taken = seen.iter().filter(|one| one.verdict.is_ok()).count();
    output::talk(&format!("{taken} of {} would be accepted", seen.len()));
    Ok(Exit::Ok)
}

fn what(admission: &Admission) -> String {
    let order = &admission.order;
    let work = order.commands.first().or(order.task.as_ref()).map(String::as_str).unwrap_or_default();
    let repo = order.repo.as_deref().map_or_else(|| "no repository".to_owned(), without_user);
    format!("{}: {repo} {work}", admission.job_type.manifest.name)
}

fn to_json(one: &Seen) -> serde_json::Value {
    let admission = one.verdict.as_ref().ok();
    let refusal = one.verdict.as_ref().err();
    let order = admission.map(|a| &a.order);
    json!({
        "request_id": one.event.id.to_hex(),
        "customer": npub(&one.event.pubkey),
        "kind": one.event.kind.as_u16(),
        "created_at": one.event.created_at.as_secs(),
        "verdict": if admission.is_some() { "accept" } else { "refuse" },
        "code": refusal.map(|r| r.code.as_str()),
        "reason": refusal.map(|r| r.reason.as_str()),
        "past": one.past,
        "skill": admission.map(|a| a.job_type.manifest.name.as_str()),
        "most_msat": admission.map(|a| a.agreed.most_msat),
        "policy": admission.map(|a| &a.policy),
        "repo": order.and_then(|o| o.repo.as_deref()).map(without_user),
        "git_ref": order.and_then(|o| o.git_ref.as_deref()),
        "commands": order.map(|o| &o.commands),
        "bid_msat": one.request.as_ref().and_then(|r| r.bid_msat),
        "encrypted": one.request.as_ref().map(|r| r.encryption.is_some()),
    })
}
