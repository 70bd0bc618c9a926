//! The till: asks the wallet for invoices, follows those that are open, and says what was paid. A payment counts when
//! our wallet says that our invoice is settled, and never before; what it pays for is the dispatcher's business, the
//! books are the ledger's.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use tokio::sync::{Notify, OnceCell, mpsc};

use super::Engine;
use super::locks::{self, HoldKey};
use crate::ledger::{self, Ledger, transfer};
use crate::store::record::{self, Record};
use crate::store::{self, InvoiceState, Store};
use crate::wallet::{
    self, Found, LookupOptions, Lookups, NewHold, NewInvoice, PaymentHash, Preimage, State, Unanswered,
    Wallet,
};

/// What is seen so long after a quote has run out was paid in time: payers pay in the last second, and wallets settle
/// late. An expired invoice is looked at twice within it.
pub const GRACE_MS: u64 = 5_000;
/// Pauses before an invoice that could not be made is tried again.
const TRIES_AFTER: [Duration; 3] =
    [Duration::from_millis(500), Duration::from_secs(2), Duration::from_secs(5)];
/// Look-ups in a minute: LNbits allows 200 calls by default, of which some are wanted for the rest.
const LNBITS_LOOKS: u32 = 100;
const OTHER_LOOKS: u32 = 600;
/// An invoice that has expired is followed for so long: wallets settle late.
const AFTER_EXPIRY_MS: u64 = 3_600_000;
/// Invoices that may be open at once, not counting those that have expired; further customers are told to come back.
const MOST_OPEN: usize = 1_000;
const SWEEP: Duration = Duration::from_secs(60);
/// The first pause before what could not be given back is tried again; each is twice the one before.
const AGAIN: Duration = Duration::from_secs(1);
/// Last looks at dead invoices side by side, and the longest that a sweep goes on with them.
pub(super) const LAST_LOOKS: usize = 8;
const LOOK: Duration = Duration::from_secs(30);
/// Changes of invoices that may wait to be dealt with.
const INBOX: usize = 64;

/// The node's side of one wallet.
pub struct Till {
    wallet: Arc<dyn Wallet>,
    /// Names the wallet in the books.
    name: String,
    lookups: Lookups,
    /// How long an invoice holds.
    pub quote_ms: u64,
    /// Hashes of invoices that were made and are not on record yet.
    made: Mutex<HashSet<String>>,
    /// For hold invoices.
    holds: Option<Holds>,
    /// Whether the wallet has them, once it has said so.
    can_hold: OnceCell<bool>,
    /// Something that is locked may have to be given back.
    over: Notify,
    /// The last invoice was for a test network.
    test_network: AtomicBool,
}

/// How a node deals with hold invoices.
pub struct Holds {
    /// Takes what was locked under it, whatever the setting says now.
    pub key: HoldKey,
    /// Whether new ones are made, where the wallet has them.
    pub make: bool,
}

/// What the till has found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paid {
    pub invoice: Box<record::Invoice>,
    /// What has come, msat; the invoice's amount where the wallet does not say.
    pub received_msat: u64,
    /// It is locked, and neither ours nor the customer's yet.
    pub locked: bool,
}

impl Paid {
    /// The entry of the books that it makes.
    pub fn transfer(&self) -> store::money::Transfer {
        let Paid { invoice, received_msat, locked } = self;
        if let (true, Some(job)) = (locked, &invoice.job) {
            // More than was asked for is nobody's credit before it is ours.
            let msat = invoice.amount_msat;
            return transfer::locked(&invoice.payment_hash, &invoice.wallet, job, &invoice.customer, msat);
        }
        transfer::paid(&invoice.payment_hash, &invoice.wallet, Some(&invoice.customer), *received_msat)
    }
}

/// Why there is no invoice.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Wallet(#[from] wallet::Error),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("{MOST_OPEN} invoices are open already")]
    Busy,
    /// Whoever pays it would pay for somebody else.
    #[error("the wallet gave an invoice that it had given before ({0})")]
    GivenBefore(String),
}

impl Till {
    /// Begins to follow what an earlier life left open. The second value is to be given to [`watch`].
    ///
    /// # Errors
    /// The store's.
    pub fn open(
        wallet: Arc<dyn Wallet>,
        quote_ms: u64,
        store: &Store,
    ) -> Result<(Arc<Till>, mpsc::Receiver<Found>), store::Error> {
        Till::open_with(wallet, quote_ms, None, store)
    }

