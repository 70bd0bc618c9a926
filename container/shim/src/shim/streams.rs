//! The two directions of a run: bytes that wait to be written where the reader may be slow, and an output of which only
//! so much may be on its way to the node.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coinop_shim::sys;
use coinop_shim::wire::{FRAME_COST, PIECE_BYTES, WINDOW_BYTES, cost};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

pub fn never_block(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    Ok(fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)?)
}

/// Bytes on their way into a pipe; the node's window bounds them.
pub struct Outbox {
    pipe: Option<File>,
    waiting: VecDeque<u8>,
    ends: bool,
}

impl Outbox {
    pub fn new(pipe: OwnedFd) -> io::Result<Outbox> {
        never_block(pipe.as_fd())?;
        Ok(Outbox { pipe: Some(pipe.into()), waiting: VecDeque::new(), ends: false })
    }

    /// The pipe, while there is something to write into it.
    pub fn wants(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().filter(|_| !self.waiting.is_empty()).map(AsFd::as_fd)
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.waiting.extend(bytes);
    }

    /// After what waits, the pipe is closed.
    pub fn end(&mut self) {
        self.ends = true;
        self.close_if_done();
    }

    /// Writes what the pipe takes; how many bytes have left, those included that nobody will ever read.
    pub fn write(&mut self) -> usize {
        let Some(pipe) = &mut self.pipe else {
            let lost = self.waiting.len();
            self.waiting.clear();
            return lost;
        };
        let (front, _) = self.waiting.as_slices();
        let left = match pipe.write(front) {
            Ok(written) => {
                self.waiting.drain(..written);
                written
            }
            Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
            Err(_) => {
                self.pipe = None;
                return self.write();
            }
        };
        self.close_if_done();
        left
    }

    fn close_if_done(&mut self) {
        if self.ends && self.waiting.is_empty() {
            self.pipe = None;
        }
    }
}

/// What a command prints on one of its streams.
pub struct Output {
    pipe: Option<File>,
    /// Bytes that the command itself had printed and left in the pipe when it ended.
    owed: usize,
    /// Bytes that may be taken whatever the pace.
    free: usize,
}

impl Output {
    pub fn new(pipe: OwnedFd) -> io::Result<Output> {
        never_block(pipe.as_fd())?;
        Ok(Output { pipe: Some(pipe.into()), owed: 0, free: 0 })
    }

    pub fn pipe(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// The command has ended: what others print from now on may be lost, what waits here may not.
    pub fn owe(&mut self) {
        self.owed = self.pipe().map_or(0, sys::waiting_bytes);
        // One more, to see that nothing follows.
        self.free = self.owed + 1;
    }

    /// Bytes that may be taken now, also of a run that was too fast: its end does not wait for what it has printed.
    pub fn free(&self) -> usize {
        self.free
    }

    pub fn owes(&self) -> bool {
        self.pipe.is_some() && self.owed > 0
    }

    /// The next bytes, at most so many; none when there are none now or the stream has ended.
    pub fn read(&mut self, most: usize) -> Option<Vec<u8>> {
        let pipe = self.pipe.as_mut()?;
        let mut bytes = vec![0; most.min(PIECE_BYTES)];
        match pipe.read(&mut bytes) {
            Ok(0) => self.pipe = None,
            Ok(len) => {
                bytes.truncate(len);
                self.owed = self.owed.saturating_sub(len);
                self.free = self.free.saturating_sub(len);
                return Some(bytes);
            }
            Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.pipe = None,
        }
        None
    }
}

/// How much of a run's output may still be sent before the node has taken some.
pub struct Window(usize);

impl Window {
    pub fn new() -> Window {
        Window(WINDOW_BYTES)
    }

    /// Bytes that the next frame may have.
    pub fn left(&self) -> usize {
        self.0.saturating_sub(FRAME_COST)
    }

    pub fn sent(&mut self, bytes: usize) {
        self.0 = self.0.saturating_sub(cost(bytes));
    }

    pub fn took(&mut self, taken: u32) {
        self.0 = self.0.saturating_add(taken as usize).min(WINDOW_BYTES);
    }
}
