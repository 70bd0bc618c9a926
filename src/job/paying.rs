//! What the dispatcher does about money before a job begins: asks for what is missing, takes up the job when it has
//! come, and gives it to the customer's credit when there is no job for it any more. A quote and its invoice are
//! written down before the customer is told; a payment, the hold and the job are one batch. What a quote counts on is set
//! aside first, so that whoever pays it has the job.

use std::collections::HashMap;
use std::sync::Arc;

use nostr_sdk::prelude::{Event, JsonUtil};

use super::dispatcher::{Dispatcher, Message, report};
use super::engine::Offer;
use super::intake::{Saying, is_regular};
use super::queue::Queue;
use super::ticket::Ticket;
use super::till::{self, Paid, Till};
use super::{Failure, Rooms, answer, locks};
use crate::ledger;
use crate::market::{Admission, Code, Way, judge};
use crate::protocol::request::Request;
use crate::store;
use crate::store::Quote;
use crate::store::record::Record;

/// Requests that may wait for a quote: all together, those of one customer, and how long.
const WAITING_MOST: usize = 256;
const WAITING_MOST_OF_ONE: usize = 8;
const WAITING_MS: u64 = 120_000;
/// Quotes that may be open when a key that is not in our books gets another one; the till has room for some more.
const OPEN_TO_STRANGERS: usize = 750;

/// A request that is quoted and not paid yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Awaited {
    pub(super) customer: String,
    /// Unix milliseconds.
    pub(super) expires_ms: u64,
}

/// Requests that wait for the next minute's quotes, in turns by customer.
#[derive(Default)]
pub(super) struct QuoteLine {
    turns: Queue,
    waiting: HashMap<String, Unquoted>,
}

struct Unquoted {
    ticket: Ticket,
    offer: Offer,
    since_ms: u64,
}

// === impl QuoteLine

impl QuoteLine {
    pub(super) fn has(&self, job: &str) -> bool {
        self.waiting.contains_key(job)
    }

    fn has_room_for(&self, customer: &str) -> bool {
        let own = self.waiting.values().filter(|w| w.ticket.request.customer.to_hex() == customer).count();
        self.waiting.len() < WAITING_MOST && own < WAITING_MOST_OF_ONE
    }

    fn push(&mut self, unquoted: Unquoted) {
        let request = &unquoted.ticket.request;
        let job = request.id.to_hex();
        self.turns.push(&request.customer.to_hex(), job.clone());
        self.waiting.insert(job, unquoted);
    }

    fn pop(&mut self, may: impl Fn(&str) -> bool) -> Option<Unquoted> {
        let job = self.turns.pop(may)?;
        self.waiting.remove(&job)
    }

    /// One that has waited too long.
    fn overdue(&mut self, now_ms: u64) -> Option<Unquoted> {
        let over = |unquoted: &Unquoted| unquoted.since_ms.saturating_add(WAITING_MS) < now_ms;
        let job = self.waiting.iter().find(|(_, unquoted)| over(unquoted)).map(|(job, _)| job.clone())?;
        let unquoted = self.waiting.remove(&job)?;
        self.turns.remove(&unquoted.ticket.request.customer.to_hex(), &job);
        Some(unquoted)
    }
}

/// Said when there is no job for what is locked.
const NOT_TAKEN: &str = "nothing of it is taken";

impl Dispatcher {
    /// The batch of an acceptance was not written, because of the books.
    pub(super) fn unpaid(&mut self, ticket: Ticket, error: &ledger::Error, offer: Offer, paid: Option<Paid>) {
        let most_msat = ticket.admission.agreed.most_msat;
        if let ledger::Error::OverBudget { .. } = error {
            let refusal = Failure::new(Code::OverBudget, error.to_string());
            return self.turn_down(&ticket.request, &refusal, offer, paid);
        }
        let ledger::Error::Insufficient { available_msat, .. } = *error else {
            tracing::error!(job = %ticket.request.id, %error, "the job does not fit the books");
            let refusal = Failure::new(Code::Internal, error.to_string());
            return self.turn_down(&ticket.request, &refusal, offer, paid);
        };
        let asks = matches!(ticket.admission.agreed.way, Way::Invoice | Way::After { .. }) && paid.is_none();
        match self.rooms.till.clone() {
            Some(till) if asks => self.ask_for(till, ticket, offer),
            _ => {
                let have = match &paid {
                    None => "",
                    Some(paid) if paid.locked => "with what you have locked, ",
                    Some(_) => "with what you have paid, ",
                };
                let reason =
                    format!("the job may cost {most_msat} msat; {have}your credit here is {available_msat}");
                let refusal = Failure::quote(Code::PaymentRequired, most_msat, reason);
                self.turn_down(&ticket.request, &refusal, offer, paid);
            }
        }
    }

