//! Locks a process in for good: capabilities, Landlock, seccomp for process 1 and all its children, and the resource
//! limits of one command. The namespaces around it are made elsewhere.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, PathBeneath, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr,
    RulesetError, path_beneath_rules,
};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

use crate::seccomp::{self, StandIns};
use crate::sys;

/// The newest Landlock whose rules we use; an older kernel takes what it knows of them.
const LEVEL: ABI = ABI::V5;

/// The folders where a job may write, with the workspace; everything else is read-only by its mount, and again by Landlock.
/// /dev/zero is not among them: opened to be written, it gives shared memory that no process shows.
const WRITABLE: [&str; 11] = [
    "/tmp",
    "/var/tmp",
    "/run/user",
    "/home/job",
    "/dev/shm",
    "/dev/pts",
    "/dev/tty",
    "/dev/null",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
];

/// Takes every power from this process and its children, except to compute; the folders follow with `Walls`.
pub fn lock(stand_ins: StandIns) -> io::Result<()> {
    sys::drop_capabilities()?;
    bar(stand_ins)
}

/// As `lock`, for a process that keeps its capabilities to give them up in each child.
pub fn bar(stand_ins: StandIns) -> io::Result<()> {
    prctl::set_no_new_privs()?;
    seccomp::apply(stand_ins).map_err(io::Error::other)
}

/// Landlock's rules, gathered while there is time. Where the kernel has no Landlock they do nothing.
pub struct Walls(RulesetCreated);

impl Walls {
    /// Read and execute everywhere, write in the job's places and what is there in these; the workspace is not there yet.
    pub fn gather(beside: &[&str]) -> io::Result<Walls> {
        let gathered = || {
            Ruleset::default()
                .handle_access(AccessFs::from_all(LEVEL))?
                .create()?
                .add_rules(path_beneath_rules(["/"], AccessFs::from_read(LEVEL)))?
                .add_rules(path_beneath_rules(["/dev"], AccessFs::from_read(LEVEL) | AccessFs::IoctlDev))?
                .add_rules(path_beneath_rules(WRITABLE, AccessFs::from_all(LEVEL)))?
                .add_rules(path_beneath_rules(beside, AccessFs::WriteFile))
        };
        gathered().map(Walls).map_err(|why: RulesetError| io::Error::other(why))
    }

    /// Closes them around this process and its children.
    pub fn close(self, workspace: BorrowedFd<'_>) -> io::Result<()> {
        let rule = PathBeneath::new(workspace, AccessFs::from_all(LEVEL));
        self.0.add_rule(rule).and_then(RulesetCreated::restrict_self).map(drop).map_err(io::Error::other)
    }
}

/// Makes this process, and what it starts, the first that the kernel kills when memory is short.
pub fn die_first() -> io::Result<()> {
    File::options().write(true).open("/proc/self/oom_score_adj")?.write_all(b"1000")
}

/// Keeps a process to some cores.
pub fn keep_to(process: Pid, cores: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core)?;
    }
    Ok(sched_setaffinity(process, &set)?)
}

/// The resource limits of one command.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The most tasks of the job's uid in its user namespace; none where it shares that with the host, whose other
    /// processes would count.
    pub tasks: Option<u64>,
    pub open_files: u32,
    /// The cap on one process's private memory, in bytes, where no cgroup caps them all.
    pub data_bytes: Option<u64>,
}

/// Signals on their way and timers that send one, for all processes of a user together. The host's own processes may be
/// counted with them, and have more.
const PENDING_SIGNALS: u64 = 1024;

/// Sets the limits of one command, between fork and exec.
pub fn limit(how: &Limits) -> io::Result<()> {
    if let Some(tasks) = how.tasks {
        lower(Resource::RLIMIT_NPROC, tasks)?;
    }
    lower(Resource::RLIMIT_NOFILE, u64::from(how.open_files))?;
    lower(Resource::RLIMIT_CORE, 0)?;
    lower(Resource::RLIMIT_RTPRIO, 0)?;
    lower(Resource::RLIMIT_MSGQUEUE, 0)?;
    lower(Resource::RLIMIT_SIGPENDING, PENDING_SIGNALS)?;
    if let Some(bytes) = how.data_bytes {
        lower(Resource::RLIMIT_DATA, bytes)?;
    }
    Ok(())
}

fn lower(what: Resource, to: u64) -> io::Result<()> {
    let (_, hard) = getrlimit(what)?;
    let to = to.min(hard);
    Ok(setrlimit(what, to, to)?)
}
