//! The log as it lies on disk: its segment files, reading it from any point, and judging what stands at its
//! end. A half-written last group is a torn tail; anything else that does not read is damage and is named.
//! Writing is `tail.rs`'s, bytes are `frame.rs`'s.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::disk::{names, trouble};
use super::frame::{self, BadHead, HEADER_BYTES, Hash, SEGMENT_HEADER_BYTES};
use super::keys::Place;
use super::record::Record;
use super::rows::Entry;
use super::{Damage, Error};

const ENDING: &str = ".log";
/// A disk writes whole sectors; a sector that never arrived reads as zeros in our reserved space.
const SECTOR: u64 = 512;
/// Segment files a reader keeps open.
const OPEN_FILES: usize = 8;

/// Where a chain of frames has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Position {
    /// Seq of the last frame, 0 before the first.
    pub seq: u64,
    pub hash: Hash,
    /// Unix milliseconds of the last frame.
    pub at_ms: u64,
}

/// One good frame met on the way.
pub(super) struct Met<'a> {
    pub segment: u64,
    pub offset: u64,
    pub seq: u64,
    pub at_ms: u64,
    pub hash: Hash,
    pub body: &'a [u8],
}

/// What a scan found at the end of the log.
#[derive(Debug)]
pub(super) struct End {
    pub position: Position,
    /// First seq (= name) of the last segment; `None` when there is no segment.
    pub segment: Option<u64>,
    /// Bytes of the last segment that are good.
    pub offset: u64,
    /// Why what follows in the last segment is no frame, when it is a half-written group.
    pub torn: Option<&'static str>,
}

/// Path of the segment whose first frame is `first_seq`.
pub(super) fn segment_path(dir: &Path, first_seq: u64) -> PathBuf {
    dir.join(segment_name(first_seq))
}

pub(super) fn segment_name(first_seq: u64) -> String {
    format!("{first_seq:020}{ENDING}")
}

/// First seqs of the segments in `dir`, ascending.
pub(super) fn segments(dir: &Path) -> Result<Vec<u64>, Error> {
    let found = names(dir)?;
    Ok(found.iter().filter_map(|n| n.strip_suffix(ENDING)?.parse().ok()).collect())
}

/// Reads the log from its first frame, or only its last segment, checking every checksum and the chain.
/// `visit` sees each frame in order.
pub(super) fn scan(
    dir: &Path,
    only_last: bool,
    visit: &mut dyn FnMut(&Met) -> Result<(), Error>,
) -> Result<End, Error> {
    let all = segments(dir)?;
    let skipped = if only_last { all.len().saturating_sub(1) } else { 0 };
    let mut end = End { position: Position::default(), segment: None, offset: 0, torn: None };
    first_is_there(dir, &all)?;
    for (nth, &segment) in all.iter().enumerate().skip(skipped) {
        let before = (nth == 0 || nth > skipped).then_some(end.position);
        end = Segment::open(dir, segment, before)?.scan(nth + 1 == all.len(), visit)?;
    }
    Ok(end)
}

/// Reads all records of a frame, or says that this version cannot.
pub(super) fn records(dir: &Path, met: &Met) -> Result<Vec<Record>, Error> {
    frame::records(met.body).map_err(|e| Error::Unreadable {
        at: Damage::new(dir, met.segment, met.offset, met.seq, "unknown record"),
        why: e.to_string(),
    })
}

fn damage(dir: &Path, segment: u64, offset: u64, seq: u64, why: &'static str) -> Error {
    Error::Corrupt(Damage::new(dir, segment, offset, seq, why))
}

/// One segment being read from its beginning.
struct Segment<'a> {
    dir: &'a Path,
    first_seq: u64,
    path: PathBuf,
    file: BufReader<File>,
    bytes: u64,
    offset: u64,
    position: Position,
}

