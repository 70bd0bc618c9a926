//! `coinop connect`: flags into configuration, then the node. The node itself is `node`'s business.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::common::{Common, Overrides, block_on, low_space, node_key};
use super::exit::{Exit, Failure, Outcome};
use super::signals::Signals;
use super::{output, payment};
use crate::config::Config;
use crate::keys::NodeKey;
use crate::node::{self, Node};
use crate::wallet::Wallet;

/// How long the banner waits for relays that have neither connected nor failed.
const RELAY_PATIENCE: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(50);
/// How long the banner waits for the wallet; what comes later is logged.
const WALLET_PATIENCE: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Use NIP-90 (default, the only protocol)
    #[arg(long)]
    pub nip90: bool,
    /// Job types to serve: code,analysis,…
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub skills: Vec<String>,
    /// Relay to serve; may be repeated
    #[arg(long, value_name = "URL")]
    pub relay: Vec<String>,
    /// Sandbox backend: local, docker or auto
    #[arg(long, value_name = "BACKEND")]
    pub sandbox: Option<String>,
    /// Maximum number of jobs running at once
    #[arg(long, value_name = "N")]
    pub max_jobs: Option<u64>,
    /// Only these repositories, such as github.com/acme/*; may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub allow_repo: Vec<String>,
    /// Folder of your own job types
    #[arg(long, value_name = "DIR")]
    pub jobs_dir: Option<PathBuf>,
    /// Also clone from loopback and private addresses
    #[arg(long)]
    pub allow_private_repos: bool,
    /// Also clone file:// repositories of this machine; for tests
    #[arg(long)]
    pub allow_file_repos: bool,
    /// Also answer on relays at private addresses that a customer names
    #[arg(long)]
    pub allow_private_relays: bool,
    /// Stop after the first job has been answered
    #[arg(long)]
    pub once: bool,
}

impl Args {
    /// The flags as the top layer of configuration.
    pub fn overrides(&self) -> Overrides {
        let mut over = Overrides::default();
        over.list("skills", "--skills", &self.skills);
        over.list("relays", "--relay", &self.relay);
        over.text("sandbox", "--sandbox", self.sandbox.clone());
        over.number("max_jobs", "--max-jobs", self.max_jobs);
        over.list("admission.allow_repos", "--allow-repo", &self.allow_repo);
        let folder = self.jobs_dir.as_ref().map(|dir| dir.to_string_lossy().into_owned());
        over.text("jobs_dir", "--jobs-dir", folder);
        over.on("admission.allow_private_repos", "--allow-private-repos", self.allow_private_repos);
        over.on("admission.allow_file_repos", "--allow-file-repos", self.allow_file_repos);
        over.on("admission.allow_private_relays", "--allow-private-relays", self.allow_private_relays);
        over
    }
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let config = common.start(args.overrides())?;
    needs_relays(&config)?;
    for warning in warnings(&config)? {
        output::talk(&format!("{} {warning}", output::Paint::stderr().unsure("warning:")));
    }
    node::catalog(&config)?;
    let key = node_key(&config)?;
    block_on(serve(config, key, args.once))
}

async fn serve(config: Config, key: NodeKey, once: bool) -> Outcome {
    let prices = payment::prices_line(&config, &node::catalog(&config)?);
    // From here on a signal means an orderly end, also one that comes while the node starts.
    let mut signals = Signals::new()?;
    let node = Node::start(config, key.keys().clone(), None).await?;
    output::talk(&format!("provider  {}", key.npub()));
    output::talk(&format!("skills    {}", node.skills().join(", ")));
    output::talk(&format!("sandbox   {}: {}", node.identity().backend, node.identity().image));
    output::talk(&format!("prices    {prices}"));
    output::talk(&format!("wallet    {}", wallet_line(node.wallet()).await));
    tokio::select! {
        () = signals.next() => {}
        () = first_answer(&node), if once => {}
        // A node that takes nothing any more must not look alive.
        () = node.engine().gone() => {}
        () = tell_relays(&node) => {}
    }
    let open = node.engine().progress().borrow().open.len();
    let jobs = match open {
        0 => String::new(),
        n => format!(
            ". Waiting for {}; unfinished ones resume at the next start",
            output::count(n, "open job")
        ),
    };
    output::talk(&format!("Stopping: no new jobs{jobs}"));
    tokio::select! {
        drained = node.drain() => {
            let undelivered = drained?.undelivered;
            if undelivered > 0 {
                let events = output::count(undelivered, "event");
                output::talk(&format!("{events} not delivered yet; they will be sent at the next start"));
            }
            Ok(Exit::Ok)
        }
        () = signals.next() => Err(ended_at_once()),
    }
}

