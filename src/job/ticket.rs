//! What a run is given and what it gives back: the ticket of an accepted job, the order to stop, and how it was left.
//! Running is `runner`'s, ending `ending`'s business.

use tokio::sync::watch;

use super::Failure;
use crate::market::{Admission, Code};
use crate::protocol::Request;

/// An accepted job, ready to run.
#[derive(Debug)]
pub struct Ticket {
    pub request: Request,
    pub admission: Admission,
    /// The relay that the request came from.
    pub relay: String,
    /// Attempts begun before this one, and the commit that they ran on.
    pub attempts: u32,
    pub commit: Option<String>,
    /// Unix milliseconds by which the first attempt begins.
    pub begin_by_ms: u64,
    /// Unix milliseconds by which there is an answer, never after the request's expiration.
    pub deadline_ms: u64,
}

impl Ticket {
    /// With `begin_by_ms` and `deadline_ms` as the node allows them, cut at the request's expiration (NIP-40).
    pub fn new(
        request: Request,
        admission: Admission,
        relay: String,
        begin_by_ms: u64,
        deadline_ms: u64,
    ) -> Ticket {
        let expires_ms = expires_ms(&request);
        Ticket {
            request,
            admission,
            relay,
            attempts: 0,
            commit: None,
            begin_by_ms: begin_by_ms.min(expires_ms),
            deadline_ms: deadline_ms.min(expires_ms),
        }
    }

    /// Why the job ends when this bound of its time has passed.
    pub fn too_late(&self, bound_ms: u64, otherwise: &str) -> Failure {
        if expires_ms(&self.request) <= bound_ms {
            return Failure::new(Code::Expired, "the request's expiration passed before there was a result");
        }
        Failure::new(Code::Timeout, otherwise)
    }

    /// Unix milliseconds by which it must begin; a job that was begun before may use what is left of its time.
    pub fn start_by_ms(&self) -> u64 {
        if self.attempts > 0 { self.deadline_ms } else { self.begin_by_ms }
    }
}

/// Unix milliseconds from which on the request is dead.
fn expires_ms(request: &Request) -> u64 {
    request.expiration.map_or(u64::MAX, |expiration| expiration.saturating_mul(1000))
}

/// Why a job is stopped from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The customer took it back (kind 5).
    Customer,
    /// The node's owner cancelled it.
    Owner,
    /// The node stops; the job stays open and is taken up at the next start.
    Drain,
}

/// How a run left its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Its terminal answer is durable.
    Answered,
    /// It is taken up at the next start.
    LeftOpen,
}

/// Receives the order to stop; `None` until then.
pub type Stopped = watch::Receiver<Option<Stop>>;
