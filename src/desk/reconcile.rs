//! Walking the wallet's own list of payments and holding it against the books; putting right what can be, by the same
//! transfers that the till and the refunds make. What a difference is, is `ledger::reconcile`'s to say.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value, json};

use super::{Desk, Error, number};
use crate::job::Till;
use crate::job::till::{GRACE_MS, Paid};
use crate::ledger::reconcile::{
    Difference, Judged, Known, Outcome, Row, Seen, Stage, Unreadable, Way, What, claim, judge,
};
use crate::ledger::{self, transfer};
use crate::store::money::{Account, Transfer, Why};
use crate::store::record::{self, Record};
use crate::store::{self, Entry, InvoiceState, Restored};
use crate::wallet::{self, Cursor, Direction, Movement, Outgoing, Page, PaymentHash, State};

/// Entries asked for at once.
const PAGE: u32 = 100;
/// Who asks over the control socket does not wait for longer.
const WALK: Duration = Duration::from_secs(60);
/// Payments that are asked for by their hash at once, and in one comparison; further ones are called unasked.
const ASKED_AT_ONCE: usize = 8;
const ASKED_MAX: usize = 2_000;
/// How long the engine may take to book a payment that it was told of.
const BOOKING: Duration = Duration::from_secs(10);
/// What was sent before an invoice expired may be under way for as long after it, seconds.
const UNDER_WAY_S: u64 = 86_400;
/// Pause before a wallet is asked again that was asked too often.
const BUSY: Duration = Duration::from_secs(3);
/// A wallet's clock may be ahead of ours by as much, seconds.
const AHEAD_S: u64 = 86_400;

/// One thing that the books say of the wallet.
struct Claim {
    payment_hash: String,
    way: Way,
    msat: u64,
    at_ms: u64,
    id: String,
}

impl Desk {
    pub(super) async fn reconcile(&self, from_ms: u64, to_ms: u64, book: bool) -> Result<Value, Error> {
        let till = self.till.as_ref().ok_or(Error::NoWallet)?;
        let account = Account::Wallet(till.name().to_owned());
        let latest_s = ((self.clock)() / 1_000).saturating_add(AHEAD_S);
        let until_s = (to_ms.saturating_sub(1) / 1_000).min(latest_s);
        let (mut outcome, mut seen) = (Outcome::default(), Seen::default());
        let until = Instant::now() + WALK;
        // What moved nothing waits for the end: of a failed try and a later one that went through, the latter counts,
        // in whatever order they come.
        let mut idle: HashMap<(Way, String), Row> = HashMap::new();
        let dir = self.ledger.store().dir().to_path_buf();
        let restored = Restored::read(&dir)?;
        let lost = match &restored {
            Some(restored) if book => lost(restored.clone(), dir.clone()).await,
            _ => Lost::default(),
        };
        let mut at = Some(Cursor::window(from_ms.div_ceil(1_000), until_s));
        while let Some(cursor) = at {
            if Instant::now() > until {
                return Err(Error::TooLong { limit_s: WALK.as_secs(), read: outcome.read });
            }
            let page = history(till, &cursor, until).await?;
            for odd in page.unreadable {
                let payment_hash = odd.payment_hash.map(|hash| hash.to_hex());
                outcome.add_unreadable(Unreadable { payment_hash, why: odd.why });
            }
            for movement in &page.items {
                let row = row(movement);
                let key = (row.way, row.payment_hash.clone());
                if row.stage != Stage::Settled {
                    let known = idle.entry(key).or_insert_with(|| row.clone());
                    if row.stage == Stage::Pending {
                        *known = row;
                    }
                } else if seen.first(row.way, &row.payment_hash) {
                    outcome.read += 1;
                    self.find_again(&row, &lost).await?;
                    self.hold_against(till, &row, book, until, &mut outcome).await?;
                }
            }
            at = page.next;
        }
        let mut claims = Vec::new();
        for row in idle.into_values() {
            if seen.first(row.way, &row.payment_hash) {
                outcome.read += 1;
                match self.missing(&row)? {
                    Some(claim) => claims.push(claim),
                    None => self.hold_against(till, &row, book, until, &mut outcome).await?,
                }
            }
        }
        claims.extend(self.claims(from_ms, to_ms, account.clone(), seen).await?);
        self.ask_for(till, claims, book, until, &mut outcome).await?;

        // Read together, and after all that was booked.
        let wallet_msat = match till.wallet().balance_msat().await {
            Ok(msat) => Some(msat),
            // The payments have been compared all the same.
            Err(error) if error.is_unusable() => {
                outcome
                    .add_unreadable(Unreadable { payment_hash: None, why: format!("the balance: {error}") });
                None
            }
            Err(error) => return Err(error.into()),
        };
        let books_msat = number("the wallet's account", self.ledger.balance(&account)?)?;
        let explained_msat = number("what the differences explain", outcome.explained_msat)?;
        let rest =
            |wallet_msat: i64| i128::from(wallet_msat) - i128::from(books_msat) - outcome.explained_msat;
        let rest_msat = wallet_msat.map(|msat| number("what stays unexplained", rest(msat))).transpose()?;
        let clean = outcome.is_clean();
        // All that has left the wallet is in the books now: nothing is paid out a second time.
        let whole = from_ms == 0 && to_ms == u64::MAX;
        let mut restored = restored.is_some();
        if restored && whole && book && outcome.has_all_that_left() {
            Restored::clear(&dir)?;
            restored = false;
        }
        let mut told = json!(outcome);
        if let Some(fields) = told.as_object_mut() {
            fields.extend([
                ("wallet".to_owned(), json!(till.wallet().identity().to_string())),
                ("account".to_owned(), json!(account)),
                ("clean".to_owned(), json!(clean)),
                ("whole".to_owned(), json!(whole)),
                ("restored".to_owned(), json!(restored)),
                (
                    "balance".to_owned(),
                    json!({
                        "wallet_msat": wallet_msat,
                        "books_msat": books_msat,
                        "explained_msat": explained_msat,
                        "rest_msat": rest_msat,
                    }),
                ),
            ]);
        }
        Ok(told)
    }

