//! Control groups, version 1, 2 or both at once: finds where this node may make them, makes one for each sandbox,
//! reads the kernel's counts from it, removes it. It decides nothing about policy.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::super::Policy;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V1,
    V2,
}

impl Version {
    /// The file by which a process enters a group. A lone thread that moves itself by `tasks` takes no lock of the
    /// whole system; by `cgroup.procs` it waits for one, several milliseconds each time.
    fn door(self) -> &'static str {
        match self {
            Version::V1 => "tasks",
            Version::V2 => "cgroup.procs",
        }
    }
}

impl Version {
    /// The file that bounds swap; there only where the kernel counts it.
    fn swap(self) -> &'static str {
        match self {
            Version::V1 => "memory.memsw.limit_in_bytes",
            Version::V2 => "memory.swap.max",
        }
    }
}

/// The controllers that we use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Controller {
    Memory,
    Pids,
    Cpu,
    Cpuacct,
}

impl Controller {
    const ALL: [Controller; 4] = [Self::Memory, Self::Pids, Self::Cpu, Self::Cpuacct];

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Cpu => "cpu",
            Self::Cpuacct => "cpuacct",
        }
    }

    /// A file that is there only when the controller works in a group.
    fn sign(self, version: Version) -> &'static str {
        match (self, version) {
            (Self::Memory, Version::V1) => "memory.limit_in_bytes",
            (Self::Memory, Version::V2) => "memory.max",
            (Self::Pids, _) => "pids.max",
            (Self::Cpu, Version::V1) => "cpu.cfs_quota_us",
            (Self::Cpu, Version::V2) => "cpu.max",
            (Self::Cpuacct, Version::V1) => "cpuacct.usage",
            (Self::Cpuacct, Version::V2) => "cpu.stat",
        }
    }
}

/// Where this node may make groups, controller by controller.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    found: Vec<(Controller, Version, PathBuf)>,
    /// Whether swap is counted where memory is.
    pub swap: bool,
    /// Whether buffers of internet sockets are.
    pub sockets: bool,
    /// Whether other memory of the kernel is.
    pub kernel: bool,
}

const PERIOD_US: u64 = 100_000;
/// Version 1 counts the buffers of internet sockets apart from all other memory, and only once it is told a limit.
const SOCKETS: &str = "memory.kmem.tcp.limit_in_bytes";
const SOCKETS_PEAK: &str = "memory.kmem.tcp.max_usage_in_bytes";
/// As many processes as the kernel can number (`PID_MAX_LIMIT` of 64 bits).
const MOST_PIDS: u64 = 4 << 20;

impl Layout {
    /// Looks at the groups that this process is in. `probe` is a name that is ours to make and remove. Unless it may
    /// `change` them, a controller counts as found where the change would give it.
    pub fn detect(probe: &str, change: bool) -> Layout {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut found = Vec::new();
        for controller in Controller::ALL {
            for (version, parent) in candidates(controller, &own, &mounts) {
                if usable(controller, version, &parent, probe, change) {
                    found.push((controller, version, parent));
                    break;
                }
            }
        }
        let memory = found.iter().find(|(controller, ..)| *controller == Controller::Memory);
        let swap = memory.is_some_and(|(_, version, parent)| counts_swap(*version, parent, probe, change));
        let booted = fs::read_to_string("/proc/cmdline").unwrap_or_default();
        let sockets = memory.is_some_and(|(_, version, parent)| match version {
            Version::V1 => has_file(parent, probe, SOCKETS),
            Version::V2 => !turned_off(&booted, "nosocket"),
        });
        let kernel = memory.is_some() && !turned_off(&booted, "nokmem");
        Layout { found, swap, sockets, kernel }
    }

    pub fn version(&self, controller: Controller) -> Option<Version> {
        self.found.iter().find(|(c, ..)| *c == controller).map(|(_, version, _)| *version)
    }

    /// Each parent folder once.
    pub fn parents(&self) -> Vec<&Path> {
        let mut parents: Vec<&Path> = Vec::new();
        for (.., parent) in &self.found {
            if !parents.contains(&parent.as_path()) {
                parents.push(parent);
            }
        }
        parents
    }

