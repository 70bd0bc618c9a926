//! The shim's second process, for the job's files: reads, writes, unpacks and packs them with the job's own rights
//! over files, while the job can neither signal nor trace it. One run at a time, told and answered in `wire`'s frames.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use coinop_shim::beneath::{self, open_beneath, open_plain};
use coinop_shim::confine;
use coinop_shim::seccomp::StandIns;
use coinop_shim::sys;
use coinop_shim::tree::{self, Unpacked, Whose};
use coinop_shim::wire::{Decoder, Ended, FromShim, Message, PIECE_BYTES, Place, Run, ToShim, encode};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;
use nix::unistd::{ForkResult, Gid, Uid, fork, setfsgid, setfsuid};

use super::streams::{Outbox, Window};
use super::usage::Counts;

/// The shim's end of the worker.
pub struct Worker {
    pid: i32,
    to: Outbox,
    from: File,
}

impl Worker {
    pub fn start(uid: u32, gid: u32) -> io::Result<Worker> {
        let (orders, to) = io::pipe()?;
        let (from, answers) = io::pipe()?;
        // SAFETY: the shim has one thread only.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                let from = OwnedFd::from(from);
                Ok(Worker { pid: child.as_raw(), to: Outbox::new(to.into())?, from: from.into() })
            }
            ForkResult::Child => {
                let (orders, answers) = (OwnedFd::from(orders), OwnedFd::from(answers));
                let served = serve(orders, answers, uid, gid);
                sys::exit(served.is_err().into())
            }
        }
    }

    pub fn is(&self, pid: i32) -> bool {
        self.pid == pid
    }

    pub fn from(&self) -> BorrowedFd<'_> {
        self.from.as_fd()
    }

    pub fn wants(&self) -> Option<BorrowedFd<'_>> {
        self.to.wants()
    }

    pub fn order(&mut self, n: u32, order: &ToShim) -> io::Result<()> {
        self.to.push(&encode(n, order).map_err(io::Error::other)?);
        self.feed()
    }

    pub fn feed(&mut self) -> io::Result<()> {
        self.to.write();
        Ok(())
    }

    /// Its frames go to the node as they are, whole: other frames may come between them.
    pub fn pass_on(&mut self) -> io::Result<()> {
        let mut header = [0; coinop_shim::wire::HEADER_BYTES];
        self.from.read_exact(&mut header)?;
        let [.., l0, l1, l2, l3] = header;
        let mut frame = header.to_vec();
        let len = u64::from(u32::from_be_bytes([l0, l1, l2, l3]));
        (&self.from).take(len).read_to_end(&mut frame)?;
        let mut stdout = io::stdout().lock();
        stdout.write_all(&frame).and_then(|()| stdout.flush())
    }
}

/// The worker's whole life.
fn serve(orders: OwnedFd, answers: OwnedFd, uid: u32, gid: u32) -> io::Result<()> {
    let folder = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let workspace = open(c"/workspace", folder, Mode::empty())?;
    let job = open(c"/job", folder, Mode::empty())?;
    sys::close_all_but(&[orders.as_fd(), answers.as_fd(), workspace.as_fd(), job.as_fd()])?;
    confine::bar(StandIns::default())?;
    let (orders, answers, mut counts) = (orders.into(), answers.into(), Counts::open());
    let mut line = Line { orders, answers, decoder: Decoder::default(), n: 0, next: None };
    while let Some((n, order)) = line.next()? {
        // What is left of a run that was given up is skipped.
        let ToShim::Run(run) = order else { continue };
        counts.settle();
        line.n = n;
        let root = matches!(run, Run::Read { place: Place::Job, .. } | Run::Write { place: Place::Job, .. });
        take_rights(if root { (0, 0) } else { (uid, gid) })?;
        let top = if root { job.as_fd() } else { workspace.as_fd() };
        let ended = match act(&mut line, run, top) {
            Ok(()) => Ended { code: Some(0), ..Ended::default() },
            Err(why) => Ended { errno: Some(why.raw_os_error().unwrap_or(libc::EIO)), ..Ended::default() },
        };
        line.tell(&FromShim::Ended(ended))?;
    }
    Ok(())
}

/// Rights over files only: whose process this is stays as it was.
fn take_rights((uid, gid): (u32, u32)) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setfsuid(Uid::from_raw(0));
    setfsgid(gid);
    setfsuid(uid);
    // The calls cannot fail aloud; asking again tells what holds.
    if setfsgid(gid) == gid && setfsuid(uid) == uid { Ok(()) } else { Err(Errno::EPERM.into()) }
}

