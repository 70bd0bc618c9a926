//! The dispatcher: the one owner of which jobs are open. It takes events in order, judges them, and gives
//! jobs their turn; it never waits for the disk, a repository or a sandbox (R15). Workers do, and report back.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::budget::{Fair, Sample, Tombstones};
use super::ending;
use super::engine::{Offer, Progress, Status};
use super::paying::{Awaited, QuoteLine};
use super::queue::Queue;
use super::quota::Quota;
use super::runner;
use super::ticket::{End, Stop, Ticket};
use super::till::Paid;
use super::{Failure, Rooms};
use crate::ledger;
use crate::market::Code;
use crate::store;

const TICK: Duration = Duration::from_secs(1);

pub(super) enum Message {
    Offer(Offer),
    Recorded {
        job: String,
        result: Result<(), ledger::Error>,
        offer: Offer,
        /// The payment that it came by, when there was one.
        paid: Option<Paid>,
    },
    /// An invoice is on its way to the customer, or will not be.
    Quoted {
        job: String,
        result: Result<Option<Awaited>, store::Error>,
    },
    Paid(Paid),
    Ended {
        job: String,
        result: Result<End, store::Error>,
    },
    /// The job's task panicked in this attempt.
    Broke {
        job: String,
        attempts: u32,
    },
    /// A cancellation is durable, or will not be.
    Withdrawn {
        keys: Vec<(String, String)>,
        result: Result<(), store::Error>,
    },
    Cancel {
        job: String,
        reply: oneshot::Sender<Result<(), Failure>>,
    },
    /// The owner's cancellation is durable, or will not be.
    CancelRecorded {
        job: String,
        result: Result<(), store::Error>,
        reply: oneshot::Sender<Result<(), Failure>>,
    },
    Drain,
    Stop,
    /// Nothing is begun any more; the dispatcher ends after its last worker.
    End,
    Status(oneshot::Sender<Status>),
}

/// One open job as the dispatcher sees it.
pub(super) struct Open {
    pub(super) customer: String,
    pub(super) phase: Phase,
}

pub(super) enum Phase {
    /// Its acceptance is on its way to the disk; stopped meanwhile, it never runs.
    Recording(Box<Ticket>, Option<Stop>),
    Waiting(Box<Ticket>),
    Running(watch::Sender<Option<Stop>>),
}

pub(super) struct Dispatcher {
    pub(super) rooms: Rooms,
    pub(super) inbox: mpsc::Sender<Message>,
    pub(super) open: HashMap<String, Open>,
    pub(super) queue: Queue,
    pub(super) running: usize,
    pub(super) draining: bool,
    /// The dispatcher returns as soon as nothing that it began goes on.
    pub(super) ending: bool,
    /// Everything begun here: jobs, and records on their way to the disk. They end with the dispatcher.
    workers: JoinSet<()>,
    pub(super) stopped: Option<store::Error>,
    pub(super) refusals: Fair,
    pub(super) quotes: Fair,
    pub(super) balances: Fair,
    /// Words to customers who cannot be served now.
    pub(super) busy: Fair,
    pub(super) told_refusals: Sample,
    pub(super) quota: Quota,
    pub(super) tombstones: Tombstones,
    /// Requests taken back, each with its author, whose record is on its way to the disk.
    pub(super) withdrawing: HashSet<(String, String)>,
    /// Requests that an invoice is being made for.
    pub(super) quoting: HashSet<String>,
    /// Requests that wait for their quote.
    pub(super) quote_line: QuoteLine,
    /// Requests that are quoted and not paid yet.
    pub(super) awaiting: HashMap<String, Awaited>,
    /// Events that came when nothing was taken any more. Kept, so that they are neither done nor fetched again.
    pub(super) untaken: Vec<Offer>,
    answered: u64,
    tell: watch::Sender<Progress>,
}

// === impl Dispatcher: the loop and the turns; intake stands in `intake.rs`

impl Dispatcher {
    pub(super) fn new(
        rooms: Rooms,
        inbox: mpsc::Sender<Message>,
        tell: watch::Sender<Progress>,
    ) -> Dispatcher {
        Dispatcher {
            rooms,
            inbox,
            open: HashMap::new(),
            queue: Queue::default(),
            running: 0,
            draining: false,
            ending: false,
            workers: JoinSet::new(),
            stopped: None,
            refusals: Fair::default(),
            quotes: Fair::default(),
            balances: Fair::default(),
            busy: Fair::default(),
            told_refusals: Sample::default(),
            quota: Quota::default(),
            tombstones: Tombstones::default(),
            withdrawing: HashSet::new(),
            quoting: HashSet::new(),
            quote_line: QuoteLine::default(),
            awaiting: HashMap::new(),
            untaken: Vec::new(),
            answered: 0,
            tell,
        }
    }

