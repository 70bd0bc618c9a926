//! What the job has used, read where the kernel counts it for this container. The job cannot write there.

use std::fs;
use std::os::fd::BorrowedFd;

use coinop_shim::beneath::used_bytes;
use coinop_shim::wire::Usage;

/// Version 2 has everything in one folder, version 1 a folder a controller.
const CPU: [&str; 2] = ["/sys/fs/cgroup/cpuacct/cpuacct.usage", "/sys/fs/cgroup/cpu,cpuacct/cpuacct.usage"];
const PEAK: [&str; 2] = ["/sys/fs/cgroup/memory.peak", "/sys/fs/cgroup/memory/memory.max_usage_in_bytes"];
const KILLS: [&str; 2] = ["/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"];

/// The counts now; `places` are folders of the job's writable mounts.
pub fn usage<'a>(places: impl Iterator<Item = BorrowedFd<'a>>) -> Usage {
    let number = |path: &&str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let cpu_us = field("/sys/fs/cgroup/cpu.stat", "usage_usec")
        .or_else(|| CPU.iter().find_map(number).map(|nanoseconds| nanoseconds / 1000));
    Usage {
        cpu_us,
        peak_memory_bytes: PEAK.iter().find_map(number),
        disk_bytes: places.map(used_bytes).sum(),
    }
}

/// Processes that the kernel has killed for want of memory, since the sandbox began.
pub fn memory_kills() -> u64 {
    KILLS.iter().find_map(|path| field(path, "oom_kill")).unwrap_or_default()
}

/// Whether the host has swap: its list has a line of heads. Who does not see it says yes.
pub fn has_swap() -> bool {
    fs::read_to_string("/proc/swaps").map_or(true, |list| list.lines().count() > 1)
}

/// The number after this name in a file of names and numbers.
fn field(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let mut fields = text.lines().filter_map(|line| line.split_once(' '));
    fields.find(|(found, _)| *found == name)?.1.trim().parse().ok()
}
