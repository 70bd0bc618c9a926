//! A sandbox's process 1. It finishes the namespaces it was born into, locks itself in, and from then on starts
//! commands for the node, reaps whatever ends and reports it. It holds no power that a job lacks, but for its
//! end of the control socket. It ends with that socket.

use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::unistd::{
    ForkResult, Gid, Pid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, execve, fchdir, fork, getuid,
    sethostname, setresgid, setresuid, setsid,
};

use super::confine::Walls;
use super::mounts::{INSIDE_UID, Named, Step};
use super::seccomp::StandIns;
use super::wire::{Configure, FromInit, MESSAGE_BYTES, ToInit};
use super::{confine, mounts, sys, wire};

/// What an init is born with.
pub struct Born {
    pub control: OwnedFd,
    /// `tasks` or `cgroup.procs` files, opened by the node: it joins each.
    pub cgroups: Vec<OwnedFd>,
    pub base: Option<OwnedFd>,
}

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULTS: [&str; 3] = [PATH, "HOME=/home/job", "TMPDIR=/tmp"];

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
    mounts::furnish()?;
    sys::bar_capabilities().step("bar capabilities")?;
    mounts::settle()?;
    let walls = Walls::gather().step("gather Landlock's rules")?;

    let (mut told, tell) = io::pipe().step("make a pipe")?;
    // SAFETY: this process has one thread only.
    match unsafe { fork() }.step("fork the mover")? {
        ForkResult::Child => {
            drop(told);
            move_in(control, base, tell)
        }
        ForkResult::Parent { .. } => drop((cgroups, base, tell)),
    }
    // What takes longest, installing the filter, is done before there is a job to wait for it.
    confine::lock(stand_ins).step("lock the sandbox")?;
    let mut policy = Vec::new();
    // To the end: then the mover, the last with powers, has ended.
    told.read_to_end(&mut policy).step("hear the policy")?;
    if policy.is_empty() {
        return Ok(());
    }
    let how: Configure = serde_json::from_slice(&policy).map_err(io::Error::other).step("read the policy")?;
    let to = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let workspace = open(c"/workspace", to, Mode::empty()).step("open the workspace")?;
    walls.close(workspace.as_fd()).step("close Landlock's walls")?;
    Init { control, how, workspace, running: HashMap::new() }.serve().step("serve")
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
    /// Commands by pid: their number, and where an errno comes if they could not be started.
    running: HashMap<i32, (u64, PipeReader)>,
}

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
            ToInit::Exec { n, argv, env, cwd, stdin } => {
                let started = Launch::prepare(argv, env, cwd, stdin, beside)
                    .and_then(|launch| launch.start(&self.how, &self.workspace));
                match started {
                    Ok((pid, told)) => {
                        self.running.insert(pid, (n, told));
                        Ok(())
                    }
                    Err(errno) => self.tell(&FromInit::NotStarted { n, errno: errno as i32 }),
                }
            }
        }
    }

    fn reap(&mut self) -> io::Result<()> {
        while let Some(ended) = sys::reap_one() {
            let Some((n, mut told)) = self.running.remove(&ended.pid) else { continue };
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

    /// With one command running, everything inside is its work. With several, what descends from it or is of its
    /// session; a daemon that left both stays until the sandbox goes.
    fn kill(&self, n: u64) {
        let Some(root) = self.running.iter().find(|(_, (of, _))| *of == n).map(|(pid, _)| *pid) else {
            return;
        };
        if self.running.len() == 1 {
            // ESRCH: all had ended.
            kill(Pid::from_raw(-1), Signal::SIGKILL).unwrap_or_default();
            return;
        }
        // Again until nothing is found: one may fork while the list is read.
        for _ in 0..64 {
            let doomed = descendants(root);
            if doomed.is_empty() {
                return;
            }
            for pid in doomed {
                kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap_or_default();
            }
        }
    }
}

/// Living processes that descend from `root` or are of its session.
fn descendants(root: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return vec![root] };
    let all: Vec<(i32, i32, i32)> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            let pid: i32 = name.to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The name in brackets may hold anything: count from the last bracket.
            let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
            let state = fields.next()?;
            let (parent, _group, session) =
                (fields.next()?.parse().ok()?, fields.next()?, fields.next()?.parse().ok()?);
            (state != "Z").then_some((pid, parent, session))
        })
        .collect();
    let mut found: Vec<i32> = all
        .iter()
        .filter(|(pid, _, session)| *pid == root || *session == root)
        .map(|(pid, ..)| *pid)
        .collect();
    loop {
        let more: Vec<i32> = all
            .iter()
            .filter(|(pid, parent, _)| found.contains(parent) && !found.contains(pid))
            .map(|(pid, ..)| *pid)
            .collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}

