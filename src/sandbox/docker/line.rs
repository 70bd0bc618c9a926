//! The node's end of the line to a shim: frames out, frames in, each to the run that it is about. What comes in comes
//! out of a container: whoever says more there than the wire allows is cut off. It knows nothing of what the runs are
//! for.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bollard::container::{AttachContainerResults, LogOutput};
use coinop_shim::wire::{Decoder, Ended, FromShim, PIECE_BYTES, Run, ToShim, WINDOW_BYTES, cost, encode};
use futures_util::StreamExt;
use tokio::io::AsyncWriteExt;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;

/// Frames that may wait for the engine to take them.
const WAITING: usize = 64;
/// What is kept of what a container says beside the frames.
const SAID_BYTES: usize = 1024;

pub struct Line {
    to: mpsc::Sender<Vec<u8>>,
    known: Arc<Known>,
    tasks: [AbortHandle; 2],
}

/// What both directions know.
#[derive(Default)]
struct Known {
    runs: Mutex<Runs>,
    /// Why the line ended, once it has.
    ended: OnceLock<String>,
}

#[derive(Default)]
struct Runs {
    last: u32,
    open: HashMap<u32, Waiting>,
}

/// Who waits for the frames of a run or a question.
struct Waiting {
    /// Bounded by `room`, and by the one last frame.
    to: mpsc::UnboundedSender<FromShim>,
    /// The cost of output that may still come before some was taken.
    room: usize,
    /// Bytes of input that may still be sent before some was taken.
    window: Arc<Semaphore>,
}

/// One run on the line. Dropping it forgets it.
pub struct Open {
    way: Way,
    from: mpsc::UnboundedReceiver<FromShim>,
    window: Arc<Semaphore>,
}

/// What can be said about a run, by whoever.
#[derive(Clone)]
pub struct Way {
    n: u32,
    line: Arc<Line>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gone(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, why.to_owned())
}

impl Line {
    /// Carries frames until either side lets go.
    pub fn new(attached: AttachContainerResults) -> Arc<Line> {
        let (to, mut waiting) = mpsc::channel::<Vec<u8>>(WAITING);
        let known = Arc::new(Known::default());
        let AttachContainerResults { mut output, mut input } = attached;
        let hearing = known.clone();
        let heard = tokio::spawn(async move {
            let mut decoder = Decoder::default();
            let mut said = Vec::new();
            let why = loop {
                let bytes = match output.next().await {
                    Some(Ok(LogOutput::StdOut { message } | LogOutput::Console { message })) => message,
                    Some(Ok(LogOutput::StdErr { message })) => {
                        let room = SAID_BYTES.saturating_sub(said.len()).min(message.len());
                        said.extend(message.get(..room).unwrap_or_default());
                        continue;
                    }
                    Some(Ok(LogOutput::StdIn { .. })) => continue,
                    Some(Err(why)) => break format!("the engine's stream broke: {why}"),
                    None if said.is_empty() => break "the container has ended".to_owned(),
                    None => {
                        break format!("the container has ended: {}", String::from_utf8_lossy(&said).trim());
                    }
                };
                decoder.push(&bytes);
                if let Err(why) = hearing.hand_out(&mut decoder) {
                    break why;
                }
            };
            hearing.end(why);
        });
        let sent = tokio::spawn(async move {
            while let Some(frame) = waiting.recv().await {
                if let Err(why) = input.write_all(&frame).await {
                    tracing::debug!(%why, "a shim takes no more frames");
                    return;
                }
            }
            // The shim ends with its stdin.
            if let Err(why) = input.shutdown().await {
                tracing::trace!(%why, "a shim's stdin was closed already");
            }
        });
        Arc::new(Line { to, known, tasks: [heard.abort_handle(), sent.abort_handle()] })
    }

    /// Why the line is dead, when it is.
    pub fn ended(&self) -> Option<&str> {
        self.known.ended.get().map(String::as_str)
    }

    /// Lets go of the shim, which ends with all that runs, and tells everybody who waits.
    pub fn cut(&self, why: &str) {
        self.known.end(why.to_owned());
        self.tasks.iter().for_each(AbortHandle::abort);
    }

    async fn send(&self, n: u32, message: &ToShim) -> io::Result<()> {
        let frame = encode(n, message).map_err(|why| io::Error::new(io::ErrorKind::FileTooLarge, why))?;
        if let Some(why) = self.ended() {
            return Err(gone(why));
        }
        self.to.send(frame).await.map_err(|_| gone("the shim takes no more frames"))
    }

