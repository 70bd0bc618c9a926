//! `coinop balance`: what a customer has with a provider, asked over relays by an encrypted request that only the two
//! can read.

use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use nostr_sdk::prelude::{Keys, PublicKey};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::common::{Common, Overrides, block_on};
use super::exit::{Exit, Failure, OrExit, Outcome};
use super::output::{self, Table};
use crate::clock;
use crate::customer::{Customer, Heard};
use crate::keys;
use crate::protocol::draft::Draft;
use crate::protocol::{ACCOUNT_KIND, Feedback, Scheme, Status};
use crate::relay::{Client, Published, Subscription};
use crate::store::record::Answer;

/// How long to wait for the first relay, and for relays to take the question.
const RELAY_PATIENCE: Duration = Duration::from_secs(15);
/// What the table shows, by the answer's names.
const ROWS: [(&str, &str); 3] = [
    ("available_msat", "available"),
    ("held_msat", "reserved for running jobs"),
    ("refunding_msat", "being refunded"),
];

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Provider: npub or hex
    #[arg(long, value_name = "NPUB", value_parser = super::request::provider)]
    pub provider: PublicKey,
    /// Key file of the customer whose account to show
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// Relay to publish to and read from; may be repeated [default: `relays` of the configuration]
    #[arg(long, value_name = "URL")]
    pub relay: Vec<String>,
    /// Give up after this long: 90s, 2m, or a number of seconds
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = |text: &str| super::request::within(text, 600))]
    pub timeout: u64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let mut over = Overrides::default();
    over.list("relays", "--relay", &args.relay);
    let relays = common.start_quietly(over)?.relays;
    if relays.is_empty() {
        let words = "no relay to ask: give --relay wss://…, or set `relays` in the configuration file";
        return Err(Failure::say(Exit::Config, words));
    }
    let key = keys::load(&args.key, &keys::password_from_env_or_terminal).or_exit(Exit::Config)?;
    block_on(async { ask(&args, relays, key.keys().clone()).await })
}

async fn ask(args: &Args, relays: Vec<String>, keys: Keys) -> Outcome {
    let draft = Draft {
        kind: ACCOUNT_KIND,
        params: vec![("query".into(), "balance".into())],
        relays: relays.clone(),
        provider: Some(args.provider),
        encrypt: Some(Scheme::Nip44),
        ..Draft::default()
    };
    let request = draft.unsigned(&keys, clock::now_s()).or_exit(Exit::Usage)?;
    let request = request.sign_with_keys(&keys).map_err(|error| Failure::new(Exit::Failure, error))?;
    let client = Client::connect(&relays, Some(keys.clone()), true, super::request::wire(), RELAY_PATIENCE)
        .await
        .or_exit(Exit::Unreachable)?;
    let customer = Customer::new(request.clone(), keys, Some(args.provider));
    let mut answers = client.subscribe(vec![customer.filter()]);
    let asking = client.publish(&request, RELAY_PATIENCE);
    let said = answer(args, &customer, &mut answers, asking).await;
    client.close().await;
    show(args, &said?)
}

/// The provider's last word. It proves that the question was delivered, whatever its relays say.
async fn answer(
    args: &Args,
    customer: &Customer,
    answers: &mut Subscription,
    asking: impl Future<Output = Vec<Published>>,
) -> Result<Feedback, Failure> {
    let mut asking = pin!(asking);
    let mut asked = false;
    let until = Instant::now() + Duration::from_secs(args.timeout);
    loop {
        let received = tokio::select! {
            received = tokio::time::timeout_at(until, answers.next()) => received,
            relays = &mut asking, if !asked => {
                asked = true;
                if relays.iter().any(|p| p.answer == Answer::Stored) {
                    continue;
                }
                let words = "no relay took the question, and nobody answered it";
                return Err(Failure::say(Exit::Unreachable, words));
            }
        };
        let Ok(Some(received)) = received else {
            let words =
                format!("Timed out after {} s without an answer; is the provider running?", args.timeout);
            return Err(Failure::say(Exit::Timeout, words));
        };
        if let Heard::Feedback { feedback, .. } = customer.hear(&received.event)
            && feedback.status.is_terminal()
        {
            return Ok(feedback);
        }
    }
}

fn show(args: &Args, said: &Feedback) -> Outcome {
    if said.status != Status::Success {
        let words = output::tame(said.extra.as_deref().unwrap_or("refused"), 300);
        return Err(Failure::say(Exit::Refused, words));
    }
    let told: Value = serde_json::from_str(&said.content).or_exit(Exit::Unverified)?;
    let msat = |name: &str| told[name].as_i64();
    let whole = ROWS.iter().all(|(name, _)| msat(name).is_some());
    if !whole {
        return Err(Failure::say(Exit::Unverified, "the answer is not a balance"));
    }
    if args.json {
        let rows = ROWS.iter().map(|(name, _)| ((*name).to_owned(), json!(msat(name))));
        let mut shown: serde_json::Map<String, Value> = rows.collect();
        shown.insert("provider".into(), json!(args.provider.to_hex()));
        shown.insert("at_s".into(), json!(told["at_s"].as_u64()));
        output::json(&shown)?;
        return Ok(Exit::Ok);
    }
    let mut table = Table::pairs();
    for (name, label) in ROWS {
        let shown = output::signed_sats(i128::from(msat(name).unwrap_or_default()));
        table.row(vec![label.into(), shown.into()]);
    }
    table.print()?;
    Ok(Exit::Ok)
}
