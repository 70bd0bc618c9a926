//! Counts a sandbox's memory and CPU from its own /proc, seen from outside: the stand-in where no cgroup counts
//! them. It reads and, over the limit, strikes; it changes nothing else.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::dir::Dir;
use nix::fcntl::OFlag;

use super::super::{Limit, Usage};
use super::files::{open_beneath, read_capped};
use super::life::millis;
use super::shared::Shared;

/// How often the memory is summed up.
pub const INTERVAL: Duration = Duration::from_millis(20);

/// Ends the watch when dropped.
pub struct Guard(tokio::task::AbortHandle);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Watches until the sandbox ends, and ends it when it holds more memory than its policy says.
pub fn watch(sandbox: Arc<Shared>) -> Guard {
    let task = tokio::spawn(async move {
        while !sandbox.life.has_ended() {
            let looked = sandbox.clone();
            // Reading /proc of many processes takes a while: not on a thread that others wait for.
            let Ok(held) = tokio::task::spawn_blocking(move || held_bytes(&looked)).await else { return };
            sandbox.life.watched_peak.fetch_max(held, Ordering::Relaxed);
            if held > sandbox.policy.memory_bytes {
                sandbox.life.strike_for(Limit::Memory);
                return;
            }
            tokio::time::sleep(INTERVAL).await;
        }
    });
    Guard(task.abort_handle())
}

/// Memory that nobody else holds: of the processes, and of the files in the sandbox's tmpfs.
fn held_bytes(sandbox: &Shared) -> u64 {
    let files = sandbox.file_bytes();
    let limit = sandbox.policy.memory_bytes;
    let quick = each_process(sandbox.folders.proc.as_fd(), quick_bytes);
    if files.saturating_add(quick) <= limit {
        return files.saturating_add(quick);
    }
    // The quick sum counts pages shared by a fork once for each process: before we strike, share them out.
    let exact = each_process(sandbox.folders.proc.as_fd(), |process| {
        shared_out_bytes(process).or_else(|| quick_bytes(process))
    });
    files.saturating_add(exact)
}

fn each_process(proc: BorrowedFd<'_>, count: impl Fn(BorrowedFd<'_>) -> Option<u64>) -> u64 {
    let folder = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let Ok(listed) = open_beneath(proc, c".", folder) else { return 0 };
    let Ok(mut listed) = Dir::from_fd(listed) else { return 0 };
    let names: Vec<_> = listed.iter().flatten().map(|entry| entry.file_name().to_owned()).collect();
    names
        .iter()
        .filter(|name| name.to_bytes().first().is_some_and(u8::is_ascii_digit))
        // One that has just ended counts nothing.
        .filter_map(|name| count(open_beneath(proc, name.as_c_str(), folder).ok()?.as_fd()))
        .fold(0, u64::saturating_add)
}

fn text(process: BorrowedFd<'_>, file: &std::ffi::CStr) -> Option<String> {
    let file = open_beneath(process, file, OFlag::O_RDONLY).ok()?;
    let bytes = read_capped(file.into(), 64 * 1024).ok()??;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn kib(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn quick_bytes(process: BorrowedFd<'_>) -> Option<u64> {
    let status = text(process, c"status")?;
    Some(kib(&status, "RssAnon")?.saturating_add(kib(&status, "RssShmem").unwrap_or(0)))
}

fn shared_out_bytes(process: BorrowedFd<'_>) -> Option<u64> {
    let rollup = text(process, c"smaps_rollup")?;
    Some(kib(&rollup, "Pss_Anon")?.saturating_add(kib(&rollup, "Pss_Shmem").unwrap_or(0)))
}

/// CPU time of the living and of those they have reaped, in clock ticks.
fn ticks(process: BorrowedFd<'_>) -> Option<u64> {
    let stat = text(process, c"stat")?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // After the name: utime, stime, cutime and cstime are fields 12 to 15.
    fields.get(11..15)?.iter().map(|field| field.parse::<u64>().ok()).sum()
}

/// What a sandbox has used so far.
pub fn live_usage(sandbox: &Shared) -> Usage {
    let life = &sandbox.life;
    // The kernel counts 100 ticks a second in /proc, on every architecture that we build for.
    let cpu_us =
        life.group.cpu_us().unwrap_or_else(|| each_process(sandbox.folders.proc.as_fd(), ticks) * 10_000);
    Usage {
        wall_ms: millis(life.wall()),
        cpu_ms: cpu_us / 1000,
        peak_memory_bytes: life
            .group
            .peak_memory_bytes()
            .unwrap_or_else(|| life.watched_peak.load(Ordering::Relaxed)),
        disk_written_bytes: 0,
    }
}