    fn expect(self: &Arc<Line>) -> Open {
        let (to, from) = mpsc::unbounded_channel();
        let window = Arc::new(Semaphore::new(WINDOW_BYTES));
        let n = self.known.expect(Waiting { to, room: WINDOW_BYTES, window: window.clone() });
        Open { way: Way { n, line: self.clone() }, from, window }
    }

    /// Starts a run.
    pub async fn open(self: &Arc<Line>, run: Run) -> io::Result<Open> {
        let open = self.expect();
        self.send(open.way.n, &ToShim::Run(run)).await?;
        Ok(open)
    }

    /// Asks something that is about no run, and takes the answer.
    pub async fn ask(self: &Arc<Line>, question: &ToShim) -> io::Result<FromShim> {
        let mut open = self.expect();
        self.send(open.way.n, question).await?;
        open.next().await.ok_or_else(|| gone(self.ended().unwrap_or_default()))
    }
}

// === impl Known ===

impl Known {
    /// Gives a number that no other run has; 0 is nobody's.
    fn expect(&self, waiting: Waiting) -> u32 {
        let mut runs = locked(&self.runs);
        loop {
            runs.last = runs.last.wrapping_add(1);
            let n = runs.last;
            if n != 0 && !runs.open.contains_key(&n) {
                runs.open.insert(n, waiting);
                return n;
            }
        }
    }

    /// # Errors
    /// Why the line must be cut.
    fn hand_out(&self, decoder: &mut Decoder) -> Result<(), String> {
        while let Some((n, message)) = decoder.take::<FromShim>().map_err(|why| why.to_string())? {
            self.hand(n, message)?;
        }
        Ok(())
    }

    fn hand(&self, n: u32, message: FromShim) -> Result<(), String> {
        if let FromShim::Broken(why) = message {
            return Err(format!("the shim cannot go on: {why}"));
        }
        let mut runs = locked(&self.runs);
        // One that nobody waits for any more.
        let Some(run) = runs.open.get_mut(&n) else { return Ok(()) };
        let last = match &message {
            FromShim::Took(bytes) => {
                let bytes = *bytes as usize;
                if run.window.available_permits().saturating_add(bytes) > WINDOW_BYTES {
                    return Err("the shim took more than it was given".to_owned());
                }
                run.window.add_permits(bytes);
                return Ok(());
            }
            FromShim::Stdout(bytes) | FromShim::Stderr(bytes) => {
                let room = run.room.checked_sub(cost(bytes.len()));
                run.room = room.ok_or("the shim said more than it may")?;
                false
            }
            _ => true,
        };
        if run.to.send(message).is_err() {
            tracing::trace!(n, "a frame that nobody waits for");
        }
        if last {
            runs.open.remove(&n);
        }
        Ok(())
    }

    fn end(&self, why: String) {
        // The first reason is the true one.
        self.ended.set(why).unwrap_or_default();
        // Whoever waits for a frame hears that there will be none.
        locked(&self.runs).open.clear();
    }
}

// === impl Open ===

impl Drop for Open {
    fn drop(&mut self) {
        locked(&self.way.line.known.runs).open.remove(&self.way.n);
    }
}

impl Open {
    /// What the run says next; none when it has said its last, or the shim is gone.
    pub async fn next(&mut self) -> Option<FromShim> {
        self.from.recv().await
    }

    /// Tells the shim that a frame with so much output has gone to its reader.
    pub async fn took(&self, bytes: usize) -> io::Result<()> {
        let (cost, Way { n, line }) = (cost(bytes), &self.way);
        if let Some(run) = locked(&line.known.runs).open.get_mut(n) {
            run.room = run.room.saturating_add(cost);
        }
        line.send(*n, &ToShim::Took(u32::try_from(cost).unwrap_or(u32::MAX))).await
    }

    pub fn way(&self) -> Way {
        self.way.clone()
    }

    /// Sends what comes as the run's input, piece by piece, then the end. It waits while too much is on its way, and tells
    /// of each piece that has left.
    pub fn send_all<T: Fn() + Send>(
        &self,
        mut pieces: mpsc::Receiver<Vec<u8>>,
        sent: T,
    ) -> impl Future<Output = io::Result<()>> + Send + use<T> {
        let (Way { n, line }, window) = (self.way(), self.window.clone());
        async move {
            while let Some(bytes) = pieces.recv().await {
                for piece in bytes.chunks(PIECE_BYTES) {
                    let room = u32::try_from(piece.len()).unwrap_or(u32::MAX);
                    // The shim gives it back.
                    window.acquire_many(room).await.map_err(io::Error::other)?.forget();
                    line.send(n, &ToShim::Input(piece.to_vec())).await?;
                    sent();
                }
            }
            line.send(n, &ToShim::EndInput).await
        }
    }

