//! The mark that a log was put back from a backup: what happened after the backup is not in it. It lies beside the log, not
//! in it, because the log must stay the backup's, and it is there before the log is exchanged. Whoever has found again
//! what was lost takes it away.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::rows::Entry;
use super::{Error, disk, log};

const FILE: &str = "restored.json";
const MAX_BYTES: u64 = 4_096;

/// A restore after which the books have not been compared with the wallet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// Unix milliseconds.
    pub at_ms: u64,
    /// Where the log lies that was here before, where there was one: a folder beside `log`.
    pub aside: Option<String>,
}

impl Restored {
    /// # Errors
    /// The disk's, and [`Error::Index`] for a mark that cannot be read.
    pub fn read(dir: &Path) -> Result<Option<Restored>, Error> {
        let Some(bytes) = disk::read_small(&path(dir), MAX_BYTES)? else { return Ok(None) };
        let read = serde_json::from_slice(&bytes);
        read.map(Some).map_err(|error| Error::Index { why: format!("{FILE}: {error}") })
    }

    pub(super) fn write(&self, dir: &Path) -> Result<(), Error> {
        let bytes = serde_json::to_vec(self).map_err(|error| Error::Index { why: error.to_string() })?;
        disk::write_whole(&path(dir), &bytes)
    }

    /// What was lost is found again.
    ///
    /// # Errors
    /// The disk's.
    pub fn clear(dir: &Path) -> Result<(), Error> {
        disk::remove(&path(dir)).map(drop)
    }

    /// Shows the records of the log that was set aside, oldest first, as far as it can be read. Blocks.
    ///
    /// # Errors
    /// Where reading ended before its end; what was shown until then is good.
    pub fn lost(&self, dir: &Path, visit: &mut dyn FnMut(Entry)) -> Result<(), Error> {
        let plain = |name: &&String| !name.contains(['/', '\\']) && name.as_str() != "..";
        let Some(dir) = self.aside.as_ref().filter(plain).map(|name| dir.join(name)) else { return Ok(()) };
        if !dir.is_dir() {
            return Ok(());
        }
        let Some(mut walk) = log::Walk::between(&dir, 0, u64::MAX)? else { return Ok(()) };
        while let Some(met) = walk.next(0)? {
            for record in log::records(&dir, &met)? {
                visit(Entry { seq: met.seq, at_ms: met.at_ms, record });
            }
        }
        Ok(())
    }
}

fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}