/// What the wallet says of itself, if it says so soon.
async fn wallet_line(wallet: Option<Arc<dyn Wallet>>) -> String {
    let Some(wallet) = wallet else { return "none; credit is what you grant".into() };
    let name = wallet.identity();
    let asked = tokio::spawn(async move {
        let state = payment::wallet_state(&*wallet).await;
        if let Err(error) = &state {
            tracing::warn!(wallet = %wallet.identity(), %error, "the wallet cannot be used: no job can be paid for");
        }
        state
    });
    match tokio::time::timeout(WALLET_PATIENCE, asked).await {
        Ok(Ok(Ok(state))) => format!("{name}: {state}"),
        Ok(Ok(Err(error))) => format!("{name}: NOT USABLE: {error}"),
        Ok(Err(broke)) => format!("{name}: {broke}"),
        Err(_) => format!("{name}: no answer yet"),
    }
}

/// What the operator should know before the node serves.
fn warnings(config: &Config) -> Result<Vec<String>, Failure> {
    let mut all = Vec::new();
    let unserved = node::unserved(config)?;
    if !unserved.is_empty() {
        let names = unserved.join(", ");
        all.push(format!("not served: {names} (in jobs_dir, but not in `skills`)"));
    }
    if let Some(free) = low_space(&config.data_dir) {
        let (free, dir) = (output::bytes(free), config.data_dir.display());
        all.push(format!("only {free} free in {dir}; a full disk stops the node from taking jobs"));
    }
    Ok(all)
}

/// Says how many relays there are once each has connected or failed, and that the node serves once one is there.
/// Never ends: what comes after is in the log.
async fn tell_relays(node: &Node) {
    let relays = node.relays();
    let ours = || relays.status().into_iter().filter(|relay| relay.ours).collect::<Vec<_>>();
    let tried = async {
        while !ours().iter().all(|relay| relay.link.connected || relay.link.trouble.is_some()) {
            tokio::time::sleep(LOOK).await;
        }
    };
    if tokio::time::timeout(RELAY_PATIENCE, tried).await.is_err() {
        tracing::debug!("not every relay was reached or failed yet");
    }
    let all = ours();
    let connected = all.iter().filter(|relay| relay.link.connected).count();
    output::talk(&format!("relays    {connected} of {} relays connected", all.len()));
    for relay in &all {
        let state = match (relay.link.connected, &relay.link.trouble) {
            (true, _) => "connected".to_owned(),
            (false, Some(trouble)) => format!("not reached: {}", output::tame(trouble, 200)),
            (false, None) => "not reached yet".to_owned(),
        };
        output::talk(&format!("          {}: {state}", relay.relay));
    }
    if connected == 0 {
        output::talk("no relay is connected, so no job can arrive; trying again until one is");
        while !ours().iter().any(|relay| relay.link.connected) {
            tokio::time::sleep(LOOK).await;
        }
    }
    output::talk("Serving. Press Ctrl-C to finish running jobs and stop, twice to stop now");
    std::future::pending().await
}

fn ended_at_once() -> Failure {
    Failure::say(Exit::Failure, "stopped at once; open jobs are resumed at the next start")
}

async fn first_answer(node: &Node) {
    let mut progress = node.engine().progress();
    while progress.borrow_and_update().answered == 0 {
        if progress.changed().await.is_err() {
            return;
        }
    }
}

fn needs_relays(config: &Config) -> Result<(), Failure> {
    if config.relays.is_empty() {
        let words = "no relay to serve: give --relay wss://…, or set `relays` in the configuration file";
        return Err(Failure::say(Exit::Config, words));
    }
    Ok(())
}