    /// Sends all of an input and waits for the end of the run, whichever comes first.
    pub async fn feed(mut self, pieces: mpsc::Receiver<Vec<u8>>) -> io::Result<Ended> {
        let feeding = self.send_all(pieces, || {});
        tokio::pin!(feeding);
        let mut more = true;
        loop {
            tokio::select! {
                said = self.next() => match said {
                    Some(FromShim::Ended(ended)) => return Ok(ended),
                    Some(_) => {}
                    None => return Err(gone(self.way.line.ended().unwrap_or_default())),
                },
                fed = &mut feeding, if more => {
                    more = false;
                    fed?;
                }
            }
        }
    }
}

impl Way {
    pub async fn kill(&self) -> io::Result<()> {
        self.line.send(self.n, &ToShim::Kill).await
    }
}

#[cfg(test)]
mod tests {
    use coinop_shim::wire::Usage;

    use super::*;

    fn expected(known: &Known) -> (u32, mpsc::UnboundedReceiver<FromShim>, Arc<Semaphore>) {
        let (to, from) = mpsc::unbounded_channel();
        let window = Arc::new(Semaphore::new(WINDOW_BYTES));
        (known.expect(Waiting { to, room: WINDOW_BYTES, window: window.clone() }), from, window)
    }

    /// Counts what a shim gets across that never waits for us.
    fn flooded(piece: usize) -> (usize, String) {
        let known = Known::default();
        let (n, mut from, _) = expected(&known);
        let why = loop {
            if let Err(why) = known.hand(n, FromShim::Stdout(vec![0; piece])) {
                break why;
            }
        };
        known.end(why.clone());
        let mut frames = 0;
        while from.try_recv().is_ok() {
            frames += 1;
        }
        (frames, why)
    }

    #[test]
    fn a_shim_that_says_more_than_its_window_is_cut_off_however_small_the_pieces() {
        for (piece, most) in [(0, 4096), (1, 4096), (PIECE_BYTES, 8)] {
            let (frames, why) = flooded(piece);
            assert_eq!(why, "the shim said more than it may");
            assert!(frames <= most && frames > 0, "{frames} frames of {piece}");
        }
    }

    #[test]
    fn a_shim_that_takes_more_than_it_was_given_is_cut_off() {
        let known = Known::default();
        let (n, _from, window) = expected(&known);
        window.try_acquire_many(100).unwrap().forget();
        known.hand(n, FromShim::Took(40)).unwrap();
        assert_eq!(known.hand(n, FromShim::Took(61)).unwrap_err(), "the shim took more than it was given");
        assert_eq!(
            known.hand(n, FromShim::Took(u32::MAX)).unwrap_err(),
            "the shim took more than it was given"
        );
        known.hand(n, FromShim::Took(60)).unwrap();
    }

    #[test]
    fn after_its_last_word_a_run_is_nobody_s_and_answers_go_to_their_questions() {
        let known = Known::default();
        let (first, mut to_first, _) = expected(&known);
        let (second, mut to_second, _) = expected(&known);
        known.hand(second, FromShim::Killed { starved: false }).unwrap();
        known.hand(first, FromShim::Usage(Usage::default())).unwrap();
        for _ in 0..100_000 {
            known.hand(first, FromShim::Ended(Ended::default())).unwrap();
            known.hand(77, FromShim::Stdout(vec![0; 100])).unwrap();
        }
        assert_eq!(to_first.try_recv(), Ok(FromShim::Usage(Usage::default())));
        assert_eq!(to_second.try_recv(), Ok(FromShim::Killed { starved: false }));
        assert!(to_first.try_recv().is_err() && to_second.try_recv().is_err());
    }

    #[test]
    fn numbers_that_come_round_again_spare_the_runs_that_live() {
        let known = Known::default();
        let (lives, _from, _) = expected(&known);
        locked(&known.runs).last = u32::MAX;
        assert_eq!((lives, expected(&known).0), (1, 2), "neither 0 nor the living one");
    }

    #[test]
    fn a_broken_shim_is_the_reason_for_its_end() {
        let why = Known::default().hand(0, FromShim::Broken("no more".to_owned())).unwrap_err();
        assert_eq!(why, "the shim cannot go on: no more");
    }
}
