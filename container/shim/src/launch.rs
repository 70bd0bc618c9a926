//! Starts one command inside: finds the program, forks, and in the child takes the last steps down to the job.
//! Reaping it and telling of its end are the caller's.

use std::convert::Infallible;
use std::ffi::CString;
use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::libc;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::stat::Mode;
use nix::unistd::{
    ForkResult, Gid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, execve, fchdir, fork, setgroups, setresgid,
    setresuid, setsid,
};

use crate::confine::{self, Limits, Walls};
use crate::sys;

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULTS: [&str; 3] = [PATH, "HOME=/home/job", "TMPDIR=/tmp"];

/// What every command of a sandbox gets.
pub struct Inside<'a> {
    pub workspace: BorrowedFd<'a>,
    pub limits: &'a Limits,
    /// The user and group to become; none where process 1 is the job's user itself.
    pub user: Option<(u32, u32)>,
    /// Closed around the command alone, after its last step that they would hinder.
    pub walls: Option<&'a Walls>,
}

/// One command, with everything made before the fork that needs memory.
pub struct Launch {
    programs: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
    cwd: CString,
    stdio: Vec<OwnedFd>,
    stdin: bool,
}

impl Launch {
    /// # Errors
    /// ENOENT without a program's name, EINVAL for a NUL byte, EBADF when `stdio` is not stdout, stderr and, with
    /// `stdin`, stdin.
    pub fn prepare(
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

    /// Its pid, and where an errno comes if the program could not be started. The caller has one thread only.
    ///
    /// # Errors
    /// When there can be no pipe or no process.
    pub fn start(self, inside: &Inside<'_>) -> Result<(i32, PipeReader), Errno> {
        let (told, tell) =
            io::pipe().map_err(|why| Errno::from_raw(why.raw_os_error().unwrap_or(libc::EIO)))?;
        // SAFETY: the caller has one thread only, so the child may do anything the parent could.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok((child.as_raw(), told)),
            ForkResult::Child => {
                let errno = match self.become_it(inside) {
                    Ok(never) => match never {},
                    Err(errno) => errno as i32,
                };
                sys::exit(if report(tell, errno).is_ok() { 127 } else { 126 })
            }
        }
    }

    fn become_it(&self, inside: &Inside<'_>) -> Result<Infallible, Errno> {
        let io = |why: io::Error| Errno::from_raw(why.raw_os_error().unwrap_or(libc::EIO));
        setsid()?;
        if let Some((uid, gid)) = inside.user {
            // Short of memory, the job goes before process 1. Where that cannot be, the largest goes, which that is not.
            confine::die_first().unwrap_or_default();
            setgroups(&[])?;
            setresgid(Gid::from_raw(gid), Gid::from_raw(gid), Gid::from_raw(gid))?;
            setresuid(Uid::from_raw(uid), Uid::from_raw(uid), Uid::from_raw(uid))?;
            sys::drop_capabilities().map_err(io)?;
            // Process 1 shares the job's processor time, and must be heard in time when it ends the job.
            sys::go_last().map_err(io)?;
        }
        if let Some(walls) = inside.walls {
            walls.close_copy().map_err(io)?;
        }
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        let how_to = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY).resolve(resolve);
        fchdir(openat2(inside.workspace, self.cwd.as_c_str(), how_to)?)?;
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
        confine::limit(inside.limits).map_err(io)?;
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