    /// Makes the groups of one sandbox, without limits yet.
    pub fn make(&self, name: &str) -> io::Result<Group> {
        let mut group = Group {
            places: self.found.iter().map(|(c, v, parent)| (*c, *v, parent.join(name))).collect(),
            folders: Vec::new(),
            sockets: self.sockets,
        };
        for parent in self.parents() {
            let folder = parent.join(name);
            fs::create_dir(&folder)?;
            group.folders.push(folder);
        }
        Ok(group)
    }
}

/// The folders where a group with this controller would go: (version, folder).
fn candidates(controller: Controller, own: &str, mounts: &str) -> Vec<(Version, PathBuf)> {
    let mut found = Vec::new();
    for mount in mounts.lines() {
        // id parent dev root point options… - type source options
        let Some((left, right)) = mount.split_once(" - ") else { continue };
        let mut left = left.split(' ').skip(3);
        let (Some(root), Some(point)) = (left.next(), left.next()) else { continue };
        let mut right = right.split(' ');
        let kind = right.next().unwrap_or_default();
        let options = right.nth(1).unwrap_or_default();
        let version = match kind {
            "cgroup" if options.split(',').any(|o| o == controller.name()) => Version::V1,
            "cgroup2" => Version::V2,
            _ => continue,
        };
        let line = own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, names, path) = (fields.next()?, fields.next()?, fields.next()?);
            let ours = match version {
                Version::V1 => names.split(',').any(|name| name == controller.name()),
                Version::V2 => names.is_empty(),
            };
            ours.then_some(path)
        });
        let Some(path) = line else { continue };
        let below = path.strip_prefix(root.trim_end_matches('/')).unwrap_or(path);
        found.push((version, Path::new(point).join(below.trim_start_matches('/'))));
    }
    // A version 1 hierarchy takes its controller away from version 2: look there first.
    found.sort_by_key(|(version, _)| *version == Version::V2);
    found
}

fn usable(controller: Controller, version: Version, parent: &Path, probe: &str, change: bool) -> bool {
    if version == Version::V2 && change {
        delegate(parent);
    } else if version == Version::V2 && could_delegate(controller, parent) {
        return true;
    }
    let folder = parent.join(probe);
    if fs::create_dir(&folder).is_err() {
        return false;
    }
    let works = OpenOptions::new().read(true).open(folder.join(controller.sign(version))).is_ok()
        && OpenOptions::new().write(true).open(folder.join(version.door())).is_ok();
    fs::remove_dir(&folder).is_ok() && works
}

/// Whether a group below this one can be given a limit on swap.
fn counts_swap(version: Version, parent: &Path, probe: &str, change: bool) -> bool {
    if version == Version::V2 && !change && could_delegate(Controller::Memory, parent) {
        // It cannot be seen before it is done, and kernels of that age count.
        return true;
    }
    has_file(parent, probe, version.swap())
}

/// Whether a group below this one has such a file.
fn has_file(parent: &Path, probe: &str, file: &str) -> bool {
    let folder = parent.join(probe);
    if fs::create_dir(&folder).is_err() {
        return false;
    }
    let has = folder.join(file).exists();
    fs::remove_dir(&folder).is_ok() && has
}

/// Whether the kernel was booted with this kind of memory left out of its counts.
fn turned_off(booted: &str, kind: &str) -> bool {
    let mut options = booted.split_whitespace().filter_map(|option| option.strip_prefix("cgroup.memory="));
    options.any(|kinds| kinds.split(',').any(|one| one == kind))
}

fn lists(parent: &Path, file: &str, name: &str) -> bool {
    let listed = fs::read_to_string(parent.join(file)).unwrap_or_default();
    listed.split_whitespace().any(|one| one == name)
}

/// Whether `delegate` has something to do for this controller and would get it done.
fn could_delegate(controller: Controller, parent: &Path) -> bool {
    let (offered, name) = ("cgroup.controllers", controller.name());
    if !lists(parent, offered, name) || lists(parent, "cgroup.subtree_control", name) {
        return false;
    }
    let may = |file: &str| OpenOptions::new().write(true).open(parent.join(file)).is_ok();
    // The root of the hierarchy, which has no type, may keep its processes; of any other we must be the only one.
    let own = std::process::id().to_string();
    let alone = || {
        let inside = fs::read_to_string(parent.join("cgroup.procs")).unwrap_or_default();
        inside.split_whitespace().all(|pid| pid == own)
    };
    may("cgroup.subtree_control")
        && (!parent.join("cgroup.type").exists() || (may("cgroup.procs") && alone()))
}

