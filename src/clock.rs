//! The wall clock of this machine, as one function and as a value that a test can hold still. How long something
//! takes is not read here: `std::time::Instant` does not jump.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Tells the time in Unix milliseconds.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Unix milliseconds; 0 on a machine whose clock is set before 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Unix seconds, as Nostr counts them.
pub fn now_s() -> u64 {
    now_ms() / 1000
}

/// The machine's clock as a value.
pub fn system() -> Clock {
    Arc::new(now_ms)
}