    /// As [`Till::open`], for a node whose jobs may be paid by hold invoices.
    ///
    /// # Errors
    /// The store's.
    pub fn open_with(
        wallet: Arc<dyn Wallet>,
        quote_ms: u64,
        holds: Option<Holds>,
        store: &Store,
    ) -> Result<(Arc<Till>, mpsc::Receiver<Found>), store::Error> {
        let (tell, found) = mpsc::channel(INBOX);
        let kind = wallet.identity().kind;
        let per_minute = if kind == wallet::Kind::Lnbits { LNBITS_LOOKS } else { OTHER_LOOKS };
        let options = LookupOptions { per_minute, ..LookupOptions::default() };
        let lookups = Lookups::start(Arc::clone(&wallet), options, tell);
        let name = kind.to_string();
        let till = Till {
            wallet,
            name,
            lookups,
            quote_ms,
            made: Mutex::default(),
            holds,
            can_hold: OnceCell::new(),
            over: Notify::new(),
            test_network: AtomicBool::new(false),
        };
        for invoice in store.unpaid()? {
            till.follow(&invoice);
        }
        Ok((Arc::new(till), found))
    }

    pub fn wallet(&self) -> &Arc<dyn Wallet> {
        &self.wallet
    }

    /// The wallet's name in the books.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Asks for an invoice over at least `msat`: wallets count in sats, so it is rounded up to a whole one. It is to be
    /// recorded before anybody is told of it, and followed after that.
    ///
    /// # Errors
    /// The wallet's.
    pub async fn invoice(
        &self,
        store: &Store,
        customer: &str,
        msat: u64,
        job: Option<&str>,
        now_ms: u64,
    ) -> Result<record::Invoice, Error> {
        self.make(store, customer, msat, (job, None), now_ms).await
    }

    /// As [`Till::invoice`], for a job that begins when it is paid: a hold invoice where the wallet has them. The job
    /// takes `lasts_ms` at most, from its beginning to its end.
    ///
    /// # Errors
    /// The wallet's.
    pub async fn invoice_ahead(
        &self,
        store: &Store,
        customer: &str,
        msat: u64,
        (job, lasts_ms): (&str, u64),
        now_ms: u64,
    ) -> Result<record::Invoice, Error> {
        self.make(store, customer, msat, (Some(job), Some(lasts_ms)), now_ms).await
    }

    async fn make(
        &self,
        store: &Store,
        customer: &str,
        msat: u64,
        (job, lasts_ms): (Option<&str>, Option<u64>),
        now_ms: u64,
    ) -> Result<record::Invoice, Error> {
        if store.unexpired_invoices(now_ms)? >= MOST_OPEN {
            return Err(Error::Busy);
        }
        let amount_msat = msat.div_ceil(1_000).saturating_mul(1_000);
        let what = job.map_or("credit".to_owned(), |job| format!("job {}", job.get(..12).unwrap_or(job)));
        let new = NewInvoice {
            amount_msat,
            memo: format!("coinop: {what}"),
            expiry_s: u32::try_from(self.quote_ms / 1_000).unwrap_or(u32::MAX),
            description_hash: None,
        };
        let mut pauses = TRIES_AFTER.into_iter();
        let (made, hold) = loop {
            let made = match (job, lasts_ms) {
                (Some(job), Some(lasts_ms)) => self.hold_or_plain(job, lasts_ms, new.clone()).await,
                _ => self.wallet.make_invoice(&new).await.map(|made| (made, None)),
            };
            match (made, pauses.next()) {
                // It could not be asked, or had too much to do. One whose answer was lost is nobody's, and expires.
                (Err(error), Some(pause)) if is_passing(&error) => {
                    tracing::debug!(%error, "an invoice is tried again");
                    let told = match error {
                        wallet::Error::Busy { retry_after_s, .. } => retry_after_s.unwrap_or(0),
                        _ => 0,
                    };
                    tokio::time::sleep(Duration::from_secs(told).clamp(pause, TRIES_AFTER[2])).await;
                }
                (made, _) => break made?,
            }
        };
        self.note_network(&made);
        let payment_hash = made.payment_hash.to_hex();
        // In this order: what is taken out of `made` is on record by then.
        let new = self.made().insert(payment_hash.clone());
        if !new || store.invoice(&payment_hash)?.is_some() {
            return Err(Error::GivenBefore(payment_hash));
        }
        Ok(record::Invoice {
            payment_hash,
            bolt11: made.bolt11,
            customer: customer.to_owned(),
            amount_msat: made.amount_msat,
            expires_ms: made.expires_at_s.saturating_mul(1_000),
            wallet: self.name.clone(),
            job: job.map(str::to_owned),
            hold,
        })
    }

