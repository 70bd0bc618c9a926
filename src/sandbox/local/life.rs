//! One sandbox's life as the node keeps count of it: its cgroups, its uid, its pidfd, how it ended and what it
//! cost. `spawn` tells it of the end; `cell` is what the rest of the node holds.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use coinop_shim::sys;
use nix::libc;
use tokio::sync::watch;

use super::super::{Error, Limit, Usage};
use super::cgroup::Group;
use super::claim::{BLOCKS, FIRST_UID, SLOTS};

/// The kernel needs milliseconds to end a sandbox; a host that needs this long is broken.
const DEATH: Duration = Duration::from_secs(10);

/// Whether this process is root with uids to give. Root of a user namespace, as in a rootless container, has only
/// those that were mapped for it, and else does as an ordinary user does.
pub fn is_root_with_slots() -> bool {
    let gives = |file: &str| {
        let map = std::fs::read_to_string(file).unwrap_or_default();
        map.lines().any(covers_slots)
    };
    nix::unistd::geteuid().is_root() && gives("/proc/self/uid_map") && gives("/proc/self/gid_map")
}

/// A line of a map: first id inside, first outside, how many.
fn covers_slots(line: &str) -> bool {
    let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>().unwrap_or_default());
    let (Some(first), Some(_), Some(count)) = (numbers.next(), numbers.next(), numbers.next()) else {
        return false;
    };
    let last = u64::from(FIRST_UID) + u64::from(SLOTS * BLOCKS);
    first <= FIRST_UID.into() && first.saturating_add(count) >= last
}

/// The free slots; each stands for a uid of the node's block.
#[derive(Debug, Clone)]
pub struct Slots {
    free: Arc<Mutex<BTreeSet<u32>>>,
    first_uid: u32,
}

/// A slot in use, given back when dropped.
#[derive(Debug)]
pub struct Slot {
    number: u32,
    all: Slots,
}

impl Slots {
    pub fn new(block: u32) -> Slots {
        let free = Arc::new(Mutex::new((0..SLOTS).collect()));
        Slots { free, first_uid: FIRST_UID + block * SLOTS }
    }

    pub fn take(&self) -> Result<Slot, Error> {
        let number = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop_first();
        let number = number.ok_or(Error::Host {
            doing: "find a free slot: too many live at once",
            source: std::io::Error::from_raw_os_error(libc::EAGAIN),
        })?;
        Ok(Slot { number, all: self.clone() })
    }
}

impl Slot {
    pub fn uid(&self) -> u32 {
        self.all.first_uid + self.number
    }

    pub fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.all.free.lock().unwrap_or_else(PoisonError::into_inner).insert(self.number);
    }
}

#[derive(Debug)]
pub struct Life {
    /// Its number with the nursery.
    pub n: u64,
    pub slot: Slot,
    pub group: Group,
    started: Mutex<Instant>,
    pidfd: OnceLock<OwnedFd>,
    limit: OnceLock<Limit>,
    /// The highest memory seen by the watcher, where no cgroup counts it.
    pub watched_peak: AtomicU64,
    /// The most that any look has found.
    seen: Mutex<Usage>,
    ended: watch::Sender<Option<Usage>>,
}

impl Life {
    pub fn new(n: u64, slot: Slot, group: Group) -> Life {
        Life {
            n,
            slot,
            group,
            started: Mutex::new(Instant::now()),
            pidfd: OnceLock::new(),
            limit: OnceLock::new(),
            watched_peak: AtomicU64::new(0),
            seen: Mutex::default(),
            ended: watch::Sender::new(None),
        }
    }

    /// A pre-built sandbox's clock starts when it is given to a job.
    pub fn start_clock(&self) {
        *self.started.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub fn wall(&self) -> Duration {
        self.started.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// Called by the nursery's reader, once.
    pub fn born(&self, pidfd: OwnedFd) {
        if self.pidfd.set(pidfd).is_err() {
            tracing::error!(n = self.n, "a sandbox was born twice");
        }
    }

    /// Sends the kill; the kernel ends every process of the namespace with its init.
    pub fn strike(&self) {
        let Some(pidfd) = self.pidfd.get().filter(|_| !self.has_ended()) else { return };
        if let Err(why) = sys::signal(pidfd.as_fd(), libc::SIGKILL) {
            tracing::error!(n = self.n, %why, "a sandbox cannot be killed");
        }
        self.group.hurry();
    }

    /// Kills because of a limit; the first limit is the one that counts.
    pub fn strike_for(&self, limit: Limit) {
        if self.limit.set(limit).is_err() {
            tracing::debug!(n = self.n, ?limit, "a second limit at the end");
        }
        self.strike();
    }

    /// The limit that ended it, if one did.
    pub fn limit(&self) -> Option<Limit> {
        self.limit.get().copied()
    }

    pub fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// All its processes are gone: the last counts are read and its cgroups removed.
    pub fn end(&self, cpu_us: u64, peak_bytes: u64) {
        if self.has_ended() {
            return;
        }
        if self.group.memory_kills() > 0 && self.limit.set(Limit::Memory).is_err() {
            tracing::debug!(n = self.n, "memory was short, too");
        }
        let counted_us = self.group.cpu_us();
        let usage = Usage {
            wall_ms: millis(self.wall()),
            cpu_ms: counted_us.unwrap_or(cpu_us) / 1000,
            cpu_is_partial: counted_us.is_none(),
            peak_memory_bytes: self
                .group
                .peak_memory_bytes()
                .unwrap_or_else(|| peak_bytes.max(self.watched_peak.load(Ordering::Relaxed))),
            disk_written_bytes: 0,
        };
        self.group.remove();
        self.ended.send_replace(Some(usage));
    }

    /// Keeps what a look has found, and gives it back with nothing less than an earlier one. Without a cgroup the time
    /// of processes that the kill ended is in no later count, and deleted files are in none.
    pub fn saw(&self, now: Usage) -> Usage {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        *seen = Usage {
            wall_ms: now.wall_ms,
            cpu_ms: now.cpu_ms.max(seen.cpu_ms),
            cpu_is_partial: now.cpu_is_partial,
            peak_memory_bytes: now.peak_memory_bytes.max(seen.peak_memory_bytes),
            disk_written_bytes: now.disk_written_bytes.max(seen.disk_written_bytes),
        };
        *seen
    }

    /// Waits until nothing of it runs.
    pub async fn gone(&self) -> Result<Usage, Error> {
        let mut ended = self.ended.subscribe();
        let usage = tokio::time::timeout(DEATH, ended.wait_for(Option::is_some)).await;
        match usage {
            Ok(Ok(usage)) => Ok(usage.unwrap_or_default()),
            Ok(Err(_)) | Err(_) => Err(Error::Host {
                doing: "end its processes",
                source: std::io::Error::from(std::io::ErrorKind::TimedOut),
            }),
        }
    }

    /// The last usage, when it has ended.
    pub fn last_usage(&self) -> Option<Usage> {
        *self.ended.borrow()
    }
}

pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::covers_slots;

    #[test]
    fn only_a_map_with_all_uids_of_the_slots_makes_a_root() {
        assert!(covers_slots("         0          0 4294967295"));
        assert!(!covers_slots("         0       1000          1"));
        assert!(!covers_slots("         1     100000      65536"));
        assert!(!covers_slots(""));
    }
}