/// Version 2 gives controllers only to groups below one without processes: the node moves aside, if it may.
fn delegate(parent: &Path) {
    let control = parent.join("cgroup.subtree_control");
    for name in ["memory", "pids", "cpu"] {
        if !lists(parent, "cgroup.controllers", name) || lists(parent, "cgroup.subtree_control", name) {
            continue;
        }
        let enable = || fs::write(&control, format!("+{name}"));
        if let Err(why) = enable()
            && why.raw_os_error() == Some(nix::libc::EBUSY)
        {
            let aside = parent.join("coinop-node");
            let moved = fs::create_dir_all(&aside).and_then(|()| fs::write(aside.join("cgroup.procs"), "0"));
            if let Err(why) = moved.and_then(|()| enable()) {
                tracing::debug!(%why, controller = name, "cgroup controller not delegated");
                // Others are in the way, too: nothing is gained, so nothing is left changed.
                let back = fs::write(parent.join("cgroup.procs"), "0").and_then(|()| fs::remove_dir(&aside));
                if let Err(why) = back {
                    tracing::debug!(%why, "the node stays in a cgroup of its own");
                }
            }
        }
    }
}

/// The groups of one sandbox.
#[derive(Debug)]
pub struct Group {
    places: Vec<(Controller, Version, PathBuf)>,
    folders: Vec<PathBuf>,
    /// As the layout's.
    sockets: bool,
}

impl Group {
    fn place(&self, controller: Controller) -> Option<(Version, &Path)> {
        self.places
            .iter()
            .find(|(c, ..)| *c == controller)
            .map(|(_, version, path)| (*version, path.as_path()))
    }

    /// The files by which a process of one thread enters: each opened by us, so that it may be used without our rights.
    pub fn doors(&self) -> io::Result<Vec<OwnedFd>> {
        let version = |folder: &PathBuf| {
            self.places
                .iter()
                .find(|(.., place)| place == folder)
                .map_or(Version::V2, |(_, version, _)| *version)
        };
        self.folders
            .iter()
            .map(|folder| {
                Ok(OpenOptions::new().write(true).open(folder.join(version(folder).door()))?.into())
            })
            .collect()
    }

    /// Sets what the policy says, before the job's first instruction.
    pub fn limit(&self, policy: &Policy) -> io::Result<()> {
        let write = |place: &Path, file: &str, text: String| set(&place.join(file), &text);
        match self.place(Controller::Memory) {
            Some((Version::V1, place)) => {
                // Both together are what the policy says.
                let sockets = if self.sockets { policy.socket_bytes() } else { 0 };
                if self.sockets {
                    write(place, SOCKETS, sockets.to_string())?;
                }
                let memory = policy.memory_bytes.saturating_sub(sockets);
                write(place, "memory.limit_in_bytes", memory.to_string())?;
                // Counted together with memory. Where it is not counted the file is not there, and the host has none.
                let both = memory.saturating_add(policy.swap_bytes);
                optional(write(place, Version::V1.swap(), both.to_string()))?;
                if policy.swap_bytes == 0 {
                    // So that the kernel, short of memory, does not come to this group for it.
                    optional(write(place, "memory.swappiness", "0".to_owned()))?;
                }
            }
            Some((Version::V2, place)) => {
                write(place, "memory.max", policy.memory_bytes.to_string())?;
                optional(write(place, Version::V2.swap(), policy.swap_bytes.to_string()))?;
            }
            None => {}
        }
        if let Some((_, place)) = self.place(Controller::Pids) {
            // One more for init. The kernel numbers no more processes than that, and takes no larger limit.
            write(place, "pids.max", (u64::from(policy.pids) + 1).min(MOST_PIDS).to_string())?;
        }
        let quota = u64::from(policy.cpu_milli) * PERIOD_US / 1000;
        match self.place(Controller::Cpu) {
            Some((Version::V1, place)) => {
                // The period is what the kernel begins with.
                write(place, "cpu.cfs_quota_us", quota.to_string())?;
            }
            Some((Version::V2, place)) => write(place, "cpu.max", format!("{quota} {PERIOD_US}"))?,
            None => {}
        }
        Ok(())
    }

