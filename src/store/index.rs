//! The life of the index: opened when its CLEAN marker says it was put away in order and matches the log,
//! thrown away and made again from the log in every other case. What records do to it is `apply.rs`'s.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel, sync_channel};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::apply::{self, INDEX_VERSION};
use super::disk::{self, trouble};
use super::frame::Hash;
use super::gather::Gather;
use super::log::{self, End, Position};
use super::overlay::{Overlay, SEEN_LINES};
use super::packed::Packed;
use super::record::Record;
use super::seen::Seen;
use super::shelf::{Shelf, Sled, Slots, Tree};
use super::tail::Placed;
use super::{Damage, Error};

const MARKER: &str = "CLEAN";
/// What [`MARKER`] was before the start that is in force: how far the log was durable then. It vouches for no index.
const PROMISE: &str = "PROMISE";
const SEEN: &str = "seen";
/// More than a filter in which every line has something.
const SEEN_MOST_BYTES: u64 = 4 << 20;
const APPLIED: &[u8] = b"applied";
/// After a rebuild of so many frames the database is opened afresh: sled keeps what it has touched in memory.
const REOPEN_AFTER_FRAMES: u64 = 20_000;
/// Frames that are handed to the applier together, and how often so many may wait for it.
const HANDED_OVER: usize = 128;
const READ_AHEAD: usize = 8;

/// Written last at an orderly stop, renamed first at a start. While it stands, the index is whole and durable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Clean {
    version: u32,
    seq: u64,
    hash: String,
    /// Folder of the index inside the index folder.
    generation: String,
}

/// The index folder and the database that is in use.
pub(super) struct Index {
    dir: PathBuf,
    generation: String,
    shelf: Box<dyn Shelf>,
    seen: Arc<Seen>,
}

/// What opening found out.
pub(super) struct Opened {
    pub index: Index,
    pub end: End,
    /// True when the index was made again from the log.
    pub rebuilt: bool,
}

/// Opens or rebuilds the index of the log in `log_dir`, reading the log as far as needed.
///
/// # Errors
/// Damage in the log, a log that is shorter than the marker promises, and a disk that does not take the index.
pub(super) fn open(
    dir: &Path,
    log_dir: &Path,
    cache_bytes: u64,
    patience: Duration,
) -> Result<Opened, Error> {
    disk::make_dir(dir)?;
    let clean = read_marker(dir, MARKER)?;
    let promise = promise(dir)?;
    if let Some(clean) = &clean {
        let end = log::scan(log_dir, true, &mut |_| Ok(()))?;
        check_end(log_dir, promise.as_ref(), &end.position)?;
        // From here on the index may change, and a crash must not leave a marker that vouches for it. What it says of
        // the log goes on to hold.
        let marker = dir.join(MARKER);
        fs::rename(&marker, dir.join(PROMISE)).map_err(trouble("rename", &marker))?;
        disk::sync_dir(dir)?;
        if clean.seq == end.position.seq && clean.version == INDEX_VERSION {
            let generation = clean.generation.clone();
            let opened = read_seen(dir, clean).and_then(|seen| {
                let path = dir.join(&generation);
                Ok((open_watched(&path, cache_bytes, patience, Some(end.position))?, seen))
            });
            match opened {
                Ok((shelf, seen)) => {
                    sweep(dir, &generation)?;
                    let index = Index::new(dir, generation, shelf, seen);
                    return Ok(Opened { index, end, rebuilt: false });
                }
                Err(e) => {
                    tracing::warn!(error = %e, "the index does not open; it is made again from the log")
                }
            }
        }
    }
    let (index, end) = rebuild(dir, log_dir, cache_bytes, patience, promise.as_ref())?;
    check_end(log_dir, promise.as_ref(), &end.position)?;
    Ok(Opened { index, end, rebuilt: true })
}

/// How far a log was durable once: whoever reads the log holds it against this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Promise {
    pub(super) seq: u64,
    /// Lower-case hex.
    hash: String,
}

