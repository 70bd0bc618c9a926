//! Opens, reads and makes files by folder descriptors, never following what a job has laid out: a link, a pipe or a
//! device is refused, not opened.

use std::ffi::{CStr, OsStr};
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};

/// Opens by exactly the names given: no link is followed, no folder is left.
pub fn how(flags: OFlag) -> OpenHow {
    let beneath =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    // A handle opens nothing: openat2 refuses one that asks not to get a terminal.
    let no_terminal = if flags.contains(OFlag::O_PATH) { OFlag::empty() } else { OFlag::O_NOCTTY };
    OpenHow::new().flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | no_terminal).resolve(beneath)
}

/// Opens beneath `folder`. What its owner, the job, has closed to itself is opened again, step by step from `folder`
/// itself on: a closed folder shows nothing of what is in it.
pub fn open_beneath<P: ?Sized + nix::NixPath>(
    folder: BorrowedFd<'_>,
    path: &P,
    flags: OFlag,
) -> nix::Result<OwnedFd> {
    match openat2(folder, path, how(flags)) {
        Err(Errno::EACCES) => {}
        other => return other,
    }
    open_up(folder, 0o700)?;
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
    // Never the right to execute a file: that would read as a change of the job's.
    let opened = match kind(fstat(&handle)?.st_mode) {
        SFlag::S_IFREG => 0o600,
        SFlag::S_IFDIR => 0o700,
        _ => return Err(Errno::EACCES),
    };
    open_up(handle.as_fd(), opened)?;
    openat2(folder, name, how(flags))
}

/// Gives its owner these rights, where they lack.
fn open_up(handle: BorrowedFd<'_>, rights: u32) -> nix::Result<()> {
    let mode = fstat(handle)?.st_mode;
    if mode & rights == rights {
        return Ok(());
    }
    let exactly = format!("/proc/self/fd/{}", handle.as_raw_fd());
    fs::set_permissions(&exactly, Permissions::from_mode(mode & 0o7777 | rights)).map_err(|_| Errno::EACCES)
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

/// Opens one plain file to be written, making it and its folders; `None` when the name is taken by something else.
///
/// # Errors
/// ELOOP, EXDEV, ENXIO, EISDIR or ENOTDIR where the job has laid out a trap; else the system's.
pub fn create(folder: BorrowedFd<'_>, path: &Path) -> io::Result<Option<File>> {
    let mut at = folder.try_clone_to_owned()?;
    for part in path.parent().into_iter().flat_map(Path::components) {
        match mkdirat(&at, part.as_os_str(), Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        at = open_beneath(at.as_fd(), part.as_os_str(), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    }
    let Some(name) = path.file_name() else { return Ok(None) };
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NONBLOCK;
    let fd = openat2(&at, name, how(flags).mode(Mode::from_bits_truncate(0o644)))?;
    Ok((kind(fstat(&fd)?.st_mode) == SFlag::S_IFREG).then(|| File::from(fd)))
}

/// Bytes used on the file system that a descriptor lies on.
pub fn used_bytes(folder: BorrowedFd<'_>) -> u64 {
    nix::sys::statvfs::fstatvfs(folder).map_or(0, |found| {
        let used = found.blocks().saturating_sub(found.blocks_free());
        used.saturating_mul(found.fragment_size())
    })
}

/// The inodes in use on the file system that a folder is on.
pub fn used_inodes(folder: BorrowedFd<'_>) -> u64 {
    nix::sys::statvfs::fstatvfs(folder).map_or(0, |found| found.files().saturating_sub(found.files_free()))
}

/// A name from a folder of ours or of the job's.
pub fn is_dots(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}