    /// Puts back from the log that a restore has set aside what this payment needs to be named: our invoice, or the
    /// refund that was begun. Where the customer has spent the credit again meanwhile, the payment stays nobody's.
    async fn find_again(&self, row: &Row, lost: &Lost) -> Result<(), Error> {
        let store = self.ledger.store();
        let record = match row.way {
            Way::In => match lost.invoices.get(&row.payment_hash) {
                Some(invoice) if store.invoice(&row.payment_hash)?.is_none() => {
                    Record::Invoiced(invoice.clone())
                }
                _ => return Ok(()),
            },
            Way::Out => match lost.refunds.get(&row.payment_hash) {
                Some(begun) if store.transfer(&begun.id)?.is_none() => Record::Transfer(begun.clone()),
                _ => return Ok(()),
            },
        };
        match self.ledger.commit(vec![record]).await {
            Ok(_) => Ok(()),
            Err(error @ ledger::Error::Store(_)) => Err(error.into()),
            Err(error) => {
                tracing::warn!(hash = %row.payment_hash, %error, "a payment of after the backup is nobody's");
                Ok(())
            }
        }
    }

    async fn hold_against(
        &self,
        till: &Till,
        row: &Row,
        book: bool,
        until: Instant,
        outcome: &mut Outcome,
    ) -> Result<(), Error> {
        match judge(row, &Known::read(self.ledger.store(), &row.payment_hash)?) {
            Judged::Matched => outcome.matched += 1,
            Judged::Unmoved => outcome.unmoved += 1,
            Judged::Differs(mut difference) => {
                if book && (row.stage == Stage::Settled || row.stage == Stage::Dead) {
                    self.put_right(till, row, until, &mut difference).await?;
                }
                outcome.add(*difference);
            }
        }
        Ok(())
    }

    // === what the books say and the walk did not show

    /// What the books have and this entry of the wallet denies. A list may be behind: it is asked for by its hash.
    fn missing(&self, row: &Row) -> Result<Option<Claim>, Error> {
        let judged = judge(row, &Known::read(self.ledger.store(), &row.payment_hash)?);
        let Judged::Differs(difference) = judged else { return Ok(None) };
        let What::Missing { booked_msat } = difference.what else { return Ok(None) };
        let Row { payment_hash, way, at_ms, .. } = row.clone();
        Ok(Some(Claim { payment_hash, way, msat: booked_msat, at_ms, id: String::new() }))
    }