impl Promise {
    pub(super) fn of(position: &Position) -> Promise {
        Promise { seq: position.seq, hash: hex::encode(position.hash) }
    }

    /// An entry of this number must be the one that was here.
    pub(super) fn check(&self, log_dir: &Path, seq: u64, hash: &Hash) -> Result<(), Error> {
        if seq == self.seq && hex::encode(hash) != self.hash { Err(rewritten(log_dir, seq)) } else { Ok(()) }
    }
}

/// What the index folder `dir` promises about the log beside it; `None` where nothing was ever put away.
pub(super) fn promise(dir: &Path) -> Result<Option<Promise>, Error> {
    let marker = match read_marker(dir, MARKER)? {
        Some(clean) => Some(clean),
        None => read_marker(dir, PROMISE)?,
    };
    Ok(marker.map(|clean| Promise { seq: clean.seq, hash: clean.hash }))
}

/// Writes a promise into the index folder of a copy, which has no index yet.
pub(super) fn promise_in(dir: &Path, promise: &Promise) -> Result<(), Error> {
    disk::make_dir(dir)?;
    let Promise { seq, hash } = promise.clone();
    // The generation is of no meaning here.
    let clean = Clean { version: INDEX_VERSION, seq, hash, generation: "0".into() };
    let bytes = serde_json::to_vec(&clean).map_err(|e| Error::Index { why: e.to_string() })?;
    disk::write_whole(&dir.join(PROMISE), &bytes)
}

/// Whether a log that ends here is as long as was promised, with the entry that was promised where it is the last.
pub(super) fn check_end(log_dir: &Path, promise: Option<&Promise>, end: &Position) -> Result<(), Error> {
    check_length(log_dir, promise, end.seq)?;
    promise.map_or(Ok(()), |promise| promise.check(log_dir, end.seq, &end.hash))
}

/// Whether a log that ends with the entry `found` is as long as was promised.
pub(super) fn check_length(log_dir: &Path, promise: Option<&Promise>, found: u64) -> Result<(), Error> {
    match promise {
        Some(Promise { seq: promised, .. }) if found < *promised => {
            Err(Error::Shortened { dir: log_dir.to_path_buf(), promised: *promised, found })
        }
        _ => Ok(()),
    }
}

impl Index {
    fn new(dir: &Path, generation: String, below: Box<dyn Shelf>, seen: Seen) -> Index {
        let seen = Arc::new(seen);
        let shelf = Box::new(Overlay::new(below, Arc::clone(&seen)));
        Index { dir: dir.to_path_buf(), generation, shelf, seen }
    }

    pub(super) fn shelf(&self) -> &dyn Shelf {
        self.shelf.as_ref()
    }

    /// Puts the index away so that the next start need not rebuild it: everything to disk and synced, then
    /// the marker.
    pub(super) fn close(self, position: &Position) -> Result<(), Error> {
        put_applied(self.shelf.as_ref(), position)?;
        self.shelf.flush()?;
        let clean = Clean {
            version: INDEX_VERSION,
            seq: position.seq,
            hash: hex::encode(position.hash),
            generation: self.generation.clone(),
        };
        // sled writes once more when it is dropped; only what is on disk after that is worth a marker.
        drop(self.shelf);
        disk::sync_tree(&self.dir.join(&self.generation))?;
        write_seen(&self.dir, &clean, &self.seen)?;
        let bytes = serde_json::to_vec(&clean).map_err(|e| Error::Index { why: e.to_string() })?;
        disk::write_whole(&self.dir.join(MARKER), &bytes)
    }
}

/// Which transfers may be in the database of a generation stands beside it: how many batches that is of and a checksum,
/// 12 bytes, then the filter. A bit that is lost would make a transfer new that is not.
fn seen_path(dir: &Path, generation: &str) -> PathBuf {
    dir.join(format!("{generation}.{SEEN}"))
}

fn write_seen(dir: &Path, clean: &Clean, seen: &Seen) -> Result<(), Error> {
    let bytes = seen.to_bytes();
    let head = [clean.seq.to_le_bytes().as_slice(), &crc32fast::hash(&bytes).to_le_bytes()].concat();
    disk::write_whole(&seen_path(dir, &clean.generation), &[head, bytes].concat())
}

