//! What a job changed: walks the overlay's upper layer (or the whole copy) beside the base and tells the
//! differences. All names and contents are a stranger's; only plain files are opened.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coinop_shim::beneath::{is_dots, kind, open_beneath, open_plain, read_capped};
use coinop_shim::sys;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, readlinkat};
use nix::sys::stat::{FileStat, SFlag, fstatat};

use super::super::found::{DEPTH, Found, bounded};
use super::super::{Changes, Content, Error, LeaveOut};

/// Bytes compared at once.
const CHUNK: u64 = 64 * 1024;

/// Everything that differs, sorted by path. `upper` holds only changes when `overlay`, else a whole tree.
pub fn changes(
    upper: BorrowedFd<'_>,
    base: Option<OwnedFd>,
    overlay: bool,
    cap_bytes: u64,
    leave_out: LeaveOut,
) -> Result<Changes, Error> {
    let mut walk = Walk(Found::new(cap_bytes, leave_out));
    let top = open_beneath(upper, c".", OFlag::O_RDONLY | OFlag::O_DIRECTORY).map_err(host)?;
    walk.folder(top, base, &mut Vec::new(), !overlay, 0)?;
    Ok(walk.0.sorted())
}

struct Walk(Found);

fn host(errno: Errno) -> Error {
    Error::Host { doing: "read what the job changed", source: errno.into() }
}

/// One that the job removed while we looked is no error, nor one that it made something else: a folder of a link
/// (EINVAL), a link of a folder (ELOOP).
fn there<T>(found: nix::Result<T>) -> Result<Option<T>, Error> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::EINVAL | Errno::ELOOP) => Ok(None),
        Err(errno) => Err(host(errno)),
    }
}

fn look(folder: Option<BorrowedFd<'_>>, name: &CStr) -> Result<Option<FileStat>, Error> {
    let Some(folder) = folder else { return Ok(None) };
    there(fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW))
}

fn names(folder: OwnedFd) -> Result<BTreeSet<CString>, Error> {
    let mut listed = Dir::from_fd(folder).map_err(host)?;
    let mut names = BTreeSet::new();
    for entry in listed.iter() {
        let name = entry.map_err(host)?.file_name().to_owned();
        if !is_dots(&name) {
            names.insert(name);
        }
    }
    Ok(names)
}

impl Walk {
    /// `whole`: what is not in this folder is gone, whatever the base has.
    fn folder(
        &mut self,
        upper: OwnedFd,
        base: Option<OwnedFd>,
        path: &mut Vec<u8>,
        whole: bool,
        depth: usize,
    ) -> Result<(), Error> {
        bounded(path, depth)?;
        let here =
            names(upper.try_clone().map_err(|source| Error::Host { doing: "list a folder", source })?)?;
        let counts = |name: &&CString| depth > 0 || name.to_bytes() != b".git";
        for name in here.iter().filter(counts) {
            let before = enter(path, name);
            self.entry(upper.as_fd(), base.as_ref().map(AsFd::as_fd), name, path, whole, depth)?;
            path.truncate(before);
        }
        let Some(base) = base.filter(|_| whole) else { return Ok(()) };
        for name in names(base)?.difference(&here).filter(counts) {
            let before = enter(path, name);
            self.0.tell(path, Content::Deleted)?;
            path.truncate(before);
        }
        Ok(())
    }

