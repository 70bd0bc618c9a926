//! The node's hand inside a sandbox: opens, reads and writes by folder descriptors, never following what the job
//! has laid out. A link, a pipe or a device is refused, not opened. What changed is worked out in `changes`.

use std::ffi::{CStr, OsStr};
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use super::super::{Error, Tree};

/// Which of the sandbox's folders a path of the trait means, and the rest of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    Workspace(PathBuf),
    Job(PathBuf),
}

/// Reads a path of the trait: `/workspace/…`, `/job/…`, or relative to the workspace.
pub fn place(path: &str) -> Result<Place, Error> {
    let bad = || Error::BadPath(path.to_owned());
    let given = Path::new(path);
    let (make, rest): (fn(PathBuf) -> Place, &Path) = if let Ok(rest) = given.strip_prefix("/workspace") {
        (Place::Workspace, rest)
    } else if let Ok(rest) = given.strip_prefix("/job") {
        (Place::Job, rest)
    } else {
        (Place::Workspace, given)
    };
    let plain = rest.components().all(|part| matches!(part, Component::Normal(_)));
    if !plain || rest.as_os_str().is_empty() || path.contains('\0') || path.ends_with('/') {
        return Err(bad());
    }
    Ok(make(rest.to_owned()))
}

fn how(flags: OFlag) -> OpenHow {
    let beneath =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    // A handle opens nothing: openat2 refuses one that asks not to get a terminal.
    let no_terminal = if flags.contains(OFlag::O_PATH) { OFlag::empty() } else { OFlag::O_NOCTTY };
    OpenHow::new().flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | no_terminal).resolve(beneath)
}

/// Opens beneath `folder`. What its owner, the job, has closed to itself is opened again, step by step: a closed
/// folder shows nothing of what is in it.
pub fn open_beneath<P: ?Sized + nix::NixPath>(
    folder: BorrowedFd<'_>,
    path: &P,
    flags: OFlag,
) -> nix::Result<OwnedFd> {
    match openat2(folder, path, how(flags)) {
        Err(Errno::EACCES) => {}
        other => return other,
    }
    let path = path.with_nix_path(|path| PathBuf::from(OsStr::from_bytes(path.to_bytes())))?;
    let mut at: Option<OwnedFd> = None;
    let mut parts = path.components().peekable();
    while let Some(part) = parts.next() {
        let here = at.as_ref().map_or(folder, AsFd::as_fd);
        let flags = if parts.peek().is_some() { OFlag::O_RDONLY | OFlag::O_DIRECTORY } else { flags };
        at = Some(open_closed(here, part.as_os_str(), flags)?);
    }
    at.ok_or(Errno::EACCES)
}

/// Opens one name, and takes the right to, as its owner may.
fn open_closed(folder: BorrowedFd<'_>, name: &OsStr, flags: OFlag) -> nix::Result<OwnedFd> {
    match openat2(folder, name, how(flags)) {
        Err(Errno::EACCES) => {}
        other => return other,
    }
    let handle = openat2(folder, name, how(OFlag::O_PATH))?;
    let mode = fstat(&handle)?.st_mode;
    // Never the right to execute a file: that would read as a change of the job's.
    let opened = match kind(mode) {
        SFlag::S_IFREG => 0o600,
        SFlag::S_IFDIR => 0o700,
        _ => return Err(Errno::EACCES),
    };
    let exactly = format!("/proc/self/fd/{}", handle.as_raw_fd());
    fs::set_permissions(&exactly, Permissions::from_mode(mode & 0o7777 | opened))
        .map_err(|_| Errno::EACCES)?;
    openat2(folder, name, how(flags))
}

pub fn kind(mode: u32) -> SFlag {
    SFlag::from_bits_truncate(mode) & SFlag::S_IFMT
}

/// An opened plain file and what the kernel says of it.
pub fn open_plain<P: ?Sized + nix::NixPath>(
    folder: BorrowedFd<'_>,
    path: &P,
) -> nix::Result<Option<(File, FileStat)>> {
    // Without O_NONBLOCK a pipe would hold us until somebody writes.
    let fd = match open_beneath(folder, path, OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
        Ok(fd) => fd,
        // A socket, or a device that nobody serves.
        Err(Errno::ENXIO | Errno::ELOOP | Errno::EXDEV | Errno::ENODEV) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    let stat = fstat(&fd)?;
    Ok((kind(stat.st_mode) == SFlag::S_IFREG).then(|| (File::from(fd), stat)))
}

/// Everything in the file, or `None` when that is more than the cap.
pub fn read_capped(file: File, cap_bytes: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    file.take(cap_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= cap_bytes).then_some(bytes))
}

/// Reads one plain file.
pub fn read(folder: BorrowedFd<'_>, path: &Path, shown: &str, cap_bytes: u64) -> Result<Vec<u8>, Error> {
    let host = |source: io::Error| Error::Host { doing: "read a file", source };
    let opened = open_plain(folder, path).map_err(|errno| match errno {
        Errno::ENOENT | Errno::ENOTDIR => Error::NotFound(shown.to_owned()),
        other => host(other.into()),
    })?;
    let Some((file, _)) = opened else { return Err(Error::BadPath(shown.to_owned())) };
    let read = read_capped(file, cap_bytes).map_err(host)?;
    read.ok_or_else(|| Error::TooLarge { what: shown.to_owned(), cap_bytes })
}

