//! What the dispatcher does with a verified event: take it as a job, refuse it, or stop the job that it takes
//! back. Every step is one batch of records; what waits for the disk is a task that reports back.

use nostr_sdk::prelude::JsonUtil;
use tokio::sync::oneshot;

use super::dispatcher::{Dispatcher, Message, Open, Phase, report, stopped};
use super::engine::Offer;
use super::ticket::{Stop, Ticket};
use super::till::Paid;
use super::{Failure, Rooms, answer};
use crate::ledger::{self, transfer};
use crate::market::{Admission, Agreed, Code, Way, judge};
use crate::protocol;
use crate::protocol::request::{self, Cancel, Request};
use crate::store;
use crate::store::record::Record;

/// Of one event; further ids that we do not know are passed over.
const TOMBSTONES_PER_EVENT: usize = 16;
/// Events held while nothing is taken; more are dropped, and asked for again.
const UNTAKEN: usize = 1024;

impl Dispatcher {
    pub(super) fn offered(&mut self, offer: Offer) {
        let cancels = offer.event.kind.as_u16() == 5;
        if self.stopped.is_some() || self.ending || (self.draining && !cancels) {
            // Not done: the cursor stays before it, and the next start sees it again.
            if self.untaken.len() < UNTAKEN {
                self.untaken.push(offer);
            }
            return;
        }
        if cancels {
            return self.offered_cancel(offer);
        }
        let (id, customer) = (offer.event.id.to_hex(), offer.event.pubkey.to_hex());
        match self.rooms.store.knows(&id, &customer) {
            _ if self.open.contains_key(&id) || self.quoting.contains(&id) => return (offer.done)(),
            // Not done before it is quoted: the next start must see it again.
            _ if self.quote_line.has(&id) => return,
            _ if self.withdrawing.contains(&(id, customer)) => return (offer.done)(),
            Ok(true) => return (offer.done)(),
            Ok(false) => {}
            Err(error) => return self.fail(error),
        }
        let request = match Request::decode(&offer.event, &self.rooms.keys) {
            Ok(request) => request,
            Err(error) => return self.undecodable(offer, &error),
        };
        if request.kind == protocol::ACCOUNT_KIND {
            return self.asked_for_account(&request, offer);
        }
        match self.admit(&request, self.rooms.now_ms()) {
            Ok(Ok(admission)) => self.accept(request, admission, offer, None),
            Ok(Err(refusal)) => self.refuse(&request, &refusal, offer),
            Err(error) => self.fail(error),
        }
    }

    fn admit(&mut self, request: &Request, now_ms: u64) -> Result<Result<Admission, Failure>, store::Error> {
        let customer = request.customer.to_hex();
        let judged = judge(&self.rooms.rules, request, now_ms / 1_000);
        let admission =
            match judged.and_then(|admission| self.room_for(&admission, &customer).map(|()| admission)) {
                Ok(admission) => admission,
                Err(refusal) => return Ok(Err(refusal)),
            };
        let (skill, free) = (&admission.job_type.manifest.name, admission.agreed.price.free_jobs_per_day);
        let free = admission.agreed.most_msat > 0
            && self.quota.take(&self.rooms.store, &customer, skill, free, now_ms)?;
        Ok(if free { Ok(admission.of_quota()) } else { admission.within_bid(request) })
    }

    /// Whether the sandbox can hold a job to these terms.
    pub(super) fn enforceable(&self, admission: &Admission) -> Result<(), Failure> {
        let unenforceable = |e: crate::sandbox::Error| Failure::new(Code::Unsupported, e.to_string());
        self.rooms.backend.admit(&admission.policy).map_err(unenforceable)
    }

    /// Whether a job on these terms could begin now.
    fn room_for(&self, admission: &Admission, customer: &str) -> Result<(), Failure> {
        self.enforceable(admission)?;
        let open = self.open.len();
        if open >= self.rooms.options.max_open {
            return Err(Failure::new(Code::RateLimited, format!("{open} jobs are open here already")));
        }
        let own = self.open.values().filter(|o| o.customer == customer).count();
        if own >= self.rooms.options.max_open_per_customer {
            return Err(Failure::new(Code::RateLimited, format!("{own} of your jobs are open already")));
        }
        Ok(())
    }

