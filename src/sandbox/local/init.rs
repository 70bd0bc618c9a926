//! A sandbox's process 1. It finishes the namespaces it was born into, locks itself in, and from then on starts
//! commands for the node, reaps whatever ends and reports it. It holds no power that a job lacks, but for its
//! end of the control socket. It ends with that socket.

use std::collections::HashMap;
use std::fs;
use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use coinop_shim::confine::{self, Limits, Walls};
use coinop_shim::launch::{Inside, Launch};
use coinop_shim::seccomp::StandIns;
use coinop_shim::{processes, sys};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::sys::wait::waitpid;
use nix::unistd::{
    ForkResult, Gid, Pid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, fork, getuid, sethostname, setresgid,
    setresuid,
};

use super::mounts::{INSIDE_UID, Named, Step};
use super::wire::{Configure, FromInit, MESSAGE_BYTES, ToInit};
use super::{mounts, wire};

/// What an init is born with.
pub struct Born {
    pub control: OwnedFd,
    /// `tasks` or `cgroup.procs` files, opened by the node: it joins each.
    pub cgroups: Vec<OwnedFd>,
    pub base: Option<OwnedFd>,
}

/// The whole life of process 1, from the clone on. `wait` gives one byte when the user map is written.
pub fn main(born: Born, mut wait: OwnedFd, stand_ins: StandIns) -> ! {
    let Born { control, cgroups, base } = born;
    let lived = live(&control, cgroups, base, &mut wait, stand_ins);
    // Nobody listens when the node is gone; then there is nothing to tell either.
    sys::exit(lived.is_err_and(|broken| tell_broken(&control, broken).is_err()).into())
}

fn live(
    control: &OwnedFd,
    cgroups: Vec<OwnedFd>,
    base: Option<OwnedFd>,
    wait: &mut OwnedFd,
    stand_ins: StandIns,
) -> Step<()> {
    // Stdin is the nursery's socket to the node.
    let null = open(c"/dev/null", OFlag::O_RDWR, Mode::empty()).step("open /dev/null")?;
    dup2_stdin(&null).step("let go of stdin")?;
    dup2_stdout(&null).step("let go of stdout")?;
    dup2_stderr(&null).step("let go of stderr")?;
    let mut keep: Vec<BorrowedFd<'_>> = vec![control.as_fd(), wait.as_fd()];
    keep.extend(cgroups.iter().chain(&base).map(AsFd::as_fd));
    sys::close_all_but(&keep).step("close what is the nursery's")?;
    drop(keep);
    let mut byte = [0];
    if nix::unistd::read(wait.as_fd(), &mut byte).step("wait for the user map")? != 1 {
        return Ok(());
    }
    for procs in &cgroups {
        nix::unistd::write(procs, b"0").step("enter the cgroup")?;
    }
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWCGROUP).step("make a network namespace")?;
    if getuid().as_raw() != INSIDE_UID {
        sys::keep_capabilities_over_setuid().step("keep capabilities")?;
        let (uid, gid) = (Uid::from_raw(INSIDE_UID), Gid::from_raw(INSIDE_UID));
        setresgid(gid, gid, gid).step("become the job's group")?;
        setresuid(uid, uid, uid).step("become the job's user")?;
    }
    prctl::set_pdeathsig(Signal::SIGKILL).step("watch the nursery")?;
    prctl::set_name(c"coinop-init").step("take a name")?;
    prctl::set_dumpable(false).step("close its memory")?;
    sethostname("coinop").step("set the host name")?;
    sys::loopback_up().step("bring the loopback up")?;
    keep_to_quotas().step("lower its quotas")?;
    mounts::furnish()?;
    sys::bar_capabilities().step("bar capabilities")?;
    mounts::settle()?;
    let walls = Walls::gather(&[]).step("gather Landlock's rules")?;

    let (mut told, tell) = io::pipe().step("make a pipe")?;
    // SAFETY: this process has one thread only.
    let mover = match unsafe { fork() }.step("fork the mover")? {
        ForkResult::Child => {
            drop(told);
            move_in(control, base, tell)
        }
        ForkResult::Parent { child } => {
            drop((cgroups, base, tell));
            child
        }
    };
    // What takes longest, installing the filter, is done before there is a job to wait for it.
    confine::lock(stand_ins).step("lock the sandbox")?;
    let mut policy = Vec::new();
    // To the end: then the mover, the last with powers, has ended.
    told.read_to_end(&mut policy).step("hear the policy")?;
    if policy.is_empty() {
        return Ok(());
    }
    // Until it is reaped it counts as one of the job's processes, of which there may be one.
    waitpid(mover, None).step("wait for the mover")?;
    let how: Configure = serde_json::from_slice(&policy).map_err(io::Error::other).step("read the policy")?;
    let to = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let workspace = open(c"/workspace", to, Mode::empty()).step("open the workspace")?;
    walls.close(workspace.as_fd()).step("close Landlock's walls")?;
    Init { control, how, workspace, running: HashMap::new() }.serve().step("serve")
}