fn act(line: &mut Line, run: Run, top: BorrowedFd<'_>) -> io::Result<()> {
    match run {
        Run::Command { .. } => Err(Errno::EINVAL.into()),
        Run::Read { path, cap_bytes, .. } => {
            let Some((file, found)) = open_plain(top, Path::new(&path))? else {
                return Err(Errno::ELOOP.into());
            };
            if u64::try_from(found.st_size).unwrap_or_default() > cap_bytes {
                return Err(Errno::EFBIG.into());
            }
            let mut output = line.output();
            let copied = io::copy(&mut file.take(cap_bytes.saturating_add(1)), &mut output)?;
            output.flush()?;
            if copied > cap_bytes { Err(Errno::EFBIG.into()) } else { Ok(()) }
        }
        Run::Write { path, .. } => {
            let Some(mut file) = beneath::create(top, Path::new(&path))? else {
                return Err(Errno::ELOOP.into());
            };
            file.set_len(0)?;
            io::copy(&mut line.input(), &mut file).map(drop)
        }
        Run::Unpack => tree::unpack(&mut line.input(), top),
        Run::Pack => {
            let here = open_beneath(top, c".", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
            let mut output = line.output();
            match tree::pack(&mut output, here, Whose::Jobs) {
                Ok(()) => output.flush(),
                Err(Unpacked::Io(why)) => Err(why),
                Err(Unpacked::TooDeep(path)) => {
                    line.tell(&FromShim::Stderr(path))?;
                    Err(Errno::ENAMETOOLONG.into())
                }
            }
        }
    }
}

// === impl Line: frames from and to the shim ===

struct Line {
    orders: File,
    answers: File,
    decoder: Decoder,
    /// The run at work.
    n: u32,
    /// A run that came while another was at work: that one was given up.
    next: Option<(u32, ToShim)>,
}

impl Line {
    fn next(&mut self) -> io::Result<Option<(u32, ToShim)>> {
        if let Some(next) = self.next.take() {
            return Ok(Some(next));
        }
        loop {
            if let Some(order) = self.decoder.take::<ToShim>().map_err(io::Error::other)? {
                return Ok(Some(order));
            }
            let mut bytes = [0; PIECE_BYTES];
            let len = self.orders.read(&mut bytes)?;
            if len == 0 {
                return Ok(None);
            }
            self.decoder.push(bytes.get(..len).unwrap_or_default());
        }
    }

    /// The next order about the run at work; an error when it is given up.
    fn next_of_run(&mut self) -> io::Result<ToShim> {
        loop {
            match self.next()? {
                Some((n, ToShim::Kill)) if n == self.n => return Err(Errno::ECANCELED.into()),
                Some((n, order @ ToShim::Run(_))) => {
                    self.next = Some((n, order));
                    return Err(Errno::ECANCELED.into());
                }
                Some((n, order)) if n == self.n => return Ok(order),
                // Of a run that has ended already.
                Some(_) => {}
                None => return Err(Errno::EPIPE.into()),
            }
        }
    }

    fn tell(&mut self, message: &impl Message) -> io::Result<()> {
        self.answers.write_all(&encode(self.n, message).map_err(io::Error::other)?)
    }

    fn input(&mut self) -> Input<'_> {
        Input { line: self, bytes: Vec::new(), at: 0, ended: false }
    }

    fn output(&mut self) -> OutputTo<'_> {
        OutputTo { line: self, window: Window::new(), bytes: Vec::with_capacity(PIECE_BYTES) }
    }
}

/// The input of the run at work.
struct Input<'a> {
    line: &'a mut Line,
    bytes: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Read for Input<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.at == self.bytes.len() && !self.ended {
            match self.line.next_of_run()? {
                ToShim::Input(bytes) => {
                    self.line.tell(&FromShim::Took(u32::try_from(bytes.len()).unwrap_or(u32::MAX)))?;
                    (self.bytes, self.at) = (bytes, 0);
                }
                ToShim::EndInput => self.ended = true,
                _ => {}
            }
        }
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let len = rest.len().min(into.len());
        for (to, from) in into.iter_mut().zip(rest) {
            *to = *from;
        }
        self.at += len;
        Ok(len)
    }
}

/// The output of the run at work, in whole pieces; it waits while too much is on its way.
struct OutputTo<'a> {
    line: &'a mut Line,
    window: Window,
    bytes: Vec<u8>,
}

impl Write for OutputTo<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() == PIECE_BYTES {
            self.flush()?;
        }
        let len = bytes.len().min(PIECE_BYTES - self.bytes.len());
        self.bytes.extend_from_slice(bytes.get(..len).unwrap_or_default());
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.bytes.is_empty() {
            while self.window.left() == 0 {
                if let ToShim::Took(taken) = self.line.next_of_run()? {
                    self.window.took(taken);
                }
            }
            let rest = self.bytes.split_off(self.bytes.len().min(self.window.left()));
            let piece = std::mem::replace(&mut self.bytes, rest);
            self.window.sent(piece.len());
            self.line.tell(&FromShim::Stdout(piece))?;
        }
        Ok(())
    }
}
