//! Follows many invoices of one wallet at once: a few look-ups side by side, each with its own pauses and limit of
//! time, so that a slow answer holds nobody else up. It tells when a state changes; what that means, and which
//! invoices are to be followed, is the caller's. After a restart the caller names them again.

mod plan;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};

use self::plan::Plan;
use super::{Error, Hint, Lookup, PaymentHash, Schedule, State, Wallet};
use crate::backoff::random_unit;

/// How to follow.
#[derive(Debug, Clone)]
pub struct Options {
    pub schedule: Schedule,
    /// Look-ups at the same time.
    pub at_once: usize,
    /// Longest wait for one of them. The wallet has its own limit; this one holds for any wallet.
    pub each: Duration,
    /// An invoice is not asked for more often than this, whatever hints come: forged ones must not become a flood.
    pub least_pause: Duration,
    /// Most invoices followed.
    pub most: usize,
    /// Look-ups in a minute, all together. LNbits allows 200 calls by default, for whatever the node asks.
    pub per_minute: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            schedule: Schedule::default(),
            at_once: 8,
            each: Duration::from_secs(15),
            least_pause: Duration::from_millis(500),
            most: 10_000,
            per_minute: 100,
        }
    }
}

/// An invoice changed its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub payment_hash: PaymentHash,
    pub state: State,
}

/// An invoice about which nothing usable has been heard for a while: were it paid, nobody would see it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Unanswered {
    pub payment_hash: PaymentHash,
    /// Look-ups that failed, without a break.
    pub failures: u32,
    /// The last error.
    pub error: String,
}

/// Failed look-ups of one invoice after which that is told.
const TOLD_AFTER: u32 = 3;
/// Pause between two warnings.
const WARN_EVERY: Duration = Duration::from_secs(60);
/// Pause after the wallet says that it is asked too often: at least, and at most.
const BUSY: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(60)];

/// What stays unanswered, and when that was last told.
#[derive(Default)]
struct Troubles {
    of: BTreeMap<PaymentHash, Unanswered>,
    warned: Option<Instant>,
}

enum Order {
    Follow(PaymentHash, Option<Instant>),
    Nudge(PaymentHash),
    Forget(PaymentHash),
}

/// A handle to the following. When it and its clones are gone, the following ends.
#[derive(Clone)]
pub struct Lookups {
    orders: mpsc::Sender<Order>,
    most: usize,
    troubles: Arc<Mutex<Troubles>>,
}

impl std::fmt::Debug for Lookups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lookups").field("most", &self.most).finish_non_exhaustive()
    }
}

impl Lookups {
    /// Starts on the current tokio runtime. Each change of a state goes to `found`, the first known state included,
    /// [`State::Unknown`] not; a reader that does not read holds the look-ups up. A settled invoice is forgotten once
    /// it was told; an expired or failed one is followed on, seldom, until [`Lookups::forget`].
    pub fn start(wallet: Arc<dyn Wallet>, options: Options, found: mpsc::Sender<Found>) -> Self {
        let (orders, inbox) = mpsc::channel(1_024);
        let most = options.most;
        let hints = wallet.hints();
        let troubles = Arc::<Mutex<Troubles>>::default();
        let told = Arc::clone(&troubles);
        let follower = Follower { plan: Plan::new(&options), wallet, options, found, troubles };
        tokio::spawn(follower.run(inbox, hints));
        Self { orders, most, troubles: told }
    }

    /// Follows an invoice from now on; it is looked at when it expires, too. One that is followed already stays as it
    /// is.
    ///
    /// # Errors
    /// [`Error::Full`] when the orders come faster than they can be taken. Beyond [`Options::most`] invoices an order
    /// is dropped, and the log says so.
    pub fn follow(&self, payment_hash: PaymentHash, expires_at: Option<Instant>) -> Result<(), Error> {
        let order = Order::Follow(payment_hash, expires_at);
        self.orders.try_send(order).map_err(|_| Error::Full { max: self.most })
    }

    /// Invoices whose look-ups keep failing.
    pub fn unanswered(&self) -> Vec<Unanswered> {
        lock(&self.troubles).of.values().filter(|one| one.failures >= TOLD_AFTER).cloned().collect()
    }

    /// A look-up beside these has failed.
    pub fn failed(&self, payment_hash: PaymentHash, error: &Error) {
        let failures = lock(&self.troubles).of.get(&payment_hash).map_or(0, |one| one.failures);
        tell(&self.troubles, payment_hash, failures.saturating_add(1), error);
    }

    /// Somebody says that this invoice may be paid: look soon. One that is not followed is not looked at. A lost
    /// nudge costs a pause, so there is no error.
    pub fn nudge(&self, payment_hash: PaymentHash) {
        if self.orders.try_send(Order::Nudge(payment_hash)).is_err() {
            tracing::debug!(%payment_hash, "a hint about an invoice was dropped");
        }
    }

    /// No longer follows it.
    pub async fn forget(&self, payment_hash: PaymentHash) {
        answered(&self.troubles, &payment_hash);
        if self.orders.send(Order::Forget(payment_hash)).await.is_err() {
            tracing::debug!("the look-ups have ended already");
        }
    }
}

