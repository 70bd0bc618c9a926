//! The owner's desk: what the command line may order about money, whether it comes over the socket of a running node or
//! the node stands still. It keeps the order of things (credit leaves the books before sats leave the wallet); the rules
//! are the ledger's.

mod reconcile;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use nostr_sdk::prelude::{Keys, PublicKey};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::clock::Clock;
use crate::job::{Engine, Till, till};
use crate::ledger::{self, Committed, Ledger, transfer};
use crate::store::money::{Account, Transfer, Why};
use crate::store::record::Record;
use crate::store::{self, InvoiceState, Posted, Restored};
use crate::wallet::{self, Outgoing, Pay, PayError};

/// Most transfers in one answer.
const HISTORY_MOST: usize = 5_000;
/// Most customers in one answer: they fit the control socket's cap.
pub const LIST_MOST: usize = 5_000;

/// An order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// What customers have here: at most [`LIST_MOST`] of them, in the order of their keys, those after this one.
    List {
        #[serde(default)]
        after: Option<String>,
    },
    /// What one customer (hex) has here.
    Show {
        customer: String,
    },
    History {
        customer: String,
        limit: usize,
    },
    /// `id` makes a repeated order the same one.
    Grant {
        id: String,
        customer: String,
        msat: u64,
        note: String,
    },
    WriteOff {
        id: String,
        customer: String,
        msat: u64,
        note: String,
    },
    /// Undoes a transfer by another one, as far as the rules allow it.
    Correct {
        transfer: String,
        note: String,
    },
    /// An invoice that tops up a customer's credit.
    TopUp {
        customer: String,
        msat: u64,
    },
    /// Whether an invoice of ours was paid.
    Invoice {
        payment_hash: String,
    },
    /// Pays a customer's invoice out of its credit; the fee is ours.
    Refund {
        customer: String,
        bolt11: String,
        max_fee_msat: u64,
    },
    /// Signs the head of the log now.
    Seal,
    /// Holds the wallet's own list of payments made in `[from_ms, to_ms)` against the books; `book` puts right what
    /// can be.
    Reconcile {
        from_ms: u64,
        to_ms: u64,
        book: bool,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Till(#[from] till::Error),
    #[error(transparent)]
    Wallet(#[from] wallet::Error),
    #[error(transparent)]
    Seal(#[from] ledger::SealError),
    /// In a log that an older version wrote.
    #[error("{what} is {msat} msat, more than can be counted")]
    OutOfBounds { what: &'static str, msat: i128 },
    #[error(
        "these books were restored from a backup: refunds wait until `coinop ledger reconcile --book` has compared them with the wallet"
    )]
    Restored,
    #[error("this node has no wallet: set payment.wallet (docs/wallets.md)")]
    NoWallet,
    #[error("there is no transfer {0:?}")]
    NoTransfer(String),
    #[error("{0} is not a customer's key (64 hex digits)")]
    NoCustomer(String),
    #[error("the invoice is over {msat} msat, and {available_msat} msat of credit are there")]
    TooMuch { msat: u64, available_msat: i128 },
    #[error("not paid: {0}; the credit is back")]
    NotPaid(String),
    #[error("perhaps paid, {0}; the credit is set aside until the wallet says which")]
    InDoubt(String),
    #[error(
        "a refund to this invoice was tried before and failed ({0}); the credit is back, and another one needs another invoice"
    )]
    Before(String),
    #[error(
        "the wallet's history did not end within {limit_s} s ({read} entries were read): narrow it by --from and --to"
    )]
    TooLong { limit_s: u64, read: u64 },
}

/// The desk of one node.
#[derive(Clone)]
pub struct Desk {
    pub ledger: Ledger,
    pub till: Option<Arc<Till>>,
    pub clock: Clock,
    /// The node's, to sign heads of the log with.
    keys: Keys,
    /// One refund at a time.
    paying: Arc<Mutex<()>>,
    /// Of the node that runs on these books, if one does.
    engine: Arc<OnceLock<Engine>>,
}

impl Desk {
    pub fn new(ledger: Ledger, till: Option<Arc<Till>>, keys: Keys, clock: Clock) -> Desk {
        Desk { ledger, till, clock, keys, paying: Arc::default(), engine: Arc::default() }
    }

