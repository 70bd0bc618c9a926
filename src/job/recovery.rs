//! Taking up what was left open: at the start, by an earlier life of the node; in between, by a job's task that
//! broke off. Whether a job may be begun once more is `runner`'s to say.

use nostr_sdk::prelude::{Event, JsonUtil};
use tokio::sync::watch;

use super::Failure;
use super::dispatcher::{Dispatcher, Open, Phase, stopped};
use super::ending;
use super::paying::Awaited;
use super::ticket::{Stop, Ticket};
use crate::ledger::Promise;
use crate::market::{Admission, judge};
use crate::protocol::request::Request;
use crate::store::{self, JobRow};

impl Dispatcher {
    pub(super) fn recover(&mut self) -> Result<(), store::Error> {
        // The store gives the newest first; those who came first have waited longest.
        for row in self.rooms.store.open_jobs()?.into_iter().rev() {
            self.take_up(row)?;
        }
        for invoice in self.rooms.store.unpaid()? {
            if let Some(job) = invoice.job
                && self.rooms.store.job(&job)?.is_none()
            {
                let store = &self.rooms.store;
                if let Some(quote) = store.quote(&job)?
                    && !store.is_cancelled(&job, &quote.customer)?
                {
                    let most_msat = quote.agreed.most_msat;
                    let credit_msat = most_msat.saturating_sub(invoice.amount_msat);
                    let promise = Promise { customer: quote.customer, most_msat, credit_msat };
                    self.rooms.ledger.promise_again(&job, promise);
                }
                let awaited = Awaited { customer: invoice.customer, expires_ms: invoice.expires_ms };
                self.awaiting.insert(job, awaited);
            }
        }
        self.tell_progress();
        Ok(())
    }

    /// Puts an open job back into the line, or ends it when it was cancelled or is against the rules of today.
    fn take_up(&mut self, row: JobRow) -> Result<(), store::Error> {
        let job = row.job;
        let Some(request) = Event::from_json(&row.request)
            .ok()
            .and_then(|event| Request::decode(&event, &self.rooms.keys).ok())
        else {
            tracing::error!(%job, "an open job's request is no longer readable with this key");
            return Ok(());
        };
        // Begins the look-up now, so that the answer finds it done.
        (self.rooms.read_relays)(&request.customer);
        let judged = judge(&self.rooms.rules, &request, row.accepted_ms / 1000);
        let store = &self.rooms.store;
        let cancelled = if store.is_cancelled(&job, &row.customer)? {
            Some(Stop::Customer)
        } else if store.is_cancelled(&job, &self.rooms.keys.public_key().to_hex())? {
            Some(Stop::Owner)
        } else {
            None
        };
        let admission = match judged {
            // What was agreed holds, whatever the price is now.
            Ok(admission) => Admission { agreed: row.agreed, ..admission },
            Err(refusal) => {
                self.end_refused(job, row.customer, request, row.relay, refusal);
                return Ok(());
            }
        };
        let begin_by_ms = row.accepted_ms.saturating_add(self.rooms.options.max_wait_ms);
        let ticket = Ticket::new(request, admission, row.relay, begin_by_ms, row.deadline_ms);
        let ticket = Box::new(Ticket { attempts: row.attempt, commit: row.commit, ..ticket });
        if let Some(stop) = cancelled {
            self.end_unrun(job, row.customer, ticket, stopped(stop));
        } else {
            tracing::info!(%job, attempt = row.attempt.saturating_add(1), "resuming an open job");
            self.wait(job, row.customer, ticket);
        }
        Ok(())
    }

    /// Ends an open job that the rules of today do not let in.
    fn end_refused(&mut self, job: String, customer: String, request: Request, relay: String, why: Failure) {
        let (stop, _) = watch::channel(None);
        self.open.insert(job.clone(), Open { customer, phase: Phase::Running(stop) });
        let rooms = self.rooms.clone();
        self.spawn(job, 0, async move { ending::end(&rooms, &request, &relay, &why).await });
    }

    /// The task of a job panicked: a fault of ours. The job is begun again as often as the options say, so that
    /// it has its answer within its deadline.
    pub(super) fn broke(&mut self, job: &str, attempts: u32) {
        self.open.remove(job);
        match self.rooms.store.job(job) {
            Ok(Some(row)) if row.state.is_open() && !self.draining => {
                let attempt = row.attempt.max(attempts);
                if let Err(error) = self.take_up(JobRow { attempt, ..row }) {
                    self.fail(error);
                }
            }
            Ok(_) => {}
            Err(error) => self.fail(error),
        }
        self.tell_progress();
    }
}
