//! Locks a process in for good: capabilities, Landlock, seccomp for init and all its children, and the resource
//! limits of one command. The namespaces around it are made elsewhere (`nursery`, `mounts`).

use std::io;

use landlock::{
    ABI, Access, AccessFs, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, path_beneath_rules,
};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

use super::seccomp::{self, StandIns};
use super::sys;
use super::wire::Configure;

/// The folders where a job may write; everything else is read-only by its mount, and again by Landlock.
const WRITABLE: [&str; 5] = ["/workspace", "/tmp", "/home/job", "/dev/shm", "/dev/null"];

/// Takes every power from this process and its children, except to compute. Says whether Landlock holds, too.
pub fn lock(how: &Configure) -> io::Result<bool> {
    sys::drop_capabilities()?;
    prctl::set_no_new_privs()?;
    let landlocked = landlock().map_err(io::Error::other)?;
    if let Some(cores) = &how.cores {
        let mut set = CpuSet::new();
        for core in cores {
            set.set(*core)?;
        }
        sched_setaffinity(Pid::from_raw(0), &set)?;
    }
    let stand_ins = StandIns { memory: how.data_bytes.is_some(), cores: how.cores.is_some() };
    seccomp::apply(stand_ins).map_err(io::Error::other)?;
    Ok(landlocked)
}

fn landlock() -> Result<bool, landlock::RulesetError> {
    let abi = ABI::V5;
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .create()?
        .add_rules(path_beneath_rules(["/"], AccessFs::from_read(abi)))?
        .add_rules(path_beneath_rules(["/dev"], AccessFs::from_file(abi) | AccessFs::ReadDir))?
        .add_rules(path_beneath_rules(WRITABLE, AccessFs::from_all(abi)))?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// The limits of one command, set between fork and exec.
pub fn limit(how: &Configure) -> io::Result<()> {
    // The kernel counts this uid's tasks in this user namespace: init is one of them.
    lower(Resource::RLIMIT_NPROC, u64::from(how.pids) + 1)?;
    lower(Resource::RLIMIT_NOFILE, u64::from(how.open_files))?;
    lower(Resource::RLIMIT_FSIZE, how.disk_bytes)?;
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
