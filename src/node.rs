//! Puts the rooms together into one running node, and owns the order of start and drain. It decides nothing
//! about a job: it hands verified events from `relay` to `job`, and what `job` owes back to `relay`.

mod receipts;
mod setup;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nostr_sdk::prelude::{EventId, Keys};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::agent::Live;
use crate::announcer::{self, Announcer};
use crate::clock;
use crate::config::Config;
use crate::control;
use crate::desk::{Desk, Order};
use crate::job::{self, Engine, HoldKey, Holds, Offer, Rooms, Till};
use crate::ledger::Ledger;
use crate::market::catalog as job_types;
use crate::protocol::{self, announcement::Announcement};
use crate::relay::{self, Drained, Inbound, RelayStatus, Service};
use crate::repo::{self, Repos};
use crate::sandbox::{self, Backend, Identity, selftest};
use crate::store::{self, Holder, Store};
use crate::wallet;

use setup::engine_options;
pub use setup::{
    backend, catalog, docker_options, lines_for_strangers, open_wallet, repos, rules, runnable, unserved,
};

/// How long what is owed is still offered to relays at the end.
const DELIVERY_GRACE: Duration = Duration::from_secs(5);
/// Requests dated this much before `max_request_age_ms` are still heard, to be refused, seconds.
const LATE_S: u64 = 86_400;
/// How long a clone that nobody waits for any more may take to notice.
const REPO_GRACE: Duration = Duration::from_secs(5);
/// How often refunds in doubt and the day's signature are looked at.
const BOOKS_TICK: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Catalog(#[from] job_types::Error),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Job(#[from] job::Error),
    #[error(transparent)]
    Repo(#[from] repo::Error),
    #[error(transparent)]
    Relay(#[from] relay::Error),
    #[error(transparent)]
    Control(#[from] control::Error),
    #[error(transparent)]
    Wallet(#[from] wallet::Error),
    /// Each key of the configuration with what is wrong with it.
    #[error("{}", .0.iter().map(|(key, why)| format!("`{key}`: {why}")).collect::<Vec<_>>().join("\n"))]
    Payment(Vec<(&'static str, String)>),
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// Law 6: what cannot run here is not announced, and a node that can run nothing does not start.
    #[error("no skill can run in a sandbox here: {}; `coinop doctor` says how to fix it", .0.join("; "))]
    NothingRuns(Vec<String>),
    /// Law 3: a sandbox that does not hold what it promises gets no stranger's job.
    #[error("the sandbox failed its self-test: {}; `coinop doctor --sandbox` says how to fix it", .0.join("; "))]
    SelfTest(Vec<String>),
}

/// A node that is running.
pub struct Node {
    engine: Engine,
    live: Arc<Live>,
    relays: relay::Handle,
    store: Store,
    ledger: Ledger,
    desk: Desk,
    repos: Arc<Repos>,
    provider: String,
    config: Config,
    skills: Vec<String>,
    kinds: Vec<u16>,
    identity: Identity,
    announcer: Arc<Announcer>,
    stop: CancellationToken,
    /// What runs between the rooms; it ends with the node.
    tasks: JoinSet<()>,
}

/// What `status` on the control socket says.
#[derive(Debug, serde::Serialize)]
pub struct Report {
    pub version: &'static str,
    pub provider: String,
    pub skills: Vec<String>,
    pub kinds: Vec<u16>,
    pub sandbox: Identity,
    pub jobs: job::Status,
    /// Whether relays are listened to: not while the node ends, and not after its store failed.
    pub following: bool,
    pub relays: Vec<RelayStatus>,
    /// `None`: it has none.
    pub wallet: Option<WalletReport>,
}

/// What is to be told about the wallet.
#[derive(Debug, serde::Serialize)]
pub struct WalletReport {
    pub name: String,
    /// Its last invoice was for a test network.
    pub test_network: bool,
    /// Open invoices whose look-ups keep failing.
    pub unanswered: Vec<wallet::Unanswered>,
}

/// Tries the sandbox and keeps the report in `selftest.json`; its hash.
async fn self_test(backend: &dyn Backend, data_dir: &Path) -> Result<String, Error> {
    let report = selftest::run(backend, data_dir).await?;
    let file = data_dir.join("selftest.json");
    // For the operator to read; nothing depends on it.
    if let Err(why) = std::fs::write(&file, report.to_json()) {
        tracing::warn!(file = %file.display(), %why, "the self-test's report could not be kept");
    }
    if report.holds() {
        return Ok(report.hash());
    }
    let failed = report.checks.iter().filter(|check| !check.ok);
    Err(Error::SelfTest(failed.map(|check| format!("{}: {}", check.name, check.how)).collect()))
}

impl Node {
    /// Starts a node on the sandbox that is configured.
    ///
    /// # Errors
    /// What keeps it from serving, named; nothing is left running then.
    pub async fn start(config: Config, keys: Keys, helper: Option<PathBuf>) -> Result<Node, Error> {
        let backend = backend(&config, helper).await?;
        Node::start_tested(config, keys, backend).await
    }

    /// Starts a node on any backend that passes the self-test.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub async fn start_tested(config: Config, keys: Keys, backend: Arc<dyn Backend>) -> Result<Node, Error> {
        Node::start_with(config, keys, backend, true).await
    }

    /// Starts a node on any backend, which is taken as it is.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub async fn start_on(config: Config, keys: Keys, backend: Arc<dyn Backend>) -> Result<Node, Error> {
        Node::start_with(config, keys, backend, false).await
    }

    async fn start_with(
        config: Config,
        keys: Keys,
        backend: Arc<dyn Backend>,
        test: bool,
    ) -> Result<Node, Error> {
        let all = catalog(&config)?;
        let holder = Holder::new(keys.public_key().to_hex());
        let options = store::Options { blobs_bytes: config.logs.max_bytes, ..store::Options::default() };
        let store = Store::open_with(&config.data_dir, &holder, options)?;
        if let Some(fault) = store.clock_fault(clock::now_ms()) {
            tracing::warn!("{fault}; from now on entries have the clock's time");
        }
        let reaped = backend.reap().await?;
        if reaped > 0 {
            tracing::warn!(reaped, "removed sandboxes that an earlier life of this node left");
        }
        let ceiling = config.limits.policy();
        let (skills, cannot) = runnable(&all, &ceiling, &*backend);
        for why in &cannot {
            tracing::warn!("not served: {why}");
        }
        if skills.is_empty() {
            return Err(Error::NothingRuns(cannot));
        }
        let report = if test { Some(self_test(&*backend, &config.data_dir).await?) } else { None };
        let catalog = all.only(&skills)?;
        if let Some(first) = catalog.types().next() {
            let policy = first.manifest.limits.policy().capped(&ceiling);
            // Beside the start, not before it: the first job may come before there is one.
            let ahead = backend.clone();
            tokio::spawn(async move {
                if let Err(why) = ahead.warm_up(&policy).await {
                    tracing::warn!(%why, "no sandbox could be built ahead");
                }
            });
        }
        for cap_msat in lines_for_strangers(&config) {
            tracing::warn!(cap_msat, "a rule without customer= gives every stranger this credit line");
        }
        let kinds = catalog.kinds();
        let rules = Arc::new(rules(&config, keys.public_key(), catalog));
        let repos = Arc::new(repos(&config)?);
        let server = control::Server::bind(&config.data_dir)?;

        let clock = clock::system();
        let ledger = Ledger::new(store.clone());
        let till = match open_wallet(&config)? {
            Some(wallet) => {
                let holds = Holds { key: HoldKey::of(&keys), make: config.payment.hold_invoices };
                Some(Till::open_with(wallet, config.payment.quote_ms, Some(holds), &store)?)
            }
            None => None,
        };
        let (receipts, told) = mpsc::channel(receipts::WAITING);
        let options = relay::Options {
            relays: config.relays.clone(),
            kinds: kinds.iter().copied().chain([protocol::ACCOUNT_KIND]).collect(),
            allow_private: config.admission.allow_private_relays,
            look_back_s: config.relay.lookback_ms / 1000,
            // Who comes with an older date hears that it is too old.
            live_back_s: (config.admission.max_request_age_ms / 1000).saturating_add(LATE_S),
            max_read_relays: engine_options(&config).max_answer_relays,
            receipts: till.is_some().then_some(receipts),
            ..relay::Options::default()
        };
        let (relays, events) =
            Service::start(options, Arc::new(store.clone()), keys.clone(), Arc::clone(&clock))?;
        let desk = Desk::new(
            ledger.clone(),
            till.as_ref().map(|(till, _)| Arc::clone(till)),
            keys.clone(),
            Arc::clone(&clock),
        );
        let (outbox, inbox) = (relays.clone(), relays.clone());
        let (identity, caveats) = (backend.identity(), backend.caveats());
        let live = Arc::new(Live::default());
        let engine = Engine::start(Rooms {
            store: store.clone(),
            ledger: ledger.clone(),
            till: desk.till.clone(),
            repos: Arc::clone(&repos),
            backend,
            live: Arc::clone(&live),
            keys: keys.clone(),
            rules,
            options: Arc::new(engine_options(&config)),
            owe: Arc::new(move |outgoing| outbox.owe(outgoing)),
            read_relays: Arc::new(move |customer| inbox.reads_at(customer)),
            clock: Arc::clone(&clock),
        })
        .await?;
        desk.attach(engine.clone());
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(hand_over(events, engine.clone(), relays.clone()));
        tasks.spawn(tell_relays(engine.clone(), relays.clone()));
        if let Some((till, found)) = till {
            tasks.spawn(receipts::watch(told, Arc::clone(&till), store.clone()));
            let (engine, ledger, clock) = (engine.clone(), ledger.clone(), Arc::clone(&clock));
            tasks.spawn(job::till::watch(till, ledger, found, clock, engine));
        }
        tasks.spawn(keep_books(desk.clone()));
        let announcer = Arc::new(Announcer {
            store: store.clone(),
            relays: relays.clone(),
            keys: keys.clone(),
            clock,
            what: Announcement {
                kinds: kinds.clone(),
                skills: skills.clone(),
                name: config.announce.name.clone(),
                about: config.announce.about.clone(),
                sandbox: report.map(|hash| (identity.backend.clone(), hash)),
                caveats,
                ..Announcement::default()
            },
            to: config.relays.clone(),
            give_up_ms: config.relay.outbox_give_up_ms,
            state: announcer::State::default().into(),
        });
        let mut node = Node {
            engine,
            live,
            relays,
            store,
            ledger,
            desk,
            repos,
            provider: keys.public_key().to_hex(),
            config,
            skills,
            kinds,
            identity,
            announcer,
            stop,
            tasks,
        };
        if let Err(error) = node.announce().await {
            if let Err(also) = node.drain().await {
                tracing::error!(error = %also, "the end was not in order, either");
            }
            return Err(error);
        }
        node.tasks.spawn(server.run(Arc::new(node.owner_side()), node.stop.clone()));
        Ok(node)
    }

    pub fn skills(&self) -> &[String] {
        &self.skills
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    pub fn relays(&self) -> &relay::Handle {
        &self.relays
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The wallet that customers pay to; `None`: the node has none.
    pub fn wallet(&self) -> Option<Arc<dyn wallet::Wallet>> {
        self.desk.till.as_ref().map(|till| Arc::clone(till.wallet()))
    }

    /// Ends in order: the announcement is taken back, no more jobs, the running ones finish or stay open, what is
    /// owed is delivered as far as relays are there, the store is closed. When it returns, no room is held
    /// any more: a node may be started on the same folder and key.
    ///
    /// # Errors
    /// When the store had failed, now or before. What was promised is on disk; the end itself may not be.
    pub async fn drain(mut self) -> Result<Drained, Error> {
        // Nobody shall send us what we do not take any more (R17).
        self.announcer.withdraw().await;
        let within = Duration::from_millis(self.config.drain_timeout_ms);
        let open = self.engine.drain(within).await;
        if open > 0 {
            tracing::info!(open, "open jobs are resumed at the next start");
        }
        let drained = self.relays.drain(DELIVERY_GRACE).await;
        let ended = self.engine.end().await;
        self.stop.cancel();
        self.tasks.shutdown().await;
        if tokio::time::timeout(REPO_GRACE, self.repos.idle()).await.is_err() {
            tracing::warn!("a clone does not stop; its folder is held until it does");
        }
        let store = self.store.clone();
        let closed = tokio::task::spawn_blocking(move || store.close()).await;
        closed.unwrap_or(Err(store::Error::Closed))?;
        // A full disk may have hit a file beside the log, which is whole then and closes well.
        ended?;
        Ok(drained)
    }

    async fn announce(&mut self) -> Result<(), Error> {
        if !self.config.announce.publish {
            return Ok(());
        }
        self.announcer.announce().await?;
        let (announcer, every) = (Arc::clone(&self.announcer), self.config.announce.renew_ms);
        self.tasks.spawn(async move { announcer.renew(Duration::from_millis(every)).await });
        Ok(())
    }

    fn owner_side(&self) -> OwnerSide {
        OwnerSide {
            engine: self.engine.clone(),
            live: Arc::clone(&self.live),
            relays: self.relays.clone(),
            provider: self.provider.clone(),
            skills: self.skills.clone(),
            kinds: self.kinds.clone(),
            sandbox: self.identity.clone(),
            desk: self.desk.clone(),
        }
    }
}

/// Verified events go to the dispatcher; `done` moves the relay's cursor once the event is dealt with.
async fn hand_over(mut events: mpsc::Receiver<Inbound>, engine: Engine, relays: relay::Handle) {
    while let Some(inbound) = events.recv().await {
        if relays.has_result(&inbound.event) {
            tracing::debug!(request = %inbound.event.id, "passed over: it has a result already");
            inbound.done();
            continue;
        }
        let (event, relay) = (inbound.event.clone(), inbound.relay.clone());
        engine.offer(Offer { event, relay, done: Box::new(move || inbound.done()) }).await;
    }
}

/// What the engine is at is news for the relays: open jobs whose cancels to watch for, or that nothing is taken.
async fn tell_relays(engine: Engine, relays: relay::Handle) {
    let mut progress = engine.progress();
    loop {
        let job::Progress { open, stopped, .. } = progress.borrow_and_update().clone();
        if stopped && relays.is_following() {
            // What came would be neither taken nor done, so it would be fetched again and again.
            tracing::warn!("relays are not listened to any more; what is owed is still delivered");
            relays.stop_following();
        }
        relays.watch_cancels(open.iter().filter_map(|id| EventId::from_hex(id).ok()).collect());
        if progress.changed().await.is_err() {
            return;
        }
    }
}

/// Refunds that were left in doubt are ended, and once a day the head of the log is signed.
async fn keep_books(desk: Desk) {
    let mut tick = tokio::time::interval(BOOKS_TICK);
    loop {
        tick.tick().await;
        desk.resume().await;
        if let Err(error) = desk.seal_daily().await {
            tracing::warn!(%error, "the head of the log was not signed");
        }
    }
}

/// What the owner may ask and order over the control socket.
struct OwnerSide {
    engine: Engine,
    live: Arc<Live>,
    relays: relay::Handle,
    provider: String,
    skills: Vec<String>,
    kinds: Vec<u16>,
    sandbox: Identity,
    desk: Desk,
}

#[async_trait]
impl control::Handler for OwnerSide {
    async fn cancel(&self, job: &str) -> Result<(), String> {
        self.engine.cancel(job).await.map_err(|failure| failure.reason)
    }

    async fn logs(&self, job: &str) -> Result<String, String> {
        let printed = self.live.read(job).ok_or("the job is not running")?;
        Ok(String::from_utf8_lossy(&printed).into_owned())
    }

    async fn desk(&self, order: serde_json::Value) -> Result<serde_json::Value, String> {
        let order: Order = serde_json::from_value(order).map_err(|e| format!("not understood: {e}"))?;
        let desk = self.desk.clone();
        // On its own: who asked may go away, and a payment must not be left half way.
        let served = tokio::spawn(async move { desk.serve(order).await }).await;
        served
            .map_err(|_| "a fault of this program; the log says where".to_owned())?
            .map_err(|e| e.to_string())
    }

    async fn status(&self) -> serde_json::Value {
        let report = Report {
            version: env!("CARGO_PKG_VERSION"),
            provider: self.provider.clone(),
            skills: self.skills.clone(),
            kinds: self.kinds.clone(),
            sandbox: self.sandbox.clone(),
            jobs: self.engine.status().await,
            following: self.relays.is_following(),
            relays: self.relays.status(),
            wallet: self.desk.till.as_ref().map(|till| WalletReport {
                name: till.wallet().identity().to_string(),
                test_network: till.is_test_network(),
                unanswered: till.unanswered(),
            }),
        };
        serde_json::to_value(report).unwrap_or_default()
    }
}
