//! Locks a process in for good: capabilities, Landlock, seccomp for init and all its children, and the resource
//! limits of one command. The namespaces around it are made elsewhere (`nursery`, `mounts`).

use std::io;
use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, PathBeneath, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr,
    RulesetError, path_beneath_rules,
};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

use super::seccomp::{self, StandIns};
use super::sys;
use super::wire::Configure;

/// The newest Landlock whose rules we use; an older kernel takes what it knows of them.
const LEVEL: ABI = ABI::V5;

/// The folders where a job may write, with the workspace; everything else is read-only by its mount, and again by Landlock.
/// /dev/zero is not among them: opened to be written, it gives shared memory that no process shows.
const WRITABLE: [&str; 7] =
    ["/tmp", "/home/job", "/dev/shm", "/dev/null", "/dev/full", "/dev/random", "/dev/urandom"];

/// Takes every power from this process and its children, except to compute; the folders follow with `Walls`.
pub fn lock(stand_ins: StandIns) -> io::Result<()> {
    sys::drop_capabilities()?;
    prctl::set_no_new_privs()?;
    seccomp::apply(stand_ins).map_err(io::Error::other)
}

/// Landlock's rules, gathered while there is time. Where the kernel has no Landlock they do nothing.
pub struct Walls(RulesetCreated);

impl Walls {
    /// Read and execute everywhere, write in the job's places; the workspace is not there yet.
    pub fn gather() -> io::Result<Walls> {
        let gathered = || {
            Ruleset::default()
                .handle_access(AccessFs::from_all(LEVEL))?
                .create()?
                .add_rules(path_beneath_rules(["/"], AccessFs::from_read(LEVEL)))?
                .add_rules(path_beneath_rules(["/dev"], AccessFs::from_read(LEVEL) | AccessFs::IoctlDev))?
                .add_rules(path_beneath_rules(WRITABLE, AccessFs::from_all(LEVEL)))
        };
        gathered().map(Walls).map_err(|why: RulesetError| io::Error::other(why))
    }

    /// Closes them around this process and its children.
    pub fn close(self, workspace: BorrowedFd<'_>) -> io::Result<()> {
        let rule = PathBeneath::new(workspace, AccessFs::from_all(LEVEL));
        self.0.add_rule(rule).and_then(RulesetCreated::restrict_self).map(drop).map_err(io::Error::other)
    }
}

/// Keeps a process to some cores.
pub fn keep_to(process: Pid, cores: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core)?;
    }
    Ok(sched_setaffinity(process, &set)?)
}

/// The limits of one command, set between fork and exec.
pub fn limit(how: &Configure) -> io::Result<()> {
    // The kernel counts this uid's tasks in this user namespace: init is one of them.
    lower(Resource::RLIMIT_NPROC, u64::from(how.pids) + 1)?;
    lower(Resource::RLIMIT_NOFILE, u64::from(how.open_files))?;
    lower(Resource::RLIMIT_CORE, 0)?;
    lower(Resource::RLIMIT_RTPRIO, 0)?;
    lower(Resource::RLIMIT_MSGQUEUE, 0)?;
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