/// The kernel counts some things by user, and those of a sandbox as well for the user who made it: root, or the node's.
/// What one sandbox takes must leave enough for that one. Usual tools want one or two of each; of user namespaces, which
/// the filter refuses as well, none.
const QUOTAS: [(&str, u64); 4] = [
    ("max_inotify_instances", 8),
    ("max_fanotify_groups", 2),
    ("max_fanotify_marks", 128),
    ("max_user_namespaces", 0),
];
const BACKLOG: u64 = 128;
/// Of inotify watches, which tools want by the thousand, one part in so many of what the host gives a user.
const WATCHES: &str = "max_inotify_watches";
const WATCHES_PART: u64 = 16;

fn keep_to_quotas() -> io::Result<()> {
    let of_host = fs::read_to_string("/proc/sys/fs/inotify/max_user_watches").unwrap_or_default();
    let watches = of_host.trim().parse::<u64>().unwrap_or_default() / WATCHES_PART;
    for (name, most) in QUOTAS.into_iter().chain([(WATCHES, watches)]) {
        set(&format!("/proc/sys/user/{name}"), most)?;
    }
    // Connections that nobody has accepted are memory that no cgroup counts; this many for each listening socket.
    set("/proc/sys/net/core/somaxconn", BACKLOG)
}

fn set(file: &str, most: u64) -> io::Result<()> {
    match fs::write(file, most.to_string()) {
        // A kernel that does not count it, or a container in which nobody may change it.
        Err(why) if matches!(why.kind(), ErrorKind::NotFound | ErrorKind::ReadOnlyFilesystem) => Ok(()),
        other => other,
    }
}

/// The mover: a process of its own, which still may mount. It waits for the policy, mounts the workspace, answers
/// the node and ends; no command has started by then.
fn move_in(control: &OwnedFd, base: Option<OwnedFd>, mut tell: PipeWriter) -> ! {
    let moved = || -> Step<()> {
        let mut buffer = vec![0; MESSAGE_BYTES];
        let Some((ToInit::Configure(how), mut beside)) =
            wire::receive(control.as_fd(), &mut buffer).step("receive the policy")?
        else {
            return Ok(());
        };
        let base = if how.base { beside.pop().or(base) } else { None };
        if how.base && base.is_none() {
            return Err(("overlay".to_owned(), io::Error::from_raw_os_error(libc::ENOENT)));
        }
        let places = mounts::move_in(&how, base)?;
        if let Some(cores) = &how.cores {
            confine::keep_to(Pid::from_raw(1), cores).step("keep to its cores")?;
        }
        let policy = serde_json::to_vec(&how).map_err(io::Error::other).step("pass the policy on")?;
        let ready = FromInit::Ready { overlay: places.overlay };
        let folders =
            [places.upper.as_fd(), places.workspace.as_fd(), places.job.as_fd(), places.proc.as_fd()];
        wire::send(control.as_fd(), &ready, &folders).step("report")?;
        // While the node prepares the first command; init does not take it before we have ended.
        places.tidy()?;
        tell.write_all(&policy).step("pass the policy on")
    };
    let moved = moved();
    sys::exit(moved.is_err_and(|broken| tell_broken(control, broken).is_err()).into())
}

fn tell_broken(control: &OwnedFd, (step, why): (String, io::Error)) -> io::Result<()> {
    let errno = why.raw_os_error().unwrap_or(libc::EIO);
    wire::send(control.as_fd(), &FromInit::Broken { step, errno }, &[])
}