    /// With `paid`, the payment that makes the job possible goes into the same batch.
    pub(super) fn accept(
        &mut self,
        request: Request,
        admission: Admission,
        offer: Offer,
        paid: Option<Paid>,
    ) {
        let job = request.id.to_hex();
        let customer = request.customer.to_hex();
        let options = &self.rooms.options;
        let begin_by_ms = self.rooms.now_ms().saturating_add(options.max_wait_ms);
        let deadline_ms =
            begin_by_ms.saturating_add(options.repo_ms).saturating_add(admission.policy.wall_ms);
        let skill = admission.job_type.manifest.name.clone();
        let ticket = Ticket::new(request, admission, offer.relay.clone(), begin_by_ms, deadline_ms);
        let accepted = Record::Accepted {
            job: job.clone(),
            customer: customer.clone(),
            kind: ticket.request.kind,
            skill,
            request: offer.event.as_json(),
            relay: offer.relay.clone(),
            deadline_ms: ticket.deadline_ms,
            agreed: ticket.admission.agreed.clone(),
        };
        let ahead = self.queue.len() + usize::from(self.running >= options.max_jobs);
        let extra = if ahead == 0 { "accepted".to_string() } else { format!("accepted, {ahead} ahead") };
        let mut records = vec![accepted];
        records.extend(paid.as_ref().map(|paid| Record::Transfer(paid.transfer())));
        let Agreed { way, most_msat, .. } = ticket.admission.agreed;
        if most_msat > 0 {
            let line_msat = match way {
                Way::Line { cap_msat } | Way::After { cap_msat } => cap_msat,
                Way::Free | Way::Credit | Way::Invoice => 0,
            };
            let hold = transfer::hold(&job, &customer, most_msat, line_msat, ticket.deadline_ms);
            records.push(Record::Transfer(hold));
        }
        match answer::processing(&self.rooms, &ticket.request, &offer.relay, &extra) {
            Ok(feedback) => records.push(feedback),
            Err(error) => tracing::error!(%job, %error, "the processing feedback could not be signed"),
        }
        let phase = Phase::Recording(Box::new(ticket), None);
        self.open.insert(job.clone(), Open { customer, phase });
        self.tell_progress();
        let (rooms, inbox) = (self.rooms.clone(), self.inbox.clone());
        self.begin(async move {
            let result = rooms.commit(records).await.map(drop);
            report(&inbox, Message::Recorded { job, result, offer, paid }).await;
        });
    }

    pub(super) fn recorded(
        &mut self,
        job: String,
        result: Result<(), ledger::Error>,
        offer: Offer,
        paid: Option<Paid>,
    ) {
        let Some(open) = self.open.remove(&job) else { return };
        match result {
            Ok(()) => {
                if let Phase::Recording(ticket, _) = &open.phase {
                    let skill = &ticket.admission.job_type.manifest.name;
                    tracing::info!(%job, skill, relay = %ticket.relay, "job accepted");
                }
                (offer.done)();
            }
            Err(ledger::Error::Store(error)) => {
                self.tell_progress();
                return self.fail(error);
            }
            Err(error) => {
                self.tell_progress();
                let Phase::Recording(ticket, _) = open.phase else { return };
                if ticket.admission.agreed.of_quota {
                    self.quota.give_back(&open.customer, &ticket.admission.job_type.manifest.name);
                }
                return self.unpaid(*ticket, &error, offer, paid);
            }
        }
        match open.phase {
            Phase::Recording(ticket, None) => self.wait(job, open.customer, ticket),
            Phase::Recording(ticket, Some(stop)) => self.end_unrun(job, open.customer, ticket, stopped(stop)),
            phase => {
                self.open.insert(job, Open { phase, ..open });
            }
        }
        self.pump();
    }

    pub(super) fn wait(&mut self, job: String, customer: String, ticket: Box<Ticket>) {
        self.queue.push(&customer, job.clone());
        self.open.insert(job, Open { customer, phase: Phase::Waiting(ticket) });
    }

