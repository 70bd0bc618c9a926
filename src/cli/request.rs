//! `coinop request`: flags into a signed job request, sent to relays; following it is `follow`'s business.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use nostr_sdk::prelude::{Event, JsonUtil, PublicKey};

use super::common::{Common, Overrides, block_on};
use super::exit::{Exit, Failure, OrExit, Outcome};
use super::follow::{self, Follow, Payer};
use super::output::{self, Paint};
use super::signals::Signals;
use crate::clock;
use crate::config::Config;
use crate::customer::pay::Purse;
use crate::customer::{Customer, check};
use crate::keys::{self, NodeKey};
use crate::node;
use crate::protocol::Scheme;
use crate::protocol::draft::Draft;
use crate::relay::{Client, Published, Wire};
use crate::store::record::Answer;
use crate::units::{self, Unit};

/// How long to wait for the first relay, and for relays to take the request.
const RELAY_PATIENCE: Duration = Duration::from_secs(15);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Job type to order; sets the event kind
    #[arg(long, value_enum, default_value = "generic")]
    pub skill: Skill,
    /// Event kind of the request; overrides the one of the skill
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(5000..=5999))]
    pub kind: Option<u16>,
    /// The git repository to work on
    #[arg(long, value_name = "URL")]
    pub repo: Option<String>,
    /// Branch, tag or commit of it
    #[arg(long = "ref", value_name = "REF")]
    pub git_ref: Option<String>,
    /// A command to run, by a shell; repeat for more, in order
    #[arg(long, value_name = "COMMAND")]
    pub cmd: Vec<String>,
    /// Folder in the repository to run in
    #[arg(long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// An environment variable for the commands; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub env: Vec<(String, String)>,
    /// A file to report with its hash; may be repeated
    #[arg(long, value_name = "PATH")]
    pub artifact: Vec<String>,
    /// The task in words
    #[arg(long, value_name = "TEXT")]
    pub task: Option<String>,
    /// Any further param; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    pub param: Vec<(String, String)>,
    /// Keep processes that a command leaves running; by default they are ended before the next command
    #[arg(long)]
    pub keep_background: bool,
    /// Time limit of the job: 90s, 15m, or a number of seconds
    #[arg(long, value_name = "TIME", value_parser = units::seconds)]
    pub time_secs: Option<u64>,
    /// Memory limit of the job: 2GiB, or a number of MiB
    #[arg(long, value_name = "SIZE", value_parser = units::mebibytes)]
    pub memory_mb: Option<u64>,
    /// Disk limit of the job: 2GiB, or a number of MiB
    #[arg(long, value_name = "SIZE", value_parser = units::mebibytes)]
    pub disk_mb: Option<u64>,
    /// Requested MIME type of the result
    #[arg(long, value_name = "MIME")]
    pub output: Option<String>,
    /// Price limit sent to the provider: 5sat, or a number of millisatoshi
    #[arg(long, value_name = "AMOUNT", value_parser = units::msat)]
    pub bid: Option<u64>,
    /// Pay what --provider asks, once and up to --max, from the configured wallet ([payment]); any unused rest becomes
    /// credit of --key there
    #[arg(long, requires_all = ["provider", "max", "key"])]
    pub pay: bool,
    /// Maximum to pay: 5sat, or a number of millisatoshi
    #[arg(long, value_name = "AMOUNT", value_parser = units::msat)]
    pub max: Option<u64>,
    /// Maximum fee that the wallet may add
    #[arg(long, value_name = "AMOUNT", default_value = "10sat", value_parser = units::msat)]
    pub max_fee: u64,
    /// Only this provider: npub or hex
    #[arg(long, value_name = "NPUB", value_parser = provider)]
    pub provider: Option<PublicKey>,
    /// Encrypt: only the provider can read the request, and only you the result; needs --provider
    #[arg(
        long, value_enum, value_name = "SCHEME", num_args = 0..=1, require_equals = true,
        default_missing_value = "nip44", requires = "provider"
    )]
    pub encrypt: Option<Encrypt>,
    /// Relay to publish to and read from; may be repeated [default: `relays` of the configuration]
    #[arg(long, value_name = "URL")]
    pub relay: Vec<String>,
    /// Give up after this long: 90s, 30m, or a number of seconds
    #[arg(long, value_name = "TIME", default_value = "20m", value_parser = |text: &str| within(text, 604_800))]
    pub timeout: u64,
    /// Sign with this key [default: a new one, for this request only]
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Write the result event here, for `coinop verify`
    #[arg(long, value_name = "FILE")]
    pub save: Option<PathBuf>,
    /// Write the request event here
    #[arg(long, value_name = "FILE")]
    pub save_request: Option<PathBuf>,
    /// Do not cancel the job on timeout or Ctrl-C
    #[arg(long)]
    pub no_cancel: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Skill {
    /// Run commands: kind 5000 or 5930
    Generic,
    /// Change code: kind 5100 or 5932
    Code,
    /// Review and analysis: kind 5200 or 5933
    Analysis,
    /// Documentation: kind 5300
    Docs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Encrypt {
    Nip44,
    /// Deprecated, for older providers
    Nip04,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) =
        text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or("expected NAME=VALUE")?;
    Ok((key.to_string(), value.to_string()))
}

