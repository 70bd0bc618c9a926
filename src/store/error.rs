//! What can go wrong in the store, in words for an operator. `docs/store.md` says what to do about each.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::lock::HeldBy;
use super::log::segment_path;

/// The first entry of the log that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    pub segment: PathBuf,
    /// Byte in the segment's file at which the entry begins.
    pub offset: u64,
    /// Seq that the entry has or should have.
    pub seq: u64,
    pub why: &'static str,
}

impl Damage {
    pub(super) fn new(log_dir: &Path, segment: u64, offset: u64, seq: u64, why: &'static str) -> Self {
        Damage { segment: segment_path(log_dir, segment), offset, seq, why }
    }
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Damage { segment, offset, seq, why } = self;
        write!(f, "entry {seq} at byte {offset} of {}: {why}", segment.display())
    }
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("the data folder {} is in use by {holder}; stop that node or use another --data-dir", dir.display())]
    Held { dir: PathBuf, holder: Box<HeldBy> },
    #[error("the key {key} is in use by {holder}; one key serves one node")]
    KeyHeld { key: String, holder: Box<HeldBy> },
    #[error(
        "{open} open jobs in {} were taken with the key {taken_by}, and only that key can answer them, not {key}; \
         start with that key until they have ended, or use another --data-dir", dir.display()
    )]
    OtherKey { dir: PathBuf, taken_by: String, key: String, open: usize },
    #[error("the folder of key locks {} is not ours alone; remove it or correct its owner and mode", dir.display())]
    KeyLockFolder { dir: PathBuf },
    #[error("there is no coinop data in {}", dir.display())]
    Missing { dir: PathBuf },
    #[error("the log is damaged: {0}; restore a backup or see docs/store.md")]
    Corrupt(Damage),
    #[error("the log in {} ends at entry {found}, but entry {promised} was durable; restore a backup", dir.display())]
    Shortened { dir: PathBuf, promised: u64, found: u64 },
    #[error(
        "the log was written by a newer version: {at}: {why}; install that version or a later one (the log is not damaged)"
    )]
    Unreadable { at: Damage, why: String },
    #[error("could not {doing} {}: the disk is full; make room and start the node again", path.display())]
    Full { doing: &'static str, path: PathBuf },
    #[error("could not {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: Arc<io::Error> },
    #[error("the index failed: {why}; it is made again from the log when the node starts again")]
    Index { why: String },
    #[error("a batch without records")]
    EmptyBatch,
    #[error("{what} too large: {is}, at most {most}")]
    TooLarge { what: &'static str, is: u64, most: u64 },
    #[error("too many records wait to be written")]
    Busy,
    #[error("the store is closed")]
    Closed,
    #[error("the store was opened for reading only")]
    ReadOnly,
    #[error("a blob is named by 64 lower-case hex digits")]
    BadBlobName,
    #[error("the blob {} does not have the bytes that its name promises", path.display())]
    BlobDamaged { path: PathBuf },
    #[error("{} exists already", path.display())]
    Exists { path: PathBuf },
}
