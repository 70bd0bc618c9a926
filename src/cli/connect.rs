//! `coinop connect`: flags into configuration, then the node. The node itself is `node`'s business.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::common::{Common, Overrides, block_on, node_key};
use super::exit::{Exit, Failure, Outcome};
use super::{output, payment};
use crate::config::Config;
use crate::job;
use crate::keys::NodeKey;
use crate::node::{self, Node};
use crate::wallet::{self, Wallet};

/// How long the banner waits for the wallet; what comes later is logged.
const WALLET_PATIENCE: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Speak NIP-90, the one protocol so far
    #[arg(long, required = true)]
    pub nip90: bool,
    /// Job types to serve: code,analysis,…
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub skills: Vec<String>,
    /// A relay to serve; may be repeated
    #[arg(long, value_name = "URL")]
    pub relay: Vec<String>,
    /// Where strangers' code runs: local, docker or auto
    #[arg(long, value_name = "BACKEND")]
    pub sandbox: Option<String>,
    /// Jobs running at once
    #[arg(long, value_name = "N")]
    pub max_jobs: Option<u64>,
    /// Only these repositories, such as github.com/acme/*; may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub allow_repo: Vec<String>,
    /// A folder of your own job types
    #[arg(long, value_name = "DIR")]
    pub jobs_dir: Option<PathBuf>,
    /// Clone from loopback and private addresses, too
    #[arg(long)]
    pub allow_private_repos: bool,
    /// Clone file:// repositories of this machine, too; for tests
    #[arg(long)]
    pub allow_file_repos: bool,
    /// Answer at relays with private addresses that a customer names, too
    #[arg(long)]
    pub allow_private_relays: bool,
    /// End after the first job has been answered
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
    node::catalog(&config).map_err(failure)?;
    let key = node_key(&config)?;
    block_on(serve(config, key, args.once))
}

async fn serve(config: Config, key: NodeKey, once: bool) -> Outcome {
    let relays = config.relays.join(", ");
    let prices = payment::prices_line(&config, &node::catalog(&config).map_err(failure)?);
    // From here on a signal means an orderly end, also one that comes while the node starts.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let node = Node::start(config, key.keys().clone(), None).await.map_err(failure)?;
    output::talk(&format!("provider  {}", key.npub()));
    output::talk(&format!("relays    {relays}"));
    output::talk(&format!("skills    {}", node.skills().join(", ")));
    output::talk(&format!("sandbox   {}: {}", node.identity().backend, node.identity().image));
    output::talk(&format!("prices    {prices}"));
    output::talk(&format!("wallet    {}", wallet_line(node.wallet()).await));
    output::talk("serving; Ctrl-C or SIGTERM ends in order, a second one at once");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = first_answer(&node), if once => {}
        // A node that takes nothing any more must not look alive.
        () = node.engine().gone() => {}
    }
    output::talk("draining: no new jobs; the running ones finish, or are taken up at the next start");
    tokio::select! {
        drained = node.drain() => {
            let undelivered = drained.map_err(failure)?.undelivered;
            if undelivered > 0 {
                output::talk(&format!("{undelivered} events are delivered after the next start"));
            }
            Ok(Exit::Ok)
        }
        _ = terminate.recv() => Err(ended_at_once()),
        _ = interrupt.recv() => Err(ended_at_once()),
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

fn failure(error: node::Error) -> Failure {
    let exit = match &error {
        node::Error::Store(error) | node::Error::Job(job::Error::Store(error)) => Exit::of_store(error),
        node::Error::Catalog(_) | node::Error::Payment(_) => Exit::Config,
        node::Error::Wallet(wallet::Error::Setup(_)) => Exit::Config,
        _ => Exit::Failure,
    };
    Failure::new(exit, error)
}

fn ended_at_once() -> Failure {
    Failure::say(Exit::Failure, "ended at once; open jobs are taken up at the next start")
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