    pub(super) async fn run(mut self, mut messages: mpsc::Receiver<Message>) -> Option<store::Error> {
        let mut tick = tokio::time::interval(TICK);
        self.pump();
        while !(self.ending && self.workers.is_empty() && messages.is_empty()) {
            tokio::select! {
                // Never `None`: the dispatcher owns a sender.
                Some(message) = messages.recv() => self.handle(message),
                Some(ended) = self.workers.join_next() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "a worker of the dispatcher broke off");
                    }
                }
                _ = tick.tick() => {
                    self.end_overdue();
                    self.forget_quotes();
                    self.quote_those_who_wait();
                    self.look_at_store();
                }
            }
        }
        self.stopped
    }

    /// Begins something that the dispatcher does not wait for, and that does not outlive it.
    pub(super) fn begin(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        self.workers.spawn(work);
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Offer(offer) => self.offered(offer),
            Message::Recorded { job, result, offer, paid } => self.recorded(job, result, offer, paid),
            Message::Quoted { job, result } => self.quoted(job, result),
            Message::Paid(paid) => self.paid(paid),
            Message::Ended { job, result } => {
                self.running -= 1;
                self.close(&job, result);
                self.pump();
            }
            Message::Broke { job, attempts } => {
                self.running -= 1;
                self.broke(&job, attempts);
                self.pump();
            }
            Message::Withdrawn { keys, result } => self.withdrawn(&keys, result),
            Message::Cancel { job, reply } => self.cancel(job, reply),
            Message::CancelRecorded { job, result, reply } => self.cancel_recorded(&job, result, reply),
            Message::Drain => self.draining = true,
            Message::Stop => {
                for open in self.open.values() {
                    if let Phase::Running(stop) = &open.phase {
                        stop.send_replace(Some(Stop::Drain));
                    }
                }
            }
            Message::End => (self.draining, self.ending) = (true, true),
            Message::Status(reply) => {
                let status = Status {
                    running: self.running,
                    waiting: self.queue.len(),
                    draining: self.draining,
                    stopped: self.stopped.as_ref().map(ToString::to_string),
                    open: self.open.keys().cloned().collect(),
                };
                if reply.send(status).is_err() {
                    tracing::debug!("nobody waits for the status");
                }
            }
        }
    }

    // === turns

    pub(super) fn pump(&mut self) {
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
            let attempts = ticket.attempts.saturating_add(1);
            self.spawn(job, attempts, async move { runner::run(&rooms, &ticket, stopped).await });
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
    pub(super) fn end_unrun(&mut self, job: String, customer: String, ticket: Box<Ticket>, failure: Failure) {
        let (stop, _) = watch::channel(None);
        self.open.insert(job.clone(), Open { customer, phase: Phase::Running(stop) });
        let rooms = self.rooms.clone();
        let attempts = ticket.attempts.saturating_add(1);
        self.spawn(job, attempts, async move { ending::fail(&rooms, &ticket, &failure).await });
    }

    pub(super) fn spawn(
        &mut self,
        job: String,
        attempts: u32,
        work: impl Future<Output = Result<End, store::Error>> + Send + 'static,
    ) {
        self.running += 1;
        let inbox = self.inbox.clone();
        self.begin(async move {
            // A panic in a job must neither take the node down nor leave its slot taken for ever. What it leaves
            // half done is its sandbox, which goes with it.
            let message = match AssertUnwindSafe(work).catch_unwind().await {
                Ok(result) => Message::Ended { job, result },
                Err(_) => {
                    tracing::error!(%job, "the job's task panicked");
                    Message::Broke { job, attempts }
                }
            };
            report(&inbox, message).await;
        });
    }

    fn end_overdue(&mut self) {
        let now_ms = self.rooms.now_ms();
        let overdue = |open: &Open| match &open.phase {
            Phase::Waiting(ticket) => ticket.start_by_ms() < now_ms,
            _ => false,
        };
        let jobs: Vec<String> =
            self.open.iter().filter(|(_, open)| overdue(open)).map(|(job, _)| job.clone()).collect();
        for job in jobs {
            if let Some(Open { customer, phase: Phase::Waiting(ticket) }) = self.open.remove(&job) {
                self.queue.remove(&customer, &job);
                let failure = ticket.too_late(ticket.start_by_ms(), "its turn did not come in time");
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
    pub(super) fn fail(&mut self, error: store::Error) {
        if self.stopped.is_none() {
            tracing::error!(%error, "the store failed; no more jobs are taken until the node is started again");
            self.stopped = Some(error);
            self.tell_progress();
        }
    }

    /// A write that nobody waited for (a cursor, a delivery) may have failed, too.
    fn look_at_store(&mut self) {
        if let Some(error) = self.rooms.store.health().poisoned {
            self.fail(error);
        }
    }

    pub(super) fn tell_progress(&self) {
        let open = self.open.keys().chain(self.awaiting.keys()).cloned().collect();
        let stopped = self.stopped.is_some();
        self.tell.send_replace(Progress { open, answered: self.answered, stopped });
    }
}

pub(super) async fn report(inbox: &mpsc::Sender<Message>, message: Message) {
    if inbox.send(message).await.is_err() {
        tracing::debug!("the dispatcher is gone; the process is ending");
    }
}

pub(super) fn stopped(stop: Stop) -> Failure {
    let who = if stop == Stop::Customer { "the customer" } else { "the node's owner" };
    Failure::new(Code::Cancelled, format!("{who} cancelled"))
}