    /// From now on payments that are found go the way of all payments: to this engine.
    pub fn attach(&self, engine: Engine) {
        if self.engine.set(engine).is_err() {
            tracing::error!("two engines on the same books");
        }
    }

    /// Carries an order out; the answer is for programs as it is.
    ///
    /// # Errors
    /// Why not, in a sentence for the owner. What was begun is in the books and is ended by [`Desk::resume`].
    pub async fn serve(&self, order: Order) -> Result<Value, Error> {
        match order {
            Order::List { after } => self.list(after.as_deref()),
            Order::Show { customer } => self.show(&key(customer)?, &self.unanswered()?),
            Order::History { customer, limit } => {
                let postings = self.ledger.store().postings(&key(customer)?, limit.min(HISTORY_MOST))?;
                Ok(json!(postings))
            }
            Order::Grant { id, customer, msat, note } => {
                let customer = key(customer)?;
                self.post(transfer::grant(&id, &customer, msat, &note), &customer).await
            }
            Order::WriteOff { id, customer, msat, note } => {
                let customer = key(customer)?;
                self.post(transfer::written_off(&id, &customer, msat, &note), &customer).await
            }
            Order::Correct { transfer, note } => {
                let first = self.ledger.transfer(&transfer)?.ok_or(Error::NoTransfer(transfer))?.transfer;
                let correction = transfer::correction(&first, &note);
                let id = correction.id.clone();
                self.ledger.post(correction).await?;
                Ok(json!(self.ledger.transfer(&id)?))
            }
            Order::TopUp { customer, msat } => self.top_up(&key(customer)?, msat).await,
            Order::Invoice { payment_hash } => {
                if let Some(till) = &self.till {
                    till.nudge(&payment_hash);
                }
                let found = self.ledger.store().invoice(&payment_hash)?;
                Ok(
                    json!({ "state": found.as_ref().map(|(_, state)| state), "invoice": found.map(|(i, _)| i) }),
                )
            }
            Order::Refund { customer, bolt11, max_fee_msat } => {
                self.refund(&key(customer)?, &bolt11, max_fee_msat).await
            }
            Order::Seal => Ok(json!(self.seal().await?)),
            Order::Reconcile { from_ms, to_ms, book } => self.reconcile(from_ms, to_ms, book).await,
        }
    }

    async fn seal(&self) -> Result<ledger::Seal, ledger::SealError> {
        self.ledger.seal(&self.keys, (self.clock)() / 1_000).await
    }

    /// Signs the head of the log where that is a day ago and money has moved.
    ///
    /// # Errors
    /// The store's.
    pub async fn seal_daily(&self) -> Result<(), ledger::SealError> {
        if self.ledger.seal_due((self.clock)() / 1_000)? {
            self.seal().await?;
        }
        Ok(())
    }

    fn list(&self, after: Option<&str>) -> Result<Value, Error> {
        let unanswered = self.unanswered()?;
        let credits = self.ledger.store().balances()?.into_iter().filter_map(|(account, _)| match account {
            Account::Credit(customer) => Some(customer),
            _ => None,
        });
        // Who has nothing yet may have paid, and nobody has seen it.
        let all: BTreeSet<String> = credits.chain(unanswered.keys().cloned()).collect();
        let page = all.iter().filter(|customer| after.is_none_or(|after| customer.as_str() > after));
        let rows = page.take(LIST_MOST).map(|customer| self.show(customer, &unanswered));
        rows.collect::<Result<Vec<_>, _>>().map(Value::Array)
    }

    fn show(&self, customer: &str, unanswered: &BTreeMap<String, Vec<Value>>) -> Result<Value, Error> {
        let purse = self.ledger.purse(customer)?;
        let mut shown = json!({
            "customer": customer,
            "available_msat": number("what a customer has", purse.available_msat)?,
            "held_msat": number("what is held", purse.held_msat)?,
            "refunding_msat": number("what is on its way back", purse.refunding_msat)?,
        });
        if let (Some(fields), Some(invoices)) = (shown.as_object_mut(), unanswered.get(customer)) {
            fields.insert("unanswered".into(), json!(invoices));
        }
        Ok(shown)
    }

