//! Looking after a store: checking the whole chain, and copying it to another place while the node runs.

use std::fs::{self, File};
use std::io::{Read, copy};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::disk::{self, trouble};
use super::index::{self, Promise};
use super::log::{self, Position, segment_path, segments};
use super::rows::Entry;
use super::writer::Applied;
use super::{BLOBS, Damage, Error, INDEX, LOG, Restored};

/// Reads the whole log up to `known` (the whole log when `None`) and checks every checksum, the chain, and that what was
/// durable at the last orderly stop is there.
pub(super) fn verify(log_dir: &Path, known: Option<Applied>) -> Result<Position, Error> {
    verify_with::<Error>(log_dir, known, &mut |_| Ok(()))
}

/// What is promised of the log in this folder. Asked before the log is read: meanwhile it can only grow.
pub(super) fn promise_of(log_dir: &Path) -> Result<Option<Promise>, Error> {
    log_dir.parent().map_or(Ok(None), |dir| index::promise(&dir.join(INDEX)))
}

/// As [`verify`], and shows every record on the way, oldest first.
pub(super) fn verify_with<E: From<Error>>(
    log_dir: &Path,
    known: Option<Applied>,
    visit: &mut dyn FnMut(Entry) -> Result<(), E>,
) -> Result<Position, E> {
    // The scan knows the store's errors only; what the visitor says waits here.
    let mut said = None;
    let checked = check(log_dir, known, promise_of(log_dir)?, &mut |entry| {
        visit(entry).map_err(|e| {
            said = Some(e);
            Error::Closed
        })
    });
    match said {
        Some(e) => Err(e),
        None => Ok(checked?),
    }
}

fn check(
    log_dir: &Path,
    known: Option<Applied>,
    promise: Option<Promise>,
    visit: &mut dyn FnMut(Entry) -> Result<(), Error>,
) -> Result<Position, Error> {
    let mut met_known = known.is_none_or(|k| k.position.seq == 0);
    let end = log::scan(log_dir, false, &mut |met| {
        if let Some(promise) = &promise {
            promise.check(log_dir, met.seq, &met.hash)?;
        }
        if let Some(known) = &known
            && known.position.seq == met.seq
        {
            if known.position.hash != met.hash {
                let why = "the entry is not the one that was written";
                return Err(Error::Corrupt(Damage::new(log_dir, met.segment, met.offset, met.seq, why)));
            }
            met_known = true;
        }
        if known.is_none_or(|known| met.seq <= known.position.seq) {
            for record in log::records(log_dir, met)? {
                visit(Entry { seq: met.seq, at_ms: met.at_ms, record })?;
            }
        }
        Ok(())
    });
    match (end, known) {
        (Ok(end), None) => {
            index::check_end(log_dir, promise.as_ref(), &end.position)?;
            Ok(end.position)
        }
        (Ok(_), Some(known)) if met_known => Ok(known.position),
        (Ok(end), Some(known)) => Err(Error::Shortened {
            dir: log_dir.to_path_buf(),
            promised: known.position.seq,
            found: end.position.seq,
        }),
        // What is being written at this moment is nobody's yet.
        (Err(Error::Corrupt(at)), Some(known)) if at.seq > known.position.seq => Ok(known.position),
        (Err(e), _) => Err(e),
    }
}

/// Copies the log up to `until` and the blobs into the new folder `to`, checks the copy, and only then gives
/// it its name. The index is not copied: it is made again.
pub(super) fn backup(dir: &Path, to: &Path, until: &Applied) -> Result<Position, Error> {
    if to.exists() {
        return Err(Error::Exists { path: to.to_path_buf() });
    }
    let partial = to.with_extension("partial");
    if partial.exists() {
        return Err(Error::Exists { path: partial });
    }
    let (log_from, log_to) = (dir.join(LOG), partial.join(LOG));
    disk::make_dir(&log_to)?;
    for segment in segments(&log_from)?.into_iter().filter(|s| *s <= until.segment) {
        let bytes = if segment == until.segment { until.offset } else { u64::MAX };
        copy_file(&segment_path(&log_from, segment), &segment_path(&log_to, segment), bytes)?;
    }
    copy_blobs(&dir.join(BLOBS), &partial.join(BLOBS))?;
    // So that a copy that loses its end later is noticed.
    index::promise_in(&partial.join(INDEX), &Promise::of(&until.position))?;
    disk::sync_tree(&partial)?;
    let found = verify(&log_to, None)?;
    if found.seq != until.position.seq || found.hash != until.position.hash {
        let dir = log_to;
        return Err(Error::Shortened { dir, promised: until.position.seq, found: found.seq });
    }
    fs::rename(&partial, to).map_err(trouble("rename", &partial))?;
    if let Some(parent) = to.parent().filter(|p| !p.as_os_str().is_empty()) {
        disk::sync_dir(parent)?;
    }
    Ok(found)
}

