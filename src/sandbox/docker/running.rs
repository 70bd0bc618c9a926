//! One running command as the node sees it: its output counted and cut, its time-out, its one exit.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coinop_shim::wire::{Ended, FromShim};
use tokio::sync::mpsc;

use super::super::ending::Circumstances;
use super::super::idle::Busy;
use super::super::{Event, Exit};
use super::cell::Shared;
use super::line::{Open, Way};

/// Carries one command's streams to its reader, to its one exit.
pub async fn carry(
    shared: Arc<Shared>,
    open: Open,
    events: mpsc::Sender<Event>,
    timeout: Option<Duration>,
    mut busy: Busy,
) {
    let timed_out = Arc::new(AtomicBool::new(false));
    let timer = timeout.map(|time| tokio::spawn(kill_after(time, open.way(), timed_out.clone())));
    let mut how = Streamed::default();
    if let Err(why) = stream(&shared, open, &events, &mut busy, &mut how).await {
        tracing::debug!(%why, "a command's line broke");
    }
    let Streamed { cut, idle, ended } = how;
    timer.inspect(|timer| timer.abort());
    let limit = shared.limit();
    // A command that ended with its sandbox had no end of its own.
    let stopped = limit.is_some() || shared.is_stopped();
    let natural = ended.and_then(exit).filter(|exit| !stopped || !is_kill(*exit));
    let starved = ended.is_some_and(|ended| ended.starved);
    if starved {
        shared.relieve().await;
    }
    let timed_out = timed_out.load(Ordering::SeqCst);
    if let Some(exit) = (Circumstances { limit, cut, timed_out, idle, starved }).exit(natural)
        && events.send(Event::Exit(exit)).await.is_err()
    {
        tracing::trace!("nobody waits for this exit");
    }
}

/// Apart from the streams: a reader that takes nothing does not stop the clock.
async fn kill_after(time: Duration, run: Way, timed_out: Arc<AtomicBool>) {
    tokio::time::sleep(time).await;
    timed_out.store(true, Ordering::SeqCst);
    if let Err(why) = run.kill().await {
        tracing::debug!(%why, "it went before its time was over");
    }
}

#[derive(Default)]
struct Streamed {
    /// Whether its output was cut, or it was ended for doing nothing.
    cut: bool,
    idle: bool,
    /// How it ended; none when its sandbox went first.
    ended: Option<Ended>,
}

async fn stream(
    shared: &Shared,
    mut open: Open,
    events: &mpsc::Sender<Event>,
    busy: &mut Busy,
    how: &mut Streamed,
) -> io::Result<()> {
    loop {
        let said = tokio::select! {
            biased;
            said = open.next() => said,
            () = busy.is_idle() => {
                how.idle = true;
                open.way().kill().await?;
                continue;
            }
        };
        let Some(said) = said else { return Ok(()) };
        let (wrap, bytes): (fn(Vec<u8>) -> Event, _) = match said {
            FromShim::Stdout(bytes) => (Event::Stdout, bytes),
            FromShim::Stderr(bytes) => (Event::Stderr, bytes),
            FromShim::Ended(ended) => {
                how.ended = Some(ended);
                return Ok(());
            }
            _ => continue,
        };
        let len = bytes.len();
        let bytes = shared.allowed(bytes);
        if bytes.len() < len && !how.cut {
            how.cut = true;
            open.way().kill().await?;
        }
        // A reader that has gone away does not stop the command.
        if !bytes.is_empty() && shared.activity.waits(events.send(wrap(bytes))).await.is_err() {
            tracing::trace!("nobody reads this output");
        }
        open.took(len).await?;
    }
}

fn is_kill(exit: Exit) -> bool {
    exit == Exit::Signal { signal: 9 }
}

fn exit(ended: Ended) -> Option<Exit> {
    let Ended { code, signal, errno, .. } = ended;
    errno
        .map(|errno| Exit::NotStarted { errno })
        .or(code.map(|code| Exit::Code { code }))
        .or(signal.map(|signal| Exit::Signal { signal }))
}
