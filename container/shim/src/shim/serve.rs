//! The shim's loop: closes itself in, takes the node's orders, has commands started and ended, carries their streams, reaps
//! whatever ends. A command is `running`'s; work on files is passed to the worker, frame by frame.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use coinop_shim::confine::{self, Limits, Walls};
use coinop_shim::launch::Inside;
use coinop_shim::pace::Pace;
use coinop_shim::seccomp::StandIns;
use coinop_shim::wire::{self, Decoder, Ended, FromShim, Hello, Ready, Run, ToShim};
use coinop_shim::{processes, sys};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid};

use super::places;
use super::running::Running;
use super::streams::{Outbox, Output};
use super::usage::{self, Counts};
use super::worker::Worker;

/// Of the signals that an engine sends to process 1, those passed on to the job.
const FORWARDED: [Signal; 6] =
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
/// The most pseudo-terminals of a container, how often they are counted while a command runs, and where: an engine gives
/// a container as many as the kernel has, and no cgroup counts what they hold.
const PTYS: usize = 64;
const COUNT_PTYS: Duration = Duration::from_millis(100);
const TERMINALS: &str = "/dev/pts";
/// How soon a kill is tried again on those that it did not find, or that were not the job's yet.
const AGAIN: Duration = Duration::from_millis(5);

/// Serves the node until it lets go.
pub fn serve() -> io::Result<()> {
    if std::process::id() != 1 {
        return Err(io::Error::other("the shim is not process 1 here"));
    }
    umask(Mode::from_bits_truncate(0o022));
    prctl::set_dumpable(false)?;
    sys::close_from(3, false)?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    FORWARDED.into_iter().for_each(|signal| signals.add(signal));
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&signals), None)?;
    let ended = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let mut decoder = Decoder::default();
    let Some((n, hello)) = greeting(&mut decoder)? else { return Ok(()) };
    setgroups(&[])?;
    hello.mounts.iter().try_for_each(places::make)?;
    sys::keep_setuid_and_setgid()?;
    let places = places::open_all(&hello)?;
    let rooms = places::measure_all(&hello)?;
    // It keeps the right to write where the job may not, so it leaves before the walls are closed.
    let worker = Worker::start(hello.uid, hello.gid)?;
    let workspace =
        open(places::WORKSPACE, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    // A command takes its place among those that are killed for memory when it has been started within the walls.
    let walls = Walls::gather(&["/proc"])?;
    // From then on it may not: these are closed around each command, within the others.
    let inner_walls = Walls::gather(&[])?;
    let counts = Counts::open();
    let swap = usage::has_swap();
    let sockets = usage::bounds_sockets();
    confine::bar(StandIns { sockets: !sockets, ..StandIns::default() })?;
    let landlock = sys::has_landlock() && walls.close(workspace.as_fd()).is_ok();
    let walls = if landlock { Some(inner_walls.with(workspace.as_fd())?) } else { None };
    let (running, killing) = (BTreeMap::new(), Vec::new());
    let (pace, began) = (Pace::new(hello.output_bytes_per_s), Instant::now());
    let mut shim = Shim {
        hello,
        workspace,
        walls,
        places,
        counts,
        worker,
        worker_run: 0,
        running,
        pace,
        began,
        terminals_counted: began,
        stopping: false,
        killing,
    };
    let (_, open_files) = getrlimit(Resource::RLIMIT_NOFILE)?;
    tell(n, &FromShim::Ready(Ready { version: wire::VERSION, landlock, open_files, swap, sockets, rooms }))?;
    shim.run(&mut decoder, &ended)
}

/// The first frame; none when the node went first.
fn greeting(decoder: &mut Decoder) -> io::Result<Option<(u32, Hello)>> {
    loop {
        match decoder.take::<ToShim>().map_err(io::Error::other)? {
            Some((_, ToShim::Hello(hello))) if hello.version != wire::VERSION => {
                let (ours, theirs) = (wire::VERSION, hello.version);
                return Err(io::Error::other(format!("the node speaks version {theirs}, this shim {ours}")));
            }
            Some((_, ToShim::Hello(hello))) if hello.uid == 0 || hello.gid == 0 => {
                return Err(io::Error::other("a job does not run as root"));
            }
            Some((n, ToShim::Hello(hello))) => return Ok(Some((n, hello))),
            Some(_) => return Err(io::Error::other("the first frame was no greeting")),
            None => {}
        }
        if !receive(decoder)? {
            return Ok(None);
        }
    }
}