/// What stands where a frame should begin.
enum Next {
    Frame(frame::Header),
    /// Nothing but zeros up to the end of the file.
    Blank,
    /// A frame that did not reach the disk as a whole.
    Half(&'static str),
    Damaged(&'static str),
}

impl<'a> Segment<'a> {
    /// `before` is where the segments before it ended, when they were read.
    fn open(dir: &'a Path, first_seq: u64, before: Option<Position>) -> Result<Self, Error> {
        let path = segment_path(dir, first_seq);
        let file = File::open(&path).map_err(trouble("open", &path))?;
        let bytes = file.metadata().map_err(trouble("read", &path))?.len();
        let mut file = BufReader::with_capacity(256 * 1024, file);
        let mut head = Vec::with_capacity(SEGMENT_HEADER_BYTES);
        (&mut file)
            .take(SEGMENT_HEADER_BYTES as u64)
            .read_to_end(&mut head)
            .map_err(trouble("read", &path))?;
        let found = frame::read_segment_header(&head).map_err(|bad| match bad {
            BadHead::Damaged(why) => damage(dir, first_seq, 0, first_seq, why),
            BadHead::Newer => Error::Unreadable {
                at: Damage::new(dir, first_seq, 0, first_seq, "the segment has a newer format"),
                why: format!("version {} knows format 1 only", env!("CARGO_PKG_VERSION")),
            },
        })?;
        if found.first_seq != first_seq {
            return Err(damage(dir, first_seq, 0, first_seq, "the segment's name is not its first seq"));
        }
        let position = match before {
            Some(before) if before.seq + 1 != first_seq => {
                let why = "entries between the segment before and this one are missing";
                return Err(damage(dir, first_seq, 0, before.seq + 1, why));
            }
            Some(before) if before.hash != found.previous => {
                let why = "the segment does not continue the chain of the one before";
                return Err(damage(dir, first_seq, 0, first_seq, why));
            }
            Some(before) => before,
            None => Position { seq: first_seq.saturating_sub(1), hash: found.previous, at_ms: 0 },
        };
        Ok(Segment { dir, first_seq, path, file, bytes, offset: SEGMENT_HEADER_BYTES as u64, position })
    }

    fn scan(mut self, last: bool, visit: &mut dyn FnMut(&Met) -> Result<(), Error>) -> Result<End, Error> {
        let mut whole = Vec::new();
        let torn = loop {
            let seq = self.position.seq + 1;
            let (header, at) = match self.next(&mut whole)? {
                Next::Frame(header) => (header, self.offset),
                Next::Blank => break None,
                Next::Half(why) if last && !self.acknowledged_after(self.offset)? => break Some(why),
                Next::Half(why) | Next::Damaged(why) => {
                    return Err(damage(self.dir, self.first_seq, self.offset, seq, why));
                }
            };
            if header.seq != seq {
                return Err(damage(self.dir, self.first_seq, at, seq, "the frame carries another seq"));
            }
            if header.previous != self.position.hash {
                return Err(damage(
                    self.dir,
                    self.first_seq,
                    at,
                    seq,
                    "the frame does not continue the chain",
                ));
            }
            self.position = Position { seq, hash: frame::hash(&whole), at_ms: header.at_ms };
            self.offset += whole.len() as u64;
            visit(&Met {
                segment: self.first_seq,
                offset: at,
                seq,
                at_ms: header.at_ms,
                hash: self.position.hash,
                body: whole.get(HEADER_BYTES..).unwrap_or_default(),
            })?;
        };
        Ok(End { position: self.position, segment: Some(self.first_seq), offset: self.offset, torn })
    }

    /// Reads the frame at `offset` into `whole`.
    fn next(&mut self, whole: &mut Vec<u8>) -> Result<Next, Error> {
        whole.clear();
        self.fill(whole, HEADER_BYTES)?;
        let header = match frame::header(whole) {
            Ok(header) => header,
            Err(why) => return self.judge_header(whole, why),
        };
        self.fill(whole, header.length as usize)?;
        let body = whole.get(HEADER_BYTES..).unwrap_or_default();
        if body.len() < header.length as usize {
            return Ok(Next::Half("the file ends inside a frame"));
        }
        if frame::body_matches(&header, body) {
            return Ok(Next::Frame(header));
        }
        // A body is JSON and holds no zero byte: zeros are what never arrived.
        let at = self.offset + HEADER_BYTES as u64;
        if body.last() == Some(&0) || has_blank_sector(at, body) {
            return Ok(Next::Half("part of the frame was never written"));
        }
        Ok(Next::Damaged("checksum of the frame's body does not match"))
    }

    fn judge_header(&mut self, head: &[u8], why: &'static str) -> Result<Next, Error> {
        let rest_is_blank = self.rest_is_blank(self.offset + head.len() as u64)?;
        if head.iter().all(|b| *b == 0) {
            return Ok(if rest_is_blank {
                Next::Blank
            } else {
                Next::Half("a frame's header was never written")
            });
        }
        if head.len() < HEADER_BYTES {
            return Ok(Next::Half("the file ends inside a frame's header"));
        }
        if rest_is_blank || has_blank_sector(self.offset, head) {
            return Ok(Next::Half("part of a frame's header was never written"));
        }
        Ok(Next::Damaged(why))
    }

    fn fill(&mut self, whole: &mut Vec<u8>, bytes: usize) -> Result<(), Error> {
        (&mut self.file).take(bytes as u64).read_to_end(whole).map_err(trouble("read", &self.path))?;
        Ok(())
    }

    fn rest_is_blank(&self, from: u64) -> Result<bool, Error> {
        let mut at = from;
        let mut chunk = vec![0; 64 * 1024];
        loop {
            let read = self.file.get_ref().read_at(&mut chunk, at).map_err(trouble("read", &self.path))?;
            match chunk.get(..read) {
                Some(bytes) if !bytes.is_empty() => {
                    if bytes.iter().any(|b| *b != 0) {
                        return Ok(false);
                    }
                }
                _ => return Ok(true),
            }
            at += read as u64;
        }
    }

    /// True when a good frame stands after `bad` whose group began after `bad`: the group that `bad` belongs
    /// to had then been synced and acknowledged, so `bad` is damage and no torn tail.
    fn acknowledged_after(&self, bad: u64) -> Result<bool, Error> {
        let file = self.file.get_ref();
        let mut window = vec![0; 1024 * 1024];
        let mut at = bad + 1;
        while at < self.bytes {
            let read = file.read_at(&mut window, at).map_err(trouble("read", &self.path))?;
            let bytes = window.get(..read).unwrap_or_default();
            for (nth, _) in bytes.windows(frame::MAGIC.len()).enumerate().filter(|(_, w)| *w == frame::MAGIC)
            {
                let offset = at + nth as u64;
                if let Some(header) = read_frame(file, offset).map_err(trouble("read", &self.path))?
                    && offset.saturating_sub(u64::from(header.0.back)) > bad
                {
                    return Ok(true);
                }
            }
            // The windows overlap so that a magic across the border is seen.
            match (read as u64).checked_sub(frame::MAGIC.len() as u64 - 1) {
                Some(step) if step > 0 => at += step,
                _ => break,
            }
        }
        Ok(false)
    }
}

/// The hash that the frame with this seq carries of the one before it; `None` when there is no such frame.
pub(super) fn hash_before(dir: &Path, seq: u64) -> Result<Option<Hash>, Error> {
    let Some(first) = segments(dir)?.into_iter().rfind(|first| *first <= seq) else { return Ok(None) };
    let mut segment = Segment::open(dir, first, None)?;
    let mut whole = Vec::new();
    while let Next::Frame(header) = segment.next(&mut whole)? {
        if header.seq == seq {
            return Ok(Some(header.previous));
        }
        segment.offset += whole.len() as u64;
    }
    Ok(None)
}

/// Frames in order, each with its checksums, the chain left to `scan`; of the segments that have something of a span of
/// time, and of the last. Ends before what is not whole there: another process may be writing it.
pub(super) struct Walk<'a> {
    dir: &'a Path,
    /// Those that are still to be read, each with the one behind it in the log.
    left: std::vec::IntoIter<(u64, Option<u64>)>,
    segment: Segment<'a>,
    /// The segment behind this one.
    following: Option<u64>,
    whole: Vec<u8>,
}

impl<'a> Walk<'a> {
    /// `None` when there is no log.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where a segment is missing.
    pub(super) fn between(dir: &'a Path, from_ms: u64, to_ms: u64) -> Result<Option<Self>, Error> {
        let all = segments(dir)?;
        first_is_there(dir, &all)?;
        let mut left = Vec::new();
        for (nth, &first) in all.iter().enumerate() {
            let following = all.get(nth + 1).copied();
            let counts = match following {
                Some(next) => has_some_of(dir, first, next, from_ms, to_ms)?,
                None => true,
            };
            if counts {
                left.push((first, following));
            }
        }
        let mut left = left.into_iter();
        let Some((first, following)) = left.next() else { return Ok(None) };
        let segment = Segment::open(dir, first, None)?;
        Ok(Some(Walk { dir, left, segment, following, whole: Vec::new() }))
    }

