//! Making files that survive a power cut: the file is synced, then renamed, then its folder is synced.
//! Knows nothing of what is in them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::Error;

/// Ending of a file that is not finished; one found at start is litter.
pub(super) const TEMPORARY: &str = "tmp";

/// Turns an I/O error into ours, naming what was being done to which file.
pub(super) fn trouble(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Full { doing, path },
        _ => Error::Io { doing, path, source: source.into() },
    }
}

/// Whether this is a folder. One that may not be looked at is an error, and not one that is missing.
pub(super) fn is_folder(dir: &Path) -> Result<bool, Error> {
    match fs::metadata(dir) {
        Ok(found) => Ok(found.is_dir()),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(e) => Err(trouble("open", dir)(e)),
    }
}

/// Makes new names in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(trouble("sync the folder", dir))
}

/// Makes `dir` and what is missing above it, readable by its owner only, each name durable.
pub(super) fn make_dir(dir: &Path) -> Result<(), Error> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    make_dir(&parent)?;
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(trouble("make the folder", dir)(e)),
        _ => {}
    }
    sync_dir(&parent)
}

/// Opens a new file for writing; an old one of this name is emptied.
pub(super) fn create(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(trouble("create", path))
}

/// Puts `bytes` at `path` as a whole or not at all: temporary file, sync, rename, sync of the folder.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    // Two callers may write the same blob at once; each has its own temporary name.
    static TURN: AtomicU64 = AtomicU64::new(0);
    let turn = TURN.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}-{turn}.{TEMPORARY}", std::process::id()));
    let mut file = create(&temporary)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(trouble("write", path));
    if let Err(e) = written {
        if let Err(left) = fs::remove_file(&temporary) {
            tracing::debug!(path = %temporary.display(), error = %left, "a temporary file is left behind");
        }
        return Err(e);
    }
    match path.parent() {
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}

/// Removes a file if it is there and makes that durable; true when it was there.
pub(super) fn remove(path: &Path) -> Result<bool, Error> {
    match fs::remove_file(path) {
        Ok(()) => {
            if let Some(parent) = path.parent() {
                sync_dir(parent)?;
            }
            Ok(true)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(trouble("remove", path)(e)),
    }
}

/// Reads a small file, `None` when there is none; no more than `cap` bytes.
pub(super) fn read_small(path: &Path, cap: u64) -> Result<Option<Vec<u8>>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(trouble("open", path)(e)),
    };
    let mut out = Vec::new();
    file.take(cap).read_to_end(&mut out).map_err(trouble("read", path))?;
    Ok(Some(out))
}

/// Names in a folder, sorted; nothing when the folder is missing. Names that are not UTF-8 are left out.
pub(super) fn names(dir: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(trouble("list the folder", dir)(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(trouble("list the folder", dir))?;
        names.extend(entry.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// Syncs every file below `dir` and the folders themselves.
pub(super) fn sync_tree(dir: &Path) -> Result<(), Error> {
    for name in names(dir)? {
        let path = dir.join(name);
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).and_then(|f| f.sync_all()).map_err(trouble("sync", &path))?;
        }
    }
    sync_dir(dir)
}