    /// Invoices that the wallet does not answer for, by customer.
    fn unanswered(&self) -> Result<BTreeMap<String, Vec<Value>>, Error> {
        let mut by_customer: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        for one in self.till.iter().flat_map(|till| till.unanswered()) {
            let payment_hash = one.payment_hash.to_hex();
            let Some((invoice, InvoiceState::Open)) = self.ledger.store().invoice(&payment_hash)? else {
                continue;
            };
            by_customer.entry(invoice.customer).or_default().push(json!({
                "payment_hash": payment_hash,
                "amount_msat": invoice.amount_msat,
                "failures": one.failures,
                "error": one.error,
            }));
        }
        Ok(by_customer)
    }

    async fn post(&self, transfer: Transfer, customer: &str) -> Result<Value, Error> {
        let id = transfer.id.clone();
        let (entry, again) = match self.ledger.post(transfer).await? {
            Committed::New(entry) => (entry, false),
            Committed::Again(entry) => (entry, true),
        };
        let mut shown = self.show(customer, &BTreeMap::new())?;
        if let Some(fields) = shown.as_object_mut() {
            fields.extend([
                ("transfer".to_owned(), json!(id)),
                ("entry".to_owned(), json!(entry)),
                ("again".to_owned(), json!(again)),
            ]);
        }
        Ok(shown)
    }

    async fn top_up(&self, customer: &str, msat: u64) -> Result<Value, Error> {
        let till = self.till.as_ref().ok_or(Error::NoWallet)?;
        let invoice = till.invoice(self.ledger.store(), customer, msat, None, (self.clock)()).await?;
        self.ledger.commit(vec![Record::Invoiced(invoice.clone())]).await?;
        till.follow(&invoice);
        Ok(json!(invoice))
    }

    // === refunds

    async fn refund(&self, customer: &str, bolt11: &str, max_fee_msat: u64) -> Result<Value, Error> {
        let till = self.till.as_ref().ok_or(Error::NoWallet)?;
        let terms = wallet::read_bolt11(bolt11)?;
        let hash = terms.payment_hash.to_hex();
        let refused = |why: &str| Err(wallet::Error::Invoice(why.into()).into());
        let Some(msat) = terms.amount_msat else { return refused("it names no amount") };
        self.compared()?;
        let begun = transfer::refund_begun(&hash, customer, msat, bolt11, max_fee_msat);
        // The same order again goes on from where the first one is, also when its invoice has expired meanwhile.
        if self.ledger.transfer(&begun.id)?.is_none() {
            if terms.expires_at_s <= (self.clock)() / 1_000 {
                return refused("it has expired");
            }
            let available_msat = self.ledger.purse(customer)?.available_msat;
            if available_msat < i128::from(msat) {
                return Err(Error::TooMuch { msat, available_msat });
            }
            // A wallet that cannot be asked now is not asked to pay, and no credit is set aside.
            till.wallet().outgoing(&terms.payment_hash).await?;
        }
        let again = matches!(self.ledger.post(begun.clone()).await?, Committed::Again(_));
        self.pay(till, &begun, again).await?;
        let end = self.ledger.transfer(&transfer::refunded_id(&hash))?.map(|end| end.transfer.why);
        let fee_msat = match end {
            Some(Why::RefundFailed { reason, .. }) => return Err(Error::Before(reason)),
            Some(Why::RefundPaid { fee_msat, .. }) => Some(fee_msat),
            _ => None,
        };
        let mut shown = self.show(customer, &BTreeMap::new())?;
        if let Some(fields) = shown.as_object_mut() {
            fields.extend([
                ("payment_hash".to_owned(), json!(hash)),
                ("again".to_owned(), json!(again)),
                ("fee_msat".to_owned(), json!(fee_msat)),
                ("fee_over_max".to_owned(), json!(fee_msat.is_some_and(|fee| fee > max_fee_msat))),
            ]);
        }
        Ok(shown)
    }

    /// # Errors
    /// [`Error::Restored`] as long as the books are those of a backup: what was refunded after it would be refunded again.
    fn compared(&self) -> Result<(), Error> {
        match Restored::read(self.ledger.store().dir())? {
            None => Ok(()),
            Some(_) => Err(Error::Restored),
        }
    }