    /// The number of the last frame that was read, or of the one before the segment that is being read.
    pub(super) fn seq(&self) -> u64 {
        self.segment.position.seq
    }

    /// The hash is told of a frame that is promised, else it is zero: it costs more than all the rest.
    pub(super) fn next(&mut self, promised: u64) -> Result<Option<Met<'_>>, Error> {
        let header = loop {
            let (segment, at) = (self.segment.first_seq, self.segment.offset);
            let seq = self.segment.position.seq + 1;
            match (self.segment.next(&mut self.whole)?, self.following) {
                (Next::Frame(header), _) if header.seq == seq => break header,
                (Next::Frame(_), _) => {
                    return Err(damage(self.dir, segment, at, seq, "the frame carries another seq"));
                }
                (Next::Damaged(why), _) | (Next::Half(why), Some(_)) => {
                    return Err(damage(self.dir, segment, at, seq, why));
                }
                (Next::Blank | Next::Half(_), None) => return Ok(None),
                (Next::Blank, Some(next)) => {
                    follows(self.dir, self.segment.position.seq, next)?;
                    let Some((first, following)) = self.left.next() else { return Ok(None) };
                    self.segment = Segment::open(self.dir, first, None)?;
                    self.following = following;
                }
            }
        };
        let offset = self.segment.offset;
        self.segment.offset += self.whole.len() as u64;
        self.segment.position.seq = header.seq;
        let hash = if header.seq == promised { frame::hash(&self.whole) } else { Hash::default() };
        Ok(Some(Met {
            segment: self.segment.first_seq,
            offset,
            seq: header.seq,
            at_ms: header.at_ms,
            hash,
            body: self.whole.get(HEADER_BYTES..).unwrap_or_default(),
        }))
    }
}