/// Takes what the node has sent; false when it has let go.
fn receive(decoder: &mut Decoder) -> io::Result<bool> {
    let mut bytes = [0; 64 * 1024];
    match io::stdin().lock().read(&mut bytes) {
        Ok(0) => Ok(false),
        Ok(len) => {
            decoder.push(bytes.get(..len).unwrap_or_default());
            Ok(true)
        }
        Err(why) if why.kind() == ErrorKind::Interrupted => Ok(true),
        Err(why) => Err(why),
    }
}

struct Shim {
    hello: Hello,
    workspace: OwnedFd,
    /// Of each command; none where there is no Landlock.
    walls: Option<Walls>,
    places: Vec<OwnedFd>,
    counts: Counts,
    worker: Worker,
    /// The last run that the worker was given.
    worker_run: u32,
    running: BTreeMap<u32, Running>,
    /// How fast what they print is taken, and since when its times count.
    pace: Pace,
    began: Instant,
    /// When terminals were last counted.
    terminals_counted: Instant,
    /// The engine stops the container: no command's end is its own from now on.
    stopping: bool,
    /// The questions whose answer is that nothing of the job runs.
    killing: Vec<u32>,
}

/// Whose turn it is after a poll.
enum Turn {
    Node,
    Signals,
    FromWorker,
    ToWorker,
    Stdin(u32),
    Stdout(u32),
    Stderr(u32),
}

impl Shim {
    fn run(&mut self, decoder: &mut Decoder, ended: &SignalFd) -> io::Result<()> {
        loop {
            while let Some((n, order)) = decoder.take::<ToShim>().map_err(io::Error::other)? {
                self.obey(n, order)?;
            }
            for turn in self.wait(ended)? {
                match turn {
                    Turn::Node => {
                        if !receive(decoder)? {
                            return self.as_job(processes::kill_all).map(drop);
                        }
                    }
                    Turn::Signals => self.signalled(ended)?,
                    Turn::FromWorker => self.worker.pass_on()?,
                    Turn::ToWorker => self.worker.feed()?,
                    Turn::Stdin(n) => self.feed(n)?,
                    Turn::Stdout(n) => self.output(n, |run| &mut run.stdout, FromShim::Stdout)?,
                    Turn::Stderr(n) => self.output(n, |run| &mut run.stderr, FromShim::Stderr)?,
                }
            }
            self.count_terminals()?;
            self.kill_again()?;
            self.end_leftovers()?;
            self.finish()?;
        }
    }

    fn wait(&self, ended: &SignalFd) -> io::Result<Vec<Turn>> {
        let stdin = io::stdin();
        let mut asked: Vec<(BorrowedFd<'_>, PollFlags, Turn)> = vec![
            (stdin.as_fd(), PollFlags::POLLIN, Turn::Node),
            (ended.as_fd(), PollFlags::POLLIN, Turn::Signals),
            (self.worker.from(), PollFlags::POLLIN, Turn::FromWorker),
        ];
        asked.extend(self.worker.wants().map(|pipe| (pipe, PollFlags::POLLOUT, Turn::ToWorker)));
        let waits = |run: &Running| run.lives_on() || run.leaves();
        let again =
            (!self.killing.is_empty() || self.running.values().any(waits)).then(|| Instant::now() + AGAIN);
        let counting = (!self.running.is_empty()).then_some(self.terminals_counted + COUNT_PTYS);
        let mut until =
            self.running.values().filter_map(Running::patience).chain(again).chain(counting).min();
        let now = self.began.elapsed();
        for (n, run) in &self.running {
            let stdin = run.stdin.as_ref().and_then(Outbox::wants);
            asked.extend(stdin.map(|pipe| (pipe, PollFlags::POLLOUT, Turn::Stdin(*n))));
            if run.window.left() == 0 {
                continue;
            }
            let paced = self.pace.wait(now, (*n).into());
            for (stream, turn) in [(&run.stdout, Turn::Stdout(*n)), (&run.stderr, Turn::Stderr(*n))] {
                match stream.pipe() {
                    Some(pipe) if paced.is_zero() || stream.free() > 0 => {
                        asked.push((pipe, PollFlags::POLLIN, turn));
                    }
                    Some(_) => until = until.into_iter().chain([self.began + now + paced]).min(),
                    None => {}
                }
            }
        }
        let mut fds: Vec<PollFd<'_>> = asked.iter().map(|(fd, flags, _)| PollFd::new(*fd, *flags)).collect();
        let left = until.map(|at| at.saturating_duration_since(Instant::now()));
        // Rounded up: a poll that ends early would spin.
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let turns = asked.into_iter().map(|(_, _, turn)| turn);
        Ok(turns.zip(ready).filter(|(_, ready)| *ready).map(|(turn, _)| turn).collect())
    }