    /// A refusal; what was paid for the job goes to its customer's credit first.
    fn turn_down(&mut self, request: &Request, refusal: &Failure, offer: Offer, paid: Option<Paid>) {
        match paid {
            Some(paid) => self.credit(paid, Some((request.clone(), offer.relay, refusal.clone()))),
            None => self.refuse(request, refusal, offer),
        }
    }

    // === asking

    /// Quotes a request now, or when the minute has quotes left for its customer.
    fn ask_for(&mut self, till: Arc<Till>, ticket: Ticket, offer: Offer) {
        let customer = ticket.request.customer.to_hex();
        let now_ms = self.rooms.now_ms();
        if !self.may_be_open(&customer) {
            return self.say_busy(&ticket.request, offer);
        }
        // A quote costs us an invoice, a signature and a record.
        let per_minute = self.rooms.options.quotes_per_minute;
        if self.quotes.take(now_ms, &customer, || is_regular(&self.rooms, &customer), per_minute) {
            self.begin_quote(till, ticket, offer);
        } else if self.quote_line.has_room_for(&customer) {
            self.quote_line.push(Unquoted { ticket, offer, since_ms: now_ms });
        } else {
            self.say_busy(&ticket.request, offer);
        }
    }

    /// Quotes that are not paid use up the till. Some of it is kept for customers who have dealt with us.
    fn may_be_open(&self, customer: &str) -> bool {
        self.awaiting.len() + self.quoting.len() < OPEN_TO_STRANGERS || is_regular(&self.rooms, customer)
    }

    /// Each second: those who wait for their quote, in turns.
    pub(super) fn quote_those_who_wait(&mut self) {
        let Some(till) = self.rooms.till.clone() else { return };
        let now_ms = self.rooms.now_ms();
        let per_minute = self.rooms.options.quotes_per_minute;
        loop {
            if self.draining || self.ending || self.stopped.is_some() {
                return;
            }
            let (quotes, rooms) = (&self.quotes, &self.rooms);
            let may = |who: &str| quotes.may(now_ms, who, || is_regular(rooms, who), per_minute);
            let Some(Unquoted { ticket, offer, .. }) = self.quote_line.pop(may) else { break };
            let (job, customer) = (ticket.request.id.to_hex(), ticket.request.customer.to_hex());
            match self.rooms.store.knows(&job, &customer) {
                // Taken back while it waited.
                Ok(true) => (offer.done)(),
                Ok(false) => {
                    self.quotes.take(now_ms, &customer, || is_regular(&self.rooms, &customer), per_minute);
                    self.begin_quote(till.clone(), ticket, offer);
                }
                Err(error) => return self.fail(error),
            }
        }
        while let Some(Unquoted { ticket, offer, .. }) = self.quote_line.overdue(now_ms) {
            self.say_busy(&ticket.request, offer);
        }
    }

    fn say_busy(&mut self, request: &Request, offer: Offer) {
        let reason = "busy: too many orders wait for a quote; order again in some minutes";
        let refusal = Failure::new(Code::RateLimited, reason);
        let (request, relay) = (request.clone(), offer.relay.clone());
        tracing::info!(id = %request.id, "no quote: too many orders wait for one");
        self.answered(Saying::Busy, offer, |rooms| answer::refusal(rooms, &request, &relay, &refusal));
    }

    fn begin_quote(&mut self, till: Arc<Till>, ticket: Ticket, offer: Offer) {
        let (job, customer) = (ticket.request.id.to_hex(), ticket.request.customer.to_hex());
        let agreed = &ticket.admission.agreed;
        let line_msat = match agreed.way {
            Way::Line { cap_msat } | Way::After { cap_msat } => cap_msat,
            Way::Free | Way::Credit | Way::Invoice => 0,
        };
        let now_ms = self.rooms.now_ms();
        let wants = (agreed.most_msat, line_msat);
        let budgets = &self.rooms.options.budgets;
        let missing_msat = match self.rooms.ledger.promise((&job, &customer), wants, budgets, now_ms) {
            // Credit has come meanwhile.
            Ok(0) => return self.accept(ticket.request, ticket.admission, offer, None),
            Ok(missing_msat) => missing_msat,
            Err(ledger::Error::Store(error)) => return self.fail(error),
            Err(error) => return self.unpaid(ticket, &error, offer, None),
        };
        self.quoting.insert(job.clone());
        let (rooms, inbox) = (self.rooms.clone(), self.inbox.clone());
        let Offer { event, relay, done } = offer;
        self.begin(async move {
            let result = quote(&rooms, &till, &ticket, missing_msat, event.as_json(), &relay).await;
            if result.is_ok() {
                done();
            }
            let result = result.map(|expires| expires.map(|expires_ms| Awaited { customer, expires_ms }));
            report(&inbox, Message::Quoted { job, result }).await;
        });
    }