struct Follower {
    plan: Plan,
    wallet: Arc<dyn Wallet>,
    options: Options,
    found: mpsc::Sender<Found>,
    troubles: Arc<Mutex<Troubles>>,
}

impl Follower {
    async fn run(mut self, mut inbox: mpsc::Receiver<Order>, mut hints: Option<broadcast::Receiver<Hint>>) {
        let mut asking: JoinSet<(PaymentHash, Result<Lookup, Error>)> = JoinSet::new();
        let at_once = self.options.at_once.max(1);
        loop {
            while asking.len() < at_once
                && let Some(hash) = self.plan.take_due(Instant::now())
            {
                let (wallet, each) = (Arc::clone(&self.wallet), self.options.each);
                asking.spawn(async move { (hash, ask(&*wallet, &hash, each).await) });
            }
            let next = self.plan.next().filter(|_| asking.len() < at_once);
            let due = async {
                match next {
                    Some(at) => sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                order = inbox.recv() => match order {
                    Some(order) => self.obey(order),
                    None => return,
                },
                Some(asked) = asking.join_next() => match asked {
                    Ok((hash, answer)) => if !self.learn(hash, answer).await { return },
                    Err(error) => {
                        tracing::error!(%error, "a look-up panicked");
                        self.plan.mend(Instant::now());
                    }
                },
                hint = next_hint(&mut hints) => match hint {
                    Hint::Changed(hash) => self.plan.nudge(hash, Instant::now()),
                    Hint::Anything => self.plan.nudge_all(Instant::now()),
                },
                () = due => {}
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Follow(hash, expires_at) => {
                if !self.plan.follow(hash, expires_at, Instant::now()) {
                    tracing::error!(%hash, most = self.options.most, "too many invoices are followed; this one is not");
                }
            }
            Order::Nudge(hash) => self.plan.nudge(hash, Instant::now()),
            Order::Forget(hash) => self.plan.forget(hash),
        }
    }

    /// `false` when nobody listens any more.
    async fn learn(&mut self, payment_hash: PaymentHash, answer: Result<Lookup, Error>) -> bool {
        let state = match answer {
            Ok(lookup) => lookup.state,
            Err(error) => {
                let now = Instant::now();
                tracing::debug!(%error, %payment_hash, "a look-up failed");
                if let Error::Busy { retry_after_s, .. } = error {
                    let [least, most] = BUSY;
                    self.plan.hold(now + Duration::from_secs(retry_after_s.unwrap_or(0)).clamp(least, most));
                }
                match self.plan.fail(payment_hash, now, random_unit()) {
                    0 => {}
                    failures => tell(&self.troubles, payment_hash, failures, &error),
                }
                return true;
            }
        };
        answered(&self.troubles, &payment_hash);
        match self.plan.learn(payment_hash, state, Instant::now(), random_unit()) {
            Some(state) => self.found.send(Found { payment_hash, state }).await.is_ok(),
            None => true,
        }
    }
}

fn lock(troubles: &Mutex<Troubles>) -> MutexGuard<'_, Troubles> {
    troubles.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes a failure, and warns from the third one on, once a minute for all.
fn tell(troubles: &Mutex<Troubles>, payment_hash: PaymentHash, failures: u32, error: &Error) {
    let mut troubles = lock(troubles);
    let error = error.to_string();
    if failures >= TOLD_AFTER && troubles.warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
        troubles.warned = Some(Instant::now());
        let invoices = troubles.of.values().filter(|one| one.failures >= TOLD_AFTER).count().max(1);
        tracing::warn!(
            %payment_hash, failures, invoices, %error,
            "looking up an invoice keeps failing: a payment to it would not be seen"
        );
    }
    troubles.of.insert(payment_hash, Unanswered { payment_hash, failures, error });
}

fn answered(troubles: &Mutex<Troubles>, payment_hash: &PaymentHash) {
    let mut troubles = lock(troubles);
    let told = troubles.of.remove(payment_hash).is_some_and(|one| one.failures >= TOLD_AFTER);
    if told && troubles.of.values().all(|one| one.failures < TOLD_AFTER) {
        tracing::info!(%payment_hash, "every open invoice can be looked up again");
        troubles.warned = None;
    }
}

async fn ask(wallet: &dyn Wallet, hash: &PaymentHash, each: Duration) -> Result<Lookup, Error> {
    let limit_ms = u64::try_from(each.as_millis()).unwrap_or(u64::MAX);
    timeout(each, wallet.look_up(hash)).await.unwrap_or(Err(Error::Slow { what: "a look-up", limit_ms }))
}

/// The next hint; never, once there are no more.
async fn next_hint(hints: &mut Option<broadcast::Receiver<Hint>>) -> Hint {
    if let Some(receiver) = hints {
        match receiver.recv().await {
            Ok(hint) => return hint,
            Err(RecvError::Lagged(_)) => return Hint::Anything,
            Err(RecvError::Closed) => *hints = None,
        }
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests;