    /// A hold invoice where the wallet has them and locks for long enough, with its nonce; else a plain one.
    async fn hold_or_plain(
        &self,
        job: &str,
        lasts_ms: u64,
        new: NewInvoice,
    ) -> Result<(wallet::Invoice, Option<String>), wallet::Error> {
        let asked = async || self.wallet.abilities().await.map(|can| can.hold);
        if let (Some(Holds { key, make: true }), Some(lock_blocks)) = (&self.holds, locks::blocks(lasts_ms))
            && *self.can_hold.get_or_try_init(asked).await?
        {
            let nonce = HoldKey::nonce();
            let payment_hash = key.preimage(job, &nonce).payment_hash();
            let hold = NewHold { payment_hash, lock_blocks, invoice: new.clone() };
            match self.wallet.make_hold_invoice(&hold).await {
                Ok(made) => match wallet::read_bolt11(&made.bolt11)?.lock_blocks {
                    locked if locked >= lock_blocks => return Ok((made, Some(nonce))),
                    locked => {
                        tracing::warn!(locked, lock_blocks, "the wallet's lock may end before the job does");
                        // Nobody has seen this one.
                        if let Err(error) = self.wallet.cancel_hold(&payment_hash).await {
                            tracing::debug!(%error, "it is left to expire");
                        }
                    }
                },
                // It says that it has them, and that we may not.
                Err(
                    error @ (wallet::Error::Unsupported { .. }
                    | wallet::Error::Denied(_)
                    | wallet::Error::Said { .. }),
                ) => tracing::warn!(%error, "no hold invoice; a plain one is asked for"),
                Err(error) => return Err(error),
            }
        }
        Ok((self.wallet.make_invoice(&new).await?, None))
    }

    /// Warns when the wallet begins to make invoices that are paid in no real money.
    fn note_network(&self, made: &wallet::Invoice) {
        let is_test = is_test_network(&made.bolt11);
        if is_test && !self.test_network.swap(is_test, Ordering::Relaxed) {
            tracing::warn!(
                wallet = %self.wallet.identity(),
                "the wallet makes invoices for a test network: what customers pay is not bitcoin"
            );
        }
    }

    /// Whether the wallet's last invoice was for a test network.
    pub fn is_test_network(&self) -> bool {
        self.test_network.load(Ordering::Relaxed)
    }

    /// Invoices whose look-ups keep failing: a payment to them would not be seen.
    pub fn unanswered(&self) -> Vec<Unanswered> {
        self.lookups.unanswered()
    }

    /// What takes a hold invoice of ours; `None` when it was made with another key.
    pub(super) fn preimage(&self, invoice: &record::Invoice) -> Option<Preimage> {
        let (key, job, nonce) = (&self.holds.as_ref()?.key, invoice.job.as_ref()?, invoice.hold.as_ref()?);
        let preimage = key.preimage(job, nonce);
        (preimage.payment_hash().to_hex() == invoice.payment_hash).then_some(preimage)
    }

    /// A job is over: what is locked for it is to be given back.
    pub(super) fn look_over(&self) {
        self.over.notify_one();
    }

    pub(super) async fn forget(&self, payment_hash: PaymentHash) {
        self.lookups.forget(payment_hash).await;
    }

    fn made(&self) -> MutexGuard<'_, HashSet<String>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at this invoice, which is on record, until it is paid or given up.
    pub fn follow(&self, invoice: &record::Invoice) {
        self.made().remove(&invoice.payment_hash);
        let left = Duration::from_millis(invoice.expires_ms.saturating_sub(crate::clock::now_ms()));
        match invoice.payment_hash.parse::<PaymentHash>() {
            Ok(hash) => {
                if let Err(error) = self.lookups.follow(hash, Instant::now().checked_add(left)) {
                    // It is open in the store: the sweep names it again.
                    tracing::warn!(hash = %invoice.payment_hash, %error, "an invoice is not followed yet");
                }
            }
            Err(error) => tracing::error!(hash = %invoice.payment_hash, %error, "not a payment hash"),
        }
    }

    /// Somebody says that an invoice may be paid (a zap receipt, a notification): look soon. Proves nothing.
    pub fn nudge(&self, payment_hash: &str) {
        if let Ok(hash) = payment_hash.parse() {
            self.lookups.nudge(hash);
        }
    }
}

