//! The signals that ask a command to end: Ctrl-C, SIGTERM, and SIGHUP of a terminal that closes. From the moment it is
//! made none of them kills the process; one that was ignored at the start, as under `nohup`, stays so.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Waits for any of them.
#[derive(Debug)]
pub struct Signals(Vec<Signal>);

impl Signals {
    /// # Errors
    /// The kernel's.
    pub fn new() -> io::Result<Signals> {
        let ignored = ignored();
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let heard = kinds.into_iter().filter(|kind| !is_in(ignored, *kind));
        heard.map(signal).collect::<io::Result<Vec<_>>>().map(Signals)
    }

    /// The next of them. Cancel safe.
    pub async fn next(&mut self) {
        if self.0.is_empty() {
            return std::future::pending().await;
        }
        let any = self.0.iter_mut().map(|signal| Box::pin(signal.recv()));
        futures_util::future::select_all(any).await;
    }
}

/// The mask of signals that this process ignores; none where the kernel does not tell.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Bit 0 is signal 1.
fn is_in(mask: u64, kind: SignalKind) -> bool {
    u32::try_from(kind.as_raw_value() - 1)
        .ok()
        .and_then(|bit| mask.checked_shr(bit))
        .is_some_and(|bits| bits & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_names_its_signals() {
        assert!(is_in(0b1, SignalKind::hangup()) && !is_in(0b1, SignalKind::interrupt()));
        assert!(is_in(1 << 14, SignalKind::terminate()) && !is_in(0, SignalKind::terminate()));
    }
}
