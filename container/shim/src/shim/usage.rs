//! What the job has used, read where the kernel counts it for this container, and whether there is memory for more. The
//! job cannot write there; what follows from the counts is the node's to say.

use std::fs::{self, File};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use coinop_shim::beneath::used_bytes;
use coinop_shim::wire::Usage;

/// Version 2 has everything in one folder, version 1 a folder a controller.
const CPU_STAT: [&str; 1] = ["/sys/fs/cgroup/cpu.stat"];
const CPU: [&str; 2] = ["/sys/fs/cgroup/cpuacct/cpuacct.usage", "/sys/fs/cgroup/cpu,cpuacct/cpuacct.usage"];
const PEAK: [&str; 2] = ["/sys/fs/cgroup/memory.peak", "/sys/fs/cgroup/memory/memory.max_usage_in_bytes"];
/// The buffers of internet sockets, which version 1 counts apart, and the limit on them.
const SOCKETS_PEAK: [&str; 1] = ["/sys/fs/cgroup/memory/memory.kmem.tcp.max_usage_in_bytes"];
const SOCKETS_MOST: [&str; 1] = ["/sys/fs/cgroup/memory/memory.kmem.tcp.limit_in_bytes"];
/// No machine has as much; version 1 says so where there is no limit.
const UNBOUNDED: u64 = 1 << 60;
const KILLS: [&str; 2] = ["/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"];
const NOW: [&str; 2] = ["/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes"];
const MOST: [&str; 2] = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
/// More than any of these files has.
const COUNT_BYTES: usize = 4096;

/// Memory that starting a command takes, and more.
const ROOM_BYTES: u64 = 1 << 20;
/// How long to wait for it: less than the node waits for a kill.
const PATIENCE: Duration = Duration::from_millis(200);
const PAUSE: Duration = Duration::from_millis(1);

/// The kernel's counts, kept open: to open a file takes memory, which a job may have taken.
pub struct Counts {
    cpu_stat: Option<Count>,
    cpu: Option<Count>,
    peak: Option<Count>,
    sockets_peak: Option<Count>,
    kills: Option<Count>,
    now: Option<Count>,
    most: Option<Count>,
    /// The kills for memory after which there was room again.
    settled: u64,
}

impl Counts {
    /// Those that there are.
    pub fn open() -> Counts {
        Counts {
            cpu_stat: Count::open(&CPU_STAT),
            cpu: Count::open(&CPU),
            peak: Count::open(&PEAK),
            sockets_peak: Count::open(&SOCKETS_PEAK),
            kills: Count::open(&KILLS),
            now: Count::open(&NOW),
            most: Count::open(&MOST),
            settled: 0,
        }
    }

    /// Waits until there is room again after a kill for memory. For a moment after its death what a process had is not
    /// free; whoever needs memory then is killed for it, and process 1 where nobody else is left.
    pub fn settle(&mut self) {
        let kills = self.memory_kills();
        let late = Instant::now() + PATIENCE;
        while kills > self.settled
            && self.room().is_some_and(|room| room < ROOM_BYTES)
            && Instant::now() < late
        {
            std::thread::sleep(PAUSE);
        }
        self.settled = kills;
    }

    fn room(&self) -> Option<u64> {
        Some(self.most.as_ref()?.number()?.saturating_sub(self.now.as_ref()?.number()?))
    }

    /// The counts now; `places` are folders of the job's writable mounts.
    pub fn usage<'a>(&self, places: impl Iterator<Item = BorrowedFd<'a>>) -> Usage {
        let cpu_us = self.cpu_stat.as_ref().and_then(|count| count.field("usage_usec"));
        let sockets = self.sockets_peak.as_ref().and_then(Count::number).unwrap_or_default();
        Usage {
            cpu_us: cpu_us.or_else(|| Some(self.cpu.as_ref()?.number()? / 1000)),
            peak_memory_bytes: self
                .peak
                .as_ref()
                .and_then(Count::number)
                .map(|peak| peak.saturating_add(sockets)),
            disk_bytes: places.map(used_bytes).sum(),
        }
    }

    /// Processes that the kernel has killed for want of memory, since the sandbox began.
    pub fn memory_kills(&self) -> u64 {
        self.kills.as_ref().and_then(|count| count.field("oom_kill")).unwrap_or_default()
    }
}

struct Count(File);

impl Count {
    /// The first of these that is there and can be read: the kernel makes room for its text with the first reading.
    fn open(paths: &[&str]) -> Option<Count> {
        let mut found = paths.iter().filter_map(|path| File::open(path).ok()).map(Count);
        found.find(|count| count.text().is_some())
    }

    fn text(&self) -> Option<String> {
        let mut bytes = vec![0; COUNT_BYTES];
        let len = self.0.read_at(&mut bytes, 0).ok()?;
        bytes.truncate(len);
        String::from_utf8(bytes).ok()
    }

    fn number(&self) -> Option<u64> {
        self.text()?.trim().parse().ok()
    }

    /// The number after this name in a file of names and numbers.
    fn field(&self, name: &str) -> Option<u64> {
        let text = self.text()?;
        let mut fields = text.lines().filter_map(|line| line.split_once(' '));
        fields.find(|(found, _)| *found == name)?.1.trim().parse().ok()
    }
}

/// Whether a limit holds for the buffers of internet sockets: that of version 2 is the one on all memory.
pub fn bounds_sockets() -> bool {
    let [version_2, _] = MOST;
    let apart = Count::open(&SOCKETS_MOST).and_then(|most| most.number());
    Path::new(version_2).exists() || apart.is_some_and(|most| most < UNBOUNDED)
}

/// Whether the host has swap: its list has a line of heads. Who does not see it says yes.
pub fn has_swap() -> bool {
    fs::read_to_string("/proc/swaps").map_or(true, |list| list.lines().count() > 1)
}