fn read_seen(dir: &Path, clean: &Clean) -> Result<Seen, Error> {
    let bytes = disk::read_small(&seen_path(dir, &clean.generation), SEEN_MOST_BYTES)?.unwrap_or_default();
    let (head, bytes) = bytes.split_at_checked(12).unwrap_or_default();
    let wanted = [clean.seq.to_le_bytes().as_slice(), &crc32fast::hash(bytes).to_le_bytes()].concat();
    let seen = Some(bytes).filter(|_| head == wanted).and_then(|bytes| Seen::read(bytes, SEEN_LINES));
    seen.ok_or_else(|| Error::Index { why: "its list of transfers that were made is damaged".into() })
}

/// Removes what indexes that were given up have left, and what is out of date from now on.
fn sweep(dir: &Path, keep: &str) -> Result<(), Error> {
    for name in disk::names(dir)? {
        if name != keep && name != PROMISE {
            let path = dir.join(&name);
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(trouble("remove", &path))?;
        }
    }
    Ok(())
}

fn read_marker(dir: &Path, name: &str) -> Result<Option<Clean>, Error> {
    let Some(bytes) = disk::read_small(&dir.join(name), 4096)? else { return Ok(None) };
    match serde_json::from_slice::<Clean>(&bytes) {
        // The name becomes a path: only what we make ourselves passes.
        Ok(clean) if clean.generation.bytes().all(|b| b.is_ascii_digit()) && !clean.generation.is_empty() => {
            Ok(Some(clean))
        }
        _ => {
            tracing::warn!("the index's marker does not read; the index is made again from the log");
            Ok(None)
        }
    }
}

fn rewritten(log_dir: &Path, seq: u64) -> Error {
    let segment = log::segments(log_dir).ok().and_then(|s| s.into_iter().rfind(|first| *first <= seq));
    let why = "the entry is not the one that was here at the last orderly stop";
    Error::Corrupt(Damage::new(log_dir, segment.unwrap_or(1), 0, seq, why))
}

fn rebuild(
    dir: &Path,
    log_dir: &Path,
    cache_bytes: u64,
    patience: Duration,
    promise: Option<&Promise>,
) -> Result<(Index, End), Error> {
    // A new folder each time: a thread that hangs in the old database cannot disturb the new one.
    let newest = disk::names(dir)?.iter().filter_map(|n| n.parse::<u64>().ok()).max();
    let generation = newest.map_or(1, |n| n.saturating_add(1)).to_string();
    let path = dir.join(&generation);
    let mut shelf = open_watched(&path, cache_bytes, patience, None)?;
    sweep(dir, &generation)?;
    let (end, frames, seen) = take_in_all(log_dir, shelf.as_ref(), promise)?;
    if frames > REOPEN_AFTER_FRAMES {
        put_applied(shelf.as_ref(), &end.position)?;
        shelf.flush()?;
        drop(shelf);
        shelf = open_watched(&path, cache_bytes, patience, Some(end.position))?;
    }
    disk::sync_dir(dir)?;
    give_back();
    Ok((Index::new(dir, generation, shelf, seen), end))
}

/// Hands the memory that a rebuild had back to the system: a node holds a tenth of it, and the allocator would keep it all
/// for another rebuild, which never comes.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "the C library offers no other way")]
fn give_back() {
    // SAFETY: it takes a number, touches only pages that nobody has, and may be called from any thread.
    let _given: i32 = unsafe { nix::libc::malloc_trim(0) };
}

#[cfg(not(target_env = "gnu"))]
fn give_back() {}