    fn entry(
        &mut self,
        upper: BorrowedFd<'_>,
        base: Option<BorrowedFd<'_>>,
        name: &CStr,
        path: &mut Vec<u8>,
        whole: bool,
        depth: usize,
    ) -> Result<(), Error> {
        let Some(now) = look(Some(upper), name)? else { return Ok(()) };
        let was = look(base, name)?;
        let was_kind = was.map(|was| kind(was.st_mode));
        let is_new = !matches!(was_kind, Some(SFlag::S_IFREG | SFlag::S_IFLNK));
        match kind(now.st_mode) {
            SFlag::S_IFREG | SFlag::S_IFLNK if is_new && self.0.leaves_out(path, false) => {
                self.0.left_out(1);
                // What the base has below this name is gone all the same.
                if was.is_some() { self.0.tell(path, Content::Deleted) } else { Ok(()) }
            }
            SFlag::S_IFREG => {
                let Some(Some((mut file, now))) = there(open_plain(upper, name))? else { return Ok(()) };
                let executable = now.st_mode & 0o100 != 0;
                if let (Some(base), Some(was)) = (base, was)
                    && was_kind == Some(SFlag::S_IFREG)
                    && (was.st_mode & 0o100 != 0) == executable
                    && was.st_size == now.st_size
                    && same(base, name, &mut file)?
                {
                    return Ok(());
                }
                let read = file.rewind().and_then(|()| read_capped(file, self.0.left()));
                let bytes =
                    read.map_err(|source| Error::Host { doing: "read what the job changed", source })?;
                let bytes = bytes.ok_or_else(|| self.0.too_large())?;
                self.0.tell(path, Content::File { bytes, executable })
            }
            SFlag::S_IFLNK => {
                let Some(target) = there(readlinkat(upper, name))? else { return Ok(()) };
                if let Some(base) = base
                    && was_kind == Some(SFlag::S_IFLNK)
                    && there(readlinkat(base, name))?.as_ref() == Some(&target)
                {
                    return Ok(());
                }
                let target = std::os::unix::ffi::OsStringExt::into_vec(target);
                self.0.tell(path, Content::Symlink { target })
            }
            SFlag::S_IFDIR => {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
                let Some(below) = there(open_beneath(upper, name, flags))? else { return Ok(()) };
                let base_below = match (base, was_kind) {
                    (Some(base), Some(SFlag::S_IFDIR)) => there(open_beneath(base, name, flags))?,
                    (_, Some(_)) => {
                        self.0.tell(path, Content::Deleted)?;
                        None
                    }
                    _ => None,
                };
                if was.is_none() && self.0.leaves_out(path, true) {
                    let count = count(below, depth + 1)?;
                    self.0.left_out(count);
                    return Ok(());
                }
                let whole = whole || sys::is_opaque(below.as_fd());
                self.folder(below, base_below, path, whole, depth + 1)
            }
            // A whiteout; or a pipe, socket or device, which no tree can hold: either way the base's entry is gone.
            _ if was.is_some() => self.0.tell(path, Content::Deleted),
            _ => Ok(()),
        }
    }
}

/// Files and links below a folder that is left out; what lies deeper than anything is told is not counted.
fn count(folder: OwnedFd, depth: usize) -> Result<u64, Error> {
    let mut found = 0;
    let again = folder.try_clone().map_err(|source| Error::Host { doing: "list a folder", source })?;
    for name in names(again)? {
        match look(Some(folder.as_fd()), &name)?.map(|now| kind(now.st_mode)) {
            Some(SFlag::S_IFREG | SFlag::S_IFLNK) => found += 1,
            Some(SFlag::S_IFDIR) if depth < DEPTH => {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
                if let Some(below) = there(open_beneath(folder.as_fd(), name.as_c_str(), flags))? {
                    found += count(below, depth + 1)?;
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Goes one name deeper; the length to cut back to.
fn enter(path: &mut Vec<u8>, name: &CStr) -> usize {
    let before = path.len();
    if before > 0 {
        path.push(b'/');
    }
    path.extend_from_slice(name.to_bytes());
    before
}

/// Whether the base's file of this name holds the same bytes; neither is loaded whole.
fn same(base: BorrowedFd<'_>, name: &CStr, now: &mut File) -> Result<bool, Error> {
    let Some(Some((mut was, _))) = there(open_plain(base, name))? else { return Ok(false) };
    let host = |source| Error::Host { doing: "read the base", source };
    let (mut before, mut after) = (Vec::new(), Vec::new());
    loop {
        before.clear();
        after.clear();
        (&mut was).take(CHUNK).read_to_end(&mut before).map_err(host)?;
        (&mut *now).take(CHUNK).read_to_end(&mut after).map_err(host)?;
        if before != after || before.is_empty() {
            return Ok(before == after);
        }
    }
}