    /// A request that is ours by its `p` tag but cannot be read is answered by its event alone.
    fn undecodable(&mut self, offer: Offer, error: &request::Error) {
        let refusal = Failure::new(error.code(), error.to_string());
        let targeted = request::asks_for(&offer.event, &self.rooms.keys.public_key());
        let (event, relay) = (offer.event.clone(), offer.relay.clone());
        self.refused(targeted, &refusal, offer, |rooms| answer::unreadable(rooms, &event, &relay, &refusal));
    }

    pub(super) fn refuse(&mut self, request: &Request, refusal: &Failure, offer: Offer) {
        let targeted = request.is_targeted(&self.rooms.keys.public_key());
        let relay = offer.relay.clone();
        self.refused(targeted, refusal, offer, |rooms| answer::refusal(rooms, request, &relay, refusal));
    }

    /// One signed refusal at most, to those who asked for us by name, and not too many a minute (R9). The
    /// rest is silence, which is not recorded: a stranger must not grow our log for nothing.
    fn refused(
        &mut self,
        targeted: bool,
        refusal: &Failure,
        offer: Offer,
        answer: impl FnOnce(&Rooms) -> Result<Vec<Record>, Failure>,
    ) {
        let id = offer.event.id;
        if targeted {
            match self.told_refusals.tell(self.rooms.now_ms()) {
                Some(untold) => {
                    tracing::info!(%id, code = %refusal.code, reason = %refusal.reason, untold, "request refused");
                }
                None => {
                    tracing::debug!(%id, code = %refusal.code, reason = %refusal.reason, "request refused")
                }
            }
        } else {
            tracing::debug!(%id, code = %refusal.code, reason = %refusal.reason, "request left alone");
        }
        if !targeted {
            return (offer.done)();
        }
        self.answered(Saying::Refusal, offer, answer);
    }

    /// What is said about a request that becomes no job, unless too much of it was said this minute.
    pub(super) fn answered(
        &mut self,
        what: Saying,
        offer: Offer,
        answer: impl FnOnce(&Rooms) -> Result<Vec<Record>, Failure>,
    ) {
        let id = offer.event.id;
        let (now_ms, author) = (self.rooms.now_ms(), offer.event.pubkey.to_hex());
        let options = &self.rooms.options;
        let (budget, per_minute) = match what {
            Saying::Refusal => (&mut self.refusals, options.refusals_per_minute),
            Saying::Balance => (&mut self.balances, options.balances_per_minute),
            Saying::Busy => (&mut self.busy, options.quotes_per_minute),
        };
        if !budget.take(now_ms, &author, || is_regular(&self.rooms, &author), per_minute) {
            return (offer.done)();
        }
        let records = match answer(&self.rooms) {
            Ok(records) => records,
            Err(error) => {
                tracing::error!(%id, %error, "the answer could not be signed");
                return (offer.done)();
            }
        };
        let rooms = self.rooms.clone();
        self.begin(async move {
            match rooms.record(records).await {
                Ok(()) => (offer.done)(),
                Err(error) => tracing::error!(%id, %error, "an answer was not recorded"),
            }
        });
    }

    // === cancelling

    /// Kind 5 by the request's author: written down first, then the job is stopped. It may come before its
    /// request; such tombstones are counted, because anybody can send them.
    fn offered_cancel(&mut self, offer: Offer) {
        let Ok(cancel) = Cancel::decode(&offer.event) else { return (offer.done)() };
        let by = cancel.by.to_hex();
        let (mut keys, mut unknown) = (Vec::new(), 0_usize);
        for request in cancel.requests.iter().map(|id| id.to_hex()) {
            let counts = match self.open.get(&request) {
                Some(open) => open.customer == by,
                None if matches!(self.is_quoted_to(&request, &by), Ok(true)) => true,
                None if !matches!(self.rooms.store.knows(&request, &by), Ok(false)) => false,
                None => {
                    unknown += 1;
                    unknown <= TOMBSTONES_PER_EVENT && self.tombstones.take(self.rooms.now_ms(), &by)
                }
            };
            if counts {
                keys.push((request, by.clone()));
            }
        }
        if keys.is_empty() {
            return (offer.done)();
        }
        let cancelled = |(request, by): (String, String)| Record::Cancelled { request, by };
        let records = keys.iter().cloned().map(cancelled).collect();
        self.withdrawing.extend(keys.iter().cloned());
        let (rooms, inbox) = (self.rooms.clone(), self.inbox.clone());
        self.begin(async move {
            let result = rooms.record(records).await;
            if result.is_ok() {
                (offer.done)();
            }
            report(&inbox, Message::Withdrawn { keys, result }).await;
        });
    }