    pub(super) fn quoted(&mut self, job: String, result: Result<Option<Awaited>, store::Error>) {
        self.quoting.remove(&job);
        match result {
            Ok(Some(awaited)) => drop(self.awaiting.insert(job, awaited)),
            Ok(None) => self.rooms.ledger.forget(&job),
            Err(error) => self.fail(error),
        }
        self.tell_progress();
    }

    /// Quotes that have run out are not watched for cancels any more, and nothing is set aside for them.
    pub(super) fn forget_quotes(&mut self) {
        let (now_ms, before) = (self.rooms.now_ms(), self.awaiting.len());
        self.awaiting.retain(|job, awaited| {
            let counts = awaited.expires_ms.saturating_add(till::GRACE_MS) >= now_ms;
            if !counts {
                self.rooms.ledger.forget(job);
            }
            counts
        });
        if self.awaiting.len() != before {
            self.tell_progress();
        }
    }

    /// Whether this request is quoted, unpaid, and this customer's.
    pub(super) fn is_quoted_to(&self, request: &str, customer: &str) -> Result<bool, store::Error> {
        let quoted = self.rooms.store.quote(request)?.is_some_and(|quote| quote.customer == customer);
        Ok(quoted && self.rooms.store.job(request)?.is_none())
    }

    // === being paid

    /// Our wallet says that an invoice of ours was settled.
    pub(super) fn paid(&mut self, paid: Paid) {
        if self.stopped.is_some() || self.draining || self.ending {
            // The invoice stays open in the log: the next start looks again.
            return;
        }
        let Some(job) = paid.invoice.job.clone() else { return self.credit(paid, None) };
        self.awaiting.remove(&job);
        if self.open.contains_key(&job) {
            return;
        }
        let quote = match self.rooms.store.quote(&job) {
            Ok(quote) => quote,
            Err(error) => return self.fail(error),
        };
        let Some((quote, event, request)) = quote.and_then(|quote| self.read(quote)) else {
            // For a job that was delivered before it was paid.
            return self.credit(paid, None);
        };
        let (asked_msat, received_msat) = (paid.invoice.amount_msat, paid.received_msat);
        if paid.locked && received_msat < asked_msat {
            let reason =
                format!("{asked_msat} msat are asked for, and {received_msat} are locked; {NOT_TAKEN}");
            let refusal = Failure::quote(Code::PaymentRequired, quote.agreed.most_msat, reason);
            return self.credit(paid, Some((request, quote.relay, refusal)));
        }
        match self.still_wanted(&job, &quote, &request, paid.locked) {
            Ok(Some(admission)) => {
                let offer = Offer { event, relay: quote.relay, done: Box::new(|| ()) };
                self.accept(request, admission, offer, Some(paid));
            }
            // It was answered before: a job is run once, and the money is the customer's.
            Ok(None) => self.credit(paid, None),
            Err(Some(refusal)) => self.credit(paid, Some((request, quote.relay, refusal))),
            Err(None) => {}
        }
    }

    fn read(&self, quote: Quote) -> Option<(Quote, Event, Request)> {
        let event = Event::from_json(&quote.request).ok()?;
        let request = Request::decode(&event, &self.rooms.keys).ok()?;
        Some((quote, event, request))
    }

