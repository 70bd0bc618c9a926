//! Counts a sandbox's memory and CPU from its own /proc, seen from outside: the stand-in where no cgroup counts
//! them. It reads and, over the limit, strikes; it changes nothing else.

use std::collections::HashSet;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use coinop_shim::beneath::{kind, open_beneath, read_capped};
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::{SFlag, fstatat};

use super::super::{Limit, Policy, Usage};
use super::life::millis;
use super::mounts::PTYS;
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
    let buffers = Buffers::of_this_host();
    let task = tokio::spawn(async move {
        while !sandbox.life.has_ended() {
            let looked = sandbox.clone();
            // Reading /proc of many processes takes a while: not on a thread that others wait for.
            let Ok(held) = tokio::task::spawn_blocking(move || held(&looked, buffers)).await else {
                return;
            };
            sandbox.life.watched_peak.fetch_max(held.bytes, Ordering::Relaxed);
            if held.is_more_than(&sandbox.policy) {
                look(&sandbox);
                sandbox.life.strike_for(Limit::Memory);
                return;
            }
            tokio::time::sleep(INTERVAL).await;
        }
    });
    Guard(task.abort_handle())
}

/// Memory that nobody else holds: of the processes, of the files in the sandbox's tmpfs, and the most that their
/// pipes and sockets can keep.
#[derive(Debug, Clone, Copy)]
struct Held {
    bytes: u64,
    /// Of them, those that processes have in swap; 0 where memory alone has room for all.
    swapped: u64,
}

impl Held {
    fn is_more_than(self, policy: &Policy) -> bool {
        self.bytes > policy.memory_bytes.saturating_add(policy.swap_bytes)
            || self.bytes.saturating_sub(self.swapped) > policy.memory_bytes
    }
}

fn held(sandbox: &Shared, buffers: Buffers) -> Held {
    let files = sandbox.file_bytes();
    let proc = sandbox.folders.proc.as_fd();
    let quick = each_process(proc, |process| {
        let process = living(process)?;
        let open = descriptors(process.as_fd()).len() as u64;
        Some(quick_bytes(process.as_fd())?.saturating_add(open.saturating_mul(buffers.largest())))
    });
    if files.saturating_add(quick) <= sandbox.policy.memory_bytes {
        return Held { bytes: files.saturating_add(quick), swapped: 0 };
    }
    // The quick sum counts pages shared by a fork once for each process, and each descriptor as a full socket: before
    // we strike, share them out.
    let (mut seen, mut swapped) = (HashSet::new(), 0u64);
    let exact = each_process(proc, |process| {
        let process = living(process)?;
        let memory = shared_out_bytes(process.as_fd()).or_else(|| quick_bytes(process.as_fd()))?;
        swapped = swapped.saturating_add(swapped_bytes(process.as_fd()));
        Some(memory.saturating_add(buffers.kept(process.as_fd(), &mut seen)))
    });
    Held { bytes: files.saturating_add(exact), swapped }
}

/// The most that the kernel keeps in one pipe, or for one end of a pair of sockets. The filter lets neither grow.
#[derive(Debug, Clone, Copy)]
struct Buffers {
    pipe: u64,
    socket: u64,
}

impl Buffers {
    fn of_this_host() -> Buffers {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(65_536);
        // Asked of a socket: a container does not see the setting behind it.
        let room = UnixStream::pair().ok().and_then(|(one, _)| getsockopt(&one, sockopt::SndBuf).ok());
        // One message may begin while there is room, however little: twice the room, then.
        Buffers { pipe: 16 * page.unsigned_abs(), socket: 2 * room.unwrap_or(4 << 20) as u64 }
    }

    fn largest(&self) -> u64 {
        self.pipe.max(self.socket)
    }

    /// Of those that this process has open and that were not `seen` with another.
    fn kept(&self, process: BorrowedFd<'_>, seen: &mut HashSet<(u64, u64)>) -> u64 {
        let Ok(folder) = open_beneath(process, c"fd", OFlag::O_RDONLY | OFlag::O_DIRECTORY) else {
            return 0;
        };
        let kept = |name: &CString| {
            let Ok(found) = fstatat(&folder, name.as_c_str(), AtFlags::empty()) else { return 0 };
            let bytes = match kind(found.st_mode) {
                SFlag::S_IFIFO => self.pipe,
                SFlag::S_IFSOCK => self.socket,
                // One that is open stands for all that the sandbox may have: masters cannot be told apart.
                SFlag::S_IFCHR if is_terminal(found.st_rdev) => {
                    return if seen.insert(TERMINALS) { PTYS * PTY_BYTES } else { 0 };
                }
                _ => return 0,
            };
            if seen.insert((found.st_dev, found.st_ino)) { bytes } else { 0 }
        };
        names(folder.as_fd()).iter().map(kept).fold(0, u64::saturating_add)
    }
}