    async fn claims(
        &self,
        from_ms: u64,
        to_ms: u64,
        account: Account,
        seen: Seen,
    ) -> Result<Vec<Claim>, Error> {
        let dir = self.ledger.store().dir().to_path_buf();
        let read = tokio::task::spawn_blocking(move || {
            let mut claims = Vec::new();
            let mut visit = |entry: Entry| {
                if let Record::Transfer(transfer) = entry.record
                    && let Some((payment_hash, way, msat)) = claim(&transfer, &account)
                    && !seen.has(way, &payment_hash)
                {
                    claims.push(Claim { payment_hash, way, msat, at_ms: entry.at_ms, id: transfer.id });
                }
                Ok::<_, store::Error>(())
            };
            store::between(&dir, from_ms, to_ms, "\"transfer\"", &mut visit)?;
            Ok::<_, store::Error>((claims, seen))
        });
        let (mut claims, seen) = read.await.unwrap_or(Err(store::Error::Closed))?;
        for begun in self.ledger.store().refunds()? {
            let store::Posted { at_ms, transfer, .. } = begun;
            let Some((_, hash)) = transfer.id.split_once(':') else { continue };
            if (from_ms..to_ms).contains(&at_ms) && !seen.has(Way::Out, hash) {
                let msat = transfer.legs.iter().map(|leg| leg.msat).sum();
                claims.push(Claim {
                    payment_hash: hash.to_owned(),
                    way: Way::Out,
                    msat,
                    at_ms,
                    id: transfer.id.clone(),
                });
            }
        }
        let mut left = Vec::new();
        for claim in claims {
            if self.ledger.transfer(&transfer::correction_id(&claim.id))?.is_none() {
                left.push(claim);
            }
        }
        Ok(left)
    }

    async fn ask_for(
        &self,
        till: &Till,
        claims: Vec<Claim>,
        book: bool,
        until: Instant,
        outcome: &mut Outcome,
    ) -> Result<(), Error> {
        let asked = claims.into_iter().enumerate().map(async |(nth, claim)| {
            let found = if nth < ASKED_MAX && Instant::now() < until {
                look(till, &claim).await.map_err(|error| error.to_string())
            } else {
                Err("there are too many to ask for each".to_owned())
            };
            (claim, found)
        });
        let mut asked = std::pin::pin!(futures_util::stream::iter(asked).buffer_unordered(ASKED_AT_ONCE));
        while let Some((claim, found)) = asked.next().await {
            let booked_msat = claim.msat;
            let what = match found {
                Ok(Some(row)) => {
                    self.hold_against(till, &row, book, until, outcome).await?;
                    continue;
                }
                Ok(None) => What::Missing { booked_msat },
                Err(why) => What::Unasked { booked_msat, why },
            };
            outcome.add(Difference {
                payment_hash: claim.payment_hash,
                way: claim.way,
                what,
                wallet_msat: 0,
                fee_msat: 0,
                at_ms: claim.at_ms,
                memo: String::new(),
                done: String::new(),
                booked: false,
            });
        }
        Ok(())
    }

    // === putting right

