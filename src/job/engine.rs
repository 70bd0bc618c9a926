//! The engine as the rest of the node sees it: a handle that hands events over, asks, drains and ends. What is done with
//! them is the dispatcher's.

use std::sync::Arc;
use std::time::Duration;

use nostr_sdk::prelude::Event;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use super::dispatcher::{Dispatcher, Message};
use super::till::Paid;
use super::{Failure, Rooms};
use crate::market::Code;
use crate::store;

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
        let mut dispatcher = Dispatcher::new(rooms, inbox.clone(), tell);
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