/// Whether a segment that `next` follows has frames of this span. The times of one segment never go back; from one to the
/// next they may, where a clock was set right.
fn has_some_of(dir: &Path, first: u64, next: u64, from_ms: u64, to_ms: u64) -> Result<bool, Error> {
    let (Some(begins_ms), Some(last)) = (begins_ms(dir, first)?, last_frame(dir, first)?) else {
        return Ok(true);
    };
    follows(dir, last.seq, next)?;
    Ok(last.at_ms >= from_ms && begins_ms < to_ms)
}

fn first_is_there(dir: &Path, all: &[u64]) -> Result<(), Error> {
    match all.first() {
        Some(&first) if first != 1 => {
            Err(damage(dir, first, 0, 1, "the first segment of the log is missing"))
        }
        _ => Ok(()),
    }
}

/// Whether the segment `next` begins behind the entry `last`.
fn follows(dir: &Path, last: u64, next: u64) -> Result<(), Error> {
    if next == last + 1 {
        return Ok(());
    }
    Err(damage(dir, next, 0, last + 1, "entries between the segment before and this one are missing"))
}

/// Unix milliseconds of a segment's first frame.
fn begins_ms(dir: &Path, first_seq: u64) -> Result<Option<u64>, Error> {
    let mut segment = Segment::open(dir, first_seq, None)?;
    let mut head = Vec::with_capacity(HEADER_BYTES);
    segment.fill(&mut head, HEADER_BYTES)?;
    Ok(frame::header(&head).ok().map(|header| header.at_ms))
}

