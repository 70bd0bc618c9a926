//! The one room that knows relays: connections, catch-up, the signature check of every event, the seen set,
//! and delivery of the outbox. It hands verified events up and sends what the store says is owed; it
//! decides nothing about jobs.

mod address;
mod answered;
mod client;
mod connection;
mod cursor;
mod delivery;
mod fill;
mod finder;
mod follow;
mod hints;
mod inbox;
mod limits;
pub mod local;
mod memory;
pub mod message;
mod outbox;
mod seen;
mod service;
mod session;
mod subscriptions;
pub mod verify;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use address::Address;
pub use client::{Client, Published, Received, Stored, Subscription};
pub use memory::{InMemory, Memory};
pub use message::{Glance, Message};
pub use service::{Drained, Handle, Options, RelayStatus, Service};
pub use verify::Inbound;

use crate::clock::Clock;

/// What went wrong with a relay, or with what somebody called one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{url:?} is not a relay address: {why}")]
    Address { url: String, why: &'static str },
    #[error("{host} is at the private address {ip}; allow private addresses to use it")]
    Private { host: String, ip: std::net::IpAddr },
    #[error("cannot resolve {host}: {why}")]
    Resolve { host: String, why: String },
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error("{what} took longer than {limit_ms} ms")]
    Slow { what: &'static str, limit_ms: u64 },
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("the relay closed the connection")]
    Gone,
    #[error("the relay sends nonsense: {0}")]
    Hostile(String),
    #[error("no relay can be reached: {0}")]
    NoRelay(String),
    #[error("cannot start the verification threads: {0}")]
    Threads(std::io::Error),
    #[error("cannot listen: {0}")]
    Listen(std::io::Error),
}

/// Time-outs and caps of one connection.
#[derive(Debug, Clone)]
pub struct Wire {
    /// For name look-up, TCP, TLS and the upgrade together.
    pub connect_timeout: Duration,
    /// For one write to be taken by the other side.
    pub write_timeout: Duration,
    /// A ping goes out when nothing was heard for this long.
    pub ping_every: Duration,
    /// Without one whole message (a pong counts) for this long the relay is taken for dead.
    pub idle_timeout: Duration,
    /// A larger message cuts the connection, bytes. Well above `max_event_bytes`: a stored giant must not
    /// keep us off a relay.
    pub max_frame_bytes: usize,
    /// A larger event is dropped unparsed, bytes.
    pub max_event_bytes: usize,
    /// First pause after a failed connection; doubles up to `backoff_max`, with jitter.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// How long a relay may take to say OK to an event before it is sent again.
    pub ok_timeout: Duration,
    /// How long a relay may take to send one page of stored events.
    pub page_timeout: Duration,
    /// A connection made only to deliver an answer is closed after this long without work.
    pub linger: Duration,
    /// How often timers are looked at.
    pub tick: Duration,
}

impl Default for Wire {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(15),
            write_timeout: Duration::from_secs(20),
            ping_every: Duration::from_secs(25),
            idle_timeout: Duration::from_secs(70),
            max_frame_bytes: 4 << 20,
            max_event_bytes: 256 << 10,
            backoff_min: Duration::from_millis(500),
            backoff_max: Duration::from_secs(120),
            ok_timeout: Duration::from_secs(20),
            page_timeout: Duration::from_secs(30),
            linger: Duration::from_secs(45),
            tick: Duration::from_millis(500),
        }
    }
}

/// The locks of this room guard caches, counts and status. When a holder has panicked, going on with them is better
/// than not being reachable any more.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes ring the process's TLS provider. Safe to call often; whoever was first stays.
pub fn install_crypto() {
    static DONE: AtomicBool = AtomicBool::new(false);
    if !DONE.swap(true, Ordering::SeqCst)
        && rustls::crypto::ring::default_provider().install_default().is_err()
    {
        tracing::debug!("a TLS provider was installed before ours; using that one");
    }
}