/// Reads the log while another thread takes in what was read; tells how many frames there were, and which transfers.
fn take_in_all(
    log_dir: &Path,
    shelf: &dyn Shelf,
    promise: Option<&Promise>,
) -> Result<(End, u64, Seen), Error> {
    let (hand_over, handed_over) = sync_channel::<Vec<(Placed, Vec<Record>)>>(READ_AHEAD);
    // What was taken in goes back to the reader, which made it, to be freed: two threads that make and free the same
    // memory wait for each other in the allocator.
    let (hand_back, handed_back) = channel();
    std::thread::scope(|scope| {
        let applier = std::thread::Builder::new()
            .name("coinop-rebuild".into())
            .spawn_scoped(scope, move || {
                let gather = Gather::new(shelf);
                for batches in handed_over {
                    for (placed, records) in &batches {
                        apply::apply(&gather, placed, records)?;
                    }
                    // When the reader has gone, they are freed here.
                    drop(hand_back.send(batches));
                }
                gather.settle()
            })
            .map_err(trouble("start a thread for", log_dir))?;
        let (mut frames, mut read) = (0_u64, Vec::new());
        let gone = |_| Error::Index { why: "it does not take in the log".into() };
        let scanned = log::scan(log_dir, false, &mut |met| {
            frames += 1;
            if let Some(promise) = promise {
                promise.check(log_dir, met.seq, &met.hash)?;
            }
            let placed = Placed { seq: met.seq, at_ms: met.at_ms, segment: met.segment, offset: met.offset };
            read.push((placed, log::records(log_dir, met)?));
            if read.len() >= HANDED_OVER {
                handed_back.try_iter().for_each(drop);
                hand_over.send(std::mem::take(&mut read)).map_err(gone)
            } else {
                Ok(())
            }
        });
        let rest = hand_over.send(read).map_err(gone);
        drop(hand_over);
        let applied = applier
            .join()
            .unwrap_or_else(|_| Err(Error::Index { why: "sled panicked while the log was taken in".into() }));
        // What is wrong with the log comes first, unless it only says that the applier has gone.
        match (scanned, applied) {
            (Ok(end), Ok(seen)) => rest.map(|()| (end, frames, seen)),
            (Err(Error::Index { .. }) | Ok(_), Err(applied)) => Err(applied),
            (Err(scanned), _) => Err(scanned),
        }
    })
}

fn put_applied(shelf: &dyn Shelf, position: &Position) -> Result<(), Error> {
    let mut value = position.seq.to_be_bytes().to_vec();
    value.extend_from_slice(&position.hash);
    shelf.put(Tree::Meta, APPLIED, &value)
}

/// Opens the database and reads each of its trees in a thread that may panic or hang without taking us
/// along. With `expected`, the database must have taken in exactly that much.
fn open_watched(
    path: &Path,
    cache_bytes: u64,
    patience: Duration,
    expected: Option<Position>,
) -> Result<Box<dyn Shelf>, Error> {
    let (tell, told) = channel();
    let dir = path.to_path_buf();
    std::thread::Builder::new()
        .name("coinop-index".into())
        .spawn(move || {
            if tell.send(open_and_look(&dir, cache_bytes, expected)).is_err() {
                tracing::warn!("the index opened after its time and is not used");
            }
        })
        .map_err(trouble("start a thread for", path))?;
    match told.recv_timeout(patience) {
        Ok(opened) => opened,
        Err(RecvTimeoutError::Timeout) => {
            Err(Error::Index { why: format!("it did not open within {} s", patience.as_secs_f32()) })
        }
        Err(RecvTimeoutError::Disconnected) => {
            Err(Error::Index { why: "sled panicked while opening it".into() })
        }
    }
}

fn open_and_look(path: &Path, cache_bytes: u64, expected: Option<Position>) -> Result<Box<dyn Shelf>, Error> {
    let shelf = Sled::open(path, cache_bytes)?;
    for tree in Tree::ALL {
        shelf.upwards(tree, &[], None, 1)?;
    }
    if let Some(expected) = expected {
        let found = shelf.get(Tree::Meta, APPLIED)?;
        let mut wanted = expected.seq.to_be_bytes().to_vec();
        wanted.extend_from_slice(&expected.hash);
        if found.as_deref() != Some(&wanted) {
            return Err(Error::Index { why: "it has not taken in the log that is here".into() });
        }
    }
    Ok(Box::new(Packed::new(shelf)))
}
