//! What one fetch may cost, shared by everything that works on it: bytes from the network, time, and the
//! caller's wish to stop. It does no work itself.

use std::io::{self, Read};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::Error;

/// Bounds of one fetch, counted from `new`.
#[derive(Debug)]
pub(super) struct Budget {
    deadline: Instant,
    pub cap_ms: u64,
    /// Longest silence of the server.
    pub stall: Duration,
    bytes_cap: u64,
    bytes: AtomicU64,
    cancelled: AtomicBool,
    /// The agent whose sockets are shut when the caller goes away.
    agent: Mutex<Option<ureq::Agent>>,
}

impl Budget {
    pub fn new(cap_ms: u64, stall_ms: u64, bytes_cap: u64, now: Instant) -> Budget {
        Budget {
            deadline: now + Duration::from_millis(cap_ms),
            cap_ms,
            stall: Duration::from_millis(stall_ms),
            bytes_cap,
            bytes: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            agent: Mutex::new(None),
        }
    }

    /// Time left; an error once there is none or the caller is gone.
    pub fn left(&self) -> Result<Duration, Error> {
        if self.cancelled.load(Relaxed) {
            return Err(Error::Cancelled);
        }
        match self.deadline.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(left),
            _ => Err(Error::Timeout { cap_ms: self.cap_ms }),
        }
    }

    /// Counts bytes that came in.
    pub fn spend(&self, bytes: u64) -> Result<(), Error> {
        let spent = self.bytes.fetch_add(bytes, Relaxed).saturating_add(bytes);
        if spent > self.bytes_cap {
            return Err(Error::TooLarge { what: "bytes to download", cap: self.bytes_cap });
        }
        Ok(())
    }

    pub fn watch(&self, agent: ureq::Agent) {
        if let Ok(mut slot) = self.agent.lock() {
            *slot = Some(agent);
        }
    }

    /// Stops the fetch, even one that is blocked in a read.
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
        let agent = self.agent.lock().ok().and_then(|mut slot| slot.take());
        if let Some(agent) = agent {
            agent.shutdown();
        }
    }

    /// Names an I/O error of this fetch: a broken socket after `cancel` is a cancellation.
    pub fn explain(&self, e: io::Error) -> Error {
        match Error::from_io(e, self.cap_ms) {
            Error::Unreachable { .. } if self.cancelled.load(Relaxed) => Error::Cancelled,
            Error::Timeout { .. } if self.left().is_ok() => Error::unreachable(format!(
                "the server was silent for {} ms",
                self.stall.as_millis().min(u128::from(self.cap_ms))
            )),
            other => other,
        }
    }
}

/// Dropped by a caller who no longer waits: cancels.
pub(super) struct CancelOnDrop(pub std::sync::Arc<Budget>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// A reader that spends the budget.
pub(super) struct Metered<'a, R> {
    pub from: R,
    pub budget: &'a Budget,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.budget.left().map_err(Error::into_io)?;
        let n = self.from.read(into)?;
        self.budget.spend(n as u64).map_err(Error::into_io)?;
        Ok(n)
    }
}
