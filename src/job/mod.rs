//! The life of a job: intake, queue, run, one signed terminal answer, each step a record in the store
//! before its effect. It decides when; the rooms below do the work, and `relay` carries the answers out.

mod account;
mod after;
pub mod answer;
mod budget;
pub mod content;
mod delivered;
mod dispatcher;
mod ending;
pub mod engine;
mod intake;
mod locks;
mod paying;
pub mod queue;
mod quota;
mod reached;
mod recovery;
pub mod runner;
mod settle;
pub mod ticket;
pub mod till;

use std::sync::Arc;

use nostr_sdk::prelude::{Keys, PublicKey};

use crate::agent::Live;
use crate::clock::Clock;
use crate::config::Rent;
use crate::ledger::{self, Budgets, Committed, Ledger};
use crate::market::{self, Rules};
use crate::repo::Repos;
use crate::sandbox::Backend;
use crate::store::record::Record;
use crate::store::{self, Outgoing, Store};

pub use engine::{Engine, Error, Offer, Progress, Status};
pub use locks::HoldKey;
pub use till::{Holds, Paid, Till};

/// An accepted job that ends without a result has the same shape as a refusal: a code and a sentence.
pub type Failure = market::Refusal;

/// Relays on which a customer reads, as far as known now.
pub type ReadRelays = Arc<dyn Fn(&PublicKey) -> Vec<String> + Send + Sync>;

/// What a job is done with. Cheap to clone.
#[derive(Clone)]
pub struct Rooms {
    pub store: Store,
    pub ledger: Ledger,
    /// Where customers pay; `None`: the node has no wallet.
    pub till: Option<Arc<Till>>,
    pub repos: Arc<Repos>,
    pub backend: Arc<dyn Backend>,
    /// Where running jobs put what they print, for the owner.
    pub live: Arc<Live>,
    pub keys: Keys,
    pub rules: Arc<Rules>,
    pub options: Arc<Options>,
    /// Tells the outbox what is owed, once that is durable.
    pub owe: Arc<dyn Fn(Outgoing) + Send + Sync>,
    /// Relays on which a customer says it reads (NIP-65), as far as known now. Asking for a customer who is
    /// not known begins a look-up; it never waits.
    pub read_relays: ReadRelays,
    /// Unix milliseconds; a value so that tests can hold it still.
    pub clock: Clock,
}

/// The engine's bounds.
#[derive(Debug, Clone)]
pub struct Options {
    /// Jobs that run at once, 1 or more.
    pub max_jobs: usize,
    /// Accepted jobs that have not ended, all customers together and one customer alone.
    pub max_open: usize,
    pub max_open_per_customer: usize,
    /// Jobs of one customer that run at once.
    pub max_running_per_customer: usize,
    /// How long a job may wait for its turn, milliseconds.
    pub max_wait_ms: u64,
    /// How long fetching and checking out a repository may take, milliseconds.
    pub repo_ms: u64,
    /// How often a job is begun before it is given up as `interrupted`.
    pub max_attempts: u32,
    /// Most bytes of a patch or a text before it is put into an event, which may still be too large for it.
    pub max_content_bytes: usize,
    /// Most bytes of a result event as JSON.
    pub max_event_bytes: usize,
    /// Largest artifact that is hashed, bytes. None is kept.
    pub max_artifact_bytes: u64,
    /// Largest change that a patch is made of, bytes of all files together.
    pub max_changes_bytes: u64,
    /// How long an answer is offered to relays, milliseconds.
    pub outbox_give_up_ms: u64,
    /// Relays of the customer's choosing, named in the request or in its NIP-65 list, that one answer is
    /// offered to.
    pub max_answer_relays: usize,
    /// Our own relays: every answer goes there, too.
    pub relays: Vec<String>,
    /// What may be spent, by customers and by the node.
    pub budgets: Budgets,
    /// What the backend's sandboxes cost, where that is booked.
    pub rent: Option<Rented>,
    /// Signed refusals, quotes and balances a minute, all strangers together.
    pub refusals_per_minute: u32,
    pub quotes_per_minute: u32,
    pub balances_per_minute: u32,
}

/// Capacity that costs something, and what a dollar is.
#[derive(Debug, Clone)]
pub struct Rented {
    pub rent: Rent,
    pub msat_per_usd: u64,
    pub rate_source: String,
}

impl Rooms {
    pub(crate) fn now_ms(&self) -> u64 {
        (self.clock)()
    }

    /// As [`Rooms::record`], for a batch with transfers: nothing of it is written when one may not be made, or when it
    /// is against the budgets.
    pub(crate) async fn commit(&self, batch: Vec<Record>) -> Result<Committed, ledger::Error> {
        let owed: Vec<Outgoing> = batch.iter().filter_map(owed).collect();
        let committed = self.ledger.commit_within(batch, &self.options.budgets, self.now_ms()).await?;
        for outgoing in owed {
            (self.owe)(outgoing);
        }
        Ok(committed)
    }

    /// Makes a batch durable, then lets the outbox have what it owes.
    pub(crate) async fn record(&self, batch: Vec<Record>) -> Result<(), store::Error> {
        let owed: Vec<Outgoing> = batch.iter().filter_map(owed).collect();
        self.store.append(batch).await?;
        for outgoing in owed {
            (self.owe)(outgoing);
        }
        Ok(())
    }
}

fn owed(record: &Record) -> Option<Outgoing> {
    let Record::Queued { event, job, json, relays, give_up_ms } = record else { return None };
    Some(Outgoing {
        event: event.clone(),
        job: job.clone(),
        json: json.clone(),
        relays_left: relays.clone(),
        give_up_ms: *give_up_ms,
    })
}

/// Code and sentence for what `repo` says.
pub(crate) fn repo_failure(error: &crate::repo::Error) -> Failure {
    use crate::market::Code;
    use crate::repo::Error as E;
    let code = match error {
        E::Refused { .. } | E::LoginAsked => Code::RepoRefused,
        E::RefNotFound { .. } => Code::RefNotFound,
        E::TooLarge { .. } => Code::ResourceLimit,
        E::Full { .. } => Code::RateLimited,
        E::Timeout { .. } => Code::Timeout,
        E::Unreachable { .. } | E::NoSuchRepository => Code::RepoUnreachable,
        E::RefAmbiguous { .. } => Code::InvalidInput,
        E::Broken { .. } => Code::RepoRefused,
        E::DoesNotApply { .. } | E::Cancelled | E::Host { .. } | E::Busy { .. } => Code::Internal,
    };
    Failure::new(code, error.to_string())
}