/// A time from one second to `most`.
pub(super) fn within(text: &str, most: u64) -> Result<u64, String> {
    let seconds = units::seconds(text).map_err(|error| error.to_string())?;
    if (1..=most).contains(&seconds) {
        return Ok(seconds);
    }
    Err(format!("between 1s and {}", Unit::Ms.write(most * 1_000)))
}

pub(super) fn provider(text: &str) -> Result<PublicKey, String> {
    PublicKey::parse(text).map_err(|_| "expected npub1… or 64 hex digits".to_string())
}

impl Args {
    /// Others use 5000–5300 for images, video and content discovery. A request that neither names a
    /// repository nor asks one provider would be left alone there, so it goes to a kind of our own.
    fn kind(&self) -> u16 {
        let is_plain = self.repo.is_some() || self.provider.is_some();
        self.kind.unwrap_or(match self.skill {
            Skill::Generic if is_plain => 5000,
            Skill::Generic => 5930,
            Skill::Code if is_plain => 5100,
            Skill::Code => 5932,
            Skill::Analysis if is_plain => 5200,
            Skill::Analysis => 5933,
            Skill::Docs => 5300,
        })
    }

    fn draft(&self, relays: &[String]) -> Draft {
        Draft {
            kind: self.kind(),
            repo: self.repo.clone(),
            git_ref: self.git_ref.clone(),
            commands: self.cmd.clone(),
            workdir: self.workdir.clone(),
            env: self.env.iter().cloned().collect(),
            artifacts: self.artifact.clone(),
            task: self.task.clone(),
            time_secs: self.time_secs,
            memory_mb: self.memory_mb,
            disk_mb: self.disk_mb,
            cpu_milli: None,
            params: self.params(),
            bid_msat: self.bid,
            output: self.output.clone(),
            relays: relays.to_vec(),
            provider: self.provider,
            encrypt: self.encrypt.map(|scheme| match scheme {
                Encrypt::Nip44 => Scheme::Nip44,
                Encrypt::Nip04 => Scheme::Nip04,
            }),
            expiration: None,
        }
    }

    fn params(&self) -> Vec<(String, String)> {
        let kept = self.keep_background.then(|| ("keep_background".to_owned(), "true".to_owned()));
        self.param.iter().cloned().chain(kept).collect()
    }

    fn payer(&self, config: &Config) -> Result<Option<Payer>, Failure> {
        let (true, Some(provider), Some(max_msat)) = (self.pay, self.provider, self.max) else {
            return Ok(None);
        };
        let Some(wallet) = node::open_wallet(config).or_exit(Exit::Config)? else {
            let words = "no wallet to pay from: set payment.wallet and its key file (docs/wallets.md)";
            return Err(Failure::say(Exit::Config, words));
        };
        Ok(Some(Payer { wallet, purse: Purse { provider, max_msat }, max_fee_msat: self.max_fee }))
    }