/// Stands for all terminals among the files that were seen; no file has these numbers.
const TERMINALS: (u64, u64) = (0, 0);
/// The most that a pseudo-terminal keeps: 64 KiB and a page each way, and what the kernel needs for both its ends.
const PTY_BYTES: u64 = 192 << 10;

/// Whether this is either end of a pseudo-terminal.
fn is_terminal(device: u64) -> bool {
    const MASTER: (u64, u64) = (5, 2);
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    (major, minor) == MASTER || (136..=143).contains(&major)
}

fn descriptors(process: BorrowedFd<'_>) -> Vec<CString> {
    let folder = open_beneath(process, c"fd", OFlag::O_RDONLY | OFlag::O_DIRECTORY);
    folder.map(|folder| names(folder.as_fd())).unwrap_or_default()
}

/// The names in a folder of /proc that are numbers: processes, threads or descriptors.
fn names(folder: BorrowedFd<'_>) -> Vec<CString> {
    let listed = open_beneath(folder, c".", OFlag::O_RDONLY | OFlag::O_DIRECTORY).and_then(Dir::from_fd);
    let Ok(mut listed) = listed else { return Vec::new() };
    let names = listed.iter().flatten().map(|entry| entry.file_name().to_owned());
    names.filter(|name| name.to_bytes().first().is_some_and(u8::is_ascii_digit)).collect()
}

fn each_process(proc: BorrowedFd<'_>, mut count: impl FnMut(BorrowedFd<'_>) -> Option<u64>) -> u64 {
    let folder = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    names(proc)
        .iter()
        // One that has just ended counts nothing.
        .filter_map(|name| count(open_beneath(proc, name.as_c_str(), folder).ok()?.as_fd()))
        .fold(0, u64::saturating_add)
}

/// Where a process shows what it holds: its own folder, or a thread's when its first thread has ended before the rest.
fn living(process: BorrowedFd<'_>) -> Option<OwnedFd> {
    let folder = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    if quick_bytes(process).is_some() {
        return open_beneath(process, c".", folder).ok();
    }
    let tasks = open_beneath(process, c"task", folder).ok()?;
    let open = |name: &CString| open_beneath(tasks.as_fd(), name.as_c_str(), folder).ok();
    names(tasks.as_fd()).iter().filter_map(open).find(|task| quick_bytes(task.as_fd()).is_some())
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

/// The first of these, which must be there, and the others where the kernel tells them.
fn sum(text: &str, first: &str, others: &[&str]) -> Option<u64> {
    let others = others.iter().filter_map(|name| kib(text, name)).fold(0, u64::saturating_add);
    Some(kib(text, first)?.saturating_add(others))
}

fn quick_bytes(process: BorrowedFd<'_>) -> Option<u64> {
    sum(&text(process, c"status")?, "RssAnon", &["RssShmem", "VmSwap", "VmPTE"])
}

fn shared_out_bytes(process: BorrowedFd<'_>) -> Option<u64> {
    let shared_out = sum(&text(process, c"smaps_rollup")?, "Pss_Anon", &["Pss_Shmem", "SwapPss"])?;
    Some(shared_out.saturating_add(kib(&text(process, c"status")?, "VmPTE").unwrap_or(0)))
}

fn swapped_bytes(process: BorrowedFd<'_>) -> u64 {
    text(process, c"smaps_rollup").and_then(|text| kib(&text, "SwapPss")).unwrap_or(0)
}

/// CPU time of the living and of those they have reaped, in clock ticks.
fn ticks(process: BorrowedFd<'_>) -> Option<u64> {
    let stat = text(process, c"stat")?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // After the name: utime, stime, cutime and cstime are fields 12 to 15.
    fields.get(11..15)?.iter().map(|field| field.parse::<u64>().ok()).sum()
}

/// What a sandbox has used so far, or had used at its end.
pub fn look(sandbox: &Shared) -> Usage {
    let usage = sandbox.life.last_usage().unwrap_or_else(|| live_usage(sandbox));
    sandbox.life.saw(Usage { disk_written_bytes: sandbox.file_bytes(), ..usage })
}

/// CPU time of all processes so far; none when the sandbox is gone.
pub async fn cpu_us(sandbox: Option<Arc<Shared>>) -> Option<u64> {
    let sandbox = sandbox.filter(|sandbox| !sandbox.life.has_ended())?;
    match sandbox.life.group.cpu_us() {
        Some(counted) => Some(counted),
        None => tokio::task::spawn_blocking(move || ticked_us(&sandbox)).await.ok(),
    }
}

/// The kernel counts 100 ticks a second in /proc, on every architecture that we build for.
fn ticked_us(sandbox: &Shared) -> u64 {
    each_process(sandbox.folders.proc.as_fd(), ticks) * 10_000
}

fn live_usage(sandbox: &Shared) -> Usage {
    let life = &sandbox.life;
    let cpu_us = life.group.cpu_us().unwrap_or_else(|| ticked_us(sandbox));
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
