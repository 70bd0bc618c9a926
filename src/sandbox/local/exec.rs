//! One running command as the node sees it: its output streamed at its pace, counted and cut, its time-out, its one exit.
//! The process itself is started and reaped by the sandbox's init.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use coinop_shim::sys;
use nix::unistd::{Gid, Uid, fchown};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

use super::super::ending::Circumstances;
use super::super::idle::{Activity, Busy};
use super::super::{Event, Exit};
use super::shared::Shared;

/// Bytes of output taken at once.
const CHUNK: usize = 16 * 1024;
/// Events that may wait for their reader before the command itself must wait.
pub const WAITING: usize = 64;
/// How long output may still come from a command that has ended, when a process it left behind holds the pipe.
const AFTERMATH: Duration = Duration::from_millis(50);

/// A pipe with one end for us, that never blocks, and one for the command of this user; none where it is the node's own.
pub fn output_pipe(uid: Option<u32>) -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (ours, theirs) = io::pipe()?;
    give(theirs.as_fd(), uid);
    Ok((pipe::Receiver::from_owned_fd(ours.into())?, theirs.into()))
}

pub fn input_pipe(uid: Option<u32>) -> io::Result<(OwnedFd, pipe::Sender)> {
    let (theirs, ours) = io::pipe()?;
    give(theirs.as_fd(), uid);
    Ok((theirs.into(), pipe::Sender::from_owned_fd(ours.into())?))
}

/// Makes the job the owner of a pipe, so that it can open its own streams by path, as in `tee /dev/stderr`.
fn give(pipe: BorrowedFd<'_>, uid: Option<u32>) {
    let Some(uid) = uid else { return };
    if let Err(errno) = fchown(pipe, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid))) {
        tracing::debug!(%errno, "a job cannot open its streams by path");
    }
}

/// Feeds a command's stdin until the sender is dropped or nobody reads.
pub async fn feed(mut to: pipe::Sender, mut from: mpsc::Receiver<Vec<u8>>, activity: Arc<Activity>) {
    while let Some(bytes) = from.recv().await {
        if let Err(why) = to.write_all(&bytes).await {
            tracing::debug!(%why, "a command closed its stdin");
            return;
        }
        activity.heard();
    }
}

/// One stream of a command.
struct Stream {
    pipe: Option<pipe::Receiver>,
    buffer: Vec<u8>,
    wrap: fn(Vec<u8>) -> Event,
}

impl Stream {
    fn new(pipe: pipe::Receiver, wrap: fn(Vec<u8>) -> Event) -> Stream {
        Stream { pipe: Some(pipe), buffer: vec![0; CHUNK], wrap }
    }

    /// The next bytes, at most so many; waits for ever once the stream has ended.
    async fn next(&mut self, most: usize) -> Option<Vec<u8>> {
        let Some(pipe) = &mut self.pipe else { return std::future::pending().await };
        let most = most.min(self.buffer.len());
        match pipe.read(self.buffer.get_mut(..most).unwrap_or_default()).await {
            Ok(len) if len > 0 => Some(self.buffer.get(..len).unwrap_or_default().to_vec()),
            Ok(_) | Err(_) => {
                self.pipe = None;
                None
            }
        }
    }

    /// Bytes that stand in the pipe now.
    fn waiting(&self) -> usize {
        self.pipe.as_ref().map_or(0, |pipe| sys::waiting_bytes(pipe.as_fd()))
    }
}

pub struct Running {
    pub n: u64,
    pub stdout: pipe::Receiver,
    pub stderr: pipe::Receiver,
    pub ended: oneshot::Receiver<Exit>,
    pub events: mpsc::Sender<Event>,
    pub timeout: Option<Duration>,
    pub busy: Busy,
    /// How often the kernel had killed something in the sandbox for want of memory before this began.
    pub kills_before: u64,
}

impl Running {
    /// Streams until the end. Says nothing at the end when the sandbox died without a limit being its cause.
    pub async fn run(self, sandbox: Arc<Shared>) {
        let Running { n, stdout, stderr, mut ended, events, timeout, mut busy, kills_before } = self;
        let mut streams = [Stream::new(stdout, Event::Stdout), Stream::new(stderr, Event::Stderr)];
        let [out, err] = &mut streams;
        let (cause, mut caused) = oneshot::channel();
        let timer = timeout.map(|time| {
            let sandbox = sandbox.clone();
            tokio::spawn(async move {
                tokio::time::sleep(time).await;
                // The run may have ended in this moment; then nobody asks for the cause.
                cause.send(()).unwrap_or_default();
                sandbox.kill_command(n).await;
            })
        });
        let (mut cut, mut idle) = (false, false);
        // Bytes that are taken whatever the pace.
        let mut owed = 0;
        let mut exit: Option<Result<Exit, ()>> = None;
        let deadline = tokio::time::sleep(Duration::MAX);
        tokio::pin!(deadline);
        while out.pipe.is_some() || err.pipe.is_some() || exit.is_none() {
            let (room, wait) = sandbox.room(n);
            let most = room.max(owed);
            let (bytes, wrap) = tokio::select! {
                biased;
                bytes = out.next(most), if most > 0 => (bytes, out.wrap),
                bytes = err.next(most), if most > 0 => (bytes, err.wrap),
                how = &mut ended, if exit.is_none() => {
                    exit = Some(how.map_err(drop));
                    // Its end does not wait for what it has printed before. One more, to see that nothing follows.
                    owed = out.waiting() + err.waiting() + 1;
                    deadline.as_mut().reset(tokio::time::Instant::now() + AFTERMATH);
                    continue;
                }
                () = &mut deadline, if exit.is_some() => break,
                () = busy.is_idle(), if exit.is_none() => {
                    idle = true;
                    sandbox.kill_command(n).await;
                    continue;
                }
                () = tokio::time::sleep(wait), if most == 0 => continue,
            };
            let Some(mut bytes) = bytes else { continue };
            sandbox.took(n, bytes.len());
            owed = owed.saturating_sub(bytes.len());
            let allowed = sandbox.take_output(bytes.len());
            if allowed < bytes.len() {
                bytes.truncate(allowed);
                if !cut {
                    cut = true;
                    sandbox.kill_command(n).await;
                }
            }
            // A reader that has gone away does not stop the command.
            if !bytes.is_empty() && sandbox.activity.waits(events.send(wrap(bytes))).await.is_err() {
                tracing::trace!(n, "nobody reads this output");
            }
        }
        if let Some(timer) = timer {
            timer.abort();
        }
        let timed_out = caused.try_recv().is_ok();
        let natural = exit.and_then(Result::ok);
        // A command that succeeded was not short of memory: one look less before its end is told.
        let succeeded = natural == Some(Exit::Code { code: 0 });
        let starved = !succeeded && sandbox.life.group.memory_kills() > kills_before;
        let limit = sandbox.life.limit();
        let exit = Circumstances { limit, cut, timed_out, idle, starved }.exit(natural);
        if let Some(exit) = exit
            && events.send(Event::Exit(exit)).await.is_err()
        {
            tracing::trace!(n, "nobody waits for this exit");
        }
    }
}