    fn obey(&mut self, n: u32, order: ToShim) -> io::Result<()> {
        match order {
            // Only the first frame greets.
            ToShim::Hello(_) => Ok(()),
            ToShim::Run(Run::Command { argv, env, cwd, stdin, keep_background }) => {
                let limits = Limits { tasks: None, open_files: self.hello.open_files, data_bytes: None };
                let user = Some((self.hello.uid, self.hello.gid));
                let walls = self.walls.as_ref();
                let inside = Inside { workspace: self.workspace.as_fd(), limits: &limits, user, walls };
                match Running::start(argv, env, cwd, (stdin, keep_background), &inside, &mut self.counts) {
                    Ok(run) => {
                        self.running.insert(n, run);
                        Ok(())
                    }
                    Err(errno) => {
                        let ended = Ended { errno: Some(errno as i32), ..Ended::default() };
                        tell(n, &FromShim::Ended(ended))
                    }
                }
            }
            ToShim::KillAll => {
                self.killing.push(n);
                self.as_job(processes::kill_all).map(drop)
            }
            ToShim::Usage => {
                let usage = self.counts.usage(self.places.iter().map(AsFd::as_fd));
                tell(n, &FromShim::Usage(usage))
            }
            order if self.running.contains_key(&n) => self.direct(n, order),
            order @ ToShim::Run(_) => {
                self.worker_run = n;
                self.worker.order(n, &order)
            }
            order if self.worker_run == n => self.worker.order(n, &order),
            // Of a run that has ended: what was on its way to it is dropped.
            _ => Ok(()),
        }
    }

    /// An order about a command that runs.
    fn direct(&mut self, n: u32, order: ToShim) -> io::Result<()> {
        let Some(run) = self.running.get_mut(&n) else { return Ok(()) };
        match order {
            ToShim::Input(bytes) => {
                if let Some(stdin) = &mut run.stdin {
                    stdin.push(&bytes);
                }
                self.feed(n)
            }
            ToShim::EndInput => {
                run.stdin.iter_mut().for_each(Outbox::end);
                Ok(())
            }
            ToShim::Took(bytes) => {
                run.window.took(bytes);
                Ok(())
            }
            ToShim::Kill => {
                run.doomed = true;
                self.kill(n)
            }
            _ => Ok(()),
        }
    }

    fn kill(&self, n: u32) -> io::Result<()> {
        let Some(root) = self.running.get(&n).filter(|run| run.ended.is_none()).map(|run| run.pid) else {
            return Ok(());
        };
        // With one command running, everything inside is its work.
        let alone = self.running.len() == 1;
        self.as_job(|| {
            if alone {
                processes::kill_all();
            } else {
                processes::kill_family(root);
            }
        })
    }

    /// Ends what commands left that have ended themselves: everything of the job's where no other runs. Their ends are
    /// told when it is gone.
    fn end_leftovers(&mut self) -> io::Result<()> {
        let alone = self.running.values().all(|run| run.ended.is_some());
        let roots: Vec<i32> = self.running.values().filter(|run| run.leaves()).map(|run| run.pid).collect();
        if roots.is_empty() {
            return Ok(());
        }
        let left = self.as_job(|| {
            if alone {
                return processes::kill_all();
            }
            roots.iter().for_each(|root| processes::kill_left_by(*root));
            false
        })?;
        if !left {
            self.running.values_mut().filter(|run| run.leaves()).for_each(Running::left_nothing);
        }
        Ok(())
    }

    /// A command that is not the job's user yet, being started, cannot be killed by it.
    fn kill_again(&mut self) -> io::Result<()> {
        let doomed = self.running.iter().filter(|(_, run)| run.doomed).map(|(n, _)| *n);
        for n in doomed.collect::<Vec<_>>() {
            self.kill(n)?;
        }
        if self.killing.is_empty() {
            return Ok(());
        }
        let ours = |pid: i32| pid == 1 || self.worker.is(pid);
        if !processes::all().is_ok_and(|all| all.into_iter().all(ours)) {
            return self.as_job(processes::kill_all).map(drop);
        }
        let killed = FromShim::Killed { starved: self.counts.memory_kills() > 0 };
        std::mem::take(&mut self.killing).into_iter().try_for_each(|n| tell(n, &killed))
    }