/// One command, with everything made before the fork that needs memory.
struct Launch {
    programs: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
    cwd: CString,
    stdio: Vec<OwnedFd>,
    stdin: bool,
}

impl Launch {
    fn prepare(
        argv: Vec<String>,
        mut env: Vec<String>,
        cwd: String,
        stdin: bool,
        stdio: Vec<OwnedFd>,
    ) -> Result<Launch, Errno> {
        let name = argv.first().filter(|name| !name.is_empty()).ok_or(Errno::ENOENT)?.clone();
        for default in DEFAULTS {
            let (key, _) = default.split_once('=').unwrap_or((default, ""));
            if !env.iter().any(|pair| pair.split_once('=').is_some_and(|(k, _)| k == key)) {
                env.push(default.to_owned());
            }
        }
        let programs = if name.contains('/') {
            vec![name]
        } else {
            let path = env.iter().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or_default();
            path.split(':')
                .map(
                    |folder| if folder.is_empty() { format!("./{name}") } else { format!("{folder}/{name}") },
                )
                .collect()
        };
        let strings = |list: Vec<String>| {
            list.into_iter()
                .map(|s| CString::new(s).map_err(|_| Errno::EINVAL))
                .collect::<Result<Vec<_>, _>>()
        };
        if stdio.len() != 2 + usize::from(stdin) {
            return Err(Errno::EBADF);
        }
        let cwd = CString::new(if cwd.is_empty() { ".".to_owned() } else { cwd });
        Ok(Launch {
            programs: strings(programs)?,
            argv: strings(argv)?,
            env: strings(env)?,
            cwd: cwd.map_err(|_| Errno::EINVAL)?,
            stdio,
            stdin,
        })
    }

    fn start(self, how: &Configure, workspace: &OwnedFd) -> Result<(i32, PipeReader), Errno> {
        let (told, tell) =
            io::pipe().map_err(|why| Errno::from_raw(why.raw_os_error().unwrap_or(libc::EIO)))?;
        // SAFETY: init has one thread only, so the child may do anything the parent could.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok((child.as_raw(), told)),
            ForkResult::Child => {
                let errno = match self.become_it(how, workspace) {
                    Ok(never) => match never {},
                    Err(errno) => errno as i32,
                };
                sys::exit(if report(tell, errno).is_ok() { 127 } else { 126 })
            }
        }
    }

    fn become_it(&self, how: &Configure, workspace: &OwnedFd) -> Result<Infallible, Errno> {
        let io = |why: io::Error| Errno::from_raw(why.raw_os_error().unwrap_or(libc::EIO));
        setsid()?;
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        let how_to = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY).resolve(resolve);
        fchdir(openat2(workspace, self.cwd.as_c_str(), how_to)?)?;
        let mut stdio = self.stdio.iter();
        let (out, err) = (stdio.next().ok_or(Errno::EBADF)?, stdio.next().ok_or(Errno::EBADF)?);
        match stdio.next().filter(|_| self.stdin) {
            Some(input) => dup2_stdin(input)?,
            None => dup2_stdin(open(c"/dev/null", OFlag::O_RDONLY, Mode::empty())?)?,
        }
        dup2_stdout(out)?;
        dup2_stderr(err)?;
        sys::close_from(3, true).map_err(io)?;
        // SAFETY: the default action is no handler of ours. Rust had set SIGPIPE to be ignored.
        unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
        confine::limit(how).map_err(io)?;
        self.exec()
    }

    /// As a shell looks it up: the first that can be started; a refusal outweighs an absence.
    fn exec(&self) -> Result<Infallible, Errno> {
        let mut refused = None;
        for program in &self.programs {
            match execve(program, &self.argv, &self.env) {
                Ok(never) => return Ok(never),
                Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(Errno::EACCES) if self.programs.len() > 1 => refused = Some(Errno::EACCES),
                Err(errno) => return Err(errno),
            }
        }
        Err(refused.unwrap_or(Errno::ENOENT))
    }
}

fn report(mut tell: PipeWriter, errno: i32) -> io::Result<()> {
    tell.write_all(&errno.to_ne_bytes())
}