/// The header of the frame with which a segment ends, found from its end; `None` when none is found in the last bytes.
fn last_frame(dir: &Path, first_seq: u64) -> Result<Option<frame::Header>, Error> {
    const NEAR_END: u64 = 64 * 1024;
    let path = segment_path(dir, first_seq);
    let file = File::open(&path).map_err(trouble("open", &path))?;
    let bytes = file.metadata().map_err(trouble("read", &path))?.len();
    let from = bytes.saturating_sub(NEAR_END);
    let mut window = vec![0; usize::try_from(bytes - from).unwrap_or_default()];
    file.read_exact_at(&mut window, from).map_err(trouble("read", &path))?;
    let ends_here = |at: usize| {
        let header = frame::header(window.get(at..)?).ok()?;
        let body = window.get(at + HEADER_BYTES..)?;
        frame::body_matches(&header, body).then_some(header)
    };
    Ok(memchr::memmem::rfind_iter(&window, &frame::MAGIC).find_map(ends_here))
}

/// True when the part of `bytes` (which begin at `offset` of the file) inside some sector is all zero.
fn has_blank_sector(offset: u64, bytes: &[u8]) -> bool {
    let first = (SECTOR - offset % SECTOR) as usize;
    let (head, rest) = bytes.split_at(first.min(bytes.len()));
    std::iter::once(head).chain(rest.chunks(SECTOR as usize)).any(|part| part.iter().all(|b| *b == 0))
}

/// The frame at `offset` with its body, or `None` when none reads there.
fn read_frame(file: &File, offset: u64) -> std::io::Result<Option<(frame::Header, Vec<u8>)>> {
    let mut head = [0; HEADER_BYTES];
    match file.read_exact_at(&mut head, offset) {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let Ok(header) = frame::header(&head) else { return Ok(None) };
    let mut body = vec![0; header.length as usize];
    match file.read_exact_at(&mut body, offset + HEADER_BYTES as u64) {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    Ok(frame::body_matches(&header, &body).then_some((header, body)))
}

/// Reads single frames by their place, for the index.
pub(super) struct Reader {
    dir: PathBuf,
    files: Mutex<BTreeMap<u64, Arc<File>>>,
}

impl Reader {
    pub(super) fn new(dir: &Path) -> Self {
        Reader { dir: dir.to_path_buf(), files: Mutex::default() }
    }

    /// The record at a place that the index knows, with its batch's seq and time.
    pub(super) fn record(&self, place: &Place) -> Result<Entry, Error> {
        let (segment, offset) = (place.segment, u64::from(place.offset));
        let path = segment_path(&self.dir, segment);
        let file = self.file(segment, &path)?;
        let found = read_frame(&file, offset).map_err(trouble("read", &path))?;
        let Some((header, body)) = found else {
            return Err(damage(
                &self.dir,
                segment,
                offset,
                0,
                "the index points at a frame that does not read",
            ));
        };
        let met =
            Met { segment, offset, seq: header.seq, at_ms: header.at_ms, hash: Hash::default(), body: &body };
        let record = records(&self.dir, &met)?.into_iter().nth(usize::from(place.nth));
        let record = record.ok_or_else(|| Error::Index { why: format!("no record at {place:?}") })?;
        Ok(Entry { seq: header.seq, at_ms: header.at_ms, record })
    }

    fn file(&self, segment: u64, path: &Path) -> Result<Arc<File>, Error> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = files.get(&segment) {
            return Ok(file.clone());
        }
        let file = Arc::new(File::open(path).map_err(trouble("open", path))?);
        while files.len() >= OPEN_FILES {
            files.pop_first();
        }
        files.insert(segment, file.clone());
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::has_blank_sector;

    #[test]
    fn a_blank_sector_is_seen_at_the_borders_and_inside_only() {
        let mut bytes = vec![1u8; 1200];
        assert!(!has_blank_sector(500, &bytes));
        bytes[100..200].fill(0);
        assert!(!has_blank_sector(500, &bytes), "zeros that do not fill a sector are no lost sector");
        bytes[..12].fill(0);
        assert!(has_blank_sector(500, &bytes), "the 12 bytes before the border are a whole part");
        let mut bytes = vec![1u8; 1200];
        bytes[12..524].fill(0);
        assert!(has_blank_sector(500, &bytes));
    }
}