    fn key(&self) -> Result<NodeKey, Failure> {
        match &self.key {
            Some(path) => keys::load(path, &keys::password_from_env_or_terminal).or_exit(Exit::Config),
            None => Ok(NodeKey::ephemeral()),
        }
    }
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let mut over = Overrides::default();
    over.list("relays", "--relay", &args.relay);
    let config = common.start_quietly(over)?;
    let relays = config.relays.clone();
    if relays.is_empty() {
        let words = "no relay to ask: give --relay wss://…, or set `relays` in the configuration file";
        return Err(Failure::say(Exit::Config, words));
    }
    let draft = args.draft(&relays);
    check::check(&draft, args.kind.is_some()).or_exit(Exit::Usage)?;
    for place in check::secrets(&draft) {
        let place = output::tame(&place, 100);
        let words =
            "looks like a secret, and everybody can read it; --encrypt hides it from all but --provider";
        output::talk(&format!("{} {place} {words}", Paint::stderr().unsure("warning:")));
    }
    let key = args.key()?;
    block_on(async {
        let payer = args.payer(&config)?;
        send(args, draft, relays, key, payer).await
    })
}

async fn send(args: Args, draft: Draft, relays: Vec<String>, key: NodeKey, payer: Option<Payer>) -> Outcome {
    let started = Instant::now();
    let keys = key.keys().clone();
    let request = draft.unsigned(&keys, clock::now_s()).or_exit(Exit::Usage)?;
    let request = request.sign_with_keys(&keys).map_err(|error| Failure::new(Exit::Failure, error))?;
    save(args.save_request.as_ref(), &request)?;

    // Private addresses are fine here: these relays were named by the person at the keyboard.
    let client = Client::connect(&relays, Some(keys.clone()), true, wire(), RELAY_PATIENCE)
        .await
        .or_exit(Exit::Unreachable)?;
    let customer = Customer::new(request.clone(), keys, args.provider);
    // Ears first: a fast provider answers before the relay has said OK.
    let answers = client.subscribe(vec![customer.filter()]);
    // From here on a signal takes back what was sent.
    let signals = Signals::new()?;
    let deadline = started + Duration::from_secs(args.timeout);
    let cancel = !args.no_cancel;
    let follow = Follow { client: &client, customer: &customer, started, deadline, cancel, payer };
    let publishing = async {
        let published = client.publish(&request, RELAY_PATIENCE).await;
        follow.say(&told(&request, &key, &published));
        published
    };
    let end = follow.run(answers, publishing, signals).await;
    client.close().await;
    if let Some(answer) = &end.answer {
        save(args.save.as_ref(), &answer.event)?;
    }
    follow::report(&customer, &end, args.json)
}

/// A relay that says no OK is asked soon whether it has the event.
pub(super) fn wire() -> Wire {
    Wire { ok_timeout: Duration::from_secs(5), ..Wire::default() }
}

/// What relays said to the request, one line each where they did not take it.
fn told(request: &Event, key: &NodeKey, published: &[Published]) -> String {
    let took = published.iter().filter(|p| p.answer == Answer::Stored).count();
    let mut lines = vec![format!(
        "request {} (kind {}) published to {took} of {} relays, signed by {}",
        output::short(&request.id.to_hex()),
        request.kind.as_u16(),
        published.len(),
        output::short(&key.npub())
    )];
    let refused = published.iter().filter(|p| p.answer != Answer::Stored);
    lines.extend(refused.map(|p| format!("           {}: {}", p.relay, reason(&p.answer))));
    lines.join("\n")
}

fn save(path: Option<&PathBuf>, event: &Event) -> Result<(), Failure> {
    let Some(path) = path else { return Ok(()) };
    std::fs::write(path, event.as_json() + "\n")
        .map_err(|error| Failure::say(Exit::Failure, format!("cannot write {}: {error}", path.display())))
}

fn reason(answer: &Answer) -> String {
    match answer {
        Answer::Stored => "stored".into(),
        Answer::Rejected { reason } => format!("refused: {}", output::tame(reason, 200)),
        Answer::GaveUp { reason } => format!("no answer: {}", output::tame(reason, 200)),
    }
}