    fn signalled(&mut self, ended: &SignalFd) -> io::Result<()> {
        while let Some(signal) = ended.read_signal()? {
            // 0 is nobody in here. While a kill is at work, the job may signal us.
            let from_engine = signal.ssi_pid == 0;
            let number = i32::try_from(signal.ssi_signo).unwrap_or_default();
            let forwarded = FORWARDED.into_iter().find(|known| *known as i32 == number);
            if let Some(signal) = forwarded.filter(|_| from_engine) {
                self.stopping |= signal == Signal::SIGTERM;
                // ESRCH: there is nobody to hear it.
                self.as_job(|| kill(Pid::from_raw(-1), signal).unwrap_or_default())?;
            }
        }
        while let Some(reaped) = sys::reap_one() {
            if self.worker.is(reaped.pid) {
                return Err(io::Error::other("the worker for files has ended"));
            }
            let Some(run) = self.running.values_mut().find(|run| run.pid == reaped.pid) else { continue };
            run.end(reaped.status, &self.counts)?;
        }
        Ok(())
    }

    /// Ends what runs when it has more terminals than a container may.
    fn count_terminals(&mut self) -> io::Result<()> {
        if self.running.is_empty() || self.terminals_counted.elapsed() < COUNT_PTYS {
            return Ok(());
        }
        self.terminals_counted = Instant::now();
        // All of them, and `ptmx`. Where there are none, none can be made.
        let open = std::fs::read_dir(TERMINALS).map_or(0, |listed| listed.take(PTYS + 2).count());
        if open > PTYS + 1 {
            // What does not end at once is counted again.
            self.as_job(processes::kill_all)?;
        }
        Ok(())
    }

    /// Tells of commands that have ended and have no more to say.
    fn finish(&mut self) -> io::Result<()> {
        if self.stopping {
            let over = self.running.values().all(|run| run.ended.is_some());
            return if over { Err(io::Error::other("the engine stopped the container")) } else { Ok(()) };
        }
        let now = Instant::now();
        let over = self.running.iter().filter_map(|(n, run)| {
            let (how, _) = run.ended.filter(|_| !run.leaves())?;
            let silent = run.stdout.pipe().is_none() && run.stderr.pipe().is_none();
            (silent || run.patience().is_some_and(|until| now >= until)).then_some((*n, how))
        });
        for (n, how) in over.collect::<Vec<_>>() {
            self.running.remove(&n);
            tell(n, &FromShim::Ended(how))?;
        }
        Ok(())
    }

    /// Sends what one stream of a run has to say now.
    fn output(
        &mut self,
        n: u32,
        stream: fn(&mut Running) -> &mut Output,
        wrap: fn(Vec<u8>) -> FromShim,
    ) -> io::Result<()> {
        let Some(run) = self.running.get_mut(&n) else { return Ok(()) };
        let (now, who) = (self.began.elapsed(), n.into());
        let most = self.pace.room(now, who).max(stream(run).free()).min(run.window.left());
        if most > 0
            && let Some(bytes) = stream(run).read(most)
        {
            self.pace.took(now, who, bytes.len());
            run.window.sent(bytes.len());
            return tell(n, &wrap(bytes));
        }
        Ok(())
    }

    fn feed(&mut self, n: u32) -> io::Result<()> {
        let left = self.running.get_mut(&n).and_then(|run| run.stdin.as_mut()).map_or(0, Outbox::write);
        if left == 0 {
            return Ok(());
        }
        tell(n, &FromShim::Took(u32::try_from(left).unwrap_or(u32::MAX)))
    }

    fn as_job<T>(&self, act: impl FnOnce() -> T) -> io::Result<T> {
        as_job(&self.hello, act)
    }
}

/// As the job's user, who may harm the job and nobody else: the worker is spared.
pub fn as_job<T>(hello: &Hello, act: impl FnOnce() -> T) -> io::Result<T> {
    let (uid, gid) = (Uid::from_raw(hello.uid), Gid::from_raw(hello.gid));
    let root = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, root.1)?;
    setresuid(uid, uid, root.0)?;
    let acted = act();
    setresuid(root.0, root.0, root.0)?;
    setresgid(root.1, root.1, root.1)?;
    Ok(acted)
}

/// Sends one frame to the node, which always reads.
pub fn tell(n: u32, message: &FromShim) -> io::Result<()> {
    let frame = wire::encode(n, message).map_err(io::Error::other)?;
    let mut stdout = io::stdout().lock();
    stdout.write_all(&frame).and_then(|()| stdout.flush())
}