    /// Whether a quoted request may become a job now. `Err(None)`: the store has failed.
    fn still_wanted(
        &mut self,
        job: &str,
        quote: &Quote,
        request: &Request,
        locked: bool,
    ) -> Result<Option<Admission>, Option<Failure>> {
        let store = self.rooms.store.clone();
        let looked = (|| {
            let known = store.job(job)?.is_some() || store.refusal(job)?.is_some();
            Ok((known, store.is_cancelled(job, &quote.customer)?))
        })();
        let (known, cancelled) = looked.map_err(|error| {
            self.fail(error);
            None
        })?;
        if known {
            return Ok(None);
        }
        let credited = if locked { NOT_TAKEN } else { "what you paid is in your credit here" };
        if cancelled {
            return Err(Some(Failure::new(
                Code::Cancelled,
                format!("taken back before it was paid; {credited}"),
            )));
        }
        let now_ms = self.rooms.now_ms();
        if now_ms > quote.expires_ms.saturating_add(till::GRACE_MS) || request.is_expired(now_ms / 1_000) {
            return Err(Some(Failure::new(
                Code::Expired,
                format!("the payment was seen after the quote had expired; {credited}"),
            )));
        }
        let refused =
            |failure: Failure| Some(Failure { reason: format!("{}; {credited}", failure.reason), ..failure });
        let admission = judge(&self.rooms.rules, request, quote.quoted_ms / 1_000).map_err(refused)?;
        // How many jobs are open was asked before the quote: what is paid for is not turned away for that.
        self.enforceable(&admission).map_err(refused)?;
        // What was quoted holds, whatever the price is now.
        Ok(Some(Admission { agreed: quote.agreed.clone(), ..admission }))
    }

    /// What was paid becomes credit, and what is locked is given back; who waits for a job that does not come is told why.
    fn credit(&mut self, paid: Paid, turned_down: Option<(Request, String, Failure)>) {
        paid.invoice.job.iter().for_each(|job| self.rooms.ledger.forget(job));
        let mut records = match locks::settled(&self.rooms.store, &paid) {
            Ok(_) if paid.locked => Vec::new(),
            Ok(records) => records,
            Err(error) => return self.fail(error),
        };
        if let Some((request, relay, refusal)) = turned_down {
            match answer::refusal(&self.rooms, &request, &relay, &refusal) {
                Ok(refusal) => records.extend(refusal),
                Err(error) => tracing::error!(%error, "a refusal could not be signed"),
            }
        }
        let rooms = self.rooms.clone();
        if records.is_empty() {
            return rooms.till.iter().for_each(|till| till.look_over());
        }
        self.begin(async move {
            match rooms.commit(records).await {
                Ok(_) if paid.locked => rooms.till.iter().for_each(|till| till.look_over()),
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(hash = %paid.invoice.payment_hash, %error, "a payment is not in the books yet");
                }
            }
        });
    }
}

/// Makes the invoice, writes it down with the quote, and owes both to the customer. When it expires, Unix milliseconds;
/// `None`: there is none, and the customer was told so.
async fn quote(
    rooms: &Rooms,
    till: &Till,
    ticket: &Ticket,
    missing_msat: u64,
    event: String,
    relay: &str,
) -> Result<Option<u64>, store::Error> {
    let (job, customer) = (ticket.request.id.to_hex(), ticket.request.customer.to_hex());
    let now_ms = rooms.now_ms();
    let run = (job.as_str(), ticket.deadline_ms.saturating_sub(now_ms));
    let invoice = match till.invoice_ahead(&rooms.store, &customer, missing_msat, run, now_ms).await {
        Ok(invoice) => invoice,
        Err(till::Error::Store(error)) => return Err(error),
        Err(error) => {
            // The wallet is not there: no price without a way to pay it. The customer may try again.
            tracing::warn!(%job, %error, "no invoice could be made");
            let most_msat = ticket.admission.agreed.most_msat;
            let reason = "no invoice can be made at the moment; try again later, or pay credit ahead";
            let refusal = Failure::quote(Code::PaymentRequired, most_msat, reason);
            return match answer::refusal(rooms, &ticket.request, relay, &refusal) {
                Ok(records) => rooms.record(records).await.map(|()| None),
                Err(error) => {
                    tracing::error!(%job, %error, "the refusal could not be signed");
                    Ok(None)
                }
            };
        }
    };
    let quoted = Record::Quoted {
        job: job.clone(),
        customer,
        kind: ticket.request.kind,
        skill: ticket.admission.job_type.manifest.name.clone(),
        request: event,
        relay: relay.to_owned(),
        agreed: ticket.admission.agreed.clone(),
        payment_hash: Some(invoice.payment_hash.clone()),
        expires_ms: invoice.expires_ms,
    };
    match answer::quote(rooms, &ticket.request, relay, &invoice, ticket.admission.agreed.most_msat) {
        Ok(owed) => {
            rooms.record(vec![Record::Invoiced(invoice.clone()), quoted, owed]).await?;
            till.follow(&invoice);
            tracing::info!(%job, amount_msat = invoice.amount_msat, "quoted, and waiting to be paid");
            Ok(Some(invoice.expires_ms))
        }
        Err(error) => {
            tracing::error!(%job, %error, "the quote could not be signed");
            Ok(None)
        }
    }
}