    /// Ends refunds that an earlier life began, or that a wallet left in doubt.
    pub async fn resume(&self) {
        let Some(till) = &self.till else { return };
        match self.compared() {
            Ok(()) => {}
            Err(Error::Restored) => return tracing::debug!("refunds wait for a comparison with the wallet"),
            Err(error) => return tracing::warn!(%error, "refunds in doubt stay so"),
        }
        let begun = match self.ledger.store().refunds() {
            Ok(begun) => begun,
            Err(error) => return tracing::warn!(%error, "refunds in doubt stay so"),
        };
        for Posted { transfer, .. } in begun {
            if let Err(error) = self.pay(till, &transfer, true).await {
                tracing::warn!(transfer = %transfer.id, %error, "a refund");
            }
        }
    }

    /// Pays what a begun refund says, at most once, and books the end of it. `again`: it may have been sent before.
    async fn pay(&self, till: &Till, begun: &Transfer, again: bool) -> Result<(), Error> {
        let (Why::RefundBegun { payment_hash, bolt11, max_fee_msat }, Some(customer)) =
            (&begun.why, begun.customer())
        else {
            return Ok(());
        };
        let msat = begun.legs.iter().map(|leg| leg.msat).sum();
        let order = Pay { bolt11: bolt11.clone(), amount_msat: msat, max_fee_msat: *max_fee_msat };
        let paid = |fee_msat| {
            if fee_msat > *max_fee_msat {
                tracing::warn!(
                    payment_hash,
                    fee_msat,
                    max_fee_msat,
                    "the wallet took more than the highest fee for a refund"
                );
            }
            transfer::refund_paid(payment_hash, customer, till.name(), msat, fee_msat)
        };
        let failed = |why: &str| transfer::refund_failed(payment_hash, customer, msat, why);
        let _one = self.paying.lock().await;
        // Whoever had the lock before may have ended it.
        if self.ledger.transfer(&transfer::refunded_id(payment_hash))?.is_some() {
            return Ok(());
        }
        // What was tried before is asked for first. Of a first try the wallet itself looks before it sends, and what fails
        // there was refused.
        let looked =
            if again { till.wallet().outgoing(&payment_hash.parse()?).await } else { Ok(Outgoing::Failed) };
        let untold = match looked {
            Ok(Outgoing::Paid(payment)) => {
                self.ledger.post(paid(payment.fee_msat)).await?;
                return Ok(());
            }
            Ok(Outgoing::Pending) => return Err(Error::InDoubt("it is under way".into())),
            Ok(Outgoing::Unknown) => true,
            Ok(Outgoing::Failed) => false,
            Err(error) => return Err(Error::InDoubt(error.to_string())),
        };
        match till.wallet().pay(&order).await {
            Ok(payment) => {
                self.ledger.post(paid(payment.fee_msat)).await?;
                Ok(())
            }
            // A no to this try says nothing of an earlier one, where the wallet does not tell of all that it has sent.
            Err(PayError::Refused(why)) if untold && !tells(till).await? => {
                Err(Error::InDoubt(format!("an earlier try is not told of, and now: {why}")))
            }
            Err(PayError::Refused(why)) => {
                self.ledger.post(failed(&why.to_string())).await?;
                Err(Error::NotPaid(why.to_string()))
            }
            Err(PayError::InDoubt { why, .. }) => Err(Error::InDoubt(why.to_string())),
        }
    }
}

/// Whether the wallet surely tells of every payment that it has sent.
async fn tells(till: &Till) -> Result<bool, Error> {
    match till.wallet().abilities().await {
        Ok(abilities) => Ok(abilities.outgoing),
        Err(error) => Err(Error::InDoubt(error.to_string())),
    }
}

/// A sum as JSON holds it.
fn number(what: &'static str, msat: i128) -> Result<i64, Error> {
    i64::try_from(msat).map_err(|_| Error::OutOfBounds { what, msat })
}

fn key(text: String) -> Result<String, Error> {
    match PublicKey::parse(&text) {
        Ok(key) => Ok(key.to_hex()),
        Err(_) => Err(Error::NoCustomer(text.chars().take(80).collect())),
    }
}
