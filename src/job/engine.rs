//! The dispatcher: the one owner of which jobs are open. It takes events in order, judges them, and gives
//! jobs their turn; it never waits for the disk, a repository or a sandbox (R15). Workers do, and report back.

use std::collections::HashMap;
use std::time::Duration;

use nostr_sdk::prelude::{Event, JsonUtil};
use tokio::sync::{mpsc, oneshot, watch};

use super::queue::Queue;
use super::runner::{self, End, Stop, Ticket};
use super::{Failure, Rooms, answer};
use crate::market::{Admission, Code, judge};
use crate::protocol::cancel::Cancel;
use crate::protocol::request::{self, Request};
use crate::store;
use crate::store::record::Record;

const TICK: Duration = Duration::from_secs(1);
/// Offers and reports that may wait for the dispatcher before their senders do.
const INBOX: usize = 256;

/// A verified event for the engine.
pub struct Offer {
    pub event: Event,
    /// The relay that it came from.
    pub relay: String,
    /// Called once the event has been dealt with for good: recorded, or of no concern. Not called when the
    /// node could not record it, so that the relay's cursor stays before it.
    pub done: Box<dyn FnOnce() + Send>,
}

/// What the engine is doing, for `jobs`, `doctor` and the idle test.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Status {
    pub running: usize,
    pub waiting: usize,
    pub draining: bool,
    /// Why no job is taken any more, when the store failed.
    pub stopped: Option<String>,
    /// Ids of all open jobs.
    pub open: Vec<String>,
}

/// What changes as jobs come and go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Ids of all open jobs, so that their cancellation can be watched for.
    pub open: Vec<String>,
    /// Jobs that have got their terminal answer since the start.
    pub answered: u64,
}

enum Message {
    Offer(Offer),
    Recorded { job: String, result: Result<(), store::Error>, done: Box<dyn FnOnce() + Send> },
    Ended { job: String, result: Result<End, store::Error> },
    Cancel { job: String, reply: oneshot::Sender<Result<(), Failure>> },
    Drain,
    Stop,
    Status(oneshot::Sender<Status>),
}

/// Handle to the running dispatcher.
#[derive(Clone)]
pub struct Engine {
    inbox: mpsc::Sender<Message>,
    progress: watch::Receiver<Progress>,
}

impl Engine {
    /// Takes up what an earlier life left open, then starts to take offers.
    ///
    /// # Errors
    /// The store's, when the open jobs cannot be read.
    pub async fn start(rooms: Rooms) -> Result<Engine, store::Error> {
        let (inbox, messages) = mpsc::channel(INBOX);
        let (tell, progress) = watch::channel(Progress::default());
        let mut dispatcher = Dispatcher {
            rooms,
            inbox: inbox.clone(),
            open: HashMap::new(),
            queue: Queue::default(),
            running: 0,
            draining: false,
            stopped: None,
            refusals: Bucket::default(),
            answered: 0,
            tell,
        };
        dispatcher.recover().await?;
        tokio::spawn(dispatcher.run(messages));
        Ok(Engine { inbox, progress })
    }

    /// Hands over a verified event. Waits only while the dispatcher's inbox is full.
    pub async fn offer(&self, offer: Offer) {
        if self.inbox.send(Message::Offer(offer)).await.is_err() {
            tracing::error!("an event was dropped: the dispatcher is gone");
        }
    }