    async fn put_right(
        &self,
        till: &Till,
        row: &Row,
        until: Instant,
        difference: &mut Difference,
    ) -> Result<(), Error> {
        let (hash, wallet) = (row.payment_hash.as_str(), till.name());
        let fee_msat = row.fee_msat.unwrap_or_default();
        let posted = match &difference.what {
            What::Unbooked { .. } => return self.take(row, until, difference).await,
            What::Foreign if row.way == Way::In => {
                self.post_found(transfer::reconciled_in(hash, wallet, row.msat, &row.memo), "in suspense")
                    .await?
            }
            What::Foreign => {
                let out = transfer::reconciled_out(hash, wallet, row.msat, fee_msat, &row.memo);
                self.post_found(out, "in suspense").await?
            }
            What::RefundPaidTwice { .. } => {
                let note = "a refund that was called failed, and was paid";
                let out = transfer::reconciled_out(hash, wallet, row.msat, fee_msat, note);
                self.post_found(out, "in suspense").await?
            }
            What::RefundPaid { customer } => {
                let _one = self.paying.lock().await;
                let paid = transfer::refund_paid(hash, customer, wallet, row.msat, fee_msat);
                let begun = self.ledger.transfer(&transfer::refund_id(hash))?.map(|begun| begun.transfer.why);
                let done = match begun {
                    Some(Why::RefundBegun { max_fee_msat, .. }) if fee_msat > max_fee_msat => {
                        tracing::warn!(
                            hash,
                            fee_msat,
                            max_fee_msat,
                            "the wallet took more than the highest fee for a refund"
                        );
                        "the refund is booked as paid; its fee is over the highest that was allowed"
                    }
                    _ => "the refund is booked as paid",
                };
                self.post_found(paid, done).await?
            }
            What::RefundUnpaid { customer } => self.give_back(hash, customer).await?,
            What::FeeDiffers { booked_fee_msat: 0 } if fee_msat > 0 => {
                self.post_found(transfer::reconciled_fee(hash, wallet, fee_msat), "the fee is booked").await?
            }
            _ => return Ok(()),
        };
        (difference.done, difference.booked) = posted;
        Ok(())
    }

    /// Ends a refund that the wallet has in neither its list nor its look-up, once nobody can take it any more. The node
    /// does so by itself where the wallet tells of all that it has sent; elsewhere this is the owner's to order.
    async fn give_back(&self, hash: &str, customer: &str) -> Result<(String, bool), Error> {
        let _one = self.paying.lock().await;
        let Some(begun) = self.ledger.transfer(&transfer::refund_id(hash))? else {
            return Ok(Default::default());
        };
        let Why::RefundBegun { bolt11, .. } = &begun.transfer.why else { return Ok(Default::default()) };
        let ends_s = wallet::read_bolt11(bolt11)?.expires_at_s.saturating_add(UNDER_WAY_S);
        if ends_s > (self.clock)() / 1_000 {
            return Ok((
                "the node tries again by itself; given back a day after its invoice has expired".into(),
                false,
            ));
        }
        let msat = begun.transfer.legs.iter().map(|leg| leg.msat).sum();
        let why = "its invoice has expired, and the wallet has not paid it";
        self.post_found(transfer::refund_failed(hash, customer, msat, why), "given back").await
    }

    /// A transfer that the rules refuse is told, and the comparison goes on.
    async fn post_found(&self, transfer: Transfer, done: &str) -> Result<(String, bool), Error> {
        match self.ledger.post(transfer).await {
            Ok(_) => Ok((done.to_owned(), true)),
            Err(error @ ledger::Error::Store(_)) => Err(error.into()),
            Err(error) => Ok((error.to_string(), false)),
        }
    }