/// Takes what the wallet says about our invoices to the dispatcher, gives up those that are long dead, and gives back
/// what is locked for jobs that are over. Ends with the look-ups.
pub async fn watch(
    till: Arc<Till>,
    ledger: Ledger,
    mut found: mpsc::Receiver<Found>,
    clock: crate::clock::Clock,
    engine: Engine,
) {
    let learning = async {
        while let Some(change) = found.recv().await {
            learn(&ledger, change.payment_hash, &change.state, &engine).await;
        }
    };
    let sweeping = async {
        let mut sweep = tokio::time::interval(SWEEP);
        loop {
            sweep.tick().await;
            match tokio::time::timeout(LOOK, give_up(&till, &ledger, clock(), &engine)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "dead invoices were not given up"),
                Err(_) => tracing::info!("not all dead invoices were given up; the next sweep goes on"),
            }
        }
    };
    let giving_back = async {
        let mut pause = SWEEP;
        loop {
            let left = match locks::give_back(&till, &ledger, clock(), &engine).await {
                Ok(left) => left,
                Err(error) => {
                    tracing::warn!(%error, "what is locked was not given back");
                    true
                }
            };
            pause = match left {
                true if pause == SWEEP => AGAIN,
                true => (pause * 2).min(SWEEP / 2),
                false => SWEEP,
            };
            tokio::select! {
                () = till.over.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    };
    tokio::select! {
        () = learning => {}
        () = sweeping => {}
        () = giving_back => {}
    }
}

/// What a state means for the dispatcher, if it means anything.
pub(super) async fn learn(ledger: &Ledger, payment_hash: PaymentHash, state: &State, engine: &Engine) {
    let (told_msat, locked) = match *state {
        State::Settled { received_msat, .. } => (received_msat, false),
        State::Held { amount_msat } => (amount_msat, true),
        State::Unknown | State::Pending | State::Expired | State::Failed => return,
    };
    let hash = payment_hash.to_hex();
    match ledger.store().invoice(&hash) {
        Ok(Some((_, InvoiceState::Paid))) => {}
        Ok(Some((invoice, _))) if locked && invoice.hold.is_none() => {
            tracing::error!(%hash, "the wallet calls an invoice locked that is no hold invoice");
        }
        // One that was given up counts as well: the money has come.
        Ok(Some((invoice, InvoiceState::Open | InvoiceState::Closed))) => {
            let received_msat = told_msat.unwrap_or(invoice.amount_msat);
            if received_msat == 0 {
                // Nothing has come, whatever the wallet calls it.
                return tracing::error!(%hash, "the wallet calls an invoice paid and has received nothing");
            }
            tracing::info!(%hash, received_msat, locked, customer = %invoice.customer, "an invoice was paid");
            engine.paid(Paid { invoice: invoice.into(), received_msat, locked }).await;
        }
        Ok(None) => tracing::error!(%hash, "the wallet speaks of an invoice that is not ours"),
        Err(error) => tracing::error!(%hash, %error, "a payment waits for the next start"),
    }
}

/// Whether the same question may be answered in a moment.
fn is_passing(error: &wallet::Error) -> bool {
    matches!(error, wallet::Error::Busy { .. } | wallet::Error::Unreachable(_) | wallet::Error::Cut(_))
}

/// Whether an invoice asks for coins of a test network.
pub(super) fn is_test_network(bolt11: &str) -> bool {
    wallet::read_bolt11(bolt11).is_ok_and(|terms| !terms.is_mainnet)
}

/// Why the dead are not given up.
#[derive(Debug, thiserror::Error)]
enum Kept {
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    #[error(transparent)]
    Wallet(#[from] wallet::Error),
}

impl From<store::Error> for Kept {
    fn from(error: store::Error) -> Kept {
        Kept::Ledger(error.into())
    }
}

/// Closes what is long dead, each after a last look: it may have been paid while nobody was there to see it.
async fn give_up(till: &Till, ledger: &Ledger, now_ms: u64, engine: &Engine) -> Result<(), Kept> {
    let mut dead = Vec::new();
    for invoice in ledger.store().unpaid()? {
        if invoice.expires_ms.saturating_add(AFTER_EXPIRY_MS) > now_ms {
            till.follow(&invoice);
        } else if invoice.wallet == till.name {
            // What another wallet has made stays open until that one can be asked.
            dead.extend(invoice.payment_hash.parse::<PaymentHash>());
        }
    }
    let mut looks = futures_util::stream::iter(dead)
        .map(|hash| async move { (hash, till.wallet.look_up(&hash).await) })
        .buffer_unordered(LAST_LOOKS);
    let mut failures = 0;
    while let Some((hash, looked)) = looks.next().await {
        match looked.map(|looked| looked.state) {
            Ok(state @ State::Settled { .. }) => learn(ledger, hash, &state, engine).await,
            Ok(State::Held { .. }) => {}
            // One that the wallet cannot speak of keeps no other waiting, however many there are.
            Err(error) => {
                till.lookups.failed(hash, &error);
                failures += usize::from(!error.is_unusable());
                if failures > LAST_LOOKS {
                    return Err(error.into());
                }
            }
            Ok(State::Unknown | State::Pending | State::Expired | State::Failed) => {
                let (payment_hash, reason) = (hash.to_hex(), "it expired unpaid".to_owned());
                ledger.commit(vec![Record::InvoiceClosed { payment_hash, reason }]).await?;
                till.lookups.forget(hash).await;
            }
        }
    }
    Ok(())
}
