//! The dispatcher: the one owner of which jobs are open. It takes events in order, judges them, and gives
//! jobs their turn; it never waits for the disk, a repository or a sandbox (R15). Workers do, and report back.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use nostr_sdk::prelude::Event;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::budget::{Bucket, Tombstones};
use super::ending;
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
/// How long jobs that were told to stop, and writes on their way to the disk, are waited for.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// Offers and reports that may wait for the dispatcher before their senders do.
const INBOX: usize = 256;

/// Why no job is taken any more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] store::Error),
    /// A bug: what was promised is on disk, and is taken up at the next start.
    #[error("the dispatcher broke off, which is a fault of this program; the log says where")]
    Broke,
}

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
    /// Ids of all open jobs and of requests that wait to be paid, so that their cancellation can be watched for.
    pub open: Vec<String>,
    /// Jobs that have got their terminal answer since the start.
    pub answered: u64,
    /// The store failed: no event is taken any more.
    pub stopped: bool,
}

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
        result: Result<Option<u64>, store::Error>,
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

/// Handle to the running dispatcher. When the last one is dropped without [`Engine::end`], it is cut, with
/// everything that it began.
#[derive(Clone)]
pub struct Engine {
    inbox: mpsc::Sender<Message>,
    progress: watch::Receiver<Progress>,
    dispatcher: Arc<Mutex<Option<AbortOnDropHandle<Option<store::Error>>>>>,
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
            ending: false,
            workers: JoinSet::new(),
            stopped: None,
            refusals: Bucket::default(),
            quota: Quota::default(),
            tombstones: Tombstones::default(),
            withdrawing: HashSet::new(),
            quoting: HashSet::new(),
            awaiting: HashMap::new(),
            untaken: Vec::new(),
            answered: 0,
            tell,
        };
        dispatcher.recover()?;
        let dispatcher = AbortOnDropHandle::new(tokio::spawn(dispatcher.run(messages)));
        let dispatcher = Arc::new(Mutex::new(Some(dispatcher)));
        Ok(Engine { inbox, progress, dispatcher })
    }

    /// Hands over a verified event. Waits only while the dispatcher's inbox is full.
    pub async fn offer(&self, offer: Offer) {
        if self.inbox.send(Message::Offer(offer)).await.is_err() {
            tracing::error!("an event was dropped: the dispatcher is gone");
        }
    }

    /// Our wallet says that an invoice of ours was settled.
    pub async fn paid(&self, paid: Paid) {
        if self.inbox.send(Message::Paid(paid)).await.is_err() {
            tracing::debug!("the dispatcher is gone; the payment is seen at the next start");
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
                && tokio::time::timeout(STOP_GRACE, self.until_idle()).await.is_err()
            {
                tracing::error!("drain: jobs did not stop");
            }
        }
        self.status().await.open.len()
    }

    /// Ends the dispatcher. When this returns, neither it nor anything that it began holds a room any more.
    /// Ending again does nothing.
    ///
    /// # Errors
    /// Why no job was taken any more, if that was so.
    pub async fn end(&self) -> Result<(), Error> {
        let Some(mut dispatcher) = self.dispatcher.lock().await.take() else { return Ok(()) };
        if self.inbox.send(Message::End).await.is_err() {
            tracing::debug!("the dispatcher is gone");
        }
        if let Ok(ended) = tokio::time::timeout(STOP_GRACE, &mut dispatcher).await {
            return ended.map_err(|_| Error::Broke)?.map_or(Ok(()), |error| Err(error.into()));
        }
        tracing::error!("something of a job does not end; it is cut");
        // Its workers go with it.
        dispatcher.abort();
        dispatcher.await.ok().flatten().map_or(Ok(()), |error| Err(error.into()))
    }

    /// Returns when there is no dispatcher any more: after [`Engine::end`], or when it broke off.
    pub async fn gone(&self) {
        self.inbox.closed().await;
    }

    async fn until_idle(&self) {
        while self.status().await.running > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
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
    pub(super) refusals: Bucket,
    pub(super) quota: Quota,
    pub(super) tombstones: Tombstones,
    /// Requests taken back, each with its author, whose record is on its way to the disk.
    pub(super) withdrawing: HashSet<(String, String)>,
    /// Requests that an invoice is being made for.
    pub(super) quoting: HashSet<String>,
    /// Requests that are quoted and not paid yet, with the quote's expiry, Unix milliseconds.
    pub(super) awaiting: HashMap<String, u64>,
    /// Events that came when nothing was taken any more. Kept, so that they are neither done nor fetched again.
    pub(super) untaken: Vec<Offer>,
    answered: u64,
    tell: watch::Sender<Progress>,
}

// === impl Dispatcher: the loop and the turns; intake stands in `intake.rs`

impl Dispatcher {
    async fn run(mut self, mut messages: mpsc::Receiver<Message>) -> Option<store::Error> {
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