    /// Takes the limit on processors away: a process that has used up its share would wait for the next period to end.
    pub fn hurry(&self) {
        let done = match self.place(Controller::Cpu) {
            Some((Version::V1, place)) => fs::write(place.join("cpu.cfs_quota_us"), "-1"),
            Some((Version::V2, place)) => fs::write(place.join("cpu.max"), "max"),
            None => return,
        };
        if let Err(why) = done {
            // Most often the group has gone already.
            tracing::trace!(%why, "a share of the processors stays as it was");
        }
    }

    /// CPU time of all processes, ended ones included, in microseconds.
    pub fn cpu_us(&self) -> Option<u64> {
        match self.place(Controller::Cpuacct)? {
            (Version::V1, place) => Some(number(&place.join("cpuacct.usage"))? / 1000),
            (Version::V2, place) => entry(&place.join("cpu.stat"), "usage_usec"),
        }
    }

    pub fn peak_memory_bytes(&self) -> Option<u64> {
        match self.place(Controller::Memory)? {
            (Version::V1, place) => {
                let sockets = number(&place.join(SOCKETS_PEAK)).unwrap_or(0);
                Some(number(&place.join("memory.max_usage_in_bytes"))?.saturating_add(sockets))
            }
            (Version::V2, place) => {
                number(&place.join("memory.peak")).or_else(|| number(&place.join("memory.current")))
            }
        }
    }

    /// How many processes the kernel has killed here for want of memory.
    pub fn memory_kills(&self) -> u64 {
        match self.place(Controller::Memory) {
            Some((Version::V1, place)) => entry(&place.join("memory.oom_control"), "oom_kill"),
            Some((Version::V2, place)) => entry(&place.join("memory.events"), "oom_kill"),
            None => None,
        }
        .unwrap_or(0)
    }

    /// Removes the groups; their processes must have ended. What stays is told, and found by the next sweep.
    pub fn remove(&self) {
        for folder in &self.folders {
            if let Err(why) = remove(folder) {
                tracing::warn!(folder = %folder.display(), %why, "a cgroup stays behind");
            }
        }
    }
}

/// Writes to a file of the kernel's; one that is not there is not made, which the kernel would call forbidden.
fn set(file: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(file)?.write_all(text.as_bytes())
}

