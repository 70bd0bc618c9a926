//! A wallet behind NIP-47 (Nostr Wallet Connect): any wallet that gave us a connection line. Requests and answers are
//! events between two keys over the wallet's relays (`nwc/link.rs`); amounts are msat on both sides.

mod link;
mod message;
mod said;
mod transaction;
mod uri;

use serde_json::{Value, json};
use tokio::sync::broadcast;

use self::link::Link;
use self::transaction::Transaction;
pub use self::uri::Uri;
use super::paying::{self, Unpaid};
use super::{
    Abilities, Cursor, Direction, Error, Hint, Identity, Invoice, Kind, Limits, Lookup, NewHold, NewInvoice,
    Outgoing, Page, Pay, PayError, Payment, PaymentHash, Preimage, State, Terms, Unreadable, Wallet, bolt11,
    lenient,
};
use crate::clock::Clock;

/// Entries of one page of history: an encrypted answer holds 64 KiB.
const MAX_PAGE: u32 = 20;

/// One connection to one wallet.
pub struct Nwc {
    link: Link,
    limits: Limits,
    clock: Clock,
}

impl std::fmt::Debug for Nwc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Nwc({:?})", self.link.uri())
    }
}

impl Nwc {
    /// Begins to connect, on the current tokio runtime, and keeps connected until it is dropped.
    pub fn start(uri: Uri, limits: Limits, clock: Clock) -> Result<Self, Error> {
        Ok(Self { link: Link::start(uri, limits.clone(), clock.clone())?, limits, clock })
    }

    fn now_s(&self) -> u64 {
        (self.clock)() / 1000
    }

    async fn ask(&self, method: &'static str, params: Value) -> Result<Value, Error> {
        self.link.ask(method, params, self.limits.call).await
    }

    /// What the wallet has under this hash; `None` where it has nothing. `ours`: its direction where the wallet says
    /// none, of an invoice that we have made.
    async fn transaction(
        &self,
        payment_hash: &PaymentHash,
        ours: Option<Direction>,
    ) -> Result<Option<Transaction>, Error> {
        match self.ask("lookup_invoice", json!({ "payment_hash": payment_hash.to_hex() })).await {
            Err(Error::Said { code, .. }) if code == "NOT_FOUND" => Ok(None),
            found => Transaction::about(&found?, *payment_hash, ours).map(Some),
        }
    }

    async fn invoice(
        &self,
        method: &'static str,
        new: &NewInvoice,
        hold: Option<&NewHold>,
    ) -> Result<Invoice, Error> {
        bolt11::askable(new)?;
        let mut params = json!({ "amount": new.amount_msat, "expiry": new.expiry_s });
        if let Some(params) = params.as_object_mut() {
            match new.description_hash {
                Some(hash) => params.insert("description_hash".into(), hex::encode(hash).into()),
                None => params.insert("description".into(), bolt11::memo(&new.memo).into()),
            };
            if let Some(hold) = hold {
                params.insert("payment_hash".into(), hold.payment_hash.to_hex().into());
                params.insert("min_cltv_expiry_delta".into(), hold.lock_blocks.into());
            }
        }
        let answer = self.ask(method, params).await?;
        let text = |name: &str| lenient::text(&answer, name);
        let bolt11 = text("invoice").ok_or_else(|| Error::Nonsense("an answer without invoice".into()))?;
        let hash = hold.map(|hold| hold.payment_hash);
        bolt11::accept(bolt11, text("payment_hash"), new, hash, self.now_s())
    }

    async fn send(&self, order: &Pay, terms: &Terms) -> Result<Outgoing, Error> {
        let params = json!({ "invoice": order.bolt11 });
        let answer = self.link.ask("pay_invoice", params, self.limits.pay).await?;
        let preimage = lenient::text(&answer, "preimage").and_then(Preimage::from_hex);
        let Some(preimage) = preimage.filter(|preimage| preimage.payment_hash() == terms.payment_hash) else {
            let asked = terms.payment_hash.to_hex();
            return Err(Error::Lie {
                what: "preimage",
                asked,
                got: "none, or one of another payment".into(),
            });
        };
        Ok(Outgoing::Paid(Payment {
            payment_hash: terms.payment_hash,
            amount_msat: order.amount_msat,
            fee_msat: lenient::fee(&answer, "fees_paid").unwrap_or_default(),
            preimage: Some(preimage),
        }))
    }
}

#[async_trait::async_trait]
impl Wallet for Nwc {
    fn identity(&self) -> Identity {
        Identity { kind: Kind::Nwc, host: self.link.uri().hosts() }
    }

