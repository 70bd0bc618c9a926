//! Things too large for the log: files named by the SHA-256 of their bytes, whole and durable before anybody
//! learns the name. Which records point at them is not known here.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::Error;
use super::disk;

/// Largest blob, bytes.
pub const BLOB_MAX_BYTES: u64 = 64 * 1024 * 1024;

/// Stores `bytes` and returns their SHA-256 in lower-case hex.
pub(super) fn put(dir: &Path, bytes: &[u8]) -> Result<String, Error> {
    if bytes.len() as u64 > BLOB_MAX_BYTES {
        return Err(Error::TooLarge { what: "blob", is: bytes.len() as u64, most: BLOB_MAX_BYTES });
    }
    let sha = hex::encode(Sha256::digest(bytes));
    let path = path(dir, &sha)?;
    let folder = path.parent().unwrap_or(dir);
    // An old file may be damaged, or its name not yet durable: one that reads well needs only the latter.
    if read(&path, &sha, BLOB_MAX_BYTES).is_ok_and(|found| found.is_some()) {
        disk::sync_dir(folder)?;
        return Ok(sha);
    }
    disk::make_dir(folder)?;
    disk::write_whole(&path, bytes)?;
    // Another caller may have made the folder just now and not yet synced its name.
    disk::sync_dir(dir)?;
    Ok(sha)
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