struct Init<'a> {
    control: &'a OwnedFd,
    how: Configure,
    workspace: OwnedFd,
    /// Commands by pid.
    running: HashMap<i32, Running>,
}

struct Running {
    n: u64,
    /// Where an errno comes if it could not be started.
    told: PipeReader,
    keep_background: bool,
}

/// How long what a command left may take to end; it has been killed by then.
const LEFTOVERS: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_micros(200);

impl Init<'_> {
    fn serve(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; MESSAGE_BYTES];
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGCHLD);
        // Only this one blocked: any other from inside is dropped by the kernel, process 1 having no handler.
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&signals), None)?;
        let ended = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        loop {
            let mut ready = [
                PollFd::new(self.control.as_fd(), PollFlags::POLLIN),
                PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let [asked, signalled] = ready.map(|fd| fd.any().unwrap_or(false));
            if signalled {
                while ended.read_signal()?.is_some() {}
                self.reap()?;
            }
            if asked {
                match wire::receive::<ToInit>(self.control.as_fd(), &mut buffer)? {
                    None => return Ok(()),
                    Some((request, beside)) => self.obey(request, beside)?,
                }
            }
        }
    }

    fn obey(&mut self, request: ToInit, beside: Vec<OwnedFd>) -> io::Result<()> {
        match request {
            // Only the first message may configure.
            ToInit::Configure(_) => Ok(()),
            ToInit::Kill { n } => {
                self.kill(n);
                Ok(())
            }
            ToInit::Exec { n, argv, env, cwd, stdin, keep_background } => {
                // The kernel counts this uid's tasks in this user namespace: init is one of them.
                let tasks = Some(u64::from(self.how.pids) + 1);
                let (open_files, data_bytes) = (self.how.open_files, self.how.data_bytes);
                let limits = Limits { tasks, open_files, data_bytes };
                let inside =
                    Inside { workspace: self.workspace.as_fd(), limits: &limits, user: None, walls: None };
                let started =
                    Launch::prepare(argv, env, cwd, stdin, beside).and_then(|launch| launch.start(&inside));
                match started {
                    Ok((pid, told)) => {
                        self.running.insert(pid, Running { n, told, keep_background });
                        Ok(())
                    }
                    Err(errno) => self.tell(&FromInit::NotStarted { n, errno: errno as i32 }),
                }
            }
        }
    }

    fn reap(&mut self) -> io::Result<()> {
        while let Some(ended) = sys::reap_one() {
            let Some(Running { n, mut told, keep_background }) = self.running.remove(&ended.pid) else {
                continue;
            };
            if !keep_background {
                self.end_leftovers(ended.pid);
            }
            let mut errno = [0; 4];
            // Every copy of the other end closed at exec or with the child: this read does not wait.
            let report = if told.read(&mut errno)? == errno.len() {
                FromInit::NotStarted { n, errno: i32::from_ne_bytes(errno) }
            } else {
                let (exited, signalled) = (libc::WIFEXITED(ended.status), libc::WIFSIGNALED(ended.status));
                FromInit::Exited {
                    n,
                    code: exited.then(|| libc::WEXITSTATUS(ended.status)),
                    signal: signalled.then(|| libc::WTERMSIG(ended.status)),
                }
            };
            self.tell(&report)?;
        }
        Ok(())
    }

    fn tell(&self, report: &FromInit) -> io::Result<()> {
        wire::send(self.control.as_fd(), report, &[])
    }

    /// Ends what a command left that has ended itself: everything inside where no other runs, and then returns when it
    /// is gone.
    fn end_leftovers(&self, root: i32) {
        if !self.running.is_empty() {
            return processes::kill_left_by(root);
        }
        let late = Instant::now() + LEFTOVERS;
        while processes::kill_all() && Instant::now() < late {
            if sys::reap_one().is_none() {
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// With one command running, everything inside is its work. With several, what descends from it or is of its
    /// session.
    fn kill(&self, n: u64) {
        let Some(root) = self.running.iter().find(|(_, run)| run.n == n).map(|(pid, _)| *pid) else {
            return;
        };
        if self.running.len() == 1 {
            processes::kill_all();
        } else {
            processes::kill_family(root);
        }
    }
}
