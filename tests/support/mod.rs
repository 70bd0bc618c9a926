//! What the whole-node tests share: a customer, repositories, relays that can be cut or scripted, the binary as
//! a child process, and bounded waits. It checks nothing about the node by itself; the tests do.

pub mod backend;
pub mod buyer;
pub mod gate;
pub mod git;
pub mod process;
pub mod scripted;
#[expect(dead_code, reason = "each test program uses a part of it")]
pub mod skip;
pub mod stage;

use std::time::{Duration, Instant};

/// Longest wait for anything that should happen.
pub const PATIENCE: Duration = Duration::from_secs(40);
/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Waits until the condition gives something.
///
/// # Panics
/// After [`PATIENCE`], with `what` was waited for.
pub async fn until<T>(what: &str, condition: impl AsyncFnMut() -> Option<T>) -> T {
    until_within(PATIENCE, what, condition).await
}

/// As [`until`], with another bound.
pub async fn until_within<T>(
    within: Duration,
    what: &str,
    mut condition: impl AsyncFnMut() -> Option<T>,
) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(started.elapsed() < within, "waited {within:?} for {what}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Looks at the condition all through `span`: for what must not happen.
///
/// # Panics
/// As soon as it does not hold.
pub async fn throughout(span: Duration, what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while started.elapsed() < span {
        assert!(condition().await, "{what}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Unix seconds of this machine's clock.
pub fn now_s() -> u64 {
    coinop::clock::now_s()
}
