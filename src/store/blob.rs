//! Things too large for the log: files named by the SHA-256 of their bytes, whole and durable before anybody
//! learns the name, and the oldest removed when they take more than they may. Which records point at them is not
//! known here, so whoever asks for one must bear that it is gone.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::Error;
use super::disk::{self, trouble};

/// Largest blob, bytes.
pub const BLOB_MAX_BYTES: u64 = 64 * 1024 * 1024;

/// What a blob takes at least, bytes: many small ones fill a disk, too.
const BLOCK_BYTES: u64 = 4096;

/// The folder of blobs, which grows to a cap and no further.
pub(super) struct Blobs {
    dir: PathBuf,
    /// All blobs together, bytes.
    most: u64,
    /// Bytes that are taken, not counted before the first blob is put. Held while one is put, so that two callers
    /// do not both take the last room.
    taken: Mutex<Option<u64>>,
}

impl Blobs {
    pub(super) fn new(dir: PathBuf, most: u64) -> Self {
        Blobs { dir, most, taken: Mutex::new(None) }
    }

    /// Stores `bytes` and returns their SHA-256 in lower-case hex. The oldest blobs go when there is no room.
    pub(super) fn put(&self, bytes: &[u8]) -> Result<String, Error> {
        let (is, most) = (bytes.len() as u64, BLOB_MAX_BYTES.min(self.most));
        if is > most {
            return Err(Error::TooLarge { what: "blob", is, most });
        }
        let sha = hex::encode(Sha256::digest(bytes));
        let path = path(&self.dir, &sha)?;
        let folder = path.parent().unwrap_or(&self.dir);
        // Nothing that can panic runs while it is held.
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        // An old file may be damaged, or its name not yet durable: one that reads well needs only the latter.
        if read(&path, &sha, BLOB_MAX_BYTES).is_ok_and(|found| found.is_some()) {
            let now = SystemTime::now();
            if let Err(error) =
                File::options().write(true).open(&path).and_then(|file| file.set_modified(now))
            {
                tracing::debug!(%error, "a blob that was put again keeps its age");
            }
            disk::sync_dir(folder)?;
            return Ok(sha);
        }
        let before = match *taken {
            Some(taken) => taken,
            None => self.count()?.iter().map(|blob| blob.bytes).sum(),
        };
        let before = self.make_room(before, blocks(is))?;
        *taken = Some(before.saturating_add(blocks(is)));
        disk::make_dir(folder)?;
        disk::write_whole(&path, bytes)?;
        // Another caller may have made the folder just now and not yet synced its name.
        disk::sync_dir(&self.dir)?;
        Ok(sha)
    }

    /// Removes the oldest blobs when `more` bytes do not fit any more, and a tenth of the cap besides, so that the
    /// folder is not listed for each blob. Returns what is taken then. What cannot be removed stays, and is said.
    fn make_room(&self, taken: u64, more: u64) -> Result<u64, Error> {
        if taken.saturating_add(more) <= self.most {
            return Ok(taken);
        }
        let mut blobs = self.count()?;
        blobs.sort_by_key(|blob| blob.modified);
        let mut taken: u64 = blobs.iter().map(|blob| blob.bytes).sum();
        let (mut gone, wanted) = (0_u64, self.most - self.most / 10);
        for blob in &blobs {
            if taken.saturating_add(more) <= wanted {
                break;
            }
            match fs::remove_file(&blob.path) {
                Ok(()) => (taken, gone) = (taken.saturating_sub(blob.bytes), gone + 1),
                Err(error) => {
                    tracing::warn!(path = %blob.path.display(), %error, "an old blob was not removed")
                }
            }
        }
        tracing::info!(gone, most = self.most, "removed the oldest blobs to make room");
        Ok(taken)
    }

    fn count(&self) -> Result<Vec<Found>, Error> {
        let mut found = Vec::new();
        for folder in disk::names(&self.dir)? {
            let folder = self.dir.join(folder);
            for name in disk::names(&folder)?.into_iter().filter(|name| !name.ends_with(disk::TEMPORARY)) {
                let path = folder.join(name);
                let facts = fs::metadata(&path).map_err(trouble("look at", &path))?;
                let modified = facts.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                found.push(Found { modified, bytes: blocks(facts.len()), path });
            }
        }
        Ok(found)
    }
}

/// A blob as the folder shows it.
struct Found {
    modified: SystemTime,
    bytes: u64,
    path: PathBuf,
}

/// What a file of so many bytes takes on a disk, about.
fn blocks(bytes: u64) -> u64 {
    bytes.max(1).div_ceil(BLOCK_BYTES).saturating_mul(BLOCK_BYTES)
}

/// The bytes of a blob, `None` when it is not here.
pub(super) fn get(dir: &Path, sha: &str, cap: u64) -> Result<Option<Vec<u8>>, Error> {
    read(&path(dir, sha)?, sha, cap)
}

fn read(path: &Path, sha: &str, cap: u64) -> Result<Option<Vec<u8>>, Error> {
    let Some(bytes) = disk::read_small(path, cap.saturating_add(1))? else { return Ok(None) };
    if bytes.len() as u64 > cap {
        return Err(Error::TooLarge { what: "blob", is: bytes.len() as u64, most: cap });
    }
    if hex::encode(Sha256::digest(&bytes)) != sha {
        return Err(Error::BlobDamaged { path: path.to_path_buf() });
    }
    Ok(Some(bytes))
}

/// The name comes from records and command lines: nothing but 64 hex digits becomes a path.
fn path(dir: &Path, sha: &str) -> Result<PathBuf, Error> {
    let is_hex = sha.len() == 64 && sha.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    match sha.get(..2) {
        Some(folder) if is_hex => Ok(dir.join(folder).join(sha)),
        _ => Err(Error::BadBlobName),
    }
}