fn optional(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

fn entry(file: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Waits a little for the kernel to let the last process go.
fn remove(folder: &Path) -> io::Result<()> {
    let until = Instant::now() + Duration::from_millis(500);
    loop {
        match fs::remove_dir(folder) {
            Err(why) if why.raw_os_error() == Some(nix::libc::EBUSY) && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => return other,
        }
    }
}

/// Kills and removes every group below `parents` whose name begins with `prefix`, except those that begin
/// with `except`; says how many sandboxes that were.
pub fn sweep<'a>(parents: impl Iterator<Item = &'a Path>, prefix: &str, except: Option<&str>) -> usize {
    let mut names: Vec<String> = Vec::new();
    for parent in parents {
        let Ok(entries) = fs::read_dir(parent) else { continue };
        for entry in entries.flatten() {
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            if !name.starts_with(prefix) || except.is_some_and(|ours| name.starts_with(ours)) {
                continue;
            }
            end_all(&entry.path());
            if let Err(why) = remove(&entry.path()) {
                tracing::warn!(%name, %why, "a leftover cgroup cannot be removed");
            } else if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names.len()
}

fn end_all(folder: &Path) {
    let until = Instant::now() + Duration::from_millis(500);
    while Instant::now() < until {
        let processes = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        let pids: Vec<i32> =
            processes.lines().filter_map(|line| line.parse().ok()).filter(|p| *p > 1).collect();
        if pids.is_empty() {
            return;
        }
        for pid in pids {
            let pid = nix::unistd::Pid::from_raw(pid);
            if let Err(errno) = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL) {
                tracing::debug!(%pid, %errno, "a leftover process had ended");
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "1 0 0:1 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                          2 0 0:2 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn a_hybrid_host_offers_version_1_first() {
        let found = candidates(Controller::Memory, "4:memory:/node/a\n0::/user\n", HYBRID);
        assert_eq!(
            found,
            [
                (Version::V1, PathBuf::from("/sys/fs/cgroup/memory/node/a")),
                (Version::V2, PathBuf::from("/sys/fs/cgroup/unified/user")),
            ]
        );
    }

    #[test]
    fn who_only_looks_finds_what_could_be_delegated_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let parent = dir.path();
        let write = |file: &str, text: &str| fs::write(parent.join(file), text).unwrap();
        write("cgroup.controllers", "cpu memory pids\n");
        write("cgroup.subtree_control", "");
        write("cgroup.type", "domain\n");
        write("cgroup.procs", &format!("{}\n", std::process::id()));
        let look = || usable(Controller::Memory, Version::V2, parent, "probe", false);
        assert!(look());
        write("cgroup.procs", &format!("{}\n1\n", std::process::id()));
        assert!(!look(), "another process is in the way");
        write("cgroup.controllers", "cpu pids\n");
        fs::remove_file(parent.join("cgroup.type")).unwrap();
        assert!(!look(), "it is not offered");
        write("cgroup.controllers", "memory\n");
        assert!(look(), "the root may keep its processes");
        assert_eq!(fs::read_to_string(parent.join("cgroup.subtree_control")).unwrap(), "");
        assert_eq!(fs::read_dir(parent).unwrap().count(), 3, "nothing was made");
    }

    #[test]
    fn swap_is_limited_beside_memory_by_the_count_of_each_version() {
        let dir = tempfile::tempdir().unwrap();
        let policy = |memory_bytes, swap_bytes| Policy {
            wall_ms: 1000,
            idle_ms: 1000,
            memory_bytes,
            swap_bytes,
            pids: 8,
            cpu_milli: 1000,
            disk_bytes: 1 << 20,
            inodes: 100,
            open_files: 64,
            output_bytes: 1000,
            output_bytes_per_s: 1 << 20,
            network: super::super::super::Network::None,
        };
        let limited = |version, policy: &Policy, files: &[&str]| {
            let group = Group {
                places: vec![(Controller::Memory, version, dir.path().to_owned())],
                folders: Vec::new(),
                sockets: files.contains(&SOCKETS),
            };
            files.iter().for_each(|file| fs::write(dir.path().join(file), "").unwrap());
            group.limit(policy).unwrap();
            let read = |file: &&str| fs::read_to_string(dir.path().join(file)).unwrap();
            let said: Vec<String> = files.iter().map(read).collect();
            files.iter().for_each(|file| fs::remove_file(dir.path().join(file)).unwrap());
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "what is not there is not made");
            said
        };
        let v1 = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.swappiness"];
        assert_eq!(limited(Version::V1, &policy(1000, 0), &v1), ["1000", "1000", "0"]);
        assert_eq!(limited(Version::V1, &policy(1000, 50), &v1), ["1000", "1050", ""]);
        let most = u64::MAX.to_string();
        assert_eq!(limited(Version::V1, &policy(1000, u64::MAX), &v1), ["1000", &most, ""]);
        assert_eq!(limited(Version::V1, &policy(1000, 0), &v1[..1]), ["1000"]);
        let with_sockets = [v1[0], v1[1], SOCKETS];
        assert_eq!(limited(Version::V1, &policy(1600, 50), &with_sockets), ["1500", "1550", "100"]);
        let v2 = ["memory.max", "memory.swap.max"];
        assert_eq!(limited(Version::V2, &policy(1000, 0), &v2), ["1000", "0"]);
        assert_eq!(limited(Version::V2, &policy(1000, 50), &v2), ["1000", "50"]);
        assert_eq!(limited(Version::V2, &policy(1000, 50), &v2[..1]), ["1000"]);
    }

    #[test]
    fn memory_that_the_kernel_was_booted_not_to_count_is_known() {
        for (booted, kind, off) in [
            ("quiet cgroup.memory=nosocket,nokmem ro", "nosocket", true),
            ("quiet cgroup.memory=nosocket,nokmem ro", "nokmem", true),
            ("cgroup.memory=nokmem cgroup.memory=nosocket", "nosocket", true),
            ("cgroup.memory=nokmem", "nosocket", false),
            ("xcgroup.memory=nosocket", "nosocket", false),
            ("", "nokmem", false),
        ] {
            assert_eq!(turned_off(booted, kind), off, "{booted}: {kind}");
        }
    }

    #[test]
    fn a_mount_below_the_hierarchys_root_is_followed() {
        let mounts = "1 0 0:1 /docker/x /cg rw - cgroup cgroup rw,cpu,cpuacct\n";
        let found = candidates(Controller::Cpu, "2:cpu,cpuacct:/docker/x/y\n", mounts);
        assert_eq!(found, [(Version::V1, PathBuf::from("/cg/y"))]);
    }
}
