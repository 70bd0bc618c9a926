//! What the tasks of one living sandbox have in common: its socket to init, its folders, what is left of its output,
//! its pace, whether it does anything, and which commands wait for their exit. The trait's methods over it are `cell`, one command is `exec`.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coinop_shim::beneath::used_bytes;
use coinop_shim::pace::Pace;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use super::super::idle::Activity;
use super::super::{Exit, Policy};
use super::life::Life;
use super::wire::{self, FromInit, ToInit};

/// The node's end of an init's control socket.
pub struct Control(AsyncFd<OwnedFd>);

impl Control {
    pub fn new(socket: OwnedFd) -> io::Result<Control> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        // SAFETY: an OwnedFd keeps its one descriptor open for as long as it lives, and nobody takes it out again.
        Ok(Control(unsafe { AsyncFd::register(socket) }?))
    }

    pub async fn send(&self, message: &ToInit, beside: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = wire::encode(message)?;
        self.0.async_io(Interest::WRITABLE, |socket| wire::send_bytes(socket.as_fd(), &bytes, beside)).await
    }

    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<(FromInit, Vec<OwnedFd>)>> {
        self.0.async_io(Interest::READABLE, |socket| wire::receive(socket.as_fd(), buffer)).await
    }
}

/// The folders of a sandbox, as its init passed them out.
pub struct Folders {
    pub upper: OwnedFd,
    pub workspace: OwnedFd,
    pub job: OwnedFd,
    pub proc: OwnedFd,
    pub overlay: bool,
}

/// What the tasks of one sandbox have in common.
pub struct Shared {
    pub id: String,
    pub life: Arc<Life>,
    pub policy: Policy,
    pub folders: Folders,
    pub activity: Arc<Activity>,
    control: Control,
    output_left: AtomicU64,
    pace: Mutex<Pace>,
    /// What the times of its pace count from.
    began: Instant,
    /// Bytes of a base that had to be copied: the node's writing, not the job's.
    copied_bytes: AtomicU64,
    running: Mutex<HashMap<u64, oneshot::Sender<Exit>>>,
}

impl Shared {
    pub fn new(id: String, life: Arc<Life>, policy: Policy, folders: Folders, control: Control) -> Shared {
        Shared {
            id,
            activity: Activity::new(),
            output_left: AtomicU64::new(policy.output_bytes),
            pace: Mutex::new(Pace::new(policy.output_bytes_per_s)),
            began: Instant::now(),
            copied_bytes: AtomicU64::new(0),
            life,
            policy,
            folders,
            control,
            running: Mutex::new(HashMap::new()),
        }
    }

    /// Bytes of its files that are not the job's writing.
    pub fn leave_out(&self, bytes: u64) {
        self.copied_bytes.store(bytes, Ordering::Relaxed);
    }

    pub async fn ask(&self, message: &ToInit, beside: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.control.send(message, beside).await
    }

    /// Where the exit of this command will come.
    pub fn await_exit(&self, n: u64) -> oneshot::Receiver<Exit> {
        let (tell, ended) = oneshot::channel();
        self.running().insert(n, tell);
        ended
    }

    /// The command was not started after all.
    pub fn forget(&self, n: u64) {
        self.running().remove(&n);
    }

    fn running(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Exit>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in the sandbox's files, a copied base left out.
    pub fn file_bytes(&self) -> u64 {
        let used = used_bytes(self.folders.upper.as_fd());
        used.saturating_sub(self.copied_bytes.load(Ordering::Relaxed))
    }

    /// How many of these bytes of output are still within the policy.
    pub fn take_output(&self, bytes: usize) -> usize {
        let wanted = bytes as u64;
        let before = self
            .output_left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(wanted)))
            .unwrap_or(0);
        usize::try_from(before.min(wanted)).unwrap_or(bytes)
    }

    /// Bytes of output that may be taken from this command now; when there are none, how long until there are some.
    pub fn room(&self, n: u64) -> (usize, Duration) {
        let (pace, now) = (self.pace(), self.began.elapsed());
        (pace.room(now, n), pace.wait(now, n))
    }

    /// So many bytes of output were taken from this command.
    pub fn took(&self, n: u64, bytes: usize) {
        self.pace().took(self.began.elapsed(), n, bytes);
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends one command; the sandbox lives on. Without an init to ask, all has ended already.
    pub async fn kill_command(&self, n: u64) {
        if let Err(why) = self.ask(&ToInit::Kill { n }, &[]).await {
            tracing::debug!(id = self.id, %why, "no init to end a command");
        }
    }

    /// Hands each exit to its command until the sandbox ends.
    pub async fn listen(self: Arc<Self>, mut buffer: Vec<u8>) {
        loop {
            let (n, exit) = match self.control.receive(&mut buffer).await {
                Ok(Some((FromInit::NotStarted { n, errno }, _))) => (n, Exit::NotStarted { errno }),
                Ok(Some((FromInit::Exited { n, code: Some(code), .. }, _))) => (n, Exit::Code { code }),
                Ok(Some((FromInit::Exited { n, signal, .. }, _))) => {
                    (n, Exit::Signal { signal: signal.unwrap_or_default() })
                }
                Ok(Some((FromInit::Ready { .. }, _))) => continue,
                Ok(Some((FromInit::Broken { step, errno }, _))) => {
                    tracing::warn!(id = self.id, step, errno, "a sandbox broke");
                    break;
                }
                Ok(None) => break,
                Err(why) => {
                    tracing::debug!(id = self.id, %why, "a sandbox's init is gone");
                    break;
                }
            };
            let waiting = self.running().remove(&n);
            if waiting.is_some_and(|waiting| waiting.send(exit).is_err()) {
                tracing::trace!(n, "nobody waits for this command");
            }
        }
        // Without its init nothing of it may run. Commands hear of the end when the cause is known.
        self.life.strike();
        if let Err(why) = self.life.gone().await {
            tracing::error!(id = self.id, %why, "a sandbox does not end");
        }
        self.running().clear();
    }
}
