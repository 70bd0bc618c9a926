//! One command of the job's: how it is started and how it ended. What it prints is `streams`'s, whose turn it is
//! `serve`'s.

use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use coinop_shim::launch::{Inside, Launch};
use coinop_shim::wire::Ended;
use nix::errno::Errno;
use nix::libc;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use super::streams::{Outbox, Output, Window};
use super::usage::Counts;

/// How long output may still come from a command that has ended, when a process it left behind holds the pipe.
const AFTERMATH: Duration = Duration::from_millis(50);

/// A pipe that belongs to the job, which can then open its own streams by path, as in `tee /dev/stderr`.
fn jobs_pipe(user: Option<(u32, u32)>) -> io::Result<(PipeReader, PipeWriter)> {
    let Some((uid, gid)) = user else { return io::pipe() };
    // Neither call fails aloud. A pipe that is still ours serves as well, but by its descriptor only.
    setfsgid(Gid::from_raw(gid));
    setfsuid(Uid::from_raw(uid));
    let made = io::pipe();
    setfsuid(Uid::from_raw(0));
    setfsgid(Gid::from_raw(0));
    made
}

/// A command that was started, until its end is told.
pub struct Running {
    pub pid: i32,
    /// Where an errno comes if it could not be started.
    told: PipeReader,
    pub stdin: Option<Outbox>,
    pub stdout: Output,
    pub stderr: Output,
    pub window: Window,
    /// It is to be killed.
    pub doomed: bool,
    memory_kills_before: u64,
    pub ended: Option<(Ended, Instant)>,
}

impl Running {
    /// # Errors
    /// Where there can be no pipe or no process. What cannot be started tells so when it ends.
    pub fn start(
        argv: Vec<String>,
        env: Vec<String>,
        cwd: String,
        stdin: bool,
        inside: &Inside<'_>,
        counts: &mut Counts,
    ) -> Result<Running, Errno> {
        let errno = |why: io::Error| Errno::from_raw(why.raw_os_error().unwrap_or(libc::EIO));
        counts.settle();
        let (out, out_theirs) = jobs_pipe(inside.user).map_err(errno)?;
        let (err, err_theirs) = jobs_pipe(inside.user).map_err(errno)?;
        let mut stdio: Vec<OwnedFd> = vec![out_theirs.into(), err_theirs.into()];
        let mut input = None;
        if stdin {
            let (theirs, ours) = jobs_pipe(inside.user).map_err(errno)?;
            stdio.push(theirs.into());
            input = Some(Outbox::new(ours.into()).map_err(errno)?);
        }
        let launch = Launch::prepare(argv, env, cwd, stdin, stdio)?;
        let memory_kills_before = counts.memory_kills();
        let (pid, told) = launch.start(inside)?;
        Ok(Running {
            pid,
            told,
            stdin: input,
            stdout: Output::new(out.into()).map_err(errno)?,
            stderr: Output::new(err.into()).map_err(errno)?,
            window: Window::new(),
            doomed: false,
            memory_kills_before,
            ended: None,
        })
    }

    /// It was reaped with this status.
    pub fn end(&mut self, status: i32, counts: &Counts) -> io::Result<()> {
        let starved = counts.memory_kills() > self.memory_kills_before;
        let mut errno = [0; 4];
        let (exited, signalled) = (libc::WIFEXITED(status), libc::WIFSIGNALED(status));
        // Every copy of the other end closed at exec or with the child: this read does not wait.
        let how = if self.told.read(&mut errno)? == errno.len() {
            Ended { errno: Some(i32::from_ne_bytes(errno)), starved, ..Ended::default() }
        } else {
            Ended {
                code: exited.then(|| libc::WEXITSTATUS(status)),
                signal: signalled.then(|| libc::WTERMSIG(status)),
                errno: None,
                starved,
            }
        };
        self.stdout.owe();
        self.stderr.owe();
        self.ended = Some((how, Instant::now() + AFTERMATH));
        Ok(())
    }

    /// Killed, and not dead yet.
    pub fn lives_on(&self) -> bool {
        self.doomed && self.ended.is_none()
    }

    /// Until when others may print for it, when it has ended and all that it printed itself was sent.
    pub fn patience(&self) -> Option<Instant> {
        self.ended.map(|(_, until)| until).filter(|_| !self.stdout.owes() && !self.stderr.owes())
    }
}
