//! The writing end of the log: puts a group of batches behind the last frame with one write and one sync,
//! starts new segments, and cuts a torn tail. Who waits for it is `writer.rs`'s.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::Error;
use super::disk::{self, trouble};
use super::frame::{self, SEGMENT_HEADER_BYTES, SegmentHeader};
use super::log::{End, Position, segment_path};
use crate::clock::AHEAD_MS;

/// Zeros written ahead of the log. Inside them a group changes no file size, so its sync costs the disk one
/// write instead of a journal commit as well.
const RESERVE_BYTES: u64 = 1024 * 1024;

/// The index counts a segment's bytes in 32 bits.
const SEGMENT_MAX_BYTES: u64 = 1024 * 1024 * 1024;

/// Where a batch came to stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placed {
    pub seq: u64,
    pub at_ms: u64,
    pub segment: u64,
    pub offset: u64,
}

pub(super) struct Tail {
    dir: PathBuf,
    file: File,
    path: PathBuf,
    segment: u64,
    /// Bytes of the segment that are frames.
    end: u64,
    /// Bytes of the segment that are allocated, ≥ `end`.
    reserved: u64,
    segment_bytes: u64,
    position: Position,
    buffer: Vec<u8>,
}

impl Tail {
    /// Goes on behind `end`; what stands after it in the last segment is cut off, durably.
    pub(super) fn open(dir: &Path, end: &End, segment_bytes: u64) -> Result<Self, Error> {
        let Some(segment) = end.segment else {
            let position = Position::default();
            let (file, path) = new_segment(dir, &position)?;
            return Ok(Self::over(dir, file, path, 1, SEGMENT_HEADER_BYTES as u64, segment_bytes, position));
        };
        let path = segment_path(dir, segment);
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(trouble("open", &path))?;
        let bytes = file.metadata().map_err(trouble("read", &path))?.len();
        if bytes > end.offset {
            if let Some(why) = end.torn {
                tracing::warn!(
                    segment = %path.display(), offset = end.offset, bytes = bytes - end.offset, why,
                    "cut off a half-written group at the end of the log; nothing in it was acknowledged"
                );
            }
            file.set_len(end.offset).and_then(|()| file.sync_all()).map_err(trouble("cut", &path))?;
        }
        Ok(Self::over(dir, file, path, segment, end.offset, segment_bytes, end.position))
    }

    fn over(
        dir: &Path,
        file: File,
        path: PathBuf,
        segment: u64,
        end: u64,
        segment_bytes: u64,
        position: Position,
    ) -> Self {
        let dir = dir.to_path_buf();
        Tail { dir, file, path, segment, end, reserved: end, segment_bytes, position, buffer: Vec::new() }
    }

    pub(super) fn position(&self) -> Position {
        self.position
    }

    /// Segment and offset behind the last frame.
    pub(super) fn place(&self) -> (u64, u64) {
        (self.segment, self.end)
    }

    /// Writes one frame a body, all with the time `now_ms`, and syncs once. A clock that was set back a little does not
    /// count; after more than that a new segment begins, so that the times of one never go back. On an error nothing of the group counts, and the caller must not write again.
    pub(super) fn write<'a>(
        &mut self,
        now_ms: u64,
        bodies: impl Iterator<Item = &'a [u8]>,
    ) -> Result<Vec<Placed>, Error> {
        let set_back = self.position.at_ms > now_ms.saturating_add(AHEAD_MS);
        if self.end >= self.segment_bytes.min(SEGMENT_MAX_BYTES)
            || (set_back && self.end > SEGMENT_HEADER_BYTES as u64)
        {
            self.roll()?;
        }
        let mut position = self.position;
        let at_ms = if set_back { now_ms } else { now_ms.max(position.at_ms) };
        let mut placed = Vec::new();
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        for body in bodies {
            let back = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
            let seq = position.seq + 1;
            placed.push(Placed { seq, at_ms, segment: self.segment, offset: self.end + buffer.len() as u64 });
            let hash = frame::encode(&mut buffer, seq, at_ms, back, &position.hash, body);
            position = Position { seq, hash, at_ms };
        }
        let written = self.put(&buffer);
        let bytes = buffer.len() as u64;
        // One large group must not hold its memory for ever.
        buffer.shrink_to(64 * 1024);
        self.buffer = buffer;
        if let Err(e) = written {
            self.take_back();
            return Err(e);
        }
        self.end += bytes;
        self.position = position;
        Ok(placed)
    }

    /// Gives back the reserved space. The log is complete without it.
    pub(super) fn finish(&mut self) -> Result<(), Error> {
        self.file
            .set_len(self.end)
            .and_then(|()| self.file.sync_all())
            .map_err(trouble("finish", &self.path))?;
        self.reserved = self.end;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let end = self.end + bytes.len() as u64;
        if end > self.reserved {
            self.reserve(end);
        }
        self.file.write_all_at(bytes, self.end).map_err(trouble("append to", &self.path))?;
        self.file.sync_data().map_err(trouble("sync", &self.path))?;
        self.reserved = self.reserved.max(end);
        Ok(())
    }

    /// Tries to write zeros ahead. Without them the log is slower and as safe, so a full disk is no error
    /// yet: the group itself may still fit.
    fn reserve(&mut self, end: u64) {
        let from = self.reserved;
        let to = end + RESERVE_BYTES;
        let zeros = vec![0; 64 * 1024];
        let mut at = from;
        while at < to {
            let step = (to - at).min(zeros.len() as u64);
            if let Err(e) = self.file.write_all_at(zeros.get(..step as usize).unwrap_or(&zeros), at) {
                tracing::debug!(error = %e, "no space written ahead of the log");
                if let Err(e) = self.file.set_len(from.max(self.end)) {
                    tracing::debug!(error = %e, "the space written ahead was not given back");
                }
                return;
            }
            at += step;
        }
        self.reserved = to;
    }

    /// After a failed write: nothing of the group should be found by the next start. If this fails, too, the
    /// next start sees either a torn tail or a group that was complete but not acknowledged.
    fn take_back(&mut self) {
        if let Err(e) = self.file.set_len(self.end).and_then(|()| self.file.sync_all()) {
            tracing::warn!(segment = %self.path.display(), error = %e, "a failed write was not taken back");
        }
    }

    fn roll(&mut self) -> Result<(), Error> {
        self.finish()?;
        let (file, path) = new_segment(&self.dir, &self.position)?;
        self.file = file;
        self.path = path;
        self.segment = self.position.seq + 1;
        self.end = SEGMENT_HEADER_BYTES as u64;
        self.reserved = self.end;
        Ok(())
    }
}

/// A segment appears with its header already durable, so a bad header is never a torn one.
fn new_segment(dir: &Path, after: &Position) -> Result<(File, PathBuf), Error> {
    let first_seq = after.seq + 1;
    let path = segment_path(dir, first_seq);
    disk::write_whole(&path, &frame::segment_header(&SegmentHeader { first_seq, previous: after.hash }))?;
    let file = OpenOptions::new().read(true).write(true).open(&path).map_err(trouble("open", &path))?;
    Ok((file, path))
}