    /// Cancels an open job in the name of the node's owner.
    ///
    /// # Errors
    /// When there is no such open job.
    pub async fn cancel(&self, job: &str) -> Result<(), Failure> {
        let gone = || Failure::new(Code::Internal, "the dispatcher is gone");
        let (reply, answer) = oneshot::channel();
        let message = Message::Cancel { job: job.to_string(), reply };
        self.inbox.send(message).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    pub async fn status(&self) -> Status {
        let (reply, answer) = oneshot::channel();
        if self.inbox.send(Message::Status(reply)).await.is_err() {
            return Status { stopped: Some("the dispatcher is gone".into()), ..Status::default() };
        }
        answer.await.unwrap_or_default()
    }

    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Takes no more jobs, lets the running ones finish until `within` has passed, then stops them; those
    /// that wait or were stopped are taken up at the next start. Returns how many stay open.
    pub async fn drain(&self, within: Duration) -> usize {
        if self.inbox.send(Message::Drain).await.is_err() {
            return 0;
        }
        if tokio::time::timeout(within, self.until_idle()).await.is_err() {
            tracing::warn!("drain: time is up, stopping the running jobs");
            if self.inbox.send(Message::Stop).await.is_ok()
                && tokio::time::timeout(Duration::from_secs(10), self.until_idle()).await.is_err()
            {
                tracing::error!("drain: jobs did not stop");
            }
        }
        self.status().await.open.len()
    }

    async fn until_idle(&self) {
        while self.status().await.running > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// One open job as the dispatcher sees it.
struct Open {
    customer: String,
    phase: Phase,
}

enum Phase {
    /// Its acceptance is on its way to the disk; stopped meanwhile, it never runs.
    Recording(Box<Ticket>, Option<Stop>),
    Waiting(Box<Ticket>),
    Running(watch::Sender<Option<Stop>>),
}

struct Dispatcher {
    rooms: Rooms,
    inbox: mpsc::Sender<Message>,
    open: HashMap<String, Open>,
    queue: Queue,
    running: usize,
    draining: bool,
    stopped: Option<String>,
    refusals: Bucket,
    answered: u64,
    tell: watch::Sender<Progress>,
}

impl Dispatcher {
    async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        let mut tick = tokio::time::interval(TICK);
        self.pump();
        loop {
            tokio::select! {
                message = messages.recv() => match message {
                    Some(message) => self.handle(message),
                    None => return,
                },
                _ = tick.tick() => self.end_overdue(),
            }
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Offer(offer) => self.offered(offer),
            Message::Recorded { job, result, done } => self.recorded(job, result, done),
            Message::Ended { job, result } => {
                self.running -= 1;
                self.close(&job, result);
                self.pump();
            }
            Message::Cancel { job, reply } => {
                let known = self.open.contains_key(&job);
                if known {
                    self.stop(&job, Stop::Owner);
                }
                let answer = if known {
                    Ok(())
                } else {
                    Err(Failure::new(Code::InvalidInput, format!("no open job {job}")))
                };
                if reply.send(answer).is_err() {
                    tracing::debug!(%job, "nobody waits for the answer to a cancel");
                }
            }
            Message::Drain => self.draining = true,
            Message::Stop => {
                for open in self.open.values() {
                    if let Phase::Running(stop) = &open.phase {
                        stop.send_replace(Some(Stop::Drain));
                    }
                }
            }
            Message::Status(reply) => {
                let status = Status {
                    running: self.running,
                    waiting: self.queue.len(),
                    draining: self.draining,
                    stopped: self.stopped.clone(),
                    open: self.open.keys().cloned().collect(),
                };
                if reply.send(status).is_err() {
                    tracing::debug!("nobody waits for the status");
                }
            }
        }
    }

    // === intake

    fn offered(&mut self, offer: Offer) {
        if self.draining || self.stopped.is_some() {
            return; // not done: the cursor stays before it, and the next start sees it again
        }
        if offer.event.kind.as_u16() == 5 {
            return self.offered_cancel(offer);
        }
        let id = offer.event.id.to_hex();
        match self.rooms.store.knows(&id, &offer.event.pubkey.to_hex()) {
            _ if self.open.contains_key(&id) => return (offer.done)(),
            Ok(true) => return (offer.done)(),
            Ok(false) => {}
            Err(error) => return self.fail(error),
        }
        let request = match Request::decode(&offer.event, &self.rooms.keys) {
            Ok(request) => request,
            Err(error) => return self.undecodable(offer, &error),
        };
        let now_s = self.rooms.now_ms() / 1000;
        match self.admit(&request, now_s) {
            Ok(admission) => self.accept(request, admission, offer),
            Err(refusal) => self.refuse(&request, &refusal, offer),
        }
    }

    fn admit(&self, request: &Request, now_s: u64) -> Result<Admission, Failure> {
        let admission = judge(&self.rooms.rules, request, now_s)?;
        let unenforceable = |e: crate::sandbox::Error| Failure::new(Code::Unsupported, e.to_string());
        self.rooms.backend.admit(&admission.policy).map_err(unenforceable)?;
        let open = self.open.len();
        if open >= self.rooms.options.max_open {
            return Err(Failure::new(Code::RateLimited, format!("{open} jobs are open here already")));
        }
        let customer = request.customer.to_hex();
        let own = self.open.values().filter(|o| o.customer == customer).count();
        if own >= self.rooms.options.max_open_per_customer {
            return Err(Failure::new(Code::RateLimited, format!("{own} of your jobs are open already")));
        }
        Ok(admission)
    }

    fn accept(&mut self, request: Request, admission: Admission, offer: Offer) {
        let job = request.id.to_hex();
        let customer = request.customer.to_hex();
        let options = &self.rooms.options;
        let spare_ms = options.max_wait_ms.saturating_add(options.repo_ms);
        let deadline_ms =
            self.rooms.now_ms().saturating_add(spare_ms).saturating_add(admission.policy.wall_ms);
        let accepted = Record::Accepted {
            job: job.clone(),
            customer: customer.clone(),
            kind: request.kind,
            skill: admission.job_type.manifest.name.clone(),
            request: offer.event.as_json(),
            relay: offer.relay.clone(),
            deadline_ms,
        };
        let ahead = self.queue.len() + usize::from(self.running >= options.max_jobs);
        let extra = if ahead == 0 { "accepted".to_string() } else { format!("accepted, {ahead} ahead") };
        let mut records = vec![accepted];
        match answer::processing(&self.rooms, &request, &offer.relay, &extra) {
            Ok(feedback) => records.push(feedback),
            Err(error) => tracing::error!(%job, %error, "the processing feedback could not be signed"),
        }
        tracing::info!(%job, skill = %admission.job_type.manifest.name, relay = %offer.relay, "job accepted");
        let ticket = Ticket { request, admission, relay: offer.relay, attempts: 0, deadline_ms };
        let phase = Phase::Recording(Box::new(ticket), None);
        self.open.insert(job.clone(), Open { customer, phase });
        self.tell_progress();
        let (rooms, inbox) = (self.rooms.clone(), self.inbox.clone());
        tokio::spawn(async move {
            let result = rooms.record(records).await;
            report(&inbox, Message::Recorded { job, result, done: offer.done }).await;
        });
    }

    fn recorded(&mut self, job: String, result: Result<(), store::Error>, done: Box<dyn FnOnce() + Send>) {
        if let Err(error) = result {
            self.open.remove(&job);
            self.tell_progress();
            return self.fail(error);
        }
        done();
        let Some(open) = self.open.remove(&job) else { return };
        match open.phase {
            Phase::Recording(ticket, None) => self.wait(job, open.customer, ticket),
            Phase::Recording(ticket, Some(stop)) => self.end_unrun(job, open.customer, ticket, stopped(stop)),
            phase => {
                self.open.insert(job, Open { phase, ..open });
            }
        }
        self.pump();
    }

    fn wait(&mut self, job: String, customer: String, ticket: Box<Ticket>) {
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

    fn refuse(&mut self, request: &Request, refusal: &Failure, offer: Offer) {
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
        tracing::info!(%id, code = %refusal.code, reason = %refusal.reason, "request refused");
        if !targeted || !self.refusals.take(self.rooms.now_ms(), self.rooms.options.refusals_per_minute) {
            return (offer.done)();
        }
        let records = match answer(&self.rooms) {
            Ok(records) => records,
            Err(error) => {
                tracing::error!(%id, %error, "the refusal could not be signed");
                return (offer.done)();
            }
        };
        let rooms = self.rooms.clone();
        tokio::spawn(async move {
            match rooms.record(records).await {
                Ok(()) => (offer.done)(),
                Err(error) => tracing::error!(%id, %error, "a refusal was not recorded"),
            }
        });
    }

    // === cancelling

    fn offered_cancel(&mut self, offer: Offer) {
        let Ok(cancel) = Cancel::decode(&offer.event) else { return (offer.done)() };
        let by = cancel.by.to_hex();
        let mut records = Vec::new();
        for request in &cancel.requests {
            let request = request.to_hex();
            match self.open.get(&request) {
                Some(open) if open.customer == by => {}
                Some(_) => continue, // not its author: nothing to do with this job
                None if matches!(self.rooms.store.knows(&request, &by), Ok(false)) => {}
                None => continue,
            }
            records.push(Record::Cancelled { request: request.clone(), by: by.clone() });
            self.stop(&request, Stop::Customer);
        }
        if records.is_empty() {
            return (offer.done)();
        }
        let rooms = self.rooms.clone();
        tokio::spawn(async move {
            match rooms.record(records).await {
                Ok(()) => (offer.done)(),
                Err(error) => tracing::error!(%error, "a cancellation was not recorded"),
            }
        });
    }

    fn stop(&mut self, job: &str, stop: Stop) {
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

    // === turns

    fn pump(&mut self) {
        while self.running < self.rooms.options.max_jobs && !self.draining && self.stopped.is_none() {
            let Some(job) = self.next() else { return };
            let Some(open) = self.open.remove(&job) else { continue };
            let Phase::Waiting(ticket) = open.phase else {
                self.open.insert(job, open);
                continue;
            };
            let (stop, stopped) = watch::channel(None);
            self.open.insert(job.clone(), Open { phase: Phase::Running(stop), customer: open.customer });
            let rooms = self.rooms.clone();
            self.spawn(job, async move { runner::run(&rooms, &ticket, stopped).await });
        }
    }

    fn next(&mut self) -> Option<String> {
        let mut running: HashMap<&str, usize> = HashMap::new();
        for open in self.open.values().filter(|o| matches!(o.phase, Phase::Running(_))) {
            *running.entry(&open.customer).or_default() += 1;
        }
        let most = self.rooms.options.max_running_per_customer;
        self.queue.pop(|customer| running.get(customer).copied().unwrap_or(0) < most)
    }

    /// Ends a job that waits, without running it. It counts as running until its answer is durable.
    fn end_unrun(&mut self, job: String, customer: String, ticket: Box<Ticket>, failure: Failure) {
        let (stop, _) = watch::channel(None);
        self.open.insert(job.clone(), Open { customer, phase: Phase::Running(stop) });
        let rooms = self.rooms.clone();
        self.spawn(job, async move { runner::fail(&rooms, &ticket, &failure).await });
    }

    fn spawn(&mut self, job: String, work: impl Future<Output = Result<End, store::Error>> + Send + 'static) {
        self.running += 1;
        let inbox = self.inbox.clone();
        tokio::spawn(async move {
            // A panic in a job must neither take the node down nor leave its slot taken for ever.
            let result = match tokio::spawn(work).await {
                Ok(result) => result,
                Err(error) => {
                    tracing::error!(%job, %error, "the job's task broke off");
                    Ok(End::LeftOpen)
                }
            };
            report(&inbox, Message::Ended { job, result }).await;
        });
    }

    fn end_overdue(&mut self) {
        let now_ms = self.rooms.now_ms();
        let overdue = |open: &Open| match &open.phase {
            Phase::Waiting(ticket) => ticket.deadline_ms < now_ms,
            _ => false,
        };
        let jobs: Vec<String> =
            self.open.iter().filter(|(_, open)| overdue(open)).map(|(job, _)| job.clone()).collect();
        for job in jobs {
            if let Some(Open { customer, phase: Phase::Waiting(ticket) }) = self.open.remove(&job) {
                self.queue.remove(&customer, &job);
                let failure = Failure::new(Code::Timeout, "its turn did not come within its deadline");
                self.end_unrun(job, customer, ticket, failure);
            }
        }
    }

    fn close(&mut self, job: &str, result: Result<End, store::Error>) {
        self.open.remove(job);
        match result {
            Ok(End::Answered) => self.answered += 1,
            Ok(End::LeftOpen) => tracing::info!(%job, "the job stays open"),
            Err(error) => self.fail(error),
        }
        self.tell_progress();
    }

    /// The store failed: nothing more is promised from here on, and what was promised stays on disk.
    fn fail(&mut self, error: store::Error) {
        tracing::error!(%error, "the store failed; no more jobs are taken until the node is started again");
        self.stopped.get_or_insert_with(|| error.to_string());
    }

    fn tell_progress(&self) {
        let open = self.open.keys().cloned().collect();
        self.tell.send_replace(Progress { open, answered: self.answered });
    }

    // === recovery

    async fn recover(&mut self) -> Result<(), store::Error> {
        for row in self.rooms.store.open_jobs()? {
            let job = row.job.clone();
            let Some(request) = Event::from_json(&row.request)
                .ok()
                .and_then(|event| Request::decode(&event, &self.rooms.keys).ok())
            else {
                tracing::error!(%job, "an open job's request is no longer readable with this key");
                continue;
            };
            let judged = judge(&self.rooms.rules, &request, row.accepted_ms / 1000);
            let cancelled = self.rooms.store.is_cancelled(&job, &row.customer)?;
            let ticket = |admission| {
                Box::new(Ticket {
                    request: request.clone(),
                    admission,
                    relay: row.relay.clone(),
                    attempts: row.attempt,
                    deadline_ms: row.deadline_ms,
                })
            };
            match judged {
                Ok(admission) if cancelled => {
                    self.end_unrun(job, row.customer.clone(), ticket(admission), stopped(Stop::Customer));
                }
                Ok(admission) => {
                    tracing::info!(%job, attempt = row.attempt, "taking up an open job");
                    self.wait(job, row.customer.clone(), ticket(admission));
                }
                Err(refusal) => {
                    let records =
                        answer::failed(&self.rooms, &request, &row.relay, &refusal, Default::default());
                    match records {
                        Ok(records) => self.rooms.record(records).await?,
                        Err(error) => tracing::error!(%job, %error, "the error could not be signed"),
                    }
                }
            }
        }
        self.tell_progress();
        Ok(())
    }
}

async fn report(inbox: &mpsc::Sender<Message>, message: Message) {
    if inbox.send(message).await.is_err() {
        tracing::debug!("the dispatcher is gone; the process is ending");
    }
}

fn stopped(stop: Stop) -> Failure {
    let who = if stop == Stop::Customer { "the customer" } else { "the node's owner" };
    Failure::new(Code::Cancelled, format!("{who} cancelled"))
}

/// A token bucket over a minute.
#[derive(Debug, Default)]
struct Bucket {
    minute: u64,
    taken: u32,
}

impl Bucket {
    fn take(&mut self, now_ms: u64, per_minute: u32) -> bool {
        let minute = now_ms / 60_000;
        if minute != self.minute {
            *self = Bucket { minute, taken: 0 };
        }
        self.taken += 1;
        self.taken <= per_minute
    }
}