    pub(super) fn withdrawn(&mut self, keys: &[(String, String)], result: Result<(), store::Error>) {
        for key in keys {
            self.withdrawing.remove(key);
        }
        if let Err(error) = result {
            return self.fail(error);
        }
        // Asked again: a request that was not known then may have come since, from somebody else.
        for (job, by) in keys {
            if self.awaiting.get(job).is_some_and(|awaited| awaited.customer == *by) {
                // What is paid all the same becomes credit.
                self.rooms.ledger.forget(job);
            }
            if self.open.get(job).is_some_and(|open| open.customer == *by) {
                self.stop(job, Stop::Customer);
            }
        }
    }

    /// The owner's cancel, written down under our own key before anything is stopped, as for kind 5.
    pub(super) fn cancel(&mut self, job: String, reply: Reply) {
        if !self.open.contains_key(&job) {
            return tell(reply, Err(not_open(&job)));
        }
        let by = self.rooms.keys.public_key().to_hex();
        let (rooms, inbox) = (self.rooms.clone(), self.inbox.clone());
        self.begin(async move {
            let result = rooms.record(vec![Record::Cancelled { request: job.clone(), by }]).await;
            report(&inbox, Message::CancelRecorded { job, result, reply }).await;
        });
    }

    pub(super) fn cancel_recorded(&mut self, job: &str, result: Result<(), store::Error>, reply: Reply) {
        let told = match result {
            Err(error) => {
                let failure = Failure::new(Code::Internal, error.to_string());
                self.fail(error);
                Err(failure)
            }
            // It may have ended meanwhile.
            Ok(()) if !self.open.contains_key(job) => Err(not_open(job)),
            Ok(()) => {
                self.stop(job, Stop::Owner);
                Ok(())
            }
        };
        tell(reply, told);
    }

    pub(super) fn stop(&mut self, job: &str, stop: Stop) {
        let Some(open) = self.open.remove(job) else { return };
        let Open { customer, phase } = open;
        match phase {
            Phase::Waiting(ticket) => {
                self.queue.remove(&customer, job);
                self.end_unrun(job.to_string(), customer, ticket, stopped(stop));
            }
            Phase::Recording(ticket, _) => {
                let phase = Phase::Recording(ticket, Some(stop));
                self.open.insert(job.to_string(), Open { customer, phase });
            }
            Phase::Running(sender) => {
                sender.send_replace(Some(stop));
                self.open.insert(job.to_string(), Open { customer, phase: Phase::Running(sender) });
            }
        }
    }
}

/// What is said about a request that becomes no job; each has a budget of its own.
#[derive(Debug, Clone, Copy)]
pub(super) enum Saying {
    Refusal,
    Balance,
    /// To a customer whose turn for a quote does not come.
    Busy,
}

/// Whether this customer is in our books. A key that costs nothing is not.
pub(super) fn is_regular(rooms: &Rooms, customer: &str) -> bool {
    match rooms.store.postings(customer, 1) {
        Ok(postings) => !postings.is_empty(),
        Err(error) => {
            tracing::error!(%error, "the customer's past cannot be read");
            false
        }
    }
}

/// Where the owner waits for a word about a cancel.
type Reply = oneshot::Sender<Result<(), Failure>>;

fn tell(reply: Reply, answer: Result<(), Failure>) {
    if reply.send(answer).is_err() {
        tracing::debug!("nobody waits for the answer to a cancel");
    }
}

fn not_open(job: &str) -> Failure {
    Failure::new(Code::InvalidInput, format!("no open job {job}"))
}