/// As [`backup`], of everything that is durable in a folder that another process may be writing to.
pub(super) fn backup_of(dir: &Path, to: &Path) -> Result<Position, Error> {
    let log_dir = dir.join(LOG);
    if !disk::is_folder(&log_dir)? {
        return Err(Error::Missing { dir: dir.to_path_buf() });
    }
    let promise = promise_of(&log_dir)?;
    let end = log::scan(&log_dir, false, &mut |_| Ok(()))?;
    index::check_end(&log_dir, promise.as_ref(), &end.position)?;
    let until =
        Applied { position: end.position, segment: end.segment.unwrap_or_default(), offset: end.offset };
    backup(dir, to, &until)
}

/// Puts the log of the backup `from` in the place of the log in `dir`, at one stroke; the old one gets another name,
/// which is returned. Blobs that are missing are copied. The caller holds the folder's lock.
pub(super) fn restore(dir: &Path, from: &Path, now_ms: u64) -> Result<(Position, Option<PathBuf>), Error> {
    let (log_from, log_here) = (from.join(LOG), dir.join(LOG));
    if !disk::is_folder(&log_from)? {
        return Err(Error::Missing { dir: from.to_path_buf() });
    }
    let promised = verify(&log_from, None)?;
    let coming = dir.join(format!("{LOG}.restoring"));
    if coming.exists() {
        // Of a restore that was broken off before its stroke.
        fs::remove_dir_all(&coming).map_err(trouble("remove", &coming))?;
    }
    disk::make_dir(&coming)?;
    for segment in segments(&log_from)? {
        copy_file(&segment_path(&log_from, segment), &segment_path(&coming, segment), u64::MAX)?;
    }
    copy_blobs(&from.join(BLOBS), &dir.join(BLOBS))?;
    disk::sync_tree(&coming)?;
    // What is promised in this folder is promised of the log that goes.
    let found = check(&coming, None, None, &mut |_| Ok(()))?;
    if found != promised {
        return Err(Error::Shortened { dir: coming, promised: promised.seq, found: found.seq });
    }
    // The index is of the other log.
    let index = dir.join(INDEX);
    if index.exists() {
        fs::remove_dir_all(&index).map_err(trouble("remove", &index))?;
    }
    let aside = format!("{LOG}.before-{now_ms}");
    // Before the stroke: a mark without a restore costs a comparison with the wallet, the other way round money.
    Restored { at_ms: now_ms, aside: log_here.exists().then(|| aside.clone()) }.write(dir)?;
    let aside = if log_here.exists() {
        // One stroke: a crash leaves the one log or the other, never none.
        let stroke = renameat2(AT_FDCWD, &coming, AT_FDCWD, &log_here, RenameFlags::RENAME_EXCHANGE);
        stroke.map_err(|e| trouble("exchange", &log_here)(e.into()))?;
        let aside = dir.join(aside);
        fs::rename(&coming, &aside).map_err(trouble("rename", &coming))?;
        Some(aside)
    } else {
        fs::rename(&coming, &log_here).map_err(trouble("rename", &coming))?;
        None
    };
    disk::sync_dir(dir)?;
    Ok((found, aside))
}

/// Copies blobs that are not there yet.
fn copy_blobs(from: &Path, to: &Path) -> Result<(), Error> {
    if !from.is_dir() {
        return Ok(());
    }
    for folder in disk::names(from)? {
        let (from, to) = (from.join(&folder), to.join(&folder));
        disk::make_dir(&to)?;
        for name in disk::names(&from)?.into_iter().filter(|n| !n.ends_with(disk::TEMPORARY)) {
            // The node goes on, and may have removed an old one meanwhile.
            if from.join(&name).exists() && !to.join(&name).exists() {
                copy_file(&from.join(&name), &to.join(&name), u64::MAX)?;
            }
        }
    }
    Ok(())
}

fn copy_file(from: &Path, to: &Path, bytes: u64) -> Result<(), Error> {
    let source = File::open(from).map_err(trouble("open", from))?;
    let mut target = disk::create(to)?;
    copy(&mut source.take(bytes), &mut target).map_err(trouble("copy to", to)).map(drop)
}

/// Removes files that were never finished.
pub(super) fn sweep_temporary(dir: &Path) -> Result<(), Error> {
    for name in disk::names(dir)? {
        let path = dir.join(&name);
        if path.is_dir() {
            sweep_temporary(&path)?;
        } else if path.extension().is_some_and(|e| e == disk::TEMPORARY) {
            disk::remove(&path)?;
        }
    }
    Ok(())
}