    async fn abilities(&self) -> Result<Abilities, Error> {
        let info = self.link.info(self.limits.call).await?;
        let can = |methods: &[&str]| methods.iter().all(|method| info.can(method));
        Ok(Abilities {
            receive: can(&["make_invoice", "lookup_invoice"]),
            pay: can(&["pay_invoice", "lookup_invoice"]),
            history: can(&["list_transactions"]),
            hold: can(&["make_hold_invoice", "settle_hold_invoice", "cancel_hold_invoice", "lookup_invoice"]),
            hints: info.notifies,
            // Some services find only what came in by `lookup_invoice`, and none says so.
            outgoing: false,
        })
    }

    async fn make_invoice(&self, new: &NewInvoice) -> Result<Invoice, Error> {
        self.invoice("make_invoice", new, None).await
    }

    async fn look_up(&self, payment_hash: &PaymentHash) -> Result<Lookup, Error> {
        let found = self.transaction(payment_hash, Some(Direction::In)).await?;
        let state = match found {
            Some(found) if found.direction != Direction::Out => found.state(self.now_s()),
            _ => State::Unknown,
        };
        Ok(Lookup { payment_hash: *payment_hash, state })
    }

    async fn pay(&self, order: &Pay) -> Result<Payment, PayError> {
        paying::once(self, order, self.now_s(), |terms| async move {
            self.send(order, &terms).await.map_err(Unpaid::After)
        })
        .await
    }

    async fn outgoing(&self, payment_hash: &PaymentHash) -> Result<Outgoing, Error> {
        Ok(match self.transaction(payment_hash, None).await? {
            Some(found) if found.direction == Direction::Out => found.outgoing(),
            _ => Outgoing::Unknown,
        })
    }

    async fn balance_msat(&self) -> Result<i64, Error> {
        let answer = self.ask("get_balance", json!({})).await?;
        let balance = transaction::amount(&answer, "balance")?;
        let balance = balance.ok_or_else(|| Error::Nonsense("an answer without balance".into()))?;
        i64::try_from(balance).map_err(|_| Error::Nonsense("a balance out of bounds".into()))
    }

    async fn history(&self, at: &Cursor, limit: u32) -> Result<Page, Error> {
        let limit = limit.clamp(1, MAX_PAGE);
        let params = json!({
            "from": at.from_s, "until": at.until_s, "offset": at.offset, "limit": limit, "unpaid": true,
        });
        let answer = self.ask("list_transactions", params).await?;
        let list = answer.get("transactions").and_then(Value::as_array);
        let list = list.ok_or_else(|| Error::Nonsense("an answer without transactions".into()))?;
        if list.len() > usize::try_from(limit).unwrap_or(usize::MAX) {
            return Err(Error::Nonsense("more transactions than asked for".into()));
        }
        let now_s = self.now_s();
        let (mut items, mut unreadable) = (Vec::new(), Vec::new());
        for one in list {
            match Transaction::read(one).and_then(|read| read.movement(now_s)) {
                Ok(movement) => items.push(movement),
                Err(error) => unreadable.push(Unreadable {
                    payment_hash: lenient::text(one, "payment_hash").and_then(|hash| hash.parse().ok()),
                    why: error.to_string(),
                }),
            }
        }
        // A wallet may answer with less than was asked for: only an empty page is the end.
        let offset = at.offset.saturating_add(list.len() as u64);
        let next = (!list.is_empty()).then(|| Cursor { offset, ..at.clone() });
        Ok(Page { items, unreadable, next })
    }

    fn hints(&self) -> Option<broadcast::Receiver<Hint>> {
        Some(self.link.hints())
    }

    async fn make_hold_invoice(&self, new: &NewHold) -> Result<Invoice, Error> {
        self.invoice("make_hold_invoice", &new.invoice, Some(new)).await
    }

    async fn settle_hold(&self, preimage: &Preimage) -> Result<(), Error> {
        let why = match self.ask("settle_hold_invoice", json!({ "preimage": preimage.to_hex() })).await {
            Ok(_) => return Ok(()),
            Err(why) => why,
        };
        // Perhaps it was done before, or its answer was lost.
        match self.look_up(&preimage.payment_hash()).await {
            Ok(Lookup { state: State::Settled { .. }, .. }) => Ok(()),
            _ => Err(why),
        }
    }

    async fn cancel_hold(&self, payment_hash: &PaymentHash) -> Result<(), Error> {
        let params = json!({ "payment_hash": payment_hash.to_hex() });
        let why = match self.ask("cancel_hold_invoice", params).await {
            Ok(_) => return Ok(()),
            Err(why) => why,
        };
        match self.look_up(payment_hash).await {
            Ok(Lookup { state: State::Failed, .. }) => Ok(()),
            _ => Err(why),
        }
    }
}