    /// A payment of a customer's goes the way of all payments: to the engine where there is one, which may begin the
    /// job that it pays for; to the customer's credit where there is none, unless a job waits for it.
    async fn take(&self, row: &Row, until: Instant, difference: &mut Difference) -> Result<(), Error> {
        let store = self.ledger.store();
        let Some((invoice, _)) = store.invoice(&row.payment_hash)? else { return Ok(()) };
        let paid = Paid { invoice: Box::new(invoice), received_msat: row.msat, locked: false };
        let Some(engine) = self.engine.get() else {
            if let Some(job) = &paid.invoice.job
                && self.waits(job)?
            {
                difference.done = "a request waits for it: the node takes it up at its next start".into();
                return Ok(());
            }
            (difference.done, difference.booked) =
                self.post_found(paid.transfer(), "in its customer's credit").await?;
            return Ok(());
        };
        engine.paid(paid).await;
        let until = until.min(Instant::now() + BOOKING);
        while Instant::now() < until {
            if let Some((_, InvoiceState::Paid)) = store.invoice(&row.payment_hash)? {
                (difference.done, difference.booked) = ("booked by the node".into(), true);
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        difference.done = "the node was told, and has not booked it yet".into();
        Ok(())
    }

    /// Whether this request would become a job if its payment came now.
    fn waits(&self, job: &str) -> Result<bool, Error> {
        let store = self.ledger.store();
        let Some(quote) = store.quote(job)? else { return Ok(false) };
        let answered = store.job(job)?.is_some() || store.refusal(job)?.is_some();
        let taken_back = store.is_cancelled(job, &quote.customer)?;
        Ok(!answered && !taken_back && (self.clock)() <= quote.expires_ms.saturating_add(GRACE_MS))
    }
}

/// What a log that was set aside knows of payments, by hash.
#[derive(Default)]
struct Lost {
    invoices: HashMap<String, record::Invoice>,
    refunds: HashMap<String, Transfer>,
}

/// Reads it, as far as it can be read.
async fn lost(restored: Restored, dir: PathBuf) -> Lost {
    let read = tokio::task::spawn_blocking(move || {
        let mut lost = Lost::default();
        let mut visit = |entry: Entry| match entry.record {
            Record::Invoiced(invoice) => {
                lost.invoices.insert(invoice.payment_hash.clone(), invoice);
            }
            Record::Transfer(begun) => {
                if let Why::RefundBegun { payment_hash, .. } = &begun.why {
                    lost.refunds.insert(payment_hash.clone(), begun);
                }
            }
            _ => {}
        };
        if let Err(error) = restored.lost(&dir, &mut visit) {
            tracing::warn!(%error, "the log that was set aside is not read to its end");
        }
        lost
    });
    read.await.unwrap_or_default()
}

/// A page of the wallet's list. A wallet that is asked too often is asked again.
async fn history(till: &Till, cursor: &Cursor, until: Instant) -> Result<Page, wallet::Error> {
    loop {
        match till.wallet().history(cursor, PAGE).await {
            Err(wallet::Error::Busy { retry_after_s, .. }) if Instant::now() + BUSY < until => {
                tokio::time::sleep(BUSY.max(Duration::from_secs(retry_after_s.unwrap_or(0).min(30)))).await;
            }
            page => return page,
        }
    }
}

/// What the wallet says of one payment. `None`: it does not have the money that the books say, or has not sent it.
async fn look(till: &Till, claim: &Claim) -> Result<Option<Row>, wallet::Error> {
    let hash: PaymentHash = claim.payment_hash.parse()?;
    let row = |stage, msat, fee_msat: Option<u64>| Row {
        payment_hash: claim.payment_hash.clone(),
        way: claim.way,
        stage,
        msat,
        fee_msat,
        at_ms: claim.at_ms,
        memo: String::new(),
    };
    Ok(match claim.way {
        Way::In => match till.wallet().look_up(&hash).await?.state {
            State::Settled { received_msat, fee_msat, .. } => {
                let msat = received_msat.unwrap_or(claim.msat);
                Some(row(Stage::Settled, msat, fee_msat))
            }
            State::Unknown | State::Pending | State::Held { .. } | State::Expired | State::Failed => None,
        },
        Way::Out => match till.wallet().outgoing(&hash).await? {
            Outgoing::Paid(payment) => Some(row(Stage::Settled, payment.amount_msat, Some(payment.fee_msat))),
            Outgoing::Pending => Some(row(Stage::Pending, claim.msat, None)),
            // Of a refund that is on its way this is no loss, only news.
            Outgoing::Unknown | Outgoing::Failed if claim.id.starts_with("refund:") => {
                Some(row(Stage::Dead, claim.msat, None))
            }
            Outgoing::Unknown | Outgoing::Failed => None,
        },
    })
}

fn row(movement: &Movement) -> Row {
    let (stage, msat) = match &movement.state {
        State::Settled { received_msat, .. } => {
            (Stage::Settled, received_msat.unwrap_or(movement.amount_msat))
        }
        State::Pending | State::Held { .. } => (Stage::Pending, movement.amount_msat),
        State::Unknown | State::Expired | State::Failed => (Stage::Dead, movement.amount_msat),
    };
    Row {
        payment_hash: movement.payment_hash.to_hex(),
        way: match movement.direction {
            Direction::In => Way::In,
            Direction::Out => Way::Out,
        },
        stage,
        msat,
        fee_msat: movement.fee_msat,
        at_ms: movement.created_at_s.saturating_mul(1_000),
        memo: movement.memo.clone(),
    }
}
