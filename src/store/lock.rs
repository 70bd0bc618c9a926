//! One node a data folder, one node a key on this host: two advisory file locks that the kernel drops when
//! the process ends, each naming its holder in its file.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::Error;
use super::disk::{self, trouble};

/// Name of the lock file in the data folder.
const LOCK: &str = "LOCK";

/// Who opens a store: goes into the lock files and into the log's `Opened` record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Lower-case hex of the node's public key.
    pub pubkey: String,
    pub version: String,
}

impl Holder {
    /// This version of the program with this key.
    pub fn new(pubkey: impl Into<String>) -> Self {
        Holder { pubkey: pubkey.into(), version: env!("CARGO_PKG_VERSION").into() }
    }
}

/// Who holds a lock, as written in its file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldBy {
    pub pid: u32,
    /// Unix milliseconds when it opened the store.
    pub started_ms: u64,
    pub host: String,
    /// Lower-case hex of its public key.
    pub node: String,
    /// Its data folder.
    pub dir: PathBuf,
    pub version: String,
}

impl HeldBy {
    fn me(dir: &Path, holder: &Holder, now_ms: u64) -> Result<HeldBy, Error> {
        let host = nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned());
        Ok(HeldBy {
            pid: std::process::id(),
            started_ms: now_ms,
            host: host.unwrap_or_else(|_| "unknown host".into()),
            node: holder.pubkey.clone(),
            dir: std::path::absolute(dir).map_err(trouble("resolve", dir))?,
            version: holder.version.clone(),
        })
    }
}

impl std::fmt::Display for HeldBy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let HeldBy { pid, started_ms, host, node, dir, version } = self;
        let dir = dir.display();
        write!(
            f,
            "process {pid} on {host}, key {node}, data folder {dir}, version {version}, since {}.{:03} (Unix time)",
            started_ms / 1000,
            started_ms % 1000
        )
    }
}

/// Both locks; dropping them lets the next node in.
pub(super) struct Locks {
    _dir: Flock<File>,
    _key: Flock<File>,
}

impl Locks {
    /// The folder's lock alone, for work on a node that stands still.
    pub(super) fn folder(dir: &Path, now_ms: u64) -> Result<Flock<File>, Error> {
        let me = HeldBy::me(dir, &Holder::new("none: a restore"), now_ms)?;
        take(&dir.join(LOCK), &me)?
            .map_err(|holder| Error::Held { dir: dir.to_path_buf(), holder: Box::new(holder) })
    }

    /// `key_dir` holds one file a key; see [`key_lock_dir`].
    pub(super) fn take(dir: &Path, key_dir: &Path, holder: &Holder, now_ms: u64) -> Result<Self, Error> {
        let me = HeldBy::me(dir, holder, now_ms)?;
        let path = dir.join(LOCK);
        let _dir = take(&path, &me)?
            .map_err(|holder| Error::Held { dir: dir.to_path_buf(), holder: Box::new(holder) })?;
        // The key is hex; anything else must not become a path.
        let name: String = holder.pubkey.chars().filter(char::is_ascii_alphanumeric).collect();
        let _key = take(&key_dir.join(format!("key-{name}.lock")), &me)?
            .map_err(|other| Error::KeyHeld { key: holder.pubkey.clone(), holder: Box::new(other) })?;
        Ok(Locks { _dir, _key })
    }
}

/// Folder of the key locks: shared memory of this host, so that it does not depend on `TMPDIR`, a login
/// session or a service's private /tmp, and is empty after a reboot. One a user; a folder that somebody
/// else has put there is refused.
pub(super) fn key_lock_dir() -> Result<PathBuf, Error> {
    let shared = Path::new("/dev/shm");
    let base = if shared.is_dir() { shared.to_path_buf() } else { PathBuf::from("/tmp") };
    let uid = nix::unistd::geteuid();
    let dir = base.join(format!("coinop-{uid}"));
    disk::make_dir(&dir)?;
    let found = std::fs::symlink_metadata(&dir).map_err(trouble("look at", &dir))?;
    if !found.is_dir() || found.uid() != uid.as_raw() || found.mode() & 0o022 != 0 {
        return Err(Error::KeyLockFolder { dir });
    }
    Ok(dir)
}

/// The lock, or who has it.
fn take(path: &Path, me: &HeldBy) -> Result<Result<Flock<File>, HeldBy>, Error> {
    let mut left = 20;
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(path)
            .map_err(trouble("open the lock", path))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                let bytes = serde_json::to_vec(me).unwrap_or_default();
                file.set_len(0)
                    .and_then(|()| file.write_all(&bytes))
                    .map_err(trouble("write the lock", path))?;
                return Ok(Ok(file));
            }
            Err((file, nix::errno::Errno::EWOULDBLOCK)) => {
                // The holder may be just about to write its name.
                if let Some(holder) = read_holder(&file) {
                    return Ok(Err(holder));
                }
                if left == 0 {
                    let host = "unknown host".into();
                    let (node, version) = ("unknown".to_owned(), "unknown".to_owned());
                    let dir = path.to_path_buf();
                    return Ok(Err(HeldBy { pid: 0, started_ms: 0, host, node, dir, version }));
                }
                left -= 1;
                sleep(Duration::from_millis(10));
            }
            Err((_, e)) => return Err(trouble("lock", path)(e.into())),
        }
    }
}

fn read_holder(file: &File) -> Option<HeldBy> {
    let mut bytes = vec![0; 4096];
    let read = file.read_at(&mut bytes, 0).ok()?;
    serde_json::from_slice(bytes.get(..read)?).ok()
}