/// Writes one plain file, making its folders.
pub fn write(folder: BorrowedFd<'_>, path: &Path, shown: &str, bytes: &[u8]) -> Result<(), Error> {
    let host = |source: io::Error| match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ELOOP | Errno::EXDEV | Errno::ENXIO | Errno::EISDIR | Errno::ENOTDIR) => {
            Error::BadPath(shown.to_owned())
        }
        _ => Error::Host { doing: "write a file", source },
    };
    let mut at = folder.try_clone_to_owned().map_err(host)?;
    if let Some(parent) = path.parent() {
        for part in parent.components() {
            match mkdirat(&at, part.as_os_str(), Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(host(errno.into())),
            }
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            at = open_beneath(at.as_fd(), part.as_os_str(), flags).map_err(|errno| host(errno.into()))?;
        }
    }
    let name = path.file_name().ok_or_else(|| Error::BadPath(shown.to_owned()))?;
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NONBLOCK;
    let opened = openat2(&at, name, how(flags).mode(Mode::from_bits_truncate(0o644)));
    let fd = opened.map_err(|errno| host(errno.into()))?;
    if kind(fstat(&fd).map_err(|errno| host(errno.into()))?.st_mode) != SFlag::S_IFREG {
        return Err(Error::BadPath(shown.to_owned()));
    }
    let mut file = File::from(fd);
    file.set_len(0).and_then(|()| file.write_all(bytes)).map_err(host)
}

/// Runs with another user's rights over files, in a thread of its own: files made are the job's, and what the job
/// may not write is not written. `None` runs as ourselves.
pub fn as_user<T: Send>(uid: Option<u32>, act: impl FnOnce() -> T + Send) -> T {
    let Some(uid) = uid else { return act() };
    let done = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                setfsgid(Gid::from_raw(uid));
                setfsuid(Uid::from_raw(uid));
                // The call cannot fail aloud; asking again tells what holds.
                let (gid, uid_now) = (setfsgid(Gid::from_raw(uid)), setfsuid(Uid::from_raw(uid)));
                assert!(gid.as_raw() == uid && uid_now.as_raw() == uid, "the kernel refused the job's user");
                act()
            })
            .join()
    });
    match done {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Bytes and entries of a tree, for hosts where it must be copied.
pub fn size(tree: &dyn Tree) -> io::Result<(u64, u64)> {
    let (mut bytes, mut entries) = (0u64, 0u64);
    let mut folders = vec![tree.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let found = entry.metadata()?;
            entries += 1;
            // The tmpfs gives whole pages.
            bytes += found.len().div_ceil(4096) * 4096;
            if found.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok((bytes, entries))
}

/// Copies a tree of ours into an empty workspace, both open already: the job's user, with whose rights we write, may
/// not get to either by its path.
pub fn copy(from: OwnedFd, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut listed = Dir::from_fd(from.try_clone()?)?;
    for entry in listed.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if is_dots(name) {
            continue;
        }
        let found = fstatat(&from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        match kind(found.st_mode) {
            SFlag::S_IFDIR => {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
                let below = openat2(&from, name, how(flags))?;
                mkdirat(to, name, Mode::from_bits_truncate(0o755))?;
                copy(below, openat2(to, name, how(flags))?.as_fd())?;
            }
            SFlag::S_IFLNK => nix::unistd::symlinkat(readlinkat(&from, name)?.as_os_str(), to, name)?,
            SFlag::S_IFREG => {
                let old = openat2(&from, name, how(OFlag::O_RDONLY))?;
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
                let mode = Mode::from_bits_truncate(if found.st_mode & 0o100 == 0 { 0o644 } else { 0o755 });
                let new = openat2(to, name, how(flags).mode(mode))?;
                io::copy(&mut File::from(old), &mut File::from(new))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Bytes used on the file system that a descriptor lies on.
pub fn used_bytes(folder: BorrowedFd<'_>) -> u64 {
    nix::sys::statvfs::fstatvfs(folder).map_or(0, |found| {
        let used = found.blocks().saturating_sub(found.blocks_free());
        used.saturating_mul(found.fragment_size())
    })
}

/// A name from a folder of ours or of the job's.
pub fn is_dots(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_relative_to_the_workspace_or_names_its_place() {
        assert_eq!(place("a/b").unwrap(), Place::Workspace("a/b".into()));
        assert_eq!(place("/workspace/a").unwrap(), Place::Workspace("a".into()));
        assert_eq!(place("/job/in.json").unwrap(), Place::Job("in.json".into()));
    }

    #[test]
    fn a_path_that_leaves_its_place_is_refused() {
        for path in [
            "",
            "/",
            "../a",
            "a/../../b",
            "/etc/passwd",
            "/workspace",
            "/workspace/../etc",
            "/jobs/a",
            "a\0b",
            "a/",
        ] {
            assert!(matches!(place(path), Err(Error::BadPath(said)) if said == path), "{path:?}");
        }
    }
}
